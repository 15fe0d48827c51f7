"""The diagnostics say what they are documented to say: on answers whose quality is known."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_mcts import DISCOUNT, World, random_legal, softmax
from test_targets import random_stream, slow_targets

import mcts
from finetune import Game, log_diagnostics

ARGS = SimpleNamespace(unroll_steps=3, td_steps=50, gamma=0.5, clip_rewards=True)
N, A = 90, 18


def test_a_prediction_is_what_a_search_is_told_one_state_at_a_time():
    world, legal, rng = World(5), random_legal(1, 5)[0], np.random.default_rng(0)
    action = rng.integers(5, size=(7, 8))  # 8 steps: the LSTM starts again after the fifth
    found = mcts.Search(world, 4, 7, discount=DISCOUNT).predict(torch.arange(7), action, legal)
    for i in range(7):
        root, value, logits = world.search_root(torch.tensor([i]))
        start = world.initial_lstm_state(1, root)
        for a in range(5):
            _, _, reward, next_value, _ = world.search_leaf(root, torch.tensor([a]), start, torch.tensor([1]))
            assert found.q[i, a] == pytest.approx((reward + DISCOUNT * next_value).item(), rel=1e-5)
        latent, state, values, prefixes = root, start, [value], []
        for j in range(8):
            state = start if j in (0, 5) else state
            depth = torch.tensor([j + 1])
            latent, state, prefix, value, _ = world.search_leaf(latent, torch.tensor([action[i, j]]), state, depth)
            values.append(value)
            prefixes.append(prefix)
        np.testing.assert_allclose(found.value[i], torch.cat(values), rtol=1e-5)
        np.testing.assert_allclose(found.value_prefix[i], torch.cat(prefixes), rtol=1e-5)
        np.testing.assert_allclose(found.prior[i], softmax(np.where(legal, logits[0].numpy(), -np.inf)), rtol=1e-5)


def diagnose(noise, offset=0):
    """What is logged of a network that knows what happens, but for `noise` times a standard deviation and `offset`."""
    replay, rng = random_stream(N, seed=1), np.random.default_rng(0)
    rows = np.flatnonzero(replay.acted)
    n = len(rows)
    truth = [slow_targets(replay, row, 50, 3, True)[0] for row in rows]
    value, prefix = (np.array([x[name] for x in truth]) for name in ("value", "value_prefix"))
    replay.policy[:] = rng.dirichlet(np.ones(A), N)
    q = rng.normal(size=(n, A))
    q[np.arange(n), replay.action[rows]] += 10 * (value[:, 0] - value[:, 0].mean())
    value = value + offset * value.std() + noise * value.std() * rng.normal(size=value.shape)
    prefix = prefix + offset * prefix.std() + noise * prefix.std() * rng.normal(size=prefix.shape)
    prior = np.full((n, A), 1 / A)
    predict = Mock(return_value=mcts.Prediction(value, prefix, q, prior))
    search = SimpleNamespace(predict=predict, net=torch.nn.Linear(1, 1))
    writer = Mock()
    game = Game("game", slice(0, N), np.ones(A, bool))
    log_diagnostics(writer, search, replay, game, ARGS, 7, "/game")
    assert {call.args[2] for call in writer.add_scalar.call_args_list} == {7}
    logged = {call.args[0].removeprefix("diagnostics/"): call.args[1] for call in writer.add_scalar.call_args_list}
    return {key.removesuffix("/game"): value for key, value in logged.items()}, replay, rows


def test_explained_variance_is_one_for_the_truth_and_falls_with_noise():
    keys = [f"explained/value_{k}" for k in range(4)]
    keys += [f"explained/value_prefix_{k}" for k in range(1, 4)]
    perfect, noisy, bad, shifted = [diagnose(*x)[0] for x in ((0,), (0.5,), (3,), (0, 3))]
    for key in keys:
        assert perfect[key] == pytest.approx(1, abs=1e-5), key
        assert bad[key] < 0 < noisy[key] < 0.95 and shifted[key] < 0, key
    assert {key for key in perfect if "explained" in key} == set(keys)


def test_entropies_and_the_size_of_advantages():
    logged, replay, rows = diagnose(0)
    assert logged["entropy/network"] == pytest.approx(np.log(A))
    policy = replay.policy[rows]
    assert logged["entropy/search"] == pytest.approx(-(policy * np.log(policy)).sum(1).mean(), rel=1e-4)
    assert logged["advantage"] > 1


def test_rank_agreement_is_that_of_the_states_where_actions_differ():
    """With a value of 0 everywhere what is left of the surplus is the return, which Q of the action taken follows."""
    replay, rng = random_stream(N, seed=1), np.random.default_rng(0)
    rows = np.flatnonzero(replay.acted)
    n = len(rows)
    returns = np.array([slow_targets(replay, row, 50, 3, True)[0]["value"][0] for row in rows])
    replay.policy[:] = 1 / A
    scale = np.where(np.arange(n) % 2, 1.0, 0.001)[:, None]  # in every other state all actions look the same
    q = scale * rng.normal(size=(n, A))
    q[np.arange(n), replay.action[rows]] += scale[:, 0] * returns
    search = SimpleNamespace(net=torch.nn.Linear(1, 1))
    search.predict = Mock(return_value=mcts.Prediction(np.zeros((n, 4)), np.zeros((n, 3)), q, np.full((n, A), 1 / A)))
    writer = Mock()
    log_diagnostics(writer, search, replay, Game("game", slice(0, N), np.ones(A, bool)), ARGS, 7)
    logged = {call.args[0]: call.args[1] for call in writer.add_scalar.call_args_list}
    differ = np.arange(n) % 2 == 1
    advantage = q[np.arange(n), replay.action[rows]] - q.mean(1)
    ranks = [[np.sum(x < y) + np.sum(x == y) / 2 for y in x] for x in (advantage[differ], returns[differ])]
    expected = np.corrcoef(ranks)[0, 1]
    assert logged["diagnostics/rank_agreement"] == pytest.approx(expected) and expected > 0.3


def test_a_network_that_says_the_same_of_all_actions_has_no_rank_agreement():
    """Nor does it where nothing is ever paid: ties must not be ranked by the order of the rows."""
    replay, writer = random_stream(N, seed=1), Mock()
    replay.reward[:] = 0
    n = replay.acted.sum()
    said = mcts.Prediction(np.zeros((n, 4)), np.zeros((n, 3)), np.zeros((n, A)), np.full((n, A), 1 / A))
    search = SimpleNamespace(net=torch.nn.Linear(1, 1), predict=Mock(return_value=said))
    log_diagnostics(writer, search, replay, Game("game", slice(0, N), np.ones(A, bool)), ARGS, 7)
    assert "diagnostics/rank_agreement" not in {call.args[0] for call in writer.add_scalar.call_args_list}
