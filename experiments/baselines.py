"""What SCAN is compared with, behind Scan's interface: train.py's loop runs each of these unchanged.

    python experiments/baselines.py rs2 --scan-run runs/scan-seed0 --arch vit_tiny --seed 0 --out runs/rs2

compare.py does this for all methods and seeds. Flags it does not know go to train.py. One process.

Each method sees exactly as many samples as the run of SCAN that it is told of, to the sample:

    rs2          a fresh random subset every epoch, as large as SCAN's in that epoch
    random       one random subset for the whole run
    infobatch    InfoBatch (Qin et al., ICLR 2024)
    semdedup     SemDeDup (Abbas et al., 2023), on the image embeddings of a full-data run
    dpruning     Dataset Pruning (Yang et al., ICLR 2023). Its contrastive form is unpublished: ours
    coreset      a static coreset of several runs of SCAN (Sect. 4.3), trained on from scratch
    once         SCAN's candidates of its first round, left out for the rest of the run: static pruning
    same-budget  full data, over fewer epochs; the rate falls to 0 at the end of these

A static subset's epochs differ by at most one batch, since SCAN's total is rarely a multiple of the epochs.
What the embeddings of a full-data run, or a proxy run, cost is not counted.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import train
from data import UserError
from scan import Scan, _gather, _generator, coreset

# ---------------------------------------------------------------- the budget


def spread(batches, epochs):
    """`batches` dealt out over `epochs` as evenly as whole numbers go -> a list that sums to them."""
    return [batches * (e + 1) // epochs - batches * e // epochs for e in range(epochs)]


def static_size(sizes, batch):
    """The size of a fixed subset for epochs in which SCAN kept `sizes`: their mean, or the largest epoch."""
    most = max(spread(sum(size // batch for size in sizes), len(sizes))) * batch
    return max(most, sum(sizes) // len(sizes))


def budget_of(run):
    """(what SCAN kept in each epoch, its global batch, N), from the log of a finished run of SCAN."""
    config = json.loads((run / "config.json").read_text())
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    epochs = [record for record in records if record["event"] == "epoch"]
    if len(epochs) != config["epochs"]:
        raise UserError(f"{run}: not finished")
    return [record["kept"] for record in epochs], config["batch_size"], epochs[0]["total"]


def some(mask, n, *key):
    """n of the samples in a mask (N,), drawn at random by `key` -> a mask."""
    ids = mask.nonzero().flatten()
    if n > len(ids):
        raise UserError(f"SCAN's budget asks for {n} samples out of {len(ids)}")
    drawn = ids[torch.randperm(len(ids), generator=_generator(*key))[:n]]
    return torch.zeros_like(mask).scatter_(0, drawn, True)


# ---------------------------------------------------------------- fresh subsets, and fixed ones


class Baseline(Scan):
    """Watches as Scan does, but marks nothing. `weigh` says what an epoch trains on: weights (N,), or 0.

    sizes: what SCAN kept in each epoch. batch: the global batch.
    """

    _tensors = Scan._tensors + ("weight",)

    def __init__(self, num_samples, *ratios, sizes, batch, seed=0, keep=None, **settings):
        if keep is not None:
            raise UserError("baselines choose from all data: --keep is for SCAN")
        super().__init__(num_samples, 0.0, seed=seed)
        self.sizes, self.global_batch = sizes, batch
        self.weight = torch.ones(num_samples)

    def _begin(self, epoch):
        resumed = self.open
        super()._begin(epoch)
        if not resumed:
            self.weight.copy_(self.weigh())
        self.kept_mask = self.weight > 0
        self.num_kept = int(self.kept_mask.sum())
        self.stage = "mutation" if self.num_kept < self.num_samples else "warm-up"  # for the log


class RS2(Baseline):
    def weigh(self):
        return some(self._all, self.sizes[self.epoch], "rs2", self.seed, self.epoch)


class Static(Baseline):
    """One subset (N,) for the whole run; `deal` gives each epoch whole batches of it."""

    def __init__(self, num_samples, *ratios, subset, **settings):
        super().__init__(num_samples, **settings)
        self.subset = subset

    def weigh(self):
        return deal(self.subset, self.sizes, self.global_batch, self.epoch, self.seed)


def deal(subset, sizes, batch, epoch, seed):
    """An epoch's share of a fixed subset: as many whole batches as SCAN's total leaves for it, at random."""
    batches = spread(sum(size // batch for size in sizes), len(sizes))[epoch]
    return some(subset, batches * batch, "deal", seed, epoch)


class Once(Scan):
    """SCAN until its first round of candidates is found; so many of these are left out from then on."""

    def __init__(self, num_samples, *ratios, sizes, batch, t_cos=3, **settings):
        super().__init__(num_samples, *ratios, t_cos=len(sizes), **settings)  # there is no second round
        self.sizes, self.global_batch = sizes, batch

    def _draw(self, share):
        begin = self.first_preparation + 1
        sizes, candidates = self.sizes[begin:], (self.redundant | self.ill_matched).cpu()
        excess = self.num_samples - static_size(sizes, self.global_batch)
        left_out = some(candidates, excess, "once", self.seed)
        return deal(self._all & ~left_out, sizes, self.global_batch, self.epoch - begin, self.seed)


# ---------------------------------------------------------------- InfoBatch


class InfoBatch(Baseline):
    """A sample's score is its loss when last seen. Of those below the mean a random share r is left out,
    and the gradients of the rest of them weigh 1 / (1 - r). Full data in the last 12.5 % of the epochs.

    r is what SCAN's budget leaves for the epoch, at most 0.9.
    """

    _tensors = Baseline._tensors + ("score",)
    _progress = Scan._progress + ("spent",)

    def __init__(self, num_samples, *ratios, **settings):
        super().__init__(num_samples, **settings)
        self.score = torch.full((num_samples,), math.nan)  # nan: not seen yet, hence never left out
        self.spent = 0  # samples seen in the epochs before

    def weigh(self):
        batch, end = self.global_batch, int(0.875 * len(self.sizes))
        below = self.score < self.score.nanmean()
        if self.epoch >= end or not below.any():
            return torch.ones(self.num_samples)
        budget = sum(size // batch for size in self.sizes) - self.spent // batch  # in batches
        full = self.num_samples // batch
        now = (budget - (len(self.sizes) - end) * full) // (end - self.epoch)
        n = min(max(self.num_samples - now * batch, 0), int(0.9 * below.sum()))
        share = n / int(below.sum())
        weight = torch.where(below, 1 / (1 - share), 1.0)
        return weight.masked_fill(some(below, n, "infobatch", self.seed, self.epoch), 0.0)

    def observe(self, ids, loss_a, loss_b):
        weight = self.weight[ids.cpu()].to(loss_a.device)
        for loss in (loss_a, loss_b):  # they still have their graph: backward() comes after this
            if loss.requires_grad:
                loss.register_hook(lambda gradient: gradient * weight)
        super().observe(ids, loss_a, loss_b)
        losses = _gather(((loss_a + loss_b) / 2).detach().float())
        self.score[_gather(ids.to(losses.device)).cpu()] = losses.cpu()

    def end_epoch(self):
        super().end_epoch()
        self.spent += self.observed


# ---------------------------------------------------------------- SemDeDup


def semdedup(features, remove, seed=0, clusters=None):
    """Mask (N,) of the `remove` samples that most resemble another one; features (N, d).

    Spherical k-means; inside a cluster, farthest from the centroid first, each sample has its largest cosine
    to any before it; the largest of all clusters go.
    """
    x = F.normalize(features.float(), dim=-1)
    centroids, nearest = k_means(x, clusters or max(1, round(len(x) / 1000)), seed)
    duplicate = torch.full((len(x),), -math.inf)
    for k in range(len(centroids)):
        ids = (nearest == k).nonzero().flatten()
        ids = ids[(x[ids] @ centroids[k]).argsort(stable=True)]
        for i in range(1, len(ids), 1024):  # rows at a time: a cluster may be large
            rows = ids[i : i + 1024]
            cosine = x[rows] @ x[ids[: i + len(rows)]].T
            later = torch.arange(cosine.shape[1]) >= torch.arange(i, i + len(rows))[:, None]
            duplicate[rows] = cosine.masked_fill(later, -math.inf).amax(1)
    removed = duplicate.argsort(descending=True, stable=True)[:remove]
    return torch.zeros(len(x), dtype=torch.bool).scatter_(0, removed, True)


def k_means(x, k, seed, rounds=30):
    """Spherical k-means of unit vectors (N, d) -> centroids (k, d), the nearest one of each vector (N,)."""
    centroids = x[torch.randperm(len(x), generator=_generator("k-means", seed))[:k]]
    for _ in range(rounds):
        closeness, nearest = (x @ centroids.T).max(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        empty = torch.bincount(nearest, minlength=k) == 0
        sums[empty] = x[closeness.argsort()[: int(empty.sum())]]  # start again from the worst served
        centroids = F.normalize(sums, dim=-1)
    return centroids, (x @ centroids.T).argmax(1)


# ---------------------------------------------------------------- D-Pruning


def dpruning(influence, remove, seed=0, swaps=200_000):
    """Mask (N,) of `remove` samples whose influences (N, d) sum to a short vector: annealed swaps.

    Starts from the shortest influences, and returns the best set that it came by.
    """
    x, rng = influence.double().numpy(), np.random.default_rng(seed)
    order = np.square(x).sum(1).argsort(kind="stable")
    if 0 < remove < len(x):
        total = x[order[:remove]].sum(0)
        value = best = total @ total
        done, best_after = [], 0  # swaps, and how many of them led to the best set
        hottest = np.square(x).sum() / len(x)
        inside = rng.integers(remove, size=swaps)
        outside = rng.integers(remove, len(x), size=swaps)
        slack = hottest * np.geomspace(1, 1e-6, swaps) * rng.exponential(size=swaps)  # Metropolis' rule
        for i, j, worse in zip(inside, outside, slack):
            changed = total - x[order[i]] + x[order[j]]
            if changed @ changed <= value + worse:
                order[i], order[j] = order[j], order[i]
                total, value = changed, changed @ changed
                done.append((i, j))
                if value < best:
                    best, best_after = value, len(done)
        for i, j in reversed(done[best_after:]):
            order[i], order[j] = order[j], order[i]
    return torch.zeros(len(x), dtype=torch.bool).scatter_(0, torch.from_numpy(order[:remove]), True)


def influences(run, dimensions=256):
    """(N, dimensions): random projections of H^-1 grad l_i / N for each training sample, from a proxy run.

    Of the two projection matrices alone. H is diagonal: the mean squared gradient, damped by its own mean.
    """
    checkpoint = evaluation.load_checkpoint(run)
    args = argparse.Namespace(**checkpoint["args"])
    if not args.arch.startswith("vit"):
        raise UserError(f"dpruning takes CLIP's ViTs, not {args.arch}")
    model, tokenizer = evaluation.load_model(run, vocab=args.vocab)
    dataset, _ = train.open_data(args, tokenizer)
    weights = model.visual.proj.detach().clone(), model.text_projection.detach().clone()
    for module, name in ((model.visual, "proj"), (model, "text_projection")):
        setattr(module, name, torch.nn.Parameter(torch.eye(len(getattr(module, name)))))
    with torch.no_grad():  # features before their projections
        parts = []
        for _, _, *batch in DataLoader(dataset, args.batch_size, collate_fn=data.collate):
            images, tokens = model.inputs(batch, torch.device("cpu"))
            parts.append((model.encode_image(images), model.encode_text(tokens)))
    images, texts = (torch.cat(part) for part in zip(*parts))
    scale = model.logit_scale.detach().exp()

    def losses(image_projection, text_projection, rows):
        image = F.normalize(images[rows] @ image_projection, dim=-1)
        text = F.normalize(texts[rows] @ text_projection, dim=-1)
        a, b, _ = model.losses(image, text, scale)
        return (a + b) / 2

    def gradients():
        generator = _generator("dpruning", args.seed)
        order = torch.randperm(len(images), generator=generator)
        order = torch.cat([order, order[: -len(order) % args.batch_size]])  # fill the last batch
        for rows in order.split(args.batch_size):
            jacobian = torch.func.jacrev(losses, argnums=(0, 1), chunk_size=16)(*weights, rows)
            yield rows, torch.cat([part.flatten(1) for part in jacobian], 1)

    curvature = torch.stack([g.square().mean(0) for _, g in gradients()]).mean(0)
    curvature += curvature.mean()
    directions = torch.randn(len(curvature), dimensions, generator=_generator("directions", args.seed))
    directions /= curvature[:, None] * math.sqrt(dimensions) * len(images)
    result = torch.empty(len(images), dimensions)
    for rows, gradient in gradients():
        result[rows] = gradient @ directions
    return result


# ---------------------------------------------------------------- a run


def subset(method, sizes, batch, total, seed, full_run=None, proxy_run=None, coreset_runs=None):
    """Mask (N,) of the samples that a static method keeps."""
    everything, keep = torch.ones(total, dtype=torch.bool), static_size(sizes, batch)
    if method == "coreset":
        states = [evaluation.load_checkpoint(run)["scan"] for run in coreset_runs]
        try:
            kept = coreset(states, (total - keep + 0.5) / total)
        except ValueError as error:
            raise UserError(f"--coreset-runs: {error}") from None
        return torch.zeros_like(everything).scatter_(0, kept, True)
    if method == "random":
        return some(everything, keep, "random", seed)
    if method == "semdedup":
        args = argparse.Namespace(**evaluation.load_checkpoint(full_run)["args"])
        model, _ = evaluation.load_model(full_run, text=False)
        source = train.open_source(args, args.data, True)
        features = evaluation.image_features(model, source, torch.device("cpu"))
        return ~semdedup(features, total - keep, seed)
    return ~dpruning(influences(proxy_run), total - keep, seed)


STATIC = {"random": None, "semdedup": "full_run", "dpruning": "proxy_run", "coreset": "coreset_runs"}
METHODS = ("rs2", "infobatch", *STATIC, "once", "same-budget")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = evaluation.Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--scan-run", type=Path, required=True, help="a finished run of SCAN: the budget")
    parser.add_argument("--full-run", type=Path, help="a finished full-data run: semdedup's embeddings")
    parser.add_argument("--proxy-run", type=Path, help="a short full-data run: dpruning's gradients")
    about = "finished runs of SCAN: coreset's counts"
    parser.add_argument("--coreset-runs", type=Path, nargs="+", help=about)
    args, rest = parser.parse_known_args()
    needed = STATIC.get(args.method)
    if needed and getattr(args, needed) is None:
        parser.error(f"{args.method} needs --{needed.replace('_', '-')}")
    try:
        sizes, batch, total = budget_of(args.scan_run)
    except (OSError, UserError) as error:
        sys.exit(f"baselines.py: {error}")
    if args.method == "same-budget":
        batches = sum(size // batch for size in sizes)
        epochs = -(-batches // (total // batch))
        sizes = [n * batch for n in spread(batches, epochs)]
        rest += ["--epochs", str(epochs)]
    options, asked = dict(sizes=sizes, batch=batch), train.parse_args(rest)
    if (asked.epochs, asked.batch_size) != (len(sizes), batch):
        has, given = f"{len(sizes)} epochs, batches of {batch}", f"{asked.epochs} and {asked.batch_size}"
        sys.exit(f"baselines.py: {args.scan_run} has {has}, not {given}: give the same flags here")

    def make_scan(num_samples, *ratios, seed=0, **settings):  # called by train.py, once its flags are known
        if num_samples != total:
            raise UserError(f"{args.scan_run} has {total:,} samples, these data {num_samples:,}")
        kind = {"infobatch": InfoBatch, "once": Once}.get(args.method, RS2)
        if args.method in STATIC:
            runs = {name: getattr(args, name) for name in STATIC.values() if name}
            options["subset"] = subset(args.method, sizes, batch, total, seed, **runs)
            kind = Static
        return kind(num_samples, *ratios, seed=seed, **settings, **options)

    train.main(rest, make_scan=make_scan)


if __name__ == "__main__":
    main()
