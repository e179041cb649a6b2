"""Records what the reference packages give for made-up answers: cases.json.gz beside this file.

Needs lm-eval, and, only here, rouge, rouge-score, jieba and fuzzywuzzy (without python-Levenshtein
and rapidfuzz, which change its figures):

    pip install rouge==1.0.1 rouge-score==0.1.2
    pip install --no-deps --target REFERENCE fuzzywuzzy==0.18.0 jieba==0.42.1
    PYTHONPATH=REFERENCE python tests/data/scorers/make.py

All texts are made up here from our own words with fixed seeds.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import random
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
NUM_CASES = 240
WORDS = (
    "the a an river stone lantern of and in green valley bridge keeper walks walking walked slowly"
    " quick quickly old older map The A copper bell 12 7 1999 don't well-known (north) south,"
    ' "east" west! naïve café Zürich 東京 привет ελλάδα 👍 cafe\u0301 x_y #tag //note `code`'
    " relational running runs happily happiness dogs flies died generalization skies proceed inning"
    " can't U.S. 3.14 Mr. no-one's state-of-the-art"
).split()
LABELS = [
    "Number of something", "Number", "Other number", "Other", "City", "Capital city", "city",
    "Description of a person", "Description", "Person", "person name", "Date", "Invention, book",
    "Code", "Postcode or other code", "other code",
]  # fmt: skip
EDGES = ["", " ", "\n", ".", "...", " . . ", "a the an", "\n\nfirst\nsecond", "\t x \r\n", "é", "٣"]


def text(rng, low=0, high=14, stops=0.08, breaks=0.03):
    """Random words with full stops and line breaks between them."""
    pieces = []
    for _ in range(rng.randint(low, high)):
        word = rng.choice(WORDS)
        pieces.append(word.upper() if rng.random() < 0.05 else word)
        chance = rng.random()
        pieces.append(". " if chance < stops else "\n" if chance < stops + breaks else " ")
        if rng.random() < 0.04:
            pieces.append(" ")
    return "".join(pieces)


def changed(rng, source):
    """`source` with words dropped, moved, doubled or replaced."""
    words = source.split(" ")
    for _ in range(rng.randint(0, 1 + len(words) // 2)):
        place = rng.randrange(len(words)) if words else 0
        action = rng.random()
        if not words or action < 0.3:
            words.insert(place, rng.choice(WORDS))
        elif action < 0.6:
            del words[place]
        elif action < 0.8:
            words[place] = rng.choice(WORDS)
        else:
            words.insert(rng.randrange(len(words)), words[place])
    return " ".join(words)


def pairs(seed, low=0, high=14, **kwargs):
    """(answer, gold) texts: the edges against each other and texts, then random ones."""
    rng = random.Random(seed)
    found = [(edge, rng.choice([edge, "one green stone.", *EDGES])) for edge in EDGES]
    found += [("one green stone.", edge) for edge in EDGES]
    while len(found) < NUM_CASES:
        gold = text(rng, low, high, **kwargs)
        answer = changed(rng, gold) if rng.random() < 0.8 else text(rng, low, high, **kwargs)
        found.append((answer, gold))
    return found


def code_pairs(seed):
    """(answer, gold): lines of code, some behind remarks, fences and empty lines."""
    rng = random.Random(seed)
    lines = [
        "return value + 1", "    for item in items:", "self.count -= 1;", "if (x == y) {", "}", "",
        "# a remark", "// another", "```python", "   ", "\tprint('é')", "x = y // 2", "end",
    ]  # fmt: skip
    found = [("", ""), ("", "x"), ("x", ""), ("\n\n", "x = 1"), ("# only\n", ""), ("   \nx", "x")]
    while len(found) < NUM_CASES:
        gold = rng.choice(lines)
        answer = [rng.choice(lines) for _ in range(rng.randint(0, 4))]
        if rng.random() < 0.6:
            answer.insert(rng.randint(0, len(answer)), changed(rng, gold))
        found.append(("\n".join(answer), gold))
    return found


def number_pairs(seed, form):
    """(answer, gold) around whole numbers; the gold answer has the form `form`."""
    rng = random.Random(seed)
    found = [("", form.format(3)), ("none", form.format(3)), ("03 3", form.format(3))]
    while len(found) < NUM_CASES:
        numbers = [str(rng.randint(1, 12)) for _ in range(rng.randint(0, 4))]
        glue = rng.choice([" ", ", ", "\n", " or Paragraph ", "-", ".", "٣", "x"])
        found.append(
            (rng.choice(["", "Paragraph "]) + glue.join(numbers), form.format(rng.randint(1, 12)))
        )
    return found


def class_cases(seed):
    """(answer, gold, labels)."""
    rng = random.Random(seed)
    found = []
    while len(found) < NUM_CASES:
        labels = rng.sample(LABELS, rng.randint(2, len(LABELS)))
        parts = rng.sample(labels, rng.randint(0, min(5, len(labels)))) + [rng.choice(EDGES)]
        found.append((" ".join(parts), rng.choice(labels), labels))
    return found


def stem_words(seed):
    """Words of endings that the stemmer knows, and some of our own."""
    rng = random.Random(seed)
    endings = (
        "s es ies ied eed ed ing y al e ll ss sses ational tional enci anci izer bli alli entli eli"
        " ousli ization ation ator alism iveness fulness ousness aliti iviti biliti fulli logi icate"
        " ative alize iciti ical ful ness ance ence er ic able ible ant ement ment ent ion ou ism"
        " ate iti ous ive ize sion tion"
    ).split()
    found = {word.lower() for word in WORDS if word.isascii() and word.isalpha()}
    found |= set("sky skies dying lying tying news innings outings cannings howe proceed".split())
    while len(found) < 2500:
        start = "".join(rng.choice("abcdeiouylszwxt0") for _ in range(rng.randint(0, 6)))
        found.add(start + "".join(rng.choice(endings) for _ in range(rng.randint(0, 2))))
    return sorted(found - {""})


def list_cases(seed):
    """(answer, gold answers) for needles."""
    rng = random.Random(seed)
    found = []
    while len(found) < NUM_CASES:
        gold = [rng.choice([*WORDS, str(rng.randint(10, 99))]) for _ in range(rng.randint(1, 5))]
        said = [word for word in gold if rng.random() < 0.6] + [rng.choice(WORDS)]
        rng.shuffle(said)
        words = [word.upper() if rng.random() < 0.3 else word for word in said]
        found.append(
            (
                rng.choice(["", " ", "\x00", "\x07"]) + rng.choice([" ", "\x1f", ", "]).join(words),
                gold,
            )
        )
    return found


def module(name, path):
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def record_longbench(longbench, utils):
    """Cases of LongBench's scorers, from lm-eval's copy of them."""
    cases = {
        "qa_f1": [[a, g, longbench.qa_f1_score(a, g)] for a, g in pairs(1)],
        "rouge_l": [[a, g, longbench.rouge_score(a, g)] for a, g in pairs(2, 0, 30)],
        "edit_ratio": [[a, g, longbench.fuzz.ratio(a, g) / 100] for a, g in pairs(3, 0, 10)],
        "edit_similarity_lm_eval": [
            [a, g, longbench.code_sim_score(a, g)] for a, g in code_pairs(4)
        ],
        "count": [[a, g, longbench.count_score(a, g)] for a, g in number_pairs(5, "{}")],
        "retrieval": [
            [a, g, longbench.retrieval_score(a, g)] for a, g in number_pairs(6, "Paragraph {}")
        ],
        "class": [
            [a, g, labels, longbench.classification_score(a, g, all_classes=labels)]
            for a, g, labels in class_cases(7)
        ],
        "qa_f1_best": [],
        "sets": [],
    }
    rng = random.Random(8)
    single = pairs(9, 0, 8)
    for answer, gold in single:
        golds = [gold, *(rng.choice(single)[1] for _ in range(rng.randint(0, 3)))]
        rng.shuffle(golds)
        score = longbench.get_qa_f1_score({"answers": golds}, [answer])["qa_f1_score"]
        cases["qa_f1_best"].append([answer, golds, score])
    for name in ("triviaqa", "samsum", "hotpotqa", "gov_report", "passage_count"):
        for _ in range(4):
            chosen = rng.sample(single, 10)
            answers = [rng.choice(["", "\n", "\n\n"]) + a for a, _ in chosen]
            golds = [[gold, rng.choice(single)[1]] for _, gold in chosen]
            cases["sets"].append([name, answers, golds, utils.scorer(name, answers, golds, None)])
    return cases


def main():
    """Writes the file."""
    from lm_eval.tasks.ruler import common_utils
    from nltk.stem.porter import PorterStemmer
    from rouge_score.rouge_scorer import RougeScorer

    warnings.simplefilter("ignore")
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "longbench"
    longbench = module("metrics", folder / "metrics.py")  # the name under which utils imports it
    if longbench.fuzz.SequenceMatcher.__module__ != "difflib":
        raise SystemExit("fuzzywuzzy must run on difflib: remove python-Levenshtein and rapidfuzz")
    cases = record_longbench(longbench, module("longbench_utils", folder / "utils.py"))
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    stemmer = PorterStemmer()
    cases["stem"] = [[word, stemmer.stem(word)] for word in stem_words(13)]
    cases["rouge1"] = [[a, g, *scorer.score(g, a)["rouge1"]] for a, g in pairs(10)]
    cases["string_match_all"] = [
        [a, g, common_utils.string_match_all(common_utils.postprocess_pred([a]), [g])]
        for a, g in list_cases(11)
    ]
    # lm-eval's "part" is wrong for several gold answers: with one, it is what NVIDIA has.
    cases["string_match_part"] = [
        [a, g[:1], common_utils.string_match_part(common_utils.postprocess_pred([a]), [g[:1]])]
        for a, g in list_cases(12)
    ]
    packages = ("lm-eval", "rouge", "rouge-score", "nltk", "fuzzywuzzy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    content = json.dumps({"versions": versions, "cases": cases}, ensure_ascii=False).encode()
    # No time and no name inside, so that the same cases are the same bytes.
    (HERE / "cases.json.gz").write_bytes(gzip.compress(content, 9, mtime=0))
    print({name: len(rows) for name, rows in cases.items()}, len(content))


if __name__ == "__main__":
    main()
