"""Train CLIP or MoCo v3 with SCAN: full data in warm-up and preparation epochs, less in mutation epochs.

    torchrun train.py --arch vit_b32 --prune 0.3                  # CLIP; built-in data; CPU or one GPU
    torchrun train.py --arch moco_vit_s16 --prune 0.35            # MoCo v3
    torchrun --nproc_per_node 8 train.py --arch vit_b32 --prune 0.3 \\
        --data 'cc3m/{00000..00331}.tar' --val-data val/00000.tar  # one node, 8 GPUs
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...
    python train.py --arch vit_tiny --prune 0                     # full data, the baseline

The same command again resumes from --out. The method itself is in scan.py; the loop that uses it is `train`.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import clip_model
import data
import eval as evaluation
import moco
from data import DataError
from scan import Scan, ScanSampler, info_nce

VERSION = 1

# batch: global. Of the paper; MoCo's rate is 1.5e-4 x batch / 256. The tiny ones are ours, for two CPU cores.
CLIP = dict(epochs=32, batch_size=800, lr=1e-3, wd=0.1, image_size=224, crop_min=0.9, prune=0.3)
MOCO = dict(epochs=100, batch_size=600, wd=0.1, warmup=10.0, image_size=224, crop_min=0.08, prune=0.35)
RECIPES = {arch: CLIP for arch in clip_model.ARCHS} | {
    "vit_tiny": CLIP | dict(epochs=60, batch_size=128, image_size=64),
    "moco_vit_s16": MOCO,
    "moco_vit_b16": MOCO | dict(batch_size=370),
    "moco_vit_tiny": MOCO | dict(epochs=80, batch_size=128, lr=2e-3, warmup=3.0, image_size=32, crop_min=0.3),
}
# The built-in data, on two CPU cores: so few steps that a large model needs a low rate.
SHAPES = dict(epochs=12, batch_size=64, lr=1e-4, warmup=1.0, image_size=64)
SHAPES_OF = {
    "vit_tiny": SHAPES | dict(epochs=60, lr=1e-3, warmup=3.0),
    # small crops of a drawing often miss what is drawn
    "moco_vit_tiny": SHAPES | dict(epochs=180, lr=1e-3, warmup=3.0, image_size=32, crop_min=0.85),
    "moco_vit_s16": SHAPES | dict(image_size=32),
    "moco_vit_b16": SHAPES | dict(image_size=32),
}

TIMEOUT = timedelta(minutes=30)  # how long ranks wait for one that indexes shards, or is gone without a word

TEMPERATURE, MOMENTUM = 0.2, 0.99  # of MoCo v3; the momentum rises to 1 by a cosine

# a resumed run must agree on these; the rest (workers, how often to evaluate ...) may change
METHOD = (
    "arch prune rho_red rho_ill t_cos warmup_threshold warmup_rule keep mismatch epochs batch_size accum "
    "lr wd warmup image_size crop_min precision seed"
).split()


class TrainError(Exception):
    """One line for the user."""


# ---------------------------------------------------------------- arguments


def parse_args(argv=None):
    parser = evaluation.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", choices=list(RECIPES), default="vit_b32")
    add(
        "--data",
        default="shapes",
        help="shapes[:N], tar shards ({00000..00331}, globs, A::B), .csv/.tsv, class folders, cifar10[:DIR]",
    )
    add(
        "--val-data",
        help="the same kinds: zero-shot (classes) or retrieval (pairs); MoCo: kNN. Built-in data: its own",
    )
    add("--img-key", default="filepath", help="column of a CSV")
    add("--caption-key", default="title", help="column of a CSV")
    add("--label-key", help="MoCo's kNN: column of a CSV, or key in the .json of tar shards, with the class")
    add(
        "--mismatch",
        type=float,
        default=0.0,
        help="share of the captions to shuffle, to measure what SCAN finds",
    )
    # SCAN
    add(
        "--prune",
        type=float,
        help="rho: average share left out per round (CLIP 0.3, MoCo 0.35); 0 trains on the full data",
    )
    add("--rho-red", type=float, help="share marked redundant, if not --prune")
    add("--rho-ill", type=float, help="share marked ill-matched, if not --prune")
    add("--t-cos", type=int, default=3, help="mutation epochs per round")
    add("--warmup-threshold", type=float, default=0.3, help="T_td: relative drop of the epoch loss")
    add("--warmup-rule", choices=["stable", "printed"], default="stable")
    add("--keep", help="train on these ids only (.npy), a static coreset")
    # optimisation; defaults depend on the arch and the data
    add("--epochs", type=int)
    add("--batch-size", type=int, help="global: over all ranks")
    add(
        "--accum",
        type=int,
        default=1,
        help="micro-batches per step, exact: all negatives, two forward passes",
    )
    add("--lr", type=float, help="peak")
    add("--wd", type=float)
    add("--warmup", type=float, help="of the learning rate, in epochs (fractions allowed)")
    add("--image-size", type=int)
    add("--crop-min", type=float, help="area of the smallest random crop, as a share of the picture's")
    # running
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 on a GPU that has it",
    )
    add(
        "--compile", choices=["auto", "on", "off"], default="auto", help="auto: on a GPU, from 5,000 steps on"
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--workers", type=int, help="loading processes per rank")
    add("--eval-every", type=int, default=5, help="epochs; 0: at the end only")
    add(
        "--save-every",
        type=int,
        default=0,
        help="steps between checkpoints, besides the one after each epoch",
    )
    add("--max-bad", type=float, default=0.01, help="share of unreadable samples that ends the run")
    add("--seed", type=int, default=0)
    add("--vocab", help="bpe_simple_vocab_16e6.txt.gz for CLIP's tokens; without it, hashed words")
    add("--out", help="folder of log and checkpoints (default: runs/ARCH-pruneP-seedS)")
    args = parser.parse_args(argv)

    shapes, is_moco = args.data.partition(":")[0] == "shapes", args.arch in moco.ARCHS
    defaults = RECIPES[args.arch]
    if shapes:
        defaults = defaults | SHAPES_OF.get(args.arch, SHAPES)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, min(value, args.epochs) if name == "warmup" else value)
    if args.lr is None:
        args.lr = 1.5e-4 * args.batch_size / 256
    args.rho_red = args.prune if args.rho_red is None else args.rho_red
    args.rho_ill = args.prune if args.rho_ill is None else args.rho_ill
    args.out = args.out or f"runs/{args.arch}-prune{args.prune:g}-seed{args.seed}"
    if args.workers is None:
        args.workers = min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.val_data is None and shapes:
        args.val_data = "shapes"

    def need(ok, flag, what):
        if not ok:
            parser.error(f"--{flag.replace('_', '-')} must be {what}, got {getattr(args, flag)}")

    for flag in ("prune", "rho_red", "rho_ill"):
        need(0 <= getattr(args, flag) <= 1, flag, "a share between 0 and 1")
    if args.rho_red + args.rho_ill > 1:
        parser.error(
            f"--rho-red and --rho-ill (or twice --prune) sum to {args.rho_red + args.rho_ill:g}, more than 1"
        )
    for flag in ("t_cos", "epochs", "accum", "image_size"):
        need(1 <= getattr(args, flag) < 2**31, flag, "at least 1")
    for flag in ("workers", "eval_every", "save_every", "seed"):
        need(0 <= getattr(args, flag) < 2**63, flag, "at least 0")
    need(args.image_size <= 4096, "image_size", "at most 4096")
    need(args.workers <= 1024, "workers", "at most 1024")
    need(0 < args.crop_min <= 1, "crop_min", "a share above 0")
    for flag in ("mismatch", "max_bad"):
        need(0 <= getattr(args, flag) <= 1, flag, "a share between 0 and 1")
    for flag in ("lr", "wd", "warmup"):
        value = getattr(args, flag)
        need(value is None or 0 <= value < math.inf, flag, "a finite number of at least 0")
    need(math.isfinite(args.warmup_threshold), "warmup_threshold", "finite")
    need(args.warmup is None or args.warmup <= args.epochs, "warmup", f"at most the {args.epochs} epochs")
    need(2 <= args.batch_size < 2**31, "batch_size", "at least 2: a contrastive loss needs negatives")
    world = int(os.environ.get("WORLD_SIZE", 1))
    need(
        args.batch_size % (world * args.accum) == 0,
        "batch_size",
        f"divisible by {world} rank(s) x {args.accum} --accum",
    )
    patch = (
        moco.ARCHS[args.arch]["patch"] if is_moco else clip_model.ARCHS[args.arch]["vision"].get("patch", 32)
    )
    need(args.image_size % patch == 0, "image_size", f"a multiple of {patch} for {args.arch}")
    if args.accum > 1 and not args.arch.startswith("vit"):
        parser.error(
            f"--accum: not exact with the BatchNorm or stochastic depth of {args.arch}; use more ranks "
            f"instead"
        )
    if is_moco and args.mismatch:
        parser.error("--mismatch shuffles captions, and MoCo reads none")
    if is_moco and args.vocab:
        parser.error("--vocab is for captions, and MoCo reads none")
    return args


# ---------------------------------------------------------------- ranks


def start_ranks(args):
    """-> rank, world size, device; from torchrun's environment, or one process without it."""
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if cuda and local >= torch.cuda.device_count():
        raise TrainError(
            f"rank {rank} finds no GPU {local} here: start one rank per GPU, or use --device cpu"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        # After a restart by torchrun (--max-restarts) its store still holds the addresses of the dead ranks.
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=TIMEOUT, store=store, rank=rank, world_size=world
        )
    return rank, world, device


