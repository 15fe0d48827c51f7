"""No damaged, foreign or forged file gets beyond its loader: one line says so, and nothing is run or allocated.

A forged file is one whose checksums were all put right after the change. Such a file may still say something else than
the intact one (other pixels, another score), but it cannot crash a script, run code or take memory.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import distill
import finetune
import model

ROOT = Path(__file__).resolve().parent.parent
GAME, TARGET = "toy_env:Catch-v1", "toy_env:Catch-v0"
ROWS, SIMULATIONS = 33, 5  # rows of the dataset, in five chunks of frames
TINY = model.ModelConfig(
    channels=4, support=2, head_channels=2, head_hidden=3, lstm_size=4, projector_hidden=5, projector_out=4,
    predictor_hidden=3,
)  # fmt: skip
FUZZ = settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch and numpy say of forged files


# ---- one small file of each type


def some_frames(rng, n=1):
    """Random frames that compress well."""
    return rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8).repeat(24, axis=1).repeat(24, axis=2)


def make_dataset(folder, seed=0):
    replay, rng = finetune.Replay(ROWS, 1, "cpu"), np.random.default_rng(seed)
    for age in range(ROWS):
        finetune.add_frames(replay, some_frames(rng), age)
    replay.acted[: ROWS - 1], replay.end[10] = True, finetune.LIFE_LOST
    replay.action[:], replay.reward[:] = rng.integers(0, 18, ROWS), rng.integers(-1, 2, ROWS)
    settings = {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0, "num_envs": 1}
    meta = {"env_id": GAME, "seed": seed, "policy": "runs/x/model.pt", "settings": settings, "rom_md5": None}
    finetune.save_dataset(folder, replay, meta | {"versions": {"torch": "2"}})


def make_model(folder, seed=0, **args):
    os.mkdir(folder)
    torch.manual_seed(seed)
    counters = {"updates": 1, "scores": {GAME: 1.5}}
    model.save_model(f"{folder}/model.pt", model.EfficientZeroNet(TINY), args, [GAME], counters)


def make_teacher(folder, seed=0):
    make_model(folder, seed, datasets=["../data"])
    rng = np.random.default_rng(seed)
    visits = rng.multinomial(SIMULATIONS, np.full(18, 1 / 18), ROWS).astype(np.uint16)
    np.savez(f"{folder}/targets.npz", visits=visits, value=rng.normal(size=ROWS).astype(np.float32))
    fields = {"dataset": "../data", "rows": ROWS, "num_simulations": SIMULATIONS}
    files = ["model.pt", "targets.npz", "../data/meta.json"]
    model.write_manifest(f"{folder}/targets.json", "xtra-targets-1", fields, files)


def run_args(**changes):
    """A run of finetune.py that learns from one teacher."""
    flags = {"env_id": TARGET, "run_dir": "run", "resume": True, "pretrained": "student", "teachers": ("teacher",)}
    flags |= {"seed": 3, "num_envs": 2, "total_timesteps": 40, "batch_size": 4, "offline_batch_size": 4, "cuda": False}
    return finetune.Args(**flags | changes)


def main_of_finetune():
    """Two pieces of finetune.py's main: from where it reads a checkpoint to where it starts to train, and the
    statements of its loop that write one."""
    main = ast.parse((ROOT / "finetune.py").read_text()).body[-1].body
    texts = [ast.unparse(node) for node in main]
    first = next(i for i, text in enumerate(texts) if text.startswith("checkpoint = "))
    last = next(i for i, text in enumerate(texts) if text.startswith("bar = "))
    blocks = [node.body for node in ast.walk(ast.Module(main, [])) if isinstance(node, ast.If)]
    (saving,) = [block for block in blocks if any("model.save_checkpoint" in ast.unparse(line) for line in block)]
    return [compile(ast.Module(nodes, []), "finetune.py", "exec") for nodes in (main[first:last], saving)]


SETUP, SAVE = main_of_finetune()
EVENTS = "run/events.out.tfevents.1"


def until_training_starts(args):
    """The variables of finetune.py's main when it starts to train."""
    space = vars(finetune) | {"args": args, "device": torch.device("cpu"), "interrupted": []}
    space |= {"rank": 0, "W": 1, "record": False}
    try:
        exec(SETUP, space)
    finally:
        for name in ("envs", "lock"):
            if name in space:
                space[name].close()
    return space


