"""The `freqkv` command: one file a subcommand, loaded only when it is used.

A subcommand is a module of this package with `configure(parser)` and `run(args)`, and one line in
COMMANDS.
"""

import argparse
import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence

COMMANDS = {
    "generate": "continue a text, or chat, in the terminal",
    "eval": "measure a model: perplexity, needles, RULER, LongBench, cost, ...",
    "report": "put results side by side: tables, plots, one HTML page",
    "info": "print what a model is and what its cache will cost",
    "convert": "write any readable model as a Hugging Face directory",
    "train": "fine-tune a model as a config says",
    "tokenize": "turn text into token files for training",
    "plan": "reckon what a training config takes of each device's memory",
    "compile": "compile for a TPU, without one, and print memory and collectives",
    "bench": "time a model on this device, beside what the device could do",
}

DESCRIPTION = """\
FreqKV for Llama models: the key-value cache keeps a fixed size however long the text, because
whatever lies behind the first few tokens is low-pass filtered whenever the cache is full."""
EPILOG = """\
first steps:
  freqkv info MODEL
  freqkv generate --model MODEL --prompt "Once upon a time"
  freqkv eval perplexity --model MODEL --data book.txt --seq-len 8192
  freqkv train --config tiny

MODEL is a Hugging Face directory, a hub id or a .gguf file."""

# What a user can cause and mend: reported in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, KeyError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name); returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(argv).parse_args(argv)
    module = importlib.import_module(f"freqkv_jax.cli.{args.command}")
    args.command_line = ["freqkv", *argv]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return module.run(args) or 0
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of a pipe has gone, as in `freqkv info M | head -1`
            sys.stdout = None
            return 141
        except (*USER_ERRORS, RuntimeError) as error:
            message = _message(error)
            # The accelerator's allocator reports its own kind of RuntimeError.
            if isinstance(error, RuntimeError):
                if "RESOURCE_EXHAUSTED" not in message:
                    raise
                message = f"the device ran out of memory: {message}"
            if getattr(args, "debug", False):
                traceback.print_exc()
    print(f"freqkv {args.command}: error: {message}", file=sys.stderr)
    return 2


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    # Only the chosen command's module is imported, so that `freqkv --help` is quick.
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show where errors arise"
    )
    options = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "parents": [debug],
        "allow_abbrev": False,
    }
    parser = argparse.ArgumentParser("freqkv", description=DESCRIPTION, epilog=EPILOG, **options)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary, **options)
        if name == chosen:
            importlib.import_module(f"freqkv_jax.cli.{name}").configure(child)
    return parser


def _message(error: BaseException) -> str:
    # str(KeyError("x")) is "'x'", quotes included.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.splitlines()) or type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"warning: {' '.join(str(message).splitlines())}", file=sys.stderr)
