"""Tests of mcts.py. `Node` and `search_one_root` below are the specification: a slow tree of plain Python objects."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mcts

DISCOUNT = 0.997**4
GOLDEN = np.load(Path(__file__).parent / "data" / "search_cases.npz")
FIELDS = ("root_logits", "noise", "noise_frac", "value_prefix", "value", "policy_logits", "expected_visits",
          "expected_root_values", "expected_leaf_parent", "expected_leaf_action", "expected_leaf_depth")  # fmt: skip


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


# golden cases


def golden_case(name):
    case = {field: GOLDEN[f"{name}/{field}"] for field in FIELDS}
    root_prior = softmax(case["root_logits"]) * (1 - case["noise_frac"]) + case["noise"] * case["noise_frac"]
    tree = mcts.make_tree(root_prior, np.ones(root_prior.shape, bool), len(case["value"]), discount=DISCOUNT)
    return case, tree


def check_leaf(case, s, leaf):
    for name, array in zip(("parent", "action", "depth"), leaf, strict=True):
        np.testing.assert_array_equal(array, case[f"expected_leaf_{name}"][s], err_msg=f"{name} in simulation {s}")


def check_root(case, tree):
    S = len(case["value"])
    np.testing.assert_array_equal(tree.edges[mcts.ROOT, :, mcts.VISITS], case["expected_visits"])
    np.testing.assert_allclose(tree.nodes.value_sum[mcts.ROOT] / (S + 1), case["expected_root_values"], rtol=1e-5)


def run_golden(name, threads=1):
    case, tree = golden_case(name)
    for s in range(len(case["value"])):
        check_leaf(case, s, mcts.traverse(tree, s, threads))
        prior = softmax(case["policy_logits"][s])
        mcts.expand_and_backup(tree, s, case["value_prefix"][s], case["value"][s], prior, threads)
    check_root(case, tree)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_golden(name, threads):
    run_golden(name, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_golden_with_backup_and_traversal_in_one_call(name, threads):
    case, tree = golden_case(name)
    S = len(case["value"])
    mcts.traverse(tree, 0, threads)
    for s in range(S):
        check_leaf(case, s, tree.leaf)
        columns = (case["value_prefix"][s], case["value"][s], softmax(case["policy_logits"][s]))
        mcts.run_step(tree, s, np.column_stack(columns), True, s + 1 < S, threads)
    check_root(case, tree)


def test_golden_without_jit():
    root = Path(__file__).parent.parent
    code = "from tests.test_mcts import run_golden; run_golden('peaked_A3_S50_B8')"
    code = f"import sys; sys.path[:0] = [{str(root)!r}]\n{code}\nimport mcts; assert not hasattr(mcts.step, 'py_func')"
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# the formulas


@pytest.mark.parametrize(("t", "rate"), [(0, 1.250051), (1, 1.250102), (10, 1.250560), (49, 1.252541)])
def test_exploration_rate(t, rate):
    assert mcts.exploration_rate(t) == pytest.approx(rate, abs=1e-6)
    assert mcts.exploration_rate(np.arange(3)).dtype == np.float32


def test_edge_reward_recovers_rewards_from_prefixes():
    # rewards 1, 0, 3 along root -> a -> b -> c, horizon 2: b is reset
    prefix = np.array([0, 1, 1, 3], np.float32)
    is_reset = [False, False, True]
    assert [mcts.edge_reward(is_reset[i], prefix[i], prefix[i + 1]) for i in range(3)] == [1, 0, 3]


def test_mean_q_counts_the_parent_as_one_more_sample_except_at_the_root():
    q_sum, parent = np.float32(6), np.float32(3)
    assert mcts.mean_q(q_sum, 2, parent, False) == 3
    assert mcts.mean_q(q_sum, 2, parent, True) == 3
    assert mcts.mean_q(np.float32(9), 2, parent, False) == 4
    assert mcts.mean_q(np.float32(9), 2, parent, True) == 4.5
    assert mcts.mean_q(np.float32(0), 0, parent, False) == 3
    assert mcts.mean_q(np.float32(0), 0, np.float32(0), True) == 0


def test_normalize():
    f = np.float32
    assert mcts.normalize(f(2), f(1), f(5)) == 0.25
    assert mcts.normalize(f(9), f(1), f(5)) == 1 and mcts.normalize(f(-9), f(1), f(5)) == 0
    assert mcts.normalize(f(1.001), f(1), f(1.002)) == pytest.approx(0.1, abs=1e-4)  # the range is at least 0.01
    assert mcts.normalize(f(0.3), f(0.7), f(0.7)) == f(0.3)  # one value seen: left alone, but clamped
    assert mcts.normalize(f(7), f(np.inf), f(-np.inf)) == 1


def test_ucb_score():
    args = [np.float32(x) for x in (1.25, 3, 2, 0.5, 0.25)]
    assert mcts.ucb_score(*args) == pytest.approx(1.25 * 3 / 3 * 0.5 + 0.25)


# search against the specification


class Node:
    def __init__(self, prior, latent, h, c, prefix=0.0, reset=False):
        self.prior, self.latent, self.h, self.c = prior, latent, h, c
        self.prefix, self.reset = prefix, reset
        self.children = {}
        self.visits, self.value_sum = 1, 0.0

    def q(self, action):
        child = self.children[action]
        reward = child.prefix if self.reset else child.prefix - self.prefix
        return reward + DISCOUNT * child.value_sum / child.visits


def all_q(node):
    return [q for a, child in node.children.items() for q in (node.q(a), *all_q(child))]


def choose(node, is_root, parent_mean, values):
    """The best action of `prior`, a dict over legal actions, and the node's mean q."""
    qs = [node.q(a) for a in node.children]
    mean = sum(qs) / len(qs) if is_root and qs else (parent_mean + sum(qs)) / (len(qs) + 1)
    t, best, best_score = node.visits - 1, None, -math.inf
    for action in sorted(node.prior):
        x = node.q(action) if action in node.children else mean
        if values and max(values) > min(values):
            x = (x - min(values)) / max(max(values) - min(values), 0.01)
        visits = node.children[action].visits if action in node.children else 0
        rate = math.log((t + 19652 + 1) / 19652) + 1.25
        score = rate * math.sqrt(t) / (visits + 1) * node.prior[action] + min(max(x, 0), 1)
        if score > best_score + 1e-6:
            best, best_score = action, score
    return best, mean


