import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from samples import ROOT


def test_a_missing_dashboard_package_is_named_before_anything_is_loaded(tiny_recipe):
    with pytest.raises(UserError, match=r"clearml.*not available.*pip install clearml"):
        load_recipe(tiny_recipe, ["--report_to=clearml"])


def test_addresses_of_dashboards_enter_no_recipe(tiny_recipe):
    options = ["--report_to=tensorboard", "--trackio_space_id=me/secret", "--project=secret"]
    assert "secret" not in str(load_recipe(tiny_recipe, options).settings)


@pytest.mark.slow
def test_trackio_and_tensorboard_keep_the_curves_of_a_run_on_this_machine(tiny_recipe, here):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    pytest.importorskip("trackio")
    command = [sys.executable, ROOT / "scripts/train_vit.py", "--recipe", tiny_recipe]
    command += ["--run=watched", "--max_steps=6", "--logging_steps=2", "--project=vit"]
    environment = os.environ | {"TRACKIO_DIR": str(here / "trackio")}
    with open(tiny_recipe, "a") as file:
        file.write("report_to: [trackio, tensorboard]\n")
    subprocess.run(command, env=environment, check=True)

    log = json.loads(Path("models/watched/training.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 3
    reader = [Path(sys.executable).with_name("trackio"), "get", "metric", "--json", "--project=vit"]
    reply = subprocess.run(
        [*reader, "--run=watched", "--metric=train/loss"],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    values = json.loads(reply.stdout)["values"]
    assert [value["value"] for value in values] == pytest.approx(losses)
    events = event_accumulator.EventAccumulator(
        str(next(Path("models/checkpoints/watched").rglob("events.out.*")).parent)
    )
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert "trackio" not in yaml.safe_load(Path("models/watched/recipe.yaml").read_text())
