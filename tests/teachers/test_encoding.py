"""What a teacher is conditioned on is what its pipeline's own call encodes, with real text encoders in every family."""

import importlib.util
import json
import shutil

import pytest
import torch

from fewstep.system.errors import DataError, SettingsError, TeacherError

pytest.importorskip("diffusers")

import diffusers

from fewstep.cli.main import main
from fewstep.run.specs import DistillRun
from fewstep.system.console import note
from fewstep.system.weights import load_weights
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.encoding import TextOptions
from tests.support.pipelines import tiny_sd15, tiny_sdxl, with_encoders

FAMILIES = ("sd15", "sdxl", "sd3", "sd3-no-t5", "flux", "sana", "pixart")
PROMPTS = ["a Cat", "a dog &amp; a house, see http://example.com/x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    made = {"sd15": tiny_sd15(root / "sd15"), "sdxl": tiny_sdxl(root / "sdxl")}
    made["sd3-no-t5"] = with_encoders("sd3", root / "sd3-no-t5", t5_too=False)
    return made | {name: with_encoders(name, root / name) for name in ("sd3", "flux", "sana", "pixart")}


@pytest.fixture(autouse=True)
def _fresh_notes():
    note.cache_clear()


def load_whole(folder):
    parts = diffusers.DiffusionPipeline.load_config(folder)
    absent = [name for name, kind in parts.items() if isinstance(kind, list) and kind[0] is None]
    return diffusers.DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))


