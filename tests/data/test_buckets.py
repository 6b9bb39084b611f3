"""Aspect-ratio buckets: which sizes there are, where each image goes, and batches of one size each."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep.system.errors import DataError, SettingsError, TeacherError

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.data import Buckets, BucketStream, Draw, ImageDataset, Prepared
from fewstep.methods import DMD2
from fewstep.methods.heads import ConvHead
from fewstep.run.settings import load_run, text_to_image_teacher
from fewstep.run.specs import DistillRun
from fewstep.system.console import note
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.sizes import bucket_sizes
from fewstep.training import panels
from fewstep.training.task import Micro
from tests.support.pipelines import prepared, tiny_sdxl

SDXL = {"block_out_channels": [320, 640, 1280]}
SIZES = [[16, 16], [24, 12], [12, 24]]  # width, height


@pytest.fixture(autouse=True)
def _fresh_notes():
    note.cache_clear()


def test_automatic_buckets_are_those_of_sdxls_trainers():
    found = {(8 * width, 8 * height) for height, width in bucket_sizes(SDXL, 8, (128, 128), "auto", "x")}
    known = {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (896, 1152), (832, 1216), (768, 1344)}
    assert known <= found and len(found) == 13
    for width, height in found:
        assert width % 64 == height % 64 == 0 and 0.9 * 2**20 < width * height <= 2**20
        assert (height, width) in found and max(width, height) <= 2 * min(width, height)


def test_buckets_that_do_not_fit_are_refused():
    with pytest.raises(
        TeacherError, match=r"teacher.buckets must be multiples of 32 pixels, .* got \[1000, 768\]. Try: \[992"
    ):
        bucket_sizes(SDXL, 8, (128, 128), ((1024, 1024), (1000, 768)), "x")
    with pytest.raises(
        TeacherError, match=r"must hold the size that is scored and drawn, \[1024, 1024\], got \[768, 768\]"
    ):
        bucket_sizes(SDXL, 8, (128, 128), ((768, 768),), "x")


def test_an_iteration_has_a_bucket_in_proportion_to_its_images():
    draw = Draw([6, 0, 2], 3)
    drawn = [draw.at(iteration) for iteration in range(10_000)]
    counts = Counter(bucket for bucket, _ in drawn)
    assert counts.keys() == {0, 2} and counts[0] == pytest.approx(7_500, rel=0.03)
    for bucket in counts:  # of each, how often it was drawn before
        assert [earlier for found, earlier in drawn if found == bucket] == list(range(counts[bucket]))
    again = Draw([6, 0, 2], 3)
    assert again.at(9_999) == drawn[-1] and again.at(5) == drawn[5]  # nothing depends on what was asked before


def test_batches_have_one_size_and_all_images_come_equally_often():
    def part(count, side, first):
        numbers = torch.arange(first, first + count)
        images = torch.zeros(count, 1, side, 2, dtype=torch.uint8)
        return ImageDataset(
            "x", images, numbers, 20, tuple(map(str, range(20))), torch.zeros(count, 4) + numbers[:, None]
        )

    stream = BucketStream(Buckets("x", (part(5, 2, 0), part(10, 3, 5)), ((2, 2), (3, 2))), Draw([5, 10], 0), 4, 0)
    seen = Counter()
    for position in range(0, 4 * 600, 2):
        x, labels = stream.batch(position, 2, position + 2)
        assert x.shape[2:] == ((2, 2) if labels[0] < 5 else (3, 2)) and (labels < 5).all() == (labels < 5).any()
        assert torch.equal(stream.frames(position, 2)[:, 0].long(), labels)
        seen.update(labels.tolist())
        places = [stream.place(position // 4 * 4 + offset) for offset in range(4)]  # of any number of processes
        assert [place - places[0][1] for _, place in places] == [0, 1, 2, 3] and len({part for part, _ in places}) == 1
    assert len(seen) == 15 and all(120 < count < 200 for count in seen.values())


def test_a_head_reads_a_wide_map_to_its_end():
    head = ConvHead(8, 6).requires_grad_(False)
    x = torch.randn(1, 8, 6, 15, requires_grad=True)
    (slope,) = torch.autograd.grad(head(x).sum(), x)
    assert (slope.abs().sum((0, 1, 2)) > 0).all()


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "sdxl")


@pytest.fixture(scope="module")
def world(sdxl, tmp_path_factory):
    """A run in buckets and its prepared images: three wide, two tall, one square, one photograph stored lying."""
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    sizes = {"w0": (60, 28), "w1": (48, 24), "w2": (50, 25), "t0": (20, 41), "t1": (24, 48), "s0": (30, 31)}
    rng = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        noise.save(root / f"images/{name}.png")
        (root / f"images/{name}.txt").write_text(f"a picture {name}")
    turned = Image.Exif()
    turned[274] = 6
    lying = Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    lying.save(root / "images/t2.jpg", exif=turned)
    (root / "images/t2.txt").write_text("a picture t2")
    run = {
        "kind": "distill",
        "teacher": {"kind": "diffusers", "path": str(sdxl), "prompts": str(root / "p"), "buckets": SIZES},
        "generator": {"timesteps": [999, 499], "lora": {"rank": 2}},
        "critic": {"lora": {"rank": 2}},
        "objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 5e-3, "guidance": 2.0},
        "data": {"kind": "prepared", "path": str(root / "p")},
        "train": {
            "images": 12,
            "batch_size": 4,
            "micro_batch": 2,
            "evaluate_every": None,
            "precision": "fp32",
            "ema_half_life": 0,
        },
        "evaluation": {"samples": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    arguments = ["--images", str(root / "images"), "--dtype", "float32", "--device", "cpu", "--batch", "2"]
    assert main(["prepare", str(root / "run.yaml"), *arguments]) == 0
    return root, run


def test_images_go_to_the_bucket_of_the_nearest_shape(world, sdxl):
    root, _ = world
    buckets = Prepared(path=root / "p").load_buckets()
    names = {
        size: sorted(part.class_names[label].removeprefix("a picture ") for label in part.labels)
        for size, part in zip(buckets.sizes, buckets.parts, strict=True)
    }
    assert names == {(16, 16): ["s0"], (12, 24): ["w0", "w1", "w2"], (24, 12): ["t0", "t1", "t2"]}  # height, width
    teacher = DiffusersTeacher(path=str(sdxl))
    wide = buckets.parts[buckets.sizes.index((12, 24))]
    first = [wide.class_names[label] for label in wide.labels].index("a picture w0")
    picture = Image.open(root / "images/w0.png").crop((2, 0, 58, 28)).resize((24, 12), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(wide.batch(torch.tensor([first]))[0], teacher.codec().encode(pixels))
    assert wide.frames[first].tolist() == [28, 60, 0, 1]
    tall = buckets.parts[buckets.sizes.index((24, 12))]
    upright = [tall.class_names[label] for label in tall.labels].index("a picture t2")
    assert tall.frames[upright].tolist() == [40, 20, 0, 0]
    with pytest.raises(DataError, match=r"must hold images of one size, got buckets of several. Try: teacher.buckets"):
        Prepared(path=root / "p").load()


def test_counts_are_said_and_a_second_time_nothing_is_made(world, capsys):
    root, _ = world
    assert main(["prepare", str(root / "run.yaml"), "--images", str(root / "images"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "7 images (7 existed already)" in said and "   24 x 12            3 images" in said


def test_a_student_of_buckets_is_sampled_at_any_of_them(world, tmp_path, monkeypatch, capsys):
    root, _ = world
    monkeypatch.setattr(panels, "TEACHER_CALLS", 2)
    assert main(["distill", str(root / "run.yaml"), "--out", str(tmp_path / "run"), "--processes", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    assert any(line.get("x_gradient/gan") for line in lines)
    for size, wanted in (("24x12", (24, 12)), ("12x24", (12, 24)), (None, (16, 16))):
        more = ["--size", size] if size else []
        arguments = ["--prompt", "a cat", "--seeds", "0", "--out", str(tmp_path / f"{size}"), "--device", "cpu"]
        assert main(["sample", str(tmp_path / "run"), *arguments, *more]) == 0
        assert Image.open(tmp_path / f"{size}/000000.png").size == wanted
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--size", "32x16", "--out", str(tmp_path / "x.png")]) == 1
    assert "got 32x16. Try: 16x16, 24x12, 12x24" in capsys.readouterr().err.replace("\n", " ")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "| sizes of training | 16 x 16, 24 x 12, 12 x 24 |" in (tmp_path / "out/README.md").read_text()


def test_every_update_has_one_size_and_the_conditions_of_it(world, tmp_path):
    _, run = world
    task = DistillRun.model_validate(run).trainer(tmp_path / "run").task
    seen, network = set(), task.teacher.denoiser.net
    network.register_forward_hook(
        lambda _, inputs, more, out: seen.add((inputs[0].shape[2:], tuple(more["time_ids"][0].tolist()))),
        with_kwargs=True,
    )
    for images in range(0, 20, 4):
        seen.clear()
        task.update(images, [Micro(images, 2, 0), Micro(images + 2, 2, 0)])
        ((height, width), ids), *more = seen
        # real pictures are conditioned as generated ones are: a discriminator would tell them apart by their own sizes
        assert not more and ids == (2 * height, 2 * width, 0, 0, 2 * height, 2 * width)


def test_a_pipelines_network_is_told_each_pictures_own_size(world, sdxl, tmp_path, monkeypatch):
    from fewstep.training import pretrain

    root, _ = world
    run = {
        "kind": "pretrain",
        "pipeline": {"kind": "diffusers", "path": str(sdxl), "prompts": str(root / "p"), "buckets": SIZES},
        "data": {"kind": "prepared", "path": str(root / "p")},
        "noise": {"kind": "uniform", "low": 0.0, "high": 1.0},
        "train": {"images": 20, "batch_size": 4, "precision": "fp32", "evaluate_every": None},
        "evaluation": {"samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert text_to_image_teacher(str(tmp_path / "run.yaml")).buckets == tuple(map(tuple, SIZES))
    seen, loss = [], pretrain.denoising_loss
    monkeypatch.setattr(pretrain, "denoising_loss", lambda *args: (seen.append((args[1], args[4])), loss(*args))[1])
    task = load_run(tmp_path / "run.yaml").trainer(tmp_path / "run").task
    for images in range(0, 40, 4):
        task.update(images, [Micro(images, 4, 0)])
    told = {(tuple(x.shape[2:]), tuple(ids.tolist())) for x, cond in seen for ids in cond["time_ids"]}
    assert ((6, 12), (28, 60, 0, 1, 12, 24)) in told and ((12, 6), (40, 20, 0, 0, 24, 12)) in told
    assert {shape for shape, _ in told} <= {(6, 12), (12, 6), (8, 8)}


def test_what_does_not_fit_buckets_is_refused(world, sdxl, tmp_path):
    root, run = world

    def trained(**changes):
        changed = {
            name: value | changes.get(name, {}) if isinstance(value, dict) else value for name, value in run.items()
        }
        DistillRun.model_validate(changed).trainer(tmp_path / "run")

    with pytest.raises(DataError, match="must hold images of one size"):
        trained(teacher={"buckets": ()})
    with pytest.raises(SettingsError, match=r"teacher.buckets must be those that .* got none of 24 x 12 pixels"):
        trained(teacher={"buckets": SIZES[:1] + SIZES[2:]})
    with pytest.raises(
        SettingsError, match=r"teacher.buckets must be left out for an objective that regresses on pairs"
    ):
        DistillRun.model_validate(run | {"objective": {"method": "dmd"}, "pairs": str(root)}).trainer(tmp_path / "run")
    with pytest.raises(SettingsError, match=r"data must be prepared images where teacher.buckets"):
        DistillRun.model_validate(run | {"data": {"kind": "folder", "path": str(root)}}).trainer(tmp_path / "run")
    teacher = DiffusersTeacher(path=str(sdxl), prompts=root / "p", buckets=tuple(map(tuple, SIZES)))
    assert teacher.outline()[0].net.sample_shape in ((4, 6, 12), (4, 12, 6))  # the largest is planned
    view = teacher.load().at(12, 24)
    assert view.shape == (4, 6, 12) and view.codec.shape == (3, 12, 24)
    assert DMD2(gan_weight=0).make_critic(view, view.player()).head is None


def test_a_shift_by_resolution_is_one_for_all_buckets_and_said(tmp_path, capsys):
    spec, _ = prepared("flux", tmp_path)
    teacher = spec.model_copy(update={"buckets": ((16, 16), (32, 16))}).load()
    assert teacher.denoiser.schedule == spec.load().denoiser.schedule
    assert "shifts by resolution, from 1.5" in (said := capsys.readouterr().err) and "sampled at 1.5" in said
    spec.model_copy(update={"buckets": ((16, 16), (32, 16)), "shift": 2.0}).load()
    assert "over the buckets" not in capsys.readouterr().err


def test_prompts_alone_train_at_all_sizes(world, tmp_path):
    _, run = world
    run = {name: value for name, value in run.items() if name != "data"} | {
        "objective": run["objective"] | {"gan_weight": 0}
    }
    task = DistillRun.model_validate(run).trainer(tmp_path / "run").task
    sizes = set()
    for images in range(0, 40, 4):
        made, _ = task._rollout(Micro(images, 2, 0), "generator rollout", 1, gradient=False)
        sizes.add(tuple(made.x.shape[2:]))
    assert sizes == {(8, 8), (6, 12), (12, 6)}
