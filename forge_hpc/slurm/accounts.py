"""Whom a user may charge, and with which quality of service, by `sacctmgr` and `scontrol`."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forge_hpc.config import Config, UserError
from forge_hpc.slurm.client import SlurmRefused, ask


@dataclass(frozen=True)
class Association:
    """One of a user's accounts, perhaps on one partition alone."""

    account: str
    partition: str
    """Empty: on all."""
    qos: frozenset[str]
    """Empty: not said."""


def associations() -> list[Association]:
    """Those of this user; [] where there is no accounting, no `sacctmgr`, or it does not answer."""
    user = pwd.getpwuid(os.getuid()).pw_name
    query = ("show", "associations", f"user={user}", "format=account,partition,qos")
    try:
        answer = ask("sacctmgr", "--noheader", "--parsable2", "--readonly", *query)
    except SlurmRefused:
        return []
    rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 2]
    return [Association(row[0], row[1], frozenset(filter(None, row[2].split(",")))) for row in rows]


def check_account(cfg: Config, partitions: Sequence[str]) -> None:
    """Raise a UserError if the job's account or QOS is none of this user's, or none of its partitions takes it.

    Args:
        partitions: names of those that the job asks for.
    """
    account, qos = cfg.slurm.account, cfg.slurm.qos
    if account is None and qos is None:
        return
    mine = associations()
    if mine and account is not None and account not in {each.account for each in mine}:
        raise UserError(
            f"slurm.account: {account} is none of your accounts", f"yours: {_listed(a.account for a in mine)}"
        )
    fitting = [each for each in mine if account in (None, each.account)]
    allowed = {name for each in fitting for name in each.qos}
    if qos is not None and allowed and qos not in allowed:
        of = f" with account {account}" if account else ""
        raise UserError(f"slurm.qos: you have no QOS {qos}{of}", f"you have: {_listed(allowed)}")
    reasons = [_closed(name, account, qos) for name in partitions]
    if reasons and all(reasons):
        raise next(reason for reason in reasons if reason)


def _closed(partition: str, account: str | None, qos: str | None) -> UserError | None:
    try:
        said = ask("scontrol", "--oneliner", "show", "partition", partition)
    except SlurmRefused:
        return None
    facts = dict(pair.split("=", 1) for pair in said.split() if "=" in pair)
    for key, what, mine in (("Accounts", "account", account), ("Qos", "qos", qos)):
        allowed, denied = facts.get(f"Allow{key}", "ALL"), facts.get(f"Deny{key}", "")
        if mine is not None and allowed != "ALL" and mine not in allowed.split(","):
            return UserError(f"partition {partition} does not take slurm.{what}={mine}", f"it takes: {allowed}")
        if mine is not None and mine in denied.split(","):
            return UserError(
                f"partition {partition} does not take slurm.{what}={mine}",
                f"set another slurm.{what} or slurm.partition",
            )
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
