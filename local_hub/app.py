"""The local Hub: its server, and its responses to huggingface_hub."""

import hashlib
import json
import re
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from huggingface_hub import ModelCard
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from local_hub import jobs
from local_hub.repository import MAIN, Repository, require

PAGE, TRUE = 1000, ("true", "True", "1")
CARD_VALUES = yaml.safe_load(Path(__file__).with_name("card_values.yaml").read_text())
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


class LocalHub(uvicorn.Server):
    """A Hub that stores its repositories in the folder `root` and listens only on 127.0.0.1.

    `tokens` maps each token to its user: {"name", "role": "read" or "write", "orgs": [names]}.
    """

    def __init__(self, root: Path, tokens: dict, port: int = 0):
        self.root, self.tokens = root.absolute(), tokens
        self.uploads: dict[str, Path] = {}  # the target of a large file, by the key in its URL
        listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.origins = {self.url, self.url.replace("127.0.0.1", "localhost")}
        options = {"lifespan": "off", "ws": "none", "interface": "asgi3", "proxy_headers": False}
        options |= {"log_level": "error", "timeout_graceful_shutdown": 1, "timeout_keep_alive": 60}
        super().__init__(uvicorn.Config(self.answer, **options))
        self.thread = threading.Thread(target=self.run, args=([listener],), daemon=True)

    def start(self) -> None:
        """Serve in a separate thread; return when connections are accepted."""
        self.thread.start()
        while not self.started:
            time.sleep(0.001)

    def stop(self) -> None:
        self.should_exit = True
        self.thread.join()

    async def answer(self, scope, receive, send) -> None:
        """Answer an ASGI request without awaiting in between, so that requests can't interfere."""
        request = Request(scope, receive)
        try:
            host = f"http://{request.headers.get('host')}"  # differs for a foreign web page
            is_own = {host, request.headers.get("origin", host)} <= self.origins
            require(is_own, 403, "The local Hub only accepts requests for its own address.")
            reply = Call(self, request, await request.body()).route()
            reply = reply if isinstance(reply, Response) else JSONResponse(reply)
        except Exception as error:  # converted to a response that huggingface_hub understands
            status, message = 400 if isinstance(error, MALFORMED) else 500, f"Invalid: {error!r}"
            if isinstance(error, HTTPException):
                status, message = error.status_code, error.detail
            message = re.sub("[^ -~]+", " ", message).strip()
            headers = {"X-Error-Message": message} | (getattr(error, "headers", None) or {})
            reply = JSONResponse({"error": message}, status, headers)
        await reply(scope, receive, send)


