"""Publish files as one commit to a model or a Space on the Hub, and know that it is there.

The client (`huggingface_hub`) retries uploads by itself, but neither the commit nor the small
questions before and after it: those are tried again here. The Hub is the one of HF_ENDPOINT.
"""

import hashlib
import json
import logging
import mmap
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    SpaceInfo,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from pipeline.errors import UserError

logger = logging.getLogger(__name__)
BACKOFF = (1, 2, 4, 8, 8)  # seconds between tries, as the client's own
MODEL_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")
# What else may be published, as patterns below the model's folder and that of the results.
FROM_MODEL = ("recipe.yaml",)
FROM_RESULTS = (
    "evaluation_results.json",
    "training_curves.png",
    "confusion_matrix.png",
)
# Those of attention maps, published together.
FROM_MAPS = (
    "attention_faithfulness.json",
    "attention_faithfulness.png",
    "visualizations/overview.png",
    "visualizations/*_layers.png",
)
KEPT = {".gitattributes"}  # the Hub's own: says which files are large
SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}"
    rb"|sk-[A-Za-z0-9_-]{40,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@dataclass
class Plan:
    """What a commit would do: paths by what happens to them, on top of the commit `head`."""

    head: str | None
    added: list[str]
    changed: list[str]
    removed: list[str]

    def __bool__(self):
        return bool(self.added or self.changed or self.removed)


def connect() -> HfApi:
    """The Hub, with the person's token; UserError where there is none, or it is malformed."""
    token = get_token()
    if not token:
        raise UserError("There is no Hub token: run `hf auth login`, or set HF_TOKEN.")
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library would quote it in its error
        raise UserError("The Hub token holds characters that no token has: set HF_TOKEN again.")
    return HfApi(token=token)


def check_access(
    api: HfApi,
    repo: str,
    private: bool = False,
    propose: bool = False,
    repo_type: str = "model",
) -> ModelInfo | SpaceInfo | None:
    """The repository as it is, None if it is to be made; UserError where it can't be written.

    With `propose` it is enough that the repository is there: the change is a pull request.
    """
    with in_words(api, repo):
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise UserError(f'"{repo}" is no repository name: give it as REPO=owner/name.')
        try:
            who = retry(api.whoami)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise UserError(
                f"The Hub at {api.endpoint} does not accept the token: run `hf auth login`, or "
                "set HF_TOKEN."
            ) from None
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError("The Hub token may only read: make one that may write.")
        try:
            info = retry(api.repo_info, repo, repo_type=repo_type)
        except RepositoryNotFoundError:
            info = None
        if propose and info is None:
            raise UserError(f'There is no repository "{repo}" to propose a change to.')
        owner, owned = repo.split("/")[0], [who["name"], *(org["name"] for org in who["orgs"])]
        if info is None and owner not in owned:
            raise UserError(f'"{owner}" is not yours: the token writes to {", ".join(owned)}.')
        if info is not None and not propose:
            try:
                retry(api.auth_check, repo, repo_type=repo_type, write=True)
            except HfHubHTTPError as error:
                if error.response.status_code not in (401, 403):
                    raise
                raise UserError(f'The token may not write to "{repo}".') from None
        if private and info is not None and not info.private:
            raise UserError(f'"{repo}" is public already: choose another name for a private one.')
        return info


def changed_files(digests: dict[str, str], folder: Path) -> list[str]:
    """The files whose sha256 is not the one given, or which are missing."""
    return [name for name, digest in digests.items() if _sha256(folder / name) != digest]


def published_files(model: Path, results: Path, maps: bool = False) -> dict[str, Path]:
    """What may be published and is there, by its path in the repository: nothing but this list.

    With `maps`, those of attention too. UserError if a file that makes up a model is missing.
    """
    found = {}
    from_results = FROM_RESULTS + FROM_MAPS if maps else FROM_RESULTS
    for folder, patterns in ((model, (*MODEL_FILES, *FROM_MODEL)), (results, from_results)):
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)):
                found[file.relative_to(folder).as_posix()] = file
    missing = sorted({*MODEL_FILES} - found.keys())
    if missing:
        raise UserError(f"{model} is no whole model: it has no {', '.join(missing)}.")
    return found


