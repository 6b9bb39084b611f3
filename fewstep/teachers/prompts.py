"""Prompts as conditions: embeddings made once by a pipeline's text encoders, stored on disk, read row by row.

A folder of `fewstep prepare` holds `prompts.json` (models and settings), `prompts.jsonl` (the prompts), `null.safetensors`
(the empty condition) and `prompts-00000.safetensors`, ... Row i depends only on prompt i, so an interrupted preparation
resumes with the next shard. Knows no encoder and no network.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.malformed import Tolerance
from fewstep.data.text import CaptionRule, csv_rows, json_lines, read_lines, written_lines
from fewstep.diffusion.denoiser import Cond
from fewstep.system.bounds import read_file, read_json, regular_file, shown
from fewstep.system.console import note
from fewstep.system.data_pickle import DAMAGE, DataUnpickler
from fewstep.system.errors import DataError, FileError
from fewstep.system.files import atomic_write
from fewstep.system.out_folder import check_out
from fewstep.system.weights import load_weights, save_weights
from fewstep.teachers.base import Conditioner

__all__ = ["Prompts", "prepare_prompts", "read_prompt_file"]

Encode = Callable[[Sequence[str]], dict[str, Tensor]]
"""Prompts to tensors by name, each [count, ...]."""


class Prompts(Conditioner):
    """Prompts whose embeddings are on disk (`read`) or in memory (`encode`); prompt i is index i.

    Args:
        names: the prompts.
        row: index i -> condition of prompt i, each tensor [...] without a batch dimension.
        empty: the empty condition, likewise.
        constants: further conditions, equal for every sample, likewise.
        negative: the prompt that the empty condition was encoded from, if it is not the model's own.
    """

    def __init__(
        self,
        names: Sequence[str],
        row: Callable[[int], dict[str, Tensor]],
        empty: dict[str, Tensor],
        constants: dict[str, Tensor] | None = None,
        negative: str | None = None,
    ) -> None:
        self.names, self.num_classes = names, len(names)
        self.sha256 = _digest(names if negative is None else [*names, negative, "negative"])
        self.row, self.empty, self.constants, self.negative = row, empty, constants or {}, negative

    @classmethod
    def read(
        cls,
        folder: Path,
        about: dict[str, Any],
        constants: dict[str, Tensor] | None = None,
        negative: str | None = None,
    ) -> Prompts:
        """Open the prompts of a prepared folder, whose rows are read on demand.

        Args:
            folder: output folder of `prepare_prompts`.
            about: required models and settings of the folder, by name.
            constants: see the class.
            negative: see the class.

        Raises:
            DataError: nothing prepared there, or for another model.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        if manifest is None:
            raise DataError(
                f"{folder} holds no prepared prompts. Try: make them with `fewstep prepare RECIPE --prompts FILE`"
            )
        if different := [name for name in about if manifest["about"].get(name) != about[name]]:
            name = different[0]
            raise DataError(
                f"the prompts in {folder} were prepared with {name} {shown(str(manifest['about'].get(name)), quote=False)}, this teacher has "
                f"{about[name]}: prepare them again in another folder"
            )
        shard, names = int(manifest["shard"]), written_lines(folder / "prompts.jsonl")
        if not all(isinstance(name, str) for name in names) or _digest(names) != manifest["prompts_sha256"]:
            raise DataError(
                f"{folder / 'prompts.jsonl'} was changed after its prompts were encoded: prepare them in another folder"
            )
        absent = [path for path in _shards(folder, len(names), shard) if not path.exists()]
        if absent:
            raise DataError(f"{absent[0]} is missing. Try: run `fewstep prepare` again, it makes only what is missing")
        empty = _load(folder / "null.safetensors")

        opened = lru_cache(maxsize=256)(_open)  # of this folder as it is now: another one may come under its name

        def row(index: int) -> dict[str, Tensor]:
            path = folder / _name(index // shard)
            try:
                file = opened(path)
                found = {name: file.get_slice(name)[index % shard] for name in empty}
                if any(value.shape != empty[name].shape for name, value in found.items()):
                    raise IndexError("its embeddings have other shapes than the empty prompt's")
                return found
            except (SafetensorError, OSError, IndexError) as error:
                raise DataError(
                    f"{path} cannot be read ({shown(str(error), quote=False)}): delete it and run `fewstep prepare` again"
                ) from None

        return cls(names, row, empty, constants, negative)

    @classmethod
    def encode(
        cls, prompts: Sequence[str], encode: Encode, null: dict[str, Tensor], negative: str | None = None
    ) -> Prompts:
        """Encode prompts and keep them in memory, in float32. See `prepare_prompts` for the arguments.

        Raises:
            DataError: an embedding that is not finite.
        """
        empty = {name: _stored(value, torch.float32, "the empty prompt") for name, value in null.items()}
        table = _encoded(prompts, encode, empty, torch.float32)
        return cls(list(prompts), lambda index: {name: table[name][index] for name in empty}, empty, None, negative)

    def with_constants(self, constants: Mapping[str, Tensor]) -> Prompts:
        """Copy the prompts with other constant conditions."""
        return Prompts(self.names, self.row, self.empty, dict(constants), self.negative)

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        if labels is None:
            labels = torch.full((count,), self.num_classes)
        self.check(labels)
        rows = [self.empty if label == self.num_classes else self.row(label) for label in labels.tolist()]
        cond = {name: torch.stack([row[name] for row in rows]) for name in self.empty}
        cond = {name: value.float() if value.is_floating_point() else value for name, value in cond.items()}
        return cond | {name: value.expand(count, *value.shape) for name, value in self.constants.items()}

    def null(self, cond: Cond) -> Cond:
        return {
            name: self.empty[name].to(value).expand_as(value) if name in self.empty else value
            for name, value in cond.items()
        }


def prepare_prompts(
    folder: Path,
    prompts: Sequence[str],
    encode: Encode,
    null: dict[str, Tensor],
    about: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    shard: int = 1_000,
    batch: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Encode the missing ones of `prompts`; returns the number of existing ones.

    Args:
        folder: output folder.
        prompts: the prompts, none of them empty.
        encode: prompts -> tensors by name.
        null: the empty condition, each tensor [...] without a batch dimension.
        about: models and settings on which the embeddings depend (fingerprints and the like).
        dtype: dtype of the stored embeddings.
        shard: prompts per file.
        batch: prompts per batch.
        progress: called with the prompts done.

    Raises:
        DataError: the folder holds other prompts, or embeddings of another model, or a value does not fit `dtype`.
    """
    if shard < 1 or batch < 1:
        raise DataError(f"shard and batch must be at least 1, got {shard} and {batch}. Try: leave them out")
    check_out(folder, "prepared")
    kept = str(dtype).removeprefix("torch.")
    wanted = {"about": about | {"dtype": kept}, "prompts_sha256": _digest(prompts), "shard": shard}
    present = _manifest(folder)
    if present is not None and present != wanted:
        what = "other prompts" if present["about"] == wanted["about"] else "embeddings made in another way"
        raise DataError(f"{folder} holds {what}: choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    if present is None:
        save_weights(
            folder / "null.safetensors", {k: _stored(v, dtype, "the empty prompt") for k, v in null.items()}, {}
        )
        atomic_write(
            folder / "prompts.jsonl", "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
        )
        atomic_write(folder / "prompts.json", json.dumps(wanted, indent=2))
    found = 0
    for start, path in zip(range(0, len(prompts), shard), _shards(folder, len(prompts), shard), strict=True):
        part = prompts[start : start + shard]
        if path.exists() and path.with_suffix(".json").exists():
            found += len(part)
        else:
            encoded = _encoded(part, encode, null, dtype, batch, lambda done: progress(start + done))  # noqa: B023
            save_weights(path, encoded, {})
        progress(start + len(part))
    return found


def read_prompt_file(
    path: Path,
    rule: CaptionRule = CaptionRule(),  # noqa: B008  (it is frozen)
    bad: Tolerance | None = None,
) -> list[str]:
    """Read the prompts of a file: .txt (one per line), .jsonl, .csv, .tsv or .parquet (column `caption`, `text` or
    `prompt`), DMD2's .pkl.

    Blank lines are skipped, and their number is printed.

    Args:
        path: UTF-8 text, with or without a mark, or a .parquet file.
        rule: which column it is, and what to make of missing captions and of lists.
        bad: records malformed lines and rows, which are omitted; None: the first is an error.

    Raises:
        DataError: no such file, another encoding, no prompts, a row without one (its number is named), or no such column; too
            many malformed rows.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"`--prompts` must be a .txt (one prompt per line), .jsonl, .csv or .parquet file, got {path.absolute()}, which does not exist"
        )
    bad = bad or Tolerance()
    found = list(_prompts_in(path, rule, bad))
    bad.check(len(found) + len(bad.items))
    prompts = [prompt for prompt in found if prompt is not None]
    if len(prompts) < len(found):
        note(f"{path}: {len(found) - len(prompts):,} of {len(found):,} rows have no caption and were skipped")
    if not prompts:
        raise DataError(f"{path} must hold prompts, got none. Try: write one per line")
    return prompts


def _prompts_in(path: Path, rule: CaptionRule, bad: Tolerance) -> Iterator[str | None]:
    def each(
        rows: Iterable[tuple[int, Any]], word: str, read: Callable[[Any, str], str | None]
    ) -> Iterator[str | None]:
        for number, row in rows:
            found, where = [], f"{path}, {word} {number}"
            with bad.item(where):
                found.append(read(row, where))
            yield from found

    match path.suffix.lower():
        case ".txt":
            yield from (line for _, line in read_lines(path, bad))
        case ".jsonl":
            yield from each(json_lines(path, bad), "line", rule.in_row)
        case ".csv" | ".tsv":
            yield from each(csv_rows(path), "line", rule.in_row)
        case ".parquet":
            try:
                import pyarrow
                import pyarrow.parquet
            except ImportError:
                raise DataError(
                    f"{path} needs pyarrow: pip install 'fewstep[captions]', or write the prompts as .txt"
                ) from None
            try:
                file = pyarrow.parquet.ParquetFile(path)
                column = rule.key(file.schema_arrow.names)
                if column is None:
                    raise DataError(
                        f"{path} has columns {', '.join(file.schema_arrow.names)}, none of {rule.keys()}. Try: "
                        "--caption-column NAME"
                    )
                values = file.read(columns=[column])[column].to_pylist()
            except DataError:
                raise
            except (pyarrow.ArrowException, OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
                raise DataError(
                    f"{path} cannot be read as .parquet ({shown(str(error), quote=False)}). Try: make or fetch it again"
                ) from None
            yield from each(enumerate(values, 1), "row", rule.of)
        case ".pkl":  # DMD2's: a list of texts
            try:
                found = DataUnpickler(io.BytesIO(read_file(path)), encoding="utf-8").load()
            except DAMAGE as error:
                raise DataError(
                    f"{path} cannot be read as a pickled list of prompts ({shown(str(error), quote=False)}): use .txt"
                ) from None
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise DataError(f"{path} holds no list of texts. Try: write the prompts as .txt, one a line")
            yield from each(enumerate(found, 1), "item", rule.of)
        case other:
            raise DataError(
                f"{path} must end in .txt, .jsonl, .csv, .tsv, .parquet or .pkl, got {other or 'no ending'}. Try: a prompt a line, in a .txt"
            )


def _encoded(
    prompts: Sequence[str],
    encode: Encode,
    names: Collection[str],
    dtype: torch.dtype,
    batch: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Encode embeddings [len(prompts), ...] by name in batches."""
    rows: list[dict[str, Tensor]] = []
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        rows.append({name: _stored(value, dtype, repr(chunk[0])) for name, value in encode(chunk).items()})
        progress(first + len(chunk))
    return {name: torch.cat([row[name] for row in rows]) for name in names}


def _stored(value: Tensor, dtype: torch.dtype, whose: str) -> Tensor:
    value = value.detach().cpu()
    value = value.to(dtype) if value.is_floating_point() else value  # masks are whole numbers
    if not torch.isfinite(value).all():
        raise DataError(f"the embedding of {whose} does not fit {str(dtype).removeprefix('torch.')}. Try: use bfloat16")
    return value


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = Path(folder) / "prompts.json"
    if not path.exists():
        return None
    found = read_json(path)
    good = (
        isinstance(found, dict)
        and isinstance(found.get("about"), dict)
        and isinstance(found.get("prompts_sha256"), str)
    )
    if not good or type(found.get("shard")) is not int or not 0 < found["shard"] < 2**31:
        raise DataError(f"{path} must describe prepared prompts, got {shown(found)}: prepare them in another folder")
    return dict(found)


def _name(shard: int) -> str:
    return f"prompts-{shard:05d}.safetensors"


def _shards(folder: Path, count: int, shard: int) -> list[Path]:
    return [folder / _name(number) for number in range(-(-count // shard))]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_weights(path)[0]
    except FileError as error:
        raise DataError(f"{error}; delete the folder and run `fewstep prepare` again") from None


def _open(path: Path) -> Any:
    return safe_open(regular_file(path), "pt")
