"""The page says what a run folder holds, whatever is missing, and needs nothing but itself."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep.diffusion.generator import Generator
from fewstep.formats.model import DenoiserSpec, save_denoiser, save_generator
from fewstep.networks import DiTSpec
from fewstep.report import charts, pictures
from fewstep.report.charts import Chart, Series, save_charts
from fewstep.report.page import write_report
from fewstep.report.run_folder import RunFolder, teacher_row
from fewstep.run.recipes import list_recipes
from fewstep.run.settings import dump_run, load_run
from fewstep.system.errors import FileError
from fewstep.system.pictures import save_grid
from fewstep.system.tracking import Tracker

PROTOCOL = "small64-1a2b3c4d/fashion-mnist-train-60000-9f8e7d6c/{}/uint8"
SETTINGS = {
    "kind": "distill",
    "teacher": {"kind": "native", "path": "fashion-mnist"},
    "generator": {"sigmas": [2.5]},
    "objective": {"method": "sid", "alpha": 1.0},
    "train": {"images": 4000, "evaluate_every": 1000, "log_every": 500, "checkpoint_every": 1000},
    "evaluation": {"samples": 5000},
}


class Page(HTMLParser):
    """Tags, visible text and the cells of tables."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.open, self.tables, self.words = [], [], [], []
        self.feed(self.html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.tables and any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][-1][-1] += data.strip()

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page(folders, out: Path) -> Page:
    assert write_report(folders, out) == out
    return Page(out)


