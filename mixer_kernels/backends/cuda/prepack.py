"""Weights as the CUDA kernels take them: cast, zero-padded, transposed, LayerNorm folded into W3.

They are made in the call that uses them, by one launch, into one piece of memory, and go with it: nothing is kept that
a later write to a parameter could make stale. A weight that is already what a kernel takes is passed on as it is.

Kernels take addresses. What gives them holds the memory too, until the kernels that read it are launched: it is freed
in the order of the stream. ``Packing`` makes tensors of it, for an owner who promises that weights stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Half
from ..rounding import round_up
from .library import TYPES, loaded, pointer, stream_of

Parameter = Tensor | None


class TokenWeights(NamedTuple):
    """Of the token half, for the fused kernel, for that of csrc/sm90 or for the two products; as in csrc/block.h."""

    hidden: int  # D_S
    wide_hidden: int  # D
    padded_tokens: int  # S_pad
    w1: int  # [D, S_pad] (fused), [S_pad, D] (sm90: its transpose), [D_S, S_pad]
    b1: int  # [D] float32 (fused), [D_S]
    w2: int  # [S_pad, D] (fused), [S, D_pad]
    b2: int  # [S_pad] float32 (fused), [S]
    gamma: int  # [C] float32, or 0
    beta: int
    sm90: bool


class FirstWeights(NamedTuple):
    """Of fc1 of the channel half; ``wg``, ``wb`` where LayerNorm is folded, else ``b3``, ``gamma``, ``beta``."""

    hidden: int  # D_C
    w3: int  # [D_C, C_pad]
    b3: int = 0  # [D_C] float32, or 0
    wg: int = 0  # [D_C] float32
    wb: int = 0
    scale: int = 0  # in float16 only
    gamma: int = 0  # [C] float32, or 0
    beta: int = 0


class SecondWeights(NamedTuple):
    """Of fc2 of the channel half."""

    w4: int  # [C, D_pad]
    b4: int  # [C] float32, or 0


class TokenBackward(NamedTuple):
    """What the kernels of the token half's backward take in place of its parameters."""

    hidden: int
    wide_hidden: int
    padded_tokens: int
    w1: int  # as in TokenWeights
    b1: int
    w2: int  # as in TokenWeights (sm90), else its transpose, with the shape of w1
    gamma: int
    beta: int
    sm90: bool
    packed: Packed


class ChannelBackward(NamedTuple):
    """What the kernels of the channel half's backward take in place of its parameters."""

    first: FirstWeights | None  # to compute z again
    w4: int  # [D_C, C_pad]: its transpose
    gamma: int
    beta: int
    sm90: bool | None  # as the forward pass takes it
    packed: Packed


# ------------------------------------------------------------------------------------------------------- forward pass


class BlockPacks(NamedTuple):
    """The packs of the forward pass of a whole block, for one launch."""

    layout: Layout
    sizes: tuple[int, int, int]  # as in TokenWeights
    hidden: int  # as in FirstWeights
    sm90: bool

    def at(self, base: int) -> tuple[tuple[TokenWeights, FirstWeights, SecondWeights], list[tuple], tuple | None]:
        """All that it takes with packs in memory at ``base``, and what fills them."""
        addresses, folds, jobs, folding = self.layout.at(base)
        first = _first_weights(self.hidden, addresses[6:], folds)
        token = TokenWeights(*self.sizes, *addresses[:6], self.sm90)
        return (token, first, SecondWeights(*addresses[-2:])), jobs, folding


def block_packs(tokens: Half, channels: Half, dtype: torch.dtype, folded: bool, sm90: bool) -> BlockPacks:
    """As ``Packing`` for both halves, but by one launch; ``folded``, ``sm90``: as there."""
    sizes, of_tokens = _token(tokens, dtype, sm90)
    of_channels, fold = _channel(channels, dtype, folded)
    return BlockPacks(lay_out([*of_tokens, *of_channels], fold), sizes, channels.w_in.shape[0], sm90)


