"""Makes specs from specs (reflow rounds, comparisons) and describes what a run would do. Does not import torch."""
