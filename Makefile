# What a fresh clone needs: `make demo`, `make test`. Both build .venv on their first run and reuse it afterwards.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
# On Linux, PyPI's torch brings CUDA packages along. To do without them, name an index that has CPU builds:
# make test TORCH_ARGS="--index-url URL"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
LMMS_EVAL ?= lmms-eval==0.7.3
DEMO_ARGS ?=
BENCH_ARGS ?= --shape tiny --out out/bench/tiny.json --overwrite
TEST_ARGS ?=
TEST_WORKERS ?= 2
# Two workers with two threads each would wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1

BIN := .venv/bin
OLDEST := $(shell sed -n 's/.*transformers>=\([0-9]*\.[0-9]*\),.*/\1/p' setup.cfg)
# Models come from folders; nothing here should ask the network for one.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: demo bench test test-slow test-oldest check format readme clean

demo: .venv/installed  ## graft the shipped parts, answer held-out questions, time, draw; under 5 minutes
	$(OFFLINE) $(BIN)/roe-llava demo $(DEMO_ARGS)

bench: .venv/installed  ## times beside the base's; other models and a place for results with BENCH_ARGS
	$(OFFLINE) $(BIN)/roe-llava bench $(BENCH_ARGS)

test: .venv/installed  ## everything that takes seconds
	$(ONE_THREAD) $(OFFLINE) $(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

test-slow: .venv/installed  ## what trains or takes longer than a minute
	@# pytest answers 5 when it finds no test; that alone is not a failure here.
	$(OFFLINE) $(BIN)/python -m pytest -m slow $(TEST_ARGS) || test $$? -eq 5

# What a version of Transformers can break: the model, its loading and code, caches, processor, generation, training.
OLDEST_TESTS := model family loading remote_code cache processor generation golden calibrate settle training trainer contract \
	from_base report routing_arguments
test-oldest: .venv/oldest  ## the same on the oldest Transformers that setup.cfg allows
	PYTHONPATH=.venv/oldest $(BIN)/python -c "import transformers as t; v = t.__version__; print(v); assert v.startswith('$(OLDEST).'), v"
	PYTHONPATH=.venv/oldest $(ONE_THREAD) $(OFFLINE) $(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile \
		$(OLDEST_TESTS:%=tests/test_%.py) $(TEST_ARGS)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: demo  ## demo results into docs/ and the README; with DEMO_ARGS="--out X" give README_ARGS="--demo X" too
	$(BIN)/python -m roe_llava.examples.tiny_world.readme_table $(README_ARGS)

clean:  ## outputs and caches; .venv stays, as it takes minutes to build
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH_ARGS) "$(TORCH)"
	touch $@

# Installed again when the requirements change. Editable: code is read from the clone.
.venv/installed: setup.cfg pyproject.toml | .venv/torch
	$(BIN)/python -m pip install -e ".[test]"
	@# Without its requirements, which would replace torch; those that our tasks need are in the extras eval and test.
	$(BIN)/python -m pip install --no-deps "$(LMMS_EVAL)"
	touch $@

# Beside the newest, which stays what is installed: PYTHONPATH chooses.
.venv/oldest: .venv/installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "transformers==$(OLDEST).*"
	touch $@
