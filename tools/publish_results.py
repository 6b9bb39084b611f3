"""Put finished runs into the documentation: their logs, the table, the figure and a sheet of samples.

    fewstep eval runs/fashion-mnist-sid runs/fashion-mnist-dmd2 --evaluations 35,18,9,5,1 --out docs/results/fashion-mnist.json
    python tools/publish_results.py runs/fashion-mnist-sid runs/fashion-mnist-dmd2

The logs are copied to docs/results/NAME, from which `fewstep report docs/results/*` makes its page. The table and the
figure are made anew from all logs that are there, so that runs can be published one by one. A row is only written for
weights that a copied log ends with. Runs of another teacher are a set of their own, in docs/results/SET, told by their name:
docs/results/fashion-mnist-16/fashion-mnist-16-sid, with docs/results/fashion-mnist-16/fashion-mnist-16.json. Text-to-image runs, which
must still be in `runs/`, are drawn for the prompts of PROMPTS besides.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw

from fewstep.cli.main import main as cli
from fewstep.report.charts import duration, save_charts
from fewstep.report.curves import fid_curves
from fewstep.report.pictures import COLUMNS, GAP
from fewstep.report.run_folder import RunFolder, is_teacher, teacher_row
from fewstep.system.pictures import grid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.check_markdown import wrap  # noqa: E402

RESULTS = ROOT / "docs" / "results"
LOGS = ("run.yaml", "stats.jsonl", "times.jsonl", "student.json")
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
SETS = {  # the most special name first
    "fashion-mnist-16": RESULTS / "fashion-mnist-16",
    "fashion-mnist": RESULTS,
    "emoji": RESULTS / "emoji",
}
PROMPTS = {
    "emoji": [
        "rose",
        "koala",
        "noto octopus",
        "twemoji slice of pizza",
        "hot dog on a black background",
        "elephant on an orange background",
    ]
}
SEEDS = 10  # of each prompt
BEGIN, END = "<!-- results of {}: made by tools/publish_results.py -->", "<!-- end of results -->"


def main() -> None:
    """Copy logs, then draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders to add or to bring up to date")
    for path in parser.parse_args().runs:
        copy(path)
    for name, place in SETS.items():
        if (place / f"{name}.json").exists():
            publish(name, place)


def publish(name: str, place: Path) -> None:
    """Sheet, figure and table of a set, in the pages that have room for them."""
    folders = sorted(path.parent for path in place.glob("*/run.yaml"))
    runs = [RunFolder(folder, folder.name, look) for look, folder in enumerate(folders)]
    rows = json.loads((place / f"{name}.json").read_text())["rows"]
    teacher = teacher_row(rows)
    charts = fid_curves(folders)
    for chart in charts:
        chart.lines = [(f"teacher, {teacher['calls']} calls", teacher["fid"])]
    save_charts(charts, place / "fid.png")
    if name not in PROMPTS:
        sheet(runs).save(place / "samples.png", optimize=True)
    elif all((ROOT / "runs" / run.label).is_dir() for run in runs):
        prompt_sheet(runs, teacher, PROMPTS[name]).save(place / "prompts.png", optimize=True)
    limits = json.loads((place / "limits.json").read_text()) if (place / "limits.json").exists() else {}
    begin = BEGIN.format(name)
    for page in (README, PAGE):
        before, found, rest = page.read_text().partition(begin)
        if found:
            _, _, after = rest.partition(END)
            base = str(place.relative_to(page.parent))
            page.write_text(f"{before}{begin}\n{body(runs, rows, limits, base)}{END}{after}")


def copy(run: Path) -> None:
    """Logs and last pictures of a run folder."""
    folder = next(place for name, place in SETS.items() if run.name.startswith(name)) / run.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    for name in LOGS:
        shutil.copy(run / name, folder / name)
    for name in ("student", "panel"):
        _, last = RunFolder(run, run.name, 0).drawn(name)[-1]
        shutil.copy(last, folder / "pictures")
    shutil.copy(run / "pictures" / "teacher.png", folder / "pictures")


