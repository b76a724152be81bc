"""Starts the compute plane: as processes of this machine."""