def search_one_root(recurrent, latent, prior, legal, S, lstm_size):
    """Visits [A], sum of returns / S and deepest leaf of one root, ties to the lowest action."""
    zeros = torch.zeros(1, lstm_size)
    root = Node({a: float(prior[a]) for a in np.flatnonzero(legal)}, latent, zeros, zeros)
    deepest = 0
    for _ in range(S):
        node, path, mean, values = root, [], 0.0, all_q(root)
        while node is not None:
            action, mean = choose(node, node is root, mean, values)
            path.append((node, action))
            node = node.children.get(action)
        parent, action = path[-1]
        deepest = max(deepest, len(path))
        latent, (h, c), prefix, value, logits = recurrent(parent.latent, torch.tensor([action]), (parent.h, parent.c))
        reset = len(path) % 5 == 0
        masked = np.where(legal, logits[0].numpy(), -np.inf)
        prior = {a: float(p) for a, p in enumerate(softmax(masked)) if legal[a]}
        child = Node(prior, latent, zeros if reset else h, zeros if reset else c, float(prefix), reset)
        parent.children[action] = child
        child.value_sum = ret = float(value)
        for node, action in reversed(path):
            child = node.children[action]
            ret = (child.prefix if node.reset else child.prefix - node.prefix) + DISCOUNT * ret
            node.value_sum += ret
            node.visits += 1
    visits = [root.children[a].visits if a in root.children else 0 for a in range(len(legal))]
    return visits, root.value_sum / S, deepest


