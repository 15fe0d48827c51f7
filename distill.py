# docs: docs/distill.md
"""Stage 1b of XTRA: one multi-task student, distilled from m single-task teachers (XTRA, 3.1).

    python distill.py --teachers runs/teacher-alien runs/teacher-amidar --run-dir runs/student

In: the run folders of `pretrain_teacher.py`. Out: a run folder with the student (model.pt), which names its teachers.
Tasks are sampled uniformly. Learned are the teacher's policy of each state, searched once and stored, and as a value 5
rewards of the data and then the teacher's value; value prefix and consistency come from the data. So no search runs in
training. `--policy-target actions` trains the behaviour-cloning baseline of Table 1 instead: cross-entropy on the
dataset's actions, acted on without a search.

Letters: B batch, m games, K unroll steps, A actions (the 18 ALE ids), R rows of the replay, E updates of a cycle.
The x-axis is updates; there are no environment steps outside evaluation.
"""

import difflib
import functools
import os
import re
import time
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import ale_py  # noqa: F401  (importing it registers the games with Gymnasium)
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from ale_py.vector_env import AtariVectorEnv
from torch.utils.tensorboard import SummaryWriter

import mcts
import model


# Copied from pretrain_teacher.py
@dataclass
class Training:
    unroll_steps: int = 5  # K, steps that the model is unrolled
    learning_rate: float = 0.2  # of SGD, after a warm-up over 1 % of the run
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # of SGD, on all parameters
    max_grad_norm: float = 5.0  # the gradient of an update is scaled down to this norm
    value_prefix_coef: float = 1.0  # weight of the value prefix, the sum of rewards that the model g predicts
    policy_coef: float = 1.0  # weight of the policy, which the prediction network f learns from searches
    value_coef: float = 0.25  # weight of the value, which f predicts too
    consistency_coef: float = 2.0  # weight of the likeness of latents predicted by g and encoded by h
    step_statistics: bool = True  # whether searches use batch norm statistics of each unroll step; released code: no
    action_gain: float = 30.0  # factor on the initial weights of the model g for the action; released code: 1
    one_hot_actions: bool = False  # one plane per action for g, not one of a/18: a departure, for --action-gain 4


# Copied from pretrain_teacher.py
@dataclass
class Targets:
    gamma: float = 0.997**4  # discount per environment step of 4 frames, in targets and searches
    td_steps: int = 5  # rewards before the bootstrap in a value target
    clip_rewards: bool = True  # whether rewards are learned by their sign
    priority_exponent: float = 0.6  # rows are drawn in proportion to priority to this power
    priority_beta: float = 0.4  # exponent of the importance weights at the start; 1 at 120 % of the run


# Copied from pretrain_teacher.py
@dataclass
class Evaluation:
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 32  # games of an evaluation, played side by side
    eval_max_frames: int = 108_000  # length at which an evaluation game is cut, in frames (1 step = 4 frames)


# Copied from pretrain_teacher.py
@dataclass
class Run:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    run_dir: str | None = None  # the folder to write; default runs/{env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # whether to go on from the checkpoint in --run-dir; where there is none, the run starts
    checkpoint_every: int = 1_000  # updates between checkpoints; each evaluation writes one too
    track: bool = False  # whether to mirror the logs to Weights and Biases
    wandb_project_name: str = "xtra"  # the W&B project
    wandb_entity: str | None = None  # the W&B entity (team)
    cuda: bool = True  # whether to use the GPU; a machine without one runs on the CPU
    torch_deterministic: bool = True  # whether cuDNN may only use deterministic algorithms
    compile: bool = True  # whether torch.compile fuses the kernels of the networks that learn, on a GPU
    cudagraphs: bool = True  # whether an update is recorded once and then replayed as one CUDA graph, on a GPU
    search_cudagraphs: bool = True  # the same for a simulation of a search


@dataclass
class Args:
    teachers: tuple[str, ...] = ()  # run folders of pretrain_teacher.py, one per game
    policy_target: Literal["teacher", "actions"] = "teacher"  # the teachers' search policies, or behaviour cloning
    seed: int = 1  # seed of the experiment
    num_updates: int = 100_000  # gradient updates (not in the paper: our choice)
    cycle: int = 8  # E, updates whose batches are drawn at once
    batch_size: int = 256  # samples per update, shared evenly among the teachers
    channels: int = 64  # channels of the latent; LSTM and projector scale with them
    blocks: int = 4  # residual blocks per group of the representation network h (1: EfficientZero; 4: -L and XTRA)
    num_simulations: int = 50  # simulations of a search (evaluation only); 0, and behaviour cloning: the policy alone
    c_init: float = 1.25  # weight of the prior against the values in a search
    training: Training = field(default_factory=Training)
    targets: Targets = field(default_factory=Targets)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)


MAY_CHANGE = {*vars(Run()), "teachers"}  # on --resume; the content of the datasets is compared


