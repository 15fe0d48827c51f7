"""benchmark/matrix.py: which runs an experiment needs, and a pool that does them, on commands of a second each."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import matrix  # noqa: E402

SCRIPTS = {f"{name}.py": importlib.import_module(name) for name in ("finetune", "pretrain_teacher", "distill")}


def make_plan(scale, folder="runs/x", **changes):
    return SimpleNamespace(**matrix.SCALES[scale] | {"scale_name": scale, "folder": str(folder)} | changes)


def plan(scale, experiments=matrix.OF_THE_PAPER, games=(), seeds=(1, 2, 3, 4, 5), **changes):
    return matrix.plan_runs(make_plan(scale, **changes), experiments, games, seeds)


# --- the paper's experiments
def test_table_1_has_ten_targets_that_share_ten_teachers():
    counts = Counter(job.method for job in plan("paper", ["table1"]).values())
    every_seed = "efficientzero efficientzero-l xtra wo-cross-task wo-pretraining wo-task-weights bc".split()
    assert counts == dict.fromkeys(every_seed, 50) | dict.fromkeys(["teacher", "student", "cloned"], 10)


def test_students_of_their_own_have_teachers_and_data_of_their_own():
    jobs = plan("paper", ["figure7d"], ["MsPacman"], seeds=(1, 2, 3), students=2)
    counts = Counter(job.method for job in jobs.values())
    assert counts == {"efficientzero": 3 + 2 * 4, "teacher": 8, "student": 2, "xtra": 3}
    started_from = [jobs[f"runs/x/xtra__MsPacman__{seed}"].needs[0][-1] for seed in (1, 2, 3)]
    assert started_from == ["1", "2", "1"]


def test_the_diverse_setting_has_one_student_of_eight_games_for_five_targets():
    counts = Counter(job.method for job in plan("paper", ["table2"], seeds=(1,)).values())
    expected = {"diverse-efficientzero": 5, "diverse-xtra": 5, "diverse-student": 1, "teacher": 8, "efficientzero": 8}
    assert counts == expected


@pytest.mark.parametrize("scale", matrix.SCALES)
def test_each_command_is_one_that_its_script_takes_and_comes_after_what_it_needs(scale):
    seen, methods = set(), set()
    experiments = [*matrix.OF_THE_PAPER, *["probes"] * (scale == "small")]
    for folder, job in plan(scale, experiments, seeds=(1,)).items():
        script, *words = job.words
        paths = [word for word in words if word.startswith("runs/")]
        folders = {os.path.dirname(path) if path.endswith(".npz") else path for path in paths}
        assert folders - {folder} == set(job.needs) <= seen
        seen.add(folder)
        if job.method in methods:
            continue  # to parse takes a tenth of a second
        methods.add(job.method)
        args = tyro.cli(SCRIPTS[script].Args, args=words, config=(tyro.conf.OmitArgPrefixes,))
        flags = [word for word in words if word.startswith("--")]
        assert len(set(flags)) == len(flags)
        assert args.run.run_dir == folder and args.run.resume and args.run.exp_name == f"{scale}-{job.method}"
        if script == "finetune.py":
            flat = {name: value for part in (args, *groups(args)) for name, value in vars(part).items()}
            SCRIPTS[script].check_args(SimpleNamespace(**flat))
    assert {"efficientzero", "xtra", "teacher", "student"} <= methods  # by these names the report knows them


def test_a_scale_with_one_size_of_h_does_no_run_twice():
    lines = [" ".join(job.words) for job in plan("small").values()]
    commands = [re.sub(r"--(save-dataset|exp-name|run-dir) \S+", "", line) for line in lines]
    assert len(set(commands)) == len(commands)


def groups(args):
    return [value for value in vars(args).values() if hasattr(value, "__dataclass_fields__")]


def test_the_methods_are_those_of_the_readme():
    """Flags of the README's list of commands, by the comment behind each."""
    jobs = plan("paper", ["table1", "figure7b", "figure8", "figure10", "figure11"], ["MsPacman"], seeds=(1,))
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^python (\w+\.py) (.*?)  +# (.*)$", text, re.M)
    names = {
        "EfficientZero": "efficientzero", "EfficientZero-L": "efficientzero-l", "XTRA": "xtra",
        "the same, twice the batch (App. D)": "efficientzero-l-512", "without cross-task": "wo-cross-task",
        "without pretraining": "wo-pretraining", "without task weights": "wo-task-weights",
        "frozen h (Figure 7b)": "frozen-h", "only h and g (Figure 8)": "transfer-hg", "only h (Figure 8)": "transfer-h",
        "behaviour cloning": "cloned", "its zero-shot score": "bc",
        "multi-game offline RL (App. C)": "multi-game",
    }  # fmt: skip
    found = {names[what]: (script, flags_of(words.split())) for script, words, what in listed if what in names}
    assert found.keys() == set(names.values())
    for method, (script, flags) in found.items():
        job = next(job for job in jobs.values() if job.method == method)
        theirs = flags_of(job.words[1:])
        if script == "finetune.py" and "--pretrained" not in flags:
            flags.setdefault("--blocks", "1")  # the default
        flags |= {"--blocks": "4"} if script != "finetune.py" else {}
        assert job.words[0] == script and theirs == flags, method


