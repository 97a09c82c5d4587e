# Every target sets up the environment first where it needs it, so that any works on a new machine.
PYTHON ?= python3#       the Python (3.11 to 3.13) that the environment is made from
RECIPE ?= vit-base#      a name in pipeline/recipes, a YAML file, or hub:name/model
DATASET ?=#              a Hub id, a local folder, or digits (default: the recipe's)
MODEL ?=#                a Hub id or a local folder (default: the recipe's, or the last run)
IMAGES ?=#               files to classify: a folder, or a pattern
REPO ?=#                 name/model or name/space on the Hub
NPROC ?= 1#              processes on each host
LAUNCHER ?= ddp#         for several processes: ddp, fsdp2 or deepspeed
NNODES ?= 1#             hosts; start the same command on each
FLAVOR ?=#               hardware of a job, as a10g-small
TIMEOUT ?=#              time limit of a job, as 2h
RUNS ?=#                 two runs to compare
N ?= 3#                  seeds to average
MAIN ?=#                 for several hosts: host:port of the first one
ARGS ?=#                 options of the script, as in ARGS="--learning_rate=2e-4 --seed=1"

BIN := .venv/bin
PY = $(BIN)/python
SELECT = $(if $(DATASET),--dataset "$(DATASET)") $(if $(MODEL),--model "$(MODEL)") $(ARGS)
PROCESSES = $(PY) -m accelerate.commands.launch --config_file pipeline/launchers/$(LAUNCHER).yaml \
	--num_processes $(NPROC)
# Without the variable (torch 2.13), a host that stays looks for the store of one that is gone.
HOSTS = TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 $(PY) -m torch.distributed.run --nnodes $(NNODES) \
	--nproc-per-node $(NPROC) --rdzv-backend=c10d --rdzv-endpoint=$(MAIN) --max-restarts=3 --
LAUNCH = $(if $(filter-out 1,$(NNODES)),$(HOSTS),$(if $(filter-out 1,$(NPROC)),$(PROCESSES),$(PY)))
SEEDS = $(patsubst %,$(basename $(notdir $(RECIPE)))-seed%,$(shell seq $(N)))
LOCAL_HUB = $(PY) -m local_hub --root results/demo/hub --run $(PY)

# Without an NVIDIA GPU, torch's CPU build where it can be reached: 0.2 GB in place of 2.7 GB.
CPU_INDEX = https://download.pytorch.org/whl/cpu
TORCH = $(if $(shell command -v nvidia-smi),,$(shell curl -sfIm 3 $(CPU_INDEX)/torch/ > /dev/null && \
	echo --extra-index-url $(CPU_INDEX)))

help: ## list targets and variables
	@sed -nE 's/^([a-z-]+):.*## (.*) \| (.*)/  \1\t\2\n\t  \3/p; s/^([a-z-]+):.*## ([^|]*)$$/  \1\t\2/p' Makefile | expand -t 14
	@sed -nE 's/^([A-Z]+) \?= ?(.*)# +(.*)/  \1=\2\t\3/p' Makefile | expand -t 20

setup: .venv/.runs ## make .venv from requirements.txt | make setup PYTHON=python3.12

.venv/.runs: requirements.txt pyproject.toml
	@echo "Setting up .venv, a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -r requirements.txt
	@touch $@

.venv/.export: requirements-export.txt .venv/.runs
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-export.txt
	@touch $@

.venv/.audit: requirements-audit.txt .venv/.runs
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-audit.txt
	@touch $@

.venv/.tests: requirements-dev.txt requirements-export.txt requirements-audit.txt .venv/.runs
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

train: setup ## fine-tune by RECIPE; run again to resume | make train RECIPE=cpu ARGS="--seed=1 --run=second"
	$(LAUNCH) scripts/train_vit.py --recipe "$(RECIPE)" $(SELECT)

evaluate: setup ## evaluate MODEL on the test split | make evaluate MODEL=models/cpu
	$(LAUNCH) scripts/evaluate_vit.py $(SELECT)

