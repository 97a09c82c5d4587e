"""A Hub on this machine, for rehearsing a publication, for air-gapped use and for tests.

The real clients take it for the Hugging Face Hub: set HF_ENDPOINT to its address. Models,
datasets and Spaces are bare git repositories, large files lie beside them by their sha256.

It answers on loopback only. It leaves out: Xet transfer (set HF_HUB_DISABLE_XET=1), search,
pages to look at, merging of pull requests, discussions, collections, likes, webhooks, gated
repositories, running Spaces and jobs, and serving `git clone`.
"""

import argparse
import base64
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".onnx", ".png", ".jpg", ".zip")
LFS_SIZE = 10 * 2**20  # what is larger goes to LFS whatever its name
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
POINTER_PATTERN = re.compile(rb"version https://git-lfs\S+\noid sha256:([0-9a-f]{64})\nsize (\d+)")
PAGE = 1000
GIT_ENVIRONMENT = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull}


class Problem(Exception):
    """An answer other than success, in the form the clients understand."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra):
        self.status, self.message, self.code, self.extra = status, message, code, extra


class Repo:
    """One bare git repository, with the Hub's own facts in `hub.json` beside its objects."""

    locks: dict[Path, threading.Lock] = {}  # noqa: RUF012  one commit at a time in each

    def __init__(self, root: Path, kind: str, name: str):
        self.root, self.kind, self.name = root, kind, name
        self.path = root / kind / f"{name}.git"
        self.lock = self.locks.setdefault(self.path, threading.Lock())

    def git(self, *arguments: str, input: bytes | None = None) -> bytes:
        command = ["git", "--literal-pathspecs", "--git-dir", str(self.path), *arguments]
        done = subprocess.run(command, input=input, capture_output=True, env=GIT_ENVIRONMENT)
        if done.returncode:
            raise Problem(400, done.stderr.decode(errors="replace").strip() or "git refused it")
        return done.stdout

    @property
    def facts(self) -> dict:
        return json.loads((self.path / "hub.json").read_text())

    def save_facts(self, facts: dict) -> None:
        (self.path / "hub.json").write_text(json.dumps(facts))

    def create(self, facts: dict) -> None:
        """Make it, with a first commit that says which files are large, as the Hub does."""
        self.path.mkdir(parents=True)
        self.git("init", "--bare", "--quiet", "--initial-branch=main")
        self.save_facts(facts)
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
        self.commit(
            "refs/heads/main", None, "initial commit", "hub", {".gitattributes": attributes}
        )

    def revision(self, name: str) -> str:
        """The commit that a branch, tag, `refs/pr/N` or hash stands for."""
        try:
            found = self.git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
        except Problem:
            raise Problem(404, f"Invalid rev id: {name}", "RevisionNotFound") from None
        return found.decode().strip()

    def tree(self, commit: str, path: str = "", recursive: bool = True) -> list[dict]:
        """The entries below a folder, or the one file of that name; each as the API gives it."""
        arguments = ["ls-tree", "-z", "-l", *(["-r", "-t"] if recursive else []), commit]
        listing = self.git(*arguments, *(["--", path] if path else []))
        if path and not recursive and listing.split()[1:2] == [b"tree"]:
            listing = self.git(*arguments, "--", path + "/")
        entries = []
        for line in listing.decode().split("\0")[:-1]:
            (_, kind, oid, size), name = line.split("\t")[0].split(), line.split("\t", 1)[1]
            if kind == "tree":
                entries.append({"type": "directory", "oid": oid, "size": 0, "path": name})
                continue
            entry = {"type": "file", "oid": oid, "size": int(size), "path": name}
            pointer = 120 < int(size) < 150 and POINTER_PATTERN.match(
                self.git("cat-file", "blob", oid)
            )
            if pointer:
                large = {"oid": pointer[1].decode(), "size": int(pointer[2])}
                entry |= {"size": large["size"], "lfs": large | {"pointerSize": int(size)}}
            entries.append(entry)
        return entries

    def files(self, commit: str) -> dict[str, dict]:
        return {e["path"]: e for e in self.tree(commit) if e["type"] == "file"}

    def commit(
        self,
        ref: str,
        parent: str | None,
        message: str,
        author: str,
        changes: dict[str, str | None],
    ) -> str:
        """Write files (None removes one, or a folder) as one commit on top of `parent`."""
        stream = [f"commit {ref}\ncommitter {author} <{author}@localhost> {int(time.time())} +0000"]
        stream += [_data(message), f"from {parent}"] if parent else [_data(message)]
        for path, content in changes.items():
            quoted = '"' + re.sub(r'(["\\])', r"\\\1", path).replace("\n", r"\n") + '"'
            if content is None:
                stream.append(f"D {quoted}")
            else:
                stream += [f"M 100644 inline {quoted}", _data(content)]
        stream = "\n".join(stream).encode("utf-8", "surrogateescape") + b"\n"
        self.git("fast-import", "--quiet", "--date-format=raw-permissive", input=stream)
        return self.revision(ref)

    def large_file(self, oid: str) -> Path:
        return self.root / "lfs" / oid[:2] / oid

    def add_folder(self, folder: Path) -> None:
        """Commit a whole folder, for seeding."""
        changes = {}
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            path = file.relative_to(folder).as_posix()
            if _goes_to_lfs(path, file.stat().st_size):
                with open(file, "rb") as opened:
                    oid = hashlib.file_digest(opened, "sha256").hexdigest()
                self.large_file(oid).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.large_file(oid))
                changes[path] = POINTER.format(oid=oid, size=file.stat().st_size)
            else:
                changes[path] = file.read_bytes().decode("utf-8", "surrogateescape")
        self.commit("refs/heads/main", self.revision("main"), f"Add {folder.name}", "hub", changes)


