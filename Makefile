# Every target makes the environment it needs in .venv, from the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test bench faults test-lowest lint types docs dist check clean

demo: $(VENV)/.demo
	$(VENV)/bin/kalm-rag demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

# Every figure of the documentation; about half an hour on 2 cores.
bench: $(VENV)/.dev
	for name in startup warm memory cache precision peers; do $(VENV)/bin/python benchmarks/$$name.py $(BENCH) || exit 1; done

# The fault tests with large counts: at least 1,000 kills and 10,000 bit flips.
faults: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/test_faults.py --faults 85 --timeout 3600

# The oldest transformers that pyproject.toml allows.
test-lowest: $(VENV)-lowest/.ready
	$(VENV)-lowest/bin/python -m pytest

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy
	cd integrations/langchain && ../../$(VENV)/bin/mypy --strict --ignore-missing-imports langchain_kalm

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

dist: $(VENV)/.dev
	rm -rf dist
	for place in . integrations/*; do $(VENV)/bin/python -m build --quiet --outdir dist $$place || exit 1; done
	$(VENV)/bin/twine check --strict dist/*

check: lint types test docs dist

# pip knows dependency groups from 25.1 on.
$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]' --group dev
	$(PIP) --no-deps --editable integrations/langchain
	touch $@

$(VENV)-lowest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 transformers==5.3.0 --editable '.[demo]' --group test
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest dist site
