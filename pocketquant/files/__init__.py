"""Reading, replacing and remembering files.

reading    byte ranges, digests, which files a source is made of
small      the one door for configs, tokenizers, reports, texts: bounded, regular files only
replacing  outputs: whole or not at all
unchanged  a source that changes while it is read is noticed
leftovers  locks, and what killed processes left
interrupts what an interrupt may not cut in two, and how to go on after one
resuming   the file that keeps the state of unfinished work
finished   what an unfinished job has finished already
"""