def mean_in_rank_order(_, bucket):
    """DDP's averaging for ranks on CPUs, the same to the last bit in a resumed run.

    Gloo's own order of summing depends on an element's place in its bucket, and DDP rearranges its buckets
    after the first step of a process.
    """
    grad, world = bucket.buffer(), dist.get_world_size()
    mine = F.pad(grad, (0, -len(grad) % world))
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine)  # each rank sums a part
    dist.all_gather_into_tensor(mine, functools.reduce(torch.add, theirs.chunk(world)) / world)
    done = torch.futures.Future()
    done.set_result(mine[: len(grad)])
    return done


class StopSignal:
    """SIGTERM or Ctrl-C on any rank, agreed upon by all at the same step, without making anybody wait.

    Each step starts a reduction of one flag on the hosts and reads the result of the step before.
    """

    def __init__(self, world):
        self.asked = False
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world > 1 else None
        self.pending = None
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_):
        self.asked = True

    def __call__(self):
        if self.agent not in (None, os.getppid()):
            self.asked = True  # torchrun itself is gone: nobody would end this rank
        if self.group is None:
            return self.asked
        before, flag = self.pending, torch.tensor(int(self.asked))
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])


def check_ranks_agree(what, values, device):
    """Fail loudly if a tensor differs between the ranks (one hash each is compared)."""
    if not dist.is_initialized():
        return
    digest = hashlib.sha256(values.numpy().tobytes()).digest()
    mine = torch.tensor(int.from_bytes(digest[:8], "little") >> 1, device=device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if low != high:
        raise TrainError(
            f"the ranks disagree on the {what}: do they see the same data and run the same code?"
        )


# ---------------------------------------------------------------- optimisation


def learning_rate(epoch, args):
    """Linear warm-up, then a cosine to 0; `epoch` is fractional, so shorter epochs never bend it."""
    if epoch < args.warmup:
        return args.lr * epoch / args.warmup
    done = (epoch - args.warmup) / max(args.epochs - args.warmup, 1e-9)
    return args.lr * (1 + math.cos(math.pi * min(done, 1))) / 2


def moco_momentum(epoch, args):
    return 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * epoch / args.epochs)) / 2


