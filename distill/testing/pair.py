"""Two ranks that train recipes in turn: `python -m distill.testing.pair FOLDER`, started by `train_together`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from distill.launch import local
from distill.testing.subject import Subject
from distill.testing.training import train
from distill.training.world import World
from distill.training.zero import Zero

GIVEN, FOUND = "subjects.json", "numbers.json"
Numbers = dict[str, list[dict[str, float]]]  # recipe -> the logged numbers of each step


def train_together(subjects: Sequence[Subject], folder: Path, *, zero_stage: int | None = None) -> Numbers:
    """Train all subjects with two processes; returns their logged numbers.

    zero_stage: the DeepSpeed ZeRO stage (3 shards all weights); None: no DeepSpeed. folder: for input, output and logs.
    """
    given = [
        {"recipe": s.recipe, "options": dict(s.options), "times": s.times, "base": str(s.base.absolute())}
        for s in subjects
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GIVEN).write_text(json.dumps({"zero_stage": zero_stage, "subjects": given}))
    code = local.run_ranks(folder, "distill.testing.pair", str(folder), size=2)
    assert code == 0, f"the pair ended with code {code}; its logs are in {folder}"
    return json.loads((folder / FOUND).read_text())


def main(folder: Path, lifeline: int) -> None:
    local.watch(lifeline)
    given = json.loads((folder / GIVEN).read_text())
    torch.set_num_threads(1)
    world = World.join(torch.device("cpu"), 2.0, 0, lambda message: None)
    sharding, found = Zero(given["zero_stage"], persistence_threshold=0), Numbers()
    for number, each in enumerate(given["subjects"]):
        subject = Subject(each["recipe"], each["options"], times=tuple(each["times"]), base=Path(each["base"]))
        _, found[subject.recipe] = train(subject, folder / str(number), world=world, sharding=sharding)
    if world.first:
        (folder / FOUND).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # as all ranks end: threads of gloo can abort a normal interpreter exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[3]))
