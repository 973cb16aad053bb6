"""Tests of icons.py, on a package of a few drawings."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import icons

import data
import eval as evaluation
from scan import Scan

SQUARE = '<path fill="currentColor" d="M2 2h12v12H2z"/>'


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Two training sets of 100 icons, and three held-out sets that show three of their concepts."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "json").mkdir()
    words = ["red", "green", "blue", "old", "new", "hot", "cold", "wet", "dry", "odd"]
    names = [f"{a}-{b}-24-filled" for a, b in itertools.product(words, words)]
    sets = {"one": names, "two-brands": names, "bi": ["red-red", "12", "logo-x"]}
    sets |= {name: ["red-red-outline"] for name in ("jam", "vaadin")}
    for prefix, found in sets.items():
        drawn = {name: {"body": SQUARE} for name in found}
        content = {"prefix": prefix, "icons": drawn, "width": 16, "height": 8}
        (folder / "json" / f"{prefix}.json").write_text(json.dumps(content))
    about = {"one": {"license": {"spdx": "MIT"}, "category": "Emoji"}}
    (folder / "collections.json").write_text(json.dumps(about))
    (folder / "package.json").write_text('{"version": "1"}')
    return folder


def test_names_become_captions_concepts_and_logos(package):
    found, wordless = icons.read_icons(package)
    by_name = {name: meta for name, meta, _ in found}
    assert len(found) == 204 and wordless == 1  # "12"
    assert by_name["one:red-old-24-filled"] == {
        "caption": "red old filled", "set": "one", "name": "red-old-24-filled", "concept": "red old",
        "logo": False, "category": "Emoji", "licence": "MIT",
    }  # fmt: skip
    assert by_name["two-brands:red-old-24-filled"]["logo"] and by_name["bi:logo-x"]["logo"]
    assert len(icons.read_icons(package, logos=False)[0]) == 103
    assert 'viewBox="0 -4 16 16"' in found[0][2]  # 16 x 8, centred in a square


def test_held_out_sets_and_the_tenth_are_in_no_training_shard(package):
    found, _ = icons.read_icons(package)
    splits = icons.split(found * 8, 10**6, seed=0)
    held = {name for sets in icons.HELD_OUT.values() for name in sets}
    names = {split: {icon[0] for icon in chosen} for split, chosen in splits.items()}
    assert not held & {meta["set"] for _, meta, _ in splits["train"] + splits["retrieval"]}
    assert 8 <= len(names["retrieval"]) <= 40  # a tenth of 200, by a hash
    assert not names["train"] & names["retrieval"] and len(names["train"] | names["retrieval"]) == 200
    assert names["zeroshot"] == {"bi:red-red", "jam:red-red-outline", "vaadin:red-red-outline"}
    few = [icons.split(found, 50, seed)["train"] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and len(few[0]) == 50


def test_shards_are_built_once_and_read_by_data(package, tmp_path, monkeypatch, capsys):
    pytest.importorskip("resvg_py")
    arguments = ["icons.py", "build", str(package), "--out", str(tmp_path), "--n", "60", "--size", "8"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--jobs", "1"])
    icons.main()
    first = (tmp_path / "train-00000.tar").stat().st_mtime_ns
    icons.main()
    assert (tmp_path / "train-00000.tar").stat().st_mtime_ns == first
    assert "train-*.tar: 60 icons, 0 cannot be drawn" in capsys.readouterr().out
    shards = data.open_source(str(tmp_path / "train-*.tar"))
    assert len(shards) == 60 and shards.caption(0) == json.loads(shards._read(0, "json"))["caption"]
    pixels = np.asarray(shards.image(0))
    assert pixels.shape == (8, 8, 3) and (pixels[0] == 255).all() and pixels[4, 4].max() < 50
    assert icons.is_blank(Image.new("L", (8, 8), 255)) and not icons.is_blank(shards.image(0))
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    with pytest.raises(SystemExit, match="other settings"):
        icons.main()

    scan = Scan(60)
    scan._marked[0, :10], scan._marked[1, 10:30] = True, True
    scan.counts[:40], scan.ill_counts[10:40], scan.rounds = 1, 1, 2
    run = tmp_path / "last.pt"
    torch.save({"scan": scan.state_dict(), "args": {"data": str(tmp_path / "train-*.tar")}}, run)
    icons.look(run, tmp_path / "look.png")
    logo = np.array([json.loads(shards._read(i, "json"))["set"] == "two-brands" for i in range(60)])
    rows = [
        line.split(" | ")[:2]
        for line in capsys.readouterr().out.splitlines()
        if "newest" in line or "all" in line
    ]
    expected = [logo.mean(), logo[:10].mean(), logo[10:30].mean()]
    assert [row[1] for row in rows] == [f"{share:.1%}" for share in expected]
    assert (tmp_path / "look.png").exists()


def test_pairs_of_runs_are_compared_picture_by_picture(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda run: {"args": FLAGS})
    monkeypatch.setattr(evaluation, "load_model", lambda run: (run, None))
    monkeypatch.setattr(evaluation, "zeroshot_classifier", lambda *_: torch.eye(64))
    labels = torch.arange(100) % 64  # of data.Shapes
    right, tenth_wrong = labels, labels.where(torch.arange(100) >= 10, (labels + 1) % 64)
    features = {"a": right, "b": tenth_wrong}
    one_hot = torch.nn.functional.one_hot
    monkeypatch.setattr(evaluation, "image_features", lambda run, *_: one_hot(features[run], 64).float())
    icons.pair(["b", "a"])
    half = 1.96 * (0.1 * 0.9 * 100 / 99) ** 0.5 / 10
    assert f"top-1: 90.00% and 100.00%, difference +10.00% ± {half:.2%}" in capsys.readouterr().out


FLAGS = {"label_key": None, "templates": None, "val_data": "shapes:100"}
