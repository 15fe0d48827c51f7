"""benchmark/report.py: its table on runs whose numbers are known, and its answers to wrong input."""

import contextlib
import csv
import io
import shlex
import shutil

import pytest
from PIL import Image
from test_resume import run
from torch.utils.tensorboard import SummaryWriter

from model import EfficientZeroNet, ModelConfig, save_model

FLAGS = {"pretrained": None, "teachers": (), "total_timesteps": 100, "cross_task": True, "task_weights": True}
FLAGS |= {"seed": 1, "eval_max_frames": 108_000}
RETURNS = {0: [0, 2], 50: [4, 6], 100: [10, 14]}  # environment steps: two games each


@pytest.fixture
def report(tmp_path, capsys):
    """Runs report.py in this process, which spares the seconds of imports -> None or its error, what it printed."""

    def report(*words):
        error = run(tmp_path, shlex.join(["benchmark/report.py", *words]))
        return error, capsys.readouterr().out

    return report


def make_run(folder, better=0, returns=RETURNS, scalars=True, module="toy_env", **flags):
    """A run folder of finetune.py on Storm, whose returns are those of RETURNS and `better`."""
    folder.mkdir()
    with open(folder / "evaluations.csv", "w") as file:
        rows = csv.writer(file)
        rows.writerow(["env_steps", "updates", "episode", "return", "length", "env_id"])
        for steps, scores in returns.items():
            rows.writerows([steps, steps, i, x + better, 16, f"{module}:Storm-v0"] for i, x in enumerate(scores))
    net = EfficientZeroNet(ModelConfig.of_width(2, 1))
    save_model(str(folder / "model.pt"), net, args=FLAGS | flags, env_ids=[f"{module}:Storm-v0", f"{module}:Fruit-v0"])
    if scalars:
        writer = SummaryWriter(folder)
        writer.add_scalar("transfer/task_weight/Fruit-v0", 0.5, 50)
        writer.add_scalar("transfer/grad_cosine/Fruit-v0", 0.2, 50)
        writer.close()


def test_seeds_of_a_method_are_one_line_beside_random_and_perfect_play(tmp_path, report):
    make_run(tmp_path / "a", seed=1)
    make_run(tmp_path / "b", seed=2, better=-2)
    make_run(tmp_path / "c", pretrained="student", better=5)
    make_run(tmp_path / "d", pretrained="student", cross_task=False, better=-9, scalars=False)
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


def test_a_run_that_was_only_evaluated_and_one_without_scalars(tmp_path, report):
    make_run(tmp_path / "zero-shot", returns={0: [4, 6]}, scalars=False, pretrained="student", total_timesteps=0)
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
