"""The recipes, one file each. They are found by name, e.g. `reflow/reflow`; the training loop does not import them."""
