"""A run that dies, by whatever cause, ends as if nothing had happened when it is started again with --resume.

What is to be killed, and what it is compared with, are real command lines: in a process that ran other tests before,
sums may round differently. Runs that end with a message are made in this process, which spares the seconds of imports.
`make test` kills each script once or twice, `make faults` ten times, on the toy game and on Atari.
"""

import contextlib
import errno
import os
import pty
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model

ROOT = Path(__file__).resolve().parent.parent
TOY = ["toy_env:Catch-v0", "toy_env:Catch-v1", "toy_env:Catch-v2"]  # two sources and a target
ATARI = ["PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4", "DemonAttackNoFrameskip-v4"]
TINY = "--channels 2 --blocks 1 --batch-size 4 --num-simulations 2 --unroll-steps 2 --eval-episodes 2"
TINY += " --eval-max-frames 24 --eval-every 10 --checkpoint-every 3 --no-cuda --resume"


def with_flags(command, flags):
    """A command with other values of some flags, which no script takes twice."""
    for flag in re.findall(r"--([\w-]+)", flags):
        command = re.sub(rf"(^| )--{flag}(?![\w-])( (?!--)\S+)*", "", command)
    return f"{command} {flags}"


def chain(games, updates):
    """The command of every stage, from first to last: {run folder: command}."""
    online = f"finetune.py {TINY} --total-timesteps {updates} --num-envs 2 --learning-starts 12"
    offline = f"{TINY} --num-updates {updates} --cycle 2"
    commands = {
        "scratch": f"{online} --env-id {games[0]} --save-dataset scratch/data.npz",
        "scratch2": with_flags(
            online,
            f"--total-timesteps 48 --steps-per-update 2 --env-id {games[1]} --save-dataset scratch2/data.npz",
        ),
        "teacher": f"pretrain_teacher.py {offline} --datasets scratch/data.npz",
        "teacher2": with_flags(f"pretrain_teacher.py {offline}", "--num-updates 2 --datasets scratch2/data.npz"),
        "student": f"distill.py {offline} --teachers teacher teacher2",
        "xtra": f"{online} --env-id {games[2]} --pretrained student --offline-batch-size 4 --similarity-start 0"
        " --similarity-interval 8 --similarity-updates 3 --similarity-threshold 0",
    }
    return {name: f"{command} --run-dir {name}" for name, command in commands.items()}


COMMANDS = chain(TOY, 24)


def run(folder, command):
    """Runs a command to its end in this process -> None, or the line that it exits with."""
    handler = signal.getsignal(signal.SIGINT)  # the script has its own
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", shlex.split(command))
        try:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        finally:
            signal.signal(signal.SIGINT, handler)


