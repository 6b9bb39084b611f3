"""Check the Markdown of this repository: lines of at most 100 columns, short table cells, links that resolve.

    python tools/check_markdown.py             # every page
    python tools/check_markdown.py --wrap      # wrap paragraphs with a line that is too long, then check
    python tools/check_markdown.py README.md docs/index.md

Exempt from the width are code blocks, table rows, HTML comments, and lines that hold only a link or another piece that
cannot be broken. A table cell may be longer if it is one piece of code. Links to the web are not visited.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH, CELL = 100, 120
PLACES = ("*.md", "benchmarks/**/*.md", "docs/**/*.md", "examples/**/*.md", "recipes/**/*.md", "tests/**/*.md")
CODE = r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)"
PIECE = re.compile(
    rf"(?:{CODE}|\$[^$\s](?:[^$]*[^$\s])?\$|\S)+", re.DOTALL
)  # stays on one line: code, a formula, a word
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
START = re.compile(r"( *)([*+-] |\d+[.)] |> |)")  # indent and mark of a list's item or a quotation
MARKUP = re.compile(r"[*+-]$|\d+[.)]$|#{1,6}$|>|=+$|-+$|\|")  # would mean something else at the start of a line


def main(arguments: list[str] | None = None) -> int:
    """Print each fault on a line; return 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files; default: every page of the repository")
    parser.add_argument("--wrap", action="store_true", help="wrap paragraphs that have a line of more than 100 columns")
    options = parser.parse_args(arguments)
    faults = []
    for page in options.pages or sorted({page for place in PLACES for page in ROOT.glob(place)}):
        text = page.read_text(encoding="utf-8")
        if options.wrap and (wrapped := wrap(text)) != text:
            page.write_text(text := wrapped, encoding="utf-8")
        name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
        faults += [f"{name}:{number}: {fault}" for number, fault in sorted([*too_long(text), *broken(page, text)])]
    print("\n".join(faults), end="\n" if faults else "")
    return bool(faults)


def lines_of(text: str) -> Iterator[tuple[int, str, str]]:
    """Number, kind and text of each line; a kind is text, heading, table, code, comment, formula or blank."""
    inside, end = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        kind = inside
        if inside:
            inside = "" if re.search(end, bare) else inside
        elif fence := re.match(r"`{3,}|~{3,}", bare):
            kind = inside = "code"
            end = rf"^{fence[0]}$"
        elif bare.startswith("<!--"):
            kind, end = "comment", "-->"
            inside = "" if end in bare else kind
        elif bare.startswith("$$"):
            kind, end = "formula", r"\$\$"
            inside = "" if bare.count("$$") > 1 else kind
        else:
            kind = (
                "table" if bare[:1] == "|" else "heading" if re.match(r"#{1,6} ", bare) else "text" if bare else "blank"
            )
        yield number, kind, line


def too_long(text: str) -> Iterator[tuple[int, str]]:
    """Lines and table cells of more characters than they may have."""
    for number, kind, line in lines_of(text):
        if kind == "table":
            for cell in (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))):
                if len(cell) > CELL and not re.fullmatch(CODE, cell):
                    yield number, f"a cell must have at most {CELL} characters, got {len(cell)}: {cell[:40]}..."
        elif kind in ("text", "heading", "formula") and wide(line):
            way_out = " Try: --wrap" if kind == "text" else ""
            yield number, f"a line must have at most {WIDTH} columns, got {len(line)}.{way_out}"


def wide(line: str) -> bool:
    """A line that is too long and could be broken."""
    bare = line[START.match(line).end() :].strip()
    one = re.fullmatch(r"!?\[[^\]]*\]\([^)]*\)[.,;:]?", bare) or PIECE.fullmatch(bare)
    return len(line) > WIDTH and not one


def wrap(text: str) -> str:
    """Wrap every paragraph that has a line of more than 100 columns, and leave the others as they are."""
    done: list[str] = []
    paragraph: list[str] = []
    for _, kind, line in [*lines_of(text), (0, "blank", "")]:
        if paragraph and (kind != "text" or START.match(line)[2] or paragraph[-1].endswith(("  ", "\\"))):
            done += refill(paragraph) if any(map(wide, paragraph)) else paragraph
            paragraph = []
        (paragraph if kind == "text" else done).append(line)
    return "\n".join(done)


def refill(paragraph: list[str]) -> list[str]:
    """A paragraph in lines of at most 100 columns; an item's text stays indented below its mark."""
    indent, mark = START.match(paragraph[0]).groups()
    prose = " ".join([paragraph[0][len(indent + mark) :], *(line.strip() for line in paragraph[1:])])
    pieces: list[str] = []
    for found in PIECE.finditer(prose):
        if pieces and MARKUP.match(found[0]):
            pieces[-1] += f" {found[0]}"
        else:
            pieces.append(re.sub(r"\s+", " ", found[0]))
    lines, later = [indent + mark + pieces[0]], indent + (mark if mark == "> " else " " * len(mark))
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) > WIDTH:
            lines.append(later + piece)
        else:
            lines[-1] += f" {piece}"
    return lines


def broken(page: Path, text: str) -> Iterator[tuple[int, str]]:
    """Relative links whose file or heading does not exist."""
    prose = "\n".join("" if kind in ("code", "comment") else line for _, kind, line in lines_of(text))
    prose = re.sub(CODE, lambda code: re.sub(r"[^\n]", "x", code[0]), prose, flags=re.DOTALL)
    for found in LINK.finditer(prose):
        if re.match(r"[a-z]+:", found[1]):
            continue
        number = prose.count("\n", 0, found.start()) + 1
        name, _, heading = found[1].partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield number, f"a link must name a file that exists, got {found[1]}"
        elif heading and heading not in anchors(target.read_text(encoding="utf-8")):
            yield number, f"a link must name a heading that exists, got {found[1]}"


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    found: list[str] = []
    for _, kind, line in lines_of(text):
        if kind == "heading":
            heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.strip("# ").lower())
            found.append(re.sub(r"[^\w -]", "", heading).replace(" ", "-"))
    return {f"{name}-{count}" if (count := found[:number].count(name)) else name for number, name in enumerate(found)}


if __name__ == "__main__":
    sys.exit(main())
