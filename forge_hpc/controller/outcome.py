"""How a run has ended, as the controller tells the supervisors: ``outcome.json`` of the rendezvous."""

from __future__ import annotations

import asyncio
import errno
import logging
import traceback
from collections.abc import Awaitable, Mapping
from typing import Any

from forge_hpc.actors.errors import ForeignError
from forge_hpc.cluster.given_gpus import UnusableGpus
from forge_hpc.cluster.hangs import write_stacks
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import UserError
from forge_hpc.config.errors import EXIT_USAGE
from forge_hpc.controller.recovery import Leave
from forge_hpc.controller.service import ActorLost, cause_of, is_loss
from forge_hpc.supervisor.ending import ControllerExit

logger = logging.getLogger("forge_hpc.controller")
MAX_MESSAGE = 1000
OUT_OF_MEMORY = (
    "a trainer takes less with trainer.training.local_batch_size=1, or trainer.activation_checkpoint.mode=full; "
    "`forge-hpc plan` shows what a GPU is to hold"
)


async def outcome_of(control: Awaitable[bool], leave: Leave) -> dict[str, Any]:
    """How a run has ended: what is published as ``outcome``. Its ``code`` is a `ControllerExit`; ``exit`` is there
    where the run's exit code is to be another than that of its state."""
    done, outcome = False, dict[str, Any](code=ControllerExit.DONE, message="")
    try:
        done = await control
    except asyncio.CancelledError as error:
        logger.info("stopped:\n%s", "".join(traceback.format_exception(error)))
        outcome = {"code": ControllerExit.STOPPED, "message": "stopped"}
    except BaseException as error:
        cause = cause_of(error)
        logger.error("the run failed:\n%s", "".join(traceback.format_exception(error)))
        if isinstance(cause, UserError):
            outcome = {"code": ControllerExit.FAILED, "message": cause.message, "hint": cause.hint}
            if isinstance(cause, UnusableGpus):
                outcome["exit"] = EXIT_USAGE
        else:
            message = str(cause) if isinstance(cause, ActorLost | ForeignError) else f"{type(cause).__name__}: {cause}"
            if isinstance(cause, TimeoutError):
                message += await write_stacks(message)
            outcome = {
                "code": ControllerExit.FAILED,
                "message": " ".join(message.split())[:MAX_MESSAGE],
                "is_loss": is_loss(error) or is_disk_trouble(cause),
            }
            kind = type(cause)
            if f"{kind.__module__}.{kind.__qualname__}" == "torch.OutOfMemoryError":  # torch is not imported here
                outcome["hint"] = OUT_OF_MEMORY
    if (departure := leave.departure) is not None and not done:
        outcome = {"code": ControllerExit.LEFT, "message": departure.message, "cause": departure.cause}
        outcome["lost_nodes"] = list(departure.lost_nodes)
    return outcome


def tell(rendezvous: Rendezvous, outcome: Mapping[str, Any]) -> None:
    """Leave the outcome for the supervisors."""
    try:
        rendezvous.publish("outcome", outcome)
    except OSError as error:  # the supervisor knows our exit code, and that it was asked to see that we leave
        logger.error("outcome %s cannot be told: %s", outcome, error)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether a file system failed in a way that another start may not meet: full, gone, or read-only."""
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT, errno.EREMOTEIO}
    return isinstance(error, OSError) and error.errno in codes
