"""The CUDA extension ``nearfar._C``, if it was built, behind functions that take tensors."""

import functools

import torch

from nearfar.runtime.backend import Backend
from nearfar.runtime.tensors import stream_of
from nearfar.version import __version__

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _load():
    """(module, None), or (None, the reason why there is no module)."""
    try:
        import nearfar._C as module
    except ModuleNotFoundError:
        return None, "nearfar was built without its CUDA extension (no nvcc at build time, or NEARFAR_CUDA=0)"
    except ImportError as error:  # It exists, but does not fit this Python or this system.
        return None, f"nearfar._C cannot be loaded: {error}"
    if module.version() != __version__:  # An editable install whose sources have changed since.
        return None, f"nearfar._C is of nearfar {module.version()}, the package of {__version__}: install nearfar again"
    return module, None


extension, unavailable_reason = _load()
"""The module ``nearfar._C`` or None, and the reason why it is None (None if the module exists)."""


def row_sumsq(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, ``x.float().square().sum(-1)``, read in one pass by the CUDA kernel.

    The raw kernel: not differentiable, and the same bits for the same input on the same device.

    Args:
        x: (B, H, N, D) float16, bfloat16 or float32 on a CUDA device. The last dimension must be contiguous, the others
            may have any strides. Fastest if rows start at multiples of 16 bytes and are a multiple of 16 bytes long.

    Returns:
        (B, H, N) float32, contiguous, on x's device.

    Raises:
        TypeError: x has another dtype.
        ValueError: x has another rank, is not on a CUDA device, or its last dimension is not contiguous.
        RuntimeError: there is no CUDA extension (the message says why), or CUDA reported an error.
    """
    if extension is None:
        raise RuntimeError(unavailable_reason)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, H, N, D), not {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, not {x.dtype}")
    *strides, last_stride = x.stride()
    if last_stride != 1 and x.shape[-1] > 1:
        raise ValueError(f"x's last dimension must be contiguous (stride 1, not {last_stride}): pass x.contiguous()")
    if x.device.type != "cuda":
        raise ValueError(f"x must be on a CUDA device, not on {x.device}")
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    run(row_sumsq_call(x, out))
    return out


def row_sumsq_call(x, out):
    """The (launch, tensors) that fills out (B, H, N), as from `call`."""
    batches, heads, num_rows, width = x.shape
    sizes = dict(batches=batches, heads=heads, num_rows=num_rows, width=width)
    return call("row_sumsq", dtype_of(x), dict(x=x, out=out), "x", **sizes)


def call(kernel, variant, tensors, strided, **others):
    """(launch, tensors) of a kernel of the extension, for the launches of a Program.

    Args:
        kernel: its name; csrc/ declares its arguments in the header of that operator.
        variant: the dtype or the feature map that it is compiled for.
        tensors: its tensors by name; None for absent ones.
        strided: names of the tensors whose strides it takes, separated by spaces.
        others: its numbers, by name.
    """
    strides = {f"{name}_strides": tuple(tensors[name].stride()[:3]) for name in strided.split()}
    return BuiltLaunch(getattr(extension, kernel)(variant, list(tensors), **strides, **others)), tuple(tensors.values())


def run(call):
    """Launch what `call` returned, on the current stream."""
    launch, tensors = call
    launch.run(tensors, ([tensor.data_ptr() for tensor in tensors],))


def dtype_of(tensor):
    """The variant name of a tensor's dtype."""
    return _DTYPES[tensor.dtype]


def by_head(parameter):
    """The stride of a parameter with one number a head, or one for all."""
    return 1 if parameter.numel() > 1 else 0


def pair_sizes(q, k):
    """The sizes that kernels of query-key pairs take."""
    batches, heads, num_queries, width = q.shape
    return dict(
        batches=batches, heads=heads, kv_heads=k.shape[1], num_queries=num_queries, num_keys=k.shape[2], width=width
    )


KRAUSE_WIDTHS = (32, 64, 128)


def _absence_reason(name, x):
    """Why no CUDA kernel can run on this tensor or layout, whatever the operator; None if one might."""
    if extension is None:
        return unavailable_reason
    if x.device.type != "cuda":
        return f"{name} is on {x.device}; the CUDA kernels need a CUDA device"
    return None


def _krause_rows_reason(q, v):
    """Why the dtypes and widths do not fit krause_attention and its step, or None."""
    if reason := _absence_reason("q", q):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q has dtype {q.dtype}; the CUDA kernels take float16 and bfloat16"
    width, value_width = q.shape[3], v.shape[3]
    if width != value_width or width not in KRAUSE_WIDTHS:
        return f"q and v are {width} and {value_width} wide; the CUDA kernels take one width of 32, 64 or 128"
    return None


def krause_reason(q, k, v, left, right):
    """Why the CUDA kernels cannot serve calls of krause_attention with these layouts, or None."""
    if reason := _krause_rows_reason(q, v):
        return reason
    if left < 0 or right < 0 or left + right + 1 > extension.KRAUSE_WINDOW:
        return f"the CUDA kernels take windows of up to {extension.KRAUSE_WINDOW} keys, SlidingWindow(left, right)"
    reason = _rows_reason(q=q, k=k, v=v)
    if reason or torch.compiler.is_compiling():
        return reason
    return _device_reason(q.device.index, int(q.shape[3]), left + right + 1)


ROWS_REASON = "rows of {} do not start at multiples of 16 bytes, as the CUDA kernels need: pass .contiguous() tensors"


def _rows_reason(**layouts):
    """Why rows of a layout are not aligned, or None.

    A tensor is copied, and so no reason, if its last dimension is not contiguous or only its start is not aligned.
    """
    for name, x in layouts.items():
        if x.strides[3] == 1 and any(x.shape[i] > 1 and x.strides[i] % 8 for i in range(3)):
            return ROWS_REASON.format(name)
    return None


def _device_reason(index, width, window):
    """Why the device cannot run the kernels: architecture or shared memory; None if it can."""
    if reason := _architecture_reason(index):
        return reason
    needed = max(extension.krause_forward_shared_bytes(width, window), extension.krause_backward_shared_bytes(width))
    return _memory_reason(index, width, needed)


def _memory_reason(index, width, needed):
    available = extension.devices()[index]["shared_memory_per_block_optin"]
    if needed > available:
        return f"a width of {width} takes {needed} bytes of shared memory, of which the device has {available}"
    return None


@functools.cache
def _architecture_reason(index):
    """Why the device cannot run the machine code, or None. Code for X.Y runs on X.Z with Z >= Y, code for X.Ya on X.Y only."""
    major, minor = torch.cuda.get_device_capability(index)
    if not any(_runs_on(name, major, minor) for name in extension.architectures()):
        built = ", ".join(extension.architectures())
        return f"nearfar was built for the architectures {built}, not for {major}.{minor} (NEARFAR_CUDA_ARCHS)"
    return None


def _runs_on(name, major, minor):
    built_major, built_minor = divmod(int(name.rstrip("af")), 10)
    return major == built_major and (minor == built_minor or (minor > built_minor and name.isdigit()))


def aligned(tensor):
    """The tensor, or a copy if its rows do not all start at multiples of 16 bytes. Traced tensors have no address to check."""
    *strides, last_stride = tensor.stride()
    if tensor.data_ptr() % 16 or last_stride != 1 or any([stride % 8 for stride in strides]):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def aligned_boxes(tensor):
    """The tensor, or a copy if the tensor memory accelerator cannot read it: see hopper_reason and _rows_reason."""
    expanded = any([stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return tensor.contiguous() if expanded else aligned(tensor)


def aligned_starts(*tensors):
    """The tensors (without a _rows_reason), or copies of those that do not start at a multiple of 16 bytes."""
    return [aligned(tensor) if tensor.data_ptr() % 16 else tensor for tensor in tensors]


class CudaBackend(Backend):
    """Backend of kernels that require rows to start at multiples of 16 bytes."""

    def aligned(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows, or an aligned copy. Strides are multiples of 16 bytes, as there is no _rows_reason."""
        return aligned(rows) if rows.data_ptr() % 16 else rows

    def aligned_gradient(self, gradient: torch.Tensor, *_: object) -> torch.Tensor:
        return aligned(gradient)


class BuiltLaunch:
    """A launch of a kernel of the extension, with the interface of Triton launches (launch.Launch)."""

    def __init__(self, launch):
        """launch: a function (addresses, device, stream), made by the extension."""
        self._launch = launch

    def is_new(self, _surveyed):
        return False  # it was compiled with the package

    def run(self, tensors, surveyed):
        self._launch([address or 0 for address in surveyed[0]], tensors[0].get_device(), stream_of(tensors[0]))

    def bound(self, device, _kinds):
        """A function (addresses, stream). The address of an absent tensor is 0."""
        launch = self._launch
        return lambda addresses, stream: launch(addresses, device, stream)


def krause_step_reason(q, k, v, cache, addressed=True):
    """Why the CUDA kernel cannot serve this call of krause_attention_step, or None.

    addressed: whether the tensors have addresses; those of compiled code have none yet.
    """
    if reason := _krause_rows_reason(q, v):
        return reason
    for name, tensor in (("q", q), ("k", k), ("v", v)):  # if its last dimension is not contiguous, it is copied
        strided = any(tensor.shape[i] > 1 and tensor.stride(i) % 8 for i in (0, 1))
        if tensor.stride(3) == 1 and (strided or (addressed and tensor.data_ptr() % 16)):
            return ROWS_REASON.format(name)
    if addressed and (cache.k.data_ptr() % 16 or cache.v.data_ptr() % 16):
        return ROWS_REASON.format("cache.k or cache.v")
    return None if torch.compiler.is_compiling() else _architecture_reason(q.device.index)


def krause_step(q, k, v, cache, sigma, top_k, out):
    """Fill out (B, Hq, 1, D) and the cache slots of the new tokens. The call must have no krause_step_reason."""
    q, k, v = aligned_starts(q, k, v)
    if cache.k.data_ptr() % 16 or cache.v.data_ptr() % 16:  # compiled calls have no address before
        raise ValueError(ROWS_REASON.format("cache.k or cache.v"))
    steps = tuple([tensor.stride()[:2] for tensor in (q, k, v, out)])
    launch = _krause_step(q.dtype, q.shape[:2], cache.k.shape[1:], steps, by_head(sigma), 0 if top_k is None else top_k)
    launch([tensor.data_ptr() for tensor in (q, k, v, *cache, sigma, out)], q.get_device(), stream_of(q))


@functools.lru_cache(64)  # decoding makes the same call for each token
def _krause_step(dtype, rows, cached, steps, sigma_stride, top_k):
    (batches, heads), (kv_heads, window, width) = rows, cached
    return extension.krause_step(
        _DTYPES[dtype], "q k v cached_k cached_v length sigma o".split(),
        **{f"{name}_strides": of for name, of in zip("qkvo", steps, strict=True)},
        batches=batches, heads=heads, kv_heads=kv_heads, window=window, width=width, sigma_stride=sigma_stride, top_k=top_k,
    )


LINEAR_WIDTHS = (64, 128)
HADAMARD_CAUSAL_WIDTHS = (16, 16), 64  # of the factors and of the values
HADAMARD_BIDIRECTIONAL_WIDTHS = 64, 64


def linear_reason(qs, ks, v, causal, packed=False):
    """Why the CUDA kernels cannot serve calls of linear_attention or hadamard_attention with these layouts, or None."""
    if reason := _absence_reason("v", v):
        return reason
    if v.dtype == torch.float16:
        return "v has dtype torch.float16, whose range is too small for sums of features; the CUDA kernels take bfloat16"
    if v.dtype != torch.bfloat16:
        return f"v has dtype {v.dtype}; the CUDA kernels take bfloat16"
    widths, value_width = tuple([int(q.shape[3]) for q in qs]), int(v.shape[3])
    if len(widths) > 1 and not causal:
        return _hadamard_bidirectional_reason(qs, ks, v, packed)
    if len(widths) == 1 and (widths[0] != value_width or value_width not in LINEAR_WIDTHS):
        return f"q and v are {widths[0]} and {value_width} wide; the CUDA kernels take one width of 64 or 128"
    if len(widths) > 1 and (widths, value_width) != HADAMARD_CAUSAL_WIDTHS:
        return f"the factors are {widths} and v is {value_width} wide; the CUDA kernels take two factors of 16 and v of 64"
    rows = zip(("q", "q", "k", "k") if len(widths) > 1 else "qk", (*qs, *ks), strict=True)
    for name, x in (*rows, ("v", v)):
        if reason := _rows_reason(**{name: x}):
            return reason
    return None if torch.compiler.is_compiling() else _linear_device_reason(v.device.index, widths, value_width, causal)


def _hadamard_bidirectional_reason(qs, ks, v, packed):
    """The same for bidirectional attention with several factors."""
    widths, value_width = tuple([int(q.shape[3]) for q in qs]), int(v.shape[3])
    if packed:
        return "the CUDA kernels of bidirectional attention with several factors take no packed sequences"
    if widths != HADAMARD_BIDIRECTIONAL_WIDTHS or value_width not in HOPPER_WIDTHS:
        return (
            f"the factors are {widths} and v is {value_width} wide; without causality the CUDA kernels take two factors of 64 "
            "and v of 64 or 128"
        )
    factors = {f"{name}[{r}]": x for name, xs in (("qs", qs), ("ks", ks)) for r, x in enumerate(xs)}
    return hopper_reason(factors) or hopper_reason({"v": v})


def _linear_device_reason(index, widths, value_width, causal):
    if reason := _architecture_reason(index):
        return reason
    one = len(widths) == 1
    needed = extension.linear_shared_bytes(value_width, causal) if one else extension.hadamard_shared_bytes()
    return _memory_reason(index, value_width, needed)


HOPPER_WIDTHS = (64, 128)


def hopper_reason(tensors):
    """Why the CUDA kernels for Hopper cannot serve tensors with these layouts, or None. tensors: {name: layout}."""
    first, q = next(iter(tensors.items()))
    if reason := _absence_reason(first, q):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{first} has dtype {q.dtype}; the CUDA kernels take float16 and bfloat16"
    widths = [int(x.shape[3]) for x in tensors.values()]
    if widths[0] not in HOPPER_WIDTHS or any(width != widths[0] for width in widths):
        return f"{', '.join(tensors)} are {', '.join(map(str, widths))} wide; the CUDA kernels take one width of 64 or 128"
    for name, x in tensors.items():  # sizes and strides that the tensor memory accelerator does not take
        if any(size == 0 for size in x.shape):
            return f"{name} is empty, {tuple(x.shape)}; the CUDA kernels take at least one row"
        if any(x.shape[i] > 1 and x.strides[i] == 0 for i in range(3)):
            return f"{name} is expanded (a stride of 0), which the CUDA kernels cannot read: pass .contiguous() tensors"
    reason = _rows_reason(**tensors)
    return reason if reason or torch.compiler.is_compiling() else _hopper_device_reason(q.device.index)


def scale_reason(scale):
    """Why the CUDA kernels for Hopper cannot serve this scale, or None."""
    return None if scale > 0 else f"the CUDA kernels take a positive scale, not {scale}"


@functools.cache
def _hopper_device_reason(index):
    """Why the device cannot run kernels that use instructions of sm_90a, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) != (9, 0) or "90a" not in extension.architectures():
        built = ", ".join(extension.architectures())
        return f"the CUDA kernels are for compute capability 9.0, architecture 90a; device {major}.{minor}, built for {built}"
    return None


def affine_reason(q, k, v, left, packed):
    """Why the CUDA kernels cannot serve calls of softmax_attention or affine_attention with these layouts, or None."""
    if left >= 0 or packed:
        return "the CUDA kernels take no window with a limit on the left, and no packed sequences"
    return hopper_reason(dict(q=q, k=k, v=v))


SYNCHRONIZATION_WIDTH = 64


def synchronization_reason(omega, v, separate, top_k):
    """Why the CUDA kernels cannot serve calls of synchronization_attention with these layouts, or None."""
    if separate or top_k is not None:
        return "the CUDA kernels take neither omega_k nor top_k"
    reason = hopper_reason(dict(omega=omega, v=v))
    if reason is None and omega.shape[3] != SYNCHRONIZATION_WIDTH:
        return f"omega and v are {omega.shape[3]} wide; the CUDA kernels take {SYNCHRONIZATION_WIDTH}"
    return reason
