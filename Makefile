# `make demo` and `make test` do everything, from an empty machine with Python, make and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= auto

.PHONY: faults setup demo test test-slow fuzz check docs bench bench-quality peers build clean
setup: .venv/ready

# llama-cpp-python is built here, with the flags that this compiler needs to build it right. pip may take a build of its
# own cache instead, made with others; so llama.cpp's kernels are tried before they are trusted (`doctor`).
.venv/ready: pyproject.toml tools/llama_build_flags.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	flags="$$($(BIN)/python tools/llama_build_flags.py)" && \
	CFLAGS="$$CFLAGS $$flags" CXXFLAGS="$$CXXFLAGS $$flags" $(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/pocketquant doctor
	touch $@

demo: setup
	$(BIN)/pocketquant demo

# Every test is in one of the two: those of over about ten seconds have the marker `slow`.
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

# Damaged inputs for every reader, for as long as one likes; FUZZ="--minutes 60 --seed 1", "--replay FILE"
fuzz: setup
	$(BIN)/python tools/fuzz.py $(FUZZ)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/make_reference.py --check

docs: setup
	$(BIN)/python tools/make_reference.py

# Loss per byte against llama.cpp's quantizer; QUALITY="--source ... --calibration ... --evaluation NAME=FILE ..."
bench-quality: setup
	$(BIN)/python benchmarks/quality.py $(QUALITY)

# Hundreds of interrupts, kills and faults through every command: half an hour; FAULTS="--interrupts 20 --kills 20"
faults: setup
	$(BIN)/python tools/faults.py $(FAULTS)

bench: setup
	$(BIN)/python benchmarks/run.py $(BENCH)

# The oracles of the peer tests, kept out of .venv: llama.cpp's converter, transformers and torch (CPU).
peers: setup .venv-peers/ready
	$(BIN)/python -m pytest -n $(WORKERS) tests/peers -rs

.venv-peers/ready: tools/requirements.txt tools/get_converter.py
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r tools/requirements.txt
	.venv-peers/bin/python tools/get_converter.py
	touch $@

build: setup
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf .venv .venv-peers build dist demo-out .pytest_cache .mypy_cache .ruff_cache
