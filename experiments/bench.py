"""Measure speed and memory beside open_clip and webdataset -> one table of ratios (1: equal, more: better).

    pip install open_clip_torch webdataset
    python experiments/bench.py                    # every row
    python experiments/bench.py --only loss tar    # only rows with one of these in their name

Both sides alternate; each figure is a median of --rounds. Peak memory is a fresh process's,
minus what it held before. A row whose package or GPU is missing says so.
"""

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
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
WORDS = clip_model.HashedWords()
NAN = math.nan  # a row without a peer has no ratio

# ---------------------------------------------------------------- measuring


def memory(name):
    """Memory of this process in MB (Linux). name: VmRSS, resident now; VmHWM, peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def alone(function, *args):
    """Call a function in a fresh process -> its result. A process that dies (out of memory) is an error."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def seconds_of(function, repeat=1):
    """Time `repeat` calls -> seconds per call."""
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    if GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def alternate(rounds, *functions, warm=1, repeat=1):
    """Time functions in turn -> median seconds of each, then the median of (last / first) over the rounds."""
    for _ in range(warm):
        for function in functions:
            seconds_of(function, repeat)
    times = np.array([[seconds_of(function, repeat) for function in functions] for _ in range(rounds)])
    return *np.median(times, axis=0), np.median(times[:, -1] / times[:, 0])


# ---------------------------------------------------------------- steps


def clip_batch(size, length, device):
    """-> pixels (b, 3, 224, 224) uint8 and tokens (b, length), the 77 tokens of CLIP without padding."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 49000, (size, length))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    pixels = torch.randint(256, (size, 3, 224, 224), dtype=torch.uint8)
    return (pixels.pin_memory(), tokens.pin_memory()) if device.type == "cuda" else (pixels, tokens)


def our_step(arch, batch, size, device, compiled):
    """-> train.py's own step, with `observe` in a preparation epoch. batch: what a loader gives."""
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
        inputs = model.inputs(batch, device)
        a, b, loss = model.losses(*train.forward(module, inputs, autocast))
        scan.observe(torch.randint(1_000_000, (size,)), a, b)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if tokenizer is not None:
            model.logit_scale.data.clamp_(0, np.log(100))

    return step


def open_clip_step(batch, device, compiled):
    """-> a step with open_clip's model, loss and settings; its loader gives normalised floats, 77 tokens."""
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


def clip_row(length, compiled, args, kind="cpu"):
    device = torch.device(kind)
    size, warm, repeat = (800, 3, 10) if kind == "cuda" else (args.batch, 1, 1)
    batch = clip_batch(size, length, device)
    ours = our_step("vit_b32", batch, size, device, compiled)
    theirs = open_clip_step(batch, device, compiled)
    mine, peer, ratio = alternate(args.rounds, ours, theirs, warm=warm, repeat=repeat)
    return f"{size / mine:,.1f}/s", f"{size / peer:,.1f}/s", ratio


def own_compile_row(length, args):
    device, batch = torch.device("cpu"), clip_batch(args.batch, length, torch.device("cpu"))
    steps = [our_step("vit_b32", batch, args.batch, device, on) for on in (True, False)]
    compiled, eager, ratio = alternate(args.rounds, *steps)
    return f"{args.batch / compiled:.1f}/s", f"{args.batch / eager:.1f}/s (ours, eager)", ratio


def gpu_moco_row(compiled, args):
    """moco_vit_s16, batch 600; decoded crops in memory, augmented on the GPU."""
    device, size = torch.device("cuda"), 600
    crops = torch.randint(256, (size, 2, 3, 224, 224), dtype=torch.uint8).pin_memory()
    numbers = torch.stack([moco.draw_views() for _ in range(size)])
    step = our_step("moco_vit_s16", (crops, numbers), size, device, compiled)
    second = alternate(args.rounds, step, warm=3, repeat=5)[0]
    return f"{size / second:,.0f}/s", "", NAN


# ---------------------------------------------------------------- the loss


