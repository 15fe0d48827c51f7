"""The EfficientZero networks, the value transform and the augmentation: tensors in, tensors out, alike in train and
eval mode and on any device. Below them, what all scripts need to write whole files and to go on after an interruption.

    o_t-3..o_t --h--> s_0 --g(a_t)--> s_1 --g(a_t+1)--> s_2 ...    h  RepresentationNetwork    B  batch
                       |               |                           g  DynamicsNetwork          C  channels of the latent
                       f               f, value prefix (LSTM)      f  PredictionNetwork        A  actions, 18 ALE ids
                       |               |                           SimSiam: projector and      S  support atoms, 601
                  policy, value   policy, value                    predictor                   L  LSTM size

"EfficientZero" is Ye et al. 2021, "XTRA" is Xu et al. 2023; the architecture is XTRA's Appendix H where the released
code agrees with it, and the released code where not (docs/finetune.md lists each place).
"""

import atexit
import contextlib
import copy
import dataclasses
import fcntl
import gc
import hashlib
import io
import json
import math
import os
import pathlib
import pickletools
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.tensorboard import SummaryWriter

MODEL_FORMAT, CHECKPOINT_FORMAT = "xtra-model-2", "xtra-checkpoint-3"
PLAIN_TYPES = r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict"  # what our files may hold


@dataclass(frozen=True)
class ModelConfig:
    """Every width of the network. The defaults are EfficientZero; `blocks=4` is EfficientZero-L and XTRA (App. H)."""

    channels: int = 64  # of the latent; the first convolution has half as many
    blocks: int = 1  # residual blocks in each of the four groups of the representation network
    frames: int = 4  # stacked RGB frames of one observation
    actions: int = 18  # the ALE action ids, whatever the game
    support: int = 300  # atoms are the integers -support..support
    head_channels: int = 16
    head_hidden: int = 32
    lstm_size: int = 512
    projector_hidden: int = 1024
    projector_out: int = 1024
    predictor_hidden: int = 512

    @classmethod
    def of_width(cls, channels, blocks):
        """The config of `--channels --blocks`: LSTM, projector and predictor scale with the channels (paper: 64)."""
        wide, half = 16 * channels, 8 * channels
        return cls(channels, blocks, lstm_size=half, projector_hidden=wide, projector_out=wide, predictor_hidden=half)


# --- value transform and categorical support ---
def scalar_transform(x, eps=0.001):
    """`h(x) = sign(x) * (sqrt(|x| + 1) - 1) + eps * x` (Pohlen et al. 2018; EfficientZero, Appendix A.1).

    Odd: h(100) = 9.14988 and h(-100) = -9.14988. XTRA's release misplaces a parenthesis and gives -8.94988.
    """
    return torch.sign(x) * (torch.sqrt(x.abs() + 1) - 1) + eps * x


def inverse_scalar_transform(y, eps=0.001):
    """`h^-1(y) = sign(y) * (((sqrt(1 + 4 * eps * (|y| + 1 + eps)) - 1) / (2 * eps))^2 - 1)`; below 0.001 it is 0.

    The quotient is written as `2 * a / (sqrt(1 + 4 * eps * a) + 1)` with `a = |y| + 1 + eps`: equal, and float32 keeps
    its digits, where the difference of two numbers near 1 loses four of them.
    """
    a = y.abs() + 1 + eps
    root = 2 * a / (torch.sqrt(1 + 4 * eps * a) + 1)
    x = torch.sign(y) * (root**2 - 1)
    return torch.where(x.abs() < 0.001, 0.0, x)


def scalar_to_support(x, support):
    """Two-hot code of h(x) on the atoms -support..support: [...] -> [..., S], rows sum to 1.

    A transformed value of 2.25 puts 0.75 on atom 2 (index 302) and 0.25 on atom 3; of 1.0 puts all on atom 1: hence
    scatter-add, since for an integer both halves meet in one atom and a plain scatter would overwrite the mass.
    """
    y = scalar_transform(x).clamp(-support, support)
    low = y.floor()
    high_mass = y - low
    index = (low + support).long().unsqueeze(-1)  # [..., 1]
    probs = torch.zeros(*x.shape, 2 * support + 1, device=x.device)  # [..., S]
    probs.scatter_add_(-1, index, (1 - high_mass).unsqueeze(-1))
    return probs.scatter_add_(-1, (index + 1).clamp(max=2 * support), high_mass.unsqueeze(-1))


def support_to_scalar(logits):
    """The scalar that categorical logits stand for, `h^-1(sum_i softmax(logits)_i * atom_i)`: [..., S] -> [...]."""
    support = (logits.shape[-1] - 1) // 2
    atoms = torch.arange(-support, support + 1, device=logits.device, dtype=torch.float32)  # [S]
    return inverse_scalar_transform((logits.float().softmax(-1) * atoms).sum(-1))


def cross_entropy(logits, target_probs):
    """`-sum_i target_i * log_softmax(logits)_i` over the last axis, in float32: [B, n] -> [B]."""
    return -(target_probs * F.log_softmax(logits.float(), dim=-1)).sum(-1)


