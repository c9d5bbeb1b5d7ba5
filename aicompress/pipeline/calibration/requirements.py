"""What a step asks of calibration, checked before any work: data, a model that runs, or files of statistics
that know its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from aicompress import data
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.errors import CompressError, RecipeError, Refused
from aicompress.layer import LayerInfo
from aicompress.methods.layerwise import AnyLayerMethod, LayerMethod
from aicompress.methods.method import OF_GRADIENTS, OF_TRAINING, MethodConfig
from aicompress.methods.structural import AnyStructuralMethod
from aicompress.pipeline.calibration.arguments import argument_problems, generates, unreadable
from aicompress.pipeline.calibration.request import Request, StepInput, follows, module_of
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.pipeline.step.workers import started
from aicompress.recipe import Recipe
from aicompress.statistics import column_statistics


def wanted(method: AnyLayerMethod | AnyStructuralMethod, config: MethodConfig) -> frozenset[str]:
    """All statistics that a config reads, before layers are compressed and while they are."""
    return method.reads(config) | (method.surveyed(config) if isinstance(method, LayerMethod) else frozenset())


def _searches(method: AnyLayerMethod | AnyStructuralMethod, config: MethodConfig) -> bool:
    """Whether a search over the running model chooses a layer's width or rank."""
    if not isinstance(method, LayerMethod):
        return False
    return method.tries(config) or (method.widths is not None and method.widths.search(config) is not None)


def problems(
    step: StepInput, method: AnyLayerMethod | AnyStructuralMethod, chosen: Sequence[LayerPlan]
) -> list[CompressError]:
    """Everything that would keep a method from its statistics.

    Of one that leaves layers as they are it is seen later, by `in_files`, what files lack of the others.
    """
    checkpoint, recipe, request = step.checkpoint, step.recipe, step.request
    needs = frozenset[str]().union(*(wanted(method, x.config) for x in chosen if x.config is not None))
    searches = any(_searches(method, x.config) for x in chosen if x.config is not None)
    unseen = [x for x in chosen if x.config is not None and _is_unseen(checkpoint, x.info)]
    if unseen and (needs or searches):
        message = f"{unseen[0].info.name}: calibration sees the inputs of whole layers, and this is a part of one"
        return [Refused(message, "exclude it, or take a method without calibration, such as rtn")]
    if not needs and request.stats:
        return [Refused(f"{method.name} reads no statistics of inputs", "leave --stats out")]
    if request.stats and isinstance(method, LayerMethod) and method.rotates is not None:
        message = f"{method.name} rotates the model, and files of statistics hold those of models as they are"
        return [Refused(message, "leave --stats out")]
    measures = recipe.measured_levels is not None and recipe.calibration is not None
    if not needs and not searches and not measures:
        return []
    if recipe.tune is not None and (request.stats or started() > 1):
        what = "files of statistics hold none of its blocks' outputs" if request.stats else "it runs in one process"
        hint = "leave --stats out, and torchrun" if request.stats else "leave torchrun out"
        return [Refused(f"tune: {what}", f"{hint}; or take effort: balanced, or tune: null, which tune no blocks")]
    if not follows(recipe) and (recipe.tune is not None or any(method.compares(layer.config) for layer in chosen)):
        what = "tune" if recipe.tune is not None else "shift"
        message = f"{what}: it compares the compressed model with the original, and calibration.activations is original"
        return [RecipeError(message, f"activations: compressed, or leave {what} out")]
    if request.stats and any(method.compares(layer.config) for layer in chosen):
        hint = "leave --stats out, or set its shift to 0"
        return [Refused(f"{method.name} compares two models here, and files of statistics hold one model's", hint)]
    refusals: list[CompressError] = []
    if request.reads_files:
        refusals = [] if isinstance(method, LayerMethod) and method.leaves else in_files(method, chosen, request)
        if not searches and not measures:
            return refusals
    elif needs & OF_TRAINING:
        hint = "record it with `aicompress distill ... --stats FILE`, then give FILE here with --stats"
        return [Refused(f"{method.name} reads what a training run has recorded, and no such file is given", hint)]
    elif len(request.stats) > 1:
        absent = [str(path) for path in request.stats if not path.exists()]
        refusals.append(Refused(f"{', '.join(absent)} does not exist", "files that are merged must exist"))
    for path in (path for path in request.stats if path.suffix != ".safetensors"):
        refusals.append(Refused(f"{path}: statistics are kept in a .safetensors file", "choose a name that ends so"))
    if recipe.calibration is None:
        hint = "add a calibration: section to the recipe, such as `calibration: {drawn: 128}`, which needs no data"
        hint += "" if searches else "; or give --stats with a file of statistics"
        refusals.append(RecipeError(f"{_what(method, searches)} needs calibration data", hint))
    else:
        refusals += data.problems(recipe.calibration)
        refusals += _of_loss(checkpoint, recipe, chosen) if needs & OF_GRADIENTS else []
    refusals += _of_model(step)
    return refusals or unreadable(checkpoint, recipe)


