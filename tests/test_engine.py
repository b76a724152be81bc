"""The training loop: bitwise equal to a plain PyTorch loop, turns of networks, stopping and resuming."""

import math
import re
from collections import OrderedDict

import pytest
import torch
from programs.train_vector import (
    Alternating,
    FlowMatching,
    KilledAt,
    KilledError,
    NoInit,
    Ring,
    Vector,
    averages,
    stage,
    train,
)
from torch import nn

from distill.core.errors import InputError, RunError
from distill.flow.draws import Rows, StepDraw, key
from distill.flow.interpolants import linear
from distill.protocols import Copy, Frozen, Loss, Trained, Turn
from distill.runs.run_store import RunPaths, read_events
from distill.spec.model import OptimizerSpec
from distill.training import checkpoint, checkpoint_files
from distill.training.blocks import EAGER, Blocks
from distill.training.plain import PLAIN, Plain, PlainTrainable
from distill.training.roles import Roles
from distill.training.sharding import Sharding, Trainable
from distill.training.world import ALONE


def bits(result):
    """All that training leaves, as one state dict."""
    out = {f"{name}/{k}": v.clone() for name, net in result.roles.networks.items() for k, v in net.state_dict().items()}
    for half_life, average in averages(result.roles).items():
        out.update({f"{half_life}/{k}": v.clone() for k, v in average.items()})
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def saved(folder):
    """Bytes of the newest checkpoint's tensors, by group."""
    newest = checkpoint.complete(folder / "stages" / "train" / "checkpoints")[0]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def bare_loop(steps, batch_size, accumulate=1):
    """What the engine does, written out by hand."""
    student, spec = Vector().train(), stage().optimizer
    optimizer = torch.optim.AdamW(
        student.parameters(), betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )
    for step in range(steps):
        for part in range(accumulate):
            size = batch_size // accumulate
            rows = Rows(part * size, (part + 1) * size, batch_size)
            data, draw = Ring().batch(step, rows).data, StepDraw(0, step, 0, rows)
            noise, t = draw.normal("noise", data), draw.uniform("t", data)
            x_t, v = linear().mix(data, noise, t), noise - data
            ((student(x_t, t, {}) - v).square().flatten(1).mean(1).mean() / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), spec.clip)
        images = step * batch_size + batch_size / 2
        ramp = min(images / 32, 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, images - 32) / (steps * batch_size - 32)))
        optimizer.param_groups[0]["lr"] = spec.lr * ramp * fall
        optimizer.step()
        optimizer.zero_grad()
    return student.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_five_steps_are_those_of_a_bare_loop(tmp_path, accumulate):
    result = train(tmp_path, images=120, batch_size=24, micro_batch=24 // accumulate)
    assert (result.images, result.step) == (120, 5)
    assert_same(dict(result.roles.networks["student"].state_dict()), dict(bare_loop(5, 24, accumulate)))


def test_accumulation_does_not_change_numbers(tmp_path):
    whole = train(tmp_path / "whole", images=640, batch_size=128)
    parts = train(tmp_path / "parts", images=640, batch_size=128, micro_batch=32)
    for name, value in whole.roles.networks["student"].named_parameters():
        torch.testing.assert_close(parts.roles.networks["student"].get_parameter(name), value, rtol=0, atol=1e-6)


def test_micro_batches_see_slices_of_the_same_draws(tmp_path):
    class Recording(FlowMatching):
        def __init__(self):
            super().__init__()
            self.seen = []

        def loss(self, nets, batch, ctx):
            self.seen.append(torch.cat([batch.data, ctx.draw.normal("noise", batch.data)], 1))
            return super().loss(nets, batch, ctx)

    whole, parts = Recording(), Recording()
    train(tmp_path / "whole", whole, images=48)
    train(tmp_path / "parts", parts, images=48, micro_batch=4)
    assert len(whole.seen) == 3 and len(parts.seen) == 12
    assert torch.equal(torch.cat(whole.seen), torch.cat(parts.seen))


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5 + 0.5**1.5, 0.5, 0.0]),
    ],
)
def test_learning_rates(decay, expected):
    spec = OptimizerSpec(lr=2.0, warmup_images=200, decay=decay)
    rates = [spec.learning_rate(float(images), 1000) for images in (0, 100, 200, 400, 600, 1000)]
    assert rates == pytest.approx([2 * e for e in expected], abs=1e-12)


