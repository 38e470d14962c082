"""Writes google_mixer*.npz: a small Mixer as Google's Flax code saves it, and its logits. Needs flax and jax.

    pip install flax jax
    python tests/data/make_google_mixer.py

The model is written after appendix E of arXiv:2105.01601 and knows nothing of mixer_kernels. Parameters are random,
biases and scales too. Three files:

    google_mixer.npz           parameters, by Flax's present names
    google_mixer_older.npz     the same parameters by the names of the first published checkpoints
    google_mixer_expected.npz  images [B, H, W, 3], and what Flax computes in float32 and in float64: logits, and the
                               tokens before the last LayerNorm, which hides the biases that token mixing adds
"""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

HERE = Path(__file__).parent
OLDER = {
    "stem": "embedding",
    "MixerBlock_": "Mixer/encoderblock_",
    "token_mixing/Dense_": "token_mixing_phase_0/",
    "channel_mixing/Dense_": "channel_mixing_phase_0/",
    "pre_head_layer_norm": "Mixer/encoder_norm",
}


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.hidden)(x))  # the tanh form: flax.linen.gelu's default
        return nn.Dense(x.shape[-1])(hidden)


class MixerBlock(nn.Module):  # the class gives the parameters their name
    tokens_mlp_dim: int
    channels_mlp_dim: int

    @nn.compact
    def __call__(self, x):
        mix_tokens = Mlp(self.tokens_mlp_dim, name="token_mixing")
        mix_channels = Mlp(self.channels_mlp_dim, name="channel_mixing")
        x += mix_tokens(nn.LayerNorm()(x).mT).mT
        return x + mix_channels(nn.LayerNorm()(x))


class Mixer(nn.Module):
    num_classes: int
    num_blocks: int
    patch_size: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int

    @nn.compact
    def __call__(self, images):
        patch = (self.patch_size, self.patch_size)
        grid = nn.Conv(self.hidden_dim, patch, strides=patch, name="stem")(images)
        x = grid.reshape(grid.shape[0], -1, self.hidden_dim)
        for _ in range(self.num_blocks):
            x = MixerBlock(self.tokens_mlp_dim, self.channels_mlp_dim)(x)
        pooled = nn.LayerNorm(name="pre_head_layer_norm")(x).mean(axis=1)
        return x, nn.Dense(self.num_classes, name="head")(pooled)


def older(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The name and shape of a parameter in the first generation: "kernel1" of Dense_0, with axes of length 1."""
    for new, old in OLDER.items():
        name = name.replace(new, old)
    if "_phase_0/" in name:
        path, number, leaf = name.rsplit("/", 2)
        name = f"{path}/{leaf}{int(number) + 1}"
        array = array[None, :, None] if leaf == "bias" and "token" in path else array
    return name, array


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    model = Mixer(num_classes=3, num_blocks=2, patch_size=4, hidden_dim=8, tokens_mlp_dim=5, channels_mlp_dim=12)
    images = random.standard_normal((2, 12, 8, 3)).astype(np.float32)  # S = 3 * 2: not a square
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def values(path, leaf) -> np.ndarray:
        scale = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return (scale * random.standard_normal(leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    parameters = jax.tree_util.tree_map_with_path(values, shapes)
    flat = {name: np.asarray(value) for name, value in flatten_dict(parameters["params"], sep="/").items()}
    np.savez(HERE / "google_mixer.npz", **flat)
    np.savez(HERE / "google_mixer_older.npz", **dict(older(name, value) for name, value in flat.items()))
    exact = jax.tree_util.tree_map(lambda value: value.astype(np.float64), parameters)
    tokens, logits = model.apply(parameters, images)
    exact_tokens, exact_logits = model.apply(exact, images.astype(np.float64))
    np.savez(
        HERE / "google_mixer_expected.npz",
        images=images,
        tokens=tokens,
        tokens_float64=exact_tokens,
        logits=logits,
        logits_float64=exact_logits,
    )


if __name__ == "__main__":
    main()
