"""The three scripts chained through their command lines, for a few dozen updates each: on Atari, and on a recording."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model
from finetune import GAME_OVER, LIFE_LOST, TIME_LIMIT, Replay, read_dataset, save_dataset

ROOT = Path(__file__).resolve().parent.parent
TINY = "--channels 8 --blocks 1 --batch-size 8 --num-simulations 4 --unroll-steps 2 --eval-episodes 2"
SOURCES, TARGET = ["PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4"], "DemonAttackNoFrameskip-v4"
STUDENT = f"--env-id {TARGET} --pretrained student --num-envs 4 --offline-batch-size 8 --learning-starts 16"
MEASURE = "--similarity-start 8 --similarity-interval 10 --similarity-updates 4 --eval-every 20 --capture-video"
RUNS = {}  # run folder: script and flags
for i, game in enumerate(SOURCES):
    RUNS[f"scratch{i}"] = f"finetune.py --env-id {game} --total-timesteps 48 --learning-starts 24 --num-envs 3"
    RUNS[f"scratch{i}"] += f" --save-dataset data{i}.npz"
    RUNS[f"teacher{i}"] = f"pretrain_teacher.py --datasets data{i}.npz --num-updates 16"
RUNS["student"] = "distill.py --teachers teacher0 teacher1 --num-updates 16"
RUNS["xtra"] = f"finetune.py {STUDENT} --total-timesteps 40 {MEASURE}"


def run(folder, command, run_dir):
    """Runs a script in `folder` on one thread (two would not change the result, but cost time) -> the lines it says."""
    script, flags = command.split(" ", 1)
    words = f"{ROOT}/{script} {TINY} --eval-max-frames 80 {flags} --run-dir {run_dir}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}/tests"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder in which all RUNS ran, one after the other, and what each said."""
    folder = tmp_path_factory.mktemp("chain")
    return folder, {run_dir: run(folder, command, run_dir) for run_dir, command in RUNS.items()}


def scalars(run_dir, key):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def evaluations(run_dir):
    """[env_steps, updates, episode, length] of each game."""
    columns = {"delimiter": ",", "skiprows": 1, "usecols": (0, 1, 2, 4), "dtype": int}
    return np.loadtxt(run_dir / "evaluations.csv", **columns).tolist()


def changed(run_dir, other_dir):
    """The networks whose weights or statistics differ between two models."""
    one, other = (model.load_model(f"{folder}/model.pt")[0].state_dict() for folder in (run_dir, other_dir))
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


def assert_same(run_dir, other_dir, key):
    assert changed(run_dir, other_dir) == set()
    assert (run_dir / "evaluations.csv").read_text() == (other_dir / "evaluations.csv").read_text()
    assert scalars(run_dir, key) == scalars(other_dir, key) != []


def test_the_last_line_names_the_folder_and_the_next_command(chain):
    last = {run_dir: lines[-1] for run_dir, lines in chain[1].items()}
    assert last["teacher1"] == "teacher1: teacher saved. Next: python distill.py --teachers teacher1 OTHER_TEACHERS..."
    assert last["student"] == "student: student saved. Next: python finetune.py --pretrained student --env-id NEW_GAME"
    assert last["xtra"] == "xtra: agent saved. Next: tensorboard --logdir xtra"


def test_the_device_is_named_with_the_reason_and_the_flags_are_those_in_use(chain):
    reason = "this PyTorch is built for CPUs" if torch.version.cuda is None else "no NVIDIA GPU or no driver for it"
    for run_dir, lines in chain[1].items():
        assert f"device: CPU, float32; nothing is compiled or recorded ({reason})" in lines
        args = model.load_model(f"{chain[0]}/{run_dir}/model.pt")[1]["args"]
        assert not args["cuda"] and not args["compile"] and not args["cudagraphs"]


def test_a_run_folder_holds_the_files_of_its_run(chain):
    for run_dir, command in RUNS.items():
        names = {path.name for path in (chain[0] / run_dir).iterdir()}
        files = {"checkpoint.pt", "evaluations.csv", "lock", "model.pt"}
        files |= {"targets.npz"} if run_dir.startswith("teacher") else set()
        files |= {f"video-{n}.gif" for n in (0, 20, 40)} if run_dir == "xtra" else set()
        assert {name for name in names if not name.startswith("events.out.tfevents")} == files
        for name in ("checkpoint.pt", "model.pt"):
            updates = model.load_file(f"{chain[0]}/{run_dir}/{name}")["updates"]
            assert updates == int(re.search(r"--(num-updates|total-timesteps) (\d+)", command)[2])
    with Image.open(chain[0] / "xtra" / "video-40.gif") as movie:
        assert movie.n_frames == 20 and movie.size == (288, 288)


def test_a_finished_run_that_is_started_again_is_as_it_was(chain, tmp_path):
    folder = shutil.copytree(chain[0], tmp_path / "copy")  # as a cluster does that restarts a job
    for run_dir in ("scratch0", "teacher0", "student"):
        assert run(folder, f"{RUNS[run_dir]} --resume", run_dir)[-1] == chain[1][run_dir][-1]
        assert_same(folder / run_dir, chain[0] / run_dir, "losses/loss")
    one, other = (model.load_file(f"{x}/teacher0/targets.npz") for x in (folder, chain[0]))
    assert all((one[name] == other[name]).all() for name in one)


