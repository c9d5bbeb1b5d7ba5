"""Checkpoints: read lazily from headers, written streamed and atomically."""

from aicompress.checkpoint.manifest import Entry, Manifest
from aicompress.checkpoint.reader import Checkpoint
from aicompress.checkpoint.writer import CheckpointWriter, ShardPlan, plan_shards

__all__ = ["Checkpoint", "CheckpointWriter", "Entry", "Manifest", "ShardPlan", "plan_shards"]
