"""SCAN: dynamic dataset pruning for contrastive pre-training, in one file.

From "SCAN: Bootstrapping Contrastive Pre-training for Data Efficiency" (Guo & Kankanhalli). Sections and
equations below are the paper's. Copy this file: it needs torch and the standard library, nothing else.

    scan = Scan(len(dataset), prune=0.3)
    sampler = ScanSampler(scan, global_batch_size)
    loader = DataLoader(WithIds(dataset), batch_sampler=sampler)  # pruned samples are never even read
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for ids, (images, texts) in loader:                       # ids: positions in the dataset
            ...
            a, b = info_nce(image, text, scale), info_nce(text, image, scale)
            scan.observe(ids, a, b)                               # watches; never changes the loss
            ((a + b) / 2).mean().backward()
        scan.end_epoch()

A loop that keeps its own loss calls `scan.watch(ids, image, text, scale)` instead.

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
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset, IterableDataset

# ---------------------------------------------------------------- Eq. 1: one InfoNCE loss per sample


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
        first = dist.get_rank() * len(query) if _distributed() else 0
        if len(query) * len(keys) > _PLAIN:
            scale = scale if torch.is_tensor(scale) else query.new_full((), scale)  # waits for no GPU
            return _BlockedLoss.apply(query, keys, scale, first)
        positives = torch.arange(first, first + len(query), device=query.device)
        return F.cross_entropy(scale * query @ keys.T, positives, reduction="none")


_PLAIN = 2**24  # logits: up to here autograd keeps them all, which is fastest
_BLOCK = 2**22  # logits held at once, of larger batches


class _BlockedLoss(torch.autograd.Function):
    """The same losses in little memory: logits some rows at a time, and again in the backward pass."""

    @staticmethod
    def forward(ctx, query, keys, scale, first):
        rows = max(1, _BLOCK // len(keys))
        positives = torch.arange(first, first + len(query), device=query.device)
        norms, losses = query.new_empty(2, len(query))  # not piece by piece: that would scatter the memory
        for q, positive, norm, loss in zip(*(x.split(rows) for x in (query, positives, norms, losses))):
            logits = scale * q @ keys.T
            norm.copy_(logits.logsumexp(1))
            loss.copy_(norm - logits.gather(1, positive[:, None])[:, 0])
        ctx.save_for_backward(query, keys, scale, positives, norms)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, keys, scale, positives, norms = ctx.saved_tensors
        rows = max(1, _BLOCK // len(keys))
        to_query, to_keys = torch.empty_like(query), torch.zeros_like(keys)
        with torch.autocast(query.device.type, enabled=False):
            parts = (x.split(rows) for x in (query, positives, norms, grad, to_query))
            for q, positive, norm, g, out in zip(*parts):
                q = scale * q
                # of a loss by its logits: the softmax, less 1 at the positive; g comes later
                d = torch.addmm(-norm[:, None], q, keys.T).exp_()
                d.scatter_add_(1, positive[:, None], -torch.ones_like(g)[:, None])
                torch.mm(d, keys, out=out).mul_(g[:, None])
                to_keys.addmm_(d.T, g[:, None] * q)
        return scale * to_query, to_keys, (query * to_query).sum().view_as(scale), None


class _AllGather(torch.autograd.Function):
    """Concatenate a tensor of all ranks, with gradient: the backward pass sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x):
        return _gather(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(x):
    """(b, ...) on each of W ranks -> (W b, ...), in the order of the ranks; without gradient."""
    if not _distributed():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
        # First those that both chose (-1), then at random (0 .. 1) those that one did; never the rest (inf).
        priority = lottery.where(chosen_a | chosen_b, math.inf).where(~(chosen_a & chosen_b), -1.0)
        first = priority.argsort(stable=True)[:n]
        return torch.zeros_like(finite).scatter_(0, first, True) & (chosen_a | chosen_b)

    redundant = both_directions(loss_a, loss_b, int(rho_red * size))
    ill_matched = both_directions(-loss_a, -loss_b, int(rho_ill * size))
    return redundant, ill_matched


def _check_ratios(rho_red, rho_ill):
    if not (rho_red >= 0 and rho_ill >= 0 and rho_red + rho_ill <= 1):
        raise ValueError(
            "prune must be at least 0 and at most 0.5 (redundant + ill-matched at most 1), got "
            f"redundant {rho_red}, ill-matched {rho_ill}"
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


# ---------------------------------------------------------------- the method


class Scan:
    """Watches per-sample losses and says which samples to train on (Sect. 3.3, Fig. 2).

    num_samples: size N of the dataset; ids are positions 0 .. N-1.
    prune: share of each global batch marked redundant, and the same share marked ill-matched; also the
        average share of the data left out per round. rho_red and rho_ill set the two apart (Tables 7, 8):
        the average is then their mean.
    t_cos: mutation epochs per round. threshold, rule: see `warmed_up`. seed: of all random draws.
    keep: ids of a static coreset (Sect. 4.3); nothing else is ever kept or counted.

    What it can be asked:
    stage: "warm-up", "preparation" or "mutation", of the epoch begun last. step: its steps observed so far.
    kept, kept_mask, num_kept: what it trains on.
    loss: mean of the epoch ended last.
    redundant, ill_matched: masks (N,) of the newest round. candidates: their ids.
    counts, ill_counts: (N,) int16, rounds in which each sample was a candidate, and an ill-matched one.
    quantile: (N,) float16, where each sample's loss stood in its batches (0 lowest, 1 highest): mean over
        the epochs of full data; one in whose incomplete last batch it fell counts as its mean till then.
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
        keep=None,
    ):
        # Python's numbers, since numpy's would make other draws, and a state that torch.load refuses.
        self.num_samples, self.t_cos, self.seed = int(num_samples), int(t_cos), int(seed)
        self.rho_red = float(prune if rho_red is None else rho_red)
        self.rho_ill = float(prune if rho_ill is None else rho_ill)
        self.threshold, self.rule = float(threshold), rule
        _check_ratios(self.rho_red, self.rho_ill)  # refuse bad settings now, not epochs later
        prune_ratio(0, t_cos)
        warmed_up(1.0, 1.0, threshold, rule)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self._all = torch.ones(num_samples, dtype=torch.bool)
        if keep is not None:
            keep = torch.as_tensor(keep)
            if keep.ndim != 1 or keep.is_floating_point() or keep.dtype == torch.bool or not len(keep):
                raise ValueError("keep must be a flat list of ids")
            if keep.min() < 0 or keep.max() >= num_samples:
                raise ValueError(f"keep must hold ids in 0..{num_samples - 1}")
            self._all.zero_()[keep.long()] = True

        self.stage = "warm-up"
        self.epoch, self.open, self.step = None, False, 0  # open: between begin_epoch and end_epoch
        self._begun = False  # whether kept_mask is of this epoch: a state does not hold it
        self.observed, self.batch = 0, 0  # samples of this epoch so far; the newest global batch
        self._seen = torch.zeros(
            num_samples, dtype=torch.bool
        )  # ids observed in this epoch, or since a resume
        self._unseen = 0  # samples of this epoch that were observed before a resume: a state has no mask
        self.first_preparation = None  # epoch; None until warmed up
        self.full_epochs, self.rounds = 0, 0  # epochs of full data begun, rounds of candidates found
        self.loss = math.nan
        self.kept_mask, self.num_kept = self._all, int(self._all.count_nonzero())
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_count = torch.zeros((), dtype=torch.int64)
        # Redundant and ill-matched; a spare place at the end takes the writes of unmarked samples.
        self._marked = torch.zeros(2, num_samples + 1, dtype=torch.bool)
        self.counts = torch.zeros(num_samples, dtype=torch.int16)
        self.ill_counts = torch.zeros(num_samples, dtype=torch.int16)
        self.quantile = torch.full((num_samples,), 0.5, dtype=torch.float16)

    redundant = property(lambda self: self._marked[0, :-1])
    ill_matched = property(lambda self: self._marked[1, :-1])

    @property
    def candidates(self):
        """Ids of D', redundant or ill-matched in the newest round: int64, sorted, on the CPU."""
        return (self.redundant | self.ill_matched).cpu().nonzero().flatten()

    @property
    def kept(self):
        """Ids of the epoch begun last: int64, sorted, the same on every rank."""
        return self.kept_mask.nonzero().flatten()

    def begin_epoch(self, epoch=None):
        """Begin an epoch (the next one, if not said) -> ids to train on: int64, sorted, alike on every rank.

        Epochs must follow one another. An epoch that is open already (state loaded in mid-epoch) goes on:
        what it observed is kept.
        """
        self._begin(epoch)
        return self.kept

    def _begin(self, epoch):
        following = 0 if self.epoch is None else self.epoch if self.open else self.epoch + 1
        epoch = following if epoch is None else int(epoch)
        if self.epoch is not None and epoch != following:
            raise ValueError(
                f"epoch {self.epoch} has not ended: call end_epoch() before epoch {epoch}"
                if self.open
                else f"epoch {self.epoch} was the last: the next is {following}, not {epoch}"
            )
        if self.first_preparation is None:
            since, self.stage = 0, "warm-up"
        else:
            since = epoch - self.first_preparation
            self.stage = "preparation" if since % (self.t_cos + 1) == 0 else "mutation"
        if not self.open:
            self.epoch, self.open, self.step, self.observed = epoch, True, 0, 0
            self.loss_sum.zero_()
            self.loss_count.zero_()
            self._seen.zero_()
            self._unseen = 0
            self.full_epochs += self.stage != "mutation"
            if self.stage == "preparation":  # all data have grown back; candidates are found anew
                self._marked.zero_()
        self.kept_mask = self._draw(prune_ratio(since, self.t_cos)) if self.stage == "mutation" else self._all
        self.num_kept = int(self.kept_mask.count_nonzero())  # sum() would make 8 bytes of each
        self._begun = True

    def _draw(self, share):
        """Mask (N,) of what a mutation epoch trains on: all but a random share of the candidates (Eq. 3)."""
        kept, candidates = self._all.clone(), (self.redundant | self.ill_matched).cpu()
        key, total = ("drop", self.seed, self.epoch), int(candidates.count_nonzero())
        drop, done = int(share * total), 0
        if self.num_samples <= _LARGE:
            first = torch.randperm(total, generator=_generator(*key))[:drop]
            kept[candidates.nonzero().flatten()[first]] = False
            return kept
        place = _permutation(total, *key)
        for keep, here in zip(kept.split(_CHUNK), candidates.split(_CHUNK)):
            n = int(here.count_nonzero())
            keep[here] = place(torch.arange(done, done + n)) >= drop
            done += n
        return kept

    @torch.no_grad()
    def observe(self, ids, loss_a, loss_b):
        """Take in one step, on every rank: ids of its samples and their losses in both directions.

        ids: (b,) int64 (best on the CPU, where checking their range costs nothing). loss_a, loss_b: (b,),
        not yet averaged. Gathers the global batch, so that all ranks rank the same losses. Never waits for
        the GPU. With gradient accumulation: once per optimizer step, all ids and losses concatenated.
        """
        if not self.open:
            raise RuntimeError("observe() outside an epoch: call begin_epoch() first")
        ids = torch.as_tensor(ids)
        if loss_a.ndim != 1 or loss_a.shape != loss_b.shape or ids.shape != loss_a.shape:
            raise ValueError(
                "observe() needs one loss per sample and direction, shape (batch,), as info_nce returns; got "
                f"ids {tuple(ids.shape)}, losses {tuple(loss_a.shape)} and {tuple(loss_b.shape)}"
            )
        if ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 positions in the dataset, got {ids.dtype}")
        if ids.device.type == "cpu" and len(ids):
            low, high = torch.stack(ids.aminmax()).tolist()
            if low < 0 or high >= self.num_samples:
                raise ValueError(f"ids must lie in 0..{self.num_samples - 1}, got {low}..{high}")
        losses = torch.stack([loss_a, loss_b], 1).float()
        device = losses.device
        self._to(device)
        ids = _gather(ids.to(device, non_blocking=True))  # (B,)
        loss_a, loss_b = _gather(losses).unbind(1)  # (B,) each

        self._seen.index_fill_(0, ids, True)
        mean = (loss_a.double() + loss_b.double()) / 2
        finite = mean.isfinite()
        self.loss_sum += mean.where(finite, 0.0).sum()
        self.loss_count += finite.sum()
        if self.stage != "mutation":
            quantile = (mean.argsort().argsort() + 0.5) / len(mean)
            before = self.quantile[ids]
            self.quantile[ids] = before.lerp(quantile.to(before.dtype), 1 / self.full_epochs)
        if self.stage == "preparation":
            generator = _generator("top-up", self.seed, self.epoch, self.step)
            marked = select_candidates(loss_a, loss_b, self.rho_red, self.rho_ill, generator)
            for flags, mask in zip(self._marked, marked):
                flags.index_fill_(0, ids.where(mask, self.num_samples), True)
        self.step += 1
        self.observed += len(ids)
        self.batch = len(ids)

    def watch(self, ids, query, key, scale):
        """`observe` for a loop that keeps its own loss: both directions of Eq. 1, without gradient.

        ids: (b,). query, key, scale: as for `info_nce`, images and texts for example.
        """
        with torch.no_grad():
            self.observe(ids, info_nce(query, key, scale), info_nce(key, query, scale))

    def end_epoch(self):
        """Close the epoch: its mean loss may end the warm-up; a preparation epoch is counted."""
        if not self.open:
            raise RuntimeError("end_epoch() without begin_epoch()")
        self.open = False
        self._check_ids()
        previous, self.loss = self.loss, (self.loss_sum / self.loss_count).item()
        # The first epoch has no predecessor (its "previous" is nan, which compares false).
        if self.first_preparation is None and warmed_up(previous, self.loss, self.threshold, self.rule):
            self.first_preparation = self.epoch + 1
        if self.stage == "preparation":
            self._marked[:, :-1] &= self._all.to(self._marked.device)
            self.counts += (self.redundant | self.ill_matched).cpu()
            self.ill_counts += self.ill_matched.cpu()
            self.rounds += 1

    def _check_ids(self):
        """Warn if the samples observed in this epoch are not those that it kept.

        A dataset may replace samples that it cannot read, so a few wrong ids are no reason to warn: up to 1 %
        of the data, or fewer than one per batch.
        """
        counted = self.observed - self._unseen
        different = int(self._seen.count_nonzero())
        repeated = counted - different
        left_out = different - int((self._seen & self.kept_mask.to(self._seen.device)).count_nonzero())
        wrong = repeated + left_out
        if wrong > 0.01 * self.num_samples and wrong * self.batch >= counted:
            if repeated > left_out:
                cause = (
                    f", of which {repeated:,} repeat an id: observe each sample once, by its position in the "
                )
                cause += "whole dataset (WithIds around a ConcatDataset), with one Scan seed on all ranks"
            else:
                cause = f", of which {left_out:,} were left out of this epoch: iterate over the loader after "
                cause += (
                    "each set_epoch(), and observe positions in the whole dataset (WithIds around a Subset)"
                )
        elif abs(self.num_kept - self.observed) >= max(self.batch, 1):
            cause = (
                ": does observe() see every step, and does the loader use ScanSampler's batches unchanged?"
            )
        else:
            return
        counts = f"epoch {self.epoch} kept {self.num_kept:,} samples, and observed {self.observed:,}"
        warnings.warn(counts + cause, stacklevel=3)

    _settings = ("num_samples", "rho_red", "rho_ill", "t_cos", "threshold", "rule", "seed")
    _progress = ("stage", "epoch", "open", "step", "observed", "batch", "first_preparation", "full_epochs")
    _progress += ("rounds", "loss")
    _tensors = ("loss_sum", "loss_count", "redundant", "ill_matched", "counts", "ill_counts", "quantile")

    def state_dict(self):
        """Everything, as plain values and CPU tensors, at any moment; the same on every rank."""
        state = {name: getattr(self, name) for name in self._settings + self._progress}
        return state | {name: getattr(self, name).to("cpu", copy=True) for name in self._tensors}

    def load_state_dict(self, state):
        """Continue from `state_dict()`. A state of other settings is refused, since its draws would differ.

        To change one on purpose at the end of an epoch: `load_state_dict(state | {"t_cos": scan.t_cos})`.
        """
        differing = [name for name in self._settings if state[name] != getattr(self, name)]
        if differing:
            texts = [f"{name} {state[name]} (here {getattr(self, name)})" for name in differing]
            raise ValueError(f"this state has other settings: {', '.join(texts)}")
        for name in self._progress:
            setattr(self, name, state[name])
        for name in self._tensors:
            getattr(self, name).copy_(state[name])
        self._begun = False
        self._seen.zero_()
        self._unseen = self.observed

    def _to(self, device):
        if self.loss_sum.device != device:
            watching = (
                "loss_sum",
                "loss_count",
                "quantile",
                "_marked",
                "_seen",
            )  # the rest is only needed on the CPU
            for name in watching:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))


