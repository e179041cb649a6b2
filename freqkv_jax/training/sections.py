"""Sections of a config: frozen dataclasses built from YAML values, every key and type checked."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


def allowed(
    default: Any = dataclasses.MISSING, *, choices: Sequence[str] = (), low: Any = None, **more: Any
) -> Any:
    """A field with what it allows: `choices`, or a range `low` (or `above`) to `high` (`below`)."""
    return field(default=default, metadata={"choices": choices, "low": low} | more)


@dataclass(frozen=True)
class Section:
    """Base of all sections: its fields are checked by what `allowed` says when it is built.

    `short` is the key that a text in place of the whole section means.
    """

    short: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_range(item, getattr(self, item.name))


def build(cls: type[Section], raw: Any, path: str) -> Any:
    """A section from its mapping, types checked."""
    if isinstance(raw, str) and cls.short:
        raw = {cls.short: raw}
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must be a section with keys below it, got {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            raise ValueError(f"unknown key {path}.{key}{instead(key, fields)}")
    missing = [
        name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in raw
    ]
    if missing:
        raise ValueError(f"{', '.join(f'{path}.{name}' for name in missing)} must be given")
    hints = typing.get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{path}.{key}") for key, value in raw.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _value(hint: Any, raw: Any, path: str) -> Any:
    """`raw` as the annotation `hint` wants it; ValueError with key, value and what is allowed."""
    optional = isinstance(hint, types.UnionType)
    if optional:
        if raw is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        if not isinstance(raw, (list, tuple)):
            raise ValueError(f"{path} must be a list, got {raw!r}")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, value, f"{path}.{i}") for i, value in enumerate(raw))
    if isinstance(hint, type) and issubclass(hint, Section):
        return build(hint, raw, path)
    if hint is float and type(raw) is int:
        return float(raw)
    if type(raw) is not hint:
        words = _WORDS[hint] + (", or null" if optional else "")
        quotes = "; put it in quotes" if hint is str and raw is not None else ""
        raise ValueError(f"{path} must be {words}, got {raw!r}{quotes}")
    return raw


def _check_range(item: dataclasses.Field, value: Any) -> None:
    """ValueError "name: ..." where the value is not what `_is` allows."""
    rule = item.metadata
    if value is None or not rule:
        return
    if rule["choices"]:
        for word in value if isinstance(value, tuple) else (value,):
            if word not in rule["choices"]:
                raise ValueError(f"{item.name}: unknown {word!r}{instead(word, rule['choices'])}")
        return
    bounds = (
        (rule["low"], "at least", lambda v, b: v >= b),
        (rule.get("above"), "above", lambda v, b: v > b),
        (rule.get("high"), "at most", lambda v, b: v <= b),
        (rule.get("below"), "below", lambda v, b: v < b),
    )
    for bound, word, holds in bounds:
        if bound is not None and not holds(value, bound):  # also refuses nan
            raise ValueError(f"{item.name} must be {word} {bound}, got {value!r}")


def instead(given: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (allowed: {', '.join(known)})"
