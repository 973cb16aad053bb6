"""Evaluate CLIP and MoCo models: runs of train.py, or state dicts of open_clip, timm and MoCo v3.

    python eval.py zeroshot  --checkpoint runs/x                                  # on the run's own data
    python eval.py zeroshot  --checkpoint runs/x --data imagenet/val              # class folders
    python eval.py retrieval --checkpoint runs/x --data 'val-{00000..00003}.tar'
    python eval.py knn       --checkpoint runs/x --data imagenet --val-data imagenet
    python eval.py linear    --checkpoint runs/x --data cifar10:data --val-data cifar10:data
    torchrun --nproc_per_node 8 eval.py finetune --checkpoint runs/x --data imagenet \\
        --val-data imagenet --test-data imagenetv2 imagenet-r                     # any command runs on ranks
    python eval.py export    --checkpoint runs/x --out weights.pt                 # for open_clip or timm
    python eval.py coreset   runs/a runs/b --prune 0.3 --out kept.npy             # Sect. 4.3

Prints a table and, as its last line, one JSON object: shares (not percent), and n, the number of images.
"balanced" is the mean of the accuracies per class. Class folders may be ImageNet's 1000 wnids, the 200 of
ImageNet-R (then only these are ranked), or the numbers of ImageNet-V2. State dicts of others need --arch, for
text also --vocab, CLIP's vocabulary; weights trained by OpenAI need --quick-gelu.

The last section holds what train.py shares: ranks, devices, messages, number types.
"""

import argparse
import functools
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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import InterpolationMode, v2

import clip_model
import data
import moco
from data import UserError
from scan import coreset, pruned_set

# batch_size is global; lr is the peak, for MoCo's two protocols at that batch size.
RECIPES = {
    "wise-ft": dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1),  # CLIP
    "deit": dict(epochs=150, batch_size=1024, lr=1e-3, wd=0.05),  # MoCo v3's, but no stochastic depth
    "sgd": dict(epochs=90, batch_size=1024, lr=12.0, wd=0.0),  # MoCo v3's linear protocol
}
# MoCo v3's linear protocol: the middle 224 of 256 pixels for any model, resized by torchvision's default
LINCLS_PREPROCESS = dict(crop=moco.MoCo.eval_crop, interpolation=InterpolationMode.BILINEAR)
WRAPPERS = ("module", "_orig_mod")  # parts of names added by DistributedDataParallel and torch.compile
OPENAI = ("input_resolution", "context_length", "vocab_size")  # entries of OpenAI's archives, no weights


# ---------------------------------------------------------------- models


