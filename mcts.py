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
ZERO, ONE, INF = np.float32(0), np.float32(1), np.float32(np.inf)
C_BASE, C_INIT, MIN_Q_RANGE, TIE = np.float32(19652), np.float32(1.25), np.float32(0.01), np.float32(1e-6)
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


def exploration_rate(t):
    """`log((t + c_base + 1) / c_base) + c_init`, t = visits of a node's children (MuZero, appendix B)."""
    return np.log((np.float32(t) + C_BASE + ONE) / C_BASE) + C_INIT


def make_tree(root_prior, legal, num_simulations, *, discount, seeds=None):
    """Allocates B trees that hold their roots only, with room for num_simulations = S.
    root_prior [B, A] float32: softmax over the legal actions, already mixed with noise. legal [B, A] bool. seeds [B]
    uint64: each root breaks its ties by a generator of its own; None: the lowest of tied actions wins.
    """
    B, N, K = len(legal), num_simulations + 1, legal.sum(1).max()
    actions = np.argsort(~legal, axis=1, kind="stable")[:, :K].astype(np.int32)  # [B, K], the legal ones first
    roots = np.recarray(B, ROOT_INFO)
    roots.random_state, roots.num_legal, roots.q_min, roots.q_max = 0, legal.sum(1), INF, -INF
    if seeds is not None:  # splitmix64: neighbouring seeds must start far apart
        z = np.asarray(seeds, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        roots.random_state = z | np.uint64(1)
    edges, child = np.zeros((N, B, 3, K), np.float32), np.zeros((N, B, K), np.int32)  # fresh pages: nothing is cleared
    edges[ROOT, :, PRIOR] = np.take_along_axis(root_prior, actions, axis=1)
    nodes, leaf = np.zeros((N, B), NODE).view(np.recarray), np.zeros((3, B), np.int64)
    q, rates, scores = np.zeros((B, N), np.float32), exploration_rate(np.arange(N)), np.zeros((B, K), np.float32)
    return Tree(edges, child, nodes, roots, q, actions, rates, scores, leaf, np.float32(discount))


# Inlined, and arrays are indexed down to numbers: each array or row passed around would cost an atomic reference count.
kernel = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


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
    return q_sum / np.float32(visited) if is_root and visited > 0 else (parent_mean_q + q_sum) / np.float32(visited + 1)


@kernel
def normalize(q, q_min, q_max):
    """`(q - q_min) / max(q_max - q_min, 0.01)`, q before two values differ; clamped to [0, 1] (MuZero, appendix B)."""
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
    num_legal, q_min, q_max = tree.roots[b].num_legal, tree.roots[b].q_min, tree.roots[b].q_max
    if t == 0:
        # sqrt(t) = 0 silences the prior and no child has a Q yet: all tie. So the first descent through any node, the
        # root's too, is uniformly random. It ends at the child: nobody asks for the mean.
        return pick(tree, b, num_legal), ZERO
    q_sum, visited = ZERO, 0
    for k in range(num_legal):
        q_sum += tree.edges[node, b, Q, k]  # 0 if unvisited
        visited += tree.edges[node, b, VISITS, k] > ZERO
    mean = mean_q(q_sum, visited, parent_mean_q, node == ROOT)
    rate, sqrt_t, unvisited_value = tree.exploration[t], np.sqrt(np.float32(t)), normalize(mean, q_min, q_max)
    for k in range(num_legal):  # a loop without branches: it compiles to vector instructions
        visits = tree.edges[node, b, VISITS, k]
        value = normalize(tree.edges[node, b, Q, k], q_min, q_max) if visits > ZERO else unvisited_value
        tree.scores[b, k] = ucb_score(rate, sqrt_t, visits, tree.edges[node, b, PRIOR, k], value)
    best, choice, ties = -INF, 0, 0
    for k in range(num_legal):
        score = tree.scores[b, k]
        if score > best:
            best, choice, ties = score, k, 1
        elif score >= best - TIE:
            ties += 1  # the i-th of the tied replaces the choice with probability 1 / i
            choice = k if pick(tree, b, ties) == ties - 1 else choice
    return choice, mean


@kernel
def traverse_root(tree, s, b):
    """Descends from root b to an edge without a child, where node s + 1 will be."""
    node, depth, (k, mean) = ROOT, 1, select_child(tree, b, ROOT, s, ZERO)
    while tree.child[node, b, k] != UNVISITED:
        t = np.int64(tree.edges[node, b, VISITS, k]) - 1  # the first visit evaluated it, the others passed on
        node, depth = np.int64(tree.child[node, b, k]), depth + 1
        k, mean = select_child(tree, b, node, t, mean)
    leaf = tree.nodes[s + 1, b]
    leaf.parent, leaf.position, leaf.depth = node, k, depth
    tree.leaf[0, b], tree.leaf[1, b], tree.leaf[2, b] = node, tree.actions[b, k], depth


@kernel
def expand_and_backup_root(tree, s, outputs, b):
    """Fills node s + 1 of root b with the network's outputs, backs its value up and finds the new range of Q."""
    node, value = s + 1, outputs[b, 1]
    leaf, root = tree.nodes[node, b], tree.roots[b]
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


@njit(cache=True, nogil=True, error_model="numpy")
def step(tree, s, outputs, expand, select):
    """Expansion and backup of simulation s, traversal of simulation s + 1, or both: one call, as each costs 5 us."""
    for b in prange(len(tree.roots)):
        if expand:
            expand_and_backup_root(tree, s, outputs, b)
        if select:
            traverse_root(tree, s + 1, b)


# Compiled at its first call, if ever. Not cached: numba would take it for `step`, which has the same source.
step_parallel = njit(nogil=True, error_model="numpy", parallel=True)(getattr(step, "py_func", step))


def run_step(tree, s, outputs, expand, select, threads=1):
    """`step` on up to `threads` threads. outputs [B, 2 + A] float32: value prefix, value, prior (read if `expand`)."""
    if threads == 1:
        return step(tree, s, outputs, expand, select)
    threads_before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    step_parallel(tree, s, outputs, expand, select)
    numba.set_num_threads(threads_before)


def traverse(tree, s, threads=1):
    """Selects the leaf of simulation s of every root: its parent's node index, action id and depth, [B] int64 each."""
    run_step(tree, s - 1, np.empty((0, 2), np.float32), False, True, threads)
    return tuple(tree.leaf.copy())


def expand_and_backup(tree, s, value_prefix, value, prior, threads=1):
    """Adds the leaf of simulation s as node s + 1; value_prefix [B], value [B] and prior [B, A] float32."""
    run_step(tree, s, np.float32(np.column_stack([value_prefix, value, prior])), True, False, threads)


def dirichlet_noise(rng, legal, alpha=0.3):
    """Dirichlet(alpha) over each row's legal actions, 0 elsewhere: [B, A] float32. legal [B, A] bool."""
    # Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha), in logarithms: no row can underflow to zeros only.
    log_gamma = np.log(rng.standard_gamma(alpha + 1, legal.shape)) + np.log(1 - rng.random(legal.shape)) / alpha
    return torch.softmax(torch.from_numpy(np.where(legal, log_gamma, -np.inf)), dim=1).float().numpy()


class SearchResult(NamedTuple):
    visits: np.ndarray  # [B, A] int32, of the root's children; they sum to S
    root_value: np.ndarray  # [B] float32, mean of the S returns; the reference divides by S + 1, a bias towards 0
    depth: np.ndarray  # [B] int32, of the deepest leaf


class Nodes:
    """The network's side of B searches: latent and LSTM state of every node, where the network is. It also asks the
    network for the leaves' values: `evaluate` starts that, `outputs` waits for the answer.
    like: latents of the shape and type of those to come. record: what wraps the evaluation, which has no arguments and
    works on the same memory each time; None: nothing.
    """

    def __init__(self, recurrent, B, like, num_actions, num_simulations, lstm_size, record=None):
        (C, H, W), device, pin, N = like.shape[1:], like.device, like.is_cuda, num_simulations + 1
        self.recurrent, self.rows = recurrent, torch.arange(B, device=device)
        self.latents = like.new_empty(N * B, H, W, C)  # in the order of channels_last
        self.hs, self.cs = like.new_empty(2, N * B, lstm_size)  # [N * B, L] each
        self.illegal = torch.zeros(B, num_actions, dtype=torch.bool, device=device)
        self.leaf = torch.zeros(4, B, dtype=torch.int64, device=device)  # parent, action, depth, node of each leaf
        self.leaf_on_host = torch.zeros(4, B, dtype=torch.int64, pin_memory=pin)
        self.on_host = torch.empty(B, 2 + num_actions, pin_memory=pin)
        self.ready = torch.cuda.Event() if pin else None
        if record:
            self.simulate = record(self.simulate)

    def start(self, latent, illegal):
        """Puts the roots in place: latent [n, C, H, W] and illegal [n, A], n <= B; LSTM states are zeros."""
        n, B = len(latent), len(self.rows)
        self.latents[:n], self.illegal[:n] = latent.permute(0, 2, 3, 1), illegal
        self.hs[:B], self.cs[:B] = 0, 0

    def simulate(self):
        """Gathers the leaves' parents, applies the network, scatters the new states -> `pack_outputs` [B, 2 + A]."""
        parent, action, depth, node = self.leaf  # [B] each
        B = len(parent)
        index, new_index = parent * B + self.rows, node * B + self.rows  # [B], into [N * B, ...]
        latent = self.latents.index_select(0, index).permute(0, 3, 1, 2)  # [B, C, H, W]
        lstm_state = self.hs.index_select(0, index), self.cs.index_select(0, index)
        latent, (h, c), value_prefix, value, policy_logits = self.recurrent(latent, action, lstm_state)
        reset = (depth % VALUE_PREFIX_HORIZON == 0)[:, None]  # this node's children start a new value prefix
        self.latents.index_copy_(0, new_index, latent.permute(0, 2, 3, 1))
        self.hs.index_copy_(0, new_index, h.masked_fill(reset, 0))
        self.cs.index_copy_(0, new_index, c.masked_fill(reset, 0))
        return pack_outputs(value_prefix, value, policy_logits, self.illegal, "leaves")

    def evaluate(self, leaf, s):
        """Starts the evaluation of the leaves of simulation s; leaf [3, n] as in `Tree`. Does not wait for a GPU."""
        self.leaf_on_host[:3, : leaf.shape[1]] = torch.from_numpy(leaf)
        self.leaf_on_host[3] = s + 1
        self.leaf.copy_(self.leaf_on_host, non_blocking=True)
        self.on_host.copy_(self.simulate(), non_blocking=True)
        if self.ready:
            self.ready.record()

    def outputs(self, n, s):
        """What `evaluate` asked for, as soon as it is there: [n, 2 + A] float32, valid until the next `evaluate`."""
        if self.ready:
            self.ready.synchronize()
        outputs = self.on_host[:n].numpy()
        if not np.isfinite(outputs).all():
            raise FloatingPointError(f"simulation {s}: the network's outputs are not finite")
        return outputs


def pack_outputs(value_prefix, value, policy_logits, illegal, where):
    """Value prefix, value and prior over the legal actions, for one transfer to the host: [B, 2 + A] float32."""
    B, A = illegal.shape
    shapes = [tuple(x.shape) for x in (value_prefix, value, policy_logits)]
    if shapes != [(B,), (B,), (B, A)]:
        raise ValueError(f"{where}: value_prefix, value, policy_logits are {shapes}, expected {[(B,), (B,), (B, A)]}")
    prior = torch.softmax(policy_logits.float().masked_fill(illegal, -torch.inf), dim=1)
    return torch.cat([value_prefix.float()[:, None], value.float()[:, None], prior], dim=1)


def bucket(n):
    """Rows for n roots: a power of two from 8 to 256, then a multiple of 256. Recorded kernels need fixed sizes."""
    return 1 << max(3, (n - 1).bit_length()) if n <= 256 else -(-n // 256) * 256


@torch.no_grad()
def search(recurrent, latent, policy_logits, legal, num_simulations, *, lstm_size, discount=0.997**4, noise=None,
           noise_fraction=0.25, seeds=None, threads=1, parts=1, memory=None, record=None):  # fmt: skip
    """Searches from B roots. The root network returns a latent and policy logits; its value, if any, is not used.
    recurrent: `(latent [B, C, H, W], action [B] int64, (h, c) [B, L] each) -> latent, (h, c), value_prefix [B],
      value [B], policy_logits [B, A]`, tensors on the device of `latent`, the two scalars already transformed back.
    latent, policy_logits: of the roots, [B, C, H, W] and [B, A]; their LSTM states are zeros, their prefixes 0.
    legal, noise, seeds: numpy, [B, A] bool, [B, A] or None (see `dirichlet_noise`), [B] or None (see `make_tree`).
    num_simulations, lstm_size: S and L. threads: of the tree, used from PARALLEL_MIN_ROOTS roots.
    parts: searched in turn, so that a GPU evaluates one while the CPU walks the tree of another.
    memory, record: a dict that keeps the `Nodes` for the next search with this same network, and what records them.
    """
    B, A, S = len(latent), policy_logits.shape[-1], num_simulations
    for name, array, shape in (("legal", legal, (B, A)), ("noise", noise, (B, A)), ("seeds", seeds, (B,))):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if S < 1:
        raise ValueError(f"num_simulations is {S}, expected at least 1")
    if legal.dtype != bool or not legal.any(1).all():
        raise ValueError(f"legal: {legal.dtype}, expected bool; roots without one: {np.flatnonzero(legal.sum(1) == 0)}")
    illegal = torch.from_numpy(~legal).to(latent.device)
    zeros = latent.new_zeros(B)
    prior = pack_outputs(zeros, zeros, policy_logits, illegal, "root").cpu().numpy()[:, 2:]
    if not np.isfinite(prior).all():
        raise FloatingPointError("root: the network's outputs are not finite")
    prior = prior if noise is None else prior * (1 - noise_fraction) + noise * noise_fraction
    searches, kept = [], {} if memory is None else memory
    for i, rows in enumerate(np.array_split(np.arange(B), parts)):
        part, n = slice(rows[0], rows[-1] + 1), len(rows)
        key = i, n if memory is None else bucket(n), S
        if key not in kept:
            recorder = None if memory is None else record
            kept[key] = Nodes(recurrent, key[1], latent, A, S, lstm_size, recorder)
        kept[key].start(latent[part], illegal[part])
        part_seeds = None if seeds is None else seeds[part]
        searches.append((make_tree(prior[part], legal[part], S, discount=discount, seeds=part_seeds), kept[key]))
    for s in range(S + 1):
        for tree, nodes in searches:
            n = len(tree.roots)
            outputs = nodes.outputs(n, s - 1) if s > 0 else np.empty((0, 2), np.float32)
            run_step(tree, s - 1, outputs, s > 0, s < S, threads if n >= PARALLEL_MIN_ROOTS else 1)
            if s < S:
                nodes.evaluate(tree.leaf, s)
    results = []
    for tree, _ in searches:
        visits = np.zeros((len(tree.roots), A), np.int32)
        np.put_along_axis(visits, tree.actions, tree.edges[ROOT, :, VISITS].astype(np.int32), axis=1)
        results.append((visits, tree.nodes.value_sum[ROOT] / np.float32(S), tree.nodes.depth.max(0)))
    return SearchResult(*map(np.concatenate, zip(*results, strict=True)))