def body(runs: list[RunFolder], rows: list[dict], limits: dict[str, dict], base: str) -> str:
    """The part of a page that is made: sheet, table, figure."""
    judged = ["clip_score", "retrieval", "diversity", "chroma"] if "retrieval" in rows[0] else []
    # a small world's pictures are near copies of each other, where precision and recall by neighbours say nothing
    shown = judged or ["precision", "recall"]
    names = ["FID", *(name.replace("clip_", "CLIP ") for name in shown)]
    table = [
        f"| model | network calls | {' | '.join(names)} | images/s | images seen | training time |",
        f"|{'---|' * (len(names) + 5)}",
    ]
    for name, row in limits.items():  # what real pictures score
        scores = " | ".join(f"{row[key]:.{2 if key == 'fid' else 3}f}" for key in ("fid", *shown))
        table.append(f"| {name} | | {scores} | | | |")
    for row in sorted(rows, key=lambda row: (not is_teacher(row), -row["calls"], row["fid"])):
        run = next((run for run in runs if run.header["sha256"] == row["sha256"]), None)
        if run is not None:
            name, cost = f"[{run.label}]({base}/{run.label})", f"{run.images:,} | {duration(run.training_seconds)}"
        elif is_teacher(row):
            name = f"teacher ({row['name'].split(',')[0]}{', guided' if row.get('guidance') else ''})"
            cost = " | "
        else:
            continue  # weights whose log is not published
        scores = [f"{row['fid']:.2f}", *(f"{row[key]:.3f}" for key in shown)]
        numbers = f"{' | '.join(scores)} | {row['images_per_second']:,.0f}"
        table.append(f"| {name} | {row['calls']} | {numbers} | {cost} |")
    hardware = sorted({f"{row['hardware']} ({row['precision_of_networks']})" for row in rows})
    students = ", ".join(f"{run.label} ({run.calls})" for run in runs)
    if judged:
        picture = [
            f"![Pictures of the teacher and of its students for the same prompts]({base}/prompts.png)", "",
            f"Rows under a prompt, from the same seeds: the guided teacher, then {students}.", "",
        ]  # fmt: skip
    else:
        picture = [
            f"![Samples of the teacher and of its students from the same seeds and labels]({base}/samples.png)", "",
            f"Two rows each, the same labels in each column: the teacher at 35 network calls, then {students}.", "",
        ]  # fmt: skip
    return wrap("\n".join([
        *picture,
        *table, "",
        f"{rows[0]['n']:,} samples of seeds {rows[0]['seeds']}, protocol `{rows[0]['protocol']}`, evaluated on "
        f"{'; '.join(hardware)}, {max(row['date'] for row in rows)}. Images/s count sampling alone.", "",
        f"![FID against images seen and against training time]({base}/fid.png)", "",
    ]))  # fmt: skip


def sheet(runs: list[RunFolder]) -> Image.Image:
    """Two rows of samples of the teacher, then of each run."""
    grids = [runs[0].teacher_grid, *(run.student_grid[1] for run in runs)]
    width = grids[0].width
    step = (width - GAP) // COLUMNS
    made = Image.new(grids[0].mode, (width, (2 * step + 2 * GAP) * len(grids) - GAP), "white")
    for index, drawn in enumerate(grids):
        made.paste(drawn.crop((0, 0, width, 2 * step + GAP)), (0, (2 * step + 2 * GAP) * index))
    larger = max(1, 700 // made.width)  # small images are shown as squares of pixels
    return made.resize((larger * made.width, larger * made.height), Image.Resampling.NEAREST)


def prompt_sheet(runs: list[RunFolder], teacher: dict, prompts: list[str]) -> Image.Image:
    """Draw a row of the teacher and one of each run for each prompt, from the same seeds."""
    folder = ROOT / "runs" / f"{runs[0].label.split('-')[0]}-teacher" / "pipeline"
    models = [(folder, ["--evaluations", str(teacher["calls"]), "--guidance", str(teacher["guidance"])])]
    models += [(ROOT / "runs" / run.label, []) for run in runs]
    labels = [str(index) for index in range(len(prompts)) for _ in range(SEEDS)]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    drawn = []
    with TemporaryDirectory() as scratch:
        for model, options in models:
            out = Path(scratch) / "samples.npz"
            seeds = ["--seeds", f"0-{len(labels) - 1}", "--classes", ",".join(labels)]
            assert cli.main(["sample", str(model), *asked, *seeds, *options, "--out", str(out)]) == 0
            drawn.append(
                torch.from_numpy(np.load(out)["images"]).permute(0, 3, 1, 2).unflatten(0, (len(prompts), SEEDS))
            )
    blocks = []
    for index, prompt in enumerate(prompts):
        rows = grid(torch.cat([images[index] for images in drawn]), SEEDS, scale=2)
        block = Image.new("RGB", (rows.width, rows.height + 16), "white")
        ImageDraw.Draw(block).text((4, 2), prompt, fill="black")
        block.paste(rows, (0, 16))
        blocks.append(block)
    width, height = blocks[0].size
    made = Image.new("RGB", (2 * width + 16, height * -(-len(blocks) // 2)), "white")
    for index, block in enumerate(blocks):
        made.paste(block, (index % 2 * (width + 16), index // 2 * height))
    return made


if __name__ == "__main__":
    main()
