"""The router of a deployment: one OpenAI-compatible face before its replicas.

Aggregated, it sends each request to the replica with the fewest in flight. Disaggregated, it owns the slots of every
prefill and decode replica and hands the KV cache of each request over between them.
`python -m cluster.router --spec JSON` starts it.
"""
