"""Execution of the stages of a run: checks and estimates before it starts, and the work of each stage."""
