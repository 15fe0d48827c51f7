"""benchmark/report.py: its table on runs whose numbers are known, its answers to wrong input, and the pages."""

import contextlib
import csv
import io
import re
import shlex
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import run
from torch.utils.tensorboard import SummaryWriter

from benchmark import matrix, pages
from benchmark import report as program
from model import EfficientZeroNet, ModelConfig, load_model, save_model

FLAGS = {"pretrained": None, "teachers": (), "total_timesteps": 100, "cross_task": True, "task_weights": True}
FLAGS |= {"seed": 1, "eval_max_frames": 108_000}
RETURNS = {0: [0, 2], 50: [4, 6], 100: [10, 14]}  # environment steps: two games each
ROOT = Path(__file__).resolve().parent.parent
MARKED = "\n".join(["before", *pages.MARKERS, "after", ""])  # a README.md


@pytest.fixture
def report(tmp_path, capsys):
    """Runs report.py in this process, which spares the seconds of imports -> None or its error, what it printed."""

    def report(*words):
        error = run(tmp_path, shlex.join(["benchmark/report.py", *words]))
        return error, capsys.readouterr().out

    return report


SCALARS = {"transfer/task_weight/Fruit-v0": {50: 0.5}, "transfer/grad_cosine/Fruit-v0": {50: 0.2}}


def make_run(folder, better=0, returns=RETURNS, scalars=SCALARS, module="toy_env", **flags):
    """A run folder of finetune.py on Storm, whose returns are those of RETURNS and `better`."""
    folder.mkdir()
    with open(folder / "evaluations.csv", "w") as file:
        rows = csv.writer(file)
        rows.writerow(["env_steps", "updates", "episode", "return", "length", "env_id"])
        for steps, scores in returns.items():
            rows.writerows([steps, steps, i, x + better, 16, f"{module}:Storm-v0"] for i, x in enumerate(scores))
    net = EfficientZeroNet(ModelConfig.of_width(2, 1))
    info = {"args": FLAGS | flags, "env_ids": [f"{module}:Storm-v0", f"{module}:Fruit-v0"]}
    save_model(str(folder / "model.pt"), net, **info)
    if scalars:
        writer = SummaryWriter(folder)
        for key, series in scalars.items():
            for step, value in series.items():
                writer.add_scalar(key, value, step)
        writer.close()


def test_seeds_of_a_method_are_one_line_beside_random_and_perfect_play(tmp_path, report):
    make_run(tmp_path / "a", seed=1)
    make_run(tmp_path / "b", seed=2, better=-2)
    make_run(tmp_path / "c", pretrained="student", better=5)
    make_run(tmp_path / "d", pretrained="student", cross_task=False, better=-9, scalars={})
    error, out = report("a", "b", "c", "d", "--threshold", "9", "--output", "new/folder/figure.png")
    assert error is None
    lines = {" ".join(line.split()[1:-6]): line.split() for line in out.splitlines() if line.startswith("Storm")}
    # seeds, zero-shot, threshold: steps, final, updates, random, perfect; a reaches 9 after 100 steps, b too
    assert lines["EfficientZero 2 0.0"][-6:-2] == ["100", "100", "11.0", "100"]
    assert lines["XTRA 1"][-6:-2] == ["6.0", "50", "17.0", "100"]
    assert lines["w.o. cross-task 1"][-6:-2] == ["-8.0", ">100", "3.0", "100"]
    random, perfect = (float(x) for x in lines["XTRA 1"][-2:])
    assert abs(random) < 1.5 and perfect == 16
    assert Image.open(tmp_path / "new/folder/figure.png").size[0] > 500


def test_runs_that_differ_in_more_than_their_seed_are_lines_of_their_own(tmp_path, report):
    make_run(tmp_path / "small", blocks=1)
    make_run(tmp_path / "large", blocks=4, better=1)
    make_run(tmp_path / "large2", blocks=4, better=3, seed=2, run_dir="elsewhere")
    error, out = report("small", "large", "large2")
    assert error is None
    lines = [line.split() for line in out.splitlines() if line.startswith("Storm")]
    assert [line[1:5] for line in lines] == [["EfficientZero", "--blocks", x, n] for x, n in (("1", "1"), ("4", "2"))]
    assert [line[6] for line in lines] == ["12.0", "14.0"]  # of 12 + 1 and 12 + 3


