"""What a user should see of the data before a run: how much there is, the first prompts, and what is skipped."""

from dataclasses import dataclass
from pathlib import Path

from distill.core.text import one_line
from distill.data import PromptLoader, loader_of
from distill.data.source import DataSet, NamesSkipped
from distill.spec.model import DataSpec

SHOWN = 3  # prompts
NAMED = 5  # skipped images or prompts


@dataclass(frozen=True)
class DataOverview:
    """An overview of the data of a spec."""

    samples: int
    """number of images, videos, points or latents; 0 for kind prompts"""
    shape: list[int]
    """of one sample; empty for kind prompts"""
    latents: bool
    classes: int | None
    prompts: int | None
    """number of prompts; None: there are none"""
    first_prompts: list[str]
    skipped: int
    skipped_names: list[str]
    """the first that are skipped, and why"""

    @property
    def _unit(self) -> str:
        return "latents" if self.latents else {1: "points", 4: "videos"}.get(len(self.shape), "images")

    def lines(self) -> list[str]:
        """Text for a terminal."""
        counts = []
        if self.samples:
            counts.append(f"{self.samples:,} {self._unit} of {self.shape}")
        if self.classes is not None:
            counts.append(f"{self.classes:,} classes")
        if self.prompts is not None:
            counts.append(f"{self.prompts:,} prompts")
        lines = [f"data: {', '.join(counts)}"]
        lines += [f"  prompt {i}: {one_line(prompt)}" for i, prompt in enumerate(self.first_prompts)]
        if self.skipped:
            more = ", ..." if self.skipped > len(self.skipped_names) else ""
            lines.append(f"  skipped {self.skipped:,}: {', '.join(self.skipped_names)}{more}")
        return lines


def of(spec: DataSpec, data: DataSet | None, store: Path | None) -> DataOverview | None:
    """The overview of loaded data; None if there is none. store: see `data.load_data`."""
    loader = loader_of(spec)
    if isinstance(loader, PromptLoader):
        found = loader.load_prompts(spec, store, indexed=False)
        skipped = found.head.total - len(found.prompts)
        return DataOverview(0, [], False, None, len(found.prompts), found.prompts[:SHOWN], skipped, found.head.skipped)
    if data is None:
        return None
    skipped, names = data.unusable(NAMED) if isinstance(data, NamesSkipped) else (0, [])
    prompts = data.prompts
    return DataOverview(
        samples=len(data),
        shape=list(data.shape),
        latents=data.encoded,
        classes=data.num_classes if prompts is None else None,
        prompts=None if prompts is None else len(prompts),
        first_prompts=[] if prompts is None else prompts[:SHOWN],
        skipped=skipped,
        skipped_names=names,
    )
