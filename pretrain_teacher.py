# docs: docs/pretrain_teacher.md
"""Stage 1a of XTRA: a teacher, which is EfficientZero trained offline on the fixed dataset of one game (XTRA, 3.1).

    python pretrain_teacher.py --datasets data/Alien --run-dir runs/teacher-alien

In: a dataset folder that `finetune.py --save-dataset` wrote. Out: a run folder with the teacher (model.pt) and its
search policy and value for every state of the dataset (targets.npz), from which `distill.py` and `finetune.py` learn.
Several datasets train one model on all of them with its own targets: the multi-game baseline of XTRA's Appendix C.

Letters: B batch, K unroll steps, A actions (the 18 ALE ids), R rows of the replay, E environments, S support atoms.
The x-axis is updates; there are no environment steps outside evaluation.
"""

import os
import sys

# Asleep the tree's threads leave the CPU to others while the GPU works; where torch computes on the CPU it costs 2.8x.
if os.path.exists("/proc/driver/nvidia") and "--no-cuda" not in sys.argv:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch loads

import re
import shutil
import time
from dataclasses import dataclass
from typing import NamedTuple

import ale_py  # noqa: F401  (importing it registers the games with Gymnasium)
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import zstandard
from ale_py.vector_env import AtariVectorEnv
from tqdm import tqdm

import mcts
import model

ON_GPU = torch.cuda.is_available() and "--no-cuda" not in sys.argv


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: int = 1  # seed of the experiment
    torch_deterministic: bool = True  # whether cuDNN may only use deterministic algorithms
    cuda: bool = True  # whether to use the GPU; a machine without one runs on the CPU
    track: bool = False  # whether to mirror the logs to Weights and Biases
    wandb_project_name: str = "xtra"  # the W&B project
    wandb_entity: str | None = None  # the W&B entity (team)
    run_dir: str | None = None  # the folder to write; default runs/{env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # whether to go on from the checkpoint in --run-dir; where there is none, the run starts
    checkpoint_every: int = 1_000  # updates between checkpoints; each evaluation and each interruption writes one too
    compile: bool = ON_GPU  # whether torch.compile fuses the loss; not under torchrun
    cudagraphs: bool = ON_GPU  # whether a GPU launches recorded kernels; not under torchrun

    # Algorithm specific arguments
    datasets: tuple[str, ...] = ()  # dataset folders: one for a teacher, several for the baseline of Appendix C
    num_updates: int = 100_000  # gradient updates (not in the paper: our choice)
    channels: int = 64  # channels of the latent; LSTM and projector scale with them
    blocks: int = 4  # residual blocks per group of the representation network (1: EfficientZero; 4: -L and XTRA)
    batch_size: int = 256  # samples per update, shared evenly among the datasets
    learning_rate: float = 0.2  # learning rate of SGD after its warm-up over 1 % of the updates
    num_simulations: int = 50  # simulations of a search
    unroll_steps: int = 5  # steps that the model is unrolled in training
    td_steps: int = 5  # rewards before the bootstrap in a value target
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 32  # games of an evaluation, played side by side
    eval_max_frames: int = 108_000  # length at which an evaluation game is cut, in frames (1 step = 4 frames)
    reanalyze_cache: bool = True  # whether a state is searched once per target network, else each time it is drawn


def make_writer(args, run_name, run_dir):
    """TensorBoard in the run folder, written at each `flush`; with --track, W&B mirrors it."""
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name}
        wandb.init(**names, sync_tensorboard=True, config=vars(args), save_code=True)
    writer = model.Log(run_dir)
    table = "".join(f"|{key}|{value}|\n" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    return writer


# --- environment ---
def atari_rom(env_id):
    """The ROM of `<Game>NoFrameskip-v4` ("ms_pacman" for MsPacman), or None for an id of another form."""
    if env_id.startswith("ALE/"):
        hint = f"Atari 100k has neither; use --env-id {env_id[4:].split('-')[0]}NoFrameskip-v4"
        raise SystemExit(f"error: --env-id {env_id} has sticky actions (0.25) and another frame skip; {hint}")
    match = re.fullmatch(r"(\w+)NoFrameskip-v4", env_id)
    if match is None:
        return None
    spec = gym.registry.get(f"ALE/{match[1]}-v5")
    if spec is None:
        raise SystemExit(
            f"error: --env-id {env_id}: ale-py has no game {match[1]}; expected as in MsPacmanNoFrameskip-v4"
        )
    return spec.kwargs["game"]


def make_envs(env_id, num_envs, *, life_loss_ends):
    """`num_envs` copies of a game; after `reset(seed=s)` copy i plays the games of seed s + i.

    Observations are uint8 [E, 96, 96, 3] after `obs.reshape(E, 96, 96, 3)`, rewards raw, Atari actions ALE ids. A game
    is over if truncated, or terminated with 0 lives in the info; the next step ignores its action, pays 0 and
    returns the first frame of a new game. life_loss_ends: a lost life is `terminated` too, and the game goes on.
    """
    if rom := atari_rom(env_id):
        screen = {"img_height": 96, "img_width": 96, "grayscale": False, "stack_num": 1, "frameskip": 4}
        off = {"repeat_action_probability": 0.0, "reward_clipping": False, "use_fire_reset": False}
        # 0 to 30 no-ops start a game. `episodic_life=True` would restart the whole game at each lost life.
        lives = {"noop_max": 31, "life_loss_info": life_loss_ends, "max_num_frames_per_episode": 108_000}
        full = {"full_action_space": True, "num_threads": min(num_envs, os.cpu_count() or 1)}
        return AtariVectorEnv(rom, num_envs, **screen, **off, **lives, **full)
    try:
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="sync")
    except (gym.error.Error, ImportError) as error:
        expected = "expected <Game>NoFrameskip-v4, or module:Env-v0 with the module's folder on PYTHONPATH"
        raise SystemExit(f"error: --env-id {env_id}: {' '.join(str(error).split())}; {expected}") from None
    obs, actions = envs.single_observation_space, envs.single_action_space
    fits = obs.shape == (96, 96, 3) and obs.dtype == np.uint8 and isinstance(actions, gym.spaces.Discrete)
    if not fits or actions.start != 0 or actions.n > 18:
        found = " ".join(f"{obs} and {actions}".split())
        expected = "expected Box(0, 255, (96, 96, 3), uint8) and Discrete(n) with n <= 18; wrap the environment"
        raise SystemExit(f"error: --env-id {env_id} has {found}; {expected}")
    return envs


