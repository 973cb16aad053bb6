"""SCAN: dynamic dataset pruning for contrastive pre-training, in one file.

From "SCAN: Bootstrapping Contrastive Pre-training for Data Efficiency" (Guo & Kankanhalli). Sections and
equations below are the paper's. Copy this file: it needs torch and the standard library, nothing else.

    scan = Scan(len(dataset), prune=0.3)
    sampler = ScanSampler(global_batch_size)                      # DataLoader(dataset, batch_sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch, scan.begin_epoch(epoch))         # pruned samples are never even read
        for ids, images, texts in loader:                         # ids: positions in the dataset
            ...
            a, b = info_nce(image, text, scale), info_nce(text, image, scale)
            scan.observe(ids, a.detach(), b.detach())             # watches; never changes the loss
            ((a + b) / 2).mean().backward()
        scan.end_epoch()

Epochs pass through three stages:

    warm-up      full data, until the epoch loss is stable                                     Sect. 3.3.1
    preparation  full data; each global batch marks its lowest losses (redundant) and its
                 highest (ill-matched) as pruning candidates D'                                Eq. 2
    mutation     t_cos epochs; each leaves out a fresh random share rho_cur of D'              Eq. 3
    ... then all data grow back, and the next preparation epoch starts a new round.            Sect. 3.3.2

Everything here runs alike in one process and under torch.distributed (gloo or NCCL): every rank holds the
same state and takes the same decisions, because losses are gathered and all random draws are seeded.
"""

import hashlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

# ---------------------------------------------------------------- Eq. 1: one InfoNCE loss per sample


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor of all ranks, with gradient: the backward pass sums what every rank sent back."""

    @staticmethod
    def forward(ctx, x):
        return _gather(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(x):
    """(b, ...) on each of W ranks -> (W b, ...), in the order of the ranks; without gradient."""
    if not _distributed():
        return x
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather(list(out.chunk(dist.get_world_size())), x.contiguous())
    return out


def info_nce(query, key, scale):
    """One direction of Eq. 1, before the mean: each query against the keys of the whole global batch.

    query, key: (b, d) unit vectors of this rank, row i of both from the same sample; b is equal on all ranks.
    scale: 1 / temperature, a number or a 0-d tensor.
    Returns (b,) float32. Its mean, backpropagated under DDP (which averages over ranks), gives exactly the
    gradient of one process that holds the global batch. In float32 whatever autocast says: with scales up to
    100, lower precision makes ties, and the ranking of the losses is what SCAN lives on.
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(
            f"query and key must both be (batch, dim), got {tuple(query.shape)}, {tuple(key.shape)}"
        )
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()
        keys = _AllGather.apply(key) if _distributed() else key  # (B, d)
        logits = scale * query @ keys.T  # (b, B)
        first = dist.get_rank() * len(query) if _distributed() else 0
        positives = torch.arange(first, first + len(query), device=query.device)
        return F.cross_entropy(logits, positives, reduction="none")


# ---------------------------------------------------------------- Eq. 2: candidates of one global batch


def select_candidates(loss_a, loss_b, rho_red, rho_ill, generator=None):
    """Mark the redundant and the ill-matched samples of one global batch (Eq. 2).

    loss_a, loss_b: (B,) losses of both directions, of the same B samples. rho_red, rho_ill: shares of the
    batch. generator: a CPU torch.Generator for the top-up. Returns two boolean masks (B,), of int(rho B)
    samples each; they may share samples. Non-finite losses are never marked. Nothing here makes the host
    wait for the GPU.

    The paper merges the intersection of both directions, yet counts 2 rho B candidates in all: so we keep
    what both directions chose, and top it up at random from what only one of them chose.
    """
    _check_ratios(rho_red, rho_ill)
    if loss_a.ndim != 1 or loss_a.shape != loss_b.shape:
        raise ValueError(
            f"need two (batch,) loss vectors, got {tuple(loss_a.shape)} and {tuple(loss_b.shape)}"
        )
    loss_a, loss_b = loss_a.detach().float(), loss_b.detach().float()
    size, device = len(loss_a), loss_a.device
    finite = loss_a.isfinite() & loss_b.isfinite()
    # Random keys are drawn on the CPU, so that every device and every rank tops up alike.
    pin = device.type == "cuda"
    lottery = torch.rand(size, generator=generator, pin_memory=pin).to(device, non_blocking=True)

    def lowest(values, n):
        """Mask of the n smallest finite values; ties go to the earlier sample (batches are shuffled)."""
        order = values.where(finite, math.inf).argsort(stable=True)
        return torch.zeros_like(finite).scatter_(0, order[:n], True) & finite

    def both_directions(a, b, n):
        chosen_a, chosen_b = lowest(a, n), lowest(b, n)
        priority = lottery.where(chosen_a | chosen_b, math.inf).where(~(chosen_a & chosen_b), -1.0)
        first = priority.argsort(stable=True)[:n]
        return torch.zeros_like(finite).scatter_(0, first, True) & (chosen_a | chosen_b)

    redundant = both_directions(loss_a, loss_b, int(rho_red * size))
    ill_matched = both_directions(-loss_a, -loss_b, int(rho_ill * size))
    return redundant, ill_matched


