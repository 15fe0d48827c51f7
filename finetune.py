# docs: docs/finetune.md
"""Stage 2 of XTRA: finetune the pretrained student online on a game it has never seen, while still training on the
offline games, each weighted by how well its gradient agrees with the target game's (XTRA, 3.2).

    python finetune.py --env-id MsPacmanNoFrameskip-v4 --pretrained runs/student --run-dir runs/xtra-mspacman
    python finetune.py --env-id AlienNoFrameskip-v4 --save-dataset data/Alien      # from scratch: EfficientZero

In: the run folder of `distill.py`; the offline games come with it. Out: a run folder with the agent (model.pt), its
evaluations, and with --save-dataset what it collected. Without --pretrained this is the EfficientZero baseline.

Letters: B batch, m offline tasks, K unroll steps, A actions (the 18 ALE ids), R rows of the replay, E environments.
There is one update per environment step of 4 frames; the x-axis is updates, or steps where docs/ say so.
"""

import os
import sys

# Asleep the tree's threads leave the CPU to others while the GPU works; where torch computes on the CPU it costs 2.8x.
if os.path.exists("/proc/driver/nvidia") and "--no-cuda" not in sys.argv:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch loads

import hashlib
import re
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, NamedTuple

import ale_py  # noqa: F401  (importing it registers the games with Gymnasium)
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import zstandard
from ale_py.roms import get_rom_path
from ale_py.vector_env import AtariVectorEnv
from PIL import Image
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
    capture_video: bool = False  # whether to write a gif of the first game of each evaluation into the run folder

    # Algorithm specific arguments
    env_id: str = "MsPacmanNoFrameskip-v4"  # the target game
    total_timesteps: int = 100_000  # environment steps, and updates; 0 evaluates only (zero-shot)
    extra_updates: int = 0  # updates after the last environment step; from 101 % on at a tenth of the rate (Table 2)
    num_envs: int = 8  # environments that play side by side
    learning_starts: int = 2_000  # environment steps before the first update; random, or searched if pretrained
    channels: int | None = None  # channels of the latent; default: the student's, else 64
    blocks: int | None = None  # residual blocks per group of the representation network; default: as above, else 1
    batch_size: int = 256  # samples of the target game per update
    learning_rate: float = 0.2  # learning rate of SGD after its warm-up over 1 % of the run
    num_simulations: int = 50  # simulations of a search; 0 acts on the policy head (for zero-shot behaviour cloning)
    unroll_steps: int = 5  # steps that the model is unrolled in training
    td_steps: int = 5  # rewards before the bootstrap in a value target; one fewer per 30 % of the run of age
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 32  # games of an evaluation, played side by side
    eval_max_frames: int = 108_000  # length at which an evaluation game is cut, in frames (1 step = 4 frames)
    reanalyze_cache: bool = True  # whether a state is searched once per target network, else each time it is drawn
    save_dataset: str | None = None  # a new folder for what was collected; input of pretrain_teacher.py

    # Transfer
    pretrained: str | None = None  # run folder of distill.py; without it the network starts at random
    teachers: tuple[str, ...] = ()  # run folders of the offline games' teachers; default: those of --pretrained
    transfer: Literal["hgf", "hg", "h"] = "hgf"  # which pretrained networks to load (Figure 8)
    freeze_representation: bool = False  # whether h stays as it was loaded (Figure 7b)
    cross_task: bool = True  # whether to train on the offline games too
    task_weights: bool = True  # whether eta follows the gradient similarity, else 1
    paper_loss: bool = False  # Eq. 1, L_T + sum_i eta_i L_i, not the released code's 1/2 (L_T + 1/m sum_i eta_i L_i)
    offline_batch_size: int = 256  # samples of the offline games per update, shared evenly
    similarity_interval: int = 5_000  # T, updates between measurements of eta (released code; no number in the paper)
    similarity_updates: int = 500  # N, updates of one measurement (released code; no number in the paper)
    similarity_start: int = 10_000  # updates before the first measurement
    similarity_threshold: float = 0.1  # a gradient cosine above it counts as similar


# Copied from pretrain_teacher.py
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
# Copied from pretrain_teacher.py
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


# Copied from pretrain_teacher.py
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


# Copied from pretrain_teacher.py
def legal_actions(env_id):
    """Which of the 18 ALE ids the game knows, bool [A]: ALE's minimal action set, or the first n of Discrete(n)."""
    if rom := atari_rom(env_id):
        ids = [action.value for action in AtariVectorEnv(rom, 1, num_threads=1).ale.get_action_set()]
    else:
        ids = range(make_envs(env_id, 1, life_loss_ends=False).single_action_space.n)
    return np.isin(np.arange(18), ids)


# --- data ---
LIFE_LOST, GAME_OVER, TIME_LIMIT = 1, 2, 3  # what `Replay.end` says of an episode's last action; all are terminal


# Copied from pretrain_teacher.py
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


