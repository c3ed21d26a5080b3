#!/usr/bin/env bash
# Gathers wheels for a machine with a GPU and no network, whose image has jax, torch and numpy for Python 3.12 already.
#   bash benchmarks/accelerator_wheels.sh [FOLDER]
# There, in the project's root:
#   python3 -m venv --system-site-packages .gpu && .gpu/bin/python -m pip install --no-index --no-deps FOLDER/*.whl
#   .gpu/bin/python -m benchmarks.accelerator --out results
# (Not by PYTHONPATH: processes that read strangers' files are isolated, and see what is installed alone.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.wheels}
limit_mib=60
mkdir -p "$folder"
platforms=()
for glibc in 2_28 2_27 2_24 2_17 2014 1; do
  case $glibc in
    2014 | 1) platforms+=(--platform "manylinux${glibc}_x86_64") ;;
    *) platforms+=(--platform "manylinux_${glibc}_x86_64") ;;
  esac
done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d "$folder" -r benchmarks/requirements-accelerator.txt
python3 -m pip wheel --quiet --no-deps -w "$folder" .
size=$(du -sm "$folder" | cut -f1)
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $size MiB"
if [ "$size" -gt "$limit_mib" ]; then
  echo "more than $limit_mib MiB: leave something out of benchmarks/requirements-accelerator.txt" >&2
  exit 1
fi