def make_run(folder: Path, images: int = 4000, gan: bool = False, settings: dict | None = None) -> Path:
    """A distillation's folder as the trainer leaves it, `images` seen, but without weights."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS | (settings or {}), sort_keys=False))
    with Tracker(folder, warn_every=1) as tracker:
        for seen in range(0, images + 1, 500):
            if seen:
                values = {"gap_real": 0.2, "gap_fake": 0.18, "gap_scores": 50 / seen}
                values |= {f"{key}/t{level:.2f}": 0.1 for key in tuple(values) for level in (0, 0.25, 0.5, 0.75)}
                values |= {"x_gradient/sid": 0.1, "gradient_norm/generator": 2.0, "gradient_norm/critic": 1.0}
                values |= {"x_mean": -0.4, "x_spread": 0.5, "loss/generator_sid": -3.0}
                if gan:
                    values |= {"x_gradient/gan": 0.02, "logit_real": 0.3, "logit_fake": -0.3, "accuracy_real": 0.7}
                tracker.log(seen, values)
                tracker.time(seen, {"training_seconds": 1.0})
            if seen % 1000 == 0:
                fid = 100 / (1 + seen / 100)
                tracker.log(seen, {"fid": fid, "n": 5000, "protocol": PROTOCOL.format(5000), "calls": 1}, "evaluation")
                draw(folder / "pictures", "student", seen)
                draw(folder / "pictures", "panel", seen)
                tracker.time(seen, {"evaluation_seconds": 0.0})
        if images >= 2000:
            tracker.warn(images, "critic-lags", "the critic lags <behind>: raise critic.lr")
    save_grid(images_of(80), folder / "pictures" / "teacher.png", 10)
    return folder


def images_of(count: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)


def draw(folder: Path, name: str, seen: int) -> None:
    save_grid(images_of(100 if name == "panel" else 80), folder / f"{name}-{seen:012d}.png", 10)


def add_results(folder: Path, sha256: str = "ab" * 32, fid: float = 4.5, n: int = 50_000) -> None:
    rows = [
        {"name": "fashion-mnist, 35 evaluations", "sha256": "teacher", "calls": 35, "fid": 4.0, "recall": 0.6},
        {"name": "fashion-mnist, 5 evaluations", "sha256": "teacher", "calls": 5, "fid": 30.0, "recall": 0.3},
        {"name": folder.name, "sha256": sha256, "calls": 1, "fid": fid, "recall": 0.7},
    ]
    made = {"command": "fewstep eval runs/x", "hardware": "2 cores", "date": "2026-11-23", "seeds": "0..49999"}
    for row in rows:
        row |= made
        row |= {"n": n, "protocol": PROTOCOL.format(n), "kid": row["fid"] / 1e4, "kid_std": 1e-4}
        row |= {"images_per_second": 3500 / row["calls"]}
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    (folder / "student.json").write_text(json.dumps({"sha256": sha256, "metadata": {"card": {"teacher": "tiny"}}}))


class TestWholeRun:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = make_run(tmp_path / "sid", gan=True)
        add_results(folder)
        return folder

    def test_self_contained(self, folder, tmp_path):
        found = page([folder], tmp_path / "new" / "report.html")
        assert found.html.startswith("<!DOCTYPE html>")
        assert not found.all("script")
        links = [attributes.get(name, "") for _, attributes in found.tags for name in ("src", "href")]
        assert all(link == "" or link.startswith(("data:", "#")) for link in links)
        assert not re.search(r"url\((?!#)", found.html) and "@import" not in found.html
        targets = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
        assert {link[1:] for link in links if link.startswith("#")} <= targets
        assert os.listdir(tmp_path / "new") == ["report.html"]

    def test_accessible(self, folder, tmp_path):
        found = page([folder], tmp_path / "report.html")
        assert [image for image in found.all("img") if not image.get("alt")] == []
        charts = [svg for svg in found.all("svg") if svg.get("aria-hidden") != "true"]
        assert charts and all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
        assert len(found.all("figure")) == len(found.all("figcaption"))
        assert found.html.count('scope="col"') and found.html.count('scope="row"')
        headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
        assert headings[0] == 1 and headings.count(1) == 1

    def test_header(self, folder, tmp_path):
        text = page([folder], tmp_path / "report.html").text
        assert "SiD, one step, from the teacher tiny" in text
        assert "One network call per image instead of 35. FID 4.50, 1.12 times the teacher's 4.00; 35 times as" in text
        assert "4,000 (finished)" in text
        assert "Last and best FID in training 2.44 at 4,000 images" in text

    def test_results_table(self, folder, tmp_path):
        found = page([folder], tmp_path / "report.html")
        header, *rows = found.tables[0]
        assert header == ["Model", "Calls", "FID", "KID × 10³", "Recall", "Images per second", "Samples"]
        assert [row[0] for row in rows] == [
            "fashion-mnist, 35 evaluationsa",
            "fashion-mnist, 5 evaluationsa",
            "sidaSiD",
        ]
        assert rows[0][2:5] == ["4.00(best)", "0.40 ± 0.10(best)", "0.600"]
        assert rows[2][1:] == ["1", "4.50", "0.45 ± 0.10", "0.700(best)", "3,500", "50,000"]
        assert f"Measured as {PROTOCOL.format(50_000)}" in found.text
        assert "fewer than the 50,000" not in found.text
        assert "Not Inception's features" in found.text
        assert "Made by fewstep eval runs/x ; 2 cores, 2026-11-23, seeds 0..49999" in found.text

    def test_few_samples_are_said(self, folder, tmp_path):
        add_results(folder, n=2000)
        assert "2,000 samples, fewer than the 50,000" in page([folder], tmp_path / "report.html").text

    def test_rows_of_earlier_weights_are_said(self, folder, tmp_path):
        (folder / "student.json").write_text(json.dumps({"sha256": "other"}))
        found = page([folder], tmp_path / "report.html")
        names = [row[0] for row in found.tables[0][3:]]
        assert names == ["sidaearlier weights", "sidbSiD, during training, at 4,000 images"]

    def test_curves(self, folder, tmp_path):
        found = page([folder], tmp_path / "report.html")
        labels = [svg["aria-label"] for svg in found.all("svg") if svg.get("role") == "img"]
        assert "FID and images seen over images seen. sid from 9.09 to 2.44" in labels[0]
        assert "teacher (35 calls) at 4" in labels[0]
        assert "FID and training time" in labels[1]
        assert "Before training: 100.00." in found.text
        table = next(table for table in found.tables if table[0][0] == "Images seen")
        assert [row[2] for row in table[1:]] == ["100.00", "9.09", "4.76", "3.23", "2.44"]

    def test_pictures(self, folder, tmp_path):
        found = page([folder], tmp_path / "report.html")
        alts = [image["alt"] for image in found.all("img")]
        assert len(alts) == 4
        assert alts[2].endswith("Rows, from the top: 0, 1k, 2k, 4k, teacher.")
        assert alts[3].endswith("Rows, from the top: x, noised 0.3, D_real 0.3, D_fake 0.3, noised 1, D_real 1, "
                                "D_fake 1, noised 3, D_real 3, D_fake 3.")  # fmt: skip

    def test_diagnostics(self, folder, tmp_path):
        found = page([folder], tmp_path / "report.html")
        for title in (
            "Distances", "Distances, t 0 to ¼", "Distances, t ¾ to 1", "Gradient norm on x, by term",
            "Gradient norm of the networks", "Discriminator logits", "Discriminator accuracy", "Spread of x",
        ):  # fmt: skip
            assert f"<h4>{title}</h4>" in found.html
        assert "Healthy: fake at or below real" in found.text
        assert "sid 0.1 gan 0.02" in found.text

    def test_warnings_settings_and_next_steps(self, folder, tmp_path):
        found = page([folder], tmp_path / "report.html")
        assert "the critic lags <behind>: raise critic.lr" in found.text
        assert "alpha: 1.0" in found.text
        assert f"fewstep distill {folder} --out {folder} --train.images 8000" in found.text
        assert "None yet: they are written at the first checkpoint" in found.text

    def test_does_not_import_torch(self, folder, tmp_path):
        code = (
            "import sys, pathlib; from fewstep.report.page import write_report; "
            "write_report([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2])); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "report.html")], check=True)


class TestYoungRun:
    def test_settings_only(self, tmp_path):
        folder = tmp_path / "young"
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
        text = page([folder], tmp_path / "report.html").text
        assert "0 (0 % of 4,000)" in text
        assert "No final evaluation yet" in text
        assert "No evaluation yet. The next is at 1,000 images." in text
        assert "No pictures yet. The next are drawn at 1,000 images." in text
        assert "No numbers yet. The first are logged at 500 images." in text
        assert f"Resume fewstep distill {folder} --out {folder}" in text

    def test_stats_without_settings(self, tmp_path):
        with Tracker(tmp_path / "run") as tracker:
            tracker.log(10, {"custom": 1.0})
        found = page([tmp_path / "run"], tmp_path / "report.html")
        assert "This folder has no run.yaml." in found.text
        assert "<h4>custom</h4>" in found.html

    def test_no_clock(self, tmp_path):
        folder = make_run(tmp_path / "run")
        (folder / "times.jsonl").unlink()
        found = page([folder], tmp_path / "report.html")
        assert "FID and images seen" in found.html and "<h4>FID and training time" not in found.html

    def test_only_the_evaluation_before_training(self, tmp_path):
        found = page([make_run(tmp_path / "run", images=0)], tmp_path / "report.html")
        assert found.tables[0][1][:3] == ["runaSiD, during training, at 0 images", "1", "100.00"]
        assert "FID and images seen" not in found.html

    def test_points_have_no_pictures(self, tmp_path):
        folder = tmp_path / "mixture"
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"teacher": {"kind": "mixture"}}))
        text = page([folder], tmp_path / "report.html").text
        assert "The mixture's samples are points, so there is no FID" in text
        assert "No pictures: the samples of this teacher are points." in text

    def test_numbers_that_are_not_finite(self, tmp_path):
        with Tracker(tmp_path / "run") as tracker:
            for seen, value in enumerate((1.0, math.nan, math.inf, 2.0, None, "word", 1e300, 0.0, -1.0)):
                tracker.log(seen, {"gap_real": value, "gap_fake": math.nan, "x_mean": 3})
                tracker.log(seen, {"fid": value}, kind="evaluation")
        found = page([tmp_path / "run"], tmp_path / "report.html")
        chart = next(svg for svg in found.all("svg") if "Chart: Distances" in svg.get("aria-label", "").title())
        assert "from 1 to −1" in chart["aria-label"] and "D_fake" not in chart["aria-label"]
        assert 'd="' in found.html and not re.search(r'[ML][^"]*nan', found.html)


class TestSeveralRuns:
    def test_one_figure_each(self, tmp_path):
        runs = [make_run(tmp_path / name) for name in ("sid", "dmd2", "third")]
        found = page(runs, tmp_path / "report.html")
        assert "3 runs compared" in found.text
        fid = next(svg["aria-label"] for svg in found.all("svg") if "FID and images" in svg.get("aria-label", ""))
        assert all(f"{name} from 9.09 to 2.44" in fid for name in ("sid", "dmd2", "third"))
        assert "<h4>Distances: |x − D_fake|</h4>" in found.html and "<h4>Spread of x</h4>" in found.html
        together = found.all("img")[0]["alt"]
        assert together.endswith(
            "Rows, from the top: teacher of sid, teacher of dmd2, teacher of third, sid, dmd2, third."
        )

    def test_the_shared_teacher_is_shown_once(self, tmp_path):
        runs = [make_run(tmp_path / name) for name in ("one", "two")]
        shared = (runs[0] / "pictures" / "teacher.png").read_bytes()
        for index, run in enumerate(runs):
            (run / "pictures" / "teacher.png").write_bytes(shared)
            add_results(run, sha256=f"{index:064d}", fid=4.5 + index)
        found = page(runs, tmp_path / "report.html")
        assert found.all("img")[0]["alt"].endswith("Rows, from the top: teacher, one, two.")
        table = next(table for table in found.tables if table[0][0] == "Model")
        assert [row[0] for row in table[1:]] == [
            "fashion-mnist, 35 evaluationsa", "fashion-mnist, 5 evaluationsa", "oneaSiD", "twoaSiD",
        ]  # fmt: skip

    def test_settings_that_differ(self, tmp_path):
        runs = [
            make_run(tmp_path / f"a{alpha}", settings={"objective": {"method": "sid", "alpha": alpha}})
            for alpha in (1, 2)
        ]
        found = page(runs, tmp_path / "report.html")
        table = next(table for table in found.tables if table[0][0] == "Setting")
        assert table[1:] == [["objective.alpha", "1", "2"]]

    def test_same_names_and_repeated_folders(self, tmp_path):
        runs = [make_run(tmp_path / parent / "run", images=0) for parent in ("a", "b")]
        found = page([*runs, runs[0], tmp_path / "a" / ".." / "b" / "run"], tmp_path / "report.html")
        assert "2 runs compared" in found.text
        assert [row[0] for row in found.tables[0][1:]] == ["a/runSiD", "b/runSiD"]

    def test_mixed_kinds_and_sizes(self, tmp_path):
        runs = [make_run(tmp_path / "one"), tmp_path / "two"]
        runs[1].mkdir()
        (runs[1] / "run.yaml").write_text(yaml.safe_dump({"kind": "pretrain", "data": {"kind": "digits"}}))
        save_grid(images_of(80, channels=3, size=6), runs[1] / "pictures" / f"samples-{0:012d}.png", 10)
        found = page(runs, tmp_path / "report.html")
        assert "Pretraining" in found.text and "SiD" in found.text


def test_pretraining(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    run = {"kind": "pretrain", "data": {"kind": "digits"}, "train": {"images": 100, "evaluate_every": 50}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    with Tracker(folder) as tracker:
        tracker.log(0, {}, kind="evaluation")
        tracker.log(50, {"loss": 0.5, "gradient_norm": 1.0})
    for seen in (0, 50):
        draw(folder / "pictures", "samples", seen)
    spec = DenoiserSpec(net=DiTSpec(size=8, patch=4, width=16, depth=1, heads=1, num_classes=3))
    save_denoiser(folder / "teacher.safetensors", spec.build(), spec, {"data": "digits/train"})
    found = page([folder], tmp_path / "report.html")
    assert "A teacher, trained on digits/train" in found.text
    assert "<h4>Denoising loss</h4>" in found.html and "<h4>Gradient norm of the networks</h4>" in found.html
    assert [image["alt"].split(",")[0] for image in found.all("img")] == [
        "Grid of samples at 50 images", "Ten samples from the same noise and labels",
    ]  # fmt: skip
    assert f"fewstep distill RECIPE --teacher.path {folder}" in found.text
    run_snippet(found, tmp_path)


def test_snippet_of_a_student(tmp_path):
    folder = make_run(tmp_path / "it's a run")
    spec = DenoiserSpec(net=DiTSpec(size=8, patch=4, width=16, depth=1, heads=1, num_classes=3))
    save_generator(folder / "student.safetensors", Generator(spec.build(), (0.5,)), spec, {"teacher": "tiny"})
    found = page([folder], tmp_path / "report.html")
    assert f"fewstep sample {shlex.quote(str(folder))} --seeds 0-63 --out samples.png" in found.text
    run_snippet(found, tmp_path)


def run_snippet(found: Page, folder: Path) -> None:
    """The page's Python does what it says."""
    code = found.html.split('<code class="python">')[1].split("</code>")[0]
    unescaped = code.replace("&#39;", "'").replace("&#34;", '"').replace("&lt;", "<").replace("&gt;", ">")
    here = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(unescaped, "snippet", "exec"), {})
    finally:
        os.chdir(here)
    assert Image.open(folder / "samples.png").size == (8 * 20 + 4, 8 * 20 + 4)


