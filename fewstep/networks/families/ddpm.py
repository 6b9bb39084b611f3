"""Unconditional UNets on pixels: DDPMPipeline."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family

__all__ = ["FAMILY"]


def _call_ddpm(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    return model(x, label, return_dict=False)[0][:, : x.shape[1]]  # the other half is the learnt variance, if any


FAMILY = Family("unet", _call_ddpm, None, bottleneck=lambda config: "mid_block")
