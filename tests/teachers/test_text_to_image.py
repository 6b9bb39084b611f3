"""Text-to-image teachers against the diffusers library's own pipelines, on tiny ones with every part of the real."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from fewstep.system.errors import DataError, SettingsError, TeacherError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.evaluation.perceptual import Perceptual
from fewstep.networks.lora import LoraSpec, merged
from fewstep.networks.placement import recompute_blocks
from fewstep.run.settings import load_run
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.pipelines import network_sha256
from fewstep.teachers.prompts import Prompts, prepare_prompts, read_prompt_file
from fewstep.training.task import Micro
from tests.support.pipelines import tiny_sd15, tiny_sdxl

PROMPTS = ["a cat", "a dog on the moon", "a house"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def prepared(sdxl, tmp_path_factory):
    """The pipeline's teacher with prompts prepared in float32."""
    folder = tmp_path_factory.mktemp("prompts") / "p"
    teacher = DiffusersTeacher(path=str(sdxl))
    assert teacher.prepare(PROMPTS, folder, teacher.encoder(), torch.float32, batch=2) == 0
    return DiffusersTeacher(path=str(sdxl), prompts=folder)


def test_conditions_are_what_the_pipeline_encodes(sdxl, prepared):
    from diffusers import DiffusionPipeline

    teacher = prepared.load()
    pipeline = DiffusionPipeline.from_pretrained(sdxl)
    with torch.no_grad():
        text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    cond = teacher.conditioner.cond(torch.arange(3), 3)
    torch.testing.assert_close(cond["text"], text)
    torch.testing.assert_close(cond["pooled"], pooled)
    assert cond["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    empty = teacher.conditioner.null(cond)
    assert torch.equal(empty["text"], null) and torch.equal(empty["pooled"], null_pooled)
    assert not empty["text"].any() and torch.equal(empty["time_ids"], cond["time_ids"])  # SDXL's null is zeros
    assert torch.equal(teacher.conditioner.cond(None, 2)["text"], empty["text"][:2])
    assert list(teacher.conditioner.names) == PROMPTS


def test_the_null_of_stable_diffusion_is_the_encoded_empty_prompt(tmp_path):
    from diffusers import DiffusionPipeline

    folder = tiny_sd15(tmp_path / "sd15")
    plain = DiffusersTeacher(path=str(folder))
    plain.prepare(PROMPTS, tmp_path / "p", plain.encoder(), torch.float32)
    teacher = DiffusersTeacher(path=str(folder), prompts=tmp_path / "p").load()
    with torch.no_grad():
        text, null = DiffusionPipeline.from_pretrained(folder).encode_prompt(PROMPTS, "cpu", 1, True)
    cond = teacher.conditioner.cond(torch.arange(3), 3)
    assert cond.keys() == {"text"}
    torch.testing.assert_close(cond["text"], text)
    torch.testing.assert_close(teacher.conditioner.null(cond)["text"], null)
    assert teacher.shape == (4, 8, 8) and teacher.picture_shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_denoiser_is_the_schedulers_x0(tmp_path, kind):
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = tiny_sdxl(tmp_path / "sdxl", prediction_type=kind)
    plain = DiffusersTeacher(path=str(folder))
    plain.prepare(PROMPTS, tmp_path / "p", plain.encoder(), torch.float32)
    teacher = DiffusersTeacher(path=str(folder), prompts=tmp_path / "p").load()
    cond = teacher.conditioner.cond(torch.arange(2), 2)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    for step in (999, 400, 20):
        x_t = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
            output = pipeline.unet(x_t, step, cond["text"], added_cond_kwargs=added).sample
            mine = teacher.denoiser(x_t, torch.full((2,), step / 999, dtype=torch.float64), **cond)
        wanted = scheduler.step(output, step, x_t).pred_original_sample
        assert (mine - wanted).norm() < 2e-5 * wanted.norm()


def test_pictures_are_the_pipelines(sdxl, prepared):
    from diffusers import DiffusionPipeline

    pipeline, latents = DiffusionPipeline.from_pretrained(sdxl), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        wanted = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(prepared.load().codec.decode(latents), wanted)


def test_a_frozen_teacher_in_bf16_has_float32_students(prepared):
    teacher = prepared.model_copy(update={"dtype": "bfloat16"}).load()
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in teacher.start().parameters()} == {torch.float32}
    cond = teacher.conditioner.cond(torch.arange(2), 2)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = teacher.denoiser(x_t, t, **cond)
    wide = prepared.load().denoiser(x_t, t, **cond)
    assert narrow.dtype == torch.float32 and 0 < (narrow - wide).norm() < 0.1 * wide.norm()