# --- networks ---
def conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """conv, BN, ReLU, conv, BN, + skip, ReLU. A strided block's skip is a strided 3x3 convolution without BN."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            conv3x3(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity() if stride == 1 else conv3x3(inputs, outputs, stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


def head(config, outputs):
    """1x1 convolution, then two linear layers: [B, C, 6, 6] -> [B, outputs]; the last layer starts at zero, so that the
    search starts from a uniform policy and a value of exactly 0 (EfficientZero's init_zero)."""
    reduce = [nn.Conv2d(config.channels, config.head_channels, 1), nn.BatchNorm2d(config.head_channels), nn.ReLU()]
    return nn.Sequential(*reduce, nn.Flatten(), *mlp(config.head_channels * 36, config.head_hidden, outputs))


def mlp(inputs, hidden, outputs):
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), last


class RepresentationNetwork(nn.Module):
    """h: a stack of frames to a latent (XTRA, Appendix H; no BN after the pools, as in the released code)."""

    def __init__(self, config):
        super().__init__()
        stem, c = config.channels // 2, config.channels
        self.layers = nn.Sequential(
            conv3x3(3 * config.frames, stem, stride=2),  # [B, 12, 96, 96] -> [B, C/2, 48, 48]
            nn.BatchNorm2d(stem),
            nn.ReLU(),
            *[ResidualBlock(stem, stem) for _ in range(config.blocks)],
            ResidualBlock(stem, c, stride=2),  # -> [B, C, 24, 24]
            *[ResidualBlock(c, c) for _ in range(config.blocks)],
            nn.AvgPool2d(3, stride=2, padding=1),  # -> [B, C, 12, 12]
            *[ResidualBlock(c, c) for _ in range(config.blocks)],
            nn.AvgPool2d(3, stride=2, padding=1),  # -> [B, C, 6, 6]
            *[ResidualBlock(c, c) for _ in range(config.blocks)],
        )

    def forward(self, obs):
        """obs [B, 3 * frames, 96, 96], uint8 or a float in [0, 1], oldest frame first -> latent [B, C, 6, 6]."""
        return self.layers(obs.float() / 255 if obs.dtype == torch.uint8 else obs)


class DynamicsNetwork(nn.Module):
    """g: latent and action to the next latent and the value prefix, the sum of rewards since the LSTM's last reset."""

    def __init__(self, config):
        super().__init__()
        c, lstm_size = config.channels, config.lstm_size
        self.actions = config.actions
        self.conv = nn.Sequential(conv3x3(c + 1, c), nn.BatchNorm2d(c))
        self.block = ResidualBlock(c, c)
        self.reduce = nn.Sequential(
            nn.Conv2d(c, config.head_channels, 1), nn.BatchNorm2d(config.head_channels), nn.ReLU(), nn.Flatten()
        )
        self.lstm = nn.LSTMCell(config.head_channels * 36, lstm_size)
        hidden = mlp(lstm_size, config.head_hidden, 2 * config.support + 1)
        self.prefix_head = nn.Sequential(nn.BatchNorm1d(lstm_size), nn.ReLU(), *hidden)

    def forward(self, latent, action, lstm_state):
        """latent [B, C, 6, 6], action [B] int64 ALE ids, lstm_state (h, c) each [B, L]
        -> next latent, lstm_state, value prefix logits [B, S]."""
        action_plane = (action.to(latent.dtype) / self.actions).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)
        action_plane = action_plane.contiguous(memory_format=torch.channels_last)  # so that `cat` keeps the latent's
        x = self.conv(torch.cat([latent, action_plane], dim=1))  # [B, C+1, 6, 6] -> [B, C, 6, 6]
        # The scaling sits before every use of the new latent, the value prefix included: the reference's hook halves
        # the whole gradient that arrives there, so the step-k losses reach the root latent with a factor 0.5^k.
        latent = scale_gradient(self.block(F.relu(x + latent)), 0.5)
        lstm_state = self.lstm(self.reduce(latent), lstm_state)  # the carried state is the raw one, before BN
        return latent, lstm_state, self.prefix_head(lstm_state[0])


class PredictionNetwork(nn.Module):
    """f: latent [B, C, 6, 6] -> policy logits [B, A] over the 18 ALE ids, value logits [B, S]."""

    def __init__(self, config):
        super().__init__()
        self.block = ResidualBlock(config.channels, config.channels)
        self.policy = head(config, config.actions)
        self.value = head(config, 2 * config.support + 1)

    def forward(self, latent):
        x = self.block(latent)
        return self.policy(x), self.value(x)


class EfficientZeroNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.representation = RepresentationNetwork(config)
        self.dynamics = DynamicsNetwork(config)
        self.prediction = PredictionNetwork(config)
        hidden, out = config.projector_hidden, config.projector_out
        self.projector = nn.Sequential(  # both branches of the consistency loss; ends in BN without ReLU
            nn.Flatten(),
            *[nn.Linear(config.channels * 36, hidden), nn.BatchNorm1d(hidden), nn.ReLU()],
            *[nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()],
            *[nn.Linear(hidden, out), nn.BatchNorm1d(out)],
        )
        self.predictor = nn.Sequential(  # the online branch only
            *[nn.Linear(out, config.predictor_hidden), nn.BatchNorm1d(config.predictor_hidden), nn.ReLU()],
            nn.Linear(config.predictor_hidden, out),
        )

    def initial_inference(self, obs):
        """obs [B, 12, 96, 96] -> latent [B, C, 6, 6], policy logits [B, A], value logits [B, S]."""
        latent = self.representation(obs)
        return latent, *self.prediction(latent)

    def recurrent_inference(self, latent, action, lstm_state):
        """latent, action [B], (h, c) -> latent, (h, c), prefix logits [B, S], policy logits [B, A], value logits."""
        latent, lstm_state, prefix_logits = self.dynamics(latent, action, lstm_state)
        return latent, lstm_state, prefix_logits, *self.prediction(latent)

    def initial_lstm_state(self, batch_size, like):
        """Zeros (h, c), each [B, L], on the device and of the type of the tensor `like`."""
        zeros = like.new_zeros(batch_size, self.config.lstm_size)
        return zeros, zeros


