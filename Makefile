# Two commands matter: `make demo` and `make test`. Each installs what it needs the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo

.PHONY: demo test test-slow lint wheel pages docs clean

demo: $(STAMP)
	$(BIN)/compress quantize --method fp4 smollm2-135m --output $(DEMO) --force
	$(BIN)/compress eval $(DEMO) --baseline smollm2-135m --max-tokens 2048
	$(BIN)/compress generate $(DEMO) --baseline smollm2-135m --prompt "Why is the sky blue?" --max-new-tokens 40

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow or network"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the source distribution and the wheel from it, and runs the command from an empty folder: the linked packages
# must be real files in both.
wheel: $(STAMP)
	rm -rf build/wheel && mkdir -p build/wheel/site
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('build/wheel')"
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir build/wheel build/wheel/*.tar.gz
	$(BIN)/python -m pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -c "import compressor.kernels.dispatch, compressor.evals.compare, compressor.calibration.stats, pathlib; assert 'site' in compressor.__file__; assert (pathlib.Path(compressor.__file__).parent / 'methods/fp4.md').is_file()"
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -m compressor list methods
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -m compressor list methods gptq > /dev/null

# Pages of methods, from the pages beside the modules, the declared options and the tables of results.
pages: $(STAMP)
	$(BIN)/python -m compressor.pages

# The site, in build/site/site. A link to nowhere is an error.
docs: $(STAMP)
	rm -rf build/site && $(BIN)/python -m compressor.pages.site build/site
	cd build/site && ../../$(BIN)/zensical build --strict

clean:
	rm -rf $(VENV) build

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable ".[dev,docs]"
	touch $@
