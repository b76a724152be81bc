"""The run spec, its validation, and the lookup of recipes. Does not import torch itself."""
