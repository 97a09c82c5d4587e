"""Publishing the Space, through the real client, to a local Hub."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, RepoCard, SpaceRuntime

import deploy_space
from hub_fixtures import MINE, OTHER, READER
from local_hub import Repository
from pipeline import runs
from pipeline.errors import UserError
from pipeline.publish import provenance, space
from pipeline.publish.provenance import EVALUATION
from publishing import MODEL, history, replace_file
from samples import run_script

SPACE, SHOWN = "me/look", "me/digits"


@pytest.fixture
def shown(api, hub_server, monkeypatch) -> Repository:
    """The repository of a model on the Hub, which the Space shows; it isn't tried first."""
    monkeypatch.setattr(space, "POLL", 0.01)
    monkeypatch.setattr(space, "try_here", lambda folder, api: None)
    repository = Repository(hub_server.root, "models", SHOWN)
    repository.create(private=False)
    repository.add_folder(MODEL)
    return repository


def deploy(monkeypatch, *args: str, repo: str = SPACE, model: str = SHOWN) -> None:
    run_script(monkeypatch, deploy_space.main, repo, "--model", model, *args)


def shown_model(api: HfApi, revision: str = "main") -> dict[str, str]:
    file = api.hf_hub_download(SPACE, "model.json", repo_type="space", revision=revision)
    return json.loads(Path(file).read_text())


def front_matter(api: HfApi) -> dict:
    file = api.hf_hub_download(SPACE, "README.md", repo_type="space")
    return RepoCard.load(file).data.to_dict()


def set_runtimes(monkeypatch, *runtimes: dict) -> list[dict]:
    """Let the Hub, which runs no Spaces here, tell of one: each question gets the next answer."""
    answers = list(runtimes)

    def get_space_runtime(api, repo_id, **kwargs):
        commit = api.repo_info(repo_id, repo_type="space").sha
        return SpaceRuntime({"hardware": {}, "sha": commit} | answers.pop(0))

    monkeypatch.setattr(HfApi, "get_space_runtime", get_space_runtime)
    return answers


def test_a_space_is_one_commit_that_shows_one_commit_of_a_model(api, shown, monkeypatch, capsys):
    commit = api.model_info(SHOWN).sha
    deploy(monkeypatch)
    title = f"Show {SHOWN} @ {commit[:12]}"
    assert history(api, SPACE, "space") == [title, "initial commit"]
    names = set(api.list_repo_files(SPACE, repo_type="space"))
    assert names >= {"README.md", "attention.py", "requirements.txt"}
    assert names >= {path.name for path in space.SOURCE.glob("*.py")}
    published = {*space.published_files(api.model_info(SHOWN), ""), "publication.json"}
    assert names - {".gitattributes"} == published
    assert not [name for name in names if "__pycache__" in name]
    assert shown_model(api) == {"model": SHOWN, "revision": commit}
    info = api.space_info(SPACE)
    assert info.sdk == "gradio"
    front = front_matter(api)
    assert front["models"] == [SHOWN]
    assert front["thumbnail"].endswith("/spaces/me/look/resolve/main/thumbnail.jpg")
    assert front["suggested_hardware"] == "cpu-basic"
    name, files, revision = front["preload_from_hub"][0].split(" ")
    assert (name, {*files.split(",")}, revision) == (SHOWN, {*runs.MODEL_FILES}, commit)
    assert re.fullmatch(r"\d+\.\d+\.\d+", front["sdk_version"])
    assert f"spaces/{SPACE} is stopped" in capsys.readouterr().out

    deploy(monkeypatch)
    assert "No file has changed" in capsys.readouterr().out
    assert api.space_info(SPACE).sha == info.sha

    later = replace_file(api, EVALUATION, json.dumps({}).encode(), repo=SHOWN)
    deploy(monkeypatch)
    assert shown_model(api)["revision"] == later
    assert EVALUATION in front_matter(api)["preload_from_hub"][0]
    assert len(history(api, SPACE, "space")) == 3
    assert shown_model(api, info.sha)["revision"] == commit  # a commit has its model in it

    deploy(monkeypatch, model=f"{SHOWN}@{commit}")
    assert shown_model(api)["revision"] == commit