def stage(files: dict[str, Path], card: str, folder: Path, token: str) -> dict[str, Path]:
    """Copy the files and the card into `folder`; returns them by their path in the repository.

    UserError if one holds a secret.
    """
    staged = {path: folder / path for path in sorted([*files, "README.md"])}
    for path, file in files.items():
        staged[path].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, staged[path])
    staged["README.md"].write_text(card)
    for path, file in staged.items():
        if holds_secret(file, token):
            raise UserError(f"{path} holds what looks like a secret: nothing is published.")
    return staged


def holds_secret(file: Path, token: str) -> bool:
    if not file.stat().st_size:
        return False
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(token.encode()) >= 0 or SECRETS.search(data) is not None


def plan(
    api: HfApi,
    repo: str,
    staged: dict[str, Path],
    revision: str | None = None,
    repo_type: str = "model",
) -> Plan:
    """Compare the staged files with a revision; with None, all are new."""
    held = {}
    if revision:
        with in_words(api, repo):
            where = {"repo_type": repo_type, "revision": revision}
            listing = retry(lambda: list(api.list_repo_tree(repo, recursive=True, **where)))
        held = {f.path: f for f in listing if hasattr(f, "blob_id") and f.path not in KEPT}
    common = staged.keys() & held.keys()
    return Plan(
        head=revision,
        added=sorted(staged.keys() - held.keys()),
        changed=sorted(path for path in common if not _same(staged[path], held[path])),
        removed=sorted(held.keys() - staged.keys()),
    )


def manifest(plan: Plan, staged: dict[str, Path]) -> str:
    """Each file with its size and what happens to it."""
    fate = {path: "add" for path in plan.added} | {path: "change" for path in plan.changed}
    lines = [
        f"  {fate.get(path, 'same'):7} {file.stat().st_size:>13,}  {path}"
        for path, file in staged.items()
    ]
    return "\n".join(lines + [f"  {'remove':7} {'':13}  {path}" for path in plan.removed])


def create(
    api: HfApi, repo: str, private: bool, repo_type: str = "model", space_sdk: str | None = None
) -> str:
    """Make the repository; returns its first commit."""
    kind = {"repo_type": repo_type, "space_sdk": space_sdk}
    with in_words(api, repo):
        retry(api.create_repo, repo, private=private, exist_ok=True, **kind)
        return retry(api.repo_info, repo, repo_type=repo_type).sha


def commit(
    api: HfApi,
    repo: str,
    staged: dict[str, Path],
    plan: Plan,
    message: str,
    propose: bool = False,
    repo_type: str = "model",
) -> str:
    """Do what is planned in one commit, on top of `plan.head` or not at all; returns its hash.

    With `propose` it becomes a pull request. Where a reply is lost, the Hub is asked whether
    the commit is there before it is tried again.
    """
    with in_words(api, repo):
        before = _proposals(api, repo) if propose else {}
        for pause in (*BACKOFF, None):
            try:
                return api.create_commit(
                    repo,
                    [
                        *(
                            CommitOperationAdd(path, staged[path])
                            for path in plan.added + plan.changed
                        ),
                        *(CommitOperationDelete(path) for path in plan.removed),
                    ],
                    commit_message=message,
                    repo_type=repo_type,
                    parent_commit=plan.head,
                    create_pr=propose,
                ).oid
            except (HfHubHTTPError, httpx2.TransportError, RuntimeError, ValueError) as error:
                landed = _landed(api, repo, staged, plan, before if propose else None, repo_type)
                if landed:
                    return landed
                if pause is None or not _passes(error):
                    raise
            time.sleep(pause)


def tags(api: HfApi, repo: str) -> dict[str, str]:
    """The commit of each tag."""
    with in_words(api, repo):
        return {t.name: t.target_commit for t in retry(api.list_repo_refs, repo).tags}


