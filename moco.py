"""MoCo v3 (Chen, Xie & He, 2021): ViT encoders that learn from two views of each picture, without labels.

A base encoder and its predictor make queries; a momentum encoder, a moving average of the base encoder, makes
keys. Parameter names are those of the published checkpoints, and of timm's ViT inside the encoders, so that
weights go back and forth. Needs torch only. To use it elsewhere, copy the file:

    model = create("moco_vit_s16")
    model.update_momentum_encoder(m)                # before each step
    q1, q2, k1, k2 = model(view1, view2)            # unit vectors (b, 256); keys carry no gradient
    features = model.features(images)               # (b, width), of the base encoder, for later use
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# hidden, dim: of the projector and the predictor. moco_vit_tiny is ours, for two CPU cores.
ARCHS = {
    "moco_vit_tiny": dict(width=96, layers=4, heads=3, patch=8, hidden=512, dim=128),
    "moco_vit_s16": dict(width=384, layers=12, heads=12, patch=16, hidden=4096, dim=256),
    "moco_vit_b16": dict(width=768, layers=12, heads=12, patch=16, hidden=4096, dim=256),
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


# ---------------------------------------------------------------- the method


class MoCo(nn.Module):
    mean_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels it expects: ImageNet's

    def __init__(self, arch, image_size):
        super().__init__()
        sizes = dict(ARCHS[arch])
        hidden, dim = sizes.pop("hidden"), sizes.pop("dim")
        self.arch, self.image_size = arch, image_size
        projector = _mlp(3, sizes["width"], hidden, dim)
        self.base_encoder = VisionTransformer(image_size, **sizes, head=projector)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = _mlp(2, dim, hidden, dim)

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """momentum encoder <- m x itself + (1 - m) x base encoder. Before the keys of a step are computed."""
        base, moving = list(self.base_encoder.parameters()), list(self.momentum_encoder.parameters())
        torch._foreach_lerp_(moving, base, 1 - m)

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


def create(arch, image_size=224):
    """A MoCo v3 model with random weights. arch: one of ARCHS. image_size: a multiple of the patch."""
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    patch = ARCHS[arch]["patch"]
    if image_size < patch or image_size % patch:
        raise ValueError(f"{arch} needs an image size that is a multiple of {patch}, got {image_size}")
    return MoCo(arch, image_size)