def make_checkpoint(args):
    """What finetune.py writes after a few steps and one update, in run/checkpoint.pt of this folder."""
    space = until_training_starts(args)
    envs = finetune.make_envs(args.env_id, args.num_envs, life_loss_ends=True)
    Path(EVENTS).write_bytes(bytes(10))
    rng, replay = space["rng"], finetune.Replay(50, args.num_envs, "cpu")
    games = finetune.start_games(envs, replay, 1000 * args.seed)
    for step in range(6):
        finetune.play(envs, replay, games, rng.integers(0, 18, 2), 2 * step, args.total_timesteps, has_lives=False)
    for memory in (replay, space["tasks"][0].replay):
        rows = np.flatnonzero(memory.acted)[:4]
        memory.policy_version[rows], memory.value_version[rows] = 1, 1
        memory.policy[rows], memory.value[rows] = rng.dirichlet(np.ones(18), len(rows)), rng.normal(size=len(rows))
        memory.priority[rows] = rng.random(len(rows)) + 0.1
    for parameter in space["net"].parameters():
        parameter.grad = torch.randn_like(parameter)
    space["optimizer"].param_groups[0]["lr"] = 0.1
    space["optimizer"].step()
    space |= {"replay": replay, "games": games, "replays": [replay, *[task.replay for task in space["tasks"]]]}
    log = SimpleNamespace(flush=lambda keep_going: True)
    exec(SAVE, space | {"updates": 1, "stop": True, "writer": log})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset, its teacher, a student of it, and the checkpoint of a run that learns from both."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_dataset("data")
        make_teacher("teacher")
        make_model("student", 1, teachers=["../teacher"])
        make_checkpoint(run_args())
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of them as the working folder, to be damaged."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="module")
def intact(made):
    """What each loader says of the intact files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return {name: load() for name, load in LOADERS.items()}


# ---- loading them as the scripts do


def plain(value):
    """The same in plain Python: what is equal is equal bit by bit."""
    if isinstance(value, torch.Tensor):
        return ["tensor", str(value.dtype), *value.shape, hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), *value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return [type(value).__name__, repr(value)]


def rows_of(replay):
    """The content of a replay; rows that are not filled yet hold anything."""
    plain_values = ("size", "num_envs", "device")
    return {name: x if name in plain_values else x[: replay.size] for name, x in vars(replay).items()}


def load_data():
    replay, meta = distill.load_dataset("data", "cpu")
    return plain([rows_of(replay), meta["env_id"], meta["rows"]])


def load_teacher():
    task = distill.load_task("teacher", "cpu")
    return plain([task.env_id, task.score, rows_of(task.replay)])


def load_student():
    flags = {"channels": None, "blocks": None, "transfer": "hgf", "cross_task": True, "total_timesteps": 40}
    net, teachers = finetune.load_networks(SimpleNamespace(pretrained="student", teachers=(), **flags), "cpu")
    metas = [finetune.targets_meta(folder) for folder in teachers]  # as main does next
    return plain([net.state_dict(), vars(net.config), list(teachers), metas])


def resume(args=None):
    """`finetune.py --resume` up to where the training starts."""
    Path(EVENTS).write_bytes(bytes(15))  # written to since the checkpoint
    space = until_training_starts(args or run_args())
    parts = [space[name].state_dict() for name in ("net", "self_play_net", "target_net", "next_target_net")]
    momentum = space["optimizer"].state_dict()
    momentum["param_groups"] = [x | {"lr": None} for x in momentum["param_groups"]]  # set anew before each step
    generators = space["rng"].bit_generator.state, space["generator"].get_state()
    names = ("updates", "evaluated", "evaluations", "measured", "eta", "similar", "env_steps")  # any scores are legal
    memories = [rows_of(memory) for memory in (space["replay"], *[task.replay for task in space["tasks"]])]
    games = space["games"].score, space["games"].length, space["games"].over
    return plain([parts, momentum, generators, [space[name] for name in names], memories, games])


LOADERS = {"dataset": load_data, "teacher": load_teacher, "student": load_student, "checkpoint": resume}
FILES = {
    "data/frames": "dataset",
    "data/steps.npz": "dataset",
    "data/meta.json": "dataset",
    "teacher/targets.npz": "teacher",
    "teacher/targets.json": "teacher",
    "teacher/model.pt": "teacher",
    "student/model.pt": "student",
    "run/checkpoint.pt": "checkpoint",
}
TORCH_FILES = [path for path in FILES if path.endswith(".pt")]


def check_line(message):
    assert isinstance(message, str) and message.startswith("error: "), message
    assert message.isprintable(), message  # one line, and no escape sequence for the terminal


def refusal(load, *args):
    """The line that the call is refused with."""
    with pytest.raises(SystemExit) as stop:
        load(*args)
    check_line(stop.value.code)
    return stop.value.code


def refused_or(check):
    """The line that `check` is refused with, or None if it comes to its end. Nothing else escapes."""
    try:
        check()
    except SystemExit as stop:
        check_line(stop.code)
        return stop.code


def refused_or_intact(kind, intact):
    """The property of every forged file: the documented line, or just what the intact files give."""

    def check():
        assert LOADERS[kind]() == intact[kind]

    return refused_or(check)


def test_the_intact_files_load_and_load_alike_twice(work, intact):
    assert {name: load() for name, load in LOADERS.items()} == intact
    assert all(os.path.getsize(path) < 300_000 for path in FILES)


@pytest.fixture
def resume_fast(monkeypatch):
    """Teacher and student are read once only, where nothing but the checkpoint changes."""
    monkeypatch.setattr(model, "load_model", functools.lru_cache(model.load_model))


# ---- damage: the checksums find it


@pytest.mark.parametrize("path", FILES)
def test_a_truncated_or_flipped_file_is_refused(work, intact, path):
    content, rng = Path(path).read_bytes(), np.random.default_rng(0)
    damaged = [content[:length] for length in rng.integers(0, len(content), 50)]
    for position, flip in zip(rng.integers(0, len(content), 200), rng.integers(1, 256, 200), strict=True):
        damaged.append(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
    refused = harmless = 0
    for text in damaged:
        Path(path).write_bytes(text)
        message = refused_or_intact(FILES[path], intact)
        refused, harmless = refused + (message is not None), harmless + (message is None)
        assert message is None or path in message
    print(f"\n{path}: 50 truncations and 200 flips, {refused} refused, {harmless} harmless")
    assert (refused, harmless) == (250, 0)


@pytest.mark.parametrize("path", [path for path in FILES if not path.endswith("checkpoint.pt")])
@pytest.mark.parametrize("how", ["missing", "a folder", "empty", "longer by a byte"])
def test_a_file_that_is_missing_empty_or_longer_is_named(work, path, how):
    content = Path(path).read_bytes()
    os.remove(path)
    if how == "a folder":
        os.mkdir(path)
    elif how != "missing":
        Path(path).write_bytes(b"" if how == "empty" else content + b"\n")
    assert path in refusal(LOADERS[FILES[path]])


def test_a_missing_checkpoint_starts_a_run_anew_only_where_nothing_was_finished(work):
    os.remove("run/checkpoint.pt")
    assert model.load_checkpoint(run_args()) is None
    Path("run/evaluations.csv").touch()
    assert "run holds a run without a checkpoint" in refusal(finetune.check_args, run_args(), vars(run_args()))


def test_a_checkpoint_that_is_no_file_is_named(work):
    os.remove("run/checkpoint.pt")
    os.mkdir("run/checkpoint.pt")
    assert "run/checkpoint.pt" in refusal(resume)


@pytest.mark.parametrize("path", ["data/frames", "data/meta.json", "teacher/model.pt"])
def test_a_file_that_cannot_be_read_is_named(work, monkeypatch, path):
    healthy = open

    def sick_disk(name, *args, **options):
        if str(name).endswith(path):
            raise PermissionError(13, "Permission denied", path)
        return healthy(name, *args, **options)

    monkeypatch.setattr("builtins.open", sick_disk)  # the tests may run as root, whom no permission stops
    assert path in refusal(LOADERS[FILES[path]])


# ---- files of another run


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The files of another seed of the same game, under the same names."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_dataset("data", seed=7)
        make_teacher("teacher", seed=7)
        make_model("student", 1)
        make_checkpoint(run_args())
    return folder


@pytest.mark.parametrize("path", [path for path in FILES if path != "student/model.pt"])  # it stands for itself
def test_a_file_of_another_run_is_refused(work, other, path):
    assert (other / path).read_bytes() != Path(path).read_bytes()
    shutil.copy(other / path, path)
    assert os.path.dirname(path) in refusal(LOADERS[FILES[path]])


def test_a_dataset_of_another_run_is_refused_by_the_teacher(work, other):
    shutil.rmtree("data")
    shutil.copytree(other / "data", "data")
    load_data()
    assert "data/meta.json" in refusal(load_teacher)


@pytest.mark.parametrize("change", [{"seed": 4}, {"num_envs": 3}, {"learning_rate": 0.1}])
def test_a_checkpoint_of_other_flags_is_refused(work, change):
    message = refusal(resume, run_args(**change))
    assert "run/checkpoint.pt" in message and f"--{next(iter(change)).replace('_', '-')}" in message


def test_a_checkpoint_of_other_teachers_is_refused(work):
    assert "run/checkpoint.pt" in refusal(resume, run_args(teachers=(), cross_task=False))


# ---- forging: every checksum is put right after the change


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def forge_manifest(path, change=None):
    """Lets `change` edit a manifest or return another one; then its digests, where they are of files, and its checksum
    are put right."""
    manifest = json.loads(Path(path).read_bytes())
    del manifest["checksum"]
    manifest = change(manifest) or manifest if change else manifest
    for name in manifest["sha256"] if isinstance(manifest.get("sha256"), dict) else ():
        with contextlib.suppress(OSError, ValueError):
            manifest["sha256"][name] = sha256((Path(path).parent / name).read_bytes())
    manifest["checksum"] = sha256(json.dumps(manifest).encode())
    Path(path).write_text(json.dumps(manifest, indent=1))


def forge(path, data):
    """Writes a file and puts right what says that it is genuine."""
    if path.endswith(".pt"):
        data = seal(data)
    Path(path).write_bytes(data)
    if path.startswith("data/") and path != "data/meta.json":
        forge_manifest("data/meta.json")
    if os.path.dirname(path) in ("data", "teacher") and not path.endswith(".json"):
        forge_manifest("teacher/targets.json")


def seal(data):
    """A torch file with its zip comment put right, or other bytes with the digest after them."""
    data = data[:-2] + (64).to_bytes(2, "little")
    return data + sha256(data).encode()


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def forge_torch(path, change):
    """Lets `change` edit the dict of a torch file or return another one."""
    content = torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)
    changed = change(content)
    forge(path, torch_bytes(content if changed is None else changed))


def zip_bytes(entries):
    """A zip as numpy and torch write it, with what is large deflated, which they do not."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if len(content) > 10**6 else zipfile.ZIP_STORED)
    return file.getvalue()


