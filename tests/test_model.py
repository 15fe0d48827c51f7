"""Networks, value transform, augmentation and files, each against numbers written out or a slow version of itself."""

import fcntl
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import model
from model import (
    EfficientZeroNet,
    Log,
    ModelConfig,
    check_finite,
    check_memory,
    event_sizes,
    free_memory,
    inference_copy,
    inverse_scalar_transform,
    load_manifest,
    load_model,
    load_torch,
    lock_folder,
    random_intensity,
    random_shift,
    rewind_events,
    save_model,
    save_torch,
    scalar_to_support,
    scalar_transform,
    scale_gradient,
    stop_if_not_finite,
    support_to_scalar,
    write_file,
    write_manifest,
)

ROOT = Path(__file__).resolve().parent.parent

TINY = ModelConfig(
    channels=8, head_channels=4, head_hidden=8, lstm_size=12, projector_hidden=20, projector_out=16, predictor_hidden=10
)


def tiny_net(seed=0):
    """A small network whose zero-initialised layers and batch norms are filled, so that every output says something."""
    torch.manual_seed(seed)
    net = EfficientZeroNet(TINY)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2, generator=generator)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
            nn.init.normal_(module.running_mean, 0, 0.3, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2, generator=generator)
    return net


def some_obs(batch_size=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch_size, 12, 96, 96), dtype=np.uint8))


# ---- value transform and support

# sqrt(2) - 1 + 0.001, sqrt(6) - 1 + 0.005, sqrt(21) - 1 + 0.02, sqrt(101) - 1 + 0.1, and 0
TRANSFORMED = {1.0: 0.415214, 5.0: 1.454490, 20.0: 3.602576, 100.0: 9.149876, 0.0: 0.0}


@pytest.mark.parametrize("x", TRANSFORMED)
def test_scalar_transform_is_odd_and_has_the_published_values(x):
    assert scalar_transform(torch.tensor(x)).item() == pytest.approx(TRANSFORMED[x], abs=1e-6)
    assert scalar_transform(torch.tensor(-x)).item() == pytest.approx(-TRANSFORMED[x], abs=1e-6)


@pytest.mark.parametrize("dtype, limit, tolerance", [(torch.float64, 50_000, 1e-5), (torch.float32, 100, 1e-4)])
def test_the_inverse_undoes_the_transform(dtype, limit, tolerance):
    x = torch.linspace(-limit, limit, 4001, dtype=dtype)
    error = (inverse_scalar_transform(scalar_transform(x)) - x).abs() / x.abs().clamp(min=1)
    assert error.max() < tolerance / 10  # relative, above 1
    small = torch.linspace(-100, 100, 4001, dtype=dtype)
    assert (inverse_scalar_transform(scalar_transform(small)) - small).abs().max() < tolerance


def test_the_inverse_of_the_last_atom():
    # 2 * eps = 0.002: sqrt(1 + 0.004 * 301.001) = 1.4846562, ((0.4846562 / 0.002)^2 - 1) = 58,722
    root = (np.sqrt(1 + 0.004 * 301.001) - 1) / 0.002
    assert inverse_scalar_transform(torch.tensor(300.0)).item() == pytest.approx(root**2 - 1, rel=1e-5)


def test_the_inverse_is_zero_below_a_thousandth():
    # h(0.002) = 0.001 + 0.000002 - ..., about 0.0010015; h(0.0009) = 0.0004508
    y = torch.tensor([0.0004508, -0.0004508, 0.0010015, -0.0010015])
    x = inverse_scalar_transform(y)
    assert (x[:2] == 0).all()
    assert x[2].item() == pytest.approx(0.002, rel=1e-2) and x[3] == -x[2]


def atoms_of(transformed):
    """The non-zero atoms of the two-hot code of a transformed value."""
    probs = scalar_to_support(inverse_scalar_transform(torch.tensor([transformed])), 300)[0]
    assert probs.shape == (601,) and probs.sum().item() == pytest.approx(1)
    return {i: pytest.approx(probs[i].item(), abs=1e-3) for i in torch.nonzero(probs > 1e-3).flatten().tolist()}


@pytest.mark.parametrize(
    "transformed, atoms",
    [
        (2.25, {302: 0.75, 303: 0.25}),  # 300 + 2 and 300 + 3
        (1.0, {301: 1.0}),
        (0.0, {300: 1.0}),
        (-2.25, {297: 0.25, 298: 0.75}),  # floor(-2.25) = -3 gets 1 - 0.75
        (300.0, {600: 1.0}),
        (-300.0, {0: 1.0}),
    ],
)
def test_two_hot_codes(transformed, atoms):
    assert atoms_of(transformed) == atoms


def test_an_integer_keeps_its_whole_mass(monkeypatch):
    monkeypatch.setattr("model.scalar_transform", lambda x: x)  # float32 rounding must not hide the case
    probs = scalar_to_support(torch.tensor([1.0, -4.0, 300.0, 1e6, -1e6]), 300)
    assert probs.argmax(-1).tolist() == [301, 296, 600, 600, 0] and (probs.max(-1).values == 1).all()


@pytest.mark.parametrize("x", [-83.7, -5.0, -1.0, -0.01, 0.0, 0.5, 1.0, 20.0, 83.7])
def test_support_to_scalar_reads_what_scalar_to_support_writes(x):
    logits = scalar_to_support(torch.tensor([[x]]), 300).log()  # log 0 = -inf: softmax gives the code back
    assert support_to_scalar(logits).shape == (1, 1)
    assert support_to_scalar(logits).item() == pytest.approx(x, abs=2e-3, rel=1e-4)


