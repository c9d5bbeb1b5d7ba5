"""Stored forms of a weight: what a method returns and what a checkpoint holds. Encode and decode live together.

Each form is a frozen dataclass with `tensors()`, `meta()`, `dense()` and `restore()`. Tensors may live on torch's meta
device: an *outline* has the exact dtypes and shapes that the real weight will be stored with, and no data. Plans and
dry runs are made of outlines.
"""

from aicompress.weights.codebook import Codebook
from aicompress.weights.column_scaled import ColumnScaled
from aicompress.weights.corrected import Corrected
from aicompress.weights.dense import Dense
from aicompress.weights.form import TensorSpec, Weight, form_of, outline_nbytes, restore
from aicompress.weights.int_grouped import IntGrouped
from aicompress.weights.low_rank import LowRank
from aicompress.weights.sparse import Sparse
from aicompress.weights.sparse_codes import SparseCodes

__all__ = [
    "Codebook",
    "ColumnScaled",
    "Corrected",
    "Dense",
    "IntGrouped",
    "LowRank",
    "Sparse",
    "SparseCodes",
    "TensorSpec",
    "Weight",
    "form_of",
    "outline_nbytes",
    "restore",
]
