"""Export of a student on pixels: a folder for `fewstep.load`, with a model card and samples, without paths of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import fewstep
from fewstep.formats.model import read_header, save_generator
from fewstep.students.sample import FewStep, write_samples
from fewstep.students.student import Student, load_student, teacher_of
from fewstep.system.files import atomic_write
from fewstep.system.out_folder import write_marker

__all__ = ["export_pixels", "stands_alone"]

KEPT = (
    "made_by",
    "teacher_sha256",
    "class_names",
    "perceptual",
    "hardware",
    "torch",
    "date",
    "images",
    "source",
    "source_sha256",
)
SEEDS = range(16)


def stands_alone(file: Path) -> bool:
    """Return whether a student's file is complete: a network of fewstep's own on pixels."""
    if file.suffix != ".safetensors":
        return False
    header = read_header(file)
    if header.denoiser is None or header.lora is not None:
        return False
    net = header.denoiser.net
    ours = type(net).__module__.startswith("fewstep.") and len(net.sample_shape) == 3
    return ours and teacher_of(header.provenance) is None


def export_pixels(file: Path, out: Path, license: str) -> tuple[list[Path], list[str]]:
    """Write the student, its card and a picture; returns the files, and notes for the user.

    Raises:
        FileError: the student's files are damaged.
        WriteError: the disk is full.
    """
    student = load_student(file)
    run = student.provenance.get("run") or {}
    kept: dict[str, Any] = {name: student.provenance[name] for name in KEPT if name in student.provenance}
    kept["run"] = {name: run[name] for name in ("kind", "objective", "optim") if name in run}
    if teacher := student.provenance.get("teacher"):
        kept["teacher"] = Path(str(teacher)).name
    out.mkdir(parents=True, exist_ok=True)
    write_marker(out, "export", {"student_sha256": student.sha256, "made_by": f"fewstep {fewstep.__version__}"})
    files = [out / "student.safetensors", out / "student.json", out / "samples.png", out / "README.md"]
    save_generator(files[0], student.generator, student.spec, kept)
    if student.shape[0] in (1, 3):
        write_samples(FewStep(student.generator.eval()), SEEDS, student.shape, student.conditioner, files[2])
    else:
        del files[2]
    atomic_write(files[-1], _card(student, kept, out.resolve().name, license))
    return files, ["weights stay in float32: --dtype is for text-to-image students"]


def _card(student: Student, kept: dict[str, Any], name: str, license: str) -> str:
    method = (kept["run"].get("objective") or {}).get("method", "distilled")
    calls, shape = student.generator.steps, "x".join(map(str, student.shape))
    front: dict[str, Any] = {
        "pipeline_tag": "unconditional-image-generation",
        "license": license,
        "library_name": "fewstep",
    }
    front["tags"] = ["fewstep", "few-step", str(method)]
    classes = list(kept.get("class_names") or [])
    given = f", classes={classes[0]!r}" if classes else ""
    levels = ", ".join(f"{time:.4g}" for time in student.generator.times)
    return "\n".join(
        [
            "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", "",
            f"A {calls}-step student of `{kept.get('teacher', 'its teacher')}` ({method}), pictures of {shape}, called at the times "
            f"{levels}.", "", "![samples](samples.png)", "", "```python", "import fewstep", "",
            'student = fewstep.load("THIS_FOLDER")', f"student.sample(seeds=range(16){given}).save(\"x.png\")", "```", "",
            *([f"Classes: {', '.join(classes)}.", ""] if classes else []),
            f"Made by {kept.get('made_by', 'fewstep')}, {kept.get('date', '')}.", "",
        ]
    )  # fmt: skip
