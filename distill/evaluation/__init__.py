"""Evaluation of teachers and students: samples, metrics, pictures, the report."""
