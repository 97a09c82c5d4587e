"""The routes of the local Hub, as huggingface_hub calls them, and its server."""

import asyncio
import collections
import json
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, unquote

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

from local_hub.card import find_errors, read_metadata
from local_hub.repository import Repository, is_lfs, replace, require

PAGE, TRUE = 1000, ("true", "True", "1")
MALFORMED = (RequestValidationError, KeyError, TypeError, ValueError, AttributeError)
REPO, FILES = "/api/{kind:kind}/{name:name}", "/{kind:prefix}{name:name}"
for key, regex in {
    "kind": "models|datasets|spaces",
    "prefix": "(?:datasets/|spaces/)?",
    "name": "[^/]+(?:/[^/]+)?",  # one without an owner is just not found
    "part": "[^/]+",
    "path": ".+",
    "ref_type": "branch|tag",
}.items():
    members = {"regex": regex, "convert": lambda self, value: unquote(value)}
    register_url_convertor(key, type(key, (Convertor,), members)())


def require_write(user: dict, owner: str | None = None) -> None:
    """Raise an error unless a user may write: to what `owner` has, or else at all."""
    require(user["role"], 401, "Invalid username or password.")
    may = user["role"] == "write" and owner in (None, user["name"], *user["orgs"])
    require(may, 403, f"This token has no right to write to {owner or 'any'} repositories.")


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """Reply in the form that huggingface_hub understands."""
    status, message = 400 if isinstance(error, MALFORMED) else 500, f"Invalid request: {error!r}"
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    message = re.sub("[^ -~]+", " ", message).strip()
    headers = {"X-Error-Message": message} | (getattr(error, "headers", None) or {})
    return JSONResponse({"error": message}, status, headers)


