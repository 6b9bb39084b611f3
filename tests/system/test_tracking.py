"""A resumed run leaves the files of an unbroken one; the bar tells the truth with and without a terminal."""

import errno
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
import types

import pytest
from rich.console import Console

from fewstep.system import console, tracking
from fewstep.system.console import Progress, table
from fewstep.system.tracking import Tracker, read_stats
from tests.support.places import ROOT

QUIET = Console(file=io.StringIO())


def tracker(folder, resume_from=None, **options) -> Tracker:
    return Tracker(folder, resume_from=resume_from, console=QUIET, **options)


def train(track: Tracker, images: range, save_every: int = 40) -> None:
    """What a training logs, all of it a function of the images seen."""
    for seen in images:
        if seen % 10 == 0:
            track.log(seen, {"loss": math.sin(seen), "step": seen // 10})
            track.time(seen, {"images_per_second": 3.0})
            track.warn(seen, "lag", "the critic lags")
        if seen % save_every == 0:
            track.log(seen, {"fid": 1 / (1 + seen), "sampler": "one step"}, kind="evaluation")


class TestStats:
    def test_lines(self, tmp_path):
        with tracker(tmp_path) as track:
            track.log(10, {"loss": 0.1, "n": 3, "word": "a [b] ü", "none": None})
            track.log(10, {"fid": float("nan"), "a": float("inf"), "b": float("-inf")}, kind="evaluation")
        lines = (tmp_path / "stats.jsonl").read_text().splitlines()
        assert lines[0].startswith('{"images": 10, "kind": "train", "loss": 0.1, "n": 3')

        def refuse(name):
            raise AssertionError(f"{name} is not JSON")

        records = [json.loads(line, parse_constant=refuse) for line in lines]
        assert records[0]["word"] == "a [b] ü" and records[0]["none"] is None
        assert records[1] == {"images": 10, "kind": "evaluation", "fid": "nan", "a": "inf", "b": "-inf"}
        again = read_stats(tmp_path / "stats.jsonl")
        assert math.isnan(again[1]["fid"]) and again[1]["a"] == math.inf and again[1]["b"] == -math.inf

    def test_each_line_is_there_at_once(self, tmp_path):
        track = tracker(tmp_path)
        track.log(1, {"a": 1})
        assert len(read_stats(tmp_path / "stats.jsonl")) == 1
        track.close()

    def test_images_never_fall(self, tmp_path):
        with tracker(tmp_path) as track:
            track.log(10, {})
            track.log(10, {}, kind="evaluation")
            for images, kind in [(10, "train"), (9, "train"), (10, "evaluation"), (9, "other")]:
                with pytest.raises(ValueError, match=f"got {images}"):
                    track.log(images, {}, kind)
            with pytest.raises(ValueError, match="got 9"):
                track.warn(9, "x", "y")
            track.time(10, {})
            track.time(10, {})
            with pytest.raises(ValueError, match="got 9"):
                track.time(9, {})
        with tracker(tmp_path, 10) as track, pytest.raises(ValueError, match="got 10"):
            track.log(10, {})
        assert len(read_stats(tmp_path / "stats.jsonl")) == 2

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"x": [1]}, "x is a list"),
            ({"images": 1}, "'images' is reserved by the tracker"),
            ({"kind": "a"}, "'kind'"),
        ],
    )
    def test_values_that_are_refused(self, tmp_path, values, words):
        with tracker(tmp_path) as track, pytest.raises(ValueError, match=words):
            track.log(1, values)
        assert (tmp_path / "stats.jsonl").read_bytes() == b""


