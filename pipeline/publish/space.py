"""Publish the Space: its files, which pin the model commit that it shows, and its build."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gradio_client import Client, handle_file
from httpx import HTTPError
from huggingface_hub import HfApi, ModelInfo, RepoCard

from pipeline.errors import UserError
from pipeline.explain import attention
from pipeline.publish.connection import hub_errors, retry
from pipeline.publish.hub import Repository

SOURCE = Path(__file__).parents[2] / "space"
EXAMPLE = SOURCE / "examples/cat.png"
PATTERNS = ("*.py", "*.md", "style.css", "requirements.txt", "thumbnail.jpg", "examples/*")
TIMEOUT, POLL, GRACE = 1800, 5, 60  # seconds; before GRACE, a stage may be the last build's


def published_files(model: ModelInfo, page: str) -> dict[str, Path | str]:
    """Return the files of a Space by path, each as a local file or text; `page` is its URL."""
    files = {f.relative_to(SOURCE).as_posix(): f for p in PATTERNS for f in SOURCE.glob(p)}
    readme = RepoCard(files["README.md"].read_text("utf-8"))
    readme.data.models, readme.data.thumbnail = [model.id], f"{page}/resolve/main/thumbnail.jpg"
    if not model.private:  # the build downloads it, so that the Space starts without the Hub
        names = [sibling.rfilename for sibling in model.siblings]
        names = [n for n in names if n.endswith((".json", ".safetensors")) or "examples/" in n]
        readme.data.preload_from_hub = [f"{model.id} {','.join(names)} {model.sha}"]
    shown = json.dumps({"model": model.id, "revision": model.sha}, indent=1)
    files |= {"model.json": shown, "README.md": str(readme)}
    return files | {"attention.py": Path(attention.__file__)}


def try_here(folder: Path, api: HfApi) -> None:
    """Start the staged app on this machine; UserError if it can't show its model."""
    variables = {"HF_ENDPOINT": api.endpoint, "HF_HUB_OFFLINE": "0", "MODEL_ID": ""}
    command = [sys.executable, "-B", "-c", "import app"]
    process = subprocess.run(command, cwd=folder, env=os.environ | variables, stderr=-1, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"The Space does not start: {reason[-1]}")


def wait_until_settled(space: Repository, commit: str) -> str:
    """Wait for a commit's build and return its stage; UserError with the log if it fails."""
    start, options = time.monotonic(), {"timeout": TIMEOUT, "poll_interval": POLL}
    with hub_errors(space.api, space.name):
        while (waited := time.monotonic() - start) < TIMEOUT:
            runtime = retry(space.api.wait_for_space, space.name, **options)
            stage, built = runtime.stage, runtime.raw.get("sha", waited > GRACE and commit)
            if built == commit and stage in ("RUNNING", "SLEEPING", "STOPPED", "PAUSED"):
                return stage
            if built == commit:
                is_build = stage != "RUNTIME_ERROR"
                log = "".join([*space.api.fetch_space_logs(space.name, build=is_build)][-30:])
                raise UserError(f"{space.name} is in the stage {stage}.\n{log.rstrip()}")
            time.sleep(POLL)  # the previous commit may still be running
    raise UserError(f'"{space.name}" does not run {commit[:12]} after {TIMEOUT // 60} minutes.')


def classify_example(space: Repository) -> str:
    """Return the Space's prediction for EXAMPLE; a sleeping Space wakes up for it."""
    host = space.request(space.api.repo_info).host
    try:
        client = Client(host, token=space.api.token or None, verbose=False)
        probs, warning = client.predict(handle_file(EXAMPLE), api_name="/classify")
    except (HTTPError, ValueError, OSError) as error:
        raise UserError(f"{host} does not classify {EXAMPLE.name}: {error}") from None
    label = max(probs, key=probs.get)
    return f"{label} ({100 * probs[label]:.1f} %) {warning}".strip()
