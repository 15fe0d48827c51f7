# docs: docs/finetune.md
"""Stage 2 of XTRA: finetune the pretrained student online on a game it has never seen, while still training on the
offline games, each weighted by how well its gradient agrees with the target game's (XTRA, 3.2).

    python finetune.py --env-id MsPacmanNoFrameskip-v4 --pretrained runs/student
    python finetune.py --env-id AlienNoFrameskip-v4 --save-dataset data/alien.npz  # from scratch

In: the run folder of `distill.py`; the offline games come with it. Out: a run folder with the agent (model.pt), its
evaluations, and with --save-dataset what it collected. Without --pretrained this is the EfficientZero baseline.

Letters: B batch, m offline games, K unroll steps, A actions (the 18 ALE ids), R rows of the replay, E environments and
so updates of a cycle. One update per environment step of 4 frames is the default; the x-axis is updates.
"""

import contextlib
import difflib
import functools
import hashlib
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

import ale_py  # noqa: F401  (importing it registers the games with Gymnasium)
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import zstandard
from ale_py.vector_env import AtariVectorEnv
from PIL import Image, ImageDraw
from tensorboard.compat.proto.summary_pb2 import Summary
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
class Search:
    num_simulations: int = 50  # simulations of a search
    c_init: float = 1.25  # weight of the prior against the values
    dirichlet_alpha: float = 0.3  # of the noise in the priors of the roots, not in evaluations
    dirichlet_fraction: float = 0.25  # share of that noise
    reanalyze_reuse: int = 4  # how often a stored policy is learned from before its state is searched again, about
    target_interval: int = 200  # updates between the networks that search again; each is one to two intervals old


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
class Transfer:
    pretrained: str | None = None  # run folder of distill.py; without it the network starts at random
    teachers: tuple[str, ...] = ()  # run folders of the offline games' teachers; default: those of --pretrained
    transfer: Literal["hgf", "hg", "h"] = "hgf"  # pretrained networks to load: encoder h, model g, policy and value f
    freeze_representation: bool = False  # whether the encoder h stays as it was loaded (Figure 7b)
    cross_task: bool = True  # whether to train on the offline games too
    task_weights: bool = True  # whether the weight eta of an offline game follows its gradient similarity, else 1
    paper_loss: bool = False  # Eq. 1, L_T + sum_i eta_i L_i, not the released code's 1/2 (L_T + 1/m sum_i eta_i L_i)
    offline_batch_size: int = 256  # samples of the offline games per update, shared evenly
    similarity_interval: int = 5_000  # T, updates between measurements of eta (released code; no number in the paper)
    similarity_updates: int = 500  # N, updates of one measurement (released code; no number in the paper)
    similarity_start: int = 10_000  # updates before the first measurement
    similarity_threshold: float = 0.1  # a gradient cosine above it counts as similar


@dataclass
class Args:
    env_id: str = "MsPacmanNoFrameskip-v4"  # the target game
    seed: int = 1  # seed of the experiment
    total_timesteps: int = 100_000  # environment steps; 0 evaluates only (zero-shot)
    steps_per_update: int = 1  # environment steps per update; more is a departure: cheap data where updates are dear
    extra_updates: int = 0  # updates after the last environment step; from 101 % on at a tenth of the rate (Table 2)
    num_envs: int = 8  # E, environments that play side by side, and updates of a cycle
    learning_starts: int = 2_000  # environment steps before the first update; random, or searched if pretrained
    selfplay_interval: int = 100  # updates between networks that play
    selfplay_stream: bool = True  # whether steps are played while the updates before them run, on a GPU
    batch_size: int = 256  # samples of the target game per update
    channels: int | None = None  # channels of the latent; default: the student's, else 64
    blocks: int | None = None  # residual blocks per group of the representation network h; default: as above, else 1
    save_dataset: str | None = None  # a new .npz file for what was collected; input of pretrain_teacher.py
    capture_video: bool = False  # whether to write a gif of the first game of each evaluation into the run folder
    training: Training = field(default_factory=Training)
    targets: Targets = field(default_factory=Targets)
    search: Search = field(default_factory=Search)
    transfer: Transfer = field(default_factory=Transfer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)


MAY_CHANGE = {*vars(Run()), "selfplay_stream", "capture_video", "save_dataset", "pretrained", "teachers"}  # on --resume


def check_args(args):
    """Exits with one line if the flags do not fit together."""
    may_be_zero = ("seed", "total_timesteps", "extra_updates", "num_simulations", "learning_starts", "similarity_start")
    model.check_numbers(args, may_be_zero)
    E = args.num_envs
    cycle_steps = E * args.steps_per_update
    if args.total_timesteps % cycle_steps:
        raise SystemExit(f"error: --total-timesteps is no multiple of --num-envs * --steps-per-update = {cycle_steps}")
    if args.extra_updates % E:
        raise SystemExit(f"error: --extra-updates must be a multiple of --num-envs, here {E}")
    if args.extra_updates and args.total_timesteps == 0:
        raise SystemExit("error: --extra-updates need --total-timesteps before them; give both")
    if args.total_timesteps and args.num_simulations == 0:
        raise SystemExit("error: --num-simulations 0 only evaluates; training searches, give 1 or more")
    if args.similarity_updates >= args.similarity_interval:
        raise SystemExit("error: --similarity-updates must be less than --similarity-interval; lower it")
    if args.teachers and not (args.cross_task and args.total_timesteps):
        raise SystemExit("error: --teachers are not used with --no-cross-task or --total-timesteps 0; leave them out")
    if (args.freeze_representation or args.transfer != "hgf") and not args.pretrained:
        raise SystemExit("error: --freeze-representation and --transfer need --pretrained; give its folder")
    exists = os.path.exists(args.save_dataset or "")
    if args.save_dataset and (not args.save_dataset.endswith(".npz") or exists and not args.resume):
        raise SystemExit(f"error: --save-dataset is {args.save_dataset}, expected the name of a new .npz file")
    if args.save_dataset and args.total_timesteps == 0:
        raise SystemExit("error: --save-dataset needs --total-timesteps, of which there are none; drop one of the two")


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


