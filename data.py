"""Images and captions by random access: a sample has an int64 id, its position, and is read when asked for.

A source says `len`, `image(id)`, `caption(id)`, `where(id)`, `fingerprint()`, and what is known of it:
`truth` (planted faults), `classes` and `labels`. `open_source` picks one from a --data argument:

    shapes:N                     captioned pictures, drawn on demand, with planted faults   Shapes
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
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import stat
import tarfile
import unicodedata
import zlib
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2


class UserError(Exception):
    """What is wrong, where, and what to do: one line for the user."""


DataError = UserError


# ---------------------------------------------------------------- text to tokens


class HashedWords:
    """Words hashed to token ids: a tokenizer with nothing to download. Different words rarely share an id.

    NFKC, lower case; a word is a run of \\w, but each CJK character and each other non-space character is
    its own.
    """

    name, vocab_size, context_length = "hashed words", 49408, 77
    _cjk = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
    _word = re.compile(rf"[{_cjk}]|[^\W{_cjk}]+|[^\w\s]")

    def __call__(self, text):
        """str -> (n,) int64 token ids, start and end included, n <= context_length."""
        words = self._word.findall(unicodedata.normalize("NFKC", text).lower())[: self.context_length - 2]
        ids = [1 + zlib.crc32(word.encode("utf-8", "replace")) % 49405 for word in words]
        return np.array([49406, *ids, 49407], dtype=np.int64)


class BPE:
    """CLIP's byte-pair encoding, from bpe_simple_vocab_16e6.txt.gz or a file of the same form."""

    context_length = 77
    # what ftfy, called first by CLIP's tokenizer, does to ordinary text: plain quotes, no ligatures
    _plain = {c: "'" for c in (0x2BC, *range(0x2018, 0x201C))} | {c: '"' for c in range(0x201C, 0x2020)}
    _plain |= {
        c: unicodedata.normalize("NFKC", chr(c))
        for c in (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06)
    }
    _plain |= {0x149: "'n", 0xFB05: "\u017ft", 0x3000: " "}
    _plain |= {c: unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFFF0)}
    _plain |= {c: None for c in (*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF)}
    _plain |= {c: None for c in range(0xFFF9, 0xFFFD)}
    _special = re.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)

    def __init__(self, path):
        try:
            raw = gzip.decompress(Path(path).read_bytes())
            lines = raw.decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"--vocab {path}: not a gzipped BPE vocabulary ({error})") from None
        merges = [tuple(line.split()) for line in lines if line.strip()]
        if any(len(merge) != 2 for merge in merges):
            raise DataError(f"--vocab {path}: every line after the first must hold two symbols")
        # every byte gets a printable stand-in: itself if it has one, else the next character from 256 on
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self._byte = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        symbols = list(self._byte.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(merge) for merge in merges]
        symbols += ["<start_of_text>", "<end_of_text>"]
        self._id = {s: i for i, s in enumerate(symbols)}
        self._rank = {merge: i for i, merge in enumerate(merges)}
        self.vocab_size = len(symbols)
        self.name = f"bpe {hashlib.sha256(raw).hexdigest()[:16]}"

    def _words(self, text):
        """Split as CLIP does: special words and contractions, runs of letters, single digits, the rest."""
        at = 0
        while at < len(text):
            special = self._special.match(text, at)
            if special:
                end = special.end()
            else:
                kind, end = self._kind(text[at]), at + 1
                while kind in "LO" and end < len(text) and self._kind(text[end]) == kind:
                    end += 1
                if kind == " ":
                    at = end
                    continue
            yield text[at:end]
            at = end

    @staticmethod
    def _kind(char):
        category = unicodedata.category(char)[0]
        return category if category in "LN" else " " if char.isspace() else "O"

    def _encode(self, word):
        if word in ("<start_of_text>", "<end_of_text>"):
            return [self._id[word]]
        symbols = [self._byte[b] for b in word.encode("utf-8", "replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            best = min(
                zip(symbols, symbols[1:], strict=False),
                key=lambda pair: self._rank.get(pair, len(self._rank)),
            )
            if best not in self._rank:
                break
            merged, i = [], 0
            while i < len(symbols):
                step = 2 if tuple(symbols[i : i + 2]) == best else 1
                merged.append("".join(symbols[i : i + step]))
                i += step
            symbols = merged
        return [self._id[s] for s in symbols]

    def __call__(self, text):
        """str -> (n,) int64 token ids, start and end included, n <= context_length."""
        text = unicodedata.normalize("NFC", text.translate(self._plain))
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        ids = itertools.chain.from_iterable(map(self._encode, self._words(text)))
        ids = list(itertools.islice(ids, self.context_length - 2))  # the end token always stays
        return np.array([self.vocab_size - 2, *ids, self.vocab_size - 1], dtype=np.int64)


def pad(tokens):
    """Token arrays -> (b, longest) int64; the text tower is causal, so shorter padding changes nothing."""
    out = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.int64)
    for row, ids in zip(out, tokens, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return out


# ---------------------------------------------------------------- bytes to pictures


# what Pillow may take bytes for: of its other formats some start programs (EPS), some match any text
_FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF".split()
_MOST_PIXELS = 1024**3 // 12  # of a 256 MB picture; above it Pillow warns of a bomb


def decode(data, draft=None):
    """Bytes of an image file -> RGB picture, upright. draft: a JPEG may be decoded at 1/2, 1/4 .. of its
    size, if its sides stay at least `draft`. Alpha is laid on white; 16-bit grey is scaled to 8; of
    animations the first frame.
    """
    picture = Image.open(io.BytesIO(data), formats=_FORMATS)
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
    picture = ImageOps.exif_transpose(picture)
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
    return picture.convert("RGB")


_LONGEST_CAPTION = 1 << 12  # bytes or characters: the 77 tokens take a few hundred, and BPE squares the rest


def clean(caption):
    """A caption, cut to what a tokenizer may need. ValueError for what is no text: NULs, half a character."""
    caption = caption[:_LONGEST_CAPTION]
    caption.encode()  # text from files with wrong bytes in it does not encode
    if "\0" in caption:
        raise ValueError("a NUL in the caption")
    return caption


def normalize(images, mean_std):
    """(b, 3, h, w) uint8 -> float32, on the device they are on. mean_std: what the model expects of RGB."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in mean_std)
    return (images.float() / 255 - mean) / std


def eval_transform(size, crop=1.0, interpolation=v2.InterpolationMode.BICUBIC):
    resize = v2.Resize(int(size / crop), interpolation=interpolation)
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


# ---------------------------------------------------------------- MoCo v3's augmentations, batched

# Of its two views (those of BYOL): how often each is blurred and solarized.
MOCO_VIEWS = dict(blur=1.0, solarize=0.0), dict(blur=0.1, solarize=0.2)
# What is drawn for each view of each sample, neutral values where it stays as it is.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE, FLIP = range(9)
_ORDERS = torch.tensor(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))  # (24, 4)


def draw_view(blur, solarize):
    """(9,) float32: colour jitter (.4 .4 .2 .1, in random order) with p .8, grey .2, flip .5, blur, solarize.

    sigma of the blur in pixels, uniform in .1 .. 2; 0 if not blurred. From torch's default generator.
    """
    u = torch.rand(11)
    out = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    if u[0] < 0.8:
        out[:4] += (2 * u[1:5] - 1) * torch.tensor([0.4, 0.4, 0.2, 0.1])
        out[ORDER] = (u[5] * len(_ORDERS)).floor().clamp(max=len(_ORDERS) - 1)
    out[GREY], out[FLIP], out[SOLARIZE] = u[6] < 0.2, u[7] < 0.5, u[8] < solarize
    if u[9] < blur:
        out[SIGMA] = 0.1 + 1.9 * u[10]
    return out


def augment(images, drawn):
    """Colour jitter, grey, blur, solarize and flip, each sample by its own numbers, on the images' device.

    images: (b, 3, h, w) uint8. drawn: (b, 9) of `draw_view`, on the CPU, so that nothing waits for the GPU.
    Returns (b, 3, h, w) float32 in 0 .. 255. transforms.v2 draws one set of numbers per call: hence this.
    """
    x = images.float() / 255
    factors = drawn.to(x.device, non_blocking=True)[:, :, None, None, None]  # (b, 9, 1, 1, 1)

    def rows_where(chosen):
        return chosen.nonzero().flatten().to(x.device, non_blocking=True)

    order = _ORDERS[drawn[:, ORDER].long()]  # (b, 4)
    jitter = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
    for turn, (kind, adjust) in itertools.product(range(4), jitter.items()):
        rows = rows_where(order[:, turn] == kind)
        x[rows] = adjust(x[rows], factors[rows, kind])
    x = torch.where(factors[:, GREY] > 0, _grey(x), x)
    rows = rows_where(drawn[:, SIGMA] > 0)
    x[rows] = _blur(x[rows], factors[rows, SIGMA])
    x = torch.where((factors[:, SOLARIZE] > 0) & (x >= 128 / 255), 1 - x, x)
    x = torch.where(factors[:, FLIP] > 0, x.flip(-1), x)
    return x * 255


def _grey(x):
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _brightness(x, factor):
    return (factor * x).clamp(0, 1)


def _contrast(x, factor):
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, factor).clamp(0, 1)


def _saturation(x, factor):
    return torch.lerp(_grey(x).expand_as(x), x, factor).clamp(0, 1)


def _hue(x, turn):
    """Turn the hue by a share of the full circle, through the HSV hexagon."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = x.split(1, 1)
    hue = torch.where(high == green, blue - red, torch.where(high == red, green - blue, red - green))
    first = torch.where(high == green, 2.0, torch.where(high == red, 0.0, 4.0))  # which sixth it starts from
    k = (hue / chroma.clamp(min=1e-9) + first + 6 * turn + x.new_tensor([5, 3, 1]).view(3, 1, 1)) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x, sigma):
    """Gaussian, one sigma (n, 1, 1, 1) per picture, cut at 3 of the widest (2 pixels)."""
    if not len(x):
        return x
    n, channels, height, width = x.shape
    kernel = (-(torch.arange(-6, 7, device=x.device) ** 2) / (2 * sigma.square())).softmax(
        -1
    )  # (n, 1, 1, 13)
    kernel = kernel.expand(n, channels, 1, 13).reshape(n * channels, 1, 1, 13)
    x = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1)[None]  # (1, 3 n, h + 12, w + 12)
    x = F.conv2d(F.conv2d(x, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
    return x.view(n, channels, height, width)


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
        return self._bytes.tobytes() + self._ends.tobytes()


class Shapes:
    """Captioned drawings from (seed, id), of any number and size; 64 classes, colour x shape.

    A tenth of the captions describe another picture (ill-matched), and a tenth of the samples are
    near-duplicates: copies up to pixel noise, four to an original, with the same caption. `truth` holds both
    masks. Evaluation pictures (train=False) are clean, balanced over the classes, and drawn from other seeds.
    """

    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
    colours = {
        "red": (214, 39, 40),
        "green": (44, 150, 44),
        "blue": (31, 80, 200),
        "yellow": (240, 210, 40),
        "purple": (148, 60, 180),
        "orange": (255, 127, 14),
        "pink": (245, 140, 190),
        "brown": (120, 70, 40),
    }
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
        return np.array([self._attributes(i)[0] for i in range(self.n)])

    def caption(self, i):
        label, ground, _ = self._attributes(i)
        if self.train and self.truth["ill_matched"][i]:  # describes another picture, of another class
            salts = itertools.count(1)
            label, ground, _ = next(
                other for other in (self._attributes(i, salt) for salt in salts) if other[0] != label
            )
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

        def points(polar):
            """[(radius, angle)] -> pixels, turned and placed."""
            r, a = np.array(polar, dtype=float).T
            xy = centre + (radius * r * np.array([np.cos(a + angle), np.sin(a + angle)])).T
            return [tuple(p) for p in xy * canvas]

        def disc(r, fill, shift=0.0):
            x, y = (centre + radius * np.array([shift, -shift])) * canvas
            r = r * radius * canvas
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

        turn = np.pi / 2
        if shape in ("circle", "ring", "crescent"):
            disc(1, colour)
            if shape == "ring":
                disc(0.6, self.grounds[ground])
            if shape == "crescent":
                disc(0.85, self.grounds[ground], shift=0.4)
        elif shape == "cross":
            for a in (0, turn):
                corners = [(1, a - 0.25), (1, a + 0.25), (1, a + 2 * turn - 0.25), (1, a + 2 * turn + 0.25)]
                draw.polygon(points(corners), fill=colour)
        elif shape == "star":
            star = [(1 if k % 2 == 0 else 0.42, (k - 2.5) * np.pi / 5) for k in range(10)]
            draw.polygon(points(star), fill=colour)
        else:
            corners = {"triangle": 3, "square": 4, "diamond": 4}[shape]
            first = {"triangle": -turn, "square": turn / 2, "diamond": 0}[shape]
            stretch = 0.55 if shape == "diamond" else 1
            polygon = [(stretch if k % 2 else 1, first + k * 4 * turn / corners) for k in range(corners)]
            draw.polygon(points(polygon), fill=colour)
        picture = picture.resize((self.size, self.size), Image.Resampling.BOX)
        noise = np.random.default_rng([self.seed, 4 + self.train, int(i)]).normal(
            0, 6, (self.size, self.size, 3)
        )
        return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))

    def where(self, i):
        return f"shapes, id {i}"

    def fingerprint(self):
        return hashlib.sha256(f"shapes {self.n} {self.size} {self.seed} {self.train}".encode()).hexdigest()


