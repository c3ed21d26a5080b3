#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice, with an NFS share as the file system that they share. It is called in a
# checkout, which is copied there without its runs.
#
#   launch/cloud_tpu.sh NAME ZONE TYPE SHARE dpo-train-arguments ...
#   launch/cloud_tpu.sh mine us-west4-a v5litepod-16 10.0.0.2:/dpo --config configs/sentiment_pairs.yaml --mesh.fsdp=-1 \
#     --mesh.data=1 --run_dir=/mnt/shared/runs/mine
#
# SHARE is an NFS export in the slice's network, such as a Filestore instance's ADDRESS:/NAME. A bucket will not do:
# mounted, it renames no directories and its locks hold on one host only, so `dpo train` refuses it.
#
# The processes find one another through the metadata server. The same command goes on with an interrupted run.
set -euo pipefail
name=${1:?NAME} zone=${2:?ZONE} type=${3:?TYPE} share=${4:?SHARE}
shift 4

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm describe "$name" --zone="$zone" >/dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version=tpu-ubuntu2204-base
# The checkout without what belongs to this machine: its .venv would not run there.
code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
tar --exclude=./.venv --exclude=./.git --exclude=./runs --exclude=./site -czf "$code/dpo.tar.gz" .
gcloud compute tpus tpu-vm scp --zone="$zone" --worker=all "$code/dpo.tar.gz" "$name:dpo.tar.gz"
on_all_hosts "mkdir -p dpo && tar -xzf dpo.tar.gz -C dpo"
on_all_hosts "python3.11 -c 'import ensurepip' || { sudo apt-get update -q && sudo apt-get install -qy python3.11-venv; }"
on_all_hosts "cd dpo && make setup PYTHON=python3.11 && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
on_all_hosts "sudo mkdir -p /mnt/shared && (mountpoint -q /mnt/shared ||
  { sudo apt-get install -qy nfs-common && sudo mount -t nfs -o hard $(printf '%q' "$share") /mnt/shared &&
    sudo chmod 1777 /mnt/shared; })"
on_all_hosts "cd dpo && DPO_CACHE=/mnt/shared/cache .venv/bin/dpo train --distributed.step_timeout=600 --training.save_minutes=10 $(printf '%q ' "$@")"
