#!/usr/bin/env bash
# One run on several nodes, one process a node, which sees all its GPUs.
#
#   sbatch launch/slurm.sh --config configs/sentiment_pairs.yaml --mesh.data=1 --mesh.fsdp=-1
#
# The run directory and DPO_CACHE must be on a file system that all nodes share. Two minutes before the time is
# up every process saves and ends with code 75, and the job is queued again and goes on from there.
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"

status=0
srun --kill-on-bad-exit=1 .venv/bin/dpo train --distributed.cluster=slurm --distributed.step_timeout=600 "$@" ||
  status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
