"""What one run of stage 1 works on: a new store, what an unfinished one lacks, or what a finished one shall gain."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from offline_kd.cache.codec_choice import choose_codec
from offline_kd.cache.feature_codes import identify_features
from offline_kd.cache.last_layer import last_layer
from offline_kd.cache.tables import identify_decisions
from offline_kd.cache.teacher import Measured, gate
from offline_kd.data.blocks import BlockLoader, ImageBlock
from offline_kd.data.checking import dataset_fingerprint
from offline_kd.data.fetching import Root
from offline_kd.data.labels import need_labels, refuse_other_labels
from offline_kd.data.manifest import Manifest
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import AutoCodec, CaptureRecipe
from offline_kd.store.decisions import SubclassDecisions
from offline_kd.store.evaluation_beside import keep_evaluation
from offline_kd.store.features import USUAL_WIDTH, FeaturesIdentity
from offline_kd.store.identity import DatasetIdentity, TeacherIdentity
from offline_kd.store.layout import Part, parts_of, plan_views_per_group
from offline_kd.store.objects import read_metadata
from offline_kd.store.opening import read_addition, read_identity
from offline_kd.store.reader import Store, parse_metadata, stored_object
from offline_kd.store.schema import SCHEMA_VERSION, Addition, StoreIdentity, StoreManifest, Tapped
from offline_kd.store.writer import create_addition, create_or_resume, manifest_bytes, read_entries
from offline_kd.support.console import say
from offline_kd.support.errors import StoreCorrupt, StoreMismatch
from offline_kd.support.places import Place
from offline_kd.views.epochs import view_groups
from offline_kd.views.render import decoder_versions, plain_images

TAPPED = "decisions", "features"  # fields of an identity, to which more may be added later


@dataclass(frozen=True)
class Capture:
    """What one run of stage 1 works on."""

    recipe: CaptureRecipe
    loader: BlockLoader
    teacher: Teacher | None  # None: its answers are imported, and nobody can ask it
    device: torch.device
    place: Place
    created: StoreIdentity  # as in store.json
    additions: list[Addition]  # all of the store, those of this run included
    own_parts: list[str]  # that this run commits
    num_views: int

    @property
    def groups(self) -> list[range]:
        return view_groups(self.num_views, self.created.views_per_group)

    @property
    def asked(self) -> Teacher:
        """The teacher, of a capture that asks it."""
        assert self.teacher is not None
        return self.teacher

    def identity_of(self, part: str) -> StoreIdentity:
        """The store as this part sees it: what its teacher is asked for."""
        added = next((one for one in self.additions if one.name == part), None)
        update = {"views": self.created.views.with_count(self.num_views)}
        if added is None:
            return self.created.model_copy(update=update)
        about = {name: getattr(added, name) for name in ("teacher", "codec", *TAPPED)}
        return self.created.model_copy(update=update | about)


def refuse_uneven_views(capture: Capture) -> None:
    """Views come in whole groups, and the same ones for a teacher's logits and all its decisions and features.

    Raises StoreMismatch otherwise.
    """
    place, created, num_views = capture.place, capture.created, capture.num_views
    if num_views % created.views_per_group:
        raise StoreMismatch(
            f"{place}: stores views in groups of {created.views_per_group}, which does not divide the recipe's "
            f"{num_views}. Use a multiple: --set views.count=..."
        )
    manifest = current_manifest(place)
    stored = manifest.views if manifest else {}
    parts = parts_of(created, capture.additions)
    for part, count in stored.items():
        same_targets = parts[part].targets == parts[capture.own_parts[0]].targets
        if same_targets and part not in capture.own_parts and num_views > count:
            raise StoreMismatch(
                f"{place}: holds {_named(parts[part])} of {count} views, and the recipe, which has {num_views} views, "
                "does not have them. Add them to capture."
            )
    most = max((count for part, count in stored.items() if part in capture.own_parts), default=0)
    lacking = [part for part in capture.own_parts if stored.get(part, 0) < most]
    if lacking and num_views < most:
        raise StoreMismatch(
            f"{place}: holds {most} views, the recipe adds {', '.join(lacking)} for {num_views} only. Add for all: "
            f"--set views.count={most}"
        )


def _named(part: Part) -> str:
    return " and ".join(f"{kind} {', '.join(names)}" for kind, names in _by_kind(part.tapped).items() if names)


def store_of(capture: Capture, targets: str, identity: StoreIdentity, names: Iterable[str]) -> Store:
    """The store as far as these ledger entries reach; raises FileNotFoundError for one that is not there."""
    entries = {name: stored_object(content).sha256 for name, content, _ in read_entries(capture.place, names)}
    identity = identity.model_copy(update={"views": identity.views.with_count(capture.num_views)})
    return Store(capture.place, capture.created, capture.additions, targets, identity, entries, digest="")


@dataclass(frozen=True)
class Announcement:
    """What a capture is going to write about itself before its first block."""

    created: StoreIdentity  # as store.json must be
    additions: list[Addition]  # all of the store: found there, and of this capture
    new: list[Addition]  # those of this capture, in the order in which they are created
    own_parts: list[str]  # that this capture commits


def announce(
    place: Place, wanted: StoreIdentity, recipe: CaptureRecipe, add: bool
) -> tuple[StoreIdentity, list[Addition], list[str]]:
    """Create the store, or what of the recipe it lacks: identity, all additions, and the parts of this capture.

    Raises StoreMismatch, and writes nothing, when the store is a partial copy or another capture.
    """
    existing, additions = None, []
    if place.size("store.json") is not None:
        _, existing = read_identity(place)
        manifest = current_manifest(place)
        if manifest and manifest.held:
            raise StoreMismatch(
                f"{place}: is a partial copy ({manifest.held.model_dump(mode='json')}), which cannot be added to. Pull "
                "all of the store, or capture into another --store."
            )
        additions = _additions_at(place)
    planned = plan_announcement(wanted, existing, additions, recipe.name if add else None)
    created = create_or_resume(place, planned.created)
    all_additions = planned.additions
    for one in planned.new:
        all_additions = _with(all_additions, create_addition(place, created, one))
    return created, all_additions, planned.own_parts


def plan_announcement(
    wanted: StoreIdentity, existing: StoreIdentity | None, additions: list[Addition], add_as: str | None
) -> Announcement:
    """What a capture of `wanted` writes where a store with these additions exists, or none; nothing is written here.

    Args:
        add_as: the name under which another teacher may be added; None: it may not.
    """
    if existing is None:
        return Announcement(wanted, [], [], [""])
    same_teacher = (existing.teacher.what_is_asked, existing.codec) == (wanted.teacher.what_is_asked, wanted.codec)
    new: list[Addition] = []
    began: StoreIdentity | Addition  # these targets
    if same_teacher or add_as is None:
        targets, began = "", existing
        first = {"name": existing.name, **_only(wanted.tapped, existing)}
    else:
        targets = add_as
        began = next((one for one in additions if one.name == targets), wanted)
        first = {field: getattr(existing, field) for field in ("name", "teacher", "codec", *TAPPED)}
        about = {"teacher": wanted.teacher, "codec": wanted.codec, **_only(wanted.tapped, began)}
        new.append(Addition(name=targets, extends=None, **about))
    extending = [one for one in additions if one.extends == targets]
    _refuse_other_kind(wanted, [began, *extending])
    more = {name: about for name, about in wanted.tapped.items() if name not in began.tapped}
    for one in extending:
        if taken := {name: more.pop(name) for name in one.tapped if name in more}:
            new.append(one.model_copy(update=_by_kind({**one.tapped, **taken})))
    if more:
        tap_name = "-".join([*([targets] if targets else []), *more])[:100]
        about = {"teacher": wanted.teacher, "codec": wanted.codec, **_by_kind(more)}
        new.append(Addition(name=tap_name, extends=targets, **about))
    own_parts = list(dict.fromkeys([targets, *(one.name for one in new)]))
    return Announcement(wanted.model_copy(update=first), additions, new, own_parts)


def _only(tapped: Mapping[str, Tapped], of: StoreIdentity | Addition) -> dict[str, Any]:
    """Decisions and features of the names that are there already, as fields of an identity."""
    return _by_kind({name: about for name, about in tapped.items() if name in of.tapped})


def _by_kind(tapped: Mapping[str, Tapped]) -> dict[str, Any]:
    """As fields of an identity."""
    features = {name: about for name, about in tapped.items() if isinstance(about, FeaturesIdentity)}
    return {"decisions": {name: tapped[name] for name in tapped if name not in features}, "features": features}


def _refuse_other_kind(wanted: StoreIdentity, there: Sequence[StoreIdentity | Addition]) -> None:
    """Raise StoreMismatch for features that are called like decisions of the same targets, or the other way round."""
    for name, about in wanted.tapped.items():
        if any(name in one.tapped and type(one.tapped[name]) is not type(about) for one in there):
            kinds = ["features", "decisions"]
            here, other = kinds if isinstance(about, FeaturesIdentity) else reversed(kinds)
            raise StoreMismatch(f"capture.{here}.{name}: the store has {other} of that name. Use another one.")


def _with(additions: list[Addition], one: Addition) -> list[Addition]:
    return [*(other for other in additions if other.name != one.name), one]


def identify(
    recipe: CaptureRecipe,
    manifest: Manifest,
    roots: Sequence[Root],
    loader: BlockLoader,
    teacher: Teacher,
    place: Place,
    device: torch.device,
) -> StoreIdentity:
    """Everything the store will be about. The teacher passes its gate here, unless the store says it did."""
    refuse_other_labels(teacher.kind, loader.split.labels, f"{recipe.data.dataset}/{recipe.data.train}")
    existing = read_identity(place)[1] if place.size("store.json") is not None else None
    there: list[StoreIdentity | Addition] = [existing] if existing else []
    if existing and place.size(f"additions/{recipe.name}.json") is not None:
        there.append(read_addition(place, recipe.name))
    asked = teacher.kind, teacher.weights_sha256, teacher.weights_part, teacher.classes
    known = next((one for one in there if one.teacher.what_is_asked == asked), None)
    if known:
        about = known.teacher
        measured = Measured(about.evaluated_on, about.measured_top1, about.measured_map, about.measured_neighbours)
        targets = "" if isinstance(known, StoreIdentity) else known.name
        added = [one.features for one in _additions_at(place) if one.extends == targets]
        features = {name: about for one in (known.features, *added) for name, about in one.items()}
        known = known.model_copy(update={"features": features})
    else:
        measured, answered = gate(teacher, recipe, manifest, roots, device)
        _say_what_was_measured(teacher, measured)
        if answered is not None:
            keep_evaluation(place, teacher.weights_sha256, answered, loader.dataset.classes)
    return describe_capture(recipe, loader, teacher, measured, existing, known, device)


def _say_what_was_measured(teacher: Teacher, measured: Measured) -> None:
    expected = teacher.expected
    if measured.percent is None:
        say(f"teacher '{teacher.name}': NOTHING WAS MEASURED, {measured.evaluated_on} has no labels")
        return
    stated = f"expected {expected.percent:.2f}" if expected else "NO EXPECTED ACCURACY IS KNOWN"
    say(f"teacher '{teacher.name}': {measured.name} {measured.percent:.2f} % on {measured.evaluated_on}, {stated}")


def _additions_at(place: Place) -> list[Addition]:
    files = [name for name in sorted(place.sizes("additions")) if name.endswith(".json")]
    return [read_addition(place, name.removeprefix("additions/").removesuffix(".json")) for name in files]


def describe_capture(
    recipe: CaptureRecipe,
    loader: BlockLoader,
    teacher: Teacher,
    measured: Measured,
    existing: StoreIdentity | None,
    known: StoreIdentity | Addition | None,
    device: torch.device,
) -> StoreIdentity:
    """The identity of the store that a recipe makes; one that exists already decides how views are grouped.

    Args:
        measured: of the teacher, by its gate.
        known: the same teacher's targets in that store, whose codes an automatic choice does not change.
    """
    for name, config in recipe.capture.decisions.items():
        if isinstance(config, SubclassDecisions):
            need_labels(loader.split.labels, f"{recipe.data.dataset}/{recipe.data.train}", f"capture.decisions.{name}")
    first = loader[0]
    example = plain_images(first, teacher.crop, 0, 8)[0][:1]
    rows_per_block = max(tar.count for tar in loader.split.tars)
    views_per_group = plan_views_per_group(
        recipe.views,
        rows_per_block=rows_per_block,
        num_classes=USUAL_WIDTH if teacher.kind == "embedding" else len(loader.dataset.classes),
        requested=recipe.capture.views_per_group or (existing.views_per_group if existing else None),
    )
    codec = recipe.capture.codec
    if isinstance(codec, AutoCodec):
        codec = known.codec if known else choose_codec(codec, teacher, recipe.views, views_per_group, loader, device)
    identity = StoreIdentity(
        schema_version=SCHEMA_VERSION,
        name=recipe.name,
        dataset=describe_dataset(recipe, loader, first),
        teacher=_describe_teacher(teacher, measured),
        views=recipe.views,
        codec=codec,
        decisions=identify_decisions(teacher, recipe.capture.decisions, example.to(device)),
        features=identify_features(
            teacher, recipe.capture.features, known.features if known else {}, recipe.views, loader, example.to(device)
        ),
        rows_per_block=rows_per_block,
        views_per_group=views_per_group,
        versions=software_versions(),
    )
    if codec.of_features and (known is None or known.codec != codec):
        last_layer(teacher, identity, loader, device)  # refused before anything is written
    return identity


def _describe_teacher(teacher: Teacher, measured: Measured) -> TeacherIdentity:
    return TeacherIdentity(
        name=teacher.name,
        model=teacher.model,
        model_args=teacher.model_args,
        kind=teacher.kind,
        weights_sha256=teacher.weights_sha256,
        weights_part=teacher.weights_part,
        normalisation=teacher.normalisation,
        crop=teacher.crop,
        dtype=teacher.dtype,
        compile=teacher.compile,
        tf32=teacher.tf32,
        classes=teacher.classes,
        evaluated_on=measured.evaluated_on,
        measured_top1=measured.top1,
        measured_map=measured.map,
        measured_neighbours=measured.neighbours,
        licence=teacher.licence,
    )


def software_versions() -> dict[str, str]:
    """Of what a store is made with."""
    return (
        {"python": platform.python_version()}
        | {name: version(name) for name in ("offline-kd", "torch", "torchvision", "zarr", "numpy", "pillow")}
        | decoder_versions()
    )


def describe_dataset(recipe: CaptureRecipe, loader: BlockLoader, first: ImageBlock) -> DatasetIdentity:
    """The images of a recipe, as a store names them."""
    return DatasetIdentity(
        name=recipe.data.dataset,
        split=recipe.data.train,
        fingerprint=dataset_fingerprint(loader.dataset, loader.split),
        classes=loader.dataset.classes,
        height=first.images.shape[2] if recipe.views.is_exact else None,
        width=first.images.shape[3] if recipe.views.is_exact else None,
        tars=loader.split.tars,
        labels=loader.split.labels,
        licence=loader.dataset.licence,
    )


def current_manifest(place: Place) -> StoreManifest | None:
    """The manifest of an earlier finish, unless there is none that can be read."""
    try:
        content = read_metadata(place, "manifest.json")
        manifest = parse_metadata(StoreManifest, content, f"{place}/manifest.json")
    except (FileNotFoundError, StoreCorrupt):
        return None
    return manifest if manifest_bytes(manifest) == content else None
