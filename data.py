"""Images and captions by random access: a sample has an int64 id, its position, and is read on demand.

`open_source` turns a --data argument into a source:

    shapes:N                     captioned drawings, made on demand, with planted faults   Shapes
    cc3m/{00000..00331}.tar      img2dataset / webdataset shards; globs; A::B joins sets   Shards
    pairs.csv, pairs.tsv         columns filepath and title                                Table
    DIR/                         class folders, as in ImageFolder                          Tree
    cifar10:DIR, cifar100:DIR    CIFAR as torchvision keeps it in DIR                      Cifar

A source is a subclass of `Source` with

    __len__()                number of samples
    image(id, draft=None)    RGB picture; it may be decoded smaller, if its sides stay at least `draft`
    caption(id)              text; by default the class name, put into the first of `templates`
    where(id)                file or row of a sample, for messages
    fingerprint()            hash of the data, which a resumed run compares

and optionally `truth` (planted faults: name -> mask (N,)), `classes` (names), `labels` (N,), `skipped` (what
is left out: kind -> number). A sample whose `image` or `caption` raises an exception is replaced by another.
`Pairs` reads images and tokens from a source (CLIP), `Views` two crops of each image (MoCo).
"""

import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
import time
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2


class UserError(Exception):
    """One line for the user: what is wrong, where, and what to do."""


# ---------------------------------------------------------------- bytes to pictures and text

# the formats that Pillow may read: EPS would start Ghostscript, and some others match arbitrary text
_FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF".split()
EXTENSIONS = "jpg jpeg png webp gif bmp tif tiff ppm pgm avif".split()
_PICTURE_NAME = re.compile(rf"\w\.({'|'.join(EXTENSIONS)})\b", re.IGNORECASE)
_PARTS = dict.fromkeys(EXTENSIONS, 0) | {"txt": 1, "json": 2, "cls": 3}  # extension -> place in Shards.parts
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit; Pillow would print a warning first
Image.core.set_blocks_max(4)  # let Pillow keep its buffers: decoding is 25 % faster


def decode(data, draft=None):
    """Decode the bytes of an image file to an upright RGB picture. Raises ValueError or OSError.

    Puts alpha on white, scales 16-bit grey to 8 bits, takes the first frame of an animation. draft: decode a
    JPEG at 1/2, 1/4 or 1/8 of its size as long as its sides stay at least this long.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (UnidentifiedImageError, KeyError):  # KeyError: Pillow without AVIF
        raise ValueError(f"no picture, but {len(data):,} bytes: {data[:12]!r}") from None
    short, long = sorted(picture.size)
    if short * long > 1024**3 // 12 or long > 1000 * short:  # resizing by the short side makes long ones huge
        raise ValueError(f"{picture.width} x {picture.height} pixels")
    if draft:
        picture.draft("RGB", (draft, draft))
    picture.load()  # turns TIFFs upright
    with contextlib.suppress(Exception):  # no orientation, or broken EXIF, which raises errors of many types
        picture = picture.transpose(Image.Transpose(_UPRIGHT[picture.getexif()[274]]))
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        top = max(float(values.max()), 65535 if picture.mode.startswith("I") else 1e-6)
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


class RandomCrop:
    """torchvision's RandomResizedCrop, but torch resizes: RGB picture -> (3, size, size) uint8."""

    def __init__(self, size, smallest, mode="bicubic"):
        self.size, self.areas, self.mode = (size, size), (smallest, 1.0), mode
        self.draft = math.ceil(size / math.sqrt(smallest))  # so large, the smallest crop has `size`

    def __call__(self, picture):
        top, left, height, width = v2.RandomResizedCrop.get_params(picture, self.areas, (3 / 4, 4 / 3))
        # contiguous, which torch resizes twice as fast
        crop = np.asarray(picture)[top : top + height, left : left + width].copy()  # (height, width, 3)
        image = torch.from_numpy(crop).permute(2, 0, 1)[None]
        return F.interpolate(image, self.size, mode=self.mode, antialias=True)[0]


