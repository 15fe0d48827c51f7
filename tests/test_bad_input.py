"""A wrong command line is one clear line on stderr, exit status 1, and leaves nothing behind.

The scripts run in this process, since each start of an interpreter takes seconds; the last tests start one.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune
import pretrain_teacher
from model import EfficientZeroNet, ModelConfig, lock_folder, save_model, save_torch, write_manifest

ROOT = Path(__file__).resolve().parent.parent
GAME, OTHER, TARGET = "toy_env:Catch-v1", "toy_env:Catch-v2", "toy_env:Catch-v0"
STEPS = 30  # of each dataset
SETTINGS = {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0, "num_envs": 1}

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")


# ---- small files of each stage


def make_dataset(folder, env_id, seed=0):
    replay, rng = finetune.Replay(STEPS + 1, 1, "cpu"), np.random.default_rng(seed)
    for _ in range(STEPS + 1):
        finetune.add_frames(replay, rng.integers(0, 256, (1, 96, 96, 3), dtype=np.uint8), age=0)
    replay.acted[:STEPS] = True
    finetune.save_dataset(str(folder), replay, {"env_id": env_id, "settings": SETTINGS})


def make_network(folder, env_ids, **args):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    net = EfficientZeroNet(ModelConfig.of_width(8, 1))
    counters = {"updates": 1, "scores": {env_id: 1.0 for env_id in env_ids}}
    save_model(f"{folder}/model.pt", net, args, env_ids, counters)


def make_teacher(folder, dataset, env_id):
    def run_search(net, env_id, obs, legal, num_simulations, rng, noise):
        visits = np.zeros((len(obs), 18), np.int32)
        visits[:, 0] = num_simulations
        return type("Result", (), {"visits": visits}), np.zeros(len(obs), np.float32)

    make_network(folder, [env_id])
    replay = pretrain_teacher.load_dataset(str(dataset), "cpu")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_teacher, "run_search", run_search)
        settings = None, env_id, replay, np.ones(18, bool), 5, None, []
        pretrain_teacher.write_targets(str(folder), str(dataset), *settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two datasets, their teachers and a student, as the scripts leave them."""
    folder = tmp_path_factory.mktemp("made")
    for name, env_id in {"one": GAME, "two": OTHER}.items():
        make_dataset(folder / f"data-{name}", env_id)
        make_teacher(folder / f"teacher-{name}", folder / f"data-{name}", env_id)
    make_network(folder / "student", [GAME, OTHER], teachers=["../teacher-one", "../teacher-two"])
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A working folder with a copy of them, to be damaged."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.free_memory", lambda: 10**12)  # the default widths are not to fail for this machine's
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(monkeypatch, script, *flags):
    """Runs the script in this process; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # a script replaces it, and its signal handlers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return stop.value.code


def refused(monkeypatch, script, *flags):
    """The line that the script refuses the flags with, and that it changed no file."""
    before = contents(Path.cwd())
    message = run(monkeypatch, script, *flags)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    assert contents(Path.cwd()) == before
    return message


TEACHERS = ["--teachers", "teacher-one", "teacher-two"]
XTRA = ["--env-id", TARGET, "--pretrained", "student"]


def command(script, data="data-one"):
    """A good beginning of the flags, with `data` as input."""
    folders = {"pretrain_teacher.py": ["--datasets", data], "distill.py": ["--teachers", data]}
    return folders.get(script, ["--env-id", TARGET, "--teachers", data])


# ---- games


SCRIPTS = ["pretrain_teacher.py", "distill.py", "finetune.py"]


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("MsPackmanNoFrameskip-v4", "no game MsPackman"),
        ("ALE/Pong-v5", "--env-id PongNoFrameskip-v4"),
        ("nowhere:Catch-v0", "PYTHONPATH"),
        ("CartPole-v1", "expected Box(0, 255, (96, 96, 3), uint8)"),
    ],
)
def test_a_game_that_is_not_there(work, monkeypatch, env_id, words):
    message = refused(monkeypatch, "finetune.py", "--env-id", env_id)
    assert env_id in message and words in message


def test_a_dataset_of_a_game_that_is_not_there(work, monkeypatch):
    shutil.rmtree("data-one")
    make_dataset("data-one", "MsPackmanNoFrameskip-v4")
    assert "no game MsPackman" in refused(monkeypatch, "pretrain_teacher.py", "--datasets", "data-one")


@pytest.mark.parametrize("env_id", [GAME, OTHER])
def test_the_target_game_among_the_offline_games(work, monkeypatch, env_id):
    for flags in (["--pretrained", "student"], TEACHERS):
        message = refused(monkeypatch, "finetune.py", "--env-id", env_id, *flags)
        assert f"--env-id {env_id} is one of the offline games" in message


# ---- datasets


def damage_missing(folder):
    shutil.rmtree(folder)


def damage_a_file_in_its_place(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b"a file")


def damage_truncated(folder):
    with open(folder / "frames", "r+b") as file:
        file.truncate(1000)


def rewrite_meta(folder, format="xtra-dataset-1", **changed):
    fields = {"env_id": GAME, "settings": SETTINGS, "rows": STEPS + 1, "env_steps": STEPS} | changed
    write_manifest(f"{folder}/meta.json", format, fields, ["frames", "steps.npz"])


def damage_version(folder):
    rewrite_meta(folder, "xtra-dataset-0")


def damage_settings(folder):
    rewrite_meta(folder, settings=SETTINGS | {"sticky_actions": 0.25})


def damage_no_rows(folder):
    rewrite_meta(folder, rows=0)


def damage_field(folder):
    rewrite_meta(folder, rows="31")


def damage_flipped_byte(folder):
    content = bytearray((folder / "steps.npz").read_bytes())
    content[500] ^= 1
    (folder / "steps.npz").write_bytes(content)


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_missing, "meta.json not found"),
        (damage_a_file_in_its_place, "meta.json"),
        (damage_truncated, "data-one/frames is damaged"),
        (damage_version, "'xtra-dataset-0'"),
        (damage_settings, "'sticky_actions': 0.25"),
        (damage_no_rows, "has 0 rows"),
        (damage_field, "rows (int)"),
        (damage_flipped_byte, "data-one/steps.npz is damaged"),
    ],
)
def test_a_damaged_dataset(work, monkeypatch, damage, words):
    damage(work / "data-one")
    message = refused(monkeypatch, "pretrain_teacher.py", "--datasets", "data-one", "data-two")
    assert "data-one" in message and words in message
    for script, flags in {"distill.py": TEACHERS, "finetune.py": XTRA}.items():
        message = refused(monkeypatch, script, *flags)
        assert "data-one" in message  # named by its teacher


def test_a_dataset_with_fewer_steps_than_the_batch(work, monkeypatch):
    message = refused(monkeypatch, "pretrain_teacher.py", "--datasets", "data-one", "--batch-size", str(STEPS + 1))
    assert "dataset data-one" in message and "--batch-size" in message
    message = refused(monkeypatch, "distill.py", *TEACHERS, "--batch-size", str(2 * STEPS + 2))
    assert "teacher-one" in message and "--batch-size" in message
    message = refused(monkeypatch, "finetune.py", *XTRA, "--offline-batch-size", str(2 * STEPS + 2))
    assert GAME in message and "--offline-batch-size" in message


@pytest.mark.parametrize(
    "flags", [["--save-dataset", "data-one"], ["--save-dataset", "data-one/"], ["--save-dataset", "."]]
)
def test_a_dataset_is_not_overwritten(work, monkeypatch, flags):
    assert " ".join(flags) in refused(monkeypatch, "finetune.py", "--env-id", TARGET, *flags)


# ---- teachers and students


def test_a_teacher_and_the_dataset_of_another_run(work, monkeypatch):
    shutil.rmtree("data-one")
    make_dataset("data-one", GAME, seed=1)  # the same game, other frames
    for script, flags in {"distill.py": TEACHERS, "finetune.py": XTRA}.items():
        message = refused(monkeypatch, script, *flags)
        assert "does not belong" in message and "teacher-one" in message


def test_a_teacher_with_the_targets_of_another_game(work, monkeypatch):
    shutil.copy("teacher-two/model.pt", "teacher-one/model.pt")
    for script, flags in {"distill.py": TEACHERS, "finetune.py": XTRA}.items():
        assert "teacher-one" in refused(monkeypatch, script, *flags)


@pytest.mark.parametrize("name", ["model.pt", "targets.json", "targets.npz"])
def test_a_teacher_that_lacks_a_file_or_has_a_damaged_one(work, monkeypatch, name):
    path = work / "teacher-one" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for script, flags in {"distill.py": TEACHERS, "finetune.py": XTRA}.items():
        assert f"teacher-one/{name} is damaged" in refused(monkeypatch, script, *flags)
    path.unlink()
    for script, flags in {"distill.py": TEACHERS, "finetune.py": XTRA}.items():
        assert f"teacher-one/{name} not found" in refused(monkeypatch, script, *flags)


def rewrite_targets(visits=5, value=0.0, rows=STEPS + 1, **changed):
    """Other answers of teacher-one, with right checksums: what was written wrong, not damaged."""
    arrays = {"visits": np.zeros((rows, 18), np.uint16), "value": np.full(rows, value, np.float32)}
    arrays["visits"][:, 3] = visits
    np.savez("teacher-one/targets.npz", **arrays)
    fields = {"dataset": "../data-one", "rows": rows, "num_simulations": 5} | changed
    files = ["model.pt", "targets.npz", f"{fields['dataset'] or '../data-one'}/meta.json"]
    write_manifest("teacher-one/targets.json", "xtra-targets-1", fields, files)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"rows": STEPS}, "does not fit its dataset"),
        ({"rows": 0}, "rows or num_simulations out of range"),
        ({"visits": 4}, "does not fit its dataset"),
        ({"value": np.inf}, "does not fit its dataset"),
        ({"num_simulations": 0}, "rows or num_simulations out of range"),
        ({"num_simulations": 2**16}, "rows or num_simulations out of range"),
        ({"num_simulations": 5.0}, "num_simulations (int)"),
        ({"dataset": None}, "dataset (str)"),
        ({"dataset": "../data-two"}, "does not fit its dataset"),  # of a game that the teacher has no score in
    ],
    ids=str,
)
def test_a_teacher_whose_answers_are_wrong(work, monkeypatch, changed, words):
    rewrite_targets(**changed)
    for script, flags in {"distill.py": TEACHERS, "finetune.py": XTRA}.items():
        message = refused(monkeypatch, script, *flags)
        assert "teacher-one" in message and words in message


def test_rewritten_answers_are_accepted_where_they_are_right(work):
    rewrite_targets()  # the test above changes one thing of what is right
    assert finetune.load_task("teacher-one", "cpu").score == 1.0


@pytest.mark.parametrize("folder", ["student", "data-one", "nowhere"])
def test_a_folder_that_is_no_teacher(work, monkeypatch, folder):
    assert folder in refused(monkeypatch, "distill.py", "--teachers", folder)


@pytest.mark.parametrize("folder", ["data-one", "nowhere"])
def test_a_folder_that_is_no_student(work, monkeypatch, folder):
    assert f"{folder}/model.pt not found" in refused(
        monkeypatch, "finetune.py", "--env-id", TARGET, "--pretrained", folder
    )


def test_a_student_without_teachers(work, monkeypatch):
    message = refused(monkeypatch, "finetune.py", "--env-id", TARGET, "--pretrained", "teacher-one")
    assert "--teachers" in message and "--no-cross-task" in message


@pytest.mark.parametrize("flag, found", [("--channels", 8), ("--blocks", 1)])
def test_a_checkpoint_of_another_width(work, monkeypatch, flag, found):
    message = refused(monkeypatch, "finetune.py", *XTRA, flag, "4")
    assert f"{flag} 4" in message and f"has {found}" in message


# ---- flags that do not go together


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("pretrain_teacher.py", [], "--datasets is empty"),
        ("distill.py", [], "--teachers is empty"),
        ("pretrain_teacher.py", ["--datasets", "data-one", "data-two", "--batch-size", "25"], "--batch-size 25"),
        ("distill.py", [*TEACHERS, "--batch-size", "25"], "--batch-size 25"),
        ("finetune.py", [*XTRA, "--offline-batch-size", "25"], "--offline-batch-size 25"),
        ("finetune.py", ["--env-id", TARGET, *TEACHERS, "--no-cross-task"], "--no-cross-task"),
        ("finetune.py", ["--env-id", TARGET, "--freeze-representation"], "--freeze-representation"),
        ("finetune.py", ["--env-id", TARGET, "--num-simulations", "0"], "--num-simulations 0"),
        ("finetune.py", ["--env-id", TARGET, "--learning-starts", "255"], "--learning-starts 255"),
        ("finetune.py", ["--env-id", TARGET, "--total-timesteps", "255"], "--total-timesteps 255"),
    ],
)
def test_flags_that_do_not_go_together(work, monkeypatch, script, flags, words):
    assert words in refused(monkeypatch, script, *flags, "--eval-episodes", "1", "--eval-max-frames", "4")


COUNTS = [
    "batch-size",
    "unroll-steps",
    "td-steps",
    "eval-every",
    "eval-episodes",
    "eval-max-frames",
    "channels",
    "blocks",
    "checkpoint-every",
]
OF_FINETUNE = ["num-envs", "offline-batch-size", "similarity-interval", "similarity-updates"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_are_at_least_one(work, monkeypatch, script, value):
    own = OF_FINETUNE if script == "finetune.py" else ["num-updates", "num-simulations"]
    for flag in COUNTS + own:
        assert f"--{flag} is {value}" in refused(monkeypatch, script, *command(script), f"--{flag}", value)


@pytest.mark.parametrize("flag", ["total-timesteps", "extra-updates", "learning-starts", "num-simulations", "seed"])
def test_other_counts_are_at_least_zero(work, monkeypatch, flag):
    assert f"--{flag} is -1" in refused(monkeypatch, "finetune.py", *command("finetune.py"), f"--{flag}", "-1")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", ["-0.1", "nan", "inf"])
def test_a_learning_rate_is_a_number_of_0_or_more(work, monkeypatch, script, value):
    message = refused(monkeypatch, script, *command(script), "--learning-rate", value)
    assert f"--learning-rate is {float(value)}" in message


def small(script):
    """A good run of the smallest size, but for its --run-dir."""
    short = ["--offline-batch-size", "20", "--total-timesteps", "40", "--learning-starts", "20"]
    flags = {"finetune.py": XTRA + short, "distill.py": TEACHERS}.get(script, ["--datasets", "data-one"])
    return [*flags, "--batch-size", "20"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("files", [["evaluations.csv"], ["checkpoint.pt"], ["checkpoint.pt", "evaluations.csv"]])
def test_a_run_folder_in_use(work, monkeypatch, script, files):
    os.makedirs("runs/mine")
    for name in files:
        Path("runs/mine", name).touch()
    message = refused(monkeypatch, script, *small(script), "--run-dir", "runs/mine")
    assert "--run-dir runs/mine holds a run already" in message and "--resume" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_folder_of_another_process(work, monkeypatch, script):
    with lock_folder("runs/mine"):
        for flags in ([], ["--resume"]):
            message = refused(monkeypatch, script, *small(script), "--run-dir", "runs/mine", *flags)
            assert "--run-dir runs/mine is in use by another process" in message


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_run_folder_that_is_a_file(work, monkeypatch, script, flags):
    Path("mine").write_text("a file")
    for folder in ("mine", "mine/run"):
        message = refused(monkeypatch, script, *small(script), "--run-dir", folder, *flags)
        assert f"--run-dir {folder}" in message
    assert Path("mine").read_text() == "a file"


# ---- what cannot be continued


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_without_a_run_folder(work, monkeypatch, script):
    assert "--resume needs the --run-dir" in refused(monkeypatch, script, *small(script), "--resume")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_without_its_checkpoint(work, monkeypatch, script):
    os.makedirs("runs/mine")
    Path("runs/mine/evaluations.csv").touch()
    message = refused(monkeypatch, script, *small(script), "--run-dir", "runs/mine", "--resume")
    assert "--run-dir runs/mine holds a run without a checkpoint" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_that_is_none(work, monkeypatch, script):
    os.makedirs("runs/mine")
    flags = [*small(script), "--run-dir", "runs/mine", "--resume"]
    Path("runs/mine/checkpoint.pt").write_bytes(b"nothing of the kind")
    assert "runs/mine/checkpoint.pt is damaged" in refused(monkeypatch, script, *flags)
    shutil.copy("student/model.pt", "runs/mine/checkpoint.pt")
    assert "expected 'xtra-checkpoint-3'" in refused(monkeypatch, script, *flags)
    save_torch("runs/mine/checkpoint.pt", {"format": "xtra-checkpoint-3", "args": {"seed": 1}})
    assert "expected a run of this script" in refused(monkeypatch, script, *flags)


# ---- a machine that is too small


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_the_memory_does_not_suffice_for(work, monkeypatch, script):
    monkeypatch.setattr("model.free_memory", lambda: 10**8)
    message = refused(monkeypatch, script, *small(script), "--run-dir", "runs/mine")
    assert "MB of RAM (100 free)" in message and "--batch-size" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_the_disk_does_not_suffice_for(work, monkeypatch, script):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**5))
    message = refused(monkeypatch, script, *small(script), "--run-dir", "runs/mine")
    assert "MB of disk for runs/mine (0 free)" in message and "another folder" in message


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--seed", "one"], ["--cuda", "False"]])
def test_a_flag_that_is_not_there(work, monkeypatch, capsys, script, flags):
    before = contents(Path.cwd())
    assert run(monkeypatch, script, *flags) == 2  # of tyro, which prints what it expected
    assert flags[-1] in capsys.readouterr().err
    assert contents(Path.cwd()) == before


# ---- the same from a shell


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("finetune.py", ["--env-id", "ALE/Pong-v5"], "--env-id PongNoFrameskip-v4"),
        ("pretrain_teacher.py", ["--datasets", "nowhere"], "nowhere/meta.json not found"),
    ],
)
def test_a_shell_sees_one_line_on_stderr_and_status_1(tmp_path, script, flags, words):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
