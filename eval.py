"""Evaluate CLIP and MoCo models: runs of train.py, or state dicts of open_clip, timm and MoCo v3.

    python eval.py zeroshot  --checkpoint runs/x                                  # the built-in shapes
    python eval.py zeroshot  --checkpoint runs/x --data imagenet/val              # class folders
    python eval.py retrieval --checkpoint runs/x --data 'val-{00000..00003}.tar'
    python eval.py knn       --checkpoint runs/x --data imagenet --val-data imagenet
    python eval.py linear    --checkpoint runs/x --data cifar10:data --val-data cifar10:data
    torchrun --nproc_per_node 8 eval.py finetune --checkpoint runs/x --data imagenet \\
        --val-data imagenet --test-data imagenetv2 imagenet-r                     # any command runs on ranks
    python eval.py export    --checkpoint runs/x --out weights.pt                 # for open_clip or timm
    python eval.py coreset   runs/a runs/b --prune 0.3 --out kept.npy             # Sect. 4.3
    python eval.py suspects  runs/x --out suspects.csv                            # of one's own data

Prints a table and, as its last line, one JSON object: shares (not percent), and n, the images evaluated.
"balanced" is the mean over classes of the share found. Class folders may be ImageNet's 1000 wnids, those 200
of ImageNet-R (then only these are ranked), or the numbers of ImageNet-V2. Weights from elsewhere need --arch,
CLIP's for text also their vocabulary --vocab, and OpenAI's own --quick-gelu.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import InterpolationMode, v2

import clip_model
import data
import moco
from data import UserError
from scan import coreset, pruned_set

# batch_size: global. lr: the peak, in MoCo's two for that batch size.
RECIPES = {
    "wise-ft": dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1),  # CLIP
    "deit": dict(epochs=150, batch_size=1024, lr=1e-3, wd=0.05),  # MoCo v3's, but no stochastic depth
    "sgd": dict(epochs=90, batch_size=1024, lr=12.0, wd=0.0),  # MoCo v3's linear protocol
}
# MoCo v3's linear protocol looks at 224 of 256 pixels, whatever the model; torchvision's resize, bilinear
LINCLS_LOOK = dict(crop=moco.MoCo.eval_crop, interpolation=InterpolationMode.BILINEAR)
TIMEOUT = timedelta(minutes=30)  # how long ranks wait for one that is gone without a word


# ---------------------------------------------------------------- models


def tokenizer_for(vocab):
    """CLIP's byte-pair encoding from a file; hashed words without one, or for "hashed"."""
    if not vocab or vocab == "hashed":
        return clip_model.HashedWords()
    try:
        return clip_model.BPE(vocab)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_checkpoint(path):
    """A dict of tensors and plain values, of a file or of a run's folder.

    Nothing in the file is executed, and damage to it is noticed.
    """
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch writes checksums, but does not look at them
                    raise ValueError("a checksum is wrong")
                if any(entry.external_attr & 0x10 for entry in file.infolist()):
                    raise ValueError("a tensor is marked as a folder")  # torch would leave it unset
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # whatever torch and zipfile make of damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        not_whole = "not a whole checkpoint that loads with weights_only=True"
        raise UserError(f"{path}: {not_whole} ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds no state dict")
    return checkpoint


def load_model(path, arch=None, vocab=None, image_size=None, quick_gelu=False, text=True):
    """-> (model in eval mode, tokenizer or None), from train.py, open_clip, timm's ViT or MoCo v3's own code.

    text: whether captions will be encoded, and the tokenizer must be known.
    """
    checkpoint, tokenizer = load_checkpoint(path), None
    if {"model", "args", "tokenizer"} <= set(checkpoint):
        arch, image_size = (checkpoint["args"].get(name) for name in ("arch", "image_size"))
    elif not arch:
        raise UserError(f"{path}: not a checkpoint of train.py; for a state dict of others give its --arch")
    try:
        if arch in moco.ARCHS:
            model = moco.create(arch, image_size or 224)
        else:
            if text:
                tokenizer = _tokenizer(path, checkpoint.get("tokenizer"), vocab)
            size = tokenizer.vocab_size if text else len(_weights(checkpoint)["token_embedding.weight"])
            model = clip_model.create(arch, image_size or 224, size, quick_gelu=quick_gelu)
    except (KeyError, ValueError) as error:
        reason = f"its weights do not fit {arch} (no {error})" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {reason}") from None
    load_weights(model, path, checkpoint)
    return model.eval(), tokenizer


