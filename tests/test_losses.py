"""The loss against a second computation in numpy, its gradients, the weighting of the tasks, and the schedules."""

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finetune
import model
import pretrain_teacher
from distill import cloning_loss
from finetune import combine_losses, gradient_cosines, select_actions, temperature_at
from model import EfficientZeroNet, ModelConfig, cross_entropy
from pretrain_teacher import Batch, learning_rate_at, unroll_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(
    channels=8, head_channels=4, head_hidden=8, lstm_size=12, projector_hidden=20, projector_out=16, predictor_hidden=10
)


def tiny_net(seed=0):
    """In eval mode, so that samples do not influence each other; no layer is zero."""
    torch.manual_seed(seed)
    net = EfficientZeroNet(TINY)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.6)
    for parameter in net.dynamics.lstm.parameters():
        nn.init.normal_(parameter, std=0.5)  # so that its state matters
    return net.eval()


def some_batch(B=3, K=3, seed=0):
    """Random targets; sample 0 has all K steps, sample 1 one step, sample 2 two."""
    rng = np.random.default_rng(seed)
    arrays = {
        "mask": np.arange(K + 1) <= np.array([K, 1, 2] + [K] * (B - 3))[:B, None],
        "policy": rng.dirichlet(np.ones(18), (B, K + 1)),
        "value": rng.normal(0, 20, (B, K + 1)),
        "value_prefix": rng.integers(-4, 5, (B, K)),
        "weight": rng.uniform(0.1, 1, B),
    }
    tensors = {name: torch.as_tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    return Batch(
        obs=torch.as_tensor(rng.random((B, 12, 96, 96)), dtype=torch.float32),
        target_obs=torch.as_tensor(rng.random((B, 3 * (K + 3), 96, 96)), dtype=torch.float32),
        action=torch.as_tensor(rng.integers(18, size=(B, K))),
        **tensors,
    )


# ---- the terms, in numpy


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def two_hot(x):
    """The code of h(x) on 601 atoms, one number after the other."""
    codes = np.zeros((len(x), 601))
    for i, number in enumerate(x):
        y = np.sign(number) * (np.sqrt(abs(number) + 1) - 1) + 0.001 * number
        low = int(np.floor(y))
        codes[i, 300 + low] += 1 - (y - low)
        codes[i, 301 + low] += y - low
    return codes


def expected_terms(net, batch):
    """Each term [B] of the loss, and the scalar root value [B], in float64."""
    B, K = batch.action.shape
    logs, cosines = [], []  # of the steps: value prefix (None at 0), policy, value
    with torch.no_grad():
        latent, policy, value = net.initial_inference(batch.obs)
        state = (torch.zeros(B, 12), torch.zeros(B, 12))
        logs.append((None, policy, value))
        for k in range(1, K + 1):
            latent, state, *logits = net.recurrent_inference(latent, batch.action[:, k - 1], state)
            logs.append(logits)
            online = net.predictor(net.projector(latent)).double().numpy()
            seen = batch.target_obs[:, 3 * (k - 1) : 3 * (k - 1) + 12]  # o_t+k-3 .. o_t+k
            target = net.projector(net.representation(seen)).double().numpy()
            norms = np.linalg.norm(online, axis=1) * np.linalg.norm(target, axis=1)
            cosines.append((online * target).sum(1) / norms)
            if k % 5 == 0:
                state = (torch.zeros(B, 12), torch.zeros(B, 12))
    logs = [[None if x is None else log_softmax(x.double().numpy()) for x in step] for step in logs]
    mask, policy, value, prefix = (x.double().numpy() for x in batch[3:7])
    terms = {
        "value_prefix": -sum(mask[:, k] * (two_hot(prefix[:, k - 1]) * logs[k][0]).sum(1) for k in range(1, K + 1)),
        "policy": -sum(mask[:, k] * (policy[:, k] * logs[k][1]).sum(1) for k in range(K + 1)),
        "value": -sum(mask[:, k] * (two_hot(value[:, k]) * logs[k][2]).sum(1) for k in range(K + 1)),
        "consistency": -sum(mask[:, k] * cosines[k - 1] for k in range(1, K + 1)),
    }
    expectation = (np.exp(logs[0][2]) * np.arange(-300, 301)).sum(1)  # of the transformed root value
    root = (np.sqrt(1 + 0.004 * (np.abs(expectation) + 1.001)) - 1) / 0.002
    return terms, np.sign(expectation) * (root**2 - 1)


@pytest.mark.parametrize("K", [3, 7])  # 7: the LSTM starts again after 5 steps
def test_each_term_is_what_numpy_says(K):
    net, batch = tiny_net(), some_batch(K=K)
    terms = unroll_loss(net, batch)[1]
    expected, _ = expected_terms(net, batch)
    assert list(terms) == list(expected)
    for name, term in terms.items():
        assert term.shape == (3,)
        np.testing.assert_allclose(term.detach().numpy(), expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_total_is_the_weighted_sum():
    total, terms, _ = unroll_loss(tiny_net(), some_batch())
    expected = terms["value_prefix"] + terms["policy"] + 0.25 * terms["value"] + 2 * terms["consistency"]
    torch.testing.assert_close(total, expected)


def test_the_priority_is_the_error_of_the_root_value():
    net, batch = tiny_net(), some_batch()
    root_value = expected_terms(net, batch)[1]
    expected = np.abs(root_value - batch.value[:, 0].numpy()) + 1e-6
    priority = unroll_loss(net, batch)[2]
    np.testing.assert_allclose(priority.numpy(), expected, rtol=1e-3)
    assert not priority.requires_grad


def test_a_new_network_gives_a_zero_target_the_least_priority():
    batch = some_batch()
    priority = unroll_loss(EfficientZeroNet(TINY), batch._replace(value=torch.zeros(3, 4)))[2]
    np.testing.assert_allclose(priority.numpy(), 1e-6)


def test_the_loss_of_a_new_network():
    total, terms, _ = unroll_loss(EfficientZeroNet(TINY), some_batch())
    # uniform policies and values: log 18 and log 601 at each of the 1 + (3, 1, 2) policies and values; prefixes 3, 1, 2
    np.testing.assert_allclose(terms["policy"].detach(), np.log(18) * np.array([4, 2, 3]), rtol=1e-5)
    np.testing.assert_allclose(terms["value"].detach(), np.log(601) * np.array([4, 2, 3]), rtol=1e-5)
    np.testing.assert_allclose(terms["value_prefix"].detach(), np.log(601) * np.array([3, 1, 2]), rtol=1e-5)


def test_all_zero_policy_targets_cost_nothing():
    net, batch = tiny_net(), some_batch()
    policy = batch.policy.clone()
    policy[:, 2:] = 0  # terminal from step 2 on
    less = unroll_loss(net, batch._replace(policy=policy))[1]["policy"]
    alone = unroll_loss(net, batch._replace(policy=policy, mask=batch.mask * torch.tensor([1, 1, 0, 0])))[1]["policy"]
    torch.testing.assert_close(less, alone)
    assert (unroll_loss(net, batch._replace(policy=torch.zeros_like(policy)))[1]["policy"] == 0).all()


def test_consistency_lies_between_minus_1_and_1_per_step():
    for seed in range(3):
        batch = some_batch(K=1, seed=seed)
        consistency = unroll_loss(tiny_net(seed), batch)[1]["consistency"]
        assert (consistency.abs() <= 1 + 1e-6).all()
    # a predictor that gives the target back agrees with it fully: the online latent is made the target's
    net = tiny_net()
    net.predictor = nn.Identity()
    net.projector = nn.Sequential(nn.Flatten(), constant := nn.Linear(288, 16))
    nn.init.zeros_(constant.weight)
    mask = torch.ones(3, 4)
    consistency = unroll_loss(net, some_batch()._replace(mask=mask))[1]["consistency"]
    np.testing.assert_allclose(consistency.detach(), -3, rtol=1e-5)  # -1 at each of 3 steps


# ---- masks


def test_targets_at_masked_steps_do_not_matter():
    net, batch = tiny_net(), some_batch()
    loss = unroll_loss(net, batch)
    off = batch.mask == 0
    changed = batch._replace(
        policy=torch.where(off[..., None], 7.0, batch.policy),
        value=torch.where(off, 99.0, batch.value),
        value_prefix=torch.where(off[:, 1:], -9.0, batch.value_prefix),
        action=torch.where(off[:, 1:], 3, batch.action),
    )
    assert off.sum() == 3 and not torch.equal(changed.value, batch.value)
    other = unroll_loss(net, changed)
    torch.testing.assert_close(other[0], loss[0])
    torch.testing.assert_close(other[2], loss[2])
    # while at a step that exists they do
    assert (unroll_loss(net, batch._replace(value=batch.value + 1))[0] != loss[0]).all()


def test_masked_steps_give_no_gradient():
    batch = some_batch(K=2)
    batch = batch._replace(mask=torch.tensor([[1.0, 0, 0]]).repeat(3, 1))
    net = tiny_net()
    unroll_loss(net, batch)[0].sum().backward()
    for name, part in net.named_children():
        used = any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
        assert used == (name in ("representation", "prediction")), name


# ---- where the gradient goes


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_losses_of_step_k_reach_the_root_with_a_factor_of_half_to_the_k(monkeypatch, k):
    batch = some_batch()
    policy = torch.zeros_like(batch.policy)
    policy[:, k] = batch.policy[:, k]  # an all-zero target costs nothing: only step k is left
    batch = batch._replace(policy=policy, mask=torch.ones(3, 4))

    def gradients():  # at the root latent and in the policy head's last layer
        net, latents = tiny_net(), []
        net.representation.register_forward_hook(lambda module, inputs, output: latents.append(output))
        loss = unroll_loss(net, batch)[1]["policy"].sum()
        return torch.autograd.grad(loss, [latents[0], net.prediction.policy[-1].weight])

    halved = gradients()
    monkeypatch.setattr(model, "scale_gradient", lambda x, factor: x)
    whole = gradients()
    assert whole[0].abs().max() > 1e-5
    torch.testing.assert_close(halved[0], whole[0] * 0.5**k, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(halved[1], whole[1])  # the head itself gets all of it


@pytest.mark.parametrize("term", ["value_prefix", "value", "consistency"])
def test_each_term_is_halved_once_by_the_first_step(monkeypatch, term):
    batch = some_batch(K=1)
    batch = batch._replace(mask=torch.ones(3, 2))

    def root_gradient():
        net, latents = tiny_net(), []
        net.representation.register_forward_hook(lambda module, inputs, output: latents.append(output))
        loss = unroll_loss(net, batch)[1][term]
        if term == "value":  # without the root's own value loss, which is not halved
            logits = net.prediction(latents[0])[1]
            loss = loss - cross_entropy(logits, model.scalar_to_support(batch.value, 300)[:, 0])
        return torch.autograd.grad(loss.sum(), latents[0])[0]

    halved = root_gradient()
    monkeypatch.setattr(model, "scale_gradient", lambda x, factor: x)
    whole = root_gradient()
    assert whole.abs().max() > 1e-6
    torch.testing.assert_close(halved, whole * 0.5, rtol=1e-3, atol=1e-6)


def test_no_gradient_flows_through_the_target_branch():
    net, batch = tiny_net(), some_batch()
    target_obs = batch.target_obs.clone().requires_grad_()
    consistency = unroll_loss(net, batch._replace(target_obs=target_obs))[1]["consistency"].sum()
    assert torch.autograd.grad(consistency, target_obs, allow_unused=True) == (None,)

    # the same cosine with a target that is a constant has the same gradient in the projector
    projector = list(net.projector.parameters())
    whole = torch.autograd.grad(unroll_loss(net, batch)[1]["consistency"].sum(), projector)
    with torch.no_grad():
        stacks = [batch.target_obs[:, 3 * k - 3 : 3 * k + 9] for k in (1, 2, 3)]
        targets = [net.projector(net.representation(stack)) for stack in stacks]
    latent = net.representation(batch.obs)
    state, loss = net.initial_lstm_state(3, latent), 0
    for k in (1, 2, 3):
        latent, state, _ = net.dynamics(latent, batch.action[:, k - 1], state)
        online = net.predictor(net.projector(latent))
        loss = loss - (batch.mask[:, k] * F.cosine_similarity(online, targets[k - 1], dim=-1)).sum()
    for x, y in zip(whole, torch.autograd.grad(loss, projector), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_batch_norms_see_the_batches_that_the_reference_shows_them():
    net = tiny_net().train()
    unroll_loss(net, some_batch(K=2))
    seen = {
        name: {int(module.num_batches_tracked) for module in part.modules() if hasattr(module, "num_batches_tracked")}
        for name, part in net.named_children()
    }
    # root and 2 targets; 2 steps; root and (step, target) twice; (online, target) twice; online twice
    assert seen == {"representation": {3}, "dynamics": {2}, "prediction": {5}, "projector": {4}, "predictor": {2}}


# ---- small losses


def test_cross_entropy_is_what_numpy_says_in_any_type():
    rng = np.random.default_rng(0)
    logits, probs = rng.normal(0, 3, (5, 7)), rng.dirichlet(np.ones(7), 5)
    expected = -(probs * log_softmax(logits)).sum(1)
    loss = cross_entropy(torch.tensor(logits), torch.tensor(probs, dtype=torch.float32))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # certain of class 1 of 3: log(1 + 2 e^-20); certain of another: 20
    logits = torch.tensor([[0.0, 20.0, 0.0]], dtype=torch.bfloat16)
    assert cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]])).item() < 1e-6
    assert cross_entropy(logits, torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(20)
    assert cross_entropy(logits, torch.zeros(1, 3)).item() == 0


def test_behaviour_cloning_is_the_cross_entropy_of_the_action():
    net, batch = tiny_net(), some_batch()
    loss, terms, priority = cloning_loss(net, batch)
    with torch.no_grad():
        logs = log_softmax(net.initial_inference(batch.obs)[1].double().numpy())
    expected = [-logs[i, action] for i, action in enumerate(batch.action[:, 0].tolist())]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)
    assert list(terms) == ["policy"] and (priority == 1).all()


