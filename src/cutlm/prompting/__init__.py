"""Prompting: text to token ids.

Read in this order:

1. `templates`: the text that precedes a response, in the alpaca prompt or in a tokenizer's chat template.
2. `encoding`: `Encoder`, the one place that turns prompts and responses into token ids; batches of records to rows.
3. `rows`: records to a table of rows, in several processes, and once for the same content.
4. `spans`: which characters of a response each of its tokens covers.
5. `reasoning`: the final answer of a generated text, without thoughts and channels.
"""
