"""Sets of items in files (shards), which several processes make and any number of processes read."""
