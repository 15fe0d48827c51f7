"""The three scripts chained through their real command lines on real Atari, for a few dozen updates each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--channels 8 --blocks 1 --batch-size 8 --num-simulations 4 --unroll-steps 2 --eval-episodes 2 --eval-max-frames 80"
)
SOURCES = ["PhoenixNoFrameskip-v4", "AssaultNoFrameskip-v4"]
TARGET = "DemonAttackNoFrameskip-v4"


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
    folder, last = tmp_path_factory.mktemp("chain"), {}
    for i, game in enumerate(SOURCES):
        flags = f"--env-id {game} --total-timesteps 48 --learning-starts 24 --num-envs 3 --save-dataset data{i}"
        last[f"scratch{i}"] = run(folder, "finetune.py", flags, f"scratch{i}")
        last[f"teacher{i}"] = run(folder, "pretrain_teacher.py", f"--datasets data{i} --num-updates 12", f"teacher{i}")
    last["student"] = run(folder, "distill.py", "--teachers teacher0 teacher1 --num-updates 12", "student")
    flags = f"--env-id {TARGET} --pretrained student --total-timesteps 40 --learning-starts 16 --offline-batch-size 8"
    flags += " --similarity-start 8 --similarity-interval 10 --similarity-updates 4 --eval-every 20 --capture-video"
    last["xtra"] = run(folder, "finetune.py", flags, "xtra")
    last["again"] = run(folder, "finetune.py", flags, "again")
    return folder, last


def test_the_last_line_names_the_folder_and_the_next_command(chain):
    _, last = chain
    assert last["scratch0"].startswith("scratch0: agent saved")
    assert last["teacher1"] == "teacher1: teacher saved. Next: python distill.py --teachers teacher1 OTHER_TEACHERS..."
    assert last["student"] == "student: student saved. Next: python finetune.py --pretrained student --env-id NEW_GAME"
    assert last["xtra"].startswith("xtra: agent saved")


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