# ---- weights of the tasks


@pytest.mark.parametrize(
    "eta, released, paper", [((1, 1, 1, 1), 1.0, 5), ((0, 0, 0, 0), 0.5, 1), ((1, 0, 0, 0), 0.625, 2)]
)
def test_combine_losses(eta, released, paper):
    # all losses 1, m = 4: 1/2 * (1 + sum(eta) / 4); paper: 1 + sum(eta)
    losses = torch.tensor(1.0), torch.ones(4), torch.tensor(eta, dtype=torch.float32)
    assert combine_losses(*losses, paper_loss=False).item() == released
    assert combine_losses(*losses, paper_loss=True).item() == paper


def test_combine_losses_pairs_each_task_with_its_weight():
    losses = torch.tensor(3.0), torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.1])
    assert combine_losses(*losses, paper_loss=False).item() == pytest.approx(0.5 * (3 + (0.5 + 1) / 2))
    assert combine_losses(*losses, paper_loss=True).item() == pytest.approx(3 + 0.5 + 1)


@pytest.mark.parametrize("paper_loss", [True, False])
def test_without_offline_games_the_loss_is_the_targets(paper_loss):
    assert combine_losses(torch.tensor(3.0), torch.zeros(0), torch.ones(0), paper_loss).item() == 3


