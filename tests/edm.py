"""Pickled checkpoints in the layout of EDM's, and a second implementation of their networks.

A checkpoint is a dictionary whose key "ema" is a module. Each of its modules was stored by torch_utils.persistence, as
a call of _reconstruct_persistent_obj with the source code of the class, its name and the state of the object.
"""

import math
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT_HALF = math.sqrt(0.5)


def forbidden(*arguments):
    raise AssertionError("the function of the pickle was called")


class Persistent(nn.Module):
    """A module that is pickled as EDM's are. mark: a file that its source code would create."""

    def __init__(self, name, mark, arguments=None):
        super().__init__()
        self._class, self._source = name, f"open({str(mark)!r}, 'w').close()"
        self._init_args, self._init_kwargs = (), arguments or {}
        self.skip_scale = np.sqrt(0.5)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key not in ("_class", "_source")}
        meta = {"type": "class", "version": 6, "module_src": self._source, "class_name": self._class, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def module(tree, mark, name="UNetBlock"):
    """Modules of a nested dictionary of tensors."""
    found = nn.ModuleDict() if name in ("enc", "dec") else Persistent(name, mark)
    for key, value in tree.items():
        if isinstance(value, dict):
            found.add_module(key, module(value, mark, key))
        elif key in ("resample_filter", "freqs"):
            found.register_buffer(key, value)
        else:
            found.register_parameter(key, nn.Parameter(value))
    return found


def write(path: Path, tree, options, mark, *, model="SongUNet", wrapper="EDMPrecond", protocol=4) -> Path:
    """A checkpoint of a network with these weights and options."""
    package, persistence = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = forbidden
    names = forbidden.__module__, forbidden.__qualname__
    forbidden.__module__, forbidden.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    inside = module(tree, mark, model)
    inside._init_kwargs = options
    outside = Persistent(wrapper, mark, {"model_type": model, "sigma_data": 0.5})
    outside.model, outside.sigma_data, outside.sigma_min, outside.sigma_max = inside, 0.5, 0, float("inf")
    augment = Persistent("AugmentPipe", mark)
    augment.register_buffer("Hz_geom", torch.ones(3))
    content = {
        "ema": outside,
        "loss_fn": Persistent("EDMLoss", mark),
        "augment_pipe": augment,
        "dataset_kwargs": {"a": 1},
    }
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": persistence}
    try:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
        forbidden.__module__, forbidden.__qualname__ = names
    return path


class Weights:
    """Draws the weights of EDM's layers, by their names and shapes."""

    def __init__(self, song, embedding, taps, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.song, self.embedding = song, embedding
        row = torch.tensor(taps, dtype=torch.float32)
        self.filter = (torch.outer(row, row) / row.sum() ** 2)[None, None]

    def normal(self, *shape, scale=1.0):
        return scale * torch.randn(*shape, generator=self.generator)

    def linear(self, inside, out, *, bias=True):
        found = {"weight": self.normal(out, inside, scale=inside**-0.5)}
        return found | ({"bias": self.normal(out, scale=0.1)} if bias else {})

    def conv(self, inside, out, width, *, resampled=False):
        found = {}
        if width:
            found["weight"] = self.normal(out, inside, width, width, scale=(inside * width**2) ** -0.5)
            found["bias"] = self.normal(out, scale=0.1)
        return found | ({"resample_filter": self.filter} if resampled else {})

    def norm(self, channels):
        return {"weight": 1 + self.normal(channels, scale=0.1), "bias": self.normal(channels, scale=0.1)}

    def block(self, inside, out, *, resampled=False, attention=False):
        found = {
            "norm0": self.norm(inside),
            "conv0": self.conv(inside, out, 3, resampled=resampled),
            "affine": self.linear(self.embedding, out if self.song else 2 * out),
            "norm1": self.norm(out),
            "conv1": self.conv(out, out, 3),
        }
        if inside != out or resampled:
            found["skip"] = self.conv(inside, out, 1 if self.song or inside != out else 0, resampled=resampled)
        if attention:
            found |= {"norm2": self.norm(out), "qkv": self.conv(out, 3 * out, 1), "proj": self.conv(out, out, 1)}
        return found


def tree(options, *, song):
    """The weights of a network, as a nested dictionary by EDM's names."""
    side, channels, width = options["img_resolution"], options["in_channels"], options["model_channels"]
    multipliers, blocks, attended = options["channel_mult"], options["num_blocks"], options["attn_resolutions"]
    classes, augmented = options.get("label_dim", 0), options.get("augment_dim", 0)
    times, embedding = width * options.get("channel_mult_noise", 1), 4 * width
    draw = Weights(song, embedding, options.get("resample_filter", [1, 1]))
    found = {"map_layer0": draw.linear(times, embedding), "map_layer1": draw.linear(embedding, embedding)}
    found["map_noise"] = {"freqs": draw.normal(times // 2)} if options.get("embedding_type") == "fourier" else {}
    if classes:
        found["map_label"] = draw.linear(classes, times if song else embedding, bias=song)
    if augmented:
        found["map_augment"] = draw.linear(augmented, times, bias=False)
    enc, kept, now, image = {}, [], channels, channels
    for level, multiplier in enumerate(multipliers):
        res = side >> level
        if level == 0:
            now = width if song else width * multiplier
            enc[f"{res}x{res}_conv"] = draw.conv(channels, now, 3)
        else:
            enc[f"{res}x{res}_down"] = draw.block(now, now, resampled=True)
            if options.get("encoder_type") == "residual":
                enc[f"{res}x{res}_aux_residual"] = draw.conv(image, now, 3, resampled=True)
                image = now
        kept.append(now)
        for i in range(blocks):
            enc[f"{res}x{res}_block{i}"] = draw.block(now, width * multiplier, attention=res in attended)
            now = width * multiplier
            kept.append(now)
    dec = {}
    for level in reversed(range(len(multipliers))):
        res = side >> level
        if level == len(multipliers) - 1:
            dec[f"{res}x{res}_in0"] = draw.block(now, now, attention=True)
            dec[f"{res}x{res}_in1"] = draw.block(now, now)
        else:
            dec[f"{res}x{res}_up"] = draw.block(now, now, resampled=True)
        for i in range(blocks + 1):
            attends = res in attended and (i == blocks or not song)
            out = width * multipliers[level]
            dec[f"{res}x{res}_block{i}"] = draw.block(now + kept.pop(), out, attention=attends)
            now = out
    if song:
        dec |= {f"{side}x{side}_aux_norm": draw.norm(now), f"{side}x{side}_aux_conv": draw.conv(now, channels, 3)}
    else:
        found |= {"out_norm": draw.norm(now), "out_conv": draw.conv(now, channels, 3)}
    return found | {"enc": enc, "dec": dec}


def convolved(layer, x, *, change="", fused=False):
    """A layer of EDM: a convolution before or after which a filter changes the size."""
    weight, bias, taps = (layer.get(key) for key in ("weight", "bias", "resample_filter"))
    channels, width = x.shape[1], 0 if weight is None else weight.shape[-1] // 2
    if fused:  # the convolution first, on a larger image
        x = F.conv2d(F.pad(x, [width + (taps.shape[-1] - 1) // 2] * 4), weight)
        x = F.conv2d(x, taps.repeat(len(weight), 1, 1, 1), stride=2, groups=len(weight))
        return x + bias[:, None, None]
    if change == "up":
        spread = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
        spread[..., ::2, ::2] = 4 * x
        size = taps.shape[-1]
        before = size // 2
        x = F.conv2d(F.pad(spread, [before, size - 1 - before] * 2), taps.repeat(channels, 1, 1, 1), groups=channels)
    elif change == "down":
        padded = F.pad(x, [(taps.shape[-1] - 1) // 2] * 4)
        x = F.conv2d(padded, taps.repeat(channels, 1, 1, 1), stride=2, groups=channels)
    return x if weight is None else F.conv2d(x, weight, bias, padding=width)


def normed(layer, x, eps):
    grouped = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    flat = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    return flat * layer["weight"][:, None, None] + layer["bias"][:, None, None]


def block(layer, x, embedding, *, song, change=""):
    eps, gain = (1e-6, ROOT_HALF) if song else (1e-5, 1.0)
    inside = convolved(layer["conv0"], F.silu(normed(layer["norm0"], x, eps)), change=change)
    given = F.linear(embedding, **layer["affine"])[..., None, None]
    if song:
        inside = normed(layer["norm1"], inside + given, eps)
    else:
        scale, shift = given.tensor_split(2, dim=1)
        inside = normed(layer["norm1"], inside, eps) * (scale + 1) + shift
    inside = convolved(layer["conv1"], F.silu(inside))
    x = gain * (inside + (convolved(layer["skip"], x, change=change) if "skip" in layer else x))
    if "qkv" not in layer:
        return x
    heads = 1 if song else x.shape[1] // 64
    together = convolved(layer["qkv"], normed(layer["norm2"], x, eps))
    outputs = []
    for each in together.chunk(heads, dim=1):  # the channels of a head: query, key, value, query, ...
        q, k, v = (each[:, i::3].flatten(2) for i in range(3))
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(q.shape[1]), dim=2)
        outputs.append(torch.einsum("bqk,bck->bcq", weights, v))
    return gain * (x + convolved(layer["proj"], torch.cat(outputs, dim=1).reshape(x.shape)))


def network(weights, options, x: Tensor, noise: Tensor, classes: Tensor | None, *, song: bool) -> Tensor:
    """F(x, c_noise, classes) of a network with these weights, in the order of EDM's layers. classes: one-hot."""
    half = options["model_channels"] * options.get("channel_mult_noise", 1) // 2
    if options.get("embedding_type") == "fourier":
        angle = noise[:, None] * 2 * math.pi * weights["map_noise"]["freqs"]
    else:
        angle = noise[:, None] * 1e-4 ** (torch.arange(half) / (half - song))
    if song:
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
        if classes is not None:
            embedding = embedding + F.linear(classes * math.sqrt(classes.shape[1]), **weights["map_label"])
        embedding = F.silu(F.linear(embedding, **weights["map_layer0"]))
        embedding = F.silu(F.linear(embedding, **weights["map_layer1"]))
    else:
        embedding = F.silu(F.linear(torch.cat([angle.cos(), angle.sin()], dim=1), **weights["map_layer0"]))
        embedding = F.linear(embedding, **weights["map_layer1"])
        if classes is not None:
            embedding = embedding + F.linear(classes, **weights["map_label"])
        embedding = F.silu(embedding)
    kept, image = [], x
    for name, layer in weights["enc"].items():
        if name.endswith("_conv"):
            x = convolved(layer, x)
        elif name.endswith("_aux_residual"):
            image = x = ROOT_HALF * (x + convolved(layer, image, fused=True))
            kept.pop()
        else:
            x = block(layer, x, embedding, song=song, change="down" if name.endswith("_down") else "")
        kept.append(x)
    for name, layer in weights["dec"].items():
        if "_aux_" in name:
            continue
        if "_block" in name:
            x = torch.cat([x, kept.pop()], dim=1)
        x = block(layer, x, embedding, song=song, change="up" if name.endswith("_up") else "")
    side = options["img_resolution"]
    ends = weights["dec"] if song else weights
    norm, conv = (f"{side}x{side}_aux_norm", f"{side}x{side}_aux_conv") if song else ("out_norm", "out_conv")
    return convolved(ends[conv], F.silu(normed(ends[norm], x, 1e-6 if song else 1e-5)))


def velocity(weights, options, x: Tensor, sigma: Tensor, classes: Tensor | None, *, song: bool) -> Tensor:
    """dx/dt of x = data + sigma noise with sigma = t / (1 - t), by the denoiser of Karras et al. 2022, eq. (7)."""
    sigma, x = sigma.double()[:, None, None, None], x.double()
    total = sigma**2 + 0.25
    scaled = (x / total.sqrt()).float()
    output = network(weights, options, scaled, (sigma.log() / 4).flatten().float(), classes, song=song).double()
    data = 0.25 / total * x + sigma * 0.5 / total.sqrt() * output
    return (x - data) / sigma * (1 + sigma) ** 2
