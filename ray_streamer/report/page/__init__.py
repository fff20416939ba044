"""How does a load look on one page? A file of its own that any browser shows, without a network.

    figure        a chart, as plotly.js takes it, and its numbers as a table
    time_figures  charts of the timeline; `sum_figures`: charts of sums
    sections      the parts of the page, as HTML
    looks         style and script of the page
    document      all of it as one file

Nothing of it is imported before a page is asked for.
"""