class TestResume:
    @pytest.mark.parametrize("died_at", [40, 41, 59, 79, 119])
    @pytest.mark.parametrize("half_line", [False, True])
    def test_the_file_equals_that_of_an_unbroken_run(self, tmp_path, died_at, half_line):
        with tracker(tmp_path / "unbroken", warn_every=30) as track:
            train(track, range(120))
        with tracker(tmp_path / "resumed", warn_every=30) as track:
            train(track, range(died_at + 1))
        stats = tmp_path / "resumed" / "stats.jsonl"
        if half_line:
            with open(stats, "ab") as file:
                file.write(b'{"images": 120, "kind": "train", "lo')
        checkpoint = died_at // 40 * 40
        with tracker(tmp_path / "resumed", resume_from=checkpoint, warn_every=30) as track:
            assert stats.read_bytes().count(b"\n") < (tmp_path / "unbroken" / "stats.jsonl").read_bytes().count(b"\n")
            train(track, range(checkpoint + 1, 120))
        assert stats.read_bytes() == (tmp_path / "unbroken" / "stats.jsonl").read_bytes()

    def test_a_line_killed_before_its_end_is_cut_though_it_reads_well(self, tmp_path):
        (tmp_path / "stats.jsonl").write_bytes(b'{"images": 1, "kind": "train"}\n{"images": 2, "kind": "train"}')
        assert [record["images"] for record in read_stats(tmp_path / "stats.jsonl")] == [1]
        with tracker(tmp_path, resume_from=5) as track:
            track.log(2, {})
        assert [record["images"] for record in read_stats(tmp_path / "stats.jsonl")] == [1, 2]

    @pytest.mark.parametrize("line", [b"garbage", b"{}", b"[]", b'{"images": "x"}', b"\xff"])
    def test_a_damaged_line_is_named(self, tmp_path, line):
        (tmp_path / "stats.jsonl").write_bytes(b'{"images": 1, "kind": "train"}\n' + line + b"\n")
        for read in (lambda: read_stats(tmp_path / "stats.jsonl"), lambda: tracker(tmp_path, 5)):
            with pytest.raises(ValueError, match=r"stats\.jsonl line 2 is damaged"):
                read()

    def test_a_new_run_keeps_what_lay_there_aside(self, tmp_path):
        with tracker(tmp_path) as track:
            track.log(1, {"a": 1})
        before = (tmp_path / "stats.jsonl").read_bytes()
        with tracker(tmp_path) as track:
            track.log(1, {"a": 2})
        assert (tmp_path / "stats.jsonl.old").read_bytes() == before
        assert read_stats(tmp_path / "stats.jsonl") == [{"images": 1, "kind": "train", "a": 2}]

    def test_seconds_go_on_from_the_checkpoint(self, tmp_path, monkeypatch):
        now = 1000.0
        monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
        track = tracker(tmp_path)
        now += 5
        track.time(10, {"evaluation_seconds": 2.5})
        now += 5
        track.time(20, {})
        track.close()
        now += 1000  # nobody trains
        track = tracker(tmp_path, resume_from=15)
        assert track.seconds == 5
        now += 1
        track.time(20, {})
        track.close()
        assert read_stats(tmp_path / "times.jsonl") == [
            {"images": 10, "seconds": 5.0, "evaluation_seconds": 2.5},
            {"images": 20, "seconds": 6.0},
        ]
        assert (tmp_path / "stats.jsonl").read_bytes() == b""

    def test_kill_9_while_logging(self, tmp_path):
        script = """
import sys
from fewstep.system.tracking import Tracker
track = Tracker(sys.argv[1], resume_from=int(sys.argv[2]))
print("go", flush=True)
for images in range(int(sys.argv[2]) + 1, 10**9):
    track.log(images, {"loss": images / 7, "text": "x" * 200})
"""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        last = 0
        for _ in range(3):
            command = [sys.executable, "-c", script, str(tmp_path), str(last)]
            with subprocess.Popen(command, stdout=-1, env=environment) as child:
                assert child.stdout is not None and child.stdout.readline() == b"go\n"
                before = (tmp_path / "stats.jsonl").stat().st_size
                while (tmp_path / "stats.jsonl").stat().st_size < before + 10_000:
                    time.sleep(0.001)
                child.kill()
            records = read_stats(tmp_path / "stats.jsonl")
            assert [record["images"] for record in records] == list(range(1, len(records) + 1))
            assert all(record["loss"] == record["images"] / 7 for record in records)
            assert len(records) > last
            last = len(records) // 2

    def test_a_disk_that_takes_half_a_line(self, tmp_path):
        with tracker(tmp_path) as track:
            track.log(1, {"a": 1})
            before = (tmp_path / "stats.jsonl").read_bytes()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
            try:
                with pytest.raises(OSError, match=r"not logged. Try: make room.*stats\.jsonl") as caught:
                    track.log(2, {"a": 2})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.errno == errno.EFBIG
            assert (tmp_path / "stats.jsonl").read_bytes() == before
            track.log(2, {"a": 2})
        assert [record["a"] for record in read_stats(tmp_path / "stats.jsonl")] == [1, 2]


