# Each target does its own set-up: a virtual environment in .venv with everything pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := export,onnxruntime,openvino,tensorrt-rtx,train,evaluate,report,demo,docs,dev

.PHONY: build test lint types docs check clean

build: $(VENV)/.installed  ## The default recipe: artifacts/minilm
	$(BIN)/variator-export build

test: $(VENV)/.installed  ## The tests, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## mypy
	$(BIN)/mypy

docs: $(VENV)/.installed  ## The documentation: build/docs; fails at a link that leads nowhere
	$(BIN)/sphinx-build -W --keep-going -n -q -E -c docs . build/docs

check: lint types docs test  ## All that CI runs

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "variator-export needs Python 3.11 or newer; name one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) artifacts/minilm build/docs
