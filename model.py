"""The EfficientZero networks and the value transform: tensors in, tensors out, on any device. Then what records kernels
on a GPU, how rows are drawn and frames augmented, and at the end what comes from outside and goes there: environments,
the command line, files and run folders of the three scripts.

    o_t-3..o_t --h--> s_0 --g(a_t)--> s_1 --g(a_t+1)--> s_2 ...    h  RepresentationNetwork    B  batch
                       |               |                           g  DynamicsNetwork          C  channels of the latent
                       |               |-LSTM-> value prefix       f  PredictionNetwork        A  actions, 18 ALE ids
                       f               f                           SimSiam: projector and      S  support atoms, 601
                  policy, value   policy, value                    predictor                   L  LSTM size

"EfficientZero" is Ye et al. 2021, "XTRA" is Xu et al. 2023; the architecture is XTRA's Appendix H where the released
code agrees with it, and the released code where not (docs/finetune.md lists each place).
"""

import contextlib
import copy
import difflib
import functools
import gc
import glob
import hashlib
import importlib.util
import io
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import SimpleNamespace

import ale_py
import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import zstandard
from ale_py.vector_env import AtariVectorEnv
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

VALUE_PREFIX_HORIZON = 5  # steps between resets of the LSTM; a test keeps it equal to that of mcts.py


@dataclass(frozen=True)
class ModelConfig:
    """All that the function of the network depends on, stored with its weights. The defaults are EfficientZero;
    `blocks=4` is EfficientZero-L and XTRA (App. H)."""

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
    activation: str = "ReLU"  # a module of torch.nn
    norm_steps: int = 5  # unroll steps whose batch norm statistics g and f keep apart; 0: one mixture of all steps
    action_gain: float = 30.0  # factor on the initial weights of g for the action (then without effect); 1: PyTorch's
    one_hot_actions: bool = False  # whether g gets one plane per action; else one of a / 18, like the released code

    @classmethod
    def of_width(cls, channels, blocks, **others):
        """The config of `--channels --blocks`: LSTM, projector and predictor scale with the channels (paper: 64)."""
        wide = {"projector_hidden": 16 * channels, "projector_out": 16 * channels}
        return cls(channels, blocks, lstm_size=8 * channels, predictor_hidden=8 * channels, **wide, **others)


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


def activation(config):
    return getattr(nn, config.activation)()


def average_pool():
    """Mean of 3x3 pixels at every second one, zeros around the edge. The zeros are a layer of their own: with
    `padding=1` in channels_last order the gradient of torch 2.11 is wrong on a GPU (pytorch/pytorch#188344)."""
    return nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(3, stride=2))


class StepNorm(nn.Module):
    """Batch norm of g and f: it learns as usual, but keeps running statistics per unroll step, for searches.

    Row k is step k; 0, the root, occurs in f only. Callers clamp deeper steps to the last row. `steps=0` is the
    released code's mixture: as g's latents drift it fits no step, and a search has another network than learning has
    (docs/learning.md). After Cooijmans et al. 2017, "Recurrent Batch Normalization".
    """

    def __init__(self, channels, steps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(steps + 1, channels))
        self.register_buffer("running_var", torch.ones(steps + 1, channels))

    def forward(self, x, step):
        """x [B, C, ...]; step int64: the row to use, [1] for all samples, or in eval mode [B], one for each."""
        if not self.training:
            return ScaleAndShift(self)(x, step)  # weight and bias get no gradient here
        mean = self.running_mean.index_select(0, step).view(-1)
        var = self.running_var.index_select(0, step).view(-1)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, training=True)  # moves mean and var too, momentum 0.1
        self.running_mean.index_copy_(0, step, mean[None])
        self.running_var.index_copy_(0, step, var[None])
        return x


class ScaleAndShift(nn.Module):
    """A `StepNorm` in eval mode: `scale[step] * x + shift[step]`, by the step of each sample. Not to be learned."""

    def __init__(self, norm, eps=1e-5):  # F.batch_norm's eps
        super().__init__()
        scale = norm.weight * (norm.running_var + eps).rsqrt()  # [steps + 1, C]
        shift = norm.bias - norm.running_mean * scale
        self.table = nn.Parameter(torch.cat([scale, shift], dim=1))  # [steps + 1, 2 * C]

    def forward(self, x, step):
        scale, shift = self.table.index_select(0, step).to(x.dtype).chunk(2, dim=1)  # [1 or B, C] each
        shape = *scale.shape, *[1] * (x.dim() - 2)
        return torch.addcmul(shift.view(shape), x, scale.view(shape))


class Layers(nn.Sequential):
    """A Sequential that passes `step` to the norms directly in it. For stacks without norms too: torch.compile does not
    look into those of torch.nn."""

    def forward(self, x, step=None):
        for layer in self:
            x = layer(x, step) if isinstance(layer, StepNorm | ScaleAndShift) else layer(x)
        return x


