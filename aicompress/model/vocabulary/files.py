"""The files beside a checkpoint's weights that number tokens, written for those that stay, and tried at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aicompress.checkpoint.json_text import read_json
from aicompress.errors import CheckpointError
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.model.vocabulary.segmentation import joined, pairs_of
from aicompress.model.vocabulary.token_ids import Numbering, renumbered
from aicompress.model.vocabulary.vocabulary import Vocabulary

WHOLE = "tokenizer.json"  # holds all that there is to a tokenizer
OTHERS = (".model", ".spm", ".tiktoken", ".vocab")  # what other libraries read a tokenizer from
OTHER_NAMES = ("tekken.json", "dict.txt", "bpe.codes")


@dataclass
class TokenFiles:
    """The files of a tokenizer with fewer tokens.

    Attributes:
        folder: of the checkpoint.
        numbering: the tokens that stay.
        ids: numbers of all tokens before.
        written: files by name, with their new content.
        left_out: files that number all tokens and are not written.
    """

    folder: Path
    numbering: Numbering
    ids: Mapping[str, int]
    written: dict[Path, bytes] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)

    def write(self, names: Sequence[Path]) -> None:
        """Write every file of these that numbers tokens.

        Raises:
            CheckpointError: one cannot be read, or the tokenizer is in none that can be written.
        """
        top = {name.name: name for name in names if len(name.parts) == 1}
        writers: Mapping[str, Callable[[Path], bytes | None]] = {
            WHOLE: self._tokenizer,
            "tokenizer_config.json": self._tokenizer_config,
            "added_tokens.json": self._vocabulary,
            "generation_config.json": self._ids_of_json,
            "vocab.txt": self._lines,
            "vocab.json": self._vocabulary,
            "merges.txt": self._merges,
        }
        for name in (name for name in top if name in writers):
            content = writers[name](self.folder / name)
            if content is None:
                self.left_out.append(top[name])
            else:
                self.written[top[name]] = content
        self.left_out += [top[name] for name in top if name in OTHER_NAMES or name.endswith(OTHERS)]
        if WHOLE not in top and (self.left_out or not {"vocab.txt", "vocab.json"} & top.keys()):
            only = self.left_out[0] if self.left_out else "a form of its own"
            hint = "save it with tokenizer.json: AutoTokenizer.from_pretrained(IN).save_pretrained(IN)"
            raise CheckpointError(f"the tokenizer is in {only} alone, which is not written", hint)

    def _tokenizer(self, path: Path) -> bytes:
        plain = read_json(path)
        plain["model"] = self._model(plain["model"])
        plain["added_tokens"] = [
            {**token, "id": self.numbering(token["id"])} for token in plain.get("added_tokens") or []
        ]
        if isinstance(plain.get("padding"), dict):
            plain["padding"]["pad_id"] = self.numbering(plain["padding"]["pad_id"])
        plain["post_processor"] = self._processor(plain.get("post_processor"))
        return _as_before(plain, path)

    def _model(self, model: dict[str, Any]) -> dict[str, Any]:
        """The algorithm's tokens that stay, with their merges and scores."""
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model = {**model, "vocab": self._numbered(vocabulary)}
        else:
            stays = [each for number, each in enumerate(vocabulary) if self.numbering(number) is not None]
            model = {**model, "vocab": stays}
        if model.get("unk_id") is not None:
            model["unk_id"] = self.numbering(model["unk_id"])
        if model.get("merges"):
            prefix = model.get("continuing_subword_prefix") or ""
            pairs = zip(model["merges"], pairs_of(model), strict=True)
            model["merges"] = [merge for merge, pair in pairs if {*pair, joined(pair, prefix)} <= model["vocab"].keys()]
        return model

    def _numbered(self, vocabulary: Mapping[str, int]) -> dict[str, int]:
        numbers = ((token, self.numbering(number)) for token, number in vocabulary.items())
        return {token: number for token, number in numbers if number is not None}

    def _processor(self, value: Any) -> Any:
        """What is put around a text: templates, or pairs of a token and its number."""
        if isinstance(value, list):
            if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
                return [value[0], self.numbering(value[1])]
            return [self._processor(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {
            key: [self.numbering(token) for token in each] if key == "ids" else self._processor(each)
            for key, each in value.items()
        }

    def _tokenizer_config(self, path: Path) -> bytes:
        plain = read_json(path)
        if isinstance(plain.get("added_tokens_decoder"), dict):
            decoder = {self.numbering(int(key)): value for key, value in plain["added_tokens_decoder"].items()}
            plain["added_tokens_decoder"] = {str(key): value for key, value in decoder.items() if key is not None}
        return _as_before(plain, path)

    def _ids_of_json(self, path: Path) -> bytes:
        return _as_before(renumbered(read_json(path), self.numbering, self.numbering.size), path)

    def _vocabulary(self, path: Path) -> bytes | None:
        """Numbers by token; None where they are not those of the tokenizer."""
        plain = read_json(path)
        if any(type(number) is not int or self.ids.get(token, number) != number for token, number in plain.items()):
            return None
        return _as_before(self._numbered(plain), path)

    def _lines(self, path: Path) -> bytes | None:
        """Tokens in the order of their numbers, one a line; None where they are something else."""
        lines = _text(path).split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        if any(self.ids.get(token.rstrip("\r"), number) != number for number, token in enumerate(lines)):
            return None
        return "".join(f"{line}\n" for number, line in enumerate(lines) if self.numbering(number) is not None).encode()

    def _merges(self, path: Path) -> bytes | None:
        """Merges whose tokens stay; None where the lines are something else."""
        lines = [line for line in _text(path).split("\n") if line]
        merges = [line for line in lines if not line.startswith("#version")]
        if any(merge.count(" ") != 1 for merge in merges):
            return None
        stays = self._numbered(self.ids).keys()
        kept = [merge for merge in merges if {*(pair := merge.split(" ")), "".join(pair)} <= stays]
        head = [line for line in lines[:1] if line.startswith("#version")]
        return "".join(f"{line}\n" for line in (*head, *kept)).encode()


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text", "download or copy it again") from error


def _as_before(plain: dict[str, Any], path: Path) -> bytes:
    """JSON with line breaks and blanks where the file had them."""
    head = path.read_bytes()[:64]
    if b"\n" in head.rstrip(b"\n"):
        text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    else:
        text = json.dumps(plain, separators=None if b'": ' in head else (",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass")


READ = (".json", ".txt", ".jinja")  # files that a tokenizer is loaded from
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
HINT = "its vocabulary cannot be pruned; drop fewer tokens, or none"


def require_same_tokens(
    tokenizer: Any, vocabulary: Vocabulary, files: TokenFiles, config: Mapping[str, Any], names: Sequence[Path]
) -> None:
    """Load the tokenizer that would be written, and let it divide the texts of the tokens that stay.

    Args:
        tokenizer: before.
        vocabulary: its tokens.
        files: of the tokenizer with fewer tokens.
        config: config.json of the output.
        names: files beside the input's weights.

    Raises:
        CheckpointError: it does not load, or divides one of them otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for name in names:
            if len(name.parts) == 1 and name.suffix in READ and name not in files.left_out:
                content = files.written.get(name)
                (Path(folder) / name).write_bytes((files.folder / name).read_bytes() if content is None else content)
        smaller = load_tokenizer(Path(folder))
    number = files.numbering
    for kind in SPECIAL:
        before, after = (getattr(each, f"{kind}_token_id", None) for each in (tokenizer, smaller))
        if after != (None if before is None else number(before)):
            raise CheckpointError(f"the {kind} token would be {after}, not that of before", HINT)
    texts = list(_texts(vocabulary, number.kept))
    for text, before, after in zip(texts, _divided(tokenizer, texts), _divided(smaller, texts), strict=True):
        new = [number(token) for token in before]
        if None not in new and new != after:
            raise CheckpointError(f"the tokenizer would divide {text[:40]!r} otherwise than before", HINT)


def _texts(vocabulary: Vocabulary, kept: Iterable[int]) -> Iterable[str]:
    """What every token that stays stands for, alone and behind a letter."""
    token_of = {number: token for token, number in vocabulary.segmentation.ids.items()}
    for number in kept:
        text = vocabulary.segmentation.text(token_of[number]) if number in token_of else None
        if text:
            yield from (text, f"a{text}")


def _divided(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    divided: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return divided
