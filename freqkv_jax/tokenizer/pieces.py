"""From token ids back to text, whole or as it comes: what each token is in bytes."""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Tokens kept as left context, and held back at most, where only whole decoding is known.
_CONTEXT, _HELD = 8, 32


class Stream(Protocol):
    """Text as it becomes complete: all feeds and the flush, joined, are the text of all ids."""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; never half a character."""
        ...

    def flush(self) -> str:
        """The rest; the next feed begins a new text."""
        ...


class TextDecoder(Protocol):
    """What turns checked ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...


def text_decoder(backend: Any) -> TextDecoder:
    """The decoder of a `tokenizers.Tokenizer`.

    Byte-level and SentencePiece-like tokenizers are decoded here, token by token, so that a
    stream costs the same at any length; others by the tokenizers package, on a short window.
    """
    spec = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    if spec.get("type") == "ByteLevel":
        return ByteDecoder(backend, _byte_level)
    steps = spec.get("decoders", []) if spec.get("type") == "Sequence" else []
    rules = _fallback_rules(steps)
    return PlainDecoder(backend) if rules is None else ByteDecoder(backend, *rules)


@cache
def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte, inverted."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _byte_level(token: str) -> bytes:
    table = byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:  # an added token, which is plain text
        return token.encode()


def _fallback_rules(steps: list[dict[str, Any]]) -> tuple[Callable[[str], bytes], str, int] | None:
    """(token -> bytes, character stripped at the start, how many) of a decoder sequence.

    None where the steps are not replacements of strings, byte fallback, Fuse and at last a strip
    of the start.
    """
    replaced: list[tuple[str, str]] = []
    byte_fallback, fused, strip, strip_count = False, False, "", 0
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and not fused and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback" and not fused:
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and not strip and not step["stop"]:
            strip, strip_count = step["content"], step["start"]
        else:
            return None
    if not fused:
        return None

    def to_bytes(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes, strip, strip_count


class _Pieces(dict[int, bytes]):
    """Bytes of each token, worked out when first asked for."""

    def __init__(self, backend: Any, to_bytes: Callable[[str], bytes]) -> None:
        super().__init__()
        self._backend, self._to_bytes = backend, to_bytes

    def __missing__(self, token: int) -> bytes:
        text = self._backend.id_to_token(token)
        self[token] = b"" if text is None else self._to_bytes(text)  # None: an unused id
        return self[token]


class ByteDecoder:
    """Joins the bytes of the tokens; what is no UTF-8 becomes U+FFFD.

    For damaged runs of byte tokens (<0xE4> alone, say) this keeps the characters that are whole;
    the tokenizers package gives up such a run altogether.
    """

    def __init__(
        self, backend: Any, to_bytes: Callable[[str], bytes], strip: str = "", strip_count: int = 0
    ) -> None:
        self._pieces = _Pieces(backend, to_bytes)
        self._strip = strip, strip_count

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids."""
        stream = self.stream()
        return stream.feed(ids) + stream.flush()

    def stream(self) -> "ByteStream":
        """A new stream."""
        return ByteStream(self._pieces, *self._strip)


class ByteStream:
    """A stream over `ByteDecoder`'s tokens; holds back at most three bytes."""

    def __init__(self, pieces: _Pieces, strip: str, strip_count: int) -> None:
        self._pieces = pieces
        self._strip, self._strip_count = strip, strip_count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_strip = strip_count

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete."""
        return self._begin(self._decoder.decode(b"".join([self._pieces[i] for i in ids])))

    def flush(self) -> str:
        """What is left of a character that was cut off, as U+FFFD."""
        rest = self._begin(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._to_strip = self._strip_count
        return rest

    def _begin(self, text: str) -> str:
        """Takes the strip off the start of the whole text."""
        while self._to_strip and text:
            if not text.startswith(self._strip):
                self._to_strip = 0
            else:
                text = text.removeprefix(self._strip)
                self._to_strip -= 1
        return text


class PlainDecoder:
    """Any other tokenizer, decoded by the tokenizers package."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> "WindowStream":
        """A new stream."""
        return WindowStream(self.decode)


class WindowStream:
    """Decodes the new tokens behind a few earlier ones and gives what they add.

    Right for decoders in which a token's text depends on its neighbours only.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._before: list[int] = []
        self._held: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; an end that may be half a character is held back."""
        self._held += ids
        if not self._held:
            return ""
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._held) < _HELD:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """The rest; the next feed begins a new text."""
        text = self._new_text() if self._held else ""
        self._before, self._held = [], []
        return text

    def _new_text(self) -> str:
        return self._decode(self._before + self._held)[len(self._decode(self._before)) :]

    def _give(self, text: str) -> str:
        self._before = (self._before + self._held)[-_CONTEXT:]
        self._held = []
        return text
