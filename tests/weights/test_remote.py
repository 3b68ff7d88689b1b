"""Weights from the Hub, the web and object stores: fetched once, checked, pinned; every way to fail is one sentence."""

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mcir.archs import build
from mcir.errors import UserError
from mcir.weights.files import save_weights
from mcir.weights.remote import fetch, name_of
from mcir.weights.trained import open_trained
from tests.hub import COMMIT

ARCH = {"name": "edsr", "scale": 2, "num_features": 4, "num_blocks": 1}


def save(file: Path, value: float, **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.full_like(tensor, value) for name, tensor in build(ARCH).state_dict().items()}
    save_weights(file, tensors, {"arch": json.dumps(ARCH), **metadata})
    return file


def value(trained) -> float:
    return next(trained.net.parameters()).flatten()[0].item()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_of_the_hub_are_those_of_the_file(the_hub, tmp_path, monkeypatch):
    """By repository, file and revision; fetched once; the commit is known; cached they are there when offline."""
    from huggingface_hub import constants

    model = tmp_path / "hub/models/owner/name"
    save(model / "model.safetensors", 1)
    save(model / "x4/model.safetensors", 2)
    torch.save({"params": build(ARCH).state_dict(), "params_ema": {}}, model / "net.pth")
    (tmp_path / "hub/models/owner/one").mkdir()
    torch.save({"params": build(ARCH).state_dict()}, tmp_path / "hub/models/owner/one/only.pth")
    places = ["hf://owner/name", f"b=hf://owner/name/x4/model.safetensors@{COMMIT}", "c=hf://owner/name@main/x4"]
    opened = open_trained(places)
    assert [(one.name, value(one)) for one in opened] == [("name", 1), ("b", 2), ("c", 2)]
    assert opened[0].origin == f"hf://owner/name/model.safetensors@{COMMIT}"
    assert opened[0].sha256 == sha256(model / "model.safetensors")
    assert the_hub.num_files == 2
    assert fetch("hf://owner/one").origin == f"hf://owner/one/only.pth@{COMMIT}"
    assert str(fetch("hf://owner/name/net.pth[params]").path).endswith("net.pth[params]")
    the_hub.silent = True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert value(open_trained([f"hf://owner/name@{COMMIT}"])[0]) == 1
    with pytest.raises(UserError, match=r"^hf://owner/other: is not in the Hub's cache, and HF_HUB_OFFLINE is set$"):
        fetch("hf://owner/other")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://owner/other", "the Hub has no repository owner/other; if it is private, log in"),
        ("hf://owner/name@v2", "the repository has no branch, tag or commit v2"),
        ("hf://owner/name/x.pth", "the repository has no x.pth; its weights files: a.pth, b.pth"),
        ("hf://owner/name", "^hf://owner/name: holds several weights files: a.pth, b.pth; name one"),
        ("hf://owner/empty", "^hf://owner/empty: holds no weights file"),
        ("hf://owner/closed", "the repository is gated: accept its terms at http://127.0.0.1:"),
        ("hf://owner", "are written hf://owner/repo"),
    ],
)
def test_what_the_hub_does_not_give(the_hub, tmp_path, place, message, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("name/a.pth", "name/b.pth", "closed/.gated", "empty/README.md"):
        (tmp_path / "hub/models/owner" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub/models/owner" / name).touch()
    with pytest.raises(UserError, match=message) as error:
        fetch(place)
    assert "\n" not in str(error.value)


def test_without_a_network(cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries for 23 s
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(UserError, match=r"^hf://owner/name: the Hub \(http://127.0.0.1:9\) cannot be reached"):
        fetch("hf://owner/name")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/a.pth: the network or the store fails \(.*refused"):
        fetch(f"http://127.0.0.1:9/a.pth#sha256={'0' * 64}")


class Web(SimpleHTTPRequestHandler):
    """Files, of which every second answer breaks off in the middle; ranges are served."""

    asked = 0

    def log_message(self, *args):
        pass

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        Web.asked += 1
        data = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:] if Web.asked % 2 == 0 else data[start : start + len(data) // 2])


@pytest.fixture
def web(tmp_path, cache):
    (tmp_path / "web").mkdir()
    Web.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=str(tmp_path / "web"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_web_with_a_checksum(web, tmp_path, cache, monkeypatch):
    """Fetched once, also by several at a time, though the connection breaks; a wrong checksum leaves nothing behind."""
    from huggingface_hub import constants

    file = save(tmp_path / "web/net.safetensors", 3)
    place = f"{web}/net.safetensors#sha256={sha256(file)}"
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(place).path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {path.read_bytes() for path in found} == {file.read_bytes()}
    assert Web.asked == 2  # the first broke off, the second went on from there
    (trained,) = open_trained([place])
    assert (trained.name, value(trained), trained.origin) == ("net", 3, place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(place).path == found[0]
    other = f"{web}/net.safetensors#sha256={'0' * 64}"
    with pytest.raises(UserError, match=r"is not in the cache .* HF_HUB_OFFLINE is set"):
        fetch(other)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=f"its SHA-256 is {sha256(file)}, not 0000"):
        fetch(other)
    files = [path.name for path in (cache / "mcir").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert files == ["net.safetensors"]
    with pytest.raises(UserError, match="the server answers 404"):
        fetch(f"{web}/none.pth#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("https://host/net.pth", r"add the file's checksum, https://host/net.pth#sha256=… \(64 hexadecimal digits"),
        ("https://host/net.pth#sha256=12", "a checksum is written #sha256= and 64 hexadecimal digits"),
        (f"https://host/net#sha256={'0' * 64}", "weights are read from .safetensors"),
        ("https://me:secret@host/net.pth", r"the URL holds credentials \(https://…@host\)"),
        ("https://host/net.pth?X-Amz-Signature=secret", r"the URL holds credentials \(https://X-Amz-Signature=…\)"),
        ("s3://key:secret@bucket/net.pth", r"the URL holds credentials \(s3://…@bucket\)"),
        ("nowhere://bucket/net.pth", "Protocol not known: nowhere"),
    ],
)
def test_what_a_url_must_not_be(cache, place, message):
    with pytest.raises(UserError, match=message) as error:
        fetch(place)
    assert "secret" not in str(error.value)


def test_any_file_system(cache, tmp_path):
    """A file, pinned by its checksum; a checkpoint's folder by the rule of those on this machine; what changed there is
    fetched again."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/b/net.safetensors", save(tmp_path / "a", 5).read_bytes())
    first = fetch("memory://b/net.safetensors")
    assert first.origin == f"memory://b/net.safetensors#sha256={sha256(tmp_path / 'a')}"
    store.pipe("/b/net.safetensors", save(tmp_path / "a", 6).read_bytes())
    assert value(open_trained(["memory://b/net.safetensors"])[0]) == 6
    assert value(open_trained([first.origin])[0]) == 5
    for name, number in (("model", 1), ("ema", 2)):
        store.pipe(f"/b/step-1/{name}.safetensors", save(tmp_path / "a", number, step="1").read_bytes())
    assert value(open_trained(["memory://b/step-1"])[0]) == 2
    assert value(open_trained(["memory://b/step-1"], "target")[0]) == 1
    store.pipe("/b/step-1/config.yaml", b"validation: {weights: target}")
    assert [(value(one), one.name) for one in open_trained(["memory://b/step-1"])] == [(1, "step-1")]
    with pytest.raises(UserError, match=r"holds no model.safetensors; name a weights file"):
        fetch("memory://b")
    with pytest.raises(UserError, match=r"^memory://b/none.pth: is not there$"):
        fetch("memory://b/none.pth")


def test_names():
    assert [
        name_of(place)
        for place in (
            "hf://owner/name@main",
            "hf://owner/name/net.pth@v1.0",
            "hf://owner/name/x4/model.safetensors",
            "https://host/dir/net.pth#sha256=12",
            "s3://bucket/runs/step-3/ema.safetensors",
        )
    ] == ["name", "net", "x4", "net", "step-3"]