def save_dataset(path, replay, rows, env_id):
    """Writes a slice `rows` of a replay as a dataset (docs/finetune.md, "Datasets"); it needs frames, action, reward,
    acted and end. Data of your own need nothing else either: fill a `Replay` and call this."""
    compressor = zstandard.ZstdCompressor(level=1)
    chunks = []
    for start in range(rows.start, rows.stop, 8):
        frames = replay.frames[start : min(start + 8, rows.stop)].permute(0, 2, 3, 1)  # [8, 96, 96, 3]
        chunks.append(compressor.compress(frames.contiguous().cpu().numpy().tobytes()))
    arrays = {name: getattr(replay, name)[rows] for name in ("reward", "acted", "end")}
    arrays["action"] = replay.action[rows].astype(np.uint8)
    arrays["frames"] = np.frombuffer(b"".join(chunks), np.uint8)
    arrays["chunk_ends"] = np.cumsum([len(chunk) for chunk in chunks])
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with model.whole_file(path) as file:
        np.savez(file, env_id=env_id, **arrays)


# Copied from distill.py
def read_teacher(folder):
    """A run folder of pretrain_teacher.py -> the dict of its data, with the teacher's `policy`, `value`, `score` and
    `folder`. Exits with one line if the file is missing or damaged."""
    data = model.read_dataset(f"{folder}/targets.npz", is_answered=True)
    return data | {"score": float(data["score"]), "folder": os.path.realpath(folder)}


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
def stack_frames(replay, rows):
    """The network's input at the states `rows` [n]: uint8 [n, 12, 96, 96], oldest frame first, where the frames lie.

    Near an episode's start its first frame is repeated, also after a life loss.
    """
    back = np.minimum([3, 2, 1, 0], replay.age[rows, None])  # [n, 4]
    index = torch.from_numpy(rows[:, None] - back).to(replay.frames.device)
    return replay.frames[index].flatten(1, 2)


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


# --- self-play ---
@dataclass
class Play:
    """What the environments play. It depends on nothing but the seed and the actions, which a checkpoint keeps."""

    envs: gym.vector.VectorEnv
    newest: np.ndarray  # [E] row of the newest frame of each environment's stream
    over: np.ndarray  # [E] bool: that frame is a game's last one, and the next step only resets
    lives: np.ndarray  # [E] at that frame; 0 in other games than Atari's
    score: np.ndarray  # [E] raw return of the game so far
    length: np.ndarray  # [E] environment steps of the game so far
    checksum: "hashlib._Hash"  # sha256 of all frames, rewards and ends


def start_games(env_id, replay, streams, seed):
    """Resets an environment for each stream, which starts at row `streams` [E]; environment i plays the games of seed
    + i -> Play."""
    E = len(streams)
    envs = make_envs(env_id, E)
    if not isinstance(envs, model.AtariGames) and rehearse(envs, seed) != rehearse(envs, seed):
        print(f"warning: {env_id} is not fixed by its seed: a run may not come out the same again, nor --resume work")
    frames, info = envs.reset(seed=seed)
    frames = np.ascontiguousarray(frames).reshape(E, 96, 96, 3)
    replay.frames[streams] = torch.from_numpy(frames).to(replay.frames.device).permute(0, 3, 1, 2)
    lives = info.get("lives", np.zeros(E))
    return Play(envs, streams, np.zeros(E, bool), lives, np.zeros(E), np.zeros(E, np.int64), hashlib.sha256(frames))


def rehearse(envs, seed):
    """Checksum of what 8 steps of action 0 show and pay after `reset(seed=seed)`."""
    shown = [envs.reset(seed=seed)[0]]
    for _ in range(8):
        shown += envs.step(np.zeros(envs.num_envs, np.int64))[:4]  # frames, rewards and ends
    return hashlib.sha256(b"".join(x.tobytes() for x in shown)).hexdigest()


