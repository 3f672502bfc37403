"""A stand-in of the Hugging Face hub on this machine, for the real client: no network is used.

It answers what `huggingface_hub` 2 asks when repositories are made, committed to, listed and
fetched from, and when collections are made; what was sent lies in `repos` and `collections`.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

Files = dict[str, bytes]


class Hub:
    """What lies on it.

    Attributes:
        repos: files of every commit, by `models/owner/name` or `datasets/owner/name`.
        private: repositories that were made private.
        collections: by slug: title, namespace, private and items.
        refuse: paths of requests that begin with one of these are refused as not allowed.
    """

    def __init__(self) -> None:
        self.repos: dict[str, list[Files]] = {}
        self.private: set[str] = set()
        self.collections: dict[str, dict[str, Any]] = {}
        self.refuse: tuple[str, ...] = ()

    def files(self, repo: str) -> Files:
        """Those of a repository's newest commit."""
        return self.repos[repo][-1]

    def at(self, repo: str, revision: str) -> tuple[str, Files]:
        """The name and the files of a commit: `main`, or what `sha` gives."""
        commits = self.repos[repo]
        place = len(commits) - 1 if revision == "main" else int(revision, 16)
        return sha(place), commits[place]


def sha(place: int) -> str:
    """The name of a repository's commit, counted from 0."""
    return f"{place:040x}"


def oid(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def handle_any(self) -> None:
        """Answer, or say that there is no such thing."""
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path.startswith(self.hub.refuse or ("\0",)):
            self.send(403, {"error": "not allowed"})
            return
        try:
            self.answer(path.removeprefix("/").split("/"))
        except LookupError as error:
            code = "RepoNotFound" if error.args and error.args[0] == "repo" else "EntryNotFound"
            self.send(404, {"error": code}, {"X-Error-Code": code})

    do_GET = do_POST = do_HEAD = handle_any

    def send(self, status: int, told: Any, headers: dict[str, str] | None = None) -> None:
        content = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self, parts: list[str]) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(self.body))
            case ["api", "validate-yaml"]:
                self.send(200, {"errors": [], "warnings": []})
            case ["api", "collections", *rest]:
                self.collection(rest)
            case ["api", "models" | "datasets" as kind, owner, name, *rest]:
                self.api(self.known(f"{kind}/{owner}/{name}"), rest or ["revision", "main"])
            case ["datasets", owner, name, "resolve", revision, *rest]:
                self.resolve(self.known(f"datasets/{owner}/{name}"), revision, "/".join(rest))
            case [owner, name, "resolve", revision, *rest]:
                self.resolve(self.known(f"models/{owner}/{name}"), revision, "/".join(rest))
            case _:
                raise LookupError(parts)

    def known(self, repo: str) -> str:
        if repo not in self.hub.repos:
            raise LookupError("repo")
        return repo

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        if status == 200:
            self.hub.repos[repo] = [{}]
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
        self.send(status, {"url": f"https://huggingface.co/{repo.removeprefix('models/')}"})

    def api(self, repo: str, rest: list[str]) -> None:
        match rest:
            case ["revision", revision]:
                name, files = self.hub.at(repo, revision)
                siblings = [{"rfilename": path, "size": len(c)} for path, c in files.items()]
                told = {"id": repo.split("/", 1)[1], "sha": name, "siblings": siblings}
                self.send(200, told | {"private": repo in self.hub.private, "tags": []})
            case ["tree", revision, *folder]:
                asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                recursive = asked.get("recursive", [""])[0].lower() == "true"
                self.send(200, self.tree(repo, revision, "/".join(folder), recursive))
            case ["paths-info", revision]:
                paths = urllib.parse.parse_qs(self.body.decode())["paths"]
                listed = self.tree(repo, revision, "", True)
                self.send(200, [each for each in listed if each["path"] in paths])
            case ["preupload", _]:
                asked_files = json.loads(self.body)["files"]
                told_files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in asked_files
                ]
                self.send(200, {"files": told_files})
            case ["commit", "main"]:
                self.commit(repo, [json.loads(line) for line in self.body.splitlines()])
            case _:
                raise LookupError(rest)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        assert len(added) == len(lines) - 1  # a header, and files alone
        self.hub.repos[repo].append(self.hub.files(repo) | added)
        name = sha(len(self.hub.repos[repo]) - 1)
        address = f"https://huggingface.co/{repo.removeprefix('models/')}/commit/{name}"
        self.send(200, {"commitUrl": address, "commitOid": name})

    def tree(self, repo: str, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        _, files = self.hub.at(repo, revision)
        start = f"{folder}/" if folder else ""
        inside = {path: c for path, c in files.items() if path.startswith(start)}
        if folder and not inside:
            raise LookupError(folder)
        found: dict[str, dict[str, Any]] = {}
        for path, content in inside.items():
            steps = path[len(start) :].split("/")
            for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                name = start + "/".join(steps[:depth])
                found[name] = {"type": "directory", "path": name, "oid": sha(0), "size": 0}
            if recursive or len(steps) == 1:
                told = {"path": path, "oid": oid(content), "size": len(content)}
                found[path] = {"type": "file", **told}
        return list(found.values())

    def resolve(self, repo: str, revision: str, path: str) -> None:
        name, files = self.hub.at(repo, revision)
        headers = {"X-Repo-Commit": name, "ETag": f'"{oid(files[path])}"'}
        self.send(200, files[path], headers)

    def collection(self, rest: list[str]) -> None:
        collections = self.hub.collections
        if not rest:
            asked = json.loads(self.body)
            title = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower())
            slug = f"{asked['namespace']}/{title}-1"
            status = 409 if slug in collections else 200
            if status == 200:
                collections[slug] = {**asked, "items": []}
            self.send(status, self.told(slug))
            return
        slug = "/".join(rest[:2])
        if rest[2:] == ["items"]:
            item = json.loads(self.body)["item"]
            if item in collections[slug]["items"]:
                self.send(409, {"error": "there already"})
                return
            collections[slug]["items"].append(item)
        self.send(200, self.told(slug))

    def told(self, slug: str) -> dict[str, Any]:
        found = self.hub.collections[slug]
        owner = {"name": found["namespace"]}
        told = {"slug": slug, "title": found["title"], "owner": owner, "items": [], "position": 0}
        told |= {"theme": "blue", "upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        return told | {"private": found["private"], "isUpvotedByUser": False}


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """A hub that the client talks to inside of the block, with a cache of its own."""
    hub = Hub()
    handler = type("Handling", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
