"""Real, noisy image-text shards: up to 390,000 icons of 240 open sets, and the words of their names.

    npm pack @iconify/json && tar xzf iconify-json-*.tgz                  # 104 MB, unpacked into package/
    python experiments/icons.py build package --out icons --n 60000       # pip install resvg_py
    python train.py --arch vit_tiny --data 'icons/train-*.tar' --val-data 'icons/zeroshot-*.tar' \\
        --label-key concept --templates '{}' --prune 0.3 --out runs/icons
    python experiments/icons.py look runs/icons --out look.png            # what the run marked
    python experiments/icons.py pair runs/full runs/icons                 # scores, picture by picture

No fault is planted: many icons come in several sizes and weights (redundant), and the names of brands explain
no picture (ill-matched). Three kinds of shards:

    train-*.tar      n icons, drawn from nine tenths of the sets that are not in HELD_OUT
    retrieval-*.tar  n / 10 icons, drawn from the last tenth
    zeroshot-*.tar   from the sets of HELD_OUT, the icons of the concepts that at least 3 of these sets and
                     at least 8 training icons show

Members are KEY.png (on white), KEY.txt and KEY.json (caption, set, name, concept, logo, category, licence).
The licences differ by set: do not publish the shards.
"""

import argparse
import io
import json
import multiprocessing
import re
import sys
import tarfile
import textwrap
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import eval as evaluation  # noqa: E402

HELD_OUT = {
    "outline": ["iconoir", "akar-icons"],
    "outline and solid": ["bi", "teenyicons", "jam"],
    "solid": ["zondicons", "vaadin", "fontisto"],
    "coloured": ["flat-color-icons", "marketeq"],
    "emoji": ["fxemoji", "openmoji"],
}
# words of a name that say how an icon is drawn, not what it shows
STYLE = set(
    "outline outlined filled fill solid regular bold light thin duotone line linear rounded round sharp "
    "broken twotone two tone color colored colour alt bulk variant flat stroke thick medium mono monochrome "
    "plain original wordmark icon logo brand sized small large big mini micro px sm lg xs xl".split()
)
OPEN = ("MIT", "Apache-2.0", "CC0-1.0", "ISC")  # licences of the icons that a published figure may show
SHARD = 5000  # samples


def read_icons(package, logos=True):
    """All icons of the unpacked package, sorted, and how many have no words -> ([(name, meta, svg)], n)."""
    collections = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    icons, wordless = [], 0
    for path in sorted((package / "json").glob("*.json")):
        icon_set = json.loads(path.read_text(encoding="utf-8"))
        prefix, about = icon_set["prefix"], icon_set.get("info") or collections.get(path.stem, {})
        brands = about.get("category") == "Logos" or prefix.endswith("-brands")
        for name, icon in sorted(icon_set["icons"].items()):
            words = [word for word in name.split("-") if not re.fullmatch(r"\d+(px)?", word)]
            if not words:
                wordless += 1
                continue
            meta = {
                "caption": " ".join(words),
                "set": prefix,
                "name": name,
                "concept": " ".join(word for word in words if word not in STYLE) or " ".join(words),
                "logo": brands or words[0] in ("logo", "brand") or words[-1] in ("logo", "wordmark"),
                "category": about.get("category", ""),
                "licence": about.get("license", {}).get("spdx", ""),
            }
            if logos or not meta["logo"]:
                icons.append((f"{prefix}:{name}", meta, svg(icon, icon_set)))
    return icons, wordless


def svg(icon, icon_set):
    """The icon centred in a square; `currentColor` is drawn black."""
    box = {"left": 0, "top": 0, "width": 16, "height": 16}
    for defaults in (icon_set, icon):
        box |= {key: defaults[key] for key in box if key in defaults}
    side = max(box["width"], box["height"])
    left = box["left"] - (side - box["width"]) / 2
    top = box["top"] - (side - box["height"]) / 2
    view = f"{left:g} {top:g} {side:g} {side:g}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{view}" width="{side:g}" height="{side:g}">{icon["body"]}</svg>'


