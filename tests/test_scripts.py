"""The three scripts chained through their real command lines on real Atari, for a few dozen updates each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distill
import model

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--channels 8 --blocks 1 --batch-size 8 --num-simulations 4 --unroll-steps 2 --eval-episodes 2 --eval-max-frames 80"
)
SOURCES = ["PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4"]
TARGET = "DemonAttackNoFrameskip-v4"


RUNS = {}  # run folder: (script, flags)
for i, game in enumerate(SOURCES):
    flags = f"--env-id {game} --total-timesteps 48 --learning-starts 24 --num-envs 3 --save-dataset data{i}"
    RUNS[f"scratch{i}"] = "finetune.py", flags
    RUNS[f"teacher{i}"] = "pretrain_teacher.py", f"--datasets data{i} --num-updates 12"
RUNS["student"] = "distill.py", "--teachers teacher0 teacher1 --num-updates 12"
XTRA = (
    f"--env-id {TARGET} --pretrained student --total-timesteps 40 --learning-starts 16 --offline-batch-size 8"
    " --similarity-start 8 --similarity-interval 10 --similarity-updates 4 --eval-every 20 --capture-video"
)
RUNS |= {"xtra": ("finetune.py", XTRA), "again": ("finetune.py", XTRA)}
UPDATES = {"scratch0": 48, "scratch1": 48, "xtra": 40, "again": 40}  # the others: 12


def run(folder, script, flags, run_dir):
    """Runs a script on one thread (two would not change the result on one machine, but cost time) -> its last line."""
    command = [sys.executable, str(ROOT / script), *TINY.split(), *flags.split(), "--run-dir", run_dir]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def scalars(folder, key):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Datasets, teachers, student and the XTRA run of the module, in one folder; what each printed last."""
    folder = tmp_path_factory.mktemp("chain")
    last = {run_dir: run(folder, *command, run_dir) for run_dir, command in RUNS.items()}
    return folder, last


def test_the_last_line_names_the_folder_and_the_next_command(chain):
    _, last = chain
    assert last["scratch0"].startswith("scratch0: agent saved")
    assert last["teacher1"] == "teacher1: teacher saved. Next: python distill.py --teachers teacher1 OTHER_TEACHERS..."
    assert last["student"] == "student: student saved. Next: python finetune.py --pretrained student --env-id NEW_GAME"
    assert last["xtra"].startswith("xtra: agent saved")


def test_a_run_folder_holds_the_files_of_its_run(chain):
    folder, _ = chain
    for run_dir in RUNS:
        names = {path.name for path in (folder / run_dir).iterdir()}
        files = {"checkpoint.pt", "evaluations.csv", "lock", "model.pt"}
        files |= {"targets.json", "targets.npz"} if run_dir.startswith("teacher") else set()
        videos = {"video-0.gif", "video-20.gif", "video-40.gif"} if run_dir in ("xtra", "again") else set()
        assert {name for name in names if not name.startswith("events.out.tfevents")} == files | videos
        checkpoint = model.load_torch(f"{folder}/{run_dir}/checkpoint.pt", model.CHECKPOINT_FORMAT)
        counters = model.load_model(f"{folder}/{run_dir}/model.pt")[1]["counters"]
        assert checkpoint["values"]["updates"] == counters["updates"] == UPDATES.get(run_dir, 12)


def test_a_finished_run_that_is_started_again_is_as_it_was(chain, tmp_path):
    # as a cluster does that restarts a job: every later stage must still accept the folder
    folder = tmp_path / "copy"
    shutil.copytree(chain[0], folder)
    for run_dir in ("scratch0", "teacher0", "student"):
        script, flags = RUNS[run_dir]
        before = model.load_model(f"{folder}/{run_dir}/model.pt")[0].state_dict()
        last = run(folder, script, f"{flags} --resume", run_dir)
        assert last == chain[1][run_dir]
        for name in ("evaluations.csv", "targets.npz"):
            if (chain[0] / run_dir / name).exists():
                assert (folder / run_dir / name).read_bytes() == (chain[0] / run_dir / name).read_bytes(), name
        assert scalars(folder / run_dir, "losses/loss") == scalars(chain[0] / run_dir, "losses/loss")
        after = model.load_model(f"{folder}/{run_dir}/model.pt")[0].state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert distill.load_task(f"{folder}/teacher0", "cpu").env_id == SOURCES[0]


