"""A stand-in of the Hugging Face hub on loopback: repositories, pre-uploads, LFS and commits, kept in memory."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

READER, WRITER = "hf_reader", "hf_writer"
"""Tokens: one may read, the other may write."""


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Of LFS, by SHA-256."""
    requests: list[str] = field(default_factory=list)
    broken: str | None = None
    """Requests whose path this matches fail with status 503."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, content: object = None, error: str = "") -> None:
            data = json.dumps({"error": error} if error else {} if content is None else content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def handled(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if hub.broken and re.search(hub.broken, self.path):
                return self.answer(503, error="out of order")
            if self.path.startswith("/object/"):
                hub.objects[self.path.rpartition("/")[2]] = body
                return self.answer(200)
            if token not in (READER, WRITER):
                return self.answer(401, error="Invalid username or password.")
            if self.command == "POST" and token != WRITER:
                return self.answer(403, error="You don't have the rights to write.")
            return self.routed(body)

        def routed(self, body: bytes) -> None:
            name = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/|$)", self.path)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                id = f"{asked.get('organization') or 'me'}/{asked['name']}"
                status, private = (409 if id in hub.repositories else 200), asked.get("visibility") == "private"
                hub.repositories.setdefault(id, Repository(private))
                return self.answer(status, {"url": f"{hub.url}/{id}"})
            if self.path == "/api/validate-yaml":
                return self.answer(200)
            if name is None or (found := hub.repositories.get(name[1])) is None:
                return self.answer(404, error="Repository not found")
            return self.of_repository(name[1], found, body)

        def of_repository(self, id: str, found: Repository, body: bytes) -> None:
            if self.command == "GET":
                siblings = [{"rfilename": name} for name in [".gitattributes", *found.files]]
                return self.answer(200, {"id": id, "private": found.private, "siblings": siblings})
            if "/preupload/" in self.path:
                mode = {True: "lfs", False: "regular"}
                files = [
                    {"path": e["path"], "uploadMode": mode[e["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for e in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                for each in objects:
                    if each["oid"] not in hub.objects:
                        each["actions"] = {"upload": {"href": f"{hub.url}/object/{each['oid']}"}}
                return self.answer(200, {"transfer": "basic", "objects": objects})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    found.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    found.files[value["path"]] = hub.objects[value["oid"]]
            found.commits += 1
            return self.answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{hub.url}/{id}/commit/c"})

        do_GET = do_POST = do_PUT = handled

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
