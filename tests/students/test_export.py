"""Exported students against the programs that read them: diffusers' own loaders, and ComfyUI's rules and key lists."""

import json
import re
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.system.errors import SettingsError, TeacherError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.networks.lora import LoraSpec, merged
from fewstep.students.export import export_student
from fewstep.students.student import find_student, load_student
from fewstep.system.weights import load_weights, save_weights
from fewstep.teachers import DiffusersTeacher
from fewstep.training import panels
from tests.support.ldm import SD15, SDXL, unet_keys
from tests.support.pipelines import GOLDEN, tiny_sd15, tiny_sdxl
from tests.support.students import made_student

STEPS = [999, 749, 499, 249]


def trained(tmp_path, pipeline, lora=None, timesteps=STEPS, **of_teacher):
    """A student after one update, its adapters made large enough to be seen."""
    teacher = DiffusersTeacher(path=str(pipeline))
    teacher.prepare(["a cat", "a dog"], tmp_path / "prompts", teacher.encoder(), torch.float32)
    run = {
        "kind": "distill",
        "teacher": {"kind": "diffusers", "path": str(pipeline), "prompts": str(tmp_path / "prompts")} | of_teacher,
        "generator": {"timesteps": timesteps} | ({"lora": lora} if lora else {}),
        "objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 0, "guidance": 2.0},
        "optim": {"generator": {"lr": 0.05 if lora else 1e-3}},
        "train": {
            "images": 8,
            "batch_size": 4,
            "evaluate_every": None,
            "checkpoint_every": 8,
            "ema_half_life": 0,
            "precision": "fp32",
        },
        "evaluation": {"samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["distill", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    return tmp_path / "run"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl")


@pytest.fixture(scope="module")
def adapted(sdxl, tmp_path_factory):
    """The run folder of a LoRA student."""
    return trained(tmp_path_factory.mktemp("lora"), sdxl, {"rank": 3, "alpha": 2})


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory):
    """Its files in float32."""
    out = tmp_path_factory.mktemp("exported")
    written, notes = export_student(
        adapted, out, dtype=torch.float32, base_file="base.safetensors", license="openrail++"
    )
    assert all(path.exists() for path in written) and not notes
    return out


def ours(run, noise, prompt=0):
    """Pictures in [0, 1] that our own generator makes of the noise of each step."""
    student = load_student(find_student(run))
    cond = student.conditioner.cond(torch.full((len(noise[0]),), prompt), len(noise[0]))
    with torch.no_grad():
        samples = student.generator(noise, **cond)
        return (student.codec.decode(samples) / 2 + 0.5).clamp(0, 1)


