"""One .safetensors file in the original programs' form, as fine-tunes are shared, is the pipeline that it was made of."""

import json

import pytest
import torch

from fewstep.system.errors import TeacherError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.teachers import DiffusersTeacher
from tests.support.families import NAMES, parts
from tests.support.ldm import single_file
from tests.support.pipelines import load, tiny_sd15, tiny_sdxl, tiny_transformer

MAKERS = {
    # diffusers tells SDXL's two text encoders apart by their widths
    "sdxl": lambda folder: tiny_sdxl(folder, widths=(4, 12)),
    "sd15": tiny_sd15,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and file of each."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: make(root / name) for name, make in MAKERS.items()}
    return {name: (folder, single_file(load(folder), root / f"{name}.safetensors")) for name, folder in folders.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_single_file_is_its_pipeline(models, name):
    """Weights, noise table, VAE and text encoders, to the bit."""
    folder, file = models[name]
    one, other = DiffusersTeacher(path=str(folder)), DiffusersTeacher(path=str(file), config=str(folder))
    expected, found = one.load(), other.load()
    state = found.denoiser.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.denoiser.state_dict().items())
    assert found.student_spec == expected.student_spec and found.codec.sha256 == expected.codec.sha256
    for a, b in zip(one.encoder()(["a cat", "a dog"]), other.encoder()(["a cat", "a dog"]), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_from_a_single_file_to_a_lora(models, tmp_path):
    """The way of docs/text_to_image.md: prepare, distil, sample, export, from the file alone and its configuration."""
    folder, file = models["sdxl"]
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"""
kind: distill
teacher: {{kind: diffusers, path: {file}, config: {folder}, prompts: {tmp_path / "prepared"}}}
generator: {{timesteps: [999, 499], lora: {{rank: 2}}}}
critic: {{lora: {{rank: 2}}}}
objective: {{method: dmd2, critic_steps: 1, gan_weight: 0, guidance: 2.0}}
train: {{images: 8, batch_size: 4, precision: fp32, evaluate_every: null}}
evaluation: {{samples: 0}}
"""
    )
    assert main(["prepare", str(run), "--prompts", str(tmp_path / "prompts.txt")]) == 0
    assert main(["distill", str(run), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    sample = [
        "sample",
        str(tmp_path / "run"),
        "--prompt",
        "a cat",
        "--seeds",
        "0-1",
        "--out",
        str(tmp_path / "cat.png"),
    ]
    assert main(sample) == 0 and (tmp_path / "cat.png").exists()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("lora/*_lora.safetensors"))


def test_a_file_of_something_else_is_refused(models, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match="cannot be loaded"):
        DiffusersTeacher(path=str(tmp_path / "other.safetensors"), config=str(models["sdxl"][0])).load()
    (tmp_path / "cut.safetensors").write_bytes(models["sdxl"][1].read_bytes()[:1000])
    with pytest.raises(TeacherError, match="cannot be"):
        DiffusersTeacher(path=str(tmp_path / "cut.safetensors"), config=str(models["sdxl"][0])).load()


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sana", "pixart", *NAMES])
@pytest.mark.parametrize("config", [False, True])
def test_single_files_of_transformers_are_refused_with_the_way_out(name, config, tmp_path):
    """As they are shared: a network alone. The way out that the message gives is diffusers' own."""
    from safetensors.torch import save_file

    if name in NAMES:
        kind, components = parts(name)
        network, index = components["transformer"], {"_class_name": kind.__name__}
        for part in ("transformer", "vae"):
            components[part].save_config(tmp_path / "of" / part)
            index[part] = ["diffusers", type(components[part]).__name__]
        (tmp_path / "of" / "model_index.json").write_text(json.dumps(index))
    else:
        network = load(tiny_transformer(name, tmp_path / "of")[0]).transformer
    file = tmp_path / "network.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    teacher = DiffusersTeacher(path=str(file), config=str(tmp_path / "of") if config else None)
    with pytest.raises(
        TeacherError, match=r"one file of a teacher must hold .* from_single_file of its network's class"
    ):
        teacher.pipeline()
