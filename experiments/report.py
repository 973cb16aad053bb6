"""Show runs of train.py as one web page: what SCAN saved, what it left out, and what that cost.

    pip install -r experiments/requirements.txt
    python experiments/report.py runs/scan-seed0 runs/full-seed0                 # runs/scan-seed0/report.html
    python experiments/report.py runs/compare/* --figures experiments/figures    # charts as .png files too

The first run named scan-seedN is shown in detail, otherwise the first run that pruned; its galleries read the
data from the path that it was trained on. The charts of scores hold only runs on the same data as that run;
runs whose folders differ only in -seedN are one line. The page needs no network.
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
    """Read a run's log and configuration -> dict."""
    try:
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        args = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{run}: holds no log.jsonl and config.json of train.py") from None
    epochs = [r for r in records if r["event"] == "epoch"]
    evals = [r for r in records if r["event"] == "eval"]
    if not epochs:
        raise UserError(f"{run}: no epoch is finished")
    names = next((names for names in SCORES if evals and names[0] in evals[0]), ())
    return {
        "path": run,
        "name": run.name,
        "method": re.sub(r"-seed\d+$", "", run.name),
        "args": args,
        "epochs": epochs,
        "finished": len(epochs) == args["epochs"],
        "measure": SCORES.get(names, ""),
        "evals": [(r["epoch"], statistics.mean(r[name] for name in names)) for r in evals],
    }


def comparable(run, other):
    """Whether the scores of two runs belong into one chart: same data, same evaluation."""
    flags = ("data", "val_data", "mismatch", "label_key")
    same_data = all(run["args"].get(flag) == other["args"].get(flag) for flag in flags)
    return same_data and run["measure"] == other["measure"]


