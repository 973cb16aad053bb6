"""SCAN: dynamic dataset pruning for contrastive pre-training, in one file.

From "SCAN: Bootstrapping Contrastive Pre-training for Data Efficiency" (Guo & Kankanhalli); sections and
equations below are the paper's. Copy this file: it needs torch and the standard library, nothing else.

    scan = Scan(len(dataset), prune=0.3)
    sampler = ScanSampler(scan, global_batch_size)
    loader = DataLoader(WithIds(dataset), batch_sampler=sampler)  # pruned samples are never read
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for ids, (images, texts) in loader:                       # ids: positions in the dataset
            ...
            a, b = info_nce(image, text, scale), info_nce(text, image, scale)
            scan.observe(ids, a, b)                               # never changes the loss
            ((a + b) / 2).mean().backward()
        scan.end_epoch()

To keep your own loss, call `scan.watch(ids, image, text, scale)` instead. Epochs pass through three stages:

    warm-up      full data, until the epoch loss is stable                                     Sect. 3.3.1
    preparation  full data; each global batch marks its lowest losses (redundant) and its
                 highest (ill-matched) as pruning candidates D'                                Eq. 2
    mutation     t_cos epochs; each leaves out a new random share rho_cur of D'                Eq. 3
    ... then all data return, and the next preparation epoch starts a new round.               Sect. 3.3.2

Works the same in one process and under torch.distributed (gloo or NCCL): losses are gathered and all random
draws are seeded, so every rank holds the same state and takes the same decisions.
"""

import hashlib
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, IterableDataset

MAX_LOGITS = 2**24  # above this, info_nce computes the logits in row blocks

# ---------------------------------------------------------------- the method


