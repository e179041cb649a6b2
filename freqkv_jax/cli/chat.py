"""A conversation in the terminal that never reads a turn twice."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from freqkv_jax.cli.common import describe_policy, note, size_text
from freqkv_jax.cli.generate import Spoken, Voice, print_now
from freqkv_jax.files import write_text

HELP = "commands: /info  /save FILE  /load FILE  /reset  /exit"
Message = dict[str, str]


@dataclasses.dataclass
class Chat:
    """A conversation and the state of the model that has read it.

    Only the tokens of a new turn are fed: what the model wrote is in the state already, in the
    very tokens in which it wrote it.
    """

    voice: Voice
    messages: list[Message]
    state: Any = None
    end_read: bool = False  # whether the state has read an end token after the last answer

    @classmethod
    def begin(cls, voice: Voice, system: str | None) -> "Chat":
        """A conversation in which nothing was said yet."""
        return cls(voice, [{"role": "system", "content": system}] if system else [])

    def ask(self, text: str, write: Any = print_now) -> Spoken:
        """Says `text` to the model and streams its answer to `write`."""
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.new_tokens(asked)
        state, self.state = self.state, None  # used up, also if this call is broken off
        spoken = self.voice.speak(ids, write, state)
        self.state = spoken.state
        self.end_read = bool(spoken.state.ended[0])
        self.messages = [*asked, {"role": "assistant", "content": spoken.text}]
        return spoken

    def new_tokens(self, asked: list[Message]) -> list[int]:
        """The tokens of the conversation `asked` that the state has not read.

        The template's rendering of what was said before ends with an end token and what follows
        it (a newline, say). The state stops at the end token, or before it if the answer was cut
        off at --max-new-tokens.
        """
        render = self.voice.tokenizer.apply_chat_template
        whole = render(asked, add_generation_prompt=True)
        if self.state is None:
            return whole
        before = render(self.messages, add_generation_prompt=False)
        stops = {*self.voice.model.config.eos_ids, *self.voice.tokenizer.eos_ids}
        ends = [place for place, token in enumerate(before) if token in stops]
        if whole[: len(before)] != before or not ends:
            # A template that rewrites earlier turns, or that marks no end: no suffix to feed.
            note("[this chat template needs the whole conversation to be read again]")
            self.state = None
            return whole
        return whole[ends[-1] + 1 if self.end_read else ends[-1] :]

    def reset(self) -> None:
        """Forgets all but the system text."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.state = None

    def save(self, path: str) -> None:
        """Writes the state to `path` and the words to `path`.json; OSError, ValueError."""
        import freqkv_jax as fk

        if self.state is None:
            raise ValueError("nothing to save: the conversation has not begun")
        fk.save_state(self.state, path, self.voice.model)
        words = {"messages": self.messages, "end_read": self.end_read}
        write_text(f"{path}.json", json.dumps(words, indent=1))

    def load(self, path: str) -> None:
        """Takes up a conversation that `save` wrote; OSError, ValueError."""
        import freqkv_jax as fk

        words = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        state = fk.load_state(path, self.voice.model)
        self.messages, self.end_read, self.state = words["messages"], words["end_read"], state

    def info(self) -> str:
        """What the state holds now."""
        kv = self.voice.model.kv
        if self.state is None:
            return f"nothing read yet; policy {describe_policy(kv)}"
        seen, fill = int(self.state.seen[0]), int(self.state.fill[0])
        return (
            f"{seen} tokens read, {fill} of {kv.capacity or self.state.slots} slots filled,"
            f" {kv.num_compressions(seen)} compressions, KV cache {size_text(self.state.nbytes)};"
            f" policy {describe_policy(kv)}"
        )


def talk(voice: Voice, system: str | None) -> int:
    """Reads turns from the terminal (or stdin) until /exit or the end of input."""
    if not voice.sampling["eos_id"]:
        note("warning: no end token to stop at; every answer runs to --max-new-tokens")
    chat = Chat.begin(voice, system)
    note(f"{HELP}; Ctrl-C breaks an answer off, Ctrl-D ends the chat")
    while (line := _read_line()) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if _command(chat, line):
                break
            continue
        try:
            spoken = chat.ask(line)
        except KeyboardInterrupt:
            note("\n[broken off; this turn is forgotten, the ones before are read again]")
            continue
        print_now("\n")
        note(spoken.summary(voice.model))
    return 0


def _read_line() -> str | None:
    try:
        import readline  # noqa: F401  (line editing in input())
    except ImportError:
        pass
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _command(chat: Chat, line: str) -> bool:
    """Obeys a line that begins with a slash; whether the chat is over."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    try:
        if name == "/exit":
            return True
        if name == "/reset":
            chat.reset()
            note("forgotten")
        elif name == "/info":
            note(chat.info())
        elif name in ("/save", "/load") and argument:
            chat.save(argument) if name == "/save" else chat.load(argument)
            note(f"{'saved to' if name == '/save' else 'loaded from'} {argument}")
        else:
            note(f"{line!r} is not understood; {HELP}")
    except (OSError, ValueError, KeyError) as error:
        note(f"{name} failed: {error}")
    return False
