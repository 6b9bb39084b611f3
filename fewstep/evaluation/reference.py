"""Statistics of real images, and the protocol id of every score.

Knows feature extractors and batches of uint8 images; knows nothing about the network that made them.

The protocol of a number is `metric/extractor-hash/dataset-images-fingerprint/samples/uint8`, for example

    fid/small64-ab12cd34/fashion-mnist-train-60000-9f8e7d6c/50000/uint8

with eight digits of the hash of the extractor's weights, the number of reference images, eight digits of
their fingerprint, the number of generated images, and their quantisation. Two scores are comparable if and
only if their protocols are equal; the same inputs always give the same protocol.
"""

import hashlib
import io
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fewstep.data import Digits, FashionMNIST, ImageDataset, ImageFolder, ZipDataset
from fewstep.data.folders import list_files
from fewstep.data.image_files import MAX_BYTES, is_image, opened
from fewstep.evaluation.extractor import Extractor
from fewstep.system.bounds import PIXELS, UNPACKED, UNPACKED_FREE, parse_json, read_file, reading, shown
from fewstep.system.errors import EvaluationError
from fewstep.system.files import atomic_write, cache_folder

SUBSET = 10_000  # features kept for KID, precision and recall
SEED = 2020  # torch-fidelity's, for the kept features and KID's subsets

EDM_EXTRACTOR = "inception-v3-compat"


class StreamingStats:
    """Mean and covariance of feature vectors, accumulated in float64 over batches and mergeable.

    Keeps the mean and the sum of squared deviations from it instead of the sum of squares, to avoid cancellation for
    features far from zero. Chan, Golub & LeVeque 1979, the pairwise update,
    http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.

    Attributes:
        n: vectors seen.
        mean: float64 [dim].
        scatter: float64 [dim, dim], the sum over vectors of (f - mean)(f - mean)^T.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: [B, dim], any float type.

        Raises:
            EvaluationError: not [B, dim], or not finite.
        """
        dim = len(self.mean)
        if features.ndim != 2 or features.shape[1] != dim:
            raise EvaluationError(f"features must be [B, {dim}], got {list(features.shape)}")
        if not torch.isfinite(features).all():
            bad = (~torch.isfinite(features)).any(1).nonzero()[0].item()
            raise EvaluationError(
                f"the features of image {self.n + bad} are not finite: the extractor's weights are damaged, or its precision is "
                "too low"
            )
        batch = StreamingStats(dim)
        values = features.detach().to("cpu", torch.float64)
        if len(values):
            batch.n = len(values)
            batch.mean = values.mean(0)
            centred = values - batch.mean
            batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: "StreamingStats") -> None:
        """Add the statistics of another process or another part of the data."""
        n = self.n + other.n
        if other.n == 0:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(delta, delta) * (self.n * other.n / n)
        self.mean += delta * (other.n / n)
        self.n = n

    def mu(self) -> NDArray[np.float64]:
        """Mean [dim]. Raises EvaluationError without any vector."""
        if self.n < 1:
            raise EvaluationError("no images: the iterator of batches was empty")
        return self.mean.numpy().copy()

    def sigma(self) -> NDArray[np.float64]:
        """Covariance [dim, dim], divided by n - 1. Raises EvaluationError below two vectors."""
        if self.n < 2:
            raise EvaluationError(f"a covariance needs at least 2 images, got {self.n}: draw more samples")
        return (self.scatter / (self.n - 1)).numpy()


