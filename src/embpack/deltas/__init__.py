"""Rows of tables that changed, as files have them: Parquet, .npz, pairs of .npy, TorchEasyRec's dumps."""

from embpack.deltas.base import INT8_PARAM_BYTES, ColumnNames, Delta, Keys, Rows
from embpack.deltas.last_writes import LastWrites
from embpack.deltas.opening import open_deltas

__all__ = ["INT8_PARAM_BYTES", "ColumnNames", "Delta", "Keys", "LastWrites", "Rows", "open_deltas"]
