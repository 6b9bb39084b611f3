"""Pictures of a report: sample grids of runs side by side, scaled to a budget of bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from fewstep.report.charts import short
from fewstep.report.run_folder import RunFolder

# layout of the grids of `fewstep.training.panels`: square images in ten columns, four pixels apart
COLUMNS = 10


GAP = 4


PANEL_ROWS = ("x", *(f"{row} {ratio}" for ratio in (0.3, 1, 3) for row in ("noised", "D_real", "D_fake")))


PICTURE_BYTES = 1_600_000  # all pictures together; base64 adds a third


@dataclass(frozen=True)
class _Picture:
    """An image of the page; `rows` names its rows."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    rows: tuple[str, ...] = ()


def side_by_side(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """All pictures of the page: those of each run, and a comparison of several runs in rows."""
    most = PICTURE_BYTES // (4 * len(runs) + (len(runs) > 1))
    teachers = {r.teacher_grid.tobytes(): (r.label, r.teacher_grid) for r in runs if r.teacher_grid is not None}
    together = [("teacher" if len(teachers) == 1 else f"teacher of {who}", grid) for who, grid in teachers.values()]
    together += [(run.label, run.student_grid[1]) for run in runs if run.student_grid is not None]
    rows = None
    if len(runs) > 1 and len(together) > 1:
        alt = "One row of ten samples for each run and its teacher, from the same noise and labels"
        rows = _strips(together, alt, "Each column starts from the same noise and label.", most)
    return {"rows": rows, "runs": {run.label: _pictures(run, most) for run in runs}}


def _pictures(run: RunFolder, most: int) -> dict[str, _Picture | None]:
    classes = run.provenance.get("class_names") or ()
    columns = f" Columns: {', '.join(map(str, classes[:COLUMNS]))}." if len(classes) >= COLUMNS else ""
    if prompts := run.get("evaluation", "prompts"):
        columns = f" Columns, from the left and again: {'; '.join(map(str, prompts))}."
    made: dict[str, _Picture | None] = dict.fromkeys(("teacher", "student", "development", "panel"))
    if run.teacher_grid is not None:
        caption = f"The teacher, 35 network calls per image.{columns}"
        made["teacher"] = _picture(run.teacher_grid, "Grid of the teacher's samples", caption, most)
    if run.student_grid is not None:
        images, grid = run.student_grid
        calls = f", {run.calls} network call{'s' if run.calls != 1 else ''} per image" if run.calls else ""
        who = "The model" if run.pretraining else "The student"
        caption = f"{who} at {images:,} images{calls}.{columns if run.pretraining or run.teacher_grid is None else ''}"
        made["student"] = _picture(grid, f"Grid of samples at {images:,} images", caption, most)
    drawn = run.drawn("samples" if run.pretraining else "student")
    indices = sorted({0, *(2**k for k in range(20)), len(drawn) - 1})
    chosen = [drawn[index] for index in indices if 0 <= index < len(drawn)]
    strips = [(short(images), picture) for images, path in chosen if (picture := run.open(path)) is not None]
    if len(strips) > 1:
        if run.teacher_grid is not None:
            strips.append(("teacher", run.teacher_grid))
        alt = f"Ten samples from the same noise and labels, after {', '.join(label for label, _ in strips)} images"
        made["development"] = _strips(strips, alt, "The same ten seeds after each number of images seen.", most)
    for images, path in reversed(run.drawn("panel")):
        picture = run.open(path)
        if picture is not None:
            alt = "Ten samples, and at three noise levels their noised version with both networks' predictions"
            fits = round((picture.height - GAP) / _step(picture)) == len(PANEL_ROWS)
            made["panel"] = _picture(picture, alt, f"At {images:,} images.", most, PANEL_ROWS if fits else ())
            break
    return made


def _step(grid: Image.Image) -> int:
    """Pixels from one row or column of a grid to the next."""
    return max(1, (grid.width - GAP) // COLUMNS)


def _strips(named: Sequence[tuple[str, Image.Image]], alt: str, caption: str, most: int) -> _Picture:
    """Stack the first rows of grids; omit grids whose width differs from the last one's."""
    width = named[-1][1].width
    step = _step(named[-1][1])
    kept = [(name, grid) for name, grid in named if grid.width == width and grid.height >= step + GAP]
    mode = "L" if all(grid.mode == "L" for _, grid in kept) else "RGB"
    sheet = Image.new(mode, (width, step * len(kept) + GAP), "white")
    for row, (_, grid) in enumerate(kept):
        sheet.paste(grid.crop((0, 0, width, step + GAP)), (0, row * step))
    return _picture(sheet, alt, caption, most, tuple(name for name, _ in kept))


def _picture(grid: Image.Image, alt: str, caption: str, most: int, rows: tuple[str, ...] = ()) -> _Picture:
    """Embed a grid in the page, in at most about `most` bytes."""
    data, kind = _encoded(_without_gaps(grid), most)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return _Picture(uri, grid.width, grid.height, alt, caption, rows)


def _without_gaps(grid: Image.Image) -> Image.Image:
    """Make the white lines between the images transparent, for dark pages; unchanged if there are no such lines."""
    step, mask = _step(grid), Image.new("L", grid.size, 255)
    if step <= GAP or (grid.width - GAP) % step:
        return grid
    boxes = [(x, 0, x + GAP, grid.height) for x in range(0, grid.width, step)]
    boxes += [(0, y, grid.width, min(y + GAP, grid.height)) for y in range(0, grid.height, step)]
    if any(grid.crop(box).convert("L").getextrema() != (255, 255) for box in boxes):
        return grid
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=0)
    clear = grid.copy()
    clear.putalpha(mask)
    return clear


def _encoded(picture: Image.Image, most: int) -> tuple[bytes, str]:
    """Encode as PNG if that is small enough, else as WebP, if necessary at a smaller size."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    if file.tell() <= most:
        return file.getvalue(), "png"
    full, width = picture.convert("RGBA"), min(1600, picture.width)
    for _ in range(4):
        height = max(1, round(full.height * width / full.width))
        file = io.BytesIO()
        full.resize((width, height), Image.Resampling.LANCZOS).save(file, "WEBP", quality=80)
        if file.tell() <= most:
            break
        width = max(300, int(0.9 * width * math.sqrt(most / file.tell())))
    return file.getvalue(), "webp"
