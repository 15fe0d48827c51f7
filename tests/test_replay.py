"""The replay as finetune.py fills it, sampling from it, and the dataset folder: written, read, damaged."""

import ast
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune
from finetune import add_frames, play, replay_games, save_dataset, start_games
from model import write_manifest
from pretrain_teacher import GAME_OVER, LIFE_LOST, TIME_LIMIT, Replay, load_dataset, make_envs, sample

ROOT = Path(__file__).resolve().parent.parent
E = 2  # environments
META = {"env_id": "A", "settings": {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0, "num_envs": E}}
COMPRESSOR = zstandard.ZstdCompressor


# ---- collecting


def main_node(kind, text):
    """The one statement of finetune.py's main of that kind whose text starts so."""
    main = ast.parse((ROOT / "finetune.py").read_text()).body[-1]
    (node,) = [node for node in ast.walk(main) if isinstance(node, kind) and ast.unparse(node).startswith(text)]
    return node


def collect(env_id, steps):
    """Plays random actions in the E environments, as finetune.py does before `learning_starts` -> what it has then."""
    scalars = []
    run = SimpleNamespace(
        envs=make_envs(env_id, E, life_loss_ends=True), has_lives=finetune.atari_rom(env_id) is not None,
        legal=np.flatnonzero(finetune.legal_actions(env_id)), rng=np.random.default_rng(0),
        replay=Replay(steps * 9 // 8 + 2 * E, E, "cpu"), env_steps=0, scalars=scalars,
        writer=SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar)),
    )  # fmt: skip
    run.games = start_games(run.envs, run.replay, seed=5_000)
    go_on(run, steps)
    return run


def go_on(run, total_timesteps):
    """Plays up to that many environment steps, and logs with the statement of finetune.py's main."""
    log_games = compile(ast.Module([main_node(ast.For, "for env in np.flatnonzero(games.over)")], []), "", "exec")
    while run.env_steps < total_timesteps:
        action = run.rng.choice(run.legal, E)
        settings = run.env_steps, total_timesteps, run.has_lives
        run.env_steps = play(run.envs, run.replay, run.games, action, *settings)
        exec(log_games, vars(run) | {"np": np})


def play_again(env_id, actions, limit):
    """The same games, noted down one environment at a time: a list of dicts per environment.

    actions [T, E]; limit: environment steps that count. Each frame has a row, acted on or not.
    """
    envs = make_envs(env_id, E, life_loss_ends=True)
    frames = envs.reset(seed=5_000)[0].reshape(E, 96, 96, 3)
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


def action_log(replay):
    """What the environments got, [T, E]; the newest frames have no action yet."""
    return replay.action[: replay.size].reshape(-1, E)[:-1]


STEPS = 1800  # in both environments together: more than one game of random play


@pytest.fixture(scope="module")
def assault():
    """The replay of a short run in Assault, and the same games as `play_again` notes them."""
    run = collect("AssaultNoFrameskip-v4", STEPS)
    return run.replay, play_again("AssaultNoFrameskip-v4", action_log(run.replay), STEPS), run


@pytest.fixture(scope="module")
def dataset(assault, tmp_path_factory):
    """The dataset folder of that run."""
    folder = str(tmp_path_factory.mktemp("data") / "Assault")
    save_dataset(folder, assault[0], META | {"env_id": "AssaultNoFrameskip-v4", "seed": 5})
    return folder


def column(stream, name):
    """A field of the rows that were acted on."""
    return np.array([row[name] for row in stream if row["acted"]])


