"""Images and captions by random access: a sample has an int64 id, its position, and is read when asked for.

A source says `len`, `image(id)`, `caption(id)`, `where(id)`, `fingerprint()`, and what is known of it:
`truth` (planted faults), `classes` and `labels`, `skipped` (files left out). `open_source` picks one from a
--data argument:

    shapes:N[,zipf]              captioned pictures, drawn on demand, with planted faults   Shapes
    cc3m/{00000..00331}.tar      img2dataset / webdataset shards; globs; A::B joins sets    Shards
    pairs.csv, pairs.tsv         columns filepath and title                                 Table
    DIR/                         class folders, as in ImageFolder                           Tree
    cifar10:DIR, cifar100:DIR    CIFAR as torchvision keeps it in DIR                       Cifar

Two map-style datasets read a source: `Pairs` gives images and tokens (CLIP), `Views` two crops of each image
(MoCo). Nothing in them ever changes, and pruning lives in the sampler alone, so that pruned samples cost no
read and no decoding. Needs torch, torchvision, numpy and Pillow.
"""

import codecs
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import stat
import sys
import tarfile
import time
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2


class UserError(Exception):
    """What is wrong, where, and what to do: one line for the user."""


# ---------------------------------------------------------------- bytes to pictures and text


# what Pillow may take bytes for: of its other formats some start programs (EPS), some match any text
_FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF".split()
EXTENSIONS = "jpg jpeg png webp gif bmp tif tiff ppm pgm avif".split()  # of the files that are pictures
_MOST_PIXELS = 1024**3 // 12  # of a 256 MB picture
Image.MAX_IMAGE_PIXELS = None  # `decode` refuses larger ones; Pillow would print a warning before
Image.core.set_blocks_max(4)  # else Pillow returns its memory after each picture: a quarter of decoding


def decode(data, draft=None):
    """Bytes of an image file -> RGB picture, upright. ValueError or OSError for what is none.

    Alpha is laid on white; 16-bit grey is scaled to 8; of animations the first frame. draft: a JPEG may be
    decoded at 1/2, 1/4 .. of its size, if its sides stay at least `draft`.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (UnidentifiedImageError, KeyError):  # KeyError: a Pillow without AVIF
        raise ValueError(f"no picture, but {len(data):,} bytes: {data[:12]!r}") from None
    short, long = sorted(picture.size)
    if short * long > _MOST_PIXELS or long > 1000 * short:  # of a line, eval_transform would make a giant
        raise ValueError(f"{picture.width} x {picture.height} pixels")
    # Damage that Pillow draws without a word: a wrong checksum; zeros that a cut download or a crash left
    if picture.format == "PNG":
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()
    elif picture.format in ("JPEG", "MPO") and data.endswith(bytes(8)):
        if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise ValueError("a JPEG that ends in zeros")
    if draft:
        picture.draft("RGB", (draft, draft))
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        top = 65535 if picture.mode.startswith("I") else max(float(values.max()), 1e-6)
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


_LOG_RATIOS = math.log(3 / 4), math.log(4 / 3)  # of a crop's width to its height


class RandomCrop:
    """torchvision's RandomResizedCrop, with the same draws: RGB picture -> (3, size, size) uint8.

    torch resizes four times as fast as Pillow (of its values some differ, by a grey level or two), and
    torchvision's own way of drawing takes four times as long.
    """

    def __init__(self, size, smallest, mode="bicubic"):
        self.size, self.areas, self.mode = (size, size), (smallest, 1.0), mode
        self.draft = math.ceil(size / math.sqrt(smallest))  # so large, the smallest crop still has `size`

    def __call__(self, picture):
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, height, width)
        top, left, h, w = self.box(picture.height, picture.width)
        crop = image[None, :, top : top + h, left : left + w]
        return F.interpolate(crop, self.size, mode=self.mode, antialias=True)[0]

    def box(self, height, width):
        """A random part of a picture: top, left, height, width."""
        draw = torch.empty(1)
        for _ in range(10):
            area = height * width * draw.uniform_(*self.areas).item()
            ratio = draw.uniform_(*_LOG_RATIOS).exp_().item()
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = (torch.randint(room + 1, (1,)).item() for room in (height - h, width - w))
                return top, left, h, w
        ratio = min(max(width / height, 3 / 4), 4 / 3)  # the middle, as large as it may be
        h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
        return (height - h) // 2, (width - w) // 2, h, w


def eval_transform(size, crop=1.0, interpolation=v2.InterpolationMode.BICUBIC):
    """The middle of a picture (3, size, size) uint8: `crop` is its share of the shorter side."""
    resize = v2.Resize(round(size / crop), interpolation=interpolation)
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


_LONGEST_CAPTION = 1 << 12  # bytes or characters: the 77 tokens take a few hundred, and BPE squares the rest


def clean(caption):
    """A caption, cut to what a tokenizer may need. ValueError for what is no text: NULs, half a character."""
    caption = caption[:_LONGEST_CAPTION]
    try:
        caption.encode()  # bytes that are not UTF-8 were read as surrogates, which do not encode
    except UnicodeEncodeError as error:
        raise ValueError(f"its caption is not UTF-8 after {caption[: error.start][-20:]!r}") from None
    if "\0" in caption:
        raise ValueError("a NUL in its caption")
    return caption


def pad(tokens):
    """Token arrays -> (b, longest) int64; the text tower is causal, so shorter padding changes nothing."""
    out = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
    for row, ids in zip(out, tokens, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return out


# ---------------------------------------------------------------- sources


class Strings:
    """A list of strings in two arrays: millions of them cost their bytes, and workers share the pages."""

    def __init__(self, strings):
        joined, ends = bytearray(), array("q", [0])
        for string in strings:
            joined += string.encode("utf-8", "surrogateescape")
            ends.append(len(joined))
        self._bytes, self._ends = np.frombuffer(joined, np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i):
        return self._bytes[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogateescape")

    def digest(self):
        return _sha256(self._bytes, self._ends)


def _sha256(*parts):
    """Hex digest of bytes and arrays, one after the other, without a copy of them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _classes(names):
    """Names of the samples' classes -> (classes, sorted, numbers as numbers; labels (N,))."""
    found = {}
    labels = np.fromiter((found.setdefault(name, len(found)) for name in names), np.int32)
    classes = sorted(found, key=int if all(re.fullmatch("[0-9]+", name) for name in found) else None)
    place = {name: k for k, name in enumerate(classes)}
    return classes, np.array([place[name] for name in found])[labels]


