"""timm entry points ``fused_mixer_*``, registered when this module is imported.

Each is timm's own ``mixer_*`` with ``FusedMixerBlock``: the same pretrained tags, weights and data configuration::

    import timm
    import mixer_kernels.timm

    model = timm.create_model("fused_mixer_b16_224.goog_in21k_ft_in1k", pretrained=True)

Every argument of timm's entry point is taken, and ``memory``, which is ``FusedMixerBlock``'s. The model's
``pretrained_cfg`` is timm's, so that what it is saved or pushed as loads without this package.

A script that does not import this module, such as timm's ``train.py``, ``validate.py`` and ``benchmark.py``, is run by
``python -m mixer_kernels timm train.py --model fused_mixer_b16_224 ...``, or ``torchrun -m mixer_kernels timm ...``.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from timm.models import mlp_mixer, register_model

from .modules import FusedMixerBlock

NAMES = ("mixer_s32_224", "mixer_s16_224", "mixer_b32_224", "mixer_b16_224", "mixer_l32_224", "mixer_l16_224")


def _own_cfg(name: str):
    """timm's tags and configurations of ``name``, with its hub repositories by their full names."""
    cfg = copy.deepcopy(mlp_mixer.default_cfgs[name])
    for tag, tagged in cfg.cfgs.items():
        if tagged.hf_hub_id == "timm/":  # timm appends the name under which a model is registered
            tagged.hf_hub_id = f"timm/{name}.{tag}"
    return cfg


# Where timm's registry looks for tags: list_models, list_pretrained, is_model_pretrained.
default_cfgs = {f"fused_{name}": _own_cfg(name) for name in NAMES}


def _entry_point(name: str) -> Callable[..., mlp_mixer.MlpMixer]:
    create = getattr(mlp_mixer, name)

    def fused(pretrained: bool = False, memory: str = "fast", **kwargs) -> mlp_mixer.MlpMixer:
        return create(pretrained=pretrained, block_layer=partial(FusedMixerBlock, memory=memory), **kwargs)

    fused.__name__ = fused.__qualname__ = f"fused_{name}"
    fused.__doc__ = f"timm's ``{name}`` with ``FusedMixerBlock``."
    return register_model(fused)


globals().update({f"fused_{name}": _entry_point(name) for name in NAMES})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script with the arguments after its name, after this module has registered its models."""
    parser = argparse.ArgumentParser(
        prog="python -m mixer_kernels timm",
        description="Run a script of timm's, or another, that can create the fused_mixer_* models.",
    )
    parser.add_argument("script", help="path of train.py, validate.py, benchmark.py, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script takes")
    arguments = parser.parse_args(argv)
    script = Path(arguments.script)
    if not script.is_file():
        parser.error(f"{script} is not a file")
    sys.argv = [str(script), *arguments.arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as `python script` does
    runpy.run_path(str(script), run_name="__main__")
    return 0
