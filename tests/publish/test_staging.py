"""What is published, and what is not: images, secrets, private names, licenses, origins."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import push_to_hub
from hub_fixtures import MINE
from pipeline import runs
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate, save
from pipeline.publish import provenance
from pipeline.publish.hub import list_files
from pipeline.publish.staging import published_files, stage
from pipeline.recipe import DataArguments, load_recipe
from pipeline.training.model import build_model, build_processor
from publishing import LICENSE, MODEL, REPO, RESULTS, record_figure, stage_tiny
from samples import image_processor, run_script

EVALUATION = RESULTS / "evaluation_results.json"
PUBLIC = {None, "0" * 64}


def edit_results(**edits) -> None:
    """Change the results of the model; a value that is a function edits the old one."""
    results = runs.read_json(EVALUATION)
    for key, value in edits.items():
        results[key] = value(results[key]) if callable(value) else value
    runs.write_json(EVALUATION, results)


def draw_map(name: str, images: str, size: int = 64) -> None:
    """Add an attention map to the results of the model."""
    record_figure(f"visualizations/{name}.png", images)
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(noise).save(RESULTS / f"visualizations/{name}.png")


def test_only_files_in_the_manifest_with_these_weights_are_published(measured):
    before = published_files(MODEL, RESULTS, PUBLIC).keys()
    for name in ("training_args.bin", "optimizer.pt", "run.log", ".env", "notes.png"):
        (MODEL / name).write_bytes(b"\x80\x04pickle")
        (RESULTS / name).write_bytes(b"\x80\x04pickle")
    record_figure("training_curves.png", weights="0" * 64)
    record_figure("robustness.txt")
    assert published_files(MODEL, RESULTS, PUBLIC).keys() == before
    record_figure("training_curves.png")
    record_figure("attention_faithfulness.png")
    assert published_files(MODEL, RESULTS, PUBLIC).keys() - before == {
        "training_curves.png",
        "attention_faithfulness.png",
    }


def test_an_overview_and_two_examples_are_published_below_500_kb(api):
    for name in ("00003_a_layers", "00001_b_layers", "00002_c_layers", "00001_b_heads", "overview"):
        draw_map(name, runs.read_json(EVALUATION)["dataset"]["sha256"], size=1300)
    assert (RESULTS / "visualizations/overview.png").stat().st_size > 3e6
    folder = stage_tiny(api)
    images = [path for path in list_files(folder) if path.endswith(".jpg")]
    assert [path for path in images if path.startswith("visualizations/")] == [
        "visualizations/00001_b_layers.jpg",
        "visualizations/00002_c_layers.jpg",
        "visualizations/overview.jpg",
    ]
    assert sum((folder / path).stat().st_size for path in images) < 500_000
    assert "](<visualizations/overview.jpg>)" in (folder / "README.md").read_text()


def test_images_of_the_user_need_the_flag(api, capsys):
    draw_map("passport_layers", "user")
    draw_map("overview", "user")
    assert not (stage_tiny(api) / "visualizations").exists()
    assert "Not published: 2 figures with your own images" in capsys.readouterr().out
    assert (stage_tiny(api, publish_images=True) / "visualizations/passport_layers.jpg").exists()


@pytest.mark.parametrize("is_public", [False, True])
def test_images_of_a_dataset_that_is_not_public_need_the_flag(api, is_public):
    draw_map("00001_b_layers", runs.read_json(EVALUATION)["dataset"]["sha256"])
    draw_map("00000_patient_layers", "1" * 64)  # of another dataset, by `make visualize DATASET=`
    api.create_repo("me/data", repo_type="dataset", private=not is_public)
    commit = api.dataset_info("me/data").sha
    dataset = {"name": "me/data", "revision": commit}
    assert provenance.is_public(api, dataset) == is_public
    assert not provenance.is_public(api, {"name": "me/other", "revision": commit})
    assert not provenance.is_public(api, {"name": "me/data", "revision": None})
    if not is_public:
        edit_results(dataset=lambda d: d | dataset)
        folder = stage_tiny(api)
        assert not [path for path in list_files(folder) if path.endswith(".jpg")]
        assert "widget" not in ModelCard.load(folder / "README.md").data.to_dict()
    else:
        maps = [path for path in list_files(stage_tiny(api)) if path.startswith("visualizations/")]
        assert maps == ["visualizations/00001_b_layers.jpg"]


@pytest.mark.parametrize(
    "secret",
    [
        MINE,
        f"hf_{'a' * 34}",
        f"hf_oauth_{'a' * 34}",
        f"hf_jwt_{'a' * 34}",
        f"api_org_{'a' * 34}",
        f"github_pat_{'1a_' * 20}",
        f"ghp_{'a' * 36}",
        "AKIAIOSFODNN7EXAMPLE",
        f"sk-proj-{'a' * 40}",
        f"AIza{'a' * 35}",
        f"ya29.{'a' * 40}",
        "xoxb-123456789012-abcdefghij",
        "https://hooks.slack.com/services/T0/B0/x",
        f"wandb_v1_{'a' * 40}",
        f"WANDB_API_KEY={'a1' * 20}",
        "https://user:password@example.org/data",
        "-----BEGIN PRIVATE KEY-----",
        "/home/alice/photos",
        "C:\\Users\\alice",
    ],
)
def test_a_file_with_a_secret_is_not_staged_and_its_place_is_named(here, secret):
    files = {"config.json": "{}", "recipe.yaml": f"dataset: digits\nkey: {secret}\n"}
    with pytest.raises(UserError, match=r"recipe\.yaml, line 2, contains what looks like") as error:
        stage(files, here, token=MINE)
    assert secret not in str(error.value)


def test_text_that_only_resembles_a_secret_is_staged(here):
    names = ["hf_" + "hub_download_and_cache_the_file_there", "x" + "ghp_" + "a" * 36, "sk-learn"]
    # Weights: four float32 numbers whose bytes hold "://" and "@".
    numbers = np.array([0.00091937, -0.00886135, 0.00050928, 0.00788891], np.float32).tobytes()
    stage({"model.safetensors": numbers + b"x://" + bytes([200, 58, 201, 64])}, here, MINE)
    (here / "model.safetensors").unlink()
    names += ["a1" * 20, "https://huggingface.co/a:b", "AIzaX", "time 12:30 me@example.org"]
    assert list_files(stage({"recipe.yaml": " ".join(names)}, here, MINE)) == ["recipe.yaml"]


@pytest.fixture
def local(api, image_folder, backbones, monkeypatch) -> Path:
    """A model of a local dataset and backbone, named by relative paths, and its results."""
    Path("data").mkdir()
    image_folder.rename("data/photos")
    Path("data/vit").symlink_to(backbones["vit"])
    options = ["--dataset=data/photos", "--model=data/vit", "--image_size=32"]
    recipe = load_recipe("cpu", [*options, "--image_size_schedule=null"])
    recipe.pin_sources(resume=False)
    assert recipe.settings["dataset"] == "./data/photos"
    model = Path("models/alice-secret-run")
    build_model(recipe.model, ["cat", "dog"]).save_pretrained(model)
    build_processor(recipe.model).save_pretrained(model)
    recipe.save(model)
    results = evaluate(str(model), recipe.data)
    results["training"] = {"run": "alice-secret-run", "model_folder": str(model), "epochs": 1.0,
                           "training_images": 30, "wall_s": 1.0, "hardware": "a CPU",
                           "precision": "no", "validation_accuracy": None}  # fmt: skip
    save(results, runs.results_folder(str(model)))
    return model


def test_local_names_run_names_and_paths_appear_in_no_published_file(api, local, monkeypatch):
    run_script(monkeypatch, push_to_hub.main, REPO, "--model", str(local))
    texts = {
        path: Path(api.hf_hub_download(REPO, path)).read_bytes()
        for path in api.list_repo_files(REPO)
    }
    for path, text in texts.items():
        for private in (b"alice", b"data/", bytes(Path.cwd()), b"models/", MINE.encode()):
            assert private not in text, (path, private)
    assert not [path for path in texts if path.endswith(".jpg")]
    data = ModelCard(texts["README.md"].decode()).data
    assert (data.datasets, data.base_model, data.license) == (None, None, None)
    assert b"`vit` (a local model), fine-tuned on `photos` (a local dataset)" in texts["README.md"]
    results = json.loads(texts["evaluation_results.json"])
    assert (results["dataset"]["name"], results["dataset"]["local"]) == ("./photos", True)
    assert yaml.safe_load(texts["recipe.yaml"])["model"] == "./vit"
    with pytest.raises(UserError, match='There is no folder "./photos"|"./vit"'):
        load_recipe(f"hub:{REPO}").pin_sources(resume=False)
    with pytest.raises(UserError, match='local dataset, "photos": set DATASET='):
        run_script(monkeypatch, push_to_hub.main, REPO, "--verify_only")
    run_script(monkeypatch, push_to_hub.main, REPO, "--verify_only", "--dataset", "data/photos")


def test_commits_are_resolved_once_and_saved_in_the_recipe(api, hub_server, here):
    for repo, repo_type in (("me/data", "dataset"), ("me/vit", "model")):
        api.create_repo(repo, repo_type=repo_type)
    commits = [api.dataset_info("me/data").sha, api.model_info("me/vit").sha]

    def load(resume: bool = False) -> list[str]:
        recipe = load_recipe("cpu", ["--dataset=me/data", "--model=me/vit"], "pinned")
        recipe.pin_sources(resume)
        recipe.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        assert recipe.settings["dataset_revision"] == recipe.data.dataset_revision
        if not resume:
            recipe.save(recipe.checkpoint_folder)
        return [recipe.data.dataset_revision, recipe.model.model_revision]

    assert load() == commits
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/vit")
    assert load(resume=True) == commits  # a resumed run keeps its own
    assert load() == [commits[0], api.model_info("me/vit").sha]


def test_equal_train_and_test_splits_are_refused():
    with pytest.raises(UserError, match="splits must differ"):
        evaluate_split = DataArguments(dataset="digits", train_split="train", test_split="train")
        provenance.load_split(evaluate_split, "test", image_processor())


def test_weights_trained_from_scratch_need_a_license(api):
    with pytest.raises(UserError, match="trained from scratch: set the license"):
        stage_tiny(api, license=None)
    assert ModelCard.load(stage_tiny(api, license="mit") / "README.md").data.license == "mit"


def test_the_license_is_that_of_the_backbone_at_its_commit(api):
    api.create_repo("me/vit")
    header = "license: other\nlicense_name: research\nlicense_link: LICENSE.md"
    card = f"---\n{header}\n---\n".encode()
    commit = api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/vit").oid
    api.upload_file(path_or_fileobj=b"# MIT", path_in_repo="README.md", repo_id="me/vit")
    recipe = {"dataset": "digits", "model": "me/vit", "model_revision": commit}
    edit_results(recipe=recipe)
    (MODEL / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    file = stage_tiny(api, license=None) / "README.md"
    data = ModelCard.load(file).data
    assert (data.license, data.license_name, data.base_model) == ("other", "research", "me/vit")
    assert data.license_link == "https://huggingface.co/me/vit/blob/main/LICENSE.md"
    assert "[research](https://huggingface.co/me/vit" in file.read_text()


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://github.com/you/code.git", "https://github.com/you/code"),
        ("https://you:token@github.com/you/code", "https://github.com/you/code"),
        ("git@github.com:you/code.git", "https://github.com/you/code"),
        ("ssh://git@gitlab.com/you/code.git", "https://gitlab.com/you/code"),
        ("/home/you/code", None),
        ("", None),
    ],
)
def test_the_code_is_linked_at_its_commit(api, monkeypatch, remote, url):
    monkeypatch.setattr(runs, "git", lambda *arguments: remote)
    assert provenance.find_code_url() == url
    edit_results(code_revision="ab" * 20 + "+changes")
    text = (stage_tiny(api) / "README.md").read_text()
    assert (f"({url}/tree/{'ab' * 20}), with uncommitted changes" in text) == bool(url)
    assert "with uncommitted changes: this commit alone may produce a different model" in text


def test_a_recipe_changed_after_the_evaluation_stops_the_push(api):
    (MODEL / "recipe.yaml").write_text("dataset: digits\nseed: 1\n")
    with pytest.raises(UserError, match="recipe of models/tiny does not match its results"):
        stage_tiny(api)


def test_the_model_pushed_last_is_recorded_and_its_space_linked(api, monkeypatch):
    options = ("--model", str(MODEL), "--license", LICENSE)
    run_script(monkeypatch, push_to_hub.main, REPO, *options)
    file, record = provenance.last_push(api.endpoint)
    assert (record["repo"], record["commit"]) == (REPO, api.model_info(REPO).sha)
    assert provenance.last_push("https://huggingface.co") is None
    runs.write_json(file, record | {"space": "me/look"})
    text = (stage_tiny(api) / "README.md").read_text()
    assert "Space [me/look](https://huggingface.co/spaces/me/look)" in text
    for other in ({"endpoint": "https://other.example"}, {"repo": "me/other"}):
        runs.write_json(file, record | {"space": "me/look"} | other)
        assert "me/look" not in (stage_tiny(api) / "README.md").read_text()
