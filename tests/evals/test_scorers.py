"""Scorers agree exactly with the reference packages, whose figures tests/data/scorers records."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from freqkv_jax.evals import scorers
from freqkv_jax.evals.porter import stem

FILE = Path(__file__).parents[1] / "data" / "scorers" / "cases.json.gz"


@pytest.fixture(scope="module")
def cases() -> dict[str, list]:
    return json.loads(gzip.decompress(FILE.read_bytes()))["cases"]


def edit_ratio(answer: str, gold: str) -> float:
    return scorers._likeness(answer, gold)


def edit_similarity_lm_eval(answer: str, gold: str) -> float:
    # lm-eval also looks at line breaks in front, which it skips as blank lines.
    return scorers.edit_similarity(answer, gold, skip_blank_lines=True)


def qa_f1_best(answer: str, golds: list[str]) -> float:
    return scorers.best(scorers.qa_f1, answer, golds)


def string_match_all(answer: str, golds: list[str]) -> float:
    return scorers.string_match_all(scorers.ruler_clean(answer), golds)


def string_match_part(answer: str, golds: list[str]) -> float:
    return scorers.string_match_part(scorers.ruler_clean(answer), golds)


RECORDED = {
    "qa_f1": scorers.qa_f1,
    "qa_f1_best": qa_f1_best,
    "rouge_l": scorers.rouge_l,
    "class": scorers.class_accuracy,
    "edit_ratio": edit_ratio,
    "edit_similarity_lm_eval": edit_similarity_lm_eval,
    "count": scorers.count_share,
    "retrieval": scorers.retrieval_share,
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}


@pytest.mark.parametrize("name", RECORDED)
def test_agrees_exactly_with_the_reference(cases, name):
    rows = cases[name]
    scores = [RECORDED[name](*given) for *given, _ in rows]
    wrong = [
        (given, score, expected)
        for (*given, expected), score in zip(rows, scores, strict=True)
        if score != expected
    ]
    assert len(rows) >= 200
    assert len(set(scores)) > 1  # the cases tell scores apart
    assert not wrong, wrong[:3]


def test_rouge1_agrees_exactly_with_the_reference(cases):
    rows = cases["rouge1"]
    assert len(rows) >= 200
    for answer, gold, *expected in rows:
        assert list(scorers.rouge1(answer, gold)) == expected


def test_rouge1_knows_the_answer_from_the_reference():
    score = scorers.rouge1("cats", "the cats sat")
    assert (score.precision, score.recall, score.f) == (1.0, 1 / 3, 0.5)
    assert scorers.rouge1("the cats sat", "cats").precision == 1 / 3
    assert scorers.rouge1("ads", "ad").f == 0  # words of three letters are no stems yet


def test_stems_agree_exactly_with_the_reference(cases):
    rows = cases["stem"]
    assert len(rows) >= 2000
    assert [(word, stem(word)) for word, _ in rows] == [tuple(row) for row in rows]


def test_whole_data_sets_agree_with_the_reference(cases):
    by_set = {
        "triviaqa": scorers.qa_f1,
        "samsum": scorers.rouge_l,
        "hotpotqa": scorers.qa_f1,
        "gov_report": scorers.rouge_l,
        "passage_count": scorers.count_share,
    }
    for name, answers, golds, expected in cases["sets"]:
        if name in ("triviaqa", "samsum"):
            answers = [scorers.first_line(answer) for answer in answers]
        scores = [
            scorers.best(by_set[name], answer, gold)
            for answer, gold in zip(answers, golds, strict=True)
        ]
        assert round(100 * sum(scores) / len(scores), 2) == expected


def test_rouge_l_is_not_the_other_rouge_l():
    # rouge-score counts repeated words: 4 / 7.
    assert scorers.rouge_l("the cat the dog", "the cat sat") == pytest.approx(0.6667, abs=1e-4)


def test_rouge_l_of_sentences_that_the_reference_gives_up_on():
    long, other = (" ".join(["one", *(f"{c}{i}" for i in range(700))]) for c in "ab")
    assert scorers.rouge_l(long, other) == pytest.approx(1 / 701, abs=1e-7)
    if importlib.util.find_spec("rouge") is None:
        return
    from rouge import Rouge

    with pytest.raises(RecursionError):
        Rouge().get_scores([long], [other], avg=True)


def test_class_accuracy_passes_over_the_label_after_a_dropped_one():
    labels = ["Num", "ber", "Number"]
    # "Num" is dropped and "ber", which moves into its place, is passed over and stays.
    assert scorers.class_accuracy("Number", "Number", labels) == 0.5
    assert scorers.class_accuracy("Number", "Number", ["Num", "Number"]) == 1.0


def test_first_code_line_of_longbench_may_be_blank_where_that_of_lm_eval_is_not():
    answer = "\n\n# remark\n   \nreturn x"
    assert scorers.edit_similarity(answer, "return x") == 0.18
    assert scorers.edit_similarity(answer, "return x", skip_blank_lines=True) == 1.0


def test_answers_of_nothing_score_nothing():
    assert scorers.qa_f1("", "word") == 0
    assert scorers.rouge_l("", "word") == 0
    assert scorers.rouge_l("...", "word") == 0
    assert scorers.class_accuracy("", "A", ["A"]) == 0
    assert scorers.edit_similarity("", "x = 1") == 0
    assert scorers.count_share("", "3") == scorers.retrieval_share("", "Paragraph 3") == 0
    assert scorers.string_match_all("", ["x", "y"]) == scorers.string_match_part("", ["x"]) == 0
    assert scorers.word_recall("", "some words") == 0


def test_several_gold_answers():
    assert scorers.best(scorers.qa_f1, "Paris", ["London", "paris!"]) == 1
    assert scorers.best(scorers.qa_f1, "Paris", []) == 0
    assert scorers.string_match_all("A and B", ["a", "b", "c", "d"]) == 0.75  # "d" is in "and"
    assert scorers.string_match_part("only ONE", ["one", "two", "three"]) == 1


def test_word_recall_counts_distinct_words_with_their_punctuation():
    gold = "eat a sandwich and eat a day."
    assert scorers.word_recall("Eat a SANDWICH", gold) == 3 / 5
    assert scorers.word_recall("a day", gold) == 1 / 5
    assert scorers.word_recall("anything", "") == 0


def test_ruler_clean():
    assert scorers.ruler_clean(" \x00a\x07b\x1f\n ") == "a\nb"


def test_first_line():
    assert scorers.first_line("\n\nType\nQuestion: x") == "Type"
    assert scorers.first_line("\n") == ""


def test_retrieval_wants_a_paragraph():
    with pytest.raises(ValueError, match="Paragraph 7.*got '7'"):
        scorers.retrieval_share("7", "7")
