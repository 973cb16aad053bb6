"""Train CLIP or MoCo v3 with SCAN: full data in warm-up and preparation epochs, less in mutation epochs.

    torchrun train.py --arch vit_b32 --prune 0.3                  # CLIP; built-in data; CPU or one GPU
    torchrun train.py --arch moco_vit_s16 --prune 0.35            # MoCo v3
    torchrun --nproc_per_node 8 train.py --arch vit_b32 --prune 0.3 \\
        --data 'cc3m/{00000..00331}.tar' --val-data val/00000.tar  # one node, 8 GPUs
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...
    python train.py --arch vit_tiny --prune 0                     # full data, the baseline

The same command again resumes from --out. The method itself is in scan.py; the loop that uses it is `train`.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import clip_model
import data
import eval as evaluation
import moco
from data import UserError
from scan import Scan, ScanSampler

# ---------------------------------------------------------------- recipes

# batch: global. Of the paper; MoCo's rate is 1.5e-4 x batch / 256. The tiny ones are ours, for two CPU cores.
CLIP = dict(epochs=32, batch_size=800, lr=1e-3, wd=0.1, image_size=224, crop_min=0.9, prune=0.3)
MOCO = dict(epochs=100, batch_size=600, wd=0.1, warmup=10.0, image_size=224, crop_min=0.08, prune=0.35)
RECIPES = {arch: CLIP for arch in clip_model.ARCHS} | {
    "vit_tiny": CLIP | dict(epochs=60, batch_size=128, lr=5e-4, image_size=64),
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


# ---------------------------------------------------------------- the loop


def train(args, rank, world, device, make_scan=Scan):
    """make_scan: another class with Scan's interface, for comparisons."""
    torch.manual_seed(args.seed)  # initial weights; what is random later has seeds of its own
    is_moco = args.arch in moco.ARCHS
    tokenizer = None if is_moco else evaluation.tokenizer_for(args.vocab)
    dataset, val = open_data(args, tokenizer)
    model = create_model(args, tokenizer).to(device)
    optimizer = make_optimizer(model, args)
    settings = dict(t_cos=args.t_cos, threshold=args.warmup_threshold, rule=args.warmup_rule, seed=args.seed)
    keep = read_keep(args.keep, len(dataset))
    scan = make_scan(len(dataset), args.prune, args.rho_red, args.rho_ill, **settings, keep=keep)
    sampler = make_sampler(scan, args)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=data.collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    set_warmup_and_precision(args, len(sampler), device)
    run = Run(args, rank, world, device, dataset, val, tokenizer, model, optimizer, scan)
    first_epoch = run.resume()
    module, autocast = parallel(model, args, len(sampler), world, device)

    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)  # SCAN: all data, or all but a random share of the candidates
        dataset.set_epoch(epoch)
        run.begin_epoch()
        steps = len(sampler)
        model.train()
        for step, (ids, failed, *batch) in enumerate(run.timed(loader), sampler.start):
            now = epoch + step / steps  # fractional epoch: shorter epochs never bend a schedule
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(now, args)
            if is_moco:
                model.update_momentum_encoder(moco.momentum(now / args.epochs))
            torch.manual_seed(hash((args.seed, epoch, step, rank)) % 2**63)  # for stochastic depth

            a, b, backward = forward(module, model.losses, model.inputs(batch, device), autocast, args.accum)
            scan.observe(ids, a, b)  # SCAN watches; the loss stays as it is
            backward()
            optimizer.step()
            optimizer.zero_grad()
            if not is_moco:
                model.logit_scale.data.clamp_(0, math.log(100))
            if run.step(step + 1, steps, failed, a + b):  # saves, shows, looks at signals: True to stop
                return
        scan.end_epoch()
        if run.end_epoch():  # logs, saves, evaluates
            return
    run.print_table()


def forward(module, losses, inputs, autocast, accum=1):
    """-> per-sample losses of both directions, (b,) each, and a function that makes the gradients.

    With accum > 1 in the memory of a micro-batch, yet with all negatives, in two passes (CLIP alone): first
    all features without a graph, and the loss of the global batch with its gradient for each feature; then
    every micro-batch again, with its graph, to carry those gradients on to the parameters.
    """
    if accum == 1:
        with autocast:
            features = module(*inputs)
        a, b, loss = losses(*features)
        return a, b, loss.backward

    chunks = list(zip(*(x.chunk(accum) for x in inputs)))
    core = getattr(module, "module", module)
    with torch.no_grad(), autocast:
        images, texts, scales = zip(*(core(*chunk) for chunk in chunks))
    features = [x.requires_grad_() for x in (torch.cat(images), torch.cat(texts), scales[0].clone())]
    a, b, loss = losses(*features)

    def backward():
        loss.backward()
        image_grads, text_grads = (x.grad.chunk(accum) for x in features[:2])
        for k, chunk in enumerate(chunks):
            averaging = k == accum - 1 or core is module  # ranks average once
            with contextlib.nullcontext() if averaging else module.no_sync():
                with autocast:
                    outputs = module(*chunk)
                torch.autograd.backward(outputs, [image_grads[k], text_grads[k], features[2].grad / accum])

    return a, b, backward


