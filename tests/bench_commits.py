# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training step costs here, against another checkout of this repository.

    git clone . ../before && git -C ../before checkout COMMIT
    python tests/bench_commits.py ../before

Each method trains on the tiny world with 32 rows a step, in micro-batches of 4 and of 32. In every
round both checkouts do a short and a long run, one after the other. The computing time (user and
system, all threads) of a step is the difference of the two runs over the difference of their steps:
imports, loading, encoding and the last checkpoint cancel out. The ratio is formed within a round;
the table gives its median, smallest and largest value. One torch thread.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TINY = HERE / "tests" / "tiny"
SHORT = 2  # steps
LONG = {"dpo": 32, "smpo": 17, "dro": 17}  # a step of DPO takes half as long
METHODS = {
    "dpo": ("dpo_baseline.py", []),
    "smpo": ("smpo.py", ["--scores", "scores.safetensors"]),
    "dro": ("dro.py", ["--data", "experts.parquet"]),
}


def computing_time(command, folder, checkout):
    """Seconds of user and system time that a command takes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, str(checkout / command[0]), *command[1:]]
    subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def train(method, micro_batch, steps, folder, checkout):
    script, more = METHODS[method]
    # The inversion that commits before --inversion had: as many UNet calls on both sides.
    if " inversion: " in (checkout / script).read_text():
        more = [*more, "--inversion", "above", "--inversion_steps", "5"]
    command = [script, "--batch", "32", "--micro_batch", str(micro_batch), "--steps", str(steps)]
    command += ["--out", "out", "--overwrite", "--cache", "cache", "--save_every", "1000"]
    return computing_time([*command, "--eval_prompts", "0", *more], folder, checkout)


def prepare(folder, checkout):
    """The reward's scores and the experts, by each checkout itself, and a warm cache."""
    folder.mkdir()
    scorer = f"pickscore={TINY / 'reward'}"
    command = ["eval.py", "--data", str(TINY / "pairs" / "train.parquet"), "--scorers", scorer]
    computing_time([*command, "--scores_out", "scores.safetensors"], folder, checkout)
    scores = ["--scores", "scores.safetensors"]
    command = ["dro.py", "--steps", "1", "--out", "choose", "--eval_prompts", "0", *scores]
    computing_time([*command, "--cache", "cache"], folder, checkout)
    shutil.copy(folder / "choose" / "experts.parquet", folder)
    for method in METHODS:
        train(method, 32, LONG[method], folder, checkout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve(), "now": HERE}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in checkouts}
        for name, checkout in checkouts.items():
            prepare(folders[name], checkout)
        print("| method | micro-batch | a step's time, now over before |\n|---|---|---|", flush=True)
        for method in args.methods:
            for micro_batch in (4, 32):
                ratios = []
                for _ in range(args.rounds):
                    cost = {}
                    for name, checkout in checkouts.items():
                        where = (folders[name], checkout)
                        long = train(method, micro_batch, LONG[method], *where)
                        cost[name] = long - train(method, micro_batch, SHORT, *where)
                    ratios.append(cost["now"] / cost["before"])
                found = f"{min(ratios):.3f} to {max(ratios):.3f}"
                median = statistics.median(ratios)
                print(f"| {method} | {micro_batch} | {median:.3f} ({found}) |", flush=True)


if __name__ == "__main__":
    main()
