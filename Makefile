# make install      only the environment, .venv; with PIP_EXTRA_INDEX_URL=URL pip looks there too: a CPU build of torch
# make quickstart   transfer between small games, then every stage once on real Atari; 8 minutes on 2 cores
# make test         every test but the long ones
# make faults       the long ones: kills at random instants, the checkpoint of a full-size run, transfer between toy games,
#                   what a new network hears of real games,
#                   a Slurm cluster of this machine (tests/slurm_local.sh download gets it)
# make lint         ruff: rules and formatting
# make clean        removes the virtual environment and the caches; runs/ and data/ stay
PYTHON ?= python3

.PHONY: install quickstart test faults lint clean

install: .venv/installed
	@echo 'Installed. In each new shell: source .venv/bin/activate'

quickstart: .venv/installed
	PYTHON=.venv/bin/python sh benchmark/quickstart.sh

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder tests/test_learning.py tests/test_resume.py tests/test_scripts.py tests

faults: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -s -m faults

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

# The stamp file is newer than both lists as long as nothing needs installing. A torch that fits the pin is kept.
.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "error: Python 3.11 to 3.14 is needed, set PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__ benchmark/__pycache__
