"""Checkpoints come back bit for bit, survive any death of the process, and refuse damage with a way out."""

import copy
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fewstep.system import checkpoint, files, weights
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.errors import FileError, WriteError
from fewstep.system.files import RunLock, atomic_write
from fewstep.system.weights import load_weights, save_weights
from tests.support.places import ROOT


def run_script(script: str, *arguments: object, command: tuple[str, ...] = ()) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state_of(images: int) -> dict:
    return {"weight": torch.full((50,), float(images)), "images": images}


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_same(actual, expected) -> None:
    """Equal values, types, dtypes, bits and order of keys."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert (
            actual.cpu().contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
        )
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert [type(key) for key in actual] == [type(key) for key in expected]
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(actual) is type(expected) and repr(actual) == repr(expected)


class TestContent:
    def test_every_kind_of_value_comes_back(self, tmp_path):
        numbers = torch.tensor([[0.0, 1.5, 3.0], [4.0, 5.0, 6.0]])
        state = {
            "dtypes": {name: numbers.to(dtype) for name, dtype in checkpoint._DTYPES.items()},
            "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
            "shapes": [torch.tensor(7), torch.empty(0, 3), torch.randn(2, 3, 4, 4)],
            "integer keys": {0: {"step": torch.tensor(3.0)}, 10: {}, 2: None},
            "containers": {"empty": {}, "list": [], "tuple": (0.9, 0.999), "nested": [(1, [2, {}])]},
            "numbers": [1, True, 0.1, 1e300, float("nan"), float("-inf"), -0.0, 2**70],
            "dotted.key": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
            "word": "ümlaut \n",
        }
        checkpoints = Checkpoints(tmp_path)
        path = checkpoints.save(1, state)
        assert_same(checkpoints.load(), state)
        assert not [
            name
            for name in names_in(path)
            if name not in ("manifest.json", "tree.json") and not name.endswith(".safetensors")
        ]

    def test_strided_shared_and_tied_tensors(self, tmp_path):
        base = torch.arange(24.0).reshape(2, 3, 4)
        state = {
            "base": base,
            "same": base,
            "row": base[1],
            "transposed": base.mT,
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "parameter": torch.nn.Parameter(torch.randn(3)),
        }  # fmt: skip
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state)
        loaded = checkpoints.load()
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor), name
        loaded["same"].zero_()
        assert torch.equal(loaded["base"], base)

    def test_a_state_without_tensors(self, tmp_path):
        Checkpoints(tmp_path).save(5, {"images": 5})
        assert Checkpoints(tmp_path).load() == {"images": 5}

    def test_many_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "_BYTES_PER_FILE", 100)
        state = {str(i): torch.randn(20) for i in range(7)}
        path = Checkpoints(tmp_path).save(1, state)
        assert len(list(path.glob("*.safetensors"))) > 3
        assert_same(Checkpoints(tmp_path).load(), state)

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            ({"a": {"b": object()}}, "a/b.*object"),
            ({"a": [torch.float32]}, "a/0.*dtype"),
            ({"a": {1.5: 2}}, "1.5"),
            ({"a": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
            ({"a": torch.zeros(2).to_sparse()}, "sparse"),
            ({"a": {0: torch.zeros(1), "0": torch.zeros(1)}}, "two tensors"),
        ],
    )
    def test_what_cannot_be_saved_is_named(self, tmp_path, state, words):
        with pytest.raises(FileError, match=words):
            Checkpoints(tmp_path).save(1, state)
        assert names_in(tmp_path) == []

    def test_only_some_entries(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, {"ema": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}, "n": 3})
        assert_same(checkpoints.load(only=["ema", "n"]), {"ema": {"w": torch.ones(2)}, "n": 3})
        into = {"ema": {"w": torch.zeros(2)}, "model": {"w": torch.ones(2)}}
        checkpoints.load(only=["ema"], into=into)
        assert_same(into, {"ema": {"w": torch.ones(2)}, "model": {"w": torch.ones(2)}})
        with pytest.raises(FileError, match="no entry critic"):
            checkpoints.load(only=["critic"])


class TestResume:
    def nets(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95), amsgrad=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return net, optimizer, schedule

    def train(self, net, optimizer, schedule, steps):
        for step in steps:
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            schedule.step()

    @pytest.mark.parametrize("in_place", [False, True])
    def test_adamw_goes_on_bit_for_bit_in_a_fresh_optimizer(self, tmp_path, in_place):
        unbroken = self.nets()
        self.train(*unbroken, range(6))
        first = self.nets()
        self.train(*first, range(3))
        parts = ("net", "optimizer", "schedule")
        saved = {name: part.state_dict() for name, part in zip(parts, first, strict=True)}
        expected = copy.deepcopy(saved)
        Checkpoints(tmp_path).save(48, saved)
        self.train(*first, range(3, 4))  # must not reach the file

        resumed = self.nets()
        into = {name: part.state_dict() for name, part in zip(parts, resumed, strict=True)}
        assert not into["optimizer"]["state"]
        state = Checkpoints(tmp_path).load(into=into if in_place else None)
        for name in ("optimizer", "schedule"):
            assert_same(state[name], expected[name])
        if in_place:
            assert_same(dict(resumed[0].state_dict()), dict(expected["net"]))
        for part, name in zip(resumed, parts, strict=True):
            part.load_state_dict(state[name])
        self.train(*resumed, range(3, 6))
        for one, other in zip(resumed, unbroken, strict=True):
            assert_same(dict(one.state_dict()), dict(other.state_dict()))

    @pytest.mark.parametrize(
        ("into", "words"),
        [
            ({"weight": torch.zeros(49)}, r"weight was saved as torch.float32 \[50\].*\[49\]"),
            ({"weight": torch.zeros(50, dtype=torch.float16)}, "torch.float32.*torch.float16"),
            ({"weight": torch.zeros(50), "bias": torch.zeros(1)}, "no tensor bias"),
        ],
    )
    def test_a_state_that_does_not_fit(self, tmp_path, into, words):
        Checkpoints(tmp_path).save(1, state_of(1))
        before = copy.deepcopy(into)
        with pytest.raises(FileError, match=words):
            Checkpoints(tmp_path).load(into=into)
        assert_same(into, before)


class TestFolder:
    def test_empty(self, tmp_path):
        checkpoints = Checkpoints(tmp_path / "none")
        assert checkpoints.latest() is None and checkpoints.best() is None
        with pytest.raises(FileError, match="none holds no checkpoint"):
            checkpoints.load()
        with pytest.raises(ValueError, match="`keep` must be at least 1"):
            Checkpoints(tmp_path, keep=0)

    def test_newest_and_best_are_kept(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, keep=2)
        for images, score in [(1, None), (2, 9.0), (3, 3.0), (4, 3.0), (5, 4.0), (6, None)]:
            assert checkpoints.save(images, state_of(images), score=score).name == f"{images:012d}"
        assert [int(name) for name in names_in(tmp_path)] == [3, 5, 6]
        best, latest = checkpoints.best(), checkpoints.latest()
        assert best is not None and checkpoints.images_of(best) == 3  # the older of equals
        assert latest is not None and checkpoints.images_of(latest) == 6
        assert_same(checkpoints.load(best), state_of(3))
        assert_same(checkpoints.load(), state_of(6))

    def test_a_score_must_be_finite(self, tmp_path):
        with pytest.raises(FileError, match="must be a finite number, got nan"):
            Checkpoints(tmp_path).save(1, state_of(1), score=float("nan"))

    def test_same_images_again_replaces_and_keeps_the_score(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(7, state_of(7), score=1.0)
        checkpoints.save(7, {"other": torch.ones(3)})
        assert names_in(tmp_path) == ["000000000007"]
        assert_same(checkpoints.load(), {"other": torch.ones(3)})
        assert checkpoints.best() == checkpoints.latest()

    def test_a_new_run_does_not_overwrite_an_old_one(self, tmp_path):
        Checkpoints(tmp_path).save(500, state_of(500))
        with pytest.raises(FileError, match=r"newer than .*got 000000000500.*another folder"):
            Checkpoints(tmp_path).save(100, state_of(100))
        assert names_in(tmp_path) == ["000000000500"]

    def test_leftovers_of_killed_runs_go_at_the_next_save_not_while_reading(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state_of(1))
        (tmp_path / ".tmp-000000000002").mkdir()
        (tmp_path / ".tmp-000000000002" / "half").write_bytes(b"x")
        assert checkpoints.load()["images"] == 1  # perhaps another process is writing there
        assert ".tmp-000000000002" in names_in(tmp_path)
        checkpoints.save(2, state_of(2))
        assert names_in(tmp_path) == ["000000000001", "000000000002"]


class TestDamage:
    @pytest.mark.parametrize("file", ["manifest.json", "tree.json", "*.safetensors"])
    @pytest.mark.parametrize("how", ["missing", "truncated", "emptied", "altered"])
    def test_each_file(self, tmp_path, file, how):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state_of(1), score=2.0)
        path = checkpoints.save(2, state_of(2), score=1.0)
        (target,) = path.glob(file)
        data = bytearray(target.read_bytes())
        if how == "missing":
            target.unlink()
        elif how == "truncated":
            target.write_bytes(data[:-1])
        elif how == "emptied":
            target.write_bytes(b"")
        else:
            data[len(data) // 2] ^= 1
            target.write_bytes(data)

        way_out = rf"{target.name}.*Delete the folder {path} to resume from 000000000001"
        with pytest.raises(FileError, match=way_out):
            checkpoints.load()
        if how != "altered" or file == "manifest.json":
            with pytest.raises(FileError, match=way_out):
                checkpoints.latest()
        if file == "manifest.json":
            with pytest.raises(FileError, match=way_out):
                checkpoints.best()
        shutil.rmtree(path)
        assert_same(checkpoints.load(), state_of(1))

    def test_the_message_without_an_older_one(self, tmp_path):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        (path / "tree.json").unlink()
        with pytest.raises(FileError, match=r"tree.json: the file is missing.*no older checkpoint"):
            Checkpoints(tmp_path).latest()

    def test_sizes_are_in_the_message(self, tmp_path):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        size = (path / "tree.json").stat().st_size
        (path / "tree.json").write_bytes(b"{}")
        with pytest.raises(FileError, match=f"has 2 bytes, {size} were saved"):
            Checkpoints(tmp_path).latest()

    def test_hashes_can_be_skipped(self, tmp_path):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        (shard,) = path.glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        with pytest.raises(FileError, match="sha256"):
            Checkpoints(tmp_path).load()
        assert Checkpoints(tmp_path).load(hashes=False)["weight"].ne(1.0).sum() == 1

    def test_a_damaged_older_one_neither_stops_saving_nor_is_removed(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, keep=1)
        (checkpoints.save(1, state_of(1)) / "manifest.json").unlink()
        checkpoints.save(2, state_of(2))
        checkpoints.save(3, state_of(3))
        assert [int(name) for name in names_in(tmp_path)] == [1, 3]

    def test_a_renamed_checkpoint(self, tmp_path):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        path.rename(tmp_path / "000000000009")
        with pytest.raises(FileError, match="manifest of 1 images"):
            Checkpoints(tmp_path).latest()
        (tmp_path / "000000000009").rename(tmp_path / "best")
        with pytest.raises(FileError, match="no checkpoint folder"):
            Checkpoints(tmp_path).load(tmp_path / "best")

    def test_a_newer_format(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
        Checkpoints(tmp_path).save(1, state_of(1))
        monkeypatch.undo()
        with pytest.raises(FileError, match="format version 2, this fewstep reads 1"):
            Checkpoints(tmp_path).latest()


class Hostile:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def forge(path: Path) -> None:
    """A manifest that agrees with whatever lies in the folder: checksums do not stop someone hostile."""
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_bytes(checkpoint._manifest(path, Checkpoints.images_of(path), None))


class TestHostile:
    @pytest.mark.parametrize(
        "name", [".metadata", "__0_0.distcp", "shard", "tree.json", "extra.safetensors", "manifest.json"]
    )
    @pytest.mark.parametrize("forged", [False, True])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_no_pickle_is_ever_loaded(self, tmp_path, name, forged, zipped):
        path = Checkpoints(tmp_path / "run").save(1, state_of(1))
        target = next(path.glob("shard*")) if name == "shard" else path / name
        trace = tmp_path / "trace"
        if zipped:
            stream = io.BytesIO()
            torch.save(Hostile(trace), stream)
            target.write_bytes(stream.getvalue())
        else:
            target.write_bytes(pickle.dumps(Hostile(trace)))
        if forged and name != "manifest.json":
            forge(path)
        if forged and name in (".metadata", "__0_0.distcp"):
            assert_same(Checkpoints(tmp_path / "run").load(), state_of(1))  # never even opened as a pickle
        else:
            with pytest.raises(FileError, match=target.name):
                Checkpoints(tmp_path / "run").load(into=state_of(1))
        assert not trace.exists()
        if not zipped:
            pickle.loads(pickle.dumps(Hostile(trace)))
            assert trace.exists()  # the pickle does what this test is afraid of

    @pytest.mark.parametrize(
        "tree",
        [
            b"[" * 100_000,
            b"null",
            b"{}",
            b'{"dict": 3}',
            b'{"dict": [["weight", {"tensor": "weight", "dtype": "float32", "shape": [1000000000000]}]]}',
            b'{"dict": [["weight", {"tensor": "weight", "dtype": "float32", "shape": [-50, -1]}]]}',
            b'{"dict": [["weight", {"tensor": "other", "dtype": "float32", "shape": [50]}]]}',
            b'{"dict": [["weight", {"tensor": "weight", "dtype": "os.system", "shape": [50]}]]}',
            b'{"dict": [["weight", {"eval": "1"}]]}',
            b'{"dict": [["weight", {"list": 1, "dict": 2}]]}',
        ],
    )
    def test_trees(self, tmp_path, tree):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        (path / "tree.json").write_bytes(tree)
        forge(path)
        with pytest.raises(FileError, match=r"tree\.json"):
            Checkpoints(tmp_path).load()

    def test_a_hole_in_a_sharded_tensor(self, tmp_path):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        (shard,) = path.glob("*.safetensors")
        information = {"DCP_SHARDING_INFO": json.dumps({"weight": {"saved_offsets": [40]}})}
        safetensors.torch.save_file({"weight": torch.zeros(10)}, shard, information)
        forge(path)
        with pytest.raises(FileError, match="10 values"):
            Checkpoints(tmp_path).load()

    @pytest.mark.parametrize("information", ["{", "{}", '{"weight": {"saved_offsets": [60]}}', '{"weight": 1}'])
    def test_shard_headers(self, tmp_path, information):
        path = Checkpoints(tmp_path).save(1, state_of(1))
        (shard,) = path.glob("*.safetensors")
        safetensors.torch.save_file({"weight": torch.zeros(50)}, shard, {"DCP_SHARDING_INFO": information})
        forge(path)
        with pytest.raises(FileError, match="safetensors"):
            Checkpoints(tmp_path).load()

    def test_a_manifest_that_leaves_the_folder(self, tmp_path):
        path = Checkpoints(tmp_path / "run").save(1, state_of(1))
        (tmp_path / "secret").write_text("x")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["../../secret"] = manifest["files"].pop("tree.json")
        manifest["sha256"] = checkpoint._digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(FileError, match="secret"):
            Checkpoints(tmp_path / "run").load()


KILLED_AT_EVERY_STEP = """
    import builtins, os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from fewstep.system.checkpoint import Checkpoints, _checkpoints_in, _verify

    folder = Path(sys.argv[1]) / "run"
    # lazy imports, once for all children
    Checkpoints(folder.with_name("warm-up")).save(1, {"weight": torch.ones(1)})

    def state(images):
        return {"weight": torch.full((5000,), float(images)), "images": images}

    def in_child(action):
        child = os.fork()
        if child == 0:
            action()
            os._exit(0)
        return child

    def check(allowed):
        checkpoints = Checkpoints(folder)
        latest = checkpoints.latest()
        images = checkpoints.images_of(latest) if latest else 0
        assert images in allowed, (images, allowed)
        if latest:
            loaded = checkpoints.load()
            assert loaded["images"] == images and loaded["weight"].eq(images).all()
        for path in _checkpoints_in(folder):  # the older ones too
            _verify(path, hashes=True)
        return images

    def save_and_die(images, step):
        steps = 0
        def counted(call):
            def wrapper(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapper
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = counted(open)
        Checkpoints(folder, keep=1).save(images, state(images))

    # At every step of a save; every second save replaces the newest checkpoint instead of adding one.
    deaths = 0
    images = 0
    for replace in (False, True):
        step = 0
        while True:
            step += 1
            new = images if replace else images + 1
            child = in_child(lambda: save_and_die(new, step))
            died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            images = check({images, new})
            if not died:
                assert images == new
                break
            deaths += 1
    steps = deaths

    # At random moments of a run that saves all the time.
    def save_on():
        checkpoints = Checkpoints(folder)
        for number in range(images + 1, images + 1000):
            checkpoints.save(number, state(number))
    generator = random.Random(0)
    for _ in range(8):
        child = in_child(save_on)
        while not [path for path in _checkpoints_in(folder) if Checkpoints.images_of(path) > images]:
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        images = check(range(images + 1, images + 1000))
    Checkpoints(folder).save(images + 1, state(images + 1))
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]
    print(steps)
