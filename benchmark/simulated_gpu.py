"""A GPU that is not there, for a machine without one: the scripts run on it, and a simulated clock says how long they
would take on a named card.

Its tensors have shapes and types but no numbers: what is read back is 1, or False. Each operation is counted where
PyTorch dispatches it: kernels, bytes, FLOPs. A kernel takes `max(kernel_us, bytes / bandwidth, FLOPs / peak)` on its
stream, and begins when the stream is free and the host has launched it; the host goes on unless it waits. Recorded
kernels are launched at once. Streams do not slow each other down. On the host a call of an operation takes `call_us`,
the search tree `tree_ns` a root, and whatever `hosted` wraps its real time.

It also holds the code against the rules of CUDA: what must not be recorded is refused, operands on two devices too, and
`races` lists what one stream wrote or freed while another may still use it.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

# Data sheets: TB/s, dense TFLOP/s in bf16, and in fp32 without tensor cores.
CARDS = {
    "H100": (3.35, 989, 67),  # SXM
    "H200": (4.8, 989, 67),
    "A100": (2.04, 312, 19.5),  # SXM, 80 GB
    "RTX4090": (1.01, 165, 83),
}


@dataclasses.dataclass
class Assumptions:
    bandwidth_share: float = 0.9  # of the data sheet's
    flops_share: float = 0.8  # of the data sheet's
    kernel_us: float = 2.0  # the shortest kernel, with the gap before it
    call_us: float = 5.0  # host time of one operation, whether it launches a kernel or works on the CPU
    graph_us: float = 10.0  # host time to launch what was recorded
    wait_us: float = 20.0  # from the end of a kernel until a host that waits for it goes on
    transfer_gb_per_s: float = 25.0  # between host and GPU
    tree_ns: float = 500.0  # host time of one root in one simulation, on one thread
    tree_threads: int = 8  # for searches of 256 roots or more
    host_share: float = 1.0  # speed of this machine's CPU, in units of the other one's


TWO_PASSES = ("native_batch_norm", "native_batch_norm_backward")  # read for the statistics, and to apply them
POINTWISE = ("_to_copy", "copy_", "clone", "fill_", "zero_")  # beside those that PyTorch marks so
GATHERS = ("index", "index_select", "gather")  # read as much as they write of the first operand
SCATTERS = ("index_copy_", "index_put_", "_index_put_impl_")  # write as much as they read of the last
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh")
DEVICE = torch.device("cuda:0")


class Storage:
    """Memory of some tensors. write: (stream, number) of the operation that wrote it last; reads: number by stream."""

    def __init__(self, num_bytes, pool, stream):
        self.num_bytes, self.pool, self.stream = num_bytes, pool, stream
        self.tensors = 0
        self.write = None
        self.reads = {}


class Stream:
    def __init__(self):
        self.free_at = 0.0  # s
        self.count = 0  # operations so far
        self.known = collections.Counter()  # of each stream, the operations that are over before the next one here
        self.freed = []  # (stream, number): uses elsewhere of memory that this stream may give away

    def wait_stream(self, other):
        gpu.close_group()
        self.wait_for(other, other.free_at, other.count, other.known)

    def wait_for(self, stream, free_at, count, known):
        self.free_at = max(self.free_at, free_at)
        self.known |= known
        self.known[stream] = max(self.known[stream], count)

    def knows(self, stream, count):
        return stream is self or max(self.known[stream], gpu.host.known[stream]) >= count


class Event:
    def record(self):
        gpu.close_group()
        stream = gpu.stream
        self.state = stream, stream.free_at, stream.count, stream.known.copy()

    def synchronize(self):
        gpu.wait(*self.state)


class Graph:
    """What a `CUDAGraph` is: what was recorded, and the memory that it works on."""

    def __init__(self):
        self.kernels = []  # (part, kernels, bytes, FLOPs, seconds)
        self.reads, self.writes = set(), set()  # storages
        self.pool = collections.Counter()
        self.generators = set()
        gpu.graphs.append(self)

    def register_generator_state(self, generator):
        self.generators.add(generator._cdata)

    def replay(self):
        gpu.close_group()
        gpu.now += gpu.assumed.graph_us / 1e6
        gpu.counts[gpu.part]["launches"] += 1
        gpu.enqueue(self.kernels)
        gpu.order(self.reads, self.writes)


class GpuTensor(torch.Tensor):
    """meta: the tensor without numbers that knows its shape, order and type. To C++ it lies on the CPU: then autograd
    works with a PyTorch that knows no GPU."""

    @staticmethod
    def __new__(cls, meta):
        size = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "dtype": meta.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, meta.shape, **size)
        tensor.meta = meta
        gpu.hold(tensor)
        return tensor

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return gpu.run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)]._is_param = isinstance(self, torch.nn.Parameter)
        return memo[id(self)]

    def cpu(self):
        gpu.close_group()
        gpu.transfer(self, blocking=True)
        return torch.ones(self.shape, dtype=self.dtype)

    def to(self, *args, **kwargs):
        devices = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.device | str)]
        if devices and torch.device(devices[0]).type == "cpu":
            return self.cpu()
        args = [x for x in args if not isinstance(x, torch.device | str)]
        kwargs = {name: x for name, x in kwargs.items() if name != "device"}
        return super().to(*args, **kwargs) if args or kwargs.keys() - {"non_blocking"} else self

    def __repr__(self, **_):
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()


class Dispatch(TorchDispatchMode):
    """Sends to the simulated GPU what belongs there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return gpu.run(func, args, kwargs)
        if any(isinstance(x, GpuTensor) for x in tree_flatten((args, kwargs))[0]):
            return gpu.run(func, args, kwargs)
        kwargs.pop("pin_memory", None)
        gpu.now += gpu.assumed.call_us / 1e6
        result = func(*args, **kwargs)
        gpu.check_host(func, [x for x in tree_flatten((args, result))[0] if isinstance(x, torch.Tensor)])
        return result


