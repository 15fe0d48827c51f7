"""The three scripts chained through their command lines, for a few dozen updates each: on Atari, and on a recording."""

import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import recording
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import with_flags

import model
from finetune import GAME_OVER, LIFE_LOST, TIME_LIMIT, Replay, save_dataset, short_name, unpack_dataset

ROOT = Path(__file__).resolve().parent.parent
TINY = "--channels 8 --blocks 1 --batch-size 8 --num-simulations 4 --unroll-steps 2 --eval-episodes 2"
SOURCES, TARGET = ["PhoenixNoFrameskip-v4", "toy_env:Catch-v0"], "DemonAttackNoFrameskip-v4"
TEACH = "pretrain_teacher.py --num-updates 16 --datasets"
DISTILL = "distill.py --num-updates 16 --teachers"
FINETUNE = "finetune.py --num-envs 4 --learning-starts 16 --offline-batch-size 8 --env-id"
XTRA = f"{FINETUNE} {TARGET} --pretrained student --total-timesteps"
MEASURE = "--similarity-start 8 --similarity-interval 10 --similarity-updates 4 --similarity-threshold 0"
RUNS = {  # run folder: script and flags
    "scratch": f"finetune.py --env-id {SOURCES[0]} --total-timesteps 48 --learning-starts 24 --save-dataset played.npz",
    "teacher0": f"{TEACH} played.npz",
    "teacher1": f"{TEACH} recorded.npz",
    "both": f"{TEACH} played.npz recorded.npz",
    "student": f"{DISTILL} teacher0 teacher1",
    "xtra": f"{XTRA} 40 --eval-every 20 {MEASURE}",
    "again": f"{XTRA} 40 --eval-every 20 {MEASURE}",
    "zero-shot": f"{XTRA} 0",
    "h": f"{XTRA} 0 --transfer h",
    "no-cross-task": f"{XTRA} 16 --no-cross-task",
    "frozen": f"{XTRA} 16 --extra-updates 4 --freeze-representation --no-task-weights --paper-loss --capture-video",
    "cloned": f"{DISTILL} teacher0 teacher1 --policy-target actions",
    "cloned-zero-shot": f"{FINETUNE} {TARGET} --pretrained cloned --total-timesteps 0 --num-simulations 0",
    "student-of-one": f"{DISTILL} teacher1",
    "catch": f"{FINETUNE} toy_env:Catch-v2 --pretrained student-of-one --total-timesteps 32 --steps-per-update 2",
}


def words_of(command, run_dir):
    script, flags = command.split(" ", 1)
    return f"{ROOT}/{script} {with_flags(f'{TINY} --eval-max-frames 80', flags)} --run-dir {run_dir}".split()


def run(folder, command, run_dir):  # on one thread -> the lines it says
    words = words_of(command, run_dir)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}"
    environment["TQDM_DISABLE"] = "1"  # no number comes from a bar
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def run_here(folder, command, run_dir):  # in this process, which spares the seconds of imports
    handler = signal.getsignal(signal.SIGINT)  # the script has its own
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words_of(command, run_dir))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            signal.signal(signal.SIGINT, handler)
    return said.getvalue().splitlines()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):  # the folder in which all RUNS ran, and what each said
    folder = tmp_path_factory.mktemp("chain")
    record(catch_below_the_block(games=4), f"{folder}/recorded.npz", "toy_env:Catch-v0")
    said = {}
    for run_dir, command in RUNS.items():  # what is compared bit by bit is in both cases a process of its own
        start = run if run_dir in ("scratch", "teacher0", "student", "xtra", "again") else run_here
        said[run_dir] = start(folder, command, run_dir)
    return folder, said


def scalars(run_dir, key):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def evaluations(run_dir):  # [env_steps, updates, episode, length] of each game
    return np.loadtxt(run_dir / "evaluations.csv", int, delimiter=",", skiprows=1, usecols=(0, 1, 2, 4)).tolist()


def changed(run_dir, other_dir):  # networks whose weights or statistics differ
    one, other = (model.load_model(f"{folder}/model.pt")[0].state_dict() for folder in (run_dir, other_dir))
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


