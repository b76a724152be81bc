"""Conversion of pickled checkpoints to folders that can be loaded without unpickling."""