class Call:
    """One request and its user; `route` returns the response, or its content for JSON."""

    def __init__(self, hub: LocalHub, request: Request, body: bytes):
        self.hub, self.request, self.query, self.body = hub, request, request.query_params, body
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        require(not token or token in hub.tokens, 401, "Invalid credentials in Authorization")
        self.user = hub.tokens.get(token, {"name": None, "role": None, "orgs": []})

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def require_write(self, owner: str | None = None) -> None:
        """Raise an error unless the user may write to `owner`'s repositories, or to any."""
        require(self.user["role"], 401, "Invalid username or password.")
        is_owner = owner in (None, self.user["name"], *self.user["orgs"])
        message = f"This token has no write access to {owner or 'any'} repositories."
        require(is_owner and self.user["role"] == "write", 403, message)

    def find(self, kind: str, name: list[str]) -> Repository:
        repo = Repository(self.hub.root, kind, "/".join(name))
        is_member = repo.owner in (self.user["name"], *self.user["orgs"])
        found = repo.state and (is_member or not repo.state["private"])
        require(found, 404, "Repository not found", "RepoNotFound")
        return repo

    def route(self) -> object:
        path = [unquote(p) for p in self.request.scope["raw_path"].decode().split("/")[1:]]
        if path[0] not in ("api", "lfs", "datasets", "spaces"):
            path = ["models", *path]
        match self.request.method, *path:
            case "GET", "api", "whoami-v2":
                require(role := self.user["role"], 401, "Invalid username or password.")
                orgs = [{"name": org, "type": "org"} for org in self.user["orgs"]]
                auth = {"type": "access_token", "accessToken": {"displayName": "a", "role": role}}
                return {"type": "user", "name": self.user["name"], "orgs": orgs, "auth": auth}
            case "POST" | "DELETE" as method, "api", "repos", "create" | "delete":
                return self.create_or_delete(method, self.json)
            case "POST", "api", "validate-yaml":
                errors = [{"message": message} for message in card_errors(self.json["content"])]
                return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)
            case "PUT", "lfs", key:
                digest = hashlib.sha256(self.body).hexdigest()
                require(key in self.hub.uploads, 403, "This upload URL is not valid")
                require(digest == self.hub.uploads[key].name, 400, "The content's sha256 differs")
                return self.hub.uploads[key].write_bytes(self.body)
            case "POST", "lfs", key, "verify":
                file = self.hub.uploads[key]
                whole = file.is_file() and file.stat().st_size == self.json["size"]
                return require(whole, 400, f"There is no object {file.name} with that size")
            case method, "api", "models" | "datasets" | "spaces" as kind, *rest:
                return self.route_api(self.find(kind, rest[:2]), method, *rest[2:])
            case method, "api", "jobs" | "buckets" as kind, *rest:
                return jobs.answer(self, method, kind, *rest)
            case method, "models" | "datasets" | "spaces" as kind, *rest:
                name = [part.removesuffix(".git") for part in rest[:2]]
                return self.route_files(self.find(kind, name), method, *rest[2:])
        raise HTTPException(404, "Not found")

    def create_or_delete(self, method: str, body: dict) -> object:
        owner = body.get("organization") or self.user["name"]
        self.require_write(owner)
        repo = Repository(
            self.hub.root, f"{body.get('type') or 'model'}s", f"{owner}/{body['name']}"
        )
        if method == "DELETE":
            require(repo.state, 404, "Repository not found", "RepoNotFound")
            return shutil.rmtree(repo.folder)
        reply = {"url": f"{self.request.base_url}{repo.page}", "name": repo.name}
        if repo.state:
            return JSONResponse(reply, 409, {"X-Error-Message": "You already created this repo"})
        variables = {variable["key"]: variable for variable in body.get("variables") or []}
        repo.create(body.get("visibility") == "private", body.get("sdk"), variables)
        return reply

    def route_files(self, repo: Repository, method: str, *path: str) -> object:
        """Respond with a file, or with URLs for uploading large files."""
        match method, *path:
            case "GET" | "HEAD", "resolve", revision, *parts:
                commit = repo.resolve(revision)
                file, oid = repo.file(commit, "/".join(parts))
                headers = {"X-Repo-Commit": commit, "ETag": f'"{oid}"'}
                return FileResponse(file, headers=headers, media_type="application/octet-stream")
            case "POST", "info", "lfs", "objects", "batch":
                self.require_write()
                objects = [{"oid": o["oid"], "size": int(o["size"])} for o in self.json["objects"]]
                for item in (item for item in objects if not repo.holds(item["oid"])):
                    href = f"{self.request.base_url}lfs/{(key := secrets.token_hex())}"
                    self.hub.uploads[key] = repo.objects / item["oid"]
                    item["actions"] = {
                        "upload": {"href": href},
                        "verify": {"href": f"{href}/verify"},
                    }
                return {"transfer": "basic", "objects": objects}
        raise HTTPException(404, "Not found")

    def route_api(self, repo: Repository, method: str, *path: str) -> object:
        """Respond to a call of a repository's API."""
        refs, variables = repo.state["refs"], repo.state["variables"]
        match method, *path:
            case ("GET",) | ("GET", "revision", _):
                return repo.info(repo.resolve(path[1] if path else "main"))
            case "GET", "tree", revision, *parts:
                return self.list_page(repo, repo.resolve(revision), "/".join(parts))
            case "GET", "commits", revision:
                return repo.log(repo.resolve(revision))
            case "GET", "refs":
                kinds = {"branches": "heads", "tags": "tags", "pullRequests": "pr"}
                return {key: repo.refs(kind) for key, kind in kinds.items()} | {"converts": []}
            case "GET", "runtime":
                return repo.runtime()
            case "GET", "variables":
                return variables
            case "GET", "auth-check":
                return None
            case "POST", "paths-info", revision:
                tree, form = repo.tree(repo.resolve(revision)), parse_qs(self.body.decode())
                return [tree[path] for path in form["paths"] if path in tree]
            case "POST", "preupload", revision:
                self.require_write()
                files = repo.files(repo.resolve(revision))
                known = {path: file.get("lfs", file)["oid"] for path, file in files.items()}
                return {"files": [repo.preupload(known, **file) for file in self.json["files"]]}
            case "POST", "commit", revision:
                return self.commit(repo, revision)
        self.require_write(repo.owner)
        match method, *path:
            case ("GET", "auth-check", "write") | ("POST", "secrets"):
                return None  # nothing runs here, so secrets are not stored
            case "POST", "variables":
                variables[self.json["key"]] = self.json
            case "DELETE", "variables":
                variables.pop(self.json["key"], None)
            case "POST", "branch", name:
                repo.add_ref(f"refs/heads/{name}", self.json.get("startingPoint") or "main")
            case "POST", "tag", revision:
                repo.add_ref(f"refs/tags/{self.json['tag']}", revision)
            case "DELETE", "branch" | "tag" as kind, name:
                ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
                require(ref != MAIN, 403, f"Cannot delete {ref}: it is the default branch")
                require(refs.pop(ref, None), 404, f"Invalid rev id: {name}", "RevisionNotFound")
            case _:
                raise HTTPException(404, "Not found")
        repo.save()
        return variables

    def list_page(self, repo: Repository, commit: str, path: str) -> Response:
        """Respond with a page of the entries below a folder, and the URL of the next page."""
        entries = [*repo.tree(commit, path, self.query.get("recursive") in TRUE).values()]
        require(entries or not path, 404, f"There is no {path}", "EntryNotFound")
        end = int(self.query.get("cursor", 0)) + PAGE
        page = entries[end - PAGE : end]
        if self.query.get("expand") in TRUE:
            page = [e | {"lastCommit": repo.log(commit, e["path"])[0]} for e in page]
        link = f'<{self.request.url.include_query_params(cursor=end)}>; rel="next"'
        return JSONResponse(page, headers={"Link": link} if end < len(entries) else {})

    def commit(self, repo: Repository, revision: str) -> dict:
        """Make a commit, or a pull request, for which any write access is enough."""
        is_proposed = self.query.get("create_pr") in TRUE
        self.require_write(None if is_proposed else repo.owner)
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        changes = dict(repo.read_change(line["key"], line["value"]) for line in lines)
        title, text = header["value"]["summary"], header["value"].get("description") or ""
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        parent, number = repo.resolve(ref), len(repo.refs("pr")) + 1
        fresh = header["value"].get("parentCommit") in (None, parent)
        require(fresh, 412, "A commit has happened since. Please refresh and try again.")
        ref = f"refs/pr/{number}" if is_proposed else ref
        oid = repo.commit(ref, title, changes, parent, text, self.user["name"])
        page = f"{self.request.base_url}{repo.page}"
        reply = {"commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "success": True}
        return reply | ({"pullRequestUrl": f"{page}/discussions/{number}"} if is_proposed else {})


def card_errors(card: str) -> list[str]:
    """Return the errors that the Hub would find in a card's metadata, as far as known here."""
    try:
        metadata = ModelCard(card).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [f"The metadata is malformed: {error}"]
    errors = []
    for key, accepted in CARD_VALUES.items():
        value = metadata.get(key, "other")
        if not {*(value if isinstance(value, list) else [value])} <= {*accepted}:
            errors.append(f'"{key}" must be one of [{", ".join(accepted)}]')
    return errors
