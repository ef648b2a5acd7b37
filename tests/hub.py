"""A hub on this machine: enough of the Hub's interface for its real client to create, upload, read and be refused."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

TOKEN, USER = "hf_of_the_test", "tester"
Fault = Callable[[str, str], int | None]
"""Settings and path → the status with which the hub answers, 0 for a connection that is cut, or None for no fault."""


class Hub(ThreadingHTTPServer):
    """What was uploaded, and faults to be met.

    Attributes:
        files: Repository → path → content, at its only revision.
        private: Repository → whether it was asked to be private; None if nothing was said.
        requests: Settings and path of each request.
        fault: Says whether a request fails.
        lfs: Whether weights are uploaded as large files, apart from the commit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, path: None
        self.lfs = True

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self, repo: str) -> str:
        """The only revision of a repository."""
        content = b"".join(path.encode() + data for path, data in sorted(self.files[repo].items()))
        return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        method, path = self.command, unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        body = self._body()
        status = self.server.fault(method, path)
        if status == 0:
            self.close_connection = True
            self.connection.close()
        elif status is not None:
            self._send(status, {"error": "the hub of the test was told to fail"})
        elif method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "no token, or another one"})
        else:
            self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        hub, parts = self.server, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": USER, "orgs": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or USER}/{asked['name']}"
            if not repo.startswith(f"{USER}/"):
                self._send(403, {"error": "you have no right to create a repository there"})
                return
            status = 409 if repo in hub.files else 200
            hub.files.setdefault(repo, {})
            hub.private.setdefault(
                repo, asked.get("visibility") == "private" if "visibility" in asked else asked.get("private")
            )
            self._send(status, {"url": f"{hub.url}/{repo}", "id": repo})
        elif path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            try:
                yaml.safe_load(content.split("---")[1])
                self._send(200, {"errors": [], "warnings": []})
            except (IndexError, yaml.YAMLError) as error:
                self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        elif parts[0] == "large":
            hub.large[parts[1]] = body
            self._send(200, {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._send(200, {"objects": objects})
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._send_of_model("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._send_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._missing("RepoNotFound")

    def _send_of_model(self, repo: str, what: list[str], body: bytes) -> None:
        hub = self.server
        if repo not in hub.files:
            self._missing("RepoNotFound")
        elif what[:1] == ["preupload"]:
            files = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": self._mode(f["path"])}
                for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif what[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[repo][value["path"]] = hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.files[repo][value["path"]]
            sha = hub.sha(repo)
            self._send(200, {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})
        elif what[:1] == ["tree"]:
            self._send(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in hub.files[repo].items()
                ],
            )
        else:
            siblings = [{"rfilename": path} for path in hub.files[repo]]
            self._send(200, {"id": repo, "sha": hub.sha(repo), "private": False, "tags": [], "siblings": siblings})

    def _send_file(self, repo: str, path: str) -> None:
        hub = self.server
        if repo not in hub.files:
            self._missing("RepoNotFound")
        elif path not in hub.files[repo]:
            self._missing("EntryNotFound", {"X-Repo-Commit": hub.sha(repo)})
        else:
            data = hub.files[repo][path]
            etag = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"X-Repo-Commit": hub.sha(repo), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    def _mode(self, path: str) -> str:
        return "lfs" if self.server.lfs and path.endswith((".safetensors", ".png")) else "regular"

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, {"error": code}, {"X-Error-Code": code, **(headers or {})})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that runs on a port of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def environment_of(hub: Hub, cache: str) -> dict[str, str]:
    """What a new process needs to take it for the Hub."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": cache, "HF_HUB_OFFLINE": "0", **_PLAIN}


_PLAIN = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def use(url: str, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Has the client of this process take a hub at an address for the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # It may have been made for another one.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
