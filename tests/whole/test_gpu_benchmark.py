"""The benchmark of the GPU: nothing that was found is lost, whatever a case does; the whole command on tiny networks."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.findings import Row, read, rows, table
from benchmarks.stages import CASES
from benchmarks.stages.variants import VARIANTS
from tests.support.places import ROOT
from tools import publish_gpu

PACKAGE = """
from typing import NamedTuple

class Case(NamedTuple):
    stage: str
    name: str
    seconds: float
    function: str
    arguments: dict = {}
    beside: bool = False

class Bench:
    def __init__(self, send):
        self.send, self.left = send, False
    def describe(self):
        return {"hardware": "a card", "torch": "9.9"}
    def clean(self):
        return not self.left

def setup(folder, cpu, tiny, send):
    START
    return Bench(send)

CASES = [Case(*case) for case in CASES_OF_THIS_TEST]
"""
FUNCTIONS = """
import os, signal, sys, time

def fine(bench, number=1):
    bench.send({"numbers": {"seen": number}, "unit": "times"})
    bench.send({"name": "process", "numbers": {"number": os.getpid()}, "unit": ""})

def raises(bench):
    bench.send({"numbers": {"before": 1}, "unit": ""})
    raise RuntimeError("it broke\\nadvice of the library")

def killed(bench):
    bench.send({"numbers": {"before": 1}, "unit": ""})
    os.kill(os.getpid(), signal.SIGKILL)

def dies(bench):
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def hangs(bench):
    bench.send({"numbers": {"before": 1}, "unit": ""})
    time.sleep(600)

