"""A run that is killed and resumed ends as if nothing had happened: real command lines, real signals.

`make test` kills each script a few times. `make faults` runs the long version: 20 random instants for each script on
the toy game and on Atari, and the soak. Both print what they survived with `pytest -s`.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model
from finetune import Args

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--channels 8 --blocks 1 --batch-size 8 --num-simulations 4 --unroll-steps 2 --eval-episodes 2 --eval-max-frames 80"
)
GAMES = {  # two sources and a target
    "toy": ["toy_env:Catch-v0", "toy_env:Catch-v1", "toy_env:Catch-v2"],
    "atari": ["PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4", "DemonAttackNoFrameskip-v4"],
}
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(folder, script, flags, run_dir, **options):
    """Starts a script in the background; its output goes to a file beside the run folder."""
    command = [sys.executable, str(ROOT / script), *flags.split(), "--run-dir", str(run_dir)]
    (folder / run_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder / run_dir}.out", "ab") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, **streams, **options)


def run(folder, script, flags, run_dir, **options):
    """Runs a script to its end -> exit status, all that its run folder's output file says."""
    status = start(folder, script, flags, run_dir, **options).wait()
    return status, Path(f"{folder / run_dir}.out").read_text()


def succeed(*arguments):
    status, output = run(*arguments)
    assert status == 0, output[-2000:]


def wait_for(condition, process):
    """Waits until a path exists, or a file contains a text: (path, text). The process must live."""
    path, text = condition if isinstance(condition, tuple) else (condition, "")
    while not (path.exists() and text.encode() in path.read_bytes()):
        assert process.poll() is None, f"status {process.poll()} before {condition}"
        time.sleep(0.02)


def kill_and_resume(folder, script, flags, run_dir, kills, seconds, seed):
    """Kills a run `kills` times at random instants after its imports, then lets it end -> how many of them it noticed.

    seconds: an uninterrupted run's; the kills together let it run for about as long.
    """
    rng, alive = random.Random(seed), 0
    for _ in range(kills):
        output = folder / f"{run_dir}.out"
        output.unlink(missing_ok=True)
        process = start(folder, script, f"{flags} --resume", run_dir)
        wait_for((output, "this run needs"), process)
        time.sleep(rng.uniform(0, 2 * seconds / kills))
        process.kill()
        alive += process.wait() == -signal.SIGKILL
    succeed(folder, script, f"{flags} --resume", run_dir)
    return alive


