"""Give a block the same cache of keys and values however often it runs.

Some models make a cache even where none is wanted (XLM), and a block adds to the one that it is given: run again, it
would see its own keys beside those of its first run. So a paused forward pass hands over a copy of its cache, every run
of the block adds to a copy of that, and what the last run has made of it is what the pass goes on with.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

CACHES = "transformers.cache_utils"

_after: WeakKeyDictionary[Cache, Cache] = WeakKeyDictionary()  # by a cache that was handed over: after the last run


def _is_cache(value: Any) -> TypeGuard[Cache]:
    """Whether a value is a cache; a step on a file of tensors has none, and does not wait for transformers."""
    module = sys.modules.get(CACHES)
    return module is not None and isinstance(value, module.Cache)


def copied(value: Any) -> Any:
    """A copy of a cache with the same tensors, which are added to by making new ones; any other value as it is."""
    if not _is_cache(value):
        return value
    return copy.deepcopy(value, {id(tensor): tensor.detach() for tensor in _tensors(value)})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif type(value).__module__ == CACHES:
        yield from _tensors(list(vars(value).values()))


def changing(value: Any) -> Any:
    """What a run of a block is given for a value that was handed over: a cache that it may change."""
    if not _is_cache(value):
        return value
    _after[value] = copied(value)
    return _after[value]


def take_over(own: Any, handed_over: Any) -> None:
    """Make a pass's own cache what the last run of a block has made of the one that was handed over."""
    if _is_cache(own) and handed_over in _after:
        vars(own).update(vars(copied(_after.pop(handed_over))))
