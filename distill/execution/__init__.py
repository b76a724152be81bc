"""Stages of a run, computed: what is loaded and checked before, and what each of them does."""
