"""`freqkv tokenize SRC... DST`: text into token files for training."""

import argparse
import os
import time
from typing import Any

from freqkv_jax.cli.common import MODEL_HELP, note

DESCRIPTION = """\
Turns texts and records into a folder of token files, which training reads without a tokenizer:
shards NNNNN.bin with the ids, NNNNN.json with document ends and digests, tokens.json when all is
done. Give the same command again after a stop: it goes on where it was. The shards do not depend
on the number of workers."""
EPILOG = """\
examples:
  freqkv tokenize books/ books-tokens --tokenizer MODEL
  freqkv tokenize a.jsonl b.jsonl.gz tokens --tokenizer MODEL --field content
  freqkv tokenize org/name tokens --tokenizer MODEL --kind hf --split train
  freqkv tokenize chats.jsonl tokens --tokenizer MODEL --kind chat --answers-only"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    from freqkv_jax.training.records import KINDS
    from freqkv_jax.training.tokenize import SHARD_CHARS

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "src",
        metavar="SRC",
        nargs="+",
        help="text file, folder, .jsonl, .json, .parquet, hub id (streamed), or tfds name",
    )
    parser.add_argument("dst", metavar="DST", help="folder to write or to go on with; may be gs://")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help=MODEL_HELP)
    kinds = [kind for kind in KINDS if kind not in ("tokens", "generated")]
    parser.add_argument("--kind", choices=kinds, default="auto", help="default: found by looking")
    parser.add_argument("--field", default="text", help="record field of the text (default: text)")
    parser.add_argument("--split", default="train", help="of a hub id or tfds (default: train)")
    parser.add_argument(
        "--answers-only",
        action="store_true",
        help="also write which tokens are answers, for data.answers_only (chat, alpaca)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core, at most 32)"
    )
    parser.add_argument(
        "--shard-chars",
        type=int,
        default=SHARD_CHARS,
        metavar="N",
        help=f"characters of text a shard (default: {SHARD_CHARS})",
    )
    parser.add_argument("--force", action="store_true", help="replace other data in DST")


def run(args: argparse.Namespace) -> int:
    """Tokenises, and says what was written."""
    from freqkv_jax.tokenizer import load_tokenizer
    from freqkv_jax.training.paths import path_of
    from freqkv_jax.training.records import find_kind
    from freqkv_jax.training.tokenize import Job, write_folder

    workers = min(os.cpu_count() or 1, 32) if args.workers is None else args.workers
    if workers < 1 or args.shard_chars < 1:
        raise ValueError("--workers and --shard-chars must be at least 1")
    target = path_of(args.dst)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"DST {target} is a file; name a folder")
    sources = []
    for text in args.src:
        kind = find_kind(text) if args.kind == "auto" else args.kind
        if kind == "tokens":
            raise ValueError(f"SRC {text} holds token ids already; give texts or records")
        sources.append((text, kind))
    job = Job(tuple(sources), args.field, args.answers_only, args.split, args.shard_chars)
    tokenizer = load_tokenizer(args.tokenizer)
    start = time.perf_counter()
    new = 0

    def on_shard(shard: dict[str, Any], was_there: bool) -> None:
        nonlocal new
        new += 0 if was_there else shard["num_tokens"]
        state = "there already" if was_there else "written"
        rate = new / (time.perf_counter() - start)
        note(f"{shard['name']}: {shard['num_tokens']:,} tokens {state} ({rate:,.0f} tokens/s)")

    index = write_folder(job, target, tokenizer, args.tokenizer, workers, args.force, on_shard)
    print(
        f"{index['num_tokens']:,} tokens of {index['num_documents']:,} documents in"
        f" {len(index['shards'])} shards in {target}"
    )
    return 0