def saved(run):
    """Share of the samples saved, against all data for as many epochs."""
    epochs, batch = run["epochs"], run["args"]["batch_size"]
    return 1 - epochs[-1]["samples_seen"] / (len(epochs) * (epochs[0]["total"] // batch * batch))


def plural(number, noun):
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def length(run):
    """The run's epochs in words."""
    if run["finished"]:
        return plural(len(run["epochs"]), "epoch")
    return f"unfinished: {len(run['epochs'])} of {plural(run['args']['epochs'], 'epoch')}"


# ---------------------------------------------------------------- charts


def chart_of_epochs(run):
    """Draw the loss and the share of the data kept, by epoch, over bands for the stages."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(5, 4), sharex=True, height_ratios=[3, 2])
    epochs = run["epochs"]
    x = [r["epoch"] for r in epochs]
    for axes in (above, below):
        for r in epochs:
            axes.axvspan(r["epoch"] - 0.5, r["epoch"] + 0.5, color=STAGES.get(r["stage"], "white"), lw=0)
    losses = [math.nan if r["loss"] is None else r["loss"] for r in epochs]
    above.plot(x, losses, color=RED, lw=1.8, marker="o", ms=2.5)
    above.set_ylabel("loss")
    below.bar(x, [100 * r["kept"] / r["total"] for r in epochs], width=0.72, color=BLUE)
    below.set(ylabel="kept, %", xlabel="epoch", xlim=(-0.5, x[-1] + 0.5), ylim=(0, 105))
    below.xaxis.get_major_locator().set_params(integer=True)
    patches = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec=QUIET, lw=0.5) for colour in STAGES.values()]
    figure.legend(patches, STAGES, ncols=3, loc="outside upper right", fontsize=8.5, handlelength=1.2)
    return figure


def chart_of_scores(runs):
    """Draw the score against the samples seen: mean over a method's seeds, deviation at the end."""
    figure, axes = plt.subplots(figsize=(5, 4))
    methods = dict.fromkeys(run["method"] for run in runs)
    for colour, method in zip(LINES * 9, methods):
        seeds = [run for run in runs if run["method"] == method]
        points = {}
        for run in seeds:
            seen = {r["epoch"]: r["samples_seen"] for r in run["epochs"]}
            for epoch, value in run["evals"]:
                points.setdefault(epoch, []).append((seen[epoch], 100 * value))
        complete = [np.array(point) for _, point in sorted(points.items()) if len(point) == len(seeds)]
        if not complete:
            continue
        x, y = np.array([point.mean(0) for point in complete]).T
        deviation = complete[-1][:, 1].std(ddof=1) if len(seeds) > 1 else None
        axes.plot(x, y, color=colour, lw=1.5, alpha=0.8)
        label = f"{method} ({len(seeds)})" if len(seeds) > 1 else method
        axes.errorbar(x[-1], y[-1], deviation, color=colour, fmt="o", ms=5, capsize=3, label=label)
    axes.set(xlabel="samples seen", ylabel=f"{runs[0]['measure']}, %")
    axes.set_xlim(0)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v / 1e6:g} M" if v >= 1e6 else f"{v / 1e3:g} k")
    axes.legend(fontsize=8.5)
    return figure


def gaps(runs):
    """-> {method: (mean, half of the 95 % interval)} of the final score minus full data's, paired by seed."""
    final = {}
    for run in runs:
        if run["finished"] and run["evals"] and run["method"] != "proxy":
            final.setdefault(run["method"], {})[run["args"]["seed"]] = 100 * run["evals"][-1][1]
    full, result = final.pop("full", {}), {}
    for method, scores in final.items():
        both = full.keys() & scores.keys()
        if len(both) > 1:
            result[f"{method} ({len(both)})"] = interval([scores[seed] - full[seed] for seed in both])
    return dict(sorted(result.items(), key=lambda item: item[1]))


def chart_of_gaps(gaps, measure):
    figure, axes = plt.subplots(figsize=(5, 1.1 + 0.27 * len(gaps)))
    axes.axvline(0, color=QUIET, lw=1)
    for row, (method, (gap, half)) in enumerate(gaps.items()):
        colour = RED if method.startswith("scan (") else BLUE
        axes.errorbar(gap, row, xerr=half, color=colour, fmt="o", ms=5, capsize=3)
    axes.set_yticks(range(len(gaps)), gaps)
    axes.tick_params("y", length=0)
    axes.set(xlabel=f"{measure}, points above full data", ylim=(-0.6, len(gaps) - 0.4))
    axes.spines["left"].set_visible(False)
    return figure


def overlap(scan):
    """-> mean overlap (IoU) of the candidates of two rounds, and the overlap of independent rounds.

    A sample marked c times is in the intersection of c (c - 1) / 2 pairs of rounds: the counts are enough.
    """
    counts, rounds, total = scan["counts"].double(), scan["rounds"], len(scan["counts"])
    size = counts.sum().item() / rounds
    both = (counts * (counts - 1)).sum().item() / (rounds * (rounds - 1))
    chance = size * size / total
    return both / (2 * size - both), chance / (2 * size - chance)


# ---------------------------------------------------------------- galleries


def galleries(run, checkpoint, number):
    """-> {kind: [(times marked, quantile, caption, planted, picture)]}, most often marked first."""
    args, scan = argparse.Namespace(**checkpoint["args"]), checkpoint["scan"]
    tokenizer = evaluation.tokenizer_for(args.vocab) if checkpoint["tokenizer"] else None
    args.val_data = None
    dataset, _ = train.open_data(args, tokenizer)
    if len(dataset) != len(scan["counts"]):
        raise UserError(f"{run}: {args.data} has {len(dataset):,} samples, not {len(scan['counts']):,}")
    quantile, ill = scan["quantile"].float(), scan["ill_counts"].long()
    orders = {"redundant": (scan["counts"].long() - ill, -quantile), "ill-matched": (ill, quantile)}
    result = {}
    for kind, (times, ties) in orders.items():
        first = np.lexsort((-ties.numpy(), -times.numpy()))[:number]
        truth, result[kind] = dataset.truth.get(kind.replace("-", "_")), []
        for i in first[times.numpy()[first] > 0].tolist():
            caption = dataset.caption(i) if tokenizer else ""
            planted = truth is not None and bool(truth[i])
            picture = dataset.source.image(i).convert("RGB").resize((96, 96))
            result[kind].append((int(times[i]), float(quantile[i]), caption, planted, picture))
    return result


def chart_of_gallery(samples, rounds, columns=8):
    rows = math.ceil(len(samples) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.7 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (times, quantile, caption, planted, picture) in zip(grid.flat, samples):
        axes.imshow(picture)
        if planted:
            frame = plt.Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, ec=RED, lw=4)
            axes.add_patch(frame)
        title = f"{times} of {plural(rounds, 'round')}\nloss above {100 * quantile:.0f} %"
        axes.set_title(title, fontsize=7.5, color=QUIET, pad=3)
        text = "\n".join(textwrap.wrap(textwrap.shorten(caption, 44, placeholder="…"), 19))
        axes.text(0.5, -0.06, text, transform=axes.transAxes, fontsize=7.5, color=INK, ha="center", va="top")
    return figure


# ---------------------------------------------------------------- the page


STYLE = """
body { margin: auto; padding: 28px 16px; max-width: 1120px; background: #f4f6f8; font: 16px/1.5 system-ui; }
.tiles, .charts { display: grid; gap: 14px; margin: 18px 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.tiles div, figure { background: #fff; border-radius: 10px; padding: 14px; margin: 0; }
.tiles b { display: block; font-size: 28px; line-height: 1.15; }
.gallery { grid-column: 1 / -1; }
figure img, table { width: 100%; }
p, span, figcaption { color: #55636f; }
span, figcaption, table { font-size: 14px; }
td, th { padding: 6px 10px; text-align: right; border-bottom: 1px solid #d5dbe1; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
"""
TITLES = {
    "redundant": "<b>Most often marked redundant</b>: the lowest losses of their batches.",
    "ill-matched": "<b>Most often marked ill-matched</b>: the highest losses of their batches.",
}


def tiles(run, scan):
    shown = [(f"{saved(run):.1%}", "of the samples left out")]
    if run["evals"]:
        epoch, score = run["evals"][-1]
        shown += [(f"{score:.1%}", run["measure"] + ("" if run["finished"] else f" after epoch {epoch}"))]
    found = [r["found"] for r in run["epochs"] if r.get("found")]
    for kind, name in (("ill_matched", "mismatches"), ("redundant", "duplicates")):
        rounds = [record[kind] for record in found if kind in record]
        if rounds:
            mean = {key: statistics.mean(r[key] for r in rounds) for key in ("recall", "marked", "precision")}
            text = f"of the planted {name} found (by chance {mean['marked']:.0%}), "
            text += f"precision {mean['precision']:.0%}, over {plural(len(rounds), 'round')}"
            shown += [(f"{mean['recall']:.0%}", text)]
    if scan["rounds"] > 1 and scan["counts"].any():
        same, chance = overlap(scan)
        shown += [(f"{same:.0%}", f"overlap (IoU) of the candidates of two rounds (by chance {chance:.0%})")]
    inside = [f"<div><b>{number}</b><span>{text}</span></div>" for number, text in shown]
    return f'<div class="tiles">{"".join(inside)}</div>'


def table(runs):
    lines = ["<tr><th>run<th>length<th>samples<th>saved<th>seconds<th>score</tr>"]
    for run in runs:
        epochs = run["epochs"]
        cells = [html.escape(run["name"]), length(run), f"{epochs[-1]['samples_seen']:,}"]
        cells += [f"{saved(run):.1%}", f"{sum(r['seconds'] for r in epochs):,.0f}"]
        cells += [f"{run['evals'][-1][1]:.1%} {run['measure']}" if run["evals"] else "–"]
        lines += ["<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>"]
    return f"<table>{''.join(lines)}</table>"


def page(runs, shown, figures, scan):
    args = shown["args"]
    about = f"{args['arch']} on {Path(args['data']).name}, {plural(shown['epochs'][0]['total'], 'sample')}, "
    about += f"{length(shown)}, ratio {args['prune']:g}, seed {args['seed']}: {shown['name']}"
    parts = [f"<h1>What SCAN left out, and what it cost</h1><p>{html.escape(about)}</p>", tiles(shown, scan)]
    parts += ['<div class="charts">']
    for name, (figure, text) in figures.items():
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        source = f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
        kind = "gallery" if name in TITLES else "chart"
        caption = f"<figcaption>{text}</figcaption>"
        parts += [f'<figure class="{kind}"><img src="{source}" alt="{name}">{caption}</figure>']
    parts += [f'</div><div style="overflow-x: auto">{table(runs)}</div>']
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>SCAN: what was left out</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}\n'


