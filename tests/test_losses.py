"""The loss against a second computation in numpy, where its gradients go, the weighting of the tasks, schedules."""

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import model
from distill import cloning_loss, learn
from finetune import Transfer, combine_losses, gradient_cosines, short_name
from pretrain_teacher import Batch, learning_rate_at, unroll_loss

ROOT = Path(__file__).resolve().parent.parent
PAPER = {"value_prefix": 1.0, "policy": 1.0, "value": 0.25, "consistency": 2.0}
TINY = model.ModelConfig(
    channels=8, head_channels=4, head_hidden=8, lstm_size=12, projector_hidden=20, projector_out=16, predictor_hidden=10
)


def tiny_net(seed=0):
    """In eval mode, so that samples do not influence each other; no layer is zero."""
    torch.manual_seed(seed)
    net = model.EfficientZeroNet(TINY)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.6)
        if isinstance(module, model.StepNorm):
            nn.init.normal_(module.running_mean, std=0.1)  # so that the step matters
    for parameter in net.dynamics.lstm.parameters():
        nn.init.normal_(parameter, std=0.5)  # so that its state matters
    return net.eval()


def some_batch(B=3, K=3, seed=0):
    """Random targets; sample 0 has all K steps, sample 1 one step, sample 2 two."""
    rng = np.random.default_rng(seed)
    arrays = {
        "obs": rng.random((B, 12, 96, 96)),
        "target_obs": rng.random((B, 3 * (K + 3), 96, 96)),
        "mask": np.arange(K + 1) <= np.array([K, 1, 2] + [K] * (B - 3))[:B, None],
        "policy": rng.dirichlet(np.ones(18), (B, K + 1)),
        "value": rng.normal(0, 20, (B, K + 1)),
        "value_prefix": rng.integers(-4, 5, (B, K)),
        "weight": rng.uniform(0.1, 1, B),
    }
    tensors = {name: torch.as_tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    return Batch(action=torch.as_tensor(rng.integers(18, size=(B, K))), **tensors)


def expected_terms(net, batch):
    """Each term [B] in numpy, and the value [B] of the roots. The two-hot code has its tests in test_model.py."""
    B, K = batch.action.shape
    terms = {name: np.zeros(B) for name in PAPER}
    mask = batch.mask.numpy()
    value_code, prefix_code = (model.scalar_to_support(x, 300) for x in (batch.value, batch.value_prefix))

    def cross_entropy(logits, target):
        logits = logits.double().numpy()
        return -(target.numpy() * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1)

    latent, policy, value = net.initial_inference(batch.obs)
    root_value = model.support_to_scalar(value).numpy()
    lstm_state = net.initial_lstm_state(B, latent)
    terms["policy"] += cross_entropy(policy, batch.policy[:, 0])
    terms["value"] += cross_entropy(value, value_code[:, 0])
    for k in range(1, K + 1):
        action, step = batch.action[:, k - 1], torch.tensor([k])
        latent, lstm_state, prefix, policy, value = net.recurrent_inference(latent, action, lstm_state, step)
        lstm_state = net.initial_lstm_state(B, latent) if k in (5, 10) else lstm_state
        seen = batch.target_obs[:, 3 * (k - 1) : 3 * (k - 1) + 12]  # o_t+k-3 .. o_t+k
        x, y = net.predictor(net.projector(latent)).numpy(), net.projector(net.representation(seen)).numpy()
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        terms["value_prefix"] += mask[:, k] * cross_entropy(prefix, prefix_code[:, k - 1])
        terms["policy"] += mask[:, k] * cross_entropy(policy, batch.policy[:, k])
        terms["value"] += mask[:, k] * cross_entropy(value, value_code[:, k])
        terms["consistency"] -= mask[:, k] * cosine
    return terms, root_value


@pytest.mark.parametrize("K", [3, 7])  # 7: the LSTM starts again after 5 steps
@torch.no_grad()
def test_terms_total_and_priority_are_what_numpy_says(K):
    net, batch = tiny_net(), some_batch(K=K)
    expected, root_value = expected_terms(net, batch)
    for coefficients in (PAPER, {"value_prefix": 0.5, "policy": 3.0, "value": 0.0, "consistency": 0.1}):
        total, terms, priority = unroll_loss(net, batch, coefficients)
        for name, term in terms.items():
            np.testing.assert_allclose(term, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        weighted = sum(coefficients[name] * expected[name] for name in PAPER)
        np.testing.assert_allclose(total, weighted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(priority, np.abs(root_value - batch.value[:, 0].numpy()) + 1e-6, rtol=1e-3)


@torch.no_grad()
def test_a_new_network_is_uniform_and_gives_a_zero_target_the_least_priority():
    batch = some_batch()._replace(value=torch.zeros(3, 4))
    _, terms, priority = unroll_loss(model.EfficientZeroNet(TINY), batch, PAPER)
    np.testing.assert_allclose(priority, 1e-6)
    np.testing.assert_allclose(terms["policy"], np.log(18) * np.array([4, 2, 3]), rtol=1e-5)  # 1 + (3, 1, 2) states


def test_behaviour_cloning_is_the_mean_cross_entropy_of_the_actions():
    net, batch = tiny_net(), some_batch(K=1)
    logs = net.initial_inference(batch.obs)[1].log_softmax(-1)
    expected = -torch.stack([logs[i, action] for i, action in enumerate(batch.action[:, 0].tolist())])
    layer, mean = net.prediction.policy[-1], (batch.weight * expected).mean()
    gradient = torch.autograd.grad(mean, layer.weight, retain_graph=True)[0]
    loss, terms, priority = learn(net, cloning_loss, batch, coefficients=PAPER)
    torch.testing.assert_close((loss, terms, layer.weight.grad), (mean, {"policy": expected}, gradient))
    assert (priority == 1).all()


@pytest.mark.parametrize("term, k", [*zip(PAPER, (1, 1, 2, 2), strict=True), ("policy", 3)])
def test_the_loss_of_step_k_reaches_the_root_with_a_factor_of_half_to_the_k(monkeypatch, term, k):
    def root_gradient(mask):
        net, latents = tiny_net(), []
        net.representation.register_forward_hook(lambda module, inputs, output: latents.append(output))
        loss = unroll_loss(net, some_batch()._replace(mask=mask), PAPER)[1][term].sum()
        return torch.autograd.grad(loss, latents[0], materialize_grads=True)[0]

    def of_step_k():  # the root's own losses have no mask
        return root_gradient(torch.eye(4)[k].repeat(3, 1)) - root_gradient(torch.zeros(3, 4))

    halved = of_step_k()
    monkeypatch.setattr(model, "scale_gradient", lambda x, factor: x)
    whole = of_step_k()
    assert whole.abs().max() > 1e-6
    torch.testing.assert_close(halved, whole * 0.5**k, rtol=1e-3, atol=1e-6)


def test_masked_steps_give_no_gradient():
    net, batch = tiny_net(), some_batch(K=2)
    batch = batch._replace(mask=torch.tensor([[1.0, 0, 0]]).repeat(3, 1))
    unroll_loss(net, batch, PAPER)[0].sum().backward()
    for name, part in net.named_children():
        used = any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
        assert used == (name in ("representation", "prediction")), name


def test_the_target_of_the_consistency_gets_no_gradient():
    net, flows = tiny_net(), []
    net.projector.register_forward_hook(lambda module, inputs, output: flows.append(output.requires_grad))
    unroll_loss(net, some_batch(), PAPER)
    assert flows == 3 * [True, False]  # of each step: what the model predicts, what the encoder sees


def test_batch_norms_see_the_batches_that_the_reference_shows_them():
    """Those of h and of the SimSiam heads; those of g and f are in test_norm.py."""
    net = tiny_net().train()
    unroll_loss(net, some_batch(K=2), PAPER)
    seen = {
        name: {int(module.num_batches_tracked) for module in part.modules() if isinstance(module, _BatchNorm)}
        for name, part in net.named_children()
    }
    # root and 2 targets; (online, target) twice; online twice
    counts = {"representation": {3}, "projector": {4}, "predictor": {2}}
    assert seen == counts | {"dynamics": set(), "prediction": set()}


@pytest.mark.parametrize(
    "eta, released, paper", [([1, 1, 1, 1], 1, 5), ([0, 0, 0, 0], 0.5, 1), ([1, 0, 0, 0], 0.625, 2)]
)
def test_combine_losses(eta, released, paper):
    losses = torch.tensor(1.0), torch.ones(4), torch.tensor(eta)
    assert combine_losses(*losses, paper_loss=False).item() == released
    assert combine_losses(*losses, paper_loss=True).item() == paper


def linear_losses(target, tasks):
    """Losses whose gradients are the given vectors, split over two parameters."""
    parameters = [nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor([[0.1], [-0.2]]))]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    return (torch.tensor(target) * flat).sum(), [(torch.tensor(task) * flat).sum() for task in tasks], parameters


def test_gradient_cosines():
    # parallel, opposite, orthogonal, and <(1, 2, 2), (2, 0, 0)> / (3 * 2) = 1/3
    losses = linear_losses([1.0, 2.0, 2.0], [[2.0, 4.0, 4.0], [-1.0, -2.0, -2.0], [2.0, -2.0, 1.0], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient_cosines(*losses), torch.tensor([1.0, -1.0, 0.0, 1 / 3]))
    # each element is clamped to 5: <(5, 4, 0), (4, 3, 0)> = 32, and <(5, 4, 0), (0, -4, -5)> = -16
    losses = linear_losses([30.0, 4.0, 0.0], [[4.0, 3.0, 0.0], [0.0, -4.0, -90.0]])
    torch.testing.assert_close(gradient_cosines(*losses), torch.tensor([32 / (41**0.5 * 5), -16 / 41]))


def test_gradient_cosines_change_no_parameter_and_no_gradient():
    target, tasks, parameters = linear_losses([1.0, 2.0, 2.0], [[1.0, 0.0, 0.0]])
    parameters.append(nn.Parameter(torch.tensor([7.0])))  # unused: counts as a gradient of zero
    parameters[0].grad = torch.tensor([9.0])
    before = [parameter.detach().clone() for parameter in parameters]
    torch.testing.assert_close(gradient_cosines(target, tasks, parameters), torch.tensor([1 / 3]))
    assert all(torch.equal(x, y) for x, y in zip(before, parameters, strict=True))
    assert [parameter.grad for parameter in parameters] == [torch.tensor([9.0]), None, None]
    target.backward()  # the graph is still there


def etas(updates, cosine, **flags):
    """eta of each update, by these lines of finetune.py's main loop; cosine(update) is what a measurement gives."""
    source = (ROOT / "finetune.py").read_text()
    lines = source[
        source.index("            phase = update") : source.index("            numbers.append(number.clone())")
    ]
    code = compile(textwrap.dedent(lines), "finetune.py", "exec")
    space = {"args": SimpleNamespace(**vars(Transfer()) | flags), "m": 1, "samples": None, "games": [None, MagicMock()]}
    space |= {"eta": torch.ones(1), "similar": torch.zeros(1), "measured": 0, "writer": MagicMock(), "torch": torch}
    space["short_name"] = short_name
    space["update_batch"] = lambda samples, eta: (0, 0, None)
    space["measure_batch"] = lambda samples, eta: (0, 0, torch.tensor([cosine(space["update"])]))
    found = []
    for space["update"] in range(updates):
        exec(code, space)
        found.append(space["eta"].item())
    return found


def test_eta_is_the_share_of_similar_gradients_of_the_last_measurement():
    # 500 measurements from update 10,000 on, 120 of them above 0.1 (0.1 itself is not), and again from 15,000 on
    found = etas(15_600, lambda update: 0.2 if 9_999 < update < 10_120 else 0.1)
    assert found == pytest.approx(10_500 * [1] + 5_000 * [120 / 500] + 100 * [0])
    flags = {"similarity_start": 20, "similarity_interval": 10, "similarity_updates": 4, "similarity_threshold": 0.6}
    assert etas(30, lambda update: 0.5 + 0.2 * (update < 23), **flags) == 24 * [1] + 6 * [0.75]
    assert etas(30, lambda update: -1.0, **flags, task_weights=False) == 30 * [1]


@pytest.mark.parametrize("update, rate", [(0, 0), (500, 0.1), (1_000, 0.2), (100_999, 0.2), (101_000, 0.02)])
def test_learning_rate(update, rate):
    assert learning_rate_at(update, 100_000, 0.2) == pytest.approx(rate, abs=1e-12)
    assert learning_rate_at(0, 50, 0.2) == 0.2  # a run too short for a warm-up


@pytest.mark.parametrize("script", ["pretrain_teacher.py", "distill.py", "finetune.py"])
def test_beta(script):
    (formula,) = re.findall(r"^ +beta = (.+)$", (ROOT / script).read_text(), re.MULTILINE)
    args = SimpleNamespace(num_updates=100_000, priority_beta=0.4)
    for updates, beta in {0: 0.4, 60_000: 0.7, 100_000: 0.9, 120_000: 1.0, 130_000: 1.0}.items():
        names = {"args": args, "updates": updates, "online_updates": 100_000}
        assert eval(formula, names) == pytest.approx(beta)