class TestHostileAndDamaged:
    def test_names_are_escaped(self, tmp_path):
        evil = "<script>alert('x')</script>"
        folder = make_run(tmp_path / evil.replace("/", "_"), settings={"teacher": {"kind": evil}})
        add_results(folder)
        results = json.loads((folder / "results.json").read_text())
        results["rows"][0]["name"] = f"{evil}, 35 evaluations"
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "student.json").write_text(json.dumps({"metadata": {"card": {"teacher": evil, "hardware": evil}}}))
        with Tracker(folder, resume_from=4000) as tracker:
            tracker.log(4001, {evil: 1.0, f'x_gradient/"{evil}': 1.0})
            tracker.warn(4001, evil, evil)
        for folders in ([folder], [folder, make_run(tmp_path / "other")]):
            found = page(folders, tmp_path / "report.html")
            assert not found.all("script")
            assert evil in found.text

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["stats.jsonl", "times.jsonl", "results.json", "student.json", "run.yaml"])
    @pytest.mark.parametrize("content", [b"{]\n", b"[1, 2]\n", b"\xff\xfe\n", b""])
    def test_damaged_files_are_named(self, tmp_path, name, content):
        folder = make_run(tmp_path / "run")
        add_results(folder)
        (folder / name).write_bytes(content)
        found = page([folder], tmp_path / "report.html")
        if content or name.endswith(".json"):
            assert name in found.text and "omitted" in found.text

    @pytest.mark.parametrize("name", ["teacher", "student-000000004000", "panel-000000004000"])
    def test_half_written_pictures(self, tmp_path, name):
        folder = make_run(tmp_path / "run")
        path = folder / "pictures" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
        found = page([folder], tmp_path / "report.html")
        assert f"pictures/{name}.png cannot be read and is omitted" in found.text
        assert found.all("img")

    def test_odd_settings_and_rows(self, tmp_path):
        folder = make_run(tmp_path / "run", settings={"objective": 3, "generator": {"sigmas": 2}, "train": None})
        rows = [{}, 3, {"name": "student", "fid": "nan", "calls": "one"}, {"name": "t, 35 evaluations", "fid": 0}]
        (folder / "results.json").write_text(json.dumps({"rows": rows, "command": ["a"]}))
        assert "Unknown method" in page([folder], tmp_path / "report.html").text