def test_support_to_scalar_is_exactly_zero_for_symmetric_logits():
    assert (support_to_scalar(torch.zeros(4, 601)) == 0).all()
    assert support_to_scalar(torch.zeros(4, 601, dtype=torch.bfloat16)).dtype == torch.float32


# ---- networks


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("blocks, representation", [(1, 318_016), (4, 1_039_552)])
def test_parameter_counts_are_those_of_the_reference(blocks, representation):
    net = EfficientZeroNet(ModelConfig(blocks=blocks))
    assert count(net.representation) == representation
    assert count(net.dynamics) == 2_382_281
    assert count(net.prediction) == 133_611  # 133,017 + 33 * 18 actions
    assert count(net.projector) == 4_465_664
    assert count(net.predictor) == 1_051_136


def test_the_paper_width_is_the_default_config():
    assert ModelConfig.of_width(64, 1) == ModelConfig()
    assert ModelConfig.of_width(64, 4) == ModelConfig(blocks=4)
    narrow = ModelConfig.of_width(16, 2)
    assert (narrow.channels, narrow.blocks, narrow.lstm_size, narrow.projector_hidden) == (16, 2, 128, 256)


@pytest.mark.parametrize("train", [True, False])
def test_shapes_are_alike_in_train_and_eval_mode(train):
    net = tiny_net().train(train)
    latent, policy, value = net.initial_inference(some_obs())
    assert latent.shape == (3, 8, 6, 6) and policy.shape == (3, 18) and value.shape == (3, 601)
    state = net.initial_lstm_state(3, latent)
    assert all(part.shape == (3, 12) and not part.any() for part in state)
    latent, state, prefix, policy, value = net.recurrent_inference(latent, torch.tensor([0, 17, 4]), state)
    assert latent.shape == (3, 8, 6, 6) and (latent >= 0).all()
    assert policy.shape == (3, 18) and value.shape == prefix.shape == (3, 601)
    assert state[0].shape == state[1].shape == (3, 12)
    projection = net.projector(latent)
    assert projection.shape == net.predictor(projection).shape == (3, 16)
    assert {x.dtype for x in (latent, policy, value, prefix, *state, projection)} == {torch.float32}


def test_bytes_and_unit_floats_are_the_same_observation():
    net, obs = tiny_net().eval(), some_obs()
    assert torch.equal(net.representation(obs), net.representation(obs.float() / 255))


def test_a_new_network_has_a_uniform_policy_and_says_zero():
    net = EfficientZeroNet(TINY)
    latent, policy, value = net.initial_inference(some_obs())
    outputs = net.recurrent_inference(latent, torch.tensor([1, 2, 3]), net.initial_lstm_state(3, latent))
    assert (policy.softmax(-1) == policy.softmax(-1)[0, 0]).all()
    assert (outputs[3].softmax(-1) == policy.softmax(-1)[0, 0]).all()
    for logits in (value, outputs[2], outputs[4]):
        assert (support_to_scalar(logits) == 0).all()


def test_the_action_enters_as_one_plane_of_a_over_18():
    net, seen = tiny_net().eval(), []
    net.dynamics.conv[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    latent = torch.rand(3, 8, 6, 6)
    net.dynamics(latent, torch.tensor([0, 9, 17]), net.initial_lstm_state(3, latent))
    assert seen[0].shape == (3, 9, 6, 6) and torch.equal(seen[0][:, :8], latent)
    for plane, expected in zip(seen[0][:, 8], [0, 9 / 18, 17 / 18], strict=True):
        assert (plane == torch.tensor(expected)).all()


def test_the_carried_lstm_state_is_the_raw_one():
    net = tiny_net().eval()
    seen = []
    net.dynamics.lstm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output)))
    latent, action = torch.rand(2, 8, 6, 6), torch.tensor([3, 4])
    latent, state, _ = net.dynamics(latent, action, net.initial_lstm_state(2, latent))
    _, _, prefix = net.dynamics(latent, action, state)
    assert all(torch.equal(x, y) for x, y in zip(state, seen[0][1], strict=True))  # before batch norm
    assert all(torch.equal(x, y) for x, y in zip(state, seen[1][0], strict=True))  # and fed back as it is
    assert torch.equal(prefix, net.dynamics.prefix_head(seen[1][1][0]))
    assert (state[0].abs() < 1).all() and state[0].any()  # an LSTM output, o * tanh(c)


def test_average_pooling_counts_the_padding():
    net = EfficientZeroNet(TINY)
    pools = [module for module in net.modules() if isinstance(module, nn.AvgPool2d)]
    corner = pools[0](torch.ones(1, 1, 4, 4))[0, 0, 0, 0].item()
    assert len(pools) == 2 and corner == pytest.approx(4 / 9)  # 4 of the 9 pixels are inside


# ---- gradient scaling and the copy for inference


def test_scale_gradient_is_the_identity_forward_and_halves_the_gradient():
    x = torch.tensor([0.1, -3.0, 1e6], requires_grad=True)
    y = scale_gradient(x, 0.5)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [0.5, 1.0, 1.5]


def outputs_of(net, obs):
    latent, policy, value = net.initial_inference(obs)
    state = net.initial_lstm_state(len(obs), latent)
    first = net.recurrent_inference(latent, torch.tensor([0, 5, 17]), state)
    second = net.recurrent_inference(first[0], torch.tensor([1, 2, 3]), first[1])
    return [latent, policy, value, first[0], *first[1], *first[2:], second[0], *second[1], *second[2:]]


