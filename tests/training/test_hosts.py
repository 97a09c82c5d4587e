"""Two hosts with addresses of their own, as two network namespaces of this one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.evaluation.metrics import wilson_interval
from pipeline.recipe import load_recipe
from pipeline.training.checkpoints import last_checkpoint
from pipeline.training.train import train
from samples import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.root]
# Either host may be lost but the one where they meet. That one is the second here, so that the one
# lost is the one that writes the checkpoints: ranks go by address.
MAIN = "10.77.0.2:29500"
STEPS = 60


class Host:
    """A network namespace with one address, and what is started in it."""

    def __init__(self, number: int):
        self.name = f"host{number}-{os.getpid()}"
        # As on real hosts, each has a name of its own that resolves to its address on both.
        self.etc = Path("/etc/netns") / self.name
        self.etc.mkdir(parents=True)
        names = "".join(f"10.77.0.{n} host{n}\n" for n in (1, 2))
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self.hostname = f"host{number}"
        self.link = f"veth{number}-{os.getpid() % 10**6}"
        self.address = f"10.77.0.{number}/24"
        ip("netns", "add", self.name)

    def connect(self) -> None:
        ip("-n", self.name, "addr", "add", self.address, "dev", self.link)
        for link in ("lo", self.link):
            ip("-n", self.name, "link", "set", link, "up")

    def start(self, log: Path, *command: str | Path) -> subprocess.Popen:
        with open(log, "a") as output:
            return subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    self.name,
                    "unshare",
                    "--uts",
                    "sh",
                    "-c",
                    'hostname "$0" && exec "$@"',
                    self.hostname,
                    *command,
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )

    def kill(self) -> None:
        """Every process on it, at once, with no time to clean up."""
        listing = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in listing.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def remove(self) -> None:
        self.kill()
        ip("netns", "del", self.name)  # its end of the link goes with it, and so the other
        shutil.rmtree(self.etc)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("no ip(8) to make network namespaces with")
    made = []
    try:
        try:
            for number in (1, 2):
                made.append(Host(number))
            first, second = made
            ends = ["add", first.link, "netns", first.name, "type", "veth"]
            ip("link", *ends, "peer", "name", second.link, "netns", second.name)
            for host in made:
                host.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield made
    finally:
        for host in made:
            host.remove()


def test_two_hosts_go_on_after_one_was_killed_and_started_again(hosts, tiny_recipe, here):
    same = [f"--max_steps={STEPS}", "--random_crop_padding=0"]
    one = train(load_recipe(tiny_recipe, same, "one"))

    for name in ("Makefile", "pipeline", "scripts"):
        (here / name).symlink_to(ROOT / name)
    every = ["--eval_strategy=steps", "--eval_steps=10", "--save_strategy=steps", "--save_steps=10"]
    batch = ["--per_device_train_batch_size=32"]  # each: together the batch of one process
    command = [
        "make", "-o", ".venv/.runs", f"BIN={Path(sys.executable).parent}", "train", "NNODES=2",
        f"MAIN={MAIN}", f"RECIPE={tiny_recipe}",
        f"ARGS=--run=two {' '.join([*same, *every, *batch])}",
    ]  # fmt: skip
    logs = [here / f"{host.name}.log" for host in hosts]
    running = [host.start(log, *command) for host, log in zip(hosts, logs, strict=True)]

    checkpoints = here / "models/checkpoints/two"
    wait_for(lambda: any(checkpoints.glob("*/trainer_state.json")), running, logs)
    hosts[0].kill()
    assert running[0].wait() != 0
    assert not (here / "models/two").exists()
    saved = json.loads((last_checkpoint(checkpoints) / "trainer_state.json").read_text())

    running[0] = hosts[0].start(logs[0], *command)
    wait_for(lambda: all(process.poll() == 0 for process in running), running, logs)
    two = json.loads((here / "models/two/training.json").read_text())
    assert (two["processes"], two["steps"]) == (2, STEPS)
    # It did not begin anew: its log begins with what was done before.
    assert saved["log_history"]
    assert two["log"][: len(saved["log_history"])] == saved["log_history"]
    images = one["validation_images"]
    low, high = wilson_interval(round(one["validation_accuracy"] * images), images)
    assert low <= two["validation_accuracy"] <= high


def wait_for(done, running: list[subprocess.Popen], logs: list[Path]) -> None:
    deadline = time.monotonic() + 240
    while not done():
        failed = [process.poll() for process in running if process.poll() not in (None, 0)]
        assert not failed and time.monotonic() < deadline, "\n".join(
            log.read_text()[-3000:] for log in logs
        )
        time.sleep(0.02)
