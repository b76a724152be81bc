"""Conformance of recipes, ours and others'."""
