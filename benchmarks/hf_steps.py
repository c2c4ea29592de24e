"""Times of single steps of a random-weight model in transformers, as JSON. Runs under the Python that has torch.

    PYTHON benchmarks/hf_steps.py CONFIG.json cuda|cpu bfloat16|float32

A prefill step computes `batch` prompts of `isl` tokens at once; a decode step one token after `isl` cached ones.
Medians of repeats in milliseconds, the device's work waited for. Imports nothing of tuner: any environment can run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

PREFILLS = ((1, 512), (1, 2048), (4, 1024), (8, 2048))
DECODES = ((1, 512), (8, 1024), (32, 1024), (64, 2048))
SMALL_PREFILLS, SMALL_DECODES = ((1, 32), (2, 64)), ((1, 32), (4, 64))
REPEATS = 15


def timed(torch: Any, device: str, call: Callable[[], object]) -> float:
    """Median milliseconds of `call`, after three that do not count."""
    times = []
    for number in range(REPEATS + 3):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def rows(torch: Any, model: Any, device: str) -> list[dict[str, object]]:
    """Every step that is timed."""
    found: list[dict[str, object]] = []
    vocabulary = model.config.vocab_size

    def tokens(batch: int, length: int) -> Any:
        return torch.randint(3, vocabulary, (batch, length), device=device)

    on_gpu = device == "cuda"
    for batch, isl in PREFILLS if on_gpu else SMALL_PREFILLS:
        prompt = tokens(batch, isl)
        took = timed(torch, device, lambda p=prompt: model(p, use_cache=True, logits_to_keep=1))  # type: ignore[misc]
        found.append({"step": "prefill", "batch": batch, "isl": isl, "ms": took})
    for batch, isl in DECODES if on_gpu else SMALL_DECODES:
        cache = model(tokens(batch, isl), use_cache=True, logits_to_keep=1).past_key_values
        token = tokens(batch, 1)

        def decode(cache: Any = cache, token: Any = token, isl: int = isl) -> None:
            model(token, past_key_values=cache, use_cache=True)
            cache.crop(isl)

        found.append({"step": "decode", "batch": batch, "isl": isl, "ms": timed(torch, device, decode)})
    return found


def main() -> None:
    """Build, time, print."""
    import torch  # type: ignore[import-not-found]  # of the environment that it runs in
    import transformers  # type: ignore[import-not-found]
    from transformers import AutoConfig, AutoModelForCausalLM

    file, device, dtype = sys.argv[1:4]
    tree = json.loads(Path(file).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    with torch.inference_mode():
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        found = rows(torch, model, device)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "rows": found}))


if __name__ == "__main__":
    main()
