"""How fast, and in how much memory: beside open_clip and webdataset, and at the sizes of large data.

    python experiments/bench.py peers                  # one table of ratios: higher is better, 1 is equal
    python experiments/bench.py peers --only loss tar  # only rows with one of these in their name
    python experiments/bench.py scale                  # a rehearsal of 10 M and 400 M samples

Both sides alternate, and each figure is a median of --rounds. Peak memory is that of a process of its own,
above what it held before. Peers: `pip install open_clip_torch webdataset`; rows without them are named.
"""

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import clip_model  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import moco  # noqa: E402
import train  # noqa: E402
from scan import Scan, ScanSampler, info_nce  # noqa: E402

GPU = torch.cuda.is_available()
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s that the maker states
WORDS = clip_model.HashedWords()

# ---------------------------------------------------------------- measuring


def memory(name):
    """MB of this process, from Linux. VmRSS: now, VmHWM: the most so far."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def alone(function, *args):
    """What a function returns in a fresh process. One that dies (of too little memory) is an error."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def seconds_of(function):
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(rounds, *functions, warm=1, repeat=1):
    """-> median seconds of each, and the median of last / first: how much faster the first is."""
    times = [[] for _ in functions]
    for turn in range(warm + rounds):
        for function, taken in zip(functions, times):
            second = seconds_of(lambda: [function() for _ in range(repeat)]) / repeat  # noqa: B023
            taken.extend([second] if turn >= warm else [])
    ratios = [last / first for first, last in zip(times[0], times[-1])]
    return *map(statistics.median, times), statistics.median(ratios)


# ---------------------------------------------------------------- steps


def clip_batch(size, length, device):
    """Pixels (b, 3, 224, 224) uint8 and tokens (b, length), the rest of 77 being padding."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 49000, (size, length))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    pixels = torch.randint(256, (size, 3, 224, 224), dtype=torch.uint8)
    return (pixels.pin_memory(), tokens.pin_memory()) if device.type == "cuda" else (pixels, tokens)


def our_step(arch, make_batch, size, device, compiled):
    """train.py's own step, `observe` in a preparation epoch included. make_batch: -> what a loader gives."""
    flags = ["--arch", arch, "--device", device.type, "--batch-size", str(size), "--data", "none"]
    args = train.parse_args([*flags, "--compile", "on" if compiled else "off"])
    tokenizer = None if arch in moco.ARCHS else WORDS
    model = train.create_model(args, tokenizer).to(device).train()
    optimizer = train.make_optimizer(model, args)
    train.set_warmup_and_precision(args, 1000, device)
    module, autocast = train.parallel(model, args, 1000, 1, device)
    scan = Scan(1_000_000, args.prune)
    scan.first_preparation = 0
    scan.begin_epoch(0)

    def step():
        if tokenizer is None:
            model.update_momentum_encoder(0.99)
        inputs = model.inputs(make_batch(), device)
        a, b, backward = train.forward(module, model.losses, inputs, autocast)
        scan.observe(torch.randint(1_000_000, (size,)), a, b)
        backward()
        optimizer.step()
        optimizer.zero_grad()
        if tokenizer is not None:
            model.logit_scale.data.clamp_(0, np.log(100))

    return step


def open_clip_step(batch, device, compiled):
    """open_clip's model, loss and settings; its loader gives normalised floats and 77 tokens."""
    import open_clip

    model = open_clip.create_model("ViT-B-32", device=device)
    loss = open_clip.ClipLoss()
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "bias" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "bias" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    module = torch.compile(model) if compiled else model
    pixels, tokens = batch
    pixels, tokens = pixels.float() / 255, F.pad(tokens, (0, 77 - tokens.shape[1]))
    if device.type == "cuda":
        pixels, tokens = pixels.pin_memory(), tokens.pin_memory()

    def step():
        images, texts = (x.to(device, non_blocking=True) for x in (pixels, tokens))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(*module(images, texts))
        value.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))

    return step


