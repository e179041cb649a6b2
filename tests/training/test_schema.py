"""The schema: every key checked, files and --set read, and what a resume may change."""

import copy
import dataclasses
import warnings

import pytest
import yaml

from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from freqkv_jax.training import schema
from freqkv_jax.training.yaml_file import packaged_configs, parse_yaml, read_config

MINIMAL = """\
run: {dir: out}
model: {path: tiny}
kv: {cache_size: 32}
data: {train: [{path: words, kind: generated}]}
optimizer: {learning_rate: 3e-4}
train: {steps: 30, batch_size: 8, seq_len: 64}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_types(file):
    cfg = schema.load(file)
    assert cfg.kv == FreqKVConfig(32)
    assert cfg.mesh == schema.MeshSection(1, 1, 1)
    assert cfg.optimizer.learning_rate == 3e-4  # PyYAML alone reads 3e-4 as text
    assert cfg.train.lora_targets == ("q", "k", "v", "o") and cfg.train.lora_rank == 8
    assert cfg.data.train[0].kind == "generated" and cfg.data.eval == ()
    assert cfg.checkpoint.keep == 2 and not cfg.checkpoint.keep_best
    hash(cfg)


def test_round_trip(file):
    cfg = schema.load(file, ["kv.policy=sink_window", "mesh.fsdp=-1", "train.micro_batch=2"])
    values = schema.to_dict(cfg)
    assert list(values) == [
        "run", "model", "kv", "data", "mesh", "optimizer", "train", "checkpoint", "log",
    ]  # fmt: skip
    assert schema.from_dict(parse_yaml(yaml.safe_dump(values), "again")) == cfg
    # What a run adds to its own config.yaml is no part of the config.
    assert schema.from_dict(values | {schema.RECORDED: {"jax": "0"}}) == cfg


def test_set(file):
    cfg = schema.load(
        file,
        ["train.steps=7", "data.train.0.weight=2", "train.lora_targets=[q, up]", "log.every=3",
         "run.dir='2024'", "optimizer.clip_norm=null", "train.lora_alpha=4"],
    )  # fmt: skip
    assert cfg.train.steps == 7 and cfg.log.every == 3 and cfg.run.dir == "2024"
    assert cfg.data.train[0].weight == 2.0 and cfg.train.lora_targets == ("q", "up")
    assert cfg.optimizer.clip_norm is None and cfg.train.lora_alpha == 4.0


def test_policies(file):
    # Fields that another policy has are ignored, as cache flags are on the command line.
    assert schema.load(file, ["kv.policy=full"]).kv == FullConfig()
    assert schema.load(file, ["kv.policy=sink_window"]).kv == SinkWindowConfig(32)
    assert schema.load(file, ["kv.method=fft"]).kv == FreqKVConfig(32, method="fft")


def test_a_source_may_be_a_path(file):
    cfg = schema.load(file, ["data.eval=[held_out.txt]"])
    assert cfg.data.eval == (schema.Source("held_out.txt"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trian.steps=3", "unknown section 'trian'; did you mean 'train'?"),
        ("train.stpes=3", "unknown key train.stpes; did you mean 'steps'?"),
        ("data.train=[{path: a, feild: b}]", "data.train.0.feild; did you mean 'field'?"),
        ("kv.cachesize=3", "unknown key kv.cachesize; did you mean 'cache_size'?"),
        ("kv.policy=feqkv", "kv: no policy is named 'feqkv'"),
        ("kv.cache_size=many", "kv: cache_size must be a whole number >= 1, got 'many'"),
        ("kv.retain_ratio=1", r"kv: retain_ratio must be in \[0, 1\)"),
        ("train.steps=many", "train.steps must be a whole number, got 'many'"),
        ("train.steps=1e3", "train.steps must be a whole number, got 1000.0"),
        ("train.steps=true", "train.steps must be a whole number, got True"),
        ("train.steps=null", "train.steps must be a whole number, got None"),
        ("train.steps=0", "train.steps must be at least 1, got 0"),
        ("train.micro_batch=x", "train.micro_batch must be a whole number, or null, got 'x'"),
        ("train.mode=lra", "train.mode: unknown 'lra'; did you mean 'lora'?"),
        ("train.lora_targets=[q, x]", "train.lora_targets: unknown 'x'"),
        ("train.lora_targets=[]", "train.lora_targets is empty"),
        ("train.lora_targets=q", "train.lora_targets must be a list, got 'q'"),
        ("train=5", "train must be a section with keys below it, got 5"),
        ("run.distributed=1", "run.distributed must be true or false, got 1"),
        ("run.dir=no", "run.dir must be text, got False; put it in quotes"),
        ("run.dir=''", "run.dir is empty"),
        ("model.dtype=f8", "model: dtype 'f8' is not supported"),
        ("model.attention=fast", "model: attention 'fast' is unknown"),
        (
            "kv={policy: novelty, cache_size: 999, chunk: 1}",
            "kv: rounds of 1 .* at least 8 entries",
        ),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be above 0, got nan"),
        ("optimizer.b2=1", "optimizer.b2 must be below 1, got 1.0"),
        ("data.train=[]", "data.train is empty"),
        ("data.train.0.kind=foo", r"data.train.0.kind: unknown 'foo' \(allowed: auto, text"),
        ("data.answers_only=true", "data.answers_only needs records with answers"),
        ("mesh.data=3", "train.batch_size 8 must be a multiple of mesh.data"),
        ("mesh.tensor=0", "mesh: sizes must be 1 or more"),
        ("mesh={data: -1, fsdp: -1}", "at most one of them -1"),
        ("train.micro_batch=3", "train.micro_batch 3 does not divide the 8 rows"),
        ("log.eval_every=5", "log.eval_every needs held-out data"),
        ("log.sample_every=5", "log.sample_every needs log.sample_prompt"),
        ("checkpoint.keep_best=true", "checkpoint.keep_best needs"),
        ("train", "--set 'train' is not understood"),
        ("run.dir.x=2", "run.dir is 'out', which has no keys below it"),
        ("data.train.3.path=x", "data.train is a list of 1"),
        ("run={dir: a, dir: b}", "key 'dir' was given before"),
        ("run=[", "--set run is not valid YAML"),
    ],
)
def test_refused(file, change, message):
    with pytest.raises(ValueError, match=message):
        schema.load(file, [change])


def test_token_files_may_hold_answers(file):
    cfg = schema.load(file, ["data.answers_only=true", "data.train=[{path: x, kind: tokens}]"])
    assert cfg.data.answers_only and cfg.data.train[0].kind == "tokens"


def test_missing_keys(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ValueError, match="run.dir must be given"):
        schema.load(path)
    path.write_text(MINIMAL.replace("steps: 30, batch_size: 8, ", ""))
    with pytest.raises(ValueError, match="train.steps, train.batch_size must be given"):
        schema.load(path)


def test_bad_files(tmp_path, file):
    file.write_text(MINIMAL + "run: {dir: other}\n")
    with pytest.raises(
        ValueError, match="my.yaml, line 7: key 'run' was given before, at .*line 1"
    ):
        schema.load(file)
    file.write_text("- 1")
    with pytest.raises(ValueError, match="must hold sections"):
        schema.load(file)
    with pytest.raises(FileNotFoundError, match="packaged: .*tiny"):
        schema.load("no_such_config")
    with pytest.raises(IsADirectoryError):
        schema.load(tmp_path)


def test_packaged_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "tiny" in packaged_configs()
    assert schema.load("tiny") == schema.load("tiny.yaml")
    # A file wins over the packaged config of that name.
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    assert read_config("tiny.yaml")["run"] == {"dir": "out"}


def test_warnings(file):
    with pytest.warns(UserWarning, match="nothing will be compressed"):
        schema.load(file, ["kv.cache_size=64"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schema.load(file, ["kv.policy=full"])


def test_accumulation(file):
    train = schema.load(file, ["train.micro_batch=2"]).train
    assert [train.accumulation(n) for n in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert dataclasses.replace(train, micro_batch=None).accumulation(2) == 1
    with pytest.raises(ValueError, match="multiple of mesh.data"):
        train.accumulation(16)


def test_mesh_sizes():
    assert schema.MeshSection(2, -1, 2).sizes(16) == (2, 4, 2)
    assert schema.MeshSection(1, 2, 1).sizes(16) == (1, 2, 1)
    with pytest.raises(ValueError, match="3 .* does not divide the 8 devices"):
        schema.MeshSection(-1, 3, 1).sizes(8)


def test_resume(file):
    old = schema.to_dict(schema.load(file))
    assert schema.resume_differences(old, copy.deepcopy(old)) == []
    free = [
        "run.dir=elsewhere", "mesh.data=2", "checkpoint.every=5", "log.every=9", "train.steps=31"
    ]  # fmt: skip
    new = schema.to_dict(schema.load(file, free))
    assert schema.resume_differences(old | {schema.RECORDED: {"jax": "1"}}, new) == []
    changed = [
        "train.steps=29",
        "optimizer.learning_rate=1",
        "data.train.0.path=other",
        "kv.cache_size=40",
    ]
    lines = schema.resume_differences(old, schema.to_dict(schema.load(file, changed)))
    assert lines == [
        "data.train.0.path: was 'words', now 'other'",
        "kv.cache_size: was 32, now 40",
        "optimizer.learning_rate: was 0.0003, now 1.0",
        "train.steps: was 30, now 29 (it may only rise)",
    ]
    lines = schema.resume_differences(old, schema.to_dict(schema.load(file, ["data.eval=[a]"])))
    assert "data.eval: was [], now absent" in lines
    with pytest.warns(UserWarning, match="run.seed"):
        other = schema.to_dict(schema.load(file, ["run.seed=1"]))
        assert schema.resume_differences(old, other) == []
