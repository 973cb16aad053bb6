"""Tests of SCAN: `pytest -q` (all), `pytest -q -m "not slow"` (those that start no processes)."""

import copy
import csv
import functools
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
import subprocess
import sys
import tarfile
import time
import types
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, features
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset
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


# ---------------------------------------------------------------- scan.py: Eq. 2


def naive_selection(a, b, rho, highest):
    """-> (ids both directions chose, ids at least one chose, n), by sorting lists."""
    n = int(rho * len(a))
    fine = [i for i in range(len(a)) if math.isfinite(a[i]) and math.isfinite(b[i])]
    sign = -1 if highest else 1
    chosen = [set(sorted(fine, key=lambda i: sign * x[i])[:n]) for x in (a, b)]
    return chosen[0] & chosen[1], chosen[0] | chosen[1], n


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 257])
@pytest.mark.parametrize("rho", [0, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("kind", ["random", "ties", "nan"])
def test_selection_equals_a_naive_reference(size, rho, kind):
    a, b = torch.rand(2, size, generator=generator(size))
    if kind == "ties":
        a, b = (a * 4).floor(), (b * 4).floor()
    if kind == "nan":
        a[::3], b[1::4] = math.nan, math.inf
    masks = select_candidates(a, b, rho, rho, generator())
    for mask, highest in zip(masks, (False, True)):
        both, either, n = naive_selection(a.tolist(), b.tolist(), rho, highest)
        chosen = set(mask.nonzero().flatten().tolist())
        assert both <= chosen <= either
        assert len(chosen) == min(n, len(either))


def test_selection_tops_up_at_random_and_reproducibly():
    a, b = torch.arange(100.0), torch.arange(100.0).flip(0)  # the directions agree on nothing
    first, again, other = (select_candidates(a, b, 0.2, 0, generator(s))[0] for s in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert first.sum() == other.sum() == 20


@pytest.mark.parametrize(
    "size, rho_red, rho_ill, redundant, ill_matched",
    [
        (16, 0, 0, [], []),  # the released code's sorted[-0:] selects everything
        (3, 0.3, 0.3, [], []),
        (10, 0.3, 0, [0, 1, 2], []),  # its modes for one kind silently run as both
        (10, 0, 0.1, [], [9]),
    ],
)
def test_zero_ratios_and_tiny_batches_select_nothing(size, rho_red, rho_ill, redundant, ill_matched):
    losses = torch.arange(float(size))
    masks = select_candidates(losses, losses, rho_red, rho_ill)
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [redundant, ill_matched]


# ---------------------------------------------------------------- scan.py: Sect. 3.3


@pytest.mark.parametrize("t_cos, trace", [(3, [0, 0.25, 0.75, 1]), (2, [0, 0.5, 1]), (1, [0, 1])])
def test_prune_ratio_is_eq_3(t_cos, trace):
    values = [prune_ratio(e, t_cos) for e in range(2 * len(trace))]
    assert values == pytest.approx(trace + trace)
    assert np.mean(values) == pytest.approx(0.5)


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
        ids, stage = observe_epoch(scan, epoch, losses)
        stages.append(stage)
        kept.append(ids)
        assert ids.dtype == torch.int64 and ids.equal(ids.unique()) and ids.equal(scan.kept)
        if stage == "mutation":
            dropped = set(range(200)) - set(ids.tolist())
            assert dropped <= set(scan.candidates.tolist())
    assert stages == ["warm-up"] * 2 + (["preparation"] + ["mutation"] * 3) * 2
    # 120 candidates: 0, 30, 90, 120 of them left out
    assert [len(ids) for ids in kept] == [200, 200] + [200, 170, 110, 80] * 2
    assert not kept[3].equal(kept[7])  # drawn afresh in each round
    assert scan.counts.max() == 2 and scan.counts.sum() == 240 and scan.rounds == 2
    highest = losses.argsort().argsort() >= 140
    assert scan.ill_counts.sum() == 120 and scan.ill_counts[highest].sum() > 80


def test_each_round_finds_its_candidates_anew():
    scan, losses = Scan(200), torch.arange(200.0) + 1
    for epoch in range(6):
        observe_epoch(scan, epoch, losses)
    observe_epoch(scan, 6, losses[torch.randperm(200, generator=generator())])
    assert len(scan.candidates) == 120  # of the second round alone


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
        replaced[0] += 1  # a sample that can't be read, and the one in its place
        for ids in replaced.split(20):
            scan.observe(ids, losses[ids], losses[ids])
        scan.end_epoch()
    assert len(kept) < 100 and not scan.counts[1::2].any() and scan.counts.sum() == len(scan.candidates)
    for wrong in ([], [[1]], [200], [-1], [0.5], [True, False]):
        with pytest.raises(ValueError, match="keep"):
            Scan(200, keep=wrong)


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
                other = Scan(200)
                other.load_state_dict(torch.load(buffer, weights_only=True))
                assert kept.equal(other.begin_epoch())  # the one that is open
            for scan in (one, other):
                scan.observe(ids, losses[ids], losses[ids].flip(0))
        one.end_epoch()
        other.end_epoch()
        mine, theirs = one.state_dict(), other.state_dict()
        assert all(v.equal(theirs[k]) if torch.is_tensor(v) else v == theirs[k] for k, v in mine.items())


def test_a_sampler_of_micro_batches_goes_on_in_mid_epoch():
    """Gradient accumulation: four micro-batches of 8 are one call of observe."""
    scan, losses = Scan(200), some_losses(200)
    sampler = ScanSampler(scan, 8)
    sampler.set_epoch(0)
    dealt = list(sampler)
    for k in range(0, 12, 4):
        ids = torch.tensor(dealt[k : k + 4]).flatten()
        scan.observe(ids, losses[ids], losses[ids])
    other = Scan(200)
    other.load_state_dict(scan.state_dict())
    sampler = ScanSampler(other, 8)
    sampler.set_epoch(0)
    assert list(sampler) == dealt[12:] and len(sampler) == 13


def test_a_state_may_be_loaded_after_the_sampler_began(tmp_path):
    """In a mutation epoch: what is kept, and where to go on, belong to the state."""
    one, losses = Scan(96), some_losses(96)
    sampler = ScanSampler(one, 8)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        dealt = list(map(torch.tensor, sampler))
        for ids in dealt if epoch < 4 else dealt[:3]:
            one.observe(ids, losses[ids], losses[ids].flip(0))
        if epoch < 4:
            one.end_epoch()
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
        assert other.kept.equal(one.kept) and len(later) == len(dealt) - 3
        assert list(later) == [ids.tolist() for ids in dealt[3:]]


def test_a_sampler_may_be_made_anew_in_every_epoch():
    scan, losses, kept = Scan(80, prune=0.5), some_losses(80), []
    for epoch in range(8):
        sampler = ScanSampler(scan, 20)
        sampler.set_epoch(epoch)
        for ids in map(torch.tensor, sampler):
            scan.observe(ids, losses[ids], losses[ids])
        scan.end_epoch()
        kept.append(scan.num_kept)
    assert kept[5] == 0 and kept[6] == 80


def test_numbers_of_numpy_are_numbers():
    ours = [Scan(64, 0.3, t_cos=2, threshold=0.5, seed=3)]
    ours += [
        Scan(np.int64(64), np.float64(0.3), t_cos=np.int8(2), threshold=np.float32(0.5), seed=np.int64(3))
    ]
    orders = []
    for scan, epoch in zip(ours, (0, np.int64(0))):
        sampler = ScanSampler(scan, 16)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        torch.save(scan.state_dict(), file := io.BytesIO())
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert orders[0] == orders[1]


def test_wrong_use_of_scan_is_said_clearly():
    for settings in (dict(prune=-0.1), dict(rho_red=0.6, rho_ill=0.5), dict(t_cos=0), dict(rule="x")):
        with pytest.raises(ValueError):
            Scan(10, **settings)
    with pytest.raises(ValueError, match="num_samples"):
        Scan(0)
    scan = Scan(10)
    ids, losses = torch.arange(4), torch.rand(4)
    for wrong in (lambda: scan.observe(ids, losses, losses), scan.end_epoch):
        with pytest.raises(RuntimeError, match="begin_epoch"):
            wrong()
    scan.begin_epoch(0)
    with pytest.raises(ValueError, match="one loss per sample"):
        scan.observe(ids, losses.mean(), losses.mean())
    for wrong in (ids + 7, ids - 1):
        with pytest.raises(ValueError, match="0..9"):
            scan.observe(wrong, losses, losses)
    with pytest.raises(ValueError, match="int64"):
        scan.observe(ids.float(), losses, losses)
    with pytest.raises(ValueError, match="10 samples"):
        Scan(11).load_state_dict(scan.state_dict())
    with pytest.raises(ValueError, match="has not ended"):
        scan.begin_epoch(1)
    scan.observe(ids, losses, losses)
    with pytest.warns(UserWarning, match="kept 10 samples, and observed 4"):
        scan.end_epoch()
    with pytest.raises(ValueError, match="the next is 1"):
        scan.begin_epoch(2)


def test_ids_are_exact_beyond_float32():
    """InfoBatch gathers ids in the loss's dtype: inexact above 2^24."""
    scan = Scan(2**24 + 8, rho_red=0.5, rho_ill=0)
    ids = torch.tensor([2**24 + 1, 2**24 + 3])
    for epoch in range(3):
        scan.begin_epoch(epoch)
        scan.observe(ids, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        with pytest.warns(UserWarning, match="observed 2"):
            scan.end_epoch()
    assert scan.candidates.tolist() == [2**24 + 1]


# ---------------------------------------------------------------- scan.py: what a loop needs


@pytest.mark.parametrize("n", [64, 100, 1000])
@pytest.mark.parametrize("large", [False, True])
def test_sampler_deals_the_same_global_batches_to_any_number_of_ranks(n, large, monkeypatch):
    if large:  # as for more than 2^24 samples: an order that takes no memory, in chunks
        monkeypatch.setattr(scan_module, "_LARGE", 0)
        monkeypatch.setattr(scan_module, "_CHUNK", 96)
    keep = torch.randperm(2000, generator=generator())[:n]
    dealt = {}
    for world in (1, 2, 4):
        ranks = [ScanSampler(Scan(2000, keep=keep, seed=3), 32, r, world) for r in range(world)]
        assert {len(sampler) for sampler in ranks} == {n // 32}  # before the first epoch too
        for sampler in ranks:
            sampler.set_epoch(4)
        assert {len(sampler) for sampler in ranks} == {n // 32}
        dealt[world] = [sum(parts, []) for parts in zip(*ranks)]
    assert dealt[1] == dealt[2] == dealt[4]
    flat = sum(dealt[1], [])
    assert len(flat) == len(set(flat)) == n // 32 * 32 and set(flat) <= set(keep.tolist())


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
        assert list(sampler) == orders[-1] and len(sampler) == 8
        scan.end_epoch()
        with pytest.raises(RuntimeError, match="set_epoch"):
            list(sampler)
    assert orders[0] != orders[1]
    again = ScanSampler(Scan(64), 8, 0, 1)
    again.set_epoch(0)
    assert list(again) == orders[0]


def test_a_resumed_epoch_starts_after_the_steps_that_were_observed():
    scan = Scan(64)
    sampler = ScanSampler(scan, 8)
    sampler.set_epoch(0)
    whole = list(sampler)
    for ids in whole[:3]:
        scan.observe(torch.tensor(ids), torch.ones(8), torch.ones(8))
    resumed = Scan(64)
    resumed.load_state_dict(scan.state_dict())
    again = ScanSampler(resumed, 8)
    again.set_epoch()  # the one that is open
    assert len(again) == 5 and list(again) == whole[3:]
    for ids in whole[3:]:
        scan.observe(torch.tensor(ids), torch.ones(8), torch.ones(8))
    scan.end_epoch()
    saved = scan.state_dict()
    sampler.set_epoch()
    following = list(sampler)
    for ids in following:
        scan.observe(torch.tensor(ids), torch.ones(8), torch.ones(8))
    scan.load_state_dict(saved)  # back to before it, under the same sampler
    sampler.set_epoch(1)
    assert list(sampler) == following != whole


def test_an_epoch_may_have_no_steps_at_all():
    scan, losses = Scan(80, prune=0.5), some_losses(80)
    sampler = ScanSampler(scan, 20)
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(7):
            sampler.set_epoch(epoch)
            steps.append(len(sampler))
            for ids in sampler:
                scan.observe(torch.tensor(ids), losses[ids], losses[ids])
            scan.end_epoch()
    assert steps == [4, 4, 4, 3, 1, 0, 4]


@pytest.mark.parametrize("batch, world", [(1, 1), (0, 1), (2, 4), (6, 4), (12, 1)])
def test_sampler_refuses_batches_that_cannot_be(batch, world):
    with pytest.raises(ValueError, match="global batch"):
        ScanSampler(Scan(10), batch, 0, world)
    with pytest.raises(ValueError, match="rank 2"):
        ScanSampler(Scan(10), 4, 2, 2)


def test_with_ids_gives_the_position_beside_the_item():
    items = [(torch.full((2,), float(i)), i % 3) for i in range(10)]
    loader = torch.utils.data.DataLoader(WithIds(items), batch_size=5)
    ids, (images, labels) = next(iter(loader))
    assert ids.tolist() == [0, 1, 2, 3, 4] and images.shape == (5, 2) and labels.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(TypeError, match="map-style"):
        WithIds(iter(items))


def test_watch_observes_both_directions_and_leaves_gradients_alone():
    query, key = (F.normalize(torch.randn(8, 4, generator=generator(s)), dim=1) for s in (0, 1))
    scale = torch.tensor(5.0, requires_grad=True)
    watching, observing = Scan(8), Scan(8)
    watching.begin_epoch()
    observing.begin_epoch()
    watching.watch(torch.arange(8), query.requires_grad_(), key, scale)
    observing.observe(torch.arange(8), info_nce(query, key, scale), info_nce(key, query, scale))
    assert watching.quantile.equal(observing.quantile) and watching.loss_sum.equal(observing.loss_sum)
    assert query.grad is None and scale.grad is None and not watching.loss_sum.requires_grad


# ---------------------------------------------------------------- scan.py: Eq. 1, and several ranks


@pytest.mark.parametrize("block", [2**24, 12])  # 12: two rows at a time, computed again in the backward pass
def test_info_nce_is_eq_1(block, monkeypatch):
    monkeypatch.setattr(scan_module, "_BLOCK", block)
    query, key = (F.normalize(torch.randn(6, 8, generator=generator(s)), dim=1) for s in (0, 1))
    expected = [
        -math.log(math.exp(5 * query[i] @ key[i]) / sum(math.exp(5 * query[i] @ key[j]) for j in range(6)))
        for i in range(6)
    ]
    losses = info_nce(query, key, 5.0)
    assert losses.shape == (6,) and losses.tolist() == pytest.approx(expected, abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(query, key, 5.0).equal(losses)
    half = info_nce(query.bfloat16(), key.bfloat16(), 5.0)
    assert half.dtype == torch.float32 and half.equal(
        info_nce(query.bfloat16().float(), key.bfloat16().float(), 5.0)
    )
    with pytest.raises(ValueError, match="batch, dim"):
        info_nce(query[0], key[0], 5.0)
    inputs = [x.clone().requires_grad_() for x in (query, key, torch.tensor(5.0))]
    weights = torch.arange(6.0)  # a gradient of its own for each loss
    (info_nce(*inputs) * weights).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits = exact[2] * exact[0] @ exact[1].T
    ((logits.logsumexp(1) - logits.diagonal()) * weights).sum().backward()
    for mine, theirs in zip(inputs, exact):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


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
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(work(rank, world), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def unit_vectors(size=24, dim=8):
    torch.manual_seed(3)
    query, key = torch.randn(2, size, dim, dtype=torch.float64)
    weights = torch.rand(2, size, dtype=torch.float64)  # of each sample's two losses: every row counts apart
    return query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True), weights


def by_formula(query, key, scale, weights):
    """Both directions of Eq. 1 by the formula -> losses (2, B), gradients of their weighted mean."""
    query, key, scale = (x.clone().requires_grad_() for x in (query, key, torch.tensor(scale).double()))
    losses = []
    for q, k in ((query, key), (key, query)):
        e = (scale * (q[:, None] * k[None]).sum(-1)).exp()
        losses.append(-(e.diagonal() / e.sum(1)).log())
    losses = torch.stack(losses)
    (losses * weights).mean().backward()
    return losses.detach(), query.grad, key.grad, scale.grad


def our_losses(query, key, scale, weights):
    query, key = (x.float().requires_grad_() for x in (query, key))
    scale = torch.tensor(scale, requires_grad=True)
    losses = torch.stack([info_nce(query, key, scale), info_nce(key, query, scale)])
    (losses * weights.float()).mean().backward()
    return losses.detach(), query.grad, key.grad, scale.grad


# logits that are kept, and held at once: plain; in blocks of some rows, with a rest; of one row
BLOCKS = [(2**24, 2**22), (0, 5 * 24), (0, 1)]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("plain, block", BLOCKS)
def test_info_nce_is_the_formula(monkeypatch, plain, block, scale):
    monkeypatch.setattr(scan_module, "_PLAIN", plain)
    monkeypatch.setattr(scan_module, "_BLOCK", block)
    for mine, theirs in zip(
        our_losses(*unit_vectors()[:2], scale, unit_vectors()[2]),
        by_formula(*unit_vectors()[:2], scale, unit_vectors()[2]),
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("whole_step", [False, True])
@pytest.mark.parametrize("plain, block", BLOCKS)
def test_info_nce_takes_a_number_as_scale_and_float32_under_autocast(monkeypatch, plain, block, whole_step):
    query, key, _ = unit_vectors()
    expected = by_formula(query, key, 20.0, torch.ones(2, 24, dtype=torch.float64))
    monkeypatch.setattr(scan_module, "_PLAIN", plain)
    monkeypatch.setattr(scan_module, "_BLOCK", block)
    query, key = (x.float().requires_grad_() for x in (query, key))
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack([info_nce(query, key, 20.0), info_nce(key, query, 20.0)])
        if whole_step and not plain:  # as some loops do; torch's own operators then compute in bfloat16
            losses.mean().backward()
    if query.grad is None:
        losses.mean().backward()  # bfloat16 would be wrong in the third digit
    for mine, theirs in zip((losses, query.grad, key.grad), expected):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


def formula_on(rank, world):
    scan_module._PLAIN, scan_module._BLOCK = {2: (2**24, 1), 3: (0, 5 * 24), 4: (0, 1)}[world]
    query, key, weights = unit_vectors()
    part = slice(rank * 24 // world, (rank + 1) * 24 // world)
    losses, *grads = our_losses(query[part], key[part], 14.3, weights[:, part])
    dist.all_reduce(grads[2])  # as DDP does for a parameter
    return [losses, *(grad / world for grad in grads)]


@slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_info_nce_on_ranks_is_the_formula(tmp_path, world):
    losses, query, key, scale = zip(*run_ranks(formula_on, world, tmp_path / "ranks"))
    mine = torch.cat(losses, 1), torch.cat(query), torch.cat(key), scale[0]
    for result, expected in zip(mine, by_formula(*unit_vectors()[:2], 14.3, unit_vectors()[2])):
        torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=2e-5)


def test_gathered_gradients_are_reduced_and_scattered_by_nccl(monkeypatch):
    """Without a GPU: a tensor that says it is on one, and a reduce-scatter by hand."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    grads = torch.randn(3, 6, 4)  # of three ranks, each for the six gathered rows
    asked = []

    def reduce_scatter(out, whole):
        assert whole.is_contiguous() and out.shape == (2, 4)
        asked.append(whole)
        out.copy_(grads.sum(0)[2:4])  # rank 1's

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "reduce_scatter_tensor", reduce_scatter)
    monkeypatch.setattr(
        dist, "all_reduce", lambda x: pytest.fail("an all-reduce carries three times as much")
    )
    mine = scan_module._AllGather.backward(None, grads[1].T.contiguous().T.as_subclass(OnGPU))
    torch.testing.assert_close(asked[0].as_subclass(torch.Tensor), grads[1])
    torch.testing.assert_close(mine.as_subclass(torch.Tensor), grads.sum(0)[2:4])


def clip_step(rank, world):
    """Losses and DDP-averaged gradients of one global batch of 8."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"f": torch.nn.Linear(6, 4), "g": torch.nn.Linear(5, 4)}).double()
    scale = torch.nn.Parameter(torch.tensor(2.0))
    model.register_parameter("scale", scale)
    x, y = torch.randn(8, 6).double(), torch.randn(8, 5).double()
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    f, g = F.normalize(model["f"](x[mine]), dim=1), F.normalize(model["g"](y[mine]), dim=1)
    a, b = info_nce(f, g, scale.exp()), info_nce(g, f, scale.exp())
    ((a + b) / 2).mean().backward()
    for p in model.parameters():
        if world > 1:
            dist.all_reduce(p.grad)
            p.grad /= world
    return {"a": a.detach(), "b": b.detach(), "grads": [p.grad for p in model.parameters()]}


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
    return scan.state_dict() | {"kept": kept}


def one_and_several(rank, world):
    scan_module._BLOCK = 16 if world == 4 else 2**24  # in parts
    return {"clip": clip_step(rank, world), "scan": candidates_of(rank, world)}


@slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    alone, ranks = one_and_several(0, 1), run_ranks(one_and_several, world, tmp_path / "ranks")
    for name in "ab":
        torch.testing.assert_close(torch.cat([r["clip"][name] for r in ranks]), alone["clip"][name])
    for r in ranks:
        for grad, expected in zip(r["clip"]["grads"], alone["clip"]["grads"]):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        for name, expected in alone["scan"].items():
            mine = r["scan"][name]
            if name == "kept":
                assert all(x.equal(y) for x, y in zip(mine, expected))
            else:
                assert mine.equal(expected) if torch.is_tensor(expected) else mine == expected


# ---------------------------------------------------------------- scan.py: traps of a foreign loop

# Each must be announced, or be none.


def toy_loop(epochs, prune=0.3, shuffle=False, observes=True, size=64, batch=16):
    """A loop whose losses are the ids, with a mistake of choice -> samples used in each epoch."""
    dataset = WithIds(TensorDataset(torch.arange(size)))
    scan, used = Scan(size, prune), []
    sampler = ScanSampler(scan, batch)
    loader = DataLoader(dataset, batch_sampler=sampler)
    if shuffle:
        loader = DataLoader(dataset, batch, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        used.append(0)
        for ids, _ in loader:
            used[-1] += len(ids)
            if observes:
                scan.observe(ids, ids.float(), ids.float())
        scan.end_epoch()
    return used


def test_a_right_loop_warns_of_nothing():
    """... although up to a batch less one of the kept samples fill no batch, or none are kept at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toy_loop(7) == [64, 64, 64, 48, 32, 32, 64]
        assert toy_loop(6, prune=0.5) == [64, 64, 64, 48, 16, 0]
        assert toy_loop(3, size=79) == [64] * 3


def test_a_forgotten_observe_is_announced_after_the_first_epoch():
    with pytest.warns(UserWarning, match="epoch 0 kept 64 samples, and observed 0"):
        toy_loop(1, observes=False)


def test_a_loader_that_the_kept_ids_never_reach_is_announced_when_it_matters():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_loop(3, shuffle=True, batch=8)  # full data: nothing is wrong yet
    with pytest.warns(UserWarning, match="epoch 3 kept 56 samples, and observed 64"):
        toy_loop(4, shuffle=True, batch=8)


def test_batches_that_are_sharded_again_are_announced():
    """As by accelerate, whose ranks take turns with a sampler's batches. Both ranks' ids, one observer."""
    scan = Scan(64)
    samplers = [ScanSampler(scan, 16, rank, 2) for rank in (0, 1)]
    for sampler in samplers:
        sampler.set_epoch(0)
    for k, (first, second) in enumerate(zip(*samplers)):
        if k % 2 == 0:
            ids = torch.tensor(first + second)
            scan.observe(ids, ids.float(), ids.float())
    with pytest.warns(UserWarning, match="kept 64 samples, and observed 32"):
        scan.end_epoch()


def test_lengths_are_known_before_the_first_epoch():
    scan = Scan(70, keep=range(50))
    sampler = ScanSampler(scan, 16)
    assert len(sampler) == 3 and len(DataLoader(WithIds(range(70)), batch_sampler=sampler)) == 3
    assert len(ScanSampler(scan, 16, 1, 2)) == 3 and scan.epoch is None
    with pytest.raises(RuntimeError, match="set_epoch"):
        next(iter(sampler))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_may_be_started_twice_and_set_epoch_called_twice(workers):
    scan = Scan(64)
    sampler = ScanSampler(scan, 16)
    loader = DataLoader(WithIds(torch.arange(64)), batch_sampler=sampler, num_workers=workers)
    sampler.set_epoch(0)
    next(iter(loader))  # a framework looks at the first batch
    steps = [ids for ids, _ in loader]
    assert len(steps) == 4 and torch.cat(steps).sort().values.equal(torch.arange(64))
    for step, ids in enumerate(steps):
        scan.observe(ids, ids.float(), ids.float())
        sampler.set_epoch(0)  # in mid-epoch too
        again = [ids for ids, _ in loader] if step == 1 else steps
        assert all(map(torch.equal, steps, again)) and len(again) == 4
    with pytest.raises(ValueError, match="has not ended"):
        sampler.set_epoch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan.end_epoch()


def loss_and_grads(watch, world, rank):
    """A foreign loss on this rank's half, or the whole, of 8 pairs; with `watch` or without."""
    generator = torch.Generator().manual_seed(0)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    image, text = (F.normalize(torch.randn(8, 4, generator=generator), dim=1)[rows] for _ in range(2))
    image, text, scale = image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0, requires_grad=True)
    scan = Scan(8)
    scan.begin_epoch()
    if watch:
        scan.watch(torch.arange(8)[rows], image, text, scale)
        assert scan.observed == 8 and scan.loss_count == 8
    logits = scale * image @ text.T  # of this rank alone: unlike Eq. 1
    loss = F.cross_entropy(logits, torch.arange(len(image)))
    loss.backward()
    return loss.detach(), image.grad, text.grad, scale.grad, scan.loss_sum


def test_watch_leaves_a_foreign_loss_and_its_gradients_as_they_are():
    with_watch, without = loss_and_grads(True, 1, 0), loss_and_grads(False, 1, 0)
    assert all(map(torch.equal, with_watch[:-1], without[:-1]))
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(8, 4, generator=generator).double(), dim=1) for _ in range(2))
    logits = 10 * image @ text.T
    both = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2
    torch.testing.assert_close(with_watch[-1], both.sum(), rtol=1e-5, atol=0)


def watch_on(rank, world):
    *with_watch, loss_sum = loss_and_grads(True, world, rank)
    *without, _ = loss_and_grads(False, world, rank)
    assert all(map(torch.equal, with_watch, without))
    return loss_sum


@slow
def test_watch_leaves_gradients_as_they_are_on_two_ranks(tmp_path):
    alone = loss_and_grads(True, 1, 0)[-1]  # the losses that were watched are those of the global batch
    for loss_sum in run_ranks(watch_on, 2, tmp_path / "ranks"):
        torch.testing.assert_close(loss_sum, alone)


# ---------------------------------------------------------------- scan.py: orders without memory


def test_each_id_comes_once():
    for n in range(1, 301):
        assert scan_module._permutation(n, "a", n)(torch.arange(n)).sort().values.tolist() == list(
            range(n)
        ), n


@pytest.mark.parametrize("n", [2**20, 2**20 + 1, 3_000_017])
def test_each_id_comes_once_in_large_sets(n):
    seen = torch.zeros(n, dtype=torch.uint8)
    seen[scan_module._permutation(n, "a", n)(torch.arange(n))] += 1
    assert (seen == 1).all()


def test_orders_differ_and_repeat():
    def order(n, *key):
        return scan_module._permutation(n, *key)(torch.arange(n))

    n, keys = 10_000, [("order", seed, epoch) for seed in range(3) for epoch in range(3)]
    orders = [order(n, *key) for key in keys]
    assert all(order(n, *key).equal(x) for key, x in zip(keys, orders))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 12  # one by chance
    # the four ids of a small set take all their 24 orders
    found = Counter(tuple(order(4, "small", k).tolist()) for k in range(2400))
    assert len(found) == 24


@pytest.mark.parametrize("n", [2**16, 100_003])
@pytest.mark.parametrize("spread", ["neighbours", "residues"])
def test_an_order_is_uniform(n, spread):
    """Chi-square over 16 blocks of places x 16 blocks of ids, for 20 keys: far from the 5-sigma tails."""
    for k in range(20):
        ids = scan_module._permutation(n, "chi", k)(torch.arange(n))
        block = ids * 16 // n if spread == "neighbours" else ids % 16
        place = torch.arange(n) * 16 // n
        counts = torch.bincount(place * 16 + block, minlength=256).double()
        chi = ((counts - n / 256).square() / (n / 256)).sum().item()
        assert abs(chi - 225) < 5 * math.sqrt(2 * 225), (k, chi)
        steps = (
            ids[1:] - ids[:-1]
        ).abs().double().mean() / n  # 1/3 if neighbours in the order are independent
        assert abs(steps - 1 / 3) < 0.01
        correlation = torch.corrcoef(torch.stack([torch.arange(n).double(), ids.double()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)


def test_a_mask_leaves_out_and_keeps_the_order(monkeypatch):
    monkeypatch.setattr(scan_module, "_LARGE", 0)
    monkeypatch.setattr(scan_module, "_CHUNK", 100)
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = scan_module._permutation(1000, "order", 5)(torch.arange(1000))
    shuffled = torch.cat(list(scan_module._shuffled(mask, "order", 5)))
    assert shuffled.tolist() == [i for i in whole.tolist() if mask[i]]
    assert shuffled.tolist() != sorted(shuffled.tolist())


@pytest.mark.parametrize("large", [0, 2**24])
def test_large_sets_are_dealt_out_and_drawn_as_small_ones(monkeypatch, large):
    """Batches and draws, below and above the size from which orders take no memory."""
    monkeypatch.setattr(scan_module, "_LARGE", large)
    monkeypatch.setattr(scan_module, "_CHUNK", 64)
    s = Scan(1000, prune=0.25, seed=4)
    s.first_preparation = 0
    dealt = []
    for epoch in range(4):
        first, second = ScanSampler(s, 100, 0, 2), ScanSampler(s, 100, 1, 2)
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        first, second = list(first), list(second)
        assert len(first) == len(second) == s.num_kept // 100
        ids = torch.tensor([a + b for a, b in zip(first, second)])
        assert ids.shape == (s.num_kept // 100, 100) and ids.flatten().unique().numel() == ids.numel()
        assert s.kept_mask[ids].all()
        dealt.append(ids.flatten().tolist())
        share = {0: 0, 1: 0.25, 2: 0.75, 3: 1}[epoch]
        candidates = (s.redundant | s.ill_matched).sum().item()
        assert s.num_kept == 1000 - int(share * candidates)
        dropped = (~s.kept_mask).nonzero().flatten()
        assert (s.redundant | s.ill_matched)[dropped].all()
        for batch in ids:
            losses = (batch * 7919 % 1000).float()
            s.observe(batch, losses, losses)
        s.end_epoch()
    assert candidates == 500 and dealt[0][:100] != dealt[1][:100]
    # a resume goes on where it was
    sampler = ScanSampler(s, 100, 0, 1)
    sampler.set_epoch(4)
    whole = list(sampler)
    again = types.SimpleNamespace(kept_mask=s.kept_mask, num_kept=s.num_kept, seed=s.seed, open=True)
    resumed = ScanSampler(again, 100, 0, 1)
    resumed.epoch, resumed.start = 4, 3
    assert list(resumed) == whole[3:]


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


# ---------------------------------------------------------------- clip_model.py


@pytest.mark.parametrize(
    "arch, keys",
    [
        ("vit_tiny", "visual.transformer.resblocks.0.attn.in_proj_weight"),
        ("rn50", "visual.layer1.0.downsample.0.weight"),
        ("swin_b", "visual.head.weight"),
    ],
)
def test_models_give_unit_vectors_under_their_well_known_names(arch, keys):
    model = clip_model.create(arch, 64, vocab_size=50).eval()
    assert {keys, "token_embedding.weight", "text_projection", "logit_scale"} <= set(model.state_dict())
    assert not any("pixel" in name for name in model.state_dict())  # others would refuse what they don't know
    image, text, scale = model(torch.randn(2, 3, 64, 64), torch.tensor([[48, 5, 49], [48, 49, 0]]))
    assert image.shape == text.shape == (2, clip_model.ARCHS[arch]["embed_dim"])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    assert scale.item() == pytest.approx(1 / 0.07)
    with pytest.raises(ValueError, match="multiple"):
        clip_model.create(arch, 65)


def test_initial_weights_are_open_clips(monkeypatch):
    """The image tower keeps torch's own start, the text tower has OpenAI's."""
    sizes = dict(embed_dim=512, vision=dict(width=768, layers=1, patch=32), text=(512, 2))
    monkeypatch.setitem(clip_model.ARCHS, "vit_b32", sizes)
    torch.manual_seed(0)
    model = clip_model.create("vit_b32", 64, 1000)
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.ndim}
    image, text = "visual.transformer.resblocks.0.", "transformer.resblocks.1."
    for name, std in {
        image + "attn.in_proj_weight": 0.0255, image + "attn.out_proj.weight": 0.0208,
        image + "mlp.c_fc.weight": 0.0208, image + "mlp.c_proj.weight": 0.0104,
        image + "attn.in_proj_bias": 0, image + "attn.out_proj.bias": 0, image + "mlp.c_fc.bias": 0.0208,
        "visual.conv1.weight": 0.0104, "visual.positional_embedding": 0.0361, "visual.proj": 0.0361,
        text + "attn.in_proj_weight": 0.0442, text + "attn.out_proj.weight": 0.0221,
        text + "mlp.c_fc.weight": 0.03125, text + "mlp.c_proj.weight": 0.0221,
        text + "attn.out_proj.bias": 0, text + "mlp.c_fc.bias": 0.0255,
        "token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": 0.0442,
    }.items():  # fmt: skip
        assert spread[name] == pytest.approx(std, rel=0.06), name


def test_text_padding_changes_nothing():
    torch.manual_seed(0)
    model, words = clip_model.create("vit_tiny", 32).eval(), clip_model.HashedWords()
    tokens = data.pad([words(t) for t in ("a red circle", "two words", "a much longer caption, with signs!")])
    full = F.pad(tokens, (0, 77 - tokens.shape[1]))
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(full), rtol=1e-5, atol=1e-5)


def test_hashed_words():
    words = clip_model.HashedWords()
    expected = [1 + zlib.crc32(word) % 49405 for word in (b"red", b"circle", b"!")]
    assert words("Red CIRCLE!").tolist() == [49406, *expected, 49407]
    assert len(words("日本語 ok")) == 2 + 4
    assert len(words("w " * 500)) == 77 and words("w " * 500)[-1] == 49407
    assert words("ＡＢ ﬁ").tolist() == words("ab fi").tolist()


def test_bpe_with_a_small_vocabulary(tmp_path):
    path = tmp_path / "vocab.gz"
    path.write_bytes(gzip.compress(b"version\nr e\nre d</w>\nc a\nca t</w>\n"))
    bpe = clip_model.BPE(path)
    start, end = bpe.vocab_size - 2, bpe.vocab_size - 1
    assert bpe.vocab_size == 512 + 4 + 2
    # bytes are numbered from "!" = 0; the same with </w> from 256; merges from 512
    assert bpe("Red  CAT").tolist() == [start, 513, 515, end]
    assert bpe("cat's").tolist() == [start, 515, 6, ord("s") - 33 + 256, end]
    assert bpe("“red”").tolist() == [start, 1 + 256, 513, 1 + 256, end] == bpe("&quot;red&quot;").tolist()
    assert len(bpe("cat " * 200)) == 77 and bpe("cat " * 200)[-1] == end
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="vocab"):
        clip_model.BPE(path)


class PretendGPU(TorchDispatchMode):
    """Tensors sent to "cuda" become fake ones there; what would make the host wait for the GPU is noted."""

    def __init__(self):
        super().__init__()
        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)]
        before = {x.device.type for x in tensors}
        after = before | {torch.device(kwargs["device"]).type} if kwargs.get("device") else before
        masks = [x for x in tensors[1:] if x.dtype in (torch.bool, torch.uint8)]
        waiting = not kwargs.get("non_blocking") and args[-1] is not True
        if name in ("_to_copy", "copy_") and len(after) > 1 and waiting:
            self.waits.append("a blocking copy")
        sizes_unknown = name in ("nonzero", "masked_select") or (name.startswith("index") and masks)
        if "cuda" in before and (sizes_unknown or name == "_local_scalar_dense"):
            self.waits.append(name)
        if "cuda" in after:
            return function(*args, **kwargs)
        if name in ("_pin_memory", "is_pinned"):
            return args[0] if name == "_pin_memory" else False
        kwargs.pop("pin_memory", None)
        with unset_fake_temporarily():
            return function(*args, **kwargs)


@pytest.mark.parametrize("arch", ["vit_tiny", "rn50", "swin_b", "moco_vit_tiny"])
def test_a_step_never_makes_the_host_wait_for_the_gpu(arch):
    """In a preparation epoch, on a pretended GPU. (No backward pass: autograd's engine needs a real one.)"""
    mode = PretendGPU()
    with mode.fake, mode:
        if arch.startswith("moco"):
            model = moco.create(arch, 32)
            crops = torch.zeros(8, 2, 3, 32, 32, dtype=torch.uint8)
            batch = crops, torch.stack([moco.draw_views() for _ in range(8)])
        else:
            model = clip_model.create(arch, 32, vocab_size=50)
            batch = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.tensor([[48, 5, 49]] * 8)
        gpu = torch.device("cuda", 0)
        model.to(gpu)
        scan = Scan(100)
        scan.first_preparation = 0
        scan.begin_epoch(0)
        assert "a blocking copy" in mode.waits  # of the model's own: they are noticed
        mode.waits.clear()
        for _ in range(2):
            a, b, loss = model.losses(*model(*model.inputs(batch, gpu)))
            scan.observe(torch.arange(8), a, b)
        assert scan.stage == "preparation" and loss.device == scan.redundant.device == gpu
        assert not mode.waits


# ---------------------------------------------------------------- moco.py


def small_moco():
    torch.manual_seed(0)
    return moco.create("moco_vit_tiny", 32)


def test_moco_keys_come_from_a_moving_average_without_gradient():
    model, views = small_moco(), torch.randn(2, 8, 3, 32, 32, generator=generator())
    encoders = model.base_encoder, model.momentum_encoder
    assert all(p.equal(k) for p, k in zip(*(e.parameters() for e in encoders)))
    q1, q2, k1, k2 = model(*views)
    for x in (q1, q2, k1, k2):
        assert x.shape == (8, 128) and x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(8))
    assert q1.requires_grad and q2.requires_grad and not (k1.requires_grad or k2.requires_grad)
    with torch.no_grad():
        for p in model.base_encoder.parameters():
            p += 1
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    model.update_momentum_encoder(0.9)
    for old, base, new in zip(before, *(e.parameters() for e in encoders)):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * base)
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    frozen = {n for n, p in model.base_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_moco_loss_is_the_published_one():
    model, views = small_moco(), torch.randn(2, 8, 3, 32, 32, generator=generator())
    q1, q2, k1, k2 = model(*views)
    _, _, loss = model.losses(q1, q2, k1, k2)
    expected = sum(F.cross_entropy(q @ k.T / 0.2, torch.arange(8)) * 0.4 for q, k in ((q1, k2), (q2, k1)))
    torch.testing.assert_close(loss, expected)
    assert [round(moco.momentum(progress), 6) for progress in (0, 0.5, 1)] == [0.99, 0.995, 1.0]


def test_sincos_positions_are_fixed_and_differ():
    positions = moco.sincos_positions(4, 32)
    assert positions.shape == (1, 17, 32) and not positions[0, 0].any()
    assert len(positions[0].unique(dim=0)) == 17
    row, column = 2, 3
    expected = torch.tensor([math.sin(row), math.cos(row), math.sin(column), math.cos(column)])
    torch.testing.assert_close(positions[0, 1 + 4 * row + column, ::8], expected)


def moco_step(rank, world):
    """Losses, averaged gradients and batch-norm statistics of one step at a global batch of 16."""
    model, views = small_moco(), torch.randn(2, 16, 3, 32, 32, generator=generator())
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    model.update_momentum_encoder(0.9)
    a, b, loss = model.losses(*train.forward(model, views[:, mine], FLOAT32))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for grad in grads:
        if world > 1:
            dist.all_reduce(grad)
            grad /= world
    return {"a": a.detach(), "b": b.detach(), "grads": grads, "buffers": list(model.buffers())}


@slow
def test_moco_ranks_equal_one_process(tmp_path):
    alone, ranks = moco_step(0, 1), run_ranks(moco_step, 2, tmp_path / "ranks")
    for name in "ab":
        torch.testing.assert_close(torch.cat([r[name] for r in ranks]), alone[name], rtol=0, atol=1e-5)
    for r in ranks:
        for name in ("grads", "buffers"):
            for mine, expected in zip(r[name], alone[name]):
                torch.testing.assert_close(mine, expected, rtol=1e-3, atol=2e-6)


def test_augmentation_equals_torchvision_sample_by_sample():
    images = (torch.rand(48, 3, 24, 24, generator=generator()) * 255).to(torch.uint8)
    images[:16, 0] = 7  # flat channels: hues at the corners
    torch.manual_seed(0)
    drawn = torch.stack([moco.draw_view(0.5, 0.5) for _ in images])
    adjust = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for x, numbers, mine in zip(images / 255, drawn, moco.augment(images, *moco.plan(drawn)) / 255):
        for kind in list(itertools.permutations(range(4)))[int(numbers[moco.ORDER])]:
            x = adjust[kind](x, numbers[kind].item())
        if numbers[moco.GREY]:
            x = V.rgb_to_grayscale(x, 3)
        if numbers[moco.SIGMA]:
            x = V.gaussian_blur(x, [13, 13], [numbers[moco.SIGMA].item()] * 2)
        if numbers[moco.SOLARIZE]:
            x = V.solarize(x, 128 / 255)
        if numbers[moco.FLIP]:
            x = V.horizontal_flip(x)
        assert ((x - mine).abs() < 2e-3).double().mean() > 0.99  # but where solarizing tips at its threshold
    neutral = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0, 0]] * 48)
    torch.testing.assert_close(moco.augment(images, *moco.plan(neutral)), images.float(), rtol=0, atol=1e-3)
    model = small_moco()
    crops, numbers = images[:24].unflatten(0, (12, 2)), drawn[:24].unflatten(0, (12, 2))
    for k, view in enumerate(model.inputs((crops, numbers), torch.device("cpu"))):
        expected = moco.augment(crops[:, k], *moco.plan(numbers[:, k])) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(view, (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_views_follow_the_stated_distributions_and_differ_per_sample():
    torch.manual_seed(0)
    n = 4000
    drawn = torch.stack([moco.draw_views() for _ in range(n)])
    for x, blur, solarize in ((drawn[:, 0], 1.0, 0.0), (drawn[:, 1], 0.1, 0.2)):
        jittered = x[:, moco.BRIGHTNESS] != 1
        blurred = x[:, moco.SIGMA] > 0
        for chosen, p in (
            (jittered, 0.8), (x[:, moco.GREY], 0.2), (x[:, moco.FLIP], 0.5),
            (blurred, blur), (x[:, moco.SOLARIZE], solarize),
        ):  # fmt: skip
            assert abs(chosen.double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / n)
        for kind, centre, reach in zip(range(4), (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1)):
            values = x[jittered, kind]
            assert (values - centre).abs().max() <= reach + 1e-6
            assert values.std() == pytest.approx(reach / math.sqrt(3), rel=0.05)
        sigma = x[blurred, moco.SIGMA]
        assert 0.1 <= sigma.min() and sigma.max() <= 2 and sigma.mean() == pytest.approx(1.05, rel=0.08)
        assert len(x[jittered, moco.ORDER].unique()) == 24


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


def bytes_in(value):
    """A short name of a test's parameter."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else None


ORIENTED = Image.Exif()
ORIENTED[274] = 6  # to be turned by a quarter


@pytest.mark.parametrize("content, size, pixel", [
    (jpeg((200, 30, 30)), (40, 30), (200, 30, 30)),
    (jpeg((200, 30, 30), mode="CMYK"), (40, 30), (200, 30, 30)),
    (jpeg((99, 99, 99), mode="L"), (40, 30), (99, 99, 99)),
    (jpeg((200, 30, 30), form="PNG", mode="P"), (40, 30), (204, 51, 51)),  # of the web palette
    (jpeg((200, 30, 30), form="GIF"), (40, 30), (200, 30, 30)),
    (jpeg((200, 30, 30), form="TIFF"), (40, 30), (200, 30, 30)),
    (jpeg((200, 30, 30), form="BMP", size=(1, 1)), (1, 1), (200, 30, 30)),
    (encoded(Image.fromarray(np.full((4, 4), 30000, np.uint16))), (4, 4), (117, 117, 117)),
    (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), (4, 4), (255, 255, 255)),
    (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (4, 4), (255, 255, 255)),
    (encoded(Image.new("LA", (4, 4), (0, 128))), (4, 4), (127, 127, 127)),
    (encoded(Image.new("RGB", (40, 20), (9, 9, 9)), "JPEG", exif=ORIENTED), (20, 40), (9, 9, 9)),
], ids=bytes_in)  # fmt: skip
def test_pictures_of_every_kind_become_rgb(content, size, pixel):
    picture = data.decode(content)
    assert picture.mode == "RGB" and picture.size == size
    assert np.abs(np.array(picture.getpixel((0, 0))) - pixel).max() <= 5


def test_a_jpeg_is_decoded_no_smaller_than_the_draft():
    content = encoded(noise(400, 300), "JPEG")
    assert [data.decode(content, draft).size for draft in (None, 151, 150, 75)] == [
        (400, 300), (400, 300), (200, 150), (100, 75)
    ]  # fmt: skip
    crop = data.RandomCrop(64, 0.25)
    assert crop.draft == 128  # a quarter of the area of 128 x 128 is 64 x 64


@pytest.mark.parametrize("mode, smallest", [("bicubic", 0.9), ("bilinear", 0.08)])
def test_random_crops_are_those_of_torchvision(mode, smallest):
    expected = v2.RandomResizedCrop(48, (smallest, 1.0), interpolation=v2.InterpolationMode(mode))
    for seed, (width, height) in enumerate(itertools.product((1, 3, 40, 97, 300), repeat=2)):
        picture = noise(width, height, seed)
        torch.manual_seed(seed)
        ours, after = data.RandomCrop(48, smallest, mode)(picture), torch.rand(1)
        torch.manual_seed(seed)
        difference = (v2.functional.pil_to_tensor(expected(picture)).int() - ours.int()).abs()
        assert torch.rand(1).equal(after)
        assert ours.shape == (3, 48, 48) and ours.dtype == torch.uint8
        assert difference.max() <= 2 and (difference > 0).double().mean() < 0.1


def test_a_crops_box_is_that_of_torchvision():
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, draw.choice([3, 60, 700], (2000, 2)) + 1)
    cases = [
        (seed, height, width, (0.08, 0.9)[seed % 2]) for seed, (height, width) in enumerate(sizes.tolist())
    ]
    cases += [(1279, 4000, 3000, 0.08), (9543, 4000, 3000, 0.9)]  # another box, if exp were in float64
    for seed, height, width, smallest in cases:
        torch.manual_seed(seed)
        ours, after = data.RandomCrop(48, smallest).box(height, width), torch.rand(1)
        torch.manual_seed(seed)
        picture = torch.empty(3, height, width, device="meta")
        assert v2.RandomResizedCrop.get_params(picture, (smallest, 1.0), (3 / 4, 4 / 3)) == ours
        assert torch.rand(1).equal(after)


def test_evaluation_sees_the_middle():
    picture = noise(90, 60)
    for size, crop, side in ((32, 1.0, 32), (28, 0.875, 32)):
        shorter = picture.resize((side * 90 // 60, side), Image.Resampling.BICUBIC)
        left, top = (shorter.width - size) / 2, (side - size) / 2
        expected = shorter.crop((int(left), int(top), int(left) + size, int(top) + size))
        seen = data.eval_transform(size, crop)(picture)
        assert seen.dtype == torch.uint8 and seen.permute(1, 2, 0).equal(torch.tensor(np.array(expected)))
    plain = data.eval_transform(32, interpolation=v2.InterpolationMode.BILINEAR)(picture)
    assert not plain.equal(data.eval_transform(32)(picture))


# ---------------------------------------------------------------- data.py: sources


def refuses(path, message, **options):
    """open_source says what is wrong, in one line."""
    with pytest.raises(data.UserError, match=message) as error:
        data.open_source(str(path), **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def seconds():
    """Ten, for what might wait for a pipe or never end; then no Exception, which a dataset would catch."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still not done"))
    signal.alarm(10)
    yield
    signal.alarm(0)


