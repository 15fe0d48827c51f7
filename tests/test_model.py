"""Networks, value transform, augmentation and files, each against numbers written out or a slow version of itself."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import finetune
import model
from model import EfficientZeroNet, ModelConfig, StepNorm, inference_copy, load_model, save_model

HEADS = {"head_channels": 4, "head_hidden": 8, "projector_hidden": 20, "projector_out": 16, "predictor_hidden": 10}
TINY = ModelConfig(channels=8, lstm_size=12, **HEADS)
NORMS = nn.BatchNorm1d | nn.BatchNorm2d | StepNorm


def tiny_net(seed=0, config=TINY):
    """A small network whose zero-initialised layers and batch norms are filled, so that every output says something."""
    torch.manual_seed(seed)
    net = EfficientZeroNet(config)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
        if isinstance(module, NORMS):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def some_obs(n=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 12, 96, 96), dtype=np.uint8))


def outputs_of(net, obs):
    """All that the network says of two steps."""
    latent, policy, value = net.initial_inference(obs)
    state = net.initial_lstm_state(len(obs), latent)
    first = net.recurrent_inference(latent, torch.tensor([0, 5, 17]), state, torch.tensor([1]))
    second = net.recurrent_inference(first[0], torch.tensor([1, 2, 3]), first[1], torch.tensor([2, 6, 11]))
    return [latent, policy, value, first[0], *first[1], *first[2:], second[0], *second[1], *second[2:]]


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# --- value transform and support


def test_the_transform_is_odd_and_has_the_published_values():
    x = torch.tensor([0.0, 1, 5, 20, 100])
    # 0, sqrt(2) - 1 + 0.001, sqrt(6) - 1 + 0.005, sqrt(21) - 1 + 0.02, sqrt(101) - 1 + 0.1
    torch.testing.assert_close(model.scalar_transform(x), torch.tensor([0, 0.415214, 1.454490, 3.602576, 9.149876]))
    assert torch.equal(model.scalar_transform(-x), -model.scalar_transform(x))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 50_000), (torch.float32, 100)])
def test_the_inverse_undoes_the_transform_and_is_zero_below_a_thousandth(dtype, limit):
    x = torch.linspace(-limit, limit, 4001, dtype=dtype)
    error = (model.inverse_scalar_transform(model.scalar_transform(x)) - x).abs() / x.abs().clamp(min=1)
    assert error.max() < 1e-5
    x = torch.tensor([0.0009, -0.0009, 0.002], dtype=dtype)
    assert model.inverse_scalar_transform(model.scalar_transform(x)).tolist() == [0, 0, pytest.approx(0.002, rel=1e-2)]


def test_two_hot_codes(monkeypatch):
    monkeypatch.setattr(model, "scalar_transform", lambda x: x)  # float32 rounding must not hide the whole numbers
    probs = model.scalar_to_support(torch.tensor([[2.25, -2.25, 1, 0, 300, -1e6]]), 300)
    assert probs.shape == (1, 6, 601)
    assert [{i.item(): row[i].item() for i in row.nonzero()} for row in probs[0]] == [
        {302: 0.75, 303: 0.25},  # atom 2 is at 300 + 2
        {297: 0.25, 298: 0.75},  # floor(-2.25) = -3 gets 1 - 0.75
        {301: 1},  # where a plain scatter would overwrite it with 0
        {300: 1},
        {600: 1},
        {0: 1},
    ]


def test_support_to_scalar_reads_what_scalar_to_support_writes():
    x = torch.tensor([[-83.7, -5.0, -1.0, -0.01, 0.0], [0.5, 1.0, 20.0, 83.7, 50_000.0]])
    logits = model.scalar_to_support(x, 300).log()  # log 0 = -inf: softmax gives the code back
    torch.testing.assert_close(model.support_to_scalar(logits), x, rtol=1e-3, atol=2e-3)


# --- networks


@pytest.mark.parametrize(("blocks", "h", "total", "bn"), [(1, 318_016, 8_350_708, 27), (4, 1_039_552, 9_072_244, 51)])
def test_sizes_are_those_of_the_reference(blocks, h, total, bn):
    net = EfficientZeroNet(ModelConfig.of_width(64, blocks))
    expected = {"dynamics": 2_382_281, "prediction": 133_611, "projector": 4_465_664, "predictor": 1_051_136}
    for name, size in (expected | {"representation": h}).items():
        assert sum(parameter.numel() for parameter in getattr(net, name).parameters()) == size
    assert sum(parameter.numel() for parameter in net.parameters()) == total
    assert sum(isinstance(module, NORMS) for module in net.modules()) == bn


def test_a_new_network_has_a_uniform_policy_and_says_zero():
    net = EfficientZeroNet(TINY)
    latent, value, policy = net.search_root(some_obs())
    state = net.initial_lstm_state(3, latent)
    actions, depth = torch.tensor([1, 2, 3]), torch.tensor([1])
    _, _, prefix, next_value, next_policy = net.search_leaf(latent, actions, state, depth)
    assert not any(x.any() for x in (value, policy, prefix, next_value, next_policy, *state))
    assert policy.shape == next_policy.shape == (3, 18) and value.shape == prefix.shape == (3,)


def test_the_action_enters_as_one_plane_of_a_over_18():
    net, seen = tiny_net().eval(), []
    net.dynamics.conv[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    latent = torch.rand(3, 8, 6, 6)
    net.dynamics(latent, torch.tensor([0, 9, 17]), net.initial_lstm_state(3, latent), torch.tensor([1]))
    expected = torch.tensor([0, 9 / 18, 17 / 18]).view(3, 1, 1, 1).expand(3, 1, 6, 6)
    assert torch.equal(seen[0], torch.cat([latent, expected], dim=1))


def test_one_hot_actions_enter_as_one_plane_each(tmp_path):
    """Away from the border an action adds the sum of its own nine weights to what g's first convolution makes of the
    latent; the two networks also share all other sizes, and a file keeps which one it is."""
    net = tiny_net(config=replace(TINY, one_hot_actions=True)).eval()
    conv, said = net.dynamics.conv[0], []
    conv.register_forward_hook(lambda module, inputs, output: said.append(output))
    latent, action = torch.rand(3, 8, 6, 6), torch.tensor([0, 9, 17])
    net.dynamics(latent, action, net.initial_lstm_state(3, latent), torch.tensor([1]))
    of_latent = nn.functional.conv2d(latent, conv.weight[:, :8], padding=1)
    of_action = conv.weight[:, 8:].sum((2, 3)).T[action]  # [3, 8]
    inner = (said[0] - of_latent)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, of_action[:, :, None, None].expand_as(inner))
    sizes = [{name: x.shape for name, x in each.state_dict().items()} for each in (net, tiny_net())]
    assert {name for name in sizes[0] if sizes[0][name] != sizes[1][name]} == {"dynamics.conv.0.weight"}
    save_model(f"{tmp_path}/model.pt", net)
    assert load_model(f"{tmp_path}/model.pt")[0].config == net.config


def test_a_run_that_gives_g_other_planes_than_its_student_says_so(tmp_path):
    args = SimpleNamespace(pretrained=str(tmp_path), channels=None, blocks=None, cross_task=False, transfer="hgf")
    args.total_timesteps, args.unroll_steps, args.step_statistics, args.action_gain = 8, 5, True, 30.0
    for one_hot, flag in ((True, "--one-hot-actions"), (False, "--no-one-hot-actions")):
        save_model(f"{tmp_path}/model.pt", tiny_net(config=replace(TINY, one_hot_actions=one_hot)))
        args.one_hot_actions = one_hot
        assert finetune.load_networks(args)[0].config.one_hot_actions == one_hot
        args.one_hot_actions = not one_hot
        with pytest.raises(SystemExit, match=f" was trained with {flag}; give that flag here too"):
            finetune.load_networks(args)


@pytest.mark.parametrize("channels", [16, 64])
def test_the_action_is_heard_by_a_new_network(channels):
    """Its share of the variance of g's first convolution, over actions that are drawn evenly, is about a half. With
    PyTorch's initial weights it is 0.5 % or less: g would say the same of every action for hundreds of updates."""
    shares = []
    for options in ({}, {"action_gain": 1.0}, {"action_gain": 4.0, "one_hot_actions": True}):
        torch.manual_seed(0)
        net = EfficientZeroNet(ModelConfig.of_width(channels, 1, **options))
        latent = net.representation(some_obs(16))  # [16, C, 6, 6]
        planes = torch.eye(18) if net.config.one_hot_actions else torch.arange(18)[:, None] / 18  # [18, P]
        planes = planes[:, None, :, None, None].expand(-1, 16, -1, 6, 6)
        inputs = torch.cat([latent.expand(18, *latent.shape), planes], dim=2)  # [18, 16, C + P, 6, 6]
        said = net.dynamics.conv[0](inputs.flatten(0, 1)).unflatten(0, (18, 16))
        shares.append((said.var(0).mean() / said.transpose(0, 2).flatten(1).var(1).mean()).item())
    print(f"{channels} channels: the action's share is {shares[0]:.2%}, with --action-gain 1 {shares[1]:.2%},")
    print(f"with --action-gain 4 --one-hot-actions {shares[2]:.2%}")
    assert 0.3 < shares[0] < 0.8 and shares[1] < 0.01 and 0.15 < shares[2] < 0.8


