"""Publishing, through the real client, to a local Hub that fails on purpose."""

import json
import logging
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import push_to_hub
from hub_fixtures import MINE, OTHER, READER
from pipeline import runs
from pipeline.errors import UserError
from pipeline.publish.hub import Repository
from pipeline.publish.staging import published_files, stage
from pipeline.recipe import load_recipe
from publishing import MODEL, REPO, RESULTS, history, replace_file, run_script, send
from samples import draw_image


def push(monkeypatch, *args: str, repo: str = REPO) -> None:
    run_script(monkeypatch, push_to_hub.main, repo, "--model", str(MODEL), *args)


def record(path: str, images: str | None = None, weights: str | None = None) -> None:
    """Add a file to the results of the model."""
    (RESULTS / path).parent.mkdir(exist_ok=True)
    (RESULTS / path).write_bytes(b"png")
    weights = weights or runs.sha256(MODEL / "model.safetensors")
    runs.record_files(RESULTS, {path: images}, weights)


def large_files(server) -> list[Path]:
    """The files that the Hub keeps beside git."""
    return [file for file in server.root.rglob("lfs/**/*") if file.is_file()]


def test_a_push_is_one_commit_verified_and_then_tagged(api, monkeypatch, capsys):
    push(monkeypatch, "--tag", "v1", "--private")
    assert len(history(api)) == 2
    assert set(api.list_repo_files(REPO)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "confusion_matrix.png",
        "evaluation_results.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
    }
    info = api.model_info(REPO)
    assert info.private
    assert Repository(api, REPO).refs() == {"refs/heads/main": info.sha, "refs/tags/v1": info.sha}
    printed = capsys.readouterr().out
    assert "(new)" in printed
    assert re.search(r"Verified: .* the published predictions for 360 test images", printed, re.S)

    push(monkeypatch, "--tag", "v1")
    assert "Nothing has changed" in capsys.readouterr().out
    assert api.model_info(REPO).sha == info.sha

    record("training_curves.png")
    with pytest.raises(UserError, match="has a tag v1 already"):
        push(monkeypatch, "--tag", "v1")
    assert api.model_info(REPO).sha == info.sha


def test_without_a_name_the_model_trained_last_is_pushed_and_named(api, monkeypatch, capsys):
    (MODEL / "training.json").write_text("{}")
    run_script(monkeypatch, push_to_hub.main, REPO, "--dry_run")
    assert re.search(r"Model: +models/tiny\n", capsys.readouterr().out)


def test_a_dry_run_sends_nothing(api, monkeypatch, capsys):
    push(monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"add +[\d,]+  model.safetensors", printed)
    assert f"{api.endpoint}/{REPO} (new)" in printed
    assert (RESULTS / "model_card.md").read_text().startswith("---\nlibrary_name")
    assert not api.repo_exists(REPO)


def test_what_an_earlier_push_left_is_removed_in_the_same_commit(api):
    record("training_curves.png")
    send(api)
    assert "training_curves.png" in api.list_repo_files(REPO)
    (RESULTS / "training_curves.png").unlink()
    send(api)
    assert history(api) == ["Publish", "Publish", "initial commit"]
    assert "training_curves.png" not in api.list_repo_files(REPO)


def test_only_files_in_the_manifest_with_these_weights_are_published(measured):
    before = published_files(MODEL, RESULTS)
    for name in ("training_args.bin", "optimizer.pt", "run.log", ".env", "notes.png"):
        (MODEL / name).write_bytes(b"\x80\x04pickle")
        (RESULTS / name).write_bytes(b"\x80\x04pickle")
    record("training_curves.png", weights="0" * 64)
    record("visualizations/passport_layers.png", images="user")
    record("robustness.txt")
    assert published_files(MODEL, RESULTS) == before
    record("training_curves.png")
    record("attention_faithfulness.png")
    assert published_files(MODEL, RESULTS).keys() - before.keys() == {
        "training_curves.png",
        "attention_faithfulness.png",
    }


