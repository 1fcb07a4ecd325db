"""A stand-in for the Hugging Face hub on loopback: repositories in memory, commits,
downloads.

What it answers is what huggingface_hub asks for when a folder is uploaded and when a
snapshot is fetched.
"""

import base64
import hashlib
import json
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "a" * 34
LICENSES_WITHOUT_NAME = {"mit", "apache-2.0", "cc-by-4.0"}


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self):
        return hashlib.sha1(
            repr((self.commits, sorted(self.files))).encode()
        ).hexdigest()


class StandIn(ThreadingHTTPServer):
    """The hub's state."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}  # by ORG/NAME
        self.requests = []  # method and path, in order
        # start of "METHOD PATH" -> status to answer with, or "break" to break off in
        # the middle
        self.failures = {}

    def handle_error(self, *_):
        """Silent: some tests break off."""


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Silent."""

    def _serve(self):
        self.url = urlsplit(self.path)
        place = unquote(self.url.path)
        self.server.requests.append(f"{self.command} {place}")
        for start, failure in self.server.failures.items():
            if f"{self.command} {place}".startswith(start):
                if failure == "break":
                    self.rfile.read(1)
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return None
                self._body()
                return self._json({"error": "the stand-in fails"}, int(failure))
        body = self._body()
        parts = place.strip("/").split("/")
        if (
            self.command == "POST"
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self._json({"error": "Invalid username or password."}, 401)
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"])
            case "POST", ["api", "models", org, name, "preupload", "main"]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                return self._json({"files": [{"path": path, **how} for path in paths]})
            case "POST", ["api", "models", org, name, "commit", "main"]:
                return self._commit(f"{org}/{name}", body)
            case "GET", ["api", "models", org, name, *rest] if (
                f"{org}/{name}" in self.server.repositories
            ):
                return self._about(f"{org}/{name}", rest)
            case "GET" | "HEAD", [org, name, "resolve", _, *file] if (
                f"{org}/{name}" in self.server.repositories
            ):
                return self._file(
                    self.server.repositories[f"{org}/{name}"], "/".join(file)
                )
            case "HEAD", [""]:
                return self._json({})
        return self._missing("RepoNotFound")

    do_GET = do_HEAD = do_POST = _serve

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(content).encode())

    def _missing(self, what):
        self.send_response(404)
        self.send_header("X-Error-Code", what)
        self._end(b"{}")

    def _end(self, body):
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self, request):
        name = f"{request['organization']}/{request['name']}"
        private = bool(request.get("private") or request.get("visibility") == "private")
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository(private))
        self._json(
            {"url": f"{self.server.address}/{name}", "name": name, "id": "1"},
            409 if known else 200,
        )

    def _validate(self, card):
        """As the hub does: metadata that are YAML, with values that it knows."""
        metadata = yaml.safe_load(card.split("---")[1])
        good = metadata.get("license") in LICENSES_WITHOUT_NAME and isinstance(
            metadata["tags"], list
        )
        good = good and metadata.get("pipeline_tag") == "zero-shot-image-classification"
        errors = [] if good else [{"message": "a value that the hub does not know"}]
        self._json({"errors": errors, "warnings": []}, 200 if good else 400)

    def _commit(self, name, body):
        repository = self.server.repositories[name]
        for step in map(json.loads, body.decode().splitlines()):
            kind, value = step["key"], step["value"]
            if kind == "header":
                repository.commits.append(value["summary"])
            elif kind == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "deletedFile":
                del repository.files[value["path"]]
        url = f"{self.server.address}/{name}/commit/{repository.sha}"
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": url})

    def _about(self, name, rest):
        repository = self.server.repositories[name]
        if rest and rest[0] == "tree":
            assert "recursive" in parse_qs(self.url.query)
            entries = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in repository.files.items()
            ]
            return self._json(entries)
        siblings = [{"rfilename": path} for path in repository.files]
        about = {
            "id": name,
            "modelId": name,
            "sha": repository.sha,
            "private": repository.private,
        }
        return self._json({**about, "siblings": siblings, "tags": []})

    def _file(self, repository, path):
        content = repository.files.get(path)
        if content is None:
            return self._missing("EntryNotFound")
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.sha)
        return self._end(content)
