"""The device's numbers beside the published programs' and the processor's, in float32 without TF32 and in bf16.

Random draws come from the processor's generator on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.stages.bench import Bench
from benchmarks.stages.networks import distillation, random_teacher
from benchmarks.stages.training import run_of
from fewstep.data import Digits
from fewstep.methods import DMD, DMD2, SiD
from fewstep.networks.blocks import blocks_of
from fewstep.networks.diffusers_net import DiffusersNet
from fewstep.networks.placement import compile_blocks
from fewstep.run.settings import load_run
from fewstep.run.specs import DistillRun, Optimizers
from fewstep.system import distributed
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.device import training_kernels
from fewstep.system.distributed import MeshSpec
from fewstep.teachers import NativeTeacher
from fewstep.training.distill import Distillation
from fewstep.training.health import HealthSpec
from fewstep.training.optim import OptimSpec
from fewstep.training.task import Micro

__all__ = ["adapters", "compiled", "losses", "networks", "offloaded", "resumed", "split", "swapped", "updates"]

EXACT = 1e-4  # relative, in float32
MOVED = 1e-2  # of what three updates move: differences of nearly equal scores lose digits
ROUNDED = 2.0  # errors in bf16 may be so many times the processor's
BATCH, UPDATES = 8, 3


def networks(bench: Bench) -> None:
    """EDM's networks with published weights against the published outputs (tests/golden)."""
    from tests.support.golden import CONFIGS, golden

    for name in CONFIGS:
        denoiser, arguments, file = golden(name)
        wanted = file["output.denoised"]
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                narrow = _error(denoiser(**arguments), wanted)
            denoiser.to(bench.device)
            arguments = {key: value.to(bench.device) for key, value in arguments.items()}
            with training_kernels(bench.device, False):
                bench.check(f"{name}, float32", EXACT, {"error": _error(denoiser(**arguments), wanted)})
            with training_kernels(bench.device, True), torch.autocast(bench.device.type, torch.bfloat16):
                found = _error(denoiser(**arguments), wanted)
        bench.check(f"{name}, bf16", ROUNDED * narrow, {"error": found})


def losses(bench: Bench) -> None:
    """Losses and gradients on the samples against the SiD and DMD2 programs' (tests/golden)."""
    from tests.support import golden

    def compare(
        name: str, kind: str, objective: Any, nets: Any, file: dict[str, Tensor], noise: list[str], wanted: str
    ) -> None:
        file = {key: value.to(bench.device) for key, value in file.items()}
        for module in (nets.generator, nets.teacher, nets.critic.requires_grad_(False)):
            module.to(bench.device)
        x = file["input.image"].clone().requires_grad_()
        left = [file[key] for key in noise]
        with training_kernels(bench.device, False), mock.patch.object(torch, "randn_like", lambda like: left.pop(0)):
            loss = objective.generator_loss(nets, x, golden.batch_of(file)).losses[kind]
            loss.backward()
        value = file[f"{wanted}.loss_scaled" if f"{wanted}.loss_scaled" in file else f"{wanted}.loss"]
        errors = {"loss": _error(loss, value), "gradient": _error(x.grad, file[f"{wanted}.grad_image"])}
        bench.check(name, EXACT, errors)

    nets, file = golden.load("sid_edm.safetensors", "edm_ddpmpp")
    time = SiD().noise.high * file["sid_alpha1.2.uniform"].double()
    objective: Any = SiD.model_construct(alpha=1.2, noise=golden.Stored(time))
    compare("SiD's loss", "sid", objective, nets, file, ["sid_alpha1.2.noise"], "sid_alpha1.2")
    nets, file = golden.load("dmd2_edm.safetensors", "edm_adm")
    matched = golden.indices(file, "dm.timesteps")
    objective = DMD2.model_construct(gan_weight=0.0, noise=golden.Stored(matched))
    compare("DMD2's matching loss", "dm", objective, nets, file, ["dm.noise"], "dm")
    judged = golden.Stored(golden.indices(file, "diffusion_gan.generator.timesteps"))
    objective = DMD2.model_construct(gan_weight=1.0, noise=golden.Stored(matched), gan_noise=judged)
    noise = ["dm.noise", "diffusion_gan.generator.noise"]
    compare("DMD2's GAN loss", "gan", objective, nets, file, noise, "diffusion_gan.generator")


