"""What reading and writing cost against length: time to first token, ms a token, memory."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from freqkv_jax.decode import decode, prefill
from freqkv_jax.evals.task import Engine, Item, Record
from freqkv_jax.kv.state import KVState
from freqkv_jax.reading import Runner

PROTOCOL = "freqkv-cost-v1"
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Prefill and decode of random tokens at each length, one length an item.

    Compiling is timed apart. Rounds of making room are rare (once in a chunk), so they are timed
    by themselves: on a full cache, both alone and within a step.
    """

    lengths: tuple[int, ...] = field(
        default=LENGTHS, metadata={"help": "tokens that are read before tokens are written"}
    )
    new_tokens: int = field(default=256, metadata={"help": "tokens written for tokens a second"})
    single_steps: int = field(
        default=100, metadata={"help": "tokens written one by one, for p50 and p99"}
    )
    rows: int = field(default=1, metadata={"help": "texts that are read and written together"})
    repeats: int = field(default=3, metadata={"help": "timed runs of a length; medians count"})
    seed: int = field(default=0, metadata={"help": "of the random tokens"})

    name: ClassVar[str] = "cost"
    protocol: ClassVar[str] = PROTOCOL
    measures_time: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"--lengths must be numbers of at least 2, got {list(self.lengths)}")
        for name in ("new_tokens", "single_steps", "rows", "repeats"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}")

    def items(self, engine: Engine) -> list[Item]:
        """One a length, short ones first: the peak of memory is that of the process so far."""
        del engine
        return [
            Item(key=f"cost/{length}", length=length, group=f"{length:012d}")
            for length in sorted(set(self.lengths))
        ]

    def describe(self, engine: Engine) -> dict[str, Any]:
        """The tokens are random."""
        del engine
        return {"tokens": "random", "seed": self.seed}

    def run(self, engine: Engine, batch: Sequence[Item]) -> list[Record]:
        """Times each length. MemoryError where one does not fit the device."""
        return [self._measure(engine, item.length) for item in batch]

    def _measure(self, engine: Engine, length: int) -> Record:
        try:
            return _Stopwatch(self, engine, length).record()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(f"{length:,} tokens do not fit the device's memory") from error

    def summarize(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any]:
        """`costs`, the records in order of length, and a table."""
        del engine
        rows = sorted(records, key=lambda record: record["tokens_read"])
        return {
            "costs": rows,
            "table": {"columns": list(COLUMNS), "rows": [_table_row(row) for row in rows]},
        }


