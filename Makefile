# Two commands set everything up by themselves: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CLIENTS := .venv-clients
# what is wrong is still said, that a folder of the environment holds no package is not; Python compiles what is imported
PIP := -m pip install --quiet --quiet --disable-pip-version-check --no-compile
# compilers find again what they compiled before, in this run or an earlier one: the key is the whole program; to keep
# what JAX compiles in less than a tenth of a second takes longer than to compile it; Python keeps what it imports there
# too, also where the environment (a container's, often) tells it to keep nothing: each of the many processes would
# compile a framework for seconds; what the processor has the compiler knows, which PyTorch would try in each process
KEPT := $(CURDIR)/.cache
PYTEST = PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(KEPT)/python OMP_NUM_THREADS=1 \
    JAX_COMPILATION_CACHE_DIR=$(KEPT)/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 \
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 TORCHINDUCTOR_CACHE_DIR=$(KEPT)/inductor \
    TORCHINDUCTOR_VEC_ISA_OK=1 $(SOON) $(BIN)/python -m pytest -q --durations=25
# a test runs once what it compiles: XLA, in JAX and in TensorFlow, makes plain code in a third of the time, and cuts no
# small program into pieces for several threads
test test-quick: SOON = XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
    --xla_cpu_parallel_codegen_split_count=1"
# processes after each other, so that none keeps what all three frameworks have compiled: what needs hardly any of them,
# what compares all and what users type, and the tests of backends in two halves
PARTS := "tests/core tests/convert" "conformance tests --ignore=tests/core --ignore=tests/convert --ignore=tests/backends" \
    "tests/backends --ignore-glob=*/test_[p-z]*" "tests/backends --ignore-glob=*/test_[a-o]*"

demo: $(STAMP)
	$(BIN)/mistral demo

test: TIER = not sweep and not slow
test-all: TIER = not sweep
# the types of the sources are one of the tests, beside others
test test-all: style
	failed=0; for part in $(PARTS); do \
	    $(PYTEST) -n 2 --dist loadgroup --no-loadscope-reorder -m "$(TIER)" $$part || failed=1; \
	done; exit $$failed

# the core, and the pieces of one backend, for a change that is being made: make test-quick BACKEND=flax
BACKEND ?= torch
QUICK = not test_conformance or $(BACKEND)-eager-float32 and (functions or blocks or whole or greedy)

test-quick: $(STAMP)
	$(BIN)/ruff check .
	MISTRAL_TEST_BACKENDS=$(BACKEND) $(PYTEST) -n 2 --dist loadfile -m "not sweep and not slow" -k "$(QUICK)" \
	    tests/core tests/test_imports.py tests/test_mirrors.py tests/test_public_api.py conformance/test_conformance.py

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

sweep: $(STAMP)
	$(PYTEST) -m sweep

conformance: $(STAMP)
	$(BIN)/python -m conformance

# what a GPU is asked, with the Python that holds PyTorch and JAX there; nothing is installed, the folder is enough
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

# the site, in site/
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# trainers, harnesses and adapters of others on the PyTorch models, in an environment of their own: docs/clients.md
clients: $(CLIENTS)/installed
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -q tests/clients tests/backends/test_torch_clients.py

$(CLIENTS)/installed: pyproject.toml constraints.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP) -c constraints.txt torch
	$(CLIENTS)/bin/python $(PIP) -c constraints.txt \
	    -c tests/clients/constraints.txt -e '.[torch]' pytest transformers accelerate peft datasets trl lm-eval outlines \
	    xgrammar sentence-transformers langchain-core
	# it asks for an older huggingface_hub than transformers does, and runs with the newer one
	$(CLIENTS)/bin/python $(PIP) -c tests/clients/constraints.txt \
	    --no-deps langchain-huggingface
	touch $(CLIENTS)/installed

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	# the pip that comes with Python 3.11 looks for packages half as fast
	$(BIN)/python $(PIP) --upgrade pip
	$(BIN)/python $(PIP) -c constraints.txt torch
	$(BIN)/python $(PIP) -c constraints.txt -e '.[torch,flax,tf,convert,orbax,chat,pictures,fast,mistral-common,docs,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(CLIENTS) .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: demo test test-all test-quick style lint sweep conformance gpu docs clients clean