def random_obs(game, steps=400):
    """Stacks of frames of random play in 8 environments, also across ends of games: uint8 [n, 12, 96, 96], and the
    legal actions."""
    envs, rng = finetune.make_envs(f"{game}NoFrameskip-v4", 8), np.random.default_rng(0)
    legal = np.flatnonzero(finetune.legal_actions(f"{game}NoFrameskip-v4"))
    frames = [envs.reset(seed=0)[0]] + [envs.step(rng.choice(legal, 8))[0] for _ in range(steps)]
    envs.close()
    frames = torch.from_numpy(np.stack(frames).reshape(steps + 1, 8, 96, 96, 3)).permute(1, 0, 4, 2, 3)
    stacks = [frames[:, t - 3 : t + 1].flatten(1, 2) for t in range(100, steps, 4)]  # [8, 12, 96, 96] each
    return torch.cat(stacks), torch.from_numpy(legal)


@pytest.mark.faults  # a minute
def test_in_a_maze_a_new_network_hears_the_augmentation_and_the_action_but_hardly_the_state():
    """Variances over samples of random play in what g's first convolution makes of latents and of actions. Of latents
    without augmentation it is 0.8 of that with it in DemonAttack, 0.15 in MsPacman (docs/learning.md); each is of a
    batch that batch norm scales by itself, so the ratio may be above 1."""
    told = {}
    for game in ("Assault", "DemonAttack", "Carnival", "Phoenix", "BankHeist", "Alien", "Amidar", "MsPacman"):
        obs, legal = random_obs(game)
        obs = obs[torch.randperm(len(obs), generator=torch.manual_seed(0))[:128]]
        net = EfficientZeroNet(ModelConfig.of_width(16, 1))
        weight = net.dynamics.conv[0].weight
        augmented = model.augment(obs, torch.manual_seed(1))
        latents = [net.representation(x) for x in (obs.float() / 255, augmented)]
        plane = legal[torch.randint(len(legal), (len(obs),))].view(-1, 1, 1, 1).expand(-1, 1, 6, 6) / 18
        parts = [nn.functional.conv2d(latent, weight[:, :-1], padding=1) for latent in latents]
        parts.append(nn.functional.conv2d(plane, weight[:, -1:], padding=1))
        state, both, action = [part.flatten(1).var(0).sum().item() for part in parts]
        told[game] = state / both, action / (action + state)
        ratio, share = told[game]
        print(f"{game}: variance without augmentation / with {ratio:.2f}; the action's share {share:.0%}")
    assert told["DemonAttack"][0] > 0.6 and told["MsPacman"][0] < 0.3
    assert told["DemonAttack"][1] < 0.9 and told["MsPacman"][1] > 0.95