def test_departures_make_a_run_another_one_and_their_defaults_do_not(tmp_path, report):
    defaults = {"steps_per_update": 1, "one_hot_actions": False}
    departures = {"old": {}, "new": defaults, "many": {"steps_per_update": 4}, "planes": {"one_hot_actions": True}}
    for seed, (name, flags) in enumerate(departures.items()):
        make_run(tmp_path / name, seed=seed, exp_name="toy-efficientzero", **flags)
    hashes = [program.hash_settings(program.read_run(str(tmp_path / name)).flags) for name in departures]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    runs = [program.read_run(str(tmp_path / name)) for name in ("old", "new", "many")]
    totals = [program.collect_run(str(tmp_path), run)[0][0][7] for run in runs]
    assert totals == [100, 100, 25]  # updates, of 100 steps
    error, out = report("old", "new", "many")
    assert error is None
    assert out.count("--steps-per-update 4") == 1 and "--steps-per-update 1" not in out


def test_a_run_that_was_only_evaluated_and_one_without_scalars(tmp_path, report):
    make_run(tmp_path / "zero-shot", returns={0: [4, 6]}, scalars={}, pretrained="student", total_timesteps=0)
    error, out = report("zero-shot")
    assert error is None
    assert out.splitlines()[2].split()[:6] == ["Storm-v0", "zero-shot", "1", "5.0", "5.0", "0"]
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "error: no run folders; give some"),
        (["nowhere"], "error: nowhere holds no evaluations.csv; expected a run folder"),
        (
            ["run", "--output", "figure.xyz"],
            "error: --output is figure.xyz, expected a name that ends in .png",
        ),
        (["run", "--gam", "Pong"], "error: there is no flag --gam; did you mean --game?"),
        (["run", "--game", "Pong"], "error: --game Pong was not played by these runs; choose of Storm-v0"),
    ],
)
def test_wrong_input_is_answered_in_one_line(tmp_path, report, words, expected):
    make_run(tmp_path / "run")
    error, out = report(*words)
    assert error.startswith(expected) and "\n" not in error


def test_what_a_spreadsheet_saves_is_read(tmp_path, report):
    make_run(tmp_path / "a")
    path = tmp_path / "a" / "evaluations.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    error, out = report("a", "a/", "a/../a")
    assert error is None and out.split("EfficientZero")[1].split()[:2] == ["1", "1.0"]  # one seed, not three


@pytest.mark.parametrize(
    "content, words",
    [
        ("x", "is not as the scripts"),
        ("\n1,2", "is not as the"),
        ("utf-16", "is not as"),
        ("none", "has no evaluation"),
    ],
)
def test_evaluations_that_are_something_else_are_refused(tmp_path, report, content, words):
    make_run(tmp_path / "a")
    path = tmp_path / "a" / "evaluations.csv"
    text = path.read_text()
    if content == "utf-16":
        path.write_text(text, encoding="utf-16")
    else:
        path.write_text(text.splitlines()[0] if content == "none" else text + content)
    assert f"error: a/evaluations.csv {words}" in report("a")[0]


def test_a_copy_of_a_run_is_told_and_random_play_is_left_out_of_a_game_that_is_not_at_hand(tmp_path, report):
    make_run(tmp_path / "a", module="nowhere")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        error, out = report("a", "b")
    assert error is None and out.split("EfficientZero")[1].split()[:2] == ["2", "1.0"]
    assert "a and b have the same flags and seed" in said.getvalue()
    assert "Storm-v0: random play is left out" in said.getvalue()


