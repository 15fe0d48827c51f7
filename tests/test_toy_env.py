"""The small games: what perfect and random players get, and that nothing else is needed to learn them."""

import importlib.util
import itertools
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import toy_env

spec = importlib.util.spec_from_file_location("bench", Path(__file__).parent.parent / "benchmark" / "bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

PAY = {  # game: mean return of the perfect player, of a random one
    "Match-v0": (16, 16 / 3),
    "Catch-v2": (8, 0),
    "Delay-v0": (4, 0),
    "Rare-v0": (8, 0),
    "Dodge-v0": (16, 0.5),  # 1/3 + 1/9 + ...
    "Gather-v0": (12, 1.4),  # 24 steps, 2 from a cell to another one in the mean; random: measured
    "Keys-v0": (16, 16 / 18),
    "Follow-v0": (24, 12),
    "Lives-v0": (16, 3),  # as many catches as misses before the third miss
    "Toll-v0": (-3, -14.5),  # 1 to 5 steps; random: measured
    "Corridor-v0": (5, 0.4),  # 40 steps, 8 a way; random: measured
    "Fruit-v0": (16, 0),
    "Rocks-v0": (16, 0),
    "Storm-v0": (16, 0),
}


@pytest.mark.parametrize("game", PAY)
def test_perfect_and_random_play_pay_what_they_should(game):
    perfect = bench.play(game, lambda env, rng: rng.choice(np.flatnonzero(bench.best_actions(env))))
    random = bench.play(game, lambda env, rng: rng.integers(18))
    scale = abs(PAY[game][0] - PAY[game][1])
    assert (perfect, random) == pytest.approx(PAY[game], abs=0.08 * scale)


@pytest.mark.parametrize("game", PAY)
def test_every_frame_shows_what_is_best(game):
    """The same frame has the same best actions, so a policy over frames can be perfect."""
    env, best = gym.make(game).unwrapped, {}
    rng = np.random.default_rng(0)
    for seed in range(20):
        frame, over = env.reset(seed=seed)[0], False
        while not over:
            actions = tuple(bench.best_actions(env))
            assert best.setdefault(frame.tobytes(), actions) == actions
            frame, _, terminated, truncated, _ = env.step(rng.integers(18))
            over = terminated or truncated
    assert len(best) > 1 and all(map(any, best.values()))


def test_who_knows_fruit_and_rocks_plays_two_thirds_of_storm():
    def player(hail):
        sides = {"fruit": lambda env, rng: env.side, "rock": lambda env, rng: 1 - env.side, "hail": hail}
        return bench.play("Storm-v0", lambda env, rng: 9 * sides[env.thing](env, rng))

    for hail in (lambda env, rng: 0, lambda env, rng: 1, lambda env, rng: env.side, lambda env, rng: rng.integers(2)):
        assert player(hail) == pytest.approx(32 / 3, abs=0.7)
    assert player(lambda env, rng: env.player) == 16


def test_moves_divide_the_actions_evenly():
    assert [toy_env.move(action, 3) for action in range(18)] == [0] * 6 + [1] * 6 + [2] * 6
    for moves in (2, 4, 18):
        counts = [len(list(group)) for _, group in itertools.groupby(toy_env.move(a, moves) for a in range(18))]
        assert len(counts) == moves and max(counts) - min(counts) <= 1
