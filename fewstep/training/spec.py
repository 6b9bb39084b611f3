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

    images: int = Field(gt=0, le=10**15)
    """Length of the run in images seen."""
    batch_size: int = Field(64, gt=0, le=2**20)
    """Images in one update, over all processes."""
    micro_batch: int | None = Field(None, gt=0)
    """Images in one forward; gradients accumulate over the batch. null: the batch divided by the processes."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block and recompute the block in the backward pass: less memory, about a third more work,
    the same numbers."""
    recompute_activations: bool = False
    """Keep the results of convolutions, matrix products and attention within blocks, and recompute norms, activations and
    dropout: less memory than without, more than with `gradient_checkpointing`. The same numbers and hardly more work, but each
    operation costs the CPU some microseconds more, which slows small networks."""
    offload: bool = False
    """Keep moments, averaged weights and float32 weights in host memory and step there. In bfloat16 the device then holds 2
    bytes of weight per trained parameter, and 2 of gradient during its update, instead of 16 and 4; every update transfers
    both. Gradients of several micro-batches accumulate in bfloat16, and pictures are drawn in it. For one process."""
    swap_blocks: int = Field(0, ge=0)
    """Blocks of the frozen network that live in the host's memory and come to the device one by one, in each forward and in
    the backward pass, the next one on its way meanwhile. Needs `gradient_checkpointing`. The same numbers."""
    compile: bool = False
    """Compile the networks block by block with torch.compile (needs Triton on a GPU, a C++ compiler on a CPU). Takes minutes
    at the start; numbers differ by rounding (with dropout, by its draws). Not measured on a GPU yet; on a CPU it gains little."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Random seed; every random draw depends on it and on the images seen."""
    precision: Precision = "auto"
    """bf16: autocast over float32 weights. fp32: float32 throughout. tf32: float32 with NVIDIA's faster matrix products, which
    keep 10 bits of each factor. auto: bf16 if the hardware supports it natively, else fp32."""
    mesh: MeshSpec = MeshSpec()
    """How processes share the networks: `shard: 8` splits each of them over 8 processes."""
    device: str = "auto"
    """cpu, cuda, or auto (cuda if available)."""
    threads: int | None = Field(None, gt=0)
    """CPU threads of each process; null: torch's default."""
    ema_half_life: float = Field(500_000, ge=0)
    """Half-life of the averaged weights in images; 0: no average, the student is the generator itself."""
    ema_ramp: float | None = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen so far; null for none."""
    log_every: int = Field(5_000, gt=0)
    """Images between lines of stats.jsonl."""
    evaluate_every: int | None = Field(50_000, gt=0)
    """Images between evaluations and pictures; null for none before the end."""
    checkpoint_every: int = Field(50_000, gt=0)
    """Images between checkpoints."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best one."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the extra `wandb`)."""

    @model_validator(mode="after")
    def _divides(self) -> TrainSpec:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"`batch_size` must be a multiple of micro_batch {self.micro_batch}, got {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _recomputes_once(self) -> TrainSpec:
        other = "gradient_checkpointing" if self.gradient_checkpointing else "compile" if self.compile else None
        if self.recompute_activations and other is not None:
            why = "recomputes whole blocks" if self.gradient_checkpointing else "chooses itself what to recompute"
            raise ValueError(
                f"recompute_activations must be false with {other}, which {why}, got true for both. Try: leave one of them out"
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
                f"swap_blocks must be 0 with {other}, which requires weights to stay in place, got {self.swap_blocks}. Try: leave one of "
                "them out"
            )
        return self

    def micro(self) -> tuple[int, int]:
        """Images per forward and forwards per update of this process.

        Raises:
            ValueError: the batch does not divide over the processes.
        """
        world = distributed.world_size()
        size = self.micro_batch or self.batch_size // world
        if self.batch_size % (size * world):
            raise ValueError(
                f"`train.batch_size` must divide over {world} processes x micro-batches of {size}, got {self.batch_size}. "
                f"Try: a multiple of {size * world}"
            )
        return size, self.batch_size // (size * world)

    def torch_device(self) -> torch.device:
        """Device of the run, with `auto` resolved."""
        return pick_device(self.device)

    def bf16(self) -> bool:
        """Return whether networks run under bf16 autocast, with `auto` resolved."""
        return use_bf16(self.precision, self.torch_device())
