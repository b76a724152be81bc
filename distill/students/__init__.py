"""Students: how they start, are sampled, exported and loaded."""
