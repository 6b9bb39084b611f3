"""Models side by side: one row each of metrics, speed and network calls, all made in one run with one protocol.

Rows are written as they are made, and a row whose model and protocol are already there is kept, so that an interrupted
evaluation goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from fewstep.data import AnyData, DataSpec, Prepared
from fewstep.diffusion.solvers import Churn
from fewstep.evaluation.features import Clip, extractor_for
from fewstep.evaluation.metrics import columns_of, notes_of, number, same, text_of
from fewstep.evaluation.protocols import find_protocol
from fewstep.evaluation.reference import METRICS, EvaluationError, Metric, check_metrics, find_reference, reference_for
from fewstep.evaluation.scorer import Scorer
from fewstep.formats.dmd2 import dmd2_file
from fewstep.formats.model import read_card, weights_sha256
from fewstep.students.sample import FewStep, ManyStep, SampleError, Sampler
from fewstep.students.student import find_student, load_student, pipeline_of
from fewstep.system import distributed
from fewstep.system.checkpoint import atomic_write
from fewstep.system.device import hardware
from fewstep.teachers import Conditioner, DiffusersTeacher, NativeTeacher
from fewstep.teachers.native import shipped_teachers
from fewstep.teachers.prompts import Prompts

__all__ = [
    "Candidate",
    "check_settings",
    "compare",
    "encode_prompts",
    "expand",
    "footnotes",
    "load_candidate",
    "table_of",
]

TEACHER_CALLS = 35  # of a teacher's sample, unless told


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
        EvaluationError: a setting that this model does not have or that makes no sense, or weights that are not finite.
    """
    check_settings(evaluations, guidance)
    if sigma_init is not None and not (isinstance(path, str) and _takes_sigma_init(path)):
        raise EvaluationError(f"`sigma_init` is for published one-step generators, got {path}. Try: leave it out")
    if isinstance(path, str) and (file := find_student(path, sigma_init)) is not None:
        if evaluations is not None or guidance is not None or churn is not None:
            raise EvaluationError(
                f"{path} is a few-step generator: evaluations, guidance and churn are a teacher's settings"
            )
        student = load_student(file, sigma_init, prompts, device)
        if prompts is not None and student.pipeline is None:
            raise EvaluationError(f"{path} takes no prompts: it is no text-to-image model. Try: leave --prompts out")
        student.conditioner.cond(None, 1)  # refuses a model without prompts before the real images are looked at
        _check_finite(path, student.generator)
        name, shape = Path(path).name if Path(path).is_dir() else file.stem, tuple(student.spec.net.sample_shape)
        sampler: Sampler = FewStep(student.generator.eval(), student.codec)
        return Candidate(name, sampler, shape, student.conditioner, weights_sha256(file), student.card)
    spec = _teacher(path, prompts) if isinstance(path, str) else path
    if prompts is not None and not isinstance(spec, DiffusersTeacher):
        raise EvaluationError(f"{path} takes no prompts: it is no text-to-image model. Try: leave --prompts out")
    teacher, calls = spec.load(), TEACHER_CALLS if evaluations is None else evaluations
    teacher.conditioner.cond(None, 1)  # as above
    _check_finite(spec.path, teacher.denoiser)
    place = Path(spec.path)
    of_a_run = place.name == "pipeline" and place.parent.name  # what pretraining leaves is named after the run
    name = place.parent.name if of_a_run else place.stem
    name += f", {calls} evaluation{'s' if calls > 1 else ''}"
    name += (f", guidance {guidance:g}" if guidance is not None else "") + (", stochastic" if churn else "")
    sampler = ManyStep(teacher.guided(guidance).to(device).eval(), calls, device, churn, teacher.codec)
    return Candidate(name, sampler, teacher.shape, teacher.conditioner, teacher.sha256, dict(teacher.card), guidance)


def _takes_sigma_init(path: str) -> bool:
    """Whether a path names a published generator whose file does not say at which noise level it is called."""
    return Path(path).suffix == ".pkl" or dmd2_file(Path(path)) is not None


