"""The `sla2` command: a group whose subcommands are imported only when they are called."""

from __future__ import annotations

import importlib
import sys

import click

# name -> (module that defines the click command `command`, one-line help)
COMMANDS = {
    "quickstart": (
        "sla2_eval.cli.commands.quickstart",
        "The whole pipeline on the built-in tiny model, in minutes.",
    ),
    "doctor": (
        "sla2_eval.cli.commands.doctor",
        "What works on this machine, what is missing, how to get it.",
    ),
    "train": (
        "sla2_eval.cli.commands.train",
        "Train the tiny teacher, a router (stage 1), or fine-tune (stage 2).",
    ),
    "import": (
        "sla2_eval.cli.commands.import_",
        "Checkpoints of other projects as folders that load here.",
    ),
    "generate": ("sla2_eval.cli.commands.generate", "Write videos for a file of prompts."),
    "score": (
        "sla2_eval.cli.commands.score",
        "Score a folder of videos, alone or against a reference folder.",
    ),
    "ablate": (
        "sla2_eval.cli.commands.ablate",
        "A grid of variants, each compared with full attention.",
    ),
    "report": (
        "sla2_eval.cli.commands.report",
        "Results of one run or several to one HTML page and tables.",
    ),
    "preference": (
        "sla2_eval.cli.commands.preference",
        "A blind page of two variants side by side, and the count of its votes.",
    ),
    "vbench": (
        "sla2_eval.cli.commands.vbench",
        "The same videos through the original VBench, and its results back.",
    ),
    "weights": ("sla2_eval.cli.commands.weights", "List and fetch the weights that metrics need."),
    "bench": (
        "sla2_eval.cli.commands.bench",
        "Time SLA2 against the dense baselines on this machine.",
    ),
    "compile": (
        "sla2_eval.cli.commands.compile",
        "Build every CUDA kernel ahead of time; needs no GPU.",
    ),
}


class LazyGroup(click.Group):
    """A click group over COMMANDS; `--help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[name][0]).command
        return _with_debug(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            raise click.UsageError(
                f"expected a command among {', '.join(COMMANDS)}, got {args[0]!r}", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.obj["debug"] = True


def _with_debug(command: click.Command) -> click.Command:
    """`command`, and its subcommands, with a --debug option."""
    if not any(parameter.name == "debug" for parameter in command.params):
        option = ["--debug"]
        command.params.append(
            click.Option(
                option,
                is_flag=True,
                expose_value=False,
                callback=_set_debug,
                help="Show the traceback.",
            )
        )
        for child in getattr(command, "commands", {}).values():
            _with_debug(child)
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sla2-eval", prog_name="sla2")
def sla2() -> None:
    """Sparse-linear attention for video diffusion transformers.

    \b
    Example:
      sla2 quickstart
    """


_with_debug(sla2)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    known = isinstance(
        error, ValueError | OSError | RuntimeError | FloatingPointError | ModuleNotFoundError
    )
    return (
        text
        if known and text
        else f"{type(error).__name__}: {text} (run with --debug for the traceback)"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 all went well, 2 bad arguments, settings or input
    files, 1 anything else.
    """
    from sla2_eval.parallel.tasks import hush

    state = {"debug": False}
    hush()
    try:
        result = sla2.main(arguments, prog_name="sla2", obj=state, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
        if state["debug"]:
            raise
    except (KeyboardInterrupt, click.Abort):
        message, code = "interrupted; run again to go on", 1
    except Exception as error:
        if state["debug"]:
            raise
        message, code = (
            _one_line(error),
            2 if isinstance(error, ValueError | FileNotFoundError) else 1,
        )
    print(f"sla2: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