def play_step(play, replay, action, env_steps):
    """Takes one step in every environment, action [E], and stores it, yet without a priority; env_steps: before it."""
    rows = play.newest
    E = len(rows)
    frames, reward, terminated, truncated, info = play.envs.step(action)
    frames = np.ascontiguousarray(frames).reshape(E, 96, 96, 3)
    lives = info.get("lives", np.zeros(E))
    # Some games go on for a while with 0 lives, and Adventure is over with as many as before: only `terminated` knows.
    life_lost = (lives < play.lives) & (lives > 0)
    end = np.select([truncated, terminated, life_lost], [TIME_LIMIT, GAME_OVER, LIFE_LOST], 0)
    acted = ~play.over  # the step after a game's last frame only resets: its action and reward are void
    replay.action[rows] = action
    replay.reward[rows] = reward
    replay.acted[rows] = acted
    replay.end[rows] = end * acted
    replay.stored_at[rows] = env_steps + np.arange(E)
    replay.frames[rows + 1] = torch.from_numpy(frames).to(replay.frames.device).permute(0, 3, 1, 2)
    replay.age[rows + 1] = np.where(play.over | (end == LIFE_LOST), 0, replay.age[rows] + 1)
    play.score = np.where(play.over, 0, play.score + reward)
    play.length = np.where(play.over, 0, play.length + 1)
    play.over = acted & (terminated | truncated)
    play.lives = lives
    play.newest = rows + 1
    for array in (frames, replay.reward[rows], replay.end[rows]):
        play.checksum.update(array)


def temperature_at(update, total):
    """Self-play samples actions from `visits^(1/T)`, T = 1, then 0.5 from 60 % and 0.25 from 90 % of the run (XTRA)."""
    return 1.0 if update < 0.6 * total else 0.5 if update < 0.9 * total else 0.25


def select_actions(policy, temperature, rng):
    """Samples one action per row of policy [E, A] with probability `policy^(1/temperature)`, normalised -> [E]."""
    probs = (policy / policy.max(axis=1, keepdims=True)) ** (1 / temperature)
    cumulative = np.cumsum(probs, axis=1)
    return (cumulative <= rng.random((len(policy), 1)) * cumulative[:, -1:]).sum(axis=1)


# --- targets ---

# As in the table of pretrain_teacher.py. Who gives a state its policy p_k and value v_k+n: in the target game the
# network that plays, when the state is new, then the target network, again and again; in an offline game its teacher.


# Copied from pretrain_teacher.py
def reanalyze(search, replay, rows, legal, rng, noise):
    """Searches the states `rows` [n] and stores the policy and value of each -> SearchResult of the last block of them.

    The value is the network's own; a search's root value is an option of the released code, off by default.
    """
    for block in np.split(rows, range(search.capacity, len(rows), search.capacity)):
        result = search(stack_frames(replay, block).to(next(search.net.parameters()).device), legal, rng, noise)
        replay.policy[block] = result.policy
        replay.value[block] = result.value
    replay.turn[rows] = replay.turn.max() + 1
    replay.uses[rows] = 0
    return result


# Copied from pretrain_teacher.py
def stalest(replay, rows, n, reuse):
    """The n of `rows` that are to be searched next: those learned from more than `reuse` times since their last search,
    most used first, then those searched longest ago. All that were never searched come before, whatever n is.

    By age alone the states of high priority would be learned from many times between two searches: the policy learns
    the noise of a single search, the next search starts from there, and so on.
    """
    turn = replay.turn[rows]
    n = min(len(rows), max(n, np.count_nonzero(turn == 0)))
    overused = np.maximum(replay.uses[rows] - reuse, 0)
    rank = np.where(turn > 0, (overused.max() - overused) * (turn.max() + 1) + turn, 0)
    first = np.flatnonzero(rank <= np.partition(rank, n - 1)[n - 1])  # faster than to sort all of a full replay
    order = np.lexsort((turn[first], -overused[first], turn[first] > 0))  # by the last key, ties by those before it
    return rows[first[order[:n]]]


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


def td_steps_by_age(age, total_timesteps, td_steps):
    """`clip(td_steps - age // (0.3 * total_timesteps), 1, td_steps)`: the older a sample, the more off-policy its
    rewards are (EfficientZero's off-policy correction). age [B]: environment steps since it was stored -> [B]."""
    return np.clip(td_steps - age // max(1, round(0.3 * total_timesteps)), 1, td_steps)


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


def combine_losses(target_loss, task_losses, eta, paper_loss):
    """Target and offline losses to one (each the mean over its own samples; task_losses [m], eta [m]).

    Released code: `1/2 * (L_T + 1/m * sum_i eta_i * L_i)`: with all L = 1 and m = 4, eta = (1, 0, 0, 0) gives 0.625.
    `paper_loss`: `L_T + sum_i eta_i * L_i` (XTRA, Eq. 1), m times the weight on the offline games relative to it.
    """
    if paper_loss:
        return target_loss + (eta * task_losses).sum()
    return 0.5 * (target_loss + (eta * task_losses).mean())


def gradient_cosines(target_loss, task_losses, parameters):
    """`Sim_i = <G_T, G_i> / (|G_T| |G_i|)` (XTRA, Eq. 2) for each of task_losses [m] -> [m]. Changes no parameter.

    As in the released code the gradients are over all parameters and clamped to [-5, 5] element by element.
    """

    def flat_gradient(loss):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients]).clamp(-5, 5)

    target_gradient = flat_gradient(target_loss)
    return torch.stack([F.cosine_similarity(target_gradient, flat_gradient(loss), dim=0) for loss in task_losses])


