"""Evaluate CLIP and MoCo models: checkpoints of train.py, or state dicts of open_clip, timm and MoCo v3.

    python eval.py zeroshot  --checkpoint runs/x/last.pt                          # the built-in shapes
    python eval.py zeroshot  --checkpoint runs/x/last.pt --data imagenet/val      # class folders
    python eval.py retrieval --checkpoint runs/x/last.pt --data 'val-{00000..00003}.tar'
    python eval.py knn       --checkpoint runs/x/last.pt --data imagenet --val-data imagenet
    python eval.py linear    --checkpoint runs/x/last.pt --data cifar10:data --val-data cifar10:data
    torchrun --nproc_per_node 8 eval.py finetune --checkpoint runs/x/last.pt --data imagenet \\
        --val-data imagenet --test-data imagenetv2 imagenet-r                     # any command runs on ranks
    python eval.py export    --checkpoint runs/x/last.pt --out weights.pt         # for open_clip or timm
    python eval.py coreset   runs/a runs/b --prune 0.3 --out kept.npy             # Sect. 4.3

Prints a table and, as its last line, one JSON object: shares (not percent), and n, the images evaluated.
"balanced" is the mean over classes of the share found. Class folders may be ImageNet's 1000 wnids, those 200
of ImageNet-R (then only these are ranked), or the numbers of ImageNet-V2. Weights from elsewhere need --arch,
CLIP's for text also their vocabulary --vocab, and OpenAI's own --quick-gelu.
"""

import argparse
import json
import math
import os
import re
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import v2

import clip_model
import data
import moco
from data import DataError
from scan import ScanSampler, coreset, pruned_set

# wise-ft's for CLIP, DeiT's (but no stochastic depth) for MoCo, MoCo v3's linear protocol. batch: global.
FINETUNE_CLIP = dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, warmup=500)  # warmup: in steps
FINETUNE_MOCO = dict(epochs=150, batch_size=1024, lr=1e-3, wd=0.05, warmup=None)  # None: 5 epochs
LINEAR_SGD = dict(epochs=90, batch_size=1024, lr=12.0, wd=0.0, warmup=0)


class EvalError(Exception):
    """One line for the user."""


# ---------------------------------------------------------------- models


def tokenizer_for(vocab):
    """CLIP's byte-pair encoding from a file; hashed words without one, or for "hashed"."""
    return data.BPE(vocab) if vocab and vocab != "hashed" else data.HashedWords()


