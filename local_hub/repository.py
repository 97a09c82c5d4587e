"""Repositories of the local Hub: refs and commits in a JSON file, contents in files named by hash.

Small files are named by their git hash and large ones (LFS) by their SHA-256, as on the Hub.
"""

import base64
import hashlib
import json
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.utils.sha import git_hash
from starlette.exceptions import HTTPException

MAIN = "refs/heads/main"
# As in `git check-ref-format`.
REF = re.compile(r"(?!.*(\.\.|//|@\{|/\.|\.lock(/|$)|[/.]$))[^./][^\0- \x7f~^:?*[\\\ud800-\udfff]*")
NAME = r"\w[\w.-]{0,95}(?<!\.git)"
ID_PATTERN = re.compile(rf"(models|datasets|spaces)/(?!.*(--|\.\.)){NAME}/{NAME}", re.ASCII)
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".onnx", ".png", ".jpg", ".zip")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
POINTER_PATTERN = re.compile(POINTER.format("([0-9a-f]{64})", r"\d+").encode())


def require(condition: object, status: int, message: str, code: str = "", **headers: str) -> None:
    """Raise an error response unless a condition holds; `code` is the Hub's X-Error-Code."""
    if not condition:
        raise HTTPException(status, message, headers | ({"X-Error-Code": code} if code else {}))


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10 * 2**20)