def unzipped(path):
    with zipfile.ZipFile(io.BytesIO(Path(path).read_bytes())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def forge_npz(path, **arrays):
    """Replaces or, with None, drops arrays, whatever they are."""
    with np.load(path) as file:
        arrays = {name: x for name, x in (dict(file) | arrays).items() if x is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    forge(path, buffer.getvalue())


def test_forged_files_without_a_change_are_as_good_as_the_intact_ones(work, intact):
    for path in ("student/model.pt", "run/checkpoint.pt"):
        forge_torch(path, lambda content: None)
        forge(path, zip_bytes(unzipped(path)))
    assert load_student() == intact["student"] and resume() == intact["checkpoint"]
    for path in ("data/steps.npz", "teacher/targets.npz"):
        forge_npz(path)
        forge(path, zip_bytes(unzipped(path)))
    forge_manifest("data/meta.json")
    forge_manifest("teacher/targets.json")
    assert load_data() == intact["dataset"] and load_teacher() == intact["teacher"]


@pytest.mark.parametrize("path", [path for path in FILES if path.endswith((".pt", ".json"))])
@pytest.mark.parametrize("found", [9, "", "a\nb\x1b[2J", None, []])
def test_another_format_is_named(work, path, found):
    kept = {}

    def newer(content):
        kept["format"] = content["format"]
        content["format"] = content["format"][:-1] + "9" if found == 9 else found

    (forge_torch if path.endswith(".pt") else forge_manifest)(path, newer)
    message = refusal(LOADERS[FILES[path]])
    assert path in message and kept["format"] in message
    assert found != 9 or kept["format"][:-1] + "9" in message


@pytest.mark.parametrize("path", TORCH_FILES)
def test_a_format_that_is_a_tensor_is_refused(work, path):
    forge_torch(path, lambda content: content.update(format=torch.zeros(20, 2)))
    assert path in refusal(LOADERS[FILES[path]])


# ---- nothing is unpickled


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """The folder that a bomb makes when it goes off."""
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    pickle.loads(pickle.dumps(Bomb()))
    os.rmdir(tmp_path / "bomb")  # so it works
    return tmp_path / "bomb"


def object_array():
    array = np.empty(ROWS, object)
    array[:] = [Bomb() for _ in range(ROWS)]
    return array


def torch_bomb(path):
    """A torch file whose data.pkl is a bomb, all else intact."""
    names = unzipped(path)
    (name,) = [name for name in names if name.endswith("/data.pkl")]
    return zip_bytes(names | {name: pickle.dumps({"format": "xtra-model-2", "model": Bomb()}, 2)})


def legacy_bytes(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("forged", [False, True])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(work, bomb, path, forged):
    for protocol in range(6):
        data = pickle.dumps(Bomb(), protocol)
        forge(path, data) if forged and not path.endswith(".json") else Path(path).write_bytes(data)
        assert os.path.dirname(path) in refusal(LOADERS[FILES[path]])
    assert not bomb.exists()


@pytest.mark.parametrize(
    "path, name",
    [("data/steps.npz", "action"), ("data/steps.npz", "more"), ("teacher/targets.npz", "value")],
)
def test_an_array_of_objects_is_refused_and_not_run(work, intact, bomb, path, name):
    forge_npz(path, **{name: object_array()})
    message = refused_or_intact(FILES[path], intact)
    assert name == "more" or path in message  # an array that nobody asks for is not even looked at
    assert not bomb.exists()


@pytest.mark.parametrize("path", TORCH_FILES)
@pytest.mark.parametrize(
    "craft",
    [
        torch_bomb,
        lambda path: torch_bytes({"format": "xtra-model-2", "model": Bomb()}),
        lambda path: torch_bytes(Bomb()),
        lambda path: legacy_bytes({"format": "xtra-model-2", "model": Bomb()}),
        lambda path: legacy_bytes({"format": "xtra-model-2"}) + b"\0\0",
    ],
    ids=["data.pkl", "a value", "the whole", "legacy", "legacy without a bomb"],
)
def test_a_pickle_in_a_torch_file_is_refused_and_not_run(work, bomb, path, craft):
    forge(path, craft(path))
    assert path in refusal(LOADERS[FILES[path]])
    assert not bomb.exists()


# ---- json


JUNK = [None, "text", -1, [], {}, True, 0.5, math.nan, math.inf, 10**12, 10**30, "a\nb", "\ud800", "\0"]
MANIFESTS = {
    "data/meta.json": "format rows env_steps env_id settings sha256 seed policy rom_md5 versions",
    "teacher/targets.json": "format rows num_simulations dataset sha256",
}


@pytest.mark.parametrize("path, name", [(path, name) for path, names in MANIFESTS.items() for name in names.split()])
def test_a_manifest_with_a_field_of_another_type_is_refused_or_does_not_matter(work, intact, path, name):
    content = Path(path).read_bytes()
    assert sorted(json.loads(content)) == sorted([*MANIFESTS[path].split(), "checksum"])
    for value in JUNK:
        Path(path).write_bytes(content)
        forge_manifest(path, lambda manifest, value=value: manifest.update({name: value}))
        if name == "env_id" and isinstance(value, str):
            refused_or(load_data)  # another game's data: legal, if not ours
        else:
            message = refused_or_intact(FILES[path], intact)
            assert message is None or os.path.dirname(path) in message, value
    Path(path).write_bytes(content)
    forge_manifest(path, lambda manifest: manifest.pop(name) and None)
    free = name in ("seed", "policy", "rom_md5", "versions")  # for people
    assert free or os.path.dirname(path) in refusal(LOADERS[FILES[path]])


@pytest.mark.parametrize("value", [None, "text", -1, [], {}, 0.5, math.nan, 10**30])
@pytest.mark.parametrize("name", ["frame", "frameskip", "sticky_actions", "more"])
def test_a_dataset_of_other_settings_is_refused(work, name, value):
    forge_manifest("data/meta.json", lambda manifest: manifest["settings"].update({name: value}))
    assert "data" in refusal(load_data)


def with_checksum(text):
    """The manifest's text with a checksum that is right for what json reads from it."""
    manifest = json.loads(text)
    del manifest["checksum"]
    return re.sub(r'("checksum": )"\w+"', rf'\1"{sha256(json.dumps(manifest).encode())}"', text)


@pytest.mark.parametrize("path", MANIFESTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"rows":', '"rows": 1,\n "rows":'),
        lambda text: text.replace(": 33", ": 33.0"),
        lambda text: text.replace(": 33", ": 3.3e1"),
        lambda text: text.replace(": 33", ": 1e999"),
        lambda text: text.replace(": 33", ": NaN"),
        lambda text: text.replace('"rows"', '"\\u0072ows"'),
        lambda text: text.replace(" ", "  "),
        lambda text: text + " ",
        lambda text: "\n" + text,
        lambda text: text + " " * 2_000_000,
    ],
)
def test_json_that_we_would_have_written_differently_is_refused(work, path, change):
    forged = change(Path(path).read_text())
    assert forged != Path(path).read_text()
    Path(path).write_text(with_checksum(forged))
    assert path in refusal(LOADERS[FILES[path]])


@pytest.mark.parametrize("path", MANIFESTS)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "[" * 200_000 + "]" * 200_000,
        '{"checksum":' * 100_000 + "1" + "}" * 100_000,
        '{"rows": ' + "9" * 5000 + "}",
        "1" * 900_000,
        "NaN",
        "[]",
        '[{"checksum": 1, "format": 1, "sha256": {}}]',
        '{"checksum": "", "format": "", "sha256": ""}',
        '"',
        "\x00" * 100,
        "\ufeff{}",
    ],
)
def test_json_that_is_no_manifest_is_refused(work, path, text):
    Path(path).write_text(text)
    assert path in refusal(LOADERS[FILES[path]])