def updates(bench: Bench) -> None:
    """Three updates of each method on the digits, here and on the processor; then in bf16, whose losses must be finite."""
    cpu = torch.device("cpu")
    for name, objective in (
        ("SiD", SiD()), ("DMD2 with GAN", DMD2(critic_steps=1)), ("DMD without regression", DMD(regression_weight=0.0)),
    ):  # fmt: skip
        _compare(bench, name, _digits(bench, objective, cpu), _digits(bench, objective, bench.device))
        task = _digits(bench, objective, bench.device, precision="bf16")
        stats = [_update(task, number) for number in range(UPDATES)][-1]
        finite = all(torch.isfinite(torch.as_tensor(v)).all() for k, v in stats.items() if k.startswith("loss/"))
        bench.note("losses are finite" if finite else "FAILED: losses are not finite", f"{name}, bf16")


def adapters(bench: Bench) -> None:
    """Student and fake score as adapters on one tiny SDXL, here with its blocks computed again, there without."""
    run = run_of("sdxl", "micro-batch 1", True, "cpu")
    optim = Optimizers(generator=_optim(), critic=_optim())
    train = run.train.model_copy(update={"precision": "fp32", "micro_batch": None, "gradient_checkpointing": False})
    run = run.model_copy(update={"train": train, "optim": optim})
    torch.manual_seed(0)
    teacher = random_teacher("sdxl", True, torch.device("cpu"))
    there = distillation(run, copy.deepcopy(teacher))
    changed = {"device": bench.device.type, "gradient_checkpointing": True}
    run = run.model_copy(update={"train": train.model_copy(update=changed)})
    _compare(bench, "adapters on one backbone, recomputing blocks", there, distillation(run, teacher))


def resumed(bench: Bench) -> None:
    """A run that was stopped and went on, against one that was not."""
    ends = []
    for name, lengths in (("unbroken", [UPDATES]), ("resumed", [1, UPDATES])):
        folder = bench.scratch(name)
        for length in lengths:
            run = _run(SiD(), bench.device, images=BATCH * length, checkpoint_every=BATCH)
            run.trainer(folder).fit()
        checkpoints = Checkpoints(folder / "checkpoints")
        ends.append(checkpoints.load(checkpoints.latest())["task"])
    errors = {part: _error(_flat(ends[1][part]), _flat(ends[0][part])) for part in ("generator", "ema", "critic")}
    bench.check("resumed", EXACT, errors)


def offloaded(bench: Bench) -> None:
    """Weights and moments at the host, against all on the device."""
    objective = DMD2(critic_steps=1)
    here = _digits(bench, objective, bench.device)
    _compare(bench, "offloaded", here, _digits(bench, objective, bench.device, offload=True))


def swapped(bench: Bench) -> None:
    """Adapters on an int8 network, all of its blocks at the host, which come on a stream of their own, against all on the device."""
    run = run_of("sdxl", "micro-batch 1, int8 base", True, bench.device.type)
    train = run.train.model_copy(update={"precision": "fp32", "micro_batch": None})
    run = run.model_copy(update={"train": train, "optim": Optimizers(generator=_optim(), critic=_optim())})
    torch.manual_seed(0)
    teacher = random_teacher("sdxl", True, bench.device)
    cast(DiffusersNet, teacher.denoiser.net).quantize("int8")
    there = distillation(run, copy.deepcopy(teacher))
    blocks = len(blocks_of(teacher.denoiser))
    run = run.model_copy(update={"train": train.model_copy(update={"swap_blocks": blocks})})
    here = distillation(run, teacher)
    _compare(bench, "blocks at the host", there, here)
    assert here.swap is not None and here.swap.moved > here.swap.size


