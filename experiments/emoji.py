"""Build image-text shards from a free font: every emoji once, with its Unicode name as the caption.

    apt-get install fonts-noto-color-emoji unicode-data   # Debian; the font is under the SIL OFL 1.1
    python experiments/emoji.py --out emoji               # train-00000.tar .. train-00002.tar, val-00000.tar
    python train.py --arch vit_tiny --data 'emoji/train-*.tar' --val-data emoji/val-00000.tar --prune 0.3

Members are KEY.jpg (128 px, on white), KEY.txt (the name) and KEY.json (caption, group, subgroup, key). A
tenth of the emoji, drawn at random, is for validation.
"""

import argparse
import io
import json
import math
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features


def parse_list(path):
    """Read Unicode's emoji-test.txt -> [(characters, name, group, subgroup)] of the fully qualified emoji."""
    emoji, group, subgroup = [], None, None
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        match = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)", line)
        if match:
            characters = "".join(chr(int(code, 16)) for code in match[1].split())
            emoji.append((characters, match[2].strip(), group, subgroup))
    return emoji


def draw(characters, font, size):
    """Draw one emoji, centred on white -> JPEG bytes; None if the font has no single picture for it."""
    left, top, right, bottom = font.getbbox(characters)
    if right - left <= 0 or right - left > 1.5 * font.size * 136 / 109:  # a sequence drawn as its parts
        return None
    canvas = Image.new("RGB", (160, 160), "white")
    at = (80 - (left + right) / 2, 80 - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(at, characters, font=font, embedded_color=True)
    buffer = io.BytesIO()
    canvas.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, picture, (_, name, group, subgroup) in samples:
            meta = {"caption": name, "group": group, "subgroup": subgroup, "key": key}
            about = json.dumps(meta, ensure_ascii=False).encode()
            for ending, content in {"jpg": picture, "txt": name.encode(), "json": about}.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    parser.add_argument("--list", default="/usr/share/unicode/emoji/emoji-test.txt")
    parser.add_argument("--out", type=Path, default=Path("emoji"))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard", type=int, default=1100, help="maximum number of samples in a training shard"
    )
    args = parser.parse_args()
    if not features.check("raqm"):
        sys.exit("emoji.py: this Pillow has no libraqm, which joins sequences: use the wheels from PyPI")
    try:
        font = ImageFont.truetype(args.font, 109)  # the only size of the font's bitmaps
        emoji = parse_list(args.list)
    except OSError as error:
        sys.exit(f"emoji.py: {args.font} or {args.list}: {error} (see the top of this file)")
    pictures = [draw(characters, font, args.size) for characters, *_ in emoji]
    drawn = [(picture, about) for picture, about in zip(pictures, emoji) if picture is not None]
    order = np.random.default_rng(args.seed).permutation(len(drawn))
    validation, training = np.split(order, [len(drawn) // 10 + 1])
    args.out.mkdir(parents=True, exist_ok=True)
    shards_needed = math.ceil(len(training) / args.shard)
    for split, shards in {"val": [validation], "train": np.array_split(training, shards_needed)}.items():
        for k, ids in enumerate(shards):
            samples = [(f"{k:03}{j:06}", *drawn[i]) for j, i in enumerate(ids)]
            write_shard(args.out / f"{split}-{k:05}.tar", samples)
            print(f"{args.out}/{split}-{k:05}.tar: {len(samples)} emoji")
    print(f"{len(drawn)} of {len(emoji)} emoji drawn; {len(emoji) - len(drawn)} are not in this font")


if __name__ == "__main__":
    main()
