"""The page for trying a student: what a press draws, and the page itself in a headless browser."""

import json
import shutil
import urllib.request

import pytest
import torch

from fewstep.cli.main import main
from fewstep.diffusion.generator import Generator
from fewstep.evaluation.candidates import encode_prompts, load_candidate
from fewstep.formats.model import save_generator
from fewstep.networks.lora import LoraSpec
from fewstep.report.web import UPLOAD, Session, make_page
from fewstep.students.sample import FewStep, generate
from fewstep.system.errors import SettingsError
from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import tiny_sd15
from tests.support.places import ROOT

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def test_a_press_draws_what_sample_draws(folder):
    session = Session([str(folder / "run")])
    first, second = session.draw("3", 7, 2, 3)
    assert len(first[0]) == 2 and first[2] == [] and first[1].startswith("2 network calls per image")
    assert len(second[2]) == 2 and second[3].startswith("3 network calls per image")
    model = session.students[0]
    wanted = next(generate(model.sampler, [7, 8], model.shape, model.conditioner, labels=torch.tensor([3, 3])))
    assert first[0][1].resize((8, 8), 0).tobytes() == wanted[1, 0].numpy().tobytes()
    assert list(session.draw("any", 0, 1, 0))[-1][3] == "no teacher"


def test_fewer_calls_show_the_samples_estimate_so_far(folder):
    session = Session([str(folder / "run")])
    (drawn, said, *_) = list(session.draw("3", 7, 1, 0, 1))[-1]
    assert said.startswith("after 1 of its 2 calls: 1 network call per image")
    model, generator = session.students[0], session.students[0].sampler.generator
    early = FewStep(Generator(generator.denoiser, generator.times[:1]))
    wanted = next(generate(early, [7], model.shape, model.conditioner, labels=torch.tensor([3])))
    assert drawn[0].resize((8, 8), 0).tobytes() == wanted[0, 0].numpy().tobytes()
    with pytest.raises(SettingsError, match="between 0 and 2"):
        next(session.draw("3", 7, 1, 0, 3))


def test_several_students_of_one_teacher(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "other")
    session = Session([str(folder / "run"), str(tmp_path / "other")])
    *_, last = session.draw("3", 7, 2, 3)
    assert len(last) == 6 and len(last[0]) == len(last[2]) == len(last[4]) == 2
    assert last[0][1].tobytes() == last[2][1].tobytes()  # the same weights and seeds
    assert last[5].startswith("3 network calls per image")
    shutil.copytree(ROOT / "tests" / "files-0.1.0", tmp_path / "files")
    with pytest.raises(SettingsError, match="must have one base model"):
        Session([str(folder / "run"), str(tmp_path / "files" / "lora-imported")])


def test_a_typed_prompt_is_drawn_as_sample_draws_it_under_guidance_too(tmp_path):
    """The empty prompt that guides the teacher is encoded with the prompt, not the rounded one of the prepared folder."""
    pytest.importorskip("diffusers")
    plain = DiffusersTeacher(path=str(tiny_sd15(tmp_path / "sd15")))
    plain.prepare(["a cat", "a dog"], tmp_path / "prompts", plain.encoder(), torch.float16)
    spec = plain.model_copy(update={"prompts": tmp_path / "prompts"})
    teacher = spec.load()
    run = {"teacher": spec.model_dump(mode="json", exclude_none=True), "objective": {"guidance": 7.5}}
    (tmp_path / "run").mkdir()
    generator = Generator(teacher.player(LoraSpec(rank=2, alpha=2)), [1.0, 0.5])
    provenance = {"teacher": spec.path, "run": run}
    save_generator(tmp_path / "run" / "student.safetensors", generator, teacher.student_spec, provenance)

    session = Session([str(tmp_path / "run")])
    drawn = list(session.draw("a fox", 7, 2, 3))[-1]
    for place, model, more in ((0, tmp_path / "run", {}), (2, tmp_path / "sd15", {"evaluations": 3, "guidance": 7.5})):
        prompts = encode_prompts(str(model), ["a fox"])
        found = load_candidate(str(model), prompts=prompts, **more)
        wanted = next(generate(found.sampler, [7, 8], found.shape, found.conditioner, labels=torch.zeros(2).long()))
        for picture, image in zip(drawn[place], wanted, strict=True):
            assert picture.resize((16, 16), 0).tobytes() == image.permute(1, 2, 0).numpy().tobytes()