C, L = 4, 6


def network(A, seed=0):
    """A random recurrent network whose value prefix depends on the LSTM state."""
    g = torch.Generator().manual_seed(seed)
    w_action, w_latent = torch.randn(A, C, generator=g), torch.randn(C, C, generator=g)
    w_h, w_x = torch.randn(L, L, generator=g) * 0.5, torch.randn(C, L, generator=g)
    w_prefix, w_value, w_policy = (torch.randn(n, m, generator=g) for n, m in ((L, 1), (C, 1), (C, A)))

    def recurrent(latent, action, state):
        h, c = state
        x = torch.tanh(latent.mean((2, 3)) @ w_latent + w_action[action])  # [B, C]
        c = 0.5 * c + torch.tanh(x @ w_x + h @ w_h)
        h = torch.tanh(c)
        outputs = (h @ w_prefix)[:, 0], (x @ w_value)[:, 0], x @ w_policy * 2
        return x[:, :, None, None].expand(latent.shape), (h, c), *outputs

    return recurrent


def roots(B, A, seed=0):
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    legal = rng.random((B, A)) < 0.6
    legal[np.arange(B), rng.integers(A, size=B)] = True
    return torch.randn(B, C, 2, 2, generator=g), torch.randn(B, A, generator=g), legal


def stub(A, value=0.0, value_prefix=0.0):
    """A recurrent function with constant outputs."""

    def recurrent(latent, action, state):
        B = len(latent)
        return latent, state, torch.full((B,), value_prefix), torch.full((B,), value), torch.zeros(B, A)

    return recurrent


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_noise", [False, True])
def test_search_equals_the_specification(masked, with_noise):
    B, A, S = 12, 5, 40
    latent, logits, legal = roots(B, A)
    legal = legal if masked else np.ones_like(legal)
    noise = mcts.dirichlet_noise(np.random.default_rng(1), legal) if with_noise else None
    result = mcts.search(network(A), latent, logits, legal, S, lstm_size=L, noise=noise)
    for b in range(B):
        prior = softmax(np.where(legal[b], logits[b].numpy(), -np.inf))
        prior = prior if noise is None else 0.75 * prior + 0.25 * noise[b]
        visits, value, depth = search_one_root(network(A), latent[b : b + 1], prior, legal[b], S, L)
        np.testing.assert_array_equal(result.visits[b], visits)
        assert result.root_value[b] == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert result.depth[b] == depth
    assert result.depth.max() > 5  # the value-prefix reset took part


def test_result_types():
    result = mcts.search(network(4), *roots(3, 4), 7, lstm_size=L)
    assert result.visits.shape == (3, 4) and result.visits.dtype == np.int32
    assert result.root_value.shape == (3,) and result.root_value.dtype == np.float32
    assert result.depth.shape == (3,)


def test_search_leaves_its_arguments_alone():
    latent, logits, legal = roots(3, 4)
    seeds = np.arange(3, dtype=np.uint64)
    before = latent.clone(), logits.clone(), legal.copy()
    mcts.search(network(4), latent, logits, legal, 7, lstm_size=L, seeds=seeds)
    assert torch.equal(latent, before[0]) and torch.equal(logits, before[1])
    assert (legal == before[2]).all() and (seeds == np.arange(3)).all()


def test_latents_and_states_keep_the_type_of_the_root():
    latent, logits, legal = roots(3, 4)
    seen = set()

    def recurrent(latent, action, state):
        seen.update((latent.dtype, state[0].dtype, state[1].dtype))
        return stub(4)(latent, action, state)

    mcts.search(recurrent, latent.bfloat16(), logits.bfloat16(), legal, 7, lstm_size=L)
    assert seen == {torch.bfloat16}


