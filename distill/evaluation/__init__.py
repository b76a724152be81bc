"""Measuring teachers and students: samples, metrics, pictures, the report."""
