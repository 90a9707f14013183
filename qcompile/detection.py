"""Which format a checkpoint is in, from its config, its side files and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import plugins
from .errors import FormatError, UnsupportedError
from .formats import Format
from .storage import Folder, read_json

_OTHERS = {  # what else quant_method says, and what to do about it
    "bitsandbytes": "weights of bitsandbytes (nf4, int8); load them with transformers, or quantize the float model",
    "torchao": "tensors of torchao; load them with transformers, or quantize the float model",
    "quanto": "weights of optimum-quanto; load them with transformers, or quantize the float model",
    "hqq": "weights of HQQ; load them with transformers, or quantize the float model",
    "eetq": "weights of EETQ, in the layout of its CUDA kernels; quantize the float model",
    "aqlm": "codebooks of AQLM; load them with transformers",
    "vptq": "codebooks of VPTQ; load them with transformers",
    "quip": "codebooks of QuIP#; quantize the float model",
    "spqr": "weights of SpQR; load them with transformers",
    "bitnet": "ternary weights of BitNet; load them with transformers",
    "fbgemm_fp8": "weights of FBGEMM fp8; load them with transformers, or quantize the float model",
    "higgs": "weights of HIGGS; load them with transformers",
    "modelopt": "weights of NVIDIA ModelOpt; export them as compressed-tensors",
}
_MARKS = {  # how names end that no format of ours has, and whose they are
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "._weight_qdata": "torchao",
    ".weight._data": "quanto",
    ".W_q": "hqq",
}


def formats() -> list[Format]:
    """All formats that are installed."""
    return [plugins.find("formats", name) for name in plugins.names("formats")]


def with_side_file(folder: Folder) -> dict[str, Any]:
    """The config of a checkpoint, with the quantization section of a side file where it has none of its own.

    The side file of a format that never writes into config.json (ModelSlim) counts before the section there, which is
    that of the checkpoint that was quantized once more.
    """
    config = folder.config
    text = config.get("text_config")
    has_own = bool(config.get("quantization_config") or (isinstance(text, Mapping) and text.get("quantization_config")))
    for format in formats():
        if has_own and (format.in_config or not format.side_files):
            continue
        for pattern in format.side_files:
            found = sorted(folder.path.glob(pattern))
            if len(found) > 1:
                raise FormatError(f"{folder.path} holds {' and '.join(f.name for f in found)}; only one can be right")
            if found:
                return {**config, "quantization_config": {"quant_method": format.name, **read_json(found[0])}}
    return config


def detect_format(folder: Folder, config: Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint, None for a float one; UnsupportedError says what an unknown one is."""
    known = formats()
    found = [format for format in known if format.detect(config, folder.headers)]
    if len(found) > 1:
        raise FormatError(f"{folder.path} looks like {' and '.join(f.name for f in found)}; it can only be one")
    if found:
        return found[0]
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    ends = (owner for mark, owner in _MARKS.items() if any(name.endswith(mark) for name in folder.headers))
    marked = next(ends, None)
    if section or marked:
        what = _OTHERS.get(str(method or marked), "")
        raise UnsupportedError(
            f"{folder.path}: quantization method {method or marked!r} is not read"
            + (f": it holds {what}" if what else "")
            + f"; known formats: {', '.join(format.name for format in known)}"
        )
    return None
