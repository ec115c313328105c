"""Less memory for a training step: cheap outputs are computed again, free memory is returned.

A linear layer keeps its input for the gradient of its weights. Where that is the output of a layer
norm or a GELU, whose own input is kept anyway, it can be computed again at a hundredth of the
layer's cost. In float32 that is over a third of a Vision Transformer's activations (the idea:
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022). The
same functions of the same inputs run again, so the gradients are the same to the bit.

What is freed between two kept tensors leaves a hole in the heap. glibc's ``posix_memalign``, which
torch calls, does not find a hole of just the size that it is asked for, so a quarter of what a
forward pass takes from the system lies idle. ``malloc_trim`` returns it while the pass goes on, for
1 to 4 % of a step's time.
"""

import ctypes
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

RECOMPUTED_OPS = (
    F.layer_norm,
    F.gelu,
)  # each keeps its input, the first argument, for its own gradient
TRIMMED = 2**29  # bytes kept on a CPU from one trim of the heap to the next


class RecomputeEntry(NamedTuple):
    """How to get a tensor that was not kept.

    Attributes:
        source: what it is computed from.
        version: of the source; changed in place, it would give something else.
        compute: without arguments.
        shape: of the result.
    """

    source: Tensor
    version: int
    compute: Callable[[], Tensor]
    shape: tuple[int, ...]


class selective_checkpointing(TorchFunctionMode):  # noqa: N801 (reads as a verb, as record_attention)
    """Inside, outputs of `RECOMPUTED_OPS` are kept as recipes, and the heap is trimmed now and then.

    The backward pass may run outside. For any model: torch's functions are watched in the current
    thread. What is cast on its way to the linear layer (autocast does that to the outputs of
    norms), changed, or inside a checkpointed block is kept as ever.

    Raises:
        RuntimeError: in the backward pass, for a tensor that was changed in place since it was
            kept, as autograd does without this.
    """

    def __init__(self):
        super().__init__()
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.alive: dict[int, tuple[weakref.ref, int, RecomputeEntry]] = {}  # outputs, by address
        self.kept = 0  # bytes since the heap was trimmed

    def __enter__(self) -> "selective_checkpointing":
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
        if (
            func in RECOMPUTED_OPS
            and args
            and output.requires_grad
            and output.dtype == args[0].dtype
        ):
            self._remember(output, func, args, kwargs)
        return output

    def _remember(self, output: Tensor, func: Callable, args: tuple, kwargs: dict) -> None:
        """Note how an output came about, for as long as it is there."""
        address = output.data_ptr()

        def forget(reference: weakref.ref) -> None:
            if address in self.alive and self.alive[address][0] is reference:
                del self.alive[address]

        given = [_detached(value) for value in args]
        compute = partial(func, *given, **{name: _detached(kwargs[name]) for name in kwargs})
        recipe = RecomputeEntry(given[0], given[0]._version, compute, tuple(output.shape))
        self.alive[address] = weakref.ref(output, forget), output._version, recipe

    def _pack(self, tensor: Tensor) -> RecomputeEntry | tuple[Tensor, int]:
        """A recipe for an output that is still there, unchanged: its address is then its own."""
        reference, version, recipe = self.alive.get(tensor.data_ptr(), (lambda: None, None, None))
        output = reference()
        same = output is not None and tensor._version == version
        same = same and tensor.dtype == output.dtype and tensor.numel() == output.numel()
        if same and tensor.is_contiguous() and output.is_contiguous():
            return recipe._replace(shape=tuple(tensor.shape))
        self._count(tensor)
        return tensor, tensor._version

    def _count(self, tensor: Tensor) -> None:
        """Trim the heap when another `TRIMMED` bytes have been kept."""
        self.kept += tensor.nbytes if tensor.is_cpu else 0
        if self.kept >= TRIMMED:
            self.kept = 0
            trim_heap()

    def _unpack(self, kept: RecomputeEntry | tuple[Tensor, int]) -> Tensor:
        source, version, *_ = kept
        if source._version != version:
            raise RuntimeError("a tensor that the gradient needs was changed in place")
        return kept.compute().view(kept.shape) if isinstance(kept, RecomputeEntry) else source


def trim_heap() -> None:
    """Return free pages of the C library's heap to the operating system, where it is glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
