import json
import math
import re
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.solvers import Solver
from fewstep.formats.model import save_denoiser
from fewstep.methods.pairs import PairSet, make_pairs
from fewstep.system import distributed
from fewstep.system.errors import FileError
from fewstep.system.weights import load_weights, save_weights
from fewstep.teachers import MixtureTeacher, NativeTeacher
from tests.support.networks import TINY, randomised


@pytest.fixture
def teacher(tmp_path):
    save_denoiser(tmp_path / "t.safetensors", randomised(TINY["dit"]), TINY["dit"], {})
    return NativeTeacher(path=str(tmp_path / "t.safetensors")).load()


def test_pairs_are_what_the_sampler_makes(teacher, tmp_path):
    make_pairs(teacher, tmp_path / "p", 6, evaluations=3, shard=4, batch=2, bf16=False)
    pairs = PairSet(tmp_path / "p", teacher)
    assert len(pairs) == 6 and pairs.labels.tolist() == [0, 1, 2, 3, 4, 5]
    with torch.no_grad():
        expected = Solver()(teacher.denoiser, pairs.z, 3, labels=pairs.labels)
    torch.testing.assert_close(pairs.y, expected, rtol=1e-4, atol=1e-4)
    batch = pairs.batch(torch.tensor([5, 0]), teacher.conditioner, torch.device("cpu"))
    assert torch.equal(batch.z, pairs.z[[5, 0]]) and batch.cond["labels"].tolist() == [5, 0]


def test_an_interrupted_run_makes_only_what_is_missing(teacher, tmp_path):
    make_pairs(teacher, tmp_path / "whole", 6, evaluations=1, shard=2)
    make_pairs(teacher, tmp_path / "part", 4, evaluations=1, shard=2)
    (tmp_path / "part" / "pairs-00000.json").unlink()  # killed between the two files of a shard
    assert make_pairs(teacher, tmp_path / "part", 6, evaluations=1, shard=2) == 2
    whole, part = (PairSet(tmp_path / name, teacher) for name in ("whole", "part"))
    assert torch.equal(whole.z, part.z) and torch.equal(whole.y, part.y)
    assert whole.fingerprint == part.fingerprint  # so that a run on the one goes on with the other, and with no others
    make_pairs(teacher, tmp_path / "others", 6, evaluations=2, shard=2)
    assert PairSet(tmp_path / "others", teacher).fingerprint != whole.fingerprint


def test_processes_share_the_shards(teacher, tmp_path, monkeypatch):
    make_pairs(teacher, tmp_path / "one", 7, evaluations=1, shard=2)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    reached = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        make_pairs(teacher, tmp_path / "two", 7, evaluations=1, shard=2, progress=reached.append)
        made = sorted(path.stem for path in (tmp_path / "two").glob("*.safetensors"))
        assert made == [f"pairs-{i:05d}" for i in ((0, 2), (0, 1, 2, 3))[rank]]
    assert reached == [4, 7, 4, 6]
    one, two = (PairSet(tmp_path / name, teacher) for name in ("one", "two"))
    assert torch.equal(one.z, two.z) and torch.equal(one.y, two.y)


def test_a_larger_last_shard_is_made_anew(teacher, tmp_path):
    make_pairs(teacher, tmp_path / "p", 3, evaluations=1, shard=2)
    make_pairs(teacher, tmp_path / "p", 4, evaluations=1, shard=2)
    assert len(PairSet(tmp_path / "p", teacher)) == 4


def test_foreign_damaged_and_missing_pairs_are_refused(teacher, tmp_path):
    with pytest.raises(FileError, match="fewstep pairs"):
        PairSet(tmp_path / "none", teacher)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "pairs.json").write_text("{}")  # killed before its first shard was there
    with pytest.raises(FileError, match="must be a folder with pairs"):
        PairSet(tmp_path / "begun", teacher)
    make_pairs(teacher, tmp_path / "p", 2, evaluations=1)
    with pytest.raises(FileError, match=r"evaluations 3, got .* with 1"):
        make_pairs(teacher, tmp_path / "p", 2, evaluations=3)
    shard = tmp_path / "p" / "pairs-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(FileError, match="delete that shard"):
        PairSet(tmp_path / "p", teacher)
    about = json.loads((tmp_path / "p" / "pairs.json").read_text())
    (tmp_path / "p" / "pairs.json").write_text(json.dumps(about | {"teacher_sha256": "0" * 64}))
    with pytest.raises(FileError, match="must be made with this run"):
        PairSet(tmp_path / "p", teacher)


def test_pairs_of_points(tmp_path):
    teacher = MixtureTeacher(fit_steps=0).load()
    make_pairs(teacher, tmp_path, 5, evaluations=5, bf16=False)
    assert load_weights(tmp_path / "pairs-00000.safetensors")[0]["y"].shape == (5, 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to see what a process holds")
def test_pairs_stay_in_their_files(teacher, tmp_path):
    """64 MiB of pairs, of which a process holds no more than it draws: eight processes would hold half a GiB."""
    make_pairs(teacher, tmp_path / "p", 2, evaluations=1, shard=1)
    shape, count = tuple(teacher.shape), 2**25 // (4 * math.prod(teacher.shape))
    for number in range(2):
        z = torch.full((count, *shape), float(number))
        tensors = {"z": z, "y": z + 0.5, "labels": torch.zeros(count, dtype=torch.long)}
        save_weights(tmp_path / "p" / f"pairs-{number:05d}.safetensors", tensors, {"first_seed": 0, "count": count})
    del z, tensors

    def held():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])

    before = held()
    pairs = PairSet(tmp_path / "p", teacher)
    batch = pairs.batch(torch.tensor([0, count - 1, count, 2 * count - 1]), teacher.conditioner, torch.device("cpu"))
    assert held() - before < 2**24
    assert [value.flatten().unique().tolist() for value in batch.z] == [[0], [0], [1], [1]]
    assert [value.flatten().unique().tolist() for value in batch.y] == [[0.5], [0.5], [1.5], [1.5]]
