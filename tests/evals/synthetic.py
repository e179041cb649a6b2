"""A tokenizer of words and an engine that knows what it is told, for tests of synthetic tasks."""

import re
from types import SimpleNamespace

import numpy as np

from freqkv_jax import FreqKVConfig
from freqkv_jax.evals.corpora import Source
from freqkv_jax.evals.ruler_sample import Words
from freqkv_jax.evals.task import Answer

PIECE = re.compile(r"<\|\w+\|>| ?[^\W\d_]+|\d|.", re.DOTALL)


class WordTokenizer:
    """A token is a marker, a word with the blank before it, a digit, or another character."""

    bos_id = None
    has_chat_template = True

    def __init__(self):
        self.ids, self.pieces = {}, []

    def encode(self, text, add_special_tokens=False):
        ids = []
        for piece in PIECE.findall(text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.ids[piece])
        return ids

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i] for i in ids)

    def render_chat(self, messages, add_generation_prompt=True):
        return f"<|user|>{messages[0]['content']}<|end|><|assistant|>"


class FakeEngine:
    """Answers by `reply(prompt)`; the log-likelihood of a token is -(1 + its place)."""

    def __init__(self, reply=lambda prompt: "", kv=None):
        self.tokenizer, self.reply, self.params = WordTokenizer(), reply, None
        self.model = SimpleNamespace(kv=kv or FreqKVConfig(cache_size=64, sink_size=4))

    def generate(self, prompts):
        texts = [self.reply(prompt) for prompt in prompts]
        return [Answer(text, len(self.tokenizer.encode(text)), True) for text in texts]

    def log_probs(self, contexts, continuations):
        assert all(contexts) and all(continuations)
        return [(-1.0 - np.arange(len(c)), np.ones(len(c), bool)) for c in continuations]


def gold(prompt):
    return " ".join(prompt.targets)


def few_words():
    """Words of our own making: 40 adjectives, 900 nouns, 10 verbs."""
    first, last = "bdfgklmnprstvz", ("ba", "do", "fe", "gi", "ku", "la", "mo", "ne", "pi", "ru")
    nouns = [a + "a" + b + c for a in first for b in last for c in last][:900]
    adjectives = [a + "o" + b + "ish" for a in first for b in last][:40]
    verbs = ["to" + b for b in last]
    return Words(tuple(nouns), tuple(adjectives), tuple(verbs), Source("words", "here", "0" * 64))