def noises(steps, seed=5):
    """What a pipeline draws: the latents, then one noise for each later step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(steps)]


def test_a_student_without_fresh_noise_between_its_calls_is_refused(adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "run")
    header = tmp_path / "run/student.json"
    values = json.loads(header.read_text())
    values["metadata"] |= {"format": "fewstep/2", "transition": "ode"}
    header.write_text(json.dumps(values))
    with pytest.raises(
        SettingsError, match=r"`generator.transition: renoise`, got .*run with `ode`.*Try: `fewstep sample`"
    ):
        export_student(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_v_prediction_is_said_in_the_workflow(tmp_path):
    spec = DiffusersTeacher(path=str(tiny_sd15(tmp_path / "sd15", prediction_type="v_prediction")))
    run = made_student(spec, tmp_path / "run", STEPS)
    export_student(run, tmp_path / "out", ["comfyui"], torch.float32)
    nodes = json.loads((tmp_path / "out/run_comfyui.json").read_text())
    assert nodes["2"]["class_type"] == "UNETLoader" and nodes["9"]["inputs"]["sampling"] == "v_prediction"
    with pytest.raises(SettingsError, match="lora must be left out for"):
        export_student(run, tmp_path / "out", ["lora"])


def test_the_kohya_file_under_comfyuis_rule_gives_the_students_weights(adapted, exported, sdxl):
    from diffusers import DiffusionPipeline

    student, lora = load_student(find_student(adapted)), load_file(exported / "lora/run_lora.safetensors")
    wanted = {k.removeprefix("net.model."): v for k, v in merged(student.generator.denoiser).items()}
    used, unet = set(), DiffusionPipeline.from_pretrained(sdxl).unet
    original = {value.data_ptr(): key.removeprefix("model.diffusion_model.") for key, value in unet_keys(unet).items()}
    for name, weight in unet.state_dict().items():
        key = "lora_unet_" + original[weight.data_ptr()].removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" in lora:
            up, down, alpha = (lora[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            used |= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
            weight = weight + alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(weight, wanted[name])
    assert used == lora.keys() and len(used) > 30


def test_the_single_unet_is_the_merged_network(adapted, exported):
    student, single = load_student(find_student(adapted)), load_file(exported / "run_unet.safetensors")
    wanted = {k.removeprefix("net.model."): v for k, v in merged(student.generator.denoiser).items()}
    assert single.keys() == wanted.keys() and all(torch.equal(single[k], v) for k, v in wanted.items())


def test_workflow_and_card(exported):
    nodes = json.loads((exported / "run_comfyui.json").read_text())
    sampler = nodes["6"]["inputs"]
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["steps"], sampler["cfg"]) == (
        "lcm",
        "simple",
        4,
        1.0,
    )
    assert (
        nodes["2"]["inputs"]["lora_name"] == "run_lora.safetensors"
        and nodes["1"]["inputs"]["ckpt_name"] == "base.safetensors"
    )
    assert (nodes["5"]["inputs"]["width"], nodes["5"]["inputs"]["height"]) == (16, 16)
    for node in nodes.values():  # every link leads to a node
        assert all(value[0] in nodes for value in node["inputs"].values() if isinstance(value, list))
    _, front, text = (exported / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["pipeline_tag"] == "text-to-image" and front["license"] == "openrail++" and "lora" in front["tags"]
    assert "| timesteps | 999, 749, 499, 249 |" in text and "| images seen in training | 8 |" in text
    assert (
        'pipeline(prompt="a prompt", num_inference_steps=4, guidance_scale=0)' in text
        and "rank 3, alpha 2" in text
        and "No metric was measured" in text
    )


def test_wide_pictures_are_the_pipelines(sdxl, tmp_path, monkeypatch, capsys):
    """From the setting to sampled files, the workflow, the card, and the call that the card gives."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(panels, "TEACHER_CALLS", 2)
    run = trained(tmp_path, sdxl, {"rank": 2}, [999], resolution=[24, 16])
    assert main(["sample", str(run), "--seeds", "0-1", "--scale", "1", "--out", str(tmp_path / "s")]) == 0
    picture = Image.open(tmp_path / "s/000000.png")
    assert picture.size == (24, 16)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "this student draws 24 x 16 pixels: pass width and height" in capsys.readouterr().err
    size = json.loads((tmp_path / "out/run_comfyui.json").read_text())["5"]["inputs"]
    assert (size["width"], size["height"]) == (24, 16)
    card = (tmp_path / "out/README.md").read_text()
    assert "| size of a picture | 24 x 16 pixels, width x height |" in card
    call = re.search(r'pipeline\(prompt="a prompt", (.*)\)\.images', card).group(1)
    noise = torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
        wanted = pipeline("a cat", latents=noise, output_type="pt", **eval(f"dict({call})")).images
    torch.testing.assert_close(ours(run, [noise]), wanted, rtol=0, atol=1e-4)


def test_timesteps_that_no_scheduler_stores_come_with_one_that_does(tmp_path, sdxl, capsys):
    from diffusers import DiffusionPipeline

    run = made_student(DiffusersTeacher(path=str(sdxl)), tmp_path / "run", [399])
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().err
    assert "no scheduler of diffusers visits timesteps=[399] by itself: the folder brings one" in said
    assert "no ComfyUI workflow was written: ComfyUI's scheduler `simple` visits [999]" in said
    assert not list((tmp_path / "out").glob("*comfyui.json"))
    with pytest.raises(SettingsError, match=r"--formats comfyui cannot be written: .* visits \[999\]"):
        export_student(run, tmp_path / "out", ["comfyui"])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"num_inference_steps must be 1, got 4: .* at timesteps \[399\]"):
        pipeline("a cat", num_inference_steps=4, guidance_scale=0)  # one step is test_cards.py's


