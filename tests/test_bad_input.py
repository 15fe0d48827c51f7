"""A wrong command line is one line on stderr and status 1, and leaves nothing behind.

The scripts run in this process, since each start of an interpreter takes seconds; the last test starts two.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import ROOT, run, with_flags

import finetune
import model

TINY = "--channels 2 --blocks 1 --batch-size 4 --unroll-steps 1 --num-simulations 2 --eval-episodes 1"
TINY += " --eval-max-frames 4 --no-cuda"
STEPS = "--total-timesteps 16 --learning-starts 8 --offline-batch-size 4"
GOOD = {  # the flags of a run that works
    "pretrain_teacher.py": f"{TINY} --num-updates 8 --datasets data1.npz",
    "distill.py": f"{TINY} --num-updates 8 --teachers teacher1 teacher2",
    "finetune.py": f"{TINY} {STEPS} --env-id toy_env:Catch-v0 --pretrained student",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")


def contents():
    return sorted(Path.cwd().rglob("*"))


def refusal(script, flags):
    """The one line that the script refuses the flags with; it changed no file."""
    before = contents()
    line = run(".", f"{script} {flags}")
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    assert contents() == before
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two datasets of random frames, their teachers and a student, as the scripts leave them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for i in (1, 2):
            replay, rng = finetune.Replay(20), np.random.default_rng(i)
            replay.frames[:] = torch.from_numpy(rng.integers(0, 256, (20, 3, 1, 1), dtype=np.uint8))
            replay.acted[:-1] = True
            finetune.save_dataset(f"data{i}.npz", replay, slice(0, 20), f"toy_env:Catch-v{i}")
            flags = GOOD["pretrain_teacher.py"].replace("data1", f"data{i}")
            assert run(folder, f"pretrain_teacher.py {flags} --run-dir teacher{i}") is None
        assert run(folder, f"distill.py {GOOD['distill.py']} --run-dir student") is None
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of them as the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    content = torch.load("student/model.pt")
    for places in content["teacher_folders"].values():
        places[1] = os.path.abspath(os.path.join("student", places[0]))  # not those of `made`
    torch.save(content, "student/model.pt")


@pytest.mark.parametrize(
    "script, flags, words",
    [
        # games
        ("finetune.py", "--env-id MsPackmanNoFrameskip-v4", "does not exist; did you mean MsPacmanNoFrameskip-v4?"),
        ("finetune.py", "--env-id Pong", "--env-id Pong does not exist; did you mean PongNoFrameskip-v4?"),
        ("finetune.py", "--env-id ms_pacman", "did you mean MsPacmanNoFrameskip-v4?"),
        ("finetune.py", "--env-id pongnoframeskip-v4", "did you mean PongNoFrameskip-v4?"),
        ("finetune.py", "--env-id Pong-v4", "is not Atari 100k: sticky actions or another frame skip; d"),
        ("finetune.py", "--env-id ale_py:PongNoFrameskip-v4", "is not Atari 100k: sticky actions or another fra"),
        ("finetune.py", "--env-id SpaceInvadersDeterministic-v4", "did you mean SpaceInvadersNoFrameskip-v4?"),
        ("finetune.py", "--env-id PhonixNoFrameskip-v4", "does not exist; did you mean PhoenixNoFrameskip-v4?"),
        ("finetune.py", "--env-id CartPole-v1", "float32) and Discrete(2); expected uint8 images"),
        ("finetune.py", "--env-id Nothing-v0", "--env-id Nothing-v0: NameNotFound: Environment `Nothing`"),
        ("finetune.py", "--env-id ALE/Pong-v5", "did you mean PongNoFrameskip-v4?"),
        ("finetune.py", "--env-id nowhere:Catch-v0", "--env-id nowhere:Catch-v0: ModuleNotFoundError: No module named"),
        ("finetune.py", "--env-id toy_env:Catchh-v0", "toy_env:Catchh-v0: NameNotFound: Environment `Catchh`"),
        ("finetune.py", "--env-id toy_env:WrongShape-v0", "(84, 84, 4), uint8) and Discrete(18); expected uint8 ima"),
        ("finetune.py", "--env-id toy_env:TooManyActions-v0", "and Discrete(19); expected uint8 images"),
        ("finetune.py", "--env-id toy_env:Catch-v1", "--env-id toy_env:Catch-v1 is one of the offline games"),
        # folders and files
        ("pretrain_teacher.py", "--datasets nowhere.npz", "nowhere.npz not found"),
        ("pretrain_teacher.py", "--datasets teacher1", "teacher1 is a folder, expected a file"),
        ("pretrain_teacher.py", "--datasets teacher1/model.pt", "teacher1/model.pt has no acted, action, chunk_ends"),
        ("distill.py", "--teachers teacher1 nowhere", "nowhere/targets.npz not found"),
        ("distill.py", "--teachers student teacher1", "student/targets.npz not found"),
        ("finetune.py", "--pretrained nowhere", "nowhere/model.pt not found"),
        (
            "finetune.py",
            "--pretrained teacher1",
            "--pretrained teacher1 names no teachers; give a student of distill.py",
        ),
        ("finetune.py", "--pretrained student/model.pt", "student/model.pt is a file, expected a run folder; give st"),
        ("distill.py", "--teachers teacher1 teacher2/model.pt", "is a file, expected a run folder; give teacher2"),
        ("distill.py", "--teachers teacher1 ./teacher1", "--teachers has a game twice: toy_env:Catch-v1"),
        ("finetune.py", "--teachers teacher1 teacher1", "an offline game is there twice: toy_env:Catch-v1"),
        ("pretrain_teacher.py", "--datasets data1.npz data1.npz", "--datasets has a game twice: toy_env:Catch-v1"),
        ("finetune.py", "--channels 4", "--channels 4, but --pretrained student has 2; drop the flag"),
        ("finetune.py", "--blocks 4", "--blocks 4, but --pretrained student has 1; drop the flag"),
        ("finetune.py", "--save-dataset data1.npz", "--save-dataset is data1.npz, expected the name of a new .npz"),
        ("finetune.py", "--save-dataset data1.npz/new.npz", "--save-dataset data1.npz/new.npz: Not a directory"),
        ("finetune.py", "--save-dataset /proc/none/new.npz", "--save-dataset /proc/none/new.npz: No such file"),
        ("finetune.py", f"--save-dataset {250 * 'a'}.npz", "File name too long"),
        ("finetune.py", "--save-dataset new.npz --total-timesteps 0", "--save-dataset needs --total-timesteps"),
        ("finetune.py", "--save-dataset new/data", "--save-dataset is new/data, expected the name of a new .npz"),
        # run folders
        ("pretrain_teacher.py", "--run-dir student", "--run-dir student is not empty; continue the run in it with"),
        ("distill.py", "--run-dir data1.npz", "--run-dir data1.npz: File exists; choose another folder"),
        ("finetune.py", "--run-dir data1.npz/run", "--run-dir data1.npz/run: Not a directory; choose another folder"),
        ("finetune.py", f"--run-dir {300 * 'a'}", "File name too long; choose another folder"),
        ("finetune.py", "--resume", "it is to continue; perhaps one that is not in runs/"),
        ("finetune.py", "--resume --exp-name a", "--resume needs the --run-dir that it is to continue; perhaps"),
        # numbers
        ("pretrain_teacher.py", "--num-updates 0", "--num-updates is 0, expected 1 or more"),
        ("distill.py", "--batch-size 1", "--batch-size is 1, expected 2 or more"),
        ("finetune.py", "--eval-episodes 100000", "--eval-episodes is 100000, expected 1 to 1000"),
        ("finetune.py", "--learning-rate nan", "--learning-rate is nan, expected 0 or more"),
        ("finetune.py", f"--seed {2**64}", f"--seed is {2**64}, expected 0 to {2**64 - 1}"),
        ("finetune.py", "--gamma 99", "--gamma is 99.0, expected 0 to 1"),
        ("finetune.py", "--dirichlet-alpha 0", "--dirichlet-alpha is 0.0, expected 0.001 or more"),
        ("finetune.py", "--dirichlet-fraction 25", "--dirichlet-fraction is 25.0, expected 0 to 1"),
        ("finetune.py", "--max-grad-norm 0", "--max-grad-norm is 0.0, expected 0.001 or more"),
        ("finetune.py", "--total-timesteps -8", "--total-timesteps is -8, expected 0 or more"),
        # flags that do not go together
        ("pretrain_teacher.py", "--batch-size 5 --datasets data1.npz data2.npz", "--batch-size 5 is not a multiple of"),
        ("pretrain_teacher.py", "--cycle 3", "--num-updates 8 is no multiple of --cycle 3; make it one"),
        ("distill.py", "--batch-size 5", "--batch-size 5 is not a multiple of the 2 --teachers"),
        ("distill.py", "--cycle 3", "--num-updates 8 is no multiple of --cycle 3; make it one"),
        ("finetune.py", "--offline-batch-size 5", "--offline-batch-size 5 is not a multiple of the 2 games"),
        ("finetune.py", "--num-envs 3", "is no multiple of --num-envs * --steps-per-update = 3"),
        ("finetune.py", "--steps-per-update 3", "no multiple of --num-envs * --steps-per-update = 24"),
        ("finetune.py", "--extra-updates 3", "--extra-updates must be a multiple of --num-envs, here 8"),
        ("finetune.py", "--num-simulations 0", "--num-simulations 0 only evaluates"),
        ("finetune.py", "--similarity-updates 5 --similarity-interval 5", "--similarity-updates must be less than"),
        ("finetune.py", "--teachers teacher1 --no-cross-task", "--teachers are not used with --no-cross-task"),
        ("finetune.py", "--teachers teacher1 --total-timesteps 0", "--teachers are not used with"),
        ("finetune.py", "--total-timesteps 8000000000", "the frames take 221184.0 GB, but"),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(work, script, flags, words):
    assert words in refusal(script, with_flags(GOOD[script], flags))


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("pretrain_teacher.py", "", "--datasets is empty, expected dataset files"),
        ("distill.py", "", "--teachers is empty, expected run folders"),
        ("finetune.py", "--transfer hg", "--transfer need --pretrained"),
        ("finetune.py", "--freeze-representation", "--freeze-representation and --transfer need --pretrained"),
    ],
)
def test_what_must_be_given_is_named(work, script, flags, words):
    assert words in refusal(script, flags)


def test_every_number_has_a_lowest_value():
    defaults = model.read_flags(finetune.Args, "", [])
    for name, value in vars(defaults).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            for wrong in (-1.1, float("nan"), float("inf")) if isinstance(value, float) else (-1, 0):
                args = copy.copy(defaults)
                args.extra_updates = 1  # the one default of 0
                setattr(args, name, wrong)
                with pytest.raises(SystemExit, match=f"error: --{name.replace('_', '-')} is {wrong}, expected"):
                    model.check_numbers(args, may_be_zero=())


def test_a_teacher_that_is_lost_is_named(work):
    shutil.rmtree("teacher2")
    assert "teacher2/targets.npz not found" in refusal("distill.py", GOOD["distill.py"])
    assert "teacher2 are gone" in refusal("finetune.py", GOOD["finetune.py"])


def test_a_teacher_that_is_another_one_now_is_refused_unless_it_is_asked_for(work):
    answers = model.load_file("teacher2/targets.npz")
    np.savez("teacher2/targets.npz", **answers | {"value": answers["value"] + 1})
    assert "teacher2 have changed since" in refusal("finetune.py", GOOD["finetune.py"])
    assert run(".", f"finetune.py {GOOD['finetune.py']} --teachers teacher1 teacher2 --run-dir new") is None


def test_an_evaluation_needs_no_teacher_and_says_nothing_of_training(work, capsys):
    for name in ("teacher1", "teacher2", "data1.npz", "data2.npz"):
        shutil.move(name, "..")
    flags = with_flags(GOOD["finetune.py"], "--total-timesteps 0 --env-id toy_env:Catch-v1 --batch-size 65536")
    assert run(".", f"finetune.py {flags} --run-dir new") is None
    assert "update of this size" not in capsys.readouterr().out


@pytest.fixture
def moved(work, request):
    """Moves what the chain left -> the student's folder."""
    Path("a/b").mkdir(parents=True)
    if request.param == "together":
        for name in ("teacher1", "teacher2", "student"):
            shutil.move(name, "a/b")
        return "a/b/student"
    if request.param == "student alone":
        return shutil.move("student", "a/b")
    if request.param == "student alone, to a namesake of its teachers":
        for i in (1, 2):
            answers = model.load_file(f"teacher{i}/targets.npz")
            Path(f"a/teacher{i}").mkdir()
            np.savez(f"a/teacher{i}/targets.npz", **answers | {"reward": answers["reward"] + 1})
        return shutil.move("student", "a")
    os.symlink(os.path.abspath("student"), "a/b/link")  # from where .. leads elsewhere
    os.chdir("a")
    return "b/link"


