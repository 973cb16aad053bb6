"""Tests of SCAN: `pytest -q` (all), `pytest -q -m "not slow"` (those that start no processes)."""

import copy
import gzip
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, ImageOps, features
from torch.utils._pytree import tree_flatten
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

import clip_model
import data
import eval as evaluation
import moco
import scan as scan_module
import train
from scan import Scan, ScanSampler, WithIds, coreset, info_nce, prune_ratio, select_candidates, warmed_up

HERE = Path(__file__).parent
FLOAT32 = torch.autocast("cpu", enabled=False)
META = torch.device("meta")
slow = pytest.mark.slow
torch.set_num_threads(1)  # models that take milliseconds: more threads would only wait for each other


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observe_epoch(scan, epoch, losses, batch=20):
    """One epoch in batches of the kept ids, each sample with the loss given for it; ends the epoch."""
    kept = scan.begin_epoch(epoch)
    for ids in kept.split(batch):
        scan.observe(ids, losses[ids], losses[ids])
    stage = scan.stage
    scan.end_epoch()
    return kept, stage


def some_losses(n, seed=0):
    return torch.rand(n, generator=generator(seed)) + 1


# ---------------------------------------------------------------- scan.py: the method


def naive_selection(a, b, rho, highest):
    """-> (ids both directions chose, ids at least one chose, n), by sorting lists."""
    n = int(rho * len(a))
    finite = [i for i in range(len(a)) if math.isfinite(a[i]) and math.isfinite(b[i])]
    sign = -1 if highest else 1
    chosen = [set(sorted(finite, key=lambda i: sign * x[i])[:n]) for x in (a, b)]
    return chosen[0] & chosen[1], chosen[0] | chosen[1], n


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 257])
@pytest.mark.parametrize("ratios", [(0, 0), (0.05, 0.3), (0.3, 0), (0.5, 0.5)])
@pytest.mark.parametrize("kind", ["random", "ties", "nan"])
def test_selection_equals_a_naive_reference(size, ratios, kind):
    """The released code's sorted[-0:] selects everything, and its modes for one kind run as both."""
    a, b = torch.rand(2, size, generator=generator(size))
    if kind == "ties":
        a, b = (a * 4).floor(), (b * 4).floor()
    if kind == "nan":
        a[::3], b[1::4] = math.nan, math.inf
    masks = select_candidates(a, b, *ratios, generator())
    for mask, rho, highest in zip(masks, ratios, (False, True)):
        both, either, n = naive_selection(a.tolist(), b.tolist(), rho, highest)
        chosen = set(mask.nonzero().flatten().tolist())
        assert both <= chosen <= either
        assert len(chosen) == min(n, len(either))