def linear_losses(target, tasks):
    """Losses whose gradients are the given vectors, split over two parameters."""
    parameters = [nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor([[0.1], [-0.2]]))]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    task_losses = torch.stack([(torch.tensor(task) * flat).sum() for task in tasks])
    return (torch.tensor(target) * flat).sum(), task_losses, parameters


def test_gradient_cosines_of_parallel_opposite_and_orthogonal_gradients():
    losses = linear_losses([1.0, 2.0, 2.0], [[2.0, 4.0, 4.0], [-1.0, -2.0, -2.0], [2.0, -2.0, 1.0], [2.0, 0.0, 0.0]])
    # the last: <(1, 2, 2), (2, 0, 0)> / (3 * 2) = 1/3
    torch.testing.assert_close(gradient_cosines(*losses), torch.tensor([1.0, -1.0, 0.0, 1 / 3]))


def test_gradient_cosines_clamp_each_element_to_5():
    losses = linear_losses([30.0, 4.0, 0.0], [[4.0, 3.0, 0.0], [0.0, -4.0, -90.0]])
    # (5, 4, 0) with (4, 3, 0): 32 / (sqrt(41) * 5), unclamped 132 / (sqrt(916) * 5) = 0.87
    # (5, 4, 0) with (0, -4, -5): -16 / 41, unclamped -16 / (sqrt(916) * 90.1) = -0.006
    torch.testing.assert_close(gradient_cosines(*losses), torch.tensor([32 / (41**0.5 * 5), -16 / 41]))


