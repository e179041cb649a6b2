"""Tokenizers of Hugging Face directories: tokenizer.json and what stands beside it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from freqkv_jax.tokenizer.base import (
    NAMES,
    OWN_KEY,
    NoTokenizerError,
    Tokenizer,
    add_start_and_end,
)

# Other forms of a tokenizer, which transformers can turn into tokenizer.json.
OTHER_FORMS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def from_directory(folder: Path) -> Tokenizer:
    """Reads tokenizer.json, with the special tokens, chat template and end tokens beside it.

    Raises:
      ValueError: a file is damaged, special tokens do not fit the vocabulary, or the tokenizer
        is there in another form only.
      FileNotFoundError: the directory has no tokenizer.
    """
    backend = _backend(folder)
    config = _read_json(folder / "tokenizer_config.json")
    listed = _read_json(folder / "special_tokens_map.json")
    _add_listed(backend, config.get("added_tokens_decoder"), folder)
    special = _named_tokens(backend, {**listed, **config}, folder)
    if backend.post_processor is None:
        add_start_and_end(
            backend,
            special.get("bos_token") if config.get("add_bos_token") else None,
            special.get("eos_token") if config.get("add_eos_token") else None,
        )
    max_length = config.get("model_max_length")
    return Tokenizer(
        backend,
        special,
        eos_ids=_eos_ids(folder, config),
        chat_template=_chat_template(folder, config),
        # transformers writes 1e30 where there is no limit.
        model_max_length=int(max_length) if max_length and max_length < 1e18 else None,
    )


def _backend(folder: Path) -> Any:
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        other = [name for name in OTHER_FORMS if (folder / name).is_file()]
        if other:
            raise NoTokenizerError(
                f"{folder} has its tokenizer as {' and '.join(other)} only, and tokenizer.json is"
                ' needed; make it with: python -c "from transformers import AutoTokenizer;'
                f" AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
                " (needs transformers and sentencepiece)"
            )
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the model there"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise ValueError(
            f"{path} is truncated, corrupted, or newer than the tokenizers package"
            f" {tokenizers.__version__} ({error}); fetch it again"
        ) from error
    # Such settings of a training run would cut off texts or fill them up.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; {} where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is truncated or corrupted ({error}); fetch it again, or remove it"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _content(token: Any) -> str | None:
    """The text of a special token, in either spelling: a str, or a dict with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _added(token: Any, special: bool) -> Any:
    import tokenizers

    flags = {}
    if isinstance(token, Mapping):
        flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    flags.setdefault("normalized", False)
    return tokenizers.AddedToken(_content(token), special=special, **flags)


def _add_listed(backend: Any, listed: Any, folder: Path) -> None:
    """Adds what "added_tokens_decoder" lists (id -> token) and tokenizer.json lacks."""
    if not isinstance(listed, Mapping):
        return
    for number, token in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _content(token)
        if text is None:
            continue
        if (found := backend.token_to_id(text)) is None:
            backend.add_tokens([_added(token, bool(token.get("special")))])
            found = backend.token_to_id(text)
        if found != int(number):
            raise ValueError(
                f"{folder}: tokenizer_config.json gives token {text!r} the id {number}, but by"
                f" tokenizer.json it is {found}; the files are of different models"
            )


def _named_tokens(backend: Any, entries: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The named special tokens; each is made special if tokenizer.json does not say so."""
    found: dict[str, str] = {}
    marked = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for name in NAMES:
        text = _content(entries.get(name))
        if text is None:
            continue
        if backend.token_to_id(text) is None:
            if name in ("bos_token", "eos_token"):
                raise ValueError(
                    f"{folder}: tokenizer_config.json names {name} {text!r}, which is not in the"
                    " vocabulary of tokenizer.json; the files are of different models"
                )
            continue  # a padding token, say, that the model has no embedding for
        found[name] = text
        if text not in marked:
            backend.add_special_tokens([_added(entries[name], True)])
    for token in _listed_specials(entries):
        text = _content(token)
        if text and text not in marked and backend.token_to_id(text) is not None:
            backend.add_special_tokens([_added(token, True)])
    return found


def _listed_specials(entries: Mapping[str, Any]) -> Iterable[Any]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = entries.get(key) or ()
        yield from listed.values() if isinstance(listed, Mapping) else listed


def _eos_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """End tokens of generation_config.json, and those that our own `save` wrote down."""
    own = config.get(OWN_KEY)
    saved = own.get("eos_ids", []) if isinstance(own, Mapping) else []
    path = folder / "generation_config.json"
    given = _read_json(path).get("eos_token_id")
    ids = [*saved, *(given if isinstance(given, list) else [] if given is None else [given])]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(
            f"{folder}: end tokens must be token ids, got {ids}; see eos_token_id in {path.name}"
        )
    return ids


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template; its own file goes before the entry in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name: tool use, retrieval, ...
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
