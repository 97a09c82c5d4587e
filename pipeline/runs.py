"""A run's folders and files, and the provenance of a result: hashes, revisions, versions, hardware.

A run named `cpu` has its model in `models/cpu`, its checkpoints in `models/checkpoints/cpu`, and
all metrics and figures of that model in `results/cpu`.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import httpx2
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.errors import UserError

MODELS = Path("models")
RESULTS = Path("results")
MODEL_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")
LIBRARIES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "huggingface_hub")
TIMEOUT = 10  # seconds, for a request to the Hub


def last_run() -> str:
    """Return the folder of the most recently trained model; UserError if there is none."""
    runs = sorted(MODELS.glob("*/training.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("There is no trained model in models/: train one, or name one with MODEL=.")
    return str(runs[-1].parent)


def check_run_name(run: str) -> None:
    """Raise UserError unless a run's name is a plain folder name."""
    if not re.fullmatch(r"\w[\w.-]*", run) or run == "checkpoints" or run.endswith(".part"):
        raise UserError(
            f'"{run}" can\'t name a run: use letters, digits, ".", "-" and "_", as in --run=second.'
        )


def results_folder(model: str) -> Path:
    """Return `results/<run>` for a model, which is a local folder or `id@revision` on the Hub."""
    name, _ = split_revision(model)
    return RESULTS / Path(name).expanduser().resolve().name


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `id@revision` at the @. A local folder has no revision, even with an @ in its name."""
    if Path(name).expanduser().is_dir():
        return name, None
    name, _, revision = name.partition("@")
    is_local(name)  # raises for a path that does not exist
    return name, revision or None


def is_local(name: str) -> bool:
    """Return whether a name is a local folder; UserError if it is a path that does not exist."""
    if Path(name).expanduser().is_dir():
        return True
    if name.startswith((".", "/", "~", "models/")) or name.count("/") > 1:
        raise UserError(f'There is no folder "{name}": check the path.')
    return False


def pin(repo_type: str, name: str, revision: str | None) -> tuple[str, str | None]:
    """Return a source as a recipe stores it: a Hub id with its commit, or a path without one.

    A local folder `photos` becomes `./photos`, which can't be mistaken for a Hub id.
    """
    if is_local(name):
        return (name if name.startswith((".", "/", "~")) else f"./{name}"), None
    return name, hub_commit(repo_type, name, revision) or revision or "main"


def model_file(model: str, file: str) -> Path | None:
    """Return the local path of a model's file, downloaded if necessary; None if there is none."""
    name, revision = split_revision(model)
    if is_local(name):
        path = Path(name).expanduser() / file
        return path if path.is_file() else None
    hub_commit("model", name, revision)
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, EntryNotFoundError):
        return None


def sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file in hexadecimal; None if there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hashes(model: str) -> dict[str, str]:
    """Return the SHA-256 of each required file of a model; UserError if one is missing."""
    paths = {file: model_file(model, file) for file in MODEL_FILES}
    if missing := [file for file, path in paths.items() if path is None]:
        raise UserError(f'The model "{model}" is incomplete: it has no {", ".join(missing)}.')
    return {file: sha256(path) for file, path in paths.items()}


def changed_files(hashes: dict[str, str], folder: Path) -> list[str]:
    """Return the files that are missing or whose SHA-256 differs from the given one."""
    return [file for file, digest in hashes.items() if sha256(folder / file) != digest]


def read_json(path: Path) -> dict | None:
    """Return a JSON file's content; None if there is no such file; UserError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it and create it again.") from None


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, which appears complete or not at all; create its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file, which appears complete or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)


def read_manifest(folder: Path) -> dict[str, dict]:
    """Return the content of a results folder's `manifest.json`, see `record_files`."""
    return read_json(folder / "manifest.json") or {}