def _check_ratios(rho_red, rho_ill):
    if not (rho_red >= 0 and rho_ill >= 0 and rho_red + rho_ill <= 1):
        raise ValueError(
            f"ratios must be >= 0 and sum to at most 1, got redundant {rho_red}, ill-matched {rho_ill}"
        )


# ---------------------------------------------------------------- Sect. 3.3: when, and how much


def warmed_up(previous, current, threshold=0.3, rule="stable", eps=1e-8):
    """Whether pruning may start, from the mean losses of two successive epochs (Sect. 3.3.1).

    "stable": the relative drop is below the threshold; what the paper describes, and what its models ran.
    "printed": the drop is at least the threshold; the inequality as the paper prints it.
    """
    drop = (previous - current) / (previous + eps)
    if rule not in ("stable", "printed"):
        raise ValueError(f'rule must be "stable" or "printed", got {rule!r}')
    return drop < threshold if rule == "stable" else drop >= threshold


def prune_ratio(epochs_since_preparation, t_cos=3):
    """Eq. 3: the share of the candidates left out: 0, .25, .75, 1, 0, ... for t_cos = 3; mean 1/2."""
    if t_cos < 1:
        raise ValueError(f"t_cos must be at least 1, got {t_cos}")
    position = epochs_since_preparation % (t_cos + 1)  # 0 is a preparation epoch
    return (1 + math.cos((t_cos - position) * math.pi / t_cos)) / 2