def test_an_imported_student_takes_prompts_although_none_are_prepared(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    shutil.copytree(ROOT / "tests" / "files-0.1.0", tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    session = Session(["lora-imported"])
    *_, (drawn, said, taught, _) = session.draw("a red square", 3, 1, 2)
    assert len(drawn) == len(taught) == 1 and said.startswith("2 network calls per image")
    prompts = encode_prompts("lora-imported", ["a red square"])
    found = load_candidate("lora-imported", prompts=prompts)
    wanted = next(generate(found.sampler, [3], found.shape, found.conditioner, labels=torch.zeros(1).long()))
    assert drawn[0].resize((16, 16), 0).tobytes() == wanted[0].permute(1, 2, 0).numpy().tobytes()
    with pytest.raises(SettingsError, match="half a character"):
        next(session.draw("a \ud800", 0, 1, 0))


def test_odd_values_and_large_files_get_an_answer_and_leave_no_traceback(folder, capfd):
    """What a program may send instead of the page."""
    page = make_page([str(folder / "run")])
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, max_file_size=UPLOAD)
    try:
        sent = [
            ["3", 0, 1, 0, 2],
            ["3", "abc", 1, 0, 2],
            ["3", 0, [1], 0, 2],
            ["none", 0, 1, 0, 2],
            [{}, 0, 1, 0, 2],
            ["3", float("nan"), 1, 0, 2],
            ["3", 0, 9, 0, 2],
            ["3", 0, 1, 0, 3],
            [],
            ["3"],
        ]
        answers = []
        for values in sent:
            asked = urllib.request.Request(
                f"{address}gradio_api/call/draw",
                json.dumps({"data": values}).encode(),
                {"Content-Type": "application/json"},
            )
            event = json.load(urllib.request.urlopen(asked))["event_id"]
            answers.append(urllib.request.urlopen(f"{address}gradio_api/call/draw/{event}").read().decode())
        assert "image.png" in answers[0]
        assert all("event: error" in answer and '"error": "' in answer for answer in answers[1:]), answers
        edge = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        upload = urllib.request.Request(
            f"{address}gradio_api/upload",
            edge + bytes(4 * UPLOAD) + b"\r\n--x--\r\n",
            {"Content-Type": "multipart/form-data; boundary=x"},
        )
        with pytest.raises(OSError):  # an HTTP status, or the connection closed in the middle
            urllib.request.urlopen(upload)
    finally:
        page.close()
    assert "Traceback" not in capfd.readouterr().err


def test_no_student_is_explained(tmp_path, capsys):
    with pytest.raises(SettingsError, match="must be a few-step student"):
        Session([str(tmp_path)])
    assert main(["ui", str(tmp_path)]) == 1 and "must be a few-step student" in capsys.readouterr().err


def test_a_student_of_points_has_no_page(tmp_path, capsys):
    run = tmp_path / "points"
    assert main(["distill", "mixture/sid", "--train.images", "256", "--out", str(run)]) == 0
    assert main(["ui", str(run)]) == 1
    assert "with samples of shape [2]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"no Chromium on this machine: none of {', '.join(BROWSERS)} is in PATH")
def test_the_page_in_a_browser(folder):
    from playwright import sync_api

    page = make_page([str(folder / "run")])
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    try:
        with sync_api.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(address)
            tab.get_by_role("button", name="Draw").click()
            tab.get_by_text("35 network calls per image").wait_for(timeout=60_000)
            tab.get_by_text("2 network calls per image").wait_for(timeout=10_000)
            assert tab.locator("img").count() >= 8
            browser.close()
    finally:
        page.close()