class TestErrors:
    def test_no_folder(self, tmp_path):
        with pytest.raises(FileError, match="at least one run folder must be given"):
            write_report([], tmp_path / "report.html")

    def test_absent(self, tmp_path):
        with pytest.raises(FileError, match=r"nowhere, which does not exist"):
            write_report([tmp_path / "nowhere"], tmp_path / "report.html")

    def test_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match="file, which is a file"):
            write_report([tmp_path / "file"], tmp_path / "report.html")

    def test_empty(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileError, match=r"empty is empty. Try: start a run in it"):
            write_report([tmp_path / "empty"], tmp_path / "report.html")

    def test_another_folder(self, tmp_path):
        (tmp_path / "run.txt").touch()
        with pytest.raises(FileError, match=r"is not a run folder \(no run\.yaml"):
            write_report([tmp_path], tmp_path / "report.html")
        assert not (tmp_path / "report.html").exists()

    def test_out_is_a_folder(self, tmp_path):
        with pytest.raises(FileError, match=r"must be a file, got the folder"):
            write_report([make_run(tmp_path / "run", images=0)], tmp_path)


class TestSize:
    @pytest.mark.slow
    def test_large_pictures(self, tmp_path):
        """Noise does not compress: grids of 3 x 48 x 48 images are made smaller."""
        runs = []
        for name in ("one", "two"):
            runs.append(make_run(tmp_path / name, images=1000))
            for path in (runs[-1] / "pictures").glob("*.png"):
                rows = 10 if path.name.startswith("panel") else 8
                save_grid(images_of(10 * rows, channels=3, size=48), path, 10)
        for folders in (runs[:1], runs):
            out = write_report(folders, tmp_path / "report.html")
            assert 200_000 < out.stat().st_size < 3_000_000

    def test_long_runs_are_thinned(self):
        points = [(x, float(x)) for x in range(10_001)]
        thin = charts._thinned(points)
        assert len(thin) <= 200 and thin[0][0] == thin[0][1] == 25.0

    def test_gaps_become_transparent_and_images_stay(self, tmp_path):
        path = save_grid(images_of(20), tmp_path / "grid.png", 10)
        grid = Image.open(path).convert("L")
        clear = pictures._without_gaps(grid)
        pixels = np.asarray(clear)
        assert (pixels[:4, :, 1] == 0).all() and (pixels[:, 20:24, 1] == 0).all()
        assert (pixels[4:20, 4:20, 1] == 255).all()
        assert (pixels[..., 0] == np.asarray(grid)).all()
        other = Image.fromarray(np.zeros((30, 44), np.uint8))
        assert pictures._without_gaps(other) is other


