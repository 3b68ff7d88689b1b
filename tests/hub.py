"""The part of the Hugging Face Hub's HTTP interface that reading and pushing datasets and models takes, over folders on
this machine: what `huggingface_hub` asks for, without the network. Point HF_ENDPOINT of a new process at it."""

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves `root`/OWNER/NAME/... as dataset repositories and `root`/models/OWNER/NAME/... as models; `num_bytes`
    counts what was sent of Parquet files, `num_files` the files sent of models. Of a model there are the revisions
    `revisions`; a file .gated closes it to those without a token. Who asks for /silence is the last to get an answer.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.silent = False
        self.num_bytes = 0
        self.num_files = 0
        self.revisions = {"main", COMMIT}
        self.large: dict[str, bytes] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        answer: Any
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.server.silent:
            self.close_connection = True
            return
        if path == "/silence":
            self.server.silent = True
            self._answer(200, {}, b"")
            return
        if self.command == "PUT":  # a large file, at the address that the batch gave
            self.server.large[path.rsplit("/", 1)[1]] = data
            self._answer(200, {}, b"")
            return
        body = data.decode()
        if match := re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(?:resolve|revision)/([^/]+)(/.+)?)", path):
            if refusal := self._refusal(*match.groups()):
                self._answer(*refusal)
                return
            if match[3]:
                self._file(self.server.root / "models" / match[1] / match[3][1:])
                return
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(self.server.root / match[1] / match[2])
            return
        if self.command == "POST" and (answer := self._upload(path, body)):
            self._answer(*answer)
            return
        match = re.fullmatch(
            r"/api/(?:datasets|(models))/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(?:refs/convert/)?[^/]+)?(/.*)?",
            path,
        )
        repo = self.server.root / (match[1] or "") / match[2] if match else None
        if match is None or repo is None or not repo.is_dir():
            self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
            return
        if match[3] in (None, "revision"):
            names = [{"rfilename": str(file.relative_to(repo))} for file in repo.rglob("*") if file.is_file()]
            answer = {"id": match[2], "sha": COMMIT, "siblings": names, "tags": [], "private": False}
        elif match[3] == "tree":
            folder = repo / (match[4] or "/")[1:]
            if not folder.is_dir():
                self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
                return
            deep = "true" in parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower()
            answer = [_entry(repo, path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())]
        else:
            names = parse_qs(body).get("paths", [])
            answer = [_entry(repo, repo / name) for name in names if (repo / name).exists()]
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _refusal(self, repo: str, revision: str, name: str | None) -> tuple[int, dict[str, str], bytes] | None:
        """Of a model: why it is not given."""
        folder = self.server.root / "models" / repo
        if not folder.is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if (folder / ".gated").exists() and "Authorization" not in self.headers:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if revision not in self.server.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return None

    def _upload(self, path: str, body: str) -> tuple[int, dict[str, str], bytes] | None:
        """What `create_repo`, `create_branch` and `upload_folder` ask for; a model's .safetensors go by LFS, all other
        files inside the commit."""
        kind = {"Content-Type": "application/json"}
        match = re.fullmatch(r"/api/(?:datasets|(models))/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if match is None and batch is None and path not in ("/api/repos/create", "/api/validate-yaml"):
            return None
        if "Authorization" not in self.headers:
            return 401, kind, b'{"error": "Invalid username or password."}'
        asked = json.loads(body) if match is None or match[3] != "commit" else {}
        if batch:
            address = f"{self.server.endpoint}/large/"
            objects = [o | {"actions": {"upload": {"href": address + o["oid"]}}} for o in asked["objects"]]
            return 200, kind, json.dumps({"transfer": "basic", "objects": objects}).encode()
        if match is None:
            if path == "/api/validate-yaml":
                return 200, kind, b"{}"
            model, name = asked.get("type", "model") == "model", f"{asked['organization']}/{asked['name']}"
            repo = self.server.root / ("models" if model else "") / name
            there = repo.is_dir()
            repo.mkdir(parents=True, exist_ok=True)
            if asked.get("private") or asked.get("visibility") == "private":
                (repo / ".private").touch()
            address = f"{self.server.endpoint}/{'' if model else 'datasets/'}{name}"
            answer = {"url": address, "error": "You already created this repo"}
            return 409 if there else 200, kind, json.dumps(answer).encode()
        repo = self.server.root / (match[1] or "") / match[2]
        if match[3] == "branch":
            there = match[4] in self.server.revisions
            self.server.revisions.add(match[4])
            return 409 if there else 200, kind, b"{}"
        if match[3] == "preupload":
            large = {file["path"] for file in asked["files"] if match[1] and file["path"].endswith(".safetensors")}
            files = [
                {"path": name, "uploadMode": "lfs" if name in large else "regular", "shouldIgnore": False}
                for name in (file["path"] for file in asked["files"])
            ]
            return 200, kind, json.dumps({"files": files}).encode()
        for line in map(json.loads, body.splitlines()):
            file = repo / line["value"].get("path", "")
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                file.write_bytes(self.server.large[line["value"]["oid"]])
            elif line["key"] == "deletedFile":
                file.unlink()
        url = f"{self.server.endpoint}/{'' if match[1] else 'datasets/'}{match[2]}/commit/{COMMIT}"
        return 200, kind, json.dumps({"success": True, "commitUrl": url, "commitOid": COMMIT}).encode()

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        if path.suffix == ".parquet" and self.command == "GET":
            self.server.num_bytes += len(data)
        elif self.command == "GET":
            self.server.num_files += 1
        self._answer(status, headers, data)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(repo: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(repo))
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
    return {"type": "file", "oid": COMMIT, "size": path.stat().st_size, "path": name}
