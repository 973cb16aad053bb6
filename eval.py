"""Evaluate CLIP and MoCo models: runs of train.py, or state dicts of open_clip, timm and MoCo v3.

    python eval.py zeroshot  --checkpoint runs/x                                  # on the run's --val-data
    python eval.py retrieval --checkpoint runs/x --data 'val-{00000..00003}.tar'
    python eval.py knn       --checkpoint runs/x --data imagenet --val-data imagenet
    torchrun --nproc_per_node 8 eval.py finetune --checkpoint runs/x              # any command runs on ranks
    python eval.py export    --checkpoint runs/x --out weights.pt                 # for open_clip or timm
    python eval.py coreset   runs/a runs/b --prune 0.3 --out kept.npy             # Sect. 4.3

Prints a table and, as its last line, one JSON object: shares (not percent), and n, the number of images;
"balanced" is the mean accuracy of the classes. Class folders may be ImageNet's 1000 wnids, the 200 of
ImageNet-R (then only these are ranked), or the numbers of ImageNet-V2. State dicts of others need --arch, and
for text --vocab, CLIP's vocabulary. The last section is what train.py shares.
"""

import argparse
import functools
import inspect
import io
import json
import math
import os
import re
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

# batch_size is global; lr is the peak, for MoCo's two protocols at that batch size.
RECIPES = {
    "wise-ft": dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1),  # CLIP
    "deit": dict(epochs=150, batch_size=1024, lr=1e-3, wd=0.05),  # MoCo v3's, but no stochastic depth
    "sgd": dict(epochs=90, batch_size=1024, lr=12.0, wd=0.0),  # MoCo v3's linear protocol
}
# MoCo v3's linear protocol: the middle 224 of 256 pixels for any model, resized by torchvision's default
LINCLS_RESIZE = dict(crop=moco.MoCo.eval_crop, interpolation=InterpolationMode.BILINEAR)
WRAPPERS = ("module", "_orig_mod")  # parts of names added by DistributedDataParallel and torch.compile
# entries that are no weights: of OpenAI's archives, and of torch's AveragedModel
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "n_averaged")


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
    """Read a dict from a file or a run's folder. Executes nothing in the file, and refuses a damaged one."""
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    reason = "no checkpoint, or damaged: torch.load(weights_only=True) must read a dict of tensors from it"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if any(name.endswith("/constants.pkl") for name in file.namelist()):
                    state = f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt')"
                    reason = f"a TorchScript archive; make a state dict of it: {state}"
                # torch.load verifies no checksums, and skips tensors that are marked as folders
                if file.testzip() or any(entry.external_attr & 0x10 for entry in file.infolist()):
                    raise ValueError("damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError("no dict")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception:  # torch and zipfile raise almost anything for other files
        raise UserError(f"{path}: {reason}") from None
    return checkpoint


def run_flags(checkpoint):
    """Return the flags of train.py that a run was started with; none for a state dict of others."""
    return checkpoint["args"] if {"model", "args", "tokenizer"} <= set(checkpoint) else {}


def load_model(path, arch=None, vocab=None, image_size=None, quick_gelu=False, text=True, checkpoint=None):
    """-> (model in eval mode, tokenizer or None), from train.py, open_clip, timm's ViT or MoCo v3's own code.

    text: whether captions will be encoded. checkpoint: the content of `path`, if already loaded.
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
            words = len(_weights(checkpoint).get("token_embedding.weight", [0]))
            if text:
                tokenizer = _tokenizer(path, checkpoint.get("tokenizer"), vocab)
                words = tokenizer.vocab_size
            quick_gelu = quick_gelu or "input_resolution" in _weights(checkpoint)  # trained by OpenAI
            model = clip_model.create(arch, image_size or 224, words, quick_gelu=quick_gelu)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    load_weights(model, path, checkpoint)
    return model.eval(), tokenizer


def load_weights(model, path, checkpoint=None):
    """Load weights of train.py, open_clip, timm or MoCo v3 -> name of their tokenizer, or None."""
    checkpoint = checkpoint or load_checkpoint(path)
    found = _weights(checkpoint)
    weights = {name: weight for name, weight in found.items() if name not in NO_WEIGHTS}
    if isinstance(model, moco.MoCo) and not any(name.startswith("base_encoder.") for name in weights):
        # timm's ViT is the backbone alone: start both encoders from it, keep projector and predictor
        backbone = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
        weights = {k: v for k, v in model.state_dict().items() if ".head." in k or k.startswith("predictor.")}
        weights |= {f"{side}_encoder.{k}": v for side in ("base", "momentum") for k, v in backbone.items()}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        wanted = f"{model.arch} at {model.image_size} px"
        raise UserError(f"{path}: its weights do not fit {wanted} ({reason})") from None
    if "input_resolution" in found and not model.quick_gelu:
        warnings.warn(f"{path}: trained with QuickGELU by OpenAI; this model has GELU", stacklevel=2)
    return checkpoint.get("tokenizer")


def _weights(checkpoint):
    """Return the state dict in a checkpoint, under the names of an unwrapped model."""
    wrapped = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    weights = {}
    for name, weight in wrapped.items() if isinstance(wrapped, dict) else []:
        weights[".".join(part for part in str(name).split(".") if part not in WRAPPERS)] = weight
    return weights


def _tokenizer(path, trained_with, vocab):
    if trained_with is None and not vocab:  # an open_clip state dict does not name its tokenizer
        raise UserError(f"{path}: which tokens? give --vocab (or --vocab hashed, if exported from here)")
    tokenizer = tokenizer_for(vocab)
    if trained_with not in (None, tokenizer.name):
        hint = "give its --vocab" if trained_with.startswith("bpe") else "leave --vocab out"
        raise UserError(f"{path}: trained with tokenizer {trained_with!r}, not {tokenizer.name!r}: {hint}")
    return tokenizer


# ---------------------------------------------------------------- features


@torch.no_grad()
def image_features(model, source, device, *, encode=None, ids=None, resize=None, batch_size=None, workers=0):
    """(len(ids), d) float32 features of a source's pictures (ids: all), on the CPU; ranks share the work.

    resize: crop and interpolation of `data.eval_transform`; default: the model's crop, bicubic.
    """
    encode, batch_size = encode or model.features, batch_size or 256
    rank, world = _ranks()
    ids = range(len(source)) if ids is None else ids
    resize = resize or dict(crop=model.eval_crop, interpolation=InterpolationMode.BICUBIC)
    pictures = data.Pictures(source, data.eval_transform(model.image_size, **resize))
    mine = np.array_split(ids, world)[rank].tolist()
    options = dict(num_workers=workers, pin_memory=device.type == "cuda")
    parts = [torch.empty(0)]  # a rank may get no picture at all
    for _, images in shown(DataLoader(pictures, batch_size, sampler=mine, **options), "batches of images"):
        parts.append(encode(model.normalize(images.to(device, non_blocking=True))).float().cpu())
    everyone = [torch.cat(parts)]
    if world > 1:
        everyone *= world
        dist.all_gather_object(everyone, everyone[rank])
    return torch.cat(everyone)


@torch.no_grad()
def text_features(model, tokenizer, texts, device, batch_size=256):
    """Unit features (len(texts), d), float32, on the CPU."""
    parts = []
    for start in shown(range(0, len(texts), batch_size), "batches of texts"):
        tokens = data.pad([tokenizer(text) for text in texts[start : start + batch_size]])
        features = model.encode_text(tokens.to(device))
        parts.append(F.normalize(features.float(), dim=-1).cpu())
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

    classnames: names in the order of the classes; "imagenet": torchvision's; None: the folders' own, or
    torchvision's if these are ImageNet's 1000 wnids. wnids: ImageNet's 1000, in order.
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
        raise UserError(f"--classnames has {len(names)} names, for {len(folders)} classes (or give --wnids)")
    class_labels(source, folders)  # fail early on unknown classes, or on a single one
    return names, folders


def accuracy(scores, labels, ranked=None):
    """(N, classes) scores -> top-1, top-5 and balanced accuracy, n. ranked: the only classes that compete."""
    if ranked is not None:
        scores = torch.full_like(scores, -math.inf).index_copy_(1, ranked, scores[:, ranked])
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # (N, 5)
    seen = labels.bincount()
    per_class = labels.bincount(hits[:, 0].double())[seen > 0] / seen[seen > 0]
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(1).double().mean().item()
    return {"top1": top1, "top5": top5, "balanced": per_class.mean().item(), "n": len(labels)}


# ---------------------------------------------------------------- protocols that train nothing, or one layer


def zeroshot_classifier(model, tokenizer, source, names, device):
    """(classes, d) unit vectors: for each class the mean of its prompts' unit embeddings."""
    prompts = [template.replace("{}", name) for name in names for template in source.templates]
    features = text_features(model, tokenizer, prompts, device)
    return F.normalize(features.unflatten(0, (len(names), -1)).mean(1), dim=-1)


def zeroshot(model, tokenizer, source, device, *, classnames=None, wnids=None, **loading):
    """CLIP: nearest prompt of each class -> dict of shares. classnames, wnids: see `zeroshot_classes`."""
    names, folders = zeroshot_classes(source, classnames, wnids)
    classifier = zeroshot_classifier(model, tokenizer, source, names, device)
    images = F.normalize(image_features(model, source, device, **loading), dim=-1)
    return {"protocol": "zero-shot"} | accuracy(images @ classifier.T, *class_labels(source, folders))


def retrieval(model, tokenizer, source, device, *, split_captions=False, chunk=1024, **loading):
    """CLIP: images by text and texts by image, recall at 1, 5, 10 -> dict of shares.

    An image may have several captions: rows of a CSV with its path, or with split_captions lines. A query
    hits at k if any of its partners is among the k nearest. chunk: queries at a time.
    """
    several = hasattr(source, "same_images")
    firsts, image_of = source.same_images() if several else (None, range(len(source)))
    texts, owners = [], []  # owners: the image of each text
    for i, owner in enumerate(image_of):
        try:
            caption = source.caption(i)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{source.where(i)}: no caption ({error})") from None
        split = [line for line in caption.splitlines() if line.strip()] if split_captions else [caption]
        texts += split
        owners += [owner] * len(split)
    images = F.normalize(image_features(model, source, device, ids=firsts, **loading), dim=-1)
    texts = text_features(model, tokenizer, texts, device)
    numbers, owners = torch.arange(len(images)), torch.tensor(owners)
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


def linear(model, train, test, device, *, protocol="lbfgs", recipe=None, workers=0, **loading):
    """Linear classifier on frozen features -> dict of shares.

    protocol: "sgd", MoCo v3's (recipe: see `train_and_classify`); or "lbfgs", logistic regression on features
    of centre crops, whose L2 penalty is chosen on a tenth of the training data.
    """
    if protocol == "sgd":
        return train_and_classify(model, "sgd", None, train, {"": test}, device, recipe, workers)
    if recipe and any(recipe[name] is not None for name in ("epochs", "lr", "wd")):
        raise UserError("--epochs, --lr and --wd are for --protocol sgd")
    y = torch.as_tensor(train.labels, device=device)
    labels, ranked = class_labels(test, train.classes)
    x = image_features(model, train, device, workers=workers, **loading).to(device)
    z = image_features(model, test, device, workers=workers, **loading).to(device)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / std, (z - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    tried = {}
    for penalty in shown((1e-5, 1e-4, 1e-3, 1e-2, 1e-1), "penalties"):
        probe = _logistic_regression(x[rest], y[rest], len(train.classes), penalty)
        tried[penalty] = (probe(x[held_out]).argmax(1) == y[held_out]).double().mean().item()
    best = max(tried, key=tried.get)
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
        self.head = nn.Linear(model.feature_dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if self.unit:
            self.head.weight.data.copy_(zeroshot_head)
        model.requires_grad_(False)
        if not frozen and isinstance(model, moco.MoCo):  # all but the projector
            model.base_encoder.requires_grad_(True).head.requires_grad_(False)
        elif not frozen:
            model.visual.requires_grad_(True)

    def forward(self, images):
        x = self.model.features(images)
        return self.head(F.normalize(x, dim=-1) if self.unit else x)


class Labelled(data.Samples):
    """Items (id, unreadable id or -1, image, label), augmented by (seed, epoch, id)."""

    def read(self, i):
        return self.transform(self.source.image(i)), int(self.source.labels[i])


def augmentation(protocol, size):
    """-> a transform, picture -> (3, size, size) uint8."""
    how = InterpolationMode.BILINEAR if protocol == "sgd" else InterpolationMode.BICUBIC
    smallest = 0.9 if protocol == "wise-ft" else 0.08
    crop = v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=how)
    if protocol == "wise-ft":
        return v2.Compose([crop, v2.PILToTensor()])
    if protocol == "sgd":
        return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    steps = [v2.RandomHorizontalFlip(), v2.RandAugment(2, 9), v2.PILToTensor(), v2.RandomErasing(0.25)]
    return v2.Compose([crop, *steps])


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
    dataset = Labelled(train, seed)
    dataset.transform = augmentation(protocol, classifier.model.image_size)
    batch_size = min(batch_size, len(dataset)) // world
    drop_last, classes = protocol != "sgd", len(train.classes)
    sampler = DistributedSampler(dataset, world, rank, seed=seed, drop_last=drop_last)
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda")
    loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, **options)
    mix = [v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
    optimizer, module = make_optimizer(classifier, protocol, lr, wd), classifier
    if world > 1:
        module = DistributedDataParallel(classifier, [device.index] if device.type == "cuda" else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision("auto", device) == "bf16")

    torch.manual_seed(hash((seed, rank)) % 2**63)  # for MixUp, CutMix and stochastic depth
    for epoch in range(epochs):
        began, losses = time.monotonic(), torch.zeros((), device=device)
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        classifier.model.train(not classifier.frozen)  # a frozen tower keeps its batch statistics
        for step, (_, _, images, labels) in enumerate(shown(loader, f"epoch {epoch}, steps")):
            rate = learning_rate(protocol, epoch * len(loader) + step, len(loader), epochs, lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            images = classifier.model.normalize(images)
            if protocol == "deit":
                images, labels = v2.RandomChoice(mix)(images, labels)
            with autocast:
                logits = module(images)
            smoothing = 0.1 if protocol == "deit" else 0.0
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            if not classifier.frozen:
                nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            losses += loss.detach()
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


def finetune(model, tokenizer, train, test, device, *, classnames, test_data, recipe, workers=0, out=None):
    """Train the image tower and a classifier: CLIP as wise-ft does, MoCo as DeiT does -> dict of shares.

    test_data: more sources to classify, by name. recipe, out: see `train_and_classify`.
    """
    protocol, head = "deit", None
    if tokenizer is not None:  # the head starts from the zero-shot weights
        names, folders = zeroshot_classes(train, classnames)
        names = [names[folders.index(folder)] for folder in train.classes]
        head = zeroshot_classifier(model, tokenizer, train, names, device) * model.logit_scale.exp().item()
        protocol = "wise-ft"
    return train_and_classify(
        model, protocol, head, train, {"": test} | test_data, device, recipe, workers, out
    )


def train_and_classify(model, protocol, head, train, tests, device, recipe, workers=0, out=None):
    """Train a classifier -> its accuracy on the sources `tests`, by name; on "" at the top level.

    head: its first weights, or None. recipe: seed, and what differs from RECIPES. out: file to write.
    """
    labels = {name: class_labels(source, train.classes) for name, source in tests.items()}
    if out and not os.access(os.path.dirname(out) or ".", os.W_OK):
        raise UserError(f"--out {out}: its folder cannot be written")
    given = {name: value for name, value in recipe.items() if value is not None}
    recipe = RECIPES[protocol] | given
    if protocol != "wise-ft" and "lr" not in given:
        recipe["lr"] *= min(recipe["batch_size"], len(train)) / RECIPES[protocol]["batch_size"]
    torch.manual_seed(recipe["seed"])
    classifier = Classifier(model, len(train.classes), protocol == "sgd", head).to(device)
    train_classifier(classifier, train, protocol, device, workers=workers, **recipe)
    if out and is_first_rank():
        state = export(model) | {f"head.{k}": v for k, v in classifier.head.state_dict().items()}
        _write(out, lambda file: torch.save(state, file))
    resize, scores = LINCLS_RESIZE if protocol == "sgd" else None, {}
    for name, source in tests.items():
        options = dict(encode=classifier.eval(), resize=resize, workers=workers)
        scores[name] = accuracy(image_features(model, source, device, **options), *labels[name])
    result = {"protocol": protocol} | scores.pop("")
    return result | ({"test": scores} if scores else {})


# ---------------------------------------------------------------- weights for others, coresets


def export(model):
    """State dict under others' names: open_clip's for CLIP; timm's ViT, without a head, for MoCo."""
    if model.arch in moco.ARCHS:
        backbone = model.base_encoder.state_dict()
        return {name: weight for name, weight in backbone.items() if not name.startswith("head.")}
    return model.state_dict()


WARNING = """\
WARNING: this model reads hashed words. open_clip loads it silently, but its tokenizer does not match, so that
accuracy will be at chance. Give the model these tokens:
    import clip_model, torch, torch.nn.functional as F
    words = clip_model.HashedWords()
    tokens = torch.stack([F.pad(torch.from_numpy(words(text)), (0, 77))[:77] for text in texts])"""


def run_export(checkpoint, arch, image_size, quick_gelu, vocab, out):
    """Write weights for open_clip or timm."""
    loaded = load_checkpoint(checkpoint)
    model, _ = load_model(checkpoint, arch, vocab, image_size, quick_gelu, False, loaded)
    tokenizer, state = loaded.get("tokenizer"), export(model)
    _write(out, lambda file: torch.save(state, file))
    if tokenizer == clip_model.HashedWords.name:
        print(WARNING)
    return {"out": out, "tensors": len(state), "tokenizer": tokenizer}


def run_coreset(runs, prune, out):
    """Write the ids that a static coreset keeps, and print how much the runs agree (Sect. 4.3)."""
    checkpoints = [load_scanned(run) for run in runs]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        if checkpoint["data"] != checkpoints[0]["data"]:
            raise UserError(f"{run} was trained on other data than {runs[0]}: no coreset of both")
    states = [checkpoint["scan"] for checkpoint in checkpoints]
    kept = coreset(states, prune)
    _write(out, lambda file: np.save(file, kept.numpy()))

    groups = [[i, j] for i in range(len(runs)) for j in range(i + 1, len(runs))]
    if len(runs) > 2:
        groups.append(list(range(len(runs))))
    pruned, overlaps = torch.stack([pruned_set(state, prune) for state in states]), []
    # IoU of the kept and of the pruned sets, each with that of random sets (Table 5)
    for group in groups:
        row = {"runs": [runs[k] for k in group]}
        for kind, rho, sets in (("kept", 1 - prune, ~pruned[group]), ("pruned", prune, pruned[group])):
            row[kind] = round(sets.all(0).sum().item() / max(sets.any(0).sum().item(), 1), 4)
            row[f"{kind}_chance"] = round(rho ** len(sets) / max(1 - (1 - rho) ** len(sets), 1e-12), 4)
        print("overlap (IoU):", row)
        overlaps.append(row)
    return {"out": out, "kept": len(kept), "prune": prune, "overlap": overlaps}


def load_scanned(path):
    """Load the checkpoint of a run that has marked samples."""
    checkpoint = load_checkpoint(path)
    if not {"scan", "data", "args"} <= set(checkpoint) or not checkpoint["scan"]["counts"].any():
        raise UserError(f"{path}: not a run of train.py that has finished a preparation epoch")
    return checkpoint


def _write(path, write):
    if not path:
        raise UserError("--out: say which file to write")
    content = io.BytesIO()
    write(content)  # not to the file: torch.save does not say that a disk is full
    try:
        with open(path, "wb") as file:
            file.write(content.getbuffer())
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None


# ---------------------------------------------------------------- the command line


def commands():
    """-> options of every flag; by name, each command's function and flags. A new evaluation needs a row."""
    default = {k: ", ".join(f"{r[k]:g} ({name})" for name, r in RECIPES.items()) for k in RECIPES["sgd"]}
    kinds = "shapes[:N], tar shards, .csv/.tsv, class folders, cifar10[:DIR]"
    flags = {
        "--checkpoint": dict(required=True, help="folder of a run, its last.pt, or a state dict of others"),
        "--arch": dict(choices=[*clip_model.ARCHS, *moco.ARCHS], help="of a state dict of others"),
        "--image-size": dict(type=natural, help="of a state dict of others; default: 224"),
        "--quick-gelu": dict(action="store_true", help="for weights trained by OpenAI"),
        "--vocab": dict(help="bpe_simple_vocab_16e6.txt.gz, if the model was trained with it"),
        "--data": dict(help=f"{kinds}; default: the run's, or shapes"),
        "--val-data": dict(help="what to classify; --data: to learn from; default: the run's, or shapes"),
        "--img-key": dict(help="column of a CSV; default: the run's, or filepath"),
        "--caption-key": dict(help="column of a CSV; default: the run's, or title"),
        "--label-key": dict(help="column of a CSV, or key in the .json of tar shards; default: the run's"),
        "--templates": dict(type=templates, help="file, or a template, {} for the name; default: the run's"),
        "--download": dict(action="store_true", help="fetch CIFAR if it is missing"),
        "--workers": dict(type=count, default=loading_processes(), help="loading processes per rank"),
        "--device": dict(choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda or cpu"),
        "--batch-size": dict(type=natural, help=f"256 per rank; training, global: {default['batch_size']}"),
        "--epochs": dict(type=natural, help=f"default: {default['epochs']}"),
        "--lr": dict(type=finite, help=f"peak; default: {default['lr']}; deit, sgd: times batch / 1024"),
        "--wd": dict(type=finite, help=f"weight decay; default: {default['wd']}"),
        "--seed": dict(type=count, default=0, help="of the order, the augmentation and a new head"),
        "--classnames": dict(type=classnames, help="file, one a line, in order; imagenet: torchvision's"),
        "--wnids": dict(type=wnids, help="the 1000: file, one a line, in order, or an ImageNet tree"),
        "--split-captions": dict(action="store_true", help="each line is a caption"),
        "--k": dict(type=natural, default=20, help="neighbours that vote"),
        "--protocol": dict(choices=["lbfgs", "sgd"], default="lbfgs", help="fit exactly, or as MoCo v3 does"),
        "--test-data": dict(nargs="+", default=[], help="more to classify: ImageNet-V2, -R"),
        "runs": dict(nargs="+", help="folders of runs over the same data, or checkpoints"),
        "--prune": dict(type=share, required=True, help="share of the data to leave out"),
        "--out": dict(help="file to write"),
    }
    model = "--checkpoint --arch --image-size --quick-gelu --vocab"
    keys = "--img-key --caption-key --label-key --templates --download --workers --device --batch-size"
    training = f"{model} --data --val-data {keys} --epochs --lr --wd --seed"
    return flags, {
        "zeroshot": (zeroshot, f"{model} --data {keys} --classnames --wnids"),
        "retrieval": (retrieval, f"{model} --data {keys} --split-captions"),
        "knn": (knn, f"{model} --data --val-data {keys} --k"),
        "linear": (linear, f"{training} --protocol"),
        "finetune": (finetune, f"{training} --classnames --test-data --out"),
        "export": (run_export, f"{model} --out"),
        "coreset": (run_coreset, "runs --prune --out"),
    }


def parse_args(argv=None):
    parser, (flags, rows) = Parser(description=__doc__), commands()
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (function, taken) in rows.items():
        about = function.__doc__.partition("\n")[0].replace(" -> dict of shares.", "")
        command = subparsers.add_parser(name, help=about, description=about)
        for flag in taken.split():
            command.add_argument(flag, **flags[flag])
    return parser.parse_args(argv)


def run(args):
    """Call a command's function. Fill its parameters by name: with what is opened here, or flags."""
    function, _ = commands()[1][args.command]
    wanted, values = inspect.signature(function).parameters, vars(args)
    if "model" not in wanted:
        return function(**{name: values[name] for name in wanted})
    checkpoint, learns = load_checkpoint(args.checkpoint), "train" in wanted
    origin = args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu
    model, tokenizer = load_model(*origin, "tokenizer" in wanted, checkpoint)
    if tokenizer is None and {"tokenizer", "source"} <= set(wanted):
        raise UserError(f"{args.command} needs captions, which {model.arch} never learnt: use knn or linear")
    own = dict(data="shapes", val_data="shapes", img_key="filepath", caption_key="title")
    own |= run_flags(checkpoint)
    if not learns:
        own["data"] = own["val_data"] or "shapes"
    for name in ("data", "val_data", "img_key", "caption_key", "label_key", "templates"):
        if values.get(name) is None:  # not given: as in the run
            values[name] = own.get(name)
    if learns and args.val_data is None:
        raise UserError("--val-data: say what to classify")
    device = start_ranks(args.device)[2]
    values |= dict(model=model.to(device), tokenizer=tokenizer, device=device)
    if learns:
        values["train"] = open_source(args, model, args.data, train=True)
        values["test"] = open_source(args, model, args.val_data)
    else:
        values["source"] = open_source(args, model, args.data, captions=function is retrieval)
    if "test_data" in wanted:
        values["test_data"] = {spec: open_source(args, model, spec) for spec in args.test_data}
    if "recipe" in wanted:
        values["recipe"] = {name: values[name] for name in ("epochs", "batch_size", "lr", "wd", "seed")}
    names = [*wanted, "batch_size", "workers"] if "loading" in wanted else wanted
    return function(**{name: values[name] for name in names if name in values})


def open_source(args, model, spec, train=False, captions=False):
    """Open the source of `spec`; it must have classes, unless its captions are wanted."""
    keys = dict(image_key=args.img_key, caption_key=args.caption_key, label_key=args.label_key)
    keys |= dict(captions=captions, download=args.download, templates=args.templates)
    source = data.open_source(spec, train=train, size=model.image_size, **keys)
    if not captions and source.labels is None:
        raise UserError(f"{spec}: no classes, or only one; use class folders, or name its --label-key")
    if is_first_rank():
        print(f"{spec}: {source}")
    return source


def lines(path):  # this and the following are argparse types
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
        if "device" not in args and not is_first_rank():
            return  # export and coreset
        result = run(args)
        if is_first_rank() and "protocol" in result:
            where = f"{args.val_data}, learnt from {args.data}" if "train" in args else args.data
            print(f"{result['protocol']} of {args.checkpoint} on {where}")
            print_scores(result)
        if is_first_rank():
            print(json.dumps(result))
    except UserError as error:
        fail("eval.py", str(error).strip().splitlines()[-1].split("UserError: ")[-1])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------- what train.py shares: ranks and messages

TIMEOUT = timedelta(minutes=30)  # of a collective operation


def start_ranks(kind):
    """-> rank, world size, device; from torchrun's environment, or one process without it."""
    rank, world, local = 0, 1, 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = ", ".join(name for name in names if not os.environ.get(name))
        if missing:
            raise UserError(f"WORLD_SIZE is set, but no {missing}: start ranks with torchrun, or unset it")
        rank, world, local = (int(os.environ[name]) for name in names[:3])
    device = torch.device("cpu")
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        if local >= torch.cuda.device_count():
            raise UserError(f"rank {rank} finds no GPU {local}: start one rank per GPU, or use --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        # After a restart by torchrun (--max-restarts) its store still holds the addresses of the dead ranks.
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
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


def shown(steps, name):
    """Iterate over `steps`, with a line that overwrites itself: on a terminal, on rank 0."""
    for k, step in enumerate(steps, 1):
        yield step
        if is_first_rank() and sys.stderr.isatty():  # \033[K clears the line
            print(f"\r\033[K{name} {k:,}/{len(steps):,}", end="\r", file=sys.stderr, flush=True)


def one_line_warnings(program):
    """From here on print warnings as errors are printed, one line on rank 0, and any path."""
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # paths may not be UTF-8

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
