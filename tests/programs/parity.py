"""Ranks that train one case after another: main(OUT, MINUTES, CASE ...), with RANK etc. in the environment.

A case is RECIPE-ZERO-PRECISION and options, e.g. "two-3-fp32" or "one-2-fp32-offload"; ZERO "none" is without
DeepSpeed. Rank 0 writes OUT/CASE.json with the numbers of each step since this start. Checkpoints are in OUT/CASE.

Options: offload, recompute, divide (fields of launch); persist (in stage 3, small parameters are not sharded); often (a
checkpoint at every step); short (three steps); once (stop after the first step and resume in the same process: its
checkpoint holds the gradients); masters (compare all exported weights with DeepSpeed's own copy of the master weights);
memory (each rank writes OUT/CASE.memory-RANK.json).
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from distill.core.errors import (
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_PEER,
    EXIT_STOPPED,
    InputError,
    PeerLost,
    RunError,
    Stopped,
)
from distill.core.stop import StopRequest
from distill.flow.autodiff import jvp
from distill.flow.draws import generator
from distill.flow.interpolants import linear
from distill.networks.architectures import build
from distill.networks.velocity import VelocityStudent
from distill.protocols import Adapter, Batch, Copy, Frozen, Loss, Pairs, Trained, Turn
from distill.runs.progress import Progress
from distill.runs.run_store import StagePaths
from distill.spec.model import CheckpointSpec, OptimizerSpec, TrainStage, UNetSpec
from distill.training import engine
from distill.training.blocks import Blocks
from distill.training.memory import Probe
from distill.training.world import World
from distill.training.zero import Zero

BATCH, MICRO, STEPS, SHORT, SHAPE = 16, 4, 20, 3, (1, 8, 8)
RECIPES = {}


class Source:
    """Pairs of noise and a fixed function of it."""

    def batch(self, step, rows):
        noise = torch.randn(rows.total, *SHAPE, generator=generator("noise", step))
        labels = torch.arange(step, step + rows.total) % 10
        data = noise.flip(-1).tanh() + 0.1 * labels.view(-1, 1, 1, 1)
        rows = slice(rows.start, rows.stop)
        return Batch(None, Pairs(noise[rows], data[rows]), {"class_labels": labels[rows]})


class Init:
    num_classes = 10

    def velocity_field(self, seed=0):
        return VelocityStudent(build(UNetSpec(kind="unet", channels=[32]), SHAPE, 10, seed))

    flow_map = acceleration = critic = velocity_field

    def null(self, cond):
        return cond


class Reflow:
    """One network. The recipe remembers the mean of its losses."""

    sampler = "euler"

    def __init__(self):
        self.memory = {"sum": torch.zeros(())}

    def networks(self, init):
        return {"student": Trained(init.velocity_field())}

    def turns(self, step, images):
        self.memory["sum"] += step
        yield Turn("student", self.regress)

    def state(self):
        return self.memory

    def regress(self, nets, batch, ctx):
        pairs, student = batch.pairs, nets["student"]
        t = ctx.draw.uniform("t", pairs.data)
        x_t = linear().mix(pairs.data, pairs.noise, t)
        error = self.error(student(x_t, t, batch.cond), pairs.noise - pairs.data, ctx)
        return Loss(error, {"memory": self.memory["sum"]})

    def error(self, v, true, ctx):
        return (v - true).square().mean()


class Target(Reflow):
    """The student follows a slow copy of itself at an earlier time, and a frozen network."""

    def networks(self, init):
        return {
            "student": Trained(init.velocity_field()),
            "slow": Copy("student", 0.9),
            "teacher": Frozen(init.velocity_field(seed=1)),
        }

    def turns(self, step, images):
        yield Turn("student", self.follow)

    def follow(self, nets, batch, ctx):
        pairs, student = batch.pairs, nets["student"]
        t = ctx.draw.uniform("t", pairs.data)
        x_t = linear().mix(pairs.data, pairs.noise, t)
        with torch.no_grad():
            target = nets["slow"](x_t, t / 2, batch.cond)
        v = student(x_t, t, batch.cond)
        through = nets["teacher"](x_t - t.view(-1, 1, 1, 1) * v, t / 2, batch.cond)  # gradients flow through it
        return Loss((v - target).square().mean() + (through - pairs.noise).square().mean())


class Adapted(Target):
    """Adapters of the student are trained, and their slow copy is followed."""

    def networks(self, init):
        adapter = Adapter(init.velocity_field(), 4, 8.0, ("conv1", "linear_2"), lr=3.0)
        return {**super().networks(init), "student": adapter}


class Adversarial(Reflow):
    """Two networks: the student's loss goes through the frozen critic."""

    def networks(self, init):
        torch.manual_seed(5)
        critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        return {"student": Trained(init.velocity_field()), "critic": Trained(critic, lr=2.0, groups={"1.*": 3.0})}

    def turns(self, step, images):
        yield Turn("critic", self.judge)
        yield Turn("student", self.deceive)

    def made(self, nets, batch):
        noise = batch.pairs.noise
        return noise - nets["student"](noise, torch.ones(len(noise)), batch.cond)

    def judge(self, nets, batch, ctx):
        with torch.no_grad():
            made = self.made(nets, batch)
        real, fake = nets["critic"](batch.pairs.data), nets["critic"](made)
        return Loss(nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean())

    def deceive(self, nets, batch, ctx):
        fooled = nn.functional.softplus(-nets["critic"](self.made(nets, batch))).mean()
        return Loss(self.regress(nets, batch, ctx).total + 0.1 * fooled)