def load_checkpoint(path):
    """A dict of tensors and plain values: nothing in the file is executed, and damage to it is noticed."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # what torch goes by
        if zipped:
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch writes checksums, but does not look at them
                    raise ValueError("a checksum is wrong")
                if any(entry.external_attr & 0x10 for entry in file.infolist()):
                    raise ValueError("a tensor is marked as a folder")  # torch would leave it unset
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise EvalError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # whatever torch and zipfile make of damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise EvalError(
            f"{path}: not a whole checkpoint that loads with weights_only=True ({reason})"
        ) from None
    if not isinstance(checkpoint, dict):
        raise EvalError(f"{path}: holds no state dict")
    return checkpoint


def load_model(path, arch=None, vocab=None, image_size=None, quick_gelu=False, text=True):
    """-> (model in eval mode, tokenizer or None), from train.py, open_clip, timm's ViT or MoCo v3's own code.

    text: whether captions will be encoded, and the tokenizer must be known.
    """
    checkpoint = load_checkpoint(path)
    ours = {"model", "args", "tokenizer"} <= set(checkpoint)
    if ours:
        weights, args = checkpoint["model"], checkpoint["args"]
        arch, image_size = args["arch"], args["image_size"]
    elif arch:
        weights = {k.removeprefix("module."): v for k, v in checkpoint.get("state_dict", checkpoint).items()}
        image_size = image_size or 224
    else:
        raise EvalError(f"{path}: not a checkpoint of train.py; for a state dict of others give its --arch")
    try:
        if arch in moco.ARCHS:
            model, tokenizer = moco.create(arch, image_size), None
            if not any(k.startswith("base_encoder.") for k in weights):  # timm's ViT: a backbone alone
                own = model.state_dict()
                weights = {f"base_encoder.{k}": v for k, v in weights.items() if not k.startswith("head.")}
                weights |= {
                    k: v for k, v in own.items() if ".head." in k or not k.startswith("base_encoder.")
                }
        else:
            tokenizer = _tokenizer(path, checkpoint["tokenizer"] if ours else None, vocab) if text else None
            size = tokenizer.vocab_size if text else len(weights["token_embedding.weight"])
            model = clip_model.create(arch, image_size, size, quick_gelu=quick_gelu)
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise EvalError(f"{path}: its weights do not fit {arch} at {image_size} px ({reason})") from None
    return model.eval(), tokenizer


def _tokenizer(path, trained_with, vocab):
    if trained_with is None and not vocab:  # nothing in an open_clip state dict says what its tokens are
        raise EvalError(
            f"{path}: an open_clip state dict needs --vocab (or --vocab hashed, if exported from here)"
        )
    tokenizer = tokenizer_for(vocab)
    if trained_with not in (None, tokenizer.name):
        raise EvalError(
            f"{path} was trained with the tokenizer {trained_with!r}, not {tokenizer.name!r}: "
            + ("give its --vocab" if trained_with.startswith("bpe") else "leave --vocab out")
        )
    return tokenizer


def encoder(model):
    """What gives (b, d) features of normalised images, before any normalisation of their length."""
    return model.features if isinstance(model, moco.MoCo) else model.encode_image


# ---------------------------------------------------------------- features


def _ranks():
    return (
        (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    )


def progress(text):
    """A line that overwrites itself, on a terminal, of rank 0."""
    if _ranks()[0] == 0 and sys.stderr.isatty():
        print(f"\r{text:<78}", end="" if text else "\r", file=sys.stderr, flush=True)


@torch.no_grad()
def image_features(model, source, device, *, encode=None, ids=None, batch_size=256, workers=0):
    """(len(ids), d) float32 features of a source's pictures (ids: all), on the CPU; ranks share the work."""
    encode = encode or encoder(model)
    rank, world = _ranks()
    ids = range(len(source)) if ids is None else ids
    pictures = data.Pictures(source, data.eval_transform(model.image_size))
    pin = device.type == "cuda"
    loader = DataLoader(pictures, batch_size, sampler=ids[rank::world], num_workers=workers, pin_memory=pin)
    parts = []
    for _, images in loader:
        images = data.normalize(images.to(device, non_blocking=True), model.mean_std)
        parts.append(encode(images).float())
        progress(f"images {min(world * batch_size * len(parts), len(ids)):,} / {len(ids):,}")
    progress("")
    return _interleave(torch.cat(parts) if parts else None, len(ids), device)


