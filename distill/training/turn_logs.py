"""What a turn logs. It is read one step late, so that training does not wait for the device."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.errors import RunError
from distill.protocols import Loss
from distill.training.world import World


@dataclass(frozen=True)
class TurnLogs:
    """The logged values of a turn: the means over the micro-batches of all ranks.

    network: that was trained. place: the step, the turn and the network, in words. values: [K] on the CPU, valid once
    the copy from a GPU is `done`; None: they are valid.
    """

    network: str
    place: str
    names: Sequence[str]
    values: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, network: str, place: str, losses: Sequence[Loss], norm: Tensor, world: World) -> "TurnLogs":
        """Of the losses of the micro-batches and the norm of the gradients. Begins to copy them; call on every rank."""
        sums: dict[str, Tensor] = {}
        for loss in losses:
            for name, value in {"loss": loss.total, **loss.logs}.items():
                share = value.detach().float().to(norm.device) / len(losses)
                sums[name] = sums[name] + share if name in sums else share
        sums["grad_norm"] = norm.detach().float()
        means = world.mean(torch.stack(list(sums.values())))
        if means.device.type != "cuda":
            return cls(network, place, list(sums), means, None)
        values = torch.empty(len(sums), pin_memory=True)
        values.copy_(means, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(means.device))
        return cls(network, place, list(sums), values, done)

    def read(self, last_good: Callable[[], object]) -> dict[str, float]:
        """The values by name. RunError if the loss or the norm of the gradients is not finite.

        last_good: returns the newest checkpoint, for the message.
        """
        if self.done is not None:
            self.done.synchronize()
        found = dict(zip(self.names, self.values.tolist(), strict=True))
        if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
            raise RunError(
                f"{self.place}: non-finite loss ({found['loss']}) or gradient norm ({found['grad_norm']}); no weights "
                f"were saved after it. Last good checkpoint: {last_good()}; lower the learning rate, or use "
                "precision: fp32"
            )
        return found


def read(turns: Iterable[TurnLogs], last_good: Callable[[], object]) -> dict[str, float]:
    """The values of a step: NAME for the student's, NETWORK.NAME for those of other networks.

    RunError as `TurnLogs.read`.
    """
    found: dict[str, float] = {}
    for turn in turns:
        prefix = "" if turn.network == "student" else f"{turn.network}."
        found.update({f"{prefix}{name}": value for name, value in turn.read(last_good).items()})
    return found