def test_the_same_seed_gives_the_same_run(chain):
    folder, _ = chain
    lines = (folder / "xtra" / "evaluations.csv").read_text()
    assert lines == (folder / "again" / "evaluations.csv").read_text()
    for key in ("losses/loss", "transfer/grad_cosine/" + SOURCES[0], "search/root_value"):
        assert scalars(folder / "xtra", key) == scalars(folder / "again", key)


def test_evaluations_are_raw_games_at_the_right_steps(chain):
    folder, _ = chain
    header, *lines = (folder / "xtra" / "evaluations.csv").read_text().splitlines()
    assert header == "env_steps,updates,episode,return,length,env_id"
    env_steps, updates, episode, _, length = np.array([line.split(",")[:5] for line in lines], float).T
    assert updates.tolist() == [0, 0, 20, 20, 40, 40] and episode.tolist() == [0, 1] * 3
    assert env_steps[0] == 0 and 20 <= env_steps[2] < 28 and env_steps[-1] == 40
    assert (length == 20).all()  # 80 frames


def test_one_eta_and_one_cosine_per_offline_game(chain):
    folder, _ = chain
    for game in SOURCES:
        cosines = scalars(folder / "xtra", f"transfer/grad_cosine/{game}")
        assert [step for step, _ in cosines] == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]
        weights = dict(scalars(folder / "xtra", f"transfer/task_weight/{game}"))
        assert all(weights[update] == 1 for update in range(14))
        share = sum(value > 0.1 for _, value in cosines[:4]) / 4
        assert all(weights[update] == share for update in range(14, 24))


def test_targets_belong_to_every_state(chain):
    folder, _ = chain
    for i in range(2):
        meta = json.loads((folder / f"data{i}" / "meta.json").read_text())
        targets = np.load(folder / f"teacher{i}" / "targets.npz")
        assert meta["env_steps"] == 48 and targets["value"].shape == (meta["rows"],)
        assert (targets["visits"].sum(axis=1) == 4).all()


def test_a_video_of_the_evaluation(chain):
    from PIL import Image

    folder, _ = chain
    with Image.open(folder / "xtra" / "video-40.gif") as movie:
        assert movie.n_frames > 1 and movie.size == (288, 288)


@pytest.mark.parametrize(
    "flags",
    [
        "--pretrained student --total-timesteps 0",
        "--pretrained cloned --total-timesteps 0 --num-simulations 0",
        "--teachers teacher0 teacher1 --total-timesteps 16 --learning-starts 8 --offline-batch-size 8 --paper-loss",
        "--pretrained student --no-cross-task --total-timesteps 16 --learning-starts 8 --extra-updates 4",
        "--pretrained student --no-task-weights --freeze-representation --total-timesteps 16 --learning-starts 8"
        " --offline-batch-size 8 --transfer hg",
    ],
)
def test_the_papers_other_runs_are_flags(chain, tmp_path, flags):
    folder, _ = chain
    if "cloned" in flags:
        run(folder, "distill.py", "--teachers teacher0 teacher1 --num-updates 4 --policy-target actions", "cloned")
    run(folder, "finetune.py", f"--env-id {TARGET} {flags}", str(tmp_path / "run"))
    assert (tmp_path / "run" / "model.pt").exists()


def test_multi_game_offline_rl(chain, tmp_path):
    folder, _ = chain
    run(folder, "pretrain_teacher.py", "--datasets data0 data1 --num-updates 4", str(tmp_path / "run"))
    assert {line.split(",")[-1] for line in (tmp_path / "run" / "evaluations.csv").read_text().split()[1:]} == set(
        SOURCES
    )


def test_a_users_own_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    run(tmp_path, "finetune.py", "--env-id toy_env:Catch-v0 --total-timesteps 16 --learning-starts 8", "runs/catch")
    assert (tmp_path / "runs" / "catch" / "model.pt").exists()
