"""The replay as finetune.py fills it, sampling from it, and the dataset folder: written, read, damaged."""

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard

import finetune
from finetune import add_frames, save_dataset
from model import write_manifest
from pretrain_teacher import GAME_OVER, LIFE_LOST, TIME_LIMIT, Replay, load_dataset, make_envs, sample

ROOT = Path(__file__).resolve().parent.parent
E = 2  # environments
COMPRESSOR = zstandard.ZstdCompressor


# ---- collecting


def collect(env_id, steps):
    """Plays random actions in the E environments with the statements of finetune.py's main -> its variables.

    Taken from the script's text: the environment setup, and the loop that steps. No network is needed, since the game
    does not get beyond `learning_starts`. Call `space["play"](more)` to go on.
    """
    main = ast.parse((ROOT / "finetune.py").read_text()).body[-1].body
    texts = [ast.unparse(node) for node in main]
    first = next(i for i, text in enumerate(texts) if text.startswith("envs = "))
    last = next(i for i, text in enumerate(texts) if text.startswith("env_steps = "))
    setup = [*main[first:last], main[last]]
    (loop,) = [
        x for x in ast.walk(ast.Module(main, [])) if isinstance(x, ast.While) and "env_steps" in ast.unparse(x.test)
    ]
    flags = {"env_id": env_id, "seed": 5, "num_envs": E, "total_timesteps": steps, "pretrained": None}
    scalars = []
    space = vars(finetune) | {
        "args": SimpleNamespace(**flags), "device": "cpu", "rng": np.random.default_rng(0),
        "legal": finetune.legal_actions(env_id), "scalars": scalars,
        "writer": SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar)),
    }  # fmt: skip

    def play(learning_starts):
        space["args"].learning_starts = learning_starts
        exec(compile(ast.Module([loop], []), "finetune.py", "exec"), space)

    exec(compile(ast.Module(setup, []), "finetune.py", "exec"), space)
    space["play"] = play
    play(steps)
    space["envs"].close()
    return space


def play_again(env_id, actions, limit):
    """The same games, noted down one environment at a time: a list of dicts per environment.

    actions [T, E]; limit: environment steps that count. Each frame has a row, acted on or not.
    """
    envs = make_envs(env_id, E, life_loss_ends=True)
    frames = envs.reset(seed=5_000)[0].reshape(E, 96, 96, 3)  # 1,000 times --seed
    streams = [[{"frame": frames[e].copy(), "acted": False, "end": 0, "age": 0}] for e in range(E)]
    over, steps = [False] * E, 0
    for action in actions:
        frames, reward, terminated, truncated, info = envs.step(action)
        for e in range(E):
            row, new = streams[e][-1], {"frame": frames.reshape(E, 96, 96, 3)[e].copy(), "acted": False, "end": 0}
            if over[e]:  # this step only restarted the game
                over[e], new["age"] = False, 0
            elif steps < limit:
                steps += 1
                row |= {"acted": True, "action": action[e], "reward": reward[e], "stored_at": steps - 1}
                lives = info["lives"][e]
                if truncated[e] or (terminated[e] and lives == 0):
                    row["end"], over[e] = (TIME_LIMIT if truncated[e] else GAME_OVER), True
                elif terminated[e]:
                    row["end"] = LIFE_LOST
                new["age"] = 0 if row["end"] == LIFE_LOST else row["age"] + 1
            else:
                new["age"] = row["age"] + 1
            streams[e].append(new)
    envs.close()
    return streams


STEPS = 1800  # in both environments together: more than one game of random play


@pytest.fixture(scope="module")
def assault():
    """The replay of a short run in Assault, and the same games as `play_again` notes them."""
    space = collect("AssaultNoFrameskip-v4", STEPS)
    replay = space["replay"]
    actions = replay.action[: replay.size].reshape(-1, E)[:-1]
    return replay, play_again("AssaultNoFrameskip-v4", actions, STEPS), space


@pytest.fixture(scope="module")
def dataset(assault, tmp_path_factory):
    """The dataset folder of that run."""
    folder = str(tmp_path_factory.mktemp("data") / "Assault")
    save_dataset(folder, assault[0], {"env_id": "AssaultNoFrameskip-v4", "seed": 5})
    return folder


def column(stream, name):
    """A field of the rows that were acted on."""
    return np.array([row[name] for row in stream if row["acted"]])


def test_the_run_has_lost_lives_and_finished_games(assault):
    replay, _, space = assault
    ends = replay.end[: replay.size]
    assert (ends == LIFE_LOST).sum() >= 3 and (ends == GAME_OVER).sum() >= 1
    assert replay.acted.sum() == space["env_steps"] == STEPS


