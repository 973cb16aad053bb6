"""Traps of a loop that scan.py is copied into: each must be announced, or be none."""

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from scan import Scan, ScanSampler, WithIds


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


def watch_on(rank, world, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    *with_watch, loss_sum = loss_and_grads(True, world, rank)
    *without, _ = loss_and_grads(False, world, rank)
    assert all(map(torch.equal, with_watch, without))
    dist.destroy_process_group()
    alone = loss_and_grads(True, 1, 0)[-1]  # the losses that it watched are those of the global batch
    torch.testing.assert_close(loss_sum, alone)


def test_watch_leaves_a_foreign_loss_and_its_gradients_as_they_are():
    with_watch, without = loss_and_grads(True, 1, 0), loss_and_grads(False, 1, 0)
    assert all(map(torch.equal, with_watch[:-1], without[:-1]))
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(8, 4, generator=generator).double(), dim=1) for _ in range(2))
    logits = 10 * image @ text.T
    both = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2
    torch.testing.assert_close(with_watch[-1], both.sum(), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_watch_leaves_gradients_as_they_are_on_two_ranks():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(watch_on, (2, port), nprocs=2)