def test_a_quadratic_follows_adamw_by_hand():
    """x^2 / 2 with weight decay: Loshchilov & Hutter 2017, Alg. 2, in float64."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    spec = OptimizerSpec(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05, clip=None)
    trainable = PlainTrainable("student", Trained(layer), spec)
    trainable.activate(True)
    x, m, v = 1.0, 0.0, 0.0
    for n in range(1, 21):
        trainable.backward(layer.weight.square().sum() / 2)
        norm = trainable.gradient_norm()
        assert norm.item() == pytest.approx(abs(x), rel=1e-5)
        trainable.step(0.1, norm)
        m, v = 0.9 * m + 0.1 * x, 0.99 * v + 0.01 * x * x
        x = x - 0.1 * 0.05 * x - 0.1 * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.99**n)) + 1e-8)
        assert layer.weight.item() == pytest.approx(x, rel=1e-5)


def test_clipping_scales_the_gradient_to_the_limit():
    layer = nn.Linear(2, 1, bias=False)
    trainable = PlainTrainable("student", Trained(layer), OptimizerSpec(clip=0.5))
    trainable.activate(True)
    trainable.backward((layer.weight * torch.tensor([[3.0, 4.0]])).sum())
    norm = trainable.gradient_norm()
    assert norm.item() == 5.0
    trainable.step(0.0, norm)
    first_moment = trainable.state().tensors["weight/exp_avg"]
    torch.testing.assert_close(first_moment, 0.1 * torch.tensor([[0.3, 0.4]]), rtol=1e-5, atol=0)


def test_who_divides_networks_is_one_object(tmp_path):
    """Somebody else's: the loop asks it for each network, and checkpoints note what it says of itself."""

    class Other(Plain):
        record = {**Plain.record, "divided": "by hand"}

        def __init__(self):
            self.asked = []

        def wrap(self, name, role, spec, world, device, slices):
            self.asked.append((name, device.type, slices))
            return super().wrap(name, role, spec, world, device, slices)

    other = Other()
    assert isinstance(other, Sharding) and isinstance(
        PlainTrainable("x", Trained(Vector()), OptimizerSpec()), Trainable
    )
    found = train(tmp_path / "other", Alternating(), sharding=other, images=32)
    rows = [Rows(0, 16, 16)]
    assert other.asked == [("student", "cpu", rows), ("critic", "cpu", rows)]
    assert_same(bits(found), bits(train(tmp_path / "plain", Alternating(), images=32)))
    latest = checkpoint.latest(tmp_path / "other" / "stages" / "train" / "checkpoints", print)
    assert latest.meta.environment["divided"] == "by hand" and latest.meta.environment["zero_stage"] == "none"


def test_turns_move_only_whose_turn_it_is(tmp_path):
    class Watched(Alternating):
        """Checks, inside each loss, who is trainable."""

        def watch(self, nets, active):
            for name, net in nets.items():
                assert net.training == (name == active)
                assert {p.requires_grad for p in net.parameters()} == {name == active}
                assert all(p.grad is None or name == active for p in net.parameters())

        def critic_loss(self, nets, batch, ctx):
            self.watch(nets, "critic")
            self.before = [p.detach().clone() for p in nets["student"].parameters()]
            self.carry = ctx.carry
            return super().critic_loss(nets, batch, ctx)

        def student_loss(self, nets, batch, ctx):
            self.watch(nets, "student")
            assert ctx.carry is self.carry  # one carry for the turns of a step
            assert all(map(torch.equal, self.before, nets["student"].parameters()))
            return super().student_loss(nets, batch, ctx)

    result = train(tmp_path, Watched(), images=32)
    assert (result.images, result.step) == (32, 6)  # images count the student's steps
    assert_same(dict(result.roles.networks["teacher"].state_dict()), dict(Vector(3).state_dict()))
    for name, start, calls in (("student", 1, 2), ("critic", 2, 6)):
        network = result.roles.networks[name]
        assert not torch.equal(network.layers[0].weight, Vector(start).layers[0].weight)
        assert network.calls == calls
    assert not any(net.training for net in result.roles.networks.values())


