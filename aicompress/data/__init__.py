"""Samples for calibration, training and evaluation, from the source that a recipe's data section names.

Every reader returns the samples and a `SampleSource`, their record for the report. A tokenizer is passed in:
anything that is called and answers as a Hugging Face tokenizer does.
"""

from aicompress.data.arrays import arrays, named_arrays
from aicompress.data.check import problems
from aicompress.data.drawn import drawn_windows
from aicompress.data.sampling import SampleSource, choose, digest, split
from aicompress.data.section import Data
from aicompress.data.text import batches, labelled, pairs, sentences, targets
from aicompress.data.tokens import Tokenizer, token_stream, token_windows

__all__ = [
    "Data",
    "SampleSource",
    "Tokenizer",
    "arrays",
    "batches",
    "choose",
    "digest",
    "drawn_windows",
    "labelled",
    "named_arrays",
    "pairs",
    "problems",
    "sentences",
    "split",
    "targets",
    "token_stream",
    "token_windows",
]
