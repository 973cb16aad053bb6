"""Text-only SCAN (the paper's future work): a text encoded twice, with different dropout, is a positive pair.

    python experiments/text_only.py emoji/*.tar          # the names in emoji.py's shards; group: subgroup
    python experiments/text_only.py lines.txt --prune 0  # any text, full data; group: both halves of a line

A small SimCSE (Gao et al., 2021). Score: share of held-out texts whose nearest neighbour is of their group.
"""

import argparse
import json
import re
import sys
import tarfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scan import Scan, ScanSampler, WithIds, info_nce


class Encoder(nn.Module):
    """Word ids (b, n), 0 pads -> unit vectors (b, width): the mean over the words of a small transformer."""

    def __init__(self, words, length, width=64, layers=2, dropout=0.3):
        super().__init__()
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens):
        pad, x = tokens == 0, self.word(tokens) + self.position[: tokens.shape[1]]
        x = self.blocks(x, src_key_padding_mask=pad).masked_fill(pad.unsqueeze(2), 0)
        return nn.functional.normalize(x.sum(1), dim=1)


def read(paths):
    """Return the training texts, the held-out texts, and the group of each held-out text."""
    rows = []  # (text, group)
    for path in paths:
        if path.endswith(".tar"):
            with tarfile.open(path) as tar:
                metas = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
            rows += [(meta["caption"], meta["subgroup"]) for meta in metas]
        else:
            rows += [(x, None) for x in Path(path).read_text(encoding="utf-8").splitlines() if " " in x]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out, training = rows[: len(rows) // 5], [text for text, _ in rows[len(rows) // 5 :]]
    if None in (group for _, group in held_out):  # halves: every other word
        held_out = [(" ".join(text.split()[k::2]), text) for text, _ in held_out for k in (0, 1)]
    return training, [text for text, _ in held_out], [group for _, group in held_out]


@torch.no_grad()
def score(model, tokens, same):
    x = model.eval()(tokens)
    return same.gather(1, (x @ x.T).fill_diagonal_(-1).argmax(1, keepdim=True)).float().mean()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("data", nargs="+", help="emoji.py's .tar shards, or text files of 1,000 lines or more")
for name, default in dict(prune=0.3, epochs=22, seed=0).items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
args = parser.parse_args()
torch.manual_seed(args.seed)
try:
    training, held_out, groups = read(args.data)
    scan = Scan(len(training), args.prune, seed=args.seed)
    sampler = ScanSampler(scan, 128)
except (OSError, ValueError) as error:
    sys.exit(f"text_only.py: {error}")
texts = [re.findall(r"\w+|[^\w\s]", text.lower())[:32] for text in (*training, *held_out)]
ids = {word: 1 + i for i, word in enumerate(sorted(set().union(*texts)))}
rows = [torch.tensor([ids[word] for word in words]) for words in texts]
tokens, tests = nn.utils.rnn.pad_sequence(rows, True).split([len(training), len(held_out)])
same = torch.tensor([[a == b for a in groups] for b in groups]).fill_diagonal_(False)
model = Encoder(1 + len(ids), tokens.shape[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
untrained = score(model, tests, same)
seen, start = 0, time.time()
for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    model.train()
    for batch_ids, batch in DataLoader(WithIds(tokens), batch_sampler=sampler):
        batch = batch[:, : (batch != 0).sum(1).max()]  # cut to the longest text
        one, two = model(batch), model(batch)  # with different dropout
        a, b = info_nce(one, two, 20), info_nce(two, one, 20)
        scan.observe(batch_ids, a, b)
        optimizer.zero_grad()
        ((a + b) / 2).mean().backward()
        optimizer.step()
    scan.end_epoch()
    seen, seconds = seen + scan.observed, time.time() - start
print(f"prune {args.prune:g} seed {args.seed}: {seen:,} samples seen, {seconds:.0f} s; score", end=" ")
print(f"{score(model, tests, same):.1%} (untrained {untrained:.1%}, chance {same.float().mean():.1%})")