def test_gradients_flow_through_the_others(tmp_path):
    """A student that is seen only through a critic and a frozen teacher gets the gradient autograd gives."""

    def gap(nets, noise, t):
        generated = noise - nets["student"](noise, torch.ones_like(t), {})
        return (nets["critic"](generated, t, {}) - nets["teacher"](generated, t, {})).square().mean()

    class Through(Alternating):
        def turns(self, step, images):
            yield Turn("student", self.loss)

        def loss(self, nets, batch, ctx):
            return Loss(gap(nets, ctx.draw.normal("noise", batch.data), ctx.draw.uniform("t", batch.data)))

    train(tmp_path, Through(), images=16, micro_batch=4)
    [event] = [e for e in read_events(RunPaths(tmp_path)) if e["event"] == "progress"]
    nets, draw, like = (
        {"student": Vector(1), "critic": Vector(2), "teacher": Vector(3)},
        StepDraw(0, 0, 0, Rows(0, 16, 16)),
        torch.zeros(16, 2),
    )
    expected = gap(nets, draw.normal("noise", like), draw.uniform("t", like))
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in nets["student"].parameters()])
    assert event["logs"] == {
        "loss": pytest.approx(expected.item(), rel=1e-5),
        "grad_norm": pytest.approx(norm.item(), rel=1e-5),
    }
    assert norm > 1e-2


@pytest.mark.parametrize("kind", ["data", "gradient"])
def test_after_a_non_finite_loss_no_weights_are_saved(tmp_path, kind):
    """It is read one step late, when the weights have moved already."""

    class Faulty(FlowMatching):
        def networks(self, init):
            self.student = Vector()
            return {"student": Trained(self.student)}

        def loss(self, nets, batch, ctx):
            if ctx.step == 3:
                self.before = {k: v.clone() for k, v in nets["student"].state_dict().items() if k != "calls"}
            loss = super().loss(nets, batch, ctx)
            if kind == "gradient" and ctx.step == 3:  # the root of zero has an infinite slope
                return Loss(loss.total + (nets["student"].layers[0].weight * 0).sum().sqrt())
            return loss

    recipe, source = Faulty(), Ring(fault=3 if kind == "data" else None)
    loss = {"data": "nan", "gradient": r"\d\.\d+"}[kind]
    last = tmp_path / "stages/train/checkpoints/step-00000003"
    message = (
        rf"step 3, turn 0, network 'student': non-finite loss \({loss}\) or gradient norm \(nan\); no weights were "
        rf"saved after it\. Last good checkpoint: {last};"
    )
    with pytest.raises(RunError, match=message):
        train(tmp_path, recipe, source, micro_batch=8)
    stored, _ = checkpoint.weights(last.parent)
    assert_same({k: stored[k] for k in recipe.before}, recipe.before)


def test_a_loss_that_is_not_finite_is_told_before_what_follows_from_it(tmp_path):
    class Fragile(FlowMatching):
        def loss(self, nets, batch, ctx):
            if ctx.step == 4:
                raise ValueError("a recipe stumbles over its weights")
            return super().loss(nets, batch, ctx)

    with pytest.raises(RunError, match=r"^step 3, turn 0, network 'student': non-finite loss \(nan\)"):
        train(tmp_path, Fragile(), Ring(fault=3), checkpoint={"images": 48, "minutes": None})
    assert newest(tmp_path) == 3


def newest(folder):
    """The step of the newest checkpoint."""
    return int(checkpoint.complete(folder / "stages" / "train" / "checkpoints")[0].name.removeprefix("step-"))


