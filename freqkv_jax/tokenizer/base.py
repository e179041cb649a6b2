"""The tokenizer that all sources give: ids and text, chat templates, streams, and saving."""

import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from freqkv_jax.files import write_text
from freqkv_jax.tokenizer import chat
from freqkv_jax.tokenizer.pieces import Stream, text_decoder

# The special tokens that have a name, in transformers' words.
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# In the JSON of a normalizer or pre-tokenizer: what puts a space before a text.
_ADDS_SPACE = (
    rb'"type":\s*"Prepend"|"prepend_scheme":\s*"(always|first)"|"add_prefix_space":\s*true'
)
OWN_KEY = "freqkv_jax"  # in tokenizer_config.json; transformers ignores it


class NoTokenizerError(ValueError):
    """There is no tokenizer, or none of a kind that is read here."""


class Tokenizer:
    """Text to token ids and back.

    Markers such as <|im_start|> in a text become the one token that they are, as in transformers.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str],
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ) -> None:
        """
        Args:
          backend: a `tokenizers.Tokenizer`, taken over.
          special_tokens: text of the tokens of `NAMES` that there are; all in the vocabulary.
          eos_ids: end tokens besides `eos_token`.
          chat_template: Jinja source.
          model_max_length: only written down by `save`.
        """
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        eos = self._named("eos_token")
        own = () if eos is None else (eos,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *map(int, eos_ids)]))
        self._decoder = text_decoder(backend)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, {self.special_tokens})"

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self._named("bos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self.chat_template is not None

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id and one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token for token, about in added.items() if about.special)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` also what a text begins and ends with.

        What the vocabulary has no token for, not even bytes, is left out, as in transformers.

        Raises:
          ValueError: not a str, or a str with half a surrogate pair, which is no Unicode text.
        """
        return self._encoding(text, add_special_tokens).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, and of each the characters (first, last and one) that it stands for.

        Raises ValueError as `encode`.
        """
        encoding = self._encoding(text, False)
        return encoding.ids, encoding.offsets

    @cached_property
    def adds_space(self) -> bool:
        """Whether a text is encoded as if a space stood before it, as in SentencePiece: its parts,
        encoded apart, then have spaces that the whole does not have."""
        parts = (self.backend.normalizer, self.backend.pre_tokenizer)
        about = b" ".join(part.__getstate__() for part in parts if part is not None)
        return bool(re.search(_ADDS_SPACE, about))

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            place = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if place is None:
                raise
            raise ValueError(
                f"the text has a lone surrogate, {text[place]!r}, at character {place}: it is no"
                " valid Unicode; read the file with its right encoding, or with errors='replace'"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        return self._decoder.decode(self._checked(ids, skip_special_tokens))

    def stream_decoder(self, skip_special_tokens: bool = False) -> Stream:
        """An object with `feed(ids)` and `flush()` that gives text as it becomes complete.

        Its pieces, joined, are `decode` of all ids; none ends within a character, and a feed
        costs the same however long the text has become.
        """
        return _Checked(self, self._decoder.stream(), skip_special_tokens)

    def _checked(self, ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        try:
            tokens = [operator.index(token) for token in ids]
        except TypeError as error:
            raise ValueError(f"token ids must be a sequence of whole numbers: {error}") from None
        size = self.vocab_size
        if tokens and (min(tokens) < 0 or max(tokens) >= size):
            place, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < size)
            raise ValueError(
                f"token id {token} at place {place} is outside the vocabulary; allowed: 0 to"
                f" {size - 1}"
            )
        if skip_special_tokens:
            return [token for token in tokens if token not in self.special_ids]
        return tokens

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation as the model was taught to read it.

        Args:
          messages: [{"role": "user", "content": "..."}, ...].
          add_generation_prompt: ends with the words that open the model's answer.

        Raises:
          ValueError: no chat template, or it refuses the messages.
        """
        # The template writes the first token itself, so none is added.
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text that `apply_chat_template` encodes; same arguments and errors."""
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template: the model was not made for conversation;"
                " write the prompt yourself and use encode, or take an instruct model"
            )
        return chat.render(self.chat_template, messages, add_generation_prompt, self.special_tokens)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and its companions, which transformers' AutoTokenizer loads.

        The folder is made if need be; each file is replaced in one step.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        template = place / "chat_template.jinja"
        write_text(place / "tokenizer.json", self.backend.to_str(pretty=True))
        special = {name: self._as_config(text) for name, text in self.special_tokens.items()}
        _write_json(place / "special_tokens_map.json", special)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **special,
        }
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.eos_ids != tuple(t for t in (self._named("eos_token"),) if t is not None):
            config[OWN_KEY] = {"eos_ids": list(self.eos_ids)}
        _write_json(place / "tokenizer_config.json", config)
        # transformers prefers this file to the config's entry: an old one must not stay.
        if self.chat_template is not None:
            write_text(template, self.chat_template)
        else:
            template.unlink(missing_ok=True)

    def _as_config(self, text: str) -> str | dict[str, Any]:
        """A special token as tokenizer_config.json has it: its text, or more if it is peculiar."""
        about = self.backend.get_added_tokens_decoder().get(self.backend.token_to_id(text))
        if about is None or not (about.lstrip or about.rstrip or about.single_word):
            return text
        return {
            "__type": "AddedToken",
            "content": text,
            "lstrip": about.lstrip,
            "rstrip": about.rstrip,
            "single_word": about.single_word,
            "normalized": about.normalized,
            "special": True,
        }


class _Checked:
    """A stream that checks ids first."""

    def __init__(self, tokenizer: Tokenizer, stream: Stream, skip_special_tokens: bool) -> None:
        self._tokenizer, self._stream, self._skip = tokenizer, stream, skip_special_tokens

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; ValueError for ids outside the vocabulary."""
        return self._stream.feed(self._tokenizer._checked(ids, self._skip))

    def flush(self) -> str:
        """The rest; the next feed begins a new text."""
        return self._stream.flush()


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def add_start_and_end(backend: Any, begin: str | None, end: str | None) -> None:
    """Makes `encode(add_special_tokens=True)` put these tokens around a text."""
    from tokenizers import processors

    tokens = [token for token in (begin, end) if token is not None]
    around = [f"{begin}:0"] * (begin is not None), [f"{end}:0"] * (end is not None)
    again = [f"{begin}:1"] * (begin is not None), [f"{end}:1"] * (end is not None)
    single = [*around[0], "$A:0", *around[1]]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *again[0], "$B:1", *again[1]],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens)],
    )
