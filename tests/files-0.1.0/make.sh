#!/bin/sh
# Made the files of this folder with fewstep 0.1.0 on 2026-11-27:  sh make.sh CHECKOUT
# CHECKOUT is that version's source (commit 32ba130). Run it in an empty folder; run.yaml and the cards keep that folder's name.
set -e
export PYTHONPATH="$1" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= FEWSTEP_CACHE=cache
fewstep() { python -m fewstep "$@"; }

# ---- what a user brings: images, captioned pictures, prompts, an EDM pickle, a small Stable Diffusion
python - <<'PY'
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from fewstep.model import DenoiserSpec
from fewstep.nets import DhariwalUNetSpec, SongUNetSpec
from tests.pipelines import scheduler, text_encoder, tokenizer
from tests.published import write_published
from tests.test_model import randomised

for kind, place in (("left", slice(2, 12)), ("right", slice(16, 26))):
    Path("images", kind).mkdir(parents=True)
    for i in range(8):
        picture = np.zeros((28, 28), "uint8")
        picture[3 * i : 3 * i + 6, place] = 60 + 24 * i
        Image.fromarray(picture).save(Path("images", kind, f"{i}.png"))

prompts = ["a red square", "a green square", "a blue square"]
Path("prompts.txt").write_text("\n".join(prompts) + "\n")
Path("captioned").mkdir()
for i, prompt in enumerate(prompts):
    picture = np.zeros((16, 16, 3), "uint8")
    picture[4:12, 4:12, i] = 200
    Image.fromarray(picture).save(Path("captioned", f"{i}.png"))
    Path("captioned", f"{i}.txt").write_text(prompt)

torch.manual_seed(0)
shape = {"size": 28, "channels": 1, "num_classes": 2, "model_channels": 4, "channel_mult": (1,), "num_blocks": 1}
song = SongUNetSpec(**shape, attn_resolutions=())
write_published("song.pkl", randomised(DenoiserSpec(net=song)))
write_published("dhariwal.pkl", randomised(DenoiserSpec(net=DhariwalUNetSpec(**shape, attn_resolutions=()))))

unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(4,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2,
)
vae = AutoencoderKL(
    block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4, norm_num_groups=2,
)
pipeline = StableDiffusionPipeline(
    vae=vae, text_encoder=text_encoder(False), tokenizer=tokenizer(), unet=unet, scheduler=scheduler(num_train_timesteps=100), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False,
)
pipeline.to(dtype=torch.float16).save_pretrained("pipeline")
PY

# ---- run files as a user writes them
train() { printf 'train: {images: %s, batch_size: 8, precision: fp32, device: cpu, threads: 1, ema_half_life: 32, log_every: 16, evaluate_every: null, checkpoint_every: %s, keep: 1}\n' "$1" "$2"; }
pretrain() {  # NAME NET
    printf 'kind: pretrain\ndata: {kind: folder, path: images, channels: 1}\ndenoiser: {net: %s}\noptim: {lr: 1.0e-2}\n' "$2"
    printf 'evaluation: {samples: 16, metrics: [fid], extractor: small, evaluations: 5}\n'
    train 64 64
} > "$1.yaml"
distill() {  # NAME TEACHER GENERATOR OBJECTIVE IMAGES FURTHER
    printf 'kind: distill\nteacher: %s\ngenerator: %s\nobjective: %s\n' "$2" "$3" "$4"
    printf 'optim: {generator: {lr: 1.0e-3, warmup: 16, decay_from: 0.5}, critic: {lr: 1.0e-3, clip: 10}}\n'
    train "$5" 32
    printf '%b\n' "${6:-evaluation: {samples: 0\}}"
} > "$1.yaml"
none='evaluation: {samples: 0}'
images='data: {kind: folder, path: images, channels: 1}'
teacher='{kind: native, path: teacher}'
t2i='{kind: diffusers, path: pipeline, prompts: prepared}'
adapters='{rank: 1, alpha: 1, targets: [mid_block.attentions.0.transformer_blocks.0.attn1.to_q, attn2.to_v]}'
pretrain teacher '{kind: dit, size: 28, channels: 1, patch: 7, width: 4, depth: 1, heads: 2, mlp_ratio: 2, num_classes: 2}'
pretrain unet-teacher '{kind: unet, size: 28, channels: 1, widths: [8], num_classes: 2}'
distill dmd2 "$teacher" '{sigmas: [80, 2]}' '{method: dmd2, critic_steps: 2}' 96 \
    "$images\nevaluation: {samples: 16, metrics: [fid], extractor: small}"
