"""Arrays as the bytes of a safetensors file and back. Anything with the buffer protocol will do; NumPy is needed to read."""

from __future__ import annotations

import json
from typing import Any, Mapping

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "uint32": "U32", "int32": "I32", "int64": "I64",
}


def _bytes(name: str, tensor: Any) -> tuple[str, list[int], bytes]:
    """Type, shape and little-endian bytes of an array, a torch tensor, or what else has a buffer."""
    dtype = getattr(tensor, "dtype", "")
    kind = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().contiguous()
        if kind == "bfloat16":
            # NumPy has no such type: its bits go over as whole numbers.
            import torch

            tensor = tensor.view(torch.int16)
        tensor = tensor.numpy()
    if getattr(dtype, "byteorder", "=") == ">":
        tensor = tensor.astype(dtype.newbyteorder("<"))
    view = memoryview(tensor)
    if not kind:
        kind = {"d": "float64", "f": "float32", "e": "float16", "B": "uint8", "I": "uint32", "i": "int32", "l": "int64", "q": "int64"}.get(view.format, view.format)
    if kind not in _NAMES:
        raise TypeError(f"tensor `{name}` is of type {kind}; an adapter's are of {', '.join(_NAMES)}")
    return _NAMES[kind], list(view.shape), view.tobytes()


def encode(tensors: Mapping[str, Any]) -> bytes:
    """The file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, tensor in tensors.items():
        kind, shape, data = _bytes(name, tensor)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def decode(data: bytes) -> dict[str, Any]:
    """The arrays, which read the bytes where they are. bfloat16 comes as float32, since NumPy has no such type."""
    import numpy

    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        array = numpy.frombuffer(data, types[entry["dtype"]], offset=8 + length + start, count=(end - start) // numpy.dtype(types[entry["dtype"]]).itemsize)
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[name] = array.reshape(entry["shape"])
    return arrays
