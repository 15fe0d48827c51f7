"""What makes training fast must not change it: parts of a search, bfloat16, torch.compile, recorded kernels."""

import functools
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from test_mcts import World, random_legal, same
from test_model import equal, some_obs, tiny_net

import mcts
import model
from finetune import Batch, transfer_learn, unroll_loss

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
LEGAL = np.arange(18) % 3 > 0
COEFFICIENTS = {"value_prefix": 1.0, "policy": 1.0, "value": 0.25, "consistency": 2.0}
SETTINGS = {"coefficients": COEFFICIENTS, "sizes": [4, 2, 2], "paper_loss": False}


class OnGpu(torch.Tensor):
    is_cuda = True  # it says so and is not, and `Search` takes the way of a GPU


def some_batch(seed=0, device="cpu", B=8, K=1):
    g = torch.Generator().manual_seed(seed)
    shapes = [(12, 96, 96), (3 * K + 9, 96, 96), (K,), (K + 1,), (K + 1, 18), (K + 1,), (K,), ()]
    batch = Batch(*[torch.rand(B, *shape, generator=g).to(device) for shape in shapes])
    return batch._replace(action=(18 * batch.action).long(), mask=batch.mask.round())


def test_a_search_in_two_parts_of_padded_size_is_the_search(monkeypatch):
    """A part that got roots, noise, seeds or answers of the other, or of the search before, would act otherwise."""
    world, gpu, nodes = World(5), World(5), mcts.NodeStates
    monkeypatch.setattr(mcts, "PARALLEL_MIN_ROOTS", 20)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one thread for the trees: several are compiled anew
    monkeypatch.setattr(mcts, "NodeStates", lambda net, like, *args: nodes(net, like.as_subclass(torch.Tensor), *args))
    gpu.search_root = lambda obs: (world.encode(obs).as_subclass(OnGpu), world.value[obs], world.logits[obs])
    search = mcts.Search(gpu, 12, 40, record=lambda simulate: simulate)
    for i, n in enumerate((40, 33, 3, 17, 1, 40)):
        args = torch.arange(i, i + n), random_legal(n, 5, seed=i)
        expected = mcts.Search(world, 12, n)(*args, np.random.default_rng(i), True)
        assert same(search(*args, np.random.default_rng(i), True), expected)
    assert [sorted(part.recorded) for part in search.halves] == [[10, 20], [10, 20]]  # each size is recorded once


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_search_in_bfloat16_is_close_to_float32(device):
    obs, net = some_obs(16), model.inference_copy(tiny_net().to(device))
    expected = mcts.Search(model.inference_copy(tiny_net()), 10, 16)(obs, LEGAL, np.random.default_rng(0), True)
    if device == "cpu":
        net.search_root = lambda x: type(net).search_root(net, x.as_subclass(torch.Tensor))
        obs = obs.as_subclass(OnGpu)
    found = mcts.Search(net, 10, 16)(obs.to(device), LEGAL, np.random.default_rng(0), True)
    assert 0 < np.abs(found.value / expected.value - 1).max() < 0.03  # bfloat16 has steps of 0.004
    assert np.abs(found.policy - expected.policy).sum(1).mean() < 0.4  # of 2; another network's is 1.5


