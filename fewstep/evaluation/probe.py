"""Compare a few dozen samples of a student with its teacher's: distance, diversity, colour, sharpness, in pixels.

Needs no data set and no feature network, so every run can afford it. Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Look", "compared", "explained", "look", "outside", "probe_set"]

CONDITIONS = 8  # classes or captions of the probe
SIDE = 64  # pixels to which larger pictures are averaged before they are compared with each other

BANDS = {  # number: (least, most, code below, code above, what it is, what to try below, what to try above)
    "probe_diversity": (
        0.7, 1.4, "variety-lost", "variety-above", "diversity of one condition's samples",
        "lower optim.generator.lr, raise objective.critic-steps, lower objective.guidance or limit it by "
        "objective.guidance-interval, or method dp-dmd",
        "train longer, or raise optim.critic.lr",
    ),
    "probe_chroma": (
        0.75, 1.25, "pale", "over-saturated", "chroma of the samples", "train longer",
        "objective.guidance-rescale 0.7, or lower objective.guidance",
    ),
    "probe_sharpness": (
        0.7, 1.4, "blurred", "over-sharp", "sharpness of the samples", "train longer, more steps, or a GAN",
        "lower objective.gan-weight or optim.generator.lr",
    ),
}  # fmt: skip


def probe_set(classes: int, wanted: int) -> tuple[int, int, Tensor | None]:
    """Conditions of about `wanted` samples, at least 4 of each of up to 8 classes or captions.

    Returns:
        The number of conditions, the number of samples, and the class of each, ordered by class; None without classes.
    """
    conditions = max(1, min(CONDITIONS, classes, wanted // 4))
    count = wanted // conditions * conditions
    chosen = torch.arange(conditions) * classes // conditions
    return conditions, count, chosen.repeat_interleave(count // conditions) if classes else None


@dataclass(frozen=True)
class Look:
    """Numbers of a set of samples.

    Attributes:
        reduced: samples [conditions, variants, values], pictures averaged to at most `SIDE` pixels a side.
        chroma: mean difference of a pixel's largest and smallest channel; None for samples without colour.
        sharpness: mean absolute difference of neighbouring pixels; None for samples that are not pictures.
    """

    reduced: Tensor
    chroma: float | None
    sharpness: float | None


def look(batches: Iterable[Tensor], conditions: int, pictures: bool) -> Look:
    """Reduce samples to a `Look`.

    Args:
        batches: samples [n, ...], together `conditions` times the same number of variants, ordered by condition.
        conditions: number of conditions.
        pictures: whether samples are pictures [n, C, H, W] in [-1, 1]; values beyond are clamped, as in a file.
    """
    reduced, colour, edges, count = [], 0.0, 0.0, 0
    for batch in batches:
        x = batch.float()
        if pictures:
            x = x.clamp(-1, 1)
            down, across = (x[..., 1:, :] - x[..., :-1, :]).abs().mean(), (x[..., 1:] - x[..., :-1]).abs().mean()
            colour += len(x) * (x.amax(1) - x.amin(1)).mean().item()
            edges += len(x) * ((down + across) / 2).item()
            size = (min(SIDE, x.shape[-2]), min(SIDE, x.shape[-1]))
            x = x if tuple(x.shape[-2:]) == size else torch.nn.functional.adaptive_avg_pool2d(x, size)
        count += len(x)
        reduced.append(x.flatten(1))
    rows = torch.cat(reduced).unflatten(0, (conditions, -1))
    if not pictures:
        return Look(rows, None, None)
    return Look(rows, colour / count if x.shape[1] == 3 else None, edges / count)


def compared(student: Look, teacher: Look) -> dict[str, float]:
    """Compare two sets of samples of the same conditions; 0 is the best distance, 1 the best of each ratio.

        probe_distance = mean_c [2 E|x - y| - E|x - x'| - E|y - y'|] / mean_c E|y - y'|
        probe_diversity = mean_c E|x - x'| / mean_c E|y - y'|

    The first is the energy distance (Székely & Rizzo 2013) between samples x of the student and y of the teacher under one
    condition c, from pairs of different samples: without bias, so that it may fall slightly below 0. It has the unit of the
    teacher's own diversity. Chroma and sharpness are ratios to the teacher's.

    Returns:
        The numbers by name; those that the samples do not have, or whose reference is 0, are left out.
    """
    own, other, across = (_apart(a, b) for a, b in ((student, student), (teacher, teacher), (student, teacher)))
    found = {}
    if other > 0:
        found["probe_distance"] = (2 * across - own - other) / other
        found["probe_diversity"] = own / other
    for name, value, reference in (
        ("chroma", student.chroma, teacher.chroma),
        ("sharpness", student.sharpness, teacher.sharpness),
    ):
        if value is not None and reference:
            found[f"probe_{name}"] = value / reference
    return found


def outside(found: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    """Yield (number's name, code, text with advice) of each ratio outside its band."""
    for name, (least, most, below, above, what, more, less) in BANDS.items():
        value = found.get(name)
        if value is not None and not least <= value <= most:
            code, remedy = (below, more) if value < least else (above, less)
            yield name, code, f"the {what} is {value:.2f} times the teacher's. Try: {remedy}"


def _apart(a: Look, b: Look) -> float:
    """Mean distance of different variants of one condition."""
    apart = torch.cdist(a.reduced.double(), b.reduced.double())
    variants = apart.shape[1]
    return ((apart.sum((1, 2)) - apart.diagonal(dim1=1, dim2=2).sum(1)) / (variants * (variants - 1))).mean().item()


def explained(x: Tensor, denoised: Tensor) -> float:
    """Share of the variance of clean samples that denoised predictions explain: 1 - sum (x - D)² / sum (x - mean x)².

    A denoiser of these samples explains between none and all. A wrong prediction type explains less than nothing.

    Args:
        x: clean samples [n, ...].
        denoised: D(x_t, t) of noised ones, shape of `x`.
    """
    x, denoised = x.double(), denoised.double()
    return (1 - (x - denoised).square().sum() / (x - x.mean(0)).square().sum().clamp(min=1e-12)).item()
