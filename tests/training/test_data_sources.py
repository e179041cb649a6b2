"""Texts, records, token files: what is read from them, and what is said of bad ones."""

import gzip
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from freqkv_jax.tokenizer import Tokenizer, load_tokenizer
from freqkv_jax.training import data
from freqkv_jax.training.data import Batches, open_data
from freqkv_jax.training.documents import ALPACA, encode_records, vocabulary_sha256
from freqkv_jax.training.records import Record
from freqkv_jax.training.store import open_folder
from freqkv_jax.training.tokenize import Job, write_folder
from tests.model_folder import VOCAB_SIZE, write_tokenizer

T = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def opened(path, tokenizer, kind="auto", seq_len=T, field="text", cache_dir=None, **section):
    entry = SimpleNamespace(path=str(path), weight=1.0, kind=kind, field=field)
    settings = {"pack": "concat", "answers_only": False} | section
    settings = SimpleNamespace(train=[entry], eval=[], **settings)
    return open_data(settings, seq_len, VOCAB_SIZE, tokenizer, 0, cache_dir=cache_dir)


def stream(source, tokenizer):
    """All rows as text."""
    ids = source.rows(np.arange(source.num_rows))["tokens"].ravel()
    return tokenizer.decode(ids).rstrip(tokenizer.decode([0]))


END = "<|im_end|>"


