"""The learning bench: EfficientZero from scratch on the pixel games of tests/toy_env.py, whose best play is known.

    python benchmark/bench.py --games Match-v0 Delay-v0 --seeds 1 2 3 --output bench.csv
    python benchmark/bench.py --ceiling

Each game and seed is a run of finetune.py with the flags below, one thread each. The table has the mean score of each
run at some environment steps, and as a share: 0 % is random play, 100 % perfect play. Runs that are there are not run
again. --ceiling learns the same networks from labels instead: of the states of random play in which the moves differ,
in how many do the policy and the model's own Q choose a best one? What labels cannot teach, no search will.
"""

import csv
import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmark")]
import toy_env  # noqa: E402, F401  (importing it registers the games)
from speed import override  # noqa: E402

import finetune  # noqa: E402
import mcts  # noqa: E402
import model  # noqa: E402

GAMES = ["Match-v0", "Catch-v2", "Delay-v0", "Rare-v0", "Dodge-v0", "Gather-v0", "Keys-v0", "Follow-v0", "Lives-v0"]
GAMES += ["Toll-v0", "Corridor-v0"]
SMALL = """--channels 16 --blocks 1 --batch-size 16 --learning-rate 0.04 --num-simulations 16 --unroll-steps 2
 --td-steps 3 --target-interval 48 --eval-episodes 16 --num-envs 4 --learning-starts 100"""


@dataclass
class Args:
    games: tuple[str, ...] = tuple(GAMES)  # of tests/toy_env.py
    seeds: tuple[int, ...] = (1, 2, 3)  # of the runs, or of the ceilings
    steps: tuple[int, ...] = (200, 400, 600, 800, 1000)  # multiples of the first; the last is the length of the runs
    action_gain: float = 30.0  # as in finetune.py, of runs and ceilings
    one_hot_actions: bool = False  # as in finetune.py, of runs and ceilings
    flags: str = ""  # more flags for finetune.py, as in --flags="--value-coef 1"; they win over the bench's own
    folder: str = "runs/bench"  # where the run folders are; one folder for each set of flags
    output: str | None = None  # a CSV file for the scores
    slots: int = 2  # runs at the same time
    ceiling: bool = False  # whether to learn from labels instead


def play(game, choose, episodes=400):
    """Mean return of a player, `choose(env, rng)` -> action."""
    env, rng, total = gym.make(game).unwrapped, np.random.default_rng(0), 0.0
    for seed in range(episodes):
        env.reset(seed=seed)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(choose(env, rng))
            total += reward
            over = terminated or truncated
    return total / episodes


def best_actions(env):
    """Which of the 18 actions are best in the state of a game: bool [A]."""
    return np.isin(np.arange(18), env.best_actions())


def action_flags(args):
    """How g gets the action, as flags of finetune.py."""
    return f"--action-gain {args.action_gain}" + args.one_hot_actions * " --one-hot-actions"


def run(args, game, seed):
    """One run of finetune.py, unless it is there -> {environment steps: mean score}, seconds."""
    folder = Path(args.folder) / f"{game}-{seed}"
    flags = f"{SMALL} {action_flags(args)} {args.flags} --env-id toy_env:{game} --seed {seed}"
    flags += f" --eval-every {args.steps[0]} --total-timesteps {args.steps[-1]} --run-dir {folder} --resume"
    words = [sys.executable, str(ROOT / "finetune.py"), *override(flags.split())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}"
    done = folder / "bench.json"  # the flags and the seconds of the process that ended the run
    if done.exists() and json.loads(done.read_text())["flags"] != flags:
        raise SystemExit(f"error: {folder} was made with other flags; choose another --folder")
    if not done.exists():
        start = time.time()
        process = subprocess.run(words, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"error: {game}, seed {seed}: {process.stderr.strip()[-500:]}")
        done.write_text(json.dumps({"flags": flags, "seconds": round(time.time() - start)}))
    scores = {}
    with open(folder / "evaluations.csv") as file:
        for row in csv.DictReader(file):
            scores.setdefault(int(row["env_steps"]), []).append(float(row["return"]))
    return {steps: float(np.mean(scores[steps])) for steps in args.steps}, json.loads(done.read_text())["seconds"]


