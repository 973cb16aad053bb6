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

and, where it has them, `truth` (planted faults: name -> mask (N,)), `classes` (names) and `labels` (N,), and
`skipped` (what is left out of the user's data: kind -> number). If `image` or `caption` raises an exception,
`Samples` takes another sample.

Two map-style datasets read a source: `Pairs` gives images and tokens (CLIP), `Views` two crops of each image
(MoCo). They are immutable: only the sampler prunes, so a pruned sample is neither read nor decoded. Needs
torch, torchvision, numpy and Pillow.
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
import multiprocessing
import os
import re
import sys
import tarfile
import time
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
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
_MOST_PIXELS = 1024**3 // 12  # of a 256 MB picture
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit; Pillow would print a warning first
Image.core.set_blocks_max(4)  # let Pillow keep its buffers: decoding is 25 % faster
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose


def decode(data, draft=None):
    """Decode the bytes of an image file to an upright RGB picture. Raises ValueError or OSError.

    Puts alpha on white, scales 16-bit grey to 8 bits, takes the first frame of an animation. draft: decode a
    JPEG at 1/2, 1/4 or 1/8 of its size as long as its sides stay at least this long.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (UnidentifiedImageError, KeyError):  # KeyError: a Pillow without AVIF
        raise ValueError(f"no picture, but {len(data):,} bytes: {data[:12]!r}") from None
    short, long = sorted(picture.size)
    if short * long > _MOST_PIXELS or long > 1000 * short:  # resizing by the short side makes long ones huge
        raise ValueError(f"{picture.width} x {picture.height} pixels")
    if draft:
        picture.draft("RGB", (draft, draft))
    picture.load()  # turns TIFFs upright
    try:
        orientation = picture.getexif().get(274)
    except Exception:  # broken EXIF raises errors of many types, and is no reason to lose the picture
        orientation = None
    if orientation in _UPRIGHT:
        picture = picture.transpose(Image.Transpose(_UPRIGHT[orientation]))
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        top = max(float(values.max()), 65535 if picture.mode.startswith("I") else 1e-6)
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


class RandomCrop:
    """torchvision's RandomResizedCrop, with the same draws: RGB picture -> (3, size, size) uint8.

    torch resizes four times as fast as Pillow; a few values differ by a grey level or two.
    """

    def __init__(self, size, smallest, mode="bicubic"):
        self.size, self.areas, self.mode = (size, size), (smallest, 1.0), mode
        # decode at least this large, so that the smallest crop has `size` pixels
        self.draft = math.ceil(size / math.sqrt(smallest))

    def __call__(self, picture):
        top, left, height, width = v2.RandomResizedCrop.get_params(picture, self.areas, (3 / 4, 4 / 3))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, height, width)
        crop = image[None, :, top : top + height, left : left + width]
        return F.interpolate(crop, self.size, mode=self.mode, antialias=True)[0]


def eval_transform(size, crop=1.0, interpolation=v2.InterpolationMode.BICUBIC):
    """The centre of a picture, (3, size, size) uint8. crop: its share of the shorter side."""
    resize = v2.Resize(round(size / crop), interpolation=interpolation)
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


def clean(caption):
    """Check a caption, and cut it to what 77 tokens can use: BPE is quadratic in the length of a word."""
    caption = caption[:4096]
    if "\0" in caption:
        raise ValueError("a NUL in its caption")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # surrogates: bytes that are not UTF-8, or half a character in JSON
        raise ValueError(f"its caption is not UTF-8 after {caption[: error.start][-20:]!r}") from None
    return caption


def pad(tokens):
    """Token arrays -> (b, longest) int64; the text tower is causal, so shorter padding changes nothing."""
    return pad_sequence([torch.as_tensor(ids) for ids in tokens], batch_first=True)


# ---------------------------------------------------------------- sources


class Strings:
    """A list of strings in two arrays: compact, and shared copy-on-write with loading processes."""

    def __init__(self, strings):
        joined, ends = bytearray(), array("q", [0])
        for string in strings:
            joined += os.fsencode(string)
            ends.append(len(joined))
        self._bytes, self._ends = np.frombuffer(joined, np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i):
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]].tobytes())

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


@contextlib.contextmanager
def _naming(path):
    """Turn an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


def _refuse_compressed(path):
    with _naming(path), open(path, "rb") as file:
        # gzip, bzip2, xz, zstd, zip
        if file.read(8).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")):
            raise UserError(f"{path}: is compressed; unpack it first")


def _printable(name):
    """Escape the bytes of a file name that are not UTF-8: neither tokenizers nor terminals take them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _kind(name):
    """Name of a file -> its key in `Source.skipped`."""
    return _printable(os.path.splitext(name)[1].lower()) or "without extension"


def _left_out(skipped):
    return "left out: " + (", ".join(f"{n:,} {kind}" for kind, n in skipped.most_common(8)) or "nothing")


class Source:
    """Defaults shared by all sources."""

    truth = {}
    classes, labels = None, None
    skipped = Counter()
    templates = ["a photo of a {}."]  # captions of a class, in training and in zero-shot evaluation

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
    masks. Evaluation pictures (train=False) are clean, balanced over the classes, and drawn from other seeds.
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
        return _sha256(f"shapes {self.n} {self.size} {self.seed} {self.train}".encode())


_LARGEST = 1 << 29  # bytes of a member that are read: sizes are int32
_PARTS = dict.fromkeys(EXTENSIONS, 0) | {"txt": 1, "json": 2, "cls": 3}  # extension -> place in Shards.parts


class Shards(Source):
    """img2dataset / webdataset tar files, read by position: never extracted, never streamed.

    Each tar is indexed once; the index (byte offsets) is cached under $XDG_CACHE_HOME until the tar changes.
    A sample is what stands side by side under one key: an image, and a .txt or a .json with "caption". Its
    class, if any, is in a .cls, or in the .json under label_key.
    """

    def __init__(self, paths, captions=True, label_key=None):
        self.paths, self.label_key = Strings(paths), label_key
        self.stamps, tables, skipped = zip(*_index(paths), strict=True)
        self.skipped = sum(skipped, Counter())
        self.first = np.cumsum([0] + [len(table) for table in tables])  # id of each tar's first sample
        # images, .txt, .json, .cls: (N, 2) int32, offset in blocks of 512 and size, -1 if absent
        parts = [np.concatenate([table[:, k : k + 2] for table in tables]) for k in (0, 2, 4, 6)]
        self.parts = [part if (part[:, 1] >= 0).any() else None for part in parts]
        if self.parts[0] is None or (captions and self.parts[1] is None and self.parts[2] is None):
            what = f"no sample with {'an image and a caption' if captions else 'an image'}"
            raise UserError(f"{paths[0]}: {what} in {len(paths)} tar file(s); {_left_out(self.skipped)}")

    def __len__(self):
        return int(self.first[-1])

    def _pread(self, i, offset, size):
        """Bytes of the tar that holds sample i, and the path of the tar."""
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        path, stamp = self.paths[shard], self.stamps[shard]
        file = _open_tar(path, stamp).fileno()
        if _stamp(os.fstat(file)) != stamp:
            raise UserError(f"{path}: changed since it was indexed; start again to index it anew")
        return os.pread(file, size, offset), path

    def _read(self, i, part):
        """Bytes of one member; None if the sample has none. part: as in _PARTS."""
        if self.parts[part] is None or self.parts[part][i, 1] < 0:
            return None
        block, size = self.parts[part][i].tolist()
        data, path = self._pread(i, 512 * block, size)
        if len(data) < size:
            raise UserError(f"{path}: ends before the member at byte {512 * block}")
        return data

    def image(self, i, draft=None):
        return decode(self._read(i, 0), draft)

    def caption(self, i):
        text = self._read(i, 1)
        if text is not None:
            return clean(text.decode("utf-8-sig", "surrogateescape"))
        caption = self.meta(i).get("caption")
        if not isinstance(caption, str):
            raise ValueError('no text under "caption" in its .json')
        return clean(caption)

    def meta(self, i):
        """The sample's JSON, a dict."""
        content = self._read(i, 2)
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
    def _labelled(self):  # on demand, since it reads every sample
        if self.label_key or self.parts[3] is not None:
            return _classes(self._label(i) for i in range(len(self)))
        return None, None

    classes = property(lambda self: self._labelled[0])
    labels = property(lambda self: self._labelled[1])

    def _label(self, i):
        try:
            label = self.meta(i).get(self.label_key) if self.label_key else self._read(i, 3)
        except ValueError as error:
            raise UserError(f"{self.where(i)}: {error}") from None
        if isinstance(label, bytes):
            label = label.decode("utf-8", "replace").strip()
        if not isinstance(label, str | int):
            missing = f"{self.label_key!r} in its .json" if self.label_key else ".cls beside it"
            raise UserError(f"{self.where(i)}: no {missing}")
        return str(label)

    def where(self, i):
        at = 512 * int(self.parts[0][i, 0])
        header, path = self._pread(i, at - 512, 100)
        name = header.partition(b"\0")[0].decode("utf-8", "replace")
        return f"{path}, {name} at byte {at}"

    def fingerprint(self):
        names = "\n".join(os.path.basename(path) for path in self.paths)
        parts = [part for part in self.parts if part is not None]
        return _sha256(os.fsencode(names), self.first, *parts)


def _stamp(status):
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(128)  # of the tars, this many stay open in each process
def _open_tar(path, stamp):  # a tar with another stamp is opened anew
    with _naming(path):
        return open(path, "rb", buffering=0)


def _index(paths):
    """For each tar: its stamp, (n, 8) int32 with the columns of Shards.parts, and what is left out.

    Each rank starts at another tar, and finds in the cache what other ranks have indexed by then: the ranks
    share the work without waiting for each other.
    """
    rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    start = len(paths) * rank // ranks
    rotated = paths[start:] + paths[:start]
    processes = (os.cpu_count() or 1) // ranks
    if sys.platform == "linux" and processes > 1 and len(paths) >= 16:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            indexes = _with_progress(pool.map(_tar_index, rotated), len(paths), rank)
    else:
        indexes = _with_progress(map(_tar_index, rotated), len(paths), rank)
    end = len(paths) - start
    return indexes[end:] + indexes[:end]


def _with_progress(found, total, rank):
    """List the indexes as they come; rank 0 shows how many if that takes longer than two seconds."""
    indexes, samples, due, shown = [], 0, time.monotonic() + 2, False
    for index in found:
        indexes.append(index)
        samples += len(index[1])
        finished = len(indexes) == total
        if rank == 0 and (time.monotonic() > due or (shown and finished)):
            due, shown = time.monotonic() + 1, True
            line = f"\rindexing: {len(indexes):,} of {total:,} tar files, {samples:,} samples"
            print(line, end="\n" if finished else "", file=sys.stderr, flush=True)
    return indexes


def _tar_index(path):
    """Index one tar, or take its index from the cache."""
    with _naming(path):
        stamp = _stamp(os.stat(path))
    cache = None
    with contextlib.suppress(Exception):  # no HOME, no such file, a damaged one: then index the tar
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scan"
        cache = folder / _sha256(os.fsencode(f"7 {os.path.realpath(path)} {stamp}"))[:32]
        with np.load(cache) as saved:
            return stamp, saved["table"], Counter(json.loads(str(saved["skipped"])))
    _refuse_compressed(path)
    skipped = Counter()
    try:
        table = _samples(_members(path, skipped), skipped)
    except UserError:
        raise
    except Exception as error:  # broken headers make tarfile raise errors of many types
        what = f"not a whole tar file ({str(error) or type(error).__name__})"
        raise UserError(f"{path}: {what}; fetch it again, or leave it out") from None
    with contextlib.suppress(Exception):  # no HOME, a full disk: do without a cache
        cache.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, table=table, skipped=json.dumps(skipped))
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(content.getvalue())
        temporary.replace(cache)
    return stamp, table, skipped


