"""A push that is killed at a random moment leaves the old state or the new one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from pipeline.publish.hub import MAIN, Repository
from pipeline.publish.verify import verify
from publishing import LICENSE, MODEL, REPO, RESULTS, record_figure, send
from samples import ROOT

KILLS = int(os.environ.get("KILLS", "2"))  # 30 take a quarter of an hour
PUSH = ["--model", str(MODEL), "--license", LICENSE, "--seed", "0"]


def start_push(api, tag: str) -> subprocess.Popen:
    flags = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_UPDATE_CHECK")
    variables = os.environ | {"HF_ENDPOINT": api.endpoint} | dict.fromkeys(flags, "1")
    variables |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", ROOT / "scripts/push_to_hub.py", REPO, *PUSH, "--tag", tag]
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_killed_push_leaves_the_old_state_or_the_new_one(api):
    send(api)
    record_figure("training_curves.png", content=b"curves")
    push = start_push(api, "whole")
    push.stdout.readline()  # imports are done, and the push begins
    start = time.monotonic()
    push.communicate()
    duration = time.monotonic() - start
    generator, outcomes = random.Random(0), {"old": 0, "new": 0, "new and tagged": 0}
    for i in range(KILLS):
        record_figure("training_curves.png", content=b"curves %d" % i)  # something to push
        old = Repository(api, REPO).refs()
        push = start_push(api, f"v{i}")
        push.stdout.readline()
        time.sleep(generator.uniform(0, 1.1 * duration))
        os.kill(push.pid, signal.SIGKILL)
        push.communicate()
        new = Repository(api, REPO).refs()
        changed = {ref for ref in new if new[ref] != old.get(ref)}
        assert changed in (set(), {MAIN}, {MAIN, f"refs/tags/v{i}"})
        files = {file.path for file in api.list_repo_tree(REPO, revision=new[MAIN], recursive=True)}
        assert "publication.json" in files
        if changed:
            verify(Repository(api, REPO), new[MAIN], images=5)
        outcomes[("old", "new", "new and tagged")[len(changed)]] += 1
        (RESULTS / "training_curves.png").unlink(missing_ok=True)
    print(outcomes)
    assert sum(outcomes.values()) == KILLS
