# Every target makes the environment it needs in .venv, from the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test faults test-lowest lint types docs dist check clean

demo: $(VENV)/.demo
	$(VENV)/bin/kalm-rag demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

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

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

dist: $(VENV)/.dev
	rm -rf dist
	$(VENV)/bin/python -m build --quiet .
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
	touch $@

$(VENV)-lowest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 transformers==5.3.0 --editable '.[demo]' --group test
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest dist site