def add_frames(replay, frames, age):
    """Appends one row per environment, not acted on yet: frames uint8 [E, 96, 96, 3], age [E]."""
    rows = slice(replay.size, replay.size + replay.num_envs)
    if rows.stop > len(replay.action):  # games of a few steps each have more last frames than the first size foresaw
        for name, array in vars(replay).items():
            if isinstance(array, torch.Tensor):
                setattr(replay, name, torch.cat([array, torch.empty_like(array)]))
            elif isinstance(array, np.ndarray):
                setattr(replay, name, np.concatenate([array, np.zeros_like(array)]))
    replay.frames[rows] = model.upload(frames, replay.frames.device).permute(0, 3, 1, 2)
    replay.age[rows] = age
    replay.size = rows.stop


@dataclass
class Games:
    """What the environments play, and the checksum of all that they have shown."""

    over: np.ndarray  # [E] bool: the newest frame is a game's last one, and the next step only resets
    score: np.ndarray  # [E] raw return so far
    length: np.ndarray  # [E] environment steps so far
    checksum: "hashlib._Hash"  # sha256 of frames, rewards and ends


def start_games(envs, replay, seed):
    """Resets the environments; the first frames go into the replay -> Games. Copy i plays the games of seed + i."""
    E = replay.num_envs
    frames = envs.reset(seed=seed)[0].reshape(E, 96, 96, 3)
    add_frames(replay, frames, age=np.zeros(E))
    return Games(np.zeros(E, bool), np.zeros(E), np.zeros(E, np.int64), hashlib.sha256(np.ascontiguousarray(frames)))


def play(envs, replay, games, action, env_steps, total_timesteps, has_lives):
    """Takes one step in every environment and stores it -> environment steps so far. Changes `replay` and `games`.

    action [E]. has_lives: whether `terminated` may be a lost life only. Together with `start_games` this depends on
    nothing but the seed and the actions: the action log of a checkpoint brings games and replay back.
    """
    rows = np.arange(replay.size - replay.num_envs, replay.size)  # the newest frame of each environment
    frames, reward, terminated, truncated, info = envs.step(action)
    frames = np.ascontiguousarray(frames).reshape(replay.num_envs, 96, 96, 3)
    lives = info["lives"] if has_lives else np.zeros(replay.num_envs)
    end = np.select([truncated, terminated & (lives > 0), terminated], [TIME_LIMIT, LIFE_LOST, GAME_OVER], 0)
    acted = ~games.over  # the step after a game's last frame only resets: its action and reward are void
    acted &= env_steps + np.cumsum(acted) <= total_timesteps
    replay.action[rows], replay.reward[rows], replay.acted[rows] = action, reward, acted
    replay.end[rows], replay.stored_at[rows] = end * acted, env_steps + np.cumsum(acted) - 1
    replay.priority[rows] = acted * (replay.priority[: replay.size].max() or 1.0)  # the current maximum
    add_frames(replay, frames, age=np.where(games.over | (end == LIFE_LOST), 0, replay.age[rows] + 1))
    games.score, games.length = (games.score + reward * acted) * ~games.over, (games.length + acted) * ~games.over
    games.over = ~games.over & np.isin(end, (GAME_OVER, TIME_LIMIT))
    for array in (frames, replay.reward[rows], replay.end[rows]):
        games.checksum.update(array)
    return env_steps + int(acted.sum())


def replay_games(envs, replay, games, values, total_timesteps, has_lives):
    """Plays the action log of a checkpoint's values again -> environment steps. Changes `replay` and `games`.

    The log is uint8 [T, E]. Exits with one line if the games do not show what they showed then.
    """
    actions, checksum = values.get("actions"), values.get("checksum")
    is_log = isinstance(actions, torch.Tensor) and actions.dtype == torch.uint8 and actions.ndim == 2
    fits = is_log and actions.is_contiguous() and actions.numel() <= 2 * len(replay.action)
    if not fits or actions.shape[1] != replay.num_envs or (actions >= 18).any():
        raise SystemExit("error: the checkpoint has no action log of these environments; start the run anew")
    env_steps = 0
    for action in tqdm(actions.long().numpy(), unit="step", desc="replaying the games", leave=False):
        env_steps = play(envs, replay, games, action, env_steps, total_timesteps, has_lives)
    if games.checksum.hexdigest() != checksum:
        found = f"error: the games differ from those of the checkpoint (ale-py is {version('ale-py')})"
        raise SystemExit(f"{found}; go on with the ale-py, ROM or environment that the run was started with")
    return env_steps


