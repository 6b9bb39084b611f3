"""f-distill: distribution matching under any f-divergence (Xu et al. 2025, arXiv 2502.15681). From memory of the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.diffusion.noise import double_device, unsqueeze_as
from fewstep.methods.base import Batch, Nets, Terms
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.losses import dm_gradient, inject_gradient

__all__ = ["WEIGHTS", "FDistill"]

Divergence = Literal[
    "reverse-kl", "forward-kl", "jeffreys", "softened-reverse-kl", "jensen-shannon", "squared-hellinger"
]

WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {  # h(r) = f''(r) r²         f(r)
    "reverse-kl": torch.ones_like,  # -log r
    "forward-kl": lambda r: r,  # r log r
    "jeffreys": lambda r: r + 1,  # (r - 1) log r
    "softened-reverse-kl": lambda r: 1 / (r + 1),  # (r + 1) log((r + 1) / 2r)
    "jensen-shannon": lambda r: r / (r + 1),  # r log r - (r + 1) log((r + 1) / 2)
    "squared-hellinger": lambda r: r.sqrt() / 4,  # 1 - √r
}


class FDistill(DMD2):
    """DMD2 with each sample's matching gradient weighted by its density ratio r = p_real(x_t) / p_fake(x_t) = exp(h(x_t)).

        grad D_f(p_real || p_fake) = E[f''(r) r² w_t alpha_t (s_fake - s_real) dx/dtheta]

    with the head's logit h. The reverse KL has weight 1 and is DMD2. The ratios are divided by their mean within each of
    `ratio_bins` ranges of noise, then the weights by their mean over a forward. The values of ranges and clipping are ours.
    """

    method: Literal["f-distill"] = "f-distill"  # type: ignore[assignment]
    divergence: Divergence = "jensen-shannon"
    """Which f. Needs the discriminator (`gan_weight` above 0), but for `reverse-kl`."""
    ratio_bins: int = Field(10, ge=1)
    """Ranges of time, equally wide, in which ratios are normalised."""
    ratio_clip: float = Field(100.0, gt=1)
    """Limit of the ratios and of their reciprocals before they are normalised."""

    @model_validator(mode="after")
    def _ratio(self) -> FDistill:
        if self.divergence != "reverse-kl" and not self.needs_real:
            raise ValueError(
                f"gan_weight must be above 0 for divergence `{self.divergence}`, whose ratio is the discriminator's, got 0. Try: reverse-kl"
            )
        return self

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        if self.divergence == "reverse-kl":
            return super().generator_loss(nets, x, batch)
        t = self.noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        with torch.no_grad():
            x_t = nets.teacher.schedule.perturb(x, t, torch.randn_like(x))
            d_real = nets.teacher(x_t, t, **batch.cond)
            d_fake, logits = nets.critic.denoised_and_logits(x_t, t, batch.cond)
            weight = WEIGHTS[self.divergence](self.ratio(logits, t))
            weight = weight / weight.mean()
            gradient = unsqueeze_as(weight, x) * dm_gradient(x, d_real, d_fake)
        probe = {"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake}
        terms = Terms({"f": inject_gradient(x, gradient)}, {"f_weight_most": weight.max()}, probe)
        return self.add_gan(terms, nets, x, batch)

    def ratio(self, logits: Tensor, t: Tensor) -> Tensor:
        """Density ratios [B] of logits [B] at times [B], clipped, with mean 1 in each range of time."""
        ratio = logits.exp().clamp(1 / self.ratio_clip, self.ratio_clip)
        bins = (t * self.ratio_bins).long().clamp(max=self.ratio_bins - 1).to(logits.device)
        total, count = (ratio.new_zeros(self.ratio_bins).index_add(0, bins, v) for v in (ratio, torch.ones_like(ratio)))
        return ratio * (count / total)[bins]