# independence and randomness


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_roots_of_a_batch_do_not_influence_each_other():
    B, A, S = 8, 6, 30
    latent, logits, legal = roots(B, A)
    noise, seeds = mcts.dirichlet_noise(np.random.default_rng(1), legal), np.arange(B, dtype=np.uint64)

    def recurrent(*args):  # row by row: a matrix product may round a row differently in another batch
        rows = [network(A)(args[0][i : i + 1], args[1][i : i + 1], [x[i : i + 1] for x in args[2]])
                for i in range(len(args[0]))]  # fmt: skip
        latent, states, *outputs = zip(*rows, strict=True)
        return torch.cat(latent), [torch.cat(x) for x in zip(*states, strict=True)], *map(torch.cat, outputs)

    batch = mcts.search(recurrent, latent, logits, legal, S, lstm_size=L, noise=noise, seeds=seeds)
    for b in range(B):
        i = slice(b, b + 1)
        alone = mcts.search(recurrent, latent[i], logits[i], legal[i], S, lstm_size=L, noise=noise[i], seeds=seeds[i])
        assert same(alone, [x[i] for x in batch])


def test_seeds_fix_the_search():
    latent, logits, legal = roots(16, 6)
    legal[:] = True
    run = lambda first: mcts.search(network(6), latent, logits, legal, 20, lstm_size=L,  # noqa: E731
                                    seeds=np.arange(first, first + 16, dtype=np.uint64))  # fmt: skip
    assert same(run(0), run(0))
    assert not same(run(0), run(100))


def test_threads_do_not_change_the_search(monkeypatch):
    monkeypatch.setattr(mcts, "PARALLEL_MIN_ROOTS", 1)
    before = mcts.numba.get_num_threads()
    latent, logits, legal = roots(64, 6)
    args = network(6), latent, logits, legal, 20
    seeds = np.arange(64, dtype=np.uint64)
    one, two = (mcts.search(*args, lstm_size=L, seeds=seeds, threads=threads) for threads in (1, 2))
    assert same(one, two)
    assert mcts.numba.get_num_threads() == before


def test_first_simulation_is_uniform_over_legal_actions_whatever_the_prior():
    B, A = 4000, 5
    legal = np.tile([True, False, True, True, True], (B, 1))
    prior = np.tile(np.float32([0.97, 0, 0.01, 0.01, 0.01]), (B, 1))
    tree = mcts.make_tree(prior, legal, 1, discount=DISCOUNT, seeds=np.arange(B, dtype=np.uint64))
    _, action, _ = mcts.traverse(tree, 0)
    counts = np.bincount(action, minlength=A)
    assert counts[1] == 0
    assert ((counts[legal[0]] - B / 4) ** 2 / (B / 4)).sum() < 16.3  # 99.9 % of chi-square, 3 degrees of freedom


def test_ties_after_the_first_simulation_are_broken_uniformly():
    # three unvisited actions with equal priors tie behind a visited one of value 0
    B = 4000
    tree = mcts.make_tree(np.full((B, 4), 0.25, np.float32), np.ones((B, 4), bool), 2, discount=DISCOUNT,
                          seeds=np.arange(B, dtype=np.uint64))  # fmt: skip
    _, first, _ = mcts.traverse(tree, 0)
    mcts.expand_and_backup(tree, 0, np.zeros(B), np.zeros(B), np.full((B, 4), 0.25, np.float32))
    _, second, _ = mcts.traverse(tree, 1)
    counts = np.bincount((second - first) % 4, minlength=4)
    assert counts[0] == 0
    assert ((counts[1:] - B / 3) ** 2 / (B / 3)).sum() < 13.8  # 99.9 %, 2 degrees of freedom


def test_without_seeds_the_lowest_legal_action_comes_first():
    legal = np.array([[False, True, True], [True, False, True]])
    tree = mcts.make_tree(np.full((2, 3), 0.5, np.float32), legal, 1, discount=DISCOUNT)
    assert mcts.traverse(tree, 0)[1].tolist() == [1, 0]