def load_weights(model, path, checkpoint=None):
    """Start `model` from weights of train.py, open_clip, timm (of MoCo, the backbone) or MoCo v3.

    Returns the name of the tokenizer that they were trained with; None if nothing says so.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    weights = _weights(checkpoint)
    if isinstance(model, moco.MoCo) and not any(name.startswith("base_encoder.") for name in weights):
        # timm's ViT is the backbone alone: both encoders start from it, what is behind them as it is
        backbone = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
        weights = {k: v for k, v in model.state_dict().items() if ".head." in k or k.startswith("predictor.")}
        weights |= {f"{side}_encoder.{k}": v for side in ("base", "momentum") for k, v in backbone.items()}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        model = f"{model.arch} at {model.image_size} px"
        raise UserError(f"{path}: its weights do not fit {model} ({reason})") from None
    return checkpoint.get("tokenizer")


def _weights(checkpoint):
    """The state dict in a checkpoint, by its names in one process."""
    weights = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    weights = weights if isinstance(weights, dict) else {}
    return {str(name).removeprefix("module."): weight for name, weight in weights.items()}


def _tokenizer(path, trained_with, vocab):
    if trained_with is None and not vocab:  # nothing in an open_clip state dict says what its tokens are
        need = "needs --vocab (or --vocab hashed, if exported from here)"
        raise UserError(f"{path}: an open_clip state dict {need}")
    tokenizer = tokenizer_for(vocab)
    if trained_with not in (None, tokenizer.name):
        hint = "give its --vocab" if trained_with.startswith("bpe") else "leave --vocab out"
        said = f"was trained with the tokenizer {trained_with!r}, not {tokenizer.name!r}"
        raise UserError(f"{path} {said}: {hint}")
    return tokenizer


def encoder(model):
    """What gives (b, d) features of normalised images, before any normalisation of their length."""
    return model.features if isinstance(model, moco.MoCo) else model.encode_image


# ---------------------------------------------------------------- features


@torch.no_grad()
def image_features(model, source, device, *, encode=None, ids=None, look=None, batch_size=256, workers=0):
    """(len(ids), d) float32 features of a source's pictures (ids: all), on the CPU; ranks share the work.

    look: crop and interpolation of `data.eval_transform`, if not the model's crop, bicubic.
    """
    encode = encode or encoder(model)
    rank, world = _ranks()
    ids = range(len(source)) if ids is None else ids
    look = look or dict(crop=model.eval_crop, interpolation=InterpolationMode.BICUBIC)
    pictures = data.Pictures(source, data.eval_transform(model.image_size, **look))
    options = dict(num_workers=workers, pin_memory=device.type == "cuda")
    loader = DataLoader(pictures, batch_size, sampler=ids[rank::world], **options)
    parts = [torch.empty(0, device=device)]  # a rank may have no picture at all
    for done, (_, images) in enumerate(loader, 1):
        parts.append(encode(model.normalize(images.to(device, non_blocking=True))).float())
        progress(f"images {min(world * batch_size * done, len(ids)):,} / {len(ids):,}")
    progress("")
    mine = torch.cat(parts).cpu()
    if world == 1:
        return mine
    everyone = [None] * world
    dist.all_gather_object(everyone, mine)
    features = torch.empty(len(ids), *everyone[0].shape[1:])
    for k in range(min(world, len(ids))):
        features[k::world] = everyone[k]
    return features


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
    if source.classes == folders:
        return torch.as_tensor(source.labels), None
    position = {name: k for k, name in enumerate(folders)}
    if all(name.isdecimal() for name in source.classes) and not set(source.classes) <= set(folders):
        position = {name: int(name) for name in source.classes if int(name) < len(folders)}
    for name in source.classes:
        if name not in position:
            raise UserError(f"class {name!r} of the data is none of the {len(folders)} classes known")
    mine = torch.tensor([position[name] for name in source.classes])
    return mine[torch.as_tensor(source.labels)], mine if _are_wnids(source.classes) else None


def _are_wnids(names):
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def zeroshot_classes(source, classnames=None, wnids=None):
    """-> (names that describe the classes in prompts, folders that they are known by).

    classnames: a list in the order of the classes, "imagenet" for torchvision's names, or None: the folders'
    own names, but torchvision's for ImageNet's 1000 wnids. wnids: ImageNet's 1000, in order.
    """
    folders = wnids or source.classes
    numbers, are_wnids = all(name.isdecimal() for name in folders), _are_wnids(folders)
    if classnames is None and numbers:
        raise UserError("the classes are numbers: give --classnames (imagenet, for ImageNet-V2)")
    if classnames is None and are_wnids and len(folders) != 1000:
        raise UserError(f"{len(folders)} wnids: give the order of all 1000 with --wnids, or --classnames")
    names = classnames or folders
    if classnames == "imagenet" or classnames is None and are_wnids:
        names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    if numbers:
        folders = [str(k) for k in range(len(names))]
    if len(names) != len(folders):
        hint = "; give the order of all wnids with --wnids" if are_wnids and not wnids else ""
        raise UserError(f"--classnames has {len(names)} names, for {len(folders)} classes{hint}")
    return names, folders


def accuracy(scores, labels, ranked=None):
    """(N, classes) scores -> top-1, top-5 and balanced accuracy, n. ranked: the only classes that may win."""
    if ranked is not None:
        scores = torch.full_like(scores, -math.inf).index_copy_(1, ranked, scores[:, ranked])
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # (N, 5)
    seen = labels.bincount()
    per_class = labels.bincount(hits[:, 0].double())[seen > 0] / seen[seen > 0]
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "balanced": per_class.mean().item(),
        "n": len(labels),
    }


# ---------------------------------------------------------------- protocols that train nothing, or one layer


def zeroshot_classifier(model, tokenizer, source, names, templates, device):
    """(classes, d) unit vectors: per class the mean of its prompts' unit embeddings."""
    templates = templates or getattr(source, "templates", ["a photo of a {}."])
    prompts = [template.replace("{}", name) for name in names for template in templates]
    per_class = text_features(model, tokenizer, prompts, device).view(len(names), len(templates), -1)
    return F.normalize(per_class.mean(1), dim=-1)


