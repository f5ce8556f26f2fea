"""The commands of ``forge-hpc``, a file each: ``arguments(parser)`` says what one takes, ``run(args)`` does it and
returns its exit code. No file is imported but that of the command which is run, and none loads torch.

To add one, add its file and its line here.
"""

from __future__ import annotations

COMMANDS = {
    "submit": "start a run: queue it on Slurm, or run it here",
    "fetch": "bring models and data of the hub to the cache, for nodes without a network",
    "plan": "which nodes should train and which generate, and why",
    "status": "state, step, reward, time left and sign of life: of a run, a job, or (--all) of all runs",
    "watch": "progress, curves, where the time goes, last events; of a queued job why it waits",
    "logs": "what a role's processes say, on all nodes",
    "stacks": "where every process of a running run stands",
    "attach": "a shell, or a command, on a node of the run's job",
    "join": "lend a running run more generators, by a job that may vanish at any time",
    "cancel": "have a run save and end, and wait until it has ended",
    "resume": "go on with a run, or (--from) begin a new one from a checkpoint of it",
    "engines": "engines that submit --keep-engines has left; --end ends them",
    "report": "what a run achieved and where its time went, as text and as a page (RUN_DIR/report.html)",
    "compare": "runs side by side, with intervals over those that differ only in their seed",
    "reward": "score a JSONL of prompts, responses and targets, without a run",
    "env": "play an environment by hand: you write the responses",
    "export": "write the model of a checkpoint for transformers and vLLM, also while the run goes on",
    "site": "write down what is the same for every run on this cluster",
    "doctor": "whether this machine has what a run needs",
    "completion": "what bash or zsh completes: source <(forge-hpc completion bash)",
}
"""Each with what it does, in a line."""
INTERNAL = {"prepare": "(sbatch/common.sh) in a job: make the run directory, print the command that starts the run"}
