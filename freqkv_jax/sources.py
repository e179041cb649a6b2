"""Where a model comes from: a Hugging Face directory, a hub id, or a GGUF file, also on gs://."""

import fnmatch
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from freqkv_jax.files import stamp, write_whole

# What is fetched from the hub: nothing else of a repository is read.
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_ALLOWED = (
    "a Hugging Face directory, a hub id such as HuggingFaceTB/SmolLM2-135M, or a .gguf file (on gs://,"
    " a directory or a .gguf file)"
)


def resolve(path: str | os.PathLike[str], weights: bool = True) -> Path:
    """The local directory or GGUF file that `path` means; what is elsewhere is fetched (and kept)
    first.

    Args:
      path: a directory, a GGUF file, either of them on gs:// or the like, or a hub id "org/name".
      weights: whether the weights of what is elsewhere are wanted, or config and tokenizer only.

    Raises:
      ValueError: the path exists and is neither a directory nor a GGUF file.
      FileNotFoundError: nothing is there, and it is no hub id either.
      OSError: the hub cannot be reached, or does not give the repository.
      ImportError: gs:// without etils (it comes with the train extra).
    """
    text = os.fspath(path)
    if "://" in text:
        return _copied(text, weights)
    local = Path(text).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        if local.suffix.lower() == ".gguf" or _starts_as_gguf(local):
            return local
        raise ValueError(f"{text} is a file but not a GGUF file; allowed: {_ALLOWED}")
    if local.exists():
        raise ValueError(f"{text} is neither a directory nor a file; allowed: {_ALLOWED}")
    # A file's ending says that no repository is meant.
    named_as_file = local.suffix.lower() in (".gguf", ".safetensors", ".json", ".bin")
    if named_as_file or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"{text} does not exist; give {_ALLOWED}")
    return _fetch(text, weights)


def _starts_as_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _copied(url: str, weights: bool) -> Path:
    """A model in an object store as files here; those that are as they were stay."""
    try:
        from etils import epath
    except ImportError:
        raise ImportError(
            f"{url} is not a local path; reading it needs pip install 'freqkv-jax[train]'"
        ) from None
    source: Any = epath.Path(url)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = cache / "freqkv" / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    if source.is_dir():
        wanted = (*CONFIG_FILES, *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ()))
        found = [f for f in source.iterdir() if any(fnmatch.fnmatch(f.name, w) for w in wanted)]
        target = home
    elif source.suffix.lower() == ".gguf" and source.exists():
        found, target = [source], home / source.name
    else:
        raise FileNotFoundError(f"{url} does not exist; give {_ALLOWED}")
    for file in found:
        _copy(file, home / file.name)
    if weights:  # shards of an earlier model would be read as this one's
        for old in home.glob("*.safetensors*"):
            if old.name not in [file.name for file in found]:
                old.unlink()
    return target


def _copy(source: Any, target: Path) -> None:
    size, changed = stamp(source)
    # What was copied bears the time of what it was copied from.
    if target.exists() and stamp(target) == (size, changed):
        return

    def write(name: str) -> None:
        with source.open("rb") as read, open(name, "wb") as file:
            shutil.copyfileobj(read, file, 1 << 24)
        os.utime(name, ns=(changed, changed))

    write_whole(target, write)


def _fetch(repo: str, weights: bool) -> Path:
    import huggingface_hub

    wanted = [*CONFIG_FILES, *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # which ones it raises for a lost connection differs by its version
        files = "config.json, the tokenizer files" + (" and model*.safetensors" if weights else "")
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"no directory is named {repo!r}, and the Hugging Face hub does not give a model of"
            f" that name ({reason[0]}); check the name and the network (a gated model also needs"
            f" `hf auth login`), or fetch {files} elsewhere and give that directory"
        ) from error


def open_gguf(path: str | os.PathLike[str]) -> Any:
    """A `gguf.GGUFReader` on the file; tensors are mapped, not read.

    Raises:
      ValueError: not a GGUF file, or truncated or corrupted.
      OSError: the file cannot be opened.
    """
    import gguf

    path = Path(path)
    if not _starts_as_gguf(path):
        raise ValueError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
    try:
        return gguf.GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # the reader checks little: damage shows as any kind of error
        raise ValueError(
            f"{path} is truncated or corrupted: it cannot be read as GGUF"
            f" ({type(error).__name__}: {error}); fetch it again"
        ) from error


def gguf_value(reader: Any, key: str, default: Any = None) -> Any:
    """A metadata field as a plain Python value (str, int, float, bool or list), or `default`."""
    field = reader.get_field(key)
    return default if field is None else field.contents()