class Repository:
    """A model, dataset or Space in `root/kind/owner/name`; `state` is None if it does not exist."""

    def __init__(self, root: Path, kind: str, name: str):
        self.kind, self.name, self.owner, self.id = kind, name, name.split("/")[0], f"{kind}/{name}"
        self.folder, self.state = root.absolute() / self.id, None
        self.page = self.id.removeprefix("models/")  # its URL path
        self.objects = self.folder / "objects"  # per repository, so that private files can't leak
        if ID_PATTERN.fullmatch(self.id):
            with suppress(FileNotFoundError):
                self.state = json.loads((self.folder / "hub.json").read_bytes())

    def save(self) -> None:
        (self.folder / "new.json").write_text(json.dumps(self.state))
        (self.folder / "new.json").replace(self.folder / "hub.json")

    def create(self, private: bool = False, sdk: str | None = None, variables: dict | None = None):
        """Create it with the Hub's first commit: LFS file types, and a Space's README.md."""
        require(ID_PATTERN.fullmatch(self.id), 400, f"Invalid repository name: {self.id}")
        shutil.rmtree(self.folder, ignore_errors=True)  # left by an interrupted creation
        self.objects.mkdir(parents=True)
        self.state = {"private": private, "sdk": sdk, "variables": variables or {}}
        self.state |= {"refs": {}, "commits": {}}
        text = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
        files = {".gitattributes": self.add_file(".gitattributes", text.encode())}
        if sdk:
            readme = f"---\ntitle: {self.id.split('/')[-1]}\nsdk: {sdk}\n---\n"
            files["README.md"] = self.add_file("README.md", readme.encode())
        self.commit(MAIN, "initial commit", files)

    def add_folder(self, folder: Path) -> None:
        """Commit a whole folder to `main`."""
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
        changes = {p: self.add_file(p, f.read_bytes()) for p, f in files.items() if f.is_file()}
        self.commit(MAIN, f"Add {folder.name}", changes, self.resolve(MAIN))

    def add_file(self, path: str, content: bytes) -> dict:
        """Store the content of a file; return its entry in the API's format."""
        is_large = is_lfs(path, len(content))
        oid = hashlib.sha256(content).hexdigest() if is_large else git_hash(content)
        (self.objects / oid).write_bytes(content)
        small = {"type": "file", "oid": oid, "size": len(content), "path": path}
        return self.large_file(path, oid) if is_large else small

    def large_file(self, path: str, oid: str) -> dict:
        """Return the entry of an uploaded large file in the API's format."""
        require(self.holds(oid), 400, f"The LFS object {oid} was not uploaded to this repository")
        size = (self.objects / oid).stat().st_size
        pointer = POINTER.format(oid, size).encode()  # stored in git in its place
        lfs = {"oid": oid, "sha256": oid, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "oid": git_hash(pointer), "size": size, "path": path, "lfs": lfs}

    def holds(self, oid: str) -> bool:
        """Return whether an undamaged large file is stored here."""
        require(re.fullmatch("[0-9a-f]{64}", oid), 400, f"{oid} is not a SHA-256")
        with suppress(FileNotFoundError), open(self.objects / oid, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == oid
        return False

    def preupload(self, known: dict[str, str], path: str, size: int, **others: str) -> dict:
        """Return how to upload a file; `oid` is its stored hash if it is known and undamaged."""
        oid, mode = known.get(path), "lfs" if is_lfs(path, size) else "regular"
        oid = oid if oid and (len(oid) == 40 or self.holds(oid)) else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def read_change(self, key: str, value: dict) -> tuple[str, dict | None]:
        """Return path and file (None if deleted) from a line of a commit request."""
        path = value["path"].rstrip("/")
        allowed = not {"", ".", "..", ".git"} & {*path.lower().split("/")}
        require(
            allowed and b"\0" not in path.encode(), 400, f"A repository can't have a file {path}"
        )
        if key == "lfsFile":
            return path, self.large_file(path, value["oid"])
        if key != "file":
            return path, None
        content = base64.b64decode(value["content"], validate=True)
        if pointer := POINTER_PATTERN.fullmatch(content):
            return path, self.large_file(path, pointer[1].decode())
        return path, self.add_file(path, content)

    def commit(self, ref: str, title: str, changes: dict, parent="", text="", user="hub") -> str:
        """Commit {path: file, or None to delete it}, and return the commit's hash."""
        files = self.files(parent)
        for path, file in changes.items():
            for replaced in self.files(parent, path):
                files.pop(replaced, None)
            files |= {path: file} if file else {}
        info = {"title": title, "message": text, "authors": [{"user": user}]}
        info["date"] = time.strftime("%FT%T.000Z", time.gmtime())
        oid = git_hash(json.dumps([info, parent, files]).encode())
        self.state["commits"][oid] = {"info": info | {"id": oid}, "parent": parent, "files": files}
        self.state["refs"][ref] = oid
        self.save()
        return oid

    def add_ref(self, ref: str, revision: str) -> None:
        require(REF.fullmatch(ref), 400, f"{ref} is not a valid name")
        require(ref not in self.state["refs"], 409, f"Reference {ref} already exists")
        self.state["refs"][ref] = self.resolve(revision)

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, a tag, `refs/pr/N` or a hash."""
        refs, commits = self.state["refs"], self.state["commits"]
        names = (revision, f"refs/tags/{revision}", f"refs/heads/{revision}")
        hits = [refs[name] for name in names if name in refs][:1]
        hits = hits or [oid for oid in commits if oid.startswith(revision) and len(revision) > 6]
        require(len(hits) == 1, 404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return hits[0]

    def refs(self, kind: str) -> list[dict]:
        """Return the refs of a kind ("heads", "tags", "pr") in the API's format."""
        start, refs = f"refs/{kind}/", self.state["refs"]
        names = [ref.removeprefix(start) for ref in refs if ref.startswith(start)]
        return [{"name": n, "ref": start + n, "targetCommit": refs[start + n]} for n in names]

    def log(self, commit: str, path: str = "") -> list[dict]:
        """Return the commits up to `commit` that changed `path`, latest first."""
        commits = []
        while commit:
            entry = self.state["commits"][commit]
            if not path or self.files(commit, path) != self.files(entry["parent"], path):
                commits.append(entry["info"])
            commit = entry["parent"]
        return commits

    def files(self, commit: str, path: str = "") -> dict[str, dict]:
        """Return the files of a commit ("" for none) at or below a path, by path."""
        files = self.state["commits"][commit]["files"] if commit else {}
        start = f"{path}/" if path else ""
        return {name: file for name, file in files.items() if f"{name}/".startswith(start)}

    def tree(self, commit: str, path: str = "", recursive: bool = True) -> dict[str, dict]:
        """Return the entries below a folder by path, in the API's format."""
        entries, start = self.files(commit, path), f"{path}/" if path else ""
        for folder in {str(f) for name in entries for f in PurePosixPath(name).parents} - {"."}:
            oid = git_hash(json.dumps(self.files(commit, folder)).encode())
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        below = {
            name: name.removeprefix(start) for name in sorted(entries) if name.startswith(start)
        }
        return {name: entries[name] for name in below if recursive or "/" not in below[name]}

    def file(self, commit: str, path: str) -> tuple[Path, str]:
        """Return the path of a file's content, and its hash."""
        file, headers = self.files(commit, path).get(path), {"X-Repo-Commit": commit}
        require(file, 404, f"{path} does not exist", "EntryNotFound", **headers)
        oid = file.get("lfs", file)["oid"]
        return self.objects / oid, oid

    def info(self, commit: str) -> dict:
        """Return the repository's entry in the API's format."""
        files, data = self.files(commit), {}
        with suppress(
            HTTPException, ValueError, TypeError, yaml.YAMLError
        ):  # a missing or malformed card
            card = RepoCard(self.file(commit, "README.md")[0].read_text(errors="replace"))
            text = json.dumps(card.data.to_dict(), default=str)  # dates become text; NaN, null
            data = json.loads(text, parse_constant=lambda name: None)
        siblings = [f | {"rfilename": path, "blobId": f["oid"]} for path, f in files.items()]
        info = {"id": self.name, "sha": commit, "lastModified": self.log(commit)[0]["date"]}
        info |= {"private": self.state["private"], "sdk": self.state["sdk"], "gated": False}
        info |= {"tags": [], "siblings": siblings, "cardData": data}
        return info | {key: data.get(key) for key in ("pipeline_tag", "library_name")}

    def runtime(self) -> dict:
        """Return the state of a Space, which is stored but not run."""
        commit, hardware = self.resolve(MAIN), {"current": None, "requested": "cpu-basic"}
        stage = "STOPPED" if "app.py" in self.files(commit) else "NO_APP_FILE"
        return {"stage": stage, "sha": commit, "hardware": hardware}
