"""Train CLIP or MoCo v3 with SCAN: full data in warm-up and preparation epochs, less in mutation epochs.

    torchrun train.py --arch vit_b32 --prune 0.3                  # CLIP; built-in data; CPU or one GPU
    torchrun train.py --arch moco_vit_s16 --prune 0.35            # MoCo v3
    torchrun --nproc_per_node 8 train.py --arch vit_b32 --prune 0.3 \\
        --data 'cc3m/{00000..00331}.tar' --val-data val/00000.tar  # one node, 8 GPUs
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...
    python train.py --arch vit_tiny --prune 0                     # full data, the baseline

The same command again resumes from --out. The method is in scan.py; the loop that uses it is `train`.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing.queues
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._utils import ExceptionWrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import clip_model
import data
import eval as evaluation
import moco
from data import UserError
from eval import count, finite, natural, share, templates
from scan import Scan, ScanSampler

# The paper's hyper-parameters; batch_size is global. The *_tiny recipes are ours, for two CPU cores.
CLIP = dict(epochs=32, batch_size=800, lr=1e-3, wd=0.1, image_size=224, crop_min=0.9, prune=0.3)
MOCO = dict(epochs=100, batch_size=600, wd=0.1, warmup=10.0, image_size=224, crop_min=0.08, prune=0.35)
RECIPES = {arch: CLIP for arch in clip_model.ARCHS} | {
    "vit_tiny": CLIP | dict(epochs=60, batch_size=128, lr=5e-4, image_size=64),
    "moco_vit_s16": MOCO,
    "moco_vit_b16": MOCO | dict(batch_size=370),
    "moco_vit_tiny": MOCO | dict(epochs=80, batch_size=128, lr=2e-3, warmup=3.0, image_size=32, crop_min=0.3),
}
# For the built-in shapes. Large models see so few steps there that they need a low rate.
SHAPES = dict(epochs=12, batch_size=64, lr=1e-4, warmup=1.0, image_size=64)
SHAPES_OF = {
    "vit_tiny": SHAPES | dict(epochs=60, lr=1e-3, warmup=3.0),
    # small crops of a drawing often miss what is drawn
    "moco_vit_tiny": SHAPES | dict(epochs=180, lr=1e-3, warmup=3.0, image_size=32, crop_min=0.85),
    "moco_vit_s16": SHAPES | dict(image_size=32),
    "moco_vit_b16": SHAPES | dict(image_size=32),
}


def train(args, rank, world, device, make_scan=Scan):
    """make_scan: another class with Scan's interface, for comparisons."""
    torch.manual_seed(args.seed)  # for the initial weights; everything later is seeded separately
    is_moco = args.arch in moco.ARCHS
    tokenizer = None if is_moco else evaluation.tokenizer_for(args.vocab)
    dataset, val = open_data(args, tokenizer)
    model = create_model(args, tokenizer).to(device)
    optimizer = make_optimizer(model, args)
    sampler = make_sampler(args, len(dataset), make_scan)
    scan = sampler.scan
    options = dict(num_workers=args.workers, persistent_workers=args.workers > 0, worker_init_fn=start_worker)
    options |= dict(collate_fn=data.collate, pin_memory=device.type == "cuda")
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
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
            seeds = np.random.SeedSequence([args.seed, epoch, step, rank])
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))  # for stochastic depth

            inputs = model.inputs(batch, device)
            features = forward(module, inputs, autocast, args.accum)
            a, b, loss = model.losses(*features)
            scan.observe(ids, a, b)  # SCAN watches; the loss stays as it is
            loss.backward()
            if args.accum > 1:
                backward_in_parts(module, inputs, features, autocast, args.accum)
            optimizer.step()
            optimizer.zero_grad()
            if not is_moco:
                model.logit_scale.data.clamp_(0, math.log(100))
            run.after_step(step + 1, steps, failed, a + b)  # saves and prints; ends the run on a signal
        scan.end_epoch()
        run.end_epoch()  # logs, saves and evaluates
    say("\n" + table(run.records, args))


# ---------------------------------------------------------------- one step