def assert_same(run_dir, other_dir):
    assert changed(run_dir, other_dir) == set()
    assert (run_dir / "evaluations.csv").read_text() == (other_dir / "evaluations.csv").read_text()
    assert scalars(run_dir, "losses/loss") == scalars(other_dir, "losses/loss") != []


def test_a_script_says_why_it_uses_the_cpu_and_at_last_its_folder_and_the_next_command(chain):
    reason = "this PyTorch is built for CPUs" if torch.version.cuda is None else "no NVIDIA GPU or no driver for it"
    for run_dir, lines in chain[1].items():
        assert f"device: CPU, float32; nothing is compiled or recorded ({reason})" in lines
        args = model.load_model(f"{chain[0]}/{run_dir}/model.pt")[1]["args"]
        assert not args["cuda"] and not args["compile"] and not args["cudagraphs"]  # what is in use
    assert chain[1]["teacher1"][-1].endswith("distill.py --teachers teacher1 OTHER_TEACHERS...")
    assert chain[1]["student"][-1].endswith("finetune.py --pretrained student --env-id NEW_GAME")


def test_a_run_folder_holds_the_files_of_its_run(chain):
    for run_dir, command in RUNS.items():
        names = {path.name for path in (chain[0] / run_dir).iterdir() if "tfevents" not in path.name}
        updates = sum(map(int, re.findall(r"--(?:num-updates|total-timesteps|extra-updates) (\d+)", command)))
        updates //= 2 if "--steps-per-update 2" in command else 1
        files = {"evaluations.csv", "lock", "model.md", "model.pt"} | ({"checkpoint.pt"} if updates else set())
        files |= {"targets.npz"} if run_dir in ("teacher0", "teacher1") else set()
        files |= {"video-0.gif", "video-20.gif"} if run_dir == "frozen" else set()
        assert names == files, run_dir
        assert all(model.load_file(f"{chain[0]}/{run_dir}/{n}")["updates"] == updates for n in files if ".pt" in n)


def test_a_finished_run_that_is_started_again_is_as_it_was(chain, tmp_path):
    folder = shutil.copytree(chain[0], tmp_path / "copy")  # as a cluster does that restarts a job
    for run_dir in ("scratch", "teacher0", "student"):
        assert run(folder, f"{RUNS[run_dir]} --resume", run_dir)[-1] == chain[1][run_dir][-1]
        assert_same(folder / run_dir, chain[0] / run_dir)
    one, other = (model.load_file(f"{x}/teacher0/targets.npz") for x in (folder, chain[0]))
    assert all((one[name] == other[name]).all() for name in one)


def test_the_same_seed_gives_the_same_run(chain):
    assert_same(chain[0] / "xtra", chain[0] / "again")


def test_what_a_gpu_does_otherwise_changes_no_bit_of_a_run(chain, tmp_path, monkeypatch):
    """Updates that are recorded, on a stand-in, and steps that are played while the updates before them are pending."""
    recording.patch(monkeypatch)
    source = (ROOT / "finetune.py").read_text()
    for line, forced in {
        "    args.selfplay_stream = args.selfplay_stream and args.cuda\n": "",
        "    if args.cudagraphs:\n": "    if True:\n",
        "    log_every = max(1, min(100, online_updates // 100))": "    log_every = 20",  # what is logged is waited for
    }.items():
        assert source.count(line) == 1
        source = source.replace(line, forced)
    (tmp_path / "finetune.py").write_text(source)
    folder = shutil.copytree(chain[0], tmp_path / "copy")
    waits = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: SimpleNamespace(wait_stream=waits.append))
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    run_here(folder, f"{RUNS['xtra']}", "forced")
    assert changed(folder / "forced", folder / "xtra") == set()
    assert (folder / "forced/evaluations.csv").read_text() == (folder / "xtra/evaluations.csv").read_text()
    assert len(waits) == 2 + 4  # of two ordinary updates, and of the cycles at 0, 4, 20 and 24 of 10


def test_evaluations_are_at_the_right_steps(chain):
    assert evaluations(chain[0] / "xtra") == [[n, n, game, 20] for n in (0, 20, 40) for game in (0, 1)]  # 80 frames
    student = [[0, n, game, length] for n in (0, 16) for length in (20, 16) for game in (0, 1)]  # Catch ends by itself
    assert evaluations(chain[0] / "student") == student and evaluations(chain[0] / "frozen")[-1] == [16, 20, 1, 20]
    assert [n for n, *_ in evaluations(chain[0] / "catch")] == [0, 0, 32, 32]  # two steps for each of 16 updates