def test_a_network_is_rounded_as_it_is_read(prepared):
    """A fraction of the host's memory, the same bits and fingerprint; the VAE stays as it is."""
    pipeline = prepared.pipeline("networks", torch.bfloat16)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float32}
    whole = prepared.load().denoiser.bfloat16()
    teacher = prepared.model_copy(update={"dtype": "bfloat16"}).load()
    found = teacher.denoiser.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())
    assert teacher.sha256 == network_sha256(whole.net.model)


def test_a_lora_is_merged_into_the_teacher(sdxl, prepared, tmp_path):
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = DiffusionPipeline.from_pretrained(sdxl)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    plain, tuned = prepared.load(), prepared.model_copy(update={"lora": file}).load()
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(tuned.denoiser.net.model.state_dict()[name], value)
    assert tuned.sha256 != plain.sha256


@pytest.mark.parametrize("resolution, height, width", [(32, 32, 32), ((32, 16), 16, 32), ((8, 24), 24, 8)])
def test_resolution(prepared, resolution, height, width):
    spec = prepared.model_copy(update={"resolution": resolution})
    teacher, (outline, cond) = spec.load(), spec.outline()
    assert teacher.shape == (4, height // 2, width // 2) == outline.net.sample_shape
    assert teacher.picture_shape == (3, height, width)
    sizes = [[height, width, 0, 0, height, width]]
    assert teacher.conditioner.cond(torch.tensor([0]), 1)["time_ids"].tolist() == sizes
    assert cond["time_ids"].shape == (1, 6)
    samples = torch.randn(2, *teacher.shape)
    with torch.no_grad():
        assert teacher.codec.decode(samples).shape == (2, 3, height, width)
        assert teacher.codec.encode(torch.zeros(1, 3, height, width)).shape == (1, *teacher.shape)


@pytest.mark.parametrize(
    "resolution, message", [(30, r"got 30. Try: 32"), ((30, 16), r"got \[30, 16\]. Try: \[32, 16\]")]
)
def test_a_resolution_that_the_network_cannot_halve_is_refused(prepared, resolution, message):
    with pytest.raises(TeacherError, match=f"must be multiples of 4 pixels, as .* needs, {message}"):
        prepared.model_copy(update={"resolution": resolution}).load()


def test_what_cannot_be_loaded_is_explained(tmp_path, sdxl):
    with pytest.raises(TeacherError, match="got '/nowhere/at/all', which does not exist"):
        DiffusersTeacher(path="/nowhere/at/all").load()
    broken = tmp_path / "no-scheduler"
    shutil.copytree(sdxl, broken)
    shutil.rmtree(broken / "scheduler")
    with pytest.raises(TeacherError, match=r"cannot be (loaded|had): .*scheduler"):
        DiffusersTeacher(path=str(broken)).load()
    odd = tmp_path / "odd"
    shutil.copytree(sdxl, odd)
    config = json.loads((odd / "scheduler/scheduler_config.json").read_text())
    (odd / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "flow"}))
    with pytest.raises(TeacherError, match=r"must predict one of epsilon, .* got 'flow'"):
        DiffusersTeacher(path=str(odd)).load()
    (tmp_path / "lora.safetensors").write_bytes(b"no file of that kind")
    with pytest.raises(
        TeacherError, match=r"teacher.lora cannot be loaded: .*lora.safetensors cannot be read .* damaged"
    ):
        DiffusersTeacher(path=str(sdxl), lora=tmp_path / "lora.safetensors").load()


# -- distillation ------------------------------------------------------------------------------------------------------


