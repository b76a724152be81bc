"""Metrics against closed forms, and a feature network that is the same wherever it is trained."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.data import load_data
from distill.data.arrays import ArrayData
from distill.evaluation.metrics import features as feature_module
from distill.evaluation.metrics.features import prepare
from distill.evaluation.metrics.frechet import frechet, gaussian_frechet
from distill.evaluation.metrics.kernel import kid
from distill.evaluation.metrics.manifold import precision_recall
from distill.evaluation.metrics.wasserstein import sliced_wasserstein
from distill.spec.model import DigitsData


def normal(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_covariance(dim: int, rank: int, seed: int) -> torch.Tensor:
    factor = normal(dim, rank, seed)
    return factor @ factor.T


# --- Frechet ---


def test_frechet_of_commuting_gaussians_is_the_difference_of_means_and_deviations():
    std_x, std_y, mean_x, mean_y = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(normal(6, 6, 1)).Q
    cov_x, cov_y = (rotation @ torch.diag(s.square()) @ rotation.T for s in (std_x, std_y))
    expected = (mean_x - mean_y).square().sum() + (std_x - std_y).square().sum()
    assert gaussian_frechet(mean_x, cov_x, mean_y, cov_y) == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_of_gaussians_that_do_not_commute_agrees_with_the_spectrum_of_the_product():
    cov_x, cov_y, zero = random_covariance(5, 9, 0), random_covariance(5, 9, 1), torch.zeros(5, dtype=torch.float64)
    root_trace = torch.linalg.eigvals(cov_x @ cov_y).sqrt().sum().real
    expected = cov_x.trace() + cov_y.trace() - 2 * root_trace
    assert gaussian_frechet(zero, cov_x, zero, cov_y) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_of_singular_covariances_and_shifts():
    x = normal(400, 3, 0) @ normal(3, 8, 1)  # rank 3 of 8
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    shift = torch.arange(8, dtype=torch.float64) / 8
    assert frechet(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert frechet(x, 3 * x) == pytest.approx(
        (2 * x.mean(0)).square().sum().item() + 4 * x.var(0).sum().item(), rel=1e-6
    )


def test_frechet_in_float32_far_from_the_origin_keeps_its_digits():
    x = normal(2000, 4, 0).float() + 1000
    assert frechet(x, x + 0.5) == pytest.approx(1.0, rel=1e-3)


def test_frechet_of_samples_converges_to_the_closed_form():
    value = frechet(normal(20_000, 4, 0), 2 * normal(20_000, 4, 1) + 1)
    assert value == pytest.approx(4 * (1 + 1), rel=0.02)


def test_frechet_needs_two_rows():
    with pytest.raises(ValueError, match=r"features must be \[N >= 2, D\], got \[1, 3\]"):
        frechet(torch.zeros(1, 3), torch.zeros(4, 3))


# --- KID ---


def test_kid_is_the_double_sum_without_the_diagonal():
    x, y = normal(5, 3, 0), normal(4, 3, 1)

    def mean(a: torch.Tensor, b: torch.Tensor, skip_diagonal: bool) -> float:
        values = [
            (float(a[i] @ b[j]) / 3 + 1) ** 3
            for i in range(len(a))
            for j in range(len(b))
            if not (skip_diagonal and i == j)
        ]
        return sum(values) / len(values)

    assert kid(x, y) == pytest.approx(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False), rel=1e-12)


def test_kid_has_expectation_zero_for_equal_laws_and_not_for_others():
    same = torch.tensor([kid(normal(60, 4, 2 * s), normal(80, 4, 2 * s + 1)) for s in range(200)])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(200)
    assert same.min() < 0, "unbiased, hence negative at times"
    assert kid(normal(500, 4, 0), normal(500, 4, 1) + 1) > 10 * same.std()


# --- precision and recall ---


def test_precision_and_recall_tell_fidelity_from_coverage():
    real = torch.cat([normal(300, 2, 0), normal(300, 2, 1) + 100])[torch.randperm(600)]
    one_mode = normal(600, 2, 2)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    precision, recall = precision_recall(one_mode, real)
    assert precision == pytest.approx(0.5, abs=0.05)
    assert recall > 0.9
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_precision_of_a_known_neighbourhood():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])  # 3rd neighbours at 3, 2, 2, 3, 9
    generated = torch.tensor([[5.9], [6.1], [-3.1], [0.5], [-50.0]])  # in 10's ball, 10's ball, none, all, none
    assert precision_recall(real, generated, k=3)[0] == pytest.approx(3 / 5)


def test_precision_needs_more_samples_than_neighbours():
    with pytest.raises(ValueError, match="k = 3 need more than 3 samples, got 3"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))


# --- sliced Wasserstein ---


def test_sliced_wasserstein_of_a_shift_and_of_itself():
    x = normal(500, 1, 0)
    assert sliced_wasserstein(x, x + 0.7) == pytest.approx(0.7, rel=1e-9)
    assert sliced_wasserstein(x, 3 * x) == pytest.approx(2 * x.square().mean().sqrt().item(), rel=1e-9)
    y = normal(400, 2, 1)
    assert sliced_wasserstein(y, y) == 0
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)  # E (theta . m)^2 = |m|^2 / d
    assert sliced_wasserstein(y, y + shift) == pytest.approx(5 / math.sqrt(2), rel=0.1)
    assert sliced_wasserstein(y, y + shift) == sliced_wasserstein(y, y + shift), "same directions every time"


# --- features ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Features of a short training."""
    data = load_data(DigitsData(kind="digits"), 0)
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_module, "TRAIN_IMAGES", 6_400)
        return data, folder, prepare(data, folder)


