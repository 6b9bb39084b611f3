"""What a recipe's header says of its command is what `fewstep plan` says: the cards, whether it fits them, host and disk."""

import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from fewstep.costs.counting import Counter, Memory
from fewstep.costs.machines import GPUS, PER_MACHINE, published
from fewstep.costs.meta import as_on_a_gpu
from fewstep.costs.outline import outline
from fewstep.costs.plan import CONTEXT, Plan, plan
from fewstep.run.recipes import find_recipe, list_recipes
from fewstep.run.settings import load_run

# small worlds, for the processors of any machine: no card is named, and nothing is asked of one
OURS = ("digits", "emoji", "fashion-mnist", "fashion-mnist-16", "mixture", "own")
LARGE = ("sdxl", "flux", "sd35", "flux2", "z-image", "qwen-image", "longcat")
RECIPES = [
    pytest.param(name, marks=pytest.mark.slow if name.split("/")[0] in LARGE else ())
    for name in list_recipes()
    if name.split("/")[0] not in OURS
]


# planned as another of its family is, and long: FEWSTEP_ALL=1 checks them too
ALIKE = {"sdxl/dmd2-4step-lora", "sdxl/lora-80gb", "sdxl/dmd2-1step", "flux/dmd2-4step-lora", "qwen-image/lora-24gb"}


@lru_cache
def planned(name: str, processes: int) -> Plan:
    return plan(load_run(name), processes)


@dataclass
class Header:
    lines: list[str]
    cards: int
    card: str
    used: float
    host: int | None
    disk: float | None

    def command(self, verb: str) -> dict[str, str] | None:
        """Options of the `fewstep VERB` line and "processes"."""
        line = next((line for line in self.lines if re.search(rf"fewstep {verb}( |$)", line)), None)
        if line is None:
            return None
        options = dict(re.findall(r"--([a-z-]+) (\S+)", line))
        torchrun = "torchrun" in line
        options["processes"] = int(options.get("nnodes", 1)) * int(options["nproc-per-node"]) if torchrun else 1
        return options


def header_of(name: str) -> Header:
    text = find_recipe(name).read_text()
    lines = [line for line in text.splitlines() if line.startswith("#")]
    found = re.findall(r"^# Hardware: (\d+) x (.+?), ([\d.]+) of (\d+) GiB.*$", text, re.MULTILINE)
    assert len(found) == 1, "# Hardware: N x CARD, USED of MEMORY GiB"
    cards, card, used, memory = found[0]
    assert GPUS[card].memory == int(memory)
    host = re.search(r"(\d+) GiB of host memory a machine", text)
    disk = re.search(r"([\d.]+) GiB of disk for pairs", text)
    return Header(lines, int(cards), card, float(used), host and int(host[1]), disk and float(disk[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_header_states_what_its_command_takes(name):
    if name in ALIKE and not os.environ.get("FEWSTEP_ALL"):
        pytest.skip("planned as another of its family: FEWSTEP_ALL=1")
    header, run = header_of(name), load_run(name)
    assert len(header.lines) <= 12 and max(map(len, header.lines)) <= 170
    command, pairs = header.command(f"distill {name}"), header.command(f"pairs {name}")
    assert command is not None and command["processes"] == header.cards
    found = planned(name, header.cards)  # refuses a batch or a mesh that these processes do not make
    assert found.fits(GPUS[header.card])
    assert found.memory / 2**30 == pytest.approx(header.used, abs=0.06)
    machine = found.building * min(header.cards, PER_MACHINE) / 2**30
    assert header.host == (round(machine) if machine else None)
    assert run.objective.needs_pairs == (pairs is not None)
    if pairs is None:
        assert header.disk is None
        return
    assert pairs["processes"] == header.cards
    assert int(pairs["count"]) * found.pair / 2**30 == pytest.approx(header.disk, abs=0.06)
    assert (pairs["out"] in (command.get("pairs"), str(run.pairs))) and int(pairs["evaluations"]) > 0
    assert drawing(run, int(pairs.get("batch", 250))) + CONTEXT <= GPUS[header.card].memory * 2**30


def drawing(run, batch: int) -> int:
    """Bytes that the teacher and a call of it for a batch of pairs take."""
    task = outline(run).task
    teacher = task.nets.teacher
    x, t = torch.zeros(batch, *task.teacher.shape, device="meta"), torch.full((batch,), 0.5, device="meta")
    cond = task.teacher.conditioner.draw(batch, "meta")
    memory = Memory(teacher.parameters())
    with as_on_a_gpu(memory), torch.no_grad(), Counter(memory):
        teacher(x, t, **cond)
    return memory.take().size + sum(p.nbytes for p in teacher.parameters())


@pytest.mark.parametrize("name", [name for name, file in list_recipes().items() if "# Program: " in file.read_text()])
def test_warm_ups_of_dmd2_are_the_programs(name):
    """Its schedule advances once a process in every iteration: 500 steps are 500 / processes iterations."""
    run, processes = load_run(name), header_of(name).cards
    specs = [run.optim.generator, *([run.optim.critic] if run.objective.needs_critic else [])]
    for spec in specs:
        assert spec.warmup * processes == 500 * run.train.batch_size
    said = " ".join(line.removeprefix("# ") for line in header_of(name).lines)
    iterations = round(500 / processes)
    assert f"500 / {processes} = {iterations} iterations: 500 x {run.train.batch_size // processes} images" in said


@pytest.mark.slow
def test_the_one_card_recipe_fits_its_card():
    found = planned("sdxl/lora-24gb", 1)
    said = str(found)
    assert "2,567,463,684 of them trained 0" in said and "RTX 4090    24 GiB  fits" in said
    assert 6e12 < found.work.forward < 7.5e12  # SDXL's UNet at a megapixel
    assert found.hours(GPUS["H100"]) < found.hours(GPUS["A100"])


PUBLISHED = {
    # recipe: (seconds of an iteration, GPU hours, what plan's assumptions make of it for A100, share of operations reached)
    "imagenet-64/dmd2": (0.95, 371, -0.51, 0.19),
    "imagenet-64/dmd2-no-gan": (0.61, 490, -0.43, 0.22),
    "sdxl/dmd2-4step": (10.8, 3648, -0.87, 0.05),  # split over eight
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_iterations_beside_the_plan(name):
    """docs/performance.md's table. The teacher's file need not be there."""
    seconds, hours, error, reached = PUBLISHED[name]
    recipe = published(find_recipe(name).read_text())
    assert recipe.seconds == pytest.approx(seconds, abs=0.005) and recipe.gpus * recipe.hours == hours
    found = planned(name, recipe.gpus)
    assert found.step(GPUS["A100"]).seconds / recipe.seconds - 1 == pytest.approx(error, abs=0.015)
    operations = found.work.iteration * recipe.batch / recipe.seconds
    assert operations / GPUS["A100"].operations == pytest.approx(reached, abs=0.01)
    assert f"this plan says {found.step(GPUS['A100']).seconds:.2f} s" in found.compared(recipe)
    assert f"--processes {recipe.gpus} compares" in replace(found, processes=1).compared(recipe)
