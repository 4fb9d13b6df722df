"""A hub on this machine that speaks the protocols of HuggingFace and of ModelScope to their own libraries.

Only what `huggingface_hub` and `modelscope_hub` ask when a model is looked up, downloaded or uploaded:
https://huggingface.co/docs/hub/api and the requests of modelscope_hub 0.5. Everything is in memory.
"""

import base64
import hashlib
import importlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants

TOKEN, READ_TOKEN = "hub-token-that-may-write", "hub-token-that-may-read"
LARGE = 20_000  # bytes from which a file goes the way of large files


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of commits

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds and was asked.

    cut_after: bytes after which the connection of the next download of a large file breaks. refuses: whatever
    is asked is denied; with `refuses_later` after that break. refused_commits: how many are denied from now.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # "GET /path", with the range that was wanted
    cut_after: int | None = None
    refuses: bool = False
    refuses_later: bool = False
    refused_commits: int = 0
    address: str = ""

    def start(self) -> Callable[[], None]:
        """Serves from a thread until what is returned is called."""
        hub = self

        class Handler(Requests):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

        def stop() -> None:
            server.shutdown()
            server.server_close()

        return stop


class Requests(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def dispatch(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        wanted = self.headers.get("Range")
        self.hub.asked.append(f"{self.command} {unquote(self.path)}" + (f" {wanted}" if wanted else ""))
        denied = "commit" in self.path and self.hub.refused_commits > 0
        self.hub.refused_commits -= denied
        if self.hub.refuses or denied:
            return self.answer(
                403, {"error": "no", "Message": "no"}
            )  # 5xx would be asked again for half a minute
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {unquote(parts.path)}")
            if found:
                method(self, **found.groupdict())
                return None
        return self.answer(404, {"error": f"no route for {self.path}"})

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may(self, *, write: bool) -> bool:
        """Answers 401 or 403 itself where the token does not allow it."""
        if self.token not in (TOKEN, READ_TOKEN):
            self.answer(
                401, {"error": "Invalid username or password.", "Code": 10010, "Message": "bad token"}
            )
        elif write and self.token != TOKEN:
            self.answer(403, {"error": "You don't have the rights", "Message": "no rights", "Code": 10013})
        else:
            return True
        return False

    def find(self, name: str) -> Repository | None:
        """The repository; answers 404 itself where there is none, or none that the token may see."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token not in (TOKEN, READ_TOKEN)):
            self.answer(404, {"error": "not found", "Code": 10010205001}, X_Error_Code="RepoNotFound")
            return None
        if found.gated:
            self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
            return None
        return found

    def send_file(self, content: bytes, **headers: str) -> None:
        """The file or the range of it that is wanted; half of it where the hub is to break."""
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        end = len(content)
        if wanted:
            start, status = int(wanted[1]), 206
            end = int(wanted[2]) + 1 if wanted[2] else end
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        part = content[start:end]
        cut = self.hub.cut_after
        if self.command == "GET" and cut is not None and len(content) >= LARGE:
            self.hub.cut_after, self.hub.refuses = None, self.hub.refuses_later
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[:cut])
            self.wfile.flush()
            self.close_connection = True
            return
        self.answer(status, part, **headers)

    # --- HuggingFace

    def hf_user(self) -> None:
        if self.may(write=False):
            self.answer(200, {"name": "ann", "type": "user", "auth": {}})

    def hf_create(self) -> None:
        if not self.may(write=True):
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"  # of 1.x and of 2.x
        self.hub.repositories[name] = Repository(private=private)
        return self.answer(200, url)

    def hf_card(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def hf_info(self, name: str, revision: str | None = None) -> None:
        found = self.find(name)
        if found and revision not in (None, "main", found.commit):
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        if found:
            siblings = [{"rfilename": path} for path in found.files]
            about = {"id": name, "modelId": name, "sha": found.commit, "siblings": siblings}
            self.answer(200, {**about, "private": found.private, "tags": [], "downloads": 0, "likes": 0})
        return None

    def hf_tree(self, name: str, revision: str) -> None:
        found = self.find(name)
        if found:
            self.answer(200, [self.hf_entry(path, content) for path, content in found.files.items()])

    def hf_entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def hf_modes(self, name: str) -> None:
        if self.may(write=True) and self.find(name):
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self.answer(200, {"files": modes})

    def lfs_batch(self, name: str) -> None:
        if self.may(write=True) and self.find(name):
            asked = json.loads(self.body)["objects"]
            objects = [{**o, **self.upload_action(o["oid"])} for o in asked]
            self.answer(
                200, {"transfer": "basic", "objects": objects, "Code": 200, "Data": {"objects": objects}}
            )

    def upload_action(self, oid: str) -> dict[str, Any]:
        if oid in self.hub.blobs:
            return {}
        return {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{oid}", "header": {}}}}

    def lfs_put(self, oid: str) -> None:
        assert sha256(self.body) == oid
        self.hub.blobs[oid] = self.body
        self.answer(200, {"Code": 200})

    def hf_commit(self, name: str) -> None:
        found = self.may(write=True) and self.find(name)
        if not found:
            return
        for line in self.body.decode().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                found.messages.append(value["summary"])
            elif step["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.blobs[value["oid"]]
        url = f"{self.hub.address}/{name}/commit/{found.commit}"
        self.answer(200, {"success": True, "commitOid": found.commit, "commitUrl": url})

    def hf_file(self, name: str, path: str) -> None:
        found = self.find(name)
        if not found:
            return None
        if path not in found.files:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        content = found.files[path]
        tag = sha256(content) if len(content) >= LARGE else git_hash(content)
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": found.commit, "Accept_Ranges": "bytes"}
        return self.send_file(content, **headers)

    # --- ModelScope

    def ms_root(self) -> None:
        self.answer(200, {})

    def ms_user(self) -> None:
        if self.may(write=False):
            self.answer(200, {"success": True, "data": {"username": "ann", "email": "ann@example.org"}})

    def ms_info(self, name: str) -> None:
        found = self.find(name)
        if found:
            owner, _, own = name.partition("/")
            about = {
                "Path": owner,
                "Name": own,
                "Visibility": 1 if found.private else 5,
                "Revision": "master",
            }
            self.answer(200, {"Code": 200, "Success": True, "Data": about, "success": True, "data": about})

    def ms_revisions(self, name: str) -> None:
        if self.find(name):
            heads = {"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}}
            self.answer(200, {"Code": 200, "Success": True, "Data": heads})

    def ms_create(self) -> None:
        if not self.may(write=True):
            return None
        asked = json.loads(self.body)
        name = f"{asked['Path']}/{asked['Name']}"
        if name in self.hub.repositories:
            return self.answer(400, {"Code": 10010, "Success": False, "Message": "model already exists"})
        self.hub.repositories[name] = Repository(private=asked["Visibility"] == 1)
        return self.answer(200, {"Code": 200, "Success": True, "Data": asked})

    def ms_files(self, name: str) -> None:
        found = self.find(name)
        if found:
            files = [
                {"Path": path, "Name": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)}
                for path, content in found.files.items()
            ]
            self.answer(200, {"Code": 200, "Success": True, "Data": {"Files": files}})

    def ms_file(self, name: str) -> None:
        found = self.find(name)
        if found:
            self.send_file(found.files[self.query["FilePath"]], Accept_Ranges="bytes")

    def ms_commit(self, name: str) -> None:
        found = self.may(write=True) and self.find(name)
        if not found:
            return
        asked = json.loads(self.body)
        found.messages.append(asked["commit_message"])
        for step in asked["actions"]:
            content = base64.b64decode(step["content"]) if step["type"] == "normal" else None
            found.files[step["path"]] = self.hub.blobs[step["sha256"]] if content is None else content
        self.answer(200, {"Code": 200, "Success": True, "Data": {"oid": found.commit}})


def read_environment(rank: int) -> None:
    """The variables of HuggingFace's library anew, in a process that was forked after they were read."""
    importlib.reload(huggingface_hub.constants)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"GET /api/whoami-v2", Requests.hf_user),
    (r"POST /api/repos/create", Requests.hf_create),
    (r"POST /api/validate-yaml", Requests.hf_card),
    (rf"GET /api/models/{_NAME}", Requests.hf_info),
    (rf"GET /api/models/{_NAME}/revision/(?P<revision>.+)", Requests.hf_info),
    (rf"GET /api/models/{_NAME}/tree/(?P<revision>.+)", Requests.hf_tree),
    (rf"POST /api/models/{_NAME}/preupload/main", Requests.hf_modes),
    (rf"POST /api/models/{_NAME}/commit/main", Requests.hf_commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Requests.lfs_batch),
    (rf"(?:HEAD|GET) /{_NAME}/resolve/[^/]+/(?P<path>.+)", Requests.hf_file),
    (r"PUT /lfs/(?P<oid>\w+)", Requests.lfs_put),
    (r"GET /", Requests.ms_root),
    (r"GET /openapi/v1/users/me", Requests.ms_user),
    (rf"GET /(?:openapi/v1|api/v1)/models/{_NAME}", Requests.ms_info),
    (rf"GET /api/v1/models/{_NAME}/revisions", Requests.ms_revisions),
    (r"POST /api/v1/models", Requests.ms_create),
    (rf"GET /api/v1/models/{_NAME}/repo/files", Requests.ms_files),
    (rf"GET /api/v1/datasets/{_NAME}/repo/tree", Requests.ms_files),
    (rf"(?:HEAD|GET) /api/v1/(?:models|datasets)/{_NAME}/repo", Requests.ms_file),
    (rf"POST /api/v1/repos/models/{_NAME}/info/lfs/objects/batch", Requests.lfs_batch),
    (rf"POST /api/v1/repos/models/{_NAME}/commit/master", Requests.ms_commit),
)
