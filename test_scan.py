"""Tests of SCAN: `pytest -q` (all), `pytest -q -m "not slow"` (seconds)."""

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
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image, features
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


# ---------------------------------------------------------------- data: pictures and text


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


def test_random_crops_are_those_of_torchvision():
    for seed, (width, height) in enumerate(itertools.product((1, 3, 40, 97, 300), repeat=2)):
        for smallest in (0.08, 0.9):
            torch.manual_seed(seed)
            ours, after = data.RandomCrop(8, smallest).draw(width, height), torch.rand(1)
            torch.manual_seed(seed)
            crop = v2.RandomResizedCrop(8, (smallest, 1.0)).make_params([torch.empty(3, height, width)])
            expected = crop["left"], crop["top"], crop["left"] + crop["width"], crop["top"] + crop["height"]
            assert ours == expected and torch.rand(1).equal(after)
    for mode, smallest in (("bicubic", 0.9), ("bilinear", 0.08)):
        for seed in range(8):
            picture = noise(97, 71, seed)
            torch.manual_seed(seed)
            ours = data.RandomCrop(48, smallest, mode)(picture)
            torch.manual_seed(seed)
            crop = v2.RandomResizedCrop(48, (smallest, 1.0), interpolation=v2.InterpolationMode(mode))
            difference = (v2.functional.pil_to_tensor(crop(picture)).int() - ours.int()).abs()
            assert ours.shape == (3, 48, 48) and ours.dtype == torch.uint8
            assert difference.max() <= 1 and (difference > 0).double().mean() < 0.1


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


# ---------------------------------------------------------------- data: sources


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
    assert pickle.loads(pickle.dumps(joined)).caption(19) == "caption 9"  # as loading processes may get it
    assert joined.fingerprint() != data.open_source(str(tmp_path / "0000[02].tar")).fingerprint()
    assert joined.fingerprint() == data.open_source(f"{tmp_path}/0000{{2,0}}.tar").fingerprint()