def run_of(prepared, tmp_path, **changes):
    """Four-step DMD2 without a GAN, two updates of each kind."""
    values = {
        "kind": "distill",
        "teacher": prepared.model_dump(mode="json"),
        "generator": {"timesteps": [999, 749, 499, 249]},
        "objective": {"method": "dmd2", "critic_steps": 2, "gan_weight": 0, "guidance": 3.0},
        "optim": {"generator": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
        "train": {
            "images": 16,
            "batch_size": 4,
            "log_every": 4,
            "evaluate_every": 16,
            "checkpoint_every": 8,
            "precision": "fp32",
        },
        "evaluation": {"samples": 0},
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


LORA = {"rank": 2, "alpha": 4}


@pytest.mark.slow
def test_a_full_student_with_its_float32_weights_in_the_hosts_memory(prepared, tmp_path):
    """The device's weights are bfloat16 and what the library's UNet makes of them is what autocast makes: the same first loss."""
    first = []
    for offload in (False, True):
        train = {"precision": "bf16", "offload": offload}
        file = run_of(prepared, tmp_path, train=train)
        task = load_run(file).trainer(tmp_path / "none").task
        first.append(task.update(0, [Micro(0, 4, 0)])["loss/generator_dm"].item())
    assert first[0] == first[1]
    kernels = [p for p in task.nets.generator.parameters() if p.ndim == 4]
    assert kernels and all(p.dtype == torch.bfloat16 for p in kernels)
    assert main(["distill", str(file), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    with safe_open(tmp_path / "run" / "student.safetensors", "pt") as student:
        assert {student.get_tensor(name).dtype for name in student.keys()} == {torch.float32}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("players", ["copies", "student is an adapter", "one backbone"])
def test_a_run_from_prompts_alone(prepared, tmp_path, players, capsys):
    changes = {}
    if players != "copies":
        changes["generator"] = {"lora": LORA}
    if players == "one backbone":
        changes["critic"] = {"lora": LORA}
    out = tmp_path / "run"
    file = run_of(prepared, tmp_path, **changes)
    assert main(["distill", str(file), "--out", str(out), "--processes", "1"]) == 0
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert any(line.get("loss/generator_dm", 0) > 0 for line in lines)
    assert (out / "student.safetensors").exists() and list(out.glob("**/student-*.png"))
    images = tmp_path / "s.png"
    assert main(["sample", str(out), "--seeds", "0-3", "--prompt", "a cat", "--out", str(images)]) == 0
    assert "4 images of run (4 network call(s) each)" in capsys.readouterr().out and images.exists()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_student_of_stable_diffusion_makes_an_update(lora, tmp_path):
    plain = DiffusersTeacher(path=str(tiny_sd15(tmp_path / "sd15")))
    plain.prepare(PROMPTS, tmp_path / "p", plain.encoder(), torch.float32)
    changes = {"generator": {"lora": lora}, "critic": {"lora": lora}} if lora else {}
    file = run_of(plain.model_copy(update={"prompts": tmp_path / "p"}), tmp_path, **changes)
    task = load_run(file).trainer(tmp_path / "run").task
    before = [value.clone() for value in task.nets.generator.parameters()]
    losses = {}
    for step in range(6):
        losses |= task.update(4 * step, [Micro(4 * step, 4, 0)])
    assert losses["loss/generator_dm"] > 0
    moved = [not torch.equal(a, b) for a, b in zip(before, task.nets.generator.parameters(), strict=True)]
    assert any(moved)


def test_sid_with_three_guidance_scales(prepared, tmp_path):
    """Long-short guidance: each scale changes its own part, and 1 is none."""

    def first_update(**changes):
        objective = {"method": "sid", "critic_steps": 1, "gan_weight": None, **changes}
        file = run_of(prepared, tmp_path, objective=objective, generator={"timesteps": [625]})
        values = yaml.safe_load(file.read_text())
        values["objective"] = {k: v for k, v in values["objective"].items() if k != "gan_weight" and v is not None}
        file.write_text(yaml.safe_dump(values))
        task = load_run(file).trainer(tmp_path / "run").task
        with torch.no_grad():  # the two scores must differ
            for parameter in task.nets.critic.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        stats = task.update(0, [Micro(0, 4, 0)])
        return float(stats["loss/critic_denoising"]), float(stats["gap_fake"]), float(stats["gap_real"])

    plain = first_update(guidance=None)
    assert first_update(guidance=1, critic_guidance=1, fake_guidance=1) == plain
    trained, shown, taught = (
        first_update(**{"guidance": None, name: 3.0}) for name in ("critic_guidance", "fake_guidance", "guidance")
    )
    assert trained[0] != plain[0] and trained[2] == plain[2]
    assert shown[1] != plain[1] and (shown[0], shown[2]) == (plain[0], plain[2])
    assert taught[2] != plain[2] and taught[:2] == plain[:2]


@pytest.mark.slow
def test_dmd_regresses_on_decoded_pairs(prepared, tmp_path, monkeypatch):
    """Pairs are latents made under guidance; the perceptual distance sees pictures."""
    seen = []

    class Distance(Perceptual):
        name, device = "test", torch.device("cpu")

        def _check_shape(self, shape):
            seen.append(shape)

        def _distance(self, x, y):
            return (x - y).square().mean((1, 2, 3))

    monkeypatch.setattr("fewstep.run.specs.perceptual_for", lambda shape, name, device: Distance())
    objective = {"method": "dmd", "critic_steps": 1, "guidance": 3.0}
    file = run_of(prepared, tmp_path, generator={"timesteps": [999]}, pairs=str(tmp_path / "pairs"))
    values = yaml.safe_load(file.read_text()) | {"objective": objective}
    file.write_text(yaml.safe_dump(values))
    arguments = ["--out", str(tmp_path / "pairs"), "--count", "8", "--evaluations", "2", "--processes", "1"]
    assert main(["pairs", str(file), *arguments]) == 0
    task = load_run(file).trainer(tmp_path / "run").task
    stats = task.update(0, [Micro(0, 4, 0)])
    assert float(stats["loss/generator_regression"]) > 0 and float(stats["x_gradient/dm"]) >= 0
    assert seen and set(seen) == {(3, 16, 16)}
    # the warm-up regresses alone, and DMD2 goes on from it with a critic of its own
    file.write_text(yaml.safe_dump(values | {"objective": {"method": "regression", "guidance": 3.0}}))
    assert main(["distill", str(file), "--out", str(tmp_path / "warm"), "--processes", "1"]) == 0
    values["optim"] = {"generator": {"lr": 1e-4}}
    file.write_text(yaml.safe_dump(values | {"objective": {"method": "regression", "guidance": 3.0}}))
    task = load_run(file).trainer(tmp_path / "again").task
    calls = []
    task.nets.generator.denoiser.register_forward_hook(lambda *_: calls.append(1))
    distances = [float(task.update(0, [Micro(0, 4, 0)])["regression_distance"]) for _ in range(6)]
    assert len(calls) == 6  # one forward an update, of the pairs alone
    assert task.nets.learned is None and distances[-1] < distances[0]
    file = run_of(prepared, tmp_path, generator={"timesteps": [999]}, start_from=str(tmp_path / "warm"))
    assert main(["distill", str(file), "--out", str(tmp_path / "after"), "--processes", "1"]) == 0


def test_one_backbone_is_one_network_in_memory_and_the_teacher_stays_as_it_was(prepared, tmp_path):
    run = load_run(run_of(prepared, tmp_path, generator={"lora": LORA}, critic={"lora": LORA}))
    task = run.trainer(tmp_path / "run").task
    backbone = task.nets.teacher.denoiser  # under guidance
    trained = {id(p) for player in (task.nets.generator, task.nets.critic) for p in player.parameters()}
    assert task.nets.generator.denoiser.base is task.nets.critic.denoiser.base is backbone
    assert not trained & {id(p) for p in backbone.parameters()}
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    adapters = {name: value.clone() for name, value in task.nets.generator.state_dict().items()}
    for step in range(3):
        task.update(step * 4, [Micro(step * 4, 4, 0)])
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    moved = [name for name, value in task.nets.generator.state_dict().items() if not torch.equal(value, adapters[name])]
    assert len(moved) == len(adapters)  # B in the first update, A in the second
    assert all(
        not torch.equal(v, adapters[k]) for k, v in task.generator.average.state_dict().items() if k.endswith("up")
    )


def test_adapters_and_copies_learn_the_same_where_adapters_are_whole(prepared, tmp_path):
    """An adapter of full rank on one layer is that layer: the first update's gradient on B is the weight's times A."""
    run = load_run(run_of(prepared, tmp_path))
    teacher = run.teacher.load()
    full = teacher.player()
    lora = teacher.player(LoraSpec(rank=16, alpha=16, targets=("time_emb_proj",)))
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3])
    cond = teacher.conditioner.cond(torch.arange(2), 2)
    torch.testing.assert_close(lora(x_t, t, **cond), full(x_t, t, **cond))
    full(x_t, t, **cond).square().mean().backward()
    lora(x_t, t, **cond).square().mean().backward()
    for name, adapter in lora.adapters().items():
        wanted = full.get_parameter(f"{name}.weight").grad @ adapter.down.T
        torch.testing.assert_close(adapter.up.grad, wanted, rtol=1e-3, atol=1e-6)


def test_merged_weights_are_the_adapted_network(prepared, tmp_path):
    teacher = prepared.load()
    lora = teacher.player(LoraSpec(rank=3, alpha=2))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.2)
    whole = teacher.start()
    whole.load_state_dict(merged(lora))
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3])
    cond = teacher.conditioner.cond(torch.arange(2), 2)
    with torch.no_grad():
        found, plain = lora(x_t, t, **cond), teacher.denoiser(x_t, t, **cond)
        torch.testing.assert_close(found, whole(x_t, t, **cond), rtol=1e-4, atol=1e-4)
    assert (found - plain).norm() > 0.01 * plain.norm()