def transfer_learn(net, loss_function, batch, eta, *, coefficients, sizes, paper_loss, measure=False):
    """As `learn`, for `sizes[g]` samples of each game, the target game first -> loss, terms, priority, cosines.

    The loss is that of `combine_losses` on the means of the games. measure: whether the cosines [m] are those of
    `gradient_cosines`, else they are 0.
    """
    K = batch.action.shape[1]
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=batch.obs.is_cuda):
        total, terms, priority = loss_function(net, batch, coefficients)  # batch norm sees the mixture
    target_loss, *task_losses = [part.mean() for part in (batch.weight * total).split(sizes)]
    cosines = torch.zeros_like(eta)
    if measure:  # of the gradients that are clamped, so of the losses / K
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        cosines = gradient_cosines(target_loss / K, [loss / K for loss in task_losses], parameters)
    loss = target_loss
    if task_losses:
        loss = combine_losses(target_loss, torch.stack(task_losses), eta, paper_loss)
    net.zero_grad(set_to_none=False)  # gradients stay in place: a recorded pass writes there
    (loss / K).backward()
    terms = {name: term.detach() for name, term in terms.items()}  # else autograd's graph outlives this call
    return loss.detach(), terms, priority, cosines


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


# Copied from pretrain_teacher.py
def log_search(writer, result, updates):
    """Health of a search: mean root value, entropy of the visits in nats, depth of the deepest leaf."""
    entropy = -(result.policy * np.log(result.policy + 1e-12)).sum(axis=1)  # [n]
    writer.add_scalar("search/root_value", result.root_value.mean(), updates)
    writer.add_scalar("search/visit_entropy", entropy.mean(), updates)
    writer.add_scalar("search/max_depth", result.depth.max(), updates)


# Copied from pretrain_teacher.py
def log_diagnostics(writer, search, replay, game, args, updates, suffix=""):
    """How well the network that searches predicts what happened in up to 512 steps of a game: those before its newest
    512, so that most returns are those of 50 rewards, after which the bootstrap weighs gamma^50, by default 0.55."""
    stored = game.rows.start + np.flatnonzero(replay.acted[game.rows])
    rows = stored[np.argsort(replay.stored_at[stored], kind="stable")[-1024:][:512]]
    rng = np.random.default_rng(0)
    happened = make_targets(replay, rows[None], 50, args.unroll_steps, args.gamma, args.clip_rewards, rng)
    happened = {name: x[0] for name, x in happened.items()}
    soon = make_targets(replay, rows[None], args.td_steps, 1, args.gamma, args.clip_rewards, rng)["value"][0, :, 0]
    obs = stack_frames(replay, rows).to(next(search.net.parameters()).device)
    predicted = search.predict(obs, happened["action"], game.legal)
    for name, first in (("value", 0), ("value_prefix", 1)):  # steps 0 to K, steps 1 to K
        for k in range(first, args.unroll_steps + 1):
            exists = happened["mask"][:, k] > 0
            target = happened[name][exists, k - first]
            error = target - getattr(predicted, name)[exists, k - first]
            if len(np.unique(target)) > 1:
                explained = 1 - np.square(error).mean() / target.var()  # an offset counts as an error
                writer.add_scalar(f"explained/{name}_{k}{suffix}", explained, updates)
    # Rank correlation of predicted and realised advantage, in the half of the states where Q differs most.
    spread = np.ptp(predicted.q[:, game.legal], axis=1)
    differ = spread >= np.median(spread)
    taken = predicted.q[np.arange(len(rows)), replay.action[rows]]
    advantage = (taken - (replay.policy[rows] * predicted.q).sum(axis=1))[differ]
    realised = (soon - predicted.value[:, 0])[differ]
    ranks = [np.sign(x[:, None] - x).sum(axis=1) for x in (advantage, realised)]  # those of ties are equal
    writer.add_scalar(f"diagnostics/advantage{suffix}", np.abs(advantage).mean(), updates)
    if np.ptp(ranks, axis=1).all():
        writer.add_scalar(f"diagnostics/rank_agreement{suffix}", np.corrcoef(ranks)[0, 1], updates)
    for name, policy in (("network", predicted.prior), ("search", replay.policy[rows])):
        entropy = -(policy * np.log(policy + 1e-12)).sum(axis=1)  # [n]
        writer.add_scalar(f"diagnostics/entropy/{name}{suffix}", entropy.mean(), updates)


def log_video(writer, path, env_id, movie, updates):
    """Writes a movie of `evaluate` as a gif of 15 frames a second, its score drawn above, and shows it in TensorBoard.

    Of a game of more than 2,000 frames it has every second, third, ... one. Atari's pixels are not square: its console
    drew them on a screen of 4:3.
    """
    size = (320, 240) if atari_rom(env_id) else (288, 288)
    every = -(-len(movie) // 2000)
    images = []
    for step in sorted({*range(0, len(movie), every), len(movie) - 1}):
        frame, score = movie[step]
        image = Image.new("RGB", (size[0], size[1] + 16))
        image.paste(Image.fromarray(frame).resize(size, Image.NEAREST), (0, 16))
        ImageDraw.Draw(image).text((4, 2), f"{short_name(env_id)}  step {step}  score {score:g}")
        images.append(image)
    with model.whole_file(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=67, loop=0)
        file.seek(0)
        gif = Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=file.read())
    summary = Summary(value=[Summary.Value(tag="eval/video", image=gif)])  # --track mirrors it too
    writer.file_writer.add_summary(summary, updates)


# --- setup ---
# Copied from distill.py
def teacher_folders(datasets, run_dir):
    """Where the offline games' teachers lie, for model.pt: {checksum: [seen from the run folder, absolute]}. If one of
    the two folders moves, the other way leads there."""
    start = os.path.realpath(run_dir)
    return {data["checksum"]: [os.path.relpath(data["folder"], start), data["folder"]] for data in datasets}