def test_inference_copy_says_the_same_as_the_network_in_eval_mode():
    net, obs = tiny_net().train(), some_obs()
    fused = inference_copy(net)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    for x, y in zip(outputs_of(net.eval(), obs), outputs_of(fused, obs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        assert not y.requires_grad


def test_inference_copy_has_no_batch_norm_over_images_left():
    fused = inference_copy(tiny_net())
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(
        module.training for module in fused.modules() if isinstance(module, nn.BatchNorm1d | EfficientZeroNet)
    )


def test_inference_copy_has_what_a_search_needs_and_no_more():
    net = tiny_net()
    fused = inference_copy(net)
    assert fused.projector is None and fused.predictor is None
    assert {name.split(".")[0] for name in fused.state_dict()} == {"representation", "dynamics", "prediction"}
    assert net.projector is not None and net.predictor is not None
    # a checkpoint gives a copy its state back through another copy of the same network
    other = inference_copy(tiny_net(1))
    other.load_state_dict(fused.state_dict())
    obs = some_obs()
    for x, y in zip(outputs_of(fused, obs), outputs_of(other, obs), strict=True):
        assert torch.equal(x, y)


def test_inference_copy_does_not_follow_the_original():
    net, obs = tiny_net(), some_obs()
    fused = inference_copy(net)
    before = [x.clone() for x in outputs_of(fused, obs)]
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(x, y) for x, y in zip(before, outputs_of(fused, obs), strict=True))


# ---- augmentation


def pad_and_crop(image, dy, dx):
    """[C, H, W], padded by 4 pixels by replication and cropped at (dy, dx)."""
    C, H, W = image.shape
    return np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="edge")[:, dy : dy + H, dx : dx + W]


def offset_of(image, shifted):
    """The one (dy, dx) for which all channels agree."""
    places = [(dy, dx) for dy in range(9) for dx in range(9)]
    found = [place for place in places if np.array_equal(pad_and_crop(image, *place), shifted)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_shift_pads_by_replication_and_crops_all_channels_of_a_sample_alike(dtype):
    obs = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 5, 14, 11))).to(dtype)
    shifted = random_shift(obs, torch.Generator().manual_seed(0))
    assert shifted.dtype == dtype and shifted.shape == obs.shape
    offsets = {offset_of(x.numpy(), y.numpy()) for x, y in zip(obs, shifted, strict=True)}
    assert len(offsets) > 4  # each sample has its own


def test_random_shift_reaches_all_81_offsets_evenly():
    image = np.random.default_rng(0).integers(0, 256, (1, 12, 12))
    shifted = random_shift(torch.from_numpy(image).repeat(4050, 1, 1, 1), torch.Generator().manual_seed(0)).numpy()
    crops = {pad_and_crop(image, dy, dx).tobytes(): (dy, dx) for dy in range(9) for dx in range(9)}
    offsets = [crops[crop.tobytes()] for crop in shifted]
    counts = np.unique(offsets, axis=0, return_counts=True)[1]
    # 4,050 draws over 81 offsets: 50 each, standard deviation 7
    assert len(counts) == 81 and counts.min() > 50 - 5 * 7 and counts.max() < 50 + 5 * 7


def test_random_intensity_has_one_factor_per_sample_within_a_tenth():
    obs = torch.rand(500, 2, 3, 4) + 0.1
    factor = random_intensity(obs.clone(), torch.Generator().manual_seed(0)) / obs
    assert (factor - factor[:, :1, :1, :1]).abs().max() < 1e-6
    factor = factor[:, 0, 0, 0]
    # 1 + 0.05 n, cut at 2 standard deviations: 0.9 and 1.1 are reached (5 % of the draws), nothing is beyond
    assert factor.min().item() == pytest.approx(0.9, abs=1e-6) and factor.max().item() == pytest.approx(1.1, abs=1e-6)
    assert factor.mean().item() == pytest.approx(1, abs=0.01) and factor.std().item() == pytest.approx(0.048, abs=0.006)


