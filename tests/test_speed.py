"""benchmark/speed.py on networks smaller still than those of --quick."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = "--channels 8 --batch-size 4 --offline-batch-size 4 --num-simulations 2 --unroll-steps 2"
SEARCHING = ["network", "tree", "transfers", "encoding"]
CATEGORIES = ["sampling", *SEARCHING, "training", "environment", "other"]


def speed(*flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmark/speed.py"), "--quick", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_each_case_is_a_row_whose_times_add_up(tmp_path):
    cases = ["xtra", "student"]
    options = ["--repeats", "1", "--offline-games", "1", f"--flags={TINY}", "--output", str(tmp_path / "speed.csv")]
    done = speed("--cases", *cases, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "speed.csv") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert list(rows) == cases
    lines = done.stdout.splitlines()
    for case, row in rows.items():
        assert any(line.split()[:2] == [case, "1x8"] for line in lines)  # in the terminal too
        assert row["batch_size"] == "4" and row["flags"] == TINY and row["seed"] == "1"
        assert row["offline_games"] == "1" and "collecting 400 random steps of Phoenix\n" in done.stdout
        times = {category: float(row[category]) for category in CATEGORIES}
        assert min(times.values()) >= 0 and times["training"] > 0 and times["sampling"] > 0
        assert sum(times.values()) == pytest.approx(float(row["ms"]))  # on a CPU the same block gives both
        assert float(row["updates_per_s"]) == pytest.approx(1000 / float(row["ms"]))
        per_update = float(row["ms"]) + float(row["evaluation"])
        assert float(row["evaluation"]) > 0 and float(row["hours_per_100k"]) == pytest.approx(per_update / 36)
        assert all((times[category] > 0) == (case != "student") for category in SEARCHING)
        assert (times["environment"] > 0) == (case == "xtra")
        assert 0.2 < float(row["ram_gb"]) < 3


@pytest.mark.parametrize(
    ("expected", "flags"),
    {
        "error: --cases has xtr, expected some of efficientzero, ": ["--cases", "xtr"],
        "error: --stored-steps is 300, expected ": ["--stored-steps", "300"],
        "error: --offline-games is 5, expected 1 to 4": ["--offline-games", "5"],
        "error: --output missing/speed.csv cannot be written": ["--output", "missing/speed.csv"],
        "error: --flags has --chanels, expected ": ["--flags=--chanels 8"],
    }.items(),
)
def test_bad_input_ends_with_one_line(expected, flags):
    done = speed(*flags)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(expected) and len(done.stderr.splitlines()) == 1
