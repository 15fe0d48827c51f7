"""What makes training fast must not change it: parts of a search, bfloat16, torch.compile, recorded kernels."""

import functools

import numpy as np
import pytest
import recording
import torch
from test_mcts import World, random_legal, same
from test_model import equal, some_obs, tiny_net

import mcts
import model
from finetune import Batch, Replay, transfer_learn, unroll_loss, update_net

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


def in_two_parts(monkeypatch):  # a search of 40 roots whose latents say that they are on a GPU
    nodes = mcts.NodeStates
    monkeypatch.setattr(mcts, "PARALLEL_MIN_ROOTS", 20)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one thread for the trees: several are compiled anew
    monkeypatch.setattr(mcts, "NodeStates", lambda net, like, *args: nodes(net, like.as_subclass(torch.Tensor), *args))


def test_a_search_in_two_parts_of_padded_size_is_the_search(monkeypatch):
    """A part that got roots, noise, seeds or answers of the other, or of the search before, would act otherwise."""
    in_two_parts(monkeypatch)
    world, gpu = World(5), World(5)
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
    recording.patch(monkeypatch)

    def function(batch, eta):
        calls.append(None)
        return batch["obs"] * eta, batch["value"] + eta

    calls, recorded = [], model.Recorded(function)
    batches = [some_batch(seed)._asdict() for seed in range(5)]
    for seed, batch in enumerate(batches):
        assert equal(recorded(batch, torch.tensor(seed)), (batch["obs"] * seed, batch["value"] + seed))
    assert all(equal(batch.values(), some_batch(seed)) for seed, batch in enumerate(batches))  # still the caller's
    assert len(calls) == 3  # two ordinary calls, and the recorded one


def some_samples(seed, K, device):
    """As of `take_samples`, from rows 0 to 99."""
    batch, g = some_batch(seed, K=K), torch.Generator().manual_seed(seed)
    samples = batch._asdict() | {"frames": torch.randint(0, 100, (8, K + 4), generator=g)}
    return {name: x.to(device) for name, x in samples.items() if name not in ("obs", "target_obs")}


def updates(wrap, device, measuring, compiled=False, K=2, n=20):
    """n updates of different data, rates and weights of tasks, those in `measuring` ordinary ones -> numbers and
    cosines of each, the change of all parameters, momentum, batch norm statistics, the generator's state."""
    net, generator = tiny_net().to(device, memory_format=torch.channels_last).train(), torch.Generator(device)
    for network in net.children() if compiled else []:
        network.compile(dynamic=False)
    replay = Replay(100, device)
    replay.frames[:] = torch.randint(0, 256, (100, 3, 96, 96), generator=torch.Generator().manual_seed(9)).to(device)
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, fused=True)
    learn_batch = functools.partial(transfer_learn, net, unroll_loss, **SETTINGS)
    measure_batch = functools.partial(learn_batch, measure=True)
    steps = [replay, generator.manual_seed(1), optimizer, 0.5]
    update_batch = wrap(functools.partial(update_net, *steps, learn_batch), generator)
    start, said = [x.detach().clone() for x in net.parameters()], []
    for i in range(n):
        inputs = some_samples(i, K, device), torch.tensor([i / 7, 1.0], device=device)
        rate.fill_(1e-4 * i)
        if i in measuring:
            with torch.compiler.set_stance("force_eager"):
                numbers, _, cosines = update_net(*steps, measure_batch, *inputs)
        else:
            numbers, _, cosines = update_batch(*inputs)
        said.append(torch.cat([numbers, cosines]))
    moved = torch.cat([(x.detach() - y).flatten() for x, y in zip(net.parameters(), start, strict=True)])
    momentum = torch.cat([optimizer.state[x]["momentum_buffer"].flatten() for x in net.parameters()])
    return torch.stack(said), moved, momentum, list(net.buffers()), generator.get_state()


MEASURING = pytest.mark.parametrize("measuring", [(4, 9, 14, 19), (0, 1, 7)])  # among others, and before all others


