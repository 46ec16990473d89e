"""A server on this machine with the part of the Hugging Face hub's API that small models need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0" * 39 + "1"
TOKEN = "hf_token_of_the_test"


class LocalHub(ThreadingHTTPServer):
    """The repositories of the server, and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server.tokens.add(token)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if token != TOKEN:
                return self.answer({"error": "Invalid username or password."}, 401)
            if name.startswith("others/"):
                return self.answer({"error": "You don't have the rights to create a model there"}, 403)
            self.server.created.append(asked)
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.endpoint}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main(\?.*)?", self.path):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main(\?.*)?", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[match[1]][line["value"]["path"]] = content
            url = f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer({"error": f"no {self.path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/\w+|/tree/\w+)?", path):
            files = self.server.repositories.get(match[1])
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if (match[2] or "").startswith("/tree"):
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self.answer(rows)
            return self.answer({"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            content = self.server.repositories.get(match[1], {}).get(match[2])
            if content is None:
                return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        return self.answer({"error": f"no {self.path}"}, 404)

    do_HEAD = do_GET


@contextmanager
def local_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[LocalHub]:
    """Serve a hub until the block ends, for huggingface_hub in this process.

    Args:
        patch: Patch of the addresses of huggingface_hub.
        cache: Folder of its downloads.
    """
    server = LocalHub()
    patch.setattr(constants, "ENDPOINT", server.endpoint)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
