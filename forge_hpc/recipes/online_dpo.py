"""Online DPO: direct preference optimization (https://arxiv.org/abs/2305.18290) on pairs that the policy itself sampled
(https://arxiv.org/abs/2402.04792): of the answers to each prompt the best and the worst by reward.

    prompts ──► generators ──► rewards ──► pairs ──► reference ──► policy ──► weights ──► generators

    loss = -log sigmoid( beta (log pi(y+) - log ref(y+)) - beta (log pi(y-) - log ref(y-)) ), over pairs

or with ``loss: ipo`` the squared distance of the margin to 1/(2 beta) (https://arxiv.org/abs/2310.12036). The reference
is the frozen model that the policy starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from forge_hpc.config import Config, UserError
from forge_hpc.config.fields import POSITIVE, setting
from forge_hpc.config.needs import POLICY, REFERENCE, ModelNeed, Needs
from forge_hpc.recipes.base import Recipe, Session

if TYPE_CHECKING:
    from forge_hpc.data.types import Document, Group

LOSSES = {"dpo": "forge_hpc.losses.dpo:DPOLoss", "ipo": "forge_hpc.losses.dpo:IPOLoss"}


@dataclass
class OnlineDPOArgs:
    beta: float = setting(0.1, POSITIVE)
    """How strongly the policy is held to the reference."""
    loss: str = setting("dpo", choices=LOSSES)
    """dpo or ipo."""


class OnlineDPO(Recipe):
    """Trains ``trainer.training.steps`` steps, each on a pair of every group, of ``rollout.prompts_per_step``, whose
    rewards differ."""

    Args: ClassVar[type] = OnlineDPOArgs

    def needs(self, config: Config) -> Needs:
        """The policy with a loss on pairs, and the reference."""
        if self.args.loss not in LOSSES:
            raise UserError(f"recipe_args.loss is {self.args.loss!r}", f"known: {', '.join(LOSSES)}")
        reference = ModelNeed(trained=False, offload=config.reference.device == "cpu")
        loss_args = {"beta": self.args.beta}
        models = {POLICY: ModelNeed(loss=LOSSES[self.args.loss], loss_args=loss_args), REFERENCE: reference}
        return Needs(models, columns=("side",))

    def check(self, config: Config) -> None:
        """A pair takes two answers."""
        if (size := config.rollout.group_size) < 2:
            raise UserError(f"a pair takes two answers, and rollout.group_size is {size}", "set it to 2 or more")
        longest = 2 * (config.rollout.max_prompt_tokens + config.rollout.max_response_tokens - 1)
        if (seq_len := config.trainer.training.seq_len) < longest:
            raise UserError(
                f"a pair takes up to {longest} tokens of one row, and trainer.training.seq_len is {seq_len}",
                f"set it to {longest}, or lower rollout.max_prompt_tokens or rollout.max_response_tokens",
            )

    async def run(self, session: Session) -> None:
        """The loop."""
        from forge_hpc.rollouts.checks import SignalWatch
        from forge_hpc.rollouts.figures import measure
        from forge_hpc.rollouts.groups import has_signal

        signal = SignalWatch(session.config, session.state)
        await session.start()
        await session.evaluate(session.step)
        async with session.rollouts() as rollouts:
            for step in session.remaining_steps():
                groups = await rollouts.take()
                metrics = measure(groups, step)
                pairs = [document for group in groups if has_signal(group) for document in pair(group)]
                pairs = pairs or pair(next(group for group in groups if group.episodes))
                learns = signal.check(step, pairs, metrics)
                metrics |= await session.train_step(step, pairs, update=learns)
                await session.publish(step)
                metrics |= rollouts.metrics() | signal.metrics()
                await session.end_step(step, metrics, rollouts.state_dict() | signal.state_dict(), groups)
                await session.evaluate(step)
        await session.finish()


def pair(group: Group) -> list[Document]:
    """The best and the worst answer, which stand in one row; without an advantage where their rewards are equal."""
    from forge_hpc.rollouts.documents import to_document
    from forge_hpc.rollouts.groups import has_signal

    ordered = sorted(group.episodes, key=lambda episode: episode.reward)
    documents = [to_document(ordered[-1]), to_document(ordered[0])]
    for document, side in zip(documents, (1.0, -1.0), strict=True):
        document.group, document.columns["side"] = group.prompt.position, side
        document.advantage = side if has_signal(group) else 0.0
    return documents