@pytest.mark.parametrize(
    "moved",
    ["together", "student alone", "student alone, to a namesake of its teachers", "nothing: a link, from elsewhere"],
    indirect=True,
)
def test_a_student_finds_the_very_data_it_was_distilled_from(made, moved):
    expected = [model.read_dataset(f"{made}/teacher{i}/targets.npz", is_answered=True)["checksum"] for i in (1, 2)]
    os.makedirs("far/away")
    os.symlink("far/away", "runs")
    assert (
        run(".", f"finetune.py {with_flags(GOOD['finetune.py'], f'--pretrained {moved}')} --run-dir runs/new") is None
    )
    assert model.load_file("runs/new/checkpoint.pt")["datasets"] == expected
    assert [*model.load_model("runs/new/model.pt")[1]["teacher_folders"]] == expected


def test_names_of_run_folders_are_short_and_plain(work):
    flags = with_flags(GOOD["pretrain_teacher.py"], "--datasets data1.npz data2.npz")
    assert run(".", f"pretrain_teacher.py {flags}") is None
    assert run(".", f"finetune.py {GOOD['finetune.py']} --exp-name 'a/b c'") is None
    names = sorted(os.listdir("runs"))
    assert [name.rsplit("__", 1)[0] for name in names] == ["2-games__pretrain_teacher__1", "toy_env-Catch-v0__a-b-c__1"]


