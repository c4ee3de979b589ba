# make demo   the main job, from nothing: fit a small model, train it with DPO, measure, draw
# make test   the whole test suite, the formatters and the linter
# Both make their own virtual environment in .venv and install what they need with pip.
PYTHON ?= python3
# For a CPU-only build of torch, or another version: make test TORCH="torch==2.13.0+cpu"
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# What the environment has to hold, and what it was made to hold: another TORCH is installed over the
# old one, another PYTHON is refused.
WANTED := $(TORCH) on $(shell $(PYTHON) --version)
MADE := $(shell cat $(VENV)/torch 2>/dev/null)
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test check bench format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/fastpo demo --output runs/demo

test: $(VENV)/installed-tests check
	# One worker per core, each with one thread: half the time of one worker with all of them.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8

check: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/sim -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/installed-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/sim -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(VENV)/installed-tests
	$(BIN)/python benchmarks/run.py logprobs

ifneq ($(MADE),$(WANTED))
.PHONY: $(VENV)/torch
endif
# torch first and by its exact version, so that no later step brings another.
$(VENV)/torch:
	@! test -e $(BIN)/python || test "$$($(BIN)/python --version)" = "$$($(PYTHON) --version)" || \
		{ echo "$(VENV) is of $$($(BIN)/python --version), PYTHON=$(PYTHON) is another:" \
		"make clean first, or name another folder with VENV=..."; exit 1; }
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	echo "$(WANTED)" > $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[train,diffusion]"
	touch $@

# The tests want the simulator's modules too.
$(VENV)/installed-tests: $(VENV)/torch $(SOURCES)
	FASTPO_SIM=ON $(BIN)/python -m pip install --quiet --editable ".[train,diffusion,test,peers]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build runs fastpo/*.so *.egg-info