def zeroshot(model, tokenizer, source, device, *, classnames=None, wnids=None, templates=None, **loading):
    """Accuracy of the classes whose averaged prompt embeddings are nearest -> dict of shares.

    classnames, wnids: of `zeroshot_classes`.
    """
    names, folders = zeroshot_classes(source, classnames, wnids)
    labels, ranked = class_labels(source, folders)
    classifier = zeroshot_classifier(model, tokenizer, source, names, templates, device)
    images = F.normalize(image_features(model, source, device, **loading), dim=-1)
    return {"protocol": "zero-shot"} | accuracy(images @ classifier.T, labels, ranked)


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
            raise UserError(f"{source.where(i)}: no caption ({error})") from None
        several = [line for line in caption.splitlines() if line.strip()] if split_captions else [caption]
        texts += several
        owners += [owner] * len(several)
    owners = torch.tensor(owners)
    images = F.normalize(image_features(model, source, device, ids=firsts, **loading), dim=-1)
    texts = text_features(model, tokenizer, texts, device)
    of_image, result = torch.arange(len(images)), {"protocol": "retrieval"}
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
    bank_labels = torch.as_tensor(train.labels)[ids].to(device)
    labels, ranked = class_labels(test, train.classes)
    bank = F.normalize(image_features(model, train, device, ids=ids, **loading), dim=-1).to(device)
    queries, scores = F.normalize(image_features(model, test, device, **loading), dim=-1), []
    for part in queries.split(max(1, 2**27 // len(bank))):
        cosine, nearest = (part.to(device) @ bank.T).topk(min(k, len(bank)))  # (b, k)
        votes = torch.zeros(len(part), len(train.classes), device=device)
        scores.append(votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp()).cpu())
    return {"protocol": "knn"} | accuracy(torch.cat(scores), labels, ranked)


def linear(model, train, test, device, **loading):
    """Logistic regression (L-BFGS) on frozen features of centre crops -> dict of shares.

    The strength of its L2 penalty is chosen on a tenth of the training data; then all of it is used.
    """
    y = torch.as_tensor(train.labels, device=device)
    labels, ranked = class_labels(test, train.classes)
    x, z = (image_features(model, source, device, **loading).to(device) for source in (train, test))
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / std, (z - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    tried = {}
    for penalty in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        progress(f"logistic regression, penalty {penalty:g}")
        probe = _logistic_regression(x[rest], y[rest], len(train.classes), penalty)
        tried[penalty] = (probe(x[held_out]).argmax(1) == y[held_out]).double().mean().item()
    best = max(tried, key=tried.get)
    progress("")
    probe = _logistic_regression(x, y, len(train.classes), best)
    return {"protocol": "linear"} | accuracy(probe(z).cpu(), labels, ranked) | {"penalty": best}


def _logistic_regression(x, y, classes, penalty, steps=200):
    probe = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(probe(x), y) + penalty / 2 * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe.requires_grad_(False)


# ---------------------------------------------------------------- protocols that train a classifier


class Classifier(nn.Module):
    """A model's image tower and a linear head; on CLIP's unit vectors, as its zero-shot weights expect."""

    def __init__(self, model, classes, frozen, zeroshot_head=None):
        super().__init__()
        self.model, self.frozen, self.unit = model, frozen, zeroshot_head is not None
        is_moco = isinstance(model, moco.MoCo)
        width = moco.ARCHS[model.arch]["width"] if is_moco else clip_model.ARCHS[model.arch]["embed_dim"]
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if self.unit:
            self.head.weight.data.copy_(zeroshot_head)
        model.requires_grad_(False)  # but the image tower, without MoCo's projector
        if not frozen and is_moco:
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


def augmentation(protocol, size):
    """-> (picture -> (3, size, size) uint8, the edge that a picture's shorter side must keep in decoding)."""
    how = InterpolationMode.BILINEAR if protocol == "sgd" else InterpolationMode.BICUBIC
    smallest = 0.9 if protocol == "wise-ft" else 0.08
    steps = [v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=how)]
    if protocol != "wise-ft":
        steps += [v2.RandomHorizontalFlip()]
    if protocol == "deit":
        steps += [v2.RandAugment(2, 9)]
    steps += [v2.PILToTensor()]
    if protocol == "deit":
        steps += [v2.RandomErasing(0.25)]
    return v2.Compose(steps), math.ceil(size / math.sqrt(smallest))


def decays(name, parameter):
    """Whether weight decay is for it: DeiT spares the class token and the positions, open_clip all biases."""
    return parameter.ndim > 1 and "bias" not in name and not name.endswith(("cls_token", "pos_embed"))


def make_optimizer(classifier, protocol, lr, wd):
    trained = [(name, p) for name, p in classifier.named_parameters() if p.requires_grad]
    if protocol == "sgd":
        return torch.optim.SGD([p for _, p in trained], lr, momentum=0.9, weight_decay=wd)
    decay, others = ([p for name, p in trained if decays(name, p) == which] for which in (True, False))
    groups = [{"params": decay, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr)


def learning_rate(protocol, step, per_epoch, epochs, lr):
    """Cosine to 0, after a linear warm-up; MoCo v3's linear protocol has none, and steps once an epoch."""
    if protocol == "sgd":
        step = step // per_epoch * per_epoch
    total = epochs * per_epoch
    warmup = {"wise-ft": 500, "deit": 5 * per_epoch, "sgd": 0}[protocol]
    warmup = min(warmup, total // 5)  # short runs: at most a fifth
    done = max(step - warmup, 0) / max(total - warmup, 1)
    return lr * min(1, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * done)) / 2


def train_classifier(classifier, train, protocol, device, *, epochs, batch_size, lr, wd, workers, seed=0):
    """Train in place. protocol: of RECIPES. DeiT's adds MixUp or CutMix, and smooths the labels."""
    rank, world = _ranks()
    dataset = Labelled(train, *augmentation(protocol, classifier.model.image_size), seed)
    batch_size = min(batch_size, len(dataset)) // world
    if batch_size * world < 2:
        raise UserError(f"{len(dataset)} samples are too few to train on with {world} rank(s)")
    deit, cuda, whole = protocol == "deit", device.type == "cuda", protocol != "sgd"
    sampler = DistributedSampler(dataset, world, rank, seed=seed, drop_last=whole)
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=cuda)
    loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=whole, **options)
    mixes = [(v2.MixUp, 0.8), (v2.CutMix, 1.0)]
    mix = v2.RandomChoice([kind(alpha=alpha, num_classes=len(train.classes)) for kind, alpha in mixes])
    optimizer, module = make_optimizer(classifier, protocol, lr, wd), classifier
    if world > 1:
        module = DistributedDataParallel(classifier, device_ids=[device.index] if cuda else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision("auto", device) == "bf16")

    torch.manual_seed(hash((seed, rank)) % 2**63)  # of MixUp, CutMix and stochastic depth
    for epoch in range(epochs):
        began, losses = time.monotonic(), torch.zeros((), device=device)
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        classifier.train()
        for step, (_, _, images, labels) in enumerate(loader):
            rate = learning_rate(protocol, epoch * len(loader) + step, len(loader), epochs, lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            images = classifier.model.normalize(images)
            if deit:
                images, labels = mix(images, labels)
            with autocast:
                logits = module(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1 if deit else 0.0)
            optimizer.zero_grad()
            loss.backward()
            if not classifier.frozen:
                nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            losses += loss.detach()
            if step % 10 == 0:
                mean = losses.item() / (step + 1)
                progress(f"epoch {epoch}/{epochs}  step {step:,}/{len(loader):,}  loss {mean:.4f}")
        progress("")
        mean = losses / len(loader)
        if world > 1:
            dist.all_reduce(mean)
            mean /= world
        if not mean.isfinite():
            raise UserError(f"loss not finite in epoch {epoch}: a lower --lr may help")
        if rank == 0:
            print(f"epoch {epoch:>3}/{epochs}  loss {mean:.4f}  {time.monotonic() - began:.1f} s", flush=True)
    share_buffers(classifier)


def share_buffers(model):
    """Batch statistics of the ResNets differ between ranks: all take rank 0's, as its checkpoint does."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


@torch.no_grad()
def classify(classifier, source, folders, device, **loading):
    """Accuracy of a trained classifier -> dict of shares."""
    labels, ranked = class_labels(source, folders)
    scores = image_features(classifier.eval().model, source, device, encode=classifier, **loading)
    return accuracy(scores, labels, ranked)


# ---------------------------------------------------------------- weights for others


def export(model):
    """State dict under others' names: open_clip's for CLIP; timm's ViT, without a head, for MoCo."""
    if model.arch in moco.ARCHS:
        backbone = model.base_encoder.state_dict()
        return {name: weight for name, weight in backbone.items() if not name.startswith("head.")}
    return model.state_dict()


# what the architectures are called elsewhere; the others have no model there
OPEN_CLIP = {"vit_s32": "ViT-S-32", "vit_s16": "ViT-S-16", "vit_b32": "ViT-B-32", "vit_b16": "ViT-B-16"}
OPEN_CLIP |= {"rn50": "RN50", "rn101": "RN101"}
TIMM = {"moco_vit_s16": "vit_small_patch16_224", "moco_vit_b16": "vit_base_patch16_224"}

WARNING = """\
WARNING: this model reads hashed words. open_clip will load it without a word, but whatever open_clip's own
tokenizer makes of a text means nothing to it: scores as by chance. Give it these tokens instead:
    words = clip_model.HashedWords()
    tokens = torch.stack([F.pad(torch.from_numpy(words(text)), (0, 77))[:77] for text in texts])"""


def loading_line(model, path):
    """Python that loads the exported weights elsewhere."""
    arch, size, file = model.arch, model.image_size, json.dumps(str(path))
    if arch in OPEN_CLIP:
        return f'model = open_clip.create_model("{OPEN_CLIP[arch]}", {file}, force_image_size={size})'
    if arch in TIMM:
        create = f'timm.create_model("{TIMM[arch]}", num_heads=12, img_size={size}, num_classes=0)'
    elif arch in moco.ARCHS:
        shape = "embed_dim={width}, depth={layers}, num_heads={heads}, patch_size={patch}"
        shape = shape.format(**moco.ARCHS[arch])
        create = f"timm.models.VisionTransformer(img_size={size}, num_classes=0, {shape})"
    else:
        create = f'clip_model.create("{arch}", {size})  # not in open_clip'
    return f"model = {create}\nmodel.load_state_dict(torch.load({file}))"


def run_export(args):
    model, _ = load_model(args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu, False)
    tokenizer, state = load_checkpoint(args.checkpoint).get("tokenizer"), export(model)
    _write(args.out, lambda file: torch.save(state, file))
    print(loading_line(model, args.out))
    if tokenizer == clip_model.HashedWords.name:
        print(WARNING)
    return {"out": args.out, "tensors": len(state), "tokenizer": tokenizer}


# ---------------------------------------------------------------- what SCAN found: coresets, suspects


def run_coreset(args):
    checkpoints = [_run(run) for run in args.runs]
    for run, checkpoint in zip(args.runs, checkpoints, strict=True):
        if checkpoint["data"] != checkpoints[0]["data"]:
            raise UserError(f"{run} was trained on other data than {args.runs[0]}: no coreset of both")
    states = [checkpoint["scan"] for checkpoint in checkpoints]
    kept = coreset(states, args.prune)
    _write(args.out, lambda file: np.save(file, kept.numpy()))

    pruned, everyone, overlaps = [pruned_set(state, args.prune) for state in states], range(len(states)), []
    groups = [*itertools.combinations(everyone, 2), *[tuple(everyone)] * (len(states) > 2)]
    print(f"{'overlap (IoU) of':<40} {'kept':>7} {'chance':>7} {'pruned':>7} {'chance':>7}")
    for group in groups:
        row = overlap(torch.stack([pruned[k] for k in group]), args.prune)
        runs = [args.runs[k] for k in group]
        name = " + ".join(runs) if len(runs) < 3 else f"all {len(runs)}"
        print(f"{name[-40:]:<40} " + " ".join(f"{value:7.3f}" for value in row.values()))
        overlaps.append({"runs": runs} | {k: round(v, 4) for k, v in row.items()})
    return {"out": args.out, "kept": len(kept), "prune": args.prune, "overlap": overlaps}


def overlap(pruned, prune):
    """Masks (runs, N) -> IoU of the kept and of the pruned sets, each with that of random sets (Table 5)."""
    row = {}
    for kind, rho, sets in (("kept", 1 - prune, ~pruned), ("pruned", prune, pruned)):
        row[kind] = sets.all(0).sum().item() / max(sets.any(0).sum().item(), 1)
        row[f"{kind}_chance"] = rho ** len(sets) / max(1 - (1 - rho) ** len(sets), 1e-12)
    return row


def _run(path):
    """The checkpoint of a run that has finished a preparation epoch."""
    checkpoint = load_checkpoint(path)
    if not {"scan", "data", "args"} <= set(checkpoint):
        raise UserError(f"{path}: not a run of train.py")
    if not checkpoint["scan"]["counts"].any():
        raise UserError(f"{path} has finished no preparation epoch: it says nothing about its samples yet")
    return checkpoint


def run_suspects(args):
    """A CSV of what a run marked: ill-matched samples, then redundant ones, the most extreme quantile first.

    A sample is of the kind that it was marked as more often.
    """
    checkpoint = _run(args.checkpoint)
    trained, scan = checkpoint["args"], checkpoint["scan"]
    captions = trained["arch"] in clip_model.ARCHS
    keys = dict(image_key=trained["img_key"], caption_key=trained["caption_key"])
    spec = args.data or trained["data"]
    source = data.open_source(spec, size=trained["image_size"], captions=captions, **keys)
    dataset = data.Samples(source, 0)
    if captions:
        dataset = data.Pairs(source, None, trained["image_size"], mismatch=trained["mismatch"])
    if dataset.fingerprint() != checkpoint["data"]["hash"]:
        raise UserError(f"{spec}: not the data that {args.checkpoint} was trained on: give those, by --data")

    quantile, ill = scan["quantile"].float(), scan["ill_counts"].int()
    redundant, most, found = scan["counts"].int() - ill, int(args.share * len(source)), {}
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["id", "where", "caption", "kind", "marked", "rounds", "quantile"])
    for kind, marked, mine, order in (
        ("ill_matched", ill, ill >= redundant, -quantile),
        ("redundant", redundant, ill < redundant, quantile),
    ):
        ids = (mine & (marked > 0)).nonzero().flatten()
        found[kind] = ids[order[ids].argsort(stable=True)[:most]].tolist()
        for i in found[kind]:
            caption = ""
            if captions:
                with contextlib.suppress(ValueError, OSError):  # of one that was never trained on
                    caption = dataset.caption(i)
            row = [i, source.where(i), caption, kind.replace("_", "-"), int(marked[i]), scan["rounds"]]
            table.writerow([*row, round(float(quantile[i]), 4)])
    _write(args.out, lambda file: file.write(text.getvalue().encode("utf-8", "backslashreplace")))

    result = {"out": args.out} | {kind: len(ids) for kind, ids in found.items()}
    planted = dataset.truth.get("ill_matched")
    for first in (0.05, 0.1, 0.15) if planted is not None and planted.any() else ():
        hits = planted[found["ill_matched"][: int(first * len(source))]]
        precision, recall = float(hits.sum() / max(len(hits), 1)), float(hits.sum() / planted.sum())
        print(f"first {first:4.0%}  precision {precision:6.1%}  recall {recall:6.1%}")
        result[f"first_{first:g}"] = {"precision": precision, "recall": recall}
    return result