def scale_gradient(x, factor):
    """x itself, through which only `factor` of the gradient flows back."""
    return x.detach() + factor * (x - x.detach()) if x.requires_grad else x


def inference_copy(net, keep_memory=False):
    """A frozen copy in eval mode with each batch norm folded into the convolution or linear layer before it.

    Same outputs to float rounding, half the kernels; the search calls this one. On a GPU its weights are cast to bf16
    here, once, and not by autocast in each call. The copy does not follow `net` (`refresh` makes it), and has no
    projector and predictor. keep_memory: whether `mcts.search` keeps its memory, and what it records, in `net.memory`.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    net.projector = net.predictor = None
    for layers in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(layers) - 1):
            if isinstance(layers[i], nn.Conv2d) and isinstance(layers[i + 1], _BatchNorm):
                layers[i], layers[i + 1] = fuse_conv_bn_eval(layers[i], layers[i + 1]), nn.Identity()
            elif isinstance(layers[i], nn.Linear) and isinstance(layers[i + 1], _BatchNorm):
                layers[i], layers[i + 1] = fuse_linear_bn_eval(layers[i], layers[i + 1]), nn.Identity()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.LSTMCell) and next(layer.parameters()).is_cuda:
            layer.to(torch.bfloat16)
    net.memory = {} if keep_memory else None
    return net.requires_grad_(False)


def refresh(frozen, net):
    """Gives an `inference_copy` the weights of `net` or of another copy, in place: recorded kernels read them there."""
    frozen.load_state_dict((inference_copy(net) if net.training else net).state_dict())


# --- speed ---
class Recorded:
    """`function(*tensors)` on a GPU; its kernels are recorded at the third call, then launched as one CUDA graph.

    The tensors keep their shapes, and what else the function reads keeps its place in memory. The next call overwrites
    the results. The first two calls are ordinary ones, so that the function has allocated and compiled what it needs.
    """

    stream = None  # of the ordinary calls: what autograd makes on the default stream cannot be recorded later

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *tensors):
        if self.calls < 2:
            self.calls += 1
            Recorded.stream = Recorded.stream or torch.cuda.Stream()
            Recorded.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(Recorded.stream):
                results = self.function(*tensors)
            torch.cuda.current_stream().wait_stream(Recorded.stream)
            return results
        if self.graph is None:
            self.tensors, self.graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            gc.collect()  # a graph that nobody uses any more must not be freed while another is recorded: that ends it
            gc.disable()
            try:
                with torch.cuda.graph(self.graph):
                    self.results = self.function(*self.tensors)
            finally:
                gc.enable()
        for place, x in zip(self.tensors, tensors, strict=True):
            place.copy_(x)
        self.graph.replay()
        return self.results


def upload(array, device):
    """A numpy array as a tensor on `device`; the host does not wait for a GPU."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# --- several processes ---
# `torchrun --nproc-per-node N` starts W = N processes that play the same games, draw the same batches and hold the same
# replay. Each searches every W-th state and learns from every W-th sample, rank first: rows[rank::W]. Process 0 alone
# writes. Where there is one process, nothing is exchanged.
def join_processes(cuda):
    """Meets the other processes of torchrun, if any -> (device, rank, W). cuda: whether to use a GPU if there is one.

    All processes but the first print nothing but errors from now on.
    """
    use_cuda, rank, W = cuda and torch.cuda.is_available(), 0, 1
    if "LOCAL_RANK" in os.environ:
        gpus, local_rank, W = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        if use_cuda and local_rank >= gpus:
            raise SystemExit(f"error: torchrun starts more processes than there are GPUs ({gpus}); lower its number")
    if W > 1:
        if use_cuda:
            torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))  # an evaluation may take that long
        atexit.register(distributed.destroy_process_group)
        rank = distributed.get_rank()
        if rank:
            sys.stdout = open(os.devnull, "w")
    return torch.device("cuda" if use_cuda else "cpu"), rank, W


def average(tensors):
    """The mean over the processes of each tensor of a list -> list of the same shapes. One message for all."""
    if not distributed.is_initialized():
        return tensors
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]


def gradients(loss, parameters):
    """The gradients of the mean of `loss` over the processes -> list, None where a parameter has none.

    Each lies in memory as its parameter does, channels_last or not: the fused optimizer reads them side by side.
    """
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    averaged = iter(average([gradient for gradient in found if gradient is not None]))
    found = [None if gradient is None else next(averaged) for gradient in found]
    same = [x is None or x.stride() == parameter.stride() for x, parameter in zip(found, parameters, strict=True)]
    return [x if ok else torch.empty_like(p).copy_(x) for x, ok, p in zip(found, same, parameters, strict=True)]


