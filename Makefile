# Everything works from a clean clone with only Python >= 3.11, make and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLUSTERS := tests/integration/slurm tests/integration/ray tests/integration/hosts

.PHONY: demo demo-clean speedrun test test-slow test-cluster test-all check bench format

# DEMO='steps=2000' trains the second stage for longer.
demo: $(STAMP)
	$(BIN)/ldm demo $(DEMO)

demo-clean: $(STAMP)
	$(BIN)/ldm demo --fresh

# Steps, images and seconds until the demo's second stage draws what it is asked for. SPEEDRUN='optimizer.name=muon'
# is a recipe of your own; a folder holds one race.
SPEEDRUN_OUT ?= .speedrun
speedrun: $(STAMP)
	$(BIN)/python experiments/speedrun.py --out $(SPEEDRUN_OUT) $(SPEEDRUN)

# Made for CPU cores, also where there is a GPU; `pytest -m gpu` is what is made for that one.
speedrun test test-slow: export CUDA_VISIBLE_DEVICES =
test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Real SLURM, real Ray, hosts with addresses of their own; says what is missing where it cannot run.
test-cluster: $(STAMP)
	$(BIN)/python -m pytest -rs $(PYTEST_OPTIONS) $(CLUSTERS)

# Also the long ones: the kill matrix, chains of layouts, full fuzzing, training every task.
test-all: test test-slow test-cluster

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(CLUSTERS:%=--ignore=%) -n auto --maxprocesses 2 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Side-by-side figures, most of an hour; each prints a table (copy it into benchmarks/RESULTS.md).
BENCHMARKS = decode.py ema.py step.py checkpoint.py loader.py "rng.py configs/demo_text_to_image.yaml" "goodput.py measure"
bench: $(STAMP)
	for run in $(BENCHMARKS); do echo "== $$run"; $(BIN)/python benchmarks/$$run || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,evaluation,lora,report,local-s3]' --group dev
	touch $(STAMP)
