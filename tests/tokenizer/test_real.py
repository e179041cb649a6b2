"""The tokenizer of SmolLM2-135M-Instruct, from its GGUF file."""

import pytest

from freqkv_jax.tokenizer import load_tokenizer
from tests.tokenizer.samples import MESSAGES, TEXTS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_known_facts(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids) == (49152, 1, (2,))
    assert smollm2.model_max_length == 8192
    # Published ids of this tokenizer.
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert smollm2.encode("x", add_special_tokens=True) == smollm2.encode("x")


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_round_trip_and_agreement(name, smollm2, exported):
    ids = smollm2.encode(TEXTS[name])
    assert smollm2.decode(ids) == TEXTS[name] == exported.decode(ids)
    assert (
        ids
        == exported.encode(TEXTS[name], add_special_tokens=False)
        == exported.encode(TEXTS[name])
    )
    stream = smollm2.stream_decoder()
    assert "".join(stream.feed([token]) for token in ids) == TEXTS[name]


@pytest.mark.parametrize("prompt", [False, True])
def test_chat(prompt, smollm2, exported):
    for messages in (MESSAGES, MESSAGES[1:2]):
        expected = exported.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )
        assert smollm2.apply_chat_template(messages, prompt) == expected
    text = smollm2.render_chat(MESSAGES[1:2], prompt)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\n") == prompt
