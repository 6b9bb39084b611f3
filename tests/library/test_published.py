"""Files of the published programs in the library: what it draws from them is what the command line draws."""

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli.main import main
from fewstep.system.errors import UserError
from tests.support.golden import golden
from tests.support.published import write_published


@pytest.fixture
def file(tmp_path):
    """An EDM pickle of a tiny network."""
    denoiser, _, _ = golden("edm_ddpmpp")
    write_published(tmp_path / "published.pkl", denoiser)
    return tmp_path / "published.pkl"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of DMD2's program."""
    denoiser, _, _ = golden("edm_adm")
    keep = {f"model.{k}": v for k, v in denoiser.net.state_dict().items() if not k.startswith("map_augment")}
    path = tmp_path / "checkpoint_model_000010"
    path.mkdir()
    torch.save(keep, path / "pytorch_model.bin")
    return path


def drawn(tmp_path, *words):
    assert (
        main(["sample", *map(str, words), "--seeds", "0-2", "--device", "cpu", "--out", str(tmp_path / "x.npz")]) == 0
    )
    return torch.from_numpy(np.load(tmp_path / "x.npz")["images"]).permute(0, 3, 1, 2)


def test_a_pickle_is_a_teacher_or_with_a_noise_level_a_student(file, tmp_path):
    teacher = fewstep.load(file, device="cpu")
    assert not teacher.is_student
    assert teacher.sample(range(3), evaluations=3).tensor.equal(drawn(tmp_path, file, "--evaluations", 3))
    student = fewstep.load(file, sigma_init=2.5, device="cpu")
    assert student.is_student and student.calls == 1
    assert student.sample(range(3)).tensor.equal(drawn(tmp_path, file, "--sigma-init", 2.5))


def test_a_folder_of_dmd2_is_a_student(folder, tmp_path):
    student = fewstep.load(folder, device="cpu")
    assert student.is_student and student.calls == 1
    assert student.sample(range(3)).tensor.equal(drawn(tmp_path, folder))
    at_other = fewstep.load(folder, sigma_init=2.5, device="cpu")
    assert at_other.sample(range(3)).tensor.equal(drawn(tmp_path, folder, "--sigma-init", 2.5))
    assert not at_other.sample(range(3)).tensor.equal(student.sample(range(3)).tensor)


def test_a_file_that_says_where_it_is_called_takes_no_noise_level(folder, tmp_path):
    assert main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 0
    for model in (tmp_path / "ours", tmp_path / "ours" / "student.safetensors", "digits"):
        with pytest.raises(UserError, match="`sigma_init` must be given for published"):
            fewstep.load(model, sigma_init=2.5)