def test_weights_that_moved_after_a_loss_that_is_not_finite_are_not_saved(tmp_path):
    """Also if the next step is made before the loss is read, and if a save is due after it."""
    for images in (32, 48, 64):
        folder = tmp_path / str(images)
        with pytest.raises(RunError, match="^step 3, turn 0, .*non-finite loss"):
            train(folder, source=Ring(fault=3), checkpoint={"images": images, "minutes": None})
        if images == 64:
            assert checkpoint.complete(folder / "stages" / "train" / "checkpoints") == []
        else:
            assert newest(folder) == images // 16
            state, _ = checkpoint.weights(folder / "stages" / "train" / "checkpoints")
            assert all(each.isfinite().all() for each in state.values())


def test_a_non_finite_first_step_says_there_is_no_checkpoint(tmp_path):
    with pytest.raises(RunError, match="step 0, .* Last good checkpoint: none yet;"):
        train(tmp_path, source=Ring(fault=0))


@pytest.mark.parametrize(
    ("recipe", "images"),
    [(FlowMatching(dropout=0.3), 96), pytest.param(Alternating(dropout=0.3), 48, marks=pytest.mark.long)],
)
def test_resuming_after_any_step_changes_no_bit(tmp_path, recipe, images):
    whole = train(tmp_path / "whole", recipe, micro_batch=8, images=images)
    for step in range(1, whole.step):
        folder = tmp_path / str(step)
        with pytest.raises(KilledError):
            train(folder, recipe, KilledAt(fault=step), micro_batch=8, images=images)
        torch.manual_seed(step)  # a new process has another global generator
        again = train(folder, recipe, micro_batch=8, images=images)
        assert (again.images, again.step) == (whole.images, whole.step)
        assert_same(bits(again), bits(whole))
        assert saved(folder) == saved(tmp_path / "whole")  # moments too
        resumed = [e["step"] for e in read_events(RunPaths(folder)) if e["event"] == "resumed"]
        every = 3 if isinstance(recipe, Alternating) else 1  # steps between saves: images count the student's
        assert resumed == ([step // every * every] if step >= every else [])


def test_a_finished_training_loads_and_does_nothing(tmp_path):
    class Empty(Ring):
        def batch(self, step, rows):
            raise AssertionError

    whole = train(tmp_path)
    before = saved(tmp_path)
    assert_same(bits(train(tmp_path, source=Empty())), bits(whole))
    assert saved(tmp_path) == before


def test_images_are_rounded_up_to_whole_batches(tmp_path):
    result = train(tmp_path, images=40)
    assert (result.images, result.step) == (48, 3)


def test_dropout_is_keyed_by_seed_and_step(tmp_path):
    a = train(tmp_path / "a", FlowMatching(dropout=0.5))
    torch.rand(7)
    b = train(tmp_path / "b", FlowMatching(dropout=0.5))
    assert_same(bits(a), bits(b))
    assert torch.initial_seed() == key(0, "dropout", 7, 0)


def test_bf16_stays_near_fp32_with_fp32_weights(tmp_path):
    class Spying(FlowMatching):
        def loss(self, nets, batch, ctx):
            inner = nets["student"].layers[0](torch.cat([batch.data, batch.data[:, :1]], 1))
            self.inner = inner.dtype
            return super().loss(nets, batch, ctx)

    recipe = Spying()
    full, half = train(tmp_path / "full"), train(tmp_path / "half", recipe, precision="bf16")
    assert recipe.inner == torch.bfloat16
    moved = False
    for name, value in full.roles.networks["student"].named_parameters():
        other = half.roles.networks["student"].get_parameter(name)
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, value, rtol=3e-2, atol=3e-2)
        moved |= not torch.equal(other, value)
    assert moved


def test_a_network_without_grad_keeps_a_parameter_that_came_frozen(tmp_path):
    class Partly(FlowMatching):
        def networks(self, init):
            student = Vector()
            student.layers[0].bias.requires_grad_(False)
            return {"student": Trained(student)}

    result = train(tmp_path, Partly())
    assert torch.equal(result.roles.networks["student"].layers[0].bias, Vector().layers[0].bias)
    assert not torch.equal(result.roles.networks["student"].layers[3].bias, Vector().layers[3].bias)
    assert averages(result.roles)[64.0].keys() == result.roles.networks["student"].state_dict().keys()


def test_tied_weights_are_averaged_under_both_names(tmp_path):
    class Tied(Vector):
        def __init__(self):
            super().__init__(width=3)
            self.layers.insert(3, nn.Linear(3, 3))
            self.layers[3].weight = self.layers[0].weight

    class TiedRecipe(FlowMatching):
        def networks(self, init):
            return {"student": Trained(Tied())}

    result = train(tmp_path, TiedRecipe(), ema_half_lives=[1e6])
    average = averages(result.roles)[1e6]
    assert torch.equal(average["layers.0.weight"], average["layers.3.weight"])
    assert not torch.equal(average["layers.0.weight"], result.roles.networks["student"].layers[0].weight)
    again = train(tmp_path, TiedRecipe(), ema_half_lives=[1e6])
    assert_same(bits(again), bits(result))


def recipe_of(networks, turn="student"):
    class Odd(FlowMatching):
        def networks(self, init):
            return networks

        def turns(self, step, images):
            yield Turn(turn, self.loss)

    return Odd()


def test_what_a_recipe_may_not_do(tmp_path):
    shared = Vector()
    cases = [
        ({"critic": Trained(Vector())}, "student", "trains no network named 'student'; it trains ['critic']"),
        ({"student": Trained(Vector())}, "studnet", "a turn to 'studnet', which it does not train; did you mean 'stud"),
        ({"student": Trained(shared), "old": Frozen(shared)}, "student", "'student' and 'old' share weights"),
        ({"student": Trained(Vector().requires_grad_(False))}, "student", "none of its parameters has requires_grad"),
        ({"student": Trained(Vector().double())}, "student", "layers.0.weight is torch.float64; trained weights are"),
        (
            {"student": Trained(Vector()), "ema": Copy("teacher")},
            "student",
            "'ema' is a copy of 'teacher', which it does",
        ),
    ]
    for networks, turn, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            train(tmp_path, recipe_of(networks, turn))

    class Idle(FlowMatching):
        def turns(self, step, images):
            yield from ()

    with pytest.raises(InputError, match=r"turns\(\) yielded nothing at step 0; it must yield at least one turn"):
        train(tmp_path, Idle())
    assert checkpoint.complete(tmp_path / "stages/train/checkpoints") == []


def test_a_copy_that_would_never_follow_is_refused():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"copy of 'student': decay={decay} is invalid; valid: 0 <= decay < 1"):
            Copy("student", decay)
        with pytest.raises(ValueError, match=rf"copy of 'student': decay={decay} is invalid"):
            Copy("student", lambda progress, decay=decay: decay)