def test_the_replay_holds_the_games_row_by_row(assault):
    replay, streams, _ = assault
    for e, stream in enumerate(streams):
        rows = np.arange(e, replay.size, E)
        acted = np.array([row["acted"] for row in stream])
        assert (replay.acted[rows] == acted).all()
        assert (replay.end[rows] == [row["end"] for row in stream]).all()
        assert (replay.age[rows] == [row["age"] for row in stream]).all()
        for name in ("action", "reward", "stored_at"):
            assert (getattr(replay, name)[rows][acted] == column(stream, name)).all(), name
        frames = replay.frames[rows].permute(0, 2, 3, 1).numpy()
        assert (frames == [row["frame"] for row in stream]).all()


def test_the_last_frame_of_a_game_is_not_acted_on_and_the_next_row_starts_a_new_one(assault):
    replay = assault[0]
    over = np.flatnonzero(replay.end[: replay.size - 2 * E] == GAME_OVER)
    assert len(over) and not replay.acted[over + E].any()
    assert replay.acted[over + 2 * E].all() and (replay.age[over + 2 * E] == 0).all()
    lost = np.flatnonzero(replay.end[: replay.size - 2 * E] == LIFE_LOST)
    assert replay.acted[lost + E].all() and (replay.age[lost + E] == 0).all()


def test_finished_games_are_logged_with_their_raw_return(assault):
    _, streams, space = assault
    expected = []
    for stream in streams:
        total = length = 0
        for row in stream:
            total, length = total + row.get("reward", 0), length + row["acted"]
            if row["end"] == GAME_OVER:
                expected.append((total, length))
                total = length = 0
    returns = [value for key, value, _ in space["scalars"] if key == "charts/episodic_return"]
    lengths = [value for key, value, _ in space["scalars"] if key == "charts/episodic_length"]
    assert sorted(zip(returns, lengths, strict=True)) == sorted(expected) and len(expected) >= 1


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_new_rows_get_the_highest_priority_and_rows_without_action_none(assault):
    replay = assault[0]
    assert (replay.priority[: replay.size] == replay.acted[: replay.size]).all()  # 1 in an empty replay, else 0
    space = collect("toy_env:Catch-v0", 60)
    space["args"].total_timesteps = 120
    space["replay"].priority[:10] = 7.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1
    space["play"](120)
    replay = space["replay"]
    assert replay.acted.sum() == 120
    new = replay.acted & (replay.stored_at >= 60)
    assert new.sum() == 60 and (replay.priority[new] == 7.5).all() and (replay.priority[~replay.acted] == 0).all()


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_a_run_of_a_number_of_steps_that_the_environments_do_not_divide():
    replay = collect("toy_env:Catch-v0", 41)["replay"]
    assert replay.acted.sum() == 41
    assert sorted(replay.stored_at[replay.acted].tolist()) == list(range(41))


def test_frames_beyond_the_first_size_make_room():
    replay = Replay(3, E, "cpu")
    frames = np.random.default_rng(0).integers(0, 256, (6, E, 96, 96, 3), dtype=np.uint8)
    for t in range(6):
        add_frames(replay, frames[t], age=np.full(E, t))
        replay.reward[2 * t : 2 * t + 2] = t + 1
    assert replay.size == 12
    assert (replay.frames[:12].permute(0, 2, 3, 1).numpy() == frames.reshape(12, 96, 96, 3)).all()
    assert replay.age[:12].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert replay.reward[:12].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    sizes = {name: len(array) for name, array in vars(replay).items() if hasattr(array, "shape")}
    assert len(sizes) == 12 and set(sizes.values()) == {len(replay.action)} and len(replay.action) >= 12
    assert not replay.acted.any() and not replay.priority.any() and replay.policy.shape[1] == 18


# ---- sampling


def replay_with(priority):
    replay = Replay(len(priority) + 3, 1, "cpu")
    replay.size = len(priority)
    replay.priority[: replay.size] = priority
    replay.priority[replay.size :] = 100  # beyond the newest row: must not be seen
    return replay


def test_rows_are_drawn_in_proportion_to_the_priority_to_the_power_of_0_6():
    priority = np.array([0.1, 1.0, 0.0, 3.0, 0.5])
    replay, rng, draws = replay_with(priority), np.random.default_rng(0), 20_000
    counts = np.bincount([sample(replay, 1, 0.4, rng)[0][0] for _ in range(draws)], minlength=5)
    # 0.1^0.6 = 0.2512, 1, 0, 3^0.6 = 1.9332, 0.5^0.6 = 0.6598; sum 3.8441
    expected = draws * np.array([0.2512, 1, 0, 1.9332, 0.6598]) / 3.8441
    assert counts[2] == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in 1,000 seeds


