"""Tests of SCAN: `pytest -q` (all), `pytest -q -m "not slow"` (seconds)."""

import gzip
import io
import json
import math
import os
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
from PIL import Image

import clip_model
import data
import eval as evaluation
import train
from scan import Scan, ScanSampler, coreset, info_nce, prune_ratio, pruned_set, select_candidates, warmed_up

HERE = Path(__file__).parent
FLOAT32 = torch.autocast("cpu", enabled=False)
slow = pytest.mark.slow


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


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--prune 0.6", "more than 1"),
        ("--prune -1", "--prune"),
        ("--rho-red 0.8", "more than 1"),
        ("--batch-size 1", "--batch-size"),
        ("--batch-size 30 --accum 4", "divisible"),
        ("--image-size 33", "multiple"),
        ("--epochs 0", "--epochs"),
        ("--t-cos 0", "--t-cos"),
        ("--lr nan", "--lr"),
        ("--warmup 99", "--warmup"),
        ("--mismatch 2", "--mismatch"),
        ("--arch rn50 --accum 2", "--accum"),
        ("--arch what", "--arch"),
        ("--workers -1", "--workers"),
    ],
)
def test_bad_arguments_exit_2_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--arch", "vit_tiny", "--data", "shapes:128", "--image-size", "32", *flags.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


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


# ---------------------------------------------------------------- nothing is lost: arguments, resume, faults

SHARE, COUNT, NUMBER = "-0.1 1.1 nan inf -inf x", "-1 0 0.5 nan x", "-1 nan inf -inf x"
SEED, WORKERS, SIZE = f"-1 0.5 x {2**63}", "-1 0.5 x 1025", f"{COUNT} 33 4112"
# every flag with values that are refused, each alone; an empty string: any text is a name, to be opened later
REFUSED = {
    "arch": "what VIT_TINY", "data": "", "val_data": "", "img_key": "", "caption_key": "", "label_key": "",
    "mismatch": SHARE, "prune": f"{SHARE} 1 0.51", "rho_red": f"{SHARE} 0.71", "rho_ill": f"{SHARE} 0.71",
    "t_cos": COUNT, "warmup_threshold": "nan inf -inf x", "warmup_rule": "what", "keep": "",
    "epochs": f"{COUNT} {10**6 + 1}", "batch_size": f"{COUNT} 1", "accum": f"{COUNT} 3 65", "lr": NUMBER,
    "wd": NUMBER, "warmup": f"{NUMBER} 60.5", "image_size": SIZE, "precision": "fp16", "compile": "yes",
    "device": "tpu", "workers": WORKERS, "eval_every": "-1 0.5 x", "save_every": "-1 0.5 x", "max_bad": SHARE,
    "seed": SEED, "vocab": "", "out": "",
}  # fmt: skip
CONTRADICTIONS = {
    "--rho-red 0.6 --rho-ill 0.6": "more than 1",
    "--epochs 2 --warmup 3": "--warmup",
    "--batch-size 30 --accum 4": "divisible",
    "--arch rn50 --accum 2": "--accum",
    "--arch swin_b --accum 2": "--accum",
    "--arch moco_vit_tiny --accum 2": "--accum",
    "--arch moco_vit_tiny --mismatch 0.1": "--mismatch",
    "--arch moco_vit_tiny --vocab x": "--vocab",
    "--arch vit_b32 --image-size 48": "multiple of 32",
    "--unknown 1": "--unknown",
    "leftover": "leftover",
    "--epochs": "--epochs",
}
EVAL_REFUSED = {
    "image_size": f"{COUNT} 4097", "arch": "what", "batch_size": COUNT, "workers": WORKERS, "device": "tpu",
    "k": COUNT, "epochs": COUNT, "lr": NUMBER, "wd": NUMBER, "seed": SEED, "protocol": "what",
    "prune": SHARE,
} | dict.fromkeys("""command runs checkpoint quick_gelu vocab data img_key caption_key label_key download
    val_data classnames templates wnids split_captions test_data out""".split(), "")  # fmt: skip
EVAL_NEEDS = {
    "coreset": "runs --prune 0.3 --out x",
    "retrieval": "--checkpoint x --data x",
    "export": "--checkpoint x --out x",
}


def refusal(parse_args, command, capsys):
    """The one line on stderr with which arguments are refused, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse_args(command.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.endswith("\n"), (command, said)
    return said


def test_every_flag_of_train_refuses_what_is_out_of_range(capsys, monkeypatch):
    fixed = "--arch vit_tiny --data shapes --batch-size 64 --epochs 60 --prune 0.3 "
    assert vars(train.parse_args(fixed.split())).keys() == REFUSED.keys(), "a flag needs a row here"
    for name, values in REFUSED.items():
        flag = "--" + name.replace("_", "-")
        for value in values.split():
            said = refusal(train.parse_args, f"{fixed} {flag}={value}", capsys)
            assert flag in said or "more than 1" in said or "divisible" in said, (flag, value, said)
    for command, word in CONTRADICTIONS.items():
        assert word in refusal(train.parse_args, fixed + command, capsys)
    assert train.parse_args(["--data", "shapes-of-mine"]).val_data is None  # a folder, not the built-in data
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 rank(s)" in refusal(train.parse_args, fixed, capsys)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(["--epochs", "0"])
    assert capsys.readouterr().err == "", "rank 0 speaks for all"


@pytest.mark.parametrize(
    "command", ["zeroshot", "retrieval", "knn", "linear", "finetune", "export", "coreset"]
)
def test_every_flag_of_eval_refuses_what_is_out_of_range(command, capsys):
    fixed = f"{command} {EVAL_NEEDS.get(command, '--checkpoint x')}"
    flags = vars(evaluation.parse_args(fixed.split())).keys()
    assert flags <= EVAL_REFUSED.keys(), "a flag needs a row here"
    for name in flags:
        flag = "--" + name.replace("_", "-")
        for value in EVAL_REFUSED[name].split():
            assert flag in refusal(evaluation.parse_args, f"{fixed} {flag}={value}", capsys)
    assert "--unknown" in refusal(evaluation.parse_args, f"{fixed} --unknown", capsys)
    assert "command" in refusal(evaluation.parse_args, "", capsys)


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


def rank_runs_and_dies(rank, world, port, folder):
    """Both models on `world` ranks: a run, and one that dies in mid-epoch and in an evaluation."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    run, batch = make_small(), "--batch-size 12 --save-every 2 --epochs 6"
    for arch in ("vit_tiny", "moco_vit_tiny", "rn50"):
        run(arch, folder / arch / "whole", batch)
        for name, number in (("forward_backward", 16), ("evaluate", 1)):
            function = getattr(train, name)
            setattr(train, name, at_call(number, "after", die, function))
            with pytest.raises(Killed):
                run(arch, folder / arch / "cut", batch)
            setattr(train, name, function)
        run(arch, folder / arch / "cut", batch)


@slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_go_on_exactly(tmp_path, world):
    """From three ranks on the order of gloo's sums counts: see average_in_rank_order."""
    mp.start_processes(rank_runs_and_dies, (world, free_port(), tmp_path), world, start_method="spawn")
    for arch in ("vit_tiny", "moco_vit_tiny", "rn50"):
        assert_same_run(tmp_path / arch / "whole", tmp_path / arch / "cut", epochs=6)
