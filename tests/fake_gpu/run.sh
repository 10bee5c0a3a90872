#!/usr/bin/env bash
# run.sh [PYTEST ARGUMENTS]: makes the environment (once), builds the fake GPU, runs its tests, and prints launches and host time by shape.
# Says in one line why it is skipped where something is missing. PYTHON: which one makes the environment; FAKE_GPU_ENV: where it is.
set -uo pipefail
cd "$(dirname "$0")/../.."
here=tests/fake_gpu env=${FAKE_GPU_ENV:-.venv-fake-gpu}
skip() { echo "fake-gpu: skipped: $1"; exit 0; }

[ "$(uname -sm)" = "Linux x86_64" ] || skip "it needs Linux on x86-64"
command -v g++ > /dev/null || skip "expected g++ to build it, found none"
if [ ! -x "$env/bin/python" ]; then
  echo "fake-gpu: installing a CUDA build of torch into $env (once; 5 GB)"
  "${PYTHON:-python3}" -m venv "$env" || skip "cannot make an environment in $env"
fi
if ! cmp -s $here/requirements.txt "$env/installed"; then
  "$env/bin/python" -m pip --disable-pip-version-check --quiet install -r $here/requirements.txt || skip "cannot install $here/requirements.txt"
  cp $here/requirements.txt "$env/installed"
fi
"$env/bin/python" -c 'import sys, torch; sys.exit(not str(torch.version.cuda).startswith("13."))' || skip "expected a torch for CUDA 13 in $env"

packages=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
library=$(realpath "$env")/fake-gpu
mkdir -p "$library"
if [ $here/fakegpu.cpp -nt "$library/libcuda.so.1" ]; then
  g++ -O1 -g -shared -fPIC -std=c++17 -w -I$here/headers -I"$packages/nvidia/cu13/include" -I"$packages/triton/backends/nvidia/include" \
    -Wl,-soname,libcuda.so.1 -o "$library/libcuda.so.1" $here/fakegpu.cpp -ldl -lpthread || skip "cannot build $here/fakegpu.cpp"
fi

export LD_PRELOAD=$library/libcuda.so.1 LD_LIBRARY_PATH=$library TRITON_LIBCUDA_PATH=$library FAKE_GPU=1 FAKEGPU_DEVICES=2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$env/bin/python" -m pytest -q -p no:cacheprovider "${@:-$here}" || exit 1
[ $# -gt 0 ] || "$env/bin/python" -m tests.fake_gpu.table
