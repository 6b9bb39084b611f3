"""Feature extractors, statistics, metrics and protocol ids against numpy, closed forms, torch-fidelity."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import Digits, FashionMNIST, ImageDataset
from fewstep.evaluation import features as features_module
from fewstep.evaluation import small_features
from fewstep.evaluation.extractor import Extractor
from fewstep.evaluation.features import Inception, extractor_for
from fewstep.evaluation.metrics import METRICS
from fewstep.evaluation.reference import Reference, StreamingStats, Subset, find_reference, shipped_reference
from fewstep.evaluation.scores import Scores, _density_coverage, _inception_score, evaluate, frechet_distance
from fewstep.evaluation.small_features import Pixels, SmallFeatures
from fewstep.system.errors import DataError, EvaluationError

TINY = (1, 2, 3)


def random_images(n: int, shape: tuple[int, ...] = TINY, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, *shape), generator=rng, dtype=torch.uint8)


def dataset_of(images: Tensor, name: str = "made-up") -> ImageDataset:
    return ImageDataset(name=name, images=images)


def tiny_reference(images: Tensor) -> Reference:
    return Reference.from_dataset(dataset_of(images), Pixels(TINY))


def stats_of(features: Tensor, *sizes: int) -> StreamingStats:
    stats = StreamingStats(features.shape[1])
    for part in features.split(list(sizes) or [len(features)]):
        stats.update(part)
    return stats


# ---------------------------------------------------------------------------------------------- statistics


def test_streaming_mean_and_covariance_equal_numpy_far_from_zero() -> None:
    # A mean of 1e6 with spread 1: a sum of squares would lose 12 of float64's 16 digits.
    features = 1e6 + torch.randn(1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stats = stats_of(features, 1, 0, 299, 700)
    np.testing.assert_allclose(stats.mu(), features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(stats.sigma(), np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)


def test_merging_parts_gives_the_whole() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).double()
    whole, first, second = stats_of(features), stats_of(features[:13]), stats_of(features[13:])
    first.merge(second)
    first.merge(StreamingStats(4))
    assert first.n == 50
    np.testing.assert_allclose(first.mu(), whole.mu(), atol=1e-15)
    np.testing.assert_allclose(first.sigma(), whole.sigma(), atol=1e-14)


def test_frechet_distance_of_two_gaussians_has_its_closed_form() -> None:
    # For commuting covariances: |mu_1 - mu_2|^2 + sum of (sqrt of eigenvalue 1 - sqrt of eigenvalue 2)^2.
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.25])
    mu_1, mu_2 = np.array([1.0, 0.0, -2.0]), np.array([0.0, 2.0, -2.0])
    distance = frechet_distance(mu_1, rotation @ np.diag(a) @ rotation.T, mu_2, rotation @ np.diag(b) @ rotation.T)
    assert distance == pytest.approx(5 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_fid_equals_torch_fidelitys_and_a_direct_computation() -> None:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    real, fake = random_images(300, seed=0), random_images(200, seed=1, high=200)
    scores = evaluate(fake.split(64), tiny_reference(real), Pixels(TINY), metrics=["fid"])

    a, b = (images.flatten(1).double() / 255 for images in (fake, real))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert scores.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)

    mu_a, mu_b, s_a, s_b = a.mean(0).numpy(), b.mean(0).numpy(), np.cov(a.T.numpy()), np.cov(b.T.numpy())
    direct = ((mu_a - mu_b) ** 2).sum() + np.trace(s_a + s_b - 2 * np.real(sqrtm(s_a @ s_b)))
    assert scores.fid == pytest.approx(direct, rel=1e-6)
    assert direct > 0.01


def test_the_kept_subset_does_not_depend_on_batches_and_is_no_prefix() -> None:
    rows = torch.arange(1000.0)[:, None]
    kept = []
    for size in (1, 7, 1000):
        subset = Subset(20)
        for part in rows.split(size):
            subset.update(part)
        kept.append(subset.features())
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert len(kept[0]) == len(kept[0].unique()) == 20
    assert 300 < kept[0].float().mean() < 700


# ---------------------------------------------------------------------------------------------- metrics


def test_a_set_against_itself_is_perfect() -> None:
    images = random_images(1200)
    scores = evaluate(images.split(100), tiny_reference(images), Pixels(TINY))
    assert scores.fid == pytest.approx(0, abs=1e-9)
    assert scores.kid == pytest.approx(0, abs=1e-3)
    assert (scores.precision, scores.recall) == (1, 1)
    assert scores.n == 1200
    assert scores.warnings == ()


def test_disjoint_sets_have_no_precision_and_no_recall() -> None:
    dark, light = random_images(500, high=60), random_images(500, seed=1, low=200)
    scores = evaluate([light], tiny_reference(dark), Pixels(TINY))
    assert (scores.precision, scores.recall) == (0, 0)
    assert scores.kid is not None and scores.kid > 1
    # Means 29.5 / 255 and 227.5 / 255 apart, in six features, plus the small difference of the spreads.
    assert scores.fid == pytest.approx(6 * ((227.5 - 29.5) / 255) ** 2, rel=0.05)


def test_a_collapsed_generator_keeps_precision_and_loses_recall() -> None:
    real = random_images(800)
    scores = evaluate([real[:40].repeat(5, 1, 1, 1)], tiny_reference(real), Pixels(TINY))
    assert scores.precision == 1
    assert scores.recall is not None and scores.recall < 0.2


def test_kid_equals_torch_fidelitys_on_the_same_features() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = random_images(1500, seed=0), random_images(1500, seed=1, high=128)
    scores = evaluate([fake], tiny_reference(real), Pixels(TINY), metrics=["kid"])
    theirs = kid_features_to_metric(
        fake.flatten(1) / 255, real.flatten(1) / 255, kid_subsets=100, kid_subset_size=1000, verbose=False
    )
    # Other subsets and float16 features, hence not to the last digit.
    assert scores.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.02)
    assert scores.fid is None and scores.precision is None and scores.recall is None


def test_scores_repeat_and_do_not_depend_on_batches_or_the_global_seed() -> None:
    reference, fake = tiny_reference(random_images(900)), random_images(700, seed=1)
    torch.manual_seed(1)
    once = evaluate(fake.split(50), reference, Pixels(TINY))
    torch.manual_seed(2)
    again = evaluate(iter(fake.split(333)), reference, Pixels(TINY))
    assert once.fid == pytest.approx(again.fid, rel=1e-9)
    assert replace(once, fid=None) == replace(again, fid=None)


def test_only_what_is_asked_for_is_measured() -> None:
    images = random_images(20)
    scores = evaluate([images], tiny_reference(images), Pixels(TINY), metrics=["recall"])
    assert scores.recall == 1
    assert scores.fid is None and scores.kid is None and scores.precision is None


# ---------------------------------------------------------------------------------------------- protocol


def test_protocol_names_extractor_reference_and_samples() -> None:
    images = random_images(300)
    dataset, extractor = dataset_of(images, "made-up/train"), Pixels(TINY)
    scores = evaluate([images[:200]], Reference.from_dataset(dataset, extractor), extractor)
    weights, data = extractor.sha256[:8], dataset.fingerprint[:8]
    assert scores.protocol_id("fid") == f"fid/pixels6-{weights}/made-up-train-300-{data}/200/uint8"
    text = str(scores)
    for metric in METRICS:
        assert scores.protocol_id(metric) in text
    assert json.loads(json.dumps(scores.as_dict())) == scores.as_dict()
    assert scores.as_dict()["protocol"] == scores.protocol


def test_protocol_changes_with_the_data_and_the_number_of_samples() -> None:
    def protocol(real: Tensor, n: int) -> str:
        return evaluate([random_images(n, seed=9)], tiny_reference(real), Pixels(TINY), metrics=["fid"]).protocol

    real = random_images(100)
    other = real.clone()
    other[5, 0, 0, 0] ^= 1
    assert protocol(real, 50) == protocol(real.clone(), 50)
    assert len({protocol(real, 50), protocol(other, 50), protocol(real, 51)}) == 3


def test_warnings_say_what_the_numbers_cannot_bear() -> None:
    images = random_images(5)
    scores = evaluate([images], tiny_reference(images), Pixels(TINY))
    text = " ".join(scores.warnings)
    assert "5 images for 6 features" in text
    assert "5 images of the reference" in text
    assert "KID on subsets of 5" in text
    assert "warning: " in str(scores)


# ---------------------------------------------------------------------------------------------- references


def test_a_stored_reference_is_the_same(tmp_path: Path) -> None:
    reference = tiny_reference(random_images(60))
    reference.save(tmp_path / "ref.npz")
    loaded = Reference.load(tmp_path / "ref.npz")
    for name in ("mu", "sigma", "features"):
        stored, fresh = getattr(loaded, name), getattr(reference, name)
        assert stored.dtype == fresh.dtype
        np.testing.assert_array_equal(stored, fresh)
    assert loaded.id == reference.id
    assert (loaded.n, loaded.shape, loaded.fingerprint) == (60, TINY, reference.fingerprint)
    assert [path.name for path in tmp_path.iterdir()] == ["ref.npz"]
    fake = random_images(40, seed=3)
    assert evaluate([fake], loaded, Pixels(TINY)) == evaluate([fake], reference, Pixels(TINY))


class Hashed2048(Extractor):
    """Stands for Inception where only its name and length matter."""

    name, sha256, dim, device = "inception-v3-compat", "0" * 64, 2048, torch.device("cpu")

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        pass

    def _features(self, images: Tensor) -> Tensor:
        weights = torch.randn(images[0].numel(), 2048, generator=torch.Generator().manual_seed(0))
        return images.flatten(1).float() @ weights / 255


def test_edms_files_are_read_and_their_limits_said(tmp_path: Path) -> None:
    images = random_images(20)
    own = Reference.from_dataset(dataset_of(images), Hashed2048())
    np.savez(tmp_path / "cifar10-32x32.npz", mu=own.mu, sigma=own.sigma)
    edm = Reference.load(tmp_path / "cifar10-32x32.npz")
    np.testing.assert_array_equal(edm.sigma, own.sigma)
    digest = hashlib.sha256((tmp_path / "cifar10-32x32.npz").read_bytes()).hexdigest()
    assert edm.id == f"inception-v3-compat-unstated/cifar10-32x32-n-{digest[:8]}"
    scores = evaluate([images], edm, Hashed2048(), metrics=["kid", "precision", "recall"])
    assert scores.kid is None and scores.precision is None and scores.recall is None
    text = " ".join(scores.warnings)
    assert "kid, precision, recall not available" in text and "states neither its extractor nor its image size" in text
    with pytest.raises(EvaluationError, match="`reference` must be made with the extractor"):
        evaluate([images], edm, Pixels(TINY))


def test_fashion_mnist_is_a_reference_at_the_size_of_the_samples(monkeypatch) -> None:
    asked = []

    def load(self):
        asked.append(self.size)
        return Digits().load()

    monkeypatch.setattr(FashionMNIST, "load", load)
    reference = find_reference("fashion-mnist", Pixels((1, 8, 8)), (1, 8, 8))
    assert asked == [8] and reference.shape == (1, 8, 8)


def test_shipped_reference_is_fashion_mnists_training_set_in_the_shipped_features() -> None:
    reference = shipped_reference("fashion-mnist")
    assert (reference.n, reference.shape, reference.dataset) == (60_000, (1, 28, 28), "fashion-mnist-train")
    assert reference.extractor_sha256 == SmallFeatures().sha256
    assert reference.features is not None and reference.features.shape == (10_000, 64)
    np.testing.assert_allclose(reference.features.astype(float).mean(0), reference.mu, atol=0.2)
    with pytest.raises(EvaluationError, match=r"a folder or \.zip of images, or 'fashion-mnist'"):
        shipped_reference("cifar10")


def test_a_reference_is_named_by_file_folder_or_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    images = random_images(20, shape=(3, 8, 8))
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index, image in enumerate(images):
            path = tmp_path / "folder" / f"{index:02d}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            archive.write(path, path.name)
    extractor = Pixels((3, 8, 8))
    expected = images.flatten(1).double().mean(0).numpy() / 255
    for name in ("folder", "images.zip"):
        reference = find_reference(str(tmp_path / name), extractor, (3, 8, 8))
        np.testing.assert_allclose(reference.mu, expected, atol=1e-3)
        with pytest.raises(EvaluationError, match=r"shape of the samples, \[3, 4, 4\], got .* with \[3, 8, 8\]"):
            find_reference(str(tmp_path / name), extractor, (3, 4, 4))
    reference.save(tmp_path / "r.npz")
    assert find_reference(str(tmp_path / "r.npz"), extractor, (3, 8, 8)).id == reference.id


def save_pictures(folder: Path, *pictures: Image.Image) -> str:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:02d}.png")
    return str(folder)


def test_a_reference_of_other_colours_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    colour = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in random_images(3, shape=(3, 4, 4))]
    grey = [picture.convert("L") for picture in colour]
    one, three = Pixels((1, 4, 4)), Pixels((3, 4, 4))
    found = save_pictures(tmp_path / "colour", *colour)
    with pytest.raises(EvaluationError, match=r"grey images for grey samples, got the colour image .*colour/00.png"):
        find_reference(found, one, (1, 4, 4))
    with pytest.raises(EvaluationError, match=r"got the colour image .*mixed/02.png"):
        find_reference(save_pictures(tmp_path / "mixed", *grey[:2], colour[2]), one, (1, 4, 4))
    with pytest.raises(
        EvaluationError, match=r"colour images for samples of 3 channels, got .*grey with grey images only"
    ):
        find_reference(save_pictures(tmp_path / "grey", *grey), three, (3, 4, 4))
    # grey pictures among photographs, and grey ones stored with three equal channels, are what they are
    assert find_reference(str(tmp_path / "mixed"), three, (3, 4, 4)).n == 3
    stored = save_pictures(tmp_path / "stored", *(picture.convert("RGB") for picture in grey))
    np.testing.assert_array_equal(
        find_reference(stored, one, (1, 4, 4)).mu, find_reference(str(tmp_path / "grey"), one, (1, 4, 4)).mu
    )
    with pytest.raises(EvaluationError, match=r"shape of the samples, \[3, 8, 8\], got .* with \[3, 4, 4\]"):
        find_reference(found, Pixels((3, 8, 8)), (3, 8, 8))


def _bad_files(folder: Path) -> dict[str, Path]:
    good = tiny_reference(random_images(30))
    good.save(folder / "good.npz")
    content = (folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(content[: len(content) // 2])
    (folder / "text.npz").write_text("mu, sigma")
    np.save(folder / "single.npy", good.mu)
    np.savez(folder / "absent.npz", mu=good.mu)
    np.savez(folder / "pickled.npz", mu=np.array([{"a": 1}], dtype=object), sigma=good.sigma)
    np.savez(folder / "stranger.npz", mu=good.mu, sigma=good.sigma)
    np.savez(folder / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez(folder / "shapes.npz", mu=np.zeros(2048), sigma=np.eye(3))
    np.savez(folder / "skew.npz", mu=np.zeros(2048), sigma=np.tri(2048))
    np.savez(folder / "json.npz", mu=good.mu, sigma=good.sigma, fewstep=np.array("{"))
    np.savez(folder / "fields.npz", mu=good.mu, sigma=good.sigma, fewstep=np.array('{"shape": null}'))
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "cannot be read"),
        ("text", "without mu and sigma"),
        ("single", "without mu and sigma"),
        ("absent", "without sigma"),
        ("pickled", "cannot be read"),
        ("stranger", "does not name its extractor"),
        ("nan", "not finite"),
        ("shapes", r"not \[2048, 2048\]"),
        ("skew", "not symmetric"),
        ("json", "does not hold valid reference"),
        ("fields", "does not hold valid reference"),
    ],
)
def test_bad_reference_files_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    file = _bad_files(tmp_path)[name]
    with pytest.raises(EvaluationError, match=message) as error:
        Reference.load(file)
    assert str(file) in str(error.value)


def test_a_missing_reference_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"must be a file, got .*gone\.npz"):
        Reference.load(tmp_path / "gone.npz")


# ---------------------------------------------------------------------------------------------- refusals


class Broken(Pixels):
    def _features(self, images: Tensor) -> Tensor:
        return super()._features(images).masked_fill(images.flatten(1) == 7, torch.nan)


def test_statistics_of_other_weights_are_refused() -> None:
    images = random_images(20)
    reference = replace(tiny_reference(images), extractor_sha256="f" * 64)
    with pytest.raises(EvaluationError, match="`reference` must be made with the extractor"):
        evaluate([images], reference, Pixels(TINY))


def test_images_of_another_shape_are_refused() -> None:
    reference = tiny_reference(random_images(20))
    with pytest.raises(EvaluationError, match=r"\[1, 2, 3\], got \[1, 3, 2\]"):
        evaluate([random_images(20, (1, 3, 2))], reference, Pixels(TINY))
    with pytest.raises(EvaluationError, match="8 features of the extractor pixels8, got 6"):
        evaluate([random_images(20, (1, 2, 4))], replace(reference, shape=None), Pixels((1, 2, 4)))


def test_too_few_images_are_refused() -> None:
    reference = tiny_reference(random_images(20))
    with pytest.raises(EvaluationError, match="no images"):
        evaluate([], reference, Pixels(TINY))
    with pytest.raises(EvaluationError, match="at least 2 images, got 1"):
        evaluate([random_images(1)], reference, Pixels(TINY))
    with pytest.raises(EvaluationError, match="more than 3 images"):
        evaluate([random_images(3)], reference, Pixels(TINY))
    assert evaluate([random_images(3)], reference, Pixels(TINY), metrics=["fid"]).fid is not None


def test_features_that_are_not_finite_are_refused_with_the_image() -> None:
    images = random_images(40, low=10)
    images[33, 0, 1, 2] = 7
    with pytest.raises(EvaluationError, match="image 33 are not finite"):
        evaluate(images.split(8), tiny_reference(random_images(20)), Broken(TINY))


def test_unknown_metrics_and_floating_images_are_refused() -> None:
    reference = tiny_reference(random_images(20))
    with pytest.raises(EvaluationError, match="'is'"):
        evaluate([random_images(20)], reference, Pixels(TINY), metrics=["is"])  # type: ignore[list-item]
    with pytest.raises(EvaluationError, match="to_uint8"):
        evaluate([random_images(20).float()], reference, Pixels(TINY))


# ---------------------------------------------------------------------------------------------- extractors


def test_small_features_do_not_depend_on_the_batch() -> None:
    extractor, images = SmallFeatures(), random_images(70, (1, 28, 28))
    together = extractor(images)
    assert together.shape == (70, extractor.dim) and together.dtype == torch.float32
    alone = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert together.std(0).max() > 0.1


def test_small_features_ignore_autocast_and_fast_matmuls() -> None:
    extractor, images = SmallFeatures(), random_images(64, (1, 28, 28))
    expected = extractor(images)
    torch.set_float32_matmul_precision("medium")  # bf16 inside float32 matmuls, where the processor has it
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(extractor(images), expected)
            loose = extractor.net(images.float() / 127.5 - 1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(loose.float(), expected)


def test_small_features_card_tells_how_they_were_made() -> None:
    extractor = SmallFeatures()
    card = extractor.card
    assert card["test_accuracy"] >= 0.91
    assert card["data"]["name"] == "fashion-mnist/train" and card["images_seen"] > 60_000
    assert {"command", "hardware", "date", "training"} <= card.keys()
    assert card["parameters"] < 250_000


def test_small_features_classify_the_test_images(clothes: ImageDataset) -> None:
    assert clothes.labels is not None
    weights, card = small_features.load_asset("small64")
    net = small_features.SmallNet()
    net.load_state_dict(weights)
    with torch.no_grad():
        guesses = net.eval()(clothes.images.float() / 127.5 - 1).argmax(1)
    assert (guesses == clothes.labels).float().mean() == pytest.approx(card["test_accuracy"], abs=0.02)


def test_weights_that_do_not_match_their_card_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("small64.safetensors", "small64.json"):
        (tmp_path / name).write_bytes((small_features.ASSETS / name).read_bytes())
    with (tmp_path / "small64.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    monkeypatch.setattr(small_features, "ASSETS", tmp_path)
    with pytest.raises(EvaluationError, match="its card says"):
        SmallFeatures()


def test_pixels_are_the_pixels() -> None:
    images = random_images(3)
    torch.testing.assert_close(Pixels(TINY)(images), images.reshape(3, 6) / 255)


def test_small_features_see_a_smaller_picture_as_a_resized_one() -> None:
    extractor, flat = SmallFeatures(), torch.full((1, 1, 16, 16), 100, dtype=torch.uint8)
    torch.testing.assert_close(extractor(flat), extractor(torch.full((1, 1, 28, 28), 100, dtype=torch.uint8)))
    assert isinstance(extractor_for((1, 16, 16), "small"), SmallFeatures)


def test_the_extractor_follows_from_the_shape() -> None:
    assert isinstance(extractor_for((1, 28, 28)), SmallFeatures)
    assert extractor_for((1, 8, 8)).name == "pixels64"
    assert extractor_for((3, 32, 32), "pixels").dim == 3072
    with pytest.raises(EvaluationError, match="'inception', or 'pixels'"):
        extractor_for((3, 28, 28), "small")
    with pytest.raises(EvaluationError, match=r"must be one of .*, got 'vgg'"):
        extractor_for((3, 64, 64), "vgg")  # type: ignore[arg-type]


def test_absent_inception_weights_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EvaluationError) as error:
        extractor_for((3, 64, 64))
    place = tmp_path / "hub" / "checkpoints" / features_module.INCEPTION_FILE
    for part in (str(place), "https://", features_module.INCEPTION_SHA256, "FEWSTEP_INCEPTION", "'small'"):
        assert part in str(error.value)
    assert not any(tmp_path.iterdir())  # nothing was downloaded
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(tmp_path / "mine.pth"))
    with pytest.raises(EvaluationError, match=r"mine\.pth"):
        Inception()


def test_other_inception_weights_are_refused_and_the_known_ones_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Inception.random()
    torch.save(random.net.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(EvaluationError, match="is not the Inception network"):
        Inception(tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest)
    loaded = Inception(tmp_path / "weights.pth")
    assert (loaded.name, loaded.sha256) == ("inception-v3-compat", digest)
    grey = random_images(2, (1, 28, 28))
    features = loaded(grey)
    assert features.shape == (2, 2048) and (features[0] - features[1]).abs().max() > 1e-3
    torch.testing.assert_close(features, random(grey.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(features[1:], loaded(grey[1:]), rtol=1e-4, atol=1e-5)
    assert Inception.random(1).sha256 != random.sha256 == Inception.random().sha256
    with pytest.raises(EvaluationError, match="1 or 3 channels"):
        loaded(random_images(2, (4, 28, 28)))


@pytest.mark.slow
def test_inception_fid_and_score_equal_torch_fidelitys_own_run(tmp_path: Path) -> None:
    import torch_fidelity

    class Images(torch.utils.data.Dataset[Tensor]):
        def __init__(self, images: Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    real, fake = random_images(6, (3, 32, 32)), random_images(12, (3, 32, 32), seed=1, high=128)
    extractor = Inception.random()
    scores: Scores = evaluate(
        fake.split(2), Reference.from_dataset(dataset_of(real), extractor), extractor, metrics=["fid", "isc"]
    )
    torch.save(extractor.net.state_dict(), tmp_path / "weights.pth")
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        cuda=False,
        fid=True,
        isc=True,
        verbose=False,
        cache=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
    )
    assert scores.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert scores.isc == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert scores.isc_std == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-6)
    assert "isc " in str(scores) and f"[{scores.protocol_id('isc')}]" in str(scores)


def test_an_inception_score_needs_inception_and_ten_images() -> None:
    images = random_images(6, (1, 8, 8))
    pixels = Pixels((1, 8, 8))
    reference = Reference.from_dataset(dataset_of(images), pixels)
    with pytest.raises(EvaluationError, match=r"must be inception for the Inception score \(isc\), got pixels64"):
        evaluate([images], reference, pixels, metrics=["isc"])
    with pytest.raises(EvaluationError, match="at least 10 images, got 4"):
        _inception_score(torch.zeros(4, 3))


def test_density_and_coverage_by_their_definition():
    """Against the equations written out for every pair, and the values expected of equal distributions."""
    torch.manual_seed(0)
    real, fake = torch.randn(60, 3), torch.randn(40, 3) * 0.7
    radii = [sorted((a - b).norm().item() for j, b in enumerate(real) if j != i)[4] for i, a in enumerate(real)]
    hits = [[(a - b).norm().item() <= radius for b in fake] for a, radius in zip(real, radii, strict=True)]
    found = _density_coverage(fake, real, rows=7)
    assert found["density"] == pytest.approx(sum(map(sum, hits)) / (5 * 40))
    assert found["coverage"] == pytest.approx(sum(map(any, hits)) / 60)
    same = _density_coverage(torch.randn(3000, 3), torch.randn(3000, 3))
    assert same["density"] == pytest.approx(1, abs=0.05) and same["coverage"] == pytest.approx(1 - 2**-5, abs=0.015)
    one = _density_coverage(torch.zeros(3000, 3), torch.randn(3000, 3))
    assert one["coverage"] < 0.01, "one image 3,000 times covers nothing"
    with pytest.raises(EvaluationError, match="more than 5 real images, got 5"):
        _density_coverage(fake, real[:5])


def test_the_test_set_is_a_reference_by_name(monkeypatch) -> None:
    monkeypatch.setattr("fewstep.evaluation.reference.reference_for", lambda dataset, extractor: dataset)
    try:
        found = find_reference("fashion-mnist-test", Pixels((1, 28, 28)), (1, 28, 28))
    except DataError:
        pytest.skip("no Fashion-MNIST on this machine")
    assert (found.name, len(found)) == ("fashion-mnist/test", 10_000)


def test_density_and_coverage_are_asked_for():
    dataset = Digits().load()
    reference = Reference.from_dataset(dataset, Pixels(dataset.shape))
    scores = evaluate([dataset.images[:200]], reference, Pixels(dataset.shape), metrics=["density", "coverage"])
    assert scores.fid is None and scores.density is not None and 0.5 < scores.density < 1.5
    assert scores.coverage is not None and 0 < scores.coverage < 1
