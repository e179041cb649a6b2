"""A process of its own: lm-eval tasks by the command and by `lm_eval.simple_evaluate`.

Prints what it saw as JSON. python -m tests.evals.lm_eval_run FOLDER
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests" / "data" / "lm_eval_task"
NAMES = ["freqkv_choice", "freqkv_rolling", "freqkv_answer"]
HIDDEN = ("torch", "transformers")


class Hiding:
    """A finder of modules to which some packages are not installed."""

    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)


def hide(*names):
    """From here on these packages are not there."""
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]


def by_command(model, folder):
    """The result file of `freqkv eval lm-eval`."""
    from freqkv_jax.cli import main

    output = folder / "result.json"
    words = ["eval", "lm-eval", "--model", model, "--tasks", *NAMES, "--include-path", str(TASKS)]
    words += ["--cache-size", "48", "--batch-size", "4", "--limit", "2", "--output", str(output)]
    assert main(words) == 0
    assert main(words) == 0, "the second time it is there"
    return json.loads(output.read_text())


def by_library(model):
    """Metrics and requests of `lm_eval.simple_evaluate`, and `fk.score` of each choice."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import freqkv_jax as fk
    from freqkv_jax.evals.engine import ModelEngine
    from freqkv_jax.evals.lm_eval_adapter import FreqKVLM

    kv = fk.FreqKVConfig(cache_size=48)
    llama, params = fk.load_pretrained(model, kv=kv, dtype="float32")
    tokenizer = fk.load_tokenizer(model)
    lm = FreqKVLM(ModelEngine(llama, params, lambda: tokenizer, 4))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=NAMES, task_manager=manager, limit=2, bootstrap_iters=0
    )
    pairs = []
    for sample in found["samples"]["freqkv_choice"]:
        for (context, continuation), answers in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            ids = tokenizer.encode(context + continuation)
            rows = [ids] * 4  # as many rows as are compiled already
            # Blanks at the end of a context count to the continuation.
            before = len(tokenizer.encode(context.rstrip()))
            ours = fk.score(llama, params, rows)[0][before - 1 :]
            pairs.append([answers[0][0], float(ours.sum())])
    return {"results": found["results"], "pairs": pairs}


if __name__ == "__main__":
    from tests.model_folder import write_model_folder

    os.chdir(ROOT)  # the tasks name their data from here
    place = Path(sys.argv[1])
    write_model_folder(place / "model", num_layers=1)
    seen = {"command": by_command(str(place / "model"), place)}
    seen["loaded"] = [name for name in HIDDEN if name in sys.modules]
    hide(*HIDDEN)
    seen["library"] = by_library(str(place / "model"))
    seen["loaded"] += [name for name in HIDDEN if name in sys.modules]
    (place / "seen.json").write_text(json.dumps(seen, default=str))
