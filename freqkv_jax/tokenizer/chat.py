"""Chat templates: Jinja programs that come with a model, rendered in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """The text of a conversation, by the rules that transformers renders templates with.

    Raises:
      ValueError: the messages are malformed, or the template is, or it refuses them.
    """
    import jinja2

    _check_messages(messages)
    try:
        return _compiled(template).render(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message})"
        ) from error
    except Exception as error:  # a template is a program: it can fail in every way
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"the model's chat template does not take these messages: {reason}"
            f" (roles: {', '.join(str(message['role']) for message in messages)})"
        ) from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            "messages must be a list such as [{'role': 'user', 'content': 'Hello'}],"
            f" got {type(messages).__name__}"
        )
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {place} must be a dict with a 'role' (str) and a 'content',"
                f" got {message!r}"
            )


@cache
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@cache
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the model's words for training; its body renders as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