def flags_of(words):
    """{flag: value} of what makes a method: not the folders, the game and the seed."""
    flags, places = {}, ("--run-dir", "--exp-name", "--seed", "--env-id", "--save-dataset", "--resume")
    for i, word in enumerate(words):
        if word.startswith("--") and word not in places:
            value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
            flags[word] = "" if word in ("--pretrained", "--teachers", "--datasets") else value
    return flags


def test_every_method_has_a_price_at_every_scale():
    for scale in matrix.SCALES:
        prices = matrix.read_prices(scale, None)
        assert {how for price in prices.values() for _, how in price.values()} <= {
            "measured",
            "scaled",
            "counted",
            "guessed",
        }
        assert scale != "paper" or {job.method for job in plan(scale).values()} | {"others"} == prices.keys()
        assert prices["a new one"] == prices["others"]


# --- the pool
APPEND = "with open({order!r}, 'a') as file: file.write({name!r})"


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Runs of a second whose needs are given -> their states, what was printed, and the order in which they ended."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    order = tmp_path / "order"
    order.write_text("")
    prices = {"toy": {"hours": (0.1, "measured")}}

    def pool(needs, code=None, slots=2, gpus=()):
        jobs = {}
        for name, needed in needs.items():
            words = ["-c", (code or {}).get(name, APPEND.format(order=str(order), name=name))]
            jobs[name] = SimpleNamespace(method="toy", folder=name, words=words, needs=tuple(needed), leaves=[])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            matrix.run_local(jobs, prices, {"GIVEN": "yes"}, slots, list(gpus), poll_seconds=0.02)
        return {name: job.state for name, job in jobs.items()}, said.getvalue(), order.read_text()

    return pool


def test_what_is_needed_comes_first_and_what_is_done_is_not_done_again(pool, tmp_path):
    needs = {"a": "", "b": "a", "c": "a", "d": "bc"}
    states, said, order = pool(needs)
    assert set(states.values()) == {"done"} and order in ("abcd", "acbd")
    assert "d: done after" in said and "4 done; about 0.00 h left" in said
    (tmp_path / "c" / "done").unlink()
    states, said, again = pool(needs)
    assert again == order + "c" and set(states.values()) == {"done"}


def test_a_slot_that_becomes_free_is_for_the_first_that_waits(pool):
    _, _, order = pool({"a": "b", "b": "", "c": ""}, slots=1)
    assert order == "bac"


def test_a_failure_stops_what_needs_it_and_nothing_else(pool, tmp_path):
    fails = {"b": "print('first'); print(' 50%|#####     | 1/2', flush=True); raise SystemExit('error: the reason')"}
    states, said, order = pool({"a": "", "b": "a", "c": "b", "d": "c", "e": "a"}, fails)
    assert states == {"a": "done", "b": "failed", "c": "stopped", "d": "stopped", "e": "done"} and order == "ae"
    assert matrix.last_lines(SimpleNamespace(folder="b")) == ["first", "error: the reason"]
    states, _, order = pool({"a": "", "b": "a", "c": "b", "d": "c", "e": "a"})  # the reason is gone
    assert set(states.values()) == {"done"} and order == "aebcd"


def test_each_slot_has_its_gpu_and_the_flags_their_environment(pool, tmp_path):
    tell = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['GIVEN'])"
    wait = "import os, time\nwhile not os.path.exists('b/log.txt'): time.sleep(0.01)\n"  # so that both are under way
    pool({"a": "", "b": ""}, {"a": wait + tell, "b": tell}, gpus=("3", "7"))
    assert [(tmp_path / name / "log.txt").read_text() for name in "ab"] == ["3 yes\n", "7 yes\n"]


def test_a_run_that_another_process_does_is_waited_for(pool, tmp_path):
    (tmp_path / "a").mkdir()
    hold = "import filelock, sys; lock = filelock.FileLock('a/lock').acquire(); print(1, flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=-1, stdout=-1)
    assert other.stdout.readline() == b"1\n"
    threading.Timer(2, other.communicate).start()  # ends it
    states, said, order = pool({"a": "", "b": ""}, slots=1)
    assert "a: elsewhere" in said and set(states.values()) == {"done"} and order == "ab"


