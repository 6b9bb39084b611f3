"""One distillation: teacher, generator and critic, and what an update of them is. A `Task` for the trainer.

Knows no method: the objective computes losses on samples that this module rolls out, and this module gives their
gradients to the networks. Every loss is taken on the samples as a leaf, so that each term's gradient on them is known
(and logged) before it goes through the generator.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fewstep.data import ImageDataset, Stream, shuffled_indices, to_uint8
from fewstep.diffusion.generator import Generator
from fewstep.evaluation.perceptual import Perceptual
from fewstep.evaluation.scorer import Scorer, scored
from fewstep.formats.model import save_generator
from fewstep.methods import Batch, Critic, Nets, Objective, Pairs
from fewstep.methods.losses import mean_abs
from fewstep.methods.pairs import PairSet
from fewstep.networks.compiled import compile_blocks
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.networks.narrow import narrow
from fewstep.networks.recompute import recompute_blocks
from fewstep.networks.shard import shard
from fewstep.students.sample import FewStep, ManyStep, generate, noise_of
from fewstep.system import distributed
from fewstep.system.distributed import MeshSpec
from fewstep.system.errors import SettingsError
from fewstep.system.pictures import save_grid
from fewstep.teachers.base import Teacher
from fewstep.training.ema import Ema
from fewstep.training.optim import OptimSpec, Stepper
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro, Task, cure, derived_seed

__all__ = ["Distillation"]

Sample = tuple[Tensor, dict[str, Tensor]]  # generated samples and their condition

PANEL = 10  # columns of the pictures
TEACHER_CALLS = 35  # network calls of a teacher's picture
BINS = 4  # noise levels told apart in the log


class Distillation(Task):
    """Train a few-step generator against a frozen teacher and a learned critic.

    Args:
        teacher: the diffusion model.
        times: the generator's normalised times.
        objective: the method.
        train: run settings.
        generator_optim: the generator's optimizer.
        critic_optim: the critic's.
        dataset: real images, if the objective wants them.
        pairs: teacher pairs, if the objective wants them.
        perceptual: the distance for pairs.
        scorer: evaluates samples; None for no evaluation.
        card: provenance that goes into the exported file.
        flip: mirror half of the real images.
        generator_lora: train adapters on the teacher's own network instead of a copy of it.
        critic_lora: the same for the fake score; with both, one network is in memory.
    """

    def __init__(
        self,
        teacher: Teacher,
        times: tuple[float, ...],
        objective: Objective,
        train: TrainSpec,
        generator_optim: OptimSpec,
        critic_optim: OptimSpec,
        dataset: ImageDataset | None = None,
        pairs: PairSet | None = None,
        perceptual: Perceptual | None = None,
        scorer: Scorer | None = None,
        card: dict[str, Any] | None = None,
        flip: bool = False,
        generator_lora: LoraSpec | None = None,
        critic_lora: LoraSpec | None = None,
    ) -> None:
        self.teacher, self.objective, self.train = teacher, objective, train
        self.dataset, self.pairs, self.scorer, self.card = dataset, pairs, scorer, card or {}
        seen = [known for part in (dataset, pairs) if (known := getattr(part, "fingerprint", None))]
        self.data = seen[0] if len(seen) == 1 else hashlib.sha256("".join(seen).encode()).hexdigest() if seen else None
        self.inputs = teacher.inputs("teacher")
        self.real = Stream(dataset, derived_seed(train.seed, "real"), flip) if dataset is not None else None
        assert dataset is not None or not objective.needs_real, "this objective needs real images"
        assert pairs is not None or not objective.needs_pairs, "this objective needs pairs"
        self.device, self.bf16 = train.torch_device(), train.bf16()
        mesh = train.mesh.build(self.device)
        self.sharded = mesh is not None
        # split or rounded on the way to the device
        home = torch.device("cpu") if self.sharded or train.offload else self.device
        torch.manual_seed(train.seed)
        frozen = teacher.guided(objective.guidance).to(home).requires_grad_(False).eval()
        generator = Generator(teacher.player(generator_lora).to(home), times)
        critic = None
        if objective.needs_critic:
            critic = objective.make_critic(teacher, teacher.player(critic_lora)).to(home)
        self.nets = Nets(generator, frozen, critic, perceptual, teacher.conditioner.null)
        self.ema = Ema(generator, train.ema_half_life, train.ema_ramp, train.offload)
        if train.compile:
            for module in (generator.denoiser, frozen, critic and critic.denoiser):
                if module is not None:
                    read = critic.bottleneck if critic is not None and module is critic.denoiser else ""
                    compile_blocks(module, read)
        if train.gradient_checkpointing or train.recompute_activations:
            # SiD's gradients run through the frozen network too; adapters run on that one
            for module in dict.fromkeys(_network(m) for m in (generator, teacher, critic) if m is not None):
                recompute_blocks(module, between=train.recompute_activations)
        if mesh is not None:
            self._split(mesh, train.mesh)
        away = self.device if train.offload else None
        self.generator_stepper = Stepper(generator_optim, [generator], train.images, away)
        self.critic_stepper = Stepper(critic_optim, [critic], train.images, away) if critic is not None else None
        if train.offload:
            for module in (generator, critic, frozen):
                if module is not None:
                    if self.bf16 and module is not frozen:
                        narrow(module.denoiser)  # a GAN head computes in float32
                    module.to(self.device)
        self._teacher_grid: Tensor | None = None  # samples, not decoded

    def _split(self, mesh: DeviceMesh, spec: MeshSpec) -> None:
        """Split every network over the processes, each once: adapters share one."""
        nets, critic = self.nets, self.nets.critic
        called: list[nn.Module | None] = [nets.generator.denoiser, self.ema.module.denoiser, self.teacher.denoiser]
        if critic is not None:
            # one optimizer takes no mixture: beside adapters, which are whole, the head stays whole too
            called += [critic.denoiser, None if isinstance(critic.denoiser, Adapted) else critic.head]
        shared = [module.base if isinstance(module, Adapted) else module for module in called if module is not None]
        split = [module for module in dict.fromkeys(shared) if spec.teacher or module is not self.teacher.denoiser]
        if not split:
            raise SettingsError(
                "train.mesh.teacher false leaves nothing to split: student and fake score are adapters on the teacher"
            )
        judge = critic.denoiser if critic is not None and critic.head is not None else None
        judge = judge.base if isinstance(judge, Adapted) else judge
        for module in split:
            read = critic.bottleneck if critic is not None and module is judge else ""
            head = critic is not None and module is critic.head  # computes in float32
            shard(module, mesh, self.bf16 and not head, read)
        for module in (nets.teacher, nets.generator, self.ema.module, critic):  # what is not split
            if module is not None:
                module.to(self.device)

    def begin(self, state: Mapping[str, Any]) -> None:
        """Start where another run stands instead of at the teacher.

        Args:
            state: weights by name: "generator", and where there are any "ema" (else the generator's) and "critic" (else
                the teacher's). A GAN head that only one of the two runs has starts afresh, or is left out.

        Raises:
            RuntimeError, KeyError: the weights are of another network.
        """
        distributed.fill(self.nets.generator, state["generator"])
        self.generator_stepper.adopt(self.nets.generator, state["generator"])
        if self.ema.own:
            distributed.fill(self.ema.module, state.get("ema", state["generator"]))
        critic = self.nets.critic
        if critic is None:
            return
        own = self.critic_stepper.state_of(critic)
        given = {name: value for name, value in state.get("critic", own).items() if not name.startswith("head.")}
        heads = {name: value for name, value in own.items() if name.startswith("head.")}
        given |= heads | {name: value for name, value in state.get("critic", {}).items() if name in heads}
        distributed.fill(critic, given)
        self.critic_stepper.adopt(critic, given)

    # -- one update ------------------------------------------------------------------------------------------------

    def update(self, images: int, micros: list[Micro]) -> dict[str, Any]:
        """One iteration: a critic update, and every `critic_steps`-th time a generator update before or after it."""
        objective, stats = self.objective, {}
        if not objective.needs_critic:
            self._generator_update(images, micros, self._steps(images), stats)
            return stats
        turn = images // self.train.batch_size % objective.critic_steps == 0
        steps = self._steps(images)
        if objective.critic_first:
            samples = self._critic_update(images, micros, steps, stats, gradient=turn and objective.share_rollout)
            if turn:
                self._generator_update(images, micros, steps, stats, samples if objective.share_rollout else None)
        else:
            samples = self._generator_update(images, micros, steps, stats) if turn else None
            self._critic_update(images, micros, steps, stats, samples if objective.share_rollout else None)
        return stats

    def _generator_update(
        self, images: int, micros: list[Micro], steps: int, stats: dict[str, Any], samples: list[Sample] | None = None
    ) -> list[Sample]:
        """Train the generator against a frozen critic, on `samples` that carry a graph or on fresh ones."""
        if self.nets.critic is not None:
            distributed.shards(self.nets.critic)  # after a forward without backward they are not what is registered
            self.nets.critic.requires_grad_(False).eval()  # no dropout in a score that is only read
        used = []
        for i, micro in enumerate(micros):
            x, cond = samples[i] if samples else self._rollout(micro, "generator rollout", steps, gradient=True)
            micro.reseed("generator loss")
            leaf = x.detach().requires_grad_()
            batch = self._batch(micro, cond, real=False)  # outside autocast, which knows no float16 on a CPU
            with self._autocast():
                terms = self.objective.generator_loss(self.nets, leaf, batch)
            gradients = {}
            for name, loss in terms.losses.items():
                leaf.grad = None  # a term of its own, not a difference of sums: it may be far smaller than the others
                (loss / len(micros)).backward()
                if leaf.grad is not None:
                    gradients[name] = leaf.grad
                _add(stats, f"loss/generator_{name}", loss.detach() / len(micros))
            for name, (other, ratio, most) in terms.balance.items():
                scale = ratio * gradients[other].norm() / gradients[name].norm().clamp(min=1e-12)
                scale = scale.clamp(max=most)
                gradients[name] = scale * gradients[name]
                _add(stats, f"balance/{name}", scale / len(micros))
            for name, gradient in gradients.items():
                _add(stats, f"x_gradient/{name}", gradient.norm())
            x.backward(sum(gradients.values(), torch.zeros_like(x)))
            used.append((leaf.detach(), cond))
            for name, value in terms.stats.items():
                _add(stats, name, value / len(micros))
            if i == 0:
                stats.update(_by_noise_level(terms.probe))
        drawn = torch.cat([x for x, _ in used])
        stats["x_mean"] = drawn.mean()
        if len(drawn) > 1:  # one sample has no spread
            stats["x_spread"] = drawn.std(0).mean()
        seen = images + self.train.batch_size
        stats["gradient_norm/generator"] = self.generator_stepper.step(seen)
        # each generator step stands for the images of the iterations up to the next one
        batch = self.train.batch_size * self.objective.critic_steps
        self.ema.update(self.nets.generator, seen, batch, self.generator_stepper.parameters)
        return used

    def _critic_update(
        self,
        images: int,
        micros: list[Micro],
        steps: int,
        stats: dict[str, Any],
        samples: list[Sample] | None = None,
        gradient: bool = False,
    ) -> list[Sample]:
        """Train fake score and GAN head on `samples` or on fresh ones, which carry a graph if `gradient`."""
        distributed.shards(self.nets.critic)
        self.nets.critic.requires_grad_(True).train()
        used = []
        for i, micro in enumerate(micros):
            x, cond = samples[i] if samples else self._rollout(micro, "critic rollout", steps, gradient)
            used.append((x, cond))
            micro.reseed("critic loss")
            batch = self._batch(micro, cond)
            with self._autocast():
                terms = self.objective.critic_loss(self.nets, x.detach(), batch)
            for name, loss in terms.losses.items():
                _add(stats, f"loss/critic_{name}", loss.detach() / len(micros))
            (sum(terms.losses.values()) / len(micros)).backward()
            for name, value in terms.stats.items():
                _add(stats, name, value / len(micros))
        stats["gradient_norm/critic"] = self.critic_stepper.step(images + self.train.batch_size)
        return used

    def _rollout(self, micro: Micro, phase: str, steps: int, gradient: bool) -> Sample:
        micro.reseed(phase)
        # samples for the fake score alone are drawn as the generator will be used, without dropout (SiD's program)
        self.nets.generator.train(gradient or self.objective.share_rollout)
        if self.objective.rolls_out_pairs:
            pairs = self._pairs(micro)
            noise, cond = [pairs.z], pairs.cond
        else:
            cond = self.teacher.conditioner.draw(micro.size, self.device)
            noise = [torch.randn(micro.size, *self.teacher.shape).to(self.device) for _ in range(steps)]
        with torch.set_grad_enabled(gradient), self._autocast():
            return self.nets.generator.rollout(noise, **cond), cond

    def _steps(self, images: int) -> int:
        """How many steps this iteration's rollouts take: one number for all samples on all processes."""
        count = self.nets.generator.steps
        return 1 if count == 1 else random.Random(derived_seed(self.train.seed, "steps", images)).randint(1, count)

    def _batch(self, micro: Micro, cond: dict[str, Tensor], real: bool = True) -> Batch:
        batch = Batch(cond)
        if real and self.objective.needs_real and self.real is not None:
            images, labels = self.real.batch(micro.position, micro.size, micro.then)
            batch.real = images.to(self.device)
            batch.real_cond = {
                k: v.to(self.device) for k, v in self.teacher.conditioner.cond(labels, micro.size).items()
            }
        if self.objective.needs_pairs:
            batch.pairs = self._pairs(micro)
        return batch

    def _pairs(self, micro: Micro) -> Pairs:
        indices = shuffled_indices(len(self.pairs), micro.position, micro.size, derived_seed(self.train.seed, "pairs"))
        return self.pairs.batch(indices, self.teacher.conditioner, self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    # -- what the run is worth ---------------------------------------------------------------------------------------

    def evaluate(self, images: int) -> dict[str, Any]:
        if self.scorer is None:
            return {}
        with self.generator_stepper.showing(self.ema.module, self.nets.generator) as generator:
            student = FewStep(generator, self.teacher.codec)
            return scored(self.scorer, self.watch, student, self.teacher.shape, self.teacher.conditioner, self.device)

    @torch.no_grad()
    def picture(self, images: int, folder: Path) -> dict[str, Path]:
        if not self.teacher.images:
            return {}
        with self.generator_stepper.showing(self.ema.module, self.nets.generator) as generator:
            drawn = {"student": self._draw(FewStep(generator), "the student")}
        drawn["panel"] = self._panel()
        first = self._teacher_grid is None  # one that is there already may be of a start with another teacher
        teacher = self._teacher_samples()
        if distributed.rank() != 0:
            return {}
        if first:
            save_grid(self._pictures(teacher), folder / "teacher.png", PANEL)
        return {
            name: save_grid(self._pictures(samples), folder / f"{name}-{images:012d}.png", PANEL)
            for name, samples in drawn.items()
        }

    def _pictures(self, samples: Tensor) -> Tensor:
        """Samples [n, *shape] as uint8 pictures, decoded a few at a time."""
        if self.teacher.codec is None:
            return to_uint8(samples)
        few = max(
            1, min(8, 2**22 // math.prod(self.teacher.picture_shape))
        )  # a decoder's features are many times its pictures
        return torch.cat(
            [to_uint8(self.teacher.codec.decode(part.to(self.device)).cpu()) for part in samples.split(few)]
        )

    def _labels(self, count: int) -> Tensor | None:
        """A class for each of `count` pictures, one column a class."""
        classes = self.teacher.conditioner.num_classes
        return torch.arange(count) % min(PANEL, classes) if classes else None

    def _draw(self, sampler: FewStep | ManyStep, whose: str) -> Tensor:
        """Samples of the same seeds and classes of any sampler, eighty or as many as their size allows, in this process."""
        shape, conditioner = self.teacher.shape, self.teacher.conditioner
        seeds = range(PANEL * max(1, min(8, 2**21 // math.prod(self.teacher.picture_shape) // PANEL)))
        labels = self._labels(len(seeds))
        drawn = generate(
            sampler,
            seeds,
            shape,
            conditioner,
            labels=labels,
            device=self.device,
            local=True,
            uint8=False,
            bf16=self._narrow,
            batch=2 * PANEL,  # the teacher's of a large network take minutes
            progress=lambda done: self.watch(f"drawing {whose}, {done} of {len(seeds)} pictures"),
        )
        return torch.cat(list(drawn))

    def _teacher_samples(self) -> Tensor:
        if self._teacher_grid is None:
            self._teacher_grid = self._draw(
                ManyStep(self.nets.teacher, TEACHER_CALLS, self.device), f"the teacher in {TEACHER_CALLS} calls"
            )
        return self._teacher_grid

    @torch.no_grad()
    def _panel(self) -> Tensor:
        """Rows: generator, then at three noise levels the noised sample, the teacher's and the fake score's
        prediction."""
        seeds = range(PANEL)
        shape, schedule = self.teacher.shape, self.nets.teacher.schedule
        cond = self.teacher.conditioner.cond(self._labels(PANEL), PANEL)
        cond = {name: value.to(self.device) for name, value in cond.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._narrow):
            x = FewStep(self.nets.generator)(seeds, shape, **cond)
            rows = [x]
            for ratio in (0.3, 1.0, 3.0):
                t = schedule.time(torch.full((PANEL,), ratio)).to(self.device)
                x_t = schedule.perturb(x, t, noise_of(seeds, shape, step=1000).to(self.device))
                rows += [x_t, self.nets.teacher(x_t, t, **cond)]
                if self.nets.critic is not None:
                    rows.append(self.nets.critic(x_t, t, cond))
        return torch.cat([row.float() for row in rows]).cpu()

    @property
    def _narrow(self) -> bool:
        """Whether networks give nothing but bfloat16: split ones and offloaded ones. Others are drawn in float32."""
        return self.bf16 and (self.sharded or self.train.offload)

    def nonfinite(self) -> str | None:
        nets = {"generator": self.nets.generator, "averaged generator": self.ema.module}
        if self.nets.critic is not None:
            nets["critic"] = self.nets.critic
        return next((f"{who}: {name}" for who, net in nets.items() if (name := distributed.nonfinite(net))), None)

    def cure(self, names: Sequence[str]) -> str:
        steppers = {"generator": self.generator_stepper, "critic": self.critic_stepper}
        specs = {
            f"optim.{player}": stepper.spec
            for player, stepper in steppers.items()
            if stepper is not None and any(player in name for name in names)
        }
        return cure(specs, self.bf16) + ", and begin a new run: --start-from that checkpoint, another --out"

    def advise(self, stats: dict[str, float]) -> Iterator[tuple[str, str]]:
        if stats.get("dm_unweighted"):
            yield (
                "no-gradient",
                f"{stats['dm_unweighted']:.1%} of the samples got no distribution matching gradient: the teacher's answer equals the "
                "sample, or is not finite (train.precision: fp32 shows which)",
            )
        real, fake = stats.get("gap_real"), stats.get("gap_fake")
        if real and fake and fake > 1.1 * real:
            yield (
                "critic-lags",
                f"the fake score denoises the generator's samples worse than the teacher does ({fake:.3f} against "
                f"{real:.3f}): "
                "raise optim.critic.lr or objective.critic-steps",
            )
        spread = stats.get("x_spread")
        if spread is not None and self.teacher.images:
            wanted = self._teacher_samples().std(0).mean().item()
            if spread < 0.5 * wanted:
                yield (
                    "collapse",
                    f"samples spread {spread:.3f} where the teacher's spread {wanted:.3f}: lower "
                    "optim.generator.lr or raise objective.critic-steps",
                )
            elif spread > 2 * wanted:
                yield (
                    "drift",
                    f"samples spread {spread:.3f} where the teacher's spread {wanted:.3f}: lower optim.generator.lr",
                )
        yield from self.objective.advise(stats)

    # -- what is kept ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {
            "generator": self.generator_stepper.state_of(self.nets.generator),
            "generator_optimizer": self.generator_stepper.state_dict(),
        }
        if self.ema.half_life > 0:  # else it is the generator
            state["ema"] = self.ema.module.state_dict()
        if self.nets.critic is not None:
            state["critic"] = self.critic_stepper.state_of(self.nets.critic)
            state["critic_optimizer"] = self.critic_stepper.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nets.generator.load_state_dict(state["generator"])
        self.generator_stepper.adopt(self.nets.generator, state["generator"])
        if self.ema.own:
            self.ema.module.load_state_dict(state["ema" if self.ema.half_life > 0 else "generator"])
        self.generator_stepper.load_state_dict(state["generator_optimizer"])
        if self.nets.critic is not None:
            self.nets.critic.load_state_dict(state["critic"])
            self.critic_stepper.adopt(self.nets.critic, state["critic"])
            self.critic_stepper.load_state_dict(state["critic_optimizer"])

    def blank(self, path: Sequence[str]) -> Tensor | None:
        steppers = {"generator_optimizer": self.generator_stepper, "critic_optimizer": self.critic_stepper}
        stepper = steppers.get(path[0])
        return stepper.blank(int(path[2]), path[3]) if stepper is not None and path[1] == "state" else None

    def export(self, folder: Path, images: int, scores: dict[str, Any]) -> None:
        card = self.card | {"images": images, "scores": scores}
        save_generator(folder / "student.safetensors", self.ema.module, self.teacher.student_spec, card)


def _network(part: Generator | Teacher | Critic) -> nn.Module:
    """The denoiser that computes: of adapters the shared one."""
    return part.denoiser.base if isinstance(part.denoiser, Adapted) else part.denoiser


def _add(stats: dict[str, Any], name: str, value: Tensor | float) -> None:
    stats[name] = stats[name] + value if name in stats else value


def _by_noise_level(probe: dict[str, Tensor]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """How far the two predictions are from x and from each other, overall and in quarters of the time axis.

    These say what the losses of these methods do not: whether the critic keeps up, and at which noise the two disagree.
    """
    if not probe:
        return {}
    gaps = {
        "gap_real": mean_abs(probe["x"] - probe["d_real"]),
        "gap_fake": mean_abs(probe["x"] - probe["d_fake"]),
        "gap_scores": mean_abs(probe["d_real"] - probe["d_fake"]),
    }
    stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {name: gap.mean() for name, gap in gaps.items()}
    level = (probe["t"] * BINS).long().clamp(0, BINS - 1)
    for index in range(BINS):
        inside = level == index
        some = inside.any()  # stays on the device: a sum and how many means it is, one or none
        for name, gap in gaps.items():
            mean = (gap * inside).sum() / inside.sum().clamp(min=1)
            stats[f"{name}/t{index / BINS:.2f}"] = (mean, some)
    return stats
