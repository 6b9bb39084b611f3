"""Captioned images in every form, encoded by `fewstep prepare`, and a GAN on them."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep.system.errors import DataError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.data import Prepared, captioned_images
from fewstep.system.weights import load_weights
from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import tiny_sdxl
from tests.support.processes import ranks

CAPTIONS = ["a cat", "a dog", "a cat"]


def png(number):
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def write(folder, form):
    """Three images, 20 x 24, in one of the forms; returns what to give as the path."""
    folder.mkdir()
    if form == "tar":
        with tarfile.open(folder / "0.tar", "w") as archive:
            for number, caption in enumerate(CAPTIONS):
                text = json.dumps({"caption": caption}).encode() if number else caption.encode()
                for name, blob in ((f"{number}.png", png(number)), (f"{number}.{'json' if number else 'txt'}", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(blob)
                    archive.addfile(member, io.BytesIO(blob))
        return folder
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.png").write_bytes(png(number))
        if form == "sidecar":
            (folder / f"{number}.txt").write_text(caption + "\n")
    if form == "table":
        rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(CAPTIONS)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("form", ["table", "sidecar", "tar"])
def test_all_forms_give_the_same(tmp_path, form):
    found = captioned_images(write(tmp_path / "a", form), (16, 16))
    assert found.captions == CAPTIONS and found.images.shape == (3, 3, 16, 16)
    other = captioned_images(write(tmp_path / "b", "sidecar"), (16, 16))
    assert torch.equal(found.images[:], other.images[:])


def test_what_is_wrong_with_captions_is_named(tmp_path):
    folder = write(tmp_path / "a", "sidecar")
    (folder / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images have no caption in a .txt file of the same name, first 1.png"):
        captioned_images(folder, (16, 16))
    (folder / "1.txt").write_text(" ")
    with pytest.raises(DataError, match=r"1.txt: this caption is empty"):
        captioned_images(folder, (16, 16))
    (folder / "captions.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(DataError, match=r"captions.jsonl, line 1: write"):
        captioned_images(folder, (16, 16))
    with pytest.raises(DataError, match="no captioned images at"):
        captioned_images(tmp_path / "nothing", (16, 16))
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"bad.tar cannot be read as a tar file"):
        captioned_images(tmp_path / "bad.tar", (16, 16))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl")


def prepare(sdxl, tmp_path, *more):
    (tmp_path / "prompts.txt").write_text("a house\na dog\n")
    images = write(tmp_path / "images", "table")
    arguments = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--images",
        str(images),
        "--out",
        str(tmp_path / "p"),
        *more,
    ]
    return main(["prepare", str(sdxl), "--dtype", "float32", *arguments])


def test_latents_are_the_vaes_and_know_their_prompts(sdxl, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    assert prepare(sdxl, tmp_path) == 0
    assert "3 prompts, about 0.0 MiB" in (said := capsys.readouterr().out) and "3 images (0 existed already) in" in said
    dataset = Prepared(path=tmp_path / "p").load()
    assert dataset.class_names == ("a house", "a dog", "a cat") and dataset.labels.tolist() == [2, 1, 2]
    x, labels = dataset.batch(torch.tensor([2, 0]))
    record = tmp_path / "p" / "latents-00000.json"
    before, text = dataset.fingerprint, record.read_text()
    record.write_text(text.replace(json.loads(text)["sha256"], "0" * 64))  # other pictures under the same captions
    assert Prepared(path=tmp_path / "p").load().fingerprint != before
    record.write_text("{}")
    with pytest.raises(DataError, match=r"latents-00000\.json cannot be read"):
        Prepared(path=tmp_path / "p").load()
    record.write_text(text)
    vae = DiffusionPipeline.from_pretrained(sdxl).vae
    pictures = captioned_images(tmp_path / "images", (16, 16)).images[:].float() / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(x, wanted[[2, 0]])
    assert labels.tolist() == [2, 2]


def test_a_malformed_picture_is_left_out_and_said(sdxl, tmp_path, capsys):
    images = write(tmp_path / "images", "sidecar")
    (images / "1.png").write_bytes(png(1)[:200])
    arguments = ["prepare", str(sdxl), "--images", str(images), "--out", str(tmp_path / "p"), "--device", "cpu"]
    assert main(arguments) == 1
    assert "1.png cannot be read" in (said := capsys.readouterr().err) and "1 of 3 items are malformed" in said
    assert main([*arguments, "--max-malformed", "0.4"]) == 0
    said = capsys.readouterr()
    assert "2 images" in said.out and "skipped.jsonl names them, the first 1.png" in said.err
    assert len(Prepared(path=tmp_path / "p").load()) == 2


def test_nothing_to_prepare_and_nowhere_to_write_are_said(sdxl, tmp_path, capsys):
    assert main(["prepare", str(sdxl), "--out", str(tmp_path / "p")]) == 1
    assert "`--prompts` or `--images` must be given" in capsys.readouterr().err
    assert main(["prepare", str(sdxl), "--images", str(tmp_path)]) == 1
    assert "`--out` must be given" in capsys.readouterr().err


def test_a_killed_preparation_of_images_goes_on(sdxl, tmp_path, capsys):
    assert prepare(sdxl, tmp_path) == 0
    (tmp_path / "p/latents-00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"latents-00000.safetensors is missing"):
        Prepared(path=tmp_path / "p").load()
    arguments = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "p"),
    ]
    assert main(["prepare", str(sdxl), "--dtype", "float32", *arguments]) == 0
    assert (
        "(3 existed already), 3 images (0 existed already)" in (said := capsys.readouterr().out)
        and "(0 existed already)" in said
    )
    assert len(Prepared(path=tmp_path / "p").load()) == 3
    (tmp_path / "p/latents-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"latents-00000.safetensors cannot be read .* delete it"):
        Prepared(path=tmp_path / "p").load()


def gan_run(sdxl, folder, adapters, **train):
    """Four-step DMD2 with a GAN on the prepared images."""
    return {
        "kind": "distill",
        "teacher": {"kind": "diffusers", "path": str(sdxl), "prompts": folder},
        "generator": {"timesteps": [999, 749, 499, 249]} | adapters,
        "critic": adapters,
        "objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 5e-3, "guidance": 8.0},
        "data": {"kind": "prepared", "path": folder},
        "train": {"batch_size": 4, "evaluate_every": None, "precision": "fp32"} | train,
        "evaluation": {"samples": 0},
    }


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_gan_on_prepared_images(sdxl, tmp_path, lora, capsys):
    assert prepare(sdxl, tmp_path) == 0
    folder, adapters = str(tmp_path / "p"), {"lora": {"rank": 2}} if lora else {}
    run = gan_run(sdxl, folder, adapters, images=8, log_every=4)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    assert main(["distill", str(file), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "x_gradient/gan" in line)
    assert line["loss/critic_gan"] > 0 and line["x_gradient/gan"] > 0
    # the same images for another VAE, and prompts that are not the captions
    other = tiny_sdxl(tmp_path / "other", seed=1)
    run["teacher"] = {"kind": "diffusers", "path": str(other)}
    file.write_text(yaml.safe_dump(run))
    assert main(["distill", str(file), "--out", str(tmp_path / "run2"), "--processes", "1"]) == 1
    assert "must be encoded by the VAE of" in capsys.readouterr().err
    teacher = DiffusersTeacher(path=str(sdxl))
    teacher.prepare(["another prompt"], tmp_path / "q", teacher.encoder())
    run["teacher"] = {"kind": "diffusers", "path": str(sdxl), "prompts": str(tmp_path / "q")}
    file.write_text(yaml.safe_dump(run))
    assert main(["distill", str(file), "--out", str(tmp_path / "run2"), "--processes", "1"]) == 1
    assert "must be among the prompts in" in capsys.readouterr().err


def test_a_pipelines_network_is_trained_on_and_saved_as_a_pipeline(sdxl, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    assert prepare(sdxl, tmp_path) == 0
    folder = str(tmp_path / "p")
    run = {
        "kind": "pretrain",
        "pipeline": {"kind": "diffusers", "path": str(sdxl), "prompts": folder},
        "guidance": 2.0,
        "data": {"kind": "prepared", "path": folder},
        "noise": {"kind": "uniform", "low": 0.0, "high": 1.0},
        "optim": {"lr": 1e-3},
        "train": {
            "images": 32,
            "batch_size": 8,
            "log_every": 8,
            "evaluate_every": None,
            "precision": "fp32",
            "ema_half_life": 0,
        },
        "evaluation": {"samples": 0, "evaluations": 3},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    assert main(["pretrain", str(file), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    before, after = (
        DiffusionPipeline.from_pretrained(sdxl),
        DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline"),
    )
    assert any(
        not torch.equal(value, after.unet.state_dict()[name]) for name, value in before.unet.state_dict().items()
    )
    assert list((tmp_path / "run").glob("**/samples-*.png"))
    # it is a teacher like any other, with the prompts it was trained on
    arguments = [
        "--prompts",
        folder,
        "--evaluations",
        "3",
        "--guidance",
        "2",
        "--seeds",
        "0-1",
        "--out",
        str(tmp_path / "s.png"),
    ]
    assert main(["sample", str(tmp_path / "run/pipeline"), *arguments]) == 0
    run["data"] = {"kind": "folder", "path": str(tmp_path / "images")}
    file.write_text(yaml.safe_dump(run))
    assert main(["pretrain", str(file), "--out", str(tmp_path / "run2"), "--processes", "1"]) == 1
    assert "must be prepared images for a pipeline" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_equal_one_on_one_backbone_with_a_gan(sdxl, tmp_path):
    """K steps, GAN, adapters for both players: what two processes make of a batch is what one makes of its halves."""
    assert prepare(sdxl, tmp_path) == 0
    folder, adapters = str(tmp_path / "p"), {"lora": {"rank": 2}}
    run = gan_run(sdxl, folder, adapters, images=12, micro_batch=2, ema_half_life=0)
    run["optim"] = {"generator": {"lr": 1e-3}, "critic": {"lr": 1e-3}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    assert main(["distill", str(file), "--out", str(tmp_path / "1"), "--processes", "1"]) == 0
    ranks(main, ["distill", str(file), "--out", str(tmp_path / "2"), "--processes", "2"])
    one, two = (load_weights(tmp_path / count / "student.safetensors")[0] for count in ("1", "2"))
    assert one.keys() == two.keys() and len(one) > 50
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


def test_dmd2s_text_to_image_lmdb(sdxl, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float16)
    with lmdb.open(str(tmp_path / "db"), map_size=2**20) as database, database.begin(write=True) as transaction:
        transaction.put(b"latents_shape", b"3 4 8 8")
        transaction.put(b"prompts_shape", b"3")
        for number, caption in enumerate(CAPTIONS):
            transaction.put(f"latents_{number}_data".encode(), latents[number].tobytes())
            transaction.put(f"prompts_{number}_data".encode(), caption.encode())
    assert main(["prepare", str(sdxl), "--images", str(tmp_path / "db"), "--out", str(tmp_path / "p")]) == 0
    dataset = Prepared(path=tmp_path / "p").load()
    assert dataset.class_names == ("a cat", "a dog") and dataset.labels.tolist() == [0, 1, 0]
    x, _ = dataset.batch(torch.arange(3))
    assert torch.equal(x, torch.from_numpy(latents).float())
