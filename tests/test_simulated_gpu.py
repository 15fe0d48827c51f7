"""The simulated GPU of benchmark/speed.py --plan: its clock and counts against sums by hand, its rules, the scripts."""

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fast_paths import COEFFICIENTS, some_batch
from test_model import tiny_net
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmark"))
import simulated_gpu  # noqa: E402

import mcts  # noqa: E402
import model  # noqa: E402
from finetune import unroll_loss  # noqa: E402

# 1 TB/s, 100 TFLOP/s in bf16 and 10 in fp32
ASSUMED = {"bandwidth_share": 1 / 3.35, "flops_share": 100 / 989, "kernel_us": 2, "call_us": 5, "graph_us": 10}
ASSUMED |= {"wait_us": 20, "transfer_gb_per_s": 25}


@pytest.fixture
def gpu():
    with simulated_gpu.simulated("H100", simulated_gpu.Assumptions(**ASSUMED)) as gpu:
        yield gpu


def on_gpu(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=simulated_gpu.DEVICE)


def seconds_of(gpu, function):
    """How long the host is busy with it, and until the GPU is done."""
    gpu.synchronize()
    start = gpu.now
    function()
    gpu.close_group()
    done = max(gpu.stream.free_at, start)
    return pytest.approx(1e6 * (gpu.now - start)), pytest.approx(1e6 * (done - start))


def test_a_kernel_takes_the_longest_of_three_times(gpu):
    x, small = on_gpu(1000, 1000), on_gpu(10)
    a, b = on_gpu(4096, 4096, dtype=torch.bfloat16), on_gpu(4096, 4096, dtype=torch.bfloat16)
    # us: the launch, then 8 MB at 1 TB/s, 2 for the smallest kernel, 2 * 4096^3 operations at 100 TFLOP/s
    assert seconds_of(gpu, lambda: x + 1) == (5, 5 + 8)
    assert seconds_of(gpu, lambda: small + 1) == (5, 5 + 2)
    assert seconds_of(gpu, lambda: a @ b) == (5, 5 + 2 * 4096**3 / 1e8)
    # 1,000 rows of 4 KB are read and written, not all of x; the indices are read too
    rows = on_gpu(1000, dtype=torch.int64)
    assert seconds_of(gpu, lambda: x.index_select(0, rows)) == (5, 5 + 8.008)
    assert seconds_of(gpu, lambda: x.view(-1)[:500]) == (0, 0)  # views cost nothing


def test_the_host_runs_ahead_until_it_waits(gpu):
    x = on_gpu(1000, 1000)
    assert seconds_of(gpu, lambda: [x.add_(1) for _ in range(10)]) == (50, 5 + 80)  # the GPU is the slower one
    small = on_gpu(1)
    assert seconds_of(gpu, lambda: [small.add_(1) for _ in range(10)]) == (50, 50 + 2)  # the host
    # one number read: the kernel, its transfer, the wait
    assert seconds_of(gpu, lambda: small.add_(1).item())[0] == 5 + 5 + 2 + 20
    assert gpu.counts["other"]["waits"] == 3 + 1  # `seconds_of` waits once


def test_what_is_recorded_is_launched_at_once(gpu):
    recorded = model.Recorded(lambda x: [x.add_(1) for _ in range(100)])
    small = on_gpu(1)
    for _ in range(3):
        recorded(small)
    gpu.counts.clear()
    # the copy of the input, then the graph
    assert seconds_of(gpu, lambda: recorded(small)) == (5 + 10, 5 + 10 + 200)
    assert gpu.counts["other"]["kernels"] == 101 and gpu.counts["other"]["launches"] == 2


def test_operations_element_by_element_are_one_kernel_where_they_are_compiled(gpu):
    class Chain(torch.nn.Module):
        def forward(self, x):
            return ((x * 2 + 1).relu() - x).neg()

    x, chain, y = on_gpu(1000, 1000), Chain(), []
    steps = 8 + 8 + 8 + 12 + 8  # each reads and writes 4 MB, the fourth reads two
    assert seconds_of(gpu, lambda: chain(x))[1] == 5 + steps
    chain.compile()
    assert seconds_of(gpu, lambda: y.append(chain(x))) == (5, 5 + 8)  # x is read, what is kept is written
    with torch.compiler.set_stance("force_eager"):
        assert seconds_of(gpu, lambda: chain(x))[1] == 5 + steps
    assert seconds_of(gpu, lambda: chain.forward(x))[1] == 5 + steps  # what is not compiled


