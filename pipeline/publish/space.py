"""The Space as it is published: its files, with the one attention.py, and the model it shows.

See https://huggingface.co/docs/hub/spaces-config-reference for the front matter of its README.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoCard

from pipeline import hub
from pipeline.errors import UserError

SOURCE = Path(__file__).parents[1] / "space"
PATTERNS = ("app.py", "inference.py", "style.css", "requirements.txt", "examples/*")
PRELOADED = (*hub.MODEL_FILES, "evaluation_results.json")
STARTING = ("BUILDING", "RUNNING_BUILDING", "APP_STARTING", "RUNNING_APP_STARTING")
PATIENCE = 1800  # seconds for a build; torch alone takes minutes
POLL = 5  # seconds


@dataclass
class Model:
    """A published model at one commit; `files` those of it that the Space loads."""

    name: str
    commit: str
    private: bool
    files: list[str]

    @property
    def variables(self) -> dict[str, str]:
        return {"MODEL_ID": self.name, "MODEL_REVISION": self.commit}


def find_model(api: HfApi, name: str) -> Model:
    """The model `name` or `name@revision` on the Hub; UserError if there is no whole one."""
    name, _, revision = name.partition("@")
    with hub.in_words(api, name):
        info = hub.retry(api.model_info, name, revision=revision or None)
    held = [sibling.rfilename for sibling in info.siblings]
    missing = [file for file in hub.MODEL_FILES if file not in held]
    if missing:
        raise UserError(f'"{name}" is no whole model: it has no {", ".join(missing)}.')
    return Model(name, info.sha, bool(info.private), [f for f in PRELOADED if f in held])


def files() -> dict[str, Path]:
    """What the Space consists of beside its README, by path: nothing but this list."""
    found = {"attention.py": Path(__file__).with_name("attention.py")}
    for pattern in PATTERNS:
        for file in sorted(SOURCE.glob(pattern)):
            found[file.relative_to(SOURCE).as_posix()] = file
    return found


def readme(model: Model) -> str:
    """The Space's README, its front matter naming the model.

    A public model is downloaded when the Space is built, so that it starts without the Hub too.
    """
    card = RepoCard((SOURCE / "README.md").read_text())
    card.data.models = [model.name]
    if not model.private:
        card.data.preload_from_hub = [f"{model.name} {','.join(model.files)} {model.commit}"]
    return str(card)


def set_variables(api: HfApi, repo: str, variables: dict[str, str]) -> bool:
    """Bring the Space's variables to these values; whether one was another before."""
    with hub.in_words(api, repo):
        before = {k: v.value for k, v in hub.retry(api.get_space_variables, repo).items()}
        changed = {k: v for k, v in variables.items() if before.get(k) != v}
        for key, value in changed.items():
            hub.retry(api.add_space_variable, repo, key, value)
    return bool(changed)


def wait(api: HfApi, repo: str, commit: str) -> str:
    """The stage in which the Space settles, such as RUNNING, BUILD_ERROR, or STOPPED."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with hub.in_words(api, repo):
            runtime = hub.retry(api.get_space_runtime, repo)
        # Just after a commit the one before it may still be what runs.
        earlier = runtime.stage == "RUNNING" and runtime.raw.get("sha", commit) != commit
        if runtime.stage not in STARTING and not earlier:
            return runtime.stage
        time.sleep(POLL)
    raise UserError(f'"{repo}" is still in the stage {runtime.stage} after {PATIENCE // 60} min.')


def log(api: HfApi, repo: str, stage: str, lines: int = 30) -> str:
    """The end of the log of the build, or of the run where the build went well."""
    with hub.in_words(api, repo):
        told = list(api.fetch_space_logs(repo, build=stage != "RUNTIME_ERROR"))
    return "\n".join(line.rstrip("\n") for line in told[-lines:])
