"""What is published of a model: an explicit list of files, copied, checked and scanned for secrets.

See `runs.record_files` for the manifest of a run's results.
"""

import io
import json
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from PIL import Image

from pipeline import runs
from pipeline.errors import UserError
from pipeline.explain.figures import examples_from_rows, select_examples
from pipeline.publish import card, provenance
from pipeline.publish.hub import PUBLICATION, Files
from pipeline.publish.provenance import EVALUATION
from pipeline.recipe import load_settings

FAITHFULNESS = "attention_faithfulness.json"
MAPS = "visualizations/"
MAX_FIGURE = 120_000  # bytes of each of three; with the example images, less than 500 kB
MAX_EXAMPLE = 60_000
SECRETS = re.compile(
    rb"\b(hf_(oauth_|jwt_)?|api_org_)[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}"
    rb"|\bgithub_pat_\w{50,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{40,}"  # OpenAI last
    rb"|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}"  # Google
    rb"|\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}|hooks\.slack\.com/services/\w+"
    rb"|\bwandb_v\d_\w{20,}|(?i:wandb\w*)\W{1,5}[0-9a-f]{40}\b"
    rb"|\b[a-z][a-z0-9+.-]*://[^\s/:@]*:[^\s/:@]+@|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
PRIVATE_PATHS = re.compile(rb"(/home|/Users|\\Users)[/\\]+[\w.-]+")  # they have a user's name


def stage_model(
    api: HfApi, model: Path, repo: str, folder: Path, publish_images: bool = False,
    license: str | None = None, code_url: str | None = None, dataset: str | None = None,
) -> Files:  # fmt: skip
    """Copy a model's published files into `folder`, and write its card and the list of all there.

    Args:
        publish_images: Publish images of the user's own and of datasets that are not public too.
        license: An identifier of the Hub; by default the backbone's.
        code_url: Where the code is; by default git's remote.
        dataset: Another place of the same dataset, such as a local folder.

    Raises:
        UserError: The model was changed after its evaluation, or a file has a secret.
    """
    evaluate = f"run `make evaluate MODEL={model}`"
    results_folder = runs.results_folder(str(model))
    results = runs.read_json(results_folder / EVALUATION)
    with provenance.malformed(f"The results in {results_folder} are damaged; {evaluate}"):
        is_shown = publish_images or (
            bool(results) and provenance.is_public(api, results["dataset"])
        )
        owners = [None, *(["dataset"] if is_shown else []), *(["user"] if publish_images else [])]
        files = published_files(model, results_folder, owners)
        if EVALUATION not in files:
            raise UserError(f"There are no results of {model} as it is now: {evaluate}.")
        if results["dtype"] == "bfloat16":
            raise UserError(f"The results of {model} are an estimate in bfloat16: {evaluate}.")
        if load_settings(str(model)) != results["recipe"]:
            raise UserError(f"The recipe of {model} is not that of its results: {evaluate}.")
        public = provenance.anonymize(results)
        files[EVALUATION] = json.dumps(public, indent=1)
        if public["recipe"]:
            files["recipe.yaml"] = as_yaml(public["recipe"])
        if FAITHFULNESS in files:
            faithfulness = runs.read_json(files[FAITHFULNESS])
            files[FAITHFULNESS] = json.dumps(faithfulness | {"model": None}, indent=1)
        facts = provenance.find_license(api, results, license) | {
            "code_url": code_url or provenance.find_code_url()
        }
        facts["space"] = (runs.read_json(results_folder / provenance.RECORD) or {}).get("space")
        facts["examples"] = {}
        if is_shown:
            split = provenance.load_evaluated_splits(model, results, dataset)[
                results["dataset"]["split"]
            ]
            rows = select_examples(
                split["label"][:], results["predictions"], results["confidences"]
            )
            for row, example in zip(rows[:2], examples_from_rows(split, rows[:2]), strict=True):
                facts["examples"][f"examples/{row:05}.jpg"] = row
                files[f"examples/{row:05}.jpg"] = compact(example.source, MAX_EXAMPLE)
        staged = stage(files, folder, api.token)
        results, faithfulness = read_results(
            folder
        )  # the copies: a training may write to the model
        text = card.render(results, repo, facts | {"files": staged}, faithfulness)
    return add_list(staged | stage({"README.md": text}, folder, api.token), folder, facts)


def published_files(model: Path, results: Path, owners: list) -> dict[str, Path | str | bytes]:
    """Return what may be published of a model, by path in the repository: nothing but this list.

    It has the model's own files, and the results in the manifest that were made from its weights.
    Of the attention maps it has the overview and two more, made small.

    Args:
        owners: Whose images figures may show: None (no images), "dataset", "user".
    """
    files = {name: model / name for name in runs.MODEL_FILES}
    if missing := [name for name in files if not files[name].is_file()]:
        raise UserError(f"The model {model} is incomplete: it has no {', '.join(missing)}.")
    weights, entries = runs.sha256(model / "model.safetensors"), runs.read_manifest(results)
    names = sorted(name for name, entry in entries.items() if entry["weights"] == weights)
    names = [n for n in names if n.endswith((".json", ".png")) and (results / n).is_file()]
    shown = [name for name in names if entries[name]["images"] in owners]
    if len(shown) < len(names):
        print(
            f"Not published: {len(names) - len(shown)} figures with images of your own, or of a "
            "dataset that is not public on the Hub. ARGS=--publish_images publishes them."
        )
    files |= {name: results / name for name in shown if not name.startswith(MAPS)}
    examples = [name for name in shown if name.startswith(MAPS) and name.endswith("_layers.png")]
    for name in [*examples[:2], *({f"{MAPS}overview.png"} & {*shown})]:
        with Image.open(results / name) as figure:
            files[name.removesuffix("png") + "jpg"] = compact(figure, MAX_FIGURE)
    return files


def stage(files: dict[str, Path | str | bytes], folder: Path, token: str) -> Files:
    """Copy files, or write those given by their content, into `folder`.

    Returns:
        The copies, by their path in the repository.

    Raises:
        UserError: A file has a secret or a private path in it, or the disk is full.
    """
    for name, content in files.items():
        copy = folder / name
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, copy)
            else:
                copy.write_bytes(content if isinstance(content, bytes) else content.encode())
            data = copy.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot copy {name} to {folder}: {error.strerror}.") from None
        start = data.find(token.encode())
        found = start >= 0 or (match := SECRETS.search(data) or PRIVATE_PATHS.search(data))
        if found:
            line = data.count(b"\n", 0, start if start >= 0 else match.start()) + 1
            raise UserError(
                f"{name}, line {line}, has what looks like a secret or a private path in it: "
                "nothing is published."
            )
    return {name: folder / name for name in sorted(files)}


def add_list(staged: Files, folder: Path, facts: dict | None = None) -> Files:
    """Add the list of what is published, with SHA-256, and the facts that the card needs."""
    content = {"files": {path: runs.sha256(file) for path, file in staged.items()}} | (facts or {})
    (folder / PUBLICATION).write_text(json.dumps(content, indent=1), "utf-8")
    return staged | {PUBLICATION: folder / PUBLICATION}


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


def as_yaml(settings: dict) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def compact(image: Image.Image, size: int) -> bytes:
    """Return an image as a JPEG of at most `size` bytes, made smaller if need be."""
    image = image.convert("RGB")
    for side in (1600, 1200, 900, 600, 400, 200):
        image.thumbnail((side, side))
        image.save(content := io.BytesIO(), "JPEG", quality=85)
        if content.tell() <= size:
            break
    return content.getvalue()