def tag(api: HfApi, repo: str, name: str, revision: str) -> None:
    """Tag a commit; UserError if the tag stands elsewhere already."""
    with in_words(api, repo):
        try:
            retry(api.create_tag, repo, tag=name, revision=revision)
        except HfHubHTTPError:
            # There already: by a try whose reply was lost, or by somebody else.
            if tags(api, repo).get(name) != revision:
                raise


def licence(api: HfApi, name: str) -> str | None:
    """The licence that a model's own card states, if it can be had."""
    try:
        card = retry(api.model_info, name).card_data
    except (HfHubHTTPError, httpx2.TransportError, HFValidationError):
        return None
    return card.license if card else None


def retry(call, *arguments, **options):
    """Call, and again after a while where the Hub was busy or the connection broke."""
    for pause in BACKOFF:
        try:
            return call(*arguments, **options)
        except (httpx2.HTTPError, OSError, ValueError) as error:
            if not _passes(error):
                raise
            logger.warning("The Hub did not answer as it should: again in %s s.", pause)
        time.sleep(pause)
    return call(*arguments, **options)


@contextmanager
def in_words(api: HfApi, repo: str) -> Iterator[None]:
    """What goes wrong with the Hub as one sentence, in which no token can be."""
    where = f"the Hub at {api.endpoint}"
    try:
        yield
    except HFValidationError:
        raise UserError(f'"{repo}" is no repository name: give it as REPO=owner/name.') from None
    except RepositoryNotFoundError:
        raise UserError(f'There is no "{repo}" on {where}, or it is hidden from you.') from None
    except RevisionNotFoundError:
        raise UserError(f'There is no such revision of "{repo}" on {where}.') from None
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = _cause(error)
        if isinstance(cause, HfHubHTTPError):
            said = f"{where} answered {cause.response.status_code}"
            said += f" ({cause.server_message})" if cause.server_message else ""
        elif isinstance(cause, httpx2.TransportError):
            said = f"{where} can't be reached ({type(cause).__name__})"
        elif isinstance(cause, json.JSONDecodeError):
            said = f"{where} answered with something that is no JSON"
        else:
            said = " ".join(str(error).split()) or type(error).__name__
        said = said.replace(api.token, "***") if api.token else said
        raise UserError(f'"{repo}": {said}.') from None


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _same(file: Path, held) -> bool:
    """Whether the Hub holds these bytes: by sha256 for a large file, else by git's hash."""
    if held.lfs:
        return _sha256(file) == held.lfs.sha256
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == held.blob_id


def _proposals(api: HfApi, repo: str) -> dict[str, str]:
    """The commit of each pull request."""
    refs = retry(api.list_repo_refs, repo, include_pull_requests=True)
    return {p.ref: p.target_commit for p in refs.pull_requests or []}


def _landed(
    api, repo, staged, planned: Plan, before: dict[str, str] | None, repo_type: str
) -> str | None:
    """The commit that holds what is staged, if the try that seemed to fail made one."""
    if before is not None:
        new = [sha for ref, sha in _proposals(api, repo).items() if ref not in before]
        return next((sha for sha in new if not plan(api, repo, staged, sha)), None)
    head = retry(api.repo_info, repo, repo_type=repo_type).sha
    if head == planned.head:
        return None
    if plan(api, repo, staged, head, repo_type):
        raise UserError(f'Somebody else has committed to "{repo}" meanwhile: push again.')
    return head


def _cause(error: BaseException) -> BaseException:
    """The answer or broken connection beneath the client's own exceptions, if any."""
    found = error
    while found is not None and not isinstance(found, (HfHubHTTPError, httpx2.TransportError)):
        found = found.__cause__ or found.__context__
    return found or error


def _passes(error: BaseException) -> bool:
    """Whether it may go better the next time."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code == 429 or cause.response.status_code >= 500
    # No JSON: a page of a proxy between here and the Hub.
    return isinstance(cause, (httpx2.TransportError, json.JSONDecodeError))