class TestChart:
    @pytest.mark.parametrize("wide", [True, False])
    @pytest.mark.parametrize("low, high", [(1, 1), (1e-9, 1e9), (4.9, 5.1), (3, 3000), (1e-30, 2e-30), (97, 4e6)])
    def test_every_range_has_ticks(self, low, high, wide):
        chart = Chart("c", "", [Series("s", [(1, low), (500, high)], 0)], wide=wide)
        svg = chart.svg()
        assert len(re.findall("<text", svg)) >= 3

    def test_times_are_round(self):
        chart = Chart("c", "", [Series("s", [(60, 3), (9000, 2)], 0)], wide=True, time=True)
        labels = re.findall(r">([\d.]+ (?:s|min|h|d))<", chart.svg())
        assert set(labels) == {"1 min", "2 min", "5 min", "10 min", "30 min", "1 h", "2 h"}

    def test_colours_follow_the_page(self):
        svg = Chart("c", "", [Series("s", [(1, 2), (2, 3)], 1)]).svg()
        assert "var(--s1)" in svg and "#c8500a" not in svg and "#ffffff" not in svg  # no white box on a dark page

    def test_picture(self, tmp_path):
        chart = Chart("c", "", [Series("s", [(1, 2), (2, 3)], 1)], lines=[("teacher", 1.5)])
        with Image.open(save_charts([chart, chart], tmp_path / "new" / "c.png")) as picture:
            assert picture.width > picture.height


