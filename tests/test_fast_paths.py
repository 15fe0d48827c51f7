"""What makes training fast must not change it: searches in parts and in kept memory, cached targets, torch.compile,
copies refreshed in place, CUDA graphs, and several processes. Each is compared with the plain way."""

import copy
import gc
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mcts import L, network, roots
from test_resume import ENVIRONMENT, wait_for
from torch import distributed, nn

import finetune
import mcts
import model
import pretrain_teacher
from model import EfficientZeroNet, ModelConfig, inference_copy, refresh

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(
    channels=4, support=10, head_channels=4, head_hidden=8, lstm_size=12, projector_hidden=20, projector_out=16,
    predictor_hidden=10,
)  # fmt: skip
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def tiny_net(seed=0, config=TINY):
    """In training mode; no layer is zero, so that policies and values differ from state to state."""
    torch.manual_seed(seed)
    net = EfficientZeroNet(config)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return net.train()


def some_batch(B, K, seed=0):
    """Random frames and targets; every second sample ends a step early."""
    rng = np.random.default_rng(seed)
    arrays = {
        "mask": np.arange(K + 1) <= np.where(np.arange(B) % 2, K - 1, K)[:, None],
        "policy": rng.dirichlet(np.ones(18), (B, K + 1)),
        "value": rng.normal(0, 5, (B, K + 1)),
        "value_prefix": rng.integers(-4, 5, (B, K)),
        "weight": rng.uniform(0.1, 1, B),
    }
    return pretrain_teacher.Batch(
        obs=torch.as_tensor(rng.random((B, 12, 96, 96)), dtype=torch.float32),
        target_obs=torch.as_tensor(rng.random((B, 3 * (K + 3), 96, 96)), dtype=torch.float32),
        action=torch.as_tensor(rng.integers(18, size=(B, K))),
        **{name: torch.as_tensor(array, dtype=torch.float32) for name, array in arrays.items()},
    )


def some_replay(rows=24, device="cpu", frames_on_host=False):
    """Random frames of one environment; row 5 loses a life, row 14 ends a game, the last row is not acted on."""
    rng = np.random.default_rng(0)
    replay = pretrain_teacher.Replay(rows, 1, device, frames_on_host)
    replay.size = rows
    coarse = rng.integers(0, 256, (rows, 3, 4, 4), dtype=np.uint8)  # fine noise would look alike to the network
    replay.frames[:] = torch.as_tensor(coarse.repeat(24, axis=2).repeat(24, axis=3))
    replay.action[:], replay.reward[:] = rng.integers(18, size=rows), rng.integers(-1, 2, rows)
    replay.acted[:] = True
    replay.acted[[15, rows - 1]] = False
    replay.end[[5, 14]] = pretrain_teacher.LIFE_LOST, pretrain_teacher.GAME_OVER
    starts = np.isin(np.arange(rows), [0, 6, 16])
    replay.age[:] = np.arange(rows) - np.maximum.accumulate(np.where(starts, np.arange(rows), 0))
    replay.priority[:] = replay.acted
    return replay


# ---- searches in parts, and in kept memory


def row_by_row(recurrent):
    """A matrix product may round a row differently in another batch: here each row is a batch of its own."""

    def one_by_one(latent, action, state):
        rows = [slice(i, i + 1) for i in range(len(latent))]
        latents, states, *outputs = zip(
            *[recurrent(latent[i], action[i], [x[i] for x in state]) for i in rows], strict=True
        )
        return torch.cat(latents), [torch.cat(x) for x in zip(*states, strict=True)], *map(torch.cat, outputs)

    return one_by_one


def search_roots(recurrent, B, seed, S=12, **options):
    """A search of B random roots with noise and seeds that depend on `seed` alone."""
    latent, logits, legal = roots(B, 5, seed)
    noise = mcts.dirichlet_noise(np.random.default_rng(seed), legal)
    seeds = np.random.default_rng(seed + 1).integers(1, 2**63, B, dtype=np.uint64)
    settings = {"lstm_size": L, "noise": noise, "seeds": seeds}
    return mcts.search(recurrent, latent, logits, legal, S, **settings, **options)


