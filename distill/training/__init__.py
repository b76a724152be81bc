"""Training: the loop, the networks and their roles, sharding, checkpoints, distributed processes."""