def forward(module, inputs, autocast, accum=1):
    """Compute the features of a batch. accum > 1 (CLIP) saves memory, yet keeps all negatives: the features
    of micro-batches, without a graph. After loss.backward(), `backward_in_parts` does the rest."""
    if accum == 1:
        with autocast:
            return module(*inputs)
    core = getattr(module, "module", module)  # without DDP
    images, texts = [], []
    with torch.no_grad(), autocast:
        for pixels, tokens in zip(inputs[0].chunk(accum), inputs[1].chunk(accum)):
            image, text, scale = core(pixels, tokens)
            images.append(image)
            texts.append(text)
    return [x.requires_grad_() for x in (torch.cat(images), torch.cat(texts), scale.clone())]


def backward_in_parts(module, inputs, features, autocast, accum):
    """Compute the micro-batches again, with a graph, to turn the features' gradients into the parameters'."""
    pixels, tokens = inputs[0].chunk(accum), inputs[1].chunk(accum)
    image, text, scale = features
    image_grads, text_grads = image.grad.chunk(accum), text.grad.chunk(accum)
    for k in range(accum):
        module.require_backward_grad_sync = k == accum - 1  # DDP: all-reduce after the last micro-batch only
        with autocast:
            outputs = module(pixels[k], tokens[k])
        torch.autograd.backward(outputs, [image_grads[k], text_grads[k], scale.grad / accum])


def learning_rate(now, args):
    """Linear warm-up, then a cosine to 0. now: the fractional epoch."""
    if now < args.warmup:
        return args.lr * now / args.warmup
    done = (now - args.warmup) / max(args.epochs - args.warmup, 1e-9)
    return args.lr * (1 + math.cos(math.pi * min(done, 1))) / 2


# ---------------------------------------------------------------- model and optimizer


def create_model(args, tokenizer):
    try:
        if args.arch in moco.ARCHS:
            model = moco.create(args.arch, args.image_size)
        else:
            model = clip_model.create(args.arch, args.image_size, tokenizer.vocab_size)
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from None
    if args.init:
        trained_with = evaluation.load_weights(model, args.init)
        if tokenizer is not None and trained_with not in (None, tokenizer.name):
            raise UserError(
                f"--init {args.init} was trained with {trained_with}, this run has {tokenizer.name}"
            )
    if clip_family(args.arch) == "resnet":
        model.visual.to(memory_format=torch.channels_last)
    return model


def clip_family(arch):
    """Return the kind of a CLIP model's image tower, or None for MoCo."""
    return clip_model.ARCHS[arch]["family"] if arch in clip_model.ARCHS else None


def make_optimizer(model, args):
    """AdamW. CLIP decays weight matrices, except names with "bias", as open_clip does; MoCo v3 everything."""
    decay, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decaying = args.arch in moco.ARCHS or evaluation.decays(name, parameter)
            group = decay if decaying else others
            group.append(parameter)
    betas, eps = (0.9, 0.999), 1e-8
    if clip_family(args.arch) == "vit":
        betas, eps = (0.9, 0.98), 1e-6
    groups = [{"params": decay, "weight_decay": args.wd}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=eps, fused=True)


def set_warmup_and_precision(args, steps, device):
    """Resolve the defaults that depend on the data and the device, so that the checkpoint records them."""
    if args.warmup is None:  # the paper's 10k steps, but on small data a twentieth of the run
        args.warmup = round(min(10_000 / steps, 0.05 * args.epochs), 4)
    args.precision = evaluation.precision(args.precision, device)


