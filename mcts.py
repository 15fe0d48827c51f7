"""Batched Monte Carlo tree search of EfficientZero: the tree in numba, the network in torch.

One simulation, for all roots at once (one network call evaluates a leaf of each):

    select                       expand                        back up
    root                         root                          root    value_sum += G''
     | best `ucb_score`           |                             ^      G'' = reward of root -> a + discount * G'
     a                            a                             a      value_sum += G', visits += 1
     | ... until a child          | network(latent of a,        ^      G' = reward of a -> leaf + discount * G
     ?     is not in the tree    leaf       action)            leaf    value_sum += G = network's value, visits += 1

Letters: B roots, independent of each other; A actions; K most legal actions of any root; S simulations; N = S + 1
nodes; L size of the LSTM state that predicts the value prefix; C, H, W channels, height and width of a latent.
Node 0 is the root, simulation s adds node s + 1. The tree holds legal actions only, at position k in ascending order
of their ids: an illegal action has no prior, no noise and no visit at any node.
Arithmetic is float32, results do not depend on the number of threads. The first call compiles for some seconds, later
processes load the cache. NUMBA_DISABLE_JIT=1 turns everything into plain Python for the debugger.
"""

import functools
import os
import pickle
import warnings
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange

ROOT, UNVISITED = 0, 0  # an edge to node 0 is unvisited: the root is nobody's child
PRIOR, Q, VISITS = 0, 1, 2  # rows of `edges`
VALUE_PREFIX_HORIZON = 5
PARALLEL_MIN_ROOTS = 256  # below, waking threads costs more than it saves

# A float32 and a Python number make a float64 in numba: the formulas need constants of their own.
ZERO = np.float32(0)
ONE = np.float32(1)
INF = np.float32(np.inf)
C_BASE = np.float32(19652)  # MuZero, appendix B
C_INIT = np.float32(1.25)  # MuZero, appendix B
MIN_Q_RANGE = np.float32(0.01)  # the released code's: a smaller range of Q is noise, not to be stretched to [0, 1]
TIE = np.float32(1e-6)  # scores nearer than this are equal but for rounding
# Node: parent's index, position k of the action that leads here from it, edges from the root, value prefix (0 at the
# root), reward of the edge into the node, sum of the returns backed up. Root: generator state (0: none, the lowest of
# tied actions wins), positions in use, range of `q` over the expanded nodes except the root.
NODE = [("parent", "i4"), ("position", "i4"), ("depth", "i4"),
        ("value_prefix", "f4"), ("reward", "f4"), ("value_sum", "f4")]  # fmt: skip
ROOT_INFO = [("random_state", "u8"), ("num_legal", "i8"), ("q_min", "f4"), ("q_max", "f4")]


class Tree(NamedTuple):
    """State of B searches. N comes first, so that what all roots touch in a simulation lies together."""

    edges: np.ndarray  # [N, B, 3, K] float32, PRIOR, Q and VISITS of a node's children: all that selection compares
    child: np.ndarray  # [N, B, K] int32, node index or UNVISITED
    nodes: np.recarray  # [N, B] NODE
    roots: np.recarray  # [B] ROOT_INFO
    q: np.ndarray  # [B, N] float32, Q of the edge into a node: copied from `edges` for one contiguous scan
    actions: np.ndarray  # [B, K] int32, action id of position k
    exploration: np.ndarray  # [N] float32, `exploration_rate`
    scores: np.ndarray  # [B, K] float32, scratch of `select_child`
    leaf: np.ndarray  # [3, B] int64, parent, action id and depth of the leaf that the last traversal selected
    discount: np.float32


def exploration_rate(t, c_init=C_INIT):
    """`log((t + c_base + 1) / c_base) + c_init`, t = visits of a node's children (MuZero, appendix B)."""
    return np.log((np.float32(t) + C_BASE + ONE) / C_BASE) + np.float32(c_init)


