"""What a run does: the spec, its checks, the recipes that it names. No tensors."""
