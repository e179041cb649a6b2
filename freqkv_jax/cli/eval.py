"""`freqkv eval TASK`: measures a model and writes one JSON file."""

import argparse
import sys

from freqkv_jax.cli.common import (
    add_model_arguments,
    add_policy_arguments,
    describe_policy,
    load_model,
    note,
    size_text,
)

DESCRIPTION = "Measures a model. `freqkv eval TASK --help` explains a task and its flags."
PERPLEXITY = """\
Perplexity of one long text, in windows of --seq-len tokens that start every --stride tokens and
are scored each from an empty cache. --data is a .bin file of token ids (uint16 or uint32, no
header; the model then needs no tokenizer) or a UTF-8 text."""
PERPLEXITY_EXAMPLE = """\
example:
  python eval.py perplexity --model MODEL --data book.txt --seq-len 8192 --max-windows 4 \\
    --cache-size 2048 --policy freqkv --output result.json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the tasks and their flags."""
    parser.description = DESCRIPTION
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    child = tasks.add_parser(
        "perplexity",
        help="perplexity of long text",
        description=PERPLEXITY,
        epilog=PERPLEXITY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    child.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    add_model_arguments(child)
    child.add_argument("--data", required=True, metavar="FILE", help=".bin token ids, or text")
    child.add_argument("--token-dtype", choices=("uint16", "uint32"), help="of a .bin file")
    child.add_argument("--seq-len", type=int, default=8192, help="tokens a window (8192)")
    child.add_argument("--stride", type=int, default=256, help="from window to window (256)")
    child.add_argument("--max-windows", type=int, help="so many, evenly spaced (default: all)")
    child.add_argument("--batch-size", type=int, default=1, help="windows scored at once (1)")
    child.add_argument("--output", metavar="FILE.json", help="where to write the result")
    add_policy_arguments(child)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen task."""
    return {"perplexity": _perplexity}[args.task](args)


def _perplexity(args: argparse.Namespace) -> int:
    import jax

    import freqkv_jax as fk
    from freqkv_jax.evals import data, perplexity, result
    from freqkv_jax.evals.progress import progress

    if args.output:
        result.check_output(args.output)
    model, params = load_model(args)
    stream = data.load_tokens(
        args.data, model.config.vocab_size, args.token_dtype, lambda: fk.load_tokenizer(args.model)
    )
    record = {
        "task": "perplexity",
        "protocol": perplexity.PROTOCOL,
        "config": {
            "model_path": args.model,
            "adapter": args.adapter,
            "seq_len": args.seq_len,
            "stride": args.stride,
            "max_windows": args.max_windows,
            "batch_size": args.batch_size,
            "mesh": args.mesh,
            **perplexity.describe_model(model),
        },
        "model_fingerprint": result.model_fingerprint(args.model),
        "data": stream.describe(),
        **result.environment(args.command_line),
    }
    starts = data.window_starts(len(stream.tokens), args.seq_len, args.stride, args.max_windows)
    note(f"policy: {describe_policy(model.kv)}; {len(starts)} windows of {args.seq_len} tokens")
    with progress("scoring", len(starts)) as update:
        measured = perplexity.perplexity(
            model,
            params,
            stream.tokens,
            args.seq_len,
            args.stride,
            args.max_windows,
            args.batch_size,
            on_progress=lambda done, total: update(done),
        )
    if jax.process_index() == 0:
        if args.output:
            result.write_result(args.output, {**measured, **record})
        _print_perplexity(measured, args.output)
    return 0


def _print_perplexity(measured: dict, output: str | None) -> None:
    error = measured["standard_error"]
    spread = f" (standard error {error:.4f})" if error is not None else ""
    print(f"perplexity        {measured['perplexity']:.4f}")
    print(f"mean loss         {measured['mean_loss']:.6f}{spread}")
    print(f"windows           {measured['num_windows']}")
    rounds = measured["num_compressions"]
    flag = "" if rounds else "  (no compression: every window fits the cache)"
    print(f"compressions      {rounds} a window{flag}")
    print(f"KV cache          {size_text(measured['kv_bytes'])}")
    print(f"tokens/s          {measured['tokens_per_second']:.1f}")
    if output:
        print(f"written           {output}")
    sys.stdout.flush()
