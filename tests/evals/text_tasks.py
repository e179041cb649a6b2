"""An engine without a model, and records of our own in LongBench's and LongGenBench's forms."""

import json
from pathlib import Path

from freqkv_jax.evals.task import Answer
from freqkv_jax.tokenizer.base import Tokenizer
from tests.tokenizer.samples import TEMPLATE, tiny_backend

LABELS = ["City", "Capital city", "Person"]
GOLD = {
    "narrativeqa": ["The old lantern"],
    "qasper": ["unanswerable"],
    "multifieldqa_en": ["Zürich, 1999"],
    "hotpotqa": ["no", "not at all"],
    "2wikimqa": ["a stone bridge"],
    "musique": ["12 copper bells"],
    "gov_report": ["Bells are made of copper. Bridges are made of stone."],
    "qmsum": ["They met. They parted"],
    "multi_news": ["A bridge fell.\nNobody was hurt."],
    "trec": ["Capital city"],
    "triviaqa": ["Naïve", "the café"],
    "samsum": ["Anna will bring the map."],
    "lcc": ["    return value + 1"],
    "repobench-p": ["self.count -= 1;"],
    "passage_count": ["7"],
    "passage_retrieval_en": ["Paragraph 12"],
}
# Records whose gold answer LongBench's own clean-up alters, so that copying it does not score 1.
ALTERED = {"lcc": ["x = 1  # one"], "triviaqa": ["two\nlines"], "repobench-p": ["a // b"]}


class FakeEngine:
    """Answers each prompt by `say(prompt)`; keeps what it was asked."""

    def __init__(self, say, template: str | None = TEMPLATE):
        special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        self.tokenizer = Tokenizer(tiny_backend(), special, chat_template=template)
        self.say, self.asked = say, []

    def generate(self, prompts):
        self.asked += prompts
        return [Answer(self.say(prompt), 3, True) for prompt in prompts]


def run(task, engine, batch_size: int = 3):
    """Records and summary, as the driver makes them."""
    items = list(task.items(engine))
    records = []
    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        found = task.run(engine, batch)
        assert len(found) == len(batch)
        records += [{**record, "key": item.key} for record, item in zip(found, batch, strict=True)]
    assert len({record["key"] for record in records}) == len(records)
    summary = task.summarize(engine, records)
    json.dumps([records, summary, task.describe(engine)], allow_nan=False)
    return records, summary


def write_longbench(folder: Path, gold=GOLD, copies: int = 2, context: str = "Some text.") -> Path:
    """NAME.jsonl of each data set, and prompts in our own words."""
    folder.mkdir(exist_ok=True)
    for name, answers in gold.items():
        records = [
            {
                "input": f"Question {number} of {name}?",
                "context": f"{context} {{braces}} of record {number}",
                "answers": answers,
                "length": 5,
                "dataset": name,
                "language": "en",
                "all_classes": LABELS if name == "trec" else None,
                "_id": f"{name}{number}",
            }
            for number in range(copies)
        ]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    prompts = dict.fromkeys(GOLD, "Read this.\n{context}\nNow: {input}")
    (folder / "dataset2prompt.json").write_text(json.dumps(prompts))
    return folder


def assignment(unit: str = "Floor", number: int = 6, **changes) -> dict:
    """A record of LongGenBench's form."""
    record = {
        "prompt": f"Plan {number} of {unit}. *** started ***\n#*# {unit} 1 (first):",
        "prefix": f"#*# {unit} 1 (first):",
        "type": unit,
        "number": number,
        "checks_once": {"1": "tea room", "2": "book (shop)"},
        "checks_range": {"3": "garden", "4": "garden"},
        "checks_periodic": "{'2': 'Bus Stop', '4': 'Bus Stop', '6': 'Bus Stop'}",
    }
    return record | changes


def gold_text(record: dict, units=None) -> str:
    """A text, after its prefix, in which every unit tells of what it must."""
    pieces = []
    for number in units or range(1, record["number"] + 1):
        events = []
        for kind in ("once", "range", "periodic"):
            checks = record[f"checks_{kind}"]
            checks = eval(checks) if isinstance(checks, str) else checks
            events += [event for unit, event in checks.items() if int(unit) == number]
        name = "" if number == 1 else f"#*# {record['type']} {number}: "
        pieces.append(f"{name}Here is {' and '.join(events) or 'nothing'}, and more.\n")
    return "".join(pieces) + "*** finished ***\n#*# Floor 99: beyond the end"
