"""Publish a folder as one commit to a model or a Space on the Hub, and check that it succeeded.

`create_commit` makes one commit; `upload_folder` may split a push into several. Each push adds
`publication.json`, the list of the files that it published. A later push removes and overwrites
only files on this list, and only if they are unchanged.
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile

from pipeline.errors import UserError, shorten
from pipeline.publish.connection import CLIENT_ERRORS, hub_errors, retry

HUB_MANAGED_FILES = {".gitattributes"}
MAIN = "refs/heads/main"
PUBLICATION = "publication.json"  # {"files": {path: sha256, for all others}, facts for the card}


@dataclass
class Plan:
    """The paths that a commit on top of `parent_commit` changes; None is a new repository."""

    parent_commit: str | None
    added: list[str]
    changed: list[str]
    removed: list[str]

    def __bool__(self):
        return bool(self.added or self.changed or self.removed)

    def describe(self, folder: Path) -> str:
        """List each file with its size in bytes and the planned change."""
        status = dict.fromkeys(self.added, "add") | dict.fromkeys(self.changed, "change")
        sizes = {path: (folder / path).stat().st_size for path in list_files(folder)}
        lines = [f"  {status.get(path, 'same'):7} {sizes[path]:>13,}  {path}" for path in sizes]
        lines += [f"  {'remove':7} {'':13}  {path}" for path in self.removed]
        return "\n".join([*lines, f"  {'total':7} {sum(sizes.values()):>13,}"])


def list_files(folder: Path) -> list[str]:
    """Return all files below a folder, as paths in the repository."""
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


@dataclass
class Repository:
    """A model or a Space on the Hub, which may not exist yet; Hub errors become UserErrors."""

    api: HfApi
    name: str
    repo_type: str = "model"

    def request(self, call: Callable, **kwargs):
        """Call a client method on this repository; persistent errors become UserErrors."""
        with hub_errors(self.api, self.name):
            return retry(call, repo_id=self.name, repo_type=self.repo_type, **kwargs)

    def check_access(self, private: bool = False, create_pr: bool = False) -> tuple:
        """Return the account, main's commit (None if new), and whether the repository is private.

        Raises:
            UserError: A push would be rejected.
        """
        if self.name.count("/") != 1:
            raise UserError(f'"{self.name}" is not a repository name: use the form owner/name.')
        with hub_errors(self.api, self.name):
            user = retry(self.api.whoami)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError("The Hub token is read-only: create one with write access.")
        if self.request(self.api.repo_exists):
            if not create_pr:
                self.request(self.api.auth_check, write=True)
            info = self.request(self.api.repo_info)
            if private and not info.private:
                raise UserError(f'"{self.name}" is already public: choose another name.')
            return user["name"], info.sha, info.private
        if create_pr:
            raise UserError(f'There is no "{self.name}" to open a pull request on: push first.')
        owners = [user["name"], *(organization["name"] for organization in user["orgs"])]
        if (owner := self.name.split("/")[0]) not in owners:
            raise UserError(f'You can\'t publish as "{owner}": choose from {", ".join(owners)}.')
        return user["name"], None, private

    def create(self, private: bool, space_sdk: str | None = None) -> str:
        """Create the repository and return its first commit."""
        self.request(self.api.create_repo, private=private, space_sdk=space_sdk, exist_ok=True)
        return self.refs()[MAIN]

    def compare(self, folder: Path, revision: str) -> tuple[list[str], list[str], list[str]]:
        """Return paths only in the folder, paths that differ, and paths only in the revision."""
        options = {"revision": revision, "local_dir": folder}
        found = self.request(self.api.verify_repo_checksums, **options)
        return found.extra_paths, [file["path"] for file in found.mismatches], found.missing_paths

    def plan(self, folder: Path, revision: str | None, replace: bool = False) -> Plan:
        """Compare a folder with a revision; without a revision, all its files are new.

        Raises:
            UserError: Without `replace`, files not written by this pipeline would be overwritten.
        """
        if revision is None:
            return Plan(None, list_files(folder), [], [])
        added, changed, others = self.compare(folder, revision)
        is_known = PUBLICATION not in added
        listed = self.read_publication(revision)["files"] if is_known else {}
        paths, ours = [path for path in changed + others if path in listed], set()
        if paths:
            files = self.request(self.api.get_paths_info, paths=paths, revision=revision)
            ours = {f.path for f in files if self._sha256(f, revision) == listed[f.path]}
        at_risk = changed if is_known else changed + others
        foreign = sorted({*at_risk} - ours - {PUBLICATION, *HUB_MANAGED_FILES})
        if foreign == ["README.md"] and self.repo_type == "space":  # the Hub's, in a new Space
            is_new = len(self.request(self.api.list_repo_commits, revision=revision)) == 1
            foreign = [] if is_new else foreign
        if foreign and not replace:
            raise UserError(
                f'"{self.name}" has files that this pipeline did not write ({shorten(foreign)}): '
                "check the name, or overwrite conflicting files with ARGS=--replace."
            )
        return Plan(revision, added, changed, [path for path in others if path in ours])

    def read_publication(self, revision: str) -> dict:
        """Return the content of a revision's PUBLICATION."""
        with suppress(ValueError, KeyError, TypeError):
            publication = json.loads(self._read(PUBLICATION, revision))
            if isinstance(publication["files"], dict):
                return publication
        raise UserError(f"{PUBLICATION} of {self.name} is damaged: remove it from the repository.")

    def _read(self, path: str, revision: str) -> bytes:
        file = self.request(self.api.hf_hub_download, filename=path, revision=revision)
        return Path(file).read_bytes()

    def _sha256(self, file: RepoFile, revision: str) -> str:
        if file.lfs:
            return file.lfs.sha256
        return hashlib.sha256(self._read(file.path, revision)).hexdigest()

    def commit(self, folder: Path, plan: Plan, message: str, create_pr: bool = False) -> str:
        """Make one commit on top of `plan.parent_commit`, atomically; return its hash."""
        old_refs = self.refs() | {MAIN: plan.parent_commit}
        options = {"commit_message": message, "parent_commit": plan.parent_commit}

        def attempt(**repo: str) -> str:
            # New operations for each attempt: create_commit changes them.
            operations = [CommitOperationAdd(p, folder / p) for p in plan.added + plan.changed]
            operations += [CommitOperationDelete(path) for path in plan.removed]
            changes = {"operations": operations, "create_pr": create_pr}
            try:
                return self.api.create_commit(**repo, **changes, **options).oid
            except CLIENT_ERRORS:  # the commit may exist, with only the reply lost
                new_refs = dict(self.refs().items() - old_refs.items())
                for commit in new_refs.values():
                    added, changed, others = self.compare(folder, commit)
                    if not (added or changed or {*plan.removed} & {*others}):
                        return commit
                if MAIN in new_refs:
                    message = f'Somebody else committed to "{self.name}" meanwhile: push again.'
                    raise UserError(message) from None
                raise

        try:
            return self.request(attempt)
        except UserError as error:
            outcome = "The commit may exist: run the same command again to find out."
            with suppress(UserError):
                outcome = "Nothing was committed." if self.refs() == old_refs else outcome
            raise UserError(f"{error} {outcome}") from None

    def refs(self) -> dict[str, str]:
        """Return the commit of each branch, tag and pull request by ref, such as `refs/pr/1`."""
        refs = self.request(self.api.list_repo_refs, include_pull_requests=True)
        return {r.ref: r.target_commit for r in refs.branches + refs.tags + refs.pull_requests}

    def tag(self, name: str, commit: str) -> None:
        """Tag a commit; UserError if the tag already exists on another commit."""
        self.request(self.api.create_tag, tag=name, revision=commit, exist_ok=True)
        self.check_tag(name, commit)

    def check_tag(self, name: str, commit: str | None, is_new: bool = False) -> None:
        """Raise UserError if a commit (None if not made yet) can't be given this tag."""
        if not re.fullmatch(r"\w[\w.+-]*(?<!\.)(?<!\.lock)", name, re.ASCII) or ".." in name:
            raise UserError(f'"{name}" can\'t be a tag: use letters, digits, ".", "-" and "_".')
        refs = {MAIN: None} if is_new else self.refs()
        if f"refs/heads/{name}" in refs:
            raise UserError(f'"{name}" is a branch of "{self.name}": choose another tag.')
        if refs.get(f"refs/tags/{name}", commit) != commit:
            raise UserError(f'"{self.name}" already has a tag {name}: choose another.')