def eval_transform(size, crop=1.0, interpolation=v2.InterpolationMode.BICUBIC):
    """The centre of a picture, (3, size, size) uint8. crop: its share of the shorter side."""
    return v2.Compose([v2.Resize(round(size / crop), interpolation), v2.CenterCrop(size), v2.PILToTensor()])


def clean(caption):
    """Check a caption, and cut it to what 77 tokens can use: BPE is quadratic in the length of a word."""
    if not isinstance(caption, str) or "\0" in caption:
        raise ValueError(f"its caption is no text, but {caption!r:.60}")
    return caption[:4096].encode("utf-8", "surrogateescape").decode()  # ValueError if it was not UTF-8


def pad(tokens):
    """Token arrays -> (b, longest) int64; the text tower is causal, so shorter padding changes nothing."""
    return pad_sequence([torch.as_tensor(ids) for ids in tokens], batch_first=True)


# ---------------------------------------------------------------- sources


class Strings:
    """A list of strings in two arrays: compact, and shared copy-on-write with loading processes."""

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
    """Hex digest of bytes and arrays, one after the other, without copying them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _classes(names):
    """Class name of each sample -> (classes, sorted, numbers as numbers; labels (N,)). One class is none."""
    found = {}
    labels = np.fromiter((found.setdefault(name, len(found)) for name in names), np.int32)
    if len(found) < 2:
        return None, None
    classes = sorted(found, key=int if all(re.fullmatch("[0-9]+", name) for name in found) else None)
    place = {name: k for k, name in enumerate(classes)}
    return classes, np.array([place[name] for name in found])[labels]


def _printable(name):
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _kind(name):
    """Name of a file -> its key in `Source.skipped`."""
    return _printable(os.path.splitext(name)[1].lower() or "without extension")


class Source:
    """Defaults shared by all sources."""

    truth = {}
    classes, labels = None, None
    skipped = Counter()
    templates = ["a photo of a {}."]  # captions of a class, in training and in zero-shot evaluation

    def __len__(self):
        return len(self.images)

    def __str__(self):
        left_out = ", ".join(f"{n:,} {kind}" for kind, n in Counter(self.skipped).most_common(8))
        return f"{len(self):,} samples" + (f"; left out: {left_out}" if left_out else "")

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

    A tenth of the captions are wrong (ill-matched), and a tenth of the samples are near-duplicates, four of
    an original, which differ by noise; `truth` has both masks. Evaluation pictures (train=False) are clean,
    balanced over the classes, and drawn from other seeds.
    """

    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
    colours = {
        "red": (214, 39, 40), "green": (44, 150, 44), "blue": (31, 80, 200), "yellow": (240, 210, 40),
        "purple": (148, 60, 180), "orange": (255, 127, 14), "pink": (245, 140, 190), "brown": (120, 70, 40),
    }  # fmt: skip
    grounds = {"white": (250, 250, 250), "grey": (170, 170, 170), "black": (20, 20, 20)}
    classes = [f"{colour} {shape}" for colour, shape in itertools.product(colours, shapes)]
    templates = [f"a {{}} on {ground}" for ground in grounds]

    def __init__(self, n, size=64, seed=0, train=True, ill_matched=0.1, duplicates=0.1):
        self.n, self.size, self.seed, self.train = n, size, seed, train
        self.drawn_as = np.arange(n)  # id of the drawing and caption that a sample copies
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
        """Class and ground, which the caption names; and the generator for everything else."""
        rng = np.random.default_rng([self.seed, 2 + self.train, int(self.drawn_as[i]), salt])
        label = int(rng.integers(len(self.classes))) if self.train else int(i) % len(self.classes)
        return label, list(self.grounds)[rng.integers(len(self.grounds))], rng

    @functools.cached_property
    def labels(self):
        return np.fromiter((self._attributes(i)[0] for i in range(self.n)), np.int64, self.n)

    def caption(self, i):
        label, ground, _ = self._attributes(i)
        if self.train and self.truth["ill_matched"][i]:  # describe a picture of another class
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
        return _sha256(f"shapes {self.n} {self.size} {self.seed} {self.train}".encode())


