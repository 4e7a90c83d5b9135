# Everything here sets itself up: a .venv beside this file, made anew when the project's dependencies change.
# On Windows, run the commands of a target by hand in a virtual environment.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check release bench peers docs pictures clean

# The main job, on files it makes itself: two thin checkpoints, merged with the preset high_res.
demo: .venv/run
	$(BIN)/blockmerge demo blockmerge-demo --overwrite
	@echo
	@echo "The command is $(BIN)/blockmerge. To type blockmerge alone: . $(BIN)/activate"

# All checks and the tests, with a share of the very many alike cases (tests/effort.py); a process for each
# processor, so none needs several threads of torch.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# All checks and the tests with every case.
test-all: export BLOCKMERGE_EVERY_CASE = 1
test-all: test

# Style, types and format, without the tests.
check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel and the sdist in dist/, checked, and tried in a fresh environment.
release: .venv/test
	$(BIN)/python .ci/release.py

# Full-size files in a temp folder (some 15 GB free needed); prints ratios to `cp` and to load-everything-and-save.
bench: .venv/test
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/smoothing.py
	$(BIN)/python benchmarks/live.py
	$(BIN)/python benchmarks/overlap.py

# Beside another tool, where its methods are defined as ours are; it gets an environment of its own.
peers: .venv-peers/done
	.venv-peers/bin/python -m pytest tests/test_peers.py

# Write docs/cli.md anew from the commands' own help, docs/methods.md from the table of methods, and
# docs/python.md from the docstrings.
docs: .venv/run
	PYTHONPATH=. $(BIN)/python docs/cli_reference.py
	PYTHONPATH=. $(BIN)/python docs/methods_reference.py
	PYTHONPATH=. $(BIN)/python docs/python_reference.py

# The pictures of README, made by the project itself; needs Chromium.
pictures: .venv/run
	PYTHONPATH=. $(BIN)/python docs/pictures.py

clean:
	rm -rf .venv .venv-peers blockmerge-demo

# What the command needs, and what the tests need besides: each is a mark that the installation is done.
.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/run
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-peers/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]' sd-mecha==1.1.8
	touch $@
