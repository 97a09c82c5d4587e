"""Publishing, through the real client, to a local Hub that fails on purpose."""

import errno
import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from starlette.responses import Response

import push_to_hub
from hub_fixtures import MINE, OTHER, READER
from pipeline import runs
from pipeline.errors import UserError
from pipeline.publish.hub import MAIN, Repository
from pipeline.recipe import load_recipe
from publishing import (
    LICENSE,
    MODEL,
    REPO,
    RESULTS,
    history,
    record_figure,
    replace_file,
    send,
)
from samples import draw_image, run_script

pytestmark = pytest.mark.slow

HF = Path(sys.executable).with_name("hf")


def push(monkeypatch, *args: str, repo: str = REPO) -> None:
    run_script(
        monkeypatch, push_to_hub.main, repo, "--model", str(MODEL), "--license", LICENSE, *args
    )


def large_files(server) -> list[Path]:
    """The large files (LFS) that the Hub keeps."""
    return [file for file in server.root.rglob("objects/*") if len(file.name) == 64]


def test_a_push_is_one_commit_verified_and_then_tagged(api, monkeypatch, capsys):
    push(monkeypatch, "--tag", "v1", "--private")
    assert len(history(api)) == 2
    assert set(api.list_repo_files(REPO)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "confusion_matrix.png",
        "evaluation_results.json",
        "examples/00003.jpg",
        "examples/00067.jpg",
        "model.safetensors",
        "preprocessor_config.json",
        "publication.json",
        "recipe.yaml",
    }
    info = api.model_info(REPO)
    assert info.private
    assert Repository(api, REPO).refs() == {"refs/heads/main": info.sha, "refs/tags/v1": info.sha}
    printed = capsys.readouterr().out
    assert f"Account:    me at {api.endpoint}\n" in printed
    assert f"{api.endpoint}/{REPO} (new, private)\n" in printed
    assert re.search(r"Verified: .*predictions of 360 of 360 test images +verified", printed, re.S)
    assert re.search(r"NLL, ECE, OOD detection, calibration +NOT verified; ARGS=--full", printed)

    push(monkeypatch, "--tag", "v1")
    printed = capsys.readouterr().out
    assert "Nothing has changed" in printed
    assert "(existing, private)" in printed
    assert api.model_info(REPO).sha == info.sha

    record_figure("training_curves.png")
    with pytest.raises(UserError, match="already has a tag v1"):
        push(monkeypatch, "--tag", "v1")
    assert api.model_info(REPO).sha == info.sha


def test_without_a_name_the_model_trained_last_is_pushed_and_named(api, monkeypatch, capsys):
    (MODEL / "training.json").write_text("{}")
    run_script(monkeypatch, push_to_hub.main, REPO, "--dry_run", "--license", LICENSE)
    assert re.search(r"Model: +models/tiny\n", capsys.readouterr().out)


