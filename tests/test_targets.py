"""Targets on hand-written episodes, laid out as tables; td = 2, K = 2 and gamma = 0.5 unless said."""

import numpy as np
import pytest
import torch

from finetune import td_steps_by_age
from model import EfficientZeroNet, ModelConfig, inference_copy
from pretrain_teacher import (
    GAME_OVER,
    LIFE_LOST,
    TIME_LIMIT,
    Replay,
    make_batch,
    make_targets,
    reanalyze,
    run_search,
    stack_frames,
)


def replay_of(reward, end, acted=None, num_envs=1):
    """A replay whose frame i is filled with the number i."""
    n = len(reward)
    replay = Replay(n, num_envs, "cpu")
    replay.size = n
    replay.frames[:] = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1)
    replay.reward[:], replay.end[:] = reward, end
    replay.acted[:] = True if acted is None else acted
    replay.action[:] = np.arange(n) % 18
    age = np.zeros(num_envs, int)
    for i in range(n):
        env = i % num_envs
        replay.age[i] = age[env]
        age[env] = 0 if end[i] == LIFE_LOST or not replay.acted[i] else age[env] + 1
    return replay


def values(replay, rows, v, td=2, K=2, g=0.5):
    """z [B, K+1] with the bootstrap value v[row]."""
    targets = make_targets(replay, np.array(rows), np.full(len(rows), td), K, g)
    return targets.reward_sum + targets.bootstrap_discount * np.asarray(v, float)[targets.bootstrap_rows], targets


def test_values_over_a_life_loss():
    #  row       0   1   2 | 3   4   5      the action of row 2 loses a life; row 3 is the next episode's first frame
    #  reward   +1   0  +1 | +1  +1  -
    replay = replay_of([1, 0, 1, 1, 1, 0], [0, 0, LIFE_LOST, 0, 0, 0], [1, 1, 1, 1, 1, 0])
    z, targets = values(replay, [0, 2], v=[10, 20, 30, 40, 50, 60])
    # z_0 = r0 + .5 r1 + .25 v(2);  z_1 = r1 + .5 r2, terminal: no v;  z_2 = r2
    np.testing.assert_allclose(z[0], [1 + 0.25 * 30, 0.5, 1])
    # from row 2: z_0 = r2; state 1 is terminal (0, but it exists), state 2 does not exist
    np.testing.assert_allclose(z[1], [1, 0, 0])
    np.testing.assert_array_equal(targets.exists[1], [True, True, False])
    np.testing.assert_array_equal(targets.alive[1], [True, False, False])


@pytest.mark.parametrize("end", [GAME_OVER, TIME_LIMIT])
def test_values_over_game_over_and_time_limit(end):
    #  row       0   1   2 | 3   4          the action of row 1 ends the game; row 2 is its last frame; row 3 a new game
    #  acted     1   1   0 | 1   0
    replay = replay_of([1, -1, 0, 1, 0], [0, end, 0, 0, 0], [1, 1, 0, 1, 0])
    z, targets = values(replay, [0, 3], v=[10, 20, 30, 40, 50])
    np.testing.assert_allclose(z[0], [1 - 0.5, -1, 0])  # the last frame's value is never asked for
    np.testing.assert_array_equal(targets.exists[0], [True, True, True])
    # the stream's newest frame, row 4, is not terminal: it is bootstrapped from, one step early
    np.testing.assert_allclose(z[1], [1 + 0.5 * 50, 50, 0])
    np.testing.assert_array_equal(targets.exists[1], [True, True, False])


