import json

import pytest
import torch

from fewstep.diffusion.generator import Generator
from fewstep.formats.model import load_denoiser, load_generator, save_denoiser, save_generator
from fewstep.networks import UNetSpec
from fewstep.system.errors import FileError, TeacherError
from fewstep.teachers import ClassLabels, NativeTeacher
from tests.support.networks import TINY, randomised


def inputs(spec, count=5):
    x = torch.randn(count, *spec.net.sample_shape)
    cond = {"labels": torch.arange(count) % 10} if spec.net.num_classes else {}
    return x, torch.linspace(0.2, 0.8, count), cond


@pytest.mark.parametrize("name", TINY)
def test_every_network_keeps_its_shape_and_uses_every_weight(name):
    spec = TINY[name]
    denoiser = randomised(spec)
    x, t, cond = inputs(spec, 11)
    if cond:
        cond = {"labels": torch.arange(11)}  # every class and the empty one
    out = denoiser(x, t, **cond)
    assert out.shape == x.shape and out.dtype == torch.float32
    out.square().sum().backward()
    assert [n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_samples_of_a_batch_do_not_see_each_other(name):
    spec = TINY[name]
    denoiser = randomised(spec)
    x, t, cond = inputs(spec)
    whole = denoiser(x, t, **cond)
    alone = torch.cat([denoiser(x[i : i + 1], t[i : i + 1], labels=cond["labels"][i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_no_labels_means_the_empty_class():
    denoiser = randomised(TINY["dit"])
    x, t, _ = inputs(TINY["dit"])
    torch.testing.assert_close(denoiser(x, t), denoiser(x, t, labels=torch.full((5,), 10)))


@pytest.mark.parametrize("name", TINY)
def test_denoiser_file_round_trip(name, tmp_path):
    spec, denoiser = TINY[name], randomised(TINY[name])
    save_denoiser(tmp_path / "m.safetensors", denoiser, spec, {"note": "x"})
    loaded, loaded_spec, provenance = load_denoiser(tmp_path / "m.safetensors")
    x, t, cond = inputs(spec)
    assert torch.equal(loaded(x, t, **cond), denoiser(x, t, **cond))
    assert loaded_spec == spec and provenance == {"note": "x"}


def test_generator_file_round_trip_and_is_no_teacher(tmp_path):
    spec = TINY["dit"]
    generator = Generator(randomised(spec), [0.9, 0.5])
    save_generator(tmp_path / "g.safetensors", generator, spec, {})
    loaded, _, _ = load_generator(tmp_path / "g.safetensors")
    noise = [torch.randn(2, 1, 8, 8) for _ in range(2)]
    assert torch.equal(loaded(noise), generator(noise)) and loaded.times == generator.times
    save_denoiser(tmp_path / "d.safetensors", generator.denoiser, spec, {})
    with pytest.raises(FileError, match="not a few-step generator"):
        load_generator(tmp_path / "d.safetensors")


def test_a_generators_transition_is_in_its_file_and_an_old_file_means_renoising(tmp_path):
    """What adds no noise says format 2, which readers of format 1 refuse: they would add noise."""
    spec, noise = TINY["dit"], [torch.randn(2, 1, 8, 8) for _ in range(2)]
    old, ode = (Generator(randomised(spec), [0.9, 0.5], transition) for transition in ("renoise", "ode"))
    for name, generator in (("old", old), ("ode", ode)):
        save_generator(tmp_path / f"{name}.safetensors", generator, spec, {})
    loaded, _, _ = load_generator(tmp_path / "ode.safetensors")
    assert loaded.transition == "ode" and torch.equal(loaded(noise), ode(noise))
    assert json.loads((tmp_path / "ode.json").read_text())["metadata"]["format"] == "fewstep/2"
    values = json.loads((tmp_path / "old.json").read_text())
    assert values["metadata"].pop("transition") == "renoise" and values["metadata"]["format"] == "fewstep/1"
    (tmp_path / "old.json").write_text(json.dumps(values))
    loaded, _, _ = load_generator(tmp_path / "old.safetensors")
    assert loaded.transition == "renoise" and torch.equal(loaded(noise), old(noise))


def test_weights_that_do_not_fit_their_json_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_denoiser(path, TINY["dit"].build(), TINY["dit"], {})
    text = path.with_suffix(".json").read_text()
    assert '"depth": 2' in text
    path.with_suffix(".json").write_text(text.replace('"depth": 2', '"depth": 3'))
    with pytest.raises(FileError, match=r"blocks\.2.* is missing"):
        load_denoiser(path)
    path.with_suffix(".json").write_text(text.replace('"width": 16', '"width": 32'))
    with pytest.raises(FileError, match=r"\[.*\] where \[.*\] was expected"):
        load_denoiser(path)
    values = json.loads(text)
    values["metadata"]["denoiser"]["net"]["kind"] = "alien"
    path.with_suffix(".json").write_text(json.dumps(values))
    with pytest.raises(FileError, match=r"must be one of .*, got 'alien'"):
        load_denoiser(path)


def test_teacher_lookups_say_where_they_looked(tmp_path):
    with pytest.raises(TeacherError, match="fashion-mnist"):
        NativeTeacher(path="no-such").load()
    with pytest.raises(TeacherError, match="does not exist"):
        NativeTeacher(path=str(tmp_path / "x.safetensors")).load()
    with pytest.raises(TeacherError, match="pretrain"):
        NativeTeacher(path=str(tmp_path)).load()


def test_the_shipped_teacher_loads_and_fits_its_limit():
    teacher = NativeTeacher(path="fashion-mnist").load()
    assert teacher.shape == (1, 28, 28) and teacher.conditioner.num_classes == 10
    assert NativeTeacher(path="fashion-mnist").file().stat().st_size <= 12e6
    start = teacher.start()
    assert all(p.requires_grad for p in start.parameters()) and start is not teacher.denoiser


def test_classes():
    labels = ClassLabels(3, ("a", "b", "c"))
    assert labels.cond(None, 2)["labels"].tolist() == [3, 3]
    assert labels.null(labels.cond(torch.tensor([0, 1]), 2))["labels"].tolist() == [3, 3]
    assert set(labels.draw(200)["labels"].tolist()) == {0, 1, 2}
    assert ClassLabels(0).cond(torch.tensor([1]), 1) == {}
    with pytest.raises(TeacherError, match="`classes` must be of 0 a, 1 b, 2 c, got 7"):
        labels.cond(torch.tensor([7]), 1)


@pytest.mark.parametrize(("settings", "words"), [
    ({"size": 30}, "`size` must be a multiple of 4 for 2 levels, got 30"),
    ({"widths": (12, 16)}, "must be multiples of 8"),
    ({"widths": (8, 24), "heads": 5}, "the last one of heads 5"),
])  # fmt: skip
def test_unets_that_do_not_add_up_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        UNetSpec(**settings)
