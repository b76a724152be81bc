"""Distances between sets of samples, and the features that some of them need."""
