"""Try a run's probe on colour pictures: a tiny world of coloured discs, a teacher, and students of it under guidance.

    python tools/colour_probe.py OUT

Prints the probe's numbers and the warnings of three students: without guidance, with strong guidance, with guidance and rescaling.
Results are in LOG.md.
"""

from __future__ import annotations

import colorsys
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.run.overriding import override
from fewstep.run.settings import load_run
from fewstep.system.tracking import read_stats

SIDE, EACH = 8, 300
TEACHER = """
kind: pretrain
data: {{kind: folder, path: {out}/pictures}}
denoiser: {{net: {{kind: unet, size: 8, channels: 3, widths: [24, 48], num_classes: 3}}}}
label_dropout: 0.2
optim: {{kind: adam, lr: 2.0e-3, betas: [0.9, 0.99], decay_from: 0.5}}
train: {{images: 96000, batch_size: 64, ema_half_life: 2000, evaluate_every: null, log_every: 6400, precision: fp32}}
evaluation: {{samples: 0}}
"""
STUDENT = """
kind: distill
teacher: {{kind: native, path: {out}/teacher}}
generator: {{sigmas: [20]}}
objective: {{method: dmd2, critic_steps: 2, gan_weight: 0}}
optim:
  generator: {{kind: adam, lr: 2.0e-4, betas: [0.0, 0.999], decay_from: 0.5}}
  critic: {{kind: adam, lr: 6.0e-4, betas: [0.0, 0.999], decay_from: 0.5}}
train: {{images: 12800, batch_size: 64, ema_half_life: 2000, evaluate_every: 6400, log_every: 3200, precision: fp32}}
evaluation: {{samples: 0}}
"""
RUNS = {
    "no guidance": [],
    "guidance 6": ["--objective.guidance", "6"],
    "guidance 6, rescale 0.7": ["--objective.guidance", "6", "--objective.guidance-rescale", "0.7"],
}


def draw(folder: Path) -> None:
    """Discs of three hues on grey, of random saturation, place and size."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    labels = []
    for number in range(3 * EACH):
        hue = (number % 3) / 3
        colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.2, 0.9), rng.uniform(0.5, 1.0)))
        centre, radius = rng.uniform(2, 5, 2), rng.uniform(1.5, 3)
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        picture = np.where(inside[..., None], colour, rng.uniform(0.3, 0.7))
        Image.fromarray((255 * picture).astype(np.uint8)).save(folder / f"{number:04d}.png")
        labels.append([f"{number:04d}.png", number % 3])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")


def main(out: Path) -> None:
    draw(out / "pictures")
    for name, text in (("teacher", TEACHER), ("student", STUDENT)):
        (out / f"{name}.yaml").write_text(text.format(out=out), encoding="utf-8")
    if not (out / "teacher").exists():
        load_run(str(out / "teacher.yaml")).trainer(out / "teacher").fit()
    for name, settings in RUNS.items():
        folder = out / name.replace(" ", "-").replace(",", "")
        override(load_run(str(out / "student.yaml")), settings).trainer(folder).fit()
        lines = list(read_stats(folder / "stats.jsonl"))
        last = [line for line in lines if "probe_chroma" in line][-1]
        numbers = {key: round(value, 2) for key, value in last.items() if key.startswith("probe_")}
        print(name, numbers, sorted({line["code"] for line in lines if "code" in line}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