class Shards(Source):
    """img2dataset / webdataset tar files, read by position: never extracted, never streamed.

    Each tar is indexed once; the index (byte offsets) is cached under $XDG_CACHE_HOME. A sample is an image
    and a .txt, or a .json with "caption", side by side under one key. Its class, if any, is in a .cls, or in
    the .json under label_key.
    """

    def __init__(self, paths, captions=True, label_key=None):
        self.paths, self.label_key = Strings(paths), label_key
        _open_tar.cache_clear()  # tars may have been replaced
        indexes = _index(paths)
        tables = [table for table, _ in indexes]
        self.skipped = sum((skipped for _, skipped in indexes), Counter())
        self.first = np.cumsum([0] + [len(table) for table in tables])  # id of each tar's first sample
        # images, .txt, .json, .cls: (N, 2) int32, offset in blocks of 512 and size, -1 if absent
        parts = [np.concatenate([table[:, k : k + 2] for table in tables]) for k in (0, 2, 4, 6)]
        self.parts = [part if (part[:, 1] >= 0).any() else None for part in parts]
        if self.parts[0] is None or (captions and self.parts[1] is None and self.parts[2] is None):
            what = "an image and a caption" if captions else "an image"
            raise UserError(f"{paths[0]}: no sample with {what}; {self}")

    def __len__(self):
        return int(self.first[-1])

    def _path(self, i):
        return self.paths[int(np.searchsorted(self.first, i, side="right")) - 1]

    def _read(self, i, extension):
        """Bytes of one member of a sample. FileNotFoundError if it has none."""
        part = self.parts[_PARTS[extension]]
        if part is None or part[i, 1] < 0:
            raise FileNotFoundError(f"no .{extension} beside it")
        block, size = part[i].tolist()
        return os.pread(_open_tar(self._path(i)).fileno(), size, 512 * block)

    def image(self, i, draft=None):
        return decode(self._read(i, "jpg"), draft)  # or of any other format

    def caption(self, i):
        try:
            return clean(self._read(i, "txt").decode("utf-8-sig", "surrogateescape"))
        except FileNotFoundError:
            return clean(self._meta(i, "caption"))

    def _meta(self, i, key):
        """What the sample's .json has under a key."""
        try:
            return json.loads(self._read(i, "json"))[key]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"no {key!r} in its .json ({error})") from None

    @functools.cached_property
    def _labelled(self):  # on demand, since it reads every sample
        if self.label_key or self.parts[3] is not None:
            return _classes(self._label(i) for i in range(len(self)))
        return None, None

    classes = property(lambda self: self._labelled[0])
    labels = property(lambda self: self._labelled[1])

    def _label(self, i):
        try:
            label = self._meta(i, self.label_key) if self.label_key else self._read(i, "cls").decode().strip()
            if not isinstance(label, str | int):
                raise ValueError(f"no class, but {label!r:.60}")
            return str(label)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(_why(self, i, error)) from None

    def where(self, i):
        path, at = self._path(i), 512 * int(self.parts[0][i, 0])
        name = os.pread(_open_tar(path).fileno(), 100, at - 512).partition(b"\0")[0]
        return f"{path}, {name.decode('utf-8', 'replace')} at byte {at}"

    def fingerprint(self):
        names = "\n".join(os.path.basename(path) for path in self.paths)
        parts = [part for part in self.parts if part is not None]
        return _sha256(os.fsencode(names), self.first, *parts)


