"""The provenance of a model, anonymized for its card, and the record of earlier pushes."""

import re
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import TemplateError
from transformers import AutoImageProcessor

from pipeline import runs
from pipeline.data.decoding import content_hash
from pipeline.data.loading import load_split
from pipeline.data.sources import load_source
from pipeline.errors import UserError
from pipeline.publish.card import short_name
from pipeline.publish.connection import CLIENT_ERRORS, hub_errors, retry
from pipeline.recipe import RECIPE_DEFAULTS, DataArguments, data_arguments
from pipeline.recipe_checks import HUB_TRAINING_KEYS

EVALUATION = "evaluation_results.json"
RECORD = "published.json"  # in a run's results, never published: where the model was pushed
TRAINING_KEYS = (
    "epochs", "training_images", "wall_s", "hardware", "precision", "validation_accuracy",
    "validation_images", "best_step", "code_revision",
)  # fmt: skip
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, TemplateError, yaml.YAMLError)
REMOTE = r"(?:https?://(?:[^@/]+@)?|(?:ssh://)?git@)([\w.-]+)[:/](.+?)(?:\.git)?/?"  # a git URL


def anonymize(results: dict) -> dict:
    """Return results without run names and private paths: a local folder `a/b` becomes `./b`."""

    def public_name(name: str | None, revision: str | None) -> str | None:
        is_public_name = not name or revision or name == "digits"  # only the Hub has revisions
        return name if is_public_name else f"./{short_name(name)}"

    dataset, recipe, training = (results.get(key) for key in ("dataset", "recipe", "training"))
    if recipe:
        recipe = {k: v for k, v in recipe.items() if k in {*RECIPE_DEFAULTS} | HUB_TRAINING_KEYS}
        for key in {"dataset", "model"} & recipe.keys():
            recipe[key] = public_name(recipe[key], recipe.get(f"{key}_revision"))
    public = results | {
        "model": results["model"] | {"name": None, "revision": None},
        "dataset": dataset | {"name": public_name(dataset["name"], dataset["revision"])},
        "recipe": recipe,
    }
    if training:
        public["training"] = {key: training[key] for key in TRAINING_KEYS if key in training}
    return public


def evaluated_data(folder: Path, results: dict, dataset: str | None) -> DataArguments:
    """Return the data a model was evaluated on; `dataset` is another location of the dataset."""
    info = results["dataset"]
    if not dataset and info["local"] and not Path(info["name"]).expanduser().is_dir():
        name = short_name(info["name"])
        raise UserError(f'The model was evaluated on a local dataset, "{name}": set DATASET=.')
    columns = info.get("image_column"), info.get("label_column")
    data = data_arguments(str(folder), dataset or info["name"], *columns)
    if dataset:
        return data
    return replace(data, dataset_config=info["config"], dataset_revision=info["revision"])


def load_evaluated_split(folder: Path, results: dict, data: DataArguments) -> Dataset:
    """Load the decoded split of an evaluation; UserError if its images changed."""
    name, labels, source = results["dataset"]["split"], results["labels"], load_source(data)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    split = load_split(source, name, processor, names=labels)
    origin = source.origin(name).items()
    if data.dataset == results["dataset"]["name"] and not origin <= results["dataset"].items():
        raise UserError(f"The {name} images are not from the published split that the card names.")
    changed = content_hash(split) != results["dataset"]["sha256"]
    if changed or split.features["label"].names != labels:
        raise UserError(f"The {name} images are not those that the model was evaluated on.")
    return split


def is_public(api: HfApi, dataset: dict) -> bool:
    """Return whether a dataset's images are public, on the Hub or in scikit-learn."""
    if not dataset["revision"]:
        return dataset["name"] == "digits"
    with suppress(*CLIENT_ERRORS):
        info = retry(api.dataset_info, dataset["name"], revision=dataset["revision"], token=False)
        return not (info.private or info.gated)
    return False