class ResidualBlock(nn.Module):
    """conv, BN, ReLU, conv, BN, + skip, ReLU: [B, inputs, H, W] -> [B, outputs, H / stride, W / stride].

    A strided block's skip is a strided 3x3 convolution without BN; others need inputs = outputs. step: for `StepNorm`.
    """

    def __init__(self, config, inputs, outputs, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = Layers(
            conv3x3(inputs, outputs, stride),
            norm(outputs),
            activation(config),
            conv3x3(outputs, outputs),
            norm(outputs),
        )
        self.skip = nn.Identity() if stride == 1 else conv3x3(inputs, outputs, stride)
        self.activation = activation(config)

    def forward(self, x, step=None):
        return self.activation(self.body(x, step) + self.skip(x))


class Float32Linear(nn.Linear):
    """A linear layer that stays in float32 under autocast. Near 20, where the top logit of a trained categorical head
    lies, bfloat16 has steps of 0.125: the two neighbouring atoms' probabilities would move by up to 6 %."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def conv1x1_flatten(config):
    """1x1 convolution: [B, C, 6, 6] -> [B, head_channels * 36]."""
    conv = nn.Conv2d(config.channels, config.head_channels, 1)
    return Layers(conv, StepNorm(config.head_channels, config.norm_steps), activation(config), nn.Flatten())


def mlp(config, inputs, outputs):
    """Two linear layers: [B, inputs] -> [B, outputs]. The last one starts at zero, so that the search starts from a
    uniform policy and a value of exactly 0 (EfficientZero's init_zero)."""
    last = Float32Linear(config.head_hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    first = nn.Linear(inputs, config.head_hidden)
    return Layers(first, StepNorm(config.head_hidden, config.norm_steps), activation(config), last)


class RepresentationNetwork(nn.Module):
    """h: a stack of frames to a latent (XTRA, Appendix H; no BN after the pools, as in the released code)."""

    def __init__(self, config):
        super().__init__()
        stem, c = config.channels // 2, config.channels
        self.layers = Layers(
            conv3x3(3 * config.frames, stem, stride=2),  # [B, 12, 96, 96] -> [B, C/2, 48, 48]
            nn.BatchNorm2d(stem),
            activation(config),
            *[ResidualBlock(config, stem, stem) for _ in range(config.blocks)],
            ResidualBlock(config, stem, c, stride=2),  # -> [B, C, 24, 24]
            *[ResidualBlock(config, c, c) for _ in range(config.blocks)],
            average_pool(),  # -> [B, C, 12, 12]
            *[ResidualBlock(config, c, c) for _ in range(config.blocks)],
            average_pool(),  # -> [B, C, 6, 6]
            *[ResidualBlock(config, c, c) for _ in range(config.blocks)],
        )

    def forward(self, obs):
        """obs [B, 3 * frames, 96, 96], uint8 or a float in [0, 1], oldest frame first -> latent [B, C, 6, 6]."""
        if obs.dtype == torch.uint8:
            obs = obs.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return self.layers(obs)


class DynamicsNetwork(nn.Module):
    """g: latent and action to the next latent and the value prefix, the sum of rewards since the LSTM's last reset."""

    def __init__(self, config):
        super().__init__()
        c, lstm_size = config.channels, config.lstm_size
        norm = functools.partial(StepNorm, steps=config.norm_steps)
        self.norm_steps = config.norm_steps
        ramp = torch.arange(config.actions)[:, None] / config.actions  # [A, 1]
        values = torch.eye(config.actions) if config.one_hot_actions else ramp  # [A, P] of an action's P planes
        self.register_buffer("plane_values", values, persistent=False)
        self.conv = Layers(conv3x3(c + values.shape[1], c), norm(c))
        # One plane of a / 18 beside C of the latent: with PyTorch's weights it makes 0.15 % of the output's variance
        # (C = 64). For hundreds of updates g would say the same of every action, and a search had nothing to compare.
        self.conv[0].weight.data[:, c:] *= config.action_gain
        self.activation = activation(config)
        self.block = ResidualBlock(config, c, c, norm=norm)
        self.reduce = conv1x1_flatten(config)
        self.lstm = nn.LSTMCell(config.head_channels * 36, lstm_size)
        self.prefix_head = Layers(norm(lstm_size), activation(config), *mlp(config, lstm_size, 2 * config.support + 1))

    def forward(self, latent, action, lstm_state, step):
        """latent [B, C, 6, 6], action [B] int64 ALE ids, lstm_state (h, c) each [B, L], step int64 [1] or [B], that of
        the next latent (1, 2, ...) -> next latent, lstm_state, value prefix logits [B, S].

        The caller zeroes lstm_state every VALUE_PREFIX_HORIZON steps.
        """
        prefix_step = ((step - 1) % VALUE_PREFIX_HORIZON + 1).clamp(max=self.norm_steps)  # its LSTM started again
        step = step.clamp(max=self.norm_steps)  # beyond what was learned: the last row
        planes = self.plane_values[action].to(latent.dtype)  # [B, P]
        planes = planes[:, :, None, None].expand(-1, -1, 6, 6)  # [B, P, 6, 6]
        planes = planes.contiguous(memory_format=torch.channels_last)  # so that `cat` keeps its order
        x = self.conv(torch.cat([latent, planes], dim=1), step)  # [B, C+P, 6, 6] -> [B, C, 6, 6]
        # The scaling sits before every use of the new latent, the value prefix included: the reference's hook halves
        # the whole gradient that arrives there, so the step-k losses reach the root latent with a factor 0.5^k.
        latent = scale_gradient(self.block(self.activation(x + latent), step), 0.5)
        lstm_state = self.lstm(self.reduce(latent, step), lstm_state)  # the carried state is the raw one, before BN
        return latent, lstm_state, self.prefix_head(lstm_state[0], prefix_step)


class PredictionNetwork(nn.Module):
    """f: latent [B, C, 6, 6], its step int64 [1] or [B] (0: the root) -> policy logits [B, A] over the ALE ids, value
    logits [B, S]."""

    def __init__(self, config):
        super().__init__()
        inputs = config.head_channels * 36
        norm = functools.partial(StepNorm, steps=config.norm_steps)
        self.norm_steps = config.norm_steps
        self.block = ResidualBlock(config, config.channels, config.channels, norm=norm)
        self.policy = Layers(*conv1x1_flatten(config), *mlp(config, inputs, config.actions))
        self.value = Layers(*conv1x1_flatten(config), *mlp(config, inputs, 2 * config.support + 1))

    def forward(self, latent, step):
        step = step.clamp(max=self.norm_steps)
        x = self.block(latent, step)
        return self.policy(x, step), self.value(x, step)


class EfficientZeroNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.representation = RepresentationNetwork(config)
        self.dynamics = DynamicsNetwork(config)
        self.prediction = PredictionNetwork(config)
        hidden, out = config.projector_hidden, config.projector_out
        self.projector = Layers(  # both branches of the consistency loss; ends in BN without ReLU
            nn.Flatten(),
            *[nn.Linear(config.channels * 36, hidden), nn.BatchNorm1d(hidden), activation(config)],
            *[nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), activation(config)],
            *[nn.Linear(hidden, out), nn.BatchNorm1d(out)],
        )
        self.predictor = Layers(  # the online branch only
            *[nn.Linear(out, config.predictor_hidden), nn.BatchNorm1d(config.predictor_hidden), activation(config)],
            nn.Linear(config.predictor_hidden, out),
        )

    def initial_inference(self, obs):
        """obs [B, 12, 96, 96] -> latent [B, C, 6, 6], policy logits [B, A], value logits [B, S]."""
        latent = self.representation(obs)
        step = torch.zeros(1, dtype=torch.int64, device=obs.device)
        return latent, *self.prediction(latent, step)

    def recurrent_inference(self, latent, action, lstm_state, step):
        """latent, action [B], (h, c), step of the next latent (as in `DynamicsNetwork`)
        -> latent, (h, c), prefix logits [B, S], policy logits [B, A], value logits [B, S]."""
        latent, lstm_state, prefix_logits = self.dynamics(latent, action, lstm_state, step)
        return latent, lstm_state, prefix_logits, *self.prediction(latent, step)

    def search_root(self, obs):
        """What a search asks about a root: obs -> latent, value [B] as a scalar, policy logits [B, A]."""
        latent, policy_logits, value_logits = self.initial_inference(obs)
        return latent, support_to_scalar(value_logits), policy_logits

    def search_leaf(self, latent, action, lstm_state, depth):
        """What a search asks about a leaf -> latent, (h, c), value prefix and value as scalars [B], policy logits."""
        latent, lstm_state, prefix_logits, policy_logits, value_logits = self.recurrent_inference(
            latent, action, lstm_state, depth
        )
        # One call for both: it is 19 small kernels, in each simulation.
        value_prefix, value = support_to_scalar(torch.stack([prefix_logits, value_logits]))
        return latent, lstm_state, value_prefix, value, policy_logits

    def initial_lstm_state(self, batch_size, like):
        """Zeros (h, c), each [B, L], on the device and of the type of the tensor `like`."""
        zeros = like.new_zeros(batch_size, self.config.lstm_size)
        return zeros, zeros


def scale_gradient(x, factor):
    """x itself, through which only `factor` of the gradient flows back."""
    return x.detach() + factor * (x - x.detach()) if x.requires_grad else x


def inference_copy(net):
    """A frozen copy in eval mode: h's batch norms are folded into the convolutions before them, those of g and f become
    one multiplication and addition.

    Same outputs up to rounding, fewer kernels; searches call this one. On a GPU its weights are cast to bf16 here,
    once, and not by autocast in each call. Later changes of `net` arrive by `refresh`. No projector and predictor.
    """
    net = copy.deepcopy(net).eval()
    net.projector = net.predictor = None
    for layers in [module for module in net.modules() if isinstance(module, Layers)]:
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[i - 1] = fuse_conv_bn_eval(layers[i - 1], layer)
                layers[i] = nn.Identity()
            if isinstance(layer, StepNorm):
                layers[i] = ScaleAndShift(layer)
    in_bfloat16 = (nn.Conv2d, nn.Linear, nn.LSTMCell, ScaleAndShift)  # these types exactly: not Float32Linear
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True  # its input is always a fresh tensor
        if type(layer) in in_bfloat16 and next(layer.parameters()).is_cuda:
            layer.to(torch.bfloat16)
    return net.requires_grad_(False)


def refresh(frozen, net):
    """Gives an `inference_copy` the weights of `net` or of another copy, in place: recorded kernels read them there."""
    copied = net if net.projector is None else inference_copy(net)
    frozen.load_state_dict(copied.state_dict())


# --- recording on a GPU ---
class Recorded:
    """`function(*inputs)` on a GPU; its kernels are recorded at the third call, then launched as one CUDA graph.

    inputs: tensors and dicts of tensors, which keep their shapes; what else the function reads keeps its place in
    memory. generator: the source of its random numbers, if it draws any; each call draws new ones. priority: of its
    kernels, -1 or 0; they keep it on whatever stream they are launched. The next call overwrites the results. The first
    two calls are ordinary ones, so that the function has allocated and compiled what it needs, the optimizer's momentum
    too.
    """

    def __init__(self, function, generator=None, priority=0):
        self.function = function
        self.generator = generator
        self.calls = 0
        self.graph = None
        # What autograd makes on the default stream cannot be recorded later. And no two recordings may share a stream:
        # they would share cuBLAS's workspace, and one may be replayed beside the other.
        self.stream = torch.cuda.Stream(priority=priority)

    def __call__(self, *inputs):
        if self.calls < 2:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            if self.generator:
                self.graph.register_generator_state(self.generator)
            self.inputs = [{n: t.clone() for n, t in x.items()} if isinstance(x, dict) else x.clone() for x in inputs]
            gc.collect()  # a graph that nobody uses any more must not be freed while another is recorded: that ends it
            gc.disable()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.results = self.function(*self.inputs)
            finally:
                gc.enable()
        for place, x in zip(tensors_in(self.inputs), tensors_in(inputs), strict=True):
            place.copy_(x)
        self.graph.replay()
        return self.results


def tensors_in(inputs):
    return [tensor for x in inputs for tensor in (x.values() if isinstance(x, dict) else (x,))]


# --- batches ---
def draw_different(rng, probability, size, num_batches):
    """`num_batches` times `size` different positions in `probability` [R] -> [num_batches, size].

    They are those of `rng.choice(R, size, replace=False, p=probability, shuffle=False)`, called so many times, which
    adds up all probabilities in each call: with 100,000 rows that was half of the time in which a GPU waits. Raises
    ValueError if fewer than `size` are above 0.
    """
    if np.count_nonzero(probability > 0) < size:
        raise ValueError(f"{size} different rows are to be drawn, and fewer have a probability above 0")
    drawn = np.empty((num_batches, size), np.int64)
    cumulative = np.cumsum(probability)
    cumulative /= cumulative[-1]
    for batch in drawn:
        shares, found = cumulative, 0
        while found < size:
            if found:  # what came twice is drawn again, from the others
                shares = probability.copy()
                shares[batch[:found]] = 0
                shares = np.cumsum(shares)
                shares /= shares[-1]
            new = shares.searchsorted(rng.random(size - found), side="right")
            new = new[np.sort(np.unique(new, return_index=True)[1])]
            batch[found : found + len(new)] = new
            found += len(new)
    return drawn


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


def augment(obs, generator, scale=0.05):
    """Shift, then intensity (algorithm of EfficientZero's released code): uint8 [B, C, H, W] -> float, about [0, 1].

    Each sample is multiplied by `1 + scale * clip(n, -2, 2)`, n ~ N(0, 1).
    """
    shifted = random_shift(obs, generator).float().div_(255)
    noise = torch.randn(obs.shape[0], 1, 1, 1, generator=generator, device=obs.device).clamp(-2, 2)
    return shifted.mul_(1 + scale * noise)


# --- environments ---
class AtariGames(AtariVectorEnv):
    """ale-py's vector environment for actions that are ALE ids. It takes positions in the game's list of actions, which
    in Skiing and LostLuggage lacks those with FIRE; there an id is not its position. Ids a game lacks are no-ops."""

    def __init__(self, rom, num_envs, **options):
        super().__init__(rom, num_envs, full_action_space=True, **options)
        ids = [action.value for action in self.ale.get_action_set()]
        self.position = np.zeros(18, np.int64)  # of each ALE id
        self.position[ids] = np.arange(len(ids))

    def send(self, actions):
        super().send(self.position[actions])


print_once = functools.cache(print)  # every evaluation makes its games anew


class Checked(gym.Wrapper):
    """An environment whose images, gray or of another size or channel first, become uint8 [96, 96, 3].

    Ends the run with one line at a frame that its space does not have, and at a reward that is not a finite number.
    """

    def __init__(self, env):
        super().__init__(env)
        self.steps = 0  # of the game so far
        shape = env.observation_space.shape or ()
        self.channels_first = len(shape) == 3 and shape[0] in (1, 3)
        is_image = len(shape) == 2 or self.channels_first or len(shape) == 3 and shape[2] in (1, 3)
        self.is_converted = env.observation_space.dtype == np.uint8 and is_image and shape != (96, 96, 3)
        if self.is_converted:
            print_once(f"{env.spec.id}: images {shape} are made (96, 96, 3); the last four are stacked, as for Atari")
            self.observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)

    def fit(self, obs):
        space = self.env.observation_space
        pixels = np.asarray(obs)
        if pixels.shape != space.shape or pixels.dtype != space.dtype:
            found = f"shows {pixels.dtype} {pixels.shape} at step {self.steps} of a game, but its space is"
            raise SystemExit(f"error: {self.spec.id} {found} {space.dtype} {space.shape}; mend one of the two")
        if not self.is_converted:
            return pixels
        pixels = np.moveaxis(pixels, 0, -1) if self.channels_first else pixels
        pixels = pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels  # Pillow's gray images have no channels
        return np.asarray(Image.fromarray(pixels).convert("RGB").resize((96, 96), Image.BILINEAR))

    def reset(self, **options):
        self.steps = 0
        return self.fit(self.env.reset(**options)[0]), {}

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, _ = self.env.step(action)
        paid = np.asarray(reward)
        is_number = not paid.shape and paid.dtype.kind in "biuf" and abs(paid) < 3e38  # as float32 holds it
        if not is_number or terminated is None or truncated is None:
            found = f"pays {reward} at step {self.steps} of a game, which is over: {terminated}, {truncated}"
            raise SystemExit(f"error: {self.spec.id} {found}; expected a finite number and True or False")
        return self.fit(obs), reward, terminated, truncated, {}


def make_own_envs(env_id, num_envs):
    """`num_envs` copies of an environment that is registered with Gymnasium, `Checked`, as one vector environment.

    Exits with one line if they cannot be made, reset and stepped, or have other spaces than the networks need.
    """
    try:
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="sync", wrappers=[Checked])
        obs = envs.single_observation_space
        actions = envs.single_action_space
        fits = obs.shape == (96, 96, 3) and obs.dtype == np.uint8 and isinstance(actions, gym.spaces.Discrete)
        fits = fits and actions.start == 0 and actions.n <= 18
        if fits:
            envs.reset(seed=0)
            envs.step(np.zeros(num_envs, np.int64))
    except Exception as error:  # whatever the code of others raises
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        expected = "expected <Game>NoFrameskip-v4, or a module:Env-v0 that gymnasium.make can make, reset and step"
        raise SystemExit(f"error: --env-id {env_id}: {found}; {expected}; is its folder on PYTHONPATH?") from None
    if not fits:
        found = " ".join(f"{obs} and {actions}".split())
        expected = "expected uint8 images of 1 or 3 channels and Discrete(n) from 0 with n <= 18; wrap the environment"
        raise SystemExit(f"error: --env-id {env_id} has {found}; {expected}")
    return envs


