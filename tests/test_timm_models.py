"""timm's models through the fused kernels: logits by the accuracy rule, in every dtype and layout that people run.

Image size and depth are cut down for time; widths are timm's own.
"""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from accuracy import assert_accurate, reference
from timm.models.mlp_mixer import MlpMixer

from mixer_kernels import FusedMixer, FusedMixerBlock, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# Patch size, width and a small image: 1 to 16 tokens. The entry points refuse num_blocks, MlpMixer takes it.
MODELS = {
    "mixer_s32_224": {"patch_size": 32, "embed_dim": 512, "img_size": 64},
    "mixer_s16_224": {"patch_size": 16, "embed_dim": 512, "img_size": 64},
    "mixer_b32_224": {"patch_size": 32, "embed_dim": 768, "img_size": 64},
    "mixer_b16_224": {"patch_size": 16, "embed_dim": 768, "img_size": 48},
    "mixer_l32_224": {"patch_size": 32, "embed_dim": 1024, "img_size": 32},
    "mixer_l16_224": {"patch_size": 16, "embed_dim": 1024, "img_size": 32},
}


def with_trained_looks(model):
    """Norms, biases and head as trained ones are, not 1, 0 and 0."""
    torch.nn.init.normal_(model.head.weight, std=0.05)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def build(num_blocks=1, **options):
    """timm's model and the same with our block, with timm's weights."""
    options = {"num_blocks": num_blocks, "num_classes": 32, **options}
    reference = with_trained_looks(MlpMixer(**options))
    fused = MlpMixer(block_layer=FusedMixerBlock, **options)
    fused.load_state_dict(reference.state_dict())
    return reference.eval(), fused.eval()


def images(img_size, dtype, memory_format, device):
    return torch.randn(2, 3, img_size, img_size, device=device).to(dtype).to(memory_format=memory_format)


def assert_same_logits(timms, fused, x, dtype, device):
    with torch.no_grad(), use_backend("triton"):
        actual = fused.to(device, dtype)(x)
    with torch.no_grad():
        eager = timms.to(device, dtype)(x)
    assert_accurate(actual, eager, exact_logits(timms, x), what="logits")


def exact_logits(timms, x, products=None):
    wide = timms.double().requires_grad_(False)
    return reference(lambda: wide(x.double()), x.dtype, products)


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name, device):
    in_float32 = name in ("mixer_s32_224", "mixer_b16_224")  # takes three times as long
    dtype, memory_format = (torch.float32, NHWC) if in_float32 else (torch.bfloat16, NCHW)
    timms, fused = build(**MODELS[name])
    x = images(MODELS[name]["img_size"], dtype, memory_format, device)
    assert_same_logits(timms, fused, x, dtype, device)


def test_create_model(device):
    """The one-liner of the README, all eight blocks of Mixer-S/32."""
    options = {"img_size": 64, "num_classes": 32}
    timms = with_trained_looks(timm.create_model("mixer_s32_224", **options)).eval()
    fused = timm.create_model("mixer_s32_224", block_layer=FusedMixerBlock, **options).eval()
    fused.load_state_dict(timms.state_dict())
    x = images(64, torch.bfloat16, NCHW, device)
    assert_same_logits(timms, fused, x, torch.bfloat16, device)


ODD = {
    "odd width": {"embed_dim": 77},
    "196 tokens, two blocks": {"img_size": 112, "patch_size": 8, "embed_dim": 40, "num_blocks": 2},
    "256 tokens": {"img_size": 64, "patch_size": 4, "embed_dim": 24},
    "289 tokens": {"img_size": 68, "patch_size": 4, "embed_dim": 24},
    "odd ratios": {"embed_dim": 50, "mlp_ratio": (0.3, 1.7)},
    "tanh": {"embed_dim": 48, "act_layer": timm.layers.GELUTanh},
    "another eps": {"embed_dim": 48, "norm_layer": partial(torch.nn.LayerNorm, eps=1e-3)},
    "stem norm": {"embed_dim": 48, "stem_norm": True},
}


@pytest.mark.parametrize(("dtype", "memory_format"), ((torch.float16, NHWC), (torch.float32, NCHW)), ids=str)
@pytest.mark.parametrize("options", ODD.values(), ids=ODD.keys())
def test_odd_configurations(options, dtype, memory_format, device):
    options = {"img_size": 64, "patch_size": 16, **options}
    timms, fused = build(**options)
    assert_same_logits(timms, fused, images(options["img_size"], dtype, memory_format, device), dtype, device)


def test_autocast(device):
    timms, fused = build(num_blocks=2, **MODELS["mixer_s16_224"])
    x = images(64, torch.float32, NCHW, device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        with use_backend("triton"):
            actual = fused.to(device)(x)
        eager = timms.to(device)(x)
    assert_accurate(actual, eager, exact_logits(timms, x, torch.bfloat16))


def test_whole_model(device):
    """FusedMixer with timm's weights, no timm inside."""
    timms, _ = build(num_blocks=2, **MODELS["mixer_s16_224"])
    fused = FusedMixer(num_classes=32, img_size=64, patch_size=16, num_blocks=2, embed_dim=512).eval()
    fused.load_state_dict(timms.state_dict())
    x = images(64, torch.bfloat16, NCHW, device)
    assert_same_logits(timms, fused, x, torch.bfloat16, device)


def test_no_hidden_copy_of_timms_transposed_view(device):
    """The patch embedding gives strides (S*C, 1, S); the first kernel reads them as they are."""
    if device == "cuda":
        pytest.skip("counts in the strict interpreter, on the CPU")
    import strict_interpreter

    _, fused = build(**MODELS["mixer_s16_224"])
    x = images(64, torch.float32, NCHW, device)
    tokens = fused.stem(x)
    assert tokens.stride() == (16 * 512, 1, 16)
    with torch.no_grad(), use_backend("triton"):
        with strict_interpreter.record() as launches, torch.profiler.profile() as profile:
            fused.blocks(tokens)
    assert len(launches) == 5  # no weight needs another form
    copies = [
        event.key for event in profile.key_averages() if event.key in ("aten::copy_", "aten::clone", "aten::_to_copy")
    ]
    assert copies == []