def parallel(model, args, steps, world, device):
    """-> the model as the loop calls it (under DDP, compiled), and its autocast."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    module = model
    if world > 1:
        module = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    long = device.type == "cuda" and steps * args.epochs >= 5_000
    if args.compile == "on" or (args.compile == "auto" and long):
        module.compile()  # compile the DDP wrapper, so that graph breaks follow its buckets
    return module, autocast


# ---------------------------------------------------------------- data


def open_data(args, tokenizer):
    """-> the dataset to train on; the source to evaluate on, or None."""
    source = open_source(args, args.data, True)
    options = dict(crop_min=args.crop_min, seed=args.seed)
    if tokenizer is None:
        dataset = data.Views(source, args.image_size, moco.draw_views, **options)
    else:
        dataset = data.Pairs(source, tokenizer, args.image_size, mismatch=args.mismatch, **options)
    if not args.val_data:
        return dataset, None
    val = open_source(args, args.val_data, False, captions=False)
    if tokenizer is None:
        if val.labels is None or source.labels is None:
            raise UserError("--val-data: kNN needs classes in it and in --data; name their --label-key")
        evaluation.class_labels(val, source.classes)  # fail early on unknown classes
    elif val.labels is not None:
        evaluation.zeroshot_classes(val)  # likewise
    else:
        val = open_source(args, args.val_data, False)  # retrieval needs captions
    return dataset, val


def open_source(args, spec, training, captions=True):
    captions = captions and args.arch not in moco.ARCHS
    keys = dict(image_key=args.img_key, caption_key=args.caption_key, label_key=args.label_key)
    keys |= dict(captions=captions, templates=args.templates)
    return data.open_source(spec, train=training, size=args.image_size, **keys)


def make_sampler(args, total, make_scan):
    settings = dict(t_cos=args.t_cos, threshold=args.warmup_threshold, rule=args.warmup_rule, seed=args.seed)
    try:
        keep = np.load(args.keep) if args.keep else None
        scan = make_scan(total, args.prune, args.rho_red, args.rho_ill, **settings, keep=keep)
        return ScanSampler(scan, args.batch_size)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--prune, --batch-size, --keep: {error}") from None


def evaluate(model, tokenizer, source, val, device, workers):
    """CLIP: zero-shot on labelled data, retrieval on pairs. MoCo: kNN among 50,000 pictures of `source`."""
    model.eval()
    evaluation.share_buffers(model)
    if tokenizer is None:
        result = evaluation.knn(model, source, val, device, most=50_000, workers=workers)
    elif val.labels is None:
        result = evaluation.retrieval(model, tokenizer, val, device, workers=workers)
    else:
        result = evaluation.zeroshot(model, tokenizer, val, device, workers=workers)
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}


# ---------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = evaluation.Parser(prog="train.py", description=__doc__)
    add = parser.add_argument
    add("--arch", choices=list(RECIPES), default="vit_b32", help="model and recipe")
    add(
        "--data",
        default="shapes",
        help="shapes[:N], .tar files ({000..331}, *), .csv, .tsv, folders, cifar10",
    )
    add("--val-data", help="as --data: zero-shot (classes), retrieval (pairs) or kNN (MoCo)")
    add("--img-key", default="filepath", help="column of a CSV")
    add("--caption-key", default="title", help="column of a CSV")
    add("--label-key", help="CSV column, or key in the .json of .tar files, with the class for MoCo's kNN")
    add("--templates", type=templates, help="caption of a class: 'a photo of a {}.', or a file, one a line")
    add("--mismatch", type=share, default=0.0, help="share of captions to shuffle, to see what SCAN finds")
    # SCAN
    add("--prune", type=share, help="rho, at most 0.5: average share left out (default: CLIP .3, MoCo .35)")
    add("--rho-red", type=share, help="share marked redundant (default: --prune)")
    add("--rho-ill", type=share, help="share marked ill-matched (default: --prune)")
    add("--t-cos", type=natural, default=3, help="mutation epochs per round")
    add("--warmup-threshold", type=finite, default=0.3, help="T_td: relative drop of the epoch loss")
    add("--warmup-rule", choices=["stable", "printed"], default="stable", help="see scan.warmed_up")
    add("--keep", help="train on these ids only (.npy), a static coreset")
    # optimisation
    add("--epochs", type=natural, help="default: CLIP 32, MoCo 100, fewer on shapes")
    add("--batch-size", type=natural, help="global, over all ranks (default: CLIP 800, MoCo 600, shapes 64)")
    add("--accum", type=natural, default=1, help="micro-batches per step, exact, two forward passes")
    add("--lr", type=finite, help="peak (default: CLIP 1e-3, on shapes 1e-4; MoCo 1.5e-4 x batch / 256)")
    add("--wd", type=finite, help="weight decay (default: 0.1)")
    add("--warmup", type=finite, help="of the rate, in epochs (default: 10k steps or a 20th; MoCo 10)")
    add("--image-size", type=natural, help="in pixels (default: 224, on shapes 64)")
    add("--crop-min", type=share, help="smallest crop, a share of the picture (default: CLIP .9, MoCo .08)")
    add("--init", help="weights to start from: of open_clip, timm, or a run of ours")
    # running
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 if the GPU has it")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="auto: 5,000 or more steps on a GPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda, or else cpu")
    add("--workers", type=count, default=evaluation.loading_processes(), help="loading processes per rank")
    add("--eval-every", type=count, default=5, help="in epochs; 0: at the end only")
    add("--save-every", type=count, default=0, help="in steps, besides each epoch's checkpoint")
    add("--max-bad", type=share, default=0.01, help="share of unreadable samples that ends the run")
    add("--seed", type=count, default=0, help="of all random draws")
    add("--vocab", help="bpe_simple_vocab_16e6.txt.gz for CLIP's tokens; without it, hashed words")
    add("--out", help="folder of log and checkpoints (default: runs/ARCH-pruneP-seedS)")
    args = parser.parse_args(argv)
    fill_in(args)
    check(args, parser.error)
    return args


def fill_in(args):
    """Set the defaults that depend on the arch, the data and the machine."""
    on_shapes = args.data.partition(":")[0] == "shapes"
    defaults = RECIPES[args.arch]
    if on_shapes:
        defaults = defaults | SHAPES_OF.get(args.arch, SHAPES)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, min(value, args.epochs) if name == "warmup" else value)
    if args.lr is None:
        args.lr = 1.5e-4 * args.batch_size / 256
    args.rho_red = args.prune if args.rho_red is None else args.rho_red
    args.rho_ill = args.prune if args.rho_ill is None else args.rho_ill
    args.out = args.out or f"runs/{args.arch}-prune{args.prune:g}-seed{args.seed}"
    if args.val_data is None and on_shapes:
        args.val_data = "shapes"


def check(args, error):
    """Checks that involve several flags. Scan, ScanSampler and the models check theirs."""
    if args.warmup is not None and args.warmup > args.epochs:
        error(f"--warmup must be at most the {args.epochs} epochs, got {args.warmup:g}")
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if args.batch_size % (ranks * args.accum):
        error(f"--batch-size {args.batch_size} is not divisible by {ranks} rank(s) x {args.accum} --accum")
    if args.accum > 1 and clip_family(args.arch) != "vit":
        error(f"--accum: not exact with BatchNorm or stochastic depth, as {args.arch} has: use more ranks")
    if args.arch in moco.ARCHS and (args.mismatch or args.vocab or args.templates):
        error("--mismatch, --vocab and --templates are for captions, and MoCo reads none")


# ---------------------------------------------------------------- what survives crashes

VERSION = 2  # of checkpoints
# a resumed run must agree on these; the rest (workers, how often to evaluate ...) may change
METHOD = (
    "arch prune rho_red rho_ill t_cos warmup_threshold warmup_rule keep mismatch templates epochs batch_size "
    "accum lr wd warmup image_size crop_min precision seed init"
).split()


class Run:
    """The folder of a run: its lock, config.json, log.jsonl, last.pt and prev.pt. Also prints progress."""

    def __init__(self, args, rank, world, device, dataset, val, tokenizer, model, optimizer, scan):
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.dataset, self.val, self.tokenizer = dataset, val, tokenizer
        self.model, self.optimizer, self.scan = model, optimizer, scan
        self.out, self.records = Path(args.out), []
        self.signal, self.signal_time = 0, 0.0  # the number of the first signal to stop, and when it came
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.group = dist.new_group(backend="gloo", timeout=evaluation.TIMEOUT) if world > 1 else None
        self.totals = {"samples": 0, "seconds": 0.0, "data_seconds": 0.0, "bad": []}  # of this epoch
        self.samples_seen = 0  # in the epochs before
        kept = hashlib.sha256(scan.kept.numpy()).hexdigest()[:16] if args.keep else None
        self.identity = {"size": len(dataset), "hash": dataset.fingerprint(), "kept": kept}
        self.check_ranks_agree("data", self.identity)

    def resume(self):
        """Load the newest checkpoint, if there is one -> the epoch to go on with."""
        self.lock = claim(self.out) if self.rank == 0 else None
        self.gather(None)  # wait until rank 0 has created --out
        checkpoint, path = newest_checkpoint(self.out)
        epoch, step = checkpoint.get("epoch", 0), checkpoint.get("step", 0)
        self.check_ranks_agree("checkpoint in --out", (epoch, step))
        if path is not None:
            self.refuse_other_run(checkpoint, path)
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scan.load_state_dict(checkpoint["scan"])
            self.totals, self.samples_seen = checkpoint["totals"], checkpoint["samples_seen"]
            if self.rank == 0 and path.name == "prev.pt":
                os.replace(path, self.out / "last.pt")  # else the next save makes the damaged file prev.pt
        self.read_log(epoch)
        self.log()
        say(header(self))
        if path is not None:
            say(f"          going on from epoch {epoch}, step {step}")
        if epoch == self.args.epochs:
            say(f"This run was finished before. To start anew, remove {self.out} or choose another --out.")
        self.write("config.json", json.dumps(vars(self.args), indent=1))
        if epoch and not step:
            self.evaluate_if_due(epoch - 1)
        return epoch

    def begin_epoch(self):
        self.check_ranks_agree("kept samples", self.scan.kept_mask)
        self.began = time.monotonic() - self.totals["seconds"]
        self.shown = time.monotonic()

    def timed(self, loader):
        """Yield the loader's batches; count the time spent waiting for them."""
        began = time.monotonic()
        for batch in loader:
            self.totals["data_seconds"] += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def after_step(self, done, steps, failed, losses):
        """Print, save, end the run on a signal. failed: ids that can't be read. losses: (b,), a + b."""
        self.totals["samples"] += self.args.batch_size
        self.totals["seconds"] = time.monotonic() - self.began
        if len(failed):
            self.totals["bad"] = sorted({*self.totals["bad"], *failed.tolist()})
            self.refuse_many_bad(self.totals["bad"])
        if self.rank == 0 and time.monotonic() - self.shown > (0.5 if sys.stdout.isatty() else 15):
            self.shown = time.monotonic()
            say(self.live_line(done, steps, losses.mean().item() / 2), live=True)
        agreeing = self.world == 1 or done % 10 == 0 or done == steps  # with other ranks it takes time
        stopping = self.stop_signal() if agreeing else 0
        if stopping or (self.args.save_every and done % self.args.save_every == 0):
            self.refuse_non_finite(f"in epoch {self.scan.epoch}, step {done}")
            self.save(self.scan.epoch, done)
        if stopping:
            self.stop(stopping, f"in epoch {self.scan.epoch}, step {done} of {steps}")

    def end_epoch(self):
        """Log, save and evaluate; end the run if a signal asks for it. Called after scan.end_epoch()."""
        scan, epoch = self.scan, self.scan.epoch
        self.refuse_non_finite(f"after epoch {epoch}")
        self.totals["seconds"] = time.monotonic() - self.began
        self.check_ranks_agree("candidates", torch.stack([scan.redundant, scan.ill_matched]).cpu())
        bad = self.union_over_ranks(self.totals["bad"])
        self.refuse_many_bad(bad)
        self.samples_seen += self.totals["samples"]
        record = dict(event="epoch", epoch=epoch, stage=self.stage(), kept=scan.num_kept)
        record |= dict(total=len(self.dataset), loss=round(scan.loss, 6) if scan.step else None)  # no steps
        record |= dict(candidates=len(scan.candidates), lr=self.optimizer.param_groups[0]["lr"])
        record |= dict(samples=self.totals["samples"], samples_seen=self.samples_seen)
        record |= {name: round(self.totals[name], 3) for name in ("seconds", "data_seconds")}
        if self.stage() == "preparation" and self.dataset.truth:
            record["found"] = found(scan, self.dataset.truth)
        if bad:
            record["bad"] = [self.dataset.why(i) for i in bad[:100]]
        self.log(record)
        self.totals = {"samples": 0, "seconds": 0.0, "data_seconds": 0.0, "bad": []}
        self.save(epoch + 1, 0)  # before the evaluation: a killed one is repeated after the resume
        kept = scan.num_kept / len(self.dataset)
        line = f"epoch {epoch:>3}/{self.args.epochs}  {self.stage():<11} kept {kept:6.1%}"
        line += f"  loss {scan.loss:.4f}  {record['seconds']:.1f} s"
        say(line + (f"  {len(bad)} unreadable" if bad else ""))
        self.evaluate_if_due(epoch)
        stopping = self.stop_signal()
        if stopping and epoch + 1 < self.args.epochs:
            self.stop(stopping, f"after epoch {epoch}")

    def save(self, epoch, step):
        self.totals["bad"] = self.union_over_ranks(self.totals["bad"])
        if self.rank:
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scan": self.scan.state_dict(), "epoch": epoch, "step": step, "totals": self.totals}
        state |= {"samples_seen": self.samples_seen, "args": vars(self.args), "data": self.identity}
        state |= {"tokenizer": getattr(self.tokenizer, "name", None), "version": VERSION}
        save_checkpoint(self.out, state)

    def refuse_other_run(self, checkpoint, path):
        if checkpoint.get("version") != VERSION:
            raise UserError(f"{path}: not written by this version of train.py: choose another --out")
        before = settings(checkpoint["args"], checkpoint["data"], checkpoint["tokenizer"])
        now = settings(vars(self.args), self.identity, getattr(self.tokenizer, "name", None))
        for name, value in now.items():
            if before[name] != value:
                held = f"{self.out} holds a run with {name} {before[name]}"
                raise UserError(f"{held}; this one has {value}: choose another --out")

    def read_log(self, epochs_done):
        """Read the records of the epochs that are done; drop those of epochs to be run again."""
        path = self.out / "log.jsonl"
        if path.exists():
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.records = [record for record in records if record["epoch"] < epochs_done]

    def log(self, *records):
        self.records += records
        self.write("log.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, name, text):
        if self.rank == 0:
            write_whole(self.out / name, lambda file: file.write(text.encode()))

    def evaluate_if_due(self, epoch):
        last, every = epoch + 1 == self.args.epochs, self.args.eval_every
        done = any(r["event"] == "eval" and r["epoch"] == epoch for r in self.records)
        due = self.val is not None and not done and (last or (every and (epoch + 1) % every == 0))
        if self.gather(due)[0]:  # rank 0 decides: it wrote the log
            options = self.dataset.source, self.val, self.device, self.args.workers
            result = evaluate(self.model, self.tokenizer, *options)
            self.log({"event": "eval", "epoch": epoch} | result)
            say("    " + scores(result))

    def gather(self, value):
        """Collect every rank's value in a list."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def union_over_ranks(self, ids):
        return sorted(set().union(*self.gather(ids)))

    def check_ranks_agree(self, what, value):
        """Fail loudly if a value differs between the ranks (its hashes are compared)."""
        content = value.numpy().tobytes() if torch.is_tensor(value) else str(value).encode()
        if len(set(self.gather(hashlib.sha256(content).digest()))) > 1:
            raise UserError(f"the ranks disagree on the {what}: do they see the same data and code?")

    def receive(self, number, _):
        """Handle Ctrl-C (SIGINT) and SIGTERM: the first asks to stop, a second one ends the process."""
        if multiprocessing.parent_process() is not None:
            return  # a loading process
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
            if self.rank == 0:
                with contextlib.suppress(OSError):  # print() cannot interrupt a print()
                    os.write(2, b"\ntrain.py: stopping after this step; a second signal ends it now\n")
        elif time.monotonic() - self.signal_time > 1:  # `timeout` sends each signal twice
            end_loading()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop_signal(self):
        """Return the number of a signal that asked any rank to stop, or 0."""
        if self.agent not in (None, os.getppid()):
            self.signal = signal.SIGTERM  # torchrun died: stop by ourselves
        return max(self.gather(int(self.signal)))

    def stop(self, number, where):
        """End the process, on all ranks together: torchrun would kill the others while rank 0 is saving."""
        say(f"stopped {where}; the same command goes on from here")
        self.gather(None)
        sys.exit(128 + number)  # as a shell reports a process that a signal ended

    def refuse_non_finite(self, when):
        """Check the weights: a single non-finite loss makes them non-finite."""
        checks = [x.isfinite().all() for x in self.model.state_dict().values()]
        if not torch.stack(checks).all():
            hint = f"{self.out} holds the checkpoint before; a lower --lr or --precision fp32 may help"
            raise UserError(f"weights not finite {when}: {hint}")

    def refuse_many_bad(self, ids):
        """Call it with this rank's ids after each step, and with all ranks' ids after each epoch."""
        if len(ids) > self.args.max_bad * len(self.dataset):
            causes = "; ".join(self.dataset.why(i) for i in ids[:3])
            limit = f"--max-bad {self.args.max_bad:g} of {len(self.dataset):,}"
            raise UserError(f"{len(ids)} samples can't be read, more than {limit}: {causes}")

    def stage(self):
        return self.scan.stage if self.args.rho_red or self.args.rho_ill else "full data"

    def live_line(self, done, steps, loss):
        totals, epochs, epoch = self.totals, self.args.epochs, self.scan.epoch
        pace = totals["seconds"] / totals["samples"]  # seconds per sample
        text = f"epoch {epoch}/{epochs} {self.stage()} {done}/{steps}  loss {loss:.3f}  {1 / pace:,.0f}/s"
        text += f"  data {totals['data_seconds'] / totals['seconds']:.0%}"
        if done >= 10 or epoch:
            full = self.scan.num_samples * (1 - (self.args.rho_red + self.args.rho_ill) / 2)
            left = pace * ((steps - done) * self.args.batch_size + (epochs - epoch - 1) * full)
            text += f"  {left / 60:.0f} min left" if left > 90 else f"  {left:.0f} s left"
        return text


def settings(args, data, tokenizer):
    """Collect what a resumed run must agree on, by name."""
    flags = {f"--{name.replace('_', '-')}": args.get(name) for name in METHOD}
    of_data = {"--data of size": data["size"], "--data of hash": data["hash"], "--keep of hash": data["kept"]}
    return flags | of_data | {"tokenizer": tokenizer}


def header(run):
    """Describe the run, in the lines before the first epoch."""
    args, batch, kept, world = run.args, run.args.batch_size, run.scan.num_kept, run.world
    lines = [f"data      {args.data}: {run.dataset.source}; hash {run.identity['hash']}"]
    if args.keep:
        lines += [f"          {kept:,} of them are in {args.keep}"]
    if kept % batch > 0.1 * kept:
        lines += [f"          {kept % batch:,} of them, others in each epoch, fill no batch of {batch}"]
    if run.tokenizer is not None:
        toy = "" if args.vocab else ": for trying out; for real captions, and for open_clip, give --vocab"
        lines += [f"text      {run.tokenizer.name}{toy}"]
    checking = "nothing: no --val-data" if run.val is None else f"{args.val_data}: {run.val}"
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    running = f"{world} rank(s) on {run.device.type}, {args.precision}, compile {args.compile}"
    red, ill = int(args.rho_red * batch), int(args.rho_ill * batch)
    marked = f"int({args.rho_red:g} x {batch}) = {red} redundant"
    marked += f", int({args.rho_ill:g} x {batch}) = {ill} ill-matched"
    text = "\n".join(lines)
    return f"""{text}
checking  {checking}
model     {args.arch}, {parameters:.1f} M parameters, {args.image_size} px, seed {args.seed}
running   {running}; {args.workers} loading process(es) per rank
batch     {batch} global = {batch // world} per rank x {world}
          ln({batch}) = {math.log(batch):.3f} is the chance-level loss
rate      {args.lr:g}, {args.warmup:g} of {args.epochs} epochs warm-up; weight decay {args.wd:g}
pruning   {marked} marked per batch:
          after the warm-up {(red + ill) / 2 / batch:.1%} left out per round of 1 + {args.t_cos} epochs
writing   {run.out}/log.jsonl, last.pt"""


def table(records, args):
    """Format the end of a run: its epochs, what SCAN saved and found, and how good the model is."""
    epochs = [r for r in records if r["event"] == "epoch"]
    lines = [f"{'epoch':>5}  {'stage':<11} {'kept':>7} {'loss':>8} {'seconds':>8}"]
    for r in epochs:
        loss, kept = math.nan if r["loss"] is None else r["loss"], r["kept"] / r["total"]
        lines += [f"{r['epoch']:>5}  {r['stage']:<11} {kept:>7.1%} {loss:>8.4f} {r['seconds']:>8.1f}"]
    lines += ["", savings(epochs, args.batch_size)]
    rounds = [r["found"] for r in epochs if r.get("found")]
    if rounds:
        lines += ["planted faults among the candidates: recall per round (chance level = share marked)"]
        for kind, last in rounds[-1].items():
            recalls = [found[kind]["recall"] for found in rounds]
            precision = np.mean([found[kind]["precision"] for found in rounds])
            lines += [
                f"  {kind.replace('_', '-'):<12}{' '.join(f'{r:4.0%}' for r in recalls)}; mean recall "
                f"{np.mean(recalls):.1%}, precision {precision:.1%} ({last['marked']:.1%} marked, "
                f"{last['planted']:.1%} planted)"
            ]
    lines += [scores(r) for r in records if r["event"] == "eval"][-1:]
    return "\n".join(lines)


def savings(epochs, batch):
    """Compare the samples and the time of a run with those of epochs of all its data."""
    seen, kept = epochs[-1]["samples_seen"], [r["kept"] for r in epochs]
    seconds = sum(r["seconds"] for r in epochs)
    waiting = sum(r["data_seconds"] for r in epochs) / seconds
    time_spent = f"training {seconds:,.0f} s, {waiting:.0%} waiting for data"
    if min(kept) == max(kept):  # no pruning; a static coreset keeps less than all
        part = kept[0] / epochs[0]["total"]
        return f"samples seen {seen:,}: {part:.1%} of the data in every epoch\n{time_spent}"
    full = len(epochs) * (max(kept) // batch * batch)
    full_epochs = [r for r in epochs if r["stage"] != "mutation"]
    if full_epochs and np.median([r["seconds"] for r in full_epochs]) >= 5:  # shorter ones are noise
        pace = np.median([r["seconds"] / r["samples"] for r in full_epochs])
        time_spent += (
            f"; all epochs at the pace of the full ones {pace * full:,.0f} s: "
            f"{1 - seconds / (pace * full):.1%} saved"
        )
    return f"samples seen {seen:,} of {full:,}: {1 - seen / full:.1%} saved\n{time_spent}"


def found(scan, truth):
    """Compare the newest candidates with planted faults: precision, recall, and both shares."""
    result = {}
    for kind, planted in truth.items():
        marked = getattr(scan, kind).cpu().numpy()
        hits = (marked & planted).sum()
        shares = dict(precision=hits / max(marked.sum(), 1), recall=hits / max(planted.sum(), 1))
        shares |= dict(marked=marked.mean(), planted=planted.mean())
        result[kind] = {name: round(float(value), 4) for name, value in shares.items()}
    return result


def scores(result):
    shares = {k: v for k, v in result.items() if isinstance(v, float)}
    text = "  ".join(f"{k} {v:.2%}" for k, v in shares.items())
    return f"{result.get('protocol', '')}  {text}  n {result['n']:,}".strip()


def say(text, live=False):
    """Print on rank 0. A live line is overwritten by the next one. A screen that is gone is no error."""
    if not evaluation.is_first_rank():
        return
    try:
        terminal = sys.stdout.isatty()
        if live and terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
        erase = "\r\x1b[K" if terminal else ""
        print(erase + text, end="" if live and terminal else "\n", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def claim(out, patience=60):
    """Lock a folder -> the lock. Wait for ranks whose torchrun was killed: they need seconds to stop."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
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
    """Write a file atomically."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch's hides the disk's own
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what was saved before is intact") from None


def save_checkpoint(out, checkpoint):
    """Save as last.pt; the one before it stays as prev.pt."""
    write_whole(out / "next.pt", lambda file: torch.save(checkpoint, file))
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "prev.pt")
    os.replace(out / "next.pt", out / "last.pt")


def newest_checkpoint(out):
    """-> the newest whole checkpoint of a folder and its path; without one, {} and None."""
    paths = [path for path in (out / "last.pt", out / "prev.pt") if path.exists()]
    for path in paths:
        try:
            return evaluation.load_checkpoint(path), path
        except UserError as error:
            say(f"damaged: {error}")
    if paths:
        raise UserError(f"{out}: its checkpoints are damaged; remove it to start anew")
    return {}, None


def start_worker(_):
    """Ignore signals in a loading process: Ctrl-C reaches it too, but its rank still needs it to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error


def send_error(queue, error, item):
    """Send the error instead of a batch that cannot be sent (/dev/shm is full): the run waits for one."""
    why = UserError(f"a loading process cannot deliver its batch: {error}")
    queue.put((item[0], ExceptionWrapper((UserError, why, None))))


def end_loading():
    """Kill the loading processes. Python would end them by SIGTERM, which they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else DataLoader takes their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


def main(argv=None, make_scan=Scan):
    evaluation.one_line_warnings("train.py")
    args = parse_args(argv)
    try:
        rank, world, device = evaluation.start_ranks(args.device)
        train(args, rank, world, device, make_scan)
    except UserError as error:  # a loading process sends its traceback: show its last line
        evaluation.fail("train.py", str(error).strip().splitlines()[-1].split("UserError: ")[-1])
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        evaluation.fail("train.py", f"a loading process died, out of memory? {str(error).splitlines()[0]}")
    finally:
        end_loading()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
