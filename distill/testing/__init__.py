"""Conformance tests for recipes, including your own: declare a `Subject` and run `CHECKS` on it.

The checks: the recipe is built from its defaults; losses are finite in fp32 and bf16; in both, exactly the trained
weights of a turn's network get gradients; all random numbers come from `ctx.draw`; losses do not depend on the
micro-batch; training that is stopped halfway and resumed gives the same bits; the exported student makes the same
samples after loading.

`exact` has building blocks for closed-form checks. `train_together` and `agrees` compare a training with two processes
to one with a single process. `recovers` trains on a ring of eight modes.
"""

from distill.testing.conformance import CHECKS, agrees
from distill.testing.pair import train_together
from distill.testing.ring import recovers
from distill.testing.subject import Subject, Training

__all__ = ["CHECKS", "Subject", "Training", "agrees", "recovers", "train_together"]
