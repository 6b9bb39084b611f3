import pytest
import torch

from fewstep.system.device import pick_device, training_kernels, use_bf16
from fewstep.training.spec import TrainSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize(("amx", "avx512", "fast"), [(True, True, True), (False, True, True), (False, False, False)])
def test_auto_means_bf16_where_the_processor_multiplies_it(monkeypatch, amx, avx512, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert use_bf16("auto", CPU) is fast
    assert TrainSpec(images=1, device="cpu").bf16() is fast
    assert use_bf16("bf16", CPU) is True and use_bf16("fp32", CPU) is False, "what the user says is done"


def test_devices_that_do_not_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    for name in ("gpu", "cuda"):
        with pytest.raises(ValueError, match=f"`device` must be auto.* got '{name}'"):
            pick_device(name)


@pytest.mark.parametrize("bf16", [True, False])
def test_an_update_in_bf16_on_a_cpu_writes_attention_out(bf16):
    q = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)
    with training_kernels(CPU, bf16), torch.profiler.profile() as profile:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    fused = {event.name for event in profile.events() if "flash_attention" in event.name}
    assert bool(fused) is not bf16
    assert torch.backends.cuda.flash_sdp_enabled(), "what was allowed before is allowed again"


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_is_float32_on_a_card_unless_tf32_is_asked_for(tf32):
    """PyTorch lets convolutions use TF32 by itself. Settings alone: no card is needed to make them."""
    cudnn, before = torch.backends.cudnn, (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    with training_kernels(torch.device("cuda"), False, tf32):
        assert cudnn.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert (cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before
    assert TrainSpec(images=1, device="cpu", precision="tf32").bf16() is False
