"""An environment of skyrl-gym, as it is registered there."""

from __future__ import annotations

from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Opening, Response, Step


class SkyRLGym:
    """One episode of ``skyrl_gym.make(env)``. Its ``extras`` are the fields of the example, and the target as
    ``reward_spec.ground_truth`` unless the example has a ``reward_spec`` of its own.

    Args:
        env: the name under which it is registered: ``gsm8k``, ``search``, …
        config: its ``env_config``.
    """

    def __init__(self, env: str, config: dict[str, Any] | None = None) -> None:
        try:
            import skyrl_gym
            from omegaconf import OmegaConf
        except ImportError as error:
            raise UserError(
                f"skyrl-gym cannot be imported: {error}",
                "pip install skyrl-gym, here or in a virtual environment that environment.venv names",
            ) from None
        known = sorted(skyrl_gym.envs.registration.registry)
        if env not in known:
            raise UserError(f"skyrl-gym has no environment {env!r}", f"it has {', '.join(known)}")
        self._make, self._env, self._config = skyrl_gym.make, env, OmegaConf.create(config or {})

    async def reset(self, prompt: Prompt) -> Opening:
        spec = {"method": "rule", "ground_truth": prompt.target}
        self._game = self._make(
            self._env, env_config=self._config, extras={"reward_spec": spec, "data_source": self._env, **prompt.fields}
        )
        opening, _ = self._game.init([{"role": "user", "content": prompt.question}])
        return [{"role": message["role"], "content": message["content"]} for message in opening]

    async def step(self, response: Response) -> Step:
        made = self._game.step(str(response))
        said = made["observations"]
        role = said[0]["role"] if said else "user"
        text = "\n".join(message["content"] for message in said)
        info = {name: value for name, value in made["metadata"].items() if isinstance(value, str | int | float | bool)}
        return Step(text, float(made["reward"]), bool(made["done"]), info, role)

    async def close(self) -> None:
        if hasattr(self, "_game"):
            self._game.close()