def _interleave(features, n, device):
    """Rows rank::world of each rank -> all n rows, on the CPU of every rank."""
    rank, world = _ranks()
    if world == 1:
        return features.cpu()
    width = torch.tensor(0 if features is None else features.shape[1], device=device)
    dist.all_reduce(width, dist.ReduceOp.MAX)  # a rank may have no picture at all
    padded = torch.zeros(-(-n // world), int(width), device=device)
    if features is not None:
        padded[: len(features)] = features
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.stack(gathered, 1).flatten(0, 1)[:n].cpu()


@torch.no_grad()
def text_features(model, tokenizer, texts, device, batch_size=256):
    """Unit features (len(texts), d), float32, on the CPU."""
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = data.pad([tokenizer(text) for text in texts[start : start + batch_size]])
        parts.append(F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1).cpu())
        progress(f"texts {min(start + batch_size, len(texts)):,} / {len(texts):,}")
    progress("")
    return torch.cat(parts)


# ---------------------------------------------------------------- classes


def class_labels(source, folders):
    """Labels (N,) of a source among classes known by their `folders` -> (labels, classes to rank or None).

    Numbers as folder names are positions (ImageNet-V2). A source with some of the wnids only (ImageNet-R) is
    ranked among these.
    """
    if source.labels is None:
        raise EvalError("the data have no classes: use class folders, or name their --label-key")
    if source.classes == folders:
        return torch.as_tensor(source.labels), None
    position = {name: k for k, name in enumerate(folders)}
    if all(name.isdecimal() for name in source.classes) and not set(source.classes) <= set(folders):
        position = {name: int(name) for name in source.classes if int(name) < len(folders)}
    unknown = [name for name in source.classes if name not in position]
    if unknown:
        raise EvalError(f"class {unknown[0]!r} of the data is none of the {len(folders)} classes known")
    mine = torch.tensor([position[name] for name in source.classes])
    some_wnids = all(_WNID.fullmatch(name) for name in source.classes)
    return mine[torch.as_tensor(source.labels)], mine if some_wnids else None


_WNID = re.compile(r"n\d{8}")


def zeroshot_classes(source, classnames=None, wnids=None):
    """--classnames and --wnids -> (names to describe the classes by, folders that they are known by)."""
    folders = wnids or source.classes
    numbers = all(name.isdecimal() for name in folders)
    are_wnids = all(_WNID.fullmatch(name) for name in folders)
    if classnames is None and not numbers and not (are_wnids and len(folders) == 1000):
        if are_wnids:
            raise EvalError(f"{len(folders)} wnids: give the order of all 1000 with --wnids, or --classnames")
        return folders, folders
    if classnames is None and numbers:
        raise EvalError("the class folders are numbers: give --classnames (imagenet, for ImageNet-V2)")
    names = classnames
    if classnames in (None, "imagenet"):
        names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    if numbers:
        return names, [str(k) for k in range(len(names))]
    if len(names) != len(folders):
        hint = "; give the order of all wnids with --wnids" if are_wnids and not wnids else ""
        raise EvalError(f"--classnames has {len(names)} names, for {len(folders)} classes{hint}")
    return names, folders


def accuracy(scores, labels, ranked=None):
    """(N, classes) scores -> top-1, top-5 and balanced accuracy, n. ranked: the only classes that may win."""
    if ranked is not None:
        scores = torch.full_like(scores, -math.inf).index_copy_(1, ranked, scores[:, ranked])
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # (N, 5)
    per_class = [hits[labels == label, 0].double().mean() for label in labels.unique()]
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "balanced": torch.stack(per_class).mean().item(),
        "n": len(labels),
    }


# ---------------------------------------------------------------- protocols


def zeroshot_classifier(model, tokenizer, classes, templates, device):
    """(classes, d) unit vectors: per class the mean of its prompts' unit embeddings."""
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    per_class = text_features(model, tokenizer, prompts, device).view(len(classes), len(templates), -1)
    return F.normalize(per_class.mean(1), dim=-1)


def zeroshot(model, tokenizer, source, device, *, classes=None, folders=None, templates=None, **loading):
    """Accuracy of the classes whose averaged prompt embeddings are nearest -> dict of shares."""
    labels, ranked = class_labels(source, folders or source.classes)
    templates = templates or getattr(source, "templates", ["a photo of a {}."])
    classifier = zeroshot_classifier(model, tokenizer, classes or source.classes, templates, device)
    images = F.normalize(image_features(model, source, device, **loading), dim=-1)
    return accuracy(images @ classifier.T, labels, ranked)


