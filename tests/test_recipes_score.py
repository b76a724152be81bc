"""Recipe dmd2 on Gaussians (sheet score 0.4): the gradient of the student is that of the KL divergence."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import softplus

from distill import testing
from distill.flow.draws import generator
from distill.flow.interpolants import like, linear
from distill.protocols import Batch
from distill.testing import exact
from distill.testing.closed_form import class_gaussian_teacher
from recipes.score.dmd2 import Config, Recipe

EYE = torch.eye(3, dtype=torch.float64)
A = torch.tensor([[0.9, 0.2, 0.0], [-0.1, 0.7, 0.3], [0.2, 0.0, 0.5]], dtype=torch.float64)
B = torch.tensor([0.4, -0.5, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0.0, 0.0], [0.3, 1.1, 0.0], [-0.2, 0.1, 0.4]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T  # of the teacher's data
SCORES = {"weight": "kl", "gan_weight": 0.0}


def gaussian(mean, covariance):
    """The velocity of N(mean, covariance) on the linear path: (x_t - E[data | x_t]) / t."""

    def velocity(x_t, t, cond):
        at = like(t, x_t).double()
        alpha, marginal = 1 - at, (1 - at)[:, :, None] ** 2 * covariance + at[:, :, None] ** 2 * EYE
        data = mean + alpha * torch.linalg.solve(marginal, (x_t - alpha * mean)[:, :, None]).squeeze(2) @ covariance
        return (x_t - data) / at

    velocity.interpolant, velocity.t_range = linear(), (0.0, 1.0)
    return velocity


class Generator(nn.Module):
    """u(z, 1, 0) such that the sample is A z + b."""

    interpolant = linear()

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x_t, t, s, cond):
        assert (t == 1).all() and (s == 0).all()
        return x_t - (x_t @ self.a.T + self.b)


def critic(velocity, logit=None):
    """A critic from functions; its logit is 0 by default."""
    zero = (lambda x_t, t: x_t.sum(1) * 0) if logit is None else logit
    return exact.Network(lambda x_t, t, cond: (velocity(x_t, t, cond), zero(x_t, t)))


def turns(made, step=4):
    return {turn.network: turn for turn in made.turns(step, 0)}


def student_turn(student, judge, count, *, t=None, normals=None, **options):
    """The loss of the student's turn, at t alone if it is given."""
    made = Recipe(Config(**options), exact.teacher(gaussian(exact.MEAN, COVARIANCE)))
    context = exact.context(count, uniforms={} if t is None else {"t": (t - 0.02) / 0.96}, normals=normals)
    nets = exact.nets(made, exact.Given(student, judge))
    return turns(made)["student"].loss(nets, exact.batch(count), context)


def standard(count, *names):
    """Noise [count, 3] of each name. Its mean is exactly 0 and the covariance of all together exactly the identity, so
    that means of squares over it are expectations.
    """
    drawn = torch.randn(count, 3 * len(names), generator=generator("standard"), dtype=torch.float64)
    columns = torch.linalg.qr(drawn - drawn.mean(0)).Q * math.sqrt(count)
    return dict(zip(names, columns.split(3, dim=1), strict=True))


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_gradient_is_that_of_the_kl_divergence(t):
    count, alpha = 64, 1 - t
    student, normals = Generator(A, B), standard(64, "noise", "noise_t")
    found = student_turn(student, critic(gaussian(B, A @ A.T)), count, t=t, normals=normals, **SCORES)
    (3 * found.total).backward()  # sum over d
    p_inverse = torch.linalg.inv(alpha**2 * COVARIANCE + t**2 * EYE)
    q_inverse = torch.linalg.inv(alpha**2 * A @ A.T + t**2 * EYE)
    # the sheet's gradient of KL(q_t || p_t) is that of a W of a^2/s^2, which the recipe has
    for found, expected in (
        (student.b.grad, alpha**2 * p_inverse @ (B - exact.MEAN)),
        (student.a.grad, alpha**2 * (p_inverse - q_inverse) @ A),
    ):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", ["kl", "normalised"])
def test_nothing_moves_where_the_laws_agree(weight):
    def gradient(a, b):
        student = Generator(a, b)
        student_turn(student, critic(gaussian(b, a @ a.T)), 512, weight=weight, gan_weight=0.0).total.backward()
        return torch.cat([student.a.grad, student.b.grad[None]]).abs().max()

    assert gradient(ROOT, exact.MEAN) < 1e-10
    assert gradient(A, exact.MEAN) > 1e-3 and gradient(ROOT, B) > 1e-3


