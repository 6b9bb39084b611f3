"""Teachers that were distilled already are recognised by their configurations and names."""

import json

import pytest

from fewstep.system.errors import TeacherError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.system.console import note
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.few_step import RULES, About, check_few_step
from tests.support.pipelines import prepared, tiny_sd15

UNET, FLUX = {"model": "UNet2DConditionModel"}, {"model": "FluxTransformer2DModel"}
EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
REFUSED = {
    "LCMScheduler": About("m", scheduler={"_class_name": "LCMScheduler"}, **UNET),
    "takes its guidance as an input": About("m", scheduler=EULER, network={"time_cond_proj_dim": 256}, **UNET),
    "SANA-Sprint": About("m", index={"_class_name": "SanaSprintPipeline"}, model="SanaTransformer2DModel"),
    "says is_distilled": About("m", index={"is_distilled": True}, model="Flux2Transformer2DModel"),
    "FLUX.1-schnell is": About("m", scheduler=FLOW | {"shift": 1.0}, network={"guidance_embeds": False}, **FLUX),
    "'turbo' in the name of its model": About("stabilityai/sdxl-turbo", scheduler=EULER, **UNET),
    "'4step' in the name of its LoRA": About("sdxl", "sdxl_4step_lora.safetensors", **UNET),
}
REPORTED = {
    "trailing timesteps": About("m", scheduler=EULER | {"timestep_spacing": "trailing"}, **UNET),
    "guidance distilled into it": About(
        "m", scheduler=FLOW | {"use_dynamic_shifting": True}, network={"guidance_embeds": True}, **FLUX
    ),
}
PLAIN = [
    About("stabilityai/stable-diffusion-xl-base-1.0", scheduler=EULER | {"timestep_spacing": "leading"}, **UNET),
    About("m", scheduler=EULER | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, **UNET),
    About("m", scheduler=EULER | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, **UNET),
    About("turbocharged-lightnings.safetensors", **UNET),  # parts of other words
    About("/models/turbo/my-own", "hyperrealism.safetensors", scheduler=EULER, **UNET),  # a folder around it
]


@pytest.mark.parametrize("fact", REFUSED)
def test_few_step_models_are_refused_and_can_be_allowed(fact, capsys):
    note.cache_clear()
    with pytest.raises(
        TeacherError, match=r"must be a model that needs many steps, got .*teacher.allow_few_step true"
    ) as found:
        check_few_step(REFUSED[fact], allowed=False)
    assert fact in str(found.value)
    check_few_step(REFUSED[fact], allowed=True)
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize("fact", REPORTED)
def test_what_may_be_meant_is_reported(fact, capsys):
    note.cache_clear()
    check_few_step(REPORTED[fact], allowed=False)
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize("about", PLAIN)
def test_other_models_pass_in_silence(about, capsys):
    note.cache_clear()
    check_few_step(about, allowed=False)
    assert not capsys.readouterr().err


def test_every_rule_has_its_case():
    cases = [*REFUSED.values(), *REPORTED.values()]
    assert all(any(rule.fits(about) for about in cases) for rule in RULES)


def test_folders_are_read(tmp_path, capsys):
    """The scheduler's class of a folder decides, in `distill` and `plan` alike, before weights are read."""
    folder = tiny_sd15(tmp_path / "model")
    DiffusersTeacher(path=str(folder)).check_few_step()
    for name, change in (
        ("model_index", {"scheduler": ["diffusers", "LCMScheduler"]}),
        ("scheduler/scheduler_config", {}),
    ):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (tmp_path / "run.yaml").write_text(
        f"{{kind: distill, teacher: {{kind: diffusers, path: '{folder}'}}, generator: {{timesteps: [999]}}, train: {{images: 4}}}}"
    )
    for command in (
        ["distill", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--processes", "1"],
        ["plan", str(tmp_path / "run.yaml")],
    ):
        assert main(command) == 1
        assert "got " + str(folder) in (said := capsys.readouterr().err) and "LCMScheduler" in said
    assert main(["plan", str(tmp_path / "run.yaml"), "--teacher.allow-few-step"]) == 0


def test_flux_dev_is_reported_and_schnell_refused(tmp_path, capsys):
    spec, _ = prepared("flux", tmp_path)
    note.cache_clear()
    spec.check_few_step()
    assert "guidance distilled into it" in capsys.readouterr().err
    for name, key in (
        ("transformer/config", "guidance_embeds"),
        ("scheduler/scheduler_config", "use_dynamic_shifting"),
    ):
        file = tmp_path / "flux" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: False}))
    with pytest.raises(TeacherError, match=r"which FLUX\.1-schnell is"):
        spec.check_few_step()
