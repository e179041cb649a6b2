import json

import pytest

from freqkv_jax.tokenizer import load_tokenizer
from tests.tokenizer.samples import MESSAGES, TEMPLATE, TEXTS, tiny_backend, write_directory


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def test_what_a_directory_says(tmp_path):
    write_directory(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 3]})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2, 3), 400)
    assert tokenizer.has_chat_template and tokenizer.model_max_length == 512
    backend = tiny_backend()
    for text in TEXTS.values():
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=True) == backend.encode(text).ids


def test_tokenizer_json_alone(tmp_path):
    tiny_backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("a<|im_end|>")[-1] == 2


def test_special_tokens_in_both_spellings(tmp_path):
    spelled = {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False}
    write_directory(tmp_path, {"bos_token": spelled, "eos_token": None, "pad_token": "[none]"})
    write_json(tmp_path / "special_tokens_map.json", {"sep_token": {"content": "<|eot|>"}})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 2})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>", "unk_token": "<unk>", "sep_token": "<|eot|>",
    }  # fmt: skip


def test_a_named_token_is_found_in_text(tmp_path):
    # "e" is an ordinary token of tokenizer.json; the config makes it an end.
    write_directory(tmp_path, {"eos_token": "e"})
    tokenizer = load_tokenizer(tmp_path)
    (end,) = tokenizer.eos_ids
    assert tokenizer.encode("times").count(end) == 1
    assert tokenizer.decode(tokenizer.encode("times"), skip_special_tokens=True) == "tims"


def test_added_tokens_of_the_config(tmp_path):
    listed = {
        "400": {"content": "<|new|>", "special": True},
        "401": {"content": "<kept>", "special": False},
    }
    write_directory(tmp_path, {"added_tokens_decoder": listed})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|new|><kept>") == [400, 401] and tokenizer.vocab_size == 402
    assert tokenizer.decode([400, 401], skip_special_tokens=True) == "<kept>"
    write_directory(tmp_path, {"added_tokens_decoder": {"7": listed["400"]}})
    with pytest.raises(ValueError, match=r"'<\|new\|>' the id 7, but by tokenizer.json it is 400"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("begin", "end"), [(True, False), (True, True), (False, False)])
def test_add_bos_token(tmp_path, begin, end):
    write_directory(tmp_path, {"add_bos_token": begin, "add_eos_token": end})
    tokenizer = load_tokenizer(tmp_path)
    plain = tokenizer.encode("hello")
    whole = tokenizer.encode("hello", add_special_tokens=True)
    assert whole == [1] * begin + plain + [2] * end
    assert tokenizer.apply_chat_template(MESSAGES)[:2].count(1) == 1  # no second bos


def test_the_post_processor_goes_before_add_bos_token(tmp_path):
    folder = write_directory(tmp_path / "a", {"add_bos_token": True})
    load_tokenizer(folder).save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    write_json(tmp_path / "b" / "tokenizer_config.json", config | {"add_bos_token": False})
    assert load_tokenizer(tmp_path / "b").encode("x", add_special_tokens=True)[0] == 1


def test_truncation_and_padding_are_lifted(tmp_path):
    backend = tiny_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXTS["code"])) == TEXTS["code"]
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("where", ["jinja", "list", "json", "list without default"])
def test_where_a_template_may_stand(tmp_path, where):
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    if where == "jinja":
        write_directory(tmp_path, {"chat_template": "x"})
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    elif where == "json":
        write_directory(tmp_path, {"chat_template": None})
        write_json(tmp_path / "chat_template.json", {"chat_template": TEMPLATE})
    else:
        write_directory(tmp_path, {"chat_template": listed[: 2 if where == "list" else 1]})
    expected = None if where == "list without default" else TEMPLATE
    assert load_tokenizer(tmp_path).chat_template == expected


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"as tokenizer.model only.*AutoTokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_truncated_tokenizer_json(tmp_path, keep):
    path = write_directory(tmp_path) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"tokenizer\.json is truncated, corrupted"):
        load_tokenizer(tmp_path)


def test_merges_that_the_vocabulary_lacks(tmp_path):
    path = write_directory(tmp_path) / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["merges"].append(["zz", "top"])
    write_json(path, spec)
    with pytest.raises(ValueError, match=r"tokenizer\.json is truncated, corrupted.*`zz`"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config"])
@pytest.mark.parametrize("text", ['{"a": ', "[1]", "\x80"])
def test_damaged_companions(tmp_path, name, text):
    write_directory(tmp_path)
    (tmp_path / f"{name}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}\.json"):
        load_tokenizer(tmp_path)


def test_an_end_token_of_another_model(tmp_path):
    write_directory(tmp_path, {"eos_token": "</s>"})
    with pytest.raises(ValueError, match=r"names eos_token '</s>', which is not in the vocab"):
        load_tokenizer(tmp_path)
    write_directory(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": ["x"]})
    with pytest.raises(ValueError, match=r"end tokens must be token ids, got \['x'\]"):
        load_tokenizer(tmp_path)
