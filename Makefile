# Each target does its own set-up: a virtual environment in .venv with everything pinned by constraints.txt, and
# a second one for test-oldest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# Those that touch each dependency, without TensorRT for RTX and without the larger model.
OLDEST_TESTS := \
	tests/test_bundle.py tests/test_data.py tests/test_dependencies.py tests/test_plugin_file.py \
	tests/test_recipe.py tests/test_session.py \
	tests/test_bench.py::test_a_bundle_is_timed_on_every_runtime \
	tests/test_build.py::test_another_plugin_is_bound_and_verified_again \
	tests/test_cli.py::test_inspect \
	tests/test_cli.py::test_the_surface_of_the_command_line \
	tests/test_cli.py::test_wrong_usage_is_2 \
	'tests/test_graph.py::test_macs_on_the_graph_are_those_of_the_formula[modernbert]' \
	'tests/test_graph.py::test_the_layer_norm_of_t5_is_one_operator[t5-v1.1]' \
	tests/test_hub.py::test_what_the_hub_does_not_give \
	tests/test_int8.py::test_graphs_for_an_older_onnxruntime \
	tests/test_other_programs.py::test_onnxruntime_loads_a_plugin_as_an_adapter \
	'tests/test_text_to_text.py::test_every_ratio_generates_the_tokens_of_eager_pytorch[t5-gated-text]' \
	'tests/test_text_to_text.py::test_label_words_make_a_classifier[t5-gated-text-]' \
	tests/test_hub.py::test_without_a_network_and_offline \
	tests/test_quality.py::test_classification_metrics_by_hand \
	tests/test_quality.py::test_similarity_is_a_rank_correlation \
	tests/test_report.py::test_the_page_tells_what_was_measured \
	tests/test_serve.py::test_embed_as_text_embeddings_inference_has_it \
	tests/test_serve.py::test_keys_and_limits \
	tests/test_serve.py::test_sigterm_under_load_answers_what_was_accepted \
	tests/test_serve.py::test_the_metrics_count_what_happened \
	tests/test_training.py::test_the_loss_falls_and_the_folder_says_how_it_was_made \
	tests/test_training.py::test_fine_tuning_writes_a_classifier_that_names_its_classes \
	tests/test_verify.py::test_a_correct_bundle_passes \
	--deselect tests/test_session.py::test_plugins_of_several_tasks_in_one_session
EXTRAS := alternatives,export,fused,onnxruntime,openvino,tensorrt-rtx,train,evaluate,parquet,ray,report,serve,clients,demo,docs,dev

# Python compiles what is imported; pip would compile everything, and that takes as long as the installation.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: build wheel fuzz nightly test test-oldest lint types docs check clean

build: $(VENV)/.installed  ## The default recipe: artifacts/minilm
	$(BIN)/variator-export build

wheel: $(VENV)/.installed  ## dist/variator_export-VERSION-py3-none-any.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test: $(VENV)/.installed  ## The tests, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-oldest: $(OLDEST)/.installed  ## A telling part of the tests, with the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal $(OLDEST_TESTS)

fuzz: $(VENV)/.installed  ## Thousands of damaged files, for about an hour
	VARIATOR_FUZZ_CASES=600 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/test_fuzz.py

nightly: $(VENV)/.installed  ## Shapes and damaged files that no earlier night has seen: the date is their seed
	$(BIN)/variator-export build --no-speed
	for run in 1 2 3 4 5; do \
	  $(BIN)/variator-export verify artifacts/minilm --full --seed $$(date +%y%m%d)$$run || exit 1; done
	VARIATOR_FUZZ_SEED=$$(date +%y%m%d) VARIATOR_FUZZ_CASES=600 \
	  $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/test_fuzz.py

lint: $(VENV)/.installed  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## mypy
	$(BIN)/mypy

docs: $(VENV)/.installed  ## The documentation: build/docs; fails at a link that leads nowhere
	$(BIN)/sphinx-build -W --keep-going -n -q -E -c docs . build/docs

check: lint types docs test test-oldest  ## All that CI runs

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "variator-export needs Python 3.11 or newer; name one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) --constraint constraints-oldest.txt \
		--editable '.[alternatives,export,onnxruntime,openvino,train,evaluate,report,serve,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) artifacts/minilm build/docs