@pytest.mark.long
def test_digits_classifier_knows_its_digits(digits, tmp_path):
    assert prepare(digits[0], tmp_path).accuracy > 0.97


def test_features_are_those_of_a_classifier_of_digits(digits):
    data, _, features = digits
    assert features.name == "FD-digits"
    assert features.task == "classes"
    assert features.accuracy > 0.85
    assert features.reference.shape == (len(data), 64)
    images, _, _ = data.items(0, list(range(len(data))))
    torch.testing.assert_close(features(images).sum(0), features.reference.sum(0))


def test_features_order_images_by_damage(digits):
    data, _, features = digits
    images, _, _ = data.items(0, list(range(len(data))))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet(features(images + amount * noise), features.reference) for amount in (0, 0.1, 0.3, 1.0)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[-1] > 100 * distances[1]


def test_features_are_read_back(digits):
    data, folder, features = digits
    again = prepare(data, folder)
    assert torch.equal(again.reference, features.reference)
    assert again.accuracy == features.accuracy
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["half", "shape", "nan", "accuracy", "fifo", "none"])
def test_features_that_are_damaged_are_trained_again(digits, tmp_path, monkeypatch, capfd, damage):
    monkeypatch.setattr(feature_module, "TRAIN_IMAGES", 256)
    first = prepare(digits[0], tmp_path)
    (path,) = tmp_path.iterdir()
    tensors = load_file(path)
    match damage:
        case "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "shape":
            save_file({**tensors, "reference": tensors["reference"][1:].clone()}, path, {"accuracy": "0.5"})
        case "nan":
            save_file({**tensors, "head.bias": tensors["head.bias"] * torch.nan}, path, {"accuracy": "0.5"})
        case "accuracy":
            save_file(tensors, path, {"accuracy": "1.5"})
        case "fifo":
            path.unlink()
            os.mkfifo(path)
        case "none":
            save_file(tensors, path)
    again = prepare(digits[0], tmp_path)
    assert torch.equal(again.reference, first.reference) and again.accuracy == first.accuracy
    assert capfd.readouterr().err == f"warning: {path} is damaged; its feature network is trained again\n"
    assert torch.equal(load_file(path)["reference"], first.reference)


def test_features_are_trained_the_same_again_whatever_the_global_random_state(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_module, "TRAIN_IMAGES", 1280)
    first = prepare(digits[0], tmp_path / "one")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = prepare(digits[0], tmp_path / "two")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.reference, second.reference)
    assert first.accuracy == second.accuracy


def test_few_large_images_are_read_at_once(tmp_path, monkeypatch):
    read = []

    class Listed(ArrayData):
        def items(self, epoch, indices):
            read.append(len(indices))
            return super().items(epoch, indices)

    monkeypatch.setattr(feature_module, "TRAIN_IMAGES", 128)
    monkeypatch.setattr(feature_module, "CHUNK_BYTES", 5 * 4 * 3 * 16 * 16)
    data = Listed("large", torch.zeros(60, 3, 16, 16), torch.arange(60) % 2, 2)
    assert prepare(data, tmp_path)(torch.zeros(7, 3, 16, 16)).shape == (7, 64)
    assert read == [54, 5, 1] + 12 * [5], "one batch of training, the six images that are held out, and then all"
    monkeypatch.undo()
    shapes = [(1, 8, 8), (3, 256, 256), (3, 1024, 1024), (3, 20_000, 20_000)]
    assert [feature_module._chunk(each) for each in shapes] == [512, 512, 42, 1]


@pytest.mark.long
@pytest.mark.parametrize("classes", [None, 1])
def test_images_without_several_classes_are_told_apart_by_rotation(digits, tmp_path, monkeypatch, classes):
    monkeypatch.setattr(feature_module, "TRAIN_IMAGES", 12_800)
    labelled = digits[0]
    images, _, _ = labelled.items(0, range(len(labelled)))
    unlabelled = ArrayData("plain", images, torch.zeros(len(images), dtype=torch.int64) if classes else None, classes)
    features = prepare(unlabelled, tmp_path)
    assert (features.name, features.task) == ("FD-plain", "rotations")
    assert features.accuracy > 0.85  # of four; chance is 0.25
    torch.testing.assert_close(features(images).sum(0), features.reference.sum(0))