# ---------------------------------------------------------------- random draws


def _generator(*key):
    """A CPU generator for one purpose: (salt, seed, epoch, ...), so that no draw ever depends on another."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _shuffled(mask, *key):
    """The ids whose place in the mask (N,) is set, in a random order, int64, in chunks."""
    if len(mask) <= _LARGE:
        ids = mask.nonzero().flatten()
        yield ids[torch.randperm(len(ids), generator=_generator(*key))]
        return
    permute = _permutation(len(mask), *key)
    for start in range(0, len(mask), _CHUNK):
        ids = permute(torch.arange(start, min(start + _CHUNK, len(mask))))
        yield ids[mask[ids]]


_LARGE, _CHUNK = 2**24, 2**16  # chunks that fit into a core's cache: twice as fast


def _permutation(n, *key):
    """-> a function of ids (k,) that maps 0 .. n-1 to the same in a random order, in next to no memory.

    A Feistel network over the next power of two: each round changes one half of an id's bits by what a random
    table holds for the other half, which is a bijection, whatever the table. An id that leaves 0 .. n-1 goes
    through it again.
    """
    bits, generator = (n - 1).bit_length(), _generator(*key)
    low = bits // 2
    tables = [torch.randint(2 ** (bits - k), (2**k,), generator=generator) for k in 3 * (low, bits - low)]

    def network(ids):
        left, right = ids >> low, ids & (2**low - 1)
        for table in tables:
            left ^= table.index_select(0, right)
            left, right = right, left
        return left << low | right

    def permute(ids):
        ids = network(ids)
        while len(outside := (ids >= n).nonzero().flatten()):
            ids[outside] = network(ids[outside])
        return ids

    return permute


# ---------------------------------------------------------------- what a loop needs besides


class WithIds(Dataset):
    """Any map-style dataset, with ids: items are (id, item), so that `for ids, (images, texts) in loader`."""

    def __init__(self, dataset):
        is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not is_map_style or isinstance(dataset, IterableDataset):
            raise TypeError(
                "SCAN prunes by position: it needs a map-style dataset, with __len__ and __getitem__"
            )
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return i, self.dataset[i]


class ScanSampler:
    """Deals out the kept ids in global batches: DataLoader(dataset, batch_sampler=ScanSampler(scan, 800)).

    With the same seed, the global batch at step k holds the same ids whatever the number of ranks; rank r
    takes its slice. Every rank has equally many steps, an incomplete last batch is left out, every epoch is
    reshuffled. rank, world_size: torch.distributed's, if not given.
    """

    def __init__(self, scan, global_batch_size, rank=None, world_size=None):
        if rank is None:
            rank = dist.get_rank() if _distributed() else 0
        if world_size is None:
            world_size = dist.get_world_size() if _distributed() else 1
        self.scan, self.global_batch_size = scan, global_batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = None, 0  # start: batches of the epoch that were done before a resume
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} ranks")
        if global_batch_size < 2 or global_batch_size < world_size:
            raise ValueError(
                f"the global batch must hold at least 2 samples and one per rank, got {global_batch_size} "
                f"for {world_size} rank(s): a contrastive loss needs negatives"
            )
        if global_batch_size % world_size:
            raise ValueError(
                f"the global batch, {global_batch_size}, must be divisible by {world_size} ranks"
            )
        if scan.num_kept < global_batch_size and scan.stage != "mutation":  # which may keep nothing
            raise ValueError(f"{scan.num_kept} samples do not fill one global batch of {global_batch_size}")

    def set_epoch(self, epoch=None):
        """Begin scan's epoch, the next if not said; needed before each one. Once more changes nothing."""
        begun = self.scan.open and self.scan._begun and self.epoch == self.scan.epoch
        if not begun or epoch not in (None, self.epoch):
            self.scan._begin(epoch)
            self.epoch, self.start = self.scan.epoch, self.scan.observed // self.global_batch_size

    def __len__(self):
        return self.scan.num_kept // self.global_batch_size

    def __iter__(self):
        if self.epoch is None or not self.scan.open:
            raise RuntimeError("ScanSampler: call set_epoch(epoch) before each epoch")
        size, local = self.global_batch_size, self.global_batch_size // self.world_size
        mine = slice(self.rank * local, (self.rank + 1) * local)
        step, left = 0, torch.empty(0, dtype=torch.int64)
        for ids in _shuffled(self.scan.kept_mask, "order", self.scan.seed, self.epoch):
            ids = torch.cat([left, ids])
            for batch in ids[: len(ids) // size * size].view(-1, size):
                if step >= self.start:
                    yield batch[mine].tolist()
                step += 1
            left = ids[len(ids) // size * size :]


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
    seeds = [state["seed"] for state in states]
    if len(set(seeds)) < len(seeds):
        warnings.warn(
            f"runs with one seed saw the same batches, so they agree too much: {seeds}", stacklevel=2
        )
    n = int(prune * sizes.pop())
    pruned_by_all = torch.stack([pruned_set(state, prune) for state in states]).all(0)
    counts = torch.stack([state["counts"].long() for state in states]).sum(0)
    counts[pruned_by_all] += counts.max() + 1  # these go first
    return (~_most_counted(counts, n, seeds)).nonzero().flatten()


def _most_counted(counts, n, seed):
    # By id the ties would fall alike in every run, and by the seed alone alike in runs of one seed: either
    # inflates the overlap of their pruned sets.
    run = hashlib.sha256(counts.numpy()).hexdigest()
    shuffled = torch.randperm(len(counts), generator=_generator("ties", seed, run))
    first = shuffled[counts[shuffled].argsort(descending=True, stable=True)[:n]]
    return torch.zeros(len(counts), dtype=torch.bool).scatter_(0, first, True)