class Packing:
    """The weights of one forward pass in ``dtype``, to be held until the kernels that read them are launched.

    What is in ``kept``, by name, was packed before for an owner who promises that weights stay, and is taken as it is;
    all else is packed in the call.
    """

    def __init__(self, dtype: torch.dtype, kept: Mapping[str, Tensor] | None = None) -> None:
        self.dtype = dtype
        self._kept = kept
        self._packed: list[tuple[str, Sequence[str], Sequence[Wanted], Packed]] = []

    def token(self, half: Half, sm90: bool) -> TokenWeights:
        """All that the token half takes; ``sm90``: for the kernel of csrc/sm90."""
        sizes, wanted = _token(half, self.dtype, sm90)
        names = ("w1", "b1", "w2", "b2", "gamma", "beta")
        return TokenWeights(*sizes, *self._addresses("token sm90" if sm90 else "token", names, wanted, None), sm90)

    def channel(self, half: Half, folded: bool) -> tuple[FirstWeights, SecondWeights]:
        """All that the channel half takes."""
        wanted, fold = _channel(half, self.dtype, folded)
        if fold is None:
            names = ("w3", "b3", "gamma", "beta", "w4", "b4")
            addresses = self._addresses("channel", names, wanted, None)
            return _first_weights(half.w_in.shape[0], addresses, ()), SecondWeights(*addresses[4:])
        names = ("w4", "b4", "w3", "wg", "wb", "scale")
        addresses = self._addresses("channel folded", names, wanted, fold)
        return _first_weights(half.w_in.shape[0], (), addresses[2:]), SecondWeights(*addresses[:2])

    @property
    def made(self) -> dict[str, Tensor]:
        """What was packed now, by name. A weight that needs nothing is no pack: its owner keeps it."""
        made = {}
        for kind, names, wanted, packed in self._packed:
            for name, each, address in zip(names, wanted, packed.addresses + packed.folds, strict=True):
                t = _as_tensor(each, address, packed)
                if t is not None and (each.w is None or address != each.w.data_ptr()):
                    made[self._name(kind, name)] = t
        return made

    def _addresses(self, kind: str, names: Sequence[str], wanted: Sequence[Wanted], fold: Fold | None) -> list[int]:
        """Of ``wanted``, and of the four results of ``fold`` behind them."""
        tensors = [self._kept.get(self._name(kind, name)) for name in names] if self._kept else ()
        if any(t is not None for t in tensors):  # they were made together: the others need nothing
            sources = [each.w for each in wanted] + [None] * 4
            return [pointer(source if t is None else t) for t, source in zip(tensors, sources, strict=False)]
        packed = pack(wanted, fold, wanted[0].w)
        self._packed.append((kind, names, (*wanted, *(fold.results() if fold else ())), packed))
        return packed.addresses + packed.folds

    def _name(self, kind: str, name: str) -> str:
        return f"{kind} {self.dtype} {name}"


# ------------------------------------------------------------------------------------------------------ backward pass


def token_backward_packs(half: Half, dtype: torch.dtype, sm90: bool) -> tuple[Tensor, TokenBackward]:
    """``w1`` in ``dtype`` for the plain product that follows the kernels, and what these take. One launch."""
    w1 = half.w_in
    sizes, (first, bias, second, _, *norm) = _token(half, dtype, sm90)
    if not sm90:
        second = Wanted(half.w_out, dtype, first.rows, first.columns, transposed=True)
    packed = pack([first, bias, second, *norm], None, w1)
    if not loaded().padded_tokens(w1.shape[1]) and w1.dtype is not dtype:
        w1 = _as_tensor(first, packed.addresses[0], packed)[:, : w1.shape[1]]
    return w1, TokenBackward(*sizes, *packed.addresses, sm90, packed)


def channel_backward_packs(
    half: Half, dtype: torch.dtype, *, folded: bool, keeps_z: bool, norm: bool, sm90: bool | None = None
) -> tuple[Tensor, ChannelBackward]:
    """``w3`` in ``dtype`` for the plain product that follows the kernels, and what these take. One launch.

    ``keeps_z``: z need not be computed again. ``norm``: LayerNorm's backward will run, and the plain product.
    """
    gamma, beta, w3, b3, w4, _ = half
    again = not keeps_z
    fold = Fold(w3, b3, gamma, beta, dtype) if again and folded else None
    applied = again and not folded
    product = _product(w3, dtype) if applied or (norm and w3.dtype is not dtype) else NOTHING
    w4t = Wanted(w4, dtype, w4.shape[1], round_up(w4.shape[0], loaded().K_MULTIPLE), transposed=True)
    norm = norm or applied
    wanted = [
        product,
        _vector(b3) if applied else NOTHING,
        _vector(gamma) if norm else NOTHING,
        _vector(beta) if norm else NOTHING,
        w4t,
    ]
    packed = pack(wanted, fold, w3)
    first = _first_weights(half.w_in.shape[0], packed.addresses, packed.folds) if again else None
    if w3.dtype is not dtype and product is not NOTHING:
        w3 = _as_tensor(product, packed.addresses[0], packed)[:, : w3.shape[1]]
    _, _, gamma, beta, w4 = packed.addresses
    return w3, ChannelBackward(first, w4, gamma, beta, sm90, packed)


# --------------------------------------------------------------------------------------------- what is to be packed