def test_random_intensity_is_not_clamped_to_1():
    brightened = random_intensity(torch.ones(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert brightened.max() > 1.05


# ---- model.pt


def stop_message(function, *args):
    """The message of the SystemExit that the call ends in: one line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint and the network in it."""
    net, path = tiny_net(), str(tmp_path_factory.mktemp("checkpoint") / "model.pt")
    args = {"seed": 3, "learning_rate": 0.2, "teachers": ["../a", "../b"], "run_dir": None, "cuda": True}
    counters = {"updates": 7, "env_steps": 70, "scores": {"A": 1.5, "B": -2.0}}
    save_model(path, net, args, ("A", "B"), counters)
    return path, net, args, counters


def test_a_checkpoint_gives_back_the_network_in_eval_mode_and_all_that_was_said_of_it(saved):
    path, net, args, counters = saved
    loaded, checkpoint = load_model(path)
    assert loaded.config == TINY and not loaded.training
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    assert checkpoint["args"] == args and checkpoint["counters"] == counters and checkpoint["task_ids"] == ["A", "B"]
    assert "model" not in checkpoint and os.listdir(os.path.dirname(path)) == ["model.pt"]


def test_a_missing_checkpoint_is_one_line(tmp_path):
    path = str(tmp_path / "nowhere" / "model.pt")
    assert path in stop_message(load_model, path)
    assert str(tmp_path) in stop_message(load_model, str(tmp_path))  # a folder


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_line(saved, tmp_path, share):
    with open(saved[0], "rb") as file:
        content = file.read()
    path = str(tmp_path / "model.pt")
    with open(path, "wb") as file:
        file.write(content[: int(len(content) * share)])
    assert path in stop_message(load_model, path)


@pytest.mark.parametrize("content", [np.random.default_rng(0).bytes(5000), b"\x80\x02.", b"hello\n", b"PK\x03\x04"])
def test_bytes_that_are_no_checkpoint_are_one_line(tmp_path, content):
    path = str(tmp_path / "model.pt")
    with open(path, "wb") as file:
        file.write(content)
    assert path in stop_message(load_model, path)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_flipped_byte_in_a_checkpoint_is_one_line(saved, tmp_path, flip):
    content = Path(saved[0]).read_bytes()
    path = tmp_path / "model.pt"
    # among the first and the last bytes are the zip's headers, its directory and the checksum itself
    edges = [*range(0, 60), *range(len(content) - 100, len(content))]
    for i in [*edges, *np.linspace(60, len(content) - 101, 30, dtype=int).tolist()]:
        path.write_bytes(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
        assert str(path) in stop_message(load_model, str(path)), i


# With a right checksum: what follows must be refused for what it is.
@pytest.mark.parametrize(
    "other",
    [
        {"format": "xtra-model-1"},
        {"format": "xtra-checkpoint-3"},  # the checkpoint.pt of a run folder
        {"format": None},
        {"weights": torch.zeros(2)},
        [1, 2],
        torch.zeros(2),
        None,
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple")  # torch.load gives a tensor, which is asked for its format
def test_a_file_of_another_format_is_one_line(tmp_path, other):
    path = str(tmp_path / "model.pt")
    save_torch(path, other)
    message = stop_message(load_model, path)
    assert path in message and "xtra-model-2" in message


def test_a_file_that_torch_wrote_itself_is_one_line(saved, tmp_path):
    path = str(tmp_path / "model.pt")
    torch.save(torch.load(saved[0], weights_only=True), path)  # the content is right, the checksum is not there
    assert f"{path} is damaged or is no file of this project" in stop_message(load_model, path)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["CODE_WAS_RUN"],)


def save_pickle(path, content):
    """A bare pickle with a checksum at its end: only the way it is read stands between it and its code."""
    data = pickle.dumps(content)
    Path(path).write_bytes(data + hashlib.sha256(data).hexdigest().encode())


def save_unsigned(path, content):
    torch.save(content, path)


@pytest.mark.parametrize("save", [save_torch, save_unsigned, save_pickle])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, save):
    trace, path = tmp_path / "trace", str(tmp_path / "model.pt")
    monkeypatch.setenv("CODE_WAS_RUN", str(trace))
    save(path, {"format": "xtra-model-2", "model": Code()})
    assert path in stop_message(load_model, path)
    assert not trace.exists()


# too wide, too deep, no such field, not built at all
@pytest.mark.parametrize(
    "change",
    [
        {"channels": 16},
        {"lstm_size": 13},
        {"blocks": 2},
        {"depth": 3},
        {"channels": 0},
        {"blocks": 65},
        {"projector_out": 65_537},
        {"support": 10**12},
        {"channels": 8.0},
        {"channels": None},
    ],
    ids=str,
)
def test_a_config_that_the_weights_do_not_fit_is_one_line(saved, tmp_path, change):
    checkpoint = torch.load(saved[0], weights_only=True)
    path = str(tmp_path / "model.pt")
    save_torch(path, checkpoint | {"config": checkpoint["config"] | change})
    assert f"{path} does not fit its own config" in stop_message(load_model, path)


@pytest.mark.parametrize("lost", ["config", "model", "args", "task_ids", "counters"])
def test_a_checkpoint_without_one_of_its_parts_is_one_line(saved, tmp_path, lost):
    checkpoint = torch.load(saved[0], weights_only=True)
    path = str(tmp_path / "model.pt")
    for other in (None, 3):
        save_torch(path, checkpoint | {lost: other})
        assert path in stop_message(load_model, path)
    del checkpoint[lost]
    save_torch(path, checkpoint)
    assert path in stop_message(load_model, path)


NAME = "representation.layers.0.weight"  # [4, 12, 3, 3]


@pytest.mark.parametrize(
    "change, words",
    [
        ({NAME: torch.full((4, 12, 3, 3), torch.nan)}, "not finite"),
        ({NAME: torch.zeros(4, 12, 3, 3).index_fill(0, torch.tensor([3]), torch.inf)}, "not finite"),
        ({NAME: torch.zeros(4, 12, 3, 4)}, "shapes"),
        ({NAME: torch.zeros(4, 12, 3, 3, dtype=torch.float64)}, "types"),
        ({NAME: "text"}, "no attribute"),
        ({"another.weight": torch.zeros(1)}, "names"),
    ],
    ids=["nan", "inf", "shape", "type", "no tensor", "one too many"],
)
def test_weights_that_are_wrong_are_one_line(saved, tmp_path, change, words):
    checkpoint = torch.load(saved[0], weights_only=True)
    path = str(tmp_path / "model.pt")
    save_torch(path, checkpoint | {"model": checkpoint["model"] | change})
    message = stop_message(load_model, path)
    assert f"{path} does not fit its own config" in message and words in message


def test_weights_that_unpack_to_more_than_the_file_are_one_line(saved, tmp_path):
    checkpoint = torch.load(saved[0], weights_only=True)
    # one stored number each, shown in every place: a small file that could claim any amount of memory
    weights = {name: torch.zeros((), dtype=x.dtype).expand(x.shape) for name, x in checkpoint["model"].items()}
    path = str(tmp_path / "model.pt")
    save_torch(path, checkpoint | {"model": weights})
    assert "more memory than the file" in stop_message(load_model, path)


# ---- files that are whole or not there


def full_disk(file):
    file.write(b"half of the new ")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("old", [None, b"the old content"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    message = stop_message(write_file, str(path), full_disk)
    assert str(path) in message and "No space left on device" in message
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {"file": old})


@pytest.mark.parametrize("old", [None, b"the old content"])
def test_a_write_that_may_fail_warns_and_leaves_the_old_file(tmp_path, capsys, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    assert write_file(str(path), full_disk, keep_going=True) is False
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("\nwarning: ") and err.count("\n") == 2  # not in the line of the progress bar
    assert str(path) in err and "No space left on device" in err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {"file": old})
    assert write_file(str(path), b"new", keep_going=True) is True  # and with space it works, silently
    assert capsys.readouterr() == ("", "") and path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []

    def fsync(fd):
        file = os.readlink(f"/proc/self/fd/{fd}")
        synced.append((file, os.path.isfile(file) and Path(file).read_bytes(), path.exists()))

    monkeypatch.setattr("os.fsync", fsync)
    write_file(str(path), lambda file: file.write(b"all of it"))
    # first the whole content under its temporary name, then the folder with the new name
    assert synced == [(f"{path}.tmp", b"all of it", False), (str(tmp_path), False, True)]


def out_of_space(fd):
    raise OSError(28, "No space left on device")


def flip_a_byte(fd):
    """A disk that stores something else."""
    if os.fstat(fd).st_size > 10 and not os.path.isdir(f"/proc/self/fd/{fd}"):
        os.pwrite(fd, bytes([os.pread(fd, 1, 9)[0] ^ 1]), 9)


@pytest.mark.parametrize(
    "fsync, words", [(out_of_space, "No space left"), (flip_a_byte, "what was read back is not what was written")]
)
def test_a_failed_checkpoint_leaves_the_old_one(saved, tmp_path, monkeypatch, capsys, fsync, words):
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old content")
    monkeypatch.setattr("os.fsync", fsync)
    message = stop_message(save_model, str(path), saved[1], {}, [], {})
    assert str(path) in message and words in message
    save_model(str(path), saved[1], {}, [], {}, keep_going=True)
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model.pt"] and path.read_bytes() == b"the old content"


def test_a_saved_dict_is_a_zip_with_the_sha256_of_all_before_as_its_comment(tmp_path):
    path, content = tmp_path / "file.pt", {"format": "test-1", "x": torch.arange(5), "name": "Spiel"}
    assert save_torch(str(path), content) is True
    data = path.read_bytes()
    assert data[-66:-64] == b"\x40\x00"  # the length of the comment
    assert data[-64:].decode() == hashlib.sha256(data[:-64]).hexdigest()
    loaded = load_torch(str(path), "test-1")
    assert loaded.keys() == content.keys() and torch.equal(loaded["x"], content["x"]) and loaded["name"] == "Spiel"
    assert torch.load(path, weights_only=True)["name"] == "Spiel"  # any reader of torch files takes it
    assert "'test-1'" in stop_message(load_torch, str(path), "test-2")


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    path = str(tmp_path / "nowhere" / "file")
    for content in (b"x", lambda file: file.write(b"x")):
        assert path in stop_message(write_file, path, content)


# ---- manifests


FIELDS = {"rows": int, "env_id": str, "settings": dict}
FILES = ["data"]


@pytest.fixture
def manifest(tmp_path):
    """The path of a small manifest that names one file."""
    (tmp_path / "data").write_bytes(b"0123456789")
    path = str(tmp_path / "meta.json")
    write_manifest(path, "test-1", {"rows": 3, "env_id": "A", "settings": {"x": [1, 2.5]}}, ["data"])
    return path


def test_a_manifest_gives_back_its_fields(manifest, tmp_path):
    fields = load_manifest(manifest, "test-1", FIELDS, FILES)
    assert fields["rows"] == 3 and fields["env_id"] == "A" and fields["settings"] == {"x": [1, 2.5]}
    # printf 0123456789 | sha256sum
    assert fields["sha256"] == {"data": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"}
    assert sorted(os.listdir(tmp_path)) == ["data", "meta.json"]


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
def test_a_flipped_byte_anywhere_in_a_manifest_is_refused(manifest, flip):
    with open(manifest, "rb") as file:
        content = file.read()
    for i in range(len(content)):
        with open(manifest, "wb") as file:
            file.write(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
        assert manifest in stop_message(load_manifest, manifest, "test-1", FIELDS, FILES), i


def test_a_truncated_manifest_is_refused(manifest):
    with open(manifest, "rb") as file:
        content = file.read()
    for length in range(len(content)):
        with open(manifest, "wb") as file:
            file.write(content[:length])
        assert manifest in stop_message(load_manifest, manifest, "test-1", FIELDS, FILES), length


@pytest.mark.parametrize("position", [0, 5, 9])
def test_a_flipped_byte_in_a_named_file_is_refused(manifest, tmp_path, position):
    content = bytearray(b"0123456789")
    content[position] ^= 1
    (tmp_path / "data").write_bytes(content)
    message = stop_message(load_manifest, manifest, "test-1", FIELDS, FILES)
    assert str(tmp_path / "data") in message and "damaged" in message


def test_a_missing_file_is_named(manifest, tmp_path):
    (tmp_path / "data").unlink()
    assert f"{tmp_path}/data not found" in stop_message(load_manifest, manifest, "test-1", FIELDS, FILES)
    os.unlink(manifest)
    assert f"{manifest} not found" in stop_message(load_manifest, manifest, "test-1", FIELDS, FILES)


def test_a_file_in_place_of_the_folder_is_one_line(manifest):
    assert manifest in stop_message(load_manifest, f"{manifest}/meta.json", "test-1", FIELDS, FILES)


def test_another_format_version_is_named(manifest):
    message = stop_message(load_manifest, manifest, "test-2", FIELDS, FILES)
    assert "'test-1'" in message and "'test-2'" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 3, "env_id": "A"},
        {"rows": 3.0, "env_id": "A", "settings": {}},
        {"rows": True, "env_id": "A", "settings": {}},  # an int to isinstance
        {"rows": 3, "env_id": None, "settings": {}},
        {"rows": 3, "env_id": "A", "settings": []},
    ],
    ids=str,
)
def test_a_field_that_is_missing_or_of_another_type_is_one_line(manifest, fields):
    write_manifest(manifest, "test-1", fields, ["data"])
    message = stop_message(load_manifest, manifest, "test-1", FIELDS, FILES)
    assert manifest in message and "rows (int), env_id (str), settings (dict)" in message


def test_a_manifest_in_another_layout_is_refused(manifest):
    with open(manifest) as file:
        fields = json.load(file)
    for text in (json.dumps(fields), json.dumps(fields, indent=2), json.dumps(fields, indent=1) + "\n"):
        with open(manifest, "w") as file:
            file.write(text)
        assert f"{manifest} is damaged" in stop_message(load_manifest, manifest, "test-1", FIELDS, FILES)


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "3", '"text"', "{}", '{"checksum": null, "format": 1, "sha256": []}', "[" * 100_000, "\ufeff{}"],
    ids=lambda text: text[:10],
)
def test_json_that_is_no_manifest_is_one_line(tmp_path, content):
    path = str(tmp_path / "meta.json")
    with open(path, "w") as file:
        file.write(content)
    assert path in stop_message(load_manifest, path, "test-1", FIELDS, FILES)


def test_a_manifest_is_plain_json(manifest):
    with open(manifest) as file:
        fields = json.load(file)
    assert fields["format"] == "test-1" and list(fields)[-1] == "checksum"


# ---- a run that may be interrupted


def python(code, *args):
    """Starts an interpreter that has imported model."""
    command = [sys.executable, "-c", f"import os, sys, time, model\n{code}", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


NOTE_SIGNALS = """
interrupted, seen = model.catch_signals(), 0
print(interrupted, flush=True)
for _ in range(6000):
    time.sleep(0.01)
    if len(interrupted) > seen:
        seen = len(interrupted)
        print(interrupted, flush=True)
"""


def test_signals_are_noted_and_the_process_goes_on():
    with python(NOTE_SIGNALS) as process:
        assert process.stdout.readline() == "[]\n"
        expected = []
        for name in ("SIGUSR1", "SIGTERM", "SIGTERM", "SIGUSR1"):
            process.send_signal(getattr(signal, name))
            expected.append(name)
            assert process.stdout.readline() == f"{expected}\n" and process.poll() is None
        process.kill()


def test_the_second_interrupt_ends_the_process_at_once():
    with python(NOTE_SIGNALS) as process:
        assert process.stdout.readline() == "[]\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "['SIGINT']\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
        assert process.stderr.read() == ""  # no traceback


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_locked_folder_is_refused_to_another_process_until_the_first_one_ends(tmp_path):
    folder = tmp_path / "runs" / "mine"  # made on the way
    with python("lock = model.lock_folder(sys.argv[1]); print(1, flush=True); time.sleep(60)", folder) as process:
        assert process.stdout.readline() == "1\n"
        (folder / "checkpoint.pt.tmp").write_bytes(b"the first process is writing this")
        before = contents(folder)
        message = stop_message(lock_folder, str(folder))
        assert f"--run-dir {folder} is in use by another process" in message
        assert contents(folder) == before
        process.kill()  # without a chance to tidy up
        process.wait(30)
    with lock_folder(str(folder)) as lock:
        assert not lock.closed and contents(folder) == before  # the next checkpoint replaces the half-written file


def test_a_lock_ends_with_its_file_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    for _ in range(2):
        with lock_folder(str(tmp_path)), open(tmp_path / "lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert contents(tmp_path) == {"lock": b"", "model.pt": b"x"}


def test_the_unfinished_dataset_of_a_killed_run_is_no_obstacle_to_a_lock(tmp_path):
    (tmp_path / "data.tmp").mkdir()  # `--run-dir X --save-dataset X/data`, killed while it wrote the dataset
    (tmp_path / "data.tmp" / "frames").write_bytes(b"half")
    lock_folder(str(tmp_path)).close()


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        message = stop_message(lock_folder, str(folder))
        assert f"--run-dir {folder}" in message and "expected a folder that can be written" in message
    assert contents(tmp_path) == {"file": b"x"}


EVENTS = {"events.out.tfevents.1.a": b"0123456789", "events.out.tfevents.2.a": b"abc", "events.out.tfevents.3.a": b""}


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with three files of TensorBoard."""
    for name, content in (EVENTS | {"model.pt": b"weights", "my.events.out.tfevents": b"mine"}).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_event_sizes_are_those_of_tensorboards_files_on_disk(run_folder, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    assert event_sizes(str(run_folder)) == {name: len(content) for name, content in EVENTS.items()} and not synced
    assert event_sizes(str(run_folder), sync=True) == event_sizes(str(run_folder))
    assert synced == sorted(EVENTS)  # a checkpoint must not promise bytes that a power failure takes


def test_rewinding_cuts_what_came_after_the_checkpoint(run_folder):
    rewind_events(str(run_folder), {"events.out.tfevents.1.a": 4, "events.out.tfevents.2.a": 3})
    others = {"model.pt": b"weights", "my.events.out.tfevents": b"mine"}
    first, second, _ = EVENTS
    assert contents(run_folder) == others | {first: b"0123", second: b"abc"}  # the third was begun later
    rewind_events(str(run_folder), {})
    assert contents(run_folder) == others


@pytest.mark.parametrize("lost", [{"events.out.tfevents.1.a": 11}, {"events.out.tfevents.0.a": 0}])
def test_a_file_of_tensorboard_that_lost_something_is_a_warning(run_folder, lost, capsys):
    (name,) = lost
    rewind_events(str(run_folder), {"events.out.tfevents.2.a": 1} | lost)
    assert f"{run_folder}/{name} is missing or cut" in capsys.readouterr().err
    assert contents(run_folder)["events.out.tfevents.2.a"] == b"a"


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("x")]


def test_the_log_keeps_what_a_full_disk_does_not_take(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("threading.excepthook", threading.excepthook)  # put back what Log sets
    log = Log(str(tmp_path))
    for step in range(30):
        log.add_scalar("x", step / 2, step)
        full = 10 <= step < 20
        with pytest.MonkeyPatch.context() as patch:
            if full:
                patch.setattr(
                    "tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem._write", lambda *_: out_of_space(0)
                )
            assert log.flush() is not full
    assert "TensorBoard's file could not be written (No space left on device)" in capsys.readouterr().err
    assert scalars(tmp_path) == [(step, step / 2) for step in range(30)]  # each of them once
    monkeypatch.setattr(
        "tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem._write", lambda *_: out_of_space(0)
    )
    log.add_scalar("x", 1.0, 30)
    assert "TensorBoard" in stop_message(partial(log.flush, keep_going=False))


# ---- numbers that are not finite


class Numbers(NamedTuple):
    """Stands for a batch."""

    obs: torch.Tensor


GAMES = np.repeat(["Alien", "Hero"], 2)  # [B]


def checked(terms, gradients=None, loss=1.0, norm=1.0):
    """`check_finite` on a network of two layers -> what it says, and the tensors of its post-mortem."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # the second has no gradient, as where h is frozen
    found = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "1.weight": None, "1.bias": None}
    found = list((found | (gradients or {})).values())
    terms = {name: torch.tensor(term) for name, term in terms.items()}
    try:
        check_finite(loss, norm, terms, found, GAMES, net, Numbers(torch.arange(3)))
    except FloatingPointError as error:
        what, tensors = error.args
        assert torch.equal(tensors["batch"]["obs"], torch.arange(3))
        assert tensors["weights"].keys() == net.state_dict().keys()
        return what
    return None


ONES = [1.0, 1.0, 1.0, 1.0]
INF, NAN = float("inf"), float("nan")


def test_a_finite_update_passes():
    assert checked({"policy": ONES, "value": ONES}) is None
    assert checked({"policy": ONES}, loss=-1e30, norm=0.0) is None


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("place, game", [(1, "Alien"), (2, "Hero"), (3, "Hero")])
def test_the_term_and_the_game_that_are_not_finite_are_named(bad, place, game):
    term = [*ONES[:place], bad, *ONES[place + 1 :]]
    # a bad loss spoils all gradients: the cause is named, not what follows from it
    gradients = {"0.weight": torch.full((2, 2), NAN)}
    assert checked({"policy": ONES, "value": term}, gradients, bad, NAN) == f"the value loss of {game}"
    assert checked({"policy": ONES, "value": term}, loss=bad) == f"the value loss of {game}"


def test_the_parameter_whose_gradient_is_not_finite_is_named():
    gradients = {"0.bias": torch.tensor([0.0, INF])}
    assert checked({"policy": ONES}, gradients, norm=INF) == "the gradient of 0.bias"
    assert checked({"policy": ONES}, gradients, norm=NAN) == "the gradient of 0.bias"


def test_gradients_are_those_of_the_parameters_that_require_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)  # as where h is frozen: the first of the list is not the network's first
    gradients = [torch.ones(2, 2), torch.full((2,), NAN)]
    with pytest.raises(FloatingPointError) as error:
        check_finite(1.0, NAN, {"policy": torch.ones(4)}, gradients, GAMES, net, Numbers(torch.arange(3)))
    assert error.value.args[0] == "the gradient of 1.bias"


def test_a_sum_that_overflows_is_the_loss():
    assert checked({"policy": ONES}, loss=INF) == "the loss"


def test_a_number_that_is_not_finite_ends_the_run_with_one_line_and_a_post_mortem(tmp_path):
    def update():
        with stop_if_not_finite(str(tmp_path), SimpleNamespace(n=7)):
            raise FloatingPointError("the value loss of Hero", {"batch": {"obs": torch.arange(3)}})

    message = stop_message(update)
    assert "the value loss of Hero is not finite at update 7" in message and f"{tmp_path}/not_finite.pt" in message
    content = load_torch(f"{tmp_path}/not_finite.pt", "xtra-not-finite-1")
    assert content["what"] == "the value loss of Hero" and content["update"] == 7
    assert torch.equal(content["batch"]["obs"], torch.arange(3))
    # with a full disk too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", out_of_space)
        assert "is not finite at update 7" in stop_message(update)


def test_other_errors_and_the_end_of_a_run_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), stop_if_not_finite(str(tmp_path), SimpleNamespace(n=7)):
        1 / 0  # noqa: B018
    with stop_if_not_finite(str(tmp_path), SimpleNamespace(n=7)):
        pass
    assert os.listdir(tmp_path) == []