def test_the_normaliser_only_scales_each_sample():
    """By 1 / mean |sample - x0_teacher|, a number of its own."""
    latent = torch.randn(64, 3, generator=generator("z"), dtype=torch.float64)
    moves = {}
    for weight in ("kl", "normalised"):
        samples = (latent @ A.T + B).requires_grad_()
        student = exact.Network(lambda x_t, t, s, cond, samples=samples: x_t - samples)
        found = student_turn(student, critic(gaussian(B, A @ A.T)), 64, t=0.4, weight=weight, gan_weight=0.0)
        found.total.backward()
        moves[weight] = samples.grad * 64 * 3
    unit = {weight: nn.functional.normalize(move, dim=1) for weight, move in moves.items()}
    assert torch.allclose(unit["kl"], unit["normalised"], atol=1e-9)
    noise = exact.context(64).draw.normal("noise_t", latent)
    x_t = 0.6 * samples.detach() + 0.4 * noise
    x0 = x_t - 0.4 * gaussian(exact.MEAN, COVARIANCE)(x_t, torch.full((64,), 0.4, dtype=torch.float64), {})
    mean = (samples.detach() - x0).abs().mean(1, keepdim=True)
    assert torch.allclose(moves["kl"] / (0.6 / 0.4) ** 2, moves["normalised"] * mean, rtol=1e-5)


def test_samples_that_equal_the_teachers_prediction_are_not_moved_by_infinity():
    """A teacher of one point predicts the sample itself: the normaliser is zero, and the scores may still differ."""
    samples = torch.zeros(16, 3, dtype=torch.float64, requires_grad=True)
    student = exact.Network(lambda x_t, t, s, cond: x_t - samples)
    made = Recipe(Config(gan_weight=0.0), exact.teacher(exact.Network(lambda x_t, t, cond: x_t / like(t, x_t))))
    judge = critic(lambda x_t, t, cond: x_t / like(t, x_t) - 1e-7)
    found = turns(made)["student"].loss(
        exact.nets(made, exact.Given(student, judge)), exact.batch(16), exact.context(16)
    )
    assert found.total.isfinite() and 0 < found.total < 1


def test_the_adversarial_gradient_goes_through_the_critic_to_the_samples():
    """With the exact logit ln(p_t / q_t), that of softplus(-logit) at the noised samples, times its weight."""

    def logit(x_t, t):
        alpha, at = 1 - t.double()[:, None], t.double()[:, None]
        p, q = (alpha[:, :, None] ** 2 * c + at[:, :, None] ** 2 * EYE for c in (COVARIANCE, A @ A.T))
        log_p, log_q = (
            torch.distributions.MultivariateNormal(alpha * mean, covariance).log_prob(x_t)
            for mean, covariance in ((exact.MEAN, p), (B, q))
        )
        return log_p - log_q

    student, count = Generator(A, B), 256
    judge = critic(gaussian(B, A @ A.T), logit)
    with_gan = student_turn(student, judge, count, t=0.5, weight="kl", gan_weight=0.25)
    with_gan.total.backward()
    grads = [student.b.grad.clone(), student.a.grad.clone()]
    student.zero_grad()
    student_turn(student, judge, count, t=0.5, **SCORES).total.backward()
    noise, fresh = (exact.context(count).draw.normal(n, exact.batch(count).data) for n in ("noise", "noise_t"))
    x_t = 0.5 * (noise @ student.a.T + student.b) + 0.5 * fresh
    (0.25 * softplus(-logit(x_t, torch.full((count,), 0.5))).mean()).backward()
    assert torch.allclose(student.b.grad, grads[0], rtol=1e-5) and torch.allclose(student.a.grad, grads[1], rtol=1e-5)


@pytest.mark.long
def test_the_critic_learns_the_velocity_of_the_samples():
    """Its gradient is zero in the mean at that velocity, and at no other."""

    def gradient(a, b):
        shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        velocity = gaussian(b, a @ a.T)
        judge = critic(lambda x_t, t, cond: velocity(x_t, t, cond) + shift)
        made, count = Recipe(Config(**SCORES), exact.teacher(gaussian(exact.MEAN, COVARIANCE))), 200_000
        nets = exact.nets(made, exact.Given(Generator(A, B), judge))
        turns(made)["critic"].loss(nets, exact.batch(count), exact.context(count)).total.backward()
        return shift.grad.abs().max().item()

    assert gradient(A, B) < 5 * 2 / 3 * 1.5 / math.sqrt(200_000)
    assert gradient(A, exact.MEAN) > 0.1


