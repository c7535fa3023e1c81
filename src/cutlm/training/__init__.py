"""Training on judged records. Read in this order, from the command to the loss:

- `config`: every setting, and reading them from YAML and options.
- `run`: one run of `cutlm train`, from the files to a saved model.
- `preview`: the data of a run, shown without its model.
- `dataset`: records, token scores or encoded rows become rows of token ids; views of the objectives; frozen flags.
- `trainer`: `CUTTrainer`, whose loss is taken over the whole optimizer step.
- `checkpoints`: stopping, saving and resuming, shared by both trainers.
- `metrics`, `sampling`: logged metrics; the order of records on several processes.
- `pairs`: DPO through TRL.
"""
