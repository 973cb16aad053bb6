"""List the samples that a run of train.py marked: the ill-matched, then the redundant, worst first.

    python experiments/suspects.py runs/x --out suspects.csv

quantile: mean place among the losses of the batch, 0 lowest. Finds planted mismatches, if any.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clip_model
import data
import eval as evaluation


def suspects(run, out, spec=None):
    """Write the CSV -> ids of each kind, and the mask of planted mismatches or None."""
    checkpoint = evaluation.load_scanned(run)
    flags, scan = checkpoint["args"], checkpoint["scan"]
    captions, spec = flags["arch"] in clip_model.ARCHS, spec or flags["data"]
    options = dict(image_key=flags["img_key"], caption_key=flags["caption_key"], captions=captions)
    options |= dict(templates=flags.get("templates"), size=flags["image_size"])
    source = data.open_source(spec, **options)
    dataset = data.Samples(source, 0)
    if captions:
        dataset = data.Pairs(source, None, flags["image_size"], mismatch=flags["mismatch"])
    if dataset.fingerprint() != checkpoint["data"]["hash"]:
        raise data.UserError(f"{spec}: not the data that {run} was trained on: give those, by --data")
    quantile, ill = scan["quantile"].float(), scan["ill_counts"].int()
    redundant, found = scan["counts"].int() - ill, {}  # a sample is of the kind that it was marked more often
    kinds = {"ill-matched": (ill, (ill > 0) & (ill >= redundant), -quantile)}
    kinds["redundant"] = redundant, redundant > ill, quantile
    with open(out, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["id", "where", "caption", "kind", "marked", "rounds", "quantile"])
        for kind, (times, chosen, order) in kinds.items():
            ids = chosen.nonzero().flatten()
            found[kind] = ids[order[ids].argsort(stable=True)].tolist()
            for i in found[kind]:
                row = [i, source.where(i), dataset.caption(i) if captions else "", kind]
                table.writerow([*row, int(times[i]), scan["rounds"], round(float(quantile[i]), 4)])
    return found, dataset.truth.get("ill_matched")


def main():
    parser = evaluation.Parser(description=__doc__)
    parser.add_argument("run", help="folder of a run, or its last.pt")
    parser.add_argument("--data", help="where the data are now; default: where the run had them")
    parser.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args()
    try:
        found, planted = suspects(args.run, args.out, args.data)
    except (data.UserError, OSError) as error:
        evaluation.fail("suspects.py", str(error))
    print(f"{args.out}: {len(found['ill-matched'])} ill-matched, {len(found['redundant'])} redundant")
    for share in (0.05, 0.1, 0.15) if planted is not None and planted.any() else ():
        hits = planted[found["ill-matched"][: int(share * len(planted))]]
        precision, recall = hits.sum() / max(len(hits), 1), hits.sum() / planted.sum()
        print(f"first {share:4.0%}  precision {precision:6.1%}  recall {recall:6.1%}")


if __name__ == "__main__":
    main()