def test_a_batch_has_no_row_twice_and_none_of_priority_0():
    rng = np.random.default_rng(0)
    replay = replay_with(rng.uniform(0, 1, 60) * (np.arange(60) % 3 > 0))
    for _ in range(50):
        rows, _ = sample(replay, 40, 0.4, rng)
        assert sorted(set(rows.tolist())) == sorted(rows.tolist())
        assert sorted(rows.tolist()) == [i for i in range(60) if i % 3 > 0]  # all 40 that there are
    drawn = np.concatenate([sample(replay, 10, 0.4, rng)[0] for _ in range(200)])
    assert len(set(drawn.tolist())) == 40 and (drawn % 3 > 0).all()


def test_roots_are_rows_with_an_action(assault, dataset):
    rng = np.random.default_rng(0)
    for replay in (assault[0], load_dataset(dataset, "cpu")[0]):
        rows = np.concatenate([sample(replay, 256, 1.0, rng)[0] for _ in range(30)])
        assert replay.acted[rows].all() and len(np.unique(rows)) > 0.95 * STEPS


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_importance_weights(beta):
    priority = np.array([1.0, 0.0, 2.0, 4.0, 8.0])
    rows, weight = sample(replay_with(priority), 4, beta, np.random.default_rng(0))
    # P ~ (1, 2^0.6, 4^0.6, 8^0.6); (N P_i)^-beta / max = (priority_i / smallest)^(-0.6 beta): N and the sum cancel
    expected = {0: 1.0, 2: 2 ** (-0.6 * beta), 3: 4 ** (-0.6 * beta), 4: 8 ** (-0.6 * beta)}
    assert dict(zip(rows.tolist(), weight, strict=True)) == pytest.approx(expected)


def test_sampling_leaves_the_priorities_as_they_are():
    replay = replay_with([1.0, 2.0, 3.0])
    sample(replay, 2, 0.4, np.random.default_rng(0))
    assert replay.priority[:3].tolist() == [1, 2, 3]


# ---- datasets


def test_a_dataset_gives_back_each_environments_stream_bit_by_bit(assault, dataset):
    replay, streams, _ = assault
    loaded, meta = load_dataset(dataset, "cpu")
    assert loaded.num_envs == 1 and loaded.size == replay.size == meta["rows"] and meta["env_steps"] == STEPS
    assert meta["env_id"] == "AssaultNoFrameskip-v4" and meta["seed"] == 5
    T = replay.size // E
    for e, stream in enumerate(streams):
        here, there = slice(e * T, (e + 1) * T), np.arange(e, replay.size, E)
        for name in ("frames", "action", "reward", "acted", "end"):
            x, y = getattr(loaded, name)[here], getattr(replay, name)[there]
            assert x.dtype == y.dtype and (x == y).all(), name
        frames = loaded.frames[here].permute(0, 2, 3, 1).numpy()
        assert (frames == [row["frame"] for row in stream]).all()
        acted = loaded.acted[here]
        assert (loaded.age[here][acted] == replay.age[there][acted]).all()
    over = np.flatnonzero((loaded.end > 0) & (loaded.end != LIFE_LOST))
    assert (loaded.age[over + 1] == loaded.age[over] + 1).all()  # a game's last frame belongs to its last episode
    assert (loaded.priority == loaded.acted).all()


def test_the_streams_of_a_time_limit_are_kept(tmp_path):
    #  row       0   1   2 | 3   4      row 1's action meets the time limit, row 2 is the last frame, row 3 a new game
    replay = Replay(5, 1, "cpu")
    for _ in range(5):
        add_frames(replay, np.zeros((1, 96, 96, 3), np.uint8), age=0)
    replay.acted[:], replay.end[1], replay.reward[:2] = [1, 1, 0, 1, 0], TIME_LIMIT, [0.5, -200]
    folder = f"{tmp_path}/data"
    save_dataset(folder, replay, {"env_id": "A"})
    loaded = load_dataset(folder, "cpu")[0]
    assert loaded.end.tolist() == [0, TIME_LIMIT, 0, 0, 0] and loaded.age.tolist() == [0, 1, 2, 0, 1]
    assert loaded.reward.tolist() == [0.5, -200, 0, 0, 0]


def test_five_lines_of_numpy_read_the_frames(assault, dataset):
    offsets = np.load(f"{dataset}/steps.npz")["chunk_offsets"]
    with open(f"{dataset}/frames", "rb") as file:
        data = file.read()
    chunks = [zstandard.decompress(data[offsets[i] : offsets[i + 1]]) for i in range(len(offsets) - 1)]
    frames = np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, 96, 96, 3)

    assert offsets[0] == 0 and offsets[-1] == len(data)
    assert (frames == [row["frame"] for stream in assault[1] for row in stream]).all()


