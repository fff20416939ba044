"""How does a plan look to other tools? Its blocks and pieces as Parquet, its figures as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_streamer.planning.pieces import PIECE_COLUMNS, STRIDED_COLUMNS, RowCopies, cut_pieces, cut_strided

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ray_streamer.planning.pattern_copies import StridedMove
    from ray_streamer.planning.read_plan import ReadPlan


def write_plan(plan: ReadPlan, folder: Path) -> None:
    """Writes `blocks.parquet`, `pieces.parquet` and `summary.json` into `folder`, which is made when it does not exist.

    Blocks are numbered per node; a piece names its node and block. Files and results go by name, ranks are global. A piece that
    is a part of a strided move has no runs, and says the move.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_nodes(plan, folder / "blocks.parquet", _blocks_of_node)
    _write_nodes(plan, folder / "pieces.parquet", _pieces_of_node)
    text = json.dumps(plan.summary().as_dict(), indent=2)
    (folder / "summary.json").write_text(f"{text}\n", encoding="utf-8")


def _write_nodes(plan: ReadPlan, path: Path, table_of: Callable[[ReadPlan, int], pa.Table]) -> None:
    """One file, node after node, so that no more than one node's rows are held twice."""
    first = table_of(plan, 0)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for node in range(1, len(plan.topology.nodes)):
            writer.write_table(table_of(plan, node))


def _blocks_of_node(plan: ReadPlan, node: int) -> pa.Table:
    node_plan = plan.node_plans[plan.node_plan_ids[node]]
    blocks = node_plan.blocks
    paths = pa.array([file.path for file in plan.index.files], pa.string())
    return pa.table(
        {
            "node": np.full(len(blocks), node, dtype=np.int32),
            "block": np.arange(len(blocks), dtype=np.int32),
            "path": pa.DictionaryArray.from_arrays(blocks.file_ids.astype(np.int32), paths),
            "start": blocks.starts,
            "stop": blocks.stops,
            "reader": np.array(plan.topology.nodes[node], dtype=np.int32)[node_plan.readers],
            "num_consumers": node_plan.consumers.sum(axis=1).astype(np.int16),
        }
    )


def _pieces_of_node(plan: ReadPlan, node: int) -> pa.Table:
    node_plan = plan.node_plans[plan.node_plan_ids[node]]
    tables: list[pa.Table] = []
    for rank in plan.topology.nodes[node]:
        rows = RowCopies.of(plan.index, plan.slices[rank])
        pieces = cut_pieces(rows, node_plan.blocks)
        strided, moves = cut_strided(rows, node_plan.blocks)
        plain = dict(zip(PIECE_COLUMNS, pieces.rows.T, strict=True))
        parts = dict(zip(STRIDED_COLUMNS, strided.rows.T, strict=True))
        texts = [_text_of(moves[number]) for number in parts.pop("move").tolist()]
        for block, columns, text in ((pieces.blocks, plain, None), (strided.blocks, parts, texts)):
            names = pa.array(
                [plan.slices[rank].results.names[at] for at in columns.pop("result").tolist()], pa.string()
            )
            known = {name: pa.array(values, pa.int64()) for name, values in columns.items()}
            places = {"node": node, "rank": rank, "block": block}
            tables.append(
                pa.table(
                    {
                        **{
                            name: np.broadcast_to(np.asarray(value, np.int32), len(names))
                            for name, value in places.items()
                        },
                        "result": names,
                        **{name: known.get(name, pa.nulls(len(names), pa.int64())) for name in PIECE_COLUMNS[1:]},
                        "move": pa.nulls(len(names), pa.string()) if text is None else pa.array(text, pa.string()),
                    }
                )
            )
    return pa.concat_tables(tables)


def _text_of(move: StridedMove) -> str:
    """A strided move in a few words: dtypes, and (size, stride in the tensor, stride in the result) of each dimension."""
    dims = [tuple(dim) for dim in move.view.dims]
    return f"{move.source_dtype.name} -> {move.target_dtype.name} {[*dims, *((size, 0, step) for size, step in move.repeats)]}"
