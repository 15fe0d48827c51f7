"""The project's claim in miniature: agents learn Catch from pixels, and transfer saves environment steps.

Every run is a command line of the scripts, two at a time, one thread each. The numbers of every seed are printed:
`pytest -s tests/test_learning.py` shows them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--channels 16 --blocks 1 --batch-size 16 --learning-rate 0.04 --num-simulations 16 --unroll-steps 2 --td-steps 3"
    " --eval-episodes 16"
)
ONLINE = "--num-envs 4 --learning-starts 100 --env-id toy_env:"
SOURCES, TARGET, SEEDS = ["Catch-v0", "Catch-v1"], "Catch-v2", [1, 2, 3]
THRESHOLD = 5.0  # of 8; the mean of 16 random games is 0 +- 0.7
SCRATCH_STEPS, XTRA_STEPS = 800, 200


def start(folder, script, flags, run_dir):
    command = [sys.executable, str(ROOT / script), *SMALL.split(), *flags.split(), "--run-dir", run_dir]
    paths = {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def curve(run_dir):
    """Mean return of each evaluation: [(env_steps, return), ...]; the first updates share their environment steps."""
    evaluations = {}
    for line in (run_dir / "evaluations.csv").read_text().splitlines()[1:]:
        env_steps, updates, _, score, *_ = line.split(",")
        evaluations.setdefault((int(env_steps), int(updates)), []).append(float(score))
    return [(env_steps, float(np.mean(scores))) for (env_steps, _), scores in evaluations.items()]


def steps_to_threshold(points, limit):
    """Environment steps of the first evaluation at THRESHOLD or above; the limit if there is none."""
    return next((steps for steps, value in points if value >= THRESHOLD), limit)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """{(method, seed): curve} of EfficientZero and of XTRA on the target, from one student of the two sources."""
    folder = tmp_path_factory.mktemp("learning")
    with ThreadPoolExecutor(2) as pool:

        def submit(script, flags, run_dir):
            return pool.submit(start, folder, script, flags, run_dir)

        for future in [
            submit("finetune.py", f"{ONLINE}{game} --total-timesteps 600 --save-dataset data-{game}.npz", game)
            for game in SOURCES
        ]:
            future.result()
        for future in [
            submit("pretrain_teacher.py", f"--datasets data-{game}.npz --num-updates 704", f"teacher-{game}")
            for game in SOURCES
        ]:
            future.result()
        teachers = " ".join(f"teacher-{game}" for game in SOURCES)
        student = submit("distill.py", f"--teachers {teachers} --num-updates 504", "student")
        scratch = f"{ONLINE}{TARGET} --eval-every 50 --total-timesteps {SCRATCH_STEPS}"
        futures = [submit("finetune.py", f"{scratch} --seed {seed}", f"scratch-{seed}") for seed in SEEDS]
        student.result()
        xtra = f"{ONLINE}{TARGET} --eval-every 50 --total-timesteps {XTRA_STEPS} --pretrained student"
        xtra += " --offline-batch-size 16 --similarity-start 100 --similarity-interval 100 --similarity-updates 20"
        futures += [submit("finetune.py", f"{xtra} --seed {seed}", f"xtra-{seed}") for seed in SEEDS]
        for future in futures:
            future.result()
    found = {(method, seed): curve(folder / f"{method}-{seed}") for method in ("scratch", "xtra") for seed in SEEDS}
    for (method, seed), points in found.items():
        print(f"{method} seed {seed}: " + "  ".join(f"{steps}: {value:+.1f}" for steps, value in points))
    return found


def test_efficientzero_learns_catch_from_pixels(curves):
    best = [max(value for _, value in curves["scratch", seed]) for seed in SEEDS]
    print("best evaluation of EfficientZero, seeds 1 2 3:", best)
    assert np.mean(best) >= THRESHOLD
    assert min(best) >= 2.5  # more than 3 standard deviations above random play


def test_transfer_takes_clearly_fewer_environment_steps(curves):
    scratch = [steps_to_threshold(curves["scratch", seed], SCRATCH_STEPS) for seed in SEEDS]
    xtra = [steps_to_threshold(curves["xtra", seed], XTRA_STEPS) for seed in SEEDS]
    print(f"environment steps to a return of {THRESHOLD}: EfficientZero {scratch}, XTRA {xtra}")
    assert all(max(value for _, value in curves["xtra", seed]) >= THRESHOLD for seed in SEEDS)
    assert np.mean(xtra) <= 0.5 * np.mean(scratch)
