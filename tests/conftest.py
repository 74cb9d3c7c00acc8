"""Shared by the tests: the repository on the path, one thread a process, and small data sets cut from the
tiny world."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path[:0] = [str(ROOT), str(TINY)]


@pytest.fixture(scope="session")
def rows():
    """64 raw pairs of the tiny world, as a list of dicts."""
    from datasets import load_dataset

    return (
        load_dataset("parquet", data_files=str(TINY / "pairs" / "train.parquet"), split="train")
        .select(range(64))
        .to_list()
    )


@pytest.fixture
def make_set(tmp_path):
    """make_set(rows) writes a parquet file of these rows and returns its path."""
    from datasets import Dataset

    def write(rows, name="set.parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def alpha_bar():
    """Stable Diffusion's noise schedule, (1000,) fp32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@pytest.fixture
def log_of():
    """log_of(run folder) -> the lines of its log.jsonl."""
    return lambda out: [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
