"""Runs of train.py as one web page: what SCAN saved, what it left out, and what that cost.

    pip install -r experiments/requirements.txt
    python experiments/report.py runs/scan-seed0 runs/full-seed0 --out report.html
    python experiments/report.py runs/compare/* --figures experiments/figures    # and as files for a README

The first run named scan-seedN, or else the first that pruned, is shown in detail, with the samples that it
marked most often; all of them in the chart of scores. Runs whose folders differ in -seedN alone are one line
of it. The page needs no network. Galleries read the data of the run, at the path that it was trained with.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import SCORES, interval

import eval as evaluation
import train
from data import UserError

INK, QUIET, RED, BLUE = "#1d2733", "#6b7a8a", "#c8452f", "#2f6db5"
STAGES = {"warm-up": "#e6e8eb", "preparation": "#cfe3f5", "mutation": "#ffffff"}
LINES = (BLUE, RED, "#3a9a5b", "#8a56b0", "#d08a1d", "#2aa1a8", "#a0522d", "#444444", "#c05a93")
matplotlib.use("agg")
plt.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET,
    "axes.labelcolor": INK, "xtick.color": QUIET, "ytick.color": QUIET, "legend.frameon": False,
    "figure.constrained_layout.use": True, "svg.hashsalt": "scan", "savefig.facecolor": "white",
})  # fmt: skip


# ---------------------------------------------------------------- what a run left behind


def read(run):
    """-> {name, epochs, evals, args} of a run's folder, from its log and configuration."""
    try:
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        args = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{run}: holds no log.jsonl and config.json of train.py") from None
    epochs = [r for r in records if r["event"] == "epoch"]
    if not epochs:
        raise UserError(f"{run}: no epoch is finished")
    evals = [(r["epoch"], score(r)) for r in records if r["event"] == "eval"]
    return {"path": run, "name": run.name, "epochs": epochs, "evals": evals, "args": args} | {
        "method": re.sub(r"-seed\d+$", "", run.name),
        "measure": next((measure(r) for r in records if r["event"] == "eval"), ""),
    }


def measure(record):
    return next(names for names in SCORES if names[0] in record)


def score(record):
    return statistics.mean(record[name] for name in measure(record))


def saved(run):
    """Shares of samples and of seconds that were saved, beside all data in as many epochs."""
    epochs, batch = run["epochs"], run["args"]["batch_size"]
    full = len(epochs) * (epochs[0]["total"] // batch * batch)
    seconds = sum(r["seconds"] for r in epochs)
    paces = [r["seconds"] / r["samples"] for r in epochs if r["kept"] == r["total"]]
    pace = statistics.median(paces) if paces else math.nan
    return 1 - epochs[-1]["samples_seen"] / full, 1 - seconds / (pace * full)


# ---------------------------------------------------------------- charts


def chart_of_epochs(run):
    """Loss, and the share of the data kept, by epoch; stages shaded."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(5, 4), sharex=True, height_ratios=[3, 2])
    epochs = run["epochs"]
    x = [r["epoch"] for r in epochs]
    for axes in (above, below):
        for r in epochs:
            axes.axvspan(r["epoch"] - 0.5, r["epoch"] + 0.5, color=STAGES.get(r["stage"], "#ffffff"), lw=0)
    above.plot(
        x,
        [math.nan if r["loss"] is None else r["loss"] for r in epochs],
        color=RED,
        lw=1.8,
        marker="o",
        ms=2.5,
    )
    above.set_ylabel("loss")
    below.bar(x, [100 * r["kept"] / r["total"] for r in epochs], width=0.72, color=BLUE)
    below.set(ylabel="kept, %", xlabel="epoch", xlim=(-0.5, x[-1] + 0.5), ylim=(0, 105))
    below.xaxis.get_major_locator().set_params(integer=True)
    patches = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec=QUIET, lw=0.5) for colour in STAGES.values()]
    above.legend(patches, STAGES, ncols=3, loc="upper right", fontsize=8.5, handlelength=1.2)
    return figure


def chart_of_scores(runs):
    """Score against samples seen; a method's seeds as their mean, and their deviation at its end."""
    figure, axes = plt.subplots(figsize=(5, 4))
    methods = dict.fromkeys(run["method"] for run in runs)
    for colour, method in zip(LINES * 9, methods):
        seeds = [run for run in runs if run["method"] == method and run["evals"]]
        if not seeds:
            continue
        points = {}
        for run in seeds:
            seen = {r["epoch"]: r["samples_seen"] for r in run["epochs"]}
            for epoch, value in run["evals"]:
                points.setdefault(epoch, []).append((seen[epoch], 100 * value))
        complete = [np.array(p) for _, p in sorted(points.items()) if len(p) == len(seeds)]
        if not complete:
            continue
        x, y = np.array([p.mean(0) for p in complete]).T
        deviation = complete[-1][:, 1].std(ddof=1) if len(seeds) > 1 else None
        axes.plot(x, y, color=colour, lw=1.5, alpha=0.8)
        label = f"{method} ({len(seeds)})" if len(seeds) > 1 else method
        axes.errorbar(x[-1], y[-1], deviation, color=colour, fmt="o", ms=5, capsize=3, label=label)
    names = next((run["measure"] for run in runs if run["measure"]), None)
    axes.set(xlabel="samples seen", ylabel=f"{SCORES[names]}, %" if names else "")
    axes.set_xlim(0)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v / 1e6:g} M" if v >= 1e6 else f"{v / 1e3:g} k")
    axes.legend(fontsize=8.5)
    return figure


