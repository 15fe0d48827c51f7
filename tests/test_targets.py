"""Targets: hand-written episodes laid out as tables, and random streams against slow plain Python."""

import numpy as np
import pytest
import torch

import pretrain_teacher
from finetune import td_steps_by_age
from pretrain_teacher import (
    GAME_OVER,
    LIFE_LOST,
    TIME_LIMIT,
    Replay,
    make_targets,
    stack_frames,
    take_batch,
    take_samples,
)


def replay_of(reward, end, acted):
    """One stream. The first pixel of frame i is the number i; state i has value 10 * i and a random policy."""
    n = len(reward)
    rng = np.random.default_rng(n)
    replay = Replay(n)
    replay.frames[:] = torch.from_numpy(rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8))
    replay.frames[:, :, 0, 0] = torch.arange(n, dtype=torch.uint8).view(-1, 1)
    replay.reward[:], replay.end[:], replay.acted[:] = reward, end, acted
    replay.action[:] = rng.integers(18, size=n)
    replay.policy[:] = rng.dirichlet(np.ones(18), n)
    replay.value[:] = 10 * np.arange(n)
    for i in range(1, n):
        replay.age[i] = 0 if replay.end[i - 1] == LIFE_LOST or not replay.acted[i - 1] else replay.age[i - 1] + 1
    return replay


def test_targets_at_every_kind_of_end():
    #  row       0   1   2 | 3   4   5 | 6   7 | 8   9     action 2 loses a life, action 4 the game, action 6 meets the
    #  reward   +1  -1  +1 | 0  +1   - |+1   - |-1   -     time limit; rows 5, 7 are last frames, row 9 is the newest
    end = [0, 0, LIFE_LOST, 0, GAME_OVER, 0, TIME_LIMIT, 0, 0, 0]
    replay = replay_of([1, -1, 1, 0, 1, 0, 1, 0, -1, 0], end, [1, 1, 1, 1, 1, 0, 1, 0, 1, 0])
    roots, td_steps = np.array([[0, 2, 3, 6, 8]]), np.full((1, 5), 2)
    targets = make_targets(replay, roots, td_steps, 2, 0.5, True, np.random.default_rng(0))
    # z_k = r_k + r_k+1 / 2 + v_k+2 / 4, up to the end: terminal states have value 0, the newest is bootstrapped from
    value = [[1 - 0.5 + 20 / 4, -1 + 0.5, 1], [1, 0, 0], [0.5, 1, 0], [1, 0, 0], [-1 + 90 / 2, 90, 0]]
    np.testing.assert_allclose(targets["value"], [value])
    np.testing.assert_array_equal(targets["mask"], [[[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]]])
    np.testing.assert_array_equal(targets["value_prefix"], [[[1, 0], [1, 1], [0, 1], [1, 1], [-1, -1]]])
    p, none = replay.policy, np.zeros(18)
    policy = [p[:3], [p[2], none, none], [p[3], p[4], none], [p[6], none, none], [p[8], p[9], none]]
    np.testing.assert_array_equal(targets["policy"], [policy])


def test_td_by_age_at_100k_and_at_2000_transitions():
    td = td_steps_by_age(100_000 - np.arange(100_000), 100_000, 5)  # position 0 is the oldest
    steps, counts = np.unique(td, return_counts=True)
    np.testing.assert_array_equal(steps, [2, 3, 4, 5])
    np.testing.assert_array_equal(counts, [10_001, 30_000, 30_000, 29_999])
    assert (td[-29_999:] == 5).all() and td[0] == 2
    assert (td_steps_by_age(2_000 - np.arange(2_000), 100_000, 5) == 5).all()
    assert td_steps_by_age(np.array([10**9]), 100_000, 5) == 1


