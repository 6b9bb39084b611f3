"""Shared fixtures: one thread, fixed seeds, a part of Fashion-MNIST."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # child processes as well, and what else multiplies besides torch

import pytest
import torch

from fewstep.data import Digits, FashionMNIST, ImageDataset, fashion_mnist
from fewstep.diffusion.generator import Generator
from fewstep.evaluation.reference import Reference
from fewstep.evaluation.small_features import Pixels
from fewstep.formats.model import save_denoiser, save_generator
from tests.support.golden import stored_noise  # noqa: F401  (a fixture)
from tests.support.networks import TINY, randomised

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process runs a file, whose fixtures cost more than its tests; the long runs of test_schedules.py go by schedule.

    pytest-xdist's own `--dist loadgroup` distributes single tests under pytest 9.2, which no longer stores a group in a test's name.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return file + test.partition("[")[2].partition("-")[0] if file.endswith("test_schedules.py") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process ends with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# What `fashion_mnist.PUBLISHED` says of the whole files, of the first 500 test images in tests/fashion-mnist.
PART = {
    "t10k-images-idx3-ubyte.gz": (
        (500, 28, 28),
        "c9bd0ed7148856eb2287d902861921296d6c36d95a5113341a35554343e84123",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        (500,),
        "9f5f7b9143df7bffff73a8bf7d8a53545dbf787f86e5e195c64401d2c6f8f372",
    ),
}


@pytest.fixture
def clothes(monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    """The first 500 test images of Fashion-MNIST, which `FashionMNIST(split="test")` loads while a test uses this."""
    monkeypatch.setattr(fashion_mnist, "PUBLISHED", PART)
    monkeypatch.setenv("FEWSTEP_DATA", str(Path(__file__).parent))
    return FashionMNIST(split="test").load()


@pytest.fixture
def folder(tmp_path):
    """A folder with a teacher of digits, the statistics of its images, and a run folder with a student of it."""
    pytest.importorskip("sklearn")
    digits = Digits().load()
    Reference.from_dataset(digits, Pixels(digits.shape)).save(tmp_path / "digits.npz")
    denoiser, spec = randomised(TINY["dit"]), TINY["dit"]
    provenance = {"reference": str(tmp_path / "digits.npz")}
    save_denoiser(tmp_path / "teacher.safetensors", denoiser, spec, provenance)
    (tmp_path / "run").mkdir()
    provenance = provenance | {"teacher": str(tmp_path / "teacher.safetensors")}
    save_generator(tmp_path / "run" / "student.safetensors", Generator(denoiser, [0.7, 0.4]), spec, provenance)
    return tmp_path
