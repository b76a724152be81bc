"""Sharing of students: model cards, checks of untrusted files, publishing and pulling. Does not import torch."""