def test_values_of_a_long_stream_and_side_by_side_environments():
    #  environment 0 holds rows 0 2 4 6 8, environment 1 rows 1 3 5 7 9; both go on
    reward = np.array([1, -1, 0, 1, 1, 0, 0, 1, 0, 0])
    replay = replay_of(reward, np.zeros(10), [1] * 8 + [0] * 2, num_envs=2)
    z, targets = values(replay, [0, 1], v=np.arange(10) * 10)
    np.testing.assert_array_equal(targets.rows, [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_allclose(z[0], [1 + 0 + 0.25 * 40, 0 + 0.5 + 0.25 * 60, 1 + 0 + 0.25 * 80])
    np.testing.assert_allclose(z[1], [-1 + 0.5 + 0.25 * 50, 1 + 0 + 0.25 * 70, 0 + 0.5 + 0.25 * 90])
    np.testing.assert_array_equal(targets.value_prefix, [[1, 1], [-1, 0]])


def test_rewards_are_clipped_to_their_sign():
    replay = replay_of([400, -7, 0.5, 0], np.zeros(4), [1, 1, 1, 0])
    _, targets = values(replay, [0], v=np.zeros(4))
    np.testing.assert_allclose(targets.reward_sum[0], [1 - 0.5, -1 + 0.5, 1])


def test_each_sample_has_its_own_td():
    replay = replay_of(np.ones(9), np.zeros(9))
    targets = make_targets(replay, np.array([0, 0]), np.array([1, 3]), 2, 0.5)
    np.testing.assert_array_equal(targets.bootstrap_rows, [[1, 2, 3], [3, 4, 5]])
    np.testing.assert_allclose(targets.bootstrap_discount[:, 0], [0.5, 0.125])
    np.testing.assert_allclose(targets.reward_sum[:, 0], [1, 1.75])


def test_value_prefix_is_undiscounted_held_past_the_end_and_restarts_after_5_steps():
    replay = replay_of(np.ones(12), np.zeros(12))
    prefix = make_targets(replay, np.array([0]), np.array([1]), 11, 0.5).value_prefix
    np.testing.assert_array_equal(prefix[0], [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1])
    replay = replay_of([1, 1, 0, 1], [0, GAME_OVER, 0, 0], [1, 1, 0, 1])
    prefix = make_targets(replay, np.array([0]), np.array([2]), 4, 0.5).value_prefix
    np.testing.assert_array_equal(prefix[0], [1, 2, 2, 2])


def test_td_by_age_at_100k_and_at_2000_transitions():
    td = td_steps_by_age(100_000 - np.arange(100_000), 100_000, 5)  # position 0 is the oldest
    steps, counts = np.unique(td, return_counts=True)
    np.testing.assert_array_equal(steps, [2, 3, 4, 5])
    np.testing.assert_array_equal(counts, [10_001, 30_000, 30_000, 29_999])
    assert (td[-29_999:] == 5).all() and td[0] == 2
    assert (td_steps_by_age(2_000 - np.arange(2_000), 100_000, 5) == 5).all()


def test_stacks_repeat_the_first_frame_also_after_a_life_loss():
    replay = replay_of(np.zeros(8), [0, 0, 0, 0, LIFE_LOST, 0, 0, 0])
    stacks = stack_frames(replay, np.array([0, 1, 4, 5, 6]))  # [5, 12, 96, 96]
    assert stacks.shape == (5, 12, 96, 96)
    np.testing.assert_array_equal(
        stacks[:, ::3, 0, 0], [[0, 0, 0, 0], [0, 0, 0, 1], [1, 2, 3, 4], [5, 5, 5, 5], [5, 5, 5, 6]]
    )


def identity(frames, generator):
    return frames.float()


def test_frames_of_a_batch_at_starts_and_ends(monkeypatch):
    monkeypatch.setattr("model.augment", identity)
    #  row      0 1 2 3 | 4 5      row 3's action loses a life: row 4 is the last frame of one and the first of the next
    replay = replay_of(np.zeros(6), [0, 0, 0, LIFE_LOST, 0, 0], [1, 1, 1, 1, 1, 0])
    targets = make_targets(replay, np.array([0, 2, 4]), np.full(3, 1), 3, 0.5)
    policy, value = np.zeros((3, 4, 18)), np.zeros((3, 4))
    batch = make_batch(replay, targets, policy, value, np.ones(3), np.random.default_rng(0), None)
    np.testing.assert_array_equal(batch.obs[:, ::3, 0, 0], [[0, 0, 0, 0], [0, 0, 1, 2], [4, 4, 4, 4]])
    # frames o_t-2 .. o_t+3: the stack of o_t+k is columns k-1 .. k+2; past the end the last frame is repeated
    np.testing.assert_array_equal(
        batch.target_obs[:, ::3, 0, 0], [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 4], [4, 4, 4, 5, 5, 5]]
    )
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.action[0], [0, 1, 2])
    np.testing.assert_array_equal(batch.action[1, :2], [2, 3])
    assert batch.action[2, 0] == 4 and batch.action.max() < 18


class CountingNet:
    """Its value of a state is 10 times the number of the newest frame; its search visits that action only."""

    def __init__(self, monkeypatch):
        self.searched, self.encoded, self.calls = [], [], 0  # encoded: for their values only
        monkeypatch.setattr("pretrain_teacher.run_search", self.search)

    def search(self, net, env_id, obs, legal, num_simulations, rng, noise, rank=0, W=1):
        assert env_id == "A"  # named if something is not finite
        frame, n = obs[:, 9, 0, 0].numpy().astype(int), len(legal)
        self.searched += frame[:n].tolist()
        self.encoded += frame[n:].tolist()
        self.calls += 1
        assert noise and legal.shape[1:] == (18,)
        visits = np.zeros((n, 18), np.int32)
        visits[np.arange(n), frame[:n]] = num_simulations
        return type("Result", (), {"visits": visits}), 10 * frame


