"""A published model is checked as anybody would download it; what is not true fails."""

import json

import pytest

import push_to_hub
from pipeline import runs
from pipeline.data.loading import load_split
from pipeline.errors import UserError
from pipeline.evaluation.metrics import ImageClassification
from pipeline.publish.hub import MAIN, Repository
from pipeline.publish.verify import verify
from pipeline.recipe import DataArguments
from publishing import MODEL, REPO, RESULTS, replace_file, run_script, send

EVALUATION = RESULTS / "evaluation_results.json"


def push(monkeypatch, *args: str) -> None:
    run_script(monkeypatch, push_to_hub.main, REPO, "--model", str(MODEL), *args)


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
    verification = verify(Repository(api, REPO), commit, images=20)
    assert not hub_server.faults
    assert (verification.commit, verification.images) == (commit, 20)


def test_anybody_can_verify_a_public_model(api, monkeypatch, capsys):
    commit = send(api)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    repo = f"{REPO}@{commit[:8]}"
    run_script(monkeypatch, push_to_hub.main, repo, "--verify_only", "--full", "--seed", "7")
    printed = capsys.readouterr().out
    assert f"{REPO} @ {commit[:12]}" in printed
    assert "360 test images (seed 7)" in printed


@pytest.mark.slow
def test_each_verification_draws_its_own_sample(api):
    send(api)
    repository = Repository(api, REPO)
    first, second = verify(repository, images=20), verify(repository, images=20)
    assert first.seed != second.seed
    assert verify(repository, images=20, seed=first.seed) == first


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
    with pytest.raises(UserError, match=r"not of the evaluated model.*: preprocessor_config\.json"):
        verify(Repository(api, REPO))
    send(api)
    weights = bytearray((MODEL / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    replace_file(api, "model.safetensors", bytes(weights))
    with pytest.raises(UserError, match=r"not of the evaluated model.*: model\.safetensors"):
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


def test_a_forged_hash_list_fails(api):
    results = runs.read_json(EVALUATION)
    results["model"]["sha256"] = {}
    send(api)
    replace_file(api, EVALUATION.name, json.dumps(results).encode())
    with pytest.raises(UserError, match=r"not of the evaluated model.*: model\.safetensors, "):
        verify(Repository(api, REPO))


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ("accuracy", "published accuracy does not follow from the predictions"),
        ("everything", r"\d+ of 360 predictions are not the published ones"),
        pytest.param("one prediction", r"1 of 360 predictions are not", marks=pytest.mark.slow),
        pytest.param("f1", "f1 does not follow from the predictions", marks=pytest.mark.slow),
        pytest.param("short", "do not have one prediction for each", marks=pytest.mark.slow),
        pytest.param("invalid", "do not have one prediction for each", marks=pytest.mark.slow),
        pytest.param("labels", "test images are not those", marks=pytest.mark.slow),
        pytest.param("dataset", "test images are not those", marks=pytest.mark.slow),
    ],
)
def test_results_that_agree_with_their_card_and_are_not_true_fail(api, forged, message):
    results = runs.read_json(EVALUATION)
    if forged == "accuracy":
        results["accuracy"] = 1.0
    elif forged == "f1":
        results["f1"][0] = 1.0
    elif forged == "short":
        results["predictions"] = results["predictions"][:-1]
    elif forged == "invalid":
        results["predictions"][0] = 10
    elif forged == "labels":
        results["labels"] = results["labels"][::-1]
    elif forged == "dataset":
        results["dataset"]["sha256"] = "0" * 64
    else:
        split = load_split(DataArguments(dataset="digits"), "test", 32, 2)
        labels = list(split["label"])
        if forged == "everything":
            results["predictions"] = labels
        else:
            results["predictions"][7] = (results["predictions"][7] + 1) % 10
        one_hot = [[float(i == p) for i in range(10)] for p in results["predictions"]]
        scores = ImageClassification(keep_in_memory=True)
        results |= scores.compute(predictions=one_hot, references=labels)
    runs.write_json(EVALUATION, results)
    send(api)
    with pytest.raises(UserError, match=message):
        verify(Repository(api, REPO), images=None)
