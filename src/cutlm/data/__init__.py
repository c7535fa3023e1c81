"""Data: files of judged records.

Read in this order:

1. `files`: rows of JSON and JSON Lines files with their locations; atomic writes.
2. `records`: `JudgedRecord`, the validation of rows, and their problems as messages.
   `praise`: judgments that praise in other words than "Perfect."
3. `journal`: the partial file from which a stopped run resumes.
4. `convert`: published judgment data turned into records, one module per source.
"""
