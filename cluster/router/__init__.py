"""The router of a deployment: one OpenAI-compatible face before its replicas.

Aggregated, it sends each request to the replica with the fewest in flight. Disaggregated, it owns the slots of every
prefill and decode replica and hands the KV cache of each request over between them (llama.cpp), or tells the two of
each other in the words of engines that carry it over themselves (vLLM, SGLang, TensorRT-LLM).
`python -m cluster.router --spec JSON` starts it.
"""
