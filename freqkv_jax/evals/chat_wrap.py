"""Prompts as a model reads them: chat markers around a text, and one begin token in front."""

from freqkv_jax.tokenizer import Tokenizer

TEMPLATES = ("none", "llama2_inst", "llama3", "tokenizer")
_LLAMA3_MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def prompt_tokens(
    tokenizer: Tokenizer, text: str, template: str = "none", prefix: str = ""
) -> list[int]:
    """Token ids of a whole prompt, ready to be continued.

    The begin token stands in front exactly once if the tokenizer puts one before its texts or the
    chat template writes one; no end token is added.

    Args:
      tokenizer: of the model.
      text: what the user says.
      template: "none" leaves the text as it is; "llama2_inst" is [INST]...[/INST] as LongBench
        wraps it, without blanks or a system part; "llama3" is Llama 3's user turn; "tokenizer" is
        the model's own chat template with one user message.
      prefix: how the answer begins; it follows the header of the assistant's turn.

    Raises:
      ValueError: unknown template, or one that the tokenizer has no markers for.
    """
    ids = tokenizer.encode(wrap(tokenizer, text, template) + prefix)
    begin = tokenizer.bos_id
    if begin is None or begin in ids[:1] or not begins_texts(tokenizer):
        return ids
    return [begin, *ids]


def wrap(tokenizer: Tokenizer, text: str, template: str) -> str:
    """The text within the markers of `template`; see `prompt_tokens`."""
    if template == "none":
        return text
    if template == "llama2_inst":
        return f"[INST]{text}[/INST]"
    if template == "llama3":
        _check_llama3(tokenizer)
        user, assistant = (
            f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
        )
        return f"{user}{text}<|eot_id|>{assistant}"
    if template == "tokenizer":
        return tokenizer.render_chat([{"role": "user", "content": text}])
    raise ValueError(f"chat template {template!r} is not known; allowed: {', '.join(TEMPLATES)}")


def begins_texts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer by itself puts its begin token before a text."""
    begin = tokenizer.bos_id
    return begin is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [begin]


def _check_llama3(tokenizer: Tokenizer) -> None:
    missing = [marker for marker in _LLAMA3_MARKERS if len(tokenizer.encode(marker)) != 1]
    if missing:
        raise ValueError(
            f"chat template llama3 needs the tokens {', '.join(missing)}, which this tokenizer"
            " does not have; use tokenizer (the model's own template) or none"
        )
