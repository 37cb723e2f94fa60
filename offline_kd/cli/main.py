"""The command line: which commands there are, and the only place that turns expected failures into messages.

Nothing heavy is imported here, nor at the top of any other file of this room: `--help`, `--version`, completion and
wrong options answer at once, and a command imports what it needs when its arguments have been read.
"""

import sys
from importlib import import_module

import click

from offline_kd.support.errors import OfflineKDError, did_you_mean

COMMANDS = {  # name -> the file of this room that has it as `command`, and one line for `--help`
    "run": ("run", "Every stage of RECIPE: teacher, store, students, report."),
    "cache-teacher": ("cache", "Stage 1: ask the teacher about every view of every image, once."),
    "distill": ("distill", "Stage 2: train the student of RECIPE from a store, without its teacher."),
    "train": ("train", "Plain supervised training: cross-entropy on labels only."),
    "report": ("report", "Compare finished run directories: a table, and a self-contained page with the curves."),
    "store": ("store", "Look at teacher stores, prove them, share them."),
    "data": ("data", "Make, list and prove datasets."),
    "taps": ("taps", "The modules of MODEL whose feature maps can be tapped."),
    "bench": ("bench", "Measure: the parts of a recipe against each other, or codecs on a store's logits."),
}


class Group(click.Group):
    """Imports the file of a command when that command is called; expected failures become one line and status 1.

    A bug keeps its traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"offline_kd.cli.{COMMANDS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OfflineKDError as error:
            message = str(error)
        except OSError as error:
            if not is_about_the_disk(error):
                raise
            message = (
                f"{error.filename or 'disk'}: {error.strerror}. What was committed is safe: "
                "make room or correct the permissions, and run the same command again."
            )
        except KeyboardInterrupt:
            click.echo("Interrupted. What was committed is safe: run the same command again to go on.", err=True)
            ctx.exit(130)
        from offline_kd.support.console import printable

        click.echo(printable(f"Error: {message}"), err=True)
        ctx.exit(1)


def is_about_the_disk(error: OSError) -> bool:
    """Whether a person can help: the disk is full or may not be written to, or a path is not what it should be."""
    import errno

    known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
    return error.errno in known


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next step instead of giving them back to the system.

    Otherwise every large activation is mapped, and its pages are zeroed, anew in every step: a student with 4,096
    templates trains 3.4 times slower on a CPU. Other C libraries have no such setting.
    """
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # names of glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="offline-kd", message="offline-kd %(version)s")
def main() -> None:
    """Run a teacher over an image dataset once, store what it says, train any number of students from the store.

    \b
    offline-kd run pipelines/digits.yaml --out runs/digits
    """
    keep_freed_memory()