# ---------------------------------------------------------------- model and optimizer


def create_model(args, tokenizer):
    if args.arch in moco.ARCHS:
        model = moco.create(args.arch, args.image_size)
    else:
        model = clip_model.create(args.arch, args.image_size, tokenizer.vocab_size)
    if args.init:
        trained_with = evaluation.load_weights(model, args.init)
        if tokenizer is not None and trained_with not in (None, tokenizer.name):
            here = f"this run has {tokenizer.name}"
            raise UserError(f"--init {args.init}: was trained with {trained_with}, and {here}")
    if args.arch.startswith("rn"):
        model.visual.to(memory_format=torch.channels_last)
    return model


def make_optimizer(model, args):
    """CLIP as open_clip: weight matrices decay, but no name with "bias". MoCo v3: everything does."""
    is_moco, decay, others = args.arch in moco.ARCHS, [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if is_moco or evaluation.decays(name, parameter) else others).append(parameter)
    betas, eps = ((0.9, 0.98), 1e-6) if args.arch.startswith("vit") else ((0.9, 0.999), 1e-8)
    groups = [{"params": decay, "weight_decay": args.wd}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=eps, fused=not decay[0].is_mps)


def learning_rate(now, args):
    """Linear warm-up, then a cosine to 0. now: in epochs, with their fractions."""
    if now < args.warmup:
        return args.lr * now / args.warmup
    done = (now - args.warmup) / max(args.epochs - args.warmup, 1e-9)
    return args.lr * (1 + math.cos(math.pi * min(done, 1))) / 2


def set_warmup_and_precision(args, steps, device):
    """What depends on the data and the device: written into args, so that a resume compares what was used."""
    if args.warmup is None:  # the paper's 10k steps, on small data a twentieth of the run
        args.warmup = round(min(10_000 / steps, 0.05 * args.epochs), 4)
    args.precision = evaluation.precision(args.precision, device)