@contextlib.contextmanager
def _naming(path):
    """An OSError becomes the user's line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


def _status(path):
    """os.stat of a regular file: who reads a pipe or a device may wait for ever. OSError for all others."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status


class Source:
    """What is known of a source of `images`, if no more is."""

    truth = {}  # name of a planted fault -> mask (N,)
    classes, labels = None, None  # names, and (N,) int
    templates = ["a photo of a {}."]  # captions of a class
    skipped = {}  # extension -> number of files that were left out

    def __len__(self):
        return len(self.images)

    def caption(self, i):
        return self.templates[0].replace("{}", self.classes[self.labels[i]])


_TURN = np.pi / 2
# (radius, shift to the upper right): the first disc in the class's colour, the second in the ground's
_DISCS = {"circle": [(1, 0)], "ring": [(1, 0), (0.6, 0)], "crescent": [(1, 0), (0.85, 0.4)]}
_POLYGONS = {  # corners (radius, angle)
    "triangle": [[(1, 4 * k * _TURN / 3 - _TURN) for k in range(3)]],
    "square": [[(1, (k + 0.5) * _TURN) for k in range(4)]],
    "star": [[(0.42 if k % 2 else 1, (k - 2.5) * np.pi / 5) for k in range(10)]],
    "cross": [[(1, a + b) for b in (-0.25, 0.25, 2 * _TURN - 0.25, 2 * _TURN + 0.25)] for a in (0, _TURN)],
    "diamond": [[(0.55 if k % 2 else 1, k * _TURN) for k in range(4)]],
}


