"""A run that dies, by whatever cause, ends as if nothing had happened when it is started again with --resume.

What is to be killed is a real command line; other runs are made in this process, which spares the seconds of imports.
`make test` kills each script twice; `make faults` ten times, on the toy game and on Atari, and tries a full-size run.
"""

import fcntl
import gc
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
import model

ROOT = Path(__file__).resolve().parent.parent
ATARI = "PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4", "DemonAttackNoFrameskip-v4"
TINY = "--channels 2 --blocks 1 --batch-size 4 --num-simulations 2 --unroll-steps 2 --eval-episodes 2"
TINY += " --eval-max-frames 24 --eval-every 10 --checkpoint-every 3 --no-cuda --resume"


def stages(games, updates):
    """Every stage on two sources and a target, from first to last: {run folder: (script, flags)}."""
    first, second, target = games
    offline = f"{TINY} --num-updates {updates} --cycle 2"
    online = f"{TINY} --total-timesteps {updates} --num-envs 2 --learning-starts 12"
    xtra = f"{online} --env-id {target} --pretrained student --offline-batch-size 4 --similarity-start 4"
    xtra += " --similarity-interval 8 --similarity-updates 3 --similarity-threshold 0"
    return {
        "scratch": ("finetune.py", f"{online} --env-id {first} --save-dataset scratch/data.npz"),
        "scratch2": ("finetune.py", f"{online} --env-id {second} --save-dataset scratch2/data.npz"),
        "teacher": ("pretrain_teacher.py", f"{offline} --datasets scratch/data.npz"),
        "teacher2": ("pretrain_teacher.py", f"{offline} --datasets scratch2/data.npz"),
        "student": ("distill.py", f"{offline} --teachers teacher teacher2"),
        "xtra": ("finetune.py", xtra),
    }


STAGES = stages(["toy_env:Catch-v0", "toy_env:Catch-v1", "toy_env:Catch-v2"], 24)


def run(folder, name, script, flags):
    """Runs a script to its end in this process, in the folder `name` -> None, or the line that it exits with."""
    gc.collect()  # frees the lock of an earlier run
    handler = signal.getsignal(signal.SIGINT)  # the script has its own
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *flags.split(), "--run-dir", name])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        finally:
            signal.signal(signal.SIGINT, handler)


def start(folder, name, script, flags):
    """Starts a script -> its process, and the file of its output."""
    output = folder / f"{name}.out"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / script), *flags.split(), "--run-dir", name]
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT), output


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.01)


def end(process, number):
    """Ends a process by a signal -> its exit status."""
    process.send_signal(number)
    status, now = process.wait(), int(time.time())
    while int(time.time()) == now:  # TensorBoard names files by the second; a process alone takes longer to start
        time.sleep(0.01)
    return status


def kill(folder, name, script, flags, number, seconds):
    """Starts a run and ends it by a signal when it has used the processor for some seconds -> its exit status."""
    process, output = start(folder, name, script, flags)
    used = psutil.Process(process.pid).cpu_times
    wait_for(process, lambda: "frames:" in output.read_text())  # the imports are over
    instant = used().user + seconds
    wait_for(process, lambda: used().user > instant)
    return end(process, number)


def reference(folder, commands):
    """Runs every stage without an interruption -> the seconds of the processor that each took."""
    seconds = {}
    for name, command in commands.items():
        begin = time.process_time()
        assert run(folder, name, *command) is None
        seconds[name] = time.process_time() - begin
    return seconds


def plain(x):
    """Content that `==` compares bit by bit."""
    if isinstance(x, dict | list | tuple):
        return {key: plain(value) for key, value in (x.items() if isinstance(x, dict) else enumerate(x))}
    return [str(x.dtype), *x.shape, hash(np.asarray(x).tobytes())] if hasattr(x, "dtype") else x


def left(folder):
    """What a run leaves: all files, and each scalar as TensorBoard reads it, but for those that measure time."""
    files = {path.name: path for path in folder.iterdir() if not path.name.startswith("events.")}
    found = {
        name: plain(model.load_file(str(path))) if path.suffix in (".pt", ".npz") else path.read_bytes()
        for name, path in files.items()
    }
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for key in set(events.Tags()["scalars"]) - {"charts/SPS", "charts/updates_per_second"}:
        found[key] = [(event.step, event.value) for event in events.Scalars(key)]
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, reference(folder, STAGES)


@pytest.fixture
def work(toy, tmp_path):
    """A copy of the finished runs, to be continued."""
    return shutil.copytree(toy[0], tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["scratch", "teacher", "student", "xtra"])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(toy, work, name):
    shutil.rmtree(work / name)
    instants = random.Random(name)
    for number in (signal.SIGKILL, signal.SIGTERM):
        seconds = instants.uniform(0.1, 0.5) * toy[1][name]
        assert kill(work, name, *STAGES[name], number, seconds) == -number
    assert run(work, name, *STAGES[name]) is None
    assert left(work / name) == left(toy[0] / name)


