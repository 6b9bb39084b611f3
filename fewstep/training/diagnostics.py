"""Statistics that show the state of a distillation, since loss values do not, and warnings derived from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fewstep.methods.losses import mean_abs

__all__ = ["advice", "by_noise_level"]

BINS = 4  # intervals of the noise level in the log


def by_noise_level(probe: Mapping[str, Tensor]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Distances of the two predictions from x and from each other, overall and by quarter of the time axis.

    They show whether the fake score keeps up, and at which noise levels the two scores disagree.

    Args:
        probe: `Terms.probe`: times t [B], samples x and predictions d_real, d_fake [B, ...]; empty for methods without.

    Returns:
        Scalars by name; (sum, count) for a quarter, which may hold no sample.
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
        some = inside.any()  # stays on the device: the count of the mean, one or none
        for name, gap in gaps.items():
            mean = (gap * inside).sum() / inside.sum().clamp(min=1)
            stats[f"{name}/t{index / BINS:.2f}"] = (mean, some)
    return stats


def advice(stats: Mapping[str, float], teacher_spread: float | None) -> Iterator[tuple[str, str]]:
    """Yield warnings (code, text with advice) for the logged statistics of any method.

    Args:
        stats: means over the logging interval.
        teacher_spread: standard deviation of the teacher's samples; None if they are not images.
    """
    if stats.get("dm_unweighted"):
        yield (
            "no-gradient",
            f"{stats['dm_unweighted']:.1%} of the samples got no distribution matching gradient: the teacher's prediction equals the "
            "sample or is not finite (train.precision: fp32 shows which)",
        )
    real, fake = stats.get("gap_real"), stats.get("gap_fake")
    if real and fake and fake > 1.1 * real:
        yield (
            "critic-lags",
            f"the fake score denoises the generator's samples worse than the teacher does ({fake:.3f} against {real:.3f}). "
            "Try: raise optim.critic.lr or objective.critic-steps",
        )
    spread = stats.get("x_spread")
    if spread is None or teacher_spread is None:
        return
    if spread < 0.5 * teacher_spread:
        yield (
            "collapse",
            f"the samples' spread is {spread:.3f}, the teacher's {teacher_spread:.3f}. Try: lower optim.generator.lr or raise "
            "objective.critic-steps",
        )
    elif spread > 2 * teacher_spread:
        yield (
            "drift",
            f"the samples' spread is {spread:.3f}, the teacher's {teacher_spread:.3f}. Try: lower optim.generator.lr",
        )
