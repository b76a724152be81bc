"""Pairs (noise, data = ODE(noise)) of a teacher: solved once, stored in shards.

Reading them takes an amount of memory that does not depend on their number.
"""

from distill.pairs.generate import finish, generate, plan, velocity
from distill.pairs.manifest import Manifest
from distill.pairs.mixed import Beside, Mixed
from distill.pairs.read import PairSet, PairSource

__all__ = ["Beside", "Manifest", "Mixed", "PairSet", "PairSource", "finish", "generate", "plan", "velocity"]
