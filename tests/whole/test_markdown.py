"""The checker of Markdown: what it finds, what it leaves alone, and that wrapping changes no word."""

import pytest

from tools import check_markdown, publish_gpu
from tools.check_markdown import too_long, wrap

LONG = "word " * 30
CELL = "x " * 61


def faults(tmp_path, capsys, text, *options):
    page = tmp_path / "page.md"
    page.write_text(text)
    code = check_markdown.main([str(page), *options])
    printed = capsys.readouterr().out
    assert code == bool(printed)
    return [line.removeprefix(f"{page}:") for line in printed.splitlines()]


@pytest.mark.parametrize(
    "text",
    [LONG, f"* {LONG}", f"# {LONG}", f"> {LONG}", f"see [the page](#page) {LONG}", f"$$\n{LONG}\n$$", f"`a` {LONG}"],
)
def test_long_lines_are_found(text):
    assert [number for number, _ in too_long(f"# page\n\n{text}\n")] == [4 if text.startswith("$$") else 3]


@pytest.mark.parametrize("text", [
    "x" * 100, f"```sh\n{LONG}\n```", f"````\n```\n{LONG}\n````", f"<!-- {LONG} -->", f"<!--\n{LONG}\n-->", f"| {LONG[:118]} |",
    f"[{LONG}](https://example.org)", f"* ![{LONG}](picture.png)", f"`{LONG.strip()}`", f"| `{CELL}` |", "x" * 120,
])  # fmt: skip
def test_what_cannot_be_broken_is_exempt(text):
    assert not list(too_long(text + "\n"))


def test_long_cells_are_found():
    ((number, fault),) = too_long(f"| a | b |\n|---|---|\n| short | {CELL} |\n")
    assert number == 3 and "at most 120 characters, got 121" in fault


def test_links_must_resolve(tmp_path, capsys):
    (tmp_path / "other.md").write_text(
        "# A `title`, with [a link](page.md)\n\n## Twice\n\n```\n# no heading\n```\n\n## Twice\n"
    )
    good = "[a](other.md) [b](other.md#a-title-with-a-link) [c](other.md#twice-1) [d](https://x.y)\n[e](#here)"
    assert not faults(tmp_path, capsys, f"## here\n\n{good}\n")
    assert not faults(tmp_path, capsys, "`[a](none.md)`\n\n```\n[a](none.md)\n```\n")
    for target in ("none.md", "other.md#no-heading", "other.md#twice-2", "#there"):
        (fault,) = faults(tmp_path, capsys, f"# here\n\none\n[two]({target})\n")
        assert fault.startswith("4: a link must name a") and fault.endswith(f"got {target}")


def test_wrapping_keeps_every_word(tmp_path, capsys):
    text = f"""# Title

short
lines stay

* {LONG}`code with   spaces of its own that stays` {LONG}
  continued (one step at 399) - 2. + 3
  1. {LONG}
> {LONG}

| {LONG[:100]} |

{"a " * 49}1. {"b " * 9}- {"c " * 50}$a + b$ {LONG}
"""
    assert faults(tmp_path, capsys, text) and not faults(tmp_path, capsys, text, "--wrap")
    wrapped = (tmp_path / "page.md").read_text()
    assert wrapped.replace(">", "").split() == text.replace(">", "").split() and wrap(wrapped) == wrapped
    assert "short\nlines stay\n" in wrapped and "code with spaces of its own that stays" in wrapped
    lines = wrapped.splitlines()
    assert [line for line in lines if line.startswith("* ")] == lines[5:6] and lines[6].startswith("  word")
    assert not any(line.strip().startswith(("1. b", "- ")) for line in lines)


def test_findings_of_a_gpu_are_published_in_short_cells_and_lines():
    common = {
        "date": "2026-12-01T10:00",
        "hardware": "a card",
        "torch": "2",
        "command": f"python benchmarks/gpu.py {LONG}",
    }
    many = {f"number {count}": 1.5 for count in range(20)}
    lines = [
        {"stage": "card", "case": "card", "name": "card", "numbers": many, "unit": "TFLOP/s", **common},
        {"stage": "card", "case": "card", "name": "card", "note": LONG, **common},
        {"stage": "sdxl", "case": "micro-batch 2", "name": "micro-batch 2", "error": f"no | room: {LONG}", **common},
    ]  # fmt: skip
    made = publish_gpu.section(lines)
    assert not list(too_long(made))
    assert made.count("number ") == 20 and made.split().count("word") == 90
    assert "* micro-batch 2: **failed**: no \\| room: word" in made and "* card: word" in made
