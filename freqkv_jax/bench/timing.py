"""Timing that holds: compiling apart, every result waited for, inputs that change."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

MIN_REPEATS = 5


class OverBudgetError(Exception):
    """A measurement that would not end in the time that is left."""


@dataclass(frozen=True)
class Program:
    """A jittable function and how its arguments follow one another.

    Attributes:
      function: of arrays; it closes over none, so that nothing is folded while compiling. None
        where `lower` says what to compile.
      first: the arguments of the first call.
      donate: positions of arguments whose memory the results take over.
      following: (repeat, arguments, result) to the next call's arguments; it runs outside the
        timed part.
      lower: of the first arguments, the program lowered, its donations included.
      options: of the compiler (freqkv_jax.compile_options).
      shapes: gives those of `first` where it lies on a mesh: without their shardings another
        program is lowered.
    """

    function: Callable[..., Any] | None
    first: tuple[Any, ...]
    following: Callable[[int, tuple[Any, ...], Any], tuple[Any, ...]]
    donate: tuple[int, ...] = ()
    lower: Callable[..., Any] | None = None
    options: dict[str, Any] | None = None
    shapes: Callable[[], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Timing:
    """Times of single calls, in seconds; compiling is not in them.

    Attributes:
      program_bytes: arguments, results and temporaries of the program; None where it is several.
    """

    seconds: tuple[float, ...]
    compile_seconds: float
    program_bytes: int | None = None

    @property
    def median(self) -> float:
        """The middle of the repeats."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def check_repeats(repeats: int) -> None:
    """ValueError for fewer repeats than a spread can be told from."""
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats must be at least {MIN_REPEATS}, got {repeats}")


def measure(
    program: Program,
    repeats: int = MIN_REPEATS,
    deadline: float | None = None,
    trace: str | None = None,
) -> Timing:
    """Compiles, runs once to warm up, then times `repeats` calls.

    Args:
      deadline: `time.monotonic()` at which the repeats must be done.
      trace: folder in which the profile of one more call is written.

    Raises:
      ValueError: too few repeats. OverBudgetError: judging by the first call.
    """
    check_repeats(repeats)
    compiled, compile_seconds = compile_program(program)
    args, out = program.first, None

    def call(index: int) -> float:
        nonlocal args, out
        if index:
            args = jax.block_until_ready(program.following(index, args, out))
        out = None  # its memory may be needed for the next result
        begin = time.perf_counter()
        out = jax.block_until_ready(compiled(*args))
        return time.perf_counter() - begin

    jax.block_until_ready(args)
    call(0)
    seconds = [call(1)]
    _check_budget(seconds[0], repeats - 1, deadline)
    seconds += [call(index) for index in range(2, repeats + 1)]
    if trace is not None:
        with jax.profiler.trace(trace):
            call(repeats + 1)
    return Timing(tuple(seconds), compile_seconds, program_bytes(compiled))


def compile_program(program: Program) -> tuple[Any, float]:
    """The compiled program and how long compiling took; its arguments may be shapes."""
    begin = time.perf_counter()
    compiled = _lower(program).compile()
    return compiled, time.perf_counter() - begin


def _lower(program: Program) -> Any:
    if program.lower is not None:
        return program.lower(*program.first)
    assert program.function is not None
    jitted = jax.jit(
        program.function, donate_argnums=program.donate, compiler_options=program.options
    )
    return jitted.lower(*program.first)


def measure_host(
    call: Callable[[int], Any],
    repeats: int = MIN_REPEATS,
    deadline: float | None = None,
    trace: str | None = None,
) -> Timing:
    """Times `call(index)`, which drives programs of its own from the host.

    Its compile time is what the first call took longer than the median. Arguments and errors are
    those of `measure`; index counts calls from 0 and must change the input.
    """
    check_repeats(repeats)

    def timed(index: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(call(index))
        return time.perf_counter() - begin

    first = timed(0)
    seconds = [timed(1)]
    _check_budget(seconds[0], repeats - 1, deadline)
    seconds += [timed(index) for index in range(2, repeats + 1)]
    if trace is not None:
        with jax.profiler.trace(trace):
            timed(repeats + 1)
    return Timing(tuple(seconds), max(0.0, first - statistics.median(seconds)))


def _check_budget(seconds: float, calls: int, deadline: float | None) -> None:
    if deadline is not None and time.monotonic() + seconds * calls > deadline:
        raise OverBudgetError(
            f"a call takes {seconds:.3g} s: {calls} more do not fit the time that is left"
        )


def program_bytes(compiled: Any) -> int | None:
    """Arguments, results and temporaries; None where the compiler does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
