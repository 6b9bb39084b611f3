"""Models side by side: one row each of metrics, speed and network calls, all made in one run with one protocol.

Rows are written as they are made, and a row whose model and protocol are already there is kept, so that an interrupted
evaluation goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from fewstep import distributed
from fewstep.checkpoint import atomic_write
from fewstep.data import AnyData, DataSpec, Prepared
from fewstep.device import hardware
from fewstep.evaluate import METRICS, EvaluationError, Metric, find_reference, reference_for
from fewstep.features import Clip, extractor_for
from fewstep.model import read_card, weights_sha256
from fewstep.protocols import find_protocol
from fewstep.sample import FewStep, ManyStep, Sampler
from fewstep.sampler import Churn
from fewstep.score import Scorer
from fewstep.student import find_student, load_student, pipeline_of
from fewstep.teachers import Conditioner, DiffusersTeacher, NativeTeacher
from fewstep.teachers.native import shipped_teachers
from fewstep.teachers.prompts import Prompts

__all__ = ["Candidate", "compare", "encode_prompts", "expand", "load_candidate", "table_of"]

_COLUMNS = (  # key, header, format
    ("fid", "FID", ".2f"),
    ("patch_fid", "patch FID", ".2f"),
    ("isc", "IS", ".2f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("clip_score", "CLIP", ".3f"),
    ("retrieval", "retrieval", ".3f"),
    ("diversity", "diversity", ".3f"),
    ("chroma", "chroma", ".3f"),
    ("images_per_second", "images/s", ",.0f"),
)


@dataclass(frozen=True)
class Candidate:
    """A model ready to make samples.

    Attributes:
        name: for tables.
        sampler: noise and conditions to samples.
        shape: of one sample.
        conditioner: labels -> conditions.
        sha256: of its weights.
        card: what its file says of it.
        guidance: a teacher's, if it is guided.
    """

    name: str
    sampler: Sampler
    shape: tuple[int, ...]
    conditioner: Conditioner
    sha256: str
    card: dict[str, Any]
    guidance: float | None = None

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Of what comes out: a decoded sample, if samples are decoded."""
        return self.sampler.codec.shape if self.sampler.codec else self.shape


def load_candidate(
    path: str | NativeTeacher | DiffusersTeacher,
    evaluations: int | None = None,
    device: torch.device | str = "cpu",
    sigma_init: float | None = None,
    churn: Churn | None = None,
    guidance: float | None = None,
    prompts: Path | None = None,
) -> Candidate:
    """A student or a teacher from a weights file, a run folder, a pipeline's folder, or a shipped teacher's name.

    Args:
        path: a teacher is sampled with EDM's solver, a student by its few calls. A teacher may also be given as the
            record that a run has of it.
        evaluations: network calls of a teacher's sample; None is 35. Not for students.
        device: where it runs.
        sigma_init: a .pkl file is a one-step generator, called at this noise level.
        churn: a teacher is sampled stochastically.
        guidance: scale of a teacher's classifier-free guidance. Not for students, who have learnt theirs.
        prompts: folder of prepared prompts, for text-to-image models; None: those the student was trained with.

    Raises:
        CheckpointError, EdmFileError, TeacherError: it cannot be found or read.
    """
    if isinstance(path, str) and (file := find_student(path, sigma_init)) is not None:
        if evaluations is not None or guidance is not None:
            raise EvaluationError(f"{path} is a few-step generator: evaluations and guidance are a teacher's settings")
        student = load_student(file, sigma_init, prompts, device)
        name, shape = Path(path).name if Path(path).is_dir() else file.stem, tuple(student.spec.net.sample_shape)
        sampler: Sampler = FewStep(student.generator.eval(), student.codec)
        return Candidate(name, sampler, shape, student.conditioner, weights_sha256(file), student.card)
    spec = _teacher(path, prompts) if isinstance(path, str) else path
    teacher, calls = spec.load(), evaluations or 35
    place = Path(spec.path)
    of_a_run = place.name == "pipeline" and place.parent.name  # what pretraining leaves is named after the run
    name = place.parent.name if of_a_run else place.stem
    name += f", {calls} evaluation{'s' if calls > 1 else ''}"
    name += (f", guidance {guidance:g}" if guidance else "") + (", stochastic" if churn else "")
    sampler = ManyStep(teacher.guided(guidance).to(device).eval(), calls, device, churn, teacher.codec)
    return Candidate(name, sampler, teacher.shape, teacher.conditioner, teacher.sha256, dict(teacher.card), guidance)


