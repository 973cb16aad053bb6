"""scan.py inside other programs: pytest experiments/test_integrations.py. Each part needs its package.

pip install -r experiments/requirements.txt lightning accelerate
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from scan import Scan, ScanSampler, WithIds, info_nce  # noqa: E402

# ---------------------------------------------------------------- open_clip

TINY = """{"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
"text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}"""
FLAGS = "--dataset-type csv --train-data pairs.csv --model tiny --device cpu --precision fp32 --workers 0"
FLAGS = f"{FLAGS} --warmup 4 --lr 1e-3".split()
REPLACED = ("parse_args", "pt_load", "get_data", "create_loss", "cosine_lr", "const_lr", "const_lr_cooldown")


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """96 pictures of one colour each (so that random crops change nothing), and a tiny model's config."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("open_clip_train.main")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    colours = torch.randint(256, (96, 3), generator=torch.Generator().manual_seed(0)).tolist()
    rows = ["filepath\ttitle"]
    for i, colour in enumerate(colours):
        Image.new("RGB", (40, 40), tuple(colour)).save(f"{i}.png")
        rows.append(f"{i}.png\tcolour {' '.join(str(c // 32) for c in colour)}")
    Path("pairs.csv").write_text("\n".join(rows))
    Path("tiny.json").write_text(TINY)
    open_clip.add_model_config("tiny.json")


def run_open_clip(monkeypatch, flags, replace=None):
    """Run open_clip's main -> its losses, its learning rates, and the pairs that it read, step by step."""
    import open_clip_scan
    from open_clip_train import data, main

    losses, rates, read = [], [], []
    with monkeypatch.context() as patch:
        for name in REPLACED:
            patch.setattr(main, name, getattr(main, name))  # put back what add_scan replaces
        patch.setattr(torch.nn.parallel, "DistributedDataParallel", torch.nn.parallel.DistributedDataParallel)
        create_loss, getitem, cosine_lr = main.create_loss, data.CsvDataset.__getitem__, main.cosine_lr

        def recorded_loss(args):
            loss = create_loss(args)

            def call(*features, **options):
                found = loss(*features, **options)
                losses.append(found["contrastive_loss"].item())
                return found

            return call

        def recorded_rate(*args):
            adjust = cosine_lr(*args)
            return lambda step: rates.append(adjust(step))

        patch.setattr(main, "create_loss", recorded_loss)
        patch.setattr(main, "cosine_lr", recorded_rate)
        patch.setattr(data.CsvDataset, "__getitem__", lambda self, i: (read.append(i), getitem(self, i))[1])
        if replace is None:
            assert not open_clip_scan.main([*FLAGS, *flags])
        else:
            patch.setattr(main, "get_data", replace(main.get_data))
            assert not main.main([*FLAGS, *flags])
    return losses, rates, read


def checkpoint(name, epoch):
    return torch.load(f"logs/{name}/checkpoints/epoch_{epoch}.pt")


def test_open_clip_without_pruning_is_open_clip(pairs, monkeypatch):
    """Equal losses, rates and weights when plain open_clip gets the pairs in the same order."""

    def same_order(get_data):
        def replaced(args, *rest, **options):
            found = get_data(args, *rest, **options)
            loader = found["train"].dataloader
            order = ScanSampler(Scan(96, prune=0, seed=0), 16)

            class Batches:
                epoch = 0

                def __iter__(self):  # no set_epoch from open_clip: it knows DistributedSampler alone
                    order.set_epoch(self.epoch)
                    yield from order
                    order.scan.observed = 96  # nothing observes
                    order.scan.end_epoch()
                    self.epoch += 1

                def __len__(self):
                    return 6

            new = DataLoader(loader.dataset, batch_sampler=Batches())
            new.num_samples, new.num_batches = 96, 6
            found["train"].dataloader = new
            return found

        return replaced

    plain = run_open_clip(monkeypatch, ["--epochs", "3", "--batch-size", "16", "--name", "a"], same_order)
    flags = ["--prune", "0", "--epochs", "3", "--batch-size", "16", "--name", "b"]
    scan = run_open_clip(monkeypatch, flags)
    assert len(plain[0]) == 18 and scan == plain
    mine, theirs = checkpoint("b", 3), checkpoint("a", 3)
    assert all(mine["state_dict"][k].equal(v) for k, v in theirs["state_dict"].items())


def test_open_clip_prunes_and_resumes(pairs, monkeypatch):
    options = ["--epochs", "6", "--batch-size", "16"]
    losses, rates, read = run_open_clip(monkeypatch, [*options, "--name", "whole"])
    # 2 warm-up epochs and a preparation of 6 steps; then 12.5 %, 37.5 % and 50 % of the data left out
    steps = [6, 6, 6, 5, 3, 3]
    assert len(losses) == sum(steps) and len(read) == 16 * sum(steps)
    state = checkpoint("whole", 6)["optimizer"]["scan"]
    candidates = (state["redundant"] | state["ill_matched"]).nonzero().flatten().tolist()
    assert 40 < len(candidates) <= 48  # each batch of 16: 4 redundant, 4 ill-matched; few are both
    assert not set(read[-16 * 3 :]) & set(candidates)  # ratio 1: none of them is read
    # cosine of open_clip's own formula on the fractional epoch: 4 warm-up steps, 36 steps of full data
    at = [6 * (epoch + i / n) for epoch, n in enumerate(steps) for i in range(n)]
    cosine = [0.5e-3 * (1 + torch.tensor(torch.pi * (step - 4) / 32).cos().item()) for step in at]
    wanted = [1e-3 * (step + 1) / 4 if step < 4 else c for step, c in zip(at, cosine)]
    assert rates == pytest.approx(wanted, abs=1e-9)

    # Stopped after the preparation and after the first mutation epoch, then resumed.
    for epoch in (3, 4):
        resume = ["--resume", f"logs/whole/checkpoints/epoch_{epoch}.pt", "--name", f"from{epoch}"]
        again = run_open_clip(monkeypatch, [*options, *resume])
        rest = sum(steps[epoch:])
        assert again == (losses[-rest:], rates[-rest:], read[-16 * rest :])
        resumed = checkpoint(f"from{epoch}", 6)
        for name, value in state.items():
            found = resumed["optimizer"]["scan"][name]
            assert found.equal(value) if torch.is_tensor(value) else found == value, name
    with pytest.raises(SystemExit, match=r"rho_red 0.3 \(here 0.2\)"):
        run_open_clip(monkeypatch, [*options, *resume, "--name", "other", "--prune", "0.2"])
    # open_clip alone can still read such a checkpoint
    resume = ["--resume", "logs/whole/checkpoints/epoch_5.pt", "--name", "plain"]
    run_open_clip(monkeypatch, [*options, *resume], lambda get_data: get_data)


def test_open_clip_on_two_ranks_takes_the_same_decisions(pairs, monkeypatch):
    """--local-loss --gather-with-grad: the gradients of one process, so the same run."""
    options = ["--epochs", "5", "--local-loss", "--gather-with-grad"]
    run_open_clip(monkeypatch, [*options, "--batch-size", "16", "--name", "one"])
    start = (
        "import sys, open_clip; open_clip.add_model_config('tiny.json'); sys.path[:0] = [sys.argv.pop(1)]; "
    )
    Path("ranks.py").write_text(start + "import open_clip_scan; open_clip_scan.main(sys.argv[1:])")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*torchrun, "ranks.py", HERE, *FLAGS, *options, "--batch-size", "8", "--name", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "observed" not in done.stderr  # no warning
    one, two = (checkpoint(name, 5)["optimizer"]["scan"] for name in ("one", "two"))
    assert one["counts"].sum() > 40 and one["counts"].equal(two["counts"])
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["observed"] == two["observed"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--train-data", "00.tar", "--dataset-type", "webdataset"], "a stream has none"),
        (["--train-data", "00.tar", "--dataset-type", "auto"], "a stream has none"),
        (["--accum-freq", "2"], "--accum-freq"),
        (["--siglip"], "--siglip"),
        (["--horovod"], "--horovod"),
        (["--prune", "0.6"], "at most 1"),
        (["--batch-size", "97"], "do not fill one global batch"),
    ],
)
def test_open_clip_scan_refuses_in_one_line(pairs, monkeypatch, flags, said):
    with pytest.raises(SystemExit) as stop:
        run_open_clip(monkeypatch, ["--batch-size", "16", "--name", "refused", *flags])
    assert said in stop.value.code and "\n" not in stop.value.code