def draw(runs, shown, checkpoint, number):
    """-> {name: (figure, caption)}."""
    scan, others = checkpoint["scan"], [run for run in runs if comparable(run, shown) and run["evals"]]
    figures = {"epochs": (chart_of_epochs(shown), "Loss and share of the data kept, by epoch.")}
    if any(len(run["evals"]) > 1 for run in others):
        text = "Score against samples seen: mean over the seeds, with the deviation at the end."
        figures["scores"] = chart_of_scores(others), text
    differences = gaps(others)
    if differences:
        text = "Final score minus full data's, paired by seed (number of pairs), with 95 % intervals."
        figures["gaps"] = chart_of_gaps(differences, shown["measure"]), text
    pictures = galleries(shown["path"], checkpoint, number) if scan["counts"].any() else {}
    for name, samples in pictures.items():
        if samples:
            text = (
                f"{TITLES[name]} Above each: in how many rounds it was marked, and the share of its batches"
            )
            text += " with a lower loss (mean over the epochs of full data)."
            if any(planted for _, _, _, planted, _ in samples):
                text += " Red frames: faults planted on purpose."
            figures[name] = chart_of_gallery(samples, scan["rounds"]), text
    return figures


def write(options):
    runs = [read(run) for run in options.runs if (run / "log.jsonl").exists() or len(options.runs) == 1]
    if not runs:
        raise UserError("none of these is a run of train.py")
    pruned = [run for run in runs if any(r["candidates"] for r in run["epochs"])]
    shown = next((run for run in pruned if run["method"] == "scan"), (pruned or runs)[0])
    checkpoint = evaluation.load_checkpoint(shown["path"])
    figures = draw(runs, shown, checkpoint, options.samples)
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        for name, (figure, _) in figures.items():
            out = io.BytesIO()
            figure.savefig(out, dpi=1000 / figure.get_figwidth())
            picture = Image.open(out).convert("RGB").quantize(128)  # a third of the bytes
            picture.save(options.figures / f"{name}.png", optimize=True)
    path = options.out or shown["path"] / "report.html"
    path.write_text(page(runs, shown, figures, checkpoint["scan"]), encoding="utf-8")
    print(f"{path}: {plural(len(runs), 'run')}, {shown['name']} in detail")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = evaluation.Parser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of train.py")
    parser.add_argument("--out", type=Path, help="default: report.html in the folder of the run shown")
    parser.add_argument("--figures", type=Path, help="folder for the charts and galleries as .png files too")
    parser.add_argument("--samples", type=evaluation.natural, default=24, help="in each gallery (24)")
    options = parser.parse_args()
    try:
        write(options)
    except (UserError, OSError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