class Subset:
    """A uniformly random subset of a stream of rows; depends on their order but not on their batches.

    Each row draws a number from one seeded generator; the rows with the smallest numbers are kept. A prefix
    would be biased, because samples often come sorted by class.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(SEED)
        self.keys = np.empty(0)
        self.rows: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        self.keys = np.concatenate([self.keys, self.rng.random(len(features))])
        self.rows.append(features)
        if len(self.keys) > 2 * self.size:
            self._prune()

    def _prune(self) -> None:
        keep = np.argsort(self.keys, kind="stable")[: self.size]
        self.rows = [torch.cat(self.rows)[torch.from_numpy(keep)]]
        self.keys = self.keys[keep]

    def features(self) -> Tensor:
        """Kept rows in float16, the precision of a stored reference, so that equal images have equal features."""
        self._prune()
        rounded = self.rows[0].half()
        if not torch.isfinite(rounded).all():
            raise EvaluationError(f"features reach {self.rows[0].abs().max():.3g}: too large for float16 (65504)")
        return rounded


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images in one extractor's features.

    Attributes:
        mu: float64 [dim].
        sigma: float64 [dim, dim].
        n: number of real images; None if the file does not state it (EDM's).
        features: float16 [M, dim], a random subset, M <= 10,000, for KID, precision and recall; None if the
            file has none. Always float16, so that storing a reference does not change it.
        extractor: name of the extractor.
        extractor_sha256: hash of its weights; None if the file does not state it (EDM's).
        dataset: the data's name, without slashes.
        fingerprint: sha256 of the images (of the file, for EDM's).
        shape: (C, H, W) of the images; None if the file does not state it.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    n: int | None
    features: NDArray[np.float16] | None
    extractor: str
    extractor_sha256: str | None
    dataset: str
    fingerprint: str
    shape: tuple[int, int, int] | None

    def __post_init__(self) -> None:
        dim = len(self.mu) if self.mu.ndim == 1 else -1
        _check(dim > 0, f"mu is {list(self.mu.shape)}, not [dim]")
        _check(self.sigma.shape == (dim, dim), f"sigma is {list(self.sigma.shape)}, not [{dim}, {dim}]")
        _check(self.mu.dtype == np.float64 and self.sigma.dtype == np.float64, "mu and sigma are not float64")
        _check(bool(np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()), "mu or sigma is not finite")
        _check(np.allclose(self.sigma, self.sigma.T, rtol=1e-5, atol=1e-8), "sigma is not symmetric")
        _check(bool((np.diagonal(self.sigma) >= 0).all()), "sigma has a negative variance")
        if self.features is not None:
            good = self.features.ndim == 2 and self.features.shape[1] == dim and len(self.features) > 0
            _check(good, f"features are {list(self.features.shape)}, not [M, {dim}]")
            _check(self.features.dtype == np.float16, f"features are {self.features.dtype}, not float16")
            _check(bool(np.isfinite(self.features).all()), "features are not finite in float16")

    def __repr__(self) -> str:
        kept = 0 if self.features is None else len(self.features)
        return f"Reference({self.id}, dim={len(self.mu)}, {kept} features kept)"

    @property
    def id(self) -> str:
        """Middle part of a protocol id, `extractor-hash/dataset-images-fingerprint`."""
        weights = self.extractor_sha256[:8] if self.extractor_sha256 else "unstated"
        return f"{self.extractor}-{weights}/{self.dataset}-{self.n or 'n'}-{self.fingerprint[:8]}"

    @classmethod
    def from_dataset(cls, dataset: ImageDataset, extractor: Extractor, batch_size: int = 250) -> "Reference":
        """Compute the statistics of a data set.

        Raises:
            EvaluationError: fewer than two images, features that are not finite, or images that the extractor does not take.
        """
        stats, subset = StreamingStats(extractor.dim), Subset(SUBSET)
        for start in range(0, len(dataset), batch_size):
            features = extractor(dataset.images[start : start + batch_size])
            stats.update(features)
            subset.update(features)
        return cls(
            mu=stats.mu(),
            sigma=stats.sigma(),
            n=stats.n,
            features=subset.features().numpy(),
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            dataset=dataset.name.replace("/", "-"),
            fingerprint=dataset.fingerprint,
            shape=dataset.shape,
        )

    def save(self, path: str | Path) -> None:
        """Write an npz file without pickles, atomically."""
        keys = ("n", "extractor", "extractor_sha256", "dataset", "fingerprint", "shape")
        arrays: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma}
        if self.features is not None:
            arrays["features"] = self.features
        arrays["fewstep"] = np.array(json.dumps({key: getattr(self, key) for key in keys}))
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        atomic_write(path, packed.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read a file of `save`, or one of EDM's, which has only `mu` and `sigma`.

        EDM's files (Karras et al. 2022, https://github.com/NVlabs/edm) do not name their extractor. With 2048
        features it is assumed to be Inception, as in EDM, and the scores say so; KID, precision and
        recall are not available from them.

        Raises:
            EvaluationError: no such file, not an npz file, or missing or invalid content.
        """
        path = Path(path)
        if not path.is_file():
            raise EvaluationError(f"`reference` must be a file, got {path}. Try: make it with Reference.from_dataset")
        with reading(path, EvaluationError):
            return cls._load(path, read_file(path, (2 << 30)))

    @classmethod
    def _load(cls, path: Path, content: bytes) -> "Reference":
        try:
            file: Any = np.load(io.BytesIO(content), allow_pickle=False) if content[:2] == b"PK" else None
            arrays = {}
            if isinstance(file, np.lib.npyio.NpzFile) and file.zip is not None:
                _check_members(file.zip)
                arrays = dict(file)
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError) as error:
            raise EvaluationError(
                f"{path} cannot be read as reference statistics ({error}). Try: make it again or download it again"
            ) from error
        absent = {"mu", "sigma"} - arrays.keys()
        if absent:
            raise EvaluationError(
                f"{path} must hold reference statistics, got {shown(sorted(arrays))} without {' and '.join(sorted(absent))}"
            )
        mu, sigma = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
        try:
            if "fewstep" not in arrays:
                _check(
                    mu.shape == (2048,),
                    f"it does not name its extractor, and mu is {list(mu.shape)}, not [2048]",
                )
                digest = hashlib.sha256(content).hexdigest()
                return cls(mu, sigma, None, None, EDM_EXTRACTOR, None, path.stem, digest, None)
            fields = parse_json(str(arrays["fewstep"]))
            fields["shape"] = tuple(fields["shape"]) if fields["shape"] else None
            return cls(mu=mu, sigma=sigma, features=arrays.get("features"), **fields)
        except (ValueError, KeyError, TypeError) as error:
            why = shown(str(error), quote=False)
            raise EvaluationError(f"{path} does not hold valid reference statistics: {why}") from error


