"""Every shipped recipe is built as it stands, on a tiny network of its teacher's kind, and makes one full update."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

import fewstep.run.specs
from fewstep.data import ImageFolder
from fewstep.formats.model import save_denoiser
from fewstep.methods.pairs import make_pairs
from fewstep.run.recipes import find_recipe, list_recipes
from fewstep.run.settings import load_run
from fewstep.run.specs import DistillRun
from fewstep.system.distributed import MeshSpec
from fewstep.teachers import LatentTeacher, NativeTeacher
from fewstep.training.task import Micro
from tests.support.networks import randomised
from tests.support.recipes import Distance, PictureDistance, tiny

OURS = ("digits", "emoji", "fashion-mnist", "fashion-mnist-16", "mixture", "own")  # emoji: tests/test_emoji_world.py
TEXT_TO_IMAGE = sorted(name for name in list_recipes() if name.startswith(("sd15/", "sdxl/")))
TRANSFORMERS = {"sd35/dmd2-4step-lora": "sd3", "flux/dmd2-4step-lora": "flux", "flux/lora-24gb": "flux"}
LATER = {
    "flux2/dmd2-4step-lora": "flux2", "flux2/dev-lora-24gb": "flux2-dev", "z-image/dmd2-4step-lora": "z-image",
    "qwen-image/lora-24gb": "qwen-image", "longcat/dmd2-4step-lora": "longcat",
}  # fmt: skip
PUBLISHED = sorted(
    name
    for name in list_recipes()
    if name.split("/")[0] not in OURS and name not in {*TEXT_TO_IMAGE, *TRANSFORMERS, *LATER}
)
BATCH = 4


@pytest.fixture
def images(tmp_path):
    """Eight pictures, one of the last class of ImageNet."""
    from PIL import Image

    folder, draw = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    labels = [[f"{number}.png", 999 if number == 0 else number] for number in range(8)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return ImageFolder(path=folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_full_update(name, tmp_path, images, monkeypatch):
    run = load_run(name)
    assert isinstance(run, DistillRun)
    spec = tiny(name)
    torch.manual_seed(0)
    save_denoiser(tmp_path / "t.safetensors", randomised(spec), spec, {})
    teacher = run.teacher.model_copy(update={"path": str(tmp_path / "t.safetensors")})
    if isinstance(teacher, LatentTeacher):  # with its VAE: tests/teachers/test_latent.py
        teacher = NativeTeacher(path=teacher.path, dropout=teacher.dropout)
    changes = {
        "teacher": teacher,
        "train": run.train.model_copy(update={"batch_size": BATCH, "micro_batch": None, "precision": "fp32"}),
        "evaluation": run.evaluation.model_copy(update={"samples": 0}),
        "data": images if run.data else None,
        "start_from": None,
    }
    if run.objective.needs_pairs:
        make_pairs(teacher.load(), tmp_path / "pairs", 8, evaluations=1)
        changes["pairs"] = tmp_path / "pairs"
        # LPIPS needs weights that tests do not have
        monkeypatch.setattr(fewstep.run.specs, "perceptual_for", lambda shape, name, device: Distance())
    task = run.model_copy(update=changes).trainer(tmp_path / "run").task
    parameters = {
        f"{player}.{name}": parameter
        for player, module in (("generator", task.nets.generator), ("critic", task.nets.critic))
        for name, parameter in module.named_parameters()
    }
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first = 500_000  # after the warm-up, at the generator's turn; at its first one the two scores are still the same
    for step in range(run.objective.critic_steps + 1):
        stats = task.update((first + step) * BATCH, [Micro(step * BATCH, BATCH, 0)])
        assert all(np.isfinite(float(value)) for key, value in stats.items() if key.startswith("loss/"))
    # the weights of augmentation numbers learn only where a run augments (the student is never told of any)
    augmented = {"critic.denoiser.net.map_augment.weight"} if getattr(run.objective, "augment", 0) else set()
    learnt = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert learnt >= augmented and parameters.keys() - learnt <= {
        name for name in parameters if "map_augment" in name or "logvar" in name
    }


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A tiny pipeline of each family, with prompts and captioned images prepared for it."""
    from PIL import Image

    from fewstep.cli.main import main
    from tests.support.pipelines import tiny_sd15, tiny_sdxl

    root, draw = tmp_path_factory.mktemp("pipelines"), np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "prompts.txt").write_text("a cat\na dog\n")
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"images/{number}.png")
        (root / f"images/{number}.txt").write_text(f"picture {number}")
    for name, make in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl)):
        arguments = ["--prompts", str(root / "prompts.txt"), "--images", str(root / "images")]
        assert main(["prepare", str(make(root / name)), *arguments, "--out", str(root / f"{name}-prepared")]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_one_full_update_of_text_to_image(name, tmp_path, pipelines, monkeypatch):
    run, family = load_run(name), name.split("/")[0]
    prepared = pipelines / f"{family}-prepared"
    teacher = run.teacher.model_copy(update={"path": str(pipelines / family), "prompts": prepared, "tiny_vae": None})
    changes = {
        "teacher": teacher,
        "train": run.train.model_copy(update={"batch_size": BATCH, "micro_batch": None, "mesh": MeshSpec()}),
        "data": run.data.model_copy(update={"path": prepared}) if run.data else None,
        "start_from": None,
    }
    if run.objective.needs_pairs:
        make_pairs(teacher.load(), tmp_path / "pairs", 4, evaluations=1, guidance=run.objective.guidance)
        changes["pairs"] = tmp_path / "pairs"
        monkeypatch.setattr(fewstep.run.specs, "perceptual_for", lambda shape, name, device: PictureDistance())
    task = run.model_copy(update=changes).trainer(tmp_path / "run").task
    for step in range(run.objective.critic_steps + 1):
        stats = task.update((step + 10**6) * BATCH * run.objective.critic_steps, [Micro(step * BATCH, BATCH, 0)])
        assert all(np.isfinite(float(value)) for key, value in stats.items() if key.startswith("loss/"))
    if "lora" in name:  # one backbone, or student and teacher on one
        shared = task.nets.teacher.denoiser
        assert task.nets.generator.denoiser.base is shared
        assert ("gb" in name) == (getattr(task.nets.critic.denoiser, "base", None) is shared)
    command = next(line for line in find_recipe(name).read_text().splitlines() if line.startswith("# Command:"))
    assert f"fewstep distill {name}" in command


@pytest.mark.parametrize("name", [*TRANSFORMERS, *LATER])
def test_one_full_update_of_a_transformer(name, tmp_path):
    from tests.support.families import prepared_family
    from tests.support.pipelines import prepared

    run = load_run(name)
    teacher = (
        prepared(TRANSFORMERS[name], tmp_path)[0] if name in TRANSFORMERS else prepared_family(LATER[name], tmp_path)
    )
    changes = {
        "teacher": teacher.model_copy(update={"dtype": run.teacher.dtype}),
        "train": run.train.model_copy(
            update={"batch_size": BATCH, "micro_batch": None, "swap_blocks": min(run.train.swap_blocks, 2)}
        ),
    }
    task = run.model_copy(update=changes).trainer(tmp_path / "run").task
    for step in range(run.objective.critic_steps + 1):
        stats = task.update((step + 10**6) * BATCH * run.objective.critic_steps, [Micro(step * BATCH, BATCH, 0)])
        assert all(np.isfinite(float(value)) for key, value in stats.items() if key.startswith("loss/"))
    missed = [
        target
        for target in run.generator.lora.targets
        if not any(layer == target or layer.endswith(f".{target}") for layer in task.nets.generator.denoiser.adapters())
    ]
    assert not missed


def test_each_column_of_the_papers_tables_has_its_recipe():
    sid = {"afhqv2-64", "cifar10-cond", "cifar10-uncond", "ffhq-64", "imagenet-64"}
    alphas = {
        (name.split("/")[0], load_run(name).objective.alpha) for name in PUBLISHED if re.search("/sid(-|$)", name)
    }
    assert alphas == {(folder, alpha) for folder in sid for alpha in (1.0, 1.2)}
    others = {name for name in PUBLISHED if not re.search("/sid(-|$)", name)}
    methods = ("dmd", "dmd2", "dmd2-no-gan", "dmd2-resumed", "f-distill")
    sida = {"cifar10-uncond/sida", "imagenet-512/sida-s"}
    assert others == {"cifar10-cond/dmd", *sida, *(f"imagenet-64/{method}" for method in methods)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_says_what_it_needs_and_whether_it_was_run(name):
    text = list_recipes()[name].read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("fewstep distill " + name in line for line in header), "the command"
    assert "not yet run" in " ".join(header) and "GPUs" in " ".join(header)
    settings = yaml.safe_load(text)
    assert settings["teacher"]["path"] in " ".join(header)
    batch, processes = settings["train"]["batch_size"], 7 if "--nproc-per-node 7" in text else 4
    assert batch % (processes * settings["train"].get("micro_batch", 1)) == 0
