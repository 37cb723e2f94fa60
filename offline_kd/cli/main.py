"""The command line: which commands there are, and the only place that turns expected failures into messages.

Nothing heavy is imported here, nor at the top of any other file of this room: `--help`, `--version`, completion and
wrong options answer at once, and a command imports what it needs when its arguments have been read.
"""

import contextlib
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import click

from offline_kd.support.errors import OfflineKDError, did_you_mean

COMMANDS = {  # name -> the file of this room that has it as `command`, and one line for `--help`
    "init": ("init", "Begin here: a folder of pictures becomes a dataset and a recipe that `run` takes."),
    "run": ("run", "Every stage of RECIPE: teacher, store, students, report."),
    "cache-teacher": ("cache", "Stage 1: ask the teacher about every view of every image, once."),
    "distill": ("distill", "Stage 2: train the student of RECIPE from a store, without its teacher."),
    "train": ("train", "Plain supervised training: cross-entropy on labels only."),
    "evaluate": ("evaluate", "How good a trained STUDENT is on a split: top-1, top-5, calibration, classes."),
    "predict": ("predict", "What a trained STUDENT says of IMAGES: classes and probabilities."),
    "export": ("export", "Write a trained STUDENT for other programs, and compare both."),
    "report": (
        "report",
        "Compare finished run directories: a table, a self-contained page, and the same as CSV and JSON.",
    ),
    "store": ("store", "Look at teacher stores, prove them, share them."),
    "data": ("data", "Make, list and prove datasets."),
    "recipe": ("recipe", "Packaged recipes, and what every field of a recipe means."),
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            if not is_text(argument):
                ctx.fail(f"{argument[:80]!a}: names and paths are UTF-8 text without NUL characters.")
            if re.fullmatch("(--[a-z-]+=)?", argument):
                ctx.fail(f"'{argument}': an empty value. Is a variable of the shell not set?")
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OfflineKDError as error:
            message = str(error)
        except (OSError, ValueError) as error:
            problem = about_a_file(error)
            if problem is None:
                raise
            message = problem
        except KeyboardInterrupt:
            click.echo("Interrupted. What was committed is safe: run the same command again to go on.", err=True)
            ctx.exit(130)
        from offline_kd.support.console import printable

        line = printable(f"Error: {of_rank()}{message}")
        click.echo(line, err=True)
        end_rank(line)
        ctx.exit(1)


def of_rank() -> str:
    """How a message begins that one of several processes gives."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ
    return f"rank {os.environ['RANK']}: " if several else ""


def end_rank(line: str) -> None:
    """Tell torchrun why a rank fails, and end it if it has met the others."""
    import json
    import time

    file, ranks = os.environ.get("TORCHELASTIC_ERROR_FILE", ""), sys.modules.get("offline_kd.support.ranks")
    if file:
        # torchrun names who failed in the first second: never one that ends because another did, within the same one.
        second = int(time.time()) + (ranks is not None and ranks.ANOTHER_ENDED in line)
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": str(second)}), encoding="utf-8")
    if ranks is not None:
        ranks.end_at_once_among_others()


def is_text(argument: str) -> bool:
    """Whether files, keys and messages can have this name: what is not UTF-8 reaches Python as lone surrogates."""
    return "\0" not in argument and not any("\ud800" <= char <= "\udfff" for char in argument)


def about_a_file(error: OSError | ValueError) -> str | None:
    """One line where a person can help: the disk is full, or a path is not what it should be; None for a bug."""
    import errno

    if isinstance(error, ValueError):
        # Of a path in a recipe or manifest; those of the command line were looked at.
        found = str(error).startswith("embedded null")
        return "a path in the recipe or the manifest contains a NUL character: correct it." if found else None
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
    wrong = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)
    file = str(error.filename) if error.filename is not None else None
    if error.errno in full:
        return (
            f"{file or 'disk'}: {error.strerror}. What was committed is safe: make room or correct the permissions, "
            "and run the same command again."
        )
    if error.errno in wrong and file is not None:
        shown = file if len(file) <= 200 else f"{file[:200]}... ({len(file):,} characters)"
        return f"{shown}: {error.strerror}. Give another path."
    return None


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
    offline-kd run digits
    """
    keep_freed_memory()
