#!/bin/bash
# SFT on the nodes of one allocation:
#   sbatch sbatch/sft.sh [--config FILE] [--run-dir D] [--site NAME] [--name NAME] [key=value ...]
#   sbatch --nodes=16 --gpus-per-node=8 --partition=gpu sbatch/sft.sh --config configs/sft/NAME.yaml
# Options of sbatch stand before the script and win over the lines below. Without --config: the demo, which needs no GPU.
#SBATCH --job-name=sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# $0 is a copy in slurmd's spool: the project is where sbatch was called, or where Slurm says that the script lies. A job
# that takes the place of one that could not be requeued is told (forge_hpc/slurm/successor.py).
project=${FORGE_HPC_PROJECT:-${SLURM_SUBMIT_DIR:-.}}
if [[ ! -f $project/sbatch/common.sh ]]; then
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)
  project=$(dirname "$(dirname "$script")")
fi
source "$project/sbatch/common.sh" || exit 2
run_recipe sft "$@"