def run_alone(folder, command):
    """Runs a command to its end in a process of its own -> the seconds of the processor that it took."""
    before = os.times().children_user
    done = subprocess.run(words(command), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return os.times().children_user - before


def words(command):
    script, *flags = shlex.split(command)
    return [sys.executable, f"{ROOT}/{Path(script).name}", *flags]


def environment():
    found = os.environ | {"OMP_NUM_THREADS": "1"}
    found["PYTHONPATH"] = f"{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}"
    found.pop("PYTHONUNBUFFERED", None)  # the scripts themselves see to it that each line comes at once
    return found


def kill(folder, name, command, number, seconds, file="checkpoint.pt"):
    """Starts a command, waits until it has written a file and then used the processor for some seconds more, and ends
    it by a signal -> its exit status, its output."""
    begin = time.time()
    with open(folder / "output", "w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words(command), cwd=folder, env=environment(), **streams)
    used = psutil.Process(process.pid).cpu_times
    while process.poll() is None and not any(x.stat().st_mtime > begin for x in (folder / name).glob(file)):
        time.sleep(0.01)
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        instant = used().user + seconds
        while process.poll() is None and used().user < instant:
            time.sleep(0.01)
    process.send_signal(number)
    status, now = process.wait(), int(time.time())
    while int(time.time()) == now:  # TensorBoard names files by the second; a process alone takes longer to start
        time.sleep(0.01)
    return status, (folder / "output").read_text()


def reference(folder, commands):
    """Runs every stage without an interruption -> the seconds of the processor that each took."""
    return {name: run_alone(folder, command) for name, command in commands.items()}


def plain(x):
    """Content that `==` compares bit by bit."""
    if isinstance(x, dict | list | tuple):
        return {key: plain(value) for key, value in (x.items() if isinstance(x, dict) else enumerate(x))}
    return [str(x.dtype), *x.shape, hash(np.asarray(x).tobytes())] if hasattr(x, "dtype") else x


def left(folder):
    """What a run leaves: all files, and each scalar as TensorBoard reads it, but for those that measure time."""
    found = {}
    for path in folder.iterdir():
        if path.suffix in (".pt", ".npz"):
            content = model.load_file(str(path))
            content.pop("teacher_folders", None)  # absolute paths
            content.pop("origin", None)  # the command
            found[path.name] = plain(content)
        elif not path.name.startswith("events.") and path.name != "model.md":
            found[path.name] = path.read_bytes()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for key in set(events.Tags()["scalars"]) - {"charts/SPS", "charts/updates_per_second"}:
        found[key] = [(event.step, event.value) for event in events.Scalars(key)]
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, reference(folder, COMMANDS)


@pytest.fixture
def work(toy, tmp_path):
    """A copy of the finished runs, to be continued."""
    return shutil.copytree(toy[0], tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["scratch", "scratch2", "teacher", "student", "xtra"])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(toy, work, name):
    shutil.rmtree(work / name)
    instants = random.Random(name)
    for number in [signal.SIGKILL, signal.SIGTERM] if name == "scratch" else [signal.SIGKILL]:
        status, _ = kill(work, name, COMMANDS[name], number, instants.uniform(0, toy[1][name] / 6))
        assert status == -number
    run_alone(work, COMMANDS[name])
    assert left(work / name) == left(toy[0] / name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu_a_killed_run_ends_near_where_it_would_have(tmp_path):
    """Recorded anew after it was continued, from the momentum and the generator of the checkpoint."""
    command, folders = (
        COMMANDS["scratch"].replace("--no-cuda", "--no-compile"),
        [tmp_path / "whole", tmp_path / "killed"],
    )
    for folder in folders:
        folder.mkdir()
    assert kill(folders[1], "scratch", command, signal.SIGKILL, 0)[0] == -signal.SIGKILL
    for folder in folders:
        run_alone(folder, command)
    whole, killed = [left(folder / "scratch")["losses/loss"] for folder in folders]
    np.testing.assert_allclose(killed, whole, rtol=0.1)  # (update, loss) of each cycle


def test_ctrl_c_prints_the_command_that_goes_on(toy, work):
    shutil.rmtree(work / "xtra")
    status, output = kill(work, "xtra", COMMANDS["xtra"].replace(" --resume", ""), signal.SIGINT, 0)
    text, command = output.split("stopped. Go on with: ")
    assert status == 130 and text.startswith("device: ") and "Traceback" not in text and command.count("\n") == 1
    subprocess.run(command, shell=True, cwd=work, env=environment(), capture_output=True, check=True)
    assert left(work / "xtra") == left(toy[0] / "xtra")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("teacher", "--datasets scratch2/data.npz", "error: --datasets are not those"),
        ("student", "--teachers teacher2 teacher", "error: --teachers are not those"),
        ("xtra", "--teachers teacher2 teacher", "error: the offline games are not those of the checkpoint"),
        ("teacher", "--seed 2", "error: --seed is 2, but teacher/checkpoint.pt has 1; give the flags that it was"),
        ("student", "--gamma 0.5", "error: --gamma is 0.5, but student/checkpoint.pt has 0.988"),
        ("xtra", "--paper-loss", "error: --paper-loss is True, but xtra/checkpoint.pt has False"),
    ],
)
def test_what_may_not_change_between_a_run_and_its_resumption(work, name, change, words):
    assert run(work, with_flags(COMMANDS[name], change)).startswith(words)


def test_how_a_run_is_made_may_change_between_it_and_its_resumption(toy, work):
    assert run(work, with_flags(COMMANDS["student"], "--checkpoint-every 5 --exp-name other")) is None
    assert left(work / "student")["evaluations.csv"] == left(toy[0] / "student")["evaluations.csv"]


def test_a_run_folder_belongs_to_one_process(work):
    with filelock.FileLock(work / "student" / "lock"):
        assert "--run-dir student is in use by another process" in run(work, COMMANDS["student"])


@dataclass
class Flags:
    seed: int = 1
    resume: bool = True
    run_dir: str | None = "fork"


@dataclass
class ForkedFlags(Flags):
    coefficient: float = 0.5


@dataclass
class NeedsMore:
    seed: int
    resume: bool = True
    run_dir: str | None = "fork"


@pytest.mark.parametrize(
    "cls, words, network, error",
    [
        (ForkedFlags, "", {}, None),
        (ForkedFlags, "--coefficient 0.6", {}, "--coefficient is 0.6, but fork/checkpoint.pt has 0.5"),
        (NeedsMore, "--seed 1", {}, None),
        (ForkedFlags, "--seed 2 --coefficient 0.6", {}, "--seed is 2, but fork/checkpoint.pt has 1"),
        (Flags, "", {"activation": "GELU"}, "activation of the network is GELU, but fork/checkpoint.pt has ReLU"),
    ],
)
def test_a_fork_goes_on_with_a_run_that_did_what_it_does(tmp_path, monkeypatch, cls, words, network, error):
    monkeypatch.chdir(tmp_path)
    os.mkdir("fork")
    torch.save({"args": {"seed": 1, "resume": False}, "config": asdict(model.ModelConfig())}, "fork/checkpoint.pt")
    handler = signal.getsignal(signal.SIGINT)
    args = model.read_flags(cls, "", words.split())
    refused = pytest.raises(SystemExit, match=error) if error else contextlib.nullcontext()
    with refused:
        model.open_run(args, cls, model.ModelConfig(**network), "fork", {"resume", "run_dir"})
    signal.signal(signal.SIGINT, handler)


def test_a_checkpoint_from_before_it_had_a_config_goes_on(work):
    path = str(work / "student" / "checkpoint.pt")
    content = model.load_file(path)
    del content["config"]
    torch.save(content, path)
    assert run(work, COMMANDS["student"]) is None


def test_a_run_of_another_script_is_not_gone_on_with(work):
    command = COMMANDS["student"].replace("--run-dir student", "--run-dir teacher")
    assert "teacher/checkpoint.pt has --" in run(work, command)


def test_a_finished_run_can_be_asked_again_for_its_data(toy, work):
    again = with_flags(COMMANDS["scratch"], "--save-dataset again/data.npz")
    run_alone(work, again)
    run_alone(work, again)
    assert plain(model.load_file(f"{work}/again/data.npz")) == plain(model.load_file(f"{toy[0]}/scratch/data.npz"))
    for name in ("scratch2/data.npz", "alike.npz"):
        arrays = dict(np.load(work / "scratch" / "data.npz"))
        np.savez(work / "alike.npz", **arrays | {"env_id": "toy_env:Catch-v1"})  # of the same random actions
        shutil.copytree(work / "scratch", work / f"for {name}")  # this process keeps the locks that it has taken
        other = with_flags(COMMANDS["scratch"], f"--save-dataset {name} --run-dir 'for {name}'")
        assert f"--save-dataset {name} has other data" in run(work, other)


def test_a_dataset_that_is_there_is_refused_before_the_run_and_may_lie_in_its_folder(work):
    command = with_flags(COMMANDS["scratch"], "--run-dir new")
    assert "--save-dataset scratch/data.npz has other data" in run(work, command)
    assert run(work, with_flags(command, "--save-dataset new2/data/own.npz --run-dir new2")) is None
    assert (work / "new2/data/own.npz").exists()


def test_the_student_of_a_resumed_run_is_the_one_that_it_started_from(work):
    content = torch.load(work / "student" / "model.pt")
    next(iter(content["model"].values())).add_(1)
    (work / "other").mkdir()
    torch.save(content, work / "other" / "model.pt")
    shutil.move(work / "student", work / "moved")
    without = COMMANDS["xtra"].replace("--pretrained student", "--teachers teacher teacher2")
    wrong = [with_flags(COMMANDS["xtra"], "--pretrained other"), without]
    for command, folder in zip(wrong, ("xtra2", "xtra3"), strict=True):
        shutil.copytree(work / "xtra", work / folder)  # this process keeps the locks that it has taken
        said = run(work, with_flags(command, f"--run-dir {folder}"))
        assert said == "error: --pretrained is not the network that the run started from; give the same"
    assert run(work, with_flags(COMMANDS["xtra"], "--pretrained moved")) is None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_goes_on_where_nothing_can_be_locked(work, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    assert run(work, COMMANDS["student"]) is None
    assert f"warning: student cannot be locked ([Errno {number}]" in capsys.readouterr().out


def test_a_run_outlives_its_terminal(toy, tmp_path):
    master, terminal = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    command = words(COMMANDS["scratch"])
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), start_new_session=True, **streams)
    os.close(terminal)
    said = b""
    while b"run folder" not in said:
        said += os.read(master, 4096)
    os.close(master)
    assert process.wait() == 0
    assert left(tmp_path / "scratch") == left(toy[0] / "scratch")


