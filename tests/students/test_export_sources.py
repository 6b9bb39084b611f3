"""Weights of an export, read a tensor at a time from every form a teacher's files have, against the loaded pipeline."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from fewstep.networks.lora import merged
from fewstep.students.export import export_student
from fewstep.students.student import find_student, load_student
from fewstep.system.errors import FileError
from fewstep.teachers import DiffusersTeacher
from tests.support.ldm import single_file
from tests.support.pipelines import load, tiny_sd15, tiny_sdxl, with_encoders
from tests.support.students import made_student

LORA = {"rank": 2, "alpha": 1}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl", widths=(4, 12))


def plain(sdxl, root):
    return {"path": str(sdxl)}


def variant_in_shards(sdxl, root):
    load(sdxl).to(torch.float16).save_pretrained(root / "half", variant="fp16", max_shard_size="30KB")
    return {"path": str(root / "half")}


def shards(sdxl, root):
    load(sdxl).save_pretrained(root / "shards", max_shard_size="30KB")
    return {"path": str(root / "shards")}


def pickles(sdxl, root):
    """Only .bin files."""
    shutil.copytree(sdxl, root / "bin")
    for file in (root / "bin").glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    return {"path": str(root / "bin")}


def one_file(sdxl, root):
    return {"path": str(single_file(load(sdxl), root / "one.safetensors")), "config": str(sdxl)}


def tuned(sdxl, root):
    """A LoRA of the network and of both text encoders is merged into the teacher."""
    pipeline, tensors = load(sdxl), {}
    layers = {"unet": "to_q", "text_encoder": "q_proj", "text_encoder_2": "fc1"}
    for component, ending in layers.items():
        for path, module in getattr(pipeline, component).named_modules():
            if path.endswith(ending):
                tensors[f"{component}.{path}.lora_A.weight"] = torch.randn(2, module.in_features)
                tensors[f"{component}.{path}.lora_B.weight"] = torch.randn(module.out_features, 2)
    save_file(tensors, root / "style.safetensors")
    return {"path": str(sdxl), "lora": root / "style.safetensors", "lora_scale": 0.5}


SOURCES = {made.__name__: made for made in (plain, variant_in_shards, shards, pickles, one_file, tuned)}


def compare(spec, run, out):
    """Every weight of the exported pipeline against the teacher's, the student's network in its place."""
    found, wanted = load(out), spec.pipeline()
    denoiser = load_student(find_student(run)).generator.denoiser
    state = merged(denoiser) if hasattr(denoiser, "base") else denoiser.state_dict()
    for name, part in wanted.components.items():
        if isinstance(part, torch.nn.Module):
            expected = part.state_dict()
            if name in ("unet", "transformer"):
                expected = {key.removeprefix("net.model."): value for key, value in state.items()}
            own = getattr(found, name).state_dict()
            assert own.keys() == expected.keys(), name
            for key, value in expected.items():
                torch.testing.assert_close(own[key].float(), value.float(), rtol=1e-5, atol=1e-6, msg=f"{name} {key}")


CASES = [(source, LORA) for source in SOURCES] + [("plain", None), ("one_file", None)]


@pytest.mark.parametrize("source, lora", CASES)
def test_every_weight_is_the_loaded_pipelines(source, lora, sdxl, tmp_path):
    spec = DiffusersTeacher(**SOURCES[source](sdxl, tmp_path))
    run = made_student(spec, tmp_path / "run", [999, 499], lora)
    export_student(run, tmp_path / "out", ["diffusers"], torch.float32)
    compare(spec, run, tmp_path / "out")


def test_components_that_are_left_out(tmp_path):
    """SD3 without T5: null in model_index.json, no folder."""
    spec = DiffusersTeacher(path=str(with_encoders("sd3", tmp_path / "sd3")), without=("text_encoder_3", "tokenizer_3"))
    run = made_student(spec, tmp_path / "run", [1.0, 0.5], {"rank": 2, "targets": ["to_q"]})
    export_student(run, tmp_path / "out", ["diffusers"], torch.float32)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert not (tmp_path / "out/text_encoder_3").exists()
    compare(spec, run, tmp_path / "out")


def test_an_export_again_in_another_form_leaves_no_old_weights(sdxl, tmp_path):
    spec = DiffusersTeacher(path=str(sdxl))
    run = made_student(spec, tmp_path / "run", [999], LORA)
    for dtype in (torch.float32, torch.float16):
        export_student(run, tmp_path / "out", ["diffusers"], dtype)
    assert [file.name for file in (tmp_path / "out/unet").iterdir() if file.suffix == ".safetensors"] == [
        "diffusion_pytorch_model.safetensors"
    ]


def test_weights_that_are_not_there_are_named(tmp_path):
    folder = tiny_sd15(tmp_path / "sd15")
    run = made_student(DiffusersTeacher(path=str(folder)), tmp_path / "run", [999], LORA)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileError, match="unet must hold weights, got none"):
        export_student(run, tmp_path / "out", ["unet"])
    (tmp_path / "run/student.safetensors").write_bytes(b"0" * (tmp_path / "run/student.safetensors").stat().st_size)
    with pytest.raises(FileError, match="does not have the sha256 that its JSON says"):
        export_student(run, tmp_path / "other", ["unet"])
