"""CLIP: the image and text towers of the paper (Sect. 4.1), their tokenizers, inputs and losses.

Configurations, initial weights and parameter names are those of open_clip and OpenAI's CLIP, so that weights
go back and forth with `load_state_dict(strict=True)`. Needs torch, and torchvision for swin_b. To use it
elsewhere, copy the file and scan.py:

    model, words = create("vit_b32"), HashedWords()          # or BPE("bpe_simple_vocab_16e6.txt.gz")
    images, tokens = model.inputs((pixels, tokens), device)  # (b, 3, h, w) uint8, (b, n) of words(text)
    image, text, scale = model(images, tokens)               # unit vectors (b, embed_dim), exp(logit_scale)
    a, b, loss = model.losses(image, text, scale)            # (b,) of both directions, what to minimise
"""

import gzip
import hashlib
import html
import itertools
import math
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from scan import info_nce

# family (of TOWERS), vision: the image tower; text: width and layers. Heads are width / 64.
ARCHS = {
    "vit_tiny": dict(family="vit", vision=dict(width=192, layers=4, patch=16), text=(128, 3), embed_dim=128),
    "vit_s32": dict(family="vit", vision=dict(width=384, layers=12, patch=32), text=(384, 12), embed_dim=384),
    "vit_s16": dict(family="vit", vision=dict(width=384, layers=12, patch=16), text=(384, 12), embed_dim=384),
    "vit_b32": dict(family="vit", vision=dict(width=768, layers=12, patch=32), text=(512, 12), embed_dim=512),
    "vit_b16": dict(family="vit", vision=dict(width=768, layers=12, patch=16), text=(512, 12), embed_dim=512),
    "rn50": dict(family="resnet", vision=dict(layers=(3, 4, 6, 3)), text=(512, 12), embed_dim=1024),
    "rn101": dict(family="resnet", vision=dict(layers=(3, 4, 23, 3)), text=(512, 12), embed_dim=512),
    "swin_b": dict(family="swin", vision=dict(), text=(640, 12), embed_dim=640),
}


# ---------------------------------------------------------------- transformers