def tokenizer_for(vocab):
    """Return CLIP's byte-pair encoding from a file; without one, or for "hashed", hashed words."""
    if not vocab or vocab == "hashed":
        return clip_model.HashedWords()
    try:
        return clip_model.BPE(vocab)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_checkpoint(path):
    """Read a dict of tensors and plain values from a file or from a run's folder.

    Executes nothing in the file, and refuses a damaged one.
    """
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    needed = "no checkpoint, or damaged: torch.load(weights_only=True) must read a dict of tensors from it"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if any(name.endswith("/constants.pkl") for name in file.namelist()):
                    state = f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt')"
                    raise UserError(f"{path}: a TorchScript archive; make a state dict of it: {state}")
                # torch.load verifies no checksums, and skips tensors that are marked as folders
                if file.testzip() or any(entry.external_attr & 0x10 for entry in file.infolist()):
                    raise UserError(f"{path}: damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (UserError, MemoryError):
        raise
    except Exception:  # torch and zipfile raise almost anything for other files
        raise UserError(f"{path}: {needed}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: {needed}")
    return checkpoint


def run_flags(checkpoint):
    """Return the flags of train.py that a run was started with; none for a state dict of others."""
    return checkpoint["args"] if {"model", "args", "tokenizer"} <= set(checkpoint) else {}


def load_model(path, arch=None, vocab=None, image_size=None, quick_gelu=False, text=True, checkpoint=None):
    """-> (model in eval mode, tokenizer or None), from train.py, open_clip, timm's ViT or MoCo v3's own code.

    text: whether captions will be encoded, so that the tokenizer must be known. checkpoint: the content of
    `path`, if already loaded.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    run, tokenizer = run_flags(checkpoint), None
    if run:
        arch, image_size = run.get("arch"), run.get("image_size")
    elif not arch:
        raise UserError(f"{path}: not a checkpoint of train.py; for a state dict of others give its --arch")
    try:
        if arch in moco.ARCHS:
            model = moco.create(arch, image_size or 224)
        else:
            if text:
                tokenizer = _tokenizer(path, checkpoint.get("tokenizer"), vocab)
            size = tokenizer.vocab_size if text else len(_weights(checkpoint)["token_embedding.weight"])
            quick_gelu = quick_gelu or OPENAI[0] in checkpoint
            model = clip_model.create(arch, image_size or 224, size, quick_gelu=quick_gelu)
    except KeyError as error:
        raise UserError(f"{path}: its weights do not fit {arch} (no {error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    load_weights(model, path, checkpoint)
    return model.eval(), tokenizer


def load_weights(model, path, checkpoint=None):
    """Load weights of train.py, open_clip, timm (for MoCo, the backbone) or MoCo v3 into `model`.

    Returns the name of the tokenizer that they were trained with, None if unknown.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    weights = _weights(checkpoint)
    if isinstance(model, moco.MoCo) and not any(name.startswith("base_encoder.") for name in weights):
        # timm's ViT is the backbone alone: start both encoders from it, keep projector and predictor
        backbone = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
        weights = {k: v for k, v in model.state_dict().items() if ".head." in k or k.startswith("predictor.")}
        weights |= {f"{side}_encoder.{k}": v for side in ("base", "momentum") for k, v in backbone.items()}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        model = f"{model.arch} at {model.image_size} px"
        raise UserError(f"{path}: its weights do not fit {model} ({reason})") from None
    if OPENAI[0] in checkpoint and not model.quick_gelu:
        warnings.warn(f"{path}: trained with QuickGELU by OpenAI; this model has GELU", stacklevel=2)
    return checkpoint.get("tokenizer")


def _weights(checkpoint):
    """Return the state dict in a checkpoint, under the names of an unwrapped model."""
    found = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    weights = {}
    for name, weight in found.items() if isinstance(found, dict) else []:
        parts = [part for part in str(name).split(".") if part not in WRAPPERS]
        if parts[0] not in (*OPENAI, "n_averaged"):  # n_averaged: of torch's AveragedModel
            weights[".".join(parts)] = weight
    return weights


def _tokenizer(path, trained_with, vocab):
    if trained_with is None and not vocab:  # an open_clip state dict does not name its tokenizer
        need = "needs --vocab (or --vocab hashed, if exported from here)"
        raise UserError(f"{path}: an open_clip state dict {need}")
    tokenizer = tokenizer_for(vocab)
    if trained_with not in (None, tokenizer.name):
        hint = "give its --vocab" if trained_with.startswith("bpe") else "leave --vocab out"
        trained = f"was trained with the tokenizer {trained_with!r}, not {tokenizer.name!r}"
        raise UserError(f"{path} {trained}: {hint}")
    return tokenizer


def encoder(model):
    """Return the method that gives (b, d) features of normalised images, of any length."""
    return model.features if isinstance(model, moco.MoCo) else model.encode_image


# ---------------------------------------------------------------- features


@torch.no_grad()
def image_features(
    model, source, device, *, encode=None, ids=None, preprocess=None, batch_size=256, workers=0
):
    """(len(ids), d) float32 features of a source's pictures (ids: all), on the CPU; ranks share the work.

    preprocess: crop and interpolation of `data.eval_transform`; default: the model's crop, bicubic.
    """
    encode = encode or encoder(model)
    rank, world = _ranks()
    ids = range(len(source)) if ids is None else ids
    preprocess = preprocess or dict(crop=model.eval_crop, interpolation=InterpolationMode.BICUBIC)
    pictures = data.Pictures(source, data.eval_transform(model.image_size, **preprocess))
    options = dict(num_workers=workers, pin_memory=device.type == "cuda")
    loader = DataLoader(pictures, batch_size, sampler=ids[rank::world], **options)
    parts = [torch.empty(0, device=device)]  # a rank may get no picture at all
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
        tokens = [torch.from_numpy(tokenizer(text)) for text in texts[start : start + batch_size]]
        features = model.encode_text(pad_sequence(tokens, batch_first=True).to(device))
        parts.append(F.normalize(features.float(), dim=-1).cpu())
        progress(f"texts {min(start + batch_size, len(texts)):,} / {len(texts):,}")
    progress("")
    return torch.cat(parts)


# ---------------------------------------------------------------- classes


def class_labels(source, folders):
    """Number a source's labels (N,) by the position of their class in `folders` -> (labels, ranked).

    Folder names that are numbers are positions (ImageNet-V2). ranked: positions of the only classes that
    compete, if the source has some of the wnids (ImageNet-R); else None.
    """
    position = {name: k for k, name in enumerate(folders)}
    if all(name.isdecimal() for name in source.classes) and not set(source.classes) <= set(folders):
        position = {name: int(name) for name in source.classes if int(name) < len(folders)}
    for name in source.classes:
        if name not in position:
            raise UserError(f"class {name!r} of the data is none of the {len(folders)} classes known")
    mine = torch.tensor([position[name] for name in source.classes])
    ranked = mine if _are_wnids(source.classes) and source.classes != folders else None
    if len(folders if ranked is None else ranked) < 2:
        raise UserError(f"{source.classes[0]!r} is the only class of the data: every answer would be right")
    return mine[torch.as_tensor(source.labels)], ranked


def _are_wnids(names):
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def zeroshot_classes(source, classnames=None, wnids=None):
    """-> (names of the classes for prompts, their folders), in the same order.

    classnames: names in the order of the classes; "imagenet": torchvision's names; None: the folders' own
    names, or torchvision's if the folders are ImageNet's 1000 wnids. wnids: ImageNet's 1000, in order.
    """
    folders = wnids or source.classes
    numbers, are_wnids = all(name.isdecimal() for name in folders), _are_wnids(folders)
    if classnames is None and numbers:
        raise UserError("the classes are numbers: give --classnames (imagenet, for ImageNet-V2)")
    if classnames is None and are_wnids and len(folders) != 1000:
        raise UserError(f"{len(folders)} wnids: give the order of all 1000 with --wnids, or --classnames")
    names = classnames or folders
    if classnames == "imagenet" or (classnames is None and are_wnids):
        names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    if numbers:
        folders = [str(k) for k in range(len(names))]
    if len(names) != len(folders):
        hint = "; give the order of all wnids with --wnids" if are_wnids and not wnids else ""
        raise UserError(f"--classnames has {len(names)} names, for {len(folders)} classes{hint}")
    class_labels(source, folders)  # fail early on unknown classes, or on a single one
    return names, folders


def accuracy(scores, labels, ranked=None):
    """(N, classes) scores -> top-1, top-5 and balanced accuracy, n. ranked: the only classes that compete."""
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


def zeroshot_classifier(model, tokenizer, source, names, device):
    """(classes, d) unit vectors: for each class the mean of its prompts' unit embeddings."""
    templates = source.templates
    prompts = [template.replace("{}", name) for name in names for template in templates]
    per_class = text_features(model, tokenizer, prompts, device).view(len(names), len(templates), -1)
    return F.normalize(per_class.mean(1), dim=-1)


def zeroshot(model, tokenizer, source, device, *, classnames=None, wnids=None, **loading):
    """Classify each image by the nearest class embedding -> dict of shares.

    classnames, wnids: see `zeroshot_classes`.
    """
    names, folders = zeroshot_classes(source, classnames, wnids)
    labels, ranked = class_labels(source, folders)
    classifier = zeroshot_classifier(model, tokenizer, source, names, device)
    images = F.normalize(image_features(model, source, device, **loading), dim=-1)
    return {"protocol": "zero-shot"} | accuracy(images @ classifier.T, labels, ranked)


def retrieval(model, tokenizer, source, device, *, split_captions=False, chunk=1024, **loading):
    """Recall at 1, 5, 10 in both directions, in chunks -> dict of shares.

    An image may have several captions: the rows of a CSV with its path, or with split_captions the lines of a
    caption. A query hits at k if any of its partners is among the k nearest.
    """
    firsts, image_of = None, range(len(source))
    if hasattr(source, "same_images"):
        firsts, image_of = source.same_images()
    texts, owners = [], []  # owners: the image of each text
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
    numbers = torch.arange(len(images))
    result = {"protocol": "retrieval"} | _recalls("i2t", images, texts, numbers, owners, chunk)
    return result | _recalls("t2i", texts, images, owners, numbers, chunk) | {"n": len(images)}


def _recalls(name, queries, keys, image_of_query, image_of_key, chunk):
    nearest = [(part @ keys.T).topk(min(10, len(keys))).indices for part in queries.split(chunk)]
    hits = image_of_key[torch.cat(nearest)] == image_of_query[:, None]  # (queries, 10)
    return {f"{name}_r{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}


def knn(model, train, test, device, *, k=20, temperature=0.07, most=None, **loading):
    """k nearest neighbours by cosine, each voting with exp(cosine / temperature) -> dict of shares.

    most: use about this many training pictures, evenly spaced.
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

    Chooses the L2 penalty on a tenth of the training data, then fits all of them.
    """
    y = torch.as_tensor(train.labels, device=device)
    labels, ranked = class_labels(test, train.classes)
    x = image_features(model, train, device, **loading).to(device)
    z = image_features(model, test, device, **loading).to(device)
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
    """A model's image tower and a linear head. A zero-shot head is applied to unit vectors, as CLIP's are."""

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
        model.requires_grad_(False)  # all but the image tower, without MoCo's projector
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
    """Items (id, unreadable id or -1, image, label), augmented by (seed, epoch, id)."""

    def __init__(self, source, transform, draft, seed):
        super().__init__(source, seed)
        self.transform, self.draft = transform, draft

    def read(self, i):
        return self.transform(self.source.image(i, self.draft)), int(self.source.labels[i])


def augmentation(protocol, size):
    """-> (picture -> (3, size, size) uint8, smallest length of the shorter side when decoding)."""
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
    """Whether this parameter gets weight decay. DeiT: no class token, no positions; open_clip: no biases."""
    return parameter.ndim > 1 and "bias" not in name and not name.endswith(("cls_token", "pos_embed"))


def make_optimizer(classifier, protocol, lr, wd):
    trained = [(name, p) for name, p in classifier.named_parameters() if p.requires_grad]
    if protocol == "sgd":
        return torch.optim.SGD([p for _, p in trained], lr, momentum=0.9, weight_decay=wd)
    decay = [p for name, p in trained if decays(name, p)]
    others = [p for name, p in trained if not decays(name, p)]
    groups = [{"params": decay, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr)


def learning_rate(protocol, step, per_epoch, epochs, lr):
    """Linear warm-up, then a cosine to 0. "sgd" has no warm-up, and steps once an epoch."""
    if protocol == "sgd":
        step = step // per_epoch * per_epoch
    total = epochs * per_epoch
    warmup = {"wise-ft": 500, "deit": 5 * per_epoch, "sgd": 0}[protocol]
    warmup = min(warmup, total // 5)  # short runs: at most a fifth
    done = max(step - warmup, 0) / max(total - warmup, 1)
    return lr * min(1, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * done)) / 2


def train_classifier(classifier, train, protocol, device, *, epochs, batch_size, lr, wd, workers, seed=0):
    """Train in place. protocol: a key of RECIPES; "deit" adds MixUp or CutMix and label smoothing."""
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

    torch.manual_seed(hash((seed, rank)) % 2**63)  # for MixUp, CutMix and stochastic depth
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
    """Give all ranks rank 0's buffers: batch statistics differ, and rank 0's are in the checkpoint."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def classify(classifier, source, folders, device, **loading):
    """Accuracy of a trained classifier -> dict of shares."""
    labels, ranked = class_labels(source, folders)
    scores = image_features(classifier.eval().model, source, device, encode=classifier, **loading)
    return accuracy(scores, labels, ranked)


def train_and_classify(args, protocol, model, head, train, test, others, device):
    """Train a classifier -> accuracy on `test`, and on `others` by name. head: its first weights, or None."""
    for images in (test, *others.values()):
        class_labels(images, train.classes)  # refuse unknown classes now, not hours later
    out = getattr(args, "out", None)
    if out and not os.access(os.path.dirname(out) or ".", os.W_OK):
        raise UserError(f"--out {out}: its folder cannot be written")
    recipe = dict(RECIPES[protocol])
    recipe |= {name: getattr(args, name) for name in recipe if getattr(args, name) is not None}
    if protocol != "wise-ft" and args.lr is None:
        recipe["lr"] *= min(recipe["batch_size"], len(train)) / RECIPES[protocol]["batch_size"]
    torch.manual_seed(args.seed)
    classifier = Classifier(model, len(train.classes), protocol == "sgd", head).to(device)
    train_classifier(classifier, train, protocol, device, workers=args.workers, seed=args.seed, **recipe)
    if out and _ranks()[0] == 0:
        state = export(model) | {f"head.{k}": v for k, v in classifier.head.state_dict().items()}
        _write(out, lambda file: torch.save(state, file))
    loading = dict(workers=args.workers, preprocess=LINCLS_PREPROCESS if protocol == "sgd" else None)
    result = {"protocol": protocol} | classify(classifier, test, train.classes, device, **loading)
    for spec, images in others.items():
        scores = classify(classifier, images, train.classes, device, **loading)
        result.setdefault("test", {})[spec] = scores
    return result


# ---------------------------------------------------------------- the commands

# `start` opens what every evaluation needs. To add one, write its function here, and its row in `commands`.


def run_zeroshot(args):
    """CLIP: nearest prompt of each class."""
    model, tokenizer, loading, source = start(args, text=True)
    return zeroshot(model, tokenizer, source, classnames=args.classnames, wnids=args.wnids, **loading)


def run_retrieval(args):
    """CLIP: images by text and texts by image."""
    model, tokenizer, loading, source = start(args, text=True, captions=True)
    return retrieval(model, tokenizer, source, split_captions=args.split_captions, **loading)


def run_knn(args):
    """k-nearest-neighbour classifier on frozen features."""
    model, _, loading, train, test = start(args)
    return knn(model, train, test, k=args.k, **loading)


def run_linear(args):
    """Linear classifier on frozen features."""
    for flag in ("epochs", "lr", "wd"):
        if args.protocol == "lbfgs" and getattr(args, flag) is not None:
            args.error(f"argument --{flag}: is for --protocol sgd")
    model, _, loading, train, test = start(args)
    if args.protocol == "lbfgs":
        return linear(model, train, test, **loading)
    return train_and_classify(args, "sgd", model, None, train, test, {}, loading["device"])


def run_finetune(args):
    """Train the image tower and a classifier: CLIP as wise-ft does, MoCo as DeiT does."""
    model, tokenizer, loading, train, test = start(args, text=True)
    others = {spec: open_source(args, model, spec) for spec in args.test_data}
    protocol, head, device = "deit", None, loading["device"]
    if tokenizer is not None:  # the head starts from the zero-shot weights
        names, folders = zeroshot_classes(train, args.classnames)
        names = [names[folders.index(folder)] for folder in train.classes]
        head = zeroshot_classifier(model, tokenizer, train, names, device) * model.logit_scale.exp().item()
        protocol = "wise-ft"
    return train_and_classify(args, protocol, model, head, train, test, others, device)


def start(args, text=False, captions=False):
    """Load the model, start the ranks, open the data -> model, tokenizer or None, loading, source(s).

    text: whether captions or class names are encoded. captions: whether the source's own captions are.
    loading: device, batch_size and workers, for `image_features`. With --val-data there are two sources.
    """
    checkpoint, learns = load_checkpoint(args.checkpoint), "val_data" in args
    origin = args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu
    model, tokenizer = load_model(*origin, text, checkpoint)
    if text and not learns and tokenizer is None:
        raise UserError(f"{args.command} needs captions, which {model.arch} never learnt: use knn or linear")
    fill_in(args, run_flags(checkpoint), learns)
    device = start_ranks(args.device)[2]
    sources = [open_source(args, model, args.data, train=learns, captions=captions)]
    if learns:
        sources.append(open_source(args, model, args.val_data))
    loading = dict(device=device, batch_size=args.batch_size or 256, workers=args.workers)
    return model.to(device), tokenizer, loading, *sources


def fill_in(args, run, learns):
    """Set the flags about data that were not given as the run had them. run: its flags, or {}."""
    defaults = {"img_key": "filepath", "caption_key": "title", "label_key": None, "templates": None}
    for name, default in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, run.get(name, default))
    if args.data is None:
        args.data = run.get("data" if learns else "val_data") or "shapes"
        if learns:
            args.val_data = args.val_data or run.get("val_data")
    if learns and args.val_data is None:
        if args.data.partition(":")[0] != "shapes":
            raise UserError("--val-data: say what to classify")
        args.val_data = "shapes"


def open_source(args, model, spec, train=False, captions=False):
    """Open the source of `spec`; it must have classes, unless its captions are wanted."""
    keys = dict(image_key=args.img_key, caption_key=args.caption_key, label_key=args.label_key)
    keys |= dict(captions=captions, download=args.download)
    source = data.open_source(spec, train=train, size=model.image_size, **keys)
    source.templates = args.templates or source.templates
    if not captions and source.labels is None:
        raise UserError(f"{spec}: has no classes; use class folders, or name its --label-key")
    return source


def export(model):
    """State dict under others' names: open_clip's for CLIP; timm's ViT, without a head, for MoCo."""
    if model.arch in moco.ARCHS:
        backbone = model.base_encoder.state_dict()
        return {name: weight for name, weight in backbone.items() if not name.startswith("head.")}
    return model.state_dict()


ELSEWHERE = {  # what makes the same model in open_clip and timm
    "vit_s32": 'open_clip.create_model("ViT-S-32", force_image_size={})',
    "vit_s16": 'open_clip.create_model("ViT-S-16", force_image_size={})',
    "vit_b32": 'open_clip.create_model("ViT-B-32", force_image_size={})',
    "vit_b16": 'open_clip.create_model("ViT-B-16", force_image_size={})',
    "rn50": 'open_clip.create_model("RN50", force_image_size={})',
    "rn101": 'open_clip.create_model("RN101", force_image_size={})',
    "moco_vit_s16": 'timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0, img_size={})',
    "moco_vit_b16": 'timm.create_model("vit_base_patch16_224", num_classes=0, img_size={})',
}
WARNING = """\
WARNING: this model reads hashed words. open_clip loads it silently, but its tokenizer does not match, so that
accuracy will be at chance. Give the model these tokens:
    import clip_model, torch, torch.nn.functional as F
    words = clip_model.HashedWords()
    tokens = torch.stack([F.pad(torch.from_numpy(words(text)), (0, 77))[:77] for text in texts])"""


def run_export(args):
    """Write weights for open_clip or timm."""
    checkpoint = load_checkpoint(args.checkpoint)
    origin = args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu
    model, _ = load_model(*origin, False, checkpoint)
    tokenizer, state = checkpoint.get("tokenizer"), export(model)
    _write(args.out, lambda file: torch.save(state, file))
    if model.arch in ELSEWHERE:
        print(f"model = {ELSEWHERE[model.arch].format(model.image_size)}")
        print(f"model.load_state_dict(torch.load({json.dumps(args.out)}))")
    if tokenizer == clip_model.HashedWords.name:
        print(WARNING)
    return {"out": args.out, "tensors": len(state), "tokenizer": tokenizer}


def run_coreset(args):
    """Write the ids that a static coreset keeps, and print how much the runs agree (Sect. 4.3)."""
    checkpoints = [load_scanned(run) for run in args.runs]
    for run, checkpoint in zip(args.runs, checkpoints, strict=True):
        if checkpoint["data"] != checkpoints[0]["data"]:
            raise UserError(f"{run} was trained on other data than {args.runs[0]}: no coreset of both")
    states = [checkpoint["scan"] for checkpoint in checkpoints]
    kept = coreset(states, args.prune)
    _write(args.out, lambda file: np.save(file, kept.numpy()))

    pruned, overlaps = [pruned_set(state, args.prune) for state in states], []
    groups = list(itertools.combinations(range(len(states)), 2))
    if len(states) > 2:
        groups.append(range(len(states)))
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


def load_scanned(path):
    """Load the checkpoint of a run that has finished a preparation epoch."""
    checkpoint = load_checkpoint(path)
    if not {"scan", "data", "args"} <= set(checkpoint):
        raise UserError(f"{path}: not a run of train.py")
    if not checkpoint["scan"]["counts"].any():
        raise UserError(f"{path} has finished no preparation epoch: it has not marked any sample yet")
    return checkpoint


def _write(path, write):
    try:
        with open(path, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None


# ---------------------------------------------------------------- the command line


def commands():
    """-> by name of the command: the function that runs it (its docstring is the help), its flags."""
    kinds = "shapes[:N], tar shards, .csv/.tsv, class folders, cifar10[:DIR]"
    model = {
        "--checkpoint": dict(required=True, help="folder of a run, its last.pt, or a state dict of others"),
        "--arch": dict(choices=[*clip_model.ARCHS, *moco.ARCHS], help="of a state dict of others"),
        "--image-size": dict(type=natural, help="of a state dict of others; default: 224"),
        "--quick-gelu": dict(action="store_true", help="for weights trained by OpenAI"),
        "--vocab": dict(help="bpe_simple_vocab_16e6.txt.gz, if the model was trained with it"),
    }
    pictures = model | {
        "--data": dict(help=f"{kinds}; default: the run's --val-data, or shapes"),
        "--img-key": dict(help="column of a CSV; default: the run's, or filepath"),
        "--caption-key": dict(help="column of a CSV; default: the run's, or title"),
        "--label-key": dict(help="column of a CSV, or key in the .json of tar shards; default: the run's"),
        "--download": dict(action="store_true", help="fetch CIFAR if it is missing"),
        "--workers": dict(type=count, default=loading_processes(), help="loading processes per rank"),
        "--device": dict(choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda or cpu"),
        "--batch-size": dict(type=natural, default=256, help="pictures per rank"),
    }
    learning = pictures | {
        "--data": dict(help=f"to learn from: {kinds}; default: the run's --data, or shapes"),
        "--val-data": dict(help="to classify; default, unless --data is given: the run's, or shapes"),
    }
    recipe = {k: ", ".join(f"{r[k]:g} ({name})" for name, r in RECIPES.items()) for k in RECIPES["sgd"]}
    training = learning | {
        "--epochs": dict(type=natural, help=f"default: {recipe['epochs']}"),
        "--batch-size": dict(type=natural, help=f"over all ranks; default: {recipe['batch_size']}"),
        "--lr": dict(type=finite, help=f"peak; default: {recipe['lr']}; deit, sgd: times batch / 1024"),
        "--wd": dict(type=finite, help=f"weight decay; default: {recipe['wd']}"),
        "--seed": dict(type=count, default=0, help="of the order, the augmentation and a new head"),
    }
    names = {
        "--classnames": dict(type=classnames, help="file, one a line, in order; imagenet: torchvision's"),
        "--templates": dict(type=templates, help="file, one a line, or one template; {}: the class's name"),
    }
    order = dict(type=wnids, help="the 1000 in order: a file, one a line, or an ImageNet tree")
    split = dict(action="store_true", help="each line is a caption")
    neighbours = dict(type=natural, default=20, help="neighbours that vote")
    about = "lbfgs: logistic regression on features of centre crops; sgd: MoCo v3's, with augmentation"
    protocol = dict(choices=["lbfgs", "sgd"], default="lbfgs", help=about)
    tests = dict(nargs="+", default=[], help="more to classify: ImageNet-V2, -R")
    runs = dict(nargs="+", help="folders of runs over the same data, or checkpoints")
    prune = dict(type=share, required=True, help="share of the data to leave out")
    tuned, out = dict(help="file to write"), dict(required=True, help="file to write")
    return {
        "zeroshot": (run_zeroshot, pictures | names | {"--wnids": order}),
        "retrieval": (run_retrieval, pictures | {"--split-captions": split}),
        "knn": (run_knn, learning | {"--k": neighbours}),
        "linear": (run_linear, training | {"--protocol": protocol}),
        "finetune": (run_finetune, training | names | {"--test-data": tests, "--out": tuned}),
        "export": (run_export, model | {"--out": out}),
        "coreset": (run_coreset, {"runs": runs, "--prune": prune, "--out": out}),
    }


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (run, flags) in commands().items():
        command = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, error=command.error)
        for flag, options in flags.items():
            command.add_argument(flag, **options)
    return parser.parse_args(argv)


def lines(path):
    """argparse type: the lines of a file."""
    try:
        with open(path, encoding="utf-8") as file:
            found = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise argparse.ArgumentTypeError(f"{path}: is empty")
    return found


def classnames(text):
    """argparse type: "imagenet", or the lines of a file."""
    return text if text == "imagenet" else lines(text)


def wnids(path):
    """argparse type: the folders of an ImageNet tree, or the lines of a file."""
    return data.Tree(path).classes if os.path.isdir(path) else lines(path)


def print_scores(result, indent="  "):
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            print_scores(value, indent + "  ")
        elif name != "protocol":
            form = {"n": ",", "penalty": "g"}.get(name, ".2%")
            print(f"{indent}{name:<9} {value:>9{form}}")


def main(argv=None):
    one_line_warnings("eval.py")
    try:
        args = parse_args(argv)
        on_ranks = "device" in args
        if not on_ranks and not is_first_rank():
            return
        result = args.run(args)
        if on_ranks and _ranks()[0] == 0:
            where = f"{args.val_data}, learnt from {args.data}" if "val_data" in args else args.data
            print(f"{result['protocol']} of {args.checkpoint} on {where}")
            print_scores(result)
        if _ranks()[0] == 0:
            print(json.dumps(result))
    except UserError as error:
        fail("eval.py", str(error).strip().splitlines()[-1])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------- what train.py shares

# Ranks and devices, messages to the user, and the types of its flags.

TIMEOUT = timedelta(minutes=30)  # of a collective operation


def start_ranks(kind):
    """-> rank, world size, device; from torchrun's environment, or one process without it."""
    rank, world, local = 0, 1, 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = ", ".join(name for name in names if not os.environ.get(name))
        if missing:
            why = f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but {missing} is empty or not set"
            raise UserError(f"{why}: start ranks with torchrun, or unset WORLD_SIZE")
        rank, world, local = (int(os.environ[name]) for name in names[:3])
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"rank {rank} finds no GPU {local} here: start one rank per GPU, or use --device cpu")
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


def is_first_rank():
    """Whether this is rank 0, also where no process group has been started."""
    return (os.environ.get("RANK") or "0") == "0"


def precision(asked, device):
    """Resolve auto, fp32 or bf16 to fp32 or bf16. auto: bf16 if the GPU has it natively."""
    if asked != "auto":
        return asked
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def loading_processes():
    """Default number of loading processes per rank: one for each of its cores, at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)), 32)


def progress(text):
    """Print a line that overwrites itself: on a terminal, on rank 0."""
    if _ranks()[0] == 0 and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1  # a longer line would wrap and stay
        print(f"\r{text[:width]:<{width}}", end="" if text else "\r", file=sys.stderr, flush=True)


def one_line_warnings(program):
    """From here on print warnings as errors are printed: one line on stderr, on rank 0."""

    def show(message, *_, **__):
        if is_first_rank():
            print(f"{program}: {str(message).splitlines()[0]}", file=sys.stderr)

    warnings.showwarning = show


def fail(program, line, code=1):
    """End with one line that says what was wrong. Only rank 0 prints, unless another rank alone failed."""
    if not is_first_rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # by then rank 0 has printed its line, and torchrun has ended this rank
        line = f"rank {os.environ['RANK']}: {line}"
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks, and name defaults other than None, False and []."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Report a wrong flag in one line, without the usage."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Help} | options)

    def error(self, message):
        if (os.environ.get("LOCAL_RANK") or "0") != "0":
            sys.exit(0)  # all ranks see the same flags, and torchrun would report each failing rank
        fail(self.prog, message, 2)


def _number(kind, least, most, what, text):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


# argparse types
share = functools.partial(_number, float, 0, 1, "a share between 0 and 1")
natural = functools.partial(_number, int, 1, 2**31 - 1, "a whole number of at least 1")
count = functools.partial(_number, int, 0, 2**63 - 1, "a whole number of at least 0")
finite = functools.partial(_number, float, 0, sys.float_info.max, "a finite number of at least 0")


def templates(text):
    """argparse type: a template, or a file of templates, one a line."""
    found = [text] if "{}" in text else lines(text)
    if not all("{}" in template for template in found):
        raise argparse.ArgumentTypeError(f"{text}: every line needs a {{}} for the class name")
    return found


if __name__ == "__main__":
    main()
