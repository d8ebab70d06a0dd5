"""Texts: read, cut into windows, rendered as conversations.

corpus         a text in windows of tokens
conversations  conversations in a file, as the model's chat template writes them
chat_template  the template, rendered apart from this process and with limits
embedded       the short texts that come with the package
"""
