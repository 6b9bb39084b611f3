"""LoRA files in the forms that people have: merged as PEFT and diffusers merge them, or refused with names and counts."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.cli.main import main
from fewstep.formats.lora import merge
from fewstep.formats.lora_reading import read_lora
from fewstep.formats.original_names import original_layers
from fewstep.students.export import export_student
from fewstep.students.published import import_student
from fewstep.students.student import find_student, load_student
from fewstep.system.errors import DataError, FileError, TeacherError
from fewstep.teachers import DiffusersTeacher
from tests.support.ldm import unet_keys
from tests.support.pipelines import GOLDEN, sdxl_unet, tiny_sd15, tiny_sdxl, tiny_transformer

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tiny_sdxl(tmp_path_factory.mktemp("pipeline") / "sdxl")
    for file in folder.glob("text_encoder*/model.safetensors"):  # else all prompts are alike
        generator = torch.Generator().manual_seed(5)
        tensors = load_file(file)
        save_file(
            {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()},
            file,
            {"format": "pt"},
        )
    return folder


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return tiny_sd15(tmp_path_factory.mktemp("pipeline") / "sd15")


def layers_of(network):
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def matrices(network, rank=2, seed=0, only=None):
    """A and B for every layer, each convolution's in LoCon's shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, layer in layers_of(network).items():
        if only is None or re.search(only, path):
            weight = layer.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
            found[path] = down, up
    return found


def product(down, up):
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def written(file, pairs, name, form="kohya", alpha=None):
    """Write pairs by layer under `name(layer)`."""
    parts = {
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "peft": ("lora_A.weight", "lora_B.weight"),
        "adapter": ("lora_A.default.weight", "lora_B.default.weight"),
        "diffusers": ("lora.down.weight", "lora.up.weight"),
    }[form]
    tensors = {}
    for path, pair in pairs.items():
        tensors |= {f"{name(path)}.{part}": value.contiguous() for part, value in zip(parts, pair, strict=True)}
        if alpha is not None:
            tensors[f"{name(path)}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, file)
    return file


def kohya(path, prefix="lora_unet_"):
    return prefix + path.replace(".", "_")


# -- names ---------------------------------------------------------------------------------------------------------------

NAMES = {
    "kohya": (kohya, "kohya"),
    "onetrainer": (partial(kohya, prefix="lora_transformer_"), "kohya"),
    "lycoris": (partial(kohya, prefix="lycoris_"), "kohya"),
    "diffusers": ("unet.{}".format, "peft"),
    "diffusers of old": ("unet.{}".format, "diffusers"),
    "peft": ("base_model.model.{}".format, "peft"),
    "peft in memory": ("base_model.model.{}".format, "adapter"),
    "peft in a pipeline": ("unet.base_model.model.{}".format, "peft"),
    "bare": ("{}".format, "peft"),
    "ai-toolkit": ("diffusion_model.{}".format, "peft"),
    "comfyui": ("model.diffusion_model.{}".format, "kohya"),
}


@pytest.mark.parametrize("form", NAMES)
def test_every_layer_of_every_form_of_names(sdxl, tmp_path, form):
    base = DiffusersTeacher(path=str(sdxl)).load().denoiser.net.model
    pairs, (name, parts) = matrices(base), NAMES[form]
    file = written(tmp_path / "lora.safetensors", pairs, name, parts, alpha=3)
    tuned = DiffusersTeacher(path=str(sdxl), lora=file, lora_scale=0.5).load().denoiser.net.model
    own, found = base.state_dict(), tuned.state_dict()
    assert len(pairs) > 40
    for key, value in own.items():
        wanted = value
        if (path := key.removesuffix(".weight")) in pairs and key.endswith(".weight"):
            wanted = value + 0.5 * 3 / 2 * product(*pairs[path])
        torch.testing.assert_close(found[key], wanted)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_original_names_of_unets(request, tmp_path, kind, form):
    """The names as a test of single files has them, which diffusers reads."""
    folder = request.getfixturevalue(kind)
    base = DiffusersTeacher(path=str(folder)).load().denoiser.net.model
    pairs = matrices(base)
    tensors = {name: value.data_ptr() for name, value in unet_keys(base).items()}
    paths = {layer.weight.data_ptr(): path for path, layer in layers_of(base).items()}
    original = {
        paths[at]: name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for name, at in tensors.items()
        if at in paths
    }
    assert original.keys() == pairs.keys() and not original.values() & pairs.keys()

    def name(path):
        return kohya(original[path]) if form == "kohya" else f"diffusion_model.{original[path]}"

    file = written(tmp_path / "lora.safetensors", pairs, name, alpha=1)
    tuned = DiffusersTeacher(path=str(folder), lora=file).load().denoiser.net.model
    for path, layer in layers_of(base).items():
        torch.testing.assert_close(layers_of(tuned)[path].weight, layer.weight + 0.5 * product(*pairs[path]))


SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(320, 640, 1280),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    transformer_layers_per_block=(1, 2, 10), projection_class_embeddings_input_dim=2816,
)  # fmt: skip