def test_gradient_cosines_change_no_parameter_and_no_gradient():
    target, tasks, parameters = linear_losses([1.0, 2.0, 2.0], [[1.0, 0.0, 0.0]])
    parameters.append(unused := nn.Parameter(torch.tensor([7.0])))  # counts as a gradient of zero
    parameters[0].grad = torch.tensor([9.0])
    before = [parameter.detach().clone() for parameter in parameters]
    torch.testing.assert_close(gradient_cosines(target, tasks, parameters), torch.tensor([1 / 3]))
    assert all(torch.equal(x, y) for x, y in zip(before, parameters, strict=True))
    assert parameters[0].grad.item() == 9 and parameters[1].grad is None and unused.grad is None
    target.backward()  # the graph is still there


def main_nodes(script):
    return ast.parse((ROOT / script).read_text()).body[-1].body


def measure(updates, cosines, **flags):
    """Runs the measuring block of finetune.py's main over range(updates) -> ({update: eta} where eta changes, scalars).

    cosines(updates) [m] stands for the gradients' cosines. The block is taken from the script's text, with the two
    statements before it and the loop that logs.
    """
    walked = [node for statement in main_nodes("finetune.py") for node in ast.walk(statement)]
    (body,) = [x.body for x in walked if isinstance(x, ast.While) and "transfer_gradients" in ast.unparse(x)]
    (i,) = [i for i, x in enumerate(body) if isinstance(x, ast.If) and "transfer_gradients" in ast.unparse(x)]
    code = compile(ast.Module(body[i - 2 : i + 1], []), "finetune.py", "exec")
    (log,) = [x for x in body if isinstance(x, ast.For) and "grad_cosine" in ast.unparse(x)]
    log = compile(ast.Module([log], []), "finetune.py", "exec")
    defaults = {name: getattr(finetune.Args, name) for name in vars(finetune.Args()) if hasattr(finetune.Args, name)}
    m = len(cosines(0))
    space = vars(finetune) | {
        "args": SimpleNamespace(**defaults | flags), "m": m, "device": "cpu", "env_ids": [f"Game{i}" for i in range(m)],
        "eta": torch.ones(m), "similar": torch.zeros(m), "measured": 0, "net": None, "batch": (), "parameters": None,
        "share": 2, "W": 1, "writer": SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar)),
    }  # fmt: skip
    scalars, changes, used = [], {}, []

    def transfer_gradients(net, parameters, batch, eta, loss_function, paper_loss, m, share, measure):
        assert loss_function is finetune.unroll_loss and measure and share == 2
        used.append(eta)
        return *range(5), torch.tensor(cosines(space["updates"]))

    def update(eta, *batch):
        used.append(eta)
        return *range(5), torch.zeros(m)

    space |= {"transfer_gradients": transfer_gradients, "update": update}
    for space["updates"] in range(updates):
        before = space["eta"]
        exec(code, space)
        assert used[-1] is space["eta"] and space["results"][:5] == (*range(5),)  # a new eta counts from its update on
        space["numbers"] = np.array([9.0, *space["results"][5].tolist(), 9.0, 9.0])  # priorities, cosines, loss, norm
        exec(log, space)
        if space["eta"] is not before:
            changes[space["updates"]] = space["eta"].tolist()
    assert len(used) == updates  # one pass each
    return changes, scalars