def test_eta_is_the_share_of_similar_gradients_in_the_last_measurement(chain):
    for game in map(short_name, SOURCES):
        cosines = dict(scalars(chain[0] / "xtra", f"transfer/grad_cosine/{game}"))
        assert list(cosines) == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]
        first, second, third = (np.array(list(cosines.values())).reshape(3, 4) > 0).mean(axis=1)
        expected = [1, 1, 1, first, first, first, second, second, third, third]  # by cycle; new from 14, 24, 34 on
        assert [eta for _, eta in scalars(chain[0] / "xtra", f"transfer/task_weight/{game}")] == expected


def test_the_papers_other_runs_change_their_networks_and_use_their_games(chain):
    rest = {"dynamics", "prediction", "projector", "predictor"}
    expected = {"zero-shot": set(), "h": rest, "frozen": rest, "no-cross-task": rest | {"representation"}}
    for run_dir, networks in expected.items():
        assert changed(chain[0] / run_dir, chain[0] / "student") == networks, run_dir
        games = model.load_model(f"{chain[0]}/{run_dir}/model.pt")[1]["env_ids"]
        assert games == ([TARGET, *SOURCES] if run_dir == "frozen" else [TARGET])
    assert changed(chain[0] / "cloned-zero-shot", chain[0] / "cloned") == set()


def record(steps, path, env_id):
    """Saves steps as a dataset: a frame [96, 96, 3], the ALE action taken there, and what that led to."""
    steps = list(steps)
    replay, row = Replay(2 * len(steps)), 0
    for frame, action, reward, terminated, truncated, life_lost in steps:
        replay.frames[row] = torch.as_tensor(frame).permute(2, 0, 1)
        replay.action[row], replay.reward[row], replay.acted[row] = action, reward, True
        replay.end[row] = TIME_LIMIT if truncated else GAME_OVER if terminated else LIFE_LOST if life_lost else 0
        row += 1
        if terminated or truncated:
            replay.frames[row] = replay.frames[row - 1]  # nobody acts on a game's last frame
            row += 1
    replay.acted[row - 1] = False  # nor on the recording's
    save_dataset(path, replay, slice(0, row), env_id)


def catch_below_the_block(games):
    """Steps of a player who mostly catches; a miss costs a life, and every other game is cut after 10 of 16 steps."""
    env, rng = gym.make("toy_env:Catch-v0").unwrapped, np.random.default_rng(0)
    for seed in range(games):
        frame, over, cut = env.reset(seed=seed)[0], False, False
        while not (over or cut):
            action = 17 * env.column if rng.random() < 0.7 else rng.integers(18)
            next_frame, reward, over, _, _ = env.step(action)
            cut = seed % 2 == 1 and env.drops_left == 3
            yield frame, action, reward, over, cut, reward < 0
            frame = next_frame


def test_a_recording_keeps_every_step_and_goes_through_all_stages(chain):
    steps, replay = list(catch_below_the_block(games=4)), Replay(56)
    unpack_dataset(replay, slice(0, 56), model.read_dataset(f"{chain[0]}/recorded.npz"))
    assert np.flatnonzero(~replay.acted).tolist() == [16, 27, 44, 55]  # 16, 10, 16, 10 steps, and each last frame
    for row, (frame, action, reward, over, cut, lost) in zip(np.flatnonzero(replay.acted), steps, strict=True):
        assert (replay.frames[row].permute(1, 2, 0).numpy() == frame).all()
        assert (replay.action[row], replay.reward[row]) == (action, reward)
        assert replay.end[row] == (TIME_LIMIT if cut else GAME_OVER if over else LIFE_LOST if lost else 0)
    targets = model.load_file(f"{chain[0]}/teacher1/targets.npz")  # an answer for every row
    assert targets["value"].shape == (56,) and np.allclose(targets["policy"].sum(axis=1), np.ones(56))
    assert model.load_model(f"{chain[0]}/catch/model.pt")[1]["env_ids"] == ["toy_env:Catch-v2", "toy_env:Catch-v0"]
