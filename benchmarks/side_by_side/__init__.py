"""How does this project load beside other loaders? Same files, same servers, fresh processes, in turn; `python benchmarks/compare.py`.

checkpoint   what is loaded
page_cache   whether its files are in memory
nginx        a web server that counts
places       where the checkpoint is: disk, S3, web server
contenders   who loads, and who cannot load from where
loaders      how each of them loads; runs in the rank's process
downloads    how files come to the disk, for who reads local files only
rank         one rank: a process that loads once
group        the ranks of one run, and what is measured of them
memory       their peak memory
rounds       every contender in every place, round by round
results      what came of it, as JSON
machine      where it was measured
tables       as Markdown, and on a terminal
plots        as pictures
pages        the pages in docs/
"""