def check_settings(evaluations: int | None, guidance: float | None) -> None:
    """Refuse a teacher's settings that make no sense.

    Raises:
        EvaluationError: fewer than one network call, or a scale that is negative or not finite.
    """
    if evaluations is not None and evaluations < 1:
        raise EvaluationError(f"`evaluations` must be at least 1, got {evaluations}. Try: {TEACHER_CALLS}")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise EvaluationError(f"`guidance` must be a number of at least 0, got {guidance}. Try: 7.5, or leave it out")


def _check_finite(path: str, module: nn.Module) -> None:
    """Refuse weights that would draw black pictures."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise EvaluationError(
                f"{path}: the weights are not finite (NaN or infinity in {name}), so that no sample could be scored. "
                "Try: an earlier checkpoint of its run, or fetch the file again"
            )


def _teacher(path: str, prompts: Path | None) -> NativeTeacher | DiffusersTeacher:
    """What a path names, if it is no student."""
    place = Path(path)
    if (place / "pipeline" / "model_index.json").exists():  # the run that trained a pipeline's network
        place = place / "pipeline"
        card = json.loads((place / "fewstep.json").read_bytes()) if (place / "fewstep.json").exists() else {}
        own = card.get("run", {}).get("pipeline", {}).get("prompts")
        prompts = prompts or (Path(own) if own else None)  # those it was trained with
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
    note: Callable[[str], None] = lambda text: None,
) -> list[Candidate]:
    """The models of a comparison: teachers first, at each number of evaluations, then the students.

    The teacher of each student is added from its card, under the guidance that the student was trained with unless told
    otherwise.

    Args:
        paths: see `load_candidate`.
        evaluations: network calls of teachers; empty: no teachers.
        device: where they run.
        sigma_init: see `load_candidate`.
        churn: see `load_candidate`.
        guidance: see `load_candidate`.
        prompts: see `load_candidate`.
        note: called with a text where the table lacks a row that a reader expects: a student's teacher that is not here.

    Raises:
        EvaluationError: nothing to score, a model named twice, or settings that no model of the comparison has.
    """
    if twice := [path for index, path in enumerate(paths) if path in paths[:index]]:
        raise EvaluationError(f"{twice[0]} is named twice. Try: each model once")
    if sigma_init is not None and not any(map(_takes_sigma_init, paths)):
        raise EvaluationError("`sigma_init` is for published one-step generators, none is named. Try: leave it out")
    students: list[Candidate] = []
    teachers: dict[tuple[str, float | None], str | DiffusersTeacher] = {}
    for path in paths:
        start = sigma_init if _takes_sigma_init(path) else None
        if find_student(path, start) is None:
            teachers[path, guidance] = path
            continue
        student = load_candidate(path, None, device, start, prompts=prompts)
        students.append(student)
        if not evaluations:
            continue
        named, run = student.card.get("teacher"), student.card.get("run") or {}
        learnt = (run.get("objective") or {}).get("guidance") if guidance is None else guidance
        if isinstance(named, str) and (named in shipped_teachers() or Path(named).exists()):
            pipeline = pipeline_of(student.card)
            if pipeline is not None and prompts is not None:
                pipeline = pipeline.model_copy(update={"prompts": prompts})
            teachers[named, learnt] = pipeline or named
        else:
            where = f"{named} is not on this machine" if named else "its file names none"
            note(f"{path}: no row of its teacher, {where}")
    if not evaluations and (named_too := [path for path, _ in teachers]):
        raise EvaluationError(
            f"`evaluations` 0 leaves teachers out, but {named_too[0]} is a teacher. Try: --evaluations {TEACHER_CALLS}"
        )
    for name, value in (("guidance", guidance), ("churn", churn)):
        if value is not None and not (teachers and evaluations):
            raise EvaluationError(f"`{name}` is a teacher's setting, and no teacher is scored. Try: leave it out")
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
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Score every candidate on the same number of samples of the same seeds.

    Args:
        candidates: what to score; all of one shape.
        samples: images of each.
        out: JSON file that keeps the rows. A row of the same model, sampled and measured in the same way, is not made again.
        protocol: a published one, see `fewstep.evaluation.protocols`: it says how many images there are, how they are brought to size and
            which metrics there are. What contradicts it is refused.
        reference: see `fewstep.evaluation.reference.find_reference`; None: what the first model's card names, else the images that it was
            trained beside.
        extractor: see `fewstep.evaluation.features.extractor_for`.
        metrics: which to compute.
        batch: images at a time.
        bf16: autocast the networks.
        repeat: score that many times, with other seeds each time; rows then hold means and spreads (SiD reports 10).
        clip: folder of a CLIP model: how well pictures agree with their captions, and how those of one caption differ.
        device: where they run.
        command: what the user typed, kept with the results.
        progress: called with a candidate's name and the images done of all candidates together.
        note: called with a text for each row that was not made again.

    Returns:
        One dict a candidate.

    Raises:
        EvaluationError: nothing to score, no reference or several, too few samples, models of different shapes, a results file
            that is none, or what contradicts the protocol.
        SampleError: samples of a model that are not finite.
    """
    if not candidates:
        raise EvaluationError("no model to score: name at least one student or teacher")
    published = find_protocol(protocol) if protocol else None
    if samples < 1 or repeat < 1:
        raise EvaluationError(f"{repeat} x {samples} samples measure nothing: make both at least 1")
    shapes = {candidate.picture_shape for candidate in candidates}
    if len(shapes) != 1:
        raise EvaluationError(
            f"models of different shapes {sorted(shapes)} cannot share a reference: evaluate them one by one"
        )
    shape = candidates[0].picture_shape
    if published is not None:
        for candidate in candidates:
            published.check(samples, shape, candidate.conditioner.num_classes, extractor)
    present = _read_results(out)
    name, data = _reference_of(candidates, reference, published is not None)
    judge = None
    if clip is not None:
        if silent := [candidate.name for candidate in candidates if not candidate.conditioner.names]:
            raise EvaluationError(f"{silent[0]} has no captions to agree with: leave --clip out")
        judge = Clip(clip, device) if published is None else published.clip.load(clip, device)
    measure = judge if judge and extractor == "clip" else extractor_for(shape, extractor, device)
    check_metrics(metrics, measure, samples)
    side, patches = None, None
    if published is not None:
        stats, measure, patches = published.measures(str(name), measure)
        side = published.side
    elif data is not None:
        stats = reference_for(data.load(), measure)
    else:
        stats = find_reference(str(name), measure, shape)
    scorer = Scorer(stats, measure, samples, tuple(metrics), batch, bf16, repeat, judge, side, patches)
    about = {
        "command": command,
        "hardware": hardware(distributed.world_size()),
        "date": date.today().isoformat(),
        "seeds": f"0..{repeat * samples - 1}",
    }
    rows: list[dict[str, Any]] = []
    for index, candidate in enumerate(candidates):
        key = _key(candidate, scorer)
        row = next((old for old in present if same(old, key)), None)
        if row is not None:
            made = " by ".join(str(row[entry]) for entry in ("date", "command") if row.get(entry))
            note(f"{candidate.name}: kept from {out}, made {made}")
        else:
            try:
                scores = scorer.score(
                    candidate.sampler, candidate.shape, candidate.conditioner, device,
                    progress=lambda done, name=candidate.name, before=index * samples * repeat: progress(name, before + done),
                )  # fmt: skip
            except SampleError as error:
                raise SampleError(f"{candidate.name}: {error}") from None
            speed = round(scorer.images_per_second, 2)
            row = {"name": candidate.name, **scores, **key, "images_per_second": speed, **about}
        rows.append(row)
        if out is not None and distributed.rank() == 0:
            others = [old for old in present if not any(same(old, row) for row in rows)]
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(out, json.dumps({"rows": others + rows}, indent=2))
    return rows