def _teacher(path: str, prompts: Path | None) -> NativeTeacher | DiffusersTeacher:
    """What a path names, if it is no student."""
    place = Path(path)
    if (place / "pipeline" / "model_index.json").exists():  # the run that trained a pipeline's network
        place = place / "pipeline"
    single_file = place.suffix == ".safetensors" and place.exists() and not place.with_suffix(".json").exists()
    if (place / "model_index.json").exists() or single_file:
        return DiffusersTeacher(path=str(place), prompts=prompts)
    return NativeTeacher(path=path)


def encode_prompts(path: str, prompts: Sequence[str], folder: Path, device: torch.device | str = "cpu") -> Path:
    """Prompts for a text-to-image teacher or student, encoded by its pipeline into `folder`; returns that folder.

    Raises:
        EvaluationError: the model takes no prompts.
        TeacherError: its pipeline is not where it was.
    """
    file = find_student(path)
    if file is None:
        teacher: NativeTeacher | DiffusersTeacher | None = _teacher(path, None)
    else:
        teacher = pipeline_of(read_card(file)) if file.suffix == ".safetensors" else None
    if not isinstance(teacher, DiffusersTeacher):
        raise EvaluationError(f"{path} takes no prompts: it is no text-to-image model")
    teacher.prepare(prompts, folder, teacher.encoder(device), torch.float32)
    return folder


def expand(
    paths: Sequence[str],
    evaluations: Sequence[int],
    device: torch.device | str = "cpu",
    sigma_init: float | None = None,
    churn: Churn | None = None,
    guidance: float | None = None,
    prompts: Path | None = None,
) -> list[Candidate]:
    """The models of a comparison: teachers first, at each number of evaluations, then the students.

    The teacher of each student is added from its card, where that names one that is found, under the guidance that the
    student was trained with unless told otherwise. `evaluations` empty: no teachers.
    """
    students: list[Candidate] = []
    teachers: dict[tuple[str, float | None], str | DiffusersTeacher] = {}
    for path in paths:
        if find_student(path, sigma_init) is None:
            teachers[path, guidance] = path
            continue
        student = load_candidate(path, None, device, sigma_init, prompts=prompts)
        students.append(student)
        named, run = student.card.get("teacher"), student.card.get("run") or {}
        learnt = guidance or (run.get("objective") or {}).get("guidance")
        if isinstance(named, str) and (named in shipped_teachers() or Path(named).exists()):
            pipeline = pipeline_of(student.card)
            if pipeline is not None and prompts is not None:
                pipeline = pipeline.model_copy(update={"prompts": prompts})
            teachers[named, learnt] = pipeline or named
    return [
        load_candidate(given, calls, device, churn=churn, guidance=scale, prompts=prompts)
        for (_, scale), given in teachers.items()
        for calls in evaluations
    ] + students


def _data_of(card: Mapping[str, Any]) -> AnyData | None:
    """The images that a student's run names, if they can be compared with as they are."""
    named = (card.get("run") or {}).get("data")
    found: AnyData | None = TypeAdapter(DataSpec).validate_python(named) if named else None
    return None if isinstance(found, Prepared) else found


