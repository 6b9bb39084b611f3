"""One's own pictures: the recipes `own/...` from a folder with odd pictures to students, by typed commands."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli.main import main
from fewstep.data import ImageFolder
from fewstep.evaluation.perceptual import perceptual_for
from fewstep.system.console import note
from fewstep.system.errors import DataError

LEAST = ["--processes", "1", "--train.device", "cpu", "--train.batch-size", "8"]


def odd_pictures(folder, count=10):
    """Pictures of several sizes in two classes, one grey, one with transparent pixels, one that cannot be read."""
    draw = np.random.default_rng(0)
    for index in range(count):
        height, width = (int(side) for side in draw.integers(9, 20, 2))
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert({3: "L", 5: "RGBA"}.get(index, "RGB"))
        if index == 5:
            image.putalpha(Image.new("L", image.size, 100))
        place = folder / ("cats" if index % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index}.png")
    (folder / "dogs" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def test_transparent_pixels_and_files_left_out(tmp_path):
    folder = odd_pictures(tmp_path / "mine")
    spec = ImageFolder(path=folder, size=8)
    with pytest.raises(DataError, match=r"5.png has transparent pixels. Try: data.background white"):
        spec.model_copy(update={"leave_out": ("dogs/broken.png",)}).load()
    with pytest.raises(DataError, match=r"broken.png cannot be read"):
        spec.model_copy(update={"background": "white"}).load()
    with pytest.raises(DataError, match=r"data.leave_out must name files in .*, got dogs/brocken.png"):
        spec.model_copy(update={"leave_out": ("dogs/brocken.png",)}).load()
    both = {"leave_out": ("dogs/broken.png",)}
    white, black = (spec.model_copy(update=both | {"background": name}).load() for name in ("white", "black"))
    assert len(white.images) == 10 and white.class_names == ("cats", "dogs") and white.source != black.source
    differs = (white.images.int() - black.images.int()).flatten(1).abs().sum(1)
    assert differs.count_nonzero() == 1 and differs.argmax() == 2  # cats/5.png
    assert (white.images[2].int() - black.images[2].int()).float().mean() == pytest.approx(255 - 100, abs=2)


@pytest.mark.slow
def test_from_a_folder_to_each_method(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    odd_pictures(tmp_path / "mine")
    data = [
        "--data.path",
        "mine",
        "--data.size",
        "8",
        "--data.background",
        "white",
        "--data.leave-out",
        "dogs/broken.png",
    ]
    small = ["--denoiser.net.widths", "16", "--denoiser.net.heads", "1"]
    dry = ["pretrain", "own/teacher", *data, *small, *LEAST, "--train.images", "64"]
    assert main([*dry, "--dry-run"]) == 0 and "parameters" in capsys.readouterr().out
    assert main([*dry, "--out", "runs/own-teacher"]) == 0
    assert (
        main(["pairs", "own/dmd", "--count", "8", "--evaluations", "3", "--processes", "1", "--train.device", "cpu"])
        == 0
    )
    said = capsys.readouterr().out
    assert "fewstep distill own/dmd --train.device cpu --pairs runs/own-pairs" in said
    for method in ("sid", "dmd2", "dmd"):
        assert main(["distill", f"own/{method}", *LEAST, "--train.images", "16", "--out", f"runs/{method}"]) == 0
        heard = capsys.readouterr().err
        assert ("trained on" in heard) is (method == "dmd2") and ("is L2" in heard) is (method == "dmd")
        assert main(["sample", f"runs/{method}", "--seeds", "0-3", "--classes", "cats", "--out", f"{method}.png"]) == 0
    score = ["eval", "runs/dmd2", "--samples", "8", "--evaluations", "3", "--metrics", "fid", "--processes", "1"]
    capsys.readouterr()
    assert main([*score, "--extractor", "pixels"]) == 0 and "pixels192-" in capsys.readouterr().out
    # the folder of its teacher's images is read as the teacher's training read it
    for reference in ([], ["--reference", "mine"]):
        line = [
            "eval",
            "runs/sid",
            "--samples",
            "8",
            "--evaluations",
            "0",
            "--metrics",
            "fid",
            "--processes",
            "1",
            *reference,
        ]
        assert main([*line, "--extractor", "pixels", "--out", "scores.json"]) == 0
        assert "/mine-10-" in capsys.readouterr().out
    # an evaluation that cannot run says how to go on
    line = ["distill", "own/sid", *LEAST, "--train.images", "16", "--out", "runs/scored", "--evaluation.samples", "8"]
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(tmp_path / "none.pth"))
    monkeypatch.setattr("fewstep.run.scoring.extractor_for", _no_inception)
    assert main(line) == 1
    heard = capsys.readouterr().err
    assert "--evaluation.samples 0" in heard and "--evaluation.extractor pixels" in heard


def _no_inception(shape, name, device, clip):
    from fewstep.evaluation.features import Inception

    return Inception(device=device)


def test_l2_where_lpips_weights_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    note.cache_clear()
    distance = perceptual_for((3, 32, 32))
    assert distance.name == "l2" and "fewstep fetch vgg16" in capsys.readouterr().err
    x, y = torch.randn(2, 4, 3, 32, 32).unbind(0)
    assert torch.allclose(distance(x, y), (x - y).square().mean((1, 2, 3))) and distance(x, x).count_nonzero() == 0
    assert perceptual_for((1, 28, 28)).name.startswith("small")


def test_a_network_is_fitted_to_its_data(tmp_path):
    from fewstep.run.overriding import override
    from fewstep.run.settings import load_run

    odd_pictures(tmp_path / "mine")
    run = load_run("own/teacher")
    line = ["--data.path", str(tmp_path / "mine"), "--data.background", "white", "--data.leave-out", "dogs/broken.png"]
    fitted = override(run, [*line, "--data.size", "16"])
    net = fitted.fitted(fitted.data.load()).net
    assert (net.size, net.channels, net.num_classes, net.widths) == (16, 3, 2, (48, 96))
    odd = override(run, [*line, "--data.size", "10"])
    with pytest.raises(ValueError, match=r"`data.size` must fit the network: .* multiple of 4.*, got 10"):
        odd.fitted(odd.data.load())


def test_init_looks_at_a_folder(tmp_path, monkeypatch, capsys):
    import yaml

    from fewstep.run.settings import load_run

    monkeypatch.chdir(tmp_path)
    odd_pictures(tmp_path / "mine")
    Image.new("L", (12, 12)).save(tmp_path / "mine" / "loose.png")
    assert main(["init", "mine"]) == 0
    said = capsys.readouterr().out
    assert "11 pictures, shorter sides 9 to " in said and "2 classes" in said and "cats/5.png" in said
    assert "left out: dogs/broken.png" in said and "1 pictures beside the sub-folders" in said
    assert "fewstep pretrain mine-teacher.yaml --out runs/mine-teacher" in said
    run = load_run("mine-teacher.yaml")
    text = (tmp_path / "mine-teacher.yaml").read_text()
    assert set(yaml.safe_load(text)["data"]["leave_out"]) == {"dogs/broken.png", "loose.png"}
    assert text.count("#") > 8 and run.data.background == "white" and run.data.size == 16
    assert len(run.data.load().images) == 10 and run.fitted(run.data.load()).net.num_classes == 2
    for line, error in (
        (["init", "mine"], "`--out` must be a new file"),
        (["init", "none"], "does not exist"),
        (["init", "mine-teacher.yaml", "--out", "x"], "got the file"),
    ):
        assert main(line) == 1 and error in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    assert main(["init", "bad"]) == 1 and "got none among 1" in capsys.readouterr().err


def test_a_grey_folder_is_grey(tmp_path):
    from fewstep.data.looking import look_at

    for index in range(3):
        Image.new("L", (40, 70), 50 * index).save(tmp_path / f"{index}.png")
    look = look_at(tmp_path)
    assert (look.channels, look.size(False), look.size(True), look.classes, look.shapes) == (1, 32, 32, {}, 1)
