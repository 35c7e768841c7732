# Everything a developer or a new user needs, on a machine with Python 3.11 or later.
#   make demo    install into .venv if needed, then fine-tune the embedded model (minutes)
#   make test    install the development tools if needed, then the whole test suite
#   make check   lint, format, types, the fast tests about the house, licences and advisories of the
#                dependencies; what must pass before a commit
#   make bench   the measurements of benchmarks/ (long)
#   make sbom    the software bill of materials of a release, dist/lorica.cdx.json (CycloneDX)
#   make clean   remove what was built, .venv included

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test check bench sbom clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/lorica demo

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2

check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	$(RUN) -m pytest -q tests/house tests/config
	$(RUN) scripts/supply_chain.py licences > /dev/null
	$(RUN) scripts/supply_chain.py advisories

sbom: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[release]'
	mkdir -p dist
	$(VENV)/bin/cyclonedx-py environment $(RUN) --output-format JSON -o dist/lorica.cdx.json

bench: $(VENV)/.installed-dev
	$(RUN) benchmarks/e2e.py --seeds 0 1
	$(RUN) benchmarks/glue.py sst2 --seeds 0 1
	$(RUN) benchmarks/glue.py mrpc --seeds 0 1
	$(RUN) benchmarks/page.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say that an installation ended well with these inputs; a second call does not install again.
$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lorica needs Python 3.11 or later; this is %d.%d. Try: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(RUN)
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(RUN)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@
