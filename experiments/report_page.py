"""A page of headings, texts, tables and pictures, as Markdown and as HTML.

The HTML needs nothing but itself and the pictures: no script, no font, no style from elsewhere.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from samjax.atomic import atomic_write

Cell = str | tuple[str, ...]  # a text, or its lines
_LONG = 60  # letters of a line in a cell that is broken in the HTML
MISSING = ("not run", "not published", "not found")  # shown paler


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of plain texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A picture by its path relative to the page, with / between folders."""

    path: str
    title: str


Block = Heading | Paragraph | Items | Table | Picture


class Footnotes:
    """Numbers for texts, in the order in which they are first named."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """The mark of a text, the same for the same text."""
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def texts(self) -> list[str]:
        """All of them behind their marks."""
        return [f"[{number}] {text}" for text, number in self._numbers.items()]


def as_bytes(count: int) -> str:
    """A number of bytes for a person."""
    mib = count / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts "r=64" before "r=128"."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", text)]


def ordered_by(order: Iterable[str]) -> Callable[[str], tuple[int, str]]:
    """A key that sorts what is in `order` as it is there, and all else behind it by name."""
    places = {name: place for place, name in enumerate(order)}
    return lambda name: (places.get(name, len(places)), name)


def write_page(out: Path, blocks: Sequence[Block]) -> Path:
    """Writes `report.md` and `report.html`; the path of the former. ``OSError`` if it cannot."""
    for name, text in (("report.html", to_html(blocks)), ("report.md", to_markdown(blocks))):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, "utf-8")
    return out / "report.md"


def placed(picture: Path, name: Path, out: Path) -> str:
    """The path of a picture relative to the page's folder `out`.

    One that lies elsewhere is copied to `out/pictures/name`, so that the folder can be moved.
    """
    inside, folder = picture.resolve(), out.resolve()
    if inside.is_relative_to(folder):
        return inside.relative_to(folder).as_posix()
    target = out / "pictures" / name / picture.name
    with atomic_write(target) as temporary:
        shutil.copyfile(picture, temporary)
    return target.relative_to(out).as_posix()


def to_markdown(blocks: Iterable[Block]) -> str:
    """The page as GitHub's Markdown; lines of a cell are parted by `<br>`."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_escaped(block.text)}")
        elif isinstance(block, Paragraph):
            parts.append(_escaped(block.text))
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {_escaped(text)}" for text in block.texts))
        elif isinstance(block, Picture):
            parts.append(f"![{_escaped(block.title)}]({quote(block.path)})")
        else:
            lines = [block.columns, ["---"] * len(block.columns), *block.rows]
            rows = [
                "| " + " | ".join("<br>".join(map(_escaped, _lines(cell))) for cell in row) + " |"
                for row in lines
            ]
            parts.append(f"**{_escaped(block.title)}**\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """The page as one HTML file with a table of contents of its headings of level 2 and 3."""
    titles = [block.text for block in blocks if isinstance(block, Heading) and block.level == 1]
    contents, body = [], []
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            text, name = html.escape(block.text), f"s{number}"
            body.append(f'<h{block.level} id="{name}">{text}</h{block.level}>')
            if block.level in (2, 3):
                contents.append(f'<li class="l{block.level}"><a href="#{name}">{text}</a></li>')
        elif isinstance(block, Paragraph):
            body.append(f"<p>{html.escape(block.text)}</p>")
        elif isinstance(block, Items):
            entries = "".join(f"<li>{html.escape(text)}</li>" for text in block.texts)
            body.append(f"<ul>{entries}</ul>")
        elif isinstance(block, Picture):
            source, title = html.escape(quote(block.path)), html.escape(block.title)
            body.append(
                f'<figure><a href="{source}"><img src="{source}" alt="{title}" loading="lazy"></a>'
                f"<figcaption>{title}</figcaption></figure>"
            )
        else:
            body.append(_html_table(block))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(titles[0] if titles else '')}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<nav><ul>{''.join(contents)}</ul></nav>\n<main>\n" + "\n".join(body) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    rows = []
    for name, *cells in table.rows:
        row = f'<th scope="row">{_html_lines(name)}</th>'
        row += "".join(f"<td>{_html_lines(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{row}</tr>")
    return (
        f'<div class="wide"><table><caption>{html.escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _html_lines(cell: Cell) -> str:
    lines = []
    for line in _lines(cell):
        text = html.escape(line)
        missing = any(words in line for words in MISSING)
        kind = "long" if len(line) > _LONG else "none" if missing else ""
        lines.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return "<br>".join(lines)


def _lines(cell: Cell) -> tuple[str, ...]:
    return (cell,) if isinstance(cell, str) else cell


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --head: #8882; --pale: #808080; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; display: flex; }
nav { flex: 0 0 15rem; max-height: 100vh; overflow: auto; position: sticky; top: 0; }
nav { padding: 1rem 0 1rem 1rem; box-sizing: border-box; font-size: 13px; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav .l2 { font-weight: 600; margin-top: .6rem; }
nav .l3 { padding-left: .8rem; }
nav a { color: inherit; text-decoration: none; }
main { flex: 1; min-width: 0; padding: 1rem 2rem 4rem; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border: 1px solid var(--line); padding: .25rem .5rem; text-align: left; }
th, td { vertical-align: top; white-space: nowrap; }
thead th { background: var(--head); }
.none { color: var(--pale); }
.long { display: inline-block; white-space: normal; width: 28rem; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
figure img { max-width: min(100%, 36rem); max-height: 28rem; background: white; }
figcaption { font-size: 12px; color: var(--pale); }
@media (max-width: 60rem) { body { display: block; } nav { position: static; } }
"""