"""


@pytest.mark.slow
def test_kill_at_every_step_and_at_random_moments(tmp_path):
    steps = int(run_script(KILLED_AT_EVERY_STEP, tmp_path))
    assert steps > 30  # two saves, more than fifteen system calls each


class TestDiskFull:
    def fail_at(self, monkeypatch, name, number, code):
        calls = itertools.count(1)
        call = getattr(os, name)

        def failing(*args, **kwargs):
            if next(calls) == number:
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, failing)

    @pytest.mark.parametrize("number", [1, 2, 3, 4])
    def test_each_write_of_a_save(self, tmp_path, monkeypatch, number):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state_of(1))
        self.fail_at(monkeypatch, "fsync", number, errno.ENOSPC)
        words = r"No space left.*bytes are needed.*free. Try: make room.*000000000001 is intact"
        with pytest.raises(WriteError, match=words) as caught:
            checkpoints.save(2, state_of(2))
        assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert names_in(tmp_path) == ["000000000001"]
        checkpoints.save(2, state_of(2))
        assert_same(checkpoints.load(), state_of(2))

    @pytest.mark.parametrize("number", [1, 2])
    def test_replacing_a_checkpoint_fails_halfway(self, tmp_path, monkeypatch, number):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state_of(1))
        self.fail_at(monkeypatch, "rename", number, errno.EIO)
        with pytest.raises(WriteError, match="is intact"):
            checkpoints.save(1, {"new": 1})
        monkeypatch.undo()
        assert_same(checkpoints.load(), state_of(1))
        checkpoints.save(1, {"new": 1})
        assert names_in(tmp_path) == ["000000000001"]
        assert checkpoints.load() == {"new": 1}

    def test_ctrl_c_in_the_middle_is_no_other_error(self, tmp_path, monkeypatch):
        def interrupted(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(tmp_path).save(1, state_of(1))
        assert names_in(tmp_path) == []

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(WriteError, match=r"check that .* can be written to"):
            Checkpoints(tmp_path / "file" / "run").save(1, state_of(1))

    def test_a_really_full_disk(self, tmp_path):
        unshare = ("unshare", "--user", "--map-root-user", "--mount")
        mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
        try:
            allowed = subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode == 0
        except FileNotFoundError:
            allowed = False
        if not allowed:
            pytest.skip(
                "this machine allows no user namespace (unshare --user --mount), in which a small disk is mounted"
            )
        script = """
            import subprocess, sys
            from pathlib import Path
            import torch
            from fewstep.system.checkpoint import Checkpoints
            from fewstep.system.files import WriteError, atomic_write
            from fewstep.system.weights import save_weights
            folder = Path(sys.argv[1])
            subprocess.run(sys.argv[2].split(), check=True)
            checkpoints = Checkpoints(folder / "run")
            checkpoints.save(1, {"weight": torch.ones(1000)})
            big = torch.ones(600_000)
            for write in (
                lambda: checkpoints.save(2, {"weight": big}),
                lambda: save_weights(folder / "ema.safetensors", {"weight": big}, {}),
                lambda: atomic_write(folder / "page.html", "x" * 3_000_000),
            ):
                try:
                    write()
                except WriteError as error:
                    print(error)
                else:
                    raise AssertionError("no error")
            assert sorted(entry.name for entry in folder.rglob("*") if ".tmp" in entry.name) == []
            assert sorted(entry.name for entry in folder.iterdir()) == ["run"]
            assert checkpoints.load()["weight"].eq(1).all()
            checkpoints.save(2, {"weight": torch.ones(1000)})
        """
        lines = run_script(script, tmp_path, mount, command=unshare).splitlines()
        assert len(lines) == 3
        for line in lines:
            assert "No space left on device" in line and "bytes are needed" in line and "intact" in line
        assert "000000000001 is intact" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_renames_waits_for_the_second(tmp_path, monkeypatch, number):
    """Or else a student's weights would lie beside the JSON of those before them."""
    path, replace = tmp_path / "student.safetensors", os.replace
    save_weights(path, {"weight": torch.zeros(3)}, {"images": 1})

    def interrupted(*names):
        replace(*names)
        signal.raise_signal(number)

    def stop(*_):
        raise KeyboardInterrupt("as before")

    before = signal.signal(number, stop)
    monkeypatch.setattr(os, "replace", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt, match="as before"):
            save_weights(path, {"weight": torch.ones(3)}, {"images": 2})
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    tensors, metadata = load_weights(path)
    assert tensors["weight"].eq(1).all() and metadata["images"] == 2
    assert names_in(tmp_path) == ["student.json", "student.safetensors"]