@MEASURING
def test_a_recorded_update_is_the_update_bit_by_bit(monkeypatch, measuring):
    """Gather, augmentation, loss, pass back, clipping and step, on a stand-in for a CUDA graph."""
    recording.patch(monkeypatch)
    expected = updates(lambda function, generator: function, "cpu", measuring)
    torch.testing.assert_close(updates(model.Recorded, "cpu", measuring), expected, rtol=0, atol=0)
    assert len({numbers[8].item() for numbers in expected[0]}) == 20  # losses


@needs_cuda
@MEASURING
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_and_compiled_updates_are_the_updates(monkeypatch, compiled, measuring):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    expected = updates(lambda function, generator: function, "cuda", measuring)
    found = updates(model.Recorded, "cuda", measuring, compiled)
    error = 0.7 if compiled else 0.3  # of the length; bfloat16 alone, on a CPU: 0.6
    torch.testing.assert_close(found[0][:, 8], expected[0][:, 8], rtol=0.02, atol=0)  # losses
    for x, y in zip(found[1:3], expected[1:3], strict=True):  # parameters, momentum
        assert (x - y).norm() <= error * y.norm()
    assert torch.equal(found[-1], expected[-1])  # as many random numbers were drawn


def test_the_stand_in_keeps_what_a_gpu_would_keep_and_refuses_what_it_refuses(monkeypatch):
    recording.patch(monkeypatch)
    found = {"number": 1, "tensor": torch.tensor(1.0), "place": torch.tensor(1.0)}
    recorded = model.Recorded(lambda x: torch.stack([x * y for y in found.values()]))
    for _ in range(3):
        recorded(torch.tensor(1.0))
    found |= {"number": 2, "place": torch.tensor(2.0)}
    found["tensor"].fill_(2)
    assert recorded(torch.tensor(10.0)).tolist() == [10, 20, 10]  # only a tensor that is still there is read anew
    for fault, name in ((lambda x: x.item(), "_local_scalar_dense"), (torch.rand_like, "rand_like")):
        recorded = model.Recorded(fault, torch.Generator())
        for _ in range(2):
            recorded(torch.ones(()))
        with pytest.raises(RuntimeError, match=name):
            recorded(torch.ones(()))


def test_a_recorded_search_is_the_search_bit_by_bit(monkeypatch):
    """Also with other weights and fewer roots."""
    recording.patch(monkeypatch)
    in_two_parts(monkeypatch)
    searches = []
    for record in (lambda evaluate: evaluate, model.Recorded):
        net = model.inference_copy(tiny_net())
        encode = net.search_root
        net.search_root = lambda obs, encode=encode: [x.as_subclass(OnGpu) for x in encode(obs)]
        searches.append(mcts.Search(net, 6, 40, record=record))
    for seed, n in enumerate((40, 40, 33, 40, 3, 37)):
        results = []
        for search in searches:
            model.refresh(search.net, tiny_net(seed))
            results.append(search(some_obs(n, seed), LEGAL, np.random.default_rng(seed), True))
        assert same(*results)
    assert all(part.recorded[20].graph for part in searches[1].halves)


@needs_cuda
def test_a_recorded_search_is_the_search_on_a_gpu():
    search = mcts.Search(model.inference_copy(tiny_net().cuda()), 20, 600, record=model.Recorded)  # two parts
    for seed, n in enumerate((600, 600, 520, 600, 555)):
        model.refresh(search.net, tiny_net(seed).cuda())
        obs = some_obs(n, seed).cuda()
        expected = mcts.Search(search.net, 20, n)(obs, LEGAL, np.random.default_rng(seed), True)
        found = search(obs, LEGAL, np.random.default_rng(seed), True)
        np.testing.assert_allclose(found.value, expected.value, rtol=0.05, atol=0.05)
        assert np.abs(found.policy - expected.policy).sum(1).mean() < 0.4  # of 2; another network's is 1.5
    assert all(recorded.graph for part in search.halves for recorded in part.recorded.values())
