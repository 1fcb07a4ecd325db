"""A stand-in for the Hugging Face hub on loopback: repositories in memory.

What it answers is what huggingface_hub asks for when a snapshot is fetched.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0" * 40


class StandIn(ThreadingHTTPServer):
    """The hub's state."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}  # ORG/NAME -> path -> bytes
        self.requests = []  # method and path, in order

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
        parts = place.strip("/").split("/")
        match self.command, parts:
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

    do_GET = do_HEAD = _serve

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

    def _about(self, name, rest):
        files = self.server.repositories[name]
        if rest and rest[0] == "tree":
            assert "recursive" in parse_qs(self.url.query)
            entries = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in files.items()
            ]
            return self._json(entries)
        siblings = [{"rfilename": path} for path in files]
        about = {
            "id": name,
            "modelId": name,
            "sha": SHA,
            "private": False,
        }
        return self._json({**about, "siblings": siblings, "tags": []})

    def _file(self, files, path):
        content = files.get(path)
        if content is None:
            return self._missing("EntryNotFound")
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        return self._end(content)
