# Two commands set everything up and run the main job; the third runs the tests.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: setup quickstart test smoke slow lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py nas/native/build.py nas/native/kernels.cc
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt jaxlib  # first: its headers compile nas/native
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(RUN)/nas run experiments/quickstart.toml

test: setup
	$(RUN)/python -m pytest -m "not slow" -n 2 --dist loadfile

smoke: setup
	$(RUN)/python -m pytest -m slow tests/pipeline

slow: setup
	$(RUN)/python -m pytest -m slow

lint: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright --pythonpath $(RUN)/python

format: setup
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
