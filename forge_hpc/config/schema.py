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
class SourceConfig:
    """One source of a mixture. What is null is as in ``data``, but for ``name``."""

    path: str = ""
    """As ``data.path``."""
    weight: float = 1.0
    """Share of the prompts, relative to the weights of the other sources."""
    name: str | None = None
    """The dataset's configuration name, where it has several."""
    split: str | None = None
    """Split to train on."""
    prompt_field: str | None = None
    """Field that holds the prompt."""
    target_field: str | None = None
    """Field that holds the reference answer."""
    system_prompt: str | None = None
    """System message put before each prompt."""


@dataclass
class CurriculumConfig:
    """RL only: prompts that teach nothing at the moment are left out for a while."""

    enable: bool = False
    """Leave a prompt out whose last group was too hard or too easy."""
    low: float = 0.05
    """Too hard: the mean reward of the group was below this."""
    high: float = 0.95
    """Too easy: it was above this."""
    rest_epochs: int = 2
    """For so many epochs the prompt is left out; then it is tried again."""


@dataclass
class DataConfig:
    path: str = "builtin:addition"
    """``builtin:addition``, a JSONL, Parquet or CSV file, or a name for ``datasets.load_dataset`` (openai/gsm8k)."""
    name: str | None = None
    """The dataset's configuration name, where it has several (gsm8k: main)."""
    split: str = "train"
    """Split to train on. A file is its own split."""
    eval_split: str = "test"
    """Held-out split for evaluation."""
    eval_path: str | None = None
    """Where the held-out prompts come from, if not from ``path``."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture to train on, in place of ``path``, ``name`` and ``split``; held-out prompts come from ``eval_path``."""
    prompt_field: str = "question"
    """Field that holds the prompt: text, or the messages of a chat, each with ``role`` and ``content``."""
    target_field: str | None = "answer"
    """Field that holds the reference answer; SFT learns it, rewards compare with it. null: there is none, and SFT
    learns the assistant's turns of the chat in ``prompt_field``."""
    system_prompt: str | None = None
    """System message put before each prompt that has none; needs a tokenizer with a chat template."""
    chat_template: bool = True
    """Render prompts through the tokenizer's chat template; false feeds the raw text."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the chat template (Qwen3: ``enable_thinking: false``)."""
    template_date: str | None = None
    """The day, YYYY-MM-DD, that a chat template is told which writes today's date (Llama 3.2). null: the day on which
    the run is submitted first; ``config.yaml`` keeps it for all its nodes and starts."""
    shuffle: bool = True
    """Draw examples in a seeded order, a new one every epoch."""
    streaming: bool = False
    """Read the data as they are needed, for data too large to hold."""
    shuffle_buffer: int = 10000
    """Streaming: examples are read in blocks of so many, and shuffled within a block."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)


@dataclass
class RewardConfig:
    name: str = "exact"
    """A built-in reward (``exact``, ``math``, ``numeric``, ``gsm8k``, ``thinking``, ``format``, ``length``,
    ``repetition``, ``code``, ``llm_judge``), or ``package.module:name`` / ``file.py:name`` of a function or class."""
    weight: float = 1.0
    """Factor in the weighted sum of all rewards."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward: of each call of a function, of a class's ``__init__``."""
    timeout_s: float | None = None
    """A call that takes longer is given up; its episode is counted and left out. By default what the reward's class
    says (``math``: 10, ``code``: 120, ``llm_judge``: 720), else learned: 5 times (async: ``concurrency`` times) the
    slowest of the last 1000 calls, from 1 to 10."""
    workers: int | None = None
    """Processes that compute this reward. By default 1 for an async reward, else as many as cores, from 4 to 8."""
    concurrency: int | None = None
    """Calls that run at the same time in each process of an async reward. By default 64, or what its class says."""
    memory_gib: float | None = None
    """Address space of each of its processes; an allocation beyond it raises MemoryError. Unlimited by default."""


@dataclass
class MismatchConfig:
    """Importance weights w = pi_trainer / pi_generator for the sampled tokens; off while all of it is null. With it
    the loss's own ratio is taken against the trainer's log-probabilities, not the generator's."""

    cap: float | None = None
    """Truncated importance sampling: w is at most this (usual: 2)."""
    token_bounds: list[float] | None = None
    """[low, high]: tokens whose w is outside are left out."""
    sequence_bounds: list[float] | None = None
    """[low, high]: sequences whose w, in the geometric mean over their tokens, is outside are left out."""


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
    max_open_episodes: int | None = None
    """So many episodes are open at once, those of evaluation included; the others wait. By default as many as the class
    or its server says it has room for, else all that are due."""


