"""Facts of a model: what it predicts, its noise law, its latents; parts that are missing; models of other tasks."""

import json
import math
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.system.errors import TeacherError

pytest.importorskip("diffusers")

import diffusers

from fewstep.cli.main import main
from fewstep.diffusion.noise import Discrete, RectifiedFlow
from fewstep.system.console import note
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.facts import Betas, Latents, schedule_of
from fewstep.teachers.loading import find_place
from tests.support.ldm import single_file
from tests.support.pipelines import load, tiny_sd15, tiny_sdxl, tiny_transformer
from tests.support.students import made_student


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return tiny_sd15(tmp_path_factory.mktemp("sd15") / "sd15")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """Its encoders have the widths by which diffusers tells them apart in single files."""
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl", widths=(4, 12))


@pytest.fixture(scope="module")
def file(sdxl, tmp_path_factory):
    return single_file(load(sdxl), tmp_path_factory.mktemp("file") / "finetune.safetensors")


@pytest.fixture(autouse=True)
def _fresh_notes():
    note.cache_clear()


def copied(folder, to, part="scheduler/scheduler_config.json", **changes):
    """A pipeline with other values in one of its configurations."""
    shutil.copytree(folder, to)
    config = json.loads((to / part).read_text())
    (to / part).write_text(json.dumps(config | changes))
    return to


# -- prediction and noise table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [("v_pred", "ztsnr"), ("v_pred",), ("header",)])
def test_a_single_file_says_what_it_predicts(marks, file, sdxl, tmp_path, capsys):
    """By the keys of NoobAI-XL, or ModelSpec's header; the configuration that is given says epsilon."""
    marked, header = tmp_path / "marked.safetensors", None
    if marks == ("header",):
        header = {"modelspec.prediction_type": "v"}
    save_file(load_file(file) | {key: torch.tensor([]) for key in marks if key != "header"}, marked, header)
    denoiser = DiffusersTeacher(path=str(marked), config=str(sdxl)).load().denoiser
    assert denoiser.prediction == "v"
    assert (denoiser.schedule.alphas_cumprod[-1] < 1e-6) == ("ztsnr" in marks)
    assert "has prediction_type epsilon" in (said := capsys.readouterr().err) and "says v_prediction" in said
    set_back = DiffusersTeacher(path=str(marked), config=str(sdxl), prediction="eps", zero_snr=False).load().denoiser
    assert set_back.prediction == "eps" and set_back.schedule.alphas_cumprod[-1] > 1e-3
    assert "teacher.prediction says epsilon" in capsys.readouterr().err


def test_an_unmarked_file_is_what_the_configuration_says(file, sdxl, capsys):
    assert DiffusersTeacher(path=str(file), config=str(sdxl)).load().denoiser.prediction == "eps"
    assert "note:" not in capsys.readouterr().err


def test_weights_of_a_single_file_that_no_layer_takes_are_said(file, sdxl, tmp_path, capsys):
    DiffusersTeacher(path=str(file), config=str(sdxl)).load()
    assert "belong to no layer" not in capsys.readouterr().err
    more = {"model.diffusion_model.adapter.weight": torch.ones(2), "model_ema.decay": torch.ones(1)}
    save_file(load_file(file) | more, tmp_path / "more.safetensors")
    DiffusersTeacher(path=str(tmp_path / "more.safetensors"), config=str(sdxl)).load()
    said = capsys.readouterr().err
    assert re.search(
        r"1 of the \d+ weights of its UNet belong to no layer .* the first model.diffusion_model.adapter", said
    )


@pytest.mark.parametrize(
    "part, changes, said",
    [
        (
            "unet/config.json",
            {"new_kind": 1},
            "diffusers warns: The config attributes {'new_kind': 1} were passed to UNet2D",
        ),
        ("scheduler/scheduler_config.json", {"curve": 2}, "diffusers warns: The config attributes {'curve': 2}"),
        (
            "text_encoder/config.json",
            {"model_type": "clip_vision_model"},
            "transformers warns: You are using a model of type",
        ),
    ],
)
def test_what_the_libraries_warn_of_is_said(part, changes, said, sdxl, tmp_path, capsys):
    folder = copied(sdxl, tmp_path / "odd", part, **changes)
    teacher = DiffusersTeacher(path=str(folder))
    teacher.load()
    teacher.encoder()(["a cat"])
    assert said in capsys.readouterr().err