ROUTES = []
REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+?)"


def route(method: str, pattern: str, write: bool = False):
    def add(function):
        ROUTES.append((method, re.compile(pattern), write, function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    """One connection. The tests subclass it to fail on purpose."""

    protocol_version = "HTTP/1.1"
    server: "LocalHub"

    def answer(self) -> None:
        self.url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(self.url.query).items()}
        self.incoming = self._incoming()
        try:
            reply = self._dispatch()
        except Problem as problem:
            headers = {"X-Error-Message": problem.message.replace("\n", " "), **problem.extra}
            if problem.code:
                headers["X-Error-Code"] = problem.code
            body = {"error": problem.message} | problem.extra.pop("body", {})
            headers.pop("body", None)
            reply = (problem.status, headers, json.dumps(body).encode())
        for _ in self.incoming:  # what is left of the request, so that the next one can follow
            pass
        self._send(*reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def json(self) -> dict:
        return json.loads(b"".join(self.incoming) or b"{}")

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _dispatch(self):
        self.user = self._user()
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, write, function in ROUTES:
            match = pattern.fullmatch(self.url.path)  # still quoted: a revision may hold slashes
            if not match or verb != method:
                continue
            found = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
            if "name" in match.groupdict():
                found["repo"] = self._repo(found.pop("kind", "models"), found.pop("name"), write)
            reply = function(self, **found)
            return reply if isinstance(reply, tuple) else (200, {}, json.dumps(reply).encode())
        raise Problem(404, f"The local Hub has no {self.command} {self.url.path}")

    def _user(self) -> dict | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.server.tokens:
            raise Problem(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def _repo(self, kind: str, name: str, write: bool) -> Repo:
        repo = Repo(self.server.root, kind, name)
        owner = name.split("/")[0]
        if ".." in name or not repo.path.is_dir():
            raise Problem(404, "Repository not found", "RepoNotFound")
        mine = self.user is not None and owner in (self.user["name"], *self.user["orgs"])
        if repo.facts["private"] and not mine:
            raise Problem(404, "Repository not found", "RepoNotFound")
        # Anybody who may write at all may propose a change.
        if write and not self.query.get("create_pr"):
            self.check_may_write(owner)
        return repo

    def check_may_write(self, owner: str) -> None:
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        if self.user["role"] == "read" or owner not in (self.user["name"], *self.user["orgs"]):
            raise Problem(403, f"You don't have the rights to write to {owner}'s repositories")

    def _incoming(self):
        """The request's body, piece by piece."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (piece := self.rfile.read(min(left, 2**20))):
            left -= len(piece)
            yield piece

    def _send(self, status: int, headers: dict, body: bytes | Path, start=0, size=None) -> None:
        """A body that is a Path is sent from that file, `size` bytes from `start`."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, bytes):
            self.wfile.write(body)
            return
        with open(body, "rb") as file:
            file.seek(start)
            while size and (piece := file.read(min(size, 2**20))):
                self.wfile.write(piece)
                size -= len(piece)

    def log_request(self, code="-", size="-"):
        if self.server.verbose:
            print(f"{self.command} {self.url.path} {code}", file=sys.stderr)


@route("GET", "/api/whoami-v2")
def whoami(request: Handler):
    if request.user is None:
        raise Problem(401, "Invalid username or password.")
    orgs = [{"name": org, "type": "org", "roleInOrg": "write"} for org in request.user["orgs"]]
    token = {"displayName": "local", "role": request.user["role"]}
    auth = {"type": "access_token", "accessToken": token}
    return {"type": "user", "name": request.user["name"], "orgs": orgs, "auth": auth}


@route("POST", "/api/repos/create")
def create_repo(request: Handler):
    asked = request.json()
    owner = asked.get("organization") or (request.user or {}).get("name")
    request.check_may_write(owner)
    name, kind = f"{owner}/{asked['name']}", asked.get("type", "model") + "s"
    known = kind in ("models", "datasets", "spaces")
    if not known or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise Problem(400, f"Invalid repository name: {name}")
    repo = Repo(request.server.root, kind, name)
    prefix = "" if kind == "models" else f"{kind}/"
    url = f"{request.address}/{prefix}{name}"
    with repo.lock:
        if repo.path.exists():
            raise Problem(409, "You already created this repo", body={"url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        facts = {"private": private, "sdk": asked.get("sdk")}
        repo.create(facts | {"variables": {v["key"]: v for v in asked.get("variables") or []}})
    return {"url": url, "name": name}


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Handler):
    asked = request.json()
    name = f"{asked.get('organization') or (request.user or {}).get('name')}/{asked['name']}"
    repo = request._repo(f"{asked.get('type') or 'model'}s", name, write=True)
    with repo.lock:
        shutil.rmtree(repo.path)
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Handler):
    """A part of the Hub's checks of a card: that it is a mapping, and its model-index."""
    errors = []
    header = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(header[1]) if header else {}
        for model in metadata.get("model-index") or []:
            for result in [model["name"]] and model["results"]:
                result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except (yaml.YAMLError, AttributeError) as error:
        errors.append(f"The metadata is not a YAML mapping: {error}")
    except (KeyError, TypeError) as error:
        errors.append(f"model-index is malformed: {error!r}")
    errors = [{"message": message} for message in errors]
    return (400 if errors else 200, {}, json.dumps({"errors": errors, "warnings": []}).encode())


@route("GET", f"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def repo_info(request: Handler, repo: Repo, revision: str = "main"):
    commit = repo.revision(revision)
    files = repo.files(commit)
    date = repo.git("log", "-1", "--format=%cI", commit).decode().strip()
    info = {"id": repo.name, "sha": commit, "lastModified": _utc(date), "tags": [], "siblings": []}
    for path, entry in files.items():
        large = entry.get("lfs")
        sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
        if large:
            pointer = {"size": large["size"], "sha256": large["oid"]}
            sibling["lfs"] = pointer | {"pointerSize": large["pointerSize"]}
        info["siblings"].append(sibling)
    card = _card_metadata(repo, files)
    facts = repo.facts
    return info | {
        "private": facts["private"],
        "cardData": card,
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "sdk": facts["sdk"],
        "runtime": _runtime(files) if repo.kind == "spaces" else None,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
    }


@route("GET", f"/api/{REPO}/auth-check")
def auth_check(request: Handler, repo: Repo):
    return {}


@route("GET", f"/api/{REPO}/auth-check/write", write=True)
def auth_check_write(request: Handler, repo: Repo):
    return {}


@route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(request: Handler, repo: Repo, revision: str, path: str = ""):
    commit = repo.revision(revision)
    recursive = request.query.get("recursive", "").lower() in ("1", "true")
    entries = repo.tree(commit, path, recursive)
    if path and not entries:
        raise Problem(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit})
    start = int(request.query.get("cursor", 0))
    headers, page = {}, entries[start : start + PAGE]
    if start + PAGE < len(entries):
        query = f"cursor={start + PAGE}&recursive={recursive}"
        headers["Link"] = f'<{request.address}{request.url.path}?{query}>; rel="next"'
    if request.query.get("expand", "").lower() in ("1", "true"):
        page = [e | {"lastCommit": _commits(repo, commit, e["path"], limit=1)[0]} for e in page]
    return 200, headers, json.dumps(page).encode()


@route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Handler, repo: Repo, revision: str):
    commit, body = repo.revision(revision), b"".join(request.incoming)
    asked = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else None
    paths = json.loads(body)["paths"] if asked is None else asked
    entries = {e["path"]: e for e in repo.tree(commit)}
    return [entries[p] for p in paths if p in entries]


@route("GET", f"/api/{REPO}/commits/(?P<revision>[^/]+)")
def commits(request: Handler, repo: Repo, revision: str):
    return _commits(repo, repo.revision(revision))


@route("GET", f"/api/{REPO}/refs")
def refs(request: Handler, repo: Repo):
    found = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    places = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    form = "%(refname) %(objectname)"
    for line in repo.git("for-each-ref", f"--format={form}").decode().splitlines():
        ref, commit = line.rsplit(" ", 1)
        _, place, name = ref.split("/", 2)
        found[places[place]].append({"name": name, "ref": ref, "targetCommit": commit})
    return found


@route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)", write=True)
def preupload(request: Handler, repo: Repo, revision: str):
    held = repo.files(repo.revision(revision))
    answers = []
    for file in request.json()["files"]:
        path, entry = file["path"], held.get(file["path"])
        mode = "lfs" if _goes_to_lfs(path, file["size"]) else "regular"
        oid = entry and (entry["lfs"]["oid"] if "lfs" in entry else entry["oid"])
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answers}