def test_the_same_seed_gives_the_same_run(chain):
    run(chain[0], RUNS["xtra"], "again")
    for key in ("losses/loss", f"transfer/grad_cosine/{SOURCES[0]}", "search/root_value"):
        assert_same(chain[0] / "xtra", chain[0] / "again", key)


def test_evaluations_are_at_the_right_steps(chain):
    assert evaluations(chain[0] / "xtra") == [[n, n, game, 20] for n in (0, 20, 40) for game in (0, 1)]  # 80 frames
    assert evaluations(chain[0] / "student") == [[0, n, game, 20] for n in (0, 16) for _ in SOURCES for game in (0, 1)]


def test_eta_is_the_share_of_similar_gradients_in_the_last_measurement(chain):
    for game in SOURCES:
        cosines = dict(scalars(chain[0] / "xtra", f"transfer/grad_cosine/{game}"))
        assert list(cosines) == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]
        similar = {start: np.mean([cosines[start + i] > 0.1 for i in range(4)]) for start in (10, 20, 30)}
        expected = {0: 1.0, 12: similar[10], 24: similar[20], 32: similar[30]}  # from 14, 24, 34 on; a cycle has 4
        weights = scalars(chain[0] / "xtra", f"transfer/task_weight/{game}")
        assert weights == [(update, expected[max(n for n in expected if n <= update)]) for update in range(0, 40, 4)]


REST = {"dynamics", "prediction", "projector", "predictor"}


@pytest.mark.parametrize("flags, steps, networks, games", [
    ("--total-timesteps 0", [0, 0], set(), 1),  # zero-shot
    ("--total-timesteps 0 --transfer h", [0, 0], REST, 1),
    ("--total-timesteps 16 --no-cross-task", [16, 16], REST | {"representation"}, 1),
    ("--total-timesteps 16 --extra-updates 4 --freeze-representation --paper-loss", [16, 20], REST, 3),
])  # fmt: skip
def test_other_runs_of_the_paper_change_their_networks_only(chain, tmp_path, flags, steps, networks, games):
    run(chain[0], f"finetune.py {STUDENT} {flags}", tmp_path)
    assert changed(tmp_path, chain[0] / "student") == networks and evaluations(tmp_path)[-1][:2] == steps
    assert model.load_model(f"{tmp_path}/model.pt")[1]["env_ids"] == [TARGET, *SOURCES][:games]


def test_behaviour_cloning_is_evaluated_zero_shot_without_a_search(chain, tmp_path):
    flags = "--teachers teacher0 teacher1 --num-updates 8 --policy-target actions"
    run(chain[0], f"distill.py {flags}", tmp_path / "cloned")
    flags = f"--env-id {TARGET} --pretrained {tmp_path}/cloned --total-timesteps 0 --num-simulations 0"
    run(chain[0], f"finetune.py {flags}", tmp_path / "run")
    assert changed(tmp_path / "cloned", tmp_path / "run") == set() and len(evaluations(tmp_path / "run")) == 2


def test_several_datasets_make_one_network_and_no_targets(chain, tmp_path):
    run(chain[0], "pretrain_teacher.py --datasets data0.npz data1.npz --num-updates 8", tmp_path)
    assert model.load_model(f"{tmp_path}/model.pt")[1]["scores"].keys() == set(SOURCES)
    assert not (tmp_path / "targets.npz").exists()


def record(steps, path, env_id):
    """Saves consecutive steps of a game as a dataset: frame uint8 [96, 96, 3], the ALE action taken there, and what it
    led to: raw reward, terminated (the game is over), truncated (it was cut), life_lost."""
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


def test_a_recording_goes_through_all_stages(tmp_path):
    steps = list(catch_below_the_block(games=4))
    record(steps, f"{tmp_path}/data.npz", "toy_env:Catch-v0")
    data = read_dataset(f"{tmp_path}/data.npz")
    assert (~data["acted"]).nonzero()[0].tolist() == [16, 27, 44, 55]  # 16, 10, 16, 10 steps, and each last frame
    for name, column in {"action": 1, "reward": 2}.items():
        assert data[name][data["acted"]].tolist() == [step[column] for step in steps]
    ends = [3 if cut else 2 if over else 1 if lost else 0 for *_, over, cut, lost in steps]
    assert data["end"][data["acted"]].tolist() == ends and set(ends) == {0, LIFE_LOST, GAME_OVER, TIME_LIMIT}

    run(tmp_path, "pretrain_teacher.py --datasets data.npz --num-updates 16", "teacher")
    targets = model.load_file(f"{tmp_path}/teacher/targets.npz")
    assert targets["policy"].shape == (56, 18) and targets["value"].shape == (56,)
    assert np.allclose(targets["policy"].sum(axis=1), 1)
    run(tmp_path, "distill.py --teachers teacher --num-updates 16", "student")
    flags = "--pretrained student --offline-batch-size 8 --num-envs 4 --learning-starts 8 --total-timesteps 16"
    run(tmp_path, f"finetune.py --env-id toy_env:Catch-v2 {flags}", "run")
    assert evaluations(tmp_path / "run")[-1] == [16, 16, 1, 16]
    assert model.load_model(f"{tmp_path}/run/model.pt")[1]["env_ids"] == ["toy_env:Catch-v2", "toy_env:Catch-v0"]
