"""What a run is to do: the spec, its checks, the recipes that it names. No tensors."""