def test_edm_files_are_refused(file, sdxl, tmp_path):
    save_file(load_file(file) | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, tmp_path / "edm.safetensors")
    with pytest.raises(TeacherError, match=r"got the key edm_mean, which marks EDM"):
        DiffusersTeacher(path=str(tmp_path / "edm.safetensors"), config=str(sdxl)).load()


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "PNDMScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_settings_of_the_table_override_any_scheduler(kind, sd15, tmp_path, capsys):
    """PNDM and Heun cannot rescale their table themselves."""
    pipeline = load(sd15)
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "p")
    teacher = DiffusersTeacher(
        path=str(tmp_path / "p"), prediction="v", zero_snr=True, betas=Betas(start=0.0001, end=0.02, curve="linear")
    )
    denoiser = teacher.load().denoiser
    wanted = diffusers.DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", rescale_betas_zero_snr=True
    ).alphas_cumprod.double()
    torch.testing.assert_close(torch.tensor(denoiser.schedule.alphas_cumprod).double(), wanted, rtol=0, atol=1e-6)
    assert denoiser.prediction == "v" and "teacher.prediction says v_prediction" in capsys.readouterr().err
    assert teacher.pipeline().scheduler.config.prediction_type == "v_prediction"  # what is exported keeps it


def test_eps_with_zero_terminal_snr_is_refused(sd15):
    with pytest.raises(TeacherError, match=r"must predict v or x0 with zero terminal SNR, got eps"):
        DiffusersTeacher(path=str(sd15), zero_snr=True).load()


def test_every_fact_can_be_set_on_the_command_line():
    from fewstep.run.overriding import override
    from fewstep.run.settings import load_run

    given = "--teacher.prediction v --teacher.zero-snr True --teacher.betas.end 0.02 --teacher.shift 3 --teacher.latents.scale 0.5"
    more = "--teacher.guidance-input 2 --teacher.text.clip-skip 1 --teacher.without text_encoder_3 tokenizer_3"
    size = "--teacher.resolution 1344 768"
    teacher = override(load_run("sdxl/lora-24gb"), f"{given} {more} {size}".split()).teacher
    assert teacher.resolution == (1344, 768)
    assert (teacher.prediction, teacher.zero_snr, teacher.betas.end, teacher.shift) == ("v", True, 0.02, 3.0)
    assert (teacher.latents.scale, teacher.guidance_input, teacher.text.clip_skip) == (0.5, 2.0, 1)
    assert teacher.without == ("text_encoder_3", "tokenizer_3")


# -- flows ---------------------------------------------------------------------------------------------------------------


def test_the_flow_shift_is_the_pipelines_and_can_be_set(tmp_path, capsys):
    folder, _ = tiny_transformer("sd3", tmp_path / "sd3")
    assert DiffusersTeacher(path=str(folder)).load().denoiser.schedule == RectifiedFlow(shift=3.0)
    teacher = DiffusersTeacher(path=str(folder), shift=5.0)
    assert teacher.load().denoiser.schedule == RectifiedFlow(shift=5.0)
    assert "teacher.shift says 5.0" in capsys.readouterr().err and teacher.pipeline().scheduler.config.shift == 5.0
    with pytest.raises(TeacherError, match=r"teacher.prediction must be left out for a flow"):
        DiffusersTeacher(path=str(folder), prediction="v").load()


def test_a_shift_for_a_noise_table_is_refused(sd15):
    with pytest.raises(TeacherError, match=r"teacher.shift must be left out, got 3.0"):
        DiffusersTeacher(path=str(sd15), shift=3.0).load()


