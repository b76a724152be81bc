"""Training: the loop, networks in their roles, sharding, checkpoints, processes that train together."""
