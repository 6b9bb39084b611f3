"""Run command lines each in a process of its own, with bounded time and memory: python -m tests.hostile.serve < jobs > outcomes

A line of the input is a JSON list, the command line. A line of the output is a JSON object: `code` (negative for a signal),
`said` (what it wrote to stderr), `seconds` of its processor time, `wall` seconds. Libraries
are imported once; each job is a fork.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.support.forked import leave_after

SECONDS, WALL, BYTES = 10, 60, 2 * 2**30
"""Limits of a job: processor time, time on the wall, memory beyond the parent's."""
IMPORTED = (
    "fewstep.costs.plan", "fewstep.evaluation.compare", "fewstep.evaluation.features", "fewstep.report.page", "fewstep.run.execute",
    "fewstep.students.student", "fewstep.teachers", "matplotlib.pyplot", "matplotlib.backends.backend_svg", "scipy.linalg", "sklearn.datasets",
    "diffusers.pipelines.pipeline_utils", "transformers", "torch_fidelity.metric_fid", "torch_fidelity.metric_kid", "torch_fidelity.metric_prc", "lmdb", "PIL.PngImagePlugin", "jinja2",
)  # fmt: skip
"""What jobs would import, imported once."""


def readers():
    """Readers that commands reach only with large inputs beside the file, by a word in capitals."""
    from fewstep.data.captions import captioned_images
    from fewstep.data.dataset import DataSpec
    from fewstep.formats.lora_reading import read_lora
    from fewstep.system.choices import chosen
    from fewstep.teachers.prompts import read_prompt_file
    from tests.hostile.subjects import SUBJECTS

    @functools.cache
    def reader(name: str):
        return SUBJECTS[name].reader()

    def subject(name: str, folder: str | None) -> None:
        read = reader(name)
        if folder is not None:  # else it is made ready, before the fork
            read(Path(folder))

    def data(kind: str, place: str) -> None:
        chosen(DataSpec, {"kind": kind, "root" if kind == "fashion-mnist" else "path": place}).load()

    return {
        "CAPTIONS": lambda file: captioned_images(Path(file), 8).images.fingerprint(strict=False),
        "DATA": data,
        "LORA": lambda file: read_lora(Path(file)),
        "SUBJECT": subject,
        "PROMPTS": lambda file: read_prompt_file(Path(file)),
    }


def main() -> None:
    import torch

    import fewstep.cli.main
    from fewstep.system.errors import UserError

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    known = readers()

    def run(line: list[str]) -> int:
        if line[0] not in known:
            return fewstep.cli.main.main(line)
        try:
            known[line[0]](*line[1:])
        except (UserError, OSError) as error:  # what fewstep.cli.main prints as a message
            print(error, file=sys.stderr)
            return 1
        return 0

    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    base = int(data.split()[1]) * 1024

    def limited(line):
        resource.setrlimit(resource.RLIMIT_DATA, (base + BYTES, base + BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.alarm(WALL)
        return run(line)

    for text in sys.stdin:
        line = json.loads(text)
        if line[0] == "SUBJECT":
            known["SUBJECT"](line[1], None)
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                leave_after(functools.partial(limited, line), said)
            started = time.monotonic()
            _, status, used = os.wait4(child, 0)
            said.seek(0)
            outcome = {
                "code": os.waitstatus_to_exitcode(status),
                "said": said.read(20_000).decode(errors="replace"),
                "seconds": used.ru_utime + used.ru_stime,
                "wall": time.monotonic() - started,
            }
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
