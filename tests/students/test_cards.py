"""Model cards: every snippet runs as it is printed, in a fresh process, and draws what `fewstep sample` draws."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from fewstep.students.export import export_student
from fewstep.teachers import DiffusersTeacher
from tests.support.ldm import single_file
from tests.support.pipelines import load, tiny_sd15, tiny_sdxl, with_encoders
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
    "sdxl-tuned": ("half", {"lora": "style.safetensors", "lora_scale": 0.5, "latents": {"scale": 0.2}}, [999], LORA),
    "sd15-one-file": ("one.safetensors", {"config": "sd15"}, [999], LORA),
    "sd15-clip-skip": ("sd15", {"text": {"clip_skip": 1}}, [999], LORA),
    "sdxl-lora-only": ("sdxl", {}, [399], LORA),
    "sd3": ("sd3", {}, FOUR, LORA),
    "sd3-other-times": ("sd3", {"shift": 5.0}, [0.9, 0.6, 0.2], LORA),
    "sd3-without-t5": ("sd3", {"without": ("text_encoder_3", "tokenizer_3")}, [1.0, 0.5], LORA),
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


def teacher(family, root, made):
    """A pipeline: a folder, one with files in half precision alone, or a single file."""
    folder = root / family
    match family:
        case "sd15":
            return tiny_sd15(folder)
        case "sdxl":
            return tiny_sdxl(folder)
        case "half":
            load(made["sdxl"]).to(torch.float16).save_pretrained(folder, variant="fp16")
            return folder
        case "one.safetensors":
            return single_file(load(made["sd15"]), folder)
    with_encoders(family, folder)
    config = folder / "vae/config.json"
    if family in ("sd3", "flux"):  # whose pipelines add it
        config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.06}))
    return folder


def save_style(folder, file):
    """A LoRA of the network and of a text encoder."""
    pipeline, tensors = load(folder), {}
    for component, ending in {"unet": "to_q", "text_encoder": "q_proj"}.items():
        for path, module in getattr(pipeline, component).named_modules():
            if path.endswith(ending):
                tensors[f"{component}.{path}.lora_A.weight"] = torch.randn(2, module.in_features)
                tensors[f"{component}.{path}.lora_B.weight"] = torch.randn(module.out_features, 2)
    save_file(tensors, file)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What tools/clients.py says of each student's export."""
    root = tmp_path_factory.mktemp("cards")
    made, pairs = {}, []
    for name, (family, settings, times, lora) in STUDENTS.items():
        if family not in made:
            made[family] = teacher(family, root / "of", made)
        files = {key: str(root / "of" / settings[key]) for key in ("lora", "config") if key in settings}
        if "lora" in files:
            save_style(made["sdxl"], Path(files["lora"]))
        spec = DiffusersTeacher(path=str(made[family]), **settings | files)
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
        # text encoders of a folder in half precision compute in it for fewstep
        assert row["unused"] == 0 and row["error"] < (1e-4 if family == "half" else 1e-5), row
        assert row["contrast"] > 0.02, row
        assert row["times"] == pytest.approx(row["wanted"], abs=1e-3) and len(row["times"]) == len(times)