_LARGEST = 1 << 29  # bytes of a picture's file; of a longer one the rest is missing, and no decoder takes it


class Shards:
    """img2dataset / webdataset tar files, read by position: never extracted, never streamed.

    Each tar is indexed once; the index (byte offsets) is cached under $XDG_CACHE_HOME and belongs to one
    state of the tar. A sample is a run of members of one key: an image (the first), and a .txt or a .json
    with "caption", without which it can't be read. Links and folders in a tar are passed over.
    """

    images = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
    truth, labels, classes = {}, None, None

    def __init__(self, paths, captions=True, label_key=None):
        self.paths = Strings(paths)
        self.stamps, tables = [], []
        for path in paths:
            try:
                status = os.stat(path)
                tables.append(_tar_index(path, status))
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from None
            self.stamps.append((status.st_size, status.st_mtime_ns))
        self.first = np.cumsum([0] + [len(table) for table in tables])
        self.table = np.concatenate(
            tables
        )  # (N, 6): offset and size of image, .txt, .json; size -1 if absent
        self._files = {}
        if not len(self.table) or (captions and not (self.table[:, [3, 5]] >= 0).any()):
            what = "an image and a caption" if captions else "an image"
            raise DataError(f"{paths[0]}: no sample with {what} in {len(paths)} tar file(s)")
        if label_key:
            self.classes, self.labels = _classes(self._label(i, label_key) for i in range(len(self)))

    def __len__(self):
        return len(self.table)

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}  # open files stay with their process

    def _read(self, i, part, limit=_LARGEST):
        """Bytes of one member, the first `limit` of them. part: 0 image, 1 text, 2 JSON."""
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        if shard not in self._files:
            if len(self._files) >= 128:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        file = self._files[shard]
        status = os.fstat(file)
        if (status.st_size, status.st_mtime_ns) != self.stamps[shard]:
            raise DataError(
                f"{self.paths[shard]}: changed since it was indexed; start again to index it anew"
            )
        offset, size = (int(x) for x in self.table[i, 2 * part : 2 * part + 2])
        if size < 0:
            raise ValueError("an image without a caption")
        size = min(size, limit)
        data = os.pread(file, size, offset)
        while len(data) < size:  # pread may return less
            more = os.pread(file, size - len(data), offset + len(data))
            if not more:
                raise DataError(f"{self.paths[shard]}: ends before the member at byte {offset}")
            data += more
        return data

    def image(self, i, draft=None):
        return decode(self._read(i, 0), draft)

    def caption(self, i):
        if self.table[i, 3] >= 0:
            content = self._read(i, 1, _LONGEST_CAPTION)  # perhaps cut within a character: not "final"
            decoder = codecs.getincrementaldecoder("utf-8-sig")()
            return clean(decoder.decode(content, final=len(content) < _LONGEST_CAPTION))
        caption = self.meta(i)["caption"]
        if not isinstance(caption, str):
            raise ValueError(f"the caption in its .json is {type(caption).__name__}, not text")
        return clean(caption)

    def meta(self, i):
        """The sample's JSON."""
        return json.loads(self._read(i, 2, limit=1 << 22))

    def _label(self, i, key):
        try:
            label = self.meta(i)[key]
            if not isinstance(label, str | int):
                raise TypeError
            return str(label)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{self.where(i)}: no {key!r} in its .json, or no .json") from None

    def where(self, i):
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        return f"{self.paths[shard]}, image at byte {self.table[i, 0]}"

    def fingerprint(self):
        names = "\n".join(os.path.basename(self.paths[k]) for k in range(len(self.paths)))
        return hashlib.sha256(names.encode() + self.first.tobytes() + self.table.tobytes()).hexdigest()


