"""Reading a pickle of dicts, lists, strings and numeric arrays without running any code from it.

A pickle names functions to call. Here every name maps to a stand-in of this module or is refused; NumPy itself is
never called with values from the file, an array is rebuilt from its raw bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

NUMERIC = "biuf"  # kinds of dtype that may appear; no objects


class _Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1].decode("ascii") if isinstance(state[1], bytes) else str(state[1])

    def numpy(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        if dtype.kind not in NUMERIC:
            raise pickle.UnpicklingError(f"an array of {dtype}")
        return dtype.newbyteorder(">") if self.order == ">" else dtype


class _Array:
    """Stands in for ``numpy.ndarray``; ``value`` is the array."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any) -> None:
        shape = tuple(int(n) for n in shape)
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)) or min(shape, default=0) < 0:
            raise pickle.UnpicklingError("an array that is not made of numbers")
        kind = dtype.numpy()
        if math.prod(shape) * kind.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array {list(shape)} of {kind} in {len(raw)} bytes")
        self.value = np.frombuffer(raw, kind).reshape(shape, order="F" if order in ("F", b"F") else "C")


# Instances without attributes instead of functions: a pickle can set attributes of what it names.
class _NdarrayType:
    __slots__ = ()


class _MakeDtype:
    __slots__ = ()

    def __call__(self, *args: Any) -> _Dtype:
        return _Dtype(*args)


class _Reconstruct:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _FromBuffer:
    __slots__ = ()

    def __call__(self, raw: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
        array = _Array()
        array.fill(raw, dtype, shape, order)
        return array


class _Encode:
    """Stands in for ``_codecs.encode``, by which Python 3 writes bytes at old protocols."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("text in an unexpected encoding")
        return text.encode("latin1")


class _EmptyBytes:
    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NdarrayType(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
    ("__builtin__", "bytes"): _EmptyBytes(),
    ("builtins", "bytes"): _EmptyBytes(),
}
for _package in ("numpy.core", "numpy._core"):
    _NAMES[_package + ".multiarray", "_reconstruct"] = _Reconstruct()
    _NAMES[_package + ".numeric", "_frombuffer"] = _FromBuffer()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None


def safe_unpickle(content: bytes) -> Any:
    """The object in ``content``: dicts, lists, tuples, numbers, text, bytes and numeric arrays.

    Raises:
        pickle.UnpicklingError: anything else is in there, or the pickle is broken; the message says what was found.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # broken pickles raise nearly anything
        raise pickle.UnpicklingError(f"a broken pickle ({type(error).__name__}: {error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise pickle.UnpicklingError(f"an object of {type(value).__name__}")
