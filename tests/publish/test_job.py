import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import run_job
from hub_fixtures import MINE
from jobs import run_recorded_job
from pipeline.errors import UserError
from pipeline.publish.job import follow
from samples import ROOT, run_script

REPO = "me/from-a-job"
JOB = (REPO, "--recipe=demo", "--license=apache-2.0", "--flavor=cpu-basic")


@pytest.fixture
def api(hub_server, here, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("a job takes its code from git, and this is no checkout")
    monkeypatch.setenv("HF_TOKEN", MINE)
    return HfApi(endpoint=hub_server.url, token=MINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flavor=a10g-small"], r'TIMEOUT is "": set a time limit'),
        (["--flavor=a10g-small", "--timeout=2"], r'TIMEOUT is "2": set a time limit'),
        (["--flavor=h9000", "--timeout=2h"], r'no machine "h9000"; choose from cpu-basic'),
        (["--flavor=t4-small", "--timeout=2h", "--dataset=photos"], r"folder on this machine"),
        (["--flavor=t4-small", "--timeout=2h", "--learnig_rate=1"], r'mean "learning_rate"'),
        (["--flavor=t4-small", "--timeout=2h", "--recipe=tiny.yaml"], r"not in git: commit it"),
        (["--flavor=t4-small", "--timeout=2h"], r"trained from scratch: set the license"),
    ],
)
def test_a_job_that_can_not_work_is_refused_before_it_costs(
    api, hub_server, tiny_recipe, monkeypatch, options, message
):
    Path("photos").mkdir()
    with pytest.raises(UserError, match=message):
        run_script(monkeypatch, run_job.main, REPO, "--recipe=demo", "--yes", *options)
    assert not (hub_server.root / "jobs").exists()


def test_a_dry_run_says_the_price_and_starts_nothing(api, hub_server, monkeypatch, capsys):
    run_script(monkeypatch, run_job.main, *JOB, "--timeout=90m", "--dry_run", "--seed=3")
    text = capsys.readouterr().out
    assert "$0.01 per hour, at most $0.02 in 90m" in text
    assert "make train NPROC=$((gpus > 1 ? gpus : 1)) RECIPE=demo ARGS='--run=demo" in text
    assert MINE not in text
    assert not (hub_server.root / "jobs").exists()


@pytest.mark.slow
def test_the_recorded_job_trains_evaluates_and_publishes(api, hub_server, monkeypatch, capsys):
    options = ("--timeout=1h", "--yes", "--detach", "--max_steps=8", "--eval_steps=4")
    options += ("--eval_strategy=steps", "--save_strategy=steps", "--save_steps=4")
    run_script(monkeypatch, run_job.main, *JOB, *options)
    (record,) = (hub_server.root / "jobs/me").glob("*.json")
    job = api.inspect_job(job_id=record.stem, namespace="me")
    assert job.status.stage == "SCHEDULING"
    assert job.secrets == {"HF_TOKEN": None}
    assert MINE not in capsys.readouterr().out
    private = api.repo_info(f"{REPO}-code", repo_type="dataset").private
    assert private

    # As the service would, but for the packages, which are those of this environment.
    tools = Path("tools").absolute()
    tools.mkdir()
    for name, line in {
        "python": f'exec {sys.executable} "$@"', "pip": "true", "make-venv": "mkdir -p .venv",
    }.items():  # fmt: skip
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    variables = {
        "MAKEFLAGS": f"BIN={tools} PYTHON={tools / 'make-venv'} TORCH=",
        "PYTHONPATH": ".",  # the uploaded code, not the installed one
        "HF_ENDPOINT": hub_server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    folder = Path("empty").absolute()
    status = run_recorded_job(hub_server.root, "me", job.id, folder, **variables)
    log = record.with_suffix(".log").read_text()
    assert status == 0, log[-3000:]
    capsys.readouterr()
    follow(api, job)
    assert "Validation accuracy" in capsys.readouterr().out
    assert api.file_exists(REPO, "model.safetensors")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    results = Path(api.hf_hub_download(REPO, "evaluation_results.json", local_dir="copy"))
    assert head.stdout.strip() in results.read_text()
    # Where the next start of the job would go on.
    bucket = hub_server.root / "buckets" / f"{REPO}-checkpoints"
    assert any(bucket.glob("demo/checkpoint-*/model.safetensors"))
