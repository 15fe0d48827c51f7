"""Tests of mcts.py. `Node` and `slow_search` are the specification: one root, a tree of plain Python objects.
The golden cases are trees that the reference's C++ grew (data/README.md)."""

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


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def chi_square(counts):
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


# --- golden cases


def run_golden(name, threads=1):
    """Grows the tree as `Search` does, each backup in one call with the traversal after it."""
    case = {field.split("/")[1]: GOLDEN[field] for field in GOLDEN if field.startswith(f"{name}/")}
    prior = softmax(case["root_logits"]) * (1 - case["noise_frac"]) + case["noise"] * case["noise_frac"]
    S = len(case["value"])
    tree = mcts.make_tree(prior, np.ones(prior.shape, bool), S, discount=DISCOUNT)
    mcts.run_step(tree, -1, np.empty((0, 2), np.float32), False, True, threads)
    for s in range(S):
        for row, field in zip(tree.leaf, ("parent", "action", "depth"), strict=True):
            np.testing.assert_array_equal(row, case[f"expected_leaf_{field}"][s], f"{field} in simulation {s}")
        outputs = np.column_stack([case["value_prefix"][s], case["value"][s], softmax(case["policy_logits"][s])])
        mcts.run_step(tree, s, outputs, True, s + 1 < S, threads)
    np.testing.assert_array_equal(tree.edges[mcts.ROOT, :, mcts.VISITS], case["expected_visits"])
    root_value = tree.nodes.value_sum[mcts.ROOT] / (S + 1)  # the reference counts the root's own visit
    np.testing.assert_allclose(root_value, case["expected_root_values"], rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_golden(name, threads):
    before = mcts.numba.get_num_threads()
    run_golden(name, threads)
    assert mcts.numba.get_num_threads() == before


def test_golden_without_jit():
    root = Path(__file__).resolve().parent.parent
    code = "from tests.test_mcts import *; run_golden('large_A3_S10_B16'); assert not hasattr(mcts.step, 'py_func')"
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}  # Python puts the working directory on its path
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the formulas


@pytest.mark.parametrize(("t", "rate"), [(0, 1.250051), (1, 1.250102), (10, 1.250560), (49, 1.252541)])
def test_exploration_rate(t, rate):
    assert mcts.exploration_rate(t) == pytest.approx(rate, abs=1e-6)
    assert mcts.exploration_rate(t, c_init=2.5) == pytest.approx(rate + 1.25, abs=1e-6)


def test_edge_reward_recovers_rewards_from_prefixes():
    # rewards 1, 0, 3 along root -> a -> b -> c, horizon 2: b is reset
    prefix = np.array([0, 1, 1, 3], np.float32)
    assert [mcts.edge_reward(i == 2, prefix[i], prefix[i + 1]) for i in range(3)] == [1, 0, 3]


def test_mean_q_counts_the_parent_as_one_more_sample_except_at_the_root():
    parent = np.float32(3)
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


# --- a network of tables, and the specification


