"""Damaged and hostile files of every format that a command reads, made by code; none is stored.

A format is a small valid file, the place of the part that is damaged, and what reads it. Damages are of two sorts: those that
any file can have (cut, empty, other bytes, a device in its place), and those that a format's own structure allows.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.data.dataset import ImageDataset
from fewstep.diffusion.generator import Generator
from fewstep.evaluation.reference import Reference
from fewstep.evaluation.small_features import Pixels
from fewstep.formats.model import DenoiserSpec, save_generator
from fewstep.networks import DiTSpec
from fewstep.run.recipes import list_recipes
from fewstep.system.tracking import Tracker
from tests.support.golden import golden
from tests.support.images import write_tar, write_zip
from tests.support.places import ROOT
from tests.support.published import write_published

Damage = Callable[[Path, bytes], None]
"""Spoils the file at a path whose whole content is given."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        make: folder -> the valid file in it, which a damage replaces.
        commands: command lines; FILE and FOLDER stand for the file and its folder, OUT for a place to write. A first word in
            capitals names a reader of `tests.hostile.serve` instead of a command.
        own: damages of this format, by name.
        subject: a format of `tests.hostile.subjects`, whose reader takes the damages that any file can have, but for a few that
            go to a command too: the way to the reader is the same for all.
        whole: whether the undamaged file is read; the published Fashion-MNIST cannot be made here.
    """

    make: Callable[[Path], Path]
    commands: tuple[tuple[str, ...], ...]
    own: dict[str, Damage] = field(default_factory=dict)
    whole: bool = True
    subject: str = ""


def _bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path, whole: path.write_bytes(change(whole))


def _noise(seed: int, share: float) -> Damage:
    """Other bytes at a share of the places."""

    def change(whole: bytes) -> bytes:
        draw, spoilt = random.Random(seed), bytearray(whole)
        for _ in range(max(1, int(share * len(whole)))):
            spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        return bytes(spoilt)

    return _bytes(change)


def _replaced(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, _whole: bytes) -> None:
        path.unlink()
        make(path)

    return damage


ANY: dict[str, Damage] = {
    "empty": _bytes(lambda whole: b""),
    "a byte": _bytes(lambda whole: b"\x80"),
    "the first quarter": _bytes(lambda whole: whole[: len(whole) // 4]),
    "half": _bytes(lambda whole: whole[: len(whole) // 2]),
    "all but a byte": _bytes(lambda whole: whole[:-1]),
    "without its head": _bytes(lambda whole: whole[16:]),
    "zeros": _bytes(lambda whole: bytes(len(whole))),
    "random": _bytes(lambda whole: random.Random(1).randbytes(4096)),
    "text": _bytes(lambda whole: b"<!DOCTYPE html><title>404</title>" * 20),
    "gzip": _bytes(gzip.compress),
    "a little noise": _noise(1, 0.0005),
    "noise": _noise(2, 0.01),
    "control characters": _bytes(lambda whole: b"\x1b[2J\x07\x00" * 99),
    "a folder": _replaced(Path.mkdir),
    "a pipe": _replaced(os.mkfifo),
    "an endless device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a dangling link": _replaced(lambda path: path.symlink_to("/nowhere/at/all")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
}


TO_COMMANDS = {"half", "control characters", "a folder", "a pipe"}
TO_READERS = {"empty", "without its head", "zeros", "an endless device", "a link to itself"}


def _run(folder: Path) -> Path:
    (folder / "run.yaml").write_text(list_recipes()["digits/sid"].read_text(encoding="utf-8"))
    return folder / "run.yaml"


def _run_folder(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        _run(folder)
        with Tracker(folder) as tracker:
            tracker.log(50, {"x_mean": 0.1, "x_spread": 0.5})
            tracker.log(50, {"fid": 12.5, "protocol": "pixels"}, "evaluation")
        row = {"name": "a", "fid": 1.0, "n": 5, "protocol": "p", "calls": 1, "warnings": []}
        (folder / "results.json").write_text(json.dumps({"rows": [row]}))
        return folder / name

    return make


def _edm(folder: Path) -> Path:
    denoiser = golden("edm_ddpmpp")[0]
    write_published(folder / "net.pkl", denoiser)
    return folder / "net.pkl"


def _dmd2(folder: Path) -> Path:
    net = golden("edm_adm")[0].net
    kept = {f"model.{k}": v for k, v in net.state_dict().items() if not k.startswith("map_augment")}
    torch.save(kept, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def _student(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2))
        save_generator(folder / "student.safetensors", Generator(spec.build(), [0.8]), spec, {})
        return folder / name

    return make


def _statistics(folder: Path) -> Path:
    images = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = ImageDataset("made", images)
    Reference.from_dataset(dataset, Pixels((1, 8, 8), "cpu")).save(folder / "reference.npz")
    return folder / "reference.npz"


def _png(seed: int = 0, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size), np.uint8)).save(file, "PNG")
    return file.getvalue()


def _scored(reference: str) -> tuple[str, ...]:
    """The command that compares a shipped teacher's pictures with a reference."""
    return *[
        "eval",
        "digits",
        "--evaluations",
        "1",
        "--samples",
        "8",
        "--processes",
        "1",
        "--out",
        "OUT.json",
        "--reference",
    ], reference


