"""Put a pretrained teacher into the package: float16 weights and the model card.

    python tools/ship_teacher.py runs/fashion-mnist-teacher fashion-mnist \\
        --command "fewstep pretrain fashion-mnist/teacher --out runs/fashion-mnist-teacher" --reference fashion-mnist

float16 halves what every clone and wheel carries; the shipped file, not the run's, is what results are measured on.
"""

import argparse
from pathlib import Path

import torch

from fewstep.formats.model import load_denoiser, save_denoiser
from fewstep.system.tracking import read_stats

ASSETS = Path(__file__).parents[1] / "fewstep" / "assets" / "teachers"


def main() -> None:
    """Copy and round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--command", required=True, help="what made the run, for the card")
    parser.add_argument("--reference", help="shipped statistics to score against by default")
    options = parser.parse_args()
    denoiser, spec, provenance = load_denoiser(options.run / "teacher.safetensors")
    times = read_stats(options.run / "times.jsonl")
    provenance["training_seconds"] = round(sum(line.get("training_seconds", 0) for line in times))
    provenance["final_loss"] = [line["loss"] for line in read_stats(options.run / "stats.jsonl") if "loss" in line][-1]
    provenance["command"] = options.command
    provenance["licence"] = "Apache-2.0; trained on the data named, under that data's licence"
    if options.reference:
        provenance["reference"] = options.reference
    ASSETS.mkdir(parents=True, exist_ok=True)
    save_denoiser(ASSETS / f"{options.name}.safetensors", denoiser.to(torch.float16), spec, provenance)
    print(ASSETS / f"{options.name}.safetensors", (ASSETS / f"{options.name}.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
