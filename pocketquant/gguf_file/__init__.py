"""GGUF files.

reading   headers and shards
opening   a file as a `Model`
values    what a value of metadata may be
tensors   entries of the tensor table
header    metadata and tensors -> the bytes before the data
writing   `Plan` -> file
shards    one file in several
identity  files by content
"""
