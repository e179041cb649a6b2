"""Keeps the README's table of policies; `python -m freqkv_jax.readme` writes it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from freqkv_jax.config import SHAPES
from freqkv_jax.files import write_text
from freqkv_jax.kv import POLICIES

BEGIN = "<!-- policies: begin (written by `python -m freqkv_jax.readme`) -->"
END = "<!-- policies: end -->"
# The setting for which the table gives bytes: a policy's default sizes after so many tokens.
SHAPE, DTYPE, SEEN = "llama2-7b", "bfloat16", 32768
HEADINGS = ("policy", "idea", "keeps", "bytes", "source", "file")


def policy_table() -> str:
    """The table of all registered policies, in Markdown, and the setting that its bytes mean."""
    config = SHAPES[SHAPE]
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    for name, cls in POLICIES.items():
        file = cls.__module__.replace(".", "/") + ".py"
        gib = cls().kv_bytes(config, DTYPE, SEEN) / 1024**3
        link = f"[{Path(file).name}]({file})"
        rows.append((f"`{name}`", cls.summary, cls.keeps, f"{gib:.1f} GiB", cls.source, link))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    setting = (
        f"Bytes: keys and values of one text of {SEEN:,} tokens, Llama-2-7B shape, {DTYPE}, each"
        " policy's defaults (cache size 4096)."
    )
    return "\n".join([*lines, "", setting])


def with_table(text: str) -> str:
    """`text` with what stands between the markers replaced; ValueError unless it has both, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the README must hold {BEGIN} and {END} once, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{policy_table()}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites README.md of the source tree (or the file named); the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = Path(arguments[0]) if arguments else Path(__file__).parent.parent / "README.md"
    try:
        old = path.read_text(encoding="utf-8")
        new = with_table(old)
        if new != old:
            write_text(path, new)
    except (OSError, ValueError) as error:
        print(f"freqkv_jax.readme: error: {path}: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {'rewritten' if new != old else 'is current'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