def _key(candidate: Candidate, scorer: Scorer) -> dict[str, Any]:
    """Everything that changes the numbers of a row, under the names of `fewstep.evaluation.metrics.IDENTITY`."""
    sampler, conditioner = candidate.sampler, candidate.conditioner
    key: dict[str, Any] = {
        "sha256": candidate.sha256,
        "calls": sampler.calls,
        "protocol": f"{scorer.reference.id}/{scorer.samples}/{scorer.seen}",
        "precision_of_networks": "bf16" if scorer.bf16 else "fp32",
        "metrics": list(scorer.metrics),
        **scorer.identity,
    }
    if isinstance(sampler, FewStep):
        key["times"] = list(sampler.generator.times)  # a published generator's level is not in its file
    if isinstance(sampler, ManyStep) and sampler.churn:
        # as JSON has it, which knows no infinity
        key["churn"] = [value if math.isfinite(value) else str(value) for value in sampler.churn]
    if candidate.guidance is not None:
        key["guidance"] = candidate.guidance
    if scorer.repeat > 1:
        key["repeat"] = scorer.repeat
    if isinstance(conditioner, Prompts):
        key["prompts"] = conditioner.sha256[:8]
    if sampler.codec is not None:
        key["codec"] = sampler.codec.sha256[:8]
    return key


