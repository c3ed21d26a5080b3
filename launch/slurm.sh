#!/usr/bin/env bash
# One run on several nodes, one process a node, which sees all its GPUs.
#
#   sbatch launch/slurm.sh --config configs/sentiment_pairs.yaml --mesh.data=1 --mesh.fsdp=-1
#
# The run directory must, and DPO_CACHE should, be on a file system that all nodes share. Two minutes before the time is
# up every process saves and ends with code 75, and the job is queued again and goes on from there.
#
# srun gives the largest code of all processes, which hides the cause: a process with wrong data ends with 2, those
# that lost it with 75. So each writes down its own. The job is queued again where all that are known go on (0 or
# 75) or were killed (134 and above); 1, 2 and 130 end it. Where all processes meet, `dpo train` itself ends with 1
# after ten starts that saved nothing; a node on which it never comes up is yours to exclude.
#
# srun waits for every process: the others are done when the model is exported, and process 0 then makes the report.
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"

codes=$(mktemp -d -p "$PWD" .dpo-codes.XXXXXX)
export DPO_CODES=$codes
trap 'rm -rf "$codes"' EXIT

# Runs the command and writes its code down; a signal to this shell leaves the command time to answer it.
# shellcheck disable=SC2016  # it is the shell of each process that reads these
keep_code='trap : TERM; code=0; "$@" || code=$?; echo "$code" >"$DPO_CODES/$SLURM_PROCID"; exit "$code"'
status=0
srun --kill-on-bad-exit=0 --wait=0 bash -c "$keep_code" task \
  .venv/bin/dpo train --distributed.cluster=slurm --distributed.step_timeout=600 --training.save_minutes=10 "$@" ||
  status=$?

goes_on=yes
for file in "$codes"/*; do
  [ -e "$file" ] || continue
  code=$(cat "$file")
  if [ "$code" -ne 0 ] && [ "$code" -ne 75 ] && [ "$code" -lt 134 ]; then
    goes_on=no status=$code
  fi
done
if [ "$status" -eq 0 ]; then
  exit 0
fi
if [ "$goes_on" = yes ] && { [ "$status" -eq 75 ] || [ "$status" -ge 134 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