def clip_row(length, compiled, args, on_gpu=False, peer_compiled=None):
    device = torch.device("cuda" if on_gpu else "cpu")
    size = args.gpu_batch if on_gpu else args.batch
    batch = clip_batch(size, length, device)
    ours = our_step("vit_b32", lambda: batch, size, device, compiled)
    theirs = open_clip_step(batch, device, compiled if peer_compiled is None else peer_compiled)
    warm, repeat = (3, 10) if on_gpu else (1, 1)
    mine, peer, ratio = alternate(args.rounds, ours, theirs, warm=warm, repeat=repeat)
    share = ""
    if on_gpu:
        model = clip_model.create("vit_b32").to("meta")
        share = share_of_peak(
            model, [x.to("meta") for x in clip_batch(size, length, torch.device("cpu"))], mine
        )
    return f"{size / mine:,.1f}/s{share}", f"{size / peer:,.1f}/s", ratio


def share_of_peak(model, batch, seconds):
    """Of the matrix products that forward and backward pass need, beside what the maker states."""
    from torch.utils.flop_counter import FlopCounterMode

    peak = next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None)
    with FlopCounterMode(display=False) as counter:
        image, text, _ = model(batch[0].float(), batch[1])
        (image.sum() + text.sum()).backward()
    flops = counter.get_total_flops() / seconds
    return f", {flops / 1e12:.0f} TFLOP/s" + (f", {flops / peak:.0%} of peak" if peak else "")


def own_compile_row(length, args):
    device, batch = torch.device("cpu"), clip_batch(args.batch, length, torch.device("cpu"))
    steps = [our_step("vit_b32", lambda: batch, args.batch, device, on) for on in (True, False)]
    compiled, eager, ratio = alternate(args.rounds, *steps)
    return f"{args.batch / compiled:.1f}/s", f"{args.batch / eager:.1f}/s (ours, eager)", ratio


# ---------------------------------------------------------------- the loss


def _loss(which, n, threads):
    """-> seconds and MB above what was held, of both directions forward and backward."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if GPU else "cpu")
    scale = torch.tensor(14.3, requires_grad=True, device=device)
    if which == "ours":

        def loss(a, b):
            return ((info_nce(a, b, scale) + info_nce(b, a, scale)) / 2).mean()
    else:
        import open_clip

        peer = open_clip.ClipLoss()

        def loss(a, b):
            return peer(a, b, scale)

    loss(*torch.randn(2, 64, 512, device=device, requires_grad=True)).backward()  # loads the libraries
    pair = [F.normalize(torch.randn(n, 512, device=device), dim=1).requires_grad_() for _ in range(2)]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if GPU else memory("VmRSS")
    seconds = seconds_of(lambda: loss(*pair).backward())
    peak = torch.cuda.max_memory_allocated() / 2**20 if GPU else memory("VmHWM")
    return seconds, peak - before


def loss_row(n, args, which):
    """which: 0, time; 1, memory."""
    rounds = 1 if n > 20_000 else args.rounds
    names = ["ours"] if n > 20_000 else ["ours", "peer"]  # ClipLoss would take some 70 GB
    runs = [[alone(_loss, name, n, args.threads) for name in names] for _ in range(rounds)]
    mine, *peer = (statistics.median(run[k][which] for run in runs) for k in range(len(names)))
    form = "{:.3f} s" if which == 0 else "{:,.0f} MB"
    if not peer:
        return form.format(mine), "not run", float("nan")
    ratio = statistics.median(run[1][which] / run[0][which] for run in runs)
    return form.format(mine), form.format(peer[0]), ratio


def observe_row(stage, args):
    """Microseconds per step, the GPU's own work included."""
    device = torch.device("cuda" if GPU else "cpu")
    scan = Scan(1_000_000)
    scan.first_preparation = {"warm-up": None, "preparation": 0, "mutation": -1}[stage]
    scan.begin_epoch(0)
    ids = torch.randperm(1_000_000)[:800]
    a, b = torch.rand(2, 800, device=device)
    second = alternate(args.rounds, lambda: scan.observe(ids, a, b), repeat=200)[0]
    return f"{second * 1e6:.0f} us", "", float("nan")


# ---------------------------------------------------------------- loading


