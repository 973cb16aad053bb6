"""Full data against SCAN over several seeds: runs train.py for each, then prints the table of the README.

    python experiments/compare.py                                       # shapes, 3 seeds, prune 0 and 0.3
    python experiments/compare.py --data 'emoji/train-*.tar' --val-data emoji/val-00000.tar --epochs 24
    python experiments/compare.py --data ... --val-data ... --epochs 24 --mismatch 0.15
    python experiments/compare.py --arch moco_vit_tiny --ratios 0 0.35    # kNN; then see probe.py

Other flags go to train.py. Runs alternate between the ratios, so that slow minutes of a machine hit both.
Finished runs are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

# balanced: the mean over classes, which is top-1 where all classes are equally frequent
SCORES = {("balanced",): "balanced accuracy", ("top1",): "top-1", ("i2t_r1", "t2i_r1"): "mean R@1"}
HERE = Path(__file__).resolve().parent.parent


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_known_args()


def mean_std(values, form):
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main():
    args, rest = parse_args()
    rows = {ratio: [] for ratio in args.ratios}
    for seed in args.seeds:
        for ratio in args.ratios:
            out = args.out / f"prune{ratio:g}-seed{seed}"
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                str(args.ranks),
                "train.py",
            ]
            command += ["--arch", "vit_tiny", *rest, "--prune", str(ratio), "--seed", str(seed)]
            subprocess.run(
                [*command, "--out", str(out.resolve())], cwd=HERE, check=True, stdout=subprocess.DEVNULL
            )
            records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            epochs = [r for r in records if r["event"] == "epoch"]
            final = [r for r in records if r["event"] == "eval"][-1]
            names = next(n for n in SCORES if n[0] in final)
            planted = next((r["found"].get("ill_matched", {}) for r in reversed(epochs) if "found" in r), {})
            row = {
                "score": statistics.mean(final[n] for n in names),
                "samples": epochs[-1]["samples_seen"],
                "seconds": sum(r["seconds"] for r in epochs),
                "recall": planted.get("recall"),
            }
            rows[ratio].append(row)
            print(f"prune {ratio:g} seed {seed}: {names} {row}", file=sys.stderr, flush=True)
    print(f"| prune | {SCORES[names]} | samples | seconds | mismatches found |")
    print("|---|---|---|---|---|")
    for ratio, found in rows.items():
        score, seconds = ([r[k] for r in found] for k in ("score", "seconds"))
        samples = statistics.mean(r["samples"] for r in found)
        recalls = [r["recall"] for r in found if r["recall"] is not None and ratio]
        print(
            f"| {ratio:g} | {mean_std(score, '.3f')} | {samples:,.0f} | {mean_std(seconds, '.0f')} | "
            f"{mean_std(recalls, '.2f') if recalls else '–'} |"
        )


if __name__ == "__main__":
    main()