def chart_of_gaps(runs):
    """Final score of each method less full data's, paired over seeds, with 95 % intervals; None without."""
    final, names = {}, [run["measure"] for run in runs if run["measure"]]
    for run in runs:
        if run["evals"] and run["method"] != "proxy":
            final.setdefault(run["method"], {})[run["args"]["seed"]] = 100 * run["evals"][-1][1]
    full, gaps = final.pop("full", {}), {}
    for method, scores in final.items():
        both = full.keys() & scores.keys()
        if len(both) > 1:
            gaps[f"{method} ({len(both)})"] = interval([scores[seed] - full[seed] for seed in both])
    if not gaps:
        return None
    figure, axes = plt.subplots(figsize=(5, 1.1 + 0.27 * len(gaps)))
    axes.axvline(0, color=QUIET, lw=1)
    gaps = dict(sorted(gaps.items(), key=lambda item: item[1]))
    for k, (method, (gap, half)) in enumerate(gaps.items()):
        colour = RED if method.startswith("scan (") else BLUE
        axes.errorbar(gap, k, xerr=half, color=colour, fmt="o", ms=5, capsize=3)
    axes.set_yticks(range(len(gaps)), gaps)
    axes.tick_params("y", length=0)
    axes.set(xlabel=f"{SCORES[names[0]]}, points above full data", ylim=(-0.6, len(gaps) - 0.4))
    axes.spines["left"].set_visible(False)
    return figure


