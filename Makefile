# Everything happens in .venv, made here from pyproject.toml; Python 3.11 or newer is all that is needed.
PYTHON ?= python3
BIN := .venv/bin
# Where this is set, each of the tests' many processes compiles torch's sources anew, which takes 20 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-slow bench check clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	touch .venv/installed

demo: setup
	$(BIN)/offline-kd run pipelines/digits.yaml --out runs/digits

# One process a core.
test: setup check
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist worksteal

# Needs the real images and teachers: OFFLINE_KD_DATA=FOLDER make test-slow
test-slow: setup
	$(BIN)/python -m pytest -m slow

# The ratios of docs/ratios.yaml measured again, and which are worse; CIFAR-10 too where OFFLINE_KD_DATA names its folder.
bench: setup
	$(BIN)/python tests/bench_guard.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs data build *.egg-info