def _what(method: AnyLayerMethod | AnyStructuralMethod, searches: bool) -> str:
    """What asks for calibration data, in a recipe's words."""
    if not searches:
        return method.name
    return "bits: auto" if isinstance(method, LayerMethod) and method.widths is not None else "max_kl"


def _is_unseen(checkpoint: Checkpoint, info: LayerInfo) -> bool:
    """Whether statistics of the parameter's inputs say nothing of this part's."""
    outline = checkpoint.outline(info.tensor) if info.part else None
    return outline is not None and not outline.is_product


def _of_loss(checkpoint: Checkpoint, recipe: Recipe, chosen: Sequence[LayerPlan]) -> list[CompressError]:
    """What is wrong with the loss that is to be differentiated."""
    configs = [layer.config for layer in chosen if layer.config is not None]
    kinds = {config.gradient_loss for config in configs}
    if len(kinds) > 1:
        return [RecipeError(f"layers ask for gradients of losses {sorted(kinds)}", "one step has one loss: give one")]
    assert recipe.calibration is not None
    if kinds == {"task"} and recipe.calibration.labels is None and not generates(checkpoint):
        hint = "name the labels of the calibration data, or take loss: own"
        return [RecipeError("loss: task needs labels, and the calibration data names none", hint)]
    return []


def _of_model(step: StepInput) -> list[CompressError]:
    """Why the checkpoint cannot be run."""
    checkpoint, recipe = step.checkpoint, step.recipe
    if checkpoint.config is None and recipe.model is None:
        hint = "give a folder with config.json, or the recipe `model: {sequential: [fc1, relu, fc2]}` or a factory"
        return [RecipeError(f"{checkpoint.path} names no architecture, and calibration runs the model", hint)]
    from aicompress.model.loading.partial_model import PartialModel
    from aicompress.model.loading.tokenizer import load_tokenizer

    try:
        module = module_of(step)
        PartialModel(checkpoint, module)
    except CompressError as error:
        return [error]
    data = recipe.calibration
    if data is not None and data.draws and load_tokenizer(checkpoint.source.folder) is None:
        return [RecipeError(f"{checkpoint.path}: tokens are drawn from a tokenizer, and it has none", "give arrays")]
    return [] if data is None else argument_problems(module, data, recipe.seed)


def in_files(
    method: AnyLayerMethod | AnyStructuralMethod, chosen: Sequence[LayerPlan], request: Request
) -> list[CompressError]:
    """What files of statistics lack of layers that are compressed."""
    if not request.reads_files:
        return []
    needs = frozenset[str]().union(*(wanted(method, x.config) for x in chosen if x.config is not None))
    infos = [layer.info for layer in chosen]
    return [problem for path in request.stats for problem in lacking(path, infos, needs)]


