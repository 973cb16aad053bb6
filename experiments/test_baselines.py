"""The baselines hit their budgets and are faithful to their sources; compare.py runs and counts them."""

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import baselines  # noqa: E402
import compare  # noqa: E402
import suspects  # noqa: E402
import variants  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from scan import Scan, ScanSampler  # noqa: E402

slow = pytest.mark.slow

# ---------------------------------------------------------------- experiments: what SCAN is compared with


def play(scan, epochs, batch, loss_of):
    """A run without a model: `loss_of` (N,) is every sample's loss -> ids seen in each epoch, kept sizes."""
    sampler, seen, sizes = ScanSampler(scan, batch), [], []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        sizes.append(scan.num_kept)
        seen.append([])
        for ids in sampler:
            ids = torch.tensor(ids)
            scan.observe(ids, loss_of[ids], loss_of[ids])
            seen[-1] += ids.tolist()
        scan.end_epoch()
    return seen, sizes


def skewed_losses(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).exp() ** 2


@pytest.mark.parametrize("prune, epochs", [(0.3, 16), (0.2, 11), (0.3, 9)])
@pytest.mark.parametrize("kind", ["RS2", "InfoBatch", "Static", "Once", "same-budget"])
def test_baselines_see_as_many_samples_as_scan(kind, prune, epochs):
    total, batch, loss_of = 1000, 48, skewed_losses(1000)
    scan_saw, sizes = play(Scan(total, prune), epochs, batch, loss_of)
    options = dict(sizes=sizes, batch=batch)
    if kind == "same-budget":
        batches = sum(map(len, scan_saw)) // batch
        options["sizes"] = [n * batch for n in baselines.spread(batches, -(-batches // (total // batch)))]
    if kind == "Static":
        keep = baselines.static_size(sizes, batch)
        options["subset"] = baselines.some(torch.ones(total, dtype=torch.bool), keep, "test")
    method = getattr(baselines, "RS2" if kind == "same-budget" else kind)
    seen, kept = play(method(total, prune, **options), len(options["sizes"]), batch, loss_of)
    assert sum(map(len, seen)) == sum(map(len, scan_saw))  # to the sample
    assert all(len(set(ids)) == len(ids) for ids in seen)
    if kind == "RS2":
        assert kept == sizes
        assert len(set(seen[3]) & set(seen[7])) < 0.95 * len(seen[3])  # drawn anew
    if kind == "same-budget":
        assert len(seen) < epochs and min(map(len, seen)) > 0.9 * total - batch
    if kind == "Static":  # no larger than it need be, and no smaller than SCAN's mean epoch
        assert set().union(*seen) <= set(options["subset"].nonzero().flatten().tolist())
        assert sum(sizes) // epochs <= keep < sum(sizes) / epochs + batch
    if kind == "InfoBatch":
        assert kept[0] == kept[int(0.875 * epochs)] == kept[-1] == total and kept[1] < total


def test_once_leaves_out_the_same_candidates_from_the_first_round_on():
    total, batch, loss_of = 1000, 48, skewed_losses(1000)
    scan = Scan(total, 0.3)
    _, sizes = play(scan, 11, batch, loss_of)
    first = Scan(total, 0.3)
    saw, _ = play(first, 3, batch, loss_of)
    once = baselines.Once(total, 0.3, sizes=sizes, batch=batch)
    seen, _ = play(once, 11, batch, loss_of)
    assert seen[:3] == saw and once.rounds == 1  # it is SCAN until then
    never = set(range(total)) - set().union(*seen[3:])
    assert never <= set(first.candidates.tolist())
    assert total - baselines.static_size(sizes[3:], batch) == len(never)


def test_infobatch_weighs_gradients_and_leaves_out_below_the_mean():
    total, batch = 64, 8
    loss_of = torch.linspace(0, 1, total)
    loss_of[-4:] = 9.0  # the mean lies above the median
    sizes = [64, 64, 48, 48, 48, 48, 64, 64]
    scan = baselines.InfoBatch(total, sizes=sizes, batch=batch)
    play(scan, 1, batch, loss_of)
    assert torch.equal(scan.score, loss_of)
    kept = scan.begin_epoch(1)
    below = loss_of < loss_of.mean()
    left_out = ~scan.kept_mask
    # 56 batches of SCAN's; 16 are seen in the first and the last epoch: 40 remain for epochs 1 .. 6
    assert scan.num_kept == total - (8 - 40 // 6) * batch and (left_out & ~below).sum() == 0
    share = left_out.sum().item() / below.sum().item()
    a = torch.ones(len(kept), requires_grad=True)
    b = torch.ones(len(kept), requires_grad=True)
    losses = a * loss_of[kept], b * loss_of[kept]
    scan.observe(kept, *losses)
    ((losses[0] + losses[1]) / 2).mean().backward()
    weight = torch.where(below[kept], 1 / (1 - share), 1.0)
    torch.testing.assert_close(a.grad, weight * loss_of[kept] / (2 * len(kept)))
    torch.testing.assert_close(b.grad, a.grad)


def test_infobatch_resumes_in_mid_epoch():
    options, loss_of = dict(sizes=[64, 48, 48, 48, 48, 48, 64, 64], batch=8), skewed_losses(64)
    scan = baselines.InfoBatch(64, **options)
    play(scan, 1, 8, loss_of)
    kept = scan.begin_epoch(1)
    scan.observe(kept[:8], 9 * loss_of[kept[:8]], loss_of[kept[:8]])
    other = baselines.InfoBatch(64, **options)
    other.load_state_dict(scan.state_dict())
    assert torch.equal(other.begin_epoch(1), kept) and torch.equal(other.weight, scan.weight)


@pytest.mark.parametrize("clusters", [1, 3])
def test_semdedup_removes_copies_and_keeps_one_of_each(clusters):
    generator = torch.Generator().manual_seed(1)
    originals = torch.randn(40, 16, generator=generator)
    copied = torch.arange(40).repeat_interleave(torch.arange(40) % 4)  # 0 .. 3 copies of each
    noise = 0.01 * torch.randn(len(copied), 16, generator=generator)
    lengths = 0.5 + torch.rand(40 + len(copied), 1, generator=generator)  # which do not matter
    features = torch.cat([originals, originals[copied] + noise]) * lengths
    group = torch.cat([torch.arange(40), copied])
    shuffled = torch.randperm(len(group), generator=generator)
    removed = baselines.semdedup(features[shuffled], len(copied), seed=2, clusters=clusters)
    assert removed.sum() == len(copied)  # as many as asked for
    assert sorted(group[shuffled][~removed].tolist()) == list(range(40))
    if clusters == 1:  # of two copies the one farther from the centroid stays
        x = torch.nn.functional.normalize(features[shuffled], dim=-1)
        centroid, _ = baselines.k_means(x, 1, 2)
        pair = (group[shuffled] == 1).nonzero().flatten()
        kept = pair[(x[pair] @ centroid[0]).argmin()]
        assert not removed[kept]


def test_dpruning_finds_the_set_of_least_influence():
    influence = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
    sets = list(itertools.combinations(range(12), 5))
    lengths = [influence[list(chosen)].sum(0).norm().item() for chosen in sets]
    best = sets[int(np.argmin(lengths))]
    removed = baselines.dpruning(influence, 5, seed=0, swaps=20_000)
    assert tuple(removed.nonzero().flatten().tolist()) == best
    shortest = influence.norm(dim=1).argsort()[:5]
    assert set(shortest.tolist()) != set(best)  # so it had to search
    assert baselines.dpruning(influence, 0).sum() == 0 and baselines.dpruning(influence, 12).all()


def test_compare_pairs_seeds_by_students_t():
    def row(score, samples=100):
        return {"score": score, "samples": samples}

    rows = {("full", k): row(s) for k, s in enumerate([0.50, 0.52, 0.49])}
    rows |= {("scan", k): row(s) for k, s in enumerate([0.51, 0.55, 0.49])}
    rows["scan", 3] = row(0.9)  # no partner
    gaps = np.array([0.01, 0.03, 0.0])
    half = 4.302653 * gaps.std(ddof=1) / math.sqrt(3)
    assert compare.paired("scan", "full", rows, range(4)) == f"{gaps.mean():+.3f} ± {half:.3f}"
    assert compare.paired("full", "full", rows, range(4)) == "–"
    rows |= {("scan:--prune 0.5", k): row(0.4, 80) for k in range(3)}
    rows |= {("full:--prune 0.5", k): row(0.3) for k in range(3)}  # one with the same flags goes first
    assert compare.paired("scan:--prune 0.5", "full", rows, range(4)) == "+0.100 ± 0.000"
    rows |= {("rs2", k): row(0.45) for k in range(3)}
    assert compare.paired("scan", "rs2", rows, range(3)) == f"{gaps.mean() + 0.16 / 3:+.3f} ± 0.076"
    assert compare.paired("scan:--prune 0.5", "rs2", rows, range(3)) == "–"  # which saw fewer samples


def test_compare_pairs_full_data_in_fewer_epochs_with_full_data():
    rows = {("full", k): {"score": 0.5 + k / 100, "samples": 100} for k in range(3)}
    rows |= {("full:--epochs 7", k): {"score": 0.45 + k / 100, "samples": 70} for k in range(3)}
    assert compare.paired("full:--epochs 7", "full", rows, range(3)) == "-0.050 ± 0.000"
    assert compare.paired("full", "full", rows, range(3)) == "–"


def test_compare_shows_top_1_and_top_5_of_rows_of_either_age(tmp_path, monkeypatch, capsys):
    final = [dict(top1=0.25, top5=0.5, balanced=0.125, n=8), dict(top1=0.75, top5=1.0, balanced=0.375, n=8)]
    for seed, shares in enumerate(final):
        out = tmp_path / f"full-seed{seed}"
        out.mkdir()
        (out / "config.json").write_text('{"epochs": 1}')
        epoch = dict(event="epoch", samples_seen=9, seconds=1.0)
        records = [epoch, dict(event="eval", **{name: 0.0 for name in shares}), dict(event="eval", **shares)]
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = [
        dict(method="full", seed=k, flags=[]) | compare.summary(tmp_path / f"full-seed{k}") for k in (0, 1)
    ]
    assert [row["score"] for row in rows] == [0.125, 0.375]
    del rows[0]["scores"]  # written by an earlier version
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["compare.py", "--out", str(tmp_path), "--methods", "full", "--seeds", "0", "1", "--show"]
    cells = {"balanced": "0.250 ± 0.177", "top1": "0.500 ± 0.354", "top5": "0.750 ± 0.354"}
    for measure in cells:
        monkeypatch.setattr(sys, "argv", [*flags, "--measure", measure])
        compare.main()
        head, _, line = capsys.readouterr().out.splitlines()
        names = list(dict.fromkeys((measure, "top1", "top5")))  # none twice
        assert head.startswith(f"| method | {' | '.join(names)} | samples |")
        assert line.startswith(f"| full | {' | '.join(cells[name] for name in names)} | 9 |")
    monkeypatch.setattr(sys, "argv", [*flags, "--measure", "i2t_r1"])
    with pytest.raises(SystemExit, match="has no 'i2t_r1'"):
        compare.main()


def test_compare_knows_what_each_run_is_built_on():
    assert compare.needs("full", 1, [0, 1]) == compare.needs("rank64:--t-cos 2", 1, [0, 1]) == {}
    assert compare.needs("rs2:--t-cos 2", 1, [0, 1]) == {"--scan-run": [("scan:--t-cos 2", 1)]}
    both = {"--scan-run": [("scan", 1)], "--coreset-runs": [("scan", 0), ("scan", 1)]}
    assert compare.needs("coreset", 1, [0, 1]) == both


@pytest.mark.parametrize("flags, said", [
    (["--methods", "full", "sacn"], "'sacn' is neither full, scan"),
    (["--methods", "scan:--prune '0.3"], "No closing quotation"),
    (["--jobs", "0"], "--jobs: 0 is not a whole number of at least 1"),
    (["--show"], "nothing is finished in"),
    (["--seeds", "0", "1", "--methods", "coreset"], "has coreset with other flags (coreset_of [0])"),
    (["--seeds", "0", "--methods", "dpruning", "--proxy-epochs", "2"], "has proxy with other flags (proxy_"),
    (["--seeds", "0", "--methods", "coreset", "--lr", "1"], "has runs with other flags ()"),
])  # fmt: skip
def test_compare_refuses_in_one_line_before_it_runs_anything(flags, said, tmp_path, monkeypatch, capsys):
    if "--seeds" in flags:
        rows = [dict(method="coreset", coreset_of=[0]), dict(method="proxy", proxy_epochs=4)]
        rows = (json.dumps(row | dict(seed=0, flags=[])) for row in rows)
        (tmp_path / "results.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    line = capsys.readouterr().err.strip() or stopped.value.code
    assert said in line and "\n" not in line


def test_compare_counts_only_runs_that_ended_with_a_score(tmp_path):
    epoch = dict(event="epoch", samples_seen=9, seconds=1.0)
    (tmp_path / "config.json").write_text('{"epochs": 2}')
    for records, said in (([epoch], "stopped before its end"), ([epoch, epoch], "give --val-data")):
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
        with pytest.raises(RuntimeError, match=said):
            compare.summary(tmp_path)


@pytest.mark.parametrize("flags, said", [
    (["--epochs", "3"], "has 2 epochs, batches of 32, not 3 and 32"),
    (["--epochs", "2", "--batch-size", "64"], "not 2 and 64"),
    (["--epochs", "2", "--data", "shapes:97"], "has 96 samples, these data 97"),
])  # fmt: skip
def test_baselines_refuse_another_run_than_the_budgets(flags, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"epochs": 2, "batch_size": 32}')
    (tmp_path / "log.jsonl").write_text("\n".join([json.dumps(dict(event="epoch", kept=64, total=96))] * 2))
    common = [
        "--arch",
        "vit_tiny",
        "--data",
        "shapes:96",
        "--batch-size",
        "32",
        "--out",
        str(tmp_path / "rs2"),
    ]
    asked = ["baselines.py", "rs2", "--scan-run", str(tmp_path), *common, *flags]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as stopped:
        baselines.main()
    line = capsys.readouterr().err.strip() or stopped.value.code
    assert said in line and "\n" not in line


def test_suspects_are_listed_worst_first(tmp_path, monkeypatch, capsys):
    """A state made by hand over shapes with a fifth of the captions shuffled."""
    source = data.open_source("shapes:40", size=16)
    pairs = data.Pairs(source, None, 16, mismatch=0.2)
    planted, places = pairs.truth["ill_matched"], np.empty(40)
    places[np.argsort(~planted, kind="stable")] = np.linspace(0.95, 0.05, 40)  # the planted ones come first
    quantile = torch.from_numpy(places)
    ill, redundant = 2 * (quantile > 0.5).to(torch.int16), 3 * (quantile < 0.3).to(torch.int16)
    ill[(quantile < 0.3).nonzero()[0]] = 1  # marked as both: more often as redundant
    flags = dict(arch="vit_tiny", data="shapes:40", image_size=16, mismatch=0.2)
    flags |= dict(img_key="filepath", caption_key="title")
    scan = {"counts": ill + redundant, "ill_counts": ill, "quantile": quantile.half(), "rounds": 4}
    checkpoint = {"scan": scan, "args": flags, "data": {"size": 40, "hash": pairs.fingerprint()}}
    torch.save(checkpoint, tmp_path / "last.pt")
    command = ["suspects.py", str(tmp_path), "--out", str(tmp_path / "s.csv")]
    monkeypatch.setattr(sys, "argv", command)
    suspects.main()
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == "id where caption kind marked rounds quantile".split()
    expected = []
    for i in np.argsort(-places)[:20]:
        expected.append([str(i), source.where(i), pairs.caption(i), "ill-matched", "2", "4"])
    for i in np.argsort(places)[: int((places < 0.3).sum())]:
        expected.append([str(i), source.where(i), pairs.caption(i), "redundant", "3", "4"])
    assert [row[:-1] for row in rows] == expected
    assert all(float(row[-1]) == pytest.approx(places[int(row[0])], abs=1e-3) for row in rows)
    recall = 4 / planted.sum()  # the first tenth: four rows, all of them planted
    assert f"first  10%  precision 100.0%  recall {recall:6.1%}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--data", "shapes:80"])
    with pytest.raises(SystemExit):
        suspects.main()
    assert "shapes:80: not the data" in capsys.readouterr().err


def test_a_coreset_leaves_out_what_all_runs_marked_most(monkeypatch):
    counts = {"a": [3, 3, 0, 0, 2, 0, 0, 1], "b": [3, 3, 0, 0, 0, 2, 1, 0]}
    states = {
        name: {"counts": torch.tensor(c, dtype=torch.int16), "num_samples": 8, "seed": k}
        for k, (name, c) in enumerate(counts.items())
    }
    monkeypatch.setattr(baselines.evaluation, "load_checkpoint", lambda run: {"scan": states[run]})
    kept = baselines.subset("coreset", [6, 6], 2, 8, 0, coreset_runs=["a", "b"])
    assert kept.tolist() == [False, False] + [True] * 6


# ---------------------------------------------------------------- experiments: SCAN with one thing changed


@pytest.mark.parametrize("pool", [8, 32, 48])
def test_ranked_marks_the_extremes_of_each_pool(pool):
    total, batch, rho = 96, 16, 0.25
    loss_of = torch.rand(total, generator=torch.Generator().manual_seed(4))
    scan = variants.make(f"rank{pool}")(total, rho)
    play(scan, 2, batch, loss_of)
    assert scan.first_preparation == 2
    sampler = ScanSampler(scan, batch)
    sampler.set_epoch(2)
    dealt = torch.tensor([ids for ids in sampler]).flatten()
    for ids in dealt.split(batch):
        scan.observe(ids, loss_of[ids], loss_of[ids])
    scan.end_epoch()
    red, ill = set(), set()
    for ids in dealt.split(pool):
        ranked = sorted(ids.tolist(), key=lambda i: loss_of[i].item())
        n = int(rho * pool)
        red, ill = red | set(ranked[:n]), ill | set(ranked[-n:])
    assert set(scan.redundant.nonzero().flatten().tolist()) == red
    assert set(scan.ill_matched.nonzero().flatten().tolist()) == ill
    assert scan.observed == total  # nothing waits beyond the epoch


@pytest.mark.parametrize("pool", [8, 48])
def test_ranked_goes_on_in_mid_epoch_without_leaving_samples_out(pool):
    one, losses = variants.make(f"rank{pool}")(320, 0.25), torch.rand(320)
    sampler = ScanSampler(one, 16)
    sampler.set_epoch(0)
    dealt = list(map(torch.tensor, sampler))
    for ids in dealt[:7]:
        one.observe(ids, losses[ids], losses[ids])
    other = variants.make(f"rank{pool}")(320, 0.25)
    other.load_state_dict(one.state_dict())
    sampler = ScanSampler(other, 16)
    sampler.set_epoch(0)
    again = list(sampler)
    assert again == [ids.tolist() for ids in dealt[7 * 16 // pool * pool // 16 :]]


def test_quantile_marks_by_all_epochs_of_full_data():
    total = 64
    scan = variants.make("quantile")(total, 0.25)
    losses = torch.rand(3, total, generator=torch.Generator().manual_seed(6))
    for epoch in range(3):
        scan.observe(scan.begin_epoch(epoch), losses[epoch], losses[epoch])
        scan.end_epoch()
    mean = np.argsort(np.argsort(losses.numpy(), axis=1), axis=1).mean(0)
    order = np.argsort(mean, kind="stable")
    red, ill = scan.redundant.numpy(), scan.ill_matched.numpy()
    assert red.sum() == ill.sum() == 16
    # float16 may swap neighbours: allow them at the edges
    assert mean[red].max() <= mean[order[16]] and mean[ill].min() >= mean[order[-17]]
    newest = np.argsort(losses[-1].numpy())
    assert set(newest[:16]) != set(np.flatnonzero(red))


@pytest.mark.parametrize("above", [0, 5, 40])
def test_chance_gives_the_places_below_chance_to_the_redundant(above):
    size = 64
    loss = torch.linspace(0, 4, size)
    loss[size - above :] += 4.2  # ln 64 = 4.16
    loss[: size - above] *= 4.1 / 4
    red, ill = variants.above_chance(loss, loss, 0.25, 0.25)
    most = min(16, above)
    assert ill.nonzero().flatten().tolist() == list(range(size - most, size))
    assert red.nonzero().flatten().tolist() == list(range(32 - most))


def test_the_lottery_marks_the_ill_matched_and_any_others():
    loss = torch.rand(64, generator=torch.Generator().manual_seed(7))
    drawn = []
    for seed in range(200):
        red, ill = variants.at_random(loss, loss, 0.25, 0.25, torch.Generator().manual_seed(seed))
        assert ill.nonzero().flatten().tolist() == sorted(loss.argsort()[-16:].tolist())
        assert red.sum() == 16 and not (red & ill).any()
        drawn.append(red)
    often = torch.stack(drawn).double().mean(0)[~ill]  # each of 48 in a third of the draws, ± 5 deviations
    assert (often - 1 / 3).abs().max() < 5 * (2 / 9 / 200) ** 0.5


def test_illfirst_leaves_out_the_ill_matched_before_the_redundant():
    first, plain = (kind(100, 0.25, seed=3) for kind in (variants.make("illfirst"), Scan))
    for scan in (first, plain):
        scan.first_preparation = 0
        scan.begin_epoch(0)
        loss = torch.arange(100).float()
        scan.observe(torch.arange(100), loss, loss)
        scan.end_epoch()
    for epoch, left_out in ((1, 12), (2, 37), (3, 50)):  # of 25 redundant and 25 ill-matched
        kept = [scan.begin_epoch(epoch) for scan in (first, plain)]
        assert len(kept[0]) == len(kept[1]) == 100 - left_out
        dropped = sorted(set(range(100)) - set(kept[0].tolist()))
        assert sum(i >= 75 for i in dropped) == min(left_out, 25) and not any(25 <= i < 75 for i in dropped)
        for scan in (first, plain):
            scan.observe(torch.arange(2), torch.ones(2), torch.ones(2))
            with pytest.warns(UserWarning, match="observed 2"):
                scan.end_epoch()


def test_mirrored_leaves_out_most_first_and_keeps_every_other_sample():
    scan = variants.make("mirrored")(100, 0.25)
    scan.first_preparation = 5
    for epoch, left_out in ((5, 0), (6, 50), (7, 37), (8, 12), (9, 0), (10, 50)):
        kept, loss = scan.begin_epoch(epoch), torch.arange(100).float()
        assert len(kept) == 100 - left_out and {*range(25, 75)} <= {*kept.tolist()}
        scan.observe(kept, loss[kept], loss[kept])
        scan.end_epoch()


def test_late_waits_for_half_the_chance_level():
    scan, half = variants.make("late")(64, 0.25), math.log(64) / 2
    for epoch, mean in enumerate((2 * half, 1.9 * half, 1.01 * half, 0.99 * half)):
        assert scan.first_preparation is None
        loss = torch.full((64,), mean)
        scan.observe(scan.begin_epoch(epoch), loss, loss)
        scan.end_epoch()
    assert scan.first_preparation == 4


def test_bent_takes_steps_of_short_epochs_for_steps_of_full_ones(monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda now, args: now)
    scan = variants.make("bent")(100, 0.3)
    scan.begin_epoch(0)
    assert train.learning_rate(2.5, None) == 2.5
    scan.num_kept = 40  # epoch 5 of 4 steps, at its third: step 5 x 4 + 2 of a run of 10 steps an epoch
    assert train.learning_rate(5 + 2 / 4, None) == pytest.approx((5 * 4 + 2) / 10)


@slow
def test_compare_runs_methods_on_one_budget_and_goes_on(tmp_path):
    methods = ["infobatch", "semdedup", "dpruning", "once", "same-budget"]
    command = [
        sys.executable,
        "experiments/compare.py",
        "--out",
        str(tmp_path),
        "--seeds",
        "0",
        "--jobs",
        "2",
    ]
    command += ["--methods", "full", *methods, "scan:--prune 0.1", "--proxy-epochs", "1", "--epochs", "5"]
    command += ["--data", "shapes:128", "--batch-size", "32", "--image-size", "32", "--val-data", "shapes:64"]
    command += ["--workers", "0", "--eval-every", "0"]
    first = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    logs = {path.parent.name: path.read_text().splitlines() for path in tmp_path.glob("*/log.jsonl")}
    epochs = {
        name.removesuffix("-seed0"): [r for r in map(json.loads, lines) if r["event"] == "epoch"]
        for name, lines in logs.items()
    }
    seen = {name: sum(r["samples"] for r in records) for name, records in epochs.items()}
    assert seen["full"] == 5 * 128 and seen["scan"] < seen["scan-prune-0.1"] < 5 * 128
    assert {seen[name] for name in methods} == {seen["scan"]}
    assert epochs["same-budget"][-1]["lr"] < 2e-4  # its rate ends at its own end
    again = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert again.stdout == first.stdout and again.stderr == ""  # nothing is run twice
    assert len(first.stdout.splitlines()) == 2 + 7
    rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    proxies = {row["method"]: row["proxy_epochs"] for row in rows if "proxy_epochs" in row}
    assert proxies == {"proxy": 1, "dpruning": 1}  # so that they are not mixed with others
    other = subprocess.run([*command, "--lr", "1"], cwd=HERE.parent, capture_output=True, text=True)
    assert other.returncode == 1 and "other flags" in other.stderr


def test_overlap_of_rounds_comes_from_counts_alone():
    report = pytest.importorskip("report")  # needs matplotlib
    rounds = torch.rand(4, 50, generator=torch.Generator().manual_seed(5)) < torch.linspace(0.1, 0.9, 50)
    pairs = list(itertools.combinations(rounds, 2))
    shared = np.mean([(a & b).sum() for a, b in pairs])
    size = rounds.sum(1).double().mean().item()
    same, chance = report.overlap({"counts": rounds.sum(0), "rounds": 4})
    assert same == pytest.approx(shared / (2 * size - shared))
    assert chance == pytest.approx(size / (100 - size))


def write_run(folder, data="shapes:64", epochs=4, done=2, seconds=3.0):
    """Write the log and configuration of a run of train.py -> its folder."""
    folder.mkdir()
    flags = ["--arch", "vit_tiny", "--data", data, "--epochs", str(epochs), "--seed", folder.name[-1]]
    (folder / "config.json").write_text(json.dumps(vars(train.parse_args(flags))))
    records = []
    for epoch in range(done):
        stage = {0: "warm-up", 1: "preparation"}.get(epoch, "mutation")
        epoch_record = dict(
            event="epoch", epoch=epoch, stage=stage, kept=64, total=64, loss=2.0, candidates=9
        )
        records += [epoch_record | dict(samples=64, samples_seen=64 * (epoch + 1), seconds=seconds)]
        records += [dict(event="eval", epoch=epoch, top1=0.5, top5=0.75, balanced=(epoch + 1) / 8, n=64)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture
def report(monkeypatch):
    report = pytest.importorskip("report")  # needs matplotlib
    scan = Scan(64, 0.25)
    scan.first_preparation = 0
    play(scan, 1, 16, skewed_losses(64))
    args = vars(train.parse_args(["--arch", "vit_tiny", "--data", "shapes:64"]))
    checkpoint = {"scan": scan.state_dict(), "args": args, "tokenizer": "hashed words"}
    monkeypatch.setattr(report.evaluation, "load_checkpoint", lambda path: checkpoint)
    return report


def test_report_goes_to_the_folder_of_an_unfinished_run(report, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "scan-seed0")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--figures", str(tmp_path / "figures")])
    report.main()
    assert capsys.readouterr().out == f"{run}/report.html: 1 run, scan-seed0 in detail\n"
    page = (run / "report.html").read_text()
    assert (
        page.count("unfinished: 2 of 4 epochs") == 2
        and "25.0%</b><span>balanced accuracy after epoch 1" in page
    )
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"epochs", "scores", "redundant", "ill-matched"} and page.count("<figure") == 4


def test_report_compares_scores_of_finished_runs_on_the_same_data_alone(report, tmp_path):
    runs = [write_run(tmp_path / f"{method}-seed{k}", done=4) for method in ("full", "scan") for k in (0, 1)]
    runs += [write_run(tmp_path / f"rs2-seed{k}", done=3 - k) for k in (0, 1)]
    runs += [write_run(tmp_path / f"once-seed{k}", data="shapes:32", done=4) for k in (0, 1)]
    runs = [report.read(run) for run in runs]
    same = [run for run in runs if report.comparable(run, runs[0])]
    assert {run["method"] for run in same} == {"full", "scan", "rs2"}
    assert report.gaps(same) == {"scan (2)": (0.0, 0.0)}  # rs2 is not finished
    for number, words in ((0, "0 rounds"), (1, "1 round"), (2000, "2,000 rounds")):
        assert report.plural(number, "round") == words
