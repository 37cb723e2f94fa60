"""`offline-kd store ...`: look at teacher stores, prove them, share them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from offline_kd.cli.explore import explore_command
from offline_kd.cli.import_ import import_command
from offline_kd.cli.options import (
    TARGET_KINDS,
    Inputs,
    common_options,
    known_stores,
    open_named,
    place_named,
    read_inputs,
    recipe_options,
)
from offline_kd.cli.sign import show_signed, sign_command
from offline_kd.support.errors import RecipeError

if TYPE_CHECKING:
    from offline_kd.store.verification import Verification


@click.group("store")
def command() -> None:
    """Look at teacher stores, prove them, share them. STORE is a folder, a URL or a name in the manifest.

    \b
    offline-kd store info runs/digits/store
    """


command.add_command(sign_command)
command.add_command(explore_command)
command.add_command(import_command)


@command.command("info")
@click.argument("reference", metavar="STORE")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def info_command(reference: str, as_json: bool, manifest_path: Path, data_root: tuple[str, ...]) -> None:
    """What a store holds, from whom, how faithfully, and which objectives it serves.

    \b
    offline-kd store info runs/digits/store
    offline-kd store info s3://team/stores/cifar10 --json
    """
    from offline_kd.store.info import info_groups, store_info
    from offline_kd.support.console import printable

    store = open_named(reference, manifest_path)
    if as_json:
        click.echo(json.dumps(store_info(store), indent=2))
        return
    groups = info_groups(store)
    width = max(len(name) for facts in groups.values() for name in facts)
    for title, facts in groups.items():
        click.echo(title)
        for name, value in facts.items():
            click.echo(printable(f"  {name:<{width}}  {value}"))


@command.command("verify")
@click.argument("reference", metavar="STORE")
@click.option("--quick", is_flag=True, help="Ledger, presence and sizes only; nothing large is read.")
@click.option("--dataset", "with_dataset", is_flag=True, help="Compare keys, images and labels with the dataset too.")
@click.option("--teacher", "rows", type=click.IntRange(min=1), help="Ask the teacher of --recipe again about N rows.")
@click.option("--all", "all_rows", is_flag=True, help="Ask the teacher of --recipe again about every row.")
@click.option(
    "--recipe", "recipe_path", type=click.Path(path_type=Path), help="Names the teacher for --teacher and --all."
)
@click.option("--device", default="auto", show_default=True, help="For --teacher and --all.")
@click.option(
    "--signed-by", type=click.Path(path_type=Path), metavar="PUBLIC_KEY", help="It must be signed by the owner of this."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@common_options
def verify_command(
    reference: str,
    quick: bool,
    with_dataset: bool,
    rows: int | None,
    all_rows: bool,
    recipe_path: Path | None,
    device: str,
    signed_by: Path | None,
    as_json: bool,
    manifest_path: Path,
    data_root: tuple[str, ...],
) -> None:
    """Prove a store: every file is read, hashed, unpacked and looked at. Exit 1 and a list of places on any fault.

    What each option finds of a store that was changed with all its hashes is a table in docs/trust.md.

    \b
    offline-kd store verify runs/digits/store
    offline-kd store verify s3://team/stores/cifar10 --quick --signed-by public.pem
    offline-kd store verify stores/cifar10@sha256:0123...
    offline-kd store verify stores/cifar10 --teacher 1000 --recipe cifar10/resnet56_resnet20_cpu
    """
    from offline_kd.cache.fidelity import ask_again
    from offline_kd.data.manifest import data_roots, load_manifest
    from offline_kd.store.comparison import images_of
    from offline_kd.store.verification import verify
    from offline_kd.support.console import say, show_table

    where = known_stores(manifest_path).store(reference)
    images = None
    if with_dataset:
        roots = data_roots(data_root)
        images = images_of(open_named(reference, manifest_path), load_manifest(manifest_path), roots)
    place = place_named(reference, manifest_path)
    result = verify(place, quick=quick, images=images, targets=where.targets, digest=where.digest)
    show_faults(result, reference, as_json)
    if result.faults:
        sys.exit(1)
    store = open_named(reference, manifest_path)  # with the digest that was asked for
    if signed_by is not None:
        show_signed(store, reference, signed_by)
    if rows is None and not all_rows:
        return
    if recipe_path is None:
        raise RecipeError("--teacher and --all need --recipe, which names the teacher.")
    recipe, manifest, roots, on = read_inputs(recipe_path, (), manifest_path, data_root, device)
    found = ask_again(store, recipe, manifest, roots, None if all_rows else rows, on)
    before = store.manifest.fidelity.get(store.targets) if store.manifest else None
    known = before.model_dump(mode="json") if before else {}
    now = found.model_dump(mode="json")
    table = [
        [name, *("not measured" if one.get(name) is None else f"{one[name]}" for one in (now, known))] for name in now
    ]
    show_table(f"{reference}: the teacher, asked again", ["field", "now", "when finished"], table)
    say(f"{reference}: the teacher was asked again about {found.looked_at}")


def show_faults(result: Verification, reference: str, as_json: bool) -> None:
    from offline_kd.store.verification import faults_as_json
    from offline_kd.support.console import printable, say

    if as_json:
        click.echo(faults_as_json(result))
        return
    for fault in result.faults:
        click.echo(printable(f"{fault.file}: {fault.problem}"))
    for note in result.notes:
        say(printable(f"{reference}: {note}"))
    found = f"{len(result.faults)} FAULTS" if result.faults else "no fault"
    found += f"; {result.leftovers} files of writers at work, or ended: harmless" if result.leftovers else ""
    say(f"{reference}: {result.mode} verification of {result.objects:,} objects, {result.bytes:,} bytes: {found}")


@command.command("repair")
@click.argument("reference", metavar="STORE")
@recipe_options
@click.option("--remove-extra", is_flag=True, help="Delete files that do not belong to the store, too.")
def repair_command(reference: str, recipe_path: Path, remove_extra: bool, **inputs: Unpack[Inputs]) -> None:
    """Find what is wrong with STORE and do exactly those blocks again, with the teacher of RECIPE.

    Without the teacher, `store pull` over a damaged copy fetches what is wrong from another one.

    \b
    offline-kd store repair runs/digits/store runs/digits/recipe.yaml
    """
    from offline_kd.cache.repair import repair
    from offline_kd.store.opening import open_store
    from offline_kd.support.console import say
    from offline_kd.support.places import place_at

    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    place = place_at(manifest.store(reference).location)

    def show(result: Verification) -> None:
        show_faults(result, reference, as_json=False)

    result = repair(place, recipe, manifest, roots, device, show, remove_extra)
    if any(not fault.is_extra for fault in result.faults):
        sys.exit(1)
    say(f"{reference}: sha256:{open_store(place).digest}")


@command.command("plan")
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan_command(recipe_path: Path, as_json: bool, **inputs: Unpack[Inputs]) -> None:
    """What capturing RECIPE would cost, from a warm-up of some seconds, and from how many students on it pays.

    \b
    offline-kd store plan cifar10/resnet56_resnet20_cpu
    """
    from offline_kd.cache.estimate import plan
    from offline_kd.support.console import show_table

    recipe, manifest, roots, device = read_inputs(recipe_path, **inputs)
    found = plan(recipe, manifest, roots, device)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"total_bytes": sum(found.bytes.values())}, indent=2))
        return
    total = sum(found.bytes.values())
    table = [
        ["rows", f"{found.rows:,}"],
        ["bytes", f"{total:,} ({total / found.rows:.1f} per row)"],
        *[[f"  {kind}", f"{size:,}"] for kind, size in found.bytes.items()],
        ["objects", f"{found.objects:,}"],
        ["images through the teacher", f"{found.teacher_passes:,}"],
        [
            "time of a view, teacher alone / whole stage 1",
            f"{1e3 * found.teacher_seconds_per_view:.3f} / {1e3 * found.seconds_per_view:.3f} ms",
        ],
        ["time of the capture", duration(found.capture_seconds)],
        ["what a live teacher would add to one student", duration(found.student_teacher_seconds)],
        ["students from which on the store pays", f"{found.break_even_students:,}"],
    ]
    show_table(f"{recipe.name} on {device}", ["", "estimate"], table)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def copy_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.argument("source", metavar="FROM"),
            click.argument("target", metavar="TO"),
            click.option("--blocks", metavar="A:B", help="Take blocks A to B - 1 only."),
            click.option("--views", metavar="0:N", help="Take the first N views only."),
            click.option(
                "--only", type=click.Choice(TARGET_KINDS), multiple=True, help="Take these kinds of targets only."
            ),
        ]
    ):
        command = option(command)
    return common_options(command)


class CopyOptions(TypedDict):
    """What `copy_options` hand to a command."""

    source: str
    target: str
    blocks: str | None
    views: str | None
    only: tuple[str, ...]
    manifest_path: Path
    data_root: tuple[str, ...]


@command.command("push")
@copy_options
def push_command(**options: Unpack[CopyOptions]) -> None:
    """Copy a store to where the team can reach it. Interrupted, the same command goes on.

    \b
    offline-kd store push runs/digits/store s3://team/stores/digits
    """
    _copy(options)


@command.command("pull")
@copy_options
def pull_command(**options: Unpack[CopyOptions]) -> None:
    """Copy a store, or a part of it, from where the team keeps it. Over a damaged copy, it repairs that.

    \b
    offline-kd store pull s3://team/stores/digits stores/digits
    offline-kd store pull https://example.org/stores/digits stores/digits --views 0:5 --only logits
    """
    _copy(options)


def _copy(options: CopyOptions) -> None:
    from offline_kd.store.serving import describe
    from offline_kd.store.sync import copy_store
    from offline_kd.support.console import say

    where = known_stores(options["manifest_path"]).store(options["source"])
    some_views = from_to("--views", options["views"])
    if some_views is not None and some_views.start:
        raise RecipeError(f"--views {options['views']}: a copy has the first views, write 0:N.")
    copied = copy_store(
        where.location,
        options["target"],
        blocks=from_to("--blocks", options["blocks"]),
        views=some_views.stop if some_views else None,
        only=options["only"] or None,
        digest=where.digest,
        signed_by=where.signed_by,
    )
    say(
        f"{options['target']}: {describe(copied.held)}, sha256:{copied.digest}; {copied.files:,} files, "
        f"{copied.bytes:,} bytes, {copied.already_there:,} of them were there already"
    )


def from_to(option: str, text: str | None) -> range | None:
    if text is None:
        return None
    parts = re.fullmatch(r"(\d+):(\d+)", text)
    if parts is None or not int(parts[1]) < int(parts[2]):
        raise RecipeError(f"{option} {text}: write A:B with A < B, such as 0:10.")
    return range(int(parts[1]), int(parts[2]))


@command.command("inspect")
@click.argument("reference", metavar="STORE")
@click.option("--key", required=True, help="Key of the sample.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
@common_options
def inspect_command(reference: str, key: str, out: Path, manifest_path: Path, data_root: tuple[str, ...]) -> None:
    """A page about one sample: its views, the teacher's five likeliest classes, the template map over the image.

    \b
    offline-kd store inspect runs/digits/store --key 0042 --data-root runs/digits/data --out 0042.html
    """
    from offline_kd.data.manifest import data_roots, folders_of, load_manifest
    from offline_kd.store.sample_page import write_inspect_page
    from offline_kd.support.console import say

    store = open_named(reference, manifest_path)
    dataset = load_manifest(manifest_path).dataset(store.identity.dataset.name)
    write_inspect_page(store, key, folders_of(dataset, data_roots(data_root)), out)
    say(f"{out} written")
