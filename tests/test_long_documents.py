"""The sources of scripts/long_documents.py; nothing is downloaded."""

import importlib.util
import sys
from pathlib import Path


def script():
    path = Path(__file__).parent.parent / "scripts" / "long_documents.py"
    spec = importlib.util.spec_from_file_location("long_documents", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_no_package_gives_text_to_two_parts():
    parts = script().PARTS
    packages = [source.package.split("==")[0] for part in parts.values() for source in part]
    assert len(set(packages)) == len(packages)
    assert list(parts) == ["train", "validation", "test"]


def test_documents_of_a_folder(tmp_path):
    module = script()
    for name, text in (("b", "two"), ("a", "one"), ("c", "one"), ("index", "none")):
        (tmp_path / f"{name}.txt").write_text(f"{text} " * 6000)
    source = module.Source("some-doc", "x", ("*.txt",), "/index")
    ((name, text),) = module.documents(source, tmp_path)
    assert name == "some-doc"
    assert text == " ".join(["one"] * 6000) + "\n\n" + " ".join(["two"] * 6000)
