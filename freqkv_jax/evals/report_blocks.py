"""What a report is made of, and how it becomes Markdown and one HTML page."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2em 0 .6em; } h1 { margin-top: 0; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: left; }
.n { text-align: right; } th { border-bottom-color: #888; }
.scroll { overflow-x: auto; } .caption { color: #555; font-size: .92em; margin: .2em 0; }
figure { margin: 1.2em 0; } img { max-width: 100%; height: auto; } code { font-size: .92em; }
@media print { body { max-width: none; } }"""


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    level: int
    text: str


@dataclass(frozen=True)
class Lines:
    """Sentences, as a list; `short` are those of them that a summary repeats."""

    items: Sequence[str]
    short: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Paragraph:
    """Text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text; the caption says what they are, notes what marks in them mean."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Figure:
    """A picture: the name of its file without ending, what it shows, and its bytes."""

    name: str
    caption: str
    png: bytes = field(repr=False)


Block = Heading | Lines | Paragraph | Table | Figure


def to_markdown(blocks: Sequence[Block], figures: str = "figures") -> str:
    """GitHub's Markdown; pictures are files in the folder `figures` beside it."""
    return "\n\n".join(_markdown(block, figures) for block in blocks) + "\n"


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Lines(items, _):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Figure(name, caption, _):
            return f"![{_plain(caption)}]({figures}/{name}.png)\n\n*{_plain(caption)}*"
        case Table(columns, rows, caption, notes):
            lines = [f"{_plain(caption)}:", ""] if caption else []
            lines.append(_line(columns))
            aligned = ("---:" if right else "---" for right in numeric(block))
            lines.append("|" + "|".join(aligned) + "|")
            lines += [_line(row) for row in rows]
            if notes:
                lines += ["", "; ".join(map(_plain, notes)) + "."]
            return "\n".join(lines)


def numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and are set to the right."""
    return [
        all(row[place][0] in "+-0123456789." for row in table.rows if row[place])
        for place in range(len(table.columns))
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """One line in which nothing is markup: names come from files."""
    text = " ".join(str(text).split())
    for mark in "\\`*_<[":
        text = text.replace(mark, "\\" + mark)
    return text


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file."""
    body = "\n".join(map(_html, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Lines(items, _):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Figure(name, caption, png):
            data = base64.b64encode(png).decode()
            return (
                f'<figure id="{escape(name)}"><img alt="{escape(caption)}"'
                f' src="data:image/png;base64,{data}">'
                f'<figcaption class="caption">{escape(caption)}</figcaption></figure>'
            )
        case Table(columns, rows, caption, notes):
            marks = [' class="n"' if right else "" for right in numeric(block)]
            head = "".join(
                f'<th scope="col"{mark}>{escape(name)}</th>'
                for name, mark in zip(columns, marks, strict=True)
            )
            lines = (
                "".join(
                    f"<td{mark}>{escape(cell)}</td>" for cell, mark in zip(row, marks, strict=True)
                )
                for row in rows
            )
            parts = [f'<p class="caption">{escape(caption)}</p>'] if caption else []
            parts.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
                + "".join(f"<tr>{line}</tr>" for line in lines)
                + "</tbody></table></div>"
            )
            if notes:
                parts.append(f'<p class="caption">{escape("; ".join(notes))}.</p>')
            return "\n".join(parts)


def bytes_text(num_bytes: float | None, figures: int = 4) -> str:
    """94371840 -> "90 MiB"."""
    if num_bytes is None:
        return "-"
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    # Never 1.02e+03: what is below 1024 may have four digits before the point.
    return f"{size:.{4 if size >= 1000 else figures}g} {unit}"


def length_text(tokens: int) -> str:
    """16384 -> "16K"; 1000 -> "1,000"."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else f"{tokens:,}"