@route("POST", rf"{FILES}\.git/info/lfs/objects/batch")
def lfs_batch(request: Handler, repo: Repo):
    if request.user is None or request.user["role"] == "read":
        raise Problem(403, "This token can't upload")
    objects = []
    for item in request.json()["objects"]:
        oid, size = item["oid"], item["size"]
        if not repo.large_file(oid).exists():
            signed = f"{request.address}/lfs/{oid}?signature={request.server.signature(oid)}"
            verify = {"href": f"{request.address}/lfs/{oid}/verify", "header": {}}
            item = item | {"actions": {"upload": {"href": signed, "header": {}}, "verify": verify}}
        objects.append(item | {"oid": oid, "size": size})
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request: Handler, oid: str):
    signature = request.query.get("signature", "")
    if not hmac.compare_digest(signature, request.server.signature(oid)):
        raise Problem(403, "The address is not signed")
    target = request.server.root / "lfs" / oid[:2] / oid
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        for piece in request.incoming:
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != oid:
        os.unlink(file.name)
        raise Problem(400, "The content does not have the sha256 it was announced with")
    os.replace(file.name, target)
    return {}


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(request: Handler, oid: str):
    file = request.server.root / "lfs" / oid[:2] / oid
    if not file.exists() or file.stat().st_size != request.json()["size"]:
        raise Problem(400, f"No object {oid} of that size")
    return {}


