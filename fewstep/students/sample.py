"""Sampling from seeds: one random generator per seed, so a seed gives the same image at any batch size and process count."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data import to_uint8
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.solvers import Solver
from fewstep.system import distributed
from fewstep.system.errors import SettingsError
from fewstep.system.out_folder import check_out, write_marker
from fewstep.system.pictures import save_grid
from fewstep.teachers.base import Codec, Conditioner

__all__ = [
    "FewStep", "ManyStep", "Sampler", "balanced_labels", "check_place", "generate", "noise_of", "parse_calls", "parse_classes",
    "parse_seeds", "write_pictures", "write_samples",
]  # fmt: skip


def noise_of(seeds: Sequence[int], shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Unit Gaussian noise [len(seeds), *shape], drawn per seed; `step` counts the draws of a seed."""
    rows = []
    for seed in seeds:
        digest = hashlib.sha256(f"sample/{seed}/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def balanced_labels(seeds: Sequence[int], num_classes: int) -> Tensor | None:
    """Class `seed mod num_classes` of each seed: balanced over consecutive seeds."""
    return torch.tensor([seed % num_classes for seed in seeds]) if num_classes else None


class Sampler(Protocol):
    """Interface of a sampler: seeds and conditions -> clean samples."""

    calls: int
    """Network calls per image."""
    codec: Codec | None
    """Decoder of the samples; None for pixels."""

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], **cond: Tensor) -> Tensor:
        """Clean samples [len(seeds), *shape], or pictures if there is a codec."""


class FewStep:
    """Sampler of a few-step generator; decodes with the codec, if any."""

    def __init__(self, generator: Generator, codec: Codec | None = None) -> None:
        self.generator, self.codec, self.calls = generator, codec, generator.steps

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], **cond: Tensor) -> Tensor:
        device = next(self.generator.parameters()).device
        noise = [noise_of(seeds, shape, step).to(device) for step in range(self.calls)]
        samples = self.generator(noise, **cond)
        return self.codec.decode(samples) if self.codec else samples


class ManyStep:
    """Sampler of a teacher with a solver, EDM's by default; decodes with the codec, if any."""

    def __init__(
        self,
        denoiser: Denoiser,
        evaluations: int,
        device: torch.device | str = "cpu",
        solver: Solver = Solver(),  # noqa: B008  (frozen)
        codec: Codec | None = None,
    ) -> None:
        self.denoiser, self.calls, self.device, self.solver, self.codec = denoiser, evaluations, device, solver, codec

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], **cond: Tensor) -> Tensor:
        def fresh(step: int) -> Tensor:
            return noise_of(seeds, shape, step + 1)  # 0 is the initial noise

        noise = noise_of(seeds, shape).to(self.device)
        samples = self.solver(self.denoiser, noise, self.calls, fresh, **cond)
        return self.codec.decode(samples) if self.codec else samples