def _members(path, skipped):
    """Yield (name, offset, size) of a tar's regular files, in order; count links and hidden names."""
    with _naming(path), tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # else tarfile keeps every header
            if member.size < 0:
                raise ValueError("a member of negative size")
            if any(part.startswith(".") and part.strip(".") for part in member.name.split("/")):
                skipped["hidden"] += 1
            elif member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
            elif not member.isdir():
                skipped["link"] += 1
        # tarfile takes damage for the end. A tar ends in zeros: two blocks of 512, filled up to 10 KiB or so
        tar.fileobj.seek(tar.offset)
        tail = tar.fileobj.read((1 << 20) + 1)
        if not tail or tail.strip(b"\0") or len(tail) > 1 << 20:
            raise ValueError(f"no end mark, but something else, at byte {tar.offset}")


def _first_dot(member):
    folder, base = os.path.split(member[0])
    return os.path.join(folder, base.partition(".")[0])


def _samples(members, skipped):
    """(name, offset, size) of a tar's files -> (n, 8) int32 as in `_index`; count files that no sample uses.

    A key ends at the last dot of a name: v1.2.jpg and v1.2.txt are a sample. For webdataset it ends at the
    first: an image without a caption, such as 1.seg.png, then belongs to 1.jpg, and is left out.
    """
    table = array("i")
    for short_key, group in itertools.groupby(members, key=_first_dot):
        samples = {}  # key -> {part: (name, offset, size)}
        for name, offset, size in group:
            key, extension = os.path.splitext(name)
            part = _PARTS.get(extension[1:].lower())
            if part is None or part in samples.setdefault(key, {}):
                skipped[_kind(name)] += 1
            else:
                samples[key][part] = name, offset, size
        has_short = 0 in samples.get(short_key, {})
        for key, parts in samples.items():
            extra = has_short and key != short_key and 1 not in parts and 2 not in parts
            if 0 not in parts or extra:
                skipped.update(_kind(name) for name, _, _ in parts.values())
                continue
            row = [-1] * 8
            for part, (_, offset, size) in parts.items():
                row[2 * part : 2 * part + 2] = offset // 512, min(size, _LARGEST)
            table.extend(row)
    return np.array(table, np.int32).reshape(-1, 8)