def _tar_index(path, status):
    """(n, 6) int64 byte ranges of a tar's samples, from the cache or from the tar itself."""
    key = hashlib.sha256(
        f"4 {os.path.realpath(path)} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
    ).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scan" / f"{key}.npy"
    try:
        table = np.load(cache, allow_pickle=False)
        if table.dtype == np.int64 and table.shape[1:] == (6,) and (table[-1] == _digest(table[:-1])).all():
            return table[:-1]
    except (OSError, ValueError, EOFError, IndexError):
        pass

    rows, row, last_key = [], None, None
    try:
        if not os.path.isfile(path):
            raise ValueError("not a regular file")
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # else tarfile keeps every header it has seen
                if member.size < 0:
                    raise ValueError("a member of negative size")
                if not member.isreg() or member.issparse():
                    continue
                folder, name = os.path.split(member.name)
                key, _, extension = name.partition(".")
                extension = extension.lower()
                part = 0 if extension in Shards.images else {"txt": 1, "json": 2}.get(extension)
                if part is None:
                    continue
                if (folder, key) != last_key:
                    row, last_key = [0, -1, 0, -1, 0, -1], (folder, key)
                    rows.append(row)
                if row[2 * part + 1] < 0:
                    row[2 * part : 2 * part + 2] = member.offset_data, member.size
            tail = os.pread(file.fileno(), _LONGEST_TAIL + 1, tar.offset)
            if not tail or tail.strip(b"\0") or len(tail) > _LONGEST_TAIL:
                raise ValueError(f"no end mark, but something else, at byte {tar.offset}")
    except OSError:
        raise
    except Exception as error:  # whatever tarfile makes of broken headers
        error = str(error) or type(error).__name__
        raise DataError(f"{path}: not a whole tar file ({error}); fetch it again, or leave it out") from None
    table = np.array([r for r in rows if r[1] >= 0], dtype=np.int64).reshape(-1, 6)
    if not _in_file(table, status.st_size):
        raise DataError(
            f"{path}: not a whole tar file (a member ends beyond it); fetch it again, or leave it out"
        )
    with contextlib.suppress(OSError):  # a cache that can't be written only costs time
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        with open(temporary, "wb") as file:
            np.save(file, np.vstack([table, _digest(table)]), allow_pickle=False)
        os.replace(temporary, cache)
    return table


