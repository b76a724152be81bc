"""Starts the processes that compute stages: on this machine or as Slurm jobs."""
