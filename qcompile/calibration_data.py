"""From what users have (texts, token ids, loaders, datasets) to what calibration runs: positional inputs of forward."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx import GraphModule

from .errors import CalibrationError, ConfigError, FormatError
from .trace import is_language_model

SEQUENCE = 512
TOKENS_AT_ONCE = 4096  # tokens of one forward pass: enough to keep every core busy, and its activations stay small
_ACCEPTED = (
    "texts, token ids (a tensor, lists, arrays), mappings with 'input_ids' or 'text', a DataLoader or a dataset of such"
)


def calibration_inputs(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    sequence: int | None = None,
    graph: GraphModule | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> list[tuple[Any, ...]]:
    """Positional inputs of ``model``'s forward, one tuple per pass, on the model's device.

    For a transformers language model (unless it was traced on ``example_inputs``): int64 token ids [batch, sequence],
    at most ``samples`` rows of ``sequence`` tokens (default: 512, or as many as the model has positions). What ``data``
    holds is joined in its order and cut into rows; the last, shorter one is dropped, and so is what an attention mask
    hides. For any other model each item of ``data`` is one tuple of positional inputs (or a single tensor); the traced
    ``graph`` says which shapes it takes.

    Raises CalibrationError for data that cannot be used as it is (empty, shorter than one sequence, ids outside of the
    vocabulary, other shapes than the graph takes) and ConfigError for what is no calibration data at all.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, not {samples}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if is_language_model(model) and example_inputs is None:
        length = _sequence(model, sequence)
        rows = token_rows(_token_ids(data, _Encoder(model, tokenizer)), length, samples)
        _check_vocabulary(model, rows)
        return [(batch,) for batch in rows.to(device).split(max(1, TOKENS_AT_ONCE // length))]
    for name, value in (("tokenizer", tokenizer), ("sequence", sequence)):
        if value is not None:
            raise ConfigError(
                f"{name}= is about token ids, and {type(model).__name__} is calibrated on its positional inputs"
            )
    return [_on_device(item, device) for item in islice(_positional(data, graph), samples)] or _nothing()


def described(inputs: Sequence[tuple[Any, ...]]) -> str:
    """How much a model was calibrated on, for a report."""
    first = inputs[0][0] if inputs[0] else None
    if isinstance(first, Tensor) and first.dtype == torch.long and first.dim() == 2 and len(inputs[0]) == 1:
        rows = sum(len(batch) for (batch,) in inputs)
        return f"calibrated on {rows} sequences of {first.shape[1]} tokens"
    return f"calibrated on {len(inputs)} sets of inputs"


def read_data(path: Path) -> Any:
    """Calibration data of a file: ``.safetensors`` with ``input_ids``, ``.jsonl`` of texts or mappings, else one text.

    A line of ``.jsonl`` is a string, a list of ids or a mapping with 'text' or 'input_ids'. ConfigError when the file
    cannot be read as that.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"input_ids": load_file(path)["input_ids"]}
        text = path.read_text(encoding="utf-8")
        return text if path.suffix != ".jsonl" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"cannot read calibration data from {path}: {error or type(error).__name__}") from None


# ---------------------------------------------------------------------------------------------------------- token ids


def token_rows(ids: Iterable[Tensor], length: int, samples: int) -> Tensor:
    """At most ``samples`` rows of ``length`` ids, int64 [rows, length], from 1-D pieces joined in their order."""
    pieces, count = [], 0
    for piece in ids:
        pieces.append(piece)
        count += len(piece)
        if count >= samples * length:
            break
    if not count:
        _nothing()
    if count < length:
        raise CalibrationError(
            f"the calibration data holds {count} tokens, less than one sequence of {length}: give more of it, or pass "
            f"sequence={count} (or less)"
        )
    rows = min(samples, count // length)
    return torch.cat(pieces)[: rows * length].view(rows, length)


def _sequence(model: Any, asked: int | None) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = asked if asked is not None else min(SEQUENCE, positions or SEQUENCE)
    if length < 1:
        raise ConfigError(f"sequence must be at least 1 token, not {length}")
    if positions and length > positions:
        raise ConfigError(f"sequence={length}, but {type(model).__name__} has positions for {positions} tokens only")
    return length


def _check_vocabulary(model: Any, rows: Tensor) -> None:
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size
    wrong = rows[(rows < 0) | (rows >= size)]
    if len(wrong):
        raise CalibrationError(
            f"the calibration data holds token id {wrong[0].item()}, but {type(model).__name__} knows 0 to {size - 1} "
            "only: these ids come from another tokenizer, or hold padding that should be left out"
        )


class _Encoder:
    """Text to ids, by a tokenizer that is given or lies beside the model; looked for when the first text comes."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, text: str) -> Tensor:
        if not callable(self.tokenizer):
            self.tokenizer = self._find()
        return _as_row(self.tokenizer(text)["input_ids"])

    def _find(self) -> Any:
        from .models import load_tokenizer

        origin = self.tokenizer if self.tokenizer is not None else getattr(self.model, "name_or_path", "")
        if not origin:
            raise ConfigError(
                f"texts need a tokenizer, and {type(self.model).__name__} does not say where it came from: pass "
                "tokenizer=, or token ids instead of texts"
            )
        try:
            return load_tokenizer(origin)
        except FormatError as error:
            raise ConfigError(f"texts need a tokenizer: {error}; or pass tokenizer=, or token ids") from error


def _token_ids(data: Any, encode: _Encoder, depth: int = 0) -> Iterator[Tensor]:
    """Every piece of token ids in ``data``, 1-D int64, in order; reads no more of an iterator than is asked for."""
    if isinstance(data, str):
        yield encode(data)
    elif isinstance(data, Mapping):
        yield from _from_mapping(data, encode, depth)
    elif hasattr(data, "__array__") or _is_row(data):
        ids = _as_row(data)
        yield from ids if ids.dim() == 2 else (ids,)
    elif depth and isinstance(data, (list, tuple)) and data and isinstance(data[0], Tensor):
        yield from _token_ids(data[0], encode, depth + 1)  # what a DataLoader makes of (ids, labels)
    elif isinstance(data, (bytes, int, float)) or data is None or depth > 3:
        raise ConfigError(f"calibration data is {_ACCEPTED}, not {type(data).__name__}")
    else:
        for item in _iterate(data):
            yield from _token_ids(item, encode, depth + 1)


def _from_mapping(data: Mapping[str, Any], encode: _Encoder, depth: int) -> Iterator[Tensor]:
    mask = data.get("attention_mask")
    if "input_ids" in data and mask is not None:
        rows, kept = _rows(data["input_ids"]), _rows(mask)
        if [len(row) for row in rows] != [len(row) for row in kept]:
            raise CalibrationError("'attention_mask' of the calibration data has another shape than 'input_ids'")
        yield from (ids[shown != 0] for ids, shown in zip(rows, kept, strict=True))
    elif "input_ids" in data or "text" in data:
        yield from _token_ids(data["input_ids"] if "input_ids" in data else data["text"], encode, depth + 1)
    else:
        raise ConfigError(
            f"calibration data has 'input_ids' or 'text'; this mapping has {', '.join(map(repr, data)) or 'nothing'}"
        )


def _rows(value: Any) -> list[Tensor]:
    return list(_as_row(value).view(-1, len(value))) if _is_row(value) else [_as_row(row) for row in value]


def _is_row(value: Any) -> bool:
    """Whether ``value`` is one sequence of ids: integers in a list, or an array of one dimension."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, int) for item in value)
    return getattr(value, "ndim", 0) == 1


def _as_row(value: Any) -> Tensor:
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError) as error:  # an array of texts or of objects
        raise ConfigError(f"calibration data is {_ACCEPTED}, not {type(value).__name__} ({error})") from None
    if ids.dim() not in (1, 2):
        raise ConfigError(f"token ids have one dimension or two, not shape {list(ids.shape)}")
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ConfigError(f"token ids are integers, not {ids.dtype}")
    return ids.detach().to("cpu", torch.long)


def _iterate(data: Any) -> Iterator[Any]:
    try:
        return iter(data)
    except TypeError:
        raise ConfigError(f"calibration data is {_ACCEPTED}, not {type(data).__name__}") from None


def _nothing() -> Any:
    raise CalibrationError("the calibration data is empty")


# ---------------------------------------------------------------------------------------------------- other models


def _positional(data: Any, graph: GraphModule | None) -> Iterator[tuple[Any, ...]]:
    """Each item of ``data`` as positional inputs that ``graph`` takes; a tuple or a tensor alone is one item."""
    expected = None if graph is None else [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
    items = (data,) if isinstance(data, (tuple, Tensor)) else _iterate(data)
    for index, item in enumerate(items):
        if isinstance(item, (Mapping, str)):
            raise ConfigError(
                "calibration data of a model that is not a language model is positional inputs of its forward, as in "
                f"[(x,), (y,)], not {type(item).__name__}"
            )
        inputs = tuple(item) if isinstance(item, Sequence) else (item,)
        if expected is not None:
            inputs = inputs[: len(expected)]  # a loader's labels come last
            if wrong := _mismatch(inputs, expected):
                raise CalibrationError(f"item {index} of the calibration data: {wrong}")
        yield inputs


def _mismatch(inputs: tuple[Any, ...], expected: Sequence[Any]) -> str:
    """Why the traced graph does not take these inputs; "" when it does."""
    if len(inputs) < len(expected):
        return f"it has {len(inputs)} positional inputs, and the model takes {len(expected)}"
    for position, (value, traced) in enumerate(zip(inputs, expected, strict=True)):
        if not isinstance(traced, Tensor):
            continue
        if not isinstance(value, Tensor):
            return f"input {position} is {type(value).__name__}, not a tensor"
        shape = [size if isinstance(size, int) else "any" for size in traced.shape]
        fits = len(shape) == value.dim() and all(a in ("any", b) for a, b in zip(shape, value.shape, strict=True))
        if not fits or value.dtype != traced.dtype:
            wanted = f"{traced.dtype} [{', '.join(map(str, shape))}]"
            return f"input {position} is {value.dtype} {list(value.shape)}, and the model was traced for {wanted}"
    return ""


def _on_device(inputs: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(value.detach().to(device) if isinstance(value, Tensor) else value for value in inputs)
