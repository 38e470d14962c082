"""The MLP-Mixer in PyTorch Geometric's GraphMixer: one block with a head behind it, which runs as it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch_geometric.nn.models.graph_mixer import _MLPMixer

from .. import functional
from ..coverage import weight_and_bias, why_not_global_hooks, why_not_linear, why_not_norm
from ..functional import checks
from .base import Fused, Options

_LAYERS = ("token_norm", "token_lin1", "token_lin2", "channel_norm", "channel_lin1", "channel_lin2")


class FusedMLPMixer(Fused, _MLPMixer):
    """A block, LayerNorm, the mean over tokens, a linear layer."""

    submodules = frozenset({*_LAYERS, "head_norm", "head_lin"})

    @staticmethod
    def function(block: nn.Module) -> str:
        return "mixer_block, then its head"

    def operator_on_cpu(self, x: Tensor) -> str | None:
        return None if checks.is_left_to_torch(x) else "mixer_block"

    @staticmethod
    def why_not_covered(block: nn.Module) -> str | None:
        norm1, fc1, fc2, norm2, fc3, fc4 = (block._modules[name] for name in _LAYERS)
        return (
            why_not_global_hooks()
            or why_not_linear("token", fc1, fc2)
            or why_not_linear("channel", fc3, fc4)
            or why_not_norm("token_norm", norm1, fc3.in_features)
            or why_not_norm("channel_norm", norm2, fc3.in_features)
            or (None if fc1.out_features else "its token mixing has no hidden units")
        )

    def parts(self) -> Iterable[nn.Module]:
        """Not the head, which is called as it is."""
        return [self._modules[name] for name in _LAYERS]

    @staticmethod
    def norms(block: nn.Module) -> tuple[Tensor | None, ...]:
        return block.token_norm.weight, block.channel_norm.weight

    def image_shape(self) -> tuple[int, ...]:
        return self.token_lin1.in_features, self.channel_lin1.in_features

    def compute(self, x: Tensor, options: Options) -> Tensor:
        layers = [self._modules[name] for name in _LAYERS]
        y = functional.mixer_block(
            x,
            *[parameter for layer in layers for parameter in weight_and_bias(layer)],
            eps=(self.token_norm.eps, self.channel_norm.eps),
            dropout_p=self.dropout if self.training else 0.0,
            memory=options.memory,
            backend=options.backend,
            packs=self.packs(),
        )
        return self.head_lin(self.head_norm(y).mean(dim=1))


FUSED = (FusedMLPMixer,)
