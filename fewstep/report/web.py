"""Web page to try a student: prompt or class, seed, student next to teacher with their times. Needs the extra `ui`.

Built on Gradio. It uses the candidates of `fewstep.evaluation.compare`, so a picture equals that of `fewstep sample` with the
same seed.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from fewstep.diffusion.guidance import Guided
from fewstep.evaluation.candidates import TEACHER_CALLS, Candidate, expand
from fewstep.formats.model import read_provenance
from fewstep.students.sample import ManyStep, generate
from fewstep.students.student import find_student, pipeline_of
from fewstep.system.bounds import shown
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


class Session:
    """A loaded student, and its teacher if it is on this machine. Drawing reads no file.

    Args:
        path: a run folder or a student's file.
        device: device of both.

    Raises:
        SettingsError: no student, or its samples are not pictures.
        FileError, TeacherError: as `fewstep.evaluation.candidates.expand`.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        if (file := find_student(path)) is None:
            raise SettingsError(
                f"STUDENT must be a few-step student, got {path}. Try: the folder of a `fewstep distill` run with a checkpoint"
            )
        self.device = device
        pipeline = pipeline_of(read_provenance(file)) if file.suffix == ".safetensors" else None
        encoder = pipeline.encoder(device) if pipeline is not None else None
        unprepared = pipeline is not None and (pipeline.prompts is None or not pipeline.prompts.exists())
        # an imported student has no prompts to be loaded with
        first = pipeline.encode(["a picture"], encoder) if pipeline and encoder and unprepared else None
        *teachers, self.student = expand([path], [TEACHER_CALLS], device, prompts=first)
        self.teacher = teachers[0] if teachers else None
        if self.student.sampler.codec is None and len(self.student.shape) != 3:
            raise SettingsError(
                f"STUDENT must draw pictures, got {path} with samples of shape {list(self.student.shape)}"
            )
        conditioner = self.student.conditioner
        self.names = list(conditioner.names) or [str(index) for index in range(conditioner.num_classes)]
        self.encode: Callable[[str], Prompts] | None = None
        if isinstance(conditioner, Prompts) and pipeline is not None and encoder is not None:
            constants = conditioner.constants
            self.encode = lambda prompt: pipeline.encode([prompt], encoder).with_constants(constants)

    def draw(
        self, asked: str, seed: int, count: int, evaluations: int
    ) -> Iterator[tuple[list[Any], str, list[Any], str]]:
        """Draw the student's pictures, then the teacher's (none with 0 evaluations).

        Args:
            asked: a prompt, or a class's name ("" for any).
            seed: seed of the first picture; the others follow.
            count: number of pictures.
            evaluations: network calls of the teacher.

        Yields:
            Pictures and text of the student, pictures and text of the teacher; once per model.
        """
        seed, count, evaluations = (
            _whole(seed, MOST_SEED),
            max(1, _whole(count, LARGEST)),
            _whole(evaluations, MOST_CALLS),
        )
        if not isinstance(asked, str) or len(asked) > MOST_LETTERS:
            raise SettingsError(f"the prompt must be a text of at most {MOST_LETTERS:,} letters. Try: a shorter one")
        if any("\ud800" <= letter <= "\udfff" for letter in asked):
            raise SettingsError("the prompt holds half a character, which no tokenizer reads. Try: type it again")
        seeds = range(seed, seed + count)
        student, teacher, labels = self.student, self.teacher, None
        if self.encode is not None:
            labels, prompts = torch.zeros(len(seeds), dtype=torch.int64), self.encode(asked)
            student = replace(student, conditioner=prompts)
            teacher = replace(teacher, conditioner=prompts) if teacher else None
        elif asked in self.names:
            labels = torch.full((len(seeds),), self.names.index(asked))
        drawn, said = self._timed(student, seeds, labels)
        yield drawn, said, [], "the teacher is drawing" if evaluations else "no teacher"
        if not evaluations:
            return
        if teacher is None:
            yield drawn, said, [], f"the teacher {student.provenance.get('teacher')} is not on this machine"
            return
        assert isinstance(teacher.sampler, ManyStep)
        denoiser = teacher.sampler.denoiser
        if isinstance(denoiser, Guided):  # guide away from the empty prompt that was encoded with this prompt
            denoiser = Guided(denoiser.denoiser, teacher.conditioner.null, denoiser.rule)
        sampler = ManyStep(denoiser, int(evaluations), self.device, codec=teacher.sampler.codec)
        yield drawn, said, *self._timed(replace(teacher, sampler=sampler), seeds, labels)

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


def make_page(path: str, device: torch.device | str = "cpu") -> Any:
    """Build the page, ready to `launch()`.

    Raises:
        SettingsError: no student, or Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise SettingsError("the page needs Gradio: pip install 'fewstep[ui]'") from None
    session = Session(path, device)
    about = (
        f"{session.student.sampler.calls} call(s) per image, distilled from {session.student.provenance.get('teacher')}"
    )

    class Page(gradio.Blocks):
        """Values of other types, as programs may send them, give a message instead of a traceback on the server."""

        async def preprocess_data(self, *given: Any, **more: Any) -> Any:
            try:
                return await super().preprocess_data(*given, **more)
            except (gradio.Error, ValueError) as error:
                said = shown(str(error.args[0] if error.args else error), quote=False)
                raise gradio.Error(said, print_exception=False) from None

    with Page(title=f"fewstep: {session.student.name}", delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown(f"# {session.student.name}\n{about}")
        with gradio.Row():
            if session.encode:
                first = session.names[0][:MOST_LETTERS] if session.names else ""
                asked = gradio.Textbox(label="Prompt", value=first, max_length=MOST_LETTERS)
            else:
                asked = gradio.Dropdown(["any", *session.names], value="any", label="Class")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            count = gradio.Slider(1, LARGEST, 4, step=1, label="Pictures")
            calls = gradio.Slider(0, MOST_CALLS, 35, step=1, label="Teacher's network calls (0: no teacher)")
            button = gradio.Button("Draw", variant="primary")
        with gradio.Row():
            with gradio.Column():
                student = gradio.Gallery(label="Student", columns=4, object_fit="contain", height="auto")
                student_said = gradio.Markdown()
            with gradio.Column():
                teacher = gradio.Gallery(label="Teacher", columns=4, object_fit="contain", height="auto")
                teacher_said = gradio.Markdown()

        def draw(*given: Any) -> Iterator[Any]:
            try:
                yield from session.draw(*given)
            except UserError as error:  # shown in the page, without a traceback on the server
                raise gradio.Error(str(error), print_exception=False) from None

        button.click(draw, [asked, seed, count, calls], [student, student_said, teacher, teacher_said])
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
