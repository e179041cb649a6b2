"""From a record to token ids, and which of them are answers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from freqkv_jax.training.records import Record

# The instruction format of Stanford Alpaca, which LongAlpaca uses too.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # of ShareGPT records

Document = tuple[np.ndarray, np.ndarray | None]


class Encoder(Protocol):
    """What reading text needs of a tokenizer (freqkv_jax.tokenizer.Tokenizer has it)."""

    eos_ids: tuple[int, ...]

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        ...

    @property
    def vocab_size(self) -> int:
        """The largest id and one."""
        ...

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids."""
        ...

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        ...


def encode_records(
    records: Iterable[Record], kind: str, field: str, tokenizer: Encoder, answers: bool
) -> Iterator[Document]:
    """Documents, empty ones left out.

    Args:
      kind: "chat" and "alpaca" are conversations and instructions; any other takes the text in
        `field`.
      answers: whether to tell which tokens are answers; only conversations and instructions can.

    Raises:
      ValueError: with the place of the record: no such field, or one that cannot be read.
    """
    encode = _encoder(kind, field, tokenizer, answers)
    for record in records:
        tokens, flags = encode(record)
        if tokens:
            known = np.asarray(flags, bool) if answers else None
            yield np.asarray(tokens, np.uint32), known


def _encoder(
    kind: str, field: str, tokenizer: Encoder, answers: bool
) -> Callable[[Record], tuple[list[int], list[bool]]]:
    if kind == "chat":
        return lambda record: _chat(record, tokenizer, answers)
    if kind == "alpaca":
        return lambda record: _alpaca(record, tokenizer)
    if answers:
        raise ValueError(
            f"data of kind {kind} has no answers to tell from questions; set data.answers_only"
            " to false, or give chat or alpaca records"
        )
    return lambda record: _text(record, field, tokenizer)


def text_of(record: Record, field: str) -> str:
    """A text field; ValueError with file and line if it is missing or no text."""
    if field not in record.fields:
        raise ValueError(
            f"{record.where}: no field {field!r} (it has {', '.join(map(repr, record.fields))});"
            " name the field that holds the text (field: in the config, --field)"
        )
    value = record.fields[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{record.where}: field {field!r} must be a text, got {type(value).__name__}"
        )
    return value


def begin_ids(tokenizer: Encoder) -> list[int]:
    """What the tokenizer puts before a text: its first token, or nothing."""
    around = tokenizer.encode("", add_special_tokens=True)
    return around[:1] if around and around[0] == tokenizer.bos_id else []


def _end_ids(tokenizer: Encoder) -> list[int]:
    return list(tokenizer.eos_ids[:1])


def _text(record: Record, field: str, tokenizer: Encoder) -> tuple[list[int], list[bool]]:
    ids = tokenizer.encode(text_of(record, field))
    # An empty text is no document, not two markers.
    return (begin_ids(tokenizer) + ids + _end_ids(tokenizer) if ids else []), []


def _alpaca(record: Record, tokenizer: Encoder) -> tuple[list[int], list[bool]]:
    instruction, output = text_of(record, "instruction"), text_of(record, "output")
    given = record.fields.get("input")
    form = ALPACA_INPUT if given else ALPACA
    prompt = form.format(instruction=instruction, input=given)
    before = begin_ids(tokenizer) + tokenizer.encode(prompt)
    after = tokenizer.encode(output) + _end_ids(tokenizer)
    return before + after, [False] * len(before) + [True] * len(after)


def _chat(record: Record, tokenizer: Encoder, answers: bool) -> tuple[list[int], list[bool]]:
    messages = _messages(record)
    try:
        whole = tokenizer.render_chat(messages, False)
        if not answers:
            return tokenizer.encode(whole), []
        parts: list[tuple[str, bool]] = []
        done = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.render_chat(messages[:place], True)
            answered = tokenizer.render_chat(messages[: place + 1], False)
            if not (prompt.startswith(done) and answered.startswith(prompt)):
                raise ValueError(
                    "the chat template rewrites what came before an answer, so answers cannot be"
                    " told from prompts; set data.answers_only to false, or split the record"
                )
            parts += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
            done = answered
        return _encoded_parts(parts, tokenizer)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None


def _encoded_parts(
    parts: list[tuple[str, bool]], tokenizer: Encoder
) -> tuple[list[int], list[bool]]:
    """Ids of prompts and answers, and which are of answers."""
    ids: list[int] = []
    flags: list[bool] = []
    if not getattr(tokenizer, "adds_space", False):
        # Encoded apart, as a model meets them: it reads the prompt, then writes the answer.
        for part, is_answer in parts:
            new = tokenizer.encode(part)
            ids += new
            flags += [is_answer] * len(new)
        return ids, flags
    # Apart, each answer would begin with a space that the template has not, or has already.
    ids, spans = tokenizer.encode_with_spans("".join(part for part, _ in parts))  # type: ignore
    ends = np.cumsum([len(part) for part, _ in parts])
    # The part in which a token's last character stands.
    place = np.searchsorted(ends, [stop for _, stop in spans])
    return ids, [parts[min(number, len(parts) - 1)][1] for number in place]


def _messages(record: Record) -> list[dict[str, Any]]:
    """The conversation of a record, in the words of chat templates."""
    for name in ("messages", "conversations", "conversation"):
        if name in record.fields:
            break
    else:
        raise ValueError(
            f"{record.where}: no field 'messages' (it has"
            f" {', '.join(map(repr, record.fields))}); chat records are"
            ' {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    out = []
    for message in record.fields[name] or []:
        if not isinstance(message, Mapping):
            raise ValueError(f"{record.where}: a message must be an object, got {message!r}")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or content is None:
            raise ValueError(
                f"{record.where}: a message needs 'role' and 'content', got {dict(message)!r}"
            )
        out.append({**message, "role": _ROLES.get(role, role), "content": content})
    if not out:
        raise ValueError(f"{record.where}: field {name!r} holds no message")
    return out


def vocabulary_sha256(tokenizer: Any) -> str:
    """Digest of which token each id is, the same from every file that the tokenizer came in."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    pairs = sorted((token_id, token) for token, token_id in vocabulary.items())
    return hashlib.sha256(repr(pairs).encode("utf-8", "surrogatepass")).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of all that decides the ids of a text or a conversation."""
    about = (tokenizer.backend.to_str(), tokenizer.special_tokens, tokenizer.chat_template)
    text = repr((*about, tokenizer.eos_ids))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