# masks and sizes


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("num_simulations", [1, 2, 50])
def test_illegal_actions_are_never_visited(seeded, num_simulations):
    B, A = 64, 7
    latent, logits, legal = roots(B, A)
    logits[torch.from_numpy(~legal)] = 50.0
    seeds = np.arange(B, dtype=np.uint64) if seeded else None
    noise = np.full((B, A), 1 / A)  # some on illegal actions too
    taken = []

    def recurrent(latent, action, state):
        taken.append(action)
        return network(A)(latent, action, state)

    result = mcts.search(recurrent, latent, logits, legal, num_simulations, lstm_size=L, noise=noise, seeds=seeds)
    assert (result.visits[~legal] == 0).all()
    assert (result.visits.sum(1) == num_simulations).all()
    assert all(legal[np.arange(B), action].all() for action in taken)  # inside the tree as well


def test_illegal_logits_may_be_anything():
    latent, logits, legal = roots(3, 4)
    logits[torch.from_numpy(~legal)] = torch.nan
    assert (mcts.search(network(4), latent, logits, legal, 5, lstm_size=L).visits.sum(1) == 5).all()


def test_one_root_with_one_legal_action():
    legal = np.array([[False, False, True, False]])
    seeds = np.zeros(1, np.uint64)
    result = mcts.search(network(4), torch.zeros(1, C, 2, 2), torch.zeros(1, 4), legal, 9, lstm_size=L, seeds=seeds)
    assert result.visits.tolist() == [[0, 0, 9, 0]]
    assert result.depth.tolist() == [9]  # a chain


def test_one_simulation():
    legal = np.ones((2, 3), bool)
    result = mcts.search(stub(3, value=2.0, value_prefix=0.5), torch.zeros(2, C, 2, 2), torch.zeros(2, 3), legal, 1,
                         lstm_size=L)  # fmt: skip
    assert result.visits.tolist() == [[1, 0, 0], [1, 0, 0]]
    np.testing.assert_allclose(result.root_value, 0.5 + DISCOUNT * 2)
    assert result.depth.tolist() == [1, 1]


# values


def test_root_value_is_the_mean_return():
    # every leaf is worth 10 and nothing is rewarded: a return is 10 * discount ** depth
    legal = np.ones((1, 4), bool)
    result = mcts.search(stub(4, value=10.0), torch.zeros(1, C, 2, 2), torch.zeros(1, 4), legal, 50, lstm_size=L)
    assert 10 * DISCOUNT ** result.depth[0] < result.root_value[0] < 10 * DISCOUNT + 1e-4
    assert result.root_value[0] * 50 / 51 < 10 * 50 / 51  # the same with the reference's count of S + 1


def test_best_arm_of_a_bandit_gets_most_visits():
    rewards = torch.tensor([0.1, 0.9, 0.3, 0.5])

    def recurrent(latent, action, state):
        # one step: the first action pays, below it nothing happens (prefix stays, value 0)
        first = latent[:, 0, 0, 0] < 0
        total = torch.where(first, rewards[action], latent[:, 0, 0, 0])
        latent = total[:, None, None, None].expand(latent.shape)
        return latent, state, total, torch.zeros(len(latent)), torch.zeros(len(latent), 4)

    latent, legal = -torch.ones(8, C, 2, 2), np.ones((8, 4), bool)
    seeds = np.arange(8, dtype=np.uint64)
    result = mcts.search(recurrent, latent, torch.zeros(8, 4), legal, 50, lstm_size=L, seeds=seeds)
    assert (result.visits.argmax(1) == 1).all()
    assert (result.visits[:, 1] > 25).all()


def test_lstm_state_is_zeroed_below_every_fifth_depth():
    seen = []

    def recurrent(latent, action, state):
        h, c = state
        seen.append((latent[0, 0, 0, 0].item(), h[0, 0].item(), c[0, 0].item()))
        _, _, *outputs = stub(1)(latent, action, state)
        return latent + 1, (h + 1, c + 1), *outputs

    mcts.search(recurrent, torch.zeros(1, C, 2, 2), torch.zeros(1, 1), np.ones((1, 1), bool), 12, lstm_size=L)
    assert seen == [(depth, depth % 5, depth % 5) for depth in range(12)]  # of the parent: one action makes a chain