def test_an_overview_and_two_examples_of_the_maps_are_published(measured):
    for name in ("00003_a_layers", "00001_b_layers", "00002_c_layers", "00001_b_methods"):
        record(f"visualizations/{name}.png", images="dataset")
    record("visualizations/overview.png", images="dataset")
    published = published_files(MODEL, RESULTS)
    assert [path for path in published if path.startswith("visualizations/")] == [
        "visualizations/00001_b_layers.png",
        "visualizations/00002_c_layers.png",
        "visualizations/overview.png",
    ]


@pytest.mark.parametrize(
    "secret",
    [
        MINE,
        f"hf_{'a' * 34}",
        f"hf_oauth_{'a' * 34}",
        f"github_pat_{'1a_' * 20}",
        f"ghp_{'a' * 36}",
        "AKIAIOSFODNN7EXAMPLE",
        "-----BEGIN PRIVATE KEY-----",
    ],
)
def test_a_file_with_a_secret_is_not_staged(here, secret):
    files = {"config.json": "{}", "recipe.yaml": f"dataset: digits\nkey: {secret}\n"}
    with pytest.raises(UserError, match=r"recipe\.yaml has what looks like a secret") as error:
        stage(files, here, token=MINE)
    assert secret not in str(error.value)


def test_text_that_only_resembles_a_secret_is_staged(here):
    names = "hf_" + "hub_download_and_cache_the_file_there", "x" + "ghp_" + "a" * 36, "sk-learn"
    assert stage({"recipe.yaml": " ".join(names)}, here, MINE).keys() == {"recipe.yaml"}


def test_a_secret_in_the_recipe_stops_the_push(api):
    (MODEL / "recipe.yaml").write_text(f"dataset: digits\nhub_token: {MINE}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml has what looks like a secret"):
        send(api)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "whoami", 503),
        ("GET", "api/models/me/digits", "drop"),
        ("POST", "repos/create", 500),
        ("POST", "repos/create", "lose"),
        ("GET", "/refs", 503),
        ("POST", "validate-yaml", 429),
        pytest.param(("POST", "preupload", 429), marks=pytest.mark.slow),
        pytest.param(("POST", "objects/batch", "drop"), marks=pytest.mark.slow),
        pytest.param(("PUT", "", "drop"), marks=pytest.mark.slow),
        pytest.param(("POST", "/verify", 503), marks=pytest.mark.slow),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "lose"),
    ],
    ids=str,
)
def test_a_transient_fault_leaves_exactly_one_commit(api, hub_server, fault):
    hub_server.faults.append(fault)
    commit = send(api)
    assert not hub_server.faults
    assert history(api) == ["Publish", "initial commit"]
    assert api.model_info(REPO).sha == commit


def test_a_lost_reply_makes_no_second_pull_request(api, hub_server):
    api.create_repo(REPO)
    hub_server.faults.append(("POST", "/commit/", "lose"))
    commit = send(api, create_pr=True)
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.target_commit for ref in refs.pull_requests] == [commit]
    assert history(api) == ["initial commit"]


def test_a_pull_request_is_verified_and_its_address_printed(api, monkeypatch, capsys):
    with pytest.raises(UserError, match="There is no .* to open a pull request on"):
        push(monkeypatch, "--pr")
    api.create_repo(REPO)
    push(monkeypatch, "--pr")
    printed = capsys.readouterr().out
    assert re.search(rf"Proposed: .*{api.endpoint}/{REPO}/discussions/1\n", printed)
    assert "Verified: " in printed
    assert history(api) == ["initial commit"]
    with pytest.raises(UserError, match="can't be tagged"):
        push(monkeypatch, "--pr", "--tag", "v1")