class TestWarnings:
    def test_once_per_code_and_stretch(self, tmp_path):
        stream = io.StringIO()
        track = Tracker(tmp_path, console=Console(file=stream), warn_every=100)
        given = [track.warn(images, "lag", "train it [more]") for images in (0, 50, 99, 100, 150)]
        assert given == [True, False, False, True, False]
        assert track.warn(150, "saturated", "b") and not track.warn(150, "lag", "a")
        track.close()
        assert stream.getvalue().count("train it [more]") == 2
        assert stream.getvalue().splitlines()[1] == "Warning at 100 images (lag): train it [more]"
        assert read_stats(tmp_path / "stats.jsonl") == [
            {"images": 0, "kind": "warning", "code": "lag", "text": "train it [more]"},
            {"images": 100, "kind": "warning", "code": "lag", "text": "train it [more]"},
            {"images": 150, "kind": "warning", "code": "saturated", "text": "b"},
        ]


class TestElsewhere:
    def test_tensorboard(self, tmp_path):
        from PIL import Image
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "grid.png")
        with tracker(tmp_path, tensorboard=True) as track:
            track.log(10, {"loss": 0.5, "word": "not a number"})
            track.log(20, {"loss": 0.25})
            track.image(20, "samples", tmp_path / "grid.png")
        with tracker(tmp_path, resume_from=10, tensorboard=True) as track:
            track.log(20, {"loss": 0.125})
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert events.Tags()["scalars"] == ["train/loss"]
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
            (10, 0.5),
            (20, 0.125),
        ]

    def test_wandb(self, tmp_path, monkeypatch):
        runs = []

        class Run:
            def __init__(self, **options):
                self.options, self.lines, self.finished = options, [], False
                runs.append(self)

            def define_metric(self, name, step_metric):
                assert (name, step_metric) == ("*", "images")

            def log(self, line):
                self.lines.append(line)

            def finish(self, exit_code=0):
                self.finished = exit_code == 0

        fake = types.ModuleType("wandb")
        fake.init, fake.Image = Run, lambda path: ("image", path)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with tracker(tmp_path, wandb="project") as track:
            track.log(10, {"loss": 0.5, "word": "x"})
            track.image(10, "samples", tmp_path / "grid.png")
        tracker(tmp_path, resume_from=10, wandb="project").close()
        tracker(tmp_path, wandb="project").close()
        samples = ("image", str(tmp_path / "grid.png"))
        assert runs[0].lines == [{"images": 10, "train/loss": 0.5}, {"images": 10, "samples": samples}]
        assert runs[0].finished and runs[0].options["project"] == "project"
        first, resumed, anew = (run.options["id"] for run in runs)
        assert first == resumed != anew

    @pytest.mark.parametrize(("module", "option"), [("tensorboard", True), ("wandb", "project")])
    def test_missing_packages(self, tmp_path, monkeypatch, module, option):
        for name in list(sys.modules):
            if name.startswith(("torch.utils.tensorboard", "tensorboard.")):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'fewstep\[{module}\]'"):
            tracker(tmp_path, **{module: option})

    def test_pictures_go_nowhere_without_them(self, tmp_path):
        with tracker(tmp_path) as track:
            track.image(1, "samples", tmp_path / "missing.png")
        assert sorted(os.listdir(tmp_path)) == ["stats.jsonl", "times.jsonl"]


class Clock:
    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


