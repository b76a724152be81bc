"""Makes specs from specs (reflow rounds, comparisons) and describes what a run would do. No tensors are created."""