def test_a_game_that_does_not_replay_is_an_error(work):
    path = str(work / "scratch" / "checkpoint.pt")
    torch.save(model.load_file(path) | {"checksum": "0" * 64}, path)  # as with another version of ale-py
    assert run(work, COMMANDS["scratch"]).startswith("error: the actions of the checkpoint lead to other")


@pytest.mark.parametrize("name", ["scratch", "teacher", "student"])
def test_numbers_that_are_not_finite_end_the_run_before_they_are_saved(work, name):
    length, cycle = ("total-timesteps", "num-envs") if name == "scratch" else ("num-updates", "cycle")
    flags = f"--learning-rate 1e25 --{length} 100 --{cycle} 1 --checkpoint-every 1 --run-dir new"
    flags += " --save-dataset new/data.npz" if name == "scratch" else ""
    refused = run(work, with_flags(COMMANDS[name], flags))
    assert refused.startswith("error: the loss is not finite at update 2; try a lower")
    checkpoint = model.load_file(str(work / "new" / "checkpoint.pt"))
    assert checkpoint["updates"] == 2 and all(x.isfinite().all() for x in checkpoint["net"].values())


@pytest.mark.faults
@pytest.mark.parametrize("games", [TOY, ATARI], ids=["toy", "atari"])
def test_ten_kills_of_every_script(tmp_path, games):
    commands = chain(games, 240)
    seconds = reference(tmp_path, commands)
    for name in ("scratch", "teacher", "student", "xtra"):
        (tmp_path / name).rename(tmp_path / "expected")
        instants, killed = random.Random(name), 0
        for _ in range(10):
            instant = instants.uniform(0, seconds[name] / 5)
            status, _ = kill(tmp_path, name, commands[name], signal.SIGKILL, instant, "events.*")
            killed += status == -signal.SIGKILL
        run_alone(tmp_path, commands[name])
        assert left(tmp_path / name) == left(tmp_path / "expected") and killed >= 5
        print(f"{games[2]}: {name} was killed {killed} times and ended the same")
        shutil.rmtree(tmp_path / "expected")


