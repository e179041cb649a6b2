"""Dataclass fields as flags and as keys of a suite."""

import argparse
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from freqkv_jax.evals.options import (
    add_options,
    build_task,
    given_options,
    option_values,
    options_of,
)
from freqkv_jax.evals.registry import SUMMARIES, TASKS, nearest, task_class


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A task."""

    data: str = field(metadata={"help": "100% of it"})
    lengths: tuple[int, ...] = (4096, 8192)
    tasks: tuple[str, ...] | None = field(default=None, metadata={"choices": ("vt", "cwe")})
    ratio: float = 0.5
    kind: str = field(default="a", metadata={"choices": ("a", "bee")})
    fast: bool = False
    most: int | None = None
    held: dict = field(default_factory=dict, init=False)
    name: ClassVar[str] = "sample"


def parse(*words):
    parser = argparse.ArgumentParser()
    add_options(parser, Sample)
    return build_task(Sample, given_options(Sample, parser.parse_args(words)))


def test_flags():
    assert parse("--data", "x") == Sample(data="x")
    got = parse("--data", "x", "--lengths", "16", "32,64", "--tasks", "vt", "--ratio", "1e-3",
                "--kind", "bee", "--fast", "--most", "3")  # fmt: skip
    assert got == Sample(
        data="x", lengths=(16, 32, 64), tasks=("vt",), ratio=1e-3, kind="bee", fast=True, most=3
    )
    assert parse("--data", "x", "--no-fast").fast is False
    assert list(options_of(Sample)) == ["data", "lengths", "tasks", "ratio", "kind", "fast", "most"]


def test_keys_of_a_suite():
    got = build_task(
        Sample, {"data": "x", "lengths": [1, 2], "ratio": 1, "most": None, "tasks": "vt"}
    )
    assert got == Sample(data="x", lengths=(1, 2), ratio=1.0, tasks=("vt",))
    assert isinstance(got.ratio, float)
    assert build_task(Sample, {"data": "x", "ratio": "2e-5"}).ratio == 2e-5, "YAML 1.1's text"
    assert option_values(got)["lengths"] == [1, 2] and "held" not in option_values(got)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "x", "lenghts": 3}, "no option 'lenghts'; did you mean 'lengths'"),
        ({}, "task sample needs --data"),
        ({"data": "x", "lengths": ["a"]}, "--lengths must be a whole number, got 'a'"),
        ({"data": "x", "lengths": 1.5}, "--lengths must be a whole number, got 1.5"),
        ({"data": "x", "most": True}, "--most must be a whole number, got True"),
        ({"data": "x", "fast": "maybe"}, "--fast must be true or false"),
        ({"data": "x", "kind": "beee"}, "--kind 'beee' is not known; did you mean 'bee'"),
        ({"data": "x", "tasks": "cve"}, "--tasks 'cve' is not known; did you mean 'cwe'"),
        ({"data": None}, "--data must be a text, got None"),
        ({"data": "x", "ratio": {}}, "--ratio must be a number"),
    ],
)
def test_mistakes(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_task(Sample, values)


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "100% of it" in out and "(4096 8192)" in out and "{a,bee}" in out


def test_an_option_of_a_type_that_no_flag_can_hold():
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        what: dict = field(default_factory=dict)

    with pytest.raises(TypeError, match="cannot be of type"):
        options_of(Odd)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_options_with_help(name):
    cls = task_class(name)
    assert cls.name == name and cls.__doc__ and SUMMARIES[name]
    parser = argparse.ArgumentParser()
    add_options(parser, cls)
    assert all(option.help for option in options_of(cls).values())


def test_unknown_task():
    with pytest.raises(ValueError, match="no task is named 'rulr'; did you mean 'ruler'"):
        task_class("rulr")


def test_a_message_names_a_few_of_many():
    many = [f"cell-{i:03}" for i in range(112)]
    assert nearest("cell-1100", many) == (
        "; did you mean 'cell-110'? (allowed: " + ", ".join(many[:8]) + " and 104 more)"
    )
    assert nearest("x", many[:10]) == f" (allowed: {', '.join(many[:10])})"
    assert nearest("x", []) == " (allowed: none)"
