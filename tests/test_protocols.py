"""Published protocols: sizes, frames and patch FID, with a random Inception in place of the published weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluate import EvaluationError, StreamingStats, evaluate, find_reference, frechet_distance
from fewstep.features import Extractor, FeatureError, Framed, Inception, Pixels, resized
from fewstep.protocols import PROTOCOLS, Protocol, find_protocol


@pytest.fixture(scope="module")
def inception():
    return Inception.random()


def images(count, side, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def test_resized_is_pil_on_the_whole_picture():
    picture = images(1, 40)
    whole = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(resized(picture, 16)[0].permute(1, 2, 0).numpy(), np.asarray(whole))
    assert resized(picture, 40) is picture


def test_frames_show_inception_what_they_say(inception):
    """A patch is the central 299 pixels as they are; a clean picture was resized by PIL's bicubic filter."""
    picture = images(1, 320)
    patch = picture[:, :, 10:309, 10:309]
    assert torch.equal(Framed(inception, "patch")(picture), inception(patch))
    small = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC)
    clean = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    assert torch.equal(Framed(inception, "clean")(picture), inception(clean))
    names = {inception.sha256, Framed(inception, "clean").sha256, Framed(inception, "patch").sha256}
    assert len(names) == 3 and Framed(inception, "clean").name == "inception-random-clean299"
    with pytest.raises(FeatureError, match=r"patches are 299 pixels wide, the images \[3, 256, 256\]"):
        Framed(inception, "patch")(images(1, 256))


def write(folder, pictures):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return str(folder)


def test_both_sides_are_brought_to_size_in_the_same_way(tmp_path):
    """Real images in files of many shapes, resized by the reader, have the statistics of samples resized by the scorer."""
    pictures = images(6, 24)
    wide = torch.cat(
        [torch.zeros(6, 3, 24, 5, dtype=torch.uint8), pictures, torch.zeros(6, 3, 24, 5, dtype=torch.uint8)], 3
    )
    folder = write(tmp_path / "wide", wide)
    pixels = Pixels((3, 8, 8))
    reference = find_reference(folder, pixels, (3, 8, 8), 8)
    scores = evaluate([resized(pictures, 8)], reference, pixels, metrics=["fid"], seen="lanczos8-uint8")
    assert scores.fid == pytest.approx(0, abs=1e-4) and scores.protocol.endswith("/6/lanczos8-uint8")


def test_names_and_what_is_refused(tmp_path):
    assert find_protocol("coco-30k").samples == 30_000 and find_protocol("sdxl-10k").patch
    with pytest.raises(EvaluationError, match="no protocol 'coco': there are coco-30k, sdxl-10k"):
        find_protocol("coco")
    with pytest.raises(EvaluationError, match="measures patches of the real images too"):
        PROTOCOLS["sdxl-10k"].patches("coco.npz", Pixels((3, 8, 8)))


class Blocks(Extractor):
    """Means of a 4 x 4 grid: an extractor of 48 features that takes any size."""

    name, sha256, dim, device = "blocks", "0" * 64, 48, torch.device("cpu")

    def _check_shape(self, shape):
        assert shape[0] == 3

    def _features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def test_a_protocol_from_the_command_line(tmp_path, monkeypatch, capsys):
    """FID and patch FID of a teacher equal those computed by hand from the pictures that `sample` writes; sizes are scaled down."""
    pytest.importorskip("diffusers")
    from torchvision.transforms.functional import pil_to_tensor

    import fewstep.compare
    from fewstep.cli import main

    from .pipelines import tiny_clip, tiny_sdxl

    sdxl, clip = tiny_sdxl(tmp_path / "sdxl"), tiny_clip(tmp_path / "clip")
    monkeypatch.setattr(fewstep.compare, "extractor_for", lambda *_: Blocks())
    monkeypatch.setattr(Framed, "SIDE", 10)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    assert main(["prepare", str(sdxl), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "p")]) == 0
    real = write(tmp_path / "real", images(4, 24, seed=1))
    common = [str(sdxl), "--prompts", str(tmp_path / "p"), "--evaluations", "2"]
    command = ["eval", *common, "--reference", real, "--metrics", "fid", "--out", str(tmp_path / "out.json")]
    command += ["--processes", "1", "--clip", str(clip), "--protocol", "tiny"]
    monkeypatch.setitem(PROTOCOLS, "tiny", Protocol("tiny", 4, 300, True, ""))
    assert main(command) == 1
    assert "compares images of 300 pixels, the samples have 16" in capsys.readouterr().err
    monkeypatch.setitem(PROTOCOLS, "tiny", Protocol("tiny", 4, 13, True, ""))
    assert main(command) == 0
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["n"] == 4 and row["protocol"].endswith("/4/lanczos13-uint8") and "clip_score" in row

    assert main(["sample", *common, "--seeds", "0-3", "--out", str(tmp_path / "drawn")]) == 0
    for metric, frame in (("fid", "clean"), ("patch_fid", "patch")):
        both = []
        for folder in ("drawn", "real"):
            files = sorted((tmp_path / folder).glob("*.png"))
            stats = StreamingStats(Blocks.dim)
            pictures = resized(torch.stack([pil_to_tensor(Image.open(file)) for file in files]), 13)
            stats.update(Framed(Blocks(), frame)(pictures))
            both += [stats.mu(), stats.sigma()]
        assert row[metric] == pytest.approx(frechet_distance(*both), rel=1e-3)