def test_memory_is_what_tensors_hold_at_the_same_time(gpu):
    x = on_gpu(1000, 1000)
    y = x + 1
    z = x.view(-1)
    del x, y
    on_gpu(500, 1000)
    assert gpu.peak_bytes() == 8e6
    del z
    assert gpu.pool["held"] == 0
    recorded = model.Recorded(lambda x: (x + 1) * 2)
    for _ in range(3):
        kept = recorded(torch.zeros(1000, device=simulated_gpu.DEVICE))
    assert len(gpu.graphs) == 1 and gpu.graphs[0].pool["peak"] == 8_000 and kept.shape == (1000,)


@pytest.mark.parametrize("fault", ["item", "host", "pageable", "generator", "device"])
def test_what_cuda_refuses_is_refused(gpu, fault):
    x, generator = on_gpu(3), torch.Generator("cuda")
    function = {
        "item": lambda x: x.sum().item(),
        "host": lambda x: x.cpu(),
        "pageable": lambda x: x + torch.ones(3).to(x.device),
        "generator": lambda x: torch.randint(3, (3,), generator=generator, device=x.device),
        "device": lambda x: x + torch.ones(3),
    }[fault]
    recorded = model.Recorded(function)
    with pytest.raises(RuntimeError, match="not permitted|not registered|same device"):
        for _ in range(3):
            recorded(x)
    assert recorded.calls == 2 or fault == "device"  # this one also where nothing is recorded


def test_a_registered_generator_may_be_drawn_from_in_a_recording(gpu):
    generator = torch.Generator("cuda")
    recorded = model.Recorded(lambda x: x + torch.randint(3, (3,), generator=generator, device=x.device), generator)
    for _ in range(4):
        recorded(on_gpu(3))
    assert recorded.graph


def test_streams_that_do_not_wait_for_each_other_are_found(gpu):
    x, other = on_gpu(3), torch.cuda.Stream()

    def races(function):
        gpu.races.clear()
        gpu.synchronize()
        function()
        return {race for race, _ in gpu.races}

    def beside(write, wait):
        (x.add_ if write else x.add)(1)
        if wait:
            other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            (x.add if write else x.add_)(1)

    assert races(lambda: beside(True, wait=False)) == {"used while another stream writes it"}
    assert races(lambda: beside(False, wait=False)) == {"written while another stream reads it"}
    # the second time the first stream does not wait for the other
    both = lambda: [beside(write, wait=True) for write in (False, True)]  # noqa: E731
    assert races(both) == {"used while another stream writes it"}
    assert races(lambda: beside(True, wait=True)) == races(lambda: beside(False, wait=True)) == set()

    def give_away(wait):
        y = on_gpu(3)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            z = y + 1
        del y
        if wait:
            torch.cuda.current_stream().wait_stream(other)
        return on_gpu(3), z  # may get the memory of y

    assert races(lambda: give_away(False)) == {"given away while another stream uses it"}
    assert races(lambda: give_away(True)) == set()

    def through_the_host(record_after):
        event = torch.cuda.Event()
        for action in ((x.add_, 1), (event.record,))[:: 1 if record_after else -1]:
            action[0](*action[1:])
        event.synchronize()
        with torch.cuda.stream(other):
            x.add(1)

    assert races(lambda: through_the_host(record_after=True)) == set()
    assert races(lambda: through_the_host(record_after=False)) == {"used while another stream writes it"}


@pytest.mark.parametrize("to_host", [False, True])
def test_a_host_that_touches_a_transfer_is_found(gpu, to_host):
    here, there, event = torch.zeros(3, pin_memory=True), on_gpu(3), torch.cuda.Event()
    for wait, write, fault in ((True, True, False), (False, False, to_host), (False, True, True)):
        (here.copy_ if to_host else there.copy_)(there if to_host else here, non_blocking=True)
        event.record()
        if wait:
            event.synchronize()
        here.fill_(1) if write else here[:2]
        assert {race for race, _ in gpu.races} == ({"touched by the host during a transfer"} if fault else set())
        gpu.races.clear()
        event.synchronize()


