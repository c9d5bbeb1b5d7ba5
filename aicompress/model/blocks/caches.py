"""Give a block the same cache of keys and values however often it runs.

Some models make a cache even where none is wanted (XLM), and a block adds to the one that it is given: run again, it
would see its own keys beside those of its first run. So a paused forward pass hands over a copy of its cache, every run
of the block adds to a copy of that, and what the last run has made of it is what the pass goes on with.

Where blocks share keys and values (Gemma 3n, Gemma 4), one leaves them for others in a mapping, beside its output. A
pass hands over a copy of this, too; the block writes into the copy whenever it runs, and the pass goes on with it.
"""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

CACHES = "transformers.cache_utils"

_after: WeakKeyDictionary[Cache, Cache] = WeakKeyDictionary()  # by a cache that was handed over: after the last run


def _is_cache(value: Any) -> TypeGuard[Cache]:
    """Whether a value is a cache; a step on a file of tensors has none, and does not wait for transformers."""
    module = sys.modules.get(CACHES)
    return module is not None and isinstance(value, module.Cache)


def _is_shared(value: Any) -> TypeGuard[UserDict[str, Any]]:
    """Whether a value is what blocks leave keys and values in for others."""
    return isinstance(value, UserDict)


def copied(value: Any) -> Any:
    """A copy of a cache with the same tensors, which are added to by making new ones; any other value as it is."""
    if _is_shared(value):
        return copy.copy(value)
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
    if _is_shared(own):
        own.data = dict(handed_over.data)
    elif _is_cache(own) and handed_over in _after:
        vars(own).update(vars(copied(_after.pop(handed_over))))


def pass_on(handed_over: Iterable[Any], alike: Iterable[Any]) -> None:
    """Let a pass go on with what a block left when it ran for another pass, which had given it the same."""
    for one, other in zip(handed_over, alike, strict=True):
        if _is_shared(one):
            one.data = dict(other.data)
        elif _is_cache(one) and other in _after:
            _after[one] = copied(_after[other])


def left_by(values: Iterable[Any]) -> list[dict[str, Any]]:
    """What is in the mappings among a block's arguments: after it ran, also what it left for others."""
    return [dict(value.data) for value in values if _is_shared(value)]


def leave(values: Iterable[Any], left: Iterable[dict[str, Any]]) -> None:
    """Put into the mappings among a block's arguments what it left there when it ran."""
    for value, data in zip(filter(_is_shared, values), left, strict=True):
        value.data = dict(data)


def mapped(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """A tree of arguments with every tensor changed, those that blocks share among them."""

    def one(value: Any) -> Any:
        if _is_shared(value):
            other = copy.copy(value)
            other.data = mapped(change, value.data)
            return other
        return change(value) if isinstance(value, Tensor) else value

    return tree_map(one, tree)
