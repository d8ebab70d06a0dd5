"""Reports of measurements.

schema    a measurement as a value; evidence: what a later comparison needs
reading   a report, read back and checked
markdown  as Markdown
html      as a page
"""