def test_the_run_has_lost_lives_and_finished_games(assault):
    replay, _, run = assault
    ends = replay.end[: replay.size]
    assert (ends == LIFE_LOST).sum() >= 3 and (ends == GAME_OVER).sum() >= 1
    assert replay.acted.sum() == run.env_steps == STEPS


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
    _, streams, run = assault
    expected = []
    for stream in streams:
        total = length = 0
        for row in stream:
            total, length = total + row.get("reward", 0), length + row["acted"]
            if row["end"] == GAME_OVER:
                expected.append((total, length))
                total = length = 0
    returns = [value for key, value, _ in run.scalars if key == "charts/episodic_return"]
    lengths = [value for key, value, _ in run.scalars if key == "charts/episodic_length"]
    assert sorted(zip(returns, lengths, strict=True)) == sorted(expected) and len(expected) >= 1
    for e, stream in enumerate(streams):  # and the games that go on
        over = [t for t, row in enumerate(stream) if row["end"] == GAME_OVER]
        rows = stream[over[-1] + 1 if over else 0 :]
        assert run.games.score[e] == sum(row.get("reward", 0) for row in rows)
        assert run.games.length[e] == sum(row["acted"] for row in rows) > 0 and not run.games.over[e]


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_new_rows_get_the_highest_priority_and_rows_without_action_none(assault):
    replay = assault[0]
    assert (replay.priority[: replay.size] == replay.acted[: replay.size]).all()  # 1 in an empty replay, else 0
    run = collect("toy_env:Catch-v0", 60)
    replay = run.replay
    replay.priority[:10] = 7.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1
    go_on(run, 120)
    assert replay.acted.sum() == 120
    new = replay.acted & (replay.stored_at >= 60)
    assert new.sum() == 60 and (replay.priority[new] == 7.5).all() and (replay.priority[~replay.acted] == 0).all()


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_a_run_of_a_number_of_steps_that_the_environments_do_not_divide():
    run = collect("toy_env:Catch-v0", 41)
    replay = run.replay
    assert replay.acted.sum() == run.env_steps == 41
    assert sorted(replay.stored_at[replay.acted].tolist()) == list(range(41))


@pytest.mark.parametrize("seed, first", [(5, 5_000), (0, 0), (2_000_001, 1_000)])  # what ALE takes is below 2^31
def test_the_games_of_a_run_are_those_of_1000_times_its_seed(seed, first):
    call = main_node(ast.Assign, "games = start_games(").value
    (keyword,) = [keyword for keyword in call.keywords if keyword.arg == "seed"]
    assert eval(ast.unparse(keyword.value), {"args": SimpleNamespace(seed=seed)}) == first


# ---- the action log of a checkpoint