def legal_actions(env_id):
    """Which of the 18 ALE ids the game knows, bool [A]: ALE's minimal action set, or the first n of Discrete(n)."""
    if rom := atari_rom(env_id):
        ids = [action.value for action in AtariVectorEnv(rom, 1, num_threads=1).ale.get_action_set()]
    else:
        ids = range(make_envs(env_id, 1, life_loss_ends=False).single_action_space.n)
    return np.isin(np.arange(18), ids)


# --- data ---
LIFE_LOST, GAME_OVER, TIME_LIMIT = 1, 2, 3  # what `Replay.end` says of an episode's last action; all are terminal


class Replay:
    """Flat arrays with one row per frame; E environments side by side.

    Row i holds frame o_t, the action a_t taken on it, the raw reward, and how the episode ended there if it did. Row
    i + E holds o_t+1. A row that was not acted on holds the last frame of a game, or the newest frame of its stream.
    """

    def __init__(self, rows, num_envs, device, frames_on_host=False):
        self.num_envs, self.size, self.device = num_envs, 0, torch.device(device)
        place = "cpu" if frames_on_host else device  # what is gathered goes to `device` in any case
        self.frames = torch.zeros(rows, 3, 96, 96, dtype=torch.uint8, device=place)  # [R, 3, 96, 96] taken at once
        self.action = np.zeros(rows, np.int64)  # [R] ALE ids
        self.reward = np.zeros(rows, np.float32)  # [R] raw: clipped where targets are made
        self.acted = np.zeros(rows, bool)  # [R]
        self.end = np.zeros(rows, np.uint8)  # [R] 0, LIFE_LOST, GAME_OVER or TIME_LIMIT
        self.age = np.zeros(rows, np.int64)  # [R] environment steps since the episode's first frame
        self.stored_at = np.zeros(rows, np.int64)  # [R] environment steps stored before this one
        self.priority = np.zeros(rows)  # [R] 0 where not acted
        self.policy = np.zeros((rows, 18), np.float32)  # [R, A] visit distribution of the latest search of this state
        self.value = np.zeros(rows, np.float32)  # [R] value head, of the same network
        self.policy_version = np.zeros(rows, np.int64)  # [R] which target network they come from, counted from 1
        self.value_version = np.zeros(rows, np.int64)  # [R]


def dataset_meta(folder):
    """The meta.json of a dataset folder, whose files are all there and undamaged; exits with one line if not."""
    fields = {"rows": int, "env_steps": int, "env_id": str, "settings": dict}
    meta = model.load_manifest(f"{folder}/meta.json", "xtra-dataset-1", fields, ["frames", "steps.npz"])
    settings = {name: value for name, value in meta["settings"].items() if name != "num_envs"}
    if settings != {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0} or not 1 <= meta["rows"] <= 10**9:
        found = f"{str(meta['rows'])[:20]} rows of {str(settings)[:200]}"
        raise SystemExit(f"error: {folder} has {found}, expected 96x96x3 and frameskip 4; collect it again")
    return meta


