"""Runs in a store: their files, the processes that execute them, their events and results. Does not import torch."""