# --- command line and terminal ---
class Output:
    """A stream of text that drops what it cannot write, at a closed terminal or a broken pipe, instead of raising."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(line_buffering=True, errors="replace")  # a log file or a pipe gets each line at once

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def read_flags(cls, description, words=None):
    """The command line as the flags of the dataclass `cls`, in one namespace: --gamma is args.gamma, in whatever group
    of --help it stands. `~` is expanded. words: instead of those of the command line. From here on what is printed ends
    no run (`Output`).

    Exits with one line if a value is of the wrong type or empty, a flag given twice or unknown; that one names the
    closest flags.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # a daemon may have none
        if type(stream) is io.TextIOWrapper:
            setattr(sys, name, Output(stream))
    words = sys.argv[1:] if words is None else words
    width = max(40, shutil.get_terminal_size().columns - 1)
    paragraphs = description.strip().split("\n\n")
    indent = {"initial_indent": " ", "subsequent_indent": " "}  # without it tyro makes one line of a paragraph
    wrapped = [x if x.startswith("  ") else textwrap.fill(" ".join(x.split()), width, **indent) for x in paragraphs]
    options = {"description": "\n\n".join(wrapped), "config": (tyro.conf.OmitArgPrefixes,)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(cls, args=words, return_unknown_args=True, **options)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        lines = re.sub(r"^[│|╭╰+]|[│|╮╯+]$", " ", said.getvalue(), flags=re.M)  # tyro draws a box
        parts = re.split("[─-]{9,}", lines)  # title, reason, ...
        reason = parts[1] if len(parts) > 1 else parts[0]
        raise SystemExit(f"error: {' '.join(reason.split())}; see --help") from None
    flags = {}
    for name, value in vars(parsed).items():
        flags |= vars(value) if is_dataclass(value) else {name: value}
    if unknown:
        refuse_flag(unknown[0], flags, words)
    given = [x.split("=")[0][2:].replace("-", "_").removeprefix("no_") for x in words if x.startswith("--")]
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if given.count(name) > 1:
            raise SystemExit(f"error: {flag} is given twice; give it once, all values of a list after it")
        value = flags.get(name, 0)
        if value in (None, "", ()) or isinstance(value, tuple) and "" in value:
            raise SystemExit(f"error: {flag} is given without a value; give one, or drop the flag")
    for name, value in flags.items():
        if isinstance(value, str):
            flags[name] = os.path.expanduser(value)
        if isinstance(value, tuple):
            flags[name] = tuple(os.path.expanduser(x) if isinstance(x, str) else x for x in value)
    return SimpleNamespace(**flags)


def check_numbers(args, may_be_zero):
    """Exits with one line if a number is out of its range, or if --resume or --track lack what they need."""
    smallest = {"similarity_threshold": -1, "batch_size": 2, "channels": 2, "eval_max_frames": 4}
    smallest |= {"dirichlet_alpha": 1e-3, "max_grad_norm": 1e-3}
    largest = dict.fromkeys(("gamma", "momentum", "priority_beta", "dirichlet_fraction", "similarity_threshold"), 1)
    largest |= {"seed": 2**64 - 1, "priority_exponent": 10}
    largest["eval_episodes"] = 1000  # the seeds of games from 1000 on are those of self-play
    for name, value in vars(args).items():
        lowest = smallest.get(name, 0 if name in may_be_zero or isinstance(value, float) else 1)
        highest = largest.get(name, sys.float_info.max)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not lowest <= value <= highest:
            expected = f"{lowest} to {highest}" if name in largest else f"{lowest} or more, and finite"
            raise SystemExit(f"error: --{name.replace('_', '-')} is {value}, expected {expected}")
    if args.resume and not args.run_dir:
        runs = glob.glob(f"runs/*__{file_name(args.exp_name)}__*")
        newest = max(runs, key=os.path.getmtime, default="one that is not in runs/")
        raise SystemExit(f"error: --resume needs the --run-dir that it is to continue; perhaps {newest}")
    spec = importlib.util.find_spec("wandb")
    if args.track and (spec is None or spec.origin is None):  # a folder named wandb has a spec too, of no origin
        raise SystemExit("error: --track needs the package wandb, which is not installed; pip install wandb")


def refuse_flag(word, flags, words):
    """Exits with one line on a word of the command line that is no flag of `flags`, a dict of names and values."""
    booleans = [name for name, value in flags.items() if isinstance(value, bool)]
    on_or_off = {f"--{no}{name}": name for name in booleans for no in ("", "no_")}
    words = [part for x in words for part in (x.split("=", 1) if x.startswith("--") else [x])]  # --flag=value
    words = [x.replace("-", "_").replace("__", "--", 1) if x.startswith("--") else x for x in words]
    for flag, value in zip(words, words[1:], strict=False):
        if flag in on_or_off and value == word:
            name = on_or_off[flag].replace("_", "-")
            raise SystemExit(f"error: --{name} is on or off and takes no value: write --{name} or --no-{name}")
    if not word.startswith("--"):
        raise SystemExit(f"error: {word} belongs to no flag; see --help")
    name = word.split("=")[0][2:].replace("-", "_")
    initials = [known for known in flags if "".join(part[0] for part in known.split("_")) == name]
    close = initials or difflib.get_close_matches(name.removeprefix("no_"), flags, 3)
    meant = " or ".join(f"--{known.replace('_', '-')}" for known in close)
    hint = f"did you mean {meant}?" if close else "see --help"
    raise SystemExit(f"error: there is no flag --{name.replace('_', '-')}; {hint}")


class Progress(tqdm):
    """A bar in a terminal. In a log file, a line of it every 30 s."""

    def __init__(self, *args, **options):
        self.shown_at = time.monotonic()
        super().__init__(*args, **options)

    def display(self, msg=None, pos=None):
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if time.monotonic() >= self.shown_at + 30:
            print(self, file=sys.stderr, flush=True)
            self.shown_at = time.monotonic()

    def clear(self, nolock=False):
        if sys.stderr.isatty():
            super().clear(nolock)


# --- files and run folders ---
DAMAGE = zipfile.BadZipFile, zlib.error, pickle.UnpicklingError  # what a damaged file raises besides the usual


@contextlib.contextmanager
def whole_file(path):
    """An open binary file beside `path`, which takes its place at the end: `path` is whole, or as it was before."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        error.add_note(f"{path} could not be written; it is as it was before")
        raise
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def load_file(path):
    """Reads a .npz or .pt file of this project -> dict of arrays, or of tensors on the CPU and plain values.

    Every byte is compared with its checksum first: of 1,000 flipped bits torch alone reads 900 as other numbers.
    Nothing is unpickled but tensors and plain values. Exits with one line if the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # One flipped bit makes a member a folder, which has no checksum: torch leaves its tensor uninitialised.
            folders = [member.filename for member in archive.infolist() if member.external_attr & 0x10]
            damaged = archive.testzip() or ", ".join(folders)
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"error: {path} not found; check its name") from None
    except NotADirectoryError:
        file = os.path.dirname(path)
        folder = os.path.dirname(file) or "."
        raise SystemExit(f"error: {file} is a file, expected a run folder; give {folder}") from None
    except IsADirectoryError:
        raise SystemExit(f"error: {path} is a folder, expected a file; give one in it, or another") from None
    except PermissionError:
        raise SystemExit(f"error: {path} may not be read; ask its owner for the permission") from None
    except (OSError, EOFError, ValueError, RuntimeError, *DAMAGE) as error:
        reason = " ".join(str(error).split())[:120]
        raise SystemExit(f"error: {path} is damaged, or no file of this project ({reason}); make it again") from None