def test_the_operations_of_an_update_are_those_that_pytorch_counts(gpu):
    net, batch = tiny_net(), some_batch(K=2)
    with simulated_gpu.torch.utils._python_dispatch._disable_current_modes(), FlopCounterMode(display=False) as counter:
        total, *_ = unroll_loss(net, batch, COEFFICIENTS)
        total.sum().backward()
    net = tiny_net().to(simulated_gpu.DEVICE, memory_format=torch.channels_last)
    batch = batch._make(x.to(simulated_gpu.DEVICE) for x in batch)
    gpu.counts.clear()
    with torch.autocast("cuda", torch.bfloat16):
        total, *_ = unroll_loss(net, batch, COEFFICIENTS)
    total.sum().backward()
    gpu.close_group()
    assert gpu.counts["other"]["flops"] == counter.get_total_flops() > 1e8


def test_a_search_waits_once_for_its_roots_and_once_for_each_simulation_and_half(gpu, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    net = model.inference_copy(tiny_net().to(simulated_gpu.DEVICE))
    types = {x.dtype for x in net.parameters()}
    assert types == {torch.bfloat16, torch.float32}  # the last layers of the heads
    for capacity, halves in ((8, 1), (600, 2)):
        search = mcts.Search(net, 5, capacity, record=model.Recorded)
        obs = torch.zeros(capacity, 12, 96, 96, dtype=torch.uint8, device=simulated_gpu.DEVICE)
        for _ in range(2):
            gpu.counts.clear()
            result = search(obs, np.ones(18, bool), np.random.default_rng(0), noise=True)
        assert result.policy.shape == (capacity, 18)
        assert (
            gpu.counts["other"]["waits"] == 2 + 5 * halves
        )  # what is illegal goes there, what the roots say comes back
        assert gpu.counts["other"]["transfers"] == 2 + 2 * 5 * halves
        assert all(list(part.recorded) == [capacity // halves] for part in search.halves)
        assert search.halves[0].latents.dtype == search.halves[0].h.dtype == torch.bfloat16
    assert gpu.races == []


SETTINGS = "--channels 8 --batch-size 4 --offline-batch-size 4 --num-simulations 2 --unroll-steps 2 --eval-episodes 2"
SETTINGS += " --similarity-start 0 --similarity-interval 40 --similarity-updates 4"


def plan(folder, output, *cases):
    """`benchmark/speed.py --plan H100` of a copy of the code."""
    words = ["--quick", "--plan", "H100", "--repeats", "1", "--offline-games", "1", f"--flags={SETTINGS}"]
    words += ["--output", str(output), "--cases", *cases]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(folder / "benchmark/speed.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_scripts_run_on_it_and_wait_for_it_no_more_than_they_say(tmp_path):
    done = plan(ROOT, tmp_path / "speed.csv", "xtra", "student")
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "speed.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["gpu"] for row in rows] == 2 * ["H100 (simulated: nothing here is measured)"]
    assert all(0.5 < float(row["ms"]) < 50 and 0 < float(row["GPU GB"]) < 1 for row in rows)
    tables = re.split(r"\n(?=\w+, in an update)", done.stdout)[1:]
    for table, others in zip(tables, [{"similarity", "copies"}, set()], strict=True):
        lines = itertools.takewhile(bool, table.splitlines()[2:])
        counts = {line[:20].strip(): np.array(line[20:].split(), float) for line in lines}
        ms, kernels, _, _, launches, _, waits = np.array(list(counts.values())).T
        assert {"gather, augment", "forward", "backward", "clip", "step"} <= set(counts) and others <= set(counts)
        assert (ms > 0).all() and kernels.sum() > 500
        # A tenth of the updates of XTRA measures: it is not recorded, nor compiled, and so has more kernels.
        assert 0.1 < counts["forward"][4] / counts["forward"][1] < 0.2 if others else counts["forward"][4] == 0
        assert waits.sum() < (10 if others else 2)  # the second: 7 tensors go there in a cycle of 8, one comes back


def test_a_stream_that_is_not_waited_for_ends_the_plan(tmp_path):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    source, line = (
        (tmp_path / "model.py").read_text(),
        "            torch.cuda.current_stream().wait_stream(self.stream)\n",
    )
    assert source.count(line) == 1
    (tmp_path / "model.py").write_text(source.replace(line, ""))
    done = plan(tmp_path, tmp_path / "speed.csv", "student")
    assert done.returncode == 1 and re.search(r"RuntimeError: \d+ races between streams: used while", done.stderr)
