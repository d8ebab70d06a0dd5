"""Texts: read, cut into windows, rendered as conversations.

corpus         a text as windows of tokens, for calibration and evaluation alike
calibration    several texts as one set of windows; text that the model samples itself
conversations  conversations in a file, as the model's chat template writes them
chat_template  the template, rendered apart from this process and with limits
embedded       the short texts that come with the package
"""
