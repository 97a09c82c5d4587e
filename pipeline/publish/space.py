"""The Space as it is published: its files, and the one commit of a model that it shows.

See https://huggingface.co/docs/hub/spaces-config-reference for the front matter of its README.
"""

import time
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, RepoCard

from pipeline.errors import UserError
from pipeline.explain import attention
from pipeline.publish.connection import hub_errors, retry
from pipeline.publish.hub import Repository
from pipeline.publish.provenance import EVALUATION
from pipeline.runs import MODEL_FILES, split_revision

SOURCE = Path(__file__).parents[2] / "space"
MODULES = ("app.py", "inference.py", "wording.py")
PATTERNS = (*MODULES, "style.css", "requirements.txt", "examples/*")
TIMEOUT = 1800  # seconds for a build; installing torch alone takes minutes
POLL = 5  # seconds


def find_model(api: HfApi, model: str) -> ModelInfo:
    """Return the model `name` or `name@revision` on the Hub; UserError if it is incomplete."""
    name, revision = split_revision(model)
    with hub_errors(api, name):
        info = retry(api.model_info, name, revision=revision)
    if missing := sorted({*MODEL_FILES} - {sibling.rfilename for sibling in info.siblings}):
        raise UserError(f'The model "{name}" is incomplete: it has no {", ".join(missing)}.')
    return info


def published_files(model: ModelInfo) -> dict[str, Path | str]:
    """Return what the Space consists of, by path: a file, or the README's text."""
    paths = sorted(path for pattern in PATTERNS for path in SOURCE.glob(pattern))
    readme = RepoCard((SOURCE / "README.md").read_text("utf-8"))
    readme.data.models = [model.id]
    if not model.private:  # the build downloads it: the Space then starts without the Hub too
        published = {sibling.rfilename for sibling in model.siblings}
        files = [file for file in (*MODEL_FILES, EVALUATION) if file in published]
        readme.data.preload_from_hub = [f"{model.id} {','.join(files)} {model.sha}"]
    files = {path.relative_to(SOURCE).as_posix(): path for path in paths}
    return files | {"attention.py": Path(attention.__file__), "README.md": str(readme)}


def set_model(space: Repository, model: ModelInfo) -> bool:
    """Set the variables that name the Space's model; return whether one was different."""
    variables = {"MODEL_ID": model.id, "MODEL_REVISION": model.sha}
    with hub_errors(space.api, space.name):
        old = {k: v.value for k, v in retry(space.api.get_space_variables, space.name).items()}
        changed = [key for key in variables if old.get(key) != variables[key]]
        for key in changed:
            retry(space.api.add_space_variable, space.name, key, variables[key])
    return bool(changed)


def wait_until_settled(space: Repository, commit: str) -> str:
    """Wait for the build of a commit; return the stage, as RUNNING, BUILD_ERROR or STOPPED."""
    deadline, options = time.monotonic() + TIMEOUT, {"timeout": TIMEOUT, "poll_interval": POLL}
    with hub_errors(space.api, space.name):
        while time.monotonic() < deadline:
            runtime = retry(space.api.wait_for_space, space.name, **options)
            # The commit before it may still be running.
            if runtime.stage != "RUNNING" or runtime.raw.get("sha", commit) == commit:
                return runtime.stage
            time.sleep(POLL)
    raise UserError(f'"{space.name}" does not run {commit[:12]} after {TIMEOUT // 60} minutes.')


def log_tail(space: Repository, stage: str, lines: int = 30) -> str:
    """Return the end of the log of the build, or of the run if the build went well."""
    with hub_errors(space.api, space.name):
        log = list(space.api.fetch_space_logs(space.name, build=stage != "RUNTIME_ERROR"))
    return "\n".join(line.rstrip("\n") for line in log[-lines:])
