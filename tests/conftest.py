# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests: the repository on the path, one thread a process, and small data sets cut
from the tiny world."""

import json
import os
import sys
from pathlib import Path

# Nobody is asked: a test that looked for a hub would wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(TINY)]
# Kernels split their sums among the threads: with one, nothing depends on how many the machine has.
torch.set_num_threads(1)


def write_rows(rows, path):
    """Write a parquet file of some rows (a list of dicts); returns its path as a str."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="session")
def rows():
    """64 raw pairs of the tiny world, as a list of dicts."""
    import pyarrow.parquet as pq

    return pq.read_table(TINY / "pairs" / "train.parquet").slice(0, 64).to_pylist()


@pytest.fixture
def make_set(tmp_path):
    """make_set(rows) writes a parquet file of these rows and returns its path."""
    return lambda rows, name="set.parquet": write_rows(rows, tmp_path / name)


@pytest.fixture
def elsewhere(tmp_path_factory, monkeypatch):
    """An empty working folder: a test should not depend on what lies in the one it is started in.
    Commands that a failed test leaves running are ended."""
    from child import Child

    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    Child.kill_all()


@pytest.fixture
def alpha_bar():
    """Stable Diffusion's noise schedule, (1000,) fp32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@pytest.fixture
def log_of():
    """log_of(run folder) -> the lines of its log.jsonl."""
    return lambda out: [
        json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()
    ]