def save_dataset(folder, replay, meta):
    """Writes the replay as a dataset folder, whole or not at all (docs/finetune.md, "Datasets").

    The streams of the environments follow one another. meta: what else to say in meta.json, env_id included.
    """
    temporary = f"{os.path.normpath(folder)}.tmp"
    order = np.concatenate([np.arange(env, replay.size, replay.num_envs) for env in range(replay.num_envs)])  # [R]
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    try:
        os.makedirs(temporary)
        compressor, offsets = zstandard.ZstdCompressor(level=1), [0]

        def write_frames(file):
            for start in range(0, len(order), 8):
                frames = replay.frames[order[start : start + 8]].permute(0, 2, 3, 1).contiguous().cpu().numpy()
                offsets.append(offsets[-1] + file.write(compressor.compress(frames.tobytes())))

        model.write_file(f"{temporary}/frames", write_frames)
        end = replay.end[order]
        flags = {"life_lost": end == LIFE_LOST, "terminated": end == GAME_OVER, "truncated": end == TIME_LIMIT}
        flags |= {"acted": replay.acted[order], "action": replay.action[order].astype(np.uint8)}
        flags |= {"chunk_offsets": np.array(offsets), "reward": replay.reward[order]}
        model.write_file(f"{temporary}/steps.npz", lambda file: np.savez(file, **flags))
        fields = meta | {"rows": replay.size, "env_steps": int(replay.acted.sum())}
        model.write_manifest(f"{temporary}/meta.json", "xtra-dataset-1", fields, ["frames", "steps.npz"])
        os.rename(temporary, folder)
    except (OSError, SystemExit) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).removeprefix("error: ")
        raise SystemExit(f"error: --save-dataset {folder} was not written: {reason}") from None


# Copied from pretrain_teacher.py
def dataset_meta(folder):
    """The meta.json of a dataset folder, whose files are all there and undamaged; exits with one line if not."""
    fields = {"rows": int, "env_steps": int, "env_id": str, "settings": dict}
    meta = model.load_manifest(f"{folder}/meta.json", "xtra-dataset-1", fields, ["frames", "steps.npz"])
    settings = {name: value for name, value in meta["settings"].items() if name != "num_envs"}
    if settings != {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0} or not 1 <= meta["rows"] <= 10**9:
        found = f"{str(meta['rows'])[:20]} rows of {str(settings)[:200]}"
        raise SystemExit(f"error: {folder} has {found}, expected 96x96x3 and frameskip 4; collect it again")
    return meta


# Copied from pretrain_teacher.py
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


# Copied from distill.py
class Task(NamedTuple):
    """An offline game: its data and its teacher's answers."""

    env_id: str
    score: float  # the teacher's mean evaluation return
    replay: Replay  # its policy and value are the teacher's


# Copied from distill.py
def targets_meta(folder):
    """The targets.json of a teacher's run folder, whose files are there and undamaged; exits with one line if not."""
    fields = {"rows": int, "num_simulations": int, "dataset": str}
    files = ["model.pt", "targets.npz", "{dataset}/meta.json"]
    meta = model.load_manifest(f"{folder}/targets.json", "xtra-targets-1", fields, files)
    if meta["rows"] < 1 or not 1 <= meta["num_simulations"] < 2**16:
        raise SystemExit(
            f"error: {folder}/targets.json has rows or num_simulations out of range; run the teacher again"
        )
    return meta


# Copied from distill.py
def load_task(folder, device, frames_on_host=False):
    """Reads a run folder of pretrain_teacher.py and the dataset that it names -> Task.

    Exits with one line if something is missing or damaged, or if teacher and dataset do not belong together.
    """
    meta = targets_meta(folder)
    dataset = os.path.join(folder, meta["dataset"])
    rows = meta["rows"]
    arrays = {"visits": (np.uint16, (rows, 18)), "value": (np.float32, (rows,))}
    arrays = model.load_arrays(f"{folder}/targets.npz", arrays)
    replay, data = load_dataset(dataset, device, frames_on_host)
    env_id = data["env_id"]
    scores = model.load_model(f"{folder}/model.pt")[1]["counters"].get("scores")
    score = scores.get(env_id) if isinstance(scores, dict) else None
    searched = (arrays["visits"].sum(axis=1, dtype=np.int64) == meta["num_simulations"]).all()
    if replay.size != rows or type(score) is not float or not (searched and np.isfinite(arrays["value"]).all()):
        raise SystemExit(f"error: {folder} does not fit its dataset {dataset} ({env_id}); run the teacher again")
    replay.policy[:] = arrays["visits"] / meta["num_simulations"]
    replay.value[:] = arrays["value"]
    return Task(env_id, score, replay)


# Copied from pretrain_teacher.py
def gather_frames(replay, rows):
    """The frames of `rows`, numpy [n, J] -> uint8 [n, J, 3, 96, 96] on the replay's device. Waits for no GPU."""
    index = model.upload(rows.ravel(), replay.frames.device)
    if replay.frames.is_cuda or replay.device.type == "cpu":
        frames = replay.frames.index_select(0, index)  # [n * J, 3, 96, 96]
    else:
        pinned = torch.empty(len(index), 3, 96, 96, dtype=torch.uint8, pin_memory=True)
        frames = torch.index_select(replay.frames, 0, index, out=pinned).to(replay.device, non_blocking=True)
    return frames.view(*rows.shape, 3, 96, 96)


# Copied from pretrain_teacher.py
def stack_frames(replay, rows):
    """The network's input at the states `rows` [n]: uint8 [n, 12, 96, 96], oldest frame first.

    Near an episode's start its first frame is repeated, also after a life loss.
    """
    back = np.minimum(np.arange(3, -1, -1), replay.age[rows, None])  # [n, 4]
    return gather_frames(replay, rows[:, None] - back * replay.num_envs).flatten(1, 2)