# ---- memory


@pytest.fixture
def machine(monkeypatch):
    """Memory as the test says: {"available", "rss"} in bytes, the cgroup's path and {folder: memory.max}."""
    said = {"available": 10_000, "rss": 0, "group": "0::/a/b\n", "limits": {}}

    def read_text(path):
        if path.name != "memory.max" or str(path.parent) not in said["limits"]:
            raise FileNotFoundError(str(path))
        return said["limits"][str(path.parent)]

    def open_cgroup(path, *args):
        assert path == "/proc/self/cgroup"
        if said["group"] is None:
            raise FileNotFoundError(path)
        return io.StringIO(said["group"])

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=said["available"]))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=said["rss"]))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(model, "open", open_cgroup, raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    return said


def test_free_memory_is_that_of_the_machine_without_a_limit(machine):
    assert free_memory() == 10_000
    machine["limits"] = {"/sys/fs/cgroup/a/b": "max\n"}
    assert free_memory() == 10_000
    machine["group"] = None  # not Linux
    assert free_memory() == 10_000
    machine["group"] = "12:memory:/a/b\n11:cpu:/a/b\n"  # cgroup v1 only: not looked at
    assert free_memory() == 10_000


@pytest.mark.parametrize("folder", ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"])
def test_the_limit_of_any_group_above_counts(machine, folder):
    machine["limits"] = {"/sys/fs/cgroup/a/b": "max\n", "/sys/fs/cgroup/a": "9000\n"} | {folder: "5000\n"}
    machine["rss"] = 1_200
    assert free_memory() == 5_000 - 1_200
    machine["available"] = 100  # the machine itself has less
    assert free_memory() == 100


def test_free_memory_here_is_some_and_less_than_the_machine_has():
    assert 0 < free_memory() <= psutil.virtual_memory().total


SMALL = {"rows": 100, "samples": 8, "roots": 16, "num_simulations": 4, "disk": {"data": 1_000}}


def check(run_dir, device="cpu", config=TINY, **sizes):
    check_memory(torch.device(device), str(run_dir), config, **SMALL | sizes)


@pytest.fixture
def plenty(monkeypatch):
    """A machine that has 1 TB of everything -> what can be lowered."""

    def have(ram=10**12, disk=10**12, gpu=10**12):
        monkeypatch.setattr(model, "free_memory", lambda: ram)
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=disk))
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (gpu, 10**12))

    have()
    return have


