"""The configuration of a run: typed dataclasses, one documented field each.

Names follow TorchTitan (``trainer.*``) and vLLM (``generator.engine.*``, ``rollout.sampling.*``), so that their
documentation applies. Nothing here imports torch: a dry run must answer in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    path: str = "builtin:qwen3-tiny"
    """A Hugging Face model: hub name, directory, ``builtin:qwen3-tiny`` (random weights from the seed), or
    ``warmstart`` for the export of the run in RUN_DIR/warmstart (made first from ``warmstart.config``)."""
    dtype: str = "bfloat16"
    """dtype of the generator's weights and of the export: float32 or bfloat16."""


@dataclass
class DataConfig:
    path: str = "builtin:addition"
    """``builtin:addition``, a JSONL file, or a name for ``datasets.load_dataset`` (for example openai/gsm8k)."""
    name: str | None = None
    """The dataset's configuration name, where it has several (gsm8k: main)."""
    split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Held-out split for evaluation."""
    eval_path: str | None = None
    """Where the held-out prompts come from, if not from ``path``."""
    prompt_field: str = "question"
    """Field that holds the prompt."""
    target_field: str = "answer"
    """Field that holds the reference answer; SFT learns it, rewards compare with it."""
    system_prompt: str | None = None
    """System message put before each prompt; needs a tokenizer with a chat template."""
    chat_template: bool = True
    """Render prompts through the tokenizer's chat template; false feeds the raw text."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the chat template (Qwen3: ``enable_thinking: false``)."""
    shuffle: bool = True
    """Draw examples in a seeded order, a new one every epoch."""


@dataclass
class RewardConfig:
    name: str = "exact"
    """A built-in reward (``exact``, ``math``, ``gsm8k``), or ``package.module:function`` / ``file.py:function``."""
    weight: float = 1.0
    """Factor in the weighted sum of all rewards."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments handed to the reward."""
    timeout_s: float = 10.0
    """A call that takes longer is given up; its episode is counted and left out."""


@dataclass
class EnvironmentConfig:
    name: str | None = None
    """What the policy talks with over several turns: ``calculator``, ``guessing``, ``code``, or your own class as
    ``package.module:Class`` / ``file.py:Class`` (docs/environments.md); null is one completion a prompt."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments handed to the class."""
    max_turns: int = 8
    """An episode ends after this many responses of the policy at the latest."""
    max_turn_tokens: int | None = None
    """A single response ends here at the latest; by default only ``rollout.max_response_tokens`` bounds it, which holds
    for a whole episode: all responses and observations together."""
    timeout_s: float = 60.0
    """Seconds that the environment may take over an episode, all its calls together, generation not counted; an episode
    that takes longer is given up, counted and left out."""


@dataclass
class AlgorithmConfig:
    loss: str = "grpo"
    """Policy loss (grpo, reinforce)."""
    advantage: str = "group_mean_std"
    """How rewards of a group become advantages (group_mean_std, group_mean, leave_one_out)."""
    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL penalty against the reference model (needs ``reference.enable``)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    drop_zero_signal_groups: bool = True
    """Leave groups whose rewards are all equal out of training: their advantages are zero."""
    max_steps_without_signal: int = 20
    """Fail after this many consecutive steps in which no group carried a signal."""


@dataclass
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling; values below 1 make the generator's log-probabilities differ from the trainer's."""
    top_k: int = -1
    """Sample among the k most likely tokens; -1 is all."""


@dataclass
class RolloutConfig:
    group_size: int = 8
    """Completions sampled for each prompt."""
    prompts_per_step: int = 32
    """Prompts (groups) that one optimizer step trains on."""
    max_prompt_tokens: int = 512
    """Prompts longer than this are left out and counted."""
    max_response_tokens: int = 1024
    """Completions end here at the latest; with an environment, whole episodes, observations included."""
    max_staleness: int = 0
    """Largest number of optimizer steps between the policy that began an episode and the one that trains on it.
    0 is synchronous and repeats exactly under one seed."""
    sync_interval: int = 1
    """Publish new weights to the generators every so many optimizer steps."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class EngineConfig:
    tensor_parallel_size: int = 1
    """GPUs of one generator replica."""
    max_model_len: int | None = None
    """Longest sequence; by default prompt and response limits together."""
    max_num_seqs: int = 256
    """Sequences decoded at once."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that vLLM takes."""
    enforce_eager: bool = False
    """No CUDA graphs. Always the case on the CPU."""
    kv_cache_memory_gib: float = 1.0
    """Size of the KV cache on the CPU, in GiB; on CUDA gpu_memory_utilization decides."""
    enable_prefix_caching: bool = True
    """Share the prompt's KV cache in a group."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``vllm.EngineArgs``."""


