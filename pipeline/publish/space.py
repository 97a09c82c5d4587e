"""The Space as it is published: its files, which name the one commit of a model that it shows."""

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
TIMEOUT, POLL, GRACE = 1800, 5, 60  # seconds; after GRACE, a stage is not the build's before


def published_files(model: ModelInfo, page: str) -> dict[str, Path | str]:
    """Return what the Space at an address consists of, by path: a file, or its text."""
    files = {f.relative_to(SOURCE).as_posix(): f for p in PATTERNS for f in SOURCE.glob(p)}
    readme = RepoCard(files["README.md"].read_text("utf-8"))
    readme.data.models, readme.data.thumbnail = [model.id], f"{page}/resolve/main/thumbnail.jpg"
    if not model.private:  # the build downloads it: the Space then starts without the Hub too
        names = [sibling.rfilename for sibling in model.siblings]
        names = [n for n in names if n.endswith((".json", ".safetensors")) or "examples/" in n]
        readme.data.preload_from_hub = [f"{model.id} {','.join(names)} {model.sha}"]
    shown = json.dumps({"model": model.id, "revision": model.sha}, indent=1)
    files |= {"model.json": shown, "README.md": str(readme)}
    return files | {"attention.py": Path(attention.__file__)}


def try_here(folder: Path, api: HfApi) -> None:
    """Build the staged page on this machine; UserError if its model can't be shown."""
    variables = {"HF_ENDPOINT": api.endpoint, "HF_HUB_OFFLINE": "0", "MODEL_ID": ""}
    command = [sys.executable, "-B", "-c", "import app"]
    process = subprocess.run(command, cwd=folder, env=os.environ | variables, stderr=-1, text=True)
    if process.returncode:
        raise UserError(f"The Space does not start: {process.stderr.strip().splitlines()[-1]}")


def wait_until_settled(space: Repository, commit: str) -> str:
    """Wait for the build of a commit and return the stage; UserError with a log if it fails."""
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
            time.sleep(POLL)  # the commit before it may still be there
    raise UserError(f'"{space.name}" does not run {commit[:12]} after {TIMEOUT // 60} minutes.')


def classify_example(space: Repository) -> str:
    """Return what the running Space, which wakes up for that if it sleeps, says of EXAMPLE."""
    host = space.request(space.api.repo_info).host
    try:
        client = Client(host, token=space.api.token or None, verbose=False)
        probs, warning = client.predict(handle_file(EXAMPLE), api_name="/classify")
    except (HTTPError, ValueError, OSError) as error:
        raise UserError(f"{host} does not classify {EXAMPLE.name}: {error}") from None
    label = max(probs, key=probs.get)
    return f"{label} ({100 * probs[label]:.1f} %) {warning}".strip()
