"""A task's options: its dataclass fields, as flags of the command line and keys of a suite file."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from freqkv_jax.evals.registry import nearest


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a task.

    Attributes:
      kind: str, int, float or bool; of each element where `many`.
      many: a tuple. optional: may be None.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    required: bool
    default: Any
    help: str
    choices: tuple[Any, ...]

    @property
    def flag(self) -> str:
        """As on the command line."""
        return "--" + self.name.replace("_", "-")

    def read(self, value: Any) -> Any:
        """The value of a suite file or a flag as the field holds it; ValueError if it cannot be."""
        if value is None and self.optional:
            return None
        if not self.many:
            return self._read_one(value)
        values = value if isinstance(value, (list, tuple)) else [value]
        parts = [p for v in values for p in (v.split(",") if isinstance(v, str) else [v])]
        return tuple(self._read_one(part) for part in parts if part != "")

    def _read_one(self, value: Any) -> Any:
        read = _as_kind(self.kind, value)
        if read is None:
            words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
            raise ValueError(f"{self.flag} must be {words[self.kind]}, got {value!r}")
        if self.choices and read not in self.choices:
            raise ValueError(
                f"{self.flag} {read!r} is not known" + nearest(read, map(str, self.choices))
            )
        return read


def _as_kind(kind: type, value: Any) -> Any:
    """`value` as `kind`, None where it is not one."""
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False}
        return value if isinstance(value, bool) else words.get(str(value).lower())
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if kind is str:
        return str(value)
    try:
        if kind is int and isinstance(value, float):
            return int(value) if value.is_integer() else None
        return kind(value)
    except ValueError:
        return None


def options_of(cls: type[Any]) -> dict[str, Option]:
    """The options of a task class by field name, in order."""
    hints = typing.get_type_hints(cls)
    found = {}
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        kind, many, optional = _parts(hints[item.name])
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        found[item.name] = Option(
            item.name,
            kind,
            many,
            optional,
            default is dataclasses.MISSING,
            None if default is dataclasses.MISSING else default,
            item.metadata.get("help", ""),
            tuple(item.metadata.get("choices", ())),
        )
    return found


def _parts(hint: Any) -> tuple[type, bool, bool]:
    """Element type, whether it is a tuple of these, and whether it may be None."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    if kind not in (str, int, float, bool):
        raise TypeError(f"an option cannot be of type {hint}")
    return kind, many, optional


def add_options(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Adds a flag for each option; those that are not given leave no trace in the namespace."""
    group = parser.add_argument_group("task options")
    for option in options_of(cls).values():
        about = option.help.replace("%", "%%")
        if not option.required and option.default not in (None, (), ""):
            about += f" ({_shown(option.default)})"
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": about.strip()}
        if option.kind is bool and not option.many:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **settings)
            continue
        if option.many:
            settings["nargs"] = "+"
        if option.choices:
            # Not argparse's own choices: those name no nearest one, and refuse "a,b".
            settings["metavar"] = "{" + ",".join(map(str, option.choices)) + "}"
        else:
            settings["metavar"] = {str: "TEXT", int: "N", float: "X"}[option.kind]
        group.add_argument(option.flag, required=option.required, **settings)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def given_options(cls: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Of a parsed command line, the options that were given."""
    return {name: getattr(args, name) for name in options_of(cls) if hasattr(args, name)}


def build_task(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The task with these options; ValueError for an unknown, missing or bad one."""
    options = options_of(cls)
    for name in values:
        if name not in options:
            raise ValueError(f"task {cls.name} has no option {name!r}" + nearest(name, options))
    missing = [o.flag for o in options.values() if o.required and o.name not in values]
    if missing:
        raise ValueError(f"task {cls.name} needs {', '.join(missing)}")
    return cls(**{name: options[name].read(value) for name, value in values.items()})


def option_values(task: Any) -> dict[str, Any]:
    """All options of a task as plain data."""
    values = {name: getattr(task, name) for name in options_of(type(task))}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
