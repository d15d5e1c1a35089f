"""One self-contained page about a run, or about several: `build.write` makes it.

`runs` finds what a work directory holds, `summary`, `gradients`, `reading` and `comparison` say it as JSON
values, `page` puts these with the style sheet and the scripts of static/ into one HTML file. The page shows
what the JSON says and computes nothing else, save what the network makes of a digit.
"""
