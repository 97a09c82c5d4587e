"""The configurations of `accelerate launch`, and sharded training."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from launching import two_processes
from samples import ROOT

LAUNCHERS = ROOT / "pipeline/launchers"
# accelerate 1.15 shards over accelerators only: on a CPU its FSDP2 is DDP without a warning. That
# of torch works there, over gloo; so claim that this is an accelerator, where the Trainer asks.
ON_CPU = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
import train_vit
from pipeline.training import train

class Trainer(train.ImageTrainer):
    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.accelerator.is_fsdp2

train.ImageTrainer = Trainer
train_vit.main()
"""


def test_accelerate_reads_every_launcher():
    kinds = {
        path.stem: load_config_from_file(str(path)).distributed_type
        for path in LAUNCHERS.glob("*.yaml")
    }
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ("RECIPE=demo", ".venv/bin/python scripts/train_vit.py"),
        ("NPROC=4", "accelerate.commands.launch --config_file pipeline/launchers/ddp.yaml"),
        ("NPROC=4 LAUNCHER=fsdp2", "pipeline/launchers/fsdp2.yaml"),
        ("NNODES=2 NPROC=4 MAIN=10.0.0.1:29500", "torch.distributed.run --nnodes 2"),
        ("NNODES=2 NPROC=4 MAIN=10.0.0.1:29500", "--rdzv-endpoint=10.0.0.1:29500"),
    ],
)
def test_the_makefile_starts_one_process_several_or_several_hosts(variables, command):
    printed = subprocess.run(
        ["make", "-n", "-o", ".venv/.runs", "train", *variables.split()],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert command in printed.replace("\\\n\t", "")


def test_values_with_spaces_stay_whole():
    printed = subprocess.run(
        ["make", "-n", "-o", ".venv/.runs", "train", "DATASET=my photos", "MODEL=a b"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert '--dataset "my photos" --model "a b"' in printed


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_sharding_needs_an_accelerator(tiny_recipe):
    script = [ROOT / "scripts/train_vit.py", "--recipe", tiny_recipe]
    result = two_processes("fsdp2", script)
    assert result.returncode != 0
    assert "this host has none" in result.stderr


def train_in_two(name: str, launcher: str, script: Path, recipe: str) -> dict[str, torch.Tensor]:
    """The weights of eleven steps in two processes, a checkpoint every four."""
    steps = ["--eval_strategy=steps", "--eval_steps=4", "--save_strategy=steps", "--save_steps=4"]
    options = ["--recipe", recipe, f"--run={name}", *steps, "--save_total_limit=9"]
    options.append("--linear_probe_samples=200")
    result = two_processes(launcher, [script, *options, "--max_steps=11"])
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(f"models/{name}/model.safetensors")


@pytest.mark.slow
def test_shards_train_resume_and_are_saved_as_a_complete_model(tiny_recipe, here):
    from transformers import AutoModelForImageClassification

    script = here / "on_cpu.py"
    script.write_text(f"import sys\nsys.path.append({str(ROOT / 'scripts')!r})\n{ON_CPU}")
    copies = train_in_two("copies", "ddp", ROOT / "scripts/train_vit.py", tiny_recipe)
    shards = train_in_two("shards", "fsdp2", script, tiny_recipe)
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
    resumed = train_in_two("shards", "fsdp2", script, tiny_recipe)
    assert all(torch.equal(resumed[name], shards[name]) for name in shards)
