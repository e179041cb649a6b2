"""`freqkv convert SRC DST`: writes any readable model as a Hugging Face directory."""

import argparse
from pathlib import Path
from typing import Any

from freqkv_jax.cli.common import DTYPES, MODEL_HELP, note, size_text

DESCRIPTION = """\
Writes a model and its tokenizer as a Hugging Face directory (safetensors) that transformers loads
and this package too. A cache policy that the model remembers is kept. DST appears when everything
could be written, and not before."""
EPILOG = """\
examples:
  freqkv convert model.Q4_1.gguf model-hf
  freqkv convert org/name model-bf16 --dtype bfloat16"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("src", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("dst", metavar="DST", help="directory to write; it must be new or empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: as stored; float32 for a GGUF file"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the model that DST holds already"
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="convert the weights only")


def run(args: argparse.Namespace) -> int:
    """Converts, and lists what was written."""
    from freqkv_jax.evals.progress import progress
    from freqkv_jax.weights.load import load_params, open_source, stored_dtype
    from freqkv_jax.weights.save import write_folder

    target = Path(args.dst).expanduser()
    _check_target(target, args.force)
    source = open_source(args.src)
    if target.exists() and target.resolve() == source.path.resolve():
        raise ValueError(f"SRC and DST are the same directory ({target}); name another DST")
    dtype = args.dtype or stored_dtype(source)
    tokenizer = None if args.no_tokenizer else _tokenizer(args.src)
    with progress(f"loading ({dtype})", source.num_tensors) as update:
        params = load_params(source, dtype, on_progress=update)
    with progress("writing", source.num_tensors) as update:
        write_folder(source.config, params, target, source.policy, tokenizer, update)
    print(f"{source.config.num_params:,} parameters in {dtype} written to {target}:")
    for file in sorted(path for path in target.rglob("*") if path.is_file()):
        print(f"  {file.relative_to(target)!s:36} {size_text(file.stat().st_size):>10}")
    return 0


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"DST {target} is a file; name a directory")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise FileExistsError(
            f"DST {target} is not empty; name a new directory, or --force to replace its model"
        )


def _tokenizer(src: str) -> Any:
    from freqkv_jax.tokenizer import load_tokenizer

    try:
        return load_tokenizer(src)
    except FileNotFoundError as error:
        note(f"no tokenizer is written: {error}")
        return None
