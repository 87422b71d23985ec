# Two commands on a fresh clone: `make demo` and `make test`. Each makes its own environment in .venv first.
#   PYTHON=python3.12 make test     another interpreter
#   EXTRAS=dev CONSTRAINTS= make test     on a GPU machine: torch as pip finds it

PYTHON ?= python3
VENV ?= .venv
# Without a GPU the constraints file pins torch's CPU build.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints.txt)
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo test test-long lint bench clean

demo: $(VENV)/.installed
	$(BIN)/python pipelines/generate.py --demo

# Three processes for two cores: most of a job's time in the tests is Ray starting. The order of the files is that of their length.
# What fails among them runs once more with the machine to itself: real clusters that miss a time limit then pass, and a defect fails again.
test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not long" || { \
	    echo "some tests failed beside others; once more, alone:"; \
	    $(BIN)/python -m pytest --last-failed --last-failed-no-failures none -m "not long"; }

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/run_all.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) *_output build *.egg-info
