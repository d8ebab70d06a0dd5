"""The whole job: from a source to files, what they lost, and a report.

planning   what a source will become
outputs    the model's file and those beside it; means: what a job is done with
make       `make`; sweep: several files, compared
measuring  what each file lost
keys       what the parts of a job depend on
"""
