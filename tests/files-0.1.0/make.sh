#!/bin/sh
# Made the files of this folder with fewstep 0.1.0 (commit 32ba130), on 2026-11-27. Run in an empty folder, with that version as `fewstep`.
set -e
python - <<'PY'
from pathlib import Path
from PIL import Image
import numpy as np

rng = np.random.default_rng(0)
for kind, base in (("dark", 60), ("light", 190)):
    Path("images", kind).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.clip(rng.normal(base, 30, (8, 8, 3)), 0, 255).astype("uint8")).save(Path("images", kind, f"{i}.png"))
PY
net="{kind: dit, size: 8, channels: 3, patch: 4, width: 8, depth: 1, heads: 1, num_classes: 2}"
train="{images: 64, batch_size: 8, precision: fp32, device: cpu, ema_half_life: 32, log_every: 16, evaluate_every: null, checkpoint_every: 32, keep: 1}"
evaluation="{samples: 16, metrics: [fid], extractor: pixels}"
cat > teacher.yaml <<Y
kind: pretrain
data: {kind: folder, path: images}
denoiser: {net: $net}
optim: {lr: 1.0e-3}
train: $train
evaluation: $evaluation
Y
student() {
    printf 'kind: distill\nteacher: {kind: native, path: teacher}\ngenerator: {sigmas: %s}\nobjective: %s\ndata: {kind: folder, path: images}\n' "$2" "$3" > "$1.yaml"
    printf 'pairs: %s\nperceptual: small\ntrain: %s\nevaluation: %s\n' "$4" "$train" "$evaluation" >> "$1.yaml"
}
student dmd2 "[80, 2]" "{method: dmd2, critic_steps: 2}" null
student sid "[2.5]" "{method: sid}" null
cat > mixture.yaml <<Y
kind: distill
teacher: {kind: mixture, width: 8, fit_steps: 5}
generator: {sigmas: [2.5]}
objective: {method: sid, alpha: 1.0}
train: {images: 64, batch_size: 8, precision: fp32, device: cpu, ema_half_life: 32, log_every: 16, evaluate_every: null, checkpoint_every: 32, keep: 1}
evaluation: {samples: 0}
Y
printf 'kind: distill\nteacher: {kind: native, path: teacher}\ngenerator: {sigmas: [80]}\nobjective: {method: dmd, regression_weight: 0.25}\npairs: pairs\ntrain: %s\nevaluation: {samples: 0}\n' "$train" > dmd.yaml

fewstep pretrain teacher.yaml --out teacher --processes 1
fewstep pairs dmd.yaml --out pairs --count 16 --evaluations 5 --processes 1
for name in dmd2 sid mixture; do fewstep distill $name.yaml --out $name --processes 1; done
fewstep eval dmd2 --samples 16 --evaluations 3 --metrics fid --extractor pixels --reference images --processes 1
mkdir expected
fewstep sample dmd2 --seeds 0-7 --out expected/dmd2.npz
fewstep sample teacher --seeds 0-7 --evaluations 5 --out expected/teacher.npz
for name in dmd2 teacher; do  # what the same command makes of the runs when they are resumed
    cp -r $name $name-resumed
    [ $name = dmd2 ] && fewstep distill dmd2-resumed --train.images 128 --processes 1 || fewstep pretrain $name-resumed --train.images 128 --processes 1
done
cp dmd2-resumed/student.safetensors expected/dmd2-128.safetensors
cp teacher-resumed/teacher.safetensors expected/teacher-128.safetensors
rm -r dmd2-resumed teacher-resumed
