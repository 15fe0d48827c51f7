"""Networks, value transform, augmentation and files, each against numbers written out or a slow version of itself."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from model import (
    EfficientZeroNet,
    ModelConfig,
    inference_copy,
    inverse_scalar_transform,
    load_checkpoint,
    load_manifest,
    random_intensity,
    random_shift,
    save_checkpoint,
    scalar_to_support,
    scalar_transform,
    scale_gradient,
    support_to_scalar,
    write_file,
    write_manifest,
)

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
    projection = net.projector(latent)
    flat = [latent, policy, value, projection, net.predictor(projection)]
    return flat + [first[0], *first[1], *first[2:], second[0], *second[1], *second[2:]]


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
    factor = random_intensity(obs, torch.Generator().manual_seed(0)) / obs
    assert (factor - factor[:, :1, :1, :1]).abs().max() < 1e-6
    factor = factor[:, 0, 0, 0]
    # 1 + 0.05 n, cut at 2 standard deviations: 0.9 and 1.1 are reached (5 % of the draws), nothing is beyond
    assert factor.min().item() == pytest.approx(0.9, abs=1e-6) and factor.max().item() == pytest.approx(1.1, abs=1e-6)
    assert factor.mean().item() == pytest.approx(1, abs=0.01) and factor.std().item() == pytest.approx(0.048, abs=0.006)


def test_random_intensity_is_not_clamped_to_1():
    brightened = random_intensity(torch.ones(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert brightened.max() > 1.05


# ---- checkpoints


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
    save_checkpoint(path, net, args, ("A", "B"), counters)
    return path, net, args, counters


def test_a_checkpoint_gives_back_the_network_in_eval_mode_and_all_that_was_said_of_it(saved):
    path, net, args, counters = saved
    loaded, checkpoint = load_checkpoint(path)
    assert loaded.config == TINY and not loaded.training
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))
    assert checkpoint["args"] == args and checkpoint["counters"] == counters and checkpoint["task_ids"] == ["A", "B"]
    assert "model" not in checkpoint and os.listdir(os.path.dirname(path)) == ["model.pt"]


def test_a_missing_checkpoint_is_one_line(tmp_path):
    path = str(tmp_path / "nowhere" / "model.pt")
    assert path in stop_message(load_checkpoint, path)
    assert str(tmp_path) in stop_message(load_checkpoint, str(tmp_path))  # a folder


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_line(saved, tmp_path, share):
    with open(saved[0], "rb") as file:
        content = file.read()
    path = str(tmp_path / "model.pt")
    with open(path, "wb") as file:
        file.write(content[: int(len(content) * share)])
    assert path in stop_message(load_checkpoint, path)


@pytest.mark.parametrize("content", [np.random.default_rng(0).bytes(5000), b"\x80\x02.", b"hello\n", b"PK\x03\x04"])
def test_bytes_that_are_no_checkpoint_are_one_line(tmp_path, content):
    path = str(tmp_path / "model.pt")
    with open(path, "wb") as file:
        file.write(content)
    assert path in stop_message(load_checkpoint, path)


@pytest.mark.parametrize(
    "other", [{"format": "xtra-checkpoint-0"}, {"weights": torch.zeros(2)}, [1, 2], torch.zeros(2)]
)
def test_a_file_of_another_format_is_one_line(tmp_path, other):
    path = str(tmp_path / "model.pt")
    torch.save(other, path)
    message = stop_message(load_checkpoint, path)
    assert path in message and "xtra-checkpoint-1" in message


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["CODE_WAS_RUN"],)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: pickle.dump(value, open(path, "wb"))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, save):
    trace, path = tmp_path / "trace", str(tmp_path / "model.pt")
    monkeypatch.setenv("CODE_WAS_RUN", str(trace))
    save({"format": "xtra-checkpoint-1", "model": Code()}, path)
    assert path in stop_message(load_checkpoint, path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "change",
    [{"channels": 16}, {"lstm_size": 13}, {"blocks": 2}, {"depth": 3}],  # too wide, too deep, no such field
)
def test_a_config_that_the_weights_do_not_fit_is_one_line(saved, tmp_path, change):
    checkpoint = torch.load(saved[0], weights_only=True)
    path = str(tmp_path / "model.pt")
    torch.save(checkpoint | {"config": checkpoint["config"] | change}, path)
    assert path in stop_message(load_checkpoint, path)


@pytest.mark.parametrize("lost", ["config", "model"])
def test_a_checkpoint_without_one_of_its_parts_is_one_line(saved, tmp_path, lost):
    checkpoint = torch.load(saved[0], weights_only=True)
    del checkpoint[lost]
    path = str(tmp_path / "model.pt")
    torch.save(checkpoint, path)
    assert path in stop_message(load_checkpoint, path)


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


def test_a_failed_checkpoint_leaves_the_old_one(saved, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old content")

    def out_of_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", out_of_space)
    assert str(path) in stop_message(save_checkpoint, str(path), saved[1], {}, [], {})
    assert os.listdir(tmp_path) == ["model.pt"] and path.read_bytes() == b"the old content"


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    path = str(tmp_path / "nowhere" / "file")
    assert path in stop_message(write_file, path, lambda file: file.write(b"x"))


# ---- manifests


@pytest.fixture
def manifest(tmp_path):
    """The path of a small manifest that names one file."""
    (tmp_path / "data").write_bytes(b"0123456789")
    path = str(tmp_path / "meta.json")
    write_manifest(path, "test-1", {"rows": 3, "env_id": "A", "settings": {"x": [1, 2.5]}}, ["data"])
    return path


def test_a_manifest_gives_back_its_fields(manifest, tmp_path):
    fields = load_manifest(manifest, "test-1")
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
        assert manifest in stop_message(load_manifest, manifest, "test-1"), i


def test_a_truncated_manifest_is_refused(manifest):
    with open(manifest, "rb") as file:
        content = file.read()
    for length in range(len(content)):
        with open(manifest, "wb") as file:
            file.write(content[:length])
        assert manifest in stop_message(load_manifest, manifest, "test-1"), length


@pytest.mark.parametrize("position", [0, 5, 9])
def test_a_flipped_byte_in_a_named_file_is_refused(manifest, tmp_path, position):
    content = bytearray(b"0123456789")
    content[position] ^= 1
    (tmp_path / "data").write_bytes(content)
    message = stop_message(load_manifest, manifest, "test-1")
    assert str(tmp_path / "data") in message and "damaged" in message


def test_a_missing_file_is_named(manifest, tmp_path):
    (tmp_path / "data").unlink()
    assert f"{tmp_path}/data not found" in stop_message(load_manifest, manifest, "test-1")
    os.unlink(manifest)
    assert f"{manifest} not found" in stop_message(load_manifest, manifest, "test-1")


def test_a_file_in_place_of_the_folder_is_one_line(manifest):
    assert manifest in stop_message(load_manifest, f"{manifest}/meta.json", "test-1")


def test_another_format_version_is_named(manifest):
    message = stop_message(load_manifest, manifest, "test-2")
    assert "'test-1'" in message and "'test-2'" in message


@pytest.mark.parametrize(
    "content", ["null", "[]", "3", '"text"', "{}", '{"checksum": null, "format": 1, "sha256": []}']
)
def test_json_that_is_no_manifest_is_one_line(tmp_path, content):
    path = str(tmp_path / "meta.json")
    with open(path, "w") as file:
        file.write(content)
    assert path in stop_message(load_manifest, path, "test-1")


def test_a_manifest_is_plain_json(manifest):
    with open(manifest) as file:
        fields = json.load(file)
    assert fields["format"] == "test-1" and list(fields)[-1] == "checksum"
