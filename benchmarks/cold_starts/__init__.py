"""Cold starts of large models on up to 1,024 nodes: who reads and sends what, what that costs, and whether a simulation of it is right.

    scenarios     models, storages and machines, with the sources of their figures
    strategies    each way of loading as a cluster that can be replayed
    studies       what is simulated
    small_cases   small loads that are made and simulated; `small_loads` makes them, `measured` compares
    page, plots   docs/cold_starts.md

`benchmarks/simulate.py` runs them. The simulation itself is `ray_streamer.report.verdict`, which finds verdicts and predictions.
"""
