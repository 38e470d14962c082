"""Kernels of csrc/sm90 one by one, in each variant that they have: for tests, and to be timed side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import Block
from torch import Tensor

from mixer_kernels.backends.arguments import Half, Options
from mixer_kernels.backends.cuda.library import TYPES, layout, limits_of, loaded, noise_of, pointer, stream_of
from mixer_kernels.backends.cuda.prepack import Packing, channel_backward_packs
from mixer_kernels.backends.rounding import round_up

TILES = {"wide": 0, "wide ping-pong": 1, "ping-pong": 2, "narrow": 3}  # mk_sm90_tile
SCHEDULES = {
    f"{name}{' x 2' if cluster == 2 else ''}": (tile, cluster) for name, tile in TILES.items() for cluster in (1, 2)
}
PRODUCTS = ("fc1", "fc2", "gelu_backward")  # mk_sm90_channel_product
EPS = 1e-6
NO_NOISE = Options()

# (cluster, consumers, pipelined) of mk_sm90_token_mixing_arguments, and the default.
TOKEN_VARIANTS = {
    "default": (0, 0, 0),
    "alone": (1, 2, 1),
    "cluster": (2, 2, 1),
    "alone, not pipelined": (1, 2, 2),
    "cluster, not pipelined": (2, 2, 2),
}
TOKEN_VARIANTS_TO_64 = {"alone, three consumers": (1, 3, 1), "cluster, three consumers": (2, 3, 1)}  # tokens

Results = dict[str, Tensor]


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd of rows, in float32."""
    wide = x.float().flatten(0, 1)
    return wide.mean(1), (wide.var(1, correction=0) + EPS).rsqrt()


class TokenMixing:
    """The inputs of token mixing; ``x [B, S, C]`` in the dtype of the products, S up to 256."""

    def __init__(self, block: Block, x: Tensor, approximate: str = "none") -> None:
        self.x, self.approximate = x, approximate
        self.parameters = block.token()
        self.mean, self.rstd = statistics_of(x)
        self.packing = Packing(x.dtype)  # holds the packs
        self.weights = self.packing.token(Half(*self.parameters), sm90=True)
        self.variants = {**TOKEN_VARIANTS, **(TOKEN_VARIANTS_TO_64 if x.shape[1] <= 64 else {})}

    def run(self, variant: str, noise: Options = NO_NOISE) -> Tensor:
        u = torch.empty_like(self.x)
        loaded().sm90_token_mixing_forward(
            x=layout(self.x), size=self.x.shape, weights=self.weights, type=TYPES[u.dtype],
            noise=noise_of(noise), tanh=self.approximate == "tanh", variant=self.variants[variant],
            device=limits_of(u), mean=pointer(self.mean), rstd=pointer(self.rstd), u=pointer(u), partial=0,
            stream=stream_of(u),
        )  # fmt: skip
        return u

    def expected(self, dtype: torch.dtype) -> Tensor:
        """The same by plain PyTorch in ``dtype``, without noise."""
        gamma, beta, w1, b1, w2, b2 = (None if p is None else p.to(dtype) for p in self.parameters)
        x = self.x.to(dtype)
        n = F.layer_norm(x, x.shape[-1:], gamma, beta, EPS).transpose(1, 2)
        return x + F.linear(F.gelu(F.linear(n, w1, b1), approximate=self.approximate), w2, b2).transpose(1, 2)


