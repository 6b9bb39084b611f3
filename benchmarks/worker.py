"""The process that runs cases for `benchmarks/gpu.py`: their names come on the standard input, findings go into a pipe."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Run cases until the input ends, or until one has left something behind on the device."""
    package, out, pipe, *words = sys.argv[1:]
    stages = importlib.import_module(package)
    cases = {f"{case.stage}/{case.name}": case for case in stages.CASES}
    with os.fdopen(int(pipe), "w", encoding="utf-8") as results:

        def send(message: dict) -> None:
            results.write(json.dumps(message) + "\n")
            results.flush()

        bench = stages.setup(Path(out), "cpu" in words, "tiny" in words, send)
        send({"hello": bench.describe()})
        for line in sys.stdin:
            case = cases[line.strip()]
            module, _, function = case.function.partition(":")
            print(f"--- {line.strip()}", file=sys.stderr, flush=True)
            error = ""
            try:
                getattr(importlib.import_module(f"{package}.{module}"), function)(bench, **case.arguments)
            except Exception as problem:  # whatever it is, it is reported and the next case runs
                traceback.print_exc()
                error = _short(problem)
            clean = bench.clean()
            send({"end": error, "clean": clean})
            if not clean:
                return


def _short(problem: Exception) -> str:
    """Its kind and first line: PyTorch's further ones are advice."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"[:400]


if __name__ == "__main__":
    main()
