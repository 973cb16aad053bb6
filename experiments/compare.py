"""Compare SCAN with full data and the baselines over several seeds: one table.

    python experiments/compare.py --jobs 3                                # shapes: full, scan, rs2; 5 seeds
    python experiments/compare.py --data 'emoji/train-*.tar' --val-data emoji/val-00000.tar --epochs 16 \\
        --mismatch 0.15 --methods full scan rs2 random infobatch semdedup dpruning once same-budget
    python experiments/compare.py --methods full 'full:--epochs 40' scan 'scan:--prune 0.5' 'rs2:--prune 0.5'
    python experiments/compare.py --arch moco_vit_tiny --prune 0.35       # kNN; then see probe.py

Use one --out per comparison. A method is full, scan, or a name from baselines.py or variants.py; flags behind
a colon are for this method alone, all others go to train.py for every method. Each run is one process with
one thread (besides train.py's --workers) and one line of results.jsonl. The same command continues.

A baseline spends what SCAN with the same flags and seed spent, so SCAN is run for it too. SemDeDup also needs
the full-data run, D-Pruning a short run, and a coreset the SCAN runs of all seeds; their samples and seconds
are not counted. A difference is taken from the method with the same flags if that was run, otherwise from the
one without flags; the difference to RS2 only if both saw equally many samples, within 2 %.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
import baselines  # noqa: E402
import variants  # noqa: E402

import eval as evaluation  # noqa: E402

# what `score` is: the mean of the first group of names that a run's evaluation has.
# balanced: mean over classes; equals top-1 if all classes are equally frequent
SCORES = {("balanced",): "balanced accuracy", ("top1",): "top-1", ("i2t_r1", "t2i_r1"): "mean R@1"}
# Student's t, 97.5 %, for 1, 2, ... 30 degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = evaluation.Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", default=["full", "scan", "rs2"])
    parser.add_argument("--seeds", type=evaluation.count, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=evaluation.natural, default=1, help="runs at a time")
    parser.add_argument("--proxy-epochs", type=evaluation.natural, default=4, help="of D-Pruning's short run")
    parser.add_argument("--measure", help="score of the table, such as top1 (default: balanced or mean R@1)")
    parser.add_argument("--show", action="store_true", help="print what is finished, run nothing")
    args, flags = parser.parse_known_args()
    for method in args.methods:
        name, _, own = method.partition(":")
        if name not in ("full", "scan", *baselines.METHODS) and not variants.make(name):
            parser.error(f"--methods: {name!r} is neither full, scan, nor in baselines.py or variants.py")
        try:
            shlex.split(own)
        except ValueError as error:
            parser.error(f"--methods: {method!r}: {error}")
    return args, flags


def settings(method, args):
    """The flags of compare.py itself that a run of this method depends on."""
    name = method.partition(":")[0]
    if name == "coreset":
        return {"coreset_of": sorted(args.seeds)}
    return {"proxy_epochs": args.proxy_epochs} if name in ("proxy", "dpruning") else {}


def differs(row, args, flags, wanted):
    """Say how a finished run differs from what is asked for now; None if it does not. wanted: methods."""
    if row["flags"] != flags:
        return f"runs with other flags ({shlex.join(row['flags'])})"
    if row["method"] in wanted:
        for name, value in settings(row["method"], args).items():
            if row.get(name, value) != value:
                return f"{row['method']} with other flags ({name} {row[name]})"


def needs(method, seed, seeds):
    """-> {flag of baselines.py: [(method, seed) of each run that this one is built on]}."""
    name, _, own = method.partition(":")
    if name in ("full", "scan", "proxy") or variants.make(name):
        return {}
    scan = f"scan:{own}" if own else "scan"
    others = {
        "semdedup": {"--full-run": [("full", seed)]},
        "dpruning": {"--proxy-run": [("proxy", seed)]},
        "coreset": {"--coreset-runs": [(scan, other) for other in seeds]},
    }
    return {"--scan-run": [(scan, seed)]} | others.get(name, {})


def folder(method, seed, args):
    return args.out.resolve() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', method).strip('-')}-seed{seed}"


def run(method, seed, args, flags):
    """Run one method with one seed -> its record."""
    name, _, own = method.partition(":")
    out, needed = folder(method, seed, args), needs(method, seed, args.seeds)
    program = [HERE.parent / "train.py"]
    if variants.make(name):
        program = [HERE / "variants.py", name]
    elif needed:
        program = [HERE / "baselines.py", name]
        for flag, others in needed.items():
            program += [flag, *(folder(*other, args) for other in others)]
    command = [sys.executable, *map(str, program), "--arch", "vit_tiny", *flags, *shlex.split(own)]
    if name in ("full", "proxy"):
        command += ["--prune", "0"]
    if name == "proxy":
        command += ["--epochs", str(args.proxy_epochs)]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "printed.txt", "a") as printed:
        options = dict(stdout=printed, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        code = subprocess.run([*command, "--seed", str(seed), "--out", str(out)], **options).returncode
    if code:
        lines = (out / "printed.txt").read_text().strip().splitlines()
        raise RuntimeError(f"{method}, seed {seed}: {lines[-1] if lines else code} ({out}/printed.txt)")
    return {"method": method, "seed": seed, "flags": flags} | settings(method, args) | summary(out)


def summary(out):
    """Read a finished run's log -> scores, samples, seconds."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    epochs = [r for r in records if r["event"] == "epoch"]
    if len(epochs) < json.loads((out / "config.json").read_text())["epochs"]:
        raise RuntimeError(f"{out}: stopped before its end; the same command goes on")
    final = next((r for r in reversed(records) if r["event"] == "eval"), None)
    if final is None:
        raise RuntimeError(f"{out}: no score: give --val-data (with labels, for MoCo)")
    names = next(names for names in SCORES if names[0] in final)
    recalls = [r["found"]["ill_matched"]["recall"] for r in epochs if r.get("found", {}).get("ill_matched")]
    return {
        "measure": SCORES[names],
        "score": statistics.mean(final[name] for name in names),
        "scores": shares_of(final),
        "samples": epochs[-1]["samples_seen"],
        "seconds": round(sum(r["seconds"] for r in epochs), 1),
        "epochs": len(epochs),
        "mismatches_found": recalls,
    }


