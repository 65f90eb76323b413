"""Stand-ins for the hubs' servers, of what their clients ask when something is pushed."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "s3cretT0ken" * 3


class Stand:
    """What a stand-in holds and was asked, and how it misbehaves."""

    def __init__(self) -> None:
        self.url = ""
        self.role = "write"
        self.repos: dict[str, bool] = {}
        """Name → private."""
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.stored: list[str] = []
        """Hashes of blobs in the order of their arrival."""
        self.bodies: list[bytes] = []
        self.answers: dict[str, int] = {}
        """Part of `METHOD path` → status, for ever."""
        self.drop_next_blob = False
        self.refuse_blobs_after: int | None = None


class Handler(BaseHTTPRequestHandler):
    """Answers as `self.stand` says."""

    protocol_version = "HTTP/1.1"
    stand: Stand

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.stand.bodies.append(data)
        return data

    def any_method(self) -> None:
        stand, asked = self.stand, f"{self.command} {self.path}"
        stand.requests.append(asked)
        body = self.body()
        if "/blob/" in self.path:
            self.blob(body)
            return
        if TOKEN not in self.headers.get("Authorization", "") + self.headers.get("Cookie", ""):
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        for part, status in stand.answers.items():
            if part in asked:
                self.answer(status, {"error": f"no, with {TOKEN}", "Message": f"no, with {TOKEN}"})
                return
        self.api(self.path.partition("?")[0], json.loads(body) if body[:1] == b"{" and b"\n" not in body else body)

    do_GET = do_POST = do_PUT = any_method

    def blob(self, body: bytes) -> None:
        stand = self.stand
        if stand.drop_next_blob:
            stand.drop_next_blob = False
            self.close_connection = True
            self.connection.close()
            return
        if stand.refuse_blobs_after is not None and len(stand.stored) >= stand.refuse_blobs_after:
            self.answer(403)
            return
        found = hashlib.sha256(body).hexdigest()
        assert found == self.path.rpartition("/")[2].partition("?")[0]
        stand.blobs[found] = body
        stand.stored.append(found)
        self.answer(200)

    def lfs_objects(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Where each blob goes; nowhere if it is there."""
        return [
            {"oid": item["oid"], "size": item["size"]}
            | (
                {}
                if item["oid"] in self.stand.blobs
                else {"actions": {"upload": {"href": f"{self.stand.url}/blob/{item['oid']}?Signature=sig"}}}
            )
            for item in objects
        ]

    def api(self, path: str, value: Any) -> None:
        raise NotImplementedError


class HuggingFace(Handler):
    """huggingface.co, without Xet."""

    def api(self, path: str, value: Any) -> None:
        stand = self.stand
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "auth": {"accessToken": {"role": stand.role}}})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            name = f"{value['organization']}/{value['name']}"
            if name in stand.repos:
                self.answer(409, {"error": "You already created this model repo"})
                return
            stand.repos[name] = value.get("visibility") == "private" or value.get("private") is True
            self.answer(200, {"url": f"{stand.url}/{name}"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": self.lfs_objects(value["objects"])})
        elif repo not in stand.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif "/preupload/" in path:
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for item in value["files"]
            ]
            self.answer(200, {"files": modes})
        elif "/commit/" in path:
            for line in map(json.loads, value.splitlines()):
                item = line["value"]
                if line["key"] == "file":
                    stand.files[item["path"]] = base64.b64decode(item["content"])
                elif line["key"] == "lfsFile":
                    stand.files[item["path"]] = stand.blobs[item["oid"]]
            sha = "0" * 40
            self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{stand.url}/{repo}/commit/{sha}"})
        else:
            self.answer(200, {"id": repo, "private": stand.repos[repo], "sha": "0" * 40, "siblings": []})


class ModelScope(Handler):
    """modelscope.cn."""

    def api(self, path: str, value: Any) -> None:
        stand = self.stand
        if path.endswith("/users/me"):
            self.answer(200, {"success": True, "data": {"username": "me"}})
        elif path == "/api/v1/models":
            name = f"{value['Path']}/{value['Name']}"
            if name in stand.repos:
                self.answer(409, {"Code": 409, "Message": "already exists"})
                return
            stand.repos[name] = value["Visibility"] == 1
            self.answer(200, {"Code": 200, "Success": True, "Data": {"Path": value["Path"], "Name": value["Name"]}})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"Code": 200, "Data": {"objects": self.lfs_objects(value["objects"])}})
        elif "/commit/" in path:
            for action in value["actions"]:
                stored = action["type"] == "lfs"
                data = stand.blobs[action["sha256"]] if stored else base64.b64decode(action["content"])
                stand.files[action["path"]] = data
            self.answer(200, {"Code": 200, "Success": True, "Data": {}})
        else:
            name = "/".join(path.split("/")[-2:])
            if name not in stand.repos:
                self.answer(404, {"Code": 404, "Message": "not found"})
                return
            data = {"id": name, "private": stand.repos[name]}
            self.answer(200, {"success": True, "Code": 200, "data": data, "Data": data})


@contextmanager
def served(kind: type[Handler]) -> Iterator[Stand]:
    """A stand-in at `stand.url`."""
    stand = Stand()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (kind,), {"stand": stand}))
    server.daemon_threads = True
    stand.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stand
    finally:
        server.shutdown()
        server.server_close()