# ---------------------------------------------------------------- ranks, devices, and lines for the user


def start_ranks(kind):
    """-> rank, world size, device; from torchrun's environment, or one process without it."""
    defaults = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(os.environ.get(name, default)) for name, default in defaults)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"rank {rank} finds no GPU {local} here: start one rank per GPU, or use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine, or its torch, has none: use --device cpu")
    if kind == "mps" and world > 1:
        raise UserError("--device mps: one process only, torch cannot gather from several")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        # After a restart by torchrun (--max-restarts) its store still holds the addresses of the dead ranks.
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world)
    return rank, world, device


def _ranks():
    """-> rank, world size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def precision(asked, device):
    """auto, fp32 or bf16 -> fp32 or bf16. auto: bf16 where the GPU has it, rather than emulates it."""
    if asked != "auto":
        return asked
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def loading_processes():
    """How many loading processes a rank starts by default: one per core that it has, at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), 32)


def progress(text):
    """A line that overwrites itself, on a terminal, of rank 0."""
    if _ranks()[0] == 0 and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1  # a longer one would wrap, and not be overwritten
        print(f"\r{text[:width]:<{width}}", end="" if text else "\r", file=sys.stderr, flush=True)


def one_line_warnings(program):
    """Warnings from here on are one line on stderr, of rank 0, as errors are."""

    def show(message, *_, **__):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{program}: {str(message).splitlines()[0]}", file=sys.stderr)

    warnings.showwarning = show


