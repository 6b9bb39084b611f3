"""Weights that are not finite are refused where they enter, and the tensor is named; noise levels are never clamped."""

import pytest
import torch

from fewstep.diffusion.generator import Generator, calls_at
from fewstep.diffusion.noise import Discrete, Karras, RectifiedFlow, scaled_linear_alphas_cumprod
from fewstep.formats.edm import load_edm_pickle
from fewstep.formats.model import (
    DenoiserSpec,
    import_model,
    load_denoiser,
    load_generator,
    save_denoiser,
    save_generator,
)
from fewstep.networks import SongUNetSpec
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.weights import first_not_finite
from fewstep.teachers import NativeTeacher
from fewstep.training.start import read_start
from tests.support.networks import TINY, randomised
from tests.support.published import arguments_of, write_published

SONG = DenoiserSpec(
    net=SongUNetSpec(
        size=8, channels=1, num_classes=3, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=()
    )
)


def spoilt(spec, value=torch.nan):
    """A network of which one number is wrong, and the name of its tensor."""
    denoiser = randomised(spec)
    name, last = list(denoiser.named_parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] = value
    return denoiser, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_tensor_is_named(dtype, value):
    tensors = {
        "a": torch.ones(5),
        "b": torch.full((3, 4), 2.0).to(dtype),
        "n": torch.ones(2, dtype=torch.int64),
        "e": torch.ones(0),
    }
    assert first_not_finite(tensors) is None
    spoilt = tensors["b"].float()
    spoilt[1, 2] = value
    assert first_not_finite(tensors | {"b": spoilt.to(dtype)}) == "b"


def test_large_numbers_are_not_infinite():
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert first_not_finite({"a": torch.full((100,), torch.finfo(dtype).max, dtype=dtype)}) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_files_of_ours(tmp_path, value):
    denoiser, name = spoilt(TINY["dit"], value)
    save_denoiser(tmp_path / "teacher.safetensors", denoiser, TINY["dit"], {})
    save_generator(tmp_path / "student.safetensors", Generator(denoiser, [0.8]), TINY["dit"], {})
    for read in (
        lambda: load_denoiser(tmp_path / "teacher.safetensors"),
        lambda: NativeTeacher(path=str(tmp_path)).load(),
        lambda: load_generator(tmp_path / "student.safetensors"),
        lambda: read_start(tmp_path / "student.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"must hold finite weights, got NaN or infinite numbers in {name}"):
            read()


def test_published_files(tmp_path):
    denoiser, name = spoilt(SONG)
    write_published(tmp_path / "t.pkl", denoiser)
    for read in (
        lambda: load_denoiser(tmp_path / "t.pkl"),
        lambda: import_model(tmp_path / "t.pkl", tmp_path / "out"),
        lambda: import_model(tmp_path / "t.pkl", tmp_path / "out", 2.5),
    ):
        with pytest.raises(
            ValueError, match=f"must be finite, got NaN or infinite numbers in {name.removeprefix('net.')}"
        ):
            read()
    assert not (tmp_path / "out").exists()


def test_checkpoints(tmp_path):
    weights = {"denoiser.w": torch.tensor([1.0, torch.nan])}
    Checkpoints(tmp_path).save(8, {"task": {"generator": {"denoiser.w": torch.ones(2)}, "ema": weights}})
    with pytest.raises(ValueError, match=r"must hold finite weights, got .* in ema denoiser.w"):
        read_start(tmp_path / "000000000008")


# -------------------------------------------------------------------------------------------------------- noise levels

SD = Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())


@pytest.mark.parametrize(
    ("schedule", "inside", "outside"),
    [
        (Karras(), [80.0, 2.5, 0.002], [81.0, 0.0019, 0.0, -1.0]),
        (Karras(sigma_max=20.0), [20.0], [80.0]),
        (SD, [14.6, 0.0292], [15.0, 80.0, 0.02]),
        (RectifiedFlow(shift=3.0), [1e6, 1.0, 1e-3], [0.0, -2.0]),
    ],
    ids=["karras", "karras-20", "discrete", "flow"],
)
def test_levels_off_the_grid_are_refused(schedule, inside, outside):
    alpha, sigma = schedule.alpha_sigma(torch.tensor(calls_at(schedule, inside, "sigmas"), dtype=torch.float64))
    torch.testing.assert_close((sigma / alpha).double(), torch.tensor(inside, dtype=torch.float64), rtol=2e-3, atol=0)
    for level in outside:
        with pytest.raises(
            ValueError, match=rf"sigmas must lie between the model's sigma_min .* and sigma_max .*, got {level:g}"
        ):
            calls_at(schedule, [level], "sigmas")


def test_the_ends_of_every_grid_are_on_it():
    for schedule in (Karras(), Karras(sigma_min=0.1, sigma_max=3.0, rho=5.0), SD):
        alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
        first, last = calls_at(schedule, (sigma / alpha).tolist(), "sigmas")
        assert first == pytest.approx(0, abs=1e-6) and last == pytest.approx(1, abs=1e-6) and last <= 1


def test_a_published_generator_is_not_called_off_its_grid(tmp_path):
    write_published(tmp_path / "t.pkl", randomised(SONG))
    assert load_generator(tmp_path / "t.pkl", 80.0)[0].times == (1.0,)
    for level in (100.0, 0.001):
        with pytest.raises(
            ValueError, match=r"sigma_init must lie between the model's sigma_min 0\.002 and sigma_max 80"
        ):
            load_generator(tmp_path / "t.pkl", level)


@pytest.mark.parametrize(
    ("own", "grid"),
    [
        ({"sigma_min": 0, "sigma_max": float("inf")}, (0.002, 80.0)),
        ({"sigma_min": 0.01, "sigma_max": 50.0}, (0.01, 50.0)),
        ({"sigma_max": 200}, (0.002, 80.0)),
    ],
)
def test_a_networks_own_range_is_used(tmp_path, own, grid):
    """EDM's sampler takes the narrower of its own range, 0.002 to 80, and the network's (Karras et al. 2022, generate.py)."""
    write_published(tmp_path / "t.pkl", randomised(SONG), arguments_of(SONG.net) | own)
    denoiser, spec, _ = load_denoiser(tmp_path / "t.pkl")
    assert (denoiser.schedule.sigma_min, denoiser.schedule.sigma_max) == grid
    assert spec.schedule == denoiser.schedule
    again = load_denoiser(import_model(tmp_path / "t.pkl", tmp_path / "imported"))[1]
    assert again.schedule == denoiser.schedule


@pytest.mark.parametrize(
    "own", [{"sigma_min": 90.0}, {"sigma_max": 0.001}, {"sigma_min": 5.0, "sigma_max": 2.0}, {"sigma_max": None}]
)
def test_a_range_that_is_none_is_refused(tmp_path, own):
    write_published(tmp_path / "t.pkl", randomised(SONG), arguments_of(SONG.net) | own)
    with pytest.raises(ValueError, match="sigma_min"):
        load_edm_pickle(tmp_path / "t.pkl")


def test_arguments_that_cannot_be_read_are_not_left_out(tmp_path):
    write_published(tmp_path / "t.pkl", randomised(SONG), arguments_of(SONG.net) | {"resample_filter": b"11"})
    with pytest.raises(ValueError, match="resample_filter are no plain values"):
        load_edm_pickle(tmp_path / "t.pkl")
