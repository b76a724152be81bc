"""What the waves decide in which a network sees the time, for recipes that learn from derivatives."""

import tempfile
from pathlib import Path

from distill import testing

CASES = [
    ("consistency/scm", {"tangent": "linear", "warm_up": 0.5}),
    ("consistency/scm", {"sigma_data": 2.13, "warm_up": 0.5}),
    ("shortcut/flow_map", {"law": "lagrangian"}),
    ("shortcut/flow_map", {"law": "progressive"}),
    ("shortcut/meanflow", {"diagonal": 0.5, "to_data": 0.1}),
]
TRAINING = testing.Training(307_200, 256, 2e-3)


def bench_waves() -> str:
    """Excess sliced Wasserstein-2 on the ring after 307,200 samples, at 1, 2 and 4 steps, for 16 waves and for 5."""
    lines = []
    for recipe, options in CASES:
        for frequencies in (16, 5):
            subject = testing.Subject(recipe, ring=options, steps=(1, 2, 4), frequencies=frequencies)
            with tempfile.TemporaryDirectory() as folder:
                found = testing.recovers(subject, TRAINING, Path(folder))["student"]
            lines.append(
                f"    {recipe} {options}, {frequencies} waves: " + ", ".join(f"{found[n]:.3f}" for n in (1, 2, 4))
            )
    return "waves\n" + "\n".join(lines)
