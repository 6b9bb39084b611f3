"""The families of 2025 and 2026 against their pipelines' own calls: what the network is given, each step, and the picture."""

import inspect
import itertools
import json
import re
import shutil

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from fewstep.cli.main import main
from fewstep.diffusion.guidance import Scale
from fewstep.networks import FAMILIES
from fewstep.networks.blocks import blocks_of
from fewstep.system.console import note
from fewstep.system.errors import TeacherError
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.few_step import About, check_few_step
from fewstep.teachers.pipelines import family_of
from tests.support.families import NAMES, Made, laid, side, tiny_family

PROMPTS = ["a Cat", "a dog in a house &amp; a tree, by the sea"]  # of different lengths


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return Made(lambda name: tiny_family(name, root / name))


@pytest.fixture(scope="module")
def teachers(folders):
    """Each teacher with the prompts in memory."""

    def make(name):
        spec = DiffusersTeacher(path=str(folders[name]), resolution=side(name))
        return spec.load(spec.encode(PROMPTS, spec.encoder()))

    return Made(make)


def spied(network, calls):
    """Record what a network is given, by the names of its parameters, and what it gives."""

    def hook(module, args, kwargs, output):
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        calls.append({key: value for key, value in bound.items() if key != "self"} | {"output": output[0]})

    return network.register_forward_hook(hook, with_kwargs=True)


OFF = {
    "flux2-dev": {},  # the network is told its guidance, 4 by itself
    "qwen-image": {"true_cfg_scale": 1.0},
    "longcat": {"guidance_scale": 0.0, "enable_prompt_rewrite": False},
}


def drawn(name, folder, prompts, latents, steps=2, **more):
    """What the network was given in the pipeline's own unguided call, the latents after each step, and the pictures."""
    pipeline, calls, visited = diffusers.DiffusionPipeline.from_pretrained(folder), [], []
    spied(pipeline.transformer, calls)

    step = pipeline.scheduler.step

    def spied_step(*args, **kwargs):
        found = step(*args, **kwargs)
        visited.append(found[0])
        return found

    pipeline.scheduler.step = spied_step
    off = OFF.get(name, {"guidance_scale": 0.0})
    given = latents if name.startswith("flux2") else laid(name, latents)
    pictures = pipeline(
        prompt=list(prompts), latents=given, num_inference_steps=steps, height=side(name), width=side(name), output_type="pt",
        **(off | more),
    ).images  # fmt: skip
    return pipeline, calls, visited, pictures


def same(found, wanted):
    """Compare arguments of a network; those that are None count as left out."""
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=1e-5)
    elif isinstance(wanted, (list, tuple)):
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    else:
        assert found == wanted