class TestProgress:
    def test_it_counts_in_its_unit(self):
        clock, stream = Clock(), io.StringIO()
        with Progress("prepare", 100_000, unit="prompts", stream=stream, clock=clock) as bar:
            clock.now += 1
            bar.update(12_345)
        assert stream.getvalue().startswith("prepare: 12,345/100,000 prompts, 12,345 prompts/s, ")

    def test_plain_lines(self):
        clock, stream = Clock(), io.StringIO()
        with Progress("distil", 10_000, stream=stream, clock=clock) as bar:
            for step in range(1, 101):
                clock.now += 1
                fields = {"fid": 12.3456} if step == 40 else {}
                bar.update(step * 50, **fields)
            bar.print("[above]", "x" * 200)
        lines = stream.getvalue().splitlines()
        assert lines[0] == "distil: 50/10,000 images, 50 images/s, 0:03:19 left, 0:00:01 elapsed"
        assert lines[1] == "distil: 1,550/10,000 images, 50 images/s, 0:02:49 left, 0:00:31 elapsed"
        assert lines[2].endswith("fid=12.35, 0:01:01 elapsed")
        assert lines[4] == "[above] " + "x" * 200
        assert lines[5] == "distil: 5,000/10,000 images, 50 images/s, 0:01:40 left, fid=12.35, 0:01:40 elapsed"
        assert len(lines) == 6
        assert "\x1b" not in stream.getvalue()

    def test_the_rate_is_that_of_the_last_minute_and_of_this_process(self):
        clock = Clock()
        with Progress("distil", 10**6, seen=500_000, stream=io.StringIO(), clock=clock) as bar:
            assert bar.images_per_second is None
            for step in range(1, 61):
                clock.now += 1
                bar.update(500_000 + 10 * step)
            assert bar.images_per_second == 10
            for step in range(1, 31):
                clock.now += 1
                bar.update(500_600 + 40 * step)
            assert bar.images_per_second == 25  # half a minute of each
            for step in range(1, 31):
                clock.now += 1
                bar.update(501_800 + 40 * step)
            assert bar.images_per_second == 40

    def test_a_terminal(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")
        stream = io.StringIO()
        terminal = Console(file=stream, force_terminal=True, width=150)
        monkeypatch.setattr(console, "console", terminal)
        clock = Clock()
        with Progress("distil [x]", 1000, clock=clock) as bar:
            clock.now += 2
            bar.update(500, fid=3.0)
            bar.print("above [y]")
        text = stream.getvalue()
        assert "distil [x]" in text and "500/1,000 images, 250 images/s, 0:00:02 left, fid=3" in text
        assert "above [y]" in text and "\x1b[" in text
        assert not bar.console._live_stack  # the terminal is as it was

    def test_disabled(self, capsys):
        with Progress("distil", 1000, enabled=False) as bar:
            bar.update(500)
            bar.print("nothing")
        assert capsys.readouterr() == ("", "")

    def test_progress_and_warnings_go_to_stderr_results_to_stdout(self, capsys, tmp_path):
        with Progress("distil", 1000) as bar:
            bar.update(500)
        with Tracker(tmp_path) as track:
            track.warn(1, "lag", "advice")
        console.results.print(table("T", ["a"], [[1]]))
        out, err = capsys.readouterr()
        assert "500/1,000 images" in err and "advice" in err and "T" not in err
        assert "advice" not in out and "T" in out


class TestTable:
    def test_cells(self):
        stream = io.StringIO()
        rows = [["teacher [x]", 35, 12.34567, None], ["student", 1, 9.0, 1234567]]
        Console(file=stream, width=100).print(table("On [test]", ["name", "calls", "FID", "images"], rows))
        text = stream.getvalue()
        assert "On [test]" in text and "teacher [x]" in text
        lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
        teacher, student = lines["teacher"], lines["student"]
        assert " 12.35 " in teacher and teacher.split()[-1] == "-" and student.split()[-1] == "1,234,567"
        assert teacher.index("35") + 1 == student.index(" 1 ") + 1, "numbers to the right"
        assert teacher.index("teacher") == student.index("student"), "words to the left"

    def test_all_of_it_is_there_in_a_narrow_terminal(self):
        stream = io.StringIO()
        row = ["a model with a long name, guidance 2", 35, 12.34567, 0.9034, "0.903 ± 0.001"]
        Console(file=stream, width=50).print(table("T", ["model", "calls", "FID", "retrieval", "diversity"], [row]))
        lines = stream.getvalue().splitlines()
        assert max(map(len, lines)) <= 50
        for word in ("a model", "guidance", "35", "12.35", "0.9034", "0.903", "0.001", "retrieval", "diversity"):
            assert any(word in line for line in lines), word

    def test_a_row_of_another_length(self):
        with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
            table("T", ["a", "b"], [["x"]])
