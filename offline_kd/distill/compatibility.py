"""Is a store one for this recipe? Asked before training; samples are compared later, by the join."""

import json
from collections.abc import Mapping, Sequence

from offline_kd.cache.teacher import teacher_args, teacher_classes, teacher_input, teacher_model
from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Manifest
from offline_kd.models.weights import known_sha256
from offline_kd.recipe import AnyTerm, Recipe
from offline_kd.store.features import AutoCode, Features, FeaturesIdentity, WantedFeatures
from offline_kd.store.reader import Store
from offline_kd.support.console import say
from offline_kd.support.errors import ModelError, StoreMismatch
from offline_kd.support.strict import Absent, Strict, differences

MOST_MEASURED_ERROR = 0.05  # of WTTM's weight and DTKD's temperature, relative


def check_all(stores: Sequence[Store], recipe: Recipe, images: BlockLoader, terms: Sequence[AnyTerm]) -> None:
    """Make sure that every store was made for what the recipe describes, and that all fit together.

    Nothing but metadata is read: what is missing or damaged is named when a block of it is wanted.

    Args:
        terms: those that the stores' codecs must serve without bias.

    Raises StoreMismatch.
    """
    for store in stores:
        check_store(store, recipe, images)
        refuse_bias(store, terms)
    check_groups(stores)


def check_store(store: Store, recipe: Recipe, loader: BlockLoader) -> None:
    """Make sure that a store was made for what the recipe describes; raises StoreMismatch with both values.

    The tars may be other ones (a part of the dataset, or packed anew): the join checks every sample by key and bytes.
    """
    identity = store.identity
    classes, known = identity.dataset.classes, loader.dataset.classes
    if len(classes) != len(known):
        raise StoreMismatch(
            f"{store.place}: has targets for {len(classes)} classes, dataset '{recipe.data.dataset}' has {len(known)}. "
            "Use the dataset the store was made from, or capture it again."
        )
    if classes != known:
        index = next(index for index, pair in enumerate(zip(classes, known, strict=True)) if pair[0] != pair[1])
        raise StoreMismatch(
            f"{store.place}: class {index} is '{classes[index]}', in dataset '{recipe.data.dataset}' it is "
            f"'{known[index]}'. The class order differs: correct the manifest, or capture it again."
        )
    here, wanted_views = (views.with_count(identity.views.num_views) for views in (identity.views, recipe.views))
    if different := _in_words(here, wanted_views, "views"):
        raise StoreMismatch(
            f"{store.place}: holds other views: {different}. Correct the recipe's views, or capture another store."
        )
    if recipe.views.num_views > identity.views.num_views or recipe.views.num_views % identity.views_per_group:
        raise StoreMismatch(
            f"{store.place}: holds {identity.views.num_views} views of every image in groups of "
            f"{identity.views_per_group}, the recipe says {recipe.views.num_views}. Use so many whole groups: --set "
            f"views.count={identity.views.num_views}; or add views to the store: `offline-kd cache-teacher`."
        )
    _check_tapped(store, recipe)


def _check_tapped(store: Store, recipe: Recipe) -> None:
    for name, about in store.identity.tapped.items():
        kind = "decisions" if name in store.identity.decisions else "features"
        wanted: Strict | None = recipe.capture.decisions.get(name)
        if isinstance(about, FeaturesIdentity):
            wanted = _features_wanted(recipe.capture.features.get(name), about)
        if wanted is not None and (different := _in_words(about.config, wanted, f"capture.{kind}.{name}")):
            raise StoreMismatch(
                f"{store.place}: {kind} '{name}' were made in another way: {different}. Correct capture.{kind}, "
                "or capture another store."
            )


def _features_wanted(wanted: WantedFeatures | None, about: FeaturesIdentity) -> Features | None:
    """As the recipe describes them; where it leaves the code to stage 1, with that of the store."""
    if wanted is None:
        return None
    return wanted.coded(about.config.code if isinstance(wanted.code, AutoCode) else wanted.code)


def _in_words(here: Strict, wanted: Strict, where: str) -> str:
    """The fields in which a store and a recipe differ, with both values; '' if none does."""
    found = differences(here.model_dump(mode="json"), wanted.model_dump(mode="json"), where)
    return "; ".join(
        f"{field}: {_plain(one)} in the store, {_plain(other)} in the recipe" for field, one, other in found
    )


def check_groups(stores: Sequence[Store]) -> None:
    """Stores that are mixed must group their views alike; raises StoreMismatch with both values."""
    for store in stores[1:]:
        if store.identity.views_per_group != stores[0].identity.views_per_group:
            raise StoreMismatch(
                f"{store.place}: stores views in groups of {store.identity.views_per_group}, {stores[0].place} in "
                f"groups of {stores[0].identity.views_per_group}. To mix them, capture one of them again with the "
                "other's capture.views_per_group."
            )


