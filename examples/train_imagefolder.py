"""Train an MLP-Mixer on images of your own: one folder per class in DATA/train, the same classes in DATA/val.

    python examples/train_imagefolder.py DATA --model S/16 --amp bf16
    torchrun --nproc-per-node 8 examples/train_imagefolder.py DATA --model B/16 --amp bf16
    torchrun --nproc-per-node 8 examples/train_imagefolder.py DATA --model H/14 --amp bf16 --parallel fsdp

It needs torchvision and tqdm. The batch size is that of one update over all processes, and the order of the images and
their augmentation depend on the seed alone: the loss curve is the same however many processes there are. After each
epoch OUTPUT/checkpoint.pt holds all that ``--resume`` needs to go on as if nothing had happened. To use the model:

    checkpoint = torch.load("OUTPUT/checkpoint.pt")
    model = FusedMixer.from_spec(**checkpoint["sizes"])
    model.load_state_dict(checkpoint["model"])  # with --ema the averaged weights: checkpoint["ema"]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from mixer_kernels import FusedMixer
from mixer_kernels.shapes import SPECS

MEAN = STD = (0.5, 0.5, 0.5)  # pixels from -1 to 1, as in the paper
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}
# What may differ between a run and the one that resumes it.
NOT_OF_THE_RUN = ("data", "output", "resume", "device", "parallel", "accumulate", "workers")


def main() -> None:
    args = parse_args()
    device = start_process(args.device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),)) if args.parallel == "fsdp" else None
    train(args, device, mesh)
    end_process(mesh)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--output", type=Path, default=Path("runs/mixer"), help="folder of checkpoint.pt")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, if there is one")

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=SPECS, default="S/16", help="sizes of the paper; those below replace them")
    model.add_argument("--img-size", type=int, default=224, metavar="PIXELS")
    model.add_argument("--patch-size", type=int, metavar="PIXELS")
    model.add_argument("--num-blocks", type=int)
    model.add_argument("--embed-dim", type=int, metavar="C")
    model.add_argument("--mlp-ratio", type=float, nargs=2, metavar=("D_S/C", "D_C/C"))
    model.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth: how often a branch is left out")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, default=100)
    recipe.add_argument("--batch-size", type=int, default=256, help="images per update, over all processes")
    recipe.add_argument("--accumulate", type=int, default=1, help="forward and backward passes per update")
    recipe.add_argument("--lr", type=float, default=1e-3, help="after the warm-up; then a cosine down to 0")
    recipe.add_argument("--warmup-epochs", type=float, default=5.0)
    recipe.add_argument("--weight-decay", type=float, default=0.1, help="not of biases and norms")
    recipe.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of the gradients; 0: any")
    recipe.add_argument("--label-smoothing", type=float, default=0.1)
    recipe.add_argument("--ema", type=float, metavar="DECAY", help="average the weights too, and validate the average")
    recipe.add_argument("--min-crop", type=float, default=0.08, help="smallest random crop, as a part of the image")
    recipe.add_argument("--rand-augment", type=int, default=0, metavar="MAGNITUDE", help="RandAugment; 0: none")
    recipe.add_argument("--seed", type=int, default=0, help="of weights, order of the images, augmentation, drop path")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--amp", choices=AMP_DTYPES, default="none", help="dtype of autocast")
    machine.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="fsdp: shard the weights (FSDP2)")
    machine.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument("--workers", type=int, default=4, help="of each process, that load images")
    args = parser.parse_args()

    for name, least in {"epochs": 1, "batch_size": 1, "accumulate": 1, "img_size": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0 <= args.warmup_epochs < args.epochs:
        parser.error(f"--warmup-epochs must be from 0 to less than --epochs {args.epochs}, got {args.warmup_epochs:g}")
    patch_size = args.patch_size or SPECS[args.model].patch_size
    if args.img_size % patch_size:
        parser.error(f"--img-size must be a multiple of the patch size, {patch_size}, got {args.img_size}")
    passes = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if args.batch_size % passes:
        parser.error(f"--batch-size must be a multiple of processes x --accumulate = {passes}, got {args.batch_size}")
    return args


def start_process(device_type: str) -> torch.device:
    """Join the processes that torchrun started, or make a group of this one alone; the device to use."""
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device_type)


def end_process(mesh: DeviceMesh | None) -> None:
    """Leave the group, and end gloo's threads, since one that frees a tensor while Python shuts down aborts (SIGABRT).

    ``destroy_process_group`` ends them with the last reference to the group. FSDP's modules have one until they are
    collected, and the mesh has one, which DTensor's caches keep: https://github.com/pytorch/pytorch/pull/179291.
    """
    getattr(mesh, "_pg_registry", {}).clear()  # which not every version has
    dist.destroy_process_group()
    gc.collect()


def train(args: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None) -> None:
    train_images, val_images = open_images(args)
    train_loader, val_loader = make_loader(args, train_images, train=True), make_loader(args, val_images, train=False)
    steps = len(train_loader) // args.accumulate
    sizes = {"name": args.model, "img_size": args.img_size, "num_classes": len(train_images.classes)}
    own = {name: getattr(args, name) for name in ("patch_size", "num_blocks", "embed_dim", "mlp_ratio")}
    sizes |= {name: value for name, value in own.items() if value is not None}
    run = make_run(args, sizes, steps, device, mesh)
    path = args.output / "checkpoint.pt"
    identity = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
    identity |= {"classes": train_images.classes, "training images": len(train_images)}
    if find_checkpoint(path, args.resume):
        load_checkpoint(path, run, identity, device)
    parameters = sum(p.numel() for p in run.model.parameters())
    images = f"{len(train_images):,} training and {len(val_images):,} validation images"
    say(f"{dist.get_world_size()} x {device.type}: {parameters:,} parameters, {images}")

    while run.epoch < args.epochs:
        run.epoch += 1
        train_images.epoch = run.epoch
        train_loader.sampler.set_epoch(run.epoch)
        start = time.perf_counter()
        loss = train_epoch(args, run, train_loader, steps, device)
        if not math.isfinite(loss):
            raise SystemExit(f"the loss of epoch {run.epoch} is {loss}: try a lower --lr, or --amp bf16")
        speed = steps * args.batch_size / (time.perf_counter() - start)
        accuracy = evaluate(args, run.ema.module if run.ema else run.model, val_loader, device)
        run.history.append({"epoch": run.epoch, "loss": loss, "accuracy": accuracy})
        save_checkpoint(path, run, {"sizes": sizes, "identity": identity}, device)
        say(f"epoch {run.epoch}/{args.epochs}: loss {loss:.4f}, accuracy {100 * accuracy:.2f} %, {speed:,.0f} img/s")


class SeededImageFolder(ImageFolder):
    """Augments an image by random numbers that depend on seed, epoch and index, not on who loads it after what."""

    def __init__(self, root: Path, transform: transforms.Compose, seed: int) -> None:
        super().__init__(root, transform)
        self.seed = seed
        self.epoch = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, index))
            return super().__getitem__(index)


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers: other numbers, another seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def open_images(args: argparse.Namespace) -> tuple[SeededImageFolder, ImageFolder]:
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = [transforms.RandomResizedCrop(args.img_size, (args.min_crop, 1.0)), transforms.RandomHorizontalFlip()]
    if args.rand_augment:
        augment.append(transforms.RandAugment(magnitude=args.rand_augment))
    center = [transforms.Resize(args.img_size * 8 // 7), transforms.CenterCrop(args.img_size)]  # of 256 pixels, 224
    try:
        train_images = SeededImageFolder(args.data / "train", transforms.Compose(augment + to_tensor), args.seed)
        val_images = ImageFolder(args.data / "val", transforms.Compose(center + to_tensor))
    except FileNotFoundError as error:
        raise SystemExit(
            f"no images: {error}\nexpected {args.data}/train/CLASS/*.jpg and {args.data}/val/CLASS/*.jpg (or png, ...)"
        ) from error
    if train_images.classes != val_images.classes:
        differ = sorted(set(train_images.classes) ^ set(val_images.classes))
        raise SystemExit(f"{args.data}: train and val must have the same classes, only one has {', '.join(differ)}")
    if len(train_images) < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size} is more than the {len(train_images)} training images")
    return train_images, val_images


def make_loader(args: argparse.Namespace, images: ImageFolder, train: bool) -> DataLoader:
    """Each process takes every n-th image, so that together they take the batches that one process would.

    In training the images that do not fill the last batch sit out the epoch (others in each). In validation the last
    processes repeat an image where the number does not come out even: ``evaluate`` does not count it.
    """
    processes, rank = dist.get_world_size(), dist.get_rank()
    return DataLoader(
        images,
        args.batch_size // (processes * args.accumulate),
        sampler=DistributedSampler(images, processes, rank, shuffle=train, seed=args.seed, drop_last=train),
        drop_last=train,
        num_workers=args.workers,
        pin_memory=args.device == "cuda",
    )


@dataclass
class Run:
    """What training changes, and a checkpoint holds."""

    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def make_run(
    args: argparse.Namespace, sizes: dict[str, Any], steps: int, device: torch.device, mesh: DeviceMesh | None
) -> Run:
    torch.manual_seed(args.seed)
    with device:
        model = FusedMixer.from_spec(**sizes, drop_path_rate=args.drop_path)
    torch.manual_seed(mixed_seed(args.seed, 0, dist.get_rank()))  # drop path differs between processes
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema is not None else None
    if mesh is not None:
        shard(model, args.amp, mesh)
        if ema:
            shard(ema.module, args.amp, mesh)

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)
    schedule = LambdaLR(optimizer, lambda i: warmup_and_cosine(i, args.warmup_epochs * steps, args.epochs * steps))
    # The first updates with fp16 are skipped, while its scale is too high; the schedule counts them all the same.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
    if args.parallel == "ddp" and dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
    return Run(model, ema, optimizer, schedule, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"))


def shard(model: FusedMixer, amp: str, mesh: DeviceMesh) -> None:
    """FSDP2: each process keeps its part of each parameter, and gathers a block's when it comes to the block."""
    # Gathered in autocast's dtype, which is half the traffic; gradients are summed in float32.
    policy = MixedPrecisionPolicy(param_dtype=AMP_DTYPES[amp], reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def warmup_and_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the learning rate in update ``step``, counted from 0: up to 1 in ``warmup`` updates, then down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def train_epoch(args: argparse.Namespace, run: Run, loader: DataLoader, steps: int, device: torch.device) -> float:
    """One pass over the images; the mean loss over all processes."""
    run.model.train()
    batches = iter(loader)
    total = torch.zeros((), device=device)  # stays on the device: reading the loss in each step would wait for it
    shown = dist.get_rank() == 0 and sys.stderr.isatty()  # a log gets the line of each epoch alone
    title, unit = f"epoch {run.epoch}", {"unit": "img", "unit_scale": args.batch_size}
    progress = tqdm(range(1, steps + 1), title, disable=not shown, leave=False, **unit)
    for step in progress:
        for i in range(args.accumulate):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            with reduced_gradients(run.model, last=i == args.accumulate - 1):
                with autocast(args.amp, device):
                    loss = F.cross_entropy(run.model(images), labels, label_smoothing=args.label_smoothing)
                run.scaler.scale(loss / args.accumulate).backward()
            total += loss.detach()
        run.scaler.unscale_(run.optimizer)
        if args.clip_grad:
            nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        run.schedule.step()
        if run.ema:
            run.ema.update_parameters(run.model)
        if shown and step % 50 == 0:
            progress.set_postfix(loss=f"{total.item() / (step * args.accumulate):.4f}", refresh=False)
    dist.all_reduce(total)
    return total.item() / (steps * args.accumulate * dist.get_world_size())


def reduced_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients between processes in the last of an update's backward passes only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


def autocast(amp: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "none")


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """The part of all images that is classified correctly, each counted once."""
    model.eval()
    hits = []
    for images, labels in loader:
        with autocast(args.amp, device):
            logits = model(images.to(device, non_blocking=True))
        hits.append(logits.argmax(dim=1) == labels.to(device, non_blocking=True))
    if isinstance(model, FSDPModule):
        model.reshard()  # else the outermost parameters stay gathered until the next backward pass
    own = len(range(dist.get_rank(), len(loader.dataset), dist.get_world_size()))  # what follows are repeated images
    correct = torch.cat(hits)[:own].sum()
    dist.all_reduce(correct)
    return correct.item() / len(loader.dataset)


def gather(value: Any) -> list[Any]:
    """The value that each process has."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def find_checkpoint(path: Path, resume: bool) -> bool:
    """Whether to go on from the file. Exits where that would overwrite it, or processes on other machines miss it."""
    found = gather(path.exists())
    if any(found) and not resume:
        raise SystemExit(f"{path} exists: --resume to go on from it, or another --output for a new run")
    if any(found) and not all(found):
        raise SystemExit(f"not all processes see {path}: --output must be a folder that all machines share")
    return any(found)


def save_checkpoint(path: Path, run: Run, about: dict[str, Any], device: torch.device) -> None:
    """Write the file from the first process: whole parameters, so that any number of processes can go on from it."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    random = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device.type == "cuda" else [])
    state = about | {
        "model": dcp.get_model_state_dict(run.model, options=options),
        "optimizer": dcp.get_optimizer_state_dict(run.model, run.optimizer, options=options),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema": dcp.get_model_state_dict(run.ema.module, options=options) if run.ema else None,
        "ema_updates": int(run.ema.n_averaged) if run.ema else 0,
        "random": gather(random),
        "epoch": run.epoch,
        "history": run.history,
    }
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)  # at once: whenever the run is killed, the file is whole


