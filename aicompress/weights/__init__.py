"""Stored forms of a weight: what a method returns and what a checkpoint holds.

A form is one file in `stored/`: a frozen dataclass that says all about the weight (`form.Weight`), and the decoder that
checkpoints carry (`decoding`). Forms are found by discovery. Tensors may live on torch's meta device: an *outline* has
the exact dtypes and shapes that the real weight will be stored with, and no data. Plans and dry runs are made of
outlines.
"""

from aicompress.weights.form import Symbols, TensorSpec, Weight, form_of, forms, outline_nbytes, restore
from aicompress.weights.stored.base_delta import BaseDelta
from aicompress.weights.stored.codebook import Codebook
from aicompress.weights.stored.column_scaled import ColumnScaled
from aicompress.weights.stored.convolutions import Convolutions
from aicompress.weights.stored.corrected import Corrected
from aicompress.weights.stored.dense import Dense
from aicompress.weights.stored.entropy import EntropyCoded, entropy_coded, fixed_width
from aicompress.weights.stored.float8 import Float8
from aicompress.weights.stored.int_grouped import Coded, IntGrouped
from aicompress.weights.stored.low_rank import LowRank
from aicompress.weights.stored.masked import Masked
from aicompress.weights.stored.per_expert import PerExpert
from aicompress.weights.stored.sparse import Sparse
from aicompress.weights.stored.sparse_codes import SparseCodes
from aicompress.weights.stored.submatrix import Submatrix
from aicompress.weights.stored.tied import Tied
from aicompress.weights.stored.trellis import Trellis

__all__ = [
    "BaseDelta",
    "Codebook",
    "Coded",
    "ColumnScaled",
    "Convolutions",
    "Corrected",
    "Dense",
    "EntropyCoded",
    "Float8",
    "IntGrouped",
    "LowRank",
    "Masked",
    "PerExpert",
    "Sparse",
    "SparseCodes",
    "Submatrix",
    "Symbols",
    "TensorSpec",
    "Tied",
    "Trellis",
    "Weight",
    "entropy_coded",
    "fixed_width",
    "form_of",
    "forms",
    "outline_nbytes",
    "restore",
]
