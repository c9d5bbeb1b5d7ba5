"""Where a checkpoint's files are: a Hugging Face directory, one file, an index, or hf://org/name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aicompress.checkpoint.encoder_modules import encoder_folder, encoder_modules, module_folders
from aicompress.checkpoint.header import PACKED_SUFFIX, packed_error
from aicompress.checkpoint.json_text import read_json
from aicompress.errors import CheckpointError, nearest

INDEX = "model.safetensors.index.json"
# Weights in other formats would be stale beside the new ones.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".pkl"}
_NO_PICKLES = {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "Keras", ".msgpack": "Flax", ".tflite": "TensorFlow Lite"}
OTHER_FILES = _OTHER_WEIGHTS | {".npz", ".npy", ".zip", ".tar", ".gz", ".json"}  # what no output is
MODELING_FILES = ("modeling_aicompress.py", "layers_aicompress.py", "decoding_aicompress.py")
REPORTS = ("report.json", "report.md", "report.html")
# Beside the reports of the checkpoint itself, which come along as they are.
PACKING_REPORTS = tuple(f"{command}.{name}" for command in ("pack", "unpack") for name in REPORTS)
_WRITTEN_ANEW = {"config.json", "aicompress.json", *REPORTS, *PACKING_REPORTS, *MODELING_FILES}
_HUB_ADDRESS = re.compile(r"https?:/+(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")  # a path has one slash of two
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)")
_INDEXES = re.compile(r"\.safetensors\.index(?:\.\w+)?\.json$")  # of any base name; of a variant too
WEIGHT_NAMES = ("diffusion_pytorch_model",)  # of weights that other readers than transformers look for
# Where other tools write how they quantized, and the method that such a file means; an output is no more what it says.
OTHER_SETTINGS = {  # quantization settings in files of their own, and which tool's they are
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_map.json": "quanto",  # not read, and said so
}
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint.

    Attributes:
        path: what the user named (for hf:// the local snapshot).
        files: safetensors files, in shard order.
        weight_map: tensor -> file name, as the index says; empty without an index.
        folder: the directory of a Hugging Face checkpoint, or None for a bare file.
        config: config.json, or None.
        side_files: other files to take along, relative to folder.
        left_out: files that are not taken along, relative to folder.
        outside: links that lead out of the folder, relative to it; nothing behind them is read.
    """

    path: Path
    files: tuple[Path, ...]
    weight_map: dict[str, str]
    folder: Path | None
    config: dict[str, Any] | None
    side_files: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    outside: tuple[Path, ...] = ()

    @property
    def base_name(self) -> str:
        """What readers of this folder call its weights: model, or the name of diffusers' models."""
        first = self.files[0].name if self.folder is not None else ""
        return next((name for name in WEIGHT_NAMES if first.startswith(name)), "model")

    @property
    def encoder_module(self) -> str:
        """The class of sentence-transformers that reads this folder's weights, such as Transformer; '' if none does."""
        above = encoder_folder(self.folder) if self.folder is not None else None
        if above is None or self.folder is None:
            return ""
        place = PurePosixPath("" if above == self.folder else self.folder.name)
        return next((name for name, path in encoder_modules(above) if path == place), "Transformer")

    @property
    def part_weights(self) -> tuple[Path, ...]:
        """Weights of further parts of a sentence encoder, such as a Dense module, relative to the folder."""
        return tuple(path for path in self.side_files if path.suffix == ".safetensors")

    def name_of(self, file: Path) -> str:
        """A weight file's name, below the checkpoint's folder where it has one."""
        folder = self.folder or self.path.parent
        return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def _beside(path: Path) -> str:
    """A hint that names what is most like a missing path in its folder, among what may be a checkpoint."""
    hub = _HUB_ADDRESS.match(str(path))
    if hub is not None:
        return f"hf://{hub[1]} reads it from the hub"
    if not path.parent.is_dir():
        named = _HUB_NAME.fullmatch(str(path)) is not None
        return f"there is no folder {path.parent}" + (f"; of the hub it is hf://{path}" if named else "")
    fitting = [each.name for each in path.parent.iterdir() if each.is_dir() or ".safetensors" in each.suffixes]
    near = nearest(path.name, fitting)
    return "check the path" if near is None else f"did you mean {str(path.parent / near)!r}?"