audit: setup .venv/.audit ## look for duplicates, label errors and odd images | make audit DATASET=photos MODEL=models/cpu
	$(PY) scripts/audit.py $(SELECT)

compare: setup ## test whether two evaluated RUNS differ | make compare RUNS="first second"
	$(PY) scripts/compare.py $(RUNS)

seeds: setup ## train and evaluate N seeds of RECIPE, and average them | make seeds N=3 RECIPE=cpu
	set -e; for run in $(SEEDS); do \
		$(LAUNCH) scripts/train_vit.py --recipe "$(RECIPE)" $(SELECT) --seed=$${run##*-seed} --run=$$run; \
		$(LAUNCH) scripts/evaluate_vit.py --model models/$$run; done
	$(PY) scripts/compare.py --seeds $(SEEDS)

visualize: setup ## draw MODEL's attention, and measure how faithful it is | make visualize ARGS="--images cat.jpg"
	$(PY) scripts/visualize_attention.py $(SELECT)

predict: setup ## classify IMAGES with MODEL, and write a table | make predict IMAGES=photos MODEL=models/cpu
	$(PY) scripts/predict.py $(if $(IMAGES),--images "$(IMAGES)") $(SELECT)

export: setup .venv/.export ## export MODEL to ONNX, for the browser | make export MODEL=models/cpu
	$(PY) scripts/export_onnx.py $(SELECT)

push: setup ## publish MODEL as REPO in one verified commit | make push REPO=you/vit-cifar10 ARGS="--tag v1"
	$(PY) scripts/push_to_hub.py $(if $(REPO),"$(REPO)") $(SELECT)

verify: setup ## download REPO and check what its card says | make verify REPO=you/vit-cifar10@v1
	$(PY) scripts/push_to_hub.py "$(REPO)" --verify_only $(SELECT)

app: setup ## open the Space on this machine, with MODEL | make app MODEL=models/cpu
	MODEL_ID="$(MODEL)" $(PY) space/app.py

space: setup ## publish the Space as REPO, showing MODEL | make space REPO=you/look MODEL=you/vit-cifar10
	$(PY) scripts/deploy_space.py $(if $(REPO),"$(REPO)") $(if $(MODEL),--model "$(MODEL)") $(ARGS)

job: setup ## train, evaluate and publish as REPO on a rented GPU | make job REPO=you/vit-cifar10 FLAVOR=a10g-small TIMEOUT=2h
	$(PY) scripts/run_job.py "$(REPO)" --recipe "$(RECIPE)" --flavor "$(FLAVOR)" --timeout "$(TIMEOUT)" $(SELECT)

hub: setup ## start a local Hub, to rehearse a publication | make hub ARGS=--help
	$(PY) -m local_hub $(ARGS)

bench: setup ## compare with transformers' example script | make bench ARGS="--quick"
	$(PY) -m benchmarks $(SELECT)

demo: setup ## the whole pipeline on scikit-learn's digits, in minutes | make demo
	$(PY) scripts/train_vit.py --recipe demo $(ARGS)
	$(PY) scripts/evaluate_vit.py --model models/demo
	$(PY) scripts/visualize_attention.py --model models/demo --faithfulness=100
	rm -rf results/demo/hub
	$(LOCAL_HUB) scripts/push_to_hub.py me/demo --model models/demo --license apache-2.0 --tag v1
	@echo "Open its page: make app MODEL=models/demo"

test: .venv/.tests ## run the quick tests, two minutes | make test
	$(PY) -m pytest -q -n auto --dist loadfile -m "not slow"

test-all: .venv/.tests ## run all tests, a quarter of an hour | make test-all
	$(PY) -m pytest -q -n auto --dist loadfile

lint: .venv/.tests ## check style, formatting, docstrings and the import order | make lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean: ## remove .venv and caches; models and results stay | make clean
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache *.egg-info

.PHONY: help setup train evaluate audit compare seeds visualize predict export push verify app space job hub bench demo test test-all lint clean
