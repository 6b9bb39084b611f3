"""FID, KID, precision, recall, density, coverage and Inception score between generated and real images."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.evaluation.extractor import Extractor
from fewstep.evaluation.metrics import ASKED, BALLS, BY_KEY, ISC_SPLITS, METRICS, NEIGHBOURS, Metric
from fewstep.evaluation.reference import SEED, SUBSET, Reference, StreamingStats, Subset
from fewstep.system.errors import EvaluationError

KID_SUBSETS = 100


KID_SUBSET_SIZE = 1_000


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores from `evaluate`; None for a metric that was not requested or is not available.

    Attributes:
        fid: Frechet distance, lower is better, 0 for equal mean and covariance.
        kid: kernel distance (squared MMD), mean over subsets; unbiased, hence possibly slightly negative.
        kid_std: its standard deviation over subsets.
        precision: share of generated images inside the real manifold.
        recall: share of real images inside the generated manifold.
        density: mean number of real images' neighbourhoods that hold a generated image, over their number k; 1 for equal
            distributions, more if generated images keep to where real ones are dense.
        coverage: share of real images with a generated one in their neighbourhood; about 1 - 2^-k for equal distributions and as
            many images on both sides.
        isc: Inception score, higher is better, mean over ten parts of the images.
        isc_std: its standard deviation over the parts.
        n: number of generated images.
        protocol: protocol id without the metric; see `protocol_id`.
        warnings: caveats about the numbers.
    """

    fid: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    isc: float | None = None
    isc_std: float | None = None
    n: int
    protocol: str
    warnings: tuple[str, ...] = ()

    def protocol_id(self, metric: Metric) -> str:
        """Protocol id of a metric, such as `fid/small64-ab12cd34/fashion-mnist-.../50000/uint8`."""
        return f"{metric}/{self.protocol}"

    def as_dict(self) -> dict[str, Any]:
        """Fields as a dict, ready for JSON."""
        return asdict(self) | {"warnings": list(self.warnings)}

    def __str__(self) -> str:
        """One line per number with its protocol id, then the warnings."""
        lines = []
        for metric in ASKED:
            value, spread = getattr(self, metric), getattr(self, f"{metric}_std", None)
            if value is not None:
                spread = f" +- {spread:.2g}" if spread is not None else ""
                lines.append(f"{metric:<9} {value:.4g}{spread}  [{self.protocol_id(metric)}]")
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def check_metrics(metrics: Sequence[str], extractor: Extractor, samples: int | None = None) -> None:
    """Refuse metrics that cannot be measured, before sampling.

    Args:
        metrics: metrics to compute.
        extractor: the extractor.
        samples: number of images; None: not known yet.

    Raises:
        EvaluationError: no metric, an unknown one, one named twice, one that the extractor does not support, or too
            few images.
    """
    known = ", ".join(ASKED)
    if unknown := [metric for metric in metrics if metric not in ASKED]:
        raise EvaluationError(f"`metrics` must be of {known}, got {unknown[0]!r}. Try: fid,kid")
    if not metrics:
        raise EvaluationError(f"`metrics` must name at least one of {known}, got none. Try: fid")
    if twice := [metric for index, metric in enumerate(metrics) if metric in metrics[:index]]:
        raise EvaluationError(f"`metrics` must name each metric once, got {twice[0]} twice. Try: leave one out")
    if "isc" in metrics and extractor.classifier is None:
        raise EvaluationError(
            f"`extractor` must be inception for the Inception score (isc), got {extractor.name}. Try: inception, or leave isc out"
        )
    for metric in metrics if samples is not None else ():
        if samples is not None and samples < (fewest := BY_KEY[metric].fewest):
            raise EvaluationError(f"`samples` must be at least {fewest} for {metric}, got {samples}. Try: 50000")


