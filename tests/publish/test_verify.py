"""A published model is checked as anybody would download it; what is not true fails."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import push_to_hub
from pipeline import runs
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.metrics import ImageClassification
from pipeline.publish import card
from pipeline.publish.hub import MAIN, PUBLICATION, Repository
from pipeline.publish.verify import verify
from pipeline.recipe import DataArguments
from publishing import LICENSE, MODEL, REPO, RESULTS, replace_file, send
from samples import image_processor, run_script

pytestmark = pytest.mark.slow

EVALUATION = RESULTS / "evaluation_results.json"


def push(monkeypatch, *args: str) -> None:
    run_script(
        monkeypatch, push_to_hub.main, REPO, "--model", str(MODEL), "--license", LICENSE, *args
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        ("GET", "api/models/me/digits", 503),
        ("HEAD", "config.json", 503),
        ("GET", "resolve/", 503),
        ("GET", "model.safetensors", "cut"),
        ("GET", "/tree/", "drop"),
    ],
    ids=str,
)
def test_a_verification_survives_a_transient_fault(api, hub_server, fault):
    commit = send(api)
    hub_server.faults.append(fault)
    verified, checks = verify(Repository(api, REPO), commit, images=20)
    assert not hub_server.faults
    assert verified == commit
    assert "predictions of 20 of 360 test images" in checks


def test_anybody_can_verify_a_public_model(api, monkeypatch, capsys):
    commit = send(api)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    repo = f"{REPO}@{commit[:8]}"
    run_script(monkeypatch, push_to_hub.main, repo, "--verify_only", "--full", "--seed", "7")
    printed = capsys.readouterr().out
    assert f"{REPO} @ {commit[:12]}" in printed
    assert re.search(r"predictions of 360 of 360 test images +verified \(seed 7\)", printed)
    assert re.search(r"NLL, ECE, OOD detection, calibration +verified\n", printed)
    for unverified in ("training .* curves", "attention maps, .*", "other seeds, .* license"):
        assert re.search(f"{unverified} +NOT verified: as the publisher says", printed)


@pytest.mark.slow
def test_each_verification_draws_its_own_sample(api):
    send(api)
    repository = Repository(api, REPO)
    first, second = verify(repository, images=20), verify(repository, images=20)
    assert first != second
    seed = re.search(r"seed (\d+)", str(first))[1]
    assert verify(repository, images=20, seed=int(seed)) == first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "evaluation_results.json"])
def test_corrupt_bytes_of_the_right_size_fail_before_the_tag(api, hub_server, monkeypatch, name):
    hub_server.faults.append(("GET", f"/{name}", "corrupt"))
    with pytest.raises(UserError, match=f"download of {name} is corrupt"):
        push(monkeypatch, "--tag", "v1")
    assert not hub_server.faults
    assert Repository(api, REPO).refs().keys() == {MAIN}


def test_files_changed_after_the_evaluation_fail(api):
    send(api)
    processor = MODEL / "preprocessor_config.json"
    replace_file(api, processor.name, processor.read_bytes().replace(b"0.5", b"0.4"))
    with pytest.raises(UserError, match=r"belong to the evaluated .*: preprocessor_config\.json"):
        verify(Repository(api, REPO))
    send(api, replace=True)
    weights = bytearray((MODEL / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    replace_file(api, "model.safetensors", bytes(weights))
    with pytest.raises(UserError, match=r"belong to the evaluated model.*: model\.safetensors"):
        verify(Repository(api, REPO))


def test_missing_files_and_repositories_are_named(api):
    api.create_repo(REPO)
    with pytest.raises(UserError, match=r"failed\. It has no README\.md, config\.json"):
        verify(Repository(api, REPO))
    with pytest.raises(UserError, match='no "me/nothing"'):
        verify(Repository(api, "me/nothing"))
    with pytest.raises(UserError, match="answered 404 .*gone"):
        verify(Repository(api, REPO), "gone")


def test_an_edited_card_fails(api, measured):
    send(api)
    text = (measured / "staged/README.md").read_text()
    replace_file(api, "README.md", text.replace("## Usage", "Tested in hospitals.").encode())
    with pytest.raises(UserError, match=r"(?s)The card is not .*\n-## Usage\n\+Tested in hosp"):
        verify(Repository(api, REPO))


@pytest.mark.slow
def test_a_push_verifies_and_tags_its_own_commit(api, hub_server, monkeypatch):
    hub_server.faults.append(("GET", "/revision/", lambda: replace_file(api, "README.md", b"# Me")))
    push(monkeypatch, "--tag", "v1")
    refs = Repository(api, REPO).refs()
    assert refs["refs/tags/v1"] != refs[MAIN]
    with pytest.raises(UserError, match="The card is not"):
        verify(Repository(api, REPO))


def forge(api, **edits) -> None:
    """Publish with forged results; card, recipe and the list of files agree with them."""

    def edit(results: dict) -> dict:
        for key, value in edits.items():
            results[key] = value(results[key]) if callable(value) else value
        return results

    runs.write_json(EVALUATION, edit(runs.read_json(EVALUATION)))
    send(api)


def republish(api, path: str, content: bytes) -> None:
    """Replace a published file, and its hash in the list of files."""
    replace_file(api, path, content)
    listed = json.loads(Path(api.hf_hub_download(REPO, PUBLICATION)).read_text())
    listed["files"][path] = hashlib.sha256(content).hexdigest()
    replace_file(api, PUBLICATION, json.dumps(listed, indent=1).encode())


def metrics_of(predictions: list[int]) -> dict:
    """The metrics that follow from predictions of the test images."""
    labels = list(load_split(DataArguments(dataset="digits"), "test", image_processor())["label"])
    one_hot = [[float(i == p) for i in range(10)] for p in predictions]
    scores = ImageClassification(keep_in_memory=True)
    return scores.compute(predictions=one_hot, references=labels) | {"predictions": predictions}


def fails(api, message: str, images: int | None = 50) -> None:
    with pytest.raises(UserError, match=message):
        verify(Repository(api, REPO), images=images)


def test_an_empty_hash_list_fails(api):
    send(api)
    results = json.loads(Path(api.hf_hub_download(REPO, EVALUATION.name)).read_text())
    for hashes in ({}, {"model.safetensors": results["model"]["sha256"]["model.safetensors"]}):
        results["model"]["sha256"] = hashes
        republish(api, EVALUATION.name, json.dumps(results).encode())
        fails(api, r"belong to the evaluated model.*: .*config\.json")


def test_forged_predictions_outside_the_old_sample_fail(api):
    labels = list(load_split(DataArguments(dataset="digits"), "test", image_processor())["label"])
    old_sample = set(np.random.default_rng(0).permutation(360)[:100].tolist())
    predictions = runs.read_json(EVALUATION)["predictions"]
    forged = [p if i in old_sample else labels[i] for i, p in enumerate(predictions)]
    forge(api, **metrics_of(forged))
    fails(api, r"\d+ of 50 predictions are not the published ones")


@pytest.mark.parametrize("scale", [1e-4, float("nan")])
def test_a_model_whose_classes_are_all_tied_can_not_hide_forged_predictions(api, scale):
    weights = load_file(MODEL / "model.safetensors")
    head = {name: value * scale for name, value in weights.items() if name.startswith("classif")}
    save_file(weights | head, MODEL / "model.safetensors", metadata={"format": "pt"})
    hashes = runs.model_hashes(str(MODEL))
    entries = runs.read_manifest(RESULTS)
    runs.record_files(RESULTS, dict.fromkeys(entries), hashes["model.safetensors"])
    labels = list(load_split(DataArguments(dataset="digits"), "test", image_processor())["label"])
    forged = metrics_of(labels) | {"confidences": [0.1] * 360, "nll": 2.3, "ece": 0.9}
    assert forged["accuracy"] == 1
    forge(api, **forged, model=lambda model: model | {"sha256": hashes})
    fails(api, r"\d+ of 50 predictions are not the published ones")


@pytest.mark.slow
def test_one_forged_prediction_fails_the_full_verification(api):
    predictions = runs.read_json(EVALUATION)["predictions"]
    forge(api, **metrics_of([(predictions[0] + 1) % 10, *predictions[1:]]))
    fails(api, "1 of 360 predictions are not", images=None)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"accuracy": 1.0}, "published accuracy does not follow from the predictions"),
        ({"f1": lambda f1: [1.0, *f1[1:]]}, "published f1 does not follow"),
        ({"predictions": lambda p: [10, *p[1:]]}, "do not have one prediction for each"),
        (
            {"dataset": lambda d: d | {"images": 10**6}},
            "results say 1000000 images, not 360",
        ),
        (
            {"model": lambda m: m | {"parameters": 1}},
            "size or image size is not that of its results",
        ),
        ({"confidences": lambda c: [1.0] * len(c)}, "50 of 50 predictions are not"),
    ],
)
def test_forged_metrics_in_json_and_card_together_fail(api, edits, message):
    forge(api, **edits)
    fails(api, message)


@pytest.mark.parametrize("edit", [{"is_part": False}, {"published_split": "test"}])
def test_a_part_of_train_is_not_published_as_a_whole_split(api, edit):
    with pytest.raises(UserError, match="not from the published split that the card names"):
        forge(api, dataset=lambda dataset: dataset | edit)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"nll": 0.1}, r"published nll, 0\.1000, is 2\.30"),
        ({"ece": 0.9}, "published ece, 0.9000"),
        ({"ood": lambda o: o | {"threshold": 1.0}}, "published ood threshold, 1.0000"),
        ({"ood": lambda o: o | {"pass_rate": {"validation": 0.95, "test": 0.99}}},
         "published ood pass_rate test, 0.9900"),
        ({"ood": lambda o: o | {"ood_datasets": dict.fromkeys(o["ood_datasets"], 0.0)}},
         "published ood ood_datasets [a-z ]+, 0.0"),
        ({"ood": lambda o: o | {"scores": {
            name: {k: e | {"auroc_interval": [0.0, 0.1]} for k, e in table.items()}
            for name, table in o["scores"].items()}}}, "auroc_interval [01], 0.[01]000, is"),
    ],
)  # fmt: skip
def test_forged_metrics_of_probabilities_fail_the_full_verification(api, edits, message):
    forge(api, **edits)
    _, checks = verify(Repository(api, REPO), images=5)
    assert "NOT" in checks["NLL, ECE, OOD detection, calibration"]
    fails(api, message, images=None)


def test_swapped_classes_fail(api):
    config = runs.read_json(MODEL / "config.json")
    config["id2label"] |= {"0": "1", "1": "0"}
    runs.write_json(MODEL / "config.json", config)
    hashes = runs.model_hashes(str(MODEL))
    forge(api, model=lambda model: model | {"sha256": hashes})
    fails(api, "classes of the model, or their order, are not those of its results")


@pytest.mark.parametrize(
    ("key", "edit", "message"),
    [
        ("labels", lambda labels: labels[::-1], "test images are not those that the model"),
        ("predictions", lambda p: p[:-1], "do not have one prediction for each"),
    ],
)
def test_results_that_are_forged_after_the_push_fail(api, key, edit, message):
    send(api)
    results = json.loads(Path(api.hf_hub_download(REPO, EVALUATION.name)).read_text())
    results[key] = edit(results[key])
    listed = json.loads(Path(api.hf_hub_download(REPO, PUBLICATION)).read_text())
    republish(api, "README.md", card.render(results, REPO, listed).encode())
    republish(api, EVALUATION.name, json.dumps(results).encode())
    fails(api, message)


def test_an_edited_recipe_fails(api):
    send(api)
    recipe = Path(api.hf_hub_download(REPO, "recipe.yaml")).read_text()
    for edited in (yaml.safe_dump(yaml.safe_load(recipe) | {"seed": 7}), recipe + "# seed: 7\n"):
        republish(api, "recipe.yaml", edited.encode())
        fails(api, "recipe.yaml is not the recipe of the results")


def test_a_swapped_figure_fails(api):
    send(api)
    replace_file(api, "confusion_matrix.png", b"another figure")
    fails(api, r"not the published ones: confusion_matrix\.png")


def test_a_swapped_example_image_fails(api):
    send(api)
    Image.new("RGB", (32, 32), "white").save("white.jpg")
    republish(api, "examples/00003.jpg", Path("white.jpg").read_bytes())
    fails(api, r"examples/00003\.jpg is not test image 3")


@pytest.mark.parametrize(
    "name", ["pytorch_model.pkl", "modeling.py", "adapter_config.json", "model-2.safetensors"]
)
def test_an_extra_file_that_may_be_loaded_fails(api, name):
    send(api)
    replace_file(api, name, b"anything")
    fails(api, f"not on the published list: {name}")


def test_text_hidden_in_a_comment_of_the_card_fails(api):
    send(api)
    text = Path(api.hf_hub_download(REPO, "README.md")).read_text()
    republish(api, "README.md", text.replace("## Usage", "<!-- buy -->\n## Usage").encode())
    fails(api, r"(?s)The card is not .*results:\n(.*\n)?\+<!-- buy -->")


def test_a_card_of_another_version_of_the_code_says_which(api):
    forge(api, code_revision="f" * 40)
    text = Path(api.hf_hub_download(REPO, "README.md")).read_text()
    republish(api, "README.md", text.replace("## Usage", "## How to use").encode())
    fails(api, "wording differs, verify it with the code at f{40}")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("evaluation_results.json", b"{}"),
        ("evaluation_results.json", b"[1"),
        ("evaluation_results.json", b'{"model": {"sha256": 3}}'),
        ("publication.json", b'{"files": {"../../etc/passwd": "0"}}'),
        ("publication.json", b'{"files": {}, "examples": 3}'),
        ("recipe.yaml", b"\xff\xfe"),
    ],
)
def test_a_hostile_repository_gives_one_sentence(api, path, content):
    send(api)
    replace_file(api, path, content)
    with pytest.raises(UserError, match=r"^Verification of me/digits @ \w+ failed\. \S"):
        verify(Repository(api, REPO), images=5)


def test_weights_that_are_none_give_one_sentence(api):
    (MODEL / "model.safetensors").write_bytes(b"no weights")
    weights = runs.sha256(MODEL / "model.safetensors")
    entries = {"evaluation_results.json": None, "confusion_matrix.png": None}
    runs.record_files(RESULTS, entries, weights)
    hashes = runs.model_hashes(str(MODEL))
    forge(api, model=lambda model: model | {"sha256": hashes})
    fails(api, "The model can't be loaded")
