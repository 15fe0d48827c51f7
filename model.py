"""The EfficientZero networks, the value transform, the augmentation and the checkpoint. Everything here is tensors in,
tensors out, alike in train and eval mode and on any device.

    o_t-3..o_t --h--> s_0 --g(a_t)--> s_1 --g(a_t+1)--> s_2 ...    h  RepresentationNetwork    B  batch
                       |               |                           g  DynamicsNetwork          C  channels of the latent
                       f               f, value prefix (LSTM)      f  PredictionNetwork        A  actions, 18 ALE ids
                       |               |                           SimSiam: projector and      S  support atoms, 601
                  policy, value   policy, value                    predictor                   L  LSTM size

"EfficientZero" is Ye et al. 2021, "XTRA" is Xu et al. 2023; the architecture is XTRA's Appendix H where the released
code agrees with it, and the released code where not (docs/finetune.md lists each place).
"""

import copy
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

CHECKPOINT_FORMAT = "xtra-checkpoint-1"


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


def inference_copy(net):
    """A frozen copy in eval mode with each batch norm folded into the convolution or linear layer before it.

    Same outputs to float rounding, half the kernels; the search calls this one. The copy does not follow `net`.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for layers in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(layers) - 1):
            if isinstance(layers[i], nn.Conv2d) and isinstance(layers[i + 1], nn.BatchNorm2d):
                layers[i], layers[i + 1] = fuse_conv_bn_eval(layers[i], layers[i + 1]), nn.Identity()
            elif isinstance(layers[i], nn.Linear) and isinstance(layers[i + 1], nn.BatchNorm1d):
                layers[i], layers[i + 1] = fuse_linear_bn_eval(layers[i], layers[i + 1]), nn.Identity()
    return net.requires_grad_(False)


# --- augmentation ---
def random_shift(obs, generator, pad=4):
    """Replicate-pads by `pad` pixels and crops back at a random place, one offset per sample: [B, C, H, W] -> same."""
    B, C, H, W = obs.shape
    offset = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator, device=obs.device) - pad  # [2, B, 1]
    # Reading a clamped index is the same as padding by replication, without the padded copy.
    rows = (torch.arange(H, device=obs.device) + offset[0]).clamp(0, H - 1)  # [B, H]
    columns = (torch.arange(W, device=obs.device) + offset[1]).clamp(0, W - 1)  # [B, W]
    pixels = (rows[:, :, None] * W + columns[:, None, :]).view(B, 1, H * W)
    return obs.reshape(B, C, H * W).gather(2, pixels.expand(B, C, H * W)).view(B, C, H, W)


def random_intensity(obs, generator, scale=0.05):
    """Multiplies each sample by `1 + scale * clip(n, -2, 2)`, n ~ N(0, 1): [B, C, H, W] float -> same, not clamped."""
    noise = torch.randn(obs.shape[0], 1, 1, 1, generator=generator, device=obs.device).clamp(-2, 2)
    return obs * (1 + scale * noise)


def augment(obs, generator):
    """Shift, then intensity (algorithm of EfficientZero's released code): uint8 [B, C, H, W] -> float, about [0, 1]."""
    return random_intensity(random_shift(obs, generator).float() / 255, generator)


# --- files ---
def write_file(path, write):
    """Calls `write(file)` on a temporary file beside `path`, then renames it: `path` is whole, or as it was before.

    Exits with one line when the disk is full or the folder cannot be written, and leaves nothing behind.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise SystemExit(f"error: {path} could not be written ({error}); free space or choose another folder") from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path, format, fields, files):
    """Writes a json file of `fields` and the sha256 of `files` (paths relative to its folder), and of itself."""
    digests = {name: sha256(os.path.join(os.path.dirname(path), name)) for name in files}
    manifest = {"format": format, **fields, "sha256": digests}
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    write_file(path, lambda file: file.write(json.dumps(manifest, indent=1).encode()))


def load_manifest(path, format):
    """Reads what `write_manifest` wrote and checks every file that it names -> dict.

    Exits with one line if a file is missing, damaged, of another format version or not the one that was named.
    """
    try:
        with open(path) as file:
            manifest = json.load(file)
        checksum, found, digests = manifest.pop("checksum"), manifest["format"], manifest["sha256"]
        intact = checksum == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    except OSError as error:
        reason = f"{error.strerror}: expected a folder of format {format}"
        raise SystemExit(f"error: {path} not found or not readable ({reason}); check its name") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise SystemExit(f"error: {path} is damaged (its checksum differs); copy or make its folder again")
    if found != format:
        raise SystemExit(f"error: {path} has format {found!r}, expected {format!r}; make its folder again")
    for name, digest in digests.items():
        file = os.path.join(os.path.dirname(path), name)
        if not os.path.isfile(file):
            raise SystemExit(f"error: {file} not found, but {path} names it; put it back or make the folder again")
        if sha256(file) != digest:
            raise SystemExit(f"error: {file} is damaged, or does not belong to {path} (its sha256 differs)")
    return manifest


def save_checkpoint(path, net, args, task_ids, counters):
    """Writes the weights and all that is needed to use them without the script.

    args: the script's flags as a dict of plain values; task_ids: the games, in order; counters: a dict of numbers
    (updates, env_steps, score, ...).
    """
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model": net.state_dict(),
        "config": dataclasses.asdict(net.config),
        "args": args,
        "task_ids": list(task_ids),
        "counters": counters,
    }
    write_file(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path, device="cpu"):
    """Reads what `save_checkpoint` wrote -> (net in eval mode on `device`, the dict without the weights).

    Nothing is unpickled (weights_only) and the weights must match the stored config exactly. Exits with one line if the
    file is missing, is no checkpoint of this project, is damaged or is of another format version.
    """
    if not os.path.isfile(path):
        raise SystemExit(f"error: {path} not found: expected the model.pt of a run folder; check the folder's name")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load answers a damaged file with any of a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemExit(f"error: {path} is damaged or is no checkpoint ({reason[:120]}); write it again") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != CHECKPOINT_FORMAT:
        raise SystemExit(f"error: {path} has format {found!r}, expected {CHECKPOINT_FORMAT!r}; write it anew")
    try:
        net = EfficientZeroNet(ModelConfig(**checkpoint["config"])).to(device)
        net.load_state_dict(checkpoint.pop("model"), strict=True)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"error: {path} does not fit its own config ({reason}); write it again") from None
    return net.eval(), checkpoint
