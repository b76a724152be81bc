"""Distances between sample sets, and the features some of them need."""
