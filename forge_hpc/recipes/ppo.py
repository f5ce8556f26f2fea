"""PPO with a critic (https://arxiv.org/abs/1707.06347), advantages by GAE (https://arxiv.org/abs/1506.02438).

    prompts ──► generators ──► rewards ──► critic ──► advantages ──► critic, policy ──► weights ──► generators

    delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lambda A_{t+1}      R_t = A_t + V_t

V_t is what the critic, a model of the policy's architecture with one number a token in place of the vocabulary, expects
before token t of the answer; the reward is that of the last token. The policy is trained with ``algorithm.loss`` on A,
brought to mean 0 and variance 1 over the step, the critic on (V - R)^2 / 2; each takes as many optimizer steps as
``algorithm.minibatches`` and ``epochs`` say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from forge_hpc.config import Config
from forge_hpc.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, setting
from forge_hpc.config.needs import POLICY, REFERENCE, ModelNeed, Needs
from forge_hpc.recipes.base import Recipe, Session

if TYPE_CHECKING:
    from forge_hpc.data.types import Document

CRITIC = "critic"


@dataclass
class PPOArgs:
    gamma: float = setting(1.0, SHARE)
    """Discount of a token's return by each token that follows."""
    lam: float = setting(0.95, SHARE)
    """Lambda of GAE: 1 has no bias by the critic, 0 no variance by what follows."""
    critic_lr: float = setting(1e-3, POSITIVE)
    """Peak learning rate of the critic; the schedule is the policy's."""
    warmup_steps: int = setting(5, NOT_NEGATIVE)
    """First steps in which the critic alone learns."""


class PPO(Recipe):
    """Trains a policy and a critic ``trainer.training.steps`` steps. Any ``rollout.group_size`` will do, 1 too: nothing
    is compared within a group."""

    Args: ClassVar[type] = PPOArgs

    def needs(self, config: Config) -> Needs:
        """The policy, the critic, and for a KL penalty the frozen model that the policy starts from."""
        models = {POLICY: ModelNeed(), CRITIC: ModelNeed(head="value", lr=self.args.critic_lr)}
        if config.reference.enable:
            models[REFERENCE] = ModelNeed(trained=False, offload=config.reference.device == "cpu")
        return Needs(models, columns=("advantages", "returns"))

    async def run(self, session: Session) -> None:
        """The loop."""
        from forge_hpc.rollouts.documents import to_document
        from forge_hpc.rollouts.figures import measure

        await session.start()
        await session.evaluate(session.step)
        async with session.rollouts() as rollouts:
            for step in session.remaining_steps():
                groups = await rollouts.take()
                metrics = measure(groups, step)
                episodes = [episode for group in groups for episode in group.episodes]
                documents = [to_document(episode) for episode in episodes]
                values = await session.trainers.values(documents, model=CRITIC)
                self.compare(documents, [episode.reward for episode in episodes], values)
                metrics |= await session.train_step(step, documents, model=CRITIC)
                metrics |= await session.train_step(step, documents, update=step > self.args.warmup_steps)
                await session.publish(step)
                await session.end_step(step, metrics | rollouts.metrics(), rollouts.state_dict(), groups)
                await session.evaluate(step)
        await session.finish()

    def compare(self, documents: Sequence[Document], rewards: Sequence[float], values: Sequence[np.ndarray]) -> None:
        """Give each document its columns ``returns`` and ``advantages``."""
        found = []
        for document, reward, value in zip(documents, rewards, values, strict=True):
            tokens = np.flatnonzero(document.loss_mask)
            earned = np.zeros(len(tokens))
            earned[-1:] = reward
            advantages, returns = gae(earned, value[tokens].astype(np.float64), self.args.gamma, self.args.lam)
            column = document.columns["returns"] = np.zeros(len(value), np.float32)
            column[tokens] = returns
            found.append((document, tokens, advantages))
        every = np.concatenate([advantages for _, _, advantages in found])
        for document, tokens, advantages in found:
            column = document.columns["advantages"] = np.zeros(len(document.token_ids), np.float32)
            column[tokens] = (advantages - every.mean()) / (every.std() + 1e-8)


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of an episode: [L] each, from [L] rewards and [L] values of what stands before each."""
    advantages, following, after = np.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * following - values[t]
        advantages[t] = after = delta + gamma * lam * after
        following = values[t]
    return advantages, advantages + values