def test_a_network_of_another_model_py_is_refused(work):
    content = torch.load("student/model.pt")
    content["config"] |= {"heads": 3}
    torch.save(content, "student/model.pt")
    line = refusal("finetune.py", GOOD["finetune.py"])
    assert "student/model.pt does not fit model.py: heads differ; use the model.py that wrote it" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--cuda False", "--cuda is on or off and takes no value: write --cuda or --no-cuda"),
        ("--capture_video=True", "--capture-video is on or off and takes no value: write --capture-video or --no-capt"),
        ("--envid Pong", "there is no flag --envid; did you mean --env-id?"),
        ("--num-env 4", "there is no flag --num-env; did you mean --num-envs"),
        ("--lr 0.1", "there is no flag --lr; did you mean --learning-rate?"),
        ("--no-track-me", "there is no flag --no-track-me; did you mean --track?"),
        ("--zzzz", "there is no flag --zzzz; see --help"),
        ("Pong", "Pong belongs to no flag; see --help"),
        ("--seed 1 2", "2 belongs to no flag; see --help"),
        ("--seed 1 --capture-video 1", "--capture-video is on or off and takes no value: write --capture-video or"),
        ("--no-cuda False", "--cuda is on or off and takes no value: write --cuda or --no-cuda"),
        ("--seed one", "Error parsing --seed: invalid literal for int() with base 10: 'one'; see --help"),
        ("--transfer x", "invalid choice 'x' for argument '--transfer'. Expected one of ('hgf', 'hg', 'h')."),
        ("--seed", "--seed"),
    ],
)
def test_a_word_that_is_no_flag_is_answered_with_the_closest(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal("finetune.py", flags)


def test_tracking_without_wandb_is_refused_before_anything_is_loaded(work, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("wandb").mkdir()  # as an earlier run of wandb leaves it: Python would import it
    assert "--track needs the package wandb" in refusal("finetune.py", "--track --pretrained nowhere")


@pytest.mark.parametrize(
    "script, flags", [("finetune.py", "--env-id ALE/Pong-v5"), ("pretrain_teacher.py", "--datasets nowhere.npz")]
)
def test_a_shell_sees_one_line_on_stderr_and_status_1(tmp_path, script, flags):
    command = [sys.executable, str(ROOT / script), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