class Wanted(NamedTuple):
    """``w [M, K]``, its transpose or a vector, taken as a row: in ``dtype``, zero-padded to ``[rows, columns]``."""

    w: Parameter  # None: zeros
    dtype: torch.dtype
    rows: int
    columns: int
    transposed: bool = False


NOTHING = Wanted(None, torch.float32, 0, 0)


class Fold(NamedTuple):
    """W', wg, wb and scale of equation (8) in docs/maths.md, from ``w3 [D_C, C]``."""

    w3: Tensor
    b3: Parameter
    gamma: Parameter
    beta: Parameter
    dtype: torch.dtype

    def results(self) -> tuple[Wanted, Wanted, Wanted, Wanted]:
        """Their dtypes and sizes. Only float16 needs a scale."""
        hidden = self.w3.shape[0]
        row = Wanted(None, torch.float32, 1, hidden)
        return _product(self.w3, self.dtype), row, row, row if self.dtype is torch.float16 else NOTHING


def _token(half: Half, dtype: torch.dtype, sm90: bool) -> tuple[tuple[int, int, int], list[Wanted]]:
    """The three sizes of TokenWeights; w1, b1, w2, b2, gamma, beta."""
    kernels, (gamma, beta, w1, b1, w2, b2) = loaded(), half
    hidden, tokens = w1.shape
    norm = [_vector(gamma), _vector(beta)]
    padded_tokens = kernels.sm90_padded_tokens(tokens) if sm90 else kernels.padded_tokens(tokens)
    if not padded_tokens:
        padded_tokens = round_up(tokens, kernels.K_MULTIPLE)
        return (hidden, hidden, padded_tokens), [
            Wanted(w1, dtype, hidden, padded_tokens),
            Wanted(b1, torch.float32, 1, hidden),
            _product(w2, dtype),
            Wanted(b2, torch.float32, 1, tokens),
            *norm,
        ]
    wide_hidden = round_up(hidden, kernels.SM90_HIDDEN_MULTIPLE if sm90 else kernels.HIDDEN_MULTIPLE)
    first = (padded_tokens, wide_hidden) if sm90 else (wide_hidden, padded_tokens)
    return (hidden, wide_hidden, padded_tokens), [
        Wanted(w1, dtype, *first, transposed=sm90),
        Wanted(b1, torch.float32, 1, wide_hidden),
        Wanted(w2, dtype, padded_tokens, wide_hidden),
        Wanted(b2, torch.float32, 1, padded_tokens),
        *norm,
    ]


def _channel(half: Half, dtype: torch.dtype, folded: bool) -> tuple[list[Wanted], Fold | None]:
    """w3, b3, gamma, beta unless they are folded; w4, b4."""
    gamma, beta, w3, b3, w4, b4 = half
    second = [_product(w4, dtype), _vector(b4)]
    if folded:
        return second, Fold(w3, b3, gamma, beta, dtype)
    return [_product(w3, dtype), _vector(b3), _vector(gamma), _vector(beta), *second], None


def _product(w: Tensor, dtype: torch.dtype) -> Wanted:
    return Wanted(w, dtype, w.shape[0], round_up(w.shape[1], loaded().K_MULTIPLE))


def _vector(v: Parameter) -> Wanted:
    """In float32; None stays None."""
    return NOTHING if v is None else Wanted(v, torch.float32, 1, v.shape[0])


def _first_weights(hidden: int, addresses: Sequence[int], folds: Sequence[int]) -> FirstWeights:
    """Of the fold if there is one, else of ``addresses``: w3, b3, gamma, beta."""
    if folds:
        w3, wg, wb, scale = folds
        return FirstWeights(hidden, w3, wg=wg, wb=wb, scale=scale)
    w3, b3, gamma, beta = addresses[:4]
    return FirstWeights(hidden, w3, b3, gamma=gamma, beta=beta)


# ------------------------------------------------------------------------------------------------------------- packing

ALIGNMENT = 256  # bytes; kernels need 16

Source = tuple[int, int, int, int, int, int]  # as in mk_packing: address, type, rows, columns, strides
_ABSENT: Source = (0, 0, 0, 0, 0, 0)


class Packed(NamedTuple):
    """Where the weights are that were wanted, and what has to live until the kernels that read them are launched."""

    addresses: list[int]
    folds: list[int]  # of the fold's four results, if there is one
    memory: Tensor | None
    converted: list[Tensor]