def test_statistics_by_hand():
    scores = {"a": np.array([1.0, 2.0]), "b": np.array([3.0, 10.0]), "c": np.array([2.0])}
    assert pages.mean(scores) == pytest.approx((1.5 + 6.5 + 2) / 3)
    assert pages.median(scores) == 2
    assert pages.iqm(scores) == pytest.approx((2 + 2 + 3) / 3)  # of 1 2 2 3 10 without a quarter, one, at each end
    assert pages.iqm({"a": np.array([[1.0, 2.0], [5.0, 6.0]])}).tolist() == [1.5, 5.5]  # of each resample
    # a: of the pairs 1-2, 1-3, 3-2, 3-3 one is above and one the same: 1.5 of 4. b: none of one.
    base = {"a": np.array([2.0, 3.0]), "b": np.array([5.0])}
    assert pages.probability({"a": np.array([1.0, 3.0]), "b": np.array([2.0])}, base) == (0.375 + 0) / 2
    # a: 3 / 2; b: 1 / -3, a denominator that counts as 0.05: 20
    base = {"a": np.array([1.0, 3.0]), "b": np.array([-3.0])}
    assert pages.improvement({"a": np.array([2.0, 4.0]), "b": np.array([1.0])}, base) == (1.5 + 20) / 2


def test_bootstrap_by_hand():
    # Of 0 0 0 1 a resample's mean is binomial(4, 1/4) / 4: 0 with probability 0.32, 3/4 or 1 with 0.051, 1 with 0.004.
    assert pages.estimate(pages.mean, {"a": np.array([0.0, 0.0, 0.0, 1.0])}) == (0.25, 0, 0.75)
    # Stratified: each game keeps its own seeds, so that differences between games make no interval.
    assert pages.estimate(pages.mean, {"a": np.array([0.0, 0.0]), "b": np.array([1.0, 1.0])}) == (0.5, 0.5, 0.5)
    # Two samples are drawn apart from each other: the same seeds do not cancel. Extremes 0 - 1 and 1 - 0: 1/16 each.
    seeds = {"a": np.array([0.0, 1.0])}
    assert pages.estimate(pages.difference, seeds, seeds) == (0, -1, 1)
    value, *interval = pages.estimate(pages.mean, {"a": np.array([0.0, 1.0]), "b": np.array([4.0])})
    assert value == 2.25 and np.isnan(interval).all()  # one seed


@pytest.mark.parametrize(
    "low, high, bounds, seeds, expected",
    [
        (1.1, 1.3, (1, np.inf), 3, "reproduced"),
        (1.0, 1.3, (1, np.inf), 5, "undecided"),
        (0.8, 1.0, (1, np.inf), 5, "not reproduced"),
        (-0.05, 0.09, (-0.1, 0.1), 3, "reproduced"),
        (-0.2, 0.2, (-0.1, 0.1), 9, "undecided"),
        (0.1, 0.2, (-0.1, 0.1), 3, "not reproduced"),
        (1.1, 1.3, (1, np.inf), 2, "too few seeds"),
    ],
)
def test_verdicts_of_intervals(low, high, bounds, seeds, expected):
    assert pages.verdict(low, high, bounds, seeds) == expected


def lines_of(method, finals, first=0, game="Storm-v0", total=100, pretrained="", **columns):
    """Lines of runs.csv: a run for each final score, with evaluations at 0, 50 and 100 steps."""
    lines = []
    for seed, final in enumerate(finals, 1):
        for step, value in ((0, first), (50, (first + final) / 2), (100, final)):
            line = {"scale": "toy", "method": method, "game": game, "seed": seed, "pretrained": pretrained}
            line |= {"env_steps": step, "updates": step, "total_updates": total, "mean": float(value), "std": 1.0}
            lines.append(
                line
                | {"games": 32, "hours": step / 100, "day": "", "card": "a", "commit": "b", "settings": "c"}
                | columns
            )
    return lines


def read(lines, weights=()):
    """`read_scale` of such lines, with random play 0 and perfect play 16 in Storm."""
    levels = lines_of("random", [0])[:1] + lines_of("perfect", [0], first=16)[:1]
    runs, weights = pd.DataFrame(lines + levels), pd.DataFrame(weights, columns=pages.WEIGHTS)
    return pages.read_scale("toy", runs[pages.RUNS], weights, pages.read_paper(pages.PAPER))