distill sid "$teacher" '{sigmas: [2.5]}' '{method: sid, alpha: 1.2}' 32 "$none"
distill sid-from-dmd2 "$teacher" '{sigmas: [80, 2]}' '{method: sid}' 8 "start_from: dmd2\n$none"
distill dmd "$teacher" '{sigmas: [80]}' '{method: dmd}' 32 "pairs: pairs\nperceptual: small\n$none"
distill regression "$teacher" '{sigmas: [80]}' '{method: regression}' 32 "pairs: pairs\nperceptual: small\n$none"
distill unet '{kind: native, path: unet-teacher}' '{sigmas: [2.5]}' '{method: sid}' 8 "$none"
distill song '{kind: native, path: song.pkl, dropout: 0.1}' '{times: [0.8]}' '{method: dmd2, gan_weight: 0}' 8 "$none"
distill mixture '{kind: mixture, width: 8, fit_steps: 5}' '{sigmas: [2.5]}' '{method: sid}' 32 "$none"
distill lora "$t2i" "{timesteps: [99, 49], lora: $adapters}" '{method: dmd2, critic_steps: 1, guidance: 2}' 16 \
    "critic: {lora: $adapters}\ndata: {kind: prepared, path: prepared}\n$none"
distill full "$t2i" '{timesteps: [99]}' '{method: sid, noise: {kind: uniform, low: 0.0, high: 0.8, steps: 1000}}' 8 "$none"
printf "kind: pretrain\npipeline: $t2i\ndata: {kind: prepared, path: prepared}\n$none\n$(train 8 8)\n" > pipeline-teacher.yaml

# ---- the runs; `stop` interrupts one soon after its first checkpoint
stop() {
    python - "$@" <<'PY'
import signal, subprocess, sys, time
from pathlib import Path

name, *command = sys.argv[1:]
run = subprocess.Popen([sys.executable, "-m", "fewstep", *command, f"{name}.yaml", "--out", name, "--processes", "1"])
while run.poll() is None and not list(Path(name, "checkpoints").glob("0*")):
    time.sleep(0.002)
run.send_signal(signal.SIGTERM)
assert run.wait() == 130, "it ended before it could be stopped"
PY
}
for name in teacher unet-teacher; do fewstep pretrain $name.yaml --out $name --processes 1; done
fewstep pairs dmd.yaml --out pairs --count 2 --evaluations 5 --processes 1
fewstep prepare pipeline --prompts prompts.txt --images captioned --out prepared --device cpu
stop dmd2 distill
for name in sid dmd regression unet song mixture lora full sid-from-dmd2; do
    fewstep distill $name.yaml --out $name --processes 1
done
fewstep pretrain pipeline-teacher.yaml --out pipeline-teacher --processes 1
fewstep eval dmd2 --samples 16 --evaluations 3 --metrics fid --extractor small --reference images --processes 1
fewstep import song.pkl --out song-teacher
fewstep import dhariwal.pkl --out dhariwal-student --sigma-init 2.5
fewstep export lora --out exported --formats lora --dtype float32
fewstep import exported/pytorch_lora_weights.safetensors --pipeline pipeline --timesteps 99,49 --out lora-imported

# ---- what 0.1.0 makes of them: pictures, and the weights of runs that were never stopped, and of runs that were made longer
mkdir expected
for name in dmd2 sid unet dhariwal-student full lora lora-imported; do
    fewstep sample $name --seeds 0-3 --out expected/$name.npz --device cpu $(case $name in lora-imported) echo --prompts prepared ;; esac)
done
for name in teacher song-teacher; do
    fewstep sample $name --seeds 0-3 --evaluations 5 --out expected/$name.npz --device cpu
done
fewstep distill dmd2.yaml --out whole --processes 1
cp whole/student.safetensors expected/dmd2.safetensors
for name in teacher lora; do
    cp -r $name longer
    case $name in teacher) fewstep pretrain longer --train.images 96 --processes 1 ;; *) fewstep distill longer --train.images 48 --processes 1 ;; esac
    cp longer/*t*e*.safetensors expected/$name.safetensors
    rm -r longer
done

# ---- what is left of them
cp cache/references/*.npz reference.npz
rm -r whole cache exported *.pkl unet-teacher
for name in dmd regression song sid-from-dmd2 pipeline-teacher; do
    mv $name/run.yaml kept.yaml
    rm -r $name
    mkdir $name
    mv kept.yaml $name/run.yaml
done
for name in sid unet full mixture; do rm -r $name/checkpoints; done
rm -rf */pictures */lock
