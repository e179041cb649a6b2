"""A model directory with a tokenizer and one without, and no compile cache of the user's."""

import pytest

from tests.model_folder import write_model_folder


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    monkeypatch.setenv("FREQKV_NO_COMPILE_CACHE", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_model_folder(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory):
    """Weights and config only, and files that are to be ignored."""
    folder = tmp_path_factory.mktemp("cli") / "bare"
    write_model_folder(folder, tokenizer=False)
    (folder / "training_args.bin").write_bytes(b"other")
    (folder / "README.md").write_text("other")
    return str(folder)
