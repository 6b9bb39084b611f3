"""UniPC, a predictor-corrector of several steps (Zhao et al. 2023, arXiv 2302.04867), for networks that predict x0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["unipc"]


def _weights(nodes: Sequence[float], h: float, scale: float) -> list[float]:
    """Solve for rho: sum_m rho_m r_m^(n-1) = b_n, n = 1..p, at nodes r_m (section 3.1, equation 8, in x0's form).

    b_n = n! phi_(n+1)(-h) (-h) / B with phi_1(z) = (e^z - 1) / z and phi_(n+1)(z) = (phi_n(z) - 1 / n!) / z.
    """
    z = -h
    value, targets = math.expm1(z) / z, []
    for n in range(1, len(nodes) + 1):
        value = (value - 1 / math.factorial(n)) / z
        targets.append(math.factorial(n) * value * z / scale)
    points = torch.tensor(nodes, dtype=torch.float64)
    powers = torch.stack([points**n for n in range(len(nodes))])
    return [float(rho) for rho in torch.linalg.solve(powers, torch.tensor(targets, dtype=torch.float64))]


def unipc(
    x: Tensor,
    times: Tensor,
    sigmas: Tensor,
    denoised: Callable[[Tensor, Tensor], Tensor],
    order: int,
    linear: bool,
) -> Tensor:
    """Integrate by UniPC with one evaluation a step: the corrector reuses the evaluation at the predicted point.

    With alpha = 1, h = log(sigma_i / sigma_(i+1)), D_m the evaluations before and r_m = log(sigma_i / sigma_m) / h:

        x_(i+1) = e^(-h) x_i + (1 - e^(-h)) D_i - B(h) sum_m rho_m (D_m - D_i) / r_m

    The predictor sums over the order - 1 evaluations before D_i, the corrector also over the one at the predicted point, r = 1.
    The first and the last steps are of lower order. As in the authors' program, one weight alone is 1/2.

    Args:
        x: noise times sigma_0, float64 [B, ...].
        times: of the evaluations, [N].
        sigmas: their noise levels and the last one, [N + 1], which may be 0.
        denoised: x, time -> D.
        order: of the predictor, at least 1.
        linear: B(h) = -h (`bh1`); else e^(-h) - 1 (`bh2`).

    Returns:
        Samples, float64 [B, ...].
    """
    levels = sigmas.tolist()
    outputs: list[Tensor] = []
    before, used = x, 0

    def step(x: Tensor, i: int, order: int, ahead: Tensor | None) -> Tensor:
        """From level i to i + 1 with evaluations up to i, and for the corrector that at i + 1."""
        ratio = levels[i + 1] / levels[i]
        found = ratio * x + (1 - ratio) * outputs[i]
        nodes = [-math.log(levels[i - m] / levels[i]) / -math.log(ratio) for m in range(1, order)] if order > 1 else []
        others = [(outputs[i - m] - outputs[i]) / node for m, node in enumerate(nodes, 1)]
        if ahead is not None:
            nodes, others = [*nodes, 1.0], [*others, ahead - outputs[i]]
        if not nodes:
            return found
        h = -math.log(ratio)
        scale = -h if linear else math.expm1(-h)
        single = len(nodes) == 1
        for rho, other in zip([0.5] if single else _weights(nodes, h, scale), others, strict=True):
            found = found - scale * rho * other
        return found

    for i, time in enumerate(times):
        here = denoised(x, time)
        if i:
            x = step(before, i - 1, used, here)
        outputs.append(here)
        before, used = x, min(order, len(times) - i, i + 1)
        x = step(x, i, used, None)
    return x
