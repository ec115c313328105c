"""Faster or smaller forms of plain operations, each equal to the plain one (tested), each optional.

- `multiply_rows_in_cache`: attention probabilities formed as much at a time as a CPU's cache holds;
- `last_block_for_one_token`: the last block's projection and MLP for the class token alone;
- `selective_checkpointing`: outputs of norms and GELUs are computed again instead of kept, and
  free pages of the heap are returned to the operating system on the way;
- `compile_blocks`: blocks by torch.compile;
- `largest_component_tensor`, `crop_and_resize_batch`: tensor operations for exported programs;
- `choose_amp`: bfloat16 where the device computes with it; the one that changes results.

Inside `plain_path` the first two are off.
"""

import ctypes
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from ramslib.errors import InputError, one_line

CACHED = 2**19  # probabilities formed at a time on a CPU: two MiB
RECOMPUTED_OPS = (
    F.layer_norm,
    F.gelu,
)  # each keeps its input, the first argument, for its own gradient
TRIMMED = 2**29  # bytes kept on a CPU from one trim of the heap to the next
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


def choose_amp(amp: str, device: torch.device) -> str:
    """What ``amp`` stands for on a device: ``auto`` is bf16 where it is not emulated, else none."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not tell
        native = device.type == "cpu" and (found.get("avx512_bf16") or found.get("amx_bf16"))
    return "bf16" if native else "none"


@contextmanager
def plain_path() -> Iterator[None]:
    """Inside, attention and encoder are computed as the equations have them."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_on() -> bool:
    """Whether accelerated forms are used; an exported program takes plain ones."""
    return not (_PLAIN.get() or torch.compiler.is_exporting())


