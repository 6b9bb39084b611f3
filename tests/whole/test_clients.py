"""tools/clients.py with stand-ins for the programs that are not here: what it starts, asks and counts."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from fewstep.students.export import export_student
from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import tiny_sd15
from tests.support.places import ROOT
from tests.support.students import made_student

COMFYUI = """
import io, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from PIL import Image
print("lora key not loaded: some.layer", flush=True)
models = Path(sys.argv[sys.argv.index("--extra-model-paths-config") + 1]).read_text()
class Handler(BaseHTTPRequestHandler):
    def answer(self, data):
        self.send_response(200); self.end_headers(); self.wfile.write(data)
    def do_POST(self):
        nodes = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        assert nodes["6"]["inputs"]["seed"] == 7 and nodes["3"]["inputs"]["text"] == "a prompt"
        assert nodes["1"]["inputs"]["ckpt_name"] == "base.safetensors" and "/lora" in models
        self.answer(json.dumps({"prompt_id": "1"}).encode())
    def do_GET(self):
        if self.path.startswith("/history"):
            image = {"filename": "x.png", "subfolder": "", "type": "output"}
            return self.answer(json.dumps({"1": {"outputs": {"8": {"images": [image]}}}}).encode())
        assert self.path.startswith("/view?filename=x.png")
        data = io.BytesIO()
        Image.new("RGB", (16, 16), (128, 128, 128)).save(data, "PNG")
        self.answer(data.getvalue())
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
KOHYA = """
import sys
from safetensors.numpy import load_file, save_file
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("no module found for LoRA weight: some.layer", file=sys.stderr)
save_file(load_file(given["--sd_model"]), given["--save_to"])
"""


@pytest.fixture(scope="module")
def clients():
    spec = importlib.util.spec_from_file_location("clients", ROOT / "tools/clients.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Run and export of a student, and a base model's file that differs in one weight."""
    root = tmp_path_factory.mktemp("clients")
    spec = DiffusersTeacher(path=str(tiny_sd15(root / "of")))
    run = made_student(spec, root / "run", [999, 499], {"rank": 2, "alpha": 1})
    export_student(run, root / "out", ["lora", "comfyui", "checkpoint"], torch.float32)
    whole = load_file(root / "out/run.safetensors")
    moved = next(key for key in whole if key.startswith("model.diffusion_model."))
    save_file(whole | {moved: whole[moved] + 0.5}, root / "base.safetensors")
    return run, root / "out", root / "base.safetensors"


def test_comfyui_gets_the_workflow_and_its_files(clients, export, tmp_path):
    run, out, base = export
    (tmp_path / "main.py").write_text(COMFYUI)
    (row,) = clients.of_comfyui(run, out, tmp_path, base)
    assert (row["program"], row["unused"], row["note"]) == ("ComfyUI", 1, "")
    assert 0.05 < row["error"] < 1, "it drew grey"
    (tmp_path / "main.py").write_text("raise SystemExit('no torch here')")
    (row,) = clients.of_comfyui(run, out, tmp_path, base)
    assert row["error"] == "" and "failed: ComfyUI ended: no torch here" in row["note"]


def test_kohyas_script_merges_the_lora(clients, export, tmp_path):
    _, out, base = export
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks/merge_lora.py").write_text(KOHYA)
    (row,) = clients.of_kohya(out, tmp_path, base)
    assert row["unused"] == 1 and row["error"] == pytest.approx(0.5, abs=1e-5)
    (tmp_path / "networks/merge_lora.py").write_text("raise SystemExit('no torch here')")
    (row,) = clients.of_kohya(out, tmp_path, base)
    assert row["note"] == "no torch here"


def test_what_is_not_here_is_not_run(clients, export, monkeypatch):
    run, out, base = export
    monkeypatch.setattr(clients.importlib.util, "find_spec", lambda name: None)
    found = clients.of_comfyui(run, out, None, base), clients.of_kohya(out, None, base), clients.of_lycoris(run, out)
    for rows in found:
        assert [row["note"] for row in rows] == ["not run"]