def info_nce(query, key, scale):
    """Compute one direction of Eq. 1, before the mean: each query against the keys of the whole global batch.

    query, key: (b, d) unit vectors of this rank, row i of both from the same sample; b is equal on all ranks.
    scale: 1 / temperature, a number or a 0-d tensor.
    Returns (b,) float32. Its mean, backpropagated under DDP (which averages over ranks), gives exactly the
    gradient of one process that holds the global batch. Always float32, also under autocast: bfloat16 losses
    tie, and SCAN ranks them.
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(f"query and key must be (batch, dim), got {[*query.shape]} and {[*key.shape]}")
    rank, world = _ranks()
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()
        keys = _AllGather.apply(key) if world > 1 else key  # (B, d)
        positives = torch.arange(len(query), device=query.device) + rank * len(query)
        if len(query) * len(keys) > MAX_LOGITS:
            return _losses_in_blocks(query, keys, scale, positives)
        return F.cross_entropy(scale * query @ keys.T, positives, reduction="none")


def select_candidates(loss_a, loss_b, rho_red, rho_ill, generator=None):
    """Mark the redundant and the ill-matched samples of one global batch (Eq. 2).

    loss_a, loss_b: (B,) losses of both directions, of the same B samples. rho_red, rho_ill: shares of the
    batch. generator: a CPU torch.Generator for the top-up. Returns two boolean masks (B,), of int(rho B)
    samples each; the masks may overlap. Non-finite losses are never marked. No host-device sync.

    The paper intersects the choices of both directions, yet counts 2 rho B candidates: so keep what both
    directions chose, and top it up at random from what only one of them chose.
    """
    _check_ratios(rho_red, rho_ill)
    loss_a, loss_b = loss_a.detach().float(), loss_b.detach().float()
    size = len(loss_a)
    finite = loss_a.isfinite() & loss_b.isfinite()
    # Drawn on the CPU, so that the top-up is the same on every device and rank.
    random_priority = torch.rand(size, generator=generator, pin_memory=loss_a.is_cuda)
    random_priority = random_priority.to(loss_a.device, non_blocking=True)

    def lowest(values, n):
        """Mask of the n smallest finite values; ties go to the earlier sample (batches are shuffled)."""
        order = values.masked_fill(~finite, math.inf).argsort(stable=True)
        return torch.zeros_like(finite).scatter_(0, order[:n], True) & finite

    def lowest_in_both(a, b, n):
        chosen_a, chosen_b = lowest(a, n), lowest(b, n)
        both, either = chosen_a & chosen_b, chosen_a | chosen_b
        # First the samples that both directions chose, then the others that one chose, in random order.
        priority = random_priority.masked_fill(both, -1.0).masked_fill(~either, math.inf)
        first = priority.argsort(stable=True)[:n]
        return torch.zeros_like(finite).scatter_(0, first, True) & either

    redundant = lowest_in_both(loss_a, loss_b, int(rho_red * size))
    ill_matched = lowest_in_both(-loss_a, -loss_b, int(rho_ill * size))
    return redundant, ill_matched


def _check_ratios(rho_red, rho_ill):
    if not (rho_red >= 0 and rho_ill >= 0 and rho_red + rho_ill <= 1):
        got = f"got redundant {rho_red}, ill-matched {rho_ill}"
        raise ValueError(f"prune must be >= 0 and at most 0.5 (redundant + ill-matched at most 1), {got}")


def warmed_up(previous, current, threshold=0.3, rule="stable", eps=1e-8):
    """Decide whether the warm-up is over, from the mean losses of two successive epochs (Sect. 3.3.1).

    "stable": the relative drop is below the threshold, as the paper describes and its models ran.
    "printed": the drop is at least the threshold, the paper's formula taken literally.
    """
    drop = (previous - current) / (previous + eps)
    if rule == "stable":
        return drop < threshold
    if rule == "printed":
        return drop >= threshold
    raise ValueError(f'rule must be "stable" or "printed", got {rule!r}')


def prune_ratio(epochs_since_preparation, t_cos=3):
    """Eq. 3: the share of the candidates left out: 0, .25, .75, 1, 0, ... for t_cos = 3; its mean is 1/2."""
    if t_cos < 1:
        raise ValueError(f"t_cos must be at least 1, got {t_cos}")
    position = epochs_since_preparation % (t_cos + 1)  # 0 is a preparation epoch
    return (1 + math.cos((t_cos - position) * math.pi / t_cos)) / 2


class Scan:
    """Observe per-sample losses, and decide which samples each epoch trains on (Sect. 3.3, Fig. 2).

    num_samples: size N of the dataset; ids are positions 0 .. N-1.
    prune: share of each global batch marked redundant, and the same share marked ill-matched; also the
        average share of the data left out per round. rho_red and rho_ill set the two apart (Tables 7, 8):
        the average is then their mean.
    t_cos: mutation epochs per round. threshold, rule: see `warmed_up`. seed: of all random draws.
    keep: ids of a static coreset (Sect. 4.3): only these are trained on or become candidates.

    Attributes:
    stage: "warm-up", "preparation" or "mutation". epoch, step: the current epoch, and its steps observed.
    kept, kept_mask, num_kept: the samples of the current epoch. observed: how many of them were observed.
    loss: mean of the last finished epoch.
    redundant, ill_matched: masks (N,) of the newest round. candidates: their ids.
    counts, ill_counts: (N,) int16, rounds in which each sample was a candidate, and an ill-matched one.
    quantile: (N,) float16, the rank of each sample's loss in its batches (0 lowest, 1 highest), averaged over
        the epochs of full data; an epoch whose incomplete last batch held the sample leaves it unchanged.
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
        # Convert NumPy scalars: they would change the random draws, and torch.load would refuse the state.
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
            are_ids = keep.ndim == 1 and not keep.is_floating_point() and keep.dtype != torch.bool
            if not are_ids or not len(keep) or keep.min() < 0 or keep.max() >= num_samples:
                raise ValueError(f"keep must be a flat list of ids in 0..{num_samples - 1}")
            self._all.zero_()[keep.long()] = True

        self.stage = "warm-up"
        self.epoch, self.open = None, False  # open: between begin_epoch and end_epoch
        self._begun = False  # False until kept_mask has been drawn for this epoch (it is not saved)
        self.step, self.observed, self.batch = 0, 0, 0  # steps and samples so far, size of the newest batch
        self.first_preparation = None  # epoch; None during the warm-up
        self.full_epochs, self.rounds = 0, 0  # epochs of full data begun; rounds of candidates found
        self.loss = math.nan
        self.kept_mask, self.num_kept = self._all, int(self._all.count_nonzero())
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_count = torch.zeros((), dtype=torch.int64)
        # Redundant and ill-matched; an extra last column absorbs the writes of unmarked samples.
        self._marked = torch.zeros(2, num_samples + 1, dtype=torch.bool)
        self.counts = torch.zeros(num_samples, dtype=torch.int16)
        self.ill_counts = torch.zeros(num_samples, dtype=torch.int16)
        self.quantile = torch.full((num_samples,), 0.5, dtype=torch.float16)
        # Ids observed in this epoch. It is not saved: after a resume it starts empty.
        self._seen = torch.zeros(num_samples, dtype=torch.bool)
        self._observed_before_resume = 0

    redundant = property(lambda self: self._marked[0, :-1])
    ill_matched = property(lambda self: self._marked[1, :-1])

    @property
    def candidates(self):
        """Ids of D', redundant or ill-matched in the newest round: int64, sorted, on the CPU."""
        return (self.redundant | self.ill_matched).cpu().nonzero().flatten()

    @property
    def kept(self):
        """Ids of the current epoch: int64, sorted, the same on every rank."""
        return self.kept_mask.nonzero().flatten()

    def begin_epoch(self, epoch=None):
        """Begin an epoch (default: the next), and return `kept`. Epochs must follow one another.

        An epoch that is open already (a state loaded in mid-epoch) continues with what it has observed.
        """
        self._begin(epoch)
        return self.kept

    def _begin(self, epoch):
        if self.epoch is not None:
            expected = self.epoch if self.open else self.epoch + 1
            epoch = expected if epoch is None else epoch
            if epoch != expected:
                state = "has not ended: call end_epoch()" if self.open else "was the last"
                raise ValueError(f"epoch {self.epoch} {state}; the next is {expected}, not {epoch}")
        epoch = int(epoch or 0)
        if self.first_preparation is None:
            since, self.stage = 0, "warm-up"
        else:
            since = epoch - self.first_preparation
            self.stage = "preparation" if since % (self.t_cos + 1) == 0 else "mutation"
        if not self.open:
            self.epoch, self.open = epoch, True
            self.step, self.observed, self._observed_before_resume = 0, 0, 0
            self.loss_sum.zero_()
            self.loss_count.zero_()
            self._seen.zero_()
            if self.stage != "mutation":
                self.full_epochs += 1
            if self.stage == "preparation":  # all data have returned; find new candidates
                self._marked.zero_()
        self.kept_mask = self._draw(prune_ratio(since, self.t_cos)) if self.stage == "mutation" else self._all
        self.num_kept = int(self.kept_mask.count_nonzero())  # sum() would first copy the mask to int64
        self._begun = True

    def _draw(self, share):
        """Mask (N,) of a mutation epoch's samples: all but a random share of the candidates (Eq. 3)."""
        candidates = (self.redundant | self.ill_matched).cpu()
        shuffled = _shuffled(candidates, "drop", self.seed, self.epoch)
        kept = self._all.clone()
        kept[shuffled[: int(share * len(shuffled))]] = False
        return kept

    @torch.no_grad()
    def observe(self, ids, loss_a, loss_b):
        """Take in one step, on every rank: the ids of its samples and their losses in both directions.

        ids: (b,) int64 (best on the CPU, where checking their range needs no sync). loss_a, loss_b: (b,), not
        averaged. Gathers the global batch, so that all ranks rank the same losses. No host-device sync. With
        gradient accumulation: once per optimizer step, all ids and losses concatenated.
        """
        if not self.open:
            raise RuntimeError("observe() outside an epoch: call begin_epoch() first")
        ids = torch.as_tensor(ids)
        if loss_a.ndim != 1 or not ids.shape == loss_a.shape == loss_b.shape:
            shapes = [[*x.shape] for x in (ids, loss_a, loss_b)]
            raise ValueError(f"observe() needs ids and two losses, one per sample: (batch,), got {shapes}")
        if ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 positions in the dataset, got {ids.dtype}")
        if ids.device.type == "cpu" and len(ids):
            low, high = torch.stack(ids.aminmax()).tolist()
            if low < 0 or high >= self.num_samples:
                raise ValueError(f"ids must lie in 0..{self.num_samples - 1}, got {low}..{high}")
        losses = torch.stack([loss_a, loss_b], 1).float()
        if self.loss_sum.device != losses.device:  # the other tensors stay on the CPU
            for name in ("loss_sum", "loss_count", "quantile", "_marked", "_seen"):
                setattr(self, name, getattr(self, name).to(losses.device, non_blocking=True))
        ids = _gather(ids.to(losses.device, non_blocking=True))  # (B,)
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
            masks = select_candidates(loss_a, loss_b, self.rho_red, self.rho_ill, generator)
            for marked, mask in zip(self._marked, masks):
                marked.index_fill_(0, ids.where(mask, self.num_samples), True)
        self.step += 1
        self.observed += len(ids)
        self.batch = len(ids)

    @torch.no_grad()
    def watch(self, ids, query, key, scale):
        """Observe both losses by `info_nce(query, key, scale)`, for a loop that keeps its own loss."""
        self.observe(ids, info_nce(query, key, scale), info_nce(key, query, scale))

    def end_epoch(self):
        """Close the epoch: its mean loss may end the warm-up; the candidates of a preparation are counted."""
        if not self.open:
            raise RuntimeError("end_epoch() without begin_epoch()")
        self.open = False
        _warn_of_wrong_ids(self)
        previous, self.loss = self.loss, (self.loss_sum / self.loss_count).item()
        # The first epoch has no predecessor: its "previous" is nan, which compares false.
        if self.first_preparation is None and warmed_up(previous, self.loss, self.threshold, self.rule):
            self.first_preparation = self.epoch + 1
        if self.stage == "preparation":
            self._marked[:, :-1] &= self._all.to(self._marked.device)
            self.counts += (self.redundant | self.ill_matched).cpu()
            self.ill_counts += self.ill_matched.cpu()
            self.rounds += 1

    _settings = ("num_samples", "rho_red", "rho_ill", "t_cos", "threshold", "rule", "seed")
    _progress = ("stage", "epoch", "open", "step", "observed", "batch", "first_preparation", "full_epochs")
    _progress += ("rounds", "loss")
    _tensors = ("loss_sum", "loss_count", "redundant", "ill_matched", "counts", "ill_counts", "quantile")

    def state_dict(self):
        """Return everything, as plain values and CPU tensors, at any moment; the same on every rank."""
        state = {name: getattr(self, name) for name in self._settings + self._progress}
        return state | {name: getattr(self, name).to("cpu", copy=True) for name in self._tensors}

    def load_state_dict(self, state):
        """Continue from `state_dict()`. A state with other settings is refused, since its draws would differ.

        To change one on purpose, at the end of an epoch: `load_state_dict(state | {"t_cos": scan.t_cos})`.
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
        self._observed_before_resume = self.observed


# ---------------------------------------------------------------- what a loop needs


class WithIds(Dataset):
    """Any map-style dataset, with ids: items are (id, item), so that `for ids, (images, texts) in loader`."""

    def __init__(self, dataset):
        is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not is_map_style or isinstance(dataset, IterableDataset):
            raise TypeError("SCAN prunes by position: it needs a map-style dataset (__len__, __getitem__)")
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return i, self.dataset[i]


class ScanSampler:
    """Deal out the kept ids in global batches: DataLoader(dataset, batch_sampler=ScanSampler(scan, 800)).

    With the same seed, the global batch at step k holds the same ids for any number of ranks; each rank takes
    its slice. Every rank has equally many steps, an incomplete last batch is left out, every epoch is
    reshuffled. rank, world_size: default to torch.distributed's.
    """

    def __init__(self, scan, global_batch_size, rank=None, world_size=None):
        this_rank, all_ranks = _ranks()
        rank = this_rank if rank is None else rank
        world_size = all_ranks if world_size is None else world_size
        self.scan, self.global_batch_size = scan, global_batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = None, 0  # start: steps of the epoch that were done before a resume
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size} ranks")
        if global_batch_size < 2 or global_batch_size % world_size:
            needs = f"at least 2 (a contrastive loss needs negatives), and a multiple of {world_size} rank(s)"
            raise ValueError(f"the global batch must be {needs}, got {global_batch_size}")
        if scan.stage != "mutation" and scan.num_kept < global_batch_size:  # mutation may keep nothing
            raise ValueError(f"{scan.num_kept} samples do not fill one global batch of {global_batch_size}")

    def set_epoch(self, epoch=None):
        """Begin scan's epoch (default: the next). Call it before each epoch; idempotent."""
        begun = self.scan.open and self.scan._begun and self.epoch == self.scan.epoch
        if not begun or epoch not in (None, self.epoch):
            self.scan._begin(epoch)
            self.epoch, self.start = self.scan.epoch, self.scan.observed // self.global_batch_size

    def __len__(self):
        """Steps of the whole epoch. After a resume, iteration begins at step `start`."""
        return self.scan.num_kept // self.global_batch_size

    def __iter__(self):
        if self.epoch is None or not self.scan.open:
            raise RuntimeError("ScanSampler: call set_epoch(epoch) before each epoch")
        order = _shuffled(self.scan.kept_mask, "order", self.scan.seed, self.epoch)
        local = self.global_batch_size // self.world_size
        for step in range(self.start, len(self)):
            first = step * self.global_batch_size + self.rank * local
            yield order[first : first + local].tolist()