def evaluate(
    batches: Iterable[Tensor],
    reference: Reference,
    extractor: Extractor,
    *,
    metrics: Sequence[Metric] = METRICS,
    seen: str = "uint8",
) -> Scores:
    """Score generated images against a reference. The formulas are torch-fidelity's own functions.

    FID: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6, over all images, in float64. KID:
    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401: cubic polynomial kernel, 100 subsets
    of 1,000. Precision and recall: Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991, equations 1-2,
    k = 3. Density and coverage: Naeem et al. 2020, https://arxiv.org/abs/2002.09797, equations 3-4, k = 5, written here. These use 10,000 random images of each side at most; all random choices have a fixed seed. Inception
    score: Salimans et al. 2016, https://arxiv.org/abs/1606.03498, over all images in ten parts, with Inception only.

    Args:
        batches: uint8 [B, C, H, W] each, of any batch size.
        reference: statistics of the real images, made with the same extractor.
        extractor: the feature extractor.
        metrics: metrics to compute.
        seen: preprocessing of the images, for the protocol id.

    Raises:
        EvaluationError: no images or too few, images of another shape than the reference's, a reference made
            with another extractor, features that are not finite, an unknown metric.
        EvaluationError: images that the extractor does not take.
    """
    check_metrics(metrics, extractor)
    warnings = _check_match(reference, extractor)
    logits: list[Tensor] = []
    stats, subset = StreamingStats(extractor.dim), Subset(SUBSET)
    for images in batches:
        if reference.shape is not None and tuple(images.shape[1:]) != reference.shape:
            raise EvaluationError(
                f"images must have the shape of the reference {reference.id}, {list(reference.shape)}, got "
                f"{list(images.shape[1:])}. Try: a reference made from images of the same size and channels"
            )
        features = extractor(images)
        stats.update(features)
        subset.update(features)
        if "isc" in metrics:
            assert extractor.classifier is not None, "by check_metrics"
            logits.append(features @ extractor.classifier.T)
    mu, sigma = stats.mu(), stats.sigma()
    if "fid" in metrics:
        warnings += singular("FID", stats.n, reference.n, extractor.dim)

    values: dict[str, Any] = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(mu, sigma, reference.mu, reference.sigma)
    if "isc" in metrics:
        values |= _inception_score(torch.cat(logits))
    wanted = [metric for metric in metrics if metric not in ("fid", "isc")]
    if wanted and reference.features is None:
        warnings.append(f"{', '.join(wanted)} not available: the reference holds only mean and covariance")
    elif wanted and reference.features is not None:
        real = torch.from_numpy(reference.features).float()
        fake = subset.features().float()
        if "kid" in wanted:
            size = min(KID_SUBSET_SIZE, len(real), len(fake))
            if size < KID_SUBSET_SIZE:
                warnings.append(f"KID on subsets of {size} instead of {KID_SUBSET_SIZE}: too few images")
            values |= _kid(fake, real, size)
        if "precision" in wanted or "recall" in wanted:
            both = _precision_recall(fake, real)
            values |= {metric: both[metric] for metric in wanted if metric in both}
        if "density" in wanted or "coverage" in wanted:
            both = _density_coverage(fake, real)
            values |= {metric: both[metric] for metric in wanted if metric in both}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise EvaluationError(
            f"`{bad[0]}` must be finite, got {values[bad[0]]} on {stats.n} images. Try: more samples, or leave it out"
        )
    return Scores(n=stats.n, protocol=f"{reference.id}/{stats.n}/{seen}", warnings=tuple(warnings), **values)


def singular(metric: str, generated: int, real: int | None, dim: int) -> list[str]:
    """Warnings if a Frechet distance has fewer images than features.

    The covariance is then singular and the distance biased upwards (https://github.com/bioinf-jku/TTUR/issues/31).
    """
    counts = (("", generated), (" of the reference", real))
    return [
        f"{n} images{whose} for {dim} features: the covariance is singular, {metric} is biased"
        for whose, n in counts
        if n is not None and n <= dim
    ]


