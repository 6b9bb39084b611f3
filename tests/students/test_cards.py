"""Model cards: every snippet runs as it is printed, in a fresh process, and draws what `fewstep sample` draws."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from fewstep.students.export import export_student
from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import tiny_sd15, tiny_sdxl, with_encoders
from tests.support.students import made_student

ROOT = Path(__file__).parents[2]
FOUR, LORA = [1.0, 0.75, 0.5, 0.25], {"rank": 4, "alpha": 2, "targets": ["to_q", "to_v", "ff.net.2"]}
# name: (teacher's folder by family, its settings, times, LoRA)
STUDENTS = {
    "sd15": ("sd15", {}, [999, 749, 499, 249], None),
    "sd15-three-steps": ("sd15", {}, [999, 666, 333], LORA),
    "sd15-v": ("sd15", {"prediction": "v", "zero_snr": True}, [999, 499], LORA),
    "sdxl": ("sdxl", {}, [999, 749, 499, 249], LORA),
    "sdxl-one-step": ("sdxl", {}, [399], None),
    "sdxl-wide": ("sdxl", {"resolution": (24, 16)}, [999], LORA),
    "sdxl-clip-skip": ("sdxl", {"text": {"clip_skip": 1}}, [999], LORA),
    "sdxl-lora-only": ("sdxl", {}, [399], LORA),
    "sd3": ("sd3", {}, FOUR, LORA),
    "sd3-other-times": ("sd3", {"shift": 5.0}, [0.9, 0.6, 0.2], LORA),
    "flux": ("flux", {"resolution": 16}, FOUR, LORA),
    "flux-other-times": ("flux", {"resolution": 16, "guidance_input": 2.0}, [1.0, 0.4], None),
    "sana": ("sana", {}, FOUR, LORA),
    "sana-one-step": ("sana", {}, [1.0], None),
    "pixart": ("pixart", {}, [999, 749, 499, 249], LORA),
}


def formats(name):
    if "lora-only" in name:
        return ["lora"]
    return ["diffusers", "lora"] if STUDENTS[name][3] else ["diffusers"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What tools/clients.py says of each student's export."""
    root = tmp_path_factory.mktemp("cards")
    made, pairs = {}, []
    for name, (family, settings, times, lora) in STUDENTS.items():
        if family not in made:
            make = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}.get(family)
            made[family] = make(root / "of" / family) if make else with_encoders(family, root / "of" / family)
            config = made[family] / "vae/config.json"
            if family in ("sd3", "flux"):  # whose pipelines add it
                config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.06}))
        spec = DiffusersTeacher(path=str(made[family]), **settings)
        made_student(spec, root / "runs" / name, times, lora)
        export_student(root / "runs" / name, root / "exports" / name, formats(name), torch.float32)
        pairs += [str(root / "runs" / name), str(root / "exports" / name)]
    command = [sys.executable, str(ROOT / "tools/clients.py"), *pairs, "--json", str(root / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "rows.json").read_text())
    return {name: [row for row in found if re.search(rf"/{name}/", row["file"])] for name in STUDENTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_the_cards_code_draws_what_sample_draws(name, rows):
    family, _, times, lora = STUDENTS[name]
    of_diffusers = [row for row in rows[name] if row["program"] == "diffusers"]
    files = {Path(row["file"]).name for row in of_diffusers}
    assert files == ({"model_index.json", "lora"} if lora and family != "pixart" else {"model_index.json"}) - (
        {"model_index.json"} if "lora-only" in name else set()
    )
    for row in of_diffusers:
        assert row["unused"] == 0 and row["error"] < 1e-5, row
        assert row["contrast"] > 0.02, row
        assert row["times"] == pytest.approx(row["wanted"], abs=1e-3) and len(row["times"]) == len(times)
