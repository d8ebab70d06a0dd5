"""Answers: benchmarks and a few chats, item by item against full precision.

compare    benchmarks; loading: finding them
answering  a GGUF as the model of lm-evaluation-harness
smoke      a few chats, and what went wrong in them
paired     two models on the same items
"""