def test_the_folder_holds_three_files_and_a_readable_description(dataset):
    assert sorted(os.listdir(dataset)) == ["frames", "meta.json", "steps.npz"]
    with open(f"{dataset}/meta.json") as file:
        meta = json.load(file)
    assert meta["format"] == "xtra-dataset-1" and sorted(meta["sha256"]) == ["frames", "steps.npz"]
    with np.load(f"{dataset}/steps.npz", allow_pickle=False) as steps:
        names = ["acted", "action", "chunk_offsets", "life_lost", "reward", "terminated", "truncated"]
        assert sorted(steps) == names
        assert {len(steps[name]) for name in names if name != "chunk_offsets"} == {meta["rows"]}


# ---- damage


@pytest.fixture
def small(tmp_path):
    """A dataset folder of 20 rows."""
    replay, rng = Replay(20, E, "cpu"), np.random.default_rng(0)
    for t in range(10):
        add_frames(replay, rng.integers(0, 256, (E, 96, 96, 3), dtype=np.uint8), age=np.full(E, t))
    replay.acted[:18] = True
    folder = tmp_path / "data"
    save_dataset(str(folder), replay, {"env_id": "A"})
    return folder


def refusal(folder):
    """The one line that loading ends in."""
    with pytest.raises(SystemExit) as stop:
        load_dataset(str(folder), "cpu")
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", ["frames", "steps.npz", "meta.json"])
def test_a_flipped_byte_is_found(small, name):
    content = (small / name).read_bytes()
    for position in np.linspace(0, len(content) - 1, 12, dtype=int):
        (small / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert f"{small}/{name}" in refusal(small)
    (small / name).write_bytes(content)
    assert load_dataset(str(small), "cpu")[0].size == 20


@pytest.mark.parametrize("name", ["frames", "steps.npz", "meta.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_found(small, name, share):
    content = (small / name).read_bytes()
    (small / name).write_bytes(content[: int(share * len(content))])
    assert f"{small}/{name} is damaged" in refusal(small)


@pytest.mark.parametrize("name", ["frames", "steps.npz", "meta.json"])
def test_a_missing_file_is_named(small, name):
    (small / name).unlink()
    assert f"{small}/{name} not found" in refusal(small)


def test_a_missing_folder_is_named(tmp_path):
    assert "xtra-dataset-1" in refusal(tmp_path / "nowhere")


def test_another_format_version_is_named(small):
    write_manifest(f"{small}/meta.json", "xtra-dataset-0", {"rows": 20}, ["frames", "steps.npz"])
    message = refusal(small)
    assert "'xtra-dataset-0'" in message and "'xtra-dataset-1'" in message


def test_the_frames_of_another_dataset_are_refused(small, dataset):
    (small / "frames").write_bytes(Path(dataset, "frames").read_bytes())
    assert "does not belong" in refusal(small)


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


class FullDisk:
    """A compressor whose third chunk does not fit."""

    def __init__(self, level):
        self.compressor, self.chunks = COMPRESSOR(level=level), 0

    def compress(self, data):
        self.chunks += 1
        return self.compressor.compress(data) if self.chunks < 3 else no_space()


@pytest.mark.parametrize(
    "place, failing",
    [
        ("zstandard.ZstdCompressor", FullDisk),  # among the frames
        ("numpy.savez", no_space),
        ("os.fsync", no_space),  # in meta.json
        ("os.rename", no_space),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, place, failing):
    replay = Replay(40, 1, "cpu")
    replay.frames[:], replay.size = 0, 40
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(place, failing)
        with pytest.raises(SystemExit) as stop:
            save_dataset(str(folder), replay, {"env_id": "A"})
    message = stop.value.code
    assert str(folder) in message and "No space left on device" in message and "\n" not in message
    assert os.listdir(tmp_path) == []
    save_dataset(str(folder), replay, {"env_id": "A"})  # and with space it works
    assert os.listdir(tmp_path) == ["data"]


def test_the_remains_of_a_killed_run_are_no_obstacle(small, tmp_path):
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "frames").write_bytes(b"half")
    replay = load_dataset(str(small), "cpu")[0]
    save_dataset(str(tmp_path / "new"), replay, {"env_id": "A"})
    assert torch.equal(load_dataset(str(tmp_path / "new"), "cpu")[0].frames, replay.frames)
    assert sorted(os.listdir(tmp_path)) == ["data", "new"]


def test_a_folder_may_be_written_with_a_slash_at_its_end(small, tmp_path):
    replay = load_dataset(str(small), "cpu")[0]
    save_dataset(f"{tmp_path}/new/", replay, {"env_id": "A"})
    assert load_dataset(f"{tmp_path}/new/", "cpu")[1]["rows"] == 20
    assert sorted(os.listdir(tmp_path / "new")) == ["frames", "meta.json", "steps.npz"]
