"""A damaged or foreign file never gets beyond its loader: one line says so, or the content is just what it was."""

import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from test_resume import plain

import distill
import finetune
import model

ROWS = 33
SMALL = model.ModelConfig(2, support=2, head_channels=2, head_hidden=3, lstm_size=4, projector_hidden=5)
LOADERS = {
    "data.npz": model.read_dataset,
    "targets.npz": lambda path: distill.read_teacher("."),
    "model.pt": lambda path: [x if isinstance(x, dict) else x.state_dict() for x in model.load_model(path)],
    "checkpoint.pt": model.load_file,
}


def make_files(seed):
    """A dataset of two games with random frames, its answers, a network and a checkpoint, in the working folder."""
    rng = np.random.default_rng(seed)
    replay = finetune.Replay(ROWS)
    replay.frames[:] = torch.from_numpy(rng.integers(0, 256, (ROWS, 3, 1, 1), dtype=np.uint8))
    replay.action[:] = rng.integers(0, 18, ROWS)
    replay.acted[:] = ~np.isin(np.arange(ROWS), [11, ROWS - 1])
    replay.end[10] = finetune.GAME_OVER
    finetune.save_dataset("data.npz", replay, slice(0, ROWS), "toy_env:Catch-v1")
    answers = {"policy": rng.random((ROWS, 18)), "value": rng.random(ROWS), "score": 1.5}
    np.savez("targets.npz", **model.read_dataset("data.npz"), **answers)
    net = model.EfficientZeroNet(SMALL)
    model.save_model("model.pt", net, args={"seed": 1}, scores={"toy_env:Catch-v1": 1.5})
    torch.save({"net": net.state_dict(), "rng": rng.bit_generator.state, "updates": 1}, "checkpoint.pt")


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(seed=0)


def load(path):
    """The file's content, or the line that its loader refuses it with."""
    try:
        return plain(LOADERS[path](path))
    except SystemExit as stop:
        assert stop.code.startswith("error: ") and path in stop.code and "\n" not in stop.code
        return stop.code


@pytest.mark.filterwarnings("ignore")  # what zipfile says of damaged ones
@pytest.mark.parametrize("path", LOADERS)
def test_no_flipped_bit_and_no_truncation_gives_other_content(path):
    intact, content, rng = load(path), Path(path).read_bytes(), np.random.default_rng(0)
    directory = zipfile.ZipFile(path).start_dir  # of the zip: no checksum covers it
    damaged = [content[:length] for length in rng.integers(0, len(content), 30)]
    for position in [*rng.integers(0, len(content), 100), *rng.integers(directory, len(content), 100)]:
        flipped = bytes([content[position] ^ 1 << rng.integers(8)])
        damaged.append(content[:position] + flipped + content[position + 1 :])
    refused = 0
    for text in damaged:
        Path(path).write_bytes(text)
        found = load(path)
        refused += isinstance(found, str)
        assert isinstance(found, str) or found == intact
    print(f"\n{path}: 200 flips and 30 truncations, {refused} refused, {230 - refused} harmless, 0 wrong")
    assert refused > 100


@pytest.mark.parametrize("path", ["model.pt", "checkpoint.pt"])
def test_a_tensor_that_torch_takes_for_a_folder_is_refused(path):
    """One bit of the zip's directory says so, and no checksum covers it: torch would leave the tensor uninitialised."""
    content = bytearray(Path(path).read_bytes())
    content[content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/1")) + 38] ^= 0x10
    Path(path).write_bytes(content)
    assert "is damaged" in load(path)


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("path", LOADERS)
def test_a_file_that_runs_a_command_is_refused_and_runs_nothing(path):
    pickle.loads(pickle.dumps(Bomb()))
    os.rmdir("ran")  # so it would work
    if path.endswith(".npz"):
        np.savez(path, **np.load(path), bomb=np.array([Bomb()], object))
    else:
        torch.save(torch.load(path) | {"bomb": Bomb()}, path)
    assert "is damaged, or no file of this project" in load(path) and not os.path.exists("ran")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("action", lambda x: x[:-1], "expected one of iuf (32,)"),
        ("action", lambda x: x[:0], "action is uint8 (0,)"),
        ("action", lambda x: x[0], "action is uint8 (), expected"),
        ("reward", lambda x: x[:-1], "reward is float32 (32,), expected"),
        ("acted", lambda x: x[:, None], "acted is bool (33, 1), expected"),
        ("end", lambda x: x[:-1], "end is uint8 (32,), expected"),
        ("chunk_ends", lambda x: x[:-1], "chunk_ends is int64 (4,), expected one of iu (5,)"),
        ("chunk_ends", lambda x: x.astype(float), "chunk_ends is float64 (5,), expected"),
        ("env_id", lambda x: np.bytes_(b"toy_env:Catch-v1"), "env_id is |S16 (), expected one of U ()"),
        ("action", lambda x: x + 18, "actions are not ALE ids"),
        ("reward", lambda x: x + np.inf, "rewards are not finite"),
        ("action", lambda x: x.astype(int) - 1 - x, "actions are not ALE ids"),
        ("action", lambda x: x.astype(float), "action is float64 (33,), expected one of iu (33,)"),
        ("reward", lambda x: x.astype("U4"), "reward is <U4 (33,), expected one of iuf (33,)"),
        ("reward", lambda x: x.astype(float) + 1e39, "rewards are not finite"),  # as float32, which the replay has
        ("acted", lambda x: x | True, "last frame is missing"),
        ("acted", lambda x: x.astype(np.uint8), "acted is uint8 (33,), expected one of b (33,)"),
        ("end", lambda x: x > 0, "end is bool (33,), expected one of iu (33,)"),  # True would be a lost life
        ("end", lambda x: x.astype(int) - 1, "an end is not 0 to 3"),
        ("end", lambda x: np.roll(x, 1), "an end is not 0 to 3, or not at the action that ended it"),
        ("frames", None, "has no frames"),
    ],
)
def test_a_dataset_that_was_written_wrong_is_refused_with_the_reason(name, change, words):
    arrays = dict(np.load("data.npz"))
    array = arrays.pop(name)
    np.savez("data.npz", **arrays, **({name: change(array)} if change else {}))
    assert words in load("data.npz")


@pytest.mark.parametrize("change", [zlib.compress, lambda frames: zstandard.compress(frames[: len(frames) // 8])])
def test_frames_that_were_packed_otherwise_are_refused(change):
    data = model.read_dataset("data.npz")
    chunks = [change(bytes(8 * 96 * 96 * 3)) for _ in data["chunk_ends"]]
    data["frames"] = np.frombuffer(b"".join(chunks), np.uint8)
    data["chunk_ends"] = np.cumsum([len(chunk) for chunk in chunks])
    with pytest.raises(SystemExit, match="the frames of the dataset of toy_env:Catch-v1 are not zstd chunks of 8"):
        finetune.unpack_dataset(finetune.Replay(ROWS), slice(0, ROWS), data)


def test_the_checksum_is_of_data_and_answers():
    checksums = set()
    for name in ("action", "reward", "frames", "policy", "value"):
        make_files(seed=0)
        arrays = dict(np.load("targets.npz"))
        arrays[name][0] = 0 if arrays[name][0].any() else 1
        np.savez("targets.npz", **arrays)
        checksums.add(distill.read_teacher(".")["checksum"])
    make_files(seed=0)
    assert len(checksums | {distill.read_teacher(".")["checksum"]}) == 6


def test_a_dataset_in_the_place_of_answers_is_refused():
    shutil.copy("data.npz", "targets.npz")
    assert "targets.npz" in load("targets.npz")