def _generator(*key):
    """A CPU generator for one purpose: (salt, seed, epoch, ...), so that no draw ever depends on another."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- the method


class Scan:
    """Watches per-sample losses and says which samples to train on (Sect. 3.3, Fig. 2).

    num_samples: size N of the dataset; ids are positions 0 .. N-1.
    prune: share of each global batch marked redundant, and the same share marked ill-matched; also the
        average share of the data left out per round. rho_red and rho_ill set the two apart (Tables 7, 8):
        the average is then their mean.
    t_cos: mutation epochs per round. threshold, rule: see `warmed_up`. seed: of all random draws.
    stage: "warm-up", "preparation" or "mutation", of the epoch begun last.
    loss: mean of the epoch ended last.
    """

    def __init__(
        self,
        num_samples,
        prune=0.3,
        rho_red=None,
        rho_ill=None,
        t_cos=3,
        threshold=0.3,
        rule="stable",
        seed=0,
    ):
        self.num_samples = num_samples
        self.rho_red = prune if rho_red is None else rho_red
        self.rho_ill = prune if rho_ill is None else rho_ill
        self.t_cos, self.threshold, self.rule, self.seed = t_cos, threshold, rule, seed
        _check_ratios(self.rho_red, self.rho_ill)  # refuse bad settings now, not epochs later
        prune_ratio(0, t_cos)
        warmed_up(1.0, 1.0, threshold, rule)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")

        self.stage = "warm-up"
        self.epoch, self.open, self.step = None, False, 0  # open: between begin_epoch and end_epoch
        self.first_preparation = None  # epoch; None until warmed up
        self.loss = math.nan
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_count = torch.zeros((), dtype=torch.int64)
        # One flag per sample, and a spare place at the end that takes the writes of unmarked samples.
        self.redundant = torch.zeros(num_samples + 1, dtype=torch.bool)
        self.ill_matched = torch.zeros(num_samples + 1, dtype=torch.bool)
        self.counts = torch.zeros(num_samples, dtype=torch.int16)  # rounds in which each was a candidate

    @property
    def candidates(self):
        """Ids of D', redundant or ill-matched in the newest round: int64, sorted, on the CPU."""
        return (self.redundant | self.ill_matched)[:-1].nonzero().flatten().cpu()

    def begin_epoch(self, epoch):
        """Ids to train on in this epoch: int64, sorted, the same on every rank.

        Epochs must follow one another. An epoch that is open already (state loaded in mid-epoch) goes on:
        what it observed is kept.
        """
        if self.open and epoch != self.epoch:
            raise ValueError(
                f"epoch {self.epoch} has not ended: call end_epoch() before begin_epoch({epoch})"
            )
        if not self.open and self.epoch is not None and epoch != self.epoch + 1:
            raise ValueError(f"epoch {self.epoch} was the last: the next is {self.epoch + 1}, not {epoch}")

        since = 0 if self.first_preparation is None else epoch - self.first_preparation
        if self.first_preparation is None:
            self.stage = "warm-up"
        else:
            self.stage = "preparation" if since % (self.t_cos + 1) == 0 else "mutation"
        if not self.open:
            self.epoch, self.open, self.step = epoch, True, 0
            self.loss_sum.zero_(), self.loss_count.zero_()
            if self.stage == "preparation":  # all data have grown back; candidates are found anew
                self.redundant.zero_(), self.ill_matched.zero_()

        kept = torch.ones(self.num_samples, dtype=torch.bool)
        if self.stage == "mutation":
            candidates = self.candidates
            drop = int(prune_ratio(since, self.t_cos) * len(candidates))
            order = torch.randperm(len(candidates), generator=_generator("drop", self.seed, epoch))
            kept[candidates[order[:drop]]] = False
        return kept.nonzero().flatten()

    @torch.no_grad()
    def observe(self, ids, loss_a, loss_b):
        """Take in one step, on every rank: ids of its samples and their losses in both directions.

        ids: (b,) int64 (best on the CPU, where checking their range costs nothing). loss_a, loss_b: (b,),
        not yet averaged. Gathers the global batch, so that all ranks rank the same losses. Never waits for
        the GPU.
        """
        if not self.open:
            raise RuntimeError("observe() outside an epoch: call begin_epoch() first")
        if loss_a.ndim != 1 or loss_a.shape != loss_b.shape or ids.shape != loss_a.shape:
            raise ValueError(
                "observe() needs one loss per sample and direction, shape (batch,), as info_nce returns; got "
                f"ids {tuple(ids.shape)}, losses {tuple(loss_a.shape)} and {tuple(loss_b.shape)}"
            )
        if ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 positions in the dataset, got {ids.dtype}")
        if ids.device.type == "cpu" and len(ids) and not (0 <= ids.min() and ids.max() < self.num_samples):
            raise ValueError(f"ids must lie in 0..{self.num_samples - 1}, got {ids.min()}..{ids.max()}")
        device = loss_a.device
        self._to(device)
        ids = _gather(ids.to(device, non_blocking=True))  # (B,)
        loss_a, loss_b = _gather(torch.stack([loss_a, loss_b], 1).float()).unbind(1)  # (B,) each

        mean = (loss_a.double() + loss_b.double()) / 2
        finite = mean.isfinite()
        self.loss_sum += mean.where(finite, 0.0).sum()
        self.loss_count += finite.sum()
        if self.stage == "preparation":
            generator = _generator("top-up", self.seed, self.epoch, self.step)
            redundant, ill_matched = select_candidates(loss_a, loss_b, self.rho_red, self.rho_ill, generator)
            self.redundant.index_fill_(0, ids.where(redundant, self.num_samples), True)
            self.ill_matched.index_fill_(0, ids.where(ill_matched, self.num_samples), True)
        self.step += 1

    def end_epoch(self):
        """Close the epoch: its mean loss may end the warm-up; a preparation epoch is counted."""
        if not self.open:
            raise RuntimeError("end_epoch() without begin_epoch()")
        self.open = False
        previous, self.loss = self.loss, (self.loss_sum / self.loss_count).item()
        # The first epoch has no predecessor (its "previous" is nan, which compares false).
        if self.first_preparation is None and warmed_up(previous, self.loss, self.threshold, self.rule):
            self.first_preparation = self.epoch + 1
        if self.stage == "preparation":
            self.counts += (self.redundant | self.ill_matched)[:-1].to(self.counts.device)

    _settings = ("num_samples", "rho_red", "rho_ill", "t_cos", "threshold", "rule", "seed")
    _progress = ("stage", "epoch", "open", "step", "first_preparation", "loss")
    _tensors = ("loss_sum", "loss_count", "redundant", "ill_matched", "counts")

    def state_dict(self):
        """Everything, as plain values and CPU tensors, at any moment; the same on every rank."""
        state = {name: getattr(self, name) for name in self._settings + self._progress}
        return state | {name: getattr(self, name).to("cpu", copy=True) for name in self._tensors}

    def load_state_dict(self, state):
        """Go on from `state_dict()`. The settings stay those of this object."""
        if state["num_samples"] != self.num_samples:
            raise ValueError(
                f"this state is of {state['num_samples']} samples, the dataset has {self.num_samples}"
            )
        for name in self._progress:
            setattr(self, name, state[name])
        for name in self._tensors:
            setattr(self, name, state[name].clone())

    def _to(self, device):
        if self.loss_sum.device != device:
            for name in self._tensors[:-1]:  # counts are only needed on the CPU, once per round
                setattr(self, name, getattr(self, name).to(device))