def load_checkpoint(path: Path, run: Run, identity: dict[str, Any], device: torch.device) -> None:
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    was = state["identity"]
    differ = [name for name in was | identity if was.get(name) != identity.get(name)]
    if differ:
        changes = "; ".join(f"{name} was {was.get(name)!r}, is {identity.get(name)!r}" for name in differ)
        raise SystemExit(f"{path} is of another run: {changes}. Give the same, or another --output.")
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_model_state_dict(run.model, state["model"], options=options)
    dcp.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    run.schedule.load_state_dict(state["schedule"])
    run.scaler.load_state_dict(state["scaler"])
    if run.ema:
        dcp.set_model_state_dict(run.ema.module, state["ema"], options=options)
        run.ema.n_averaged.fill_(state["ema_updates"])
    run.epoch, run.history = state["epoch"], state["history"]
    say(f"resumed from {path} after epoch {run.epoch}")
    if len(state["random"]) == dist.get_world_size():
        random = state["random"][dist.get_rank()]
        torch.set_rng_state(random[0])
        if device.type == "cuda" and len(random) > 1:
            torch.cuda.set_rng_state(random[1])
    else:
        torch.manual_seed(mixed_seed(identity["seed"], run.epoch, dist.get_rank()))
        say(f"written by {len(state['random'])} processes: drop path draws other random numbers from here on")


if __name__ == "__main__":
    main()