def interleave(x):
    """x [n / W, ...] of each process, which belongs to rows[rank::W] -> [n, ...] in all of them."""
    if not distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def add_up(array):
    """The sum of a numpy array over the processes."""
    if not distributed.is_initialized():
        return array
    tensor = torch.from_numpy(array.copy())
    distributed.all_reduce(tensor)
    return tensor.numpy()


def of_first(array):
    """What process 0 has."""
    if not distributed.is_initialized():
        return array
    tensor = torch.from_numpy(array.copy())
    distributed.broadcast(tensor, 0)
    return tensor.numpy()


def any_interrupted(interrupted):
    """Whether a process was asked to stop, the same answer in all of them. interrupted: of `catch_signals`."""
    total = add_up(np.array(len(interrupted)))  # and not the list itself: a signal may have come since
    if total and not interrupted:
        interrupted.append("another process")
    return bool(total)


class SumOverProcesses(torch.autograd.Function):
    """The sum over the processes, through which gradients are summed over the processes too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


class SharedBatchNorm(_BatchNorm):
    """Batch norm whose statistics are over the samples of all processes. (nn.SyncBatchNorm needs a GPU.)"""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        W, n = distributed.get_world_size(), x.numel() // x.shape[1]  # each process has n numbers per channel
        mean = SumOverProcesses.apply(x.float().mean(dims)) / W
        centred = x.float() - mean.view(shape)
        var = SumOverProcesses.apply(centred.square().mean(dims)) / W
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (W * n / (W * n - 1)), self.momentum)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def share_batch_norms(net):
    """Makes each batch norm of the network a `SharedBatchNorm`, in place."""
    if distributed.is_initialized():
        for layer in net.modules():
            if isinstance(layer, _BatchNorm):
                layer.__class__ = SharedBatchNorm


# --- augmentation ---
def random_shift(obs, generator, pad=4):
    """Replicate-pads by `pad` pixels and crops back at a random place, one offset per sample: [B, C, H, W] -> same, in
    channels_last order, where a pixel is one short copy and the network's first convolution reads it as it is."""
    B, C, H, W = obs.shape
    offset = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator, device=obs.device) - pad  # [2, B, 1]
    # Reading a clamped index is the same as padding by replication, without the padded copy.
    rows = (torch.arange(H, device=obs.device) + offset[0]).clamp(0, H - 1)  # [B, H]
    columns = (torch.arange(W, device=obs.device) + offset[1]).clamp(0, W - 1)  # [B, W]
    rows += torch.arange(B, device=obs.device)[:, None] * H
    pixels = rows[:, :, None] * W + columns[:, None, :]  # [B, H, W], into [B * H * W, C]
    shifted = obs.permute(0, 2, 3, 1).reshape(B * H * W, C).index_select(0, pixels.flatten())
    return shifted.view(B, H, W, C).permute(0, 3, 1, 2)


def random_intensity(obs, generator, scale=0.05):
    """Multiplies each sample of a float [B, C, H, W], in place, by `1 + scale * clip(n, -2, 2)`, n ~ N(0, 1)."""
    noise = torch.randn(obs.shape[0], 1, 1, 1, generator=generator, device=obs.device).clamp(-2, 2)
    return obs.mul_(1 + scale * noise)


def augment(obs, generator):
    """Shift, then intensity (algorithm of EfficientZero's released code): uint8 [B, C, H, W] -> float, about [0, 1]."""
    return random_intensity(random_shift(obs, generator).float().div_(255), generator)


# --- files ---
def write_file(path, content, keep_going=False):
    """Writes a temporary file beside `path`, then renames it: `path` is whole, or as it was before.

    content: bytes, or a function that writes to an open file. A full disk or a folder that cannot be written leaves
    nothing behind and exits with one line; with keep_going (for what a later write replaces anyway) it is a warning and
    the result False.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w+b") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        problem = f"{path} could not be written ({error.strerror or error}); free space or choose another folder"
        if not keep_going:
            raise SystemExit(f"error: {problem}") from None
        print(f"\nwarning: {problem}. The file is as it was, and the run goes on", file=sys.stderr)
        return False
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    with contextlib.suppress(OSError):  # the new name survives a power failure too, where the file system can do that
        os.fsync(folder)
    os.close(folder)
    return True


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path, format, fields, files):
    """Writes a json file of `fields` and the sha256 of `files` (paths relative to its folder), and of itself."""
    digests = {name: sha256(os.path.join(os.path.dirname(path), name)) for name in files}
    manifest = {"format": format, **fields, "sha256": digests}
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    write_file(path, json.dumps(manifest, indent=1).encode())


def load_manifest(path, format, fields, files):
    """Reads what `write_manifest` wrote and checks every file that it names -> dict.

    fields: the type that each field must have; files: the names that must be there, with fields in {}. Exits with one
    line if a file is missing, damaged, of another format version or not the one that was named.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(1_000_000)
        manifest = json.loads(text)
        written_by_us = text == json.dumps(manifest, indent=1).encode()
        checksum, found, digests = manifest.pop("checksum"), manifest["format"], manifest["sha256"]
        intact = written_by_us and checksum == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    except OSError as error:
        reason = f"{error.strerror}: expected a folder of format {format}"
        raise SystemExit(f"error: {path} not found or not readable ({reason}); check its name") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise SystemExit(f"error: {path} is damaged (its checksum differs); copy or make its folder again")
    if found != format:
        raise SystemExit(f"error: {path} has format {found!r}, expected {format!r}; make its folder again")
    values = [manifest.get(name) for name in fields]
    if not all(type(x) is kind and str(x).isprintable() for x, kind in zip(values, fields.values(), strict=True)):
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
        raise SystemExit(f"error: {path} lacks a field or has one of another type, expected {expected}; make it again")
    files = [name.format(**manifest) for name in files]
    if not isinstance(digests, dict) or sorted(digests) != sorted(files):
        raise SystemExit(f"error: {path} does not name its files, expected {', '.join(files)}; make it again")
    for name in files:
        file = os.path.join(os.path.dirname(path), name)
        try:
            found = sha256(file)
        except OSError as error:
            hint = "put it back or make the folder again"
            raise SystemExit(f"error: {file} not found ({error.strerror}), but {path} names it; {hint}") from None
        if found != digests[name]:
            raise SystemExit(f"error: {file} is damaged, or does not belong to {path} (its sha256 differs)")
    return manifest