class World:
    """A network that knows M states by heart. Latents and LSTM states are whole numbers, so no answer depends on
    rounding or on the other rows of a batch; `obs` [n] are the states themselves."""

    M = 100

    def __init__(self, A, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.next_state = torch.randint(self.M, (self.M, A), generator=g)
        self.value = torch.randn(self.M, generator=g)
        self.logits = 2 * torch.randn(self.M, A, generator=g)
        self.prefix = torch.randn(self.M, 6, generator=g)  # by h, and by c, the steps since the LSTM's last reset
        self.asked = []  # action, c and depth of each call of `search_leaf`

    def encode(self, state):
        """[n] -> [n, 2, 2, 3]; another order of channels, height and width would be another state."""
        return ((state[:, None] + torch.arange(12)) % self.M).view(-1, 2, 2, 3).float()

    def initial_lstm_state(self, n, like):
        return like.new_zeros(n, 1), like.new_zeros(n, 1)

    def search_root(self, obs):
        return self.encode(obs), self.value[obs], self.logits[obs]

    def search_leaf(self, latent, action, lstm_state, depth):
        h, c = [x.nan_to_num().long() for x in lstm_state]  # rows that pad a batch hold anything
        self.asked.append((action.numpy().copy(), c[:, 0].tolist(), depth.tolist()))
        state = self.next_state[(latent[:, 1, 0, 2].nan_to_num().long() - 8) % self.M, action]
        h, c = (5 * h + state[:, None] + 1) % self.M, (c + 1) % 6
        prefix = self.prefix[h[:, 0], c[:, 0]]
        return self.encode(state), (h.float(), c.float()), prefix, self.value[state], self.logits[state]


class Node:
    def __init__(self, prior, latent, lstm_state, prefix=0.0, reset=False):
        self.prior, self.latent, self.lstm_state = prior, latent, lstm_state  # prior: a dict over legal actions
        self.prefix, self.reset = prefix, reset
        self.children, self.visits, self.value_sum = {}, 1, 0.0

    def reward(self, action):
        return self.children[action].prefix - (0 if self.reset else self.prefix)


def slow_search(world, state, prior, legal, S, discount=DISCOUNT, c_init=1.25):
    """Visits [A], sum of returns / S and deepest leaf of one root; ties go to the lowest action."""

    def q(node, action):
        return node.reward(action) + discount * node.children[action].value_sum / node.children[action].visits

    def all_q(node):
        return [x for a, child in node.children.items() for x in (q(node, a), *all_q(child))]

    def choose(node, is_root, parent_mean, values):
        qs = [q(node, a) for a in node.children]
        mean = sum(qs) / len(qs) if is_root and qs else (parent_mean + sum(qs)) / (len(qs) + 1)
        t, best, best_score = node.visits - 1, None, -math.inf
        for action in node.prior:
            x = q(node, action) if action in node.children else mean
            if values and max(values) > min(values):
                x = (x - min(values)) / max(max(values) - min(values), 0.01)
            visits = node.children[action].visits if action in node.children else 0
            rate = math.log((t + 19652 + 1) / 19652) + c_init
            score = rate * math.sqrt(t) / (visits + 1) * node.prior[action] + min(max(x, 0), 1)
            if score > best_score + 1e-6:
                best, best_score = action, score
        return best, mean

    actions = np.flatnonzero(legal)
    latent = world.encode(torch.tensor([state]))
    zeros = world.initial_lstm_state(1, latent)
    root = Node({a: float(prior[a]) for a in actions}, latent, zeros)
    deepest = 0
    for _ in range(S):
        node, path, mean, values = root, [], 0.0, all_q(root)
        while node is not None:
            action, mean = choose(node, node is root, mean, values)
            path.append((node, action))
            node = node.children.get(action)
        parent, action = path[-1]
        deepest = max(deepest, len(path))
        answer = world.search_leaf(parent.latent, torch.tensor([action]), parent.lstm_state, torch.tensor([len(path)]))
        latent, lstm_state, prefix, value, logits = answer
        reset = len(path) % 5 == 0
        child_prior = dict(zip(actions, softmax(logits[0].numpy()[actions]).tolist(), strict=True))
        child = Node(child_prior, latent, zeros if reset else lstm_state, float(prefix), reset)
        parent.children[action] = child
        child.value_sum = ret = float(value)
        for node, action in reversed(path):
            ret = node.reward(action) + discount * ret
            node.value_sum += ret
            node.visits += 1
    visits = [root.children[a].visits if a in root.children else 0 for a in range(len(legal))]
    return visits, root.value_sum / S, deepest


def random_legal(n, A, seed=0):
    rng = np.random.default_rng(seed)
    legal = rng.random((n, A)) < 0.6
    legal[np.arange(n), rng.integers(A, size=n)] = True
    return legal


def same(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


FLAGS = {"discount": 0.8, "c_init": 2.5, "dirichlet_alpha": 1.0, "noise_fraction": 0.4}


@pytest.mark.parametrize(("masked", "noise", "options"), [(False, False, {}), (True, True, {}), (True, True, FLAGS)])
def test_search_equals_the_specification(monkeypatch, masked, noise, options):
    n, A, S = 10, 5, 40
    make_tree = mcts.make_tree  # without seeds the lowest of tied actions wins, as in `slow_search`
    monkeypatch.setattr(mcts, "make_tree", lambda *args, seeds, **options: make_tree(*args, **options))
    world = World(A)
    legal = random_legal(n, A) if masked else np.ones(A, bool)
    result = mcts.Search(world, S, n, **options)(torch.arange(n), legal, np.random.default_rng(1), noise)
    legal = np.broadcast_to(legal, (n, A))
    drawn = mcts.dirichlet_noise(np.random.default_rng(1), legal, options.get("dirichlet_alpha", 0.3))
    fraction = options.get("noise_fraction", 0.25) * noise
    tree_options = {name: options[name] for name in options.keys() & {"discount", "c_init"}}
    for b in range(n):
        prior = softmax(np.where(legal[b], world.logits[b].numpy(), -np.inf))
        prior = (1 - fraction) * prior + fraction * drawn[b]
        visits, root_value, depth = slow_search(world, b, prior, legal[b], S, **tree_options)
        np.testing.assert_allclose(result.policy[b], np.array(visits) / S, rtol=1e-6)
        assert result.root_value[b] == pytest.approx(root_value, rel=1e-4, abs=1e-5)
        assert result.depth[b] == depth
    assert result.depth.max() > 5  # the value prefix started again
    np.testing.assert_array_equal(result.value, world.value[:n])
    assert [x.dtype for x in result] == 3 * [np.float32] + [np.int32]


# --- memory and randomness


def test_a_search_does_not_depend_on_those_before_it():
    """Latents, LSTM states or legal actions left over from a larger search or another network would change visits."""
    world = World(5)
    kept = mcts.Search(world, 20, 16)
    for i, n in enumerate((16, 11, 1, 13, 16)):
        vars(world).update(vars(World(5, seed=i)))
        args = torch.arange(i, i + n), random_legal(n, 5, seed=i)
        results = [search(*args, np.random.default_rng(i), True) for search in (kept, mcts.Search(world, 20, n))]
        assert same(*results)


def test_the_generator_fixes_the_search():
    search = mcts.Search(World(6), 20, 16)
    runs = [search(torch.arange(16), np.ones(6, bool), np.random.default_rng(seed), False) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_ties_are_broken_uniformly():
    """The first action through a root is uniform over the legal ones, whatever the prior; so is the second over those
    that are left, if all priors and values are equal: each of the 6 pairs comes equally often."""
    n, world, rng = 6000, World(5), np.random.default_rng(0)
    world.value[:] = world.prefix[:] = world.logits[:] = 0
    world.logits[1, 0] = 5
    legal, root = np.array([True, False, True, True, True]), torch.zeros(n, dtype=torch.int64)
    first = mcts.Search(world, 1, n)(root + 1, legal, rng, False).policy.sum(0)
    assert first[1] == 0 and chi_square(first[legal]) < 16.3  # 99.9 % of chi-square, 3 degrees of freedom
    pairs, counts = np.unique(mcts.Search(world, 2, n)(root, legal, rng, False).policy, axis=0, return_counts=True)
    assert len(pairs) == 6 and (pairs.max(1) == 0.5).all() and chi_square(counts) < 20.5  # 5 degrees of freedom


# --- masks, sizes and values


@pytest.mark.parametrize("S", [1, 2, 50])
def test_illegal_actions_are_never_taken_and_visits_sum_to_S(S):
    n, A = 64, 7
    world, legal = World(A), random_legal(n, A)
    world.next_state.clamp_(min=n)  # what follows is no root
    world.logits[:n][torch.from_numpy(~legal)] = torch.nan  # what the network says of them does not matter
    result = mcts.Search(world, S, n)(torch.arange(n), legal, np.random.default_rng(0), True)
    assert (result.policy[~legal] == 0).all()
    np.testing.assert_allclose(result.policy.sum(1), 1, rtol=1e-6)
    assert all(legal[np.arange(n), action].all() for action, *_ in world.asked)  # inside the tree as well


def test_without_simulations_the_policy_is_the_networks_own_over_legal_actions():
    world, legal = World(6), random_legal(8, 6)
    result = mcts.Search(world, 0, 8)(torch.arange(8), legal, np.random.default_rng(0), True)
    np.testing.assert_allclose(result.policy, softmax(np.where(legal, world.logits[:8].numpy(), -np.inf)), rtol=1e-5)
    assert np.array_equal(result.value, world.value[:8]) and np.array_equal(result.root_value, world.value[:8])


def test_rewards_and_lstm_states_along_a_chain():
    """One legal action, a reward of 1 per step and values of 10: the prefixes are 1, 2, 3, 4, 5 and, as the LSTM starts
    again below each fifth depth, 1, 2, ... The root's value is the mean of S returns, not their sum over S + 1."""
    S, world, legal = 12, World(3), np.array([False, True, False])
    world.value[:], world.prefix[:] = 10, torch.arange(6)
    result = mcts.Search(world, S, 1)(torch.arange(1), legal, np.random.default_rng(0), True)
    assert [c for _, c, _ in world.asked] == [[depth % 5] for depth in range(S)]  # of the leaves' parents
    assert [depth for *_, depth in world.asked] == [[depth + 1] for depth in range(S)]  # of the leaves
    assert result.policy.tolist() == [[0, 1, 0]] and result.depth.tolist() == [S]
    returns = [sum(DISCOUNT**i for i in range(depth)) + 10 * DISCOUNT**depth for depth in range(1, S + 1)]
    assert result.root_value[0] == pytest.approx(sum(returns) / S, rel=1e-5)


# --- noise


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 100.0])
def test_dirichlet_noise_has_the_moments_of_the_distribution_over_legal_actions(alpha):
    legal = np.tile([True, False, True, True], (20_000, 1))
    legal[0] = [False, True, False, False]
    noise = mcts.dirichlet_noise(np.random.default_rng(0), legal, alpha)
    assert noise.dtype == np.float32 and (noise[~legal] == 0).all() and noise[0, 1] == 1
    np.testing.assert_allclose(noise.sum(1), 1, rtol=1e-5)  # no row underflows
    np.testing.assert_allclose(noise[1:, legal[1]].mean(0), 1 / 3, atol=0.015)
    # of Dirichlet(alpha, alpha, alpha): (1/3) (2/3) / (3 alpha + 1)
    np.testing.assert_allclose(noise[1:, legal[1]].var(0), 2 / 9 / (3 * alpha + 1), rtol=0.05)


# --- numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["root value", "root logits", "leaf value", "leaf logits", "leaf prefix"])
def test_numbers_that_are_not_finite_end_the_search(where, bad):
    world, (node, table) = World(4), where.split()
    world.next_state.clamp_(max=49)
    getattr(world, table)[50 if node == "root" else slice(50)] = bad
    with pytest.raises(FloatingPointError, match=node):
        mcts.Search(world, 5, 1)(torch.tensor([50]), np.ones(4, bool), np.random.default_rng(0), False)


def test_a_search_that_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(mcts, "njit", njit)
    monkeypatch.setattr(mcts, "compiled", njit())
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        assert mcts.cached(max) is max


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_search_whose_file_on_disk_is_damaged_is_compiled_again(tmp_path, content):
    """As a crash or a full disk leaves it. Two processes of their own: numba looks at its cache once in each."""
    code = "import mcts, numpy as np\n"
    code += "tree = mcts.make_tree(np.ones((1, 2), 'f4') / 2, np.ones((1, 2), bool), 1, discount=1.0)\n"
    code += "mcts.run_step(tree, -1, np.zeros((1, 4), 'f4'), False, True)\nprint(tree.leaf.tolist())"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(mcts.__file__).parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done)
        for path in tmp_path.rglob("*.nb?"):
            path.write_bytes(content)
    assert said[0].stdout == said[1].stdout != "" and "UserWarning" not in said[0].stderr
    assert "the compiled search cannot be kept or read" in said[1].stderr
