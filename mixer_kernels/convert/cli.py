"""``python -m mixer_kernels convert``: a checkpoint of one origin to a state_dict that FusedMixer and timm load."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .files import SAFETENSORS, TORCH, load_state_dict, save_state_dict
from .google import from_google_npz
from .layout import StateDict, from_timm, sizes_of, to_timm
from .lucidrains import from_lucidrains
from .resize import METHODS, resize_tokens

TO: dict[str, Callable[[StateDict], StateDict]] = {"timm": to_timm}
FILES = ", ".join(SAFETENSORS + TORCH)
# What else the model has to be built with, by origin.
REMARKS = {
    "google": "Trained with the tanh form of GELU: act_layer=functools.partial(torch.nn.GELU, approximate='tanh').",
    "lucidrains": "Trained with an eps of 1e-5: norm_layer=torch.nn.LayerNorm.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one file; print what is in it. Wrong input ends with status 2 and the reason."""
    parser = argparse.ArgumentParser(
        prog="python -m mixer_kernels convert",
        description="Convert MLP-Mixer weights to the keys of timm's mixer_* models, which are FusedMixer's.",
    )
    parser.add_argument("input", type=Path, help=f"google: .npz; else {FILES}")
    parser.add_argument("output", type=Path, help=FILES)
    parser.add_argument("--from", dest="origin", required=True, choices=("google", "timm", "lucidrains"))
    parser.add_argument("--to", default="timm", choices=tuple(TO), help="keys of the output (default: %(default)s)")
    parser.add_argument("--in-chans", type=int, default=3, help="lucidrains: channels of an image (default: 3)")
    parser.add_argument(
        "--resize-tokens",
        nargs=2,
        type=grid,
        metavar=("OLD", "NEW"),
        help="token MLPs for another resolution, from and to rows x columns: 14x14 24x24",
    )
    parser.add_argument(
        "--resize-method", choices=METHODS, default="auto", help="resize_tokens says what they are (default: auto)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    arguments = parser.parse_args(argv)
    try:
        _convert(arguments)
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))
    return 0


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.resize_method != "auto" and not arguments.resize_tokens:
        raise ValueError("--resize-method goes with --resize-tokens")
    if arguments.output.exists() and not arguments.force:
        raise ValueError(f"{arguments.output} exists: choose another file or pass --force")
    if arguments.origin == "google":
        state_dict = from_google_npz(arguments.input)
    elif arguments.origin == "lucidrains":
        state_dict = from_lucidrains(load_state_dict(arguments.input), in_chans=arguments.in_chans)
    else:
        state_dict = from_timm(load_state_dict(arguments.input))
    if arguments.resize_tokens:
        state_dict = resize_tokens(state_dict, *arguments.resize_tokens, arguments.resize_method)
    save_state_dict(TO[arguments.to](state_dict), arguments.output)
    print(f"{arguments.output}: {sizes_of(state_dict)}")
    if arguments.origin in REMARKS:
        print(REMARKS[arguments.origin])


def grid(text: str) -> tuple[int, int]:
    """Rows and columns of tokens, from "14x14"."""
    rows, columns = text.split("x")
    return int(rows), int(columns)