def save_torch(path, content, keep_going=False):
    """Writes a dict for `torch.load`, whose zip comment is the sha256 of all bytes before it, and reads it back before
    it replaces an older file. keep_going and the return value: as of `write_file`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    data[-2:] = (64).to_bytes(2, "little")  # a zip ends with the length of its comment and the comment
    digest = hashlib.sha256(data)

    def write(file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if hashlib.file_digest(file, "sha256").digest() != digest.digest():
            raise OSError("what was read back is not what was written")
        file.write(digest.hexdigest().encode())

    return write_file(path, write, keep_going)


def load_torch(path, format):
    """Reads what `save_torch` wrote -> dict, its tensors on the CPU.

    Nothing is unpickled but tensors and plain values, and nothing is larger than the file. Exits with one line if the
    file is missing, damaged or of another format.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise SystemExit(f"error: {path} not found or not readable ({error.strerror}); check its name") from None
    if data[-64:] != hashlib.sha256(data[:-64]).hexdigest().encode():
        raise SystemExit(f"error: {path} is damaged or is no file of this project (its sha256 differs); write it again")
    try:
        archive, clean = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise ValueError("it unpacks to more than its own size")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
        with zipfile.ZipFile(clean, "w") as copied:  # a zip may have a second directory, which torch alone would read
            for name in archive.namelist():
                copied.writestr(name, archive.read(name))
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        for operation, name, _ in pickletools.genops(archive.read(pickled)):  # stricter than weights_only
            if "GLOBAL" in operation.name and not re.fullmatch(PLAIN_TYPES, str(name)):
                raise ValueError(f"it wants to call {name}")
        clean.seek(0)
        content = torch.load(clean, map_location="cpu", weights_only=True)
        found = content["format"]
    except Exception as error:  # torch.load answers a foreign file with any of a dozen types
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise SystemExit(f"error: {path} is no {format} ({reason}); write it again") from None
    if type(found) is not str or found != format:
        raise SystemExit(f"error: {path} has format {str(found)[:40]!r}, expected {format!r}; write it anew")
    return content


def save_model(path, net, args, task_ids, counters, keep_going=False):
    """Writes the weights and all that is needed to use them without the script.

    args: the script's flags as a dict of plain values; task_ids: the games, in order; counters: a dict of numbers
    (updates, env_steps, score, ...).
    """
    content = {"format": MODEL_FORMAT, "model": net.state_dict(), "config": dataclasses.asdict(net.config)}
    save_torch(path, content | {"args": args, "task_ids": list(task_ids), "counters": counters}, keep_going)


def check_weights(found, expected):
    """Raises a ValueError unless two state dicts have the same names, shapes and types, and `found` is finite."""
    if {name: (x.shape, x.dtype) for name, x in found.items()} != {n: (x.shape, x.dtype) for n, x in expected.items()}:
        raise ValueError("names, shapes or types of the weights differ")
    if not all(x.isfinite().all() for x in found.values()):
        raise ValueError("weights are not finite")


def load_model(path, device="cpu"):
    """Reads what `save_model` wrote -> (net in eval mode on `device`, the dict without the weights).

    The weights must be finite and match the stored config exactly. Exits with one line if they do not, and where
    `load_torch` does.
    """
    content = load_torch(path, MODEL_FORMAT)
    try:
        config, weights = ModelConfig(**content["config"]), content.pop("model")
        if not all(type(n) is int and 1 <= n <= 65_536 for n in vars(config).values()) or config.blocks > 64:
            raise ValueError(f"{config} is out of range")
        if sum(x.numel() * x.element_size() for x in weights.values()) > os.path.getsize(path):
            raise ValueError("the weights claim more memory than the file has")
        with torch.device("meta"):  # shapes without memory
            check_weights(weights, EfficientZeroNet(config).state_dict())
        if [type(content[name]) for name in ("args", "task_ids", "counters")] != [dict, list, dict]:
            raise ValueError("args, task_ids or counters have another type")
        net = EfficientZeroNet(config).to(device)
        net.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"error: {path} does not fit its own config ({reason}); write it again") from None
    return net.eval(), content