def chart_of_rounds(scan):
    """In how many rounds each sample was a candidate, beside rounds that choose independently."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    rounds, counts = scan["rounds"], scan["counts"].long()
    x = np.arange(rounds + 1)
    share = counts.double().mean().item() / rounds
    chance = [math.comb(rounds, k) * share**k * (1 - share) ** (rounds - k) for k in x]
    measured = torch.bincount(counts, minlength=rounds + 1).double() / len(counts)
    axes.bar(x - 0.2, 100 * measured, 0.4, color=BLUE, label="this run")
    axes.bar(x + 0.2, 100 * np.array(chance), 0.4, color="#c3ccd6", label="by chance")
    axes.set(
        xlabel=f"times a candidate, of {rounds} rounds", ylabel="samples, %", xticks=x[:: 1 + rounds // 12]
    )
    axes.legend(fontsize=8.5)
    return figure


def chart_of_faults(found):
    """Recall and precision of planted faults among the candidates, by round."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    x = range(1, len(found) + 1)
    for kind, colour in (("ill_matched", RED), ("redundant", BLUE)):
        if kind in found[0]:
            for key, style in (("recall", "-"), ("precision", "--")):
                y = [100 * record[kind][key] for record in found]
                name = f"{kind.replace('_', '-')}, {key}"
                axes.plot(x, y, style, color=colour, marker="o", ms=3, label=name)
            chance = 100 * found[0][kind]["marked"]
            axes.axhline(chance, color=QUIET, lw=0.8, ls=":")
            axes.text(1, chance + 1, "recall by chance", color=QUIET, fontsize=8)
    axes.set(xlabel="round", ylabel="planted faults, %", ylim=(0, 102), xticks=x[:: 1 + len(x) // 12])
    axes.legend(fontsize=8.5)
    return figure


def overlap(scan):
    """Mean overlap (IoU) of the candidates of two rounds, and what independent rounds would have.

    A sample marked c times lies in the intersections of c (c - 1) / 2 pairs of rounds: counts are enough.
    """
    counts, rounds, total = scan["counts"].double(), scan["rounds"], len(scan["counts"])
    size = counts.sum().item() / rounds
    both = (counts * (counts - 1)).sum().item() / (rounds * (rounds - 1))
    chance = size * size / total
    return both / (2 * size - both), chance / (2 * size - chance)


# ---------------------------------------------------------------- galleries


def galleries(run, checkpoint, number):
    """{kind: [(id, times, quantile, caption or None, planted, picture)]} of the samples most often marked."""
    args, scan = argparse.Namespace(**checkpoint["args"]), checkpoint["scan"]
    tokenizer = evaluation.tokenizer_for(args.vocab) if checkpoint["tokenizer"] else None
    args.val_data = None
    dataset, _ = train.open_data(args, tokenizer)
    if len(dataset) != len(scan["counts"]):
        raise UserError(f"{run}: {args.data} has {len(dataset):,} samples, not {len(scan['counts']):,}")
    quantile, ill = scan["quantile"].float(), scan["ill_counts"].long()
    orders = {"redundant": (scan["counts"].long() - ill, -quantile), "ill_matched": (ill, quantile)}
    result = {}
    for kind, (times, ties) in orders.items():
        first = np.lexsort((-ties.numpy(), -times.numpy()))[:number]
        truth, result[kind] = dataset.truth.get(kind), []
        for i in map(int, first):
            if times[i] == 0:
                break
            caption = dataset.caption(i) if tokenizer else None
            planted = bool(truth is not None and truth[i])
            picture = dataset.source.image(i).convert("RGB")
            picture.thumbnail((128, 128))
            result[kind].append((i, int(times[i]), float(quantile[i]), caption, planted, picture))
    return result


def chart_of_gallery(samples, rounds, columns=8):
    rows = -(-len(samples) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.6 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (_, times, quantile, caption, planted, picture) in zip(grid.flat, samples):
        picture = picture.resize((80, 80))
        axes.imshow(picture)
        if planted:
            frame = plt.Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, ec=RED, lw=4)
            axes.add_patch(frame)
        text = textwrap.shorten(caption or "", 44, placeholder="…")
        text = "\n".join(textwrap.wrap(text, 19)[:3])
        axes.set_title(f"{times} of {rounds}, above {quantile:.0%}", fontsize=7.5, color=QUIET, pad=3)
        axes.text(0.5, -0.06, text, transform=axes.transAxes, fontsize=7.5, color=INK, ha="center", va="top")
    return figure


# ---------------------------------------------------------------- the page


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1d2733; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: auto; padding: 28px 16px 48px; }
h1 { font-size: clamp(22px, 4vw, 32px); line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; color: #55636f; max-width: 75ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile, figure { background: #fff; border-radius: 10px; box-shadow: 0 1px 3px #0002; padding: 14px; }
figure { margin: 0; }
.tiles { margin: 18px 0; }
.tile b { display: block; font-size: 28px; line-height: 1.15; }
.tile span { color: #55636f; font-size: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 14px; color: #55636f; margin-top: 6px; }
.gallery { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(clamp(100px, 11%, 128px), 1fr)); }
.gallery div { background: #fff; border-radius: 8px; padding: 6px; font-size: 13px; line-height: 1.25;
  border: 3px solid transparent; overflow-wrap: anywhere; }
.gallery .planted { border-color: #c8452f; }
.gallery img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 4px; }
.gallery small { color: #6b7a8a; display: block; margin: 3px 0 1px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; width: 100%; font-size: 14px; }
td, th { padding: 6px 10px; text-align: right; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
"""


def embed(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(picture):
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return embed(out.getvalue(), "jpeg")


def drawing(figure):
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return embed(out.getvalue(), "svg+xml")


def tiles(run):
    samples, seconds = saved(run)
    shown = [(f"{samples:.1%}", "of the samples left out")]
    if not math.isnan(seconds):
        shown += [(f"{seconds:.1%}", "of the training time saved")]
    if run["evals"]:
        shown += [(f"{run['evals'][-1][1]:.1%}", SCORES[run["measure"]])]
    found = [r["found"] for r in run["epochs"] if r.get("found")]
    for kind in found[-1] if found else ():
        recall, chance = (statistics.mean(f[kind][key] for f in found) for key in ("recall", "marked"))
        name = {"ill_matched": "mismatches", "redundant": "duplicates"}[kind]
        shown += [(f"{recall:.0%}", f"of the planted {name} found (by chance {chance:.0%})")]
    inside = "".join(f'<div class="tile"><b>{number}</b><span>{text}</span></div>' for number, text in shown)
    return f'<div class="tiles">{inside}</div>'


def rows(runs):
    lines = ["<tr><th>run<th>epochs<th>samples<th>saved<th>seconds<th>score</tr>"]
    for run in runs:
        epochs, end = run["epochs"], run["evals"][-1:]
        cells = [
            html.escape(run["name"]),
            len(epochs),
            f"{epochs[-1]['samples_seen']:,}",
            f"{saved(run)[0]:.1%}",
        ]
        cells += [f"{sum(r['seconds'] for r in epochs):,.0f}", f"{end[0][1]:.1%}" if end else "–"]
        lines += ["<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>"]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def cards(samples, rounds):
    parts = []
    for i, times, quantile, caption, planted, picture in samples:
        about = f"sample {i}{', planted' if planted else ''}"
        image = f'<img src="{thumbnail(picture)}" alt="{html.escape(caption or about)}" title="{about}">'
        numbers = f"<small>{times} of {rounds} rounds<br>loss above {quantile:.0%}</small>"
        kind = ' class="planted"' if planted else ""
        parts += [f"<div{kind}>{image}{numbers}{html.escape(caption or '')}</div>"]
    return f'<div class="gallery">{"".join(parts)}</div>'


def page(runs, shown, figures, pictures, scan):
    args = shown["args"]
    told = f"{args['arch']} on {Path(args['data']).name}, {shown['epochs'][0]['total']:,} samples"
    told += f", {len(shown['epochs'])} epochs, ratio {args['prune']:g}, seed {args['seed']}: {shown['name']}"
    parts = ["<h1>What SCAN left out, and what it cost</h1>", f"<p>{html.escape(told)}</p>", tiles(shown)]
    charts = "".join(
        f'<figure><img src="{drawing(figure)}" alt=""><figcaption>{text}</figcaption></figure>'
        for figure, text in figures.values()
    )
    parts += [f'<h2>The run</h2><div class="charts">{charts}</div>']
    titles = {
        "redundant": ("Most often redundant", "The lowest losses of their batches: learnt, or easy to tell."),
        "ill_matched": ("Most often ill-matched", "The highest losses: what does not match, or is rare."),
    }
    for kind, samples in pictures.items():
        if samples:
            title, text = titles[kind]
            text += (
                " Below each: the rounds in which it was marked, and the share of its batches whose losses "
            )
            text += "were below its own (mean over the epochs of full data)."
            if any(planted for *_, planted, _ in samples):
                text += " Red frames: faults planted on purpose."
            parts += [f"<h2>{title}</h2><p>{text}</p>{cards(samples, scan['rounds'])}"]
    parts += [f"<h2>All runs of this page</h2>{rows(runs)}"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = "<title>SCAN: what was left out</title>"
    return (
        f'<!doctype html><html lang="en">{head}{title}<style>{STYLE}</style><main>{"".join(parts)}</main>\n'
    )


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = evaluation.Parser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of train.py")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--figures", type=Path, help="folder for the charts and galleries as files too")
    parser.add_argument("--samples", type=evaluation.natural, default=24, help="in each gallery (24)")
    options = parser.parse_args()
    try:
        write(options)
    except (UserError, OSError) as error:
        sys.exit(f"report.py: {error}")


def write(options):
    runs = [read(run) for run in options.runs if (run / "log.jsonl").exists() or len(options.runs) == 1]
    if not runs:
        raise UserError("none of these is a run of train.py")
    pruned = [run for run in runs if any(r["candidates"] for r in run["epochs"])]
    shown = next((run for run in pruned if run["method"] == "scan"), (pruned or runs)[0])
    checkpoint = evaluation.load_checkpoint(shown["path"])
    scan = checkpoint["scan"]
    figures = {"epochs": (chart_of_epochs(shown), "Loss and share of the data kept, by epoch.")}
    if any(len(run["evals"]) > 1 for run in runs):
        text = "Score against samples seen" + (", and deviation over seeds." if len(runs) > 1 else ".")
        figures["scores"] = chart_of_scores(runs), text
    if gaps := chart_of_gaps(runs):
        figures["gaps"] = gaps, "Paired over seeds (their number), with 95 % intervals."
    marked = bool(scan["counts"].any())  # not in a run on full data
    if marked and scan["rounds"] > 1:
        same, chance = overlap(scan)
        text = (
            f"Candidates of two rounds overlap by {same:.0%} (IoU, mean over pairs; by chance {chance:.0%})."
        )
        figures["rounds"] = chart_of_rounds(scan), text
    found = [r["found"] for r in shown["epochs"] if r.get("found")]
    if found:
        figures["faults"] = chart_of_faults(found), "Planted faults among the candidates, round by round."
    pictures = galleries(shown["path"], checkpoint, options.samples) if marked else {}
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        files = {name: figure for name, (figure, _) in figures.items()}
        for kind, samples in pictures.items():
            if not samples:  # one kind alone was marked
                continue
            files[kind.replace("_", "-")] = chart_of_gallery(samples, scan["rounds"])
        for name, figure in files.items():
            out = io.BytesIO()
            figure.savefig(out, dpi=1000 / figure.get_figwidth())
            picture = Image.open(out).convert("RGB").quantize(128)  # a third of the bytes
            picture.save(options.figures / f"{name}.png", optimize=True)
    options.out.write_text(page(runs, shown, figures, pictures, scan), encoding="utf-8")
    print(f"{options.out}: {len(runs)} runs, {shown['name']} in detail")


if __name__ == "__main__":
    main()