def fail(program, line, code=1):
    """End with one line that says what was wrong. Rank 0 speaks for all, unless another failed alone."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # by then rank 0 has spoken, and torchrun ended this one
    line = f"{program}: " + f"rank {rank}: " * (rank > 0) + line
    print(line, file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # torchrun ends with a traceback of its own: the last of it shall be this line
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(report, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": details}}, file)
    sys.exit(code)


# ---------------------------------------------------------------- command line


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and behind each flag its default, where it has one of its own."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Help} | options)

    def error(self, message):
        if int(os.environ.get("LOCAL_RANK", 0)):
            sys.exit(0)  # all ranks see the same flags, and torchrun would report on each that fails
        fail(self.prog, message, 2)


def _number(kind, least, most, what):
    """What argparse calls for a flag's text."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return number


share = _number(float, 0, 1, "a share between 0 and 1")
natural = _number(int, 1, 2**31 - 1, "a whole number of at least 1")
count = _number(int, 0, 2**63 - 1, "a whole number of at least 0")
finite = _number(float, 0, sys.float_info.max, "a finite number of at least 0")


ABOUT = {
    "zeroshot": "CLIP: nearest prompt of each class",
    "retrieval": "CLIP: images by text and texts by image",
    "knn": "k-nearest-neighbour classifier on frozen features",
    "linear": "linear classifier on frozen features",
    "finetune": "train the image tower and a classifier: CLIP as wise-ft does, MoCo as DeiT does",
    "export": "write weights for open_clip or timm",
    "coreset": "write the ids that a static coreset keeps",
    "suspects": "list what a run marked most often, to look at one's own data",
}