def _pictures(folder: Path) -> Path:
    for number in range(6):
        (folder / f"{number}.png").write_bytes(_png(number))
    return folder / "2.png"


def _zip(folder: Path) -> Path:
    return write_zip(folder / "images.zip", {f"{number}.png": _png(number) for number in range(4)})


def _tar(folder: Path) -> Path:
    members = {}
    for number in range(4):
        members |= {f"{number}.png": _png(number), f"{number}.txt": b"a picture"}
    return write_tar(folder / "images.tar", members)


def _lmdb(folder: Path) -> Path:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 24) as database, database.begin(write=True) as writer:
        writer.put(b"images_shape", b"8 3 8 8")
        writer.put(b"labels_shape", b"8")
        for number in range(8):
            writer.put(f"images_{number}_data".encode(), bytes(192))
            writer.put(f"labels_{number}_data".encode(), struct.pack("<q", number))
    return folder / "data.mdb"


def _idx(folder: Path) -> Path:
    images = gzip.compress(struct.pack(">IIII", 2051, 60000, 28, 28) + bytes(60000 * 784))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(images)
    return folder / "train-images-idx3-ubyte.gz"


def _lora(folder: Path) -> Path:
    save_file(_ADAPTER, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def _pipeline(folder: Path) -> Path:
    """The index of a pipeline whose components are missing."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "prompts.txt").write_text("a cat\n")
    return folder / "model_index.json"


def _old(folder: str, name: str) -> Callable[[Path], Path]:
    """A folder that fewstep 0.1.0 wrote, of which a file is damaged."""

    def make(place: Path) -> Path:
        shutil.copytree(ROOT / "tests" / "files-0.1.0" / folder, place, dirs_exist_ok=True)
        return place / name

    return make


def _of_subject(name: str, file: str) -> Callable[[Path], Path]:
    """What `tests.hostile.subjects` makes."""

    def make(place: Path) -> Path:
        from tests.hostile.subjects import SUBJECTS

        SUBJECTS[name].make(place)
        return place / file

    return make


def _peft(folder: Path) -> Path:
    """One of the LoRA files."""
    whole = folder.with_name("all-lora")
    whole.mkdir()
    _of_subject("LoRA", "peft")(whole)
    shutil.move(whole / "peft" / "adapter_model.safetensors", folder)
    shutil.move(whole / "peft" / "adapter_config.json", folder)
    return folder / "adapter_config.json"


def _text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    return make


_PLACE = "unet.down_blocks.0.attentions.0.proj_in"
_ADAPTER = {f"{_PLACE}.lora_A.weight": torch.ones(4, 8), f"{_PLACE}.lora_B.weight": torch.ones(8, 4)}


def _adapter(metadata: dict[str, str] | None = None, **changed: torch.Tensor) -> Damage:
    tensors = dict(_ADAPTER)
    for name, value in changed.items():
        tensors[f"{_PLACE}.lora_{name}.weight" if name in "AB" else f"{_PLACE}.{name}"] = value
    return lambda path, _whole: save_file(tensors, path, metadata)


def _json_of(change: Callable[[dict], object]) -> Damage:
    def damage(path: Path, whole: bytes) -> None:
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))

    return damage


def _net(key: str, value: object) -> Damage:
    return _json_of(lambda record: record["metadata"]["denoiser"]["net"].update({key: value}))


def _yaml(text: str) -> Damage:
    return _bytes(lambda whole: whole + text.encode())


def _npz(**arrays: object) -> Damage:
    return lambda path, _whole: np.savez(path, **arrays)


def _claims(shape: str, dtype: str = "<f8") -> Damage:
    """An .npy member whose header claims more than the file has."""

    def damage(path: Path, _whole: bytes) -> None:
        head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
        write_zip(path, {"mu.npy": member, "sigma.npy": member})

    return damage


def _header(claim: object) -> Damage:
    head = json.dumps(claim).encode()
    return _bytes(lambda whole: struct.pack("<Q", len(head)) + head)


class _Runs:
    """Would make a file when unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/a-pickle-ran",)


def _bomb(path: Path, _whole: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(200_000_000))


def _large_picture(path: Path, _whole: bytes) -> None:
    data = bytearray(_png())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    path.write_bytes(bytes(data))


def _member(name: str, **facts: object) -> Damage:
    def damage(path: Path, _whole: bytes) -> None:
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo(name)
            for key, value in facts.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(_png()) if member.size else None)

    return damage