def test_a_tag_whose_reply_is_lost_is_set_once(api, hub_server):
    repository = Repository(api, REPO)
    commit = send(api)
    hub_server.faults.append(("POST", "/tag/", "lose"))
    repository.tag("v1", commit)
    assert repository.refs()["refs/tags/v1"] == commit
    with pytest.raises(UserError, match="has a tag v1 already"):
        repository.tag("v1", api.list_repo_commits(REPO)[-1].commit_id)
    assert repository.refs()["refs/tags/v1"] == commit


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_lasting_fault_leaves_the_old_state(api, hub_server, fault):
    hub_server.faults += [("POST", "/commit/", fault)] * 3
    with pytest.raises(UserError, match=r"answered 503|can't be reached"):
        send(api)
    assert history(api) == ["initial commit"]


def test_a_large_file_lost_before_the_commit_leaves_the_old_state(api, hub_server):
    def lose_large_files():
        for file in large_files(hub_server):
            file.unlink()

    hub_server.faults.append(("POST", "/commit/", lose_large_files))
    with pytest.raises(UserError, match="answered 400 .*not uploaded"):
        send(api)
    assert history(api) == ["initial commit"]


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(api, hub_server):
    hub_server.faults.append(("POST", "/commit/", lambda: replace_file(api, "notes.txt", b"mine")))
    with pytest.raises(UserError, match="Somebody else has committed"):
        send(api)
    assert history(api) == ["Other", "initial commit"]


def test_an_interrupted_push_leaves_the_repository_as_it_was(api, hub_server):
    main = threading.main_thread().ident
    hub_server.faults.append(
        ("POST", "preupload", lambda: signal.pthread_kill(main, signal.SIGINT))
    )
    with pytest.raises(KeyboardInterrupt):
        send(api)
    assert history(api) == ["initial commit"]
    send(api)
    assert history(api) == ["Publish", "initial commit"]


def test_a_repository_deleted_meanwhile_gives_one_sentence(api, hub_server, monkeypatch):
    hub_server.faults.append(("POST", "/commit/", lambda: api.delete_repo(REPO)))
    with pytest.raises(UserError, match='There is no "me/digits"'):
        send(api)
    hub_server.faults.append(("POST", "/commit/", "lose"))
    hub_server.faults.append(("GET", "/tree/", lambda: api.delete_repo(REPO)))
    with pytest.raises(UserError, match='There is no "me/digits"'):
        push(monkeypatch, "--tag", "v1")


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (MINE, "bad name/../x", "is not a repository name"),
        (MINE, "me/bad name", "Repo id must use alphanumeric chars"),
        (MINE, "digits", "is not a repository name"),
        ("", REPO, "There is no Hub token"),
        ("hf_wrong000000000000000000000000000000", REPO, "answered 401"),
        ("hf_w\trong0000000000000000000000000000", REPO, "characters that no token has"),
        ("hf_wröng0000000000000000000000000000", REPO, "characters that no token has"),
        (READER, REPO, "read-only"),
        (MINE, "somebody/digits", '"somebody" is not yours: you own me, lab'),
        (MINE, "other/model", "answered 403"),
    ],
)
def test_a_refused_push_gives_one_sentence_without_the_token(
    api, hub_server, monkeypatch, capfd, caplog, token, repo, message
):
    caplog.set_level(logging.DEBUG)
    HfApi(hub_server.url, token=OTHER).create_repo("other/model")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        push(monkeypatch, repo=repo)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    printed = capfd.readouterr()
    if token:
        assert token not in str(error.value) + printed.out + printed.err + caplog.text
    assert not api.repo_exists(REPO)


def test_a_public_repository_is_not_taken_for_a_private_one(api, monkeypatch):
    api.create_repo(REPO)
    with pytest.raises(UserError, match="is public already"):
        push(monkeypatch, "--private")


@pytest.mark.slow
def test_no_token_and_no_pickle_in_any_object_of_the_repository(
    api, hub_server, monkeypatch, capfd, caplog
):
    caplog.set_level(logging.DEBUG)
    hub_server.faults.append(("POST", "/commit/", 500))
    push(monkeypatch, "--tag", "v1")
    repository = hub_server.root / "models/me/digits.git"
    objects = subprocess.check_output(
        ["git", "--git-dir", repository, "cat-file", "--batch-all-objects", "--batch"]
    )
    assert large_files(hub_server)
    objects += b"".join(file.read_bytes() for file in large_files(hub_server))
    printed = capfd.readouterr()
    for content in (objects, (printed.out + printed.err + caplog.text).encode()):
        assert MINE.encode() not in content
    assert b"\x80\x04\x95" not in objects


