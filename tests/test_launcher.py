import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from safetensors.torch import load_file

from pipeline import launcher
from pipeline.errors import UserError

NAMES = {path.stem for path in launcher.LAUNCHERS.glob("*.yaml")}
# accelerate 1.15 shards over accelerators only: on a CPU its FSDP2 is quietly DDP. torch's own
# works there, over gloo; so say that this is an accelerator, where the Trainer asks.
ON_CPU = f"""
import sys
sys.path[:0] = ["{ROOT}", "{ROOT}/scripts"]
from accelerate.state import PartialState
from accelerate.utils import DistributedType
import train_vit
from pipeline import training

class Trainer(training.ImageTrainer):
    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.accelerator.is_fsdp2

training.ImageTrainer = Trainer
train_vit.main()
"""


def test_there_is_a_launcher_for_each_way_and_accelerate_reads_it():
    assert {"ddp", "fsdp2", "deepspeed", "hosts"} == NAMES
    kinds = {
        name: load_config_from_file(str(launcher._find(name))).distributed_type for name in NAMES
    }
    assert kinds == {
        "ddp": "MULTI_GPU",
        "hosts": "MULTI_GPU",
        "fsdp2": "FSDP",
        "deepspeed": "DEEPSPEED",
    }


def test_one_process_needs_no_accelerate():
    assert launcher.command(["train.py", "--seed=1"]) == [sys.executable, "train.py", "--seed=1"]
    assert launcher.environment(None) == {}


def test_several_hosts_do_not_begin_anew_by_themselves():
    with pytest.raises(UserError, match="remove the run's folders in models/"):
        launcher.command(["train.py", "--restart"], nnodes=2, main="127.0.0.1:1234")


def test_hosts_are_told_where_to_meet_and_which_of_them_it_is():
    command = launcher.command(["train.py"], nproc=4, nnodes=2, main="127.0.0.1:1234")
    options = dict(zip(command[3:-1:2], command[4:-1:2], strict=True))
    assert options["--num_processes"] == "8"  # accelerate counts those of all hosts
    assert options["--config_file"].endswith("hosts.yaml")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("127.0.0.1", "1234")
    assert options["--rdzv_conf"] == "is_host=true"
    # 192.0.2.1 is of a block for documentation: no host's own.
    command = launcher.command(["train.py"], nproc=4, nnodes=2, main="192.0.2.1")
    options = dict(zip(command[3:-1:2], command[4:-1:2], strict=True))
    assert options["--rdzv_conf"] == "is_host=false"
    assert options["--main_process_port"] == "29500"
    found = launcher.environment("127.0.0.1:1234")
    assert found["PET_LOCAL_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nproc": 2, "launcher": "dpp"}, 'no launcher "dpp"; choose from ddp, deepspeed'),
        ({"nproc": 0}, "1 or more"),
        ({"nnodes": 2}, "MAIN=host:port"),
        ({"nnodes": 2, "main": "here:port"}, "MAIN=host:port"),
        ({"nnodes": 2, "main": "nowhere.invalid:1"}, '"nowhere.invalid".*not known'),
        pytest.param(
            {"nproc": 2, "launcher": "deepspeed"},
            "DeepSpeed is not installed",
            marks=pytest.mark.skipif(find_spec("deepspeed") is not None, reason="it is installed"),
        ),
    ],
)
def test_what_cannot_be_started_is_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        launcher.command(["train.py"], **options)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_shards_want_an_accelerator():
    with pytest.raises(UserError, match="this host has none.*LAUNCHER=ddp"):
        launcher.command(["train.py"], launcher="fsdp2", nproc=2)


def run(name: str, kind: str, script: Path, recipe: str) -> dict[str, torch.Tensor]:
    """The weights of eleven steps in two processes, a checkpoint every four."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", launcher._find(kind)]
    launch += ["--num_processes=2", "--main_process_port=0", "--dynamo_backend=no"]
    steps = ["--eval_strategy=steps", "--eval_steps=4", "--save_strategy=steps", "--save_steps=4"]
    options = ["--recipe", recipe, f"--run={name}", *steps, "--save_total_limit=9"]
    result = subprocess.run(
        [sys.executable, *launch, script, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(f"models/{name}/model.safetensors")


def test_shards_train_resume_and_are_saved_as_a_whole_model(tiny_recipe, here):
    from transformers import AutoModelForImageClassification

    script = here / "on_cpu.py"
    script.write_text(ON_CPU)
    copies = run("copies", "ddp", ROOT / "scripts/train_vit.py", tiny_recipe)
    shards = run("shards", "fsdp2", script, tiny_recipe)
    assert shards.keys() == copies.keys()
    for name in copies:
        torch.testing.assert_close(shards[name], copies[name], atol=2e-4, rtol=0)
    config = AutoModelForImageClassification.from_pretrained("models/shards").config
    assert config.architectures == ["ViTForImageClassification"]

    # As if it had been killed after its first checkpoint.
    shutil.rmtree("models/shards")
    for later in ("checkpoint-8", "checkpoint-11"):
        shutil.rmtree(f"models/checkpoints/shards/{later}", ignore_errors=True)
    assert [p.name for p in Path("models/checkpoints/shards").glob("*-*")] == ["checkpoint-4"]
    resumed = run("shards", "fsdp2", script, tiny_recipe)
    assert all(torch.equal(resumed[name], shards[name]) for name in shards)