def test_ctrl_c_prints_the_command_that_goes_on(toy, work):
    shutil.rmtree(work / "xtra")
    script, flags = STAGES["xtra"]
    process, output = start(work, "xtra", script, flags.replace(" --resume", ""))
    wait_for(process, (work / "xtra" / "checkpoint.pt").exists)
    assert end(process, signal.SIGINT) == 130
    text, command = output.read_text().split("stopped. Go on with: ")
    assert "Traceback" not in text and command.startswith("python ") and command.count("\n") == 1
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PATH": path}
    subprocess.run(command, shell=True, check=True, cwd=work, env=environment)
    assert left(work / "xtra") == left(toy[0] / "xtra")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("teacher", "--datasets scratch2/data.npz", "error: --datasets are not those"),
        ("student", "--teachers teacher2 teacher", "error: --teachers are not those"),
        ("xtra", "--teachers teacher2 teacher", "error: --teachers are not those"),
        ("teacher", "--seed 2", "error: --seed is 2, but teacher/checkpoint.pt has 1; give the flags that it was"),
        ("student", "--gamma 0.5", "error: --gamma is 0.5, but student/checkpoint.pt has 0.988"),
        ("xtra", "--paper-loss", "error: --paper-loss is True, but xtra/checkpoint.pt has False"),
    ],
)
def test_what_may_not_change_between_a_run_and_its_resumption(work, name, change, words):
    script, flags = STAGES[name]
    assert run(work, name, script, f"{flags} {change}").startswith(words)


def test_how_a_run_is_made_may_change_between_it_and_its_resumption(toy, work):
    script, flags = STAGES["student"]
    assert run(work, "student", script, f"{flags} --checkpoint-every 5 --exp-name other") is None
    assert left(work / "student")["evaluations.csv"] == left(toy[0] / "student")["evaluations.csv"]


def test_a_run_folder_belongs_to_one_process(work):
    with open(work / "student" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "--run-dir student: is in use by another process" in run(work, "student", *STAGES["student"])


def test_a_game_that_does_not_replay_is_an_error(work):
    path = str(work / "scratch" / "checkpoint.pt")
    torch.save(model.load_file(path) | {"checksum": "0" * 64}, path)  # as with another version of ale-py
    assert run(work, "scratch", *STAGES["scratch"]).startswith("error: the games differ from those of the checkpoint")


@pytest.mark.parametrize("name", ["scratch", "teacher", "student"])
def test_numbers_that_are_not_finite_end_the_run_before_they_are_saved(work, name):
    script, flags = STAGES[name]
    length, cycle = ("total-timesteps", "num-envs") if name == "scratch" else ("num-updates", "cycle")
    flags += f" --learning-rate 1e25 --checkpoint-every 1 --{cycle} 1 --{length} 100"  # the rate is 0 at update 0
    assert run(work, "new", script, flags).startswith("error: the loss is not finite after update 2; try a lower")
    checkpoint = model.load_file(str(work / "new" / "checkpoint.pt"))
    assert checkpoint["updates"] == 2 and all(x.isfinite().all() for x in checkpoint["net"].values())


@pytest.mark.faults
@pytest.mark.parametrize("games", [["toy_env:Catch-v0", "toy_env:Catch-v1", "toy_env:Catch-v2"], ATARI], ids=str)
def test_ten_kills_of_every_script(tmp_path, games):
    commands = stages(games, 240)
    seconds = reference(tmp_path, commands)
    for name in ("scratch", "teacher", "student", "xtra"):
        (tmp_path / name).rename(tmp_path / "expected")
        instants, killed = random.Random(name), 0
        for _ in range(10):
            instant = instants.uniform(0, seconds[name] / 5)
            killed += kill(tmp_path, name, *commands[name], signal.SIGKILL, instant) == -signal.SIGKILL
        assert run(tmp_path, name, *commands[name]) is None
        print(f"{name}: killed {killed} times within {seconds[name]:.0f} s, ended the same")
        assert left(tmp_path / name) == left(tmp_path / "expected") and killed >= 5
        shutil.rmtree(tmp_path / "expected")


@pytest.mark.faults
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_checkpoint_of_a_full_size_run(tmp_path, blocks):
    """Networks of full width and 100,000 steps; prints its size, and the seconds to write it and to resume."""
    flags = f"--env-id {ATARI[0]} --blocks {blocks} --num-simulations 1 --batch-size 2 --unroll-steps 1 --no-cuda"
    flags += " --learning-starts 8 --eval-episodes 1 --eval-max-frames 4 --checkpoint-every 8 --resume"
    path = tmp_path / "run" / "checkpoint.pt"
    process, _ = start(tmp_path, "run", "finetune.py", flags)
    wait_for(process, path.exists)
    end(process, signal.SIGKILL)
    actions = np.random.default_rng(0).integers(0, 18, (12_500, 8))
    play = finetune.start_games(ATARI[0], replay := finetune.Replay(100_008), 12_501 * np.arange(8), seed=2000)
    for action in actions:
        finetune.play_step(play, replay, action, 0)
    checkpoint = model.load_file(str(path)) | {"actions": torch.from_numpy(actions), "updates": 100_000}
    checkpoint["checksum"] = play.checksum.hexdigest()
    begin = time.time()
    with model.whole_file(path) as file:
        torch.save(checkpoint, file)
    written = time.time()
    assert run(tmp_path, "run", "finetune.py", flags) is None
    size, writing, resuming = path.stat().st_size / 1e6, written - begin, time.time() - written
    print(f"blocks {blocks}: {size:.0f} MB, written in {writing:.2f} s, resumed in {resuming:.0f} s")
    networks = ("net", "net", "player", "target", "next_target")  # the optimizer has as much as the network
    assert size < 13 + sum(x.nbytes / 1e6 for name in networks for x in checkpoint[name].values())
