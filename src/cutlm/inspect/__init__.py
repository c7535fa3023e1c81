"""Views of results: token scores as an HTML page or in a terminal, plots as PNG, tables as Markdown.

Nothing is measured here and torch is not needed. Read `tokens` first (token scores prepared for display), then `page`
(the HTML page of `cutlm inspect` and `cutlm demo`) and `terminal`; `plots` and `tables` are independent of these.
"""