def parallel(model, args, steps, world, device):
    """-> what the loop calls instead of the model, under DDP and compiled where asked for; its autocast."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    module = model
    if world > 1:
        module = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    long = device.type == "cuda" and steps * args.epochs >= 5_000
    if args.compile == "on" or (args.compile == "auto" and long):
        module.compile()  # DDP and all: so that it cuts the graph where gradients can be sent
    return module, autocast


# ---------------------------------------------------------------- data


def open_data(args, tokenizer):
    """-> the dataset to train on; the source to evaluate on, or None."""
    source = open_source(args, args.data, True)
    if tokenizer is None:
        options = dict(crop_min=args.crop_min, seed=args.seed)
        dataset = data.Views(source, args.image_size, moco.draw_views, **options)
    else:
        options = dict(crop_min=args.crop_min, seed=args.seed, mismatch=args.mismatch)
        dataset = data.Pairs(source, tokenizer, args.image_size, **options)
    val = open_source(args, args.val_data, False, captions=False) if args.val_data else None
    if val is not None and val.labels is None and tokenizer is not None:  # retrieval, which needs them
        val = open_source(args, args.val_data, False)
    if val is not None and tokenizer is None:
        if val.labels is None or source.labels is None:
            raise UserError(
                "--val-data: MoCo's kNN needs classes in it and in --data; name their --label-key"
            )
        evaluation.class_labels(val, source.classes)  # a class that is unknown is said now
    elif val is not None and val.labels is not None:
        evaluation.zeroshot_classes(val)
    return dataset, val


def open_source(args, spec, training, captions=True):
    captions = captions and args.arch not in moco.ARCHS
    keys = dict(image_key=args.img_key, caption_key=args.caption_key, label_key=args.label_key)
    return data.open_source(spec, train=training, size=args.image_size, captions=captions, **keys)


def read_keep(path, total):
    """Ids (n,) int64 of a static coreset, or None."""
    if path is None:
        return None
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--keep {path}: not a .npy file of ids ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or ids.min() < 0 or ids.max() >= total:
        raise UserError(f"--keep {path}: needs a flat array of ids in 0..{total - 1}")
    return torch.from_numpy(ids.astype(np.int64))


def make_sampler(scan, args):
    try:
        sampler = ScanSampler(scan, args.batch_size)
    except ValueError as error:
        raise UserError(f"{error}: use a smaller --batch-size") from None
    marked = int(args.rho_red * args.batch_size) + int(args.rho_ill * args.batch_size)
    fewest = scan.num_kept - marked * len(sampler)  # in the last mutation epoch
    if fewest < args.batch_size and marked < args.batch_size:
        raise UserError(
            f"pruning may leave {max(fewest, 0)} samples, less than one global batch of {args.batch_size}: "
            "use a smaller --batch-size or --prune"
        )
    return sampler


def evaluate(model, tokenizer, source, val, device, workers):
    """CLIP: zero-shot on labelled data, retrieval on pairs. MoCo: kNN among 50,000 pictures of `source`."""
    model.eval()
    evaluation.share_buffers(model)
    if tokenizer is None:
        result = evaluation.knn(model, source, val, device, most=50_000, workers=workers)
    else:
        protocol = evaluation.zeroshot if val.labels is not None else evaluation.retrieval
        result = protocol(model, tokenizer, val, device, workers=workers)
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}


# ---------------------------------------------------------------- flags


def parse_args(argv=None):
    share, natural, count, finite = (getattr(evaluation, n) for n in ("share", "natural", "count", "finite"))
    parser = evaluation.Parser(prog="train.py", description=__doc__)
    add = parser.add_argument
    add("--arch", choices=list(RECIPES), default="vit_b32", help="model and recipe")
    add(
        "--data",
        default="shapes",
        help="shapes[:N[,zipf]], tar shards ({00000..00331}, globs, A::B), .csv/.tsv, class folders, "
        "cifar10[:DIR]",
    )
    add("--val-data", help="the same kinds: zero-shot (classes), retrieval (pairs), kNN (MoCo)")
    add("--img-key", default="filepath", help="column of a CSV")
    add("--caption-key", default="title", help="column of a CSV")
    add("--label-key", help="MoCo's kNN: column of a CSV, or key in the .json of tar shards, with the class")
    add("--mismatch", type=share, default=0.0, help="share of captions to shuffle, to see what SCAN finds")
    # SCAN
    add(
        "--prune",
        type=share,
        help="rho: average share left out per round; 0: full data (default: CLIP .3, MoCo .35)",
    )
    add("--rho-red", type=share, help="share marked redundant (default: --prune)")
    add("--rho-ill", type=share, help="share marked ill-matched (default: --prune)")
    add("--t-cos", type=natural, default=3, help="mutation epochs per round")
    add("--warmup-threshold", type=float, default=0.3, help="T_td: relative drop of the epoch loss")
    add("--warmup-rule", choices=["stable", "printed"], default="stable", help="see scan.warmed_up")
    add("--keep", help="train on these ids only (.npy), a static coreset")
    # optimisation
    add("--epochs", type=natural, help=recipe_help("epochs"))
    add("--batch-size", type=natural, help=f"global: over all ranks ({recipe_help('batch_size')})")
    add("--accum", type=natural, default=1, help="micro-batches per step, exact, two forward passes")
    add("--lr", type=finite, help=f"peak ({recipe_help('lr')}; MoCo 1.5e-4 x batch / 256)")
    add("--wd", type=finite, help="weight decay (default: 0.1)")
    add(
        "--warmup",
        type=finite,
        help="of the rate, in epochs (default: CLIP 10,000 steps or a 20th of the run; MoCo 10)",
    )
    add("--image-size", type=natural, help=recipe_help("image_size"))
    add(
        "--crop-min",
        type=share,
        help="smallest random crop, as a share of the picture (default: CLIP .9, MoCo .08)",
    )
    add("--init", help="weights to start from: of open_clip, timm, or a run of ours")
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
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, or else cpu")
    add("--workers", type=count, help="loading processes per rank (default: the cores each rank has)")
    add("--eval-every", type=count, default=5, help="epochs; 0: at the end only")
    add(
        "--save-every",
        type=count,
        default=0,
        help="steps between checkpoints, besides each epoch's",
    )
    add("--max-bad", type=share, default=0.01, help="share of unreadable samples that ends the run")
    add("--seed", type=count, default=0, help="of all that is random")
    add("--vocab", help="bpe_simple_vocab_16e6.txt.gz for CLIP's tokens; without it, hashed words")
    add("--out", help="folder of log and checkpoints (default: runs/ARCH-pruneP-seedS)")
    args = parser.parse_args(argv)
    fill_in(args)
    check(args, parser.error)
    return args


def recipe_help(name):
    default = RECIPES["vit_b32"][name], SHAPES[name]
    return "default: CLIP {:g}; on shapes {:g}".format(*default) + (
        f"; MoCo {MOCO[name]}" if name in MOCO else ""
    )


def fill_in(args):
    """Defaults that depend on the arch, the data and the machine."""
    shapes = args.data.partition(":")[0] == "shapes"
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
        args.workers = evaluation.loading_processes()
    if args.val_data is None and shapes:
        args.val_data = "shapes"


def check(args, error):
    """What no flag shows alone."""
    is_moco, world = args.arch in moco.ARCHS, int(os.environ.get("WORLD_SIZE", 1))
    patch = (
        moco.ARCHS[args.arch]["patch"] if is_moco else clip_model.ARCHS[args.arch]["vision"].get("patch", 32)
    )
    try:
        Scan(1, args.prune, args.rho_red, args.rho_ill, args.t_cos, args.warmup_threshold)
    except ValueError as wrong:
        error(f"--prune, --rho-red, --rho-ill, --t-cos: {wrong}")
    for flag in ("rho_red", "rho_ill"):
        if getattr(args, flag) and not int(getattr(args, flag) * args.batch_size):
            error(
                f"--prune, --{flag.replace('_', '-')}: {getattr(args, flag):g} of a --batch-size of "
                f"{args.batch_size} marks no sample: a larger ratio or batch is needed"
            )
    if not math.isfinite(args.warmup_threshold):
        error(f"--warmup-threshold must be finite, got {args.warmup_threshold}")
    if args.crop_min == 0:
        error("--crop-min must be above 0")
    if args.warmup is not None and args.warmup > args.epochs:
        error(f"--warmup must be at most the {args.epochs} epochs, got {args.warmup:g}")
    if args.batch_size < 2:
        error("--batch-size must be at least 2: a contrastive loss needs negatives")
    if args.batch_size % (world * args.accum):
        error(f"--batch-size {args.batch_size} is not divisible by {world} rank(s) x {args.accum} --accum")
    if args.image_size % patch or args.image_size > 4096:
        error(
            f"--image-size must be a multiple of {patch} for {args.arch}, at most 4096, got {args.image_size}"
        )
    if args.workers > 1024:
        error(f"--workers must be at most 1024, got {args.workers}")
    if args.accum > 1 and not args.arch.startswith("vit"):
        error(f"--accum: not exact with BatchNorm or stochastic depth, as {args.arch} has: use more ranks")
    if is_moco and (args.mismatch or args.vocab):
        error("--mismatch and --vocab are for captions, and MoCo reads none")


# ---------------------------------------------------------------- what survives crashes

VERSION = 2  # of checkpoints

# a resumed run must agree on these; the rest (workers, how often to evaluate ...) may change
METHOD = (
    "arch prune rho_red rho_ill t_cos warmup_threshold warmup_rule keep mismatch epochs batch_size accum "
    "lr wd warmup image_size crop_min precision seed init"
).split()


class Run:
    """The folder of a run: its lock, config.json, log.jsonl, last.pt and prev.pt. And what the user sees."""

    def __init__(self, args, rank, world, device, dataset, val, tokenizer, model, optimizer, scan):
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.dataset, self.val, self.tokenizer = dataset, val, tokenizer
        self.model, self.optimizer, self.scan = model, optimizer, scan
        self.out, self.signals, self.records = Path(args.out), Signals(world), []
        self.totals = {"samples": 0, "seconds": 0.0, "data_seconds": 0.0, "bad": []}  # of this epoch
        self.samples_seen = 0  # in the epochs before
        self.first_bad = torch.tensor(-1, device=device)  # the first step whose loss is not finite
        self.identity = {"size": len(dataset), "hash": dataset.fingerprint(), "kept": None}
        if args.keep:
            self.identity["kept"] = hashlib.sha256(scan.kept.numpy()).hexdigest()[:16]
        self.check_ranks_agree("data", torch.tensor(list(str(self.identity).encode())))

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    # ------------------------------------------------ called by `train`

    def resume(self):
        """Load the newest checkpoint, if there is one -> the epoch to go on with."""
        self.lock = claim(self.out) if self.rank == 0 else None
        if self.world > 1:
            dist.barrier()  # --out exists
        checkpoint, path = newest_checkpoint(self.out, self.say)
        epoch = step = 0
        if checkpoint is not None:
            self.refuse_other_run(checkpoint, path)
            epoch, step = checkpoint["epoch"], checkpoint["step"]
        self.check_ranks_agree("checkpoint in --out", torch.tensor([epoch, step]))
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scan.load_state_dict(checkpoint["scan"])
            self.totals, self.samples_seen = checkpoint["totals"], checkpoint["samples_seen"]
            if self.rank == 0 and path.name == "prev.pt":
                os.replace(path, self.out / "last.pt")  # or the next save would keep a damaged one instead
        self.read_log(epoch)
        self.finished = epoch == self.args.epochs
        self.say(header(self) + (f"; from epoch {epoch} on" if checkpoint is not None else ""))
        if self.rank == 0:
            config = json.dumps(vars(self.args), indent=1).encode()
            write_whole(self.out / "config.json", lambda file: file.write(config))
        if epoch and not step:
            self.evaluate_if_due(epoch - 1)
        return epoch

    def begin_epoch(self):
        self.check_ranks_agree("kept samples", self.scan.kept_mask)
        self.began = time.monotonic() - self.totals["seconds"]
        self.shown = time.monotonic()

    def timed(self, loader):
        """The loader's batches; the time that they are waited for is counted."""
        batches = iter(loader)
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.totals["data_seconds"] += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def step(self, done, steps, failed, losses):
        """After each step -> whether to stop. failed: ids that can't be read. losses: (b,), finite or not."""
        wrong = ~losses.detach().isfinite().all() & (self.first_bad < 0)
        self.first_bad = torch.where(wrong, done, self.first_bad)  # on the device: looked at now and then
        self.totals["samples"] += self.args.batch_size
        self.totals["seconds"] = time.monotonic() - self.began
        if len(failed):
            self.totals["bad"] = sorted({*self.totals["bad"], *failed.tolist()})
            self.refuse_many_bad(self.totals["bad"])
        live = sys.stdout.isatty()
        showing = self.rank == 0 and time.monotonic() - self.shown > (0.5 if live else 15)
        looking, stopping = self.signals.agreed(showing)
        saving = stopping or (self.args.save_every and done % self.args.save_every == 0)
        if looking or saving:
            self.refuse_non_finite()
        if showing:
            self.shown = time.monotonic()
            width = shutil.get_terminal_size().columns - 1
            text = self.live_line(done, steps, losses.mean().item() / 2)
            print(f"\r{text[:width]:<{width}}" if live else text, end="" if live else "\n", flush=True)
        if saving:
            self.save(self.scan.epoch, done)
        if stopping:
            self.clear()
            where = f"epoch {self.scan.epoch}, step {done} of {steps}"
            self.say(f"stopped in {where}; the same command goes on from here")
        return stopping

    def end_epoch(self):
        """After scan's -> whether to stop."""
        scan, epoch = self.scan, self.scan.epoch
        self.refuse_non_finite()
        self.totals["seconds"] = time.monotonic() - self.began
        self.check_ranks_agree("candidates", torch.stack([scan.redundant, scan.ill_matched]).cpu())
        bad = self.union_over_ranks(self.totals["bad"])
        self.refuse_many_bad(bad)
        self.samples_seen += self.totals["samples"]
        kept, total, seconds = scan.num_kept, len(self.dataset), self.totals["seconds"]
        record = {"event": "epoch", "epoch": epoch, "stage": self.stage()}
        record |= {"loss": round(scan.loss, 6) if scan.step else None}
        candidates = int((scan.redundant | scan.ill_matched).count_nonzero())
        record |= {"kept": kept, "total": total, "candidates": candidates}
        record |= {"lr": self.optimizer.param_groups[0]["lr"]}
        record |= {"samples": self.totals["samples"], "samples_seen": self.samples_seen}
        record |= {name: round(self.totals[name], 3) for name in ("seconds", "data_seconds")}
        if self.stage() == "preparation" and self.dataset.truth:
            record["found"] = found(scan, self.dataset.truth)
        if bad:
            record["bad"] = [self.dataset.why(i) for i in bad[:100]]
        self.log(record)
        self.clear()
        line = f"epoch {epoch:>3}/{self.args.epochs}  {self.stage():<11} kept {kept / total:6.1%}"
        unreadable = f"  {len(bad)} unreadable" if bad else ""
        self.say(f"{line}  loss {scan.loss:.4f}  {seconds:.1f} s{unreadable}")
        self.totals = {"samples": 0, "seconds": 0.0, "data_seconds": 0.0, "bad": []}
        self.save(epoch + 1, 0)  # before the evaluation: one that is killed is made up for by the resumed run
        self.evaluate_if_due(epoch)
        stopping = self.signals.agreed()[1] and epoch + 1 < self.args.epochs
        if stopping:
            self.say(f"stopped after epoch {epoch}; the same command goes on from here")
        return stopping

    def print_table(self):
        """What a run ends with."""
        self.say("\n" + table(self.records, self.args))
        if self.finished:
            self.say(
                f"\nThis run was finished before. To start anew, or for longer (its rate is made for "
                f"{self.args.epochs} epochs), remove {self.out} or choose another --out."
            )

    # ------------------------------------------------ the folder

    def save(self, epoch, step):
        self.totals["bad"] = self.union_over_ranks(self.totals["bad"])
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if not torch.stack([x.isfinite().all() for x in state["model"].values()]).all():
            raise UserError(
                f"weights not finite at epoch {epoch}, step {step}: stopped; {self.out} holds the checkpoint "
                f"before it. A lower --lr or --precision fp32 may help"
            )
        if self.rank:
            return
        state |= {"scan": self.scan.state_dict(), "epoch": epoch, "step": step, "totals": self.totals}
        state |= {"samples_seen": self.samples_seen, "args": vars(self.args), "data": self.identity}
        state |= {"tokenizer": getattr(self.tokenizer, "name", None), "version": VERSION}
        save_checkpoint(self.out, state)

    def refuse_other_run(self, checkpoint, path):
        if checkpoint.get("version") != VERSION:
            raise UserError(f"{path}: not written by this version of train.py: choose another --out")
        before, now = checkpoint["args"], vars(self.args)
        for name in METHOD:
            flag, old = f"--{name.replace('_', '-')}", before.get(name)
            if old != now[name]:
                longer = ", and cannot be made longer, since its rate falls to 0" if name == "epochs" else ""
                had = f"{self.out} holds a run with {flag} {old}{longer}"
                raise UserError(f"{had}; this one has {now[name]}: choose another --out")
        trained_with = checkpoint["tokenizer"]
        if trained_with != getattr(self.tokenizer, "name", None):
            raise UserError(f"{self.out} was trained with the tokenizer {trained_with}: choose another --out")
        before, now = checkpoint["data"], self.identity
        if (before["size"], before["hash"]) != (now["size"], now["hash"]):
            old, new = (f"{d['size']:,} samples, hash {d['hash']}" for d in (before, now))
            raise UserError(f"{self.out} was trained on other data ({old}; now {new}): choose another --out")
        if before["kept"] != now["kept"]:
            raise UserError(
                f"{self.out} was trained on other ids of the same --keep file: choose another --out"
            )

    def read_log(self, epochs_done):
        """Records of the epochs that are done; those of epochs that are run again are dropped."""
        path = self.out / "log.jsonl"
        if path.exists() and epochs_done:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a line cut short by a kill
                    record = json.loads(line)
                    if record["epoch"] < epochs_done:
                        self.records.append(record)
        if self.rank == 0:
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            write_whole(path, lambda file: file.write(lines.encode()))

    def log(self, record):
        self.records.append(record)
        if self.rank == 0:
            try:
                with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(f"{self.out}/log.jsonl: cannot be written ({error.strerror})") from None

    def evaluate_if_due(self, epoch):
        last, every = epoch + 1 == self.args.epochs, self.args.eval_every
        done = any(r["event"] == "eval" and r["epoch"] == epoch for r in self.records)
        due = self.val is not None and not done and (last or (every and (epoch + 1) % every == 0))
        if self.signals.agreed(due and self.rank == 0)[0]:
            options = self.dataset.source, self.val, self.device, self.args.workers
            result = evaluate(self.model, self.tokenizer, *options)
            self.log({"event": "eval", "epoch": epoch} | result)
            self.say("    " + scores(result))

    # ------------------------------------------------ the ranks

    def check_ranks_agree(self, what, values):
        """Fail loudly if a tensor differs between the ranks (one hash each is compared)."""
        digest = hashlib.sha256(values.numpy()).digest()
        mine = int.from_bytes(digest[:8], "little") >> 1
        ends = torch.tensor([mine, -mine])
        if self.signals.group is not None:
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.signals.group)
        if ends[0] != -ends[1]:
            raise UserError(
                f"the ranks disagree on the {what}: do they see the same data and run the same code?"
            )

    def union_over_ranks(self, ids):
        everyone = [ids] * self.world
        if self.signals.group is not None:
            dist.all_gather_object(everyone, ids, group=self.signals.group)
        return sorted(set().union(*everyone))

    def refuse_non_finite(self):
        """On all ranks at the same step."""
        first = self.first_bad.cpu()
        if self.signals.group is not None:
            dist.all_reduce(first, dist.ReduceOp.MAX, group=self.signals.group)
        if first >= 0:
            raise UserError(
                f"loss not finite in epoch {self.scan.epoch}, step {first}: stopped; {self.out} holds the "
                f"checkpoint before it. A lower --lr or --precision fp32 may help"
            )

    def refuse_many_bad(self, ids):
        """Of a rank's own, in each step, and of all ranks', after each epoch."""
        if len(ids) > self.args.max_bad * len(self.dataset):
            causes = "; ".join(self.dataset.why(i) for i in ids[:3])
            raise UserError(
                f"{len(ids)} samples can't be read, more than --max-bad {self.args.max_bad:g} of "
                f"{len(self.dataset):,}: {causes}"
            )

    # ------------------------------------------------ what the user sees

    def stage(self):
        return self.scan.stage if self.args.rho_red or self.args.rho_ill else "full data"

    def live_line(self, done, steps, loss):
        totals, epochs, epoch = self.totals, self.args.epochs, self.scan.epoch
        pace = totals["seconds"] / totals["samples"]  # seconds a sample
        waiting = totals["data_seconds"] / totals["seconds"]
        text = f"epoch {epoch}/{epochs} {self.stage()} {done}/{steps}  loss {loss:.3f}  {1 / pace:,.0f}/s"
        text += f"  data {waiting:.0%}"
        if done >= 10 or epoch:
            full = self.scan.num_samples * (1 - (self.args.rho_red + self.args.rho_ill) / 2)
            left = pace * ((steps - done) * self.args.batch_size + (epochs - epoch - 1) * full)
            text += f"  {left / 60:.0f} min left" if left > 90 else f"  {left:.0f} s left"
        return text

    def clear(self):
        if self.rank == 0 and sys.stdout.isatty():
            print(f"\r{'':<{shutil.get_terminal_size().columns - 1}}\r", end="", flush=True)


