"""Windows of eval_spec 1.1 and token streams from files."""

import math

import numpy as np
import pytest

from freqkv_jax.evals.data import document_windows, load_tokens, window_starts


class Bytes:
    """A tokenizer whose ids are bytes."""

    bos_id = None

    def encode(self, text):
        return list(text.encode())


def test_window_count_of_the_protocol():
    starts = window_starts(105508, 8192, 256)
    assert len(starts) == 380
    assert starts[:3] == [0, 256, 512] and starts[-1] == 379 * 256


@pytest.mark.parametrize("num_tokens", [1290, 1500, 1535, 1536, 1537, 1792, 1793, 5000])
@pytest.mark.parametrize("stride", [1, 7, 256])
def test_window_counts(num_tokens, stride):
    starts = window_starts(num_tokens, 1024, stride)
    assert len(starts) == math.ceil((num_tokens - 1024) / stride) - 1
    assert starts == [i * stride for i in range(len(starts))]
    # Below num_tokens - seq_len, and the last of those left out.
    assert starts[-1] + stride < num_tokens - 1024 <= starts[-1] + 2 * stride


@pytest.mark.parametrize("num_tokens", [0, 100, 8192, 8193, 8448])
def test_too_short(num_tokens):
    with pytest.raises(ValueError, match=r"need more than 8,448.*longer file"):
        window_starts(num_tokens, 8192, 256)


def test_shortest_text_that_will_do():
    assert window_starts(8449, 8192, 256) == [0]


@pytest.mark.parametrize(
    ("seq_len", "stride", "max_windows", "name"),
    [(1, 256, None, "seq-len"), (64, 0, None, "stride"), (64, -1, None, "stride"),
     (64, 8, 0, "max-windows")],
)  # fmt: skip
def test_bad_sizes(seq_len, stride, max_windows, name):
    with pytest.raises(ValueError, match=f"--{name} must be at least"):
        window_starts(10000, seq_len, stride, max_windows)


def test_max_windows_are_evenly_spaced():
    every = window_starts(105508, 8192, 256)
    assert window_starts(105508, 8192, 256, 3) == [0, every[190], every[-1]]
    assert window_starts(105508, 8192, 256, 1) == [0]
    assert window_starts(105508, 8192, 256, 10**6) == every


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_token_file(tmp_path, vocab, dtype):
    ids = np.array([0, 5, vocab - 1, 7])
    (tmp_path / "a.bin").write_bytes(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    stream = load_tokens(tmp_path / "a.bin", vocab)
    assert stream.tokens.tolist() == ids.tolist()
    assert stream.token_dtype == dtype and stream.describe()["num_tokens"] == 4
    assert len(stream.sha256) == 64


def test_token_dtype_overrides(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([1, 2], "<u4").tobytes())
    assert load_tokens(tmp_path / "a.bin", 100, "uint32").tokens.tolist() == [1, 2]
    assert load_tokens(tmp_path / "a.bin", 100).tokens.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("content", "vocab", "dtype", "message"),
    [
        (b"\0\0\0", 100, None, "3 bytes.*no multiple of the 2 bytes of uint16"),
        (b"\0" * 6, 70000, None, "no multiple of the 4 bytes of uint32"),
        (b"", 100, None, "is empty"),
        (b"\0" * 4, 70000, "uint16", "uint16 holds ids below 65,536.*uint32"),
        (b"\0" * 4, 100, "int8", "allowed: uint16, uint32"),
        (np.array([3, 99, 100], "<u2").tobytes(), 100, None, "token id 100 at place 2.*0 to 99"),
    ],
)
def test_bad_token_files(tmp_path, content, vocab, dtype, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokens(tmp_path / "a.bin", vocab, dtype)


def test_place_of_a_bad_id_in_a_later_block(tmp_path, monkeypatch):
    monkeypatch.setattr("freqkv_jax.evals.data.BLOCK_BYTES", 8)
    (tmp_path / "a.bin").write_bytes(np.array([0] * 9 + [77], "<u2").tobytes())
    with pytest.raises(ValueError, match="token id 77 at place 9"):
        load_tokens(tmp_path / "a.bin", 61)


def test_text(tmp_path):
    (tmp_path / "a.txt").write_text("né", encoding="utf-8")
    stream = load_tokens(tmp_path / "a.txt", 256, tokenizer=Bytes)
    assert stream.tokens.tolist() == list("né".encode()) and stream.token_dtype is None


def test_bad_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 2\)"):
        load_tokens(file, 256, tokenizer=Bytes)
    with pytest.raises(ValueError, match=r"needs a tokenizer; give a \.bin"):
        load_tokens(file, 256)
    with pytest.raises(ValueError, match=r"token.dtype"):
        load_tokens(file, 256, "uint16", Bytes)
    file.write_text("az")
    with pytest.raises(ValueError, match="token id 122 at place 1"):
        load_tokens(file, 100, tokenizer=Bytes)
    with pytest.raises(OSError):
        load_tokens(tmp_path / "none.txt", 100, tokenizer=Bytes)


