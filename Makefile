# `make` lists the targets. The first target that runs sets up .venv.
# All paths are relative, so that the path of the checkout may contain spaces.

EXTRA ?= cpu
DOCKER_EXTRA ?= cpu
PY := .venv/bin/python
READY := .venv/ready-$(EXTRA)
PEERS := .venv-peers/ready
TPU := .venv-tpu/ready
DOCS := .venv-docs/ready
COMMA := ,

.DEFAULT_GOAL := help
.PHONY: help demo test test-jobs peers coverage test-peers gpu-check tpu-check slurm-check docker-check \
  data-imagenet lint format bench docs docs-serve tour

help:
	@echo "make demo        train the paper's five networks in miniature and report them"
	@echo "make test        run the tests"
	@echo "make coverage    run the tests, and list the lines that none of them runs"
	@echo "make test-jobs   run the tests that train in several processes, or for long"
	@echo "make test-peers  compare layer and network with PyTorch's and TF-Slim's"
	@echo "make gpu-check   check what only GPUs can show, without data; prints a table"
	@echo "                 (EXTRA=gpu installs TensorFlow for GPUs)"
	@echo "make tpu-check   lower the training steps of all ImageNet networks for TPU"
	@echo "                 (no TPU needed)"
	@echo "make slurm-check train in a Slurm cluster on this machine (needs slurm-wlm and root)"
	@echo "make docker-check"
	@echo "                 run the Dockerfile's commands without Docker (installs TensorFlow)"
	@echo "make data-imagenet MANUAL_DIR=... [DATA_DIR=...]"
	@echo "                 prepare ImageNet from its two official archives"
	@echo "make lint        check style and types"
	@echo "make format      auto-fix style"
	@echo "make bench       run the benchmarks (on an otherwise idle machine)"
	@echo "make docs        build the documentation site in site/, and fail on a broken link"
	@echo "make docs-serve  show the site at http://localhost:8000, and reload it on changes"
	@echo "make tour        run the notebook examples/tour.ipynb again, from its script"

# Finds the first Python from 3.11 to 3.13 that starts.
find_python = for python in "$$PYTHON" python3 python3.13 python3.12 python3.11; do \
	  if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then found="$$python"; break; fi; done; \
	if [ -z "$$found" ]; then echo "error: no Python from 3.11 to 3.13 found: install one, or set its path: make PYTHON=/path/to/python ..." >&2; exit 2; fi

# Installs the checkout, editable, with the extras $(2) and further packages $(3) into the
# environment $(1). The editable install resolves bn_keras_launch and bn_keras_configs by an import
# hook, which type checkers do not run; the .pth file makes them find bn_keras.
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(2)]" $(3); \
	$(1)/bin/python -c 'import os, pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "bn_keras_checkout.pth").write_text(os.getcwd() + "\n")'

# A change of setup.cfg, which lists the dependencies, sets up a new environment.
$(READY): setup.cfg
	@set -e; $(find_python); \
	echo "Setting up .venv with $$("$$found" --version), TensorFlow for $(EXTRA); this takes a minute or two."; \
	"$$found" -m venv --clear .venv; \
	$(call install,.venv,$(EXTRA)$(COMMA)train$(COMMA)dev); \
	touch $(READY)

demo: $(READY)
	@.venv/bin/bn-keras reproduce --scale=digits --seeds=3 --workdir=runs/digits

test: $(READY)
	@$(PY) -m pytest -n 3 --dist worksteal tests

coverage: $(READY)
	@$(PY) -m pytest -n 2 -m "" --cov --cov-report=term-missing:skip-covered tests

test-jobs: $(READY)
	@$(PY) -m pytest -n 2 --dist worksteal -m job tests

# PyTorch has an environment of its own, since nothing else needs it. On Linux its default wheel
# includes CUDA; PIP_INDEX_URL or PIP_EXTRA_INDEX_URL can select PyTorch's CPU wheels.
# The one network used of pytorchcv and of tf-slim needs none of their dependencies.
$(PEERS): setup.cfg Makefile
	@set -e; $(find_python); \
	echo "Setting up .venv-peers with $$("$$found" --version), PyTorch, TF-Slim and ONNX."; \
	"$$found" -m venv --clear .venv-peers; \
	$(call install,.venv-peers,$(EXTRA)$(COMMA)train$(COMMA)dev$(COMMA)onnx,torch==2.13.0); \
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps pytorchcv==0.0.74 tf-slim==1.1.0; \
	touch $(PEERS)

peers: $(PEERS)

test-peers: $(PEERS)
	@.venv-peers/bin/python -m pytest -n 2 --dist worksteal tests/peers

# TensorFlow for TPU is an older release in a wheel of its own.
$(TPU): setup.cfg
	@set -e; $(find_python); \
	echo "Setting up .venv-tpu with $$("$$found" --version), TensorFlow for TPU; this takes a minute or two."; \
	"$$found" -m venv --clear .venv-tpu; \
	$(call install,.venv-tpu,tpu$(COMMA)train$(COMMA)dev); \
	touch $(TPU)

# Without TPU_SKIP_MDS_QUERY, TensorFlow searches for a TPU for minutes.
tpu-check: $(TPU)
	@TPU_SKIP_MDS_QUERY=1 .venv-tpu/bin/python -m pytest -n 2 tests/tpu

# The checks import from these folders.
gpu-check: $(READY)
	@PYTHONPATH=tests:benchmarks $(PY) tests/gpu/gpu_check.py

slurm-check: $(READY)
	@SLURM_CHECK=1 $(PY) -m pytest -m "" tests/slurm

docker-check: $(READY)
	@DOCKER_CHECK=$(DOCKER_EXTRA) $(PY) -m pytest -s tests/test_docker.py

data-imagenet: $(READY)
	@.venv/bin/bn-keras prepare --manual_dir="$(MANUAL_DIR)" --data_dir="$(DATA_DIR)"

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(READY)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(READY)
	@for benchmark in benchmarks/[a-z]*.py; do echo "== $$benchmark"; $(PY) "$$benchmark" || exit 1; done

# The reference needs the package; the rest of the site's packages is of no use elsewhere.
$(DOCS): setup.cfg
	@set -e; $(find_python); \
	echo "Setting up .venv-docs with $$("$$found" --version) and MkDocs; this takes a minute or two."; \
	"$$found" -m venv --clear .venv-docs; \
	$(call install,.venv-docs,cpu$(COMMA)train$(COMMA)docs); \
	touch $(DOCS)

# The variables turn off messages of TensorFlow and of MkDocs' theme.
mkdocs = TF_CPP_MIN_LOG_LEVEL=3 NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs

docs: $(DOCS)
	@$(mkdocs) build --quiet
	@echo "written to site/index.html"

docs-serve: $(DOCS)
	@$(mkdocs) serve --watch bn_keras --watch launch

tour: $(DOCS)
	@.venv-docs/bin/python docs/generate/notebook.py examples/tour.py