# Copied from pretrain_teacher.py
def check_games(args, flag, expected):
    """Exits with one line if `--flag` names no game, or if games or cycles do not divide what they are to share."""
    m = len(getattr(args, flag))
    if m == 0:
        raise SystemExit(f"error: --{flag} is empty, expected {expected}")
    if args.batch_size % m:
        raise SystemExit(f"error: --batch-size {args.batch_size} is not a multiple of the {m} --{flag}; make it one")
    if args.num_updates % args.cycle:
        raise SystemExit(f"error: --num-updates {args.num_updates} is no multiple of --cycle {args.cycle}; make it one")


# Copied from pretrain_teacher.py
def choose_device(args, num_updates):
    """The GPU, or the CPU with the reason why; says so, and what that means for the speed of `num_updates`. `args` gets
    what is used."""
    missing = "this PyTorch is built for CPUs" if torch.version.cuda is None else "no NVIDIA GPU or no driver for it"
    reason = missing if args.cuda else "--no-cuda"
    args.cuda = args.cuda and torch.cuda.is_available()
    args.compile = args.compile and args.cuda
    args.cudagraphs = args.cudagraphs and args.cuda
    args.search_cudagraphs = args.search_cudagraphs and args.cuda
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.cuda:
        networks = "compiled" if args.compile else "not compiled"
        updates = "recorded" if args.cudagraphs else "not recorded"
        searches = "recorded" if args.search_cudagraphs else "not recorded"
        name = torch.cuda.get_device_name()
        print(f"device: {name}, bfloat16; networks are {networks}, updates {updates}, searches {searches}")
        return torch.device("cuda")
    print(f"device: CPU, float32; nothing is compiled or recorded ({reason})")
    if num_updates and args.channels * args.batch_size >= 64 * 256:
        print("an update of this size takes 10 to 80 s on two cores; benchmark/quickstart.sh has settings for a CPU")
    return torch.device("cpu")


