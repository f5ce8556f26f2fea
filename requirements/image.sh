#!/bin/sh
# What builds the environment of a run in an image of Debian 12: Dockerfile and apptainer.def call it.
#
#   image.sh [cuda|cpu]        the exact versions of requirements/EXTRA.txt, in /opt/venv
set -eu
extra=${1:-cuda}
project=$(cd "$(dirname "$0")/.." && pwd)
export DEBIAN_FRONTEND=noninteractive

# A compiler and Python's headers for what Triton compiles, libnuma for vLLM, bubblewrap for model-written code.
apt="apt-get -qq -o APT::Sandbox::User=root" # who builds without lines in /etc/subuid has no other user to change to
$apt update
$apt install -y --no-install-recommends \
  bubblewrap ca-certificates g++ gcc iproute2 libnuma1 procps python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/venv
/opt/venv/bin/pip install --quiet --no-cache-dir uv
if [ "$extra" = cpu ]; then export UV_TORCH_BACKEND="${UV_TORCH_BACKEND-cpu}"; fi # else PyPI's torch, which is CUDA's
[ -n "${UV_TORCH_BACKEND-}" ] || unset UV_TORCH_BACKEND # set, but empty: no index of PyTorch; uv itself refuses that
/opt/venv/bin/uv pip install --quiet --no-cache --compile-bytecode --no-deps --python /opt/venv/bin/python \
  -r "$project/requirements/$extra.txt" "$project"
/opt/venv/bin/forge-hpc --help >/dev/null