def lines(path):
    """What argparse calls for a file of texts, one a line."""
    try:
        with open(path, encoding="utf-8") as file:
            found = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise argparse.ArgumentTypeError(f"{path}: is empty")
    return found


def classnames(text):
    return text if text == "imagenet" else lines(text)


def wnids(path):
    return data.Tree(path).classes if os.path.isdir(path) else lines(path)


def templates(path):
    """argparse type: a template, or a file of them."""
    found = [path] if "{}" in path else lines(path)
    if not all("{}" in template for template in found):
        raise argparse.ArgumentTypeError(f"{path}: every line needs a {{}} for the class name")
    return found


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = {name: commands.add_parser(name, help=text, description=text) for name, text in ABOUT.items()}
    for name in ("zeroshot", "retrieval", "knn", "linear", "finetune", "export"):
        add = p[name].add_argument
        add("--checkpoint", required=True, help="folder of a run, its last.pt, or a state dict of others")
        add("--arch", choices=[*clip_model.ARCHS, *moco.ARCHS], help="of a state dict of others")
        add("--image-size", type=natural, help="of a state dict of others; default: 224")
        add("--quick-gelu", action="store_true", help="for OpenAI's own weights")
        add("--vocab", help="bpe_simple_vocab_16e6.txt.gz, if the model was trained with it")
        if name == "export":
            continue
        given = dict(required=True) if name == "retrieval" else dict(default="shapes")
        add("--data", **given, help="shapes[:N], tar shards, .csv/.tsv, class folders, cifar10[:DIR]")
        add("--img-key", default="filepath", help="column of a CSV")
        add("--caption-key", default="title", help="column of a CSV")
        add("--label-key", help="column of a CSV, or key in the .json of tar shards, with the class")
        add("--download", action="store_true", help="fetch CIFAR if it is missing")
        add("--workers", type=count, default=loading_processes(), help="loading processes per rank")
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda or cpu")
        if name in ("zeroshot", "retrieval", "knn"):
            add("--batch-size", type=natural, default=256, help="pictures per rank")
        if name in ("knn", "linear", "finetune"):
            add("--val-data", help="what is classified (--data: what is learnt from)")
        if name in ("zeroshot", "finetune"):
            about = "file, one a line, in the order of the classes; imagenet: torchvision's"
            add("--classnames", type=classnames, help=about)
            about = 'file, one a line, {} for the name; default: "a photo of a {}."'
            add("--templates", type=templates, help=about)
    rates = "3 x batch / 256 (sgd)", "3e-5 (wise-ft), 2.5e-4 x batch / 256 (deit)"
    for name, recipes, rate in (("linear", ["sgd"], rates[0]), ("finetune", ["wise-ft", "deit"], rates[1])):
        add = p[name].add_argument
        by_recipe = {k: ", ".join(f"{RECIPES[r][k]:g} ({r})" for r in recipes) for k in RECIPES["sgd"]}
        add("--epochs", type=natural, help=f"default: {by_recipe['epochs']}")
        add("--batch-size", type=natural, help=f"over all ranks; default: {by_recipe['batch_size']}")
        add("--lr", type=finite, help=f"peak; default: {rate}")
        add("--wd", type=finite, help=f"weight decay; default: {by_recipe['wd']}")
        add("--seed", type=count, default=0, help="of the order, the augmentation and a new head")
    about = "the 1000 in order: a file, one a line, or an ImageNet tree"
    p["zeroshot"].add_argument("--wnids", type=wnids, help=about)
    p["retrieval"].add_argument("--split-captions", action="store_true", help="each line is a caption")
    p["knn"].add_argument("--k", type=natural, default=20, help="neighbours that vote")
    about = "lbfgs: logistic regression on features of centre crops; sgd: MoCo v3's, with augmentation"
    p["linear"].add_argument("--protocol", choices=["lbfgs", "sgd"], default="lbfgs", help=about)
    p["finetune"].add_argument("--test-data", nargs="+", default=[], help="more to classify: ImageNet-V2, -R")
    p["coreset"].add_argument("runs", nargs="+", help="folders of runs over the same data, or checkpoints")
    p["coreset"].add_argument("--prune", type=share, required=True, help="share of the data to leave out")
    p["suspects"].add_argument("checkpoint", metavar="run", help="folder of a run, or its last.pt")
    p["suspects"].add_argument("--data", help="where the data are now; default: where the run had them")
    p["suspects"].add_argument("--share", type=share, default=0.15, help="most of each kind, of the data")
    for name in ("export", "coreset", "suspects", "finetune"):
        p[name].add_argument("--out", required=name != "finetune", help="file to write")
    args = parser.parse_args(argv)
    if args.command == "linear" and args.protocol == "lbfgs":
        for flag in ("epochs", "lr", "wd"):
            if getattr(args, flag) is not None:
                p["linear"].error(f"argument --{flag}: is for --protocol sgd")
    return args


