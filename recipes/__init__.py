"""The objectives: one file each, found by name (`reflow/reflow`), never imported by the engine."""
