"""Web page to try a student: prompt or class, seed, student next to teacher with their times. Needs the extra `ui`.

Built on Gradio. It uses the candidates of `fewstep.evaluation.compare`, so a picture equals that of `fewstep sample` with the
same seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from fewstep.diffusion.denoiser import Guided
from fewstep.evaluation.candidates import TEACHER_CALLS, Candidate, expand
from fewstep.students.sample import ManyStep, generate
from fewstep.students.student import find_student, pipeline_of
from fewstep.system.errors import SettingsError
from fewstep.teachers.prompts import Prompts

__all__ = ["make_page"]

LARGEST = 8  # pictures per press of the button


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
        if find_student(path) is None:
            raise SettingsError(
                f"STUDENT must be a few-step student, got {path}. Try: the folder of a `fewstep distill` run with a checkpoint"
            )
        self.device = device
        *teachers, self.student = expand([path], [TEACHER_CALLS], device)
        self.teacher = teachers[0] if teachers else None
        if self.student.sampler.codec is None and len(self.student.shape) != 3:
            raise SettingsError(
                f"STUDENT must draw pictures, got {path} with samples of shape {list(self.student.shape)}"
            )
        conditioner = self.student.conditioner
        self.names = list(conditioner.names) or [str(index) for index in range(conditioner.num_classes)]
        self.encode: Callable[[str], Prompts] | None = None
        if isinstance(conditioner, Prompts) and (pipeline := pipeline_of(self.student.provenance)) is not None:
            encoder, constants = pipeline.encoder(device), conditioner.constants
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
        seeds = range(int(seed), int(seed) + min(int(count), LARGEST))
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
            denoiser = Guided(denoiser.denoiser, teacher.conditioner.null, denoiser.scale)
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
    with gradio.Blocks(title=f"fewstep: {session.student.name}") as page:
        gradio.Markdown(f"# {session.student.name}\n{about}")
        with gradio.Row():
            if session.encode:
                asked = gradio.Textbox(label="Prompt", value=session.names[0] if session.names else "")
            else:
                asked = gradio.Dropdown(["any", *session.names], value="any", label="Class")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            count = gradio.Slider(1, LARGEST, 4, step=1, label="Pictures")
            calls = gradio.Slider(0, 100, 35, step=1, label="Teacher's network calls (0: no teacher)")
            button = gradio.Button("Draw", variant="primary")
        with gradio.Row():
            with gradio.Column():
                student = gradio.Gallery(label="Student", columns=4, object_fit="contain", height="auto")
                student_said = gradio.Markdown()
            with gradio.Column():
                teacher = gradio.Gallery(label="Teacher", columns=4, object_fit="contain", height="auto")
                teacher_said = gradio.Markdown()
        button.click(session.draw, [asked, seed, count, calls], [student, student_said, teacher, teacher_said])
    return page


def _shown(picture: torch.Tensor) -> Image.Image:
    """Convert uint8 [C, H, W] to an image, enlarged if it is small."""
    array = picture.permute(1, 2, 0).squeeze(-1).numpy()
    image = Image.fromarray(array)
    factor = max(1, 128 // min(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
