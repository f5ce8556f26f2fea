"""Generators that other jobs lend to a running run (``forge-hpc join``, docs/join.md).

    a lent node                        first node of the run                      controller
    ask-NAME (key, names, report) ───► desk: judges, signs ──► answer-NAME
                                             └────────────────► lent-N ─────────► attaches, starts generators
    its Monarch worker ──────────────────────────────────────► worker-N ────────►    └► the run's pool
    told to leave ───────────────────────────────────────────► lent-N-leaving ──► gives its requests to the others
                                                               lent-N-over  ◄──── nothing of it is used any more

door      where a start of the run takes asks, and what those records hold
lifeline  a connection by which the controller knows at once that a node has gone
desk      the first node's supervisor: who is let in
node      the supervisor of a lent node
command   from a command line to a queued job
jobs      the jobs that lend, for those who look at the run

All records are of one start of the run and lie in its rendezvous. When the run comes back everybody begins anew.
"""
