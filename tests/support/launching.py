"""Start a script as the Makefile does."""

import os
import subprocess
import sys
from pathlib import Path

from samples import ROOT


def two_processes(launcher: str, script: list[str | Path]) -> subprocess.CompletedProcess:
    """Run a script and its arguments in two processes; `launcher` is in pipeline/launchers."""
    config = ROOT / f"pipeline/launchers/{launcher}.yaml"
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes=2"]
    return subprocess.run(
        [sys.executable, *command, *script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