@dataclass
class AlgorithmConfig:
    loss: str = "grpo"
    """Policy loss (grpo, dr_grpo, dapo, ppo, cispo, gspo, sapo, rloo, reinforce, simple_grpo: see docs/losses.md), or
    your own: ``file.py:name`` / ``package.module:name``."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the loss that have no key here: sapo's ``tau_pos`` and ``tau_neg``, those of your own."""
    advantage: str | None = None
    """How rewards become advantages (group_mean_std, group_mean, leave_one_out, group_mean_batch_std,
    batch_mean_std); null is the one that belongs to the loss (dr_grpo: group_mean, rloo: leave_one_out, reinforce:
    group_mean_batch_std, others: group_mean_std)."""
    clip_low: float | None = None
    """The ratio is clipped from below at 1 - clip_low; null is the loss's own default."""
    clip_high: float | None = None
    """The ratio is clipped from above at 1 + clip_high; null is the loss's own default."""
    kl_coef: float | None = None
    """Weight of the KL penalty against the reference model (above 0 needs ``reference.enable``); null is the loss's own
    default (simple_grpo: 0.1, other built-in ones: 0)."""
    kl_estimator: str | None = None
    """Estimator of the KL (k1, k2, k3); without a reference model nothing is estimated. null is the loss's own default
    (k3)."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus; null is the loss's own default (0)."""
    normalization: str | None = None
    """What the loss is a mean over: token, sequence, or constant (sums of sequences over rollout.max_response_tokens);
    null is the loss's own default."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Correction for the mismatch between generator and trainer."""
    drop_zero_signal_groups: bool = True
    """Leave groups whose advantages are all zero (their rewards are equal) out of training. A step that has no others
    counts and leaves weights and moments as they are."""
    dynamic_sampling: bool = False
    """Draw further prompts in their place, as DAPO does: every step trains on rollout.prompts_per_step groups whose
    rewards differ. Without it a step trains on the fewer that are left."""
    max_steps_without_signal: int = 20
    """Fail after this many consecutive steps in which no group carried a signal; with dynamic_sampling, when a step has
    drawn this many times rollout.prompts_per_step prompts without one and is not complete."""


@dataclass
class SamplingConfig:
    """How tokens are drawn. What is left of the distribution by temperature, min_p, top_k and top_p (in this order) is
    the policy: the trainer's log-probabilities are renormalised over the same tokens."""

    temperature: float = 1.0
    """Sampling temperature, from 0.01 to 2; 0 is greedy (not in training)."""
    top_p: float = 1.0
    """Nucleus sampling: the fewest tokens that have this probability together; 1 is all. The trainer sorts the
    vocabulary for it; top_k as well makes that cheap."""
    top_k: int = -1
    """Sample among the k most likely tokens; -1 is all."""
    min_p: float = 0.0
    """Leave out tokens that are less likely than this share of the most likely one; 0 is all."""
    repetition_penalty: float = 1.0
    """Makes tokens that have been less likely (above 1). Not in training: the trainer knows no such policy."""
    stop: list[str] = field(default_factory=list)
    """A response ends with any of these strings, at the token that completes it; text and trained tokens hold both."""
    stop_token_ids: list[int] = field(default_factory=list)
    """A response ends with any of these tokens, as with the end of sequence, which always ends it."""


@dataclass
class RolloutConfig:
    group_size: int = 8
    """Completions sampled for each prompt."""
    prompts_per_step: int = 32
    """Prompts (groups) that one optimizer step trains on."""
    max_prompt_tokens: int = 512
    """Prompts longer than this are left out and counted (in SFT: those of the evaluation)."""
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
    local_batch_size: int | None = None
    """Rows of one microbatch on each data-parallel rank; gradients accumulate over the microbatches of a step. By
    default as many as keep a GPU busy and fit its memory (``trainer-0.log`` says how many), 1 on the CPU."""
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
    mode: str = "auto"
    """What is computed again in the backward pass instead of kept: none, selective or full; auto is the least of it
    that fits the GPU's memory, and none on the CPU."""


@dataclass
class CompileConfig:
    enable: bool | None = None
    """torch.compile each transformer block; by default on CUDA."""