@torch.no_grad()
def generate(
    sampler: Sampler,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    conditioner: Conditioner,
    *,
    labels: Tensor | None = None,
    batch: int = 250,
    bf16: bool = False,
    device: torch.device | str = "cpu",
    uint8: bool = True,
    local: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Tensor]:
    """Generate samples for `seeds` in batches; under torchrun each process makes its share and all receive all of them.

    Args:
        sampler: the sampler.
        seeds: one per sample.
        shape: shape of one sample.
        conditioner: labels -> conditions.
        labels: class of each sample [len(seeds)]; None: balanced, class = seed mod classes.
        batch: samples per batch over all processes; affects speed and memory, never an image.
        bf16: autocast the network.
        device: device of the network.
        uint8: quantise to 8-bit images; otherwise yield float32 samples.
        local: make all samples in this process, also under torchrun.
        progress: called with the number of samples done.

    Yields:
        uint8 [n, C, H, W] (or float32), in the order of the seeds: samples, or pictures if the sampler decodes.

    Raises:
        SettingsError: a batch below 1, another number of labels than of seeds, or a sample that is not finite.
    """
    seeds = list(seeds)
    if batch < 1:
        raise SettingsError(f"`batch` must be at least 1, got {batch}. Try: 250")
    if labels is not None and len(labels) != len(seeds):
        raise SettingsError(f"`labels` must be one for each of {len(seeds)} seeds, got {len(labels)}")
    labels = balanced_labels(seeds, conditioner.num_classes) if labels is None else labels
    world, rank = (1, 0) if local else (distributed.world_size(), distributed.rank())
    for start in range(0, len(seeds), batch):
        chunk = seeds[start : start + batch]
        padded = len(chunk) + -len(chunk) % world  # every process needs the same number of rows to gather
        mine = [min(start + i, len(seeds) - 1) for i in range(rank, padded, world)]
        cond = conditioner.cond(None if labels is None else labels[mine], len(mine))
        cond = {name: value.to(device) for name, value in cond.items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else nullcontext():
            samples = sampler([seeds[i] for i in mine], shape, **cond).float().cpu()
        whole = torch.isfinite(samples).flatten(1).all(1)
        bad = whole.logical_not().nonzero()
        if bad.numel() if local else distributed.any_rank(bool(bad.numel())):
            which = f"of seed {seeds[mine[int(bad[0])]]}" if bad.numel() else "of another process"
            raise SettingsError(
                f"the sample {which} is not finite (NaN or infinity): the weights are damaged, or the network overflowed. "
                "Try: float32 instead of bfloat16, or an earlier checkpoint"
            )
        samples = to_uint8(samples) if uint8 else samples
        yield (samples if local else distributed.gather_images(samples))[: len(chunk)]
        progress(min(start + batch, len(seeds)))


def parse_seeds(text: str) -> list[int]:
    """Parse `0-63` or `3,7,100-120` into a list.

    Raises:
        SettingsError: not of that form.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        first, last = found.groups() if found else ("", "")
        if not first or (last and int(last) < int(first)):
            raise SettingsError(
                f"`seeds` must be numbers and rising ranges, got {part!r} in {text!r}. Try: 0-63 or 3,7,100-120"
            )
        if int(last or first) >= 2**63:  # the limit of int64 arrays
            raise SettingsError(f"`seeds` must be below 2**63, got {part!r}. Try: 0-63")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def parse_calls(text: str) -> list[int]:
    """Parse numbers of network calls, such as `35,18,9`; `0` alone means none.

    Raises:
        SettingsError: not whole numbers above 0, or one given twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if parts == ["0"]:
        return []
    for index, part in enumerate(parts):
        if not (part.isascii() and part.isdigit()) or int(part) < 1:
            raise SettingsError(
                f"`evaluations` must be whole numbers of network calls, each at least 1, got {part!r} in {text!r}. "
                "Try: 35 or 35,18,9"
            )
        if part in parts[:index]:
            raise SettingsError(f"`evaluations` must name each number once, got {part} twice in {text!r}. Try: 35,18,9")
    return [int(part) for part in parts]


def parse_classes(wanted: str | Sequence[str | int] | None, conditioner: Conditioner, count: int) -> Tensor | None:
    """Parse classes by number or name, cycled over `count` samples: int64 [count]; None for None.

    Args:
        wanted: names and numbers, as one text separated by commas or one by one.
        conditioner: of the model.
        count: number of samples.

    Raises:
        SettingsError: a class that does not exist, or more classes than samples.
    """
    if wanted is None:
        return None
    known = ", ".join(
        f"{i} {name}".strip() for i, name in enumerate(conditioner.names or [""] * conditioner.num_classes)
    )
    names = {name.lower(): i for i, name in enumerate(conditioner.names)}
    classes = []
    if isinstance(wanted, str) and wanted.strip().lower() in names:  # a name may hold a comma
        wanted = [wanted]
    for part in (str(part).strip() for part in (wanted.split(",") if isinstance(wanted, str) else wanted)):
        label = int(part) if part.isascii() and part.isdigit() else names.get(part.lower())
        if label is None or label >= conditioner.num_classes:
            near = difflib.get_close_matches(part.lower(), names, 1)
            raise SettingsError(
                f"`classes` must be of {known or 'a model with classes'}, got {part!r}"
                + (f". Did you mean {conditioner.names[names[near[0]]]}?" if near else "")
            )
        classes.append(label)
    if len(classes) > count:
        raise SettingsError(
            f"`classes` must be at most one per seed, got {len(classes)} for {count} seeds. Try: --seeds 0-{len(classes) - 1}"
        )
    return torch.tensor([classes[i % len(classes)] for i in range(count)])


def write_samples(
    sampler: Sampler,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    conditioner: Conditioner,
    out: Path,
    *,
    labels: Tensor | None = None,
    batch: int = 250,
    device: torch.device | str = "cpu",
    columns: int = 8,
    scale: int = 2,
) -> int:
    """Write samples as a grid (`out` ends in .png), arrays (.npz: images, labels, seeds) or a folder `<seed>.png`.

    Returns their number. Raises SettingsError for samples that are not pictures, another file extension, or a folder in
    which files would overwrite each other.
    """
    picture = sampler.codec.shape if sampler.codec else shape
    check_place(out, seeds, picture, columns, scale)
    batches = generate(sampler, seeds, shape, conditioner, labels=labels, batch=batch, device=device, local=True)
    used = balanced_labels(seeds, conditioner.num_classes) if labels is None else labels
    write_pictures(batches, seeds, used, out, columns, scale)
    return len(seeds)


def check_place(
    out: Path, seeds: Sequence[int], shape: tuple[int, ...], columns: int, scale: int, setting: str = "--out"
) -> None:
    """Refuse what `write_pictures` cannot write to `out`, before anything is sampled.

    Raises:
        SettingsError: samples that are not pictures, another file extension, numbers below 1, or a folder in which files would
            overwrite each other.
        FileError: the folder holds other files.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise SettingsError(f"samples must be pictures of 1 or 3 channels to be written, got shape {list(shape)}")
    if out.suffix not in ("", ".png", ".npz"):
        raise SettingsError(f"`{setting}` must be a .png (grid), a .npz (arrays) or a folder, got {out}")
    if out.suffix == "" and len(set(seeds)) < len(seeds):
        raise SettingsError(
            f"`{setting}` must not be a folder (one file per seed) if a seed is given twice, got {out}. Try: a .png"
        )
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise SettingsError(f"`{name}` must be at least 1, got {value}. Try: 8")
    if out.suffix == "":
        check_out(out, "samples")


def write_pictures(
    batches: Iterable[Tensor], seeds: Sequence[int], labels: Tensor | None, out: Path, columns: int, scale: int
) -> None:
    """Write uint8 pictures [N, C, H, W] that come in batches. See `write_samples` and `check_place`."""
    if out.suffix == "":
        out.mkdir(parents=True, exist_ok=True)
        write_marker(out, "samples")
        numbers = iter(seeds)
        for images in batches:
            for image in images:
                save_grid(image[None], out / f"{next(numbers):06d}.png", columns=1, scale=1, gap=0)
        return
    images = torch.cat(list(batches))
    if out.suffix == ".png":
        save_grid(images, out, columns, scale)
    else:
        arrays: dict[str, Any] = {"images": images.permute(0, 2, 3, 1).numpy(), "seeds": np.array(seeds)}
        if labels is not None:
            arrays["labels"] = labels.numpy()
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out, **arrays)