class Layout(NamedTuple):
    """What is to be packed and where to, in a piece of memory of ``size`` bytes: it follows from metadata alone."""

    sources: list[Source]
    offsets: list[int | None]  # of what was wanted and of the fold's results; None: nothing to do
    results: list[tuple[int, int, int]]  # type, rows, columns of each
    vectors: tuple[tuple[int, int, int], ...]  # gamma, beta, b3 of a fold
    folded: Source | None  # W3
    size: int
    converted: list[Tensor]  # copies to be read instead of parameters

    def at(self, base: int) -> tuple[list[int], list[int], list[tuple], tuple | None]:
        """In memory at ``base``: the addresses of what was wanted and of the fold's results, and what fills it, as
        ``pack_weights`` takes it."""
        count = len(self.sources)
        places = [None if at is None else base + at for at in self.offsets]
        addresses = [source[0] if at is None else at for source, at in zip(self.sources, places, strict=False)]
        jobs = [
            (*source, at, *result)
            for source, at, result in zip(self.sources, places, self.results, strict=False)
            if at is not None
        ]
        if self.folded is None:
            return addresses, [], jobs, None
        w3, *sums = folds = [0 if at is None else at for at in places[count:]]
        return addresses, folds, jobs, ((*self.folded, w3, *self.results[count]), *self.vectors, *sums)


def lay_out(wanted: Sequence[Wanted], fold: Fold | None) -> Layout:
    """One behind the other, but for what is as it is wanted."""
    converted: list[Tensor] = []
    sources = [_source(each, converted) for each in wanted]
    made = (*wanted, *(fold.results() if fold is not None else ()))
    offsets, size = [], 0
    for i, each in enumerate(made):
        if each is NOTHING or (i < len(sources) and _is_done(each, sources[i])):
            offsets.append(None)
        else:
            offsets.append(size)
            size += round_up(each.rows * each.columns * each.dtype.itemsize, ALIGNMENT)
    results = [(TYPES[each.dtype], each.rows, each.columns) for each in made]
    vectors, folded = (), None
    if fold is not None:
        folded = _source(_product(fold.w3, fold.dtype), converted)
        vectors = tuple(_strided_vector(v, converted) for v in (fold.gamma, fold.beta, fold.b3))
    return Layout(sources, offsets, results, vectors, folded, size, converted)


def pack(wanted: Sequence[Wanted], fold: Fold | None, like: Tensor) -> Packed:
    """Everything by one launch, or by none where nothing needs it. ``like``: a tensor on the device."""
    layout = lay_out(wanted, fold)
    if layout.size == 0:
        return Packed(layout.at(0)[0], [], None, layout.converted)
    memory = torch.empty(layout.size, dtype=torch.uint8, device=like.device)
    addresses, folds, jobs, folding = layout.at(memory.data_ptr())
    loaded().pack_weights(jobs, folding, stream_of(like))
    return Packed(addresses, folds, memory, layout.converted)


def _source(wanted: Wanted, converted: list[Tensor]) -> Source:
    w = wanted.w
    if w is None:
        return _ABSENT
    w = _in_known_type(w, converted)
    if w.dim() == 1:
        return w.data_ptr(), TYPES[w.dtype], 1, w.shape[0], 0, w.stride(0)
    (rows, columns), (stride_row, stride_column) = w.shape, w.stride()
    if wanted.transposed:
        rows, columns, stride_row, stride_column = columns, rows, stride_column, stride_row
    return w.data_ptr(), TYPES[w.dtype], rows, columns, stride_row, stride_column


def _is_done(wanted: Wanted, source: Source) -> bool:
    """Whether a weight is what is wanted as it lies there."""
    address, kind, rows, columns, stride_row, stride_column = source
    return (
        (rows, columns, kind) == (wanted.rows, wanted.columns, TYPES[wanted.dtype])
        and (stride_column == 1 or columns == 1)
        and (stride_row == columns or rows == 1)
        and address % 16 == 0
    )


def _strided_vector(v: Parameter, converted: list[Tensor]) -> tuple[int, int, int]:
    """As mk_vector."""
    if v is None:
        return 0, 0, 0
    v = _in_known_type(v, converted)
    return v.data_ptr(), TYPES[v.dtype], v.stride(0)


def _in_known_type(w: Tensor, converted: list[Tensor]) -> Tensor:
    """``w``, or where the kernel does not know its dtype (float64) a copy in float32."""
    if w.dtype not in TYPES:
        w = w.float()
        converted.append(w)
    return w


def _as_tensor(wanted: Wanted, address: int, packed: Packed) -> Parameter:
    """What is at ``address``: the parameter, or a part of the memory."""
    if address == 0:
        return None
    for t in (wanted.w, *packed.converted):
        if t is not None and t.data_ptr() == address:
            return t.detach().t() if wanted.transposed else t.detach()
    begin = address - packed.memory.data_ptr()
    flat = packed.memory[begin : begin + wanted.rows * wanted.columns * wanted.dtype.itemsize].view(wanted.dtype)
    return flat if wanted.w is None or wanted.w.dim() == 1 else flat.view(wanted.rows, wanted.columns)