# Copied from pretrain_teacher.py
def make_writer(args, run_name, updates):
    """TensorBoard in the run folder; what an earlier process logged from `updates` on is dropped by its readers."""
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name}
        wandb.init(**names, sync_tensorboard=True, config=vars(args), save_code=True)
    writer = SummaryWriter(args.run_dir, purge_step=updates)
    table = "".join(f"|{key}|{value}|\n" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    return writer


# --- environment ---
# Copied from pretrain_teacher.py
def atari_rom(env_id):
    """The ROM of `<Game>NoFrameskip-v4` ("ms_pacman" for MsPacman), or None for another environment.

    Exits with one line if the id means an Atari game, but is not of this form.
    """
    ids = [name for name in gym.registry if name.startswith("ALE/")]
    roms = {name[4:].removesuffix("-v5"): gym.registry[name].kwargs["game"] for name in ids}
    game = env_id.removesuffix("NoFrameskip-v4")
    if game != env_id and game in roms:
        return roms[game]
    name = env_id.split(":")[-1]
    if ":" in env_id and name not in gym.registry:  # its module is not imported yet
        return None
    if name in gym.registry and "ale_py" not in str(gym.registry[name].entry_point):
        return None
    stem = re.sub(r"^ale/|(noframeskip|deterministic)?(-v\d+)?$", "", name.lower()).replace("_", "")
    games = {game.lower(): game for game in roms}
    close = difflib.get_close_matches(stem, games, 1, cutoff=0.75)
    if close:
        found = "is not Atari 100k: sticky actions or another frame skip" if name in gym.registry else "does not exist"
        raise SystemExit(f"error: --env-id {env_id} {found}; did you mean {games[close[0]]}NoFrameskip-v4?")
    return None


# Copied from pretrain_teacher.py
def make_envs(env_id, num_envs):
    """`num_envs` copies of a game; after `reset(seed=s)` copy i plays the games of seed s + i.

    Observations are uint8 after `obs.reshape(num_envs, 96, 96, 3)`, rewards raw, Atari actions ALE ids, and Atari's
    lives are in the info. A game is over if it is terminated or truncated; the next step ignores its action, pays 0 and
    returns the first frame of a new game. Exits with one line if an environment cannot be made, reset and stepped.
    """
    if rom := atari_rom(env_id):
        return model.AtariGames(
            rom,
            num_envs,
            num_threads=min(num_envs, os.cpu_count() or 1),
            img_height=96,
            img_width=96,
            grayscale=False,
            stack_num=1,
            frameskip=4,
            noop_max=31,  # 0 to 30 no-ops start a game
            repeat_action_probability=0.0,
            use_fire_reset=False,
            reward_clipping=False,
            life_loss_info=False,  # `terminated` is the game's own end; `episodic_life=True` would restart it
            max_num_frames_per_episode=108_000,
        )
    return model.make_own_envs(env_id, num_envs)


# Copied from pretrain_teacher.py
def legal_actions(env_id):
    """Which of the 18 ALE ids the game knows, bool [A]: ALE's minimal action set, or the first n of Discrete(n)."""
    if rom := atari_rom(env_id):
        ids = [action.value for action in AtariVectorEnv(rom, 1, num_threads=1).ale.get_action_set()]
    else:
        ids = range(make_envs(env_id, 1).single_action_space.n)
    return np.isin(np.arange(18), ids)


# --- data ---
# What `Replay.end` says of an episode's last action. All are terminal, the time limit too, as in EfficientZero.
LIFE_LOST, GAME_OVER, TIME_LIMIT = 1, 2, 3


# Copied from pretrain_teacher.py
class Replay:
    """Flat arrays with one row per frame, for all games. What one environment shows is a stream: row i holds frame o_t
    and row i + 1 holds o_t+1. A row that was not acted on holds the last frame of a game, or of its stream.

    Every state has a policy and a value, its targets. Who writes them is what distinguishes the three scripts.
    """

    def __init__(self, rows, device="cpu"):
        self.frames = torch.zeros(rows, 3, 96, 96, dtype=torch.uint8, device=device)  # [R, 3, 96, 96] o_t
        self.action = np.zeros(rows, np.int64)  # [R] a_t, an ALE id
        self.reward = np.zeros(rows, np.float32)  # [R] of a_t, raw: clipped where targets are made
        self.acted = np.zeros(rows, bool)  # [R] whether a_t was taken
        self.end = np.zeros(rows, np.uint8)  # [R] 0, or how a_t ended the episode: LIFE_LOST, GAME_OVER, TIME_LIMIT
        self.age = np.zeros(rows, np.int64)  # [R] t, environment steps since the episode's first frame
        self.stored_at = np.zeros(rows, np.int64)  # [R] environment steps of the run when a_t was taken (finetune.py)
        self.priority = np.zeros(rows)  # [R] 0 where not acted
        self.policy = np.zeros((rows, 18), np.float32)  # [R, A] visits / num_simulations of the latest search of o_t
        self.value = np.zeros(rows, np.float32)  # [R] value of o_t, of the same network
        self.turn = np.zeros(rows, np.int64)  # [R] number of that search; 0: never searched
        self.uses = np.zeros(rows, np.int64)  # [R] how often they were learned from since


# Copied from pretrain_teacher.py
class Game(NamedTuple):
    env_id: str
    rows: slice  # of the replay
    legal: np.ndarray  # [A] bool


def read_teacher(folder):
    """A run folder of pretrain_teacher.py -> the dict of its data, with the teacher's `policy`, `value`, `score` and
    `folder`. Exits with one line if the file is missing or damaged."""
    data = model.read_dataset(f"{folder}/targets.npz", is_answered=True)
    return data | {"score": float(data["score"]), "folder": os.path.realpath(folder)}


def teacher_folders(datasets, run_dir):
    """Where the offline games' teachers lie, for model.pt: {checksum: [seen from the run folder, absolute]}. If one of
    the two folders moves, the other way leads there."""
    start = os.path.realpath(run_dir)
    return {data["checksum"]: [os.path.relpath(data["folder"], start), data["folder"]] for data in datasets}


# Copied from pretrain_teacher.py
def make_replay(datasets, extra_rows, device):
    """One replay for all games: the rows of each dataset, then `extra_rows` empty ones -> Replay, Game of each dataset.

    Frames lie on the GPU if it has room, else in RAM. Exits with one line if they fit neither.
    """
    lengths = [len(data["action"]) for data in datasets]
    num_bytes = (sum(lengths) + extra_rows) * 3 * 96 * 96
    if device.type == "cuda" and num_bytes > 0.7 * torch.cuda.mem_get_info(device)[0]:  # networks need the rest
        device = torch.device("cpu")
    free = psutil.virtual_memory().available
    if device.type == "cpu" and num_bytes > free:
        found = f"the frames take {num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB of memory are free"
        raise SystemExit(f"error: {found}; store fewer steps or games, or close other programs")
    print(f"frames: {num_bytes / 1e6:,.0f} MB {'on the GPU' if device.type == 'cuda' else 'in RAM'}")
    replay = Replay(sum(lengths) + extra_rows, device)
    games = []
    for data, stop, length in zip(datasets, np.cumsum(lengths).tolist(), lengths, strict=True):
        rows = slice(stop - length, stop)
        unpack_dataset(replay, rows, data)
        games.append(Game(data["env_id"], rows, legal_actions(data["env_id"])))
    return replay, games


# Copied from pretrain_teacher.py
def unpack_dataset(replay, rows, data):
    """Puts the arrays of `read_dataset` into rows of the replay; every row that was acted on has priority 1."""
    for first, chunk in model.unpack_frames(data):  # [8, 96, 96, 3]
        first += rows.start
        replay.frames[first : first + len(chunk)] = torch.tensor(chunk).permute(0, 3, 1, 2)
    for name in data.keys() & vars(replay).keys() - {"frames"}:  # policy and value too, if a teacher gave them
        getattr(replay, name)[rows] = data[name]
    # An episode starts after a row not acted on, and after a lost life. A game's last frame still belongs to it.
    starts = np.ones(rows.stop - rows.start, bool)
    starts[1:] = ~data["acted"][:-1] | ((data["end"][:-1] > 0) & data["acted"][1:])
    t = np.arange(len(starts))
    replay.age[rows] = t - np.maximum.accumulate(np.where(starts, t, 0))
    replay.priority[rows] = data["acted"]


# Copied from pretrain_teacher.py
def sample(replay, games, sizes, num_batches, exponent, beta, rng):
    """Draws `num_batches` = E batches, each with `sizes[g]` rows of each game, `P ~ priority^exponent`. No row comes
    twice in a batch, unless its game has fewer rows than that.

    -> rows [E, B], importance weights `(N * P)^-beta / max` [E, B], the maximum being of one game in one batch.
    """
    rows, weight = [], []
    for game, size in zip(games, sizes, strict=True):
        priority = replay.priority[game.rows]  # [R of the game]
        mass = np.where(priority > 0, priority**exponent, 0.0)
        probability = mass / mass.sum()
        N = np.count_nonzero(mass)
        if N < size:
            drawn = rng.choice(len(mass), (num_batches, size), p=probability)  # [E, size]
        else:
            drawn = model.draw_different(rng, probability, size, num_batches)
        inverse = (N * probability[drawn]) ** -beta
        rows.append(game.rows.start + drawn)
        weight.append(inverse / inverse.max(axis=1, keepdims=True))
    return np.concatenate(rows, axis=1), np.concatenate(weight, axis=1).astype(np.float32)


# --- targets ---

# As in the table of pretrain_teacher.py, p_k and v_k+n being the policy and the value that the teacher gave each state.


# Copied from pretrain_teacher.py
def make_targets(replay, roots, td_steps, unroll_steps, gamma, clip_rewards, rng):
    """What is learned from the rows `roots` [E, B], as in the table above -> dict of arrays [E, B, ...].

    `z = reward_sum + gamma^n * value` of the state n steps on: n is td_steps (one number, or [E, B]), or fewer where
    the episode ends (then nothing is bootstrapped) or a stream's newest frame comes (then that is bootstrapped from).
    gamma is per environment step of 4 frames. `frames` are the rows of o_t-3 .. o_t+K; past the end the last repeats.
    """
    shape = roots.shape
    td_steps = np.broadcast_to(td_steps, shape).ravel()  # [N], N = E * B
    roots = roots.ravel()  # [N]
    N, K = len(roots), unroll_steps
    J = K + td_steps.max()
    rows = np.repeat(roots[:, None], J + 1, axis=1)  # [N, J+1] of state j, clipped to the last state that exists
    exists = np.ones((N, J + 1), bool)  # action j-1 was taken, so there is a frame
    alive = np.ones((N, J + 1), bool)  # exists and is not terminal
    for j in range(J):
        exists[:, j + 1] = alive[:, j] & replay.acted[rows[:, j]]
        alive[:, j + 1] = exists[:, j + 1] & (replay.end[rows[:, j]] == 0)
        rows[:, j + 1] = rows[:, j] + exists[:, j + 1]
    taken = exists[:, 1:]  # [N, J] whether action j was taken
    reward = replay.reward[rows[:, :-1]] * taken  # [N, J]
    reward = np.sign(reward) if clip_rewards else reward
    prefix = np.cumsum(reward[:, :K], axis=1)  # [N, K]
    # If K > 5: u_k counts from the last reset of the LSTM on. Backwards, as each subtrahend must still be a plain sum.
    for k in range(K, mcts.VALUE_PREFIX_HORIZON, -1):
        last_reset = (k - 1) // mcts.VALUE_PREFIX_HORIZON * mcts.VALUE_PREFIX_HORIZON
        prefix[:, k - 1] -= prefix[:, last_reset - 1]
    value = np.zeros((N, K + 1))
    for k in range(K + 1):
        n = np.minimum(td_steps, taken[:, k:].sum(axis=1))  # [N]
        for i in range(td_steps.max()):
            value[:, k] += (i < n) * gamma**i * reward[:, k + i]
        bootstrap = rows[np.arange(N), k + n]
        value[:, k] += gamma**n * replay.value[bootstrap] * alive[np.arange(N), k + n]
    back = np.minimum([3, 2, 1], replay.age[roots, None])
    # Past the end the action is random, as in the reference: masked in every loss, it only enters BN's statistics.
    action = np.where(taken[:, :K], replay.action[rows[:, :K]], rng.integers(18, size=(N, K)))
    targets = {
        "frames": np.concatenate([roots[:, None] - back, rows[:, : K + 1]], axis=1),  # [N, K+4]
        "action": action,  # [N, K]
        "mask": exists[:, : K + 1].astype(np.float32),  # [N, K+1]
        "policy": replay.policy[rows[:, : K + 1]] * alive[:, : K + 1, None],  # [N, K+1, A]
        "value": value.astype(np.float32),  # [N, K+1]
        "value_prefix": prefix.astype(np.float32),  # [N, K]
    }
    return {name: x.reshape(*shape, *x.shape[1:]) for name, x in targets.items()}


# Copied from pretrain_teacher.py
class Batch(NamedTuple):
    obs: torch.Tensor  # [B, 12, 96, 96] augmented
    target_obs: torch.Tensor  # [B, 3 * (K+3), 96, 96] augmented; the stack of o_t+k is channels 3k-3 .. 3k+9
    action: torch.Tensor  # [B, K]
    mask: torch.Tensor  # [B, K+1]
    policy: torch.Tensor  # [B, K+1, A]
    value: torch.Tensor  # [B, K+1]
    value_prefix: torch.Tensor  # [B, K]
    weight: torch.Tensor  # [B] importance weights


# Copied from pretrain_teacher.py
def take_samples(replay, batches, i, device):
    """Batch i of `make_targets` and weights (dict of tensors [E, B, ...]) -> dict of tensors [B, ...] on the device.
    Where the frames lie in RAM, "frames" are no rows [B, K+4] any more, but the frames [B, K+4, 3, 96, 96]."""
    samples = {name: x[i] for name, x in batches.items()}
    if replay.frames.device.type != device.type:  # pinned, so that the CPU does not wait for the copy
        samples["frames"] = replay.frames[samples["frames"]].pin_memory().to(device, non_blocking=True)
    return samples


# Copied from pretrain_teacher.py
def take_batch(replay, samples, generator):
    """The batch of `take_samples`, its frames gathered and augmented."""
    frames = samples["frames"]
    if frames.dtype == torch.int64:  # their rows
        frames = replay.frames[frames]  # [B, K+4, 3, 96, 96]
    return Batch(
        obs=model.augment(frames[:, :4].flatten(1, 2), generator),
        target_obs=model.augment(frames[:, 1:].flatten(1, 2), generator),
        **{name: x for name, x in samples.items() if name != "frames"},
    )


# --- loss ---
# Copied from pretrain_teacher.py
def unroll_loss(net, batch, coefficients):
    """The EfficientZero loss (XTRA, Eq. 3 with cross-entropies and a cosine, as in the released code).

    Returns per sample [B]: the total `sum_i coefficients_i * term_i`, each term (sums over the unroll, before
    coefficient and importance weight), and the priority `|value_0 - z_0| + 1e-6`.
    Steps past the end are masked, so only true states are learned from.
    """
    B, K = batch.action.shape
    support = net.config.support
    latent, policy_logits, value_logits = net.initial_inference(batch.obs)
    lstm_state = net.initial_lstm_state(B, latent)
    step = torch.zeros(1, dtype=torch.int64, device=latent.device)
    priority = (model.support_to_scalar(value_logits.detach()) - batch.value[:, 0]).abs() + 1e-6
    value_code = model.scalar_to_support(batch.value, support)  # [B, K+1, S]
    prefix_code = model.scalar_to_support(batch.value_prefix, support)  # [B, K, S]
    policy_loss = model.cross_entropy(policy_logits, batch.policy[:, 0])
    value_loss = model.cross_entropy(value_logits, value_code[:, 0])
    prefix_loss = torch.zeros_like(value_loss)
    consistency_loss = torch.zeros_like(value_loss)
    for k in range(1, K + 1):
        step = step + 1  # k, where the network is
        latent, lstm_state, prefix_logits, policy_logits, value_logits = net.recurrent_inference(
            latent, batch.action[:, k - 1], lstm_state, step
        )
        # Before the call without gradients: autocast caches the weights that it casts. Cast there first, they would be
        # used here too, and the projector would get no gradient.
        online = net.predictor(net.projector(latent)).float()
        with torch.no_grad():  # f runs here for its batch norm statistics only, as in the reference
            target_latent = net.initial_inference(batch.target_obs[:, 3 * k - 3 : 3 * k + 9])[0]
            target = net.projector(target_latent).float()
        mask = batch.mask[:, k]  # [B]
        policy_loss += mask * model.cross_entropy(policy_logits, batch.policy[:, k])
        value_loss += mask * model.cross_entropy(value_logits, value_code[:, k])
        prefix_loss += mask * model.cross_entropy(prefix_logits, prefix_code[:, k - 1])
        consistency_loss -= mask * F.cosine_similarity(online, target, dim=-1, eps=1e-5)
        if k % mcts.VALUE_PREFIX_HORIZON == 0:
            lstm_state = net.initial_lstm_state(B, latent)
    terms = {"value_prefix": prefix_loss, "policy": policy_loss}
    terms |= {"value": value_loss, "consistency": consistency_loss}
    total = sum(coefficients[name] * term for name, term in terms.items())
    return total, terms, priority


def cloning_loss(net, batch, coefficients):
    """Behaviour cloning: `-log p(a_t | o_t)` with no model and no value; returns as `unroll_loss`."""
    policy_logits = net.initial_inference(batch.obs)[1]
    loss = F.cross_entropy(policy_logits.float(), batch.action[:, 0], reduction="none")  # [B]
    return coefficients["policy"] * loss, {"policy": loss}, torch.ones_like(loss)


# Copied from pretrain_teacher.py
def learn(net, loss_function, batch, *, coefficients):
    """One pass forward and back -> `mean(weight * total)`, the terms and the priority of each sample.

    Afterwards the parameters' `.grad` is the gradient of that loss / K, K being the unroll steps (EfficientZero).
    """
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=batch.obs.is_cuda):
        total, terms, priority = loss_function(net, batch, coefficients)
    loss = (batch.weight * total).mean()
    net.zero_grad(set_to_none=False)  # gradients stay in place: a recorded pass writes there
    (loss / batch.action.shape[1]).backward()
    terms = {name: term.detach() for name, term in terms.items()}  # else autograd's graph outlives this call
    return loss.detach(), terms, priority