def header(run):
    """The lines before the first epoch."""
    args, batch, used, source = run.args, run.args.batch_size, run.scan.num_kept, run.dataset.source
    lines = [f"data      {args.data}: {len(run.dataset):,} samples, hash {run.identity['hash']}"]
    if args.keep:
        lines += [f"          {used:,} of them are in {args.keep}"]
    if used % batch > 0.1 * used:
        lines += [
            f"          each epoch {used % batch:,} of them, others each time, fill no batch of {batch}"
        ]
    if source.skipped:
        others = ", ".join(f"{n:,} {kind}" for kind, n in sorted(source.skipped.items()))
        lines += [f"          left out, being no pictures: {others}"]
    if run.tokenizer is not None:
        toy = ": for trying out; for real captions, and for open_clip, give --vocab"
        lines += [f"text      {run.tokenizer.name}{toy if run.tokenizer.name == 'hashed words' else ''}"]
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    lines += [f"model     {args.arch}, {parameters:.1f} M parameters, {args.image_size} px"]
    lines += [f"running   {run.world} rank(s) on {run.device.type}, {args.precision}, compile {args.compile}"]
    lines += [f"          {args.workers} loading process(es) per rank, seed {args.seed}"]
    if run.device.type == "mps":
        lines += ["          MPS sums in an order of its own: a resumed run is equal up to rounding"]
    lines += [f"batch     {batch} global = {batch // run.world} per rank x {run.world}"]
    lines += [f"          ln({batch}) = {math.log(batch):.3f} is the loss of knowing nothing"]
    warmup = f"{args.warmup:g} of {args.epochs} epochs warm-up"
    lines += [f"rate      {args.lr:g}, {warmup}; weight decay {args.wd:g}"]
    red, ill = (int(rho * batch) / batch for rho in (args.rho_red, args.rho_ill))
    marked = f"{red:.1%} redundant + {ill:.1%} ill-matched marked per batch: after the warm-up "
    marked += f"{(red + ill) / 2:.1%} left out per round of 1 + {args.t_cos} epochs"
    lines += [f"pruning   {marked if red or ill else 'none'}"]
    if run.val is None:
        lines += ["checking  nothing: without --val-data no score will say how good the model is"]
    return "\n".join([*lines, f"writing   {run.out}/log.jsonl, last.pt"])


