"""Scores of an answer against gold answers: 0 to 1, higher is better.

Our own code for the public definitions; tests/data/scorers holds what the reference packages give.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from freqkv_jax.evals.porter import stem

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DIGITS = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_ASCII_WORDS = re.compile(r"[a-z0-9]+")
_CONTROL = re.compile(r"[\x00-\x1f]")


def best(scorer: Callable[[str, str], float], answer: str, gold_answers: Sequence[str]) -> float:
    """The largest score that the answer has against one of several gold answers; 0 with none."""
    return max((scorer(answer, gold) for gold in gold_answers), default=0.0)


def first_line(answer: str) -> str:
    """The answer up to its first line break, those in front of it aside (LongBench, few-shot)."""
    return answer.lstrip("\n").split("\n")[0]


def qa_f1(answer: str, gold: str) -> float:
    """F1 of the bags of words, without case, ASCII punctuation and articles (SQuAD, LongBench)."""
    answer_words, gold_words = _plain_words(answer), _plain_words(gold)
    common = (Counter(answer_words) & Counter(gold_words)).total()
    if not common:
        return 0.0
    precision, recall = common / len(answer_words), common / len(gold_words)
    return (2 * precision * recall) / (precision + recall)


def _plain_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L F of whole summaries as the package `rouge` 1.0.1 computes it (LongBench).

    That is over sets of words: the words of all longest common subsequences of a sentence of one
    and a sentence of the other, against the distinct words of each. Sentences end at full stops;
    case and other punctuation count. 0 where one of the two has no sentence. The reference also
    gives 0 where its recursion runs too deep (sentences of some 900 words together); this does not.
    """
    answer_sentences, gold_sentences = _sentences(answer), _sentences(gold)
    if not answer_sentences or not gold_sentences:
        return 0.0
    common: set[str] = set()
    for gold_sentence in gold_sentences:
        for answer_sentence in answer_sentences:
            common |= _common_words(gold_sentence, answer_sentence)
    precision = len(common) / len({word for words in answer_sentences for word in words})
    recall = len(common) / len({word for words in gold_sentences for word in words})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # A sentence of blanks alone is one empty word, as in the reference.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(x: Sequence[str], y: Sequence[str]) -> set[str]:
    """The words of that longest common subsequence which the reference picks among equals."""
    if set(x).isdisjoint(y):
        return set()
    rows = [[0] * (len(y) + 1)]
    for word in x:
        above, row, left = rows[-1], [0], 0
        for j, other in enumerate(y):
            if word == other:
                left = above[j] + 1
            elif above[j + 1] > left:
                left = above[j + 1]
            row.append(left)
        rows.append(row)
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.add(x[i])
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


class Rouge1(NamedTuple):
    """Unigram overlap: share of the answer's words, share of the gold words, and their F."""

    precision: float
    recall: float
    f: float


def rouge1(answer: str, gold: str) -> Rouge1:
    """ROUGE-1 as the package `rouge-score` has it with its stemmer; `gold` is the reference."""
    answer_stems, gold_stems = _stems(answer), _stems(gold)
    common = (Counter(answer_stems) & Counter(gold_stems)).total()
    precision = common / max(len(answer_stems), 1)
    recall = common / max(len(gold_stems), 1)
    f = 2 * precision * recall / (precision + recall) if common else 0.0
    return Rouge1(precision, recall, f)


def _stems(text: str) -> list[str]:
    return [stem(word) if len(word) > 3 else word for word in _ASCII_WORDS.findall(text.lower())]


def class_accuracy(answer: str, gold: str, all_classes: Sequence[str]) -> float:
    """1 / number of labels that the answer contains, if the gold one is among them (LongBench).

    Labels that are proper parts of the gold label do not count. The reference drops them from the
    list that it walks through, and so passes over the label after each: done here too.
    """
    found = [label for label in all_classes if label in answer]
    place = 0
    while place < len(found):
        if found[place] in gold and found[place] != gold:
            found.remove(found[place])
        place += 1
    return 1.0 / len(found) if gold in found else 0.0


def count_share(answer: str, gold: str) -> float:
    """Share of the whole numbers in the answer that are the gold number (LongBench)."""
    numbers = _DIGITS.findall(answer)
    return numbers.count(str(gold)) / len(numbers) if numbers else 0.0


def retrieval_share(answer: str, gold: str) -> float:
    """`count_share` for a gold answer of the form "Paragraph 7" (LongBench).

    Raises:
      ValueError: the gold answer is not of that form.
    """
    number = _PARAGRAPH.search(gold)
    if number is None:
        raise ValueError(f"a gold answer like 'Paragraph 7' is needed, got {gold!r}")
    return count_share(answer, number[1])


def edit_similarity(answer: str, gold: str, skip_blank_lines: bool = False) -> float:
    """Likeness of the answer's first line of code and the gold line, in hundredths (LongBench).

    The first line is the first without a backtick, # or //, line breaks in front aside. The
    package fuzzywuzzy gives these figures where no faster library replaces difflib.

    Args:
      answer, gold: texts.
      skip_blank_lines: never takes a line of blanks for the first, as lm-eval does.
    """
    lines = answer.lstrip("\n").split("\n")
    for line in lines:
        if not (skip_blank_lines and not line.strip()) and not _is_remark(line):
            return _likeness(line, gold)
    return _likeness("", gold)


def _is_remark(line: str) -> bool:
    return "`" in line or "#" in line or "//" in line


def _likeness(a: str, b: str) -> float:
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    return int(round(100 * difflib.SequenceMatcher(None, a, b).ratio())) / 100


def ruler_clean(answer: str) -> str:
    """An answer as RULER compares it: control characters are line breaks, no blanks around."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def string_match_all(answer: str, gold_answers: Sequence[str]) -> float:
    """Share of the gold answers that the answer contains, whatever the case (RULER)."""
    return _matches(answer, gold_answers) / len(gold_answers) if gold_answers else 0.0


def string_match_part(answer: str, gold_answers: Sequence[str]) -> float:
    """1 if the answer contains any of the gold answers, whatever the case (RULER's QA).

    As NVIDIA's scorer has it. lm-eval divides by the number of gold answers, which is too low.
    """
    return float(_matches(answer, gold_answers) > 0)


def _matches(answer: str, gold_answers: Sequence[str]) -> int:
    lowered = answer.lower()
    return sum(gold.lower() in lowered for gold in gold_answers)


def word_recall(answer: str, gold: str) -> float:
    """Share of the distinct gold words, parted by blanks, that the answer has (needle heat maps).

    Case does not count, punctuation does.
    """
    expected = set(gold.lower().split())
    return len(expected.intersection(answer.lower().split())) / len(expected) if expected else 0.0
