import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from pipeline import runs
from pipeline.errors import UserError


def test_a_revision_follows_an_at_but_a_folder_may_have_one_in_its_name(here):
    (here / "my photos@home").mkdir()
    assert runs.split_revision("me/model@refs/pr/1") == ("me/model", "refs/pr/1")
    assert runs.split_revision("me/model") == ("me/model", None)
    assert runs.split_revision("my photos@home") == ("my photos@home", None)
    for name in ("./nowhere", "models/nothing", "/nowhere@v1"):
        with pytest.raises(UserError, match="There is no folder"):
            runs.split_revision(name)


def test_results_belong_to_the_run(here):
    (here / "models/cpu").mkdir(parents=True)
    assert runs.results_folder("models/cpu") == Path("results/cpu")
    assert runs.results_folder("models/cpu/") == Path("results/cpu")
    assert runs.results_folder("me/vit-cifar10@v1") == Path("results/vit-cifar10")


def test_the_manifest_lists_each_file_and_drops_those_that_were_replaced(here):
    folder = Path("results/run")
    (folder / "visualizations").mkdir(parents=True)
    for name in ("old.png", "new.png"):
        (folder / "visualizations" / name).write_bytes(b"png")
    runs.record_files(folder, {"evaluation_results.json": None}, "aa")
    runs.record_files(folder, {"visualizations/old.png": "user"}, "aa")
    runs.record_files(folder, {"visualizations/new.png": "dataset"}, "bb", "visualizations")
    assert runs.read_manifest(folder) == {
        "evaluation_results.json": {"weights": "aa", "images": None},
        "visualizations/new.png": {"weights": "bb", "images": "dataset"},
    }
    assert [p.name for p in (folder / "visualizations").iterdir()] == ["new.png"]


def test_links_point_to_the_last_run_and_replace_nothing_else(here, capsys):
    for run in ("a", "b"):
        (here / "results" / run / "visualizations").mkdir(parents=True)
        runs.link_results(Path("results") / run, "visualizations")
    assert Path("results/visualizations").resolve() == here / "results/b/visualizations"
    Path("results/evaluation_results.txt").write_text("an older layout")
    runs.link_results(Path("results/b"), "evaluation_results.txt")
    assert Path("results/evaluation_results.txt").read_text() == "an older layout"
    assert "was not replaced" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(here, monkeypatch):
    runs.write_json(here / "a.json", {"old": 1})

    def fail(path, *_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        runs.write_json(here / "a.json", {"new": 2})
    assert runs.read_json(here / "a.json") == {"old": 1}


def test_damaged_json_is_named(here):
    Path("results.json").write_text('{"accuracy": 0.9')
    with pytest.raises(UserError, match=r"results\.json is damaged .* create it again"):
        runs.read_json(Path("results.json"))
    assert runs.read_json(Path("nothing.json")) is None


def test_an_expired_token_on_a_public_repository_is_named(hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired00000000000000000000000000")
    with pytest.raises(UserError, match="does not accept the token, which may have expired"):
        runs.hub_commit("model", "me/public")


def test_the_commit_behind_a_name(hub_server, monkeypatch):
    from hub_fixtures import MINE

    monkeypatch.setenv("HF_TOKEN", MINE)
    HfApi(hub_server.url, token=MINE).create_repo("me/model")
    assert len(runs.hub_commit("model", "me/model")) == 40
    with pytest.raises(UserError, match='model "me/model" has no revision "v9"'):
        runs.hub_commit("model", "me/model", "v9")
    with pytest.raises(UserError, match='There is no dataset "me/model"'):
        runs.hub_commit("dataset", "me/model")


def test_text_is_utf8_whatever_the_locale(here):
    runs.write_json(Path("names.json"), {"labels": ["猫", "$"]})
    assert json.loads(Path("names.json").read_bytes().decode("utf-8"))["labels"] == ["猫", "$"]
