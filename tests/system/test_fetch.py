"""Known weights from a local address: right ones are kept, all others leave nothing behind."""

import hashlib
import http.server
import threading
from dataclasses import replace

import pytest

from fewstep.cli.main import main
from fewstep.evaluation.known import KNOWN
from fewstep.system.errors import FileError
from fewstep.system.fetch import Known, fetch

CONTENT = b"weights" * 1000


@pytest.fixture
def known(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "w.pth").write_bytes(CONTENT)
    url = (tmp_path / "there" / "w.pth").as_uri()
    return Known("a test", url, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), lambda: tmp_path / "cache" / "w.pth")


def test_a_file_is_fetched_once(known):
    seen = []
    assert fetch(known, progress=seen.append) and known.place().read_bytes() == CONTENT and seen[-1] == len(CONTENT)
    assert not fetch(known)
    known.place().write_bytes(b"damaged")
    assert fetch(known) and known.place().read_bytes() == CONTENT


def test_over_http(known, tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "there"))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert fetch(known, f"{address}/w.pth") and known.place().read_bytes() == CONTENT
        known.place().unlink()
        with pytest.raises(FileError, match=r"cannot be fetched \(.*[Nn]ot [Ff]ound.*Try: again"):
            fetch(known, f"{address}/x.pth")
        server.shutdown()


@pytest.mark.parametrize(
    ("change", "url", "said"),
    [
        ({"sha256": "00"}, None, "must have the sha256 00, got .*nothing was kept"),
        ({"size": 100}, None, "must be about 100 bytes, got more"),
        ({}, "file:///nowhere/w.pth", "cannot be fetched"),
        ({}, "ftp://a/b", "`--url` must begin with"),
    ],
)
def test_what_is_wrong_leaves_nothing(known, change, url, said):
    with pytest.raises(FileError, match=said):
        fetch(replace(known, **change), url)
    assert not known.place().parent.is_dir() or not any(known.place().parent.iterdir())


def test_the_command(known, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(KNOWN, "vgg16", known)
    assert main(["fetch", "vgg16"]) == 0 and str(known.place()) in capsys.readouterr().out
    assert main(["fetch", "vgg16"]) == 0 and "is there already" in capsys.readouterr().out
    assert main(["fetch"]) == 0
    listed = capsys.readouterr().out
    assert "inception" in listed and "vgg16" in listed and "is here" in listed
    assert main(["fetch", "vgg61"]) == 1 and "Did you mean vgg16?" in capsys.readouterr().err
    assert main(["fetch", "vgg16", "--url", "ftp://x"]) == 0  # it is there: no address is needed


def test_the_addresses_are_those_that_their_readers_name():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert KNOWN["inception"].url == URL_INCEPTION_V3 and KNOWN["vgg16"].sha256 == "397923af"
