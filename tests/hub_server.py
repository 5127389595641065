"""A small Hub for tests: dataset and model repositories in memory, over HTTP on the loopback interface.

It answers what `huggingface_hub` asks for when one is pushed (create, branch, preupload, LFS batch, commit) and
read (revision info, tree, paths-info, resolve with ranges), and keeps a log of the requests. Point `HF_ENDPOINT` at it
in a process of its own (huggingface_hub reads it when it is imported), with `HF_HUB_DISABLE_XET=1`.

    python -m tests.hub_server        # to try pushing and loading by hand; it forgets all when it ends
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

LARGE = (".parquet", ".safetensors")
"""Endings of the files that are uploaded apart from the commit."""


class Hub(ThreadingHTTPServer):
    """The server and what it holds.

    Attributes:
        commits: files of every commit, by repository and commit.
        branches: commit of each branch, by repository.
        private: names of the private repositories.
        objects: content of large files by sha256.
        log: method, path and, if any, range of every request, in order.
        upload_failures: so many uploads of large files are refused from now on.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.objects: Files = {}
        self.log: list[str] = []
        self.upload_failures = 0

    @property
    def url(self) -> str:
        """Address to give as HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, name: str, visibility: str = "public") -> None:
        """Make an empty repository."""
        self.commits[name], self.branches[name] = {}, {}
        self.commit(name, "main", {".gitattributes": b"*.parquet filter=lfs\n"})
        if visibility == "private":
            self.private.add(name)

    def commit(self, name: str, branch: str, files: Files) -> str:
        """Add a commit that holds exactly these files."""
        parent = self.branches[name].get(branch, "")
        content = parent + repr(sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items()))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name][oid], self.branches[name][branch] = files, oid
        return oid

    def files(self, name: str, revision: str = "main") -> Files:
        """Files of a branch or commit."""
        return self.commits[name][self.branches[name].get(revision, revision)]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers as long as the block lasts."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", "branch"),
        ("POST", r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_upload"),
        ("POST", r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("GET", r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", "info"),
        ("GET", r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?(?P<path>.*)", "tree"),
        ("POST", r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>.+)", "paths_info"),
        ("GET|HEAD", r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        asked_range = self.headers.get("Range", "")
        self.server.log.append(f"{self.command} {unquote(url.path)} {asked_range}".strip())
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in method.split("|"):
                found = {key: unquote(value or "") for key, value in match.groupdict().items()}
                if "repo" in found and found["repo"] not in self.server.commits:
                    return self.refuse(404, "RepoNotFound", "Repository not found")
                if found.get("revision") and name != "branch":
                    branches = self.server.branches[found["repo"]]
                    if (
                        found["revision"] not in branches
                        and found["revision"] not in self.server.commits[found["repo"]]
                    ):
                        return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {found['revision']}")
                return getattr(self, name)(**found)
        return self.refuse(404, "", f"no such route: {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.commits
        if not known:
            self.server.create(name, asked.get("visibility", "public"))
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        self.answer({"url": f"{self.server.url}/{kind}{name}", "name": name}, 409 if known else 200)

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def branch(self, repo: str, revision: str) -> None:
        branches = self.server.branches[repo]
        known = revision in branches
        branches.setdefault(revision, branches["main"])
        self.answer({}, 409 if known else 200)

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = {True: "lfs", False: "regular"}
        self.answer(
            {
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(LARGE)], "shouldIgnore": False}
                    for f in files
                ]
            }
        )

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append({**asked, **({} if asked["oid"] in self.server.objects else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.server.upload_failures:
            self.server.upload_failures -= 1
            return self.refuse(400, "", "upload refused by the test")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "", "sha256 differs")
        self.server.objects[oid] = self.body
        return self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        files = dict(self.server.files(repo, revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.commit(repo, revision, files)
        self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/datasets/{repo}/commit/{oid}"}
        )

    def info(self, repo: str, revision: str) -> None:
        sha = self.server.branches[repo].get(revision or "main", revision)
        files = self.server.files(repo, sha)
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = repo in self.server.private
        about = {"id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": [], "downloads": 0}
        self.answer(about | {"likes": 0, "disabled": False, "gated": False, "author": repo.split("/")[0]})

    def tree(self, repo: str, revision: str, path: str) -> None:
        files = self.server.files(repo, revision)
        prefix = f"{path.rstrip('/')}/" if path else ""
        below = {name: content for name, content in files.items() if name.startswith(prefix)}
        if path and not below:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for name, content in sorted(below.items()):
            folders = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(folders) + 1 if recursive else min(2, len(folders) + 1)):
                folder = prefix + "/".join(folders[:depth])
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40})
            if recursive or not folders:
                entries[name] = _described(name, content)
        return self.answer(list(entries.values()))

    def paths_info(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body) if self.body[:1] == b"{" else parse_qs(self.body.decode())
        files = self.server.files(repo, revision)
        entries = []
        for path in asked["paths"]:
            if path in files:
                entries.append(_described(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40})
        self.answer(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        files = self.server.files(repo, revision)
        if path not in files:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist")
        content, status, headers = files[path], 200, {"Accept-Ranges": "bytes"}
        commit = self.server.branches[repo].get(revision, revision)
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            if start >= len(content):
                return self.refuse(416, "", "range beyond the end")
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[start : end + 1], 206
        return self.answer(content, status, headers)

    def log_message(self, *_: Any) -> None:
        """Say nothing on the terminal."""


def _described(path: str, content: bytes) -> dict[str, Any]:
    """Entry of a file in the answers."""
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


if __name__ == "__main__":
    with running_hub() as started:
        print(
            f"export HF_ENDPOINT={started.url} HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0 HF_TOKEN=hf_anything", flush=True
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
