"""Why did a load take as long as it did, and which one change would make it faster? Found by replaying it with changes.

    observe    the traces of one node's ranks become a model: reads, copies, and what the storage gave (`rates`)
    replay     the model runs again, in a simulation of discrete events; `flows`: streams share links; `lanes`: which ones
    without    the model without one of its costs; `other_settings`: under other settings
    cost       which cost matters most; `advice`: which setting helps; both by replays
    judge      all of it as one value; `paragraph`: in words

A load that has not been made is replayed by the same code: `planned` makes the model from a plan and from rates, and several nodes may
share a storage. So the doctor predicts a load, and `benchmarks/simulate.py` those of up to 1,024 nodes.

Nothing here reads a clock, a file or a setting: the same traces give the same verdict.
"""
