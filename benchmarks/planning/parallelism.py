"""Piper's published figures, the time to an answer, and experts placed on real routing.

Run ``python -m benchmarks.planning.parallelism``; writes ``benchmarks/results/plan-parallelism.md``. No time
limit is set anywhere; the solver's effort is counted work.

- Figures: what the formulas and the search give beside what Piper (arXiv 2605.05049) prints.
- Answers: seconds of one thread from a question to its plan, DeepSeek-V3 on H100, all meshes.
- Experts: load of the fullest device over the mean on windows that no policy has seen, for groups of 8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import RESULTS, data_folder, environment
from benchmarks.planning import piper_figures as published
from placement.calibration import DataSheetCalibration
from placement.errors import InfeasibleError
from placement.model import preset_model
from placement.model_shape import ModelShape
from placement.planning.parallelism import (
    Checkpointing,
    Exchange,
    Mesh,
    ParallelismPlan,
    ParallelismQuestion,
    SearchRanges,
    TrainingJob,
    plan_parallelism,
)
from placement.planning.parallelism.experts import CONTIGUOUS, EPLB, HILL_CLIMB, OURS, place_experts
from placement.planning.parallelism.network import network_of
from placement.planning.parallelism.piper import worst_migration_bytes
from placement.planning.transformer import TransformerShape
from placement.topology import parse_topology
from traces.readers import read_trace
from traces.statistics import build_profile

__all__ = ["fewest_nodes", "main"]

SEED = 0
WORK_S = 5.0
BATCHES = (32, 64, 96, 128, 192, 256, 1024)
"""Sequences of a step: Piper does not print its own."""

SAMPLES = Path(__file__).parents[2] / "placement" / "samples" / "traces"
WINDOWS = {"byte16": 4096, "gptoss20b_a": 2048, "olmoe64": 4096}


def full_model_question(model: published.FullModel, nodes: int, batch: int) -> ParallelismQuestion:
    """Return the question of one of figure 12's models."""
    return ParallelismQuestion(
        job=TrainingJob(transformer=model.shape, sequence_length=4096, global_batch=batch),
        topology=published.frontier(nodes, layer_tflops=model.layer_tflops),
        fast_domain=32,
        ranges=SearchRanges(
            data=(1,), micro_batch=(1,), virtual_stages=(1,), checkpointing=(model.checkpointing,)
        ),
    )


def fewest_nodes(model: published.FullModel, batch: int) -> tuple[int, ParallelismPlan]:
    """Return the fewest nodes that hold a model, and the plan on them."""
    for nodes in range(1, 65):
        try:
            return nodes, plan_parallelism(full_model_question(model, nodes, batch))
        except InfeasibleError:
            continue
    raise InfeasibleError(f"{model.name} does not fit on 64 nodes")


def migration_rows() -> Iterator[str]:
    """Yield table IV."""
    for row in published.MIGRATION_ROWS:
        shape = TransformerShape(moe=row.shape, num_attention_heads=1)
        sent = worst_migration_bytes(shape, num_devices=8) / row.unit_bytes
        unit = "GB" if row.unit_bytes == published.GB else "GiB"
        yield (
            f"| {row.shape.name} | {row.printed_size:.2f} | {sent:.2f} {unit} | "
            f"{100 * (sent / row.printed_size - 1):+.2f} % | {row.printed_ms:.1f} | "
            f"{1e3 * sent / published.MIGRATION_GB_S:.1f} |"
        )


def mesh_rows() -> Iterator[str]:
    """Yield what the search takes and refuses for X-MoE's models on 64 GB."""
    for size, nodes in (("medium", 4), ("large", 10), ("super", 64)):
        plan = plan_parallelism(
            ParallelismQuestion(
                job=TrainingJob(
                    transformer=published.xmoe(size), sequence_length=4096, global_batch=1024 * nodes
                ),
                topology=published.frontier(nodes),
                memory_bytes=64 * 10**9,
                fast_domain=8 * 4,
                ranges=SearchRanges(data=(1,), micro_batch=(1,), checkpointing=(Checkpointing.FULL,)),
            )
        )
        meshes = sorted({str(ranked.balanced.strategy.mesh) for ranked in plan.ranked})
        reasons = ", ".join(f"{count} {reason}" for reason, count in plan.rejected_by_reason.items())
        yield f"| {size} | {8 * nodes} | {', '.join(meshes)} | {reasons} |"


def model_rows() -> Iterator[str]:
    """Yield figure 12's models at several batches, on the fewest nodes that hold each."""
    for batch in BATCHES:
        cells, shares = [], []
        for model in published.FULL_MODELS:
            nodes, plan = fewest_nodes(model, batch)
            share = plan.best.balanced.utilisation
            shares.append(share)
            cells.append(f"{100 * share:.1f} ({8 * nodes}: {plan.best.balanced.strategy.mesh})")
        kept = "yes" if shares == sorted(shares, reverse=True) else "no"
        yield f"| {batch} | {' | '.join(cells)} | {kept} |"


def exchange_rows() -> Iterator[str]:
    """Yield flat over hierarchical all-to-alls on Frontier, by nodes and size."""
    model = ModelShape(
        name="exchange", num_layers=1, num_experts=1024, top_k=1, hidden_size=4096, expert_hidden_size=1
    )
    for nodes in (2, 16, 64, 128):
        network = network_of(published.frontier(nodes), DataSheetCalibration(), model)
        cells = []
        for mebibytes in (0.25, 1, 16, 256):
            pairs = mebibytes * 2**20 / model.token_bytes()
            flat, packed = (
                network.exchange_s(pairs, count=8 * nodes, stride=1, exchange=exchange)
                for exchange in Exchange
            )
            cells.append(f"{flat / packed:.2f}")
        yield f"| {nodes} | {' | '.join(cells)} |"


