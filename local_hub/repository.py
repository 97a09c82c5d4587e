"""Repositories of the local Hub: bare git, and large files (LFS) in a folder beside git's own."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from starlette.exceptions import HTTPException

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".onnx", ".png", ".jpg", ".zip")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
POINTER_PATTERN = re.compile(POINTER.format("([0-9a-f]{64})", r"(\d+)").encode())
NAME = r"\w[\w.-]{0,95}(?<!\.git)"
ID_PATTERN = re.compile(rf"(models|datasets|spaces)/(?!.*(--|\.\.)){NAME}/{NAME}", re.ASCII)


def require(condition: object, status: int, message: str, code: str = "", **headers: str) -> None:
    """Raise an error reply unless a condition holds; `code` is the Hub's X-Error-Code."""
    if not condition:
        raise HTTPException(status, message, headers | ({"X-Error-Code": code} if code else {}))


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10 * 2**20)


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def replace(target: Path, digest: str = ""):
    """Give a file to write, which then replaces `target` if it has the sha256 `digest`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with open(Path(folder, "new"), "wb") as file:
            yield file
        require(digest in ("", sha256(Path(folder, "new"))), 400, "The content has another sha256")
        os.replace(Path(folder, "new"), target)


class Repository:
    """A model, dataset or Space: `root/kind/owner/name.git`, with its settings in `hub.json`."""

    def __init__(self, root: Path, kind: str, name: str):
        self.kind, self.name, self.owner = kind, name, name.split("/")[0]
        self.path, self.id = root.absolute() / kind / f"{name}.git", f"{kind}/{name}"
        self.lfs = self.path / "lfs"  # each has its own large files: no other gives them away

    @property
    def exists(self) -> bool:
        return ID_PATTERN.fullmatch(self.id) is not None and (self.path / "hub.json").is_file()

    @property
    def settings(self) -> dict:
        return json.loads((self.path / "hub.json").read_text())

    def save_settings(self, settings: dict) -> None:
        with replace(self.path / "hub.json") as file:
            file.write(json.dumps(settings).encode())

    def create(self, private: bool = False, sdk: str | None = None, variables: dict | None = None):
        """Make it, with a first commit that says which files are large, as the Hub does."""
        require(ID_PATTERN.fullmatch(self.id), 400, f"Invalid repository name: {self.id}")
        shutil.rmtree(self.path, ignore_errors=True)  # the rest of an interrupted creation
        self.lfs.mkdir(parents=True)
        (self.path / "blobs").mkdir()
        self.git("init", "--bare", "--quiet", "--initial-branch=main")
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
        self.commit("refs/heads/main", "initial commit", {".gitattributes": attributes.encode()})
        self.save_settings({"private": private, "sdk": sdk, "variables": variables or {}})

    def add_folder(self, folder: Path) -> None:
        """Commit a whole folder to `main`."""
        changes = {}
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            path = file.relative_to(folder).as_posix()
            if large := is_lfs(path, file.stat().st_size):
                shutil.copyfile(file, self.lfs / sha256(file))
            changes[path] = self.pointer(sha256(file)) if large else file.read_bytes()
        self.commit("refs/heads/main", f"Add {folder.name}", changes, self.resolve("main"))

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        command = ["git", "--literal-pathspecs", "--git-dir", str(self.path), *arguments]
        environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull}
        done = subprocess.run(command, input=stdin, capture_output=True, env=environment)
        require(done.returncode == 0, 400, done.stderr.decode(errors="replace"))
        return done.stdout

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, a tag, `refs/pr/N` or a hash."""
        plain = re.sub(r"[~^:@\0]", "..", revision)  # without git's other notations for commits
        done = self.git("rev-parse", "--revs-only", f"{plain}^{{commit}}").decode().split()
        require(len(done) == 1, 404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return done[0]

    def refs(self, folder: str) -> list[dict]:
        output = self.git("for-each-ref", "--format=%(refname) %(objectname)", f"refs/{folder}/")
        pairs = [line.split() for line in output.decode().splitlines()]
        return [{"name": r.split("/", 2)[2], "ref": r, "targetCommit": c} for r, c in pairs]

    def log(self, commit: str, path: str = "", limit: int = 10**6) -> list[dict]:
        """Return the commits that lead to `commit`, the latest first, as the API gives them."""
        layout = ["-z", "--date=format:%FT%T.000Z", "--format=%H%x00%an%x00%cd%x00%s%x00%b"]
        output = self.git("log", f"-{limit}", *layout, commit, *(["--", path] if path else []))
        fields, commits = output.decode(errors="replace").split("\0"), []
        for oid, author, date, title, body in zip(*(fields[i::5] for i in range(5)), strict=False):
            entry = {"id": oid, "title": title, "message": body.strip(), "date": date}
            commits.append(entry | {"authors": [{"user": author}]})
        return commits

    def tree(self, commit: str, path: str = "", recursive: bool = True) -> dict[str, dict]:
        """Return the entries below a folder, or the file, by their paths, as the API gives them."""
        options = ["-z", "-l", *(["-r", "-t"] if recursive else []), commit]
        listing = self.git("ls-tree", *options, *(["--", path, f"{path}/"] if path else []))
        entries = {}
        for line in listing.decode().split("\0")[:-1]:
            _, kind, oid, size, name = re.split(" +|\t", line, maxsplit=4)
            kind, size = ("file", int(size)) if kind == "blob" else ("directory", 0)
            if kind == "file" or not f"{path}/".startswith(f"{name}/"):  # not the folder itself
                entries[name] = {"type": kind, "oid": oid, "size": size, "path": name}
        small = [entry for entry in entries.values() if 120 < entry["size"] < 150]  # as pointers
        stdin = "".join(f"{entry['oid']}\n" for entry in small).encode()
        output = self.git("cat-file", "--batch", stdin=stdin) if small else b""
        for entry in small:
            size, output = entry["size"], output.split(b"\n", 1)[1]
            if match := POINTER_PATTERN.fullmatch(output[:size]):
                lfs = {"oid": match[1].decode(), "size": int(match[2]), "pointerSize": size}
                entry |= {"size": lfs["size"], "lfs": lfs | {"sha256": lfs["oid"]}}
            output = output[size + 1 :]
        return entries

    def file(self, commit: str, path: str) -> tuple[Path, str]:
        """Return where the content of a file lies, and its hash."""
        entry = self.tree(commit, path, recursive=False).get(path, {"type": None})
        headers = {"X-Repo-Commit": commit}
        require(entry["type"] == "file", 404, f"{path} does not exist", "EntryNotFound", **headers)
        oid = entry.get("lfs", entry)["oid"]
        if "lfs" in entry:
            return self.lfs / oid, oid
        if not (blob := self.path / "blobs" / oid).exists():  # taken out of git, to be sent
            with replace(blob) as file:
                file.write(self.git("cat-file", "blob", oid))
        return blob, oid

    def commit(self, ref: str, message: str, changes: dict, parent: str = "", author: str = "hub"):
        """Write {path: bytes, or None to delete it} as one commit, and return its hash."""

        def data(content: bytes) -> bytes:
            return b"data %d\n%b\n" % (len(content), content)

        identity = f"{author} <{author}@localhost> {int(time.time())} +0000"
        stream = [f"commit {ref}\ncommitter {identity}\n".encode(), data(message.encode())]
        stream.append(f"from {parent}\n".encode() if parent else b"")
        for path, content in changes.items():
            quoted = '"' + re.sub(r'(["\\])', r"\\\1", path).replace("\n", r"\n") + '"'
            line = f"D {quoted}\n" if content is None else f"M 100644 inline {quoted}\n"
            stream += [line.encode(), b"" if content is None else data(content)]
        self.git("fast-import", "--quiet", "--date-format=raw-permissive", stdin=b"".join(stream))
        return self.resolve(ref)

    def read_change(self, key: str, value: dict) -> tuple[str, bytes | None]:
        """Return path and content (None: deleted) of a line of a commit request."""
        path, content = value["path"].rstrip("/"), None
        allowed = "\0" not in path and not {"", ".", "..", ".git"} & {*path.lower().split("/")}
        require(allowed, 400, f"A repository can't have a file {path}")
        if key == "lfsFile":
            content = self.pointer(value["oid"])
        elif key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if match := POINTER_PATTERN.fullmatch(content):
                self.pointer(match[1].decode())
        return path, content

    def holds(self, oid: str) -> bool:
        """Tell whether a large file is here, undamaged."""
        return (self.lfs / oid).is_file() and sha256(self.lfs / oid) == oid

    def pointer(self, oid: str) -> bytes:
        """Return what stands in git for a large file that was uploaded to this repository."""
        here = re.fullmatch("[0-9a-f]{64}", oid) and (self.lfs / oid).is_file()
        require(here, 400, f"The LFS object {oid} was not uploaded to this repository")
        return POINTER.format(oid, (self.lfs / oid).stat().st_size).encode()
