"""Training state and weights on disk: atomic, checksummed, read without running code. Not about diffusion.

A checkpoint is a folder named after the images seen::

    000000020000/
        manifest.json        written last: images, score, size and sha256 of the other files, its own digest
        tree.json            every number and string of the state; name, dtype and shape of every tensor
        shard-*.safetensors  the tensors, written and resharded by torch.distributed.checkpoint

It contains no pickle. The usual format of torch.distributed.checkpoint has two (`.metadata` and each value that is not
a tensor, both read without restriction), converts integer keys to strings and drops empty dicts. Its safetensors format
has none of these faults but holds only tensors, so the rest of the state goes to `tree.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fewstep.system.bounds import read_json, shown
from fewstep.system.errors import FileError
from fewstep.system.files import TEMPORARY, file_sha256, sync_folder, write_error, write_synced
from fewstep.system.weights import FORMAT_VERSION, check_version, separate

MANIFEST, TREE = "manifest.json", "tree.json"
_REPLACED = ".replaced-"
_NAME = rf"({re.escape(_REPLACED)})?(\d{{12,}})"
# safetensors copies a file's tensors in memory before it writes them: keep files small
_BYTES_PER_FILE = 1 << 30
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.bool, torch.complex64,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    )
}  # fmt: skip


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the one with the lowest score.

    Reading never changes the folder, so it is safe while a run writes there. In a process group every rank
    must call `save` and `load`. Rank 0 writes everything except the other ranks' shards; its errors are raised on every rank.
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        """Raises ValueError if `keep` is below 1."""
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    @staticmethod
    def images_of(path: Path) -> int:
        """Images seen when the checkpoint at `path` was saved."""
        return int(path.name.removeprefix(_REPLACED))

    def latest(self) -> Path | None:
        """Newest checkpoint; None if there is none yet.

        Raises FileError if the newest is damaged (names and sizes are checked, hashes only by `load`).
        """
        found = _checkpoints_in(self.folder)
        if not found:
            return None
        _verify(found[-1], hashes=False)
        return found[-1]

    def best(self) -> Path | None:
        """Checkpoint with the lowest score, the older of equals; None if none has a score.

        Raises FileError if one of the manifests is damaged.
        """
        return _lowest({path: _read_manifest(path)["score"] for path in _checkpoints_in(self.folder)})

    def lowest(self, absent: float) -> float:
        """Lowest score of the checkpoints; `absent` if none has a score."""
        scores = [_read_manifest(path)["score"] for path in _checkpoints_in(self.folder)]
        return min((score for score in scores if score is not None), default=absent)

    def save(self, images: int, state: Mapping[str, Any], *, score: float | None = None) -> Path:
        """Save `state`, then remove checkpoints that need not be kept.

        `state` consists of nested dicts, lists and tuples of tensors, numbers, strings and None.
        Keys are strings or integers. Tensors that share memory are stored and loaded as separate tensors.
        A second save at the same number of images replaces the first and keeps its score if `score` is None.
        A complete checkpoint remains even if the process is killed. Unfinished files of killed runs are removed.

        Raises WriteError (full disk and the like; older checkpoints are intact), FileError if
        a value cannot be stored, the score is not finite, or the folder holds a newer checkpoint.
        """
        if score is not None and not math.isfinite(score):
            raise FileError(f"`score` must be a finite number, got {score}. Try: None for no score")
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_pack(state, (), tensors)).encode()
        tensors = separate(tensors)
        needed = len(tree) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        target = self.folder / f"{images:012d}"
        temporary = self.folder / f"{TEMPORARY}{target.name}"  # the same on all ranks

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            found = _checkpoints_in(self.folder)
            if found and self.images_of(found[-1]) > images:
                raise FileError(
                    f"{self.folder} must hold no checkpoint newer than {images} images, got {found[-1].name}. Try: resume "
                    "from it, delete it, or use another folder for a new run"
                )
            temporary.mkdir()

        def finish() -> None:
            write_synced(temporary / TREE, tree)
            kept_score = score
            if score is None and target.exists():
                kept_score = _read_manifest(target)["score"]
            write_synced(temporary / MANIFEST, _manifest(temporary, images, kept_score))
            sync_folder(temporary)
            replaced = self.folder / f"{_REPLACED}{target.name}"
            if target.exists():
                os.rename(target, replaced)  # if killed here, `replaced` still counts as the checkpoint
            os.rename(temporary, target)
            sync_folder(self.folder)

        try:
            _on_rank_zero(prepare)
            if tensors:
                numbers = _file_numbers(tensors)
                writer = HuggingFaceStorageWriter(str(temporary), numbers, save_distributed=True)
                _run_dcp(lambda: dcp_save(tensors, storage_writer=writer))
            _on_rank_zero(finish)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, FileError):
                found = _checkpoints_in(self.folder)
                kept = f"{found[-1]} is intact" if found else "there is no older checkpoint"
                raise write_error(error, target, needed, kept) from error
            raise
        _on_rank_zero(self._prune)
        return target

    def load(
        self,
        path: Path | str | None = None,
        *,
        into: Mapping[str, Any] | None = None,
        only: Collection[str] | None = None,
        make: Callable[[str], Tensor | None] = lambda name: None,
        hashes: bool = True,
    ) -> dict[str, Any]:
        """Load a saved state (default: the latest checkpoint), as it was given to `save`.

        Without `into`, tensors are new and on the CPU; pass the parts to `load_state_dict` (an optimizer
        needs no state before). Tensors at the same place in `into` are filled in place: sharded tensors
        (DTensor) read only their own part this way. For tensors that `into` lacks, `make` may return a tensor
        for their path ("task/optimizer/state/0/exp_avg"); otherwise they are new.
        `only` names the top-level entries to read. `hashes=False` skips the sha256 check of the files.

        Raises FileError if there is no checkpoint, it is damaged, was altered, or does not fit `into`.
        """
        place = Path(path) if path is not None else self.latest()
        if place is None:
            raise FileError(f"{self.folder} holds no checkpoint. Try: start the run, or check the folder")
        _on_rank_zero(lambda: _verify(place, hashes))
        given: dict[str, Tensor] = {}
        if into is not None:
            _pack({key: into[key] for key in into if only is None or key in only}, (), given)
        used: dict[str, Tensor] = {}
        sizes = _tensor_sizes(place)

        def tensor_at(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
            if sizes.get(name) != math.prod(shape):
                where = f"{shown(name, quote=False)} {shown(shape)}"
                raise _damaged(place, TREE, f"{where} has {sizes.get(name)} values in the shards")
            tensor = given.get(name)
            tensor = make(name) if tensor is None else tensor
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype)
            elif (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise FileError(
                    f"{place}: {shown(name, quote=False)} was saved as {dtype} {shown(list(shape))}, this run has {tensor.dtype} "
                    f"{list(tensor.shape)}: resume with the settings of the saved run, or use another folder"
                )
            used[name] = tensor
            return tensor

        try:
            node = read_json(place / TREE)
            if only is not None:
                node = {"dict": [pair for pair in node["dict"] if pair[0] in only]}
            if set(node) != {"dict"}:
                raise ValueError("no dict at the top")
            state: dict[str, Any] = _unpack(node, tensor_at)
        except FileError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            why = shown(str(error), quote=False)
            raise _damaged(place, TREE, f"not a state tree ({type(error).__name__}: {why})") from error
        if only is not None and (missing := sorted(set(only) - set(state))):
            raise FileError(f"{place} has no entry {', '.join(missing)}")
        if missing := sorted(set(given) - set(used)):
            names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise FileError(f"{place} has no tensor {names}: resume with the settings of the saved run")
        if used:
            try:
                _run_dcp(lambda: dcp_load(used, storage_reader=HuggingFaceStorageReader(str(place))))
            except (ValueError, LookupError, TypeError, RuntimeError, AssertionError) as error:
                why = shown(str(error), quote=False)
                raise _damaged(place, "shard-*.safetensors", f"{type(error).__name__}: {why}") from error
        return state

    def _remove_leftovers(self) -> None:
        for entry in self.folder.iterdir():
            successor = self.folder / entry.name.removeprefix(_REPLACED)
            replaced = entry.name.startswith(_REPLACED) and successor.exists()
            if replaced or entry.name.startswith(TEMPORARY):
                shutil.rmtree(entry)

    def _prune(self) -> None:
        self._remove_leftovers()
        scores = {}
        for path in _checkpoints_in(self.folder):
            with contextlib.suppress(FileError):  # keep a damaged one for inspection
                scores[path] = _read_manifest(path)["score"]
        newest, best = list(scores)[-self.keep :], _lowest(scores)
        for path in scores:
            if path not in newest and path != best:
                # renamed first, so that a half-removed folder never has a checkpoint's name
                doomed = self.folder / f"{TEMPORARY}removed-{path.name}"
                os.rename(path, doomed)
                shutil.rmtree(doomed)


# -- files ---------------------------------------------------------------------------------------------------


# -- manifests -----------------------------------------------------------------------------------------------


def _checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    names = {entry.name for entry in folder.iterdir()}
    # a save that was killed between its two renames left only the old checkpoint
    finished = [
        folder / name
        for name in names
        if (match := re.fullmatch(_NAME, name)) and (match[1] is None or match[2] not in names)
    ]
    return sorted(finished, key=Checkpoints.images_of)


def _damaged(path: Path, file: str, problem: str) -> FileError:
    images = Checkpoints.images_of(path)
    older = [other for other in _checkpoints_in(path.parent) if Checkpoints.images_of(other) < images]
    start = f"resume from {older[-1].name}" if older else "start again (there is no older checkpoint)"
    return FileError(f"{path / file}: {problem}. Delete the folder {path} to {start}.")


def _digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _manifest(folder: Path, images: int, score: float | None) -> bytes:
    manifest = {
        "format": "fewstep checkpoint",
        "version": FORMAT_VERSION,
        "images": images,
        "score": score,
        "files": {
            file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(folder.iterdir())
        },
    }
    return json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST)
        actual, expected = _digest(manifest), manifest["sha256"]
        version, images, score = manifest["version"], manifest["images"], manifest["score"]
        listed = {name: (about["size"], about["sha256"]) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        raise _damaged(path, MANIFEST, "the file is missing") from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(path, MANIFEST, f"not a manifest ({shown(str(error), quote=False)})") from error
    if actual != expected:
        raise _damaged(path, MANIFEST, f"its sha256 is {actual}, {shown(expected, quote=False)} was expected")
    check_version(path / MANIFEST, version)
    if images != Checkpoints.images_of(path):
        raise _damaged(path, MANIFEST, f"it is the manifest of {shown(images)} images")
    if not isinstance(score, int | float | None):
        raise _damaged(path, MANIFEST, f"its score is {shown(score)}")
    if outside := [name for name in listed if Path(name).name != name]:
        raise _damaged(path, MANIFEST, f"it lists {shown(outside[0])}, which is not in the folder")
    return manifest


def _lowest(scores: Mapping[Path, float | None]) -> Path | None:
    scored = {path: score for path, score in scores.items() if score is not None}
    return min(scored, key=lambda path: (scored[path], Checkpoints.images_of(path)), default=None)


def _verify(path: Path, hashes: bool) -> None:
    """Check that every listed file exists, complete and unaltered, and that there is no other."""
    if not path.is_dir() or not re.fullmatch(_NAME, path.name):
        raise FileError(f"{path} is no checkpoint folder. Try: give one named after its images, 000000020000")
    files = _read_manifest(path)["files"]
    for name, expected in files.items():
        if not (path / name).is_file():
            raise _damaged(path, shown(name, quote=False), "the file is missing")
        if (size := (path / name).stat().st_size) != expected["size"]:
            raise _damaged(path, name, f"the file has {size} bytes, {shown(expected['size'])} were saved")
        if hashes and (actual := file_sha256(path / name)) != expected["sha256"]:
            raise _damaged(
                path, name, f"the file's sha256 is {actual}, {shown(expected['sha256'], quote=False)} was saved"
            )
    for entry in path.iterdir():
        if entry.name not in files and entry.name != MANIFEST:
            raise FileError(f"{entry} does not belong to the checkpoint. Try: move the file away")


def _tensor_sizes(path: Path) -> dict[str, int]:
    """Number of stored values of each tensor, over all shards, from the headers."""
    sizes: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="pt") as shard:
                names = shard.keys()
                for name in names:
                    sizes[name] = sizes.get(name, 0) + math.prod(shard.get_slice(name).get_shape())
        except safetensors.SafetensorError as error:
            raise _damaged(path, file.name, f"not a safetensors file ({shown(str(error), quote=False)})") from error
    return sizes


# -- the state as JSON and named tensors ---------------------------------------------------------------------


def _pack(value: Any, where: tuple[str | int, ...], tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to JSON; its tensors go to `tensors` under their path."""
    name = "/".join(map(str, where))
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES or value.layout != torch.strided:
            raise FileError(f"state {name}: a {value.layout} tensor of {value.dtype} cannot be saved")
        if name in tensors:
            raise FileError(f"state {name}: two tensors have this path, rename one of the keys")
        tensors[name] = value.detach()
        return {"tensor": name, "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise FileError(f"state {name}: key {key!r} is neither a string nor an integer")
        return {"dict": [[key, _pack(item, (*where, key), tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [_pack(item, (*where, index), tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no NaN or infinity
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise FileError(
        f"state {name}: a {type(value).__name__} cannot be saved, only tensors, numbers, strings, None, "
        "dicts, lists and tuples. Try: convert it first"
    )


def _unpack(node: Any, tensor_at: Callable[[str, torch.dtype, tuple[int, ...]], Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensor_at(node["tensor"], _DTYPES[node["dtype"]], tuple(node["shape"]))
    ((kind, content),) = node.items()
    if kind == "dict":
        return {key: _unpack(item, tensor_at) for key, item in content}
    if kind == "float":
        return float(content)
    return {"list": list, "tuple": tuple}[kind](_unpack(item, tensor_at) for item in content)


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    numbers, before = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + before // _BYTES_PER_FILE
        before += tensor.numel() * tensor.element_size()
    return numbers


# -- several processes ---------------------------------------------------------------------------------------


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 and raise its error on every rank, so that none waits forever."""
    distributed = dist.is_available() and dist.is_initialized()
    outcome: list[FileError | OSError | None] = [None]
    if not distributed or dist.get_rank() == 0:
        try:
            action()
        except (FileError, OSError) as error:
            outcome = [error]
    if distributed:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _run_dcp(action: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
        try:
            action()
        except CheckpointException as error:
            # not an Exception, and wraps the error of any rank, even Ctrl-C: raise the wrapped error
            raise next(iter(error.failures.values()))[0] from error
