"""The sources of scripts/long_documents.py; nothing is downloaded."""

from tests.scripts import load_script


def test_no_package_gives_text_to_two_parts():
    parts = load_script("long_documents").PARTS
    packages = [source.package.split("==")[0] for part in parts.values() for source in part]
    assert len(set(packages)) == len(packages)
    assert list(parts) == ["train", "validation", "test"]


def test_documents_of_a_folder(tmp_path):
    module = load_script("long_documents")
    for name, text in (("b", "two"), ("a", "one"), ("c", "one"), ("index", "none")):
        (tmp_path / f"{name}.txt").write_text(f"{text} " * 6000)
    source = module.Source("some-doc", "x", ("*.txt",), "/index")
    ((name, text),) = module.documents(source, tmp_path)
    assert name == "some-doc"
    assert text == " ".join(["one"] * 6000) + "\n\n" + " ".join(["two"] * 6000)
