# Two commands set everything up by themselves: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CLIENTS := .venv-clients

demo: $(STAMP)
	$(BIN)/mistral demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not sweep" -n 2 --dist loadfile

sweep: $(STAMP)
	$(BIN)/python -m pytest -q -m sweep

conformance: $(STAMP)
	$(BIN)/python -m conformance

# trainers, harnesses and adapters of others on the PyTorch models, in an environment of their own: docs/clients.md
clients: $(CLIENTS)/installed
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -q tests/clients tests/backends/test_torch_clients.py

$(CLIENTS)/installed: pyproject.toml constraints.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -c tests/clients/constraints.txt -e '.[torch]' pytest transformers accelerate peft datasets trl lm-eval outlines \
	    xgrammar sentence-transformers langchain-core
	# it asks for an older huggingface_hub than transformers does, and runs with the newer one
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/clients/constraints.txt \
	    --no-deps langchain-huggingface
	touch $(CLIENTS)/installed

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,flax,tf,convert,orbax,chat,pictures,fast,mistral-common,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo test sweep conformance clients clean
