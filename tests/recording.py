"""A CUDA graph for tensors on a CPU: it records the operations of a function and repeats them on the same memory.

As on a GPU Python does not run again: what a recording is to read anew must lie in a tensor that is still there, and
what it draws must come from a registered generator. Unlike a mock, which calls the function again, it finds a learning
rate, an index or a `.grad` that was only right when it was recorded.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []  # (operation, its arguments, what it gave)
        self.generators = []
        self.made = set()  # ids of what the operations gave
        self.before = {}  # what they found: (tensor, its copy) by id

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::lift_fresh") or kwargs.get("pin_memory"):
            raise RuntimeError(f"{name} is not permitted when stream is capturing")
        drawn_from = [x._cdata for x in [*args, *kwargs.values()] if isinstance(x, torch.Generator)]
        known = set(drawn_from) & {generator._cdata for generator in self.generators}
        if torch.Tag.nondeterministic_seeded in func.tags and not known:
            raise RuntimeError(f"{name} draws from a generator that is not registered")
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor) and id(x) not in self.made:
                self.before.setdefault(id(x), (x, x.detach().clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        self.made.update(map(id, tree_flatten(result)[0]))
        return result

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # where it was recorded
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                for place, x in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(x, torch.Tensor) and x.data_ptr() != place.data_ptr():  # no view, nothing in place
                        place.copy_(x)


@contextlib.contextmanager
def record(graph, stream=None):
    states = [generator.get_state() for generator in graph.generators]
    with graph:
        yield
    for generator, state in zip(graph.generators, states, strict=True):
        generator.set_state(state)
    for x, copied in graph.before.values():  # a GPU does nothing while it is recorded
        x.data.copy_(copied)


def patch(monkeypatch):
    """Gives `model.Recorded` such graphs."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda **_: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