def make_tree(root_prior, legal, num_simulations, *, discount, c_init=C_INIT, seeds=None):
    """Allocates B trees that hold their roots only, with room for num_simulations = S.
    root_prior [B, A] float32: softmax over the legal actions, already mixed with noise. legal [B, A] bool. seeds [B]
    uint64: each root breaks its ties by a generator of its own; None: the lowest of tied actions wins.
    """
    B, N = len(legal), num_simulations + 1
    K = legal.sum(1).max()
    actions = np.argsort(~legal, axis=1, kind="stable")[:, :K].astype(np.int32)  # [B, K], the legal ones first
    roots = np.recarray(B, ROOT_INFO)
    roots.random_state = 0
    roots.num_legal = legal.sum(1)
    roots.q_min, roots.q_max = INF, -INF
    if seeds is not None:  # splitmix64: neighbouring seeds must start far apart
        z = np.asarray(seeds, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        roots.random_state = z | np.uint64(1)
    edges = np.zeros((N, B, 3, K), np.float32)  # fresh pages: nothing is cleared
    edges[ROOT, :, PRIOR] = np.take_along_axis(root_prior, actions, axis=1)
    return Tree(
        edges=edges,
        child=np.zeros((N, B, K), np.int32),
        nodes=np.zeros((N, B), NODE).view(np.recarray),
        roots=roots,
        q=np.zeros((B, N), np.float32),
        actions=actions,
        exploration=exploration_rate(np.arange(N), c_init),
        scores=np.zeros((B, K), np.float32),
        leaf=np.zeros((3, B), np.int64),
        discount=np.float32(discount),
    )


# Inlined, and arrays are indexed down to numbers: each array or row passed around would cost an atomic reference count.
kernel = njit(nogil=True, error_model="numpy", forceinline=True)


@kernel
def edge_reward(parent_is_reset, parent_prefix, child_prefix):
    """`child_prefix - parent_prefix`, or `child_prefix` alone if the parent was reset (EfficientZero, section 4.2).
    The network predicts sums of rewards, so a reward is a difference. Below a reset node (depth a multiple of the
    horizon, LSTM state zeroed) sums start again. With horizon 2, root -> a -> b -> c and rewards 1, 0, 3 it predicts
    1, 1, then (reset at b) 3: the rewards are `1 - 0`, `1 - 1`, and `3` because the parent b was reset.
    """
    return child_prefix if parent_is_reset else child_prefix - parent_prefix


@kernel
def mean_q(q_sum, visited, parent_mean_q, is_root):
    """Q that unvisited children get: `(parent_mean_q + q_sum) / (visited + 1)` (EfficientZero, appendix).
    `q_sum` is over the `visited` children: few, and chosen for looking good. The parent's mean on this path joins as
    one more sample and holds the estimate near the level of the tree above. The root has no parent: `q_sum / visited`.
    """
    if is_root and visited > 0:
        return q_sum / np.float32(visited)
    return (parent_mean_q + q_sum) / np.float32(visited + 1)


@kernel
def normalize(q, q_min, q_max):
    """`(q - q_min) / max(q_max - q_min, 0.01)`, or q while q_min = q_max; clamped to [0, 1] (MuZero, appendix B)."""
    q = (q - q_min) / max(q_max - q_min, MIN_Q_RANGE) if q_max > q_min else q
    return min(max(q, ZERO), ONE)


@kernel
def ucb_score(rate, sqrt_t, visits, prior, value):
    """`rate * sqrt(t) / (visits + 1) * prior + value`, value being the normalized Q: pUCT (MuZero, appendix B)."""
    return rate * (sqrt_t / (visits + ONE)) * prior + value


@kernel
def pick(tree, b, n):
    """Uniform integer below n from the generator of root b (xorshift64); 0 without one, as state 0 stays 0."""
    root = tree.roots[b]
    root.random_state ^= root.random_state << np.uint64(13)
    root.random_state ^= root.random_state >> np.uint64(7)
    root.random_state ^= root.random_state << np.uint64(17)
    return np.int64(root.random_state >> np.uint64(33)) % n


@kernel
def select_child(tree, b, node, t, parent_mean_q):
    """Position of the child with the best `ucb_score`, at a node whose children have t visits, and its `mean_q`."""
    num_legal = tree.roots[b].num_legal
    q_min, q_max = tree.roots[b].q_min, tree.roots[b].q_max
    if t == 0:
        # sqrt(t) = 0 silences the prior and no child has a Q yet: all tie. So the first descent through any node, the
        # root's too, is uniformly random. It ends at the child: nobody asks for the mean.
        return pick(tree, b, num_legal), ZERO
    q_sum, visited = ZERO, 0
    for k in range(num_legal):
        q_sum += tree.edges[node, b, Q, k]  # 0 if unvisited
        visited += tree.edges[node, b, VISITS, k] > ZERO
    mean = mean_q(q_sum, visited, parent_mean_q, node == ROOT)
    unvisited_value = normalize(mean, q_min, q_max)
    rate = tree.exploration[t]
    sqrt_t = np.sqrt(np.float32(t))
    for k in range(num_legal):  # a loop without branches: it compiles to vector instructions
        visits = tree.edges[node, b, VISITS, k]
        value = normalize(tree.edges[node, b, Q, k], q_min, q_max) if visits > ZERO else unvisited_value
        tree.scores[b, k] = ucb_score(rate, sqrt_t, visits, tree.edges[node, b, PRIOR, k], value)
    best = -INF
    choice = ties = 0
    for k in range(num_legal):
        score = tree.scores[b, k]
        if score > best:
            best = score
            choice = k
            ties = 1
        elif score >= best - TIE:
            ties += 1  # the i-th of the tied replaces the choice with probability 1 / i
            choice = k if pick(tree, b, ties) == ties - 1 else choice
    return choice, mean


@kernel
def traverse_root(tree, s, b):
    """Descends from root b to an edge without a child, where node s + 1 will be."""
    node = ROOT
    depth = 1
    k, mean = select_child(tree, b, ROOT, s, ZERO)  # each of the s simulations so far passed one child of the root
    while tree.child[node, b, k] != UNVISITED:
        t = np.int64(tree.edges[node, b, VISITS, k]) - 1  # the first visit evaluated it, the others passed on
        node = np.int64(tree.child[node, b, k])
        depth += 1
        k, mean = select_child(tree, b, node, t, mean)
    leaf = tree.nodes[s + 1, b]
    leaf.parent = tree.leaf[0, b] = node
    leaf.position = k
    tree.leaf[1, b] = tree.actions[b, k]
    leaf.depth = tree.leaf[2, b] = depth


@kernel
def expand_and_backup_root(tree, s, outputs, b):
    """Fills node s + 1 of root b with the network's outputs, backs its value up and finds the new range of Q."""
    node = s + 1
    leaf = tree.nodes[node, b]
    root = tree.roots[b]
    value = outputs[b, 1]
    parent, k = np.int64(leaf.parent), np.int64(leaf.position)
    parent_is_reset = parent != ROOT and tree.nodes[parent, b].depth % VALUE_PREFIX_HORIZON == 0
    leaf.value_prefix = outputs[b, 0]
    leaf.reward = edge_reward(parent_is_reset, tree.nodes[parent, b].value_prefix, leaf.value_prefix)
    tree.child[parent, b, k] = node
    for i in range(root.num_legal):
        tree.edges[node, b, PRIOR, i] = outputs[b, 2 + tree.actions[b, i]]
    while node != ROOT:
        stats = tree.nodes[node, b]
        stats.value_sum += value
        tree.edges[parent, b, VISITS, k] += ONE
        q = stats.reward + tree.discount * (stats.value_sum / tree.edges[parent, b, VISITS, k])
        tree.edges[parent, b, Q, k] = tree.q[b, node] = q
        value = stats.reward + tree.discount * value
        node = parent
        parent, k = np.int64(tree.nodes[node, b].parent), np.int64(tree.nodes[node, b].position)
    tree.nodes[ROOT, b].value_sum += value
    # From scratch: a Q that moved on must not hold the range open. (The reference scans with wrong parents.)
    q_min, q_max = INF, -INF
    for i in range(1, s + 2):
        q_min, q_max = min(q_min, tree.q[b, i]), max(q_max, tree.q[b, i])
    root.q_min, root.q_max = q_min, q_max


compiled = njit(nogil=True, error_model="numpy")


def cached(function):
    """`function` compiled, and kept on disk for later processes. Where no folder can be written, each compiles it."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        warnings.warn("the compiled search cannot be kept: NUMBA_CACHE_DIR may name a folder for it", stacklevel=2)
        return compiled(function)


@cached
def step(tree, s, outputs, expand, select):
    """Expansion and backup of simulation s, traversal of simulation s + 1, or both: one call, as each costs 5 us.
    Here `prange` is `range`."""
    for b in prange(len(tree.roots)):
        if expand:
            expand_and_backup_root(tree, s, outputs, b)
        if select:
            traverse_root(tree, s + 1, b)


# Compiled at its first call, if ever. Not cached: numba would take it for `step`, which has the same source.
step_parallel = njit(nogil=True, error_model="numpy", parallel=True)(getattr(step, "py_func", step))


def run_step(tree, s, outputs, expand, select, threads=1):
    """`step` on up to `threads` threads. outputs [B, 2 + A] float32: value prefix, value, prior (read if `expand`)."""
    global step
    if threads == 1:
        try:
            return step(tree, s, outputs, expand, select)
        except (OSError, EOFError, pickle.UnpicklingError) as error:  # of the file on disk; nothing has run yet
            warnings.warn(f"the compiled search cannot be kept or read: {error!r}", stacklevel=1)
            step = compiled(step.py_func)
            return step(tree, s, outputs, expand, select)
    threads_before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    step_parallel(tree, s, outputs, expand, select)
    numba.set_num_threads(threads_before)


def dirichlet_noise(rng, legal, alpha=0.3):
    """Dirichlet(alpha) over each row's legal actions, 0 elsewhere: [B, A] float32. legal [B, A] bool."""
    # Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha), in logarithms: no row can underflow to zeros only.
    log_gamma = np.log(rng.standard_gamma(alpha + 1, legal.shape)) + np.log(1 - rng.random(legal.shape)) / alpha
    return torch.softmax(torch.from_numpy(np.where(legal, log_gamma, -np.inf)), dim=1).float().numpy()


class NodeStates:
    """The network's side of up to B searches: latent and LSTM state of every node, where the network is. It also asks
    the network for the leaves' values: `evaluate` starts that, `outputs` waits for the answer.

    like: a tensor of the latents' shape, type and device. record: what wraps the evaluation on a GPU, whose kernels
    then work on this memory each time; one recording for each number of rows.
    """

    def __init__(self, net, like, B, num_actions, num_simulations, record):
        C, H, W = like.shape[1:]
        L = net.initial_lstm_state(1, like)[0].shape[1]
        N = num_simulations + 1
        pin, device = like.is_cuda, like.device
        self.net = net
        self.record = record
        self.recorded = {}  # evaluations by their number of rows
        self.latents = like.new_empty(N * B, H, W, C)  # in the order of channels_last
        self.h = like.new_empty(N * B, L)
        self.c = like.new_empty(N * B, L)
        self.rows = torch.arange(B, device=device)
        self.illegal = torch.zeros(B, num_actions, dtype=torch.bool, device=device)
        self.leaf = torch.zeros(4, B, dtype=torch.int64, device=device)  # parent, action, depth, node of each leaf
        self.leaf_on_host = torch.zeros(4, B, dtype=torch.int64, pin_memory=pin)
        self.outputs_on_host = torch.empty(B, 2 + num_actions, pin_memory=pin)
        self.ready = torch.cuda.Event() if pin else None

    def start(self, latent, illegal):
        """Puts n <= B roots in place: latent [n, C, H, W], illegal [n, A]; their LSTM states are zeros."""
        n, B = len(latent), len(self.rows)
        self.n = self.num_rows = n
        # A recording has a fixed size: the smallest of B, B/2, B/4, ... that holds n. The rows beyond n repeat leaves
        # of earlier searches, and what comes of them lies in columns that nobody reads.
        if self.record:
            self.num_rows = B
            while self.num_rows // 2 >= max(n, 8):
                self.num_rows //= 2
        self.latents[:n] = latent.permute(0, 2, 3, 1)
        self.illegal[:n] = illegal
        self.h[:B] = 0
        self.c[:B] = 0

    def evaluate_rows(self, num_rows):
        """Gathers the leaves' parents, applies the network, scatters the new states -> `pack` [num_rows, 2 + A]."""
        parent, action, depth, node = self.leaf[:, :num_rows]
        B = len(self.rows)
        index = parent * B + self.rows[:num_rows]  # into [N * B, ...]
        new_index = node * B + self.rows[:num_rows]
        latent = self.latents.index_select(0, index).permute(0, 3, 1, 2)  # [num_rows, C, H, W]
        lstm_state = self.h.index_select(0, index), self.c.index_select(0, index)
        latent, (h, c), value_prefix, value, policy_logits = self.net.search_leaf(latent, action, lstm_state, depth)
        reset = (depth % VALUE_PREFIX_HORIZON == 0)[:, None]  # this node's children start a new value prefix
        self.latents.index_copy_(0, new_index, latent.permute(0, 2, 3, 1))
        self.h.index_copy_(0, new_index, h.masked_fill(reset, 0))
        self.c.index_copy_(0, new_index, c.masked_fill(reset, 0))
        return pack(value_prefix, value, policy_logits, self.illegal[:num_rows])

    def evaluate(self, leaf, s):
        """Starts the evaluation of the leaves of simulation s; leaf [3, n] as in `Tree`. Does not wait for a GPU."""
        evaluate_rows = functools.partial(self.evaluate_rows, self.num_rows)
        if self.record and self.num_rows not in self.recorded:
            self.recorded[self.num_rows] = self.record(evaluate_rows)
        evaluate_rows = self.recorded.get(self.num_rows, evaluate_rows)
        self.leaf_on_host[:3, : self.n] = torch.from_numpy(leaf)
        self.leaf_on_host[3] = s + 1
        self.leaf.copy_(self.leaf_on_host, non_blocking=True)
        self.outputs_on_host[: self.num_rows].copy_(evaluate_rows(), non_blocking=True)
        if self.ready:
            self.ready.record()

    def outputs(self):
        """What `evaluate` asked for, as soon as it is there: [n, 2 + A] float32, valid until the next `evaluate`."""
        if self.ready:
            self.ready.synchronize()
        outputs = self.outputs_on_host[: self.n].numpy()
        if not np.isfinite(outputs).all():
            raise FloatingPointError("what the network says of a leaf is not finite")
        return outputs


def pack(value_prefix, value, policy_logits, illegal):
    """Value prefix, value and prior over the legal actions, for one transfer to the host: [B, 2 + A] float32."""
    prior = torch.softmax(policy_logits.float().masked_fill(illegal, -torch.inf), dim=1)
    return torch.cat([value_prefix.float()[:, None], value.float()[:, None], prior], dim=1)


class SearchResult(NamedTuple):
    policy: np.ndarray  # [n, A] float32, visits of the root's children / S
    value: np.ndarray  # [n] float32, the network's own value of the root: targets bootstrap from it
    root_value: np.ndarray  # [n] float32, mean of the S returns; the reference divides by S + 1, a bias towards 0
    depth: np.ndarray  # [n] int32, of the deepest leaf


class Prediction(NamedTuple):
    value: np.ndarray  # [n, J + 1] float32, after 0 to J actions
    value_prefix: np.ndarray  # [n, J] float32, sum of rewards since the LSTM's last reset, every 5 actions
    q: np.ndarray  # [n, A] float32, reward + discount * value of each action at the root
    prior: np.ndarray  # [n, A] float32, the network's own policy at the root, over the legal actions


class Search:
    """Searches up to `capacity` roots with a frozen network (`net`, changed in place between searches).

    net: `search_root(obs) -> latent [n, C, H, W], value [n], policy_logits [n, A]`,
      `search_leaf(latent, action [n] int64, (h, c), depth [n] int64) -> latent, (h, c), value_prefix [n], value [n],
      policy_logits`, and `initial_lstm_state(n, like) -> h, c`, the scalars already transformed back.
    num_simulations: S; 0 stands for the network's own policy over the legal actions, without a search.
    record: what records and replays the evaluation of leaves on a GPU, `model.Recorded`; None: nothing.
    """

    def __init__(self, net, num_simulations, capacity, *, discount=0.997**4, c_init=1.25, dirichlet_alpha=0.3,
                 noise_fraction=0.25, record=None):  # fmt: skip
        self.net = net
        self.num_simulations = num_simulations
        self.capacity = capacity
        self.discount = discount
        self.c_init = c_init
        self.dirichlet_alpha = dirichlet_alpha
        self.noise_fraction = noise_fraction
        self.record = record
        self.halves = []  # one or two `NodeStates`, made at the first search

    @torch.no_grad()
    def __call__(self, obs, legal, rng, noise):
        """Searches from obs uint8 [n, 12, 96, 96] -> SearchResult. legal bool [A], or [n, A] if the roots differ.

        rng: breaks ties, and draws the Dirichlet noise that is mixed into the priors of the roots if `noise`.
        Raises FloatingPointError if the network says something that is not finite.
        """
        n, A = len(obs), legal.shape[-1]
        legal = np.broadcast_to(legal, (n, A))
        illegal = torch.from_numpy(~legal).to(obs.device)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=obs.is_cuda):
            latent, value, policy_logits = self.net.search_root(obs)
            outputs = pack(torch.zeros_like(value), value, policy_logits, illegal).cpu().numpy()  # [n, 2 + A]
            if not np.isfinite(outputs).all():
                raise FloatingPointError("what the network says of a root is not finite")
            value, prior = outputs[:, 1], outputs[:, 2:]
            if self.num_simulations == 0:
                return SearchResult(prior, value, value, np.zeros(n, np.int32))
            if noise:
                drawn = dirichlet_noise(rng, legal, self.dirichlet_alpha)
                prior = (1 - self.noise_fraction) * prior + self.noise_fraction * drawn
            seeds = rng.integers(1, 2**63, n, dtype=np.uint64)
            visits, root_value, depth = self.run_simulations(latent, prior, legal, illegal, seeds)
        return SearchResult(visits / np.float32(self.num_simulations), value, root_value, depth)

    @torch.no_grad()
    def predict(self, obs, action, legal):
        """The network's answers along given actions, as a search gets them: obs uint8 [n, 12, 96, 96], action int64
        [n, J], legal bool [A] -> Prediction."""
        action = torch.from_numpy(action).to(obs.device)
        ones = torch.ones_like(action[:, 0])  # [n]
        illegal = torch.from_numpy(~legal).to(obs.device)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=obs.is_cuda):
            root, value, policy_logits = self.net.search_root(obs)
            start = self.net.initial_lstm_state(len(obs), root)
            q = []
            for a in range(len(legal)):
                _, _, reward, next_value, _ = self.net.search_leaf(root, a * ones, start, ones)  # a prefix of one step
                q.append(reward + self.discount * next_value)
            values, prefixes = [value], []
            latent, lstm_state = root, start
            for j in range(action.shape[1]):
                lstm_state = start if j % VALUE_PREFIX_HORIZON == 0 else lstm_state
                leaf = self.net.search_leaf(latent, action[:, j], lstm_state, (j + 1) * ones)
                latent, lstm_state, prefix, value, _ = leaf
                prefixes.append(prefix)
                values.append(value)
            prior = pack(values[0], values[0], policy_logits, illegal)[:, 2:]
        stacked = [torch.stack(x, dim=1).float().cpu().numpy() for x in (values, prefixes, q)]
        return Prediction(*stacked, prior.cpu().numpy())

    def run_simulations(self, latent, prior, legal, illegal, seeds):
        """The S simulations -> visits [n, A], root value [n], depth [n]. Large searches on a GPU run in two halves: the
        CPU walks the trees of one while the GPU evaluates the other."""
        n, A = prior.shape
        S = self.num_simulations
        count = 2 if latent.is_cuda and self.capacity >= 2 * PARALLEL_MIN_ROOTS else 1
        while len(self.halves) < count:
            record = self.record if latent.is_cuda else None
            self.halves.append(NodeStates(self.net, latent, -(-self.capacity // count), A, S, record))
        slices, trees = [], []
        for states, rows in zip(self.halves, np.array_split(np.arange(n), min(n, count)), strict=False):
            rows = slice(rows[0], rows[-1] + 1)
            states.start(latent[rows], illegal[rows])
            options = {"discount": self.discount, "c_init": self.c_init, "seeds": seeds[rows]}
            trees.append(make_tree(prior[rows], legal[rows], S, **options))
            slices.append(rows)
        threads = min(8, os.cpu_count()) if latent.is_cuda and n >= PARALLEL_MIN_ROOTS else 1
        outputs = np.empty((0, 2), np.float32)
        for s in range(S + 1):  # ends simulation s - 1 and begins s: the first one only begins, the last one only ends
            for tree, states in zip(trees, self.halves, strict=False):
                if s > 0:
                    outputs = states.outputs()
                run_step(tree, s - 1, outputs, s > 0, s < S, threads)
                if s < S:
                    states.evaluate(tree.leaf, s)
        visits = np.zeros((n, A), np.float32)
        root_value = np.zeros(n, np.float32)
        depth = np.zeros(n, np.int32)
        for tree, rows in zip(trees, slices, strict=True):
            np.put_along_axis(visits[rows], tree.actions, tree.edges[ROOT, :, VISITS], axis=1)
            root_value[rows] = tree.nodes.value_sum[ROOT] / np.float32(S)
            depth[rows] = tree.nodes.depth.max(0)
        return visits, root_value, depth
