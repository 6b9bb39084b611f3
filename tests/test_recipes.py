"""Every shipped recipe is built as it stands, on a tiny network of its teacher's kind, and makes one full update."""

import json

import numpy as np
import pytest
import torch
import yaml

import fewstep.run
from fewstep.data import ImageFolder
from fewstep.model import DenoiserSpec, save_denoiser
from fewstep.nets import DhariwalUNetSpec, SongUNetSpec
from fewstep.pairs import make_pairs
from fewstep.run import DistillRun, list_recipes, load_run
from fewstep.trainer import Micro
from tests.test_model import randomised

PUBLISHED = sorted(
    name
    for name in list_recipes()
    if name.split("/")[0] not in ("digits", "fashion-mnist", "fashion-mnist-16", "mixture")
)
BATCH = 4


def tiny(name: str) -> DenoiserSpec:
    """A small network with every property of the published one that a recipe can trip over."""
    shared = dict(size=8, model_channels=8, num_blocks=1, attn_resolutions=(4,), dropout=0.1)
    if name.startswith("imagenet"):
        return DenoiserSpec(net=DhariwalUNetSpec(**shared, channel_mult=(1, 2), num_classes=1000))
    classes = 10 if name.startswith("cifar10-cond") else 0
    return DenoiserSpec(net=SongUNetSpec(**shared, channel_mult=(1, 2), num_classes=classes, augment_dim=9))


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
        monkeypatch.setattr(fewstep.run, "perceptual_for", lambda shape, name, device: Distance())
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
    assert learnt >= augmented and parameters.keys() - learnt <= {name for name in parameters if "map_augment" in name}


class Distance(torch.nn.Module):
    """Stands for LPIPS."""

    name = "mean square"

    def forward(self, x, y):
        return ((x - y) ** 2).flatten(1).mean(1)


def test_each_column_of_the_papers_tables_has_its_recipe():
    sid = {"afhqv2-64", "cifar10-cond", "cifar10-uncond", "ffhq-64", "imagenet-64"}
    alphas = {(name.split("/")[0], load_run(name).objective.alpha) for name in PUBLISHED if "/sid" in name}
    assert alphas == {(folder, alpha) for folder in sid for alpha in (1.0, 1.2)}
    others = {name for name in PUBLISHED if "/sid" not in name}
    methods = ("dmd", "dmd2", "dmd2-no-gan", "dmd2-resumed")
    assert others == {"cifar10-cond/dmd", *(f"imagenet-64/{method}" for method in methods)}


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
