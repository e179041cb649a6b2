"""Tokenizers of GGUF files: vocabulary, merges or scores, and pre-tokenizer from the metadata."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freqkv_jax.sources import gguf_value, open_gguf
from freqkv_jax.tokenizer.base import NoTokenizerError, Tokenizer, add_start_and_end

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODELS = ("gpt2", "llama")
# What tokenizer.ggml.pre may say of a byte-level vocabulary, and which way of splitting a text
# into words llama.cpp means by it.
PRE = {
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "codeshell": "digits",
    "gpt-2": "words",
    "phi-2": "words",
    "olmo": "words",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "default": "default",
}
# Words as GPT-2 sees them, and as Llama 3 does.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's default: punctuation apart, GPT-2 words, then numbers in groups of three digits.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# transformers' name -> the metadata key before "_token_id".
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_ENDS = ("eot", "eom")  # end of turn, end of message: a model stops there, too
_LLAMA_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where a file does not say


@dataclass(frozen=True)
class _Fields:
    """A file's tokenizer metadata."""

    reader: Any
    path: Path

    def get(self, key: str, default: Any = None) -> Any:
        return gguf_value(self.reader, f"tokenizer.ggml.{key}", default)

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}")

    def lacking(self, what: str) -> NoTokenizerError:
        return NoTokenizerError(f"{self.path}: {what}")


def from_gguf(path: Path) -> Tokenizer:
    """Builds the tokenizer from a GGUF file's metadata.

    Raises:
      ValueError: damaged file; no tokenizer in it; a model type or pre-tokenizer that is not
        supported; a vocabulary whose parts contradict each other.
    """
    fields = _Fields(open_gguf(path), path)
    model = fields.get("model")
    if model not in MODELS:
        what = "no tokenizer (tokenizer.ggml.model)" if model is None else f"tokenizer {model!r}"
        raise fields.lacking(
            f"{what}; supported: {', '.join(MODELS)}. Load a Hugging Face directory of the model,"
            " whose tokenizer.json can be of any type"
        )
    tokens, types = _vocabulary(fields)
    special = _special_ids(fields, tokens, model)
    if model == "gpt2":
        backend, add_bos = _byte_level(fields, tokens)
    else:
        backend, add_bos = _sentencepiece(fields, tokens, types, special.get("unk_token"))
    ends = [_checked_id(fields, f"{name}_token_id", tokens) for name in _ENDS]
    ends = [token for token in ends if token is not None]
    _mark_added(backend, tokens, types, {*special.values(), *ends})
    named = {name: tokens[token] for name, token in special.items()}
    add_start_and_end(
        backend,
        named.get("bos_token") if fields.get("add_bos_token", add_bos) else None,
        named.get("eos_token") if fields.get("add_eos_token", False) else None,
    )
    architecture = gguf_value(fields.reader, "general.architecture")
    return Tokenizer(
        backend,
        named,
        eos_ids=ends,
        chat_template=gguf_value(fields.reader, "tokenizer.chat_template"),
        model_max_length=gguf_value(fields.reader, f"{architecture}.context_length"),
    )


