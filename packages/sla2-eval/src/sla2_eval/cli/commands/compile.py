"""sla2 compile: every CUDA kernel built ahead of time, with what each one uses."""

from __future__ import annotations

import click

from sla2_eval.cli.commands.tables import show

_COLUMNS = (
    "kernel",
    "arch",
    "threads",
    "registers",
    "ceiling",
    "spills",
    "stack",
    "shared",
    "blocks_per_sm",
    "occupancy",
)


@click.command("compile")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    help="Architecture, such as sm_90a; several times for several. Default: all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(archs: tuple[str, ...], as_json: bool) -> int | None:
    """Build every kernel for these architectures into the cache; needs NVRTC, no GPU.

    Registers are a thread's, shared memory a block's in bytes; occupancy is resident threads over
    the most there can be. Ends with 1 if a kernel spills or is over its limits.

    \b
    Example:
      sla2 compile --arch sm_90a --arch sm_120a
    """
    from concurrent.futures import ThreadPoolExecutor

    from sla2_kernels.compile import compile_kernel
    from sla2_kernels.gate import row_of
    from sla2_kernels.kernels import all_specs
    from sla2_kernels.specs import ARCHITECTURES

    from sla2_eval.runs.progress import ProgressDisplay

    if unknown := [arch for arch in archs if arch not in ARCHITECTURES]:
        raise click.BadParameter(
            f"expected one of {', '.join(ARCHITECTURES)}, got {unknown[0]!r}", param_hint="--arch"
        )
    specs = [spec for arch in archs or ARCHITECTURES for spec in all_specs(arch)]
    with ThreadPoolExecutor(2) as pool, ProgressDisplay() as report:
        rows = []
        for spec, built in zip(specs, pool.map(compile_kernel, specs)):
            rows.append(row_of(spec, built))
            report("kernels", len(rows), len(specs))
    show(rows, _COLUMNS, as_json=as_json)
    problems = [problem for row in rows for problem in row["problems"]]
    for problem in problems:
        click.echo(problem, err=True)
    return int(bool(problems))