@route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)", write=True)
def commit(request: Handler, repo: Repo, revision: str):
    if request.user is None or request.user["role"] == "read":
        raise Problem(403, "This token can't write")
    lines = [json.loads(line) for line in b"".join(request.incoming).splitlines()]
    header, changes = lines[0]["value"], {}
    for line in lines[1:]:
        value = line["value"]
        path = value["path"].rstrip("/")
        if line["key"] in ("deletedFile", "deletedFolder"):
            changes[path] = None
        elif line["key"] == "lfsFile":
            file = repo.large_file(value["oid"])
            if not file.exists():
                raise Problem(400, f"The LFS object of {path} was not uploaded")
            changes[path] = POINTER.format(oid=value["oid"], size=file.stat().st_size)
        else:
            content = base64.b64decode(value["content"])
            changes[path] = content.decode("utf-8", "surrogateescape")
    message = "\n\n".join(part for part in (header["summary"], header.get("description")) if part)
    with repo.lock:
        if not repo.path.exists():
            raise Problem(404, "Repository not found", "RepoNotFound")
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        parent = repo.revision(ref)
        if header.get("parentCommit") not in (None, parent):
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        number = None
        if request.query.get("create_pr"):
            number = 1 + len(repo.git("for-each-ref", "refs/pr").splitlines())
            ref = f"refs/pr/{number}"
        oid = repo.commit(ref, parent, message, request.user["name"], changes)
    prefix = "" if repo.kind == "models" else f"{repo.kind}/"
    url = f"{request.address}/{prefix}{repo.name}"
    proposal = f"{url}/discussions/{number}" if number else None
    reply = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
    return reply | {"pullRequestUrl": proposal, "hookOutput": ""}