def scalars(run_dir):
    """Every TensorBoard scalar of a run but those that measure time: {key: [(step, value), ...]}."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    keys = set(events.Tags()["scalars"]) - {"charts/SPS", "charts/updates_per_second"}
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}


def assert_same(x, y, where):
    """Compares nested dicts, lists, tensors and plain values bit by bit."""
    assert type(x) is type(y), where
    if isinstance(x, dict):
        assert list(x) == list(y), where
        for key in x:
            assert_same(x[key], y[key], f"{where}/{key}")
    elif isinstance(x, list | tuple):
        assert len(x) == len(y), where
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(x, torch.Tensor):
        assert x.dtype == y.dtype and x.shape == y.shape, where
        assert x.contiguous().numpy().tobytes() == y.contiguous().numpy().tobytes(), where
    else:
        assert x == y, where


def assert_same_run(expected, found):
    """Weights, optimizer, generators, replay, eta, action log; model.pt, evaluations.csv, targets, every scalar."""
    for name in ("checkpoint.pt", "model.pt"):
        pair = [torch.load(folder / name, weights_only=True) for folder in (expected, found)]
        for content in pair:
            for own in ("run_dir", "resume", "save_dataset"):
                content["args"].pop(own, None)
            content.pop("events", None)  # names and sizes of TensorBoard's files: their content is compared below
        assert_same(*pair, name)
    for name in ("evaluations.csv", "targets.npz", "targets.json"):
        if name != "targets.json" or not (expected / name).exists():  # its model.pt holds the name of the run folder
            assert (expected / name).exists() == (found / name).exists()
        if (expected / name).exists() and name != "targets.json":
            assert (expected / name).read_bytes() == (found / name).read_bytes(), name
    assert scalars(expected) == scalars(found)
    assert not list(found.glob("*.tmp"))


def chain(folder, games, updates):
    """The flags of every stage on three games, from first to last: {run folder: (script, flags, dataset or None)}."""
    first, second, target = GAMES[games]
    offline = f"{TINY} --num-updates {updates} --eval-every 35 --checkpoint-every 7"
    online = f"{TINY} --num-envs 3 --eval-every 35 --checkpoint-every 7"
    scratch = f"{online} --total-timesteps {updates} --learning-starts 24"
    xtra = f"{online} --pretrained student --learning-starts 16 --total-timesteps {updates} --offline-batch-size 8"
    xtra += " --similarity-start 20 --similarity-interval 35 --similarity-updates 8 --similarity-threshold 0"
    return {
        "scratch0": ("finetune.py", f"{scratch} --env-id {first}", "data0"),
        "scratch1": ("finetune.py", f"{scratch} --env-id {second}", "data1"),
        "teacher0": ("pretrain_teacher.py", f"{offline} --datasets data0", None),
        "teacher1": ("pretrain_teacher.py", f"{offline} --datasets data1", None),
        "student": ("distill.py", f"{offline} --teachers teacher0 teacher1", None),
        "xtra": ("finetune.py", f"{xtra} --env-id {target}", None),
    }


def reference(folder, games, updates):
    """Runs the chain without an interruption -> {run folder: (script, flags, dataset, seconds)}."""
    stages = chain(folder, games, updates)

    def timed(name):
        script, flags, dataset = stages[name]
        process = start(folder, script, f"{flags} --save-dataset {dataset}" if dataset else flags, name)
        wait_for((folder / f"{name}.out", "this run needs"), process)
        begin = time.time()
        assert process.wait() == 0, (folder / f"{name}.out").read_text()[-2000:]
        return name, (*stages[name], time.time() - begin)

    with ThreadPoolExecutor(2) as pool:
        waves = ["scratch0", "scratch1"], ["teacher0", "teacher1"], ["student"], ["xtra"]
        return dict(result for wave in waves for result in pool.map(timed, wave))


def kill_every_stage(folder, stages, names, kills):
    """Kills each named stage `kills` times in a folder of its own and compares it with the run that was not killed."""

    def test(name):
        script, flags, dataset, seconds = stages[name]
        flags += f" --save-dataset killed-{dataset}" if dataset else ""
        alive = kill_and_resume(folder, script, flags, f"killed-{name}", kills, seconds, seed=name)
        assert_same_run(folder / name, folder / f"killed-{name}")
        for file in ("frames", "steps.npz") if dataset else ():
            assert (folder / dataset / file).read_bytes() == (folder / f"killed-{dataset}" / file).read_bytes()
        print(f"{flags.split()[-1] if 'env-id' in flags else name}: {script} killed {alive} times, ended the same")
        return alive

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(test, names))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, reference(folder, "toy", 120)


def test_killed_runs_end_as_if_they_had_not_been_killed(toy):
    folder, stages = toy
    assert kill_every_stage(folder, stages, ["scratch0", "teacher0", "student", "xtra"], kills=2) >= 4


# --- signals, the lock, full disks, bad numbers ---
def in_training(toy, name, run_dir):
    """Starts a stage of the toy chain again and waits for its first checkpoint -> process, output file."""
    folder, stages = toy
    script, flags, *_ = stages[name]
    output = folder / f"{run_dir}.out"
    output.unlink(missing_ok=True)
    process = start(folder, script, f"{flags} --resume", run_dir)
    wait_for(folder / run_dir / "checkpoint.pt", process)
    return process, output


LONG = pytest.mark.faults  # only in `make faults`


@pytest.mark.parametrize("name", ["xtra", pytest.param("teacher0", marks=LONG), pytest.param("student", marks=LONG)])
def test_a_signal_stops_the_run_with_status_75_and_nothing_is_lost(toy, name):
    folder, stages = toy
    script, flags, *_ = stages[name]
    run_dir, output, csv = f"stopped-{name}", folder / f"stopped-{name}.out", folder / f"stopped-{name}/evaluations.csv"
    moments = [  # between two evaluations, and while the checkpoint is being restored
        (signal.SIGTERM, (csv, ",35,0,")),
        (signal.SIGUSR1, (csv, ",105,0,")),
        (signal.SIGINT, (output, "this run needs")),
    ]
    for number, moment in moments:
        output.unlink(missing_ok=True)
        process = start(folder, script, f"{flags} --resume", run_dir)
        wait_for(moment, process)
        process.send_signal(number)
        assert process.wait() == 75
        last = output.read_text().splitlines()[-1]
        assert last.startswith(f"{run_dir}: stopped at update ")
        assert last.endswith(f"by {number.name}. Next: the same command with --resume")
        whole = csv.read_text()
        csv.write_text(whole[:-5])  # a torn last line
    process = start(folder, script, f"{flags} --resume", run_dir)
    wait_for((csv, whole), process)  # repaired at once
    process.kill()
    process.wait()
    succeed(folder, script, f"{flags} --resume", run_dir)
    assert_same_run(folder / name, folder / run_dir)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    flags = "--channels 64 --blocks 4 --batch-size 32 --num-simulations 50 --eval-episodes 1 --eval-max-frames 4"
    flags += " --env-id toy_env:Catch-v0 --total-timesteps 40 --learning-starts 32"  # an update takes seconds
    process = start(tmp_path, "finetune.py", flags, "run")
    wait_for(tmp_path / "run" / "model.pt", process)  # the first update comes next
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    assert "stopped" not in (tmp_path / "run.out").read_text()


def test_two_processes_on_one_run_folder(toy):
    folder, stages = toy
    script, flags, *_ = stages["student"]
    process, _ = in_training(toy, "student", "shared")
    process.send_signal(signal.SIGSTOP)  # so that it cannot end before the second one has started
    (folder / "shared.out").unlink()
    status, output = run(folder, script, f"{flags} --resume", "shared")
    process.send_signal(signal.SIGCONT)
    assert status == 1 and output.splitlines()[-1].startswith("error: --run-dir shared is in use by another process")
    assert process.wait() == 0
    assert_same_run(folder / "student", folder / "shared")


def limit(process, size):
    """From now on no file of the process can grow beyond `size` bytes, as if the disk were full; -1 lifts it."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_stops_nothing_that_can_wait(toy):
    folder, _ = toy
    process, output = in_training(toy, "scratch0", "full")
    before = (folder / "full" / "checkpoint.pt").stat().st_size
    limit(process, before // 2)  # less than a checkpoint, more than TensorBoard's file
    wait_for((output, "warning: full/checkpoint.pt could not be written (File too large)"), process)
    limit(process, resource.RLIM_INFINITY)
    assert process.wait() == 0
    assert_same_run(folder / "scratch0", folder / "full")


def test_a_full_disk_keeps_the_scalars_until_there_is_space(toy):
    folder, _ = toy
    process, output = in_training(toy, "scratch0", "fuller")
    limit(process, 4000)  # less than TensorBoard's file
    wait_for((output, "warning: fuller: TensorBoard's file could not be written (File too large)"), process)
    limit(process, resource.RLIM_INFINITY)
    assert process.wait() == 0 and "Traceback" not in output.read_text()
    assert_same_run(folder / "scratch0", folder / "fuller")


@LONG
def test_a_full_disk_at_the_end_says_what_is_missing(toy, tmp_path):
    folder, stages = toy
    script, flags, *_ = stages["teacher0"]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

    status, output = run(folder, script, f"{flags} --resume", "fullest", preexec_fn=small_files)
    assert status == 1 and "error: fullest/checkpoint.pt could not be written (File too large)" in output
    assert not list((folder / "fullest").glob("*.tmp"))
    succeed(folder, script, f"{flags} --resume", "fullest")
    assert_same_run(folder / "teacher0", folder / "fullest")


@pytest.mark.parametrize("name", ["xtra", pytest.param("teacher0", marks=LONG), pytest.param("student", marks=LONG)])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_are_touched(toy, name):
    folder, stages = toy
    script, flags, *_ = stages[name]
    status, output = run(folder, script, f"{flags} --learning-rate 1e25", f"diverged-{name}")
    assert status == 1 and "Traceback" not in output
    assert " is not finite at update " in output.splitlines()[-1] and "not_finite.pt" in output.splitlines()[-1]
    checkpoint = torch.load(folder / f"diverged-{name}" / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in checkpoint["states"]["net"].values())
    batch = torch.load(folder / f"diverged-{name}" / "not_finite.pt", weights_only=True)
    assert batch["update"] > 0 and batch["what"] in output and ("batch" in batch or "obs" in batch)


def test_what_may_not_change_between_a_run_and_its_resumption(toy):
    folder, stages = toy
    for name, change, words in (
        ("student", "--seed 2", "error: --seed is 2, but changed-student/checkpoint.pt has 1; give the flags"),
        ("teacher0", "--datasets data1", "error: changed-teacher0/checkpoint.pt does not fit this run"),
    ):
        script, flags, *_ = stages[name]
        os.makedirs(folder / f"changed-{name}")
        os.link(folder / name / "checkpoint.pt", folder / f"changed-{name}" / "checkpoint.pt")
        status, output = run(folder, script, f"{flags} {change} --resume", f"changed-{name}")
        assert status == 1 and output.splitlines()[-1].startswith(words)


@LONG
def test_a_process_that_was_overtaken_while_it_loaded_its_data(toy):
    """It has looked for a checkpoint, found none, and meanwhile another process has run from start to end."""
    folder, stages = toy
    script, flags, *_ = stages["student"]
    slow = start(folder, script, f"{flags} --resume", "overtaken")
    wait_for((folder / "overtaken.out", "this run needs"), slow)
    slow.send_signal(signal.SIGSTOP)
    (folder / "overtaken.out").rename(folder / "slow.out")
    assert run(folder, script, f"{flags} --resume", "overtaken")[0] == 0
    slow.send_signal(signal.SIGCONT)
    assert slow.wait() == 1
    expected = "error: --run-dir overtaken: another process has gone on with this run; start again"
    assert (folder / "slow.out").read_text().splitlines()[-1] == expected
    assert_same_run(folder / "student", folder / "overtaken")


def test_a_game_that_does_not_replay_is_an_error(toy):
    """As with another version of ale-py: the checkpoint's checksum is of other frames."""
    folder, stages = toy
    script, flags, *_ = stages["scratch0"]
    os.makedirs(folder / "other")
    content = torch.load(folder / "scratch0" / "checkpoint.pt", weights_only=True)
    content["values"]["checksum"] = "0" * 64
    content["events"] = {}
    model.save_torch(f"{folder}/other/checkpoint.pt", content)
    status, output = run(folder, script, f"{flags} --resume", "other")
    assert status == 1 and "error: the games differ from those of the checkpoint (ale-py is " in output


def test_what_cannot_fit_is_refused_at_once(tmp_path):
    status, output = run(tmp_path, "finetune.py", "--env-id toy_env:Catch-v0 --total-timesteps 2000000000", "run")
    assert status == 1 and not (tmp_path / "run").exists()
    assert "MB of RAM (" in output.splitlines()[-1] and "lower --batch-size" in output.splitlines()[-1]


# --- the long versions: make faults ---
@pytest.mark.faults
@pytest.mark.parametrize("games", ["toy", "atari"])
def test_twenty_kills_of_every_script(tmp_path, games):
    stages = reference(tmp_path, games, 240)
    killed = kill_every_stage(tmp_path, stages, ["scratch0", "teacher0", "student", "xtra"], kills=20)
    print(f"{games}: {killed} kills survived")
    assert killed >= 60


@pytest.mark.faults
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_checkpoint_of_a_full_run_is_the_networks_and_a_few_megabytes(tmp_path, blocks):
    """After 100,000 steps at full width; prints its size and how long training waits for it."""
    net = model.EfficientZeroNet(model.ModelConfig.of_width(64, blocks))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = {f"copy{i}": model.inference_copy(net) for i in range(3)} | {"net": net, "optimizer": optimizer}
    networks = sum(x.nbytes for part in [net, net, *list(parts.values())[:3]] for x in part.state_dict().values())
    arrays = {"policy": np.zeros((100_000, 18), np.float32), "value": np.zeros(100_000, np.float32)}
    versions = {"policy_version": np.zeros(100_000, np.int64), "value_version": np.zeros(100_000, np.int64)}
    replay = SimpleNamespace(size=100_000, priority=np.ones(100_000), **arrays, **versions)
    actions = {"actions": torch.zeros(12_500, 8, dtype=torch.uint8)}
    for version, name, most in ((1, "every 200 updates", 3e6), (0, "with all targets fresh", 12e6)):
        seconds = []
        for _ in range(5):
            begin = time.time()
            model.save_checkpoint(str(tmp_path), model.Log(None), Args(), [], parts, [replay], version, actions)
            seconds.append(time.time() - begin)
        size = (tmp_path / "checkpoint.pt").stat().st_size
        print(f"blocks {blocks}, {name}: {size / 1e6:.0f} MB, {sorted(seconds)[2]:.2f} s")
        assert size < networks + most


@pytest.mark.faults
def test_memory_stays_where_it_is(tmp_path):
    """Half an hour of finetuning with four offline tasks."""
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    flags = f"{TINY} --num-envs 3 --learning-starts 24"
    for i, game in enumerate(["Catch-v0", "Catch-v1", "Catch-v3", "Catch-v0"]):
        scratch = f"{flags} --env-id toy_env:{game} --seed {i} --total-timesteps 100 --save-dataset data{i}"
        succeed(tmp_path, "finetune.py", scratch, f"scratch{i}")
        succeed(tmp_path, "pretrain_teacher.py", f"{TINY} --datasets data{i} --num-updates 20", f"teacher{i}")
    succeed(
        tmp_path, "distill.py", f"{TINY} --teachers teacher0 teacher1 teacher2 teacher3 --num-updates 20", "student"
    )
    flags += " --env-id toy_env:Catch-v2 --pretrained student --total-timesteps 60000 --offline-batch-size 8"
    flags += " --checkpoint-every 200 --eval-every 400 --similarity-start 0 --similarity-interval 100"
    process = start(tmp_path, "finetune.py", f"{flags} --similarity-updates 10", "run")
    memory, begin = [], time.time()
    while time.time() < begin + 60 * minutes:
        time.sleep(10)
        assert process.poll() is None, (tmp_path / "run.out").read_text()[-2000:]
        memory.append((time.time() - begin, psutil.Process(process.pid).memory_info().rss / 1e6))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    later = [megabytes for seconds, megabytes in memory if seconds > 180]
    print(f"{minutes:.0f} minutes: resident memory after 3 minutes {min(later):.1f} to {max(later):.1f} MB")
    print((tmp_path / "run.out").read_text().splitlines()[-1])
    assert max(later) <= 1.02 * min(later)
