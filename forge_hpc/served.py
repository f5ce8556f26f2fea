"""Where the models of ``served`` answer, for the code of rewards, environments and agents, on whichever node it runs.

    import openai
    from forge_hpc.served import served

    judge = served("judge")
    http = openai.DefaultHttpxClient(verify=judge.tls, trust_env=False)
    client = openai.OpenAI(base_url=judge.base_url, api_key=judge.api_key, http_client=http)
    client.chat.completions.create(model="judge", messages=[...])

The controller has the addresses in its environment, and every worker process gets them with the first thing that it is
asked (``workers.pool``).
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass

from forge_hpc.config.errors import UserError

PREFIX = "FORGE_HPC_SERVED_"


@dataclass(frozen=True)
class Served:
    """The address of a served model."""

    base_url: str
    """Up to the version: ``http://127.0.0.1:4711/v1``; https where workers are on other nodes too."""
    api_key: str

    @property
    def tls(self) -> ssl.SSLContext:
        """What verifies the address where it is https: the job's own authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if (ca := os.environ.get("HYPERACTOR_TLS_CA")) is not None:
            context.load_verify_locations(ca)
        return context


def served(name: str) -> Served:
    """The served model of that name. Raises UserError where the run has none, or this is no process of a run."""
    try:
        return Served(*(os.environ[variable] for variable in _variables(name)))
    except KeyError:
        raise UserError(
            f"no model {name!r} is served here",
            "a run serves those of `served`, to its rewards, environments and agents",
        ) from None


def announce(name: str, where: Served) -> None:
    """Have this process, and those that it starts, find a served model."""
    os.environ.update(zip(_variables(name), (where.base_url, where.api_key), strict=True))


def withdraw(name: str) -> None:
    """Have nobody find it from here on."""
    for variable in _variables(name):
        os.environ.pop(variable, None)


def announced() -> dict[str, str]:
    """The variables of all served models, for a process that does not inherit them."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def _variables(name: str) -> tuple[str, str]:
    return f"{PREFIX}{name.upper()}_URL", f"{PREFIX}{name.upper()}_KEY"
