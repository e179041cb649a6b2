"""`freqkv eval TASK`: measures a model and writes one JSON file; `--suite` runs a grid of them."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from freqkv_jax.cli.common import (
    DTYPES,
    MODEL_HELP,
    add_model_arguments,
    add_policy_arguments,
    default_dtype,
    describe_policy,
    enable_compile_cache,
    load_model,
    note,
    parse_mesh,
    size_text,
)

DESCRIPTION = """\
Measures a model. `freqkv eval TASK --help` explains a task and its flags.

With --output a run that was stopped goes on when the same command is given again. --suite runs
what a YAML file lists (or a packaged suite): a result file for each cell; it skips what is done."""
EPILOG = """\
examples:
  freqkv eval perplexity --model MODEL --data book.txt --seq-len 8192 --max-windows 4 \\
    --cache-size 2048 --policy freqkv --output result.json
  freqkv eval --suite small --model MODEL --output results/small --set data=book.txt"""
MARKS = {
    "nothing_compressed": "no compression: every text fits the cache",
    "beyond_native_window": "positions beyond the window that the model was trained for",
}


class TaskParser(argparse.ArgumentParser):
    """A parser that is filled when it is used, so that one task's module is loaded, not all; and
    that names the nearest flag to an unknown one."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        found, extra = super().parse_known_args(args, namespace)
        for word in extra:
            if word.startswith("--"):
                from freqkv_jax.evals.registry import nearest

                flag = word.partition("=")[0]
                self.error(f"unknown flag {flag}{nearest(flag, self._option_string_actions)}")
        return found, extra


