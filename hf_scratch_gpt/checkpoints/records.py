"""Read a pickle as data: what it would call becomes a record, and nothing in the file is called."""

import pickletools
from dataclasses import dataclass, field
from math import prod
from typing import IO, Any

import torch

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_LITERALS |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_MOST_STEPS = 1 << 20  # a checkpoint of GPT-2's largest size with its optimizer takes a tenth
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Untyped": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}


@dataclass
class Record:
    """An object of another class: what would be called, with what, and the state it would get."""

    name: str
    arguments: Any = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A row of `length` numbers, which the file holds under `key`."""

    key: str
    dtype: torch.dtype
    length: int


@dataclass(frozen=True)
class View:
    """A tensor: numbers of a storage from `offset` on, in steps of `stride`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def fits(self, size: int) -> bool:
        """Whether a storage of `size` bytes holds as many numbers, and all that it asks for."""
        numbers, count = (self.offset, *self.shape, *self.stride), prod(self.shape)
        if not all(type(number) is int and number >= 0 for number in numbers):
            return False
        steps = zip(self.shape, self.stride, strict=True)
        last = self.offset + sum((length - 1) * step for length, step in steps)
        return count == 0 or max(count, last + 1) * self.dtype.itemsize <= size


def unpickle(file: IO[bytes], storages: dict[str, Storage]) -> Any:
    """The content of the pickle at the position of `file`, which is left behind its end.

    Args:
        storages: takes those that the content refers to, by their keys.

    Raises:
        ValueError, LookupError, TypeError: it is damaged, or not a pickle of torch.save.
    """
    return _Machine(storages).run(file)


class _Machine:
    """The stack machine that a pickle is a program for (CPython, Lib/pickletools.py)."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.aside: list[list[Any]] = []  # what lies below each mark
        self.memo: dict[Any, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        """What the program in `file` leaves on the stack."""
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            name = opcode.name
            if step > _MOST_STEPS:
                raise ValueError(f"it takes more than {_MOST_STEPS} steps")
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in _TUPLES:
                self.stack[-_TUPLES[name] :] = [tuple(self.stack[-_TUPLES[name] :])]
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name not in ("PROTO", "FRAME", "STOP"):
                act = getattr(self, f"_{name.lower()}", None)
                if act is None:
                    raise ValueError(f"it uses {name}, which torch.save does not")
                act(argument)
        return self.stack.pop()

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _mark(self, _: None) -> None:
        self.aside.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.aside.pop()
        return items

    def _tuple(self, _: None) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._since_mark())

    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _setitem(self, _: None) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _setitems(self, _: None) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes, int, float)):  # hashing a tuple may never end
                raise ValueError(f"it has a {type(key).__name__} for a key")
            if isinstance(self.stack[-1], dict):
                self.stack[-1][key] = value

    def _global(self, names: str) -> None:
        self.stack.append(Record(names.replace(" ", ".")))

    def _stack_global(self, _: None) -> None:
        name = self.stack.pop()
        self.stack.append(Record(f"{self.stack.pop()}.{name}"))

    def _reduce(self, _: None) -> None:
        arguments = self.stack.pop()
        self.stack.append(_made(self.stack.pop(), arguments))

    _newobj = _reduce

    def _build(self, _: None) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record) and isinstance(state, dict):
            self.stack[-1].fields = state

    def _binpersid(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", Record(name=kind), str(key), _, int(length), *rest) if not any(rest):
                dtype = _DTYPES.get(kind.rpartition(".")[2].removesuffix("Storage"))
                if dtype is None or length < 0:
                    raise ValueError(f"it has {length} numbers of a {kind}")
                self.storages[key] = Storage(key, dtype, length)
                self.stack.append(self.storages[key])
            case _:
                raise ValueError("it refers to something else than a storage")


def _made(function: Any, arguments: Any) -> Any:
    """What a call of `function` makes: a tensor, a dictionary, or else a record of the call."""
    name = getattr(function, "name", type(function).__name__)
    match name.rpartition(".")[2], arguments:
        case "OrderedDict", ():
            return {}
        case (
            "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3",
            (Storage() as storage, int(offset), tuple(shape), tuple(stride), *others),
        ):
            named = [other.name for other in others if isinstance(other, Record)]
            dtype = getattr(torch, named[0].removeprefix("torch."), None) if named else None
            if isinstance(dtype, torch.dtype) or not named:
                return View(storage, dtype or storage.dtype, offset, shape, stride)
        case "_rebuild_parameter" | "_rebuild_parameter_with_state", (View() as view, *_):
            return view
        case "_rebuild_from_type_v2", (inner, _, tuple(inputs), *_):  # with attributes of its own
            return _made(inner, inputs)
    return Record(name, arguments)
