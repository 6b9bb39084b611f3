"""What a recipe's header says of its command is what `fewstep plan` says: the cards, whether it fits them, host and disk."""

import re
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from fewstep.costs.machines import CARDS, GPUS
from fewstep.costs.plan import CONTEXT, _attention, _Live, plan
from fewstep.run.recipes import find_recipe, list_recipes
from fewstep.run.settings import load_run
from fewstep.system.console import quiet
from fewstep.teachers import DiffusersTeacher

# small worlds, for the processors of any machine: no card is named, and nothing is asked of one
OURS = ("digits", "emoji", "fashion-mnist", "fashion-mnist-16", "mixture")
LARGE = ("sdxl", "flux", "sd35")
RECIPES = [
    pytest.param(name, marks=pytest.mark.slow if name.split("/")[0] in LARGE else ())
    for name in list_recipes()
    if name.split("/")[0] not in OURS
]


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
    header, run = header_of(name), load_run(name)
    assert len(header.lines) <= 12 and max(map(len, header.lines)) <= 170
    command, pairs = header.command(f"distill {name}"), header.command(f"pairs {name}")
    assert command is not None and command["processes"] == header.cards
    found = plan(run, header.cards)  # refuses a batch or a mesh that these processes do not make
    assert found.fits(GPUS[header.card])
    assert found.memory / 2**30 == pytest.approx(header.used, abs=0.06)
    machine = found.building * min(header.cards, CARDS) / 2**30
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
    spec, cond = run.teacher.outline()
    frozen = getattr(torch, run.teacher.dtype) if isinstance(run.teacher, DiffusersTeacher) else torch.float32
    with torch.device("meta"), quiet():
        net = spec.build().requires_grad_(False).net.to(frozen)
    batch *= run.objective.teacher_cost
    x = torch.zeros(batch, *spec.net.sample_shape, device="meta")
    cond = {name: value.new_zeros(batch, *value.shape[1:]) for name, value in cond.items()}
    attention = mock.patch.object(F, "scaled_dot_product_attention", _attention)
    with attention, torch.no_grad(), _Live() as live:
        net(x, torch.zeros(batch, device="meta"), **cond)
    return live.most + sum(p.nbytes for p in net.parameters())


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
