"""A small training in its own process, which tests kill: FOLDER IMAGES SAVE_EVERY [BALLAST]. Also the networks of the
engine tests. BALLAST: see `Vector`; FOLDER/asked then gets a line for each step whose batch was requested.

Exit codes are those of the command line: 0 done, 1 failed, 75 stopped by a signal after saving.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from distill.core.errors import EXIT_FAILED, EXIT_STOPPED, RunError, Stopped
from distill.core.stop import StopRequest
from distill.flow.conditioning import Unconditional
from distill.flow.draws import generator
from distill.flow.interpolants import linear
from distill.protocols import Batch, Frozen, Loss, Trained, Turn
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths
from distill.spec.model import TrainStage
from distill.training import engine
from distill.training.blocks import EAGER
from distill.training.plain import PLAIN


class Vector(nn.Module):
    """A velocity field over [B, 2], with dropout and a buffer, so that both must be resumed.

    ballast: float32 elements of another buffer, which all count the calls: steps stay quick, saving does not.
    """

    t_range = (0.0, 1.0)

    def __init__(self, seed=0, width=16, dropout=0.0, ballast=0):
        super().__init__()
        self.interpolant = linear()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if ballast:
            self.register_buffer("ballast", torch.zeros(ballast))
        self.heavy = ballast > 0
        numbers = generator("vector", seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) * parameter.shape[-1] ** -0.5)

    def forward(self, x_t, t, cond):
        if self.training:
            self.calls += 1
            if self.heavy:
                self.ballast += 1
        return self.layers(torch.cat([x_t, t[:, None]], 1)).to(x_t.dtype)


class Ring:
    """Points near a ring, by (seed, step): a Source. `fault`: the step whose data has a NaN."""

    def __init__(self, seed=0, fault=None):
        self.seed, self.fault = seed, fault

    def batch(self, step, rows):
        angle = 6.2832 * torch.rand(rows.total, generator=generator(self.seed, "ring", step))
        data = torch.stack([angle.cos(), angle.sin()], 1)
        if step == self.fault:
            data[0, 0] = float("nan")
        return Batch(data=data[rows.start : rows.stop], pairs=None, cond={})


class KilledError(Exception):
    """Ends a training as if its process had been killed."""


class KilledAt(Ring):
    """Raises KilledError at the step `fault`."""

    def batch(self, step, rows):
        if step == self.fault:
            raise KilledError
        return Ring.batch(Ring(), step, rows)


class Noting(Ring):
    """Adds a line to a file at each step that it is asked for."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def batch(self, step, rows):
        with self.path.open("a") as file:
            file.write(f"{step}\n")
        return super().batch(step, rows)


class NoInit:
    """Networks of these tests are made by their recipes."""

    num_classes = None

    conditioning = Unconditional()

    def velocity_field(self):
        raise AssertionError

    flow_map = acceleration = critic = t_grid = velocity_field

    def null(self, cond):
        return cond


class FlowMatching:
    """One network, one turn."""

    sampler = "euler"

    def __init__(self, dropout=0.0, ballast=0):
        self.dropout, self.ballast = dropout, ballast

    def networks(self, init):
        return {"student": Trained(Vector(dropout=self.dropout, ballast=self.ballast))}

    def turns(self, step, images):
        yield Turn("student", self.loss)

    def loss(self, nets, batch, ctx):
        noise, t = ctx.draw.normal("noise", batch.data), ctx.draw.uniform("t", batch.data)
        path = nets["student"].interpolant
        error = nets["student"](path.mix(batch.data, noise, t), t, batch.cond) - path.velocity(batch.data, noise, t)
        return Loss(error.square().flatten(1).mean(1).mean(), {"error_max": error.detach().abs().max()})


class Alternating(FlowMatching):
    """A critic learns the student's velocity, the student follows teacher and critic: two turns, a carry, a frozen."""

    def networks(self, init):
        return {
            "student": Trained(Vector(1, dropout=self.dropout, ballast=self.ballast)),
            "critic": Trained(Vector(2)),
            "teacher": Frozen(Vector(3)),
        }

    def turns(self, step, images):
        yield Turn("critic", self.critic_loss)
        if step % 3 == 2:  # the critic moves three times as often
            yield Turn("student", self.student_loss)

    def critic_loss(self, nets, batch, ctx):
        t, noise = ctx.draw.uniform("t", batch.data), ctx.draw.normal("noise", batch.data)
        generated = noise - nets["student"](noise, torch.ones_like(t), batch.cond)
        ctx.carry["generated"] = generated
        x_t = linear().mix(generated, noise, t)
        return Loss((nets["critic"](x_t, t, batch.cond) - linear().velocity(generated, noise, t)).square().mean())

    def student_loss(self, nets, batch, ctx):
        assert not ctx.carry["generated"].requires_grad
        t, noise = ctx.draw.uniform("t", batch.data), ctx.draw.normal("noise", batch.data)
        generated = noise - nets["student"](noise, torch.ones_like(t), batch.cond)
        x_t = linear().mix(generated, noise, t)
        gap = nets["critic"](x_t, t, batch.cond) - nets["teacher"](x_t, t, batch.cond)  # gradients flow through both
        return Loss(gap.square().mean() + (generated - ctx.carry["generated"]).square().mean())


def averages(roles):
    """The student's state dicts with averaged weights, by half-life or length. Buffers are not averaged."""
    state = roles.networks["student"].state_dict()
    return {which: {**state, **own} for which, own in roles.ema.averages.items()}


def stage(**changes):
    """A stage of 8 steps of 16 images that saves at every step."""
    content = {
        "kind": "train",
        "recipe": "reflow/reflow",
        "images": 128,
        "batch_size": 16,
        "ema_half_lives": [64.0, 1000.0],
        "optimizer": {"lr": 0.01, "warmup_images": 32, "decay": "cosine", "clip": 0.5},
        "checkpoint": {"images": 16, "minutes": None, "keep": 2},
    }
    return TrainStage.model_validate({**content, **changes})


def train(
    folder, recipe=None, source=None, *, seed=0, micro_batch=None, stop=None, blocks=EAGER, sharding=PLAIN, **changes
):
    """`engine.train` into `folder`."""
    settings = stage(**changes)
    run = RunPaths(Path(folder))
    run.root.mkdir(parents=True, exist_ok=True)
    with Progress("train", settings.images, "images", run) as progress:
        return engine.train(
            recipe or FlowMatching(),
            NoInit(),
            source or Ring(),
            settings,
            seed=seed,
            device=torch.device("cpu"),
            micro_batch=micro_batch or settings.batch_size,
            paths=run.stage("train"),
            progress=progress,
            stop=stop or StopRequest(),
            run=run,
            blocks=blocks,
            sharding=sharding,
        )


def main(folder, images, every, ballast=0):
    torch.set_num_threads(1)
    recipe, saving = Alternating(dropout=0.2, ballast=int(ballast)), {"images": int(every), "minutes": None, "keep": 2}
    Path(folder).mkdir(parents=True, exist_ok=True)
    source = Noting(Path(folder) / "asked") if ballast else Ring()
    with StopRequest() as stop:
        try:
            train(folder, recipe, source, images=int(images), micro_batch=8, stop=stop, checkpoint=saving)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED
        except RunError as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    assert "deepspeed" not in sys.modules, "the plain path needs no DeepSpeed"
    raise SystemExit(code)