def test_selection_tops_up_at_random_and_reproducibly():
    a, b = torch.arange(100.0), torch.arange(100.0).flip(0)  # the directions agree on nothing
    first, again, other = (select_candidates(a, b, 0.2, 0, generator(s))[0] for s in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert first.sum() == other.sum() == 20


@pytest.mark.parametrize("t_cos, trace", [(3, [0, 0.25, 0.75, 1]), (2, [0, 0.5, 1]), (1, [0, 1])])
def test_prune_ratio_is_eq_3(t_cos, trace):
    values = [prune_ratio(e, t_cos) for e in range(2 * len(trace))]
    assert values == pytest.approx(trace + trace) and np.mean(values) == pytest.approx(0.5)


def test_warm_up_rules():
    assert warmed_up(4.0, 3.9) and not warmed_up(4.0, 2.0)
    assert not warmed_up(4.0, 3.9, rule="printed") and warmed_up(4.0, 2.0, rule="printed")
    assert not warmed_up(math.nan, 4.0) and not warmed_up(math.nan, 4.0, rule="printed")
    with pytest.raises(ValueError, match="rule"):
        warmed_up(4.0, 3.9, rule="other")


def test_a_run_goes_through_its_stages_and_drops_what_it_should():
    scan, losses = Scan(200, prune=0.3, seed=5), some_losses(200)
    stages, kept = [], []
    for epoch in range(10):
        if epoch == 6:  # other candidates in the second round
            losses = losses[torch.randperm(200, generator=generator())]
        ids, stage = observe_epoch(scan, epoch, losses)
        stages.append(stage)
        kept.append(ids)
        assert ids.dtype == torch.int64 and ids.equal(ids.unique()) and ids.equal(scan.kept)
        if stage == "mutation":
            assert set(range(200)) - set(ids.tolist()) <= set(scan.candidates.tolist())
    assert stages == ["warm-up"] * 2 + (["preparation"] + ["mutation"] * 3) * 2
    assert len(scan.candidates) == 120  # 0, 30, 90, 120 of them left out
    assert [len(ids) for ids in kept] == [200, 200] + [200, 170, 110, 80] * 2
    assert scan.counts.max() == 2 and scan.counts.sum() == 240 and scan.rounds == 2
    highest = losses.argsort().argsort() >= 140
    assert (
        scan.ill_counts.sum() == 120 and scan.ill_matched.sum() == 60 and scan.ill_matched[highest].sum() > 40
    )


def test_warm_up_lasts_while_the_loss_falls_fast():
    scan = Scan(40)
    stages = [observe_epoch(scan, e, torch.full((40,), 8.0 * 0.5 ** min(e, 3)))[1] for e in range(6)]
    assert stages == ["warm-up"] * 5 + ["preparation"]


def test_no_loss_that_is_not_finite_counts_or_becomes_a_candidate():
    scan = Scan(20, prune=0.3)
    losses = torch.arange(20.0)
    losses[[3, 19]] = torch.tensor([math.nan, math.inf])
    for epoch in range(3):
        observe_epoch(scan, epoch, losses)
    assert scan.loss == pytest.approx(losses[losses.isfinite()].mean().item())
    assert not {3, 19} & set(scan.candidates.tolist()) and len(scan.candidates) == 12


def test_quantile_is_the_mean_place_in_the_batches_of_full_epochs():
    scan, places = Scan(40), torch.zeros(40, dtype=torch.double)
    for epoch in range(7):  # full data in epochs 0, 1, 2 and 6
        losses = some_losses(40, epoch)
        kept = scan.begin_epoch(epoch)
        for ids in kept.split(20):
            scan.observe(ids, losses[ids], 2 * losses[ids])
            if len(kept) == 40:
                for i in ids:
                    places[i] += ((losses[ids] < losses[i]).sum() + 0.5) / 20 / 4
        scan.end_epoch()
    torch.testing.assert_close(scan.quantile.double(), places, rtol=0, atol=2e-3)


def test_keep_is_all_that_is_ever_kept_or_counted():
    keep = torch.arange(0, 200, 2)
    scan, losses = Scan(200, keep=keep), some_losses(200)
    for epoch in range(4):
        kept = scan.begin_epoch(epoch)
        assert set(kept.tolist()) <= set(keep.tolist()) and (epoch == 3 or len(kept) == 100)
        replaced = kept.clone()
        replaced[0] += 1  # a sample that cannot be read, and the one in its place
        for ids in replaced.split(20):
            scan.observe(ids, losses[ids], losses[ids])
        scan.end_epoch()
    assert len(kept) < 100 and not scan.counts[1::2].any() and scan.counts.sum() == len(scan.candidates)
    for wrong in ([], [[1]], [200], [-1], [0.5], [True, False]):
        with pytest.raises(ValueError, match="keep"):
            Scan(200, keep=wrong)


@pytest.mark.filterwarnings("error")
def test_state_goes_on_in_mid_epoch_exactly():
    losses = some_losses(200)
    one, other = Scan(200), Scan(200)
    for epoch in range(9):
        kept = one.begin_epoch(epoch)
        assert kept.equal(other.begin_epoch())  # the next
        for step, ids in enumerate(kept.split(20)):
            if step == 2:  # a new process, in every epoch and stage
                buffer = io.BytesIO()
                torch.save(other.state_dict(), buffer)
                buffer.seek(0)
                # NumPy's numbers give the same draws and a state that weights_only loads
                other = Scan(np.int64(200), np.float64(0.3), t_cos=np.int8(3), seed=np.int64(0))
                other.load_state_dict(torch.load(buffer, weights_only=True))
                assert kept.equal(other.begin_epoch())  # the one that is open
            for scan in (one, other):
                scan.observe(ids, losses[ids], losses[ids].flip(0))
        one.end_epoch()
        other.end_epoch()
        mine, theirs = one.state_dict(), other.state_dict()
        assert all(v.equal(theirs[k]) if torch.is_tensor(v) else v == theirs[k] for k, v in mine.items())


def test_a_state_of_other_settings_is_refused():
    settings = dict(num_samples=20, rho_red=0.2, rho_ill=0.3, t_cos=3, threshold=0.3, rule="stable", seed=0)
    others = dict(num_samples=21, rho_red=0.1, rho_ill=0.1, t_cos=2, threshold=0.4, rule="printed", seed=1)
    state = Scan(**settings).state_dict()
    Scan(**settings).load_state_dict(state)
    for name, value in others.items():
        with pytest.raises(ValueError, match=re.escape(f"{name} {settings[name]} (here {value})")):
            Scan(**settings | {name: value}).load_state_dict(state)
    Scan(**settings | {"t_cos": 2}).load_state_dict(state | {"t_cos": 2})  # on purpose


def test_wrong_use_of_scan_is_refused_clearly():
    wrong = [dict(prune=-0.1), dict(prune=math.nan), dict(t_cos=0), dict(rule="x"), dict(num_samples=0)]
    for settings in wrong:
        with pytest.raises(ValueError, match="must be"):
            Scan(**{"num_samples": 10} | settings)
    for settings in (dict(prune=0.6), dict(rho_red=0.6, rho_ill=0.5)):
        with pytest.raises(ValueError, match=r"prune must .* at most 0.5 .* at most 1\), got redundant 0.6"):
            Scan(10, **settings)
    scan = Scan(10)
    ids, losses = torch.arange(4), torch.rand(4)
    for wrong in (lambda: scan.observe(ids, losses, losses), scan.end_epoch):
        with pytest.raises(RuntimeError, match="begin_epoch"):
            wrong()
    scan.begin_epoch(0)
    for wrong in (losses.mean(), losses[:3], losses[None]):
        with pytest.raises(ValueError, match="one per sample"):
            scan.observe(ids, wrong, wrong)
    for wrong in (ids + 7, ids - 1):
        with pytest.raises(ValueError, match="0..9"):
            scan.observe(wrong, losses, losses)
    for wrong in (ids.float(), ids.numpy().astype(np.int32)):
        with pytest.raises(ValueError, match="int64"):
            scan.observe(wrong, losses, losses)
    with pytest.raises(ValueError, match="has not ended"):
        scan.begin_epoch(1)
    for good in (ids, [4, 5, 6, 7], np.arange(6, 10)):
        scan.observe(good, losses, losses)
    assert (scan.quantile != 0.5).all()
    scan.end_epoch()
    with pytest.raises(ValueError, match="the next is 1"):
        scan.begin_epoch(2)


def test_ids_are_exact_beyond_float32():
    """InfoBatch gathers ids in the loss's dtype: inexact above 2^24."""
    scan = Scan(2**24 + 8, rho_red=0.5, rho_ill=0)
    scan.first_preparation = 0
    scan._begin(0)
    scan.observe([2**24 + 1, 2**24 + 3], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert scan.candidates.tolist() == [2**24 + 1]


# ---------------------------------------------------------------- scan.py: what a loop needs


@pytest.mark.parametrize("n", [64, 100, 1000])
def test_sampler_deals_the_same_global_batches_to_any_number_of_ranks(n):
    keep = torch.randperm(2000, generator=generator())[:n]
    dealt = {}
    for world in (1, 2, 4):
        ranks = [ScanSampler(Scan(2000, keep=keep, seed=3), 32, r, world) for r in range(world)]
        assert {len(sampler) for sampler in ranks} == {n // 32}  # before the first epoch too
        for sampler in ranks:
            sampler.set_epoch(4)
        dealt[world] = [sum(parts, []) for parts in zip(*ranks)]
    assert dealt[1] == dealt[2] == dealt[4]
    flat = sum(dealt[1], [])
    assert len(flat) == len(set(flat)) == n // 32 * 32 and set(flat) <= set(keep.tolist())


def test_orders_are_uniform():
    """The four kept of six ids take all their 24 orders, equally often."""
    mask = torch.tensor([True, False, True, True, False, True])
    found = Counter(tuple(scan_module._shuffled(mask, "order", seed).tolist()) for seed in range(2400))
    assert set(found) == set(itertools.permutations([0, 2, 3, 5]))
    assert sum((n - 100) ** 2 / 100 for n in found.values()) < 55  # chi-square, 23 degrees: p = 2e-4


def test_sampler_reshuffles_every_epoch_and_demands_set_epoch():
    """The released code's rebuilt samplers repeat one permutation."""
    scan = Scan(64)
    sampler = ScanSampler(scan, 8, 0, 1)
    with pytest.raises(RuntimeError, match="set_epoch"):
        list(sampler)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        sampler.set_epoch(epoch)  # frameworks call it too
        assert list(sampler) == orders[-1] and len(sampler) == 8  # once more
        for ids in orders[-1]:
            scan.observe(torch.tensor(ids), torch.ones(8), torch.ones(8))
            sampler.set_epoch(epoch)  # in mid-epoch too
        assert list(sampler) == orders[-1] and len(sampler) == 8
        scan.end_epoch()
        with pytest.raises(RuntimeError, match="set_epoch"):
            list(sampler)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("micro", [1, 4])
def test_a_resumed_epoch_starts_after_the_steps_that_were_observed(micro):
    """micro: batches of the sampler per call of observe."""
    scan = Scan(64)
    sampler = ScanSampler(scan, 8)
    sampler.set_epoch(0)
    whole = list(sampler)
    scan.observe(sum(whole[:micro], []), *torch.ones(2, 8 * micro))
    resumed = Scan(64)
    resumed.load_state_dict(scan.state_dict())
    again = ScanSampler(resumed, 8)
    again.set_epoch()  # the one that is open
    assert list(again) == whole[micro:] and again.start == micro
    assert len(again) == 8  # of the whole epoch, as Lightning expects


def test_a_state_may_be_loaded_after_the_sampler_began():
    """In a mutation epoch: what is kept, and where to go on, belong to the state."""
    one, losses = Scan(96), some_losses(96)
    for epoch in range(4):
        observe_epoch(one, epoch, losses, batch=8)
    sampler = ScanSampler(one, 8)
    sampler.set_epoch(4)
    dealt = list(sampler)
    for ids in dealt[:3]:
        one.observe(ids, losses[ids], losses[ids])
    assert one.stage == "mutation" and one.num_kept < 96
    for begun in (False, True):
        other = Scan(96)
        later = ScanSampler(other, 8)
        later.set_epoch(0)
        if begun:  # in the same epoch
            other.load_state_dict(one.state_dict() | {"observed": 0, "step": 0})
            later.set_epoch(4)
        other.load_state_dict(one.state_dict())
        later.set_epoch(4)
        assert other.kept.equal(one.kept) and list(later) == dealt[3:]


@pytest.mark.parametrize("batch, world", [(1, 1), (0, 1), (2, 4), (6, 4), (12, 1)])
def test_sampler_refuses_batches_that_cannot_be(batch, world):
    with pytest.raises(ValueError, match="global batch"):
        ScanSampler(Scan(10), batch, 0, world)
    with pytest.raises(ValueError, match="rank 2"):
        ScanSampler(Scan(10), 4, 2, 2)


def test_with_ids_gives_the_position_beside_the_item():
    items = [(torch.full((2,), float(i)), i % 3) for i in range(10)]
    loader = DataLoader(WithIds(items), batch_size=5)
    ids, (images, labels) = next(iter(loader))
    assert ids.tolist() == [0, 1, 2, 3, 4] and images.shape == (5, 2) and labels.tolist() == [0, 1, 2, 0, 1]
    for no_positions in (iter(items), torch.utils.data.ChainDataset([])):  # a stream that has a length
        with pytest.raises(TypeError, match="map-style"):
            WithIds(no_positions)


# ---------------------------------------------------------------- scan.py: foreign loops


def toy_loop(epochs=4, prune=0.3, size=64, batch=16, make_loader=None, wrap=None, ids_of=lambda ids: ids):
    """A loop whose losses are the positions -> ids that each epoch kept, and ids that it observed.

    make_loader(dataset, sampler): the loader. wrap(dataset): its dataset. ids_of(ids): the ids to observe.
    """
    dataset = WithIds(TensorDataset(torch.arange(size)))
    dataset = wrap(dataset) if wrap else dataset
    scan, kept, observed = Scan(size, prune), [], []
    sampler = ScanSampler(scan, batch)
    loader = make_loader(dataset, sampler) if make_loader else DataLoader(dataset, batch_sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        kept.append(scan.kept.tolist())
        observed.append([])
        for ids, (positions,) in loader:
            ids = ids_of(ids)
            if ids is not None:
                observed[-1] += ids.tolist()
                scan.observe(ids, positions.float(), positions.float())
        scan.end_epoch()
    return kept, observed


@pytest.mark.parametrize(
    "options, sizes",
    [
        (dict(epochs=7), [64, 64, 64, 48, 32, 32, 64]),
        (dict(epochs=7, prune=0.5), [64, 64, 64, 48, 16, 0, 64]),  # an epoch may have no steps
        (dict(epochs=3, size=79), [64] * 3),  # 15 samples fill no batch
        # samples that cannot be read are replaced by neighbours: fewer than one per batch; 1 %
        (dict(epochs=3, size=200, batch=20, ids_of=lambda ids: ids.where(ids > 8, 9)), [200] * 3),
        (dict(epochs=4, size=1000, batch=250, ids_of=lambda ids: ids.where(ids > 9, 10)), [1000] * 3 + [750]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_right_loop_warns_of_nothing(options, sizes):
    assert [len(ids) for ids in toy_loop(**options)[1]] == sizes


@pytest.mark.parametrize(
    "mistake, epoch, cause",
    [
        (dict(ids_of=lambda ids: ids % 10), 0, "repeat"),  # labels
        (dict(ids_of=lambda ids: torch.arange(len(ids))), 0, "repeat"),
        (dict(ids_of=lambda ids: ids[[0, 0, *range(2, 16)]]), 0, "repeat"),
        (dict(size=1000, batch=250, ids_of=lambda ids: ids.where(ids > 10, 11)), 0, "repeat"),  # 1.1 %
        (dict(wrap=lambda d: ConcatDataset(2 * [Subset(d, range(32))])), 0, "repeat"),
        (dict(wrap=lambda d: Subset(d, [*range(20, 64), *range(20)])), 3, "left out"),
        (dict(make_loader=lambda d, s: list(DataLoader(d, 16))), 3, "left out"),  # always the same
        (dict(make_loader=lambda d, s: DataLoader(d, 8, shuffle=True)), 3, "left out"),
        (dict(ids_of=lambda ids: None), 0, "every step"),
        (dict(make_loader=lambda d, s: list(DataLoader(d, 16))[1:]), 0, "every step"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_foreign_loops_mistake_is_announced_with_its_cause(mistake, epoch, cause):
    toy_loop(epoch, **mistake)  # no warning before it matters
    with pytest.warns(UserWarning) as said:
        kept, observed = toy_loop(epoch + 1, **mistake)
    kept, observed = kept[-1], observed[-1]
    repeated, left_out = len(observed) - len(set(observed)), len(set(observed) - set(kept))
    text = {
        "repeat": f", of which {repeated} repeat an id",
        "left out": f", of which {left_out} were left out",
    }
    text = (
        f"epoch {epoch} kept {len(kept):,} samples, and observed {len(observed):,}{text.get(cause, ': does')}"
    )
    assert len(said) == 1 and str(said[0].message).startswith(text) and cause in str(said[0].message)


def test_another_seed_on_each_rank_is_announced():
    """Each rank deals its part of an order of its own. One process plays both."""
    scan, other = Scan(320), Scan(320, seed=1)
    samplers = ScanSampler(scan, 32, 0, 2), ScanSampler(other, 32, 1, 2)
    for sampler in samplers:
        sampler.set_epoch(0)
    gathered = [first + second for first, second in zip(*samplers)]
    for ids in gathered:
        scan.observe(ids, torch.ones(32), torch.ones(32))
    repeated = 320 - len(set(sum(gathered, [])))
    assert 50 < repeated < 110  # a quarter
    with pytest.warns(UserWarning, match=f"{repeated} repeat an id.*one Scan seed on all ranks"):
        scan.end_epoch()


def test_ids_are_checked_from_a_resume_in_mid_epoch_on():
    scan = Scan(64)
    sampler = ScanSampler(scan, 16)
    sampler.set_epoch(0)
    first, second, third, _ = sampler
    scan.observe(first, torch.ones(16), torch.ones(16))
    state = scan.state_dict()
    scan.observe(second + third, torch.ones(32), torch.ones(32))  # forgotten by the load
    scan.load_state_dict(state)
    for ids in (second, second, second):
        scan.observe(ids, torch.ones(16), torch.ones(16))
    with pytest.warns(UserWarning, match="observed 64, of which 32 repeat an id"):
        scan.end_epoch()
    scan.begin_epoch()
    for ids in (second, second, second, second):
        scan.observe(ids, torch.ones(16), torch.ones(16))
    with pytest.warns(UserWarning, match="observed 64, of which 48 repeat an id"):
        scan.end_epoch()


# ---------------------------------------------------------------- scan.py: Eq. 1, and several ranks


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(work, world, folder):
    """Run work(rank, world) on `world` gloo processes -> what each returned."""
    os.makedirs(folder)
    mp.start_processes(_rank, (work, world, free_port(), str(folder)), world, start_method="spawn")
    return [torch.load(os.path.join(folder, f"{r}.pt"), weights_only=True) for r in range(world)]


def _rank(rank, work, world, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(work(rank, world), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def unit_vectors(size=24, dim=8):
    torch.manual_seed(3)
    query, key = torch.randn(2, size, dim, dtype=torch.float64)
    weights = torch.rand(2, size, dtype=torch.float64)  # a gradient of its own for each loss
    return query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True), weights


def by_formula(query, key, weights, scale):
    """Both directions of Eq. 1 by the formula -> losses (2, B), gradients of their weighted mean."""
    query, key, scale = (x.clone().requires_grad_() for x in (query, key, torch.tensor(scale).double()))
    losses = []
    for q, k in ((query, key), (key, query)):
        e = (scale * (q[:, None] * k[None]).sum(-1)).exp()
        losses.append(-(e.diagonal() / e.sum(1)).log())
    losses = torch.stack(losses)
    (losses * weights).mean().backward()
    return losses.detach(), query.grad, key.grad, scale.grad


def our_losses(query, key, weights, scale):
    query, key = (x.float().requires_grad_() for x in (query, key))
    scale = torch.tensor(scale, requires_grad=True)
    losses = torch.stack([info_nce(query, key, scale), info_nce(key, query, scale)])
    (losses * weights.float()).mean().backward()
    return losses.detach(), query.grad, key.grad, scale.grad


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("logits", [2**24, 5 * 24, 1])  # all at once; blocks of five rows and a rest; of one
def test_info_nce_is_the_formula(monkeypatch, logits, scale):
    monkeypatch.setattr(scan_module, "MAX_LOGITS", logits)
    query, key, weights = unit_vectors()
    expected = by_formula(query, key, weights, scale)
    for mine, theirs in zip(our_losses(query, key, weights, scale), expected):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)
    query, key = query.float().requires_grad_(), key.float()
    with torch.autocast("cpu", torch.bfloat16):  # which would be wrong in the third digit
        losses = info_nce(query, key, scale)  # a number as scale
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected[0][0], rtol=2e-5, atol=2e-5)
    half = info_nce(query.bfloat16(), key.bfloat16(), scale)
    assert half.equal(info_nce(query.bfloat16().float(), key.bfloat16().float(), scale))
    with pytest.raises(ValueError, match="batch, dim"):
        info_nce(query[0], key[0], scale)


def test_large_batches_take_little_memory(monkeypatch):
    """Row blocks of at most MAX_LOGITS, and no logits in the graph."""
    saved, blocks, cross_entropy = [], [], F.cross_entropy

    def recorded(logits, *rest, **options):
        blocks.append(logits.numel())
        return cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(F, "cross_entropy", recorded)
    monkeypatch.setattr(scan_module, "MAX_LOGITS", 1000)
    query, key = torch.rand(2, 200, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        info_nce(query, key, 5.0)
    assert blocks == 40 * [1000] and max(saved) <= 200 * 4


def candidates_of(rank, world):
    """Marks, counts and epoch losses of a run whose losses are given, at a global batch of 16."""
    losses = torch.rand(128, 2, generator=generator()) + 1
    scan, kept = Scan(128, seed=2), []
    sampler = ScanSampler(scan, 16)
    for epoch in range(7):
        sampler.set_epoch(epoch)
        kept.append(scan.kept)
        for ids in sampler:
            scan.observe(torch.tensor(ids), *losses[ids].unbind(1))
        scan.end_epoch()
    return scan.state_dict() | {"kept": torch.cat(kept)}


def foreign_loss(watch, world, rank):
    """A loss over one rank's negatives alone, with `watch` or without -> its gradients, Scan's loss."""
    query, key, _ = unit_vectors()
    rows = slice(rank * 24 // world, (rank + 1) * 24 // world)
    query, key = query[rows].float().requires_grad_(), key[rows].float().requires_grad_()
    scale, scan = torch.tensor(10.0, requires_grad=True), Scan(24)
    scan.begin_epoch()
    if watch:
        with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):  # no graph
            scan.watch(torch.arange(24)[rows], query, key, scale)
        assert scan.observed == 24 and scan.loss_count == 24
    F.cross_entropy(scale * query @ key.T, torch.arange(len(query))).backward()
    return [query.grad, key.grad, scale.grad, scan.loss_sum]


def on_ranks(rank, world):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FutureWarning: torch 2.14 deprecates collectives
        scan_module.MAX_LOGITS = {2: 2**24, 3: 5 * 24}[world]
        query, key, weights = unit_vectors()
        part = slice(rank * 24 // world, (rank + 1) * 24 // world)
        losses, *grads = our_losses(query[part], key[part], weights[:, part], 14.3)
        dist.all_reduce(grads[2])  # as DDP does for a parameter
        state = candidates_of(rank, world) if world == 2 else {}
        *watched, loss_sum = foreign_loss(True, world, rank)
        *unwatched, _ = foreign_loss(False, world, rank)
        assert all(map(torch.equal, watched, unwatched))
    return {"eq1": [losses, *(grad / world for grad in grads)], "scan": state, "watched": loss_sum}


@slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world, tmp_path):
    ranks = run_ranks(on_ranks, world, tmp_path / "ranks")
    losses, query, key, scale = zip(*(r["eq1"] for r in ranks))
    mine = torch.cat(losses, 1), torch.cat(query), torch.cat(key), scale[0]
    for result, theirs in zip(mine, by_formula(*unit_vectors(), 14.3)):
        torch.testing.assert_close(result.double(), theirs, rtol=2e-5, atol=2e-5)
    alone = candidates_of(0, 1)
    for r in ranks:
        torch.testing.assert_close(r["watched"], foreign_loss(True, 1, 0)[-1])
        for name, found in r["scan"].items():
            assert found.equal(alone[name]) if torch.is_tensor(found) else found == alone[name]


def test_watch_leaves_a_foreign_loss_and_its_gradients_as_they_are():
    with_watch, without = foreign_loss(True, 1, 0), foreign_loss(False, 1, 0)
    assert all(map(torch.equal, with_watch[:-1], without[:-1]))
    both = by_formula(*unit_vectors(), 10.0)[0].mean(0)
    torch.testing.assert_close(with_watch[-1], both.sum(), rtol=1e-5, atol=0)


# ---------------------------------------------------------------- scan.py: coresets


def counted(counts, seed):
    return {"counts": torch.as_tensor(counts, dtype=torch.int16), "num_samples": len(counts), "seed": seed}


def test_coreset_is_the_intersection_topped_up_to_the_ratio():
    states = []
    for seed in (0, 1):
        counts = torch.zeros(100, dtype=torch.int16)
        counts[:20], counts[20 + 10 * seed : 30 + 10 * seed] = 3, 2
        states.append(counted(counts, seed))
    assert scan_module.pruned_set(states[0], 0.3).nonzero().flatten().tolist() == list(range(30))
    kept = coreset(states, 0.3)
    pruned = set(range(100)) - set(kept.tolist())
    assert len(kept) == 70 and set(range(20)) < pruned < set(range(40))
    with pytest.raises(ValueError, match="same data"):
        coreset([states[0], states[1] | {"num_samples": 99}], 0.3)
    with pytest.warns(UserWarning, match="one seed"):
        coreset([states[0], states[1] | {"seed": 0}], 0.3)


def test_coreset_leaves_out_what_all_runs_pruned_before_what_one_run_counted_most():
    counts = torch.ones(2, 10, dtype=torch.int16)
    counts[0, 3], counts[1, 5], counts[:, 7] = 9, 9, 2  # 7 is in both pruned sets, 3 and 5 in one each
    pruned = set(range(10)) - set(coreset([counted(c, seed) for seed, c in enumerate(counts)], 0.2).tolist())
    assert 7 in pruned and len(pruned) == 2


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_ties_in_counts_do_not_inflate_the_overlap(seeds):
    counts = torch.zeros(2, 2000)
    counts[0, 0] = counts[1, 1] = 1  # two runs, which may share their seed
    first, second = (scan_module.pruned_set(counted(c, seed), 0.3) for c, seed in zip(counts, seeds))
    assert (first & second).sum() / (first | second).sum() == pytest.approx(0.3 / 1.7, abs=0.04)


# ---------------------------------------------------------------- clip_model.py, moco.py


@pytest.mark.parametrize("arch, parameters, heads, key", [  # sizes: OpenAI's and open_clip's of these names
    ("vit_b32", 151_277_313, 8, "visual.transformer.resblocks.0.attn.in_proj_weight"),
    ("vit_s16", 62_257_537, 6, "visual.class_embedding"),
    ("rn50", 102_007_137, 8, "visual.layer1.0.downsample.0.weight"),
    ("swin_b", None, 10, "visual.head.weight"),
])  # fmt: skip
def test_clips_are_those_of_open_clip(arch, parameters, heads, key):
    with torch.device("meta"):
        model = clip_model.create(arch)
        image, text, _ = model(torch.zeros(2, 3, 224, 224), torch.zeros(2, 5, dtype=torch.int64))
    assert image.shape == text.shape == (2, clip_model.ARCHS[arch]["embed_dim"])
    assert parameters in (None, sum(p.numel() for p in model.parameters()))
    assert model.transformer.resblocks[0].attn.heads == heads
    assert {key, "token_embedding.weight", "text_projection", "logit_scale"} <= set(model.state_dict())
    assert not any("pixel" in name for name in model.state_dict())  # others would refuse what they don't know
    if arch == "swin_b":
        rates = [x.p for x in model.visual.modules() if type(x).__name__ == "StochasticDepth"]
        assert rates == pytest.approx([0.1 * k / 23 for k in range(24)])


def test_a_wrong_arch_family_or_size_is_no_model(monkeypatch):
    monkeypatch.setitem(clip_model.ARCHS, "new", dict(clip_model.ARCHS["swin_b"], family="convnext"))
    with pytest.raises(KeyError, match="convnext"):
        clip_model.create("new")
    for create, arch, size, message in (
        (clip_model.create, "gone", 64, "unknown arch"), (clip_model.create, "rn50", 65, "multiple of 32"),
        (moco.create, "gone", 64, "unknown arch"), (moco.create, "moco_vit_tiny", 33, "multiple of 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create(arch, size)


def test_initial_weights_are_open_clips_and_moco_v3s(monkeypatch):
    """CLIP: the image tower keeps torch's own start, the text tower has OpenAI's. MoCo: uniform, by fan."""
    sizes = dict(family="vit", embed_dim=512, vision=dict(width=768, layers=1, patch=32), text=(512, 2))
    monkeypatch.setitem(clip_model.ARCHS, "vit_b32", sizes)
    monkeypatch.setitem(moco.ARCHS, "moco_vit_tiny", dict(moco.ARCHS["moco_vit_s16"], layers=1, hidden=512))
    torch.manual_seed(0)
    base = moco.create("moco_vit_tiny", 32).base_encoder
    found = dict(clip_model.create("vit_b32", 64, 1000).named_parameters()) | dict(base.named_parameters())
    image, text = "visual.transformer.resblocks.0.", "transformer.resblocks.1."
    for name, std in {
        image + "attn.in_proj_weight": 0.0255, image + "mlp.c_proj.weight": 0.0104, "text_projection": 0.0442,
        image + "attn.out_proj.bias": 0, "visual.positional_embedding": 0.0361, "visual.proj": 0.0361,
        text + "attn.in_proj_weight": 0.0442, text + "attn.out_proj.weight": 0.0221, "cls_token": 1e-6,
        text + "mlp.c_fc.weight": 0.03125, text + "mlp.c_proj.weight": 0.0221, "positional_embedding": 0.01,
        "token_embedding.weight": 0.02,
        "blocks.0.attn.qkv.weight": (2 / 768) ** 0.5, "blocks.0.mlp.fc1.weight": (2 / (5 * 384)) ** 0.5,
        "patch_embed.proj.weight": (2 / (3 * 256 + 384)) ** 0.5, "patch_embed.proj.bias": 0,
    }.items():  # fmt: skip
        assert found[name].std().item() == pytest.approx(std, rel=0.06 if std > 1e-5 else 0.2), name
    waves = [10_000 ** -(k / 96) for k in range(96)]  # of row 1, column 0: patches are counted along rows
    parts = [f(at * w) for at in (1, 0) for f in (math.sin, math.cos) for w in waves]
    assert base.pos_embed.shape == (1, 5, 384) and not base.pos_embed[0, 0].any()
    assert base.pos_embed[0, 3].tolist() == pytest.approx(parts, abs=1e-6)


def test_tokens_of_hashed_words_and_of_a_small_bpe_vocabulary_and_their_padding(tmp_path):
    words, path = clip_model.HashedWords(), tmp_path / "vocab.gz"
    expected = [1 + zlib.crc32(word) % 49405 for word in (b"red", b"circle", b"!")]
    assert words("Red CIRCLE!").tolist() == [49406, *expected, 49407]
    assert len(words("日本語 ok")) == 2 + 4 and words("ＡＢ ﬁ").tolist() == words("ab fi").tolist()
    path.write_bytes(gzip.compress(b"version\nr e\nre d</w>\nc a\nca t</w>\n"))
    bpe = clip_model.BPE(path)
    start, end = 512 + 4, 512 + 5
    # bytes are numbered from "!" = 0; the same with </w> from 256; merges from 512
    assert bpe("Red  CAT").tolist() == [start, 513, 515, end]
    assert bpe("cat's").tolist() == [start, 515, 6, ord("s") - 33 + 256, end]
    assert bpe("“red”").tolist() == [start, 1 + 256, 513, 1 + 256, end] == bpe("&quot;red&quot;").tolist()
    assert bpe("12!!").tolist() == [start, 16 + 256, 17 + 256, 0, 256, end]  # single digits, runs of signs
    for tokens, last in ((words("cat " * 200), 49407), (bpe("cat " * 200), end)):
        assert len(tokens) == 77 and tokens[-1] == last
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="vocab"):
        clip_model.BPE(path)
    model = clip_model.create("vit_tiny", 16, 50)
    padded, text = (model.encode_text(torch.tensor([ids])) for ids in ([48, 49, 0], [48, 49]))
    torch.testing.assert_close(padded, text)


@pytest.mark.parametrize("create, arch", [(clip_model.create, "vit_tiny"), (moco.create, "moco_vit_tiny")])
def test_a_step_never_makes_the_host_wait_for_the_gpu(create, arch, monkeypatch):
    """The "meta" device takes the GPU's place: whatever needs a value that lies there raises."""
    blocking, to = [], torch.Tensor.to

    def noted(tensor, *args, **options):
        moved = to(tensor, *args, **options)
        if moved.device != tensor.device and not options.get("non_blocking"):
            blocking.append(tensor.shape)
        return moved

    def set_item(tensor, index, value, real=torch.Tensor.__setitem__):
        if torch.is_tensor(index) and index.dtype == torch.bool:
            blocking.append(index.shape)  # a mask: the host waits for the number of its places
        real(tensor, index, value)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: FLOAT32)  # has no such device
    monkeypatch.setattr(torch.Tensor, "to", noted)
    monkeypatch.setattr(torch.Tensor, "__setitem__", set_item)
    batch = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.tensor([[48, 5, 49]] * 8)
    if create == moco.create:
        crops = torch.zeros(8, 2, 3, 16, 16, dtype=torch.uint8)
        batch = crops, torch.stack([moco.draw_views() for _ in range(8)])
    scan, model = Scan(100), create(arch, 16).to(META)
    assert blocking  # the copies of the model's own: they are noticed
    blocking.clear()
    scan.first_preparation = 0
    scan.begin_epoch(0)
    a, b, loss = model.losses(*model(*model.inputs(batch, META)))
    scan.observe(torch.arange(8), a, b)
    loss.backward()
    assert scan.stage == "preparation" and loss.device == scan.redundant.device == META
    assert not blocking


def test_moco_has_the_published_heads_and_trains_what_it_should():
    with torch.device("meta"):
        paper = moco.create("moco_vit_s16")
        queries_and_keys = paper(*torch.zeros(2, 8, 3, 224, 224))
    heads = paper.base_encoder.head, paper.predictor
    shapes = [[tuple(x.shape) for x in head.parameters() if x.ndim == 2] for head in heads]
    assert shapes == [[(4096, 384), (4096, 4096), (256, 4096)], [(4096, 256), (256, 4096)]]
    assert len(paper.base_encoder.blocks) == paper.base_encoder.blocks[0].attn.heads == 12
    assert heads[1][-1].weight is None and heads[1][1].weight is not None  # the last is not affine
    assert [x.requires_grad for x in queries_and_keys] == [True, True, False, False]
    assert not any(p.requires_grad for p in paper.momentum_encoder.parameters())
    frozen = {n for n, p in paper.base_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_augmentation_equals_torchvision_sample_by_sample():
    images = (torch.rand(48, 3, 24, 24, generator=generator()) * 255).to(torch.uint8)
    images[:16, 0] = 7  # flat channels: hues at the corners
    torch.manual_seed(0)
    drawn = torch.stack([moco.draw_view(0.5, 0.5) for _ in images])
    pairs = images.unflatten(0, (24, 2)), drawn.unflatten(0, (24, 2))
    views = moco.create("moco_vit_tiny", 32).inputs(pairs, torch.device("cpu"))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    adjust = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for x, numbers, mine in zip(images / 255, drawn, torch.stack(views, 1).flatten(0, 1) * std + mean):
        for kind in list(itertools.permutations(range(4)))[int(numbers[moco.ORDER])]:
            x = adjust[kind](x, numbers[kind].item())
        x = V.rgb_to_grayscale(x, 3) if numbers[moco.GREY] else x
        x = V.gaussian_blur(x, [13, 13], [numbers[moco.SIGMA].item()] * 2) if numbers[moco.SIGMA] else x
        x = V.solarize(x, 128 / 255) if numbers[moco.SOLARIZE] else x
        x = V.horizontal_flip(x) if numbers[moco.FLIP] else x
        assert ((x - mine).abs() < 2e-3).double().mean() > 0.99  # but where solarizing tips at its threshold


def test_views_follow_the_stated_distributions_and_differ_per_sample():
    torch.manual_seed(0)
    drawn = torch.stack([moco.draw_views() for _ in range(1500)])
    for x, blur, solarize in ((drawn[:, 0], 1.0, 0.0), (drawn[:, 1], 0.1, 0.2)):
        jittered, sigma = x[x[:, moco.BRIGHTNESS] != 1], x[x[:, moco.SIGMA] > 0, moco.SIGMA]
        means = x[:, [moco.GREY, moco.FLIP, moco.SOLARIZE]].mean(0)
        shares = [len(jittered) / 1500, len(sigma) / 1500, *means]
        for found, p in zip(shares, (0.8, blur, 0.2, 0.5, solarize)):
            assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / 1500)
        for kind, centre, reach in zip(range(4), (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1)):
            assert (jittered[:, kind] - centre).abs().max() <= reach + 1e-6
            assert jittered[:, kind].std() == pytest.approx(reach / math.sqrt(3), rel=0.05)
        assert 0.1 <= sigma.min() and sigma.max() <= 2 and sigma.mean() == pytest.approx(1.05, rel=0.15)
        assert len(jittered[:, moco.ORDER].unique()) == 24


# ---------------------------------------------------------------- data.py: pictures and text


def encoded(picture, form="PNG", **options):
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(colour=(200, 30, 30), size=(40, 30), form="JPEG", mode="RGB"):
    return encoded(Image.new("RGB", size, colour).convert(mode), form)


def png(colour, size=(8, 8)):
    return jpeg(colour, size, form="PNG")


def noise(width, height, seed=0):
    """A smooth random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("content, size, pixel", [
    (jpeg((200, 30, 30), mode="CMYK"), (40, 30), (200, 30, 30)),
    (jpeg((99, 99, 99), mode="L"), (40, 30), (99, 99, 99)),
    (jpeg((200, 30, 30), form="PNG", mode="P"), (40, 30), (204, 51, 51)),  # of the web palette
    (encoded(Image.fromarray(np.full((4, 4), 30000, np.uint16))), (4, 4), (117, 117, 117)),
    (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), (4, 4), (255, 255, 255)),
    (encoded(Image.fromarray(np.int32([[200_000, 400_000]])), "TIFF"), (2, 1), (127, 127, 127)),
    (encoded(Image.fromarray(np.int32([[30_000, 60_000]])), "TIFF"), (2, 1), (116, 116, 116)),
    (encoded(Image.new("RGB", (4, 2), (9, 9, 9)), "TIFF", tiffinfo={274: 6}), (2, 4), (9, 9, 9)),
    (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (4, 4), (255, 255, 255)),
    (encoded(Image.new("LA", (4, 4), (0, 128))), (4, 4), (127, 127, 127)),
], ids=itertools.count())  # fmt: skip
def test_pictures_of_every_kind_become_rgb(content, size, pixel):
    picture = data.decode(content)
    assert picture.mode == "RGB" and picture.size == size
    assert np.abs(np.array(picture.getpixel((0, 0))) - pixel).max() <= 5


def with_exif(*entries):
    """A JPEG of 40 x 20. entries: (tag, type, number, four bytes), written as they are."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    exif += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    return encoded(noise(40, 20), "JPEG", exif=exif)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")
@pytest.mark.parametrize("others", [
    [], [(282, 5, 1, b"\xff\xff\xff\0")], [(256, 2, 4, b"640\0")],  # resolution outside; width in letters
], ids=len)  # fmt: skip
def test_of_exif_only_the_orientation_matters(others):
    for orientation in range(1, 9):
        entry = (274, 3, 1, bytes([orientation, 0, 0, 0]))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(with_exif(entry))))
        assert np.array_equal(data.decode(with_exif(*sorted([entry, *others]))), expected)
    broken = encoded(noise(40, 20), "JPEG", exif=b"Exif\0\0no TIFF at all")
    assert data.decode(broken).size == data.decode(with_exif((274, 2, 4, b"top\0"))).size == (40, 20)


def test_a_jpeg_is_decoded_no_smaller_than_the_draft():
    content = encoded(noise(400, 300), "JPEG")
    assert [data.decode(content, draft).width for draft in (None, 151, 150, 75)] == [400, 400, 200, 100]
    assert data.RandomCrop(64, 0.25).draft == 128  # a quarter of the area of 128 x 128 is 64 x 64


@pytest.mark.parametrize("mode, smallest", [("bicubic", 0.9), ("bilinear", 0.08)])
def test_random_crops_are_those_of_torchvision(mode, smallest):
    expected = v2.RandomResizedCrop(48, (smallest, 1.0), interpolation=v2.InterpolationMode(mode))
    for seed, (width, height) in enumerate(itertools.product((1, 3, 40, 97, 300), repeat=2)):
        picture = noise(width, height, seed)
        torch.manual_seed(seed)
        ours, after = data.RandomCrop(48, smallest, mode)(picture), torch.rand(1)
        torch.manual_seed(seed)
        difference = (v2.functional.pil_to_tensor(expected(picture)).int() - ours.int()).abs()
        assert torch.rand(1).equal(after) and ours.shape == (3, 48, 48) and ours.dtype == torch.uint8
        assert difference.max() <= 2 and (difference > 0).double().mean() < 0.1


# ---------------------------------------------------------------- data.py: tar files


def refuses(path, message, **options):
    """open_source says what is wrong, in one line."""
    with pytest.raises(data.UserError, match=message) as error:
        data.open_source(str(path), **options)
    assert "\n" not in str(error.value)


def write_tar(path, members, form=tarfile.DEFAULT_FORMAT, mtime=0):
    """members: (name, content), or (name, kind, target) of a link."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content, *target in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if target:
                info.type, info.linkname = content, target[0]
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def shard(path, first, n):
    members = []
    for i in range(first, first + n):
        members += [(f"{i:05}.jpg", jpeg((5 * i % 256, 99, 30))), (f"{i:05}.txt", f"caption {i}".encode())]
    return write_tar(path, members)


def captions_of(source):
    return [source.caption(i) for i in range(len(source))]


def test_shards_are_read_by_position(tmp_path):
    for k in range(3):
        shard(tmp_path / f"{k:05}.tar", 10 * k, 10)
    for spec in ("{00000..00002}.tar", "*.tar", "{00000,00001,00002}.tar"):
        source = data.open_source(str(tmp_path / spec))
        assert captions_of(source) == [f"caption {i}" for i in range(30)] and not source.skipped
        assert source.image(17).size == (40, 30) and "00001.tar, 00017.jpg at byte" in source.where(17)
    joined = data.open_source(f"{tmp_path}/00002.tar::{tmp_path}/00000.tar")
    assert pickle.loads(pickle.dumps(joined)).caption(19) == "caption 9"  # as loading processes may get it
    assert joined.fingerprint() != data.open_source(str(tmp_path / "0000[02].tar")).fingerprint()
    assert joined.fingerprint() == data.open_source(f"{tmp_path}/0000{{2,0}}.tar").fingerprint()
    Path(tmp_path / "00000.tar").rename(tmp_path / "3.tar")
    assert joined.fingerprint() != data.open_source(f"{tmp_path}/00002.tar::{tmp_path}/3.tar").fingerprint()


@pytest.mark.parametrize("name", ["x [y]/0.tar", "a{1}.tar", "{a,b}/*.tar", "x::y.tar", "caf\udce9/0.tar"])
def test_paths_that_exist_are_taken_literally(tmp_path, name):
    path = tmp_path / name.replace("*", "0")
    path.parent.mkdir(exist_ok=True)
    shard(path, 7, 2)
    for _ in range(2):  # by the cache too
        source = data.open_source(str(tmp_path / name))
        assert captions_of(source) == ["caption 7", "caption 8"] and len(source.fingerprint()) == 64
    refuses(tmp_path / "*.rat.tar", "no such file")


@pytest.mark.parametrize("members, captions, skipped", [
    ("v1.2.jpg v1.2.txt v1.3.txt v1.3.jpg", "v1.2.txt v1.3.txt", {}),
    ("v1.jpg v1.txt v1.2.jpg v1.2.txt", "v1.txt v1.2.txt", {}),
    ("1.depth.png 1.jpg 1.seg.png 1.txt", "1.txt", {".png": 2}),
    ("1.jpg 1.npy 1.txt README", "1.txt", {".npy": 1, "without extension": 1}),
    ("1.jpg 1.png 1.txt 2.txt 2.json", "1.txt", {".png": 1, ".txt": 1, ".json": 1}),
    ("1.jpg 1.txt 2.jpg@ 2.txt 3.jpg= sub/", "1.txt", {"link": 2, ".txt": 1}),
    ("._1.jpg 1.jpg 1.txt ./.ipynb_checkpoints/1.jpg", "1.txt", {"hidden": 2}),
    ("a/1.jpg a/1.txt b/1.jpg b/1.txt caf\udce9.\udce9", "a/1.txt b/1.txt", {".\\xe9": 1}),
])  # fmt: skip
def test_what_a_tar_holds_is_read_or_counted(tmp_path, members, captions, skipped):
    kinds = {"@": tarfile.SYMTYPE, "=": tarfile.LNKTYPE, "/": tarfile.DIRTYPE}
    content = []
    for name in members.split():
        text = b"\xef\xbb\xbf" + os.fsencode(name) + b" " + 9999 * "é".encode()
        written = text if name.endswith(".txt") else png("red")
        content += [(name[:-1], kinds[name[-1]], "1.jpg") if name[-1] in kinds else (name, written)]
    write_tar(tmp_path / "a.tar", content), write_tar(tmp_path / "b.tar", content)
    for times, spec in ((1, "a.tar"), (1, "a.tar"), (2, "?.tar")):  # by the cache too
        source = data.open_source(str(tmp_path / spec))
        read = captions_of(source)
        assert [caption.split()[0] for caption in read] == times * captions.split()
        assert max(map(len, read)) < 5000 and len(WORDS(read[0])) <= 77  # cut, or BPE would take minutes
        assert source.skipped == {kind: times * n for kind, n in skipped.items()}


def test_an_index_follows_its_tar_and_damage_to_it_shows(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    old = data.open_source(path).fingerprint()
    (cache,) = (tmp_path / "cache" / "scan").iterdir()
    whole = cache.read_bytes()
    for damaged in (b"", whole[:100], whole[:200] + b"\7" + whole[201:]):
        cache.write_bytes(damaged)
        assert data.open_source(path).caption(0) == "caption 0" and cache.read_bytes() == whole
    shard(tmp_path / "b.tar", 99, 3)
    (tmp_path / "b.tar").rename(path)
    new = data.open_source(path)
    assert new.caption(2) == "caption 101" and new.fingerprint() != old  # by the lengths of its captions


@pytest.mark.parametrize("owner, name", [(np, "savez"), (Path, "mkdir"), (Path, "home")])
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, owner, name):
    path, fails = shard(tmp_path / "a.tar", 0, 3), RuntimeError if name == "home" else OSError
    monkeypatch.setattr(owner, name, Mock(side_effect=fails))
    monkeypatch.setenv("XDG_CACHE_HOME", "" if name == "home" else str(tmp_path / "c"))
    assert len(data.open_source(path)) == 3


def test_ranks_index_from_places_of_their_own_and_share_the_cache(tmp_path, monkeypatch, capsys):
    paths = [shard(tmp_path / f"{k}.tar", 10 * k, 2) for k in range(4)]
    opened, index = [], data._samples
    monkeypatch.setattr(data, "_samples", lambda path: opened.append(path) or index(path))
    monkeypatch.setenv("LOCAL_RANK", "1"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    second = data.open_source(str(tmp_path / "*.tar"))
    assert opened == [paths[k] for k in (2, 3, 0, 1)]
    assert captions_of(second) == [f"caption {k}" for k in (0, 1, 10, 11, 20, 21, 30, 31)]
    monkeypatch.delenv("LOCAL_RANK")
    ticks = itertools.chain([0], itertools.repeat(6))  # the first tar took long, the others no time
    monkeypatch.setattr(data.time, "monotonic", lambda: next(ticks))
    assert data.open_source(str(tmp_path / "*.tar")).fingerprint() == second.fingerprint()
    assert len(opened) == 4 and capsys.readouterr().err == "indexing: 1 of 4 tar files\n"
    Path(paths[1]).unlink()
    with pytest.raises(data.UserError, match="1.tar: No such file"):
        data.Pairs(second, WORDS, 8)[2]


@slow
def test_many_tars_are_indexed_by_several_processes(tmp_path, monkeypatch):
    for k in range(16):
        shard(tmp_path / f"{k:02}.tar", k, 1)
    here, index = os.getpid(), data._samples
    monkeypatch.setattr(data, "_samples", lambda path: index(path) if os.getpid() != here else None)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 2)
    assert captions_of(data.open_source(str(tmp_path / "*.tar"))) == [f"caption {k}" for k in range(16)]
    (tmp_path / "05.tar").write_bytes(b"no tar at all" * 100)
    refuses(tmp_path / "*.tar", "05.tar: not a whole tar")


LONG = "a/long/name/" * 12  # takes headers of its own


@pytest.mark.parametrize("form, mtime, folder", [
    (tarfile.USTAR_FORMAT, 0, LONG), (tarfile.GNU_FORMAT, 0, LONG), (tarfile.PAX_FORMAT, 0, LONG),
    (tarfile.PAX_FORMAT, 1600000000.25, "../../"),  # as webdataset writes them; never extracted
])  # fmt: skip
def test_tars_of_every_form_give_what_was_written(tmp_path, form, mtime, folder):
    members = [(f"{folder}{k}.{kind}", bytes([k]) * 300 * k) for k in range(5) for kind in ("PNG", "txt")]
    path = write_tar(tmp_path / "a.tar", members, form, mtime)
    source = data.open_source(path)
    assert [source._read(i, kind) for i in range(5) for kind in ("png", "txt")] == [x for _, x in members]
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "cache"}


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


GOOD = b"".join([header("a.png", 9), bytes(512), header("a.txt", 3), b"red", bytes(509 + 1024)])
NO_TARS = [
    b"", b"hello" * 500, header("b.png", 1 << 40) + bytes(2048), GOOD[:100], GOOD[:700], GOOD[:1024],
    GOOD[:1300], GOOD[:2048], GOOD[:2048] + GOOD[:300],  # no end mark
    GOOD[:1024] + b"x" + GOOD[1025:], GOOD + bytes(1 << 20) + GOOD, GOOD + GOOD,
]  # fmt: skip
SWALLOWED = "".join(f"{k}.jpg\t{caption}\n" for k, caption in enumerate(["a", '"b', "c", 'd"', "e"]))


@pytest.mark.parametrize("name, content, message", [
    *[("a.tar", content, "not a whole tar") for content in NO_TARS],
    ("a.tar", bytes(10240), "no sample"), ("a.tar", GOOD[1024:], "no sample .*left out: 1 .txt"),
    ("a.tar", gzip.compress(GOOD), "not a whole tar file, or compressed"), ("a.csv.gz", b"", ".*compressed"),
    ("a.csv", gzip.compress(b"filepath,title\na,b\n"), "is UTF-16 or compressed"),
    *[("a.csv", "filepath,title\na,b\n".encode(code), "is UTF-16") for code in ("utf-16", "utf-16-le")],
    ("a.csv", b"filepath;caption\na;b\n", "no column 'title' .*'caption'.; name yours with --caption-key"),
    ("a.csv", b"", "no column 'filepath'"), ("a.csv", b"filepath,title\n", "has no samples"),
    ("a.csv", b"filepath,title\na\n", "line 2: 1 fields"),
    ("a.csv", b'filepath,title\na,b\nc,"d\ne,f\n', "line 3: unexpected end"),
    ("a.csv", b'filepath,title\na,b\nc,"d" e\ne,f\n', "line 3: .*expected after"),
    ("a.tsv", b"filepath\ttitle\n" + SWALLOWED.encode(), "line 3: a field that holds 3"),
], ids=itertools.count())  # fmt: skip
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, f"{name}(:|,) {message}")


# ---------------------------------------------------------------- data.py: other sources


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tables_of_any_delimiter(tmp_path, delimiter):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "ü.jpg").write_bytes(jpeg())
    rows = [["n", "title", "filepath"], ["1", '"two\nlines, quoted"', "img/ü.jpg"]]
    rows += [["2", 'a 5" disk', "img/ü.jpg"], ["3", "x", "x.jpg"], ["4", "caf\udce9", "img/ü.jpg"]]
    content = "\n".join(delimiter.join(row) for row in rows).encode("utf-8", "surrogateescape")
    (tmp_path / "a.tsv").write_bytes(content)
    source = data.open_source(str(tmp_path / "a.tsv"), label_key="n")
    assert source.classes == ["1", "2", "3", "4"] and source.labels.tolist() == [0, 1, 2, 3]
    refuses(tmp_path / "a.tsv", "no column 'kind' .*--label-key", label_key="kind")
    assert [source.caption(i) for i in range(3)] == ["two\nlines, quoted", 'a 5" disk', "x"]
    assert source.image(1).size == (40, 30) and source.same_images() == ([0, 2], [0, 0, 1, 0])
    pairs, row = data.Pairs(source, WORDS, 8), f"(row 3 below the header of {tmp_path}/a.tsv)"
    assert pairs.why(2) == f"{tmp_path}/x.jpg {row}: No such file or directory"
    assert "(row 4 below" in pairs.why(3) and "'utf-8' codec can't decode byte 0xe9" in pairs.why(3)
    (tmp_path / "b.tsv").write_bytes(content.replace(b"disk", b"Disk"))
    assert data.open_source(str(tmp_path / "b.tsv")).fingerprint() != source.fingerprint()


def plant(root, *names, content=None):
    """Files below a folder: pictures, and others by their extension."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or (jpeg() if path.suffix == ".jpg" else b"x"))
    return str(root)


def test_class_folders_of_every_format(tmp_path):
    forms = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")
    for k, form in enumerate(forms):
        folder = ("", "!/", "!-/")[k % 3]  # before the files, by name
        plant(tmp_path, f"class {k % 2}/{folder}{k}.{form}", content=encoded(noise(16, 12), form))
    expected = ImageFolder(tmp_path, is_valid_file=lambda path: os.path.basename(path)[0].isdigit())
    plant(tmp_path, "class 0/notes.txt", "class 1/raw.CR2", "class 0/raw.cr2", "labels/a.xml", "loose.jpg")
    plant(tmp_path, "class 1/.old/1.jpg", ".thumbs/1.jpg", "class 0/._1.jpg", "__MACOSX/._1.jpg")
    (tmp_path / "class 0" / "again").symlink_to(".")  # would repeat its pictures without end
    (tmp_path / "empty").mkdir()
    source = data.open_source(str(tmp_path))
    assert [source.where(i) for i in range(len(source))] == [path for path, _ in expected.samples]
    assert len(source) == len(forms) and all(source.image(i).size == (16, 12) for i in range(len(source)))
    assert source.classes == expected.classes and source.labels.tolist() == expected.targets
    others = {".txt": 1, ".cr2": 2, ".xml": 1, ".jpg": 1, "hidden": 4, "repeated folder": 1}
    assert source.skipped == others and data.Shapes(2).skipped == {}


def test_splits_are_no_classes(tmp_path):
    for split in ("train", "valid", "test"):
        plant(tmp_path, f"{split}/cat/{split}.jpg", f"{split}/dog/{split}.jpg", "notes.txt", "more/1.jpg")
    for training, split in ((True, "train"), (False, "valid")):
        source = data.open_source(str(tmp_path), train=training)
        assert source.classes == ["cat", "dog"] and f"{split}/cat/{split}.jpg" in source.where(0)
        assert source.skipped == {".txt": 1, "folder beside the splits": 1}
    plant(tmp_path / "other", "Test/cat/1.jpg", "Test/dog/1.jpg")
    assert len(data.open_source(str(tmp_path / "other"), train=False)) == 2
    refuses(tmp_path / "other", "has .'test'., but no train")


@pytest.mark.parametrize("names, message", [  # files of a folder, and what is said of it
    (["images/1.jpg", "images/2.jpg", "notes.xml"], "two classes; left out: .'.xml': 1"),  # Tiny-ImageNet
    (["1.jpg", "2.jpg"], "no pictures in two classes"),
    (["00000/0.jpg", "00000/0.txt", "00000/0.json", "00001/1.jpg", "00001/1.txt", "00000_stats.json"],
     "pictures with captions beside them as tars or a .csv"),  # img2dataset's output_format=files
    (["00000.tar", "00001.tar", "00000.parquet"], r"left out: .'.tar': 2, .*/\*.tar'"),
])  # fmt: skip
def test_folders_without_classes_serve_moco_alone(tmp_path, names, message):
    pictures = [name for name in names if name.endswith(".jpg")]
    refuses(plant(tmp_path, *names), message, captions=bool(pictures))
    if pictures:
        source = data.open_source(str(tmp_path), captions=False)
        assert [source.where(i) for i in range(len(source))] == [f"{tmp_path}/{name}" for name in pictures]
        assert source.classes is None and source.labels is None  # nothing to evaluate on


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not allow such names")
def test_names_that_are_not_utf8_are_read_and_escaped(tmp_path):
    caf = "caf\udce9"
    path = plant(tmp_path, f"{caf}/{caf}.jpg", f"{caf}/x.{caf}", "dog {0}/1.jpg")
    source = data.open_source(path)
    assert source.classes == ["caf\\xe9", "dog {0}"] and source.skipped == {".caf\\xe9": 1}
    assert captions_of(source) == ["a photo of a caf\\xe9.", "a photo of a dog {0}."]
    source = data.open_source(path, templates=["one {}", "{}"])  # the first makes captions
    assert captions_of(source) == ["one caf\\xe9", "one dog {0}"] and source.templates == ["one {}", "{}"]
    assert data.Pairs(source, WORDS, 8)[0][:2] == (0, -1) and len(source.fingerprint()) == 64


GROUPS = [json.dumps({"group": group}).encode() for group in ("food", "animals", "food")]


@pytest.mark.parametrize("parts, label_key, expected", [
    (dict(cls=[b"10", b"9", b"10"]), None, (["9", "10"], [1, 0, 1])),
    (dict(cls=[b"x\n", b"b", b"x"]), None, (["b", "x"], [1, 0, 1])),
    (dict(json=GROUPS, cls=[b"1"] * 3), "group", (["animals", "food"], [1, 0, 1])),
    (dict(json=GROUPS), None, (None, None)), (dict(cls=[b"1"] * 3), None, (None, None)),  # one class is none
    (dict(cls=[b"1", None, b"2"]), None, "a.tar, 1.jpg at byte .*: no .cls"),
    (dict(json=[b"[]"] * 3), "group", "no 'group'"), (dict(json=GROUPS[:2] + [None]), "group", "no .json"),
    (dict(json=[b'{"group": null}'] * 3), "group", "no class, but None"),
])  # fmt: skip
def test_labels_of_tars(tmp_path, parts, label_key, expected):
    members = [(f"{k}.{kind}", values[k]) for k in range(3) for kind, values in parts.items() if values[k]]
    path = write_tar(tmp_path / "a.tar", sorted(members + [(f"{k}.jpg", jpeg()) for k in range(3)]))
    source = data.open_source(path, captions=False, label_key=label_key)
    if isinstance(expected, str):
        with pytest.raises(data.UserError, match=expected):
            source.labels  # noqa: B018
    else:
        labels = None if source.labels is None else source.labels.tolist()
        assert (source.classes, labels) == expected
    if "json" not in parts:
        refuses(path, "no sample")  # pictures without captions are for MoCo alone


def test_shapes_plant_what_they_say():
    source, clean = data.Shapes(500), data.Shapes(128, train=False)
    for i in range(500):
        label = source._attributes(i)[0]
        assert (data.Shapes.classes[label] in source.caption(i)) != source.truth["ill_matched"][i]
    assert source.truth["ill_matched"].sum() == 50 and source.truth["redundant"].sum() == 48
    copy = int(np.flatnonzero(source.truth["redundant"])[0])
    original = int(source.drawn_as[copy])
    difference = np.abs(np.asarray(source.image(copy), float) - np.asarray(source.image(original), float))
    assert copy != original and 0 < difference.mean() < 15
    assert np.bincount(clean.labels).tolist() == [2] * 64
    assert all(clean.classes[clean.labels[i]] in clean.caption(i) for i in range(128))


# ---------------------------------------------------------------- data.py: the datasets


WORDS = clip_model.HashedWords()


class Edges(data.Source):
    """A source by data.py's docstring. At its edges bicubic resizing overshoots, bilinear does not."""

    def __init__(self, n, unreadable=()):
        self.n, self.unreadable = n, unreadable

    def __len__(self):
        return self.n

    def image(self, id, draft=None):
        if id in self.unreadable:
            raise TypeError(f"a bug\nat {id}")
        return Image.fromarray(np.where(np.indices((64, 64, 3))[1] < 32, 60, 190).astype(np.uint8))

    def caption(self, id):
        return "edge " * (id % 12 + 1)

    def where(self, id):
        return f"the edge {id}"

    def fingerprint(self):
        return "edges"


def test_a_source_written_by_the_docstring_serves_both_datasets():
    source = Edges(12, unreadable=[7])
    clip = data.Pairs(source, WORDS, 48, crop_min=0.5)
    views = data.Views(source, 48, moco.draw_views, crop_min=0.3)
    assert clip.crop.areas == (0.5, 1.0) and views.crop.areas == (0.3, 1.0)
    used = [0, 1, 2, 3, 4, 5, 6, 8, 8, 9, 10, 11]
    ids, failed, images, tokens = data.collate([clip[i] for i in range(12)])
    assert ids.tolist() == used and failed.tolist() == [7] and failed.dtype == ids.dtype == torch.int64
    expected = [WORDS(source.caption(i)).tolist() for i in used]
    assert tokens.tolist() == [words + [0] * (len(expected[-1]) - len(words)) for words in expected]
    assert images.shape == (12, 3, 48, 48) and images.min() < 58 and images.max() > 192
    ids, failed, two, numbers = data.collate([views[i] for i in range(7)])
    assert failed.shape == (0,) and two.shape == (7, 2, 3, 48, 48) and numbers.shape == (7, 2, 9)
    assert two.min() >= 59 and two.max() <= 191
    assert data.Pictures(source, data.eval_transform(8))[5][0] == 5
    assert views.why(2) == "the edge 2: can be read now"


def test_two_views_differ_and_repeat():
    pairs = [data.Pairs(data.Shapes(8), WORDS, 32, seed=seed) for seed in (0, 1)]
    views = [data.Views(data.Shapes(8), 32, moco.draw_views, seed=seed) for seed in (0, 1)]
    for dataset, other in (pairs, views):
        torch.manual_seed(0)
        before, first = torch.get_rng_state(), dataset[3]
        assert torch.get_rng_state().equal(before)
        torch.rand(5)
        assert all(torch.equal(x, y) for x, y in zip(dataset[3][2:], first[2:]))
        assert not other[3][2].equal(first[2])
        dataset.set_epoch(1)
        assert not dataset[3][2].equal(first[2])
    _, _, two_crops, numbers = views[1][3]
    assert not two_crops[0].equal(two_crops[1]) and not numbers[0].equal(numbers[1])
    assert not views[1][4][3].equal(numbers) and list(views[1].truth) == ["redundant"]


def test_any_id_of_a_billion_is_read_at_once():
    pairs = data.Pairs(Edges(10**9, unreadable=range(2)), WORDS, 8)
    assert [pairs[i][:2] for i in (10**9 - 1, 0, 1)] == [(10**9 - 1, -1), (2, 0), (2, 1)]
    most = {10**9 - 2, 10**9 - 1, *range(97)}  # all but the last of the 100 ids that are tried
    assert data.Pairs(Edges(10**9, most), WORDS, 8)[10**9 - 2][:2] == (97, 10**9 - 2)
    with pytest.raises(data.UserError, match="100 samples.*8: TypeError: a bug at 999999998") as error:
        data.Pairs(Edges(10**9, most | {97}), WORDS, 8)[10**9 - 2]
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, TypeError)


def test_mismatch_shuffles_its_share_and_keeps_the_truth():
    source = data.Shapes(200, ill_matched=0, duplicates=0)
    pairs = data.Pairs(source, WORDS, 16, mismatch=0.2)
    moved = pairs.truth["ill_matched"]
    assert moved.sum() == 40 and sorted(pairs.caption_of) == list(range(200))
    assert all((pairs.caption_of[i] != i) == moved[i] for i in range(200))
    assert np.array_equal(data.Pairs(source, WORDS, 16, seed=1, mismatch=0.2).caption_of, pairs.caption_of)
    one = int(np.flatnonzero(moved)[0])
    assert pairs[one][3].tolist() == WORDS(source.caption(pairs.caption_of[one])).tolist()
    assert pairs.fingerprint() != data.Pairs(source, None, 16).fingerprint()


BOMB = bytearray(png("red"))
BOMB[16:24] = (10_000).to_bytes(4, "big") * 2
BOMB[29:33] = zlib.crc32(BOMB[12:29]).to_bytes(4, "big")
BAD_SAMPLES = [  # a picture, its text, and what is said of them
    (b"words", (".txt", b"x"), "no picture, but 5 bytes: b'words'"),
    (encoded(Image.new("RGB", (8, 8)), "PCX"), (".txt", b"x"), "no picture"),  # of no format we ask for
    (bytes(BOMB), (".txt", b"x"), "10000 x 1"), (png("red", (2001, 2)), (".txt", b"x"), "2001 x 2 pixels"),
    (encoded(noise(64, 64), "JPEG")[:-200], (".txt", b"x"), "truncated"),
    (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), (".txt", b"x"), "not finite"),
    (png("red"), (".txt", b" \n\t"), "caption is empty"),
    (png("red"), (".txt", b"caf\xe9 noir"), "'utf-8' codec can't decode byte 0xe9 in position 3"),
    (png("red"), (".txt", bytes(9)), "its caption is no text, but "),
    (png("red"), (".json", b'{"caption": "\\ud800"}'), "surrogates not allowed"),
    (png("red"), (".json", b"{"), "in its .json (Expecting"), (png("red"), (".cls", b"1"), "no .json beside"),
]  # fmt: skip


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bad_samples_are_replaced_and_the_cause_is_said(tmp_path):
    members, n = [], len(BAD_SAMPLES)
    for i, (picture, (kind, text), _) in enumerate([*BAD_SAMPLES, (png("blue"), (".txt", b"good"), "")]):
        members += [(f"{i}.png", picture), (f"{i}{kind}", text)]
    pairs = data.Pairs(data.open_source(write_tar(tmp_path / "a.tar", members)), WORDS, 16)
    assert [pairs[i][:2] for i in range(n + 1)] == [(n, i) for i in range(n)] + [(n, -1)]
    for i, (_, _, cause) in enumerate(BAD_SAMPLES):
        why = pairs.why(i)
        assert why.startswith(f"{tmp_path}/a.tar, {i}.png at byte ") and cause in why and "\n" not in why
    evaluated = data.Pictures(pairs.source, data.eval_transform(8))
    assert evaluated[n][0] == n and evaluated[n][1].shape == (3, 8, 8)
    with pytest.raises(data.UserError, match="1.png at byte .*: no picture"):
        evaluated[1]


# ---------------------------------------------------------------- eval.py: models

CPU = torch.device("cpu")
WNIDS = ["n01440764", "n01443537", "n01484850", "n02007558"]
COLOURS = ["blue", "green", "red", "yellow"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of CLIP and one of MoCo, with random weights, in the folders of runs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    clip, without_text = clip_model.create("vit_tiny", 16), moco.create("moco_vit_tiny", 16)
    for family, model, words in (("clip", clip, "hashed words"), ("moco", without_text, None)):
        (folder / family).mkdir()
        args = {"arch": model.arch, "image_size": 16, "data": "shapes:72", "val_data": None}
        run = {"model": model.state_dict(), "args": args, "tokenizer": words}
        torch.save(run, folder / family / "last.pt")
    return {family: str(folder / family) for family in ("clip", "moco")}


def tree(root, folders, n=3):
    """Class folders of plainly coloured pictures, the k-th of the k-th colour."""
    for name, colour in zip(folders, itertools.cycle(COLOURS)):
        plant(root, *(f"{name}/{k}.png" for k in range(n)), content=png(colour, (20, 20)))
    return str(root)


def evaluate(*args):
    on_files = args[0] in ("export", "coreset")
    evaluation.main([*map(str, args), *([] if on_files else ["--workers", "0"])])


def evaluated(capsys, *args):
    """eval.py's last line of JSON."""
    evaluate(*args)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def eval_refuses(capsys, *args):
    """The one line that eval.py says."""
    with pytest.raises(SystemExit) as exit:
        evaluate(*args)
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.count("\n") == 1
    return said


def test_weights_of_a_run_and_of_timm_start_a_model(checkpoints, tmp_path):
    trained, _ = evaluation.load_model(checkpoints["clip"])
    model = clip_model.create("vit_tiny", 16)
    assert evaluation.load_weights(model, checkpoints["clip"]) == "hashed words" and not trained.training
    assert all(weight.equal(trained.state_dict()[k]) for k, weight in model.state_dict().items())
    trained, model = evaluation.load_model(checkpoints["moco"])[0], moco.create("moco_vit_tiny", 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backbone = {k: v for k, v in trained.base_encoder.state_dict().items() if not k.startswith("head.")}
    torch.save(backbone | {"head.weight": torch.zeros(3, 96)}, tmp_path / "timm.pt")  # and a classifier
    assert evaluation.load_weights(model, tmp_path / "timm.pt") is None
    for name, weight in model.state_dict().items():
        inside = name.removeprefix("base_encoder.").removeprefix("momentum_encoder.")
        assert weight.equal(backbone.get(inside, before[name])), name


def test_wrapped_weights_and_openais_are_unwrapped(tmp_path, monkeypatch):
    """Wrappers in any order, also around a part of the model; OpenAI's TorchScript archive, as advised."""
    torch.manual_seed(0)
    model = clip_model.create("vit_tiny", 16, quick_gelu=True).eval()
    images, weights = torch.randn(2, 3, 16, 16, generator=generator()), model.state_dict()
    how = dict(arch="vit_tiny", image_size=16, vocab="hashed")
    prefix = "module._orig_mod.module."
    wrapped = {f"{prefix}{k.replace('visual.', 'visual._orig_mod.')}": v for k, v in weights.items()}
    torch.save({"state_dict": wrapped | {"n_averaged": torch.tensor(3)}}, tmp_path / "wrapped.pt")
    again, _ = evaluation.load_model(tmp_path / "wrapped.pt", **how, quick_gelu=True)
    assert again.features(images).equal(model.features(images))
    del model.pixel_mean, model.pixel_std
    for name, value in dict(input_resolution=16, context_length=77, vocab_size=49408).items():
        model.register_buffer(name, torch.tensor(value))
    archive = tmp_path / "ViT.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files stay
        torch.jit.trace(model, (images, torch.tensor([[49406, 5, 49407]] * 2))).save(archive)
        with pytest.raises(data.UserError, match="a TorchScript archive; make a state dict of it: ") as error:
            evaluation.load_model(archive, **how)
        monkeypatch.chdir(tmp_path)
        exec(str(error.value).partition("of it: ")[2], {"torch": torch})
    again, _ = evaluation.load_model("weights.pt", **how)  # with QuickGELU, though no flag says so
    assert again.features(images).equal(model.features(images))
    with pytest.warns(UserWarning, match="trained with QuickGELU by OpenAI; this model has GELU"):
        evaluation.load_weights(clip_model.create("vit_tiny", 16), "weights.pt")


def test_weights_that_do_not_fit_get_one_line(checkpoints, tmp_path):
    gone = {"model": {}, "args": {"arch": "gone", "image_size": 16}, "tokenizer": None}
    larger, strange = clip_model.create("vit_tiny", 32).state_dict(), {"weights": torch.zeros(3)}
    for name, content in dict(larger=larger, strange=strange, list=[1, 2], gone=gone).items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "half.pt").write_bytes((tmp_path / "larger.pt").read_bytes()[:100_000])
    clip, vocab = Path(checkpoints["clip"]), tmp_path / "vocab.gz"
    vocab.write_bytes(gzip.compress(b"#version\na b\n"))
    tiny = dict(arch="vit_tiny", image_size=16, text=False)
    for path, how, message in (
        ("larger.pt", tiny, "size mismatch"), ("larger.pt", tiny | dict(arch="moco_vit_tiny"), "fit moco"),
        ("strange.pt", {}, "--arch"), ("", {}, "last.pt: No such file"), (clip, dict(vocab="no.gz"), "no.gz"),
        *[(f"{name}.pt", {}, "no checkpoint, or damaged: ") for name in ("list", "text", "half")],
        ("gone.pt", dict(text=False), "unknown arch 'gone'"), (clip, dict(vocab=vocab), "leave --vocab out"),
        ("larger.pt", tiny | dict(image_size=33), "multiple"), ("larger.pt", dict(arch="vit_tiny"), "vocab"),
    ):  # fmt: skip
        with pytest.raises(data.UserError, match=message) as error:
            evaluation.load_model(tmp_path / path, **how)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---------------------------------------------------------------- eval.py: features and classes


def test_crops_and_augmentations_are_those_of_the_protocols():
    """CLIP: resize to the size. MoCo, DeiT: to size / 0.875, bicubic; MoCo v3's linear protocol: bilinear."""
    rng, seen, source = np.random.default_rng(0), [], Reds(1)
    picture = Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1))
    source.image = lambda i, draft=None: picture
    features = lambda images: seen.append(images) or images.flatten(1)  # noqa: E731
    bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
    imagenet, openai = (MOCO_MEAN, MOCO_STD), (CLIP_MEAN, CLIP_STD)
    for model, resize, edge, how, normal in (
        (clip_model.create("vit_tiny", 224), None, 224, bicubic, openai),
        (moco.create("moco_vit_tiny", 224), None, 256, bicubic, imagenet),
        (moco.create("moco_vit_tiny", 224), evaluation.LINCLS_RESIZE, 256, bilinear, imagenet),
    ):
        evaluation.image_features(model, source, CPU, encode=features, resize=resize)
        steps = [transforms.Resize(edge, how), transforms.CenterCrop(224), transforms.ToTensor()]
        expected = transforms.Compose([*steps, transforms.Normalize(*normal)])(picture)
        torch.testing.assert_close(seen.pop()[0], expected, rtol=0, atol=1e-6)
    classic = {  # as main_lincls.py of MoCo v3, and open_clip, have them
        "sgd": [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip()],
        "wise-ft": [transforms.RandomResizedCrop(64, scale=(0.9, 1.0), interpolation=bicubic)],
    }
    for protocol, seed in itertools.product(classic, range(6)):
        torch.manual_seed(seed)
        expected = transforms.Compose([*classic[protocol], transforms.PILToTensor()])(picture)
        torch.manual_seed(seed)
        assert evaluation.augmentation(protocol, 64)(picture).equal(expected), (protocol, seed)
    crop, flip, augment, _, erase = evaluation.augmentation("deit", 64).transforms
    assert (crop.size, crop.scale, crop.interpolation) == ((64, 64), (0.08, 1.0), bicubic) and flip.p == 0.5
    assert (augment.num_ops, augment.magnitude, erase.p) == (2, 9, 0.25)


class Toy(torch.nn.Module):
    """Random features of many lengths, by the red of a picture and by the words of a text."""

    arch, image_size, eval_crop = "vit_tiny", 4, 1.0

    def __init__(self, d=6):
        super().__init__()
        self.rows = torch.randn(256, d, generator=generator(2)) ** 3
        self.words = torch.randn(49408, d, generator=generator(3)) ** 3
        self.words[[0, 49406, 49407]] = 0

    def normalize(self, images):
        return images.float()

    def features(self, images):
        return self.rows[images[:, 0, 0, 0].long()]

    def encode_text(self, tokens):
        return self.words[tokens].sum(1)


class Reds(Edges):
    """N pictures, the i-th of red i + first; labels and captions at random."""

    def __init__(self, n, classes=12, first=0):
        super().__init__(n)
        self.first = first
        self.classes = [f"thing{k}" for k in range(classes)]
        self.labels = torch.randint(classes, (n,), generator=generator(n)).numpy()
        self.labels[self.labels == 1] = 0  # unbalanced

    def image(self, i, draft=None):
        return Image.new("RGB", (4, 4), (i + self.first, 0, 0))

    def caption(self, i):
        return f"caption{i} a\nline{i} b"


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embedded(model, text):
    return np.sum([model.words[t].double().numpy() for t in clip_model.HashedWords()(text)], 0)


def shares(ranking, labels):
    """By hand: top-1, top-5, balanced, n, of the classes of each query, best first."""
    first = np.array([ranked[0] == label for ranked, label in zip(ranking, labels, strict=True)])
    five = [label in list(ranked[:5]) for ranked, label in zip(ranking, labels, strict=True)]
    balanced = np.mean([first[labels == label].mean() for label in set(labels.tolist())])
    return {"top1": first.mean(), "top5": np.mean(five), "balanced": balanced, "n": len(labels)}


def features_of_ranks(rank, world):
    """Features of five pictures and of one; an image tower trained, on all ranks alike."""
    out = {f"{n}": evaluation.image_features(Toy(), Reds(n), CPU, batch_size=2) for n in (5, 1)}
    torch.manual_seed(0)
    classifier = evaluation.Classifier(clip_model.create("vit_tiny", 16), 3, False, torch.randn(3, 128))
    settings = dict(epochs=2, batch_size=4, lr=0.01, wd=0.1, workers=0, seed=5)
    evaluation.train_classifier(classifier, Reds(8, classes=3), "wise-ft", CPU, **settings)
    return out | {"trained": classifier.eval()(torch.randn(4, 3, 16, 16, generator=generator())).detach()}


@slow
def test_ranks_share_the_work_and_agree_with_one_process(tmp_path):
    alone, ranks = features_of_ranks(0, 1), run_ranks(features_of_ranks, 2, tmp_path / "ranks")
    for rank in ranks:
        assert rank["5"].equal(alone["5"]) and rank["1"].equal(alone["1"])
        torch.testing.assert_close(rank["trained"], alone["trained"], rtol=1e-3, atol=1e-3)
    assert ranks[0]["trained"].equal(ranks[1]["trained"]) and not alone["5"].equal(alone["5"].flip(0))


def test_class_folders_of_imagenet_v2_and_r():
    """Zero-shot finds the names itself; numbers are positions, and some of the wnids compete alone."""
    source, tokenizer = Reds(4), Mock(side_effect=clip_model.HashedWords())
    source.labels = np.array([0, 1, 1, 0])
    imagenet = [f"n{k:08}" for k in range(1000)]
    for classes, folders, expected, ranked in (
        (["10", "2"], [str(k) for k in range(11)], [10, 2, 2, 10], None),  # ImageFolder sorts "10" before "2"
        (["0", "3"], imagenet, [0, 3, 3, 0], None), (imagenet[7:9], imagenet, [7, 8, 8, 7], [7, 8]),
    ):  # fmt: skip
        source.classes = classes
        labels, compete = evaluation.class_labels(source, folders)
        assert labels.tolist() == expected and (compete.tolist() if ranked else compete) == ranked
    scores, labels = torch.tensor([[9.0, 1, 0], [9.0, 0, 1]]), torch.tensor([1, 2])
    assert [evaluation.accuracy(scores, labels, x)["top1"] for x in (labels, None)] == [1, 0]
    for classes, given, first in (
        (imagenet, {}, "a photo of a tench."), (imagenet[7:9], {"wnids": imagenet}, "a photo of a tench."),
        (imagenet[7:9], {"classnames": ["cock", "hen"]}, "a photo of a cock."),
        (["0", "999"], {"classnames": "imagenet"}, "a photo of a tench."),
    ):  # fmt: skip
        source.classes = classes
        assert evaluation.zeroshot(Toy(), tokenizer, source, CPU, **given)["n"] == 4
        assert tokenizer.call_args_list[0].args[0] == first
        tokenizer.reset_mock()
    for classes, message in (
        (imagenet[:100], "100 wnids"), (["0", "1"], "classes are numbers"), (["a"], "'a' is the only class"),
    ):  # fmt: skip
        source.classes = classes
        with pytest.raises(data.UserError, match=message):
            evaluation.zeroshot_classes(source)


# ---------------------------------------------------------------- eval.py: protocols without training


def test_zero_shot_equals_a_naive_reference():
    model, source, classes = Toy(), Reds(200), []
    source.templates = ["a {}", "no {} here", "much of {}, {}"]
    for name in source.classes:
        prompts = [unit(embedded(model, template.replace("{}", name))) for template in source.templates]
        classes.append(unit(np.mean(prompts, 0)))
    cosine = unit(model.rows[:200]) @ np.array(classes).T
    result = evaluation.zeroshot(model, clip_model.HashedWords(), source, CPU, batch_size=7)
    assert result == pytest.approx({"protocol": "zero-shot", **shares(np.argsort(-cosine), source.labels)})


@pytest.mark.parametrize("split", [False, True])
def test_retrieval_equals_a_naive_reference(split):
    model, source = Toy(d=3), Reds(90)
    owner = [i // 3 for i in range(90)]
    source.same_images = lambda: (list(range(0, 90, 3)), owner)  # each third picture has three captions
    for i in range(0, 90, 2):  # else all is found by chance: these captions are near their pictures
        word = int(clip_model.HashedWords()(f"caption{i}")[1])
        model.words[word] = 20 * F.normalize(model.rows[i // 3 * 3], dim=0)
    captions = [source.caption(i).splitlines() if split else [source.caption(i)] for i in range(90)]
    texts, owners = zip(*[(line, i // 3) for i, lines in enumerate(captions) for line in lines], strict=True)
    cosine = unit(model.rows[0:90:3]) @ unit([embedded(model, text) for text in texts]).T  # (30, texts)
    expected, owners = {"n": 30}, np.array(owners)
    for k in (1, 5, 10):
        found = np.argsort(-cosine, 1)[:, :k]
        expected[f"i2t_r{k}"] = np.mean([(owners[found[i]] == i).any() for i in range(30)])
        found = np.argsort(-cosine.T, 1)[:, :k]
        expected[f"t2i_r{k}"] = np.mean([(found[t] == owners[t]).any() for t in range(len(texts))])
    assert len(set(expected.values())) > 4
    for chunk in (7, 1024):
        options = dict(split_captions=split, chunk=chunk, batch_size=9)
        result = evaluation.retrieval(model, clip_model.HashedWords(), source, CPU, **options)
        assert result == pytest.approx({"protocol": "retrieval", **expected})
    source.caption = lambda i: {}[i]
    with pytest.raises(data.UserError, match="the edge 0: no caption"):
        evaluation.retrieval(model, clip_model.HashedWords(), source, CPU)


@pytest.mark.parametrize("k, most", [(20, None), (20, 50), (500, None)])
def test_knn_equals_a_naive_reference(k, most):
    model, train, test = Toy(), Reds(150, classes=7), Reds(90, classes=7, first=150)
    taken = np.arange(0, 150, 3) if most else np.arange(150)
    cosine, ranking = unit(model.rows[150:240]) @ unit(model.rows[:150][taken]).T, []
    for row in cosine:
        votes = np.zeros(7)
        for near in np.argsort(-row)[:k]:
            votes[train.labels[taken[near]]] += np.exp(row[near] / 0.07)
        ranking.append(np.argsort(-votes))
    result = evaluation.knn(model, train, test, CPU, k=k, most=most, batch_size=16)
    assert result == pytest.approx({"protocol": "knn", **shares(ranking, test.labels)})
    if k == 20 and not most:  # the defaults
        assert evaluation.knn(model, train, test, CPU)["top1"] == result["top1"]


def test_logistic_regression_is_at_its_optimum_and_chooses_its_penalty(monkeypatch):
    x, fit, fitted = torch.randn(80, 5, generator=generator()), evaluation._logistic_regression, []
    y = torch.randint(3, (80,), generator=generator())
    probe = fit(x, y, 3, 0.1)
    residual = probe(x).softmax(1) - F.one_hot(y, 3)  # by hand: the gradient of the mean cross-entropy
    assert (residual.T @ x / 80 + 0.1 * probe.weight).abs().max() < 1e-4
    assert residual.mean(0).abs().max() < 1e-4 and probe.weight.norm() > 0.1

    def right_for_one_penalty(x, y, classes, penalty):
        fitted.append((len(x), penalty))
        torch.testing.assert_close(x[:, :3].std(0), torch.ones(3), rtol=0, atol=0.1)
        return fit(x, y if penalty == 1e-3 else (y + 1) % classes, classes, penalty)

    monkeypatch.setattr(evaluation, "_logistic_regression", right_for_one_penalty)
    source, model = Reds(60, classes=3), Toy()
    source.labels = np.arange(60) % 3
    model.rows[:60] = 7 * F.one_hot(torch.arange(60) % 3, 6) + 100  # separable, once it is centred
    result = evaluation.linear(model, source, source, CPU)
    assert result["penalty"] == 1e-3 and result["top1"] == 1 and result["n"] == 60
    assert fitted == [(54, 1e-5), (54, 1e-4), (54, 1e-3), (54, 1e-2), (54, 1e-1), (60, 1e-3)]


# ---------------------------------------------------------------- eval.py: protocols that train


def test_rates_of_the_protocols():
    """MoCo v3: a cosine by epochs. wise-ft: 500 steps up, then a cosine by steps. DeiT: five epochs up."""
    rate = evaluation.learning_rate
    for step, epoch in ((0, 0), (99, 0), (100, 1), (4550, 45), (8999, 89)):
        assert rate("sgd", step, 100, 90, 12.0) == pytest.approx(6.0 * (1 + math.cos(math.pi * epoch / 90)))
    for step, expected in ((0, 1 / 500), (249, 0.5), (499, 1), (500, 1), (2750, 0.5), (4999, 0)):
        assert rate("wise-ft", step, 500, 10, 1.0) == pytest.approx(expected, abs=1e-4), step
    for step, expected in ((0, 1 / 50), (49, 1), (775, 0.5), (1499, 0)):
        assert rate("deit", step, 10, 150, 1.0) == pytest.approx(expected, abs=1e-4), step
    assert rate("wise-ft", 19, 10, 10, 1.0) == 1 and rate("wise-ft", 9, 10, 10, 1.0) == 0.5  # a fifth at most


def test_weight_decay_is_for_the_matrices_that_the_recipes_name():
    tuned = evaluation.Classifier(moco.create("moco_vit_tiny", 32), 3, frozen=False)
    optimizer = evaluation.make_optimizer(tuned, "deit", 0.1, 0.05)
    names = {id(p): name.removeprefix("model.base_encoder.") for name, p in tuned.named_parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    decay, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= others
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"} <= decay
    assert not any("momentum" in name or "predictor" in name for name in decay | others)


@pytest.mark.parametrize("protocol, clip", [("sgd", False), ("wise-ft", True), ("deit", False)])
def test_a_step_of_a_classifier_equals_one_by_hand(protocol, clip, monkeypatch):
    """The first of two steps at a batch of all samples, in which the rate is at its peak."""
    pixels = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)
    mix, clip_grad = Mock(return_value=lambda images, labels: (images, labels)), Mock()
    monkeypatch.setattr(evaluation, "augmentation", lambda protocol, size: v2.PILToTensor())
    monkeypatch.setattr(evaluation.v2, "RandomChoice", mix)
    monkeypatch.setattr(evaluation.nn.utils, "clip_grad_norm_", clip_grad)
    source = Reds(9, classes=3)
    source.image = lambda i, draft=None: Image.fromarray(pixels[i])
    torch.manual_seed(0)
    model = clip_model.create("vit_tiny", 16) if clip else moco.create("moco_vit_tiny", 16)
    ours = evaluation.Classifier(model, 3, protocol == "sgd", torch.randn(3, 128) if clip else None)
    theirs = copy.deepcopy(ours).requires_grad_(True)
    settings = dict(epochs=1, batch_size=9, lr=0.01, wd=0.1, workers=0, seed=7)
    evaluation.train_classifier(ours, source, protocol, CPU, **settings)
    assert ours.model.training == (protocol != "sgd")  # a frozen tower keeps its batch statistics
    assert [call.args[1] for call in clip_grad.mock_calls] == ([] if protocol == "sgd" else [1.0])
    if protocol == "deit":
        assert [(type(x).__name__, x.alpha) for x in mix.call_args.args[0]] == [
            ("MixUp", 0.8),
            ("CutMix", 1.0),
        ]

    images = theirs.model.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    x = theirs.model.visual(images) if clip else theirs.model.base_encoder.forward_features(images)
    logits = (F.normalize(x, dim=-1) if clip else x) @ theirs.head.weight.T + theirs.head.bias
    target = F.one_hot(torch.from_numpy(source.labels), 3).float()
    if protocol == "deit":
        target = 0.9 * target + 0.1 / 3
    (-(target * logits.log_softmax(1)).sum(1).mean()).backward()
    head = [theirs.head.weight]
    if protocol == "sgd":
        optimizer = torch.optim.SGD([*head, theirs.head.bias], lr=0.01, momentum=0.9, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW([*head, *theirs.model.parameters()], lr=0.01, weight_decay=0.1)
    optimizer.step()
    name = "visual.proj" if clip else "base_encoder.blocks.0.mlp.fc1.weight"
    tower = (dict(x.model.named_parameters())[name] for x in (ours, theirs))
    for mine, expected in [(ours.head.weight, *head)] + ([tuple(tower)] if protocol != "sgd" else []):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_commands_train_by_their_recipes(checkpoints, tmp_path, monkeypatch, capsys):
    """Every number of a recipe, the head that it starts from, and how evaluation then resizes."""
    root = tree(tmp_path / "a", COLOURS, 2)
    numbers, out = tree(tmp_path / "numbers", "0123", 2), tmp_path / "tuned.pt"
    train, scores = Mock(), Mock(return_value=torch.eye(4).repeat_interleave(2, 0))
    monkeypatch.setattr(evaluation, "train_classifier", train)
    monkeypatch.setattr(evaluation, "image_features", scores)
    lincls = dict(crop=0.875, interpolation=transforms.InterpolationMode.BILINEAR)
    data_flags = ["--data", root, "--val-data", root]
    for flags, protocol, expected in (
        ("linear --protocol sgd", "sgd", dict(epochs=90, batch_size=1024, lr=3 * 8 / 256, wd=0)),
        ("linear --protocol sgd --batch-size 4", "sgd", dict(epochs=90, batch_size=4, lr=12 / 256, wd=0)),
        ("linear --protocol sgd --lr 1 --wd 2 --epochs 3 --seed 4", "sgd",
         dict(epochs=3, batch_size=1024, lr=1, wd=2, seed=4)),
        ("finetune", "deit", dict(epochs=150, batch_size=1024, lr=1e-3 * 8 / 1024, wd=0.05)),
        (f"finetune --out {out} --test-data {numbers}", "wise-ft",
         dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, seed=0)),
    ):  # fmt: skip
        run = checkpoints["clip" if protocol == "wise-ft" else "moco"]
        result = evaluated(capsys, *flags.split(), "--checkpoint", run, *data_flags)
        (classifier, _, used, _), settings = train.call_args
        assert used == protocol == result["protocol"] and result["n"] == 8 and result["top1"] == 1
        assert {k: settings[k] for k in expected} == pytest.approx(expected), flags
        assert scores.call_args.kwargs["resize"] == (lincls if protocol == "sgd" else None)
        assert classifier.frozen == (protocol == "sgd")
    assert result["test"][numbers] == {k: result[k] for k in ("top1", "top5", "balanced", "n")}
    assert torch.load(out, weights_only=True)["head.weight"].equal(classifier.head.weight)
    assert evaluated(capsys, "linear", "--checkpoint", checkpoints["moco"], *data_flags)["top1"] == 1
    model, words = evaluation.load_model(checkpoints["clip"])  # wise-ft's head is zero-shot
    text = F.normalize(model.encode_text(torch.tensor(words("a photo of a green."))[None]), dim=-1)
    torch.testing.assert_close(classifier.head.weight[1:2], text / 0.07, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- eval.py: its commands


def test_flags_about_data_default_to_the_runs_own(checkpoints, tmp_path, capsys, monkeypatch):
    for name, n in (("train", 4), ("val", 2)):
        tree(tmp_path / name, COLOURS, n)
        rows = [f"{name}/{colour}/{k}.png\t{colour}" for colour in COLOURS for k in range(n)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["picture\tkind", *rows]))
    bank, val = str(tmp_path / "train.tsv"), str(tmp_path / "val.tsv")
    own = dict(data=bank, val_data=val, img_key="picture", label_key="kind", templates=["{}", "a {}"])
    for family in ("clip", "moco"):
        run = torch.load(f"{checkpoints[family]}/last.pt", weights_only=True)
        torch.save(run | {"args": run["args"] | own}, tmp_path / f"{family}.pt")
    evaluate("knn", "--checkpoint", tmp_path / "moco.pt")
    first, second, headline, *_, last = capsys.readouterr().out.splitlines()
    assert [first, second] == [f"{bank}: 16 samples", f"{val}: 8 samples"]
    assert headline == f"knn of {tmp_path / 'moco.pt'} on {val}, learnt from {bank}"
    assert json.loads(last)["top1"] == 1 and json.loads(last)["n"] == 8
    flags = ["--checkpoint", tmp_path / "clip.pt", "--caption-key", "kind", "--split-captions"]
    assert evaluated(capsys, "retrieval", *flags)["n"] == 8
    images = Mock(side_effect=data.UserError("enough"))
    monkeypatch.setattr(evaluation, "image_features", images)
    for flags in ("", f"--data {bank} --templates no{{}} --batch-size 3"):
        eval_refuses(capsys, "zeroshot", "--checkpoint", tmp_path / "clip.pt", *flags.split())
    asked = [
        (call.args[1].path, call.args[1].templates, call.kwargs["batch_size"]) for call in images.mock_calls
    ]
    assert asked == [(val, ["{}", "a {}"], None), (bank, ["no{}"], 3)]


def test_cifar(checkpoints, tmp_path, capsys, monkeypatch):
    """The files that torchvision reads, with four samples; their MD5 sums are not looked at."""
    folder = tmp_path / data.CIFAR10.base_folder
    folder.mkdir()
    batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 9, 1]}
    (folder / "batch").write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"names": [f"class {k}" for k in range(10)]}))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(data.CIFAR10, part, [("batch", None)])
    monkeypatch.setattr(data.CIFAR10, "meta", {"filename": "meta", "key": "names", "md5": None})
    source = data.open_source(f"cifar10:{tmp_path}", train=False)
    assert source.labels.tolist() == [0, 1, 9, 1] and source.caption(2) == "a photo of a class 9."
    common = ["--checkpoint", checkpoints["moco"], "--data", f"cifar10:{tmp_path}", "--val-data"]
    assert evaluated(capsys, "knn", *common, f"cifar10:{tmp_path}")["n"] == 4
    assert "no whole cifar100" in eval_refuses(capsys, "knn", *common, f"cifar100:{tmp_path}")


def test_what_does_not_fit_is_said_in_one_line_before_training(checkpoints, tmp_path, capsys, monkeypatch):
    numbers, some = tree(tmp_path / "v2", ["0", "10"], 1), tree(tmp_path / "r", WNIDS[:2], 1)
    single, out = tree(tmp_path / "single", ["images"]), tmp_path / "no" / "where.pt"
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    three, unlabelled = ["--classnames", tmp_path / "three.txt"], tmp_path / "a.tar"
    write_tar(unlabelled, [("1.jpg", jpeg())])
    clip, moco_ = (["--checkpoint", checkpoints[k]] for k in ("clip", "moco"))
    both = ["--data", some, "--val-data", some]
    sgd = ["linear", *moco_, *both, *"--protocol sgd --lr 1e38".split()]
    assert "loss not finite in epoch" in eval_refuses(capsys, *sgd)
    monkeypatch.setattr(evaluation, "train_classifier", None)
    for args, message in (
        (["zeroshot", *clip, "--data", some, *three], "3 names, for 2 classes"),
        (["zeroshot", *clip, "--data", numbers, *three], "'10'"),
        (["zeroshot", *clip, "--data", single], "no classes, or only one"),
        (["zeroshot", *clip, "--data", unlabelled], "--label-key"),
        (["zeroshot", *moco_, "--data", some], "learnt"), (["knn", *moco_, "--data", some], "--val-data"),
        (["knn", *moco_, "--data", some, "--val-data", unlabelled], "--label-key"),
        (["knn", "--checkpoint", out, *both], "No such file"),
        (["linear", *moco_, *both, "--lr", "1"], "are for --protocol sgd"),
        (["finetune", *moco_, *both, "--test-data", numbers], "'10'"), (["export", *moco_], "say which"),
        (["finetune", *moco_, *both, "--out", out], "--out"), (["export", *moco_, "--out", out], "--out"),
        (["coreset", checkpoints["moco"], "--prune", "0.3", "--out", tmp_path / "k.npy"], "not a run"),
    ):  # fmt: skip
        assert message in eval_refuses(capsys, *args), args
    assert evaluation.wnids(some) == WNIDS[:2] and evaluation.templates("no {}") == ["no {}"]


def test_export_writes_the_others_names_and_says_what_its_words_are(checkpoints, tmp_path, capsys):
    images, out = torch.randn(2, 3, 16, 16, generator=generator()), tmp_path / "out.pt"
    for family, arch in (("clip", "vit_tiny"), ("moco", "moco_vit_tiny")):
        evaluate("export", "--checkpoint", checkpoints[family], "--out", out)
        said, names = capsys.readouterr().out, torch.load(out, weights_only=True)
        assert json.loads(said.splitlines()[-1])["tensors"] == len(names)
        assert not any(k.startswith(("module.", "base_encoder.", "head.")) for k in names)
        model, _ = evaluation.load_model(checkpoints[family])
        again, _ = evaluation.load_model(out, arch, image_size=16, vocab="hashed")
        assert model.features(images).equal(again.features(images))
        assert ("WARNING: this model reads hashed words" in said) == (family == "clip")
    names = {"texts": ["a red car", " ".join(["dog"] * 99), ""]}
    exec("\n".join(line.strip() for line in evaluation.WARNING.splitlines()[2:]), names)  # its advice
    assert names["tokens"].shape == (3, 77) and names["tokens"].argmax(1).tolist() == [4, 76, 1]


def test_static_coreset_from_runs(tmp_path, capsys, monkeypatch):
    """Of three runs over 80 samples, the fourth over 90, whose losses are given."""
    runs, kept = [tmp_path / f"run{seed}.pt" for seed in range(4)], tmp_path / "kept.npy"
    for seed, run in enumerate(runs):
        size = 80 + 10 * (seed == 3)
        scan = Scan(size, seed=seed)
        for epoch in range(7):
            observe_epoch(scan, epoch, 1 + torch.rand(size, generator=generator(seed)))
        torch.save({"scan": scan.state_dict(), "data": {"size": size}, "args": {"arch": "vit_tiny"}}, run)
    result = evaluated(capsys, "coreset", *runs[:3], "--prune", "0.3", "--out", kept)
    ids = torch.from_numpy(np.load(kept))
    assert result["kept"] == len(ids) == 80 - 24 and (ids.diff() > 0).all()
    pair, *_, three = result["overlap"]
    assert three["kept_chance"] == pytest.approx(0.7**3 / (1 - 0.3**3), abs=1e-3) and len(three["runs"]) == 3
    assert (pair["kept_chance"], pair["pruned_chance"]) == pytest.approx((0.5385, 0.1765), abs=1e-3)
    a, b = (scan_module.pruned_set(torch.load(run, weights_only=True)["scan"], 0.3) for run in runs[:2])
    for name, x, y in (("pruned", a, b), ("kept", ~a, ~b)):
        assert pair[name] == pytest.approx(((x & y).sum() / (x | y).sum()).item(), abs=1e-3)
    assert "other data" in eval_refuses(capsys, "coreset", *runs, "--prune", "0.3", "--out", kept)
    warn = lambda states, prune: warnings.warn("one\nand more", stacklevel=2) or ids  # noqa: E731
    monkeypatch.setattr(evaluation, "coreset", warn)
    for rank, said in (("0", "eval.py: one\n"), ("1", "")):  # rank 0 does it, and says it
        monkeypatch.setenv("RANK", rank)
        evaluate("coreset", runs[0], "--prune", "0.3", "--out", kept)
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("flags, message", [
    ("", "required"), ("what", "invalid"), ("knn --no", "--checkpoint"), ("knn --checkpoint x --k 0", "0 is"),
    ("knn --checkpoint x --device mps", "choice: 'mps'"), ("coreset a --prune 2 --out x", "2 is not a share"),
    ("linear --checkpoint x --lr nan", "nan is"), ("zeroshot --checkpoint x --wnids NOWHERE", "No such"),
    ("zeroshot --checkpoint x --classnames EMPTY", "EMPTY: is empty"),
    ("zeroshot --checkpoint x --templates WITHOUT", "WITHOUT: every line needs a {}"),
    ("zeroshot --checkpoint x --classnames BYTES", "codec can't decode"),
])  # fmt: skip
def test_bad_arguments_of_eval_exit_2_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in dict(EMPTY=b"\n", WITHOUT=b"{}!\na photo\n", BYTES=b"\xff").items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(flags.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said


# ---------------------------------------------------------------- eval.py: what train.py shares


def test_ranks_devices_and_precision(monkeypatch):
    has_gpu, used, groups = Mock(return_value=False), [], []
    monkeypatch.setattr(torch.cuda, "is_available", has_gpu)
    assert evaluation.start_ranks("auto") == evaluation.start_ranks("cpu") == (0, 1, CPU)
    with pytest.raises(data.UserError, match="use --device cpu"):
        evaluation.start_ranks("cuda")
    has_gpu.return_value = True
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert evaluation.start_ranks("auto")[2] == used[0] == torch.device("cuda", 0)
    assert torch.backends.cudnn.benchmark
    restarted = dict(RANK=3, LOCAL_RANK=1, MASTER_PORT=9, GROUP_WORLD_SIZE=1, TORCHELASTIC_RESTART_COUNT=2)
    for name, value in restarted.items():
        monkeypatch.setenv(name, str(value))
    for world, missing in (("", "WORLD_SIZE, MASTER_ADDR"), ("4", "MASTER_ADDR")):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(data.UserError, match=f"but no {missing}: start ranks with torchrun"):
            evaluation.start_ranks("cpu")
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: groups.append((backend, how)))
    assert evaluation.start_ranks("auto") == (3, 4, torch.device("cuda", 1))
    assert evaluation.start_ranks("cpu") == (3, 4, CPU)
    (backend, how), (other, _) = groups
    assert (backend, other, how["rank"], how["world_size"]) == ("nccl", "gloo", 3, 4)
    assert how["timeout"].total_seconds() == 1800
    how["store"].set("key", "value")  # after a restart: apart from the addresses of the dead ranks
    assert how["store"].underlying_store.get("2/key") == b"value"
    for native, expected in ((False, "fp32"), (True, "bf16")):  # V100 and T4 only emulate it
        supported = lambda including_emulation=True: including_emulation or native  # noqa: E731, B023
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert evaluation.precision("auto", torch.device("cuda", 0)) == expected
    assert [evaluation.precision(asked, CPU) for asked in ("auto", "bf16")] == ["fp32", "bf16"]


# ---------------------------------------------------------------- train.py in this process


TINY = "--data shapes:72 --val-data shapes:20 --batch-size 16 --epochs 9 --device cpu --workers 0"
TINY += " --eval-every 2 --warmup-threshold 9 --image-size "


@pytest.fixture(autouse=True)
def signals_stay_with_pytest(monkeypatch):
    """train.main takes Ctrl-C and SIGTERM for itself; in this process they are to end the tests."""
    real, theirs = signal.signal, (signal.SIGINT, signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda n, handler: None if n in theirs else real(n, handler))


@pytest.fixture
def small(monkeypatch):
    """-> run(arch, out, flags): train.main in this process, with models that take milliseconds a step."""
    sizes = {"vit_tiny": dict(width=64, layers=1, patch=16), "rn50": dict(width=16, layers=(1, 1, 1, 1))}
    for arch, vision in sizes.items():
        tiny = dict(embed_dim=32, vision=vision, text=(64, 1))
        monkeypatch.setitem(clip_model.ARCHS, arch, clip_model.ARCHS[arch] | tiny)
    tiny = dict(width=64, layers=1, heads=1, patch=16, hidden=32, dim=16)
    monkeypatch.setitem(moco.ARCHS, "moco_vit_tiny", moco.ARCHS["moco_vit_tiny"] | tiny)

    def run(arch, out, flags=""):
        out.parent.mkdir(exist_ok=True)
        vocab = out.parent / "vocab.gz"  # instead of 49408 hashed words
        if not vocab.exists():
            vocab.write_bytes(gzip.compress(b"version\na </w>\n", mtime=0))
        text = "" if arch.startswith("moco") else f"--vocab {vocab}"
        size = 32 if arch == "rn50" else 16
        train.main(f"--arch {arch} {TINY} {size} {text} --out {out} {flags}".split())
        return torch.load(out / "last.pt", weights_only=True)

    return run


def records(out, event=None):
    found = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [r for r in found if event in (None, r["event"])]


def refusal(capsys, *args, code=1):
    """The one line that train.py says before it ends with this code."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, args)))
    said = capsys.readouterr().err
    assert stop.value.code == code and said.count("\n") == 1 and said.startswith("train.py: "), said
    return said


@pytest.fixture
def loaded(monkeypatch, small):
    """-> list that fills with the training batches of every loader: (ids, uint8 images, tokens or drawn)."""
    batches, real = [], DataLoader.__iter__

    def recording(self):
        for batch in real(self):
            if len(batch) == 4:  # batches of evaluations hold ids and images alone
                ids, _, images, others = batch
                batches.append((ids.clone(), images.clone(), others.clone()))
            yield batch

    monkeypatch.setattr(DataLoader, "__iter__", recording)
    return batches


RUN = "--workers 0 --device cpu --precision fp32 --compile off --eval-every 0 --warmup-threshold 9"
RUN += " --data shapes:80 --val-data shapes:8 --batch-size 16"


def trained(out, flags):
    """Train in this process -> (last.pt, records of the epochs)."""
    train.main([*RUN.split(), *flags.split(), "--out", str(out)])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    return checkpoint, [record for record in log if record["event"] == "epoch"]


def marked(state, kind):
    return set(state[kind][: state["num_samples"]].nonzero().flatten().tolist())


# ---------------------------------------------------------------- train.py: the recipes, by hand

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MOCO_MEAN, MOCO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def channels(values):
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def rate_by_hand(peak, warmup, epochs, now):
    """now: fractional epoch. Linear from 0, then half a cosine to 0."""
    if now < warmup:
        return peak * now / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (now - warmup) / (epochs - warmup)))


def fractional_epochs(log, batch=16):
    """Of each step: (epoch, epoch + step / steps of that epoch)."""
    for record in log:
        steps = record["kept"] // batch
        yield from ((record["epoch"], record["epoch"] + step / steps) for step in range(steps))


def clip_by_hand(arch, size, seed, batches, log, lr, wd, warmup, start=None):
    """Plain torch on the pixels and tokens of train.py's loader -> model, [(epoch, ids, a, b)], optimizer."""
    torch.manual_seed(seed)
    model = clip_model.create(arch, size, 515)
    if start is not None:
        model.logit_scale.data.fill_(start)
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and "bias" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "bias" in n]
    betas, eps = {"vit_tiny": ((0.9, 0.98), 1e-6), "rn50": ((0.9, 0.999), 1e-8)}[arch]
    groups = [{"params": decay, "weight_decay": wd}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr, betas, eps)
    losses = []
    for (epoch, now), (ids, pixels, tokens) in zip(fractional_epochs(log), batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(lr, warmup, len(log), now)
        images = ((pixels.double() / 255 - channels(CLIP_MEAN)) / channels(CLIP_STD)).float()
        image, text = model.encode_image(images), model.encode_text(tokens)
        image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
        logits = model.logit_scale.exp() * image @ text.T
        a = logits.logsumexp(1) - logits.diagonal()  # -log of the softmax at the own text
        b = logits.logsumexp(0) - logits.diagonal()
        optimizer.zero_grad()
        ((a.mean() + b.mean()) / 2).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.copy_(min(max(model.logit_scale.item(), 0.0), math.log(100)))
        losses.append((epoch, ids, a.detach(), b.detach()))
    return model, losses, optimizer


def moco_by_hand(size, seed, batches, seen, log, lr, wd, warmup):
    """As clip_by_hand; `seen`: the normalised views that train.py's model was given."""
    torch.manual_seed(seed)
    model = moco.create("moco_vit_tiny", size)
    base, moving, predictor = model.base_encoder, model.momentum_encoder, model.predictor
    fixed = ("patch_embed", "pos_embed")
    learnt = [p for n, p in base.named_parameters() if not n.startswith(fixed)] + [*predictor.parameters()]
    optimizer = torch.optim.AdamW(learnt, lr, (0.9, 0.999), 1e-8, weight_decay=wd)
    losses = []
    for (epoch, now), (ids, _, _), both in zip(fractional_epochs(log), batches, seen, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(lr, warmup, len(log), now)
        m = 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * now / len(log)))
        with torch.no_grad():
            for theirs, ours in zip(moving.parameters(), base.parameters(), strict=True):
                theirs.copy_(m * theirs + (1 - m) * ours)
        q1, q2 = [predictor(base(view)) for view in both]
        with torch.no_grad():
            k1, k2 = [moving(view) for view in both]
        q1, q2, k1, k2 = (x / x.norm(dim=1, keepdim=True) for x in (q1, q2, k1, k2))
        one, other = q1 @ k2.T / 0.2, q2 @ k1.T / 0.2
        a, b = (logits.logsumexp(1) - logits.diagonal() for logits in (one, other))
        optimizer.zero_grad()
        (2 * 0.2 * (a.mean() + b.mean())).backward()
        optimizer.step()
        losses.append((epoch, ids, a.detach(), b.detach()))
    return model, losses, optimizer


def assert_same_gradients(state, optimizer):
    """Adam divides by the size of the gradients: only its state tells by what a loss was multiplied."""
    mine, theirs = optimizer.state_dict()["state"].values(), state["state"].values()
    for name in ("step", "exp_avg_sq"):  # of each tensor; in whatever order the groups hold them
        sizes, expected = (sorted(x[name].double().sum().item() for x in group) for group in (theirs, mine))
        assert sizes == pytest.approx(expected, rel=1e-2, abs=1e-12), name


def assert_same_weights(model, state, start, tolerance):
    """Equal but for rounding: the error of each tensor as a share of the way it went from the start."""
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        value, other, first = (x.double().clone() for x in (value, expected[name], start[name]))
        # These have no gradient but rounding, which Adam blows up: softmax is blind to the keys' bias, and
        # batch norm to what is added before it.
        blind = slice(0)
        if name.endswith(("in_proj_bias", "qkv.bias")):
            blind = slice(len(value) // 3, 2 * len(value) // 3)
        if name.endswith(("k_proj.bias", "encoder.norm.bias")):
            blind = slice(None)
        if value.ndim:
            value[blind] = other[blind] = first[blind] = 0
        error, way = (value - other).norm(), (other - first).norm()
        rounding = 3e-7 * other.norm() + 1e-7
        assert error <= tolerance * way + rounding, f"{name}: {error:.2e} of {way:.2e}"


def assert_scan_saw(losses, checkpoint, log, rho):
    """The losses of the log, the candidates and what was left out follow from the losses by hand."""
    for record in log:
        mean = [((a + b) / 2).double() for epoch, _, a, b in losses if epoch == record["epoch"]]
        assert record["loss"] == pytest.approx(torch.cat(mean).mean().item(), abs=2e-4)
    assert [r["stage"] for r in log] == ["warm-up"] * 2 + ["preparation"] + ["mutation"] * 3
    state, n = checkpoint["scan"], int(rho * 16)
    for kind, sign in (("redundant", 1), ("ill_matched", -1)):
        candidates = marked(state, kind)
        for epoch, ids, a, b in losses:
            if epoch == 2:
                chosen = [set(ids[(sign * x).argsort()[:n]].tolist()) for x in (a, b)]
                mine = candidates & set(ids.tolist())
                assert chosen[0] & chosen[1] <= mine <= chosen[0] | chosen[1] and len(mine) == n
    candidates = marked(state, "redundant") | marked(state, "ill_matched")
    for record, share in zip(log, (0, 0, 0, 0.25, 0.75, 1), strict=True):
        assert record["kept"] == 80 - int(share * len(candidates))
        used = {int(i) for epoch, ids, _, _ in losses if epoch == record["epoch"] for i in ids}
        assert len(used) == record["kept"] // 16 * 16 == record["samples"]
        assert len(candidates - used) >= int(share * len(candidates))


TOLERANCE = {"vit_tiny": 1e-4, "rn50": 3e-2, "moco_vit_tiny": 1e-2}  # of batch norm: it spreads rounding
WEIGHTS = "--epochs 6 --lr 1e-4 --wd 0.3 --warmup 1.5 --seed 3 --image-size"


@pytest.mark.parametrize(
    "arch, size, scale, flags",
    [
        ("vit_tiny", 16, None, ""),
        pytest.param("vit_tiny", 16, 5.0, "", marks=slow),  # a scale above 100, which the clamp lowers
        pytest.param("vit_tiny", 16, -1.0, "", marks=slow),  # and one below 1
        pytest.param("vit_tiny", 16, None, "--accum 2", marks=slow),
        pytest.param("rn50", 32, None, "", marks=slow),
    ],
)
def test_clip_trains_as_a_loop_by_hand(arch, size, scale, flags, loaded, tmp_path, monkeypatch):
    create, vocab = clip_model.create, tmp_path / "vocab.gz"
    vocab.write_bytes(gzip.compress(b"version\na </w>\n"))  # 515 words: Adam is slow on all the hashed ones

    def starting_elsewhere(*args, **options):
        model = create(*args, **options)
        if scale is not None:
            model.logit_scale.data.fill_(scale)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(clip_model, "create", starting_elsewhere)
        saved, log = trained(tmp_path, f"--arch {arch} --vocab {vocab} {WEIGHTS} {size} --prune 0.3 {flags}")
    model, losses, optimizer = clip_by_hand(arch, size, 3, loaded, log, 1e-4, 0.3, warmup=1.5, start=scale)
    torch.manual_seed(3)
    start = create(arch, size, 515).state_dict()
    assert start["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))
    assert_same_weights(model, saved["model"], start, TOLERANCE[arch])
    assert_same_gradients(saved["optimizer"], optimizer)
    assert_scan_saw(losses, saved, log, 0.3)


def test_moco_trains_as_a_loop_by_hand(loaded, tmp_path, monkeypatch):
    seen, forward = [], moco.MoCo.forward

    def seeing(self, *both):
        seen.append([view.detach().clone() for view in both])
        return forward(self, *both)

    with monkeypatch.context() as patch:
        patch.setattr(moco.MoCo, "forward", seeing)
        checkpoint, log = trained(tmp_path, f"--arch moco_vit_tiny {WEIGHTS} 16 --prune 0.35")
    model, losses, optimizer = moco_by_hand(16, 3, loaded, seen, log, lr=1e-4, wd=0.3, warmup=1.5)
    torch.manual_seed(3)
    start = moco.create("moco_vit_tiny", 16).state_dict()
    assert_same_weights(model, checkpoint["model"], start, TOLERANCE["moco_vit_tiny"])
    assert_same_gradients(checkpoint["optimizer"], optimizer)
    assert_scan_saw(losses, checkpoint, log, 0.35)
    pixels = torch.cat([torch.cat(both) for both in seen]) * channels(MOCO_STD) + channels(MOCO_MEAN)
    # jitter clamps at both ends: with any other mean or deviation the ends were elsewhere
    assert pixels.amin((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert pixels.amax((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-5)


# ---------------------------------------------------------------- train.py: optimizer, schedule, draws


@pytest.mark.parametrize("arch", [*clip_model.ARCHS, "moco_vit_s16"])
def test_optimizer_is_the_papers(arch):
    args = train.parse_args(["--arch", arch, "--data", "x.tar", "--wd", "0.07"])
    with torch.device("meta"):  # sizes alone
        model = moco.create(arch, 32) if arch in moco.ARCHS else clip_model.create(arch, 64, vocab_size=50)
    groups = train.make_optimizer(model, args).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for (
        name,
        p,
    ) in model.named_parameters():  # open_clip: matrices, unless they are biases; MoCo v3: everything
        decays = arch in moco.ARCHS or (p.ndim > 1 and "bias" not in name)
        assert not p.requires_grad or decay.pop(id(p)) == (0.07 if decays else 0), name
        assert not (p.requires_grad and name.startswith("momentum_encoder."))
    assert not decay
    betas, eps = ((0.9, 0.98), 1e-6) if arch.startswith("vit") else ((0.9, 0.999), 1e-8)
    assert all(group["betas"] == betas and group["eps"] == eps for group in groups)


def test_learning_rate_never_bends():
    args = train.parse_args(["--arch", "vit_tiny", "--epochs", "10", "--warmup", "2", "--lr", "1"])
    rates = [train.learning_rate(e / 10, args) for e in range(101)]
    assert rates[10] == 0.5 and max(rates) == rates[20] == 1 and rates[100] == pytest.approx(0)
    assert max(abs(np.diff(rates[20:]))) < 0.03
    for epochs, warmup in ((40, 2.0), (1_000_000, 5000.0)):  # 10,000 steps, but at most a twentieth
        args = train.parse_args(["--arch", "vit_b32", "--data", "x.tar", "--epochs", str(epochs)])
        train.set_warmup_and_precision(args, 2, torch.device("cpu"))  # 2 steps an epoch
        assert args.warmup == warmup


@slow
@pytest.mark.parametrize("arch", ["vit_tiny", "moco_vit_tiny"])
def test_every_draw_of_a_run_follows_its_seed(arch, loaded, tmp_path, monkeypatch):
    """Order, augmentation, weights, and what each step's forward pass starts from."""
    forward, runs, starts = train.forward, [], []
    monkeypatch.setattr(train, "forward", lambda *x: starts.append(torch.initial_seed()) or forward(*x))
    for k, seed in enumerate((1, 1, 2)):
        torch.rand(k + 1)  # a run may not depend on what was drawn before it
        flags = f"--arch {arch} --image-size 32 --epochs 3 --lr 1e-4 --prune 0.3 --seed {seed}"
        checkpoint, _ = trained(tmp_path / str(k), flags)
        weights = torch.cat([x.flatten().double() for x in checkpoint["model"].values()])
        assert checkpoint["scan"]["seed"] == seed
        runs.append((list(loaded), weights, list(starts)))
        loaded.clear()
        starts.clear()
    one, again, other = runs
    assert one[1].equal(again[1]) and not one[1].equal(other[1])
    assert one[2] == again[2] and len({*one[2], *other[2]}) == 2 * len(one[2]) == 30  # no two steps alike
    for batch, same in zip(one[0], again[0], strict=True):
        assert all(x.equal(y) for x, y in zip(batch, same, strict=True))
    assert all(not ids.equal(others[0]) for (ids, *_), others in zip(one[0], other[0], strict=True))
    pictures = [{}, {}]  # of two seeds, by epoch and id
    for found, (batches, *_) in zip(pictures, (one, other)):
        for k, (ids, images, _) in enumerate(batches):
            found |= {(k // 5, int(i)): image for i, image in zip(ids, images)}
    seeds = [not pictures[0][key].equal(pictures[1][key]) for key in pictures[0]]
    epochs = [not pictures[0][0, i].equal(pictures[0][1, i]) for i in range(80)]
    assert np.mean(seeds) > 0.95 and np.mean(epochs) > 0.95


# ---------------------------------------------------------------- train.py: flags, and what is printed


ROUNDS = [0, 0.25, 0.75, 1, 0]


@pytest.mark.parametrize(
    "flags, redundant, ill_matched, shares",
    [
        pytest.param("--prune 0.3", 24, 24, ROUNDS, marks=slow),
        pytest.param("--prune 0.3 --rho-ill 0", 24, 0, ROUNDS, marks=slow),
        pytest.param("--rho-red 0.1 --rho-ill 0.3", 8, 24, ROUNDS, marks=slow),
        pytest.param("--prune 0.5", 40, 40, ROUNDS, marks=slow),
        pytest.param("--prune 0.3 --rho-red 0", 0, 24, ROUNDS, marks=slow),
        pytest.param("--prune 0.3 --t-cos 2", 24, 24, [0, 0.5, 1, 0, 0.5], marks=slow),
        pytest.param("--prune 0.3 --t-cos 4", 24, 24, [0, 0.1464, 0.5, 0.8536, 1], marks=slow),
        pytest.param("--prune 0.3 --warmup-rule printed", 0, 0, [0] * 5, marks=slow),
        pytest.param("--prune 0", 0, 0, [0] * 5, marks=slow),
    ],
)
def test_the_papers_ablations_change_what_is_dropped(flags, redundant, ill_matched, shares, small, tmp_path):
    flags += " --data shapes:80 --batch-size 20 --epochs 7 --eval-every 0"
    state, log = small("vit_tiny", tmp_path / "out", flags)["scan"], records(tmp_path / "out", "epoch")
    assert [int(state[kind].sum()) for kind in ("redundant", "ill_matched")] == [redundant, ill_matched]
    found = [r["candidates"] for r in log]  # a sample may be lowest in one direction and highest in the other
    assert 0.75 * (redundant + ill_matched) <= found[2] <= redundant + ill_matched
    of_round = [found[2]] * 5 if "--t-cos 2" not in flags else [found[2]] * 3 + [found[5]] * 2
    kept = [80, 80] + [80 - int(share * d) for share, d in zip(shares, of_round)]
    assert [r["kept"] for r in log] == kept
    assert [r["samples"] for r in log] == [k // 20 * 20 for k in kept]  # at 0.5, one epoch trains on nothing


def test_keep_trains_on_these_ids_only(small, tmp_path, monkeypatch, capsys):
    used, inputs = set(), data.Pairs.read
    monkeypatch.setattr(data.Pairs, "read", lambda self, i: used.add(int(i)) or inputs(self, i))
    ids = np.arange(0, 72, 2)
    np.save(tmp_path / "keep.npy", ids)
    small("vit_tiny", tmp_path / "out", f"--prune 0 --epochs 2 --keep {tmp_path / 'keep.npy'}")
    assert used <= set(ids.tolist()) and len(used) >= 32
    said = capsys.readouterr().out
    assert "36 of them are in" in said and "samples seen 64: 50.0% of the data in every epoch" in said
    assert [r["kept"] for r in records(tmp_path / "out", "epoch")] == [36, 36]
    for wrong in ([[0]], [72], [-1], [], [0.5], [True] * 72):
        np.save(tmp_path / "wrong.npy", np.array(wrong))
        with pytest.raises(SystemExit):
            small("vit_tiny", tmp_path / "wrong", f"--keep {tmp_path / 'wrong.npy'}")
        assert "--keep" in capsys.readouterr().err


def test_templates_make_the_captions_of_folders_and_of_their_zero_shot(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "tree" / name / "1.png")
    (tmp_path / "templates.txt").write_text("one {}.\nmany {}s.\n")
    flags = ["--arch", "vit_tiny", "--data", str(tmp_path / "tree"), "--val-data", str(tmp_path / "tree")]
    for more, expected in (
        ([], ["a photo of a {}."]),
        (["--templates", "the {}"], ["the {}"]),
        (["--templates", str(tmp_path / "templates.txt")], ["one {}.", "many {}s."]),
    ):
        dataset, val = train.open_data(train.parse_args(flags + more), WORDS)
        captions = [dataset.source.caption(i) for i in range(2)]
        assert captions == [expected[0].replace("{}", name) for name in ("cat", "dog")]
        assert val.templates == expected


def test_savings_are_compared_with_the_full_epochs_of_a_run():
    def told(*stages, seconds=10):
        epochs, seen = [], 0
        for stage in stages:
            kept, spent = (40, 0.4 * seconds) if stage == "mutation" else (100, seconds)
            seen += kept
            epochs.append(dict(stage=stage, kept=kept, total=100, samples=kept, samples_seen=seen))
            epochs[-1] |= dict(seconds=spent, data_seconds=0.1 * spent)
        return train.savings(epochs, 10)

    both = told("warm-up", "preparation", "mutation")
    assert both.startswith("samples seen 240 of 300: 20.0% saved\ntraining 24 s, 10% waiting for data; all")
    assert both.endswith("30 s: 20.0% saved")
    brief = told("warm-up", "preparation", "mutation", seconds=4)  # a time that says nothing
    assert brief == "samples seen 240 of 300: 20.0% saved\ntraining 10 s, 10% waiting for data"
    assert told("warm-up").startswith("samples seen 100: 100.0% of the data in every epoch\n")
    assert told("mutation", "mutation").startswith("samples seen 80: 40.0% of the data in every epoch\n")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_what_the_user_is_told(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    clock = iter(range(10**6))
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(data.Shapes, "skipped", {".json": 48, "hidden": 3})
    monkeypatch.setattr(sys, "stdout", terminal := Terminal(io.BytesIO(), encoding="ascii"))
    small("vit_tiny", tmp_path / "out", "--epochs 4")
    terminal.seek(0)
    said = terminal.read()
    live = [line.removeprefix("\x1b[K") for line in re.split(r"[\r\n]", said) if "/s" in line]
    assert live and all(len(line) <= 59 for line in live)  # or every update becomes a new line
    assert "left" not in live[0] and "s left" in live[-1]
    assert "int(0.3 x 16) = 4 redundant, int(0.3 x 16) = 4 ill-matched marked per batch" in said
    assert "25.0% left out per round" in said
    assert said.count("left out: 48 .json, 3 hidden") == 2  # of --data and of --val-data
    assert "8 of them, others in each epoch, fill no batch of 16" in said
    assert "saved" in said and "zero-shot" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["warmup"] == 3.0
    small("vit_tiny", tmp_path / "fü\udcffl", "--epochs 1 --prune 0 --data shapes:80")
    terminal.seek(0)
    said = terminal.read()[len(said) :]
    assert "f\\xfc\\udcffl/log.jsonl" in said  # on a terminal that has neither letter
    assert "= 0 redundant" in said and "100.0% of the data in every epoch" in said
    assert "full data" in said and "mutation" not in said and "planted" not in said


def test_init_starts_from_other_weights(small, tmp_path):
    first = small("vit_tiny", tmp_path / "first", "--epochs 1")["model"]
    small("vit_tiny", tmp_path / "second", f"--epochs 1 --lr 0 --init {tmp_path / 'first'} --seed 7")
    second = torch.load(tmp_path / "second" / "last.pt", weights_only=True)["model"]
    assert all(value.equal(second[name]) for name, value in first.items())


SHARE, FINITE = "-0.1 1.1 nan x", "-1 nan inf x"
NATURAL, COUNT = "0 -1 1.5 99999999999999999999 x", "-1 1.5 99999999999999999999 x"
BAD_VALUES = {
    "--arch": "what", "--mismatch": SHARE, "--prune": SHARE, "--rho-red": SHARE, "--rho-ill": SHARE,
    "--t-cos": NATURAL, "--warmup-threshold": FINITE, "--warmup-rule": "what", "--epochs": NATURAL,
    "--batch-size": NATURAL, "--accum": NATURAL + " 3", "--lr": FINITE, "--wd": FINITE,
    "--warmup": FINITE + " 99", "--image-size": NATURAL, "--templates": "nowhere.txt", "--precision": "fp16",
    "--compile": "maybe", "--device": "mps", "--crop-min": SHARE, "--workers": COUNT, "--eval-every": COUNT,
    "--save-every": COUNT, "--max-bad": SHARE, "--seed": COUNT,
}  # fmt: skip
BAD_SETS = [
    "--arch rn50 --accum 2", "--arch swin_b --accum 2", "--arch moco_vit_tiny --accum 2",
    "--arch moco_vit_tiny --mismatch 0.1", "--arch moco_vit_tiny --vocab v.gz",
    "--arch moco_vit_tiny --templates {}", "--no-such-flag 3", "stray", "--epochs",
]  # fmt: skip


def test_bad_arguments_exit_2_in_one_line(capsys):
    common = "--arch vit_tiny --data shapes:128 --image-size 32 --batch-size 32".split()
    sets = [f"{flag} {value}" for flag, values in BAD_VALUES.items() for value in values.split()]
    for flags in sets + BAD_SETS:
        said = refusal(capsys, *common, *flags.split(), code=2)
        assert any(word in said for word in flags.split() if not word[-1].isdigit()), said  # names the flag


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data nowhere.tar", "nowhere.tar"), ("--data nowhere", "neither"),
        ("--data shapes:12", "12 samples do not fill one global batch of 16"),
        ("--keep nowhere.npy", "--keep"), ("--batch-size 1", "--batch-size"), ("--prune 0.6", "--prune"),
        ("--vocab nowhere.gz", "--vocab"), ("--image-size 33", "--image-size"),
        ("--out /dev/null/x", "--out"), ("--init nowhere.pt", "nowhere.pt"),
    ],
)  # fmt: skip
def test_bad_input_exits_1_in_one_line(flags, message, small, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        small("vit_tiny", tmp_path / "out", flags)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and message in said


# ---------------------------------------------------------------- train.py: nothing is lost


class Killed(BaseException):
    """No handler of train.py catches it: the files stay as SIGKILL leaves them."""


def die(*_, **__):
    raise Killed


def at_call(number, when, action, function):
    """`function`, but around its call number `number` there is `action`: when is "before" or "after" it."""
    calls = []

    def wrapped(*args, **options):
        calls.append(0)
        if len(calls) == number and when == "before":
            action()
        result = function(*args, **options)
        if len(calls) == number and when == "after":
            action()
        return result

    return wrapped


def assert_same_run(one, other, epochs=9):
    """Checkpoints and logs of two runs agree bit for bit, but for their times."""
    logs = [records(out) for out in (one, other)]
    logs = [[{k: v for k, v in r.items() if "seconds" not in k} for r in log] for log in logs]
    assert [r["epoch"] for r in logs[0] if r["event"] == "epoch"] == list(range(epochs))
    assert logs[0] == logs[1]
    one, other = (torch.load(out / "last.pt", weights_only=True) for out in (one, other))

    for part in ("model", "optimizer", "scan"):
        assert list(one[part]) == list(other[part])
        for x, y in zip(tree_flatten(one[part])[0], tree_flatten(other[part])[0], strict=True):
            assert x.equal(y) if torch.is_tensor(x) else x == y, part


# where one start of a run after the other dies: in which function, at which of its calls, before or after it
MOMENTS = """save_checkpoint 1 before, save_checkpoint 1 after, forward 5 before, log 1 before, log 1 after,
evaluate 1 before, evaluate 1 after, fsync 3 before, end_epoch 1 before, end_epoch 1 after,
_begin 2 after, forward 4 after, _begin 2 after, replace 4 after, log 2 after,
replace 5 before, replace 6 after, forward 3 after, evaluate 1 after, evaluate 1 before,
forward 2 before, log 1 after, evaluate 1 after, table 1 before"""
OWNER = {"fsync": os, "replace": os, "_begin": Scan, "end_epoch": Scan, "log": train.Run}


@slow
@pytest.mark.parametrize("arch, save_every", [("vit_tiny", 1), ("moco_vit_tiny", 2), ("rn50", 2)])
def test_killed_at_any_moment_the_run_goes_on_exactly(small, tmp_path, monkeypatch, arch, save_every):
    """In all stages, around the epoch's end, in evaluations, and while a checkpoint or the log is written."""
    whole, cut, stages = tmp_path / "whole", tmp_path / "cut", set()
    small(arch, whole)
    for moment in MOMENTS.replace("\n", " ").split(", "):
        name, number, when = moment.split()
        owner = OWNER.get(name, train)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, at_call(int(number), when, die, getattr(owner, name)))
            small(arch, cut, f"--save-every {save_every}")
        checkpoint, _ = train.newest_checkpoint(cut)
        stages |= {(checkpoint["scan"]["stage"], checkpoint["step"] > 0)} if checkpoint else set()
    assert stages >= {(s, m) for s in ("warm-up", "preparation", "mutation") for m in (True, False)}, stages
    small(arch, cut)
    assert_same_run(whole, cut)


@slow
def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(small, tmp_path, monkeypatch):
    """last.pt is damaged and prev.pt used; then the run dies between the two renamings of the next save."""
    whole, cut, replace = tmp_path / "whole", tmp_path / "cut", os.replace
    small("vit_tiny", whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_checkpoint", at_call(6, "after", die, train.save_checkpoint))
        small("vit_tiny", cut, "--save-every 1")
    (cut / "last.pt").write_bytes(b"cut short")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", lambda a, b: die() if a.name == "next.pt" else replace(a, b))
        small("vit_tiny", cut, "--save-every 1")
    assert not (cut / "last.pt").exists() and train.newest_checkpoint(cut)[0]["epoch"] == 1
    small("vit_tiny", cut)
    assert_same_run(whole, cut)


@slow
def test_a_run_resumed_in_mid_epoch_does_not_evaluate_the_epoch_before(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_checkpoint", at_call(7, "after", die, train.save_checkpoint))
        small("vit_tiny", tmp_path / "cut", "--save-every 1 --eval-every 0")
    checkpoint, _ = train.newest_checkpoint(tmp_path / "cut")
    assert checkpoint["epoch"] == 1 and checkpoint["step"] > 0
    small("vit_tiny", tmp_path / "cut", "--eval-every 1")
    assert [r["epoch"] for r in records(tmp_path / "cut", "eval")] == list(range(1, 9))


@pytest.mark.parametrize("where, code", [("mid-epoch", 130), pytest.param("last step", 143, marks=slow)])
def test_a_stop_loses_nothing(small, tmp_path, monkeypatch, capsys, where, code):
    """In the last step of an epoch: it saves before the epoch ends, and before its evaluation."""
    small("vit_tiny", tmp_path / "whole", "--epochs 4")
    after_step, step = train.Run.after_step, {"mid-epoch": 2, "last step": 4}[where]

    def stopping(self, done, *args):
        if self.scan.epoch == 1 and done == step:
            self.receive(code - 128, None)
            self.receive(code - 128, None)  # `timeout` sends each signal twice, at once
        after_step(self, done, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train.Run, "after_step", stopping)
        patch.setattr(os, "kill", die)
        small("vit_tiny", tmp_path / "cut", "--epochs 4")
    checkpoint = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert stop.value.code == code and (checkpoint["epoch"], checkpoint["step"]) == (1, step)
    assert f"stopped in epoch 1, step {step} of 4" in capsys.readouterr().out
    small("vit_tiny", tmp_path / "cut", "--epochs 4")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", epochs=4)


@pytest.mark.parametrize("save_every, saved", [(0, (1, 0)), (1, (1, 2))])
def test_no_checkpoint_holds_what_is_not_finite(small, tmp_path, monkeypatch, capsys, save_every, saved):
    """From step 7 on, the third of epoch 1."""
    forward, calls = train.forward, []

    def spoiling(model, inputs, *args):
        calls.append(0)
        if len(calls) == 7:
            inputs[0][3, 0, 0, 0] = math.nan
        return forward(model, inputs, *args)

    monkeypatch.setattr(train, "forward", spoiling)
    with pytest.raises(SystemExit) as stop:
        small("vit_tiny", tmp_path / "out", f"--save-every {save_every}")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "weights not finite" in said
    assert ("in epoch 1, step 3" if save_every else "after epoch 1") in said
    checkpoint = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == saved
    assert all(x.isfinite().all() for x in checkpoint["model"].values())
    assert [r["epoch"] for r in records(tmp_path / "out", "epoch")] == [0]


@slow
def test_a_resume_over_something_else_is_refused_and_named(small, tmp_path, capsys):
    keep, out = tmp_path / "keep.npy", tmp_path / "out"
    np.save(keep, np.arange(64))
    flags = f"--epochs 1 --keep {keep} "
    small("vit_tiny", out, flags)
    before = (out / "last.pt").read_bytes()

    def refused(flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            small("vit_tiny", out, flags)
        said = capsys.readouterr().err
        assert stop.value.code == 1 and said.count("\n") == 1
        return said

    for other in (
        "--seed 1", "--t-cos 2", "--lr 1", "--mismatch 0.2", "--arch vit_s32 --image-size 32", "--prune 0.2",
        "--precision bf16", "--epochs 2", "--rho-red 0.2", "--rho-ill 0.2", "--warmup 0.5", "--wd 0.2",
        "--warmup-threshold 0.1", "--warmup-rule printed", "--batch-size 8", "--accum 2", "--templates {}",
        "--image-size 32", "--crop-min 0.5",
    ):  # fmt: skip
        assert f"holds a run with {other.split()[0]} " in refused(flags + other)
    assert "--seed 0; this one has 1" in refused(flags + "--seed 1")
    assert "72; this one has 73" in refused(flags + "--data shapes:73")
    np.save(keep, np.arange(1, 65))
    assert "--keep" in refused(flags)
    np.save(keep, np.arange(64))
    assert (out / "last.pt").read_bytes() == before
    small("vit_tiny", out, flags + "--workers 1 --precision fp32")  # these may change
    assert "finished before" in capsys.readouterr().out
    torch.save({"version": 1, "epoch": 1, "step": 0}, out / "last.pt")
    assert "not written by this version of train.py" in refused(flags)


@slow
def test_two_runs_never_write_to_one_folder(tmp_path):
    holds = "import sys, train; lock = train.claim(train.Path(sys.argv[1])); print('held'); input()"
    command = [sys.executable, "-uc", holds, str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(data.UserError, match="another run is writing"):
            train.claim(tmp_path, patience=1)
    train.claim(tmp_path, patience=1).close()


def test_a_full_disk_is_named_and_leaves_the_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    train.save_checkpoint(tmp_path, {"x": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a disk that is full after 4 kB
    try:
        with pytest.raises(data.UserError, match=r"cannot be written \(File too large\)"):
            train.save_checkpoint(tmp_path, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["last.pt"]
    assert train.newest_checkpoint(tmp_path)[0]["x"].equal(torch.ones(3))


def test_bad_samples_are_logged_with_their_cause_and_too_many_end_the_run(small, tmp_path, capsys):
    members = []
    for i in range(40):
        members += [(f"{i}.png", png((i, 99, 0)) if i != 7 else b"no"), (f"{i}.txt", b"word%d" % i)]
    tar = write_tar(tmp_path / "a.tar", members)
    flags = f"--data {tar} --batch-size 10 --prune 0.1 --epochs 1"
    small("vit_tiny", tmp_path / "out", flags + " --max-bad 0.03")
    [bad] = records(tmp_path / "out", "epoch")[0]["bad"]
    assert "a.tar" in bad and "no picture" in bad
    with pytest.raises(SystemExit):
        small("vit_tiny", tmp_path / "other", flags + " --max-bad 0.02")
    said = capsys.readouterr().err
    assert "1 samples can't be read, more than --max-bad 0.02" in said and "no picture" in said


# ---------------------------------------------------------------- train.py as its user runs it


def command(*args, torchrun=0):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", torchrun, "--master_port", free_port()]
    return [sys.executable, *map(str, launcher if torchrun else []), *map(str, args)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*args, torchrun=0, check=0, timeout=300, **env):
    arguments = dict(cwd=HERE, env=ENVIRONMENT | env, capture_output=True, text=True, timeout=timeout)
    done = subprocess.run(command(*args, torchrun=torchrun), **arguments)
    assert done.returncode == check, done.stdout + done.stderr
    return done


def start_until(prefix, *args, torchrun=0, **env):
    """A process of a group of its own, whose output has just had a line that starts so."""
    arguments = dict(cwd=HERE, env=ENVIRONMENT | env, text=True, start_new_session=True)
    arguments |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command(*args, torchrun=torchrun), **arguments)
    assert any(line.startswith(prefix) for line in process.stdout)
    return process


SMALL = "train.py --arch vit_tiny --data shapes:128 --image-size 32 --batch-size 32 --eval-every 0".split()
SMALL += "--workers 1 --warmup-threshold 9".split()
BRIEF = "train.py --arch moco_vit_tiny --data shapes:96 --val-data shapes:16 --image-size 16".split()
BRIEF += "--batch-size 24 --epochs 6 --workers 0 --eval-every 1 --warmup-threshold 9 --save-every 1".split()
BRIEF += "--lr 1e-4".split()  # at 1e-3 rounding is amplified, and runs of one and two ranks part


@slow
def test_torchrun_trains_resumes_and_evaluates(tmp_path):
    """Two ranks, killed in mid-epoch and resumed: the same weights and log as uninterrupted; then eval.py."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*SMALL, "--epochs", "6"]
    said = run(*flags, "--out", whole, torchrun=2).stdout
    assert all(text in said for text in ("ln(32) = 3.466", "16 per rank x 2", "saved", "ill-matched"))
    killed = start_until("epoch   1", *flags, "--save-every", "1", "--out", cut, torchrun=2)
    time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert "from epoch" in run(*flags, "--save-every", "1", "--out", cut, torchrun=2).stdout
    assert_same_run(whole, cut, epochs=6)
    assert "finished" in run(*flags, "--out", whole, torchrun=2).stdout
    refused = run(*flags, "--lr", "0.5", "--out", whole, check=1)
    assert refused.stderr.count("\n") == 1 and "--lr" in refused.stderr
    result = run("eval.py", "zeroshot", "--checkpoint", whole, "--workers", "0").stdout
    assert json.loads(result.splitlines()[-1])["n"] == 512


@slow
def test_one_and_two_ranks_and_accumulation_train_alike(tmp_path):
    clip = [*SMALL, "--epochs", "1", "--prune", "0"]
    brief = [*BRIEF, *"--image-size 32 --batch-size 32 --data shapes:128".split()]
    losses = {}
    for name, torchrun, flags in (
        ("clip", 0, clip), ("clip 2", 2, clip), ("clip accum", 0, [*clip, "--accum", "2"]),
        ("clip 2 accum", 2, [*clip, "--accum", "2"]), ("moco", 0, brief), ("moco 2", 2, brief),
    ):  # fmt: skip
        run(*flags, "--out", tmp_path / name, torchrun=torchrun)
        losses[name] = [r["loss"] for r in records(tmp_path / name, "epoch")]
    for name in ("clip 2", "clip accum", "clip 2 accum"):
        assert losses[name] == pytest.approx(losses["clip"], abs=1e-4)
    assert losses["moco 2"] == pytest.approx(losses["moco"], abs=1e-4)
    one, two = (torch.load(tmp_path / n / "last.pt", weights_only=True)["scan"] for n in ("moco", "moco 2"))
    assert (one["counts"] != two["counts"]).sum() <= 2 < one["counts"].sum()


# Run as `python -c DIES train.py's arguments`: train.py, killed for good in the second mutation step, once.
DIES = """
import os, signal, sys
import scan, train
observe, marker = scan.Scan.observe, os.environ["DIE_ONCE"]
def dying(self, *args):
    observe(self, *args)
    if self.stage == "mutation" and self.step == 2 and os.environ.get("RANK", "1") == "1":
        if not os.path.exists(marker):
            open(marker, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
scan.Scan.observe = dying
train.main(sys.argv[1:])
"""


@slow
def test_torchrun_restarts_a_run_whose_rank_died_and_other_ranks_go_on(tmp_path):
    (tmp_path / "dies.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + DIES)
    run(*BRIEF, "--out", tmp_path / "whole", torchrun=2)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1"]
    dying = ["--master_port", free_port(), tmp_path / "dies.py", *BRIEF[1:], "--out", tmp_path / "cut"]
    run(*launcher, *dying, DIE_ONCE=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "cut", epochs=6)
    # with another number of ranks: equal up to rounding
    alone = ["-c", DIES, *BRIEF[1:], "--out", tmp_path / "alone"]
    run(*alone, check=-signal.SIGKILL, DIE_ONCE=str(tmp_path / "died too"))
    run(*BRIEF, "--out", tmp_path / "alone", torchrun=2)
    one, other = (torch.load(tmp_path / n / "last.pt", weights_only=True)["scan"] for n in ("whole", "alone"))
    assert (one["counts"] != other["counts"]).sum() <= 2
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)


@slow
@pytest.mark.parametrize("number, everybody", [("SIGTERM", False), ("SIGTERM", True), ("SIGINT", True)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number, everybody):
    """Also as Ctrl-C and schedulers send it: to the loading processes too, which are needed until the end."""
    flags, number = [*SMALL, "--epochs", "100", "--workers", "2", "--out", tmp_path], getattr(signal, number)
    process = start_until("epoch   0", *flags)
    (os.killpg if everybody else os.kill)(process.pid, number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and rest.splitlines()[-1].startswith("stopped"), rest
    assert rest.count("stopping after this step") == 1
    assert "goes on from here" in rest and torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] >= 1


@slow
def test_torchrun_stops_all_ranks_and_fails(tmp_path):
    """So that `torchrun train.py && eval.py` does not go on; ranks whose torchrun is gone stop, too."""
    flags = [*BRIEF, "--epochs", "400", "--out", tmp_path]
    agent = start_until("epoch   0", *flags, torchrun=2)
    agent.terminate()
    rest, _ = agent.communicate(timeout=60)
    assert agent.returncode != 0 and rest.count("stopping after this step") == 1
    assert rest.count("\nstopped in epoch") + rest.count("\nstopped after epoch") == 1
    agent = start_until("          going on from epoch", *flags, torchrun=2)
    agent.kill()
    agent.wait()
    train.claim(tmp_path).close()  # waits for them


# Run as `python -c WORKER what train.py's arguments`: its loading processes hang, die, or cannot deliver.
WORKER = """
import os, signal, sys, time
import data, train
what = sys.argv.pop(1)
def read(self, i):
    if what == "hang":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "undeliverable":
    data.collate = lambda items: (lambda: 0)  # cannot be pickled
else:
    data.Pairs.read = read
train.main(sys.argv[1:])
"""


def test_a_loading_process_leaves_signals_to_its_rank(monkeypatch):
    monkeypatch.setattr(train.multiprocessing, "parent_process", lambda: "the rank")
    run = Mock(signal=0, rank=0)
    train.Run.receive(run, signal.SIGINT, None)
    assert run.signal == 0


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_whose_loader_hangs(tmp_path, number):
    process = start_until("writing", "-c", WORKER, "hang", *SMALL[1:], "--out", tmp_path)
    time.sleep(1)
    process.send_signal(number)
    assert "stopping after this step" in process.stdout.readline() + process.stdout.readline()
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    rest, _ = process.communicate(timeout=10)  # ends when its loading processes have ended, too
    assert process.returncode == -number and not rest


@slow
@pytest.mark.parametrize("what, why", [("undeliverable", "pickle"), ("die", "DataLoader worker")])
def test_a_loading_process_that_cannot_deliver_ends_the_run_in_one_line(tmp_path, what, why):
    said = run("-c", WORKER, what, *SMALL[1:], "--out", tmp_path, check=1, timeout=60).stderr
    assert said.startswith("train.py: a loading process") and said.count("\n") == 1 and why in said


@slow
@pytest.mark.parametrize("shell", ["{} | head -1", "{} >&-"])
def test_a_screen_that_is_gone_never_ends_a_run(tmp_path, shell):
    line = shlex.join(command(*SMALL, "--epochs", "2", "--out", tmp_path))
    bash = ["bash", "-o", "pipefail", "-c", shell.format(line)]
    done = subprocess.run(bash, cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert [r["epoch"] for r in records(tmp_path, "epoch")] == [0, 1]


def disagree(rank, world):
    run = train.Run.__new__(train.Run)
    run.world, run.group, run.agent, run.signal = world, None, None, 15 * rank
    run.check_ranks_agree("weather", torch.ones(3))
    with pytest.raises(data.UserError, match="the ranks disagree on the weather"):
        run.check_ranks_agree("weather", torch.ones(3) * rank)
    return run.union_over_ranks([rank, 5]), run.stop_signal()


@slow
def test_ranks_agree_or_fail_together(tmp_path):
    assert run_ranks(disagree, 2, tmp_path / "ranks") == [([0, 1, 5], 15)] * 2


@slow
def test_under_torchrun_rank_0_alone_says_it(tmp_path):
    said = run(*SMALL, "--prune", "2", torchrun=2, check=1).stderr
    assert len([line for line in said.splitlines() if "--prune" in line and "is not a share" in line]) >= 1
    assert sum(line.startswith("train.py:") for line in said.splitlines()) == 1
