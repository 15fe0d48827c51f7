"""benchmark/speed.py on networks smaller still than those of --quick."""

import ast
import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SPEED = Path(__file__).resolve().parent.parent / "benchmark/speed.py"
TINY = "--channels 8 --batch-size 4 --offline-batch-size 4 --num-simulations 2 --unroll-steps 2 --eval-episodes 2"
LEARNING = ["draw", "training"]
SEARCHING = ["network", "tree", "transfers", "self-play", "environment"]


def test_what_is_timed_has_the_names_of_the_scripts():
    source = "".join((SPEED.parent.parent / name).read_text() for name in ("finetune.py", "mcts.py", "model.py"))
    (parts,) = re.findall(r"^PARTS = (\{.+?^\})", re.sub(" #.*", "", SPEED.read_text()), re.M | re.S)
    for path in sum(ast.literal_eval(parts).values(), []):
        assert re.search(rf"\b{path.split('.')[-1]}\(", source), path


def speed(*flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SPEED, "--quick", *flags], env=environment, capture_output=True, text=True)


def test_the_parts_of_an_update_are_those_that_its_script_has_and_add_up(tmp_path):
    options = ["--repeats", "1", "--offline-games", "1", f"--flags={TINY}", "--output", str(tmp_path / "speed.csv")]
    done = speed("--cases", "xtra", "student", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "speed.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["xtra", "student"]
    for row, parts in zip(rows, [LEARNING + SEARCHING, LEARNING], strict=True):
        times = {part: float(row[part]) for part in [*LEARNING, *SEARCHING, "other"]}
        assert [part for part, ms in times.items() if ms > 0] == [*parts, "other"]
        assert sum(times.values()) == pytest.approx(float(row["ms"]))  # on a CPU the same block gives both
        assert float(row["hours"]) == pytest.approx((float(row["ms"]) + float(row["eval"])) / 36)
        assert row["net"] == "1x8" and 0.2 < float(row["RAM GB"]) < 3
        assert any(line.split()[:2] == [row["case"], "1x8"] for line in done.stdout.splitlines())  # in the terminal too


def test_a_flag_that_no_script_has_ends_it_with_one_line():
    done = speed("--flags=--chanels 8")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: --flags has --chanels, expected flags of the scripts\n"


def test_the_profile_lists_what_takes_longest(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SPEED.parent))
    speed = importlib.import_module("speed")
    x = torch.ones(300, 300)
    with torch.profiler.profile() as profiler:
        for _ in range(20):
            x @ x
    speed.show_profile(profiler, 2.0, 40, "cpu")
    said = capsys.readouterr().err
    first = said.splitlines()[3]
    assert first.split()[0] == "aten::mm" and "40 updates in 2.00 s" in said
