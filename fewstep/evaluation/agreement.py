"""Agreement of pictures with their captions, diversity of pictures of one caption, and chroma.

Knows a CLIP model (`fewstep.evaluation.features.Clip`) and its embeddings, not the network that made the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewstep.evaluation.features import Clip
from fewstep.system.errors import EvaluationError

__all__ = ["RIVALS", "agreement", "chroma", "diversity"]

RIVALS = 99  # wrong captions that compete with the right one
SEED = 2020  # for drawing them


def agreement(clip: Clip, features: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Measure how well pictures agree with their captions.

    CLIP score: the mean cosine of a picture's and its caption's embedding, as the SDXL papers print it (Hessel et al. 2021,
    https://arxiv.org/abs/2104.08718, without its factor of 2.5). Retrieval: the share of pictures that are closer to their
    own caption than to 99 others of the same evaluation (R-precision, Xu et al. 2018, AttnGAN,
    https://arxiv.org/abs/1711.10485, section 4), or to fewer others if there are fewer captions.

    Args:
        clip: the CLIP model.
        features: its features of the pictures [N, dim].
        captions: N captions.

    Returns:
        `clip_score` in [-1, 1] and `retrieval` in [0, 1].

    Raises:
        EvaluationError: the numbers of captions and pictures differ, or all captions are equal.
    """
    if len(features) != len(captions):
        raise EvaluationError(f"`captions` must be one per picture, got {len(captions)} for {len(features)} pictures")
    different = list(dict.fromkeys(captions))
    if len(different) < 2:
        raise EvaluationError("`captions` must hold at least two different captions, got one")
    number = {caption: index for index, caption in enumerate(different)}
    own = torch.tensor([number[caption] for caption in captions])
    texts = torch.cat([clip.texts(different[start : start + 256]) for start in range(0, len(different), 256)])
    pictures, texts = normalize(features.double()), normalize(texts.double())
    score = (pictures * texts[own]).sum(1)
    # an offset in 1 .. D-1 from the own caption is every other caption with equal probability
    generator = torch.Generator().manual_seed(SEED)
    rivals = min(RIVALS, len(different) - 1)
    found = []
    for picture, index, value in zip(pictures, own, score, strict=True):
        others = (index + 1 + torch.randperm(len(different) - 1, generator=generator)[:rivals]) % len(different)
        found.append(bool((texts[others] @ picture < value).all()))
    return {"clip_score": score.mean().item(), "retrieval": sum(found) / len(found)}


def diversity(features: Tensor) -> float:
    """Mean cosine distance between pictures of one caption, in [0, 2]; 0 if all are equal.

    Args:
        features: [captions, pictures per caption, dim], with at least two pictures per caption.
    """
    unit = normalize(features.double(), dim=-1)
    count = unit.shape[1]
    cosine = unit @ unit.transpose(1, 2)
    return 1 - ((cosine.sum((1, 2)) - count) / (count * (count - 1))).mean().item()


def chroma(pictures: Tensor) -> float:
    """Mean difference of a pixel's largest and smallest colour channel, in [0, 1]: 0 for grey, 1 for pure red or yellow.

    It shows over-saturation, which guidance and one-sided training losses cause.

    Args:
        pictures: uint8 [N, C, H, W].
    """
    spread = pictures.amax(1).float() - pictures.amin(1).float()
    return spread.mean(dtype=torch.float64).item() / 255
