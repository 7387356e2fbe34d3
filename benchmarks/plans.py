"""What fits where: `ireasoner plan` for published models on common GPUs, as a table for the docs.

    python benchmarks/plans.py

A cell says how a run with the default options fits: `whole` or `--shard`, with the GB that it takes at most on each
GPU, and the tokens of an update where they are fewer than the default. Parameters are those that the configs add up to.
"""

from __future__ import annotations

from ireasoner.studies.architectures import ARCHITECTURES
from ireasoner.studies.random_models import meta_policy
from ireasoner.training import planning
from ireasoner.training.config import resolve

MACHINES = ((1, 24), (1, 48), (1, 80), (8, 80))  # GPUs, GB of each


def cell(planned: planning.Plan) -> str:
    """How a run fits, in a few words."""
    if planned.best is None:
        return "no"
    how = "`--shard`" if planned.best.config.shard else "whole"
    found = f"{how}, {planned.best.needs.total / 1e9:.0f} GB"
    fewer = planned.best.tokens < planned.config.optimizer.tokens_per_batch
    return found + (f", {planned.best.tokens:,} tokens" if fewer else "")


def main() -> None:
    """Print the table."""
    heads = [f"{gpus} x {memory} GB" for gpus, memory in MACHINES]
    print("| model | parameters | weights | " + " | ".join(heads) + " | vLLM server |")
    print("|---" * (len(heads) + 4) + "|")
    for model in ARCHITECTURES:
        config = resolve({"model": model, "images": "."})
        policy = meta_policy(model, config.backbone)
        plans = [planning.plan(policy, config, gpus, memory * 1e9) for gpus, memory in MACHINES]
        weights, server = policy.footprint.weights - policy.footprint.adapters, plans[-1].server
        cells = [f"{weights / 2e9:.2f} B", f"{weights / 1e9:.0f} GB", *map(cell, plans)]
        cells.append(f"{server.gpus} x 80 GB" if server else "no")
        print(f"| {model.partition('/')[2].removesuffix('-Instruct')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
