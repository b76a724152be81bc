"""Step time, memory, and what the engine adds to a bare loop, for networks of the size of real ones."""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from programs.train_vector import FlowMatching, NoInit
from torch import Tensor, nn

from distill.core.stop import StopRequest
from distill.flow.draws import Rows, StepDraw
from distill.flow.interpolants import linear
from distill.protocols import Batch, Loss, Trained
from distill.runs.progress import Progress
from distill.runs.run_store import StagePaths
from distill.spec.model import TrainStage
from distill.training import engine, memory
from distill.training.ema import Ema
from distill.training.plain import PLAIN
from distill.training.turn_logs import TurnLogs
from distill.training.world import ALONE
from tests.gpu.parts import Part

WARM, STEPS, BATCH = 5, 15, 32
LATENTS = {"unet": (4, 64, 64), "dit": (4, 32, 32)}


class Wrapped(nn.Module):
    """A network of diffusers as a velocity field over the time of the linear path."""

    t_range = (0.0, 1.0)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.interpolant = network, linear()

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        labels = cond["class_labels"]
        if isinstance(self.network, UNet2DModel):
            return self.network(x_t, 1000 * t, class_labels=labels).sample
        return self.network(x_t, timestep=1000 * t, class_labels=labels).sample[:, : x_t.shape[1]]


def made(name: str, *, small: bool) -> Wrapped:
    """unet: 100 M weights; dit: 300 M; both much smaller if `small`."""
    torch.manual_seed(0)
    if name == "unet":
        widths = (32, 64) if small else (144, 288, 432, 576)
        blocks = {"down_block_types": ("DownBlock2D",) * len(widths), "up_block_types": ("UpBlock2D",) * len(widths)}
        network = UNet2DModel(
            LATENTS["unet"][1], 4, 4, block_out_channels=widths, norm_num_groups=16, num_class_embeds=10, **blocks
        )
    else:
        layers, heads = (2, 2) if small else (16, 16)
        network = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=layers,
            sample_size=LATENTS["dit"][1], num_embeds_ada_norm=10,
        )  # fmt: skip
    return Wrapped(network)


class DoneError(Exception):
    """Ends a training that is only measured, before it is saved."""


class Clocked:
    """The same batch at every step. Notes when the steps WARM and WARM + STEPS begin, on the device."""

    def __init__(self, shape: tuple[int, ...], batch: int, device: torch.device) -> None:
        labels = torch.arange(batch) % 10
        self.given = Batch(torch.randn(batch, *shape), None, {"class_labels": labels})
        if device.type == "cuda":
            self.given = self.given.map(Tensor.pin_memory)
        self.device, self.times = device, [0.0, 0.0]

    def batch(self, step: int, rows: Rows) -> Batch:
        if step in (WARM, WARM + STEPS):
            wait(self.device)
            self.times[step > WARM] = time.perf_counter()
        if step == WARM + STEPS:
            raise DoneError
        return self.given


class Recipe(FlowMatching):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def networks(self, init: object) -> dict[str, Trained]:
        return {"student": Trained(self.network)}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(network: nn.Module, source: Clocked, stage: TrainStage, device: torch.device) -> float:
    """Seconds of a step of the engine."""
    with tempfile.TemporaryDirectory() as folder, Progress("speed", stage.images, "images", None) as progress:
        try:
            engine.train(
                Recipe(network), NoInit(), source, stage, seed=0, device=device, micro_batch=stage.batch_size,
                paths=StagePaths(Path(folder)), progress=progress, stop=StopRequest(), probe=lambda roles: None,
            )  # fmt: skip
        except DoneError:
            return (source.times[1] - source.times[0]) / STEPS
    raise AssertionError("the training ended by itself")


def bare(network: nn.Module, source: Clocked, stage: TrainStage, device: torch.device) -> float:
    """Seconds of a step of a loop written by hand, with the same loss, optimizer, clipping and average."""
    network.to(device).train()
    weights = list(network.parameters())
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=stage.optimizer.lr, fused=True)
    began = 0.0
    for step in range(WARM + STEPS):
        if step == WARM:
            wait(device)
            began = time.perf_counter()
        batch = source.given.map(lambda each: each.to(device, non_blocking=True))
        noise, t = torch.randn_like(batch.data), torch.rand(len(batch.data), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            path = network.interpolant
            error = network(path.mix(batch.data, noise, t), t, batch.cond) - path.velocity(batch.data, noise, t)
            loss = error.square().flatten(1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, weights, 1e-3)
    wait(device)
    return (time.perf_counter() - began) / STEPS


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action, on an idle device."""
    for timed in (False, True):
        wait(device)
        began = time.perf_counter()
        for _ in range(10 if timed else 2):
            action()
        wait(device)
    return (time.perf_counter() - began) / 10


def measure(part: Part, name: str) -> None:
    device, batch = part.device, 4 if part.small else BATCH
    network, shape = made(name, small=part.small), LATENTS[name]
    count = sum(p.numel() for p in network.parameters())
    stage = TrainStage.model_validate(
        {
            "kind": "train", "recipe": "pretrain/flow_matching", "images": 1000 * batch, "batch_size": batch,
            "precision": "bf16", "ema_half_lives": [1000.0], "checkpoint": {"images": 10**9, "minutes": None},
        }
    )  # fmt: skip
    title = f"{name}, {count / 1e6:.0f} M"
    found = {"ours": [], "bare": []}
    peak = 0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found["ours"].append(ours(copy.deepcopy(network), Clocked(shape, batch, device), stage, device))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        found["bare"].append(bare(copy.deepcopy(network), Clocked(shape, batch, device), stage, device))
    step, ratio = min(found["ours"]), min(found["ours"]) / min(found["bare"])
    part.add(f"{title}: images/s", batch / step)
    part.add(f"{title}: step time / that of a bare loop", ratio, None if part.small else ratio <= 1.03)
    if device.type == "cuda":
        memory_of(part, title, network, stage, batch, peak)
    network.to(device)
    like = torch.zeros(batch, *shape, device=device)
    draw = StepDraw(0, 0, 0, Rows(0, batch, batch))
    ema = Ema(dict(network.named_parameters()), [1000.0])
    zero = torch.zeros((), device=device)
    shares = {
        "draws": seconds(lambda: (draw.normal("noise", like), draw.uniform("t", like)), device),
        "EMA": seconds(lambda: ema.update(10**6, batch), device),
        "logs": seconds(lambda: TurnLogs.of("student", "", [Loss(zero, {"gap": zero})], zero, ALONE), device),
    }
    for what, taken in shares.items():
        part.add(f"{title}: share of {what} in a step", taken / step)


def memory_of(part: Part, title: str, network: nn.Module, stage: TrainStage, batch: int, peak: int) -> None:
    """The memory that torch allocated at most, against the prediction and the activations that are counted."""
    sizes = {"student": [p.numel() for p in network.parameters()]}
    kinds = memory.predict(sizes, [], len(stage.averages), 1, PLAIN)
    counted = copy.deepcopy(network).to(part.device).train()
    with memory.Activations() as activations:
        x, t = (
            torch.randn(batch, *LATENTS[title.split(",")[0]], device=part.device),
            torch.rand(batch, device=part.device),
        )
        with torch.autocast(part.device.type, torch.bfloat16):
            counted(x, t, {"class_labels": torch.zeros(batch, dtype=torch.int64, device=part.device)}).sum().backward()
    expected = sum(kinds.values()) + activations.peak
    part.add(f"{title}: peak memory / predicted", peak / expected, abs(peak / expected - 1) <= 0.1)