def test_recomputed_blocks_run_with_the_adapter_of_their_first_forward(prepared):
    """The gradient must not depend on which adapter is active, or on none being, when the backward pass runs."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        teacher = prepared.load()
        player, other = teacher.player(LoraSpec(rank=2)), teacher.player(LoraSpec(rank=2))
        with torch.no_grad():
            for parameter in (*player.parameters(), *other.parameters()):
                parameter.normal_(std=0.2)
        if recompute:
            assert recompute_blocks(teacher.denoiser) > 0
        x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3])
        cond = teacher.conditioner.cond(torch.arange(2), 2)
        loss = (player(x_t, t, **cond) * teacher.denoiser(x_t, t, **cond)).mean() + other(x_t, t, **cond).mean()
        loss.backward()
        gradients.append([p.grad for p in (*player.parameters(), *other.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_lora_for_another_architecture_is_explained(prepared):
    with pytest.raises(
        SettingsError, match=r"must name linear layers or convolutions, got qkv. Try some of: 0, .*to_q"
    ):
        prepared.load().player(LoraSpec(targets=("qkv",)))


def test_prepare_and_sample_on_the_command_line(sdxl, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    assert main(["prepare", str(sdxl), "--prompts", str(prompts), "--out", str(tmp_path / "p"), "--dry-run"]) == 0
    assert "2 prompts, about 0.0 MiB" in capsys.readouterr().out and not (tmp_path / "p").exists()
    assert main(["prepare", str(sdxl), "--prompts", str(prompts), "--out", str(tmp_path / "p")]) == 0
    assert "finished: 2 prompts (0 existed already) in" in capsys.readouterr().out
    arguments = ["--evaluations", "3", "--guidance", "2", "--seeds", "0-1", "--prompts", str(tmp_path / "p")]
    assert main(["sample", str(sdxl), *arguments, "--out", str(tmp_path / "t.npz")]) == 0
    assert np.load(tmp_path / "t.npz")["images"].shape == (2, 16, 16, 3)
    assert main(["prepare", "digits/sid", "--prompts", str(prompts)]) == 1
    assert "has no text-to-image teacher" in capsys.readouterr().err


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_killed_preparation_goes_on_and_other_prompts_are_refused(tmp_path):
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return {"text": torch.tensor([[float(len(text))] for text in texts])}

    def prepare(prompts, **changes):
        null, about = {"text": torch.zeros(1)}, {"encoders": "abc"} | changes
        return prepare_prompts(tmp_path, prompts, encode, null, about, torch.float32, shard=2, batch=2)

    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert prepare(prompts) == 0 and calls == [2, 2, 1]
    (tmp_path / "prompts-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"prompts-00001.safetensors is missing"):
        Prompts.read(tmp_path, {})
    assert prepare(prompts) == 3 and calls == [2, 2, 1, 2]
    cond = Prompts.read(tmp_path, {"encoders": "abc"}, {"size": torch.tensor([7.0])}).cond(torch.tensor([4, 0, 5]), 3)
    assert cond["text"].flatten().tolist() == [5, 1, 0] and cond["size"].tolist() == [[7], [7], [7]]
    with pytest.raises(DataError, match="holds other prompts"):
        prepare(prompts[:4])
    with pytest.raises(DataError, match="embeddings made in another way"):
        prepare(prompts, encoders="xyz")
    with pytest.raises(DataError, match="prepared with encoders abc, this teacher has xyz"):
        Prompts.read(tmp_path, {"encoders": "xyz"})
    with pytest.raises(TeacherError, match=r"`classes` must be of .*, got 6"):
        Prompts.read(tmp_path, {}).cond(torch.tensor([6]), 1)
    with pytest.raises(DataError, match="fewstep prepare"):
        Prompts.read(tmp_path / "nothing", {})


def test_an_embedding_that_overflows_is_refused(tmp_path):
    def encode(texts):
        return {"text": torch.full((len(texts), 1), 1e6)}

    with pytest.raises(DataError, match=r"'a cat' does not fit float16\. Try: use bfloat16"):
        prepare_prompts(tmp_path, ["a cat"], encode, {"text": torch.zeros(1)}, {}, torch.float16)


@pytest.mark.parametrize("command", ["sample", "eval", "distill", "guided"])
def test_a_pipeline_without_prompts_says_what_it_needs(command, sdxl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    guidance = ", guidance: 2.0" if command == "guided" else ""
    (tmp_path / "run.yaml").write_text(
        f"{{kind: distill, teacher: {{kind: diffusers, path: '{sdxl}'}}, generator: {{timesteps: [999]}}, objective: {{method: dmd2, "
        f"gan_weight: 0{guidance}}}, train: {{images: 4, batch_size: 2, device: cpu}}, evaluation: {{samples: 0}}}}"
    )
    arguments = {
        "sample": ["sample", str(sdxl), "--evaluations", "2", "--seeds", "0"],
        "eval": [
            "eval",
            str(sdxl),
            "--evaluations",
            "2",
            "--samples",
            "4",
            "--processes",
            "1",
            "--reference",
            str(tmp_path),
        ],
    }.get(command, ["distill", "run.yaml", "--out", "run", "--processes", "1"])
    assert main(arguments) == 1
    assert "must have prompts, got none. Try: teacher.prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("p.jsonl", '"a cat"\n" "\n', "line 2: this caption is empty"),
        ("p.txt", "\n \n", "must hold prompts"),
        ("p.txt", "", "must hold prompts"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.xlsx", "a cat", "must end in .txt, .jsonl, .csv, .tsv, .parquet or .pkl, got .xlsx"),
        ("p.jsonl", '{"caption": "a"}\n{"other": 1}\n', "line 2 has no text under caption, text, prompt"),
        ("p.jsonl", "not json\n", "line 1 is not JSON"),
        ("p.jsonl", '{"caption": "a", "caption": "b"}\n', "line 1: the key 'caption' is given twice"),
        ("p.txt", "a cat\ra dog\r", "must end its lines with line feeds, got carriage returns alone"),
        ("p.txt", "a cat\ra dog", "must end its lines with line feeds"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=problem):
        read_prompt_file(tmp_path / name)


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\nein Bär\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('"a cat"\n{"prompt": "ein B\\u00e4r", "id": 3}\n')
    assert read_prompt_file(tmp_path / "p.txt") == read_prompt_file(tmp_path / "p.jsonl") == ["a cat", "ein Bär"]
    with pytest.raises(DataError, match="which does not exist"):
        read_prompt_file(tmp_path / "q.txt")