def test_eta_is_the_share_of_similar_gradients():
    def cosines(update):  # game 0: 120 of each 500 above 0.1; game 1: all but those; game 2: never; game 3: exactly 0.1
        return [0.2, 0.0, 0.09, 0.1] if update % 500 < 120 else [0.05, 0.3, -1.0, 0.1]

    changes, scalars = measure(15_600, cosines)
    # float32(0.1) > 0.1 as a Python number compares in float32: equal, so not above
    assert list(changes) == [10_500, 15_500]  # 500 measurements from 10,000 on, and from 15,000 on
    for eta in changes.values():
        assert eta == pytest.approx([0.24, 0.76, 0.0, 0.0])
    assert sorted({step for _, _, step in scalars}) == [*range(10_000, 10_500), *range(15_000, 15_500)]
    assert {key for key, _, _ in scalars} == {f"transfer/grad_cosine/Game{i}" for i in range(4)}


def test_eta_of_one_measurement_does_not_depend_on_the_one_before():
    changes, _ = measure(15_600, lambda update: [0.5] if update < 12_000 else [-0.5])
    assert changes == {10_500: [1.0], 15_500: [0.0]}


def test_eta_stays_1_without_task_weights():
    assert measure(15_600, lambda update: [-1.0], task_weights=False) == ({}, [])