def _check_members(archive: zipfile.ZipFile) -> None:
    """Check the sizes that an archive and its arrays claim against the bytes present, before memory is taken."""
    members = archive.infolist()
    packed = sum(member.compress_size for member in members)
    unpacked = sum(member.file_size for member in members)
    if unpacked > UNPACKED * packed + UNPACKED_FREE or len(members) > 64:
        raise ValueError(f"{len(members):,} arrays of {unpacked:,} bytes from {packed:,}")
    for member in members:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
        if dtype.kind not in "biufUS" or math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"{shown(member.filename)} claims {shown(shape)} of {dtype} in {member.file_size:,} bytes")


def _check(good: bool, what: str) -> None:
    if not good:
        raise EvaluationError(f"bad reference: {what}")


def shipped_reference(name: str = "fashion-mnist") -> Reference:
    """Load the shipped reference: Fashion-MNIST's 60,000 training images in `SmallFeatures`.

    Raises:
        EvaluationError: another name.
    """
    if name != "fashion-mnist":
        raise EvaluationError(
            f"`reference` must be an .npz file, a folder or .zip of images, or 'fashion-mnist' (ships with fewstep) or 'fashion-mnist-test', got "
            f"{name!r}"
        )
    with resources.as_file(resources.files("fewstep") / "assets" / "features" / f"{name}-train.npz") as path:
        return Reference.load(path)