@pytest.mark.parametrize("decay", [0.0, 0.75, lambda progress: 0.9 * progress])
def test_a_copy_follows_the_weights_after_each_step(tmp_path, decay):
    """And a resume in the middle changes no bit of it."""

    class Following(FlowMatching):
        def __init__(self):
            super().__init__(dropout=0.3)
            self.expected, self.seen, self.progress = None, 0, 0.0

        def networks(self, init):
            return {**super().networks(init), "slow": Copy("student", decay)}

        def loss(self, nets, batch, ctx):
            weights = [p.detach().clone() for p in nets["student"].parameters()]
            if self.expected is None:
                assert ctx.step > 0 or all(map(torch.equal, nets["slow"].parameters(), weights))
                self.expected = [p.clone() for p in nets["slow"].parameters()]
            else:
                now = decay(self.progress) if callable(decay) else decay
                torch._foreach_lerp_(self.expected, weights, 1 - now)
            self.progress = ctx.progress
            assert all(map(torch.equal, nets["slow"].parameters(), self.expected))
            assert not nets["slow"].training and not any(p.requires_grad for p in nets["slow"].parameters())
            self.seen += 1
            return super().loss(nets, batch, ctx)

    whole = train(tmp_path / "whole", Following())
    with pytest.raises(RunError):
        train(tmp_path / "again", Following(), source=Ring(fault=4))
    recipe = Following()
    again = train(tmp_path / "again", recipe)
    assert recipe.seen == 4
    assert_same(bits(again), bits(whole))
    assert "network.slow.safetensors" in saved(tmp_path / "again")
    assert saved(tmp_path / "again") == saved(tmp_path / "whole")


