"""Give random changes of valid files of every format to fewstep's readers: a result, or one message that names the file.

    python tools/fuzz.py --count 20000 --out docs/results/fuzz.jsonl        # some hours of one core for all formats
    python tools/fuzz.py --only pairs --count 500                           # one format, nothing written

Each reader runs in workers with 10 s of processor time and 2 GiB beyond the parent's memory. A mutant is made from the format's
name, the seed and its number alone: `--first N --count 1 --keep FOLDER` writes it down again. Exit code 1 if anything was amiss.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fewstep.system.device import hardware
from tests.hostile.mutants import fuzz, scratch, write_mutant
from tests.hostile.subjects import SUBJECTS


def main() -> None:
    """Fuzz, and say what became of the mutants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="mutants a format")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="formats; all if none is given")
    parser.add_argument("--out", type=Path, help="log to append to, one line of JSON a format")
    parser.add_argument("--keep", type=Path, help="write the mutants into this folder and read none")
    options = parser.parse_args()
    if odd := set(options.only) - SUBJECTS.keys():
        parser.error(f"--only must name formats, got {', '.join(sorted(odd))}. Known: {', '.join(SUBJECTS)}")
    torch.set_num_threads(1)
    amiss = False
    for name in options.only or SUBJECTS:
        if options.keep:
            keep(name, options)
            continue
        began = time.monotonic()
        for root in scratch():
            tally = fuzz(name, SUBJECTS[name], options.count, options.seed, root, options.first)
        row = {
            "format": name, "date": date.today().isoformat(), "hardware": hardware(1), "seed": options.seed, "mutants": options.count,
            "command": " ".join(["python", *sys.argv]), "outcomes": {k: tally.counts[k] for k in ("read", "refused", "fault")},
            "slowest_seconds": tally.slowest, "largest_process_bytes": tally.memory, "seconds": round(time.monotonic() - began),
        }  # fmt: skip
        amiss |= bool(tally.faults)
        print(json.dumps(row), flush=True)
        for same, said in tally.faults.items():
            print(f"    {tally.counts[f'fault: {same}']:6} x {said}", flush=True)
        if options.out:
            with options.out.open("a") as log:
                print(json.dumps(row | {"faults": list(tally.faults.values())}), file=log)
    sys.exit(1 if amiss else 0)


def keep(name: str, options: argparse.Namespace) -> None:
    """Write mutants down to look at."""
    template = options.keep / "valid"
    template.mkdir(parents=True)
    SUBJECTS[name].make(template)
    valid = {
        str(file.relative_to(template)): file.read_bytes() for file in sorted(template.rglob("*")) if file.is_file()
    }
    for number in range(options.first, options.first + options.count):
        print(write_mutant(SUBJECTS[name], valid, options.keep, name, options.seed, number))


if __name__ == "__main__":
    main()