# Copied from pretrain_teacher.py
def update_net(replay, generator, optimizer, max_grad_norm, learn_batch, samples, *weights):
    """One update from `take_samples`: gather, augment, loss and pass back, clip, step. `learn_batch(batch, *weights)`
    -> numbers [B + 2] (the priority of each sample, the loss, the gradient norm), the terms, and what else it returns.

    Recorded on a GPU, all of this is launched at once, and Python runs it no more: what changes comes in a tensor, the
    learning rate too.
    """
    batch = take_batch(replay, samples, generator)
    loss, terms, priority, *others = learn_batch(batch, *weights)
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
    return torch.cat([priority, loss.view(1), norm.view(1)]), terms, *others


# Copied from pretrain_teacher.py
def store_priorities(replay, rows, numbers, first_update):
    """Waits for the `numbers` [B + 2] of E updates (`update_net`) and gives the `rows` [E, B] their priorities
    -> numbers [E, B + 2]. Exits with one line if a loss is not finite."""
    numbers = torch.stack(numbers).cpu().numpy()
    finite = np.isfinite(numbers).all(axis=1)  # [E]
    if not finite.all():
        update = first_update + finite.argmin()
        raise SystemExit(f"error: the loss is not finite at update {update}; try a lower --learning-rate")
    for update_rows, priority in zip(rows, numbers[:, :-2], strict=True):  # in this order: the latest stays
        replay.priority[update_rows] = priority
    return numbers