def test_text_file_and_folder(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("first text\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("zweiter wörtlich")
    (tmp_path / "sub" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert stream(opened(tmp_path / "a.txt", tokenizer), tokenizer) == f"first text\n{END}"
    want = f"first text\n{END}zweiter wörtlich{END}packed{END}"
    assert stream(opened(tmp_path, lambda: tokenizer), tokenizer) == want
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 text \(byte 3\)"):
        opened(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        opened(tmp_path / "a.txt", None)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_jsonl(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one", "n": 1}, {"text": ""}, {"text": "2"}])
    assert stream(opened(file, tokenizer), tokenizer) == f"one{END}2{END}"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no field 'body' \(it has 'text', 'n'"):
        opened(file, tokenizer, field="body")
    file.write_text('{"text": "a"}\n\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: field 'text' must be a text, got int"):
        opened(file, tokenizer)
    file.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON"):
        opened(file, tokenizer)
    file.write_text('["a"]\n')
    with pytest.raises(ValueError, match="line 1: a record must be a JSON object"):
        opened(file, tokenizer)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_data(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match="is empty"):
        opened(tmp_path / "a.jsonl", tokenizer)


def test_nothing_there(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opened(tmp_path / "no.txt", tokenizer)
    with pytest.raises(ValueError, match="is empty"):
        opened(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"hub id.*freqkv tokenize org/name DST --kind hf"):
        opened("org/name", tokenizer)
    with pytest.raises(ValueError, match="kind 'csv' is not known"):
        opened(tmp_path, tokenizer, kind="csv")


def test_chat(tmp_path, tokenizer):
    turns = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write_lines(tmp_path / "c.jsonl", [{"messages": messages}])
    plain = opened(file, tokenizer)
    assert stream(plain, tokenizer) == tokenizer.render_chat(messages, False)
    source = opened(file, tokenizer, seq_len=256, answers_only=True)
    rows = source.rows(np.array([0]))
    assert tokenizer.decode(rows["tokens"][rows["mask"]]) == f"A1{END}\nA2{END}\n"
    shared = [{"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"}]
    write_lines(file, [{"conversations": shared}])
    rows = opened(file, tokenizer, seq_len=256, answers_only=True).rows(np.array([0]))
    assert tokenizer.decode(rows["tokens"][rows["mask"]]) == f"A1{END}\n"
    write_lines(file, [{"messages": messages}, {"messages": [{"role": "user"}]}])
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2: a message needs"):
        opened(file, tokenizer)


def test_alpaca(tmp_path, tokenizer):
    records = [{"instruction": "Say {x}", "output": "x!"}, {"instruction": "I", "input": "given",
               "output": "o"}]  # fmt: skip
    file = tmp_path / "a.json"
    file.write_text(json.dumps(records))  # one array, as LongAlpaca comes
    source = opened(file, tokenizer, seq_len=512, answers_only=True, pack="documents")
    rows = source.rows(np.arange(source.num_rows))
    answers = {tokenizer.decode(t[m]) for t, m in zip(rows["tokens"], rows["mask"], strict=True)}
    assert "".join(sorted(answers)) in (f"o{END}x!{END}", f"x!{END}o{END}")
    text = stream(opened(file, tokenizer), tokenizer)
    assert text.startswith(ALPACA.format(instruction="Say {x}") + f"x!{END}Below")
    assert "### Input:\ngiven\n\n### Response:o" in text
    with pytest.raises(ValueError, match="has no answers to tell"):
        opened(file, tokenizer, kind="jsonl", field="output", answers_only=True)
    file.write_text(json.dumps([records[0], {"instruction": "I"}]))
    with pytest.raises(ValueError, match=r"a\.json, record 2: no field 'output'"):
        opened(file, tokenizer, kind="alpaca")


def chat_tokenizer(vocab, merges, template, **parts):
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, chat_template=template)


CHAT = Record(
    {
        "messages": [
            {"role": role, "content": text}
            for role, text in (("user", "hi"), ("assistant", "oh"), ("user", "no"),
                               ("assistant", "ah so"))
        ]
    },
    "here",
)  # fmt: skip
# As Llama 2: the template writes the space before an answer itself.
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)


def test_answers_of_a_tokenizer_that_puts_a_space_before_a_text():
    letters = ["▁", *"[]/INSThionas", "▁o", "▁a"]
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = chat_tokenizer(
        letters, [("▁", "o"), ("▁", "a")], SPACED, normalizer=normalizers.Sequence(spaces)
    )
    assert tokenizer.adds_space
    ((ids, flags),) = encode_records([CHAT], "chat", "", tokenizer, True)
    assert ids.tolist() == tokenizer.encode(tokenizer.render_chat(CHAT.fields["messages"], False))
    names = [tokenizer.backend.id_to_token(int(token)) for token in ids[flags]]
    assert names == ["▁o", "h", "▁", "</s>", "▁a", "h", "▁", "s", "o", "▁", "</s>"]


def test_answers_of_a_byte_level_tokenizer_are_encoded_apart():
    """As a model meets them: a token that joins prompt and answer is never what it writes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    apart = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = chat_tokenizer(
        [*letters, "]Ġ"], [("]", "Ġ")], SPACED, pre_tokenizer=apart, decoder=decoders.ByteLevel()
    )
    assert not tokenizer.adds_space
    ((ids, flags),) = encode_records([CHAT], "chat", "", tokenizer, True)
    whole = tokenizer.render_chat(CHAT.fields["messages"], False)
    assert tokenizer.decode(ids) == whole and ids.tolist() != tokenizer.encode(whole)
    assert tokenizer.decode(ids[flags]) == " oh </s> ah so </s>"


def test_parquet(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": ["eins", "zwei"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", tokenizer, field="body")
    assert stream(source, tokenizer) == f"eins{END}zwei{END}"
    with pytest.raises(ValueError, match=r"a\.parquet, record 1: no field 'text'"):
        opened(tmp_path, tokenizer, kind="hf")


def test_tfds(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(ImportError, match=r"tensorflow_datasets: pip install 'freqkv-jax\[train\]"):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        opened("pg19", tokenizer, kind="tfds")
    fake = ModuleType("tensorflow_datasets")
    asked = []

    def data_source(name, split, download):
        asked.append((name, split, download))
        if name != "pg19":
            raise ValueError("unknown")
        return [{"book_text": b"a book", "book_id": 3}]

    fake.data_source = data_source
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    source = opened("pg19:test", tokenizer, kind="tfds", cache_dir=tmp_path)
    assert stream(source, tokenizer) == f"a book{END}"
    assert asked == [("pg19", "test", False)]
    with pytest.raises(OSError, match="tfds build other"):
        opened("other", tokenizer, kind="tfds")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_flat_tokens(tmp_path, dtype):
    ids = np.arange(5, 5 + 4 * T)
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    source = opened(tmp_path / "a.bin", None)
    rows = source.rows(np.arange(source.num_rows))
    np.testing.assert_array_equal(rows["tokens"].ravel(), ids)
    assert rows["mask"].sum() == 4 * (T - 1)
    ids[9] = VOCAB_SIZE
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=rf"token id {VOCAB_SIZE} at place 9"):
        opened(tmp_path / "a.bin", None)
    (tmp_path / "a.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="no multiple of the 2 bytes"):
        opened(tmp_path / "a.bin", None)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        opened(tmp_path / "a.bin", None)


@pytest.mark.parametrize("kind", ["text", "tokens"])
@pytest.mark.parametrize("change", ["content", "shorter", "gone"])
def test_a_file_that_changes_during_a_run(tmp_path, tokenizer, kind, change):
    file = tmp_path / ("a.txt" if kind == "text" else "a.bin")
    file.write_bytes(b"abcd" * 200 if kind == "text" else np.arange(200, dtype="<u2").tobytes())
    source = opened(file, tokenizer)
    with Batches(source, 2, 0, depth=0) as batches:
        before = batches.at(0)
        os.utime(file, ns=(1, 1))  # touched only: the same content
        np.testing.assert_array_equal(batches.at(0)["tokens"], before["tokens"])
        raw = file.read_bytes()
        if change == "gone":
            file.unlink()
        else:
            file.write_bytes(raw[:-4] if change == "shorter" else raw[:-1] + b"\x01")
        with pytest.raises(ValueError, match="since this run began|cannot be found now"):
            batches.at(1)
        file.write_bytes(raw)
        assert opened(file, tokenizer).fingerprint == source.fingerprint
        file.write_bytes(raw[2:])
        assert opened(file, tokenizer).fingerprint != source.fingerprint


def test_text_is_tokenised_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "SMALL_BYTES", 10)
    file = tmp_path / "a.txt"
    file.write_text("some text that is long enough\n" * 9)
    plain = opened(file, tokenizer)
    first = opened(file, tokenizer, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(data, "write_folder", None)  # would fail: it is there
    again = opened(file, tokenizer, cache_dir=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    for source in (first, again):
        got, want = (s.rows(np.arange(s.num_rows)) for s in (source, plain))
        np.testing.assert_array_equal(got["tokens"], want["tokens"])
        np.testing.assert_array_equal(got["mask"], want["mask"])
    file.write_text("another text, of another length\n")
    with pytest.raises(ValueError, match=r"a\.txt has changed since this run began"):
        again.rows(np.arange(1))


def test_a_token_folder_where_paths_are_of_etils(tmp_path, tokenizer):
    """As on gs://: they are no pathlib ones, and tell sizes in their own way."""
    epath = pytest.importorskip("etils.epath")
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"text number {i}"} for i in range(4)])
    job = Job(((str(file), "jsonl"),), shard_chars=40)
    here, there = tmp_path / "here", epath.Path(tmp_path / "there")
    found = []
    index = write_folder(job, here, tokenizer, "tok")
    assert write_folder(job, there, tokenizer, "tok") == index
    assert write_folder(job, there, tokenizer, "tok", on_shard=lambda *x: found.append(x)) == index
    assert len(found) > 1 and all(was_there for _, was_there in found)
    for shard in here.iterdir():
        assert (there / shard.name).read_bytes() == shard.read_bytes()


def test_a_folder_of_records_with_a_readme(tmp_path, tokenizer):
    (tmp_path / "README.md").write_text("what the records are")
    (tmp_path / "LICENSE").write_text("free")
    write_lines(tmp_path / "z.jsonl", [{"text": "one"}])
    assert stream(opened(tmp_path, tokenizer), tokenizer) == f"one{END}"
    (tmp_path / "book.txt").write_text("a book")
    with pytest.raises(
        ValueError, match=r"records \(z\.jsonl\) and other files \(book\.txt\).*kind:"
    ):
        opened(tmp_path, tokenizer)
    assert stream(opened(tmp_path, tokenizer, kind="jsonl"), tokenizer) == f"one{END}"
    for name in ("z.jsonl", "book.txt"):
        (tmp_path / name).unlink()
    assert stream(opened(tmp_path, tokenizer), tokenizer).startswith("free")


def test_tokens_of_another_tokenizer(tmp_path, tokenizer):
    """A run gives a function, which may find no tokenizer: token files need none."""
    (tmp_path / "a.txt").write_text("some text that is long enough\n")
    folder = tmp_path / "out"
    write_folder(Job(((str(tmp_path / "a.txt"), "text"),)), folder, tokenizer, "tok")
    (tmp_path / "other").mkdir()
    write_tokenizer(tmp_path / "other")
    other = load_tokenizer(tmp_path / "other")
    other.backend.add_tokens(["more"])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        opened(folder, lambda: other)
    (tmp_path / "other" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="truncated"):
        opened(folder, lambda: load_tokenizer(tmp_path / "other"))
    (tmp_path / "other" / "tokenizer.json").unlink()
    assert opened(folder, lambda: load_tokenizer(tmp_path / "other")).num_rows
    (tmp_path / "other" / "tokenizer.model").touch()
    assert opened(folder, lambda: load_tokenizer(tmp_path / "other")).num_rows


def test_an_extended_folder_that_breaks_off_is_not_finished(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"number {i}"} for i in range(3)])
    job = Job(((str(file), "jsonl"),), shard_chars=20)
    write_folder(job, tmp_path / "out", tokenizer, "tok")
    write_lines(file, [*({"text": f"number {i}"} for i in range(5)), {"no": "text"}])
    with pytest.raises(ValueError, match="no field 'text'"):
        write_folder(job, tmp_path / "out", tokenizer, "tok")
    with pytest.raises(ValueError, match="is not finished"):
        opened(tmp_path / "out", tokenizer)


def test_token_folder(tmp_path, tokenizer, monkeypatch):
    records = [{"text": f"text number {i} " * (i + 1)} for i in range(12)]
    file = write_lines(tmp_path / "a.jsonl", records)
    job = Job(((str(file), "jsonl"),), shard_chars=300)
    folder = tmp_path / "out"
    index = write_folder(job, folder, tokenizer, "tok")
    assert len(index["shards"]) > 2 and index["num_documents"] == 12
    for pack in ("documents", "concat"):
        got = opened(folder, tokenizer, pack=pack)
        want = opened(file, tokenizer, pack=pack)
        for name in ("tokens", "mask"):  # rows cross shards
            ours, theirs = (s.rows(np.arange(s.num_rows))[name] for s in (got, want))
            np.testing.assert_array_equal(ours, theirs)
    assert open_folder(folder, VOCAB_SIZE, vocabulary_sha256(tokenizer)).offsets[-1] > 0
    with pytest.raises(ValueError, match="made with another tokenizer"):
        open_folder(folder, VOCAB_SIZE, "other")
    with pytest.raises(ValueError, match=r"token id 220 at place 4, .* vocabulary is 0 to 99"):
        open_folder(folder, 100, None)
    with pytest.raises(ValueError, match="does not say which tokens are answers"):
        opened(folder, tokenizer, answers_only=True)
    shard = folder / "00001.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-2] + b"\x01\x00")
    with pytest.raises(ValueError, match=r"00001\.bin is damaged"):
        opened(folder, tokenizer)
    # Of a large shard the edges are compared, not the whole.
    monkeypatch.setattr("freqkv_jax.training.store.BLOCK_BYTES", 8)
    with pytest.raises(ValueError, match=r"00001\.bin is damaged"):
        opened(folder, tokenizer)
    shard.write_bytes(raw)
    opened(folder, tokenizer)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001\.bin is missing"):
        opened(folder, tokenizer)
    (folder / "tokens.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        opened(folder, tokenizer)