def assert_same_search(found, expected):
    for name, x, y in zip(mcts.SearchResult._fields, found, expected, strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), name


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_search_are_the_search(parts):
    """A part that got another part's roots, noise, seeds or answers would visit other actions."""
    recurrent = row_by_row(network(5))
    expected = search_roots(recurrent, 11, seed=0)  # 11: the parts are not of one size
    assert len(np.unique(expected.visits, axis=0)) > 8 and expected.depth.max() > 2
    assert_same_search(search_roots(recurrent, 11, seed=0, parts=parts), expected)


class Stand:
    """Stands for `model.Recorded`: calls the function, and counts."""

    made = 0

    def __init__(self, function):
        Stand.made, self.function, self.calls = Stand.made + 1, function, 0

    def __call__(self, *tensors):
        self.calls += 1
        return self.function(*tensors)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_memory_of_the_search_before_does_not_matter(parts):
    """Padding rows, latents, LSTM states and legal actions that the search before left behind would show up in the
    visits; so would memory that is too small for the second search."""
    recurrent, memory, Stand.made = row_by_row(network(5)), {}, 0
    for seed, B in enumerate((16, 11, 13, 5, 16, 3, 9)):
        kept = search_roots(recurrent, B, seed, memory=memory, record=Stand, parts=parts)
        assert_same_search(kept, search_roots(recurrent, B, seed))
    assert Stand.made == len(memory) <= 3  # the same memory again and again
    nodes = list(memory.values())
    assert sum(x.simulate.calls for x in nodes) == 7 * 12 * parts
    assert {len(x.rows) for x in nodes} <= {8, 16}


def test_searches_of_other_lengths_do_not_share_memory():
    recurrent, memory = row_by_row(network(5)), {}
    for S in (12, 20, 12):
        found = search_roots(recurrent, 6, 0, S, memory=memory, record=Stand)
        assert_same_search(found, search_roots(recurrent, 6, 0, S))
    assert len(memory) == 2


def test_a_search_leaves_nothing_behind(monkeypatch):
    """A circle of references would hold its memory, gigabytes at full size, until the garbage collector comes by."""
    made, nodes = [], mcts.Nodes
    monkeypatch.setattr(mcts, "Nodes", lambda *args: made.append(weakref.ref(x := nodes(*args))) or x)
    gc.disable()
    search_roots(network(5), 6, 0)
    gc.enable()
    assert len(made) == 1 and made[0]() is None