@dataclass
class LoRAConfig:
    enable: bool = False
    """Train low-rank adapters beside the frozen weights. Published and exported weights have them merged in."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    target_modules: list[str] = field(default_factory=lambda: ["wq", "wkv", "wo", "w1", "w2", "w3"])
    """Linear layers with an adapter, by TorchTitan's names: attention wq, wkv (keys and values), wo; feed-forward w1
    (gate), w2 (down), w3 (up)."""


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
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    timeout_s: float = 1800.0
    """A training step that takes longer than this has a stuck rank."""


@dataclass
class ReferenceConfig:
    enable: bool = False
    """Hold a frozen copy of the initial model for the KL penalty, in the compute dtype; with LoRA the trained model
    without its adapters serves, and nothing is copied."""
    device: str = "auto"
    """Where its weights are kept: auto or cuda (with the trainers' own) or cpu: in host memory, from where a layer at a
    time visits the GPU. It computes where the trainers do."""


@dataclass
class CheckpointConfig:
    interval: int = 50
    """Save every so many optimizer steps; the last step is always saved, 0 saves it alone."""
    keep: int = 2
    """Newest checkpoints to keep; older ones are deleted."""
    async_save: bool = True
    """Write beside the training instead of blocking it."""
    export_interval: int = 0
    """Also write the weights in Hugging Face format every so many optimizer steps, to RUN_DIR/exports/step-N, which
    nobody deletes; 0 writes those of the last step alone, to RUN_DIR/export. See also ``forge-hpc export``."""


@dataclass
class EvaluationConfig:
    interval: int = 0
    """Evaluate every so many steps, besides before the first and after the last one: by answers to held-out prompts, in
    SFT by the loss on held-out documents; 0 evaluates only then (SFT: only at the end)."""
    num_prompts: int = 0
    """Held-out prompts (SFT: documents) of an evaluation, the first of ``data.eval_split``; 0 switches it off."""
    samples: int = 0
    """Answers sampled for each prompt, for pass@k; 0 is greedy decoding alone."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k for each of these, each at most ``samples``."""
    temperature: float | None = None
    """Temperature of the sampled answers; by default rollout.sampling's, as are top_p and top_k."""


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
    """Nodes kept to replace lost rollout nodes. With any, the job outlives a node that dies (--no-kill)."""
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
    """Partition, or several by commas; where it is null $SBATCH_PARTITION, or the cluster's default."""
    account: str | None = None
    """Account to charge; where it is null $SBATCH_ACCOUNT."""
    qos: str | None = None
    """Quality of service; where it is null $SBATCH_QOS."""
    time: str = "24:00:00"
    """Walltime limit, in Slurm's notation."""
    constraint: str | None = None
    """Node features asked for."""
    exclusive: bool = True
    """Whole nodes. Sharing a node with other users opens ports that TLS cannot cover (see the README); then
    ``cpus_per_task`` and ``mem`` say how much of it."""
    cpus_per_task: int | None = None
    """CPU cores on each node; with exclusive, all of them."""
    mem: str | None = None
    """Memory on each node; 0 is all of it, as is null with exclusive."""
    signal_lead_s: int | None = None
    """Seconds before the walltime at which the run saves and leaves. By default it follows from the step and save times
    that the run has measured: 300 before that, and never more than half of ``time``."""
    requeue: str = "auto"
    """How a run goes on that was preempted, came to its walltime, lost a node or crashed: auto has Slurm start the job
    again (--requeue), and queues a successor where Slurm refuses; successor queues another job (--no-requeue: for sites
    that forbid requeueing); never stays down until it is resumed by hand."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on each node first (module load …)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further sbatch options, name: value. Numbers keep their text; true gives an option without a value."""


@dataclass
class SandboxLimits:
    """What one sandboxed program may take, all its processes together. Passing any of them ends it."""

    wall_s: float = 10.0
    """Seconds from its start; with several tests, of all of them together."""
    cpu_s: float = 10.0
    """CPU seconds, likewise."""
    memory_mb: int = 512
    """MiB of resident memory; a single allocation beyond it fails before that."""
    processes: int = 32
    """Processes and threads at once."""
    output_kb: int = 64
    """KiB kept of the standard output, and of the standard error."""
    disk_mb: int = 64
    """MiB in /tmp, and as much in /dev/shm; both are memory of the node and go with the sandbox."""


@dataclass
class SandboxConfig:
    """Where model-written code runs. It is never run outside a sandbox."""

    runtime: str = "auto"
    """auto is bubblewrap; or apptainer, enroot. None of them stands in for another."""
    image: str | None = None
    """Image (apptainer: file or directory; enroot: file or container name) with Python 3.10 or newer."""
    python: str | None = None
    """Interpreter of the programs; the packages of its (virtual) environment can be imported. By default the one that
    runs forge_hpc, with the standard library alone; in an image, its python3."""
    parallel: int | None = None
    """Programs at once, over all episodes of the environment ``code``, and in each process of a reward ``code``; by
    default as many as forge_hpc may use cores."""
    limits: SandboxLimits = field(default_factory=SandboxLimits)


@dataclass
class LoggingConfig:
    console: str = "auto"
    """auto (progress bar on a terminal, one line a step elsewhere), lines, or none."""
    tensorboard: bool = True
    """Write event files to RUN_DIR/tensorboard."""
    wandb: bool = False
    """Send the metrics to Weights & Biases as well (offline where WANDB_MODE says so)."""
    num_rollouts_per_step: int = 2
    """Rollouts of each step kept in rollouts.jsonl: the first one of each of the first groups."""
    num_groups_per_step: int = 0
    """So many of the first groups of each step are kept there whole: all samples that have a reward."""
    num_answers_per_evaluation: int = 1000
    """Answers of each evaluation kept in RUN_DIR/evaluations, all those to the first prompts; 0 keeps none."""


@dataclass
class Config:
    """A whole run. ``key=value`` overrides use these names: ``trainer.optimizer.lr=1e-6``."""

    recipe: str = "grpo"
    """Controller loop: grpo, sft, eval (generators alone), or your own as ``file.py:function`` or
    ``package.module:function``."""
    name: str = "grpo"
    """Name of the run; a part of the default run directory and the Slurm job's name."""
    seed: int = 42
    """Everything random follows from this."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    """Rewards, each added with its weight; with an environment to what that gives, and none unless it is named here."""
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
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