def split(icons, n, seed):
    """-> {split: icons}; the split of an icon depends on its name alone, the draw of n on the seed."""
    held_out = {name for sets in HELD_OUT.values() for name in sets}
    held, spare, pool = [], [], []
    for icon in icons:
        if icon[1]["set"] in held_out:
            held.append(icon)
        elif zlib.crc32(icon[0].encode()) % 10 == 0:
            spare.append(icon)
        else:
            pool.append(icon)
    rng = np.random.default_rng(seed)
    train = [pool[i] for i in rng.permutation(len(pool))[:n]]
    retrieval = [spare[i] for i in rng.permutation(len(spare))[: n // 10]]
    seen, sets = Counter(meta["concept"] for _, meta, _ in train), defaultdict(set)
    for _, meta, _ in held:
        sets[meta["concept"]].add(meta["set"])
    zeroshot = [i for i in held if len(sets[i[1]["concept"]]) >= 3 and seen[i[1]["concept"]] >= 8]
    return {"train": train, "zeroshot": zeroshot, "retrieval": retrieval}


def write_shard(job):
    """Render the icons of one shard, unless it exists -> (rendered, not rendered)."""
    import resvg_py

    path, first, icons, size = job
    if path.exists():
        with tarfile.open(path) as tar:
            done = sum(name.endswith(".png") for name in tar.getnames())
        return done, len(icons) - done
    failed, new = 0, path.with_suffix(".new")
    with tarfile.open(new, "w") as tar:
        for number, (_, meta, drawing) in enumerate(icons, first):
            picture = io.BytesIO()
            try:
                png = resvg_py.svg_to_bytes(
                    svg_string=drawing, width=size, height=size, background="white", skip_system_fonts=True
                )
                Image.open(io.BytesIO(bytes(png))).convert("RGB").save(picture, "PNG")
            except (ValueError, OSError):
                failed += 1
                continue
            for ending, content in (
                ("png", picture.getvalue()),
                ("txt", meta["caption"].encode()),
                ("json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(f"{number:09}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    new.rename(path)
    return len(icons) - failed, failed


def build(args):
    if not (args.package / "collections.json").exists():
        sys.exit(
            f"icons.py: no collections.json in {args.package}: npm pack @iconify/json, and unpack it there"
        )
    version = json.loads((args.package / "package.json").read_text())["version"]
    settings = {name: getattr(args, name) for name in ("n", "size", "seed", "logos")} | {"version": version}
    args.out.mkdir(parents=True, exist_ok=True)
    note = args.out / "icons.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        sys.exit(f"icons.py: {args.out} holds icons of other settings ({note}): choose another --out")
    note.write_text(json.dumps(settings))
    icons, wordless = read_icons(args.package, args.logos)
    print(f"{len(icons):,} icons of @iconify/json {version}; {wordless:,} left out: names without words")
    jobs, names, totals = [], [], defaultdict(Counter)
    for name, chosen in split(icons, args.n, args.seed).items():
        for k in range(0, len(chosen), SHARD):
            jobs.append((args.out / f"{name}-{k // SHARD:05}.tar", k, chosen[k : k + SHARD], args.size))
            names.append(name)
    began = time.monotonic()
    with multiprocessing.Pool(args.jobs) as pool:
        for k, (rendered, failed) in enumerate(pool.imap(write_shard, jobs)):
            totals[names[k]].update(rendered=rendered, failed=failed)
            print(f"shard {k + 1} of {len(jobs)}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    for name, total in totals.items():
        print(f"{args.out}/{name}-*.tar: {total['rendered']:,} icons, {total['failed']:,} cannot be drawn")


def is_blank(picture):
    """Whether all pixels are alike: some icons use what the renderer does not know."""
    return all(high - low < 16 for low, high in picture.convert("RGB").getextrema())


def look(run, out):
    """Compare what a finished run marked with what the JSON says; draw the icons marked most often."""
    checkpoint = evaluation.load_checkpoint(run)
    scan, icons = checkpoint["scan"], data.open_source(checkpoint["args"]["data"])
    metas = [json.loads(icons._read(i, "json")) for i in range(len(icons))]
    copies = Counter((meta["set"], meta["concept"]) for meta in metas)
    truths = {
        "logos": np.array([meta["logo"] for meta in metas]),
        "size and weight variants": np.array([copies[meta["set"], meta["concept"]] > 1 for meta in metas]),
        "drawn blank": np.array([is_blank(icons.image(i)) for i in range(len(icons))]),
    }
    red, ill = scan["redundant"].numpy(), scan["ill_matched"].numpy()
    counts, ill_counts = scan["counts"].numpy(), scan["ill_counts"].numpy()
    marks = {"all samples": np.ones(len(icons)), "redundant, newest round": red}
    marks |= {"ill-matched, newest round": ill}
    if scan["rounds"] > 1:  # a state holds the masks of the newest round, and counts of all
        marks["ill-matched, earlier rounds"] = ill_counts - ill
        marks["redundant alone, earlier rounds"] = (counts - (red | ill)) - (ill_counts - ill)
    print(f"| {run}, {scan['rounds']} rounds | {' | '.join(truths)} |\n{'|---' * (len(truths) + 1)}|")
    for name, weights in marks.items():
        if not weights.any():
            continue
        shares = [f"{np.average(truth, weights=weights):.1%}" for truth in truths.values()]
        print(f"| {name} | {' | '.join(shares)} |")

    quantile, shown = scan["quantile"].float().numpy(), {}
    sheet = Image.new("RGB", (12 * 96, 4 * 116), "white")
    draw = ImageDraw.Draw(sheet)
    for row, often, order in ((0, counts - ill_counts, quantile), (2, ill_counts, -quantile)):
        ids = [i for i in np.lexsort((order, -often)) if metas[i]["licence"] in OPEN]
        for k, i in enumerate(ids[:24]):
            x, y = k % 12 * 96, (row + k // 12) * 116
            sheet.paste(icons.image(i).resize((72, 72)), (x + 12, y + 4))
            draw.text((x + 4, y + 80), "\n".join(textwrap.wrap(metas[i]["caption"], 15)[:3]), fill="black")
            shown[metas[i]["set"]] = metas[i]["licence"]
    sheet.save(out)
    licences = ", ".join(f"{name} ({licence})" for name, licence in sorted(shown.items()))
    print(f"{out}: two rows redundant, two rows ill-matched; from {licences}")


def pair(runs):
    """Compare the zero-shot accuracy of two runs picture by picture; ±: 95 % interval over the pictures."""
    hits = []
    for run in runs:
        flags, (model, words) = evaluation.load_checkpoint(run)["args"], evaluation.load_model(run)
        options = dict(captions=False, label_key=flags["label_key"], templates=flags["templates"])
        val, cpu = data.open_source(flags["val_data"], train=False, **options), torch.device("cpu")
        names, _ = evaluation.zeroshot_classes(val)
        classifier = evaluation.zeroshot_classifier(model, words, val, names, cpu)
        images = torch.nn.functional.normalize(evaluation.image_features(model, val, cpu), dim=-1)
        first = (images @ classifier.T).topk(5).indices == torch.as_tensor(val.labels)[:, None]  # (N, 5)
        hits.append({"top-1": first[:, 0].double(), "top-5": first.any(1).double()})
    for name in hits[0]:
        one, other = hits[0][name], hits[1][name]
        gap, half = (other - one).mean(), 1.96 * (other - one).std() / len(one) ** 0.5
        print(f"{name}: {one.mean():.2%} and {other.mean():.2%}, difference {gap:+.2%} ± {half:.2%}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="render the shards; goes on where it stopped").add_argument
    add("package", type=Path, help="the unpacked npm package @iconify/json")
    add("--out", type=Path, default=Path("icons"))
    add("--n", type=int, default=60_000, help="training icons")
    add("--size", type=int, default=64, help="edge of a picture in pixels")
    add("--seed", type=int, default=0, help="of the draw")
    add("--no-logos", dest="logos", action="store_false", help="leave out brand logos")
    add("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes")
    add = commands.add_parser("look", help="what a run marked, against what the names say").add_argument
    add("run", help="folder of a finished run")
    add("--out", default="look.png", help="picture of the icons marked most often")
    commands.add_parser("pair", help="two runs, picture by picture").add_argument("runs", nargs=2)
    args = parser.parse_args()
    if args.command == "build":
        build(args)
    elif args.command == "look":
        look(args.run, args.out)
    else:
        pair(args.runs)


if __name__ == "__main__":
    main()
