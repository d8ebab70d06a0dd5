"""Runs llama.cpp's converter for adapters. Started by the peer tests with an interpreter that has torch and it.

    python llama_convert_lora.py BASE ADAPTER OUT TYPE

It has no --no-mtp, and without it asserts that a Qwen3.5 model has a multi-token-prediction block: set here.
"""

import runpy
import sys

from llama_source import ROOT, use_converter

base, adapter, out, kind = sys.argv[1:]
use_converter()
import conversion.base  # noqa: E402

conversion.base.ModelBase.no_mtp = True
sys.argv = ["convert_lora_to_gguf.py", adapter, "--base", base, "--outfile", out, "--outtype", kind]
runpy.run_path(str(ROOT / "convert_lora_to_gguf.py"), run_name="__main__")
