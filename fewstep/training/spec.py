"""Settings of the training loop: length, batch, precision, checkpoints, sharding."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from fewstep.system import distributed
from fewstep.system.device import Precision, pick_device, use_bf16
from fewstep.system.distributed import MeshSpec
from fewstep.system.record import Record

__all__ = ["TrainSpec"]


class TrainSpec(Record):
    """Settings of the training loop."""

    images: int = Field(gt=0)
    """Length of the run in images seen."""
    batch_size: int = Field(64, gt=0)
    """Images in one update, over all processes."""
    micro_batch: int | None = Field(None, gt=0)
    """Images in one forward; the rest of the batch is accumulated. None: the batch divided by the processes."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block of the networks and compute it again in the backward pass: less memory, about a
    third more work, the same numbers."""
    recompute_activations: bool = False
    """Between keeping all and `gradient_checkpointing`: keep the results of convolutions, matrix products and attention within
    blocks, and compute norms, activations and dropout again. The same numbers; hardly more work, but each operation costs the
    processor some microseconds more, which small networks feel."""
    offload: bool = False
    """Keep moments, averaged weights and float32 weights in the host's memory and step there. In bfloat16 the device then holds 2
    bytes of weight a trained parameter, and 2 of gradient in its turn, instead of 16 and 4; every update moves both over the
    bus. Gradients of several backward passes (micro-batches) add up in bfloat16, pictures are drawn in it. For one process."""
    swap_blocks: int = Field(0, ge=0)
    """Blocks of the frozen network that live in the host's memory and come to the device one by one, in each forward and in
    the backward pass, the next one on its way meanwhile. Needs `gradient_checkpointing`. The same numbers."""
    compile: bool = False
    """Compile the networks block by block with torch.compile (needs Triton on a GPU, a C++ compiler on a CPU): minutes at the
    start, and numbers that differ by rounding (with dropout, other draws). Not measured on a GPU yet; on a CPU it gains little."""
    seed: int = 0
    """Every random draw derives from it and from the images seen."""
    precision: Precision = "auto"
    """bf16 is autocast over float32 weights; fp32 is float32 throughout; tf32 the same with NVIDIA's faster products, which keep
    10 bits of each factor; auto chooses bf16 where the hardware multiplies it itself, else fp32."""
    mesh: MeshSpec = MeshSpec()
    """How processes share the networks: `shard: 8` splits each of them over 8 processes."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda if there is one."""
    threads: int | None = Field(None, gt=0)
    """CPU threads of each process; None leaves it to torch."""
    ema_half_life: float = Field(500_000, ge=0)
    """Half-life of the averaged weights in images; 0: no average is kept, the student is the generator as it is."""
    ema_ramp: float | None = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen so far; null for none."""
    log_every: int = Field(5_000, gt=0)
    """Images between lines of stats.jsonl."""
    evaluate_every: int | None = Field(50_000, gt=0)
    """Images between evaluations and pictures; null for none before the end."""
    checkpoint_every: int = Field(50_000, gt=0)
    """Images between checkpoints."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept; the best is kept besides."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the extra `wandb`)."""

    @model_validator(mode="after")
    def _divides(self) -> TrainSpec:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        return self

    @model_validator(mode="after")
    def _recomputes_once(self) -> TrainSpec:
        other = "gradient_checkpointing" if self.gradient_checkpointing else "compile" if self.compile else None
        if self.recompute_activations and other is not None:
            why = (
                "computes whole blocks again" if self.gradient_checkpointing else "chooses itself what to compute again"
            )
            raise ValueError(
                f"recompute_activations must be false beside {other}, which {why}, got true for both. Try: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _swaps(self) -> TrainSpec:
        if not self.swap_blocks:
            return self
        if not self.gradient_checkpointing:
            raise ValueError(
                f"swap_blocks must be 0 without gradient_checkpointing, got {self.swap_blocks}: the backward pass would keep every block "
                "that has come. Try: gradient_checkpointing true"
            )
        other = "compile" if self.compile else "mesh.shard" if self.mesh.splits else None
        if other is not None:
            raise ValueError(
                f"swap_blocks must be 0 beside {other}, which takes weights where they are, got {self.swap_blocks}. Try: leave one of "
                "them out"
            )
        return self

    def micro(self) -> tuple[int, int]:
        """Images a forward, and forwards an update, of this process.

        Raises:
            ValueError: the batch does not divide over the processes.
        """
        world = distributed.world_size()
        size = self.micro_batch or self.batch_size // world
        if self.batch_size % (size * world):
            raise ValueError(
                f"train.batch_size {self.batch_size} does not divide over {world} processes x micro-batches of {size}: "
                f"use a multiple of {size * world}"
            )
        return size, self.batch_size // (size * world)

    def torch_device(self) -> torch.device:
        """The device, `auto` resolved."""
        return pick_device(self.device)

    def bf16(self) -> bool:
        """Return whether networks run under bf16 autocast, `auto` resolved."""
        return use_bf16(self.precision, self.torch_device())