class _ChooseTask(argparse._SubParsersAction):
    """Names the nearest task to an unknown one, and refuses flags before a task, where they would
    be read and then lost."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values[0] not in self._name_parser_map:
            from freqkv_jax.evals.registry import nearest

            raise argparse.ArgumentError(
                None, f"no task is named {values[0]!r}{nearest(values[0], self._name_parser_map)}"
            )
        early = [
            action.option_strings[-1]
            for action in parser._actions
            if action.option_strings
            and action.dest != "debug"
            and getattr(namespace, action.dest, action.default) != action.default
        ]
        if early:
            parser.error(
                f"{', '.join(early)} before the task {values[0]} would not count: put a task's"
                f" flags behind its name (freqkv eval {values[0]} ...), or give --suite and no task"
            )
        super().__call__(parser, namespace, values, option_string)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the tasks and their flags."""
    from freqkv_jax.evals.registry import SUMMARIES, TASKS

    parser.description, parser.epilog = DESCRIPTION, EPILOG
    tasks = parser.add_subparsers(
        dest="eval_task", metavar="TASK", parser_class=TaskParser, action=_ChooseTask
    )
    for name in TASKS:
        child = tasks.add_parser(
            name,
            help=SUMMARIES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        child.fill = lambda child, name=name: _add_task_flags(child, name)
        child.set_defaults(handler=_run_one)
    # The action itself says what is wrong, better.
    tasks.choices = None  # pyright: ignore[reportAttributeAccessIssue]
    _add_suite_flags(parser)


def _add_task_flags(child: argparse.ArgumentParser, name: str) -> None:
    from freqkv_jax.evals.options import add_options
    from freqkv_jax.evals.registry import task_class

    cls = task_class(name)
    child.description = inspect.getdoc(cls)
    child.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    add_model_arguments(child)
    child.add_argument("--batch-size", type=int, default=1, help="texts run together (1)")
    _add_run_flags(child, "FILE.json", "where to write the result")
    add_options(child, cls)
    add_policy_arguments(child)


def _add_run_flags(parser: Any, metavar: str, output_help: str) -> None:
    parser.add_argument(
        "--limit", type=int, metavar="K", help="at most so many samples of a kind (default: all)"
    )
    parser.add_argument("--output", metavar=metavar, help=output_help)
    parser.add_argument(
        "--force", action="store_true", help="replace what --output holds, and measure it again"
    )


def _add_suite_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a suite instead of a TASK")
    group.add_argument("--suite", metavar="FILE.yaml", help="a file, or a packaged suite's name")
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options of the suite's tasks, e.g. data=book.txt",
    )
    group.add_argument(
        "--only",
        metavar="PATTERN,...",
        help="cells whose names (of their result files) match, e.g. 'ruler-*,cost-*'; so a suite "
        "can be spread over processes and machines",
    )
    group.add_argument("--model", metavar="PATH", help=MODEL_HELP)
    group.add_argument("--adapter", metavar="DIR", help="PEFT adapter directory (LoRA)")
    group.add_argument("--dtype", choices=DTYPES)
    group.add_argument("--mesh", metavar="data=A,fsdp=B,tensor=C")
    group.add_argument("--batch-size", type=int, help="texts run together")
    _add_run_flags(group, "FOLDER", "of the result files (default: what the suite says)")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen task, or a suite."""
    if args.eval_task is not None:
        return args.handler(args)
    if args.suite is None:
        from freqkv_jax.evals.registry import TASKS

        raise ValueError(f"give a TASK ({', '.join(TASKS)}) or --suite FILE.yaml")
    return _run_suite(args)


def _run_one(args: argparse.Namespace) -> int:
    import jax

    import freqkv_jax as fk
    from freqkv_jax.evals import drive, options, registry, result
    from freqkv_jax.evals.engine import ModelEngine

    cls = registry.task_class(args.eval_task)
    task = options.build_task(cls, options.given_options(cls, args))
    settings = drive.Run(
        model_path=args.model,
        adapter=args.adapter,
        mesh=args.mesh,
        command=args.command_line,
        batch_size=args.batch_size,
        limit=args.limit,
        output=args.output,
        force=args.force,
        note=note,
    )
    if args.output:
        result.check_output(args.output)
    model, params = load_model(args)
    note(f"policy: {describe_policy(model.kv)}")
    engine = ModelEngine(model, params, lambda: fk.load_tokenizer(args.model), args.batch_size)
    measured = drive.run_task(task, engine, settings)
    if jax.process_index() == 0:
        print_result(measured, args.output)
    return 0


def _run_suite(args: argparse.Namespace) -> int:
    import jax

    from freqkv_jax.evals import suite

    flags = {n: getattr(args, n) for n in suite.RUN_FLAGS if getattr(args, n) is not None}
    text, name = suite.find_suite(args.suite)
    found = suite.read_suite(text, name, flags, args.set)
    if args.only is not None:
        found = suite.select(found, args.only)
    folder = args.output or found.output
    if not folder:
        raise ValueError(f"{name} names no folder for its results; give --output FOLDER")
    rows = suite.run_cells(found, _SuiteRunner(args), folder, note)
    if jax.process_index() == 0:
        print_table(
            ["cell", "measure", "value", "remarks"],
            [
                [
                    row["name"],
                    row.get("headline", ""),
                    f"{row['value']:.4f}" if "value" in row else "",
                    _remarks(row),
                ]
                for row in rows
            ],
        )
        print(f"written           {folder}")
    return 1 if any("error" in row for row in rows) else 0


def _remarks(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    failed = [f"{row['num_failed']} items failed"] if row.get("num_failed") else []
    return "; ".join(failed + ["nothing compressed"] * row.get("nothing_compressed", False))


class _SuiteRunner:
    """Runs cells of a suite; the model of the last one is kept for the next."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.key: Any = None
        self.model: Any = None
        self.params: Any = None
        self.tokenizers: dict[str, Any] = {}  # of one model at a time

    def __call__(self, cell: Any, output: str) -> dict[str, Any]:
        from freqkv_jax.evals import drive
        from freqkv_jax.evals.engine import ModelEngine

        flags = dict(cell.flags)
        path, batch_size = flags["model"], flags.get("batch_size") or 1
        settings = drive.Run(
            model_path=path,
            adapter=flags.get("adapter"),
            mesh=flags.get("mesh"),
            names={"model_name": cell.model_name, "policy_name": cell.policy_name},
            command=self.args.command_line,
            batch_size=batch_size,
            limit=flags.get("limit"),
            output=output,
            force=self.args.force,
            note=note,
        )

        def engine(model: Any, params: Any) -> ModelEngine:
            model = model if cell.kv is None else model.clone(kv=cell.kv)
            return ModelEngine(model, params, lambda: self._tokenizer(path), batch_size)

        if self.key != cell.model_key and Path(output).is_file():
            # What is done already needs no weights.
            found = drive.finished(cell.task, engine(self._shape(flags), {}), settings)
            if found is not None:
                return found
        self._load(cell, flags)
        return drive.run_task(cell.task, engine(self.model, self.params), settings)

    def _shape(self, flags: dict[str, Any]) -> Any:
        """The model without its weights."""
        import freqkv_jax as fk
        from freqkv_jax.weights import read_config

        config, remembered = read_config(flags["model"], flags.get("adapter"))
        policy = remembered or fk.FreqKVConfig()
        return fk.Llama(config, policy, flags.get("dtype") or default_dtype())

    def _tokenizer(self, path: str) -> Any:
        import freqkv_jax as fk

        if path not in self.tokenizers:
            self.tokenizers = {path: fk.load_tokenizer(path)}
        return self.tokenizers[path]

    def _load(self, cell: Any, flags: dict[str, Any]) -> None:
        if self.key == cell.model_key:
            return
        import freqkv_jax as fk

        # The old one's memory is free before the new one comes.
        self.key = self.model = self.params = None
        enable_compile_cache()
        mesh = fk.make_mesh(**parse_mesh(flags["mesh"])) if flags.get("mesh") else None
        dtype = flags.get("dtype") or default_dtype()
        note(f"loading {flags['model']} ({dtype})")
        self.model, self.params = fk.load_pretrained(
            flags["model"], dtype=dtype, mesh=mesh, adapter=flags.get("adapter")
        )
        self.key = cell.model_key


