"""Gradients that are averaged while the backward pass computes others, on two processes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing, nn

from distill.training import averaging
from distill.training.world import World

pytestmark = pytest.mark.process
WIDTH = 4


def network() -> nn.Sequential:
    """Four layers, without biases; the third and the last are used on some ranks only."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))


def loss(layers: nn.Sequential, rank: int, micro: int) -> torch.Tensor:
    x = torch.full((2, WIDTH), 1.0 + rank + 10 * micro)
    used = [0, 1] if (rank, micro) == (0, 1) else [0, 1, 2]  # rank 0 reaches the third layer in its first pass only
    for number in used:
        x = torch.tanh(layers[number](x))
    return x.square().sum()


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    averaging.SENT = WIDTH * WIDTH  # one bucket for each layer
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    layers = network()
    ours = averaging.Averaging(list(layers.parameters()), World(rank, 2))
    for step in range(2):
        ours.begin()
        loss(layers, rank, 0).backward()
        assert not ours._works
        ours.expect()
        loss(layers, rank, 1).backward()
        ours.send_rest()
        assert len(ours._works) == 4
        ours.wait()
        save_file({name: p.grad for name, p in layers.named_parameters()}, f"{folder}/{rank}-{step}.safetensors")
        layers.zero_grad(set_to_none=True)
    distributed.destroy_process_group()


def test_gradients_are_the_mean_even_if_a_rank_does_not_compute_all(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=2)
    layers = network()
    (sum(loss(layers, rank, micro) for rank in range(2) for micro in range(2)) / 2).backward()
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layers.named_parameters()}
    for step in range(2):
        for rank in range(2):
            torch.testing.assert_close(
                load_file(tmp_path / f"{rank}-{step}.safetensors"), expected, rtol=1e-6, atol=1e-6
            )


def on_rank_with_all(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    averaging.SENT = WIDTH * WIDTH
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    layers = network()
    ours = averaging.Averaging(list(layers.parameters()), World(rank, 2))
    ours.begin()
    ours.expect()
    sent = []
    layers[0].register_full_backward_pre_hook(lambda *_: sent.append(len(ours._works)))
    layers(torch.ones(2, WIDTH, requires_grad=True)).sum().backward()
    assert sent == [3], sent
    ours.send_rest()
    ours.wait()
    distributed.destroy_process_group()


def test_the_last_layers_are_sent_while_the_first_ones_are_computed(tmp_path):
    multiprocessing.spawn(on_rank_with_all, (str(tmp_path),), nprocs=2)