class Gpu:
    def __init__(self, card, assumed):
        self.assumed = assumed
        bandwidth, bf16, fp32 = CARDS[card]
        self.bytes_per_s = 1e12 * bandwidth * assumed.bandwidth_share
        self.flops_per_s = {"bf16": 1e12 * bf16 * assumed.flops_share, "fp32": 1e12 * fp32 * assumed.flops_share}
        self.now = 0.0  # s, on the host
        self.host = Stream()  # what the host knows to be over
        self.streams = []
        self.capturing = None  # the graph that is being recorded
        self.graphs = []
        self.part = "other"  # of an update, to which what happens is counted
        self.counts = collections.defaultdict(collections.Counter)
        self.storages = {}
        self.pool = collections.Counter()  # bytes: held, peak
        self.compiled = False  # whether any network is: what autograd does is then taken for compiled too
        self.fusing = 0  # calls of compiled networks, and of what is one kernel anyway, that are not over
        self.group = None  # of such operations: (part, {id: bytes read}, [what they made])
        self.transfers = {}  # those without a wait, by the host's memory: (stream, number, whether to the host)
        self.races = []

    # --- memory ---
    def hold(self, tensor):
        storage = tensor.meta.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            pool = self.capturing.pool if self.capturing else self.pool
            self.storages[key] = Storage(storage.nbytes(), pool, self.stream)
            pool["held"] += storage.nbytes()
            pool["peak"] = max(pool["peak"], pool["held"])
            if not all(self.stream.knows(*use) for use in self.stream.freed):
                self.races.append(("given away while another stream uses it", self.storages[key]))
            self.stream.freed = []
        self.storages[key].tensors += 1
        weakref.finalize(tensor, self.release, key)

    def release(self, key):
        storage = self.storages[key]
        storage.tensors -= 1
        if storage.tensors == 0:
            del self.storages[key]
            storage.pool["held"] -= storage.num_bytes
            uses = [*storage.reads.items(), storage.write] if storage.pool is self.pool else []
            storage.stream.freed += [use for use in uses if use and use[0] is not storage.stream]

    def peak_bytes(self):
        return self.pool["peak"] + sum(graph.pool["peak"] for graph in self.graphs)

    def storage_of(self, tensor):
        return self.storages[tensor.meta.untyped_storage()._cdata]

    def order(self, reads, writes):
        """One operation on the current stream; what it uses must be over on the others."""
        stream = self.stream
        stream.count += 1
        for storage in reads | writes:
            if storage.write and not stream.knows(*storage.write):
                self.races.append(("used while another stream writes it", storage))
            if storage in writes and not all(stream.knows(*use) for use in storage.reads.items()):
                self.races.append(("written while another stream reads it", storage))
        for storage in reads:
            storage.reads[stream] = stream.count
        for storage in writes:
            storage.write, storage.reads = (stream, stream.count), {}

    # --- time ---
    def enqueue(self, kernels):
        for part, number, num_bytes, flops, seconds in kernels:
            self.stream.free_at = max(self.stream.free_at, self.now) + seconds
            self.counts[part].update(kernels=number, bytes=num_bytes, flops=flops, seconds=seconds)

    def launch(self, part, number, num_bytes, flops, peak, speed=None):
        seconds = num_bytes / (speed or self.bytes_per_s)
        seconds = max(number * self.assumed.kernel_us / 1e6, seconds, flops / self.flops_per_s[peak])
        kernel = part, number, num_bytes, flops, seconds
        if self.capturing:
            self.capturing.kernels.append(kernel)
            return
        self.now += self.assumed.call_us / 1e6
        self.counts[part]["launches"] += number
        self.enqueue([kernel])

    def wait(self, stream, free_at, count, known):
        self.close_group()
        if self.capturing:
            raise RuntimeError("a host that waits is not permitted when stream is capturing")
        self.now = max(self.now, free_at) + self.assumed.wait_us / 1e6
        self.counts[self.part]["waits"] += 1
        self.host.known |= known
        self.host.known[stream] = max(self.host.known[stream], count)

    def synchronize(self, *_):
        everything = Stream()
        for stream in self.streams:
            everything.wait_stream(stream)
        self.wait(everything, everything.free_at, 0, everything.known)

    def transfer(self, tensor, blocking, on_host=None):
        """`on_host`: the tensor there, if the host does not wait and so must not touch it."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self.capturing and blocking:
            raise RuntimeError("a transfer from or to memory that is not pinned is not permitted when capturing")
        self.launch(self.part, 1, num_bytes, 0, "bf16", 1e9 * self.assumed.transfer_gb_per_s)
        self.counts[self.part]["transfers"] += 1
        if isinstance(tensor, GpuTensor):
            self.order({self.storage_of(tensor)}, set())
        stream = self.stream
        if blocking:
            self.wait(stream, stream.free_at, stream.count, stream.known)
        elif on_host is not None:
            stream.count += 1
            self.transfers[on_host.untyped_storage().data_ptr()] = stream, stream.count, on_host is not tensor

    def check_host(self, func, tensors):
        """Nothing is read where a transfer to the host may be under way, nothing written where one from it may be."""
        for tensor in tensors:
            stream, count, to_host = self.transfers.get(tensor.untyped_storage().data_ptr(), (self.host, 0, False))
            if not self.host.knows(stream, count) and (to_host or func._schema.is_mutable):
                memory = Storage(tensor.untyped_storage().nbytes(), self.pool, stream)
                self.races.append(("touched by the host during a transfer", memory))

    # --- operations ---
    def run(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        kwargs = dict(kwargs)
        generator = kwargs.get("generator")
        if self.capturing and torch.Tag.nondeterministic_seeded in func.tags:
            if generator is None or generator._cdata not in self.capturing.generators:
                raise RuntimeError(f"{name} draws from a generator that is not registered with the graph")
        if name == "_local_scalar_dense":
            return args[0].cpu().item() if args[0].dtype != torch.bool else args[0].cpu().logical_not().item()
        if name == "copy_" and not isinstance(args[0], GpuTensor):
            self.close_group()
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            result = args[0].fill_(1)
            self.transfer(args[1], blocking, args[0])
            return result
        operands = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        elsewhere = [x for x in operands if not isinstance(x, GpuTensor) and x.dim()]
        to_gpu = name in ("_to_copy", "copy_") and elsewhere
        if to_gpu:
            self.close_group()
            self.transfer(elsewhere[0], not (kwargs.get("non_blocking") or True in args[2:]), elsewhere[0])
        elif name == "cat":
            pass  # autograd fills in gradients of zero for what a split leaves unused, where C++ thinks that they lie
        elif elsewhere and name not in (*GATHERS, *SCATTERS):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        elif elsewhere:  # indices
            self.transfer(elsewhere[0], blocking=True)
        result = self.on_meta(func, name, args, kwargs)
        if not func.is_view and name not in NO_KERNEL and not to_gpu:
            self.count(func, name, args, kwargs, [x for x in operands if isinstance(x, GpuTensor)], result)
        return result

    def on_meta(self, func, name, args, kwargs):
        if name == "_fused_sgd_":  # has no way to run without numbers; works in place
            return None
        tensors = {}

        def lower(x):
            if isinstance(x, GpuTensor):
                tensors[id(x.meta)] = x
                return x.meta
            if isinstance(x, torch.Tensor):
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            return x

        def lift(x):
            return tensors.get(id(x)) if id(x) in tensors else GpuTensor(x) if isinstance(x, torch.Tensor) else x

        args, kwargs = tree_map(lower, (args, kwargs))
        elsewhere = {"device": "meta", "generator": None, "pin_memory": None}
        kwargs |= {name: x for name, x in elsewhere.items() if name in kwargs}
        return tree_map(lift, func(*args, **kwargs))

    def count(self, func, name, args, kwargs, operands, result):
        made = [x for x in tree_flatten(result)[0] if isinstance(x, GpuTensor)]
        written = {id(x) for x in made}
        written |= {id(y) for x, a in zip(args, func._schema.arguments, strict=False) if a.alias_info and
                    a.alias_info.is_write for y in tree_flatten(x)[0]}  # fmt: skip
        reads = {self.storage_of(x) for x in operands}
        writes = {self.storage_of(x) for x in [*operands, *made] if id(x) in written}
        if self.capturing:
            self.capturing.reads |= reads
            self.capturing.writes |= writes
        else:
            self.order(reads, writes)
        pointwise = torch.Tag.pointwise in func.tags or name in POINTWISE
        if name in TWO_PASSES:  # the second is element by element
            self.close_group()
            self.launch(self.part, 1, sum(map(size_of, operands)), 0, "fp32")
            pointwise = True
        in_backward = torch._C._current_graph_task_id() != -1
        if pointwise and (self.fusing > 0 or self.compiled and in_backward):
            if self.group is None or self.group[0] != self.part:
                self.close_group()
                self.group = self.part, {}, []
            _, read, products = self.group
            inside = {x() for x in products}
            read |= {id(x): size_of(x) for x in operands if x not in inside}
            products += [weakref.ref(x, lambda _: None) for x in made]
            return
        self.close_group()
        sizes = [size_of(x) for x in operands]
        if name in GATHERS:
            sizes[0] = sum(map(size_of, made))
        if name in SCATTERS:
            sizes[0] = 0
            made = operands[-1:]
        num_bytes = sum(sizes) + sum(map(size_of, made))
        flops = 0
        if func.overloadpacket in flop_registry:
            on_meta = tree_map(lambda x: x.meta if isinstance(x, GpuTensor) else x, (args, kwargs, result))
            flops = flop_registry[func.overloadpacket](*on_meta[0], **on_meta[1], out_val=on_meta[2])
        peak = "bf16" if operands and operands[0].dtype == torch.bfloat16 else "fp32"
        self.launch(
            self.part, 2 if name == "convolution_backward" else 1, num_bytes, flops, peak
        )  # of input and weights

    def close_group(self):
        """One kernel for the operations so far that are fused: it reads what they did not make, and writes what
        is still needed of theirs."""
        if self.group:
            part, read, products = self.group
            self.group = None
            kept = [x() for x in products if x() is not None]
            self.launch(part, 1, sum(read.values()) + sum(map(size_of, kept)), 0, "bf16")

    def fused(self, function):
        """`function`, whose operations element by element are one kernel wherever they follow each other."""

        def wrapper(*args, **kwargs):
            self.close_group()
            self.fusing += 1
            result = function(*args, **kwargs)
            self.close_group()
            self.fusing -= 1
            return result

        return wrapper

    # --- in place of torch.cuda ---
    def compile(self, module):
        self.compiled = True
        module._compiled_call_impl = self.fused(module._call_impl)

    @contextlib.contextmanager
    def set_stance(self, stance):
        before = self.compiled, self.fusing
        self.compiled, self.fusing = False, -1_000  # no call of a compiled network makes that positive
        yield
        self.close_group()
        self.compiled, self.fusing = before

    @contextlib.contextmanager
    def on_stream(self, stream):
        self.close_group()
        before = self.stream
        self.stream = stream or before
        yield
        self.close_group()
        self.stream = before

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.synchronize()
        self.capturing = graph
        with self.on_stream(stream):
            yield
        self.capturing = None

    def new_stream(self, priority=0):
        self.streams.append(Stream())
        return self.streams[-1]


def size_of(tensor):
    """Bytes of a tensor; what `expand` repeats counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.element_size() * math.prod(sizes)


