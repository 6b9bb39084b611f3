"""A distillation as a `Task` for the trainer: teacher, generator, critic and their update.

Knows no method: this module rolls out the samples, the objective computes losses on them, and this module passes the
gradients to the networks. Every loss is differentiated with respect to the samples as a leaf, so that each term's gradient on
them can be logged before it flows through the generator.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Buckets, BucketStream, Draw, ImageDataset, Stream, shuffled_indices
from fewstep.diffusion.denoiser import Cond
from fewstep.diffusion.generator import Generator, Rollout, Transition
from fewstep.diffusion.noise import double_device
from fewstep.evaluation.perceptual import Perceptual
from fewstep.evaluation.scorer import Scorer, scored
from fewstep.formats.model import save_generator
from fewstep.methods import Batch, Nets, Objective, Pairs
from fewstep.methods.dp_dmd import anchor_loss
from fewstep.methods.pairs import PairSet
from fewstep.networks.lora import LoraSpec
from fewstep.students.sample import FewStep
from fewstep.teachers.base import Conditioner, Teacher
from fewstep.training.diagnostics import advice, by_noise_level
from fewstep.training.health import Health, HealthSpec
from fewstep.training.optim import OptimSpec
from fewstep.training.panels import Panels
from fewstep.training.player import Player, home, place
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro, Task, cure, derived_seed

__all__ = ["Distillation", "Setup"]

Sample = tuple[Rollout, Cond]  # generated samples and their condition


@dataclass(frozen=True)
class Setup:
    """Components of a distillation.

    Attributes:
        teacher: the diffusion model.
        times: the generator's normalised times.
        objective: the method.
        train: run settings.
        generator_optim: settings of the generator's optimizer.
        critic_optim: settings of the critic's optimizer.
        dataset: real images, if the objective needs them; in buckets if the teacher has several sizes.
        pairs: teacher pairs, if the objective needs them.
        perceptual: the distance for pairs.
        scorer: evaluates samples; None for no evaluation.
        provenance: provenance for the exported file.
        flip: mirror half of the real images.
        generator_lora: train adapters on the teacher's own network instead of a copy of it.
        critic_lora: the same for the fake score; with both, only one network is in memory.
        transition: the generator's transition from one call to the next.
        health: the probe of the student at each evaluation; None for none.
        drawn: prompts that the pictures show; None: the first that the run trains with.
    """

    teacher: Teacher
    times: tuple[float, ...]
    objective: Objective
    train: TrainSpec
    generator_optim: OptimSpec
    critic_optim: OptimSpec
    dataset: ImageDataset | Buckets | None = None
    pairs: PairSet | None = None
    perceptual: Perceptual | None = None
    scorer: Scorer | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    flip: bool = False
    generator_lora: LoraSpec | None = None
    critic_lora: LoraSpec | None = None
    transition: Transition = "renoise"
    health: HealthSpec | None = None
    drawn: Conditioner | None = None


class Distillation(Task):
    """Train a few-step generator against a frozen teacher and a learned critic.

    Attributes:
        nets: the networks, as objectives see them.
        generator: the student: network, average and optimizer.
        critic: the fake score, GAN head included; None for methods without one.
        swap: the frozen network's blocks at the host; None if all are on the device.
    """

    def __init__(self, setup: Setup) -> None:
        teacher, objective, train = setup.teacher, setup.objective, setup.train
        assert setup.dataset is not None or not objective.needs_real, "this objective needs real images"
        assert setup.pairs is not None or not objective.needs_pairs, "this objective needs pairs"
        objective.check(len(setup.times), setup.transition)
        self.setup, self.teacher, self.objective, self.train = setup, teacher, objective, train
        self.pairs, self.scorer = setup.pairs, setup.scorer
        seen = [known for part in (setup.dataset, setup.pairs) if (known := getattr(part, "fingerprint", None))]
        self.data = seen[0] if len(seen) == 1 else hashlib.sha256("".join(seen).encode()).hexdigest() if seen else None
        self.inputs = teacher.inputs("teacher")
        self.views: tuple[Teacher, ...] = (teacher,)
        self.drawn = Draw([1], 0)
        self.real: Stream | BucketStream | None = None
        seed = derived_seed(train.seed, "real")
        if isinstance(setup.dataset, Buckets):
            self.views = tuple(teacher.at(*size) for size in setup.dataset.sizes)
            self.drawn = Draw([len(part) for part in setup.dataset.parts], derived_seed(train.seed, "bucket"))
            self.real = BucketStream(setup.dataset, self.drawn, train.batch_size, seed)
        elif setup.dataset is not None:
            self.real = Stream(setup.dataset, seed, setup.flip)
        elif teacher.sizes:
            self.views = teacher.sizes
            self.drawn = Draw([1] * len(teacher.sizes), derived_seed(train.seed, "bucket"))
        self.device, self.bf16, self.sharded = train.torch_device(), train.bf16(), train.mesh.splits
        torch.manual_seed(train.seed)
        frozen = teacher.guided(objective.guidance_with).to(home(train)).requires_grad_(False).eval()
        generator = Generator(teacher.player(setup.generator_lora).to(home(train)), setup.times, setup.transition)
        critic = objective.make_critic(teacher, teacher.player(setup.critic_lora)) if objective.needs_critic else None
        self.generator = Player(
            "generator", generator, setup.generator_optim, train, averaged=True, optimizer_name="generator_optimizer"
        )
        self.critic = None
        if critic is not None:
            self.critic = Player(
                "critic", critic, setup.critic_optim, train, averaged=False, optimizer_name="critic_optimizer"
            )
        self.players: list[Player[Any]] = [self.generator, *([] if self.critic is None else [self.critic])]
        self.nets = Nets(generator, frozen, critic, setup.perceptual, teacher.conditioner.null)
        self.swap = place(self.players, frozen, train)
        self.health = Health(setup.health, teacher, self.nets, objective, train, self.sharded or train.offload)
        # split or offloaded networks compute only in bfloat16; others draw pictures in float32
        rounded = self.bf16 and (self.sharded or train.offload)
        self.panels = Panels(teacher, self.nets, self.device, rounded, setup.drawn)

    def begin(self, state: Mapping[str, Any]) -> None:
        """Start with another run's weights instead of the teacher's.

        Args:
            state: weights by name: "generator", and optionally "ema" (default: the generator's) and "critic" (default:
                the teacher's). A GAN head of this run alone starts from scratch; one of the other run alone is dropped.

        Raises:
            RuntimeError, KeyError: the weights are of another network.
        """
        self.generator.fill(state["generator"], state.get("ema", state["generator"]))
        if self.critic is None:
            return
        own = self.critic.weights()
        given = {name: value for name, value in state.get("critic", own).items() if not name.startswith("head.")}
        heads = {name: value for name, value in own.items() if name.startswith("head.")}
        given |= heads | {name: value for name, value in state.get("critic", {}).items() if name in heads}
        self.critic.fill(given)

    # -- one update ------------------------------------------------------------------------------------------------

    def update(self, images: int, micros: list[Micro]) -> dict[str, Any]:
        """Update the critic, and in every `critic_steps`-th iteration the generator before or after it."""
        objective = self.objective
        stats: dict[str, Any] = {}
        if not objective.needs_critic:
            self._generator_update(images, micros, self.steps(images), stats)
            return stats
        both = images // self.train.batch_size % objective.critic_steps == 0
        steps = self.steps(images)
        if objective.critic_first:
            drawn = self._critic_update(images, micros, steps, stats, gradient=both and objective.share_rollout)
            if both:
                self._generator_update(images, micros, steps, stats, drawn if objective.share_rollout else None)
        else:
            samples = self._generator_update(images, micros, steps, stats) if both else None
            self._critic_update(images, micros, steps, stats, samples if objective.share_rollout else None)
        return stats

    def _generator_update(
        self, images: int, micros: list[Micro], steps: int, stats: dict[str, Any], samples: list[Sample] | None = None
    ) -> list[Sample]:
        """Update the generator against a frozen critic, on `samples` with a graph or on fresh ones."""
        if self.critic is not None:
            self.critic.trainable(False)
        used = []
        for i, micro in enumerate(micros):
            made, cond = samples[i] if samples else self._rollout(micro, "generator rollout", steps, gradient=True)
            micro.reseed("generator loss")
            x = made.x
            leaf = x.detach().requires_grad_()
            # outside autocast, which does not support float16 on a CPU
            batch = self._batch(micro, made, cond, images, real=False)
            with self._autocast():
                terms = self.objective.generator_loss(self.nets, leaf, batch)
                if self.objective.anchor and made.step == 0:
                    pull = anchor_loss(self.nets, leaf, batch, self.objective.anchor_share, self.objective.anchor_steps)
                    terms.losses["anchor"] = self.objective.anchor * pull
            gradients: dict[str, Tensor] = {}
            for name, loss in terms.losses.items():
                leaf.grad = None  # a separate gradient, not a difference of sums: it may be far smaller than the others
                last = name == next(reversed(terms.losses))
                (loss / len(micros)).backward(retain_graph=terms.one_graph and not last)
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
            if x.requires_grad:  # real images do not
                x.backward(sum(gradients.values(), torch.zeros_like(x)))
            used.append((made._replace(x=leaf.detach()), cond))
            for name, value in terms.stats.items():
                _add(stats, name, value / len(micros))
            if i == 0:
                stats.update(by_noise_level(terms.probe))
        if self.objective.starts_from != "images":
            drawn = torch.cat([made.x for made, _ in used])
            stats["x_mean"] = drawn.mean()
            if len(drawn) > 1:  # one sample has no spread
                stats["x_spread"] = drawn.std(0).mean()
        # a generator step counts the images of all iterations up to the next one
        count = self.train.batch_size * self.objective.critic_steps
        stats["gradient_norm/generator"] = self.generator.step(images + self.train.batch_size, count)
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
        """Update fake score and GAN head on `samples` or on fresh ones, with a graph if `gradient`."""
        assert self.critic is not None
        self.critic.trainable(True)
        used = []
        for i, micro in enumerate(micros):
            made, cond = samples[i] if samples else self._rollout(micro, "critic rollout", steps, gradient)
            used.append((made, cond))
            micro.reseed("critic loss")
            batch = self._batch(micro, made, cond, images)
            with self._autocast():
                terms = self.objective.critic_loss(self.nets, made.x.detach(), batch)
            for name, loss in terms.losses.items():
                _add(stats, f"loss/critic_{name}", loss.detach() / len(micros))
            (sum(terms.losses.values(), torch.zeros((), device=self.device)) / len(micros)).backward()
            for name, value in terms.stats.items():
                _add(stats, name, value / len(micros))
        stats["gradient_norm/critic"] = self.critic.step(images + self.train.batch_size, self.train.batch_size)
        return used

    def _rollout(self, micro: Micro, phase: str, steps: int, gradient: bool) -> Sample:
        micro.reseed(phase)
        # samples only for the fake score are drawn without dropout, as in inference (SiD's program)
        self.nets.generator.train(gradient or self.objective.share_rollout)
        if self.objective.starts_from == "images":
            x, cond = self._images(micro)
            return Rollout(x, 0, x, torch.zeros(len(x), dtype=torch.float64, device=double_device(self.device))), cond
        if self.objective.starts_from == "pairs":
            pairs = self._pairs(micro)
            noise, cond = [pairs.z], pairs.cond
        else:
            view = self._view(micro)
            cond = view.conditioner.draw(micro.size, self.device)
            noise = [torch.randn(micro.size, *view.shape).to(self.device) for _ in range(steps)]
        with torch.set_grad_enabled(gradient), self._autocast():
            return self.nets.generator.rollout(noise, **cond), cond

    def _view(self, micro: Micro) -> Teacher:
        """The teacher at the size of picture of this iteration, the same on all processes."""
        return self.views[self.drawn.at(micro.position // self.train.batch_size)[0]]

    def steps(self, images: int) -> int:
        """Draw the number of rollout steps of this iteration, equal for all samples on all processes."""
        count = self.nets.generator.steps
        return 1 if count == 1 else random.Random(derived_seed(self.train.seed, "steps", images)).randint(1, count)

    def _batch(self, micro: Micro, made: Rollout, cond: Cond, images: int, real: bool = True) -> Batch:
        batch = Batch(cond, made.step, made.x_t, images=images)
        if real and self.objective.needs_real and self.real is not None:
            batch.real, batch.real_cond = self._images(micro)
        if self.objective.needs_pairs:
            batch.pairs = self._pairs(micro)
        return batch

    def _images(self, micro: Micro) -> tuple[Tensor, Cond]:
        """The real images of a micro-batch, and their conditions."""
        assert self.real is not None
        images, labels = self.real.batch(micro.position, micro.size, micro.then)
        cond = self._view(micro).conditioner.cond(labels, micro.size)
        return images.to(self.device), {name: value.to(self.device) for name, value in cond.items()}

    def _pairs(self, micro: Micro) -> Pairs:
        assert self.pairs is not None
        indices = shuffled_indices(len(self.pairs), micro.position, micro.size, derived_seed(self.train.seed, "pairs"))
        return self.pairs.batch(indices, self.teacher.conditioner, self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    # -- evaluation and pictures ---------------------------------------------------------------------------------------

    def evaluate(self, images: int) -> dict[str, Any]:
        with self.generator.averaged() as generator:
            found = self.health.measure(
                images, generator, self._rollout, self._images if self.real else None, self.watch
            )
            if self.scorer is None:
                return found
            student = FewStep(generator, self.teacher.codec)
            score = scored(self.scorer, self.watch, student, self.teacher.shape, self.teacher.conditioner, self.device)
            return score | found

    def picture(self, images: int, folder: Path) -> dict[str, Path]:
        if not self.teacher.images:
            return {}
        with self.generator.averaged() as generator:
            return self.panels.save(generator, images, folder, self.watch)

    def nonfinite(self) -> str | None:
        return next((found for player in self.players if (found := player.nonfinite()) is not None), None)

    def cure(self, names: Sequence[str]) -> str:
        specs = {
            f"optim.{player.name}": player.optim
            for player in self.players
            if any(player.name in name for name in names)
        }
        return cure(specs, self.bf16) + ", and start a new run with --start-from that checkpoint and another --out"

    def advise(self, stats: dict[str, float]) -> Iterator[tuple[str, str]]:
        spread = None
        if self.teacher.images and "x_spread" in stats:
            spread = self.panels.teacher_samples(self.watch).std(0).mean().item()
        yield from advice(stats, spread)
        yield from self.objective.advise(stats)
        yield from self.health.advise(stats)

    # -- saving and loading ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {name: value for player in self.players for name, value in player.state_dict().items()}
        return state | ({"health": self.health.history} if self.health.count else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for player in self.players:
            player.load_state_dict(state)
        self.health.history = list(state.get("health", []))  # checkpoints of earlier versions have no such entry

    def destination(self, path: Sequence[str]) -> Tensor | None:
        return next((found for p in self.players if (found := p.destination(path)) is not None), None)

    def export(self, folder: Path, images: int, scores: dict[str, Any]) -> None:
        provenance = {**self.setup.provenance, "images": images, "scores": scores}
        save_generator(folder / "student.safetensors", self.generator.average, self.teacher.student_spec, provenance)


def _add(stats: dict[str, Any], name: str, value: Tensor | float) -> None:
    stats[name] = stats[name] + value if name in stats else value
