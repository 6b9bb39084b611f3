"""Small valid files of every format that fewstep reads, and the reader of each, for `tests.hostile.mutants`.

A reader takes the folder and goes as deep as a command would: it builds the network, and touches every picture and row.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DhariwalUNetSpec, SongUNetSpec
from fewstep.system.checkpoint import MANIFEST, _digest
from fewstep.system.choices import chosen
from tests.data.test_cifar10 import batch, write
from tests.formats.test_edm2_pickle import ARGUMENTS as EDM2_ARGUMENTS
from tests.formats.test_edm2_pickle import SPEC as EDM2_SPEC
from tests.hostile.corpus import _lmdb, _statistics
from tests.hostile.mutants import Subject
from tests.support.images import write_tar, write_zip
from tests.support.places import ROOT
from tests.support.published import write_published, write_published_edm2

OLD = ROOT / "tests" / "files-0.1.0"
SHAPE: dict[str, Any] = {
    "size": 8,
    "channels": 1,
    "num_classes": 2,
    "model_channels": 4,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
}


def _old(*names: str) -> Callable[[Path], None]:
    """Files of 0.1.0: folders or files, into the folder itself if it is one."""

    def make(folder: Path) -> None:
        for name in names:
            if (OLD / name).is_dir():
                copytree(OLD / name, folder / name if len(names) > 1 else folder, dirs_exist_ok=True)
            else:
                (folder / Path(name).name).write_bytes((OLD / name).read_bytes())

    return make


def _seal(folder: Path) -> None:
    """Give the records of weights files the size and sha256 that they have."""
    for file in folder.rglob("*.safetensors"):
        record = file.with_suffix(".json")
        if record.exists():
            content, said = file.read_bytes(), json.loads(record.read_text())
            said |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            record.write_text(json.dumps(said))


# -- models ---------------------------------------------------------------------------------------------------------------


def _edm(folder: Path) -> None:
    torch.manual_seed(0)
    write_published(folder / "net.pkl", DenoiserSpec(net=SongUNetSpec(**SHAPE)).build())


def _read_edm() -> Callable[[Path], object]:
    from fewstep.formats.model import load_denoiser

    return lambda folder: load_denoiser(folder / "net.pkl")


def _edm2(folder: Path) -> None:
    torch.manual_seed(0)
    write_published_edm2(folder / "net.pkl", EDM2_SPEC.build(), EDM2_ARGUMENTS)


def _edm2_latents(folder: Path) -> None:
    draw, files = np.random.default_rng(0), {"dataset.json": b'{"labels": [["0.npy", 0], ["1.npy", 1], ["2.npy", 0]]}'}
    for number in range(3):
        packed = io.BytesIO()
        np.save(packed, draw.standard_normal((8, 4, 4), np.float32))
        files[f"{number}.npy"] = packed.getvalue()
    write_zip(folder / "latents.zip", files)


def _dmd2(zipped: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        torch.manual_seed(0)
        net = DenoiserSpec(net=DhariwalUNetSpec(**SHAPE)).build().net
        kept = {f"model.{k}": v for k, v in net.state_dict().items() if not k.startswith("map_augment")}
        torch.save(kept, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return make


def _read_dmd2() -> Callable[[Path], object]:
    from fewstep.formats.model import load_denoiser

    return load_denoiser


def _newer_dmd2(folder: Path) -> None:
    torch.manual_seed(0)
    net = DenoiserSpec(net=DhariwalUNetSpec(**SHAPE)).build().net
    save_file(
        {f"model.{k}": v.contiguous() for k, v in net.state_dict().items() if not k.startswith("map_augment")},
        folder / "model.safetensors",
    )


def _read_student() -> Callable[[Path], object]:
    from fewstep.formats.model import load_generator
    from fewstep.students.sample import FewStep

    def read(folder: Path) -> None:
        generator, spec, _ = load_generator(folder / "student.safetensors")
        assert spec is not None and FewStep(generator).calls

    return read


def _lora(folder: Path) -> None:
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    place = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = f"lora_unet_{place.replace('.', '_')}"
    save_file({f"{kohya}.lora_down.weight": a, f"{kohya}.lora_up.weight": b, f"{kohya}.alpha": torch.tensor(2.0)}, folder / "kohya.safetensors",
              {"ss_network_alpha": "2", "ss_network_args": '{"conv_dim": "2"}'})  # fmt: skip
    (folder / "peft").mkdir()
    save_file(
        {f"base_model.model.{place}.lora_A.weight": a, f"base_model.model.{place}.lora_B.weight": b},
        folder / "peft" / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {"to_k": 4},
        "alpha_pattern": {},
        "use_dora": False,
        "target_modules": ["to_q"],
    }
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
    torch.save({f"{place}.lora.down.weight": a, f"{place}.lora.up.weight": b}, folder / "pytorch_lora_weights.bin")


def _read_lora() -> Callable[[Path], object]:
    from fewstep.formats.lora_reading import read_lora

    network = nn.Module()
    where = network
    for name in ("mid_block", "attentions", "0", "transformer_blocks", "0", "attn1"):
        where.add_module(name, nn.Module())
        where = where.get_submodule(name)
    where.add_module("to_q", nn.Linear(4, 4))

    def read(folder: Path) -> None:
        for name in ("kohya.safetensors", "peft", "pytorch_lora_weights.bin"):
            read_lora(folder / name).for_network(network)

    return read


def _read_pipeline() -> Callable[[Path], object]:
    from fewstep.teachers.pipelines import configurations, scheduler_configuration

    def read(folder: Path) -> None:
        configurations(str(folder), "teacher")
        scheduler_configuration(str(folder))

    return read


def _read_whole_pipeline() -> Callable[[Path], object]:
    from fewstep.teachers import DiffusersTeacher

    return lambda folder: DiffusersTeacher(path=str(folder)).load()


def _single_file(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from tests.support.ldm import single_file

    single_file(StableDiffusionPipeline.from_pretrained(OLD / "pipeline"), folder / "model.safetensors")


def _read_single_file() -> Callable[[Path], object]:
    from fewstep.teachers import DiffusersTeacher

    def read(folder: Path) -> None:
        DiffusersTeacher(path=str(folder / "model.safetensors"), config=str(OLD / "pipeline")).load()

    return read


# -- runs ---------------------------------------------------------------------------------------------------------------------


def _read_run() -> Callable[[Path], object]:
    from fewstep.run.settings import load_run

    return lambda folder: load_run(folder / "run.yaml", imports=())


def _read_report() -> Callable[[Path], object]:
    from fewstep.report.page import write_report

    return lambda folder: write_report([folder], folder.with_suffix(".html"))


def _read_records() -> Callable[[Path], object]:
    from fewstep.report.run_folder import RunFolder

    return lambda folder: RunFolder(folder, "mutant", 0)


def _read_stats() -> Callable[[Path], object]:
    from fewstep.system.tracking import read_stats

    return lambda folder: read_stats(folder / "stats.jsonl")


def _seal_checkpoint(folder: Path) -> None:
    for place in folder.glob("0*"):
        record = json.loads((place / MANIFEST).read_text())
        for name in record["files"]:
            content = (place / name).read_bytes()
            record["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (place / MANIFEST).write_text(json.dumps(record | {"sha256": _digest(record)}))


def _read_checkpoint() -> Callable[[Path], object]:
    from fewstep.system.checkpoint import Checkpoints

    def read(folder: Path) -> None:
        checkpoints = Checkpoints(folder)
        checkpoints.best()
        checkpoints.load()

    return read


def _read_samplers() -> Callable[[Path], object]:
    from fewstep.teachers.samplers import read_samplers

    return lambda folder: read_samplers(folder / "samplers.json")


def _samplers(folder: Path) -> None:
    row = {
        "method": "edm-heun",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "calls": 5,
        "samples": 100,
        "fid": 3.5,
    }
    (folder / "samplers.json").write_text(
        json.dumps({"format": "fewstep samplers 1", "tries": [row, row], "best": {"5": row}, "about": {"seed": 0}})
    )


# -- what commands write for others ---------------------------------------------------------------------------------------------


def _read_pairs() -> Callable[[Path], object]:
    from fewstep.methods.pairs import PairSet
    from fewstep.teachers import NativeTeacher

    teacher = NativeTeacher(path=str(OLD / "teacher")).load()

    def read(folder: Path) -> None:
        pairs = PairSet(folder, teacher)
        pairs.batch(torch.arange(len(pairs)), teacher.conditioner, torch.device("cpu"))

    return read


def _read_prepared() -> Callable[[Path], object]:
    from fewstep.data.prepared import Prepared
    from fewstep.teachers.prompts import Prompts

    about = json.loads((OLD / "prepared" / "prompts.json").read_text())["about"]

    def read(folder: Path) -> None:
        prompts = Prompts.read(folder, about)
        prompts.null(prompts.cond(torch.arange(3), 3))
        images = Prepared(path=folder).load()
        images.batch(torch.arange(len(images)))

    return read


def _read_prompts() -> Callable[[Path], object]:
    from fewstep.teachers.prompts import read_prompt_file

    def read(folder: Path) -> None:
        for file in sorted(folder.iterdir()):
            read_prompt_file(file)

    return read


def _prompts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (folder / "a.txt").write_text("a cat\na dog\n")
    (folder / "b.jsonl").write_text('{"caption": "a cat"}\n{"caption": "a dog"}\n')
    (folder / "b.csv").write_text('caption,seed\n"a cat, sleeping",1\na dog,2\n')
    (folder / "c.pkl").write_bytes(pickle.dumps(["a cat", "a dog"]))
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a cat", "a dog"]}), folder / "d.parquet")


def _read_statistics() -> Callable[[Path], object]:
    from fewstep.evaluation.reference import Reference

    return lambda folder: Reference.load(folder / "reference.npz")


# -- pictures ---------------------------------------------------------------------------------------------------------------------


def _picture(seed: int, kind: str = "PNG", channels: int = 3, size: int = 8) -> bytes:
    file = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 255, (size, size, channels), np.uint8)
    image = Image.fromarray(array.squeeze(-1) if channels == 1 else array)
    if kind == "P":
        image, kind = image.quantize(16), "PNG"
    image.save(file, kind)
    return file.getvalue()


def _folder(folder: Path) -> None:
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "P", "PNG")):
        (folder / f"{number}.{'png' if kind == 'P' else kind.lower()}").write_bytes(
            _picture(number, kind, 4 if number == 4 else 3)
        )


def _data(kind: str, name: str = "", **more: Any) -> Callable[[], Callable[[Path], object]]:
    """A reader of a kind of data set that touches every picture."""
    from fewstep.data.dataset import DataSpec

    def read(folder: Path) -> None:
        data = chosen(
            DataSpec, {"kind": kind, "root" if kind == "fashion-mnist" else "path": str(folder / name), **more}
        ).load()
        data.batch(torch.arange(len(data)))

    return lambda: read


def _look() -> Callable[[Path], object]:
    from fewstep.data.looking import look_at

    return look_at


def _zip(folder: Path) -> None:
    files = {f"{number}.png": _picture(number) for number in range(3)}
    write_zip(
        folder / "images.zip", files | {"dataset.json": b'{"labels": [["0.png", 0], ["1.png", 1], ["2.png", 0]]}'}
    )


def _captions(folder: Path) -> None:
    members = {}
    for number in range(3):
        members |= {
            f"{number}.png": _picture(number),
            f"{number}.txt": b"a picture",
            f"{number}.json": b'{"caption": "a picture", "url": "x"}',
        }
    write_tar(folder / "images.tar", members)


def _read_captions() -> Callable[[Path], object]:
    from fewstep.data.captions import captioned_images

    def read(folder: Path) -> None:
        found = captioned_images(folder, 8)
        found.fingerprint, found.images[: len(found.captions)]

    return read


def _captioned(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(_picture(number))
    rows = [{"file_name": f"{number}.png", "caption": "a picture"} for number in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _cifar(folder: Path) -> None:
    draw = np.random.default_rng(0)
    made = (draw.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8), [1, 2])
    write(folder / "cifar-10-python.tar.gz", {"test_batch": batch(*made)})


def _cifar_folder(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)]:
        (folder / name).write_bytes(batch(draw.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8), [1, 2]))


def _small_idx(folder: Path) -> None:
    import gzip

    (folder / "train-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">IIII", 2051, 3, 28, 28) + bytes(3 * 784))
    )
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">II", 2049, 3) + bytes(3)))


SUBJECTS: dict[str, Subject] = {
    "EDM pickle": Subject(_edm, _read_edm),
    "EDM2 pickle": Subject(_edm2, _read_edm),
    "EDM2 latents": Subject(_edm2_latents, _data("edm2-latents", "latents.zip")),
    "DMD2 .bin": Subject(_dmd2(True), _read_dmd2),
    "DMD2 .bin before torch 1.6": Subject(_dmd2(False), _read_dmd2),
    "DMD2 model.safetensors": Subject(_newer_dmd2, _read_dmd2),
    "student": Subject(_old("dmd2/student.safetensors", "dmd2/student.json"), _read_student, mend=_seal),
    "LoRA": Subject(_lora, _read_lora),
    "pipeline configurations": Subject(_old("pipeline"), _read_pipeline, files="*.json"),
    "pipeline": Subject(_old("pipeline"), _read_whole_pipeline, files="*"),
    "single file": Subject(_single_file, _read_single_file),
    "run.yaml": Subject(_old("lora/run.yaml"), _read_run),
    "run records": Subject(_old("dmd2/run.yaml", "dmd2/stats.jsonl", "dmd2/times.jsonl", "dmd2/results.json", "dmd2/student.json", "dmd2/student.safetensors"), _read_records),
    "report": Subject(_old("dmd2/run.yaml", "dmd2/stats.jsonl", "dmd2/times.jsonl", "dmd2/results.json", "dmd2/student.json", "dmd2/student.safetensors"), _read_report),
    "stats.jsonl": Subject(_old("dmd2/stats.jsonl"), _read_stats),
    "checkpoint": Subject(_old("dmd2/checkpoints"), _read_checkpoint, mend=_seal_checkpoint),
    "samplers": Subject(_samplers, _read_samplers),
    "pairs": Subject(_old("pairs"), _read_pairs, mend=_seal),
    "prepared": Subject(_old("prepared"), _read_prepared, mend=_seal),
    "prompt files": Subject(_prompts, _read_prompts),
    "statistics": Subject(lambda folder: _statistics(folder) and None, _read_statistics),
    "picture folder": Subject(_folder, _data("folder", size=8, background="white")),
    "looking": Subject(_folder, _look),
    "zip": Subject(_zip, _data("zip", "images.zip")),
    "WebDataset tar": Subject(_captions, _read_captions),
    "captions": Subject(_captioned, _read_captions),
    "LMDB": Subject(lambda folder: _lmdb(folder) and None, _data("lmdb"), files="data.mdb"),
    "CIFAR-10 archive": Subject(_cifar, _data("cifar10", "cifar-10-python.tar.gz", split="test")),
    "CIFAR-10 folder": Subject(_cifar_folder, _data("cifar10")),
    "Fashion-MNIST": Subject(_small_idx, _data("fashion-mnist"), whole=False),
}  # fmt: skip