def test_stacks_repeat_an_episodes_first_frame_and_targets_its_last(monkeypatch):
    monkeypatch.setattr(pretrain_teacher.model, "augment", lambda frames, generator: frames)
    #  row      0 1 2 3 | 4 5      row 3's action loses a life: row 4 is the last frame of one and the first of the next
    replay = replay_of(np.zeros(6), [0, 0, 0, LIFE_LOST, 0, 0], [1, 1, 1, 1, 1, 0])
    roots = np.array([[4, 4, 4], [0, 2, 4]])
    batches = make_targets(replay, roots, np.full((2, 3), 1), 3, 0.5, True, np.random.default_rng(0))
    batches = {name: torch.from_numpy(x) for name, x in batches.items()} | {"weight": torch.arange(6.0).view(2, 3)}
    batch = take_batch(replay, take_samples(replay, batches, 1, torch.device("cpu")), torch.Generator())
    np.testing.assert_array_equal(batch.obs[:, ::3, 0, 0], [[0, 0, 0, 0], [0, 0, 1, 2], [4, 4, 4, 4]])
    np.testing.assert_array_equal(batch.obs, stack_frames(replay, roots[1]))
    # frames o_t-2 .. o_t+3: the stack of o_t+k is columns k-1 .. k+2; past the end the last frame is repeated
    expected = [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 4], [4, 4, 4, 5, 5, 5]]
    np.testing.assert_array_equal(batch.target_obs[:, ::3, 0, 0], expected)
    assert all(torch.equal(getattr(batch, name), x[1]) for name, x in batches.items() if name != "frames")


def random_stream(n, seed):
    """About one action of six ends a life, a game or its time; a finished game's last frame is not acted on."""
    rng = np.random.default_rng(seed)
    end, acted = np.zeros(n, int), np.arange(n) < n - 1
    for i in range(n - 2):
        if acted[i] and rng.random() < 0.16:
            end[i] = rng.integers(1, 4)
            acted[i + 1] = end[i] == LIFE_LOST
    return replay_of(rng.normal(0, 100, n), end, acted)


def slow_targets(replay, root, td, K, clip_rewards, gamma=0.5):
    """The targets of one sample, a state at a time."""
    path, rewards, terminal = [root], [], None  # rows of the states that exist; number of the terminal one
    while terminal is None and replay.acted[path[-1]]:
        reward = replay.reward[path[-1]]
        rewards.append(np.sign(reward) if clip_rewards else reward)
        if replay.end[path[-1]]:
            terminal = len(path)
        path.append(path[-1] + 1)
    targets = {"mask": [], "policy": [], "value": [], "value_prefix": []}
    for k in range(K + 1):
        n = max(0, min(td, len(rewards) - k))
        value = sum(gamma**i * rewards[k + i] for i in range(n))
        if k < len(path) and k + n != terminal:
            value += gamma**n * replay.value[path[k + n]]
        targets["mask"].append(k < len(path))
        targets["policy"].append(replay.policy[path[k]] if k < len(path) and k != terminal else np.zeros(18))
        targets["value"].append(value)
        if k > 0:
            targets["value_prefix"].append(sum(rewards[(k - 1) // 5 * 5 : k]))  # starts again every 5 steps
    past = [max(root - back, root - replay.age[root]) for back in (3, 2, 1)]
    targets["frames"] = past + [path[min(k, len(path) - 1)] for k in range(K + 1)]
    return targets, replay.action[path[: min(K, len(rewards))]]


@pytest.mark.parametrize("K, clip_rewards", [(1, True), (5, True), (5, False), (12, True)])
def test_targets_are_those_of_slow_python(K, clip_rewards):
    replay = random_stream(200, seed=K)
    rng = np.random.default_rng(K)
    roots = rng.choice(np.flatnonzero(replay.acted), (3, 50))
    td_steps = rng.integers(1, 6, roots.shape)
    targets = make_targets(replay, roots, td_steps, K, 0.5, clip_rewards, rng)
    for place in np.ndindex(*roots.shape):
        expected, actions = slow_targets(replay, roots[place], td_steps[place], K, clip_rewards)
        for name, x in expected.items():
            np.testing.assert_allclose(targets[name][place], x, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(targets["action"][place][: len(actions)], actions)
    assert targets["action"].min() >= 0 and targets["action"].max() < 18  # those past the end are random
    assert set(replay.end[roots.ravel()]) == {0, LIFE_LOST, GAME_OVER, TIME_LIMIT}