class _Headers(io.FileIO):
    """A tar for tarfile to read headers from: else it reads, and searches, as much as they claim to have."""

    def read(self, size):
        if not 0 <= size <= 1 << 15:
            raise ValueError(f"a header of {size} bytes")
        return super().read(size)


# A tar ends in zeros: two blocks of 512, filled up to a record (10 KiB if not told otherwise).
_LONGEST_TAIL = 1 << 20


def _digest(table):
    """SHA-256 as a row of the index's own shape: damage to a cached index shows."""
    return np.frombuffer(hashlib.sha256(table.tobytes()).digest() + bytes(16), np.int64)


def _in_file(table, size):
    offsets, sizes = table[:, 0::2], table[:, 1::2]
    return bool((offsets >= 0).all() and (sizes >= -1).all() and (offsets + sizes <= size).all())


def _read_file(path):
    """Bytes of a regular file; a pipe or a device would make the reader wait or never end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        return file.read(_LARGEST)


_END = "\x03 end of the table"


class Table:
    """A CSV or TSV file with a column of image paths (relative to the file) and one of captions."""

    truth, labels, classes = {}, None, None

    def __init__(self, path, image_key="filepath", caption_key="title", label_key=None, captions=True):
        self.path, self.folder = path, os.path.dirname(os.path.abspath(path))
        if os.path.exists(path) and not os.path.isfile(path):
            raise DataError(f"{path}: not a regular file")
        csv.field_size_limit(1 << 26)
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                header = file.readline(1 << 16)
            headers = {d: next(csv.reader([header], delimiter=d), []) for d in ",\t;|"}
            needed = {image_key, caption_key} if captions else {image_key}
            fitting = [d for d, names in headers.items() if needed <= set(names)]
            if not fitting:
                found = str(max(headers.values(), key=len))[:500]
                raise DataError(
                    f"{path}: no columns {image_key!r} and {caption_key!r} in "
                    f"{found}; name yours with --img-key and --caption-key. "
                    f"Three lines for example: "
                    f"{image_key},{caption_key} / images/1.jpg,a red car / images/2.jpg,two dogs"
                )
            self.images = Strings(self._column(image_key, fitting[0]))
            self.captions = Strings(self._column(caption_key, fitting[0])) if captions else None
            if label_key:
                if label_key not in headers[fitting[0]]:
                    raise DataError(f"{path}: no column {label_key!r} in {headers[fitting[0]]}")
                self.classes, self.labels = _classes(self._column(label_key, fitting[0]))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
        except csv.Error as error:
            raise DataError(f"{path}: {error}; is a quote opened and never closed?") from None
        if not len(self.images):
            raise DataError(f"{path}: no rows below the header")

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
                    raise DataError(f"{self.path}, line {opened + 1}: a quote is opened and never closed")
                opened = rows.line_num
                if row and len(row) != len(header):
                    raise DataError(
                        f"{self.path}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}"
                    )
                if row:
                    yield row[header.index(key)]

    def __len__(self):
        return len(self.images)

    def image(self, i, draft=None):
        return decode(_read_file(self.where(i)), draft)

    def caption(self, i):
        return clean(self.captions[i])

    def same_images(self):
        """Rows of one path are captions of one image -> (ids of the images, image (N,) of each row)."""
        _, firsts, image_of = np.unique(list(self.images), return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(firsts))  # images in the order of the file
        return np.sort(firsts).tolist(), rank[image_of].tolist()

    def where(self, i):
        return os.path.join(self.folder, self.images[i])

    def fingerprint(self):
        captions = self.captions.digest() if self.captions else b""
        return hashlib.sha256(self.images.digest() + captions).hexdigest()


def _pictures(folder):
    """Paths of the pictures below a class folder, in ImageFolder's order.

    A folder that links lead to twice counts once: a link to one above would repeat its pictures without end.
    """

    def refuse(error):  # else a folder that can't be listed would be left out without a word
        raise error

    seen, paths = set(), []
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        place = os.path.realpath(path)
        if place in seen:
            folders.clear()
        else:
            paths += [os.path.join(path, name) for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        seen.add(place)
    return sorted(paths, key=os.path.split)


class Tree:
    """Class folders, as in torchvision's ImageFolder; of DIR/train and DIR/val, `split` where they exist.

    captions=False: a folder without class folders will do, of pictures alone.
    """

    truth, labels, classes = {}, None, None

    def __init__(self, root, split="train", captions=True):
        root = os.path.join(root, split) if os.path.isdir(os.path.join(root, split)) else root
        try:
            entries = sorted(os.scandir(root), key=lambda entry: entry.name)
            classes = [entry.name for entry in entries if entry.is_dir()]
            files = [_pictures(os.path.join(root, name)) for name in classes]
            paths = list(itertools.chain.from_iterable(files))
            if classes:
                self.classes, self.labels = classes, np.repeat(range(len(files)), [len(f) for f in files])
            else:
                paths = [e.path for e in entries if e.name.lower().endswith(IMG_EXTENSIONS) and e.is_file()]
        except OSError as error:
            raise DataError(f"{error.filename or root}: {error.strerror or error}") from None
        if not classes and (captions or not paths):
            raise DataError(f"{root}: no class folders with pictures in it")
        if not paths:
            raise DataError(f"{root}: no pictures in its class folders ({', '.join(self.classes[:5])} ...)")
        self.root, self.images = root, Strings(os.path.relpath(path, root) for path in paths)

    def __len__(self):
        return len(self.images)

    def image(self, i, draft=None):
        return decode(_read_file(self.where(i)), draft)

    def caption(self, i):
        return self.classes[self.labels[i]]

    def where(self, i):
        return os.path.join(self.root, self.images[i])

    def fingerprint(self):
        return hashlib.sha256(self.images.digest()).hexdigest()


class Cifar:
    """CIFAR-10 or CIFAR-100, in the files that torchvision downloads and compares with their MD5 sums."""

    truth = {}

    def __init__(self, name, root, train=True, download=False):
        try:
            cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](root, train, download=download)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{root}: no whole {name} in it ({str(error).splitlines()[0]})") from None
        self.name, self.pictures, self.classes = name, cifar.data, cifar.classes  # (N, 32, 32, 3) uint8
        self.labels = np.array(cifar.targets)

    def __len__(self):
        return len(self.pictures)

    def image(self, i, draft=None):
        return Image.fromarray(self.pictures[i])

    def caption(self, i):
        return self.classes[self.labels[i]]

    def where(self, i):
        return f"{self.name}, id {i}"

    def fingerprint(self):
        return hashlib.sha256(self.pictures.tobytes()).hexdigest()


def _classes(names):
    """Names of the samples' classes -> (classes, sorted; labels (N,))."""
    classes, labels = np.unique(np.array(list(names)), return_inverse=True)
    return classes.tolist(), labels