def find_license(api: HfApi, results: dict, license: str | None) -> dict[str, str | None]:
    """Return the card's license keys: the given license, or those of the backbone's card."""
    recipe, card = results["recipe"] or {}, {}
    backbone, revision = recipe.get("model"), recipe.get("model_revision")
    if license:
        return {"license": license}
    if not backbone:
        raise UserError(
            f"The weights {'were trained from scratch' if recipe else 'have no recipe.yaml'}: set "
            'the license that you publish them under, such as ARGS="--license apache-2.0".'
        )
    with hub_errors(api, backbone), suppress(RepositoryNotFoundError):
        info = retry(api.model_info, backbone, revision=revision) if revision else None
        card = info.card_data.to_dict() if info and info.card_data else {}
    facts = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    if facts["license_link"] and "://" not in facts["license_link"]:  # the backbone's file
        page = f"https://huggingface.co/{backbone}/blob/main"
        facts["license_link"] = f"{page}/{facts['license_link']}"
    return facts


def find_dashboard(api: HfApi, model: Path) -> str | None:
    """Return the URL of the trackio Space that a run reported to, if it is public."""
    space = (runs.read_json(model / "training.json") or {}).get("dashboard")
    with suppress(*CLIENT_ERRORS):
        if space and not retry(api.space_info, space, token=False).private:
            return f"https://huggingface.co/spaces/{space}"
    return None


def find_code_url() -> str | None:
    """Return the web URL of git's remote, without credentials; None if there is none."""
    match = re.fullmatch(REMOTE, runs.git("remote", "get-url", "origin") or "")
    return f"https://{match[1]}/{match[2]}" if match else None


def read_results(model: Path) -> dict:
    """Return a model's evaluation results; UserError if there are none."""
    results = runs.read_json(runs.results_folder(str(model)) / EVALUATION)
    if results is None:
        raise UserError(f"There are no results of {model}: run `make evaluate MODEL={model}`.")
    return results


def default_name(api: HfApi, model: Path) -> str:
    """Return `account/backbone-finetuned-dataset`, the Trainer's naming scheme."""
    results = read_results(model)
    with hub_errors(api, str(model)):
        account = retry(api.whoami)["name"]
    backbone = (results["recipe"] or {}).get("model") or "vit"
    parts = [short_name(name) for name in (backbone, results["dataset"]["name"])]
    return f"{account}/" + re.sub(r"[^\w.-]+|--+|\.\.+", "-", "-finetuned-".join(parts))


def record_push(model: Path, endpoint: str, repo: str, commit: str) -> None:
    """Save where a model was published, in its run's results."""
    folder, entry = runs.results_folder(str(model)), {"endpoint": endpoint, "repo": repo}
    space = last_record(folder, endpoint, repo).get("space")
    runs.write_json(folder / RECORD, entry | {"commit": commit, "space": space})


def last_record(folder: Path, endpoint: str, repo: str) -> dict:
    """Return the record of a run's last push, if it was to this repository; {} otherwise."""
    record = runs.read_json(folder / RECORD) or {}
    is_same = (record.get("endpoint"), record.get("repo")) == (endpoint, repo)
    return record if is_same else {}


def last_push(endpoint: str, repo: str | None = None) -> tuple[Path, dict] | None:
    """Return the file and content of the last push record, for a Hub or one repository there."""
    files = sorted(runs.RESULTS.glob(f"*/{RECORD}"), key=lambda file: -file.stat().st_mtime)
    records = ((file, runs.read_json(file)) for file in files)
    hits = (r for r in records if r[1]["endpoint"] == endpoint and repo in (None, r[1]["repo"]))
    return next(hits, None)


@contextmanager
def malformed(message: str):
    """Convert errors raised by malformed values into a UserError."""
    try:
        yield
    except MALFORMED as error:
        raise UserError(f"{message} ({type(error).__name__}: {error}).") from None
