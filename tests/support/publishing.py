"""Steps of a publication, as the tests of `pipeline.publish` take them."""

import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from pipeline.publish import staging
from pipeline.publish.hub import Repository

REPO = "me/digits"
MODEL = Path("models/tiny")
RESULTS = Path("results/tiny")


def run_script(monkeypatch, main: Callable[[], None], *args: str) -> None:
    """Call a script's `main` with a command line."""
    monkeypatch.setattr(sys, "argv", [main.__module__, *args])
    main()


def send(api: HfApi, create_pr: bool = False) -> str:
    """Publish `models/tiny` without verifying it; return the commit."""
    repository = Repository(api, REPO)
    folder = Path("staged")
    parent_commit = repository.check_access(create_pr=create_pr)
    staged = staging.stage_model(api, MODEL, REPO, folder)
    plan = repository.plan(staged, parent_commit)
    plan.parent_commit = parent_commit or repository.create(private=False)
    return repository.commit(staged, plan, "Publish", create_pr)


def replace_file(api: HfApi, path: str, content: bytes, repo_type: str = "model", repo=REPO) -> str:
    """Commit one file past the pipeline; return the commit."""
    add = CommitOperationAdd(path, content)
    return api.create_commit(repo, [add], commit_message="Other", repo_type=repo_type).oid


def history(api: HfApi, repo: str = REPO, repo_type: str = "model") -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo, repo_type=repo_type)]