class Counting(FlowMatching):
    """Remembers a sum over all steps."""

    def __init__(self, name="sum"):
        super().__init__()
        self.memory = {name: torch.zeros(2, dtype=torch.float64)}

    def state(self):
        return self.memory

    def loss(self, nets, batch, ctx):
        for tensor in self.memory.values():
            tensor += 1.5 ** torch.tensor([ctx.step, -ctx.step])
        return super().loss(nets, batch, ctx)


def test_what_a_recipe_remembers_is_resumed(tmp_path):
    whole = Counting()
    train(tmp_path / "whole", whole)
    with pytest.raises(RunError):
        train(tmp_path / "again", Counting(), source=Ring(fault=4))
    again = Counting()
    train(tmp_path / "again", again)
    assert torch.equal(again.memory["sum"], whole.memory["sum"]) and whole.memory["sum"][0] > 20
    message = r"has the recipe state \['sum'\], but recipe 'reflow/reflow' has \['total'\]"
    with pytest.raises(RunError, match=message):
        train(tmp_path / "again", Counting("total"))
    with pytest.raises(RunError, match=r"has no 'recipe'; it has ema\.student\.1000\.0"):
        train(tmp_path / "plain")
        train(tmp_path / "plain", Counting())


def test_activations_are_computed_again_where_there_are_blocks(tmp_path):
    with pytest.raises(InputError, match=r"launch\.activation_checkpointing: no network that recipe 'reflow/reflow'"):
        train(tmp_path, blocks=Blocks(recompute=True))


def test_progress_says_losses_and_rate(tmp_path, capsys):
    train(tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"[\d-]+ [\d:]+  train  128/128 images  [\d,.]+ images/s  ETA 0:00  (data \d+ %  )?"
        r"loss \S+  error_max \S+  grad_norm \S+",
        line,
    )
    events = [e for e in read_events(RunPaths(tmp_path)) if e["event"] == "progress"]
    assert [e["done"] for e in events] == list(range(16, 129, 16))
    rows = Rows(0, 16, 16)
    data, draw = Ring().batch(0, rows).data, StepDraw(0, 0, 0, rows)
    noise, t = draw.normal("noise", data), draw.uniform("t", data)
    first = (Vector()(linear().mix(data, noise, t), t, {}) - (noise - data)).square().mean()
    assert events[0]["logs"]["loss"] == pytest.approx(first.item(), rel=1e-6)


def test_settings_of_a_resume_may_not_change(tmp_path):
    train(tmp_path, images=64)
    with pytest.raises(InputError, match=r"trained with other settings: stage\.images: 64 -> 128; restore the old"):
        train(tmp_path, images=128)
    with pytest.raises(InputError, match=r"settings: seed: 0 -> 3; stage\.optimizer\.lr: 0\.01 -> 0\.1"):
        train(tmp_path, images=64, seed=3, optimizer={**stage().optimizer.model_dump(), "lr": 0.1})


def test_a_training_with_the_random_numbers_of_an_older_version_is_not_resumed(tmp_path):
    train(tmp_path, images=64)
    newest = checkpoint.complete(tmp_path / "stages" / "train" / "checkpoints")[0] / "meta.json"
    meta = checkpoint_files.Meta.model_validate_json(newest.read_bytes())
    assert meta.settings.pop("draws") == 3
    newest.write_text(meta.sealed().model_dump_json())
    with pytest.raises(
        InputError, match=r"checkpoint .*step-00000004 was started with version 1 .*with distill 0\.1\.0, or"
    ):
        train(tmp_path, images=64)
    for odd in ([], "x", -5):
        meta.settings["draws"] = odd
        newest.write_text(meta.sealed().model_dump_json())
        said = f"is damaged: its version of the random numbers for training is {re.escape(repr(odd))}, but must be a w"
        with pytest.raises(InputError, match=said):
            train(tmp_path, images=64)


