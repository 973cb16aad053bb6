"""Evaluate a CLIP checkpoint: one of train.py's, or a state dict of open_clip.

    python eval.py zeroshot  --checkpoint runs/x/last.pt                          # the built-in shapes
    python eval.py zeroshot  --checkpoint runs/x/last.pt --data imagenet/val      # class folders
    python eval.py retrieval --checkpoint runs/x/last.pt --data 'val-{00000..00003}.tar'
    torchrun --nproc_per_node 8 eval.py ...                                       # the same, shared out

Prints a table and, as its last line, one JSON object: shares (not percent) and n, the images evaluated.
ImageNet's names (--classnames imagenet) are torchvision's, and fit folders in the order of the 1000 wnids. A
state dict of open_clip needs --arch, its vocabulary --vocab, and OpenAI's own weights --quick-gelu.
"""

import argparse
import json
import os
import pickle
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

import clip_model
import data
from data import DataError


class EvalError(Exception):
    """One line for the user."""


def tokenizer_for(vocab):
    """CLIP's byte-pair encoding from a file; hashed words without one, or for "hashed"."""
    return data.BPE(vocab) if vocab and vocab != "hashed" else data.HashedWords()


def load_model(path, arch=None, vocab=None, image_size=None, quick_gelu=False):
    """A checkpoint of train.py or an open_clip state dict -> (model in eval mode, tokenizer)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise EvalError(f"{path}: {error.strerror or error}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError):
        raise EvalError(f"{path}: not a checkpoint that loads with weights_only=True") from None
    tokenizer = tokenizer_for(vocab)
    if isinstance(checkpoint, dict) and {"model", "args", "tokenizer"} <= set(checkpoint):
        weights, args = checkpoint["model"], checkpoint["args"]
        arch, image_size = args["arch"], args["image_size"]
        if checkpoint["tokenizer"] != tokenizer.name:
            raise EvalError(
                f"{path} was trained with the tokenizer {checkpoint['tokenizer']!r}, not {tokenizer.name!r}: "
                + ("give its --vocab" if checkpoint["tokenizer"].startswith("bpe") else "leave --vocab out")
            )
    elif isinstance(checkpoint, dict):
        if not arch:
            raise EvalError(
                f"{path}: not a checkpoint of train.py; for an open_clip state dict give --arch (and --vocab)"
            )
        if not vocab:  # nothing in it says what its tokens are
            raise EvalError(
                f"{path}: an open_clip state dict needs --vocab (or --vocab hashed, if exported from here)"
            )
        weights = {k.removeprefix("module."): v for k, v in checkpoint.get("state_dict", checkpoint).items()}
        image_size = image_size or 224
    else:
        raise EvalError(f"{path}: holds no state dict")
    model = clip_model.create(arch, image_size, tokenizer.vocab_size, quick_gelu=quick_gelu)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise EvalError(f"{path}: its weights do not fit {arch} at {image_size} px ({reason})") from None
    return model.eval(), tokenizer


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
def image_features(encode, source, size, device, batch_size=256, workers=0, mean_std=data.CLIP_MEAN_STD):
    """Unit features (N, d) of all pictures of a source, float32, on the CPU; the ranks share the work."""
    rank, world = _ranks()
    mine = range(rank, len(source), world)
    pictures = data.Pictures(source, data.eval_transform(size))
    loader = DataLoader(
        pictures, batch_size, sampler=mine, num_workers=workers, pin_memory=device.type == "cuda"
    )
    parts = []
    for _, images in loader:
        images = data.normalize(images.to(device, non_blocking=True), mean_std)
        parts.append(F.normalize(encode(images).float(), dim=-1))
        progress(f"images {min(world * batch_size * len(parts), len(source)):,} / {len(source):,}")
    progress("")
    return _interleave(torch.cat(parts) if parts else None, len(source), device)


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


# ---------------------------------------------------------------- protocols


def zeroshot(model, tokenizer, source, device, *, classes=None, templates=None, batch_size=256, workers=0):
    """Top-1 and top-5 of the classes whose averaged prompt embeddings are nearest -> dict of shares."""
    classes = classes or source.classes
    templates = templates or getattr(source, "templates", ["a photo of a {}."])
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    per_class = text_features(model, tokenizer, prompts, device).view(len(classes), len(templates), -1)
    classifier = F.normalize(per_class.mean(1), dim=-1)  # (classes, d)
    images = image_features(model.encode_image, source, model.image_size, device, batch_size, workers)
    labels = torch.as_tensor(source.labels)
    top = torch.cat([(part @ classifier.T).topk(min(5, len(classes))).indices for part in images.split(8192)])
    hits = top == labels[:, None]  # (N, 5)
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "n": len(labels),
    }


def retrieval(model, tokenizer, source, device, *, batch_size=256, workers=0, chunk=1024):
    """Recall at 1, 5, 10 in both directions, in chunks; image i belongs to text i -> dict of shares."""
    images = image_features(model.encode_image, source, model.image_size, device, batch_size, workers)
    texts = text_features(model, tokenizer, [source.caption(i) for i in range(len(source))], device)
    result = {}
    for name, queries, keys in (("i2t", images, texts), ("t2i", texts, images)):
        found = torch.cat([(q @ keys.T).topk(min(10, len(keys))).indices for q in queries.split(chunk)])
        hits = found == torch.arange(len(queries))[:, None]  # (N, 10)
        result |= {f"{name}_r{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}
    return result | {"n": len(images)}


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("zeroshot", "retrieval"):
        p = commands.add_parser(name)
        p.add_argument("--checkpoint", required=True, help="last.pt of a run, or an open_clip state dict")
        p.add_argument(
            "--data", default="shapes" if name == "zeroshot" else None, required=name == "retrieval"
        )
        p.add_argument("--arch", choices=list(clip_model.ARCHS), help="of an open_clip state dict")
        p.add_argument("--image-size", type=int, help="of an open_clip state dict (224)")
        p.add_argument("--quick-gelu", action="store_true", help="for OpenAI's own weights")
        p.add_argument("--vocab", help="bpe_simple_vocab_16e6.txt.gz, if the model was trained with it")
        p.add_argument("--batch-size", type=int, default=256)
        p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1) - 1)
        p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    commands.choices["zeroshot"].add_argument(
        "--classnames", help='one a line, or "imagenet" (torchvision\'s names)'
    )
    commands.choices["zeroshot"].add_argument("--templates", help="one a line, {} for the name")
    for key in ("img", "caption"):
        commands.choices["retrieval"].add_argument(
            f"--{key}-key", default={"img": "filepath", "caption": "title"}[key]
        )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.workers < 0:
        parser.error(f"--workers must be at least 0, got {args.workers}")
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


def run(args):
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    if cuda and not torch.cuda.is_available():
        raise EvalError("--device cuda: no GPU here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    model, tokenizer = load_model(args.checkpoint, args.arch, args.vocab, args.image_size, args.quick_gelu)
    model.to(device)
    keys = dict(image_key=args.img_key, caption_key=args.caption_key) if args.command == "retrieval" else {}
    source = data.open_source(args.data, train=False, size=model.image_size, **keys)
    options = dict(batch_size=args.batch_size, workers=args.workers)
    if args.command == "zeroshot":
        classes = source.classes
        if source.labels is None:
            raise EvalError(
                f"--data {args.data}: zero-shot needs labels, as in class folders; for pairs use retrieval"
            )
        if args.classnames == "imagenet":
            from torchvision.models import ViT_B_16_Weights

            classes = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
        elif args.classnames:
            classes = _lines(args.classnames, "classnames")
        if len(classes) != len(source.classes):
            raise EvalError(f"--classnames has {len(classes)} names, the data {len(source.classes)} classes")
        templates = _lines(args.templates, "templates") if args.templates else None
        if templates and not all("{}" in template for template in templates):
            raise EvalError(f"--templates {args.templates}: every line needs a {{}} for the class name")
        result = zeroshot(model, tokenizer, source, device, classes=classes, templates=templates, **options)
    else:
        result = retrieval(model, tokenizer, source, device, **options)
    if _ranks()[0] == 0:
        print(f"{args.command} of {args.checkpoint} on {args.data}")
        for name, value in result.items():
            print(f"  {name:<8} {value:>8,}" if name == "n" else f"  {name:<8} {value:8.2%}")
        print(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (EvalError, DataError, ValueError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"eval.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