@pytest.mark.parametrize("tail", ["", ", guidance 2", ", stochastic", ", guidance 2, stochastic"])
def test_teachers_are_known_by_their_evaluations(tail):
    rows = [
        {"name": f"world, 19 evaluations{tail}", "fid": 1.0, "calls": 19},
        {"name": "a, student", "fid": 2.0, "calls": 4},
    ]
    assert teacher_row(rows) is rows[0]


@pytest.mark.parametrize("way", ["sigmas", "timesteps", "times"])
def test_network_calls_are_known_whichever_way_a_run_names_its_noise(way, tmp_path):
    generator = {"sigmas": None, "timesteps": None, "times": None} | {way: [1.0, 0.5, 0.25]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"kind": "distill", "generator": generator}))
    assert RunFolder(tmp_path, "a", 0).calls == 3


RECIPES = sorted(name for name, path in list_recipes().items() if "kind: pretrain" not in path.read_text())


def record_of(name: str, folder: Path) -> Path:
    """A young run of a recipe, with the record that a run writes."""
    make_run(folder, images=1000)
    dump_run(load_run(name), folder / "run.yaml")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipes_record_has_a_page(name, tmp_path):
    """Whatever way a run names its noise levels, teacher and method: the page says the calls and where they are."""
    run = load_run(name)
    folder = record_of(name, tmp_path / "run")
    found = page([folder], tmp_path / "report.html")
    given = run.generator.sigmas or run.generator.timesteps or run.generator.times
    facts = found.html[found.html.index("Network calls per image</dt>") :][:300]
    assert f"<dd>{len(given)} (" in facts and ", ".join(f"{value:g}" for value in given) in facts
    unit = "σ/α = " if run.generator.sigmas else "timesteps " if run.generator.timesteps else "t = "
    assert unit in facts
    assert "Unknown method" not in found.text and "unknown" not in facts


