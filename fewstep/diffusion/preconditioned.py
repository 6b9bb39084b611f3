"""Networks as denoisers: preconditioning for each prediction type (Karras et al. 2022, eq. 7). Knows no method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Cond, Denoiser, tap
from fewstep.diffusion.noise import Schedule, unsqueeze_as

__all__ = ["Preconditioned", "Prediction", "output_of"]

Prediction = Literal["edm", "eps", "v", "x0", "flow"]

# the value that must be 1 at all times under a prediction's schedule; eps and x0 fit every schedule
FITS: dict[Prediction, Callable[[float, float], float]] = {
    "edm": lambda alpha, sigma: alpha,
    "v": lambda alpha, sigma: alpha**2 + sigma**2,
    "flow": lambda alpha, sigma: alpha + sigma,
}
NO_SIGNAL = 1e-6  # alpha; rounding leaves 6e-17 at the end of a zero-SNR table


class Preconditioned(Denoiser):
    """A network and the four coefficients that turn its output F into x0 (Karras et al. 2022, eq. 7):

        D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)

    ============ ==================== ===================== ================ ==========================================
    prediction   c_skip               c_out                 c_in             source
    ============ ==================== ===================== ================ ==========================================
    edm          sd² / (s² + sd²)     s sd / √(s² + sd²)    1 / √(s² + sd²)  Karras et al. 2022, table 1 (alpha = 1)
    eps          1 / alpha            -sigma / alpha        1                Ho et al. 2020, eq. 15
    v            alpha                -sigma                1                Salimans & Ho 2022, appendix D
    x0           0                    1                     1
    flow         1                    -sigma                1                x_t = (1-u) x + u eps, F = eps - x
    ============ ==================== ===================== ================ ==========================================

    with s = sigma_t and sd = sigma_data. All of these are trained with the squared error of F (`residual`). On x0 this
    error has the weight 1 / c_out² (for edm 1/s² + 1/sd²).

    Args:
        net: called as `net(c_in x_t, label, **cond)`; its output is converted to float32.
        schedule: noise levels, and the label that the network receives for each.
        prediction: what the network predicts.
        sigma_data: standard deviation of the data, for "edm".

    edm, v and flow require a schedule with alpha = 1, alpha² + sigma² = 1 and alpha + sigma = 1, respectively. Under
    another schedule, D differs from x0 even for a perfect network.

    Raises:
        ValueError: the prediction does not fit the schedule, or is eps under a schedule that ends at alpha = 0, where
            x0 = (x_t - sigma eps) / alpha is undefined.
    """

    def __init__(
        self, net: nn.Module, schedule: Schedule, prediction: Prediction = "edm", sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data
        if prediction in FITS:
            alpha_t, sigma_t = (c.item() for c in schedule.alpha_sigma(torch.tensor([0.5], device="cpu")))
            fits = [name for name, rule in FITS.items() if abs(rule(alpha_t, sigma_t) - 1) < 1e-3]
            if prediction not in fits:
                raise ValueError(
                    f"prediction `{prediction}` must have its own schedule (edm: karras, v: discrete, flow: flow), got "
                    f"{type(schedule).__name__}, under which x0 would be wrong. Try: prediction `{(*fits, 'x0')[0]}`"
                )
        if prediction == "eps" and schedule.alpha_sigma(torch.ones(1, device="cpu"))[0].item() < NO_SIGNAL:
            raise ValueError(
                "prediction `eps` must have signal left at the noisiest step, got a schedule that ends at alpha = 0 (zero terminal "
                "SNR), where eps does not determine x0. Try: prediction `v`, which such models are trained with"
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients c_skip, c_out, c_in at times `t`; each [B], float32."""
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        one = torch.ones_like(sigma_t)
        match self.prediction:
            case "edm":
                total = sigma_t**2 + self.sigma_data**2
                return self.sigma_data**2 / total, sigma_t * self.sigma_data / total.sqrt(), 1 / total.sqrt()
            case "eps":
                return 1 / alpha_t, -sigma_t / alpha_t, one
            case "v":
                return alpha_t, -sigma_t, one
            case "x0":
                return 0 * one, one, one
            case "flow":
                return one, -sigma_t, one
        raise ValueError(f"prediction {self.prediction!r} is unknown. Try: use one of edm, eps, v, x0, flow")

    def target(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Compute the network's target at `alpha_t x + sigma_t eps`: F with D = x, solved for each prediction, [B, ...].

        edm: (s x - sd² eps) / (sd √(s² + sd²)); eps: eps; v: alpha eps - sigma x; x0: x; flow: eps - x.
        """
        alpha_t, sigma_t = (unsqueeze_as(c, x) for c in self.schedule.alpha_sigma(t))
        match self.prediction:
            case "edm":
                total = sigma_t**2 + self.sigma_data**2
                return (sigma_t * x - self.sigma_data**2 * eps) / (self.sigma_data * total.sqrt())
            case "eps":
                return eps
            case "v":
                return alpha_t * eps - sigma_t * x
            case "x0":
                return x
            case "flow":
                return eps - x
        raise ValueError(f"prediction {self.prediction!r} is unknown. Try: use one of edm, eps, v, x0, flow")

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        c_skip, c_out, c_in = (unsqueeze_as(c, x_t) for c in self.coefficients(t))
        output = self.net(c_in * x_t, self.schedule.label(t).to(x_t.device), **cond)
        return c_skip * x_t + c_out * output.float()

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        return output_of(self, self.schedule.perturb(x, t, eps), t, cond) - self.target(x, t, eps)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight 1 / c_out² [B] of the squared x0 error in the denoising loss; infinite if c_out is 0."""
        return 1 / self.coefficients(t)[1] ** 2


def output_of(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Output F of a denoiser's layer `net` in one full call, in float32, shape of `x_t`.

    A full call runs the hooks on the denoiser (FSDP's, a GAN head's, counters).
    """
    with tap(denoiser, "net") as outputs:
        denoiser(x_t, t, **cond)
    return outputs[0].float()
