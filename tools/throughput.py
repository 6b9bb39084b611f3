"""Measure what an iteration costs and what each setting changes, as ratios within one run, and write docs/performance.md's tables.

    python tools/throughput.py --out docs/results/throughput.json        # a quarter of an hour or more on 2 cores; nothing else may run
    python tools/throughput.py --out docs/results/throughput.json --write docs/performance.md

Each line is `fewstep bench` in a process of its own, so that its peak memory is its own. Rounds alternate over the lines of
a network; speeds are medians, ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

BEGIN, END = "<!-- measured: made by tools/throughput.py -->", "<!-- end of measured -->"
FOUND = {
    "passes": r"passes: ([\d.]+) F measured", "forward": r"1 F = ([\d.,]+) MFLOP", "speed": r"speed: ([\d.,]+) images/s",
    "memory": r"memory: ([\d,]+) MiB", "where": r"\non (.+)",
}  # fmt: skip
SAME_LAW = ["--objective.gan-noise.low", "0", "--objective.gan-noise.high", "1"]
GAN = {"method": "dmd2", "critic_steps": 5}
EDM = "DDPM++ (749,000 parameters, 16 x 16, ten classes)"
SDXL = "tiny SDXL (the tests' UNet, 8 x 8 latents of 16 x 16 pictures)"
# network: [(line, objective, further settings, number of the line that the ratio is to)]
LINES = {
    EDM: [
        ("SiD", {"method": "sid"}, [], None),
        ("SiD, one rollout for both updates", {"method": "sid", "share_rollout": True}, [], 0),
        ("SiD, recomputing blocks", {"method": "sid"}, ["--train.gradient-checkpointing"], 0),
        ("SiD, no first moment", {"method": "sid"}, ["--optim.generator.no-first-moment", "--optim.critic.no-first-moment"], 0),
        ("SiD, one process of two threads", {"method": "sid"}, ["--processes", "1", "--train.threads", "2"], 0),
        ("SiD, bfloat16", {"method": "sid"}, ["--train.precision", "bf16"], 0),
        ("DMD2, five critic updates, GAN", GAN, [], None),
        ("the same, the head reads the denoising forward", GAN | {"share_forward": True}, [], 6),
        ("DMD2, five critic updates, no GAN", GAN | {"gan_weight": 0.0}, [], 6),
        ("DMD without regression", {"method": "dmd", "regression_weight": 0.0}, [], None),
    ],
    SDXL: [
        ("DMD2 in four steps, GAN, guidance", GAN | {"guidance": 4.0}, [], None),
        ("the same, the head reads the denoising forward", GAN | {"guidance": 4.0, "share_forward": True}, [], 0),
        ("the same as the first, adapters on one backbone", GAN | {"guidance": 4.0}, "lora", 0),
        ("the same as the first, recomputing blocks", GAN | {"guidance": 4.0}, ["--train.gradient-checkpointing"], 0),
        ("the same as the first, bfloat16", GAN | {"guidance": 4.0}, ["--train.precision", "bf16"], 0),
        ("SiD, one step", {"method": "sid"}, "one step", 0),
    ],
}  # fmt: skip


def main() -> None:
    """Measure what is missing, then write the tables if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="file of the measurements; what is in it is not measured again"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--write", type=Path, help="page whose tables to make anew, from what the file has; nothing is measured"
    )
    options = parser.parse_args()
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}\n{tables(json.loads(options.out.read_text()))}{END}{after}")
        return
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found.setdefault("command", f"python tools/throughput.py --rounds {options.rounds}")
    for network in LINES:  # kept as they are made: an interrupted measurement goes on
        if network not in (measured := found.setdefault("measured", {})):
            with tempfile.TemporaryDirectory() as folder:
                measured[network] = rounds(network, Path(folder), options.rounds)
            found.setdefault("dates", {})[network] = datetime.date.today().isoformat()
            options.out.write_text(json.dumps(found, indent=1) + "\n")


def rounds(network: str, folder: Path, count: int) -> list[list[dict]]:
    """All lines of a network, `count` times in turn."""
    place = folder / ("edm" if network == EDM else "sdxl")
    (edm if network == EDM else sdxl)(place)
    found = []
    for number in range(count):
        found.append([bench(place, *line[1:3]) for line in LINES[network]])
        print(f"{network}: round {number + 1} of {count}", flush=True)
    return found


