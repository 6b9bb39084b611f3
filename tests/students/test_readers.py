"""Exported files by the rules of ComfyUI and of kohya's scripts (tests/support/readers.py)."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from fewstep.networks.lora import LoraSpec, merged
from fewstep.students.export import export_student
from fewstep.students.export.lora import kohya_entries
from fewstep.students.student import find_student, load_student
from fewstep.system.errors import SettingsError
from fewstep.system.tensors import Entry
from fewstep.system.weights import load_weights, save_weights
from fewstep.teachers import DiffusersTeacher
from tests.support.ldm import SD15, SDXL
from tests.support.pipelines import GOLDEN, load, tiny_sd15, tiny_sdxl, tiny_transformer
from tests.support.readers import (
    COMFYUI_NODES,
    KOHYA_SDXL,
    comfyui_changes,
    comfyui_has_place,
    comfyui_simple,
)
from tests.support.students import made_student

FLOW, TABLE = [1.0, 0.75, 0.5, 0.25], [999, 749, 499, 249]
FAMILIES = ("sd15", "sdxl", "sd3", "sd35", "flux", "sana", "pixart")
WORKFLOWS = ("sd15", "sdxl", "sd3", "sd35", "flux")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Run and export of a LoRA student of each family, rank 4 and alpha 1."""
    root, found = tmp_path_factory.mktemp("readers"), {}
    for name in FAMILIES:
        make = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}.get(name)
        folder = make(root / "of" / name) if make else tiny_transformer(name, root / "of" / name)[0]
        spec = DiffusersTeacher(path=str(folder), resolution=16 if name == "flux" else None)
        times = TABLE if name in ("sd15", "sdxl", "pixart") else FLOW
        run = made_student(spec, root / "runs" / name, times, {"rank": 4, "alpha": 1})
        formats = ["lora"] + (["comfyui"] if name in WORKFLOWS else [])
        export_student(run, root / name, formats, torch.float32)
        found[name] = run, root / name
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sana"])
def test_comfyui_adds_what_the_student_learnt(name, exports):
    """Alpha is 1 and the rank 4: a reader that misses alpha is four times too strong."""
    run, out = exports[name]
    student = load_student(find_student(run))
    network, adapted = student.net.model, student.generator.denoiser
    unet = network == "UNet2DConditionModel"
    tensors = load_file(out / "lora" / (f"{name}_lora.safetensors" if unet else "pytorch_lora_weights.safetensors"))
    state, base = merged(adapted), adapted.base.state_dict()
    changes = {
        key.removeprefix("net.model.").removesuffix(".weight"): state[key] - base[key]
        for key in state
        if not torch.equal(state[key], base[key])
    }
    if name == "sdxl":  # its layers go by the original names there, which another test compares
        sizes = sorted(key for key in tensors if key.endswith(".alpha"))
        assert len(sizes) == len(changes) and all(tensors[key] == 1 for key in sizes)
        return
    found, used = comfyui_changes(tensors, network, changes)
    assert used == tensors.keys() and found.keys() == changes.keys()
    for path, change in changes.items():
        torch.testing.assert_close(found[path], change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux"])
def test_comfyui_has_a_place_for_every_layer(name, exports):
    network = load_student(find_student(exports[name][0])).net.model
    tensors = load_file(exports[name][1] / "lora/pytorch_lora_weights.safetensors")
    paths = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in tensors}
    assert len(paths) > 10 and [path for path in paths if not comfyui_has_place(network, path)] == []


@pytest.mark.parametrize("name, config, count", [("sdxl", SDXL, 788), ("sd15", SD15, 278)])
def test_kohyas_scripts_find_every_layer_of_the_full_size_models(name, config, count):
    """788 layers of SDXL by the names of kohya's own UNet; Stable Diffusion 1.5's by diffusers', as in its."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = [path for path, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    empty = Entry((1, 1), torch.float32, lambda: torch.empty(1, 1))
    adapters = {path: (empty, empty) for path in layers if LoraSpec().fits(path)}
    found = {key.partition(".")[0] for key in kohya_entries(adapters, LoraSpec(), unet, torch.float32)}
    assert len(found) == count == len(adapters)
    if name == "sdxl":
        patterns = [re.compile(f"lora_unet_{pattern}") for pattern in KOHYA_SDXL]
        assert [key for key in found if not any(pattern.fullmatch(key) for pattern in patterns)] == []
        native = json.loads((GOLDEN / "comfyui_keys.json").read_text())["sdxl"]["diffusers_to_native"].values()
        known = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in native}
        assert found <= known  # ComfyUI takes a network's own names too
    else:
        assert found == {f"lora_unet_{path.replace('.', '_')}" for path in adapters}


def same_as_merged(pipeline, network, student):
    """The pipeline's network, its LoRA fused, has the student's merged weights."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    wanted = {k.removeprefix("net.model."): v for k, v in merged(student.generator.denoiser).items()}
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_diffusers_reads_sdxls_kohya_file(exports):
    from diffusers import DiffusionPipeline

    run, out = exports["sdxl"]
    student = load_student(find_student(run))
    pipeline = DiffusionPipeline.from_pretrained(student.settings.path)
    pipeline.load_lora_weights(out / "lora", weight_name="sdxl_lora.safetensors")
    same_as_merged(pipeline, pipeline.unet, student)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sana"])