def _loss(which, n, threads):
    """-> seconds, and MB above what was held, of both directions forward and backward."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if GPU else "cpu")
    scale = torch.tensor(14.3, requires_grad=True, device=device)
    if which == "peer":
        import open_clip

        peer = open_clip.ClipLoss()

    def loss(a, b):
        if which == "peer":
            return peer(a, b, scale)
        return ((info_nce(a, b, scale) + info_nce(b, a, scale)) / 2).mean()

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
    form = "{:.3f} s" if which == 0 else "{:,.0f} MB"
    if n > 20_000:  # ClipLoss would take some 70 GB
        return form.format(alone(_loss, "ours", n, args.threads)[which]), "not run", NAN
    rounds = range(args.rounds)
    runs = [[alone(_loss, name, n, args.threads)[which] for name in ("ours", "peer")] for _ in rounds]
    mine, peer = np.median(runs, axis=0)
    return form.format(mine), form.format(peer), np.median([b / a for a, b in runs])


def observe_row(stage, args):
    """Microseconds per step, including the GPU's own work."""
    device = torch.device("cuda" if GPU else "cpu")
    scan = Scan(1_000_000)
    scan.first_preparation = {"warm-up": None, "preparation": 0, "mutation": -1}[stage]
    scan.begin_epoch(0)
    ids = torch.randperm(1_000_000)[:800]
    a, b = torch.rand(2, 800, device=device)
    second = alternate(args.rounds, lambda: scan.observe(ids, a, b), repeat=200)[0]
    return f"{second * 1e6:.0f} us", "", NAN


# ---------------------------------------------------------------- loading


def pictures(kinds, sides):
    """-> JPEG bytes of `kinds` pictures with detail at every scale."""
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
    """Write tar files as webdataset does, unless they exist. images: JPEG bytes, used in turn."""
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
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=GPU)
    options |= dict(collate_fn=data.collate, worker_init_fn=train.start_worker)
    return DataLoader(dataset, batch_sampler=batches, **options)


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
    files = pictures(200, (500, 375))
    paths = write_shards(args.folder / "tars224", 4, 200, files)
    pairs = data.Pairs(data.open_source("::".join(paths)), WORDS, size)

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
    """Index new tars by several ranks of one machine."""
    folder = args.folder / "index"
    write_shards(folder, 24, 10_000, [bytes(2000)])
    rates = []
    for _ in range(args.rounds):
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(ranks, mp_context=context) as pool:
            list(pool.map(time.sleep, [1] * ranks))  # all have started
            tasks = [(f"{folder}/*.tar", cache, rank, ranks) for rank in range(ranks)]
            starts, ends, samples = np.array(list(pool.map(_open, *zip(*tasks)))).T
        rates.append(samples[0] / (ends.max() - starts.min()))
    return f"{statistics.median(rates):,.0f}/s", "", NAN


# ---------------------------------------------------------------- an epoch boundary


def boundary(n, folder, full, batch=4096):
    """-> {piece: seconds} of all that happens between two epochs, and {piece: peak MB}.

    full: whether the next epoch keeps all samples.
    """
    warnings.simplefilter("ignore")  # nothing is observed here
    path, taken, peak = Path(folder) / "boundary.pt", {}, {}
    before = memory("VmRSS")

    def timed(name, function):
        taken[name] = seconds_of(function)
        peak[name] = memory("VmHWM") - before

    scan = Scan(n)
    scan.first_preparation = 0
    scan.redundant.random_(0, 2)
    scan.epoch, scan.full_epochs = 3 if full else 0, 1
    sampler = ScanSampler(scan, batch, 0, 1)
    timed("draw", lambda: sampler.set_epoch(scan.epoch + 1))
    timed("order", lambda: next(iter(sampler)))
    timed("check", lambda: hashlib.sha256(scan.kept_mask.numpy()).digest())
    scan.observed = scan.num_kept
    timed("end", scan.end_epoch)
    timed("checkpoint", lambda: torch.save({"scan": scan.state_dict()}, path))
    timed("resume", lambda: scan.load_state_dict(evaluation.load_checkpoint(path)["scan"]))
    path.unlink()
    return taken, peak


