"""Is a store one for this recipe? Asked before training; samples are compared later, by the join."""

from collections.abc import Sequence
from pathlib import Path

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.manifest import Manifest
from offline_kd.recipe import AnyTerm, Recipe
from offline_kd.store.reader import Store
from offline_kd.support.errors import StoreMismatch
from offline_kd.support.files import file_sha256

MOST_MEASURED_ERROR = 0.05  # of WTTM's weight and DTKD's temperature, relative


def check_all(
    stores: Sequence[Store], recipe: Recipe, manifest: Manifest, images: BlockLoader, terms: Sequence[AnyTerm]
) -> None:
    """Make sure that every store was made for what the recipe describes, that it is whole, and that all fit together.

    Args:
        terms: those that the stores' codecs must serve without bias.

    Raises StoreMismatch, and StoreIncomplete when an object is missing.
    """
    for store in stores:
        check_store(store, recipe, images)
        refuse_bias(store, terms)
        store.check_sizes()
    if len(stores) == 1:
        check_teacher(stores[0], recipe, manifest)
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
    here, wanted_views = identity.views.model_dump(mode="json"), recipe.views.model_dump(mode="json")
    if {**here, "count": 0} != {**wanted_views, "count": 0}:
        raise StoreMismatch(
            f"{store.place}: holds the views {here}, the recipe says {wanted_views}. "
            "Correct the recipe's views, or capture another store."
        )
    if recipe.views.num_views > identity.views.num_views or recipe.views.num_views % identity.views_per_group:
        raise StoreMismatch(
            f"{store.place}: holds {identity.views.num_views} views of every image in groups of "
            f"{identity.views_per_group}, the recipe says {recipe.views.num_views}. Use so many whole groups: --set "
            f"views.count={identity.views.num_views}; or add views to the store: `offline-kd cache-teacher`."
        )
    for name, about in identity.decisions.items():
        wanted = recipe.capture.decisions.get(name)
        if wanted is not None and wanted != about.config:
            raise StoreMismatch(
                f"{store.place}: decisions '{name}' were made with {about.config.model_dump(mode='json')}, the recipe "
                f"says {wanted.model_dump(mode='json')}. Correct capture.decisions, or capture another store."
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


def check_teacher(store: Store, recipe: Recipe, manifest: Manifest) -> None:
    """Make sure that a store is of the teacher that the recipe names, if it does; raises StoreMismatch."""
    identity, weights = store.identity, recipe.teacher.weights
    if weights is not None:
        known_weights = manifest.teachers.get(weights)
        sha256 = known_weights.weights.sha256 if known_weights else ""
        if not sha256 and Path(weights).is_file():
            sha256 = file_sha256(Path(weights))
        if sha256 not in ("", identity.teacher.weights_sha256):
            raise StoreMismatch(
                f"{store.place}: was made by teacher '{identity.teacher.name}' with weights "
                f"{identity.teacher.weights_sha256}, the recipe's teacher '{weights}' has {sha256}. "
                "Correct teacher.weights, or capture this teacher's store."
            )


def refuse_bias(store: Store, terms: Sequence[AnyTerm]) -> None:
    """Raise StoreMismatch when a term needs more of the logits than the store's codec has kept.

    What no codec promises, such as WTTM's weight and DTKD's temperature, is compared with what the store measured.
    """
    codec, manifest = store.identity.codec, store.manifest
    fidelity = manifest.fidelity.get(store.targets) if manifest else None
    for term in terms:
        problem = codec.serves(term.needs)
        if not problem and term.needs.measured and fidelity:
            name, message = term.needs.measured
            error: float | None = getattr(fidelity, name)
            problem = message.format(error) if (error or 0) > MOST_MEASURED_ERROR else ""
        if problem:
            raise StoreMismatch(
                f"{store.place}: codec {codec.model_dump(mode='json')} does not serve term '{term.term}', {problem}. "
                "Capture with another codec, or train with the bias: --allow-biased."
            )