def pictures(kinds, sides):
    """JPEG bytes of so many pictures with detail at every scale."""
    draw, found = np.random.default_rng(0), []
    for k in range(kinds):
        width, height = sides if k % 2 else sides[::-1]
        total = np.zeros((height, width, 3), np.float32)
        for grain in (4, 12, 40, 120):
            noise = Image.fromarray(draw.integers(0, 256, (grain, grain, 3), dtype=np.uint8))
            total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) * grain**-0.5
        file, total = io.BytesIO(), (total - total.min()) / np.ptp(total) * 255
        Image.fromarray(total.astype(np.uint8)).save(file, "JPEG", quality=88)
        found.append(file.getvalue())
    return found


def write_shards(folder, shards, per_shard, images):
    """Tar files as webdataset's, once. images: JPEG bytes, taken in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"{shard:05}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".new"), "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(shard * per_shard, (shard + 1) * per_shard):
                caption = b"a photograph of a cat on a red sofa, number %d" % i
                for ending, content in (("jpg", images[i % len(images)]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{i:09}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        path.with_suffix(".new").rename(path)
    return sorted(str(path) for path in folder.glob("*.tar"))[:shards]


def one_thread(_):
    torch.set_num_threads(1)


def our_loader(dataset, batches, workers):
    """As train.py builds it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=GPU,
        worker_init_fn=train.ignore_signals,
    )