@pytest.mark.parametrize("shape", ["exponential", "linear"])
@pytest.mark.parametrize("side", [32, 64])
def test_shifts_by_resolution_are_the_schedulers(shape, side):
    """FLUX's `calculate_shift` and both of the scheduler's `time_shift`s."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=shape)
    schedule = schedule_of(scheduler, "x", (side, side + 8))
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=calculate_shift((side // 2) * (side // 2 + 4)))
    found = schedule.alpha_sigma(torch.tensor([1.0, 0.7, 0.2]))[1]
    torch.testing.assert_close(found, scheduler.sigmas[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_with_flow_sigmas_are_flows(kind):
    scheduler = getattr(diffusers, kind)(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert schedule_of(scheduler, "x", (32, 32)) == RectifiedFlow(shift=3.0)


def test_flows_with_another_number_of_timesteps_are_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(TeacherError, match="must have 1000 training timesteps, got 500"):
        schedule_of(scheduler, "x", (32, 32))


def test_guidance_that_is_an_input(tmp_path, sd15):
    folder, _ = tiny_transformer("flux", tmp_path / "flux")
    outline = DiffusersTeacher(path=str(folder), resolution=16, guidance_input=1.5).outline()[1]
    assert "guidance" in outline
    with pytest.raises(TeacherError, match=r"teacher.guidance_input must be left out, got 1.5"):
        DiffusersTeacher(path=str(sd15), guidance_input=1.5).load()


# -- the VAE's latents -----------------------------------------------------------------------------------------------------

STATISTICS = {"latents_mean": [-1.5, 1.0, -0.5, 0.75], "latents_std": [5.0, 3.0, 4.0, 2.0]}


def test_latents_are_scaled_as_the_sdxl_pipeline_does(sdxl, tmp_path):
    folder = copied(sdxl, tmp_path / "s", "vae/config.json", scaling_factor=0.5, **STATISTICS)
    codec, pipeline = DiffusersTeacher(path=str(folder)).load().codec, load(folder)
    samples = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        embeds = {"prompt_embeds": torch.zeros(2, 12, 16), "pooled_prompt_embeds": torch.zeros(2, 16)}
        call = {"latents": samples, "num_inference_steps": 1, "guidance_scale": 0.0}
        latents = pipeline(**embeds, **call, output_type="latent").images
        wanted = pipeline(**embeds, **call, output_type="pt").images
        found = (codec.decode(latents) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        pictures = torch.rand(2, 3, 16, 16) * 2 - 1
        mean, std = (torch.tensor(STATISTICS[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
        raw = pipeline.vae.encode(pictures).latent_dist.mean
        torch.testing.assert_close(codec.encode(pictures), (raw - mean) * 0.5 / std, rtol=1e-4, atol=1e-4)
    assert codec.sha256 != DiffusersTeacher(path=str(sdxl)).load().codec.sha256


def test_settings_of_the_latents_are_kept_in_the_pipeline(sdxl, tmp_path, capsys):
    there = copied(sdxl, tmp_path / "s", "vae/config.json", scaling_factor=0.5, **STATISTICS)
    settings = Latents(scale=0.5, mean=tuple(STATISTICS["latents_mean"]), std=tuple(STATISTICS["latents_std"]))
    teacher = DiffusersTeacher(path=str(sdxl), latents=settings)
    assert teacher.codec().sha256 == DiffusersTeacher(path=str(there)).codec().sha256
    assert teacher.pipeline().vae.config.latents_mean == STATISTICS["latents_mean"]
    assert "teacher.latents says 0.5" in capsys.readouterr().err
    with pytest.raises(TeacherError, match=r"latents_mean of .* must have 4 numbers, got 1"):
        DiffusersTeacher(path=str(sdxl), latents=Latents(mean=(1.0,), std=(1.0,))).load()


def test_what_a_pipeline_does_not_apply_is_said(sd15, tmp_path, capsys):
    """StableDiffusionPipeline knows no mean and no shift: with them, its pictures would be others than ours."""
    folder = copied(sd15, tmp_path / "s", "vae/config.json", **STATISTICS)
    samples = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        found = DiffusersTeacher(path=str(folder)).load().codec.decode(samples)
        assert torch.equal(found, DiffusersTeacher(path=str(sd15)).load().codec.decode(samples))
    assert "does not apply its VAE's latents_mean and latents_std" in capsys.readouterr().err
    with pytest.raises(TeacherError, match=r"StableDiffusionPipeline does not apply it"):
        DiffusersTeacher(path=str(sd15), latents=Latents(shift=0.1)).load()


def test_sd3s_shift_is_applied(tmp_path):
    folder, _ = tiny_transformer("sd3", tmp_path / "plain")
    shifted = copied(folder, tmp_path / "s", "vae/config.json", shift_factor=0.25)
    plain, codec = (DiffusersTeacher(path=str(path)).codec() for path in (folder, shifted))
    scale, samples = load(folder).vae.config.scaling_factor, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(samples), plain.decode(samples + 0.25 * scale), rtol=1e-4, atol=1e-4)


# -- models of other tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, task", [(9, "an inpainting model"), (8, "an editing model"), (5, "further inputs")])
def test_models_of_other_tasks_are_refused(channels, task, sd15, tmp_path, capsys):
    folder = copied(sd15, tmp_path / "odd", "unet/config.json", in_channels=channels)
    with pytest.raises(TeacherError, match=f"must be a text-to-image model, got .*{task}.* takes {channels} channels"):
        DiffusersTeacher(path=str(folder)).load()
    (tmp_path / "p.txt").write_text("a cat\n")
    assert main(["prepare", str(folder), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "p")]) == 1
    assert task in capsys.readouterr().err
    with pytest.raises(TeacherError, match="must be a text-to-image model"):
        DiffusersTeacher(path=str(folder)).outline()


def test_an_inpainting_model_in_one_file_is_refused(file, sdxl, tmp_path):
    state = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.cat([state[name], torch.zeros_like(state[name]), state[name][:, :1]], dim=1)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(TeacherError, match="got an inpainting model: its network takes 9 channels"):
        DiffusersTeacher(path=str(tmp_path / "inpaint.safetensors"), config=str(sdxl)).load()


def test_flux_fill_is_refused(tmp_path):
    folder, _ = tiny_transformer("flux", tmp_path / "flux")
    odd = copied(folder, tmp_path / "fill", "transformer/config.json", in_channels=96, out_channels=16)
    with pytest.raises(TeacherError, match="takes 24 channels, the samples have 4"):
        DiffusersTeacher(path=str(odd), resolution=16).load()


def test_the_refiner_is_refused(sdxl, tmp_path):
    folder = copied(sdxl, tmp_path / "refiner", "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(TeacherError, match="got SDXL's refiner"):
        DiffusersTeacher(path=str(folder)).load()


OTHERS = {  # pipeline, changes of the UNet's configuration, words of the refusal
    "Kolors": ("KolorsPipeline", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 4096}, "'text_proj'"),
    "DeepFloyd IF": ("IFPipeline", {"addition_embed_type": "text", "encoder_hid_dim": 4096}, "'text'"),
    "Kandinsky 2.2": (
        "KandinskyV22Pipeline",
        {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        None,
    ),
    "an upscaler": ("StableDiffusionUpscalePipeline", {"class_embed_type": "timestep"}, "'timestep'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_unets_with_other_conditions_are_refused_before_weights_are_read(name, sdxl, tmp_path):
    """The folder has no weights at all: what is said comes of the configurations."""
    kind, changes, words = OTHERS[name]
    folder = copied(sdxl, tmp_path / "other", "unet/config.json", **changes)
    copied(folder, tmp_path / "odd", "model_index.json", _class_name=kind)
    for weights in (tmp_path / "odd").glob("*/*.safetensors"):
        weights.unlink()
    teacher = DiffusersTeacher(path=str(tmp_path / "odd"))
    for use in (teacher.load, teacher.encoder, teacher.outline, teacher.codec):
        said = (
            f"known here, got a {kind} whose UNet2DConditionModel has .*{words}"
            if words
            else f"got {kind}, which takes no prompt"
        )
        with pytest.raises(TeacherError, match=said):
            use()


def test_a_family_that_is_not_known_is_refused_before_weights_are_read(sdxl, tmp_path):
    parts = json.loads((sdxl / "model_index.json").read_text())
    parts = {
        "_class_name": "AuraFlowPipeline",
        "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
        "vae": parts["vae"],
    }
    (tmp_path / "aura").mkdir()
    (tmp_path / "aura/model_index.json").write_text(json.dumps(parts))
    with pytest.raises(TeacherError, match="got AuraFlowPipeline: its AuraFlowTransformer2DModel has no entry"):
        DiffusersTeacher(path=str(tmp_path / "aura")).load()


def test_sana_sprint_is_refused_before_weights_are_read(tmp_path):
    folder, _ = tiny_transformer("sana", tmp_path / "sana")
    parts = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "SanaSprintPipeline"}
    (folder / "model_index.json").write_text(json.dumps(parts | {"scheduler": ["diffusers", "SCMScheduler"]}))
    diffusers.SCMScheduler().save_pretrained(folder / "scheduler")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    with pytest.raises(TeacherError, match=r"got .* with SANA-Sprint's SCMScheduler: .* Try: the SANA model"):
        DiffusersTeacher(path=str(folder)).load()


# -- files ---------------------------------------------------------------------------------------------------------------


def same(one, other):
    teachers = DiffusersTeacher(path=str(one)), DiffusersTeacher(path=str(other))
    found, wanted = (teacher.load().denoiser.state_dict() for teacher in teachers)
    assert found.keys() == wanted.keys() and all(torch.allclose(found[key], wanted[key], atol=1e-2) for key in wanted)
    texts = [teacher.encoder()(["a cat"])[0]["text"].float() for teacher in teachers]
    torch.testing.assert_close(texts[0], texts[1], rtol=0, atol=2e-2)


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_half_precision_files_alone(shards, sdxl, tmp_path, capsys):
    size = {"max_shard_size": "30KB"} if shards else {}
    load(sdxl).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16", **size)
    plain = [path for path in (tmp_path / "half").glob("*/*.safetensors") if ".fp16" not in path.name]
    assert not plain
    same(tmp_path / "half", sdxl)
    assert "only files of the variant fp16 are there" in capsys.readouterr().err


def test_sharded_weights(sdxl, tmp_path):
    load(sdxl).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "shards/text_encoder_2").glob("*.safetensors"))) > 1
    same(tmp_path / "shards", sdxl)


def test_a_variant_that_one_component_lacks_is_said(sdxl, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(sdxl, folder)
    load(sdxl).unet.half().save_pretrained(folder / "unet", variant="fp16")
    DiffusersTeacher(path=str(folder), variant="fp16").load()
    assert "vae has no files of the variant fp16: the plain ones are read" in capsys.readouterr().err
    for plain in (folder / "unet").glob("diffusion_pytorch_model.safetensors"):
        plain.unlink()
    with pytest.raises(TeacherError, match=r"teacher.variant must be one of fp16 for .*unet, got bf16"):
        DiffusersTeacher(path=str(folder), variant="bf16").load()


@pytest.mark.parametrize("part, name", [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_weights_that_are_missing_are_refused_and_others_are_counted(part, name, sdxl, tmp_path, capsys):
    """The libraries fill the first with random numbers, and leave the second out, with a warning that nobody sees."""
    folder = tmp_path / "p"
    shutil.copytree(sdxl, folder)
    weights = folder / part / f"{name}.safetensors"
    state = load_file(weights)
    save_file(state | {"left.over": torch.zeros(1)}, weights, {"format": "pt"})
    teacher = DiffusersTeacher(path=str(folder))
    teacher.load(), teacher.encoder()
    assert f"{part}: 1 weights in its files belong to no layer and were not used, the first left.over" in (
        capsys.readouterr().err
    )
    state.pop(sorted(state)[0])
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(
        TeacherError, match=rf"{part} must hold all weights of its network, got none .* for 1, the first"
    ):
        teacher.load(), teacher.encoder()


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.layer_norm1.bias",
        "conditioner.embedders.1.model.ln_final.weight",
    ],
)
def test_a_single_file_that_lacks_a_weight_is_refused(key, file, sdxl, tmp_path):
    state = load_file(file)
    del state[key]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(TeacherError, match="must hold all weights of its networks"):
        DiffusersTeacher(path=str(tmp_path / "cut.safetensors"), config=str(sdxl)).encoder()


def test_pipelines_that_the_library_does_not_have_are_refused(sd15, tmp_path):
    folder = copied(sd15, tmp_path / "own", "model_index.json", _class_name="MyPipeline")
    with pytest.raises(TeacherError, match="must be a pipeline that diffusers has, got MyPipeline"):
        DiffusersTeacher(path=str(folder)).load()


def test_pickled_checkpoints_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(TeacherError, match=r"must be a folder or a .safetensors file, got .*model.ckpt"):
        DiffusersTeacher(path=str(tmp_path / "model.ckpt")).load()


def test_a_safety_checker_that_was_not_fetched_is_left_out(sd15, tmp_path, capsys):
    folder = tmp_path / "p"
    shutil.copytree(sd15, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    DiffusersTeacher(path=str(folder)).pipeline()
    assert "safety_checker is listed and not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["my-finetune", "./a/b", "a/b/c", "/nowhere", "a\\b", "models/", "taken/model", "~/m", "x.safetensors"]
)
def test_a_folder_that_does_not_exist_is_no_hub_name(name, tmp_path, monkeypatch):
    """The hub's library would retry for 23 seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    start = time.monotonic()
    with pytest.raises(TeacherError, match=r"does not exist|must be a file that exists"):
        DiffusersTeacher(path=name).load()
    with pytest.raises(TeacherError, match=r"teacher.config must be"):
        find_place(name, "teacher.config")
    assert time.monotonic() - start < 2