@pytest.mark.parametrize(
    "xtra, scratch, expected",
    [
        ([12, 13, 14], [5, 6, 7], "reproduced"),
        ([5, 6, 7], [12, 13, 14], "not reproduced"),
        ([4, 8, 12], [7, 8, 9], "undecided"),
        ([12, 13], [5, 6, 7], "too few seeds"),
    ],
)
def test_verdicts_of_runs(xtra, scratch, expected):
    data = read(lines_of("xtra", xtra) + lines_of("efficientzero", scratch))
    claims = data.paper.claims
    text, verdicts, unanswered = pages.claims_table(data, claims)
    assert {"A1", "D1"} <= set(verdicts[expected])
    assert verdicts["no verdict"] == ["A3"] and "A2" in unanswered  # a maximum; a median of one game
    assert {"A5", "B1", "D4"} <= set(unanswered)  # no mazes; no run without cross-task; none with eta
    assert len(text.splitlines()) == 2 + sum(map(len, verdicts.values()))
    assert set(pages.CLAIMS) == set(claims) and not set(claims) & set(pages.NOT_ASKED)


def test_about_the_same_has_a_margin_and_all_parts_of_a_claim_must_hold():
    scratch, worse = lines_of("efficientzero", [8, 8, 8]), lines_of("efficientzero-l", [6, 6, 6])

    def verdict(name, lines):
        return pages.answer(pages.CLAIMS[name], read(lines).samples)[0]

    for final, expected in ((5.5, "reproduced"), (6.5, "reproduced"), (6.7, "not reproduced")):  # of 6; within 0.6
        lines = lines_of("efficientzero-l-512", [final] * 3)
        assert verdict("E4", worse + lines) == expected
    small, xtra = lines_of("xtra-small", [9, 9, 9]), lines_of("xtra", [10, 10, 10])
    assert verdict("D6", scratch + worse + small + xtra) == "reproduced"
    assert verdict("D6", scratch + lines_of("efficientzero-l", [9, 9, 9]) + small + xtra) == "not reproduced"


def test_probes_have_a_table_of_their_own_and_count_nowhere_else():
    probe = lines_of("probe-first", [4.0], first=1)
    probe += lines_of("probe-long", [9.0], total=1_000)  # has not ended
    data = read(probe)
    page = pages.scale_section(data, data.paper.claims, [])
    first, long = [line.split(" | ") for line in page.splitlines() if "Storm-v0" in line]
    assert first[0] == "| -" and first[3:6] == ["100", "100", "1.0, 2.5, 4.0 ± 1.0 (32)"]
    assert long[0] == f"| `{matrix.PROBES['long']}`" and long[4] == "100 of 1,000"
    assert not len(data.finals) and "Every run" not in page
    with_a_run = read(probe + lines_of("efficientzero", [5.0]))
    assert pages.scale_section(with_a_run, data.paper.claims, []).count("efficientzero | Storm-v0") == 1
    assert "Toy games" not in pages.readme_section([data], data.paper.claims, [])


def test_a_scale_compares_methods_in_its_own_targets_only():
    lines = lines_of("xtra", [300], game="Assault", scale="small")
    lines += lines_of("xtra", [9], game="Phoenix", scale="small")
    runs, weights = pd.DataFrame(lines)[pages.RUNS], pd.DataFrame(columns=pages.WEIGHTS)
    data = pages.read_scale("small", runs, weights, pages.read_paper(pages.PAPER))
    assert data.samples["xtra.final"].keys() == {"Assault"}  # Phoenix is a target of the paper's, here an offline game


def test_half_of_a_gain_needs_a_gain():
    for xtra, less, h_and_g, expected in ((12, 9, 11, "reproduced"), (9.5, 9, 11, "not reproduced")):
        lines = lines_of("efficientzero", [10, 10, 10], first=10) if xtra < 10 else lines_of("efficientzero", [8] * 3)
        for method, final in (("xtra", xtra), ("wo-cross-task", less), ("transfer-hg", h_and_g)):
            lines += lines_of(method, [final] * 3)
        samples = read(lines).samples
        assert [pages.answer(pages.CLAIMS[name], samples)[0] for name in ("B1", "D9")] == [expected] * 2


