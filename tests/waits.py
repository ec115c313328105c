"""A device that is none: real numbers on the CPU behind tensors that say that they are elsewhere.

With it a test counts, without a GPU, where a program would wait for one.
"""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HERE = torch.device("cpu")
THERE = torch.device("meta")  # a kind of device that autograd knows on every machine


class Elsewhere(torch.Tensor):
    """A tensor of that device; ``held`` is what it holds."""

    @staticmethod
    def __new__(cls, real):
        """Of the shape, strides and type of a tensor of the CPU."""
        options = {"dtype": real.dtype, "device": THERE, "strides": real.stride()}
        wrapped = torch.Tensor._make_wrapper_subclass(cls, real.shape, **options)
        wrapped.held = real
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Only `CountWaits` computes with them."""
        raise RuntimeError(f"{func} outside of CountWaits")


class CountWaits(TorchDispatchMode):
    """Inside, ``places`` gets the ``file:line`` of each call that needs a value of the device."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute on the CPU, and note what would wait."""
        kwargs, wrappers = kwargs or {}, {}

        def unwrap(value):
            if isinstance(value, Elsewhere):
                wrappers[id(value.held)] = value
                return value.held
            return value

        given, named = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        target = kwargs.get("device")
        if target is not None:
            named["device"] = HERE
        is_there = bool(wrappers) if target is None else torch.device(target) == THERE
        if _needs_values(func._schema.name, args) or (
            func._schema.name == "aten::_to_copy"
            and is_there != bool(wrappers)
            and not kwargs.get("non_blocking")
        ):
            self._note()
        result = func(*given, **named)

        def wrap(value):
            if not isinstance(value, torch.Tensor) or not is_there:
                return value
            return wrappers[id(value)] if id(value) in wrappers else Elsewhere(value)

        return tree_map(wrap, result)

    def _note(self):
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        frame = [f for f in frames if f.filename != __file__][-1]
        self.places.append(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}")


def _needs_values(name, args):
    """Whether an operation reads values of the device to know what it does or returns."""
    if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"):
        return isinstance(args[0], Elsewhere)
    if name == "aten::copy_":
        return isinstance(args[0], Elsewhere) != isinstance(args[1], Elsewhere)
    indices = args[1] if name in ("aten::index", "aten::index_put_") else ()
    return any(isinstance(i, Elsewhere) and i.dtype == torch.bool for i in indices)
