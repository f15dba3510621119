"""Write the C of every function that has nothing to do: python stubs.py TORCH_FOLDER OUT.c

All of cuBLAS as libtorch_cuda imports it, and the part of the CUDA runtime and driver that only has
to succeed. gpu.c answers the rest.
"""

import re
import subprocess
import sys
from pathlib import Path

SUCCEED = """
cuCtxPushCurrent_v2 cuCtxSetCurrent cuCtxSetLimit cuCtxSynchronize
cuDevicePrimaryCtxRelease_v2 cuFuncSetCacheConfig cuInit cuModuleUnload cuStreamSynchronize
cuTensorMapEncodeTiled cudaDeviceEnablePeerAccess cudaEventDestroy cudaEventQuery
cudaEventRecord cudaEventRecordWithFlags cudaFuncSetAttribute cudaGraphDebugDotPrint
cudaGraphDestroy cudaGraphExecDestroy cudaGraphLaunch cudaHostRegister
cudaHostUnregister cudaMemPoolSetAccess cudaMemPoolSetAttribute cudaMemPoolTrimTo
cudaMemcpyToSymbol cudaProfilerStart cudaProfilerStop cudaStreamDestroy cudaStreamQuery
cudaStreamUpdateCaptureDependencies cudaStreamWaitEvent
"""
# arguments before the one that is answered, its type, and the answer
ANSWERS = {
    "cublasCreate_v2": ("", "void **", "(void *)1"),
    "cublasGetPointerMode_v2": ("void *a, ", "int *", "0"),
    "cublasGetMathMode": ("void *a, ", "int *", "0"),
    "cublasLtMatmulDescCreate": ("", "void **", "(void *)1"),
    "cublasLtMatmulPreferenceCreate": ("", "void **", "(void *)1"),
    "cublasLtMatrixLayoutCreate": ("", "void **", "(void *)1"),
    # nine arguments come before the number of algorithms found
    "cublasLtMatmulAlgoGetHeuristic": (
        "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int h, void *i, ",
        "int *",
        "1",
    ),
}


def imported_names(library: Path) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    return set(re.findall(r" U (cublas\w+)", listed.stdout))


def stub(name: str) -> str:
    if name not in ANSWERS:
        return f"int {name}(void) {{ return 0; }}\n"
    before, kind, value = ANSWERS[name]
    return f"int {name}({before}{kind}answer) {{ *answer = {value}; return 0; }}\n"


def main(torch_folder: str, out: str) -> None:
    libraries = [Path(torch_folder, "lib", f"libtorch_cuda{end}.so") for end in ("", "_linalg")]
    names = set(SUCCEED.split()).union(*map(imported_names, libraries))
    Path(out).write_text("".join(map(stub, sorted(names))))


if __name__ == "__main__":
    main(*sys.argv[1:])