@dataclass
class GeneratorConfig:
    replicas: int | None = None
    """Independent vLLM engines; by default as many as the rollout nodes' GPUs hold (one a node on the CPU)."""
    timeout_s: float = 1800.0
    """A request that takes longer than this has a stuck generator."""
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class OptimizerConfig:
    name: str = "AdamW"
    """AdamW or Adam."""
    lr: float = 1e-6
    """Peak learning rate."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.95
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass
class LRSchedulerConfig:
    warmup_steps: int = 0
    """Linear warm-up over this many steps."""
    decay_ratio: float | None = None
    """Share of all steps over which the rate decays at the end; null keeps it constant after warm-up."""
    decay_type: str = "linear"
    """linear, sqrt or cosine."""
    min_lr_factor: float = 0.0
    """The rate ends at this share of the peak."""


@dataclass
class TrainingConfig:
    steps: int = 100
    """Optimizer steps of the whole run."""
    seq_len: int = 2048
    """Slots of a packed row; at least prompt and response limits together."""
    local_batch_size: int = 1
    """Rows of one microbatch on each data-parallel rank; gradients accumulate over the microbatches of a step."""
    global_batch_size: int = 32
    """SFT only: examples of one optimizer step (GRPO takes rollout.prompts_per_step * rollout.group_size episodes)."""
    max_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    dtype: str = "float32"
    """dtype of the master weights and the optimizer's state."""
    mixed_precision_param: str = "bfloat16"
    """dtype of the forward and backward pass; float32 on the CPU."""


@dataclass
class ParallelismConfig:
    data_parallel_replicate_degree: int = 1
    """Replicas of the sharded model (HSDP)."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the model (FSDP); -1 takes all that the other degrees leave."""
    tensor_parallel_degree: int = 1
    """Ranks that share each matrix."""
    expert_parallel_degree: int = 1
    """Ranks that share the experts of an MoE model."""


@dataclass
class ActivationCheckpointConfig:
    mode: str = "none"
    """none, selective or full."""


@dataclass
class CompileConfig:
    enable: bool = False
    """torch.compile each transformer block."""


@dataclass
class TrainerConfig:
    processes_per_node: int | None = None
    """Trainer ranks on each trainer node; by default its GPUs, one on the CPU."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    timeout_s: float = 1800.0
    """A training step that takes longer than this has a stuck rank."""


@dataclass
class ReferenceConfig:
    enable: bool = False
    """Hold a frozen copy of the initial model for the KL penalty."""
    device: str = "auto"
    """Where it computes: auto (with the trainers), cpu or cuda."""


@dataclass
class CheckpointConfig:
    interval: int = 50
    """Save every so many optimizer steps; the last step is always saved, 0 saves it alone."""
    keep: int = 2
    """Newest checkpoints to keep; older ones are deleted."""
    async_save: bool = True
    """Write beside the training instead of blocking it."""


@dataclass
class EvaluationConfig:
    interval: int = 0
    """Greedy accuracy on held-out prompts every so many steps; 0 evaluates only at the end."""
    num_prompts: int = 0
    """Held-out prompts of an evaluation; 0 switches evaluation off."""


@dataclass
class WarmstartConfig:
    config: str | None = None
    """SFT configuration (file, relative to this one) run first, in RUN_DIR/warmstart, where its export is missing."""
    overrides: list[str] = field(default_factory=list)
    """key=value overrides of it."""


@dataclass
class ClusterConfig:
    nodes: int = 1
    """Nodes of the allocation; more than 1 means Slurm."""
    rollout_nodes: int | None = None
    """Nodes for generators; by default what trainer_nodes leaves, else rollout_ratio decides."""
    trainer_nodes: int | None = None
    """Nodes for trainers; by default what rollout_nodes leaves."""
    rollout_ratio: float = 0.5
    """Share of the nodes (of the GPUs on one node) that generate, where no number is given."""
    spare_nodes: int = 0
    """Nodes kept to replace lost rollout nodes."""
    max_restarts: int = 3
    """How often something that failed (a generator, the trainers, the whole run) is started again without progress in
    between; being preempted is no failure."""
    gpus_per_node: int | None = None
    """GPUs used on each node; 0 is the CPU; by default what the node has."""
    start_timeout_s: float = 600.0
    """All nodes must have joined, and all actors be ready, in this time."""


@dataclass
class SlurmConfig:
    partition: str | None = None
    """Partition; the cluster's default where it is null."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    time: str = "24:00:00"
    """Walltime limit, in Slurm's notation."""
    constraint: str | None = None
    """Node features asked for."""
    exclusive: bool = True
    """Whole nodes. Sharing a node with other users opens ports that TLS cannot cover: see the README."""
    cpus_per_task: int | None = None
    """CPU cores on each node; with exclusive, all of them."""
    mem: str | None = None
    """Memory on each node; 0 is all of it."""
    signal_lead_s: int | None = None
    """Seconds before the walltime at which the run saves and leaves. By default it follows from the step and save times
    that the run has measured: 300 before that, and never more than half of ``time``."""
    requeue: bool = True
    """Let Slurm start the job again after a preemption or a lost node."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on each node first (module load …)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further sbatch options, name: value."""


@dataclass
class LoggingConfig:
    console: str = "auto"
    """auto (progress bar on a terminal, one line a step elsewhere), lines, or none."""
    tensorboard: bool = True
    """Write event files to RUN_DIR/tensorboard."""
    wandb: bool = False
    """Send the metrics to Weights & Biases as well (offline where WANDB_MODE says so)."""
    num_rollouts_per_step: int = 2
    """Rollouts of each step kept in rollouts.jsonl."""


@dataclass
class Config:
    """A whole run. ``key=value`` overrides use these names: ``trainer.optimizer.lr=1e-6``."""

    recipe: str = "grpo"
    """Controller loop: grpo or sft."""
    name: str = "grpo"
    """Name of the run; a part of the default run directory and the Slurm job's name."""
    seed: int = 42
    """Everything random follows from this."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