def make_optimizer(model, args, device):
    # CLIP: weight matrices decay; biases, norms, the class token and the logit scale do not. MoCo: all do.
    least = 0 if args.arch in moco.ARCHS else 2
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= least]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < least]
    betas, eps = ((0.9, 0.98), 1e-6) if args.arch.startswith("vit") else ((0.9, 0.999), 1e-8)
    groups = [{"params": decay, "weight_decay": args.wd}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=eps, fused=device.type == "cuda")


def clip_losses(image, text, scale):
    """-> (b,) losses of both directions of Eq. 1, and what to minimise."""
    a, b = info_nce(image, text, scale), info_nce(text, image, scale)
    return a, b, ((a + b) / 2).mean()


def moco_losses(q1, q2, k1, k2):
    """-> (b,) losses of both views, and what to minimise: MoCo v3 weighs it by twice the temperature."""
    a, b = info_nce(q1, k2, 1 / TEMPERATURE), info_nce(q2, k1, 1 / TEMPERATURE)
    return a, b, 2 * TEMPERATURE * (a + b).mean()


def forward_backward(model, inputs, losses, autocast):
    """-> per-sample losses of both directions, detached, and the features; gradients are in place."""
    with autocast:
        features = model(*inputs)
    a, b, loss = losses(*features)
    loss.backward()
    return a.detach(), b.detach(), features


def forward_backward_accumulated(model, inputs, losses, autocast, accum):
    """The same losses and gradients with the memory of one micro-batch, in two passes (CLIP).

    First all features without a graph: with them the loss of the full global batch, and its gradient with
    respect to each feature. Then every micro-batch again, with its graph, to carry those gradients on to the
    parameters.
    """
    chunks = list(zip(*(x.chunk(accum) for x in inputs), strict=True))
    core = getattr(model, "module", model)
    with torch.no_grad(), autocast:
        parts = [core(*chunk) for chunk in chunks]
    features = [torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), parts[0][2]]
    features = [f.detach().requires_grad_() for f in features]
    a, b, loss = losses(*features)
    loss.backward()
    gradients = zip(features[0].grad.chunk(accum), features[1].grad.chunk(accum), strict=True)
    for k, (chunk, (image_grad, text_grad)) in enumerate(zip(chunks, gradients, strict=True)):
        last = k == accum - 1
        with contextlib.nullcontext() if last or core is model else model.no_sync():  # ranks average once
            with autocast:
                image, text, scale = model(*chunk)
            torch.autograd.backward([image, text, scale], [image_grad, text_grad, features[2].grad / accum])
    return a.detach(), b.detach(), features