def test_compiled_networks_learn_the_same_also_beside_a_measurement_and_copies():
    results = []
    for compiled in (False, True):
        net = tiny_net()
        if compiled:
            for network in net.children():
                network.compile(dynamic=False, backend="aot_eager")  # kernels built in C++ take two minutes
        said = []
        for seed, stance in enumerate(["default", "force_eager", "default"]):
            with torch.compiler.set_stance(stance):
                measure = stance == "force_eager"
                said += transfer_learn(net, unroll_loss, some_batch(seed), torch.ones(2), **SETTINGS, measure=measure)
        copied = model.inference_copy(net).search_root(some_obs(2))
        results.append([said, copied, [parameter.grad for parameter in net.parameters()], net.state_dict()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_each_network_is_compiled_and_none_again():
    """torch.compile skips what it cannot trace without a word. With gradients and without are two graphs."""
    net, graphs = tiny_net(), []
    for name, network in net.named_children():
        network.compile(dynamic=False, backend=lambda graph, _, name=name: graphs.append(name) or graph.forward)
    for seed in range(2):
        transfer_learn(net, unroll_loss, some_batch(seed, K=2), torch.ones(2), **SETTINGS)
    assert sorted(graphs) == sorted(2 * ["representation", "dynamics", "prediction", "projector"] + ["predictor"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_gradients_of_h_in_channels_last_order_are_those_of_the_other_order(device):
    """On a GPU torch 2.11 has another, wrong one for a pool that pads (pytorch/pytorch#188344)."""
    obs = torch.rand(8, 12, 96, 96).to(device)
    gradients = []
    for order in (torch.contiguous_format, torch.channels_last):
        net = tiny_net().representation.double().to(device, memory_format=order)
        net(obs.double().to(memory_format=order)).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert not any(pool.padding for pool in net.modules() if isinstance(pool, torch.nn.AvgPool2d))


def test_a_recording_gets_the_inputs_of_each_call(monkeypatch):
    """On a stand-in for a CUDA graph, which calls the function again with the tensors that it was recorded with."""

    def function(batch, eta):
        return batch.obs * eta, batch.value + eta

    recorded = model.Recorded(Mock(side_effect=function))
    replay = Mock(side_effect=lambda: torch._foreach_copy_(recorded.results, function(*recorded.inputs)))
    monkeypatch.setattr(torch, "cuda", MagicMock(CUDAGraph=lambda: Mock(replay=replay)))
    monkeypatch.setattr(model.Recorded, "stream", None)
    batches = [some_batch(seed) for seed in range(5)]
    for seed, batch in enumerate(batches):
        assert equal(recorded(batch, torch.tensor(seed)), function(batch, torch.tensor(seed)))
    assert all(equal(batch, some_batch(seed)) for seed, batch in enumerate(batches))  # still the caller's tensors
    assert recorded.function.call_count == 3 and replay.call_count == 3  # two ordinary calls, and the recorded one


@needs_cuda
def test_recorded_and_compiled_updates_are_the_updates(monkeypatch):
    """Also after an ordinary pass, which measures the cosines between two replays and must not use their memory."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runs = []
    for compiled, error in ((False, 0), (False, 0.3), (True, 0.7)):
        net, losses = tiny_net().to("cuda", memory_format=torch.channels_last), []
        for network in net.children() if compiled else []:
            network.compile(dynamic=False)
        start = torch.cat([x.detach().flatten() for x in net.parameters()])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, fused=True)
        learn = functools.partial(transfer_learn, net, unroll_loss, **SETTINGS)
        learn = model.Recorded(learn) if runs else learn
        for seed in range(7):
            batch, eta = some_batch(seed, "cuda"), torch.tensor([seed / 7, 1.0], device="cuda")
            if seed == 5:
                with torch.compiler.set_stance("force_eager"):
                    transfer_learn(net, unroll_loss, batch, eta, **SETTINGS, measure=True)
            losses.append(learn(batch, eta)[0].item())
            optimizer.step()
        runs.append((losses, torch.cat([x.detach().flatten() for x in net.parameters()]) - start))
        np.testing.assert_allclose(losses, runs[0][0], rtol=0.02)
        assert (runs[-1][1] - runs[0][1]).norm() <= error * runs[0][1].norm()  # bfloat16 alone, on a CPU: 0.6
    assert learn.graph is not None and len(set(losses)) == 7


@needs_cuda
def test_a_recorded_search_is_the_search_also_with_other_weights_and_fewer_roots():
    search = mcts.Search(model.inference_copy(tiny_net().cuda()), 20, 600, record=model.Recorded)  # two parts
    for seed, n in enumerate((600, 600, 520, 600, 555)):
        model.refresh(search.net, tiny_net(seed).cuda())
        obs = some_obs(n, seed).cuda()
        expected = mcts.Search(search.net, 20, n)(obs, LEGAL, np.random.default_rng(seed), True)
        found = search(obs, LEGAL, np.random.default_rng(seed), True)
        np.testing.assert_allclose(found.value, expected.value, rtol=0.05, atol=0.05)
        assert np.abs(found.policy - expected.policy).sum(1).mean() < 0.4  # of 2; another network's is 1.5
    assert all(recorded.graph for part in search.halves for recorded in part.recorded.values())