def replayed(env_id, run, actions, total_timesteps, checksum=None):
    """Replay, games and environment steps that `replay_games` makes of the action log of a run."""
    envs = make_envs(env_id, E, life_loss_ends=True)
    replay = Replay(total_timesteps * 9 // 8 + 2 * E, E, "cpu")
    games = start_games(envs, replay, seed=5_000)
    values = {"actions": actions, "checksum": checksum or run.games.checksum.hexdigest()}
    return replay, games, replay_games(envs, replay, games, values, total_timesteps, run.has_lives)


def as_log(replay):
    return torch.from_numpy(action_log(replay).astype(np.uint8))


def test_the_action_log_brings_replay_and_games_back_bit_by_bit(assault):
    replay, _, run = assault
    again, games, env_steps = replayed("AssaultNoFrameskip-v4", run, as_log(replay), STEPS)
    assert env_steps == STEPS and again.size == replay.size
    for name, array in vars(replay).items():
        if hasattr(array, "shape"):
            x, y = (getattr(each, name)[: replay.size] for each in (replay, again))
            assert x.dtype == y.dtype and (x == y).all(), name
    for name in ("over", "score", "length"):
        x, y = getattr(games, name), getattr(run.games, name)
        assert x.dtype == y.dtype and (x == y).all(), name


def test_the_checksum_is_over_frames_rewards_and_ends_in_the_order_they_came(assault):
    replay, _, run = assault
    checksum = hashlib.sha256()
    for first in range(0, replay.size, E):
        checksum.update(replay.frames[first : first + E].permute(0, 2, 3, 1).contiguous().numpy())
        if first:  # a step's reward and end stand in the rows before its frames
            before = slice(first - E, first)
            checksum.update(replay.reward[before].tobytes() + replay.end[before].tobytes())
    assert checksum.hexdigest() == run.games.checksum.hexdigest()


def refused_log(*args):
    with pytest.raises(SystemExit) as stop:
        replayed("toy_env:Catch-v0", *args)
    message = stop.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_games_that_show_something_else_are_one_line():
    run = collect("toy_env:Catch-v0", 60)
    log = as_log(run.replay)
    assert replayed("toy_env:Catch-v0", run, log, 60)[2] == 60
    other = log.clone()
    other[3] = 17 - other[3]
    for actions in (other, log[:-1], log[:0]):
        assert "the games differ from those of the checkpoint" in refused_log(run, actions, 60)
    assert "the games differ" in refused_log(run, log, 60, "0" * 64)


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_an_action_log_that_is_none_is_one_line():
    run = collect("toy_env:Catch-v0", 20)
    log = as_log(run.replay)
    wide, foreign = torch.cat([log, log], dim=1), log.clone()
    foreign[2, 1] = 18
    for actions in (None, log.tolist(), log.long(), log.float(), log[:, :1], log[:, 0], wide, log[None], foreign):
        assert "no action log of these environments" in refused_log(run, actions, 20)


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


@settings(derandomize=True, deadline=None, database=None)
@given(
    priorities=st.lists(st.just(0.0) | st.floats(1e-6, 1e30), min_size=1, max_size=40).filter(any),
    beta=st.floats(0.4, 1.0),
    seed=st.integers(0, 9),
)
def test_importance_weights_are_finite_and_above_0_whatever_the_priorities(priorities, beta, seed):
    """From the least priority, 1e-6, to more than any value error can be, and rows without action among them."""
    replay = Replay(len(priorities) + 2, 1, "cpu")
    replay.size, replay.priority[: len(priorities)] = len(priorities), priorities
    batch = 1 + seed % np.count_nonzero(priorities)
    rows, weight = sample(replay, batch, beta, np.random.default_rng(seed))
    assert (replay.priority[rows] > 0).all() and len(set(rows.tolist())) == batch
    assert np.isfinite(weight).all() and (weight > 0).all() and weight.max() == 1


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
    save_dataset(folder, replay, META)
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
    save_dataset(str(folder), replay, META)
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
    fields = META | {"rows": 20, "env_steps": 18}
    write_manifest(f"{small}/meta.json", "xtra-dataset-0", fields, ["frames", "steps.npz"])
    message = refusal(small)
    assert "'xtra-dataset-0'" in message and "'xtra-dataset-1'" in message


@pytest.mark.parametrize(
    "changed",
    [{"frame": [84, 84, 1]}, {"frameskip": 5}, {"sticky_actions": 0.25}, {"noop_max": 0}, {"frame": None}],
    ids=str,
)
def test_a_dataset_of_other_environment_settings_is_refused(small, changed):
    fields = META | {"rows": 20, "env_steps": 18, "settings": META["settings"] | changed}
    write_manifest(f"{small}/meta.json", "xtra-dataset-1", fields, ["frames", "steps.npz"])
    assert "expected 96x96x3 and frameskip 4" in refusal(small)


@pytest.mark.parametrize("field", ["rows", "env_steps", "env_id", "settings"])
def test_a_description_without_one_of_its_fields_is_refused(small, field):
    fields = META | {"rows": 20, "env_steps": 18}
    for changed in ({name: value for name, value in fields.items() if name != field}, fields | {field: [1]}):
        write_manifest(f"{small}/meta.json", "xtra-dataset-1", changed, ["frames", "steps.npz"])
        assert f"{small}/meta.json lacks a field" in refusal(small)


@pytest.mark.parametrize("rows", [0, -1, 1, 8, 19, 21, 24, 10**9])
def test_another_number_of_rows_than_there_are_is_refused(small, rows):
    write_manifest(
        f"{small}/meta.json", "xtra-dataset-1", META | {"rows": rows, "env_steps": 18}, ["frames", "steps.npz"]
    )
    refusal(small)


def rewrite(folder, **changed):
    """Other arrays in steps.npz, with right checksums: what was written wrong, not damaged."""
    with np.load(folder / "steps.npz") as steps:
        arrays = {name: value for name, value in (dict(steps) | changed).items() if value is not None}
    np.savez(folder / "steps.npz", **arrays)
    fields = META | {"rows": 20, "env_steps": 18}
    write_manifest(f"{folder}/meta.json", "xtra-dataset-1", fields, ["frames", "steps.npz"])


@pytest.mark.parametrize(
    "changed",
    [
        {"action": np.full(20, 18, np.uint8)},
        {"action": np.zeros(20, np.int64)},
        {"action": np.zeros(21, np.uint8)},
        {"action": None},
        {"reward": np.full(20, np.nan, np.float32)},
        {"reward": np.zeros(20)},
        {"acted": np.ones(20, np.uint8)},
        {"acted": np.ones((20, 1), bool)},
        {"chunk_offsets": np.array([0, 1, 2])},
        {"chunk_offsets": np.zeros(4, np.int64)},
    ],
    ids=lambda changed: "".join(changed),
)
def test_steps_that_are_out_of_range_are_refused(small, changed):
    rewrite(small, **changed)
    assert f"{small}/steps.npz" in refusal(small)


def test_offsets_between_which_no_chunk_lies_are_refused(small):
    offsets = np.load(small / "steps.npz")["chunk_offsets"]
    rewrite(small, chunk_offsets=offsets + np.array([0, 1, 0, 0]))
    assert f"{small}/frames cannot be unpacked" in refusal(small)
    for other in (offsets + np.array([0, 0, 0, 1]), offsets + 1, offsets[[0, 1, 1, 3]], offsets[[0, 2, 1, 3]]):
        rewrite(small, chunk_offsets=other)  # too long, a late start, an empty chunk, a step back
        assert f"{small}/steps.npz has offsets" in refusal(small)
    rewrite(small, chunk_offsets=offsets)
    assert load_dataset(str(small), "cpu")[0].size == 20


def test_chunks_of_another_size_than_8_frames_are_refused(small):
    for sizes in ([7, 8, 5], [8, 9, 3], [8, 8, 5000]):  # the last unpacks to more memory than its rows
        chunks = [zstandard.compress(bytes(size * 96 * 96 * 3)) for size in sizes]
        (small / "frames").write_bytes(b"".join(chunks))
        rewrite(small, chunk_offsets=np.cumsum([0, *map(len, chunks)]))
        assert f"{small}/frames cannot be unpacked" in refusal(small)


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
            save_dataset(str(folder), replay, META)
    message = stop.value.code
    assert str(folder) in message and "No space left on device" in message and "\n" not in message
    assert os.listdir(tmp_path) == []
    save_dataset(str(folder), replay, META)  # and with space it works
    assert os.listdir(tmp_path) == ["data"]


def test_the_remains_of_a_killed_run_are_no_obstacle(small, tmp_path):
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "frames").write_bytes(b"half")
    replay = load_dataset(str(small), "cpu")[0]
    save_dataset(str(tmp_path / "new"), replay, META)
    assert torch.equal(load_dataset(str(tmp_path / "new"), "cpu")[0].frames, replay.frames)
    assert sorted(os.listdir(tmp_path)) == ["data", "new"]


def test_a_folder_may_be_written_with_a_slash_at_its_end(small, tmp_path):
    replay = load_dataset(str(small), "cpu")[0]
    save_dataset(f"{tmp_path}/new/", replay, META)
    assert load_dataset(f"{tmp_path}/new/", "cpu")[1]["rows"] == 20
    assert sorted(os.listdir(tmp_path / "new")) == ["frames", "meta.json", "steps.npz"]
