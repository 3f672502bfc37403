"""How a recording lies on a disk or behind a URL: header, manifest, shards, merging, repair.

A shard is one trajectory, written to a temporary name, synced and renamed: the unit of resuming.
"""