class TestRunLock:
    def test_two_locks(self, tmp_path):
        script = """
            import sys
            from fewstep.system.files import RunLock
            with RunLock(sys.argv[1]):
                print("locked", flush=True)
                sys.stdin.read()
        """
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as other:
            assert other.stdout is not None and other.stdout.readline() == "locked\n"
            with pytest.raises(FileError, match=rf"run is in use by process {other.pid} on .*another folder"):
                RunLock(tmp_path / "run").__enter__()
            other.kill()
        with RunLock(tmp_path / "run"):  # dropped by the system
            text = (tmp_path / "run" / "lock-holder").read_text()
            assert str(os.getpid()) in text and str(other.pid) not in text
            with (
                pytest.raises(FileError, match=f"in use by process {os.getpid()}"),
                RunLock(tmp_path / "run"),
            ):
                pass
        with RunLock(tmp_path / "run"):
            pass
        assert not (tmp_path / "run" / "lock-holder").exists()

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        """What filelock says there, in a line with a way out."""

        def refuse(*_, **__):
            raise NotImplementedError("FileSystem does not appear to support flock")

        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
        with pytest.raises(WriteError, match="does not appear to support flock"), RunLock(tmp_path):
            pass

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(WriteError, match="check that"), RunLock(tmp_path / "file"):
            pass