class Headed(nn.Module):
    """A field with a second head, which only some turns call."""

    interpolant = linear()
    t_range = (0.0, 1.0)

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Conv2d(1, 1, 1)

    def forward(self, x_t, t, cond):
        return self.body(x_t, t, cond)


class Headstrong(Reflow):
    """Every third step reaches the second head."""

    def networks(self, init):
        torch.manual_seed(3)
        return {"student": Trained(Headed(init.velocity_field()), lr=0.5, groups={"head.*": 10.0})}

    def turns(self, step, images):
        yield Turn("student", self.both if step % 3 == 0 else self.regress)

    def both(self, nets, batch, ctx):
        head = nets["student"].head(batch.pairs.data).square().mean() if ctx.step % 3 == 0 else 0
        return Loss(self.regress(nets, batch, ctx).total + head)


class Deaf(Reflow):
    """No step reaches the second head."""

    waiting = ()

    def networks(self, init):
        torch.manual_seed(3)
        return {"student": Trained(Headed(init.velocity_field()), self.waiting)}


class Patient(Deaf):
    """As is meant to be."""

    waiting = ("head.*",)


class Half(Deaf):
    """The last rank's second step reaches it."""

    def regress(self, nets, batch, ctx):
        loss = super().regress(nets, batch, ctx)
        if ctx.step != 1 or int(os.environ["RANK"]) + 1 != int(os.environ["WORLD_SIZE"]):
            return loss
        return Loss(loss.total + 0 * nets["student"].head(batch.pairs.data).mean(), loss.logs)


class Slope(Reflow):
    """Logs a derivative of the student, which precision and `launch` must not change."""

    def regress(self, nets, batch, ctx):
        noise, student = batch.pairs.noise, nets["student"]
        t = ctx.draw.uniform("t", noise)
        along = noise, torch.ones_like(t)
        slope = jvp(lambda x, t: student(x, t, batch.cond), (noise, t), along, method="central", step=1e-2)
        return Loss(super().regress(nets, batch, ctx).total, {"slope": slope.square().mean()})


class Faulty(Reflow):
    """At step 3 the gradient of rank 1 is no number, though its loss is."""

    def error(self, v, true, ctx):
        faulty = ctx.step == 3 and os.environ["RANK"] == "1"  # the root of zero has an infinite slope
        return super().error(v, true, ctx) + ((0 * v).sum().sqrt() if faulty else 0)