@functools.lru_cache(128)  # this many tars stay open in each process
def _open_tar(path):
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _index(paths):
    """For each tar: offsets and sizes (n, 8) int32 as in Shards.parts, and a Counter of what is left out."""
    # each rank starts at another tar, and finds in the cache what other ranks have indexed by then
    rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    start, processes = len(paths) * rank // ranks, (os.cpu_count() or 1) // ranks
    indexes, due = [], time.monotonic() + 5
    with contextlib.ExitStack() as stack:
        run = map
        if sys.platform == "linux" and processes > 1 and len(paths) >= 16:
            run = stack.enter_context(ProcessPoolExecutor(processes, get_context("fork"))).map
        for index in run(_tar_index, paths[start:] + paths[:start]):
            indexes.append(index)
            if rank == 0 and time.monotonic() > due:
                print(f"indexing: {len(indexes):,} of {len(paths):,} tar files", file=sys.stderr, flush=True)
                due = time.monotonic() + 5
    return indexes[len(paths) - start :] + indexes[: len(paths) - start]


def _tar_index(path):
    """Index one tar, or take its index from the cache."""
    status, cache = os.stat(path), None
    with contextlib.suppress(Exception):  # no HOME, no index yet, a damaged one: index the tar
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scan"
        state = f"7 {os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"
        cache = folder / _sha256(os.fsencode(state))[:32]
        with np.load(cache) as saved:
            return saved["table"], Counter(json.loads(str(saved["skipped"])))
    try:
        table, skipped = _samples(path)
    except Exception as error:  # broken headers make tarfile raise errors of many types
        raise UserError(f"{path}: not a whole tar file, or compressed ({error!r})") from None
    with contextlib.suppress(Exception):  # no HOME, a full disk: do without a cache
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, table=table, skipped=json.dumps(skipped))
        temporary.replace(cache)
    return table, skipped


def _samples(path):
    """Group the members of a tar into samples -> as in `_index`."""
    members, skipped, table = [], Counter(), array("i")
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # else tarfile keeps every header
            if re.search(r"(^|/)\.[^./]", member.name):
                skipped["hidden"] += 1
            elif member.isreg() and not member.issparse():
                skipped[_kind(member.name)] += 1  # until a sample uses it
                members.append((member.name, member.offset_data, member.size))
            elif not member.isdir():
                skipped["link"] += 1
        # tarfile takes damage for the end. A tar ends in zeros: two blocks of 512, filled up to 10 KiB or so
        tar.fileobj.seek(tar.offset)
        tail = tar.fileobj.read((1 << 20) + 1)
        if not tail or tail.strip(b"\0") or len(tail) > 1 << 20:
            raise ValueError(f"no end mark, but something else, at byte {tar.offset}")

    # A key ends at the last dot of a name: v1.2.jpg and v1.2.txt are a sample. For webdataset it ends at the
    # first: an image without a caption, such as 1.seg.png, then belongs to 1.jpg, and is left out.
    for short_key, group in itertools.groupby(members, lambda member: re.match("(.*/)?[^.]*", member[0])[0]):
        samples = {}  # key -> {part: (name, offset, size)}
        for name, offset, size in group:
            key, extension = os.path.splitext(name)
            if extension[1:].lower() in _PARTS:
                samples.setdefault(key, {}).setdefault(_PARTS[extension[1:].lower()], (name, offset, size))
        has_short = 0 in samples.get(short_key, {})
        for key, parts in samples.items():
            extra = has_short and key != short_key and 1 not in parts and 2 not in parts
            if 0 in parts and not extra:
                row = [-1] * 8
                for part, (name, offset, size) in parts.items():
                    skipped[_kind(name)] -= 1
                    row[2 * part : 2 * part + 2] = offset // 512, min(size, 2**31 - 1)
                table.extend(row)
    return np.array(table, np.int32).reshape(-1, 8), +skipped