class Shapes(Source):
    """Captioned drawings from (seed, id), of any number and size; 64 classes, colour x shape.

    A tenth of the captions describe another picture (ill-matched), and a tenth of the samples are
    near-duplicates: copies up to pixel noise, four to an original, with the same caption. `truth` holds both
    masks. zipf: the k-th most frequent class is 1/k as frequent as the first, as in data from the web.
    Evaluation pictures (train=False) are clean, balanced over the classes, and drawn from other seeds.
    """

    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
    colours = {
        "red": (214, 39, 40), "green": (44, 150, 44), "blue": (31, 80, 200), "yellow": (240, 210, 40),
        "purple": (148, 60, 180), "orange": (255, 127, 14), "pink": (245, 140, 190), "brown": (120, 70, 40),
    }  # fmt: skip
    grounds = {"white": (250, 250, 250), "grey": (170, 170, 170), "black": (20, 20, 20)}
    classes = [f"{colour} {shape}" for colour, shape in itertools.product(colours, shapes)]
    templates = [f"a {{}} on {ground}" for ground in grounds]

    def __init__(self, n, size=64, seed=0, train=True, ill_matched=0.1, duplicates=0.1, zipf=False):
        self.n, self.size, self.seed, self.train = n, size, seed, train
        self.zipf = zipf and train
        frequency = 1 / np.arange(1, len(self.classes) + 1)
        self.cumulative = np.cumsum(frequency / frequency.sum())
        self.by_frequency = np.random.default_rng(8).permutation(len(self.classes))  # alike for every seed
        self.drawn_as = np.arange(n)  # the id whose drawing and caption a sample takes
        ill, copies = np.zeros(n, bool), np.zeros(n, bool)
        if train:
            order = np.random.default_rng([seed, 1]).permutation(n)
            ill[order[: int(ill_matched * n)]] = True
            rest = order[int(ill_matched * n) :]
            groups = int(duplicates * n) // 4
            copies[rest[groups : 5 * groups]] = True
            self.drawn_as[rest[groups : 5 * groups]] = np.tile(rest[:groups], 4)
        self.truth = {"ill_matched": ill, "redundant": copies} if train else {}

    def __len__(self):
        return self.n

    def _attributes(self, i, salt=0):
        """(class, ground), all that the caption says; and the generator for what it does not."""
        rng = np.random.default_rng([self.seed, 2 + self.train, int(self.drawn_as[i]), salt])
        if self.zipf:
            label = int(self.by_frequency[min(np.searchsorted(self.cumulative, rng.random()), 63)])
        else:
            label = int(rng.integers(len(self.classes))) if self.train else int(i) % len(self.classes)
        return label, list(self.grounds)[rng.integers(len(self.grounds))], rng

    @functools.cached_property
    def labels(self):
        return np.fromiter((self._attributes(i)[0] for i in range(self.n)), np.int64, self.n)

    def caption(self, i):
        label, ground, _ = self._attributes(i)
        if self.train and self.truth["ill_matched"][i]:  # describes another picture, of another class
            others = (self._attributes(i, salt) for salt in itertools.count(1))
            label, ground, _ = next(other for other in others if other[0] != label)
        return f"a {self.classes[label]} on {ground}"

    def image(self, i, draft=None):
        label, ground, rng = self._attributes(i)
        shape = self.shapes[label % len(self.shapes)]
        colour = list(self.colours.values())[label // len(self.shapes)]
        angle, radius = rng.uniform(-0.1, 0.1), rng.uniform(0.32, 0.4)
        centre = 0.5 + rng.uniform(-0.04, 0.04, 2)
        canvas = 2 * self.size  # drawn twice as large and reduced, for smooth edges
        picture = Image.new("RGB", (canvas, canvas), self.grounds[ground])
        draw = ImageDraw.Draw(picture)
        for k, (r, shift) in enumerate(_DISCS.get(shape, [])):
            x, y = (centre + radius * np.array([shift, -shift])) * canvas
            r = r * radius * canvas
            draw.ellipse((x - r, y - r, x + r, y + r), fill=self.grounds[ground] if k else colour)
        for corners in _POLYGONS.get(shape, []):
            r, a = np.array(corners).T
            xy = centre + (radius * r * np.array([np.cos(a + angle), np.sin(a + angle)])).T
            draw.polygon([tuple(p) for p in xy * canvas], fill=colour)
        picture = picture.resize((self.size, self.size), Image.Resampling.BOX)
        rng = np.random.default_rng([self.seed, 4 + self.train, int(i)])
        noise = rng.normal(0, 6, (self.size, self.size, 3))
        return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))

    def where(self, i):
        return f"shapes, id {i}"

    def fingerprint(self):
        drawn_by = f"shapes {self.n} {self.size} {self.seed} {self.train}" + (" zipf" if self.zipf else "")
        return _sha256(drawn_by.encode())


_MOST_OPEN = 128  # tars, of each process
_LARGEST = 1 << 29  # bytes of a picture's file; of a longer one the rest is missing, and no decoder takes it
_PARTS = dict.fromkeys(EXTENSIONS, 0) | {"txt": 1, "json": 2, "cls": 3}  # what a member is, by its extension