def lacking(path: Path, chosen: Sequence[LayerInfo], needs: frozenset[str]) -> list[CompressError]:
    """Layers that a file does not know, or knows otherwise.

    Args:
        path: of a file of statistics.
        chosen: layers that are compressed.
        needs: statistics that are read of them.
    """
    try:
        file = StatisticsFile.open(path)
    except CompressError as error:
        return [error]
    if needs & OF_TRAINING:
        return _unmoved(file, chosen)
    by_tensor = _by_tensor(chosen)
    problems: list[CompressError] = []
    absent = [tensor for tensor in by_tensor if tensor not in file.layers]
    if absent:
        shown = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
        problems.append(Refused(f"{path} holds no statistics of {shown}", "collect them from this checkpoint"))
    for tensor, infos in by_tensor.items():
        problems += _unlike(file, tensor, infos, needs)
    return problems[:5]


def _by_tensor(chosen: Sequence[LayerInfo]) -> dict[str, list[LayerInfo]]:
    """Layers by the name that their statistics have: a parameter's, or that of one of the experts in it."""
    by_tensor: dict[str, list[LayerInfo]] = {}
    for info in chosen:
        if info.experts is None:
            by_tensor.setdefault(info.tensor, []).append(info)
            continue
        experts = [info.of_expert(number) for number in range(info.experts.count)]
        by_tensor |= {f"{info.tensor}.{number}": [own] for number, own in enumerate(experts)}
    return by_tensor


def _unlike(
    file: StatisticsFile, tensor: str, infos: Sequence[LayerInfo], needs: frozenset[str]
) -> list[CompressError]:
    """Statistics of one parameter that are of other shapes than it, or not there."""
    specs = file.specs(tensor) if tensor in file.layers else {}
    problems: list[CompressError] = []
    rows = specs.pop("frequency", None)
    if rows is not None and rows.shape != infos[0].shape[:1]:
        message = f"{file.path}: {tensor} has {infos[0].shape[0]} rows, its statistics have {rows.shape[0]}"
        problems.append(Refused(message, "collect them from this checkpoint"))
    inner = [info for info in infos if info.part != "out"]
    widths = {spec.shape[-1] for spec in specs.values()}
    if inner and widths and widths != {inner[0].shape[1]}:
        message = f"{file.path}: {tensor} has {inner[0].shape[1]} inputs, its statistics have {min(widths)}"
        problems.append(Refused(message, "collect them from this checkpoint"))
    held = (
        [name for name, statistic in column_statistics().items() if statistic.of_gram is not None]
        if "gram" in specs
        else []
    )
    known = {*specs, *held, "frequency"} | OF_GRADIENTS  # of embeddings alone
    absent = needs - known if specs else frozenset()
    if needs & OF_GRADIENTS:
        absent |= _ungraded(file, infos, needs)
    if absent:
        problems.append(Refused(f"{file.path}: no {min(absent)} of {tensor}", "collect the file for this method"))
    return problems


def _unmoved(file: StatisticsFile, infos: Sequence[LayerInfo]) -> list[CompressError]:
    """Layers whose movement a file lacks, or has of another shape."""
    specs = {info.name: file.movement_spec(info.name) for info in infos}
    absent = [info.name for info in infos if (spec := specs[info.name]) is None or spec.shape != info.shape]
    if not absent:
        return []
    shown = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
    return [Refused(f"{file.path} holds no movement of {shown}", "exclude what was not trained as a plain matrix")]


def _ungraded(file: StatisticsFile, infos: Sequence[LayerInfo], needs: frozenset[str]) -> frozenset[str]:
    """What a file lacks of a layer's gradients, or has of another shape."""
    shapes = [spec.shape for info in infos if (spec := file.gradient_spec(info.name)) is not None]
    if shapes != [info.shape for info in infos]:
        return needs & OF_GRADIENTS
    return (needs & OF_GRADIENTS) - {"gradients"} if not file.has_output_grams else frozenset()


def foreign(files: Sequence[StatisticsFile], inputs: Mapping[str, str]) -> list[str]:
    """A warning for each file of statistics of another checkpoint."""
    mine = set(inputs.values())
    return [
        f"{file.path} was collected from another checkpoint: its statistics fit the layers, maybe not their inputs"
        for file in files
        if set(file.inputs.values()) != mine
    ]
