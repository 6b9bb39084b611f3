"""Flow and eps transformers against diffusers' own pipelines: their calls, schedules, students and exported files."""

import itertools

import pytest
import torch
import yaml

from fewstep.system.errors import SettingsError, TeacherError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.diffusion.guidance import Scale
from fewstep.diffusion.noise import RectifiedFlow
from fewstep.methods import DMD2
from fewstep.students.export import export_student
from fewstep.students.student import find_student, load_student
from tests.support.pipelines import load, prepared

NAMES = ("sd3", "sd35", "flux", "sana", "pixart")


def of_pipeline(cond, row=0):
    """The condition of a prompt as the pipelines take it."""
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
    return {names[key]: value[row : row + 1] for key, value in cond.items()}


def run_pipeline(name, pipeline, cond, latents, steps, **more):
    """Latents after `steps` of the pipeline's own sampler, unguided (FLUX at the 3.5 that it is told)."""
    height, width = (2 * side for side in latents.shape[-2:])
    if name == "flux":
        packed = pipeline._pack_latents(latents, 1, 4, height // 2, width // 2)
        out = pipeline(
            **of_pipeline(cond), latents=packed, num_inference_steps=steps, height=height, width=width, guidance_scale=3.5,
            output_type="latent", **more,
        ).images  # fmt: skip
        return pipeline._unpack_latents(out, height, width, 2)
    if name == "pixart":
        more |= {"use_resolution_binning": False, "negative_prompt": None}
    if name == "sana":
        more |= {"use_resolution_binning": False}
    guidance = {"guidance_scale": 1.0}
    return pipeline(
        **of_pipeline(cond), latents=latents, num_inference_steps=steps, height=height, width=width, output_type="latent", **guidance,
        **more,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    "name, resolution",
    [
        ("sd3", None),
        ("sd35", None),
        ("flux", None),
        ("sana", None),
        ("sd3", (24, 16)),
        ("flux", (24, 16)),
        ("sana", (64, 32)),
    ],
)
def test_a_flow_teacher_is_its_pipeline(name, resolution, tmp_path):
    """Euler's steps of the pipeline are x + (s' - s) v with v = (x - D(x)) / s: the call and the schedule, at two times."""
    spec, cond = prepared(name, tmp_path)
    spec = spec if resolution is None else spec.model_copy(update={"resolution": resolution})
    teacher, pipeline = spec.load(), load(spec.path)
    latents = torch.randn(1, *teacher.shape)
    with torch.no_grad():
        wanted = run_pipeline(name, pipeline, cond, latents, 2, sigmas=[1.0, 0.6])
        condition = teacher.conditioner.cond(torch.tensor([0]), 1)
        x, visited = latents, pipeline.scheduler.sigmas.double()
        for here, there in itertools.pairwise(visited):
            t = teacher.denoiser.schedule.time((here / (1 - here))[None])
            x = x + (there - here).float() * (x - teacher.denoiser(x, t, **condition)) / here.float()
    torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(teacher.denoiser.schedule, RectifiedFlow)


@pytest.mark.parametrize("resolution", [None, (24, 16)])
def test_pixart_is_its_pipeline(resolution, tmp_path):
    """eps with a learnt variance that is dropped: one step of DDIM."""
    from diffusers import DDIMScheduler

    spec, cond = prepared("pixart", tmp_path)
    spec = spec if resolution is None else spec.model_copy(update={"resolution": resolution})
    teacher, pipeline = spec.load(), load(spec.path)
    latents = torch.randn(1, *teacher.shape)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    with torch.no_grad():
        output = pipeline.transformer(
            latents, encoder_hidden_states=cond["text"][:1], encoder_attention_mask=cond["mask"][:1],
            timestep=torch.tensor([600]), added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0].chunk(2, dim=1)[0]  # fmt: skip
        scheduler.set_timesteps(1000)
        wanted = scheduler.step(output, 600, latents).pred_original_sample
        time = torch.tensor([600 / 999], dtype=torch.float64)
        mine = teacher.denoiser(latents, time, **teacher.conditioner.cond(torch.tensor([0]), 1))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_student_of_each_family_is_trained_and_exported(name, lora, tmp_path, capsys):
    spec, cond = prepared(name, tmp_path)
    adapters = {"lora": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_k", "to_v", "ff.net.2"]}} if lora else {}
    run = {
        "kind": "distill",
        "teacher": spec.model_dump(mode="json"),
        "generator": ({"timesteps": [999, 499]} if name == "pixart" else {"times": [1.0, 0.5]}) | adapters,
        "critic": adapters,
        "objective": {
            "method": "dmd2",
            "critic_steps": 1,
            "gan_weight": 0,
            "guidance": None if name == "flux" else 2.0,
        },
        "optim": {"generator": {"lr": 0.02}},
        "train": {
            "images": 8,
            "batch_size": 4,
            "evaluate_every": None,
            "ema_half_life": 0,
            "precision": "fp32",
            "gradient_checkpointing": True,
        },
        "evaluation": {"samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["distill", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    written, notes = export_student(tmp_path / "run", tmp_path / "out", dtype=torch.float32)
    assert {path.name for path in written} >= {"model_index.json", "README.md"} | (
        {"pytorch_lora_weights.safetensors"} if lora else set()
    )
    if name in ("sana", "pixart"):
        with pytest.raises(SettingsError, match=r"there is no workflow|ComfyUI has no class"):
            export_student(tmp_path / "run", tmp_path / "out", ["comfyui"])
    assert len(notes) == (lora and name in ("sana", "pixart")) + (
        name in ("flux", "sana")  # whose pipelines draw larger pictures by themselves
    )
    if name == "pixart":
        return
    student, pipeline = (
        load_student(find_student(tmp_path / "run")),
        load(tmp_path / "out"),
    )
    torch.manual_seed(3)
    latents = torch.randn(1, *student.spec.net.sample_shape)
    torch.manual_seed(4)
    found = run_pipeline(name, pipeline, cond, latents, 2)
    torch.manual_seed(4)
    with torch.no_grad():
        noise = [latents, _like_the_pipeline(name, latents)]
        wanted = student.generator(noise, **student.conditioner.cond(torch.tensor([0]), 1))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def _like_the_pipeline(name, latents):
    """The noise that the scheduler draws next, FLUX's in packed order."""
    if name != "flux":
        return torch.randn_like(latents)
    from diffusers import FluxPipeline

    side = latents.shape[-1]
    packed = torch.randn_like(FluxPipeline._pack_latents(latents, 1, 4, side, side))
    return FluxPipeline._unpack_latents(packed, 2 * side, 2 * side, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_gan_head_reads_each_family(name, tmp_path):
    """The head on the middle block, in a forward that ends there and in a whole one; its gradient reaches the network."""
    spec, _ = prepared(name, tmp_path)
    teacher = spec.load()
    critic = DMD2().make_critic(teacher, teacher.player())
    x_t, t = torch.randn(2, *teacher.shape), torch.tensor([0.8, 0.2])
    cond = teacher.conditioner.cond(torch.arange(2), 2)
    denoised, logits = critic.denoised_and_logits(x_t, t, cond)
    assert denoised.shape == x_t.shape and logits.shape == (2,)
    torch.testing.assert_close(critic.logits(x_t, t, cond), logits)
    logits.sum().backward()
    reached = {key for key, value in critic.denoiser.named_parameters() if value.grad is not None and value.grad.any()}
    assert len(reached) > 5 and all(value.grad is not None for value in critic.head.parameters())


def test_sizes_beyond_sd3s_places_are_refused(tmp_path):
    spec, _ = prepared("sd3", tmp_path)
    with pytest.raises(TeacherError, match=r"must be at most 32 pixels a side, .* got \[36, 16\]"):
        spec.model_copy(update={"resolution": (36, 16)}).load()


def test_flux_cannot_be_guided_from_outside(tmp_path):
    spec, _ = prepared("flux", tmp_path)
    with pytest.raises(TeacherError, match="takes its guidance as an input"):
        spec.load().guided(Scale(3.0))