def test_eta_moves_if_it_varies_more_than_chance():
    columns = ["toy", "xtra", "Storm-v0"]
    etas = {1: (0.25, 0.75), 2: (0.5, 0.5), 3: (0.25, 0.75)}
    weights = [(*columns, seed, "a", 48 * i, 16, eta, 0, 0) for seed, x in etas.items() for i, eta in enumerate(x)]
    weights += [(*columns, 4, "a", 48, 16, 1, 0, 0)]
    samples = read(lines_of("xtra", [8, 8, 8]), weights).samples
    assert len(samples["xtra.eta"]["Storm-v0"]) == 3  # the fourth run has not ended
    # The variance is 0.125, that of 16 fair coins with these odds 0.25 x 0.75 / 15 = 0.0125; of equal etas -0.25 / 15.
    assert samples["xtra.eta_variance"]["Storm-v0"] == pytest.approx([0.1125, -0.25 / 15, 0.1125])


def test_eta_that_varies_as_by_chance_alone_does_not_move():
    """One of 40 in one of four measurements: the variance is 1/6400, and so is that of chance. Floats differ."""
    columns = ["toy", "xtra", "Storm-v0"]
    weights = [(*columns, seed, "a", 48 * i, 40, (i == 1) / 40, 0, 0) for seed in (1, 2, 3) for i in range(4)]
    samples = read(lines_of("xtra", [8, 8, 8]), weights).samples
    assert pages.answer(pages.CLAIMS["D2"], samples)[0] == "not reproduced"


def test_a_gain_that_fades_must_have_been_one():
    for early, expected in ((12, "reproduced"), (6, "not reproduced")):  # of 8; at the end 4 of 8
        lines = lines_of("efficientzero", [8, 8, 8], first=8)
        lines += lines_of("xtra", [4, 4, 4], first=2 * early - 4)  # the mean of the first and the last at 50 steps
        assert pages.answer(pages.CLAIMS["D7"], read(lines).samples)[0] == expected


def test_a_student_is_no_worse_within_a_tenth_of_its_teacher():
    for student, teacher, expected in ((0, 0, 1), (9.1, 10, 1), (8.9, 10, 0.5), (-10.9, -10, 1), (-11.1, -10, 0.5)):
        x, y = {"a": np.array([8.0]), "b": np.array([student])}, {"a": np.array([8.0]), "b": np.array([teacher])}
        assert pages.share_no_worse(x, y) == expected


def test_scores_curves_and_samples():
    data = read(lines_of("xtra", [8, 16], first=4, pretrained="student") + lines_of("efficientzero", [4, 8, 12]))
    samples = {name: games["Storm-v0"].tolist() for name, games in data.samples.items()}
    assert samples["xtra.final"] == [0.5, 1] and samples["xtra.amount"] == [0.5, 1]
    assert samples["xtra.early"] == [0.375, 0.625]  # at 50 steps, the evaluation after 0 that is nearest to 20
    assert samples["xtra.area"] == [0.375, 0.625]  # mean of 0.25 to 0.375 and 0.375 to 0.5
    assert samples["zero-shot.final"] == [0.25]  # of one student, in two runs


def test_few_seeds_are_marked_and_runs_that_have_not_ended_are_listed_but_not_counted():
    ended = lines_of("xtra", [10, 12], pretrained="s") + lines_of("efficientzero", [4, 4, 4], first=1)
    ended += [line | {"seed": 9, "total_updates": 200} for line in lines_of("efficientzero", [16], first=1)]
    data = read(ended)
    row = pages.scores_table(data, pages.TABLE1 + pages.ZERO_SHOT).splitlines()[2]
    cells = " | ".join(["4.0 [4.0, 4.0] (3)", "11.0 [10.0, 12.0] (2)†", "1.0", "0.0", "0.0 (1)†", "16.0"])
    assert row == f"| falling | Storm-v0 | {cells} |"
    page = pages.results_page([data], data.paper.claims, [])
    assert "| efficientzero | Storm-v0 | 9 | - | 16.0 | 100 of 200 | 1.00 | a | b | c |" in page
    assert "counted nowhere above: efficientzero Storm-v0 9." in page
    assert "Of the paper's claims (targets: Storm-v0): " in page
    assert "6 runs, 6.0 hours in all. Different students of a target: 1." in page
    assert "nothing about Atari" in page
    section = pages.readme_section([data], data.paper.claims, [])
    assert "| XTRA | 0.69 [0.62, 0.75] (2 in 1) |" in section  # 10 and 12 of 16
    assert "| networks before any update | 0.06 |" in section  # 1 of 16


