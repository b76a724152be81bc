"""Runs in a store: where their files lie, who executes them, what they note and have measured. No tensors."""
