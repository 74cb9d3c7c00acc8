# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What the data path costs: how long the model waits for images, and how long a start takes.

    python tests/bench_data.py                     # the tiny world's pairs are encoded and scored
    python tests/bench_data.py --rows 1000000      # a start with a finished cache, synthetic set

The first prints the fraction of the time in which the VAE or the reward model does nothing, because
no decoded image is there yet or a file is being written. The second makes a parquet set of so many
rows and a cache that holds all of it, then opens both in a new process, as a training would.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import common
import eval as evaluation
import smpo

ROW_GROUP = 1000  # rows; as sets of the hub have them
CAPTIONS = 10_000  # distinct ones of the synthetic set


class Clock:
    """Adds up the time that passes inside of some calls."""

    def __init__(self):
        self.seconds = 0.0

    def timed(self, function):
        def call(*args):
            before = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - before
            return result

        return call


class TimedStream(common.SampleStream):
    """Notes how long encoding images takes as a whole."""

    whole = Clock()

    def encode_images(self, to_read):
        self.whole.timed(super().encode_images)(to_read)


def make_config(folder, *more):
    flags = ["--cache", str(folder / "cache"), "--out", str(folder / "out"), *more]
    return common.parse(smpo.Config, smpo.PRESETS, flags)


def open_samples(cfg, models, table, kind=common.SampleStream):
    sides = torch.tensor([[0, 1]]).expand(len(table.labels), 2)
    return kind(cfg, common.DistInfo(), models, table, table.labels != 0.5, sides)


# -------------------------------------------------------------------------- waiting for images
def measure_waiting(folder):
    cfg = make_config(folder)
    table = common.RowTable(cfg, common.DistInfo(), common.PAIR_COLUMNS)
    score = evaluation.load_reward(cfg.reward)
    model = Clock()
    whole = Clock()
    score.score_prepared = model.timed(score.score_prepared)
    whole.timed(evaluation.score_pairs)(table, score, cfg.cache, "scores", common.DistInfo())
    report("scoring", model.seconds, whole.seconds, 2 * len(table.labels))

    models = common.Models(cfg, "cpu")
    model = Clock()
    models.encode_images = model.timed(models.encode_images)
    samples = open_samples(cfg, models, table, TimedStream)
    report("encoding", model.seconds, TimedStream.whole.seconds, len(samples.latents.keys))


def report(title, model, whole, images):
    waiting = 1 - model / whole
    print(f"{title}: {images:,} images, {whole:.1f} s, the model waits {waiting:.1%} of it")


# ------------------------------------------------------------------- a start with a finished cache
def make_set(path, rows):
    """A parquet set of pairs. Its images are 24 random bytes: nobody decodes them here."""
    random = np.random.default_rng(0)
    schema = pa.schema([
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
    ])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, ROW_GROUP):
            numbers = range(start, min(start + ROW_GROUP, rows))
            content = random.bytes(48 * len(numbers))
            pieces = [content[24 * i : 24 * (i + 1)] for i in range(2 * len(numbers))]
            columns = {
                "caption": [f"caption {number % CAPTIONS}" for number in numbers],
                "jpg_0": pieces[::2],
                "jpg_1": pieces[1::2],
                "label_0": [float(number % 2) for number in numbers],
            }
            writer.write_table(pa.table(columns, schema))


def fill_cache(cfg, models):
    """Read the set once, and write a latent for every image and an embedding for every caption."""
    table = common.RowTable(cfg, common.DistInfo(), common.PAIR_COLUMNS)
    for number, row in table.source.rows(common.PAIR_COLUMNS):
        for side, column in enumerate(common.PAIR_COLUMNS):
            table.image_keys[number, side] = common.image_key(row[column])
    table.save()
    latent = torch.zeros(common.ROWS_PER_SHARD, *models.latent_shape(cfg.resolution))
    write_all(store_of(cfg, models, "latents"), table.image_keys, latent, "latent")
    hidden = models.encode_prompts([""])["encoder_hidden_states"]
    captions = torch.tensor([common.caption_key(f"caption {i}") for i in range(CAPTIONS)])
    captions = torch.cat([captions, torch.tensor([common.caption_key("")])])
    embedding = hidden.expand(common.ROWS_PER_SHARD, -1, -1)
    write_all(store_of(cfg, models, "captions"), captions, embedding, "encoder_hidden_states")


def store_of(cfg, models, kind):
    """The store that a run with these settings looks into."""
    part, size = ("vae", f"{cfg.resolution}-") if kind == "latents" else ("text encoder", "")
    name = f"{models.hashes[part][:16]}-{size}{cfg.precision}-v{common.CACHE_VERSION}"
    return common.TensorStore(Path(cfg.cache) / f"{kind}-{name}")


def write_all(store, keys, row, name):
    sizes = torch.zeros(len(row), 6)
    for part in keys.flatten().split(common.ROWS_PER_SHARD):
        count = len(part)
        store.write(part.tolist(), {name: row[:count], "size": sizes[:count]})


def start(cfg):
    """What a training does before its first step, timed."""
    models = common.Models(cfg, "cpu")
    before = time.process_time(), time.perf_counter()
    table = common.RowTable(cfg, common.DistInfo(), common.PAIR_COLUMNS)
    opened = time.process_time(), time.perf_counter()
    samples = open_samples(cfg, models, table)
    done = time.process_time(), time.perf_counter()
    samples.batch(range(cfg.micro_batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for title, a, b in (("the table", before, opened), ("the samples", opened, done)):
        print(f"{title}: {b[0] - a[0]:.2f} s of computing, {b[1] - a[1]:.2f} s by the clock")
    print(f"{len(table.labels):,} rows, {len(samples.rows):,} samples, peak memory {peak:.2f} GiB")


def measure_start(folder, rows, samples):
    data = folder / "set.parquet"
    flags = ["--data", str(data), "--batch", "1024", "--micro_batch", "32"]
    cfg = make_config(folder, *flags, "--steps", str(samples // 1024))
    if not data.exists():
        make_set(data, rows)
        fill_cache(cfg, common.Models(cfg, "cpu"))
    words = [sys.executable, __file__, "--start", "--folder", str(folder), "--samples"]
    for _ in range(2):  # the first one may read from the disk
        subprocess.run([*words, str(samples)], check=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, help="of a synthetic set")
    parser.add_argument("--samples", type=int, default=1_024_000, help="of the run on it")
    parser.add_argument("--folder", type=Path, help="for the set and the cache; else temporary")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        flags = ["--data", str(args.folder / "set.parquet"), "--batch", "1024"]
        steps = ["--steps", str(args.samples // 1024)]
        return start(make_config(args.folder, *flags, *steps, "--micro_batch", "32"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.rows:
            measure_start(folder, args.rows, args.samples)
        else:
            measure_waiting(folder)


if __name__ == "__main__":
    main()