def test_reanalyze_searches_each_living_state_once_per_target_network(monkeypatch):
    net = CountingNet(monkeypatch)
    replay = replay_of([1, 0, 1, 1, 1, 0], [0, 0, LIFE_LOST, 0, 0, 0], [1, 1, 1, 1, 1, 0])
    legal = np.ones(18, bool)
    targets = make_targets(replay, np.array([0, 1, 1]), np.full(3, 2), 2, 0.5)
    policy, value, result = reanalyze(net, 1, "A", replay, targets, legal, 5, None, cache=True)
    assert result is not None
    assert sorted(net.searched) == [0, 1, 2] and net.encoded == []  # row 2's value came with its search
    batch = make_batch(replay, targets, policy, value, np.ones(3), np.random.default_rng(0), torch.Generator())
    np.testing.assert_allclose(batch.value, [[1 + 0.25 * 20, 0.5, 1], [0.5, 1, 0], [0.5, 1, 0]])
    np.testing.assert_array_equal(batch.policy.argmax(-1), [[0, 1, 2], [1, 2, 0], [1, 2, 0]])
    np.testing.assert_array_equal(batch.policy.sum(-1), [[1, 1, 1], [1, 1, 0], [1, 1, 0]])  # terminal: all zero
    # the same network again: nothing to do; rows 3 and 4 are new to it, row 5 is only bootstrapped from
    again = reanalyze(net, 1, "A", replay, targets, legal, 5, None, cache=True)
    assert again[2] is None and net.calls == 1
    np.testing.assert_array_equal(again[0], policy)
    np.testing.assert_array_equal(again[1], value)
    targets = make_targets(replay, np.array([3]), np.full(1, 2), 1, 0.5)
    reanalyze(net, 1, "A", replay, targets, legal, 5, None, cache=True)
    assert sorted(net.searched) == [0, 1, 2, 3, 4] and net.encoded == [5]
    # the next network: everything that the batch needs is stale
    reanalyze(net, 2, "A", replay, targets, legal, 5, None, cache=True)
    assert sorted(net.searched) == [0, 1, 2, 3, 3, 4, 4] and net.encoded == [5, 5]
    assert net.calls == 3  # states to search and states to value go through the network together


def test_without_the_cache_each_sample_is_searched_for_itself(monkeypatch):
    net = CountingNet(monkeypatch)
    replay = replay_of([1, 0, 1, 1, 1, 0], [0, 0, LIFE_LOST, 0, 0, 0], [1, 1, 1, 1, 1, 0])
    targets = make_targets(replay, np.array([0, 1, 1]), np.full(3, 2), 2, 0.5)
    for _ in range(2):  # the second time everything is fresh
        net.searched, net.encoded = [], []
        policy, value, _ = reanalyze(net, 1, "A", replay, targets, np.ones(18, bool), 5, None, cache=False)
        assert sorted(net.searched) == [0, 1, 1, 1, 2, 2, 2] and net.encoded == [2]  # one bootstrap, of state 0
    np.testing.assert_array_equal(policy.argmax(-1), [[0, 1, 2], [1, 2, 0], [1, 2, 0]])
    np.testing.assert_array_equal(policy.sum(-1), [[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    assert value[0, 0] == 20


@pytest.mark.parametrize("place", ["policy", "value", "latent"])
def test_a_search_that_is_not_finite_names_its_game(place):
    net = EfficientZeroNet(ModelConfig.of_width(4, 1))
    layer = {"policy": net.prediction.policy[-1], "value": net.prediction.value[-1], "latent": net.dynamics.conv[1]}
    torch.nn.init.constant_(layer[place].bias, torch.nan)
    obs = torch.zeros(2, 12, 96, 96, dtype=torch.uint8)
    with pytest.raises(FloatingPointError) as error:
        run_search(inference_copy(net), "Hero", obs, np.ones((2, 18), bool), 3, np.random.default_rng(0), noise=True)
    what, tensors = error.value.args
    assert (
        what.startswith("the value of a state of Hero" if place == "value" else "the search of Hero (")
        and "\n" not in what
        and tensors["obs"] is obs
    )
