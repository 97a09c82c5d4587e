"""Publish files as one commit to a model or a Space on the Hub, and make sure that it arrived.

`create_commit` makes one commit; `upload_folder` may split a push into several. Each push leaves
`publication.json`, the list of what it published. A later one removes and overwrites these files
alone, and only as they were published.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.utils.sha import git_hash

from pipeline import runs
from pipeline.errors import UserError
from pipeline.publish.connection import CLIENT_ERRORS, hub_errors, retry

HUB_MANAGED_FILES = {".gitattributes"}
MAIN = "refs/heads/main"
PUBLICATION = "publication.json"  # {"files": {path: sha256 of all others}, and what the card needs}
Files = dict[str, Path]  # by their path in the repository


class Access(NamedTuple):
    """Who pushes, to which commit of main (None: a new repository), and whether it is private."""

    account: str
    commit: str | None
    private: bool


@dataclass
class Plan:
    """What a commit on top of `parent_commit` (None: a new repository) changes, by path."""

    parent_commit: str | None
    added: list[str]
    changed: list[str]
    removed: list[str]

    def __bool__(self):
        return bool(self.added or self.changed or self.removed)

    def describe(self, staged: Files) -> str:
        """List each file with its size in bytes and what happens to it."""
        status = dict.fromkeys(self.added, "add") | dict.fromkeys(self.changed, "change")
        sizes = {path: file.stat().st_size for path, file in staged.items()}
        lines = [f"  {status.get(path, 'same'):7} {sizes[path]:>13,}  {path}" for path in sizes]
        lines += [f"  {'remove':7} {'':13}  {path}" for path in self.removed]
        return "\n".join([*lines, f"  {'total':7} {sum(sizes.values()):>13,}"])


@dataclass
class Repository:
    """A model or a Space on the Hub, which may not exist yet; errors of the Hub are UserErrors."""

    api: HfApi
    name: str
    repo_type: str = "model"

    def request(self, call: Callable, **kwargs):
        """Call a method of the client on this repository; errors that last are UserErrors."""
        with hub_errors(self.api, self.name):
            return retry(call, repo_id=self.name, repo_type=self.repo_type, **kwargs)

    def check_access(self, private: bool = False, create_pr: bool = False) -> Access:
        """Return what a push would meet; UserError if it would be refused."""
        if self.name.count("/") != 1:
            raise UserError(f'"{self.name}" is not a repository name: write owner/name.')
        with hub_errors(self.api, self.name):
            user = retry(self.api.whoami)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError("The Hub token is read-only: create one with write access.")
        if not self.request(self.api.repo_exists):
            owners = [user["name"], *(organization["name"] for organization in user["orgs"])]
            if create_pr:
                raise UserError(f'There is no "{self.name}" to open a pull request on.')
            if (owner := self.name.split("/")[0]) not in owners:
                raise UserError(f'"{owner}" is not yours: you own {", ".join(owners)}.')
            return Access(user["name"], None, private)
        if not create_pr:
            self.request(self.api.auth_check, write=True)
        info = self.request(self.api.repo_info)
        if private and not info.private:
            raise UserError(f'"{self.name}" is public already: choose another name.')
        return Access(user["name"], info.sha, info.private)

    def create(self, private: bool, space_sdk: str | None = None) -> str:
        """Create the repository and return its first commit."""
        self.request(self.api.create_repo, private=private, space_sdk=space_sdk, exist_ok=True)
        return self.refs()[MAIN]

    def files(self, revision: str) -> dict[str, RepoFile]:
        """Return the files of a revision, by path."""
        entries = self.request(
            lambda **repo: list(self.api.list_repo_tree(**repo, recursive=True)), revision=revision
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def differences(self, staged: Files, remote: dict[str, RepoFile]) -> tuple[list, list]:
        """Return the staged files that a revision does not have, and those it has otherwise."""
        common = sorted(staged.keys() & remote.keys())
        changed = [path for path in common if not _is_same(staged[path], remote[path])]
        return sorted(staged.keys() - remote.keys()), changed

    def plan(self, staged: Files, revision: str | None, replace: bool = False) -> Plan:
        """Compare staged files with a revision; with None, all are new.

        Raises:
            UserError: This would overwrite what this pipeline did not write, without `replace`.
        """
        remote = self.files(revision) if revision else {}
        added, changed = self.differences(staged, remote)
        listed = self.read_publication(revision)["files"] if PUBLICATION in remote else {}
        foreign = [path for path in changed if path != PUBLICATION]
        if PUBLICATION not in remote:
            foreign = sorted(remote.keys() - HUB_MANAGED_FILES)

        def is_ours(path: str) -> bool:
            return path in listed and listed[path] == self._sha256(remote[path], revision)

        foreign = [path for path in foreign if not is_ours(path)]
        if foreign and not replace:
            names = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
            raise UserError(
                f'"{self.name}" has files that this pipeline did not write ({names}): check the '
                "name, or overwrite those that are in the way with ARGS=--replace."
            )
        gone = sorted(listed.keys() & remote.keys() - staged.keys())
        return Plan(revision, added, changed, removed=[path for path in gone if is_ours(path)])

    def read_publication(self, revision: str) -> dict:
        """Return what the push of a revision published: see PUBLICATION."""
        try:
            publication = json.loads(self._read(PUBLICATION, revision))
            if isinstance(publication["files"], dict):
                return publication
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{PUBLICATION} of {self.name} is damaged: remove it there.")

    def _read(self, path: str, revision: str) -> bytes:
        options = {"filename": path, "revision": revision}
        with tempfile.TemporaryDirectory() as folder:
            return Path(
                self.request(self.api.hf_hub_download, **options, local_dir=folder)
            ).read_bytes()

    def _sha256(self, file: RepoFile, revision: str) -> str:
        if file.lfs:
            return file.lfs.sha256
        return hashlib.sha256(self._read(file.path, revision)).hexdigest()

    def holds(self, staged: Files, plan: Plan, sha: str) -> bool:
        """Return whether a commit is what `plan` was to make of the staged files."""
        remote = self.files(sha)
        return self.differences(staged, remote) == ([], []) and not remote.keys() & {*plan.removed}

    def commit(self, staged: Files, plan: Plan, message: str, create_pr: bool = False) -> str:
        """Make one commit on top of `plan.parent_commit`, or none; return its hash."""
        old_refs = self.refs() | {MAIN: plan.parent_commit}

        def attempt(**repo: str) -> str:
            # New operations for each attempt: create_commit changes them.
            operations = [CommitOperationAdd(p, staged[p]) for p in plan.added + plan.changed]
            operations += [CommitOperationDelete(path) for path in plan.removed]
            options = {"parent_commit": plan.parent_commit, "create_pr": create_pr, **repo}
            try:
                commit = self.api.create_commit(
                    operations=operations, commit_message=message, **options
                )
            except CLIENT_ERRORS:  # the commit may be there, and only the reply lost
                if landed := self.find_landed_commit(staged, plan, old_refs):
                    return landed
                raise
            return commit.oid

        try:
            sha = self.request(attempt)
        except UserError as error:
            raise UserError(f"{error} {self._outcome(old_refs)}") from None
        if not self.holds(staged, plan, sha):
            raise UserError(f"{self.name} @ {sha[:12]} does not hold the files that were sent.")
        return sha

    def find_landed_commit(self, staged: Files, plan: Plan, old_refs: dict[str, str]) -> str | None:
        """Return the commit that an attempt made although it failed; `old_refs` are from before."""
        new_refs = dict(self.refs().items() - old_refs.items())
        for sha in new_refs.values():
            if self.holds(staged, plan, sha):
                return sha
        if MAIN in new_refs:
            raise UserError(f'Somebody else has committed to "{self.name}" meanwhile: push again.')
        return None

    def _outcome(self, old_refs: dict[str, str]) -> str:
        """Say after a failed commit whether it landed nevertheless."""
        try:
            if self.refs() == old_refs:
                return "Nothing was committed."
        except UserError:
            pass
        return "Whether the commit landed is not known: the same command finds out."

    def refs(self) -> dict[str, str]:
        """Return the commit of each branch, tag and pull request, by ref, as `refs/pr/1`."""
        refs = self.request(self.api.list_repo_refs, include_pull_requests=True)
        return {r.ref: r.target_commit for r in refs.branches + refs.tags + refs.pull_requests}

    def tag(self, name: str, commit: str) -> None:
        """Tag a commit; UserError if the tag exists on another one."""
        self.request(self.api.create_tag, tag=name, revision=commit, exist_ok=True)
        self.check_tag(name, commit)

    def check_tag(self, name: str, commit: str | None, is_new: bool = False) -> None:
        """Raise UserError if a commit (None: one to come) can't be given this tag."""
        if not re.fullmatch(r"\w[\w.+-]*(?<!\.)(?<!\.lock)", name, re.ASCII) or ".." in name:
            raise UserError(f'"{name}" can\'t be a tag: use letters, digits, ".", "-" and "_".')
        refs = {MAIN: None} if is_new else self.refs()
        if f"refs/heads/{name}" in refs:
            raise UserError(f'"{name}" is a branch of "{self.name}": choose another tag.')
        if refs.get(f"refs/tags/{name}", commit) != commit:
            raise UserError(f'"{self.name}" has a tag {name} already: choose another.')


def _is_same(file: Path, remote: RepoFile) -> bool:
    if remote.lfs:
        return runs.sha256(file) == remote.lfs.sha256
    return git_hash(file.read_bytes()) == remote.blob_id
