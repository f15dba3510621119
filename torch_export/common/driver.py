"""The CUDA driver, opened while Python is still busy with importing torch."""

import ctypes
import threading


def open_driver(device: str) -> None:
    """Start to make the context that torch will use, in a thread; `device` is the flag's word.

    Both take some tenths of a second and hold no lock of Python's. Without a driver, without a GPU
    or for the CPU nothing happens; a failure is left for torch to meet and to name.
    """
    if device != "cpu":
        threading.Thread(target=_make_context, daemon=True).start()


def _make_context() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    context = ctypes.c_void_p()
    # of the first visible GPU, torch's own choice; kept until the process ends, as torch keeps it
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
