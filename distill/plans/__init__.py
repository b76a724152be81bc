"""Specs made from specs: reflow rounds, comparisons, what a run would do. No tensors."""