def test_diffusers_reads_a_transformers_lora(name, exports):
    run, out = exports[name]
    student = load_student(find_student(run))
    pipeline = load(student.settings.path)
    pipeline.load_lora_weights(out / "lora", weight_name="pytorch_lora_weights.safetensors")
    same_as_merged(pipeline, pipeline.transformer, student)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("own, style", [(1.0, 0.0), (1.0, 0.7), (0.5, 1.0)])
def test_beside_another_lora_the_changes_add(name, own, style, exports, tmp_path):
    """In diffusers, by `set_adapters`; with the other at 0 the weights are the student's. ComfyUI's rule is a sum by itself."""
    run, out = exports[name]
    student = load_student(find_student(run))
    pipeline, component = load(student.settings.path), "unet" if name == "sdxl" else "transformer"
    network = getattr(pipeline, component)
    base = {key: value.clone() for key, value in network.state_dict().items()}
    tensors, changes = {}, {}
    for path, layer in network.named_modules():
        if path.endswith("to_q"):
            down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            tensors |= {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": up}
            changes[f"{path}.weight"] = up @ down
    save_file(tensors, tmp_path / "style.safetensors")
    pipeline.load_lora_weights(out / "lora", weight_name="pytorch_lora_weights.safetensors", adapter_name="student")
    pipeline.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    pipeline.set_adapters(["student", "style"], [own, style])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    learnt = {k.removeprefix("net.model."): v for k, v in merged(student.generator.denoiser).items()}
    for key, value in getattr(pipeline, component).state_dict().items():
        wanted = base[key] + own * (learnt[key] - base[key]) + style * changes.get(key, torch.tensor(0.0))
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
    assert "the two changes of the weights add" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_have_what_their_nodes_need_and_visit_the_students_times(name, exports):
    run, out = exports[name]
    nodes = json.loads((out / f"{name}_comfyui.json").read_text())
    for node in nodes.values():
        assert node["inputs"].keys() == COMFYUI_NODES[node["class_type"]], node
        assert all(value[0] in nodes for value in node["inputs"].values() if isinstance(value, list))
    sampler = next(node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["steps"], sampler["cfg"]) == ("lcm", "simple", 4, 1)
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    file = f"{name}_lora.safetensors" if name in ("sd15", "sdxl") else "pytorch_lora_weights.safetensors"
    assert kinds["LoraLoaderModelOnly"]["lora_name"] == file
    if name not in ("sd15", "sdxl"):
        schedule = load_student(find_student(run)).generator.denoiser.schedule
        wanted = schedule.alpha_sigma(torch.tensor(FLOW))[1].tolist()
        assert comfyui_simple(nodes, 4) == pytest.approx(wanted, abs=1e-6)
        assert ("FluxGuidance" in kinds) == (name == "flux")


@pytest.mark.parametrize(
    "name, words", [("sana", "ComfyUI has no class for this network"), ("pixart", "cannot load a LoRA")]
)
def test_what_a_program_cannot_do_is_said(name, words, exports):
    assert words in (exports[name][1] / "README.md").read_text()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_network_is_one_file_for_comfyui(name, exports, tmp_path):
    run, _ = exports[name]
    export_student(run, tmp_path / "out", ["unet"], torch.float32)
    student = load_student(find_student(run))
    wanted = {key.removeprefix("net.model."): value for key, value in merged(student.generator.denoiser).items()}
    found = load_file(tmp_path / "out" / f"{name}_{'unet' if name in ('sd15', 'sdxl') else 'transformer'}.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sana", "pixart"])
def test_forms_that_no_program_reads_are_refused(name, exports, tmp_path):
    run, _ = exports[name]
    with pytest.raises(SettingsError, match="checkpoint is for Stable Diffusion 1 and SDXL, got a"):
        export_student(run, tmp_path / "out", ["checkpoint"])
    for form in ("unet", "fp8", "comfyui") if name in ("sana", "pixart") else ():
        with pytest.raises(SettingsError, match=rf"{form} is for networks whose file ComfyUI loads|comfyui cannot be"):
            export_student(run, tmp_path / "out", [form])


