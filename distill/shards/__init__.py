"""Sets of items in files (shards): made by several processes, verified, and read with a few files open at a time."""

from distill.shards.making import make, remove_records
from distill.shards.manifest import SetKind, SetManifest, ShardEntry
from distill.shards.mapped import LatestShards
from distill.shards.order import ShardOrder

__all__ = ["SetKind", "LatestShards", "SetManifest", "ShardEntry", "ShardOrder", "make", "remove_records"]
