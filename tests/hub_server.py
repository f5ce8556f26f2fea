"""A model hub on this machine: as much of the hub's HTTP API as ``huggingface_hub`` and ``datasets`` ask for.

with HubServer() as hub:
    hub.add("model", "org/tiny", {"config.json": b"{}"})
    os.environ["HF_ENDPOINT"] = hub.url
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubServer:
    """A hub between ``__enter__`` and ``__exit__``; ``requests`` are the lines that it was asked."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.break_after: int | None = None
        """Send so many bytes of a file, then break the connection."""

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self, kind: str, name: str, files: dict[str, bytes] | Path, *, branch: str = "main", gated: bool = False
    ) -> str:
        """Put a commit on a branch, and return it."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos.setdefault((kind, name), Repo(kind, name))
        repo.gated = gated
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
        commit = hashlib.sha1(f"{name} {content}".encode()).hexdigest()
        repo.commits[commit] = files
        repo.branches[branch] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            self._api(parts[1].removesuffix("s"), parts[2:], query)
        elif "resolve" in parts:
            kind = "dataset" if parts[0] == "datasets" else "model"
            at = parts.index("resolve")
            name = "/".join(parts[1:at] if kind == "dataset" else parts[:at])
            self._file(kind, name, parts[at + 1], "/".join(parts[at + 2 :]))
        else:
            self._error(404, "EntryNotFound")

    def _api(self, kind: str, parts: list[str], query: dict[str, str]) -> None:
        if not parts:
            names = [name for (k, name) in self.hub.repos if k == kind]
            names = [name for name in names if name.startswith(query.get("author", ""))]
            names = [name for name in names if query.get("search", "") in name]
            self._json([{"id": name, "modelId": name} for name in names])
            return
        repo = self.hub.repos.get((kind, "/".join(parts[:2])))
        if repo is None:
            self._error(404, "RepoNotFound")
            return
        what = parts[2] if len(parts) > 2 else "revision"
        if what == "refs":
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
            self._json({"branches": branches, "tags": [], "converts": []})
            return
        commit = repo.commit(parts[3] if len(parts) > 3 else "main")
        if commit is None:
            self._error(404, "RevisionNotFound")
            return
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            more = {"private": False, "gated": repo.gated and "auto", "disabled": False, "tags": [], "downloads": 0}
            self._json({"_id": "1", "id": repo.name, "modelId": repo.name, "sha": commit, "siblings": siblings, **more})
        elif what == "tree":
            under = "/".join(parts[4:])
            found = [path for path in files if not under or path.startswith(f"{under}/")]
            folders = {"/".join(path.split("/")[:i]) for path in found for i in range(1, path.count("/") + 1)}
            listed = [_file_info(path, files[path]) for path in found]
            listed += [
                {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders - {under}
            ]
            if query.get("recursive", "false").lower() not in ("true", "1"):
                depth = under.count("/") + 1 if under else 0
                listed = [item for item in listed if item["path"].count("/") == depth]
            if under and not found:
                self._error(404, "EntryNotFound")
                return
            self._json(listed)
        elif what == "paths-info":
            wanted = json.loads(self._body) if self._body[:1] == b"{" else parse_qs(self._body.decode())
            infos = []
            for path in wanted["paths"]:
                if path in files:
                    infos.append(_file_info(path, files[path]))
                elif any(name.startswith(f"{path}/") for name in files):
                    infos.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
            self._json(infos)
        else:
            self._error(404, "EntryNotFound")

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get((kind, name))
        commit = repo.commit(revision) if repo else None
        if repo is None or commit is None:
            self._error(404, "RepoNotFound" if repo is None else "RevisionNotFound")
            return
        if repo.gated and not self.headers.get("Authorization"):
            self._error(403, "GatedRepo")
            return
        data = repo.commits[commit].get(path)
        if data is None:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        start, code = 0, 200
        if (wanted := self.headers.get("Range")) and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, code = int(first or 0), 206
            part = data[start : int(last) + 1 if last else None]
        else:
            part = data
        self.send_response(code)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.break_after
        if limit is not None and len(part) > limit:
            self.wfile.write(part[:limit])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(part)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        body = b"" if self.command == "HEAD" else json.dumps({"error": code}).encode()
        self.send_response(status)
        for name, value in ({"X-Error-Code": code, "X-Error-Message": code} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _file_info(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