# The SimSiam heads compare what g predicts with what h sees: they come along with both.
TRANSFERRED = {
    "h": ["representation"],
    "hg": ["representation", "dynamics", "projector", "predictor"],
    "hgf": ["representation", "dynamics", "projector", "predictor", "prediction"],
}


def load_networks(args):
    """The network to start from -> (net on the CPU, dict of `load_model` with the weights' `checksum`).

    --pretrained loads all of it, or with --transfer hg only h and g, with h only h; the rest starts at random.
    """
    norm_steps = args.unroll_steps if args.step_statistics else 0
    if args.pretrained is None:
        actions = {"action_gain": args.action_gain, "one_hot_actions": args.one_hot_actions}
        config = model.ModelConfig.of_width(args.channels or 64, args.blocks or 1, norm_steps=norm_steps, **actions)
        return model.EfficientZeroNet(config), {}
    pretrained, info = model.load_model(f"{args.pretrained}/model.pt")
    for name in ("channels", "blocks"):
        found, asked = getattr(pretrained.config, name), getattr(args, name)
        if asked not in (None, found):
            raise SystemExit(f"error: --{name} {asked}, but --pretrained {args.pretrained} has {found}; drop the flag")
    if args.total_timesteps and norm_steps != pretrained.config.norm_steps:
        found = f"batch norm statistics of {pretrained.config.norm_steps} unroll steps, this run has {norm_steps}"
        hint = "give the --unroll-steps and --step-statistics of that run"
        raise SystemExit(f"error: --pretrained {args.pretrained} has {found}; {hint}")
    if args.total_timesteps and args.one_hot_actions != pretrained.config.one_hot_actions:
        flag = "--one-hot-actions" if pretrained.config.one_hot_actions else "--no-one-hot-actions"
        raise SystemExit(f"error: --pretrained {args.pretrained} was trained with {flag}; give that flag here too")
    if args.cross_task and args.total_timesteps and not (args.teachers or info.get("teacher_folders")):
        hint = "give a student of distill.py, or --teachers or --no-cross-task"
        raise SystemExit(f"error: --pretrained {args.pretrained} names no teachers; {hint}")
    weights = b"".join(x.numpy().tobytes() for x in pretrained.state_dict().values())
    info["checksum"] = hashlib.sha256(weights).hexdigest()
    net = model.EfficientZeroNet(replace(pretrained.config, action_gain=args.action_gain))
    for part in TRANSFERRED[args.transfer]:
        getattr(net, part).load_state_dict(getattr(pretrained, part).state_dict())
    return net, info


def read_teachers(args, folders):
    """The offline games -> list of what `read_teacher` returns. Without --teachers they are those that the student was
    distilled from, in whichever of the two `teacher_folders` of each has the same data and answers."""
    if args.total_timesteps == 0 or not args.cross_task:
        return []
    if args.teachers:
        return [read_teacher(folder) for folder in args.teachers]
    datasets = []
    for checksum, (relative, absolute) in folders.items():
        beside = os.path.realpath(os.path.join(os.path.realpath(args.pretrained), relative))
        places = dict.fromkeys([beside, absolute])  # mostly the same
        there = [read_teacher(folder) for folder in places if os.path.exists(f"{folder}/targets.npz")]
        same = [data for data in there if data["checksum"] == checksum]
        if not same:
            found = "have changed since" if there else "are gone"
            hint = "give the teachers that it is to train on as --teachers"
            raise SystemExit(f"error: teacher and data of --pretrained in {' or '.join(places)} {found}; {hint}")
        datasets.append(same[0])
    return datasets