def test_half_precision_files_load_without_being_told(tmp_path, adapted):
    """float16 is the default of `fewstep export`, and the card's snippet names no dtype."""
    from diffusers import DiffusionPipeline

    assert main(["export", str(adapted), "--out", str(tmp_path / "out"), "--formats", "diffusers"]) == 0
    for file in (tmp_path / "out").glob("*/*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} <= {torch.float16, torch.int64}, file
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    call = {"num_inference_steps": 4, "guidance_scale": 0, "output_type": "pt"}
    found = pipeline("a cat", generator=torch.Generator().manual_seed(5), **call).images
    assert (found - ours(adapted, noises(4))).abs().max() < 0.02, "rounded weights, the same picture"


def test_what_cannot_be_exported_is_explained(tmp_path, adapted, capsys):
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert "must be a few-step student" in capsys.readouterr().err
    assert main(["export", str(adapted), "--out", str(tmp_path / "o"), "--formats", "onnx"]) == 1
    assert "must be of diffusers, lora, unet, fp8, comfyui, checkpoint, got onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "peft", "unet", "bin", "folder"])
def test_published_students_come_back(form, adapted, exported, sdxl, tmp_path, capsys):
    """What DMD2 released (kohya's LoRA, a UNet as .safetensors or .bin) and its training folders hold, as we write them."""
    files = {
        "kohya": "lora/run_lora.safetensors",
        "peft": "lora/pytorch_lora_weights.safetensors",
        "unet": "run_unet.safetensors",
    }
    file = exported / files.get(form, "run_unet.safetensors")
    if form in ("bin", "folder"):
        weights = load_file(file)
        file = tmp_path / ("student.bin" if form == "bin" else "checkpoint/pytorch_model.bin")
        file.parent.mkdir(exist_ok=True)
        torch.save(weights, file)
        file = file if form == "bin" else file.parent
    out = tmp_path / "imported"
    assert main(["import", str(file), "--pipeline", str(sdxl), "--out", str(out)]) == 0
    found, own = load_student(find_student(out)), load_student(find_student(adapted))
    assert found.generator.times == own.generator.times
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([0.6])
    cond = own.conditioner.cond(torch.tensor([0]), 1)
    with torch.no_grad():
        torch.testing.assert_close(
            found.generator.denoiser(x_t, t, **cond), own.generator.denoiser(x_t, t, **cond), rtol=1e-4, atol=1e-4
        )
    assert main(["sample", str(out), "--prompt", "a cat", "--seeds", "0-1", "--out", str(tmp_path / "s.png")]) == 0
    run = yaml.safe_load((adapted / "run.yaml").read_text())
    if form in ("kohya", "unet"):  # and as a starting point
        run["generator"]["lora"] = load_weights(out / "student.safetensors")[1]["lora"]
        run["start_from"] = str(out)
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(run))
        assert (
            main(["distill", str(tmp_path / "again.yaml"), "--out", str(tmp_path / "again"), "--processes", "1"]) == 0
        )


def test_a_student_of_another_architecture_is_refused(exported, tmp_path, capsys):
    other = tiny_sd15(tmp_path / "sd15")
    arguments = ["--pipeline", str(other), "--out", str(tmp_path / "o")]
    assert main(["import", str(exported / "lora/run_lora.safetensors"), *arguments]) == 1
    said = capsys.readouterr().err
    assert re.search(r"\d+ of its \d+ keys fit no layer of the UNet2DConditionModel, such as lora_unet_", said)
    assert re.search(r"\d+ of its \d+ keys are of another size, such as lora_unet_\S+: down \[3, 16\]", said)
    assert main(["import", str(exported / "run_unet.safetensors"), *arguments]) == 1
    assert "must hold a network of this pipeline" in capsys.readouterr().err
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert main(["import", str(tmp_path / "bad.safetensors"), *arguments]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name, config, weights", [("sdxl", SDXL, 1680), ("sd15", SD15, 686)])
def test_comfyui_accepts_every_key_of_the_full_size_models(name, config, weights):
    from diffusers import UNet2DConditionModel

    keys = json.loads((GOLDEN / "comfyui_keys.json").read_text())[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = unet.state_dict().keys()
    assert len(names) == weights and names <= keys["diffusers_to_native"].keys()
    layers = [path for path, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    targets = [path for path in layers if LoraSpec().fits(path)]
    assert len(targets) > 200
    assert {f"lora_unet_{path.replace('.', '_')}" for path in targets} <= set(keys["accepted_lora_prefixes"])


def test_an_exported_student_is_no_teacher_and_its_folder_no_other_students(adapted, sdxl, tmp_path):
    export_student(adapted, tmp_path / "out", ["diffusers"])
    for path in (tmp_path / "out", adapted):
        for read in (DiffusersTeacher.load, DiffusersTeacher.outline):
            with pytest.raises(ValueError, match=r"teacher.path .* must be a teacher, got a few-step student"):
                read(DiffusersTeacher(path=str(path)))
    other = tmp_path / "other"
    shutil.copytree(adapted, other)
    tensors, provenance = load_weights(other / "student.safetensors")
    provenance.pop("sha256")
    save_weights(other / "student.safetensors", {name: value + 1 for name, value in tensors.items()}, provenance)
    with pytest.raises(SettingsError, match="must hold an export of this student"):
        export_student(other, tmp_path / "out", ["lora"])


def test_a_pipeline_with_weights_that_are_not_finite_is_no_teacher(sdxl, tmp_path):
    shutil.copytree(sdxl, tmp_path / "sdxl")
    for part, words in (("vae", "the VAE of .* must hold finite"), ("unet", "must hold finite weights, got NaN")):
        file = tmp_path / "sdxl" / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = torch.nan
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(TeacherError, match=words):
            DiffusersTeacher(path=str(tmp_path / "sdxl")).load()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_scale": 0.5}, "lora_scale must come with a lora, got 0.5 alone"),
        ({"config": "elsewhere"}, "config must come with a single .safetensors file"),
        (
            {"path": "a.safetensors", "variant": "fp16"},
            "variant must come with a folder, got the single file a.safetensors",
        ),
    ],
)
def test_settings_of_a_pipeline_that_would_do_nothing(settings, words):
    with pytest.raises(ValueError, match=words):
        DiffusersTeacher(**{"path": "folder"} | settings)