def compare(
    candidates: Sequence[Candidate],
    samples: int,
    out: Path | None = None,
    *,
    protocol: str | None = None,
    reference: str | None = None,
    extractor: str = "auto",
    metrics: Sequence[Metric] = METRICS,
    batch: int = 250,
    bf16: bool = False,
    repeat: int = 1,
    clip: str | None = None,
    device: torch.device | str = "cpu",
    command: str = "",
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[dict[str, Any]]:
    """Score every candidate on the same number of samples of the same seeds.

    Args:
        candidates: what to score; all of one shape.
        samples: images of each.
        out: JSON file that keeps the rows.
        protocol: a published one, see `fewstep.protocols`: it says how images are brought to size and which metrics there are.
        reference: see `fewstep.evaluate.find_reference`; None: what the first model's card names, else the images that it was
            trained beside.
        extractor: see `fewstep.features.extractor_for`.
        metrics: which to compute.
        batch: images at a time.
        bf16: autocast the networks.
        repeat: score that many times, with other seeds each time; rows then hold means and spreads (SiD reports 10).
        clip: folder of a CLIP model: how well pictures agree with their captions, and how those of one caption differ.
        device: where they run.
        command: what the user typed, kept with the results.
        progress: called with a candidate's name and the images done of all candidates together.

    Returns:
        One dict a candidate.

    Raises:
        EvaluationError: no reference, no samples, or models of different shapes.
    """
    published = find_protocol(protocol) if protocol else None
    if samples < 1 or repeat < 1:
        raise EvaluationError(f"{repeat} x {samples} samples measure nothing: make both at least 1")
    shapes = {candidate.picture_shape for candidate in candidates}
    if len(shapes) != 1:
        raise EvaluationError(
            f"models of different shapes {sorted(shapes)} cannot share a reference: evaluate them one by one"
        )
    name = reference or next((str(c.card["reference"]) for c in candidates if c.card.get("reference")), None)
    data = None
    if name is None and published is None:  # a published protocol's images are never those of training
        data = next((found for c in candidates if (found := _data_of(c.card)) is not None), None)
    if name is None and data is None:
        raise EvaluationError(
            "no reference to compare with: give --reference with an .npz file, a folder or .zip of images, or fashion-mnist"
        )
    judge = None
    if clip is not None:
        if silent := [candidate.name for candidate in candidates if not candidate.conditioner.names]:
            raise EvaluationError(f"{silent[0]} has no captions to agree with: leave --clip out")
        judge = Clip(clip, device)
    shape = candidates[0].picture_shape
    measure = judge if judge and extractor == "clip" else extractor_for(shape, extractor, device)
    side, patches = None, None
    if published is not None and name is not None:
        if shape[1] < published.side:
            raise EvaluationError(
                f"{protocol} compares images of {published.side} pixels, the samples have {shape[1]}: leave --protocol out"
            )
        patches, measure, side = published.patches(name, measure), published.frame(measure), published.side
    if data is not None:
        stats = reference_for(data.load(), measure)
    else:
        stats = find_reference(str(name), measure, shape if side is None else (shape[0], side, side), side)
    scorer = Scorer(stats, measure, samples, tuple(metrics), batch, bf16, repeat, judge, side, patches)
    present = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    about = {
        "command": command,
        "hardware": hardware(distributed.world_size()),
        "precision_of_networks": "bf16" if bf16 else "fp32",
        "date": date.today().isoformat(),
        "seeds": f"0..{repeat * samples - 1}",
    }
    rows: list[dict[str, Any]] = []
    for index, candidate in enumerate(candidates):
        key = {
            "sha256": candidate.sha256,
            "calls": candidate.sampler.calls,
            "protocol": f"{stats.id}/{samples}/{scorer.seen}",
        }
        if isinstance(candidate.sampler, ManyStep) and candidate.sampler.churn:
            key["churn"] = list(candidate.sampler.churn)
        if candidate.guidance:
            key["guidance"] = candidate.guidance
        if repeat > 1:
            key["repeat"] = repeat
        if isinstance(candidate.conditioner, Prompts):
            key["prompts"] = candidate.conditioner.sha256[:8]
        if judge is not None:
            key["judge"] = f"{judge.name}-{judge.sha256[:8]}"
        row = next((old for old in present if _same(old, key)), None)
        if row is None:
            scores = scorer.score(
                candidate.sampler, candidate.shape, candidate.conditioner, device,
                progress=lambda done, name=candidate.name, before=index * samples * repeat: progress(name, before + done),
            )  # fmt: skip
            speed = round(scorer.images_per_second, 2)
            row = {"name": candidate.name, **scores, **key, "images_per_second": speed, **about}
        rows.append(row)
        if out is not None and distributed.rank() == 0:
            others = [old for old in present if not any(_same(old, row) for row in rows)]
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(out, json.dumps({"rows": others + rows}, indent=2))
    return rows


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of one model, sampled and measured in one way."""
    return all(
        row.get(key) == other.get(key)
        for key in ("sha256", "calls", "churn", "guidance", "repeat", "judge", "prompts", "protocol")
    )


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Rows of `compare` as headers and cells for a terminal; metrics that no row has are left out."""

    def cell(row: dict[str, Any], name: str, form: str) -> str:
        if row.get(name) is None:
            return "-"
        spread = f" ± {row[f'{name}_spread']:{form}}" if f"{name}_spread" in row else ""
        return format(row[name], form) + spread

    columns = [column for column in _COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    return (
        ["model", "calls", *(header for _, header, _ in columns)],
        [[row["name"], str(row["calls"]), *(cell(row, name, form) for name, _, form in columns)] for row in rows],
    )
