"""Checkpoints by name, from a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import threading

import pytest

hub = pytest.importorskip("huggingface_hub")

from huggingface_hub import constants  # noqa: E402

from convert.hub import OFFICIAL, download, is_name  # noqa: E402
from convert.torch_io import CheckpointError  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "facebook/sam2.1-hiera-tiny": {"sam2.1_hiera_tiny.pt": b"tiny weights", "README.md": b"#"},
    "lab/tuned": {"a/best.pt": b"best"},
    "lab/several": {"one.pt": b"1", "two.safetensors": b"2"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            files = FILES.get(name)
            info = {
                "id": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": file} for file in files or ()],
            }
            listing = [
                {"type": "file", "path": file, "size": len(data), "oid": "0"}
                for file, data in (files or {}).items()
            ]
            content = None if files is None else (listing if "/tree/" in path else info)
            data = None if content is None else json.dumps(content).encode()
            self.send(data, {"Content-Type": "application/json"}, body, "RepoNotFound")
        else:
            name, _, file = path.partition("/resolve/main/")
            files = FILES.get(name)
            code = "RepoNotFound" if files is None else "EntryNotFound"
            data = (files or {}).get(file)
            tag = hashlib.sha256(data or b"").hexdigest()
            self.send(data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body, code)

    def send(self, data, headers, body, code):
        self.send_response(404 if data is None else 200)
        headers = {"X-Error-Code": code} if data is None else headers
        for name, value in {**headers, "Content-Length": str(len(data or b""))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and data:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield address
        server.shutdown()


def test_names():
    assert is_name("facebook/sam2.1-hiera-tiny")
    assert is_name("lab/tuned:a/best.pt")
    for path in ("sam2.1_hiera_tiny.pt", "weights/tiny.pt", "/a/b", "a/b/c", "a/b.safetensors"):
        assert not is_name(path), path
    assert len(OFFICIAL) == 8
    assert OFFICIAL["facebook/sam2-hiera-base-plus"] == "sam2_hiera_base_plus.pt"


def test_meta(server):
    assert download("facebook/sam2.1-hiera-tiny").read_bytes() == b"tiny weights"


def test_a_named_file(server):
    assert download("lab/tuned:a/best.pt").read_bytes() == b"best"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("lab/unknown:x.pt", "no such file, and no such repository"),
        ("lab/tuned:other.pt", "has no file other.pt"),
    ],
)
def test_what_is_not_there(server, name, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        download(name)


def test_choosing(monkeypatch):
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, name: list(FILES[name]))
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: f"/cache/{name}/{file}")
    assert str(download("lab/tuned")).endswith("a/best.pt")
    with pytest.raises(
        CheckpointError, match=r"found one.pt, two.safetensors; name it: lab/several"
    ):
        download("lab/several")


def test_no_connection(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(CheckpointError, match="facebook/sam2-hiera-tiny: cannot be fetched"):
        download("facebook/sam2-hiera-tiny")