class _Stopwatch:
    """The measurements at one length."""

    def __init__(self, task: Cost, engine: Engine, length: int) -> None:
        self.task, self.length = task, length
        self.model, self.params = engine.model, engine.params
        self.runner = Runner(self.model, self.params, task.rows)
        self.total = length + task.new_tokens + task.single_steps

    def record(self) -> Record:
        task, kv, length = self.task, self.model.kv, self.length
        before = _peak_memory()["peak_bytes"]
        begin = time.perf_counter()
        state, logits = self._read(0)[1:]  # compiles
        state, logits = self._write(state, logits)[1:]
        state = self._one_by_one(state, logits, 2)[1]
        rounds = self._rounds(state) if kv.capacity is not None else {}
        first = time.perf_counter() - begin
        reads, writes, kv_measured = [], [], 0
        for repeat in range(1, task.repeats + 1):
            seconds, state, logits = self._read(repeat)
            reads.append(seconds)
            seconds, state, logits = self._write(state, logits)
            writes.append(seconds)
            kv_measured = max(kv_measured, state.nbytes)
        steps, _ = self._one_by_one(state, logits, task.single_steps)
        again = float(np.median(reads) + np.median(writes))
        peak = _peak_memory()
        window = self.model.config.max_position_embeddings
        return {
            "tokens_read": length,
            "rows": task.rows,
            "first_token_s": float(np.median(reads)),
            "prefill_tokens_per_s": task.rows * length / float(np.median(reads)),
            "first_token_times_s": reads,
            **self._speed(writes, rounds),
            "step_ms": _percentiles(steps),
            **rounds,
            "kv_bytes_measured": kv_measured,
            "kv_bytes_reckoned": task.rows
            * kv.kv_bytes(self.model.config, self.model.dtype, self.total),
            **peak,
            "peak_is_of_earlier": peak["peak_bytes"] is not None and peak["peak_bytes"] == before,
            "compile_s": max(0.0, first - again),
            "beyond_native_window": kv.capacity is None and self.total > window,
        }

    def _speed(self, seconds: list[float], rounds: Record) -> Record:
        """Of decode in scans. A round costs the same whether or not one fell into these tokens:
        those that did are taken out, and each token is charged its share of one."""
        task, kv = self.task, self.model.kv
        new = task.new_tokens
        ms = 1e3 * float(np.median(seconds)) / new
        share = 0.0
        if rounds:
            fell = kv.num_compressions(self.length + new) - kv.num_compressions(self.length)
            alone = rounds["round_ms"]["p50"]
            share = alone / kv.chunk
            ms = max(ms - fell * alone / new, 0.0) + share
        return {
            "ms_per_token": ms,
            "ms_per_token_of_rounds": share,
            "decode_tokens_per_s": 1e3 * task.rows / ms if ms else None,
        }

    def _tokens(self, repeat: int) -> np.ndarray:
        rng = np.random.default_rng((self.task.seed, self.length, repeat))
        shape = (self.task.rows, self.length)
        return rng.integers(0, self.model.config.vocab_size, shape, np.int32)

    def _read(self, repeat: int) -> tuple[float, KVState, Any]:
        """Seconds to the first token, and the state, with room for what will be written."""
        tokens = self._tokens(repeat)
        begin = time.perf_counter()
        logits, state = prefill(self.model, self.params, tokens)
        np.asarray(jnp.argmax(logits, axis=-1))
        seconds = time.perf_counter() - begin
        return seconds, jax.block_until_ready(self.runner.with_slots(state, self.total)), logits

    def _write(self, state: KVState, logits: Any) -> tuple[float, KVState, Any]:
        begin = time.perf_counter()
        out = decode(self.model, self.params, state, logits, self.task.new_tokens)
        _, logits, state = jax.block_until_ready(out)
        return time.perf_counter() - begin, state, logits

    def _one_by_one(self, state: KVState, logits: Any, steps: int) -> tuple[list[float], KVState]:
        """Milliseconds of single steps as a host sees them, those with a round left out."""
        kv, times = self.model.kv, []
        fill = int(np.asarray(state.fill)[0])
        for _ in range(steps):
            plain = kv.capacity is None or fill < kv.capacity
            ms, state, logits = self._step(state, logits)
            if plain:
                times.append(ms)
            fill = fill + 1 if plain else kv.prefix + 1
        return times, state

    def _step(self, state: KVState, logits: Any) -> tuple[float, KVState, Any]:
        begin = time.perf_counter()
        out = decode(self.model, self.params, state, logits, 1)
        _, logits, state = jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - begin), state, logits

    def _rounds(self, state: KVState) -> Record:
        """A round alone, and a step that begins with one; the state is given up."""
        shape = (self.task.rows, self.model.config.vocab_size)
        logits = jnp.zeros(shape, jnp.float32)
        due = np.ones(self.task.rows, bool)

        def alone(state: KVState) -> KVState:
            return jax.block_until_ready(self.runner.make_room(state, due))

        def step(state: KVState) -> KVState:
            return self._step(state, logits)[1]

        repeats = max(5, self.task.repeats)
        times = []
        for work in (alone, step):
            spent, state = self._repeated(work, state, repeats)
            times.append(_percentiles(spent))
        return {"round_ms": times[0], "step_with_round_ms": times[1]}

    def _repeated(
        self, work: Callable[[KVState], KVState], state: KVState, repeats: int
    ) -> tuple[list[float], KVState]:
        """Times of `work` on a state that is said to be full; the first, which compiles, not."""
        capacity, times = self.model.kv.capacity, []
        assert capacity is not None
        for _ in range(repeats + 1):
            full = jnp.full_like(state.fill, capacity)
            state = jax.block_until_ready(dataclasses.replace(state, fill=full))
            begin = time.perf_counter()
            state = work(state)
            times.append(1e3 * (time.perf_counter() - begin))
        return times[1:], state


def _percentiles(times: Sequence[float]) -> dict[str, float | int | None]:
    if not times:
        return {"p50": None, "p99": None, "count": 0}
    p50, p99 = np.percentile(np.asarray(times, np.float64), (50, 99))
    return {"p50": float(p50), "p99": float(p99), "count": len(times)}


def _peak_memory() -> Record:
    """The most that was held so far: on the device where that is counted, else by the process."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:
        return {"peak_bytes": int(peak), "peak_of": "device"}
    try:
        import resource
    except ImportError:  # not on Windows
        return {"peak_bytes": None, "peak_of": None}
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": held * (1 if sys.platform == "darwin" else 1024), "peak_of": "process"}


COLUMNS = (
    "tokens read", "first token s", "prefill tokens/s", "ms/token", "step p50 ms", "step p99 ms",
    "round ms", "step with round ms", "decode tokens/s", "KV MiB", "KV MiB reckoned", "peak MiB",
    "compile s",
)  # fmt: skip


def _table_row(row: Record) -> list[str]:
    peak = row["peak_bytes"]
    at_most = "<= " if row["peak_is_of_earlier"] else ""
    values = (
        f"{row['tokens_read']:,}",
        _number(row["first_token_s"]),
        f"{row['prefill_tokens_per_s']:,.0f}",
        _number(row["ms_per_token"]),
        _number(row["step_ms"]["p50"]),
        _number(row["step_ms"]["p99"]),
        _number(row.get("round_ms", {}).get("p50")),
        _number(row.get("step_with_round_ms", {}).get("p50")),
        "-" if row["decode_tokens_per_s"] is None else f"{row['decode_tokens_per_s']:,.1f}",
        f"{row['kv_bytes_measured'] / MIB:,.4g}",
        f"{row['kv_bytes_reckoned'] / MIB:,.4g}",
        "-" if peak is None else f"{at_most}{peak / MIB:,.0f}",
        f"{row['compile_s']:.1f}",
    )
    mark = " (beyond the native window)" if row["beyond_native_window"] else ""
    return [values[0] + mark, *values[1:]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
