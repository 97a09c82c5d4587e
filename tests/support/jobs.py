"""Run a job that the local Hub recorded, as its service would: a process in an empty folder."""

import json
import os
import subprocess
from pathlib import Path

from huggingface_hub import snapshot_download


def run_recorded_job(root: Path, owner: str, job_id: str, folder: Path, **variables: str) -> int:
    """Run the command with its environment, secrets and volumes; keep log and status.

    Args:
        root: The local Hub's folder.
        owner: Whose job it is.
        job_id: Its id.
        folder: An empty folder to run in.
        variables: Added to the environment.

    Returns:
        The exit status.
    """
    file = root / "jobs" / owner / f"{job_id}.json"
    job = json.loads(file.read_text())
    mounts = {}
    for volume in job["volumes"]:
        if volume["type"] == "bucket":
            mounts[volume["mountPath"]] = str(root / "buckets" / volume["source"])
        else:
            mounts[volume["mountPath"]] = snapshot_download(
                volume["source"], repo_type=volume["type"], revision=volume["revision"],
                token=job["secrets"]["HF_TOKEN"], cache_dir=folder.with_name("mounts"),
            )  # fmt: skip
    environment = {key: mounts.get(value, value) for key, value in job["environment"].items()}
    environment |= job["secrets"] | variables
    folder.mkdir()
    with open(file.with_suffix(".log"), "w") as log:
        done = subprocess.run(
            job["command"], cwd=folder, env=os.environ | environment, stdout=log, stderr=log
        )
    stage = "ERROR" if done.returncode else "COMPLETED"
    job["status"] = {"stage": stage, "message": None}
    file.write_text(json.dumps(job, indent=1))
    return done.returncode