def webdataset_loader(paths, size, workers):
    """A pipeline as webdataset's own examples and open_clip's: shuffled in a buffer of 1,000."""
    import webdataset as wds

    crop = transforms.RandomResizedCrop(size, (0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    steps = dict(image=transforms.Compose([crop, transforms.ToTensor()]))
    steps["text"] = lambda text: F.pad(torch.from_numpy(WORDS(text)), (0, 77))[:77]
    stages = [wds.SimpleShardList(paths), wds.split_by_worker, wds.tarfile_to_samples(), wds.shuffle(1000)]
    stages += [wds.decode("pilrgb"), wds.rename(image="jpg", text="txt"), wds.map_dict(**steps)]
    stages += [wds.to_tuple("image", "text"), wds.batched(64)]
    options = dict(batch_size=None, num_workers=workers, persistent_workers=workers > 0, pin_memory=GPU)
    return DataLoader(wds.DataPipeline(*stages), worker_init_fn=one_thread, **options)


def tar_row(size, workers, args):
    torch.set_num_threads(1)
    count, sides = (4000, (96, 80)) if size == 64 else (800, (500, 375))
    paths = write_shards(args.folder / f"tars{size}", 4, count // 4, pictures(200, sides))
    pairs = data.Pairs(data.open_source("::".join(paths)), WORDS, size)
    ours = our_loader(pairs, torch.randperm(count).view(-1, 50).tolist(), workers)
    loaders = ours, webdataset_loader(paths, size, workers)
    mine, peer, ratio = alternate(args.rounds, *(functools.partial(list, loader) for loader in loaders))
    torch.set_num_threads(args.threads)
    return f"{count / mine:,.0f}/s", f"{count / peer:,.0f}/s", ratio


def bare_row(size, args):
    """One process beside a bare loop of what no loader avoids: Pillow's decoding, torch's resizing."""
    torch.set_num_threads(1)
    paths = write_shards(args.folder / "tars224", 4, 200, pictures(200, (500, 375)))
    pairs, files = data.Pairs(data.open_source("::".join(paths)), WORDS, size), pictures(200, (500, 375))

    def bare():
        for content in files:
            picture = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
            image = torch.from_numpy(picture).permute(2, 0, 1)[None]
            F.interpolate(image, (size, size), mode="bicubic", antialias=True)

    mine, peer, ratio = alternate(args.rounds, lambda: [pairs[i] for i in range(200)], bare)
    torch.set_num_threads(args.threads)
    return f"{200 / mine:,.0f}/s", f"{200 / peer:,.0f}/s (bare loop)", ratio


def _open(spec, cache, rank, ranks):
    os.environ |= {"XDG_CACHE_HOME": cache, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    start = time.time()
    samples = len(data.open_source(spec))
    return start, time.time(), samples


def index_row(ranks, args):
    """New tars, by so many ranks of one machine: none may have seen them."""
    folder = args.folder / "index"
    write_shards(folder, 24, 10_000, [bytes(2000)])
    rates = []
    for _ in range(args.rounds):
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(ranks, mp_context=context) as pool:
            list(pool.map(time.sleep, [1] * ranks))  # all have started
            tasks = [(f"{folder}/*.tar", cache, rank, ranks) for rank in range(ranks)]
            starts, ends, samples = zip(*pool.map(_open, *zip(*tasks)))
        rates.append(samples[0] / (max(ends) - min(starts)))
    return f"{statistics.median(rates):,.0f}/s", "", float("nan")


# ---------------------------------------------------------------- an epoch boundary


def boundary(n, folder, full, batch=4096):
    """Seconds and peak MB of all that happens between two epochs, and of a resume. full: not a mutation."""
    path, taken = Path(folder) / "boundary.pt", {}
    before = memory("VmRSS")

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        taken[name] = time.perf_counter() - start
        taken[f"{name}, MB"] = memory("VmHWM") - before
        return result

    scan = Scan(n)
    scan.first_preparation = 0
    scan._marked.random_(0, 2)
    scan.epoch, scan.full_epochs = 3 if full else 0, 1
    sampler = ScanSampler(scan, batch, 0, 1)
    timed("draw", lambda: sampler.set_epoch(scan.epoch + 1))
    batches = iter(sampler)
    timed("first batch", lambda: next(batches))
    timed("check", lambda: hashlib.sha256(scan.kept_mask.numpy()).digest())
    timed("shuffle", lambda: sum(1 for _ in batches))  # spread over the epoch
    scan.observed = scan.num_kept
    timed("end", scan.end_epoch)
    timed("checkpoint", lambda: torch.save({"scan": scan.state_dict()}, path))
    timed("resume", lambda: scan.load_state_dict(evaluation.load_checkpoint(path)["scan"]))
    path.unlink()
    return taken


def boundary_row(n, full, args):
    taken = alone(boundary, n, str(args.folder), full)
    between = sum(taken[k] for k in ("draw", "first batch", "check", "end"))
    peaks = f"{taken['shuffle, MB']:,.0f} MB; with checkpoint {taken['checkpoint, MB']:,.0f} MB"
    ours = f"{between:.1f} s, {peaks}; {taken['shuffle']:.1f} s of shuffling within the epoch"
    return ours, "", float("nan")


# ---------------------------------------------------------------- whole runs


def run_train(args, *flags, ranks=1, threads=1):
    """-> what train.py printed, and its epochs' records."""
    with tempfile.TemporaryDirectory() as out:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "train.py"]
        command += [*flags, "--out", out, "--device", "cpu", "--eval-every", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return done.stdout, [r for r in records if r["event"] == "epoch"]


def saving_row(args):
    """vit_b32 on the built-in pictures: share of time saved / share of samples saved."""
    flags = "--arch vit_b32 --data shapes:512 --epochs 8 --warmup-threshold 1 --workers 1".split()
    printed, _ = run_train(args, *flags, threads=args.threads)
    samples, seconds = (float(x) / 100 for x in re.findall(r"([-\d.]+)% saved", printed))
    return f"{seconds:.1%} of time", f"{samples:.1%} of samples", seconds / samples


def ranks_row(arch, args):
    """Seconds of an epoch: two ranks of one thread, and one process of two threads."""
    flags = ["--arch", arch, "--data", "shapes:1024", "--epochs", "4", "--prune", "0"]

    def epoch(ranks, threads, workers):
        _, epochs = run_train(args, *flags, "--workers", str(workers), ranks=ranks, threads=threads)
        return statistics.median(r["seconds"] for r in epochs[1:])

    pairs = [(epoch(2, 1, 1), epoch(1, 2, 2)) for _ in range(min(args.rounds, 3))]
    two, one = (statistics.median(pair[k] for pair in pairs) for k in range(2))
    return f"{two:.2f} s", f"{one:.2f} s (one process)", statistics.median(b / a for a, b in pairs)


# ---------------------------------------------------------------- on a GPU, from tar files


def endless(loader):
    while True:
        yield from loader


def gpu_clip_from_tars(args):
    """open_clip's step fed by webdataset, ours by our loader."""
    device, size, workers = torch.device("cuda"), args.gpu_batch, evaluation.loading_processes()
    paths = write_shards(args.folder / "tars224-many", 16, 1000, pictures(200, (500, 375)))
    pairs = data.Pairs(data.open_source("::".join(paths)), WORDS, 224)
    ours = endless(
        our_loader(pairs, torch.randperm(16_000)[: 16_000 // size * size].view(-1, size).tolist(), workers)
    )
    step = our_step("vit_b32", lambda: next(ours)[2:], size, device, False)
    second = alternate(args.rounds, step, warm=3, repeat=10)[0]
    return f"{size / second:,.0f}/s, {workers} loading processes", "", float("nan")


class PlainViews(torch.utils.data.Dataset):
    """MoCo v3's published augmentation by torchvision's transforms, sample by sample."""

    def __init__(self, source):
        self.source = source
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)

        def view(blur, solarize):
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(224, (0.08, 1.0)),
                    jitter,
                    transforms.RandomGrayscale(0.2),
                    transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], blur),
                    transforms.RandomSolarize(128, solarize),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ]
            )

        self.views = view(1.0, 0.0), view(0.1, 0.2)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        picture = self.source.image(i)
        return [view(picture) for view in self.views]


def plain_moco_step(size, batches, device):
    """The published step with torch's parts: eager, one key at a time, moving average tensor by tensor."""
    model = moco.create("moco_vit_s16").to(device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1.5e-4, weight_decay=0.1
    )

    def step():
        view1, view2 = (x.to(device, non_blocking=True) for x in next(batches))
        with torch.no_grad():
            for base, moving in zip(model.base_encoder.parameters(), model.momentum_encoder.parameters()):
                moving.mul_(0.99).add_(base, alpha=0.01)
        with torch.autocast("cuda", torch.bfloat16):
            q1, q2, k1, k2 = model(view1, view2)
        target = torch.arange(size, device=device)
        loss = F.cross_entropy(q1 @ k2.T / 0.2, target) + F.cross_entropy(q2 @ k1.T / 0.2, target)
        optimizer.zero_grad()
        (loss * 0.4).backward()
        optimizer.step()

    return step


def gpu_moco_row(from_tars, compiled, args):
    """moco_vit_s16, batch 600. Ours from tars or with decoded crops in memory; the plain one from tars."""
    device, size, workers = torch.device("cuda"), 600, evaluation.loading_processes()
    paths = write_shards(args.folder / "tars224-many", 16, 1000, pictures(200, (500, 375)))
    source = data.open_source("::".join(paths))
    batches = torch.randperm(15_600).view(-1, size).tolist()
    ours = endless(our_loader(data.Views(source, 224, moco.draw_views), batches, workers))
    if not from_tars:
        crops = torch.randint(256, (size, 2, 3, 224, 224), dtype=torch.uint8).pin_memory()
        numbers = torch.stack([moco.draw_views() for _ in range(size)])
    make_batch = (lambda: next(ours)[2:]) if from_tars else lambda: (crops, numbers)
    step = our_step("moco_vit_s16", make_batch, size, device, compiled)
    second = alternate(args.rounds, step, warm=3, repeat=5)[0]
    options = dict(batch_sampler=batches, num_workers=workers, pin_memory=True, persistent_workers=True)
    plain = endless(DataLoader(PlainViews(source), worker_init_fn=one_thread, **options))
    peer = alternate(1, plain_moco_step(size, plain, device), warm=2, repeat=5)[0]
    return f"{size / second:,.0f}/s", f"{size / peer:,.0f}/s (plain, from tars)", peer / second


# ---------------------------------------------------------------- the table

# name: (goal, what it needs, function of args)
ROWS = {
    "step vit_b32, 20 of 77 tokens": (">= 1.5", "open_clip", lambda a: clip_row(20, False, a)),
    "step vit_b32, 77 tokens": (">= 1.1", "open_clip", lambda a: clip_row(77, False, a)),
    "compiled step vit_b32, 20 of 77": (">= 1.5", "open_clip", lambda a: clip_row(20, True, a)),
    "compiled step vit_b32, 77 tokens": (">= 1.1", "open_clip", lambda a: clip_row(77, True, a)),
    "compiled beside our own eager, 77": (">= 1.1", None, lambda a: own_compile_row(77, a)),
    "loss 4,096, time": (">= 1", "open_clip", lambda a: loss_row(4096, a, 0)),
    "loss 16,384, time": (">= 0.83", "open_clip", lambda a: loss_row(16384, a, 0)),
    "loss 16,384, memory": (">= 8", "open_clip", lambda a: loss_row(16384, a, 1)),
    "loss 65,536, memory": ("< 1 GB", None, lambda a: loss_row(65536, a, 1)),
    "observe 800, warm-up": ("", None, lambda a: observe_row("warm-up", a)),
    "observe 800, preparation": ("< 0.5 % of a GPU step", None, lambda a: observe_row("preparation", a)),
    "observe 800, mutation": ("", None, lambda a: observe_row("mutation", a)),
    "tar loader, 64 px, 1 process": (">= 2", "webdataset", lambda a: tar_row(64, 1, a)),
    "tar loader, 224 px, 2 processes": (">= 2", "webdataset", lambda a: tar_row(224, 2, a)),
    "tar loader, 224 px, bare loop": (">= 0.8", None, lambda a: bare_row(224, a)),
    "index of new tars, 1 rank": (">= 100,000/s", None, lambda a: index_row(1, a)),
    "index of new tars, 4 ranks": (">= 100,000/s", None, lambda a: index_row(4, a)),
    "boundary at 10 M, full epoch": ("< 1.2 s, 900 MB", None, lambda a: boundary_row(10**7, True, a)),
    "boundary at 10 M, mutation": ("< 1.2 s, 900 MB", None, lambda a: boundary_row(10**7, False, a)),
    "boundary at 400 M, full epoch": ("< 60 s, 5 GB", None, lambda a: boundary_row(4 * 10**8, True, a)),
    "boundary at 400 M, mutation": ("< 60 s, 5 GB", None, lambda a: boundary_row(4 * 10**8, False, a)),
    "a run: time saved / samples saved": (">= 0.97", None, saving_row),
    "two ranks, MoCo": (">= 1", None, lambda a: ranks_row("moco_vit_tiny", a)),
    "two ranks, CLIP": (">= 1", None, lambda a: ranks_row("vit_tiny", a)),
    "GPU step, 20 of 77": (">= 1.5, 5,000/s", "GPU open_clip", lambda a: clip_row(20, False, a, True)),
    "GPU step, 77 tokens": (">= 1.5, 5,000/s", "GPU open_clip", lambda a: clip_row(77, False, a, True)),
    "GPU compiled step, 20 of 77": (">= 1.1", "GPU open_clip", lambda a: clip_row(20, True, a, True)),
    "GPU compiled step, 77 tokens": (">= 1.1", "GPU open_clip", lambda a: clip_row(77, True, a, True)),
    "GPU, ours compiled, open_clip not": (
        ">= 1.5, 5,000/s",
        "GPU open_clip",
        lambda a: clip_row(77, True, a, on_gpu=True, peer_compiled=False),
    ),
    "GPU step vit_b32, from tars": ("", "GPU", gpu_clip_from_tars),
    "GPU MoCo ViT-S/16, in memory": (">= 2, 2,500/s", "GPU", lambda a: gpu_moco_row(False, False, a)),
    "GPU MoCo ViT-S/16, from tars": (">= 2, 2,500/s", "GPU", lambda a: gpu_moco_row(True, False, a)),
    "GPU MoCo ViT-S/16, compiled": (">= 2, 2,500/s", "GPU", lambda a: gpu_moco_row(False, True, a)),
}


def peers(args):
    print("| row | ours | peer | ours / peer | goal |\n|---|---|---|---|---|")
    for name, (goal, needs, row) in ROWS.items():
        if args.only and not any(part in name for part in args.only):
            continue
        ours, theirs, ratio = "not measured", "", float("nan")
        missing = [
            x for x in (needs or "").split() if not (GPU if x == "GPU" else importlib.util.find_spec(x))
        ]
        if missing:
            ours += f" (no {' or '.join(missing)})"
        else:
            try:
                ours, theirs, ratio = row(args)
            except Exception as error:  # the other rows are still wanted
                ours += f" ({type(error).__name__}: {' '.join(str(error).split())[-200:]})"
        print(
            f"| {name} | {ours} | {theirs} | {'' if ratio != ratio else f'{ratio:.2f}'} | {goal} |",
            flush=True,
        )
        if GPU:
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- the rehearsal


class Pretend(data.Source):
    """Says that it is as long as asked for; behind it are the same shards, again and again."""

    def __init__(self, source, length):
        self.source, self.length = source, length

    def __len__(self):
        return self.length

    def image(self, i, draft=None):
        return self.source.image(i % len(self.source), draft)

    def caption(self, i):
        return self.source.caption(i % len(self.source))

    def where(self, i):
        return self.source.where(i % len(self.source))

    def fingerprint(self):
        return self.source.fingerprint()


def of_process(pid):
    """Resident MB of a process: all of it, and its share of what it has in common with others."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 1024 for name in ("Rss", "Pss"))


def _rehearse(paths, length, folder, workers, rounds):
    """Loads the same files under the first, the middle and the last ids, with a Scan of that size beside."""
    torch.set_num_threads(1)
    source = data.open_source("::".join(paths))
    real, count = len(source), min(len(source), 6400)
    scan = Scan(length)  # the loading processes are forked from a process that holds this
    dataset = data.Pairs(Pretend(source, length), WORDS, 64)
    starts = [0, length // 2 // real * real, (length // real - 1) * real]
    chosen = torch.randperm(real)[: count // 64 * 64].view(-1, 64)
    batches = []
    loader = our_loader(dataset, batches, workers)

    def load(start):
        batches[:] = (start + chosen).tolist()
        return functools.partial(sum, (len(batch[0]) for batch in loader))

    rates = {start: [] for start in starts}
    for turn in range(rounds + 1):
        for start in starts:
            rates[start] += [chosen.numel() / seconds_of(load(start))] if turn else []
            if turn == 0:
                load(start)()
    processes = [tuple(of_process(worker.pid)) for worker in loader._iterator._workers] if workers else []
    ratio = statistics.median(last / first for first, last in zip(rates[starts[0]], rates[starts[-1]]))
    train.end_loading()
    return [statistics.median(rates[start]) for start in starts], ratio, processes, scan.num_samples


def scale(args):
    images = pictures(200, (80, 64))
    print(f"shards    {args.samples:,} real samples in {args.folder}/scale", flush=True)
    paths = write_shards(args.folder / "scale", max(1, args.samples // 10_000), 10_000, images)
    with tempfile.TemporaryDirectory() as cache:
        began, ended, samples = alone(_open, "::".join(paths), cache, 0, 1)
    print(f"indexing  {samples / (ended - began):,.0f} samples/s in one process", flush=True)
    for length in args.lengths:
        options = paths, length, str(args.folder), args.workers, args.rounds
        rates, ratio, processes, _ = alone(_rehearse, *options)
        print(f"\n{length:,} samples", flush=True)
        print("loader    {:,.0f}, {:,.0f}, {:,.0f} samples/s at the first, middle, last ids".format(*rates))
        print(f"          last / first {ratio:.2f} (at least 0.95)")
        for resident, share in processes:
            print(f"          a loading process: {resident:,.0f} MB resident, its share {share:,.0f} MB")
        for full in (True, False):
            taken = alone(boundary, length, str(args.folder), full)
            print(f"boundary  into {'a preparation' if full else 'a mutation'} epoch", flush=True)
            for name in ("draw", "first batch", "check", "shuffle", "end", "checkpoint", "resume"):
                print(
                    f"  {name:<12}{taken[name]:8.2f} s   peak so far {taken[name + ', MB']:8,.0f} MB",
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["peers", "scale"])
    parser.add_argument("--only", nargs="+", help="rows with one of these in their name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU (2)")
    parser.add_argument("--batch", type=int, default=16, help="of the steps on the CPU (16)")
    parser.add_argument("--gpu-batch", type=int, default=800, help="of CLIP's steps on a GPU (800)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench"), help="of the shards that it writes"
    )
    parser.add_argument("--samples", type=int, default=200_000, help="scale: real ones (200,000)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[10**7, 4 * 10**8], help="scale: pretended")
    parser.add_argument("--workers", type=int, default=2, help="scale: loading processes (2)")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if GPU else f"no GPU, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {where}, load of the machine {os.getloadavg()[0]:.1f}\n", flush=True)
    {"peers": peers, "scale": scale}[args.command](args)


if __name__ == "__main__":
    main()
