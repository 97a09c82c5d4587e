"""Stage a model for publishing: copy an explicit list of files, check them, scan for secrets.

See `runs.record_files` for the manifest of a run's results.
"""

import io
import json
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from PIL import Image

from pipeline import runs
from pipeline.errors import UserError
from pipeline.explain.figures import examples_from_rows, select_examples
from pipeline.publish import card, onnx, provenance
from pipeline.publish.hub import PUBLICATION, list_files
from pipeline.publish.provenance import EVALUATION
from pipeline.recipe import load_settings, to_yaml

FAITHFULNESS = "attention_faithfulness.json"
MAPS = "visualizations/"
MAX_FIGURE = 120_000  # bytes for each of three; less than 500 kB with the example images
MAX_EXAMPLE = 60_000
SECRETS = re.compile(
    rb"\b(hf_(oauth_|jwt_)?|api_org_)[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{36}"
    rb"|\bgithub_pat_\w{50,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{40,}"  # OpenAI last
    rb"|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}"  # Google
    rb"|\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}|hooks\.slack\.com/services/\w+"
    rb"|\bwandb_v\d_\w{20,}|(?i:wandb\w*)\W{1,5}[0-9a-f]{40}\b"
    rb"|\b[a-z][a-z0-9+.-]*://[!-.0-9;-?A-~]*:[!-.0-9;-?A-~]+@|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    rb"|(/home|/Users|\\Users)[/\\]+[\w.-]+"  # paths with a user name
)


def stage_model(
    api: HfApi, model: Path, repo: str, folder: Path, publish_images: bool = False,
    license: str | None = None, code_url: str | None = None, dataset: str | None = None,
) -> Path:  # fmt: skip
    """Copy a model's published files into `folder`, and write its card and the file list.

    Args:
        api: A Hub client, used to check whether the dataset is public.
        model: The model's folder.
        repo: The repository that the model is published as.
        folder: An empty folder.
        publish_images: Also publish the user's own images and those of non-public datasets.
        license: A license identifier of the Hub; by default the backbone's.
        code_url: The URL of the code; by default git's remote.
        dataset: Another location of the same dataset, such as a local folder.

    Raises:
        UserError: The model was changed after its evaluation, or a file contains a secret.
    """
    evaluate = f"run `make evaluate MODEL={model}`"
    source = runs.results_folder(str(model))
    results = runs.read_json(source / EVALUATION)
    with provenance.malformed(f"The results in {source} are damaged; {evaluate}"):
        is_public = bool(results) and provenance.is_public(api, results["dataset"])
        shown = {None} | ({results["dataset"]["sha256"]} if is_public else set())
        files = published_files(model, source, None if publish_images else shown)
        if EVALUATION not in files:
            raise UserError(f"There are no results of the current {model}: {evaluate}.")
        if results["dtype"] == "bfloat16":
            raise UserError(f"The results of {model} are an estimate in bfloat16: {evaluate}.")
        if load_settings(str(model)) != results["recipe"]:
            raise UserError(f"The recipe of {model} does not match its results: {evaluate}.")
        public = provenance.anonymize(results)
        files |= {"recipe.yaml": to_yaml(public["recipe"])} if public["recipe"] else {}
        files[EVALUATION] = json.dumps(public, indent=1)
        if FAITHFULNESS in files:
            faithfulness = runs.read_json(files[FAITHFULNESS]) | {"model": None}
            if faithfulness.get("data") != results["dataset"]["sha256"]:
                raise UserError(
                    f"The attention maps of {model} were measured on other images than its "
                    f"accuracy: run `make visualize MODEL={model}` with the same DATASET=."
                )
            files[FAITHFULNESS] = json.dumps(faithfulness, indent=1)
        facts = provenance.find_license(api, results, license) | {"examples": {}}
        facts["code_url"] = code_url or provenance.find_code_url()
        facts["dashboard"] = provenance.find_dashboard(api, model)
        facts["onnx"] = runs.read_json(files[onnx.REPORT]) if onnx.REPORT in files else None
        if (copies := facts["onnx"]) and (
            copies.get("data") != results["dataset"]["sha256"] or "parity_images" in copies
        ):  # the latter by an earlier version, on a part of them
            raise UserError(
                f"The ONNX copies of {model} were checked on other images than its accuracy: run "
                f"`make export MODEL={model}` with the same DATASET=."
            )
        facts["space"] = provenance.last_record(source, api.endpoint, repo).get("space")
        if is_public or publish_images:
            data = provenance.evaluated_data(model, results, dataset)
            split = provenance.load_evaluated_split(model, results, data)
            answers = results["predictions"], results["confidences"]
            rows = select_examples(split["label"][:], *answers)[:2]
            facts["examples"] = {f"examples/{row:05}.jpg": row for row in rows}
            examples = zip(facts["examples"], examples_from_rows(split, rows), strict=True)
            files |= {path: compact(image.source, MAX_EXAMPLE) for path, image in examples}
        stage(files, folder, api.token)
        # Read the copies, since training may change the originals meanwhile.
        results, faithfulness = read_results(folder)
        text = card.render(results, repo, facts | {"files": list_files(folder)}, faithfulness)
    return add_list(stage({"README.md": text}, folder, api.token), facts)