# Copied from pretrain_teacher.py
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

# As in the table of pretrain_teacher.py. Target game: fresh searches of the target network. Offline games: the stored
# visits of their teacher for the policy, and its value for v.


# Copied from pretrain_teacher.py
class Targets(NamedTuple):
    """What follows the sampled rows; episodes and streams end, so `rows` is clipped to the last state that exists."""

    rows: np.ndarray  # [B, K+1] row of state k
    exists: np.ndarray  # [B, K+1] bool: action k-1 was taken, so there is a frame
    alive: np.ndarray  # [B, K+1] bool: exists and is not terminal
    value_prefix: np.ndarray  # [B, K]
    reward_sum: np.ndarray  # [B, K+1] sum_{i<n} gamma^i r_k+i
    bootstrap_rows: np.ndarray  # [B, K+1] row of state k+n
    bootstrap_discount: np.ndarray  # [B, K+1] gamma^n, 0 if state k+n is terminal


# Copied from pretrain_teacher.py
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


def td_steps_by_age(age, total_timesteps, td_steps):
    """`clip(td_steps - age // (0.3 * total_timesteps), 1, td_steps)`: the older a sample, the more off-policy its
    rewards are (EfficientZero's off-policy correction). age [B]: environment steps since it was stored -> [B]."""
    return np.clip(td_steps - age // max(1, round(0.3 * total_timesteps)), 1, td_steps)


# Copied from pretrain_teacher.py
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


# Copied from pretrain_teacher.py
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


# Copied from distill.py
def teacher_batch(task, size, unroll_steps, td_steps, beta, rng, generator):
    """A batch of one offline task with its teacher's targets: no search, td fixed (XTRA, 3.1) -> rows [size], Batch."""
    rows, weight = sample(task.replay, size, beta, rng)
    targets = make_targets(task.replay, rows, np.full(size, td_steps), unroll_steps)
    policy = task.replay.policy[targets.rows] * targets.alive[:, :, None]  # [size, K+1, A]
    bootstrap_value = task.replay.value[targets.bootstrap_rows]  # [size, K+1]
    return rows, make_batch(task.replay, targets, policy, bootstrap_value, weight, rng, generator)


def temperature_at(update, total):
    """Self-play samples actions from `visits^(1/T)`, T = 1, then 0.5 from 60 % and 0.25 from 90 % of the run (XTRA)."""
    return 1.0 if update < 0.6 * total else 0.5 if update < 0.9 * total else 0.25


def select_actions(visits, temperature, rng):
    """Samples one action per row of visits [E, A] with probability `visits^(1/temperature)`, normalised -> [E]."""
    probs = (visits / visits.max(axis=1, keepdims=True)) ** (1 / temperature)
    cumulative = np.cumsum(probs, axis=1)
    return (cumulative <= rng.random((len(visits), 1)) * cumulative[:, -1:]).sum(axis=1)


# --- loss ---
# Copied from pretrain_teacher.py
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


def combine_losses(target_loss, task_losses, eta, paper_loss):
    """Target and offline losses to one (each the mean over its own samples; task_losses [m], eta [m]).

    Released code: `1/2 * (L_T + 1/m * sum_i eta_i * L_i)`: with all L = 1 and m = 4, eta = (1, 0, 0, 0) gives 0.625.
    `paper_loss`: `L_T + sum_i eta_i * L_i` (XTRA, Eq. 1), m times the weight on the offline games relative to it.
    """
    if len(task_losses) == 0:
        return target_loss
    if paper_loss:
        return target_loss + (eta * task_losses).sum()
    return 0.5 * (target_loss + (eta * task_losses).mean())


def gradient_cosines(target_loss, task_losses, parameters):
    """`Sim_i = <G_T, G_i> / (|G_T| |G_i|)` (XTRA, Eq. 2) for each of task_losses [m] -> [m]. Changes no parameter.

    As in the released code the gradients are over all parameters and clamped to [-5, 5] element by element. The task
    weight is the share of measurements above the threshold: 120 cosines of 500 above 0.1 give eta = 0.24 (Appendix B).
    """

    def flat_gradient(loss):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return model.average([torch.cat([gradient.flatten() for gradient in gradients])])[0].clamp(-5, 5)

    target = flat_gradient(target_loss)
    return torch.stack([F.cosine_similarity(target, flat_gradient(loss), dim=0) for loss in task_losses])


def transfer_gradients(net, parameters, batch, eta, loss_function, paper_loss, m, share, measure):
    """One pass forward and backward over the mixed batch, in which the target game's samples come first, then `share`
    of each of the m offline games -> loss, norm of its gradients, terms and priority per sample, gradients, cosines.

    The loss that is minimised is that of `combine_losses` on `mean(weight * total) / K` of each game, the one returned
    K times that. measure: whether the cosines are computed, else they are zeros. With several processes loss, gradients
    and cosines are of all of them, `share`, terms and priority of this one's samples.
    """
    K = batch.action.shape[1]
    # Batch norm sees half target game, half offline games.
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=batch.obs.is_cuda):
        total, terms, priority = loss_function(net, batch)
    weighted = batch.weight * total / K
    target_loss = weighted[: len(total) - m * share].mean()
    task_losses = weighted[len(total) - m * share :].view(m, share).mean(dim=1)  # [m]
    cosines = gradient_cosines(target_loss, task_losses, parameters) if measure else torch.zeros_like(eta)
    loss = combine_losses(target_loss, task_losses, eta, paper_loss)
    gradients = model.gradients(loss, parameters)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    terms = {name: term.detach() for name, term in terms.items()}  # else autograd's graph outlives this call
    return model.average([K * loss.detach()])[0], norm, terms, priority, gradients, cosines


