"""MoCo v3 (Chen, Xie & He, 2021): ViT encoders that learn from two views of each picture, without labels.

A base encoder and its predictor make queries; a momentum encoder, a moving average of the base encoder, makes
keys. Parameter names are those of the published checkpoints, and of timm's ViT inside the encoders, so that
weights go back and forth. Needs torch only. To use it elsewhere, copy the file and scan.py:

    model = create("moco_vit_s16")
    numbers = draw_views()                                   # (2, 9), of each sample: its augmentations
    view1, view2 = model.inputs((crops, numbers), device)    # (b, 2, 3, h, w) uint8, (b, 2, 9)
    model.update_momentum_encoder(momentum(progress))        # progress: share of the run that is done
    q1, q2, k1, k2 = model(view1, view2)                     # unit vectors (b, 256); keys without gradient
    a, b, loss = model.losses(q1, q2, k1, k2)                # (b,) of both views, what to minimise
    features = model.features(images)                        # (b, width), of the base encoder, for later
"""

import copy
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scan import info_nce

# hidden, dim: of the projector and the predictor. moco_vit_tiny is ours, for two CPU cores.
ARCHS = {
    "moco_vit_tiny": dict(family="vit", width=96, layers=4, heads=3, patch=8, hidden=512, dim=128),
    "moco_vit_s16": dict(family="vit", width=384, layers=12, heads=12, patch=16, hidden=4096, dim=256),
    "moco_vit_b16": dict(family="vit", width=768, layers=12, heads=12, patch=16, hidden=4096, dim=256),
}


# ---------------------------------------------------------------- the backbone, under timm's names


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (b, n, width)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, heads, n, d)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x):  # (b, 3, h, w) -> (b, patches, width)
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_positions(side, width):
    """(1, 1 + side², width): fixed sines and cosines of column and row, zeros for the class token."""
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, got {width}")
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))  # rows first, as published
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = (x.flatten()[:, None] * frequencies for x in (row, column))  # (side², width / 4)
    grid = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1)
    return torch.cat([torch.zeros(1, width), grid])[None]


class VisionTransformer(nn.Module):
    """ViT with fixed positions and, for stability, a patch projection that stays random (Sect. 4.2 there)."""

    def __init__(self, image_size, width, layers, heads, patch, head):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(image_size // patch, width), requires_grad=False)
        self.patch_embed = PatchEmbed(patch, width).requires_grad_(False)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # q, k and v are three projections: each has its own fan-out
            bound = math.sqrt(6 / (2 * width))
            nn.init.uniform_(block.attn.qkv.weight, -bound, bound)
        bound = math.sqrt(6 / (3 * patch**2 + width))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)
        self.head = head

    def forward_features(self, x):
        """(b, 3, h, w) normalised images -> (b, width), the class token after the last norm."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]

    def forward(self, x):
        return self.head(self.forward_features(x))


# ---------------------------------------------------------------- projector and predictor


class _SumOverRanks(torch.autograd.Function):
    """All-reduce, with gradient: what one rank's sum gives, every rank's loss sends back."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the global batch. (torch's SyncBatchNorm does that too, but on GPUs alone.)"""

    def forward(self, x):  # (b, width), b equal on all ranks
        if not (
            self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        ):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            n = len(x) * dist.get_world_size()
            mean = _SumOverRanks.apply(x.sum(0)) / n
            var = _SumOverRanks.apply((x - mean).square().sum(0)) / n
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
            x = (x - mean) * (var + self.eps).rsqrt()
            return x * self.weight + self.bias if self.affine else x


def _mlp(layers, width, hidden, dim):
    """Linear layers without bias, each followed by batch norm; the last one's is not affine, and no ReLU."""
    sizes = [width] + [hidden] * (layers - 1) + [dim]
    modules = []
    for fan_in, fan_out in zip(sizes[:-2], sizes[1:-1], strict=True):
        modules += [nn.Linear(fan_in, fan_out, bias=False), BatchNorm(fan_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(hidden, dim, bias=False), BatchNorm(dim, affine=False))


# ---------------------------------------------------------------- the two views, augmented as a batch

# Loading processes draw numbers per sample (`draw_views`); by them the batch is augmented on the device.
# (transforms.v2 would draw one set of numbers for the whole batch.) Neutral where a sample stays as it is:
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE, FLIP = range(9)
VIEWS = dict(blur=1.0, solarize=0.0), dict(blur=0.1, solarize=0.2)  # the two of BYOL: how often each happens
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


def draw_views():
    """(2, 9) float32: the numbers of both views of one sample."""
    return torch.stack([draw_view(**view) for view in VIEWS])


def plan(numbers):
    """Which samples each adjustment is for, worked out on the CPU: nothing then waits for the GPU.

    numbers: (b, 9) of `draw_view`. Returns them with five columns more, (b, 14) float32: the samples sorted
    by their first .. fourth adjustment, and with the blurred ones first; and how many samples each adjustment
    has as the first .. fourth, and how many are blurred, or not: 5 x 4 numbers.
    """
    order = _ORDERS[numbers[:, ORDER].long()]  # (b, 4)
    keys = torch.cat([order, numbers[:, SIGMA, None] == 0], 1)  # (b, 5)
    sizes = [torch.bincount(key, minlength=4).tolist() for key in keys.T]
    return torch.cat([numbers, keys.argsort(dim=0, stable=True).float()], 1), sizes


def augment(images, numbers, sizes):
    """Colour jitter, grey, blur, solarize and flip, each sample by its own numbers.

    images: (b, 3, h, w) uint8. numbers (on the same device) and sizes: of `plan`. Returns float32, 0 .. 255.
    """
    x = images.float() / 255
    factors = numbers[:, :9, None, None, None]  # (b, 9, 1, 1, 1)
    rows = numbers[:, 9:].long()
    for turn in range(4):
        groups = rows[:, turn].split(sizes[turn])
        for kind, adjust in enumerate((_brightness, _contrast, _saturation, _hue)):
            group = groups[kind]
            x[group] = adjust(x[group], factors[group, kind])
    x = torch.where(factors[:, GREY] > 0, _grey(x), x)
    blurred = rows[: sizes[4][0], 4]
    if len(blurred):
        x[blurred] = _blur(x[blurred], factors[blurred, SIGMA])
    x = torch.where((factors[:, SOLARIZE] > 0) & (x >= 128 / 255), 1 - x, x)
    x = torch.where(factors[:, FLIP] > 0, x.flip(-1), x)
    return x * 255


def _grey(x):
    red, green, blue = x.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _brightness(x, factor):
    return (factor * x).clamp(0, 1)


def _contrast(x, factor):
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, factor).clamp(0, 1)


