"""The checkerboard: its law, the histogram KL against closed forms, the network that sees times as they are."""

import math

import numpy as np
import pytest
import torch
from commands import command

from distill import data
from distill.data import DataSource
from distill.data.checkerboard import COUNT, draw
from distill.data.source import Drawable
from distill.evaluation.metrics import reference
from distill.evaluation.metrics.histogram import ADDED, divergence, histogram, histogram_kl
from distill.flow.draws import Rows, key
from distill.networks.flow_map_mlp import FlowMapMLP
from distill.networks.velocity_mlp import VelocityMLP
from distill.runs.results import describe, load_results
from distill.runs.run_store import RunPaths
from distill.spec.model import CheckerboardData

POINTS, WITHIN = 50_000, 800  # samples of an evaluation, and the bins that the law reaches: 8 squares of 10 x 10


def board(seed: int = 0) -> data.DataSet:
    found = data.load_data(CheckerboardData(kind="checkerboard"), seed)
    assert found is not None
    return found


def exact() -> torch.Tensor:
    """The probability of each bin: a square has 10 x 10 bins, and the board begins at the sixth one."""
    squares = torch.tensor([[(column + row) % 2 == 0 for row in range(4)] for column in range(4)]).double()
    whole = torch.zeros(50, 50, dtype=torch.float64)
    whole[5:45, 5:45] = squares.repeat_interleave(10, 0).repeat_interleave(10, 1) / WITHIN
    return whole


# --- the data ---


def test_samples_are_uniform_on_the_squares_of_one_colour():
    points = board().items(0, range(COUNT)).samples
    assert (points.dtype, tuple(points.shape)) == (torch.float32, (COUNT, 2))
    places = (points + 2).floor().long()
    assert bool(((places >= 0) & (places < 4) & (places.sum(1, keepdim=True) % 2 == 0)).all())
    counts = torch.bincount(places[:, 0] * 4 + places[:, 1], minlength=16).double()
    expected = COUNT / 8
    assert ((counts[counts > 0] - expected).square() / expected).sum() < 24.3, "chi-squared of 7 degrees, p = 0.001"
    inside = points + 2 - places
    # uniform on [0, 1): mean 1/2, variance 1/12, and no correlation of the coordinates; 4 standard errors
    assert torch.allclose(inside.mean(0), torch.tensor(0.5), atol=4 * math.sqrt(1 / 12 / COUNT))
    assert torch.allclose(inside.T.cov(), torch.eye(2) / 12, atol=4 / 12 / math.sqrt(COUNT))
    # each coordinate is uniform on [-2, 2); E xy = 1/4, the mean over the centres of the squares
    assert points.mean(0).abs().max() < 4 * math.sqrt(4 / 3 / COUNT)
    assert points.prod(1).mean().item() == pytest.approx(1 / 4, abs=4 * 4 / 3 / math.sqrt(COUNT))


def test_a_sample_depends_on_seed_epoch_and_number_only():
    first = board(3).items(5, [7, 100, 0]).samples
    assert torch.equal(first, board(3).items(5, [7, 100, 0, 2]).samples[:3])
    other = [board(4).items(5, [7, 100, 0]).samples, board(3).items(6, [7, 100, 0]).samples]
    assert not any(bool((first == each).any()) for each in other)
    assert torch.equal(draw(9, 10), draw(9, 1000)[:10])
    assert board(3).digest == board(3).digest != board(4).digest


def test_a_stream_never_repeats_a_sample():
    source = DataSource(board(), 40_000, 0)
    parts = [source.batch(step, Rows(0, 40_000, 40_000)).data for step in range(4)]
    assert len(torch.cat(parts).unique(dim=0)) == 160_000
    assert torch.equal(source.batch(1, Rows(100, 200, 40_000)).data, parts[1][100:200])


# --- the histogram KL ---


def test_the_histogram_is_that_of_numpy():
    points = 1.3 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges = np.linspace(-2.5, 2.5, 51)
    counts, _, _ = np.histogram2d(*points.T.numpy(), bins=[edges, edges])
    assert torch.equal(histogram(points), torch.from_numpy(counts / counts.sum()))


def test_the_divergence_of_known_laws_is_their_closed_form():
    p, everywhere = exact(), torch.full((50, 50), 1 / 2500, dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1) and divergence(p, p) == 0
    other = (exact().flip(0) + exact()) / 2  # all 16 squares
    half = torch.where(torch.arange(50)[:, None] < 25, 2 * p, 0.0)
    small = 2500 * ADDED * math.log(1 / ADDED)  # what is added changes the sum by less than this
    for q, known in (
        (everywhere, math.log(2500 / WITHIN)),
        (other, math.log(2)),
        (half, math.log(1 / 2) / 2 + math.log(1 / WITHIN / ADDED) / 2),
        (torch.zeros(50, 50), math.log(1 / WITHIN / ADDED)),
    ):
        assert divergence(p, q) == pytest.approx(known, abs=small)
    # in the other direction, the mass beside the squares would count with ln(q / 1e-8)
    assert divergence(other, p) == pytest.approx(math.log(1 / 2) / 2 + math.log(1 / 2 / WITHIN / ADDED) / 2, abs=small)


