#!/bin/bash
# Runs any recipe on any number of machines:
#
#   sbatch --nodes 8 recipes/accelerate/slurm.sh recipes/gpt2_pretrain.py --preset gpt2-124m --output_dir /shared/run
#
# All machines must see the output folder. Ten minutes before the time limit, and when the job is preempted, a file tells
# the recipe to save and stop. The job is then requeued, and continues where it stopped.
#SBATCH --job-name=hf_gem
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail

GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}  # per machine
CONFIG=${CONFIG:-multi_node.yaml}
HERE=${SLURM_SUBMIT_DIR:-$(pwd)}/recipes/accelerate
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1 | cut -d ' ' -f 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit this by itself
export HF_GEM_STOP_FILE=$(pwd)/.stop-$SLURM_JOB_ID
PORT=$((20000 + SLURM_JOB_ID % 20000))  # a different one for each job

# The shell is needed because a task's rank is only known on its machine.
srun bash -c 'exec accelerate launch --config_file "$0" --machine_rank "$SLURM_PROCID" "$@"' \
  "$HERE/$CONFIG" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) \
  --main_process_ip "$FIRST" --main_process_port "$PORT" "$@" &
STEP=$!

again() {
  touch "$HF_GEM_STOP_FILE"
  wait "$STEP" || true
  rm -f "$HF_GEM_STOP_FILE"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap again USR1 TERM
wait "$STEP"