_PICTURE_NAME = re.compile(rf"\w\.({'|'.join(EXTENSIONS)})\b", re.IGNORECASE)


class Table(Source):
    """A CSV or TSV file with a column of image paths (relative to the file) and one of captions."""

    def __init__(self, path, image_key="filepath", caption_key="title", label_key=None, captions=True):
        self.path, self.folder = path, os.path.dirname(os.path.abspath(path))
        _refuse_compressed(path)
        csv.field_size_limit(1 << 26)
        with self._open() as file:
            line = file.readline(1 << 16)
        if "\0" in line:
            raise UserError(f"{path}: is UTF-16, or no text at all; save it as UTF-8")
        self.delimiter = max(",\t;|", key=line.count)
        self.header = next(csv.reader([line], delimiter=self.delimiter), [])
        keys = {"--img-key": image_key, "--caption-key": caption_key, "--label-key": label_key}
        for flag, key in keys.items():
            if key and key not in self.header and (captions or flag != "--caption-key"):
                raise UserError(
                    f"{path}: no column {key!r} in {str(self.header)[:500]}; name yours with {flag}. Three "
                    f"lines for example: {image_key},{caption_key} / images/1.jpg,a red car / 2.jpg,two dogs"
                )
        self.images = Strings(self._column(image_key))
        self.captions = Strings(self._column(caption_key)) if captions else None
        if label_key:
            self.classes, self.labels = _classes(self._column(label_key))
        if not len(self.images):
            raise UserError(f"{path}: no rows below the header")

    def _open(self):
        # keep bytes that are not UTF-8 as surrogates: paths may hold them, and `clean` finds them in captions
        with _naming(self.path):
            return open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _column(self, key):
        """Yield the values of a column. Refuses rows that do not fit the header."""
        with self._open() as file:
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
                hint = 'a field that begins with a " must end with one, and have "" for those within'
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
        return _sha256(self.images.digest().encode(), captions.encode())