@route("POST", f"/api/{REPO}/(?P<place>branch|tag)/(?P<name_>[^/]+)", write=True)
def create_ref(request: Handler, repo: Repo, place: str, name_: str):
    asked = request.json()
    if place == "branch":
        ref, start = f"refs/heads/{name_}", asked.get("startingPoint") or "main"
    else:
        ref, start = f"refs/tags/{asked['tag']}", name_
    with repo.lock:
        if repo.git("for-each-ref", ref):
            raise Problem(409, f"Reference {ref} already exists")
        repo.git("check-ref-format", ref)
        repo.git("update-ref", ref, repo.revision(start))
    return {}


@route("DELETE", f"/api/{REPO}/(?P<place>branch|tag)/(?P<name_>[^/]+)", write=True)
def delete_ref(request: Handler, repo: Repo, place: str, name_: str):
    ref = f"refs/{'heads' if place == 'branch' else 'tags'}/{name_}"
    repo.revision(ref)
    repo.git("update-ref", "-d", ref)
    return {}


@route("GET", f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Handler, repo: Repo, revision: str, path: str):
    commit = repo.revision(revision)
    entry = next((e for e in repo.tree(commit, path) if e["path"] == path), None)
    headers = {"X-Repo-Commit": commit}
    if entry is None or entry["type"] != "file":
        raise Problem(404, f"{path} does not exist", "EntryNotFound", **headers)
    large, size = entry.get("lfs"), entry["size"]
    etag = large["oid"] if large else entry["oid"]
    headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    headers |= {"Content-Type": "application/octet-stream"}
    body = repo.large_file(etag) if large else repo.git("cat-file", "blob", etag)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return 200, headers, body, 0, size
    start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
    if start >= size:
        raise Problem(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    if isinstance(body, bytes):
        return 206, headers, body[start : end + 1]
    return 206, headers, body, start, end + 1 - start


@route("GET", f"/api/{REPO}/runtime")
def runtime(request: Handler, repo: Repo):
    return _runtime(repo.files(repo.revision("main")))


@route("GET", f"/api/{REPO}/variables")
def variables(request: Handler, repo: Repo):
    return repo.facts["variables"]


@route("POST", f"/api/{REPO}/variables", write=True)
def add_variable(request: Handler, repo: Repo):
    return _change_variables(repo, add=request.json())


@route("DELETE", f"/api/{REPO}/variables", write=True)
def delete_variable(request: Handler, repo: Repo):
    return _change_variables(repo, remove=request.json()["key"])


@route("POST", f"/api/{REPO}/secrets", write=True)
def add_secret(request: Handler, repo: Repo):
    return {}  # taken, and not kept: nothing runs here that could use it


class LocalHub(ThreadingHTTPServer):
    """The server on `http://127.0.0.1:port`; port 0 takes a free one.

    `tokens` maps each token to {"name", "role": "read" or "write", "orgs"}.
    """

    daemon_threads = True

    def __init__(self, root: Path, tokens: dict, port: int = 0, host: str = "127.0.0.1",
                 handler: type[Handler] = Handler, verbose: bool = False):  # fmt: skip
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"The local Hub answers on loopback only, not on {host}.")
        self.root, self.tokens, self.verbose = root.absolute(), tokens, verbose
        self.key = secrets.token_bytes(32)
        super().__init__((host, port), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def signature(self, oid: str) -> str:
        return hmac.new(self.key, oid.encode(), hashlib.sha256).hexdigest()


def _data(content: str) -> str:
    return f"data {len(content.encode('utf-8', 'surrogateescape'))}\n{content}"


def _goes_to_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def _utc(date: str) -> str:
    return date.replace("+00:00", "Z").replace("Z", ".000Z")


def _card_metadata(repo: Repo, files: dict[str, dict]) -> dict:
    if "README.md" not in files:
        return {}
    card = repo.git("cat-file", "blob", files["README.md"]["oid"]).decode(errors="replace")
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        return (yaml.safe_load(header[1]) if header else None) or {}
    except yaml.YAMLError:
        return {}


def _commits(repo: Repo, commit: str, path: str | None = None, limit: int = 1000) -> list[dict]:
    form = "%H%x00%an%x00%cI%x00%s%x00%b%x01"
    arguments = ["log", f"-{limit}", f"--format={form}", commit, *(["--", path] if path else [])]
    found = []
    for entry in repo.git(*arguments).decode().split("\x01\n")[:-1]:
        oid, author, date, title, message = entry.split("\x00")
        listed = {"id": oid, "title": title, "message": message.strip(), "date": _utc(date)}
        found.append(listed | {"authors": [{"user": author}]})
    return found


def _runtime(files: dict[str, dict]) -> dict:
    hardware = {"current": None, "requested": "cpu-basic"}
    stage = "STOPPED" if "app.py" in files else "NO_APP_FILE"  # Spaces are kept, not run
    return {"stage": stage, "hardware": hardware, "storage": None, "gcTimeout": None}


def _change_variables(repo: Repo, add: dict | None = None, remove: str | None = None) -> dict:
    with repo.lock:
        facts = repo.facts
        if add:
            facts["variables"][add["key"]] = add
        facts["variables"].pop(remove, None)
        repo.save_facts(facts)
    return facts["variables"]


def tokens_in(root: Path, user: str) -> dict:
    """The tokens of `root/tokens.json`; at first, one that may write to what `user` owns."""
    file = root / "tokens.json"
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        token = f"hf_{secrets.token_hex(17)}"
        for path, text in ((root / "token", token), (file, json.dumps({
            token: {"name": user, "role": "write", "orgs": []}}))):  # fmt: skip
            path.touch(mode=0o600)
            path.write_text(text)
    return json.loads(file.read_text())


def environment(server: LocalHub) -> dict[str, str]:
    """What points the clients here: to be set before they are imported."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN_PATH": str(server.root / "token"),
        "HF_HOME": str(server.root / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
    }


def run(server: LocalHub, command: list[str]) -> int:
    """A command with this Hub as its Hub; returns its exit status."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    outside = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
    variables = {k: v for k, v in os.environ.items() if k not in outside}
    return subprocess.run(command, env=variables | environment(server)).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("hub"), help="folder to keep it in")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
    parser.add_argument("--port", type=int, default=8787)
    parser.add_argument("--user", default="me", help="who the first token belongs to")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="KIND/OWNER/NAME=FOLDER",
        help="seed it, as in --add=datasets/uoft-cs/cifar10=FOLDER; left alone if there",
    )
    parser.add_argument("--verbose", action="store_true", help="log each request")
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        help="run the command that follows against it, and stop; on a free port",
    )
    arguments = parser.parse_args()
    tokens = tokens_in(arguments.root, arguments.user)
    for wish in arguments.add:
        if not re.fullmatch("(models|datasets|spaces)/[^/=]+/[^/=]+=.+", wish):
            parser.error(f"cannot read --add={wish}")
        target, folder = wish.split("=", 1)
        repo = Repo(arguments.root.absolute(), *target.split("/", 1))
        if not Path(folder).is_dir():
            parser.error(f"no folder {folder}")
        if not repo.path.exists():
            repo.create({"private": False, "sdk": None, "variables": {}})
            repo.add_folder(Path(folder))
    try:
        port = 0 if arguments.run else arguments.port
        server = LocalHub(arguments.root, tokens, port, arguments.host, verbose=arguments.verbose)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    if arguments.run:
        sys.exit(run(server, arguments.run))
    print(f"A Hub in {arguments.root}, until Ctrl-C. In the shell that uses it:\n  unset HF_TOKEN")
    for name, value in environment(server).items():
        print(f"  export {name}={value}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
