"""docs/recipes-checked.md against the recipes: each of its rows is true, and none is missing."""

import json
import re

import pytest

from fewstep.run.recipes import find_recipe, list_recipes
from fewstep.run.settings import load_run
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "recipes-checked.md").read_text(encoding="utf-8")
ROWS: dict[str, dict[str, tuple[str, str, str]]] = {}
for line in TEXT.splitlines():
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    if len(cells) == 5 and cells[1].startswith("`"):
        fields = ROWS.setdefault(cells[0], {})
        assert cells[1].strip("`") not in fields, line
        fields[cells[1].strip("`")] = (cells[2], cells[3], cells[4])
SOURCES = re.findall(r"^\| (\w+) \| .+ \|$", TEXT, re.MULTILINE)[1:]
OWN = re.findall(r"^\* (\S+)$", TEXT, re.MULTILINE)


def test_every_recipe_is_checked_or_our_own():
    assert sorted([*ROWS, *OWN]) == sorted(list_recipes())
    for name in OWN:  # a header that names a published run's length must be in the tables
        assert not re.search(r"^# (Paper|Program): ", find_recipe(name).read_text(), re.MULTILINE)


def value_of(name: str, run: dict, field: str):
    """A recipe's resolved setting, or what its header's commands say."""
    text = find_recipe(name).read_text()
    if field == "processes":
        nodes, each = re.search(
            rf"(?:--nnodes (\d+) )?--nproc-per-node (\d+) -m fewstep distill {name}\b", text
        ).groups()
        return int(nodes or 1) * int(each)
    if field.startswith("pairs --"):
        return int(re.search(rf"fewstep pairs {name} .*{field.removeprefix('pairs ')} (\d+)", text)[1])
    player = "generator" if "*" in field else ""
    for key in field.replace("*", player).split("."):
        run = run[key]
    return run


def needed(run) -> set[str]:
    """Fields that a recipe's rows must cover."""
    place = next(name for name in ("sigmas", "timesteps", "times") if getattr(run.generator, name) is not None)
    fields = {"processes", "teacher.path", "train.images", "train.batch_size", f"generator.{place}"}
    fields |= {"objective.method", "objective.guidance", "train.ema_half_life", "train.precision"}
    players = ("generator", "critic") if run.objective.needs_critic else ("generator",)
    settings = ("kind", "lr", "betas", "eps", "weight_decay", "warmup", "decay_from", "clip")
    fields |= {f"optim.{player}.{setting}" for player in players for setting in settings}
    if run.objective.needs_critic:
        fields |= {f"objective.{name}" for name in ("critic_steps", "noise", "critic_noise")}
    if run.teacher.kind == "native":
        fields |= {"teacher.dropout"}
    if run.objective.method == "dmd2":
        fields |= {"objective.gan_weight", "objective.critic_first", "objective.share_rollout"}
    if run.objective.method == "sida":
        names = (
            "alpha",
            "augment",
            "loss_scale",
            "critic_first",
            "share_rollout",
            "gan_weight",
            "gan_after",
            "discriminator_weight",
        )
        fields |= {"train.ema_ramp", *(f"objective.{name}" for name in names)}
    elif run.objective.needs_real:
        fields |= {f"objective.{name}" for name in ("discriminator_weight", "gan_noise", "gan_ratio", "share_forward")}
    if run.objective.method == "sid":
        fields |= {f"objective.{name}" for name in ("alpha", "augment", "loss_scale", "critic_first", "share_rollout")}
        fields |= {"train.ema_ramp"}
    if run.objective.method == "dmd":
        fields |= {"objective.regression_weight"}
    if run.objective.needs_pairs:
        fields |= {"perceptual", "pairs --count", "pairs --evaluations"}
    if run.generator.lora is not None:
        fields |= {"generator.lora.rank", "generator.lora.alpha", "generator.lora.targets", "critic.lora"}
    if run.start_from is not None:
        fields |= {"start_from"}
    return fields


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_what_the_recipe_says(name):
    run = load_run(name)
    settings = run.model_dump(mode="json")
    for field, (official, ours, source) in ROWS[name].items():
        value = value_of(name, settings, field)
        assert json.loads(ours.strip("`")) == value, field
        if "*" in field:
            assert value_of(name, settings, field.replace("*", "critic")) == value, field
        code, departs = re.match(r"\w+", source)[0], "Departure: " in source
        if official == "not stated":
            assert not departs and code not in SOURCES, f"{field}: what ours follows"
        else:
            assert code in SOURCES and departs == (json.loads(official.strip("`")) != value), field
    covered = {field.replace("*", player) for field in ROWS[name] for player in ("generator", "critic")}
    assert not needed(run) - covered


@pytest.mark.parametrize("name", [name for name in ROWS if "/sid" not in name])
def test_lengths_are_those_of_the_header(name):
    """Iterations of the header's `Program:` or `Paper:` line, at the recipe's batch."""
    run, text = load_run(name), find_recipe(name).read_text()
    iterations = 1000 * float(re.search(r"^# (?:Program|Paper): .*?([\d.]+)k iterations", text, re.MULTILINE)[1])
    assert run.train.images == iterations * run.train.batch_size
    if cards := re.search(r"(\d+) GPUs x (\d+)", text):
        assert int(cards[1]) * int(cards[2]) == run.train.batch_size and int(cards[1]) == value_of(
            name, {}, "processes"
        )


@pytest.mark.parametrize("name", [name for name in ROWS if re.search(r"/sid\b", name)])
def test_lengths_of_sid_are_those_of_the_header(name):
    """500 million images, but 800 and 1000 for two runs of alpha 1.2 (the authors' note)."""
    run, text = load_run(name), find_recipe(name).read_text()
    longer = {"cifar10-cond/sid": 800, "imagenet-64/sid": 1000}
    assert run.train.images == longer.get(name, 500) * 10**6
    assert f"{longer.get(name, 500)} million images" in text and f"alpha {run.objective.alpha:g}:" in text