@contextlib.contextmanager
def simulated(card, assumed):
    """Puts the simulated GPU in the place of torch.cuda -> Gpu."""
    global gpu
    import torch._dynamo  # noqa: F401  (what it imports reads torch.Generator as a type)

    gpu = Gpu(card, assumed)
    gpu.stream = gpu.new_stream()
    one_generator, one_autocast = torch.Generator, torch.autocast
    clip = torch.nn.utils.clip_grad
    grouped = clip._group_tensors_by_device_and_dtype
    patches = {
        torch.cuda: {
            "is_available": lambda: True, "is_bf16_supported": lambda *_, **__: True, "_lazy_init": lambda: None,
            "get_device_name": lambda *_: f"{card} (simulated)", "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
            "synchronize": gpu.synchronize, "max_memory_reserved": gpu.peak_bytes, "Stream": gpu.new_stream,
            "Event": Event, "CUDAGraph": Graph, "current_stream": lambda *_: gpu.stream, "stream": gpu.on_stream,
            "graph": gpu.capture,
        },
        torch: {
            "Generator": lambda device="cpu": one_generator(),
            "autocast": lambda _, dtype=torch.bfloat16, enabled=True: one_autocast("cpu", dtype, enabled=enabled),
        },
        torch.nn.Module: {"compile": lambda self, **_: gpu.compile(self)},
        torch.compiler: {"set_stance": gpu.set_stance},
        torch._VF: {"lstm_cell": gpu.fused(torch._VF.lstm_cell)},  # on a GPU one kernel after the two products
        clip: {
            "_has_foreach_support": lambda *_: True, "_device_has_foreach_support": lambda *_: True,
            "_group_tensors_by_device_and_dtype": lambda x: {(DEVICE, k[1]): y for k, y in grouped(x).items()},
        },
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, stand_ins in patches.items():
            stack.enter_context(mock.patch.multiple(owner, **stand_ins))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Dispatch())
        yield gpu


def labelled(owner, name, part):
    """What `owner.name` does is counted to this part of an update."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        gpu.close_group()
        before, gpu.part = gpu.part, part
        result = function(*args, **kwargs)
        gpu.close_group()
        gpu.part = before
        return result

    setattr(owner, name, wrapper)


def hosted(owner, name, seconds=None):
    """What `owner.name` does on the host takes its real time, or `seconds(*args)`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        simulated, start = gpu.now, time.perf_counter()
        result = function(*args, **kwargs)
        spent = seconds(*args) if seconds else gpu.assumed.host_share * (time.perf_counter() - start)
        gpu.now = max(gpu.now, simulated + spent)
        return result

    setattr(owner, name, wrapper)
