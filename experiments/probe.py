"""kNN and linear accuracy of MoCo runs, beside the same backbone untrained (the initial weights of a seed).

    python experiments/probe.py runs/moco/full-seed* runs/moco/scan-seed* --val-data shapes:4096

Reads data, classes and seeds from the runs themselves. Runs whose folders differ in -seedN alone are one row:
mean ± standard deviation.
"""

import re
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import moco


def probe(run, val_data):
    """-> seed, and by name of the model: kNN and linear accuracy, top-1 and balanced of each."""
    args = evaluation.load_checkpoint(run).get("args", {})
    if args.get("arch") not in moco.ARCHS:
        raise data.UserError(f"{run}: not a run of MoCo")
    val_data = val_data or args["val_data"]
    if val_data is None:
        raise data.UserError(f"{run}: say what to classify, with --val-data")
    keys = dict(image_key=args["img_key"], label_key=args["label_key"])
    train = data.open_source(args["data"], train=True, size=args["image_size"], captions=False, **keys)
    test = data.open_source(val_data, train=False, size=args["image_size"], captions=False, **keys)
    torch.manual_seed(args["seed"])  # as train.py draws the initial weights
    untrained = moco.create(args["arch"], args["image_size"]).eval()
    trained, _ = evaluation.load_model(run)
    if train.labels is None or test.labels is None:
        raise data.UserError(f"{run}: no labels; was it trained with --label-key?")
    scores = {}
    for name, model in (("untrained", untrained), (re.sub(r"-seed\d+$", "", run.name), trained)):
        loading = dict(workers=evaluation.loading_processes())
        protocols = evaluation.knn, evaluation.linear
        found = [protocol(model, train, test, torch.device("cpu"), **loading) for protocol in protocols]
        scores[name] = [result[key] for result in found for key in ("top1", "balanced")]
    return args["seed"], scores


def main():
    parser = evaluation.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of train.py")
    about = "classify these instead (shapes:4096: ± 0.5 points instead of ± 1.4)"
    parser.add_argument("--val-data", help=about)
    asked, rows = parser.parse_args(), {}
    for run in asked.runs:
        try:
            seed, scores = probe(run, asked.val_data)
        except data.UserError as error:
            evaluation.fail("probe.py", str(error))
        print(run, {name: [round(x, 4) for x in values] for name, values in scores.items()}, file=sys.stderr)
        for name, values in scores.items():
            rows.setdefault(name, {})[seed] = values
    print("| | kNN | kNN, balanced | linear | linear, balanced | seeds |\n|---|---|---|---|---|---|")
    for name, scores in rows.items():
        cells = []
        for column in zip(*scores.values(), strict=True):
            spread = f" ± {statistics.stdev(column):.3f}" if len(column) > 1 else ""
            cells.append(f"{statistics.mean(column):.3f}{spread}")
        print(f"| {name} | {' | '.join(cells)} | {', '.join(map(str, sorted(scores)))} |")


if __name__ == "__main__":
    main()
