"""The commands' help, which needs none of the libraries that take seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from samples import ROOT

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", [*SCRIPTS, "benchmarks"], ids=lambda script: Path(script).stem)
def test_the_help_answers_without_the_heavy_imports(script):
    module = ["-m", script] if script == "benchmarks" else [script]
    command = [sys.executable, "-X", "importtime", *module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ")
    assert "argparse" in done.stderr  # the modules that were imported
    assert not [name for name in ("torch", "transformers", "gradio") if name in done.stderr]
