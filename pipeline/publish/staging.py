"""What is published of a model: an explicit list of files, copied, checked and scanned for secrets.

See `runs.record_files` for the manifest of a run's results.
"""

import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi

from pipeline import runs
from pipeline.errors import UserError
from pipeline.publish import card
from pipeline.publish.hub import CLIENT_ERRORS, retry

EVALUATION = "evaluation_results.json"
FAITHFULNESS = "attention_faithfulness.json"
OVERVIEW = "visualizations/overview.png"
SECRETS = re.compile(
    rb"\b(hf_(oauth_|jwt_)?|api_org_)[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}"
    rb"|\bgithub_pat_\w{50,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{40,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def published_files(model: Path, results: Path) -> dict[str, Path]:
    """Return what may be published of a model, by path in the repository: nothing but this list.

    It has the model's own files, and the results in the manifest that were made from its weights
    and show no images of the user's own. Of the attention maps it has the overview and two more.
    """
    files = {name: model / name for name in (*runs.MODEL_FILES, "recipe.yaml")}
    if missing := [name for name in runs.MODEL_FILES if not files[name].is_file()]:
        raise UserError(f"The model {model} is incomplete: it has no {', '.join(missing)}.")
    weights, entries = runs.sha256(model / "model.safetensors"), runs.read_manifest(results).items()
    names = sorted(n for n, e in entries if e["weights"] == weights and e["images"] != "user")
    names = [name for name in names if name.endswith((".json", ".png"))]  # not the text report
    maps = [name for name in names if name.startswith("visualizations/") and name != OVERVIEW]
    examples = [name for name in maps if name.endswith("_layers.png")][:2]
    files |= {name: results / name for name in names if name not in maps or name in examples}
    return {name: path for name, path in files.items() if path.is_file()}


def stage_model(api: HfApi, model: Path, repo: str, folder: Path) -> dict[str, Path]:
    """Copy a model's published files into `folder` and write its card there; see `stage`."""
    evaluate = f"run `make evaluate MODEL={model}`"
    files = published_files(model, runs.results_folder(str(model)))
    if EVALUATION not in files:
        raise UserError(f"There are no results of {model} as it is now: {evaluate}.")
    staged = stage(files, folder, api.token)
    results, faithfulness = read_results(folder)  # the copies: a training may write to the model
    if results["dtype"] == "bfloat16":
        raise UserError(f"The results of {model} are an estimate in bfloat16: {evaluate}.")
    license = find_license(api, results)
    text = card.render(results, repo, license, list(staged), faithfulness)
    return staged | stage({"README.md": text}, folder, api.token)


def stage(files: dict[str, Path | str], folder: Path, token: str) -> dict[str, Path]:
    """Copy files, or write those given as text, into `folder`; UserError if one has a secret.

    Returns:
        The copies, by their path in the repository.
    """
    for name, content in files.items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, copy)
        else:
            copy.write_text(content, "utf-8")
        if token.encode() in (data := copy.read_bytes()) or SECRETS.search(data):
            raise UserError(f"{name} has what looks like a secret in it: nothing is published.")
    return {name: folder / name for name in sorted(files)}


def read_results(folder: Path) -> tuple[dict, dict | None]:
    """Return the evaluation and the attention maps' faithfulness (or None) from a staged folder.

    Raises:
        UserError: They were not made from exactly the model files there.
    """
    results, faithfulness = (runs.read_json(folder / file) for file in (EVALUATION, FAITHFULNESS))
    hashes = {file: results["model"]["sha256"].get(file) for file in runs.MODEL_FILES}
    changed = runs.changed_files(hashes, folder)
    if faithfulness and faithfulness["sha256"] != results["model"]["sha256"]:
        changed.append(FAITHFULNESS)
    if changed:
        message = "These files are not of the evaluated model; evaluate it again:"
        raise UserError(f"{message} {', '.join(changed)}.")
    return results, faithfulness


def find_license(api: HfApi, results: dict) -> str | None:
    """Return the license in the backbone's card, if any; without a backbone, this project's."""
    backbone = (results["recipe"] or {}).get("model")
    if not backbone:
        return "apache-2.0"
    try:
        card_data = retry(api.model_info, card.hub_id(backbone)).card_data
    except CLIENT_ERRORS:  # no such model, or a local folder's name
        return None
    return card_data.license if card_data else None
