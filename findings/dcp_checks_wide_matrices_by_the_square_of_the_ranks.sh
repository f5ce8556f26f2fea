#!/usr/bin/env bash
# One would guess: what torch.distributed.checkpoint needs to check a save's plan grows with the number of shards, since
# the shards of a matrix are its rows in pieces, one a rank, whatever its shape. It sorts them along the matrix's largest
# dimension: pieces of rows of a matrix that has more columns than rows lie over each other there, and each is compared
# with every other one. FSDP cuts rows, and key, value and down projections are wide. Twice the ranks take four times as
# long: 3.1 s to plan one matrix for 4,096 of them on one core, where a tall one of as many elements takes 0.18 s.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "numpy>=2,<3"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'P'
import statistics, sys, time
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
print("expected: planning a save of one matrix takes as long for a wide one as for a tall one, cut into as many pieces of rows")


def plans(rows, columns, ranks):
    """What each rank would save: its rows."""
    size, found = rows // ranks, []
    for rank in range(ranks):
        first = torch.Size([rank * size, 0])
        piece = ChunkStorageMetadata(first, torch.Size([size, columns]))
        data = TensorWriteData(piece, TensorProperties(torch.float32), torch.Size([rows, columns]))
        found.append(SavePlan([WriteItem(MetadataIndex("w", first), WriteItemType.SHARD, tensor_data=data)], planner_data={}))
    return found


def seconds(rows, columns, ranks):
    took = []
    for _ in range(3):
        planner, each = DefaultSavePlanner(), plans(rows, columns, ranks)
        planner.set_up_planner({}, None, True)
        start = time.perf_counter()
        planner.create_global_plan(each)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


tall, wide = ([seconds(*shape, ranks) for ranks in (1024, 4096)] for shape in ((8192, 4096), (4096, 8192)))
print(f"seen: 8192 x 4096, 1,024 and 4,096 ranks: {tall[0]:.3f} and {tall[1]:.3f} s")
print(f"seen: 4096 x 8192, the same: {wide[0]:.3f} and {wide[1]:.3f} s, {wide[1] / tall[1]:.0f} times as long as tall for 4,096")
sys.exit(0 if wide[1] > 10 * tall[1] and wide[1] > 6 * wide[0] else 1)
P
