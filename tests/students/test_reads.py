"""How often a command reads weights: each file once, whatever is drawn, scored, written or shown."""

import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("diffusers")

import fewstep.students.export  # noqa: F401  (the spies below are set in every module that is loaded)
from fewstep.cli.main import main
from fewstep.diffusion.generator import Generator
from fewstep.formats.model import DenoiserSpec, save_generator
from fewstep.networks import SongUNetSpec
from fewstep.networks.lora import LoraSpec
from fewstep.report.web import Session
from fewstep.system import tensors
from fewstep.system.files import file_sha256
from fewstep.teachers import DiffusersTeacher, pipelines
from tests.support.networks import EDM, randomised
from tests.support.pipelines import tiny_sdxl
from tests.support.published import write_published

SONG = DenoiserSpec(net=SongUNetSpec(**EDM))
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


class Reads(Counter):
    """What was read and hashed, by name."""

    def under(self, folder):
        """The names below a folder, which must have been read once each."""
        assert set(self.values()) <= {1}, self
        return {name.removeprefix(f"{folder}/") for name in self}


@pytest.fixture
def reads(monkeypatch):
    """Counts files of weights that are read or hashed, and networks of a pipeline that are loaded."""
    found = Reads()

    def spy(original, what):
        def counted(file, *args, **kwargs):
            found[f"{file} {what}"] += 1
            return original(file, *args, **kwargs)

        for name, module in list(sys.modules.items()):
            for attribute, value in list(vars(module).items()) if name.startswith("fewstep.") else ():
                if value is original:
                    monkeypatch.setattr(module, attribute, counted)

    import safetensors.torch

    from fewstep.formats.dmd2 import read_tensors
    from fewstep.formats.edm_pickle import read_edm_pickle

    load_file, load_parts = safetensors.torch.load_file, pipelines.load_parts
    spy(file_sha256, "hashed")
    spy(read_edm_pickle, "read")
    spy(read_tensors, "read")

    def counted_file(file, *args, **kwargs):
        found[f"{file} read"] += 1
        return load_file(file, *args, **kwargs)

    def counted_parts(library, path, *args):
        loaded = load_parts(library, path, *args)
        found.update(f"{path}/{name} read" for name in loaded)
        return loaded

    monkeypatch.setattr(safetensors.torch, "load_file", counted_file)
    monkeypatch.setattr(pipelines, "load_parts", counted_parts)
    return found


@pytest.fixture(scope="module")
def text_student(tmp_path_factory):
    """A folder with a tiny SDXL, prompts of it, and run folders with a LoRA student and a whole one."""
    root = tmp_path_factory.mktemp("text")
    plain = DiffusersTeacher(path=str(tiny_sdxl(root / "sdxl")))
    plain.prepare(["a cat", "a dog"], root / "prompts", plain.encoder(), torch.float32)
    spec = plain.model_copy(update={"prompts": root / "prompts"})
    teacher = spec.load()
    provenance = {"teacher": spec.path, "run": {"teacher": spec.model_dump(mode="json", exclude_none=True)}}
    for name, lora in (("lora", LoraSpec(rank=2, alpha=2)), ("whole", None)):
        (root / name).mkdir()
        generator = Generator(teacher.player(lora), [1.0, 0.5])
        save_generator(root / name / "student.safetensors", generator, teacher.student_spec, provenance)
    return root


def both(*files):
    return {f"{file}.safetensors {what}" for file in files for what in ("read", "hashed")}


def networks(*names):
    own = {f"sdxl/{name}/diffusion_pytorch_model.safetensors read" for name in names if "text" not in name}
    return own | {f"sdxl/{name} read" for name in names}  # transformers opens its files by itself


def test_sampling_reads_a_student_once(folder, reads, tmp_path):
    assert main(["sample", str(folder / "run"), "--seeds", "0-3", "--out", str(tmp_path / "s.npz")]) == 0
    assert reads.under(folder) == both("run/student")