def test_results_that_are_missing_or_of_another_model_stop_the_push(api, monkeypatch):
    config = MODEL / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"not of the evaluated model; .*: config\.json"):
        push(monkeypatch)
    weights = bytearray((MODEL / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (MODEL / "model.safetensors").write_bytes(weights)
    no_results = "There are no results of models/tiny as it is now: run `make evaluate"
    with pytest.raises(UserError, match=no_results):
        push(monkeypatch)
    shutil.rmtree(RESULTS)
    with pytest.raises(UserError, match=no_results):
        push(monkeypatch)
    config.unlink()
    with pytest.raises(UserError, match=r"is incomplete: it has no config\.json"):
        push(monkeypatch)
    assert not api.repo_exists(REPO)


def test_results_in_bfloat16_stop_the_push(api, monkeypatch):
    file = RESULTS / "evaluation_results.json"
    runs.write_json(file, runs.read_json(file) | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="estimate in bfloat16: run `make evaluate"):
        push(monkeypatch)
    assert not api.repo_exists(REPO)


def test_faithfulness_of_another_model_stops_the_push(api, monkeypatch, capsys):
    hashes = runs.read_json(RESULTS / "evaluation_results.json")["model"]["sha256"]
    record("attention_faithfulness.json")
    file = RESULTS / "attention_faithfulness.json"
    runs.write_json(file, {"sha256": hashes, "images": 5, "methods": {}})
    push(monkeypatch, "--dry_run")
    assert "attention_faithfulness.json" in capsys.readouterr().out
    runs.write_json(file, {"sha256": hashes | {"config.json": "0" * 64}, "images": 5})
    with pytest.raises(UserError, match=r"not of the evaluated .*: attention_faithfulness\.json"):
        push(monkeypatch)


def test_a_published_recipe_trains_again(api):
    commit = send(api)
    published = load_recipe(f"hub:{REPO}@{commit}")
    assert published.run == "digits"
    assert published.settings == load_recipe(str(MODEL / "recipe.yaml")).settings
    assert load_recipe(f"hub:{REPO}", ["--seed=1"]).training.seed == 1
    api.create_repo("me/empty")
    with pytest.raises(UserError, match=r'"me/empty" has no recipe\.yaml'):
        load_recipe("hub:me/empty")
    with pytest.raises(UserError, match='no model "me/nothing"'):
        load_recipe("hub:me/nothing")


def test_the_snippet_of_the_card_runs(api, measured):
    send(api)
    draw_image(0).save("image.png")
    text = (measured / "staged/README.md").read_text()
    snippet = re.search("```python\n(.*?)```", text, re.DOTALL)
    answers = []
    exec(snippet[1], {"print": answers.append})
    assert len(answers[0]) == 5
    assert {"label", "score"} == set(answers[0][0])


def test_the_plan_lists_every_file_with_its_size(api):
    send(api)
    repository = Repository(api, REPO)
    staged = {"README.md": MODEL / "config.json", "new.json": MODEL / "config.json"}
    staged |= {"model.safetensors": MODEL / "model.safetensors"}
    plan = repository.plan(staged, repository.refs()["refs/heads/main"])
    assert (plan.added, plan.changed) == (["new.json"], ["README.md"])
    assert "config.json" in plan.removed
    assert ".gitattributes" not in plan.removed
    lines = [line.split() for line in plan.describe(staged).splitlines()]
    size = f"{(MODEL / 'config.json').stat().st_size:,}"
    assert ["add", size, "new.json"] in lines
    assert ["change", size, "README.md"] in lines
    assert ["remove", "config.json"] in lines
    assert lines[-1][0] == "total"
    assert json.dumps(lines).count("same") == 1