POISON = torch.full((4, 8), float("nan"))
FORMATS: dict[str, Format] = {
    "run.yaml": Format(
        _run,
        (("distill", "FILE", "--dry-run"), ("plan", "FILE")),
        {
            "aliases that multiply": _bytes(
                lambda _: (
                    b"a0: &a0 [1,2]\n"
                    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 13))
                )
            ),
            "deep": _bytes(lambda _: b"[" * 50_000),
            "a tag that runs": _bytes(lambda _: b"kind: !!python/object/apply:os.system ['touch /tmp/a-yaml-ran']\n"),
            "a key twice": _yaml("kind: distill\n"),
            "an unknown key": _yaml('"tr\\x1b[31main": 3\n'),
            "infinite": _yaml("flip: .inf\n"),
            "a list": _bytes(lambda _: b"- 1\n- 2\n"),
            "a number": _bytes(lambda _: b"7"),
            "UTF-16": _bytes(lambda whole: whole.decode().encode("utf-16")),
            "a huge number": _bytes(lambda whole: whole.replace(b"images: 60000", b"images: 1" + b"0" * 5000)),
            "a negative batch": _bytes(lambda whole: whole.replace(b"batch_size: 64", b"batch_size: -64")),
            "a NaN rate": _bytes(lambda whole: whole.replace(b"lr: 2.0e-4", b"lr: .nan")),
        },
        subject="run.yaml",
    ),
    "stats.jsonl": Format(
        _run_folder("stats.jsonl"),
        (("report", "FOLDER"),),
        {
            "values of other types": _yaml('{"images": "many", "kind": []}\n'),
            "infinite": _yaml('{"images": 1e400, "kind": "train", "x_mean": NaN}\n'),
            "deep": _yaml('{"images": ' + "[" * 20_000 + "\n"),
            "markup": _yaml('{"images": 60, "kind": "<script>", "code": "</script><script>alert(1)"}\n'),
        },
        subject="run records",
    ),
    "results.json": Format(
        _run_folder("results.json"),
        (("report", "FOLDER"),),
        {
            "no rows": _bytes(lambda _: b'{"rows": 3}'),
            "odd rows": _bytes(lambda _: b'{"rows": [1, null, {"fid": {}}]}'),
            "rows of markup": _bytes(lambda whole: whole.replace(b'"a"', b'"<script>alert(1)</script>"')),
        },
        subject="run records",
    ),
    "run.yaml of a report": Format(_run_folder("run.yaml"), (("report", "FOLDER"),), subject="run records"),
    "net.pkl": Format(
        _edm,
        (
            ("sample", "FILE", "--evaluations", "1", "--seeds", "0", "--out", "OUT.png"),
            ("import", "FILE", "--out", "OUT"),
        ),
        {
            "code": _bytes(lambda _: pickle.dumps({"ema": _Runs()})),
            "numbers": _bytes(lambda _: pickle.dumps([1, 2, 3])),
            "deep": _bytes(lambda _: b"\x80\x04" + b"]" * 1000 + b"a" * 999 + b"."),
            "memo bomb": _bytes(lambda _: b"\x80\x04" + b"(" * 100_000 + b"."),
            "a long string": _bytes(lambda _: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x."),
            "protocol 0": _bytes(lambda _: pickle.dumps({"ema": 1}, protocol=0)),
        },
        subject="EDM pickle",
    ),
    "pytorch_model.bin": Format(
        _dmd2,
        (("import", "FILE", "--out", "OUT"),),
        {
            "code": lambda path, _: torch.save({"model.x": _Runs()}, path),
            "a list": lambda path, _: torch.save([1, 2], path),
            "no network": lambda path, _: torch.save({"model.x": torch.ones(3)}, path),
            "integers": lambda path, _: torch.save(
                {k: v.to(torch.int32) for k, v in torch.load(path, weights_only=True).items()}, path
            ),
            "stride 0": lambda path, _: torch.save({"model.x": torch.ones(1).expand(2**20, 2**14)}, path),
        },
        subject="DMD2 .bin",
    ),
    "student.safetensors": Format(
        _student("student.safetensors"),
        (("sample", "FILE", "--seeds", "0", "--out", "OUT.png"),),
        {
            "a long header": _bytes(lambda whole: struct.pack("<Q", 2**62) + whole[8:]),
            "huge tensor": _header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            "negative": _header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
            "a list": _header([1, 2]),
        },
        subject="student",
    ),
    "student.json": Format(
        _student("student.json"),
        (("sample", "FOLDER/student.safetensors", "--seeds", "0", "--out", "OUT.png"),),
        {
            "width": _net("width", 10**9),
            "depth": _net("depth", 10**5),
            "patch": _net("patch", 3),
            "a word": _net("heads", "two"),
            "another kind": _net("kind", "none"),
            "deep": _bytes(lambda _: b"[" * 50_000 + b"]" * 50_000),
            "NaN": _json_of(lambda record: record["metadata"]["denoiser"].update(sigma_data=float("nan"))),
            "a list": _bytes(lambda _: b"[]"),
            "no metadata": _json_of(lambda record: record.pop("metadata")),
            "times": _json_of(lambda record: record["metadata"].update(times=[5.0, float("inf")])),
        },
        subject="student",
    ),
    "reference.npz": Format(
        _statistics,
        (_scored("FILE"),),
        {
            "objects": _npz(mu=np.array([{}], dtype=object), sigma=np.eye(2)),
            "words": _npz(mu=np.array(["a"] * 64), sigma=np.array([["b"] * 64] * 64)),
            "shapes": _npz(mu=np.zeros(3), sigma=np.eye(64)),
            "NaN": _npz(mu=np.full(64, np.nan), sigma=np.eye(64)),
            "dates": _npz(mu=np.zeros(64, "M8[s]"), sigma=np.eye(64)),
            "complex": _npz(mu=np.zeros(64, complex), sigma=np.eye(64)),
            "n of another type": _npz(mu=np.zeros(64), sigma=np.eye(64), n=np.array(["many"])),
            "claims 1e12": _claims("(1000000000000,)"),
            "claims -1": _claims("(-1,)"),
            "claims records": _claims("(2,)", "|O"),
            "not negative": _npz(mu=np.zeros(64), sigma=-np.eye(64)),
        },
        subject="statistics",
    ),
    "picture.png": Format(
        _pictures, (_scored("FOLDER"),), {"60,000 pixels a side": _large_picture}, subject="picture folder"
    ),
    "images.zip": Format(
        _zip,
        (_scored("FILE"),),
        {
            "a bomb": _bomb,
            "no pictures": lambda path, _: write_zip(path, {"a.txt": b"a"}),
            "upwards": lambda path, _: write_zip(path, {"../../a.png": _png()}),
            "labels": lambda path, _: write_zip(path, {"0.png": _png(), "dataset.json": b'{"labels": [[1,'}),
            "labels of other types": lambda path, _: write_zip(
                path, {"0.png": _png(), "dataset.json": b'{"labels": [["0.png", "one"]]}'}
            ),
        },
        subject="zip",
    ),
    "images.tar": Format(
        _tar,
        (("CAPTIONS", "FILE"),),
        {
            "upwards": _member("../../../tmp/a.png", size=60),
            "a device": _member("0.png", type=tarfile.CHRTYPE),
            "a link": _member("0.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "claims much": _bytes(lambda whole: whole[:124] + b"77777777777\0" + whole[136:]),
        },
    ),
    "data.mdb": Format(_lmdb, (("DATA", "lmdb", "FOLDER"),)),
    "idx.gz": Format(
        _idx,
        (("DATA", "fashion-mnist", "FOLDER"),),
        {
            "claims much": _bytes(lambda _: gzip.compress(struct.pack(">IIII", 2051, 2**31, 28, 28) + b"x")),
            "a bomb": _bytes(lambda _: gzip.compress(bytes(2**28), 1)),
        },
        whole=False,
    ),
    "lora.safetensors": Format(
        _lora,
        (("LORA", "FILE"),),
        {
            "rank 0": _adapter(A=torch.ones(0, 8), B=torch.ones(8, 0)),
            "no dimension": _adapter(A=torch.tensor(1.0)),
            "NaN": _adapter(A=POISON),
            "alpha 0": _adapter(alpha=torch.tensor(0.0)),
            "alpha NaN": _adapter(alpha=torch.tensor(float("nan"))),
            "alpha a vector": _adapter(alpha=torch.ones(3)),
            "metadata": _adapter({"lora_adapter_metadata": "{" * 2000}),
            "alpha of words": _adapter({"ss_network_alpha": "much", "ss_network_dim": "4"}),
            "shapes": _adapter(B=torch.ones(8, 5)),
            "integers": _adapter(A=torch.ones(4, 8, dtype=torch.int64)),
        },
    ),
    "model_index.json": Format(
        _pipeline,
        (("distill", "FOLDER", "--steps", "4", "--prompts", "FOLDER/prompts.txt", "--out", "OUT"),),
        {
            "a list": _bytes(lambda _: b"[]"),
            "a word": _bytes(lambda _: b'"x"'),
            "deep": _bytes(lambda _: b"[" * 100_000),
            "no class": _bytes(lambda _: b'{"unet": 5}'),
            "a number for a network": _json_of(lambda record: record.update(unet=5)),
            "another pipeline": _json_of(lambda record: record.update(_class_name="KandinskyPipeline")),
            "a class that is none": _json_of(lambda record: record.update(unet=["os", "system"])),
        },
        whole=False,
    ),
    "checkpoint": Format(
        _old("dmd2/checkpoints", "000000000032/manifest.json"),
        (("SUBJECT", "checkpoint", "FOLDER"),),
        {
            "no files": _json_of(lambda record: record.pop("files")),
            "a score in words": _json_of(lambda record: record.update(score="low")),
        },
    ),
    "tree of a checkpoint": Format(
        _old("dmd2/checkpoints", "000000000032/tree.json"), (("SUBJECT", "checkpoint", "FOLDER"),)
    ),
    "pairs.json": Format(
        _old("pairs", "pairs.json"),
        (("SUBJECT", "pairs", "FOLDER"),),
        {
            "a list": _bytes(lambda _: b"[]"),
            "guidance a table": _json_of(lambda record: record.update(guidance={})),
            "no teacher": _json_of(lambda record: record.pop("teacher_sha256")),
        },
    ),
    "a shard of pairs": Format(_old("pairs", "pairs-00000.safetensors"), (("SUBJECT", "pairs", "FOLDER"),)),
    "prompts.json": Format(
        _old("prepared", "prompts.json"),
        (("SUBJECT", "prepared", "FOLDER"),),
        {
            "a list": _bytes(lambda _: b"[]"),
            "a shard of 0": _json_of(lambda record: record.update(shard=0)),
            "a shard of 1e30": _json_of(lambda record: record.update(shard=10**30)),
        },
    ),
    "latents.json": Format(
        _old("prepared", "latents.json"),
        (("SUBJECT", "prepared", "FOLDER"),),
        {
            "a shape of 1e12": _json_of(lambda record: record.update(shape=[10**12, 4, 8, 8])),
            "a shape of words": _json_of(lambda record: record.update(shape=["a", "b"])),
        },
    ),
    "a shard of latents": Format(_old("prepared", "latents-00000.safetensors"), (("SUBJECT", "prepared", "FOLDER"),)),
    "cifar-10-python.tar.gz": Format(
        _of_subject("CIFAR-10 archive", "cifar-10-python.tar.gz"),
        (("SUBJECT", "CIFAR-10 archive", "FOLDER"),),
        {
            "a bomb": _bytes(lambda _: gzip.compress(bytes(2**28), 1)),
            "a device": _member("test_batch", type=tarfile.CHRTYPE),
        },
    ),
    "model.safetensors of DMD2": Format(
        _of_subject("DMD2 model.safetensors", "model.safetensors"),
        (("import", "FOLDER", "--out", "OUT"),),
        subject="DMD2 model.safetensors",
    ),
    "adapter_config.json": Format(
        _peft,
        (("LORA", "FOLDER"),),
        {
            "patterns that take for ever": _json_of(
                lambda record: record.update(rank_pattern={"((a|t|o|_|q|.)+)+$x": 1})
            ),
            "patterns in a list": _json_of(lambda record: record.update(rank_pattern=["to_q"])),
            "no pattern": _json_of(lambda record: record.update(alpha_pattern={"(": 1})),
            "alpha of words": _json_of(lambda record: record.update(lora_alpha=["much"])),
        },
    ),
    "prompts.txt": Format(_text("prompts.txt", "a cat\na dog\n"), (("PROMPTS", "FILE"),)),
    "prompts.jsonl": Format(
        _text("prompts.jsonl", '{"caption": "a cat"}\n{"caption": "a dog"}\n'),
        (("PROMPTS", "FILE"),),
        {"deep": _yaml('{"caption": ' + "[" * 20_000), "a key twice": _yaml('{"caption": "a", "caption": "b"}\n')},
    ),
    "prompts.pkl": Format(
        lambda folder: _dumped(folder / "prompts.pkl", ["a cat", "a dog"]),
        (("PROMPTS", "FILE"),),
        {"code": _bytes(lambda _: pickle.dumps(_Runs())), "numbers": _bytes(lambda _: pickle.dumps([1, 2]))},
    ),
}


def _dumped(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def jobs(root: Path, only: str = "") -> Iterator[tuple[str, str, Path, list[str]]]:
    """Make every file below a folder; yields format, damage ("valid" for none), the file and a command line for it."""
    for name, form in FORMATS.items():
        if only not in name:
            continue
        template = root / "valid" / name.replace(" ", "-")
        template.mkdir(parents=True)
        valid = form.make(template)
        for number, (kind, damage) in enumerate({**({"valid": None} if form.whole else {}), **ANY, **form.own}.items()):
            folder = root / f"{name.replace(' ', '-')}-{number:02d}"
            shutil.copytree(template, folder)
            file = folder / valid.relative_to(template)
            if damage is not None:
                damage(file, valid.read_bytes())
            # each damaged file goes to one of the format's commands in turn; a valid one to all
            chosen = form.commands if damage is None else [form.commands[number % len(form.commands)]]
            if (form.subject or form.commands[0][0] == "SUBJECT") and kind in ANY and kind not in TO_COMMANDS:
                if kind not in TO_READERS:
                    continue  # blind changes, of which `tests.hostile.mutants` makes more
                chosen = [("SUBJECT", form.subject, "FOLDER")] if form.subject else form.commands
            for command in chosen:
                places = {"FILE": str(file), "FOLDER": str(folder), "OUT": str(folder / "out")}
                line = [_placed(word, places) for word in command]
                yield name, kind, file, line


def _placed(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        if word == name or word.startswith((f"{name}/", f"{name}.")):
            return place + word.removeprefix(name)
    return word