class ChannelProducts:
    """The inputs of the three products of a channel half; ``u [B, S, C]`` in the dtype of the products."""

    def __init__(self, block: Block, u: Tensor, approximate: str = "none") -> None:
        self.parameters = block.channel()
        self.u, self.approximate = u, approximate
        half = Half(*self.parameters)
        self.hidden, dtype = half.w_in.shape[0], u.dtype
        self.mean, self.rstd = statistics_of(u)
        self.g = torch.randn_like(u)
        self.z = self._rows().copy_(torch.randn(len(self.mean), self.hidden, device=u.device))
        self.a = self._rows().copy_(F.gelu(self.z.float(), approximate=approximate))
        self.packing = Packing(dtype)  # holds the packs
        self.first, self.second = self.packing.channel(half, folded=True)
        _, self.backward = channel_backward_packs(half, dtype, folded=True, keeps_z=True, norm=False)

    def _rows(self) -> Tensor:
        rows = self.u.shape[0] * self.u.shape[1]
        wide = torch.empty(rows, round_up(self.hidden, 8), dtype=self.u.dtype, device=self.u.device)
        return wide[:, : self.hidden]

    def chosen(self, product: str) -> str:
        """The schedule, by its name, that the backend takes."""
        rows, channels = len(self.z), self.u.shape[2]
        columns, depth = (channels, self.hidden) if product == "fc2" else (self.hidden, channels)
        schedule = loaded().sm90_channel_schedule(PRODUCTS.index(product), rows, columns, depth, limits_of(self.u))
        return next(name for name, each in SCHEDULES.items() if each == schedule)

    def run(self, product: str, schedule: str, noise: Options = NO_NOISE) -> Results:
        """The product's results by name."""
        u = self.u
        shared = {
            "size": u.shape, "type": TYPES[u.dtype], "noise": noise_of(noise), "schedule": SCHEDULES[schedule],
            "device": limits_of(u), "stream": stream_of(u),
        }  # fmt: skip
        if product == "fc1":
            results = {"a": self._rows(), "z": self._rows()}
            loaded().sm90_channel_fc1(
                u=layout(u), weights=self.first, tanh=self.approximate == "tanh", mean=pointer(self.mean),
                rstd=pointer(self.rstd), row=self.z.stride(0), a=pointer(results["a"]), z=pointer(results["z"]),
                **shared,
            )  # fmt: skip
        elif product == "fc2":
            results = {"y": torch.empty_like(u)}
            loaded().sm90_channel_fc2(
                u=layout(u), D_C=self.hidden, weights=self.second, a=pointer(self.a), row=self.a.stride(0),
                y=pointer(results["y"]), **shared,
            )  # fmt: skip
        else:
            rows = len(self.z)
            dz, a = (torch.empty(rows, self.hidden, dtype=u.dtype, device=u.device) for _ in range(2))
            sums = torch.empty(loaded().sm90_gelu_backward_tiles(rows), self.hidden, device=u.device)
            loaded().sm90_channel_gelu_backward(
                D_C=self.hidden, g=pointer(self.g), w4t=self.backward.w4, z=pointer(self.z), row=self.z.stride(0),
                tanh=self.approximate == "tanh", dz=pointer(dz), a=pointer(a), sums=pointer(sums), **shared,
            )  # fmt: skip
            results = {"dz": dz, "a": a, "db3": sums.sum(0)}
        return results

    def expected(self, product: str, dtype: torch.dtype) -> Results:
        """The same by plain PyTorch in ``dtype``, without noise."""
        gamma, beta, w3, b3, w4, b4 = (None if p is None else p.to(dtype) for p in self.parameters)
        u, a, z, g = (t.to(dtype) for t in (self.u, self.a, self.z, self.g))
        if product == "fc1":
            hidden = F.linear(F.layer_norm(u, u.shape[-1:], gamma, beta, EPS), w3, b3).flatten(0, 1)
            return {"a": F.gelu(hidden, approximate=self.approximate), "z": hidden}
        if product == "fc2":
            return {"y": u + F.linear(a, w4, b4).view(u.shape)}
        leaf = z.clone().requires_grad_()
        with torch.enable_grad():
            activated = F.gelu(leaf, approximate=self.approximate)
        (dz,) = torch.autograd.grad(activated, leaf, g.flatten(0, 1) @ w4)
        return {"dz": dz, "a": activated.detach(), "db3": dz.to(torch.promote_types(dtype, torch.float32)).sum(0)}
