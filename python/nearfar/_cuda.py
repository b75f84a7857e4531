"""The CUDA extension ``nearfar._C``, where it was built, behind functions that take tensors."""

import functools
import re

import torch

from nearfar.runtime.backend import Backend
from nearfar.runtime.tensors import stream_of
from nearfar.version import __version__

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def _load():
    """Returns (module, None), or (None, why there is none)."""
    try:
        import nearfar._C as module
    except ModuleNotFoundError:
        return None, "nearfar was built without its CUDA extension (no nvcc at build time, or NEARFAR_CUDA=0)"
    except ImportError as error:  # It is there, but does not fit this Python or this system.
        return None, f"nearfar._C cannot be loaded: {error}"
    if module.version() != __version__:  # An editable install whose sources have moved on.
        return None, f"nearfar._C is of nearfar {module.version()}, the package of {__version__}: install nearfar again"
    return module, None


extension, unavailable_reason = _load()
"""The module ``nearfar._C`` or None, and the reason why it is None (itself None if the module is there)."""


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
    RowSumsq(x).launch([x.data_ptr(), out.data_ptr()], x.device.index, stream_of(x))
    return out


def plan_launch(kernel, variant, tensors, strides, **others):
    """A launch (addresses, device, stream) of a kernel of the extension, for any number of calls.

    Args:
        kernel: its name; csrc/ declares its arguments in the header of that operator.
        variant: the dtype or the feature map that it is compiled for.
        tensors: the names of the addresses, in their order.
        strides: {name: strides} of those tensors whose strides it takes.
        others: its numbers.
    """
    strided = {f"{name}_strides": tuple(steps[:3]) for name, steps in strides.items()}
    return getattr(extension, kernel)(variant, tensors.split(), **strided, **others)


def _steps(**tensors):
    return {name: x.stride() for name, x in tensors.items()}


def _by_head(parameter):
    """The stride of a parameter with one number a head, or one for all."""
    return 1 if parameter.numel() > 1 else 0


KRAUSE_WIDTHS = (32, 64, 128)


def _absence_reason(name, x):
    """Why there is no CUDA kernel at all for this tensor or layout, or None."""
    if extension is None:
        return unavailable_reason
    if x.device.type != "cuda":
        return f"{name} is on {x.device}; the CUDA kernels need a CUDA device"
    return None


def _krause_rows_reason(q, v):
    """What krause_attention and its step say of dtypes and widths."""
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
    """One whose last dimension is not contiguous will be copied, and so will one whose first row is not aligned."""
    for name, x in layouts.items():
        if x.strides[3] == 1 and any(x.shape[i] > 1 and x.strides[i] % 8 for i in range(3)):
            return ROWS_REASON.format(name)
    return None


def _device_reason(index, width, window):
    """Machine code has to run on the device, and a block has to fit."""
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
    """Machine code for X.Y runs on X.Z with Z >= Y, that for X.Ya on X.Y alone."""
    major, minor = torch.cuda.get_device_capability(index)
    if not any(_runs_on(name, major, minor) for name in extension.architectures()):
        built = ", ".join(extension.architectures())
        return f"nearfar was built for the architectures {built}, not for {major}.{minor} (NEARFAR_CUDA_ARCHS)"
    return None


def _runs_on(name, major, minor):
    built_major, built_minor = divmod(int(name.rstrip("af")), 10)
    return major == built_major and (minor == built_minor or (minor > built_minor and name.isdigit()))