class QuickGELU(nn.Module):
    """The sigmoid approximation that OpenAI's own weights were trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with nn.MultiheadAttention's parameter names and initial weights."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        b, n, d = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (b, heads, n, d / heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, causal, act):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", act())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, causal=False, act=nn.GELU):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, causal, act) for _ in range(layers)])

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


# ---------------------------------------------------------------- image towers


class VisionTransformer(nn.Module):
    def __init__(self, image_size, embed_dim, act, patch, width, layers):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        positions = (image_size // patch) ** 2 + 1  # the first is the class token's
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // 64, act=act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, x):  # (b, 3, h, w)
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (b, patches, width)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        return self.ln_post(x[:, 0]) @ self.proj  # (b, embed_dim)


class Bottleneck(nn.Module):
    """ResNet bottleneck that downsamples by average pooling, not by a strided convolution (anti-aliasing)."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # every block starts as the identity
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inplanes, 4 * planes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.pool(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Attention with a single query, the mean of the feature map."""

    def __init__(self, positions, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for proj in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(proj.weight, std=width**-0.5)

    def forward(self, x):  # (b, width, h, w)
        x = x.flatten(2).transpose(1, 2)  # (b, h w, width)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (b, heads, 1, width / heads)
        return self.c_proj(x.flatten(1))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three stem convolutions, average pooling in place of strides, attention pooling."""

    def __init__(self, image_size, embed_dim, act, layers, width=64):  # act: of transformers alone
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inplanes = width
        for i, blocks in enumerate(layers):
            planes, stage = width * 2**i, []
            for j in range(blocks):
                stage.append(Bottleneck(inplanes, planes, stride=2 if i > 0 and j == 0 else 1))
                inplanes = 4 * planes
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool((image_size // 32) ** 2, inplanes, inplanes // 64, embed_dim)

    def forward(self, x):  # (b, 3, h, w)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)  # (b, width, h / 4, w / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (b, 32 width, h / 32, w / 32)
        return self.attnpool(x)


def _swin_b(image_size, embed_dim, act):
    from torchvision.models import SwinTransformer

    # torchvision's swin_b() fixes a stochastic depth of 0.5, made for supervised training
    swin = SwinTransformer([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [7, 7], stochastic_depth_prob=0.1)
    swin.head = nn.Linear(1024, embed_dim, bias=False)
    return swin


TOWERS = {"vit": VisionTransformer, "resnet": ModifiedResNet, "swin": _swin_b}


# ---------------------------------------------------------------- the model


class CLIP(nn.Module):
    """An image tower and a text tower with a common embedding space."""

    eval_crop = 1.0  # evaluation crops this share of the resized picture's shorter side

    def __init__(self, arch, image_size, vocab_size, context_length, quick_gelu):
        super().__init__()
        config = ARCHS[arch]
        embed_dim, vision, (width, layers) = config["embed_dim"], config["vision"], config["text"]
        act = QuickGELU if quick_gelu else nn.GELU
        self.arch, self.image_size, self.feature_dim = arch, image_size, embed_dim
        self.quick_gelu = quick_gelu
        self.visual = TOWERS[config["family"]](image_size, embed_dim, act, **vision)

        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.transformer = Transformer(width, layers, width // 64, causal=True, act=act)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        # initial weights of the text tower, residual branches scaled by depth; image towers keep torch's
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        branch_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=branch_std)

        # input normalisation; buffers, not saved
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalize(self, images):
        """(b, 3, h, w) uint8 -> float32, as `encode_image` expects; on the model's device."""
        return (images.float() / 255 - self.pixel_mean) / self.pixel_std

    def inputs(self, batch, device):
        """A loader's batch, pixels (b, 3, h, w) uint8 and tokens (b, n) -> the arguments of `forward`."""
        pixels, tokens = (x.to(device, non_blocking=True) for x in batch)
        return self.normalize(pixels), tokens

    def encode_image(self, images):
        """(b, 3, h, w) normalised images -> (b, embed_dim), before normalisation."""
        return self.visual(images)

    features = encode_image  # the name that moco.MoCo has for it

    def encode_text(self, tokens):
        """(b, n) int tokens, n up to the context length -> (b, embed_dim), before normalisation."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (b, n, width)
        x = self.ln_final(self.transformer(x))
        end = tokens.argmax(1)  # the highest id; attention is causal, so padding after it has no effect
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def forward(self, images, tokens):
        """-> float32 unit vectors (b, embed_dim) of images and of texts; exp(logit_scale)."""
        image = F.normalize(self.encode_image(images).float(), dim=-1)
        text = F.normalize(self.encode_text(tokens).float(), dim=-1)
        return image, text, self.logit_scale.exp()

    @staticmethod
    def losses(image, text, scale):
        """-> (b,) losses of both directions of Eq. 1, and the loss to minimise."""
        a, b = info_nce(image, text, scale), info_nce(text, image, scale)
        return a, b, ((a + b) / 2).mean()


def create(arch, image_size=224, vocab_size=49408, context_length=77, quick_gelu=False):
    """Create a model with random weights. arch: one of ARCHS. image_size: a multiple of the patch, or of 32.

    quick_gelu: OpenAI's activation; open_clip's models of these names use plain GELU.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    multiple = ARCHS[arch]["vision"].get("patch", 32)
    if image_size < multiple or image_size % multiple:
        raise ValueError(f"{arch} needs an image size that is a multiple of {multiple}, got {image_size}")
    return CLIP(arch, image_size, vocab_size, context_length, quick_gelu)


# ---------------------------------------------------------------- text to tokens


class HashedWords:
    """Hash words to token ids: needs no vocabulary file. Different words rarely share an id.

    NFKC, lower case; a word is a run of \\w, a single CJK character, or any other non-space character.
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
    """CLIP's byte-pair encoding, from bpe_simple_vocab_16e6.txt.gz or a file of the same form.

    Tokens differ from CLIP's only in text with mojibake or C1 control characters, which CLIP repairs by ftfy.
    """

    context_length = 77
    # what ftfy does to ordinary text before CLIP tokenizes it: plain quotes, no ligatures
    _plain = {c: "'" for c in (0x2BC, *range(0x2018, 0x201C))} | {c: '"' for c in range(0x201C, 0x2020)}
    _nfkc = [0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06]
    _plain |= {c: unicodedata.normalize("NFKC", chr(c)) for c in [*_nfkc, *range(0xFF01, 0xFFF0)]}
    _plain |= {0x149: "'n", 0xFB05: "\u017ft", 0x3000: " "}
    _removed = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    _plain |= dict.fromkeys(_removed)
    _special = re.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d", re.IGNORECASE)

    def __init__(self, path):
        try:
            raw = gzip.decompress(Path(path).read_bytes())
            lines = raw.decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"--vocab {path}: not a gzipped BPE vocabulary ({error})") from None
        merges = [tuple(line.split()) for line in lines if line.strip()]
        if any(len(merge) != 2 for merge in merges):
            raise ValueError(f"--vocab {path}: every line after the first must hold two symbols")
        # every byte is written as a printable character: itself, or else the next one from 256 on
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
        """Split as CLIP does: special words and contractions, runs of letters, single digits, other runs."""
        at = 0
        while at < len(text):
            special, kind = self._special.match(text, at), self._kind(text[at])
            end = special.end() if special else at + 1
            while not special and kind in "LO" and end < len(text) and self._kind(text[end]) == kind:
                end += 1
            if kind != " ":
                yield text[at:end]
            at = end

    @staticmethod
    def _kind(char):
        category = unicodedata.category(char)[0]
        if category in "LN":  # letters, digits
            return category
        return " " if char.isspace() else "O"

    def _encode(self, word):
        if word in ("<start_of_text>", "<end_of_text>"):
            return [self._id[word]]
        symbols = [self._byte[b] for b in word.encode("utf-8", "replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:])
            best = min(pairs, key=lambda pair: self._rank.get(pair, len(self._rank)))
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
        ids = list(itertools.islice(ids, self.context_length - 2))  # truncation keeps the end token
        return np.array([self.vocab_size - 2, *ids, self.vocab_size - 1], dtype=np.int64)
