"""The studio: a local web page where people read responses, write judgments and see what these flag.

Read in this order:

- `items`: the responses to read, from a file of responses or of records.
- `journal`: verdicts, and the append-only file that holds those of one reviewer.
- `merge`: the verdicts of all reviewers as records, and how far reviewers agree.
- `session`: the verdicts of one reviewer on the items, saved and merged.
- `scoring`: one thread that runs the models; requests that were overtaken are cancelled.
- `drafts`: first judgments by a judge on a server.
- `training`: the command that trains on the records, and its run.
- `security`: who may send requests.
- `server`: the routes; `page.html`, `studio.css` and the `.js` modules are the page.
"""
