"""A run that dies, by whatever cause, ends as if nothing had happened when it is started again with --resume.

What is to be killed is a real command line; other runs are made in this process, which spares the seconds of imports.
`make test` kills each script twice; `make faults` ten times, on the toy game and on Atari, and tries a full-size run.
"""

import fcntl
import gc
import hashlib
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
GAMES = {  # two sources and a target
    "toy": ["toy_env:Catch-v0", "toy_env:Catch-v1", "toy_env:Catch-v2"],
    "atari": ["PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4", "DemonAttackNoFrameskip-v4"],
}
TINY = (
    "--channels 2 --blocks 1 --batch-size 4 --num-simulations 2 --unroll-steps 2 --eval-episodes 2"
    " --eval-max-frames 40 --eval-every 20 --checkpoint-every 7 --no-cuda --resume"
)


def stages(games, updates):
    """Every stage on three games, from first to last: {run folder: (script, flags)}."""
    first, second, target = GAMES[games]
    scratch = f"{TINY} --total-timesteps {updates} --num-envs 3 --learning-starts 24"
    offline = f"{TINY} --num-updates {updates} --cycle 3"
    xtra = f"{scratch} --env-id {target} --pretrained student --offline-batch-size 4 --similarity-start 6"
    xtra += " --similarity-interval 12 --similarity-updates 4 --similarity-threshold 0"
    return {
        "scratch": ("finetune.py", f"{scratch} --env-id {first} --save-dataset scratch/data.npz"),
        "scratch2": ("finetune.py", f"{scratch} --env-id {second} --save-dataset scratch2/data.npz"),
        "teacher": ("pretrain_teacher.py", f"{offline} --datasets scratch/data.npz"),
        "teacher2": ("pretrain_teacher.py", f"{offline} --datasets scratch2/data.npz"),
        "student": ("distill.py", f"{offline} --teachers teacher teacher2"),
        "xtra": ("finetune.py", xtra),
    }


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


def start(folder, name, script, flags, condition):
    """Starts a script as a process, and waits until the condition holds -> process, the file of its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / script), *flags.split(), "--run-dir", name]
    with open(folder / f"{name}.out", "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    wait_for(process, condition)
    return process, folder / f"{name}.out"


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


def kill_and_resume(folder, name, script, flags, kills, seconds):
    """Kills a run `kills` times at random instants, then lets it end -> how many kills came before its end.

    seconds: of the processor, for an uninterrupted run; the kills together let it run for about as long.
    """
    rng, alive = random.Random(name), 0
    for _ in range(kills):
        started = lambda: "frames:" in (folder / f"{name}.out").read_text()  # noqa: E731
        process, _ = start(folder, name, script, flags, started)
        used = psutil.Process(process.pid).cpu_times
        instant = used().user + rng.uniform(0, 2 * seconds / kills)
        wait_for(process, lambda used=used, instant=instant: used().user > instant)
        alive += end(process, signal.SIGKILL) == -signal.SIGKILL
    assert run(folder, name, script, flags) is None
    return alive


def plain(x):
    """Content that `==` compares bit by bit."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    x = x.contiguous().numpy() if isinstance(x, torch.Tensor) else x
    return [x.dtype.str, x.shape, hashlib.sha256(x.tobytes()).hexdigest()] if isinstance(x, np.ndarray) else x


def left(run_dir):
    """What a run leaves: all files, and each scalar as TensorBoard reads it, but for those that measure time."""
    files = {path.name: path for path in sorted(run_dir.iterdir()) if not path.name.startswith("events.")}
    found = {name: plain(model.load_file(str(path))) for name, path in files.items() if path.suffix in (".pt", ".npz")}
    found |= {name: path.read_bytes() for name, path in files.items() if name not in found}
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    for key in set(events.Tags()["scalars"]) - {"charts/SPS", "charts/updates_per_second"}:
        found[key] = [(event.step, event.value) for event in events.Scalars(key)]
    return found


def reference(folder, games, updates):
    """Runs every stage without an interruption -> the seconds of the processor that each took."""
    seconds = {}
    for name, command in stages(games, updates).items():
        begin = time.process_time()
        assert run(folder, name, *command) is None
        seconds[name] = time.process_time() - begin
    return seconds


UPDATES = 48
STAGES = stages("toy", UPDATES)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, reference(folder, "toy", UPDATES)


@pytest.fixture
def work(toy, tmp_path):
    """A copy of the finished runs, to be continued."""
    return shutil.copytree(toy[0], tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["scratch", "teacher", "student", "xtra"])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(toy, work, name):
    shutil.rmtree(work / name)
    assert kill_and_resume(work, name, *STAGES[name], 2, toy[1][name]) >= 1
    assert left(work / name) == left(toy[0] / name)


