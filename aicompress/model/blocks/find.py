"""Find the repeated blocks of a model by structure, without a list of architectures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from aicompress.model.loading.definitions.chain import Chain


@dataclass(frozen=True)
class Block:
    """A part of the model that is loaded, run and dropped as one.

    Attributes:
        name: module path, e.g. `model.layers.3`; empty for a whole model.
        module: the module.
    """

    name: str
    module: nn.Module

    def owns(self, module_name: str) -> bool:
        """Whether a module path lies in this block."""
        return not self.name or module_name == self.name or module_name.startswith(f"{self.name}.")


def find_blocks(model: nn.Module) -> list[Block]:
    """Children of the outermost module lists that hold parameters, in definition order; else the whole model.

    The layers of a chain are blocks of their own. Lists inside a block, such as experts, belong to the block. An empty
    place in a list, as Informer has one, is no block.
    """
    if isinstance(model, Chain):
        steps = [Block(name, model.get_submodule(name)) for name in dict.fromkeys(model.names)]
        return [step for step in steps if next(step.module.parameters(), None) is not None]
    blocks: list[Block] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(block.owns(name) for block in blocks):
            continue
        children = [(f"{name}.{index}", child) for index, child in enumerate(module) if child is not None]
        if all(next(child.parameters(), None) is not None and _computes(child) for _, child in children):
            blocks.extend(Block(path, child) for path, child in children)
    return blocks or [Block("", model)]


def _computes(module: nn.Module) -> bool:
    """Whether a module is a step of its own, with layers inside; a list of plain layers, or a list in it, is none."""
    return type(module).forward is not nn.Module.forward and any(True for _ in module.children())