class TestWeights:
    def test_there_and_back(self, tmp_path):
        base = torch.randn(4, 6)
        tensors = {
            "a": base,
            "tied": base,
            "view": base[1:],
            "strided": base.T,
            "half": base.bfloat16(),
            "n": torch.tensor(3),
        }
        metadata = {"images": 100, "fid": 3.5, "recipe": {"teacher": "x"}, "note": "ü"}
        save_weights(tmp_path / "net.safetensors", tensors, metadata)
        loaded, said = load_weights(tmp_path / "net.safetensors")
        digest = hashlib.sha256((tmp_path / "net.safetensors").read_bytes()).hexdigest()
        assert said == {**metadata, "sha256": digest}
        assert loaded.keys() == tensors.keys()
        for name in tensors:
            assert torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype
        assert names_in(tmp_path) == ["net.json", "net.safetensors"]
        assert torch.equal(safetensors.torch.load_file(tmp_path / "net.safetensors")["a"], base)  # anyone's reader

    @pytest.mark.parametrize("file", ["net.safetensors", "net.json"])
    @pytest.mark.parametrize("how", ["missing", "truncated", "emptied", "altered", "pickle"])
    def test_damage(self, tmp_path, file, how):
        save_weights(tmp_path / "net.safetensors", {"a": torch.ones(9)}, {})
        target, trace = tmp_path / file, tmp_path / "trace"
        data = bytearray(target.read_bytes())
        if how == "missing":
            target.unlink()
        elif how == "truncated":
            target.write_bytes(data[:-3])
        elif how == "emptied":
            target.write_bytes(b"")
        elif how == "altered":
            data[data.index(b"sha256") + 12 if file == "net.json" else -1] ^= 1
            target.write_bytes(data)
        else:
            target.write_bytes(pickle.dumps(Hostile(trace)))
        with pytest.raises(FileError, match=rf"{file}.*copy net.safetensors and net.json again"):
            load_weights(tmp_path / "net.safetensors")
        assert not trace.exists()

    @pytest.mark.parametrize(
        "blob",
        [
            b"\xff" * 8 + b"{}",
            (2).to_bytes(8, "little") + b"[]",
            (70).to_bytes(8, "little")
            + b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 999999999]}} '.ljust(70),
            pickle.dumps({"a": 1}),
        ],
    )
    def test_a_hostile_file_with_a_right_checksum(self, tmp_path, blob):
        save_weights(tmp_path / "net.safetensors", {"a": torch.ones(9)}, {})
        record = json.loads((tmp_path / "net.json").read_text())
        (tmp_path / "net.safetensors").write_bytes(blob)
        record |= {"size": len(blob), "sha256": files.file_sha256(tmp_path / "net.safetensors")}
        (tmp_path / "net.json").write_text(json.dumps(record))
        with pytest.raises(FileError, match="not a safetensors file"):
            load_weights(tmp_path / "net.safetensors")

    def test_a_newer_format(self, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "FORMAT_VERSION", 2)
        save_weights(tmp_path / "net.safetensors", {}, {})
        monkeypatch.undo()
        with pytest.raises(FileError, match="format version 2"):
            load_weights(tmp_path / "net.safetensors")

    @pytest.mark.parametrize("metadata", [{"a": torch.ones(1)}, {"a": float("nan")}])
    def test_metadata_must_be_json(self, tmp_path, metadata):
        with pytest.raises(FileError, match="not JSON"):
            save_weights(tmp_path / "net.safetensors", {}, metadata)
        assert names_in(tmp_path) == []

    def test_the_checksum_is_not_for_others_to_give(self, tmp_path):
        with pytest.raises(FileError, match="key sha256"):
            save_weights(tmp_path / "net.safetensors", {}, {"sha256": "abc"})

    def test_names(self, tmp_path):
        for call in (lambda path: save_weights(path, {}, {}), load_weights):
            with pytest.raises(FileError, match=r"weights must be in a \*.safetensors file, got .*net.pt"):
                call(tmp_path / "net.pt")

    def test_a_failed_write_leaves_the_old_pair(self, tmp_path, monkeypatch):
        save_weights(tmp_path / "net.safetensors", {"a": torch.ones(9)}, {"v": 1})
        for number in (1, 2):  # the weights, the JSON
            TestDiskFull().fail_at(monkeypatch, "fsync", number, errno.ENOSPC)
            with pytest.raises(WriteError, match=r"No space left.*previous content is intact"):
                save_weights(tmp_path / "net.safetensors", {"a": torch.zeros(9)}, {"v": 2})
            monkeypatch.undo()
            tensors, metadata = load_weights(tmp_path / "net.safetensors")
            assert metadata["v"] == 1 and tensors["a"].eq(1).all()
            assert names_in(tmp_path) == ["net.json", "net.safetensors"]