if __name__ == "__main__":
    args = model.read_flags(Args, __doc__)
    check_args(args)
    E = args.num_envs
    online_updates = args.total_timesteps // args.steps_per_update
    total_updates = online_updates + args.extra_updates

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)  # sampling, search, noise and self-play

    # networks and data: rows of the offline games, then a stream of rows for each environment
    legal = legal_actions(args.env_id)  # [A]
    net, origin = load_networks(args)
    student = origin.get("checksum")  # of the weights to start from; None: at random
    args.channels, args.blocks = net.config.channels, net.config.blocks
    device = choose_device(args, total_updates)
    args.selfplay_stream = args.selfplay_stream and args.cuda
    datasets = read_teachers(args, origin.get("teacher_folders", {}))
    checksums = [data["checksum"] for data in datasets]
    env_ids = [data["env_id"] for data in datasets]
    if args.env_id in env_ids:
        raise SystemExit(f"error: --env-id {args.env_id} is one of the offline games; choose a game that is not")
    m = len(datasets)
    if len(set(env_ids)) < m:
        raise SystemExit(f"error: an offline game is there twice: {' '.join(env_ids)}; give one teacher of each")
    if m and args.offline_batch_size % m:
        raise SystemExit(f"error: --offline-batch-size {args.offline_batch_size} is not a multiple of the {m} games")
    sizes = [args.batch_size] + m * [args.offline_batch_size // max(1, m)]  # samples of each game in a batch
    stream_length = args.total_timesteps // E + 1
    replay, games = make_replay(datasets, E * stream_length, device)
    own = slice(len(replay.action) - E * stream_length, len(replay.action))  # rows of the target game
    games = [Game(args.env_id, own, legal), *games]
    quota = math.ceil(E * args.batch_size * (args.unroll_steps + 1) / args.reanalyze_reuse)  # searched in a cycle

    # agent setup
    net = net.to(device, memory_format=torch.channels_last).train()
    if args.freeze_representation:
        net.representation.requires_grad_(False).eval()  # its batch norm statistics stay too
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    learning_rate = torch.zeros((), device=device)  # a tensor: a recorded update reads it where it lies
    optimizer = torch.optim.SGD(
        parameters, lr=learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True
    )
    generator = torch.Generator(device).manual_seed(args.seed)  # augmentation
    options = {"discount": args.gamma, "c_init": args.c_init}
    options |= {"dirichlet_alpha": args.dirichlet_alpha, "noise_fraction": args.dirichlet_fraction}
    player = mcts.Search(model.inference_copy(net), args.num_simulations, E, **options)
    block = min(quota, 4096 if args.cuda else 1024)  # states; at full size one takes 0.7 MB of RAM, half of it on a GPU
    reanalyzer = mcts.Search(model.inference_copy(net), args.num_simulations, block, **options)
    evaluator = mcts.Search(model.inference_copy(net), args.num_simulations, args.eval_episodes, **options)
    next_target_net = model.inference_copy(net)
    coefficients = {name: getattr(args, f"{name}_coef") for name in ("value_prefix", "policy", "value", "consistency")}
    constants = {"coefficients": coefficients, "sizes": sizes, "paper_loss": args.paper_loss}
    learn_batch = functools.partial(transfer_learn, net, unroll_loss, **constants)
    update_by = functools.partial(update_net, replay, generator, optimizer, args.max_grad_norm)
    update_batch = functools.partial(update_by, learn_batch)
    measure_batch = functools.partial(update_by, functools.partial(learn_batch, measure=True))

    # what makes a GPU faster: each is off by a flag, and changes nothing but the rounding
    if args.compile:  # each for itself: the loss, with all that it unrolls, would take minutes
        for network in net.children():
            network.compile(dynamic=False)
    if args.cudagraphs:
        update_batch = model.Recorded(update_batch, generator)
    if args.search_cudagraphs:
        reanalyzer.record = evaluator.record = model.Recorded
        player.record = functools.partial(model.Recorded, priority=-1)  # its few kernels go before those of the updates
    selfplay_stream = torch.cuda.Stream(priority=-1) if args.selfplay_stream else None

    # the run folder, the games, and if the run goes on, all that it had
    run_name = model.file_name(f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    run_dir = args.run_dir or f"runs/{run_name}"
    if args.save_dataset:
        model.check_writable("--save-dataset", args.save_dataset)
    lock, checkpoint = model.open_run(args, Args, net.config, run_dir, MAY_CHANGE)  # locked until this process ends
    streams = np.arange(own.start, own.stop, stream_length)  # [E] first row of each
    # Seeds below 1000 are those of evaluations; ale-py takes 31 bits.
    play = start_games(args.env_id, replay, streams, seed=1000 + 1000 * args.seed % 2_000_000_000)
    random_steps = 0 if args.pretrained else args.learning_starts
    updates = env_steps = 0
    renewed = -1  # number of the last search before the target network changed; -1: it never did
    eta = torch.ones(m, device=device)  # weight of each offline game: the share of `similar` in the last measurement
    similar = torch.zeros(m, device=device)  # in how many of the `measured` updates its gradient was similar
    measured = 0
    scores = {}  # mean return of the last evaluation
    evaluations = "env_steps,updates,episode,return,length,env_id\n"
    learners = {"net": net, "player": player.net, "target": reanalyzer.net, "next_target": next_target_net}
    learners["optimizer"] = optimizer
    if checkpoint:
        if checkpoint.get("student", student) != student:
            raise SystemExit("error: --pretrained is not the network that the run started from; give the same")
        if checkpoint["datasets"] != checksums:
            raise SystemExit("error: the offline games are not those of the checkpoint; give the same --teachers")
        for action in model.Progress(checkpoint["actions"].numpy(), desc="playing the games again", leave=False):
            play_step(play, replay, action, env_steps)
            env_steps += E
        if play.checksum.hexdigest() != checkpoint["checksum"]:
            found = "the actions of the checkpoint lead to other frames or rewards than they did"
            raise SystemExit(f"error: {found}; use its version of ale-py or of the environment, if the seed fixes that")
        for name, learner in learners.items():
            learner.load_state_dict(checkpoint[name])
        optimizer.param_groups[0]["lr"] = learning_rate
        rng.bit_generator.state = checkpoint["rng"]
        generator.set_state(checkpoint["generator"])
        for name in ("policy", "value", "turn", "uses"):
            getattr(replay, name)[own] = checkpoint[name].numpy()
        replay.priority[:] = checkpoint["priority"].numpy()
        eta, similar = checkpoint["eta"].to(device), checkpoint["similar"].to(device)
        measured, renewed = checkpoint["measured"], checkpoint["renewed"]
        updates, scores, evaluations = checkpoint["updates"], checkpoint["scores"], checkpoint["evaluations"]

    info = {"args": vars(args), "env_ids": [args.env_id, *env_ids]}
    info["teacher_folders"] = teacher_folders(datasets, run_dir)
    info["data"] = dict(zip(env_ids, checksums, strict=True))
    info["pretrained_on"] = origin.get("data", {})

    if args.save_dataset and os.path.exists(args.save_dataset):  # right if the run had been done
        data = model.read_dataset(args.save_dataset)
        same = [np.array_equal(data[name], getattr(replay, name)[own]) for name in ("action", "reward", "acted", "end")]
        if updates < total_updates or data["env_id"] != args.env_id or not all(same):
            raise SystemExit(f"error: --save-dataset {args.save_dataset} has other data; give the name of a new file")

    def due(every, cycles=0):  # whether a multiple of `every` came since the last cycle, now or so many cycles later
        return (updates + cycles * E) % every < E

    # TRY NOT TO MODIFY: start the game
    args.run_dir = run_dir
    writer = make_writer(args, run_name, updates)
    log_every = max(1, min(100, online_updates // 100))  # updates
    launched = None  # rows, numbers and first update of a cycle whose updates a GPU may still be busy with
    start_time, start_updates = time.time(), updates
    cycles = range(start_updates, total_updates + 1, E)
    # Each cycle begins with what is due before update number `updates`: so the untrained network is evaluated too.
    bar = model.Progress(cycles, total=total_updates // E, initial=start_updates // E, unit="update", unit_scale=E)
    for updates in bar:
        last = updates == total_updates
        evaluating = last or due(args.eval_every)
        if updates > start_updates and (evaluating or due(args.checkpoint_every)):
            writer.flush()
            checkpoint = {name: learner.state_dict() for name, learner in learners.items()}
            checkpoint |= {"rng": rng.bit_generator.state, "generator": generator.get_state()}
            checkpoint |= {"args": vars(args), "config": asdict(net.config)}
            for name in ("policy", "value", "turn", "uses"):
                checkpoint[name] = torch.from_numpy(getattr(replay, name)[own])
            actions = replay.action[own].reshape(E, stream_length)[:, : env_steps // E].T.copy()
            checkpoint |= {"actions": torch.from_numpy(actions), "checksum": play.checksum.hexdigest()}
            checkpoint |= {"priority": torch.from_numpy(replay.priority)}
            checkpoint |= {"eta": eta, "similar": similar, "measured": measured, "datasets": checksums}
            checkpoint["student"] = student
            checkpoint["renewed"] = renewed
            checkpoint |= {"updates": updates, "scores": scores, "evaluations": evaluations}
            with model.whole_file(f"{run_dir}/checkpoint.pt") as file:  # a resumed run repeats the evaluation
                torch.save(checkpoint, file)
        if evaluating:
            movie = [] if args.capture_video else None
            model.refresh(evaluator.net, net)
            returns, lengths = evaluate(evaluator, args.env_id, args.eval_max_frames, movie)
            evaluations += log_evaluation(writer, args.env_id, env_steps, updates, returns, lengths)
            scores = {args.env_id: float(returns.mean())}
            if updates > 0:  # before, nothing has been played
                log_diagnostics(writer, evaluator, replay, games[0], args, updates)
            with model.whole_file(f"{run_dir}/evaluations.csv") as file:
                file.write(evaluations.encode())
            model.save_model(f"{run_dir}/model.pt", net, **info, updates=updates, env_steps=env_steps, scores=scores)
            if movie:
                log_video(writer, f"{run_dir}/video-{updates}.gif", args.env_id, movie, updates)
        if last:
            break

        # The newest states always have a policy of the network that plays: it is searched after each step, for the next
        # one, and again where that network changes, as in the first cycle.
        result = None  # of the latest search of self-play
        temperature = temperature_at(updates, online_updates)
        if due(args.selfplay_interval):
            model.refresh(player.net, net)
            if env_steps >= random_steps:
                result = reanalyze(player, replay, play.newest, legal, rng, noise=True)
        # First the steps before learning, then those in each environment before their E updates.
        wanted_steps = min(args.total_timesteps, max(args.learning_starts, (updates + E) * args.steps_per_update))
        played = []  # rows of the steps of this cycle
        if selfplay_stream and not launched:  # steps beside updates need nothing that came after this
            selfplay_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(selfplay_stream) if selfplay_stream else contextlib.nullcontext():
            while env_steps < wanted_steps:
                # ALGO LOGIC: put action logic here
                if env_steps < random_steps:
                    action = rng.choice(np.flatnonzero(legal), E)
                else:
                    action = select_actions(replay.policy[play.newest], temperature, rng)

                # TRY NOT TO MODIFY: execute the game and log data.
                played.append(play.newest)
                play_step(play, replay, action, env_steps)
                env_steps += E
                if env_steps >= random_steps:
                    result = reanalyze(player, replay, play.newest, legal, rng, noise=True)
                for env in np.flatnonzero(play.over):
                    writer.add_scalar("charts/episodic_return", play.score[env], updates)
                    writer.add_scalar("charts/episodic_length", play.length[env], updates)
        if selfplay_stream:
            torch.cuda.current_stream().wait_stream(selfplay_stream)
        if launched:
            store_priorities(replay, *launched)
        if played:  # what is new has the highest priority that there is
            played = np.concatenate(played)
            replay.priority[played] = replay.acted[played] * (replay.priority[own].max() or 1.0)

        # ALGO LOGIC: training.
        if due(args.target_interval):  # the target network is the network of one to two intervals ago
            old = replay.turn[own][replay.acted[own]] <= renewed
            writer.add_scalar("diagnostics/old_targets", old.mean(), updates)
            renewed = int(replay.turn.max())
            model.refresh(reanalyzer.net, next_target_net)
            model.refresh(next_target_net, net)
        stored = own.start + np.flatnonzero(replay.acted[own])  # not the newest: their policies are played next
        rows = stalest(replay, stored, quota, args.reanalyze_reuse)
        reanalyze(reanalyzer, replay, rows, legal, rng, noise=True)
        beta = args.priority_beta + (1 - args.priority_beta) * min(1.0, updates / (1.2 * online_updates))
        rows, weight = sample(replay, games, sizes, E, args.priority_exponent, beta, rng)  # [E, B + offline] each
        td_steps = np.full(rows.shape, args.td_steps)  # fixed data do not age
        age = env_steps - replay.stored_at[rows[:, : args.batch_size]]
        td_steps[:, : args.batch_size] = td_steps_by_age(age, args.total_timesteps, args.td_steps)
        batches = make_targets(replay, rows, td_steps, args.unroll_steps, args.gamma, args.clip_rewards, rng)
        batches["weight"] = weight
        np.add.at(replay.uses, batches["frames"][..., 3:], 1)  # the states 0 to K of each sample
        batches = {name: torch.from_numpy(x).to(device) for name, x in batches.items()}  # [E, B + offline, ...] each
        batches["frames"] = batches["frames"].to(replay.frames.device)
        numbers = []  # of each update: priorities, loss, gradient norm
        for update in range(updates, updates + E):
            samples = take_samples(replay, batches, update - updates, device)
            learning_rate.fill_(learning_rate_at(update, online_updates, args.learning_rate))
            # Updates 10,000 to 10,499 measure with the old eta, from 10,500 on the new one holds; again every 5,000.
            phase = update % args.similarity_interval
            if phase == args.similarity_updates and measured:  # 120 of 500 similar: eta = 0.24 (XTRA, Appendix B)
                eta = similar / measured
                similar = torch.zeros_like(similar)
                measured = 0
            measure = m and args.task_weights and update >= args.similarity_start and phase < args.similarity_updates
            if not measure:
                number, terms, _ = update_batch(samples, eta)
            else:  # m + 2 passes back through one loss, which neither compiled networks nor a recording allow
                with torch.compiler.set_stance("force_eager"):
                    number, terms, cosines = measure_batch(samples, eta)
                similar = similar + (cosines > args.similarity_threshold)
                measured += 1
                for game, cosine in zip(games[1:], cosines.tolist(), strict=True):
                    writer.add_scalar(f"transfer/grad_cosine/{short_name(game.env_id)}", cosine, update)
            numbers.append(number.clone())  # a recording overwrites it
        launched = rows, numbers, updates
        # A GPU is busy with these updates while the next steps are played, unless something that needs them is due.
        coming = [due(every, cycles=1) for every in (args.selfplay_interval, args.checkpoint_every, args.eval_every)]
        if selfplay_stream is None or due(log_every) or any(coming) or updates + E == total_updates:
            numbers = store_priorities(replay, *launched)  # this waits for a GPU
            launched = None

        if due(log_every):
            writer.add_scalar("losses/loss", numbers[-1, -2], updates)
            writer.add_scalar("losses/gradient_norm", numbers[-1, -1], updates)
            cut = max(1.0, numbers[-1, -1] / args.max_grad_norm)  # factor by which the gradients were made smaller
            for network, part in net.named_children():
                gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
                total = cut * torch.nn.utils.get_total_norm(gradients).item()
                writer.add_scalar(f"losses/gradient_norm/{network}", total, updates)
            for name, term in terms.items():
                for game, part in zip(games, term.split(sizes), strict=True):
                    suffix = "" if game is games[0] else f"/{short_name(game.env_id)}"
                    writer.add_scalar(f"losses/{name}_loss{suffix}", part.mean().item(), updates)
            for game, value in zip(games[1:], eta.tolist(), strict=True):
                writer.add_scalar(f"transfer/task_weight/{short_name(game.env_id)}", value, updates)
            writer.add_scalar("charts/learning_rate", learning_rate.item(), updates)
            writer.add_scalar("charts/beta", beta, updates)
            writer.add_scalar("charts/temperature", temperature, updates)
            writer.add_scalar("charts/mean_weight", weight.mean(), updates)
            writer.add_scalar("charts/env_steps", env_steps, updates)
            writer.add_scalar("charts/SPS", (updates + E - start_updates) / (time.time() - start_time), updates)
            if result:
                log_search(writer, result, updates)
    play.envs.close()
    writer.close()

    if args.save_dataset and not os.path.exists(args.save_dataset):
        save_dataset(args.save_dataset, replay, own, args.env_id)
        next_stage = model.command("pretrain_teacher.py", "--datasets", args.save_dataset)
        print(f"{args.save_dataset}: dataset saved. Next: {next_stage}")
    video = f", the first of its last games in video-{updates}.gif" if args.capture_video else ""
    print(f"{short_name(args.env_id)}: return {scores[args.env_id]:.1f} after {env_steps:,} environment steps{video}")
    print(f"{run_dir}: agent saved. Next: {model.command('benchmark/report.py', run_dir)}")