class Table(Source):
    """A CSV or TSV file with a column of image paths (relative to the file) and one of captions."""

    def __init__(self, path, image_key="filepath", caption_key="title", label_key=None, captions=True):
        self.path, self.folder = path, os.path.dirname(os.path.abspath(path))
        csv.field_size_limit(1 << 26)
        # surrogates stand for bytes that are not UTF-8: paths may hold them, `clean` finds them in captions
        self.format = dict(encoding="utf-8-sig", errors="surrogateescape", newline="")
        with open(path, **self.format) as file:
            line = file.readline(1 << 16)
        if "\0" in line or line.startswith(("\x1f", "\udcff", "\udcfe")):
            raise UserError(f"{path}: is UTF-16 or compressed; save it as plain UTF-8")
        self.delimiter = max(",\t;|", key=line.count)
        self.header = next(csv.reader([line], delimiter=self.delimiter), [])
        self.images = Strings(self._column(image_key, "--img-key"))
        self.captions = Strings(self._column(caption_key, "--caption-key")) if captions else None
        if label_key:
            self.classes, self.labels = _classes(self._column(label_key, "--label-key"))

    def _column(self, key, flag):
        """Yield the values of a column. Refuses rows that do not fit the header."""
        if key not in self.header:
            hint = f"name yours with {flag}. Three lines for example: filepath,title / 1.jpg,cat / 2.jpg,dog"
            raise UserError(f"{self.path}: no column {key!r} in {str(self.header)[:500]}; {hint}")
        with open(self.path, **self.format) as file:
            rows, first = csv.reader(file, delimiter=self.delimiter, strict=True), 1
            try:
                for row in rows:
                    lines = self.delimiter.join(row).split("\n")
                    if row and len(row) != len(self.header):
                        raise csv.Error(f"{len(row)} fields, the header has {len(self.header)}")
                    if len(lines) > 1 and all(_PICTURE_NAME.search(line) for line in lines):
                        raise csv.Error(f"a field that holds {len(lines)} lines with pictures")
                    if row and first > 1:
                        yield row[self.header.index(key)]
                    first = rows.line_num + 1
            except csv.Error as error:
                hint = "is a quote not closed, or not doubled?"
                raise UserError(f"{self.path}, line {first}: {error}; {hint}") from None

    def image(self, i, draft=None):
        return decode(Path(self.folder, self.images[i]).read_bytes(), draft)

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
        return _sha256((self.images.digest() + captions).encode())


