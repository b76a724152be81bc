"""Sets of items in files (shards): made by several processes, verified, and read with a few files open at a time."""

from distill.shards.making import make, make_folder, remove_records
from distill.shards.manifest import SetKind, SetManifest, ShardEntry
from distill.shards.mapped import LatestShards
from distill.shards.order import ShardOrder

__all__ = [
    "LatestShards",
    "SetKind",
    "SetManifest",
    "ShardEntry",
    "ShardOrder",
    "make",
    "make_folder",
    "remove_records",
]
