"""A LoRA of every family's network, under the names that its trainers write, is merged to the layer that it names."""

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from fewstep.formats.lora import merge
from fewstep.formats.lora_reading import read_lora
from tests.support.families import NAMES, parts
from tests.support.pipelines import load, tiny_transformer

FORMS = {  # prefix, matrices, whether points stay, whether alpha is a tensor
    "diffusers": ("transformer.", ("lora_A.weight", "lora_B.weight"), True, False),
    "ai-toolkit": ("diffusion_model.", ("lora_A.weight", "lora_B.weight"), True, False),
    "onetrainer": ("lora_transformer_", ("lora_down.weight", "lora_up.weight"), False, True),
    "lycoris": ("lycoris_", ("lora_down.weight", "lora_up.weight"), False, True),
}


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sana", "pixart", *NAMES])
def test_every_linear_layer_of_every_family(name, tmp_path):
    torch.manual_seed(0)
    network = parts(name)[1]["transformer"] if name in NAMES else load(tiny_transformer(name, tmp_path)[0]).transformer
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(layers) > 10
    for form, (prefix, (a, b), points, has_alpha) in FORMS.items():
        tensors, wanted = {}, {}
        for path, layer in layers.items():
            down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            key = prefix + (path if points else path.replace(".", "_"))
            tensors |= {f"{key}.{a}": down, f"{key}.{b}": up}
            tensors |= {f"{key}.alpha": torch.tensor(1.0)} if has_alpha else {}
            wanted[path] = layer.weight.detach() + (0.5 if has_alpha else 1) * up @ down
        save_file(tensors, tmp_path / f"{form}.safetensors")
        factors = read_lora(tmp_path / f"{form}.safetensors").for_network(network)
        merge(network, factors, 1.0)
        for path, layer in layers.items():
            torch.testing.assert_close(layer.weight, wanted[path], rtol=1e-4, atol=1e-5, msg=f"{form} {path}")
