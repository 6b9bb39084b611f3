"""Every shipped recipe, but those that differ from another in numbers alone, walked to its end on a tiny teacher of its kind, and the README's lines as they are typed.

A recipe's own record is run: batch and micro-batch, precision, optimizers, adapters, gradient checkpointing, schedule and
steps of the student, method. Replaced are what is large (teacher, images, prompts, pairs), how long and how often, and what
needs a download (Inception and LPIPS). Each way ends with sampling, scoring, the report and, for text-to-image, the export.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.support.places import ROOT

pytest.importorskip("diffusers")

import fewstep.run.specs
import fewstep.training.panels
from fewstep.cli.main import main
from fewstep.diffusion.generator import Generator
from fewstep.formats.model import DenoiserSpec, save_denoiser, save_generator
from fewstep.networks import UNetSpec
from fewstep.run.recipes import list_recipes
from fewstep.run.settings import load_run
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.tracking import read_stats
from fewstep.system.weights import load_weights
from tests.support.families import NAMES as FAMILIES
from tests.support.families import prepared_family
from tests.support.networks import randomised
from tests.support.pipelines import prepared as tiny_flow
from tests.support.pipelines import tiny_clip, tiny_sd15, tiny_sdxl
from tests.support.recipes import Distance, PictureDistance, tiny

pytestmark = pytest.mark.slow  # each is short, together they are long

FLOW = {
    "sd35": "sd35", "flux": "flux", "flux2": "flux2", "flux2/dev-lora-24gb": "flux2-dev", "z-image": "z-image",
    "qwen-image": "qwen-image", "longcat": "longcat",
}  # fmt: skip
PROMPTS = ["a cat", "a dog", "a house", "a tree"]
MOST = 4  # images of a micro-batch: a recipe with more has so many here
FEW = 2  # micro-batches of an update, where a recipe has more than eight


def group(name: str) -> str:
    return name.split("/")[0]


def grey(name: str) -> int:
    """Pixels on a side of our own grey images."""
    return 16 if group(name) == "fashion-mnist-16" else 28


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny teachers, images, prompts and a judge, each made when a recipe first asks for it."""
    return Place(tmp_path_factory.mktemp("place"))


