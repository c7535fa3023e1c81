"""Data: files of judged records.

Read in this order:

1. `sources`: the files of a glob, a folder or a data set of the hub. `files`: their rows with their locations; atomic
   writes. `tables`: CSV, Parquet and Arrow. `formats`: detection of other formats, and how to convert them.
2. `records`: `JudgedRecord`, the validation of rows, and their problems as messages.
   `praise`: judgments that praise in other words than "Perfect."
3. `journal`: the partial file from which a stopped run resumes.
4. `convert`: published judgment data turned into records, one module per source.
"""
