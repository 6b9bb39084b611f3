"""Comparison of models: one row each of metrics, speed and network calls, all measured with one protocol.

Rows are written as they are measured, and existing rows with the same model and protocol are kept, so an interrupted
evaluation resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from fewstep.data import DataSpec
from fewstep.evaluation.candidates import Candidate, data_of
from fewstep.evaluation.features import Clip, ExtractorName, extractor_for
from fewstep.evaluation.metrics import METRICS, Metric, columns_of, notes_of, number, same, text_of
from fewstep.evaluation.probe import Look, compared, look, outside, probe_set
from fewstep.evaluation.protocols import find_protocol
from fewstep.evaluation.reference import find_reference, reference_for
from fewstep.evaluation.scorer import Scorer
from fewstep.evaluation.scores import check_metrics
from fewstep.students.sample import FewStep, ManyStep, generate
from fewstep.system import distributed
from fewstep.system.bounds import read_json
from fewstep.system.device import hardware
from fewstep.system.errors import EvaluationError, FileError, SettingsError
from fewstep.system.files import atomic_write
from fewstep.teachers.prompts import Prompts

__all__ = ["compare", "footnotes", "table_of"]


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
    """Score every candidate on the same number of samples from the same seeds.

    Args:
        candidates: models to score; all of one shape.
        samples: images per model.
        out: JSON file of the rows. A row of the same model, sampled and measured in the same way, is kept.
        protocol: a published protocol (`fewstep.evaluation.protocols`), which sets the number and size of images and the
            metrics. Contradicting settings are refused.
        reference: see `fewstep.evaluation.reference.find_reference`; None: the reference in the first model's provenance, else
            its training images.
        extractor: see `fewstep.evaluation.features.extractor_for`.
        metrics: metrics to compute.
        batch: images per batch.
        bf16: autocast the networks.
        repeat: number of scorings with different seeds; rows then hold means and spreads (SiD reports 10).
        clip: folder of a CLIP model, for CLIP score, retrieval and diversity.
        device: the models' device.
        command: the user's command line, stored with the results.
        progress: called with a candidate's name and the images done of all candidates together.
        note: called with a text for each kept row.

    Returns:
        One dict per candidate.

    Raises:
        EvaluationError: nothing to score, no reference or several, too few samples, models of different shapes, an invalid
            results file, or settings that contradict the protocol.
        SettingsError: samples of a model that are not finite.
    """
    if not candidates:
        raise EvaluationError("at least one student or teacher must be given, got none")
    published = find_protocol(protocol) if protocol else None
    if samples < 1 or repeat < 1:
        raise EvaluationError(f"`repeat` and `samples` must be at least 1, got {repeat} and {samples}")
    shapes = {candidate.picture_shape for candidate in candidates}
    if len(shapes) != 1:
        raise EvaluationError(
            f"models must have one shape to share a reference, got {sorted(shapes)}. Try: evaluate them one by one"
        )
    shape = candidates[0].picture_shape
    if published is not None:
        for candidate in candidates:
            published.check(samples, shape, candidate.conditioner.num_classes, extractor)
    present = _read_results(out)
    name, data = _reference_of(candidates, reference, published is not None)
    clip_model = None
    if clip is not None:
        if unnamed := [candidate.name for candidate in candidates if not candidate.conditioner.names]:
            raise EvaluationError(
                f"`clip` must be given for models with captions only, got {unnamed[0]}. Try: leave it out"
            )
        clip_model = Clip(clip, device) if published is None else published.clip.load(clip, device)
    measure = (
        clip_model
        if clip_model and extractor == "clip"
        else extractor_for(shape, cast(ExtractorName, extractor), device)
    )
    check_metrics(metrics, measure, samples)
    side, patches = None, None
    if published is not None:
        stats, measure, patches = published.measures(str(name), measure)
        side = published.side
    elif data is not None:
        stats = reference_for(data.load(), measure)
    else:
        stats = find_reference(str(name), measure, shape)
    scorer = Scorer(stats, measure, samples, tuple(metrics), batch, bf16, repeat, clip_model, side, patches)
    about = {
        "command": command,
        "hardware": hardware(distributed.world_size()),
        "date": date.today().isoformat(),
        "seeds": f"0..{repeat * samples - 1}",
    }
    rows: list[dict[str, Any]] = []
    looks: dict[str, Look] = {}
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
                    progress=partial(_shifted, progress, candidate.name, index * samples * repeat),
                )  # fmt: skip
            except SettingsError as error:
                raise SettingsError(f"{candidate.name}: {error}") from None
            speed = round(scorer.images_per_second, 2)
            scores |= _beside_teacher(candidate, candidates, looks, device, bf16, scores)
            row = {"name": candidate.name, **scores, **key, "images_per_second": speed, **about}
        rows.append(row)
        if out is not None and distributed.rank() == 0:
            others = [old for old in present if not any(same(old, row) for row in rows)]
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(out, json.dumps({"rows": others + rows}, indent=2))
    return rows


PROBE = 64  # samples of student and teacher that are compared, as in a run's health


def _beside_teacher(
    candidate: Candidate,
    candidates: Sequence[Candidate],
    looks: dict[str, Look],
    device: torch.device | str,
    bf16: bool,
    scores: dict[str, Any],
) -> dict[str, Any]:
    """Diversity, chroma and sharpness of a student beside those of its own teacher, if that is scored, too; with warnings.

    Of a teacher that is there several times, the one with the most calls counts. `looks` keeps teachers' samples for the next
    student, by name.
    """
    own = candidate.provenance.get("teacher_sha256")
    teachers = [c for c in candidates if isinstance(c.sampler, ManyStep) and own and c.sha256 == own]
    if not isinstance(candidate.sampler, FewStep) or not teachers:
        return {}
    teacher = max(teachers, key=lambda found: found.sampler.calls)
    conditions, count, labels = probe_set(candidate.conditioner.num_classes, PROBE)

    def seen(model: Candidate) -> Look:
        samples = generate(
            model.sampler, range(count), model.shape, model.conditioner, labels=labels, batch=32, device=device, uint8=False,
            bf16=bf16,
        )  # fmt: skip
        return look(samples, conditions, True)

    if teacher.name not in looks:
        looks[teacher.name] = seen(teacher)
    found: dict[str, Any] = compared(seen(candidate), looks[teacher.name])
    said = [text for _, _, text in outside(found)]
    return {
        **found,
        "probe": f"pixels/{conditions}x{count // conditions}/{teacher.sampler.calls}",
        "warnings": [*scores.get("warnings", ()), *said],
    }


def _shifted(progress: Callable[[str, int], None], name: str, before: int, done: int) -> None:
    """Report samples of one model, added to those of the previous models."""
    progress(name, before + done)


def _key(candidate: Candidate, scorer: Scorer) -> dict[str, Any]:
    """Entries that determine the numbers of a row, under the names of `fewstep.evaluation.metrics.IDENTITY`."""
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
        key["times"] = list(sampler.generator.times)  # a published generator's file does not state its level
    if isinstance(sampler, ManyStep) and not sampler.solver.usual:
        if churn := sampler.solver.churn:
            # JSON has no infinity
            key["churn"] = [value if math.isfinite(value) else str(value) for value in churn]
        if not (plain := replace(sampler.solver, churn=None)).usual:
            key["sampler"] = str(plain)
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
    """Read the rows of a results file; empty if there is no such file yet."""
    if out is None or not out.exists():
        return []
    way_out = "Try: another --out, or remove it"
    if out.is_dir():
        raise EvaluationError(f"`out` must be a file, got the folder {out}. Try: {out / 'results.json'}")
    try:
        found = read_json(out)
    except FileError as error:
        raise EvaluationError(f"{out} is not a file of results: {error}. {way_out}") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(f"{out} is not a file of results: it has no list `rows`. {way_out}")
    return rows


def _reference_of(
    candidates: Sequence[Candidate], reference: str | None, published: bool
) -> tuple[str | None, DataSpec | None]:
    """Find the common reference: the given one, else the one in the models' files, else their training images."""
    if reference is not None:
        for candidate in [] if published else candidates:
            place = getattr(found := data_of(candidate.provenance), "path", None)
            if place is not None and Path(place).expanduser().resolve() == Path(reference).expanduser().resolve():
                return None, found  # the training images, cut and resized as they were
        return reference, None
    give = "Try: --reference with an .npz file, a folder or .zip of images, or fashion-mnist"
    if published:  # a protocol never uses the training images
        raise EvaluationError(
            "`--reference` must be given for a published protocol, got none. Try: the folder of its images"
        )
    named = list(dict.fromkeys(str(c.provenance["reference"]) for c in candidates if c.provenance.get("reference")))
    data: list[DataSpec] = []
    for candidate in candidates:
        if not named and (found := data_of(candidate.provenance)) is not None and found not in data:
            data.append(found)
    if len(named) > 1 or len(data) > 1:
        several = named if len(named) > 1 else [json.dumps(found.model_dump(mode="json")) for found in data]
        raise EvaluationError(f"the models must name one reference, got {', '.join(several)}. {give}")
    if not named and not data:
        raise EvaluationError(f"`--reference` must be given, because no model names one. {give}")
    return (named[0], None) if named else (None, data[0])


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Format rows of `compare` as headers and cells for a terminal; omits metrics that no row has.

    The name of a row with warnings ends in a mark, which `footnotes` explains.
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
    """Lines below the table: warnings by mark, then every protocol of its numbers."""
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
    """Number the distinct warnings."""
    texts = dict.fromkeys(text for row in rows for text in notes_of(row))
    return {text: mark for mark, text in enumerate(texts, 1)}