class TestAtomicWrite:
    def test_text_and_bytes(self, tmp_path):
        atomic_write(tmp_path / "a", "grün")
        assert (tmp_path / "a").read_bytes() == "grün".encode()
        atomic_write(str(tmp_path / "a"), b"\x00\n")
        assert (tmp_path / "a").read_bytes() == b"\x00\n"
        assert names_in(tmp_path) == ["a"]

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_failure_keeps_the_old(self, tmp_path, monkeypatch, call):
        atomic_write(tmp_path / "a", "old")
        TestDiskFull().fail_at(monkeypatch, call, 1, errno.ENOSPC)
        with pytest.raises(WriteError, match=r"cannot write .*a .*No space left.*3 bytes are needed"):
            atomic_write(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "old"
        assert names_in(tmp_path) == ["a"]

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(WriteError, match="none exists and can be written to"):
            atomic_write(tmp_path / "none" / "a", "x")


TWO_PROCESSES = """
    import sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from fewstep.system.checkpoint import FileError, Checkpoints

    def full():
        rows = torch.arange(21.0).reshape(7, 3)
        return {"rows": rows, "one": torch.ones(1, 2), "columns": torch.randn(3, 4)}

    def work(rank, folder):
        torch.manual_seed(0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        def place(tensors, placements):
            return {k: distribute_tensor(v, mesh, [p]) for (k, v), p in zip(tensors.items(), placements)}
        whole = full()
        state = {"net": place(whole, (Shard(0), Shard(0), Shard(1))), "plain": torch.ones(2), "n": 5}
        checkpoints = Checkpoints(Path(folder) / "run")
        checkpoints.save(1, state)
        blank = {k: torch.zeros_like(v) for k, v in whole.items()}
        into = {"net": place(blank, (Shard(1), Replicate(), Shard(0))), "plain": torch.zeros(2)}
        loaded = checkpoints.load(into=into)
        for name, tensor in whole.items():
            assert isinstance(loaded["net"][name], DTensor)
            assert torch.equal(loaded["net"][name].full_tensor(), tensor), name
            assert torch.equal(into["net"][name].full_tensor(), tensor), name
        assert loaded["n"] == 5 and into["plain"].eq(1).all()
        try:  # found by rank 0, raised on both
            checkpoints.save(0, state)
        except FileError as error:
            Path(folder, f"refused{rank}").write_text(str(error))
        dist.destroy_process_group()

    if __name__ == "__main__":
        folder = sys.argv[1]
        mp.start_processes(work, (folder,), nprocs=2, start_method="fork")
        torch.manual_seed(0)
        loaded = Checkpoints(Path(folder) / "run").load()
        for name, tensor in full().items():
            assert torch.equal(loaded["net"][name], tensor), name
"""


@pytest.mark.slow
def test_saved_by_two_processes_read_by_two_others_and_by_one(tmp_path):
    run_script(TWO_PROCESSES, tmp_path)
    assert {"refused0", "refused1"} <= set(names_in(tmp_path))
    assert len(list((tmp_path / "run" / "000000000001").glob("shard-*"))) == 2