def table(records, args):
    """What a run ends with: epochs, what SCAN saved, what it found, and how good the model is."""
    epochs = [r for r in records if r["event"] == "epoch"]
    lines = [f"{'epoch':>5}  {'stage':<11} {'kept':>7} {'loss':>8} {'seconds':>8}"]
    for r in epochs:
        loss, kept = math.nan if r["loss"] is None else r["loss"], r["kept"] / r["total"]
        lines += [f"{r['epoch']:>5}  {r['stage']:<11} {kept:>7.1%} {loss:>8.4f} {r['seconds']:>8.1f}"]
    lines += ["", savings(epochs, args.batch_size)]
    rounds = [r["found"] for r in epochs if r.get("found")]
    if rounds:
        lines += ["planted faults among the candidates, share found per round (by chance: the share marked)"]
    for kind in rounds[-1] if rounds else ():
        recalls, precisions = ([found[kind][k] for found in rounds] for k in ("recall", "precision"))
        marked, planted = rounds[-1][kind]["marked"], rounds[-1][kind]["planted"]
        lines += [
            f"  {kind.replace('_', '-'):<12}{' '.join(f'{r:4.0%}' for r in recalls)}; mean recall "
            f"{np.mean(recalls):.1%}, precision {np.mean(precisions):.1%} ({marked:.1%} of the data marked, "
            f"{planted:.1%} planted)"
        ]
    return "\n".join(lines + [scores(r) for r in records if r["event"] == "eval"][-1:])