class ScanSampler:
    """Deals out the kept ids in global batches: DataLoader(dataset, batch_sampler=ScanSampler(...)).

    With the same seed, the global batch at step k holds the same ids whatever the number of ranks; rank r
    takes its slice. Every rank has equally many steps, an incomplete last batch is left out, every epoch is
    reshuffled.
    """

    def __init__(self, global_batch_size, rank=None, world_size=None, seed=0):
        if rank is None:
            rank = dist.get_rank() if _distributed() else 0
        if world_size is None:
            world_size = dist.get_world_size() if _distributed() else 1
        self.rank, self.world_size = rank, world_size
        self.global_batch_size, self.seed = global_batch_size, seed
        self._ids, self._steps = None, None
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} does not exist among {self.world_size} ranks")
        if global_batch_size < 2 or global_batch_size < self.world_size:
            raise ValueError(
                f"the global batch must hold at least 2 samples and one per rank, got {global_batch_size} "
                f"for {self.world_size} rank(s): a contrastive loss needs negatives"
            )
        if global_batch_size % self.world_size:
            raise ValueError(
                f"the global batch, {global_batch_size}, must be divisible by {self.world_size} ranks"
            )

    def set_epoch(self, epoch, kept_ids, start_step=0):
        """Must be called before every epoch. start_step: steps of it that are done already (resume)."""
        steps = len(kept_ids) // self.global_batch_size
        if steps < 1:
            raise ValueError(
                f"{len(kept_ids)} kept samples do not fill one global batch of {self.global_batch_size}"
            )
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step {start_step} lies outside the {steps} steps of this epoch")
        kept_ids = torch.as_tensor(kept_ids, dtype=torch.int64)
        order = torch.randperm(len(kept_ids), generator=_generator("order", self.seed, epoch))
        batches = kept_ids[order[: steps * self.global_batch_size]].view(steps, self.world_size, -1)
        self._ids = batches[start_step:, self.rank]  # (steps left, local batch)
        self._steps = steps - start_step

    def __len__(self):
        if self._steps is None:
            raise RuntimeError("ScanSampler: call set_epoch(epoch, kept_ids) before each epoch")
        return self._steps

    def __iter__(self):
        if self._ids is None:
            raise RuntimeError("ScanSampler: call set_epoch(epoch, kept_ids) before each epoch")
        ids, self._ids = self._ids, None
        for batch in ids:
            yield batch.tolist()


# ---------------------------------------------------------------- Sect. 4.3: coresets


def pruned_set(state, prune):
    """Mask (N,) of a run's int(prune N) most frequent candidates, ties broken at random."""
    return _most_counted(state["counts"], int(prune * state["num_samples"]), state["seed"])


def coreset(states, prune):
    """Ids to keep, int64, sorted: a static coreset of several runs' `Scan.state_dict()`s (Sect. 4.3).

    What every run pruned (the intersection of their pruned sets) is left out, topped up by the summed counts
    to exactly int(prune N) samples.
    """
    sizes = {state["num_samples"] for state in states}
    if len(sizes) != 1:
        raise ValueError(f"a coreset needs one or more runs over the same data, got sizes {sorted(sizes)}")
    if not 0 <= prune <= 1:
        raise ValueError(f"prune must lie in 0..1, got {prune}")
    n = int(prune * sizes.pop())
    pruned_by_all = torch.stack([pruned_set(state, prune) for state in states]).all(0)
    counts = torch.stack([state["counts"].long() for state in states]).sum(0)
    counts[pruned_by_all] += counts.max() + 1  # these go first
    return (~_most_counted(counts, n, *[state["seed"] for state in states])).nonzero().flatten()


def _most_counted(counts, n, *seeds):
    # By id the ties would fall alike in every run, and would inflate the overlap of their pruned sets.
    shuffled = torch.randperm(len(counts), generator=_generator("ties", *seeds))
    first = shuffled[counts[shuffled].argsort(descending=True, stable=True)[:n]]
    return torch.zeros(len(counts), dtype=torch.bool).scatter_(0, first, True)