def load_arrays(path, expected):
    """Reads an npz file -> dict of the arrays named in `expected`, {name: (dtype, shape)}.

    Exits with one line if one is missing or other than expected; headers are compared before memory is taken.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name, (dtype, shape) in expected.items():
                if file.getinfo(f"{name}.npy").compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{name} is compressed")
                with file.open(f"{name}.npy") as entry:
                    version = np.lib.format.read_magic(entry)
                    found_shape, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(entry)
                    if (version, found_dtype, found_shape, fortran_order) != ((1, 0), dtype, shape, False):
                        raise ValueError(f"{name} is {found_dtype} {found_shape}, expected {dtype} {shape}")
                    size = math.prod(shape) * np.dtype(dtype).itemsize
                    arrays[name] = np.frombuffer(entry.read(size), dtype).reshape(shape)
    except Exception as error:  # zipfile and numpy answer a foreign file with any of a dozen types
        reason = " ".join(str(error).split())[:120]
        raise SystemExit(f"error: {path} is not as its folder says ({reason}); make the folder again") from None
    return arrays


# --- a run that may be interrupted ---
INTERRUPTED = 75  # exit status "start me again with --resume"; EX_TEMPFAIL of sysexits.h


def catch_signals():
    """From now on SIGINT, SIGTERM and SIGUSR1 only put their name into the list that this returns; the run looks at it
    after each update. Once one has come, SIGINT ends the process at once."""
    interrupted = []

    def note(number, frame):
        interrupted.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return interrupted


def lock_folder(folder, checkpoint=None):
    """Makes a run folder and locks it until this process ends, however it ends -> the open lock file.

    Exits with one line if the folder cannot be written, if another process holds it, or if one has written a checkpoint
    since `load_checkpoint` looked.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(f"{folder}/lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: --run-dir {folder} is in use by another process; wait or choose another") from None
    except OSError as error:
        reason = f"{error.strerror}, expected a folder that can be written"
        raise SystemExit(f"error: --run-dir {folder}: {reason}; choose another") from None
    if checkpoint_time(folder) != (checkpoint["time"] if checkpoint else None):
        raise SystemExit(f"error: --run-dir {folder}: another process has gone on with this run; start again")
    return lock


def checkpoint_time(folder):
    """When the checkpoint of a run folder was written, in ns; None if there is none."""
    path = f"{folder}/checkpoint.pt"
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def event_sizes(folder, sync=False):
    """{name: bytes} of TensorBoard's files in a run folder. sync: whether to wait until the disk has them."""
    sizes = {}
    for name in sorted(name for name in os.listdir(folder) if name.startswith("events.out.tfevents")):
        with open(f"{folder}/{name}", "rb") as file:
            if sync:
                os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
    return sizes


def rewind_events(folder, sizes):
    """Cuts TensorBoard's files back to the `event_sizes` of a moment before; warns if one is missing or too short."""
    found = event_sizes(folder)
    for name, size in sizes.items():
        if found.get(name, -1) < size:
            print(f"warning: {folder}/{name} is missing or cut: TensorBoard's curves have a gap", file=sys.stderr)
    for name in found:
        if name not in sizes:
            os.remove(f"{folder}/{name}")
        elif sizes[name] < found[name]:
            os.truncate(f"{folder}/{name}", sizes[name])


class Log:
    """TensorBoard's writer, which keeps what a full disk does not take until there is space again. Without a folder it
    writes nothing."""

    def __init__(self, folder):
        threading.excepthook = lambda _: None  # of the writer's thread: `flush` gets its error
        self.folder, self.pending, self.writer = folder, [], None
        self.sizes = event_sizes(folder) if folder else {}

    def add_scalar(self, key, value, step):
        self.pending.append(("add_scalar", key, value, step, time.time()))

    def add_text(self, key, text):
        self.pending.append(("add_text", key, text, 0, time.time()))

    def flush(self, keep_going=True):
        """Writes what is pending -> whether it is on disk. Without keep_going a failure exits with one line."""
        if not self.folder:
            self.pending = []
            return True
        try:
            self.writer = self.writer or SummaryWriter(self.folder)
            for method, *event in self.pending:
                getattr(self.writer, method)(*event)
            self.writer.flush()
            self.sizes, self.pending = event_sizes(self.folder), []
        except OSError as error:
            self.writer = None
            rewind_events(self.folder, self.sizes)
            problem = f"{self.folder}: TensorBoard's file could not be written ({error.strerror or error})"
            if not keep_going:
                raise SystemExit(f"error: {problem}; free space, then start again with --resume") from None
            print(f"\nwarning: {problem}; the run goes on and tries again", file=sys.stderr)
        return not self.pending


def replay_state(replay, version):
    """What a checkpoint keeps of a replay: priorities, and the targets of `version`, the current target network. Older
    targets are never read again; frames, actions and rewards come back from the dataset or the game."""
    fresh = np.flatnonzero(replay.value_version[: replay.size] == version)  # [n]
    names = ("policy", "value", "policy_version", "value_version")
    targets = {name: torch.from_numpy(getattr(replay, name)[fresh]) for name in names}
    return targets | {"fresh": torch.from_numpy(fresh), "priority": torch.from_numpy(replay.priority[: replay.size])}