def retrieval(model, tokenizer, source, device, *, split_captions=False, chunk=1024, **loading):
    """Recall at 1, 5, 10 in both directions, in chunks -> dict of shares.

    An image may have several captions: rows of a CSV with the same path, and with split_captions the lines of
    a caption. A query hits at k if any of its partners is among the k nearest.
    """
    firsts, image_of = source.same_images() if hasattr(source, "same_images") else (None, range(len(source)))
    texts, owners = [], []
    for i, owner in enumerate(image_of):
        try:
            caption = source.caption(i)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{source.where(i)}: no caption ({error})") from None
        lines = [line for line in caption.splitlines() if line.strip()] if split_captions else [caption]
        texts += lines
        owners += [owner] * len(lines)
    owners = torch.tensor(owners)
    images = F.normalize(image_features(model, source, device, ids=firsts, **loading), dim=-1)
    texts = text_features(model, tokenizer, texts, device)
    of_image, result = torch.arange(len(images)), {}
    for name, queries, keys, mine, theirs in (
        ("i2t", images, texts, of_image, owners),
        ("t2i", texts, images, owners, of_image),
    ):
        found = torch.cat([(q @ keys.T).topk(min(10, len(keys))).indices for q in queries.split(chunk)])
        hits = theirs[found] == mine[:, None]  # (N, 10)
        result |= {f"{name}_r{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}
    return result | {"n": len(images)}


def knn(model, train, test, device, *, k=20, temperature=0.07, most=None, **loading):
    """Nearest neighbours by cosine, each voting with exp(cosine / temperature) -> dict of shares.

    most: use about so many training pictures, evenly spaced.
    """
    ids = range(0, len(train), -(-len(train) // most) if most else 1)
    bank_labels = torch.as_tensor(train.labels)[ids]
    labels, ranked = class_labels(test, train.classes)
    bank = F.normalize(image_features(model, train, device, ids=ids, **loading), dim=-1).to(device)
    queries, scores = F.normalize(image_features(model, test, device, **loading), dim=-1), []
    for part in queries.split(max(1, 2**27 // len(bank))):
        cosine, nearest = (part.to(device) @ bank.T).topk(min(k, len(bank)))  # (b, k)
        votes = torch.zeros(len(part), len(train.classes), device=device)
        scores.append(
            votes.scatter_add_(1, bank_labels.to(device)[nearest], (cosine / temperature).exp()).cpu()
        )
    return accuracy(torch.cat(scores), labels, ranked)


def linear(model, train, test, device, **loading):
    """Logistic regression (L-BFGS) on frozen features of centre crops -> dict of shares.

    The strength of its L2 penalty is chosen on a tenth of the training data; then all of it is used.
    """
    y = torch.as_tensor(train.labels, device=device)
    labels, ranked = class_labels(test, train.classes)
    x, z = (image_features(model, source, device, **loading).to(device) for source in (train, test))
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / std, (z - mean) / std
    held_out = torch.zeros(len(x), dtype=torch.bool, device=device)
    held_out[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: max(1, len(x) // 10)]] = (
        True
    )
    tried = {}
    for penalty in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        progress(f"logistic regression, penalty {penalty:g}")
        probe = _logistic_regression(x[~held_out], y[~held_out], len(train.classes), penalty)
        tried[penalty] = (probe(x[held_out]).argmax(1) == y[held_out]).double().mean().item()
    best = max(tried, key=tried.get)
    progress("")
    probe = _logistic_regression(x, y, len(train.classes), best)
    return accuracy(probe(z).cpu(), labels, ranked) | {"penalty": best}


def _logistic_regression(x, y, classes, penalty, steps=200):
    probe = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(probe(x), y) + penalty / 2 * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe.requires_grad_(False)


# ---------------------------------------------------------------- training a classifier


class Classifier(nn.Module):
    """A model's image tower and a linear head; on CLIP's unit vectors, as its zero-shot weights expect."""

    def __init__(self, model, classes, frozen, zeroshot_head=None):
        super().__init__()
        self.model, self.frozen, self.unit = model, frozen, zeroshot_head is not None
        archs = moco.ARCHS if model.arch in moco.ARCHS else clip_model.ARCHS
        self.head = nn.Linear(archs[model.arch].get("width") or archs[model.arch]["embed_dim"], classes)
        nn.init.normal_(self.head.weight, std=0.01), nn.init.zeros_(self.head.bias)
        if self.unit:
            self.head.weight.data.copy_(zeroshot_head)
        model.requires_grad_(False)  # but the image tower, without MoCo's projector
        if not frozen and model.arch in moco.ARCHS:
            model.base_encoder.requires_grad_(True).head.requires_grad_(False)
        elif not frozen:
            model.visual.requires_grad_(True)

    def train(self, mode=True):
        super().train(mode)
        self.model.train(mode and not self.frozen)
        return self

    def forward(self, images):
        x = encoder(self.model)(images)
        return self.head(F.normalize(x, dim=-1) if self.unit else x)


class Labelled(data.Samples):
    """Items (id, id that can't be read or -1, image, label), augmented by (seed, epoch, id)."""

    def __init__(self, source, transform, draft, seed):
        super().__init__(source, seed)
        self.transform, self.draft = transform, draft

    def read(self, i):
        return self.transform(self.source.image(i, self.draft)), int(self.source.labels[i])


def train_classifier(
    classifier, train, augment, device, *, epochs, batch_size, lr, wd, warmup, workers, seed=0
):
    """AdamW, or SGD for a frozen backbone, with a linear warm-up of `warmup` steps, then a cosine to 0.

    augment: "light" crops (CLIP's), "flip" (crops of 8 to 100 %, flips), or "deit" (these, RandAugment,
    random erasing, MixUp or CutMix, label smoothing).
    """
    rank, world = _ranks()
    size, smallest = classifier.model.image_size, 0.9 if augment == "light" else 0.08
    steps = [v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=v2.InterpolationMode.BICUBIC)]
    if augment != "light":
        steps += [v2.RandomHorizontalFlip()]
    if augment == "deit":
        steps += [v2.RandAugment(2, 9), v2.PILToTensor(), v2.RandomErasing(0.25)]
    else:
        steps += [v2.PILToTensor()]
    dataset = Labelled(train, v2.Compose(steps), math.ceil(size / math.sqrt(smallest)), seed)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(train.classes)),
                           v2.CutMix(alpha=1.0, num_classes=len(train.classes))])  # fmt: skip

    batch_size = min(batch_size, len(dataset)) // world * world
    if batch_size < 2:
        raise EvalError(f"{len(dataset)} samples are too few to train on with {world} rank(s)")
    sampler = ScanSampler(batch_size, rank, world, seed=seed)
    pin = device.type == "cuda"
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin
    )
    trained = [p for p in classifier.parameters() if p.requires_grad]
    if classifier.frozen:
        optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=wd)
    else:
        decay, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr)
    module = classifier
    if world > 1:
        module = DistributedDataParallel(classifier, device_ids=[device.index] if pin else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=pin and torch.cuda.is_bf16_supported())

    everything, per_epoch = torch.arange(len(dataset)), len(dataset) // batch_size
    step, total = 0, epochs * per_epoch
    warmup = min(5 * per_epoch if warmup is None else warmup, total // 5)  # short runs: at most a fifth
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch, everything)
        classifier.train()
        for _, _, images, labels in loader:
            done = max(step - warmup, 0) / max(total - warmup, 1)
            rate = lr * min(1, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(hash((seed, epoch, step, rank)) % 2**63)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            images = data.normalize(images, classifier.model.mean_std)
            if augment == "deit":
                images, labels = mix(images, labels)
            with autocast:
                logits = module(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1 if augment == "deit" else 0.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not classifier.frozen:
                nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            progress(f"epoch {epoch}/{epochs}  step {step:,}/{total:,}")
        if not math.isfinite(loss.item()):
            raise EvalError(f"loss not finite in epoch {epoch}: a lower --lr may help")
    progress("")


@torch.no_grad()
def classify(classifier, source, folders, device, **loading):
    """Accuracy of a trained classifier -> dict of shares."""
    labels, ranked = class_labels(source, folders)
    classifier.eval()
    return accuracy(
        image_features(classifier.model, source, device, encode=classifier, **loading), labels, ranked
    )


# ---------------------------------------------------------------- weights for others, and coresets


def export(model):
    """State dict under others' names: open_clip's for CLIP; timm's ViT, without a head, for MoCo."""
    if model.arch in moco.ARCHS:
        backbone = model.base_encoder.state_dict()
        return {name: weight for name, weight in backbone.items() if not name.startswith("head.")}
    return model.state_dict()


def make_coreset(runs, prune):
    """Run folders or checkpoints -> (kept ids, rows of the overlap table (Table 5))."""
    checkpoints = [
        load_checkpoint(os.path.join(run, "last.pt") if os.path.isdir(run) else run) for run in runs
    ]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        if not {"scan", "data"} <= set(checkpoint):
            raise EvalError(f"{run}: not a run of train.py")
        if checkpoint["data"] != checkpoints[0]["data"]:
            raise EvalError(f"{run} was trained on other data than {runs[0]}: no coreset of both")
        if not checkpoint["scan"]["counts"].any():
            raise EvalError(f"{run} has finished no preparation epoch: it says nothing about its samples yet")
    states = [checkpoint["scan"] for checkpoint in checkpoints]
    pruned = [pruned_set(state, prune) for state in states]

    def overlap(members):
        """IoU of the kept and of the pruned sets, each with what sets drawn at random would have."""
        row, left_out = {}, torch.stack([pruned[m] for m in members])
        for kind, share, sets in (("kept", 1 - prune, ~left_out), ("pruned", prune, left_out)):
            row[kind] = sets.all(0).sum().item() / max(sets.any(0).sum().item(), 1)
            row[f"{kind}_chance"] = share ** len(members) / max(1 - (1 - share) ** len(members), 1e-12)
        return row

    everyone = range(len(runs))
    groups = [(a, b) for a in everyone for b in everyone if a < b] + [tuple(everyone)] * (len(runs) > 2)
    return coreset(states, prune), [([runs[m] for m in group], overlap(group)) for group in groups]


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # rank 0 speaks for all, and torchrun then ends them
            self.exit(2)
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage before it


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "zeroshot": "CLIP: nearest prompt of each class",
        "retrieval": "CLIP: images by text and texts by image",
        "knn": "k-nearest-neighbour classifier on frozen features",
        "linear": "linear classifier on frozen features",
        "finetune": "train the image tower and a classifier",
        "export": "write weights for open_clip or timm",
        "coreset": "write the ids that a static coreset keeps",
    }
    p = {name: commands.add_parser(name, help=text, description=text) for name, text in about.items()}
    p["coreset"].add_argument(
        "runs", nargs="+", help="folders of runs over the same data, or their checkpoints"
    )
    p["coreset"].add_argument("--prune", type=float, required=True, help="share of the data to leave out")
    for name in about.keys() - {"coreset"}:
        add = p[name].add_argument
        add("--checkpoint", required=True, help="last.pt of a run, or a state dict of others")
        add("--arch", choices=[*clip_model.ARCHS, *moco.ARCHS], help="of a state dict of others")
        add("--image-size", type=int, help="of a state dict of others (224)")
        add("--quick-gelu", action="store_true", help="for OpenAI's own weights")
        add("--vocab", help="bpe_simple_vocab_16e6.txt.gz, if the model was trained with it")
    for name in ("zeroshot", "retrieval", "knn", "linear", "finetune"):
        add = p[name].add_argument
        add("--data", default="shapes" if name != "retrieval" else None, required=name == "retrieval")
        add("--img-key", default="filepath", help="column of a CSV")
        add("--caption-key", default="title", help="column of a CSV")
        add("--label-key", help="column of a CSV, or key in the .json of tar shards, with the class")
        add("--download", action="store_true", help="fetch CIFAR if it is missing")
        add("--batch-size", type=int, help="256, or what the protocol trains with (global)")
        add("--workers", type=int, default=min(8, os.cpu_count() or 1) - 1, help="loading processes per rank")
        add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in ("knn", "linear", "finetune"):
        p[name].add_argument("--val-data", help="what is classified (--data: what is learnt from)")
    for name in ("zeroshot", "finetune"):
        add = p[name].add_argument
        add(
            "--classnames",
            help='one a line, in the order of the classes, or "imagenet" (torchvision\'s names)',
        )
        add("--templates", help="one a line, {} for the name")
    for name in ("linear", "finetune"):
        add = p[name].add_argument
        add("--epochs", type=int)
        add("--lr", type=float, help="peak")
        add("--wd", type=float)
        add("--seed", type=int, default=0)
    p["zeroshot"].add_argument("--wnids", help="the 1000 in order: a file, one a line, or an ImageNet tree")
    p["retrieval"].add_argument("--split-captions", action="store_true", help="each line is a caption")
    p["knn"].add_argument("--k", type=int, default=20)
    p["linear"].add_argument(
        "--protocol", choices=["lbfgs", "sgd"], default="lbfgs", help="sgd: MoCo v3's, 90 augmented epochs"
    )
    p["finetune"].add_argument("--test-data", nargs="+", default=[], help="more to classify: ImageNet-V2, -R")
    for name in ("export", "coreset", "finetune"):
        p[name].add_argument("--out", required=name != "finetune", help="file to write")
    args = parser.parse_args(argv)

    def need(ok, flag, what):
        if not ok:
            parser.error(f"--{flag.replace('_', '-')} must be {what}, got {getattr(args, flag)}")

    given = {flag: value for flag, value in vars(args).items() if value is not None}
    for flag in given.keys() & {"batch_size", "k", "epochs", "image_size"}:
        need(1 <= given[flag] < 2**31, flag, "at least 1")
    for flag in given.keys() & {"workers", "seed"}:
        need(0 <= given[flag] < 2**63, flag, "at least 0")
    for flag in given.keys() & {"lr", "wd"}:
        need(0 <= given[flag] < math.inf, flag, "a finite number of at least 0")
    need(0 <= given.get("prune", 0) <= 1, "prune", "a share between 0 and 1")
    return args


def _lines(path, what):
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"--{what} {path}: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise EvalError(f"--{what} {path}: is empty")
    return lines


def _wnids(path):
    return data.Tree(path).classes if os.path.isdir(path) else _lines(path, "wnids")


def start_ranks(args):
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise EvalError(f"no GPU {local} here: start one rank per GPU, or use --device cpu")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def run(args):
    if args.command == "coreset":
        return run_coreset(args)
    text = args.command in ("zeroshot", "retrieval", "finetune")
    model, tokenizer = load_model(
        args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu, text=text
    )
    if args.command == "export":
        _write(args.out, lambda file: torch.save(export(model), file))
        return {"out": args.out, "tensors": len(export(model))}
    if tokenizer is None and args.command in ("zeroshot", "retrieval"):
        raise EvalError(f"{args.command} needs captions, which {model.arch} never learnt: use knn or linear")
    device = start_ranks(args)
    model.to(device)
    loading = dict(batch_size=args.batch_size or 256, workers=args.workers)

    def source(spec, train):
        keys = dict(image_key=args.img_key, caption_key=args.caption_key, label_key=args.label_key)
        opened = data.open_source(
            spec, train=train, size=model.image_size, captions=text, download=args.download, **keys
        )
        if args.command != "retrieval" and opened.labels is None:
            raise EvalError(f"{spec}: has no classes; use class folders, or name its --label-key")
        return opened

    if args.command == "retrieval":
        return retrieval(
            model, tokenizer, source(args.data, False), device, split_captions=args.split_captions, **loading
        )
    if args.command == "zeroshot":
        images, wnids = source(args.data, False), _wnids(args.wnids) if args.wnids else None
        classes, folders = zeroshot_classes(images, _classnames(args), wnids)
        names = dict(classes=classes, folders=folders, templates=_templates(args.templates))
        return zeroshot(model, tokenizer, images, device, **names, **loading)

    if args.val_data is None and not args.data.startswith("shapes"):
        raise EvalError("--val-data: say what to classify")
    train, test = source(args.data, True), source(args.val_data or "shapes", False)
    if args.command == "knn":
        return knn(model, train, test, device, k=args.k, **loading)
    if args.command == "linear" and args.protocol == "lbfgs":
        return linear(model, train, test, device, **loading)

    others = {spec: source(spec, False) for spec in getattr(args, "test_data", [])}
    return train_and_classify(args, model, tokenizer, train, test, others, device, loading)


def train_and_classify(args, model, tokenizer, train, test, others, device, loading):
    """Fine-tuning, or MoCo v3's linear protocol -> accuracy on `test`, and on `others` by name."""
    for images in (test, *others.values()):
        class_labels(images, train.classes)  # what does not fit is said now, not hours later
    out = getattr(args, "out", None)
    if out and not os.access(os.path.dirname(out) or ".", os.W_OK):
        raise EvalError(f"--out {out}: its folder cannot be written")
    head, frozen = None, args.command == "linear"
    if tokenizer is not None and not frozen:
        names, folders = zeroshot_classes(train, _classnames(args))
        classes = [names[folders.index(folder)] for folder in train.classes]
        templates = _templates(args.templates) or getattr(train, "templates", ["a photo of a {}."])
        head = zeroshot_classifier(model, tokenizer, classes, templates, device)
        head *= model.logit_scale.exp().item()
    recipe = LINEAR_SGD if frozen else FINETUNE_CLIP if tokenizer is not None else FINETUNE_MOCO
    given = {name: getattr(args, name) for name in recipe if getattr(args, name, None) is not None}
    batch = min(given.get("batch_size", recipe["batch_size"]), len(train))
    if tokenizer is None or frozen:  # these rates are for a batch of 1024
        recipe = recipe | {"lr": recipe["lr"] * batch / recipe["batch_size"]}
    torch.manual_seed(args.seed)
    classifier = Classifier(model, len(train.classes), frozen, head).to(device)
    augment = "flip" if frozen else "light" if tokenizer is not None else "deit"
    train_classifier(
        classifier, train, augment, device, workers=args.workers, seed=args.seed, **(recipe | given)
    )
    if out and _ranks()[0] == 0:
        state = export(model) | {f"head.{k}": v for k, v in classifier.head.state_dict().items()}
        _write(out, lambda file: torch.save(state, file))
    scores = {
        spec: classify(classifier, images, train.classes, device, **loading)
        for spec, images in {"": test, **others}.items()
    }
    result = scores.pop("")
    return result | ({"test": scores} if scores else {})


def run_coreset(args):
    kept, overlaps = make_coreset(args.runs, args.prune)
    _write(args.out, lambda file: np.save(file, kept.numpy()))
    print(f"{'overlap (IoU) of':<40} {'kept':>7} {'chance':>7} {'pruned':>7} {'chance':>7}")
    for runs, row in overlaps:
        name = " + ".join(runs) if len(runs) < 3 else f"all {len(runs)}"
        print(f"{name[-40:]:<40} " + " ".join(f"{value:7.3f}" for value in row.values()))
    overlap = [{"runs": runs} | {k: round(v, 4) for k, v in row.items()} for runs, row in overlaps]
    return {"out": args.out, "kept": len(kept), "prune": args.prune, "overlap": overlap}


def _classnames(args):
    return args.classnames if args.classnames in (None, "imagenet") else _lines(args.classnames, "classnames")


def _templates(path):
    if path is None:
        return None
    templates = _lines(path, "templates")
    if not all("{}" in template for template in templates):
        raise EvalError(f"--templates {path}: every line needs a {{}} for the class name")
    return templates


def _write(path, write):
    try:
        with open(path, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:
        raise EvalError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None


def _print_scores(result, indent="  "):
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_scores(value, indent + "  ")
        elif name == "n":
            print(f"{indent}{name:<9} {value:>9,}")
        else:
            print(f"{indent}{name:<9} {value:>9{'g' if name == 'penalty' else '.2%'}}")


def main(argv=None):
    args = parse_args(argv)
    try:
        result = run(args)
        if _ranks()[0] == 0:
            if args.command not in ("coreset", "export"):
                print(
                    f"{args.command} of {args.checkpoint} on {getattr(args, 'val_data', None) or args.data}"
                )
                _print_scores(result)
            print(json.dumps(result))
    except (EvalError, DataError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"eval.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
