"""Small files that claim or multiply much: one line that names the file, at once and within bounded memory."""

import json
import os
import time

import pytest
import torch

from fewstep.cli.main import main
from fewstep.formats.model import DenoiserSpec, load_denoiser, save_denoiser
from fewstep.networks import DiTSpec
from fewstep.system.bounds import parse_json, printable, read_file, shown
from fewstep.system.errors import FileError, SettingsError, UserError

SECONDS = 5


def refused(command, capsys, *words):
    started = time.process_time()
    assert main(command) == 1
    said = capsys.readouterr().err
    assert time.process_time() - started < SECONDS and len(said) < 5_000, len(said)
    assert all(word in said for word in words), said
    return said


def test_aliases_that_multiply(tmp_path, capsys):
    lines = ["a0: &a0 [1, 2]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 13)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    for command in (["distill", str(file)], ["report", str(tmp_path)], ["plan", str(file)]):
        if command[0] == "report":
            (tmp_path / "run.yaml").write_text("\n".join(lines))
            assert main([*command, "--out", str(tmp_path / "r.html")]) in (0, 1)
            continue
        refused(command, capsys, "bomb.yaml")


def test_nesting(tmp_path, capsys):
    file = tmp_path / "deep.yaml"
    file.write_text("[" * 50_000)
    refused(["distill", str(file)], capsys, "deep.yaml")
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json("[" * 50_000 + "]" * 50_000)


def test_a_long_value_is_quoted_in_part(tmp_path, capsys):
    file = tmp_path / "long.yaml"
    file.write_text(f"kind: distill\ntrain: {{images: '{'x' * 300_000}'}}\n")
    said = refused(["distill", str(file)], capsys, "long.yaml", "train.images")
    assert "x" * 250 not in said


def test_escapes_are_shown_not_sent(tmp_path, capsys):
    file = tmp_path / "esc.yaml"
    file.write_text('kind: distill\n"tr\\x1b[31main": 3\n')
    assert "\x1b" not in refused(["distill", str(file)], capsys, "esc.yaml")
    assert printable("a\x1b[2Jb\x00") == "a\\x1b[2Jb\\x00" and len(shown("y" * 10_000)) < 300


@pytest.mark.parametrize(("key", "value"), [("width", 10**9), ("depth", 10**5), ("mlp_ratio", 1e9)])
def test_a_network_that_its_weights_cannot_fill(tmp_path, key, value):
    spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2))
    save_denoiser(tmp_path / "m.safetensors", spec.build(), spec, {})
    header = tmp_path / "m.json"
    record = json.loads(header.read_text())
    record["metadata"]["denoiser"]["net"][key] = value
    header.write_text(json.dumps(record))
    started = time.process_time()
    with pytest.raises(UserError, match=r"m\.json|m\.safetensors"):
        load_denoiser(tmp_path / "m.safetensors")
    assert time.process_time() - started < SECONDS


def test_weights_that_poison(tmp_path):
    spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2))
    save_denoiser(tmp_path / "m.safetensors", spec.build(), spec, {})
    header = tmp_path / "m.json"
    record = json.loads(header.read_text())
    record["metadata"]["denoiser"]["sigma_data"] = float("nan")
    header.write_text(json.dumps(record))
    with pytest.raises(UserError, match="sigma_data"):
        load_denoiser(tmp_path / "m.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_an_lmdb_whose_download_broke_off(tmp_path, share):
    lmdb = pytest.importorskip("lmdb")
    from fewstep.data.lmdb_check import check_lmdb

    with lmdb.open(str(tmp_path / "db"), map_size=1 << 24) as database, database.begin(write=True) as writer:
        for number in range(300):
            writer.put(f"{number:05d}".encode(), os.urandom(3000))
    file = tmp_path / "db" / "data.mdb"
    check_lmdb(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole.rstrip(b"\0")))])
    with pytest.raises(UserError, match=r"data\.mdb"):
        check_lmdb(file)


def test_pipes_and_devices(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(["distill", str(tmp_path / "pipe.yaml")], capsys, "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    refused(["distill", str(tmp_path / "zero.yaml")], capsys, "zero.yaml")
    with pytest.raises(FileError, match="at most 10 bytes"):
        (tmp_path / "large").write_bytes(b"x" * 11)
        read_file(tmp_path / "large", 10)


def test_the_page_needs_a_password_for_others():
    pytest.importorskip("gradio")
    from fewstep.report.web import serve

    class Page:
        def launch(self, **settings):
            self.settings = settings

    page = Page()
    with pytest.raises(SettingsError, match="FEWSTEP_UI_PASSWORD"):
        serve(page, "0.0.0.0", None, None)
    serve(page, "127.0.0.1", None, None)
    assert page.settings["auth"] is None
    serve(page, "0.0.0.0", 7000, "secret")
    assert page.settings["auth"]("anyone", "secret") and not page.settings["auth"]("anyone", "other")


def test_integer_weights(tmp_path):
    from safetensors.torch import load_file

    from fewstep.system.weights import save_weights

    spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2))
    save_denoiser(tmp_path / "m.safetensors", spec.build(), spec, {})
    metadata = json.loads((tmp_path / "m.json").read_text())["metadata"]
    tensors = {name: value.to(torch.int32) for name, value in load_file(tmp_path / "m.safetensors").items()}
    save_weights(tmp_path / "m.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"m\.safetensors"):
        load_denoiser(tmp_path / "m.safetensors")