def leaves(bench):
    bench.left = True
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Makes a package of cases and returns the arguments that choose it."""

    def make(cases, start=""):
        name = f"stages_of_{tmp_path.name}".replace("-", "_")
        (tmp_path / name).mkdir()
        text = PACKAGE.replace("CASES_OF_THIS_TEST", repr(cases)).replace("START", start or "pass")
        (tmp_path / name / "__init__.py").write_text(text)
        (tmp_path / name / "cases.py").write_text(FUNCTIONS)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        return ["--package", name, "--out", str(tmp_path / "out")]

    return make


def case(name, function=None, seconds=60, **rest):
    return ("stage", name, seconds, f"cases:{function or name}", *rest.values())


def found(tmp_path):
    return {(row.stage, row.name): row for row in rows(read(tmp_path / "out" / "findings.jsonl"))}


def test_whatever_a_case_does_the_next_one_runs(stages, tmp_path, capsys):
    names = ("first", "raises", "after raising", "killed", "dies", "hangs", "leaves", "last")
    function = {"first": "fine", "after raising": "fine", "last": "fine"}
    cases = [case(name, function.get(name, name), 2 if name == "hangs" else 60) for name in names]
    assert gpu.main(stages(cases)) == 4
    by_name = {name: row for (_, name), row in found(tmp_path).items()}
    for name in ("first", "after raising", "last"):
        assert by_name[name].numbers == {"seen": (1.0, "times")} and not by_name[name].errors
    assert by_name["raises"].errors == ["RuntimeError: it broke"]
    assert by_name["killed"].errors == ["the worker was killed by SIGKILL: --- stage/killed"]
    assert by_name["dies"].errors == ["the worker ended with exit status 3: last words"]
    assert by_name["hangs"].errors == ["took longer than its limit of 2 s"]
    for name in ("raises", "killed", "hangs"):
        assert by_name[name].value("before") == 1, "what a case had found before is lost"
    lines = read(tmp_path / "out" / "findings.jsonl")
    processes = {line["case"]: line["numbers"]["number"] for line in lines if line["name"] == "process"}
    assert processes["first"] == processes["after raising"] != processes["last"]
    assert all(line["hardware"] == "a card" and line["torch"] == "9.9" and line["date"] for line in lines)
    printed = capsys.readouterr().out
    assert printed.index("FAILED: took longer") < printed.index("seen 1 times", printed.index("FAILED: took longer"))
    assert "4 with failures" in printed


def test_a_case_that_leaves_memory_behind_gets_its_worker_replaced(stages, tmp_path):
    gpu.main(stages([case("a", "fine"), case("leaves"), case("b", "fine")]))
    lines = read(tmp_path / "out" / "findings.jsonl")
    processes = [line["numbers"]["number"] for line in lines if line["name"] == "process"]
    assert len(set(processes)) == 2


@pytest.mark.slow
def test_the_time_limit_ends_what_runs_and_names_what_did_not(stages, tmp_path):
    cases = [case("hangs", seconds=20), case("b", "fine"), ("stage", "short", 1, "cases:fine", {"number": 3}, True)]
    started = time.monotonic()
    assert gpu.main([*stages(cases), "--minutes", "0.15"]) == 0
    assert time.monotonic() - started < 40
    by_name = {name: row for (_, name), row in found(tmp_path).items()}
    assert by_name["hangs"].notes[0].startswith("cut off by --minutes after ")
    assert by_name["hangs"].value("before") == 1 and not by_name["hangs"].errors
    assert by_name["b"].notes == ["not run: 0 s left"] and not by_name["b"].errors
    assert by_name["short"].value("seen") == 3


def test_a_worker_that_does_not_start_is_one_failure(stages, tmp_path):
    assert gpu.main(stages([case("a", "fine"), case("b", "fine")], "raise ValueError('no card')")) == 1
    by_name = {name: row for (_, name), row in found(tmp_path).items()}
    assert by_name["a"].errors == ["no worker starts: the worker ended with exit status 1: ValueError: no card"]
    assert by_name["b"].notes[0].startswith("not run: no worker starts")


def test_stopped_from_outside_it_prints_what_it_has(stages, tmp_path):
    arguments = stages([case("first", "fine"), case("hangs"), case("last", "fine")])
    command = subprocess.Popen(
        [sys.executable, "benchmarks/gpu.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    file = tmp_path / "out" / "findings.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (file.exists() and '"before"' in file.read_text()):
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    printed = command.communicate(timeout=60)[0]
    assert "stopped: what was found until now" in printed and "seen 1 times" in printed and command.returncode == 0
    by_name = {name: row for (_, name), row in found(tmp_path).items()}
    assert set(by_name) == {"first", "process", "hangs"} and by_name["hangs"].value("before") == 1


def test_only_the_chosen_stages_run(stages, tmp_path, capsys):
    arguments = stages([("a", "x", 9, "cases:fine"), ("b", "x", 9, "cases:fine"), ("b", "y", 9, "cases:fine")])
    gpu.main([*arguments, "--only", "a", "b/y"])
    assert {line["stage"] + line["case"] for line in read(tmp_path / "out" / "findings.jsonl")} == {"ax", "by"}
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "--only", "c"])
    assert "--only must name stages (a, b)" in capsys.readouterr().err


def line(name, case=None, date="1", stage="sdxl", hardware="NVIDIA H100 80GB HBM3", **rest):
    return {
        "stage": stage,
        "case": case or name,
        "name": name,
        "date": date,
        "hardware": hardware,
        "torch": "2",
        **rest,
    }


def test_rows_put_a_measurement_beside_its_plan():
    product = line("product 8192 x 8192 x 8192", stage="card", numbers={"bf16": 800.0}, unit="TFLOP/s")
    lines = [
        line("lora", "lora: plan", numbers={"planned memory": 11.0}, unit="GiB"),
        line("lora", "lora: plan", hardware="unknown", numbers={"time on H100": 1.5, "time on A100": 4.0}, unit="s"),
        line("lora", "lora: plan", numbers={"work": 400.0}, unit="TFLOP an iteration"),
        line("lora", numbers={"memory": 10.0}, unit="GiB"),
        line("lora", numbers={"time": 2.0}, unit="s an iteration"),
        product,
    ]
    first, second = rows(lines, ["card", "sdxl"])
    assert first.stage == "card" and second.numbers["achieved"] == (200.0, "TFLOP/s")
    assert second.value("share of the bf16 product") == pytest.approx(25)
    assert second.value("plan's error in memory") == pytest.approx(10)
    assert second.value("planned time") == 1.5 and second.value("plan's error in time") == pytest.approx(-25)
    assert "time on A100" not in second.numbers
    unknown = rows([{**entry, "hardware": "another card"} for entry in lines])
    assert all(row.value("planned time") is None for row in unknown)


def test_the_latest_run_of_a_case_counts_and_one_that_did_not_happen_hides_nothing(tmp_path):
    lines = [
        line("a", date="1", error="it broke"), line("a", date="2", numbers={"x": 1.0}, unit=""),
        line("b", date="1", numbers={"x": 2.0}, unit=""), line("b", date="2", skipped="not run: 0 s left"),
    ]  # fmt: skip
    file = tmp_path / "findings.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"stage": "cut o')
    a, b = rows(read(file))
    assert (a.errors, a.value("x")) == ([], 1.0) and (b.value("x"), b.notes) == (2.0, [])
    assert "FAILED: broke" in table([Row("s", "n", errors=["broke"])])


def published(tmp_path, lines):
    page, file = tmp_path / "page.md", tmp_path / "new.jsonl"
    page.write_text(f"before\n{publish_gpu.BEGIN}\nold\n{publish_gpu.END}\nafter\n")
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    publish_gpu.main([str(file), "--page", str(page), "--kept", str(tmp_path / "kept")])
    return page.read_text()


def test_publishing_says_what_was_found_and_what_was_not_run(tmp_path):
    name = "micro-batch 2"
    shared = {"command": "python benchmarks/gpu.py", "stage": "sdxl", "date": "2026-12-01T10:00:00+00:00"}
    lines = [
        line(name, numbers={"memory": 12.345}, unit="GiB", **shared),
        line(name, numbers={"time": 0.5}, unit="s an iteration", **shared),
        line(name, f"{name}: plan", hardware="an Intel", numbers={"time on H100": 0.4}, unit="s", **shared),
        line("micro-batch 4", error="OutOfMemoryError: no | room", **shared),
        line("micro-batch 1", skipped="not run: 0 s left", **shared),
    ]
    text = published(tmp_path, lines)
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "### NVIDIA H100 80GB HBM3" in text and "2026-12-01, torch 2: `python benchmarks/gpu.py`" in text
    assert "| micro-batch 2 | 12.35 |  |  | 0.5 | 0.4 | -20 |  |  |  |" in text
    assert "**failed**: OutOfMemoryError: no \\| room" in text and "an Intel" not in text
    for missing in ("micro-batch 1", "lora-24gb as shipped", "card"):
        assert any(row.startswith(f"| {missing} |") and row.endswith("not yet run |") for row in text.splitlines())
    (tmp_path / "new.jsonl").unlink()
    publish_gpu.main(["--page", str(tmp_path / "page.md"), "--kept", str(tmp_path / "kept")])
    assert (tmp_path / "page.md").read_text() == text


def test_findings_of_a_processor_or_of_tiny_networks_are_not_published(tmp_path):
    with pytest.raises(publish_gpu.PublishError, match="must hold findings of a GPU"):
        published(tmp_path, [line("a", command="python benchmarks/gpu.py --cpu --out x")])
    with pytest.raises(publish_gpu.PublishError, match="got none"):
        published(tmp_path, [])
    assert not (tmp_path / "kept").exists() and "old" in (tmp_path / "page.md").read_text()


def test_the_docs_hold_what_the_tool_makes_of_the_kept_findings(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(publish_gpu.PAGE.read_text())
    publish_gpu.main(["--page", str(page)])
    assert page.read_text() == publish_gpu.PAGE.read_text()


def test_every_variant_has_a_measurement_and_a_plan():
    names = {(entry.stage, entry.name) for entry in CASES}
    assert len(names) == len(CASES)
    for stage, name in VARIANTS:
        assert (stage, name) in names and (stage, f"{name}: plan") in names


SIZES = {"sdxl": 2_567, "sd15": 860, "adm": 296, "ddpmpp": 56, "flux2-klein": 3_876, "z-image": 6_155}


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_published_sizes(name):
    """In millions of weights, counted without storage; the tiny ones have the same conditions."""
    pytest.importorskip("diffusers")
    from benchmarks.stages.networks import outline

    (full, cond), (tiny, small) = outline(name, False), outline(name, True)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in full.net.build().parameters())
    assert count / 1e6 == pytest.approx(SIZES[name], abs=1)
    assert cond.keys() == small.keys() and full.prediction and tiny.net.sample_shape != full.net.sample_shape


def test_what_only_a_card_runs(tmp_path, monkeypatch):
    """Memory and the limits of smaller cards, with a card that is pretended: 80 GiB, of which one is the driver's."""
    pytest.importorskip("diffusers")
    from benchmarks.stages import card, training
    from benchmarks.stages.bench import Bench

    found, fractions, about = [], [], SimpleNamespace(total_memory=80 * 2**30, name="a card", major=9, minor=0)
    about.multi_processor_count = 132
    pretended = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
        "max_memory_allocated": lambda: 11 * 2**30,
        "max_memory_reserved": lambda: 12 * 2**30,
        "memory_reserved": lambda: 12 * 2**30,
        "memory_allocated": lambda: 2**29,
        "mem_get_info": lambda: (67 * 2**30, 80 * 2**30),
        "set_per_process_memory_fraction": fractions.append,
        "get_device_properties": lambda device: about,
    }
    for name, function in pretended.items():
        monkeypatch.setattr(torch.cuda, name, function)
    bench = Bench(tmp_path, True, True, found.append)
    bench.cuda = True
    update, fraction_that_fails = training.Cycle.update, 0.2

    def limited(self, *args):
        if fractions and fractions[-1] < fraction_that_fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(self, *args)

    monkeypatch.setattr(training.Cycle, "update", limited)
    training.measured(bench, "sdxl", "lora-24gb as shipped")
    assert fractions == [23 / 80, 15 / 80], (
        "each card's memory without what the driver takes; none after one that fails"
    )
    numbers = {key: value for line in found for key, value in line.get("numbers", {}).items()}
    assert (numbers["memory"], numbers["reserved"], numbers["outside of torch"]) == (11, 12, 1)
    assert [line["note"] for line in found if "note" in line] == ["runs in 24 GiB", "does not run in 16 GiB"]
    assert not bench.clean() and fractions[-1] == 1.0
    card.card(bench)
    assert any("132 multiprocessors" in line.get("note", "") for line in found)


