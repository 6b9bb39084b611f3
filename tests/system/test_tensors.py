"""Tensors read and written one at a time, against the safetensors library; peak memory of an export."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fewstep.system.errors import FileError, WriteError
from fewstep.system.tensors import Entry, entries_of, read_entries, write_entries

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(1.5, dtype=torch.bfloat16),
    "c": torch.tensor([True, False]),
    "d": torch.empty(0, 4, dtype=torch.float16),
    "e": torch.tensor([[2**40]]),
    "f": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
}


def test_the_library_reads_what_is_written(tmp_path):
    write_entries(tmp_path / "x.safetensors", entries_of(TENSORS), metadata={"format": "pt", "what": "ever"})
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name].float(), value.float()) for name, value in TENSORS.items())
    assert all(found[name].dtype == value.dtype for name, value in TENSORS.items())
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "what": "ever"}


def test_it_reads_what_the_library_writes(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_entries(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert (found[name].shape, found[name].dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(found[name].make().float(), value.float())


def test_a_dtype_is_for_floating_point(tmp_path):
    write_entries(tmp_path / "x.safetensors", entries_of(TENSORS), torch.float16)
    found = read_entries(tmp_path / "x.safetensors")
    assert {name: found[name].dtype for name in "abce"} == {
        "a": torch.float16, "b": torch.float16, "c": torch.bool, "e": torch.int64
    }  # fmt: skip


@pytest.mark.parametrize(
    "value, words", [(1e6, "does not fit float16: its largest number is 1e\\+06"), (float("nan"), "NaN")]
)
def test_weights_that_do_not_fit_leave_the_old_file(value, words, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"before")
    with pytest.raises(FileError, match=words):
        write_entries(file, entries_of({"good": torch.zeros(2), "bad": torch.tensor([value])}), torch.float16)
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


def test_files_that_cannot_be_read_or_written(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for name, data in (("none", None), ("empty", b""), ("text", b"no file of that kind"), ("cut", whole[:20])):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(FileError, match=r"is not a whole \.safetensors file"):
            read_entries(tmp_path / name)
    (tmp_path / "short").write_bytes(whole[:-8])
    with pytest.raises(FileError, match="does not have the bytes that it claims"):
        read_entries(tmp_path / "short")["a"].make()
    with pytest.raises(WriteError, match="check that"):
        write_entries(tmp_path / "no/x.safetensors", {"a": Entry((1,), torch.float32, lambda: torch.zeros(1))})


PROGRAM = """
import resource, sys, torch
from pathlib import Path
from fewstep.system.tensors import read_entries, write_entries
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
entries = read_entries(Path(sys.argv[1]))
write_entries(Path(sys.argv[2]), {k: v.then(lambda x: x + 1) for k, v in entries.items()}, torch.float16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_memory_holds_one_tensor(tmp_path):
    """128 MiB in 64 tensors become 64 MiB: what is added to the process is a few tensors, no file."""
    tensors = {str(number): torch.zeros(512, 1024) for number in range(64)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024, "KiB"
    assert safetensors.torch.load_file(tmp_path / "y.safetensors")["63"][0, 0] == 1
