"""`fewstep tune-sampler` and `benchmark`: a teacher's best sampler at each number of calls, and methods raced on one teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from fewstep.cli.options import (
    COUNT,
    GUIDANCE,
    NAMES,
    PATH,
    STEPS,
    TEXT,
    Batch,
    Device,
    Imports,
    Line,
    Processes,
    about,
    bring,
    count_processes,
    several,
)

__all__ = ["benchmark", "tune_sampler"]


def tune_sampler(
    teacher: Positional[
        Annotated[
            str, about("a run folder of `fewstep pretrain`, a file, a pipeline or a shipped teacher", metavar="TEACHER")
        ]
    ],
    calls: Annotated[Sequence[int], STEPS, about("numbers of network calls")] = (35, 18, 9, 5, 4, 2, 1),
    samples: Annotated[int, COUNT, about("images per sampler; a quarter in the coarse search")] = 2_000,
    reference: Annotated[
        str | None,
        TEXT,
        about(
            "images to choose by, never the test set: statistics .npz, a folder or a .zip",
            "a seeded sixth of the teacher's training images, at most 10,000",
            "PATH",
        ),
    ] = None,
    extractor: Annotated[str, about("auto, inception, clip, small or pixels", metavar="NAME")] = "auto",
    guidance: Annotated[float | None, GUIDANCE, about("classifier-free guidance", "none")] = None,
    prompts: Annotated[
        Path | None, PATH, about("prepared prompts of a text-to-image teacher", "its own", "FOLDER")
    ] = None,
    out: Annotated[
        Path | None,
        PATH,
        about("file to write; `--sampler best` reads the default alone", "beside the teacher", "FILE"),
    ] = None,
    batch: Batch = 250,
    device: Device = "auto",
    processes: Processes = "auto",
    imports: Imports = (),
    line: Line = (),
) -> int:
    """Find a teacher's best sampler at each number of network calls, for `--sampler best`.

    The same command resumes. Tries are kept in the file, so further numbers of calls can be added.
    """
    from typing import cast

    from fewstep.evaluation.candidates import check_finite, data_of, find_teacher
    from fewstep.evaluation.features import ExtractorName, extractor_for
    from fewstep.evaluation.reference import find_reference, reference_for
    from fewstep.evaluation.scorer import Scorer
    from fewstep.evaluation.tuning import FEW, Search, validation_part
    from fewstep.system import distributed
    from fewstep.system.console import Progress, duration, say, table
    from fewstep.system.console import results as stdout
    from fewstep.system.device import pick_device
    from fewstep.system.errors import EvaluationError
    from fewstep.teachers.samplers import from_record, samplers_file

    bring(imports)
    where = pick_device(device)
    if len(set(calls)) < len(calls):
        raise EvaluationError(f"`calls` must name each number once, got {','.join(map(str, calls))}")
    few = max(2, samples // FEW)
    code = several(line, count_processes(processes, where.type == "cuda"))
    if code is not None:
        return code
    started = time.monotonic()
    with distributed.process_group():
        found = find_teacher(teacher, prompts).load()
        check_finite(teacher, found.denoiser)
        shape = found.codec.shape if found.codec else found.shape
        measure = extractor_for(shape, cast(ExtractorName, extractor), where)
        if reference is not None:
            stats = find_reference(reference, measure, shape)
        else:
            data = data_of(found.provenance)
            if data is None:
                raise EvaluationError("`--reference` must be given, because the teacher names no images. Try: a folder")
            stats = reference_for(validation_part(data), measure)
        scorers = [Scorer(stats, measure, count, ("fid",), batch) for count in (samples, few)]
        search = Search(found, scorers[0], scorers[1], out or samplers_file(teacher), guidance, where)
        work = search.work(calls)
        say(
            f"at most {work:,} forwards of {found.name}, by FID against {stats.id}; kept in {search.out} after each sampler"
        )
        with Progress("tune", work, unit="forwards", enabled=distributed.rank() == 0) as bar:

            def progress(name: str, done: int) -> None:
                bar.description = name
                bar.update(done)

            search.run(calls, progress)
    if distributed.rank() == 0:
        rows = [
            [str(count), str(from_record(row)), f"{row['fid']:.2f}"]
            for count in calls
            if (row := search.best[str(count)])
        ]
        stdout.print(table("", ["calls", "best sampler", f"FID of {samples:,}"], rows))
        print(f"finished in {duration(time.monotonic() - started)}: {search.out}")
        if out is None:
            print(f"next:\n  fewstep eval {teacher} --sampler best --evaluations {','.join(map(str, calls))}")
    return 0


def benchmark(
    file: Positional[Annotated[Path, about("a benchmark's file: teacher, reference, students", metavar="FILE")]],
    out: Annotated[
        Path | None, PATH, about("folder of runs, scores and the page", "runs/NAME of the file", "FOLDER")
    ] = None,
    jobs: Annotated[int, COUNT, about("trainings at once, each on its share of the cores")] = 1,
    only: Annotated[Sequence[str], NAMES, about("students to train, separated by commas", "all")] = (),
    page: Annotated[bool, about("train and score nothing: make the page of what is there", "")] = False,
    device: Device = "auto",
) -> None:
    """Race methods on one teacher: every student with several seeds, scored beside the teacher under its best samplers.

    The same command resumes. It runs `fewstep distill`, `tune-sampler` and `eval`, and writes a page with table, spreads,
    figures and samples.
    """
    from fewstep.benchmark.page import write_page
    from fewstep.benchmark.race import Race
    from fewstep.benchmark.spec import read_benchmark

    race = Race(read_benchmark(file), out or Path("runs") / file.stem, jobs, device, only)
    if not page:
        race.run()
    print(write_page(race))