def test_exact_samples_have_the_bias_of_finite_samples():
    """2 N KL(sample || law) is about chi-squared of K - 1 degrees; between two sets, the bias is twice as large."""
    sets = [draw(key("set", number), POINTS) for number in range(8)]
    bias = (WITHIN - 1) / (2 * POINTS)
    error = math.sqrt(2 * (WITHIN - 1)) / (2 * POINTS)  # standard deviation of one set
    for each in sets:
        assert divergence(histogram(each), exact()) == pytest.approx(bias, abs=4 * error)
        assert divergence(exact(), histogram(each)) == pytest.approx(bias, rel=0.03, abs=4 * error)
    pairs = [histogram_kl(x, y) for x, y in zip(sets[::2], sets[1::2], strict=True)]
    assert sum(pairs) / len(pairs) == pytest.approx(2 * bias, rel=0.03, abs=4 * error)


def test_points_outside_of_the_square_do_not_count():
    points = draw(0, POINTS)
    far = torch.tensor([[2.5, 0.0], [0.0, -2.51], [1e9, math.inf], [-math.inf, 0.0]])
    assert torch.equal(histogram(torch.cat([points, far])), histogram(points))
    assert histogram_kl(points, far) == histogram_kl(points, far[:1]) > 11


def test_it_refuses_other_vectors():
    with pytest.raises(ValueError, match=r"points must be \[N, 2\], got \[4, 3\]"):
        histogram(torch.zeros(4, 3))


def test_the_reference_is_independent_of_the_data_and_its_floor_is_known():
    found = board()
    assert isinstance(found, Drawable)
    made = reference.of_law(found, POINTS, 0)
    assert made.floor == pytest.approx((WITHIN - 1) / POINTS, rel=0.05)
    sums = made.sums.like()
    for part in draw(1, POINTS).split(5000):
        sums.add(made.embed(part))
    near = made.measure(sums)
    assert near["distance"] == pytest.approx(made.floor, rel=0.1)
    assert near["precision"] > 0.95 and near["recall"] > 0.95


# --- the network ---


def test_without_frequencies_the_network_is_an_mlp_of_x_and_the_times():
    """The published one is an MLP of (x, s, t): ours sees t and t - s, which is the same family of functions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FlowMapMLP(dim=2, width=16, depth=2, frequencies=0).double()
        torch.nn.init.normal_(network.gap.weight)
        x, t, s = torch.randn(7, 2).double(), torch.rand(7), torch.rand(7)
    first, gap = network.layers[0], network.gap.weight
    weight = torch.cat([first.weight[:, :2], first.weight[:, 2:] + gap, -gap], 1)  # of x, t, s
    hidden = torch.cat([x, t[:, None], s[:, None]], 1).double() @ weight.T + first.bias + network.gap.bias
    assert torch.allclose(network(x, 1000 * t, 1000 * s).sample, network.layers[1:](hidden), atol=1e-6)
    assert sum(each.numel() for each in VelocityMLP(dim=2, width=16, depth=2, frequencies=0).parameters()) == (
        (3 * 16 + 16) + (16 * 16 + 16) + (16 * 2 + 2)
    )


# --- as a spec ---

FIELDS = ["--store", "runs", "--name", "one", "launch.threads=1", "stages.evaluate.baselines=[]"]


@pytest.mark.train
def test_an_evaluation_measures_the_histogram_kl(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        """
name: small
data: {kind: checkerboard}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: mlp, width: 16, depth: 2, frequencies: 0}
    images: 128
    batch_size: 64
  pdd:
    kind: train
    recipe: shortcut/pdd
    options: {intervals: 64, shortest: 4}
    teacher: teach
    images: 128
    batch_size: 64
  evaluate:
    kind: evaluate
    teacher: teach
    teacher_steps: [1]
    fine_steps: 2
    students: {pdd: [1, 2, 4, 8, 16]}
    samples: 2000
    block: 1000
"""
    )
    done = command(capfd, "run", "small.yaml", *FIELDS)
    assert done.code == 0, done.err
    found = load_results(RunPaths(tmp_path / "runs" / "one").stage("evaluate"))
    assert (found.distance, found.reference, found.vector, found.features) == ("histogram KL", 2000, True, None)
    assert [row.steps for row in found.rows if row.network == "pdd"] == [1, 2, 4, 8, 16]
    assert "histogram KL: KL divergence from the histogram of 2,000 exact samples" in describe(found)
    assert all(row.distance > found.floor > 0 for row in found.rows)


def test_what_points_are_not(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for change, said in (
        (
            "stages.teach.network={kind: unet, channels: [8]}",
            "stages.teach.network: a unet is for images, but data of kind checkerboard has points in the plane; use "
            "kind: mlp",
        ),
        (
            "teacher={kind: gaussian, mean: [0, 0], std: [1, 1]}",
            "data: kind checkerboard has points in the plane, the gaussian teacher makes vectors of 2; use data: "
            "{kind: none} or another teacher",
        ),
    ):
        done = command(capfd, "plan", "checkerboard", change)
        assert done.code == 2 and said in done.err, done.err
