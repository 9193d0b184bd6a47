# `make quickstart` and `make test` do all their own set-up: Python ≥ 3.10 and make are enough.
VENV := .venv
PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: quickstart test lint clean

quickstart: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash scripts/quickstart.sh

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml uv.lock
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV); the first time this downloads several GB."
	$(VENV)/bin/python -m pip install --quiet uv
	UV_PROJECT_ENVIRONMENT=$(VENV) $(VENV)/bin/uv sync --quiet --frozen --inexact --compile-bytecode --python $(VENV)/bin/python
	touch $@