def _vocabulary(fields: _Fields) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens, by id."""
    tokens = fields.get("tokens")
    if not tokens:
        raise fields.lacking("no vocabulary (tokenizer.ggml.tokens); convert the model again")
    types = fields.get("token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise fields.error(f"{len(tokens)} tokens but {len(types)} token types; convert it again")
    if wrong := set(types) - set(range(BYTE + 1)):
        raise fields.error(f"token types {sorted(wrong)} are unknown; allowed: 0 to {BYTE}")
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if seen.setdefault(token, number) != number:
            raise fields.error(
                f"token {token!r} is there twice, as {seen[token]} and {number}; convert it again"
            )
    return tokens, types


def _checked_id(fields: _Fields, key: str, tokens: Sequence[str]) -> int | None:
    token = fields.get(key)
    if token is not None and not 0 <= token < len(tokens):
        raise fields.error(
            f"tokenizer.ggml.{key} is {token}, outside the vocabulary of {len(tokens)} tokens"
        )
    return token


def _special_ids(fields: _Fields, tokens: Sequence[str], model: str) -> dict[str, int]:
    """Ids of the named special tokens that there are."""
    found = {}
    for name, key in _SPECIAL.items():
        token = _checked_id(fields, f"{key}_token_id", tokens)
        if token is None and model == "llama" and _LLAMA_IDS.get(name, len(tokens)) < len(tokens):
            token = _LLAMA_IDS[name]
        if token is not None and tokens[token]:
            found[name] = token
    return found


def _byte_level(fields: _Fields, tokens: Sequence[str]) -> tuple[Any, bool]:
    """Byte-level BPE as in GPT-2, and whether such a text begins with bos."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    pre = fields.get("pre")
    if pre is None:
        warnings.warn(
            f"{fields.path} does not say how its texts are split (tokenizer.ggml.pre is missing:"
            " an old file); taking 'default' as llama.cpp does, which may be wrong for this model"
        )
        pre = "default"
    if pre not in PRE:
        raise fields.lacking(
            f"tokenizer.ggml.pre is {pre!r}; supported: {', '.join(PRE)}. Load a Hugging Face"
            " directory of the model, whose tokenizer.json can be of any type"
        )
    style = PRE[pre]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = _merges(fields, vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=style == "llama3"))
    backend.pre_tokenizer = _pre_tokenizer(style)
    backend.decoder = decoders.ByteLevel()
    return backend, style == "llama3"


def _merges(fields: _Fields, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    listed = fields.get("merges")
    if listed is None:
        raise fields.error("no merges (tokenizer.ggml.merges); convert the model again")
    merges = []
    for number, line in enumerate(listed):
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise fields.error(f"merge {number}, {line!r}, is not two tokens with a space between")
        lacking = [token for token in (left, right, left + right) if token not in vocab]
        if lacking:
            raise fields.error(
                f"merge {number}, {line!r}, needs {lacking[0]!r}, which is not in the vocabulary:"
                " the two are of different models"
            )
        merges.append((left, right))
    return merges


def _pre_tokenizer(style: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    def apart(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if style == "words":
        return words
    if style == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    patterns = (_LLAMA3,) if style == "llama3" else _DEFAULT
    return pre_tokenizers.Sequence([*(apart(pattern) for pattern in patterns), only_bytes])


def _sentencepiece(
    fields: _Fields, tokens: Sequence[str], types: Sequence[int], unknown: int | None
) -> tuple[Any, bool]:
    """BPE by scores with byte fallback, as in SentencePiece; a text begins with bos."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    scores = fields.get("scores")
    if scores is None or len(scores) != len(tokens):
        count = "no" if scores is None else str(len(scores))
        raise fields.error(f"{len(tokens)} tokens but {count} scores; convert the model again")
    vocab = {token: number for number, token in enumerate(tokens)}
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing and unknown is None:
        raise fields.error(
            f"byte token {missing[0]} is missing ({len(missing)} of 256 are) and there is no"
            " unknown token, so that some texts could not be encoded; convert the model again"
        )
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(vocab, scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=not missing,
        )
    )
    # Each stretch of text between special tokens gets the space, as in llama.cpp.
    prefix = fields.get("add_space_prefix", True)
    begin = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return backend, True


def _merges_by_score(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to put a token together from two, best score first.

    A tie goes to the longer left part, as where transformers converts such vocabularies.
    """
    ranked = []
    for token, number in vocab.items():
        if types[number] in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            continue  # never written by merging: "<s>" in a text is a marker or three letters
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                order = (-scores[number], -len(left), -len(right), number)
                ranked.append((order, left, right))
    return [(left, right) for _, left, right in sorted(ranked)]


def _mark_added(
    backend: Any, tokens: Sequence[str], types: Sequence[int], special: set[int]
) -> None:
    """Tokens that are found in a text before it is split: markers and user-defined ones."""
    from tokenizers import AddedToken

    specials, others = [], []
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        is_special = number in special or kind in (CONTROL, UNKNOWN)
        if token and (is_special or kind == USER_DEFINED):
            added = AddedToken(token, normalized=False, special=is_special)
            (specials if is_special else others).append(added)
    backend.add_special_tokens(specials)
    backend.add_tokens(others)