def write_tar(path, members, form=tarfile.DEFAULT_FORMAT, mtime=0):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def shard(path, first, n):
    members = []
    for i in range(first, first + n):
        members += [(f"{i:05}.jpg", jpeg((5 * i % 256, 99, 30))), (f"{i:05}.txt", f"caption {i}".encode())]
        members += [(f"{i:05}.json", json.dumps({"key": i}).encode())]
    return write_tar(path, members)


def test_shards_are_read_by_position(tmp_path):
    for k in range(3):
        shard(tmp_path / f"{k:05}.tar", 10 * k, 10)
    for spec in ("{00000..00002}.tar", "*.tar", "{00000,00001,00002}.tar"):
        source = data.open_source(str(tmp_path / spec))
        assert [source.caption(i) for i in (0, 9, 10, 29)] == [f"caption {i}" for i in (0, 9, 10, 29)]
        assert source.meta(17) == {"key": 17} and source.image(17).size == (40, 30)
        assert "00001.tar, 00017.jpg at byte" in source.where(17)
    joined = data.open_source(f"{tmp_path}/00002.tar::{tmp_path}/00000.tar")
    assert len(joined) == 20 and joined.caption(0) == "caption 20"
    copied = pickle.loads(pickle.dumps(joined))  # as loading processes may get it
    assert not copied._files and copied.caption(19) == "caption 9"
    assert joined.fingerprint() != data.open_source(str(tmp_path / "0000[02].tar")).fingerprint()
    assert joined.fingerprint() == data.open_source(f"{tmp_path}/0000{{2,0}}.tar").fingerprint()
    Path(tmp_path / "00000.tar").rename(tmp_path / "3.tar")
    assert joined.fingerprint() != data.open_source(f"{tmp_path}/00002.tar::{tmp_path}/3.tar").fingerprint()


