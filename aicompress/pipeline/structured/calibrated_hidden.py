"""Statistics for narrowing the residual stream, which all blocks share: coordinates are chosen, then readers fitted.

Both walks run the original model, block by block: the norm of a cut stream has another scale, which zeros in the place
of coordinates could not imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from aicompress.errors import listed
from aicompress.model.blocks.walk import Gatherer, Visitor
from aicompress.pipeline.calibration.gradients import GradientReader
from aicompress.pipeline.calibration.request import MIN_ROWS
from aicompress.pipeline.structured.calibrated import GRADIENTS, Chooser
from aicompress.pipeline.structured.reading import Reading, importance
from aicompress.statistics import InputStats

CHOICE = frozenset({"mean_abs"})


@dataclass
class StreamChooser(Chooser):
    """Chooses the coordinates that stay by what their readers are given, and fits the readers of each block.

    Attributes:
        scores: of the coordinates by gradients, where the method asks for them.
    """

    scores: Tensor | None = None

    @staticmethod
    def walks(reading: Reading) -> Sequence[tuple[frozenset[str], bool]]:
        """One to choose, and one to fit the readers; each where the method asks for it."""
        return [(CHOICE & reading.needs, False), (reading.needs - CHOICE - GRADIENTS, False)]

    def weigh(self, read: GradientReader) -> None:
        """Take the importance of the coordinates by gradients."""
        infos = {layer.info.tensor: layer.info for layer in self.reading.layers}
        self.scores, reached = importance(self.reading.edit.structures[0], infos, read)
        if not reached:
            self.work.warnings.append("no gradient reached the stream: its coordinates are chosen by their weights")

    def visitors(self) -> Iterator[Visitor]:
        """What the readers are given chooses the coordinates; then each block's readers are fitted."""
        gatherer = Gatherer()
        yield gatherer
        self.work.choose(0, gatherer.seen, self.scores)
        yield self

    def look_up(self, of: Callable[[str], InputStats]) -> None:
        """Choose, and fit the readers one after the other."""
        readers, ((choice, _), (fitted, _)) = self.reading.edit.consumers, self.walks(self.reading)
        seen = {name: replace(of(name), gram=None) for name in readers} if choice else {}
        self.work.choose(0, seen, self.scores)
        for name in readers if fitted else ():
            self.visit({name: of(name)})

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        """Write readers, fitted; the running model stays as it is, and what too few rows reached is cut as it is."""
        self.few |= {name: inputs.count for name, inputs in stats.items() if inputs.count < MIN_ROWS}
        self.work.fit(0, {name: inputs for name, inputs in stats.items() if inputs.count >= MIN_ROWS})
        return {}

    def scarce(self) -> list[str]:
        """A warning that names the readers which too few calibration rows reached."""
        if not self.few:
            return []
        shown = listed(f"{name} ({count})" for name, count in self.few.items())
        return [f"{len(self.few)} readers saw fewer than {MIN_ROWS} calibration rows and are not fitted: {shown}"]