def test_a_dry_run_sends_nothing(api, monkeypatch, capsys):
    push(monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"add +[\d,]+  model.safetensors", printed)
    assert f"{api.endpoint}/{REPO} (new, public)" in printed
    assert re.search(r"total +[\d,]+\n", printed)
    assert (RESULTS / "model_card.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert not api.repo_exists(REPO)


def test_what_an_earlier_push_left_is_removed_in_the_same_commit(api):
    record_figure("training_curves.png")
    send(api)
    assert "training_curves.png" in api.list_repo_files(REPO)
    (RESULTS / "training_curves.png").unlink()
    send(api)
    assert history(api) == ["Publish", "Publish", "initial commit"]
    assert "training_curves.png" not in api.list_repo_files(REPO)


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
    with pytest.raises(UserError, match="already has a tag v1"):
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
    with pytest.raises(UserError, match="Somebody else committed"):
        send(api)
    assert history(api) == ["Other", "initial commit"]


def test_an_interrupted_push_leaves_the_repository_as_it_was(api, hub_server):
    main = threading.main_thread().ident
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
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
        ("hf_w\trong0000000000000000000000000000", REPO, "contains invalid characters"),
        ("hf_wröng0000000000000000000000000000", REPO, "contains invalid characters"),
        (READER, REPO, "read-only"),
        (MINE, "somebody/digits", 'You can\'t publish as "somebody": choose from me, lab'),
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
    with pytest.raises(UserError, match="is already public"):
        push(monkeypatch, "--private")


@pytest.mark.slow
def test_no_token_and_no_pickle_in_any_object_of_the_repository(
    api, hub_server, monkeypatch, capfd, caplog
):
    caplog.set_level(logging.DEBUG)
    hub_server.faults.append(("POST", "/commit/", 500))
    push(monkeypatch, "--tag", "v1")
    assert large_files(hub_server)
    objects = b"".join(file.read_bytes() for file in hub_server.root.rglob("objects/*"))
    printed = capfd.readouterr()
    for content in (objects, (printed.out + printed.err + caplog.text).encode()):
        assert MINE.encode() not in content
    assert b"\x80\x04\x95" not in objects


def test_results_that_are_missing_or_of_another_model_stop_the_push(api, monkeypatch):
    config = MODEL / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"belong to the evaluated model, .*: config\.json"):
        push(monkeypatch)
    weights = bytearray((MODEL / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (MODEL / "model.safetensors").write_bytes(weights)
    no_results = "There are no results of the current models/tiny: run `make evaluate"
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
    results = runs.read_json(RESULTS / "evaluation_results.json")
    hashes, data = results["model"]["sha256"], results["dataset"]["sha256"]
    record_figure("attention_faithfulness.json")
    file = RESULTS / "attention_faithfulness.json"
    for old in ({"data": "0" * 64}, {}):
        runs.write_json(file, {"sha256": hashes, "images": 5, "methods": {}} | old)
        with pytest.raises(UserError, match=r"measured on other images .* run `make visualize"):
            push(monkeypatch, "--dry_run")
    runs.write_json(file, {"sha256": hashes, "data": data, "images": 5, "methods": {}})
    push(monkeypatch, "--dry_run")
    assert "attention_faithfulness.json" in capsys.readouterr().out
    other = {"sha256": hashes | {"config.json": "0" * 64}, "data": data, "images": 5}
    runs.write_json(file, other)
    with pytest.raises(UserError, match=r"belong to the evaluated .*: attention_faithfulness\."):
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
    record_figure("training_curves.png")
    send(api)
    repository, folder = Repository(api, REPO), Path("other")
    folder.mkdir()
    for name, source in {"README.md": "config.json", "new.json": "config.json"}.items():
        shutil.copy(MODEL / source, folder / name)
    for name in ("model.safetensors", "publication.json"):
        shutil.copy(Path("staged", name), folder)
    plan = repository.plan(folder, repository.refs()[MAIN])
    assert (plan.added, plan.changed) == (["new.json"], ["README.md"])
    assert "config.json" in plan.removed
    assert ".gitattributes" not in plan.removed
    lines = [line.split() for line in plan.describe(folder).splitlines()]
    size = f"{(MODEL / 'config.json').stat().st_size:,}"
    assert ["add", size, "new.json"] in lines
    assert ["change", size, "README.md"] in lines
    assert ["remove", "config.json"] in lines
    assert lines[-1][0] == "total"
    assert json.dumps(lines).count("same") == 2


def test_files_of_others_stay_and_are_not_overwritten(api, monkeypatch, capsys):
    record_figure("training_curves.png")
    send(api)
    replace_file(api, "onnx/model.onnx", b"onnx")
    replace_file(api, "LICENSE", b"my license")
    replace_file(api, "training_curves.png", b"my curves")  # listed, but not as we published it
    (RESULTS / "training_curves.png").unlink()
    push(monkeypatch)
    assert {"onnx/model.onnx", "LICENSE", "training_curves.png"} <= {*api.list_repo_files(REPO)}
    assert "other files: LICENSE, onnx/model.onnx, training" in capsys.readouterr().out

    replace_file(api, "README.md", b"# Written by hand")
    record_figure("training_curves.png")
    before = history(api)
    with pytest.raises(UserError, match=r"did not write \(README.md, training_curves.png\)"):
        push(monkeypatch)
    assert history(api) == before
    push(monkeypatch, "--replace")
    assert Path(api.hf_hub_download(REPO, "README.md")).read_text().startswith("---")


def test_a_repository_of_another_origin_is_refused(api, monkeypatch):
    api.create_repo(REPO)
    replace_file(api, "pytorch_model.bin", b"weights")
    for token in ("--dry_run", "--tag=v1"):
        with pytest.raises(UserError, match=r"did not write \(pytorch_model.bin\): check the name"):
            push(monkeypatch, token)
    assert history(api) == ["Other", "initial commit"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": 3}'])
def test_a_damaged_list_of_published_files_is_named(api, content):
    send(api)
    replace_file(api, "publication.json", content)
    with pytest.raises(UserError, match=r"publication.json of me/digits is damaged"):
        send(api)


@pytest.mark.parametrize("tag", ["", "a b", "v1..2", ".v1", "v1.lock", "v1~", "v/1", "v1.", "-v"])
def test_what_is_no_tag_is_refused_before_the_commit(api, monkeypatch, tag):
    if tag:
        with pytest.raises(UserError, match="can't be a tag"):
            push(monkeypatch, f"--tag={tag}")
    with pytest.raises(UserError, match='"main" is a branch'):
        push(monkeypatch, "--tag=main")
    assert not api.repo_exists(REPO)


def test_a_branchs_name_is_no_tag(api, monkeypatch):
    commit = send(api)
    api.create_branch(REPO, branch="v1")
    with pytest.raises(UserError, match='"v1" is a branch'):
        push(monkeypatch, "--tag", "v1")
    assert api.model_info(REPO).sha == commit


def test_a_commit_that_fails_verification_says_how_to_go_back(api, hub_server, monkeypatch):
    corrupt = ("GET", "/config.json", "corrupt")
    hub_server.faults.append(corrupt)
    with pytest.raises(UserError, match=r"main is now \w+, not verified .*`hf repos delete"):
        push(monkeypatch, "--tag", "v1")
    first = api.model_info(REPO).sha
    record_figure("training_curves.png")
    hub_server.faults.append(corrupt)
    with pytest.raises(UserError, match="To go back to") as error:
        push(monkeypatch, "--tag", "v1")
    assert "refs/tags/v1" not in Repository(api, REPO).refs()
    for key, value in (("ENDPOINT", api.endpoint), ("HUB_OFFLINE", "0"), ("HUB_DISABLE_XET", "1")):
        monkeypatch.setenv(f"HF_{key}", value)
    for line in str(error.value).splitlines()[-2:]:
        subprocess.run(shlex.split(line.replace("hf ", f"{HF} ", 1)), check=True)
    files = api.list_repo_tree(REPO), api.list_repo_tree(REPO, revision=first)
    assert [file.path for file in files[0]] == [file.path for file in files[1]]


def test_without_a_name_the_trainers_is_shown_and_confirmed(api, monkeypatch, capsys):
    options = ("--model", str(MODEL), "--license", LICENSE)
    with pytest.raises(UserError, match=r"me/vit-finetuned-digits\? .* confirm with ARGS=--yes"):
        run_script(monkeypatch, push_to_hub.main, *options)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(UserError, match="Nothing was sent"):
        run_script(monkeypatch, push_to_hub.main, "", *options)
    assert f"{api.endpoint}/me/vit-finetuned-digits (new" in capsys.readouterr().out
    assert not api.repo_exists("me/vit-finetuned-digits")
    run_script(monkeypatch, push_to_hub.main, *options, "--yes")
    assert api.repo_exists("me/vit-finetuned-digits")


def test_progress_bars_do_not_bury_the_result(api, monkeypatch, capfd):
    push(monkeypatch)
    assert "it/s]" not in capfd.readouterr().err


def wait(seconds: int, header: str = "Retry-After") -> Response:
    return Response(status_code=429, headers={header: str(seconds)})


def test_the_hubs_wish_to_wait_is_honored(api, hub_server, monkeypatch):
    pauses = []
    monkeypatch.setattr("pipeline.publish.connection.time.sleep", pauses.append)
    hub_server.faults.append(("POST", "/commit/", wait(7)))
    hub_server.faults.append(("GET", "whoami", wait('"api";r=0;t=9', "RateLimit")))
    send(api)
    assert {7, 9} <= {*pauses}
    hub_server.faults.append(("GET", "whoami", wait(3600)))
    with pytest.raises(UserError, match="answered 429 .* asks to wait 3600 s"):
        send(api)


def test_what_the_client_has_repeated_is_not_repeated(api, hub_server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub_server.faults += [("POST", "preupload", 503)] * 12
    with pytest.raises(UserError, match="answered 503 .* Nothing was committed"):
        send(api)
    assert len(hub_server.faults) == 12 - 6  # once, and five times again


def test_a_hub_that_falls_silent_is_given_up(api, hub_server, monkeypatch):
    monkeypatch.setattr("pipeline.publish.connection.SILENCE", 0.2)
    hub_server.faults += [("POST", "/commit/", lambda: time.sleep(1))] * 3
    with pytest.raises(UserError, match=r"can't be reached \(ReadTimeout\)|Somebody|may exist"):
        send(api)


def test_after_giving_up_it_says_whether_the_commit_landed(api, hub_server):
    hub_server.faults += [("POST", "/commit/", 503)] * 3
    with pytest.raises(UserError, match="answered 503 .* Nothing was committed"):
        send(api)
    hub_server.faults.append(("POST", "/commit/", "lose"))
    hub_server.faults += [("GET", "/refs", 503)] * 7
    hub_server.faults.insert(0, ("GET", "/refs", lambda: None))  # before the commit
    with pytest.raises(UserError, match="The commit may exist: run the same command again"):
        send(api)
    hub_server.faults.clear()
    assert history(api) == ["Publish", "initial commit"]
    send(api)
    assert history(api) == ["Publish", "initial commit"]


def test_a_full_disk_gives_one_sentence(api, monkeypatch):
    def copyfile(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", copyfile)
    with pytest.raises(UserError, match=r"Cannot copy .* to .*: No space left on device"):
        push(monkeypatch)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize(
    "damage",
    [
        lambda results: results.pop("dataset"),
        lambda results: results.update(predictions="all"),
        lambda results: results.update(model=None),
    ],
)
def test_damaged_results_give_one_sentence(api, monkeypatch, damage):
    file = RESULTS / "evaluation_results.json"
    results = runs.read_json(file)
    damage(results)
    runs.write_json(file, results)
    with pytest.raises(UserError, match="results in results/tiny are damaged; run `make evaluate"):
        push(monkeypatch)
    assert not api.repo_exists(REPO)