def test_an_index_follows_its_tar_and_damage_to_it_shows(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    assert len(data.open_source(path)) == 3
    (cache,) = (tmp_path / "cache" / "scan").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(whole[:100] + b"\7" + whole[101:])
    assert data.open_source(path).caption(0) == "caption 0" and cache.read_bytes() == whole
    old = data.open_source(path)
    shard(tmp_path / "a.tar", 99, 3)
    assert data.open_source(path).caption(2) == "caption 101"
    assert data.open_source(path).fingerprint() != old.fingerprint()  # by the lengths of its captions
    with pytest.raises(data.UserError, match="changed since"):
        old.caption(0)


def test_no_more_tars_are_open_than_may_be(tmp_path, monkeypatch):
    for k in range(4):
        shard(tmp_path / f"{k}.tar", k, 1)
    monkeypatch.setattr(data, "_MOST_OPEN", 2)
    source = data.open_source(str(tmp_path / "*.tar"))
    for k in (0, 1, 2, 3, 2, 0, 0, 1):
        assert source.caption(k) == f"caption {k}" and len(source._files) <= 2


def test_ranks_index_from_places_of_their_own_and_share_the_cache(tmp_path, monkeypatch, capsys):
    paths = [shard(tmp_path / f"{k}.tar", 10 * k, 2) for k in range(4)]
    opened, index = [], data._tar_index
    monkeypatch.setattr(data, "_tar_index", lambda path: opened.append(path) or index(path))
    monkeypatch.setenv("LOCAL_RANK", "1"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    second = data.open_source(str(tmp_path / "*.tar"))
    assert opened == [paths[k] for k in (2, 3, 0, 1)]
    numbers = (0, 1, 10, 11, 20, 21, 30, 31)
    assert [second.caption(i) for i in range(8)] == [f"caption {k}" for k in numbers]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(data, "_plain_members", None)  # nothing is indexed twice
    ticks = itertools.chain([0], itertools.repeat(5))  # the first tar took long, the others no time
    monkeypatch.setattr(data.time, "monotonic", lambda: next(ticks))
    assert data.open_source(str(tmp_path / "*.tar")).fingerprint() == second.fingerprint()
    said = capsys.readouterr().err
    assert "\rindexing: 1 of 4 tar files, 2 samples" in said and said.endswith("4 tar files, 8 samples\n")
    Path(paths[1]).unlink()
    with pytest.raises(data.UserError, match="1.tar: No such file"):
        data.Pairs(pickle.loads(pickle.dumps(second)), WORDS, 8)[2]


@slow
def test_many_new_tars_are_indexed_by_several_processes(tmp_path, monkeypatch):
    for k in range(4):
        shard(tmp_path / f"{k}.tar", 10 * k, 2)
    monkeypatch.setattr(data, "_MANY_TARS", 4)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 2)
    here, members, done = os.getpid(), data._plain_members, []

    def watched(file):
        done.extend([1] if os.getpid() == here else [])  # this process indexes none
        return members(file)

    monkeypatch.setattr(data, "_plain_members", watched)
    source = data.open_source(str(tmp_path / "*.tar"))
    assert not done
    assert [source.caption(i) for i in (0, 3, 7)] == ["caption 0", "caption 11", "caption 31"]
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    refuses(tmp_path / "*.tar", "2.tar: not a whole tar")


LONG = "a/long/name/" * 12  # takes headers of its own
FORMS = {  # form, time and folder of a tar's members, and whether its headers are plain
    "ustar": (tarfile.USTAR_FORMAT, 0, "", True),
    "gnu": (tarfile.GNU_FORMAT, 1.6e9, "a/", True),
    "pax": (tarfile.PAX_FORMAT, 0, "../../", True),  # read in place, never extracted
    "webdataset's": (tarfile.PAX_FORMAT, 1600000000.25, "", True),
    "ustar, prefix": (tarfile.USTAR_FORMAT, 0, LONG, False),
    "gnu, long": (tarfile.GNU_FORMAT, 0, LONG, False),
    "pax, long": (tarfile.PAX_FORMAT, 0, LONG, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_plain_tars_are_indexed_as_tarfile_reads_them(tmp_path, form):
    form, mtime, folder, plain = FORMS[form]
    members = [(f"{folder}{k}.{kind}", bytes([k]) * 300 * k) for k in range(5) for kind in ("PNG", "txt")]
    path = write_tar(tmp_path / "a.tar", members, form, int(mtime) if mtime == 1.6e9 else mtime)
    with tarfile.open(path, "a", format=form) as tar:
        for name, kind in (("8.png", tarfile.DIRTYPE), ("9.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.png"
            tar.addfile(info)
    with open(path, "rb") as file:
        found = list(data._members(file))
        file.seek(0)
        assert [(name, file.seek(at) and file.read(size)) for name, at, size in found] == members
        if plain:
            assert list(data._plain_members(file)) == found
        else:
            with pytest.raises(ValueError):
                list(data._plain_members(file))
    source = data.open_source(path)
    assert [source._read(i, part) for i in range(5) for part in (0, 1)] == [content for _, content in members]
    assert len(source) == 5 and {p.name for p in tmp_path.iterdir()} == {"a.tar", "cache"}


def times(record):
    """A PAX header with one record for the next member."""
    return header("x", len(record), type=b"x") + record + bytes(512 - len(record))


def header(name, size, **fields):
    """One tar header, as a broken or hostile writer might leave it."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksums(content):
    """Bytes of a tar, whose headers get the checksum of what is in them: else damage never comes further."""
    content = bytearray(content)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            total = 256 + sum(content[at : at + 148]) + sum(content[at + 156 : at + 512])
            content[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(content)


GOOD = b"".join([header("a.png", 9), bytes(512), header("a.txt", 3), b"red", bytes(509 + 1024)])
NEGATIVE = header("b.png", 100)  # but with a negative size, in base 256
NEGATIVE = with_checksums(NEGATIVE[:124] + b"\xff" * 11 + b"\0" + NEGATIVE[136:])
NO_TARS = [
    gzip.compress(GOOD), b"", b"hello" * 500, header("b.png", 1 << 40) + bytes(2048), NEGATIVE + bytes(2048),
    GOOD[:100], GOOD[:700], GOOD[:1024], GOOD[:1300], GOOD[:2048], GOOD[:2048] + GOOD[:300],  # no end mark
    GOOD[:1024] + b"x" + GOOD[1025:], GOOD[:250] + b"x" + GOOD[251:],  # the second in no field that is read
    GOOD + bytes(1 << 20) + GOOD, GOOD + GOOD,
    GOOD[:-1024] + times(b"11 mtime=1\n"), GOOD[:-1024] + times(b"11 mtime=1\n") + bytes(1024),
]  # fmt: skip
LINKS = header("1.jpg", 0, type=b"2", linkname="/etc/passwd") + header("1.txt", 0, type=b"5") + bytes(1024)
NO_SAMPLES = [bytes(10240), GOOD[1024:], LINKS]  # the second: captions alone


@pytest.mark.parametrize("name, content, message", [
    *[("a.tar", content, "not a whole tar") for content in NO_TARS],
    *[("a.tar", content, "no sample") for content in NO_SAMPLES],
    ("a.csv", b"file;caption\na;b\n", "no columns 'filepath'"), ("a.csv", b"", "no columns 'filepath'"),
    ("a.csv", b"filepath,title\n", "no rows"), ("a.csv", b"filepath,title\na\n", "line 2"),
    ("a.csv", b'filepath,title\na,b\nc,"d\ne,f\n', "line 3: a quote"),
], ids=bytes_in)  # fmt: skip
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, f"{name}(:|,) {message}")


@pytest.mark.parametrize("unusual", [
    header("b/", 0, type=b"\0") + header("b.txt", 3) + b"red" + bytes(509),  # a folder, in very old tars
    header("b.png", 3, type=b"7") + b"red" + bytes(509),  # "contiguous": a file
    header("b.png", 0, type=b"1", linkname="a.png"),
    times(b"11 mtime=1\n") + header("b.png", 0), times(b"12 mtime=1\n") + header("b.png", 0),
    times(b"11 mtime=1\n"), times(b"14 path=b.png\n") + header("c.txt", 3) + b"red" + bytes(509),
    times(b"11 mtime=1\n" + bytes(4) + b"14 path=b.png\n") + header("c.txt", 0),
    header("b.png", 3)[:148] + b"00012\0 \0" + header("b.png", 3)[156:] + b"red" + bytes(509),
], ids=bytes_in)  # fmt: skip
def test_unusual_headers_are_read_as_tarfile_does_or_refused(tmp_path, unusual):
    (tmp_path / "a.tar").write_bytes(unusual + GOOD)
    with open(tmp_path / "a.tar", "rb") as file:
        try:
            expected = list(data._members(file))
        except (tarfile.TarError, ValueError):
            expected = None
        try:
            assert list(data._plain_members(file)) == expected
        except ValueError:
            pass  # left to tarfile


@pytest.mark.parametrize("name", ["pipe.tar", "pipe.csv"])
def test_nobody_waits_for_a_pipe(tmp_path, name, seconds):
    os.mkfifo(tmp_path / name)
    refuses(tmp_path / name, f"{name}: not a regular file")


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tables_of_any_delimiter(tmp_path, delimiter):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "ü.jpg").write_bytes(jpeg())
    rows = [
        ["n", "title", "filepath"],
        ["1", '"two\nlines, quoted"', "img/ü.jpg"],
        ["2", "plain", "img/ü.jpg"],
    ]
    rows += [["3", "", "x.jpg"]]
    (tmp_path / "a.tsv").write_text("\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    source = data.open_source(str(tmp_path / "a.tsv"))
    assert [source.caption(i) for i in range(3)] == ["two\nlines, quoted", "plain", ""]
    assert source.image(1).size == (40, 30) and source.same_images() == ([0, 2], [0, 0, 1])
    (tmp_path / "b.tsv").write_text((tmp_path / "a.tsv").read_text().replace("plain", "Plain"))
    assert data.open_source(str(tmp_path / "b.tsv")).fingerprint() != source.fingerprint()


def test_class_folders_of_every_format(tmp_path):
    forms = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")
    for k, form in enumerate(forms):
        folder = tmp_path / f"class {k % 2}" / ("", "!", "!-")[k % 3]  # before the files, by name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.{form}").write_bytes(encoded(noise(16, 12), form))
    for name in ("notes.txt", "raw.CR2", "raw.cr2"):
        (tmp_path / "class 0" / name).write_bytes(b"x")
    expected = ImageFolder(tmp_path, is_valid_file=lambda path: os.path.basename(path)[0].isdigit())
    (tmp_path / "class 0" / "again").symlink_to(".")  # would repeat its pictures without end
    source = data.open_source(str(tmp_path))
    assert [source.where(i) for i in range(len(source))] == [path for path, _ in expected.samples]
    assert len(source) == len(forms) and all(source.image(i).size == (16, 12) for i in range(len(source)))
    assert source.skipped == {".txt": 1, ".cr2": 2} and data.Shapes(2).skipped == {}
    assert source.caption(0) == "class 0" and source.labels.tolist() == expected.targets


def test_pictures_alone_are_enough_for_moco(tmp_path):
    (tmp_path / "flat").mkdir()
    for k in range(3):
        (tmp_path / "flat" / f"{k}.jpg").write_bytes(jpeg())
    assert len(data.open_source(str(tmp_path / "flat"), captions=False)) == 3
    refuses(tmp_path / "flat", "no class folders")
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", jpeg()), ("1.jpg", jpeg())])
    assert len(data.open_source(tar, captions=False)) == 2
    refuses(tar, "no sample")


GROUPS = [json.dumps({"group": group}).encode() for group in ("food", "animals", "food")]


@pytest.mark.parametrize("parts, label_key, expected", [
    (dict(cls=[b"10", b"9", b"10"]), None, (["9", "10"], [1, 0, 1])),
    (dict(cls=[b"x\n", b"b", b"x"]), None, (["b", "x"], [1, 0, 1])),
    (dict(json=GROUPS, cls=[b"1"] * 3), "group", (["animals", "food"], [1, 0, 1])),
    (dict(json=GROUPS), None, (None, None)),
    (dict(cls=[b"1", None, b"2"]), None, "a.tar, 1.jpg at byte .*: no .cls"),
    (dict(json=[b"[]"] * 3), "group", "no names"), (dict(json=GROUPS[:2] + [None]), "group", "neither"),
    (dict(json=GROUPS), "kind", "no 'kind'"),
])  # fmt: skip
def test_labels_of_tars(tmp_path, parts, label_key, expected):
    members = [(f"{k}.{kind}", values[k]) for k in range(3) for kind, values in parts.items() if values[k]]
    members = sorted(members + [(f"{k}.jpg", jpeg()) for k in range(3)])
    path = write_tar(tmp_path / "a.tar", members)
    source = data.open_source(path, captions=False, label_key=label_key)
    if isinstance(expected, str):
        with pytest.raises(data.UserError, match=expected):
            source.labels  # noqa: B018
    else:
        labels = None if source.labels is None else source.labels.tolist()
        assert (source.classes, labels) == expected


def test_labels_of_tables(tmp_path):
    (tmp_path / "a.csv").write_text("filepath,title,group\na.jpg,x,food\nb.jpg,y,animals\n")
    source = data.open_source(str(tmp_path / "a.csv"), label_key="group")
    assert source.classes == ["animals", "food"] and source.labels.tolist() == [1, 0]
    refuses(tmp_path / "a.csv", "no column 'kind'", label_key="kind")


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


def test_shapes_with_a_long_tail():
    source = data.open_source("shapes:4000,zipf")
    counts = np.sort(np.bincount(source.labels, minlength=64))[::-1]
    expected = 4000 / np.arange(1, 65) / (1 / np.arange(1, 65)).sum()
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 3).all()
    other = data.open_source("shapes:4000,zipf", seed=1)
    assert np.bincount(other.labels).argmax() == np.bincount(source.labels).argmax()  # alike for every seed
    balanced = data.open_source("shapes:128,zipf", train=False)
    assert np.bincount(balanced.labels).tolist() == [2] * 64
    assert source.fingerprint() != data.open_source("shapes:4000").fingerprint()
    refuses("shapes:zipf", "zipf")


# ---------------------------------------------------------------- data.py: the datasets


WORDS = clip_model.HashedWords()


def test_two_views_differ_and_repeat():
    def crops(**options):
        return (
            data.Pairs(data.Shapes(8), WORDS, 32, **options),
            data.Views(data.Shapes(8), 32, moco.draw_views, **options),
        )

    for dataset, other in zip(crops(), crops(seed=1)):
        torch.manual_seed(0)
        before, first = torch.get_rng_state(), dataset[3]
        assert torch.get_rng_state().equal(before)
        torch.rand(5)
        assert all(torch.equal(x, y) for x, y in zip(dataset[3][2:], first[2:]))
        assert not other[3][2].equal(first[2])
        dataset.set_epoch(1)
        assert not dataset[3][2].equal(first[2])
    views = crops()[1]
    _, _, two_crops, numbers = views[3]
    assert two_crops.shape == (2, 3, 32, 32) and numbers.shape == (2, 9)
    assert not two_crops[0].equal(two_crops[1]) and not numbers[0].equal(numbers[1])
    assert not views[4][3].equal(numbers) and list(views.truth) == ["redundant"]


class Stub:
    """A source of a billion pictures, of which all before `good` can't be read."""

    truth = {}
    good = 0

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 10**9

    def image(self, i, draft=None):
        self.asked.append(i)
        if i < self.good or self.good < 0:
            raise TypeError(f"a bug\nat {i}")
        return Image.new("RGB", (8, 8))

    def caption(self, i):
        return f"number {i}"

    def where(self, i):
        return f"place {i}"


def test_any_id_of_a_billion_is_read_at_once(seconds):
    source = Stub()
    pairs = data.Pairs(source, WORDS, 8)
    assert pairs[10**9 - 1][:2] == (10**9 - 1, -1)
    source.good = 2
    assert pairs[0][:2] == (2, 0) and pairs[1][:2] == (2, 1)
    source.good, source.asked = -1, []
    with pytest.raises(data.UserError, match="100 samples.*8: TypeError: a bug at 999999998") as error:
        pairs[10**9 - 2]
    assert source.asked == [10**9 - 2, 10**9 - 1, *range(98)] and "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, TypeError)
    assert pairs.why(5) == "place 5: TypeError: a bug at 5"
    source.good = 0
    assert pairs.why(5) == "place 5: can be read now"


def test_batches_name_only_what_failed():
    image, tokens, views = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.tensor([7, 8]), torch.ones(2, 9)
    ids, failed, images, padded = data.collate([(5, -1, image, tokens), (7, 6, image, tokens[:1])])
    assert ids.tolist() == [5, 7] and failed.tolist() == [6] and images.shape == (2, 3, 4, 4)
    assert padded.tolist() == [[7, 8], [7, 0]]
    _, failed, _, numbers = data.collate([(0, -1, image, views)] * 3)
    assert failed.shape == (0,) and failed.dtype == ids.dtype == torch.int64 and numbers.shape == (3, 2, 9)


def test_mismatch_shuffles_its_share_and_keeps_the_truth():
    source = data.Shapes(200, ill_matched=0, duplicates=0)
    pairs = data.Pairs(source, WORDS, 16, mismatch=0.2)
    moved = pairs.truth["ill_matched"]
    assert moved.sum() == 40
    assert all((pairs.caption_of[i] != i) == moved[i] for i in range(200))
    assert sorted(pairs.caption_of) == list(range(200))
    one = int(np.flatnonzero(moved)[0])
    assert pairs[one][3].tolist() == WORDS(source.caption(pairs.caption_of[one])).tolist()
    assert pairs.fingerprint() != data.Pairs(source, None, 16).fingerprint()


BOMB = bytearray(png("red"))
BOMB[16:24] = (10_000).to_bytes(4, "big") * 2
BOMB[29:33] = zlib.crc32(BOMB[12:29]).to_bytes(4, "big")
FLIPPED = bytearray(png("red"))
FLIPPED[-20] ^= 1  # in the checksum of the pixels
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
BAD_SAMPLES = [  # a picture, its text, and what is said of them
    (b"", (".txt", b"x"), "no picture, but 0 bytes"),
    (b"words", (".txt", b"x"), "no picture, but 5 bytes: b'words'"),
    (encoded(Image.new("RGB", (8, 8)), "PCX"), (".txt", b"x"), "no picture"),  # of no format we ask for
    (b"GIF89a" + bytes(20), (".txt", b"x"), ""),
    (bytes(BOMB), (".txt", b"x"), "10000 x 10000 pixels"),
    (png("red", (2001, 2)), (".txt", b"x"), "2001 x 2 pixels"),
    (jpeg(size=(64, 64))[:300], (".txt", b"x"), ""),
    (encoded(noise(64, 64), "JPEG")[:-200], (".txt", b"x"), "truncated"),
    (NOISE[:-200] + bytes(200), (".txt", b"x"), "ends in zeros"),
    (png("red")[:-30], (".txt", b"x"), ""),
    (bytes(FLIPPED), (".txt", b"x"), "checksum"),
    (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), (".txt", b"x"), "not finite"),
    (png("red"), (".txt", b""), "caption is empty"),
    (png("red"), (".txt", b" \n\t"), "caption is empty"),
    (png("red"), (".txt", b"caf\xe9 noir"), "caption is not UTF-8 after 'caf'"),
    (png("red"), (".txt", "red".encode("utf-16")), "caption is not UTF-8"),
    (png("red"), (".txt", bytes(9)), "NUL"),
    (png("red"), (".json", b"[1, 2]"), "no names and values"),
    (png("red"), (".json", b'{"caption": null}'), 'no text under "caption"'),
    (png("red"), (".json", b'{"text": "x"}'), 'no text under "caption"'),
    (png("red"), (".json", b'{"caption": "\\ud800"}'), "not UTF-8"),
    (png("red"), (".json", b"{"), ".json can't be read"),
    (png("red"), (".json", b"\xff\xfe"), ".json can't be read"),
    (png("red"), (".cls", b"1"), "neither a .txt nor a .json"),
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


def test_bad_rows_of_a_table_are_replaced_and_the_cause_is_said(tmp_path, seconds):
    causes = {
        b"folder,x": "",
        b"pipe,x": "not a regular file",
        b"/dev/null,x": "not a regular file",
        b"missing.png,x": f"{tmp_path}/missing.png (row 4 below the header of {tmp_path}/a.csv): No such",
        b"good.png,caf\xe9": "not UTF-8 after 'caf'",
        b"good.png,": "caption is empty",
    }
    (tmp_path / "folder").mkdir(), os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good.png").write_bytes(png("blue"))
    (tmp_path / "a.csv").write_bytes(b"\n".join([b"filepath,title", *causes, b"good.png,x"]))
    pairs = data.Pairs(data.open_source(str(tmp_path / "a.csv")), WORDS, 16)
    assert [pairs[i][:2] for i in range(7)] == [(6, i) for i in range(6)] + [(6, -1)]
    for i, cause in enumerate(causes.values()):
        assert f"(row {i + 1} below the header of" in pairs.why(i) and cause in pairs.why(i)


@pytest.mark.parametrize("text", [
    b"x" * 10_000_000, b"\xef\xbb\xbfred", "\u202e".encode(), "é".encode() * 9999, b"y" + "é".encode() * 9999
])  # fmt: skip
def test_odd_captions_give_tokens(text, tmp_path):
    source = data.open_source(write_tar(tmp_path / "a.tar", [("a.png", png("red")), ("a.txt", text)]))
    used, failed, _, tokens = data.Pairs(source, WORDS, 16)[0]
    assert (used, failed) == (0, -1) and 3 <= len(tokens) <= 77
    assert text.decode("utf-8-sig").startswith(source.caption(0)) and len(data.clean("x" * 9999)) < 5000


# ---------------------------------------------------------------- data.py: fuzz


def mutate(content, rng):
    """Bits flipped, or a stretch cut off, zeroed, doubled, left out or copied over another."""
    a, b = sorted(rng.integers(0, len(content) + 1, 2))
    b = min(b, a + int(rng.choice([1, 16, 512, 4096])))
    at = int(rng.integers(0, len(content) - (b - a) + 1))
    flipped = bytearray(content)
    for k in rng.integers(0, len(content), 2):
        flipped[k] ^= 1 << int(rng.integers(8))

    def over(at, stretch):
        return content[:at] + stretch + content[at + len(stretch) :]

    doubled, less = content[:b] + content[a:], content[:a] + content[b:]
    kinds = flipped, content[:a], over(a, bytes(b - a)), doubled, less, over(at, content[a:b])
    return bytes(kinds[rng.integers(6)])


def opened(path):
    """The source of a file; None if it is refused, in one line."""
    try:
        return data.open_source(str(path))
    except data.UserError as error:
        assert "\n" not in str(error)


FUZZ = int(os.environ.get("SCAN_FUZZ", 1))  # how many times the usual number of mutations


def plainly(path):
    """(image, caption or None) bytes of a tar's samples, as tarfile reads them from the start to the end."""
    samples, last = [], None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            stem, _, kind = os.path.basename(member.name).partition(".")
            key = os.path.dirname(member.name), stem
            if member.isreg() and not member.issparse() and kind.lower() in ("png", "txt"):
                if key != last:
                    samples.append({})
                samples[-1].setdefault(kind.lower(), tar.extractfile(member).read())
                last = key
    return [(s["png"], s.get("txt")) for s in samples if "png" in s]


@pytest.mark.parametrize("form", ["ustar", "webdataset's", "pax, long", "gnu", "gnu, long"])
def test_fuzzed_tars_give_what_they_hold_or_are_refused(tmp_path, form, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # no cache: written anew, a file may look the same
    form, mtime, folder, _ = FORMS[form]
    colours, members = [(40 * k, 9, 99) for k in range(5)], []
    for k, colour in enumerate(colours):
        members += [(f"{folder}{k}.png", png(colour)), (f"{folder}{k}.txt", b"caption number %d" % k)]
    path = tmp_path / "a.tar"
    original = Path(write_tar(path, members, form, mtime if form == tarfile.PAX_FORMAT else 0)).read_bytes()
    original = original.rstrip(b"\0")
    original += bytes(-len(original) % 512 + 1024)
    read = refused = replaced = 0
    for seed in range(100 * FUZZ):
        rng = np.random.default_rng(seed)
        content = mutate(original, rng)
        path.write_bytes(with_checksums(content) if rng.integers(2) else content)
        source = opened(path)
        if source is None:
            refused += 1
            continue
        expected = plainly(path)
        assert [source._read(i, 0) for i in range(len(source))] == [image for image, _ in expected], seed
        pairs = data.Pairs(source, WORDS, 8)
        try:
            items = [pairs[i] for i in range(len(pairs))]
        except data.UserError as error:
            assert "not one of" in str(error)
            continue
        for i, (used, failed, image, tokens) in enumerate(items):
            text = expected[used][1]
            assert failed == (-1 if used == i else i) and tokens.tolist() == WORDS(text.decode()).tolist()
            assert tuple(image[:, 0, 0].tolist()) in colours, seed  # PNG's checksums let nothing else through
            replaced += failed == i
        read += 1
    assert replaced and min(read, refused) > 10 * FUZZ


def test_fuzzed_tables_give_their_rows_or_are_refused(tmp_path):
    rows = [f'images/{k}.png,"a caption, the {k}th"' for k in range(8)]
    original = "\r\n".join(["filepath,title", *rows]).encode()
    path, read, refused = tmp_path / "a.csv", 0, 0
    for seed in range(200 * FUZZ):
        path.write_bytes(mutate(original, np.random.default_rng(seed)))
        source = opened(path)
        if source is None:
            refused += 1
            continue
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            expected = [(row["filepath"], row["title"]) for row in csv.DictReader(file)]
        assert list(zip(source.images, source.captions)) == expected, seed
        for i, (_, title) in enumerate(expected):
            try:
                assert source.caption(i) == title, seed
            except ValueError:  # counts as unreadable
                assert "\0" in title or not title.isprintable(), seed
        read += 1
    assert min(read, refused) > 10 * FUZZ


# ---------------------------------------------------------------- eval.py: models

CPU = torch.device("cpu")
WNIDS = ["n01440764", "n01443537", "n01484850", "n02007558"]
COLOURS = ["blue", "green", "red", "yellow"]


def checkpoint_of(model, path, tokenizer):
    args = {"arch": model.arch, "image_size": model.image_size}
    torch.save({"model": model.state_dict(), "args": args, "tokenizer": tokenizer}, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of CLIP and one of MoCo, with random weights, in the folders of runs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    for family, model, tokenizer in (
        ("clip", clip_model.create("vit_tiny", 16), "hashed words"),
        ("moco", moco.create("moco_vit_tiny", 16), None),
    ):
        (folder / family).mkdir()
        checkpoint_of(model, folder / family / "last.pt", tokenizer)
    return {family: str(folder / family) for family in ("clip", "moco")}


def tree(root, folders, n=3):
    """Class folders of plainly coloured pictures with a black bar, the k-th of the k-th colour."""
    for name, colour in zip(folders, itertools.cycle(COLOURS)):
        (root / name).mkdir(parents=True)
        for k in range(n):
            picture = Image.new("RGB", (20, 20), colour)
            picture.paste((0, 0, 0), (k, 0, k + 3, 20))
            picture.save(root / name / f"{k}.png")
    return str(root)


def cifar(root, name, monkeypatch):
    """The files that torchvision reads, with four samples; their MD5 sums are not looked at."""
    kind = {"cifar10": data.CIFAR10, "cifar100": data.CIFAR100}[name]
    classes, labels, key = {"cifar10": (10, "labels", "label_names"),
                            "cifar100": (100, "fine_labels", "fine_label_names")}[name]  # fmt: skip
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3072), dtype=np.uint8)
    for part, file in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        content = {"data": pixels, labels: [0, 1, classes - 1, 1]}
        (folder / file).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(kind, part, [(file, None)])
    (folder / "meta").write_bytes(pickle.dumps({key: [f"class {k}" for k in range(classes)]}))
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": key, "md5": None})
    return str(root)


def evaluate(*args):
    on_files = args[0] in ("export", "coreset", "suspects")
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
    assert exit.value.code == 1 and said.count("\n") == 1 and said.startswith("eval.py: ")
    return said


def test_weights_of_all_origins_start_a_model(checkpoints, tmp_path):
    """A run's, open_clip's (a state dict), MoCo v3's (from DDP), and timm's (the backbone alone)."""
    images = torch.randn(2, 3, 16, 16, generator=generator())
    for family, arch in (("clip", "vit_tiny"), ("moco", "moco_vit_tiny")):
        create = {"clip": clip_model.create, "moco": moco.create}[family]
        trained, _ = evaluation.load_model(checkpoints[family], text=False)
        weights, words = trained.state_dict(), {"clip": "hashed words", "moco": None}[family]
        torch.save(weights, tmp_path / "plain.pt")
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "ddp.pt")
        run = checkpoints[family]
        for path, said in ((run, words), (f"{run}/last.pt", words), (tmp_path / "plain.pt", None),
                           (tmp_path / "ddp.pt", None)):  # fmt: skip
            model = create(arch, 16)
            assert evaluation.load_weights(model, path) == said
            assert all(weight.equal(weights[k]) for k, weight in model.state_dict().items()), path
            again, _ = evaluation.load_model(path, arch, image_size=16, vocab="hashed")
            assert not again.training
            assert evaluation.encoder(again)(images).equal(evaluation.encoder(trained)(images)), path
    model = moco.create("moco_vit_tiny", 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backbone = {k: v for k, v in trained.base_encoder.state_dict().items() if not k.startswith("head.")}
    torch.save(backbone | {"head.weight": torch.zeros(3, 96)}, tmp_path / "timm.pt")  # and a classifier
    evaluation.load_weights(model, tmp_path / "timm.pt")
    for name, weight in model.state_dict().items():
        inside = name.removeprefix("base_encoder.").removeprefix("momentum_encoder.")
        assert weight.equal(backbone.get(inside, before[name])), name


def test_weights_that_do_not_fit_get_one_line(checkpoints, tmp_path):
    gone = {"model": {}, "args": {"arch": "gone", "image_size": 16}, "tokenizer": None}
    larger, strange = clip_model.create("vit_tiny", 32).state_dict(), {"weights": torch.zeros(3)}
    for name, content in dict(larger=larger, strange=strange, list=[1, 2], gone=gone).items():
        torch.save(content, tmp_path / f"{name}.pt")
    clip, vocab = Path(checkpoints["clip"]), tmp_path / "vocab.gz"
    vocab.write_bytes(gzip.compress(b"#version\na b\n"))
    models = clip_model.create("vit_tiny", 16), moco.create("moco_vit_tiny", 16)
    tiny = dict(arch="vit_tiny", text=False)
    for path, how, message in (
        ("larger.pt", models[0], "size mismatch"),
        (clip, models[1], "do not fit moco_vit_tiny at 16 px"),
        ("strange.pt", models[0], "do not fit"),
        ("strange.pt", {}, "--arch"),
        ("strange.pt", tiny, "token_embedding"),
        ("list.pt", {}, "no state dict"),
        ("gone.pt", dict(text=False), "do not fit|unknown arch"),
        ("larger.pt", tiny | dict(image_size=33), "multiple"),
        ("larger.pt", dict(arch="vit_tiny"), "needs --vocab"),
        (clip, dict(vocab=vocab), "leave --vocab out"),
        (clip, dict(vocab=tmp_path / "nowhere.gz"), "nowhere.gz"),
        ("", {}, "last.pt: No such file"),
    ):
        with pytest.raises(data.UserError, match=message) as error:
            if isinstance(how, dict):
                evaluation.load_model(tmp_path / path, **how)
            else:
                evaluation.load_weights(how, tmp_path / path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---------------------------------------------------------------- eval.py: features


def test_evaluation_crops_are_those_of_the_protocols():
    """CLIP: resize to the size. MoCo, DeiT: to size / 0.875, bicubic; MoCo v3's linear protocol: bilinear."""
    rng, seen, source = np.random.default_rng(0), [], Reds(1)
    picture = Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1))
    source.image = lambda i, draft=None: picture

    def features(images):
        seen.append(images)
        return images.flatten(1)

    bicubic, bilinear = transforms.InterpolationMode.BICUBIC, transforms.InterpolationMode.BILINEAR
    imagenet, openai = moco.create("moco_vit_tiny", 224), clip_model.create("vit_tiny", 224)
    theirs = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    others = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for model, look, edge, how, (mean, std) in (
        (openai, None, 224, bicubic, others),
        (imagenet, None, 256, bicubic, theirs),
        (imagenet, evaluation.LINCLS_LOOK, 256, bilinear, theirs),
        (openai, evaluation.LINCLS_LOOK, 256, bilinear, others),
    ):
        evaluation.image_features(model, source, CPU, encode=features, look=look)
        classic = [transforms.Resize(edge, how), transforms.CenterCrop(224), transforms.ToTensor()]
        expected = transforms.Compose([*classic, transforms.Normalize(mean, std)])(picture)
        torch.testing.assert_close(seen.pop()[0], expected, rtol=0, atol=1e-6)


class Toy(torch.nn.Module):
    """Random features of many lengths, by the red of a picture and by the words of a text."""

    arch, image_size, eval_crop = "vit_tiny", 4, 1.0

    def __init__(self, d=6):
        super().__init__()
        lengths = torch.rand(256, 1, generator=generator(1)) * 9 + 0.1
        self.rows = torch.randn(256, d, generator=generator(2)) * lengths
        self.words = torch.randn(49408, d, generator=generator(3))
        self.words *= torch.rand(49408, 1, generator=generator(4)) * 9 + 0.1
        self.words[[0, 49406, 49407]] = 0

    def normalize(self, images):
        return images.float()

    def encode_image(self, images):
        return self.rows[images[:, 0, 0, 0].long()]

    def encode_text(self, tokens):
        return self.words[tokens].sum(1)


class Reds:
    """N pictures, the i-th of red i + first; labels and captions at random."""

    def __init__(self, n, classes=12, first=0):
        self.n, self.first = n, first
        self.classes = [f"thing{k}" for k in range(classes)]
        self.labels = torch.randint(classes, (n,), generator=generator(n)).numpy()
        self.labels[self.labels == 1] = 0  # unbalanced

    def __len__(self):
        return self.n

    def image(self, i, draft=None):
        return Image.new("RGB", (4, 4), (i + self.first, 0, 0))

    def caption(self, i):
        return f"caption{i} a\nline{i} b"

    def where(self, i):
        return f"red {i}"


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


def assert_same_shares(result, protocol, expected):
    assert result.pop("protocol") == protocol and result == pytest.approx(expected)


def features_of_ranks(rank, world):
    """Features of five pictures and of one; a head and an image tower trained, on all ranks alike."""
    model, source = Toy(), Reds(8, classes=3)
    out = {f"{n}": evaluation.image_features(model, Reds(n), CPU, batch_size=2) for n in (5, 1)}
    for protocol, backbone in (("sgd", moco.create), ("wise-ft", clip_model.create)):
        torch.manual_seed(0)
        backbone = backbone({"sgd": "moco_vit_tiny", "wise-ft": "vit_tiny"}[protocol], 16)
        head = F.normalize(torch.randn(3, 128), dim=-1) if protocol == "wise-ft" else None
        classifier = evaluation.Classifier(backbone, 3, protocol == "sgd", head)
        settings = dict(epochs=2, batch_size=4, lr=0.01, wd=0.1, workers=0, seed=5)
        evaluation.train_classifier(classifier, source, protocol, CPU, **settings)
        images = torch.randn(4, 3, 16, 16, generator=generator())
        out[protocol] = classifier.eval()(images).detach()
    return out


@slow
def test_ranks_share_the_work_and_agree_with_one_process(tmp_path):
    alone, ranks = features_of_ranks(0, 1), run_ranks(features_of_ranks, 2, tmp_path / "ranks")
    for rank in ranks:
        assert rank["5"].equal(alone["5"]) and rank["1"].equal(alone["1"])
        for protocol in ("sgd", "wise-ft"):
            torch.testing.assert_close(rank[protocol], alone[protocol], rtol=1e-3, atol=1e-3)
    assert ranks[0]["sgd"].equal(ranks[1]["sgd"]) and not alone["5"].equal(alone["5"].flip(0))


# ---------------------------------------------------------------- eval.py: classes


def test_class_folders_of_imagenet_v2_and_r(tmp_path):
    def source(name, folders):
        return data.open_source(tree(tmp_path / name, folders, 1))

    wnids = sorted(WNIDS)
    labels, ranked = evaluation.class_labels(source("v2", ["0", "1", "10", "2"]), [str(k) for k in range(11)])
    assert labels.tolist() == [0, 1, 10, 2] and ranked is None  # ImageFolder sorts "10" before "2"
    labels, _ = evaluation.class_labels(source("v2b", ["0", "3"]), wnids)
    assert labels.tolist() == [0, 3]
    labels, ranked = evaluation.class_labels(source("r", wnids[1:3]), wnids)
    assert labels.tolist() == ranked.tolist() == [1, 2]
    scores = torch.tensor([[9.0, 1, 0, 0], [9.0, 0, 1, 0]])
    assert evaluation.accuracy(scores, labels, ranked)["top1"] == 1
    assert evaluation.accuracy(scores, labels)["top1"] == 0
    with pytest.raises(data.UserError, match="'zebra'"):
        evaluation.class_labels(source("z", ["zebra"]), wnids)
    names, folders = evaluation.zeroshot_classes(source("v2c", ["0", "999"]), "imagenet")
    assert names[999] == "toilet tissue" and folders[999] == "999"


def test_zero_shot_finds_the_names_itself(tmp_path):
    """What train.py's monitor and eval.py call: the same names, or the same refusal, from both."""
    prompts, words = [], clip_model.HashedWords()

    def tokenizer(text):
        prompts.append(text)
        return words(text)

    imagenet = [f"n{k:08}" for k in range(1000)]
    source = Reds(4)
    for classes, given, first in (
        (imagenet, {}, "a photo of a tench."),
        (imagenet[7:9], {"wnids": imagenet}, "a photo of a tench."),
        (imagenet[7:9], {"classnames": ["cock", "hen"]}, "a photo of a cock."),
        (["cat", "dog"], {"templates": ["{}, {}!"]}, "cat, cat!"),
        (["0", "1"], {"classnames": "imagenet"}, "a photo of a tench."),
    ):
        source.classes, source.labels = classes, np.array([0, 1, 1, 0])
        assert evaluation.zeroshot(Toy(), tokenizer, source, CPU, **given)["n"] == 4
        assert prompts[0] == first, prompts[:3]
        prompts.clear()
    for classes, message in ((imagenet[:100], "100 wnids"), (["0", "1"], "classes are numbers")):
        source.classes = classes
        with pytest.raises(data.UserError, match=message):
            evaluation.zeroshot_classes(source)
        with pytest.raises(data.UserError, match=message):
            evaluation.zeroshot(Toy(), words, source, CPU)


# ---------------------------------------------------------------- eval.py: protocols without training


def test_zero_shot_equals_a_naive_reference():
    model, source, templates = Toy(), Reds(200), ["a {}", "no {} here", "much of {}"]
    classes = []
    for name in source.classes:
        prompts = [unit(embedded(model, template.replace("{}", name))) for template in templates]
        classes.append(unit(np.mean(prompts, 0)))
    cosine = unit(model.rows[:200]) @ np.array(classes).T
    options = dict(templates=templates, batch_size=7)
    result = evaluation.zeroshot(model, clip_model.HashedWords(), source, CPU, **options)
    assert_same_shares(result, "zero-shot", shares(np.argsort(-cosine, 1), source.labels))


@pytest.mark.parametrize("split", [False, True])
def test_retrieval_equals_a_naive_reference(split):
    class Several(Reds):
        def same_images(self):  # pictures 0, 3, 6 .. have three captions each
            return list(range(0, self.n, 3)), [i // 3 for i in range(self.n)]

    model, source = Toy(d=3), Several(90)
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
        assert_same_shares(result, "retrieval", expected)


def test_several_captions_of_an_image(tmp_path):
    rows = ["filepath,title"]
    for k in "201":  # the file's order is not the alphabet's
        (tmp_path / f"{k}.png").write_bytes(jpeg((int(k), 0, 0), form="PNG"))
    rows += ["2.png,two", "0.png,nil", "2.png,deux", "1.png,one", "0.png,null"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    source, model, words = data.open_source(str(tmp_path / "a.csv")), Toy(), clip_model.HashedWords()
    for word, k in (("two", 2), ("deux", 2), ("nil", 0), ("one", 1)):
        model.words[int(words(word)[1])] = model.rows[k]
    one, two = F.normalize(model.rows[1:3], dim=-1)
    model.words[int(words("null")[1])] = one + two / 9  # wrong
    result = evaluation.retrieval(model, words, source, CPU)
    assert result["n"] == 3 and result["i2t_r1"] == 1.0
    assert result["t2i_r1"] == pytest.approx(4 / 5) and result["t2i_r5"] == 1.0
    source.captions = data.Strings(["two", "a\0b", "deux", "one", "null"])
    with pytest.raises(data.UserError, match="0.png.*: no caption"):
        evaluation.retrieval(model, words, source, CPU)


@pytest.mark.parametrize("k, most", [(20, None), (3, None), (20, 50), (500, None)])
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
    expected = shares(ranking, test.labels)
    if k == 3:  # the fourth and fifth of these are a tie
        expected["top5"] = result["top5"]
    assert_same_shares(dict(result), "knn", expected)
    if k == 20 and not most:  # what is asked for if nothing is said
        assert evaluation.knn(model, train, test, CPU)["top1"] == result["top1"]


def test_logistic_regression_is_at_its_optimum():
    x = torch.randn(80, 5, generator=generator())
    y = torch.randint(3, (80,), generator=generator())
    for penalty in (1e-3, 1e-1):
        probe = evaluation._logistic_regression(x, y, 3, penalty)
        residual = probe(x).softmax(1) - F.one_hot(y, 3)  # by hand: the gradient of the mean cross-entropy
        assert (residual.T @ x / 80 + penalty * probe.weight).abs().max() < 1e-4
        assert residual.mean(0).abs().max() < 1e-4
        assert probe.weight.norm() > 0.1


def test_linear_probe_standardises_and_chooses_its_penalty_on_a_tenth(monkeypatch):
    """With features that say which row they are of: training rows are 0.., test rows 1000.."""

    class Source:
        classes, labels = ["a", "b"], np.arange(60) % 2

    train_data, test_data, ids = Source(), Source(), torch.arange(60.0)
    features = {train_data: torch.stack([ids, -9 * ids], 1), test_data: torch.stack([ids + 1000, ids], 1)}
    fitted, asked = [], []

    def rows(x):
        return (x[:, 0] * ids.std() + ids.mean()).round().long()

    def fit(x, y, classes, penalty):
        fitted.append((rows(x), penalty))
        torch.testing.assert_close(x[:, 1], -x[:, 0])  # each column by its own mean and deviation
        assert y.equal(rows(x) % 2) and classes == 2

        def probe(z):
            asked.append(rows(z))
            right = F.one_hot(rows(z) % 2, 2)
            return right if penalty == 1e-3 else 1 - right

        return probe

    monkeypatch.setattr(evaluation, "_logistic_regression", fit)
    monkeypatch.setattr(evaluation, "image_features", lambda model, source, device: features[source])
    result = evaluation.linear(None, train_data, test_data, CPU)
    assert_same_shares(result, "linear", {"top1": 1, "top5": 1, "balanced": 1, "n": 60, "penalty": 1e-3})
    assert [penalty for _, penalty in fitted] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e-3]
    for (rest, _), held_out in zip(fitted[:5], asked[:5], strict=True):
        assert len(held_out) == 6 and sorted([*rest.tolist(), *held_out.tolist()]) == list(range(60))
    assert fitted[-1][0].equal(torch.arange(60)) and asked[-1].equal(torch.arange(1000, 1060))


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


def test_augmentations_of_the_protocols():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    bicubic = transforms.InterpolationMode.BICUBIC
    classic = {  # as main_lincls.py of MoCo v3, and open_clip, have them
        "sgd": [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip()],
        "wise-ft": [transforms.RandomResizedCrop(64, scale=(0.9, 1.0), interpolation=bicubic)],
    }
    for protocol, steps in classic.items():
        ours = evaluation.augmentation(protocol, 64)[0]
        theirs = transforms.Compose([*steps, transforms.PILToTensor()])
        for seed in range(6):
            torch.manual_seed(seed)
            expected = theirs(picture)
            torch.manual_seed(seed)
            assert ours(picture).equal(expected), (protocol, seed)
    deit = evaluation.augmentation("deit", 64)[0].transforms
    crop, flip, augment, _, erase = deit
    assert (crop.size, crop.scale, crop.interpolation) == ((64, 64), (0.08, 1.0), bicubic) and flip.p == 0.5
    assert (augment.num_ops, augment.magnitude, erase.p) == (2, 9, 0.25)
    assert [evaluation.augmentation(p, 224)[1] for p in ("sgd", "wise-ft", "deit")] == [792, 237, 792]


def test_weight_decay_is_for_the_matrices_that_the_recipes_name():
    with torch.device("meta"):
        swin, rn50 = clip_model.create("swin_b", 32), clip_model.create("rn50", 32)
        vit, deit = clip_model.create("vit_tiny", 32), moco.create("moco_vit_tiny", 32)
    tuned = evaluation.Classifier(deit, 3, frozen=False)
    optimizer = evaluation.make_optimizer(tuned, "deit", 0.1, 0.05)
    names = {id(p): name for name, p in tuned.named_parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    decay, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    base = "model.base_encoder."
    assert {base + "cls_token", base + "pos_embed", base + "norm.weight", "head.bias"} <= others
    assert {base + "blocks.0.attn.qkv.weight", base + "patch_embed.proj.weight", "head.weight"} <= decay
    assert not any(".head." in name or "momentum" in name or "predictor" in name for name in decay | others)
    for model in (swin, rn50, vit):  # open_clip's rule, in its own words
        for name, p in model.visual.named_parameters():
            excluded = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            assert evaluation.decays(name, p) == (not excluded), name
    assert not evaluation.decays("features.1.0.attn.relative_position_bias_table", torch.zeros(169, 4))
    probe = evaluation.Classifier(deit, 3, frozen=True)
    [group] = evaluation.make_optimizer(probe, "sgd", 0.1, 0.0).param_groups
    assert group["momentum"] == 0.9 and group["params"] == [probe.head.weight, probe.head.bias]


def test_a_frozen_tower_keeps_its_batch_statistics():
    with torch.device("meta"):
        model = clip_model.create("rn50", 32)
    for frozen in (True, False):
        classifier = evaluation.Classifier(model, 3, frozen)
        assert classifier.train().training and model.visual.bn1.training is not frozen
        assert not classifier.eval().training and not model.visual.bn1.training


@pytest.mark.parametrize("protocol", ["sgd", "wise-ft", "deit"])
def test_training_a_classifier_equals_a_loop_by_hand(protocol, monkeypatch, capsys):
    fixed = v2.Compose([v2.Resize((16, 16)), v2.PILToTensor()])
    monkeypatch.setattr(evaluation, "augmentation", lambda protocol, size: (fixed, None))
    monkeypatch.setattr(evaluation.v2, "RandomChoice", lambda kinds: lambda images, labels: (images, labels))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (10, 16, 16, 3), dtype=np.uint8)
    source = Reds(10, classes=3)
    source.image = lambda i, draft=None: Image.fromarray(pixels[i])
    torch.manual_seed(0)
    clip = protocol == "wise-ft"
    model = clip_model.create("vit_tiny", 16) if clip else moco.create("moco_vit_tiny", 16)
    zero = 5 * F.normalize(torch.randn(3, 128), dim=-1) if clip else None
    ours = evaluation.Classifier(model, 3, protocol == "sgd", zero)
    theirs = copy.deepcopy(ours)
    # the last two of ten are a batch of their own in MoCo v3's protocol
    epochs, per_epoch, peak, decay = 3, *{"sgd": (3, 0.5)}.get(protocol, (2, 0.01)), 0.1
    settings = dict(epochs=epochs, batch_size=4, lr=peak, wd=decay, workers=0, seed=7)
    evaluation.train_classifier(ours, source, protocol, CPU, **settings)

    tower = theirs.model.visual if clip else theirs.model.base_encoder
    names = {k: p for k, p in tower.named_parameters() if protocol != "sgd" and not k.startswith("head.")}
    weights, spared = [*names.values(), theirs.head.weight], [theirs.head.bias]
    if protocol == "sgd":
        optimizer = torch.optim.SGD(weights + spared, momentum=0.9, weight_decay=decay)
    else:
        spared += [p for k, p in names.items() if p.ndim < 2 or k in ("cls_token", "pos_embed")]
        matrices = [p for p in weights if not any(p is other for other in spared)]
        optimizer = torch.optim.AdamW([{"params": spared, "weight_decay": 0}, {"params": matrices}],
                                      weight_decay=decay)  # fmt: skip
    losses, mean, std = [], theirs.model.pixel_mean, theirs.model.pixel_std
    theirs.requires_grad_(True)
    theirs.model.train(protocol != "sgd")
    for epoch in range(epochs):
        order = torch.randperm(10, generator=generator(7 + epoch))
        losses.append([])
        for step in range(per_epoch):
            ids = order[4 * step : 4 * step + 4]
            images = (torch.from_numpy(pixels[ids]).permute(0, 3, 1, 2) / 255 - mean) / std
            x = tower(images) if clip else tower.forward_features(images)
            logits = (F.normalize(x, dim=-1) if clip else x) @ theirs.head.weight.T + theirs.head.bias
            target = F.one_hot(torch.from_numpy(source.labels)[ids], 3).float()
            if protocol == "deit":
                target = 0.9 * target + 0.1 / 3
            loss = -(target * logits.log_softmax(1)).sum(1).mean()
            losses[-1].append(loss.item())
            done = epoch / epochs
            if protocol != "sgd":  # a fifth of the six steps is one
                done = max(epoch * per_epoch + step - 1, 0) / (6 - 1)
            theirs.zero_grad()
            loss.backward()
            if protocol != "sgd":
                torch.nn.utils.clip_grad_norm_(weights + spared[:1], 1)
            for group in optimizer.param_groups:
                group["lr"] = peak * (1 + math.cos(math.pi * done)) / 2
            optimizer.step()
    for (name, p), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not name.endswith(("in_proj_bias", "qkv.bias")):  # AdamW enlarges the rounding of keys'
            note = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(p, expected, rtol=2e-3, atol=2e-4, msg=note)
    said = capsys.readouterr().out.splitlines()
    for epoch, line in enumerate(said):
        assert line.startswith(f"epoch   {epoch}/3  loss ")
        assert float(line.split()[3]) == pytest.approx(np.mean(losses[epoch]), abs=2e-3)
    assert len(said) == epochs


def test_commands_train_by_their_recipes(checkpoints, tmp_path, monkeypatch, capsys):
    """Every number of a recipe, the head that it starts from, and what evaluation then looks at."""
    root, calls, looks = tree(tmp_path / "a", COLOURS, 2), [], []
    data_flags = ["--data", root, "--val-data", root]

    def train_classifier(classifier, train, protocol, device, **settings):
        calls.append((classifier, protocol, settings))

    def classify(classifier, source, folders, device, workers, look):
        looks.append(look)
        return {"top1": 0.5, "n": 8}

    monkeypatch.setattr(evaluation, "train_classifier", train_classifier)
    monkeypatch.setattr(evaluation, "classify", classify)
    lincls = dict(crop=0.875, interpolation=transforms.InterpolationMode.BILINEAR)
    for flags, protocol, expected in (
        ("linear --protocol sgd", "sgd", dict(epochs=90, batch_size=1024, lr=3 * 8 / 256, wd=0)),
        ("linear --protocol sgd --batch-size 4", "sgd", dict(epochs=90, batch_size=4, lr=12 / 256, wd=0)),
        ("linear --protocol sgd --lr 1 --wd 2 --epochs 3 --seed 4", "sgd",
         dict(epochs=3, batch_size=1024, lr=1, wd=2, seed=4)),
        ("finetune", "deit", dict(epochs=150, batch_size=1024, lr=1e-3 * 8 / 1024, wd=0.05)),
        ("finetune", "wise-ft", dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, seed=0)),
    ):  # fmt: skip
        run = checkpoints["clip" if protocol == "wise-ft" else "moco"]
        result = evaluated(capsys, *flags.split(), "--checkpoint", run, *data_flags)
        classifier, used, settings = calls.pop()
        assert used == protocol == result["protocol"] and result["n"] == 8
        assert {k: settings[k] for k in expected} == pytest.approx(expected), flags
        assert looks.pop() == (lincls if protocol == "sgd" else None)
        assert classifier.frozen == (protocol == "sgd")
    model, words = evaluation.load_model(checkpoints["clip"])  # wise-ft's head is zero-shot
    texts = [model.encode_text(torch.tensor(words(f"a photo of a {name}."))[None]) for name in COLOURS]
    expected = F.normalize(torch.cat(texts), dim=-1) / 0.07
    torch.testing.assert_close(classifier.head.weight, expected, rtol=1e-4, atol=1e-4)
    assert not classifier.head.bias.any()


def test_deit_mixes_pictures_and_smooths_labels(checkpoints, tmp_path, monkeypatch):
    root, mixes, losses, cross_entropy = tree(tmp_path / "a", COLOURS, 2), [], [], F.cross_entropy

    def note(kind, alpha, num_classes):
        mixes.append((kind.__name__, alpha))
        return kind(alpha=alpha, num_classes=num_classes)

    def note_loss(x, y, **rest):
        losses.append((y.ndim, rest))
        return cross_entropy(x, y, **rest)

    for kind in (v2.MixUp, v2.CutMix):
        monkeypatch.setattr(evaluation.v2, kind.__name__, functools.partial(note, kind))
    monkeypatch.setattr(evaluation.F, "cross_entropy", note_loss)
    flags = ["--data", root, "--val-data", root, "--epochs", "1", "--batch-size", "4"]
    evaluate("finetune", "--checkpoint", checkpoints["moco"], *flags)
    assert sorted(mixes) == [("CutMix", 1.0), ("MixUp", 0.8)]
    assert losses == [(2, {"label_smoothing": 0.1})] * 2


@pytest.mark.parametrize("family", ["clip", "moco"])
def test_classifiers_on_class_folders(family, checkpoints, tmp_path, capsys):
    tree(tmp_path / "a" / "train", WNIDS, 8)
    tree(tmp_path / "a" / "val", WNIDS, 2)
    common = ["--checkpoint", checkpoints[family], "--data", tmp_path / "a", "--val-data", tmp_path / "a"]
    for protocol in ("knn", "linear"):
        result = evaluated(capsys, protocol, *common)
        assert result["n"] == 8 and result["top1"] == result["balanced"] == result["top5"] == 1.0
    result = evaluated(capsys, "linear", *common, *"--protocol sgd --epochs 20 --lr 1".split())
    assert result["n"] == 8 and result["top1"] > 0.5  # chance .25
    numbers = tree(tmp_path / "v2", ["0", "1", "2", "3"], 2)
    some = tree(tmp_path / "r", WNIDS[:2], 2)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(COLOURS))
    more = ["--classnames", names] if family == "clip" else []
    more += [*"--epochs 15 --lr 2e-3 --batch-size 16 --test-data".split(), numbers, some]
    result = evaluated(capsys, "finetune", *common, *more, "--out", tmp_path / "tuned.pt")
    assert result["top1"] >= 0.75
    for folder, n in ((numbers, 8), (some, 4)):
        assert result["test"][folder]["n"] == n and result["test"][folder]["top1"] >= 0.75
    tuned = torch.load(tmp_path / "tuned.pt", weights_only=True)
    assert tuned["head.weight"].shape == (4, 96 if family == "moco" else 128)


def test_what_does_not_fit_is_said_before_training(checkpoints, tmp_path, capsys, monkeypatch):
    some, numbers = tree(tmp_path / "r", WNIDS[:2], 1), tree(tmp_path / "v2", ["0", "10"], 1)
    monkeypatch.setattr(evaluation, "train_classifier", None)
    common = ["finetune", "--checkpoint", checkpoints["moco"], "--data", some, "--val-data", some]
    assert "'10'" in eval_refuses(capsys, *common, "--test-data", numbers)
    assert "--out" in eval_refuses(capsys, *common, "--out", tmp_path / "no" / "where.pt")
    flags = "--arch moco_vit_tiny --prune 0.25 --batch-size 4 --image-size 16".split()
    flags += ["--data", tree(tmp_path / "a", COLOURS, 4), "--val-data", some, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert f"'{WNIDS[0]}'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_fine_tuning(checkpoints, tmp_path, capsys):
    root = tree(tmp_path / "a", COLOURS, 2)
    flags = ["--checkpoint", checkpoints["moco"], "--data", root, "--val-data", root, "--protocol", "sgd"]
    with pytest.raises(SystemExit) as stop:
        evaluate("linear", *flags, "--lr", "1e38", "--epochs", "9")
    assert stop.value.code == 1 and "loss not finite in epoch" in capsys.readouterr().err


# ---------------------------------------------------------------- eval.py: its commands on data


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, checkpoints, tmp_path, capsys, monkeypatch):
    root = cifar(tmp_path / "data", name, monkeypatch)
    classes = 10 if name == "cifar10" else 100
    source = data.open_source(f"{name}:{root}", train=False)
    assert len(source.classes) == classes and source.labels.tolist() == [0, 1, classes - 1, 1]
    assert source.image(0).size == (32, 32) and source.caption(2) == f"class {classes - 1}"
    assert data.open_source(root).fingerprint() == source.fingerprint()  # the folder says which it is
    assert evaluated(capsys, "zeroshot", "--checkpoint", checkpoints["clip"], "--data", root)["n"] == 4
    common = ["--checkpoint", checkpoints["moco"], "--data", f"{name}:{root}", "--val-data", root]
    assert evaluated(capsys, "knn", *common)["n"] == 4
    common = ["--checkpoint", checkpoints["clip"], "--data", f"cifar10:{tmp_path}"]
    assert "no whole cifar10" in eval_refuses(capsys, "zeroshot", *common)


def test_zero_shot_needs_labels_and_no_captions(checkpoints, tmp_path, capsys):
    members, labelled = [], []
    for k, group in enumerate(["food", "animals", "food"]):
        members += [(f"{k}.jpg", jpeg()), (f"{k}.json", json.dumps({"group": group}).encode())]
        labelled += [(f"{k}.jpg", jpeg()), (f"{k}.cls", group.encode())]
    keyed, cls = write_tar(tmp_path / "a.tar", members), write_tar(tmp_path / "b.tar", labelled)
    clip = ["zeroshot", "--checkpoint", checkpoints["clip"], "--data"]
    assert evaluated(capsys, *clip, keyed, "--label-key", "group")["n"] == 3
    assert evaluated(capsys, *clip, cls)["n"] == 3
    knn = ["knn", "--checkpoint", checkpoints["moco"], "--data", cls, "--val-data"]
    assert evaluated(capsys, *knn, cls)["n"] == 3
    for args in ((*clip, keyed), (*knn, keyed)):
        assert "--label-key" in eval_refuses(capsys, *args)


def test_wrong_trees_and_models_get_one_line(checkpoints, tmp_path, capsys):
    numbers, some = tree(tmp_path / "v2", ["0", "10"], 1), tree(tmp_path / "r", WNIDS[:2], 1)
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    three = ["--classnames", tmp_path / "three.txt"]
    clip, moco_ = (["--checkpoint", checkpoints[k]] for k in ("clip", "moco"))
    for args, message in (
        (["zeroshot", *clip, "--data", numbers], "numbers"),
        (["zeroshot", *clip, "--data", some], "--wnids"),
        (["zeroshot", *clip, "--data", some, *three], "3 names, for 2 classes"),
        (["zeroshot", *clip, "--data", numbers, *three], "'10'"),
        (["zeroshot", *moco_, "--data", some], "never learnt"),
        (["retrieval", *moco_, "--data", some], "never learnt"),
        (["knn", *moco_, "--data", some], "--val-data"),
        (["knn", *moco_, "--data", some, "--val-data", numbers], "'10'"),
        (["linear", *clip, "--data", some, "--val-data", tree(tmp_path / "x", ["cat"])], "'cat'"),
        (["knn", *clip, "--data", tmp_path / "nowhere", "--val-data", some], "nowhere"),
        (["knn", "--checkpoint", tmp_path / "no.pt", "--data", some, "--val-data", some], "No such file"),
        (["knn", "--checkpoint", tmp_path, "--data", some, "--val-data", some], "last.pt: No such file"),
        (["export", *clip, "--out", tmp_path / "no" / "where.pt"], "--out"),
        (["coreset", checkpoints["clip"], "--prune", "0.3", "--out", tmp_path / "k.npy"], "not a run"),
        (["suspects", checkpoints["clip"], "--out", tmp_path / "k.csv"], "not a run"),
    ):
        assert message in eval_refuses(capsys, *args), args


def test_export_says_how_to_load_and_what_its_words_are(checkpoints, tmp_path, capsys):
    images = torch.randn(2, 3, 16, 16, generator=generator())
    for family, arch in (("clip", "vit_tiny"), ("moco", "moco_vit_tiny")):
        out = tmp_path / f"{family}.pt"
        evaluation.main(["export", "--checkpoint", checkpoints[family], "--out", str(out)])
        *lines, last = capsys.readouterr().out.splitlines()
        assert json.loads(last)["tensors"] == len(names := torch.load(out, weights_only=True))
        assert not any(k.startswith(("module.", "base_encoder.", "head.")) for k in names)
        assert ("blocks.0.attn.qkv.weight" if family == "moco" else "visual.conv1.weight") in names
        model, _ = evaluation.load_model(checkpoints[family])
        again, _ = evaluation.load_model(out, arch, image_size=16, vocab="hashed")
        assert evaluation.encoder(model)(images).equal(evaluation.encoder(again)(images))
        loud = [line for line in lines if line.startswith("WARNING") and "hashed words" in line]
        assert len(loud) == (family == "clip")
    words, texts = clip_model.HashedWords(), ["a red car", " ".join(["dog"] * 99), ""]
    recipe = next(line for line in evaluation.WARNING.splitlines() if "tokens =" in line).strip()
    names = {"torch": torch, "F": F, "words": words, "texts": texts}
    exec(recipe, names)  # what it tells people to do
    assert names["tokens"].shape == (3, 77) and names["tokens"].argmax(1).tolist() == [4, 76, 1]
    path = checkpoint_of(model, tmp_path / "last.pt", "bpe 0123")
    evaluation.main(["export", "--checkpoint", path, "--out", str(tmp_path / "x.pt")])
    assert "WARNING" not in capsys.readouterr().out
    with torch.device("meta"):
        line = evaluation.loading_line(clip_model.create("vit_b32", 96), "w.pt")
        assert line == 'model = open_clip.create_model("ViT-B-32", "w.pt", force_image_size=96)'
        line = evaluation.loading_line(moco.create("moco_vit_s16", 96), "w.pt")
        assert 'timm.create_model("vit_small_patch16_224", num_heads=12, img_size=96' in line
    assert set(evaluation.OPEN_CLIP) == set(clip_model.ARCHS) - {"vit_tiny", "swin_b"}


# ---------------------------------------------------------------- eval.py: coresets and suspects


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """Folders of runs over 80 samples, the fourth over 90, whose losses were given."""
    runs, root = [], tmp_path_factory.mktemp("scanned")
    for seed in range(4):
        size = 80 + 10 * (seed == 3)
        scan = Scan(size, seed=seed)
        for epoch in range(7):
            observe_epoch(scan, epoch, 1 + torch.rand(size, generator=generator(seed)))
        runs.append(root / f"run{seed}")
        runs[-1].mkdir()
        state = {"scan": scan.state_dict(), "data": {"size": size, "hash": "x"}, "args": {"arch": "vit_tiny"}}
        torch.save(state, runs[-1] / "last.pt")
    return runs


def test_static_coreset_from_runs(scanned, tmp_path, capsys):
    kept = tmp_path / "kept.npy"
    result = evaluated(capsys, "coreset", *scanned[:3], "--prune", "0.3", "--out", kept)
    ids = np.load(kept)
    assert result["kept"] == len(ids) == 80 - 24 and (np.diff(ids) > 0).all()
    pair, *_, three = result["overlap"]
    assert len(result["overlap"]) == 4 and len(three["runs"]) == 3
    assert three["kept_chance"] == pytest.approx(0.7**3 / (1 - 0.3**3), abs=1e-3)
    assert pair["kept_chance"] == pytest.approx(0.5385, abs=1e-3)
    assert pair["pruned_chance"] == pytest.approx(0.1765, abs=1e-3)
    a, b = (
        scan_module.pruned_set(torch.load(run / "last.pt", weights_only=True)["scan"], 0.3)
        for run in scanned[:2]
    )
    assert pair["pruned"] == pytest.approx(((a & b).sum() / (a | b).sum()).item(), abs=1e-3)
    assert pair["kept"] == pytest.approx(((~a & ~b).sum() / (~a | ~b).sum()).item(), abs=1e-3)
    assert "other data" in eval_refuses(capsys, "coreset", *scanned, "--prune", "0.3", "--out", kept)


def test_warnings_are_one_line_on_stderr(scanned, tmp_path, capsys, monkeypatch):
    def coreset_that_warns(states, prune):
        warnings.warn("two runs share seed 0\nand more", stacklevel=2)
        return torch.arange(3)

    monkeypatch.setattr(evaluation, "coreset", coreset_that_warns)
    command = ["coreset", str(scanned[0]), "--prune", "0.3", "--out", str(tmp_path / "k.npy")]
    evaluation.main(command)
    assert capsys.readouterr().err == "eval.py: two runs share seed 0\n"
    monkeypatch.setenv("RANK", "1")
    evaluation.main(command)
    coreset_that_warns(None, None)
    said = capsys.readouterr()
    assert said.err == said.out == ""  # rank 0 does it, and says it


@pytest.mark.parametrize("arch", ["vit_tiny", "moco_vit_tiny"])
def test_suspects_are_listed_worst_first(arch, tmp_path, capsys):
    """A state made by hand over shapes with a fifth of the captions shuffled."""
    n, clip = 40, arch == "vit_tiny"
    source = data.open_source("shapes:40", size=16, captions=clip)
    pairs = data.Pairs(source, None, 16, mismatch=0.2)
    dataset, planted = pairs if clip else data.Samples(source, 0), pairs.truth["ill_matched"]
    ranks = np.empty(n)
    ranks[np.argsort(~planted, kind="stable")] = np.linspace(0.95, 0.05, n)  # the planted ones come first
    quantile = torch.from_numpy(ranks)
    high, low = quantile > 0.5, quantile < 0.3
    ill, redundant = 2 * high.to(torch.int16), 3 * low.to(torch.int16)
    ill[low.nonzero()[0]] = 1  # marked as both: more often as redundant
    args = {"arch": arch, "data": "shapes:40", "image_size": 16, "mismatch": 0.2 if clip else 0.0}
    args |= {"img_key": "filepath", "caption_key": "title", "label_key": None}
    scan = {"counts": ill + redundant, "ill_counts": ill, "quantile": quantile.half(), "rounds": 4}
    checkpoint = {"scan": scan, "args": args, "data": {"size": n, "hash": dataset.fingerprint()}}
    torch.save(checkpoint, tmp_path / "last.pt")
    out = tmp_path / "s.csv"
    result = evaluated(capsys, "suspects", tmp_path, "--share", "1", "--out", out)
    expected = []
    for kind, marked, ids in (
        ("ill-matched", "2", sorted(high.nonzero().flatten().tolist(), key=lambda i: -quantile[i])),
        ("redundant", "3", sorted(low.nonzero().flatten().tolist(), key=lambda i: quantile[i])),
    ):
        assert result[kind.replace("-", "_")] == len(ids) > 10
        for i in ids:
            caption = pairs.caption(i) if clip else ""
            expected.append([str(i), source.where(i), caption, kind, marked, "4"])
    with open(out, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == "id where caption kind marked rounds quantile".split()
    assert [row[:-1] for row in rows] == expected
    assert all(float(row[-1]) == pytest.approx(float(quantile[int(row[0])]), abs=1e-3) for row in rows)
    total = int(planted.sum())
    for first, share in (("0.05", 2), ("0.1", 4), ("0.15", 6)) if clip else ():  # rows
        right = min(share, total)
        assert result[f"first_{first}"] == {"precision": right / share, "recall": right / total}
    result = evaluated(capsys, "suspects", tmp_path, "--share", "0.1", "--out", out)
    assert result["ill_matched"] == result["redundant"] == 4
    assert "not the data" in eval_refuses(capsys, "suspects", tmp_path, "--data", "shapes:80", "--out", out)


# ---------------------------------------------------------------- eval.py: ranks, devices, flags


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert evaluation.start_ranks("auto") == evaluation.start_ranks("cpu") == (0, 1, CPU)
    for device in ("cuda", "mps"):
        with pytest.raises(data.UserError, match="use --device cpu"):
            evaluation.start_ranks(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [evaluation.start_ranks(kind)[2].type for kind in ("mps", "auto")] == ["mps", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used, groups = [], []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert evaluation.start_ranks("auto")[2] == used[0] == torch.device("cuda", 0)
    assert torch.backends.cudnn.benchmark
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "GROUP_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: groups.append((backend, how)))
    assert evaluation.start_ranks("auto") == (3, 4, torch.device("cuda", 1))
    assert evaluation.start_ranks("cpu") == (3, 4, CPU)
    with pytest.raises(data.UserError, match="one process"):
        evaluation.start_ranks("mps")
    assert [backend for backend, _ in groups] == ["nccl", "gloo"]
    how = groups[0][1]
    assert (how["rank"], how["world_size"], how["timeout"].total_seconds()) == (3, 4, 1800)
    # after a restart by torchrun the ranks must not find the addresses of the dead ones
    assert isinstance(how["store"], dist.PrefixStore)
    how["store"].set("key", "value")
    assert how["store"].underlying_store.get("2/key") == b"value"


def test_precision_is_what_was_asked_or_what_the_gpu_has(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert evaluation.precision("auto", cuda) == "fp32"  # V100, T4: only emulated
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    for asked, device, expected in (
        ("auto", cuda, "bf16"), ("auto", CPU, "fp32"), ("fp32", cuda, "fp32"), ("bf16", CPU, "bf16")
    ):  # fmt: skip
        assert evaluation.precision(asked, device) == expected


def test_loading_processes_by_the_cores_that_a_rank_has(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for cores, local, expected in ((64, 1, 32), (64, 4, 16), (4, 1, 4), (2, 8, 1), (None, 1, 6)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        if cores:
            monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: range(n), raising=False)
        else:
            monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        assert evaluation.loading_processes() == expected


def test_progress_fits_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(evaluation.shutil, "get_terminal_size", lambda: os.terminal_size((40, 20)))
    evaluation.progress("images " + "1" * 99)
    evaluation.progress("")
    shown, blank, rest = sys.stderr.getvalue().lstrip("\r").split("\r")
    assert len(shown) == len(blank) == 39 and not blank.strip() and rest == ""


@pytest.mark.parametrize("kind, wrong, right", [
    ("share", "2 -0.1 nan x", {"0": 0, "1": 1, "0.3": 0.3}),
    ("natural", "0 -1 1.5 99999999999999999999 x", {"1": 1, "77": 77}),
    ("count", "-1 1.5 99999999999999999999 x", {"0": 0, "9": 9}),
    ("finite", "-1 nan inf x", {"0": 0, "1e-3": 0.001}),
])  # fmt: skip
def test_flags_say_what_they_take(kind, wrong, right, capsys):
    parser = evaluation.Parser(prog="p.py")
    parser.add_argument("--flag", type=getattr(evaluation, kind))
    for text, value in right.items():
        assert parser.parse_args([f"--flag={text}"]).flag == value
    for text in wrong.split():
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"--flag={text}"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"p.py: argument --flag: {text} is not a ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        "", "what", "zeroshot", "knn --checkpoint x --k 0", "knn --checkpoint x --batch-size 0",
        "export --checkpoint x", "export --checkpoint x --out y --image-size 0", "suspects",
        "suspects a --out x --share 2", "linear --checkpoint x --protocol sgd --lr nan",
        "linear --checkpoint x --epochs 3", "linear --checkpoint x --lr 3", "linear --checkpoint x --wd 0",
        "finetune --checkpoint x --epochs 0", "coreset a --prune 0.3", "finetune --checkpoint x --wd -1",
        "coreset a --prune 2 --out x", "retrieval --checkpoint x", "linear --checkpoint x --seed -1",
        "knn --checkpoint x --workers -1", "knn --checkpoint x --device tpu", "zeroshot --checkpoint x --no",
    ],
)  # fmt: skip
def test_bad_arguments_of_eval_exit_2_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flag, content, message", [
    ("--classnames", "\n", "is empty"), ("--templates", "{}!\na photo\n", "every line needs a {}"),
    ("--wnids", None, "No such file"), ("--classnames", "\udcff", "codec can't decode"),
])  # fmt: skip
def test_files_of_names_that_cannot_be_used_exit_2_in_one_line(flag, content, message, tmp_path, capsys):
    if content:
        (tmp_path / "names.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args(["zeroshot", "--checkpoint", "x", flag, str(tmp_path / "names.txt")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert f"argument {flag}: {tmp_path}" in said and message in said


def test_names_come_from_a_file_or_an_imagenet_tree(tmp_path):
    (tmp_path / "templates.txt").write_text("{}!\n\n a photo of {} \n")
    flags = ["--wnids", tree(tmp_path / "imagenet", WNIDS, 1), "--templates", str(tmp_path / "templates.txt")]
    args = evaluation.parse_args(["zeroshot", "--checkpoint", "x", "--classnames", "imagenet", *flags])
    assert (args.classnames, args.wnids) == ("imagenet", sorted(WNIDS))
    assert args.templates == ["{}!", "a photo of {}"]


@pytest.mark.parametrize("flags, options", [
    ("zeroshot", dict(classnames=None, wnids=None, templates=None, batch_size=256)),
    ("zeroshot --classnames NAMES --wnids NAMES --templates NAMES --batch-size 3",
     dict(classnames=["{}!"], wnids=["{}!"], templates=["{}!"], batch_size=3)),
    ("retrieval --data shapes:9", dict(split_captions=False, batch_size=256)),
    ("retrieval --data shapes:9 --split-captions", dict(split_captions=True, batch_size=256)),
    ("knn", dict(k=20, batch_size=256)), ("knn --k 3 --batch-size 7", dict(k=3, batch_size=7)),
])  # fmt: skip
def test_flags_reach_their_protocol(flags, options, checkpoints, tmp_path, monkeypatch):
    (tmp_path / "names").write_text("{}!")
    command, *flags = flags.replace("NAMES", str(tmp_path / "names")).split()
    asked = []
    monkeypatch.setattr(evaluation, command, lambda *_, **given: asked.append(given) or {"protocol": ""})
    evaluate(command, "--checkpoint", checkpoints["clip"], *flags)
    assert asked == [options | {"workers": 0}]


def test_help_shows_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    actions, real = [], evaluation.Parser.add_argument
    note = lambda self, *a, **k: actions.append((self.prog, real(self, *a, **k)))  # noqa: E731
    monkeypatch.setattr(evaluation.Parser, "add_argument", note)
    by_recipe = {
        "linear": ["default: 90 (sgd)", "default: 1024 (sgd)", "3 x batch / 256"],
        "finetune": ["default: 10 (wise-ft), 150 (deit)", "default: 512 (wise-ft), 1024 (deit)",
                     "default: 0.1 (wise-ft), 0.05 (deit)", "3e-5 (wise-ft)"],
    }  # fmt: skip
    for command in evaluation.ABOUT:
        actions.clear()
        with pytest.raises(SystemExit):
            evaluation.parse_args([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        flags = [action for prog, action in actions if prog.endswith(command)]
        assert len(flags) > 2
        for action in flags:
            assert action.help or action.dest == "help", action
            if action.default not in (None, "==SUPPRESS==", []) and action.default is not False:
                assert f"{' '.join(action.help.split())} (default: {action.default})" in said
        assert all(text in said for text in by_recipe.get(command, []))


def test_one_rank_speaks_for_all(monkeypatch, capsys, tmp_path):
    waited, report = [], tmp_path / "error.json"
    monkeypatch.setattr(evaluation.time, "sleep", waited.append)
    for rank, local, code, said in (
        (0, 0, 2, "eval.py: no"), (1, 1, 0, ""), (8, 0, 2, "eval.py: rank 8: no"),
    ):  # fmt: skip
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        with pytest.raises(SystemExit) as stop:
            evaluation.Parser(prog="eval.py").error("no")
        assert (stop.value.code, capsys.readouterr().err.strip()) == (code, said)
    assert waited == [5]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    with pytest.raises(SystemExit):
        evaluation.fail("train.py", "what is wrong")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(report))
    assert "traceback : train.py: what is wrong" in ChildFailedError("train.py", {0: failure}).format_msg()


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
    model = clip_model.create(arch, size)
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
    create = clip_model.create

    def starting_elsewhere(*args, **options):
        model = create(*args, **options)
        if scale is not None:
            model.logit_scale.data.fill_(scale)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(clip_model, "create", starting_elsewhere)
        checkpoint, log = trained(tmp_path, f"--arch {arch} {WEIGHTS} {size} --prune 0.3 {flags}")
    model, losses, optimizer = clip_by_hand(
        arch, size, 3, loaded, log, lr=1e-4, wd=0.3, warmup=1.5, start=scale
    )
    torch.manual_seed(3)
    start = create(arch, size).state_dict()
    assert start["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))
    assert_same_weights(model, checkpoint["model"], start, TOLERANCE[arch])
    assert_same_gradients(checkpoint["optimizer"], optimizer)
    assert_scan_saw(losses, checkpoint, log, 0.3)


def test_moco_trains_as_a_loop_by_hand(loaded, tmp_path, monkeypatch):
    seen, forward = [], moco.MoCo.forward

    def seeing(self, *both):
        seen.append([view.detach().clone() for view in both])
        return forward(self, *both)

    with monkeypatch.context() as patch:
        patch.setattr(moco.MoCo, "forward", seeing)
        checkpoint, log = trained(tmp_path, f"--arch moco_vit_tiny {WEIGHTS} 32 --prune 0.35")
    model, losses, optimizer = moco_by_hand(32, 3, loaded, seen, log, lr=1e-4, wd=0.3, warmup=1.5)
    torch.manual_seed(3)
    start = moco.create("moco_vit_tiny", 32).state_dict()
    assert_same_weights(model, checkpoint["model"], start, TOLERANCE["moco_vit_tiny"])
    assert_same_gradients(checkpoint["optimizer"], optimizer)
    assert_scan_saw(losses, checkpoint, log, 0.35)
    pixels = torch.cat([torch.cat(both) for both in seen]) * channels(MOCO_STD) + channels(MOCO_MEAN)
    # jitter clamps at both ends: with any other mean or deviation the ends were elsewhere
    assert pixels.amin((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert pixels.amax((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-5)


# ---------------------------------------------------------------- the models' sizes and first weights


@pytest.mark.parametrize(
    "arch, parameters, heads",
    [
        ("vit_b32", 151_277_313, (12, 8)),  # as OpenAI's and open_clip's models of these names
        ("vit_b16", 149_620_737, (12, 8)),
        ("vit_s32", 63_085_825, (6, 6)),
        ("vit_s16", 62_257_537, (6, 6)),
        ("rn50", 102_007_137, (None, 8)),
        ("rn101", 119_688_033, (None, 8)),
        ("moco_vit_s16", None, (12, None)),
        ("moco_vit_b16", None, (12, None)),
    ],
)
def test_architectures_are_the_papers(arch, parameters, heads):
    with torch.device("meta"):
        model = moco.create(arch) if arch.startswith("moco") else clip_model.create(arch)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.transformer.resblocks[0].attn.heads == heads[1]
        if heads[0]:
            assert model.visual.transformer.resblocks[0].attn.heads == heads[0]
        return
    base, width = model.base_encoder, {"moco_vit_s16": 384, "moco_vit_b16": 768}[arch]
    assert len(base.blocks) == 12 and base.blocks[0].attn.heads == heads[0]
    assert base.patch_embed.proj.weight.shape == (width, 3, 16, 16)
    heads = [
        [tuple(x.shape) for x in part.parameters() if x.ndim == 2] for part in (base.head, model.predictor)
    ]
    assert heads == [[(4096, width), (4096, 4096), (256, 4096)], [(4096, 256), (256, 4096)]]
    for part in (base.head, model.predictor):
        assert part[-1].weight is None and part[1].weight is not None  # the last batch norm is not affine
        assert not [x for x in part if isinstance(x, torch.nn.Linear) and x.bias is not None]


def spread(x):
    return x.double().std().item()


def test_moco_starts_as_published(monkeypatch):
    sizes = dict(moco.ARCHS["moco_vit_s16"], layers=1, hidden=512)
    monkeypatch.setitem(moco.ARCHS, "moco_vit_tiny", sizes)
    torch.manual_seed(0)
    model = moco.create("moco_vit_tiny", 32)
    base, block = model.base_encoder, model.base_encoder.blocks[0]
    bounds = {  # uniform, as Glorot and Bengio's; q, k and v are three matrices
        block.attn.qkv.weight: 6 / (384 + 384), block.attn.proj.weight: 6 / (384 + 384),
        block.mlp.fc1.weight: 6 / (5 * 384), block.mlp.fc2.weight: 6 / (5 * 384),
        base.patch_embed.proj.weight: 6 / (3 * 16 * 16 + 384),
    }  # fmt: skip
    for weight, square in bounds.items():
        assert weight.abs().max().item() == pytest.approx(math.sqrt(square), rel=0.01)
        assert spread(weight) == pytest.approx(math.sqrt(square / 3), rel=0.02)
    assert spread(base.cls_token) == pytest.approx(1e-6, rel=0.2)
    assert not block.attn.qkv.bias.any() and not base.patch_embed.proj.bias.any()
    moving = dict(model.momentum_encoder.named_parameters())
    assert all(p.equal(moving[name]) for name, p in base.named_parameters())
    assert not any(p.requires_grad for p in moving.values())
    row, column, width = 1, 0, 384  # patches are counted along rows
    waves = [10_000 ** -(k / 96) for k in range(96)]
    parts = [f(at * w) for at in (row, column) for f in (math.sin, math.cos) for w in waves]
    assert base.pos_embed.shape == (1, 5, width)
    assert base.pos_embed[0, 1 + 2 * row + column].tolist() == pytest.approx(parts, abs=1e-6)


def test_swin_has_a_stochastic_depth_of_a_tenth():
    with torch.device("meta"):
        model = clip_model.create("swin_b")
    rates = [x.p for x in model.visual.modules() if type(x).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.1 * k / 23 for k in range(24)])
    assert model.visual.head.weight.shape == (640, 1024) and model.visual.head.bias is None
    assert model.transformer.resblocks[0].attn.heads == 10 and len(model.transformer.resblocks) == 12


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
        ("--rho-red 0.1 --rho-ill 0.3", 8, 24, ROUNDS),
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
