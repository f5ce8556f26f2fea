"""How full rows are, and how evenly attention is spread over data-parallel ranks, on log-normal lengths.

    python benchmarks/packing.py [--documents 1024] [--ranks 8]

Lengths have mean 200 and sigma 1, rows 2048 slots. The cost of attention is the square of a document's length.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rows import median, row

from forge_hpc.data.packing import PackedBatch, pack
from forge_hpc.data.types import Document

SEQ_LEN = 2048
SEEDS = range(5)


def documents(num: int, seed: int) -> list[Document]:
    lengths = np.random.default_rng(seed).lognormal(np.log(200) - 0.5, 1.0, num).clip(1, SEQ_LEN).astype(int)
    return [Document(np.zeros(n + 1, np.int32), np.ones(n + 1, bool), None, 1.0) for n in lengths]


def imbalance(batch: PackedBatch, num_ranks: int) -> float:
    """How much more than the mean the costliest rank has."""
    costs = np.zeros(num_ranks)
    for number, ids in enumerate(batch.rows(0, batch.num_rows)["segment_ids"]):
        costs[number % num_ranks] += (np.bincount(ids)[1:].astype(float) ** 2).sum()
    return float(costs.max() / costs.mean() - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    seconds, fills, plain, dealt = [], [], [], []
    for seed in SEEDS:
        batch = documents(args.documents, seed)
        fills.append(pack(batch, SEQ_LEN).fill)
        plain.append(imbalance(pack(batch, SEQ_LEN, num_rows_multiple=args.ranks), args.ranks))
        start = time.perf_counter()
        packed = pack(batch, SEQ_LEN, num_rows_multiple=args.ranks, num_ranks=args.ranks)
        seconds.append(time.perf_counter() - start)
        dealt.append(imbalance(packed, args.ranks))
    what = f"{args.documents} documents of log-normal length"
    row(f"fill, {what}", median(fills), target=0.97)
    row(f"imbalance of attention, {args.ranks} ranks, {what}", max(dealt), target=0.03, better="less",
        note=f"{max(plain):.3f} where rows are dealt as they come")  # fmt: skip
    row("packing them", 1e3 * median(seconds), unit="ms")


if __name__ == "__main__":
    main()