def of_the_pipeline(name, folder, prompts, **options):
    """Conditions of the prompts and of the empty one, as one call of the pipeline encodes them."""
    pipeline, calls = load_whole(folder), []
    original = pipeline.encode_prompt

    def spy(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        return calls[-1]

    pipeline.encode_prompt = spy
    more = {"use_resolution_binning": False} if name in ("sana", "pixart") else {}
    guided = {"guidance_scale": 3.0}
    if name == "flux":
        guided = {"true_cfg_scale": 2.0, "negative_prompt": options.pop("negative_prompt", [""] * len(prompts))}
    side = 32 if name == "sana" else 16
    with torch.no_grad():
        pipeline(
            prompts, num_inference_steps=1, height=side, width=side, output_type="latent", **more, **guided, **options
        )
    match name:
        case "flux":
            return [{"text": text, "pooled": pooled} for text, pooled, _ in calls]
        case "sana" | "pixart":
            text, mask, empty, empty_mask = calls[0]
            return [{"text": text, "mask": mask}, {"text": empty, "mask": empty_mask}]
        case _:
            names = ("text", "pooled")[: len(calls[0]) // 2]
            return [dict(zip(names, calls[0][first::2], strict=True)) for first in (0, 1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_are_those_of_the_pipelines_own_call(name, folders):
    wanted = of_the_pipeline(name, folders[name], PROMPTS)
    found = DiffusersTeacher(path=str(folders[name])).encoder()(PROMPTS)
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("sdxl", {"clip_skip": 1}),
        ("sd3", {"clip_skip": 0, "max_sequence_length": 20}),
        ("flux", {"max_sequence_length": 16}),
        ("sana", {"complex_human_instruction": ["Say it well: "], "max_sequence_length": 30}),
        ("pixart", {"clean_caption": False, "max_sequence_length": 10}),
    ],
)
def test_settings_are_arguments_of_the_call(name, options, folders):
    wanted = of_the_pipeline(name, folders[name], PROMPTS, **options)
    plain = DiffusersTeacher(path=str(folders[name]))
    teacher = plain.model_copy(update={"text": TextOptions(**options)})
    for a, b in zip(teacher.encoder()(PROMPTS), wanted, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert teacher.encoders_fingerprint() != plain.encoders_fingerprint()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("negative", ["a Blurry hand", ""])
def test_a_negative_prompt_is_the_null(name, negative, folders, tmp_path):
    """As the pipeline's own call encodes it; the empty one too, which to SDXL is another than none."""
    wanted = of_the_pipeline(name, folders[name], PROMPTS, negative_prompt=[negative] * 2)
    plain = DiffusersTeacher(path=str(folders[name]), resolution=16 if name == "flux" else None)
    teacher = plain.model_copy(update={"negative_prompt": negative})
    for key, value in teacher.encoder().empty("any").items():
        torch.testing.assert_close(value, wanted[1][key][0], rtol=0, atol=1e-6)
    teacher.prepare(PROMPTS, tmp_path, teacher.encoder(), torch.float32)
    with pytest.raises(DataError, match=r"prepared with encoders .*negative_prompt"):
        plain.model_copy(update={"prompts": tmp_path}).load()
    ready = teacher.model_copy(update={"prompts": tmp_path})
    if name == "flux":
        with pytest.raises(
            TeacherError, match=r"negative_prompt must be left out, .* its network takes its guidance as an input"
        ):
            ready.load()
        return
    loaded = ready.load()
    null = loaded.conditioner.null(loaded.conditioner.cond(torch.arange(2), 2))
    torch.testing.assert_close(null["text"], wanted[1]["text"], rtol=0, atol=1e-6)
    in_memory = plain.load(plain.encode(PROMPTS, plain.encoder()))
    assert in_memory.conditioner.sha256 != loaded.conditioner.sha256  # pairs and stopped runs know the difference


def test_guidance_away_from_a_negative_prompt(folders, tmp_path, capsys):
    """On the command line: the teacher's pictures change; what would do nothing is refused."""
    place = str(folders["sd15"])
    arguments = ["sample", place, "--prompt", "a cat", "--seeds", "0", "--evaluations", "3", "--device", "cpu"]

    def drawn(name, *more):
        assert main([*arguments, "--out", str(tmp_path / name), *more]) == 0
        return (tmp_path / name).read_bytes()

    away = drawn("a.png", "--guidance", "4", "--negative-prompt", "a dog")
    assert away != drawn("b.png", "--guidance", "4") == drawn("c.png", "--guidance", "4", "--negative-prompt", "")
    capsys.readouterr()
    assert main([*arguments, "--negative-prompt", "a dog"]) == 1
    assert "must come with --prompt and --guidance" in capsys.readouterr().err
    teacher = DiffusersTeacher(path=place, prompts=tmp_path / "p", negative_prompt="a dog")
    teacher.prepare(PROMPTS, tmp_path / "p", teacher.encoder())
    run = DistillRun.model_validate({"teacher": teacher.model_dump(), "objective": {"method": "sid"}})
    with pytest.raises(SettingsError, match=r"negative_prompt must come with guidance, got 'a dog'"):
        run.trainer(tmp_path / "run")


def test_a_negative_prompt_that_is_too_long_is_said(folders, tmp_path, capsys):
    teacher = DiffusersTeacher(path=str(folders["sd15"]), negative_prompt="ugly " * 20)
    teacher.prepare(["a cat", "a dog"], tmp_path / "p", teacher.encoder())
    assert "1 of 2 prompts are longer than the 12 tokens of tokenizer" in (said := capsys.readouterr().err)
    assert "The first: 'ugly" in said


def test_clip_skip_of_stable_diffusion_reads_an_earlier_layer(folders):
    """The layer before the last through the last norm; diffusers' own line for it fails under transformers 5."""
    pipeline = load_whole(folders["sd15"])
    ids = pipeline.tokenizer(
        PROMPTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        output = pipeline.text_encoder(ids, output_hidden_states=True)
        norm = dict(pipeline.text_encoder.named_modules())
        norm = norm.get("final_layer_norm") or norm["text_model.final_layer_norm"]
        wanted = norm(output.hidden_states[-2])
    teacher = DiffusersTeacher(path=str(folders["sd15"]), text=TextOptions(clip_skip=1))
    found = teacher.encoder()(PROMPTS)[0]["text"]
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, DiffusersTeacher(path=str(folders["sd15"])).encoder()(PROMPTS)[0]["text"])


def test_an_option_that_a_pipeline_does_not_take_is_refused(folders):
    with pytest.raises(TeacherError, match=r"teacher.text must hold what FluxPipeline takes, got clip_skip"):
        DiffusersTeacher(path=str(folders["flux"]), text=TextOptions(clip_skip=1)).encoder()


def test_prompts_encoded_otherwise_are_another_teachers(folders, tmp_path):
    teacher = DiffusersTeacher(path=str(folders["sana"]))
    teacher.prepare(PROMPTS, tmp_path, teacher.encoder(), torch.float32)
    ready = teacher.model_copy(update={"prompts": tmp_path})
    assert ready.load().conditioner.names == PROMPTS
    other = ready.model_copy(update={"text": TextOptions(complex_human_instruction=())})
    with pytest.raises(DataError, match=r"prepared with encoders .*complex_human_instruction"):
        other.load()


def test_t5_may_be_left_out_or_absent(folders, tmp_path, capsys):
    """By a setting, or because its folder was not fetched: 256 tokens of zeros, as diffusers has it."""
    left_out = DiffusersTeacher(path=str(folders["sd3"]), without=("text_encoder_3", "tokenizer_3"))
    text = left_out.encoder()(PROMPTS)[0]["text"]
    assert text.shape[1] == 12 + 256 and not text[:, 12:].any() and text[:, :12].any()
    assert left_out.encoders_fingerprint() != DiffusersTeacher(path=str(folders["sd3"])).encoders_fingerprint()
    absent = tmp_path / "sd3"
    shutil.copytree(folders["sd3"], absent)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(absent / part)
    assert torch.equal(DiffusersTeacher(path=str(absent)).encoder()(PROMPTS)[0]["text"], text)
    assert "text_encoder_3, tokenizer_3 is listed and not there" in capsys.readouterr().err
    with pytest.raises(TeacherError, match=r"teacher.without must name components, got t5"):
        DiffusersTeacher(path=str(absent), without=("t5",)).load()


@pytest.mark.parametrize(
    "gone, problem",
    [
        (["tokenizer_2"], "must hold the components of its model_index.json, got no folder tokenizer_2"),
        (
            ["tokenizer_2/tokenizer.json"],
            r"tokenizer of text_encoder_2 .* must know the tokens of its encoder, got 2 of 514",
        ),
        (["tokenizer/tokenizer_config.json"], r"tokenizer of text_encoder of .* got no tokenizer_config.json"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(gone, problem, folders, tmp_path):
    """The library makes one up to which all prompts are the same."""
    shutil.copytree(folders["sdxl"], tmp_path / "s")
    for name in gone:
        place = tmp_path / "s" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(TeacherError, match=problem):
        DiffusersTeacher(path=str(tmp_path / "s")).encoder()


def test_a_missing_encoder_is_refused(folders, tmp_path):
    whole = load_whole(folders["flux"])
    parts = whole.components | {"text_encoder_2": None, "tokenizer_2": None}
    type(whole)(**parts).save_pretrained(tmp_path / "flux")
    with pytest.raises(TeacherError, match=r"to encode prompts, got no text_encoder_2"):
        DiffusersTeacher(path=str(tmp_path / "flux")).encoder()


@pytest.mark.parametrize("name", ["sd15", "sana"])
def test_cut_prompts_are_counted_and_one_is_shown(name, folders, tmp_path, capsys):
    """CLIP's tokenizer is cut by the library with a warning a batch, Gemma's without a word."""
    long = "x" * 400
    (tmp_path / "p.txt").write_text(f"a cat\n{long}\na dog\n{long}y\n")
    assert (
        main(["prepare", str(folders[name]), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "p")]) == 0
    )
    said = capsys.readouterr().err
    assert "2 of 4 prompts are longer than the" in said and "The first: 'xxxx" in said
    assert (
        main(["prepare", str(folders[name]), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "p")]) == 0
    )


def test_prompts_that_fit_are_not_called_cut(folders, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    for name in ("sd15", "flux", "sana"):
        arguments = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / name)]
        assert main(["prepare", str(folders[name]), *arguments]) == 0
    assert "longer than" not in capsys.readouterr().err


def test_pixart_says_when_it_cannot_clean(folders, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ftfy" else found(name, *more))
    DiffusersTeacher(path=str(folders["pixart"])).encoder()
    assert "ftfy" in (said := capsys.readouterr().err) and "prompts are not cleaned" in said


def test_pixart_cleans_captions(folders):
    pytest.importorskip("ftfy", reason="PixArt's caption cleaning needs ftfy and beautifulsoup4")
    pytest.importorskip("bs4", reason="PixArt's caption cleaning needs ftfy and beautifulsoup4")
    encode = DiffusersTeacher(path=str(folders["pixart"])).encoder()
    assert torch.equal(encode(["a cat see http://example.com/x"])[0]["text"], encode(["a cat see"])[0]["text"])


def test_pixarts_folder_may_name_its_network_as_it_was_published(folders, tmp_path):
    """PixArt-Sigma-XL-2-1024-MS lists a Transformer2DModel."""
    folder = tmp_path / "pixart"
    shutil.copytree(folders["pixart"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][1] = "Transformer2DModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    teacher, wanted = DiffusersTeacher(path=str(folder)), DiffusersTeacher(path=str(folders["pixart"]))
    assert torch.equal(teacher.encoder()(["a cat"])[0]["text"], wanted.encoder()(["a cat"])[0]["text"])
    assert teacher.load().sha256 == wanted.load().sha256


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sana", "pixart"])
def test_the_outline_has_the_shapes_of_the_condition(name, folders):
    """`fewstep plan` counts the tokens that are there (SD3's at full size: 77 of CLIP, which the tiny ones lack)."""
    teacher = DiffusersTeacher(path=str(folders[name]), resolution=16 if name == "flux" else None)
    outline = teacher.outline()[1]
    found = teacher.encoder()(["a cat"])[0]
    assert all(outline[key].shape == found[key].shape for key in found)


def test_prepared_embeddings_are_the_pipelines(folders, tmp_path):
    """From the command to the file, in the family whose call differs most from its `encode_prompt`."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "p"), "--dtype", "float32"]
    assert main(["prepare", str(folders["sana"]), *arguments]) == 0
    wanted, empty = of_the_pipeline("sana", folders["sana"], PROMPTS)
    found = load_weights(tmp_path / "p" / "prompts-00000.safetensors")[0]
    torch.testing.assert_close(found["text"], wanted["text"], rtol=0, atol=1e-5)
    assert torch.equal(found["mask"], wanted["mask"])
    null = load_weights(tmp_path / "p" / "null.safetensors")[0]
    torch.testing.assert_close(null["text"], empty["text"][0], rtol=0, atol=1e-5)