def edm(place: Path) -> None:
    """The teacher of recipes/fashion-mnist-16 with random weights."""
    from fewstep.formats.model import save_denoiser
    from fewstep.run.settings import load_run

    place.mkdir()
    spec = load_run("fashion-mnist-16/teacher").denoiser
    torch.manual_seed(0)
    save_denoiser(place / "teacher.safetensors", spec.build(), spec, {})
    optim = {"kind": "adamw", "lr": 1e-5, "betas": [0.0, 0.999]}
    write(place, {
        "teacher": {"kind": "native", "path": str(place / "teacher.safetensors")}, "generator": {"sigmas": [2.5]},
        "data": {"kind": "fashion-mnist", "size": 16}, "optim": {"generator": optim, "critic": optim},
        "train": {"images": 64, "batch_size": 64, "precision": "fp32"},
    })  # fmt: skip


def sdxl(place: Path) -> None:
    """The tests' pipeline with eight captioned pictures."""
    import numpy as np
    from PIL import Image

    from fewstep.cli.main import main as fewstep
    from tests.support.pipelines import tiny_sdxl

    place.mkdir()
    pipeline, pictures = tiny_sdxl(place / "pipeline"), place / "pictures"
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}")
    assert fewstep(["prepare", str(pipeline), "--images", str(pictures), "--out", str(place / "prepared")]) == 0
    write(place, {
        "teacher": {"kind": "diffusers", "path": str(pipeline), "prompts": str(place / "prepared")},
        "generator": {"timesteps": [999, 749, 499, 249]}, "data": {"kind": "prepared", "path": str(place / "prepared")},
        "train": {"images": 64, "batch_size": 16, "precision": "fp32"},
    })  # fmt: skip


def write(place: Path, run: dict) -> None:
    (place / "run.yaml").write_text(yaml.safe_dump({"kind": "distill", "evaluation": {"samples": 0}} | run))


def bench(place: Path, objective: dict, settings: list[str] | str) -> dict:
    """One measurement."""
    run = yaml.safe_load((place / "run.yaml").read_text()) | {"objective": objective}
    if settings == "one step":
        run["generator"] = {"timesteps": [999]}
    if settings == "lora":
        run["generator"]["lora"] = run.setdefault("critic", {})["lora"] = {"rank": 4}
    file = place / "line.yaml"
    file.write_text(yaml.safe_dump(run))
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "bench",
        str(file),
        *(["--cycles", "1"] if place.name == "sdxl" else []),  # 160 iterations: four steps, five critic updates
        *(settings if isinstance(settings, list) else []),
    ]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if said.returncode:
        raise SystemExit(said.stderr)
    found = {name: re.search(pattern, said.stdout)[1] for name, pattern in FOUND.items()}
    return {name: value if name == "where" else float(value.replace(",", "")) for name, value in found.items()}


def tables(found: dict) -> str:
    """A table for each network."""
    from tools.check_markdown import wrap

    text = []
    for network, measured in found["measured"].items():
        lines = LINES[network]
        forward = measured[0][0]["forward"]
        text += [f"{network}: 1 F = {forward:,.1f} MFLOP an image.", ""]
        text += ["| method | passes | memory, MiB a process | images/s | speed | |", "|---|---|---|---|---|---|"]
        for number, (name, _, _, base) in enumerate(lines):
            mine = [row[number] for row in measured]
            ratio = (
                "1"
                if base is None
                else f"{statistics.median(r[number]['speed'] / r[base]['speed'] for r in measured):.2f}"
            )
            beside = "" if base is None else f"of {lines[base][0]}"
            speed = statistics.median(row["speed"] for row in mine)
            text.append(
                f"| {name} | {mine[0]['passes']:.2f} F | {max(row['memory'] for row in mine):,.0f} | {speed:,.0f} | {ratio} | {beside} |"
            )
        text += [
            "",
            f"On {measured[0][0]['where']}, unless the line says otherwise; rounds: {len(measured)}, {found['dates'][network]}.",
            "",
        ]
    return wrap("\n".join([*text, f"`{found['command']}`", ""]))


if __name__ == "__main__":
    main()
