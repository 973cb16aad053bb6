"""Run open_clip's own training program with SCAN: replaces functions at run time, and leaves its files alone.

    pip install -r experiments/requirements.txt
    python experiments/open_clip_scan.py --prune 0.3 --dataset-type csv --train-data pairs.csv --model RN50
    torchrun --nproc_per_node 8 experiments/open_clip_scan.py ...  # the global batch is 8 x --batch-size

All other flags are open_clip's. Its loss and gradients stay the same: SCAN only watches. --resume continues
with SCAN's state, saved in open_clip's checkpoints (open_clip alone can still read them). The learning rate
follows epoch + step / steps, because open_clip's step count would jump with the length of an epoch.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scan import Scan, ScanSampler, WithIds

try:
    from open_clip_train import main as program
except ImportError as error:
    sys.exit(f"open_clip_scan.py: {error}: pip install -r experiments/requirements.txt")


class Data:
    """Both data["train"] and its dataloader in open_clip's loop: deals batches of the kept pairs."""

    def __init__(self, dataset, prune, args):
        self.scan = Scan(len(dataset), prune, seed=args.seed)
        self.sampler = ScanSampler(self.scan, args.batch_size * args.world_size)
        workers = dict(num_workers=args.workers, pin_memory=args.device != "cpu")
        self.loader = DataLoader(WithIds(dataset), batch_sampler=self.sampler, **workers)
        self.dataloader, self.ids = self, None
        self.num_samples, self.num_batches = len(dataset), len(self.sampler)  # later: of this epoch
        self.full_batches = self.num_batches

    def set_epoch(self, epoch):
        self.sampler.set_epoch(epoch)
        self.num_samples, self.num_batches = self.scan.num_kept, len(self.sampler)
        share = self.num_samples / self.scan.num_samples
        logging.info(f"SCAN: {self.scan.stage}, {share:.1%} of the data, {self.num_batches} steps")

    def __iter__(self):
        for ids, batch in self.loader:
            self.ids = ids
            yield batch
        self.scan.end_epoch()  # the loop asks for another batch only after the step of the last one


def refuse(args):
    """End the program if its flags ask for something that SCAN cannot do."""
    path, kind = args.train_data or "", args.dataset_type
    is_csv = kind == "csv" or (kind == "auto" and path.endswith((".csv", ".tsv")))
    for reason, asked_for in {
        "needs --train-data FILE.csv: SCAN prunes by position, and a stream has none": not (path and is_csv),
        "--accum-freq: the loss is called with parts of a step; use more ranks": args.accum_freq > 1,
        "--siglip: a sigmoid loss has no two directions to rank by": args.siglip,
        "--horovod: SCAN gathers by torch.distributed; use torchrun": args.horovod,
    }.items():
        if asked_for:
            sys.exit(f"open_clip_scan.py: {reason}")


def add_scan(prune):
    """Wrap some functions of open_clip_train.main."""
    parse_args, pt_load = program.parse_args, program.pt_load
    get_data, create_loss = program.get_data, program.create_loss
    train, saved = None, None  # the run's Data; SCAN's state in the checkpoint to resume from

    def parse_and_refuse(flags):
        args = parse_args(flags)
        refuse(args)
        return args

    def load(*args, **options):
        nonlocal saved
        checkpoint = pt_load(*args, **options)
        saved = checkpoint.get("optimizer", {}).pop("scan", None)
        return checkpoint

    def data(args, *rest, **options):
        nonlocal train
        found = get_data(args, *rest, **options)
        try:
            found["train"] = train = Data(found["train"].dataloader.dataset, prune, args)
            if saved is not None:
                train.scan.load_state_dict(saved)
        except ValueError as error:
            sys.exit(f"open_clip_scan.py: {error}")
        if saved is None and args.resume:
            logging.warning("SCAN: the checkpoint holds no SCAN state: its warm-up begins now")
        return found

    def by_epoch(make_schedule):
        def make(optimizer, *rest):
            adjust = make_schedule(optimizer, *rest)  # a function of the step, at full data
            # open_clip's checkpoints have no field for SCAN's state: save it with the optimizer's.
            optimizer.register_state_dict_post_hook(
                lambda _, state: state | {"scan": train.scan.state_dict()}
            )
            # step is epoch * num_batches + i, with the num_batches of this epoch
            return lambda step: adjust(step * train.full_batches / train.num_batches)

        return make

    def watched_loss(args):
        loss = create_loss(args)

        def watched(image_features, text_features, logit_scale, **rest):
            train.scan.watch(train.ids, image_features, text_features, logit_scale)
            return loss(image_features, text_features, logit_scale=logit_scale, **rest)

        return watched

    program.parse_args, program.pt_load = parse_and_refuse, load
    program.get_data, program.create_loss = data, watched_loss
    for name in ("cosine_lr", "const_lr", "const_lr_cooldown"):
        setattr(program, name, by_epoch(getattr(program, name)))


def ddp(model, device_ids=None, **options):
    """Make DDP without device_ids on a CPU: open_clip passes them, and torch refuses them."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return DistributedDataParallel(model, None if on_cpu else device_ids, **options)


def main(flags):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prune", type=float, default=0.3)
    ours, theirs = parser.parse_known_args(flags)
    add_scan(ours.prune)
    torch.nn.parallel.DistributedDataParallel = ddp
    return program.main(theirs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
