"""The replay: as self-play fills it, as batches are drawn from it, and as datasets bring it back."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from test_targets import random_stream

import finetune
import model
from finetune import play_step, save_dataset, select_actions, start_games, temperature_at
from model import read_dataset
from pretrain_teacher import GAME_OVER, LIFE_LOST, TIME_LIMIT, Game, Replay, make_replay, sample

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")

# --- self-play


class Script(model.AtariGames):
    """Two environments that play a table of (reward, terminated, truncated, lives), step after step. Environment 0
    loses a life, then the game with as many lives as before, as Adventure does; environment 1 meets its time limit. The
    step after that resets: all else is void."""

    table = [
        [(5, False, False, 2), (0, False, False, 1)],
        [(-3, False, False, 1), (7, False, True, 1)],
        [(0, False, False, 1), (9, True, False, 3)],
        [(2, True, False, 1), (1, False, False, 3)],
        [(0, False, False, 2), (0, False, False, 3)],
        [(1, False, False, 2), (4, False, False, 3)],
    ]

    def __init__(self, table=None, first=0):
        self.table, self.first, self.t = table or self.table, first, 0

    def frames(self):  # frame t of environment e shows the number 10 * t + e
        return np.add.outer([self.first, 1], np.full((1, 96, 96, 3), 10 * self.t)).astype(np.uint8)

    def reset(self, *, seed):
        self.seed = seed
        return self.frames(), {"lives": np.array([2, 1])}

    def step(self, action):
        reward, terminated, truncated, lives = (np.array(x) for x in zip(*self.table[self.t], strict=True))
        self.t += 1
        return self.frames(), reward, terminated, truncated, {"lives": lives}


def played(monkeypatch, script):  # -> play, replay, (over, score, length) after each step
    monkeypatch.setattr(finetune, "make_envs", lambda env_id, num_envs: script)
    replay, seen = Replay(14), []
    play = start_games("A", replay, np.array([0, 7]), seed=3)
    for t in range(6):
        play_step(play, replay, np.array([t, 17 - t]), 100 + 2 * t)
        seen.append([*play.over, *play.score, *play.length])
    return play, replay, seen


def test_each_environment_fills_its_stream_row_by_row(monkeypatch):
    play, replay, _ = played(monkeypatch, Script())
    assert play.envs.seed == 3 and play.newest.tolist() == [6, 13]
    names = ("acted", "end", "age", "reward", "action", "stored_at")
    stream = {name: getattr(replay, name).reshape(2, 7) for name in names}
    #            step                     0        1        2        3       4 (resets)      5     newest
    assert stream["acted"].tolist() == [[1, 1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1, 0]]
    assert stream["end"].tolist() == [[0, LIFE_LOST, 0, GAME_OVER, 0, 0, 0], [0, TIME_LIMIT, 0, 0, 0, 0, 0]]
    assert stream["age"].tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert not replay.priority.any()  # the main loop gives one
    assert stream["reward"][:, :6].T.tolist() == [[step[0][0], step[1][0]] for step in Script.table]
    np.testing.assert_array_equal(stream["action"][:, :6], [range(6), range(17, 11, -1)])
    np.testing.assert_array_equal(stream["stored_at"][:, :6], [range(100, 112, 2), range(101, 113, 2)])
    shown = torch.tensor([[10 * t + e for t in range(7)] for e in range(2)])
    assert (replay.frames.view(2, 7, 3, 96, 96) == shown.view(2, 7, 1, 1, 1)).all()


def test_finished_games_are_known_with_their_raw_return_and_length(monkeypatch):
    over, score, length = np.split(np.array(played(monkeypatch, Script())[2]), 3, axis=1)
    assert over.T.tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert score.T.tolist() == [[5, 2, 2, 4, 0, 1], [0, 7, 0, 1, 1, 5]]
    assert length.T.tolist() == [[1, 2, 3, 4, 0, 1], [1, 2, 0, 1, 2, 3]]


def test_the_checksum_is_of_all_frames_rewards_and_ends(monkeypatch):
    reward = [*Script.table[:5], [(1, False, False, 2), (5, False, False, 3)]]
    end = [*Script.table[:5], [(1, False, False, 2), (4, True, False, 3)]]
    scripts = [Script(), Script(), Script(first=2), Script(reward), Script(end)]
    checksums = [played(monkeypatch, script)[0].checksum.hexdigest() for script in scripts]
    assert checksums[0] == checksums[1] and len(set(checksums)) == 4


def test_the_temperature_falls_at_60_and_90_percent():
    updates = (0, 59_999, 60_000, 89_999, 90_000, 120_000)
    assert [temperature_at(update, 100_000) for update in updates] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.25])
def test_actions_are_drawn_in_proportion_to_the_sharpened_visits(temperature):
    policy = np.zeros((20_000, 18), np.float32)
    policy[:, [2, 5, 11, 17]] = [0.48, 0.24, 0.24, 0.04]
    counts = np.bincount(select_actions(policy, temperature, np.random.default_rng(0)), minlength=18)
    probs = policy[0] ** (1 / temperature) / (policy[0] ** (1 / temperature)).sum()
    assert len(counts) == 18 and not counts[probs == 0].any()
    # 5 standard deviations of a binomial count
    assert (np.abs(counts - 20_000 * probs) <= 5 * np.sqrt(20_000 * probs * (1 - probs))).all()


# --- sampling


def replay_with(*priorities):
    """A replay with these priorities game after game, and the games."""
    replay = Replay(sum(map(len, priorities)))
    replay.priority[:] = np.concatenate(priorities)
    starts = np.cumsum([0, *map(len, priorities)])
    slices = [slice(*ends) for ends in zip(starts[:-1], starts[1:], strict=True)]
    return replay, [Game(str(rows), rows, None) for rows in slices]


def test_rows_are_drawn_in_proportion_to_the_priority_to_the_power_of_0_6():
    replay, games = replay_with([9.0, 9.0], [0.1, 1.0, 0.0, 3.0, 0.5])
    draws = 5_000
    rows, _ = sample(replay, games, [1, 1], draws, 0.6, 0.4, np.random.default_rng(0))
    assert rows.shape == (draws, 2) and set(rows[:, 0]) == {0, 1}
    counts = np.bincount(rows[:, 1] - 2, minlength=5)
    # 0.1^0.6 = 0.2512, 1, 0, 3^0.6 = 1.9332, 0.5^0.6 = 0.6598; sum 3.8441
    expected = draws * np.array([0.2512, 1, 0, 1.9332, 0.6598]) / 3.8441
    assert counts[2] == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in 1,000 seeds


def test_a_batch_has_no_row_twice_and_none_that_was_not_acted_on():
    rng = np.random.default_rng(0)
    replay, games = replay_with(rng.uniform(0.1, 1, 60) * (np.arange(60) % 3 > 0))
    rows, _ = sample(replay, games, [40], 50, 0.6, 0.4, rng)
    assert (np.sort(rows) == [i for i in range(60) if i % 3 > 0]).all()  # all 40 that there are, in each batch


@pytest.mark.parametrize("seed", range(40))
def test_different_rows_are_those_that_numpy_draws_one_batch_after_the_other(seed):
    """Steep probabilities: most batches hit a row twice, and draw again."""
    one, other = np.random.default_rng(seed), np.random.default_rng(seed)
    probability = one.random(50) ** 8 * (np.arange(50) % 5 > 0)
    probability /= probability.sum()
    size = int(one.integers(1, 41))
    other.bit_generator.state = one.bit_generator.state
    options = {"replace": False, "p": probability, "shuffle": False}
    expected = np.stack([one.choice(50, size, **options) for _ in range(4)])
    np.testing.assert_array_equal(model.draw_different(other, probability, size, 4), expected)
    assert one.bit_generator.state == other.bit_generator.state


def test_what_is_played_gets_the_highest_priority_that_there_is():
    """By these lines of finetune.py's main loop."""
    source = (Path(finetune.__file__)).read_text()
    start, stop = source.index("        if played:"), source.index("        # ALGO LOGIC: training.")
    replay = Replay(6)
    replay.acted[:] = 1, 1, 1, 1, 0, 0
    space = {"np": np, "replay": replay, "own": slice(1, 6)}
    for priority, expected in (([9, 0, 0, 0, 0, 0], [9, 0, 0, 1, 0, 0]), ([9, 2, 5, 0, 0, 0], [9, 2, 5, 5, 0, 0])):
        replay.priority[:] = priority  # the first row is another game's, rows 3 and 4 are new
        exec(textwrap.dedent(source[start:stop]), space | {"played": [np.array([3]), np.array([4])]})
        assert replay.priority.tolist() == expected


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_importance_weights_are_relative_to_the_largest_of_a_game_in_a_batch(beta):
    replay, games = replay_with([1.0, 0.0, 2.0, 4.0, 8.0], [32.0, 64.0, 64.0])
    rows, weight = sample(replay, games, [3, 2], 5, 0.6, beta, np.random.default_rng(0))
    for columns in (slice(0, 3), slice(3, 5)):
        # P ~ priority^0.6; (N P_i)^-beta / max = (priority_i / smallest)^(-0.6 beta): N and the sum cancel
        priority = replay.priority[rows[:, columns]]
        expected = (priority / priority.min(axis=1, keepdims=True)) ** (-0.6 * beta)
        np.testing.assert_allclose(weight[:, columns], expected, rtol=1e-6)