def record_files(
    folder: Path, files: dict[str, str | None], weights: str, replace: str | None = None
) -> None:
    """Add files to a results folder's `manifest.json`.

    Args:
        folder: `results/<run>`.
        files: Paths below `folder`. The value is the origin of the images that a file shows: the
            `content_hash` of a decoded split, "user", or None if it shows none.
        weights: SHA-256 of the weights the files were made from.
        replace: Entries below this subfolder that are not in `files` are removed, with their files.
    """
    entries = read_manifest(folder)
    for path in list(entries):
        if replace and path.startswith(replace + "/") and path not in files:
            (folder / path).unlink(missing_ok=True)
            del entries[path]
    entries |= {path: {"weights": weights, "images": images} for path, images in files.items()}
    write_json(folder / "manifest.json", entries)


def link_results(folder: Path, name: str) -> None:
    """Make `results/<name>` a symbolic link to that file or folder in `results/<run>`."""
    link = folder.parent / name
    if link.is_symlink():
        link.unlink()
    if link.exists():
        print(f"{link} is not a link and was not replaced; the new results are in {folder}.")
    else:
        link.symlink_to(Path(folder.name) / name)


def hub_commit(repo_type: str, name: str, revision: str | None = None) -> str | None:
    """Ask the Hub for the commit of a repository, before anything slow starts.

    Args:
        repo_type: "model" or "dataset".
        name: The repository's id.
        revision: A branch, tag or commit; the main branch by default.

    Returns:
        The commit hash; None offline, where the cached version is used.

    Raises:
        UserError: The Hub can't be reached or has no such repository or revision.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=TIMEOUT).sha
    except RevisionNotFoundError:
        raise UserError(f'The {repo_type} "{name}" has no revision "{revision}".') from None
    except GatedRepoError:
        raise UserError(
            f'The {repo_type} "{name}" is gated: accept its terms on the Hub and log in '
            "with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f'There is no {repo_type} "{name}", neither a local folder nor a repository on the '
            "Hub: correct the name, or run `hf auth login` for a private repository."
        ) from None
    except (httpx2.TransportError, HfHubHTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(
                f"The Hub at {constants.ENDPOINT} does not accept the token, which may have "
                "expired: run `hf auth login`, or unset HF_TOKEN for a public repository."
            ) from None
        raise UserError(
            f'Cannot reach the Hub at {constants.ENDPOINT} for the {repo_type} "{name}" '
            f"({type(error).__name__}). `make demo` needs no Hub; DATASET= and MODEL= also take "
            "local folders; HF_ENDPOINT sets another Hub; HF_HUB_OFFLINE=1 uses cached files."
        ) from None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def device() -> torch.device:
    """Return the accelerator, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def hardware() -> str:
    """Return the device in use, such as "2 cores of AMD EPYC" or "NVIDIA H100 80GB HBM3"."""
    if torch.cuda.is_available():
        count = int(os.environ.get("WORLD_SIZE", "1"))  # each process uses one
        return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name()
    return processor()


def processor() -> str:
    """Return the CPU cores in use, such as "2 cores of AMD EPYC"."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    count = torch.get_num_threads()
    return f"{count} core{'s' * (count > 1)} of {names[0] if names else cpu}"


def git(*arguments: str) -> str | None:
    """Return git's output for the repository of this code; None outside a repository."""
    command = ["git", "-C", Path(__file__).parent, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def code_revision() -> str | None:
    """Return the code's commit, with "+changes" if files differ from it; None outside git."""
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain") else commit


def has_fast_bfloat16() -> bool:
    """Return whether this machine has native bfloat16 arithmetic, rather than emulating it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


def check_folders(run: str) -> None:
    """Raise UserError if a folder with the run's name contains something other than a run."""
    for folder in (MODELS / run, MODELS / "checkpoints" / run):
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
            raise UserError(
                f"{folder} is not a run of this pipeline (it has no recipe.yaml): rename this run "
                "with ARGS=--run=NAME, or move that folder away."
            )


@cache
def print_once(text: str) -> None:
    """Print a text if it is new, and only in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def remove_run(run: str) -> None:
    """Remove a run's model and checkpoints, so that it can be trained again."""
    for folder in (MODELS / run, MODELS / "checkpoints" / run):
        shutil.rmtree(folder, ignore_errors=True)