def savings(epochs, batch):
    """Samples and time that pruning saved."""
    seen, full = epochs[-1]["samples_seen"], len(epochs) * (epochs[0]["kept"] // batch * batch)
    seconds = sum(r["seconds"] for r in epochs)
    waiting = sum(r["data_seconds"] for r in epochs) / seconds
    paces = [r["seconds"] / r["samples"] for r in epochs if r["stage"] != "mutation"]
    if len(paces) in (0, len(epochs)):  # 0: a subset from the first epoch on
        left = ": none left out" if paces else ""
        return f"samples seen {seen:,}{left}\ntraining {seconds:,.0f} s, {waiting:.0%} waiting for data"
    pace = np.median(paces)
    return (
        f"samples seen {seen:,} of {full:,}: {1 - seen / full:.1%} saved\n"
        f"training {seconds:,.0f} s; all epochs at the pace of the full ones {pace * full:,.0f} s: "
        f"{1 - seconds / (pace * full):.1%} saved, {waiting:.0%} waiting for data"
    )


def found(scan, truth):
    """How well the newest candidates match planted faults: precision, recall, and both shares."""
    result = {}
    for kind, planted in truth.items():
        marked, planted = getattr(scan, kind).cpu(), torch.from_numpy(planted)
        hits = int((marked & planted).sum())
        result[kind] = {
            "precision": round(hits / max(int(marked.sum()), 1), 4),
            "recall": round(hits / max(int(planted.sum()), 1), 4),
            "marked": round(marked.double().mean().item(), 4),
            "planted": round(planted.double().mean().item(), 4),
        }
    return result


def scores(result):
    shares = {k: v for k, v in result.items() if isinstance(v, float)}
    text = "  ".join(f"{k} {v:.2%}" for k, v in shares.items())
    return f"{result.get('protocol', '')}  {text}  n {result['n']:,}".strip()


def claim(out, patience=60):
    """Keep other runs from writing to this folder -> a lock, held until the process ends or lets go of it.

    Ranks whose torchrun was killed need some seconds to notice: so wait for them.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept away
        return lock
    for _ in range(patience):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except (BlockingIOError, PermissionError):
            time.sleep(1)
        except OSError:  # a file system without locks
            return lock
    raise UserError(f"--out {out}: another run is writing to it")


def write_whole(path, write):
    """A file is replaced at once or not at all."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        new.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what was saved before is intact") from None