@pytest.mark.parametrize("path", MANIFESTS)
@pytest.mark.parametrize("depth", [10, 100, 300, 500, 900, 990])
def test_a_deep_manifest_is_refused_or_does_not_matter(work, intact, path, depth):
    value = []
    for _ in range(depth):
        value = [value]
    try:
        forge_manifest(path, lambda manifest: manifest.update(more=value))
    except RecursionError:
        return  # nobody can write it
    message = refused_or_intact(FILES[path], intact)
    assert message is None or path in message


@pytest.mark.parametrize("path", MANIFESTS)
def test_a_manifest_that_leaves_out_a_file_is_refused(work, path):
    content = Path(path).read_bytes()
    for name in json.loads(content)["sha256"]:
        Path(path).write_bytes(content)
        forge_manifest(path, lambda manifest, name=name: manifest["sha256"].pop(name) and None)
        file = os.path.normpath(os.path.join(os.path.dirname(path), name))
        os.rename(file, "away")
        assert os.path.dirname(path) in refusal(LOADERS[FILES[path]]), f"{file} is missing"
        Path(file).write_bytes(Path("away").read_bytes()[:-1])
        assert os.path.dirname(path) in refusal(LOADERS[FILES[path]]), f"{file} is damaged"
        os.rename("away", file)


