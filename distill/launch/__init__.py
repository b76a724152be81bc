"""Starts the processes that compute: on this machine, or as jobs of Slurm."""