def multiply_rows_in_cache(rows: Tensor, block, probabilities: Callable) -> Tensor:
    """`attention.multiply_rows`, with few probabilities formed at a time and in the same place.

    A CPU forms as many as its cores' own caches hold, two heads at a time: half the time. Other
    devices form those of one image.

    Args:
        rows: (B, A or 1, Q, N) float32.
        block: `attention.QueryKey`.
        probabilities: `attention.attention_probabilities`.
    """
    batch, heads, tokens, _ = block.query.shape
    rows = rows.expand(batch, heads, -1, tokens)
    products = rows.new_zeros(rows.shape)
    group, count = (2, max(1, CACHED // 2 // tokens)) if rows.is_cpu else (heads, tokens)
    buffer = rows.new_empty(group * count * tokens)
    for image, first in product(range(batch), range(0, heads, group)):
        place = image, slice(first, first + group)
        part = heads_of(block, place)
        for chunk in (slice(start, start + count) for start in range(0, tokens, count)):
            weights = rows[place][..., chunk]
            shape = len(weights), weights.shape[-1], tokens
            formed = probabilities(part, chunk, buffer[: math.prod(shape)].view(shape))
            products[place].baddbmm_(weights, formed)
    return products


def heads_of(block, place: tuple[int | slice, slice]):
    """Some heads of an `attention.QueryKey`: of one image, without a dimension for images, or all.

    Args:
        block: `attention.QueryKey`.
        place: of the images and of the heads.
    """
    bias = block.bias
    if bias is not None:
        bias = bias.expand(*block.query.shape[:3], block.key.shape[2])[place]
    return block._replace(query=block.query[place], key=block.key[place], bias=bias)


@contextmanager
def last_block_for_one_token(backbone: nn.Module, class_index: int) -> Iterator[None]:
    """Inside, the last block computes the output of one class token alone.

    Where a class token is classified, nothing else is read after the last block. Its output
    projection and MLP take one token at a time, so they take only that one: the same feature and
    gradients, to rounding, for a sixteenth less work in the linear layers of a ViT-B or ViT-S.
    Models that pool otherwise are left as they are.
    """
    thread = threading.get_ident()

    def take_one(module: nn.Module, inputs: tuple) -> tuple:
        mine = threading.get_ident() == thread  # hooks are seen by all who run this model
        return (inputs[0][:, class_index : class_index + 1] if mine else inputs[0], *inputs[1:])

    with ExitStack() as hooks:
        for module in _token_wise(backbone) if is_on() or torch.compiler.is_exporting() else ():
            hooks.enter_context(module.register_forward_pre_hook(take_one))
        yield


def _token_wise(backbone: nn.Module) -> list[nn.Module]:
    """What the last block computes token by token, where only one token is read afterwards."""
    block = backbone.blocks[-1]
    parts = [getattr(getattr(block, "attn", None), "proj", None), getattr(block, "mlp", None)]
    reads_one = getattr(backbone, "cls_token", None) is not None and backbone.global_pool == "token"
    reads_one = reads_one and not hasattr(backbone, "dist_token")  # the mean of two tokens
    # a checkpointed block runs again in the backward pass, when the hooks are gone
    runs_again = getattr(backbone, "grad_checkpointing", False) and torch.is_grad_enabled()
    return parts if reads_one and not runs_again and None not in parts else []


def compile_blocks(backbone: nn.Module, **options) -> None:
    """Run all blocks of a backbone but the last by torch.compile; names of tensors stay.

    Blocks of one structure share a graph, which returns what attention was given beside the tokens,
    so that recording compiles nothing anew. The last block's parts are watched and exchanged by
    hooks, see `last_block_for_one_token`; torch.compile does not notice that these come and go.

    Args:
        backbone: of timm; a copy of it is compiled as well.
        **options: of torch.compile, such as ``backend``.
    """
    compiled = torch.compile(_block_and_attention, fullgraph=True, **options)
    for block in backbone.blocks[:-1]:
        block.forward = partial(_run_compiled, compiled, block)


def _run_compiled(compiled: Callable, block: nn.Module, *args, **kwargs) -> Tensor:
    return compiled_block(compiled, block, *args, **kwargs)[0]


def compiled_block(
    compiled: Callable, block: nn.Module, tokens: Tensor, *args, **kwargs
) -> tuple[Tensor, list[dict]]:
    """A block's tokens, and the arguments of each attention in it; modes see this one call.

    Raises:
        InputError: no compiler, or a block that cannot be compiled.
    """
    given = compiled, block, tokens, *args
    if has_torch_function((tokens,)):
        return handle_torch_function(compiled_block, (tokens,), *given, **kwargs)
    try:
        return compiled(*given[1:], **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        kind = type(block).__name__
        raise InputError(
            f"{kind} cannot be compiled ({one_line(error)}); use compile=false"
        ) from None


def _block_and_attention(block: nn.Module, *args, **kwargs) -> tuple[Tensor, list[dict]]:
    """What is compiled."""
    calls = []
    with _AttentionCalls(calls):
        tokens = type(block).forward(block, *args, **kwargs)
    return tokens, calls


class _AttentionCalls(TorchFunctionMode):
    """Appends the arguments of attention, without value and gradient, to a list."""

    def __init__(self, calls: list[dict]):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = {"query": args[0], "key": args[1], "value": None} | kwargs
            self.calls.append({name: detached(value) for name, value in given.items()})
        return func(*args, **kwargs)


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


class selective_checkpointing(TorchFunctionMode):  # noqa: N801 (a verb)
    """Inside, outputs of `RECOMPUTED_OPS` are computed again when a gradient needs them.

    A linear layer keeps its input for the gradient of its weights. Where that is the output of a
    layer norm or a GELU, whose own input is kept anyway, it can be computed again at a hundredth of
    the layer's cost. In float32 that is over a third of a Vision Transformer's activations (the
    idea: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
    2022). The same functions of the same inputs run again: the gradients are bit-identical.

    What is freed between two kept tensors leaves a hole in the heap. glibc's ``posix_memalign``,
    which torch calls, does not find a hole of just the size that it is asked for, so a quarter of
    what a forward pass takes from the system would be idle. ``malloc_trim`` returns it while the
    pass runs, for 1 to 4 % of a step's time.

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

        given = [detached(value) for value in args]
        compute = partial(func, *given, **{name: detached(kwargs[name]) for name in kwargs})
        entry = RecomputeEntry(given[0], given[0]._version, compute, tuple(output.shape))
        self.alive[address] = weakref.ref(output, forget), output._version, entry

    def _pack(self, tensor: Tensor) -> RecomputeEntry | tuple[Tensor, int]:
        """An entry for an output that is still there, unchanged: its address is then its own."""
        reference, version, entry = self.alive.get(tensor.data_ptr(), (lambda: None, None, None))
        output = reference()
        same = output is not None and tensor._version == version
        same = same and tensor.dtype == output.dtype and tensor.numel() == output.numel()
        if same and tensor.is_contiguous() and output.is_contiguous():
            return entry._replace(shape=tuple(tensor.shape))
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
            raise InputError("your code changed a tensor that the gradient needs; copy it first")
        return kept.compute().view(kept.shape) if isinstance(kept, RecomputeEntry) else source


def trim_heap() -> None:
    """Return free pages of the C library's heap to the operating system, where it is glibc."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def detached(value: object) -> object:
    """A tensor without its graph; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def largest_component_tensor(mask: Tensor) -> Tensor:
    """`dppm.largest_component` as tensor operations.

    Every foreground patch looks up the smallest label among its neighbors, passes it on to the
    patch it is named after, and takes that patch's label (hooking and pointer jumping), until
    nothing changes: six to eight rounds on random masks, a dozen on a spiral of 56 x 56 patches.
    """
    count, height, width = mask.shape
    size = height * width
    places = torch.arange(size, device=mask.device).reshape(height, width)
    labels = torch.where(mask, places, size)

    def differ(before: Tensor, labels: Tensor) -> Tensor:
        return (before != labels).any()

    def merge(before: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lowest = -F.max_pool2d(-labels.float()[:, None], 3, stride=1, padding=1)[:, 0].long()
        lowest = torch.where(mask, lowest, size).flatten(1)
        hooked = F.pad(labels.flatten(1), (0, 1), value=size)
        hooked = hooked.scatter_reduce(1, labels.flatten(1), lowest, "amin")
        return labels.clone(), hooked.gather(1, lowest).reshape(mask.shape)

    _, labels = torch.while_loop(differ, merge, (torch.full_like(labels, -1), labels))
    labels = labels.flatten(1)
    areas = labels.new_zeros(count, size + 1).scatter_add_(1, labels, mask.flatten(1).long())
    largest = areas.argmax(dim=1, keepdim=True)  # the first: a label is its first patch's place
    return (labels == largest).reshape(mask.shape) & mask


def crop_and_resize_batch(
    images: Tensor, boxes: Tensor, size: tuple[int, int], align_corners: bool
) -> Tensor:
    """`boxes.crop_and_resize` as two matrix products over the whole batch."""
    height, width = images.shape[2:]
    rows = _sample_weights(boxes[:, 0], boxes[:, 2], size[0], height, align_corners)
    columns = _sample_weights(boxes[:, 1], boxes[:, 3], size[1], width, align_corners)
    return (rows[:, None] @ images.float() @ columns[:, None].mT).to(images.dtype)


def _sample_weights(
    first: Tensor, last: Tensor, count: int, limit: int, align_corners: bool
) -> Tensor:
    """The share of each pixel in each sample between two edges: (B,) -> (B, count, limit)."""
    start = first.round().clamp(0, limit - 1)[:, None]
    end = last.round().clamp(max=limit)[:, None].maximum(start + 1)
    steps, pixels = (torch.arange(n, device=start.device) for n in (count, limit))
    if align_corners:
        inside = steps * ((end - start - 1) / max(count - 1, 1))
    else:
        inside = (steps + 0.5) * ((end - start) / count) - 0.5
    places = start + inside.clamp(min=0).minimum(end - start - 1)
    return (1 - (pixels - places[:, :, None]).abs()).clamp(min=0)