def locate(name: str | Path) -> Source:
    """Find the files of a checkpoint; nothing but JSON is read.

    Args:
        name: a directory, a `.safetensors` file, an `index.json` (with a config.json beside it: that directory), or
            `hf://org/name[@revision]`.

    Raises:
        CheckpointError: it is not there, or not a safetensors checkpoint.
    """
    path = local_folder(name)
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {path.readlink()}, which is not there", "check where it leads")
        raise CheckpointError(f"{path} does not exist", _beside(path))
    if path.name.endswith(".index.json") or _INDEXES.search(path.name):
        if (path.parent / "config.json").is_file():
            return _directory(path.parent, path)
        files, weight_map = indexed(path)
        return Source(path, files, weight_map, None, None)
    if path.suffix == ".safetensors":
        return Source(path, (path,), {}, None, None)
    if path.suffix in _NO_PICKLES:
        hint = f"{_NO_PICKLES[path.suffix]} is not read: give the safetensors checkpoint that it was made from"
    elif path.suffix in _OTHER_WEIGHTS:
        hint = "pickles are never opened: convert it to safetensors first"
    elif path.suffix in (".npz", ".npy"):
        hint = "write its arrays anew: safetensors.numpy.save_file(dict(numpy.load(IN)), OUT)"
    elif (path.parent / "config.json").is_file():
        hint = f"give the folder that it lies in: {path.parent}"
    else:
        hint = "give a directory, a .safetensors file or an index.json"
    raise CheckpointError(f"{path} is not a safetensors checkpoint", hint)


def local_folder(name: str | Path) -> Path:
    """A path, or the local snapshot of `hf://org/name[@revision]`."""
    return _download(str(name)) if str(name).startswith("hf://") else Path(name)


def _directory(folder: Path, index: Path | None = None) -> Source:
    """A Hugging Face directory; `index` says which of its weights are meant."""
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder} is an adapter, no checkpoint", f"give its base model as IN, and --adapter {folder}"
        )
    config = _config(folder / "config.json") if (folder / "config.json").is_file() else None
    weight_map: dict[str, str] = {}
    files: tuple[Path, ...]
    if index is not None:
        files, weight_map = indexed(index)
    elif (folder / "model.safetensors").is_file():
        files = (folder / "model.safetensors",)
    elif (folder / INDEX).is_file():
        files, weight_map = indexed(folder / INDEX)
    elif len(indexes := [path for path in sorted(folder.iterdir()) if _INDEXES.search(path.name)]) == 1:
        files, weight_map = indexed(indexes[0])
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
        packed = bool(files) and all(file.name.endswith(PACKED_SUFFIX) for file in files)  # refused where one is read
        if len(files) != 1 and not packed:
            holding = f"{len(files)} safetensors files and no index" if files else "no safetensors file"
            hint = f"give one of them as IN, such as {files[0]}; or {_expected(folder)}" if files else _expected(folder)
            raise CheckpointError(f"{folder} holds {holding}", hint)
    for file in files:
        if leads_outside(folder, file):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside its folder",
                "copy the weights into the folder, or give the file itself as IN",
            )
    side, left = _side_files(folder, set(files))
    outside = tuple(relative for relative in side if leads_outside(folder, folder / relative))
    side = tuple(relative for relative in side if relative not in outside)
    return Source(folder, files, weight_map, folder, config, side, left, outside)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def leads_outside(folder: Path, file: Path) -> bool:
    """Whether a link leads out of a checkpoint's folder; the blobs beside a snapshot of the hub's cache are its own."""
    place, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    return not (place.is_relative_to(home) or (home.parent.name == "snapshots" and place.is_relative_to(blobs)))