def _write(path, write):
    try:
        with open(path, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None


def run_protocol(args):
    """Any command that looks at pictures -> its dict of shares."""
    text = args.command in ("zeroshot", "retrieval", "finetune")
    origin = args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu
    model, tokenizer = load_model(*origin, text)
    if tokenizer is None and args.command in ("zeroshot", "retrieval"):
        raise UserError(f"{args.command} needs captions, which {model.arch} never learnt: use knn or linear")
    if args.command in ("knn", "linear", "finetune") and args.val_data is None:
        if not args.data.startswith("shapes"):
            raise UserError("--val-data: say what to classify")
        args.val_data = "shapes"
    device = start_ranks(args.device)[2]
    model.to(device)
    loading = dict(batch_size=args.batch_size or 256, workers=args.workers)

    def source(spec, train=False):
        keys = dict(image_key=args.img_key, caption_key=args.caption_key, label_key=args.label_key)
        keys |= dict(captions=args.command == "retrieval", download=args.download)
        opened = data.open_source(spec, train=train, size=model.image_size, **keys)
        if args.command != "retrieval" and opened.labels is None:
            raise UserError(f"{spec}: has no classes; use class folders, or name its --label-key")
        return opened

    if args.command == "retrieval":
        split = args.split_captions
        return retrieval(model, tokenizer, source(args.data), device, split_captions=split, **loading)
    if args.command == "zeroshot":
        names = dict(classnames=args.classnames, wnids=args.wnids, templates=args.templates)
        return zeroshot(model, tokenizer, source(args.data), device, **names, **loading)
    train, test = source(args.data, train=True), source(args.val_data)
    if args.command == "knn":
        return knn(model, train, test, device, k=args.k, **loading)
    if args.command == "linear" and args.protocol == "lbfgs":
        return linear(model, train, test, device, **loading)
    others = {spec: source(spec) for spec in getattr(args, "test_data", [])}
    return train_and_classify(args, model, tokenizer, train, test, others, device)


def train_and_classify(args, model, tokenizer, train, test, others, device):
    """Fine-tuning, or MoCo v3's linear protocol -> accuracy on `test`, and on `others` by name."""
    for images in (test, *others.values()):
        class_labels(images, train.classes)  # what does not fit is said now, not hours later
    out, head = getattr(args, "out", None), None
    if out and not os.access(os.path.dirname(out) or ".", os.W_OK):
        raise UserError(f"--out {out}: its folder cannot be written")
    frozen = args.command == "linear"
    protocol = "sgd" if frozen else "deit" if tokenizer is None else "wise-ft"
    if protocol == "wise-ft":  # the head starts from the zero-shot weights
        names, folders = zeroshot_classes(train, args.classnames)
        names = [names[folders.index(folder)] for folder in train.classes]
        head = zeroshot_classifier(model, tokenizer, train, names, args.templates, device)
        head *= model.logit_scale.exp().item()
    recipe = dict(RECIPES[protocol])
    recipe |= {name: getattr(args, name) for name in recipe if getattr(args, name) is not None}
    if protocol != "wise-ft" and args.lr is None:
        recipe["lr"] *= min(recipe["batch_size"], len(train)) / RECIPES[protocol]["batch_size"]
    torch.manual_seed(args.seed)
    classifier = Classifier(model, len(train.classes), frozen, head).to(device)
    train_classifier(classifier, train, protocol, device, workers=args.workers, seed=args.seed, **recipe)
    if out and _ranks()[0] == 0:
        state = export(model) | {f"head.{k}": v for k, v in classifier.head.state_dict().items()}
        _write(out, lambda file: torch.save(state, file))
    loading = dict(workers=args.workers, look=LINCLS_LOOK if frozen else None)
    result = {"protocol": protocol} | classify(classifier, test, train.classes, device, **loading)
    for spec, images in others.items():
        scores = classify(classifier, images, train.classes, device, **loading)
        result.setdefault("test", {})[spec] = scores
    return result


def _print_scores(result, indent="  "):
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_scores(value, indent + "  ")
        elif name != "protocol":
            form = {"n": ",", "penalty": "g"}.get(name, ".2%")
            print(f"{indent}{name:<9} {value:>9{form}}")


def main(argv=None):
    one_line_warnings("eval.py")
    try:
        args = parse_args(argv)
        on_files = {"export": run_export, "coreset": run_coreset, "suspects": run_suspects}.get(args.command)
        if on_files is None:
            result = run_protocol(args)
            if _ranks()[0] == 0:
                where = getattr(args, "val_data", None) or args.data
                print(f"{result['protocol']} of {args.checkpoint} on {where}")
                _print_scores(result)
                print(json.dumps(result))
        elif int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(on_files(args)))
    except UserError as error:
        fail("eval.py", str(error).strip().splitlines()[-1])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