def restore_replay(replay, state):
    """Puts back what `replay_state` kept; raises a ValueError or its like if it is not of this replay."""
    fresh = state["fresh"]
    names = ("policy", "value", "policy_version", "value_version")
    expected = {name: torch.from_numpy(getattr(replay, name)[: len(fresh)]) for name in names}
    expected |= {"fresh": fresh.new_empty(len(fresh), dtype=torch.int64)}
    check_weights(state, expected | {"priority": torch.from_numpy(replay.priority[: replay.size])})
    if not ((0 <= fresh) & (fresh < replay.size)).all() or not (fresh.diff() > 0).all():
        raise ValueError("targets are of rows that the replay does not have")
    for name in names:
        getattr(replay, name)[fresh.numpy()] = state[name].numpy()
    replay.priority[: replay.size] = priority = state["priority"].numpy()
    if not (np.isfinite(priority).all() and ((priority > 0) == replay.acted[: replay.size]).all()):
        raise ValueError("priorities are not finite and above 0 where there are actions")


def save_checkpoint(run_dir, log, args, inputs, parts, replays, version, values, keep_going=False):
    """Writes all that a run needs to go on exactly as if it had not stopped.

    log: is flushed first. args: the script's Args. inputs: sha256 of what it reads. parts: {name: network, optimizer or
    generator}. version: of the current target network. values: counters and results, tensors and plain values.
    keep_going and the return value: as of `write_file`.
    """
    if not log.flush(keep_going):
        return False
    states = {}
    for name, part in parts.items():
        if isinstance(part, np.random.Generator):
            states[name] = json.dumps(part.bit_generator.state)
        else:
            states[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
    content = {"format": CHECKPOINT_FORMAT, "args": vars(args), "inputs": inputs, "states": states, "values": values}
    content |= {"replays": [replay_state(x, version) for x in replays], "events": event_sizes(run_dir, sync=True)}
    return save_torch(f"{run_dir}/checkpoint.pt", content, keep_going)


def load_checkpoint(args):
    """The checkpoint of `--run-dir` -> dict, or None if `--resume` is not asked for or has nothing to continue.

    Exits with one line if a flag changed that makes it another run, and where `load_torch` does.
    """
    path = f"{args.run_dir}/checkpoint.pt"
    written = checkpoint_time(args.run_dir)
    if not args.resume or written is None:
        return None
    checkpoint = load_torch(path, CHECKPOINT_FORMAT) | {"time": written}
    try:
        before = {name: checkpoint["args"][name] for name in vars(args)}
        kinds = [type(checkpoint[name]) for name in ("values", "replays", "events")]
        counts = [checkpoint["values"]["updates"], *checkpoint["events"].values()]
        if kinds != [dict, list, dict] or not all(type(n) is int and n >= 0 for n in counts):
            raise KeyError("values, replays or events")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise SystemExit(f"error: {path} lacks {error}: expected a run of this script; choose another folder") from None
    may_change = ["run_dir", "resume", "checkpoint_every", "cuda", "track", "wandb_project_name", "wandb_entity"]
    may_change += ["capture_video", "save_dataset", "compile", "cudagraphs"]
    may_change += ["datasets", "teachers", "pretrained"]  # `restore` compares what is in them
    for name, value in vars(args).items():
        if name not in may_change and (type(before[name]) is not type(value) or before[name] != value):
            hint = "give the flags that it was started with, or another --run-dir"
            raise SystemExit(
                f"error: --{name.replace('_', '-')} is {value}, but {path} has {before[name]!a:.99}; {hint}"
            )
    return checkpoint


def restore(run_dir, checkpoint, inputs, parts, replays, **kinds):
    """Gives parts and replays their states of `save_checkpoint` back -> the values named in `kinds`, in that order.

    kinds: {name: type, or shape of a tensor}. Exits with one line if the checkpoint does not fit or if an input file is
    another one.
    """
    path = f"{run_dir}/checkpoint.pt"
    try:
        if checkpoint["inputs"] != inputs:
            raise ValueError("its datasets or teachers were exchanged since")
        for name, part in parts.items():
            state = checkpoint["states"][name]
            if isinstance(part, nn.Module):
                check_weights(state, part.state_dict())
            if isinstance(part, torch.optim.Optimizer):
                parameters = dict(enumerate(part.param_groups[0]["params"]))
                buffers = {i: momentum["momentum_buffer"] for i, momentum in state["state"].items()}
                check_weights(buffers, {i: parameters[i] for i in buffers})
                settings = [repr([x | {"lr": 0.0} for x in y["param_groups"]]) for y in (state, part.state_dict())]
                if settings[0] != settings[1] or type(state["param_groups"][0]["lr"]) is not float:
                    raise ValueError(f"the settings of {name} differ")
            if isinstance(part, np.random.Generator):
                part.bit_generator.state = json.loads(state)
            elif isinstance(part, torch.Generator):
                part.set_state(state)
            else:
                part.load_state_dict(state)
        for replay, state in zip(replays, checkpoint["replays"], strict=True):
            restore_replay(replay, state)
        values = [checkpoint["values"][name] for name in kinds]
        for (name, kind), value in zip(kinds.items(), values, strict=True):
            if isinstance(kind, tuple):
                check_weights({name: value}, {name: torch.empty(kind)})
            elif type(value) is not kind:
                raise ValueError(f"{name} is {type(value).__name__}, expected {kind}")
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "start with the same files on the same kind of device, or in another --run-dir"
        raise SystemExit(f"error: {path} does not fit this run ({reason}); {hint}") from None
    return values


def check_finite(loss, gradient_norm, terms, gradients, sample_names, net, batch):
    """Raises `FloatingPointError(what, tensors)` unless loss and gradient norm, plain numbers, are finite.

    what: the first loss term and game, or the first parameter, that is not. terms: {name: [B]}; gradients: of all that
    require one, or None; sample_names [B]: the game of each sample; tensors: the batch (a NamedTuple) and the weights,
    for a post-mortem.
    """
    if math.isfinite(loss + gradient_norm):
        return
    bad = [(name, ~term.isfinite()) for name, term in terms.items() if not term.isfinite().all()]
    found = [f"the {name} loss of {sample_names[int(where.nonzero()[0])]}" for name, where in bad]
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    bad = [x is not None and not x.isfinite().all() for x in gradients]
    found += [f"the gradient of {name}" for name, is_bad in zip(names, bad, strict=True) if is_bad]
    raise FloatingPointError([*found, "the loss"][0], {"batch": batch._asdict(), "weights": net.state_dict()})


def finite_values(value_logits, env_id, obs):
    """Value logits [n, S] as scalars, numpy [n]; raises `FloatingPointError(what, tensors)` if one is not finite."""
    value = support_to_scalar(value_logits).cpu().numpy()
    if not np.isfinite(value).all():
        raise FloatingPointError(f"the value of a state of {env_id}", {"obs": obs})
    return value


@contextlib.contextmanager
def stop_if_not_finite(run_dir, bar):
    """Ends the run with one line where a number is not finite, and keeps what led to it. bar: counts the updates."""
    try:
        yield
    except FloatingPointError as error:
        what, tensors = error.args
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        path = f"{run_dir}/not_finite{rank or ''}.pt"
        save_torch(path, {"format": "xtra-not-finite-1", "update": bar.n, "what": what, **tensors}, keep_going=True)
        hint = f"the run before it is in checkpoint.pt; look at {path}, then try a lower --learning-rate"
        raise SystemExit(f"error: {what} is not finite at update {bar.n}; {hint}") from None


def free_memory():
    """Bytes of RAM that this process can still take: what the machine has free, within the limits of its cgroup."""
    free = psutil.virtual_memory().available
    try:
        with open("/proc/self/cgroup") as file:
            group = pathlib.PurePosixPath(file.read().strip().rpartition("::")[2])
    except OSError:  # not Linux
        return free
    for folder in [group, *group.parents]:
        try:
            limit = pathlib.Path(f"/sys/fs/cgroup{folder}/memory.max").read_text().strip()
        except OSError:
            continue
        if limit != "max":
            free = min(free, int(limit) - psutil.Process().memory_info().rss)
    return free


def check_memory(device, run_dir, config, rows, samples, roots, num_simulations, disk=None):
    """Prints what a run needs at its full length and exits with one line if it is not there -> whether the frames must
    stay in RAM, because a GPU has room for everything else only.

    rows: of all replays together; samples: of an update; roots: of its largest search; disk: {path: bytes} of what it
    writes besides its networks.
    Counted: frames and weights. Estimated: what training saves for its backward pass, or a search for its tree.
    """
    channels, lstm_size, blocks = config.channels, config.lstm_size, config.blocks
    with torch.device("meta"):
        weights = 4 * sum(parameter.numel() for parameter in EfficientZeroNet(config).parameters())
    training = samples * (19 * channels * (1908 * blocks + 1440) + 3_000_000)
    search = roots * (4 * num_simulations * (36 * channels + 2 * lstm_size) + 9216 * (12 * 9 + 2 * channels))
    # In bf16 half of it, but a GPU keeps the memory of what it has recorded: of an update beside one that is not, of
    # searches of many sizes.
    work = 5 * weights + (training + search if device.type == "cuda" else max(training, search))
    data, rest = rows * 3 * 96 * 96, rows * 130 + (3e9 if device.type == "cuda" else 6e8)  # libraries
    disk = {run_dir: (4 if checkpoint_time(run_dir) else 8) * weights} | (disk or {})
    needs, frames_on_host = {}, False
    for path, size in disk.items():
        folders = [pathlib.Path(path).absolute(), *pathlib.Path(path).absolute().parents]
        needs[f"disk for {path}"] = size, shutil.disk_usage(next(x for x in folders if x.is_dir())).free
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        needs |= {"GPU memory": (work + data, free), "RAM": (rest, free_memory())}
        if frames_on_host := work + data > free:
            needs |= {"GPU memory": (work, free), "RAM": (rest + data, free_memory())}
    else:
        needs |= {"RAM": (data + work + rest, free_memory())}
    needs["RAM"] = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * needs["RAM"][0], needs["RAM"][1]  # torchrun's processes
    texts = [f"{needed / 1e6:,.0f} MB of {name} ({free / 1e6:,.0f} free)" for name, (needed, free) in needs.items()]
    where = "; its frames stay in RAM, the GPU has no room for them" if frames_on_host else ""
    print("this run needs about " + ", ".join(texts) + where)
    for text, (name, (needed, free)) in zip(texts, needs.items(), strict=True):
        if needed > free:
            flags = "lower --batch-size, --channels, --num-simulations or the steps stored"
            hint = "free some or choose another folder" if name.startswith("disk") else flags
            raise SystemExit(f"error: this run needs about {text}; {hint}")
    return frames_on_host
