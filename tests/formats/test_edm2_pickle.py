"""EDM2's pickles: the published layout is read without executing anything, and other networks are refused."""

import pytest
import torch

from fewstep.formats.edm import load_edm_pickle
from fewstep.networks import EDM2Spec
from fewstep.system.errors import FileError, TeacherError
from fewstep.teachers import NativeTeacher
from tests.formats.test_edm_pickle import BOMB, invented_modules  # noqa: F401  (a fixture for every test)
from tests.support.published import write_published_edm2

SPEC = EDM2Spec(
    size=8, channels=4, num_classes=5, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
)
ARGUMENTS = {
    "img_resolution": 8, "img_channels": 4, "label_dim": 5, "use_fp16": True, "sigma_data": 0.5, "model_channels": 8,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1,
}  # fmt: skip


def written(path, source="", spec=SPEC, **arguments):
    torch.manual_seed(0)
    net = spec.build()
    write_published_edm2(path, net, ARGUMENTS | arguments, source)
    return net


def test_a_published_teacher_is_read_and_its_source_never_run(tmp_path):
    net = written(tmp_path / "t.pkl", BOMB.format(str(tmp_path / "ran")))
    denoiser, spec, provenance = load_edm_pickle(tmp_path / "t.pkl")
    assert spec == SPEC.model_copy(update={"dropout": 0.1}) and provenance["source_class"] == "Precond"
    state = {name: value.half().float() for name, value in net.state_dict().items()}
    assert denoiser.net.state_dict().keys() == state.keys() and "logvar_linear.weight" in state
    assert all(torch.equal(value, state[name]) for name, value in denoiser.net.state_dict().items())
    assert not (tmp_path / "ran").exists()
    assert denoiser.net.log_variance(torch.zeros(3)).shape == (3,)


def test_a_network_that_fewstep_does_not_build_is_refused(tmp_path):
    for name, value in (("res_balance", 0.5), ("channel_mult_emb", 4), ("clip_act", None)):
        written(tmp_path / "t.pkl", **{name: value})
        with pytest.raises(FileError, match=f"its network has {name}"):
            load_edm_pickle(tmp_path / "t.pkl")
    written(tmp_path / "t.pkl", **{"model_channels": 16})
    with pytest.raises(FileError, match="it describes a network of"):
        load_edm_pickle(tmp_path / "t.pkl")


def test_a_network_of_latents_needs_its_vae_and_one_of_pixels_does_not(tmp_path):
    written(tmp_path / "t.pkl")
    with pytest.raises(TeacherError, match="got EDM2's model of latents"):
        NativeTeacher(path=str(tmp_path / "t.pkl")).load()
    written(tmp_path / "p.pkl", spec=SPEC.model_copy(update={"channels": 3}), img_channels=3)
    teacher = NativeTeacher(path=str(tmp_path / "p.pkl"), dropout=0.1).load()
    assert teacher.shape == (3, 8, 8) and teacher.conditioner.num_classes == 5
    assert teacher.start().net.dec["8x8_block0"].dropout == 0.1
    with pytest.raises(TeacherError, match="edm2/posthoc-reconstructions/edm2-img64-s"):
        NativeTeacher(path=str(tmp_path / "edm2-img64-s-1073741-0.075.pkl")).load()