def bench(args):
    """All runs, the table, and the CSV file."""
    jobs = [(game, seed) for game in args.games for seed in args.seeds]
    with ThreadPoolExecutor(args.slots) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run(args, *job), jobs), strict=True))
    rows = []
    flags = f"{action_flags(args)} {args.flags}"
    header = "".join(f"{steps:>8}" for steps in args.steps)
    print(f"{'game':<12}{'random':>8}{'optimum':>8}  seed{header}   share  seconds")
    for game in args.games:
        random = play(game, lambda env, rng: rng.integers(18))
        optimum = play(game, lambda env, rng: rng.choice(np.flatnonzero(best_actions(env))))
        for seed in args.seeds:
            scores, seconds = results[game, seed]
            share = (scores[args.steps[-1]] - random) / (optimum - random)
            columns = "".join(f"{scores[steps]:8.1f}" for steps in args.steps)
            print(f"{game:<12}{random:8.1f}{optimum:8.1f}  {seed:>4}{columns}  {share:6.0%}  {seconds:>7}")
            for steps, score in scores.items():
                rows.append([game, seed, steps, score, round(random, 2), round(optimum, 2), seconds, flags])
    if args.output:
        with open(args.output, "w", newline="") as file:
            names = ["game", "seed", "env_steps", "score", "random", "optimum", "seconds", "flags"]
            csv.writer(file).writerows([names, *rows])


def labelled_play(env_id, num_envs, steps, seed):
    """A replay of random play whose policy is uniform over the best actions of each state."""
    replay = finetune.Replay(num_envs * (steps + 1))
    streams = np.arange(num_envs) * (steps + 1)
    games = finetune.start_games(env_id, replay, streams, seed)
    rng = np.random.default_rng(seed)
    for t in range(steps):
        for row, env in zip(games.newest, games.envs.envs, strict=True):
            best = best_actions(env.unwrapped)
            replay.policy[row] = best / best.sum()
        finetune.play_step(games, replay, rng.integers(18, size=num_envs), t * num_envs)
    return replay


def ceiling(args, game, seed, updates=400, stored=1000, K=2):
    """Learns from labels on random play -> how often a best action is chosen on new play: by the policy, by Q."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    actions = {"action_gain": args.action_gain, "one_hot_actions": args.one_hot_actions}
    config = model.ModelConfig.of_width(16, 1, norm_steps=K, **actions)
    net = model.EfficientZeroNet(config).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.04, momentum=0.9, weight_decay=1e-4)
    coefficients = {"value_prefix": 1.0, "policy": 1.0, "value": 0.25, "consistency": 2.0}
    learn = functools.partial(finetune.transfer_learn, net, finetune.unroll_loss, coefficients=coefficients)
    replay = labelled_play(game, 4, stored // 4, seed)
    acted = np.flatnonzero(replay.acted)
    for _ in range(updates):
        rows = rng.choice(acted, (1, 16))
        batches = finetune.make_targets(replay, rows, 3, K, 0.997**4, True, rng)
        batches["weight"] = np.ones((1, 16), np.float32)
        samples = {name: torch.from_numpy(x[0]) for name, x in batches.items()}
        batch = finetune.take_batch(replay, samples, generator)
        learn(batch, torch.ones(0), sizes=[16], paper_loss=False)
        optimizer.step()
    replay = labelled_play(game, 4, 125, seed + 1000)
    differ = replay.acted & (replay.policy == 0).any(axis=1)
    rows = np.flatnonzero(differ)
    search = mcts.Search(model.inference_copy(net), 0, len(rows))
    predicted = search.predict(finetune.stack_frames(replay, rows), replay.action[rows, None], np.ones(18, bool))
    return [(replay.policy[rows, x.argmax(axis=1)] > 0).mean() for x in (predicted.prior, predicted.q)]


if __name__ == "__main__":
    args = model.read_flags(Args, __doc__)
    unknown = [game for game in args.games if game not in gym.registry]
    if unknown:
        raise SystemExit(f"error: --games {unknown[0]} is not in tests/toy_env.py; choose from {' '.join(GAMES)}")
    if "steps-per-update" in args.flags:
        raise SystemExit("error: --flags has --steps-per-update, expected one step per update: --steps counts both")
    if not args.ceiling:
        bench(args)
    else:
        print(f"{'game':<12}  seed  policy       Q")
        for game in args.games:
            for seed in args.seeds:
                policy, q = ceiling(args, game, seed)
                print(f"{game:<12}  {seed:>4}{policy:8.2f}{q:8.2f}", flush=True)
