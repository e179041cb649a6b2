"""Entries followed through rounds: against selections made by hand, and matrices by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freqkv_jax as fk
from freqkv_jax import nvidia, reading
from freqkv_jax.evals import report_choices
from freqkv_jax.evals.choices import Choices, pack, unpack
from freqkv_jax.evals.kept import (
    Fates,
    agreement,
    by_bins,
    fates,
    kept_places,
    left_after_rounds,
    left_by_round,
    rounds_followed,
    survival,
)
from freqkv_jax.evals.report_blocks import Figure, Table
from freqkv_jax.evals.report_runs import Run
from freqkv_jax.kv import (
    H2OConfig,
    KeyNormConfig,
    PairAverageConfig,
    RandomConfig,
    SnapKVConfig,
    SpectralNoveltyConfig,
    policy_to_dict,
)
from freqkv_jax.model.llama import Llama
from freqkv_jax.spectral import lowpass_matrix
from tests.tiny import random_params, tiny_config
from tests.tolerances import BF16_PRIMITIVE_REL_L2, COMPRESS, LOGITS, assert_close

CONFIG = tiny_config(6, 2)
PARAMS = random_params(CONFIG)
TOKENS = np.random.default_rng(5).integers(0, 61, 400).astype(np.uint16)
KNORM = KeyNormConfig(40, 3, 8, 11)
SIZES = (40, 3, 8, 11)


@dataclasses.dataclass
class FakeEngine:
    model: Llama
    params: dict = dataclasses.field(default_factory=lambda: PARAMS)
    words: bool = False

    @property
    def tokenizer(self):
        if not self.words:
            raise ValueError("this model has no tokenizer")
        return Words()


class Words:
    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "tokens.bin"
    TOKENS.tofile(path)
    return str(path)


def first_layer(tokens):
    """Keys, not rotated, and values of the first layer, which no cache changes: [K, T, D]."""
    plain = Llama(CONFIG, fk.FullConfig())
    _, state = fk.prefill(plain, PARAMS, np.asarray(tokens, np.int32)[None])
    k, v = (x[0, :, : len(tokens)] for x in state.kv(0))
    return np.asarray(plain.rope.rotate_slots(k, inverse=True)), np.asarray(v)


def test_places_are_those_of_a_selection_by_hand():
    """Shortest keys of the first layer, chosen from what the round before left."""
    k, _ = first_layer(TOKENS[:100])
    lengths = np.linalg.norm(k, axis=-1)
    held = [list(range(40)) for _ in range(2)]
    for number, got in enumerate(kept_places(Llama(CONFIG, KNORM), PARAMS, TOKENS[:100])):
        assert got.shape == (2, 2, KNORM.prefix)
        for head in range(2):
            middle = held[head][3:32]
            chosen = sorted(middle, key=lambda t: lengths[head, t])[: KNORM.keep]
            kept = [0, 1, 2, *sorted(chosen), *held[head][32:]]
            assert got[0, head].tolist() == kept
            held[head] = kept + list(range(40 + 11 * number, 51 + 11 * number))
    assert number == 4


@pytest.mark.parametrize(
    "kv",
    [
        SpectralNoveltyConfig(*SIZES, bands=4),
        H2OConfig(*SIZES),
        pytest.param(RandomConfig(*SIZES), marks=pytest.mark.slow),
        pytest.param(SnapKVConfig(*SIZES, window=4, pool_size=3), marks=pytest.mark.slow),
    ],
    ids=lambda kv: kv.name,
)
def test_places_are_where_the_values_come_from(kv):
    """And watching changes nothing: the same caches in every layer."""
    text = TOKENS[: 40 + 3 * 11].astype(np.int32)
    _, v = first_layer(text)
    model = Llama(CONFIG, kv)
    *_, last = kept_places(model, PARAMS, text)
    _, state = fk.prefill(model, PARAMS, text[None])
    for head in range(2):
        got = state.kv(0)[1][0, head, : kv.prefix]
        assert_close(got, v[head][last[0, head]], LOGITS)
    assert (np.diff(last, axis=-1) > 0).all()
    alike = kv.name == "random"  # it draws alike in all layers
    assert (last[0] == last[1]).all() == alike, "layers must choose for themselves"


def test_places_are_exact_in_bfloat16():
    kv = SpectralNoveltyConfig(600, 3, 100, 200, bands=4)
    text = np.random.default_rng(1).integers(0, 61, 600 + 2 * 200).astype(np.int32)
    params = jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), PARAMS)
    *_, last = kept_places(Llama(CONFIG, kv, "bfloat16"), params, text)
    assert last[..., -100:].tolist() == np.broadcast_to(np.arange(700, 800), (2, 2, 100)).tolist()
    k, _ = first_layer(text)
    middle = last[0, 0, 3:-100]
    assert (np.diff(middle) > 0).all() and middle.max() > 256
    # What is kept is far from the mean direction: the places are those of real keys.
    unit = k[0] / np.linalg.norm(k[0], axis=-1, keepdims=True)
    alike = unit @ unit.mean(axis=0)
    assert alike[middle].mean() < alike[3:700].mean() - BF16_PRIMITIVE_REL_L2


# Two layers of two heads: 8 slots, 1 sink, 2 recents, chunk 2; 8 + 2 tokens read, three rounds.
HAND = SpectralNoveltyConfig(8, 1, 2, 2)
HELD = [
    np.array([[[0, 2, 4, 5, 6, 7], [0, 1, 2, 3, 6, 7]], [[0, 1, 2, 3, 6, 7]] * 2]),
    np.array([[[0, 4, 5, 6, 8, 9], [0, 1, 2, 3, 8, 9]], [[0, 2, 3, 7, 8, 9]] * 2]),
    np.array([[[0, 5, 6, 8, 10, 11], [0, 1, 2, 9, 10, 11]], [[0, 2, 3, 9, 10, 11]] * 2]),
]


def test_places_where_kernels_are_traced(monkeypatch):
    """They have no derivative of their own, and places are followed by one."""
    config = tiny_config(2, 2, head_dim=64, num_layers=1)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(config))
    model, found = Llama(config, KNORM, "bfloat16", "blocked"), []
    for present in (False, True):
        monkeypatch.setattr(nvidia, "present", lambda present=present: present)
        reading.compiled.cache_clear()
        found.append(list(kept_places(model, params, TOKENS[:100])))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fates_by_hand():
    found = fates(HAND, iter(HELD), 3)
    assert found.lost.shape == (2, 2, 12)
    assert found.lost[0, 0].tolist() == [0, 1, 2, 1, 3, 0, 0, 2, 0, 3, 0, 0]
    assert found.lost[0, 1].tolist() == [0, 0, 0, 3, 1, 1, 2, 2, 3, 0, 0, 0]
    for number, places in enumerate(HELD, 1):
        got = [np.flatnonzero(head).tolist() for head in found.present(number).reshape(4, 12)]
        assert got == places.reshape(4, 6).tolist()
    # 8 and 9 went through rounds 2 and 3, 10 and 11 through round 3: one of 8, 9 fell in each head.
    assert_close(survival(found), [[1, 1, 0.5]] * 2, COMPRESS)
    heads, layers, chance = agreement(found)
    # Behind the sink, before the recents: {5, 6, 8}, {1, 2, 9} and twice {2, 3, 9}, of 1 .. 9.
    assert heads.tolist() == [0, 1]
    assert_close(layers, [[0, (0 + 0.5) / 2], [(0 + 0.5) / 2, 1]], COMPRESS)
    assert chance == pytest.approx(1 / (6 - 1))
    assert (unpack(pack(found.lost), 2, 2) == found.lost).all()


def test_nothing_is_compared_where_nothing_is_chosen():
    kv = SpectralNoveltyConfig(8, 1, 2, 5)
    held = np.array([[[0, 6, 7]]])
    found = fates(kv, iter([held, np.array([[[0, 11, 12]]])]), 2)
    assert agreement(found) == (None, None, None)
    one = Fates(HAND, 3, fates(HAND, iter(HELD), 3).lost[:, :1])
    assert agreement(one).heads is None


@pytest.mark.parametrize("recent", [0, 3])
def test_what_linear_maps_leave(recent):
    kv = fk.FreqKVConfig(24, 2, recent)
    got = left_by_round(kv, 3)
    keep, chunk = kv.keep, kv.chunk
    assert got.shape == (3, 24 + 2 * chunk)
    step = np.zeros((kv.prefix, 24))
    step[:2, :2] = np.eye(2)
    step[2 : 2 + keep, 2 : 24 - recent] = lowpass_matrix(24 - 2 - recent, keep)
    step[2 + keep :, 24 - recent :] = np.eye(recent)
    weights = np.zeros((24, 24 + 2 * chunk))
    weights[:24, :24] = np.eye(24)
    for number in range(3):
        small = step @ weights
        assert_close(got[number], (small**2).sum(axis=0), COMPRESS)
        weights[:] = 0
        weights[: kv.prefix] = small
        come = np.arange(chunk)
        if number < 2:
            weights[kv.prefix + come, 24 + number * chunk + come] = 1
    # Chunks that came before the second and the third round went through two rounds and one.
    one = np.concatenate([got[1, 24 : 24 + chunk], got[2, 24 + chunk :]]).mean()
    want = [1, one, got[2, 24 : 24 + chunk].mean()]
    assert_close(left_after_rounds(kv, got), want, COMPRESS)


def test_bins_are_means():
    assert by_bins(np.arange(10.0), 4).tolist() == [0.5, 3, 6, 8.5]
    assert_close(by_bins(np.arange(8.0)[None], 4), [[0.5, 2.5, 4.5, 6.5]], COMPRESS)


def test_the_result_of_windows(data):
    task = Choices(data=data, seq_len=80, num_windows=2, bins=5, excerpt=6)
    engine = FakeEngine(Llama(CONFIG, KNORM), words=True)
    items = task.items(engine)
    assert [(item.key, item.length) for item in items] == [
        ("choices/0", 73), ("choices/327", 73)
    ]  # fmt: skip
    records = task.run(engine, items)
    got = json.loads(json.dumps(task.summarize(engine, records), allow_nan=False))
    assert (got["rounds"], got["chunk"], got["num_read"], got["chooses"]) == (3, 11, 62, True)
    assert np.shape(got["left_by_round"]) == (3, 5) and np.shape(got["left_by_layer"]) == (2, 5)
    assert np.shape(got["survival"]) == (2, 3) and np.shape(got["layers"]) == (2, 2)
    assert all(0 <= got["agreement"][name] <= 1 for name in ("heads", "layers", "chance"))
    lost = unpack(records[0]["lost_packed"], 2, 2)
    assert lost.shape == (2, 2, 62) and ((lost == 0).sum(axis=-1) == KNORM.prefix).all()
    assert_close(got["left_by_round"][2][-1], 1.0, 0.4)
    excerpt = records[0]["excerpt"]
    assert excerpt["from"] == 28 and excerpt["texts"][0] == f"w{TOKENS[28]}"
    assert_close(excerpt["left"], (lost == 0).mean(axis=(0, 1))[28:34], COMPRESS)
    assert [row[1] for row in got["table"]["rows"]] == [0, 11, 22]


@pytest.mark.parametrize("kv", [PairAverageConfig(40, 4), fk.SinkWindowConfig(40, 4)], ids=str)
def test_linear_maps_need_no_model(kv, data):
    task = Choices(data=data, seq_len=100, bins=7)
    engine = FakeEngine(Llama(CONFIG, kv), params={})
    (record,) = task.run(engine, task.items(engine))
    got = json.loads(json.dumps(task.summarize(engine, [record]), allow_nan=False))
    assert record["excerpt"] is None and not got["chooses"]
    assert got["agreement"] == {"heads": None, "layers": None, "neighbours": None, "chance": None}
    # Means of pairs: squared weights of a half. The window drops what it does not keep.
    want = 0.5 if kv.name == "pair_average" else 1.0
    assert got["survival"][0][:2] == pytest.approx([1.0, want], abs=0.3)
    assert np.shape(got["left_by_layer"]) == (1, 7)


@pytest.mark.parametrize(
    ("kv", "options", "message"),
    [
        (fk.FullConfig(), {}, "policy 'full' neither chooses entries nor maps them"),
        (KNORM, {"seq_len": 61}, "--seq-len 61 gives 1 rounds .* give at least 62"),
        (KNORM, {"seq_len": 800}, "the data holds 400 tokens, fewer than the 799"),
        (KNORM, {"bins": 41}, "--bins 41 is more than the cache's 40"),
    ],
    ids=str,
)
def test_mistakes(kv, options, message, data):
    with pytest.raises(ValueError, match=message):
        Choices(data=data, **({"seq_len": 100, "bins": 9} | options)).items(
            FakeEngine(Llama(CONFIG, kv))
        )
    with pytest.raises(ValueError, match="--excerpt must be at least 0, got -1"):
        Choices(data=data, excerpt=-1)


def test_rounds_are_those_of_whole_chunks():
    assert [rounds_followed(KNORM, length) for length in (62, 72, 73)] == [2, 2, 3]


def made(kv, data, **options):
    """A result as the report reads it."""
    engine = FakeEngine(Llama(CONFIG, kv), words=True)
    task = Choices(data=data, bins=7, **({"seq_len": 80} | options))
    records = task.run(engine, task.items(engine))
    config = {"policy": policy_to_dict(kv), "policy_name": kv.name, "model_name": "tiny"}
    about = {"task": "choices", "protocol": task.protocol, "config": config, "records": records}
    return Run("x.json", json.loads(json.dumps(about | task.summarize(engine, records))))


def test_the_report_draws_what_was_found(data):
    runs = [made(KNORM, data), made(fk.FreqKVConfig(40, 4), data, seq_len=100)]
    blocks = report_choices.section(runs)
    figures = [block for block in blocks if isinstance(block, Figure)]
    assert [figure.name for figure in figures] == [
        "choices_survival", "choices_0_map", "choices_0_text", "choices_1_map", "choices_1_text",
    ]  # fmt: skip
    assert all(figure.png.startswith(b"\x89PNG") for figure in figures)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert [row[0] for row in table.rows] == ["knorm", "freqkv"]
    assert table.rows[1][2:] == ["-"] * 4 and "-" not in table.rows[0][2:]
    assert report_choices.section([]) == blocks[:2]


def test_any_text_can_be_drawn():
    texts = ["$x", "_{\n", "\t\u4e2d\ufffd", "\u201cw\u201d", "", "long " * 30]
    assert report_choices.excerpt_figure(texts, [0, 0.2, 0.5, 1, 0, 1]).startswith(b"\x89PNG")