CHOSEN = (  # one of each kind of variant, which all go through the same code
    "lora-24gb as shipped", "micro-batch 1, int8 base", "micro-batch 1, 40 blocks at the host", "micro-batch 1, Adam in 8 bits",
    "sdxl/dmd2-4step, all weights, offloaded", "imagenet-64/dmd2, 40 images a card", "FLUX.2-klein-4B shape, LoRA",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_command_on_tiny_networks(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    seeds = [f"{entry.stage}/{entry.name}" for entry in CASES if entry.stage == "fashion-mnist"][:1]
    stages = dict.fromkeys(entry.stage for entry in CASES if entry.stage not in ("fashion-mnist", "sdxl", "others"))
    variants = [name for stage, name in VARIANTS if name in CHOSEN]
    chosen = [f"{e.stage}/{e.name}" for e in CASES if e.name.removesuffix(": plan") in CHOSEN]
    arguments = [
        "--cpu",
        "--tiny",
        "--minutes",
        "14",
        "--out",
        str(tmp_path / "out"),
        "--only",
        *stages,
        *chosen,
        *seeds,
    ]
    assert len(variants) == len(CHOSEN)
    failures = gpu.main(arguments)
    by_name = found(tmp_path)
    assert failures == 0, [row.errors for row in by_name.values() if row.errors]
    for stage, name in (variant for variant in VARIANTS if variant[1] in CHOSEN):
        row = by_name[stage, name]
        missing = {"time", "work", "planned memory", "achieved"} - row.numbers.keys()
        assert not missing or any("is not installed" in note for note in row.notes), (name, missing)
    assert by_name["right", "resumed"].numbers.keys() == {"generator", "ema", "critic", "allowed"}
    ran = {(entry["stage"], entry["case"]) for entry in read(tmp_path / "out" / "findings.jsonl")}
    assert {(entry.stage, entry.name) for entry in CASES if entry.stage in stages} <= ran
    assert not list((tmp_path / "out").glob("scratch"))