def shares_of(record):
    """All shares of a record of the log: top1, top5, balanced, i2t_r1, ..."""
    return {name: value for name, value in record.items() if isinstance(value, float)}


def complete(row, args):
    """Add `scores` to a row that was written without it, from the run's log if that is still there."""
    path = folder(row["method"], row["seed"], args) / "log.jsonl"
    if "scores" in row or not path.exists():
        return row
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return row | {"scores": shares_of([r for r in records if r["event"] == "eval"][-1])}


def run_all(methods, args, flags, path, done):
    """Run first what other runs are built on. Append each finished run to `path` at once."""
    wanted = [(method, seed) for seed in args.seeds for method in methods]
    needed = {key: needs(*key, args.seeds) for key in wanted}
    first = [key for key in wanted if not needed[key]]
    for runs in needed.values():
        for others in runs.values():
            first += others
    for stage in (first, wanted):
        todo = [key for key in dict.fromkeys(stage) if key not in done]
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {pool.submit(run, *key, args, flags): key for key in todo}
            try:
                for future in as_completed(futures):
                    row = done[futures[future]] = future.result()
                    with open(path, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    show = f"{row['method']}, seed {row['seed']}: {row['measure']} {row['score']:.4f}"
                    print(f"{show}, {row['samples']:,} samples, {row['seconds']:.0f} s", file=sys.stderr)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def mean_and_spread(values, form):
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def interval(values):
    """-> mean, and half the width of its 95 % interval."""
    t = T[len(values) - 2] if len(values) <= len(T) + 1 else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def paired(method, against, done, seeds):
    """Mean difference of the scores over the seeds that both have, ± half its 95 % interval."""
    name, _, own = method.partition(":")
    other = f"{against}:{own}"  # the one with the same flags, if it was run
    if name == against or not any((other, seed) in done for seed in seeds):
        other = against
    both = [seed for seed in seeds if {(method, seed), (other, seed)} <= done.keys()]
    if method == against or len(both) < 2:
        return "–"
    samples = sum(done[method, seed]["samples"] for seed in both)
    its_samples = sum(done[other, seed]["samples"] for seed in both)
    if against == "rs2" and abs(samples - its_samples) > 0.02 * its_samples:
        return "–"
    gap, half = interval([done[method, seed]["score"] - done[other, seed]["score"] for seed in both])
    return f"{gap:+.3f} ± {half:.3f}"


def table(methods, done, seeds):
    rows = list(done.values())
    measure = rows[0]["measure"]
    more = sorted({"top1", "top5"}.intersection(*(row.get("scores", {}) for row in rows)) - {measure})
    finders = [m for m in methods if m.startswith("scan") or variants.make(m.partition(":")[0])]
    columns = ["method", measure, *more, "samples", "seconds", "− full data", "− RS2"]
    columns += ["mismatches found", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in methods:
        rows = [done[method, seed] for seed in seeds if (method, seed) in done]
        if not rows:
            continue
        cells = [method, mean_and_spread([row["score"] for row in rows], ".3f")]
        for name in more:
            cells += [mean_and_spread([row["scores"][name] for row in rows], ".3f")]
        cells += [f"{statistics.mean(row['samples'] for row in rows):,.0f}"]
        cells += [mean_and_spread([row["seconds"] for row in rows], ".0f")]
        cells += [paired(method, "full", done, seeds), paired(method, "rs2", done, seeds)]
        found = [statistics.mean(row["mismatches_found"]) for row in rows if row["mismatches_found"]]
        cells += [mean_and_spread(found, ".2f") if found and method in finders else "–", str(len(rows))]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)


def main():
    args, flags = parse_args()
    path = args.out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if args.show and not rows:
        sys.exit(f"compare.py: nothing is finished in {args.out}")
    wanted = {*args.methods} | {"proxy" for method in args.methods if method.startswith("dpruning")}
    for row in rows:
        difference = differs(row, args, flags, wanted)
        if difference and not args.show:
            sys.exit(f"compare.py: {path} has {difference}: choose another --out")
    done = {(row["method"], row["seed"]): complete(row, args) for row in rows}
    if not args.show:
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            run_all(args.methods, args, flags, path, done)
        except RuntimeError as error:
            sys.exit(f"compare.py: {error}")
    if args.measure:
        for row in done.values():
            if args.measure not in row.get("scores", {}):
                sys.exit(
                    f"compare.py: --measure: {row['method']}, seed {row['seed']} has no {args.measure!r}"
                )
            row |= {"measure": args.measure, "score": row["scores"][args.measure]}
    print(table(args.methods, done, args.seeds))


if __name__ == "__main__":
    main()
