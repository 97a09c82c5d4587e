"""Publish files as one commit to a model or a Space on the Hub, and make sure that it arrived.

huggingface_hub retries uploads, but neither the commit nor the requests before and after it: those
are retried here. `create_commit` makes one commit; `upload_folder` may split a push into several.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError, TransportError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from pipeline import runs
from pipeline.errors import UserError

logger = logging.getLogger(__name__)
BACKOFF = (1, 2, 4, 8, 8)  # seconds between tries, as in huggingface_hub
CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)  # what huggingface_hub raises
HUB_MANAGED_FILES = {".gitattributes"}
MAIN = "refs/heads/main"
Files = dict[str, Path]  # by their path in the repository


def connect(anonymous: bool = False) -> HfApi:
    """Return a client with the user's token, or if need be without one where `anonymous`."""
    token = get_token()
    if not token and not anonymous:
        raise UserError("There is no Hub token: run `hf auth login`, or set HF_TOKEN.")
    if token and not re.fullmatch(r"[!-~]+", token):  # HTTP libraries would quote it in the error
        raise UserError("The Hub token has characters that no token has: set HF_TOKEN again.")
    return HfApi(token=token or False)


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

    def check_access(self, private: bool = False, create_pr: bool = False) -> str | None:
        """Return the commit of main, None for a new repository; UserError if push is refused."""
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
            return None
        if not create_pr:
            self.request(self.api.auth_check, write=True)
        info = self.request(self.api.repo_info)
        if private and not info.private:
            raise UserError(f'"{self.name}" is public already: choose another name.')
        return info.sha

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

    def plan(self, staged: Files, revision: str | None) -> Plan:
        """Compare staged files with a revision; with None, all are new."""
        remote_files = self.files(revision) if revision else {}
        common = sorted(staged.keys() & remote_files.keys())
        return Plan(
            parent_commit=revision,
            added=sorted(staged.keys() - remote_files.keys()),
            changed=[path for path in common if not _is_same(staged[path], remote_files[path])],
            removed=sorted(remote_files.keys() - staged.keys() - HUB_MANAGED_FILES),
        )

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
                if landed := self.find_landed_commit(staged, old_refs):
                    return landed
                raise
            return commit.oid

        sha = self.request(attempt)
        if self.plan(staged, sha):
            raise UserError(f"{self.name} @ {sha[:12]} does not hold the files that were sent.")
        return sha

    def find_landed_commit(self, staged: Files, old_refs: dict[str, str]) -> str | None:
        """Return the commit that an attempt made although it failed; `old_refs` are from before."""
        new_refs = dict(self.refs().items() - old_refs.items())
        for sha in new_refs.values():
            if not self.plan(staged, sha):
                return sha
        if MAIN in new_refs:
            raise UserError(f'Somebody else has committed to "{self.name}" meanwhile: push again.')
        return None

    def refs(self) -> dict[str, str]:
        """Return the commit of each branch, tag and pull request, by ref, as `refs/pr/1`."""
        refs = self.request(self.api.list_repo_refs, include_pull_requests=True)
        return {r.ref: r.target_commit for r in refs.branches + refs.tags + refs.pull_requests}

    def tag(self, name: str, commit: str) -> None:
        """Tag a commit; UserError if the tag exists on another one."""
        self.request(self.api.create_tag, tag=name, revision=commit, exist_ok=True)
        self.check_tag(name, commit)

    def check_tag(self, name: str, commit: str | None) -> None:
        """Raise UserError if the tag exists on another commit, or at all for a commit to come."""
        if self.refs().get(f"refs/tags/{name}", commit) != commit:
            raise UserError(f'"{self.name}" has a tag {name} already: choose another.')


def _is_same(file: Path, remote: RepoFile) -> bool:
    if remote.lfs:
        return runs.sha256(file) == remote.lfs.sha256
    return git_hash(file.read_bytes()) == remote.blob_id


def retry(call: Callable, *args, **kwargs):
    """Call, and call again after a pause while the Hub is busy or the connection breaks."""
    for pause in BACKOFF:
        try:
            return call(*args, **kwargs)
        except CLIENT_ERRORS as error:
            if not is_transient(error):
                raise
            logger.warning("The Hub did not answer properly: trying again in %s s.", pause)
        time.sleep(pause)
    return call(*args, **kwargs)


def is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed: the Hub was busy, or the connection broke."""
    error = root_http_error(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, (TransportError, json.JSONDecodeError))  # no JSON: a proxy's page


def root_http_error(error: BaseException) -> BaseException:
    """Return the HTTP error at the root of one of the client's exceptions, else the exception."""
    cause = error
    while cause is not None and not isinstance(cause, (HfHubHTTPError, TransportError)):
        cause = cause.__cause__ or cause.__context__
    return cause or error


@contextmanager
def hub_errors(api: HfApi, repo: str) -> Iterator[None]:
    """Turn the client's exceptions into a UserError of one sentence, without the token."""
    hub = f"the Hub at {api.endpoint}"
    try:
        yield
    except RepositoryNotFoundError:
        raise UserError(f'There is no "{repo}" on {hub}, or the token has no access.') from None
    except CLIENT_ERRORS as error:
        cause = root_http_error(error)
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            reason = f"{hub} answered {status} ({cause.server_message or 'without a message'})"
            if status in (401, 403):
                reason += ": run `hf auth login` with a token that can write there"
        elif isinstance(cause, (TransportError, json.JSONDecodeError)):
            reason = f"{hub} can't be reached ({type(cause).__name__})"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.replace(api.token, "***") if api.token else reason
        raise UserError(f'"{repo}": {reason}.') from None