class Place:
    """What the recipes are walked on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def once(self, name: str, make) -> Path:
        if name not in self.made:
            self.made[name] = make(self.root / name)
        return self.made[name]

    def images(self, channels: int, side: int) -> Path:
        """Twenty pictures with captions, and with labels, one of them the last of ImageNet's."""

        def make(folder: Path) -> Path:
            draw = np.random.default_rng(0)
            folder.mkdir()
            labels = []
            for number in range(20):
                pixels = draw.integers(0, 256, (side, side, 3) if channels == 3 else (side, side), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
                (folder / f"{number:02}.txt").write_text(PROMPTS[number % 4])
                labels.append([f"{number:02}.png", 999 if number == 19 and channels == 3 else number % 10])
            (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
            return folder

        return self.once(f"images-{channels}-{side}", make)

    def prompts(self) -> Path:
        def make(file: Path) -> Path:
            file.write_text("\n".join(PROMPTS) + "\n")
            return file

        return self.once("prompts.txt", make)

    def pipeline(self, kind: str) -> Path:
        return self.once(kind, {"sdxl": tiny_sdxl, "sd15": tiny_sd15}[kind])

    def prepared(self, kind: str) -> Path:
        """Prompts and captioned images, by the command."""

        def make(folder: Path) -> Path:
            images = ["--images", str(self.images(3, 16))]
            command = ["prepare", str(self.pipeline(kind)), "--prompts", str(self.prompts()), *images]
            assert main([*command, "--out", str(folder)]) == 0
            return folder

        return self.once(f"{kind}-prepared", make)

    def flow(self, kind: str) -> dict[str, str]:
        """A transformer's pipeline, and conditions of two prompts (SD3, FLUX.1: as text encoders would have made them)."""

        def make(folder: Path) -> Path:
            (prepared_family if kind in FAMILIES else tiny_flow)(kind, folder)
            return folder

        folder = self.once(f"{kind}-flow", make)
        return {"path": str(folder / kind), "prompts": str(folder / "prompts")}

    def own_teacher(self) -> Path:
        """The run of a teacher of someone's own pictures, by the command: its folder also says which pictures those were."""

        def make(folder: Path) -> Path:
            file = self.root / "own-teacher.yaml"
            file.write_text(yaml.safe_dump(walked("own/teacher", self), sort_keys=False))
            assert main(["pretrain", str(file), "--out", str(folder), "--processes", "1"]) == 0
            return folder

        return self.once("own-teacher", make)

    def network(self, name: str) -> Path:
        """A teacher of EDM's networks, or of our own for grey images."""

        def make(folder: Path) -> Path:
            folder.mkdir()
            card = {}
            if group(name).startswith("fashion-mnist"):
                side = grey(name)
                spec = DenoiserSpec(net=UNetSpec(size=side, channels=1, widths=(8, 8), num_classes=10))
                card = {"reference": "fashion-mnist"} if side == 28 else {}
            else:
                spec = tiny(name)
            torch.manual_seed(0)
            denoiser = randomised(spec)
            save_denoiser(folder / "teacher.safetensors", denoiser, spec, card)
            save_generator(folder / "student.safetensors", Generator(denoiser, [0.5]), spec, {})
            return folder

        return self.once(f"network-{group(name)}", make)


def scaled(train: dict) -> dict:
    """The recipe's micro-batch and number of them where these are small, else `MOST` and `FEW`."""
    micro = min(train["micro_batch"] or train["batch_size"], MOST)
    count = train["batch_size"] // (train["micro_batch"] or train["batch_size"])
    batch = micro * (count if count <= 8 else FEW)
    return {"batch_size": batch, "micro_batch": micro if train["micro_batch"] else None}


def walked(name: str, place: Place) -> dict:
    """The recipe's record with what is large replaced."""
    run = load_run(name)
    record = run.model_dump(mode="json")
    train = scaled(record["train"])
    # the generator's turns are the first update, when the two scores are equal still, and the last
    updates = 1 + getattr(getattr(run, "objective", None), "critic_steps", 1)
    batch = train["batch_size"]
    often = {"log_every": batch, "checkpoint_every": batch * (updates - 1), "evaluate_every": batch * updates}
    record["train"] |= train | often | {"images": batch * updates, "device": "cpu", "threads": 1}
    record["train"]["swap_blocks"] = min(2, record["train"]["swap_blocks"])  # tiny networks have few
    record["train"]["mesh"] = {}  # a mesh is for several processes: tests/test_shard.py
    record["evaluation"] |= {"samples": 4, "batch": 4}
    side, channels = 16, 3
    if group(name) == "mixture":
        record["evaluation"]["samples"] = 0
        return record
    if group(name) in ("sdxl", "sd15", "emoji"):
        kind = "sd15" if group(name) == "sd15" else "sdxl"
        teacher = record["pipeline" if run.kind == "pretrain" else "teacher"]
        teacher |= {"path": str(place.pipeline(kind)), "prompts": str(place.prepared(kind)), "tiny_vae": None}
        if record["data"]:
            record["data"]["path"] = str(place.prepared(kind))
    elif group(name) in FLOW:
        record["teacher"] |= place.flow(FLOW.get(name, FLOW[group(name)])) | {
            "resolution": None if group(name) == "sd35" else 16
        }
    elif group(name) == "digits":
        side, channels = 8, 1
    elif name == "own/teacher":
        record["data"] |= {"path": str(place.images(channels, side)), "size": side}
        record["denoiser"]["net"] |= {"widths": [8, 8]}
    elif group(name) == "own":
        record["teacher"]["path"] = str(place.own_teacher())
    elif run.kind == "pretrain":
        side, channels = grey(name), 1
        small = {"widths": [8, 8]} if record["denoiser"]["net"]["kind"] == "unet" else {"model_channels": 8}
        record["denoiser"]["net"] |= small
    else:
        ours = group(name).startswith("fashion-mnist")
        side, channels = (grey(name), 1) if ours else (8, 3)
        record["teacher"]["path"] = str(place.network(name) / "teacher.safetensors")
        if record["start_from"]:
            record["start_from"] = str(place.network(name) / "student.safetensors")
    if group(name) != "own" and record["data"] and record["data"]["kind"] not in ("prepared", "digits"):
        record["data"] = {"kind": "folder", "path": str(place.images(channels, side)), "channels": channels}
    if channels == 3:
        record["evaluation"]["reference"] = str(place.images(3, side))
        if record["evaluation"]["clip"]:
            record["evaluation"]["clip"] = str(place.once("judge", tiny_clip))
        else:
            record["evaluation"]["extractor"] = "pixels"
    return record


def shape(record):
    """A record with its numbers replaced: records of one shape go through the same code."""
    if isinstance(record, dict):
        return {
            key: shape(value) for key, value in record.items() if key not in ("mesh", "path", "reference", "start_from")
        }
    if isinstance(record, list):
        return [shape(value) for value in record]
    return bool(record) if isinstance(record, int | float) else record


# latents of ImageNet with a VAE: tests/teachers/test_latent.py; SDXL's parts on emoji: those of sdxl, and two of them here
ELSEWHERE = {
    "imagenet-512/sida-s", "emoji/dmd2-1step", "emoji/dmd2-1step-no-gan", "emoji/dmd2-4step", "emoji/dmd2-4step-no-gan",
    "sdxl/dmd2-4step-lora", "flux/dmd2-4step-lora", "sd15/dmd2-no-gan",
}  # fmt: skip


def walks():
    """Recipes that are walked: the first of those that differ in numbers and places alone."""
    first = {}
    for name in sorted(list_recipes().keys() - ELSEWHERE):
        first.setdefault(json.dumps(shape(load_run(name).model_dump(mode="json")), sort_keys=True), name)
    return list(first.values())


HEAVY = ("sdxl", "sd15")  # hundreds of small layers, guidance, up to eleven updates
RECIPES = [pytest.param(name, marks=pytest.mark.slow if group(name) in HEAVY else ()) for name in walks()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_from_its_start_to_its_export(name, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fewstep.training.panels, "COLUMNS", 2)  # columns of the pictures
    monkeypatch.setattr(fewstep.training.panels, "TEACHER_CALLS", 3)
    record = walked(name, place)
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    text = group(name) in ("sdxl", "sd15", "emoji", *FLOW)
    pretraining = record["kind"] == "pretrain"
    if not pretraining and load_run(name).objective.needs_pairs:
        file.write_text(yaml.safe_dump(record))
        few = ["--count", "8", "--evaluations", "3", "--processes", "1"]
        assert main(["pairs", str(file), "--out", str(tmp_path / "pairs"), *few]) == 0
        record["pairs"] = str(tmp_path / "pairs")
        distance = PictureDistance() if text else Distance()  # stands for LPIPS, whose weights are a download
        if group(name) != "fashion-mnist":
            monkeypatch.setattr(fewstep.run.specs, "perceptual_for", lambda shape, name, device: distance)
    file.write_text(yaml.safe_dump(record, sort_keys=False))
    command = "pretrain" if pretraining else "distill"
    assert main([command, str(file), "--out", str(folder), "--processes", "1"]) == 0, capsys.readouterr().err

    end = capsys.readouterr().out
    assert f"finished: {record['train']['images']:,} images" in end
    lines = read_stats(folder / "stats.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == record["train"]["images"] // record["train"]["batch_size"]
    losses = {key: value for line in train for key, value in line.items() if "loss" in key or "gradient" in key}
    assert losses and all(np.isfinite(value) for value in losses.values())
    scored = [line for line in lines if line["kind"] == "evaluation" and "fid" in line]
    assert group(name) == "mixture" or len(scored) == (1 if pretraining else 2)  # an untrained teacher is not scored
    latest = Checkpoints(folder / "checkpoints").latest()
    assert Checkpoints.images_of(latest) == record["train"]["images"]
    if not (folder / "pipeline").exists():
        load_weights(folder / ("teacher.safetensors" if pretraining else "student.safetensors"))

    if group(name) == "mixture":  # its samples are points
        assert main(["report", str(folder)]) == 0
        return
    prompt = ["--prompt", "a cat in a tree"] if text and group(name) not in FLOW else []
    sample = ["sample", str(folder), "--seeds", "0-1", "--out", str(tmp_path / "samples.png"), *prompt]
    assert main([*sample, *(["--evaluations", "3"] if pretraining else [])]) == 0
    Image.open(tmp_path / "samples.png").load()
    chosen = record["evaluation"]
    scoring = ["--samples", "4", "--evaluations", "3", "--batch", "4", "--metrics", "fid", "--processes", "1"]
    scoring += ["--extractor", chosen["extractor"]]
    for option in ("reference", "clip"):
        scoring += [f"--{option}", chosen[option]] if chosen[option] else []
    assert main(["eval", str(folder), *scoring]) == 0, capsys.readouterr().err
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert len(rows) == (1 if pretraining else 2) and all(np.isfinite(row["fid"]) for row in rows)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 10_000
    if text and not pretraining:
        assert main(["export", str(folder), "--out", str(tmp_path / "export")]) == 0
        assert (tmp_path / "export" / "model_index.json").exists()


# ------------------------------------------------------------------------------------------- the README, as it is typed


def typed(page: str, heading: str) -> list[list[str]]:
    """The fewstep commands of the first block of shell lines under a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1]
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["fewstep"]]


@pytest.mark.slow
def test_the_lines_for_your_own_sdxl(tmp_path, monkeypatch, capsys):
    """plan, prepare, distill and export of the README, and those of the page it points to, on a tiny SDXL.

    Added to what is typed: a length of two updates, by a setting, for distill.
    """
    monkeypatch.chdir(tmp_path)
    tiny_sdxl(tmp_path / "my-finetune")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "my-finetune.safetensors").write_bytes(b"")  # named for ComfyUI's workflow, and not read
    lines = typed("README.md", "A 4-step LoRA of your own SDXL")
    assert [line[0] for line in lines] == ["plan", "prepare", "distill", "export"]
    more = typed("docs/text_to_image.md", "A LoRA of your own SDXL, on one GPU, from prompts alone")
    assert [line[0] for line in more] == ["plan", "prepare", "distill", "sample", "ui", "export"]
    assert more[:2] == lines[:2] and more[2] == lines[2], "the two pages say the same"
    for line in [*lines, *(line for line in more[3:] if line[0] != "ui")]:
        short = ["--train.images", "16", "--processes", "1"] if line[0] == "distill" else []
        assert main([*line, *short]) == 0, (line, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "finished: 16 images" in said and "fewstep export runs/my-4step" in said
    assert Image.open("samples.png").size[0] > 16
    names = {path.name for path in (tmp_path / "my-4step").iterdir()}
    assert names >= {"model_index.json", "README.md", "lora", "my-4step_unet.safetensors", "my-4step_comfyui.json"}
    lora = {path.name for path in (tmp_path / "my-4step" / "lora").iterdir()}
    assert lora == {"pytorch_lora_weights.safetensors", "my-4step_lora.safetensors"}