def test_rewards_along_a_chain_with_resets():
    # reward 1 per step: prefixes 1, 2, 3, 4, 5, then 1, 2, ... as the LSTM state starts again
    def recurrent(latent, action, state):
        h, c = state
        return latent, (h + 1, c), (h + 1)[:, 0], torch.zeros(len(latent)), torch.zeros(len(latent), 1)

    S = 12
    result = mcts.search(recurrent, torch.zeros(1, C, 2, 2), torch.zeros(1, 1), np.ones((1, 1), bool), S, lstm_size=L)
    returns = [sum(DISCOUNT**i for i in range(depth)) for depth in range(1, S + 1)]
    assert result.root_value[0] == pytest.approx(sum(returns) / S, rel=1e-5)


# noise


def test_dirichlet_noise():
    rng = np.random.default_rng(0)
    legal = np.tile([True, False, True, True], (20_000, 1))
    noise = mcts.dirichlet_noise(rng, legal)
    assert noise.dtype == np.float32 and noise.shape == legal.shape
    assert (noise[:, 1] == 0).all() and (noise >= 0).all()
    np.testing.assert_allclose(noise.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(noise[:, [0, 2, 3]].mean(0), 1 / 3, atol=0.01)
    # variance of Dirichlet(0.3, 0.3, 0.3): (1/3) (2/3) / (0.9 + 1)
    np.testing.assert_allclose(noise[:, [0, 2, 3]].var(0), 2 / 9 / 1.9, rtol=0.05)


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 100.0])
def test_dirichlet_noise_never_degenerates(alpha):
    legal = np.zeros((1000, 18), bool)
    legal[:500, 7] = True
    legal[500:, :3] = True
    noise = mcts.dirichlet_noise(np.random.default_rng(0), legal, alpha)
    assert (noise[:500, 7] == 1).all()
    np.testing.assert_allclose(noise.sum(1), 1, rtol=1e-5)


# errors


def search_with(**changes):
    latent, logits, legal = roots(3, 4)
    arguments = {"recurrent": stub(4), "latent": latent, "policy_logits": logits, "legal": legal, "num_simulations": 3}
    return mcts.search(**{**arguments, "lstm_size": L, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_simulations": 0}, "num_simulations is 0, expected at least 1"),
        ({"legal": np.array([[True] * 4, [False] * 4, [True] * 4])}, r"roots without one: \[1\]"),
        ({"legal": np.ones((3, 4), np.int8)}, "int8, expected bool"),
        ({"legal": np.ones((3, 5), bool)}, r"legal has shape \(3, 5\), expected \(3, 4\)"),
        ({"policy_logits": torch.zeros(2, 4)}, "root: .*policy_logits"),
        ({"noise": np.zeros((3, 1))}, r"noise has shape \(3, 1\)"),
        ({"seeds": np.zeros(2, np.uint64)}, r"seeds has shape \(2,\)"),
        ({"recurrent": stub(5)}, "leaves: .*policy_logits"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        search_with(**changes)


def test_wrong_network_shapes_are_refused():
    def recurrent(latent, action, state):
        latent, state, value_prefix, value, logits = stub(4)(latent, action, state)
        return latent, state, value_prefix, value[:, None], logits

    with pytest.raises(ValueError, match="leaves: value_prefix, value"):
        search_with(recurrent=recurrent)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_name_the_simulation(bad):
    calls = []

    def recurrent(latent, action, state):
        calls.append(action)
        return stub(4, value=bad if len(calls) == 3 else 0.0)(latent, action, state)

    with pytest.raises(FloatingPointError, match="simulation 2"):
        search_with(recurrent=recurrent, num_simulations=5)


def test_root_logits_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="root"):
        search_with(policy_logits=torch.full((3, 4), torch.nan))
