"""DMD2's checkpoint folders: what is read, where it goes, and what is refused."""

import os

import numpy as np
import pytest
import torch

from fewstep.cli.main import main
from fewstep.formats.dmd2 import adm_spec, load_dmd2_critic, load_dmd2_generator
from fewstep.formats.model import load_generator
from fewstep.system.errors import FileError
from fewstep.training.start import read_start
from tests.support.golden import golden


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of the published layout, and the denoiser in it."""
    denoiser, _, _ = golden("edm_adm")
    keep = {k: v for k, v in denoiser.net.state_dict().items() if not k.startswith("map_augment")}
    tmp_path /= "checkpoint_model_000010"
    tmp_path.mkdir()
    torch.save({f"model.{k}": v for k, v in keep.items()}, tmp_path / "pytorch_model.bin")
    guidance = {f"{net}.model.{k}": v for k, v in keep.items() for net in ("real_unet", "fake_unet")}
    guidance |= {"cls_pred_branch.0.weight": torch.ones(2), "karras_sigmas": torch.ones(1000)}
    torch.save(guidance, tmp_path / "pytorch_model_1.bin")
    return tmp_path, denoiser


def test_network_is_found_from_its_weights(folder):
    path, denoiser = folder
    found, spec, provenance = load_dmd2_generator(path)
    assert spec == denoiser.net.spec.model_copy(update={"augment_dim": 0, "dropout": 0.0})
    assert len(provenance["source_sha256"]) == 64
    x, t = torch.randn(2, *spec.sample_shape), torch.tensor([0.3, 0.9], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x, t, labels=labels), denoiser(x, t, labels=labels))


def test_commands_take_the_folder_and_what_import_made_of_it(folder, tmp_path, capsys):
    path, denoiser = folder
    assert main(["import", str(path), "--out", str(tmp_path / "ours")]) == 0
    assert "fewstep sample" in capsys.readouterr().out
    generator, _, _ = load_generator(tmp_path / "ours" / "student.safetensors")
    assert denoiser.schedule.alpha_sigma(torch.tensor([generator.times[0]]))[1].item() == pytest.approx(80, rel=1e-5)
    images = []
    for number, model in enumerate((path, path / "pytorch_model.bin", tmp_path / "ours")):
        out = str(tmp_path / f"{number}.npz")
        assert main(["sample", str(model), "--seeds", "0-3", "--out", out]) == 0
        images.append(np.load(out)["images"])
    assert (images[0] == images[1]).all() and (images[0] == images[2]).all()


def test_a_run_starts_with_fake_score_and_head(folder):
    state = read_start(folder[0])
    assert {name.split(".")[0] for name in state["generator"]} == {"denoiser"}
    assert "head.0.weight" in state["critic"] and "denoiser.net.map_layer0.weight" in state["critic"]
    assert not any("real_unet" in name for name in state["critic"])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_damaged_and_hostile_files_are_refused(folder, tmp_path, monkeypatch):
    path, _ = folder
    monkeypatch.chdir(tmp_path)
    file = path / "pytorch_model.bin"
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"PK\3\4" + bytes(100)):
        file.write_bytes(part)
        with pytest.raises(FileError, match="damaged"):
            load_dmd2_generator(path)
    torch.save({"model.x": Hostile()}, file)
    with pytest.raises(FileError, match="do not trust it"):
        load_dmd2_generator(path)
    assert not (tmp_path / "executed").exists()
    torch.save([torch.ones(2)], file)
    with pytest.raises(FileError, match="no table of tensors"):
        load_dmd2_generator(path)
    torch.save({"model.layer": torch.ones(2)}, file)
    with pytest.raises(FileError, match="not those of an ADM"):
        load_dmd2_generator(path)
    torch.save({"other": torch.ones(2)}, path / "pytorch_model_1.bin")
    with pytest.raises(FileError, match="no fake_unet"):
        load_dmd2_critic(path)


def test_shapes_that_do_not_fit_are_refused(folder):
    path, denoiser = folder
    weights = {k: v for k, v in denoiser.net.state_dict().items() if not k.startswith("map_augment")}
    adm_spec(weights)
    weights["out_conv.weight"] = torch.ones(1)
    torch.save({f"model.{k}": v for k, v in weights.items()}, path / "pytorch_model.bin")
    with pytest.raises(FileError, match="other shapes"):
        load_dmd2_generator(path)


def test_files_of_torch_below_1_6_are_read(folder):
    """They are no zip archives: `torch.save` still writes them on request."""
    path, _ = folder
    before, spec, _ = load_dmd2_generator(path)
    file = path / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    found, again, _ = load_dmd2_generator(path)
    assert again == spec
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in found.state_dict().items())


def test_weights_that_claim_more_than_the_file_holds(folder):
    path, _ = folder
    file = path / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    name = next(iter(weights))
    torch.save(weights | {name: torch.zeros(1).expand(10**9)}, file)
    with pytest.raises(FileError, match=r"pytorch_model\.bin"):
        load_dmd2_generator(path)