def answer_rows() -> Iterator[str]:
    """Yield the time to an answer."""
    model = preset_model("deepseek-v3")
    job = TrainingJob(
        transformer=TransformerShape(
            moe=model, num_attention_heads=128, dense_hidden_size=18432, vocabulary_size=129280
        ),
        sequence_length=4096,
        global_batch=8192,
    )
    for nodes in (32, 128, 512):
        for tensor in ((1,), (1, 2, 4, 8)):
            question = ParallelismQuestion(
                job=job, topology=parse_topology(f"h100:{nodes}x8"), ranges=SearchRanges(tensor=tensor)
            )
            began_s = time.process_time()
            plan = plan_parallelism(question)
            seconds = time.process_time() - began_s
            best = plan.best.best
            yield (
                f"| {8 * nodes:,} | {tensor[-1]} | {plan.search.num_meshes} | {plan.search.num_strategies} | "
                f"{len(plan.ranked)} | {seconds:.2f} | {best.strategy} | {100 * best.utilisation:.1f} % |"
            )


def expert_rows() -> Iterator[str]:
    """Yield load factors on held-out windows of the bundled trace, and of real ones where at hand."""
    for name, window in WINDOWS.items():
        file = (SAMPLES if name == "byte16" else data_folder() / "traces") / f"{name}.npz"
        if not file.exists():
            yield f"| {name} | not at hand | | | | | | |"
            continue
        profile = build_profile(read_trace(file), window_tokens=window)
        model = ModelShape(
            name=name,
            num_layers=profile.num_layers,
            num_experts=profile.num_experts,
            top_k=profile.top_k,
            hidden_size=2048,
            expert_hidden_size=1024,
        )
        began_s = time.process_time()
        experts = place_experts(
            profile,
            parse_topology("h100:1x8"),
            model,
            Mesh(pipeline=1, expert=8),
            calibration=DataSheetCalibration(),
            seed=SEED,
            work_s=WORK_S,
        )
        seconds = time.process_time() - began_s
        order = (CONTIGUOUS, EPLB, HILL_CLIMB, OURS)
        factors = " | ".join(f"{experts.policies[policy].held_out_factor:.4f}" for policy in order)
        fitted = [experts.policies[policy].fitted for policy in order]
        yield (
            f"| {name} | {profile.num_windows} | {factors} | {fitted[-1]:.4f} | {100 * experts.gap:.2f} % | "
            f"{seconds:.1f} |"
        )


SECTIONS = (
    (
        "Table IV: moving a layer's experts, 8 devices, 50 GB/s",
        "The print mixes GB and GiB; the unit is the one in which the formula meets it.",
        "| model | printed | formula | off by | printed ms | formula ms |\n|---|---|---|---|---|---|",
        migration_rows,
    ),
    (
        "Meshes of X-MoE's models on dies of 64 GB",
        "Two matrices per expert, full checkpointing, EP within 4 nodes of 8, DP 1.",
        "| model | dies | taken | meshes not taken |\n|---|---|---|---|",
        mesh_rows,
    ),
    (
        "Figure 12: utilisation of full models from the FLOP/s of single layers (figure 11)",
        "Predicted MFU in per cent (dies: mesh), on the fewest nodes that hold each model, sequences of\n"
        "4,096 tokens, micro-batches of 1, checkpointing as the paper notes.\n"
        "Printed: 53.8, 38.8, 29.0, 24.5, 19.8.\n"
        "The paper gives neither batch nor dies. The last column: is the published order kept?",
        "| sequences | Mixtral-8x7B | Scout | Mixtral-8x22B | DeepSeek-V2 | Maverick | order |\n"
        "|---|---|---|---|---|---|---|",
        model_rows,
    ),
    (
        "Flat over hierarchical all-to-all, by bytes that a device receives",
        "Piper reports 1.1 to 9 times; this model knows bytes and messages, not congestion.",
        "| nodes of 8 | 0.25 MiB | 1 MiB | 16 MiB | 256 MiB |\n|---|---|---|---|---|",
        exchange_rows,
    ),
    (
        "Time to an answer: DeepSeek-V3 on H100",
        "Seconds of one thread, from the question to the plan; all meshes, micro-batches of 1, 2 and 4.",
        "| devices | TP up to | meshes | strategies | fit | CPU s | best | MFU |\n"
        "|---|---|---|---|---|---|---|---|",
        answer_rows,
    ),
    (
        "Experts on groups of 8: load factor on windows held out",
        f"Fitted on every other window for balance; seed {SEED}, effort {WORK_S:g} s.",
        "| trace | windows | in order | EPLB | hill climbing | ours | ours, fitted | gap | CPU s |\n"
        "|---|---|---|---|---|---|---|---|---|",
        expert_rows,
    ),
)


def main() -> None:
    """Run everything and write the tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    where = environment()
    lines = [
        "# Plans of parallelism",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numpy {where['numpy']};",
        "one thread. Made by `python -m benchmarks.planning.parallelism`.",
    ]
    for title, words, heads, rows in SECTIONS:
        lines += ["", f"## {title}", "", words, "", heads]
        for row in rows():
            lines.append(row)
            print(row, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan-parallelism.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
