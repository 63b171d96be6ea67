"""Has llama.cpp quantise a GGUF file, in a process of its own: a failed assertion of llama.cpp's aborts the process.

    in    full: the file, with 16-bit weights; path: the file to write, in Q4_K_M

llama.cpp says why it fails on standard error, where it also tells of each tensor.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys


def main() -> None:
    """Quantise the one file that standard input names."""
    import llama_cpp

    request = json.load(sys.stdin)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    full, path = (os.fsencode(request[name]) for name in ("full", "path"))
    sys.exit(llama_cpp.llama_model_quantize(full, path, ctypes.byref(how)))


if __name__ == "__main__":
    main()