def _check_match(reference: Reference, extractor: Extractor) -> list[str]:
    if reference.extractor_sha256 is None and extractor.name == reference.extractor:
        return [
            f"the reference {reference.dataset} states neither its extractor nor its image size: assumed to be "
            f"{reference.extractor}, as in EDM, and the samples' size"
        ]
    if reference.extractor_sha256 != extractor.sha256:
        raise EvaluationError(
            f"`reference` must be made with the extractor {extractor.name} (sha256 {extractor.sha256}), got one made with "
            f"{reference.extractor} (sha256 {reference.extractor_sha256}). Try: make it again with this extractor, or choose the "
            "other extractor"
        )
    if len(reference.mu) != extractor.dim:
        raise EvaluationError(
            f"`reference` must have the {extractor.dim} features of the extractor {extractor.name}, got {len(reference.mu)}: it was "
            "made for images of another shape"
        )
    return []


def frechet_distance(
    mu_1: NDArray[np.float64],
    sigma_1: NDArray[np.float64],
    mu_2: NDArray[np.float64],
    sigma_2: NDArray[np.float64],
) -> float:
    """Frechet distance of two Gaussians, computed by torch-fidelity:

        |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2))

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6. Means [dim], covariances [dim, dim].

    Raises:
        EvaluationError: the distance is not finite.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first, second = {"mu": mu_1, "sigma": sigma_1}, {"mu": mu_2, "sigma": sigma_2}
    fid = float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])
    if not math.isfinite(fid):
        raise EvaluationError(f"FID is {fid}: the statistics are out of float64's range")
    return fid


def _kid(fake: Tensor, real: Tensor, size: int) -> dict[str, float]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    kid = kid_features_to_metric(
        fake, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    return {"kid": kid[KEY_METRIC_KID_MEAN], "kid_std": kid[KEY_METRIC_KID_STD]}


def _inception_score(logits: Tensor) -> dict[str, float]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < ISC_SPLITS:
        raise EvaluationError(
            f"an Inception score must have at least {ISC_SPLITS} images, got {len(logits)}. Try: more samples"
        )
    isc = isc_features_to_metric(logits, splits=ISC_SPLITS, shuffle=True, rng_seed=SEED)
    return {"isc": isc[KEY_METRIC_ISC_MEAN], "isc_std": isc[KEY_METRIC_ISC_STD]}


def _precision_recall(fake: Tensor, real: Tensor) -> dict[str, float]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(fake), len(real)) <= NEIGHBOURS:
        raise EvaluationError(
            f"precision and recall must have more than {NEIGHBOURS} images on each side, got {len(fake)} "
            f"generated and {len(real)} real ones. Try: more samples"
        )
    prc = prc_features_to_metric(
        fake, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=1_000, save_cpu_ram=True, verbose=False
    )
    return {"precision": prc[KEY_METRIC_PRECISION], "recall": prc[KEY_METRIC_RECALL]}


def _density_coverage(fake: Tensor, real: Tensor, k: int = BALLS, rows: int = 1_000) -> dict[str, float]:
    """Density and coverage of generated in real features, [M, dim] and [N, dim] (Naeem et al. 2020, equations 3-4).

    With B_i the ball around real image i that reaches its k-th nearest other real image:

        density = 1 / (k M) sum_j sum_i [fake_j in B_i]        coverage = 1 / N sum_i [some fake_j in B_i]
    """
    if len(real) <= k:
        raise EvaluationError(
            f"density and coverage must have more than {k} real images, got {len(real)}. Try: another reference"
        )
    inside, covered = 0, 0
    for part in real.split(rows):
        radius = torch.cdist(part, real).kthvalue(k + 1, dim=1).values  # the nearest is the image itself
        hits = torch.cdist(part, fake) <= radius[:, None]
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    return {"density": inside / (k * len(fake)), "coverage": covered / len(real)}
