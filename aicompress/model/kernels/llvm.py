"""What functions compiled by numba share that are made of single instructions. Import it only where numba is installed.

numba's cache knows a function by the file that it is in, and not by those that it takes instructions from: after a
change here its cached functions have to be deleted (`__pycache__/*.nb?`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

INT64 = ir.IntType(64)


def instruction(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An instruction of the processor, by LLVM's name of it."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """A pointer to `kind`, some bytes behind an address."""
    return builder.inttoptr(builder.add(address, INT64(offset)), kind.as_pointer())


def _claim(typing: Any, task: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], INT64(1), "monotonic")

    return types.int64(types.CPointer(types.int64)), emit


claimed = intrinsic(_claim)
"""The first number of a task, which is raised by one for the next thread that asks."""


def cached(compiler: Any, function: Any, **options: Any) -> Any:
    """Compile a function, or take it from numba's cache, where that has a folder."""
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:
        return compiler(**options)(function)
