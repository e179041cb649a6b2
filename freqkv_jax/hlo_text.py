"""Reads the text of a compiled program: shapes, instructions, computations.

XLA offers no stable interface for these, so the optimised HLO text is parsed
(`jax.jit(f).lower(...).compile().as_text()`).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=? ]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


@dataclass(frozen=True)
class Array:
    """Element type and dimensions of one array in a program."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes, without the padding that a tiled layout adds."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits.group()) if digits else 0)
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = result opcode(operands), attributes`."""

    name: str
    opcode: str
    result: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, a tuple's flattened."""
        return parse_arrays(self.result)

    @property
    def operand_names(self) -> tuple[str, ...]:
        """Names of the instructions that this one reads."""
        return tuple(re.findall(r"%([\w.\-]+)", self.operands))

    @property
    def op_name(self) -> str:
        """The path of jax operations that this instruction comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def index(self) -> int | None:
        """A get-tuple-element's index or a parameter's number."""
        if self.opcode == "parameter":
            return int(self.operands)
        match = re.search(r"\bindex=(\d+)", self.attributes)
        return int(match.group(1)) if match else None

    @property
    def cycles(self) -> int | None:
        """The compiler's cycle estimate, where it gives one (TPU only)."""
        match = _CYCLES.search(self.attributes)
        return int(match.group(1)) if match else None

    def called(self, key: str) -> str:
        """Name of the computation under an attribute key (calls, body, condition)."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The instruction that gives the result."""
        return next(i for i in self.instructions.values() if i.is_root)


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays in a shape such as `(f32[2,3]{1,0}, s32[])`."""
    found = []
    for dtype, dims in _ARRAY.findall(text):
        sizes = tuple(int(re.sub(r"\D", "", part)) for part in dims.split(",") if part.strip())
        found.append(Array(dtype, sizes))
    return tuple(found)


def _balanced(text: str, start: int) -> int:
    """Index just past the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in HLO line: {text[:120]!r}")


def _parse_instruction(line: str) -> Instruction | None:
    match = _START.match(line)
    if not match:
        return None
    rest = line[match.end() :]
    cut = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:cut], rest[cut:].lstrip()
    opening = rest.find("(")
    if opening < 1:
        return None
    closing = _balanced(rest, opening)
    return Instruction(
        name=match.group(2),
        opcode=rest[:opening],
        result=result,
        operands=rest[opening + 1 : closing - 1],
        attributes=rest[closing:],
        is_root=bool(match.group(1)),
    )


def parse_program(text: str) -> tuple[dict[str, Computation], Computation]:
    """Computations by name, and the entry; ValueError if there is none."""
    computations: dict[str, Computation] = {}
    entry = None
    current: Computation | None = None
    for line in _whole_lines(text):
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            current = computations[header.group(2)] = Computation(header.group(2))
            entry = current if header.group(1) else entry
        elif current is not None:
            instruction = _parse_instruction(line)
            if instruction:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation in the HLO text; pass compiled.as_text()")
    return computations, entry


def _whole_lines(text: str) -> Iterator[str]:
    """Headers and instructions, one each; a kernel's metadata breaks its instruction into lines."""
    pending = ""
    for line in text.splitlines():
        if _START.match(line) or _HEADER.match(line) or line == "}":
            yield pending
            pending = "" if line == "}" else line
        else:
            pending += line
    yield pending