def load_dataset(folder, device, frames_on_host=False):
    """Reads a dataset folder (docs/finetune.md, "Datasets") -> (Replay with E = 1 and priorities 1, its meta.json).

    Exits with one line if the folder is missing, damaged, of another format version or of other environment settings.
    """
    path, meta = f"{folder}/frames", dataset_meta(folder)
    R, chunks = meta["rows"], -(-meta["rows"] // 8)
    flags = dict.fromkeys(("acted", "life_lost", "terminated", "truncated"), (bool, (R,)))
    fields = {"chunk_offsets": (np.int64, (chunks + 1,)), "action": (np.uint8, (R,)), "reward": (np.float32, (R,))}
    steps = model.load_arrays(f"{folder}/steps.npz", fields | flags)
    offsets = steps["chunk_offsets"]
    fits = offsets[0] == 0 and offsets[-1] == os.path.getsize(path) and (offsets[1:] > offsets[:-1]).all()
    if not fits or steps["action"].max() >= 18 or not np.isfinite(steps["reward"]).all():
        raise SystemExit(
            f"error: {folder}/steps.npz has offsets, actions or rewards out of range; make the folder again"
        )
    replay = Replay(R, 1, device, frames_on_host)
    replay.size = R
    decompressor = zstandard.ZstdDecompressor()
    with open(path, "rb") as file:
        for start, size in zip(
            range(0, R, 8), np.diff(offsets).tolist(), strict=True
        ):  # 8 frames a chunk, channel last
            data, n = file.read(size), min(8, R - start)
            try:
                if zstandard.frame_content_size(data) != n * 96 * 96 * 3:
                    raise zstandard.ZstdError(f"chunk {start // 8} has another size than {n} frames")
                chunk = np.frombuffer(decompressor.decompress(data), np.uint8).reshape(n, 96, 96, 3)
            except (zstandard.ZstdError, ValueError) as error:
                raise SystemExit(f"error: {path} cannot be unpacked ({error}); make the folder again") from None
            replay.frames[start : start + n] = torch.tensor(chunk).permute(0, 3, 1, 2)
    replay.action[:], replay.reward[:], replay.acted[:] = steps["action"], steps["reward"], steps["acted"]
    replay.end[:] = LIFE_LOST * steps["life_lost"] + GAME_OVER * steps["terminated"] + TIME_LIMIT * steps["truncated"]
    starts = np.ones(R, bool)  # an episode starts after an end or after a row that was not acted on
    starts[1:] = (replay.end[:-1] > 0) & replay.acted[1:] | ~replay.acted[:-1]
    rows = np.arange(R)
    replay.age[:] = rows - np.maximum.accumulate(np.where(starts, rows, 0))
    replay.priority[:] = replay.acted
    return replay, meta


def gather_frames(replay, rows):
    """The frames of `rows`, numpy [n, J] -> uint8 [n, J, 3, 96, 96] on the replay's device. Waits for no GPU."""
    index = model.upload(rows.ravel(), replay.frames.device)
    if replay.frames.is_cuda or replay.device.type == "cpu":
        frames = replay.frames.index_select(0, index)  # [n * J, 3, 96, 96]
    else:
        pinned = torch.empty(len(index), 3, 96, 96, dtype=torch.uint8, pin_memory=True)
        frames = torch.index_select(replay.frames, 0, index, out=pinned).to(replay.device, non_blocking=True)
    return frames.view(*rows.shape, 3, 96, 96)


def stack_frames(replay, rows):
    """The network's input at the states `rows` [n]: uint8 [n, 12, 96, 96], oldest frame first.

    Near an episode's start its first frame is repeated, also after a life loss.
    """
    back = np.minimum(np.arange(3, -1, -1), replay.age[rows, None])  # [n, 4]
    return gather_frames(replay, rows[:, None] - back * replay.num_envs).flatten(1, 2)


def sample(replay, batch_size, beta, rng):
    """Draws rows without replacement with `P(i) ~ priority_i^0.6` -> rows [B], weights `(N * P(i))^-beta / max` [B]."""
    mass = replay.priority[: replay.size] ** 0.6  # [R]
    left, rows = mass.copy(), np.empty(0, np.int64)
    while len(rows) < batch_size:  # those drawn twice are drawn again, from what is left
        cumulative = np.cumsum(left)
        drawn = np.searchsorted(cumulative / cumulative[-1], rng.random(batch_size - len(rows)), side="right")
        rows = np.unique(np.concatenate([rows, drawn]))
        left[rows] = 0
    weight = (np.count_nonzero(mass) * mass[rows] / mass.sum()) ** -beta
    return rows, weight / weight.max()


# --- targets ---

#   t             0     1     2     3        K = 3 unroll steps from the sampled row t
#   frame         o0    o1    o2    o3       o0 -> h; o1.. only as targets of the consistency loss
#   action        a0    a1    a2             a_k drives the dynamics from state k to state k + 1
#   mask          1     m1    m2    m3       m_k = 1 if action k - 1 was taken: the terminal state itself still counts
#   policy        p0    p1    p2    p3       search of the target network; all zero at a terminal state: no loss
#   value         z0    z1    z2    z3       z_k = sum_{i<n} gamma^i r_k+i + gamma^n v_k+n; 0 at a terminal state
#   value prefix        u1    u2    u3       u_k = r_0 + ... + r_k-1, undiscounted; starts again every 5 steps


class Targets(NamedTuple):
    """What follows the sampled rows; episodes and streams end, so `rows` is clipped to the last state that exists."""

    rows: np.ndarray  # [B, K+1] row of state k
    exists: np.ndarray  # [B, K+1] bool: action k-1 was taken, so there is a frame
    alive: np.ndarray  # [B, K+1] bool: exists and is not terminal
    value_prefix: np.ndarray  # [B, K]
    reward_sum: np.ndarray  # [B, K+1] sum_{i<n} gamma^i r_k+i
    bootstrap_rows: np.ndarray  # [B, K+1] row of state k+n
    bootstrap_discount: np.ndarray  # [B, K+1] gamma^n, 0 if state k+n is terminal


def make_targets(replay, roots, td_steps, unroll_steps, gamma=0.997**4):
    """Everything of the targets of the rows `roots` [B] that needs no network.

    `z = reward_sum + bootstrap_discount * v(bootstrap_rows)`. td_steps [B] is per sample; n is td_steps, or fewer where
    the episode ends (then nothing is bootstrapped) or where a stream's newest frame comes first (then that is
    bootstrapped from). Rewards are clipped to their sign. gamma is per environment step of 4 frames.
    """
    B, K, J = len(roots), unroll_steps, unroll_steps + td_steps.max()
    rows, exists, alive = np.empty((B, J + 1), np.int64), np.ones((B, J + 1), bool), np.ones((B, J + 1), bool)
    rows[:, 0] = roots
    for j in range(J):
        exists[:, j + 1] = alive[:, j] & replay.acted[rows[:, j]]
        alive[:, j + 1] = exists[:, j + 1] & (replay.end[rows[:, j]] == 0)
        rows[:, j + 1] = rows[:, j] + exists[:, j + 1] * replay.num_envs
    taken = exists[:, 1:]  # [B, J] action j was taken
    reward = np.sign(replay.reward[rows[:, :-1]]) * taken  # [B, J]
    prefix = np.cumsum(reward[:, :K], axis=1)  # [B, K]
    for k in range(K, mcts.VALUE_PREFIX_HORIZON, -1):  # u_k counts from the last reset of the LSTM on
        prefix[:, k - 1] -= prefix[:, (k - 1) // mcts.VALUE_PREFIX_HORIZON * mcts.VALUE_PREFIX_HORIZON - 1]
    reward_sum, bootstrap, discount = np.zeros((B, K + 1)), np.empty((B, K + 1), np.int64), np.empty((B, K + 1))
    for k in range(K + 1):
        n = np.minimum(td_steps, taken[:, k:].sum(axis=1))  # [B]
        for i in range(td_steps.max()):
            reward_sum[:, k] += (i < n) * gamma**i * reward[:, k + i]
        bootstrap[:, k] = rows[np.arange(B), k + n]
        discount[:, k] = gamma**n * alive[np.arange(B), k + n]
    return Targets(rows[:, : K + 1], exists[:, : K + 1], alive[:, : K + 1], prefix, reward_sum, bootstrap, discount)


def run_search(net, env_id, obs, legal, num_simulations, rng, noise, rank=0, W=1):
    """Searches the first n of obs uint8 [N, 12, 96, 96], legal [n, A] -> SearchResult of n, value head of all N.

    net: an `inference_copy`. num_simulations 0: the policy head stands for the visits. noise: whether to mix Dirichlet
    noise into the root priors (self-play and reanalyze). With W processes each does every W-th, and all get the result.
    Raises `FloatingPointError(what, tensors)`, with env_id in `what`, if the network says something that is not finite.
    """
    n, N, A = len(legal), len(obs), legal.shape[1]
    noise = mcts.dirichlet_noise(rng, legal)[rank::W] if noise and n else None
    seeds = rng.integers(1, 2**63, n, dtype=np.uint64)[rank::W] if num_simulations and n else None
    mine = legal[rank::W]
    value, visits, rest = np.zeros(N, np.float32), np.zeros((n, A), np.int32), np.zeros((2, n), np.float32)
    with torch.no_grad(), torch.autocast(obs.device.type, torch.bfloat16, enabled=obs.is_cuda):
        latent, policy_logits, value_logits = net.initial_inference(obs[rank::W])
        value[rank::W] = model.finite_values(value_logits, env_id, obs)
        latent, policy_logits = latent[: len(mine)], policy_logits[: len(mine)]

        def recurrent(latent, action, lstm_state):
            latent, lstm_state, prefix, policy, value = net.recurrent_inference(latent, action, lstm_state)
            return latent, lstm_state, model.support_to_scalar(prefix), model.support_to_scalar(value), policy

        options = {"lstm_size": net.config.lstm_size, "noise": noise, "seeds": seeds}
        if obs.is_cuda:  # the CPU walks the trees of one half while the GPU evaluates the other
            parts = 2 if len(mine) >= 2 * mcts.PARALLEL_MIN_ROOTS else 1
            options |= {"threads": min(8, os.cpu_count()), "parts": parts, "memory": net.memory}
            options["record"] = model.Recorded
        try:
            if len(mine) and num_simulations:
                result = mcts.search(recurrent, latent, policy_logits, mine, num_simulations, **options)
                visits[rank::W], rest[:, rank::W] = result.visits, (result.root_value, result.depth)
            elif len(mine):
                logits = policy_logits.float().cpu().masked_fill(~torch.as_tensor(mine), -torch.inf)
                visits = logits.softmax(-1).numpy()  # only in evaluations, where there is one process
        except FloatingPointError as error:
            raise FloatingPointError(f"the search of {env_id} ({error})", {"obs": obs}) from None
    if W > 1:
        visits, rest, value = model.add_up(visits), model.add_up(rest), model.add_up(value)
    return mcts.SearchResult(visits, rest[0], rest[1].astype(np.int32)), value


def reanalyze(net, version, env_id, replay, targets, legal, num_simulations, rng, cache, rank=0, W=1):
    """Targets of a batch by `net`, the `version`-th target network -> policy [B, K+1, A], bootstrap value [B, K+1], and
    the SearchResult, or None if nothing was stale.

    Policies are searched with noise, values are the value head (a search's root value is an option of the released
    code, off by default). The target network changes every 200 updates only: a state that comes again before that
    keeps its target, noise included. Without `cache` each sample has a search and a noise of its own, as in the
    released code. Terminal states get nothing.
    """
    alive, bootstrap = targets.alive, targets.bootstrap_discount > 0  # [B, K+1] bool each
    searched, valued = targets.rows[alive], targets.bootstrap_rows[bootstrap]
    if cache:
        searched = np.unique(searched[replay.policy_version[searched] != version])  # [n]
        valued = np.unique(valued[replay.value_version[valued] != version])
        valued = valued[~np.isin(valued, searched, assume_unique=True)]  # the root's encoding has its value too
    n, states, result = len(searched), np.concatenate([searched, valued]), None
    policy = np.zeros((*alive.shape, len(legal)), np.float32)
    if len(states):
        masks, obs = np.repeat(legal[None], n, 0), stack_frames(replay, states)
        result, value = run_search(net, env_id, obs, masks, num_simulations, rng, True, rank, W)
        replay.policy[searched], replay.policy_version[searched] = result.visits / num_simulations, version
        replay.value[states], replay.value_version[states] = value, version
    policy[alive] = replay.policy[targets.rows[alive]] if cache else result.visits / num_simulations
    return policy, replay.value[targets.bootstrap_rows], result if n else None


class Batch(NamedTuple):
    obs: torch.Tensor  # [B, 12, 96, 96] augmented
    target_obs: torch.Tensor  # [B, 3 * (K+3), 96, 96] augmented; the stack of o_t+k is channels 3k-3 .. 3k+9
    action: torch.Tensor  # [B, K]
    mask: torch.Tensor  # [B, K+1]
    policy: torch.Tensor  # [B, K+1, A]
    value: torch.Tensor  # [B, K+1]
    value_prefix: torch.Tensor  # [B, K]
    weight: torch.Tensor  # [B] importance weights


def make_batch(replay, targets, policy, bootstrap_value, weight, rng, generator):
    """Gathers frames, augments them on their device and moves the targets there -> Batch. policy [B, K+1, A], 0 where
    not alive; bootstrap_value [B, K+1]."""
    K = targets.value_prefix.shape[1]
    value = targets.reward_sum + targets.bootstrap_discount * bootstrap_value  # [B, K+1]
    roots = targets.rows[:, 0]
    past = roots[:, None] - np.minimum([3, 2, 1], replay.age[roots, None]) * replay.num_envs  # [B, 3]
    frames = gather_frames(replay, np.concatenate([past, targets.rows], axis=1))  # [B, K+4, 3, 96, 96]
    # Past the end the action is random, as in the reference: masked in every loss, it only enters BN's statistics.
    action = np.where(targets.exists[:, 1:], replay.action[targets.rows[:, :K]], rng.integers(18, size=(len(roots), K)))
    arrays = [np.asarray(x, np.float32) for x in (targets.exists, policy, value, targets.value_prefix, weight)]
    return Batch(
        model.augment(frames[:, :4].flatten(1, 2), generator),
        model.augment(frames[:, 1:].flatten(1, 2), generator),
        *[model.upload(x, replay.device) for x in (action, *arrays)],
    )


# --- loss ---
def unroll_loss(net, batch):
    """The EfficientZero loss (XTRA, Eq. 3 with cross-entropies and a cosine, as in the released code).

    Returns per sample [B]: the total `value_prefix + policy + 0.25 * value + 2 * consistency`, each term (sums over the
    unroll, before coefficient and importance weight), and the priority `|value_0 - z_0| + 1e-6`.
    Steps past the end are masked, so only true states are learned from.
    """
    B, K = batch.action.shape
    support = net.config.support
    latent, policy_logits, value_logits = net.initial_inference(batch.obs)
    lstm_state = net.initial_lstm_state(B, latent)
    priority = (model.support_to_scalar(value_logits.detach()) - batch.value[:, 0]).abs() + 1e-6
    value_code = model.scalar_to_support(batch.value, support)  # [B, K+1, S]
    prefix_code = model.scalar_to_support(batch.value_prefix, support)  # [B, K, S]
    policy = model.cross_entropy(policy_logits, batch.policy[:, 0])
    value = model.cross_entropy(value_logits, value_code[:, 0])
    value_prefix, consistency = torch.zeros_like(value), torch.zeros_like(value)
    for k in range(1, K + 1):
        latent, lstm_state, prefix_logits, policy_logits, value_logits = net.recurrent_inference(
            latent, batch.action[:, k - 1], lstm_state
        )
        online = net.predictor(net.projector(latent)).float()  # first with gradient: autocast caches cast weights
        with torch.no_grad():  # f runs here for its batch norm statistics only, as in the reference
            target_latent = net.initial_inference(batch.target_obs[:, 3 * k - 3 : 3 * k + 9])[0]
            target = net.projector(target_latent).float()
        mask = batch.mask[:, k]  # [B]
        policy += mask * model.cross_entropy(policy_logits, batch.policy[:, k])
        value += mask * model.cross_entropy(value_logits, value_code[:, k])
        value_prefix += mask * model.cross_entropy(prefix_logits, prefix_code[:, k - 1])
        consistency -= mask * F.cosine_similarity(online, target, dim=-1, eps=1e-5)
        if k % mcts.VALUE_PREFIX_HORIZON == 0:
            lstm_state = net.initial_lstm_state(B, latent)
    terms = {"value_prefix": value_prefix, "policy": policy, "value": value, "consistency": consistency}
    return value_prefix + policy + 0.25 * value + 2.0 * consistency, terms, priority


def compute_gradients(net, parameters, batch, loss_function):
    """One pass forward and backward -> loss, norm of its gradients, terms and priority per sample [B], gradients.

    The loss that is minimised is `mean(weight * total) / K`, the one returned K times that. With several processes
    loss and gradients are the means over all of them, terms and priority of this one's samples.
    """
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=batch.obs.is_cuda):
        total, terms, priority = loss_function(net, batch)
    loss = (batch.weight * total).mean()
    gradients = model.gradients(loss / batch.action.shape[1], parameters)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    terms = {name: term.detach() for name, term in terms.items()}  # else autograd's graph outlives this call
    return model.average([loss.detach()])[0], norm, terms, priority, gradients


def learning_rate_at(update, total, base):
    """Warm-up over 1 % of the run from exactly 0, then `base`, and a tenth of it from 101 % on (EfficientZero)."""
    warm_up = total // 100
    return base * update / warm_up if update < warm_up else base * 0.1 ** ((update - warm_up) // total)


# --- evaluation ---
def evaluate(net, env_id, episodes, max_frames, num_simulations, device, movie=None, interrupted=()):
    """Plays `episodes` whole games side by side (seeds 0, 1, ..., full lives, no noise, the most visited action or the
    lowest of several) -> raw returns [episodes], lengths in environment steps [episodes].

    num_simulations 0 acts on the policy head alone. movie: a list that gets the first game's frames. interrupted: a
    list; the games stop, and the results mean nothing, once something is in it.
    """
    envs, rng = make_envs(env_id, episodes, life_loss_ends=False), np.random.default_rng(0)
    legal = np.repeat(legal_actions(env_id)[None], episodes, 0)  # [E, A]
    frames = envs.reset(seed=0)[0].reshape(episodes, 96, 96, 3)
    stack = torch.as_tensor(frames).permute(0, 3, 1, 2).repeat(1, 4, 1, 1).to(device)  # [E, 12, 96, 96]
    returns, lengths, active = np.zeros(episodes), np.zeros(episodes, np.int64), np.arange(episodes)
    while len(active) and not interrupted:
        action = np.zeros(episodes, np.int64)  # finished games leave the search; their actions do not matter
        result, _ = run_search(net, env_id, stack[active], legal[active], num_simulations, rng, noise=False)
        action[active] = result.visits.argmax(axis=1)
        if movie is not None and 0 in active:
            movie.append(frames[0].copy())
        frames, reward, terminated, truncated, _ = envs.step(action)
        frames = frames.reshape(episodes, 96, 96, 3)
        stack = torch.cat([stack[:, 3:], torch.as_tensor(frames).permute(0, 3, 1, 2).to(device)], dim=1)
        returns[active] += reward[active]
        lengths[active] += 1
        active = active[~(terminated | truncated | (lengths >= max_frames // 4))[active]]
    envs.close()
    return returns, lengths


def log_evaluation(writer, env_id, env_steps, updates, returns, lengths, suffix=""):
    """The means to TensorBoard and the terminal -> one line per game for evaluations.csv."""
    writer.add_scalar("eval/episodic_return" + suffix, returns.mean(), updates)
    writer.add_scalar("eval/episodic_length" + suffix, lengths.mean(), updates)
    tqdm.write(f"updates={updates}, env_id={env_id}, evaluation return={returns.mean():.1f} (std {returns.std():.1f})")
    games = enumerate(zip(returns.tolist(), lengths.tolist(), strict=True))
    return "".join(f"{env_steps},{updates},{i},{score},{length},{env_id}\n" for i, (score, length) in games)


def check_args(args, may_be_zero=()):
    """Exits with one line if a number is negative, or zero where that makes no sense."""
    for name, value in vars(args).items():
        lowest = -1 if name == "similarity_threshold" else 0 if name in may_be_zero or isinstance(value, float) else 1
        lowest = 2 if name in ("batch_size", "channels") else lowest  # for batch norm and the first convolution
        if isinstance(value, int | float) and not isinstance(value, bool) and not lowest <= value < float("inf"):
            raise SystemExit(f"error: --{name.replace('_', '-')} is {value}, expected {lowest} or more")
    if args.cudagraphs and not torch.cuda.is_available():
        raise SystemExit("error: --cudagraphs needs an NVIDIA GPU, and none was found; drop the flag")
    if args.compile and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise SystemExit("error: --compile needs a C compiler, and none was found; install gcc or give --no-compile")
    if args.resume and not args.run_dir:
        raise SystemExit("error: --resume needs the --run-dir that it is to continue; give both")
    if args.run_dir is None or not os.path.exists(args.run_dir):
        return
    names = os.listdir(args.run_dir) if os.path.isdir(args.run_dir) else [""]
    found = {"", "checkpoint.pt", "model.pt", "evaluations.csv", "targets.json"} & set(names)
    events = any(name.startswith("events.out.tfevents") for name in names)
    if (found or events) and not args.resume:
        hint = "continue it with --resume, or choose another folder"
        raise SystemExit(f"error: --run-dir {args.run_dir} holds a run already, or is a file; {hint}")
    if "checkpoint.pt" not in found and (found or events and "lock" not in names):  # events alone: killed early
        hint = "put its checkpoint.pt back, or choose another folder"
        raise SystemExit(f"error: --run-dir {args.run_dir} holds a run without a checkpoint; {hint}")


def log_search(writer, result, step):
    """Health of a search: mean root value, entropy of the visits in nats, depth of the deepest leaf."""
    visits = result.visits / result.visits.sum(axis=1, keepdims=True)  # [n, A]
    writer.add_scalar("search/root_value", result.root_value.mean(), step)
    writer.add_scalar("search/visit_entropy", -(visits * np.log(visits + 1e-12)).sum(axis=1).mean(), step)
    writer.add_scalar("search/max_depth", result.depth.max(), step)


def write_targets(run_dir, dataset, net, env_id, replay, legal, num_simulations, rng, interrupted):
    """Searches every state of the dataset without noise and writes targets.npz: visits uint16 [R, A], value float32 [R]
    (the value head, which targets bootstrap from), and targets.json, which ties them to the dataset. Writes nothing if
    `interrupted` gets an entry before it is done."""
    visits, value = np.zeros((replay.size, len(legal)), np.uint16), np.zeros(replay.size, np.float32)
    for rows in tqdm(np.array_split(np.arange(replay.size), -(-replay.size // 512)), unit="512 states", desc="targets"):
        if interrupted:
            return
        obs, legal_rows = stack_frames(replay, rows), np.repeat(legal[None], len(rows), 0)
        result, value[rows] = run_search(net, env_id, obs, legal_rows, num_simulations, rng, noise=False)
        visits[rows] = result.visits
    model.write_file(f"{run_dir}/targets.npz", lambda file: np.savez(file, visits=visits, value=value))
    fields = {"dataset": os.path.relpath(dataset, run_dir), "rows": replay.size, "num_simulations": num_simulations}
    files = ["model.pt", "targets.npz", f"{fields['dataset']}/meta.json"]
    model.write_manifest(f"{run_dir}/targets.json", "xtra-targets-1", fields, files)


if __name__ == "__main__":
    interrupted = model.catch_signals()  # gets an entry when the run shall stop
    args = tyro.cli(Args, description=__doc__)
    check_args(args, may_be_zero=("seed",))
    if not args.datasets:
        raise SystemExit("error: --datasets is empty, expected dataset folders; finetune.py --save-dataset writes one")
    m = len(args.datasets)
    if args.batch_size % m:
        raise SystemExit(f"error: --batch-size {args.batch_size} is not a multiple of the {m} --datasets; make it one")
    device, rank, W = model.join_processes(args.cuda)
    if args.batch_size // m % W:
        raise SystemExit(
            f"error: --batch-size {args.batch_size} / {m} is not a multiple of the {W} processes; make it one"
        )
    record = args.cudagraphs and device.type == "cuda" and W == 1  # messages between processes are not recorded
    checkpoint = model.load_checkpoint(args)

    # data setup
    metas = [dataset_meta(folder) for folder in args.datasets]
    env_ids = [meta["env_id"] for meta in metas]
    started = model.of_first(np.array(int(time.time())))  # in seconds; all processes must name the same folder
    run_name = f"{'+'.join(env_ids).replace('/', '-')}__{args.exp_name}__{args.seed}__{started}"
    run_dir = args.run_dir or f"runs/{run_name}"
    config = model.ModelConfig.of_width(args.channels, args.blocks)
    share = args.batch_size // m
    sizes = {
        "samples": args.batch_size,
        "roots": share * (args.unroll_steps + 1),
        "rows": sum(n["rows"] for n in metas),
    }
    on_host = model.check_memory(device, run_dir, config, num_simulations=args.num_simulations, **sizes)
    replays = [load_dataset(folder, device, on_host)[0] for folder in args.datasets]
    legal = [legal_actions(env_id) for env_id in env_ids]  # m x [A]
    for folder, replay in zip(args.datasets, replays, strict=True):
        if np.count_nonzero(replay.acted) < share:
            raise SystemExit(f"error: dataset {folder} has fewer steps than its share of --batch-size; lower that")

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)  # sampling, search and noise
    generator = torch.Generator(device).manual_seed(args.seed)  # augmentation

    # agent setup
    net = model.EfficientZeroNet(config).to(device, memory_format=torch.channels_last).train()
    model.share_batch_norms(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
    target_net, next_target_net = (model.inference_copy(net, record) for _ in range(2))
    loss_function = torch.compile(unroll_loss) if args.compile and W == 1 else unroll_loss

    def update(*batch):
        return compute_gradients(net, parameters, Batch(*batch), loss_function)

    update = model.Recorded(update) if record else update
    sample_names = np.repeat(env_ids, share)[rank::W]  # [B / W]
    log_every = max(1, min(100, args.num_updates // 100))  # updates
    updates, evaluated, scores = 0, -1, {}  # evaluated: when the last evaluation was, in updates
    evaluations = "env_steps,updates,episode,return,length,env_id\n"

    # the run folder, and if the run goes on, all that it had
    lock = model.lock_folder(run_dir, checkpoint) if rank == 0 else None
    inputs = [model.sha256(f"{folder}/meta.json") for folder in args.datasets]
    parts = {"net": net, "target": target_net, "next_target": next_target_net, "optimizer": optimizer}
    parts |= {"rng": rng, "generator": generator}
    if checkpoint:
        kinds = {"updates": int, "evaluated": int, "scores": dict, "evaluations": str}
        updates, evaluated, scores, evaluations = model.restore(run_dir, checkpoint, inputs, parts, replays, **kinds)
    if args.resume and rank == 0:
        model.rewind_events(run_dir, checkpoint["events"] if checkpoint else {})
        if checkpoint:  # the table may be torn
            model.write_file(f"{run_dir}/evaluations.csv", evaluations.encode(), keep_going=True)

    # TRY NOT TO MODIFY: start the training
    start_time, start_updates = time.time(), updates
    output = sys.stderr if rank == 0 else sys.stdout  # the others' goes nowhere
    bar = tqdm(total=args.num_updates, initial=updates, unit="update", dynamic_ncols=True, file=output)
    with bar, model.stop_if_not_finite(run_dir, bar):
        writer = make_writer(args, run_name, run_dir) if rank == 0 else model.Log(None)
        while True:
            last = updates >= args.num_updates
            if (last or updates % args.eval_every == 0) and evaluated < updates:
                settings = args.eval_episodes, args.eval_max_frames, args.num_simulations, device, None, interrupted
                agent, players = model.inference_copy(net, record), env_ids if rank == 0 else []
                results = [evaluate(agent, env_id, *settings) for env_id in players]
                if not model.any_interrupted(interrupted):
                    for env_id, (returns, lengths) in zip(players, results, strict=True):
                        suffix = f"/{env_id}" if m > 1 else ""
                        evaluations += log_evaluation(writer, env_id, 0, updates, returns, lengths, suffix)
                        scores[env_id] = float(returns.mean())
                    evaluated = updates
                    bar.set_postfix(eval_return=f"{np.mean([scores.get(env_id, 0.0) for env_id in env_ids]):.1f}")
            stop = last or model.any_interrupted(interrupted)  # once: a signal may come at any moment
            saved = False
            if rank == 0 and (stop or evaluated == updates or updates % args.checkpoint_every == 0):
                values = {"updates": updates, "evaluated": evaluated, "scores": scores, "evaluations": evaluations}
                content = parts, replays, max(1, updates // 200), values
                saved = model.save_checkpoint(run_dir, writer, args, inputs, *content, keep_going=not stop)
            if evaluated == updates and saved and not os.path.exists(f"{run_dir}/targets.json"):  # which names model.pt
                model.write_file(f"{run_dir}/evaluations.csv", evaluations.encode(), keep_going=not last)
                saved_args = vars(args) | {"datasets": [os.path.relpath(folder, run_dir) for folder in args.datasets]}
                counters = {"updates": updates, "scores": scores}
                model.save_model(f"{run_dir}/model.pt", net, saved_args, env_ids, counters, keep_going=not last)
            if stop:
                break

            # ALGO LOGIC: training.
            if updates % 200 == 0:  # the target network is the network of 200 to 400 updates ago
                model.refresh(target_net, next_target_net)
                model.refresh(next_target_net, net)
            beta = 0.4 + 0.6 * min(1.0, updates / (1.2 * args.num_updates))
            drawn, batches, result = [], [], None
            for env_id, replay, legal_mask in zip(env_ids, replays, legal, strict=True):
                rows, weight = sample(replay, share, beta, rng)
                td_steps = np.full(share, args.td_steps)  # fixed data does not age
                targets = make_targets(replay, rows, td_steps, args.unroll_steps)
                settings = env_id, replay, targets, legal_mask, args.num_simulations, rng, args.reanalyze_cache, rank, W
                policy, value, searched = reanalyze(target_net, max(1, updates // 200), *settings)
                result = searched or result
                drawn.append(rows)
                batches.append(make_batch(replay, targets, policy, value, weight, rng, generator))
            batch = Batch(*[torch.cat(tensors)[rank::W] for tensors in zip(*batches, strict=True)])  # [B / W, ...]

            loss, norm, terms, priority, gradients = update(*batch)  # [B / W] each sample's, task after task
            # The only wait for a GPU in an update besides the search's.
            numbers = torch.cat([model.interleave(priority), loss.view(1), norm.view(1)]).cpu().numpy()
            model.check_finite(*numbers[-2:], terms, gradients, sample_names, net, batch)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grads_with_norm_(parameters, 5.0, norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(updates, args.num_updates, args.learning_rate)
            optimizer.step()
            for replay, rows, new in zip(replays, drawn, numbers[:-2].reshape(m, share), strict=True):
                replay.priority[rows] = new

            if updates % log_every == 0:
                writer.add_scalar("losses/loss", numbers[-2], updates)
                for name, term in terms.items():
                    writer.add_scalar(f"losses/{name}_loss", model.interleave(term).mean().item(), updates)
                writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], updates)
                writer.add_scalar("charts/beta", beta, updates)
                speed = (updates + 1 - start_updates) / (time.time() - start_time)
                writer.add_scalar("charts/updates_per_second", speed, updates)
                if result is not None:  # nothing was stale
                    log_search(writer, result, updates)
                writer.flush()
            updates += 1
            bar.update()
        bar.close()
        if rank == 0 and m == 1 and not os.path.exists(f"{run_dir}/targets.json"):  # its answers for every state
            settings = env_ids[0], replays[0], legal[0], args.num_simulations, rng, interrupted
            write_targets(run_dir, args.datasets[0], model.inference_copy(net, record), *settings)

    if model.any_interrupted(interrupted):
        print(f"{run_dir}: stopped at update {updates} by {interrupted[0]}. Next: the same command with --resume")
        sys.exit(model.INTERRUPTED)
    print(f"{run_dir}: teacher saved. Next: python distill.py --teachers {run_dir} OTHER_TEACHERS...")