def boundary_row(n, full, args):
    taken, peak = alone(boundary, n, str(args.folder), full)
    pieces = ", ".join(f"{name} {seconds:.1f}" for name, seconds in taken.items())
    between = taken["draw"] + taken["order"] + taken["check"] + taken["end"]
    memories = f"{peak['end']:,.0f} MB, with checkpoint {peak['checkpoint']:,.0f} MB"
    return f"{between:.1f} s, {memories} (seconds: {pieces})", "", NAN


# ---------------------------------------------------------------- ranks


def run_train(args, *flags, ranks=1, threads=1):
    """Run train.py on the CPU -> its log's records of epochs."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "train.py"]
        command += [*flags, "--out", out, "--device", "cpu", "--eval-every", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == "epoch"]


def ranks_row(arch, args):
    """Seconds per epoch: two ranks of one thread against one process of two threads."""
    flags = ["--arch", arch, "--data", "shapes:1024", "--epochs", "4", "--prune", "0"]

    def epoch(ranks, threads, workers):
        epochs = run_train(args, *flags, "--workers", str(workers), ranks=ranks, threads=threads)
        return statistics.median(r["seconds"] for r in epochs[1:])

    pairs = [(epoch(2, 1, 1), epoch(1, 2, 2)) for _ in range(min(args.rounds, 3))]
    two, one = np.median(pairs, axis=0)
    return f"{two:.2f} s", f"{one:.2f} s (one process)", np.median([b / a for a, b in pairs])


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
    "two ranks, MoCo": (">= 1", None, lambda a: ranks_row("moco_vit_tiny", a)),
    "two ranks, CLIP": (">= 1", None, lambda a: ranks_row("vit_tiny", a)),
    "GPU step vit_b32, 20 of 77": (">= 1.5", "GPU open_clip", lambda a: clip_row(20, False, a, "cuda")),
    "GPU step vit_b32, 77 tokens": (">= 1.5", "GPU open_clip", lambda a: clip_row(77, False, a, "cuda")),
    "GPU compiled step, 20 of 77": (">= 1.1", "GPU open_clip", lambda a: clip_row(20, True, a, "cuda")),
    "GPU compiled step, 77 tokens": (">= 1.1", "GPU open_clip", lambda a: clip_row(77, True, a, "cuda")),
    "GPU MoCo ViT-S/16, in memory": (">= 2,500/s", "GPU", lambda a: gpu_moco_row(False, a)),
    "GPU MoCo ViT-S/16, compiled": (">= 2,500/s", "GPU", lambda a: gpu_moco_row(True, a)),
}


def measure(name, args):
    """-> a row of the table."""
    goal, needs, row = ROWS[name]
    missing = []
    for need in (needs or "").split():
        if not (GPU if need == "GPU" else importlib.util.find_spec(need)):
            missing.append(need)
    if missing:
        return f"| {name} | not measured (no {' or '.join(missing)}) | | | {goal} |"
    try:
        ours, theirs, ratio = row(args)
    except Exception as error:  # the other rows are still wanted
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        return f"| {name} | not measured ({reason}) | | | {goal} |"
    return f"| {name} | {ours} | {theirs} | {'' if math.isnan(ratio) else f'{ratio:.2f}'} | {goal} |"


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", nargs="+", help="rows with one of these in their name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU (2)")
    parser.add_argument("--batch", type=int, default=16, help="of the steps on the CPU (16); on a GPU 800")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="for the shards it writes")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if GPU else f"no GPU, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {where}, load of the machine {os.getloadavg()[0]:.1f}\n")
    print("| row | ours | peer | ours / peer | goal |\n|---|---|---|---|---|")
    for name in ROWS:
        if args.only is None or any(part in name for part in args.only):
            print(measure(name, args), flush=True)
            if GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
