"""Find layers whose `weight` an architecture's own code reads, beside calling them.

A reader of packed weights takes the parameter `weight` away. Most architectures never notice; some read it in a forward
of their own (Mamba multiplies by its time projection's weight, T5 asks for a dtype) or as they initialize a model.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from aicompress.model import hf

_ABOUT = {"dtype", "device", "shape"}  # facts of a weight that are known without its values


def reads_weights(model: Any, tensors: Iterable[str]) -> bool:
    """Whether the architecture fails where layers have no parameter `weight`.

    Args:
        model: a transformers model on the meta device; it is of no use afterwards.
        tensors: names in the checkpoint of the weights that would not be there.
    """
    known = model.state_dict()
    targets = [target for target, merge in hf.parameter_names(model, tensors).values() if merge is None]
    paths = [target.removesuffix(".weight") for target in targets if target in known and target.endswith(".weight")]
    layers = [model.get_submodule(path) for path in paths]
    own = any(type(layer) not in (nn.Linear, nn.Embedding) for layer in layers)
    read = _paths(model, {name for kind in _kinds(model) for name in _reads(kind).all})
    return own or not read.isdisjoint(paths) or _fails_to_initialize(model, layers)


def weights_used(model: nn.Module) -> set[str]:
    """Paths of the layers whose weight's values the code of some module reads, not its dtype or device alone."""
    return _paths(model, {name for kind in _kinds(model) for name in _reads(kind).values})


def _kinds(model: nn.Module) -> set[Any]:
    return {type(module) for module in model.modules()}


def _paths(model: nn.Module, names: Collection[str]) -> set[str]:
    return {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names} if names else set()


@dataclass(frozen=True)
class _Reads:
    """Names of the attributes whose `weight` a class reads in its methods, as in `self.wo.weight`."""

    all: frozenset[str] = frozenset()
    values: frozenset[str] = frozenset()


@cache
def _reads(kind: Any) -> _Reads:
    if kind.__module__.startswith("torch."):
        return _Reads()
    tree = _definitions(kind.__module__).get(kind.__qualname__)
    if tree is None:  # made at run time
        return _Reads()
    about = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in _ABOUT}
    about |= {
        id(argument)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ("isinstance", "hasattr")
        for argument in n.args
    }
    attributes = {
        node: node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)
        if isinstance(node.value, ast.Attribute)
    }
    return _Reads(
        frozenset(attributes.values()), frozenset(name for n, name in attributes.items() if id(n) not in about)
    )


@cache
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    """Classes of a module's source by name: a long file that holds a model's many classes is parsed once."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return dict(_classes(tree, ""))


def _classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef):
            yield prefix + inner.name, inner
            yield from _classes(inner, f"{prefix}{inner.name}.")
        elif isinstance(inner, ast.FunctionDef):
            yield from _classes(inner, f"{prefix}{inner.name}.<locals>.")
        elif isinstance(inner, ast.If | ast.Try):
            yield from _classes(inner, prefix)


def _fails_to_initialize(model: Any, layers: list[nn.Module]) -> bool:
    """Whether initializing the model fails without the layers' weights, all else being loaded."""
    for layer in layers:
        layer._parameters.pop("weight", None)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    try:
        model.initialize_weights()
    except AttributeError as error:
        return "weight" in str(error)
    except Exception:  # whatever else an architecture cannot do without memory says nothing of weights
        return False
    return False