def test_hours_are_those_of_all_processes_without_the_interruption(tmp_path, monkeypatch):
    day = 20_000 * 86_400  # 4 October 2024
    for began, evaluations in ((day, {0: 60, 50: 7_200}), (day + 90_000, {100: 3_600, 150: 7_200})):
        monkeypatch.setattr(time, "time", lambda now=began: now)  # of the first event of a file
        writer = SummaryWriter(tmp_path, purge_step=60 if began > day else None)  # as a run that goes on from there
        for updates, seconds in evaluations.items():
            writer.add_scalar("eval/episodic_return", 1.0, updates, walltime=began + seconds)
        writer.add_scalar("losses/loss", 1.0, updates + 10, walltime=began + seconds + 1_800)  # then it was killed
        writer.close()
    monkeypatch.undo()
    events = EventAccumulator(str(tmp_path)).Reload()
    times = program.read_times(str(tmp_path), {key: events.Scalars(key) for key in events.Tags()["scalars"]})
    hours = {0: 1 / 60, 50: 2, 100: 2.5 + 1, 150: 2.5 + 2}
    assert times == {
        step: (pytest.approx(x), "2024-10-04" if step < 100 else "2024-10-05") for step, x in hours.items()
    }


def test_runs_are_collected_and_collected_again(tmp_path, report):
    cosines = {32: 0.1, 33: 0.2, 34: 0.3, 35: 0.4, 98: 0.5, 99: 0.5}
    scalars = {"transfer/grad_cosine/Fruit-v0": cosines}
    scalars["transfer/task_weight/Fruit-v0"] = {24: 1, 32: 1, 40: 0.75, 100: 0.75}
    (tmp_path / "README.md").write_text(MARKED)
    make_run(tmp_path / "a", scalars=scalars, exp_name="toy-xtra", pretrained="runs/toy/student-3/", seed=3)
    make_run(tmp_path / "b", better=1, exp_name="toy-efficientzero", scalars={}, extra_updates=20)
    make_run(tmp_path / "c", exp_name="finetune")
    make_run(tmp_path / "copy", exp_name="toy-xtra", seed=3)
    (tmp_path / "begun").mkdir()
    error, out = report("--collect", "a", "b", "a/", "c", "copy", "begun")
    assert error is None
    assert [line.split("/")[-1] for line in out.splitlines() if "left out" in line] == [
        "c: left out; its --exp-name is not a scale and a method, as in toy-xtra",
        "copy: left out; a run before it is of the same method, game and seed",
    ]
    path = tmp_path / "benchmark/results/runs.csv"
    origin = load_model(str(tmp_path / "a/model.pt"))[1]["origin"]
    lines = list(csv.reader(path.open()))
    assert lines[0] == pages.RUNS and {(*line[-3:-1],) for line in lines[1:]} == {
        ("", ""),
        (origin["card"], origin["commit"]),
    }
    lines = [",".join(line[:-4]) for line in lines[1:]]
    assert lines[:3] == [  # deviations of 0 2, 4 6 and 10 14, and of b one more
        "toy,efficientzero,Storm-v0,1,,0,0,120,2,1,2,",
        "toy,efficientzero,Storm-v0,1,,50,50,120,6,1,2,",
        "toy,efficientzero,Storm-v0,1,,100,100,120,13,2,2,",
    ]
    assert lines[3] == "toy,perfect,Storm-v0,0,,0,0,0,16,0,100,"
    assert lines[4].startswith("toy,random,Storm-v0,0,,0,0,0,")
    assert lines[5:] == [
        "toy,xtra,Storm-v0,3,student-3,0,0,100,1,1,2,",
        "toy,xtra,Storm-v0,3,student-3,50,50,100,5,1,2,",
        "toy,xtra,Storm-v0,3,student-3,100,100,100,12,2,2,",
    ]
    # The mean is 0.25; around it -0.15 -0.05 0.05 0.15: (0.0075 - 0.0025 + 0.0075) / 0.05 = 0.25. The measurement of
    # the updates 98 and 99 has not made an eta yet.
    weights = tmp_path / "benchmark/results/weights.csv"
    assert weights.read_text().splitlines()[1:] == ["toy,xtra,Storm-v0,3,Fruit-v0,36,4,0.75,0.25,0.25"]
    page = (tmp_path / "docs/results.md").read_text()
    assert "counted nowhere above: efficientzero Storm-v0 1." in page  # 100 of 120 updates
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!--") and readme.endswith("-->\nafter\n") and "| XTRA | " in readme
    named = {f"docs/{name}" for name in re.findall(r"\((images/.*?)\)", page)}
    assert named and named == {str(x.relative_to(tmp_path)) for x in tmp_path.glob("docs/images/results/*.png")}
    shutil.rmtree(tmp_path / "a")
    make_run(tmp_path / "a", better=2, exp_name="toy-xtra", pretrained="student-3", seed=3, scalars={})
    program.collect([str(tmp_path / "a")], str(tmp_path / "benchmark/results"))
    again = [",".join(line[:-4]) for line in csv.reader(path.open())][1:]
    assert again[:5] == lines[:5]  # kept; random play was not played again
    assert again[5:] == [
        "toy,xtra,Storm-v0,3,student-3,0,0,100,3,1,2,",
        "toy,xtra,Storm-v0,3,student-3,50,50,100,7,1,2,",
        "toy,xtra,Storm-v0,3,student-3,100,100,100,14,2,2,",
    ]
    assert len(weights.read_text().splitlines()) == 1