class Astray(Adversarial):
    """From step 3 on, rank 1 takes another branch."""

    def turns(self, step, images):
        yield from list(super().turns(step, images))[step >= 3 and os.environ["RANK"] == "1" :]


class Hung(Reflow):
    """At step 3, rank 1 never comes back."""

    def regress(self, nets, batch, ctx):
        if ctx.step == 3 and os.environ["RANK"] == "1":
            time.sleep(3600)
        return super().regress(nets, batch, ctx)


RECIPES = {"one": Reflow, "copy": Target, "two": Adversarial, "heads": Headstrong}
RECIPES |= {"adapter": Adapted}
RECIPES |= {"deaf": Deaf, "patient": Patient, "half": Half, "slope": Slope}
RECIPES |= {"faulty": Faulty, "astray": Astray, "hung": Hung}


class Recorder(Progress):
    """Keeps the numbers of every step."""

    def __init__(self, stop):
        super().__init__("parity", STEPS * BATCH, "images", None)
        self.steps, self.stop = [], stop

    def update(self, done, *logs):
        self.steps.extend(map(dict, logs))
        if done == BATCH and self.stop is not None:
            self.stop.signal = "the test"


def train(out, ours, case):
    recipe, stage, precision, *options = case.split("-")
    steps = SHORT if "short" in options else STEPS
    spec = TrainStage(
        kind="train", recipe="r", images=steps * BATCH, batch_size=BATCH, precision=precision,
        optimizer=OptimizerSpec(lr=1e-4, clip=0.5), ema_half_lives=[2.0, 64.0], export=2.0,
        checkpoint=CheckpointSpec(images=BATCH * (1 if "often" in options else STEPS // 2), keep=STEPS),
    )  # fmt: skip
    threshold = None if "persist" in options else 0
    sharding = Zero(None if stage == "none" else int(stage), "divide" in options, threshold, "offload" in options)
    probe = Probe(sharding, ours.size) if "memory" in options else None
    with StopRequest() as stop, probe.activations if probe else nullcontext():
        recorder = Recorder(stop if "once" in options else None)

        def start():
            return engine.train(
                RECIPES[recipe](), Init(), Source(), spec,
                seed=0, device=torch.device("cpu"), micro_batch=MICRO, paths=StagePaths(Path(out) / case),
                progress=recorder, stop=stop, world=ours, sharding=sharding,
                blocks=Blocks(recompute="recompute" in options), probe=probe,
            )  # fmt: skip

        try:
            result = start()
        except Stopped:
            if "once" not in options:
                raise
            stop.signal = None
            result = start()
    if ours.first:
        (Path(out) / f"{case}.json").write_text(json.dumps(recorder.steps))
    if probe:
        (Path(out) / f"{case}.memory-{ours.rank}.json").write_text(json.dumps(probe.report(ours.rank)))
    if "masters" in options:
        hold(result.roles.student)


def hold(student):
    """What leaves the trainable is, bit for bit, what DeepSpeed itself says of its master weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    own = student.parts(student.masters())
    student.activate(True)  # else it says nothing
    for name, parameter in student.module.named_parameters():
        theirs = parameter.detach() if student.stage == 0 else safe_get_full_fp32_param(parameter)
        if name in own.tensors:
            ours = own.tensors[name].reshape(-1)
            start = own.pieces[name].start if name in own.pieces else 0
            assert torch.equal(ours, theirs.reshape(-1)[start : start + ours.numel()]), name


def main(out, minutes, *cases):
    """The exit codes of the command line."""
    torch.set_num_threads(1)
    try:
        ours = World.join(torch.device("cpu"), float(minutes), int(os.environ["LOCAL_RANK"]), lambda message: None)
        for case in cases:
            began = time.monotonic()
            train(out, ours, case)
            print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)
    except (InputError, PeerLost, RunError, Stopped) as error:
        print(error, file=sys.stderr, flush=True)
        codes = {InputError: EXIT_INPUT, PeerLost: EXIT_PEER, RunError: EXIT_FAILED, Stopped: EXIT_STOPPED}
        return codes[type(error)]
    return 0