# Copied from pretrain_teacher.py
def learning_rate_at(update, total, base):
    """Warm-up over 1 % of the run from exactly 0, then `base`, and a tenth of it from 101 % on (EfficientZero)."""
    warm_up = total // 100
    return base * update / warm_up if update < warm_up else base * 0.1 ** ((update - warm_up) // total)


# --- evaluation ---
# Copied from pretrain_teacher.py
def evaluate(search, env_id, max_frames, movie=None):
    """Plays `search.capacity` whole games side by side (seeds 0, 1, ..., full lives, no noise, the most visited action
    or the lowest of several) -> raw returns [episodes], lengths in environment steps [episodes].

    movie: a list that gets each frame of the first game, and the score until then (finetune.py).
    """
    episodes = search.capacity
    rng = np.random.default_rng(0)
    device = next(search.net.parameters()).device
    envs = make_envs(env_id, episodes)
    legal = legal_actions(env_id)  # [A]
    frames = envs.reset(seed=0)[0].reshape(episodes, 96, 96, 3)
    stack = torch.as_tensor(frames).permute(0, 3, 1, 2).repeat(1, 4, 1, 1).to(device)  # [episodes, 12, 96, 96]
    returns = np.zeros(episodes)
    lengths = np.zeros(episodes, np.int64)
    active = np.arange(episodes)
    if movie is not None:
        movie.append((frames[0].copy(), 0.0))
    bar = model.Progress(total=episodes, desc="evaluation", unit="game", leave=False, miniters=0)
    while len(active):
        action = np.zeros(episodes, np.int64)  # finished games leave the search; their actions do not matter
        action[active] = search(stack[active], legal, rng, noise=False).policy.argmax(axis=1)
        frames, reward, terminated, truncated, _ = envs.step(action)
        frames = frames.reshape(episodes, 96, 96, 3)
        stack = torch.cat([stack[:, 3:], torch.as_tensor(frames).permute(0, 3, 1, 2).to(device)], dim=1)
        returns[active] += reward[active]
        lengths[active] += 1
        if movie is not None and 0 in active:
            movie.append((frames[0].copy(), returns[0]))
        active = active[~(terminated | truncated | (lengths >= max_frames // 4))[active]]
        bar.set_postfix(steps=lengths.max(), refresh=False)
        bar.update(episodes - len(active) - bar.n)
    bar.close()
    envs.close()
    return returns, lengths


# Copied from pretrain_teacher.py
def short_name(env_id):
    """A game's name in TensorBoard and in what is printed: "Phoenix", or "Catch-v0" of toy_env:Catch-v0."""
    return env_id.removesuffix("NoFrameskip-v4").split(":")[-1]


# Copied from pretrain_teacher.py
def log_evaluation(writer, env_id, env_steps, updates, returns, lengths, suffix=""):
    """The means to TensorBoard and the terminal -> one line per game for evaluations.csv."""
    writer.add_scalar("eval/episodic_return" + suffix, returns.mean(), updates)
    writer.add_scalar("eval/episodic_length" + suffix, lengths.mean(), updates)
    played = f"return {returns.mean():.1f} (std {returns.std():.1f} of {len(returns)} games)"
    model.Progress.write(f"update {updates:,}: {short_name(env_id)}, {played}")
    games = enumerate(zip(returns.tolist(), lengths.tolist(), strict=True))
    return "".join(f"{env_steps},{updates},{i},{score},{length},{env_id}\n" for i, (score, length) in games)


if __name__ == "__main__":
    args = model.read_flags(Args, __doc__)
    model.check_numbers(args, may_be_zero=("seed", "num_simulations"))
    check_games(args, "teachers", expected="run folders; pretrain_teacher.py writes one")
    E = args.cycle
    m = len(args.teachers)
    cloning = args.policy_target == "actions"

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    device = choose_device(args, args.num_updates)
    rng = np.random.default_rng(args.seed)  # sampling
    generator = torch.Generator(device).manual_seed(args.seed)  # augmentation

    # data setup
    datasets = [read_teacher(folder) for folder in args.teachers]
    checksums = [data["checksum"] for data in datasets]
    env_ids = [data["env_id"] for data in datasets]
    if len(set(env_ids)) < m:
        raise SystemExit(f"error: --teachers has a game twice: {' '.join(env_ids)}; give one teacher of each game")
    sizes = m * [args.batch_size // m]  # samples of each game in a batch
    replay, games = make_replay(datasets, 0, device)

    # agent setup
    norm_steps = args.unroll_steps if args.step_statistics else 0
    actions = {"action_gain": args.action_gain, "one_hot_actions": args.one_hot_actions}
    config = model.ModelConfig.of_width(args.channels, args.blocks, norm_steps=norm_steps, **actions)
    net = model.EfficientZeroNet(config).to(device, memory_format=torch.channels_last).train()
    learning_rate = torch.zeros((), device=device)  # a tensor: a recorded update reads it where it lies
    optimizer = torch.optim.SGD(
        net.parameters(), lr=learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True
    )
    options = {"discount": args.gamma, "c_init": args.c_init}
    simulations = 0 if cloning else args.num_simulations
    evaluator = mcts.Search(model.inference_copy(net), simulations, args.eval_episodes, **options)
    loss_function = cloning_loss if cloning else unroll_loss
    coefficients = {name: getattr(args, f"{name}_coef") for name in ("value_prefix", "policy", "value", "consistency")}
    learn_batch = functools.partial(learn, net, loss_function, coefficients=coefficients)
    update_batch = functools.partial(update_net, replay, generator, optimizer, args.max_grad_norm, learn_batch)
    unroll_steps = 1 if cloning else args.unroll_steps  # cloning unrolls nothing: its loss is not divided by K

    # what makes a GPU faster: each is off by a flag, and changes nothing but the rounding
    if args.compile:  # each for itself: the loss, with all that it unrolls, would take minutes
        for network in net.children():
            network.compile(dynamic=False)
    if args.cudagraphs:
        update_batch = model.Recorded(update_batch, generator)
    if args.search_cudagraphs:
        evaluator.record = model.Recorded

    # the run folder, and if the run goes on, all that it had
    run_name = model.file_name(f"{m}-games__{args.exp_name}__{args.seed}__{int(time.time())}")
    run_dir = args.run_dir or f"runs/{run_name}"
    lock, checkpoint = model.open_run(args, Args, config, run_dir, MAY_CHANGE)  # locked until this process ends
    updates = 0
    scores = {}  # mean return of the last evaluation
    evaluations = "env_steps,updates,episode,return,length,env_id\n"
    learners = {"net": net, "optimizer": optimizer}
    if checkpoint:
        if checkpoint["datasets"] != checksums:
            raise SystemExit("error: --teachers are not those that the run was started with; give the same")
        for name, learner in learners.items():
            learner.load_state_dict(checkpoint[name])
        optimizer.param_groups[0]["lr"] = learning_rate
        rng.bit_generator.state = checkpoint["rng"]
        generator.set_state(checkpoint["generator"])
        replay.priority[:] = checkpoint["priority"].numpy()
        updates, scores, evaluations = checkpoint["updates"], checkpoint["scores"], checkpoint["evaluations"]

    def due(every):  # whether a multiple of `every` came since the last cycle
        return updates % every < E

    # TRY NOT TO MODIFY: start the training
    args.run_dir = run_dir
    writer = make_writer(args, run_name, updates)
    log_every = max(1, min(100, args.num_updates // 100))  # updates
    start_time, start_updates = time.time(), updates
    cycles = range(start_updates, args.num_updates + 1, E)
    # Each cycle begins with what is due before update number `updates`: so the untrained network is evaluated too.
    bar = model.Progress(cycles, total=args.num_updates // E, initial=start_updates // E, unit="update", unit_scale=E)
    for updates in bar:
        last = updates == args.num_updates
        evaluating = last or due(args.eval_every)
        if updates > start_updates and (evaluating or due(args.checkpoint_every)):
            writer.flush()
            checkpoint = {name: learner.state_dict() for name, learner in learners.items()}
            checkpoint |= {"rng": rng.bit_generator.state, "generator": generator.get_state()}
            checkpoint |= {"args": vars(args), "config": asdict(config)}
            checkpoint |= {"priority": torch.from_numpy(replay.priority), "datasets": checksums}
            checkpoint |= {"updates": updates, "scores": scores, "evaluations": evaluations}
            with model.whole_file(f"{run_dir}/checkpoint.pt") as file:  # a resumed run repeats the evaluation
                torch.save(checkpoint, file)
        if evaluating:
            model.refresh(evaluator.net, net)
            for env_id, data in zip(env_ids, datasets, strict=True):
                returns, lengths = evaluate(evaluator, env_id, args.eval_max_frames)
                evaluations += log_evaluation(writer, env_id, 0, updates, returns, lengths, f"/{short_name(env_id)}")
                writer.add_scalar(f"eval/teacher_return/{short_name(env_id)}", data["score"], updates)
                scores = scores | {env_id: float(returns.mean())}
            with model.whole_file(f"{run_dir}/evaluations.csv") as file:
                file.write(evaluations.encode())
            folders = teacher_folders(datasets, run_dir)
            info = {"args": vars(args), "env_ids": env_ids, "teacher_folders": folders}
            info["data"] = dict(zip(env_ids, checksums, strict=True))
            model.save_model(f"{run_dir}/model.pt", net, **info, updates=updates, scores=scores)
        if last:
            break

        # ALGO LOGIC: training.
        beta = args.priority_beta + (1 - args.priority_beta) * min(1.0, updates / (1.2 * args.num_updates))
        rows, weight = sample(replay, games, sizes, E, args.priority_exponent, beta, rng)  # [E, B] each
        batches = make_targets(replay, rows, args.td_steps, unroll_steps, args.gamma, args.clip_rewards, rng)
        batches["weight"] = weight
        batches = {name: torch.from_numpy(x).to(device) for name, x in batches.items()}  # [E, B, ...] each
        batches["frames"] = batches["frames"].to(replay.frames.device)
        numbers = []  # of each update: priorities, loss, gradient norm
        for update in range(updates, updates + E):
            samples = take_samples(replay, batches, update - updates, device)
            learning_rate.fill_(learning_rate_at(update, args.num_updates, args.learning_rate))
            number, terms = update_batch(samples)
            numbers.append(number.clone())  # a recording overwrites it
        numbers = store_priorities(replay, rows, numbers, updates)  # this alone waits for a GPU

        if due(log_every):
            writer.add_scalar("losses/loss", numbers[-1, -2], updates)
            writer.add_scalar("losses/gradient_norm", numbers[-1, -1], updates)
            for name, term in terms.items():
                writer.add_scalar(f"losses/{name}_loss", term.mean().item(), updates)
                for env_id, part in zip(env_ids, term.split(sizes), strict=True):
                    writer.add_scalar(f"losses/{name}_loss/{short_name(env_id)}", part.mean().item(), updates)
            writer.add_scalar("charts/learning_rate", learning_rate.item(), updates)
            writer.add_scalar("charts/beta", beta, updates)
            writer.add_scalar("charts/mean_weight", weight.mean(), updates)
            speed = (updates + E - start_updates) / (time.time() - start_time)
            writer.add_scalar("charts/updates_per_second", speed, updates)
    writer.close()

    for env_id, data in zip(env_ids, datasets, strict=True):
        print(f"{short_name(env_id)}: return {scores[env_id]:.1f} of the student, {data['score']:.1f} of its teacher")
    next_stage = model.command("finetune.py", "--pretrained", run_dir, "--env-id", "NEW_GAME")
    print(f"{run_dir}: student saved. Next: {next_stage}")