# Copied from pretrain_teacher.py
def learning_rate_at(update, total, base):
    """Warm-up over 1 % of the run from exactly 0, then `base`, and a tenth of it from 101 % on (EfficientZero)."""
    warm_up = total // 100
    return base * update / warm_up if update < warm_up else base * 0.1 ** ((update - warm_up) // total)


# --- evaluation ---
# Copied from pretrain_teacher.py
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


# Copied from pretrain_teacher.py
def log_evaluation(writer, env_id, env_steps, updates, returns, lengths, suffix=""):
    """The means to TensorBoard and the terminal -> one line per game for evaluations.csv."""
    writer.add_scalar("eval/episodic_return" + suffix, returns.mean(), updates)
    writer.add_scalar("eval/episodic_length" + suffix, lengths.mean(), updates)
    tqdm.write(f"updates={updates}, env_id={env_id}, evaluation return={returns.mean():.1f} (std {returns.std():.1f})")
    games = enumerate(zip(returns.tolist(), lengths.tolist(), strict=True))
    return "".join(f"{env_steps},{updates},{i},{score},{length},{env_id}\n" for i, (score, length) in games)


def save_gif(path, frames):
    """Writes a list of uint8 frames [96, 96, 3] as a gif of 15 frames a second, three times as large."""
    images = (Image.fromarray(frame).resize((288, 288), Image.NEAREST) for frame in frames)
    options = {"save_all": True, "append_images": images, "duration": 67, "loop": 0}
    model.write_file(path, lambda file: next(images).save(file, "GIF", **options), keep_going=True)


# Copied from pretrain_teacher.py
def log_search(writer, result, step):
    """Health of a search: mean root value, entropy of the visits in nats, depth of the deepest leaf."""
    visits = result.visits / result.visits.sum(axis=1, keepdims=True)  # [n, A]
    writer.add_scalar("search/root_value", result.root_value.mean(), step)
    writer.add_scalar("search/visit_entropy", -(visits * np.log(visits + 1e-12)).sum(axis=1).mean(), step)
    writer.add_scalar("search/max_depth", result.depth.max(), step)


# Copied from pretrain_teacher.py
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


def load_networks(args, device):
    """The network to start from -> (net, run folders of the offline games' teachers).

    --pretrained loads all of it, or with --transfer hg only h and g, with h only h; the rest starts at random. The
    SimSiam heads compare what g predicts with what h sees: they come along with both.
    """
    if args.pretrained is None:
        config = model.ModelConfig.of_width(args.channels or 64, args.blocks or 1)
        return model.EfficientZeroNet(config).to(device), args.teachers
    pretrained, checkpoint = model.load_model(f"{args.pretrained}/model.pt", device)
    for name in ("channels", "blocks"):
        found, asked = getattr(pretrained.config, name), getattr(args, name)
        if asked not in (None, found):
            raise SystemExit(f"error: --{name} {asked}, but --pretrained {args.pretrained} has {found}; drop the flag")
    teachers = checkpoint["args"].get("teachers", [])
    if type(teachers) is not list or not all(isinstance(folder, str) and folder.isprintable() for folder in teachers):
        raise SystemExit(f"error: {args.pretrained}/model.pt names teachers that are no folders; train it again")
    teachers = [os.path.join(args.pretrained, folder) for folder in teachers]
    if args.cross_task and args.total_timesteps and not (args.teachers or teachers):
        raise SystemExit(f"error: --pretrained {args.pretrained} names no teachers; give --teachers or --no-cross-task")
    net = model.EfficientZeroNet(pretrained.config).to(device)
    parts = ["representation"] if args.transfer == "h" else ["representation", "dynamics", "projector", "predictor"]
    for part in parts + ["prediction"] * (args.transfer == "hgf"):
        getattr(net, part).load_state_dict(getattr(pretrained, part).state_dict())
    return net, args.teachers or teachers


if __name__ == "__main__":
    interrupted = model.catch_signals()  # gets an entry when the run shall stop
    args = tyro.cli(Args, description=__doc__)
    may_be_zero = ("seed", "total_timesteps", "extra_updates", "num_simulations", "learning_starts", "similarity_start")
    check_args(args, may_be_zero)
    if args.num_simulations == 0 and args.total_timesteps:
        raise SystemExit("error: --num-simulations 0 only evaluates; training searches, give 1 or more")
    for name in ("learning_starts", "total_timesteps"):
        if args.total_timesteps and getattr(args, name) < args.batch_size:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise SystemExit(f"error: {flag} is less than --batch-size {args.batch_size}; raise it or lower that")
    if args.similarity_updates >= args.similarity_interval:
        raise SystemExit("error: --similarity-updates must be less than --similarity-interval; lower it")
    if args.teachers and not args.cross_task:
        raise SystemExit("error: --teachers are not used with --no-cross-task; leave one of the two out")
    if (args.freeze_representation or args.transfer != "hgf") and not args.pretrained:
        raise SystemExit("error: --freeze-representation and --transfer need --pretrained; give its folder")
    device, rank, W = model.join_processes(args.cuda)
    if args.batch_size % W:
        raise SystemExit(f"error: --batch-size {args.batch_size} is not a multiple of the {W} processes; make it one")
    record = args.cudagraphs and device.type == "cuda" and W == 1  # messages between processes are not recorded
    checkpoint = model.load_checkpoint(args)
    training = args.total_timesteps > 0
    total_updates = args.total_timesteps + args.extra_updates if training else 0
    finished = checkpoint is not None and checkpoint["values"]["updates"] == total_updates
    if args.save_dataset and os.path.exists(args.save_dataset) and not finished:
        raise SystemExit(f"error: --save-dataset {args.save_dataset} exists; choose a new folder")

    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)  # sampling, search, noise and self-play
    generator = torch.Generator(device).manual_seed(args.seed)  # augmentation

    # agent and data setup
    legal = legal_actions(args.env_id)  # [A]
    net, teachers = load_networks(args, device)
    teachers = teachers if args.cross_task and training else ()
    m = len(teachers)
    if m and args.offline_batch_size % m:
        raise SystemExit(f"error: --offline-batch-size {args.offline_batch_size} is not a multiple of the {m} games")
    share = args.offline_batch_size // m if m else 0
    if share % W:
        raise SystemExit(f"error: --offline-batch-size {args.offline_batch_size} / {m} is no multiple of {W} processes")
    replay_rows = args.total_timesteps * 9 // 8 + 2 * args.num_envs  # the last frame of each game has a row too
    sizes = {"rows": replay_rows + sum(targets_meta(folder)["rows"] for folder in teachers)}
    sizes |= {"samples": args.batch_size + m * share, "roots": args.batch_size * (args.unroll_steps + 1)}
    writes_data = args.save_dataset and not os.path.exists(args.save_dataset)
    sizes["disk"] = {args.save_dataset: replay_rows * 1_200} if writes_data else {}  # bytes of a compressed frame
    started = model.of_first(np.array(int(time.time())))  # in seconds; all processes must name the same folder
    run_name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{started}"
    run_dir = args.run_dir or f"runs/{run_name}"
    on_host = model.check_memory(device, run_dir, net.config, num_simulations=args.num_simulations, **sizes)
    tasks = [load_task(folder, device, on_host) for folder in teachers]
    env_ids = [task.env_id for task in tasks]
    if args.env_id in env_ids:
        raise SystemExit(f"error: --env-id {args.env_id} is one of the offline games; choose a game that is not")
    for task in tasks:
        if np.count_nonzero(task.replay.acted) < share:
            raise SystemExit(f"error: {task.env_id}'s dataset has fewer than {share} steps; lower --offline-batch-size")

    net = net.to(memory_format=torch.channels_last).train()
    if args.freeze_representation:
        net.representation.requires_grad_(False).eval()  # its batch norm statistics stay too
    model.share_batch_norms(net)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
    self_play_net, target_net, next_target_net = (model.inference_copy(net, record) for _ in range(3))
    loss_function = torch.compile(unroll_loss) if args.compile and W == 1 else unroll_loss

    def update(eta, *batch):
        settings = loss_function, args.paper_loss, m, share // W, False
        return transfer_gradients(net, parameters, Batch(*batch), eta, *settings)

    update = model.Recorded(update) if record else update
    sample_names = np.repeat([args.env_id, *env_ids], [args.batch_size] + m * [share])[rank::W]  # [(B + m * share) / W]
    log_every = max(1, min(100, args.total_timesteps // 100))  # updates
    eta = torch.ones(m, device=device)  # task weights
    similar, measured = torch.zeros(m, device=device), 0  # counters of one measurement

    # env setup
    envs, has_lives = make_envs(args.env_id, args.num_envs, life_loss_ends=True), atari_rom(args.env_id) is not None
    replay = Replay(replay_rows, args.num_envs, device, on_host)
    replays = [replay, *[task.replay for task in tasks]]
    games = start_games(envs, replay, seed=1000 * args.seed % 2_000_000_000)
    env_steps = updates = 0
    evaluated, scores = -1, {}  # evaluated: when the last evaluation was, in updates
    evaluations = "env_steps,updates,episode,return,length,env_id\n"

    # the run folder, and if the run goes on, all that it had
    lock = model.lock_folder(run_dir, checkpoint) if rank == 0 else None
    inputs = [model.sha256(f"{folder}/targets.json") for folder in teachers]
    parts = {"net": net, "self_play": self_play_net, "target": target_net, "next_target": next_target_net}
    parts |= {"optimizer": optimizer, "rng": rng, "generator": generator}
    if checkpoint:
        kinds = {"updates": int, "evaluated": int, "scores": dict, "evaluations": str, "measured": int}
        kinds |= {"eta": (m,), "similar": (m,)}
        env_steps = replay_games(envs, replay, games, checkpoint["values"], args.total_timesteps, has_lives)
        values = model.restore(run_dir, checkpoint, inputs, parts, replays, **kinds)
        updates, evaluated, scores, evaluations, measured, eta, similar = values
        eta, similar = eta.to(device), similar.to(device)
    if args.resume and rank == 0:
        model.rewind_events(run_dir, checkpoint["events"] if checkpoint else {})
        if checkpoint:  # the table may be torn
            model.write_file(f"{run_dir}/evaluations.csv", evaluations.encode(), keep_going=True)

    # TRY NOT TO MODIFY: start the game
    start_time, start_steps = time.time(), env_steps
    output = sys.stderr if rank == 0 else sys.stdout  # the others' goes nowhere
    bar = tqdm(total=total_updates, initial=updates, unit="update", dynamic_ncols=True, file=output)
    with bar, model.stop_if_not_finite(run_dir, bar):
        writer = make_writer(args, run_name, run_dir) if rank == 0 else model.Log(None)
        while True:
            last = updates >= total_updates
            if (last or updates % args.eval_every == 0) and evaluated < updates:
                movie = [] if args.capture_video else None
                settings = args.eval_episodes, args.eval_max_frames, args.num_simulations, device, movie, interrupted
                if rank == 0:
                    agent = model.inference_copy(net, record)
                    returns, lengths = evaluate(agent, args.env_id, *settings)
                if not model.any_interrupted(interrupted):
                    evaluated = updates
                if evaluated == updates and rank == 0:
                    evaluations += log_evaluation(writer, args.env_id, env_steps, updates, returns, lengths)
                    scores = {args.env_id: float(returns.mean())}
                    bar.set_postfix(eval_return=f"{returns.mean():.1f}")
                    if movie:
                        save_gif(f"{run_dir}/video-{updates}.gif", movie)
            stop = last or model.any_interrupted(interrupted)  # once: a signal may come at any moment
            saved = False
            if rank == 0 and (stop or evaluated == updates or updates % args.checkpoint_every == 0):
                values = {"updates": updates, "evaluated": evaluated, "scores": scores, "evaluations": evaluations}
                values |= {"measured": measured, "eta": eta, "similar": similar}
                actions = replay.action[: replay.size - args.num_envs].reshape(-1, args.num_envs).astype(np.uint8)
                values |= {"actions": torch.from_numpy(actions), "checksum": games.checksum.hexdigest()}
                content = parts, replays, max(1, updates // 200), values
                saved = model.save_checkpoint(run_dir, writer, args, inputs, *content, keep_going=not stop)
            if evaluated == updates and saved:
                model.write_file(f"{run_dir}/evaluations.csv", evaluations.encode(), keep_going=not last)
                saved_args = vars(args) | {"teachers": [os.path.relpath(folder, run_dir) for folder in teachers]}
                counters = {"updates": updates, "env_steps": env_steps, "scores": scores}
                content = net, saved_args, [args.env_id, *env_ids], counters
                model.save_model(f"{run_dir}/model.pt", *content, keep_going=not last)
            if stop:
                break

            wanted = min(args.total_timesteps, max(args.learning_starts, updates + 1))  # environment steps
            while env_steps < wanted and not model.any_interrupted(interrupted):
                # ALGO LOGIC: put action logic here
                if args.pretrained is None and env_steps < args.learning_starts:
                    action = rng.choice(np.flatnonzero(legal), args.num_envs)
                else:
                    obs = stack_frames(replay, np.arange(replay.size - args.num_envs, replay.size))
                    legal_rows = np.repeat(legal[None], args.num_envs, 0)
                    settings = obs, legal_rows, args.num_simulations, rng
                    result, _ = run_search(self_play_net, args.env_id, *settings, noise=True)
                    action = select_actions(result.visits, temperature_at(updates, args.total_timesteps), rng)
                    action = model.of_first(action)  # GPUs may round differently, and all play the same games
                    if env_steps % (log_every * args.num_envs) < args.num_envs:
                        log_search(writer, result, env_steps)

                # TRY NOT TO MODIFY: execute the game and log data.
                env_steps = play(envs, replay, games, action, env_steps, args.total_timesteps, has_lives)
                # One draw of rows serves all processes of torchrun: other frames under them would go unnoticed.
                shown = np.frombuffer(games.checksum.digest(), np.uint8)
                if (model.of_first(shown) != shown).any():
                    raise SystemExit(f"error: --env-id {args.env_id} does not follow its seed; run it without torchrun")
                for env in np.flatnonzero(games.over):
                    writer.add_scalar("charts/episodic_return", games.score[env], env_steps)
                    writer.add_scalar("charts/episodic_length", games.length[env], env_steps)
            if env_steps < wanted:  # interrupted
                continue

            # ALGO LOGIC: training.
            if updates % 100 == 0:
                model.refresh(self_play_net, net)
            if updates % 200 == 0:  # the target network is the network of 200 to 400 updates ago
                model.refresh(target_net, next_target_net)
                model.refresh(next_target_net, self_play_net)
            beta = 0.4 + 0.6 * min(1.0, updates / (1.2 * args.total_timesteps))
            rows, weight = sample(replay, args.batch_size, beta, rng)
            td_steps = td_steps_by_age(env_steps - replay.stored_at[rows], args.total_timesteps, args.td_steps)
            targets = make_targets(replay, rows, td_steps, args.unroll_steps)
            settings = args.env_id, replay, targets, legal, args.num_simulations, rng, args.reanalyze_cache, rank, W
            policy, value, _ = reanalyze(target_net, max(1, updates // 200), *settings)
            drawn, batches = [], [make_batch(replay, targets, policy, value, weight, rng, generator)]
            for task in tasks:
                settings = args.unroll_steps, args.td_steps, beta, rng, generator
                task_rows, task_batch = teacher_batch(task, share, *settings)
                drawn.append(task_rows)
                batches.append(task_batch)
            batch = Batch(*[torch.cat(x)[rank::W] for x in zip(*batches, strict=True)])  # [(B + m * share) / W, ...]

            phase, measured_now = updates % args.similarity_interval, False
            if m and args.task_weights and updates >= args.similarity_start:
                measured_now = phase < args.similarity_updates
                if phase == args.similarity_updates and measured:
                    eta, similar, measured = similar / measured, torch.zeros(m, device=device), 0
            if measured_now:  # several passes back through one loss: neither compiled nor recorded
                settings = unroll_loss, args.paper_loss, m, share // W, True
                results = transfer_gradients(net, parameters, batch, eta, *settings)
                similar, measured = similar + (results[-1] > args.similarity_threshold), measured + 1
            else:
                results = update(eta, *batch)
            loss, norm, terms, priority, gradients, cosines = results
            # The only wait for a GPU in an update besides the search's.
            numbers = torch.cat([model.interleave(priority), cosines, loss.view(1), norm.view(1)]).cpu().numpy()
            model.check_finite(*numbers[-2:], terms, gradients, sample_names, net, batch)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grads_with_norm_(parameters, 5.0, norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(updates, args.total_timesteps, args.learning_rate)
            optimizer.step()
            replay.priority[rows] = numbers[: args.batch_size]
            offline = numbers[args.batch_size : args.batch_size + m * share].reshape(m, share)
            for task, task_rows, new in zip(tasks, drawn, offline, strict=True):
                task.replay.priority[task_rows] = new
            for env_id, cosine in zip(env_ids, numbers[-2 - m : -2], strict=True) if measured_now else []:
                writer.add_scalar(f"transfer/grad_cosine/{env_id}", cosine, updates)

            if updates % log_every == 0:
                writer.add_scalar("losses/loss", numbers[-2], updates)
                for name, term in terms.items():
                    term = model.interleave(term)  # [B + m * share]
                    writer.add_scalar(f"losses/{name}_loss", term[: args.batch_size].mean().item(), updates)
                    means = term[args.batch_size :].view(m, share).mean(dim=1).tolist()
                    for env_id, mean in zip(env_ids, means, strict=True):
                        writer.add_scalar(f"losses/{name}_loss/{env_id}", mean, updates)
                for env_id, weight in zip(env_ids, eta.tolist(), strict=True):
                    writer.add_scalar(f"transfer/task_weight/{env_id}", weight, updates)
                writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], updates)
                writer.add_scalar("charts/beta", beta, updates)
                writer.add_scalar("charts/temperature", temperature_at(updates, args.total_timesteps), updates)
                writer.add_scalar("charts/updates", updates, env_steps)
                speed = (env_steps - start_steps) / (time.time() - start_time)
                writer.add_scalar("charts/SPS", int(speed), updates)
                writer.flush()
            updates += 1
            bar.update()
    envs.close()

    if model.any_interrupted(interrupted):
        print(f"{run_dir}: stopped at update {updates} by {interrupted[0]}. Next: the same command with --resume")
        sys.exit(model.INTERRUPTED)
    if rank > 0:
        sys.exit()
    if args.save_dataset and os.path.exists(args.save_dataset):
        print(f"{args.save_dataset}: exists, left as it is")
    elif args.save_dataset:
        versions = {name: version(name) for name in ("ale-py", "gymnasium", "numpy", "torch")}
        settings = {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0, "num_envs": args.num_envs}
        rom = atari_rom(args.env_id)
        rom_md5 = hashlib.md5(get_rom_path(rom).read_bytes()).hexdigest() if rom else None
        meta = {"env_id": args.env_id, "seed": args.seed, "policy": f"{run_dir}/model.pt", "settings": settings}
        save_dataset(args.save_dataset, replay, meta | {"rom_md5": rom_md5, "versions": versions})
        print(f"{args.save_dataset}: dataset saved. Next: python pretrain_teacher.py --datasets {args.save_dataset}")
    print(f"{run_dir}: agent saved. Next: tensorboard --logdir {run_dir}")
