"""What a compiled program does: collectives, loop trip counts, cycle estimates.

All sizes are those of one chip's program.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from freqkv_jax.hlo_text import Array, Computation, Instruction, parse_program

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Operations that move or relabel values without computing new ones.
MOVES = (
    "bitcast", "copy", "copy-start", "copy-done", "reshape", "transpose", "convert", "slice-start",
    "slice-done", "slice", "optimization-barrier", "bitcast-convert", "broadcast", "pad",
    "dynamic-slice",
)  # fmt: skip
# Work that goes on beside other instructions; its cycles are hidden unless somebody waits.
ASYNC = ("copy-start", "slice-start", "async-start")

_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# A value that slices of one array were put together to, as a TPU program prefetches weights.
_JOINS = re.compile(r'custom_call_target="ConcatBitcast"')


@dataclass(frozen=True)
class Collective:
    """One collective instruction. `num_bytes` is the larger of what a chip puts in and gets out,
    for one execution; `runs` is how often it runs (trip counts of the loops around it)."""

    kind: str
    output: tuple[Array, ...]
    num_bytes: int
    runs: int
    op_name: str
    origin: str
    name: str

    @property
    def total_bytes(self) -> int:
        """Bytes over all runs."""
        return self.num_bytes * self.runs


class Program:
    """A compiled module: computations by name, and what is counted over them."""

    def __init__(self, text: str) -> None:
        """Parses HLO text; ValueError if it has no entry computation."""
        self.computations, self.entry = parse_program(text)
        self.unknown_loops: set[str] = set()
        self._callers = self._find_callers()

    def _find_callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """Computation name -> the (first) place that calls it."""
        callers: dict[str, tuple[Computation, Instruction]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for name in self._callees(instruction):
                    callers.setdefault(name, (computation, instruction))
        return callers

    def _callees(self, instruction: Instruction) -> list[str]:
        if instruction.opcode.endswith(("-done", "-update")):
            return []  # what the pair does was counted at its start
        names = _CALLED.findall(instruction.attributes)
        for several, one in _BRANCHES.findall(instruction.attributes):
            names += re.findall(r"[\w.\-]+", several) if several else [one]
        return [name for name in names if name in self.computations]

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a while loop runs; None if it cannot be told from the text.

        Taken from `known_trip_count`, and else from a condition `counter < constant` with a
        counter that starts at a constant and goes up by one (TPU programs name no count).
        """
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.called("condition")]
        test, sides = condition.root, []
        if test.opcode == "fusion":
            test = self.computations[condition.root.called("calls")].root
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        for name in test.operand_names:
            side = condition.instructions.get(name)
            if test is not condition.root:
                side = self.computations[condition.root.called("calls")].instructions[name]
                if side.opcode == "parameter":
                    name = condition.root.operand_names[side.index or 0]
                    side = condition.instructions[name]
            sides.append(self._constant(computation, loop, side) if side else None)
        start, end = sides
        return None if start is None or end is None else max(0, end - start)

    def _constant(
        self, computation: Computation, loop: Instruction, value: Instruction
    ) -> int | None:
        """An integer constant, followed out of the loop's tuple and through moves."""
        if value.opcode == "get-tuple-element" and value.index is not None:
            initial = computation.instructions[loop.operand_names[0]]
            if initial.opcode != "tuple":
                return None
            value = computation.instructions[initial.operand_names[value.index]]
        while value.opcode in MOVES and value.operand_names:
            value = computation.instructions[value.operand_names[0]]
        is_number = value.opcode == "constant" and re.fullmatch(r"-?\d+", value.operands)
        return int(value.operands) if is_number else None

    def walk(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, inside loops, calls and fusions too, with how often.

        A loop of unknown length counts once and is named in `unknown_loops`.
        """
        yield from self._walk(self.entry, 1)

    def _walk(
        self, computation: Computation, runs: int
    ) -> Iterator[tuple[Computation, Instruction, int]]:
        for instruction in computation.instructions.values():
            yield computation, instruction, runs
            inner = runs
            if instruction.opcode == "while":
                trips = self.trip_count(computation, instruction)
                if trips is None:
                    self.unknown_loops.add(instruction.op_name or instruction.name)
                inner = runs * (1 if trips is None else trips)
            for name in self._callees(instruction):
                yield from self._walk(self.computations[name], inner)

    def collectives(self) -> list[Collective]:
        """The program's collectives; an asynchronous one counts once, at its start."""
        found = []
        # A TPU program may spell an asynchronous collective out at its start, in the computation
        # beside it and at its end; all bear the number of one channel.
        channels: dict[str, str] = {}
        for computation, instruction, runs in self.walk():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = _CHANNEL.search(instruction.attributes)
            if channel and channels.setdefault(channel[1], instruction.name) != instruction.name:
                continue
            output = instruction.arrays
            inputs = [
                array
                for name in instruction.operand_names
                if name in computation.instructions
                for array in computation.instructions[name].arrays
            ]
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                # The start of a pair returns (inputs, outputs, and for a permute two handles).
                output = output[len(inputs) : 2 * len(inputs)]
            num_bytes = max(sum(a.num_bytes for a in output), sum(a.num_bytes for a in inputs))
            # A TPU fuses an all-reduce and the slice after it; what runs is a reduce-scatter.
            if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            op_name = instruction.op_name or self._caller_name(computation)
            origin = self.origin(computation, instruction)
            found.append(
                Collective(kind, output, num_bytes, runs, op_name, origin, instruction.name)
            )
        return found

    def _caller_name(self, computation: Computation) -> str:
        caller = self._callers.get(computation.name)
        return caller[1].op_name if caller else ""

    def origin(self, computation: Computation, instruction: Instruction) -> str:
        """Where a collective's first input comes from: "parameter N" of the program if it is only
        moved on the way, "computed" otherwise."""
        if not instruction.operand_names:
            return "computed"
        return self._trace(computation, instruction.operand_names[0], frozenset()) or "computed"

    def _trace(
        self, computation: Computation, name: str, loops: frozenset[tuple[str, int]]
    ) -> str | None:
        """`origin` of a value. `loops` are the loop elements that are being traced: one that leads
        to itself gives None, which agrees with any origin."""
        while True:
            value = computation.instructions.get(name)
            if value is None:
                return "computed"
            step = None
            if value.opcode == "parameter":
                if computation is self.entry:
                    return f"parameter {value.index}"
                step = self._outside(computation, value.index)
            elif value.opcode == "get-tuple-element":
                source = computation.instructions[value.operand_names[0]]
                index = value.index or 0
                if source.opcode == "parameter":
                    return self._loop_element(computation, index, loops)
                if source.opcode == "tuple":
                    step = computation, source.operand_names[index]
            elif _JOINS.search(value.attributes):
                return _agreed(self._trace(computation, n, loops) for n in value.operand_names)
            elif (value.opcode in MOVES or self._only_moves(value)) and value.operand_names:
                step = computation, value.operand_names[0]
            if step is None:
                return "computed"
            computation, name = step

    def _only_moves(self, value: Instruction) -> bool:
        if value.opcode != "fusion" or not value.operand_names:
            return False
        body = self.computations[value.called("calls")].instructions.values()
        allowed = (*MOVES, "parameter", "constant", "fusion")
        return all(i.opcode in allowed for i in body)

    def _outside(
        self, computation: Computation, number: int | None
    ) -> tuple[Computation, str] | None:
        """The caller's operand behind a computation's parameter (not a loop's: it is a tuple)."""
        caller = self._callers.get(computation.name)
        if caller is None or number is None or caller[1].opcode == "while":
            return None
        names = caller[1].operand_names
        return (caller[0], names[number]) if number < len(names) else None

    def _loop_element(
        self, computation: Computation, index: int, loops: frozenset[tuple[str, int]]
    ) -> str | None:
        """The origin of an element of a loop's tuple, seen from the loop's body: that of its first
        value, if every turn hands on the same, be it prefetched anew."""
        key = (computation.name, index)
        if key in loops:
            return None
        caller = self._callers.get(computation.name)
        if caller is None or caller[1].opcode != "while":
            return "computed"
        outer, loop = caller
        body = self.computations[loop.called("body")]
        initial = outer.instructions[loop.operand_names[0]]
        if body.root.opcode != "tuple" or initial.opcode != "tuple":
            return "computed"
        return _agreed(
            [
                self._trace(outer, initial.operand_names[index], loops),
                self._trace(body, body.root.operand_names[index], loops | {key}),
            ]
        )

    def num_kernels(self) -> int:
        """How many Pallas kernels run, with loops multiplied out."""
        return sum(runs for _, instruction, runs in self.walk() if is_kernel(instruction))

    def estimated_cycles(self) -> dict[str, int]:
        """The compiler's cycle estimates, summed with loops multiplied out.

        Returns "cycles" of instructions that run in order, "async_cycles" of copies beside them,
        and "without_estimate", the number of collectives and kernels run that have none.
        """
        return self._cycles(self.entry)

    def longest_loop(self) -> dict[str, int] | None:
        """The entry's loop with the most cycles: "runs", and "cycles" of one of them."""
        loops = []
        for instruction in self.entry.instructions.values():
            if instruction.opcode == "while":
                runs = self.trip_count(self.entry, instruction) or 1
                body = self._cycles(self.computations[instruction.called("body")])
                loops.append({"runs": runs, "cycles": body["cycles"]})
        return max(loops, key=lambda loop: loop["runs"] * loop["cycles"], default=None)

    def _cycles(self, computation: Computation) -> dict[str, int]:
        total = {"cycles": 0, "async_cycles": 0, "without_estimate": 0}
        for instruction in computation.instructions.values():
            runs, parts = 1, []
            if instruction.opcode == "while":
                runs = self.trip_count(computation, instruction) or 1
                parts = [self._cycles(self.computations[n]) for n in self._callees(instruction)]
            elif instruction.opcode in ("call", "async-start"):
                parts = [self._cycles(self.computations[n]) for n in self._callees(instruction)]
            elif instruction.opcode == "conditional":
                branches = (self._cycles(self.computations[n]) for n in self._callees(instruction))
                parts = [max(branches, key=lambda part: part["cycles"])]
            elif instruction.cycles is not None:
                key = "async_cycles" if instruction.opcode in ASYNC else "cycles"
                parts = [{key: instruction.cycles}]
            elif self._is_unpriced(instruction):
                parts = [{"without_estimate": 1}]
            for part in parts:
                for key, value in part.items():
                    total[key] += runs * value
        return total

    def _is_unpriced(self, instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            body = self.computations[instruction.called("calls")].instructions.values()
            return any(self._is_unpriced(i) for i in body)
        if instruction.opcode == "custom-call":
            return is_kernel(instruction)
        return instruction.opcode.removesuffix("-start") in COLLECTIVES


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel; other custom calls are the compiler's bookkeeping."""
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _agreed(origins: Iterable[str | None]) -> str | None:
    """The one origin that all give (None agrees with any), else "computed"."""
    found = {origin for origin in origins if origin is not None}
    return found.pop() if len(found) == 1 else "computed" if found else None