def test_an_unreachable_hub_is_said_at_once(monkeypatch):
    import urllib.request

    from huggingface_hub import constants

    def fail(*_, **__):
        raise urllib.error.URLError(OSError("Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(TeacherError, match=r"is no folder here .* and the hub cannot be reached"):
        find_place("owner/model", "teacher.path")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match="HF_HUB_OFFLINE is set"):
        find_place("owner/model", "teacher.path")


@pytest.mark.slow
def test_a_pipeline_in_the_hubs_cache_is_loaded(tmp_path):
    """As a run on a machine without network finds it; in another process, because the library reads its settings once."""
    import os
    import subprocess
    import sys

    cache = tmp_path / "hub/models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    tiny_sdxl(cache / "snapshots/abc")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    code = """
from fewstep.teachers import DiffusersTeacher
teacher = DiffusersTeacher(path="owner/name")
print(teacher.load().denoiser.prediction, teacher.codec().shape, teacher.encoder()(["a cat"])[0]["text"].shape[1])
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=os.getcwd(), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "eps (3, 16, 16) 12", done.stderr


def test_the_libraries_stay_quiet_inside_and_out():
    """A `quiet()` within another gives the progress bars back only at the end of the outer one."""
    from diffusers.utils import logging

    from fewstep.system.console import quiet

    assert logging.is_progress_bar_enabled()
    with quiet():
        with quiet():
            pass
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()


# -- export --------------------------------------------------------------------------------------------------------------


def test_a_student_of_a_zero_snr_model_says_so_everywhere(tmp_path, capsys):
    """ComfyUI's node, the diffusers folder, the card; and clip skip beside it."""
    folder = tiny_sdxl(tmp_path / "zs", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"""
kind: distill
teacher: {{kind: diffusers, path: {folder}, prompts: {tmp_path / "prep"}, text: {{clip_skip: 1}}}}
generator: {{timesteps: [999, 749, 499, 249], lora: {{rank: 2}}}}
critic: {{lora: {{rank: 2}}}}
objective: {{method: dmd2, critic_steps: 1, gan_weight: 0, guidance: 2.0}}
train: {{images: 4, batch_size: 4, precision: fp32, evaluate_every: null}}
evaluation: {{samples: 0}}
"""
    )
    assert main(["prepare", str(run), "--prompts", str(tmp_path / "p.txt"), "--device", "cpu"]) == 0
    assert main(["distill", str(run), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    nodes = json.loads((tmp_path / "out/run_comfyui.json").read_text())
    of_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert of_kind["ModelSamplingDiscrete"]["zsnr"] is True
    assert of_kind["ModelSamplingDiscrete"]["sampling"] == "v_prediction"
    assert of_kind["CLIPSetLastLayer"]["stop_at_clip_layer"] == -3  # SDXL's own is -2
    assert of_kind["CLIPTextEncode"]["clip"] == ["10", 0]
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"] is True
    card = (tmp_path / "out/README.md").read_text()
    assert "zero terminal SNR" in card and "guidance_scale=0, clip_skip=1)" in card
    assert "zero terminal SNR: in ComfyUI" in said.out + said.err and "clip_skip=1" in said.out + said.err


def test_a_table_that_comfyui_does_not_have_is_refused(tmp_path, capsys):
    folder = copied(tiny_sd15(tmp_path / "s"), tmp_path / "t", beta_end=0.02)
    run = made_student(DiffusersTeacher(path=str(folder)), tmp_path / "run", [999], {"rank": 2})
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--formats", "comfyui"]) == 1
    assert "--formats comfyui cannot be written: ComfyUI has one noise table" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--formats", "lora"]) == 0
    assert "No ComfyUI workflow: ComfyUI has one noise table" in (tmp_path / "out/README.md").read_text()


def test_the_usual_table_is_a_table(sd15):
    schedule = DiffusersTeacher(path=str(sd15)).load().denoiser.schedule
    assert isinstance(schedule, Discrete) and math.isclose(schedule.alphas_cumprod[-1], 0.00466, rel_tol=1e-2)
