"""Publishing the Space, through the real client, to a local Hub."""

import json
import re
import sys

import deploy_space
import local_hub
import pytest
from conftest import MINE, OTHER, READER, RESULTS
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard

from pipeline import hub, space
from pipeline.errors import UserError

REPO, MODEL = "me/look", "me/digits"


@pytest.fixture
def mine(hub_server, measured_once, monkeypatch) -> HfApi:
    """The Hub as its user sees it, with a measured model on it."""
    monkeypatch.setenv("HF_TOKEN", MINE)
    monkeypatch.setattr(hub, "BACKOFF", (0.01, 0.01))
    monkeypatch.setattr(space, "POLL", 0.01)
    repo = local_hub.Repo(hub_server.root, "models", MODEL)
    repo.create({"private": False, "sdk": None, "variables": {}})
    repo.add_folder(measured_once / "models/tiny")
    return HfApi(hub_server.url, token=MINE)


def deploy(monkeypatch, *arguments: str, repo: str = REPO, model: str = MODEL) -> None:
    command = ["deploy_space.py", repo, "--model_repo", model, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    deploy_space.main()


def history(api: HfApi) -> list[str]:
    return [c.title for c in api.list_repo_commits(REPO, repo_type="space")]


def variables(api: HfApi) -> dict[str, str]:
    return {k: v.value for k, v in api.get_space_variables(REPO).items()}


def front_matter(api: HfApi) -> dict:
    file = api.hf_hub_download(REPO, "README.md", repo_type="space")
    return RepoCard.load(file).data.to_dict()


def test_a_space_is_one_commit_that_shows_one_commit_of_a_model(mine, here, monkeypatch, capsys):
    commit = mine.model_info(MODEL).sha
    deploy(monkeypatch)
    assert history(mine) == [f"Show {MODEL} @ {commit[:12]}", "initial commit"]
    names = set(mine.list_repo_files(REPO, repo_type="space"))
    assert names >= {"README.md", "app.py", "attention.py", "inference.py", "requirements.txt"}
    assert names - {".gitattributes", "README.md"} == set(space.files())
    assert variables(mine) == {"MODEL_ID": MODEL, "MODEL_REVISION": commit}
    info = mine.space_info(REPO)
    assert info.sdk == "gradio"
    front = front_matter(mine)
    assert front["models"] == [MODEL]
    assert front["preload_from_hub"] == [f"{MODEL} {','.join(hub.MODEL_FILES)} {commit}"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", front["sdk_version"])
    assert f"{REPO} is stopped: this Hub does not run it" in capsys.readouterr().out
    # Again: nothing to do, and it says so.
    deploy(monkeypatch)
    assert "Nothing has changed" in capsys.readouterr().out
    assert mine.space_info(REPO).sha == info.sha
    # The model has results now: the Space shows that commit, and loads them too.
    add = CommitOperationAdd(RESULTS, json.dumps({}).encode())
    later = mine.create_commit(MODEL, [add], commit_message="Measure").oid
    deploy(monkeypatch)
    assert variables(mine)["MODEL_REVISION"] == later
    assert f"{RESULTS} {later}" in front_matter(mine)["preload_from_hub"][0]
    assert len(history(mine)) == 3
    deploy(monkeypatch, model=f"{MODEL}@{commit}")  # and back, by the revision
    assert variables(mine)["MODEL_REVISION"] == commit


def test_a_dry_run_of_a_space_sends_nothing(mine, here, monkeypatch, capsys):
    deploy(monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"add +[\d,]+  attention\.py", printed)
    assert "Nothing was sent" in printed
    assert not mine.repo_exists(REPO, repo_type="space")


@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "api/spaces/me/look", 503),
        ("POST", "repos/create", "lose"),
        ("POST", "/variables", 503),
        ("GET", "/variables", "drop"),
        ("POST", "preupload", 429),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "lose"),
        ("GET", "/runtime", "drop"),
    ],
    ids=str,
)
def test_a_passing_fault_leaves_exactly_one_commit_of_the_space(
    mine, hub_server, here, monkeypatch, fault
):
    hub_server.faults.append(fault)
    deploy(monkeypatch)
    assert not hub_server.faults
    assert len(history(mine)) == 2
    assert variables(mine)["MODEL_ID"] == MODEL


def test_somebody_elses_commit_to_the_space_is_not_overwritten(mine, hub_server, here, monkeypatch):
    def race():
        add = CommitOperationAdd("notes.txt", b"mine")
        mine.create_commit(REPO, [add], commit_message="Other", repo_type="space")

    hub_server.faults.append(("POST", "/commit/", race))
    with pytest.raises(UserError, match="Somebody else has committed"):
        deploy(monkeypatch)
    assert history(mine) == ["Other", "initial commit"]


@pytest.mark.parametrize(
    ("token", "repo", "model", "says"),
    [
        ("", REPO, MODEL, "There is no Hub token"),
        (READER, REPO, MODEL, "may only read"),
        (OTHER, REPO, MODEL, '"me" is not yours'),
        (MINE, "look", MODEL, "is no repository name"),
        (MINE, REPO, "me/nothing", 'There is no "me/nothing"'),
        (MINE, REPO, f"{MODEL}@gone", "no such revision"),
        (MINE, REPO, "", "Say which model the Space shows"),
        (MINE, REPO, "me/empty", "is no whole model: it has no model.safetensors"),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_line(
    mine, here, monkeypatch, capfd, token, repo, model, says
):
    mine.create_repo("me/empty")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        deploy(monkeypatch, repo=repo, model=model)
    printed = capfd.readouterr()
    assert not token or token not in str(error.value) + printed.out + printed.err
    assert not mine.repo_exists(REPO, repo_type="space")


def test_a_private_model_is_not_preloaded_and_the_secret_is_asked_for(
    mine, hub_server, here, monkeypatch, capsys
):
    repo = local_hub.Repo(hub_server.root, "models", MODEL)
    repo.save_facts(repo.facts | {"private": True})
    deploy(monkeypatch)
    assert "preload_from_hub" not in front_matter(mine)
    assert "give the Space a secret HF_TOKEN" in capsys.readouterr().out


def test_where_the_hub_builds_it_is_waited_for(mine, here, monkeypatch, capsys):
    stages = ["BUILDING", "APP_STARTING", "RUNNING"]
    monkeypatch.setattr(local_hub, "_runtime", lambda files: {"stage": stages.pop(0)})
    deploy(monkeypatch)
    assert re.search(r"Running: +http://\S+/spaces/me/look\n", capsys.readouterr().out)
    assert stages == []


def test_the_end_of_the_log_is_told_where_the_build_fails(mine, here, monkeypatch):
    def logs(request, repo):
        lines = [f'data: {{"data": "step {i}\\n", "timestamp": ""}}\n\n' for i in range(40)]
        return 200, {"Content-Type": "text/event-stream"}, "".join(lines).encode()

    pattern = re.compile(f"/api/{local_hub.REPO}/logs/build")
    monkeypatch.setattr(local_hub, "ROUTES", [*local_hub.ROUTES, ("GET", pattern, False, logs)])
    monkeypatch.setattr(local_hub, "_runtime", lambda files: {"stage": "BUILD_ERROR"})
    with pytest.raises(UserError, match="ended in the stage BUILD_ERROR.\nstep 10\n") as error:
        deploy(monkeypatch)
    assert str(error.value).endswith("step 39")
