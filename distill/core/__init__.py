"""Helpers that all other packages use: errors, text, files, records. Does not import torch."""