# --- datasets


def test_datasets_bring_streams_back_bit_by_bit(tmp_path):
    sources = [random_stream(n, seed=n) for n in (13, 16, 21)]  # chunks are of 8 frames
    datasets = []
    for i, source in enumerate(sources):
        save_dataset(f"{tmp_path}/{i}.npz", source, slice(0, len(source.action)), f"toy_env:Catch-v{i}")
        datasets.append(read_dataset(f"{tmp_path}/{i}.npz"))
    datasets[1] |= {"policy": sources[1].policy, "value": sources[1].value}  # as read_teacher does
    replay, games = make_replay(datasets, 7, torch.device("cpu"))
    assert [game.rows for game in games] == [slice(0, 13), slice(13, 29), slice(29, 50)]
    assert [game.env_id for game in games] == ["toy_env:Catch-v0", "toy_env:Catch-v1", "toy_env:Catch-v2"]
    for game, source in zip(games, sources, strict=True):
        assert torch.equal(replay.frames[game.rows], source.frames) and game.legal.all()
        for name in ("action", "reward", "acted", "end", "age"):
            np.testing.assert_array_equal(getattr(replay, name)[game.rows], getattr(source, name))
        np.testing.assert_array_equal(replay.priority[game.rows], source.acted)
    np.testing.assert_array_equal(replay.policy[13:29], sources[1].policy)
    np.testing.assert_array_equal(replay.value[13:29], sources[1].value)
    assert len(replay.action) == 57 and not replay.acted[50:].any() and not replay.priority[50:].any()