def _saturation(x, factor):
    return torch.lerp(_grey(x).expand_as(x), x, factor).clamp(0, 1)


def _hue(x, turn):
    """Turn the hue by a share of the full circle, through the HSV hexagon."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    chroma = high - low
    hue = torch.where(high == green, blue - red, torch.where(high == red, green - blue, red - green))
    first = torch.where(high == green, 2.0, torch.where(high == red, 0.0, 4.0))  # which sixth it starts from
    k = hue / chroma.clamp(min=1e-9) + first + 6 * turn
    k = torch.cat([k + 5, k + 3, k + 1], 1) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x, sigma):
    """Gaussian, one sigma (n, 1, 1, 1) per picture, cut at 3 of the widest (2 pixels)."""
    n, channels, height, width = x.shape
    offsets = torch.arange(-6, 7, device=x.device)
    kernel = (-(offsets**2) / (2 * sigma.square())).softmax(-1)  # (n, 1, 1, 13)
    kernel = kernel.expand(n, channels, 1, 13).reshape(n * channels, 1, 1, 13)
    x = F.pad(x, (6, 6, 6, 6), mode="reflect").flatten(0, 1)[None]  # (1, 3 n, h + 12, w + 12)
    x = F.conv2d(F.conv2d(x, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
    return x.view(n, channels, height, width)


# ---------------------------------------------------------------- the method


TEMPERATURE = 0.2


def momentum(progress):
    """Of the moving average: from .99 to 1 by a cosine. progress: share of the run that is done, 0 .. 1."""
    return 1 - 0.01 * (1 + math.cos(math.pi * progress)) / 2


class MoCo(nn.Module):
    eval_crop = 0.875  # share of the resized picture's shorter side that evaluation looks at: 224 of 256

    def __init__(self, arch, image_size):
        super().__init__()
        sizes = dict(ARCHS[arch])
        hidden, dim, _ = sizes.pop("hidden"), sizes.pop("dim"), sizes.pop("family")
        self.arch, self.image_size = arch, image_size
        projector = _mlp(3, sizes["width"], hidden, dim)
        self.base_encoder = VisionTransformer(image_size, **sizes, head=projector)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = _mlp(2, dim, hidden, dim)
        # of the pixels it expects, ImageNet's; on the model's device, and in no checkpoint
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalize(self, images):
        """(b, 3, h, w) in 0 .. 255 -> float32, as `features` expects them; on the model's device."""
        return (images.float() / 255 - self.pixel_mean) / self.pixel_std

    def inputs(self, batch, device):
        """What a loader gives, crops (b, 2, 3, h, w) uint8 and numbers (b, 2, 9) -> two views of each."""
        crops, numbers = batch
        crops = crops.to(device, non_blocking=True)
        planned = [plan(numbers[:, k]) for k in range(2)]
        numbers = torch.stack([columns for columns, _ in planned])  # (2, b, 14): one copy for both views
        numbers = (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
        views = [augment(crops[:, k], numbers[k], sizes) for k, (_, sizes) in enumerate(planned)]
        return [self.normalize(view) for view in views]

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """momentum encoder <- m x itself + (1 - m) x base encoder. Before the keys of a step are computed."""
        base, moving = list(self.base_encoder.parameters()), list(self.momentum_encoder.parameters())
        get_ema_multi_avg_fn(m)(moving, base, None)

    def features(self, images):
        """(b, 3, h, w) normalised images -> (b, width), of the base encoder without its projector."""
        return self.base_encoder.forward_features(images)

    def forward(self, view1, view2):
        """Two views (b, 3, h, w) of the same samples -> queries q1, q2, keys k1, k2: (b, dim) unit vectors.

        The views go through the encoders one after the other: batch norm sees one view at a time.
        """
        q1, q2 = (self.predictor(self.base_encoder(view)) for view in (view1, view2))
        with torch.no_grad():
            k1, k2 = (self.momentum_encoder(view) for view in (view1, view2))
        return tuple(F.normalize(x.float(), dim=-1) for x in (q1, q2, k1, k2))

    @staticmethod
    def losses(q1, q2, k1, k2):
        """-> (b,) losses of both views, and what to minimise: weighed by twice the temperature."""
        a, b = info_nce(q1, k2, 1 / TEMPERATURE), info_nce(q2, k1, 1 / TEMPERATURE)
        return a, b, 2 * TEMPERATURE * (a + b).mean()


def create(arch, image_size=224):
    """A MoCo v3 model with random weights. arch: one of ARCHS. image_size: a multiple of the patch."""
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    patch = ARCHS[arch]["patch"]
    if image_size < patch or image_size % patch:
        raise ValueError(f"{arch} needs an image size that is a multiple of {patch}, got {image_size}")
    return MoCo(arch, image_size)
