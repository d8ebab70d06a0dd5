"""A report against limits and the last accepted report.

limits       the limits, as TOML; starter: a first file of them
decide       every limit decided; verdict: the decisions as values
comparable   whether two reports can be compared
report_diff  what moved between two reports
output       decisions as JSON, JUnit XML, Markdown, a table
"""