KILLED = """
import sys
from types import SimpleNamespace
sys.path.insert(0, {folder!r})
import matrix
matrix.ROOT = matrix.Path({root!r})
job = SimpleNamespace(method="toy", folder="a", words={words!r}, needs=(), leaves=["model.pt"])
matrix.run_local({{"a": job}}, {{"toy": {{"hours": (0.1, "measured")}}}}, {{"GIVEN": "yes"}}, 1, [], 0.02)
"""
RUN = """
import filelock, os, pathlib, time
with open("a/began", "a") as file:
    file.write("x")
while not os.path.exists("go") and not os.path.exists("a/lock"):
    time.sleep(0.01)
try:
    lock = filelock.FileLock("a/lock").acquire(timeout=0)
except filelock.Timeout:
    raise SystemExit("error: --run-dir a is in use by another process; choose another folder")
pathlib.Path("a/held").touch()
while not os.path.exists("go"):
    time.sleep(0.01)
pathlib.Path("a/model.pt").touch()
"""


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_matrix_that_was_ended_goes_on(tmp_path, monkeypatch, sign):
    """Killed when its run has no lock yet: the run lives on, a second one starts, and one of the two gets the lock."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    folder, words = str(ROOT / "benchmark"), ["-c", RUN]
    code = KILLED.format(folder=folder, root=str(tmp_path), words=words)
    code = code if sign == signal.SIGKILL else f"import signal; signal.signal(15, lambda *_: exit(143)){code}"
    first = subprocess.Popen([sys.executable, "-c", code])
    until((tmp_path / "a" / "began").exists)
    first.send_signal(sign)
    assert first.wait() in (-signal.SIGKILL, 143)
    job = SimpleNamespace(method="toy", folder="a", words=words, needs=(), leaves=["model.pt"])

    def let_go():  # when the second one has begun, both go on
        try:
            until(lambda: (tmp_path / "a" / "began").read_text() == "xx")
            (tmp_path / "a" / "lock").touch()
            until((tmp_path / "a" / "held").exists)
        finally:
            (tmp_path / "go").touch()

    thread = threading.Thread(target=let_go)
    thread.start()
    with contextlib.redirect_stdout(io.StringIO()):
        matrix.run_local({"a": job}, {"toy": {"hours": (0.0, "measured")}}, {"GIVEN": "yes"}, 1, [], 0.02)
    thread.join()
    assert job.state == "done" and (tmp_path / "a" / "model.pt").exists()


def test_a_folder_that_cannot_be_written_fails_alone(pool, tmp_path):
    (tmp_path / "a").touch()
    states, said, _ = pool({"a": "", "b": "", "c": "a"})
    assert states == {"a": "failed", "b": "done", "c": "stopped"} and "a: [Errno 17] File exists" in said


def test_a_run_whose_files_were_removed_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    jobs = plan("toy", ["figure7d"], seeds=(1,), folder="m")
    job = jobs["m/efficientzero__Fruit-v0__1"]
    (tmp_path / job.folder).mkdir(parents=True)
    (tmp_path / job.folder / "done").write_text(matrix.shell_line(job, {}) + "\n")
    assert job.leaves == ["model.pt", "dataset.npz"] and not matrix.is_done(job, {})
    for name in job.leaves:
        (tmp_path / job.folder / name).touch()
    assert matrix.is_done(job, {})
    assert jobs["m/teacher__Fruit-v0__1"].leaves == ["model.pt", "targets.npz"]


def test_a_run_with_other_flags_is_refused(pool):
    pool({"a": ""})
    with pytest.raises(SystemExit, match="^error: .*a/done is of a run with other flags; move its folder away"):
        pool({"a": ""}, {"a": "print(1)"})


def test_the_progress_of_a_run_is_that_of_its_last_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    job = SimpleNamespace(folder="a")
    assert matrix.progress(job) == ""
    (tmp_path / "a").mkdir()
    bars = ["37%|███▋      | 152/416 [00:30<00:44,  5.98update/s]", " 90%|█████████ | 3/4 [1:30<07:13, 10.93s/update]"]
    bars += ["update 368: Catch-v1, return 8.0", "evaluation:  6%|▋ | 1/16 [00:01<00:15, 1.00s/game]"]
    (tmp_path / "a" / "log.txt").write_text("\n".join(bars))
    assert matrix.progress(job) == "90%, 07:13 left"


# --- the command
def command(tmp_path, words):
    """Runs matrix.py in this process -> None or the line that it ends with, and what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["benchmark/matrix.py", *shlex.split(words), "--folder", str(tmp_path / "m")])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            runpy.run_path(str(ROOT / "benchmark" / "matrix.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code, said.getvalue()
        finally:
            signal.signal(signal.SIGTERM, handler)
    return None, said.getvalue()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--games Pong",
            "error: --games Pong is no target at --scale paper; choose of Alien, Amidar, Assault, BankHeist",
        ),
        ("--games Assault Pong Foo --scale toy", "error: --games Assault is no target at --scale toy"),
        ("--experiments table2 --games MsPacman", "error: nothing to do: none of the --experiments has these --games"),
        ("--scale toy", "error: --experiments is empty; give some of table1, table2"),
        ("--experiments table1 --methods ez", "error: --methods ez is none; choose of bc, diverse-efficientzero"),
        ("--experiments table1 --backend slurm", "error: there is no sbatch here"),
        ("--experiments table1", "error: there is no GPU here, without which a run may take weeks; give --slots"),
        ("--experiments table3", "error: "),
        ("--list --card A100", "error: --card A100 has no prices at --scale paper; choose of H200"),
        ("--slots 0", "error: --slots is 0"),
        ("--experiments table1 --dry-run", "error: --dry-run is for --backend slurm"),
        ("--slots 2 --backend slurm", "error: --slots is for --backend local"),
        ("--students 0", "error: --students is 0"),
        ("--seeds 0 1", "error: --seeds is 0 1, expected 1 or more"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(tmp_path, monkeypatch, words, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    error, _ = command(tmp_path, words)
    assert error.startswith(expected) and "\n" not in error and not (tmp_path / "m").exists()


def test_the_list_adds_up(tmp_path):
    error, said = command(tmp_path, "--list --experiments figure8 figure7d --games MsPacman --seeds 1")
    lines = said.splitlines()
    hours = [float(line.split()[2]) for line in lines if line.startswith("# hours")]
    disk = [float(line.split()[-2]) for line in lines if line.startswith("# hours")]
    rows = {row[1]: row[2:] for row in ([cell.strip() for cell in line.split("|")] for line in lines if "|" in line)}
    assert error is None and len(hours) == 13 and lines[1].startswith("env python finetune.py --blocks 1 --env-id MsP")
    assert rows["figure8"] == rows["all of these together"]  # Figure 7d needs no other runs
    assert rows["figure8"][:2] == ["13", f"{sum(hours):.1f}"] and rows["figure8"][4] == f"{sum(disk):.1f}"
    assert rows["figure7d"][0] == "11" and float(rows["figure7d"][1]) < sum(hours)


def test_the_costs_in_the_docs_are_those_of_the_list(tmp_path):
    said = command(tmp_path, "--list")[1]
    costs = said[said.index("| experiment |") :]
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert costs.count("\n") == 13 and costs in page
    floor = command(tmp_path, "--list --card H100-floor")[1].splitlines()[-1].split("|")[3].strip()
    assert f"{floor} hours" in page


def test_only_some_methods_with_what_they_need(tmp_path):
    error, said = command(tmp_path, "--list --experiments table1 --methods xtra bc --games MsPacman --seeds 1 2")
    names = [line.split("--exp-name paper-")[1].split()[0] for line in said.splitlines() if "--exp-name" in line]
    assert error is None
    assert Counter(names) == {"efficientzero": 4, "teacher": 4, "student": 1, "cloned": 1, "xtra": 2, "bc": 2}


def test_a_dry_run_has_an_array_for_all_runs_that_need_the_same(tmp_path):
    error, said = command(tmp_path, "--experiments figure7d --games MsPacman --seeds 1 2 --backend slurm --dry-run")
    arrays = [line.split() for line in said.splitlines() if line.startswith("sbatch")]
    sizes = [next(word for word in words if word.startswith("--array"))[8:] for words in arrays]
    assert error is None and sizes == ["1-6"] + 4 * ["1-1"] + ["1-1", "1-2"]  # scratch, teachers, student, XTRA
    dependencies = [[word for word in words if word.startswith("--dependency")] for words in arrays]
    assert dependencies[0] == [] and dependencies[1] == ["--dependency=afterok:ARRAY1_2"]
    assert dependencies[-2] == ["--dependency=afterok:ARRAY2_1:ARRAY3_1:ARRAY4_1:ARRAY5_1"]
    assert dependencies[-1] == ["--dependency=afterok:ARRAY6_1"]
    lines = [line for line in said.splitlines() if "\t" in line]
    assert len(lines) == 13 and all(line.split("\t")[1].startswith("env python ") for line in lines)
    assert "0 done, 0 queued, 13 to submit, in 7 arrays" in said and not (tmp_path / "m").exists()