def _expand(pattern):
    """Braces {00000..00331} and {a,b}, then globs -> paths, in order."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not paths:
            raise DataError(f"{pattern}: matches no file")
        return paths
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if span:
        first, last = span.groups()
        if int(last) < int(first):
            raise DataError(f"{pattern}: the range {brace[0]} is empty")
        parts = (str(k).zfill(len(first)) for k in range(int(first), int(last) + 1))
    else:
        parts = brace[1].split(",")
    return [p for part in parts for p in _expand(pattern[: brace.start()] + part + pattern[brace.end() :])]


def open_source(
    spec,
    *,
    train=True,
    size=64,
    seed=0,
    captions=True,
    image_key="filepath",
    caption_key="title",
    label_key=None,
    download=False,
):
    """A --data argument -> its source. Raises DataError.

    size: edge of drawn pictures. captions: whether they are needed. label_key: the CSV column, or the key in
    the JSON of tar shards, that names the class of a sample. download: fetch CIFAR if it is missing.
    """
    cifar = re.fullmatch(r"(cifar100?)(?::(.+))?", spec)
    if re.fullmatch(r"shapes(:\d+)?", spec):
        n = int(spec.partition(":")[2] or (1024 if train else 512))
        if n < 2:
            raise DataError(f"--data {spec}: needs at least 2 pictures")
        return Shapes(n, size, seed, train)
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
    raise DataError(
        f"{spec}: neither shapes[:N], nor .tar files (braces, globs, A::B), nor a .csv/.tsv file, nor a "
        f"folder of classes, nor cifar10[:DIR] or cifar100[:DIR]"
    )


# ---------------------------------------------------------------- the dataset


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

    def why(self, i):
        return self.source.where(i)

    def set_epoch(self, epoch):
        """Before the loader's iterator starts."""
        self._epoch.fill_(epoch)

    def __getitem__(self, i):
        for used in itertools.islice(itertools.cycle(range(len(self))), i, i + len(self)):
            try:
                with torch.random.fork_rng(devices=[]):
                    seed = hashlib.sha256(f"{self.seed} {self._epoch} {used}".encode()).digest()
                    torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
                    return used, i if used != i else -1, *self.read(used)
            except DataError:
                raise
            except Exception:  # whatever a decoder makes of broken bytes
                continue
        raise DataError(f"not one of {len(self)} samples can be read, {self.source.where(i)} for example")