def test_buckets_hold_their_roots_and_waste_less_than_half():
    sizes = [mcts.bucket(n) for n in range(1, 2000)]
    assert all(n <= size for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all(size <= max(8, 2 * n - 1) for n, size in enumerate(sizes, 1))
    assert sizes[0] == 8 and len(set(sizes)) <= 20  # each is recorded anew


# ---- cached targets


class Ones:
    """A generator that gives each state the same seed."""

    def integers(self, low, high, n, dtype):
        return np.ones(n, dtype)


def test_targets_are_the_same_with_and_without_the_cache(monkeypatch):
    """With the same noise and seed for all states, equal states have equal searches: a cache that mixed up rows, kept
    an old network's target or gave a terminal state one would differ from searching each sample."""
    monkeypatch.setattr("mcts.dirichlet_noise", lambda rng, legal: np.float32(legal / legal.sum(1, keepdims=True)))
    legal, cached = np.arange(18) % 3 > 0, some_replay()
    # rows 8 and 17 twice; from 4 and 13 on the episode ends within K steps; 22 is next to the stream's newest frame
    rows = np.array([8, 8, 17, 4, 17, 13, 0, 22, 1, 18])
    for version in (1, 1, 2):  # the second time some states are stale, the third time all
        net = tiny_net(version)
        for layer in net.modules():
            layer.momentum = 1.0  # batch norm takes the statistics of these states: they differ in their visits
        with torch.no_grad():
            net.initial_inference(pretrain_teacher.stack_frames(cached, np.arange(24)))
        net.prediction.policy[-1].weight.data *= 5
        net = inference_copy(net)
        plain, targets = some_replay(), pretrain_teacher.make_targets(cached, rows, np.full(10, 2), 2)
        settings = legal, 16, Ones()
        with_cache = pretrain_teacher.reanalyze(net, version, "A", cached, targets, *settings, cache=True)
        without = pretrain_teacher.reanalyze(net, version, "A", plain, targets, *settings, cache=False)
        np.testing.assert_array_equal(with_cache[0], without[0])
        used = targets.bootstrap_discount > 0
        assert used.sum() > 16 and (~used).any()
        np.testing.assert_allclose(with_cache[1][used], without[1][used], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(without[0].sum(-1), targets.alive, rtol=1e-6)  # zero at terminal states
        assert not without[0][..., ~legal].any() and (~targets.alive).sum() >= 3
        assert len(np.unique(without[0].reshape(-1, 18), axis=0)) > 5 and without[1].std() > 1e-4
        rows = np.array([9, 8, 17, 5, 17, 14, 0, 22, 2, 20])


def test_a_state_has_one_noise_with_the_cache_and_one_per_sample_without():
    """The released code searches each sample anew: without the cache a state's samples must not share their noise."""
    net, legal, rng = inference_copy(tiny_net()), np.ones(18, bool), np.random.default_rng(0)
    for cache in (True, False):
        replay = some_replay()
        targets = pretrain_teacher.make_targets(replay, np.array([8, 8]), np.full(2, 3), 1)
        policy, _, result = pretrain_teacher.reanalyze(net, 1, "A", replay, targets, legal, 50, rng, cache)
        assert len(result.visits) == (2 if cache else 4)
        assert (policy[0] == policy[1]).all() == cache
        again, _, result = pretrain_teacher.reanalyze(net, 1, "A", replay, targets, legal, 50, rng, cache)
        assert (again == policy).all() == cache and (result is None) == cache


# ---- torch.compile


def test_the_compiled_loss_is_the_loss():
    """Also its gradients and the statistics of batch norm, which it changes in place."""
    batch, nets = some_batch(B=2, K=1), [tiny_net(), tiny_net()]
    torch._dynamo.reset()
    results = []
    # Traced as on a GPU, but run by torch's own kernels: to build them in C++ takes two minutes here.
    functions = pretrain_teacher.unroll_loss, torch.compile(pretrain_teacher.unroll_loss, backend="aot_eager")
    for net, function in zip(nets, functions, strict=True):
        results.append(pretrain_teacher.compute_gradients(net, list(net.parameters()), batch, function))
    (loss, norm, terms, priority, gradients), (loss2, norm2, terms2, priority2, gradients2) = results
    assert terms.keys() == terms2.keys()
    torch.testing.assert_close([loss2, norm2, priority2], [loss, norm, priority], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(terms2.values()), list(terms.values()), rtol=1e-4, atol=1e-5)
    scale = max(x.abs().max().item() for x in gradients)
    torch.testing.assert_close(gradients2, gradients, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=1e-4, atol=1e-5)


# ---- copies that are refreshed in place


def test_a_copy_is_refreshed_where_it_lies():
    """Recorded kernels read the weights where they were: new tensors would leave them with the old network for ever."""
    net, other = tiny_net(0), tiny_net(1)
    with torch.no_grad():  # running statistics of its own
        other.initial_inference(torch.rand(4, 12, 96, 96))
    frozen, places = inference_copy(net, keep_memory=True), {}
    frozen.memory["x"] = "kept"
    for name, x in frozen.state_dict().items():
        places[name] = x.data_ptr()
    for source in (other, inference_copy(net), other):
        refresh(frozen, source)
        expected = (inference_copy(source) if source is other else source).state_dict()
        found = frozen.state_dict()
        assert found.keys() == expected.keys() == places.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(found[name].data_ptr() == places[name] for name in places)
        assert frozen.memory == {"x": "kept"} and not frozen.training
    assert not torch.equal(next(inference_copy(net).parameters()), next(frozen.parameters()))
    assert not any(x.data_ptr() == y.data_ptr() for x, y in zip(frozen.parameters(), other.parameters(), strict=False))


# ---- on a GPU


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("m", [0, 2])
def test_a_recorded_update_is_the_update(m, compiled):
    """A graph that read an old batch, old weights or an old eta would give other gradients; so would one whose memory
    an ordinary pass between two replays, as it measures the cosines, has overwritten."""
    nets = [tiny_net().cuda().to(memory_format=torch.channels_last) for _ in range(2)]
    parameters = [list(net.parameters()) for net in nets]
    deterministic, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    torch._dynamo.reset()
    fast = torch.compile(finetune.unroll_loss) if compiled else finetune.unroll_loss

    def gradients(i, loss_function, measure, eta, *tensors):
        settings = loss_function, False, m, 2 if m else 0, measure
        return finetune.transfer_gradients(nets[i], parameters[i], finetune.Batch(*tensors), eta, *settings)

    recorded, losses = model.Recorded(lambda *tensors: gradients(0, fast, False, *tensors)), []
    for seed in range(6):
        batch = pretrain_teacher.Batch(*[x.cuda() for x in some_batch(8, 2, seed)])
        eta = torch.rand(m, generator=torch.Generator().manual_seed(seed)).cuda()
        loss, norm, terms, priority, found, _ = recorded(eta, *batch)
        loss2, norm2, terms2, priority2, expected, _ = gradients(1, finetune.unroll_loss, False, eta, *batch)
        torch.testing.assert_close(loss, loss2, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(norm, norm2, rtol=3e-2, atol=1e-3)
        torch.testing.assert_close(priority, priority2, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(terms, terms2, rtol=1e-2, atol=1e-2)
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() <= 0.05 * y.norm() + 1e-3 * norm2
        losses.append(loss.item())
        with torch.no_grad():  # the weights move where they lie, as the optimizer moves them
            for parameter, gradient in zip(parameters[1], expected, strict=True):
                parameter -= 0.01 * gradient
        nets[0].load_state_dict(nets[1].state_dict())
        if m and seed >= 3:
            measured = [gradients(i, finetune.unroll_loss, True, eta, *batch)[-1] for i in range(2)]
            torch.testing.assert_close(*measured, rtol=0.05, atol=0.02)
            assert measured[0].abs().min() > 0
    assert recorded.graph is not None and len(set(losses)) == 6
    torch.backends.cudnn.deterministic = deterministic


@needs_cuda
@pytest.mark.parametrize(("parts", "sizes"), [(1, (40, 40, 33, 40, 37)), (2, (600, 600, 520, 600, 555))])
def test_searches_in_kept_memory_follow_the_network(parts, sizes):
    """Recorded kernels must read the weights, roots and legal actions of today. Rounding in bf16 depends on the number
    of rows, so a few visits may differ; those of another network differ in most."""
    frozen, legal = inference_copy(tiny_net().cuda(), keep_memory=True), np.arange(18) % 2 == 0
    visits = []
    for seed, n in enumerate(sizes):
        net = tiny_net(seed).cuda()
        refresh(frozen, net)
        obs = torch.randint(256, (n + 3, 12, 96, 96), dtype=torch.uint8, device="cuda")  # the last 3 are only valued
        results = [
            pretrain_teacher.run_search(x, "A", obs, np.tile(legal, (n, 1)), 20, np.random.default_rng(seed), True)
            for x in (frozen, inference_copy(net))
        ]
        (kept, value), (plain, plain_value) = results
        np.testing.assert_allclose(value, plain_value, rtol=0.05, atol=0.05)
        assert (kept.visits.sum(1) == 20).all() and not kept.visits[:, ~legal].any()
        assert np.abs(kept.visits - plain.visits).sum(1).mean() < 4  # of at most 40
        visits.append(kept.visits.mean(0))
    assert len(frozen.memory) == parts
    assert all(nodes.simulate.graph is not None for nodes in frozen.memory.values())
    assert len(np.unique(visits, axis=0)) == 5


@needs_cuda
def test_frames_on_the_host_give_the_same_batch():
    batches = []
    for frames_on_host in (False, True):
        replay = some_replay(device="cuda", frames_on_host=frames_on_host)
        assert replay.frames.is_cuda is not frames_on_host
        targets = pretrain_teacher.make_targets(replay, np.array([0, 3, 8, 22]), np.full(4, 3), 3)
        rng, generator = np.random.default_rng(0), torch.Generator("cuda").manual_seed(0)
        policy, value = rng.dirichlet(np.ones(18), (4, 4)), rng.normal(size=(4, 4))
        batches.append(pretrain_teacher.make_batch(replay, targets, policy, value, np.ones(4), rng, generator))
        stacks = pretrain_teacher.stack_frames(replay, np.array([0, 7, 20]))
        plain = pretrain_teacher.stack_frames(some_replay(), np.array([0, 7, 20]))
        assert stacks.is_cuda and torch.equal(stacks.cpu(), plain)
    for name, x, y in zip(pretrain_teacher.Batch._fields, *batches, strict=True):
        assert x.is_cuda and torch.equal(x, y), name


# ---- several processes


def all_updates(rank, W):
    """What compute_gradients and transfer_gradients say in process `rank` of W, and the statistics after both."""
    net, batch = tiny_net(), some_batch(B=8, K=2)  # 4 samples of the target game, 2 of each of 2 offline games
    model.share_batch_norms(net)
    batch = pretrain_teacher.Batch(*[x[rank::W] for x in batch])
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    results = {}
    loss, norm, terms, priority, gradients = pretrain_teacher.compute_gradients(
        net, parameters, batch, pretrain_teacher.unroll_loss
    )
    results |= {"loss": loss, "norm": norm, "priority": model.interleave(priority), "gradients": gradients}
    results |= {f"term {name}": model.interleave(term.detach()) for name, term in terms.items()}
    results["statistics"] = {name: x.clone() for name, x in net.state_dict().items()}
    eta = torch.tensor([0.25, 1.0])
    loss, norm, _, priority, gradients, cosines = finetune.transfer_gradients(
        net, parameters, batch, eta, finetune.unroll_loss, False, 2, 2 // W, True
    )
    results |= {"transfer loss": loss, "transfer norm": norm, "transfer gradients": gradients, "cosines": cosines}
    results |= {"transfer priority": model.interleave(priority)}
    return results | {"statistics after transfer": copy.deepcopy(net.state_dict())}


def process(rank, W, folder):
    """One of W processes: its results go to a file."""
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": W}
    distributed.init_process_group("gloo", **rendezvous)
    results = all_updates(rank, W)
    results["sum"] = torch.from_numpy(model.add_up(np.array([rank + 1, 10])))
    results["first"] = torch.from_numpy(model.of_first(np.array([rank + 1, 10])))
    interrupted = ["SIGTERM"] if rank == 1 else []
    results["stop"] = [model.any_interrupted([]), model.any_interrupted(interrupted), len(interrupted)]
    legal, rng = np.ones((5, 18), bool), np.random.default_rng(0)
    obs = torch.as_tensor(np.random.default_rng(1).integers(0, 256, (8, 12, 96, 96), dtype=np.uint8))
    result, value = finetune.run_search(inference_copy(tiny_net()), "A", obs, legal, 8, rng, True, rank, W)
    results["search"] = [torch.as_tensor(x) for x in (*result, value)]
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes says."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_learn_what_one_learns(processes):
    """Loss, gradients, cosines, priorities and the statistics of batch norm are of the whole batch, not of a half."""
    expected = all_updates(0, 1)
    assert expected["cosines"].abs().min() > 1e-3 and expected["norm"] > 0.1
    for found in processes:
        for name, x in expected.items():
            torch.testing.assert_close({name: found[name]}, {name: x}, rtol=1e-4, atol=1e-5)
    for name in expected:  # and both learn the very same, or their weights would drift apart
        torch.testing.assert_close(processes[0][name], processes[1][name], rtol=0, atol=0)


def test_half_a_batch_is_another_update():
    """So that the comparison above can fail: one process alone on its half gives other gradients and statistics."""
    whole, half = all_updates(0, 1), all_updates(0, 2)
    assert (whole["norm"] - half["norm"]).abs() > 1e-3 and (whole["cosines"] - half["cosines"]).abs().max() > 1e-3


def test_two_processes_share_a_search(processes):
    """5 roots and 3 states to value only: each process does every second, both get all of it."""
    legal, rng = np.ones((5, 18), bool), np.random.default_rng(0)
    obs = torch.as_tensor(np.random.default_rng(1).integers(0, 256, (8, 12, 96, 96), dtype=np.uint8))
    result, value = finetune.run_search(inference_copy(tiny_net()), "A", obs, legal, 8, rng, True)
    for found in processes:
        visits, root_value, depth, values = found["search"]
        np.testing.assert_array_equal(visits, result.visits)
        np.testing.assert_array_equal(depth, result.depth)
        np.testing.assert_allclose(root_value, result.root_value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values, value, rtol=1e-4, atol=1e-5)


def test_messages_between_processes(processes):
    for rank, found in enumerate(processes):
        assert found["sum"].tolist() == [3, 20] and found["first"].tolist() == [1, 10]
        assert found["stop"] == [False, True, 1], rank


def test_a_signal_that_comes_after_all_have_answered_waits_for_the_next_time(monkeypatch):
    """All processes must get the same answer, or one stops where the others wait for it: it is the sum's, whatever has
    come since."""
    interrupted = []

    def add_up(array):  # the sum is known when the signal comes
        interrupted.append("SIGTERM")
        return array

    monkeypatch.setattr(model, "add_up", add_up)
    assert not model.any_interrupted(interrupted)
    assert model.any_interrupted(interrupted)


# ---- torchrun


def torchrun(folder, run_dir, W, flags):
    """Starts finetune.py in W processes; the output goes to a file beside the run folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(W)] if W > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "finetune.py"), *flags.split(), "--run-dir", run_dir]
    with open(f"{folder / run_dir}.out", "ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )


FLAGS = (
    "--env-id toy_env:Catch-v0 --pretrained student --batch-size 8 --offline-batch-size 8 --total-timesteps 12"
    " --num-envs 2 --learning-starts 10 --num-simulations 3 --unroll-steps 1 --eval-episodes 1 --eval-max-frames 16"
    " --eval-every 6 --similarity-start 2 --similarity-interval 4 --similarity-updates 2 --similarity-threshold -1"
    " --checkpoint-every 5 --learning-rate 0.00001"
)


def test_torchrun_is_one_run(tmp_path, monkeypatch):
    """Two processes end where one does, write each file once, and go on where they were stopped."""
    from test_corruption import make_dataset, make_model, make_teacher
    from test_resume import assert_same, scalars

    monkeypatch.chdir(tmp_path)
    make_dataset("data")
    make_teacher("teacher")
    make_model("student", 1, teachers=["../teacher"])
    for run_dir, W in (("one", 1), ("two", 2)):
        assert torchrun(tmp_path, run_dir, W, FLAGS).wait() == 0, Path(f"{run_dir}.out").read_text()[-3000:]
    assert Path("two.out").read_text().count("agent saved") == 1
    one, two = (model.load_torch(f"{run_dir}/checkpoint.pt", model.CHECKPOINT_FORMAT) for run_dir in ("one", "two"))
    assert one["values"]["updates"] == two["values"]["updates"] == 12
    assert torch.equal(one["values"]["actions"], two["values"]["actions"])  # the same games
    for name in ("net", "self_play", "target", "next_target"):
        torch.testing.assert_close(two["states"][name], one["states"][name], rtol=1e-3, atol=1e-3)
    # The steps away from the student agree too. They are small: large ones on tiny batches soon make rounding matter
    first = model.load_model("student/model.pt")[0]
    moved = [torch.cat([(x["states"]["net"][name] - weight).flatten() for name, weight in first.named_parameters()])
             for x in (one, two)]  # fmt: skip
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm() and moved[0].norm() > 1e-5
    assert len(list(Path("two").glob("events.out.tfevents*"))) == 1
    assert Path("two/evaluations.csv").read_text() == Path("one/evaluations.csv").read_text()
    assert [line.split(",")[1:3] for line in Path("two/evaluations.csv").read_text().split()[1:]] == [
        ["0", "0"], ["6", "0"], ["12", "0"]
    ]  # fmt: skip
    logged = [scalars(run_dir) for run_dir in ("one", "two")]
    assert logged[0].keys() == logged[1].keys() and any("grad_cosine" in key for key in logged[0])
    for key in logged[0]:
        np.testing.assert_allclose(logged[1][key], logged[0][key], rtol=1e-2, atol=1e-2, err_msg=key)

    running = torchrun(tmp_path, "stopped", 2, FLAGS)
    wait_for(tmp_path / "stopped/model.pt", running)  # of the first evaluation; 12 updates are still to come
    running.send_signal(signal.SIGTERM)
    assert running.wait() != 0
    assert "stopped: stopped at update " in Path("stopped.out").read_text()
    stopped = model.load_torch("stopped/checkpoint.pt", model.CHECKPOINT_FORMAT)
    assert stopped["values"]["updates"] < 12
    assert torchrun(tmp_path, "stopped", 2, f"{FLAGS} --resume").wait() == 0, Path("stopped.out").read_text()[-3000:]
    stopped = model.load_torch("stopped/checkpoint.pt", model.CHECKPOINT_FORMAT)
    for name in ("states", "values", "replays"):
        assert_same(two[name], stopped[name], name)
    assert Path("stopped/evaluations.csv").read_text() == Path("two/evaluations.csv").read_text()
    assert scalars("stopped") == logged[1]
