"""What does docs/cold_starts.md say? All of its figures are those of the simulation, or of the small loads that it was checked with."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from cold_starts.scenarios import GPU_NODE, PEER_STREAM_RATE, S3, STORAGES
from cold_starts.strategies import STRATEGIES
from cold_starts.studies import BUILT, CONCURRENCIES, LINKS_GBIT, SHOWN_NODES, STRAGGLER_NODES, STRAGGLER_SHARE
from ray_streamer.report.verdict.planned import MAX_BLOCKS
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cold_starts.measured import Checked
    from cold_starts.studies import Simulated, Start

GOAL = 0.15

HEAD = """# What a cold start costs, on 1 to 1,024 nodes

    ray-streamer doctor s3://bucket/model --tp 8 --nodes 64 --storage-bandwidth 46GB     # for your own node, storage and model
    python benchmarks/simulate.py --write-docs docs                                      # what this page says; --measure: with the small loads

Nobody here has a thousand nodes: **the figures of this page are simulated**, but for [the table of measured loads](#checked-with-real-loads).
The simulation replays the plans of real loads, block by block, with the code that finds [verdicts](measuring.md): readers, staging memory,
first bytes, streams that share a node's link and the storage, copies to the GPUs. Starting Ray and the engine is not part of it.

Each node is one replica of the model on {gpus} GPUs (tp={gpus}). Settings are the defaults: 16 requests of 8 MiB in flight on each rank. All ways of
loading have the same requests in flight, so they differ by what is read and sent. What was assumed is [below](#assumed).
"""

PICTURE = "\n![Seconds until all nodes have loaded, over the number of nodes](cold_starts.png)\n"

BOUNDS = """
After each time stands what bounds it: what saves most when it is left out. `storage` is what it serves to all nodes together, `other nodes` the rate at which
they send, `nothing alone` two limits that are equally near.
"""

WAYS = """
## Ways of loading

| way | who does it |
|---|---|
{rows}

Two of them are not built. They are here to show what they would be worth: {model} on {few} nodes from {storage} would take {cluster} over the same link and {fabric}
over EFA, where it takes {built} today. Each node would wait for its share of the first bytes only. All would wait for the slowest node, see
[below](#what-one-slow-node-costs).
"""

CHECK = """
## Checked with real loads

    python benchmarks/simulate.py --measure

Loads of 48 MiB from a local S3 server, through a proxy that delays and slows answers down. Every rank is a process, and every node a group of
processes that knows of no other. Each load is predicted from its plan, the delays that the proxy was told, and the speed of memory; nothing that was
measured of the load is used. The goal is 15%: **{met} of {number}** are within it. Seconds are medians of {rounds}, and in brackets the least and the
most. {machine}

| limited by | predicted | measured | error |
|---|---|---|---|
{rows}

- No load in which nodes send to each other was made, since that is not built.
- The simulation knows nothing of busy CPUs. With first bytes of 50 ms in place of 150 ms the load with memory for 4 blocks took 1.66 s on this machine where
  1.20 s were predicted: each block then waits for two processes to get their turn.
"""

ASSUMED = """
## Assumed

- **{s3}**: {s3_source}
- **{lustre}**: {lustre_source}
- **{machine}**: {machine_source}
- Between two nodes over the storage's link one block comes at {peer:.2f} GB/s: Amazon EC2 User Guide, 5 Gbit/s for a single flow outside of a placement
  group. Over EFA it comes at the rate of one card.
- First bytes are spread evenly over their range, in the small loads by a fifth: else all streams would wait together and receive together, which no real
  ones do. Streams share a link in equal parts.
- Broadcasts inside a node take the time of their bytes. Real ones wait for each other in rounds, so that row is a lower limit.
- Reading once for all nodes assumes that no two nodes ask a third at one moment. Among six nodes that are each replayed for themselves such moments cost
  less than 15%; a test holds them to that.

`benchmarks/cold_starts/scenarios.py` holds all of these figures. Change them there for another place.

## How a thousand nodes are simulated

One node is simulated and counted N times, since all nodes do the same at the same moments. That is no approximation: a test replays five nodes both
ways, and both take the same. Of a long load about
{max_blocks:,} blocks are replayed, and the second half of these goes on for the rest. {excerpts}. Tests hold the simulation to arithmetic: one limit alone is
a division, no load is faster than any one link allows, and no faster link makes a load slower.

It knows nothing of S3's throttling: a storage that is asked for too much serves its rate, where S3 answers 503 until it gives the prefix more. It knows
nothing of the CPUs either: {link:.1f} GB/s of TLS takes many of them ([performance.md](performance.md)).
"""


def write_page(simulated: Simulated, checked: Sequence[Checked], machine: str) -> str:
    """The page.

    Args:
        simulated: What was simulated.
        checked: Small loads, simulated and made.
        machine: On what these were made, as a sentence.
    """
    parts = [HEAD.format(gpus=GPU_NODE.num_gpus), "\n", _answers(simulated), PICTURE]
    parts += [f"\n## From {storage.name}\n\n{_table(simulated.starts, storage.name)}\n" for storage in STORAGES]
    parts.append(BOUNDS)
    ways = "\n".join(f"| {strategy.name} | {strategy.says} |" for strategy in STRATEGIES)
    parts += [_ways(simulated, ways), _settings(simulated), _stragglers(simulated)]
    if checked:
        parts.append(_check(checked, machine))
    s3, lustre = STORAGES
    parts.append(
        ASSUMED.format(
            s3=s3.name,
            s3_source=s3.source,
            lustre=lustre.name,
            lustre_source=lustre.source,
            machine=GPU_NODE.name,
            machine_source=GPU_NODE.source,
            peer=PEER_STREAM_RATE / 1e9,
            link=GPU_NODE.link_rate / 1e9,
            max_blocks=MAX_BLOCKS,
            excerpts=_excerpts(simulated),
        )
    )
    return "".join(parts)


def _ways(simulated: Simulated, rows: str) -> str:
    model, few = simulated.starts[0].model, SHOWN_NODES[1]
    built, cluster, fabric = (
        duration(_find(simulated, model, S3.name, sharing, few).seconds) for sharing in ("slices", "cluster", "fabric")
    )
    return WAYS.format(rows=rows, model=model, few=few, storage=S3.name, built=built, cluster=cluster, fabric=fabric)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(9.87), duration(98.7), duration(987), duration(98765)
    ('9.9 s', '99 s', '16 min', '27 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def size(num_bytes: int) -> str:
    """Decimal, as storages count.

    >>> size(141_000_000_000), size(72_250_000_000_000)
    ('141 GB', '72 TB')
    """
    return f"{num_bytes / 1e9:,.0f} GB" if num_bytes < 10e12 else f"{num_bytes / 1e12:,.0f} TB"


def _find(simulated: Simulated, model: str, storage: str, sharing: str, num_nodes: int) -> Start:
    strategy = next(strategy.name for strategy in STRATEGIES if strategy.sharing == sharing)
    key = (model, storage, strategy, num_nodes)
    return next(
        start for start in simulated.starts if (start.model, start.storage, start.strategy, start.num_nodes) == key
    )


def _answers(simulated: Simulated) -> str:
    """The figures that most readers came for, in sentences."""
    lines: list[str] = []
    for model in dict.fromkeys(start.model for start in simulated.starts):
        one, many = (_find(simulated, model, S3.name, "slices", number) for number in (1, 64))
        each, all_ranks = (_find(simulated, model, S3.name, "none", number) for number in (1, 64))
        cluster = _find(simulated, model, S3.name, "fabric", 64)
        lines.append(
            f"- **{model}**, {size(one.storage_bytes)}: one node takes {duration(one.seconds)}, bound by {_bound(one)}; 64 nodes "
            f"{duration(many.seconds)}, bound by {_bound(many)}. Where every rank reads everything: {duration(each.seconds)} and "
            f"{duration(all_ranks.seconds)}. Read once for 64 nodes over EFA: {duration(cluster.seconds)}."
        )
    s3, first = S3, _first_limited(simulated)
    return "\n".join(
        [
            *lines,
            f"- From {s3.name}, a node that reads once needs the prefix's limit of {s3.total_rate / 1e9:.0f} GB/s with {first} nodes or more. "
            "From there on seconds grow with nodes. Copies of the checkpoint under several prefixes help.",
            "- Up to there the wait for first bytes bounds each node. `concurrency` shortens it: see [below](#what-concurrency-brings).",
            "",
        ]
    )


def _first_limited(simulated: Simulated) -> int:
    """Nodes from which on the storage bounds the first model's way that is built."""
    model = simulated.starts[0].model
    return next(
        start.num_nodes
        for start in simulated.starts
        if (start.model, start.storage, start.strategy) == (model, S3.name, BUILT.name) and start.bound == "storage"
    )


def _bound(start: Start) -> str:
    words = {"storage": "the storage", "first byte": "the wait for first bytes", "stream rate": "the rate of streams"}
    return words.get(start.bound or "", start.bound or "what was not looked for")


def _table(starts: Sequence[Start], storage: str) -> str:
    heads = " | ".join(counted(number, "node") for number in SHOWN_NODES)
    lines = [f"| model | way | {heads} | read for 64 nodes |", "|---|---|" + "---|" * (len(SHOWN_NODES) + 1)]
    for model in dict.fromkeys(start.model for start in starts):
        for strategy in STRATEGIES:
            some = [
                start
                for number in SHOWN_NODES
                for start in starts
                if (start.model, start.storage, start.strategy, start.num_nodes)
                == (model, storage, strategy.name, number)
            ]
            cells = " | ".join(f"{duration(start.seconds)}, {start.bound}" for start in some)
            lines.append(f"| {model} | {strategy.name} | {cells} | {size(some[2].storage_bytes)} |")
    return "\n".join(lines)


def _settings(simulated: Simulated) -> str:
    heads = " | ".join(f"{number}" for number in CONCURRENCIES)
    lines = [
        "\n## What `concurrency` brings\n",
        f"{simulated.starts[0].model} on one node from {S3.name}, by the link of the node. Default: 16.\n",
        "![Seconds over concurrency](cold_starts_concurrency.png)\n",
        f"| link | {heads} |",
        "|---|" + "---|" * len(CONCURRENCIES),
    ]
    for link in LINKS_GBIT:
        some = [setting for setting in simulated.settings if setting.link_gbit == link]
        cells = " | ".join(f"{duration(setting.seconds)}, {setting.bound}" for setting in some)
        lines.append(f"| {link} Gbit/s | {cells} |")
    return "\n".join([*lines, ""])


def _stragglers(simulated: Simulated) -> str:
    lines = [
        "\n## What one slow node costs\n",
        f"{simulated.starts[0].model} on {STRAGGLER_NODES} nodes from {S3.name}; one node's link has {STRAGGLER_SHARE:.0%} of the rate. Whoever "
        "reads for itself waits for nobody. Where each node reads for all, all wait for the slow one: a cluster that reads once needs a way around "
        "slow nodes.\n",
        "| way | no node is slow | one is: the others | that one |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {each.strategy} | {duration(each.usual_seconds)} | {duration(each.others_seconds)} | {duration(each.slow_seconds)} |"
        for each in simulated.stragglers
    ]
    return "\n".join([*lines, ""])


def _excerpts(simulated: Simulated) -> str:
    each = [
        f"{excerpt.seconds:,.1f} s in place of {excerpt.whole_seconds:,.1f} s on {counted(excerpt.num_nodes, 'node')}"
        for excerpt in simulated.excerpts
    ]
    return f"So {simulated.starts[0].model} takes {', '.join(each)}, where all of its blocks are replayed"


def _check(checked: Sequence[Checked], machine: str) -> str:
    rows = "\n".join(
        f"| {each.name} | {each.predicted_seconds:.2f} s | {median(each.measured_seconds):.2f} s "
        f"({min(each.measured_seconds):.2f} to {max(each.measured_seconds):.2f}) | {each.error:+.0%} |"
        for each in checked
    )
    met = sum(abs(each.error) <= GOAL for each in checked)
    rounds = len(checked[0].measured_seconds)
    return CHECK.format(met=met, number=len(checked), rounds=f"{rounds} rounds", machine=machine, rows=rows)
