# Every target sets up the environment first, so any of them works on a bare machine.
PYTHON ?= python3#           the Python (3.11) that the environment is made from
RECIPE ?= vit-base#          a name in pipeline/recipes, or a YAML file
DATASET ?=#                  a Hub id, a local folder, or digits (default: the recipe's)
MODEL ?=#                    a Hub id or a local folder (default: the recipe's; once trained: the last run)
REPO ?=#                     name/model on the Hub, to push to; name/model@rev, to verify; name/space
MODEL_REPO ?=#               space: the model it shows, name/model or name/model@rev
TAG ?=#                      push: a tag, set once the download is verified
DRY_RUN ?=#                  push, space: 1 sends nothing, and shows what would change
PRIVATE ?=#                  push, space: 1 makes a new repository private
PR ?=#                       push: 1 proposes it as a pull request
FULL ?=#                     push, verify: 1 classifies all test images, not 1,000
SHARE ?=#                    app: 1 makes a public link
QUICK ?=#                    bench: 1 measures all of it small, in 3 minutes
ROWS ?=#                     bench: some rows only, as in ROWS="train-base memory"
NPROC ?= 1#                  processes on each host, started by accelerate
LAUNCHER ?=#                 ddp, hosts, fsdp2 or deepspeed (default: ddp; hosts where NNODES says so)
NNODES ?= 1#                 hosts: the same command on each, in any order
MAIN ?=#                     NNODES: host:port of the first, where all meet
STREAMING ?=#                train: 1 reads images on the way and keeps none; say --max_steps in ARGS
ARGS ?=#                     anything else, as in ARGS="--learning_rate=2e-4 --seed=1"

BIN := .venv/bin
PUSH = $(if $(MODEL),--model $(MODEL)) $(if $(TAG),--tag $(TAG)) $(if $(DRY_RUN),--dry_run) \
	$(if $(PRIVATE),--private) $(if $(PR),--pr)
REHEARSE = $(BIN)/python scripts/local_hub.py --root results/demo/hub --run $(BIN)/python
CHECK = $(if $(FULL),--full) $(if $(DATASET),--dataset $(DATASET)) $(ARGS)
SELECT = $(if $(DATASET),--dataset $(DATASET)) $(if $(MODEL),--model $(MODEL)) $(ARGS)
LAUNCH = $(BIN)/python scripts/launch.py --nproc $(NPROC) --nnodes $(NNODES) \
	$(if $(LAUNCHER),--launcher $(LAUNCHER)) $(if $(MAIN),--main $(MAIN))

help: ## list the targets and their variables
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18
	@sed -nE 's/^([A-Z_]+) \?= ?(.*)# +(.*)/  \1=\2\t\3/p' Makefile | expand -t 18

setup: .venv/.runs ## make .venv from requirements.txt

.venv/.runs: requirements.txt
	@echo "Setting up .venv, a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.tests: requirements-dev.txt .venv/.runs
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

train: setup ## fine-tune by RECIPE; run again, it resumes
	$(LAUNCH) scripts/train_vit.py --recipe $(RECIPE) $(if $(STREAMING),--streaming) $(SELECT)

evaluate: setup ## score MODEL on the test split
	$(LAUNCH) scripts/evaluate_vit.py $(SELECT)

visualize: setup ## draw where MODEL looks, and measure how faithful that is
	$(BIN)/python scripts/visualize_attention.py $(SELECT)

push: setup ## publish MODEL as REPO: one commit, verified, then tagged
	$(BIN)/python scripts/push_to_hub.py "$(REPO)" $(PUSH) $(CHECK)

verify: setup ## download REPO and measure whether it keeps what its card says
	$(BIN)/python scripts/push_to_hub.py "$(REPO)" --verify_only $(CHECK)

app: setup ## open the Space here, on MODEL
	MODEL_ID="$(MODEL)" SHARE="$(SHARE)" $(BIN)/python space/app.py

space: setup ## publish the Space as REPO, showing MODEL_REPO
	$(BIN)/python scripts/deploy_space.py "$(REPO)" --model_repo "$(MODEL_REPO)" \
		$(if $(DRY_RUN),--dry_run) $(if $(PRIVATE),--private)

hub: setup ## a local Hub, to rehearse a publication; see ARGS=--help
	$(BIN)/python scripts/local_hub.py $(ARGS)

bench: setup ## measure it side by side with the example script people copy
	$(BIN)/python scripts/benchmark.py $(if $(QUICK),--quick) $(if $(ROWS),--rows $(ROWS)) $(SELECT)

demo: setup ## the whole way on scikit-learn's digits, in minutes, on any machine
	$(BIN)/python scripts/train_vit.py --recipe demo $(ARGS)
	$(BIN)/python scripts/evaluate_vit.py --model models/demo --results results/demo
	$(BIN)/python scripts/visualize_attention.py --model models/demo --results results/demo
	rm -rf results/demo/hub
	$(REHEARSE) scripts/push_to_hub.py me/demo --model models/demo --results results/demo --tag v1
	$(REHEARSE) scripts/predict.py me/demo@v1
	@echo "Its own page: make app MODEL=models/demo"

test: .venv/.tests ## run the tests
	$(BIN)/python -m pytest -q

lint: .venv/.tests ## check the code's form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove .venv and caches; models and results stay
	rm -rf .venv .pytest_cache .ruff_cache

.PHONY: help setup train evaluate visualize push verify app space hub bench demo test lint clean
