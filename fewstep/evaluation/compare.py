"""Models side by side: one row each of metrics, speed and network calls, all made in one run with one protocol.

Rows are written as they are made, and a row whose model and protocol are already there is kept, so that an interrupted
evaluation goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from fewstep.data import DataSpec
from fewstep.evaluation.candidates import Candidate, data_of
from fewstep.evaluation.features import Clip, ExtractorName, extractor_for
from fewstep.evaluation.metrics import METRICS, Metric, columns_of, notes_of, number, same, text_of
from fewstep.evaluation.protocols import find_protocol
from fewstep.evaluation.reference import find_reference, reference_for
from fewstep.evaluation.scorer import Scorer
from fewstep.evaluation.scores import check_metrics
from fewstep.students.sample import FewStep, ManyStep
from fewstep.system import distributed
from fewstep.system.device import hardware
from fewstep.system.errors import EvaluationError, SettingsError
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
    """Score every candidate on the same number of samples of the same seeds.

    Args:
        candidates: what to score; all of one shape.
        samples: images of each.
        out: JSON file that keeps the rows. A row of the same model, sampled and measured in the same way, is not made again.
        protocol: a published one, see `fewstep.evaluation.protocols`: it says how many images there are, how they are brought to size and
            which metrics there are. What contradicts it is refused.
        reference: see `fewstep.evaluation.reference.find_reference`; None: what the first model's provenance names, else the images that it was
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
        SettingsError: samples of a model that are not finite.
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
    clip_model = None
    if clip is not None:
        if silent := [candidate.name for candidate in candidates if not candidate.conditioner.names]:
            raise EvaluationError(f"{silent[0]} has no captions to agree with: leave --clip out")
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
            row = {"name": candidate.name, **scores, **key, "images_per_second": speed, **about}
        rows.append(row)
        if out is not None and distributed.rank() == 0:
            others = [old for old in present if not any(same(old, row) for row in rows)]
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(out, json.dumps({"rows": others + rows}, indent=2))
    return rows


def _shifted(progress: Callable[[str, int], None], name: str, before: int, done: int) -> None:
    """Report samples of one model, counted on from those of the models before it."""
    progress(name, before + done)


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
) -> tuple[str | None, DataSpec | None]:
    """Find the common reference: the one asked for, else the one that the models' files name, else their training images."""
    if reference is not None:
        return reference, None
    give = "give --reference with an .npz file, a folder or .zip of images, or fashion-mnist"
    if published:  # its images are never those of training
        raise EvaluationError("no reference to compare with: give --reference with the folder of the protocol's images")
    named = list(dict.fromkeys(str(c.provenance["reference"]) for c in candidates if c.provenance.get("reference")))
    data: list[DataSpec] = []
    for candidate in candidates:
        if not named and (found := data_of(candidate.provenance)) is not None and found not in data:
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
    """Write the lines below the table: warnings by their marks, then every protocol of its numbers."""
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
