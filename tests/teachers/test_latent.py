"""EDM2's teachers of latents: the VAE's scaling, data of latents, and a distillation that is sampled as pictures."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL

from fewstep.data import EDM2Latents
from fewstep.data.edm2_latents import from_raw, to_raw
from fewstep.formats.model import DenoiserSpec, save_denoiser
from fewstep.networks import EDM2Spec
from fewstep.run.overriding import override
from fewstep.run.specs import DistillRun
from fewstep.students.sample import FewStep
from fewstep.students.student import find_student, load_student
from fewstep.system.errors import DataError, TeacherError
from fewstep.teachers import LatentTeacher
from tests.support.networks import randomised

SPEC = EDM2Spec(
    size=4, channels=4, num_classes=3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(2,)
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny network of latents and a tiny VAE of Stable Diffusion's kind."""
    root = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.save_pretrained(root / "vae")
    spec = DenoiserSpec(net=SPEC)
    save_denoiser(root / "t.safetensors", randomised(spec), spec, {})
    return root


def write_zip(path, arrays, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(name, stream.getvalue())
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))


def latents(path, count=6):
    draw = np.random.default_rng(0)
    arrays = {f"00000/img-{i}.npy": draw.normal(size=(8, 4, 4)).astype(np.float32) for i in range(count)}
    for array in arrays.values():
        array[4:] = 0.01
    write_zip(path, arrays, [[name, i % 3] for i, name in enumerate(arrays)])
    return arrays


def test_latents_are_normalised_as_published():
    raw = torch.tensor([5.81, 3.25, 0.12, -2.15])[:, None, None] + torch.tensor([4.17, 4.62, 3.71, 3.28])[:, None, None]
    torch.testing.assert_close(from_raw(raw), torch.full((4, 1, 1), 0.5))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(from_raw(to_raw(x)), x)


def test_the_codec_is_the_vae_on_raw_latents(places):
    teacher = LatentTeacher(path=str(places / "t.safetensors"), vae=str(places / "vae")).load()
    assert teacher.shape == (4, 4, 4) and teacher.picture_shape == (3, 8, 8)
    vae = AutoencoderKL.from_pretrained(places / "vae")
    x = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(teacher.codec.decode(x), vae.decode(to_raw(x)).sample)
        pictures = torch.rand(2, 3, 8, 8) * 2 - 1
        torch.testing.assert_close(teacher.codec.encode(pictures), from_raw(vae.encode(pictures).latent_dist.mean))
    with pytest.raises(TeacherError, match=r"teacher\.vae"):
        LatentTeacher(path=str(places / "t.safetensors"), vae=str(places / "none")).load()


def test_a_zip_of_latents_is_read(tmp_path):
    arrays = latents(tmp_path / "z.zip")
    dataset = EDM2Latents(path=tmp_path / "z.zip").load()
    assert dataset.shape == (4, 4, 4) and len(dataset) == 6 and dataset.num_classes == 3
    x, labels = dataset.batch(torch.tensor([5, 0]))
    assert labels.tolist() == [2, 0]
    off = to_raw(x[1]) - torch.from_numpy(arrays["00000/img-0.npy"][:4])
    assert 0.005 < off.std() < 0.02  # the array's deviation
    assert torch.equal(dataset.batch(torch.tensor([0]))[0][0], x[1])

    write_zip(tmp_path / "other.zip", {"a.npy": np.zeros((3, 4, 4), np.float32)}, [["a.npy", 0]])
    with pytest.raises(DataError, match=r"must be numbers \[8, H, W\].*got float32 \[3, 4, 4\]"):
        EDM2Latents(path=tmp_path / "other.zip").load()
    write_zip(tmp_path / "bare.zip", {"a.npy": np.zeros((8, 4, 4), np.float32)})
    with pytest.raises(DataError, match="at its top, got 1 and none"):
        EDM2Latents(path=tmp_path / "bare.zip").load()
    with pytest.raises(DataError, match="got no file"):
        EDM2Latents(path=tmp_path / "none.zip").load()


@pytest.mark.slow
def test_a_student_of_latents_is_trained_and_drawn_as_pictures(places, tmp_path):
    latents(tmp_path / "z.zip")
    run = DistillRun.model_validate(
        {
            "kind": "distill",
            "teacher": {"kind": "edm2-latents", "path": str(places / "t.safetensors"), "vae": str(places / "vae")},
            "generator": {"sigmas": [2.5]},
            "objective": {"method": "sida", "gan_after": 0},
            "data": {"kind": "edm2-latents", "path": str(tmp_path / "z.zip")},
            "train": {"images": 12, "batch_size": 4, "device": "cpu", "evaluate_every": None},
            "evaluation": {"samples": 0},
        }
    )
    override(run, ["--health.samples", "6", "--health.evaluations", "3"]).trainer(tmp_path / "run").fit()
    student = load_student(find_student(str(tmp_path / "run")))
    assert student.codec.shape == (3, 8, 8)
    cond = student.conditioner.cond(torch.tensor([0, 1]), 2)
    assert FewStep(student.generator, student.codec)(range(2), student.shape, **cond).shape == (2, 3, 8, 8)
