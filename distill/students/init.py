"""Where a recipe's networks come from: a source's weights, or fresh ones."""

import copy

import torch
from torch import nn

from distill.guard import InputError
from distill.protocols import Cond
from distill.spec import NetworkSpec
from distill.students.networks import build
from distill.students.velocity import VelocityStudent
from distill.teachers.loaded import LoadedTeacher


class StudentInit:
    """Fits `protocols.Init`. `network` given: fresh weights keyed by `seed`; else a copy of the source's.

    `num_classes` and `null_class` are those of the networks it makes: K classes of a fresh one have null class K.
    """

    def __init__(
        self,
        source: LoadedTeacher | None,
        network: NetworkSpec | None,
        shape: tuple[int, ...],
        num_classes: int | None,
        seed: int,
    ) -> None:
        self.source, self.network, self.shape, self.seed = source, network, shape, seed
        self.num_classes: int | None = num_classes
        self.null_class: int | None = num_classes
        if network is not None:
            return
        if source is None or source.network is None:
            given = "no teacher or init is given" if source is None else f"{source.description} has no network"
            raise InputError(f"{given}, so there are no weights to start from; describe a fresh network in `network`")
        self.num_classes, self.null_class = source.num_classes, source.null_class

    def velocity_field(self) -> nn.Module:
        """A trainable VelocityStudent on the linear path; every call gives the same weights."""
        if self.network is not None:
            return VelocityStudent(build(self.network, self.shape, self.num_classes, self.seed))
        assert self.source is not None
        network = copy.deepcopy(self.source.network)
        assert network is not None
        return VelocityStudent(network.requires_grad_(True).train())

    def null(self, cond: Cond) -> Cond:
        """The condition of the unconditional call; an unconditional network's is its only one."""
        if "class_labels" not in cond:
            return cond
        if self.null_class is None:
            raise InputError(
                "the network has no class for the unconditional call; set teacher.null_class, or train without "
                "dropping the condition"
            )
        return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.null_class)}
