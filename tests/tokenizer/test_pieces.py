import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from freqkv_jax.tokenizer.base import Tokenizer
from freqkv_jax.tokenizer.gguf import from_gguf
from freqkv_jax.tokenizer.pieces import ByteDecoder, PlainDecoder
from tests.tokenizer.samples import TEXTS, spm_fields, tiny_backend, write_gguf


def word_level(decoder=None) -> Tokenizer:
    """A tokenizer whose decoder only the tokenizers package knows."""
    vocab = {word: number for number, word in enumerate(["▁a", "▁b", "c", "##d", "\ufffd", "▁▁"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="c"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, {})


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    spm = from_gguf(write_gguf(tmp_path_factory.mktemp("spm") / "a.gguf", spm_fields()))
    return {
        "byte-level": Tokenizer(tiny_backend(), {}),
        "sentencepiece": spm,
        "words": word_level(),
        "metaspace": word_level(decoders.Metaspace()),
        "wordpiece": word_level(decoders.WordPiece()),
    }


KINDS = ["byte-level", "sentencepiece", "words", "metaspace", "wordpiece"]


def streamed(tokenizer, ids, seed) -> list[str]:
    """The pieces of a stream fed one to three ids at a time, and sometimes none."""
    rng, stream, pieces, at = random.Random(seed), tokenizer.stream_decoder(), [], 0
    while at < len(ids):
        count = rng.randrange(4)
        pieces.append(stream.feed(ids[at : at + count]))
        at += count
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_is_decode_for_any_ids(kind, data, tokenizer_of):
    tokenizer = tokenizer_of[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert "".join(streamed(tokenizer, ids, len(ids))) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_stream_never_gives_half_a_character(kind, tokenizer_of):
    tokenizer = tokenizer_of[kind]
    for name, text in TEXTS.items():
        stream = tokenizer.stream_decoder()
        pieces = [stream.feed([token]) for token in tokenizer.encode(text)]
        assert "".join(pieces) == text and stream.flush() == ""
        if name != "replacement":
            assert not any("\ufffd" in piece for piece in pieces)


def test_words_come_at_once(tokenizer_of):
    tokenizer = tokenizer_of["byte-level"]
    stream = tokenizer.stream_decoder()
    for token in tokenizer.encode("the worst of times"):
        assert stream.feed([token]) == tokenizer.decode([token])


def test_stream_keeps_no_text(tokenizer_of, monkeypatch):
    window = tokenizer_of["words"].stream_decoder()
    sizes = []
    decode = window._stream._decode
    monkeypatch.setattr(
        window._stream, "_decode", lambda ids: sizes.append(len(ids)) or decode(ids)
    )
    for _ in range(300):
        window.feed([0, 4])
    assert max(sizes) <= 8 + 34
    stream = tokenizer_of["byte-level"].stream_decoder()
    for token in tokenizer_of["byte-level"].encode("狄") * 100:
        stream.feed([token])
    assert len(stream._stream._decoder.getstate()[0]) <= 3


def test_flush_gives_what_was_cut_off_and_begins_anew(tokenizer_of):
    tokenizer = tokenizer_of["sentencepiece"]
    stream = tokenizer.stream_decoder()
    emoji = tokenizer.encode("👍")
    assert stream.feed(emoji[:-1]) == "" and stream.flush() == "\ufffd"
    assert stream.feed(tokenizer.encode("hello")) == "hello"  # its own leading space again gone


def test_leading_space_only_of_the_whole_text(tokenizer_of):
    tokenizer = tokenizer_of["sentencepiece"]
    ids = tokenizer.encode("hello") * 2
    assert tokenizer.decode(ids) == "hello hello"
    assert streamed(tokenizer, ids, 0)[0:1] != [" hello"]


def test_stream_can_skip_special_tokens(tokenizer_of):
    tokenizer = tokenizer_of["byte-level"]
    stream = tokenizer.stream_decoder(skip_special_tokens=True)
    assert stream.feed(tokenizer.encode("a<|im_end|>b")) == "ab"


def test_both_ways_to_decode_agree(tokenizer_of):
    for kind in KINDS[:2]:
        tokenizer = tokenizer_of[kind]
        assert isinstance(tokenizer._decoder, ByteDecoder)
        plain = PlainDecoder(tokenizer.backend)
        for text in TEXTS.values():
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == plain.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=20))
def test_damaged_bytes_as_the_tokenizers_package_shows_them(ids, tokenizer_of):
    tokenizer = tokenizer_of["byte-level"]
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=False)