def read_dataset(path, is_answered=False):
    """Reads what `save_dataset` wrote -> dict of its arrays, frames still compressed, and `checksum` of them.

    is_answered: whether it is a targets.npz, which has a teacher's `policy`, `value` and `score` too. Exits with one
    line if the file is missing, damaged or something else (docs/finetune.md, "Datasets").
    """
    data = load_file(path)
    R = np.size(data.get("action", []))  # rows
    kinds = {"action": "iu", "reward": "iuf", "acted": "b", "end": "iu"}  # NumPy's letters
    kinds |= {"policy": "f", "value": "f"} if is_answered else {}
    shapes = dict.fromkeys(kinds, (R,)) | {"policy": (R, 18), "chunk_ends": (-(-R // 8),), "env_id": ()}
    names = {"env_id", "frames", "chunk_ends", *kinds} | ({"score"} if is_answered else set())
    if not names <= data.keys():
        hint = "run pretrain_teacher.py again" if is_answered else "give a dataset"
        raise SystemExit(f"error: {path} has no {', '.join(sorted(names - data.keys()))}; {hint}")
    data = {name: data[name] for name in names}
    for name, kind in (kinds | {"chunk_ends": "iu", "env_id": "U"}).items():
        if data[name].dtype.kind not in kind or data[name].shape != shapes[name] or R == 0:
            found = f"{name} is {data[name].dtype} {data[name].shape}, expected one of {kind} {shapes[name]}"
            raise SystemExit(f"error: dataset {path}: {found}, NumPy's kinds; use save_dataset of finetune.py")
    data["env_id"] = str(data["env_id"])
    acted, end = data["acted"], data["end"]
    is_last = np.append(False, end[:-1] >= 2)  # [R] the last frame of a game, or of the data
    is_last[-1] = True
    problems = {
        "no step in it was acted on": not acted.any(),
        "actions are not ALE ids, 0 to 17": not np.isin(data["action"], range(18)).all(),
        "rewards are not finite": not (np.abs(data["reward"]) < 3e38).all(),
        "an end is not 0 to 3, or not at the action that ended it": ((end < 0) | (end > 3 * acted)).any(),
        "a last frame is missing (a row with acted = False after a game and at the end)": acted[is_last].any(),
    }
    for problem, found in problems.items():
        if found:
            raise SystemExit(f"error: dataset {path}: {problem}; write it with save_dataset of finetune.py")
    data["checksum"] = hashlib.sha256(b"".join(data[name].tobytes() for name in ("frames", *kinds))).hexdigest()
    return data


def unpack_frames(data):
    """The frames of a dataset of `read_dataset`, 8 at a time -> their first row, uint8 [8, 96, 96, 3]. The last may be
    fewer. Exits with one line if they were packed otherwise."""
    decompressor = zstandard.ZstdDecompressor()
    packed = data["frames"].tobytes()
    R = len(data["action"])
    start = 0
    for first, stop in zip(range(0, R, 8), data["chunk_ends"].tolist(), strict=True):
        try:
            chunk = np.frombuffer(decompressor.decompress(packed[start:stop]), np.uint8)
            yield first, chunk.reshape(min(8, R - first), 96, 96, 3)
        except (zstandard.ZstdError, ValueError) as error:
            found = f"error: the frames of the dataset of {data['env_id']} are not zstd chunks of 8 ({error})"
            raise SystemExit(f"{found}; write it with save_dataset of finetune.py") from None
        start = stop


def save_model(path, net, **info):
    """Writes the weights, the config and what else is worth knowing (plain values). Beside it, for people: model.md."""
    info["origin"] = code_origin() | {"card": device_name(next(net.parameters()).device)}
    with whole_file(path) as file:
        torch.save({"model": net.state_dict(), "config": asdict(net.config)} | info, file)
    with whole_file(f"{os.path.splitext(path)[0]}.md") as file:
        file.write(model_card(info).encode())


@functools.cache
def code_origin():
    """The commit of the code when it was first asked ("+": Python files were changed or added; "unknown" without git),
    the versions, and the command: plain values."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a git hook
    silent = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 20}  # seconds
    ask = functools.partial(subprocess.check_output, env=environment, text=True, **silent)
    try:
        commit = ask([*git, "rev-parse", "HEAD"])[:7]
        commit += "+" * bool(ask([*git, "status", "--porcelain", "--", ":/*.py"]))
    except (OSError, subprocess.SubprocessError):  # no git, or files that were copied out of a checkout
        commit = "unknown"
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"numpy": np.__version__, "ale-py": ale_py.__version__}
    words = [os.path.basename(sys.argv[0]), *(word for word in sys.argv[1:] if word != "--resume")]
    return {"commit": commit, "versions": versions, "command": shlex.join(["python", *words])}


def device_name(device):
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):  # Linux, where `platform` does not know
        with open("/proc/cpuinfo") as file:
            found = re.search(r"model name\s*: (.*)", file.read())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def model_card(info):
    """What a model.pt is, for those who are given it: Markdown with the header of a model card of Hugging Face.

    info: what `load_model` returns beside the network; what it lacks is left out.
    """
    origin, args, scores = info["origin"], info.get("args", {}), info.get("scores", {})
    data = ", ".join(f"{game} {checksum[:12]}" for game, checksum in info.get("data", {}).items())
    pretrained = ", ".join(f"{game} {checksum[:12]}" for game, checksum in info.get("pretrained_on", {}).items())
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    rows = {"command": f"`{origin['command']}`", "commit": origin["commit"], "versions": versions}
    rows |= {"hardware": origin["card"], "seed": args.get("seed"), "updates": info.get("updates")}
    rows |= {"environment steps of its own": info.get("env_steps"), "offline data, sha256": data}
    rows |= {"pretrained on data, sha256": pretrained}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value not in (None, ""))
    returns = "".join(f"| {game} | {score:.1f} |\n" for game, score in scores.items())
    episodes, simulations = args.get("eval_episodes", 0), args.get("num_simulations", 0)
    by_policy = simulations == 0 or args.get("policy_target") == "actions"
    action = "most probable action" if by_policy else f"most visited action of {simulations} simulations"
    return f"""---
license: mit
library_name: pytorch
tags: [reinforcement-learning, world-model, efficientzero, xtra]
---
# {args.get("exp_name", "model")}: {", ".join(scores)}

| | |
|---|---|
{table}
## Scores

| game | mean return |
|---|---|
{returns}
Raw returns of {episodes} games, seeds 0 to {max(0, episodes - 1)}, all lives, no exploration, the {action}, cut at
{args.get("eval_max_frames", 0):,} frames (of Atari: 4 a step).

## Use

With `model.py` of the commit above; frames are four RGB images, oldest first, `[B, 12, 96, 96]` uint8:

```python
import torch
from model import load_model, support_to_scalar
net, info = load_model("model.pt")
latent, policy_logits, value_logits = net.initial_inference(torch.zeros(1, 12, 96, 96, dtype=torch.uint8))
print(info["scores"], policy_logits.softmax(1), support_to_scalar(value_logits))
```

## Licence

MIT, as the code. The games belong to their owners and are not part of this.
"""


def load_model(path, device="cpu"):
    """Reads what `save_model` wrote -> (net in eval mode on `device`, the rest of the dict).

    Exits with one line if model.py's networks are not those of the weights. What the config lacks had its default.
    """
    content = load_file(path)
    weights, config = content.pop("model", {}), content.pop("config", {})
    known = {name: value for name, value in config.items() if name in asdict(ModelConfig())}
    net = EfficientZeroNet(ModelConfig(**known)).to(device)
    expected = asdict(net.config) | {name: tensor.shape for name, tensor in net.state_dict().items()}
    found = asdict(ModelConfig()) | config | {name: tensor.shape for name, tensor in weights.items()}
    differ = [name for name in expected | found if expected.get(name) != found.get(name)]
    if differ:
        names = ", ".join(differ[:3]) + ", ..." * (len(differ) > 3)
        raise SystemExit(f"error: {path} does not fit model.py: {names} differ; use the model.py that wrote it")
    net.load_state_dict(weights)
    return net.eval(), content


def file_name(text):
    """`text` as a name that every file system takes and no shell reads otherwise."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)[-200:]


def command(script, *words):
    """The command line of a script that lies beside the one that runs, to be pasted into a shell."""
    return shlex.join([sys.orig_argv[0], os.path.join(os.path.dirname(sys.argv[0]), script), *words])


def check_writable(flag, path):
    """Exits with one line if no file of the name `path` can be written. Leaves nothing behind."""
    folder, name = os.path.split(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=name).close()
    except OSError as error:
        raise SystemExit(f"error: {flag} {path}: {error.strerror}; choose another one") from None


def open_run(args, cls, config, run_dir, may_change):
    """Makes a run folder and locks it until this process ends -> (the lock, the checkpoint in it or None).

    cls: the dataclass of the flags, for the defaults of those that the run started without. config: of the network.
    may_change: the flags that --resume may be given with other values. From here on Ctrl-C ends the process at once, as
    any kill does, and says how to go on. Exits with one line if the folder is not fit for this run.
    """
    try:
        os.makedirs(run_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        raise SystemExit(f"error: --run-dir {run_dir}: {error.strerror}; choose another folder") from None
    if os.listdir(run_dir) and not args.resume:
        hint = "continue the run in it with --resume, or choose another folder"
        raise SystemExit(f"error: --run-dir {run_dir} is not empty; {hint}")
    lock = filelock.FileLock(f"{run_dir}/lock", fallback_to_soft=False)  # a soft lock would outlive a kill
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SystemExit(f"error: --run-dir {run_dir} is in use by another process; choose another folder") from None
    except (OSError, NotImplementedError) as error:
        print(f"warning: {run_dir} cannot be locked ({error}); see to it that no other process uses it")
    print(f"run folder: {run_dir} (Ctrl-C stops; {shlex.join(['--resume', '--run-dir', run_dir])} goes on)")
    path = f"{run_dir}/checkpoint.pt"
    checkpoint = load_file(path) if os.path.exists(path) else None
    if checkpoint:
        compare_runs(path, checkpoint, args, cls, config, may_change)

    words = [word for word in sys.orig_argv if word not in ("--resume", "--no-resume", "--no_resume")] + ["--resume"]
    words += [] if args.run_dir else ["--run-dir", run_dir]

    def stop(*_):
        print(f"\nstopped. Go on with: {shlex.join(words)}", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    code_origin()  # the code as it is now, whatever is edited until the first save
    return lock, checkpoint


def compare_runs(path, checkpoint, args, cls, config, may_change):
    """Exits with one line if a checkpoint is of a run with other flags or another network. A flag that it lacks counts
    as having had its default."""
    now = vars(args) | asdict(config)
    defaults = asdict(ModelConfig())
    for x in fields(cls):
        default = x.default if x.default_factory is MISSING else x.default_factory()
        defaults |= vars(default) if is_dataclass(default) else {x.name: default}
    before = defaults | checkpoint["args"] | checkpoint.get("config", asdict(config))
    for name in [name for name in before if name not in may_change]:
        flag = f"--{name.replace('_', '-')}" if name in checkpoint["args"] | vars(args) else f"{name} of the network"
        if name not in now:
            raise SystemExit(f"error: {path} has {flag}, which this script does not know; use the one that wrote it")
        if before[name] != now[name]:
            found = f"{flag} is {now[name]}, but {path} has {before[name]}"
            raise SystemExit(f"error: {found}; give the flags that it was started with, or another --run-dir")
