"""The sizes of an MLP-Mixer and what they cost: FLOPs, least bytes, the paper's specifications.

Symbols are the paper's (arXiv:2105.01601): ``S`` tokens, ``C`` channels, ``D_S`` and ``D_C`` the hidden widths of the
token-mixing and the channel-mixing MLP. A multiply-add counts as two FLOPs; LayerNorm, GELU and the residual adds
are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MixerShape:
    """The sizes of one Mixer block: tokens ``S``, channels ``C``, hidden widths ``D_S`` and ``D_C``."""

    S: int
    C: int
    D_S: int
    D_C: int

    def token_flops(self, batch_size: int) -> int:
        """FLOPs of the two products of token mixing, W1 . N and W2 . A."""
        return 4 * batch_size * self.S * self.C * self.D_S

    def channel_flops(self, batch_size: int) -> int:
        """FLOPs of the two products of channel mixing, N . W3' and A . W4'."""
        return 4 * batch_size * self.S * self.C * self.D_C

    def block_flops(self, batch_size: int) -> int:
        """FLOPs of both halves."""
        return self.token_flops(batch_size) + self.channel_flops(batch_size)

    def token_bytes(self, batch_size: int, itemsize: int, stream_itemsize: int | None = None) -> int:
        """Least bytes that token mixing moves as two launches, row statistics and the fused half.

        ``x`` is read for the statistics, read again and written once; the hidden activation stays on chip.
        ``itemsize`` is that of the products in bytes, ``stream_itemsize`` that of ``x`` (default: the same).
        """
        x, statistics = self._stream_bytes(batch_size, itemsize, stream_itemsize)
        weights = itemsize * 2 * self.S * self.D_S
        return 3 * x + 2 * statistics + weights

    def channel_bytes(self, batch_size: int, itemsize: int, stream_itemsize: int | None = None) -> int:
        """Least bytes that channel mixing moves as three launches: row statistics, fc1, fc2.

        The hidden activation is written by fc1 and read by fc2; ``u`` is read for the statistics, by fc1 and as the
        residual; ``y`` is written once.
        """
        u, statistics = self._stream_bytes(batch_size, itemsize, stream_itemsize)
        hidden = itemsize * batch_size * self.S * self.D_C
        weights = itemsize * 2 * self.C * self.D_C
        return 4 * u + 2 * statistics + 2 * hidden + weights

    def block_bytes(self, batch_size: int, itemsize: int, stream_itemsize: int | None = None) -> int:
        """Least bytes of both halves."""
        return self.token_bytes(batch_size, itemsize, stream_itemsize) + self.channel_bytes(
            batch_size, itemsize, stream_itemsize
        )

    def _stream_bytes(self, batch_size: int, itemsize: int, stream_itemsize: int | None) -> tuple[int, int]:
        rows = batch_size * self.S
        return rows * self.C * (stream_itemsize or itemsize), rows * 2 * 4  # mean and rstd are float32


@dataclass(frozen=True)
class MixerSpec:
    """One row of the paper's Table 1: a whole model, for square images of any size."""

    num_blocks: int
    patch_size: int
    C: int
    D_S: int
    D_C: int

    def block_shape(self, img_size: int = 224) -> MixerShape:
        """The shape of each block for square images of ``img_size`` pixels."""
        return MixerShape((img_size // self.patch_size) ** 2, self.C, self.D_S, self.D_C)

    def flops(self, batch_size: int, img_size: int = 224, in_chans: int = 3, num_classes: int = 1000) -> int:
        """FLOPs of a forward pass: patch embedding, blocks, classifier."""
        shape = self.block_shape(img_size)
        stem = 2 * batch_size * shape.S * in_chans * self.patch_size**2 * self.C
        head = 2 * batch_size * self.C * num_classes
        return self.num_blocks * shape.block_flops(batch_size) + stem + head


# arXiv:2105.01601, Table 1.
SPECS: dict[str, MixerSpec] = {
    "S/32": MixerSpec(num_blocks=8, patch_size=32, C=512, D_S=256, D_C=2048),
    "S/16": MixerSpec(num_blocks=8, patch_size=16, C=512, D_S=256, D_C=2048),
    "B/32": MixerSpec(num_blocks=12, patch_size=32, C=768, D_S=384, D_C=3072),
    "B/16": MixerSpec(num_blocks=12, patch_size=16, C=768, D_S=384, D_C=3072),
    "L/32": MixerSpec(num_blocks=24, patch_size=32, C=1024, D_S=512, D_C=4096),
    "L/16": MixerSpec(num_blocks=24, patch_size=16, C=1024, D_S=512, D_C=4096),
    "H/14": MixerSpec(num_blocks=32, patch_size=14, C=1280, D_S=640, D_C=5120),
}
