"""Ends processes of a role that nothing else ends soon.

Ranks that wait in a collective for one that is dead answer no call, and to end them in good order Monarch takes up to
twenty seconds. So an actor of its own stands beside each role's actor, with a queue of its own.
"""

from __future__ import annotations

import os

from monarch.actor import Actor, endpoint


class Ender(Actor):
    """Lives in a process of a role."""

    @endpoint
    async def end(self) -> None:
        """End the process at once, with what it has begun. Nothing is answered."""
        os._exit(1)
