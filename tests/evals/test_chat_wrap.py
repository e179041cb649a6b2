import pytest

from freqkv_jax.evals.chat_wrap import TEMPLATES, begins_texts, prompt_tokens, wrap
from freqkv_jax.tokenizer.base import Tokenizer, add_start_and_end
from tests.tokenizer.samples import SPECIAL, TEMPLATE, tiny_backend

LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BEGIN = "<|im_start|>"


def tokenizer(adds_begin: bool = False, adds_end: bool = False, template: str | None = TEMPLATE):
    backend = tiny_backend()
    if adds_begin:
        add_start_and_end(backend, BEGIN, "<|im_end|>" if adds_end else None)
    special = {"bos_token": BEGIN, "eos_token": "<|im_end|>"}
    return Tokenizer(backend, special, chat_template=template)


def llama3_tokenizer():
    backend = tiny_backend()
    backend.add_special_tokens(LLAMA3)
    add_start_and_end(backend, LLAMA3[0], None)
    return Tokenizer(backend, {"bos_token": LLAMA3[0]})


PLAIN, BEGINS = tokenizer(), tokenizer(adds_begin=True)
BEGINS_AND_ENDS = tokenizer(adds_begin=True, adds_end=True)


def test_a_plain_prompt_is_its_text():
    assert prompt_tokens(PLAIN, "Hello there") == PLAIN.encode("Hello there")
    assert PLAIN.decode(prompt_tokens(PLAIN, "Question?", prefix=" Answer:")) == "Question? Answer:"


@pytest.mark.parametrize("template", ["none", "llama2_inst", "tokenizer"])
@pytest.mark.parametrize("which", [BEGINS, BEGINS_AND_ENDS])
def test_one_begin_token_and_no_end_token(which, template):
    ids = prompt_tokens(which, "Hello", template)
    assert ids[0] == which.bos_id
    assert ids[1] != which.bos_id
    if template != "tokenizer":  # this template ends the user's turn with that token
        assert not set(which.eos_ids) & set(ids)


def test_a_begin_token_in_the_text_is_not_doubled():
    ids = prompt_tokens(BEGINS, BEGIN + "Hello")
    assert ids == BEGINS.encode(BEGIN + "Hello")
    assert ids.count(BEGINS.bos_id) == 1


def test_a_tokenizer_that_adds_no_begin_token_gets_none():
    assert not begins_texts(PLAIN)
    assert prompt_tokens(PLAIN, "Hello", "llama2_inst") == PLAIN.encode("[INST]Hello[/INST]")
    assert not begins_texts(Tokenizer(tiny_backend(), {}))


def test_llama2_wrap_has_no_blanks_and_no_system_part():
    assert BEGINS.decode(prompt_tokens(BEGINS, "a b", "llama2_inst")) == f"{BEGIN}[INST]a b[/INST]"


def test_llama3_wrap():
    llama3 = llama3_tokenizer()
    begin, start, end, eot = LLAMA3
    ids = prompt_tokens(llama3, "Hello", "llama3", prefix="It is")
    assert llama3.decode(ids) == (
        f"{begin}{start}user{end}\n\nHello{eot}{start}assistant{end}\n\nIt is"
    )
    assert ids.count(llama3.bos_id) == 1


def test_llama3_wrap_needs_its_markers():
    with pytest.raises(ValueError, match=r"llama3 needs the tokens <\|start_header_id\|>"):
        prompt_tokens(PLAIN, "Hello", "llama3")


def test_own_template_with_an_answer_prefix():
    text = PLAIN.decode(prompt_tokens(PLAIN, "Hello", "tokenizer", prefix="The answer:"))
    assert text == ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nThe answer:")
    assert SPECIAL[1] == BEGIN  # the template's first token is the begin token: it stays one


def test_own_template_is_missing():
    with pytest.raises(ValueError, match="no chat template"):
        prompt_tokens(tokenizer(template=None), "Hello", "tokenizer")


def test_unknown_template():
    with pytest.raises(ValueError, match=f"'chatml' is not known; allowed: {', '.join(TEMPLATES)}"):
        wrap(PLAIN, "Hello", "chatml")


def test_smollm2(smollm2_gguf):
    from freqkv_jax.tokenizer import load_tokenizer

    real = load_tokenizer(smollm2_gguf)
    assert real.decode(prompt_tokens(real, "Hi")) == "Hi"
    text = real.decode(prompt_tokens(real, "Hi", "tokenizer", prefix="Yes"))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes")