def test_a_published_file_is_read_and_hashed_once(reads, tmp_path):
    write_published(tmp_path / "t.pkl", randomised(SONG))
    command = ["sample", str(tmp_path / "t.pkl"), "--sigma-init", "2.5", "--seeds", "0-1"]
    assert main([*command, "--out", str(tmp_path / "s.npz")]) == 0
    assert reads.under(tmp_path) == {"t.pkl read", "t.pkl hashed"}


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_a_typed_prompt_is_encoded_and_drawn_with_one_pipeline(name, text_student, reads, tmp_path):
    command = ["sample", str(text_student / name), "--prompt", "a fox", "--seeds", "0-1"]
    assert main([*command, "--out", str(tmp_path / "s.npz")]) == 0
    assert reads.under(text_student) == both(f"{name}/student") | networks(*PARTS)


def test_a_comparison_reads_each_model_once(folder, reads):
    models = [str(folder / "run"), str(folder / "teacher.safetensors")]
    command = ["eval", *models, "--evaluations", "2,1", "--samples", "20", "--metrics", "fid", "--guidance", "1.5"]
    assert main([*command, "--device", "cpu", "--processes", "1"]) == 0
    assert reads.under(folder) == both("run/student", "teacher")


def test_students_share_the_pipeline_of_their_teacher(text_student, reads, tmp_path):
    from PIL import Image

    (tmp_path / "real").mkdir()
    for value in range(4):
        Image.new("RGB", (16, 16), (60 * value, 90, 200 - 50 * value)).save(tmp_path / "real" / f"{value}.png")
    models = [str(text_student / name) for name in ("lora", "whole")]
    command = ["eval", *models, "--evaluations", "2,1", "--samples", "4", "--metrics", "fid", "--processes", "1"]
    command += ["--extractor", "pixels", "--reference", str(tmp_path / "real"), "--out", str(tmp_path / "r.json")]
    assert main(command) == 0
    assert reads.under(text_student) == both("lora/student", "whole/student", "prompts/null") | networks("unet", "vae")


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_export_loads_no_network_and_reads_each_tensor_once_a_file(name, text_student, reads, tmp_path, monkeypatch):
    opened = Counter()
    read = tensors._reader

    def counted(path, start, *args):
        made = read(path, start, *args)

        def make():
            opened[f"{path.relative_to(text_student)} {start}"] += 1
            return made()

        return make

    monkeypatch.setattr(tensors, "_reader", counted)
    command = ["export", str(text_student / name), "--out", str(tmp_path / "out"), "--formats"]
    assert main([*command, "diffusers"]) == 0
    assert reads.under(text_student) == {f"{name}/student.safetensors hashed"}
    folders = {key.rsplit("/", 1)[0] for key in opened}
    assert folders == {name, *(f"sdxl/{part}" for part in PARTS if part != "unet" or name == "lora")}
    assert set(opened.values()) == {1}


def test_a_press_on_the_page_reads_nothing(text_student, reads):
    session = Session([str(text_student / "lora")])
    assert reads.under(text_student) == both("lora/student", "prompts/null") | networks(*PARTS)
    reads.clear()
    drawn = [list(session.draw(prompt, 3, 2, 2)) for prompt in ("a fox", "a boat", "a fox")]
    assert not reads
    (first, other, again) = [[picture.tobytes() for part in (0, 2) for picture in press[-1][part]] for press in drawn]
    assert len(first) == 4 and first == again and all(a != b for a, b in zip(first, other, strict=True))


def test_the_page_of_a_student_in_a_file_reads_both_models_once(folder, reads):
    session = Session([str(folder / "run")])
    assert reads.under(folder) == both("run/student", "teacher")
    reads.clear()
    assert all(len(list(session.draw("3", 0, 2, calls))[-1][2]) == 2 for calls in (1, 2))
    assert not reads
