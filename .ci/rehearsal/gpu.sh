#!/usr/bin/env bash
# gpu.sh COMMAND...: run it in a process tree that sees one NVIDIA H200 which computes nothing.
#
# PYTHON (default: python3) is an environment with torch for CUDA 12, its Triton, and pip. The first
# call takes some seconds: it compiles gpu.c, and fetches the one header-only wheel that host code
# needs and torch does not bring. Both are kept in REHEARSAL_HOME.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=$(command -v "${PYTHON:-python3}")
read -r packages torch cuda < <("$PYTHON" -c 'import pathlib, torch
print(pathlib.Path(torch.__file__).parent.parent, torch.__version__, torch.version.cuda)')
[[ $cuda == 12.* ]] || {
  echo "error: the rehearsal needs a torch for CUDA 12, this is torch $torch (CUDA: $cuda)" >&2
  exit 5
}
home=${REHEARSAL_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/llama-rehearsal}/$torch
library=$home/lib/libcuda.so.1

make_gpu() {
  mkdir -p "$home/lib"
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --upgrade \
    --target "$home/headers" "nvidia-cuda-cccl-cu12==$cuda.*" >&2
  "$PYTHON" "$here/stubs.py" "$packages/torch" "$home/stubs.c"
  gcc -O1 -w -fPIC -shared -I "$packages/triton/backends/nvidia/include" "$here/gpu.c" \
    "$home/stubs.c" -o "$library.new" -Wl,-soname,libcuda.so.1 -ldl -lpthread
  mv "$library.new" "$library"
  ln -sf libcuda.so.1 "$home/lib/libcuda.so"
}

mkdir -p "$home"
exec 9>"$home/lock"
flock 9
if [[ ! -e $library || $here/gpu.c -nt $library || $here/stubs.py -nt $library ]]; then
  make_gpu
fi
exec 9>&-
export LLAMA_REHEARSAL=1 HF_HUB_OFFLINE=1 TRITON_LIBCUDA_PATH=$home/lib
export CUDA_HOME=${CUDA_HOME:-$home/headers/nvidia/cuda_cccl}
LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD} exec "$@"
