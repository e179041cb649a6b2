"""RULER's questions (qa_1 of SQuAD, qa_2 of HotpotQA) among paragraphs that do not answer them.

Rules and templates are those of NVIDIA's RULER (arXiv 2404.06654, Apache-2.0).
"""

from dataclasses import dataclass, field

from freqkv_jax.evals.corpora import Question, Questions, read_hotpotqa, read_squad
from freqkv_jax.evals.ruler_sample import Dice, Sample

ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words."
)
TEMPLATE = (
    ASK + "\n\nThe following are given documents.\n\n{context}\n\n" + ASK + "\n\nQuestion: {query}"
)
PREFIX = " Answer:"
READERS = {"qa_1": read_squad, "qa_2": read_hotpotqa}


@dataclass
class Paragraphs:
    """Sample i is question i of the data set; a unit of filler is a paragraph.

    Paragraphs of the same article come first, then others at random; all are shuffled. The
    question's own are always there, so that a short target may have no room for some questions.
    """

    task: str
    dice: Dice
    corpus: str | None
    max_new_tokens: int = 32
    match_all: bool = False
    least: int = 0
    most: int | None = field(default=None, init=False)
    slack: int = 8
    data: Questions = field(init=False)

    def __post_init__(self) -> None:
        self.data = READERS[self.task](self.corpus)
        own = max(len(question.gold) for question in self.data.questions)
        self.most = len(self.data.paragraphs) - own

    def describe(self) -> list[dict[str, str]]:
        """Corpora that it reads."""
        return [self.data.source.describe()]

    def build(self, index: int, units: int) -> Sample:
        """Question number `index` with so many paragraphs besides its own."""
        if index >= len(self.data.questions):
            raise ValueError(
                f"{self.task} has {len(self.data.questions)} questions"
                f" ({self.data.source.path}); lower --num-samples"
            )
        question = self.data.questions[index]
        chosen = [*question.gold, *self._others(question, index, units)]
        self.dice(index, "order").shuffle(chosen)
        pieces, marks, done = [], {}, TEMPLATE.index("{context}")
        for number, at in enumerate(chosen, 1):
            head = f"Document {number}:\n"
            if at in question.holds:
                marks[at] = done + len(head) + _place(self.data.paragraphs[at], question)
            pieces.append(head + self.data.paragraphs[at])
            done += len(pieces[-1]) + 2
        # Not str.format: paragraphs and questions may hold braces.
        before, after = TEMPLATE.split("{context}")
        tail = after.replace("{query}", question.text)
        return Sample(
            user=before + "\n\n".join(pieces) + tail,
            prefix=PREFIX,
            targets=question.answers,
            marks=tuple(marks[at] for at in question.holds),
        )

    def _others(self, question: Question, index: int, count: int) -> list[int]:
        """Further paragraphs; a longer list begins as a shorter one does."""
        near = list(question.near)
        self.dice(index, "near").shuffle(near)
        if count <= len(near):
            return near[:count]
        rng, seen = self.dice(index, "others"), {*question.gold, *near}
        while len(near) < count:
            at = rng.randrange(len(self.data.paragraphs))
            if at not in seen:
                seen.add(at)
                near.append(at)
        return near


def _place(paragraph: str, question: Question) -> int:
    """Where an answer begins in it; 0 where none stands there word for word."""
    found = [paragraph.lower().find(answer.lower()) for answer in question.answers]
    return min((at for at in found if at >= 0), default=0)