@pytest.mark.faults
def test_the_checkpoint_of_100000_steps_is_small_and_soon_resumed(tmp_path):
    """Prints how long it takes to resume, and at full width to write the checkpoint."""
    command = f"finetune.py {TINY} --env-id {ATARI[0]} --learning-starts 100000 --checkpoint-every 8 --run-dir run"
    path = tmp_path / "run" / "checkpoint.pt"
    for what in ("played and searched", "resumed"):
        begin = time.time()
        kill(tmp_path, "run", command, signal.SIGKILL, 0)
        print(f"{what} in {time.time() - begin:.0f} s, checkpoint of {path.stat().st_size / 1e6:.0f} MB")
    checkpoint = model.load_file(str(path))
    assert len(checkpoint["actions"]) == 12_500 and checkpoint["updates"] >= 16
    assert path.stat().st_size < 20e6
    net = model.EfficientZeroNet(model.ModelConfig.of_width(64, 4))
    checkpoint |= {name: net.state_dict() for name in ("net", "player", "target", "next_target")}
    begin = time.time()
    with model.whole_file(path) as file:
        torch.save(checkpoint | {"optimizer": [x.clone() for x in net.parameters()]}, file)
    print(f"at full width {path.stat().st_size / 1e6:.0f} MB, written in {time.time() - begin:.2f} s")
