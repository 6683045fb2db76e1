"""A server that speaks as much of the Hub's protocol as the real client needs to create, push, list and load."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """What the server holds.

    Attributes:
        repos: Repository id -> path -> content.
        private: Repository id -> whether it was made a private one.
        commits: (repository id, summary) of each commit.
        failing: Commits to answer with an error, before any is taken.
        tokens: The authorisations that came.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str]] = []
        self.failing = 0
        self.tokens: set[str] = set()


def revision(files):
    """A commit id: 40 hexadecimal digits that change with the content."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + content)
    return digest.hexdigest()


@contextmanager
def serve():
    """Runs a server; gives its address and its `Hub`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, body=None, status=200, headers=(), content=None):
            data = content if content is not None else json.dumps(body if body is not None else {}).encode()
            self.send_response(status)
            for name, value in (("Content-Length", str(len(data))), *headers):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self):
            path = urlsplit(self.path).path.strip("/").split("/")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization", ""))
            if path[:3] == ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                answer = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
                if name in hub.repos:
                    return self.answer(answer, 409)
                hub.repos[name] = {}
                hub.private[name] = wanted.get("private", wanted.get("visibility") == "private")
                return self.answer(answer)
            if path == ["api", "validate-yaml"]:
                return self.answer({"errors": [], "warnings": []})
            name = "/".join(path[2:4])
            if path[4] == "preupload":
                files = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                return self.answer({"files": [{"path": f["path"], **regular} for f in files]})
            assert path[4] == "commit", path
            if hub.failing:
                hub.failing -= 1
                return self.answer({"error": "the disk of the Hub is full"}, 507)
            files = dict(hub.repos[name])
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    hub.commits.append((name, value["summary"]))
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key in ("deletedFile", "deletedFolder"):
                    files = {p: c for p, c in files.items() if not p.startswith(value["path"])}
            hub.repos[name] = files
            oid = revision(files)
            url = f"http://{self.headers['Host']}/{name}/commit/{oid}"
            return self.answer({"commitUrl": url, "commitOid": oid, "success": True})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).strip("/").split("/")
            if path[:2] == ["api", "models"]:
                name, rest = "/".join(path[2:4]), path[4:]
                if name not in hub.repos:
                    return self.answer({"error": "no such repository"}, 404, [("X-Error-Code", "RepoNotFound")])
                files = hub.repos[name]
                if rest[:1] == ["tree"]:
                    folder = "/".join(rest[2:])
                    inside = {p: c for p, c in files.items() if p.startswith(folder)}
                    oids = {p: hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest() for p, c in inside.items()}
                    return self.answer(
                        [{"type": "file", "path": p, "size": len(c), "oid": oids[p]} for p, c in inside.items()]
                    )
                siblings = [{"rfilename": p} for p in files]
                info = {"id": name, "sha": revision(files), "siblings": siblings, "private": hub.private[name]}
                return self.answer(info)
            name, file = "/".join(path[:2]), "/".join(path[4:])
            files = hub.repos.get(name, {})
            if path[2:3] != ["resolve"] or file not in files:
                return self.answer({"error": "no such file"}, 404, [("X-Error-Code", "EntryNotFound")])
            content = files[file]
            tag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            headers = [("X-Repo-Commit", revision(files)), ("ETag", f'"{tag}"')]
            return self.answer(content=content, headers=headers)

        do_HEAD = do_GET  # noqa: N815  # as http.server calls it

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