def published_files(model: Path, results: Path, shown: set | None) -> dict[str, Path | str | bytes]:
    """Return the files of a model that may be published, by path in the repository.

    These are the model's own files and the results in the manifest that were made from its weights,
    but only three attention figures, reduced in size: the overview and two others.

    Args:
        model: The model's folder.
        results: The folder of its results.
        shown: The allowed `images` of the manifest, see `runs.record_files`; None allows all.
    """
    files = {name: model / name for name in runs.MODEL_FILES}
    if missing := [name for name in files if not files[name].is_file()]:
        raise UserError(f"The model {model} is incomplete: it has no {', '.join(missing)}.")
    weights = runs.sha256(model / "model.safetensors")
    entries = {
        name: entry["images"]
        for name, entry in sorted(runs.read_manifest(results).items())
        if entry["weights"] == weights and name.endswith((".json", ".png", ".onnx"))
        and (results / name).is_file()
    }  # fmt: skip
    names = [name for name, owner in entries.items() if shown is None or owner in shown]
    if hidden := len(entries) - len(names):
        print(
            f"Not published: {hidden} figures with your own images, images of a dataset that is "
            "not public on the Hub, or others than the evaluated images. Draw those again with "
            "`make visualize`, or publish all with ARGS=--publish_images."
        )
    files |= {name: results / name for name in names if not name.startswith(MAPS)}
    maps = [name for name in names if name.startswith(MAPS)]
    for name in [*[n for n in maps if n.endswith("_layers.png")][:2], f"{MAPS}overview.png"]:
        if name in maps:
            with Image.open(results / name) as figure:
                files[name.removesuffix("png") + "jpg"] = compact(figure, MAX_FIGURE)
    return files


def stage(files: dict[str, Path | str | bytes], folder: Path, token: str) -> Path:
    """Copy or write files, given as paths or content, into `folder`, and return it.

    Raises:
        UserError: A file contains a secret or a private path, or the disk is full.
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
        if match := re.search(re.escape(token.encode()), data) or SECRETS.search(data):
            line = data.count(b"\n", 0, match.start()) + 1
            what = "what looks like a secret or a private path, so nothing is published"
            raise UserError(f"{name}, line {line}, contains {what}: remove it.")
    return folder


def add_list(folder: Path, facts: dict | None = None) -> Path:
    """Add the list of published files with their SHA-256, and the facts for the card."""
    files = {path: runs.sha256(folder / path) for path in list_files(folder)}
    runs.write_json(folder / PUBLICATION, {"files": files} | (facts or {}))
    return folder


def read_results(folder: Path) -> tuple[dict, dict | None]:
    """Return the evaluation and the attention maps' faithfulness (or None) from a staged folder.

    Raises:
        UserError: They were not made from exactly these model files.
    """
    results, faithfulness = (runs.read_json(folder / file) for file in (EVALUATION, FAITHFULNESS))
    hashes = results["model"]["sha256"]
    changed = runs.changed_files({file: hashes.get(file) for file in runs.MODEL_FILES}, folder)
    if faithfulness and faithfulness["sha256"] != hashes:
        changed.append(FAITHFULNESS)
    if changed:
        message = "These files don't belong to the evaluated model, so evaluate it again:"
        raise UserError(f"{message} {', '.join(changed)}.")
    return results, faithfulness


def compact(image: Image.Image, size: int) -> bytes:
    """Return an image as a JPEG of at most `size` bytes, reduced in size if necessary."""
    image = image.convert("RGB")
    for side in (1600, 1200, 900, 600, 400, 200):
        image.thumbnail((side, side))
        image.save(content := io.BytesIO(), "JPEG", quality=85)
        if content.tell() <= size:
            break
    return content.getvalue()