_SPLITS = {True: ["train", "training"], False: ["val", "valid", "validation", "test", "testing"]}


class Tree(Source):
    """Class folders, as in torchvision's ImageFolder; of DIR/train, DIR/val and such, the one that fits.

    captions=False: any folder of pictures will do. Fewer than two folders with pictures are no classes.
    """

    def __init__(self, root, train=True, captions=True):
        self.skipped, self.captioned = Counter(), 0
        with _naming(root):
            self.root = self._split(root, train)
            paths = [os.path.relpath(path, self.root) for path in self._pictures(self.root, set())]
        paths.sort(key=lambda path: (_class_of(path), os.path.split(path)))  # as ImageFolder sorts
        names = sorted({_class_of(path) for path in paths} - {""})
        problem = None
        if not paths:
            problem = f"no pictures in it; {_left_out(self.skipped)}"
            if self.skipped[".tar"]:
                problem += f"; give tar shards as '{self.root}/*.tar'"
        elif self.captioned > len(paths) / 2:
            problem = (
                "has a .txt or .json beside each picture: captions are read from .tar shards or a .csv only"
            )
        elif len(names) < 2:
            problem = f"no class folders, or only one: {names}"
        if problem and (captions or not paths):
            raise UserError(f"{self.root}: {problem}")
        if not problem:
            self.skipped.update(_kind(path) for path in paths if not _class_of(path))
            paths = [path for path in paths if _class_of(path)]
            number = {name: k for k, name in enumerate(names)}
            self.classes = [_printable(name) for name in names]
            self.labels = np.array([number[_class_of(path)] for path in paths])
        self.images = Strings(paths)

    def _split(self, root, train):
        """Choose the folder of DIR that is the split; DIR itself if it has no splits."""
        entries = {entry.name.lower(): entry for entry in os.scandir(root)}
        splits = [name for name in sum(_SPLITS.values(), []) if name in entries and entries[name].is_dir()]
        fitting = [name for name in splits if name in _SPLITS[train]]
        if not splits:
            return root
        if not fitting:
            raise UserError(
                f"{root}: has {', '.join(splits)}, but no {_SPLITS[train][0]}; give one of its folders"
            )
        for name in entries.keys() - set(splits):
            self.skipped["folder beside the splits" if entries[name].is_dir() else _kind(name)] += 1
        return entries[fitting[0]].path

    def _pictures(self, folder, seen):
        """Yield the paths of the pictures below a folder, and count everything else."""
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder above would repeat its pictures without end
            self.skipped["repeated folder"] += 1
            return
        seen.add(place)
        entries = {entry.name: entry for entry in os.scandir(folder)}
        for name in sorted(entries):
            stem, extension = os.path.splitext(name)
            if name.startswith("."):
                self.skipped["hidden"] += 1
            elif entries[name].is_dir():
                yield from self._pictures(entries[name].path, seen)
            elif extension[1:].lower() in EXTENSIONS:
                self.captioned += f"{stem}.txt" in entries or f"{stem}.json" in entries
                yield entries[name].path
            else:
                self.skipped[_kind(name)] += 1

    def image(self, i, draft=None):
        return decode(Path(self.where(i)).read_bytes(), draft)

    def where(self, i):
        return os.path.join(self.root, self.images[i])

    def fingerprint(self):
        return self.images.digest()


