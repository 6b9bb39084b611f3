"""EDM's pickles: files of the published layout are read, everything else is refused, nothing is ever executed."""

import pickle
import random
import struct
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import yaml

from fewstep.cli.main import main
from fewstep.formats.edm import load_edm_pickle, published_network
from fewstep.formats.edm_pickle import read_edm_pickle
from fewstep.formats.model import load_denoiser, load_generator
from fewstep.run.recipes import find_recipe
from fewstep.system.errors import FileError
from tests.support.golden import CONFIGS, golden
from tests.support.published import Call, persistent, tensor_of, write_published

BOMB = "import pathlib; pathlib.Path({!r}).touch()"  # what the published loader would run


@pytest.fixture(autouse=True)
def invented_modules():
    """Modules that `_global` makes up are gone after a test."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("torch_utils", "dnnlib")):
            del sys.modules[name]


def write(path, name, source="", arguments=None, class_name="EDMPrecond"):
    """A teacher file of the published layout with the golden network `name`; returns its denoiser."""
    denoiser, *_ = golden(name)
    arguments = CONFIGS[name] | {"use_fp16": False, "sigma_min": 0, "sigma_max": float("inf")} | (arguments or {})
    write_published(path, denoiser, arguments, source, class_name)
    return denoiser


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_teacher_is_read_and_its_source_never_run(tmp_path, name):
    written = write(tmp_path / "t.pkl", name, BOMB.format(str(tmp_path / "ran")))
    denoiser, spec, provenance = load_edm_pickle(tmp_path / "t.pkl")
    assert spec == written.net.spec and provenance["source"] == "t.pkl" and len(provenance["source_sha256"]) == 64
    state = written.state_dict()
    assert denoiser.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in denoiser.state_dict().items())
    assert not (tmp_path / "ran").exists()
    again, model, _ = load_denoiser(tmp_path / "t.pkl")
    assert model.net == spec and torch.equal(again.net.map_layer0.weight, written.net.map_layer0.weight)


HOSTILE = {
    "a system call": Call("posix", "system", "touch ran"),
    "eval": Call("builtins", "eval", "1"),
    "a class of torch": Call("torch.nn.modules.linear", "Linear", 1, 1),
    "getattr": Call("builtins", "getattr", "x", "y"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_name_that_no_network_needs_is_refused_and_told(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    hostile = HOSTILE[what]
    for place in ({"ema": hostile}, {"ema": None, "other": [hostile]}, [hostile]):
        (tmp_path / "t.pkl").write_bytes(pickle.dumps(place, protocol=4))
        with pytest.raises(FileError, match=rf"refers to {hostile.module}.{hostile.name}"):
            read_edm_pickle(tmp_path / "t.pkl")
    assert not (tmp_path / "ran").exists()


def test_hostile_bytes_inside_a_tensor_are_refused(tmp_path):
    blob = b"".join(
        pickle.dumps(part, protocol=2)
        for part in (0x1950A86A20F9469CFC6C, 1001, {}, Call("builtins", "eval", "1"), ["0"])
    )
    storage = Call("torch.storage", "_load_from_bytes", blob + struct.pack("<q", 1) + b"0000")
    weight = Call("torch._utils", "_rebuild_tensor_v2", storage, 0, (1,), (1,), False, OrderedDict())
    top = persistent("EDMPrecond", "", _init_kwargs={}, _parameters={"w": weight}, _buffers={}, _modules={})
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"ema": top}, protocol=4))
    with pytest.raises(FileError, match=r"refers to (builtins|__builtin__)\.eval, which a tensor does not need"):
        read_edm_pickle(tmp_path / "t.pkl")


def lying(size, stride=(1,), offset=0):
    value = torch.arange(6.0)
    record = tensor_of(value)
    record.arguments = (record.arguments[0], offset, size, stride, False, OrderedDict())
    return record


@pytest.mark.parametrize("record", [
    lying((7,)), lying((2**62,)), lying((-1,)), lying((6,), offset=1), lying((6,), (2**40,)), lying((2, 3), (1,)),
    lying((1000, 1000), (0, 0)), lying("ab", "cd"), lying(3), lying((True,)), lying(((1, 2),)),
])  # fmt: skip
def test_sizes_beyond_the_bytes_present_are_refused(tmp_path, record):
    top = persistent("EDMPrecond", "", _init_kwargs={}, _parameters={"w": record}, _buffers={}, _modules={})
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"ema": top}, protocol=4))
    with pytest.raises(FileError):
        read_edm_pickle(tmp_path / "t.pkl")


BOMBS = {
    # a list of itself, tuples whose hash doubles with each level, memory claimed by an index or a length
    "itself as a module": b"\x80\x04}\x94\x8c\x03emah\x00s.",
    "a tuple that takes for ever to hash": b"\x80\x04}" + b"K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "a table of a billion entries": b"\x80\x04}r\xff\xff\xff\xff.",
    "a billion bytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
    "text of a billion letters": b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00.",
    "an old protocol's global": b"cposix\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "text": b"hello",
    "a zip file": b"PK\x03\x04",
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.timeout(20)
def test_small_files_that_ask_for_much_are_refused_at_once(tmp_path, what):
    (tmp_path / "t.pkl").write_bytes(BOMBS[what])
    with pytest.raises(FileError):
        read_edm_pickle(tmp_path / "t.pkl")


@pytest.mark.parametrize(("arguments", "class_name", "words"), [
    ({}, "VPPrecond", "holds a VPPrecond"),
    ({"model_type": "Transformer"}, "EDMPrecond", "its network is a Transformer"),
    ({"decoder_type": "skip"}, "EDMPrecond", "decoder_type 'skip'"),
    ({"novelty": 1}, "EDMPrecond", "takes novelty"),
    ({"num_blocks": 2}, "EDMPrecond", "describes a network of"),
    ({"num_blocks": "many"}, "EDMPrecond", "num_blocks"),
    ({"sigma_data": -1}, "EDMPrecond", "sigma_data"),
])  # fmt: skip
def test_networks_that_are_not_built_here(tmp_path, arguments, class_name, words):
    write(tmp_path / "t.pkl", "edm_ddpmpp", arguments=arguments, class_name=class_name)
    with pytest.raises(FileError, match=rf"t\.pkl: .*{words}"):
        load_edm_pickle(tmp_path / "t.pkl")


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path):
    """Bytes flipped, cut, doubled and overwritten: read or refused, never another error, never more memory or time."""
    write(tmp_path / "good.pkl", "edm_adm")
    good = (tmp_path / "good.pkl").read_bytes()
    # the interesting part: what is not weights. A short tensor in the file keeps mutants quick to read.
    top = persistent(
        "EDMPrecond", "x", _init_kwargs=dict(CONFIGS["edm_adm"]), _buffers=OrderedDict(), training=False,
        _parameters=OrderedDict(w=Call("torch._utils", "_rebuild_parameter", tensor_of(torch.ones(3)), True, OrderedDict())),
        _modules=OrderedDict(a=persistent("Linear", "x", _parameters=OrderedDict(b=tensor_of(torch.ones(2, 2))))),
    )  # fmt: skip
    small = pickle.dumps({"ema": top}, protocol=4)
    rng, read = random.Random(0), 0
    file = tmp_path / "t.pkl"
    for number in range(10_000):
        mutant = bytearray(good[:4000] if number % 50 == 0 else small)
        for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
            at = rng.randrange(len(mutant))
            match rng.randrange(5):
                case 0:
                    mutant[at] = rng.randrange(256)
                case 1:
                    mutant[at] ^= 1 << rng.randrange(8)
                case 2:
                    del mutant[at : at + rng.randrange(1, 30)]
                case 3:
                    mutant[at:at] = mutant[at : at + rng.randrange(1, 30)]
                case 4:
                    mutant[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"))
            if not mutant:
                break
        file.write_bytes(mutant)
        try:
            read_edm_pickle(file)
            read += 1
        except FileError:
            pass
    assert 0 < read < 10_000


def test_imported_files_are_used_by_every_command(tmp_path, capsys):
    written = write(tmp_path / "t.pkl", "edm_ddpmpp")
    assert main(["import", str(tmp_path / "t.pkl"), "--out", str(tmp_path / "teacher")]) == 0
    assert main(["import", str(tmp_path / "t.pkl"), "--out", str(tmp_path / "sid"), "--sigma-init", "2.5"]) == 0
    assert "fewstep sample" in capsys.readouterr().out
    for number, model in enumerate((tmp_path / "t.pkl", tmp_path / "teacher")):
        arguments = [
            "sample",
            str(model),
            "--seeds",
            "0-3",
            "--evaluations",
            "3",
            "--out",
            str(tmp_path / f"{number}.npz"),
        ]
        assert main(arguments) == 0
    first, second = (np.load(tmp_path / f"{number}.npz")["images"] for number in (0, 1))
    assert (first == second).all()

    generator, spec, provenance = load_generator(tmp_path / "sid" / "student.safetensors")
    assert spec.net == written.net.spec and provenance["source_class"] == "EDMPrecond"
    noise = torch.randn(2, 3, 16, 16)
    t = torch.full((2,), generator.times[0], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(generator([noise]), written(2.5 * noise, t), rtol=1e-4, atol=1e-4)

    (tmp_path / "t.pkl").write_bytes(b"cposix\nsystem\n.")
    assert main(["import", str(tmp_path / "t.pkl"), "--out", str(tmp_path / "no")]) == 1
    assert "refers to posix.system" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(("name", "millions"), [
    ("edm-cifar10-32x32-cond-vp.pkl", 55.7), ("edm-cifar10-32x32-uncond-ve.pkl", 56.4), ("edm-ffhq-64x64-uncond-vp.pkl", 61.8),
    ("edm-afhqv2-64x64-uncond-ve.pkl", 62.8), ("edm-imagenet-64x64-cond-adm.pkl", 295.9),
])  # fmt: skip
def test_published_networks_are_known_by_their_files(name, millions):
    """Sizes as Karras et al. 2022 give them: 56, 62 and 296 million parameters."""
    with torch.device("meta"):
        net = published_network(name).build()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert published_network("edm-lsun.pkl") is None


def test_a_teacher_trained_here_is_written_read_back_and_distilled(tmp_path, capsys):
    """Pretraining, the published layout and back, to the bit; then SiD from that file."""
    for name in ("teacher", "sid"):
        recipe = yaml.safe_load(find_recipe(f"fashion-mnist-16/{name}").read_text())
        recipe["data"] = {"kind": "digits"}
        recipe["evaluation"] |= {"samples": 0}
        recipe["train"] |= {"images": 16, "batch_size": 8, "evaluate_every": None}
        if name == "teacher":
            recipe["denoiser"]["net"] |= {"model_channels": 8, "size": 8, "attn_resolutions": [4]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    trained = tmp_path / "trained"
    assert main(["pretrain", str(tmp_path / "teacher.yaml"), "--processes", "1", "--out", str(trained)]) == 0
    denoiser, spec, _ = load_denoiser(trained / "teacher.safetensors")
    write_published(tmp_path / "published.pkl", denoiser)
    read, again, provenance = load_denoiser(tmp_path / "published.pkl")
    assert again.net == spec.net and provenance["source_class"] == "EDMPrecond"
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(*(model(x, t, labels=torch.tensor([0, 9])) for model in (read, denoiser)))
    command = ["distill", str(tmp_path / "sid.yaml"), "--processes", "1", "--out", str(tmp_path / "s")]
    assert main([*command, "--teacher.path", str(tmp_path / "published.pkl")]) == 0
    assert load_generator(tmp_path / "s" / "student.safetensors")[1].net == spec.net


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_a_pickle_of_another_protocol_is_read(tmp_path, monkeypatch, protocol):
    """Protocols 2 and 3 have other opcodes for names and bytes; nothing else differs."""
    dumps = pickle.dumps
    monkeypatch.setattr(pickle, "dumps", lambda value, protocol=None: dumps(value, protocol=wanted))
    wanted = protocol
    written = write(tmp_path / "t.pkl", "edm_ddpmpp")
    denoiser, spec, _ = load_edm_pickle(tmp_path / "t.pkl")
    state = written.state_dict()
    assert spec == written.net.spec
    assert all(torch.equal(value, state[key]) for key, value in denoiser.state_dict().items())
