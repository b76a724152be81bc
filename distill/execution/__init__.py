"""Executing the stages of a run: what is loaded and checked before, and what each of them does."""