def test_the_threshold_and_the_schedule_are_flags():
    flags = {"similarity_start": 20, "similarity_interval": 10, "similarity_updates": 4, "similarity_threshold": 0.6}
    changes, _ = measure(36, lambda update: [0.5 + 0.2 * (update % 10 < 3)], **flags)
    assert list(changes) == [24, 34] and changes[24] == changes[34] == [0.75]  # 0.7, 0.7, 0.7, 0.5


# ---- schedules


@pytest.mark.parametrize("update, rate", [(0, 0), (500, 0.1), (1_000, 0.2), (100_999, 0.2), (101_000, 0.02)])
def test_learning_rate(update, rate):
    assert learning_rate_at(update, 100_000, 0.2) == pytest.approx(rate, abs=1e-12)


def test_learning_rate_of_a_run_without_warm_up():
    assert learning_rate_at(0, 50, 0.2) == 0.2 and learning_rate_at(50, 50, 0.2) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "update, temperature", [(0, 1), (59_999, 1), (60_000, 0.5), (89_999, 0.5), (90_000, 0.25), (120_000, 0.25)]
)
def test_temperature(update, temperature):
    assert temperature_at(update, 100_000) == temperature


@pytest.mark.parametrize("script", ["pretrain_teacher.py", "distill.py", "finetune.py"])
def test_beta(script):
    walked = [node for statement in main_nodes(script) for node in ast.walk(statement)]
    (node,) = [x for x in walked if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "beta"]
    args = SimpleNamespace(total_timesteps=100_000, num_updates=100_000)
    for update, beta in {0: 0.4, 60_000: 0.7, 100_000: 0.9, 120_000: 1.0, 130_000: 1.0}.items():
        assert eval(ast.unparse(node.value), {"args": args, "updates": update}) == pytest.approx(beta)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.25])
def test_actions_are_drawn_in_proportion_to_the_sharpened_visits(temperature):
    visits = np.zeros((20_000, 18), np.int32)
    visits[:, [2, 5, 11, 17]] = [24, 12, 12, 2]
    actions = select_actions(visits, temperature, np.random.default_rng(0))
    counts = np.bincount(actions, minlength=18)
    probs = visits[0] ** (1 / temperature) / (visits[0] ** (1 / temperature)).sum()
    assert len(counts) == 18 and not counts[probs == 0].any()
    # 5 standard deviations of a binomial count
    assert (np.abs(counts - 20_000 * probs) <= 5 * np.sqrt(20_000 * probs * (1 - probs))).all()


def test_each_environment_gets_an_action_of_its_own():
    visits = np.zeros((3, 18), np.int32)
    visits[[0, 1, 2], [0, 17, 4]] = 50
    assert select_actions(visits, 0.25, np.random.default_rng(0)).tolist() == [0, 17, 4]


def test_no_unvisited_action_is_chosen_at_the_edges_of_the_draw():
    class Edge:
        def __init__(self, number):
            self.number = number

        def random(self, shape):
            return np.full(shape, self.number)

    visits = np.array([[0, 0, 30, 0, 20, 0]])
    # the generator draws from [0, 1): both ends
    assert select_actions(visits, 1.0, Edge(np.nextafter(1.0, 0.0))).tolist() == [4]
    assert select_actions(visits, 1.0, Edge(0.0)).tolist() == [2]


def test_pretraining_and_finetuning_share_the_loss():
    net, batch = tiny_net(), some_batch()
    assert torch.equal(pretrain_teacher.unroll_loss(net, batch)[0], finetune.unroll_loss(net, batch)[0])
