"""Upload of an export through huggingface_hub, whose HfApi is replaced: nothing leaves the machine."""

import httpx
import pytest

pytest.importorskip("diffusers")

import huggingface_hub

from fewstep.cli.main import main
from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import tiny_sd15
from tests.support.students import made_student


class FakeApi:
    """Records what it is asked, and fails where it is told to."""

    calls: list = []  # noqa: RUF012  (reset by the fixture)
    fails: dict = {}  # noqa: RUF012

    def _do(self, method, arguments):
        if method in self.fails:
            raise self.fails[method]
        self.calls.append((method, arguments))

    def create_repo(self, **arguments):
        self._do("create_repo", arguments)

    def upload_folder(self, **arguments):
        self._do("upload_folder", arguments)
        return f"https://hub/{arguments['repo_id']}"


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "fails", {})
    return FakeApi


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return made_student(DiffusersTeacher(path=str(tiny_sd15(root / "of"))), root / "run", [999], {"rank": 2})


def export(run, out, *more):
    return main(["export", str(run), "--out", str(out), "--formats", "lora", *more])


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_is_uploaded_and_private_unless_asked(public, run, api, tmp_path, capsys):
    assert export(run, tmp_path / "out", "--push-to-hub", "me/mine", *(["--public"] if public else [])) == 0
    (made, repository), (sent, files) = api.calls
    assert (made, repository["repo_id"], repository["private"]) == ("create_repo", "me/mine", not public)
    assert repository["exist_ok"] and (sent, files["repo_id"]) == ("upload_folder", "me/mine")
    assert files["folder_path"] == str(tmp_path / "out") and files["ignore_patterns"] == ["fewstep.json"]
    assert capsys.readouterr().out.strip().endswith("https://hub/me/mine")
    card = (tmp_path / "out/README.md").read_text()
    assert 'pipeline.load_lora_weights("me/mine", subfolder="lora"' in card and "THIS_FOLDER" not in card


@pytest.mark.parametrize(
    "method, error",
    [
        ("create_repo", huggingface_hub.errors.LocalTokenNotFoundError("Token is required, but no token found.")),
        ("create_repo", httpx.ConnectError("Name or service not known")),
        ("upload_folder", ValueError("The repository is gone.")),
    ],
)
def test_what_the_hub_refuses_is_one_message(method, error, run, api, tmp_path, capsys):
    api.fails[method] = error
    assert export(run, tmp_path / "out", "--push-to-hub", "me/mine") == 1
    said = capsys.readouterr().err
    assert f"--push-to-hub me/mine: {error}" in said and "Try: `hf auth login`" in said
    assert (tmp_path / "out").exists() == (method == "upload_folder"), (
        "a missing login is known before anything is written"
    )


@pytest.mark.parametrize(
    "given, words",
    [
        (["--push-to-hub", "mine"], "--push-to-hub must be a name on the hub (owner/name), got 'mine'"),
        (["--push-to-hub", "/home/me/mine"], "must be a name on the hub"),
        (["--public"], "give --push-to-hub too"),
    ],
)
def test_names_that_are_no_repository(given, words, run, api, tmp_path, capsys):
    assert export(run, tmp_path / "out", *given) == 1
    assert words in capsys.readouterr().err and not api.calls and not (tmp_path / "out").exists()


def test_no_file_names_a_folder_of_this_machine(run, tmp_path):
    """A card with `base_model: some/folder` would link a stranger's repository, one with /home/... publishes a name."""
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    files = [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".json", ".md", ".py", ".txt")]
    assert len(files) > 8
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert str(run.parent) not in text and "/tmp" not in text and "pypi.org" not in text, file
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model" not in card and 'from_pretrained("BASE_MODEL", dtype=torch.float32)' in card
    assert "torch_dtype" not in card and "dtype=torch.float16" in card
    again = ["export", str(run), "--out", str(tmp_path / "out"), "--formats", "lora", "--base-model"]
    assert main([*again, "some/model"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: some/model" in card and 'from_pretrained("some/model", dtype=torch.float32)' in card
    assert main([*again, "/home/me"]) == 1
