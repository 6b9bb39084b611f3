"""What an export states of a student in 8 bits and of its noise levels, against the files and programs themselves."""

import re

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.system.errors import SettingsError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.networks.quantized import quantizable, rounded
from fewstep.students.export import export_student
from fewstep.students.sample import FewStep
from fewstep.students.student import find_student, load_student
from tests.support.pipelines import load, prepared

LORA = {"lora": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_k", "to_v", "ff.net.2"]}}


@pytest.fixture(scope="module", params=[True, False], ids=["adapters", "whole"])
def run(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    adapters = LORA if request.param else {}
    quantize = "int8" if request.param else None
    values = {
        "kind": "distill",
        "teacher": prepared("sd3", root)[0].model_dump(mode="json") | {"quantize": quantize},
        "generator": {"times": [1.0, 0.5]} | adapters,
        "critic": adapters,
        "objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 0},
        "optim": {"generator": {"lr": 0.02}},
        "train": {"images": 4, "batch_size": 4, "evaluate_every": None, "ema_half_life": 0, "precision": "fp32", "device": "cpu"},
        "evaluation": {"samples": 0},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["distill", str(root / "run.yaml"), "--out", str(root / "run"), "--processes", "1"]) == 0
    return root / "run"


def test_the_card_states_the_error_of_8_bit_weights(run, tmp_path):
    """Of float8 by a cast: the same as an exported network that is cast layer by layer, from the same noise."""
    export_student(run, tmp_path / "out", dtype=torch.float32, probes=2)
    card = (tmp_path / "out/README.md").read_text()
    (row,) = re.findall(r"^\| error with 8-bit weights \| (.*) \|$", card, re.M)
    named = re.findall(r"(float8 as|float8 with|int8).*? ([\d.e-]+) %", row)
    errors = {name: float(value) / 100 for name, value in named}
    assert "of 2 finished samples (latents) from equal noise, against float32 weights" in row
    assert 0 < errors["int8"] < errors["float8 with"] < 0.5
    student, network = load_student(find_student(run)), load(tmp_path / "out").transformer
    cond = student.conditioner.cond(torch.arange(2), 2)
    denoiser = student.generator.denoiser
    base = getattr(denoiser, "base", denoiser)
    base.net.model = network
    student.generator.denoiser = base
    drawn = []
    with torch.no_grad():
        for cast in (False, True):
            for block in network.transformer_blocks if cast else ():
                for layer in block.modules():
                    if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                        layer.weight.copy_(layer.weight.to(torch.float8_e4m3fn))
            drawn.append(FewStep(student.generator)(range(2), student.shape, **cond))
    error = (drawn[1] - drawn[0]).norm() / drawn[0].norm()
    assert errors["float8 as"] == pytest.approx(error.item(), rel=0.06), "two digits"


def test_without_a_measurement_the_card_says_so(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--formats", "diffusers"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "| error with 8-bit weights | not measured (`fewstep export --probes 2` does) |" in card
    assert "| sigmas, after the shift | 1, 0.75 |" in card and "| times before the shift | 1, 0.5 |" in card
    quantised = "| base network in training | int8 |" in card
    assert quantised is (load_student(find_student(run)).settings.quantize is not None)
    with pytest.raises(SettingsError, match=r"--probes must be at most the 2 prompts in .*, got 3"):
        export_student(run, tmp_path / "out", ["diffusers"], probes=3)


def test_every_file_of_weights_says_where_the_student_is_called(run, tmp_path):
    written, _ = export_student(run, tmp_path / "out", dtype=torch.float32)
    own = [path for path in written if path.suffix == ".safetensors"]
    assert own
    for path in own:
        with safe_open(path, "pt") as file:
            assert file.metadata()["fewstep.sigmas"] == "[1.0, 0.75]"


def test_a_file_in_float8_is_the_cast_whose_error_the_card_states(run, tmp_path):
    """The layers that `--probes` rounds, in float8; all else as asked."""
    export_student(run, tmp_path / "out", ["unet", "fp8", "comfyui"], torch.float32)
    plain, small = (load_file(tmp_path / "out" / f"run_transformer{end}.safetensors") for end in ("", "_fp8"))
    assert plain.keys() == small.keys()
    network = load_student(find_student(run)).generator.denoiser
    network = getattr(network, "base", network)
    names = {
        name.removeprefix("net.model.") for name, layer in network.named_modules() if layer in quantizable(network)
    }
    cast = {name for name, value in small.items() if value.dtype == torch.float8_e4m3fn}
    if load_student(find_student(run)).settings.quantize is None:
        assert cast == {f"{name}.weight" for name in names}
    assert len(cast) > 10
    for name, value in plain.items():
        wanted = value.to(torch.float8_e4m3fn) if name in cast else value
        assert small[name].dtype == wanted.dtype and torch.equal(small[name].float(), wanted.float()), name
    assert "run_transformer_fp8.safetensors`: the same with float8 weights" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("way", ["cast", "float8", "int8"])
def test_rounding_is_as_fine_as_its_type(way):
    weight = 0.3 * torch.randn(8, 4, 3, 3)
    found = rounded(weight, way)
    assert found.shape == weight.shape and not torch.equal(found, weight)
    step = weight.flatten(1).abs().amax(1)[:, None, None, None] / 127.5  # the largest code is clamped by half a step
    bound = step.expand_as(weight) if way == "int8" else 2**-4 * weight.abs() + 2**-9
    assert ((found - weight).abs() <= 1.001 * bound).all()
