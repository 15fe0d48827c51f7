"""A damaged or foreign file never gets beyond its loader: one line says so, or the content is just what it was."""

import hashlib
import os
import pickle
import runpy
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import finetune
import model

ROOT = Path(__file__).resolve().parent.parent
ROWS = 33
TINY = "--channels 2 --blocks 1 --batch-size 2 --unroll-steps 1 --num-simulations 2 --eval-episodes 1 --no-cuda"
LOADERS = {
    "data.npz": finetune.read_dataset,
    "teacher/targets.npz": lambda path: distill.read_teacher(os.path.dirname(path)),
    "teacher/model.pt": model.load_model,
    "teacher/checkpoint.pt": model.load_file,
}


def make_dataset(path, seed=0):
    """Two games of random frames."""
    rng = np.random.default_rng(seed)
    replay = finetune.Replay(ROWS)
    replay.frames[:] = torch.from_numpy(rng.integers(0, 256, (ROWS, 3, 1, 1), dtype=np.uint8))
    replay.action[:] = rng.integers(0, 18, ROWS)
    replay.reward[:] = rng.integers(-1, 2, ROWS)
    replay.acted[:] = ~np.isin(np.arange(ROWS), [11, ROWS - 1])
    replay.end[10] = finetune.GAME_OVER
    finetune.save_dataset(str(path), replay, slice(0, ROWS), "toy_env:Catch-v1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset and its teacher, as the scripts leave them."""
    folder = tmp_path_factory.mktemp("made")
    flags = f"{TINY} --datasets data.npz --run-dir teacher --num-updates 1 --cycle 1 --eval-max-frames 4"
    handler = signal.getsignal(signal.SIGINT)  # a script has its own
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_dataset("data.npz")
        patch.setattr(sys, "argv", ["pretrain_teacher.py", *flags.split()])
        runpy.run_path(str(ROOT / "pretrain_teacher.py"), run_name="__main__")
    signal.signal(signal.SIGINT, handler)
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of them as the working folder, to be damaged."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def plain(x):
    """Content that `==` compares bit by bit."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, torch.nn.Module):
        return plain(x.state_dict())
    x = x.contiguous().numpy() if isinstance(x, torch.Tensor) else x
    return [x.dtype.str, x.shape, hashlib.sha256(x.tobytes()).hexdigest()] if isinstance(x, np.ndarray) else x


def refusal(path):
    """The line that the file's loader refuses it with, or its content."""
    try:
        return plain(LOADERS[path](path))
    except SystemExit as stop:
        assert stop.code.startswith("error: ") and path.split("/")[0] in stop.code and "\n" not in stop.code
        return stop.code


@pytest.mark.filterwarnings("ignore")  # what zipfile says of damaged ones
@pytest.mark.parametrize("path", LOADERS)
def test_no_flipped_bit_and_no_truncation_gives_other_content(work, path):
    intact = refusal(path)
    content, rng = Path(path).read_bytes(), np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        headers = [info.header_offset for info in archive.infolist()]
    anywhere = rng.integers(0, len(content), 150)
    structure = [*rng.integers(directory, len(content), 100), *rng.choice(headers, 50) + rng.integers(0, 30, 50)]
    damaged = [content[:length] for length in rng.integers(0, len(content), 50)]
    for position in [*anywhere, *structure]:
        flipped = bytes([content[position] ^ 1 << rng.integers(8)])
        damaged.append(content[:position] + flipped + content[position + 1 :])
    refused = 0
    for text in damaged:
        Path(path).write_bytes(text)
        found = refusal(path)
        refused += isinstance(found, str)
        assert isinstance(found, str) or found == intact
    print(f"\n{path}: 300 flips and 50 truncations, {refused} refused, {350 - refused} harmless, 0 wrong")
    assert refused > 150


@pytest.mark.parametrize("path", ["teacher/model.pt", "teacher/checkpoint.pt"])
def test_a_tensor_that_torch_would_take_for_a_folder_is_refused(work, path):
    """One bit of the zip's directory, without a checksum: torch leaves such a tensor as the memory happened to be."""
    content = bytearray(Path(path).read_bytes())
    content[content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/1")) + 38] ^= 0x10
    Path(path).write_bytes(content)
    assert isinstance(refusal(path), str)


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("path", LOADERS)
def test_a_file_that_runs_a_command_is_refused_and_runs_nothing(work, path):
    pickle.loads(pickle.dumps(Bomb()))
    os.rmdir("ran")  # so it would work
    if path.endswith(".npz"):
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {next(iter(arrays)): np.array([Bomb()], object)})
    else:
        torch.save(torch.load(path) | {"bomb": Bomb()}, path)
    assert isinstance(refusal(path), str) and not os.path.exists("ran")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("action", lambda x: x[:-1], "not one entry per frame"),
        ("reward", lambda x: x[:-1], "not one entry per frame"),
        ("acted", lambda x: x[:-1], "not one entry per frame"),
        ("end", lambda x: x[:-1], "not one entry per frame"),
        ("chunk_ends", lambda x: x[:-1], "chunks are not of 8 frames"),
        ("action", lambda x: x + 18, "actions are not ALE ids"),
        ("reward", lambda x: x + np.inf, "rewards are not finite"),
        ("acted", lambda x: x | True, "a game's last frame is missing"),
        ("frames", lambda x: None, "has no frames"),
    ],
)
def test_a_dataset_that_was_written_wrong_is_refused_with_the_reason(work, name, change, words):
    arrays = dict(np.load("data.npz"))
    arrays[name] = change(arrays[name])
    np.savez("data.npz", **{name: x for name, x in arrays.items() if x is not None})
    assert words in refusal("data.npz")


def test_answers_to_other_data_are_refused(work):
    make_dataset("data.npz", seed=1)
    assert isinstance(refusal("data.npz"), dict) and "has answers to other data" in refusal("teacher/targets.npz")
