"""SCAN with one thing changed, behind its interface: train.py's loop runs each of these unchanged.

    python experiments/variants.py rank64 --arch vit_tiny --seed 0 --out runs/rank64

compare.py does this for all methods and seeds. The flags are train.py's. One process.

    bent      the released code's learning rate: counts the steps of short epochs against a total of full ones
    rank64, rank256, ...    ranks losses among that many samples instead of in the global batch
    quantile  selects candidates by their mean quantile over all epochs of full data, not by their newest loss
    lottery   marks random samples instead of the redundant: is a low loss better than chance?
    illfirst  a mutation epoch leaves out as many samples, but the ill-matched before the redundant
    chance    marks as ill-matched only losses above ln B, the chance level; marks more redundant ones instead
    mirrored  Eq. 3 backwards: all candidates are left out right after they were found, then they grow back
    late      no preparation while the epoch loss is above ln(B) / 2: a model that knows little marks nothing
"""

import functools
import math
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import scan
import train
from scan import Scan, prune_ratio, select_candidates


class Bent(Scan):
    """Replaces `learning_rate`: an epoch number e of n steps counts from step e n."""

    def __init__(self, *settings, **others):
        super().__init__(*settings, **others)
        straight = train.learning_rate
        train.learning_rate = lambda now, args: straight(now * self.num_kept / self.num_samples, args)


class Ranked(Scan):
    """Ranks losses among `pool` samples: parts of a global batch, or several global batches.

    After a resume, batches that waited for a full pool are trained on a second time.
    """

    def __init__(self, *settings, pool, **others):
        super().__init__(*settings, **others)
        self.pool, self.waiting = pool, []

    def observe(self, ids, loss_a, loss_b):
        self.waiting.append((ids, loss_a.detach(), loss_b.detach()))
        ids, loss_a, loss_b = (torch.cat(parts) for parts in zip(*self.waiting))
        whole = len(ids) // self.pool * self.pool
        self.waiting = [(ids[whole:], loss_a[whole:], loss_b[whole:])]
        for start in range(0, whole, self.pool):
            part = slice(start, start + self.pool)
            super().observe(ids[part], loss_a[part], loss_b[part])

    def end_epoch(self):
        for part in self.waiting:
            if len(part[0]):
                super().observe(*part)
        self.waiting = []
        super().end_epoch()


class Quantile(Scan):
    """Marks the lowest and the highest of all samples, by their mean quantile so far."""

    def end_epoch(self):
        if self.stage == "preparation":
            order = self.quantile.float().cpu().argsort(stable=True)
            fewest, most = int(self.rho_red * self.num_samples), int(self.rho_ill * self.num_samples)
            self._marked.zero_()
            self._marked[0, order[:fewest]] = True
            self._marked[1, order[self.num_samples - most :]] = True
        super().end_epoch()


class IllFirst(Scan):
    """Leaves out as many ill-matched candidates as Eq. 3 allows, then redundant ones."""

    def _draw(self, share):
        kept, (redundant, ill_matched) = self._all.clone(), self._marked[:, :-1].cpu()
        drop, key = int(share * int((redundant | ill_matched).sum())), ("drop", self.seed, self.epoch)
        for mask, *salt in ((ill_matched, "first"), (redundant & ~ill_matched,)):
            ids = mask.nonzero().flatten()
            ids = ids[torch.randperm(len(ids), generator=scan._generator(*key, *salt))[:drop]]
            kept[ids] = False
            drop -= len(ids)
        return kept


class Mirrored(Scan):
    """Leaves out 1, .75, .25 of the candidates, not .25, .75, 1: in a whole round as many samples."""

    def _draw(self, share):
        return super()._draw(prune_ratio(self.first_preparation - self.epoch, self.t_cos))


class Late(Scan):
    """Stays in the warm-up until the epoch loss is at most half the chance level ln B, too."""

    def end_epoch(self):
        warming_up = self.first_preparation is None
        super().end_epoch()
        if warming_up and self.loss > math.log(self.batch) / 2:
            self.first_preparation = None


class Select(Scan):
    """Another `select_candidates`."""

    def __init__(self, *settings, select, **others):
        super().__init__(*settings, **others)
        scan.select_candidates = select


def above_chance(loss_a, loss_b, rho_red, rho_ill, generator=None):
    """Mark as many candidates as SCAN; the data decide how many of them are ill-matched."""
    size = len(loss_a)
    ill = min(int(rho_ill * size), int(((loss_a + loss_b) / 2 > math.log(size)).sum()))
    red = int(rho_red * size) + int(rho_ill * size) - ill
    return select_candidates(loss_a, loss_b, (red + 1e-3) / size, (ill + 1e-3) / size, generator)


def at_random(loss_a, loss_b, rho_red, rho_ill, generator=None):
    """Mark SCAN's ill-matched samples, and random others instead of the redundant."""
    _, ill = select_candidates(loss_a, loss_b, 0.0, rho_ill, generator)
    lottery = torch.rand(len(ill), generator=generator).masked_fill(ill, math.inf)
    drawn = lottery.argsort()[: int(rho_red * len(ill))]
    return torch.zeros_like(ill).scatter_(0, drawn, True), ill


def make(name):
    """Return the class or factory of this name, or None."""
    pool = re.fullmatch(r"rank([1-9]\d*)", name)
    if pool:
        return functools.partial(Ranked, pool=int(pool[1]))
    selects = {"chance": above_chance, "lottery": at_random}
    if name in selects:
        return functools.partial(Select, select=selects[name])
    plain = {"bent": Bent, "quantile": Quantile, "illfirst": IllFirst, "mirrored": Mirrored, "late": Late}
    return plain.get(name)


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if make(name) is None:
        sys.exit(f"variants.py: the first argument is none of its variants: {name!r}")
    train.main(sys.argv[2:], make_scan=make(name))
