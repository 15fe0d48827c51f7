"""The project's claim in miniature: a student of two small games learns a third one in far fewer environment steps.

The games, flags and lengths are those of benchmark/quickstart.sh; docs/learning.md lists ten seeds of each run. Every
run is a command line of the scripts, two at a time, one thread each: `pytest -s tests/test_learning.py` shows them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOY = "--channels 16 --blocks 1 --batch-size 16 --learning-rate 0.04 --num-simulations 16 --unroll-steps 2 --td-steps 3"
TOY += " --eval-episodes 16"
# Targets come from a network of one to two intervals ago: with the default of 200 updates, runs as short as these
# would spend half of their updates or more on what an untrained network says.
ONLINE = "finetune.py --learning-starts 96 --target-interval 48"
SOURCE = f"{ONLINE} --total-timesteps 160 --eval-every 160"
TEACHER = "pretrain_teacher.py --num-updates 160 --eval-every 160 --target-interval 48"
STUDENT = "distill.py --num-updates 160 --eval-every 160 --teachers teacher-fruit teacher-rocks"
STORM = f"{ONLINE} --env-id toy_env:Storm-v0 --eval-every 52"
ETA = "--offline-batch-size 16 --similarity-start 48 --similarity-interval 48 --similarity-updates 16"
XTRA = f"{STORM} --total-timesteps 208 --pretrained student {ETA}"
THRESHOLD = 12.0  # of 16; the mean of 16 random games is 0 +- 1


def run_all(folder, commands):
    """Runs {run folder: script and flags} of one stage in `folder`, two at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}"

    def start(run_dir):
        script, flags = commands[run_dir].split(" ", 1)
        words = f"{ROOT}/{script} {TOY} {flags} --run-dir {run_dir}".split()
        done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, commands))


def curve(run_dir):
    """Mean return of each evaluation of a run of one game: [(env_steps, return), ...]."""
    columns = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1, usecols=(0, 1, 3))
    points = {(env_steps, updates): [] for env_steps, updates, _ in columns}
    for env_steps, updates, score in columns:
        points[env_steps, updates].append(score)
    return [(int(env_steps), float(np.mean(scores))) for (env_steps, _), scores in points.items()]


def curves(folder, names):
    found = {name: curve(folder / name) for name in names}
    for name, points in found.items():
        print(f"{name}: " + "  ".join(f"{steps}: {value:+.1f}" for steps, value in points))
    return found


def steps_to_threshold(points):
    """Environment steps of the first evaluation at THRESHOLD or above, or None."""
    return next((steps for steps, value in points if value >= THRESHOLD), None)


def pretrain(folder):
    """The two games' data, their teachers and the student."""
    games = {"fruit": "Fruit-v0", "rocks": "Rocks-v0"}
    sources = {name: f"{SOURCE} --env-id toy_env:{game}" for name, game in games.items()}
    run_all(folder, {name: f"{command} --save-dataset {name}.npz" for name, command in sources.items()})
    run_all(folder, {f"teacher-{name}": f"{TEACHER} --datasets {name}.npz" for name in games})
    run_all(folder, {"student": STUDENT})
    return curves(folder, games)


def test_with_one_plane_per_action_q_finds_one_key_of_18():
    """In Keys two of the 18 actions pay, each under its own light. After 400 updates on labelled random play Q picks
    the one that pays in each new state, with each of three seeds; with one plane of a/18 in 0 to 6 % of them."""
    words = "benchmark/bench.py --ceiling --games Keys-v0 --seeds 1 --one-hot-actions --action-gain 4"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    share_of_best_actions_by_q = float(done.stdout.split()[-1])
    assert share_of_best_actions_by_q > 0.9


def test_xtra_learns_an_unseen_game_in_half_of_the_steps_that_it_takes_from_scratch(tmp_path):
    """Ten seeds (docs/learning.md): XTRA has 10.1 zero-shot, 12.4 to 15.1 after 96 steps, 12.5 to 15.6 after 104; from
    scratch the best has 9.2 after 208 steps. Fruit and Rocks have 15.1 to 16, and 7.6 and 13.0 with seed 3.

    On another machine the same commands made another student: 7.2 zero-shot, 9.6 after 104 steps, 14.0 after 160, where
    from scratch it takes 416. So the number of steps is not asked for closely, but half of those from scratch is."""
    sources = pretrain(tmp_path)
    runs = {"xtra-1": f"{XTRA} --seed 1"}
    runs |= {f"scratch-{steps}": f"{STORM} --total-timesteps {steps} --seed 1" for steps in (208, 416)}
    run_all(tmp_path, runs)
    for name, points in sources.items():  # EfficientZero from scratch
        assert points[-1][1] >= 6, name
    xtra, scratch, longer = curves(tmp_path, runs).values()
    assert 4 <= xtra[0][1] <= 12  # zero-shot: a quarter to three quarters of perfect play
    assert steps_to_threshold(xtra) <= 160
    assert steps_to_threshold(scratch) is None  # in 208 steps
    assert 2 * steps_to_threshold(xtra) <= (steps_to_threshold(longer) or 416)


@pytest.mark.faults
def test_efficientzero_learns_when_to_act(tmp_path):
    """Rare-v0, 8 is perfect, random play 0; docs/learning.md has ten seeds."""
    rare = f"{ONLINE} --env-id toy_env:Rare-v0 --num-envs 4 --total-timesteps 400 --eval-every 400 --seed 1"
    run_all(tmp_path, {"rare-1": rare})
    assert curves(tmp_path, ["rare-1"])["rare-1"][-1][1] >= 7


@pytest.mark.faults
def test_from_scratch_the_same_return_takes_more_than_twice_the_steps_in_the_mean_of_five_seeds(tmp_path):
    seeds = (1, 2, 3, 4, 5)
    pretrain(tmp_path)
    xtra = {f"xtra-{seed}": f"{XTRA} --seed {seed}" for seed in seeds}
    scratch = {f"scratch-{seed}": f"{STORM} --total-timesteps 832 --seed {seed}" for seed in seeds}
    run_all(tmp_path, xtra | scratch)
    xtra_steps = [steps_to_threshold(points) for points in curves(tmp_path, xtra).values()]
    scratch_steps = [steps_to_threshold(points) or 832 for points in curves(tmp_path, scratch).values()]  # or more
    print(f"environment steps to a return of {THRESHOLD}: XTRA {xtra_steps}, from scratch {scratch_steps}")
    assert np.mean(xtra_steps) <= 0.5 * np.mean(scratch_steps)  # XTRA always gets there: None is an error here