@pytest.mark.parametrize("device, words", [("cpu", "RAM"), ("cuda", "GPU memory"), ("cuda", "RAM"), ("cpu", "disk")])
def test_a_run_that_does_not_fit_is_one_line(tmp_path, plenty, capsys, device, words):
    kind = {"RAM": "ram", "GPU memory": "gpu", "disk": "disk"}[words]
    check(tmp_path, device)  # there is enough
    plenty(**{kind: 100_000})
    message = stop_message(partial(check, tmp_path, device))
    assert f"MB of {words}" in message and "(0 free)" in message
    assert ("another folder" if words == "disk" else "--batch-size") in message
    out = capsys.readouterr().out
    assert out.count("this run needs about ") == 2 and f"MB of {words}" in out and "(1,000,000 free)" in out
    assert os.listdir(tmp_path) == []


def needed(capsys, name, device="cpu", config=TINY, **sizes):
    """Gigabytes of `name` that the line of `check_memory` says."""
    check("runs/nowhere/yet", device, config, **sizes)  # no folder of the three is there
    line = capsys.readouterr().out
    return float(line.split(f" MB of {name}")[0].split()[-1].replace(",", "")) / 1000


@pytest.mark.parametrize("device, name", [("cpu", "RAM"), ("cuda", "GPU memory")])
def test_the_frames_of_all_replays_count(plenty, capsys, device, name):
    # a million frames of 3 * 96 * 96 bytes: 27.65 GB, and 130 bytes of the rest of a row, which are never on the GPU
    grown = needed(capsys, name, device, rows=1_000_000) - needed(capsys, name, device, rows=0)
    assert grown == pytest.approx(27.65 + 0.13 * (device == "cpu"), abs=0.11)


