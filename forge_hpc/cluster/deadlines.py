"""How long processes may take to start: the controller gives them up before Monarch does, to have their stacks."""

SPAWN_S = 60.0
"""A process starts on a node within this time, or the node is lost."""
GIVEN_UP_S = 80
"""Then Monarch ends what has not started, on its node, and gives it up: after ``SPAWN_S`` and the stacks of that.
Whatever this is, Monarch 0.7 takes no process for started that has begun to run after 30 s."""