def test_ctrl_c_prints_the_command_that_goes_on(toy, work):
    shutil.rmtree(work / "xtra")
    script, flags = STAGES["xtra"]
    flags = flags.replace(" --resume", "")
    process, output = start(work, "xtra", script, flags, (work / "xtra" / "checkpoint.pt").exists)
    assert end(process, signal.SIGINT) == 130
    text, command = output.read_text().split("stopped. Go on with: ")
    assert "Traceback" not in text and command.startswith("python ") and command.count("\n") == 1
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PATH": path}
    subprocess.run(command, shell=True, check=True, cwd=work, env=environment)
    assert left(work / "xtra") == left(toy[0] / "xtra")


def test_sigterm_ends_the_run_and_nothing_is_lost(toy, work):
    shutil.rmtree(work / "student")
    process, _ = start(work, "student", *STAGES["student"], (work / "student" / "checkpoint.pt").exists)
    assert end(process, signal.SIGTERM) == -signal.SIGTERM
    assert run(work, "student", *STAGES["student"]) is None
    assert left(work / "student") == left(toy[0] / "student")


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


def test_what_does_not_change_the_result_may_change(toy, work):
    script, flags = STAGES["student"]
    assert run(work, "student", script, f"{flags} --checkpoint-every 3 --exp-name new") is None
    assert left(work / "student")["evaluations.csv"] == left(toy[0] / "student")["evaluations.csv"]


def test_a_run_folder_belongs_to_one_process(work):
    with open(work / "student" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "--run-dir student: is in use by another process" in run(work, "student", *STAGES["student"])


def test_a_game_that_does_not_replay_is_an_error(work):
    path = str(work / "scratch" / "checkpoint.pt")
    torch.save(model.load_file(path) | {"checksum": "0" * 64}, path)  # as with another version of ale-py
    assert run(work, "scratch", *STAGES["scratch"]).startswith("error: the games differ from those of the checkpoint")


@pytest.mark.parametrize("name, cycle", [("scratch", "num-envs"), ("teacher", "cycle"), ("student", "cycle")])
def test_numbers_that_are_not_finite_end_the_run_before_they_are_saved(work, name, cycle):
    script, flags = STAGES[name]
    length = "total-timesteps" if name == "scratch" else "num-updates"
    flags += f" --learning-rate 1e25 --checkpoint-every 1 --{cycle} 1 --{length} 100"
    flags = flags.replace("--save-dataset scratch/data.npz", "")
    assert run(work, "new", script, flags).startswith("error: the loss is not finite after update 2; try a lower")
    checkpoint = model.load_file(str(work / "new" / "checkpoint.pt"))
    assert checkpoint["updates"] == 2 and all(x.isfinite().all() for x in checkpoint["net"].values())


@pytest.mark.faults
@pytest.mark.parametrize("games", GAMES)
def test_ten_kills_of_every_script(tmp_path, games):
    folder = tmp_path / "uninterrupted"
    folder.mkdir()
    seconds = reference(folder, games, 240)
    for name in ("scratch", "teacher", "student", "xtra"):
        work = shutil.copytree(folder, tmp_path / name, ignore=lambda _, names, name=name: {name} & {*names})
        alive = kill_and_resume(work, name, *stages(games, 240)[name], 10, seconds[name])
        print(f"{games}: {name} was killed {alive} times in {seconds[name]:.0f} s and ended the same")
        assert left(work / name) == left(folder / name) and alive >= 5


@pytest.mark.faults
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_checkpoint_of_a_full_size_run(tmp_path, blocks):
    """Networks at full width and all actions of 100,000 steps; prints its size, the time to write it and to resume."""
    flags = f"--env-id PhoenixNoFrameskip-v4 --blocks {blocks} --num-simulations 1 --batch-size 2 --unroll-steps 1"
    flags += " --learning-starts 8 --eval-episodes 1 --eval-max-frames 4 --checkpoint-every 8 --no-cuda --resume"
    path = tmp_path / "run" / "checkpoint.pt"
    process, _ = start(tmp_path, "run", "finetune.py", flags, path.exists)
    end(process, signal.SIGKILL)
    replay = finetune.Replay(100_008)
    play = finetune.start_games("PhoenixNoFrameskip-v4", replay, 12_501 * np.arange(8), seed=2000)
    actions = np.random.default_rng(0).integers(0, 18, (12_500, 8))
    for action in actions:
        finetune.play_step(play, replay, action, 0)
    checkpoint = model.load_file(str(path)) | {"actions": torch.from_numpy(actions), "updates": 100_000}
    checkpoint |= {"checksum": play.checksum.hexdigest()}
    begin = time.time()
    with model.whole_file(path) as file:
        torch.save(checkpoint, file)
    writing, size = time.time() - begin, path.stat().st_size
    begin = time.time()
    assert run(tmp_path, "run", "finetune.py", flags) is None
    print(f"blocks {blocks}: {size / 1e6:.0f} MB, written in {writing:.2f} s; resumed in {time.time() - begin:.0f} s")
    networks = ("net", "player", "target", "next_target")
    weights = sum(x.nbytes for name in networks for x in checkpoint[name].values())
    assert size < weights + sum(x.nbytes for x in checkpoint["net"].values()) + 13e6
