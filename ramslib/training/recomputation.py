"""Selective recomputation: what is cheap to compute again is not kept for the backward pass.

A linear layer keeps its input for the gradient of its weights. Where that is the output of a layer
norm or a GELU, whose own input is kept anyway, the input can be computed again at a hundredth of
the layer's cost: over a third of a Vision Transformer's activations need not be kept (the idea:
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022). The
same functions of the same inputs run again, so the gradients are the same to the bit.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

CHEAP = (F.layer_norm, F.gelu)  # each keeps its input for its own gradient


class Recipe(NamedTuple):
    """How to get a tensor that was not kept: a function without arguments, and a shape."""

    compute: Callable[[], Tensor]
    shape: tuple[int, ...]


class recompute_activations(TorchFunctionMode):  # noqa: N801 (reads as a verb, as record_attention)
    """Inside, cheap activations are kept as recipes; the backward pass may run outside.

    From outside and for any model: torch's functions are watched in the current thread. What is
    cast between function and layer (some of autocast's tensors), changed by dropout, or inside a
    checkpointed block is kept as ever.
    """

    def __init__(self):
        super().__init__()
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.alive: dict[int, tuple[weakref.ref, Callable[[], Tensor]]] = {}  # by address

    def __enter__(self) -> "recompute_activations":
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)
        self.alive.clear()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Pass every call on, remembering how cheap outputs came about."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in CHEAP and output.requires_grad:  # else a frozen block's input would be kept
            given = [value.detach() if isinstance(value, Tensor) else value for value in args]
            compute = partial(func, *given, **kwargs)
            self.alive[output.data_ptr()] = weakref.ref(output), compute
        return output

    def _pack(self, tensor: Tensor) -> Tensor | Recipe:
        """A recipe for an output of `CHEAP` that is still there: its address is then its own."""
        reference, compute = self.alive.get(tensor.data_ptr(), (lambda: None, None))
        output = reference()
        if output is None or output.numel() != tensor.numel():
            return tensor
        if not (output.is_contiguous() and tensor.is_contiguous()):
            return tensor
        return Recipe(compute, tuple(tensor.shape))

    def _unpack(self, kept: Tensor | Recipe) -> Tensor:
        return kept.compute().view(kept.shape) if isinstance(kept, Recipe) else kept
