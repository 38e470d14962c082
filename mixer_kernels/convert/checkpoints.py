"""What trainers put around a state_dict, taken off; and what a state_dict is of, where it is not a Mixer's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Where trainers put the weights, the averaged ones first: timm, DeiT and MAE, Lightning, plain PyTorch.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
# Modules around a model or its blocks: DistributedDataParallel, torch.compile, activation checkpointing, FSDP1.
_WRAPPERS = re.compile(r"\b(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

# A pattern among the keys that do not belong there, and what it says of them.
KINDS = (
    (r"\.lora_[AB]\.", "there are LoRA adapters in it: merge them first (peft: model.merge_and_unload())"),
    (r"\blinear_tokens\.|\.gamma_1$", "this is a ResMLP: build it by timm (resmlp_*) and give that to fuse_"),
    (r"\.gate\.proj\.", "this is a gMLP: build it by timm (gmlp_*) and give that to fuse_"),
    (r"\.attn\.", "this is a transformer: it has attention"),
)
# The same for the formats of Mixers, where no key at all belongs there.
FORMATS = (
    (r"^MixerBlock_|^Mixer/", "this is Google's Mixer: give its .npz file to from_google_npz (--from google)"),
    (r"\b\d+\.[01]\.fn\.", "this is lucidrains' MLPMixer: from_lucidrains (--from lucidrains)"),
    (r"\bmlp_tokens\.", "this is timm's MlpMixer: from_timm (--from timm)"),
)


def unwrapped(checkpoint: Mapping[str, Any], anchor: str) -> dict[str, Any]:
    """The state_dict in what a trainer saved, without the prefixes of the modules around the Mixer.

    A prefix goes where one Mixer alone has it: ``model.`` and ``net.`` of Lightning, ``base_model.model.`` of PEFT.

    Args:
        anchor: a key that every Mixer has, once.

    Raises:
        ValueError: the weights of several Mixers, or a key with and without a prefix; the message names them.
    """
    for entry in ENTRIES:
        if isinstance(checkpoint.get(entry), Mapping):
            checkpoint = checkpoint[entry]
            break
    prefixes = {name.removesuffix(anchor) for name in checkpoint if name == anchor or name.endswith(f".{anchor}")}
    if len(prefixes) > 1:
        named = ", ".join(repr(prefix) for prefix in sorted(prefixes))
        raise ValueError(f"the weights of {len(prefixes)} Mixers, under the prefixes {named}: keep those of one")
    prefix = prefixes.pop() if prefixes else ""
    state_dict: dict[str, Any] = {}
    for name, value in checkpoint.items():
        short = _WRAPPERS.sub("", name.removeprefix(prefix))
        if short in state_dict:
            raise ValueError(f"{short} is in it twice, with and without a prefix: keep one of them")
        state_dict[short] = value
    return state_dict


def kind_of(extra: Iterable[str], nothing_fits: bool) -> str | None:
    """What the keys ``extra`` are of, as far as they tell; ``nothing_fits``: not one key was right."""
    for pattern, kind in (*KINDS, *(FORMATS if nothing_fits else ())):
        if any(re.search(pattern, name) for name in extra):
            return kind
    return None
