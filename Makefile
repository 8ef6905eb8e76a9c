# make demo: the paper's networks in miniature. make test: the tests. make lint: style.
# Everything runs in .venv, which the first of them makes; the paths are relative, so that the
# checkout may lie in a folder with spaces in its name.

EXTRA ?= cpu
DOCKER_EXTRA ?= cpu
PY := .venv/bin/python
READY := .venv/ready-$(EXTRA)
# PyTorch has an environment of its own, since nothing else needs it. On Linux its plain wheel brings
# CUDA along: set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels, and pip takes those.
# Of pytorchcv and tf-slim one network each is needed, which takes nothing else that they ask for.
PEERS := .venv-peers/ready
TPU := .venv-tpu/ready
COMMA := ,

.DEFAULT_GOAL := help
.PHONY: help demo test test-peers tpu-check docker-check data-imagenet lint format bench

help:
	@echo "make demo    train the paper's five networks in miniature and write their report"
	@echo "make test    run the tests"
	@echo "make test-peers"
	@echo "             compare the layer and the network with PyTorch's and TF-Slim's"
	@echo "make tpu-check"
	@echo "             lower every ImageNet network's steps for TPU, which takes none (Python 3.11 or 3.12)"
	@echo "make docker-check"
	@echo "             run what the Dockerfile runs, without an engine (installs TensorFlow anew)"
	@echo "make data-imagenet MANUAL_DIR=... [DATA_DIR=...]"
	@echo "             prepare ImageNet from its two official archives"
	@echo "make lint    check style; make format mends it"
	@echo "make bench   run the benchmarks (alone on the machine, please)"

# The first Python from 3.11 to 3.$(1) that really starts; a new setup.cfg installs anew.
find_python = for python in "$$PYTHON" python3 python3.13 python3.12 python3.11; do \
	  if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $(1)))' 2>/dev/null; \
	  then found="$$python"; break; fi; done; \
	if [ -z "$$found" ]; then echo "error: no Python from 3.11 to 3.$(1) found$(2); install one, or name it: make PYTHON=/path/to/python ..." >&2; exit 2; fi

$(READY): setup.cfg pyproject.toml
	@set -e; $(call find_python,13); \
	echo "Setting up .venv with $$("$$found" --version), TensorFlow for $(EXTRA); this takes a minute or two."; \
	"$$found" -m venv --clear .venv; \
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),dev]"; \
	touch $(READY)

demo: $(READY)
	@$(PY) -m launch.reproduce --scale=digits --workdir=runs/digits

test: $(READY)
	@$(PY) -m pytest -n 2 tests

$(PEERS): $(READY) Makefile
	@set -e; echo "Setting up .venv-peers with PyTorch and TF-Slim."; \
	$(PY) -m venv --clear .venv-peers; \
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRA),dev]" torch==2.13.0; \
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps pytorchcv==0.0.74 tf-slim==1.1.0; \
	touch $(PEERS)

test-peers: $(PEERS)
	@.venv-peers/bin/python -m pytest tests/peers

# The TPU's TensorFlow is older, and a wheel of its own.
$(TPU): setup.cfg pyproject.toml
	@set -e; $(call find_python,12,$(COMMA) for which alone TensorFlow has a wheel for TPU); \
	echo "Setting up .venv-tpu with $$("$$found" --version), TensorFlow for TPU; this takes a minute or two."; \
	"$$found" -m venv --clear .venv-tpu; \
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[tpu,dev]"; \
	touch $(TPU)

# Without the variable, TensorFlow looks for a TPU for minutes.
tpu-check: $(TPU)
	@TPU_SKIP_MDS_QUERY=1 .venv-tpu/bin/python -m pytest -n 2 tests/tpu

docker-check: $(READY)
	@DOCKER_CHECK=$(DOCKER_EXTRA) $(PY) -m pytest -s tests/test_docker.py

data-imagenet: $(READY)
	@$(PY) -m launch.prepare --manual_dir="$(MANUAL_DIR)" --data_dir="$(DATA_DIR)"

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(READY)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(READY)
	@for benchmark in benchmarks/[a-z]*.py; do echo "== $$benchmark"; $(PY) "$$benchmark" || exit 1; done