def _expected(folder: Path) -> str:
    parts = sorted(part for part in module_folders(folder) if (folder / part / "config.json").is_file())
    transformers = [part for part in parts if "model_type" in read_json(folder / part / "config.json")]
    if transformers:
        return f"its transformer lies in {folder / transformers[0]}: give that as IN, and put OUT in its place"
    inner = sorted({path.parent for path in folder.glob("*/*.safetensors") if (path.parent / "config.json").is_file()})
    if inner:  # such as a pipeline of diffusers
        told = f"its parts are checkpoints: give {inner[0]} as IN"
        return f"{told}, and put OUT in its place" + (f"; there are {len(inner)} of them" if inner[1:] else "")
    others = sorted(path for path in folder.iterdir() if path.suffix in _NO_PICKLES)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS.difference(_NO_PICKLES))
    if others and not pickles:
        kind = _NO_PICKLES[others[0].suffix]
        return f"{others[0].name} is not read, {kind} never is: give the safetensors checkpoint that it was made from"
    if pickles:
        return f"{pickles[0]} is not read, pickles never are: convert it to safetensors first"
    return f"expected model.safetensors or {INDEX}"


def _side_files(folder: Path, weights: set[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files to take along, and weights to leave: other formats, or other checkpoints in folders below.

    A folder below that modules.json names is a part of the model, with weights of its own.
    """
    parts = module_folders(folder)
    side: list[Path] = []
    left: list[Path] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        top = len(relative.parts) == 1
        if path in weights or (top and (relative.name == INDEX or relative.name in _WRITTEN_ANEW)):
            continue
        if top and (relative.name in OTHER_SETTINGS or relative.name == ADAPTER_CONFIG):
            left.append(relative)
            continue
        weighs = path.suffix in _OTHER_WEIGHTS or path.suffix == ".safetensors" or path.name.endswith(".index.json")
        weighs |= bool(_INDEXES.search(path.name))
        (left if weighs and (top or relative.parts[0] not in parts) else side).append(relative)
    return tuple(side), tuple(left)


def indexed(index: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Shards that an index names; each must lie in the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map", "it is not a safetensors index")
    names = sorted(set(weight_map.values()))
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name:
            raise CheckpointError(
                f"{index} names {name!r}, a file outside its folder", "refused: the index is not safe"
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if packed := [path for path in index.parent.glob(f"*{PACKED_SUFFIX}") if missing]:
        raise packed_error(packed[0])
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}", "download it again"
        )
    return tuple(index.parent / name for name in names), weight_map


def _config(path: Path) -> dict[str, Any]:
    """A config.json in which what names the architecture are names; MLX's `quantization` is its quantization_config."""
    config = read_json(path)
    given, own = config.get("quantization_config"), config.get("quantization")
    if isinstance(own, dict) and {"bits", "group_size"} <= own.keys() and given in (None, own):
        config = {key: value for key, value in config.items() if key != "quantization"}
        config["quantization_config"] = {**own, "quant_method": "mlx"}
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise CheckpointError(f"{path}: architectures is not a list of names", "download or copy the checkpoint again")
    for key, kind in (("model_type", str), ("auto_map", dict)):
        if not isinstance(config.get(key), kind | None):
            what = "a name" if kind is str else "a mapping"
            raise CheckpointError(f"{path}: {key} is not {what}", "download or copy the checkpoint again")
    return config


def _download(name: str) -> Path:
    """A snapshot of a hub repository without its pickles and other formats."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.removeprefix("hf://").partition("@")
    try:
        patterns = [f"*{suffix}" for suffix in _OTHER_WEIGHTS]
        return Path(snapshot_download(repo, revision=revision or None, ignore_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(f"{name} is not a repository name", "write hf://organisation/name") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not in the local cache and the hub cannot be reached", "go online, or give a local directory"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        message = f"{name} cannot be downloaded: {str(error).strip().splitlines()[0]}"
        raise CheckpointError(message, "check the name, the network and HF_TOKEN") from error