def test_small_adapters_keep_their_digits_in_float16(tmp_path):
    """After a short training B is small; alpha / rank, an eighth by default, must not push it below what float16 resolves."""
    spec = DiffusersTeacher(path=str(tiny_sd15(tmp_path / "of")))
    run = made_student(spec, tmp_path / "run", [999], {"rank": 8, "alpha": 1})
    tensors, header = load_weights(run / "student.safetensors")
    header.pop("sha256")
    small = {key: value * 1e-4 if key.endswith(".up") else value for key, value in tensors.items()}
    save_weights(run / "student.safetensors", small, header)
    export_student(run, tmp_path / "out", ["lora"], torch.float16)
    found = load_file(tmp_path / "out/lora/pytorch_lora_weights.safetensors")
    for key, up in found.items():
        if key.endswith("lora_B.weight"):
            name = "layers.net|model|" + key.removeprefix("unet.").removesuffix(".lora_B.weight").replace(".", "|")
            wanted = (small[f"{name}.up"].flatten(1) @ small[f"{name}.down"].flatten(1)) / 8
            down = found[key.replace("lora_B", "lora_A")].float()
            product = up.float().flatten(1) @ down.flatten(1)
            assert (product - wanted).norm() < 2e-3 * wanted.norm()


def test_three_steps_of_flux_have_a_workflow(tmp_path):
    """FLUX has 10,000 levels in ComfyUI: 0.6667 and 0.3334 are its student's times."""
    folder, _ = tiny_transformer("flux", tmp_path / "FLUX.1-dev")
    spec = DiffusersTeacher(path=str(folder), resolution=16)
    run = made_student(spec, tmp_path / "run", [1.0, 2 / 3, 1 / 3], {"rank": 2, "targets": ["to_q"]})
    export_student(run, tmp_path / "out", ["comfyui"], torch.float32)
    nodes = json.loads((tmp_path / "out/run_comfyui.json").read_text())
    schedule = load_student(find_student(run)).generator.denoiser.schedule
    wanted = schedule.alpha_sigma(torch.tensor([1.0, 2 / 3, 1 / 3]))[1].tolist()
    assert comfyui_simple(nodes, 3) == pytest.approx(wanted, abs=1e-4)
    assert nodes["1"]["inputs"]["unet_name"] == "FLUX.1-dev.safetensors"
    assert "student of `FLUX.1-dev`" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("scale, has", [(0.13025, True), (0.2, False)])
def test_latents_that_comfyui_scales_otherwise_have_no_workflow(scale, has, tmp_path):
    spec = DiffusersTeacher(path=str(tiny_sdxl(tmp_path / "of")), latents={"scale": scale})
    run = made_student(spec, tmp_path / "run", TABLE, {"rank": 2, "targets": ["to_q"]})
    written, notes = export_student(run, tmp_path / "out", dtype=torch.float32)
    assert (tmp_path / "out/run_comfyui.json" in written) == has
    assert any("ComfyUI scales this kind of model's latents by" in note for note in notes) != has


@pytest.mark.parametrize(
    "formats, node, file",
    [
        ("lora,unet,checkpoint", "LoraLoaderModelOnly", "lora_name=run_lora.safetensors"),
        ("unet", "UNETLoader", "unet_name=run_unet.safetensors"),
        ("checkpoint", "CheckpointLoaderSimple", "ckpt_name=run.safetensors"),
    ],
)
def test_a_workflow_loads_a_file_that_is_written(formats, node, file, tmp_path):
    spec = DiffusersTeacher(path=str(tiny_sd15(tmp_path / "of", prediction_type="v_prediction")))
    run = made_student(spec, tmp_path / "run", TABLE, {"rank": 2, "targets": ["to_q"]})
    export_student(run, tmp_path / "out", [*formats.split(","), "comfyui"], torch.float32)
    nodes = json.loads((tmp_path / "out/run_comfyui.json").read_text())
    argument, name = file.split("=")
    sampled = nodes[nodes[nodes["6"]["inputs"]["model"][0]]["inputs"]["model"][0]]  # behind the node of v-prediction
    assert (sampled["class_type"], sampled["inputs"][argument]) == (node, name)
    assert list((tmp_path / "out").rglob(name))
    for one in nodes.values():
        assert all(value[0] in nodes for value in one["inputs"].values() if isinstance(value, list))
