"""Where a model comes from, as its card may say it, and what was published of it before."""

import re
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import TemplateError

from pipeline import runs
from pipeline.data.decoding import content_hash
from pipeline.data.loading import load_splits
from pipeline.errors import UserError
from pipeline.publish.card import short_name
from pipeline.publish.connection import CLIENT_ERRORS, hub_errors, retry
from pipeline.recipe import RECIPE_DEFAULTS, data_arguments
from pipeline.recipe_checks import HUB_TRAINING_KEYS

EVALUATION = "evaluation_results.json"
RECORD = "published.json"  # of a run's results, which stays here: what it was published as
TRAINING_KEYS = (
    "epochs", "training_images", "wall_s", "hardware", "precision", "validation_accuracy",
    "validation_images", "best_step", "code_revision",
)  # fmt: skip
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, TemplateError, yaml.YAMLError)


def anonymize(results: dict) -> dict:
    """Return results without run names and private paths: a local folder `a/b` becomes `./b`."""

    def public_name(name: str | None, revision: str | None) -> str | None:
        is_public_name = not name or revision or name == "digits"  # only the Hub has revisions
        return name if is_public_name else f"./{short_name(name)}"

    model, dataset, recipe = results["model"], results["dataset"], results["recipe"]
    dataset = dataset | {"name": public_name(dataset["name"], dataset["revision"])}
    if recipe:
        recipe = {k: v for k, v in recipe.items() if k in {*RECIPE_DEFAULTS} | HUB_TRAINING_KEYS}
        for key in {"dataset", "model"} & recipe.keys():
            recipe[key] = public_name(recipe.get(key), recipe.get(f"{key}_revision"))
    public = results | {"dataset": dataset, "recipe": recipe}
    public["model"] = model | {"name": None, "revision": None}
    if training := results.get("training"):
        public["training"] = {key: training[key] for key in TRAINING_KEYS if key in training}
    return public


def load_evaluated_splits(
    folder: Path, results: dict, dataset: str | None, *others: str
) -> dict[str, Dataset]:
    """Load the split of an evaluation, and others, decoded; UserError if its images changed."""
    info, processor = results["dataset"], runs.read_json(folder / runs.MODEL_FILES[2])
    if not dataset and info["local"] and not Path(info["name"]).expanduser().is_dir():
        name = short_name(info["name"])
        raise UserError(f'It was evaluated on a local dataset, "{name}": say where with DATASET=.')
    data = data_arguments(str(folder), dataset or info["name"])
    if dataset is None:
        data = replace(data, dataset_config=info["config"], dataset_revision=info["revision"])
    size = results["model"]["image_size"]
    crop = bool(processor.get("do_center_crop"))
    splits = load_splits(
        data, size, processor["resample"], info["split"], *others,
        names=results["labels"], crop=crop,
    )  # fmt: skip
    split = splits[info["split"]]
    if content_hash(split) != info["sha256"] or split.features["label"].names != results["labels"]:
        raise UserError(f"The {info['split']} images are not those it was evaluated on.")
    return splits


def is_public(api: HfApi, dataset: dict) -> bool:
    """Return whether anybody can see a dataset's images: on the Hub, or in scikit-learn."""
    if not dataset["revision"]:
        return dataset["name"] == "digits"
    try:
        info = retry(api.dataset_info, dataset["name"], revision=dataset["revision"], token=False)
    except CLIENT_ERRORS:
        return False
    return not (info.private or info.gated)


def find_license(api: HfApi, results: dict, license: str | None) -> dict[str, str | None]:
    """Return the card's license keys: those given, or those of the backbone's card on the Hub."""
    recipe = results["recipe"] or {}
    backbone, revision = recipe.get("model"), recipe.get("model_revision")
    if license or not backbone:
        if not license:
            raise UserError(
                "The weights were trained from scratch: say under which license you publish them, "
                'as ARGS="--license apache-2.0".'
            )
        return {"license": license}
    with hub_errors(api, backbone):
        try:
            info = retry(api.model_info, backbone, revision=revision) if revision else None
        except RepositoryNotFoundError:
            info = None
    found = info.card_data.to_dict() if info and info.card_data else {}
    facts = {key: found.get(key) for key in ("license", "license_name", "license_link")}
    if facts["license_link"] and "://" not in facts["license_link"]:  # a file of the backbone
        facts["license_link"] = (
            f"https://huggingface.co/{backbone}/blob/main/{facts['license_link']}"
        )
    return facts


def find_code_url() -> str | None:
    """Return the web address of git's remote, without credentials; None for one without any."""
    command = ["git", "-C", Path(__file__).parent, "remote", "get-url", "origin"]
    try:
        remote = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None
    pattern = r"(?:https?://(?:[^@/]+@)?|(?:ssh://)?git@)([\w.-]+)[:/](.+?)(?:\.git)?/?"
    match = re.fullmatch(pattern, remote)
    return f"https://{match[1]}/{match[2]}" if match else None


def local_dataset(model: Path) -> str | None:
    """Return the folder of the dataset that a model was evaluated on, None for one of the Hub."""
    info = (runs.read_json(runs.results_folder(str(model)) / EVALUATION) or {})["dataset"]
    return info["name"] if info["local"] else None


def default_name(api: HfApi, model: Path) -> str:
    """Return `account/backbone-finetuned-dataset`, as the Trainer names it."""
    results = runs.read_json(runs.results_folder(str(model)) / EVALUATION)
    if results is None:
        raise UserError(f"There are no results of {model}: run `make evaluate MODEL={model}`.")
    with hub_errors(api, str(model)):
        account = retry(api.whoami)["name"]
    backbone = (results["recipe"] or {}).get("model") or "vit"
    parts = [short_name(name) for name in (backbone, results["dataset"]["name"])]
    return f"{account}/" + re.sub(r"[^\w.-]+|--+|\.\.+", "-", "-finetuned-".join(parts))


def record_push(model: Path, endpoint: str, repo: str, commit: str) -> None:
    """Save in the results of a run what it was published as."""
    file = runs.results_folder(str(model)) / RECORD
    record = runs.read_json(file) or {}
    space = record.get("space") if record.get("repo") == repo else None
    runs.write_json(file, {"endpoint": endpoint, "repo": repo, "commit": commit, "space": space})


def last_push(endpoint: str, repo: str | None = None) -> tuple[Path, dict] | None:
    """Return the record of the last push to a Hub, or to one repository there, and its file."""
    files = sorted(runs.RESULTS.glob(f"*/{RECORD}"), key=lambda file: -file.stat().st_mtime)
    records = ((file, runs.read_json(file)) for file in files)
    hits = (r for r in records if r[1]["endpoint"] == endpoint and repo in (None, r[1]["repo"]))
    return next(hits, None)


@contextmanager
def malformed(message: str):
    """Turn what values of another shape than expected raise into a UserError."""
    try:
        yield
    except MALFORMED as error:
        raise UserError(f"{message} ({type(error).__name__}: {error}).") from None