@pytest.mark.parametrize("path", MANIFESTS)
@pytest.mark.parametrize("name", ["/proc/self/mem", "a\nb\x1b[2J", "\0", ".", ""])
def test_a_manifest_that_names_a_strange_file_is_refused(work, path, name):
    forge_manifest(path, lambda manifest: manifest["sha256"].update({name: "0" * 64}))
    assert path in refusal(LOADERS[FILES[path]])


# ---- values out of range


@pytest.mark.parametrize(
    "arrays",
    [
        {"action": np.full(ROWS, 18, np.uint8)},
        {"reward": np.full(ROWS, np.nan, np.float32)},
        {"reward": np.full(ROWS, np.inf, np.float32)},
        {"chunk_offsets": np.arange(6)[::-1].copy()},
        {"chunk_offsets": np.zeros(6, np.int64)},
        {"chunk_offsets": np.array([0, 2**61, 2**62, -(2**62), -(2**61), 2], np.int64)},
        {"action": np.zeros(ROWS, np.int64)},
        {"action": np.zeros((ROWS, 1), np.uint8)},
        {"action": np.zeros(ROWS - 1, np.uint8)},
        {"reward": np.zeros(ROWS, ">f4")},
        {"acted": np.ones(ROWS, np.uint8)},
        {"acted": None},
    ],
)
def test_steps_out_of_range_are_refused(work, arrays):
    forge_npz("data/steps.npz", **arrays)
    assert "data/steps.npz" in refusal(load_data)


def test_offsets_that_overflow_are_refused(work):
    size = os.path.getsize("data/frames")  # five sizes above 0 whose sum is that of the file, modulo 2^64
    offsets = np.cumsum([0, *4 * [2**62], size], dtype=np.uint64).astype(np.int64)
    assert (np.diff(offsets) > 0).all() and np.diff(offsets).sum() == size
    forge_npz("data/steps.npz", chunk_offsets=offsets)
    assert "data" in refusal(load_data)


@pytest.mark.parametrize(
    "arrays",
    [
        {"visits": np.zeros((ROWS, 18), np.uint16)},
        {"visits": np.full((ROWS, 18), 65535, np.uint16)},
        {"visits": np.zeros((ROWS, 18), np.int64)},
        {"visits": np.zeros((18, ROWS), np.uint16)},
        {"value": np.full(ROWS, np.nan, np.float32)},
        {"value": np.zeros(ROWS + 1, np.float32)},
        {"value": None},
    ],
)
def test_targets_out_of_range_are_refused(work, arrays):
    forge_npz("teacher/targets.npz", **arrays)
    assert "teacher" in refusal(load_teacher)


def npy(header, body=b""):
    header = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (33,), }"


@pytest.mark.parametrize(
    "header",
    [
        *[
            "{'descr': (",
            "'''",
            "  1\n 2",
            "[" * 190,
            "(" * 5000,
            "-" * 9000 + "1",
            "1" * 9000,
            "{[]: 1}",
            "{1: 1}",
            "",
        ],
        *[HEADER.replace("'|u1'", x) for x in ("'O'", "[()]", "('|u1',)", "'i8,,'", "'|V2147483647'", "None", "{}")],
        *[HEADER.replace("33", x) for x in ("33.0", "-1", "9" * 5000, "3, 11", "33L", "'33'", "10**9", "None")],
        *[HEADER.replace("False", x) for x in ("0", "None", "True", "[]")],
        HEADER.replace("'|u1'", "'" + "(" * 500 + "'"),
        HEADER + " " * 20_000,
    ],
)
def test_a_strange_header_of_an_array_is_refused(work, intact, header):
    names = unzipped("data/steps.npz")
    forge("data/steps.npz", zip_bytes(names | {"action.npy": npy(header, names["action.npy"][-ROWS:])}))
    message = refused_or_intact("dataset", intact)
    assert message is None or "data/steps.npz" in message


def test_flags_that_are_neither_0_nor_1_are_refused_or_read_as_1(work):
    names = unzipped("data/steps.npz")
    forge("data/steps.npz", zip_bytes(names | {"acted.npy": names["acted.npy"][:-ROWS] + b"\xff" * ROWS}))

    def check():
        replay = distill.load_dataset("data", "cpu")[0]
        assert (replay.priority == 1).all() and np.count_nonzero(replay.acted) == replay.acted.sum() == ROWS

    refused_or(check)


def test_a_checkpoint_with_less_than_no_updates_is_refused(work):
    forge_torch("run/checkpoint.pt", lambda content: content["values"].update(updates=-1))
    assert "run/checkpoint.pt" in refusal(resume)


@pytest.mark.parametrize("length", [0, 5, 7, 200])
def test_a_checkpoint_with_another_action_log_is_refused(work, resume_fast, length):
    def change(content):
        content["values"]["actions"] = torch.zeros(length, 2, dtype=torch.uint8)

    forge_torch("run/checkpoint.pt", change)
    assert "checkpoint" in refusal(resume)


RNG = [{"has_uint32": 10**30}, {"state": {"state": -1, "inc": 1}}, {"state": {"state": 2**200, "inc": 1}}]


@pytest.mark.parametrize("change", [*RNG, {"bit_generator": "MT19937"}, "null", "[" * 100_000])
def test_a_checkpoint_with_a_strange_generator_is_refused(work, resume_fast, change):
    def replace(content):
        state = json.loads(content["states"]["rng"])
        content["states"]["rng"] = change if isinstance(change, str) else json.dumps(state | change)

    forge_torch("run/checkpoint.pt", replace)
    assert "run/checkpoint.pt" in refusal(resume)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_checkpoint_of_fewer_or_more_replays_is_refused(work, resume_fast, length):
    forge_torch("run/checkpoint.pt", lambda content: content.update(replays=(content["replays"] * 2)[:length]))
    assert "run/checkpoint.pt" in refusal(resume)


# ---- memory: a forged size is refused before it is allocated


