"""Hugging Face torch on the same shapes: `python -m freqkv_jax.bench.peers REQUEST`.

A process of its own, because two frameworks do not share a device's memory. REQUEST is JSON (see
`cli.bench.run_peers`); each row is one line of JSON on stdout, times in ms.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

STEPS = 32  # of decode that one repeat times
Row = dict[str, Any]


def main(request: Row) -> None:
    """Prints a row for each length: forward, decode eager, decode with static cache + compile."""
    for row in measure_all(request):
        print(json.dumps(row), flush=True)


def measure_all(request: Row) -> Iterator[Row]:
    """The rows of `main`; what does not fit in memory or in the budget is named and skipped."""
    import torch
    import transformers

    deadline = time.monotonic() + request["budget"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = request["dtype"] or ("bfloat16" if device == "cuda" else "float32")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**request["config"])
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    runs: list[tuple[str, Callable[..., Callable[[], int]]]] = []
    if "forward" in request["works"]:
        runs.append(("forward/hf-eager", _forward))
    if "decode" in request["works"]:
        runs += [("decode/hf-eager", _decode_eager), ("decode/hf-compiled", _decode_compiled)]
    for name, prepare in runs:
        for length in request["lengths"]:
            row = {"case": f"{name}/{length}", "batch": request["batch"], "dtype": dtype}
            row["torch"] = torch.__version__
            if time.monotonic() > deadline:
                yield row | {"skipped": "the time budget is spent"}
                continue
            try:
                with torch.no_grad():  # CUDA graphs fail in inference_mode (pytorch issue 135892)
                    call = prepare(model, request["batch"], length, request["repeats"])
                    yield row | _time(call, request["repeats"])
            except torch.OutOfMemoryError:
                yield row | {"skipped": "does not fit the device's memory"}
            if device == "cuda":
                torch.cuda.empty_cache()


def _time(call: Callable[[], int], repeats: int) -> Row:
    """Times `call`, which runs and returns the number of steps it took; two calls warm up."""
    begin = time.perf_counter()
    call()
    warm = time.perf_counter() - begin
    call()
    times = []
    for _ in range(repeats):
        _synchronise()
        begin = time.perf_counter()
        steps = call()
        _synchronise()
        times.append(1e3 * (time.perf_counter() - begin) / steps)
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return {"times_ms": times, "ms": median, "spread": spread, "first_call_seconds": warm}


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tokens(model: Any, batch: int, length: int) -> Any:
    import torch

    shape = (batch, length)
    return torch.randint(0, model.config.vocab_size, shape, device=model.device)


def _forward(model: Any, batch: int, length: int, repeats: int) -> Callable[[], int]:
    del repeats

    def call() -> int:
        model.model(input_ids=_tokens(model, batch, length), use_cache=False)
        return 1

    return call


def _decode_eager(model: Any, batch: int, length: int, repeats: int) -> Callable[[], int]:
    """Steps behind `length` tokens; the cache grows by STEPS a call, as it does in use."""
    del repeats
    past = model.model(input_ids=_tokens(model, batch, length), use_cache=True).past_key_values
    token = _tokens(model, batch, 1)

    def call() -> int:
        nonlocal token
        for _ in range(STEPS):
            out = model(input_ids=token, past_key_values=past, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return STEPS

    return call


def _decode_compiled(model: Any, batch: int, length: int, repeats: int) -> Callable[[], int]:
    """One compiled step (CUDA graphs) on a static cache of `length` slots, all of which it reads
    wherever it stands; the slots of all calls together stay below `length`."""
    import torch
    import transformers

    config = model.config
    past = transformers.StaticCache(config=config, max_cache_len=length)
    # Only what is made outside the compiled step has an address that CUDA graphs may count on.
    past.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device
    )
    steps = max(1, min(STEPS, length // (repeats + 3)))

    def step(token: Any) -> Any:
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(step, mode="reduce-overhead")
    token = _tokens(model, batch, 1)

    def call() -> int:
        nonlocal token
        for _ in range(steps):
            token = compiled(token).clone()
        return steps

    return call


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