# ---------------------------------------------------------------- frameworks


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, images, texts):
        return nn.functional.normalize(self.image(images)), nn.functional.normalize(self.text(texts)), 10


def pairs_of_numbers(n=320):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, n, 16, generator=generator)
    return TensorDataset(x, x @ torch.randn(16, 16, generator=generator) + 0.3 * noise)


def loss_of(scan, model, ids, images, texts):
    image, text, scale = model(images, texts)
    a, b = info_nce(image, text, scale), info_nce(text, image, scale)
    scan.observe(ids, a, b)
    return ((a + b) / 2).mean()


def plain_run(epochs=8):
    """The reference: counts, samples of each epoch, and the model, of the plain torch loop."""
    dataset, model = pairs_of_numbers(), Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scan = Scan(len(dataset))
    sampler = ScanSampler(scan, 32)
    loader, observed = DataLoader(WithIds(dataset), batch_sampler=sampler), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for ids, batch in loader:
            loss_of(scan, model, ids, *batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        scan.end_epoch()
        observed.append(scan.observed)
    assert min(observed) < 320 == max(observed)  # it prunes
    return scan.counts, observed, model


def same(model, other):
    return all(a.equal(b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_lightning(tmp_path):
    """Needs len() before the first epoch, new loaders, a second iter(); resumes between and in epochs."""
    lightning = pytest.importorskip("lightning")
    dataset = pairs_of_numbers()

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.scan, self.sampler, self.observed = Model(), Scan(len(dataset)), None, []

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

        def train_dataloader(self):
            self.sampler = self.sampler or ScanSampler(self.scan, 32)
            self.sampler.set_epoch()
            return DataLoader(WithIds(dataset), batch_sampler=self.sampler)

        def training_step(self, batch):
            ids, batch = batch
            return loss_of(self.scan, self.model, ids, *batch)

        def on_train_epoch_end(self):
            self.scan.end_epoch()
            self.observed.append(self.scan.observed)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["scan"] = self.scan.state_dict()

        def on_load_checkpoint(self, checkpoint):
            self.scan.load_state_dict(checkpoint["scan"])

    def fit(resume=None, **limit):
        module, options = Lit(), dict(accelerator="cpu", logger=False, enable_progress_bar=False)
        every = dict(every_n_train_steps=limit.get("max_steps"))  # None: at the end of each epoch
        saves = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, **every)
        trainer = lightning.Trainer(
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            callbacks=[saves],
            **options,
            **limit,
        )
        trainer.fit(module, ckpt_path=resume)
        return module

    counts, observed, model = plain_run()
    for stop in (dict(max_epochs=6), dict(max_steps=13, max_epochs=8), dict(max_steps=35, max_epochs=8)):
        first = fit(**stop)
        second = fit(tmp_path / "last.ckpt", max_epochs=8)
        whole = first.observed[: 8 - len(second.observed)]  # Lightning ends the epoch that it stops in, too
        assert whole + second.observed == observed
        assert second.scan.counts.equal(counts) and same(second.model, model)
        (tmp_path / "last.ckpt").unlink()


def test_hf_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    observed = []

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            self.scan = Scan(len(self.train_dataset))
            sampler = ScanSampler(self.scan, self.args.per_device_train_batch_size * self.args.world_size)
            loader = DataLoader(WithIds(self.train_dataset), batch_sampler=sampler)
            loader.set_epoch = sampler.set_epoch
            return loader

        def compute_loss(self, model, inputs, **_):
            ids, batch = inputs
            return loss_of(self.scan, model, ids, *batch)

    class EndEpoch(transformers.TrainerCallback):
        def on_epoch_end(self, *_, **__):
            trainer.scan.end_epoch()
            observed.append(trainer.scan.observed)

    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    options = dict(use_cpu=True, report_to=[], save_strategy="no", max_grad_norm=0, disable_tqdm=True)
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=32, num_train_epochs=8, **options
    )
    dataset = pairs_of_numbers()
    trainer = Trainer(
        model, args, train_dataset=dataset, callbacks=[EndEpoch()], optimizers=(optimizer, constant)
    )
    trainer.train()
    counts, wanted, model_of_loop = plain_run()
    assert observed == wanted and trainer.scan.counts.equal(counts) and same(model, model_of_loop)


ACCELERATE = """
import sys, warnings; sys.path[:0] = [sys.argv[1]]
import accelerate, torch
from torch.utils.data import DataLoader
from scan import Scan, ScanSampler, WithIds
from test_integrations import Model, loss_of, pairs_of_numbers
accelerator, dataset, model = accelerate.Accelerator(cpu=True), pairs_of_numbers(), Model()
model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
scan = Scan(len(dataset))
sampler = ScanSampler(scan, 32)
loader = DataLoader(WithIds(dataset), batch_sampler=sampler)
if sys.argv[2] == "shard":
    loader = accelerator.prepare(loader)
for epoch in range(8):
    sampler.set_epoch(epoch)
    for ids, batch in loader:
        accelerator.backward(loss_of(scan, model, ids, *batch))
        optimizer.step(); optimizer.zero_grad()
    scan.end_epoch()
    if accelerator.is_main_process:
        print("observed", scan.observed)
accelerator.end_training()
"""


@pytest.mark.parametrize("loader", ["as it is", "shard"])
def test_accelerate_on_two_ranks(tmp_path, loader):
    """Trains as the plain loop does; a loader that accelerate shards a second time triggers the warning."""
    pytest.importorskip("accelerate")
    (tmp_path / "loop.py").write_text(ACCELERATE)
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*torchrun, tmp_path / "loop.py", HERE, loader]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    observed = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("observed")]
    if loader == "shard":
        assert observed[0] == 160 and "epoch 0 kept 320 samples, and observed 160" in done.stderr
    else:
        assert observed == plain_run()[1] and "kept" not in done.stderr