# ---------------------------------------------------------------- Sect. 4.3: coresets


def pruned_set(state, prune):
    """Mask (N,) of a run's int(prune N) most frequent candidates, ties broken at random."""
    return _most_counted(state["counts"], int(prune * state["num_samples"]), state["seed"])


def coreset(states, prune):
    """Return the ids to keep, int64, sorted: a static coreset of several runs' `state_dict()`s (Sect. 4.3).

    Leaves out what every run pruned (the intersection of their pruned sets), topped up by the summed counts
    to exactly int(prune N) samples.
    """
    sizes = {state["num_samples"] for state in states}
    if len(sizes) != 1:
        raise ValueError(f"a coreset needs one or more runs over the same data, got sizes {sorted(sizes)}")
    if not 0 <= prune <= 1:
        raise ValueError(f"prune must lie in 0..1, got {prune}")
    seeds = [state["seed"] for state in states]
    if len(set(seeds)) < len(seeds):
        warnings.warn(f"runs with one seed saw the same batches, and agree too much: {seeds}", stacklevel=2)
    n = int(prune * sizes.pop())
    pruned_by_all = torch.stack([pruned_set(state, prune) for state in states]).all(0)
    counts = torch.stack([state["counts"].long() for state in states]).sum(0)
    counts[pruned_by_all] += counts.max() + 1  # these go first
    return (~_most_counted(counts, n, seeds)).nonzero().flatten()