class Unreached(FlowMatching):
    """A layer that the loss does not depend on, or only from a later step on, or with a gradient of zero."""

    def __init__(self, waiting=(), *, reached=lambda step: False):
        super().__init__()
        self.waiting, self.reached = waiting, reached

    def networks(self, init):
        student = Vector()
        student.spare = nn.Linear(3, 1)
        return {"student": Trained(student, self.waiting)}

    def loss(self, nets, batch, ctx):
        loss = super().loss(nets, batch, ctx)
        return Loss(loss.total + 0 * nets["student"].spare.weight.sum()) if self.reached(ctx.step) else loss


def test_weights_that_no_backward_pass_reaches_are_refused_in_the_second_turn(tmp_path):
    message = (
        r"network 'student': in its first 2 turns no backward pass reached 2 of its \d+ trained parameters: "
        r"spare\.weight, spare\.bias\. In the recipe, set requires_grad=False where a parameter is not to be trained; "
        r"name it in Trained\(waiting=\.\.\.\) if only later turns reach it"
    )
    with pytest.raises(InputError, match=message):
        train(tmp_path / "never", Unreached())
    with pytest.raises(InputError, match=r"reached 1 of its \d+ trained parameters: spare\.bias\. "):
        train(tmp_path / "weight", Unreached(reached=lambda step: step == 1))
    with pytest.raises(InputError, match="spare.weight"):
        train(tmp_path / "late", Unreached(("*.bias",), reached=lambda step: step == 2))


def test_weights_may_wait_where_the_recipe_says_so_and_have_gradients_of_zero(tmp_path):
    train(tmp_path / "said", Unreached(("spare.*",)), images=64)
    train(tmp_path / "zero", Unreached(("spare.bias",), reached=lambda step: step == 1), images=64)
    with pytest.raises(
        ValueError, match="network 'student': waiting names 'head.*', but no trained parameter has this"
    ):
        train(tmp_path / "nothing", Unreached(("head.*",)))


def test_tied_weights_wait_under_all_their_names(tmp_path):
    class Tied(Unreached):
        def networks(self, init):
            student = Vector()
            student.spare, student.same = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
            student.same.weight = student.spare.weight
            return {"student": Trained(student, self.waiting)}

    train(tmp_path, Tied(("same.weight",)), images=64)


def test_the_first_turns_are_those_of_the_whole_training(tmp_path):
    """After a resume, too: what only the first step reaches was reached."""
    made = Unreached(("spare.bias",), reached=lambda step: step == 0)
    with pytest.raises(RunError):
        train(tmp_path, made, source=Ring(fault=4))
    train(tmp_path, made)


def test_another_micro_batch_is_said_to_end_bit_identity(tmp_path, capsys):
    with pytest.raises(RunError):
        train(tmp_path, source=Ring(fault=4))
    train(tmp_path, micro_batch=8)
    text = "resuming step-00000004 with changed settings (micro_batch: 16 -> 8): the result will not be bit-identical"
    assert text in capsys.readouterr().err
    assert any(e["event"] == "warning" and text in e["text"] for e in read_events(RunPaths(tmp_path)))


def test_a_checkpoint_of_another_network_is_one_message(tmp_path):
    class Wider(FlowMatching):
        def networks(self, init):
            return {"student": Trained(Vector(width=20))}

    train(tmp_path)
    with pytest.raises(RunError, match=r"does not fit recipe 'reflow/reflow': .*size mismatch for layers\.0\.weight"):
        train(tmp_path, Wider())


def test_moments_of_another_network_are_refused():
    trainable = PlainTrainable("student", Trained(nn.Linear(1, 1)), OptimizerSpec())
    with pytest.raises(RunError, match="the optimizer state of network 'student' has 'layer.weight', but the network"):
        trainable.load_state({"layer.weight/exp_avg": torch.zeros(1)})


class Rates(FlowMatching):
    """A network with learning rates of its own."""

    def __init__(self, lr=1.0, groups=None):
        super().__init__()
        self.lr, self.groups = lr, groups or {}

    def networks(self, init):
        return {"student": Trained(Vector(), lr=self.lr, groups=self.groups)}