class Pairs(Samples):
    """CLIP's samples: an image (3, size, size) uint8, lightly cropped, and the token ids of its caption.

    mismatch: a share of the samples whose captions are shuffled among them, alike for every seed; `truth`
    says which.
    """

    def __init__(self, source, tokenizer, size, *, crop_min=0.9, seed=0, mismatch=0.0):
        super().__init__(source, seed)
        self.tokenizer, self.mismatch = tokenizer, mismatch
        crop = v2.RandomResizedCrop(size, (crop_min, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        self.transform = v2.Compose([crop, v2.PILToTensor()])
        self.draft = math.ceil(size / math.sqrt(crop_min))  # the smallest crop still covers the image size
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
        return hashlib.sha256(f"{self.source.fingerprint()} {self.mismatch}".encode()).hexdigest()[:16]

    def caption(self, i):
        return self.source.caption(i if self.caption_of is None else int(self.caption_of[i]))

    def read(self, i):
        caption = self.caption(i)
        if not caption.strip():
            raise ValueError("empty caption")
        return self.transform(self.source.image(i, self.draft)), torch.from_numpy(self.tokenizer(caption))

    @staticmethod
    def inputs(images, tokens, device, mean_std):
        """A batch of the loader -> what the model takes: normalised images and token ids, on the device."""
        images = normalize(images.to(device, non_blocking=True), mean_std)
        return images, tokens.to(device, non_blocking=True)


class Views(Samples):
    """MoCo's samples: two crops (2, 3, size, size) uint8, and the numbers (2, 9) of their augmentations.

    Only what needs the picture is done here; `inputs` does the rest for the whole batch on the device.
    """

    def __init__(self, source, size, draw_views, *, crop_min=0.08, seed=0):
        self.draw_views = draw_views
        super().__init__(source, seed)
        self.transform = v2.Compose([v2.RandomResizedCrop(size, (crop_min, 1.0)), v2.PILToTensor()])
        self.draft = math.ceil(size / math.sqrt(crop_min))
        self.truth = {k: v for k, v in source.truth.items() if k == "redundant"}  # captions play no part

    def read(self, i):
        picture = self.source.image(i, self.draft)
        drawn = self.draw_views()
        return torch.stack([self.transform(picture) for _ in MOCO_VIEWS]), drawn

    @staticmethod
    def inputs(crops, drawn, device, mean_std):
        """A batch of the loader -> what the model takes: two normalised views, on the device."""
        crops = crops.to(device, non_blocking=True)
        return tuple(normalize(augment(crops[:, k], drawn[:, k]), mean_std) for k in range(2))


def collate(items):
    """-> used ids (b,) int64, failed ids (b,) int64, images uint8, and tokens (b, longest) or (b, 2, 9)."""
    used, failed, images, others = zip(*items, strict=True)
    others = torch.stack(others) if others[0].ndim > 1 else pad(others)
    return torch.tensor(used), torch.tensor([f for f in failed if f >= 0], dtype=torch.int64), torch.stack(images), others


class Pictures(Dataset):
    """Items (id, image) for evaluation: every sample, in order; one that can't be read is an error."""

    def __init__(self, source, transform):
        self.source, self.transform = source, transform

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return i, self.transform(self.source.image(i))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.source.where(i)}: cannot be read ({error})") from None