@pytest.mark.parametrize("flag", ["samples", "roots"])
def test_larger_batches_and_searches_need_more(plenty, capsys, flag):
    assert needed(capsys, "RAM", **{flag: 100_000}) > needed(capsys, "RAM") + 10


def test_the_files_of_a_run_count(plenty, capsys):
    assert needed(capsys, "disk for data", disk={"data": 5_000_000_000}) == pytest.approx(5, abs=0.11)
    assert not os.path.exists("runs/nowhere")


@pytest.mark.parametrize("channels, blocks", [(8, 1), (32, 2), (16, 4)])
def test_the_estimate_of_a_backward_pass_covers_what_torch_keeps_for_it(plenty, capsys, channels, blocks):
    config, B, K = ModelConfig.of_width(channels, blocks), 2, 5
    net, kept = EfficientZeroNet(config), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latent, policy, value = net.initial_inference(some_obs(B))
        state, loss = net.initial_lstm_state(B, latent), policy.sum() + value.sum()
        for _ in range(K):
            latent, state, *logits = net.recurrent_inference(latent, torch.zeros(B, dtype=torch.int64), state)
            loss = loss + sum(x.sum() for x in logits) + net.predictor(net.projector(latent)).sum()
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights) / B
    sizes = [needed(capsys, "RAM", config=config, roots=0, samples=samples) for samples in (0, 10_000)]
    estimate = (sizes[1] - sizes[0]) * 1e9 / 10_000  # bytes of a sample
    assert 0.2 * estimate < activations < estimate
