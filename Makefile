# make quickstart   the whole pipeline on real Atari, tiny and on the CPU
# make test         every test but the long ones
# make faults       the long ones: kills at random instants, the checkpoint of a full-size run, transfer between toy games
# make lint         ruff: rules and formatting
# make clean        removes the virtual environment and the caches; runs/ and data/ stay
PYTHON ?= python3

.PHONY: quickstart test faults lint clean

quickstart: .venv/installed
	PYTHON=.venv/bin/python sh benchmark/quickstart.sh

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder tests/test_learning.py tests/test_resume.py tests/test_scripts.py tests

faults: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -s -m faults

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

# The stamp file is newer than requirements.txt as long as nothing needs installing.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, set PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__ benchmark/__pycache__