def check_teachers(stores: Sequence[Store], pinned: Sequence[bool], recipe: Recipe, manifest: Manifest) -> None:
    """Make sure that a store is of the recipe's teacher, and of several at least one: they may have one each.

    What nothing proves is said in one line: that a store is of another teacher, or that its weights cannot be compared.

    Args:
        pinned: of every store, whether a digest was given, which it has: then somebody has chosen it.

    Raises StoreMismatch with both values.
    """
    known = known_of_teacher(recipe, manifest)
    differences = [difference(store, known) for store in stores]
    if stores and all(differences):
        raise StoreMismatch(
            f"{stores[0].place}: was made by teacher '{stores[0].identity.teacher.name}' {differences[0]} "
            "Correct the recipe's teacher, or capture this teacher's store."
        )
    for store, different, is_pinned in zip(stores, differences, pinned, strict=True):
        teacher = store.identity.teacher
        about = f"{store.place}: is of teacher '{teacher.name}' with weights {teacher.weights_sha256}"
        pin = f"To pin it, write {store.place}{store.targets and '#' + store.targets}@sha256:{store.digest}"
        if different and not is_pinned:
            say(f"{about}, which is not the recipe's, and no digest is pinned. {pin}")
        elif "weights" not in known and not is_pinned:
            say(f"{about}. The recipe's weights are not known here and no digest is pinned: not compared. {pin}")


def known_of_teacher(recipe: Recipe, manifest: Manifest) -> dict[str, object]:
    """What recipe, manifest and this machine know of the recipe's teacher: values by name; `weights` may be digits
    that the sha256 begins with."""
    wanted = recipe.teacher
    known: dict[str, object] = {"kind": wanted.kind}
    model = teacher_model(recipe, manifest)
    if wanted.weights is not None and not wanted.is_to_be_trained:
        if sha256 := known_sha256(wanted.weights, manifest, model):
            known["weights"] = sha256
        known |= _known_classes(recipe, manifest)
    if model is not None:
        known |= {"model": model, "model_args": teacher_args(recipe, manifest)}
        try:
            known["normalisation"], known["crop"] = teacher_input(recipe, manifest, model)
        except ModelError:  # what knows is not installed where students are trained
            known |= {"normalisation": wanted.normalisation} if wanted.normalisation else {}
    elif wanted.normalisation:
        known["normalisation"] = wanted.normalisation
    return known


def _known_classes(recipe: Recipe, manifest: Manifest) -> dict[str, object]:
    try:
        return {"classes": teacher_classes(recipe, manifest)}
    except ModelError:  # what knows their names is not installed
        return {}


def difference(store: Store, known: Mapping[str, object]) -> str | None:
    """The first difference between a store's teacher and what is known of the recipe's, with both values."""
    teacher = store.identity.teacher
    weights = str(known.get("weights", ""))
    if not teacher.weights_sha256.startswith(weights):
        return f"with weights {teacher.weights_sha256}, the recipe's teacher has {weights}."
    for name, wanted in known.items():
        if name != "weights" and (here := getattr(teacher, name)) != wanted:
            one, other = (
                value.model_dump(mode="json") if isinstance(value, Strict) else value for value in (here, wanted)
            )
            field, one, other = next(differences(one, other, name))
            return f"with {field.replace('_', ' ')} {_plain(one)}, the recipe's teacher has {_plain(other)}."
    return None


def _plain(value: object) -> str:
    """As YAML has it, if it is short: text as it is, if there is any."""
    return str(value) if isinstance(value, str | Absent) and value != "" else json.dumps(value)


def refuse_bias(store: Store, terms: Sequence[AnyTerm]) -> None:
    """Raise StoreMismatch when a term needs more of the logits than the store's codec has kept.

    What no codec promises, such as WTTM's weight and DTKD's temperature, is compared with what the store measured.
    """
    codec, manifest = store.identity.codec, store.manifest
    fidelity = manifest.fidelity.get(store.targets) if manifest else None
    for term in terms:
        problem = codec.serves(term.needs)
        if problem and store.identity.teacher.kind == "embedding":
            raise StoreMismatch(
                f"{store.place}: holds no logits, because its teacher has no classes, and term '{term.term}' needs "
                "them. Name the store of a classifier, or other targets of this one: STORE#TARGETS."
            )
        if not problem and term.needs.measured:
            name, message = term.needs.measured
            error: float | None = getattr(fidelity, name, None)
            if error is None and not codec.keeps_whole:
                problem = f"and its {name.replace('_', ' ')} was not measured"
            elif error is not None and error > MOST_MEASURED_ERROR:
                problem = message.format(error)
        if problem:
            raise StoreMismatch(
                f"{store.place}: codec {codec.model_dump(mode='json')} does not serve term '{term.term}', {problem}. "
                "Capture with another codec, or train with the bias: --allow-biased."
            )