# ---------------------------------------------------------------- checkpoints and log


def claim(out, patience=60):
    """Keep other runs from writing to this folder -> a lock, held until the process ends or lets go of it.

    Ranks whose torchrun was killed need some seconds to notice: so wait for them.
    """
    try:
        os.makedirs(out, exist_ok=True)
        lock = open(os.path.join(out, "lock"), "a")
    except OSError as error:
        raise TrainError(f"--out {out}: {error.strerror}") from None
    for _ in range(patience):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except (BlockingIOError, PermissionError):
            time.sleep(1)
        except OSError:  # a file system without locks
            return lock
    raise TrainError(f"--out {out}: another run is writing to it")


def save(out, checkpoint):
    """last.pt is replaced at once or not at all; the one before it stays as prev.pt."""
    last, prev, new = (os.path.join(out, name) for name in ("last.pt", "prev.pt", "new.pt"))
    try:
        with open(new, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(last):
            os.replace(last, prev)
        os.replace(new, last)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(new)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainError(
            f"{last}: cannot be written ({reason}); the checkpoint before it is intact"
        ) from None


def load(out, say):
    """The newest whole checkpoint of a folder, or None."""
    damaged = []
    for name in ("last.pt", "prev.pt"):
        path = os.path.join(out, name)
        if os.path.exists(path):
            try:
                checkpoint = evaluation.load_checkpoint(path) | {"path": path}
                if damaged:
                    say(f"{damaged[0]} is damaged: going on from {path}")
                return checkpoint
            except evaluation.EvalError:
                damaged.append(path)
    if damaged:
        raise TrainError(f"{' and '.join(damaged)}: damaged; remove {out} to start anew")
    return None


def refuse_other_run(checkpoint, args, tokenizer, identity):
    if checkpoint.get("version") != VERSION:
        raise TrainError(
            f"{checkpoint['path']}: not written by this version of train.py: choose another --out"
        )
    for name in METHOD:
        before, now = checkpoint["args"].get(name), getattr(args, name)
        if before != now:
            raise TrainError(
                f"{args.out} holds a run with --{name.replace('_', '-')} {before}, this one has {now}: "
                f"choose another --out"
            )
    if checkpoint["tokenizer"] != tokenizer:
        raise TrainError(
            f"{args.out} was trained with the tokenizer {checkpoint['tokenizer']}: choose another --out"
        )
    before = checkpoint["data"]
    if (before["size"], before["hash"]) != (identity["size"], identity["hash"]):
        raise TrainError(
            f"{args.out} was trained on other data ({before['size']:,} samples, hash {before['hash']}; now "
            f"{identity['size']:,}, {identity['hash']}): choose another --out"
        )
    if before["kept"] != identity["kept"]:
        raise TrainError(f"{args.out} was trained on other ids of the same --keep file: choose another --out")


class Log:
    """log.jsonl, one record a line, written by the rank that holds the folder's lock.

    Records of epochs that are run again are dropped first.
    """

    def __init__(self, out, epochs_done, lock):
        self.path, self.lock, self.records = os.path.join(out, "log.jsonl"), lock, []
        if os.path.exists(self.path) and epochs_done:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # a line cut short by a kill
                        record = json.loads(line)
                        if record["epoch"] < epochs_done:
                            self.records.append(record)
        if lock:
            self._write(self.path + ".new", "w", self.records)
            os.replace(self.path + ".new", self.path)

    def add(self, record):
        self.records.append(record)
        if self.lock:
            self._write(self.path, "a", [record])

    @staticmethod
    def _write(path, mode, records):
        try:
            with open(path, mode, encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        except OSError as error:
            raise TrainError(
                f"{path}: cannot be written ({error.strerror}); the checkpoints are intact"
            ) from None


def found(scan, truth):
    """How well the newest candidates match planted faults: precision, recall, and both shares."""
    result = {}
    for kind, planted in truth.items():
        marked, planted = getattr(scan, kind)[:-1].cpu(), torch.from_numpy(planted)
        hits = int((marked & planted).sum())
        result[kind] = {
            "precision": round(hits / max(int(marked.sum()), 1), 4),
            "recall": round(hits / max(int(planted.sum()), 1), 4),
            "marked": round(marked.double().mean().item(), 4),
            "planted": round(planted.double().mean().item(), 4),
        }
    return result


def print_table(log, args, say):
    """What a run ends with: epochs, what SCAN saved, what it found, and how good the model is."""
    epochs = [r for r in log.records if r["event"] == "epoch"]
    say(f"\n{'epoch':>5}  {'stage':<11} {'kept':>7} {'loss':>8} {'seconds':>8}")
    for r in epochs:
        say(
            f"{r['epoch']:>5}  {r['stage']:<11} {r['kept'] / r['total']:>7.1%} {r['loss'] or math.nan:>8.4f} "
            f"{r['seconds']:>8.1f}"
        )
    if not epochs:
        return
    full_epoch = epochs[0]["total"] // args.batch_size * args.batch_size
    seen, full = epochs[-1]["samples_seen"], len(epochs) * full_epoch
    seconds = sum(r["seconds"] for r in epochs)
    say(f"\nsamples seen {seen:,} of {full:,}: {1 - seen / full:.1%} saved")
    unpruned = [r["seconds"] / r["samples"] for r in epochs if r["stage"] != "mutation"]
    time_full = float(np.median(unpruned)) * full
    say(
        f"training {seconds:,.0f} s; all epochs at the pace of the full ones {time_full:,.0f} s: "
        f"{1 - seconds / time_full:.1%} saved, {sum(r['data_seconds'] for r in epochs) / seconds:.0%} "
        f"waiting for data"
    )
    rounds = [r["found"] for r in epochs if r.get("found")]
    if rounds:
        say("planted faults among the candidates, share found per round (by chance: the share marked)")
        for kind in rounds[-1]:
            recalls = [found[kind]["recall"] for found in rounds]
            precision = np.mean([found[kind]["precision"] for found in rounds])
            say(
                f"  {kind.replace('_', '-'):<12}" + " ".join(f"{r:4.0%}" for r in recalls) + f"; mean recall "
                f"{np.mean(recalls):.1%}, precision {precision:.1%} "
                f"({rounds[-1][kind]['marked']:.1%} of the data marked, {rounds[-1][kind]['planted']:.1%} "
                f"planted)"
            )
    for r in [r for r in log.records if r["event"] == "eval"][-1:]:
        say(scores({k: v for k, v in r.items() if k not in ("event", "epoch")}))


def scores(result):
    return "  ".join(f"{k} {v:,}" if k == "n" else f"{k} {v:.2%}" for k, v in result.items())


class ProgressLine:
    """Live on a terminal; elsewhere a plain line every 15 seconds."""

    def __init__(self, rank):
        self.live, self.mine = sys.stdout.isatty(), rank == 0
        self.next = time.monotonic() + 1

    def due(self):
        return self.mine and time.monotonic() >= self.next

    def show(self, text):
        self.next = time.monotonic() + (0.5 if self.live else 15)
        print(f"\r{text:<100}" if self.live else text, end="" if self.live else "\n", flush=True)

    def clear(self):
        if self.mine and self.live:
            print(f"\r{'':<100}\r", end="", flush=True)


# ---------------------------------------------------------------- the run


def train(args, rank, world, device):
    def say(text):
        if rank == 0:
            print(text, flush=True)

    torch.manual_seed(args.seed)  # initial weights; what is random later has seeds of its own
    is_moco = args.arch in moco.ARCHS
    tokenizer = None if is_moco else evaluation.tokenizer_for(args.vocab)
    text = None if is_moco else tokenizer.name
    dataset, keep = training_data(args, tokenizer)
    total, kept_hash = len(dataset), hashlib.sha256(keep.numpy().tobytes()).hexdigest()[:16]
    identity = {"size": total, "hash": dataset.fingerprint(), "kept": kept_hash if args.keep else None}
    check_ranks_agree("data", torch.tensor(list(str(identity).encode())), device)
    val = open_source(args.val_data, False, args) if args.val_data else None
    if is_moco and val is not None and (val.labels is None or dataset.source.labels is None):
        raise TrainError("--val-data: MoCo's kNN needs classes in it and in --data; name their --label-key")
    if is_moco and val is not None:
        evaluation.class_labels(val, dataset.source.classes)  # a class that is unknown is said now
    steps_full = int(keep.sum()) // args.batch_size
    if args.warmup is None:  # the paper's 10k steps, on small data a twentieth of the run
        args.warmup = round(min(10_000 / steps_full, 0.05 * args.epochs), 4)

    if is_moco:
        model, losses = moco.create(args.arch, args.image_size), moco_losses
    else:
        model, losses = clip_model.create(args.arch, args.image_size, tokenizer.vocab_size), clip_losses
    model.to(device)
    optimizer = make_optimizer(model, args, device)
    scan = Scan(
        total,
        rho_red=args.rho_red,
        rho_ill=args.rho_ill,
        t_cos=args.t_cos,
        threshold=args.warmup_threshold,
        rule=args.warmup_rule,
        seed=args.seed,
    )

    lock = claim(args.out) if rank == 0 else None
    first_epoch, start_step = 0, 0
    totals = {"samples": 0, "seconds": 0.0, "data_seconds": 0.0, "bad": []}  # of the epoch under way
    samples_seen = 0
    if world > 1:
        dist.barrier()  # --out exists
    checkpoint = load(args.out, say)
    if checkpoint:
        refuse_other_run(checkpoint, args, text, identity)
        first_epoch, start_step = checkpoint["epoch"], checkpoint["step"]
    check_ranks_agree("checkpoint in --out", torch.tensor([first_epoch, start_step]), device)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scan.load_state_dict(checkpoint["scan"])
        totals, samples_seen = checkpoint["totals"], checkpoint["samples_seen"]
        if rank == 0 and checkpoint["path"].endswith("prev.pt"):
            # else the next save would put a damaged last.pt in the place of this one
            os.replace(checkpoint["path"], os.path.join(args.out, "last.pt"))
    log = Log(args.out, first_epoch, lock)

    bf16 = args.precision == "bf16" or (
        args.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    compiled = args.compile == "on" or (
        args.compile == "auto" and device.type == "cuda" and steps_full * args.epochs >= 5_000
    )
    module = torch.compile(model) if compiled else model
    if world > 1:
        module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
        if device.type == "cpu" and world > 2:  # two summands have but one order
            module.register_comm_hook(None, mean_in_rank_order)
    sampler = ScanSampler(args.batch_size, rank, world, seed=args.seed)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=data.collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    stop = StopSignal(world)
    line = ProgressLine(rank)

    say(
        f"data      {args.data}: {total:,} samples, hash {identity['hash']}"
        + f"; text as {text}" * (not is_moco)
    )
    say(f"model     {args.arch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    say(f"running   {world} rank(s) on {device.type}, {'bf16' if bf16 else 'fp32'}, compile {compiled}")
    say_settings(args, world, say)
    say(f"writing   {args.out}/log.jsonl, last.pt" + (f"; from epoch {first_epoch} on" if checkpoint else ""))
    if first_epoch >= args.epochs:
        print_table(log, args, say)
        say(f"\nThis run is finished. To start anew, remove {args.out} or choose another --out.")
        return

    def write_checkpoint(epoch, step):
        totals["bad"] = union_over_ranks(totals["bad"])
        if not torch.stack([x.isfinite().all() for x in model.state_dict().values()]).all():
            raise TrainError(
                f"weights not finite at epoch {epoch}, step {step}: stopped; {args.out} holds the checkpoint "
                f"before it. A lower --lr or --precision fp32 may help"
            )
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"scan": scan.state_dict()}
            state |= {"epoch": epoch, "step": step, "totals": totals, "samples_seen": samples_seen}
            state |= {"args": vars(args), "tokenizer": text, "version": VERSION}
            save(args.out, state | {"data": identity})

    for epoch in range(first_epoch, args.epochs):
        # SCAN decides what this epoch trains on: everything, or all but a random share of the candidates.
        kept = scan.begin_epoch(epoch)
        kept = kept[keep[kept]]
        check_ranks_agree("kept samples", kept, device)
        dataset.set_epoch(epoch)
        steps = len(kept) // args.batch_size
        if steps:  # else, with all data marked (--prune 0.5), this epoch leaves nothing to train on
            sampler.set_epoch(epoch, kept, start_step)
        last = epoch + 1 == args.epochs
        evaluating = val is not None and (last or (args.eval_every and (epoch + 1) % args.eval_every == 0))

        model.train()
        suspects = deque()  # steps whose losses the host has not looked at yet
        began = waiting_since = time.monotonic()
        seconds_before = totals["seconds"]
        step = start_step
        for ids, failed, *batch in loader if steps else ():
            totals["data_seconds"] += time.monotonic() - waiting_since
            inputs = dataset.inputs(*batch, device, model.mean_std)
            rate = learning_rate(epoch + step / steps, args)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # stochastic depth draws from this: no generator's state to save
            torch.manual_seed(hash((args.seed, epoch, step, rank)) % 2**63)

            if is_moco:
                model.update_momentum_encoder(moco_momentum(epoch + step / steps, args))
            if args.accum > 1:
                a, b, features = forward_backward_accumulated(module, inputs, losses, autocast, args.accum)
            else:
                a, b, features = forward_backward(module, inputs, losses, autocast)
            scan.observe(ids, a, b)  # SCAN watches; the loss stays as it is
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not is_moco:
                model.logit_scale.data.clamp_(0, math.log(100))

            step += 1
            totals["samples"] += args.batch_size
            totals["bad"] += [int(i) for i in failed if i >= 0 and i not in totals["bad"]]
            refuse_many_bad(totals["bad"], dataset, args)
            finite = [x.detach().isfinite().all(-1) for x in features[:2]] + [(a + b).isfinite()]
            suspects.append((epoch, step, ids, to_host(torch.stack(finite))))
            if len(suspects) > 4:
                refuse_non_finite(suspects.popleft(), args.out)
            totals["seconds"] = seconds_before + time.monotonic() - began
            if line.due():
                line.show(progress_text(args, scan, totals, step, steps, a, b))
            stopping = stop()
            # before an evaluation too: it may take long, and be killed
            due = (args.save_every and step % args.save_every == 0) or (evaluating and step == steps)
            if stopping or due:
                while suspects:
                    refuse_non_finite(suspects.popleft(), args.out)
                write_checkpoint(epoch, step)
            if stopping:
                line.clear()
                say(f"stopped in epoch {epoch}, step {step} of {steps}; the same command goes on from here")
                return
            waiting_since = time.monotonic()
        while suspects:
            refuse_non_finite(suspects.popleft(), args.out)
        totals["seconds"] = seconds_before + time.monotonic() - began

        scan.end_epoch()
        check_ranks_agree("candidates", scan.redundant.cpu() * 2 + scan.ill_matched.cpu(), device)
        bad = union_over_ranks(totals["bad"])
        refuse_many_bad(bad, dataset, args)
        samples_seen += totals["samples"]
        record = {"event": "epoch", "epoch": epoch, "stage": scan.stage}
        record |= {"loss": round(scan.loss, 6) if steps else None}
        rate = learning_rate(epoch + max(steps - 1, 0) / max(steps, 1), args)  # of the last step
        record |= {"kept": len(kept), "total": total, "candidates": len(scan.candidates), "lr": rate}
        record |= {"samples": totals["samples"], "samples_seen": samples_seen}
        record |= {name: round(totals[name], 3) for name in ("seconds", "data_seconds")}
        if scan.stage == "preparation" and dataset.truth:
            record["found"] = found(scan, dataset.truth)
        if bad:
            record["bad"] = [dataset.source.where(i) for i in bad[:1000]]
        log.add(record)
        line.clear()
        say(
            f"epoch {epoch:>3}/{args.epochs}  {scan.stage:<11} kept {len(kept) / total:6.1%}  "
            f"loss {scan.loss:.4f}  {totals['seconds']:.1f} s" + (f"  {len(bad)} unreadable" if bad else "")
        )
        if evaluating:
            result = evaluate(model, tokenizer, dataset.source, val, device, args.workers)
            log.add({"event": "eval", "epoch": epoch} | result)
            say("    " + scores(result))
        start_step, totals = 0, {"samples": 0, "seconds": 0.0, "data_seconds": 0.0, "bad": []}
        write_checkpoint(epoch + 1, 0)
        if stop():
            say(f"stopped after epoch {epoch}; the same command goes on from here")
            return
    print_table(log, args, say)


def say_settings(args, world, say):
    say(f"          {args.image_size} px, {args.workers} loading process(es) per rank, seed {args.seed}")
    say(f"batch     {args.batch_size} global = {args.batch_size // world} per rank x {world}")
    say(f"          ln({args.batch_size}) = {math.log(args.batch_size):.3f} is the loss of knowing nothing")
    say(f"rate      {args.lr:g}, {args.warmup:g} of {args.epochs} epochs warm-up; weight decay {args.wd:g}")
    say(
        f"pruning   {args.rho_red:.0%} redundant + {args.rho_ill:.0%} ill-matched marked per batch: after "
        f"the warm-up {(args.rho_red + args.rho_ill) / 2:.1%} left out per round of 1 + {args.t_cos} epochs"
    )


def training_data(args, tokenizer):
    """-> dataset, and the mask (N,) of what --keep keeps; refuses data too small for the batch."""
    source = open_source(args.data, True, args)
    if tokenizer is None:
        dataset = data.Views(source, args.image_size, crop_min=args.crop_min, seed=args.seed)
    else:
        options = dict(crop_min=args.crop_min, seed=args.seed, mismatch=args.mismatch)
        dataset = data.Pairs(source, tokenizer, args.image_size, **options)
    keep = read_keep(args.keep, len(dataset))
    size = int(keep.sum())
    if size < args.batch_size:
        raise TrainError(f"{size} samples do not fill one global batch: use a smaller --batch-size")
    fewest = max(size - int((args.rho_red + args.rho_ill) * len(dataset)), 0)  # in the last mutation epoch
    if fewest < args.batch_size and args.rho_red + args.rho_ill < 1:
        raise TrainError(
            f"pruning may leave {fewest} samples, less than one global batch of {args.batch_size}: "
            "use a smaller --batch-size or --prune"
        )
    return dataset, keep


def open_source(spec, train_split, args):
    """The first rank of a node indexes what is not indexed yet; the others then read its cache."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    keys = {"image_key": args.img_key, "caption_key": args.caption_key, "label_key": args.label_key}
    captions = args.arch not in moco.ARCHS
    source = data.open_source(spec, train=train_split, size=args.image_size, captions=captions, **keys)
    if dist.is_initialized() and first:
        dist.barrier()
    return source


def read_keep(path, total):
    """Mask (N,) of the samples a static coreset keeps."""
    if path is None:
        return torch.ones(total, dtype=torch.bool)
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TrainError(f"--keep {path}: not a .npy file of ids ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or ids.min() < 0 or ids.max() >= total:
        raise TrainError(f"--keep {path}: needs a flat array of ids in 0..{total - 1}")
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, torch.from_numpy(ids.astype(np.int64)), True)


def evaluate(model, tokenizer, source, val, device, workers):
    """CLIP: zero-shot on labelled data, retrieval on pairs. MoCo: kNN among 50,000 pictures of `source`."""
    model.eval()
    if dist.is_initialized():  # batch statistics of the ResNets differ: take rank 0's, as the checkpoint does
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    if tokenizer is None:
        result = evaluation.knn(model, source, val, device, most=50_000, workers=workers)
    else:
        protocol = evaluation.zeroshot if val.labels is not None else evaluation.retrieval
        result = protocol(model, tokenizer, val, device, workers=workers)
    return {k: v if k == "n" else round(v, 5) for k, v in result.items()}


def ignore_signals(_):
    """Ctrl-C and a scheduler's SIGTERM reach the loading processes too: their rank saves, then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_loading():
    """Python would end the loading processes by SIGTERM, which they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or DataLoader takes their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


def to_host(tensor):
    """Start a copy to the host -> (copy, event that says when it is there)."""
    if tensor.device.type == "cpu":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def refuse_non_finite(suspect, out):
    epoch, step, ids, (finite, event) = suspect
    if event is not None:
        event.synchronize()  # a few steps old: it has long happened
    if not finite.all():
        # one bad feature spoils the loss of every row of every rank, through the keys: name its own row
        bad = union_over_ranks(ids[~finite[:2].all(0)].tolist()) or union_over_ranks(ids[~finite[2]].tolist())
        raise TrainError(
            f"loss not finite in epoch {epoch}, step {step}, from samples {bad[:8]}: stopped; "
            f"{out} holds the checkpoint before it. A lower --lr or --precision fp32 may help"
        )


def refuse_many_bad(ids, dataset, args):
    """Of a rank's own, in each step, and of all ranks', after each epoch."""
    if len(ids) > args.max_bad * len(dataset):
        places = "; ".join(dataset.source.where(i) for i in ids[:3])
        raise TrainError(
            f"{len(ids)} samples can't be read, more than --max-bad {args.max_bad:g} of {len(dataset):,}: "
            f"{places}"
        )


def union_over_ranks(ids):
    if not dist.is_initialized():
        return sorted(ids)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ids)
    return sorted(set().union(*everyone))


def progress_text(args, scan, totals, step, steps, a, b):
    pace = totals["seconds"] / max(totals["samples"], 1)  # seconds a sample
    left = ((steps - step) + (args.epochs - scan.epoch - 1) * steps) * args.batch_size * pace
    return (
        f"epoch {scan.epoch}/{args.epochs} {scan.stage}  step {step}/{steps}  "
        f"loss {((a + b) / 2).mean():.3f}  {1 / max(pace, 1e-9):,.0f} samples/s  "
        f"data {totals['data_seconds'] / max(totals['seconds'], 1e-9):.0%}  left ~{left / 60:.0f} min"
    )


def fail(line):
    """Rank 0 speaks for all: torchrun then ends the others, unless the failure is theirs alone."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        line = f"rank {rank}: {line}"
    print(f"train.py: {line}", file=sys.stderr)
    sys.exit(1)


def main(argv=None):
    args = parse_args(argv)
    try:
        train(args, *start_ranks(args))
    except (TrainError, DataError, evaluation.EvalError) as error:
        fail(str(error).strip().splitlines()[-1])
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        fail(f"lost another rank; the same command goes on from the last checkpoint in {args.out}")
    finally:
        end_loading()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
