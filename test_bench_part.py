"""info_nce beside a plain float64 reference on 1, 2 and 4 ranks; orders without memory."""

import math
import types
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import scan
from scan import Scan, ScanSampler, info_nce


def batch(size=24, dim=8):
    torch.manual_seed(3)
    query, key = torch.randn(2, size, dim, dtype=torch.float64)
    weights = torch.rand(2, size, dtype=torch.float64)  # of each sample's two losses: every row counts apart
    return query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True), weights


def reference(query, key, scale, weights):
    """Both directions of Eq. 1 by the formula -> losses (2, B), gradients of their weighted mean."""
    query, key, scale = (x.clone().requires_grad_() for x in (query, key, torch.tensor(scale).double()))
    losses = []
    for q, k in ((query, key), (key, query)):
        e = (scale * (q[:, None] * k[None]).sum(-1)).exp()
        losses.append(-(e.diagonal() / e.sum(1)).log())
    losses = torch.stack(losses)
    (losses * weights).mean().backward()
    return losses.detach(), query.grad, key.grad, scale.grad


def ours(query, key, scale, weights):
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
    monkeypatch.setattr(scan, "_PLAIN", plain)
    monkeypatch.setattr(scan, "_BLOCK", block)
    for mine, theirs in zip(
        ours(*batch()[:2], scale, batch()[2]), reference(*batch()[:2], scale, batch()[2])
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


def test_blocks_take_a_number_as_scale_and_float32_under_autocast(monkeypatch):
    query, key, _ = batch()
    expected = reference(query, key, 20.0, torch.ones(2, 24, dtype=torch.float64))
    monkeypatch.setattr(scan, "_PLAIN", 0)
    monkeypatch.setattr(scan, "_BLOCK", 100)
    query, key = (x.float().requires_grad_() for x in (query, key))
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack([info_nce(query, key, 20.0), info_nce(key, query, 20.0)])
        losses.mean().backward()  # bfloat16 is wrong in the third digit
    for mine, theirs in zip((losses, query.grad, key.grad), expected):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


def rank_main(rank, world, path, plain, block):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    scan._PLAIN, scan._BLOCK = plain, block
    query, key, weights = batch()
    part = slice(rank * 24 // world, (rank + 1) * 24 // world)
    losses, *grads = ours(query[part], key[part], 14.3, weights[:, part])
    dist.all_reduce(grads[2])  # as DDP does for a parameter
    torch.save((losses, grads[0] / world, grads[1] / world, grads[2] / world), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world, plain, block", [(2, *BLOCKS[0]), (2, *BLOCKS[1]), (4, 0, 2 * 24)])
def test_info_nce_on_ranks_is_the_formula(tmp_path, world, plain, block):
    mp.start_processes(rank_main, (world, str(tmp_path), plain, block), nprocs=world, start_method="spawn")
    losses, query, key, scale = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(world)))
    mine = torch.cat(losses, 1), torch.cat(query), torch.cat(key), scale[0]
    for ours, theirs in zip(mine, reference(*batch()[:2], 14.3, batch()[2])):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


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
    mine = scan._AllGather.backward(None, grads[1].T.contiguous().T.as_subclass(OnGPU))
    torch.testing.assert_close(asked[0].as_subclass(torch.Tensor), grads[1])
    torch.testing.assert_close(mine.as_subclass(torch.Tensor), grads.sum(0)[2:4])


# ---------------------------------------------------------------- orders without memory


@pytest.mark.parametrize("chunk", [7, 2**18])
def test_each_id_comes_once(monkeypatch, chunk):
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    for n in range(1, 301):
        assert torch.cat(list(scan._permutation(n, "a", n))).sort().values.tolist() == list(range(n)), n


@pytest.mark.parametrize("n", [2**20, 2**20 + 1, 3_000_017])
def test_each_id_comes_once_in_large_sets(n):
    seen = torch.zeros(n, dtype=torch.uint8)
    for ids in scan._permutation(n, "a", n):
        seen[ids] += 1
    assert (seen == 1).all()


def test_orders_differ_and_repeat():
    def order(n, *key):
        return torch.cat(list(scan._permutation(n, *key)))

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
        ids = torch.cat(list(scan._permutation(n, "chi", k)))
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
    monkeypatch.setattr(scan, "_LARGE", 0)
    monkeypatch.setattr(scan, "_CHUNK", 100)
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = torch.cat(list(scan._permutation(1000, "order", 5)))
    shuffled = torch.cat(list(scan._shuffled(mask, "order", 5)))
    assert shuffled.tolist() == [i for i in whole.tolist() if mask[i]]
    assert shuffled.tolist() != sorted(shuffled.tolist())


@pytest.mark.parametrize("large", [0, 2**24])
def test_large_sets_are_dealt_out_and_drawn_as_small_ones(monkeypatch, large):
    """Batches and draws, below and above the size from which orders take no memory."""
    monkeypatch.setattr(scan, "_LARGE", large)
    monkeypatch.setattr(scan, "_CHUNK", 64)
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
