"""Trained networks of a run: weights, average, optimizer, and their placement.

A task trains one or two `Player`s against at most one frozen network. `place` applies the memory and speed settings
(compilation, recomputation, splitting, offload) to all of them together, because adapters share one network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import Guided
from fewstep.methods.base import Critic
from fewstep.networks.lora import Adapted
from fewstep.networks.placement import (
    compile_blocks,
    narrow,
    normalise_weights,
    recompute_blocks,
    refuse_normalised,
    shard,
)
from fewstep.networks.swapping import Swap, swap_blocks
from fewstep.system import distributed
from fewstep.system.errors import SettingsError
from fewstep.training.ema import Ema
from fewstep.training.optim import OptimSpec, Stepper
from fewstep.training.spec import TrainSpec

__all__ = ["Player", "place", "shared_network"]


Network = TypeVar("Network", bound=nn.Module)


class Player(Generic[Network]):
    """One trained network with its average and its optimizer.

    Args:
        name: the network's name in checkpoints and messages, such as "generator".
        module: the network, with float32 weights: a generator, a critic or a denoiser.
        optim: settings of its optimizer.
        train: settings of the run.
        averaged: keep an exponential moving average of its weights.
        optimizer_name: name of the optimizer's state in checkpoints.

    Attributes:
        average: the network with averaged weights; `module` itself without averaging.
        stepper: the optimizer, after `place`.
    """

    stepper: Stepper

    def __init__(
        self,
        name: str,
        module: Network,
        optim: OptimSpec,
        train: TrainSpec,
        *,
        averaged: bool,
        optimizer_name: str,
    ) -> None:
        self.name, self.optim, self.train, self.optimizer_name = name, optim, train, optimizer_name
        self.module = module.to(home(train))
        normalise_weights(module)
        self.ema = Ema(module, train.ema_half_life if averaged else 0, train.ema_ramp, averaged and train.offload)

    @property
    def average(self) -> Network:
        return cast(Network, self.ema.module)

    def step(self, images: int, batch: int) -> Tensor:
        """Apply the accumulated gradients and update the average; returns the gradient norm before clipping (scalar).

        Args:
            images: images seen after this step.
            batch: images that this step accounts for.
        """
        norm = self.stepper.step(images)
        normalise_weights(self.module)
        self.ema.update(self.module, images, batch, self.stepper.parameters)
        return norm

    def trainable(self, wanted: bool) -> None:
        """Make the network trainable (with dropout), or freeze it (without dropout) during another network's update."""
        distributed.shards(self.module)  # a forward without backward leaves full parameters registered
        self.module.requires_grad_(wanted).train(wanted)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """Yield a module in eval mode that computes on the run's device with averaged weights.

        If the average is not on the device, the trained network's memory holds it: do not step meanwhile.
        """
        if self.stepper.host is None and self.ema.own:
            yield self.average
            return
        # adapters share a frozen network that is never in training mode: restore the mode of each part
        modes = [(part, part.training) for part in self.module.modules()]
        try:
            if self.stepper.host is None:
                yield self.module.eval()
            else:
                with self.stepper.host.replaced_by(self.average.parameters()):
                    yield self.module.eval()
        finally:
            if self.stepper.host is None:
                distributed.shards(self.module)
            for part, training in modes:
                part.training = training

    def weights(self) -> dict[str, Tensor]:
        """State of the network in full precision."""
        return self.stepper.state_of(self.module)

    def fill(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor] | None = None) -> None:
        """Load full tensors; a split network takes its part.

        Args:
            weights: the network's weights.
            average: the averaged weights, if it has a separate average; None: `weights`.

        Raises:
            RuntimeError, KeyError: the weights are of another network.
        """
        distributed.fill(self.module, weights)
        self.stepper.load_master_weights(self.module, weights)
        if self.ema.own:
            distributed.fill(self.average, weights if average is None else average)

    def nonfinite(self) -> str | None:
        """Name of a weight or averaged weight that is not finite on any process; called on all processes."""
        nets = {self.name: self.module} | ({f"averaged {self.name}": self.average} if self.ema.own else {})
        return next((f"{who}: {name}" for who, net in nets.items() if (name := distributed.nonfinite(net))), None)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state and average by their names in checkpoints."""
        state = {self.name: self.weights(), self.optimizer_name: self.stepper.state_dict()}
        return state | ({"ema": self.average.state_dict()} if self.ema.half_life > 0 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; other entries are ignored."""
        self.module.load_state_dict(state[self.name])
        self.stepper.load_master_weights(self.module, state[self.name])
        if self.ema.own:
            self.average.load_state_dict(state["ema" if self.ema.half_life > 0 else self.name])
        self.stepper.load_state_dict(state[self.optimizer_name])

    def destination(self, path: Sequence[str]) -> Tensor | None:
        """Tensor to read a missing entry of the optimizer's state into; None for anything else."""
        if list(path[:2]) != [self.optimizer_name, "state"]:
            return None
        return self.stepper.destination(int(path[2]), path[3])