def save_checkpoint(out, checkpoint):
    """As last.pt; the one before it stays as prev.pt."""
    write_whole(out / "next.pt", lambda file: torch.save(checkpoint, file))
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "prev.pt")
    os.replace(out / "next.pt", out / "last.pt")


def newest_checkpoint(out, say):
    """-> the newest whole checkpoint of a folder and its path, or None twice."""
    damaged = []
    for path in (out / "last.pt", out / "prev.pt"):
        if path.exists():
            try:
                checkpoint = evaluation.load_checkpoint(path)
            except UserError:
                damaged.append(str(path))
                continue
            if damaged:
                say(f"{damaged[0]} is damaged: going on from {path}")
            return checkpoint, path
    if damaged:
        raise UserError(f"{' and '.join(damaged)}: damaged; remove {out} to start anew")
    return None, None


class Signals:
    """SIGTERM or Ctrl-C on any rank, agreed upon by all at the same step."""

    def __init__(self, world):
        self.asked = False
        self.group = dist.new_group(backend="gloo", timeout=evaluation.TIMEOUT) if world > 1 else None
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, *_):
        self.asked = True

    def agreed(self, looking=False):
        """-> whether any rank is looking at something, and whether any was asked to stop."""
        if self.agent not in (None, os.getppid()):
            self.asked = True  # torchrun itself is gone: nobody would end this rank
        flags = torch.tensor([bool(looking), self.asked], dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return flags.bool().tolist()


def ignore_signals(_):
    """Ctrl-C and a scheduler's SIGTERM reach the loading processes too: their rank saves, then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_loading():
    """Python would end the loading processes by SIGTERM, which they ignore, and wait for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or DataLoader takes their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


def main(argv=None, make_scan=Scan):
    args = parse_args(argv)
    evaluation.one_line_warnings("train.py")
    try:
        train(args, *evaluation.start_ranks(args.device), make_scan)
    except UserError as error:
        evaluation.fail("train.py", str(error).strip().splitlines()[-1])
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        line = f"lost another rank; the same command goes on from the last checkpoint in {args.out}"
        evaluation.fail("train.py", line)
    finally:
        end_loading()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