def build_app(root: Path, tokens: dict, origins: list[str], verbose: bool) -> FastAPI:
    """Return the application of a LocalHub."""
    app, uploads = FastAPI(openapi_url=None, redirect_slashes=False), {}
    locks = collections.defaultdict(asyncio.Lock)  # one for each repository, held to change it
    for kind in (HTTPException, *MALFORMED, Exception):
        app.add_exception_handler(kind, on_error)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        """Refuse what a web page from elsewhere may have sent (CSRF, DNS rebinding)."""
        request.scope["path"] = request.scope["raw_path"].decode()  # refs%2Fpr%2F1 is one part
        host = f"http://{request.headers.get('host')}"
        if {host, request.headers.get("origin", host)} <= {*origins}:
            reply = await call_next(request)
        else:
            reply = await on_error(request, HTTPException(403, "The local Hub serves itself only."))
        if verbose:
            print(request.method, request.scope["path"], reply.status_code, file=sys.stderr)
        return reply

    async def get_user(request: Request) -> dict:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        known = not token or token in tokens
        require(known, 401, "Invalid credentials in Authorization header")
        return tokens.get(token, {"name": None, "role": None, "orgs": []})

    User, Raw = Annotated[dict, Depends(get_user)], Annotated[bytes, Body()]

    def access(right: str):
        """Return a dependency: the repository of the address, locked unless it is only read."""

        async def find(user: User, kind: str, name: str, create_pr: bool = False):
            repo = Repository(root, kind.strip("/") or "models", name)
            member = repo.owner in (user["name"], *user["orgs"])
            found = repo.exists and (member or not repo.settings["private"])
            require(found, 404, "Repository not found", "RepoNotFound")
            if right == "read":
                yield repo
                return
            repo.proposing = create_pr and right == "commit"  # anybody who may write at all may
            require_write(user, None if repo.proposing else repo.owner)
            async with locks[repo.path]:
                require(repo.exists, 404, "Repository not found", "RepoNotFound")
                yield repo

        return Annotated[Repository, Depends(find)]

    Readable, Committable, Writable = map(access, ("read", "commit", "write"))

    async def lock_named(user: User, body: dict):
        """Give the repository that a body names, whether it exists or not."""
        owner = body.get("organization") or user["name"]
        require_write(user, owner)
        repo = Repository(root, f"{body.get('type') or 'model'}s", f"{owner}/{body['name']}")
        async with locks[repo.path]:
            yield repo

    Named = Annotated[Repository, Depends(lock_named)]

    @app.get("/api/whoami-v2")
    def whoami(user: User):
        require(user["role"], 401, "Invalid username or password.")
        orgs = [{"name": org, "type": "org", "roleInOrg": "write"} for org in user["orgs"]]
        token = {"displayName": "local", "role": user["role"]}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": user["name"], "orgs": orgs, "auth": auth}

    @app.post("/api/repos/create")
    def create(request: Request, repo: Named, body: dict):
        url = f"{request.base_url}{repo.id.removeprefix('models/')}"
        if repo.exists:
            error = "You already created this repo"
            return JSONResponse({"error": error, "url": url}, 409, {"X-Error-Message": error})
        private = bool(body.get("private")) or body.get("visibility") == "private"
        variables = {variable["key"]: variable for variable in body.get("variables") or []}
        repo.create(private, body.get("sdk"), variables)
        return {"url": url, "name": repo.name}

    @app.delete("/api/repos/delete")
    def delete(repo: Named):
        require(repo.exists, 404, "Repository not found", "RepoNotFound")
        (repo.path / "hub.json").unlink()  # from here on it does not exist
        shutil.rmtree(repo.path)

    @app.post("/api/validate-yaml")
    def validate_yaml(body: dict):
        errors = [{"message": message} for message in find_errors(body["content"])]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    @app.get(REPO)
    @app.get(REPO + "/revision/{revision:part}")
    def info(repo: Readable, revision: str = "main"):
        commit = repo.resolve(revision)
        files = [entry for entry in repo.tree(commit).values() if entry["type"] == "file"]
        try:
            card = read_metadata(repo.file(commit, "README.md")[0].read_text(errors="replace"))
        except (HTTPException, ValueError):
            card = {}
        reply = {"id": repo.name, "sha": commit, "lastModified": repo.log(commit, "", 1)[0]["date"]}
        reply["siblings"] = [e | {"rfilename": e["path"], "blobId": e["oid"]} for e in files]
        reply |= {key: repo.settings[key] for key in ("private", "sdk")} | {"cardData": card}
        reply |= {key: card.get(key) for key in ("pipeline_tag", "library_name")} | {"tags": []}
        reply |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0}
        return reply | {"runtime": runtime(repo) if repo.kind == "spaces" else None}

    @app.get(REPO + "/auth-check")
    def auth_check(repo: Readable):
        return {}

    @app.get(REPO + "/auth-check/write")
    @app.post(REPO + "/secrets")
    def auth_check_write(repo: Writable):
        return {}  # a secret is not kept: nothing runs here that could use it

    @app.get(REPO + "/tree/{revision:part}")
    @app.get(REPO + "/tree/{revision:part}/{path:path}")
    def tree(request: Request, repo: Readable, revision: str, path: str = "", cursor: int = 0):
        commit, query = repo.resolve(revision), request.query_params
        entries = [*repo.tree(commit, path, query.get("recursive") in TRUE).values()]
        if path and not entries:
            repo.file(commit, path)  # raises EntryNotFound
        page = entries[cursor : cursor + PAGE]
        if query.get("expand") in TRUE:
            page = [e | {"lastCommit": repo.log(commit, e["path"], limit=1)[0]} for e in page]
        following = request.url.include_query_params(cursor=cursor + PAGE)
        more = cursor + PAGE < len(entries)
        return JSONResponse(page, headers={"Link": f'<{following}>; rel="next"'} if more else {})

    @app.post(REPO + "/paths-info/{revision:part}")
    def paths_info(repo: Readable, revision: str, body: Raw):
        tree = repo.tree(repo.resolve(revision))
        return [tree[path] for path in parse_qs(body.decode())["paths"] if path in tree]

    @app.get(REPO + "/commits/{revision:part}")
    def commits(repo: Readable, revision: str):
        return repo.log(repo.resolve(revision))

    @app.get(REPO + "/refs")
    def refs(repo: Readable):
        folders = {"branches": "heads", "tags": "tags", "pullRequests": "pr", "converts": "convert"}
        return {key: repo.refs(folder) for key, folder in folders.items()}

    @app.get(REPO + "/runtime")
    def runtime(repo: Readable):  # a Space is kept here, not run
        stage = "STOPPED" if repo.tree(repo.resolve("main"), "app.py") else "NO_APP_FILE"
        hardware = {"current": None, "requested": "cpu-basic"}
        return {"stage": stage, "hardware": hardware, "storage": None, "gcTimeout": None}

    @app.get(REPO + "/variables")
    def variables(repo: Readable):
        return repo.settings["variables"]

    @app.api_route(REPO + "/variables", methods=["POST", "DELETE"])
    def change_variable(request: Request, repo: Writable, body: dict):
        settings = repo.settings
        settings["variables"].pop(body["key"], None)
        if request.method == "POST":
            settings["variables"][body["key"]] = body
        repo.save_settings(settings)
        return settings["variables"]

    @app.post(REPO + "/preupload/{revision:part}")
    def preupload(repo: Committable, revision: str, body: dict):
        tree, files = repo.tree(repo.resolve(revision)), []
        for file in body["files"]:
            path, entry = file["path"], tree.get(file["path"], {"oid": None})
            oid = entry.get("lfs", entry)["oid"]
            if "lfs" in entry and not repo.holds(oid):
                oid = None  # so that the client sends a damaged one again
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @app.post(FILES + ".git/info/lfs/objects/batch")
    def lfs_batch(request: Request, user: User, repo: Readable, body: dict):
        require_write(user)
        objects = [{"oid": item["oid"], "size": int(item["size"])} for item in body["objects"]]
        for item in objects:
            require(re.fullmatch("[0-9a-f]{64}", item["oid"]), 400, f"{item['oid']} is no sha256")
            if not repo.holds(item["oid"]):
                key = secrets.token_hex(16)
                uploads[key] = repo, item["oid"]
                href = f"{request.base_url}lfs/{key}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @app.put("/lfs/{key}")
    async def lfs_upload(request: Request, key: str):
        require(key in uploads, 403, "Nobody was given this address")
        repo, oid = uploads[key]
        with replace(repo.lfs / oid, oid) as file:
            async for chunk in request.stream():
                file.write(chunk)

    @app.post("/lfs/{key}/verify")
    def lfs_verify(key: str, body: dict):
        require(key in uploads, 403, "Nobody was given this address")
        file = uploads[key][0].lfs / uploads[key][1]
        whole = file.is_file() and file.stat().st_size == body["size"]
        require(whole, 400, f"There is no object {file.name} of that size")

    @app.post(REPO + "/commit/{revision:part}")
    def commit(request: Request, user: User, repo: Committable, revision: str, body: Raw):
        header, *lines = [(x["key"], x["value"]) for x in map(json.loads, body.splitlines())]
        changes = dict(repo.read_change(key, value) for key, value in lines)
        message = "\n\n".join(filter(None, (header[1]["summary"], header[1].get("description"))))
        ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        parent = repo.resolve(ref)
        fresh = header[1].get("parentCommit") in (None, parent)
        require(fresh, 412, "A commit has happened since. Please refresh and try again.")
        number = len(repo.refs("pr")) + 1
        ref = f"refs/pr/{number}" if repo.proposing else ref
        oid = repo.commit(ref, message, changes, parent, user["name"])
        url = f"{request.base_url}{repo.id.removeprefix('models/')}"
        pull_request = f"{url}/discussions/{number}" if repo.proposing else None
        reply = {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
        return reply | {"success": True, "pullRequestUrl": pull_request}

    @app.post(REPO + "/{ref_type:ref_type}/{revision:part}")
    def create_ref(repo: Writable, ref_type: str, revision: str, body: dict):
        ref, start = f"refs/heads/{revision}", body.get("startingPoint") or "main"
        if ref_type == "tag":
            ref, start = f"refs/tags/{body['tag']}", revision
        repo.git("check-ref-format", ref)
        require(not repo.git("for-each-ref", ref), 409, f"Reference {ref} already exists")
        repo.git("update-ref", ref, repo.resolve(start))

    @app.delete(REPO + "/{ref_type:ref_type}/{revision:part}")
    def delete_ref(repo: Writable, ref_type: str, revision: str):
        ref = f"refs/{'heads' if ref_type == 'branch' else 'tags'}/{revision}"
        require(ref != "refs/heads/main", 403, f"Cannot delete {ref}: it is the default branch")
        repo.git("update-ref", "-d", ref, repo.resolve(ref))

    @app.api_route(FILES + "/resolve/{revision:part}/{path:path}", methods=["GET", "HEAD"])
    def resolve(repo: Readable, revision: str, path: str):
        commit = repo.resolve(revision)
        file, oid = repo.file(commit, path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid}"'}
        return FileResponse(file, headers=headers, media_type="application/octet-stream")

    return app