def reference_for(dataset: ImageDataset, extractor: Extractor) -> Reference:
    """Statistics of a data set: the shipped ones if they are of the same images, else computed once and cached.

    The cache is `$FEWSTEP_CACHE` (default ~/.cache/fewstep), keyed by the hashes of extractor and images.

    Raises:
        EvaluationError: as `Reference.from_dataset`.
    """
    shipped = shipped_reference()
    if (shipped.fingerprint, shipped.extractor_sha256) == (dataset.fingerprint, extractor.sha256):
        return shipped
    path = cache_folder() / "references" / f"{extractor.name}-{extractor.sha256[:16]}-{dataset.fingerprint[:16]}.npz"
    if path.exists():
        return Reference.load(path)
    reference = Reference.from_dataset(dataset, extractor)
    path.parent.mkdir(parents=True, exist_ok=True)
    reference.save(path)
    return reference


def find_reference(name: str, extractor: Extractor, shape: tuple[int, ...], side: int | None = None) -> Reference:
    """Find a named reference: a statistics file, a folder or zip of images, or a set that ships with fewstep.

    Args:
        name: an .npz file, a folder, a .zip file, `fashion-mnist` (its training images), or held out: `fashion-mnist-test`, `digits-test`.
        extractor: the extractor, for images.
        shape: (C, H, W) of the samples; images of another shape are refused. A folder's images are read with C channels.
        side: crop a folder's images to their central square and resize them to this size in pixels; None: unchanged.

    Raises:
        EvaluationError, DataError: it does not exist, cannot be read, or has another size.
    """
    path = Path(name)
    if path.suffix == ".npz":
        return Reference.load(path)
    if name == "fashion-mnist-test" and not path.exists():
        return reference_for(FashionMNIST(split="test", size=min(28, max(8, shape[-1]))).load(), extractor)
    if name == "digits-test" and not path.exists():
        return reference_for(Digits(split="test").load(), extractor)
    if path.suffix != ".zip" and not path.is_dir():
        if name == "fashion-mnist" and tuple(shape[1:]) != (28, 28) and 8 <= shape[-1] < 28:
            return reference_for(FashionMNIST(size=shape[-1]).load(), extractor)  # the shipped reference is for 28 x 28
        return shipped_reference(name)
    channels: Literal[1, 3] = 1 if shape[0] == 1 else 3
    if path.is_dir():
        _check_colours(path, channels)
    spec = ImageFolder(path=path, channels=channels, size=side) if path.is_dir() else ZipDataset(path=path)
    if (dataset := spec.load()).shape != tuple(shape):
        raise EvaluationError(
            f"`reference` must have the shape of the samples, {list(shape)}, got {path} with {list(dataset.shape)}"
        )
    return reference_for(dataset, extractor)


def _check_colours(folder: Path, channels: int) -> None:
    """Refuse colour images as the reference of grey samples, and a folder of grey ones for colour samples.

    A colour data set may contain some grey images, and a grey image may be stored as RGB.

    Raises:
        EvaluationError: reference and samples differ in colour.
    """
    files = [folder / name for name in sorted(list_files(folder)) if is_image(name)]
    colour = (file for file in files if _is_coloured(file))
    if channels == 1 and (found := next(colour, None)) is not None:
        raise EvaluationError(f"`reference` must hold grey images for grey samples, got the colour image {found}")
    if channels == 3 and files and next(colour, None) is None:
        raise EvaluationError(
            f"`reference` must hold colour images for samples of 3 channels, got {folder} with grey images only"
        )


def _is_coloured(file: Path) -> bool:
    """Return whether a picture's channels differ; False for unreadable files, which the reader names."""
    try:
        with opened(read_file(file, MAX_BYTES)) as picture:
            if picture.width * picture.height > PIXELS or picture.mode in ("1", "L", "LA"):
                return False
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return bool((pixels != pixels[..., :1]).any())