class Shards(Source):
    """img2dataset / webdataset tar files, read by position: never extracted, never streamed.

    Each tar is indexed once; the index (byte offsets) is cached under $XDG_CACHE_HOME and belongs to one
    state of the tar. A sample is a run of members of one key: an image (the first), and a .txt or a .json
    with "caption", without which it can't be read. Its class, if any, is in a .cls, or in the .json under
    label_key. Links and folders in a tar are passed over.
    """

    def __init__(self, paths, captions=True, label_key=None):
        self.paths, self.label_key = Strings(paths), label_key
        self.stamps, tables = _index(paths)
        self.first = np.cumsum([0] + [len(table) for table in tables])  # id of each tar's first sample
        # of images, .txt, .json, .cls: (N, 2) int32, offset in blocks of 512 and size, -1 if absent
        parts = (np.concatenate([table[:, k : k + 2] for table in tables]) for k in (0, 2, 4, 6))
        self.parts = [part if (part[:, 1] >= 0).any() else None for part in parts]
        self._files = {}
        if self.parts[0] is None or (captions and self.parts[1] is None and self.parts[2] is None):
            what = "an image and a caption" if captions else "an image"
            raise UserError(f"{paths[0]}: no sample with {what} in {len(paths)} tar file(s)")

    def __len__(self):
        return int(self.first[-1])

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}  # open files stay with their process

    def _shard(self, i):
        """Number of the tar that holds sample i, and the tar, open."""
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        if shard not in self._files:
            if len(self._files) >= _MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            with _naming(self.paths[shard]):
                self._files[shard] = open(self.paths[shard], "rb", buffering=0)
        return shard, self._files[shard]

    def _read(self, i, part, limit=_LARGEST):
        """Bytes of one member, the first `limit` of them; None if the sample has none. part: as in _PARTS."""
        if self.parts[part] is None or self.parts[part][i, 1] < 0:
            return None
        block, size = self.parts[part][i].tolist()
        shard, file = self._shard(i)
        path, size = self.paths[shard], min(size, limit)
        if _stamp(os.fstat(file.fileno())) != self.stamps[shard]:
            raise UserError(f"{path}: changed since it was indexed; start again to index it anew")
        data = _pread(file, size, 512 * block)
        if len(data) < size:
            raise UserError(f"{path}: ends before the member at byte {512 * block}")
        return data

    def image(self, i, draft=None):
        return decode(self._read(i, 0), draft)

    def caption(self, i):
        text = self._read(i, 1, _LONGEST_CAPTION)
        if text is None:
            caption = self.meta(i).get("caption")
            if not isinstance(caption, str):
                raise ValueError('no text under "caption" in its .json')
            return clean(caption)
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")  # what is amiss, `clean` finds
        return clean(decoder.decode(text, final=len(text) < _LONGEST_CAPTION))  # else cut within a character

    def meta(self, i):
        """The sample's JSON, a dict."""
        content = self._read(i, 2, limit=1 << 22)
        if content is None:
            raise ValueError("neither a .txt nor a .json beside it")
        try:
            meta = json.loads(content)
        except ValueError as error:
            raise ValueError(f"its .json can't be read ({error})") from None
        if not isinstance(meta, dict):
            raise ValueError("its .json holds no names and values")
        return meta

    @functools.cached_property
    def _labelled(self):  # when asked for, since every sample is read for it
        if self.label_key or self.parts[3] is not None:
            return _classes(self._label(i) for i in range(len(self)))
        return None, None

    classes = property(lambda self: self._labelled[0])
    labels = property(lambda self: self._labelled[1])

    def _label(self, i):
        try:
            label = self.meta(i).get(self.label_key) if self.label_key else self._read(i, 3, limit=1 << 10)
        except ValueError as error:
            raise UserError(f"{self.where(i)}: {error}") from None
        if isinstance(label, bytes):
            label = label.decode("utf-8", "replace").strip()
        if not isinstance(label, str | int):
            missing = f"{self.label_key!r} in its .json" if self.label_key else ".cls beside it"
            raise UserError(f"{self.where(i)}: no {missing}")
        return str(label)

    def where(self, i):
        shard, file = self._shard(i)
        at = 512 * int(self.parts[0][i, 0])
        name = _pread(file, 100, at - 512).partition(b"\0")[0].decode("utf-8", "replace")
        return f"{self.paths[shard]}, {name} at byte {at}"

    def fingerprint(self):
        names = "\n".join(os.path.basename(path) for path in self.paths)
        parts = (part for part in self.parts if part is not None)
        return _sha256(names.encode(), self.first, *parts)


def _pread(file, size, offset):
    """Bytes of an open file from `offset` on, fewer than `size` at its end alone."""
    if not hasattr(os, "pread"):  # Windows, where workers are not forked and share no position
        file.seek(offset)
        return file.read(size)
    data = b""
    while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
        data += more
    return data


def _stamp(status):
    return status.st_size, status.st_mtime_ns


_MANY_TARS = 16  # new ones, of thousands of samples each: then it pays to start processes


