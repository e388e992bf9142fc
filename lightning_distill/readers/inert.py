"""Unpickling without running anything: numbers and arrays come back, objects as inert records."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class Record(dict[Any, Any]):
    """What is left of an object: the name of its class and, as items, its attributes."""

    def __init__(self, class_name: str) -> None:
        super().__init__()
        self.class_name = class_name

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def build(self, state: Any) -> None:
        """Take attributes over, those of slots too."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.update(part)

    def append(self, item: Any) -> None:
        """Forget an item of what was a list."""


def read_inert(file: Path) -> Record:
    """Read a pickled object as a record; no class is imported and nothing is called.

    Args:
        file: Written by ``pickle`` or ``cloudpickle``.

    Raises:
        ValueError: It is damaged, or not an object.
    """
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except Exception as error:  # a pickle is a program, and a damaged one fails in any way
        raise ValueError(f"{file} is damaged ({error!r}); copy it again") from error
    if not isinstance(found, Record):
        raise ValueError(f"{file} holds a {type(found).__name__}; expected a pickled object")
    return found


class _Class:
    """Stands for whatever a pickle names; an object made of it is a record."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Array:
    """An array, put together from parts that are checked."""

    value: np.ndarray | None = None

    def fill(self, shape: Any, dtype: Any, fortran: Any, content: Any) -> None:
        if not isinstance(dtype, _Dtype):
            return  # an array of objects
        if not isinstance(content, (bytes, bytearray)) or not _is_shape(shape):
            raise ValueError("an array without shape or content")
        if math.prod(shape) * dtype.value.itemsize != len(content):
            raise ValueError(f"an array of shape {shape} in {len(content)} bytes")
        flat = np.frombuffer(bytes(content), dtype.value)
        self.value = flat.reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.value is None:
            raise ValueError("an array of objects")
        return np.array(self.value, dtype)


def _is_shape(shape: Any) -> bool:
    return type(shape) is tuple and all(type(side) is int and side >= 0 for side in shape)


class _Dtype:
    """A dtype of numbers."""

    def __init__(self, name: str) -> None:
        self.value = np.dtype(name)
        if self.value.kind not in "biuf":
            raise ValueError(f"an array of {name}")


def _array(*_: Any) -> _Array:
    return _Array()


def _array_of(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(shape, dtype, order == "F", content)
    return array


def _dtype(name: Any, *_: Any) -> _Dtype | Record:
    # numpy takes more than names, and works through nested lists of any size.
    if not (isinstance(name, str) and len(name) < 16):
        return Record("numpy.dtype")
    try:
        return _Dtype(name)
    except (TypeError, ValueError):
        return Record("numpy.dtype")


def _scalar(dtype: Any, content: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype):
        return Record("numpy.scalar")
    if not isinstance(content, bytes):
        raise ValueError("a number without content")
    return np.frombuffer(content, dtype.value, count=1)[0]


# All that is ever called, by numpy's names for it.
_KNOWN = {"_reconstruct": _array, "_frombuffer": _array_of, "dtype": _dtype, "scalar": _scalar}


def _with_text_keys(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return {key: value for key, value in items if isinstance(key, (str, Record))}


# The interpreter written in Python: the one in C allocates whatever a damaged file announces.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in _KNOWN:
            return _KNOWN[name]
        return _Class(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return Record("persistent")

    def get_extension(self, code: int) -> None:
        self.append(_Class(f"extension {code}"))

    def _make(self, made_by: Any, args: Any) -> Any:
        if any(made_by is known for known in _KNOWN.values()):
            return made_by(*args)
        if isinstance(made_by, _Class):
            return Record(made_by.name)
        raise ValueError(f"a call of {type(made_by).__name__}")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._make(klass, args))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Record):
            made.build(state)
        elif isinstance(made, _Array):
            made.fill(*state[1:])
        elif isinstance(made, _Dtype):
            made.value = made.value.newbyteorder(state[1])

    # Nested tuples and long numbers are hashed again and again, for years: all keys are texts.

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_with_text_keys(zip(items[::2], items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update(_with_text_keys([(key, value)]))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_with_text_keys(zip(items[::2], items[1::2], strict=True)))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_with_text_keys((item, None) for item in items))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(_with_text_keys((item, None) for item in items)))

    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
