"""STAGE 2, whole: batches with stored targets -> student. One loop for distillation, live teachers and plain training.

All it knows of stage 1 is the store. A live teacher (`--online`) takes the store's place in the same loop, with the
same views in the same order, and exists to measure that the two agree.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack, cast

import torch

from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.fetching import Root
from offline_kd.data.labels import need_labels, refuse_other_labels
from offline_kd.data.manifest import Manifest
from offline_kd.data.tars import Proof
from offline_kd.distill.chosen_rows import chosen_images
from offline_kd.distill.compatibility import check_all, check_teachers
from offline_kd.distill.heads import with_heads
from offline_kd.distill.judging import Judged
from offline_kd.distill.loader import Loader
from offline_kd.distill.loop import fit
from offline_kd.distill.probe import images_to_learn_from
from offline_kd.distill.reader import Options, Source
from offline_kd.distill.resident import resident_if_it_fits
from offline_kd.distill.results import Result, Run, keep_teacher_evaluation
from offline_kd.distill.run_directory import run_place
from offline_kd.distill.student import Student, has_no_classes, new_student
from offline_kd.distill.teacher_signal import AskTeacher, Ensemble, live_signal, no_signal, stored_signal, wanted_of
from offline_kd.distill.tracking import check_tracker
from offline_kd.models.checkpoints import StateDict, WeightsFile, as_file, read_state_dict
from offline_kd.models.weights import find_weights
from offline_kd.objectives.bce import BCE
from offline_kd.objectives.ce import CE
from offline_kd.recipe import (
    AnyTerm,
    Recipe,
    TeacherStore,
    needs_teacher,
)
from offline_kd.store.features import USUAL_WIDTH
from offline_kd.store.join import proof_of_images
from offline_kd.store.layout import plan_views_per_group
from offline_kd.store.reader import Store
from offline_kd.store.signing import check_signed, open_as_demanded
from offline_kd.support.console import say
from offline_kd.support.downloads import DEFAULT_BYTES
from offline_kd.support.errors import RecipeError
from offline_kd.support.places import WritablePlace
from offline_kd.support.ranks import from_first, joined, rank, world
from offline_kd.views.epochs import view_groups

T = TypeVar("T")


class Shared:
    """What runs in one process, one after the other, have in common: stores, images, and what of them is on the device.

    Of every kind only what the last run used is kept; a run about anything else makes its own.
    """

    def __init__(self) -> None:
        self.kept = dict[str, tuple[object, object]]()

    def once(self, kind: str, about: object, make: Callable[[], T]) -> T:
        """What `make` gives; or what it gave the last time, where that was about the same."""
        if kind not in self.kept or self.kept[kind][0] != about:
            self.kept.pop(kind, None)  # first: there may be no room for both
            self.kept[kind] = about, make()
        return cast(T, self.kept[kind][1])


class DistillOptions(TypedDict, total=False):
    """What a run may be told besides what it is about."""

    objective: str | None  # which of the recipe's; None: the only one
    seed: int | None  # of weights, order and views; None: the recipe's first
    stores: Sequence[str]  # folders, URLs or manifest names; none: what the recipe says
    online: bool  # ask the live teacher instead of the stores
    download_bytes: int  # how much of remote stores and images is kept on the local disk
    allow_biased: bool  # train even where a store's codec has not kept what a term needs
    shared: Shared  # with runs before and after this one, in this process
    log: str | None  # a tracker that is told every epoch: "tensorboard", "wandb" or "trackio"


def distill(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    out: str | Path,
    device: torch.device,
    **options: Unpack[DistillOptions],
) -> Result:
    """Train the student of a recipe into the run directory `out`, from stores or with the live teacher.

    Under torchrun all its processes train one student together; the first one writes `out`.

    Args:
        out: a folder, or a URL of an object store.

    Raises StoreMismatch when a store was not made for this recipe's data, views and teacher, and TrainingError when
    `out` is of another run or another process writes it.
    """
    check_tracker(options.get("log"))
    with joined(device):
        prepared = prepare(recipe, manifest, roots, run_place(out), device, options)
        result = fit(*prepared)
        from_first(lambda: keep_teacher_evaluation(prepared[0]))
        return result


def prepare(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    out: WritablePlace,
    device: torch.device,
    options: DistillOptions,
) -> tuple[Run, Student, Loader, Judged, AskTeacher]:
    """What `fit` takes: what a run is, its student, its batches, the images it is evaluated on, and the teacher."""
    recipe = recipe.without_sweep()
    name, terms = recipe.objective(options.get("objective"))
    _refuse_part_of_a_pass(recipe)
    chosen, online = options.get("seed"), options.get("online", False)
    seed = recipe.seeds[0] if chosen is None else chosen
    wanted = wanted_stores(recipe, options.get("stores", ()))
    limit, shared = options.get("download_bytes", DEFAULT_BYTES), options.get("shared") or Shared()
    opened, ensemble = shared.once(
        "stores", (manifest, wanted, recipe.mix, limit), lambda: open_stores(recipe, manifest, wanted, limit)
    )
    # Where a store is read, the join compares every key, image and label with what the teacher saw, at every read.
    proof: Proof = "always" if online or not opened else "once"
    read = recipe.data, recipe.views, recipe.evaluation_crop, manifest, list(roots), limit
    images = shared.once("images", (read, proof), lambda: training_images(recipe, manifest, roots, proof, limit))
    for store in [] if online else opened:
        if not store.created.keeps_digests:
            say(f"{store.place}: {proof_of_images(store.created)}")
    if needs_teacher(terms) and not opened and not online:
        raise RecipeError(f"objective '{name}' needs a teacher: give --store, or --online for the live teacher.")
    if online and len(opened) > 1:
        raise RecipeError("--online asks the recipe's own teacher: give one --store beside it at most.")
    check_all(opened, recipe, images, [] if options.get("allow_biased") or online else terms)
    check_teachers(opened, [manifest.store(one.store).digest is not None for one in wanted], recipe, manifest)
    refuse_labels_that_are_not(recipe, images, terms)
    labelled = not has_no_classes(recipe, terms)
    evaluated = shared.once(
        "evaluation", (read, labelled), lambda: evaluation_images(recipe, manifest, roots, limit, labelled)
    )
    refuse_best_of_nothing(recipe, evaluated)
    about = recipe.student
    weights, initial = initial_weights(about.weights, manifest, roots, about.model, about.model_args)
    of_rows = read, proof, [store.digest for store in opened]
    rows = shared.once("rows", of_rows, lambda: chosen_images(recipe, images, opened))
    student = new_student(recipe, rows.trained, seed, device, terms, weights)
    ask: AskTeacher = no_signal
    asked, live_size = "none", None
    if needs_teacher(terms) and online:
        teacher = load_teacher(recipe, manifest, roots, len(images.dataset.classes), device)
        ask, asked = live_signal(teacher, recipe, terms, opened[0] if opened else None, device), "online"
        live_size = teacher.crop.size if teacher.crop else None
    elif needs_teacher(terms):
        ask, asked = stored_signal(opened, terms, device, ensemble), "store"
    groups = group_views(recipe, images, opened[0] if opened else None)
    source = source_of(recipe, rows.trained, [] if online else opened, terms, groups)
    loader = make_loader(recipe, source, seed, device, live_size, shared)
    student = with_heads(student, terms, loader, ask)
    digest, log = "+".join(store.digest for store in opened), options.get("log")
    only = opened[0] if len(opened) == 1 and asked == "store" else None
    run = Run(recipe, name, terms, seed, out, device, asked, digest, initial, None, log, rows.sha256, only)
    learn_from = partial(images_to_learn_from, loader, recipe.evaluation_crop is None)
    return run, student, loader, Judged(evaluated, rows.validation, learn_from), ask


def _refuse_part_of_a_pass(recipe: Recipe) -> None:
    if recipe.training.epochs % recipe.training.views_per_decode:
        raise RecipeError(
            f"training.epochs is {recipe.training.epochs}, training.views_per_decode {recipe.training.views_per_decode}"
            ": so many epochs pass at once, so it must divide their number."
        )


def refuse_labels_that_are_not(recipe: Recipe, images: BlockLoader, terms: Sequence[AnyTerm]) -> None:
    """Raise DataError for labels that are not of the teacher's kind, and for cross-entropy on a split without labels,
    where it would be 0."""
    where = f"{recipe.data.dataset}/{recipe.data.train}"
    refuse_other_labels(recipe.teacher.kind, images.split.labels, where)
    for term in terms:
        if isinstance(term, CE | BCE):
            need_labels(images.split.labels, where, f"the term '{term.term}' of the objective")


def refuse_best_of_nothing(recipe: Recipe, evaluated: BlockLoader) -> None:
    """Raise RecipeError where the best epoch is to be kept, and no labels say which that is."""
    if "best" in recipe.training.keep and evaluated.split.labels == "none" and recipe.data.validation is None:
        raise RecipeError("training.keep: best is by labels of the evaluation split, which has none. Leave best out.")


def wanted_stores(recipe: Recipe, references: Sequence[str] = ()) -> list[TeacherStore]:
    """The stores that a run learns from: these folders, URLs or names, or else those of the recipe."""
    if references or recipe.store is None:
        return [TeacherStore(store=reference) for reference in references]
    return [TeacherStore(store=recipe.store)] if isinstance(recipe.store, str) else recipe.store


def open_stores(
    recipe: Recipe, manifest: Manifest, wanted: Sequence[TeacherStore], download_bytes: int = DEFAULT_BYTES
) -> tuple[list[Store], Ensemble]:
    """Stores, and how their teachers are averaged."""
    opened = []
    for one in wanted:
        where = manifest.store(one.store)
        opened.append(open_as_demanded(where, download_bytes))
        if one.signed_by is not None:
            check_signed(opened[-1], Path(one.signed_by))
    return opened, Ensemble([one.weight for one in wanted], recipe.mix)


def initial_weights(
    weights: str | WeightsFile | None,
    manifest: Manifest,
    roots: Sequence[Root],
    model: str,
    args: Mapping[str, int | float | str | bool],
) -> tuple[StateDict | None, str]:
    """The weights that a training begins from, and the sha256 of their file; None and "": it begins from nothing."""
    if weights is None:
        return None, ""
    file = as_file(weights)
    path, sha256 = find_weights(file, manifest, roots, model, args)
    return read_state_dict(path, file.key, file.prefix), sha256


def training_images(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    prove: Proof = "always",
    download_bytes: int = DEFAULT_BYTES,
) -> BlockLoader:
    """The whole training split; the last two arguments are those of `HowRead`."""
    dataset = manifest.dataset(recipe.data.dataset)
    split = manifest.split(recipe.data.dataset, recipe.data.train).only(recipe.data.tars)
    return BlockLoader(
        dataset,
        split,
        roots,
        keep_bytes=recipe.data.keep_bytes // max(recipe.data.workers, 1),
        decode=recipe.views.is_exact,
        on_bad=recipe.data.bad_images,
        prove=prove,
        download_bytes=download_bytes,
    )


def evaluation_images(
    recipe: Recipe,
    manifest: Manifest,
    roots: Sequence[Root],
    download_bytes: int = DEFAULT_BYTES,
    labelled: bool = True,
) -> BlockLoader:
    """Args:
    labelled: whether labels are needed: students without classes do without them, and are not judged.
    """
    dataset, name = manifest.evaluation(recipe.data.dataset, recipe.data.evaluation)
    split = manifest.split(dataset, name)
    refuse_other_labels(recipe.teacher.kind, split.labels, f"{dataset}/{name}")
    if labelled:
        need_labels(split.labels, f"{dataset}/{name}", "evaluation")
    elif split.labels == "none":
        say(f"{dataset}/{name} has no labels: the student is not judged, and what is measured is its loss")
    return BlockLoader(
        manifest.dataset(dataset),
        split,
        roots,
        keep_bytes=recipe.data.keep_bytes,
        decode=recipe.evaluation_crop is None,
        on_bad=recipe.data.bad_images,
        download_bytes=download_bytes,
    )


def source_of(
    recipe: Recipe,
    images: BlockLoader,
    stores: Sequence[Store] = (),
    terms: Sequence[AnyTerm] = (),
    groups: list[range] | None = None,
) -> Source:
    """What a run reads: images, and what its terms want of the stores.

    Args:
        groups: the view groups of a store that is not read; by default those of `stores`, or of stage 1.
    """
    if groups is None:
        groups = group_views(recipe, images, stores[0] if stores else None)
    return Source(images, recipe.views, groups, stores, wanted_of(stores, terms))


def make_loader(
    recipe: Recipe,
    source: Source,
    seed: int,
    device: torch.device,
    live_size: int | None = None,
    shared: Shared | None = None,
) -> Loader:
    """The batches of a run, read as the recipe says: from what is kept on the device, or as a stream.

    Args:
        live_size: of the same views for a live teacher, in pixels.
        shared: where runs keep what they have on the device.

    Raises RecipeError where `training.resident` is `always`, and the device has no room.
    """
    options = Options(
        batch_size=recipe.training.batch_size,
        seed=seed,
        pool_blocks=recipe.training.pool_blocks,
        labelled_fraction=recipe.data.labelled_fraction,
        workers=recipe.data.workers,
        views_per_decode=recipe.training.views_per_decode,
        live_size=live_size,
        rank=rank(),
        world=world(),
    )
    choice = recipe.training.resident
    resident = (shared or Shared()).once(
        "resident",
        (choice, source, live_size, device),
        lambda: resident_if_it_fits(choice, source, options, device),
    )
    return Loader(source, options, device, resident=resident)


def group_views(recipe: Recipe, images: BlockLoader, store: Store | None) -> list[range]:
    """The view groups of a store that a recipe uses: the first ones, if the store holds more views.

    Without a store, views are grouped as stage 1 would group them, so that a run with the live teacher sees the same
    views in the same order.
    """
    if store is not None:
        return [group for group in store.identity.groups if group.stop <= recipe.views.num_views]
    per_group = plan_views_per_group(
        recipe.views,
        rows_per_block=max(tar.count for tar in images.split.tars),
        num_classes=USUAL_WIDTH if recipe.teacher.kind == "embedding" else len(images.dataset.classes),
        requested=recipe.capture.views_per_group,
    )
    return view_groups(recipe.views.num_views, per_group)