def _class_of(path):
    """The first folder of a relative path; "" if it has none."""
    folder, slash, _ = path.partition(os.sep)
    return folder if slash else ""


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
        if not paths:
            raise UserError(f"{pattern}: no such file")
        return paths
    parts = brace[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        first, last = span.groups()
        parts = [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
    if not parts:
        raise UserError(f"{pattern}: the range {brace[0]} is empty")
    before, after = os.path.join(folder, name[: brace.start()]), name[brace.end() :]
    return [path for part in parts for path in _expand(before + part + after)]


def open_source(
    spec, *, train=True, size=64, seed=0, captions=True, download=False,
    image_key="filepath", caption_key="title", label_key=None, templates=None
):  # fmt: skip
    """Open the source that a --data argument names. Raises UserError.

    size: edge of drawn pictures. captions: whether they are needed. download: fetch CIFAR if it is missing.
    label_key: the CSV column, or the key in the JSON of tar shards, that names the class of a sample.
    templates: captions of a class, {} being its name; default: the source's own.
    """
    shapes = re.fullmatch(r"shapes(?::(\d+))?", spec)
    cifar = re.fullmatch(r"(cifar100?)(?::(.+))?", spec)
    if shapes:
        n = int(shapes[1] or (1024 if train else 512))
        if n < 2:
            raise UserError(f"--data {spec}: needs at least 2 pictures")
        source = Shapes(n, size, seed, train)
    elif cifar:
        source = Cifar(cifar[1], cifar[2] or "data", train, download)
    elif os.path.isdir(os.path.join(spec, CIFAR10.base_folder)):
        source = Cifar("cifar10", spec, train)
    elif os.path.isdir(os.path.join(spec, CIFAR100.base_folder)):
        source = Cifar("cifar100", spec, train)
    elif os.path.isdir(spec):
        source = Tree(spec, train, captions)
    elif re.search(r"\.tar(\}|$|::)", spec):
        parts = [spec] if os.path.exists(spec) else spec.split("::")
        source = Shards([path for part in parts for path in _expand(part)], captions, label_key)
    elif spec.endswith((".csv", ".tsv")):
        source = Table(spec, image_key, caption_key, label_key, captions)
    else:
        if os.path.isfile(spec):
            _refuse_compressed(spec)
        raise UserError(
            f"{spec}: neither shapes[:N], nor .tar files (braces, globs, A::B), nor a .csv or .tsv file, "
            "nor a folder of classes, nor cifar10[:DIR] or cifar100[:DIR]"
        )
    if templates:
        source.templates = templates
    return source


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