def test_the_gradient_of_all_that_follows_a_new_latent_is_halved(monkeypatch):
    """What reaches g's inputs through the latent is halved, the value prefix included; the LSTM's path is not."""
    net, latent, gradients = tiny_net().eval(), torch.rand(3, 8, 6, 6), []
    inputs = [latent.requires_grad_(), *[torch.rand(3, 12, requires_grad=True) for _ in range(2)]]
    for scale in (model.scale_gradient, lambda x, factor: x):
        monkeypatch.setattr(model, "scale_gradient", scale)
        new_latent, _, prefix = net.dynamics(inputs[0], torch.tensor([1, 2, 3]), inputs[1:], torch.tensor([1]))
        loss = net.projector(new_latent).square().sum() + prefix.square().sum()
        gradients.append([*torch.autograd.grad(loss, inputs), new_latent.detach(), prefix.detach()])
    scaled, plain = gradients
    torch.testing.assert_close(scaled[0], 0.5 * plain[0])
    assert equal(scaled[1:], plain[1:]) and plain[1].any()


def test_the_activation_changes_the_function_and_travels_with_the_file(tmp_path):
    net, other = [tiny_net(config=replace(TINY, activation=name)).eval() for name in ("ReLU", "SiLU")]
    assert net.state_dict().keys() == other.state_dict().keys()
    said, other_said = outputs_of(net, some_obs()), outputs_of(other, some_obs())
    assert not any(torch.equal(x, y) for x, y in zip(said, other_said, strict=True))
    model.save_model(str(tmp_path / "model.pt"), other)
    loaded, _ = load_model(str(tmp_path / "model.pt"))
    assert loaded.config.activation == "SiLU" and equal(outputs_of(loaded, some_obs()), other_said)