def _index(paths):
    """-> stamp of each tar, and where its samples' parts are: (n, 8) int32 as in Shards.parts.

    Each rank goes through all of them, from a place of its own on, and finds in the cache what another has
    indexed by then: so the ranks share the work, and none waits for another.
    """
    rank, ranks = (int(os.environ.get(name, k)) for name, k in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    start = len(paths) * rank // ranks
    paths = paths[start:] + paths[:start]
    new = sum(not os.path.exists(_cache(path)[1]) for path in paths)
    processes = (os.cpu_count() or 1) // ranks
    pool, found = contextlib.nullcontext(), map(_tar_index, paths)
    alone = sys.platform != "linux" or multiprocessing.current_process().daemon  # which may have no children
    if new >= _MANY_TARS and processes > 1 and not alone:  # forked, as loading processes are
        pool = multiprocessing.get_context("fork").Pool(processes)
        found = pool.imap(_tar_index, paths)
    indexes, samples = [], 0
    due, shown = time.monotonic() + 2, False  # a progress line, if it takes longer
    with pool:
        for done, index in enumerate(found, 1):
            indexes.append(index)
            samples += len(index[1])
            if rank == 0 and (time.monotonic() > due or shown and done == len(paths)):
                due, shown = time.monotonic() + 1, True
                line = f"\rindexing: {done:,} of {len(paths):,} tar files, {samples:,} samples"
                print(line, end="\n" if done == len(paths) else "", file=sys.stderr, flush=True)
    return zip(*indexes[len(paths) - start :], *indexes[: len(paths) - start])


def _cache(path):
    """Stamp of a tar, and the file that keeps the index of the tar in this state."""
    with _naming(path):
        status = _status(path)
    state = f"6 {os.path.realpath(path)} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scan"
    return _stamp(status), folder / _sha256(state.encode())[:32]


def _tar_index(path):
    """-> a tar's stamp, and (n, 8) int32: the parts of its samples, from the cache or from the tar itself."""
    stamp, cache = _cache(path)
    with contextlib.suppress(OSError):
        cached = cache.read_bytes()
        if cached[:32] == hashlib.sha256(cached[32:]).digest():
            return stamp, np.frombuffer(cached[32:], np.int32).reshape(-1, 8)

    with _naming(path), open(path, "rb", buffering=0) as file:
        try:
            try:
                table = _samples(_plain_members(file))
            except ValueError:  # something unusual, or damaged
                table = _samples(_members(file))
        except Exception as error:  # whatever tarfile makes of broken headers
            what = f"not a whole tar file ({str(error) or type(error).__name__})"
            raise UserError(f"{path}: {what}; fetch it again, or leave it out") from None
    with contextlib.suppress(OSError):  # a cache that can't be written only costs time
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(hashlib.sha256(table).digest() + table.tobytes())
        temporary.replace(cache)
    return stamp, table


def _samples(members):
    """(name, offset, size) of a tar's files -> (n, 8) int32, the runs of one key that hold an image."""
    table, last_key = array("i"), None
    for name, offset, size in members:
        start = name.find(".", name.rfind("/") + 1) + 1  # of the extension
        part = _PARTS.get(name[start:].lower()) if start else None
        if part is None:
            continue
        if name[:start] != last_key:
            table.extend([-1] * 8)
            last_key = name[:start]
        at = 2 * part - 8  # in the last row
        if table[at + 1] < 0:
            table[at], table[at + 1] = offset // 512, min(size, _LARGEST)
    table = np.array(table, np.int32).reshape(-1, 8)
    return table[table[:, 1] >= 0]


# A header as tar programs write it for files, links and folders with short names: numbers with leading zeros
# (mode, owner, group, size, time, checksum), kind, target of a link, "ustar", names, device, and no prefix.
_PLAIN = re.compile(
    rb"(?:[0-7]{6}[0-7 ][ \0]){3}([0-7]{11})[ \0][0-7]{11}[ \0]([0-7]{6})[ \0]{2}([\x000125x]).{100}"
    rb"ustar(?:\x0000|  \0).{64}(?:[0-7]{6}[0-7 ][ \0]|\0{8}){2}\0",
    re.DOTALL,
)
_TIMES = re.compile(rb"(?:\d+ [acm]time=-?\d+\.?\d*\n)+\0*")


def _plain_members(file):
    """As `_members`, three times as fast, of tars without rare things in them. ValueError for others."""
    at, kind = 0, None
    while plain := _PLAIN.match(header := _pread(file, 1024, at), 100):
        size, checksum, kind = int(plain[1], 8), int(plain[2], 8), plain[3]
        if sum(header[:148]) + sum(header[156:512]) + 256 != checksum:  # its own eight bytes count as spaces
            raise ValueError
        at += 512
        if kind == b"x":  # attributes of the next member, of which exact times change nothing
            if not _TIMES.fullmatch(header, 512):
                raise ValueError
            at += 512
        elif kind in b"\x000":
            name = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            if name.endswith("/"):
                raise ValueError
            yield name, at, size
            at += (size + 511) // 512 * 512
    if kind == b"x":
        raise ValueError
    _check_end(file, at)


def _members(file):
    """(name, offset, size) of a tar's regular files, in order, as tarfile finds them."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # else tarfile keeps every header it has seen
            if member.size < 0:
                raise ValueError("a member of negative size")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
        _check_end(file, tar.offset)


def _check_end(file, at):
    """A tar ends in zeros: two blocks of 512, filled up to a record (10 KiB if not told otherwise)."""
    tail = _pread(file, (1 << 20) + 1, at)
    if not tail or tail.strip(b"\0") or len(tail) > 1 << 20:
        raise ValueError(f"no end mark, but something else, at byte {at}")


def _read_file(path):
    _status(path)
    with open(path, "rb") as file:
        return file.read(_LARGEST)


_END = "\x03 end of the table"


class Table(Source):
    """A CSV or TSV file with a column of image paths (relative to the file) and one of captions."""

    def __init__(self, path, image_key="filepath", caption_key="title", label_key=None, captions=True):
        self.path, self.folder = path, os.path.dirname(os.path.abspath(path))
        csv.field_size_limit(1 << 26)
        try:
            _status(path)
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                header = file.readline(1 << 16)
            headers = {d: next(csv.reader([header], delimiter=d), []) for d in ",\t;|"}
            needed = {image_key, caption_key} if captions else {image_key}
            fitting = [d for d, names in headers.items() if needed <= set(names)]
            if not fitting:
                found = str(max(headers.values(), key=len))[:500]
                raise UserError(
                    f"{path}: no columns {image_key!r} and {caption_key!r} in {found}; name yours with "
                    "--img-key and --caption-key. Three lines for example: "
                    f"{image_key},{caption_key} / images/1.jpg,a red car / images/2.jpg,two dogs"
                )
            self.images = Strings(self._column(image_key, fitting[0]))
            self.captions = Strings(self._column(caption_key, fitting[0])) if captions else None
            if label_key:
                if label_key not in headers[fitting[0]]:
                    raise UserError(f"{path}: no column {label_key!r} in {headers[fitting[0]]}")
                self.classes, self.labels = _classes(self._column(label_key, fitting[0]))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except csv.Error as error:
            raise UserError(f"{path}: {error}; is a quote opened and never closed?") from None
        if not len(self.images):
            raise UserError(f"{path}: no rows below the header")

    def _column(self, key, delimiter):
        # paths keep the bytes that are not UTF-8, by surrogates; in captions `clean` finds them
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            # a last line of ours: an open quote would make one caption of all lines after it
            rows = csv.reader(itertools.chain(file, [_END + delimiter + _END]), delimiter=delimiter)
            header, opened = next(rows), 1
            for row in rows:
                if row == [_END, _END]:
                    return
                if row and row[-1].endswith(_END):
                    raise UserError(f"{self.path}, line {opened + 1}: a quote is opened and never closed")
                opened = rows.line_num
                if row and len(row) != len(header):
                    counts = f"{len(row)} fields, the header has {len(header)}"
                    raise UserError(f"{self.path}, line {opened}: {counts}")
                if row:
                    yield row[header.index(key)]

    def image(self, i, draft=None):
        return decode(_read_file(os.path.join(self.folder, self.images[i])), draft)

    def caption(self, i):
        return clean(self.captions[i])

    def same_images(self):
        """Rows of one path are captions of one image -> (ids of the images, image (N,) of each row)."""
        number = {}  # images in the order of the file
        image_of = [number.setdefault(path, len(number)) for path in self.images]
        return np.unique(image_of, return_index=True)[1].tolist(), image_of

    def where(self, i):
        return f"{os.path.join(self.folder, self.images[i])} (row {i + 1} below the header of {self.path})"

    def fingerprint(self):
        captions = self.captions.digest() if self.captions else ""
        return _sha256(self.images.digest().encode(), captions.encode())


def _pictures(folder, skipped, seen):
    """Paths of the pictures below a folder; counts other files in `skipped`.

    A folder that links lead to twice counts once: a link to one above would repeat its pictures without end.
    """
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            yield from _pictures(entry.path, skipped, seen)
        elif extension[1:] in EXTENSIONS:
            yield entry.path
        else:
            skipped[extension or entry.name] += 1


class Tree(Source):
    """Class folders, as in torchvision's ImageFolder; of DIR/train and DIR/val, `split` where they exist.

    captions=False: a folder without class folders will do, of pictures alone.
    """

    def __init__(self, root, split="train", captions=True):
        root = os.path.join(root, split) if os.path.isdir(os.path.join(root, split)) else root
        self.skipped = Counter()
        with _naming(root):
            classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
            folders = [os.path.join(root, name) for name in classes] or [root]
            # of each folder in ImageFolder's order
            files = [sorted(_pictures(f, self.skipped, set()), key=os.path.split) for f in folders]
        paths = list(itertools.chain.from_iterable(files))
        if classes:
            self.classes, self.labels = classes, np.repeat(range(len(files)), [len(f) for f in files])
        if not classes and (captions or not paths):
            raise UserError(f"{root}: no class folders with pictures in it")
        if not paths:
            raise UserError(f"{root}: no pictures in its class folders ({', '.join(self.classes[:5])} ...)")
        self.root, self.images = root, Strings(os.path.relpath(path, root) for path in paths)

    def image(self, i, draft=None):
        return decode(_read_file(self.where(i)), draft)

    def where(self, i):
        return os.path.join(self.root, self.images[i])

    def fingerprint(self):
        return self.images.digest()


class Cifar(Source):
    """CIFAR-10 or CIFAR-100, in the files that torchvision downloads and compares with their MD5 sums."""

    def __init__(self, name, root, train=True, download=False):
        try:
            cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](root, train, download=download)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{root}: no whole {name} in it ({str(error).splitlines()[0]})") from None
        self.name, self.images, self.classes = name, cifar.data, cifar.classes  # images: (N, 32, 32, 3) uint8
        self.labels = np.array(cifar.targets)

    def image(self, i, draft=None):
        return Image.fromarray(self.images[i])

    def where(self, i):
        return f"{self.name}, id {i}"

    def fingerprint(self):
        return _sha256(np.ascontiguousarray(self.images))


def _expand(pattern):
    """Braces {00000..00331} and {a,b}, then globs -> paths, in order."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not paths:
            raise UserError(f"{pattern}: matches no file")
        return paths
    parts = brace[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        first, last = span.groups()
        parts = [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
    if not parts:
        raise UserError(f"{pattern}: the range {brace[0]} is empty")
    return [p for part in parts for p in _expand(pattern[: brace.start()] + part + pattern[brace.end() :])]


def open_source(spec, *, templates=None, **options):
    """A --data argument -> its source. Raises UserError."""
    source = _open_source(spec, **options)
    if templates:
        source.templates = templates
    return source


def _open_source(
    spec, *, train=True, size=64, seed=0, captions=True, download=False,
    image_key="filepath", caption_key="title", label_key=None
):  # fmt: skip
    """A --data argument -> its source. Raises UserError.

    size: edge of drawn pictures. captions: whether they are needed. label_key: the CSV column, or the key in
    the JSON of tar shards, that names the class of a sample. download: fetch CIFAR if it is missing.
    """
    shapes = re.fullmatch(r"shapes(?::(\d+)(,zipf)?)?", spec)
    cifar = re.fullmatch(r"(cifar100?)(?::(.+))?", spec)
    if shapes:
        n = int(shapes[1] or (1024 if train else 512))
        if n < 2:
            raise UserError(f"--data {spec}: needs at least 2 pictures")
        return Shapes(n, size, seed, train, zipf=bool(shapes[2]))
    if cifar:
        return Cifar(cifar[1], cifar[2] or "data", train, download)
    if re.search(r"\.tar(\}|$|::)", spec):
        return Shards([path for part in spec.split("::") for path in _expand(part)], captions, label_key)
    if spec.endswith((".csv", ".tsv")):
        return Table(spec, image_key, caption_key, label_key, captions)
    for name, folder in (("cifar10", CIFAR10.base_folder), ("cifar100", CIFAR100.base_folder)):
        if os.path.isdir(os.path.join(spec, folder)):
            return Cifar(name, spec, train)
    if os.path.isdir(spec):
        return Tree(spec, "train" if train else "val", captions)
    raise UserError(
        f"{spec}: neither shapes[:N[,zipf]], nor .tar files (braces, globs, A::B), nor a .csv or .tsv file, "
        "nor a folder of classes, nor cifar10[:DIR] or cifar100[:DIR]"
    )


# ---------------------------------------------------------------- datasets


_NEIGHBOURS = 100  # ids that are tried, one after the other, for a sample that can't be read


class Samples(Dataset):
    """Map-style: id -> (the id really used, the id asked for if it can't be read or else -1, two arrays).

    A sample that can't be read is replaced by the next id that can: its loss then goes to that id.
    Augmentation depends on (seed, epoch, id) alone, so workers carry no state.
    """

    def __init__(self, source, seed):
        self.source, self.seed = source, seed
        self.truth = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def __len__(self):
        return len(self.source)

    def fingerprint(self):
        return self.source.fingerprint()[:16]

    def set_epoch(self, epoch):
        """Before the loader's iterator starts."""
        self._epoch.fill_(epoch)

    def __getitem__(self, i):
        first = None
        for k in range(min(len(self), _NEIGHBOURS)):
            used = (i + k) % len(self)
            try:
                with torch.random.fork_rng(devices=[]):
                    seed = hashlib.sha256(f"{self.seed} {int(self._epoch)} {used}".encode()).digest()
                    torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
                    return used, i if used != i else -1, *self.read(used)
            except UserError:
                raise
            except Exception as error:  # whatever a decoder makes of broken bytes
                first = first or error
        why = _why(self.source, i, first)
        raise UserError(f"not one of {k + 1} samples from id {i} on can be read, first: {why}") from first

    def why(self, i):
        """Where a sample is, and why it can't be read: it is tried once more."""
        try:
            self.read(i)
        except Exception as error:
            return _why(self.source, i, error)
        return f"{self.source.where(i)}: can be read now"


def _why(source, i, error):
    """In one line: what sources and decoders say of bad data; any other exception with its type."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if not text or not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return f"{source.where(i)}: {text}"


class Pairs(Samples):
    """CLIP's samples: an image (3, size, size) uint8, lightly cropped, and the token ids of its caption.

    mismatch: a share of the samples whose captions are shuffled among them, alike for every seed; `truth`
    says which.
    """

    def __init__(self, source, tokenizer, size, *, crop_min=0.9, seed=0, mismatch=0.0):
        super().__init__(source, seed)
        self.tokenizer, self.mismatch = tokenizer, mismatch
        self.crop = RandomCrop(size, crop_min)
        self.truth = dict(source.truth)
        self.caption_of = None
        if mismatch:
            n = int(mismatch * len(source))
            chosen = np.random.default_rng(6).permutation(len(source))[:n]
            self.caption_of = np.arange(len(source))
            self.caption_of[chosen] = np.roll(chosen, 1)  # a cycle: nobody keeps their own
            shuffled = self.caption_of != np.arange(len(source))
            self.truth["ill_matched"] = shuffled | self.truth.get("ill_matched", False)

    def fingerprint(self):
        return _sha256(f"{self.source.fingerprint()} {self.mismatch}".encode())[:16]

    def caption(self, i):
        return self.source.caption(i if self.caption_of is None else int(self.caption_of[i]))

    def read(self, i):
        caption = self.caption(i)
        if not caption.strip():
            raise ValueError("its caption is empty")
        return self.crop(self.source.image(i, self.crop.draft)), torch.from_numpy(self.tokenizer(caption))


class Views(Samples):
    """MoCo's samples: two crops (2, 3, size, size) uint8, and the numbers of their augmentations.

    draw_views: moco.draw_views. Only what needs the picture is done here; MoCo.inputs does the rest for the
    whole batch on the device.
    """

    def __init__(self, source, size, draw_views, *, crop_min=0.08, seed=0):
        super().__init__(source, seed)
        self.draw_views, self.crop = draw_views, RandomCrop(size, crop_min, "bilinear")
        self.truth = {k: v for k, v in source.truth.items() if k == "redundant"}  # captions play no part

    def read(self, i):
        picture, numbers = self.source.image(i, self.crop.draft), self.draw_views()
        return torch.stack([self.crop(picture), self.crop(picture)]), numbers


def collate(items):
    """Items of a batch -> ids really used (b,) int64; ids asked for that can't be read (k,), mostly none;
    images uint8; and tokens (b, longest) or MoCo's numbers (b, 2, 9)."""
    used, failed, images, others = zip(*items, strict=True)
    failed = torch.tensor([i for i in failed if i >= 0], dtype=torch.int64)
    others = torch.stack(others) if others[0].ndim > 1 else pad(others)
    return torch.tensor(used), failed, torch.stack(images), others


class Pictures(Dataset):
    """Items (id, image) for evaluation: every sample, in order; one that can't be read is an error."""

    def __init__(self, source, transform):
        self.source, self.transform = source, transform

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return i, self.transform(self.source.image(i))
        except UserError:
            raise
        except Exception as error:
            raise UserError(_why(self.source, i, error)) from None
