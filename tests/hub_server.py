"""A hub on loopback: the part of its HTTP interface that uploading a model asks for."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"
TOKEN = "hf_plantedPlantedPlanted1234"


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": {".gitattributes": b""}}
    )
    commits: list[dict] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()


class Hub:
    """Accepts one token; `answers` replaces what a path that ends so would get."""

    def __init__(self, token: str, user: str = "me", role: str = "write") -> None:
        self.token, self.user, self.role = token, user, role
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, dict, str]] = {}
        self.warnings: list[str] = []
        self.everything_is_public = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[name].branches[branch]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def do_PUT(self) -> None:
                self._answer("PUT")

            def _answer(self, method: str) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path
                hub.asked.append(f"{method} {path}")
                status, headers, content = hub.respond(
                    method, path, body, self.headers.get("Authorization", "")
                )
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

        return Handler

    def respond(self, method: str, path: str, body: bytes, authorization: str):
        for ending, answer in self.answers.items():
            if path.endswith(ending):
                return answer
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "storage":  # large files go where no token is asked for
            self.large[parts[1]] = body
            return 200, {}, ""
        if authorization != f"Bearer {self.token}":
            return 401, {}, json.dumps({"error": f"Invalid credentials: {authorization}"})
        if parts[:2] == ["api", "whoami-v2"]:
            account = {"name": self.user, "auth": {"accessToken": {"role": self.role}}}
            return _json({"type": "user", **account})
        if parts[:2] == ["api", "validate-yaml"]:
            return _json({"warnings": [{"message": text} for text in self.warnings]})
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[-1] == "batch":
            return self._batch(json.loads(body))
        name = "/".join(parts[2:4])
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, "{}"
        return self._ask(self.repositories[name], name, parts[4:], body)

    def _create(self, wanted: dict):
        name = f"{wanted['organization'] or self.user}/{wanted['name']}"
        if name in self.repositories:
            return 409, {}, json.dumps({"error": "You already created this model repo"})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.repositories[name] = Repository(private and not self.everything_is_public)
        return _json({"url": f"{self.url}/{name}"})

    def _batch(self, wanted: dict):
        objects = []
        for entry in wanted["objects"]:
            upload = {"upload": {"href": f"{self.url}/storage/{entry['oid']}"}}
            there = entry["oid"] in self.large
            objects.append(entry if there else {**entry, "actions": upload})
        transfer = "xet" if "xet" in wanted["transfers"] else "basic"
        return _json({"transfer": transfer, "objects": objects})

    def _ask(self, repository: Repository, name: str, rest: list[str], body: bytes):
        action = rest[0] if rest else "revision"
        branch = rest[1] if len(rest) > 1 else "main"
        if action == "branch":
            repository.branches[branch] = dict(repository.branches["main"])
            return _json({})
        if branch not in repository.branches:
            return 404, {"X-Error-Code": "RevisionNotFound"}, "{}"
        files = repository.branches[branch]
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            facts = {"id": name, "private": repository.private, "siblings": siblings}
            return _json({**facts, "sha": repository.sha(branch)})
        if action == "tree":
            return _json(
                [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in files]
            )
        if action == "preupload":
            return _json({"files": [_mode(entry["path"]) for entry in json.loads(body)["files"]]})
        assert action == "commit", rest
        lines = [json.loads(line) for line in body.splitlines()]
        return self._commit(repository, name, branch, lines)

    def _commit(self, repository: Repository, name: str, branch: str, lines: list[dict]):
        files = repository.branches[branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value["parentCommit"] != repository.sha(branch):
                    return 412, {}, json.dumps({"error": "A commit has happened since"})
                repository.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        sha = repository.sha(branch)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha})


def _mode(path: str) -> dict:
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
        "shouldIgnore": False,
        "oid": None,
    }


def _json(content: object):
    return 200, {"Content-Type": "application/json"}, json.dumps(content)