def _read_results(out: Path | None) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no such file yet."""
    if out is None or not out.exists():
        return []
    way_out = "Try: another --out, or remove it"
    if out.is_dir():
        raise EvaluationError(f"`out` must be a file, {out} is a folder. Try: {out / 'results.json'}")
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(
            f"{out} is not a file of results: it cannot be read as JSON ({error}). {way_out}"
        ) from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(f"{out} is not a file of results: it has no list `rows`. {way_out}")
    return rows


def _reference_of(
    candidates: Sequence[Candidate], reference: str | None, published: bool
) -> tuple[str | None, AnyData | None]:
    """What all models are compared with: what was asked for, else what their cards name, else their images of training."""
    if reference is not None:
        return reference, None
    give = "give --reference with an .npz file, a folder or .zip of images, or fashion-mnist"
    if published:  # its images are never those of training
        raise EvaluationError("no reference to compare with: give --reference with the folder of the protocol's images")
    named = list(dict.fromkeys(str(c.card["reference"]) for c in candidates if c.card.get("reference")))
    data: list[AnyData] = []
    for candidate in candidates:
        if not named and (found := _data_of(candidate.card)) is not None and found not in data:
            data.append(found)
    if len(named) > 1 or len(data) > 1:
        several = named if len(named) > 1 else [json.dumps(found.model_dump(mode="json")) for found in data]
        raise EvaluationError(f"the models name different references ({', '.join(several)}): {give}")
    if not named and not data:
        raise EvaluationError(f"no reference to compare with: {give}")
    return (named[0], None) if named else (None, data[0])


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Rows of `compare` as headers and cells for a terminal; metrics that no row has are left out.

    The name of a row that has warnings ends in a mark, which `footnotes` explains.
    """
    columns, marks = columns_of(rows), _marks(rows)
    return (
        ["model", "calls", *(column.header for column in columns)],
        [
            [
                row["name"] + "".join(f" [{marks[text]}]" for text in notes_of(row)),
                str(row["calls"]),
                *(text_of(row, column) or "-" for column in columns),
            ]
            for row in rows
        ],
    )


def footnotes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What stands below the table: warnings by their marks, then every protocol that its numbers were measured under."""
    lines = [f"[{mark}] warning: {text}" for text, mark in _marks(rows).items()]
    under: dict[str, list[str]] = {}
    for column in columns_of(rows):
        for row in rows:
            if number(row.get(column.key)) is not None and row.get(column.under):
                headers = under.setdefault(f"{row[column.under]}", [])
                headers += [column.header] if column.header not in headers else []
    only = len(under) == 1
    return lines + [
        f"protocol: {name}" if only else f"protocol of {', '.join(of)}: {name}" for name, of in under.items()
    ]


def _marks(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """A number for each text of warning."""
    texts = dict.fromkeys(text for row in rows for text in notes_of(row))
    return {text: mark for mark, text in enumerate(texts, 1)}
