"""A command that runs out of memory says what it asked for and which settings need less."""

import contextlib
import re

import pytest
import torch

from fewstep.cli import main as program
from fewstep.cli.memory import out_of_memory

# as PyTorch 2.11 words it (c10/cuda/CUDACachingAllocator.cpp)
GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.11 GiB is free. Including "
    "non-PyTorch memory, this process has 22.53 GiB memory in use."
)


def test_the_gpus_error_is_one_message_with_a_way_out(monkeypatch, capsys):
    def fails(**_options):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setitem(program.COMMANDS, "recipes", fails)
    assert program.main(["recipes"]) == 1
    assert (
        capsys.readouterr().err
        == "fewstep recipes: the run must fit a GPU of 23.65 GiB, got a request for 2.50 GiB more\n"
    )
    said = out_of_memory(torch.OutOfMemoryError(GPU), "distill")
    assert re.search(r"2.50 GiB more. Try: a smaller --train.micro-batch; .*fewstep plan", said)


def test_the_allocator_of_the_cpu_and_python():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert re.fullmatch(
        r"the run must fit this machine's memory, got a request for \d+ bytes more. Try: a smaller --batch",
        out_of_memory(caught.value, "sample"),
    )
    assert out_of_memory(MemoryError(), "report") == "the run must fit this machine's memory, got a request for more"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), OSError(28, "No space left")]
)
def test_other_errors_are_left_alone(error):
    assert out_of_memory(error, "distill") is None


@pytest.mark.parametrize("name", ["pairs", "prepare", "sample", "eval"])
def test_the_option_that_it_names_exists(name, capsys):
    with contextlib.suppress(SystemExit):
        program.main([name, "--help"])
    assert "--batch" in capsys.readouterr().out