IDLE = ("guidance", "return_dict", "attention_kwargs", "joint_attention_kwargs", "output")


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_given_what_the_pipelines_call_gives(name, folders, teachers):
    """Text, masks, ids, time and samples, argument by argument, for prompts of different lengths."""
    teacher = teachers[name]
    latents = torch.randn(2, *teacher.shape)
    _, wanted, _, _ = drawn(name, folders[name], PROMPTS, latents, steps=1)
    calls = []
    hook = spied(teacher.denoiser.net.model, calls)
    with torch.no_grad():
        teacher.denoiser(latents, torch.ones(2), **teacher.conditioner.cond(torch.arange(2), 2))
    hook.remove()
    left = {key for key in (*wanted[0], *calls[0]) if key not in IDLE}
    left |= {"guidance"} if teacher.guided_inside else set()
    for key in left:
        batched = (
            key in ("img_ids", "txt_ids") and wanted[0][key].ndim == 3
        )  # equal rows, of which the network reads one
        same(calls[0].get(key), wanted[0].get(key)[:1] if batched else wanted[0].get(key))
    same(calls[0]["output"], wanted[0]["output"])


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_pictures_are_the_pipelines(name, folders, teachers):
    """Euler's steps x + (s' - s) v with v = (x - D(x)) / s, for two prompts at once; the latents decoded to pictures."""
    teacher = teachers[name]
    latents = torch.randn(2, *teacher.shape)
    pipeline, _, visited, pictures = drawn(name, folders[name], PROMPTS, latents, sigmas=[1.0, 0.6])
    x, cond = latents, teacher.conditioner.cond(torch.arange(2), 2)
    with torch.no_grad():
        for (here, there), wanted in zip(itertools.pairwise(pipeline.scheduler.sigmas.double()), visited, strict=True):
            t = teacher.denoiser.schedule.time((here / (1 - here))[None]).expand(2)
            x = x + (there - here).float() * (x - teacher.denoiser(x, t, **cond)) / here.float()
            torch.testing.assert_close(laid(name, x), wanted, rtol=1e-4, atol=1e-4)
        mine = (teacher.codec.decode(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(mine, pictures, rtol=1e-3, atol=1e-3)
    assert mine.std() > 0.01
    whole = torch.rand(1, 3, side(name), side(name)) * 2 - 1
    assert teacher.codec.encode(whole).shape[1:] == teacher.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_prompts_of_other_lengths_changes_nothing(name, teachers):
    teacher = teachers[name]
    x, t = torch.randn(2, *teacher.shape), torch.tensor([0.8, 0.3])
    cond = teacher.conditioner.cond(torch.arange(2), 2)
    with torch.no_grad():
        both = teacher.denoiser(x, t, **cond)
        for row in range(2):
            alone = {key: value[row : row + 1] for key, value in cond.items()}
            torch.testing.assert_close(
                teacher.denoiser(x[row : row + 1], t[row : row + 1], **alone), both[row : row + 1], rtol=1e-4, atol=1e-5
            )
        other = {key: value.flip(0) for key, value in cond.items()}
        assert not torch.allclose(teacher.denoiser(x, t, **other), both, atol=1e-4)  # the text is read


@pytest.mark.parametrize("name", NAMES)
def test_the_empty_condition_and_negative_prompts_are_the_pipelines(name, folders):
    """As guidance in the pipeline's call contrasts with; FLUX.2's take no negative prompt, and dev contrasts with nothing."""
    if name == "flux2-dev":
        with pytest.raises(TeacherError, match="takes its guidance as an input"):
            DiffusersTeacher(path=str(folders[name]), resolution=side(name)).load().guided(Scale(3.0))
        return
    latents = torch.randn(2, *DiffusersTeacher(path=str(folders[name]), resolution=side(name)).load().shape)
    for negative in (None, "Ugly") if name != "flux2" else (None,):
        guided = {"guidance_scale": 3.0} if name != "qwen-image" else {"true_cfg_scale": 3.0}
        if negative is not None or name == "qwen-image":
            guided["negative_prompt"] = [negative or " "] * 2
        _, calls, _, _ = drawn(name, folders[name], PROMPTS, latents, 1, **guided)
        spec = DiffusersTeacher(path=str(folders[name]), resolution=side(name), negative_prompt=negative)
        null = spec.encoder().empty(PROMPTS[1])
        text = "cap_feats" if name == "z-image" else "encoder_hidden_states"
        wanted = calls[0][text][-1] if name == "z-image" else calls[-1][text][-1]
        mine = (
            null["text"]
            if name in ("flux2", "krea2", "lumina2", "chroma", "longcat")
            else null["text"][null["mask"].bool()]
        )
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


def test_facts_are_read(folders, teachers):
    """Shifts, and statistics of latents: FLUX.2's are weights of its VAE, Qwen-Image's are in its configuration."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    shifts = {name: teachers[name].denoiser.schedule.shift for name in NAMES}
    assert shifts["z-image"] == shifts["lumina2"] == 6 and shifts["chroma"] == 1
    assert shifts["flux2"] == pytest.approx(torch.tensor(compute_empirical_mu(16, 50)).exp().item())
    assert shifts["qwen-image"] == pytest.approx(torch.tensor(0.5 + 0.4 / (8192 - 256) * (16 - 256)).exp().item())
    with pytest.raises(TeacherError, match=r"teacher.latents must hold what the pipeline applies, got scaling_factor"):
        DiffusersTeacher(path=str(folders["flux2"]), resolution=16, latents={"scale": 2.0}).load()
    with pytest.raises(TeacherError, match=r"teacher.tiny_vae, .* with a AutoencoderKLQwenImage"):
        DiffusersTeacher(path=str(folders["qwen-image"]), resolution=16, tiny_vae="madebyollin/taesd").load()
    with pytest.raises(TeacherError, match=r"multiples of 4 pixels, .* got 18"):
        DiffusersTeacher(path=str(folders["qwen-image"]), resolution=18).load()
    assert DiffusersTeacher(path=str(folders["flux2"]), resolution=(20, 16)).load().shape == (16, 4, 5)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_sizes_for_plan(name, folders, teachers):
    """Gradient checkpointing, swapping and quantising find the layers; the outline has the shapes of the conditions."""
    teacher = teachers[name]
    assert len(blocks_of(teacher.denoiser)) == {
        "flux2": 4,
        "flux2-dev": 4,
        "krea2": 4,
        "lumina2": 4,
        "longcat": 4,
        "qwen-image": 2,
    }.get(name, 5)
    spec = DiffusersTeacher(path=str(folders[name]), resolution=side(name))
    about, outline = spec.outline()
    assert about.net.sample_shape == teacher.shape
    cond = teacher.conditioner.cond(torch.arange(1), 1)
    assert {key: value.shape for key, value in outline.items()} == {key: value.shape for key, value in cond.items()}


@pytest.mark.parametrize("name", ["flux2", "flux2-dev", "qwen-image"])
def test_cut_prompts_are_counted(name, folders, tmp_path, capsys):
    """FLUX.2's pipeline hands its prompts to the tokenizer one by one; Qwen-Image's cuts again after its encoder."""
    note.cache_clear()
    (tmp_path / "p.txt").write_text(f"a cat\n{'x' * 1100}\n")
    assert (
        main(["prepare", str(folders[name]), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "p")]) == 0
    )
    said = capsys.readouterr().err
    assert "1 of 2 prompts are longer than the" in said and "The first: 'xxxx" in said


@pytest.mark.parametrize(
    "pipeline, network, words",
    [
        ("WanPipeline", "WanTransformer3DModel", "got WanPipeline, which makes videos: they are out of scope"),
        ("QwenImageEditPipeline", "QwenImageTransformer2DModel", "its QwenImageTransformer2DModel is known, what QwenImageEditPipeline"),
        ("FluxKontextPipeline", "FluxTransformer2DModel", "its FluxTransformer2DModel is known, what FluxKontextPipeline gives it"),
        ("AuraFlowPipeline", "AuraFlowTransformer2DModel", "its AuraFlowTransformer2DModel has no entry in fewstep/networks/families. An entry says how AuraFlowPipeline .* inputs hidden_states, encoder"),
        ("TomorrowPipeline", "TomorrowModel", "must be a pipeline that is known here, got TomorrowPipeline"),
    ],
)  # fmt: skip
def test_other_pipelines_are_refused_by_name(pipeline, network, words, tmp_path):
    """From model_index.json alone: nothing else is there."""
    index = {"_class_name": pipeline, "transformer": ["diffusers", network], "scheduler": ["diffusers", "None"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match=words):
        DiffusersTeacher(path=str(tmp_path)).load()


def pipelines_of_diffusers():
    """Every pipeline of the installed library, with an index of the components that its class takes."""
    for name in sorted(name for name in dir(diffusers) if name.endswith("Pipeline")):
        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.DiffusionPipeline) or kind is diffusers.DiffusionPipeline:
            continue
        index = {"_class_name": name}
        for part, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
            classes = re.findall(r"\w+", str(parameter.annotation).replace("<class", "").replace("|", " "))
            classes = [word for word in classes if word[0].isupper() and word not in ("None", "Union", "Optional")]
            if classes:
                index[part] = ["diffusers", classes[0]]
        yield name, index


@pytest.mark.slow
def test_every_pipeline_of_the_library_is_known_or_refused_by_name():
    """By names alone. UNets without other components than Stable Diffusion's are judged by their configurations."""
    known, refused = set(), {}
    for name, index in pipelines_of_diffusers():
        try:
            model, family = family_of(index, "it")
        except TeacherError as error:
            refused[name] = str(error)
        else:
            assert name in family.pipelines or model.startswith("UNet2D"), name
            known.add(name)
    assert known >= {kind for family in FAMILIES.values() for kind in family.pipelines}
    assert not any(re.search("ControlNet|Adapter|Video|Kandinsky|^IF", name) for name in known)
    assert len(refused) > 150
    for name, said in refused.items():
        assert f"got {name}" in said and "\n" not in said and len(said) < 900, said
        assert re.search(
            "out of scope|makes sound|takes no prompt|has neither unet|is known, what|has no entry in", said
        ), said
    for name in ("AuraFlow", "CogView4", "HiDreamImage", "HunyuanDiT", "Bria", "PRX", "OmniGen", "Kandinsky5T2I"):
        assert re.search(r"its \w+ has no entry in .*, and the inputs \w+", refused[f"{name}Pipeline"])
    for name in ("Wan", "AnimateDiff", "CogVideoX", "LTX", "SanaVideo"):
        assert "which makes videos: they are out of scope" in refused[f"{name}Pipeline"]


def test_a_distilled_klein_is_refused(folders, tmp_path):
    shutil.copytree(folders["flux2"], tmp_path / "klein")
    index = json.loads((tmp_path / "klein" / "model_index.json").read_text()) | {"is_distilled": True}
    (tmp_path / "klein" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match="is_distilled"):
        DiffusersTeacher(path=str(tmp_path / "klein")).check_few_step()
    with pytest.raises(TeacherError, match="'turbo' in the name"):
        check_few_step(About("Tongyi-MAI/Z-Image-Turbo", model="ZImageTransformer2DModel"), allowed=False)


def test_every_family_with_a_pipeline_list_names_pipelines_of_the_library():
    for family in FAMILIES.values():
        for kind in family.pipelines:
            assert hasattr(diffusers, kind), kind
