"""Publishing, through the real client, to a local Hub that fails on purpose."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading

import push_to_hub
import pytest
from conftest import FAITHFULNESS, MINE, OTHER, READER, draw_image
from huggingface_hub import CommitOperationAdd, HfApi

from pipeline import card, hub, verification
from pipeline.errors import UserError
from pipeline.recipe import DataArguments, load_recipe

REPO = "me/digits"


@pytest.fixture
def mine(hub_server, measured, monkeypatch) -> HfApi:
    """The Hub as its user sees it, and a measured model in the folder worked in."""
    monkeypatch.setenv("HF_TOKEN", MINE)
    monkeypatch.setattr(hub, "BACKOFF", (0.01, 0.01))
    return HfApi(hub_server.url, token=MINE)


def push(monkeypatch, *arguments: str, repo: str = REPO) -> None:
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", repo, "--model", "models/tiny", *arguments])
    push_to_hub.main()


def send(api: HfApi, folder, propose: bool = False) -> str:
    """What `push` does up to the commit; returns its hash."""
    results = json.loads((folder / "results/evaluation_results.json").read_text())
    files = hub.published_files(folder / "models/tiny", folder / "results")
    text = card.render(results, REPO, "mit", list(files))
    (folder / "staged").mkdir(exist_ok=True)
    staged = hub.stage(files, text, folder / "staged", MINE)
    info = hub.check_access(api, REPO)
    plan = hub.plan(api, REPO, staged, info.sha if info else None)
    plan.head = plan.head or hub.create(api, REPO, private=False)
    return hub.commit(api, REPO, staged, plan, "Publish", propose)


def history(api: HfApi) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(REPO)]


def test_a_push_is_one_commit_verified_and_then_tagged(mine, here, monkeypatch, capsys):
    push(monkeypatch, "--tag", "v1", "--private")
    assert len(history(mine)) == 2
    assert set(mine.list_repo_files(REPO)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "confusion_matrix.png",
        "evaluation_results.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
    }
    info = mine.model_info(REPO)
    assert info.private
    assert hub.tags(mine, REPO) == {"v1": info.sha}
    assert "as at evaluation" in capsys.readouterr().out
    # Again: nothing to do, and it says so.
    push(monkeypatch, "--tag", "v1")
    assert "Nothing has changed" in capsys.readouterr().out
    assert mine.model_info(REPO).sha == info.sha
    # What was measured is another matter now: the tag is not moved.
    (here / "results/training_curves.png").write_bytes(b"png")
    with pytest.raises(UserError, match="has a tag v1 already"):
        push(monkeypatch, "--tag", "v1")
    assert mine.model_info(REPO).sha == info.sha


def test_a_dry_run_sends_nothing(mine, here, monkeypatch, capsys):
    push(monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"add +[\d,]+  model.safetensors", printed)
    assert (here / "results/model_card.md").read_text().startswith("---\nlibrary_name")
    assert not mine.repo_exists(REPO)


def test_what_an_earlier_push_left_is_removed_in_the_same_commit(mine, here):
    (here / "results/training_curves.png").write_bytes(b"png")
    send(mine, here)
    (here / "results/training_curves.png").unlink()
    shutil.rmtree(here / "staged")
    send(mine, here)
    assert history(mine) == ["Publish", "Publish", "initial commit"]
    assert "training_curves.png" not in mine.list_repo_files(REPO)


def test_only_what_is_on_the_list_is_published(mine, here):
    for name in ("training_args.bin", "optimizer.pt", "run.log", ".env"):
        (here / "models/tiny" / name).write_bytes(b"\x80\x04pickle")
        (here / "results" / name).write_bytes(b"\x80\x04pickle")
    send(mine, here)
    names = mine.list_repo_files(REPO)
    assert not [n for n in names if n.endswith((".bin", ".pt", ".log", ".env", ".pkl"))]


@pytest.mark.parametrize("secret", [MINE, "hf_" + "a" * 34, "-----BEGIN PRIVATE KEY-----"])
def test_a_secret_in_a_file_stops_the_push(mine, here, secret):
    with open(here / "models/tiny/recipe.yaml", "a") as recipe:
        recipe.write(f"key: {secret}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml holds what looks like a secret") as error:
        send(mine, here)
    assert secret not in str(error.value)
    assert not mine.repo_exists(REPO)


@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "whoami", 503),
        ("GET", "api/models/me/digits", "drop"),
        ("POST", "repos/create", 500),
        ("POST", "repos/create", "lose"),
        ("POST", "validate-yaml", 429),
        ("POST", "preupload", 429),
        ("POST", "objects/batch", "drop"),
        ("PUT", "/lfs/", "drop"),
        ("POST", "/verify", 503),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "lose"),
    ],
    ids=str,
)
def test_a_passing_fault_leaves_exactly_one_commit(mine, hub_server, here, fault):
    hub_server.faults.append(fault)
    commit = send(mine, here)
    assert not hub_server.faults
    assert history(mine) == ["Publish", "initial commit"]
    assert mine.model_info(REPO).sha == commit


def test_a_lost_reply_makes_no_second_pull_request(mine, hub_server, here):
    mine.create_repo(REPO)
    hub_server.faults.append(("POST", "/commit/", "lose"))
    commit = send(mine, here, propose=True)
    proposals = mine.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert [p.target_commit for p in proposals] == [commit]
    assert history(mine) == ["initial commit"]


def test_a_tag_whose_reply_is_lost_is_set_once(mine, hub_server, here):
    commit = send(mine, here)
    hub_server.faults.append(("POST", "/tag/", "lose"))
    hub.tag(mine, REPO, "v1", commit)
    assert hub.tags(mine, REPO) == {"v1": commit}
    with pytest.raises(UserError, match="409"):
        hub.tag(mine, REPO, "v1", mine.list_repo_commits(REPO)[-1].commit_id)


@pytest.mark.parametrize("what", [503, "drop"])
def test_a_lasting_fault_leaves_the_old_state(mine, hub_server, here, what):
    hub_server.faults += [("POST", "/commit/", what)] * 3
    with pytest.raises(UserError, match=r"answered 503|can't be reached"):
        send(mine, here)
    assert history(mine) == ["initial commit"]


def test_a_large_file_lost_before_the_commit_leaves_the_old_state(mine, hub_server, here):
    hub_server.faults.append(
        ("POST", "/commit/", lambda: [f.unlink() for f in hub_server.root.glob("lfs/*/*")])
    )
    with pytest.raises(UserError, match="answered 400 .*not uploaded"):
        send(mine, here)
    assert history(mine) == ["initial commit"]


def test_somebody_elses_commit_in_between_is_not_overwritten(mine, hub_server, here):
    def race():
        add = CommitOperationAdd("notes.txt", b"mine")
        mine.create_commit(REPO, [add], commit_message="Other")

    hub_server.faults.append(("POST", "/commit/", race))
    with pytest.raises(UserError, match="Somebody else has committed"):
        send(mine, here)
    assert history(mine) == ["Other", "initial commit"]


def test_an_interrupted_push_leaves_the_repository_as_it_was(mine, hub_server, here):
    main = threading.main_thread().ident
    hub_server.faults.append(
        ("POST", "preupload", lambda: signal.pthread_kill(main, signal.SIGINT))
    )
    with pytest.raises(KeyboardInterrupt):
        send(mine, here)
    assert history(mine) == ["initial commit"]
    send(mine, here)
    assert history(mine) == ["Publish", "initial commit"]


def test_a_repository_deleted_in_between_is_said_in_one_line(mine, hub_server, here, monkeypatch):
    hub_server.faults.append(("POST", "/commit/", lambda: mine.delete_repo(REPO)))
    with pytest.raises(UserError, match='There is no "me/digits"'):
        send(mine, here)
    hub_server.faults.append(("POST", "/commit/", "lose"))
    hub_server.faults.append(("GET", "/tree/", lambda: mine.delete_repo(REPO)))
    with pytest.raises(UserError, match='There is no "me/digits"'):
        push(monkeypatch, "--tag", "v1")


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        (MINE, "bad name/../x", "is no repository name"),
        (MINE, "digits", "is no repository name"),
        ("", REPO, "There is no Hub token"),
        ("hf_wrong000000000000000000000000000000", REPO, "does not accept the token"),
        ("hf_w\trong0000000000000000000000000000", REPO, "characters that no token has"),
        ("hf_wröng0000000000000000000000000000", REPO, "characters that no token has"),
        (READER, REPO, "may only read"),
        (MINE, "somebody/digits", '"somebody" is not yours: the token writes to me, lab'),
        (MINE, "other/model", "may not write"),
    ],
)
def test_who_may_not_push_is_told_so_in_one_line_without_the_token(
    mine, hub_server, monkeypatch, capfd, caplog, token, repo, says
):
    caplog.set_level(logging.DEBUG)
    HfApi(hub_server.url, token=OTHER).create_repo("other/model")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        push(monkeypatch, repo=repo)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    printed = capfd.readouterr()
    if token:
        assert token not in str(error.value) + printed.out + printed.err + caplog.text
    assert not mine.repo_exists(REPO)


def test_no_token_and_no_pickle_in_any_object_of_the_repository(
    mine, hub_server, here, monkeypatch, capfd, caplog
):
    caplog.set_level(logging.DEBUG)
    hub_server.faults.append(("POST", "/commit/", 500))
    push(monkeypatch, "--tag", "v1")
    repository = hub_server.root / "models/me/digits.git"
    objects = subprocess.check_output(
        ["git", "--git-dir", repository, "cat-file", "--batch-all-objects", "--batch"]
    )
    for large in hub_server.root.glob("lfs/*/*"):
        objects += large.read_bytes()
    printed = capfd.readouterr()
    for place in (objects, (printed.out + printed.err + caplog.text).encode()):
        assert MINE.encode() not in place
    assert b"\x80\x04\x95" not in objects


def test_results_that_are_missing_or_of_another_model_stop_the_push(mine, here, monkeypatch):
    config = here / "models/tiny/config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"config\.json in models/tiny is not what was evaluated"):
        push(monkeypatch)
    shutil.rmtree(here / "results")
    with pytest.raises(UserError, match="There are no results in results: run `make evaluate"):
        push(monkeypatch)
    assert not mine.repo_exists(REPO)


def test_results_of_a_first_look_stop_the_push(mine, here, monkeypatch):
    file = here / "results/evaluation_results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    with pytest.raises(UserError, match="first look, in bfloat16: run `make evaluate"):
        push(monkeypatch)
    assert not mine.repo_exists(REPO)


@pytest.mark.parametrize(
    "fault",
    [
        ("HEAD", "config.json", 503),
        ("GET", "resolve/", 503),
        ("GET", "model.safetensors", "cut"),
        ("GET", "/tree/", "drop"),
        ("HEAD", "processor_config.json", "drop"),
    ],
    ids=str,
)
def test_a_verification_gets_through_a_passing_fault(mine, hub_server, here, fault):
    commit = send(mine, here)
    hub_server.faults.append(fault)
    done = verification.verify(mine, REPO, commit, images=20)
    assert not hub_server.faults
    assert (done.commit, done.images) == (commit, 20)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "evaluation_results.json"])
def test_corrupt_bytes_of_the_right_size_fail_before_the_tag(mine, hub_server, monkeypatch, name):
    hub_server.faults.append(("GET", f"/{name}", "corrupt"))
    with pytest.raises(UserError, match=f"the download of {name} is corrupt"):
        push(monkeypatch, "--tag", "v1")
    assert not hub_server.faults
    assert hub.tags(mine, REPO) == {}


def altered(mine: HfApi, path: str, content: bytes) -> None:
    mine.create_commit(REPO, [CommitOperationAdd(path, content)], commit_message="Alter")


def test_weights_or_a_processor_changed_after_evaluation_fail(mine, here):
    send(mine, here)
    processor = here / "models/tiny/preprocessor_config.json"
    altered(mine, processor.name, processor.read_bytes().replace(b"0.5", b"0.4"))
    with pytest.raises(UserError, match=r"preprocessor_config\.json is not what was evaluated"):
        verification.verify(mine, REPO)
    send(mine, here)
    weights = bytearray((here / "models/tiny/model.safetensors").read_bytes())
    weights[-1] ^= 1
    altered(mine, "model.safetensors", bytes(weights))
    with pytest.raises(UserError, match=r"model\.safetensors is not what was evaluated"):
        verification.verify(mine, REPO)


def test_a_wrong_number_in_the_card_fails_before_the_tag(mine, here, monkeypatch):
    def render(results, *others):
        return original(results | {"accuracy": results["accuracy"] + 0.01}, *others)

    original = card.render
    monkeypatch.setattr(card, "render", render)
    with pytest.raises(UserError, match="the card gives Accuracy"):
        push(monkeypatch, "--tag", "v1")
    assert hub.tags(mine, REPO) == {}


@pytest.mark.parametrize("whole", [True, False], ids=["everything forged", "accuracy forged"])
def test_a_claim_that_the_download_does_not_keep_fails(mine, here, whole):
    """Results that agree with themselves and with their card, and are not true."""
    file = here / "results/evaluation_results.json"
    results = json.loads(file.read_text())
    results["accuracy"] = 1.0
    if whole:
        split = verification.load_splits(DataArguments(dataset="digits"), 32, 2, only="test")[
            "test"
        ]
        results["predictions"] = list(split["label"])
        results["confusion_matrix"] = [
            [n if i == j else 0 for j in range(10)] for i, n in enumerate(results["support"])
        ]
    file.write_text(json.dumps(results))
    send(mine, here)
    says = r"the download gets \d+ right, at evaluation it was 20" if whole else "not that of"
    with pytest.raises(UserError, match=says):
        verification.verify(mine, REPO, images=20)


def test_a_published_recipe_trains_again(mine, here):
    commit = send(mine, here)
    published = load_recipe(f"hub:{REPO}@{commit}")
    assert published.run == "digits"
    assert published.settings == load_recipe("models/tiny/recipe.yaml").settings
    assert load_recipe(f"hub:{REPO}", ["--seed=1"]).training.seed == 1
    mine.create_repo("me/empty")
    with pytest.raises(UserError, match=r'"me/empty" has no recipe\.yaml'):
        load_recipe("hub:me/empty")
    with pytest.raises(UserError, match='no model "me/nothing"'):
        load_recipe("hub:me/nothing")


def test_maps_are_published_if_they_are_this_models(mine, here, monkeypatch, capsys):
    results = json.loads((here / "results/evaluation_results.json").read_text())
    maps = {"sha256": results["model"]["sha256"], "images": 5, "methods": FAITHFULNESS}
    (here / "results/visualizations").mkdir()
    (here / "results/visualizations/overview.png").write_bytes(b"png")
    (here / "results/attention_faithfulness.json").write_text(json.dumps(maps))
    push(monkeypatch, "--dry_run")
    assert re.search(r"add .* visualizations/overview\.png", capsys.readouterr().out)
    maps["sha256"] = maps["sha256"] | {"model.safetensors": "0" * 64}
    (here / "results/attention_faithfulness.json").write_text(json.dumps(maps))
    push(monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    assert "maps in results are another model's: left out" in printed
    assert "overview.png" not in printed


def test_the_snippet_of_the_card_runs(mine, here, monkeypatch):
    send(mine, here)
    monkeypatch.chdir(here)
    draw_image(0).save("image.png")
    snippet = re.search("```python\n(.*?)```", (here / "staged/README.md").read_text(), re.DOTALL)
    answers = []
    exec(snippet[1], {"print": answers.append})
    assert len(answers[0]) == 5
    assert {"label", "score"} == set(answers[0][0])
