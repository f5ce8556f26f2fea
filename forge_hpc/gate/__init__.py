"""The node gate: what is looked at on every node before engines and trainers start (docs/gate.md).

    node's supervisor   own ─► its report in node-N         (disk, memory, clock, GPUs, orphans, environment)
                        sandboxes ─► in there, too          (where the run executes what a model wrote)
    a process beside it neighbours ─► pace-N                (a matrix product, an all-reduce with the next node)
    first node          verdict: which nodes are not fit ─► left out, or the job is requeued without them
                        gpus: which have other GPUs ─► said; left out where there are spare nodes

A node that cannot write its report tells the first one over TCP (``complaints``).
"""