def test_learning_rates_of_a_network_and_of_its_groups_multiply_that_of_the_stage():
    """Each of two steps against AdamW with that learning rate alone, to the bit."""
    factors = {"first.weight": 6.0, "first.bias": 2.0, "second.weight": 1.0, "second.bias": 1.0}
    network = nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.Linear(3, 1)))
    spec = OptimizerSpec(lr=0.1, weight_decay=0.05, clip=None)
    role = Trained(network, lr=2.0, groups={"first.w*": 3.0, "second.*": 0.5})
    trainable = PlainTrainable("student", role, spec)
    trainable.activate(True)
    alone = {name: nn.Parameter(p.detach().clone()) for name, p in network.named_parameters()}
    options = {"betas": spec.betas, "eps": spec.eps, "weight_decay": 0.05, "fused": True}
    optimizers = {name: torch.optim.AdamW([p], lr=0.0, **options) for name, p in alone.items()}
    for lr in (0.1, 0.03):
        trainable.backward(network(torch.tensor([[1.0, -2.0]])).square().sum())
        for name, p in network.named_parameters():
            alone[name].grad = p.grad.clone()
            optimizers[name].param_groups[0]["lr"] = lr * factors[name]
            optimizers[name].step()
        trainable.step(lr, trainable.gradient_norm())
        assert all(torch.equal(alone[name], p) for name, p in network.named_parameters())


def test_learning_rates_of_a_network_resume_to_the_bit_and_one_for_all_changes_nothing(tmp_path):
    made = Rates(2.0, {"layers.0.*": 3.0, "layers.3.bias": 0.25})
    undisturbed = train(tmp_path / "whole", made)
    with pytest.raises(RunError):
        train(tmp_path / "parts", made, source=Ring(fault=4))
    assert_same(bits(train(tmp_path / "parts", made)), bits(undisturbed))
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")
    plain = bits(train(tmp_path / "plain"))
    assert not torch.equal(plain["student/layers.0.weight"], bits(undisturbed)["student/layers.0.weight"])
    assert_same(bits(train(tmp_path / "same", Rates(1.0, {"layers.0.*": 1.0}))), plain)


@pytest.mark.parametrize(
    ("lr", "groups", "message"),
    [
        (0.0, {}, "Trained: lr=0.0 multiplies a learning rate; valid: a finite number above 0"),
        (math.inf, {}, "Trained: lr=inf multiplies a learning rate"),
        (1.0, {"layers.*": -1.0}, r"Trained: groups\['layers\.\*'\]=-1.0 multiplies a learning rate; valid: a finite"),
        (1.0, {"layers.*": math.nan}, r"Trained: groups\['layers\.\*'\]=nan multiplies a learning rate"),
        (1.0, {"head.*": 2.0}, r"network 'student': groups names 'head\.\*', but no trained parameter has this name"),
        (
            1.0,
            {"*.bias": 2.0, "layers.0.*": 3.0},
            r"network 'student': groups names 'layers\.0\.bias' by two patterns, '\*\.bias' and 'layers\.0\.\*'; give "
            "each parameter at most one",
        ),
    ],
)
def test_learning_rates_that_cannot_be_meant_are_refused_by_name(tmp_path, lr, groups, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, Rates(lr, groups))


# --- places of networks ---


def test_spare_networks_are_moved_to_the_cpu_and_the_teacher_to_the_device(monkeypatch):
    moves, to = [], nn.Module.to
    teacher, spare = nn.Linear(1, 1), nn.Linear(1, 1)

    def record(module, *given):
        moves.extend((name, str(*given)) for name, each in (("teacher", teacher), ("spare", spare)) if each is module)
        return to(module, *given)

    monkeypatch.setattr(nn.Module, "to", record)
    Roles(
        FlowMatching(), NoInit(), stage(), torch.device("cpu"), ALONE, ALONE.rows(16, 16),
        seed=0, found=None, sharding=PLAIN, teacher=teacher, blocks=EAGER, spare=[spare],
    )  # fmt: skip
    assert moves == [("spare", "cpu"), ("teacher", "cpu")]
