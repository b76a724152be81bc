"""The run spec, its validation, and the lookup of recipes. No tensors are created."""
