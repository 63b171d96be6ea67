"""A llama.cpp that fails in the middle of the file that it quantises, as the variable LLAMA_CPP says."""

import ctypes
import os
import pathlib
import time

LLAMA_FTYPE_MOSTLY_Q4_K_M = 15


class Parameters(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int)]


llama_model_quantize_default_params = Parameters


def llama_model_quantize(full: bytes, path: bytes, parameters: object) -> int:
    pathlib.Path(os.fsdecode(path)).write_bytes(b"half")
    ends, _, file = os.environ["LLAMA_CPP"].partition(":")
    if ends == "assertion":
        os.write(2, b"tensor 7\nGGML_ASSERT(n == 256) failed\n")
    if ends == "error":
        os.write(2, b"tensor 7\ndata is corrupted\n")
        return 1
    if ends == "hangs":
        pathlib.Path(file).write_text(str(os.getpid()))
        time.sleep(60)
    os.abort()