def print_result(measured: dict[str, Any], output: str | None) -> None:
    """What a run found, for people."""
    if measured["task"] == "perplexity":
        _print_perplexity(measured)
    elif "table" in measured:
        print_table(measured["table"]["columns"], measured["table"]["rows"])
    if measured["num_failed"]:
        print(f"failed            {measured['num_failed']} of {measured['num_items']} items")
    if "kv_bytes" in measured:  # not where a task's own table says it
        print(f"KV cache          {size_text(measured['kv_bytes'])}")
        print(f"tokens/s          {measured['tokens_per_second']:.1f}")
    print(
        f"seconds           {measured['seconds']:.1f} ({measured['compile_seconds']:.1f} compiling)"
    )
    for mark, words in MARKS.items():
        if measured[mark]:
            print(f"note              {words}")
    if output:
        print(f"written           {output}")
    sys.stdout.flush()


def _print_perplexity(measured: dict[str, Any]) -> None:
    error = measured["standard_error"]
    spread = f" (standard error {error:.4f})" if error is not None else ""
    print(f"perplexity        {measured['perplexity']:.4f}")
    print(f"mean loss         {measured['mean_loss']:.6f}{spread}")
    print(f"last 1K tokens    {measured['last_1k_perplexity']:.4f}")
    print(f"windows           {measured['num_windows']}")
    rounds = measured["num_compressions"]
    if isinstance(rounds, dict):
        rounds = f"{rounds['min']} to {rounds['max']} (mean {rounds['mean']:.1f})"
    print(f"compressions      {rounds} a window")
    if "document_losses" in measured:
        print(f"mean of documents {measured['document_mean_perplexity']:.4f}")
        columns = ("name", "num_tokens", "num_windows", "perplexity")
        rows = [[_cell(row[c]) for c in columns] for row in measured["document_losses"]]
        print_table(["document", "tokens", "windows", "perplexity"], rows)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table: the first column to the left, numbers to the right."""
    lines = [list(map(str, columns)), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
