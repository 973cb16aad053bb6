"""kNN and linear accuracy of MoCo runs, beside the same backbone untrained (the initial weights of a seed).

    python experiments/probe.py runs/compare/full-seed* runs/compare/scan-seed* --val-data shapes:4096

Reads data, classes and seeds from the runs themselves; prints one row per ratio, mean ± standard deviation.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import moco


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of train.py")
    parser.add_argument(
        "--val-data", help="classify these instead (shapes:4096: ± 0.5 points instead of ± 1.4)"
    )
    asked, rows = parser.parse_args(), {}
    for run in asked.runs:
        args = evaluation.load_checkpoint(run / "last.pt")["args"]
        common = dict(size=args["image_size"], captions=False, label_key=args["label_key"])
        train = data.open_source(args["data"], train=True, **common)
        test = data.open_source(asked.val_data or args["val_data"], train=False, **common)
        torch.manual_seed(args["seed"])  # as train.py draws the initial weights
        untrained = moco.create(args["arch"], args["image_size"]).eval()
        trained, _ = evaluation.load_model(run / "last.pt")
        for name, model in (("untrained", untrained), (f"prune {args['prune']:g}", trained)):
            scores = rows.setdefault(name, {})
            if args["seed"] in scores:
                continue
            found = [
                protocol(model, train, test, torch.device("cpu"), workers=os.cpu_count() - 1)
                for protocol in (evaluation.knn, evaluation.linear)
            ]
            scores[args["seed"]] = [result[key] for result in found for key in ("top1", "balanced")]
            print(
                run.name,
                name,
                [round(score, 4) for score in scores[args["seed"]]],
                file=sys.stderr,
                flush=True,
            )
    print("| | kNN | kNN, balanced | linear | linear, balanced | seeds |\n|---|---|---|---|---|---|")
    for name, scores in rows.items():
        cells = []
        for column in zip(*scores.values(), strict=True):
            spread = f" ± {statistics.stdev(column):.3f}" if len(column) > 1 else ""
            cells.append(f"{statistics.mean(column):.3f}{spread}")
        print(f"| {name} | {' | '.join(cells)} | {', '.join(map(str, sorted(scores)))} |")


if __name__ == "__main__":
    main()