def aligned(tensor):
    """The tensor, or a copy where its rows do not all start at multiples of 16 bytes. What is traced has no address to ask."""
    *strides, last_stride = tensor.stride()
    if tensor.data_ptr() % 16 or last_stride != 1 or any([stride % 8 for stride in strides]):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def aligned_boxes(tensor):
    """The tensor, or a copy where the tensor memory accelerator does not read it: see hopper_reason and _rows_reason."""
    expanded = any([stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return tensor.contiguous() if expanded else aligned(tensor)


def aligned_starts(*tensors):
    """Tensors without a _rows_reason; copies of those that do not start at a multiple of 16 bytes."""
    return [aligned(tensor) if tensor.data_ptr() % 16 else tensor for tensor in tensors]


class CudaBackend(Backend):
    """Of kernels whose rows start at multiples of 16 bytes."""

    def aligned(self, rows):
        """Their strides are multiples of 16 bytes where there is no _rows_reason."""
        return aligned(rows) if rows.data_ptr() % 16 else rows

    def aligned_gradient(self, gradient, *_):
        return aligned(gradient)


def _where(tensors):
    """Device and stream of what a launch is given, or a call."""
    first = tensors[0][0] if type(tensors[0]) is tuple else tensors[0]
    return first.get_device(), stream_of(first)


class BuiltLaunch:
    """A launch among those of Triton's kernels (launch.Launch), with everything fixed but its tensors.

    `launch` is from `plan_launch`, and takes `addresses` of what the launch is given.
    """

    def is_new(self, _surveyed):
        return False  # it was compiled with the package

    def run(self, tensors, surveyed):
        self.launch(self.addresses([address or 0 for address in surveyed[0]]), *_where(tensors))

    def bound(self, device, _kinds):
        """A function (addresses, stream); an address of nothing is 0."""
        launch, order = self.launch, self.addresses
        return lambda addresses, stream: launch(order(addresses), device, stream)

    def addresses(self, given):
        """Those of the tensors, tuples of tensors among them, as `plan_launch` names them."""
        return given


def _pair_sizes(q, k):
    batches, heads, num_queries, width = q.shape
    return dict(
        batches=batches, heads=heads, kv_heads=k.shape[1], num_queries=num_queries, num_keys=k.shape[2], width=width
    )  # fmt: skip


class KrauseForward(BuiltLaunch):
    """A launch of krause_forward, for tensors without a krause_reason that start at multiples of 16 bytes.

    It is given q, k, v, sigma, token_bounds, o, lse, bits and fills o (B, Hq, N, D), lse (B, Hq, N) and, with top_k, bits
    (B, Hq, N, words).
    """

    def __init__(self, q, k, v, sigma, left, right, top_k, o):
        self.launch = plan_launch(
            "krause_forward", _DTYPES[q.dtype], "q k v sigma token_bounds o lse bits", _steps(q=q, k=k, v=v, o=o),
            **_pair_sizes(q, k), sigma_stride=_by_head(sigma), back=left, ahead=right,
            top_k=0 if top_k is None else min(top_k, extension.KRAUSE_WINDOW),
        )  # fmt: skip


class KrauseBackward(BuiltLaunch):
    """A launch of krause_backward, likewise.

    It is given q, k, v, o, do, sigma, lse, bits, token_bounds, dq, dk, dv, dsigma and a workspace of `partials_shape`; the
    gradients, which it fills, are shaped like what they belong to.
    """

    def __init__(self, q, k, v, o, do, sigma, left, right, dq, dk, dv):
        self.launch = plan_launch(
            "krause_backward", _DTYPES[q.dtype],
            "q k v o grad_o sigma lse bits token_bounds dq dk dv dsigma partials",
            _steps(q=q, k=k, v=v, o=o, grad_o=do, dq=dq, dk=dk, dv=dv),
            **_pair_sizes(q, k), sigma_stride=_by_head(sigma), back=left, ahead=right,
        )  # fmt: skip

    @staticmethod
    def partials_shape(q, k):
        """Float32: a partial sum of dsigma for each strip of a head, of which there are at most as many as tiles."""
        return *q.shape[:2], -(-max(q.shape[2], k.shape[2]) // extension.KRAUSE_TILE)


class RowSumsq(BuiltLaunch):
    """A launch of row_sumsq. It is given x and out (B, H, N), float32, which it fills."""

    def __init__(self, x):
        batches, heads, num_rows, width = x.shape
        sizes = dict(batches=batches, heads=heads, num_rows=num_rows, width=width)
        self.launch = plan_launch("row_sumsq", _DTYPES[x.dtype], "x out", _steps(x=x), **sizes)


def krause_step_reason(q, k, v, cache, addressed=True):
    """Why the CUDA kernel cannot serve this call of krause_attention_step, or None.

    addressed: whether the tensors have addresses; those of compiled code have none yet.
    """
    if reason := _krause_rows_reason(q, v):
        return reason
    for name, tensor in (("q", q), ("k", k), ("v", v)):  # one whose last dimension is not contiguous will be copied
        strided = any(tensor.shape[i] > 1 and tensor.stride(i) % 8 for i in (0, 1))
        if tensor.stride(3) == 1 and (strided or (addressed and tensor.data_ptr() % 16)):
            return ROWS_REASON.format(name)
    if addressed and (cache.k.data_ptr() % 16 or cache.v.data_ptr() % 16):
        return ROWS_REASON.format("cache.k or cache.v")
    return None if torch.compiler.is_compiling() else _architecture_reason(q.device.index)


def krause_step(q, k, v, cache, sigma, top_k, out):
    """Fill out (B, Hq, 1, D) and the slots of the new tokens, for a call without krause_step_reason."""
    q, k, v = aligned_starts(q, k, v)
    if cache.k.data_ptr() % 16 or cache.v.data_ptr() % 16:  # compiled code learns of it here
        raise ValueError(ROWS_REASON.format("cache.k or cache.v"))
    steps = tuple([tensor.stride()[:2] for tensor in (q, k, v, out)])
    launch = _krause_step(q.dtype, q.shape[:2], cache.k.shape[1:], steps, _by_head(sigma), 0 if top_k is None else top_k)
    launch([tensor.data_ptr() for tensor in (q, k, v, *cache, sigma, out)], q.get_device(), stream_of(q))


@functools.lru_cache(64)  # decoding makes the same call for each token
def _krause_step(dtype, rows, cached, steps, sigma_stride, top_k):
    (batches, heads), (kv_heads, window, width) = rows, cached
    return plan_launch(
        "krause_step", _DTYPES[dtype], "q k v cached_k cached_v length sigma o", dict(zip("qkvo", steps, strict=True)),
        batches=batches, heads=heads, kv_heads=kv_heads, window=window, width=width, sigma_stride=sigma_stride, top_k=top_k,
    )  # fmt: skip


LINEAR_WIDTHS = (64, 128)
HADAMARD_CAUSAL_WIDTHS = (16, 16), 64  # of the factors and of the values
HADAMARD_BIDIRECTIONAL_WIDTHS = 64, 64


def linear_reason(qs, ks, v, causal, packed=False):
    """Why the CUDA kernels cannot serve calls of linear_attention or hadamard_attention with these layouts, or None."""
    if reason := _absence_reason("v", v):
        return reason
    if v.dtype == torch.float16:
        return "v has dtype torch.float16, whose range sums of features leave; the CUDA kernels take bfloat16"
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


class Walk(BuiltLaunch):
    """A launch of a linear_ kernel of causal attention, or of a hadamard_ one where there are two factors.

    It is given what its namesake in triton_kernels/walk.py is given, all factors in a row; they, v and do start at multiples of
    16 bytes.
    """

    # By Triton's name: the kernel's, its tensors, and those with strides. With two factors each q and k is two.
    _KERNELS = {
        "walk_read": ("forward", "q k v states norms o inverse pieces", "q k v o"),
        "walk_grad_queries": (
            "grad_queries", "q k v grad_o inverse states norms dq weights pieces", "q k v grad_o dq"
        ),
        "walk_grad_keys": (
            "grad_keys", "k v q grad_o inverse weights states norms dk dv pieces", "k v q grad_o dk dv"
        ),
    }  # fmt: skip

    def __init__(self, problem, kernel, strides, eps=()):
        """Arguments as for linear_launch.plan_walk. eps: (eps,) for walk_read and walk_grad_queries."""
        name, tensors, strided = self._KERNELS[kernel]
        width = dict(width=problem.widths[0])
        if len(problem.widths) > 1:
            tensors, strided = (re.sub(r"\b(d?[qk])\b", r"\g<1>1 \g<1>2", names) for names in (tensors, strided))
            width = {}
        num_pieces, piece_length = problem.spans
        self.launch = plan_launch(
            f"{'hadamard' if len(problem.widths) > 1 else 'linear'}_causal_{name}", problem.feature_map, tensors,
            dict(zip(strided.split(), strides, strict=True)), **_group(problem), **width,
            num_tokens=problem.num_queries, num_pieces=num_pieces, piece_length=piece_length, **_eps(eps),
        )  # fmt: skip


def _group(problem):
    return dict(batches=problem.batch, heads=problem.query_heads, kv_heads=problem.key_heads)


def _eps(eps):
    return dict(zip(("eps",), eps, strict=False))


def _tokens(problem, of_queries):
    """Their number and their heads: of the queries or of the keys."""
    return (problem.num_queries, problem.query_heads) if of_queries else (problem.num_keys, problem.key_heads)


class LinearBidirectional(BuiltLaunch):
    """A launch of a linear_bidirectional_ kernel, of bidirectional attention.

    It is given the tensors of _KERNELS; q, k, v and do start at multiples of 16 bytes.
    """

    _KERNELS = {  # tensors, and those with strides
        "sums": ("k v partials partial_norms pieces", "k v"),
        "read": ("q states norms o inverse pieces", "q o"),
        "grad_queries": ("q grad_o inverse states norms dq partials partial_norms pieces", "q grad_o dq"),
        "grad_keys": ("k v states norms dk dv pieces", "k v dk dv"),
    }

    def __init__(self, problem, kernel, strides, eps=()):
        """kernel: sums, read, grad_queries or grad_keys. strides: as _KERNELS lists them. eps: (eps,) for read."""
        tensors, strided = self._KERNELS[kernel]
        tokens, _ = _tokens(problem, kernel in ("read", "grad_queries"))
        self.launch = plan_launch(
            f"linear_bidirectional_{kernel}", problem.feature_map, tensors, dict(zip(strided.split(), strides, strict=True)),
            **_group(problem), num_tokens=tokens, width=problem.widths[0], num_pieces=problem.num_pieces(tokens),
            piece_length=problem.piece_length, num_states=problem.num_states, **_eps(eps),
        )  # fmt: skip


def _state_sizes(problem, of_queries):
    tokens, heads = _tokens(problem, of_queries)
    return dict(
        batches=problem.batch, heads=heads, state_heads=problem.key_heads, num_tokens=tokens, width=problem.value_width
    )  # fmt: skip


class HadamardAccumulate(BuiltLaunch):
    """A launch of hadamard_bidirectional_accumulate in the place of `accumulate`.

    It is given what that is given, and `workspaces` ahead of the pieces, which it does not read; xs and y start at multiples of
    16 bytes.
    """

    def __init__(self, problem, of_queries, x_strides, y_strides):
        """Arguments as for linear_launch.plan_accumulate."""
        length, _ = _tokens(problem, of_queries)
        self.launch = plan_launch(
            "hadamard_bidirectional_accumulate", problem.feature_map,
            "outer inner y factors weights partials partial_norms outer_tiles inner_tiles weighted_tiles counter",
            dict(zip(("outer", "inner", "y"), (*x_strides, y_strides), strict=True)),
            **_state_sizes(problem, of_queries), num_pieces=problem.num_pieces(length), piece_length=problem.piece_length,
        )  # fmt: skip

    @staticmethod
    def workspaces(problem, of_queries, y):
        """Tiles of features, those of queries weighted, too; a counter and tiles of norms, which HadamardRead takes."""
        length, heads = _tokens(problem, of_queries)
        chunk = extension.HADAMARD_BIDIRECTIONAL_CHUNK
        shape = problem.batch, heads, -(-length // chunk), chunk, extension.HADAMARD_BIDIRECTIONAL_WIDTH
        weighted = y.new_empty(shape) if of_queries else None
        norms = None if of_queries else y.new_empty(problem.batch, problem.key_heads, 2, *shape[3:])
        return y.new_empty(shape), y.new_empty(shape), weighted, y.new_empty(1, dtype=torch.int32), norms

    def addresses(self, given):
        xs, *others, _, _ = given
        return *xs, *others


class HadamardRead(BuiltLaunch):
    """A launch of hadamard_bidirectional_read in the place of `read` without pairs, likewise."""

    def __init__(self, problem, of_keys, x_strides, out_strides, eps):
        """Arguments as for linear_launch.plan_read."""
        self.launch = plan_launch(
            "hadamard_bidirectional_read", problem.feature_map, "outer inner states norms out inverse counter norm_tiles",
            dict(zip(("outer", "inner", "out"), (*x_strides, out_strides), strict=True)),
            **_state_sizes(problem, not of_keys), eps=eps,
        )  # fmt: skip

    def addresses(self, given):
        xs, _, _, _, *others, _ = given
        return *xs, *others


HOPPER_WIDTHS = (64, 128)


def hopper_reason(tensors):
    """Why CUDA kernels that are for Hopper cannot serve tensors of these layouts, by name, or None."""
    first, q = next(iter(tensors.items()))
    if reason := _absence_reason(first, q):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{first} has dtype {q.dtype}; the CUDA kernels take float16 and bfloat16"
    widths = [int(x.shape[3]) for x in tensors.values()]
    if widths[0] not in HOPPER_WIDTHS or any(width != widths[0] for width in widths):
        return f"{', '.join(tensors)} are {', '.join(map(str, widths))} wide; the CUDA kernels take one width of 64 or 128"
    for name, x in tensors.items():  # the tensor memory accelerator takes no such sizes and strides
        if any(size == 0 for size in x.shape):
            return f"{name} is empty, {tuple(x.shape)}; the CUDA kernels take at least one row"
        if any(x.shape[i] > 1 and x.strides[i] == 0 for i in range(3)):
            return f"{name} is expanded (a stride of 0), which the CUDA kernels cannot read: pass .contiguous() tensors"
    reason = _rows_reason(**tensors)
    return reason if reason or torch.compiler.is_compiling() else _hopper_device_reason(q.device.index)


def scale_reason(scale):
    """Why the same kernels cannot serve this scale, or None."""
    return None if scale > 0 else f"the CUDA kernels take a positive scale, not {scale}"


@functools.cache
def _hopper_device_reason(index):
    """Kernels whose instructions only sm_90a has."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) != (9, 0) or "90a" not in extension.architectures():
        built = ", ".join(extension.architectures())
        return f"the CUDA kernels are for compute capability 9.0, architecture 90a; device {major}.{minor}, built for {built}"
    return None


def _whole_tiles(length, tile):
    return -(-length // tile) * tile


def statistics(q, k, left, right, scale, lse, entropy, max_weight, max_key, mass):
    """Fill lse, entropy, max_weight, max_key (B, Hq, N) and mass (B, Hq, M), all contiguous."""
    q, k = aligned_starts(q, k)
    levels = lse.new_empty(*q.shape[:2], _whole_tiles(q.shape[2], extension.DIAGNOSTICS_TILE))
    launch = plan_launch(
        "statistics", _DTYPES[q.dtype], "q k lse entropy max_weight max_key mass levels", _steps(q=q, k=k),
        **_pair_sizes(q, k), left=left, right=right, scale=scale,
    )  # fmt: skip
    given = q, k, lse, entropy, max_weight, max_key, mass, levels
    launch([tensor.data_ptr() for tensor in given], q.get_device(), stream_of(q))


def geometry(q, k, v, left, right, scale, scores, chosen, s, shift, excess, farthest, precision, recall, f_score, centre):
    """Fill precision, recall, f_score (B, Hq, N), by way of workspaces that triton_kernels/diagnostics_launch.py describes.

    centre: called once scores and chosen are filled, to fill s, shift, excess and farthest.
    """
    q, k, v = aligned_starts(q, k, v)
    length = v.shape[2]
    squares = torch.nn.functional.pad(row_sumsq(v), (0, _whole_tiles(length, extension.DIAGNOSTICS_TILE) - length))
    names = "q k v scores chosen s shift farthest excess squares precision recall f_score"
    sizes = _pair_sizes(q, k) | dict(top_n=scores.shape[3], left=left, right=right, scale=scale)
    call = _DTYPES[q.dtype], names, _steps(q=q, k=k, v=v)
    select, separate = (plan_launch(f"geometry_{name}", *call, **sizes) for name in ("select", "separate"))
    given = q, k, v, scores, chosen, s, shift, farthest, excess, squares, precision, recall, f_score
    where = [tensor.data_ptr() for tensor in given], q.get_device(), stream_of(q)
    select(*where)
    centre()
    separate(*where)


def affine_reason(q, k, v, left, packed):
    """Why the CUDA kernels cannot serve calls of softmax_attention or affine_attention with these layouts, or None."""
    if left >= 0 or packed:
        return "the CUDA kernels take no window with a limit on the left, and no packed sequences"
    return hopper_reason(dict(q=q, k=k, v=v))


def affine_terms_shape(q):
    """Of a workspace of affine_backward, float32."""
    return 4, *q.shape[:2], _whole_tiles(q.shape[2], extension.AFFINE_TERMS)


class AffineForward(BuiltLaunch):
    """A launch of affine_forward, for tensors without a affine_reason that start at multiples of 16 bytes.

    It is given q, k, v, alpha, beta, sink, sums, o, u, lse, a counter and fills o, u and lse.
    """

    def __init__(self, q, k, v, o, right, scale):
        self.launch = plan_launch(
            "affine_forward", _DTYPES[q.dtype], "q k v alpha beta sink sums o u lse counter", _steps(q=q, k=k, v=v, o=o),
            **_pair_sizes(q, k), right=right, scale=scale,
        )  # fmt: skip


class AffineBackward(BuiltLaunch):
    """A launch of affine_backward, likewise.

    It is given q, k, v, u, do, alpha, beta, sums, lse, dq, dk, dv, m, dbeta, terms, counters and fills those from dq to dbeta.
    """

    def __init__(self, q, k, v, u, do, dq, dk, dv, exact, right, scale):
        self.launch = plan_launch(
            "affine_backward", _DTYPES[q.dtype],
            "q k v u grad_o alpha beta sums lse dq dk dv m dbeta terms counters",
            _steps(q=q, k=k, v=v, u=u, grad_o=do, dq=dq, dk=dk, dv=dv),
            **_pair_sizes(q, k), exact=exact, right=right, scale=scale,
        )  # fmt: skip


SYNCHRONIZATION_WIDTH = 64


def synchronization_reason(omega, v, separate, top_k):
    """Why the CUDA kernels cannot serve calls of synchronization_attention with these layouts, or None."""
    if separate or top_k is not None:
        return "the CUDA kernels take neither omega_k nor top_k"
    reason = hopper_reason(dict(omega=omega, v=v))
    if reason is None and omega.shape[3] != SYNCHRONIZATION_WIDTH:
        return f"omega and v are {omega.shape[3]} wide; the CUDA kernels take {SYNCHRONIZATION_WIDTH}"
    return reason


def _token_sizes(omega):
    batches, heads, num_tokens, _ = omega.shape
    return dict(batches=batches, heads=heads, num_tokens=num_tokens)


class SynchronizationForward(BuiltLaunch):
    """A launch of synchronization_forward.

    It is given what `attend` in triton_kernels/synchronization.py is given and a counter, with lists for tiles of `rows` tokens
    that tell of the tiles' cells from bit `members` on; its omega and v start at multiples of 16 bytes.
    """

    def __init__(self, omega, v, bandwidth, o, causal):
        self.rows, self.members = extension.SYNCHRONIZATION_ROWS, extension.SYNCHRONIZATION_MEMBERS
        self.launch = plan_launch(
            "synchronization_forward", _DTYPES[omega.dtype], "omega v squares c bandwidth o total lists counts counter",
            _steps(omega=omega, v=v, o=o), **_token_sizes(omega), bandwidth_stride=_by_head(bandwidth), causal=causal,
        )  # fmt: skip

    def addresses(self, given):
        omega, _, v, squares, _, *others = given  # without those of the keys, which are the queries
        return omega, v, squares, *others


class SynchronizationBackward(BuiltLaunch):
    """A launch of synchronization_backward likewise, in the place of `grad_tokens`; its do starts like omega and v."""

    def __init__(self, omega, v, bandwidth, do, dw, dv, grad_floor):
        self.rows, self.members = extension.SYNCHRONIZATION_GRAD_ROWS, extension.SYNCHRONIZATION_MEMBERS
        self.launch = plan_launch(
            "synchronization_backward", _DTYPES[omega.dtype],
            "omega v squares c bandwidth grad_o inverse shift dw dv dalpha dradius lists counts counter",
            _steps(omega=omega, v=v, grad_o=do, dw=dw, dv=dv),
            **_token_sizes(omega), bandwidth_stride=_by_head(bandwidth), grad_floor=grad_floor,
        )  # fmt: skip