def test_students_of_one_seed_that_share_a_game_are_two(tmp_path):
    lines = [("toy", "student", "Fruit-v0", 1, name, 0, 8, 8, 1.0, 0.0, 2, None, "", "", "", "") for name in ("a", "b")]
    lines.append(("toy", "xtra", "Storm-v0", 1, "a", 8, 8, 8, 1.0, 0.0, 2, None, "", "", "", ""))
    path = str(tmp_path / "runs.csv")
    program.merge(path, lines, set(), pages.RUNS)
    student, xtra = ((*line[:8], 5.0, *line[9:]) for line in (lines[1], lines[2]))
    xtra = (*xtra[:4], "b", *xtra[5:])  # the same run, from another student
    program.merge(path, [student, xtra], {student[:5], xtra[:4]}, pages.RUNS)
    found = pages.read_csv(path, pages.RUNS)
    assert found[["pretrained", "mean"]].values.tolist() == [["a", 1], ["b", 5], ["b", 5]]
    runs = pages.read_scale("toy", found, pages.read_csv("", pages.WEIGHTS), pages.read_paper(pages.PAPER))
    assert len(runs.finals) == 3


def test_on_atari_the_papers_numbers_stand_beside_ours():
    lines = [
        line | {"scale": "paper", "game": game}
        for game in ("Assault", "Carnival")
        for line in lines_of("xtra", [2000] * 3)
    ]
    runs = pd.DataFrame(lines)[pages.RUNS]
    data = pages.read_scale("paper", runs, pages.read_csv("", pages.WEIGHTS), pages.read_paper(pages.PAPER))
    rows = pages.scores_table(data, pages.TABLE1 + pages.ZERO_SHOT).splitlines()
    # 2000 / 1294.6; a human has 742.0 and random play 222.4
    assert "| 2,000.0 [2,000.0, 2,000.0] (3)<br>paper: 1,294.6, ratio 1.54 | 0.0 | 222.4 | 0.0 (1)†" in rows[2]
    assert rows[2].endswith("| 742.0 |") and rows[3].endswith("| - |")  # Carnival has no human score
    assert data.samples["xtra.final"]["Assault"] == pytest.approx([(2000 - 222.4) / (742.0 - 222.4)] * 3)
    assert data.samples["xtra.final"].keys() == {"Assault"} and data.samples["xtra.amount"].keys() == {
        "Assault",
        "Carnival",
    }
    row = next(x for x in pages.aggregates_table(data, pages.TABLE1).splitlines() if x.startswith("| XTRA "))
    assert "<br>paper: 2.06" in row  # Table 3's human-normalised score of Assault


