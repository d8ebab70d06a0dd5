"""Lints a GGUF, or an opened checkpoint, without running it: what is wrong, where, and what to do."""

from pocketquant.check.checking import check_gguf, check_model
from pocketquant.check.findings import ERROR, WARNING, CheckReport, Finding

__all__ = ["ERROR", "WARNING", "CheckReport", "Finding", "check_gguf", "check_model"]
