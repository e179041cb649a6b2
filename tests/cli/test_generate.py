"""`freqkv generate` and its chat, in this process, on a tiny model."""

import io
import sys

import jax
import pytest

import freqkv_jax as fk
from freqkv_jax.cli import main
from freqkv_jax.model import fused

CACHE = ["--cache-size", "32"]
PROMPT = "Once upon a time there was a cache that was never full. "


def generate(capsys, *words):
    assert main(["generate", *words]) == 0
    return capsys.readouterr()


def test_greedy(capsys, model_folder):
    flags = ["--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "40", *CACHE]
    got = generate(capsys, *flags, "--ignore-eos")
    tokenizer = fk.load_tokenizer(model_folder)
    kv = fk.FreqKVConfig(cache_size=32)
    model, params = fk.load_pretrained(model_folder, kv=kv, dtype="float32")
    prompt = tokenizer.encode(PROMPT, add_special_tokens=True)
    (ids,) = fk.generate(model, params, [prompt], 40, stream=lambda row, new: None)
    assert len(ids) == 40
    assert got.out == tokenizer.decode(ids) + "\n"
    assert f"prompt: {len(prompt)} tokens; policy: freqkv cache_size=32" in got.err
    rounds = kv.num_compressions(len(prompt) + 40)
    assert rounds > 0 and "40 written: " in got.err and f"{rounds} compressions" in got.err


def test_on_a_mesh_of_rows(capsys, model_folder):
    """Each position of data and fsdp has the prompt; one of them is written."""
    flags = ["--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "12", *CACHE]
    one = generate(capsys, *flags, "--ignore-eos")
    two = generate(capsys, *flags, "--ignore-eos", "--mesh", "data=2,fsdp=2")
    assert two.out == one.out and "12 written: " in two.err
    sampled = generate(capsys, *flags, "--temperature", "1", "--mesh", "fsdp=2")
    assert "written: " in sampled.err


def test_int8_weights(capsys, model_folder):
    flags = ["--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "5", *CACHE]
    got = generate(capsys, *flags, "--ignore-eos", "--weights", "int8")
    tokenizer = fk.load_tokenizer(model_folder)
    kv = fk.FreqKVConfig(cache_size=32)
    model, params = fk.load_pretrained(model_folder, kv=kv, dtype="float32")
    prompt = tokenizer.encode(PROMPT, add_special_tokens=True)
    (ids,) = fk.generate(model, fk.fuse(params, weights="int8"), [prompt], 5)
    assert got.out == tokenizer.decode(ids) + "\n"


def test_weights_are_fused_where_that_pays(capsys, model_folder, monkeypatch):
    flags = ["--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "12", *CACHE]
    given = []
    fuse = fk.fuse
    monkeypatch.setattr(
        fk, "fuse", lambda params, **how: given.append(params) or fuse(params, **how)
    )
    want = generate(capsys, *flags, "--ignore-eos").out
    assert not given  # a CPU starts no kernels
    monkeypatch.setattr(fused, "pays", lambda params, batch: batch == 1)
    assert generate(capsys, *flags, "--ignore-eos").out == want
    (plain,) = given
    kernels = [leaf for leaf in jax.tree.leaves(plain["layers_0"]) if leaf.ndim > 1]
    assert len(kernels) == 7 and all(leaf.is_deleted() for leaf in kernels)


def test_words_come_as_they_are_made(model_folder, monkeypatch):
    written = []

    class Out(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Out())
    main(["generate", "--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "64",
          "--ignore-eos", *CACHE])  # fmt: skip
    assert len([text for text in written if text.strip()]) >= 3


def test_prompt_file_and_stdin(capsys, model_folder, tmp_path, monkeypatch):
    flags = ["--model", model_folder, "--max-new-tokens", "5", "--ignore-eos", *CACHE]
    want = generate(capsys, *flags, "--prompt", PROMPT).out
    (tmp_path / "p.txt").write_text(PROMPT)
    assert generate(capsys, *flags, "--prompt-file", str(tmp_path / "p.txt")).out == want
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert generate(capsys, *flags, "--prompt-file", "-").out == want
    (tmp_path / "bad").write_bytes(b"\xff")
    assert main(["generate", *flags, "--prompt-file", str(tmp_path / "bad")]) == 2
    assert "not UTF-8 text (byte 0)" in capsys.readouterr().err


def test_sampling_follows_the_seed(capsys, model_folder):
    flags = ["--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "12", *CACHE,
             "--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--ignore-eos"]  # fmt: skip
    first = generate(capsys, *flags, "--seed", "1").out
    assert generate(capsys, *flags, "--seed", "1").out == first
    assert generate(capsys, *flags, "--seed", "2").out != first


@pytest.mark.parametrize("policy", ["full", "sink_window"])
def test_policies(capsys, model_folder, policy):
    flags = ["--model", model_folder, "--prompt", PROMPT, "--max-new-tokens", "3", *CACHE]
    assert f"policy: {policy}" in generate(capsys, *flags, "--policy", policy).err


def chat(capsys, monkeypatch, text, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return generate(capsys, "--chat", *flags)


def test_chat_reads_each_turn_once(capsys, model_folder, monkeypatch, tmp_path):
    flags = ["--model", model_folder, "--max-new-tokens", "10", "--cache-size", "64"]
    saved = tmp_path / "talk"
    script = f"Hello\n\nWhat?\n/info\n/save {saved}\n/what\n/reset\n/info\n/load {saved}\n/info\n"
    got = chat(capsys, monkeypatch, script, *flags, "--system", "Be brief.")
    lines = got.err.splitlines()
    infos = [line for line in lines if "tokens read," in line]
    assert len(infos) == 2 and infos[0] == infos[1], "a saved conversation is as it was"
    assert any("nothing read yet" in line for line in lines)
    assert any("'/what' is not understood" in line for line in lines)
    # The second turn feeds what is new: its own words and the marks around them.
    tokenizer = fk.load_tokenizer(model_folder)
    turns = [line for line in lines if " tokens read in " in line]
    assert len(turns) == 2
    first, second = (int(line.split()[0].strip("[")) for line in turns)
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert first == len(tokenizer.apply_chat_template(opening, add_generation_prompt=True))
    new = "<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode(new)) - 1 <= second <= len(tokenizer.encode(new))


def test_chat_goes_on_where_it_was_saved(capsys, model_folder, monkeypatch, tmp_path):
    flags = ["--model", model_folder, "--max-new-tokens", "20", "--cache-size", "64"]
    whole = chat(capsys, monkeypatch, "Hello\nAnd then?\n", *flags).out
    saved = tmp_path / "talk"
    first = chat(capsys, monkeypatch, f"Hello\n/save {saved}\n", *flags).out
    second = chat(capsys, monkeypatch, f"/load {saved}\nAnd then?\n/exit\nnever\n", *flags).out
    assert first + second == whole


def test_chat_errors_do_not_end_it(capsys, model_folder, monkeypatch, tmp_path):
    flags = ["--model", model_folder, "--max-new-tokens", "2", "--cache-size", "64"]
    got = chat(capsys, monkeypatch, f"/load {tmp_path}/none\n/save {tmp_path}/x\nHi\n", *flags)
    assert "/load failed: " in got.err and "/save failed: nothing to save" in got.err
    assert " tokens read in " in got.err and not list(tmp_path.iterdir())


def test_chat_needs_a_template(capsys, bare_folder):
    assert main(["generate", "--chat", "--model", bare_folder]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("freqkv generate: error: ")
