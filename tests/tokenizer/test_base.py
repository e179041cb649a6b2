import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freqkv_jax.tokenizer import load_tokenizer
from freqkv_jax.tokenizer.base import Tokenizer
from tests.tokenizer.samples import (
    MESSAGES,
    TEXTS,
    spm_fields,
    tiny_backend,
    tiny_fields,
    write_directory,
    write_gguf,
)

TINY = Tokenizer(tiny_backend(), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def auto_tokenizer():
    """transformers' loader."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip(name):
    assert TINY.decode(TINY.encode(TEXTS[name])) == TEXTS[name]


@settings(max_examples=200, deadline=None)
@given(UNICODE)
def test_round_trip_of_any_text(text):
    assert TINY.decode(TINY.encode(text)) == text


def test_markers_become_their_one_token():
    ids = TINY.encode("a<|im_start|>b")
    assert 1 in ids and TINY.decode(ids) == "a<|im_start|>b"
    assert TINY.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("ids", [[400], [3, -1], [2**70], np.array([1, 999])])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(ValueError, match=r"outside the vocabulary; allowed: 0 to 399"):
        TINY.decode(ids)
    with pytest.raises(ValueError, match=r"outside the vocabulary"):
        TINY.stream_decoder().feed(ids)


@pytest.mark.parametrize("ids", [[1.5], [[1, 2]], ["a"], 3])
def test_ids_that_are_no_numbers(ids):
    with pytest.raises(ValueError, match="whole numbers"):
        TINY.decode(ids)


def test_ids_of_any_integer_type():
    ids = TINY.encode("hello")
    assert TINY.decode(np.array(ids, np.int32)) == "hello"
    assert all(type(token) is int for token in ids)


def test_an_id_without_a_token_is_empty_text():
    spec = json.loads(tiny_backend().to_str())
    spec["model"]["vocab"]["beyond"] = 500
    hole = Tokenizer(type(TINY.backend).from_str(json.dumps(spec)), {})
    assert hole.vocab_size == 501
    assert hole.decode([450, 500, 499]) == "beyond"


def test_text_that_is_no_text():
    with pytest.raises(ValueError, match=r"lone surrogate, '\\udc80', at character 2"):
        TINY.encode("ab\udc80")
    with pytest.raises(ValueError, match="must be a str, got bytes"):
        TINY.encode(b"ab")  # type: ignore[arg-type]


FORMS = {
    "directory": lambda path: write_directory(path / "in"),
    "byte-level gguf": lambda path: write_gguf(path / "a.gguf", tiny_fields()),
    "llama3 gguf": lambda path: write_gguf(
        path / "a.gguf", tiny_fields() | {"ggml.pre": "llama-bpe", "ggml.add_bos_token": None}
    ),
    "default gguf": lambda path: write_gguf(
        path / "a.gguf", tiny_fields() | {"ggml.pre": "default"}
    ),
    "sentencepiece gguf": lambda path: write_gguf(
        path / "a.gguf", spm_fields(**{"ggml.add_eos_token": True})
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_saved_agrees_with_transformers_and_itself(form, tmp_path, auto_tokenizer):
    ours = load_tokenizer(FORMS[form](tmp_path))
    ours.save(tmp_path / "out" / "deep")
    again = load_tokenizer(tmp_path / "out" / "deep")
    theirs = auto_tokenizer(tmp_path / "out" / "deep")
    for text in TEXTS.values():
        for special in (False, True):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ids == again.encode(text, add_special_tokens=special)
            assert ours.decode(ids) == theirs.decode(ids) == again.decode(ids)
            for skip in (False, True):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs) == again.vocab_size
    assert (ours.bos_id, ours.eos_ids[0]) == (theirs.bos_token_id, theirs.eos_token_id)
    assert again.eos_ids == ours.eos_ids
    assert again.special_tokens == ours.special_tokens
    assert theirs.model_max_length == again.model_max_length == 512
    assert again.chat_template == ours.chat_template
    assert ours.has_chat_template == (form != "sentencepiece gguf")
    for prompt in (False, True) if ours.has_chat_template else ():
        expected = theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=prompt, return_dict=False
        )
        assert ours.apply_chat_template(MESSAGES, prompt) == expected
        assert again.apply_chat_template(MESSAGES, prompt) == expected


def test_peculiar_special_tokens_survive_saving(tmp_path, auto_tokenizer):
    end = {"content": "<|im_end|>", "lstrip": True, "rstrip": True, "special": True}
    spec = json.loads(tiny_backend().to_str())
    for token in spec["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token |= end
    folder = write_directory(tmp_path / "in", {"eos_token": end})
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ours = load_tokenizer(folder)
    assert ours.encode("a  <|im_end|> \nb") == ours.encode("a<|im_end|>b")
    ours.save(tmp_path / "out")
    assert auto_tokenizer(tmp_path / "out").encode("a  <|im_end|> \nb") == ours.encode(
        "a<|im_end|>b"
    )


def test_saving_replaces_an_older_tokenizer(tmp_path):
    TINY.save(write_directory(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("old")
    TINY.save(tmp_path)
    assert not load_tokenizer(tmp_path).has_chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    TINY.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Tokenizer(tiny_backend(300), {}).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp*"))


def test_no_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        TINY.apply_chat_template([{"role": "user", "content": "hi"}])