def split(bench: Bench) -> None:
    """Networks split by FSDP2 over one process, against whole ones."""
    objective = DMD2(critic_steps=1)
    whole = _digits(bench, objective, bench.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if bench.cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh(bench.device.type, (1,), mesh_dim_names=("shard",))
        with mock.patch.multiple(MeshSpec, build=lambda self, device: mesh, splits=True):
            task = _digits(bench, objective, bench.device)
        assert task.sharded
        _compare(bench, "FSDP2 on a mesh of one", whole, task)
    finally:
        dist.destroy_process_group()


def compiled(bench: Bench) -> None:
    """A network compiled block by block, against the same as it is; without a GPU nothing is compiled."""
    teacher = NativeTeacher(path="digits").load()
    plain = teacher.start().to(bench.device)
    fast = copy.deepcopy(plain)
    compile_blocks(fast, backend="inductor" if bench.cuda else "eager")
    x, t = torch.randn(256, *teacher.shape).to(bench.device), torch.full((256,), 0.5, dtype=torch.float64)
    cond = {key: value.to(bench.device) for key, value in teacher.conditioner.draw(256).items()}
    found, times = [], {}
    with training_kernels(bench.device, False):
        for name, denoiser in (("plain", plain), ("compiled", fast)):

            def work(denoiser: nn.Module = denoiser) -> Tensor:
                leaf = x.clone().requires_grad_()
                denoiser(leaf, t.to(bench.device), **cond).square().mean().backward()
                return leaf.grad

            found.append(work())
            times[name] = 1000 * bench.seconds(work)
    bench.check("compiled block by block", EXACT, {"gradient": _error(found[1], found[0])})
    bench.report("ms a forward and backward", times)


def _run(objective: Any, device: torch.device, **train: Any) -> DistillRun:
    """The digits with a method, small and without anything that is drawn on the device."""
    run = load_run("digits/sid")
    settings = {
        "images": BATCH * UPDATES, "batch_size": BATCH, "precision": "fp32", "device": device.type, "evaluate_every": None,
        "ema_half_life": 100,
    }  # fmt: skip
    return run.model_copy(
        update={
            "objective": objective,
            "data": Digits(),
            "health": HealthSpec(samples=0),
            "optim": Optimizers(generator=_optim(), critic=_optim()),
            "train": run.train.model_copy(update=settings | train),
            "evaluation": run.evaluation.model_copy(update={"samples": 0}),
        }
    )


def _optim() -> OptimSpec:
    """Return Adam with an epsilon that hides gradients made of rounding, whose signs would be its first steps."""
    return OptimSpec(kind="adam", lr=1e-3, eps=1e-3)


def _digits(bench: Bench, objective: Any, device: torch.device, **train: Any) -> Distillation:
    task = _run(objective, device, **train).trainer(bench.folder).task
    assert isinstance(task, Distillation)
    return task


def _compare(bench: Bench, name: str, there: Distillation, here: Distillation) -> None:
    """Both from the same weights, three updates each: how far they end from each other."""
    begin = {key: _copied(value) for key, value in there.state_dict().items() if not key.endswith("optimizer")}
    here.begin(begin)
    for number in range(UPDATES):
        _update(there, number)
        _update(here, number)
    errors, moves = {}, {}
    for part in ("generator", "critic"):
        ours, theirs = (_flat(task.state_dict()[part]) for task in (here, there))
        errors[part] = _error(ours, theirs)
        moves[part] = ((ours - theirs).norm() / (theirs - _flat(begin[part])).norm()).item()
    bench.check(f"{name}: weights", EXACT, errors)
    bench.check(f"{name}: what moved", MOVED, moves)


def _update(task: Distillation, number: int) -> dict[str, Any]:
    with _drawn_on_cpu(), training_kernels(task.device, task.bf16):
        return task.update(BATCH * number, [Micro(BATCH * number, BATCH, 0)])


@contextmanager
def _drawn_on_cpu() -> Iterator[None]:
    """`torch.randn_like` from the processor's generator, whatever the device."""

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype).to(like.device)

    with mock.patch.object(torch, "randn_like", draw):
        yield


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _flat(state: dict[str, Tensor]) -> Tensor:
    whole = distributed.whole(state)
    return torch.cat(
        [value.detach().double().cpu().reshape(-1) for value in whole.values() if value.is_floating_point()]
    )


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the norm over all elements."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item()
