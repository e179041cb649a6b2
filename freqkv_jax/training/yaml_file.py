"""YAML with overrides: files or packaged configs by name, and `a.b=value` settings on top."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader, with 2e-5 as a number and a repeated key as an error."""


# YAML 1.1, which PyYAML reads, wants a point in a float: 2e-5 would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    first: dict[Any, yaml.Node] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict)):
            raise ValueError(f"{_place(key_node)}: a key must be one word, got {key!r}")
        if key in first:
            raise ValueError(
                f"{_place(key_node)}: key {key!r} was given before, at {_place(first[key])};"
                " keep one of them"
            )
        first[key] = key_node
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _place(node: yaml.Node) -> str:
    mark = node.start_mark
    return f"{mark.name}, line {mark.line + 1}"


def parse_yaml(text: str, name: str) -> Any:
    """The value that YAML `text` means; ValueError naming `name` and the line where it is not."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def packaged_configs() -> list[str]:
    """Names of the configs inside the package, without ".yaml", sorted."""
    files = (item.name for item in (resources.files("freqkv_jax") / "configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def read_config_text(config: str | Path) -> str:
    """Text of a config: a file, or the name of a packaged one, with or without ".yaml".

    Raises FileNotFoundError (an OSError) with the packaged names where there is neither.
    """
    path = Path(config).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    name = str(config).removesuffix(".yaml")
    if name in packaged_configs():
        return (resources.files("freqkv_jax") / "configs" / f"{name}.yaml").read_text("utf-8")
    if path.is_dir():
        raise IsADirectoryError(f"{config} is a directory; give a YAML file or a packaged name")
    raise FileNotFoundError(
        f"{config} is neither a file nor a packaged config; packaged: "
        + ", ".join(packaged_configs())
    )


def read_config(config: str | Path, sets: Sequence[str] = ()) -> dict[str, Any]:
    """The config's mapping with each "a.b=value" of `sets` put on top, unchecked.

    A number in the key is an index of a list: data.train.0.path=texts. The value is YAML.
    """
    raw = parse_yaml(read_config_text(config), str(config))
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{config} must hold sections (run, model, ...), got {raw!r:.80}")
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r} is not understood; write --set section.key=value")
        _put(raw, key.strip().split("."), parse_yaml(value, f"--set {key.strip()}"), text)
    return raw


def _put(raw: Any, path: list[str], value: Any, text: str) -> None:
    for depth, name in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(raw, list):
            if not name.isdecimal() or int(name) >= len(raw):
                here = ".".join(path[:depth])
                raise ValueError(
                    f"--set {text!r}: {here} is a list of {len(raw)}; after it comes a number"
                    " below that, or set the whole list: --set " + here + "='[...]'"
                )
            index: Any = int(name)
        else:
            index = name
        if last:
            raw[index] = value
            return
        inner = raw[index] if isinstance(raw, list) else raw.get(index)
        if inner is None:
            inner = raw[index] = {}
        if not isinstance(inner, (dict, list)):
            here = ".".join(path[: depth + 1])
            raise ValueError(f"--set {text!r}: {here} is {inner!r}, which has no keys below it")
        raw = inner