class Tree(Source):
    """Class folders, as in torchvision's ImageFolder; of DIR/train, DIR/val and such, the one that fits.

    captions=False: any folder of pictures will do. Fewer than two folders with pictures are no classes.
    """

    def __init__(self, root, train=True, captions=True):
        self.skipped = Counter()
        self.root = self._split(root, train)
        found = sorted(self._pictures("", set()))  # as ImageFolder sorts
        classes = sorted({name for name, _, _ in found} - {""})
        if len(classes) < 2 or max(self.skipped[".txt"], self.skipped[".json"]) > len(found) / 2:
            classes = []  # as of img2dataset's output_format=files, with captions beside the pictures
        if not found or (captions and not classes):
            raise UserError(
                f"{self.root}: no pictures in two classes; left out: {dict(self.skipped.most_common(8))};"
                f" give tars as '{self.root}/*.tar', pictures with captions beside them as tars or a .csv"
            )
        if classes:
            self.skipped.update(_kind(file) for name, _, file in found if not name)
            found = [item for item in found if item[0]]
            number = {name: k for k, name in enumerate(classes)}
            self.labels = np.array([number[name] for name, _, _ in found])
            self.classes = [_printable(name) for name in classes]
        self.images = Strings(os.path.join(folder, file) for _, folder, file in found)

    def _split(self, root, train):
        """Choose the folder of DIR that is the split; DIR itself if it has no splits."""
        entries = {entry.name.lower(): entry for entry in os.scandir(root)}
        splits = "train training val valid validation test testing".split()
        found = [name for name in splits if name in entries and entries[name].is_dir()]
        fitting = [name for name in found if name.startswith("train") == train]
        if not found:
            return root
        if not fitting:
            raise UserError(f"{root}: has {found}, but no {'train' if train else 'val'}; name one of them")
        for name in entries.keys() - set(found):
            self.skipped["folder beside the splits" if entries[name].is_dir() else _kind(name)] += 1
        return entries[fitting[0]].path

    def _pictures(self, folder, seen):
        """Yield (class folder, folder, file) of the pictures below a folder, and count everything else."""
        place = os.path.realpath(os.path.join(self.root, folder))
        if place in seen:  # a link to a folder above would repeat its pictures without end
            self.skipped["repeated folder"] += 1
            return
        seen.add(place)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                self.skipped["hidden"] += 1
            elif entry.is_dir():
                yield from self._pictures(os.path.join(folder, entry.name), seen)
            elif _kind(entry.name)[1:] in EXTENSIONS:
                yield folder.split(os.sep)[0], folder, entry.name
            else:
                self.skipped[_kind(entry.name)] += 1

    def image(self, i, draft=None):
        return decode(Path(self.where(i)).read_bytes(), draft)

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
    """Expand braces {00000..00331} and {a,b}, then globs. A path or folder that exists is taken literally."""
    if os.path.exists(pattern):
        return [pattern]
    folder, name = os.path.split(pattern)
    if not os.path.isdir(folder):
        folder, name = "", pattern
    brace = re.search(r"\{([^{}]*)\}", name)
    if not brace:
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), name)))
    else:
        parts = brace[1].split(",")
        if re.fullmatch(r"\d+\.\.\d+", brace[1]):
            first, last = brace[1].split("..")
            parts = [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
        before, after = os.path.join(folder, name[: brace.start()]), name[brace.end() :]
        paths = [path for part in parts for path in _expand(before + part + after)]
    if not paths:
        raise UserError(f"{pattern}: no such file")
    return paths


def open_source(
    spec, *, train=True, size=64, seed=0, captions=True, download=False,
    image_key="filepath", caption_key="title", label_key=None, templates=None
):  # fmt: skip
    """Open the source that a --data argument names. Raises UserError.

    size: edge of drawn pictures. captions: whether they are needed. download: fetch CIFAR if it is missing.
    label_key: the CSV column, or the key in the JSON of tar shards, that names the class of a sample.
    templates: captions of a class, {} being its name (default: the source's own).
    """
    shapes = re.fullmatch(r"shapes(?::(\d+))?", spec)
    cifar = re.fullmatch(r"(cifar100?)(?::(.+))?", spec)
    try:
        if shapes:
            source = Shapes(int(shapes[1] or (1024 if train else 512)), size, seed, train)
        elif cifar:
            source = Cifar(cifar[1], cifar[2] or "data", train, download)
        elif os.path.isdir(spec):
            source = Tree(spec, train, captions)
        elif re.search(r"\.tar(\}|$|::)", spec):
            parts = [spec] if os.path.exists(spec) else spec.split("::")
            source = Shards([path for part in parts for path in _expand(part)], captions, label_key)
        elif spec.endswith((".csv", ".tsv")):
            source = Table(spec, image_key, caption_key, label_key, captions)
        else:
            raise UserError(
                f"{spec}: neither shapes[:N], nor .tar files (braces, globs, A::B), nor a .csv or .tsv file, "
                "nor a folder of classes, nor cifar10[:DIR] or cifar100[:DIR]; unpack what is compressed"
            )
    except OSError as error:
        raise UserError(f"{error.filename or spec}: {error.strerror or error}") from None
    if not len(source):
        raise UserError(f"{spec}: has no samples")
    if templates:
        source.templates = templates
    return source


# ---------------------------------------------------------------- datasets


class Samples(Dataset):
    """Map-style: id -> (the id really used, the id asked for if it can't be read or else -1, two arrays).

    A sample that can't be read is replaced by the next one that can, of 100: its loss then goes to that id.
    Augmentation depends on (seed, epoch, id) alone, so loading processes carry no state.
    """

    def __init__(self, source, seed):
        self.source, self.seed, self.truth = source, seed, {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it

    def __len__(self):
        return len(self.source)

    def fingerprint(self):
        return self.source.fingerprint()[:16]

    def set_epoch(self, epoch):
        """Call this before the loader's iterator starts."""
        self._epoch.fill_(epoch)

    def __getitem__(self, i):
        first = None
        for k in range(min(len(self), 100)):
            used = (i + k) % len(self)
            try:
                with torch.random.fork_rng(devices=[]):
                    seed = hashlib.sha256(f"{self.seed} {int(self._epoch)} {used}".encode()).digest()
                    torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
                    return used, i if used != i else -1, *self.read(used)
            except UserError:
                raise
            except Exception as error:  # broken bytes make decoders raise errors of many types
                first = first or error
        what = f"not one of {k + 1} samples from id {i} on can be read"
        raise UserError(f"{what}, first: {_why(self.source, i, first)}") from first

    def why(self, i):
        """Read a sample once more, and say where it is and why it can't be read."""
        try:
            self.read(i)
        except Exception as error:
            return _why(self.source, i, error)
        return f"{self.source.where(i)}: can be read now"


def _why(source, i, error):
    """One line about a sample that can't be read; names the type of an unexpected exception."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if not text or not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return f"{source.where(i)}: {text}"


class Pairs(Samples):
    """CLIP's samples: an image (3, size, size) uint8, lightly cropped, and the token ids of its caption.

    mismatch: share of the samples to shuffle the captions of, alike for every seed; `truth` says which.
    """

    def __init__(self, source, tokenizer, size, *, crop_min=0.9, seed=0, mismatch=0.0):
        super().__init__(source, seed)
        self.tokenizer, self.mismatch, self.caption_of = tokenizer, mismatch, None
        self.crop, self.truth = RandomCrop(size, crop_min), dict(source.truth)
        if mismatch:
            chosen = np.random.default_rng(6).permutation(len(source))[: int(mismatch * len(source))]
            self.caption_of = np.arange(len(source))
            self.caption_of[chosen] = np.roll(chosen, 1)  # rotate: no caption stays in place
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
    """MoCo's samples: two crops (2, 3, size, size) uint8, and what moco.draw_views draws for them."""

    def __init__(self, source, size, draw_views, *, crop_min=0.08, seed=0):
        super().__init__(source, seed)
        self.draw_views, self.crop = draw_views, RandomCrop(size, crop_min, "bilinear")
        self.truth = {k: v for k, v in source.truth.items() if k == "redundant"}  # captions play no part

    def read(self, i):
        picture, numbers = self.source.image(i, self.crop.draft), self.draw_views()
        return torch.stack([self.crop(picture), self.crop(picture)]), numbers


def collate(items):
    """Items of a batch -> ids really used (b,) int64; ids that can't be read (k,), mostly none; images uint8;
    tokens (b, longest) or MoCo's numbers (b, 2, 9)."""
    used, failed, images, others = zip(*items, strict=True)
    failed = torch.tensor([i for i in failed if i >= 0], dtype=torch.int64)
    others = torch.stack(others) if others[0].ndim > 1 else pad(others)
    return torch.tensor(used), failed, torch.stack(images), others


class Pictures(Dataset):
    """Items (id, image) for evaluation: every sample, in order; UserError for one that can't be read."""

    def __init__(self, source, transform):
        self.source, self.transform = source, transform

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return i, self.transform(self.source.image(i))
        except Exception as error:
            raise UserError(_why(self.source, i, error)) from None
