"""Stable Diffusion and SDXL as one file under the original names, read back by diffusers."""

import pytest
import torch
from safetensors.torch import load_file

from fewstep.system.errors import FileError, SettingsError

pytest.importorskip("diffusers")

from fewstep.formats.original_checkpoint import original_checkpoint
from fewstep.students.export import export_student
from fewstep.system.tensors import entries_of, write_entries
from fewstep.teachers import DiffusersTeacher
from tests.support.ldm import single_file
from tests.support.pipelines import load, tiny_sd15, tiny_sdxl, tiny_transformer
from tests.support.students import made_student

MAKERS = {
    "sd15": tiny_sd15,
    # diffusers tells SDXL's two text encoders apart by their widths
    "sdxl": lambda folder: tiny_sdxl(folder, widths=(4, 12)),
}


@pytest.fixture(scope="module", params=MAKERS)
def student(request, tmp_path_factory):
    """Teacher's folder, student's folder, and the export of a LoRA student with everything in it."""
    root = tmp_path_factory.mktemp(request.param)
    folder = MAKERS[request.param](root / "of")
    run = made_student(DiffusersTeacher(path=str(folder)), root / "run", [999, 499], {"rank": 2, "alpha": 1})
    export_student(run, root / "out", ["diffusers", "checkpoint"], torch.float32)
    return folder, root / "out"


def test_diffusers_reads_it_back(student):
    """Every weight of network, VAE and text encoders, to the bit."""
    folder, out = student
    exported = load(out)
    read = type(exported).from_single_file(out / "run.safetensors", config=str(folder), local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(exported, name):
            wanted, found = (getattr(pipeline, name).state_dict() for pipeline in (exported, read))
            assert found.keys() == wanted.keys()
            assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []


def test_it_is_what_another_writer_makes(student, tmp_path):
    _, out = student
    wanted = load_file(single_file(load(out), tmp_path / "other.safetensors"))
    found = load_file(out / "run.safetensors")
    assert found.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []


def test_it_is_a_teacher_again_with_its_marks(tmp_path):
    """A v-predicting student with zero terminal SNR says so by the keys that ComfyUI, Forge and fewstep read."""
    spec = DiffusersTeacher(path=str(tiny_sd15(tmp_path / "of")), prediction="v", zero_snr=True)
    export_student(made_student(spec, tmp_path / "run", [999]), tmp_path / "out", ["checkpoint"], torch.float32)
    keys = load_file(tmp_path / "out/run.safetensors").keys()
    assert {"v_pred", "ztsnr"} <= keys
    read = DiffusersTeacher(path=str(tmp_path / "out/run.safetensors"), config=str(tmp_path / "of")).load().denoiser
    assert read.prediction == "v" and read.schedule.alphas_cumprod[-1] < 1e-6


def test_old_names_of_the_vaes_attention(student, tmp_path):
    """Files of Stable Diffusion 1.5 on the hub have query, key, value and proj_attn."""
    pipeline = load(student[0])
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    states = {
        name: getattr(pipeline, name).state_dict()
        for name in ("vae", "unet", "text_encoder", "text_encoder_2")
        if hasattr(pipeline, name)
    }
    parts = {name: entries_of(state) for name, state in states.items()}
    for new, name in old.items():
        parts["vae"] = {key.replace(f".{new}.", f".{name}."): entry for key, entry in parts["vae"].items()}
    assert any(".proj_attn." in key for key in parts["vae"])
    write_entries(tmp_path / "old.safetensors", original_checkpoint(pipeline.unet, parts, False, False))
    wanted = load_file(single_file(pipeline, tmp_path / "new.safetensors"))
    found = load_file(tmp_path / "old.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_other_models_are_refused(tmp_path):
    folder, _ = tiny_transformer("sana", tmp_path / "sana")
    run = made_student(DiffusersTeacher(path=str(folder)), tmp_path / "run", [1.0])
    with pytest.raises(
        SettingsError, match="--formats checkpoint is for Stable Diffusion 1 and SDXL, got a SanaTransformer"
    ):
        export_student(run, tmp_path / "out", ["checkpoint"])
    pipeline = load(tiny_sd15(tmp_path / "sd15"))
    wide = {"embeddings.token_embedding.weight": torch.zeros(2, 1024)}
    parts = {"unet": pipeline.unet.state_dict(), "vae": pipeline.vae.state_dict(), "text_encoder": wide}
    with pytest.raises(FileError, match="got Stable Diffusion 2"):
        original_checkpoint(pipeline.unet, {name: entries_of(part) for name, part in parts.items()}, False, False)
