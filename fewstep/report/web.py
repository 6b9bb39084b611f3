"""Web page to try students: prompt or class, seed, students next to their teacher with times, earlier pictures. Needs the extra `ui`.

Built on Gradio. It uses the candidates of `fewstep.evaluation.compare`, so a picture equals that of `fewstep sample` with the
same seed.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import Guided
from fewstep.evaluation.candidates import TEACHER_CALLS, Candidate, expand
from fewstep.formats.model import read_provenance
from fewstep.students.sample import FewStep, ManyStep, generate
from fewstep.students.student import find_student, pipeline_of
from fewstep.system.bounds import shown
from fewstep.system.console import note
from fewstep.system.errors import SettingsError, UserError
from fewstep.teachers.prompts import Prompts

__all__ = ["make_page", "serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")

LARGEST = 8  # pictures per press of the button
MOST_LETTERS = 2_000  # of a prompt; text encoders read some 500
MOST_CALLS = 100  # of the teacher
MOST_SEED = 2**53  # whole numbers of a browser
UPLOAD = 1 << 16  # bytes; the page takes no files
KEPT = 3600  # seconds that drawn pictures stay on the disk
QUEUE = 16  # visitors who wait
REMEMBERED = 32  # earlier pictures of a visitor


class Session:
    """Loaded students of one teacher, and that teacher if it is on this machine. Drawing reads no file.

    Args:
        paths: run folders or students' files; all of one shape, with the same classes or the same pipeline.
        device: device of all.

    Raises:
        SettingsError: no student, its samples are not pictures, or students that do not take the same.
        FileError, TeacherError, EvaluationError: as `fewstep.evaluation.candidates.expand`.
    """

    def __init__(self, paths: Sequence[str], device: torch.device | str = "cpu") -> None:
        pipelines = []
        for path in paths:
            if (file := find_student(path)) is None:
                raise SettingsError(
                    f"STUDENT must be a few-step student, got {path}. Try: the folder of a `fewstep distill` run with a checkpoint"
                )
            pipelines.append(pipeline_of(read_provenance(file)) if file.suffix == ".safetensors" else None)
        self.device, pipeline = device, pipelines[0]
        if len({found and found.path for found in pipelines}) > 1:
            raise SettingsError(
                f"students of one page must have one base model, got {', '.join(paths)}. Try: a page for each"
            )
        encoder = pipeline.encoder(device) if pipeline is not None else None
        unprepared = pipeline is not None and (pipeline.prompts is None or not pipeline.prompts.exists())
        # an imported student has no prompts to be loaded with
        first = pipeline.encode(["a picture"], encoder) if pipeline and encoder and unprepared else None
        found = expand(paths, [TEACHER_CALLS], device, prompts=first)
        self.students, teachers = found[-len(paths) :], found[: -len(paths)]
        self.teacher = teachers[0] if teachers else None
        if len(teachers) > 1:  # of another guidance or other weights
            note(
                f"the page shows the teacher {teachers[0].name} alone, not {', '.join(model.name for model in teachers[1:])}"
            )
        for path, student in zip(paths, self.students, strict=True):
            if student.sampler.codec is None and len(student.shape) != 3:
                raise SettingsError(
                    f"STUDENT must draw pictures, got {path} with samples of shape {list(student.shape)}"
                )
        one = self.students[0]
        for path, other in zip(paths[1:], self.students[1:], strict=True):
            if (other.shape, _names(other)) != (one.shape, _names(one)):
                raise SettingsError(
                    f"students of one page must have one shape and the same classes, got {paths[0]} and {path}. Try: a page for each"
                )
        self.names = _names(one)
        self.most_steps = max(student.sampler.calls for student in self.students)
        self.encode: Callable[[str], Prompts] | None = None
        if isinstance(one.conditioner, Prompts) and pipeline is not None and encoder is not None:
            constants = one.conditioner.constants
            self.encode = lambda prompt: pipeline.encode([prompt], encoder).with_constants(constants)

    def draw(
        self, asked: str, seed: int, count: int, evaluations: int, steps: int | None = None
    ) -> Iterator[list[Any]]:
        """Draw the pictures of each student in turn, then the teacher's (none with 0 evaluations).

        Args:
            asked: a prompt, or a class's name ("" for any).
            seed: seed of the first picture; the others follow.
            count: number of pictures.
            evaluations: network calls of the teacher.
            steps: calls after which a student's sample is shown, if it has more; None: all of its calls.

        Yields:
            Pictures and text of every student and last of the teacher, flat; once per model.
        """
        seed, count, evaluations = (
            _whole(seed, MOST_SEED),
            max(1, _whole(count, LARGEST)),
            _whole(evaluations, MOST_CALLS),
        )
        steps = self.most_steps if steps is None else max(1, _whole(steps, self.most_steps))
        if not isinstance(asked, str) or len(asked) > MOST_LETTERS:
            raise SettingsError(f"the prompt must be a text of at most {MOST_LETTERS:,} letters. Try: a shorter one")
        if any("\ud800" <= letter <= "\udfff" for letter in asked):
            raise SettingsError("the prompt holds half a character, which no tokenizer reads. Try: type it again")
        seeds = range(seed, seed + count)
        teacher, prompts, labels = self.teacher, None, None
        if self.encode is not None:
            labels, prompts = torch.zeros(len(seeds), dtype=torch.int64), self.encode(asked)
            teacher = replace(teacher, conditioner=prompts) if teacher else None
        elif asked in self.names:
            labels = torch.full((len(seeds),), self.names.index(asked))
        view: list[Any] = [[], "waits"] * len(self.students) + [[], "no teacher"]
        if evaluations:
            view[-1] = (
                "waits"
                if teacher
                else f"the teacher {self.students[0].provenance.get('teacher')} is not on this machine"
            )
        for index, student in enumerate(self.students):
            drawn, said = self._timed(
                _after(replace(student, conditioner=prompts) if prompts else student, steps), seeds, labels
            )
            most = student.sampler.calls
            said = f"after {steps} of its {most} calls: {said}" if steps < most else said
            view[2 * index : 2 * index + 2] = drawn, said
            if index == len(self.students) - 1 and teacher and evaluations:
                view[-1] = "the teacher is drawing"
            yield list(view)
        if not evaluations or teacher is None:
            return
        assert isinstance(teacher.sampler, ManyStep)
        denoiser = teacher.sampler.denoiser
        if isinstance(denoiser, Guided):  # guide away from the empty prompt that was encoded with this prompt
            denoiser = Guided(denoiser.denoiser, teacher.conditioner.null, denoiser.rule)
        sampler = ManyStep(denoiser, int(evaluations), self.device, codec=teacher.sampler.codec)
        yield [*view[:-2], *self._timed(replace(teacher, sampler=sampler), seeds, labels)]

    def _timed(self, model: Candidate, seeds: range, labels: torch.Tensor | None) -> tuple[list[Any], str]:
        started = time.perf_counter()
        pictures = torch.cat(
            list(
                generate(
                    model.sampler, seeds, model.shape, model.conditioner, labels=labels, device=self.device, local=True
                )
            )
        )
        spent = time.perf_counter() - started
        calls = f"{model.sampler.calls} network call{'s' if model.sampler.calls > 1 else ''}"
        return [_shown(picture) for picture in pictures], f"{calls} per image, {spent / len(seeds):.3f} s per image"


def _names(student: Candidate) -> list[str]:
    return list(student.conditioner.names) or [str(index) for index in range(student.conditioner.num_classes)]


def _after(student: Candidate, steps: int) -> Candidate:
    """Show a student's sample after its first calls: the network's estimate of the picture there."""
    sampler = student.sampler
    if not isinstance(sampler, FewStep) or steps >= sampler.calls:
        return student
    generator = sampler.generator
    return replace(
        student,
        sampler=FewStep(Generator(generator.denoiser, generator.times[:steps], generator.transition), sampler.codec),
    )


def make_page(paths: Sequence[str], device: torch.device | str = "cpu") -> Any:
    """Build the page, ready to `launch()`.

    Raises:
        SettingsError: no student, or Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise SettingsError("the page needs Gradio: pip install 'fewstep[ui]'") from None
    session = Session(paths, device)
    names = [student.name for student in session.students]

    class Page(gradio.Blocks):
        """Values of other types, as programs may send them, give a message instead of a traceback on the server."""

        async def preprocess_data(self, *given: Any, **more: Any) -> Any:
            try:
                return await super().preprocess_data(*given, **more)
            except (gradio.Error, ValueError) as error:
                said = shown(str(error.args[0] if error.args else error), quote=False)
                raise gradio.Error(said, print_exception=False) from None

    def gallery(label: str, columns: int = 2) -> Any:  # four would be cut on a phone, and beside others
        return gradio.Gallery(
            label=label,
            columns=columns,
            object_fit="contain",
            height="auto",
            format="png",
            buttons=["download", "download_all", "fullscreen"],
        )

    with Page(title=f"fewstep: {', '.join(names)}", delete_cache=(KEPT, KEPT)) as page:
        taught = session.students[0].provenance.get("teacher")
        gradio.Markdown(f"# {', '.join(names)}\n" + (f"distilled from {taught}" if taught else ""))
        with gradio.Row():
            if session.encode:
                first = session.names[0][:MOST_LETTERS] if session.names else ""
                asked = gradio.Textbox(label="Prompt", value=first, max_length=MOST_LETTERS)
            else:
                asked = gradio.Dropdown(["any", *session.names], value="any", label="Class")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            count = gradio.Slider(1, LARGEST, 4, step=1, label="Pictures")
        with gradio.Row():
            calls = gradio.Slider(0, MOST_CALLS, TEACHER_CALLS, step=1, label="Teacher's network calls (0: no teacher)")
            steps = gradio.Slider(
                1, session.most_steps, session.most_steps, step=1, label="Student's network calls (fewer: its estimate so far)",
                visible=session.most_steps > 1,
            )  # fmt: skip
            button = gradio.Button("Draw", variant="primary")
        outputs = []
        with gradio.Row():
            for student in session.students:
                with gradio.Column(min_width=320):
                    outputs += [gallery(f"Student {student.name}" if len(names) > 1 else "Student"), gradio.Markdown()]
            with gradio.Column(min_width=320):
                outputs += [gallery("Teacher"), gradio.Markdown()]
        with gradio.Accordion("Earlier pictures", open=False):
            earlier = gallery("Of the students, the newest first", 4)
        past = gradio.State([])

        def draw(asked: Any, seed: Any, count: Any, calls: Any, steps: Any, past: list[Any]) -> Iterator[Any]:
            found: list[Any] = []
            try:
                for found in session.draw(asked, seed, count, calls, steps):
                    yield *found, past, past
            except UserError as error:  # shown in the page, without a traceback on the server
                raise gradio.Error(str(error), print_exception=False) from None
            fresh = [
                (picture, f"{name}: {shown(asked, quote=False)}, seed {seed + place}")
                for name, pictures in zip(names, found[: 2 * len(names) : 2], strict=True)
                for place, picture in enumerate(pictures)
            ]
            kept = [*fresh, *past][:REMEMBERED]
            yield *found, kept, kept

        button.click(draw, [asked, seed, count, calls, steps, past], [*outputs, earlier, past])
    return page.queue(max_size=QUEUE)


def serve(page: Any, host: str, port: int | None, password: str | None) -> None:
    """Serve the page until it is stopped. Other machines must give the password, with any user's name.

    Raises:
        SettingsError: `host` is not this machine alone, and there is no password.
    """
    if host not in LOOPBACK and not password:
        raise SettingsError(
            f"--host must be 127.0.0.1 without a password, got {host}, which lets other machines use this one. Try: set the "
            "environment variable FEWSTEP_UI_PASSWORD"
        )
    page.launch(
        server_name=host, server_port=port, max_file_size=UPLOAD,
        auth=(lambda name, given: hmac.compare_digest(given.encode(), password.encode())) if password else None,
    )  # fmt: skip


def _whole(value: Any, most: int) -> int:
    """Return a number of the page; its controls keep to the range, other programs may not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or value != int(value):
        raise SettingsError(f"a number of the page must be whole and between 0 and {most:,}, got {shown(value)}")
    return int(value)


def _shown(picture: torch.Tensor) -> Image.Image:
    """Convert uint8 [C, H, W] to an image, enlarged if it is small."""
    array = picture.permute(1, 2, 0).squeeze(-1).numpy()
    image = Image.fromarray(array)
    factor = max(1, 128 // min(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