def test_the_papers_own_scores_reproduce_its_claims():
    """Its tables as if they were our runs, of three seeds that agree."""
    paper = pages.read_paper(pages.PAPER)
    lines = []
    for method, (_, _, column) in pages.METHODS.items():
        for game, scores in (paper.table2 if method in pages.TABLE2 else paper.table1).items():
            if column and method != "zero-shot":
                first = scores["ZeroShot_XTRA"] if method == "xtra" else 0
                ours = {"first": first, "game": game, "scale": "paper", "pretrained": game * (method in ("xtra", "bc"))}
                lines += lines_of(method, 3 * [scores[column]], **ours)
    # Three students whose zero-shot scores are the same count as one: so each has a name.
    for line in lines:
        line["pretrained"] += str(line["seed"]) * bool(line["pretrained"])
    data = pages.read_scale("paper", pd.DataFrame(lines)[pages.RUNS], pages.read_csv("", pages.WEIGHTS), paper)
    _, verdicts, _ = pages.claims_table(data, paper.claims)
    known = "A1 A2 A5 A6 A7 A8 A9 B1 B2 B3 B4 B5 B6 C1 C3".split()
    assert set(known) <= set(verdicts["reproduced"]), verdicts
    numbers = {name: [x[0] for x in pages.answer(pages.CLAIMS[name], data.samples)[1]] for name in [*known, "A3"]}
    printed = {"A1": [1.2334], "A2": [1.2497], "A3": [0.7099], "A5": [1.3612 - 1.1055], "A6": [1.8731 - 1.2889]}
    printed |= {"A8": [3 / 5], "B2": [0.85], "B4": [2.088], "B6": [0.79], "C3": [6 / 9]}
    for name, expected in printed.items():
        assert numbers[name] == pytest.approx(expected, abs=0.006), name


def test_pages_without_runs_or_without_a_place_in_the_readme(tmp_path, report):
    assert report("--pages")[0].startswith("error: benchmark/results/runs.csv has no runs; put some in")
    (tmp_path / "runs.csv").write_text(pd.DataFrame(lines_of("xtra", [3]))[pages.RUNS].to_csv(index=False))
    assert report("--pages", "--results", ".")[0].startswith("error: README.md lacks the lines <!-- results: begin -->")


@pytest.mark.skipif(not (ROOT / "benchmark/results/runs.csv").exists(), reason="no results in benchmark/results/ yet")
def test_the_pages_are_those_of_the_results(tmp_path, report):
    shutil.copy(ROOT / "README.md", tmp_path)
    assert report("--pages", "--results", str(ROOT / "benchmark/results"))[0] is None
    for name in ("README.md", "docs/results.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: report.py --pages writes another"
    ours, theirs = ({x.name: x for x in (top / "docs/images/results").iterdir()} for top in (tmp_path, ROOT))
    assert ours.keys() == theirs.keys()
    for name, path in theirs.items():
        if name.endswith(".svg") and f"Matplotlib v{matplotlib.__version__}," not in path.read_text():
            pytest.skip("the figures were drawn by another version of matplotlib")
    for name, path in theirs.items():
        if name.endswith(".svg"):
            assert path.read_bytes() == ours[name].read_bytes(), name
        else:  # other releases of Pillow compress the same picture to other bytes
            assert np.array_equal(Image.open(path), Image.open(ours[name])), name