@pytest.mark.parametrize("name, config", [("sdxl", SDXL), ("sd15", {"cross_attention_dim": 768})])
def test_original_names_of_the_full_size_unets_are_comfyuis(name, config):
    from diffusers import UNet2DConditionModel

    keys = json.loads((GOLDEN / "comfyui_keys.json").read_text())[name]["diffusers_to_native"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    found = {place.paths[0]: original for original, place in original_layers(unet).items()}
    assert found == {path: keys[f"{path}.weight"].removesuffix(".weight") for path in layers_of(unet)}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_original_names_of_transformers_are_those_of_diffusers_converters(name):
    """Rows are marked, one column each, so that full width costs nothing: the converter knows no other."""
    import diffusers
    from diffusers.loaders import single_file_utils

    with torch.device("meta"):
        if name == "flux":
            network = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
            convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
        else:
            network = diffusers.SD3Transformer2DModel(
                num_layers=2, num_attention_heads=2, attention_head_dim=4, caption_projection_dim=8,
                dual_attention_layers=(0,), qk_norm="rms_norm", joint_attention_dim=8, pooled_projection_dim=8,
            )  # fmt: skip
            convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    layers, places = layers_of(network), original_layers(network)
    assert {path for place in places.values() for path in place.paths} == layers.keys()
    checkpoint, wanted, at = {}, {}, 0
    for original, place in places.items():
        rows = [len(layers[path].weight) for path in place.paths]
        marks = torch.arange(at, at + sum(rows), dtype=torch.float32)
        at += sum(rows)
        checkpoint[f"{original}.weight"], checkpoint[f"{original}.bias"] = marks[:, None], marks
        if place.swapped:
            marks = torch.cat([*reversed(marks.chunk(2))])
        wanted |= dict(zip(place.paths, marks.split(rows), strict=True))
    norms = {
        "flux": ["double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"],
        "sd3": ["joint_blocks.0.x_block.attn2"] + [f"joint_blocks.{i}.{b}_block.attn" for i in "01" for b in ("x", "context")],
    }[name]  # fmt: skip
    for norm in norms:
        for part in ("query_norm.scale", "key_norm.scale") if name == "flux" else ("ln_q.weight", "ln_k.weight"):
            checkpoint[f"{norm}.{part}"] = torch.ones(1)
    if name == "sd3":
        checkpoint["pos_embed"] = torch.ones(1)
    found = convert(checkpoint)
    assert not checkpoint  # the converter took every name
    for path, marks in wanted.items():
        assert torch.equal(found[f"{path}.weight"].flatten(), marks), path


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_kohya_lora_of_a_transformer(tmp_path, name):
    """Query, key and value share A; sizes are the network's own, not those of the published model."""
    folder, _ = tiny_transformer(name, tmp_path / name)
    base = DiffusersTeacher(path=str(folder)).load().denoiser.net.model
    pairs, wanted = {}, {}
    for number, (original, place) in enumerate(original_layers(base).items()):
        weights = [base.get_submodule(path).weight for path in place.paths]
        generator = torch.Generator().manual_seed(number)
        down = torch.randn(3, *weights[0].shape[1:], generator=generator)
        up = torch.randn(sum(len(weight) for weight in weights), 3, generator=generator)
        pairs[original] = down, up.reshape(*up.shape, *[1] * (down.ndim - 2))
        moved = product(down, up)
        moved = torch.cat([*reversed(moved.chunk(2))]) if place.swapped else moved
        parts = moved.split([len(weight) for weight in weights])
        wanted |= {path: w + 2 / 3 * part for path, w, part in zip(place.paths, weights, parts, strict=True)}
    assert wanted.keys() == layers_of(base).keys()
    file = written(tmp_path / "lora.safetensors", pairs, kohya, alpha=2)
    tuned = DiffusersTeacher(path=str(folder), lora=file).load().denoiser.net.model
    for path, weight in wanted.items():
        torch.testing.assert_close(tuned.get_submodule(path).weight, weight)


def test_attention_processors_of_old(sdxl, tmp_path):
    """diffusers before PEFT: `to_q_lora` below a processor; its own converter is the reference."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    base = DiffusersTeacher(path=str(sdxl)).load().denoiser.net.model
    block = LAYER.removesuffix(".to_q")
    pairs = matrices(base, only=rf"^{block}\.to_(q|out\.0)$")
    old = {}
    for path, (down, up) in pairs.items():
        name = f"unet.{block}.processor.{path.removeprefix(block + '.').removesuffix('.0')}_lora"
        old |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    peft = convert_unet_state_dict_to_peft({key.replace(".processor", ""): value for key, value in old.items()})
    assert {key.removeprefix("unet.").split(".lora_")[0] for key in peft} == pairs.keys()
    save_file(old, tmp_path / "old.safetensors")
    found = read_lora(tmp_path / "old.safetensors").for_network(base)
    assert found.keys() == pairs.keys()
    for path, change in found.items():
        torch.testing.assert_close(change.product(), product(*pairs[path]))


# -- forms: what PEFT itself merges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 3},
        {"lora_alpha": 3, "use_rslora": True},
        {"lora_alpha": 3, "use_dora": True},
        {"lora_alpha": 2, "use_rslora": True, "use_dora": True},
        {"lora_alpha": 3, "rank_pattern": {"to_k": 1, "^conv_in": 5}, "alpha_pattern": {r"attn1\.to_q": 7, "conv2": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("beside", ["folder", "file"])
def test_a_folder_of_peft_is_merged_as_peft_does(tmp_path, settings, beside):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = sdxl_unet()
    targets = ["to_q", "to_k", "to_out.0", "conv2", "proj_in", "conv_in"]
    model = get_peft_model(sdxl_unet(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings))
    model.base_model.model.load_state_dict(
        {  # the same base
            key: base.state_dict()[key.replace(".base_layer", "")] if "lora_" not in key else value
            for key, value in model.base_model.model.state_dict().items()
        }
    )
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    file = tmp_path / "adapter" / ("adapter_model.safetensors" if beside == "file" else "")
    factors = read_lora(file).for_network(base)
    assert len(factors) > 15
    before = {key: value.clone() for key, value in base.state_dict().items()}
    merge(base, factors)
    for key, value in base.state_dict().items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-4)
    assert all(not torch.equal(before[f"{path}.weight"], wanted[f"{path}.weight"]) for path in factors)


def test_diffusers_metadata(tmp_path):
    """`lora_adapter_metadata` has a configuration for each component."""
    pairs = matrices(unet := sdxl_unet(), only=r"to_q$")
    file = written(tmp_path / "lora.safetensors", pairs, "unet.{}".format, "peft")
    about = {"unet.r": 2, "unet.lora_alpha": 5, "unet.peft_type": "LORA", "text_encoder.lora_alpha": 9}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(about)})
    assert {change.alpha for change in read_lora(file).for_network(unet).values()} == {5.0}


def test_kohya_metadata_where_layers_have_no_alpha(tmp_path):
    unet = sdxl_unet()
    pairs = matrices(unet, only=r"to_q$|conv2$")
    file = written(tmp_path / "lora.safetensors", pairs, kohya)
    about = {"ss_network_alpha": "0.5", "ss_network_args": json.dumps({"conv_alpha": "0.25"})}
    save_file(load_file(file), file, about)
    found = read_lora(file).for_network(unet)
    assert {change.alpha for path, change in found.items() if "conv2" in path} == {0.25}
    assert {change.alpha for path, change in found.items() if "conv2" not in path} == {0.5}
    save_file(load_file(file), file, about | {"ss_network_alpha": "Dynamic"})
    with pytest.raises(FileError, match=r"ss_network_alpha .*.*must be a finite number, got 'Dynamic'"):
        read_lora(file)


def test_a_tucker_core_is_three_convolutions(tmp_path):
    """LoCon's `lora_mid`: 1 x 1, then r x r kernels, then 1 x 1."""
    unet = sdxl_unet()
    path = "down_blocks.0.resnets.0.conv1"
    layer, name = unet.get_submodule(path), kohya(path)
    down, up = torch.randn(3, layer.in_channels, 1, 1), torch.randn(layer.out_channels, 3, 1, 1)
    mid = torch.randn(3, 3, 3, 3)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": torch.tensor(6.0)}
    save_file({f"{name}.{part}": value for part, value in tensors.items()}, tmp_path / "l.safetensors")
    x = torch.randn(1, layer.in_channels, 5, 5)
    conv = nn.functional.conv2d
    wanted = layer(x) + 2 * conv(conv(conv(x, down), mid, padding=1), up)
    merge(unet, read_lora(tmp_path / "l.safetensors").for_network(unet))
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("path", [LAYER, "down_blocks.0.resnets.0.conv1"])
def test_lycoris_dora(tmp_path, rows, path):
    """`dora_scale` is the length of rows or, as LyCORIS had it first, of columns."""
    unet = sdxl_unet()
    weight = unet.get_submodule(path).weight.detach().clone()
    (down, up) = matrices(unet, only=f"^{re.escape(path)}$")[path]
    ones = [1] * (weight.ndim - 2)
    scale = torch.rand(len(weight), 1, *ones) if rows else torch.rand(1, weight.shape[1], *ones)
    file = written(tmp_path / "l.safetensors", {path: (down, up)}, kohya, alpha=1)
    save_file(load_file(file) | {f"{kohya(path)}.dora_scale": scale}, file)
    merge(unet, read_lora(file).for_network(unet))
    moved = weight + 0.5 * product(down, up)
    across = [dim for dim in range(weight.ndim) if dim != (0 if rows else 1)]
    torch.testing.assert_close(
        unet.get_submodule(path).weight,
        moved * scale / moved.square().sum(across, keepdim=True).sqrt(),
        atol=1e-5,
        rtol=1e-4,
    )


def test_linear_layers_and_kernels_of_one_pixel_are_the_same(sd15, tmp_path):
    """Trainers that keep SD1.5's `proj_in` as a convolution or as a linear layer."""
    base = DiffusersTeacher(path=str(sd15)).load().denoiser.net.model
    path = "down_blocks.0.attentions.0.proj_in"
    (down, up) = matrices(base, only=path)[path]
    assert down.ndim == 4
    file = written(tmp_path / "l.safetensors", {path: (down.flatten(1), up.flatten(1))}, kohya)
    torch.testing.assert_close(read_lora(file).for_network(base)[path].product(), product(down, up))


# -- text encoders ---------------------------------------------------------------------------------------------------------


def with_text(sdxl, file, form):
    """A LoRA of a layer of the network and of all attentions and feed-forwards of both text encoders."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(sdxl)
    pairs = {("unet", path): pair for path, pair in matrices(pipeline.unet, only=LAYER).items()}
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        found = matrices(getattr(pipeline, name), seed=number + 1, only="self_attn|mlp")
        pairs |= {(name, f"text_model.{path.removeprefix('text_model.')}"): pair for path, pair in found.items()}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

    def named(where):
        component, path = where
        return kohya(path, prefixes[component]) if form == "kohya" else f"{component}.{path}"

    return written(file, pairs, named, "kohya" if form == "kohya" else "peft", alpha=1 if form == "kohya" else None)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_text_encoders_carry_the_lora(sdxl, tmp_path, form):
    from diffusers import DiffusionPipeline

    file = with_text(sdxl, tmp_path / "l.safetensors", form)
    pipeline = DiffusionPipeline.from_pretrained(sdxl)
    pipeline.load_lora_weights(file)
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=True)
    plain, tuned = DiffusersTeacher(path=str(sdxl)), DiffusersTeacher(path=str(sdxl), lora=file)
    found, without = tuned.encoder()(["a cat"])[0], plain.encoder()(["a cat"])[0]
    torch.testing.assert_close(found["text"], text, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["pooled"], pooled, atol=1e-4, rtol=1e-4)
    assert (found["text"] - without["text"]).norm() > 0.1 * without["text"].norm()
    assert len({plain.encoders_fingerprint(), tuned.encoders_fingerprint()}) == 2
    assert tuned.encoders_fingerprint() != tuned.model_copy(update={"lora_scale": 0.5}).encoders_fingerprint()


def test_embeddings_prepared_without_the_lora_are_refused(sdxl, tmp_path):
    plain = DiffusersTeacher(path=str(sdxl))
    plain.prepare(["a cat"], tmp_path / "p", plain.encoder(), torch.float32)
    lora = with_text(sdxl, tmp_path / "l.safetensors", "kohya")
    tuned = plain.model_copy(update={"lora": lora, "prompts": tmp_path / "p"})
    with pytest.raises(DataError, match="were prepared with encoders"):
        tuned.load()
    tuned.prepare(["a cat"], tmp_path / "q", tuned.encoder(), torch.float32)
    again = tuned.model_copy(update={"prompts": tmp_path / "q"}).load()
    assert again.conditioner.num_classes == 1
    only = written(
        tmp_path / "network.safetensors", matrices(again.denoiser.net.model, only=LAYER), kohya
    )  # of the network alone: the same embeddings
    assert plain.model_copy(update={"lora": only, "prompts": tmp_path / "p"}).load().conditioner.num_classes == 1


def test_components_in_folders_of_their_own(sdxl, tmp_path):
    """What PEFT's examples save: a folder for the UNet and one for the text encoder."""
    base = DiffusersTeacher(path=str(sdxl)).load().denoiser.net.model
    text = DiffusersTeacher(path=str(sdxl)).pipeline("text").text_encoder
    networks = {"unet": matrices(base, only=LAYER), "text_encoder": matrices(text, only="q_proj")}
    for component, pairs in networks.items():
        (tmp_path / component).mkdir()
        written(tmp_path / component / "adapter_model.safetensors", pairs, "base_model.model.{}".format, "peft")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
        (tmp_path / component / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(tmp_path)
    assert len(lora.text_keys) == 4
    torch.testing.assert_close(lora.for_network(base)[LAYER].product(), 4 * product(*networks["unet"][LAYER]))
    found = lora.for_encoders({"text_encoder": text})
    assert found["text_encoder"].keys() == networks["text_encoder"].keys()


def test_fluxs_t5_is_its_second_encoder(tmp_path):
    """kohya calls CLIP te1 and T5 te3, as for Stable Diffusion 3."""
    from transformers import T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    pairs = matrices(t5, only=r"SelfAttention\.q$")
    file = written(tmp_path / "l.safetensors", pairs, partial(kohya, prefix="lora_te3_"))
    lora = read_lora(file)
    assert lora.for_encoders({"text_encoder_2": t5})["text_encoder_2"].keys() == pairs.keys()
    assert lora.for_encoders({"text_encoder_2": nn.Linear(1, 1), "text_encoder_3": t5}).keys() == {"text_encoder_3"}


# -- what is refused -------------------------------------------------------------------------------------------------------

FOREIGN = {
    "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"],
    "LoKr": ["lokr_w1", "lokr_w2_a", "lokr_w2_b"],
    "GLoRA": ["a1.weight", "b1.weight"],
    "OFT or BOFT": ["oft_blocks"],
    "IA3": ["on_input", "weight"],
    "a difference of whole weights": ["diff", "diff_b"],
    "LyCORIS norms": ["w_norm", "b_norm"],
}


@pytest.mark.parametrize("method", FOREIGN)
def test_other_methods_are_refused_by_name(sdxl, tmp_path, method):
    file = tmp_path / "l.safetensors"
    save_file({f"{kohya(LAYER)}.{part}": torch.ones(2, 2) for part in FOREIGN[method]}, file)
    with pytest.raises(
        TeacherError, match=rf"\d of its {len(FOREIGN[method])} keys are {method}, .*such as lora_unet_"
    ):
        DiffusersTeacher(path=str(sdxl), lora=file).load()


def change(**changes):
    """A good file's tensors, with others."""

    def made(pairs):
        tensors = {f"{kohya(path)}.lora_{part}.weight": value for path, pair in pairs.items() for part, value in zip(("down", "up"), pair, strict=True)}  # fmt: skip
        return {**tensors, **{f"{kohya(LAYER)}.{key}": value for key, value in changes.items()}}

    return made


@pytest.mark.parametrize(
    "tensors, problem",
    [
        (lambda pairs: {"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2), "lora_unet_elsewhere.lora_up.weight": torch.ones(2, 2), **change()(pairs)}, "2 of its 8 keys fit no layer of the UNet2DConditionModel, such as lora_unet_elsewhere.lora_down.weight"),
        (lambda pairs: {key.replace("lora_unet_", "lora_te9_"): value for key, value in change()(pairs).items()}, "6 of its 6 keys fit no layer"),
        (lambda pairs: change()(pairs) | {f"{kohya(LAYER)}.lora_A.weight": torch.ones(2, 32)}, "matrices of 1 layers are given twice, such as"),
        (lambda pairs: change()(pairs) | {"some.other": torch.ones(2)}, "1 of its 7 keys are no part of a LoRA, such as some.other"),
        (lambda pairs: {"some.other": torch.ones(2)}, "none of its 1 keys is part of a LoRA, such as some.other"),
        (lambda pairs: change()(pairs) | {f"{LAYER}.weight": torch.ones(32, 32)}, "1 of its 7 keys are whole weights that differ from the pipeline's"),
        (lambda pairs: {k: v for k, v in change()(pairs).items() if k != f"{kohya(LAYER)}.lora_up.weight"}, "1 of its 5 keys lack the other matrix"),
        (lambda pairs: change(**{"lora_up.weight": torch.full((32, 2), torch.nan)})(pairs), "2 of its 6 keys hold NaN or infinity"),
        (lambda pairs: {k: torch.zeros_like(v) for k, v in change()(pairs).items()}, "the products of all its 3 layers are zero"),
        (lambda pairs: change(**{"lora_down.weight": torch.ones(2, 31)})(pairs), r"2 of its 6 keys are of another size, such as \S+: down \[2, 31\] and up \[32, 2\] at \S+, which is \[32, 32\]"),
        (lambda pairs: change(**{"lora_up.weight": torch.ones(32, 3)})(pairs), "matrices that cannot be multiplied"),
        (lambda pairs: change(alpha=torch.ones(2))(pairs), "matrices that cannot be multiplied"),
        (lambda pairs: change(dora_scale=torch.ones(3, 1))(pairs), r"DoRA magnitude \[3, 1\]"),
        (lambda pairs: change()(pairs) | {f"unet.{LAYER}.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 32)), ("B", (32, 2)))}, "is given twice, under two names"),
        (lambda pairs: {f"{LAYER}.lora_{x}.{n}.weight": torch.ones(s) for n in ("one", "two") for x, s in (("A", (2, 32)), ("B", (32, 2)))}, "several adapters: one, two"),
        (lambda pairs: change()(pairs) | {f"lora_te2_nothing.lora_{x}.weight": torch.ones(2, 2) for x in ("down", "up")}, "2 of its 2 text-encoder keys fit no layer of the text encoders"),
    ],
)  # fmt: skip
def test_every_key_is_used_or_named(sdxl, tmp_path, tensors, problem):
    unet = sdxl_unet()
    pairs = matrices(unet, only=rf"{LAYER}$|conv_in|conv_out")
    assert len(pairs) == 3
    save_file({key: value.contiguous() for key, value in tensors(pairs).items()}, tmp_path / "l.safetensors")
    with pytest.raises(TeacherError, match=problem):
        DiffusersTeacher(path=str(sdxl), lora=tmp_path / "l.safetensors").pipeline()


@pytest.mark.parametrize(
    "config, problem",
    [
        ({"peft_type": "LOHA"}, "its configuration says LOHA"),
        ({"r": 4}, "says rank 4 for base_model.model.*, whose matrices have 2"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights too"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"use_dora": True}, "has no magnitude"),
        ({"lora_alpha": "two"}, "lora_alpha must be a finite number, got 'two'"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern .* no pattern"),
    ],
)
def test_configurations_that_mean_something_else(tmp_path, config, problem):
    pairs = matrices(sdxl_unet(), only=LAYER)
    written(tmp_path / "adapter_model.safetensors", pairs, "base_model.model.{}".format, "peft")
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    with pytest.raises(FileError, match=problem):
        read_lora(tmp_path)


def test_a_file_for_another_model_says_which(sdxl, sd15, tmp_path):
    """Stable Diffusion 1.5's on SDXL, as kohya's trainer marks it; a quantised file without a scale; XLabs' names."""
    pairs = matrices(DiffusersTeacher(path=str(sd15)).load().denoiser.net.model, only="to_q$")
    tensors = load_file(written(tmp_path / "l.safetensors", pairs, kohya, alpha=1))
    save_file(tensors, tmp_path / "l.safetensors", {"ss_base_model_version": "sd_v1"})
    with pytest.raises(TeacherError, match=r"fit no layer .* It is for another model \(its metadata says 'sd_v1'\)"):
        DiffusersTeacher(path=str(sdxl), lora=tmp_path / "l.safetensors").pipeline()
    whole = {key: (9 * value).to(torch.int8 if "alpha" not in key else value.dtype) for key, value in tensors.items()}
    save_file(whole, tmp_path / "l.safetensors")
    with pytest.raises(
        FileError, match=r"\d+ of its \d+ keys are whole numbers, whose scale is not known here, such as lora"
    ):
        read_lora(tmp_path / "l.safetensors")
    for key, words in {
        "double_blocks.0.processor.qkv_lora1.down.weight": "XLabs' LoRA of FLUX",
        "emb_params": "textual inversion",
        "clip_l": "textual inversion",
    }.items():
        save_file({key: torch.ones(2, 2)}, tmp_path / "l.safetensors")
        with pytest.raises(FileError, match=f"1 of its 1 keys are {words}"):
            read_lora(tmp_path / "l.safetensors")
    save_file({}, tmp_path / "l.safetensors")
    with pytest.raises(TeacherError, match="holds no tensors"):
        DiffusersTeacher(path=str(sdxl), lora=tmp_path / "l.safetensors").pipeline()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_matrices_of_any_stored_dtype(sd15, tmp_path, dtype):
    network = DiffusersTeacher(path=str(sd15)).load().denoiser.net.model
    pairs = {path: (a.to(dtype), b.to(dtype)) for path, (a, b) in matrices(network, only="to_q$").items()}
    found = read_lora(written(tmp_path / "l.safetensors", pairs, kohya, alpha=1)).for_network(network)
    for path, (a, b) in pairs.items():
        torch.testing.assert_close(found[path].product(), 0.5 * product(a.float(), b.float()))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        read_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match=r"holds no weights\. Try: give one file"):
        read_lora(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    with pytest.raises(FileError, match=r"2 .safetensors files \(a.safetensors, b.safetensors\). Try: give one"):
        read_lora(tmp_path)
    with pytest.raises(FileError, match="is damaged"):
        read_lora(tmp_path / "a.safetensors")
    (tmp_path / "l.pt").write_bytes(b"x")
    with pytest.raises(FileError, match="is damaged"):
        read_lora(tmp_path / "l.pt")


def test_peft_without_its_configuration_is_said(sdxl, tmp_path, capsys):
    file = written(tmp_path / "l.safetensors", matrices(sdxl_unet(), only=LAYER), "base_model.model.{}".format, "peft")
    DiffusersTeacher(path=str(sdxl), lora=file).load()
    assert "without its adapter_config.json: alpha of 1 layers is assumed to be their rank" in capsys.readouterr().err


# -- students --------------------------------------------------------------------------------------------------------------


def imported(sdxl, file, tmp_path):
    out = tmp_path / "imported"
    assert main(["import", str(file), "--pipeline", str(sdxl), "--out", str(out)]) == 0
    return load_student(find_student(out)).generator.denoiser


def outputs_agree(sdxl, file, denoiser):
    """A student's output is that of a network with the file merged."""
    tuned = DiffusersTeacher(path=str(sdxl), lora=file).load().denoiser
    torch.manual_seed(0)
    cond = {"text": torch.randn(1, 12, 16), "pooled": torch.randn(1, 16), "time_ids": torch.ones(1, 6)}
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([0.6])
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x_t, t, **cond), tuned(x_t, t, **cond), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("given", ["file", "folder"])
@pytest.mark.parametrize("rslora", [False, True])
def test_import_knows_pefts_alpha(sdxl, tmp_path, given, rslora):
    folder = tmp_path / "adapter"
    folder.mkdir()
    pairs = matrices(sdxl_unet(), rank=4, only=LAYER)
    file = written(folder / "adapter_model.safetensors", pairs, "base_model.model.{}".format, "peft")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": rslora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = file if given == "file" else folder
    denoiser = imported(sdxl, path, tmp_path)
    assert (denoiser.spec.rank, denoiser.spec.alpha) == (4, 4.0 if rslora else 2.0)
    outputs_agree(sdxl, path, denoiser)


def test_import_of_mixed_ranks_and_scales(sdxl, tmp_path):
    unet = sdxl_unet()
    pairs = matrices(unet, rank=2, only="attn1") | matrices(unet, rank=5, only=r"conv1$|ff\.net")
    file = written(tmp_path / "l.safetensors", pairs, kohya)
    tensors = load_file(file)
    alphas = {f"{kohya(path)}.alpha": torch.tensor(1.0 + number % 3) for number, path in enumerate(pairs)}
    save_file(tensors | alphas, file)
    denoiser = imported(sdxl, file, tmp_path)
    assert denoiser.spec.rank == 5 and denoiser.adapters().keys() == {f"net.model.{path}" for path in pairs}
    outputs_agree(sdxl, file, denoiser)


def test_import_of_dora_is_a_whole_network(sdxl, tmp_path, capsys):
    pairs = matrices(sdxl_unet(), only=LAYER)
    file = written(tmp_path / "l.safetensors", pairs, kohya)
    save_file(load_file(file) | {f"{kohya(LAYER)}.dora_scale": torch.rand(32, 1)}, file)
    denoiser = imported(sdxl, file, tmp_path)
    assert "the student is the whole network with the LoRA merged" in capsys.readouterr().err
    outputs_agree(sdxl, file, denoiser)


def test_import_names_the_text_encoders_keys(sdxl, tmp_path):
    file = with_text(sdxl, tmp_path / "l.safetensors", "kohya")
    with pytest.raises(FileError, match=r"\d+ of its \d+ keys are of text encoders, such as lora_te"):
        import_student(file, DiffusersTeacher(path=str(sdxl)), [999], tmp_path / "o")


def test_a_training_folder_with_the_frozen_weights_beside_the_adapters(sdxl, tmp_path):
    """PEFT's state dict: `base_layer` and all that has no adapter. Those of another model are refused."""
    from peft import LoraConfig, get_peft_model

    network = DiffusersTeacher(path=str(sdxl)).load().denoiser.net.model
    model = get_peft_model(network, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    denoiser = imported(sdxl, tmp_path, tmp_path / "out")
    assert denoiser.spec.rank == 2 and all(name.endswith("to_q") for name in denoiser.adapters())
    state = {key: value * 1.1 if "base_layer" in key else value for key, value in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"whole weights that differ from the pipeline's, .*trained on another model"):
        import_student(tmp_path, DiffusersTeacher(path=str(sdxl)), [999], tmp_path / "o")


# -- rounding --------------------------------------------------------------------------------------------------------------


def test_a_small_adapter_on_a_bf16_teacher_is_rounded_once(sdxl, tmp_path):
    """Its change is below half a step of bfloat16 almost everywhere: merged there, hardly anything would be left."""
    base = load_file(Path(sdxl) / "unet" / "diffusion_pytorch_model.safetensors")
    pairs = {path: (down, 5e-3 * up) for path, (down, up) in matrices(sdxl_unet(), only="to_|proj_|conv1").items()}
    file = written(tmp_path / "l.safetensors", pairs, kohya, alpha=0.5)
    pipeline = DiffusersTeacher(path=str(sdxl), dtype="bfloat16")
    teacher = pipeline.load()
    pipeline.prepare(["a cat"], tmp_path / "p", pipeline.encoder(), torch.float32)
    student, _ = import_student(file, pipeline.model_copy(update={"prompts": tmp_path / "p"}), [999], tmp_path / "s")
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.bfloat16}
    export_student(student, tmp_path / "out", dtype=torch.float16)
    whole = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    single = load_file(tmp_path / "out" / "student_unet.safetensors")
    assert base.keys() == whole.keys() == single.keys()
    for key, value in base.items():
        path = key.removesuffix(".weight")
        moved = value + 0.25 * product(*pairs[path]) if path in pairs and key.endswith(".weight") else value
        # a product's last bit depends on its order, and is sometimes what decides the rounding
        assert (whole[key] != moved.half()).float().mean() < 1e-2 and torch.equal(whole[key], single[key])
        torch.testing.assert_close(whole[key].float(), moved, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("lora", [False, True])
def test_students_of_a_bf16_teacher_start_from_the_files_weights(sdxl, tmp_path, lora):
    file = None
    if lora:
        pairs = {path: (down, 1e-3 * up) for path, (down, up) in matrices(sdxl_unet()).items()}
        file = written(tmp_path / "l.safetensors", pairs, kohya)
    wide = DiffusersTeacher(path=str(sdxl), lora=file)
    wanted, teacher = wide.load().start(), wide.model_copy(update={"dtype": "bfloat16"}).load()
    for player in (teacher.start(), teacher.player(None)):
        assert all(parameter.requires_grad for parameter in player.parameters()) and player.training
        for (name, value), (_, own) in zip(player.named_parameters(), wanted.named_parameters(), strict=True):
            assert value.dtype == torch.float32 and torch.equal(value, own), name
    narrow = teacher.denoiser.state_dict()
    assert all(torch.equal(narrow[name], value.bfloat16()) for name, value in wanted.state_dict().items())
