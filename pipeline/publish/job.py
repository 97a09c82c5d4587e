"""Train, evaluate and publish on a rented GPU with Hugging Face Jobs.

The code is uploaded to a private dataset repository as a git bundle of the last commit. Checkpoints
are kept in a private bucket, from which a restarted job resumes.
"""

import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, JobHardwareInfo, JobInfo, Volume, constants

from pipeline import runs
from pipeline.errors import UserError
from pipeline.publish.connection import retry
from pipeline.recipe import Recipe

IMAGE = "python:3.12"  # Debian with git and make
TIMEOUT = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
HOURS = {"s": 1 / 3600, "m": 1 / 60, "h": 1, "d": 24}
BUNDLE = "code.bundle"
# The job's script. CODE and CHECKPOINTS are the mount paths of the volumes.
SCRIPT = """\
git clone --quiet "$CODE/{bundle}" project && cd project && mkdir -p models
ln -s "$CHECKPOINTS" models/checkpoints
gpus=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU || true)
make train NPROC=$((gpus > 1 ? gpus : 1)) RECIPE={recipe} ARGS={train_args}
make evaluate MODEL={model}
make push MODEL={model} REPO={repo} ARGS={push_args}
"""


@dataclass
class Job:
    """A planned job, see `HfApi.run_job`; `price` is in US dollars per hour."""

    command: list[str]
    env: dict[str, str]
    flavor: str
    timeout: str
    price: float
    hours: float
    commit: str
    code_repo: str
    bucket: str


def plan(
    api: HfApi,
    recipe: Recipe,
    name: str,
    overrides: list[str],
    repo: str,
    flavor: str,
    timeout: str | None,
    push_args: list[str],
) -> Job:
    """Plan a job without sending anything.

    Args:
        api: A client with a token, which is passed to the job as a secret.
        recipe: The resolved recipe, so that mistakes are found before the job starts.
        name: The recipe's name, as in `make train RECIPE=`.
        overrides: Further arguments of `scripts/train_vit.py`.
        repo: The repository to publish the model to, `name/model`.
        flavor: The machine, such as `a10g-small`.
        timeout: The job's time limit, such as `2h`.
        push_args: Arguments of `scripts/push_to_hub.py`.

    Raises:
        UserError: There is no such machine or no time limit, or the job has no access to the code,
            the dataset or the backbone.
    """
    match = TIMEOUT.fullmatch(timeout or "")
    if not match:
        raise UserError(
            f'TIMEOUT is "{timeout or ""}": set a time limit, such as TIMEOUT=2h (s, m, h or d). '
            "Without one, the service ends a job after 30 minutes."
        )
    for kind, source in (("dataset", recipe.data.dataset), ("model", recipe.model.model)):
        if source not in (None, "digits") and runs.is_local(source):
            raise UserError(
                f'The {kind} "{source}" is a folder on this machine, which a job can\'t access: '
                "upload it to the Hub, and use its Hub id."
            )
    commit = runs.git("rev-parse", "HEAD")
    if not commit:
        raise UserError("A job takes its code from git, and this is no clone: start it from one.")
    if name.endswith((".yaml", ".yml")) and not runs.git("ls-files", str(Path(name).absolute())):
        raise UserError(f"The recipe {name} is not in git: commit it, since jobs get only commits.")
    if changed := runs.git("status", "--porcelain"):
        print(f"The job runs the last commit, without {len(changed.splitlines())} changed files.")
    machines = {machine.name: machine for machine in retry(api.list_jobs_hardware)}
    if flavor not in machines:
        raise UserError(f'There is no machine "{flavor}"; choose from {", ".join(machines)}.')
    account, _, model = repo.partition("/")
    arguments = shlex.join([f"--run={recipe.run}", *overrides])
    script = SCRIPT.format(
        bundle=BUNDLE,
        recipe=shlex.quote(name),
        train_args=shlex.quote(arguments),
        model=shlex.quote(str(recipe.model_folder)),
        repo=shlex.quote(repo),
        push_args=shlex.quote(shlex.join(["--yes", *push_args])),
    )
    env = {"CODE": "/code", "CHECKPOINTS": "/checkpoints"}
    if constants.ENDPOINT != "https://huggingface.co":
        env["HF_ENDPOINT"] = constants.ENDPOINT
    return Job(
        command=["bash", "-euc", script],
        env=env,
        flavor=flavor,
        timeout=timeout,
        price=_hourly_price(machines[flavor]),
        hours=float(match[1]) * HOURS[match[2]],
        commit=commit,
        code_repo=f"{account}/{model}-code",
        bucket=f"{account}/{model}-checkpoints",
    )


def submit(api: HfApi, job: Job) -> JobInfo:
    """Upload the code, create the bucket, and start the job."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, BUNDLE)
        if runs.git("bundle", "create", "--quiet", str(bundle), "HEAD") is None:
            raise UserError("git can't bundle the last commit: does `git fsck` find an error?")
        retry(api.create_repo, job.code_repo, repo_type="dataset", private=True, exist_ok=True)
        commit = retry(
            api.upload_file,
            path_or_fileobj=bundle,
            path_in_repo=BUNDLE,
            repo_id=job.code_repo,
            repo_type="dataset",
            commit_message=f"Code at {job.commit[:12]}",
        )
    retry(api.create_bucket, job.bucket, private=True, exist_ok=True)
    volumes = [
        Volume(
            type="dataset", source=job.code_repo, mount_path=job.env["CODE"], revision=commit.oid
        ),
        Volume(type="bucket", source=job.bucket, mount_path=job.env["CHECKPOINTS"]),
    ]
    # Not retried: after a lost reply, a second job would start and cost money.
    return api.run_job(
        image=IMAGE,
        command=job.command,
        env=job.env,
        secrets={"HF_TOKEN": api.token},
        flavor=job.flavor,
        timeout=job.timeout,
        volumes=volumes,
        namespace=job.bucket.partition("/")[0],
    )


def follow(api: HfApi, job: JobInfo) -> None:
    """Print a job's log until it ends; UserError unless it succeeded."""
    for line in api.fetch_job_logs(job_id=job.id, namespace=job.owner.name, follow=True):
        print(line)
    # The log may end before the job does.
    status = api.wait_for_job(job_id=job.id, namespace=job.owner.name).status
    if status.stage != "COMPLETED":
        raise UserError(
            f"The job ended in the stage {status.stage} ({status.message or 'without a message'}): "
            f"{job.url}. Run the same command to resume from its last checkpoint."
        )


def _hourly_price(machine: JobHardwareInfo) -> float:
    return machine.unit_cost_usd * {"minute": 60, "hour": 1, "second": 3600}[machine.unit_label]
