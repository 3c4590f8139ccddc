# Every target makes the environment it needs in .venv, from the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
TODAY := $(shell date +%F)
# What the distributions are built from.
SOURCES := $(shell find kalm_rag integrations -type f -not -path '*/tests/*' -not -path '*/__pycache__/*' -not -path '*/.*') \
  pyproject.toml hatch_build.py README.md CHANGELOG.md CITATION.cff LICENSE SECURITY.md
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test servers bench faults soak test-scripts test-ray-serve test-lowest test-newest test-floors test-spark test-clients lint types docs
.PHONY: dist check clean

demo: $(VENV)/.demo
	$(VENV)/bin/kalm-rag demo

# Two processes of one thread each, a file of tests at a time: small models gain nothing from more threads.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

# The servers that tests of a shared tier start; without them these tests are skipped. Debian and Ubuntu.
servers:
	command -v redis-server || { sudo apt-get update && sudo apt-get install --yes redis-server; }
	command -v azurite-blob || npm install --global azurite

# Every figure of the documentation; takes hours on 2 cores.
bench: $(VENV)/.dev
	for name in replay startup threads warm encoder memory compact eviction repeats many_queries refine windows highlight sizing cache remote precision peers adapters serve ray_serve; do $(VENV)/bin/python benchmarks/$$name.py $(BENCH) || exit 1; done

# The fault tests with large counts: at least 1,000 kills, 10,000 bit flips and 5,000 queries to a shared tier that fails.
faults: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/cache/test_faults.py tests/cache/test_store_*.py tests/cache/test_power_loss.py \
	  tests/remote/test_remote_faults.py --faults 85 --timeout 7200

# A server under mixed load for SOAK minutes, and 10,000 malformed bodies: no failure, no hang, no growth of memory.
SOAK ?= 30
soak: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/serving/test_fuzz.py tests/serving/test_soak.py --bodies 10000 --soak $(SOAK) --timeout 7200 -s

# The benchmark scripts, the slow ones among them.
test-scripts: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_benchmarks.py --scripts

# The server on Ray Serve: two replicas on a Ray of this machine.
test-ray-serve: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/serving/test_ray_serve.py tests/test_benchmarks.py::test_routes_of_ray_serve \
	  --ray-serve

# The oldest transformers that pyproject.toml allows.
test-lowest: $(VENV)-lowest/.ready
	$(VENV)-lowest/bin/python -m pytest tests \
	  --ignore tests/test_frameworks.py --ignore tests/test_examples.py --ignore tests/test_benchmarks.py \
	  --ignore tests/test_snippets.py --ignore tests/test_distributions.py

# The built wheels with the newest transformers, frameworks and everything else that they allow, torch apart. A use that a
# release deprecates is an error, so that it is mended before a later one removes it. The first command runs outside of
# the repository and isolated, so that it imports what is installed.
test-newest: $(VENV)-newest/.ready
	cd $(VENV)-newest && $(CURDIR)/$(VENV)-newest/bin/python -I -W error $(CURDIR)/tests/smoke.py
	$(VENV)-newest/bin/python -m pytest -W error::FutureWarning -W error::DeprecationWarning \
	  tests/test_newest.py tests/model/test_loading.py

# The oldest frameworks that the integrations allow.
test-floors: $(VENV)-floors/.ready
	$(VENV)-floors/bin/python -m pytest integrations

# The encoder on Spark, which needs Java 17 or newer (Debian: default-jre-headless).
test-spark: $(VENV)-spark/.ready
	OMP_NUM_THREADS=1 $(VENV)-spark/bin/python -m pytest tests/distributed/test_spark.py tests/test_examples.py -k spark

# Real clients of `kalm-rag serve`, which runs in .venv. The clients are downloaded into environments of their own, without
# torch; not all of them can be installed side by side.
CLIENTS := cohere5 cohere7
test-clients: $(VENV)/.dev $(CLIENTS:%=$(VENV)-clients-%/.ready) tests/clients/node_modules/.ready
	for name in $(CLIENTS); do \
	  $(VENV)-clients-$$name/bin/python -m pytest -c tests/clients/pytest.ini tests/clients --environment $$name \
	    --kalm-rag $(VENV)/bin/kalm-rag || exit 1; \
	done
	$(VENV)-clients-cohere7/bin/python -m pytest -c tests/clients/pytest.ini tests/clients --environment node \
	  --kalm-rag $(VENV)/bin/kalm-rag

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy
	cd integrations/langchain && $(CURDIR)/$(VENV)/bin/mypy --config-file pyproject.toml -p langchain_kalm
	cd integrations/llama-index && $(CURDIR)/$(VENV)/bin/mypy --config-file pyproject.toml -p llama_index.postprocessor.kalm_rerank
	cd integrations/haystack/src && $(CURDIR)/$(VENV)/bin/mypy --config-file ../pyproject.toml -p haystack_integrations.components.rankers.kalm
	$(VENV)/bin/mypy --strict --python-version 3.11 tests/typed
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python --level error tests/typed

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

dist: dist/.ready

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
	$(PIP) --editable '.[demo,eval,tune,redis,objects,serve]' --group dev
	for place in integrations/*/; do $(PIP) --no-deps --editable $$place || exit 1; done
	touch $@

$(VENV)-lowest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 transformers==5.3.0 --editable '.[demo,eval,tune,redis,objects,serve]' --group test
	touch $@

dist/.ready: $(VENV)/.dev $(SOURCES)
	rm -rf dist
	for place in . integrations/*/; do \
	  $(VENV)/bin/python -m build --no-isolation --quiet --outdir dist $$place || exit 1; \
	done
	$(VENV)/bin/twine check --strict dist/*
	touch $@

# Made again each day: what is newest changes without a change here.
$(VENV)-newest/.ready: dist/.ready $(VENV)-newest/$(TODAY)
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-newest/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  --find-links dist torch==2.13.0 'kalm-rag[demo,eval,haystack,langchain,llama-index]' \
	  hypothesis pytest pytest-asyncio pytest-timeout
	$(VENV)-newest/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	touch $@

$(VENV)-newest/$(TODAY):
	mkdir -p $(VENV)-newest && touch $@

$(VENV)-floors/.ready: pyproject.toml constraints.txt integrations/*/pyproject.toml
	$(PYTHON) -m venv $(VENV)-floors
	$(VENV)-floors/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-floors/bin/pip install --quiet --disable-pip-version-check --group test torch==2.13.0 --editable . \
	  langchain-core==1.2.20 'langchain-classic>=1' langchain-tests llama-index-core==0.13.0 \
	  llama-index-retrievers-bm25 haystack-ai==2.24.0
	for place in integrations/*/; do $(VENV)-floors/bin/pip install --quiet --no-deps --editable $$place || exit 1; done
	touch $@

$(VENV)-spark/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-spark
	$(VENV)-spark/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-spark/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . \
	  hypothesis pandas pyarrow pyspark pytest pytest-asyncio pytest-timeout
	touch $@

$(VENV)-clients-%/.ready: tests/clients/%.txt
	$(PYTHON) -m venv $(VENV)-clients-$*
	$(VENV)-clients-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

tests/clients/node_modules/.ready: tests/clients/package.json tests/clients/package-lock.json
	@command -v npm >/dev/null || { \
	  echo "make test-clients needs Node.js 18 or newer, with npm, for clients in JavaScript (Debian: nodejs, npm)"; exit 1; }
	npm ci --prefix tests/clients --no-audit --no-fund
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-floors $(VENV)-spark $(VENV)-clients-* tests/clients/node_modules dist site