def home(train: TrainSpec) -> torch.device:
    """Device on which networks are built: the run's device, or the CPU if they are split, rounded or swapped afterwards."""
    device = train.torch_device()
    swaps = train.swap_blocks and device.type != "meta"
    return torch.device("cpu") if train.mesh.splits or train.offload or swaps else device


def place(players: Sequence[Player[Any]], frozen: Denoiser | None, train: TrainSpec) -> Swap | None:
    """Compile, recompute, split, round and move the networks according to the settings, and make the optimizers.

    Compilation and recomputation precede splitting. Optimizers are made after splitting and keep float32 copies of weights
    that are rounded afterwards.

    Args:
        players: the trained networks, on the device `home`.
        frozen: the frozen network, guided or not, if any.
        train: settings of the run.

    Returns:
        The frozen network's blocks in host memory, if any.

    Raises:
        SettingsError: one of the networks does not support a setting.
    """
    device, bf16 = train.torch_device(), train.bf16()
    if train.offload:
        refuse_normalised([player.module for player in players])
    mesh = train.mesh.build(device)
    modules: list[nn.Module] = [*(player.module for player in players), *([] if frozen is None else [frozen])]
    if train.compile:
        read: dict[Denoiser, str] = {}  # network -> layer of it that a GAN head reads; adapters share one
        for module in modules:
            network = shared_network(module)
            read[network] = _read_layer(module) or read.get(network, "")
        for network, layer in read.items():
            compile_blocks(network, layer)
    swap = None
    if train.swap_blocks and frozen is not None:
        swap = swap_blocks(shared_network(frozen), train.swap_blocks, device)
        for moved in [*modules, *(player.average for player in players)]:
            if not train.offload:
                moved.to(device)
    if train.gradient_checkpointing or train.recompute_activations:
        # also of the frozen network: SiD's gradients flow through it
        for denoiser in dict.fromkeys(map(shared_network, modules)):
            recompute_blocks(denoiser, between=train.recompute_activations)
    if mesh is not None:
        _split(players, frozen, train, mesh)
    for player in players:
        player.stepper = Stepper(player.optim, [player.module], train.images, device if train.offload else None)
    if train.offload:
        for module in modules:
            if bf16 and module is not frozen:
                narrow(_denoiser(module))  # a GAN head computes in float32
            module.to(device)
    return swap


def _split(players: Sequence[Player[Any]], frozen: Denoiser | None, train: TrainSpec, mesh: Any) -> None:
    """Split every network over the processes, each only once: adapters share one."""
    layers: dict[nn.Module, str] = {}  # network -> layer of it that a GAN head reads
    heads: set[nn.Module] = set()  # compute in float32
    teacher = None if frozen is None else shared_network(frozen)
    if teacher is not None and train.mesh.teacher:
        layers[teacher] = ""
    trained = [module for player in players for module in (player.module, player.average)]
    for module in trained:
        network = shared_network(module)
        if network is not teacher or train.mesh.teacher:
            layers[network] = _read_layer(module) or layers.get(network, "")
        # an optimizer cannot mix split and whole parameters: with adapters, which are whole, the head stays whole
        if isinstance(module, Critic) and module.head is not None and network is module.denoiser:
            layers[module.head] = ""
            heads.add(module.head)
    if not layers:
        raise SettingsError(
            "`train.mesh.teacher` must be true if student and fake score are adapters on the teacher, got false. Try: "
            "leave it out"
        )
    for module, layer in layers.items():
        shard(module, mesh, train.bf16() and module not in heads, layer)
    for module in [*trained, *([] if frozen is None else [frozen])]:
        module.to(train.torch_device())  # the parts that are not split


def _denoiser(module: nn.Module) -> Denoiser:
    """Denoiser inside a generator, a critic, or guidance."""
    if isinstance(module, Generator | Critic | Guided):
        return module.denoiser
    assert isinstance(module, Denoiser)
    return module


def shared_network(module: nn.Module) -> Denoiser:
    """Denoiser inside a generator, a critic, or guidance; for adapters, the network they act on."""
    denoiser = _denoiser(module)
    return cast(Denoiser, denoiser.base) if isinstance(denoiser, Adapted) else denoiser


def _read_layer(module: nn.Module) -> str:
    """Path of the layer in a critic's denoiser that its GAN head reads."""
    return module.bottleneck if isinstance(module, Critic) and module.head is not None else ""
