import datetime

import pytest

from freqkv_jax.tokenizer.chat import render
from tests.tokenizer.samples import MESSAGES, TEMPLATE

USER = [{"role": "user", "content": "Hi <b>'é'"}]

TEMPLATES = {
    "plain": TEMPLATE,
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n"
    "  {% endif %}\n{% endfor %}\n\n end\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "special": "{{ bos_token }}{{ nothing }}{% if tools %}tools{% endif %}{{ tools is none }}",
    "generation": "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "macro": "{% macro say(x) -%} [{{ x }}] {%- endmacro %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ say(m.content | trim) }}{% endfor %}"
    "{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_as_transformers_renders(name, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES],
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompt,
        bos_token="<s>",
    )
    assert render(TEMPLATES[name], MESSAGES, prompt, {"bos_token": "<s>"}) == expected[0]


def test_the_date():
    year = render("{{ strftime_now('%Y') }}", USER, False, {})
    assert abs(int(year) - datetime.date.today().year) <= 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.no.such }}", "does not take these messages"),
        ("{{ messages[0].content + 1 }}", "does not take these messages"),
        ("{{ messages[7]['role'] }}", "does not take these messages"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "does not take these messages"),
        ("a\n{% if %}", r"not valid Jinja \(line 2"),
    ],
)
def test_a_template_that_fails(template, message):
    with pytest.raises(ValueError, match=message):
        render(template, USER, True, {})


@pytest.mark.parametrize(
    "messages", ["hello", {"role": "user", "content": "x"}, ["x"], [{"content": "x"}], None]
)
def test_messages_that_are_none(messages):
    with pytest.raises(ValueError, match="message"):
        render(TEMPLATE, messages, True, {})