@pytest.mark.parametrize("name", sorted(set(list_recipes()) - set(RECIPES)))
def test_every_pretraining_recipes_record_has_a_page(name, tmp_path):
    folder = record_of(name, tmp_path / "run")
    assert "A teacher, trained on" in page([folder], tmp_path / "report.html").text


@pytest.mark.parametrize(
    "warnings", [["the covariance is singular", "too few images"], "the covariance is singular; too few images"]
)
def test_warnings_stand_beside_the_numbers(tmp_path, warnings):
    """A list as results have it, or one text as lines of stats.jsonl (and older results) have it: never letter by letter."""
    folder = make_run(tmp_path / "run")
    add_results(folder)
    results = json.loads((folder / "results.json").read_text())
    results["rows"][2]["warnings"] = warnings
    (folder / "results.json").write_text(json.dumps(results))
    found = page([folder], tmp_path / "report.html")
    texts = [warnings] if isinstance(warnings, str) else warnings
    for text in texts:
        assert f"Warning: {text}." in found.text
    assert found.text.count("Warning:") == len(texts)
    marks = [row[0][-4:] for row in found.tables[0][1:]]
    assert found.tables[0][3][0].startswith("runb") and found.tables[0][1][0].endswith("a"), marks
    assert "not comparable" not in found.text, "the protocol is one: only the warnings differ"


def test_warnings_of_training_stand_below_its_numbers(tmp_path):
    with Tracker(tmp_path / "run") as tracker:
        for seen in (0, 10):
            tracker.log(seen, {"fid": 3.0 + seen, "warnings": "10 images for 64 features"}, "evaluation")
    assert page([tmp_path / "run"], tmp_path / "report.html").text.count("Warning: 10 images for 64 features.") == 2


def test_kid_is_readable_wherever_it_is_shown(tmp_path):
    with Tracker(tmp_path / "run") as tracker:
        tracker.log(0, {"kid": 0.00045, "kid_std": 0.0001}, "evaluation")
        tracker.log(10, {"kid": 0.0000045, "kid_std": 0.0001}, "evaluation")
    table = next(
        table for table in page([tmp_path / "run"], tmp_path / "r.html").tables if table[0][0] == "Images seen"
    )
    assert [row[2] for row in table] == ["KID × 10³", "0.45 ± 0.10", "0.0045 ± 0.10"]
