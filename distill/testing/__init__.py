"""Conformance of recipes, ours and others': declare a `Subject`, run `CHECKS` on it.

`exact` has what closed-form checks are made of; `train_together` and `agrees` compare two processes with one;
`recovers` trains on a ring of eight modes.
"""

from distill.testing.conformance import CHECKS, agrees
from distill.testing.pair import train_together
from distill.testing.ring import recovers
from distill.testing.subject import Subject, Training

__all__ = ["CHECKS", "Subject", "Training", "agrees", "recovers", "train_together"]
