"""`gkd check`: the preflight alone."""

from rich.console import Console
from rich.table import Table

from gkd.config import Config
from launch.placement import plan_placement
from launch.preflight import check, describe
from launch.ray_session import joins_cluster, ray_session, resources
from launch.run_folder import find_start


def run_check(config: Config, console: Console) -> None:
    """Check a config and show what it would do.

    Raises:
        UserError: for the first thing found wrong.
    """
    facts = check(config)
    start = find_start(config, facts.data_fingerprint)
    if joins_cluster():
        with ray_session():
            places = plan_placement(config, *resources())
    else:
        places = plan_placement(config, *resources())
    table = Table(title=f"{config.run.name}: ready", show_header=False)
    for name, value in describe(config, facts, places):
        table.add_row(name, value)
    table.add_row("starts after step", f"{start.completed_steps:,}" + (" (finished)" if start.finished else ""))
    console.print(table)
    for warning in facts.warnings:
        console.print(f"[yellow]note:[/] {warning}")
