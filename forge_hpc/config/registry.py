"""What a configuration knows by name: one table a kind, from a name to its place, ``module:attribute``.

Nothing here is imported from its place before it is used, so that a dry run loads no torch. Something new is a file of
its own and a line here.
"""

from __future__ import annotations

RECIPES = {
    "grpo": "forge_hpc.recipes.grpo:GRPO",
    "sft": "forge_hpc.recipes.sft:SFT",
    "eval": "forge_hpc.recipes.eval:Evaluation",
    "ppo": "forge_hpc.recipes.ppo:PPO",
    "dpo": "forge_hpc.recipes.dpo:DPO",
    "kto": "forge_hpc.recipes.kto:KTO",
    "reward_model": "forge_hpc.recipes.reward_model:RewardModel",
    "online_dpo": "forge_hpc.recipes.online_dpo:OnlineDPO",
    "distillation": "forge_hpc.recipes.distillation:Distillation",
    "best_of_n": "forge_hpc.recipes.best_of_n:BestOfN",
}
LOSSES = {
    "grpo": "forge_hpc.losses.grpo:GRPOLoss",
    "dr_grpo": "forge_hpc.losses.dr_grpo:DrGRPOLoss",
    "dapo": "forge_hpc.losses.dapo:DAPOLoss",
    "ppo": "forge_hpc.losses.ppo:PPOLoss",
    "cispo": "forge_hpc.losses.cispo:CISPOLoss",
    "gspo": "forge_hpc.losses.gspo:GSPOLoss",
    "gmpo": "forge_hpc.losses.gmpo:GMPOLoss",
    "luspo": "forge_hpc.losses.luspo:LUSPOLoss",
    "vespo": "forge_hpc.losses.vespo:VESPOLoss",
    "dppo": "forge_hpc.losses.dppo:DPPOLoss",
    "sapo": "forge_hpc.losses.sapo:SAPOLoss",
    "rloo": "forge_hpc.losses.rloo:RLOOLoss",
    "reinforce": "forge_hpc.losses.reinforce:ReinforceLoss",
    "simple_grpo": "forge_hpc.losses.simple_grpo:SimpleGRPOLoss",
}
ADVANTAGES = {
    "group_mean_std": "forge_hpc.advantages:group_mean_std",
    "group_mean": "forge_hpc.advantages:group_mean",
    "group_mean_mean": "forge_hpc.advantages:group_mean_mean",
    "leave_one_out": "forge_hpc.advantages:leave_one_out",
    "group_mean_batch_std": "forge_hpc.advantages:group_mean_batch_std",
    "batch_mean_std": "forge_hpc.advantages:batch_mean_std",
    "gdpo": "forge_hpc.advantages:gdpo",
}
KL_ESTIMATORS = {"k1": "forge_hpc.losses.kl:k1", "k2": "forge_hpc.losses.kl:k2", "k3": "forge_hpc.losses.kl:k3"}
REWARDS = {
    "exact": "forge_hpc.rewards.exact:ExactReward",
    "math": "forge_hpc.rewards.math:MathReward",
    "numeric": "forge_hpc.rewards.numeric:NumericReward",
    "gsm8k": "forge_hpc.rewards.numeric:NumericReward",
    "thinking": "forge_hpc.rewards.thinking:ThinkingReward",
    "format": "forge_hpc.rewards.format:FormatReward",
    "length": "forge_hpc.rewards.length:LengthReward",
    "repetition": "forge_hpc.rewards.repetition:RepetitionReward",
    "code": "forge_hpc.rewards.code:CodeReward",
    "llm_judge": "forge_hpc.rewards.judge:LLMJudgeReward",
    "model": "forge_hpc.rewards.model:ModelReward",
}
ENVIRONMENTS = {
    "calculator": "forge_hpc.environments.calculator:Calculator",
    "guessing": "forge_hpc.environments.guessing:Guessing",
    "code": "forge_hpc.environments.code:Code",
    "reasoning_gym": "forge_hpc.environments.reasoning_gym:ReasoningGym",
    "skyrl_gym": "forge_hpc.environments.skyrl_gym:SkyRLGym",
    "textarena": "forge_hpc.environments.textarena:TextArena",
}
MODELS = {
    "builtin:qwen3-tiny": "forge_hpc.data.builtin:write_tiny_qwen3",
    "builtin:qwen3-tiny-chat": "forge_hpc.data.builtin_tools:write_tiny_chat_qwen3",
    "builtin:qwen3-small": "forge_hpc.data.builtin:write_small_qwen3",
}
"""Functions ``(directory, seed)`` that write one in Hugging Face format."""
DATA = {
    "builtin:addition": "forge_hpc.data.builtin:addition_examples",
    "builtin:addition-pairs": "forge_hpc.data.builtin:addition_pairs",
    "builtin:addition-labels": "forge_hpc.data.builtin:addition_labels",
    "builtin:calculator": "forge_hpc.data.builtin_tools:calculator_examples",
}
"""Functions ``(split, seed)`` that give its examples."""

# Names that are values, not code.
MISMATCH_LEVELS = ("token", "sequence")
NORMALIZATIONS = ("token", "sequence", "constant")
LORA_LAYERS = {
    "wq": ("q_proj",),
    "wkv": ("k_proj", "v_proj"),
    "wo": ("o_proj",),
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
}
"""By TorchTitan's name of a linear layer those of Hugging Face."""
LORA_TARGETS = tuple(LORA_LAYERS)
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM 0.32 can be built for."""
DTYPES = ("float32", "bfloat16")