def test_the_last_layers_stay_in_float32_under_autocast():
    layer, x = model.Float32Linear(5, 3), torch.randn(2, 5).bfloat16()
    expected = layer.weight @ x.float().T + layer.bias[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).T, expected)
        outputs = outputs_of(tiny_net().eval(), some_obs())
    assert outputs[0].dtype == torch.bfloat16
    assert {x.dtype for x in outputs if x.shape[-1] in (18, 601)} == {torch.float32}  # policies, values, prefixes


def test_an_inference_copy_says_the_same_as_the_network_in_eval_mode():
    net, obs = tiny_net().train(), some_obs()
    fused = inference_copy(net)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    expected = outputs_of(net.eval(), obs.float() / 255)  # bytes and unit floats are the same observation
    torch.testing.assert_close(outputs_of(fused, obs), expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(isinstance(module, NORMS) for module in fused.modules())


@pytest.mark.parametrize("source", ["network", "copy"])
def test_a_copy_is_refreshed_where_it_lies_and_follows_nothing_else(source):
    """Recorded kernels read the weights where they were: new tensors would leave them with the old network for ever."""
    net, obs = tiny_net(1), some_obs()
    frozen = inference_copy(tiny_net(0))
    places = {name: x.data_ptr() for name, x in frozen.state_dict().items()}
    expected = outputs_of(inference_copy(net), obs)
    model.refresh(frozen, net if source == "network" else inference_copy(net))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert equal(outputs_of(frozen, obs), expected)
    assert {name: x.data_ptr() for name, x in frozen.state_dict().items()} == places


# --- augmentation


def test_augment_pads_by_replication_crops_and_scales_each_sample_as_the_generator_says():
    obs = np.random.default_rng(0).integers(1, 256, (6, 5, 14, 11), dtype=np.uint8)
    padded = np.pad(obs, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    runs = [model.augment(torch.from_numpy(obs), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    found = []
    for b, dy, dx in np.ndindex(6, 9, 9):
        factor = runs[0][b].numpy() / (padded[b, :, dy : dy + 14, dx : dx + 11] / 255)
        if factor.std() < 1e-5:  # one factor for all channels and pixels, at one place
            found.append((b, dy, dx, factor.mean()))
    assert [b for b, *_ in found] == list(range(6))
    assert len({(dy, dx) for _, dy, dx, _ in found}) > 3 and len({factor for *_, factor in found}) == 6


def test_shifts_reach_all_81_places_evenly():
    image = torch.arange(144).view(1, 1, 12, 12)  # the middle pixel says where the crop was
    shifted = model.random_shift(image.repeat(4050, 1, 1, 1), torch.Generator().manual_seed(0))
    places, counts = shifted[:, 0, 6, 6].unique(return_counts=True)
    assert sorted(places.tolist()) == [12 * y + x for y in range(2, 11) for x in range(2, 11)]
    assert (counts - 50).abs().max() < 5 * 7  # 4,050 draws over 81 places: 50 each, standard deviation 7


def test_intensities_lie_within_a_tenth():
    factor = model.augment(torch.full((2000, 1, 2, 2), 255, dtype=torch.uint8), torch.Generator().manual_seed(0))
    # 1 + 0.05 n, cut at 2 standard deviations: 0.9 and 1.1 are reached (5 % of the draws), nothing is beyond
    found = [x.item() for x in (factor.min(), factor.max(), factor.mean(), factor.std())]
    assert found == [pytest.approx(x, abs=error) for x, error in [(0.9, 1e-6), (1.1, 1e-6), (1, 0.005), (0.048, 0.003)]]


# --- files


def stop_message(function, *args):
    """The message of the SystemExit that the call ends in: one line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


def test_a_saved_network_comes_back_in_eval_mode_with_all_that_was_said_of_it(tmp_path):
    net, path = tiny_net().train(), str(tmp_path / "model.pt")
    info = {"args": {"seed": 3, "teachers": ["../a"], "run_dir": None}, "updates": 7, "scores": {"A": -1.5}}
    model.save_model(path, net, **info)
    loaded, found = load_model(path)
    assert found.pop("origin").keys() == {"commit", "versions", "command", "card"}
    assert found == info and loaded.config == TINY and not loaded.training
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert equal(loaded.state_dict().values(), net.state_dict().values())
    assert sorted(os.listdir(tmp_path)) == ["model.md", "model.pt"]


def test_the_model_card_says_what_it_is_and_how_it_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = {"seed": 3, "exp_name": "xtra", "eval_episodes": 16, "eval_max_frames": 400, "num_simulations": 50}
    origin = {"commit": "abc1234+", "versions": {"torch": "2.13"}, "command": "python finetune.py", "card": "a CPU"}
    info = {"args": args, "env_ids": ["Krull", "Hero"], "updates": 7, "env_steps": 0, "scores": {"Krull": -1.5}}
    info |= {"data": {"Hero": "0a1b"}, "pretrained_on": {"Hero": "2c", "Pong": "3d"}}
    model.save_model("model.pt", tiny_net(), **info)
    card = model.model_card(info | {"origin": origin})
    rows = ["# xtra: Krull", "| command | `python finetune.py` |", "| commit | abc1234+ |", "| hardware | a CPU |"]
    rows += ["| versions | torch 2.13 |", "| seed | 3 |", "| updates | 7 |", "| environment steps of its own | 0 |"]
    rows += ["| offline data, sha256 | Hero 0a1b |", "| pretrained on data, sha256 | Hero 2c, Pong 3d |"]
    assert set(rows) | {"| Krull | -1.5 |"} <= set(card.splitlines()) and "MIT" in card
    assert "16 games, seeds 0 to 15" in card and "the most visited action of 50 simulations, cut at\n400 frames" in card
    args["num_simulations"] = 0
    assert "the most probable action," in model.model_card(info | {"origin": origin})
    code = (tmp_path / "model.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code)
    assert capsys.readouterr().out.startswith("{'Krull': -1.5}") and len(code.splitlines()) == 5


def test_the_commit_is_that_of_the_checkout_and_unknown_without_one(tmp_path, monkeypatch):
    def git(words):
        return subprocess.check_output(["git", *words.split()], cwd=tmp_path, text=True).strip()

    (tmp_path / "model.py").write_text("first\n")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm first"):
        git(words)
    head = git("rev-parse HEAD")[:7]
    monkeypatch.setenv("GIT_DIR", "elsewhere")  # of a hook of another repository
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    monkeypatch.setattr(sys, "argv", ["/x/finetune.py", "--gamma", "1", "--resume"])
    origin = model.code_origin.__wrapped__()
    assert origin["commit"] == head and origin["command"] == "python finetune.py --gamma 1"
    (tmp_path / "notes.txt").write_text("")
    assert model.code_origin.__wrapped__()["commit"] == head
    (tmp_path / "my_finetune.py").write_text("")  # a fork that is not committed
    assert model.code_origin.__wrapped__()["commit"] == f"{head}+"
    monkeypatch.setattr(model, "__file__", "/nowhere/model.py")
    assert model.code_origin.__wrapped__()["commit"] == "unknown"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda f: f["config"].update(depth=3), "depth differ"),
        (lambda f: f["config"].update(predictor_hidden=9), "predictor.0.weight, predictor.0.bias, predictor.1.weight"),
        (lambda f: f["model"].update({"predictor.0.weight": torch.zeros(10, 17)}), "predictor.0.weight differ"),
        (lambda f: f["model"].pop("predictor.0.weight"), "predictor.0.weight differ"),
        (lambda f: f.clear(), "representation.layers.0.weight, "),  # a checkpoint.pt, for instance
    ],
)
def test_a_network_that_does_not_fit_is_refused_with_its_first_names(tmp_path, change, names):
    path = str(tmp_path / "model.pt")
    model.save_model(path, tiny_net())
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    assert f"{path} does not fit model.py: {names}" in stop_message(load_model, path)


def test_a_field_of_the_config_that_is_newer_than_the_file_has_its_default(tmp_path):
    path = str(tmp_path / "model.pt")
    model.save_model(path, tiny_net())
    content = torch.load(path, weights_only=True)
    del content["config"]["activation"]
    torch.save(content, path)
    assert load_model(path)[0].config == TINY


def test_a_missing_file_is_one_line(tmp_path):
    assert f"{tmp_path}/data.npz not found" in stop_message(model.load_file, f"{tmp_path}/data.npz")


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    """Also where the disk says only at the end that it is full: the new file takes the name after that."""
    full_disk = OSError(28, "No space left on device")
    (tmp_path / "file").write_bytes(b"the old content")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=full_disk))
    with pytest.raises(OSError, match="No space") as error, model.whole_file(f"{tmp_path}/file") as file:
        file.write(b"half of the new ")
        if failing == "write":
            raise full_disk
    assert f"{tmp_path}/file" in error.value.__notes__[0]
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"the old content")]
