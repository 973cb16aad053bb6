"""Tests of SCAN: `pytest -q` (all), `pytest -q -m "not slow"` (seconds)."""

import copy
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torchvision import transforms
from torchvision.transforms import v2

import clip_model
import data
import eval as evaluation
import moco
import train
from scan import Scan, ScanSampler, coreset, info_nce, prune_ratio, pruned_set, select_candidates, warmed_up

HERE = Path(__file__).parent
FLOAT32 = torch.autocast("cpu", enabled=False)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def signals_stay_with_pytest(monkeypatch):
    """train.main takes Ctrl-C and SIGTERM for itself; in this process they are to end the tests."""
    real, theirs = signal.signal, (signal.SIGINT, signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda n, handler: None if n in theirs else real(n, handler))


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


# ---------------------------------------------------------------- Eq. 2


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
    for mask, highest in zip(masks, (False, True), strict=True):
        both, either, n = naive_selection(a.tolist(), b.tolist(), rho, highest)
        chosen = set(mask.nonzero().flatten().tolist())
        assert both <= chosen <= either
        assert len(chosen) == min(n, len(either))


def test_selection_tops_up_at_random_and_reproducibly():
    a, b = torch.arange(100.0), torch.arange(100.0).flip(0)  # the directions agree on nothing
    first, again, other = (select_candidates(a, b, 0.2, 0, generator(s))[0] for s in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert first.sum() == other.sum() == 20


def test_zero_ratio_and_tiny_batch_select_nothing():
    """The released code's sorted[-0:] selects everything."""
    losses = torch.rand(16)
    assert not torch.cat(select_candidates(losses, losses, 0, 0)).any()
    assert not torch.cat(select_candidates(losses[:3], losses[:3], 0.3, 0.3)).any()


def test_ablation_modes_are_what_they_say():
    """The released code's modes silently run as both."""
    losses = torch.arange(10.0)
    redundant, ill_matched = select_candidates(losses, losses, 0.3, 0)
    assert redundant.nonzero().flatten().tolist() == [0, 1, 2] and not ill_matched.any()
    redundant, ill_matched = select_candidates(losses, losses, 0, 0.1)
    assert ill_matched.nonzero().flatten().tolist() == [9] and not redundant.any()


# ---------------------------------------------------------------- Sect. 3.3


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
    scan = Scan(200, prune=0.3, seed=5)
    losses = torch.rand(200, generator=generator()) + 1
    stages, kept = [], []
    for epoch in range(10):
        ids, stage = observe_epoch(scan, epoch, losses)
        stages.append(stage)
        kept.append(len(ids))
        assert ids.dtype == torch.int64 and ids.equal(ids.unique())
        if stage == "mutation":
            dropped = set(range(200)) - set(ids.tolist())
            assert dropped <= set(scan.candidates.tolist())
    assert stages == ["warm-up"] * 2 + (["preparation"] + ["mutation"] * 3) * 2
    assert kept == [200, 200] + [200, 170, 110, 80] * 2  # 120 candidates: 0, 30, 90, 120 of them left out
    assert scan.counts.max() == 2 and scan.counts.sum() == 240


def test_mutation_draws_afresh_each_round_and_full_data_grow_back():
    losses = torch.rand(200, generator=generator()) + 1
    kept = [observe_epoch(scan, e, losses)[0] for scan in [Scan(200)] for e in range(8)]
    assert not kept[3].equal(kept[7])
    assert len(kept[6]) == 200


def test_each_round_finds_its_candidates_anew():
    scan, losses = Scan(200), torch.arange(200.0) + 1
    for epoch in range(6):
        observe_epoch(scan, epoch, losses)
    observe_epoch(scan, 6, losses[torch.randperm(200, generator=generator())])
    assert len(scan.candidates) == 120  # of the second round alone


def test_top_up_draws_differ_by_seed_and_repeat_with_it():
    found = []
    for seed in (0, 0, 1):
        scan, ids = Scan(100, prune=0.2, seed=seed), torch.arange(100)
        for epoch in range(3):
            scan.begin_epoch(epoch)
            scan.observe(ids, ids.float() + 1, ids.flip(0).float() + 1)  # the directions agree on nothing
            scan.end_epoch()
        found.append(scan.redundant)
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


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


def test_state_goes_on_in_mid_epoch_exactly():
    losses = torch.rand(200, generator=generator()) + 1
    one, other = Scan(200), Scan(200)
    for epoch in range(9):
        kept = one.begin_epoch(epoch)
        assert kept.equal(other.begin_epoch(epoch))
        for step, ids in enumerate(kept.split(20)):
            if step == 2:  # a new process, in every epoch and stage
                buffer = io.BytesIO()
                torch.save(other.state_dict(), buffer)
                buffer.seek(0)
                other = Scan(200)
                other.load_state_dict(torch.load(buffer, weights_only=True))
                assert kept.equal(other.begin_epoch(epoch))
            for scan in (one, other):
                scan.observe(ids, losses[ids], losses[ids].flip(0))
        one.end_epoch(), other.end_epoch()
        assert one.redundant.equal(other.redundant) and one.ill_matched.equal(other.ill_matched)
        assert one.counts.equal(other.counts) and one.loss == other.loss or epoch == 0


def test_wrong_use_of_scan_is_said_clearly():
    for settings in (
        dict(prune=-0.1),
        dict(rho_red=0.6, rho_ill=0.5),
        dict(t_cos=0),
        dict(rule="x"),
        dict(prune=0.6),
    ):
        with pytest.raises(ValueError):
            Scan(10, **settings)
    with pytest.raises(ValueError, match="num_samples"):
        Scan(0)
    scan = Scan(10)
    ids, losses = torch.arange(4), torch.rand(4)
    with pytest.raises(RuntimeError, match="begin_epoch"):
        scan.observe(ids, losses, losses)
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


def test_ids_are_exact_beyond_float32():
    """InfoBatch gathers ids in the loss's dtype: inexact above 2^24."""
    scan = Scan(2**24 + 8, rho_red=0.5, rho_ill=0)
    ids = torch.tensor([2**24 + 1, 2**24 + 3])
    for epoch in range(3):
        scan.begin_epoch(epoch)
        scan.observe(ids, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        scan.end_epoch()
    assert scan.candidates.tolist() == [2**24 + 1]


# ---------------------------------------------------------------- sampler


@pytest.mark.parametrize("n", [64, 100, 1000])
def test_sampler_deals_the_same_global_batches_to_any_number_of_ranks(n):
    kept = torch.randperm(2000, generator=generator())[:n].sort().values
    dealt = {}
    for world in (1, 2, 4):
        ranks = [ScanSampler(32, r, world, seed=3) for r in range(world)]
        for sampler in ranks:
            sampler.set_epoch(4, kept)
        assert {len(sampler) for sampler in ranks} == {n // 32}
        dealt[world] = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert dealt[1] == dealt[2] == dealt[4]
    flat = sum(dealt[1], [])
    assert len(flat) == len(set(flat)) == n // 32 * 32 and set(flat) <= set(kept.tolist())


def test_sampler_reshuffles_every_epoch_and_demands_set_epoch():
    """The released code's rebuilt samplers repeat one permutation."""
    sampler = ScanSampler(8, 0, 1)
    for use in (len, list):
        with pytest.raises(RuntimeError, match="set_epoch"):
            use(sampler)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch, torch.arange(64))
        orders.append(list(sampler))
        with pytest.raises(RuntimeError, match="set_epoch"):
            list(sampler)
    assert orders[0] != orders[1] and orders[0] == orders[2]
    sampler.set_epoch(0, torch.arange(64), start_step=3)
    assert len(sampler) == 5 and list(sampler) == orders[0][3:]


@pytest.mark.parametrize("batch, world", [(1, 1), (0, 1), (2, 4), (6, 4)])
def test_sampler_refuses_batches_that_cannot_be(batch, world):
    with pytest.raises(ValueError):
        ScanSampler(batch, 0, world)


def test_sampler_refuses_fewer_samples_than_a_batch():
    with pytest.raises(ValueError, match="global batch"):
        ScanSampler(8, 0, 1).set_epoch(0, torch.arange(7))


# ---------------------------------------------------------------- Eq. 1, and several ranks


def test_info_nce_is_eq_1():
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
    scan, sampler, kept = Scan(128, seed=2), ScanSampler(16, seed=2), []
    for epoch in range(7):
        kept.append(scan.begin_epoch(epoch))
        sampler.set_epoch(epoch, kept[-1])
        for ids in sampler:
            scan.observe(torch.tensor(ids), *losses[ids].unbind(1))
        scan.end_epoch()
    return scan.state_dict() | {"kept": kept}


def one_and_several(rank, world):
    return {"clip": clip_step(rank, world), "scan": candidates_of(rank, world)}


@slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    alone, ranks = one_and_several(0, 1), run_ranks(one_and_several, world, tmp_path / "ranks")
    for name in "ab":
        torch.testing.assert_close(torch.cat([r["clip"][name] for r in ranks]), alone["clip"][name])
    for r in ranks:
        for grad, expected in zip(r["clip"]["grads"], alone["clip"]["grads"], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        for name, expected in alone["scan"].items():
            if name == "kept":
                assert all(x.equal(y) for x, y in zip(r["scan"]["kept"], expected, strict=True))
            else:
                assert (
                    r["scan"][name].equal(expected)
                    if torch.is_tensor(expected)
                    else r["scan"][name] == expected
                )


# ---------------------------------------------------------------- coresets


def test_coreset_is_the_intersection_topped_up_to_the_ratio():
    states = []
    for seed in (0, 1):
        counts = torch.zeros(100, dtype=torch.int16)
        counts[:20], counts[20 + 10 * seed : 30 + 10 * seed] = 3, 2
        states.append({"counts": counts, "num_samples": 100, "seed": seed})
    assert pruned_set(states[0], 0.3).nonzero().flatten().tolist() == list(range(30))
    kept = coreset(states, 0.3)
    pruned = set(range(100)) - set(kept.tolist())
    assert len(kept) == 70 and set(range(20)) < pruned < set(range(40))
    with pytest.raises(ValueError, match="same data"):
        coreset([states[0], states[1] | {"num_samples": 99}], 0.3)


def test_coreset_leaves_out_what_all_runs_pruned_before_what_one_run_counted_most():
    counts = torch.ones(2, 10, dtype=torch.int16)
    counts[0, 3], counts[1, 5], counts[:, 7] = 9, 9, 2  # 7 is in both pruned sets, 3 and 5 in one each
    states = [{"counts": c, "num_samples": 10, "seed": seed} for seed, c in enumerate(counts)]
    pruned = set(range(10)) - set(coreset(states, 0.2).tolist())
    assert 7 in pruned and len(pruned) == 2


def test_ties_in_counts_do_not_inflate_the_overlap():
    empty = [{"counts": torch.zeros(2000, dtype=torch.int16), "num_samples": 2000, "seed": s} for s in (0, 1)]
    first, second = (pruned_set(state, 0.3) for state in empty)
    assert (first & second).sum() / (first | second).sum() == pytest.approx(0.3 / 1.7, abs=0.04)


# ---------------------------------------------------------------- model


def test_text_padding_changes_nothing():
    torch.manual_seed(0)
    model = clip_model.create("vit_tiny", 32).eval()
    tokens = data.pad(
        [data.HashedWords()(t) for t in ("a red circle", "two words", "a much longer caption, with signs!")]
    )
    full = F.pad(tokens, (0, 77 - tokens.shape[1]))
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(full), rtol=1e-5, atol=1e-5)


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
    image, text, scale = model(torch.randn(2, 3, 64, 64), torch.tensor([[48, 5, 49], [48, 49, 0]]))
    assert image.shape == text.shape == (2, clip_model.ARCHS[arch]["embed_dim"])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    assert scale.item() == pytest.approx(1 / 0.07)
    with pytest.raises(ValueError, match="multiple"):
        clip_model.create(arch, 65)


def test_two_pass_accumulation_equals_one_pass():
    images, tokens = (
        torch.randn(8, 3, 32, 32, generator=generator()),
        torch.randint(1, 49, (8, 5), generator=generator()),
    )
    results = []
    for accum in (1, 2, 4):
        torch.manual_seed(0)
        model = clip_model.create("vit_tiny", 32, vocab_size=50)
        step = train.forward_backward_accumulated if accum > 1 else train.forward_backward
        extra = (accum,) if accum > 1 else ()
        a, b, _ = step(model, (images, tokens), train.clip_losses, FLOAT32, *extra)
        results.append((a, b, [p.grad for p in model.parameters()]))
    for a, b, grads in results[1:]:
        torch.testing.assert_close(a, results[0][0])
        torch.testing.assert_close(b, results[0][1])
        for grad, expected in zip(grads, results[0][2], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = clip_model.create("vit_tiny", 64)
    source = data.Shapes(16, 64, train=False)  # sixteen classes
    pairs = data.Pairs(source, data.HashedWords(), 64)
    _, _, *batch = data.collate([pairs[i] for i in range(16)])
    inputs = pairs.inputs(*batch, torch.device("cpu"), model.mean_std)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(60):
        a, _, _ = train.forward_backward(model, inputs, train.clip_losses, FLOAT32)
        optimizer.step(), optimizer.zero_grad()
    assert a.mean() < 0.6 * math.log(16)  # stuck models stay at ln(batch)


# ---------------------------------------------------------------- MoCo v3


def small_moco():
    torch.manual_seed(0)
    return moco.create("moco_vit_tiny", 32)


def test_moco_keys_come_from_a_moving_average_without_gradient():
    model, views = small_moco(), torch.randn(2, 8, 3, 32, 32, generator=generator())
    encoders = model.base_encoder, model.momentum_encoder
    assert all(p.equal(k) for p, k in zip(*(e.parameters() for e in encoders), strict=True))
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
    for old, base, new in zip(before, *(e.parameters() for e in encoders), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * base)
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    frozen = {n for n, p in model.base_encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_moco_loss_is_the_published_one():
    model, views = small_moco(), torch.randn(2, 8, 3, 32, 32, generator=generator())
    q1, q2, k1, k2 = model(*views)
    _, _, loss = train.moco_losses(q1, q2, k1, k2)
    rows = torch.arange(8)
    expected = sum(
        F.cross_entropy(q @ k.T / train.TEMPERATURE, rows) * 2 * train.TEMPERATURE
        for q, k in ((q1, k2), (q2, k1))
    )
    torch.testing.assert_close(loss, expected)
    args = train.parse_args(["--arch", "moco_vit_s16", "--data", "x.tar", "--batch-size", "512"])
    assert (args.prune, args.lr, args.epochs, args.warmup) == (0.35, 3e-4, 100, 10)
    assert [round(train.moco_momentum(e, args), 6) for e in (0, 50, 100)] == [0.99, 0.995, 1.0]
    groups = train.make_optimizer(model, args, torch.device("cpu")).param_groups
    assert sum(p.numel() for p in groups[0]["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


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
    a, b, _ = train.forward_backward(model, views[:, mine], train.moco_losses, FLOAT32)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for grad in grads:
        if world > 1:
            dist.all_reduce(grad)
            grad /= world
    return {"a": a, "b": b, "grads": grads, "buffers": list(model.buffers())}


@slow
def test_moco_ranks_equal_one_process(tmp_path):
    alone, ranks = moco_step(0, 1), run_ranks(moco_step, 2, tmp_path / "ranks")
    for name in "ab":
        torch.testing.assert_close(torch.cat([r[name] for r in ranks]), alone[name], rtol=0, atol=1e-5)
    for r in ranks:
        for name in ("grads", "buffers"):
            for mine, expected in zip(r[name], alone[name], strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-3, atol=2e-6)


@slow
def test_moco_trains_alike_on_one_and_two_ranks_and_resumes(tmp_path):
    command = ["train.py", "--arch", "moco_vit_tiny", "--data", "shapes:128", "--image-size", "32"]
    command += ["--batch-size", "32", "--epochs", "4", "--workers", "0", "--warmup-threshold", "9"]
    command += ["--lr", "1e-4"]  # at 1e-3 rounding makes the runs part after 4 steps
    for name, torchrun in (("one", 0), ("two", 2)):
        said = run(*command, "--out", str(tmp_path / name), torchrun=torchrun).stdout
    assert "top1" in said and "35% redundant" in said
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    losses = [[r["loss"] for r in log if r["event"] == "epoch"] for log in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert {"top1", "balanced"} <= set(one[-1])
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["scan"] for name in ("one", "two")]
    assert (states[0]["counts"] != states[1]["counts"]).sum() <= 2 < states[0]["counts"].sum()

    process = subprocess.Popen(
        [sys.executable, *command, "--save-every", "1", "--out", str(tmp_path / "cut")],
        cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for text in process.stdout:
        if text.startswith("epoch   1"):
            break
    process.kill(), process.wait()
    run(*command, "--save-every", "1", "--out", str(tmp_path / "cut"))
    whole, cut = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("one", "cut"))
    assert any("momentum_encoder" in k for k in whole) and all(v.equal(cut[k]) for k, v in whole.items())


def test_augmentation_equals_torchvision_sample_by_sample():
    from torchvision.transforms.v2 import functional as V

    images = (torch.rand(48, 3, 24, 24, generator=generator()) * 255).to(torch.uint8)
    images[:16, 0] = 7  # flat channels: hues at the corners
    torch.manual_seed(0)
    drawn = torch.stack([data.draw_view(0.5, 0.5) for _ in images])
    adjust = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for x, numbers, mine in zip(images / 255, drawn, data.augment(images, drawn) / 255, strict=True):
        for kind in list(itertools.permutations(range(4)))[int(numbers[data.ORDER])]:
            x = adjust[kind](x, numbers[kind].item())
        if numbers[data.GREY]:
            x = V.rgb_to_grayscale(x, 3)
        if numbers[data.SIGMA]:
            x = V.gaussian_blur(x, [13, 13], [numbers[data.SIGMA].item()] * 2)
        if numbers[data.SOLARIZE]:
            x = V.solarize(x, 128 / 255)
        if numbers[data.FLIP]:
            x = V.horizontal_flip(x)
        assert ((x - mine).abs() < 2e-3).double().mean() > 0.99  # but where solarizing tips at its threshold
    neutral = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0, 0]] * 48)
    torch.testing.assert_close(data.augment(images, neutral), images.float(), rtol=0, atol=1e-3)


def test_views_follow_the_stated_distributions_and_differ_per_sample():
    torch.manual_seed(0)
    n = 4000
    assert [(view["blur"], view["solarize"]) for view in data.MOCO_VIEWS] == [(1.0, 0.0), (0.1, 0.2)]
    for view in data.MOCO_VIEWS:
        x = torch.stack([data.draw_view(**view) for _ in range(n)])
        jittered = x[:, data.BRIGHTNESS] != 1
        blurred = x[:, data.SIGMA] > 0
        for chosen, p in (
            (jittered, 0.8), (x[:, data.GREY], 0.2), (x[:, data.FLIP], 0.5),
            (blurred, view["blur"]), (x[:, data.SOLARIZE], view["solarize"]),
        ):  # fmt: skip
            assert abs(chosen.double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / n)
        for kind, centre, reach in zip(range(4), (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1), strict=True):
            values = x[jittered, kind]
            assert (values - centre).abs().max() <= reach + 1e-6
            assert values.std() == pytest.approx(reach / math.sqrt(3), rel=0.05)
        sigma = x[blurred, data.SIGMA]
        assert 0.1 <= sigma.min() and sigma.max() <= 2 and sigma.mean() == pytest.approx(1.05, rel=0.08)
        assert len(x[jittered, data.ORDER].unique()) == 24
    dataset = data.Views(data.Shapes(8), 16, seed=1)
    _, _, crops, drawn = data.collate([dataset[i] for i in (0, 0, 1)])
    assert crops.shape == (3, 2, 3, 16, 16) and crops.dtype == torch.uint8 and drawn.shape == (3, 2, 9)
    assert crops[0].equal(crops[1]) and drawn[0].equal(drawn[1])  # by (seed, epoch, id) alone
    assert not drawn[0].equal(drawn[2]) and not drawn[0, 0].equal(drawn[0, 1])
    assert not crops[0, 0].equal(crops[0, 1])
    dataset.set_epoch(1)
    assert not dataset[0][3].equal(drawn[0])


# ---------------------------------------------------------------- data


def jpeg(colour=(200, 30, 30), size=(40, 30), form="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, form)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
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
    joined = data.open_source(f"{tmp_path}/00002.tar::{tmp_path}/00000.tar")
    assert len(joined) == 20 and joined.caption(0) == "caption 20"
    assert joined.fingerprint() != data.open_source(str(tmp_path / "0000[02].tar")).fingerprint()


def test_index_follows_its_tar_and_is_never_unpickled(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    assert len(data.open_source(path)) == 3
    (cache,) = (tmp_path / "cache" / "scan").iterdir()
    np.save(cache, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    assert len(data.open_source(path)) == 3  # indexed anew
    old = data.open_source(path)
    shard(tmp_path / "a.tar", 5, 4)
    assert data.open_source(path).caption(3) == "caption 8"
    with pytest.raises(data.DataError, match="changed since"):
        old.caption(0)


def test_links_in_tars_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.jpg", "1.txt"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with pytest.raises(data.DataError, match="no sample"):
        data.open_source(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("cut", [100, 700, 5000])
def test_truncated_tar_is_refused(tmp_path, cut):
    path = Path(shard(tmp_path / "a.tar", 0, 5))
    path.write_bytes(path.read_bytes()[:-cut] if cut == 5000 else path.read_bytes()[:cut])
    if cut == 5000:
        path.write_bytes(path.read_bytes()[: 8 * 512 + 100])
    with pytest.raises(data.DataError, match="a.tar"):
        data.open_source(str(path))


@pytest.mark.parametrize("text, message", [
    ("file;caption\na;b\n", "filepath"), ("filepath,title\n", "no rows"), ("", "filepath"),
    ("filepath,title\na\n", "line 2"),
])  # fmt: skip
def test_wrong_tables_get_one_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(data.DataError, match=message) as error:
        data.open_source(str(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tables_of_any_delimiter(tmp_path, delimiter):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "ü.jpg").write_bytes(jpeg())
    rows = [
        ["n", "title", "filepath"],
        ["1", '"two\nlines, quoted"', "img/ü.jpg"],
        ["2", "plain", "img/ü.jpg"],
    ]
    (tmp_path / "a.tsv").write_text("\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    source = data.open_source(str(tmp_path / "a.tsv"))
    assert [source.caption(i) for i in range(2)] == ["two\nlines, quoted", "plain"]
    assert source.image(1).size == (40, 30)


def test_decoding_of_unusual_pictures():
    for content in (
        jpeg(mode="CMYK"),
        jpeg(mode="L"),
        jpeg(form="PNG", mode="P"),
        jpeg(form="GIF"),
        jpeg(size=(1, 1)),
    ):
        assert data.decode(content).mode == "RGB"
    grey = Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    for picture, value in ((grey, 117), (clear, 255)):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        assert abs(data.decode(buffer.getvalue()).getpixel((0, 0))[0] - value) < 3
    upright = Image.new("RGB", (40, 20))
    exif = upright.getexif()
    exif[274] = 6
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", exif=exif)
    assert data.decode(buffer.getvalue()).size == (20, 40)


def test_unreadable_samples_are_replaced_and_named(tmp_path):
    bad = [(b"", b"x"), (b"no picture", b"x"), (jpeg()[:300], b"x"), (jpeg(), b" \n")]
    members = []
    for i, (image, text) in enumerate([(jpeg(), b"good"), *bad, (jpeg(), b"fine")]):
        members += [(f"{i}.jpg", image), (f"{i}.txt", text)]
    source = data.open_source(write_tar(tmp_path / "a.tar", members))
    pairs = data.Pairs(source, data.HashedWords(), 16)
    assert [pairs[i][:2] for i in range(6)] == [
        (0, -1),
        (5, 1),
        (5, 2),
        (5, 3),
        (5, 4),
        (5, -1),
    ]


def test_augmentation_depends_on_seed_epoch_and_id_alone():
    pairs = data.Pairs(data.Shapes(8), data.HashedWords(), 32)
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), pairs[3][2]
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    assert pairs[3][2].equal(first)
    pairs.set_epoch(1)
    assert not pairs[3][2].equal(first)


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


def test_mismatch_shuffles_its_share_and_keeps_the_truth():
    source = data.Shapes(200, ill_matched=0, duplicates=0)
    pairs = data.Pairs(source, data.HashedWords(), 16, mismatch=0.2)
    moved = pairs.truth["ill_matched"]
    assert moved.sum() == 40
    assert all((pairs.caption_of[i] != i) == moved[i] for i in range(200))
    assert sorted(pairs.caption_of) == list(range(200))
    assert pairs.fingerprint() != data.Pairs(source, None, 16).fingerprint()


def test_hashed_words():
    words = data.HashedWords()
    expected = [1 + zlib.crc32(word) % 49405 for word in (b"red", b"circle", b"!")]
    assert words("Red CIRCLE!").tolist() == [49406, *expected, 49407]
    assert (
        len(words("日本語 ok")) == 2 + 4 and len(words("w " * 500)) == 77 and words("w " * 500)[-1] == 49407
    )
    assert words("ＡＢ ﬁ").tolist() == words("ab fi").tolist()


def test_bpe_with_a_small_vocabulary(tmp_path):
    path = tmp_path / "vocab.gz"
    path.write_bytes(gzip.compress(b"version\nr e\nre d</w>\nc a\nca t</w>\n"))
    bpe = data.BPE(path)
    start, end = bpe.vocab_size - 2, bpe.vocab_size - 1
    assert bpe.vocab_size == 512 + 4 + 2
    # bytes are numbered from "!" = 0; the same with </w> from 256; merges from 512
    assert bpe("Red  CAT").tolist() == [start, 513, 515, end]
    assert bpe("cat's").tolist() == [start, 515, 6, ord("s") - 33 + 256, end]
    assert bpe("“red”").tolist() == [start, 1 + 256, 513, 1 + 256, end] == bpe("&quot;red&quot;").tolist()
    assert len(bpe("cat " * 200)) == 77 and bpe("cat " * 200)[-1] == end
    path.write_bytes(b"not gzip")
    with pytest.raises(data.DataError, match="vocab"):
        data.BPE(path)


def test_labels_from_json_and_tables(tmp_path):
    members = []
    for k, group in enumerate(["food", "animals", "food"]):
        members += [
            (f"{k}.jpg", jpeg()),
            (f"{k}.json", json.dumps({"caption": "x", "group": group}).encode()),
        ]
    source = data.open_source(write_tar(tmp_path / "a.tar", members), label_key="group")
    assert source.classes == ["animals", "food"] and source.labels.tolist() == [1, 0, 1]
    with pytest.raises(data.DataError, match="no 'kind'"):
        data.open_source(str(tmp_path / "a.tar"), label_key="kind")
    (tmp_path / "a.csv").write_text("filepath,title,group\na.jpg,x,food\nb.jpg,y,animals\n")
    source = data.open_source(str(tmp_path / "a.csv"), label_key="group")
    assert source.classes == ["animals", "food"] and source.labels.tolist() == [1, 0]


def test_pictures_alone_are_enough_for_moco(tmp_path):
    (tmp_path / "flat").mkdir()
    for k in range(3):
        (tmp_path / "flat" / f"{k}.jpg").write_bytes(jpeg())
    assert len(data.open_source(str(tmp_path / "flat"), captions=False)) == 3
    with pytest.raises(data.DataError, match="no class folders"):
        data.open_source(str(tmp_path / "flat"))
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", jpeg()), ("1.jpg", jpeg())])
    assert len(data.open_source(tar, captions=False)) == 2
    with pytest.raises(data.DataError, match="no sample"):
        data.open_source(tar)


# ---------------------------------------------------------------- eval.py: models

CPU = torch.device("cpu")
WNIDS = ["n01440764", "n01443537", "n01484850", "n02007558"]
COLOURS = ["blue", "green", "red", "yellow"]


def checkpoint_of(model, path):
    text = "hashed words" if isinstance(model, clip_model.CLIP) else None
    args = {"arch": model.arch, "image_size": model.image_size}
    torch.save({"model": model.state_dict(), "args": args, "tokenizer": text}, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of CLIP and one of MoCo, with random weights, in the folders of runs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {"clip": clip_model.create("vit_tiny", 16), "moco": moco.create("moco_vit_tiny", 16)}
    for family, model in models.items():
        (folder / family).mkdir()
        checkpoint_of(model, folder / family / "last.pt")
    return {family: str(folder / family) for family in models}


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
    """The files that torchvision reads, with four samples, and the MD5 sums it expects of them."""
    kind = {"cifar10": data.CIFAR10, "cifar100": data.CIFAR100}[name]
    classes, labels = {"cifar10": (10, "labels"), "cifar100": (100, "fine_labels")}[name]
    rng, folder = np.random.default_rng(0), root / kind.base_folder
    folder.mkdir(parents=True)
    pixels = rng.integers(0, 255, (4, 3072), dtype=np.uint8)
    lists = {"train_list": ["data_batch_1"], "test_list": ["test_batch"]}
    for attribute, names in lists.items():
        entries = []
        for k in names:
            (folder / k).write_bytes(pickle.dumps({"data": pixels, labels: [0, 1, classes - 1, 1]}))
            entries.append([k, hashlib.md5((folder / k).read_bytes()).hexdigest()])
        monkeypatch.setattr(kind, attribute, entries)
    key = "label_names" if name == "cifar10" else "fine_label_names"
    (folder / "meta").write_bytes(pickle.dumps({key: [f"class {k}" for k in range(classes)]}))
    meta = {"filename": "meta", "key": key, "md5": hashlib.md5((folder / "meta").read_bytes()).hexdigest()}
    monkeypatch.setattr(kind, "meta", meta)
    return str(root)


NO_LOADING = ("export", "coreset", "suspects")


def evaluated(capsys, *args):
    """eval.py's last line of JSON."""
    evaluation.main([*map(str, args), *([] if args[0] in NO_LOADING else ["--workers", "0"])])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def eval_refuses(capsys, *args):
    """The one line that eval.py says."""
    with pytest.raises(SystemExit) as exit:
        evaluation.main([*map(str, args), *([] if args[0] in NO_LOADING else ["--workers", "0"])])
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
    torch.save(clip_model.create("vit_tiny", 32).state_dict(), tmp_path / "larger.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "strange.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(
        {"model": {}, "args": {"arch": "gone", "image_size": 16}, "tokenizer": None}, tmp_path / "gone.pt"
    )
    clip, vocab = checkpoints["clip"], tmp_path / "vocab.gz"
    vocab.write_bytes(gzip.compress(b"#version\na b\n"))
    for load, message in (
        (
            lambda: evaluation.load_weights(clip_model.create("vit_tiny", 16), tmp_path / "larger.pt"),
            "size mismatch",
        ),
        (
            lambda: evaluation.load_weights(moco.create("moco_vit_tiny", 16), clip),
            "do not fit moco_vit_tiny at 16 px",
        ),
        (
            lambda: evaluation.load_weights(clip_model.create("vit_tiny", 16), tmp_path / "strange.pt"),
            "do not fit",
        ),
        (lambda: evaluation.load_model(tmp_path / "strange.pt"), "--arch"),
        (lambda: evaluation.load_model(tmp_path / "strange.pt", "vit_tiny", text=False), "token_embedding"),
        (lambda: evaluation.load_model(tmp_path / "list.pt"), "no state dict"),
        (lambda: evaluation.load_model(tmp_path / "gone.pt", text=False), "do not fit|unknown arch"),
        (
            lambda: evaluation.load_model(tmp_path / "larger.pt", "vit_tiny", image_size=33, text=False),
            "multiple",
        ),
        (lambda: evaluation.load_model(tmp_path / "larger.pt", "vit_tiny"), "needs --vocab"),
        (lambda: evaluation.load_model(clip, vocab=vocab), "leave --vocab out"),
        (lambda: evaluation.load_model(clip, vocab=tmp_path / "nowhere.gz"), "nowhere.gz"),
        (lambda: evaluation.load_model(tmp_path), "last.pt: No such file"),
    ):
        with pytest.raises(data.UserError, match=message) as error:
            load()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---------------------------------------------------------------- eval.py: features


def test_evaluation_crops_are_those_of_the_protocols(monkeypatch):
    """CLIP: resize to the size. MoCo, DeiT: to size / 0.875, bicubic; MoCo v3's linear protocol: bilinear."""
    rng, seen = np.random.default_rng(0), []
    picture = Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1))

    class Source:
        image = staticmethod(lambda i, draft=None: picture)
        __len__ = lambda self: 1  # noqa: E731

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
        evaluation.image_features(model, Source(), CPU, encode=features, look=look)
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
        for ask in (
            evaluation.zeroshot_classes,
            lambda source: evaluation.zeroshot(Toy(), words, source, CPU),
        ):
            with pytest.raises(data.UserError, match=message):
                ask(source)
    source.labels = None
    with pytest.raises(data.UserError, match="no classes"):
        evaluation.zeroshot(Toy(), words, source, CPU)


def test_accuracy_by_hand():
    labels = torch.tensor([0] * 9 + [1])
    result = evaluation.accuracy(torch.eye(2)[torch.zeros(10, dtype=torch.long)], labels)
    assert result == {"top1": 0.9, "top5": 1.0, "balanced": 0.5, "n": 10}
    scores = torch.arange(7.0, 0, -1).expand(7, 7)  # the k-th query's class comes k-th: five of seven in time
    assert evaluation.accuracy(scores, torch.arange(7)) == pytest.approx(
        {"top1": 1 / 7, "top5": 5 / 7, "balanced": 1 / 7, "n": 7}
    )


# ---------------------------------------------------------------- eval.py: protocols without training


def test_zero_shot_equals_a_naive_reference():
    model, source, templates = Toy(), Reds(200), ["a {}", "no {} here", "much of {}"]
    classes = []
    for name in source.classes:
        prompts = [unit(embedded(model, template.replace("{}", name))) for template in templates]
        classes.append(unit(np.mean(prompts, 0)))
    cosine = unit(model.rows[:200]) @ np.array(classes).T
    result = evaluation.zeroshot(
        model, clip_model.HashedWords(), source, CPU, templates=templates, batch_size=7
    )
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
    class Source:
        classes, labels = ["a", "b"], np.arange(60) % 2

    features = {True: 100 + 7 * torch.randn(60, 3, generator=generator()), False: torch.randn(60, 3)}
    sources, fitted, asked = {True: Source(), False: Source()}, [], []

    def fake(x, y, classes, penalty):
        fitted.append((x, y, penalty))

        def probe(z):
            asked.append(z)
            right = penalty == 1e-3 and len(z) == 6  # on what is held out
            scores = torch.eye(2)[torch.as_tensor(Source.labels)[: len(z)]]
            held = torch.eye(2)[held_labels(z)] if len(z) == 6 else scores
            return held if right else 1 - held

        return probe

    def held_labels(z):
        rows = [(whole - row).abs().sum(1).argmin() for row in z]
        return torch.as_tensor(Source.labels)[torch.stack(rows)]

    whole = (features[True] - features[True].mean(0)) / features[True].std(0)
    monkeypatch.setattr(evaluation, "_logistic_regression", fake)
    monkeypatch.setattr(evaluation, "image_features", lambda m, source, d: features[source is sources[True]])
    result = evaluation.linear(None, sources[True], sources[False], CPU)
    assert result["penalty"] == 1e-3 and result["protocol"] == "linear" and result["n"] == 60
    assert [penalty for *_, penalty in fitted] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e-3]
    torch.testing.assert_close(fitted[-1][0], whole, rtol=1e-3, atol=1e-4)
    for (x, y, _), held in zip(fitted[:5], asked[:5], strict=True):
        assert len(x) == 54 and len(held) == 6  # together all, each with its own label
        assert sorted(torch.cat([x, held])[:, 0].tolist()) == pytest.approx(
            sorted(whole[:, 0].tolist()), abs=1e-3
        )
        assert y.equal(held_labels(x))
    expected = (features[False] - features[True].mean(0)) / features[True].std(0)
    torch.testing.assert_close(asked[-1], expected, rtol=1e-3, atol=1e-3)


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
        ours, theirs = (
            evaluation.augmentation(protocol, 64)[0],
            transforms.Compose([*steps, transforms.PILToTensor()]),
        )
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
    epochs, peak, decay, per_epoch = 3, {"sgd": 0.5, "wise-ft": 0.01, "deit": 0.01}[protocol], 0.1, 3
    per_epoch = 3 if protocol == "sgd" else 2  # the last two of ten are a batch of their own there
    settings = dict(epochs=epochs, batch_size=4, lr=peak, wd=decay, workers=0, seed=7)
    evaluation.train_classifier(ours, source, protocol, CPU, **settings)

    tower = theirs.model.visual if clip else theirs.model.base_encoder
    weights = dict(tower.named_parameters()) if protocol != "sgd" else {}
    weights = {k: p for k, p in weights.items() if not k.startswith("head.")} | dict(
        theirs.head.named_parameters("h")
    )
    velocity, second, losses = {}, {}, []
    mean, std = theirs.model.pixel_mean, theirs.model.pixel_std
    theirs.model.train(protocol != "sgd")
    for epoch in range(epochs):
        order = torch.randperm(10, generator=generator(7 + epoch))
        losses.append([])
        for step in range(per_epoch):
            ids, t = order[4 * step : 4 * step + 4], epoch * per_epoch + step
            images = (torch.from_numpy(pixels[ids]).permute(0, 3, 1, 2) / 255 - mean) / std
            x = tower(images) if clip else tower.forward_features(images)
            logits = (F.normalize(x, dim=-1) if clip else x) @ theirs.head.weight.T + theirs.head.bias
            target = F.one_hot(torch.from_numpy(source.labels)[ids], 3).float()
            if protocol == "deit":
                target = 0.9 * target + 0.1 / 3
            loss = -(target * logits.log_softmax(1)).sum(1).mean()
            losses[-1].append(loss.item())
            grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            if protocol == "sgd":
                rate = peak * (1 + math.cos(math.pi * epoch / epochs)) / 2
            else:  # a fifth of the six steps is one
                rate = peak * (1 + math.cos(math.pi * max(t - 1, 0) / (6 - 1))) / 2
                norm = torch.stack([g.norm() for g in grads.values()]).norm()
                grads = {k: g * min(1, 1 / (norm + 1e-6)) for k, g in grads.items()}
            with torch.no_grad():
                for k, p in weights.items():
                    g = grads[k]
                    if protocol == "sgd":
                        velocity[k] = 0.9 * velocity.get(k, 0) + g + decay * p
                        p -= rate * velocity[k]
                        continue
                    spared = p.ndim < 2 or k in ("cls_token", "pos_embed")
                    p *= 1 - rate * (0.0 if spared else decay)
                    velocity[k] = 0.9 * velocity.get(k, 0) + 0.1 * g
                    second[k] = 0.999 * second.get(k, 0) + 0.001 * g**2
                    unbiased = (second[k] / (1 - 0.999 ** (t + 1))).sqrt()
                    p -= rate * velocity[k] / (1 - 0.9 ** (t + 1)) / (unbiased + 1e-8)
    for (name, p), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith(("in_proj_bias", "qkv.bias")):
            continue  # a key's bias has no gradient but rounding, which AdamW makes as large as any
        torch.testing.assert_close(
            p, expected, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    said = capsys.readouterr().out.splitlines()
    for epoch, line in enumerate(said):
        assert line.startswith(f"epoch   {epoch}/3  loss ")
        assert float(line.split()[3]) == pytest.approx(np.mean(losses[epoch]), abs=2e-3)
    assert len(said) == epochs


def test_commands_train_by_their_recipes(checkpoints, tmp_path, monkeypatch, capsys):
    """Every number of a recipe, the head that it starts from, and what evaluation then looks at."""
    root, calls, looks, mixes = tree(tmp_path / "a", COLOURS, 2), [], [], []

    def train_classifier(classifier, train, protocol, device, **settings):
        calls.append((classifier, protocol, settings))

    def classify(classifier, source, folders, device, workers, look):
        looks.append(look)
        return {"top1": 0.5, "n": 8}

    monkeypatch.setattr(evaluation, "train_classifier", train_classifier)
    monkeypatch.setattr(evaluation, "classify", classify)
    bilinear = transforms.InterpolationMode.BILINEAR
    small = 8 / 1024
    for command, flags, protocol, expected in (
        ("linear", "--protocol sgd", "sgd", dict(epochs=90, batch_size=1024, lr=3 * 8 / 256, wd=0)),
        ("linear", "--protocol sgd --batch-size 4", "sgd", dict(epochs=90, batch_size=4, lr=12 / 256, wd=0)),
        ("linear", "--protocol sgd --lr 1 --wd 2 --epochs 3 --seed 4", "sgd",
         dict(epochs=3, batch_size=1024, lr=1, wd=2, seed=4)),
        ("finetune", "", "wise-ft", dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, seed=0)),
        ("finetune", "", "deit", dict(epochs=150, batch_size=1024, lr=1e-3 * small, wd=0.05)),
    ):  # fmt: skip
        run = checkpoints["clip" if protocol == "wise-ft" else "moco"]
        common = [command, "--checkpoint", run, "--data", root, "--val-data", root, *flags.split()]
        result = evaluated(capsys, *common)
        classifier, used, settings = calls.pop()
        assert used == protocol == result["protocol"] and result["n"] == 8
        assert {k: settings[k] for k in expected} == pytest.approx(expected), flags
        look = dict(crop=0.875, interpolation=bilinear) if command == "linear" else None
        assert looks.pop() == look and classifier.frozen == (command == "linear")
    model, words = evaluation.load_model(checkpoints["clip"])
    evaluated(capsys, "finetune", "--checkpoint", checkpoints["clip"], "--data", root, "--val-data", root)
    head, expected = calls.pop()[0].head, []
    for name in COLOURS:
        expected.append(
            F.normalize(model.encode_text(torch.tensor(words(f"a photo of a {name}."))[None]), dim=-1)
        )
    torch.testing.assert_close(head.weight, torch.cat(expected) / 0.07, rtol=1e-4, atol=1e-4)
    assert not head.bias.any()
    monkeypatch.undo()
    for name in ("MixUp", "CutMix"):
        kind = getattr(v2, name)
        note = lambda alpha, num_classes, kind=kind, name=name: (  # noqa: E731
            mixes.append((name, alpha)), kind(alpha=alpha, num_classes=num_classes))[1]  # fmt: skip
        monkeypatch.setattr(evaluation.v2, name, note)
    flags = ["--epochs", "1", "--batch-size", "4", "--workers", "0"]
    args = ["finetune", "--checkpoint", checkpoints["moco"], "--data", root, "--val-data", root, *flags]
    soft, real = [], F.cross_entropy
    note = lambda x, y, **rest: (soft.append((y.ndim, rest)), real(x, y, **rest))[1]  # noqa: E731
    monkeypatch.setattr(evaluation.F, "cross_entropy", note)
    evaluation.main(args)
    assert sorted(mixes) == [("CutMix", 1.0), ("MixUp", 0.8)] and soft == [(2, {"label_smoothing": 0.1})] * 2


@pytest.mark.parametrize("family", ["clip", "moco"])
def test_classifiers_on_class_folders(family, checkpoints, tmp_path, capsys):
    tree(tmp_path / "a" / "train", WNIDS, 8)
    tree(tmp_path / "a" / "val", WNIDS, 2)
    common = ["--checkpoint", checkpoints[family], "--data", tmp_path / "a", "--val-data", tmp_path / "a"]
    for protocol in ("knn", "linear"):
        result = evaluated(capsys, protocol, *common)
        assert result["n"] == 8 and result["top1"] == result["balanced"] == result["top5"] == 1.0
    result = evaluated(capsys, "linear", *common, "--protocol", "sgd", "--epochs", "20", "--lr", "1")
    assert result["n"] == 8 and result["top1"] > 0.5  # chance .25
    numbers = tree(tmp_path / "v2", ["0", "1", "2", "3"], 2)
    some = tree(tmp_path / "r", WNIDS[:2], 2)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(COLOURS))
    more = ["--classnames", names] if family == "clip" else []
    result = evaluated(
        capsys, "finetune", *common, *more, "--epochs", "15", "--lr", "2e-3", "--batch-size", "16",
        "--test-data", numbers, some, "--out", tmp_path / "tuned.pt",
    )  # fmt: skip
    assert result["top1"] >= 0.75 and result["test"][numbers]["n"] == 8 and result["test"][some]["n"] == 4
    assert result["test"][numbers]["top1"] >= 0.75 and result["test"][some]["top1"] >= 0.75
    tuned = torch.load(tmp_path / "tuned.pt", weights_only=True)
    assert tuned["head.weight"].shape == (4, 96 if family == "moco" else 128)


def test_what_does_not_fit_is_said_before_training(checkpoints, tmp_path, capsys, monkeypatch):
    some, numbers = tree(tmp_path / "r", WNIDS[:2], 1), tree(tmp_path / "v2", ["0", "10"], 1)
    monkeypatch.setattr(evaluation, "train_classifier", None)
    common = ["finetune", "--checkpoint", checkpoints["moco"], "--data", some, "--val-data", some]
    assert "'10'" in eval_refuses(capsys, *common, "--test-data", numbers)
    assert "--out" in eval_refuses(capsys, *common, "--out", tmp_path / "no" / "where.pt")
    with pytest.raises(SystemExit):
        flags = (
            f"--arch moco_vit_tiny --data {tree(tmp_path / 'a', COLOURS, 4)} --val-data {some} --prune 0.25"
        )
        train.main([*flags.split(), *f"--batch-size 4 --image-size 16 --out {tmp_path / 'out'}".split()])
    assert f"'{WNIDS[0]}'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_fine_tuning(checkpoints, tmp_path, capsys):
    root = tree(tmp_path / "a", COLOURS, 2)
    flags = ["--checkpoint", checkpoints["moco"], "--data", root, "--val-data", root, "--protocol", "sgd"]
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["linear", *flags, "--lr", "1e38", "--epochs", "9", "--workers", "0"])
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
    assert "--label-key" in eval_refuses(capsys, *clip, keyed)
    moco_ = ["knn", "--checkpoint", checkpoints["moco"], "--data", cls, "--val-data", keyed]
    assert evaluated(capsys, *moco_[:-1], cls)["n"] == 3


def test_wrong_trees_and_models_get_one_line(checkpoints, tmp_path, capsys):
    numbers, some = tree(tmp_path / "v2", ["0", "10"], 1), tree(tmp_path / "r", WNIDS[:2], 1)
    for name, text in (("three", "a\nb\nc\n"), ("empty", "\n"), ("plain", "a photo\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    clip, moco_ = (["--checkpoint", checkpoints[k]] for k in ("clip", "moco"))
    for args, message in (
        (["zeroshot", *clip, "--data", numbers], "numbers"),
        (["zeroshot", *clip, "--data", some], "--wnids"),
        (
            ["zeroshot", *clip, "--data", some, "--classnames", tmp_path / "three.txt"],
            "3 names, for 2 classes",
        ),
        (["zeroshot", *clip, "--data", some, "--classnames", tmp_path / "empty.txt"], "is empty"),
        (["zeroshot", *clip, "--data", some, "--wnids", tmp_path / "no.txt"], "--wnids"),
        (["zeroshot", *clip, "--templates", tmp_path / "plain.txt"], "every line needs a {}"),
        (["zeroshot", *clip, "--data", numbers, "--classnames", tmp_path / "three.txt"], "'10'"),
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
    torch.save({"model": model.state_dict(), "args": {"arch": "moco_vit_tiny", "image_size": 16},
                "tokenizer": "bpe 0123"}, tmp_path / "last.pt")  # fmt: skip
    evaluation.main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "x.pt")])
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
    assert len(result["overlap"]) == 4 and len(result["overlap"][-1]["runs"]) == 3
    pair = result["overlap"][0]
    assert pair["kept_chance"] == pytest.approx(0.5385, abs=1e-3)
    assert pair["pruned_chance"] == pytest.approx(0.1765, abs=1e-3)
    a, b = (pruned_set(torch.load(run / "last.pt", weights_only=True)["scan"], 0.3) for run in scanned[:2])
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
    said = capsys.readouterr()
    assert said.err == said.out == ""  # rank 0 does it, and says it


@pytest.mark.parametrize("arch", ["vit_tiny", "moco_vit_tiny"])
def test_suspects_are_listed_worst_first(arch, tmp_path, capsys):
    """A state made by hand over shapes with a fifth of the captions shuffled."""
    n, clip = 40, arch == "vit_tiny"
    source = data.open_source("shapes:40", size=16, captions=clip)
    args = {"arch": arch, "data": "shapes:40", "image_size": 16, "mismatch": 0.2 if clip else 0.0}
    args |= {"img_key": "filepath", "caption_key": "title", "label_key": None}
    pairs = data.Pairs(source, None, 16, mismatch=0.2)
    planted = pairs.truth["ill_matched"]
    quantile = torch.linspace(0.95, 0.05, n, dtype=torch.float64)[torch.argsort(torch.argsort(
        torch.from_numpy(~planted).double(), stable=True))]  # fmt: skip
    high, low = quantile > 0.5, quantile < 0.3
    ill, redundant = 2 * high.to(torch.int16), 3 * low.to(torch.int16)
    ill[low.nonzero()[0]] = 1  # marked as both: more often as redundant
    scan = {
        "counts": ill + redundant,
        "ill_counts": ill,
        "quantile": quantile.half(),
        "rounds": 4,
        "num_samples": n,
    }
    dataset = pairs if clip else data.Samples(source, 0)
    checkpoint = {"scan": scan, "args": args, "data": {"size": n, "hash": dataset.fingerprint()}}
    torch.save(checkpoint, tmp_path / "last.pt")
    out = tmp_path / "s.csv"
    result = evaluated(capsys, "suspects", tmp_path, "--share", "1", "--out", out)
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = [row["kind"] for row in rows]
    assert kinds == ["ill-matched"] * int(high.sum()) + ["redundant"] * int(low.sum())
    assert result["ill_matched"] == int(high.sum()) and result["redundant"] == int(low.sum())
    values = [float(row["quantile"]) for row in rows]
    assert values[: int(high.sum())] == sorted(values[: int(high.sum())], reverse=True)
    assert values[int(high.sum()) :] == sorted(values[int(high.sum()) :])
    for row in rows:
        i = int(row["id"])
        assert row["where"] == source.where(i) and row["rounds"] == "4"
        assert row["caption"] == (pairs.caption(i) if clip else "")
        assert row["marked"] == ("2" if row["kind"] == "ill-matched" else "3")
        assert float(row["quantile"]) == pytest.approx(float(quantile[i]), abs=1e-3)
    if clip:  # first all the planted ones: of the first two, four, six rows
        total = int(planted.sum())
        for first, share in (("0.05", 2), ("0.1", 4), ("0.15", 6)):
            right = min(share, total)
            assert result[f"first_{first}"] == {"precision": right / share, "recall": right / total}
    result = evaluated(capsys, "suspects", tmp_path, "--share", "0.1", "--out", out)
    assert result["ill_matched"] == result["redundant"] == 4
    assert "not the data" in eval_refuses(capsys, "suspects", tmp_path, "--data", "shapes:80", "--out", out)


# ---------------------------------------------------------------- eval.py: ranks, devices, flags


def test_devices_and_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert evaluation.start_ranks("auto") == evaluation.start_ranks("cpu") == (0, 1, CPU)
    for device in ("cuda", "mps"):
        with pytest.raises(data.UserError, match="use --device cpu"):
            evaluation.start_ranks(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (
        evaluation.start_ranks("mps")[2] == torch.device("mps") and evaluation.start_ranks("auto")[2] == CPU
    )
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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert evaluation.precision("auto", torch.device("cuda", 0)) == "fp32"  # V100, T4: only emulated
    assert evaluation.precision("bf16", CPU) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert evaluation.precision("auto", torch.device("cuda", 0)) == "bf16"
    assert evaluation.precision("auto", CPU) == "fp32" and evaluation.precision("fp32", used[0]) == "fp32"


@pytest.mark.parametrize(
    "cores, local, expected", [(64, 1, 32), (64, 4, 16), (4, 1, 4), (2, 8, 1), (None, 1, 6)]
)
def test_loading_processes_by_the_cores_that_a_rank_has(cores, local, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    if cores:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
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


def test_help_shows_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    actions, real = [], evaluation.Parser.add_argument
    monkeypatch.setattr(
        evaluation.Parser, "add_argument", lambda self, *a, **k: actions.append((self, real(self, *a, **k)))
    )
    for command in evaluation.ABOUT:
        actions.clear()
        with pytest.raises(SystemExit):
            evaluation.parse_args([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        flags = [action for parser, action in actions if parser.prog.endswith(command)]
        assert len(flags) > 2
        for action in flags:
            assert action.help or action.dest == "help", action
            if action.default not in (None, "==SUPPRESS==", []) and action.default is not False:
                assert f"{' '.join(action.help.split())} (default: {action.default})" in said
        if command == "linear":
            assert "default: 90 (sgd)" in said and "default: 1024 (sgd)" in said and "3 x batch / 256" in said
        if command == "finetune":
            assert (
                "default: 10 (wise-ft), 150 (deit)" in said and "default: 512 (wise-ft), 1024 (deit)" in said
            )
            assert "default: 0.1 (wise-ft), 0.05 (deit)" in said and "3e-5 (wise-ft)" in said


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


# ---------------------------------------------------------------- the paper's ablations, from flags alone


def dropped(out, monkeypatch, *flags):
    """-> candidates of each kind, and the log's epochs, of a short run with these flags."""
    saved = {}
    monkeypatch.setattr(train, "save", lambda out, checkpoint: saved.update(checkpoint))
    train.main([
        *"--arch vit_tiny --data shapes:80 --image-size 16 --batch-size 20 --epochs 7 --workers 0".split(),
        *"--warmup-threshold 9 --eval-every 0 --val-data shapes:4".split(), "--out", str(out), *flags,
    ])  # fmt: skip
    marked = [int(saved["scan"][kind][:-1].sum()) for kind in ("redundant", "ill_matched")]
    return *marked, [r for r in records(out) if r["event"] == "epoch"]


@pytest.mark.parametrize(
    "flags, redundant, ill_matched, shares",
    [
        ("--prune 0.1", 8, 8, [0, 0.25, 0.75, 1, 0]),
        ("--prune 0.3", 24, 24, [0, 0.25, 0.75, 1, 0]),
        ("--prune 0.35", 28, 28, [0, 0.25, 0.75, 1, 0]),
        ("--prune 0.5", 40, 40, [0, 0.25, 0.75, 1, 0]),
        ("--prune 0.3 --rho-ill 0", 24, 0, [0, 0.25, 0.75, 1, 0]),
        ("--prune 0.3 --rho-red 0", 0, 24, [0, 0.25, 0.75, 1, 0]),
        ("--rho-red 0.3 --rho-ill 0.1", 24, 8, [0, 0.25, 0.75, 1, 0]),
        ("--rho-red 0.2 --rho-ill 0.2", 16, 16, [0, 0.25, 0.75, 1, 0]),
        ("--rho-red 0.1 --rho-ill 0.3", 8, 24, [0, 0.25, 0.75, 1, 0]),
        ("--prune 0.3 --t-cos 2", 24, 24, [0, 0.5, 1, 0, 0.5]),
        ("--prune 0.3 --t-cos 4", 24, 24, [0, 0.1464, 0.5, 0.8536, 1]),
        ("--prune 0.3 --warmup-rule printed", 0, 0, [0] * 5),
        ("--prune 0", 0, 0, [0] * 5),
    ],
)
def test_ablations_change_what_is_dropped(flags, redundant, ill_matched, shares, tmp_path, monkeypatch):
    red, ill, log = dropped(tmp_path, monkeypatch, *flags.split())
    assert (red, ill) == (redundant, ill_matched)
    found = log[2]["candidates"]  # a sample may be lowest in one direction and highest in the other
    assert 0.8 * (red + ill) <= found <= red + ill
    rounds = (
        [log[2]["candidates"]] * 5 if "--t-cos 2" not in flags else [found] * 3 + [log[5]["candidates"]] * 2
    )
    kept = [80, 80] + [80 - int(share * d) for share, d in zip(shares, rounds, strict=True)]
    assert [r["kept"] for r in log] == kept
    assert [r["samples"] for r in log] == [k // 20 * 20 for k in kept]  # at 0.5, one epoch trains on nothing


# ---------------------------------------------------------------- train.py as its user runs it


def run(*args, torchrun=0, check=0, timeout=300, **env):
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(torchrun),
        "--master_port",
        str(free_port()),
    ]
    command = [sys.executable, *(launcher if torchrun else []), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == check, done.stdout + done.stderr
    return done


SMALL = ["train.py", "--arch", "vit_tiny", "--data", "shapes:128", "--image-size", "32", "--batch-size", "32"]
SMALL += ["--eval-every", "0", "--workers", "1", "--warmup-threshold", "9"]


def records(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def without_times(out):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records(out)]


@slow
def test_torchrun_trains_resumes_and_evaluates(tmp_path):
    """Two ranks, killed in mid-epoch and resumed: the same weights and log as uninterrupted; then eval.py."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*SMALL, "--epochs", "6"]
    said = run(*command, "--out", str(whole), torchrun=2).stdout
    assert (
        "ln(32) = 3.466" in said and "16 per rank x 2" in said and "saved" in said and "ill-matched" in said
    )
    stages = [r["stage"] for r in records(whole) if r["event"] == "epoch"]
    assert stages == ["warm-up"] * 2 + ["preparation"] + ["mutation"] * 3
    assert records(whole)[5]["kept"] < records(whole)[4]["kept"] < 128

    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    killed = subprocess.Popen(
        [*launcher, *command, "--save-every", "1", "--out", str(cut)],
        cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    for text in killed.stdout:
        if "preparation" in text:
            break
    time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert "from epoch" in run(*command, "--save-every", "1", "--out", str(cut), torchrun=2).stdout
    one, other = (torch.load(out / "last.pt", weights_only=True) for out in (whole, cut))
    assert all(v.equal(other["model"][k]) for k, v in one["model"].items())
    assert one["scan"]["counts"].equal(other["scan"]["counts"])
    assert without_times(whole) == without_times(cut)

    again = run(*command, "--out", str(whole), torchrun=2).stdout
    assert "finished" in again and "saved" in again
    refused = run(*command, "--lr", "0.5", "--out", str(whole), check=1)
    assert refused.stderr.count("\n") == 1 and "--lr" in refused.stderr
    result = run("eval.py", "zeroshot", "--checkpoint", str(whole / "last.pt"), "--workers", "0").stdout
    assert json.loads(result.splitlines()[-1])["n"] == 512


@slow
def test_first_steps_agree_over_ranks_and_accumulation(tmp_path):
    losses = {}
    for name, torchrun, extra in (("one", 0, []), ("two", 2, []), ("accum", 0, ["--accum", "2"])):
        run(*SMALL, "--epochs", "1", "--out", str(tmp_path / name), *extra, torchrun=torchrun)
        losses[name] = records(tmp_path / name)[0]["loss"]
    assert losses["one"] == pytest.approx(losses["two"], abs=1e-4) == pytest.approx(losses["accum"], abs=1e-4)


@slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    command = [*SMALL, "--epochs", "4", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.PIPE, text=True)
    for text in process.stdout:
        if text.startswith("epoch   0"):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "goes on from here" in rest
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] >= 1
    (tmp_path / "last.pt").write_bytes(b"cut short")
    (tmp_path / "log.jsonl").open("a").write('{"epoch": 1, "eve')
    if (tmp_path / "prev.pt").exists():
        assert "damaged" in run(*command).stdout
        assert [r["epoch"] for r in records(tmp_path) if r["event"] == "epoch"] == [0, 1, 2, 3]


ANY, SHARE = None, "-0.1 1.1 nan x"
NATURAL, COUNT = "0 -1 1.5 99999999999999999999 x", "-1 1.5 99999999999999999999 x"
FINITE = "-1 nan inf x"
BAD_VALUES = {  # every flag of train.py; ANY: what is wrong with it shows when it is opened
    "--arch": "what", "--data": ANY, "--val-data": ANY, "--img-key": ANY, "--caption-key": ANY,
    "--label-key": ANY, "--mismatch": SHARE, "--prune": SHARE + " 0.6", "--rho-red": SHARE + " 0.8",
    "--rho-ill": SHARE + " 0.8", "--t-cos": NATURAL, "--warmup-threshold": "nan inf x",
    "--warmup-rule": "what", "--keep": ANY, "--epochs": NATURAL, "--batch-size": NATURAL + " 1",
    "--accum": NATURAL + " 3", "--lr": FINITE, "--wd": FINITE, "--warmup": FINITE + " 99",
    "--image-size": NATURAL + " 33 4112",
    "--precision": "fp16", "--compile": "maybe", "--device": "tpu",
    "--crop-min": SHARE + " 0", "--workers": COUNT + " 1025",
    "--eval-every": COUNT,
    "--save-every": COUNT, "--max-bad": SHARE, "--seed": COUNT, "--vocab": ANY, "--out": ANY,
}  # fmt: skip
BAD_SETS = [
    "--rho-red 0.6 --rho-ill 0.5", "--arch rn50 --accum 2", "--arch swin_b --accum 2",
    "--arch moco_vit_tiny --accum 2", "--arch moco_vit_tiny --mismatch 0.1",
    "--arch moco_vit_tiny --vocab v.gz", "--no-such-flag 3", "stray", "--epochs",
]  # fmt: skip


def test_bad_arguments_exit_2_in_one_line(capsys, monkeypatch):
    common = ["--arch", "vit_tiny", "--data", "shapes:128", "--image-size", "32", "--batch-size", "32"]
    sets = [f"{flag} {value}" for flag, values in BAD_VALUES.items() for value in (values or "").split()]
    for flags in sets + BAD_SETS:
        with pytest.raises(SystemExit) as stop:
            train.parse_args([*common, *flags.split()])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1, flags
        assert any(word in said for word in flags.split() if not word[-1].isdigit()), said  # names the flag
    known = set()
    monkeypatch.setattr(
        evaluation.Parser,
        "parse_args",
        lambda self, argv: known.update(self._option_string_actions) or sys.exit(0),
    )
    with pytest.raises(SystemExit):
        train.parse_args([])
    assert known == set(BAD_VALUES) | {"-h", "--help"}


@slow
def test_under_torchrun_rank_0_alone_says_it(tmp_path):
    said = run(*SMALL, "--prune", "2", torchrun=2, check=1).stderr
    assert len([line for line in said.splitlines() if "--prune" in line and "must be" in line]) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data nowhere.tar", "nowhere.tar"),
        ("--data nowhere", "neither"),
        ("--data shapes:16", "global batch"),
        ("--keep nowhere.npy", "--keep"),
        ("--vocab nowhere.gz", "--vocab"),
        ("--batch-size 64", "pruning may leave"),
        ("--out /dev/null/x", "--out"),
    ],
)
def test_bad_input_exits_1_in_one_line(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL[1:], "--device", "cpu", "--out", str(tmp_path / "out"), *flags.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and message in said


# ---------------------------------------------------------------- nothing is lost

# Run as `python -c DIES moment train.py's arguments`: train.py, killed for good at that moment.
DIES = """
import os, signal, sys
import torch, scan, train
moment = sys.argv.pop(1)
marker = os.environ.get("DIE_ONCE")
def die(*_, **__):
    if marker:
        open(marker, "x").close()
    os.kill(os.getpid(), signal.SIGKILL)
if marker and (os.path.exists(marker) or os.environ["RANK"] != "1"):
    moment = ""
observe, save, replace, add = scan.Scan.observe, torch.save, os.replace, train.Log.add
def dying_observe(self, *args):
    observe(self, *args)
    if moment == f"{self.stage} {self.step}":
        die()
def dying_save(checkpoint, file):
    if moment == "writing":
        file.write(b"half a checkpoint"), file.flush(), die()
    save(checkpoint, file)
def dying_replace(a, b):
    if moment == "renaming" and b.endswith("last.pt"):
        die()
    replace(a, b)
def dying_add(self, record):
    if moment == "logging" and record["event"] == "eval":
        with open(self.path, "a") as file:
            file.write('{"event": "ev'), file.flush(), die()
    add(self, record)
scan.Scan.observe, torch.save, os.replace, train.Log.add = dying_observe, dying_save, dying_replace, dying_add
if moment == "evaluating":
    train.evaluate = die
train.main(sys.argv[1:])
"""
BRIEF = "--image-size 16 --batch-size 24 --data shapes:96 --val-data shapes:16 --warmup-threshold 9".split()
BRIEF += "--epochs 6 --workers 0 --eval-every 1".split()


def same_run(a, b):
    """Two run folders hold the same weights, optimizer, candidates, counts and log, bit for bit."""
    one, other = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))

    def equal(x, y):
        if torch.is_tensor(x):
            return x.equal(y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        return x == y

    return all(equal(one[k], other[k]) for k in ("model", "optimizer", "scan")) and (
        without_times(a) == without_times(b)
    )


@slow
@pytest.mark.parametrize("arch", ["vit_tiny", "moco_vit_tiny"])
def test_killed_at_every_kind_of_moment_and_resumed(arch, tmp_path):
    flags = ["--arch", arch, *BRIEF, "--save-every", "2", "--out"]
    run("train.py", *flags, str(tmp_path / "whole"))
    moments = ["warm-up 3", "writing", "evaluating", "renaming", "logging", "preparation 3", "mutation 3"]
    for moment in moments if arch == "moco_vit_tiny" else moments[3:]:
        run("-c", DIES, moment, *flags, str(tmp_path / "cut"), check=-signal.SIGKILL)
    run("train.py", *flags, str(tmp_path / "cut"))
    assert same_run(tmp_path / "whole", tmp_path / "cut")


@slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_restarts_a_run_whose_rank_died(ranks, tmp_path):
    """Three ranks and more are exact because their gradients are summed in the order of the ranks."""
    (tmp_path / "dies.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + DIES)
    flags = ["--arch", "moco_vit_tiny", *BRIEF, "--save-every", "1", "--out"]
    run("train.py", *flags, str(tmp_path / "whole"), torchrun=ranks)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--max-restarts", "1"]
    dying = [str(tmp_path / "dies.py"), "mutation 2", *flags, str(tmp_path / "cut")]
    run(*launcher, "--master_port", str(free_port()), *dying, DIE_ONCE=str(tmp_path / "died"))
    assert (tmp_path / "died").exists() and same_run(tmp_path / "whole", tmp_path / "cut")


@slow
def test_ranks_whose_torchrun_died_stop_and_make_way(tmp_path):
    flags = ["train.py", "--arch", "moco_vit_tiny", *BRIEF, "--save-every", "1", "--out"]
    run(*flags, str(tmp_path / "whole"), torchrun=2)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    agent = subprocess.Popen(
        [sys.executable, *launcher, *flags, str(tmp_path / "cut")], cwd=HERE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for text in agent.stdout:
        if text.startswith("epoch   0"):
            break
    agent.kill(), agent.wait()
    run(*flags, str(tmp_path / "cut"), torchrun=2)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_runs_never_write_to_one_folder(tmp_path):
    holds = "import sys, train; lock = train.claim(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(train.TrainError, match="another run is writing"):
            train.claim(tmp_path, patience=1)
    train.claim(tmp_path, patience=1).close()


@slow
def test_resumes_with_another_number_of_ranks(tmp_path):
    flags = ["--arch", "moco_vit_tiny", *BRIEF, "--save-every", "1", "--out"]
    run("train.py", *flags, str(tmp_path / "whole"))
    run("-c", DIES, "mutation 2", *flags, str(tmp_path / "cut"), check=-signal.SIGKILL)
    run("train.py", *flags, str(tmp_path / "cut"), torchrun=2)
    one, other = (torch.load(tmp_path / n / "last.pt", weights_only=True)["scan"] for n in ("whole", "cut"))
    assert one["counts"].equal(other["counts"]) and one["loss"] == pytest.approx(other["loss"], abs=1e-3)


def test_a_resume_over_something_else_is_refused_and_named(tmp_path, capsys):
    np.save(tmp_path / "keep.npy", np.arange(90))
    flags = ["--arch", "vit_tiny", *BRIEF, "--epochs", "1", "--keep", str(tmp_path / "keep.npy")]
    flags += ["--out", str(tmp_path / "out")]
    train.main(flags)
    before = (tmp_path / "out" / "last.pt").read_bytes()
    for other, message in (
        (["--seed", "1"], "--seed 0, this one has 1"), (["--t-cos", "2"], "--t-cos"), (["--lr", "1"], "--lr"),
        (["--data", "shapes:97"], "other data (96 samples"), (["--mismatch", "0.2"], "--mismatch"),
        (["--arch", "vit_s32", "--image-size", "32"], "--arch"), (["--prune", "0.2"], "--prune"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, *other])
        assert stop.value.code == 1 and message in capsys.readouterr().err
    np.save(tmp_path / "keep.npy", np.arange(1, 91))
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "other ids" in capsys.readouterr().err
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


def test_a_full_disk_is_said_and_leaves_the_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    train.save(tmp_path, {"x": torch.ones(3)})
    log = train.Log(tmp_path, 0, train.claim(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(train.TrainError, match="cannot be written"):
            train.save(tmp_path, {"x": torch.ones(100_000)})
        with pytest.raises(train.TrainError, match="cannot be written"):
            log.add({"event": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new.pt").exists()
    assert train.load(tmp_path, print)["x"].equal(torch.ones(3))


def disagree(rank, world):
    said = []
    for values in (torch.arange(5), torch.arange(5) + rank):
        try:
            train.check_ranks_agree("kept samples", values, torch.device("cpu"))
            said.append("")
        except train.TrainError as error:
            said.append(str(error))
    return said


@slow
def test_ranks_that_disagree_stop(tmp_path):
    for same, different in run_ranks(disagree, 2, tmp_path / "ranks"):
        assert same == "" and "disagree on the kept samples" in different


@slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    """It names the row whose feature is bad, not all the rows that the bad key spoils."""
    finite = torch.ones(3, 4, dtype=torch.bool)
    train.refuse_non_finite((1, 7, torch.arange(10, 14), (finite, None)), "out")
    finite[0, 2], finite[2] = False, False
    with pytest.raises(train.TrainError, match=r"epoch 1, step 7, from samples \[12\]"):
        train.refuse_non_finite((1, 7, torch.arange(10, 14), (finite, None)), "out")
    said = run(*SMALL, "--epochs", "3", "--lr", "1e30", "--out", str(tmp_path / "out"), check=1).stderr
    assert "not finite" in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "last.pt").exists() or all(
        v.isfinite().all()
        for v in torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"].values()
    )


def test_keep_trains_on_these_ids_only(tmp_path):
    ids = np.arange(0, 128, 2)
    np.save(tmp_path / "keep.npy", ids)
    mask = train.read_keep(str(tmp_path / "keep.npy"), 128)
    assert mask.nonzero().flatten().tolist() == ids.tolist()


def test_learning_rate_never_bends():
    args = train.parse_args(["--arch", "vit_tiny", "--epochs", "10", "--warmup", "2", "--lr", "1"])
    rates = [train.learning_rate(e / 10, args) for e in range(101)]
    assert rates[10] == 0.5 and max(rates) == rates[20] == 1 and rates[100] == pytest.approx(0)
    assert max(abs(np.diff(rates[20:]))) < 0.03


# ---------------------------------------------------------------- bad data


def png(colour, size=(8, 8)):
    return jpeg(colour, size, form="PNG")


def header(name, size, **fields):
    """One tar header, as a broken or hostile writer might leave it."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def test_bad_tars_are_refused_in_one_line(tmp_path):
    good = Path(write_tar(tmp_path / "good.tar", [("a.png", png("red")), ("a.txt", b"red")])).read_bytes()
    negative = bytearray(header("b.png", 100))
    negative[124:136] = b"\xff" * 11 + b"\x00"  # a negative size, in base 256
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:]))
    for name, content, message in (
        ("gzipped", gzip.compress(good), "not a whole tar"),
        ("empty file", b"", "not a whole tar"),
        ("zeros", bytes(10240), "no sample"),
        ("text", b"hello" * 500, "not a whole tar"),
        ("huge size", header("b.png", 1 << 40) + bytes(2048), "not a whole tar"),
        ("negative size", bytes(negative) + bytes(2048), "not a whole tar"),
        ("no end", good[:2048], "not a whole tar"),
        ("cut in a header", good[:2048] + good[:300], "not a whole tar"),
        ("damaged header", good[:1024] + b"x" + good[1025:], "not a whole tar"),
        ("two joined", good + bytes(1 << 20) + good, "not a whole tar"),
        ("captions alone", good[1024:], "no sample"),
    ):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(data.DataError, match=message) as error:
            data.open_source(str(tmp_path / "bad.tar"))
        assert "\n" not in str(error.value) and "bad.tar" in str(error.value), name
    os.mkfifo(tmp_path / "pipe.tar"), os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe.tar", "pipe.csv"):
        with pytest.raises(data.DataError, match="not a regular file"):
            data.open_source(str(tmp_path / name))


def test_hostile_members_are_passed_over(tmp_path):
    red = png("red")
    parts = [header("../../up.png", len(red)), red, bytes(-len(red) % 512)]
    parts += [header("../../up.txt", 3), b"red", bytes(509)]
    for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.LNKTYPE, "c.png"), (tarfile.DIRTYPE, "d.png")):
        parts += [header(name, 0, type=kind, linkname="/etc/passwd")]
    parts += [header("E.PNG", len(red)), red, bytes(-len(red) % 512), header("E.txt", 1), b"x", bytes(511)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    source = data.open_source(str(tmp_path / "a.tar"))
    assert [source.caption(i) for i in range(len(source))] == ["red", "x"]  # read in place, never extracted
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "cache"}


def test_bad_samples_are_replaced_and_counted(tmp_path):
    bomb = bytearray(png("red"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    deep = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    pictures = [
        b"",
        b"words",
        bytes(bomb),
        jpeg(size=(64, 64))[:-200],
        png("red")[:-30],
        b"GIF89a" + bytes(20),
    ]
    texts = [(".txt", b""), (".txt", b" \n\t"), (".json", b"[1, 2]"), (".json", b'{"caption": null}')]
    texts += [(".json", b'{"text": "x"}'), (".json", b"{"), (".json", deep), (".json", b"\xff\xfe")]
    texts += [(".txt", b"caf\xe9"), (".txt", bytes(9)), (".txt", "red".encode("utf-16"))]
    samples = [(picture, (".txt", b"x")) for picture in pictures] + [(png("red"), text) for text in texts]
    members, n = [], len(samples)
    for i, (picture, (kind, text)) in enumerate([*samples, (png("blue"), (".txt", b"good"))]):
        members += [(f"{i}.png", picture), (f"{i}{kind}", text)]
    pairs = data.Pairs(data.open_source(write_tar(tmp_path / "a.tar", members)), data.HashedWords(), 16)
    assert [pairs[i][:2] for i in range(n + 1)] == [(n, i) for i in range(n)] + [(n, -1)]
    rows = "\n".join(f"{name},x" for name in ("folder", "pipe", "missing.png", "/dev/null", "good.png"))
    (tmp_path / "a.csv").write_text("filepath,title\n" + rows)
    (tmp_path / "folder").mkdir(), os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good.png").write_bytes(png("blue"))
    pairs = data.Pairs(data.open_source(str(tmp_path / "a.csv")), data.HashedWords(), 16)
    assert [pairs[i][:2] for i in range(5)] == [(4, 0), (4, 1), (4, 2), (4, 3), (4, -1)]
    with pytest.raises(ValueError, match="not a regular file"):
        data._read_file(tmp_path / "pipe")


@pytest.mark.parametrize(
    "text", [b"x" * 10_000_000, b"\xef\xbb\xbfred", "\u202e".encode(), "é".encode() * 9999]
)
def test_odd_captions_give_tokens(text, tmp_path):
    source = data.open_source(write_tar(tmp_path / "a.tar", [("a.png", png("red")), ("a.txt", text)]))
    used, failed, _, tokens = data.Pairs(source, data.HashedWords(), 16)[0]
    assert (used, failed) == (0, -1) and 3 <= len(tokens) <= 77


def test_bad_samples_are_logged_and_too_many_end_the_run(tmp_path, capsys):
    members = []
    for i in range(40):
        members += [(f"{i}.png", png((i, 99, 0)) if i != 7 else b"no"), (f"{i}.txt", b"word%d" % i)]
    flags = [
        "--arch",
        "vit_tiny",
        "--data",
        write_tar(tmp_path / "a.tar", members),
        *BRIEF[:4],
        "--epochs",
        "1",
    ]
    flags += ["--workers", "0", "--batch-size", "10", "--prune", "0.1", "--out", str(tmp_path / "out")]
    flags.remove("24"), flags.remove("--batch-size")
    train.main([*flags, "--max-bad", "0.03"])
    bad = records(tmp_path / "out")[0]["bad"]
    assert len(bad) == 1 and "a.tar, image at byte" in bad[0]
    with pytest.raises(SystemExit):
        train.main([*flags[:-1], str(tmp_path / "other"), "--max-bad", "0.02"])
    assert "1 samples can't be read, more than --max-bad 0.02" in capsys.readouterr().err


@slow
def test_bad_samples_of_all_ranks_count_together(tmp_path):
    members = []
    for i in range(40):  # ranks see half of them each: one bad sample alone would be allowed
        members += [(f"{i}.png", png((i, 99, 0)) if i % 10 else b"no"), (f"{i}.txt", b"word%d" % i)]
    flags = ["--arch", "vit_tiny", "--data", write_tar(tmp_path / "a.tar", members), "--image-size", "16"]
    flags += ["--epochs", "1", "--workers", "0", "--batch-size", "20", "--prune", "0.1", "--max-bad", "0.09"]
    said = run("train.py", *flags, "--out", str(tmp_path / "out"), torchrun=2, check=1).stderr
    assert "4 samples can't be read" in said


# ---------------------------------------------------------------- fuzz


def mutate(content, rng):
    """A few bytes flipped, or a stretch cut, zeroed, doubled or moved."""
    content, n = bytearray(content), len(content)
    a, b = sorted(rng.integers(0, n + 1, 2))
    b = min(b, a + int(rng.choice([1, 16, 512, 4096])))
    kind = rng.integers(6)
    if kind == 0:
        for at in rng.integers(0, n, rng.integers(1, 4)):
            content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        content = content[:a]
    elif kind == 2:
        content[a:b] = bytes(b - a)
    elif kind == 3:
        content[a:a] = content[a:b]
    elif kind == 4:
        del content[a:b]
    else:
        at = int(rng.integers(0, n - (b - a) + 1))
        content[at : at + b - a] = content[a:b]
    return bytes(content)


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


def with_checksums(content):
    """Bytes of a tar, whose headers get the checksum of what is in them: else damage never comes further."""
    content = bytearray(content)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b"%06o\0 " % (
                256 + sum(content[at : at + 148]) + sum(content[at + 156 : at + 512])
            )
    return bytes(content)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_fuzzed_tars_give_what_they_hold_or_are_refused(tmp_path, form, monkeypatch):
    monkeypatch.setenv(
        "XDG_CACHE_HOME", os.devnull
    )  # no cache: rewritten within a tick, a file looks the same
    colours, members = [(40 * k, 9, 99) for k in range(5)], []
    folder = "" if form == tarfile.USTAR_FORMAT else "a/long/name/" * 12  # takes headers of its own
    for k, colour in enumerate(colours):
        members += [(f"{folder}{k}.png", png(colour)), (f"{folder}{k}.txt", b"caption number %d" % k)]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        size = tar.offset + 1024
    original = path.read_bytes()[:size]
    read = refused = replaced = 0
    for seed in range(800 * FUZZ):
        rng = np.random.default_rng(seed)
        content = mutate(original, rng)
        path.write_bytes(with_checksums(content) if rng.integers(2) else content)
        try:
            source = data.open_source(str(path))
        except data.DataError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        expected = plainly(path)
        assert [source._read(i, 0) for i in range(len(source))] == [image for image, _ in expected], seed
        pairs = data.Pairs(source, data.HashedWords(), 8)
        try:
            items = [pairs[i] for i in range(len(pairs))]
        except data.DataError as error:
            assert "not one of" in str(error)
            continue
        for i, (used, failed, image, tokens) in enumerate(items):
            text = expected[used][1]
            assert failed == (-1 if used == i else i) and tokens.equal(
                torch.from_numpy(pairs.tokenizer(text.decode()))
            )
            assert tuple(image[:, 0, 0].tolist()) in colours, seed  # PNG's checksums let nothing else through
            replaced += failed == i
        read += 1
        [os.close(file) for file in source._files.values()]
    assert min(read, refused, replaced) > 10 * FUZZ


def test_fuzzed_tables_give_their_rows_or_are_refused(tmp_path):
    rows = [f'images/{k}.png,"a caption, the {k}th"' for k in range(8)]
    original = "\r\n".join(["filepath,title", *rows]).encode()
    path, read, refused = tmp_path / "a.csv", 0, 0
    for seed in range(1500 * FUZZ):
        path.write_bytes(mutate(original, np.random.default_rng(seed)))
        try:
            source = data.open_source(str(path))
        except data.DataError as error:
            refused += 1
            assert "\n" not in str(error)
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


def test_fuzzed_checkpoints_are_whole_or_fall_back(tmp_path):
    def state(k):
        return {
            "model": {"w": torch.full((64,), float(k))},
            "scan": {"epoch": k},
            "args": {"arch": "vit_tiny"},
        }

    train.save(tmp_path, state(1)), train.save(tmp_path, state(2))
    original = (tmp_path / "last.pt").read_bytes()
    outcomes, folders = {1: 0, 2: 0}, []
    for at in range(
        original.index(b"PK\x01\x02"), len(original)
    ):  # in the table of contents, this bit marks a
        folders.append(bytearray(original))  # folder: torch would leave its tensor unset
        folders[-1][at] ^= 0x10
    mutants = (mutate(original, np.random.default_rng(seed)) for seed in range(1000 * FUZZ))
    for number, content in enumerate(itertools.chain(folders, mutants)):
        (tmp_path / "last.pt").write_bytes(content)
        said = []
        loaded = train.load(tmp_path, said.append)
        k = loaded["scan"]["epoch"]
        assert loaded["model"]["w"].equal(state(k)["model"]["w"]), number
        assert loaded["args"] == state(k)["args"] and (k == 1) == bool(said), number
        outcomes[k] += 1
    assert min(outcomes.values()) > 10 * FUZZ


@pytest.mark.parametrize("other", [{}, {"model": {}, "args": {}}])
def test_a_checkpoint_of_something_else_is_refused(other, tmp_path, capsys):
    torch.save(other, tmp_path / "last.pt")
    with pytest.raises(SystemExit):
        train.main([*SMALL[1:], "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert "not written by this version of train.py" in said and said.count("\n") == 1
    assert torch.load(tmp_path / "last.pt", weights_only=True) == other


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickle_is_ever_executed(tmp_path):
    out, mark = tmp_path / "out", tmp_path / "executed"
    out.mkdir()
    torch.save({"model": Payload(str(mark))}, out / "last.pt")
    with pytest.raises(train.TrainError, match="damaged"):
        train.load(out, print)
    with pytest.raises(evaluation.EvalError, match="weights_only"):
        evaluation.load_model(str(out / "last.pt"))
    tar = write_tar(tmp_path / "a.tar", [("a.png", png("red")), ("a.txt", b"red")])
    data.open_source(tar)
    [index] = (tmp_path / "cache" / "scan").iterdir()
    shifted = bytearray(index.read_bytes())
    shifted[-96 + 16] ^= 1  # of the one sample, where its caption starts
    for content in (pickle.dumps(Payload(str(mark))), shifted):
        index.write_bytes(content)
        assert data.open_source(tar).caption(0) == "red"  # indexed anew
    np.save(tmp_path / "keep.npy", np.array([Payload(str(mark))]), allow_pickle=True)
    with pytest.raises(train.TrainError, match="--keep"):
        train.read_keep(str(tmp_path / "keep.npy"), 3)
    assert not mark.exists()


# ---------------------------------------------------------------- stopping, and dying where it hurts


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_too(tmp_path, number):
    """As Ctrl-C and schedulers send it: to the loading processes as well, which are needed until the end."""
    command = [sys.executable, *SMALL, "--epochs", "100", "--workers", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    for text in process.stdout:
        if text.startswith("epoch   0"):
            break
    os.killpg(process.pid, number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and rest.splitlines()[-1].startswith("stopped"), rest


@slow
def test_a_failing_run_does_not_wait_for_its_loading_processes(tmp_path):
    bug = "import sys, train\ntrain.refuse_non_finite = None\ntrain.main(sys.argv[1:])"
    flags = [*SMALL[1:], "--epochs", "1", "--workers", "2", "--out", str(tmp_path)]
    said = run("-c", bug, *flags, check=1, timeout=60).stderr
    assert "not callable" in said and "killed" not in said


class Killed(BaseException):
    """No handler of train.py catches it: the files stay as SIGKILL leaves them."""


TINY = (
    "--data shapes:72 --val-data shapes:20 --batch-size 16 --epochs 9 --device cpu --workers 0 --eval-every 2"
)
TINY += " --warmup-threshold 9 --image-size "


@pytest.fixture
def small(monkeypatch):
    """-> run(arch, out, flags): train.main in this process, with models that take milliseconds a step."""
    return make_small(monkeypatch.setitem)


def make_small(setitem=dict.__setitem__):
    tiny = {"vit_tiny": dict(width=64, layers=1, patch=16), "rn50": dict(width=16, layers=(1, 1, 1, 1))}
    for arch, vision in tiny.items():
        setitem(clip_model.ARCHS, arch, dict(embed_dim=32, vision=vision, text=(64, 1)))
    sizes = dict(width=64, layers=1, heads=1, patch=16, hidden=32, dim=16)
    setitem(train.moco.ARCHS, "moco_vit_tiny", sizes)

    def run(arch, out, flags=""):
        out.parent.mkdir(exist_ok=True)
        vocab = out.parent / "vocab.gz"  # instead of 49408 hashed words
        if not vocab.exists():
            vocab.write_bytes(gzip.compress(b"version\na </w>\n", mtime=0))
        text = "" if arch.startswith("moco") else f"--vocab {vocab}"
        size = 32 if arch == "rn50" else 16
        train.main(f"--arch {arch} {TINY} {size} {text} --out {out} {flags}".split())

    return run


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


def die():
    raise Killed


def assert_same_run(one, other, epochs=9):
    """Checkpoints and logs of two runs agree bit for bit, but for their times."""
    log = without_times(one)
    assert [r["epoch"] for r in log if r["event"] == "epoch"] == list(range(epochs))
    assert log == without_times(other)
    one, other = (torch.load(out / "last.pt", weights_only=True) for out in (one, other))
    for part in ("model", "scan"):
        for name, value in one[part].items():
            same = value.equal(other[part][name]) if torch.is_tensor(value) else value == other[part][name]
            assert same, f"{part} {name}"
    for i, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert value.equal(other["optimizer"]["state"][i][name]), f"optimizer {i} {name}"


# where one start of a run after the other dies: in which function, at which of its calls, before or after it
MOMENTS = """save 1 before, save 1 after, forward_backward 5 before, add 1 before, add 1 after,
evaluate 1 before, evaluate 1 after, fsync 1 before, end_epoch 1 before, end_epoch 1 after,
begin_epoch 2 after, forward_backward 4 after, begin_epoch 2 after, replace 2 after, add 2 after,
replace 3 before, replace 3 after, forward_backward 7 after, evaluate 1 after, evaluate 1 before,
forward_backward 2 before, replace 4 after, evaluate 1 after, print_table 1 before"""
OWNER = {"fsync": os, "replace": os, "add": train.Log, "begin_epoch": Scan, "end_epoch": Scan}


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.parametrize("arch", ["vit_tiny", "moco_vit_tiny", "rn50"])
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
        checkpoint = train.load(cut, print)
        stages |= {(checkpoint["scan"]["stage"], checkpoint["step"] > 0)} if checkpoint else set()
    assert stages >= {(s, m) for s in ("warm-up", "preparation", "mutation") for m in (True, False)}, stages
    small(arch, cut)
    assert_same_run(whole, cut)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(small, tmp_path, monkeypatch):
    """last.pt is damaged and prev.pt used; then the run dies between the two renamings of the next save."""
    whole, cut, replace = tmp_path / "whole", tmp_path / "cut", os.replace

    def dying(a, b):
        if a.endswith("new.pt"):
            die()
        replace(a, b)

    small("vit_tiny", whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", at_call(6, "after", die, train.save))
        small("vit_tiny", cut, "--save-every 1")
    (cut / "last.pt").write_bytes(b"cut short")
    with (cut / "log.jsonl").open("ab") as log:
        log.write(b'{"event": "ep\xff\0')
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        small("vit_tiny", cut, "--save-every 1")
    assert not (cut / "last.pt").exists() and train.load(cut, print)["epoch"] == 1
    small("vit_tiny", cut)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_in_the_last_step_saves_before_the_evaluation(small, tmp_path, monkeypatch, epoch):
    class Stop:
        calls = 0

        def __init__(self, world):
            pass

        def __call__(self):
            Stop.calls += 1
            return Stop.calls == (4, 9)[epoch]  # after each of 4 steps, and at the end of an epoch

    small("vit_tiny", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", Stop)
        patch.setattr(train, "evaluate", die)
        small("vit_tiny", tmp_path / "cut")
    checkpoint = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (epoch, 4)
    small("vit_tiny", tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("spoilt", ["gradient", "picture", "buffer"])
@pytest.mark.parametrize("save_every", [0, 1])
def test_no_checkpoint_ever_holds_what_is_not_finite(
    small, tmp_path, monkeypatch, capsys, spoilt, save_every
):
    """In step 7, the third of epoch 1; a checkpoint of step 7 would hold the spoilt weights."""
    step, inputs, spoil = train.forward_backward, data.Pairs.inputs, []

    def spoiling_step(model, *args):
        result = step(model, *args)
        spoil.append(0)
        if len(spoil) == 7 and spoilt == "gradient":
            next(model.parameters()).grad.view(-1)[0] = math.nan
        if len(spoil) == 8 and spoilt == "buffer":  # of the epoch's last step: no loss ever tells
            next(model.buffers()).view(-1)[0] = math.inf
        return result

    def spoilt_inputs(*args):
        images, tokens = inputs(*args)
        if len(spoil) == 6 and spoilt == "picture":
            images[3, 0, 0, 0] = math.nan
        return images, tokens

    monkeypatch.setattr(train, "forward_backward", spoiling_step)
    monkeypatch.setattr(data.Pairs, "inputs", staticmethod(spoilt_inputs))
    with pytest.raises(SystemExit) as stop:
        small("rn50" if spoilt == "buffer" else "vit_tiny", tmp_path / "out", f"--save-every {save_every}")
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "epoch 1" in said
    assert ("weights" in said) == (spoilt == "buffer" or (spoilt == "gradient" and save_every == 1))
    if spoilt == "picture":
        sampler = ScanSampler(16)
        sampler.set_epoch(1, torch.arange(72))
        assert f"step 3, from samples [{list(sampler)[2][3]}]" in said
    checkpoint = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    last = {"gradient": 2, "picture": 2, "buffer": 3}[spoilt]  # steps of epoch 1 before it
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, last if save_every else 0)
    assert all(x.isfinite().all() for x in checkpoint["model"].values())
    assert len(without_times(tmp_path / "out")) == 1  # epoch 0


def test_an_out_that_cannot_be_written_is_said_at_once(capsys):
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder where nobody may write")
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL[1:], "--device", "cpu", "--out", "/proc"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "--out /proc" in said


def test_only_the_built_in_data_are_shapes():
    assert train.parse_args(["--data", "shapes-of-mine"]).val_data is None
    assert train.parse_args(["--data", "shapes:128"]).val_data == "shapes"


def rank_runs_and_dies(rank, world, ports, folder):
    """Each model on `world` ranks: a run, and one that dies in mid-epoch and in an evaluation."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    small, ports = make_small(), iter(ports)

    def run(out):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(ports))}
        small(out.parent.name, out, "--batch-size 12 --save-every 2 --epochs 6")

    for arch in ("vit_tiny", "rn50"):
        evaluated, evaluate = [], train.evaluate
        train.evaluate = lambda model, *args, e=evaluate, s=evaluated: (e(model, *args), s.append(model))[0]
        run(folder / arch / "whole")
        train.evaluate = evaluate
        for name, number in (("forward_backward", 17), ("evaluate", 1)):
            function = getattr(train, name)
            setattr(train, name, at_call(number, "after", die, function))
            with pytest.raises(Killed):
                run(folder / arch / "cut")
            setattr(train, name, function)
        run(folder / arch / "cut")

    statistics = [float(x.double().sum()) for x in evaluated[-1].buffers()]  # as of the last evaluation
    said = [statistics]
    train.fail = said.append
    run(folder / "vit_tiny" / ("whole" if rank == 0 else "elsewhere"))  # where this rank finds no checkpoint
    inputs = data.Pairs.inputs

    def spoilt(*args):
        images, tokens = inputs(*args)
        images[2, 0, 0, 0] = math.nan if rank == 1 else 0
        return images, tokens

    data.Pairs.inputs = staticmethod(spoilt)
    run(folder / "vit_tiny" / "spoilt")
    (folder / f"said{rank}.json").write_text(json.dumps(said))


@slow
def test_three_ranks_go_on_exactly_and_agree(tmp_path):
    """Which needs one order of gloo's sums, from three ranks on, and one rank's statistics in a ResNet."""
    ports = [free_port() for _ in range(10)]  # a store of the run before may still listen
    mp.start_processes(rank_runs_and_dies, (3, ports, tmp_path), 3, start_method="spawn")
    for arch in ("vit_tiny", "rn50"):
        assert_same_run(tmp_path / arch / "whole", tmp_path / arch / "cut", epochs=6)
    sampler = ScanSampler(12, 1, 3)
    sampler.set_epoch(0, torch.arange(72))
    bad = list(sampler)[0][2]  # of rank 1
    for rank in range(3):
        statistics, other, spoilt = json.loads((tmp_path / f"said{rank}.json").read_text())
        assert statistics == json.loads((tmp_path / "said0.json").read_text())[0] != []
        assert "disagree on the checkpoint" in other
        assert f"step 1, from samples [{bad}]" in spoilt, "every rank names the sample of rank 1"


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_nobody_waits_for_a_lost_rank_for_ever(tmp_path, number):
    """Without torchrun, which would end it: one is killed, or falls silent as on a host that is gone."""
    script = "import sys, train\ntrain.TIMEOUT *= 12 / train.TIMEOUT.seconds\ntrain.main(sys.argv[1:])"
    command = [sys.executable, "-c", script, *SMALL[1:], "--epochs", "1000", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command, cwd=HERE, env=env | {"RANK": str(rank)}, text=True, start_new_session=True,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for text in ranks[0].stdout:
            if text.startswith("epoch   0"):
                break
        ranks[1].send_signal(number)
        said = ranks[0].communicate(timeout=60)[1].splitlines()
        ours = [line for line in said if line.startswith("train.py:")]
        assert ranks[0].returncode == 1 and len(ours) == 1 and "lost another rank" in ours[0], said
        assert not any("Traceback" in line for line in said)
    finally:
        for process in ranks:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
