"""A game of textarena for one player."""

from __future__ import annotations

from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Response, Step


class TextArena:
    """One game of ``textarena.make(game)``, drawn from the prompt's seed. Its reward comes with its end.

    Args:
        game: its name: ``GuessTheNumber-v0``, ``Wordle-v0``, …
        config: keyword arguments of ``textarena.make``.
    """

    def __init__(self, game: str, config: dict[str, Any] | None = None) -> None:
        try:
            import textarena
        except ImportError as error:
            raise UserError(
                f"textarena cannot be imported: {error}",
                "pip install textarena, here or in a virtual environment that environment.venv names",
            ) from None
        try:
            self._game = textarena.make(game, **(config or {}))
        except ValueError as error:
            raise UserError(f"textarena has no game {game!r}: {error}", "args: {game: GuessTheNumber-v0}") from None

    async def reset(self, prompt: Prompt) -> str:
        self._game.reset(num_players=1, seed=prompt.seed)
        return self._observation()

    async def step(self, response: Response) -> Step:
        done, _ = self._game.step(action=str(response))
        if not done:
            return Step(self._observation(), reward=None)
        rewards, about = self._game.close()
        reason = {name: str(value) for name, value in about.get(0, {}).items()}
        return Step(reward=float(rewards[0]), done=True, info=reason)

    async def close(self) -> None:
        pass

    def _observation(self) -> str:
        _, observation = self._game.get_observation()
        return observation if isinstance(observation, str) else "\n".join(text for _, text, *_ in observation)
