import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freqkv_jax.tokenizer import load_tokenizer
from tests.tokenizer.samples import (
    PIECES,
    SPECIAL,
    TEXTS,
    spm_fields,
    tiny_backend,
    tiny_fields,
    write_gguf,
)


def test_byte_level_equals_its_source(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", tiny_fields()))
    backend = tiny_backend()
    for text in TEXTS.values():
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2, 3), 400)
    assert tokenizer.special_tokens["unk_token"] == SPECIAL[0]
    assert tokenizer.has_chat_template and tokenizer.model_max_length == 512


# Words by each way of splitting, | between them.
SPLITS = {
    "gpt-2": "it|'s| 1234567| items|,|   | $|5|!!|\n\n| <=",
    "smollm": "it|'s| |1|2|3|4|5|6|7| items|,|   | $|5|!!|\n\n| <=",
    "llama-bpe": "it|'s| |123|456|7| items|,|   | $|5|!!\n\n| <=",
    "default": "it|'|s| |123|456|7| items|,|    |$|5|!!|\n\n |<=",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_how_a_text_is_split(pre, tmp_path):
    text = "it's 1234567 items,    $5!!\n\n <="
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", tiny_fields() | {"ggml.pre": pre}))
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == SPLITS[pre].split(
        "|"
    )


def test_the_llama3_kind_begins_with_bos_and_takes_whole_words(tmp_path):
    fields = tiny_fields() | {"ggml.pre": "llama-bpe", "ggml.add_bos_token": None}
    fields["ggml.tokens"] = [*fields["ggml.tokens"], "zebra"]  # no merges lead there
    fields["ggml.token_type"] = [*fields["ggml.token_type"], 1]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert tokenizer.encode("zebra", add_special_tokens=True) == [1, 400]
    assert tokenizer.encode("zebra") == [400]
    off = load_tokenizer(write_gguf(tmp_path / "b.gguf", fields | {"ggml.add_bos_token": False}))
    assert off.encode("zebra", add_special_tokens=True) == [400]


def test_user_defined_tokens(tmp_path):
    fields = tiny_fields()
    fields["ggml.tokens"] = [*fields["ggml.tokens"], "<tool> x"]
    fields["ggml.token_type"] = [*fields["ggml.token_type"], 4]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert tokenizer.encode("<tool> x") == [400]
    assert tokenizer.decode([400, 1], skip_special_tokens=True) == "<tool> x"


def test_without_token_types_the_named_ones_are_special(tmp_path):
    fields = tiny_fields() | {"ggml.token_type": None}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert tokenizer.special_ids == {0, 1, 2, 3}


def test_an_old_file_without_pre_warns(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tiny_fields() | {"ggml.pre": None})
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is missing"):
        load_tokenizer(path)


# ---- the llama kind


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("spm") / "a.gguf", spm_fields()))


def sentencepiece(text: str, prefix: bool = True) -> list[str]:
    """SentencePiece's algorithm: join the neighbours with the best score, leftmost first."""
    score = {piece: -float(n) for n, piece in enumerate(dict.fromkeys(PIECES))}
    symbols = list((" " * (prefix and text != "") + text).replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
        known = [(-score[pair], at) for at, pair in enumerate(pairs) if pair in score]
        if not known:
            break
        at = min(known)[1]
        symbols[at : at + 2] = [pairs[at]]
    bytewise = ([s] if s in score else [f"<0x{b:02X}>" for b in s.encode()] for s in symbols)
    return [token for tokens in bytewise for token in tokens]


@settings(max_examples=300, deadline=None)
@given(text=st.text("the worstimeblu.hello 狄\n👍", max_size=40))
def test_sentencepiece_by_its_own_algorithm(text, spm):
    assert [spm.backend.id_to_token(i) for i in spm.encode(text)] == sentencepiece(text)
    assert spm.decode(spm.encode(text)) == text


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"chat"}))
def test_sentencepiece_round_trip(name, spm):
    text = TEXTS[name]
    assert [spm.backend.id_to_token(i) for i in spm.encode(text)] == sentencepiece(text)
    assert spm.decode(spm.encode(text)) == text


def test_sentencepiece_markers(spm):
    ids = spm.encode("hello<|user|>the</s>", add_special_tokens=True)
    tokens = [spm.backend.id_to_token(i) for i in ids]
    assert tokens == ["<s>", "▁hello", "<|user|>", "▁the", "</s>"]
    assert spm.decode(ids, skip_special_tokens=True) == "hello<|user|> the"
    assert (spm.bos_id, spm.eos_ids) == (1, (2,))
    # What looks like a byte token is text.
    assert spm.decode(spm.encode("<0x0A>")) == "<0x0A>"


def test_sentencepiece_without_the_prefix(tmp_path):
    fields = spm_fields(**{"ggml.add_space_prefix": False, "ggml.add_bos_token": False})
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    for text in ("hello the", " hello", "  the"):
        tokens = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, True)]
        assert tokens == sentencepiece(text, prefix=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_ids_that_a_file_leaves_out(tmp_path):
    fields = spm_fields()
    for name in ("bos", "eos", "unknown"):
        fields[f"ggml.{name}_token_id"] = None
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


def test_sentencepiece_without_bytes_uses_unknown(tmp_path):
    fields = spm_fields()
    for key in ("tokens", "token_type", "scores"):
        fields[f"ggml.{key}"] = fields[f"ggml.{key}"][:3] + fields[f"ggml.{key}"][259:]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert tokenizer.decode(tokenizer.encode("hello 👍👍 the")) == "hello <unk> the"


# ---- bad files


def changed(kind, **changes):
    fields = tiny_fields() if kind == "gpt2" else spm_fields()
    return fields | {f"ggml.{key}": value for key, value in changes.items()}


TOKENS, MERGES = tiny_fields()["ggml.tokens"], tiny_fields()["ggml.merges"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (changed("gpt2", model="t5"), r"tokenizer 't5'; supported: gpt2, llama"),
        (changed("gpt2", model=None), r"no tokenizer \(tokenizer.ggml.model\)"),
        (changed("gpt2", pre="qwen2"), r"pre is 'qwen2'; supported: smollm, .*default"),
        (changed("gpt2", tokens=None), "no vocabulary"),
        (changed("gpt2", merges=None), "no merges"),
        (changed("gpt2", merges=[*MERGES, "zz top"]), r"merge \d+, 'zz top', needs 'zz'"),
        (changed("gpt2", merges=[*MERGES, "t Ł"]), r"merge \d+, 't Ł', needs 'tŁ'"),
        (changed("gpt2", merges=["abc"]), "merge 0, 'abc', is not two tokens"),
        (changed("gpt2", merges=["a b c"]), "merge 0, 'a b c', is not two tokens"),
        (changed("gpt2", tokens=[*TOKENS[:-1], "t"]), r"token 't' is there twice, as \d+ and 399"),
        (changed("gpt2", token_type=[1, 1]), "400 tokens but 2 token types"),
        (changed("gpt2", token_type=[9] * 400), r"token types \[9\] are unknown"),
        (changed("gpt2", bos_token_id=400), "bos_token_id is 400, outside the vocabulary of 400"),
        (changed("gpt2", eot_token_id=7777), "eot_token_id is 7777, outside"),
        (changed("llama", scores=None), "318 tokens but no scores"),
        (changed("llama", scores=[0.0]), "318 tokens but 1 scores"),
    ],
)
def test_bad_metadata(fields, message, tmp_path):
    path = write_gguf(tmp_path / "bad.gguf", fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tiny_fields())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.gguf is truncated or corrupted"):
        load_tokenizer(path)