def test_the_discriminator_is_at_rest_at_the_exact_logit():
    """softplus(logit) on samples, softplus(-logit) on data: minimal at ln(p_t / q_t), here 0, where the laws agree."""
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    judge = critic(gaussian(exact.MEAN, torch.diag(exact.STD**2)), lambda x_t, t: 0 * x_t.sum(1) + shift)
    made, count = Recipe(Config(), exact.teacher(exact.FIELD)), 64
    nets = exact.nets(made, exact.Given(Generator(torch.diag(exact.STD), exact.MEAN), judge))
    found = turns(made)["critic"].loss(nets, exact.batch(count), exact.context(count))
    found.total.backward()
    assert abs(shift.grad.item()) < 1e-12 and found.logs["told_apart"].item() == pytest.approx(2 * math.log(2))


@pytest.mark.long
@pytest.mark.parametrize("steps", [2, 4])
def test_backward_simulation_keeps_the_law_of_an_exact_student(steps):
    """Jumps by the exact flow map and fresh noise have the law of the data at every step, as in sampling."""
    made, count = Recipe(Config(steps=steps), exact.teacher(exact.FIELD)), 100_000
    student, seen = (
        exact.Network(lambda x_t, t, s, cond: seen.add(t[0].item()) or exact.FLOW_MAP(x_t, t, s, cond)),
        set(),
    )
    for step in range(12):
        samples = made.generate({"student": student}, exact.batch(count), exact.context(count, step=step))
        assert torch.allclose(samples.mean(0), exact.MEAN, atol=5 * 1.3 / math.sqrt(count))
        assert torch.allclose(samples.std(0), exact.STD, rtol=0.015)
    assert seen == {1 - k / steps for k in range(steps)}


def test_gradients_flow_through_the_last_step_alone():
    made, marks = Recipe(Config(steps=4), exact.teacher(exact.FIELD)), {}

    def record(x_t, t, s, cond):
        marks[t[0].item()] = nn.Parameter(torch.ones(3, dtype=torch.float64))
        return exact.FLOW_MAP(x_t, t, s, cond) * marks[t[0].item()]

    depths = set()
    for step in range(8):
        marks.clear()
        made.generate({"student": exact.Network(record)}, exact.batch(4), exact.context(4, step=step)).sum().backward()
        reached = [t for t, mark in marks.items() if mark.grad is not None]
        assert reached == [min(marks)]
        depths.add(len(marks))
    assert len(depths) > 1


def test_scores_alone_leave_the_discriminator_alone():
    logit = nn.Parameter(torch.zeros((), dtype=torch.float64))
    judge = critic(gaussian(B, A @ A.T), lambda x_t, t: logit.expand(len(x_t)))
    found = student_turn(Generator(A, B), judge, 16, **SCORES)
    found.total.backward()
    assert logit.grad is None and found.logs == {}
    assert set(student_turn(Generator(A, B), judge, 16).logs) == {"match", "deceived"}


def test_guidance_is_the_teachers():  # oracle C
    means, null, scale = torch.stack([exact.MEAN, -exact.MEAN]), 0.5 * exact.MEAN, 2.5
    labels = torch.arange(512) % 2
    made = Recipe(Config(**SCORES, guidance_scale=scale), class_gaussian_teacher(means, null, exact.STD))
    guided = null + scale * (means - null)

    def gradient(centres):
        moved = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        student = exact.Network(lambda x_t, t, s, cond: x_t - (x_t * exact.STD + centres[cond["class_labels"]] + moved))
        field = exact.GaussianField(centres, exact.STD, conditional=True)
        batch = Batch(exact.batch(512).data, None, {"class_labels": labels})
        nets = exact.nets(made, exact.Given(student, critic(field)))
        turns(made)["student"].loss(nets, batch, exact.context(512)).total.backward()
        return moved.grad.abs().max()

    assert gradient(guided) < 1e-10 and gradient(means) > 1e-6


def test_the_critic_moves_in_every_step_and_the_student_in_some():
    made = Recipe(Config(ratio=3), None)
    assert [[turn.network for turn in made.turns(step, 0)] for step in range(6)] == 2 * [
        ["critic"], ["critic"], ["critic", "student"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gan_weight": 0.0, "critic_gan_weight": 0.1},
            "critic_gan_weight has no effect with gan_weight: 0; remove it",
        ),
        ({"steps": 0}, "greater than 0"),
        ({"ratio": 0}, "greater than 0"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        Config(**options)
    assert message in str(caught.value)


SUBJECTS = [
    testing.Subject(
        "score/dmd2",
        {"ratio": 2},
        ring={"ratio": 5},
        short=testing.Training(100_000),
        long=testing.Training(256_000),
        closed_form=(
            lambda: test_the_gradient_is_that_of_the_kl_divergence(0.5),
            lambda: test_nothing_moves_where_the_laws_agree("normalised"),
            test_the_critic_learns_the_velocity_of_the_samples,
            test_the_discriminator_is_at_rest_at_the_exact_logit,
        ),
    )
]