def test_index_follows_its_tar_and_is_never_unpickled(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    assert len(data.open_source(path)) == 3
    (cache,) = (tmp_path / "cache" / "scan").iterdir()
    whole = cache.read_bytes()
    np.save(cache, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    assert len(data.open_source(path)) == 3 and cache.read_bytes() == whole  # indexed anew
    cache.write_bytes(whole[:140] + b"\7" + whole[141:])
    assert data.open_source(path).caption(0) == "caption 0" and cache.read_bytes() == whole
    old = data.open_source(path)
    shard(tmp_path / "a.tar", 5, 4)
    assert data.open_source(path).caption(3) == "caption 8"
    with pytest.raises(data.UserError, match="changed since"):
        old.caption(0)


def test_ranks_index_from_places_of_their_own_and_share_the_cache(tmp_path, monkeypatch, capsys):
    paths = [shard(tmp_path / f"{k}.tar", 10 * k, 2) for k in range(4)]
    opened, index = [], data._tar_index
    monkeypatch.setattr(data, "_tar_index", lambda path, status: opened.append(path) or index(path, status))
    monkeypatch.setenv("LOCAL_RANK", "1"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    second = data.open_source(str(tmp_path / "*.tar"))
    assert opened == [paths[k] for k in (2, 3, 0, 1)]
    assert [second.caption(i) for i in range(8)] == [
        f"caption {10 * k + j}" for k in range(4) for j in (0, 1)
    ]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(data, "_plain_members", None)  # nothing is indexed twice
    ticks = itertools.count(0, 5)
    monkeypatch.setattr(data.time, "monotonic", lambda: next(ticks))
    assert data.open_source(str(tmp_path / "*.tar")).fingerprint() == second.fingerprint()
    said = capsys.readouterr().err
    assert "\rindexing: 1 of 4 tar files, 2 samples" in said and said.endswith(
        "4 of 4 tar files, 8 samples\n"
    )


LONG = "a/long/name/" * 12  # takes headers of its own
FORMS = {  # form, time and folder of a tar's members, and whether its headers are plain
    "ustar": (tarfile.USTAR_FORMAT, 0, "", True),
    "gnu": (tarfile.GNU_FORMAT, 1.6e9, "a/", True),
    "pax": (tarfile.PAX_FORMAT, 0, "./", True),
    "webdataset's": (tarfile.PAX_FORMAT, 1600000000.25, "", True),
    "ustar, prefix": (tarfile.USTAR_FORMAT, 0, LONG, False),
    "gnu, long": (tarfile.GNU_FORMAT, 0, LONG, False),
    "pax, long": (tarfile.PAX_FORMAT, 0, LONG, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_plain_tars_are_indexed_as_tarfile_reads_them(tmp_path, form):
    form, mtime, folder, plain = FORMS[form]
    members = [(f"{folder}{k}.{kind}", bytes([k]) * 300 * k) for k in range(5) for kind in ("png", "txt")]
    path = write_tar(tmp_path / "a.tar", members, form, int(mtime) if mtime == 1.6e9 else mtime)
    with open(path, "rb") as file:
        found = list(data._members(file))
        file.seek(0)
        assert [(name, file.seek(at) and file.read(size)) for name, at, size in found] == members
        if plain:
            assert list(data._plain_members(file.fileno())) == found
        else:
            with pytest.raises(ValueError):
                list(data._plain_members(file.fileno()))
    source = data.open_source(path)
    assert [source._read(i, part) for i in range(5) for part in (0, 1)] == [content for _, content in members]


def header(name, size, **fields):
    """One tar header, as a broken or hostile writer might leave it."""
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


GOOD = b"".join([header("a.png", 9), bytes(512), header("a.txt", 3), b"red", bytes(509 + 1024)])
NEGATIVE = bytearray(header("b.png", 100))
NEGATIVE[124:136] = b"\xff" * 11 + b"\x00"  # a negative size, in base 256
NEGATIVE[148:156] = b"%06o\0 " % (256 + sum(NEGATIVE[:148]) + sum(NEGATIVE[156:]))


@pytest.mark.parametrize("content, message", [
    (gzip.compress(GOOD), "not a whole tar"), (b"", "not a whole tar"), (b"hello" * 500, "not a whole tar"),
    (bytes(10240), "no sample"), (GOOD[1024:], "no sample"),  # captions alone
    (header("b.png", 1 << 40) + bytes(2048), "not a whole tar"),
    (bytes(NEGATIVE) + bytes(2048), "not a whole tar"),
    (GOOD[:100], "not a whole tar"), (GOOD[:700], "not a whole tar"), (GOOD[:1024], "not a whole tar"),
    (GOOD[:1300], "not a whole tar"), (GOOD[:2048], "not a whole tar"),  # no end mark
    (GOOD[:2048] + GOOD[:300], "not a whole tar"), (GOOD[:1024] + b"x" + GOOD[1025:], "not a whole tar"),
    (GOOD[:250] + b"x" + GOOD[251:], "not a whole tar"),  # in no field that is read
    (GOOD + bytes(1 << 20) + GOOD, "not a whole tar"), (GOOD + GOOD, "not a whole tar"),
    # links and folders alone
    (header("1.jpg", 0, type=b"2", linkname="/etc/passwd") + header("1.txt", 0, type=b"5") + bytes(1024),
     "no sample"),
], ids=bytes_in)  # fmt: skip
def test_bad_tars_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(data.UserError, match=message) as error:
        data.open_source(str(tmp_path / "bad.tar"))
    assert "\n" not in str(error.value) and "bad.tar" in str(error.value)


def test_members_that_are_no_files_are_passed_over(tmp_path):
    red, rest = png("red"), bytes(-len(png("red")) % 512)
    parts = [header("../../up.png", len(red)), red, rest, header("../../up.txt", 3), b"red", bytes(509)]
    for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.LNKTYPE, "c.png"), (tarfile.DIRTYPE, "d.png")):
        parts += [header(name, 0, type=kind, linkname="/etc/passwd")]
    parts += [header("E.PNG", len(red)), red, rest, header("E.txt", 1), b"x", bytes(511)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    source = data.open_source(str(tmp_path / "a.tar"))
    assert [source.caption(i) for i in range(len(source))] == ["red", "x"]  # read in place, never extracted
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "cache"}


@pytest.mark.parametrize("name", ["pipe.tar", "pipe.csv"])
def test_nobody_waits_for_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(data.UserError, match="not a regular file"):
        data.open_source(str(tmp_path / name))


@pytest.mark.parametrize("text, message", [
    ("file;caption\na;b\n", "filepath"), ("filepath,title\n", "no rows"), ("", "filepath"),
    ("filepath,title\na\n", "line 2"), ('filepath,title\na,b\nc,"d\ne,f\n', "line 3: a quote"),
])  # fmt: skip
def test_wrong_tables_get_one_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(data.UserError, match=message) as error:
        data.open_source(str(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tables_of_any_delimiter(tmp_path, delimiter):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "ü.jpg").write_bytes(jpeg())
    rows = [["n", "title", "filepath"], ["1", '"two\nlines, quoted"', "img/ü.jpg"], ["2", "plain", "x.jpg"]]
    rows += [["3", "", "img/ü.jpg"]]
    (tmp_path / "a.tsv").write_text("\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    source = data.open_source(str(tmp_path / "a.tsv"))
    assert [source.caption(i) for i in range(3)] == ["two\nlines, quoted", "plain", ""]
    assert source.image(2).size == (40, 30)
    assert source.same_images() == ([0, 1], [0, 1, 0])
    (tmp_path / "b.tsv").write_text((tmp_path / "a.tsv").read_text().replace("plain", "Plain"))
    assert data.open_source(str(tmp_path / "b.tsv")).fingerprint() != source.fingerprint()


def test_class_folders_of_every_format(tmp_path):
    forms = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")
    for k, form in enumerate(forms):
        folder = tmp_path / f"class {k % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{k}.{form}").write_bytes(encoded(noise(16, 12), form))
    for name in ("notes.txt", "raw.CR2", "raw.cr2"):
        (tmp_path / "class 0" / name).write_bytes(b"x")
    source = data.open_source(str(tmp_path))
    assert len(source) == len(forms) and all(source.image(i).size == (16, 12) for i in range(len(source)))
    assert source.skipped == {".txt": 1, ".cr2": 2} and data.Shapes(2).skipped == {}
    assert source.caption(0) == "class 0" and source.labels.tolist() == sorted(
        k % 2 for k in range(len(forms))
    )


def test_pictures_alone_are_enough_for_moco(tmp_path):
    (tmp_path / "flat").mkdir()
    for k in range(3):
        (tmp_path / "flat" / f"{k}.jpg").write_bytes(jpeg())
    assert len(data.open_source(str(tmp_path / "flat"), captions=False)) == 3
    with pytest.raises(data.UserError, match="no class folders"):
        data.open_source(str(tmp_path / "flat"))
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", jpeg()), ("1.jpg", jpeg())])
    assert len(data.open_source(tar, captions=False)) == 2
    with pytest.raises(data.UserError, match="no sample"):
        data.open_source(tar)


def test_labels_from_cls_json_and_tables(tmp_path):
    def labelled(name, label_key=None, **parts):
        members = []
        for k in range(3):
            members += [(f"{k}.jpg", jpeg())]
            members += [(f"{k}.{kind}", values[k]) for kind, values in parts.items() if values[k] is not None]
        path = write_tar(tmp_path / name, members)
        return data.open_source(path, captions=False, label_key=label_key)

    numbers, names = labelled("a.tar", cls=[b"10", b"9", b"10"]), labelled("b.tar", cls=[b"x\n", b"b", b"x"])
    assert numbers.classes == ["9", "10"] and numbers.labels.tolist() == [1, 0, 1]
    assert names.classes == ["b", "x"] and names.labels.tolist() == [1, 0, 1]
    with pytest.raises(data.UserError, match="c.tar, 1.jpg at byte .*no .cls"):
        labelled("c.tar", cls=[b"1", None, b"2"]).labels  # noqa: B018
    assert labelled("d.tar").labels is None and labelled("e.tar").classes is None
    groups = [json.dumps({"group": g}).encode() for g in ("food", "animals", "food")]
    source = labelled("f.tar", "group", json=groups, cls=[b"1"] * 3)
    assert source.classes == ["animals", "food"] and source.labels.tolist() == [1, 0, 1]
    for number, (json_of, message) in enumerate(
        [([b"[]"] * 3, "no names"), (groups[:2] + [None], "neither")]
    ):
        with pytest.raises(data.UserError, match=message):
            labelled(f"g{number}.tar", "group", json=json_of).labels  # noqa: B018
    with pytest.raises(data.UserError, match="no 'kind'"):
        labelled("h.tar", "kind", json=groups).labels  # noqa: B018
    (tmp_path / "a.csv").write_text("filepath,title,group\na.jpg,x,food\nb.jpg,y,animals\n")
    source = data.open_source(str(tmp_path / "a.csv"), label_key="group")
    assert source.classes == ["animals", "food"] and source.labels.tolist() == [1, 0]
    with pytest.raises(data.UserError, match="no column 'kind'"):
        data.open_source(str(tmp_path / "a.csv"), label_key="kind")


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
    with pytest.raises(data.UserError, match="zipf"):
        data.open_source("shapes:zipf")


# ---------------------------------------------------------------- data: the datasets


WORDS = clip_model.HashedWords()


def test_augmentation_depends_on_seed_epoch_and_id_alone():
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
            raise TypeError("a bug\nin a reader")
        return Image.new("RGB", (8, 8))

    def caption(self, i):
        return f"number {i}"

    def where(self, i):
        return f"place {i}"


def test_any_id_of_a_billion_is_read_at_once():
    source = Stub()
    pairs, began = data.Pairs(source, WORDS, 8), time.monotonic()
    assert pairs[10**9 - 1][:2] == (10**9 - 1, -1)
    assert time.monotonic() - began < 1
    source.good = 2
    assert pairs[0][:2] == (2, 0) and pairs[1][:2] == (2, 1)
    source.good, source.asked = -1, []
    with pytest.raises(
        data.UserError, match="100 samples.*place 999999998: TypeError: a bug in a r"
    ) as error:
        pairs[10**9 - 2]
    assert source.asked == [10**9 - 2, 10**9 - 1, *range(98)] and "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, TypeError)
    assert pairs.why(5) == "place 5: TypeError: a bug in a reader"
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
    assert pairs[1][3].tolist() == WORDS(source.caption(pairs.caption_of[1])).tolist()
    assert pairs.fingerprint() != data.Pairs(source, None, 16).fingerprint()


BOMB = bytearray(png("red"))
BOMB[16:24] = (10_000).to_bytes(4, "big") * 2
BOMB[29:33] = zlib.crc32(BOMB[12:29]).to_bytes(4, "big")
FLIPPED = bytearray(png("red"))
FLIPPED[-20] ^= 1  # in the checksum of the pixels
DEEP = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_SAMPLES = [  # a picture, its text, and what is said of them
    (b"", (".txt", b"x"), "no picture, but 0 bytes"),
    (b"words", (".txt", b"x"), "no picture, but 5 bytes: b'words'"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", (".txt", b"x"), "no picture"),
    (b"GIF89a" + bytes(20), (".txt", b"x"), ""),
    (bytes(BOMB), (".txt", b"x"), "10000 x 10000 pixels"),
    (png("red", (2001, 2)), (".txt", b"x"), "2001 x 2 pixels"),
    (jpeg(size=(64, 64))[:300], (".txt", b"x"), "Truncated"),
    (jpeg(size=(64, 64))[:-200], (".txt", b"x"), "truncated"),
    (jpeg(size=(64, 64))[:-200] + bytes(200), (".txt", b"x"), "ends in zeros"),
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
    (png("red"), (".json", DEEP), ".json can't be read"),
    (png("red"), (".json", b"\xff\xfe"), ".json can't be read"),
    (png("red"), (".cls", b"1"), "neither a .txt nor a .json"),
]  # fmt: skip


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


def test_bad_rows_of_a_table_are_replaced_and_the_cause_is_said(tmp_path):
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
    assert text.decode("utf-8-sig").startswith(source.caption(0))


# ---------------------------------------------------------------- data: fuzz


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
    for seed in range(200 * FUZZ):
        rng = np.random.default_rng(seed)
        content = mutate(original, rng)
        path.write_bytes(with_checksums(content) if rng.integers(2) else content)
        try:
            source = data.open_source(str(path))
        except data.UserError as error:
            refused += 1
            assert "\n" not in str(error)
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
        for file in source._files.values():
            os.close(file)
    assert min(read, refused, replaced) > 3 * FUZZ


def test_fuzzed_tables_give_their_rows_or_are_refused(tmp_path):
    rows = [f'images/{k}.png,"a caption, the {k}th"' for k in range(8)]
    original = "\r\n".join(["filepath,title", *rows]).encode()
    path, read, refused = tmp_path / "a.csv", 0, 0
    for seed in range(600 * FUZZ):
        path.write_bytes(mutate(original, np.random.default_rng(seed)))
        try:
            source = data.open_source(str(path))
        except data.UserError as error:
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


def test_hashed_words():
    words = clip_model.HashedWords()
    expected = [1 + zlib.crc32(word) % 49405 for word in (b"red", b"circle", b"!")]
    assert words("Red CIRCLE!").tolist() == [49406, *expected, 49407]
    assert (
        len(words("日本語 ok")) == 2 + 4 and len(words("w " * 500)) == 77 and words("w " * 500)[-1] == 49407
    )
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
    with pytest.raises(ValueError):
        clip_model.BPE(path)


# ---------------------------------------------------------------- evaluation


class Known(torch.nn.Module):
    """A model whose features are the mean colour of the picture, and of the colour named in the text."""

    image_size, mean_std = 8, clip_model.CLIP.mean_std

    def encode_image(self, images):
        return images.mean((2, 3))

    def encode_text(self, tokens):
        return torch.stack([self.colours[int(t[1])] for t in tokens])


def colour_tree(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for k in range(2):
            (tmp_path / name / f"{k}.png").write_bytes(jpeg(name, form="PNG"))
    return data.open_source(str(tmp_path))


def test_zero_shot_and_retrieval_against_known_answers(tmp_path):
    source = colour_tree(tmp_path / "tree", ["blue", "green", "red"])
    words, model = data.HashedWords(), Known()
    solid = {"blue": (0, 0, 255), "green": (0, 128, 0), "red": (255, 0, 0)}
    pixels = {name: torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1) for name, rgb in solid.items()}
    model.colours = {
        int(words(name)[1]): data.normalize(p, Known.mean_std).flatten() for name, p in pixels.items()
    }
    cpu = torch.device("cpu")
    assert evaluation.zeroshot(model, words, source, cpu, templates=["{}"]) == {
        "top1": 1.0,
        "top5": 1.0,
        "balanced": 1.0,
        "n": 6,
    }
    swapped = evaluation.zeroshot(
        model, words, source, cpu, templates=["{}"], classes=["green", "blue", "red"]
    )
    assert swapped["top1"] == pytest.approx(1 / 3)
    members = []
    for name in solid:
        members += [(f"{name}.png", jpeg(name, form="PNG")), (f"{name}.txt", name.encode())]
    pairs = write_tar(tmp_path / "a.tar", members)
    result = evaluation.retrieval(model, words, data.open_source(pairs), cpu, chunk=2)
    assert result["i2t_r1"] == result["t2i_r1"] == 1.0 and result["n"] == 3


# ---------------------------------------------------------------- eval.py, every protocol on small trees

WNIDS = ["n01440764", "n01443537", "n01484850", "n02007558"]
COLOURS = ["blue", "green", "red", "yellow"]


def checkpoint_of(model, path):
    text = "hashed words" if isinstance(model, clip_model.CLIP) else None
    args = {"arch": model.arch, "image_size": model.image_size}
    torch.save({"model": model.state_dict(), "args": args, "tokenizer": text}, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of CLIP and one of MoCo, with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "clip": checkpoint_of(clip_model.create("vit_tiny", 16), folder / "clip.pt"),
        "moco": checkpoint_of(moco.create("moco_vit_tiny", 16), folder / "moco.pt"),
    }


def tree(root, folders, n=3):
    """Class folders of plainly coloured pictures, the k-th of the k-th colour."""
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


def evaluated(capsys, *args):
    """eval.py's last line of JSON."""
    evaluation.main([*map(str, args), *(["--workers", "0"] if args[0] not in ("export", "coreset") else [])])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def eval_refuses(capsys, *args):
    """The one line that eval.py says."""
    with pytest.raises(SystemExit) as exit:
        evaluation.main(
            [*map(str, args), *(["--workers", "0"] if args[0] not in ("export", "coreset") else [])]
        )
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.count("\n") == 1 and said.startswith("eval.py: ")
    return said


@pytest.mark.parametrize("family", ["clip", "moco"])
def test_classifiers_on_class_folders(family, checkpoints, tmp_path, capsys):
    tree(tmp_path / "a" / "train", WNIDS, 8), tree(tmp_path / "a" / "val", WNIDS, 2)
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
        capsys, "finetune", *common, *more, "--epochs", "40", "--lr", "1e-3", "--batch-size", "16",
        "--test-data", numbers, some, "--out", tmp_path / "tuned.pt",
    )  # fmt: skip
    assert result["top1"] >= 0.75 and result["test"][numbers]["n"] == 8 and result["test"][some]["n"] == 4
    assert result["test"][numbers]["top1"] >= 0.75 and result["test"][some]["top1"] >= 0.75
    tuned = torch.load(tmp_path / "tuned.pt", weights_only=True)
    assert tuned["head.weight"].shape == (4, 96 if family == "moco" else 128)


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
    with pytest.raises(evaluation.EvalError, match="'zebra'"):
        evaluation.class_labels(source("z", ["zebra"]), wnids)
    imagenet = source("imagenet", [f"n{k:08}" for k in range(1000)])
    names, folders = evaluation.zeroshot_classes(imagenet)
    assert names[0] == "tench" and folders == imagenet.classes
    names, folders = evaluation.zeroshot_classes(source("v2c", ["0", "999"]), "imagenet")
    assert names[999] == "toilet tissue" and folders[999] == "999"
    names, folders = evaluation.zeroshot_classes(
        source("rr", ["n00000007", "n00000999"]), None, imagenet.classes
    )
    assert names[7] == "cock" and folders == imagenet.classes


def test_what_does_not_fit_is_said_before_training(checkpoints, tmp_path, capsys, monkeypatch):
    some, numbers = tree(tmp_path / "r", WNIDS[:2], 1), tree(tmp_path / "v2", ["0", "10"], 1)
    monkeypatch.setattr(evaluation, "train_classifier", None)
    common = ["finetune", "--checkpoint", checkpoints["moco"], "--data", some, "--val-data", some]
    assert "'10'" in eval_refuses(capsys, *common, "--test-data", numbers)
    assert "--out" in eval_refuses(capsys, *common, "--out", tmp_path / "no" / "where.pt")
    with pytest.raises(SystemExit):
        flags = (
            f"--arch moco_vit_tiny --data {tree(tmp_path / 'a', COLOURS, 4)} --val-data {some} --prune 0.1"
        )
        train.main([*flags.split(), *f"--batch-size 4 --image-size 16 --out {tmp_path / 'out'}".split()])
    assert f"'{WNIDS[0]}'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_linear_probe_standardises_with_the_training_features(monkeypatch):
    class Source:
        classes, labels = ["a", "b"], np.arange(60) % 2

    features = 100 + torch.tensor(Source.labels)[:, None] + 0.1 * torch.randn(60, 3, generator=generator())
    monkeypatch.setattr(evaluation, "image_features", lambda *_, **__: features)
    assert evaluation.linear(None, Source, Source, torch.device("cpu"))["top1"] == 1


def test_balanced_accuracy_weighs_classes_alike():
    labels = torch.tensor([0] * 9 + [1])
    result = evaluation.accuracy(torch.eye(2)[torch.zeros(10, dtype=torch.long)], labels)
    assert result == {"top1": 0.9, "top5": 1.0, "balanced": 0.5, "n": 10}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, checkpoints, tmp_path, capsys, monkeypatch):
    root = cifar(tmp_path / "data", name, monkeypatch)
    classes = 10 if name == "cifar10" else 100
    source = data.open_source(f"{name}:{root}", train=False)
    assert len(source.classes) == classes and source.labels.tolist() == [0, 1, classes - 1, 1]
    assert source.image(0).size == (32, 32) and source.caption(2) == f"class {classes - 1}"
    assert data.open_source(root).fingerprint() == source.fingerprint()  # the folder says which it is
    assert evaluated(capsys, "zeroshot", "--checkpoint", checkpoints["clip"], "--data", root)["n"] == 4
    assert evaluated(
        capsys, "knn", "--checkpoint", checkpoints["moco"], "--data", f"{name}:{root}", "--val-data", root
    )["n"] == 4  # fmt: skip
    assert "no whole cifar10" in eval_refuses(
        capsys, "zeroshot", "--checkpoint", checkpoints["clip"], "--data", f"cifar10:{tmp_path}"
    )


def test_wrong_trees_and_models_get_one_line(checkpoints, tmp_path, capsys):
    numbers, some = tree(tmp_path / "v2", ["0", "10"], 1), tree(tmp_path / "r", WNIDS[:2], 1)
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    clip, moco_ = (["--checkpoint", checkpoints[k]] for k in ("clip", "moco"))
    for args, message in (
        (["zeroshot", *clip, "--data", numbers], "numbers"),
        (["zeroshot", *clip, "--data", some], "--wnids"),
        (
            ["zeroshot", *clip, "--data", some, "--classnames", tmp_path / "three.txt"],
            "3 names, for 2 classes",
        ),
        (["zeroshot", *clip, "--data", numbers, "--classnames", tmp_path / "three.txt"], "'10'"),
        (["zeroshot", *moco_, "--data", some], "never learnt"),
        (["retrieval", *moco_, "--data", some], "never learnt"),
        (["knn", *moco_, "--data", some], "--val-data"),
        (["knn", *moco_, "--data", some, "--val-data", numbers], "'10'"),
        (["linear", *clip, "--data", some, "--val-data", tree(tmp_path / "x", ["cat"])], "'cat'"),
        (["knn", *clip, "--data", tmp_path / "nowhere", "--val-data", some], "nowhere"),
        (["knn", "--checkpoint", tmp_path / "no.pt", "--data", some, "--val-data", some], "No such file"),
        (["export", *clip, "--out", tmp_path / "no" / "where.pt"], "--out"),
    ):
        assert message in eval_refuses(capsys, *args), args


def test_export_writes_weights_that_come_back(checkpoints, tmp_path, capsys):
    images = torch.randn(2, 3, 16, 16, generator=generator())
    for family, arch in (("clip", "vit_tiny"), ("moco", "moco_vit_tiny")):
        out = tmp_path / f"{family}.pt"
        evaluated(capsys, "export", "--checkpoint", checkpoints[family], "--out", out)
        names = torch.load(out, weights_only=True)
        assert not any(k.startswith(("module.", "base_encoder.", "head.")) for k in names)
        assert ("blocks.0.attn.qkv.weight" if family == "moco" else "visual.conv1.weight") in names
        model, _ = evaluation.load_model(checkpoints[family])
        again, _ = evaluation.load_model(out, arch, image_size=16, vocab="hashed")
        assert evaluation.encoder(model)(images).equal(evaluation.encoder(again)(images))


def test_several_captions_of_an_image(tmp_path):
    solid = {"blue": (0, 0, 255), "green": (0, 128, 0), "red": (255, 0, 0)}
    words, model = data.HashedWords(), Known()
    model.colours = {
        int(words(name)[1]): data.normalize(torch.tensor(rgb).view(1, 3, 1, 1), Known.mean_std).flatten()
        for name, rgb in solid.items()
    }
    rows = ["filepath,title"]
    for k, name in zip("201", solid, strict=True):  # the file's order is not the alphabet's
        (tmp_path / f"{k}.png").write_bytes(jpeg(name, form="PNG"))
    rows += ["2.png,blue", "0.png,green", "2.png,red", "1.png,red", "0.png,green"]  # the third is wrong
    (tmp_path / "a.csv").write_text("\n".join(rows))
    source = data.open_source(str(tmp_path / "a.csv"))
    result = evaluation.retrieval(model, words, source, torch.device("cpu"))
    assert result["n"] == 3 and result["i2t_r1"] == 1.0
    assert result["t2i_r1"] == pytest.approx(4 / 5) and result["t2i_r5"] == 1.0
    members = [("0.png", jpeg("blue", form="PNG")), ("0.txt", b"blue\nblue sky\n")]
    members += [("1.png", jpeg("red", form="PNG")), ("1.txt", b"red\ngreen")]
    source = data.open_source(write_tar(tmp_path / "a.tar", members))
    result = evaluation.retrieval(model, words, source, torch.device("cpu"), split_captions=True)
    assert result["n"] == 2 and result["i2t_r1"] == 1.0 and result["t2i_r10"] == 1.0
    assert (
        evaluation.retrieval(model, words, source, torch.device("cpu"))["t2i_r1"] == 1.0
    )  # first words alone


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


def test_static_coreset_from_runs(tmp_path, capsys, monkeypatch):
    runs = []
    for seed in range(4):
        scan, size = Scan(80 + 10 * (seed == 3), seed=seed), 80 + 10 * (seed == 3)
        for epoch in range(7):
            observe_epoch(scan, epoch, 1 + torch.rand(size, generator=generator(seed)))
        runs.append(tmp_path / f"run{seed}")
        runs[-1].mkdir()
        torch.save({"scan": scan.state_dict(), "data": {"size": size, "hash": "x"}}, runs[-1] / "last.pt")
    kept = tmp_path / "kept.npy"
    result = evaluated(capsys, "coreset", *runs[:3], "--prune", "0.3", "--out", kept)
    ids = np.load(kept)
    assert result["kept"] == len(ids) == 80 - 24 and (np.diff(ids) > 0).all()
    assert len(result["overlap"]) == 4 and len(result["overlap"][-1]["runs"]) == 3
    pair = result["overlap"][0]
    assert pair["kept_chance"] == pytest.approx(0.5385, abs=1e-3)
    assert pair["pruned_chance"] == pytest.approx(0.1765, abs=1e-3)
    a, b = (pruned_set(torch.load(run / "last.pt", weights_only=True)["scan"], 0.3) for run in runs[:2])
    assert pair["pruned"] == pytest.approx(((a & b).sum() / (a | b).sum()).item(), abs=1e-3)
    assert pair["kept"] == pytest.approx(((~a & ~b).sum() / (~a | ~b).sum()).item(), abs=1e-3)
    assert "other data" in eval_refuses(capsys, "coreset", *runs, "--prune", "0.3", "--out", kept)
    *_, log = dropped(tmp_path / "on_kept", monkeypatch, "--prune", "0", "--keep", str(kept))
    assert [r["kept"] for r in log] == [56] * 7


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


@pytest.mark.parametrize(
    "flags",
    [
        "", "what", "zeroshot", "knn --checkpoint x --k 0", "knn --checkpoint x --batch-size 0",
        "export --checkpoint x",
        "linear --checkpoint x --lr nan", "finetune --checkpoint x --epochs 0", "coreset a --prune 0.3",
        "finetune --checkpoint x --wd -1", "coreset a --prune 2 --out x", "retrieval --checkpoint x",
        "linear --checkpoint x --seed -1", "knn --checkpoint x --workers -1",
        "zeroshot --checkpoint x --nope",
    ],
)  # fmt: skip
def test_bad_arguments_of_eval_exit_2_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.parse_args(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


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
    assert len(bad) == 1 and "a.tar, 7.png at byte" in bad[0]
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