class Begins(Bytes):
    bos_id = 1


def test_a_folder_of_texts(tmp_path):
    for name, text in (("b.txt", "xyz"), ("a.md", "ab"), ("c.json", "{}")):
        (tmp_path / name).write_text(text)
    stream = load_tokens(tmp_path, 256, tokenizer=Begins)
    assert stream.tokens.tolist() == list(b"abxyz")
    assert stream.offsets == (0, 2, 5) and stream.names == ("a.md", "b.txt")
    assert stream.describe()["num_documents"] == 2
    begun = load_tokens(tmp_path, 256, tokenizer=Begins, add_bos=True)
    assert begun.tokens.tolist() == [1, *b"ab", 1, *b"xyz"] and begun.offsets == (0, 3, 7)
    # The same bytes, cut elsewhere, are other data.
    (tmp_path / "a.md").write_text("abx")
    (tmp_path / "b.txt").write_text("yz")
    assert load_tokens(tmp_path, 256, tokenizer=Begins).sha256 != stream.sha256
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="folder without .txt or .md files"):
        load_tokens(tmp_path / "empty", 256, tokenizer=Begins)
    with pytest.raises(ValueError, match="has no begin token"):
        load_tokens(tmp_path, 256, tokenizer=Bytes, add_bos=True)


def test_a_token_file_with_documents(tmp_path):
    file, beside = tmp_path / "a.bin", tmp_path / "a.json"
    np.arange(5).astype("<u2").tofile(file)
    assert load_tokens(file, 100).offsets is None
    beside.write_text('{"offsets": [0, 2, 2, 5], "dtype": "uint16"}')
    assert load_tokens(file, 100).offsets == (0, 2, 2, 5)
    beside.write_text('{"tokenizer": "x"}')
    assert load_tokens(file, 100).offsets is None
    for bad in ("[0, 2]", "[1, 5]", "[0, 3, 2, 5]", '"x"', "[0, 2.5, 5]", "[]"):
        beside.write_text(f'{{"offsets": {bad}}}')
        with pytest.raises(ValueError, match=r"a.json: offsets must rise from 0 to the 5 tokens"):
            load_tokens(file, 100)
    beside.write_text("{")
    with pytest.raises(ValueError, match="a.json is not JSON"):
        load_tokens(file, 100)


def test_windows_within_documents():
    assert document_windows((0, 10, 11, 25), 8, 4) == [(0, 0, 8), (2, 11, 8), (2, 15, 8)]
    assert document_windows((0, 8, 9), 8, 4) == [(0, 0, 8)]
    assert document_windows((0, 5), 8, 4) == [(0, 0, 5)]
    for seq_len, stride in ((1, 4), (8, 0)):
        with pytest.raises(ValueError, match="--seq-len must be at least 2 and --stride"):
            document_windows((0, 5), seq_len, stride)