def _most_counted(counts, n, seed):
    # Break ties differently in every run, even with the same seed: equal tie-breaks would add to the overlap.
    run = hashlib.sha256(counts.numpy()).hexdigest()
    shuffled = torch.randperm(len(counts), generator=_generator("ties", seed, run))
    first = shuffled[counts[shuffled].argsort(descending=True, stable=True)[:n]]
    return torch.zeros(len(counts), dtype=torch.bool).scatter_(0, first, True)


# ---------------------------------------------------------------- foreign loops, ranks, large batches, draws


def _warn_of_wrong_ids(scan):
    """Warn if the samples observed in an epoch are not those that it kept, and name the likely cause.

    Up to 1 % of the data, or less than one id per batch, may be wrong: datasets replace unreadable samples.
    """
    counted = scan.observed - scan._observed_before_resume
    distinct = int(scan._seen.count_nonzero())
    distinct_kept = int((scan._seen & scan.kept_mask.to(scan._seen.device)).count_nonzero())
    repeated, left_out = counted - distinct, distinct - distinct_kept
    wrong = counted - distinct_kept
    if wrong > 0.01 * scan.num_samples and wrong * scan.batch >= counted:
        if repeated > left_out:
            cause = f", of which {repeated:,} repeat an id: observe each sample once, by its position in the "
            cause += "whole dataset (WithIds around a ConcatDataset), with one Scan seed on all ranks"
        else:
            cause = f", of which {left_out:,} were left out of this epoch: iterate over the loader after each"
            cause += " set_epoch(), and observe positions in the whole dataset (WithIds around a Subset)"
    elif abs(scan.num_kept - scan.observed) >= max(scan.batch, 1):
        cause = ": does observe() see every step, and does the loader use ScanSampler's batches unchanged?"
    else:
        return
    counts = f"epoch {scan.epoch} kept {scan.num_kept:,} samples, and observed {scan.observed:,}"
    warnings.warn(counts + cause, stacklevel=3)


def _ranks():
    """Return (rank, world size); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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
    _, world = _ranks()
    if world == 1:
        return x
    parts = [x.new_empty(x.shape) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _losses_in_blocks(query, keys, scale, positives):
    """Memory-efficient Eq. 1: logits in row blocks, recomputed in the backward pass."""

    def block(query, positives):
        return F.cross_entropy(scale * query @ keys.T, positives, reduction="none")

    rows = max(1, MAX_LOGITS // len(keys))
    options = dict(use_reentrant=False, preserve_rng_state=False)  # saving the random state syncs
    blocks = zip(query.split(rows), positives.split(rows))
    return torch.cat([checkpoint(block, q, p, **options) for q, p in blocks])


def _generator(*key):
    """A CPU generator for one purpose: (salt, seed, epoch, ...), so that no draw depends on another."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _shuffled(mask, *key):
    """Return the ids set in a mask (N,), in random order; int32 where it suffices, to save memory."""
    dtype = torch.int32 if len(mask) < 2**31 else torch.int64
    ids = mask.nonzero().flatten().to(dtype)
    return ids.index_select(0, torch.randperm(len(ids), dtype=dtype, generator=_generator(*key)))
