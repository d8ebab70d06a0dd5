"""Reference packs: what a full-precision model said about a text, kept.

pack        the file format
states      hidden states, stored in few bytes and turned into logits again
top_k       the most likely tokens only
pack_error  what a pack loses, measured while it is made
replay      a pack in the place of a live reference
"""
