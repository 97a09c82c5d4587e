"""Steps of a publication, as the tests of `pipeline.publish` take them."""

import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from pipeline import runs
from pipeline.publish import staging
from pipeline.publish.hub import Repository

REPO = "me/digits"
MODEL = Path("models/tiny")
RESULTS = Path("results/tiny")
LICENSE = "apache-2.0"


def stage_tiny(api: HfApi, **options) -> Path:
    """Stage `models/tiny` for publication in a new folder."""
    shutil.rmtree("staged", ignore_errors=True)
    return staging.stage_model(api, MODEL, REPO, Path("staged"), **{"license": LICENSE} | options)


def record_figure(
    path: str, images: str | None = None, weights: str | None = None, content: bytes = b"png"
) -> None:
    """Add a file to the results of the model."""
    (RESULTS / path).parent.mkdir(exist_ok=True)
    (RESULTS / path).write_bytes(content)
    weights = weights or runs.sha256(MODEL / "model.safetensors")
    runs.record_files(RESULTS, {path: images}, weights)


def send(api: HfApi, create_pr: bool = False, replace: bool = False, **options) -> str:
    """Publish `models/tiny` without verifying it; return the commit. `options` of `stage_model`."""
    repository = Repository(api, REPO)
    _, parent_commit, _ = repository.check_access(create_pr=create_pr)
    folder = stage_tiny(api, **options)
    plan = repository.plan(folder, parent_commit, replace)
    plan.parent_commit = parent_commit or repository.create(private=False)
    return repository.commit(folder, plan, "Publish", create_pr)


def replace_file(api: HfApi, path: str, content: bytes, repo_type: str = "model", repo=REPO) -> str:
    """Commit one file past the pipeline; return the commit."""
    add = CommitOperationAdd(path, content)
    return api.create_commit(repo, [add], commit_message="Other", repo_type=repo_type).oid


def history(api: HfApi, repo: str = REPO, repo_type: str = "model") -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo, repo_type=repo_type)]