def test_a_dry_run_of_a_space_sends_nothing(api, shown, monkeypatch, capsys):
    deploy(monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"add +[\d,]+  attention\.py", printed)
    assert "Nothing was sent" in printed
    assert not api.repo_exists(SPACE, repo_type="space")


@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "api/spaces/me/look", 503),
        ("POST", "repos/create", "lose"),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "lose"),
        ("GET", "/runtime", "drop"),
    ],
    ids=str,
)
def test_a_transient_fault_leaves_exactly_one_commit_of_the_space(
    api, shown, hub_server, monkeypatch, fault
):
    hub_server.faults.append(fault)
    deploy(monkeypatch)
    assert not hub_server.faults
    assert len(history(api, SPACE, "space")) == 2
    assert shown_model(api)["model"] == SHOWN


def test_a_commit_of_somebody_else_to_the_space_is_not_overwritten(
    api, shown, hub_server, monkeypatch
):
    def race():
        replace_file(api, "notes.txt", b"mine", "space", SPACE)

    hub_server.faults.append(("POST", "/commit/", race))
    with pytest.raises(UserError, match="Somebody else committed"):
        deploy(monkeypatch)
    assert history(api, SPACE, "space") == ["Other", "initial commit"]


@pytest.mark.parametrize(
    ("token", "repo", "model", "message"),
    [
        ("", SPACE, SHOWN, "There is no Hub token"),
        (READER, SPACE, SHOWN, "read-only"),
        (OTHER, SPACE, SHOWN, 'You can\'t publish as "me"'),
        (MINE, "look", SHOWN, "is not a repository name"),
        (MINE, SPACE, "me/nothing", 'There is no "me/nothing"'),
        (MINE, SPACE, f"{SHOWN}@gone", "answered 404"),
    ],
)
def test_a_refused_deployment_gives_one_sentence(
    api, shown, monkeypatch, capfd, token, repo, model, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        deploy(monkeypatch, repo=repo, model=model)
    printed = capfd.readouterr()
    assert not token or token not in str(error.value) + printed.out + printed.err
    assert not api.repo_exists(SPACE, repo_type="space")


def test_a_private_model_is_not_preloaded_and_needs_a_secret(api, shown, monkeypatch, capsys):
    api.delete_repo(SHOWN)
    shown.create(private=True)
    shown.add_folder(MODEL)
    deploy(monkeypatch)
    assert "preload_from_hub" not in front_matter(api)
    assert "give the Space a secret HF_TOKEN" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_cannot_be_shown_is_not_published(api, hub_server, monkeypatch):
    """The staged Space is really started, in a process of its own."""
    repository = Repository(hub_server.root, "models", SHOWN)
    repository.create(private=False)
    repository.add_folder(MODEL)
    replace_file(api, "model.safetensors", b"cut", repo=SHOWN)
    with pytest.raises(UserError, match='The Space does not start: Error: The model "me/digits" c'):
        deploy(monkeypatch)
    assert not api.repo_exists(SPACE, repo_type="space")
    deploy(monkeypatch, model=f"{SHOWN}@{api.list_repo_commits(SHOWN)[1].commit_id}")
    assert api.repo_exists(SPACE, repo_type="space")


@pytest.mark.slow
@pytest.mark.parametrize("last", ["RUNNING", "SLEEPING"])
def test_the_build_is_waited_for_and_then_classifies_an_example(
    api, shown, monkeypatch, capsys, space_url, last
):
    """The running Space is one of this machine, where the address of the Hub's would be."""

    def repo_info(api, repo_id, repo_type=None, **kwargs):
        info = ask(api, repo_id, repo_type=repo_type, **kwargs)
        if repo_type == "space":
            info.host = space_url
        return info

    ask = HfApi.repo_info
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    earlier = [{"stage": s, "sha": "0" * 40} for s in ("RUNNING", "BUILD_ERROR", "SLEEPING")]
    stages = [{"stage": stage} for stage in ("BUILDING", "APP_STARTING", last)]
    left = set_runtimes(monkeypatch, *earlier, *stages)
    deploy(monkeypatch)
    printed = capsys.readouterr().out
    assert re.search(rf"http://\S+/spaces/me/look is {last.lower()}\.\n", printed)
    assert re.search(r"Answer:    cat\.png is [a-z]+ \(\d+\.\d %\)", printed)
    assert left == []


def test_a_stage_without_a_commit_counts_after_a_while(api, shown, monkeypatch):
    def get_space_runtime(api, repo_id, **kwargs):
        asked.append(repo_id)
        return SpaceRuntime({"hardware": {}, "stage": "PAUSED"})

    asked = []
    monkeypatch.setattr(space, "GRACE", 0.05)
    monkeypatch.setattr(HfApi, "get_space_runtime", get_space_runtime)
    deploy(monkeypatch)
    assert len(asked) > 1


def test_a_build_without_end_is_given_up(api, shown, monkeypatch):
    monkeypatch.setattr(space, "TIMEOUT", 0.05)
    set_runtimes(monkeypatch, *[{"stage": "BUILDING"}] * 99)
    with pytest.raises(UserError, match="still in stage 'BUILDING'"):
        deploy(monkeypatch)
    set_runtimes(monkeypatch, *[{"stage": "RUNNING", "sha": "0" * 40}] * 99)
    with pytest.raises(UserError, match="does not run"):
        deploy(monkeypatch)


def test_a_failed_build_shows_the_end_of_its_log(api, shown, monkeypatch):
    def fetch_space_logs(api, repo_id, build):
        assert build
        return (f"step {i}\n" for i in range(40))

    monkeypatch.setattr(HfApi, "fetch_space_logs", fetch_space_logs)
    set_runtimes(monkeypatch, {"stage": "BUILD_ERROR"})
    with pytest.raises(UserError, match="is in the stage BUILD_ERROR.\nstep 10\n") as error:
        deploy(monkeypatch)
    assert str(error.value).endswith("step 39")


def test_files_of_others_in_a_space_stay(api, shown, monkeypatch):
    deploy(monkeypatch)
    replace_file(api, "notes.txt", b"mine", "space", SPACE)
    replace_file(api, "app.py", b"by hand", "space", SPACE)
    with pytest.raises(UserError, match=r"did not write \(app.py\)"):
        deploy(monkeypatch)
    deploy(monkeypatch, "--replace")
    assert "notes.txt" in api.list_repo_files(SPACE, repo_type="space")


def test_an_interrupted_first_deployment_goes_on(api, shown, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            HfApi, "create_commit", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        deploy(patch)
    assert set(api.list_repo_files(SPACE, repo_type="space")) == {".gitattributes", "README.md"}
    deploy(monkeypatch)  # over the README.md that the Hub wrote
    assert front_matter(api)["models"] == [SHOWN]


def test_a_space_that_somebody_wrote_is_not_overwritten(api, shown, monkeypatch):
    api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    replace_file(api, "README.md", b"mine", "space", SPACE)
    with pytest.raises(UserError, match=r"did not write \(README.md\)"):
        deploy(monkeypatch)


def test_without_names_the_model_pushed_last_is_shown_and_the_space_recorded(
    api, shown, monkeypatch, capsys
):
    def run(*args: str) -> None:
        run_script(monkeypatch, deploy_space.main, *args)

    with pytest.raises(UserError, match="No model was pushed from this folder"):
        run()
    provenance.record_push(MODEL, api.endpoint, SHOWN, api.model_info(SHOWN).sha)
    with pytest.raises(UserError, match=rf"Publish as {SHOWN}\? .* ARGS=--yes"):
        run()
    assert f"Account:   me at {api.endpoint}" in capsys.readouterr().out
    run("--yes")
    assert api.repo_exists(SHOWN, repo_type="space")
    assert provenance.last_push(api.endpoint)[1]["space"] == SHOWN