def huge_header():
    """Arrays that claim 10^12 rows, as does meta.json."""
    rows = 10**12
    arrays = {"chunk_offsets": ("<i8", rows // 8 + 1), "action": ("|u1", rows), "reward": ("<f4", rows)}
    arrays |= dict.fromkeys(("acted", "life_lost", "terminated", "truncated"), ("|b1", rows))
    headers = {name: HEADER.replace("|u1", kind).replace("33", str(n)) for name, (kind, n) in arrays.items()}
    forge("data/steps.npz", zip_bytes({f"{name}.npy": npy(header, bytes(96)) for name, header in headers.items()}))
    forge_manifest("data/meta.json", lambda manifest: manifest.update(rows=rows))


def huge_entry():
    """The same, and the zip's directory claims entries of 4 GB."""
    huge_header()
    data = bytearray(Path("data/steps.npz").read_bytes())
    for match in re.finditer(b"PK\x01\x02", data):
        struct.pack_into("<LL", data, match.start() + 20, 2**32 - 2, 2**32 - 2)  # below the mark of a zip64 size
    Path("data/steps.npz").write_bytes(data)
    forge_manifest("data/meta.json")


def deflated_arrays():
    names = unzipped("data/steps.npz")
    rows = 100_000_000
    header = npy(HEADER.replace("33", str(rows)))
    forge("data/steps.npz", zip_bytes(names | {"action.npy": header + bytes(rows)}))


def huge_rows():
    forge_manifest("data/meta.json", lambda manifest: manifest.update(rows=10**12))


def huge_rows_of_targets():
    forge_manifest("teacher/targets.json", lambda manifest: manifest.update(rows=10**12))


def forge_last_chunk(chunk):
    """Replaces the last chunk of frames."""
    with np.load("data/steps.npz") as file:
        offsets = file["chunk_offsets"].copy()
    Path("data/frames").write_bytes(Path("data/frames").read_bytes()[: offsets[-2]] + chunk)
    offsets[-1] = offsets[-2] + len(chunk)
    forge_npz("data/steps.npz", chunk_offsets=offsets)


def zstd_declares_much():
    """The content size of a frame header with a field of 8 bytes: 2^40."""
    chunk = zstandard.ZstdCompressor().compress(bytes(96 * 96 * 3))
    block = chunk[4 + 1 + 2 :]  # after magic, descriptor and a content size of 2 bytes
    forge_last_chunk(chunk[:4] + bytes([0b11100000]) + struct.pack("<Q", 2**40) + block)


def zstd_unpacks_to_much(**options):
    """A chunk of 256 MB, whose header says so, or not."""
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    forge_last_chunk(b"".join(compressor.compress(bytes(2**24)) for _ in range(16)) + compressor.flush())


def zstd_lies():
    """A chunk of 256 MB that claims to be one frame."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    chunk = b"".join(compressor.compress(bytes(2**24)) for _ in range(16)) + compressor.flush()
    forge_last_chunk(chunk[:4] + bytes([0b10000000, chunk[5]]) + struct.pack("<L", 96 * 96 * 3) + chunk[6:])


def zstd_wants_a_window():
    """A frame that needs a window of 2 GB."""
    chunk = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(96 * 96 * 3))
    forge_last_chunk(chunk[:4] + bytes([0b10000000, 21 << 3]) + struct.pack("<L", 96 * 96 * 3) + chunk[6:])


def deflated(path):
    content = torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)
    content |= {"more": torch.zeros(25_000_000)}
    file = io.BytesIO(torch_bytes(content))
    with zipfile.ZipFile(file) as archive:
        return zip_bytes({name: archive.read(name) for name in archive.namelist()})


def deflated_model():
    forge("student/model.pt", deflated("student/model.pt"))


def end_record(data):
    position = data.rindex(b"PK\x05\x06")
    return position, struct.unpack("<4s4H2LH", data[position : position + 22])


def two_directories():
    """A zip whose directory lists one good entry, and whose zip64 locator leads torch to a second one, of a bomb."""
    large = deflated("student/model.pt")
    with zipfile.ZipFile(io.BytesIO(large)) as archive:
        small = zip_bytes({"archive/data.pkl": archive.read("archive/data.pkl")})
    position, record = end_record(large)
    second_position, second = end_record(small)
    count, size, start = record[4:7]
    data = large[:position] + small[: second[6]]
    directory = bytearray(small[second[6] : second_position])
    struct.pack_into("<L", directory, 42, position)  # where its one entry starts now
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(data), 1)
    data += end64
    struct.pack_into("<H", directory, 32, 60 + len(locator))  # its comment: filler, then the locator
    directory += bytes(60) + locator
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), len(data), 0)
    forge("student/model.pt", data + bytes(directory) + end)


class Reduced:
    """Pickles as the call of a function that torch.load allows."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def add_to_model(value):
    forge_torch("student/model.pt", lambda content: content.update(more=value))


def bytes_of_nothing():
    add_to_model(Reduced(bytearray, 2**29))


def tensor_of_nothing():
    add_to_model(Reduced(torch.FloatTensor, 2**29))


def storage_of_nothing():
    """A tensor whose pickle claims 2^15 elements and whose record has 3."""
    content = {"format": "xtra-model-2", "model": torch.zeros(3)}
    pickled, large = torch_bytes(content), torch.zeros(2**10)
    with zipfile.ZipFile(io.BytesIO(torch_bytes(content | {"model": large}))) as archive:
        text = archive.read("archive/data.pkl").replace(struct.pack("<H", 2**10), struct.pack("<H", 2**15))
    with zipfile.ZipFile(io.BytesIO(pickled)) as archive:
        forge(
            "student/model.pt", zip_bytes({n: archive.read(n) for n in archive.namelist()} | {"archive/data.pkl": text})
        )


def weights_of(make, **config):
    """The student with another config, and weights of its shapes from `make`."""

    def change(content):
        content["config"] |= config
        with torch.device("meta"):
            net = model.EfficientZeroNet(model.ModelConfig(**content["config"]))
        content["model"] = {name: make(x) for name, x in net.state_dict().items()}

    forge_torch("student/model.pt", change)


def expanded(x):
    return torch.zeros(1, dtype=x.dtype).expand(x.shape) if x.dim() else torch.zeros((), dtype=x.dtype)


def expanded_weights():
    weights_of(expanded, channels=4000, projector_hidden=8000)


def meta_weights():
    weights_of(lambda x: x, channels=1000, projector_hidden=2000)


def sparse_weights():
    weights_of(lambda x: torch.sparse_coo_tensor(size=x.shape, dtype=x.dtype), channels=1000, projector_hidden=2000)


def config_of(**config):
    forge_torch("student/model.pt", lambda content: content["config"].update(config))


def action_log(actions):
    forge_torch("run/checkpoint.pt", lambda content: content["values"].update(actions=actions))


def expanded_action_log():
    """10^9 steps in the space of one."""
    action_log(torch.zeros(1, 2, dtype=torch.uint8).expand(10**9, 2))


def long_action_log():
    """A thousand times as many steps as the run may have: 40 kB of actions, and more than 1 GB of frames."""
    action_log(torch.zeros(20_000, 2, dtype=torch.uint8))


def wide_replay():
    def change(content):
        content["replays"][0]["fresh"] = torch.zeros(1, dtype=torch.int64).expand(10**8)

    forge_torch("run/checkpoint.pt", change)


HUGE = {
    "an array header of 10^12 rows": (huge_header, "dataset"),
    "a zip entry of 4 GB": (huge_entry, "dataset"),
    "a deflated array": (deflated_arrays, "dataset"),
    "10^12 rows": (huge_rows, "dataset"),
    "10^12 rows of targets": (huge_rows_of_targets, "teacher"),
    "a zstd frame that declares 2^40 bytes": (zstd_declares_much, "dataset"),
    "a zstd frame of 256 MB": (zstd_unpacks_to_much, "dataset"),
    "a zstd frame of 256 MB that claims to be small": (zstd_lies, "dataset"),
    "a zstd frame with a large window": (zstd_wants_a_window, "dataset"),
    "a deflated model": (deflated_model, "student"),
    "a model with two directories": (two_directories, "student"),
    "a bytearray of 512 MB": (bytes_of_nothing, "student"),
    "a tensor of 2 GB without values": (tensor_of_nothing, "student"),
    "a storage larger than its record": (storage_of_nothing, "student"),
    "expanded weights": (expanded_weights, "student"),
    "weights on the meta device": (meta_weights, "student"),
    "sparse weights": (sparse_weights, "student"),
    "60,000 channels": (lambda: config_of(channels=60_000), "student"),
    "10^9 blocks": (lambda: config_of(blocks=10**9), "student"),
    "64 blocks of everything": (lambda: config_of(**dict.fromkeys(vars(TINY), 64)), "student"),
    "widths of 65,536": (lambda: config_of(**dict.fromkeys(vars(TINY), 65_536) | {"blocks": 64}), "student"),
    "10^9 actions": (expanded_action_log, "checkpoint"),
    "20,000 actions of a run of 40 steps": (long_action_log, "checkpoint"),
    "10^8 targets": (wide_replay, "checkpoint"),
}


def load_limited(folder, kind):
    """Loads in a process of its own that may take 1 GB -> [what it ends with, MB that it took at most]."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.chdir(folder)
        signal.alarm(20)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            LOADERS[kind]()
            end = "loaded"
        except BaseException as error:
            end = error.code if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        os.write(writer, json.dumps([str(end)[:2000], taken]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if text else [f"killed by signal {status}", 0]


def load_all_limited():
    """The main function of the interpreter that `ends` starts in the folder of the intact files."""
    for load in LOADERS.values():
        load()  # what they import is no memory of the files
    print(json.dumps({name: load_limited(*case) for name, case in json.loads(sys.argv[1]).items()}))


@pytest.fixture(scope="module")
def ends(made, tmp_path_factory):
    """How the loaders end with each of the huge files, {name: [message, MB]}.

    In a fresh interpreter, whose only thread may fork; it does so for each of them.
    """
    folder, cases = tmp_path_factory.mktemp("huge"), {}
    for i, (name, (craft, kind)) in enumerate(HUGE.items()):
        shutil.copytree(made, folder / str(i))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / str(i))
            craft()
        cases[name] = str(folder / str(i)), kind
    code = "import test_corruption as t; t.load_all_limited()"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, env=env, cwd=made, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", HUGE)
def test_a_size_that_a_forged_file_claims_is_refused_before_it_is_allocated(ends, name):
    message, megabytes = ends[name]
    if name != "a zstd frame with a large window":  # its content is as small as declared, so no window is taken
        check_line(message)
    assert megabytes < 40, message
    assert not re.search("allocat|MemoryError", message), f"it tried, and only the limit stopped it: {message}"


@pytest.mark.parametrize("rows", [10**12, 2**63, 10**30, 10**400])
def test_a_run_on_more_rows_than_there_can_be_is_refused(work, rows):
    forge_manifest("data/meta.json", lambda manifest: manifest.update(rows=rows))

    def plan():  # as pretrain_teacher.py does before it loads
        rows = distill.dataset_meta("data")["rows"]
        sizes = {"rows": rows, "samples": 2, "roots": 2, "num_simulations": 2}
        model.check_memory(torch.device("cpu"), "run", TINY, **sizes)

    refusal(plan)


# ---- fuzzing: random bytes and splices


def splices(content, other):
    """Bytes of the same file moved, doubled or cut out, or with a piece of another one."""
    places = st.integers(0, len(content))
    return st.builds(
        lambda a, b, c, d, source: content[:a] + (content, other)[source][b : b + c] + content[d:],
        places, places, st.integers(0, 2000), places, st.integers(0, 1),
    )  # fmt: skip


def random_files(content, other):
    flips = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=4)

    def flipped(flips):
        damaged = bytearray(content)
        for position, flip in flips:
            damaged[position] ^= flip
        return bytes(damaged)

    return st.one_of(st.binary(max_size=500), splices(content, other), flips.map(flipped))


@pytest.mark.parametrize("path", FILES)
def test_random_bytes_and_splices_are_refused(work, intact, path):
    content, other = Path(path).read_bytes(), Path("student/model.pt").read_bytes()

    @FUZZ
    @given(random_files(content, other))
    @example(b"")
    def check(data):
        Path(path).write_bytes(data)
        message = refused_or_intact(FILES[path], intact)
        assert data == content or path in message

    check()


@pytest.mark.parametrize("path", [path for path in FILES if not path.endswith(".json")])
def test_random_bytes_and_splices_with_the_checksums_put_right_are_refused_or_harmless(work, intact, path):
    content, other = Path(path).read_bytes(), Path("teacher/targets.npz").read_bytes()
    content = content[:-64] if path.endswith(".pt") else content

    @FUZZ
    @given(random_files(content, other))
    @example(b"")
    def check(data):
        forge(path, data)
        if path == "data/frames":  # without a checksum, pixels are pixels
            refused_or(load_data)
        else:
            refused_or_intact(FILES[path], intact)

    check()


# ---- fuzzing: structural changes


def places(value, place=()):
    """The places of everything in a nested dict or list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, x in inner:
        yield (*place, name)
        yield from places(x, (*place, name))


TENSORS = {
    "of no axis": lambda x: x.new_zeros(()),
    "of one element": lambda x: x.flatten()[:1],
    "of two elements": lambda x: torch.cat([x.flatten(), x.new_zeros(2)])[:2],
    "longer": lambda x: torch.cat([x.flatten(), x.new_zeros(1)]),
    "empty": lambda x: x.flatten()[:0],
    "with an axis in front": lambda x: x[None],
    "with an axis behind": lambda x: x[..., None],
    "flat": lambda x: x.flatten(),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "int32": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.cfloat(),
    "conjugated": lambda x: x.cfloat().conj(),
    "with a gradient": lambda x: x.detach().float().requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "sparse": lambda x: x.to_sparse(),
    "on the meta device": lambda x: x.to("meta"),
    "expanded": lambda x: x.new_zeros(1).expand(x.numel() + 2),
    "not a number": lambda x: torch.full_like(x.float(), math.nan),
    "infinite": lambda x: torch.full_like(x, math.inf) if x.is_floating_point() else x.float() / 0,
}
VALUES = [None, True, -1, 2**70, math.nan, 1j, "text", "a\nb", "\ud800", b"x", [], {}, [None], {"a": 1}, {1: 2}, ()]
VALUES += [set(), torch.zeros(()), torch.zeros(3), torch.zeros(0), torch.Size([1]), torch.float32]
CHANGES = ["drop", *[("put", i) for i in range(len(VALUES))], *[("cast", name) for name in TENSORS]]


def change_at(content, place, change):
    """Drops or replaces what is at a place; leaves what the replacement is as good as: another number, another text."""
    *way, last = place
    for name in way:
        content = content[name]
    if change == "drop":
        del content[last]
        return
    how, which = change
    old = content[last]
    tensor = old if isinstance(old, torch.Tensor) else torch.ones(3)
    new = VALUES[which] if how == "put" else TENSORS[which](tensor)
    if type(new) is not type(old) or not isinstance(new, str | int | float | None):
        content[last] = new


WEIGHT, MOMENTUM = ("net", "representation.layers.0.weight"), ("optimizer", "state", 0, "momentum_buffer")


@pytest.mark.parametrize(
    "place, change",
    [
        (("args", "seed"), lambda old: torch.zeros(3)),
        (("args", "seed"), lambda old: "a\nb"),
        (("args", "seed"), lambda old: float(old)),
        (("states", *WEIGHT), TENSORS["int64"]),
        (("states", *WEIGHT), TENSORS["not a number"]),
        (("states", *MOMENTUM), TENSORS["bfloat16"]),
        (("states", *MOMENTUM), TENSORS["not a number"]),
        (("states", "optimizer", "param_groups", 0, "momentum"), lambda old: 0.5),
        (("states", "optimizer", "param_groups", 0, "nesterov"), lambda old: "text"),
        (("replays", 0, "policy"), TENSORS["not a number"]),
        (("replays", 0, "policy"), lambda old: old[0]),
        (("replays", 0, "value"), TENSORS["int64"]),
        (("replays", 0, "fresh"), lambda old: old - 1),
        (("replays", 0, "fresh"), lambda old: old.flip(0)),
        (("replays", 1, "priority"), TENSORS["float16"]),
        (("values", "eta"), TENSORS["not a number"]),
        (("values", "eta"), TENSORS["int64"]),
    ],
)
def test_a_checkpoint_with_one_wrong_value_is_refused(work, resume_fast, place, change):
    def put(content):
        for name in place[:-1]:
            content = content[name]
        content[place[-1]] = change(content[place[-1]])

    forge_torch("run/checkpoint.pt", put)
    assert "run/checkpoint.pt" in refusal(resume)


@pytest.mark.parametrize("teachers", [5, True, "text", [5], [None], ["a\nb"], {"a": 1}, torch.zeros(3), None, []])
def test_a_student_of_strange_teachers_is_refused(work, teachers):
    forge_torch("student/model.pt", lambda content: content["args"].update(teachers=teachers))
    assert "student" in refusal(load_student)


@pytest.mark.parametrize("path", TORCH_FILES)
def test_a_changed_dict_with_the_checksum_put_right_is_refused_or_harmless(work, intact, request, path):
    if path == "run/checkpoint.pt":
        request.getfixturevalue("resume_fast")
    content, groups = torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True), {}
    for place in places(content):  # as many tries for a flag as for all weights together
        groups.setdefault((place[:2] if place[0] != "model" else "model", len(place)), []).append(place)
    somewhere = st.sampled_from(sorted(groups, key=str)).flatmap(lambda group: st.sampled_from(groups[group]))

    @FUZZ
    @given(st.lists(st.tuples(somewhere, st.sampled_from(CHANGES)), min_size=1, max_size=2))
    def check(changes):
        forged = copy.deepcopy(content)
        for place, change in changes:
            no_momentum = (4, "drop"), (3, ("put", VALUES.index({})))
            if place[:3] == ("states", "optimizer", "state") and (len(place), change) in no_momentum:
                return  # cannot be seen: a parameter that had no gradient has none
            try:
                change_at(forged, place, change)
            except (LookupError, TypeError, RuntimeError):
                return  # the first change left no such place, or there is no such tensor
        forge(path, torch_bytes(forged))
        refused_or_intact(FILES[path], intact)

    check()
