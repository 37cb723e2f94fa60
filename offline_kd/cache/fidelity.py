"""How faithful a store is: the teacher is asked again about rows that are read back from disk as stage 2 reads them."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from offline_kd.cache.distortion import Means, distortion_of, means_of, sigmoid_errors
from offline_kd.cache.sample import spread
from offline_kd.cache.teacher import load_teacher
from offline_kd.data.blocks import ImageBlock
from offline_kd.data.fetching import Root
from offline_kd.data.manifest import Manifest
from offline_kd.models.taps import TapPoint
from offline_kd.models.teacher import Teacher
from offline_kd.recipe import CaptureRecipe
from offline_kd.store.codecs.codec import ARITHMETIC
from offline_kd.store.comparison import images_of
from offline_kd.store.decisions import SubclassDecisions, pack, unpack_probs
from offline_kd.store.feature_reading import features_decoder
from offline_kd.store.features import FeatureErrors, FeaturesIdentity, are_the_teachers, pack_features, pooled
from offline_kd.store.join import Wanted, as_stored, join, tables_on
from offline_kd.store.logit_reading import logits_decoder
from offline_kd.store.reader import Store
from offline_kd.store.rows import Rows, concatenate
from offline_kd.store.schema import Fidelity
from offline_kd.store.serving import describe
from offline_kd.support.console import progress
from offline_kd.support.counter_rng import counter_hash
from offline_kd.support.errors import StoreCorrupt, StoreMismatch
from offline_kd.views.render import render_some

FIDELITY_STREAM = 0x66696465  # first counter of the draws made here
# Share of places where the likeliest template, or the sub-class, must be the same; near ties may fall either way.
DECISION_AGREEMENT = {"float32": 0.995, "float16": 0.98, "bfloat16": 0.9}


def ask_again(
    store: Store,
    recipe: CaptureRecipe,
    manifest: Manifest,
    roots: Sequence[Root],
    num_rows: int | None,
    device: torch.device,
) -> Fidelity:
    """`measure_fidelity` of a finished store with the teacher of a recipe, about other rows each time.

    Who changed a store cannot know which rows are going to be asked about.

    Raises StoreMismatch when the store was made by another teacher, or holds no logits.
    """
    assert store.manifest is not None
    known = store.identity.teacher
    if known.imported:
        raise StoreMismatch(
            f"{store.place}: its answers were imported from {known.imported.format}: which weights gave them is not "
            "known, and nobody can ask again. `store verify` without --teacher proves everything else."
        )
    teacher = load_teacher(recipe, manifest, roots, store.identity.num_classes, device)
    teacher = replace(teacher, dtype=known.dtype, compile=known.compile, tf32=known.tf32)  # as it computed then
    if teacher.weights_sha256 != store.identity.teacher.weights_sha256:
        raise StoreMismatch(
            f"{store.place}: was made by weights {store.identity.teacher.weights_sha256}, the recipe's teacher has "
            f"{teacher.weights_sha256}. Name the right recipe, or other targets of the store: STORE#TARGETS."
        )
    for name in ("normalisation", "crop"):
        asked, stored = getattr(teacher, name), getattr(store.identity.teacher, name)
        if asked != stored:
            raise StoreMismatch(
                f"{store.place}: its teacher saw images with {name} {stored!r:.200}, the recipe's sees them with "
                f"{asked!r:.200}. Name the right recipe."
            )
    for name in ("kind", "classes", "weights_part"):
        asked, stored = getattr(teacher, name), getattr(known, name)
        if asked != stored:
            raise StoreMismatch(
                f"{store.place}: its teacher's {name} are {stored!r:.200}, those of the recipe's are {asked!r:.200}. "
                "Name the right recipe."
            )
    held = store.manifest.held
    if held and known.kind != "embedding" and not held.has("logits/"):
        raise StoreMismatch(f"{store.place}: holds {describe(held)}: there are no logits to ask the teacher about.")
    lacking: dict[str, object] = {kind: {} for kind in ("decisions", "features") if held and not held.has(f"{kind}/")}
    store = replace(store, identity=store.identity.model_copy(update=lacking))
    images = images_of(store, manifest, roots)
    return measure_fidelity(store, images, teacher, num_rows, device, seed=secrets.randbits(32))


@torch.no_grad()
def measure_fidelity(
    store: Store,
    images: Callable[[int], ImageBlock],
    teacher: Teacher,
    num_rows: int | None,
    device: torch.device,
    seed: int = 0,
    fetch_ahead: Callable[[int], None] | None = None,
) -> Fidelity:
    """Run the teacher on `num_rows` stored rows (None, or more than there are: all), joined and rendered as in stage 2.

    They lie in every block of the store, and in every view group of each block, as far as so many rows allow.

    Args:
        images: gives the images of a block of the store.
        seed: of the choice of rows.
        fetch_ahead: is told of which block the images will be asked for next.

    Raises StoreCorrupt when a logit is further from the teacher's than codec and arithmetic explain, or when decisions
    or features are not the teacher's.
    """
    views = store.identity.views.num_views
    counts = store.side_by_side(lambda number: store.entry("", number, 0).rows * views, store.blocks)
    there = dict(zip(store.blocks, counts, strict=True))
    wanted = rows_of_blocks(there, num_rows, seed)
    answers = _Answers(store, teacher, device)
    waiting: list[Rows] = []
    with progress("fidelity", sum(wanted.values()), "rows") as meter, ThreadPoolExecutor(os.cpu_count()) as threads:
        numbers = list(wanted)
        for at, (number, count) in enumerate(wanted.items(), start=1):
            if fetch_ahead is not None and at < len(numbers):
                fetch_ahead(numbers[at])
            block = as_stored(store, images(number))
            for rows in _some_rows(store, block, number, count, seed):
                for start in range(0, len(rows.labels), teacher.batch_size):
                    part = rows.take(slice(start, start + teacher.batch_size))
                    size = store.identity.seen_size[0]
                    pixels = render_some(block, part.view, store.identity.views, size, threads)
                    waiting.append(replace(part, pixels=torch.from_numpy(pixels), choice=None))
                    answers.came_from(number, block, part)
                    if sum(len(one.labels) for one in waiting) >= teacher.batch_size:
                        answers.compare(concatenate(waiting))
                        waiting.clear()
                    meter.advance(len(part.labels))
        if waiting:
            answers.compare(concatenate(waiting))
    answers.compare_tapped()
    return answers.fidelity(of_rows=sum(there.values()), of_blocks=len(there))


def rows_of_blocks(there: Mapping[int, int], num_rows: int | None, seed: int) -> dict[int, int]:
    """How many rows to look at, by block: one of each at least, or one of so many blocks, evenly spaced.

    Args:
        there: how many rows, of all views, each block has.
        num_rows: of all blocks together; None: all.
    """
    blocks = list(there)
    if num_rows is None or num_rows >= sum(there.values()):
        return dict(there)
    if num_rows < len(blocks):
        first = int(counter_hash(FIDELITY_STREAM, seed).item() % len(blocks))
        chosen = {(first + index * len(blocks) // num_rows) % len(blocks) for index in range(num_rows)}
        return {blocks[index]: 1 for index in sorted(chosen)}
    more = spread(num_rows - len(blocks), [count - 1 for count in there.values()])
    return {block: 1 + extra for block, extra in zip(blocks, more, strict=True)}


def _some_rows(store: Store, block: ImageBlock, number: int, count: int, seed: int) -> Iterator[Rows]:
    """So many different rows of a block, as evenly over its view groups as can be."""
    groups = store.identity.groups
    first = int(counter_hash(FIDELITY_STREAM, seed, number).item() % len(groups))
    wanted = Wanted(decisions=list(store.identity.decisions), features=list(store.identity.features))
    for index in range(len(groups)):
        group = (first + index) % len(groups)
        left = count // len(groups) + (index < count % len(groups))
        draws = counter_hash(FIDELITY_STREAM, seed, number, group, block.key_hash)
        order, size = draws.argsort(), len(groups[group])
        for turn in range(size):
            if left <= 0:
                break
            position = ((draws % np.uint64(size)).astype(np.int64) + turn) % size
            rows = join(store, block, group, position, wanted).take(order[:left])
            left -= len(rows.labels)
            yield rows


@dataclass
class _Answers:
    """What the teacher says now beside what is stored: sums over rows, so that any number of them can be asked about.

    `where` names the rows that are next to be compared: their block and their sample.
    """

    store: Store
    teacher: Teacher
    device: torch.device
    where: list[tuple[int, str]] = field(default_factory=list)
    rows: int = 0
    blocks: set[int] = field(default_factory=set)
    sums: Means = field(default_factory=dict)
    max_error: float = 0.0
    max_allowed: float = 0.0
    max_sigmoid_error: float = 0.0  # of a multi-label teacher
    max_dropped: dict[str, float] = field(default_factory=dict)  # by decisions
    places: dict[tuple[str, int], list[int]] = field(default_factory=dict)  # same, of, in a row: by name and block
    errors: dict[str, FeatureErrors] = field(default_factory=dict)  # by features

    def __post_init__(self) -> None:
        store, cpu = self.store, torch.device("cpu")
        features = store.identity.features
        self.tables = {name: tables_on(store, name, self.device) for name in store.identity.decisions}
        self.tables |= {name: tables_on(store, name, cpu) for name, about in features.items() if about.has_tables}
        self.decoders = {name: features_decoder(store, name, cpu) for name in features}
        self.decode_logits = logits_decoder(store, cpu)

    def came_from(self, number: int, block: ImageBlock, rows: Rows) -> None:
        self.where += [(number, block.keys[row]) for row in rows.view.row]

    def compare(self, rows: Rows) -> None:
        """Ask about some rows with their pixels; raises StoreCorrupt for logits that are not the teacher's."""
        identity, (signal,) = self.store.identity, rows.signal
        assert signal.logits is not None
        assert rows.pixels is not None
        points: list[TapPoint] = [about.config for about in identity.tapped.values()]
        answer, maps = self.teacher.logits_and_maps(rows.pixels.to(self.device), points)
        live = {
            name: pooled(about.config, features).cpu()
            for (name, about), features in zip(identity.tapped.items(), maps, strict=True)
            if isinstance(about, FeaturesIdentity)
        }
        self.rows += len(answer)
        self.blocks |= {number for number, _ in self.where}
        if self.store.has_logits:
            z_t, z = answer.cpu(), self.decode_logits(signal)
            of, unpacked = identity.codec.of_features, signal.logits
            if of:
                unpacked = {"features": self.decoders[of](signal.features[of]), "live": live[of]}
            self._compare_logits(z, z_t, unpacked)
            self._measure(z_t, z, rows.labels)
        for (name, about), features in zip(identity.tapped.items(), maps, strict=True):
            if isinstance(about, FeaturesIdentity):
                self._compare_features(name, live[name], signal.features[name])
                continue
            again = pack(about.config, features, rows.labels.to(self.device), self.tables[name])
            self._count_decisions(name, again, signal.decisions[name])
        self.where.clear()

    def _measure(self, z_t: Tensor, z: Tensor, labels: Tensor) -> None:
        """What objectives would notice: through a softmax, or through a sigmoid of every class."""
        if self.store.identity.teacher.kind == "multilabel":
            for t, errors in sigmoid_errors(z_t, z).items():
                self._add(("sigmoid_error", f"{t}"), errors.mean(1).sum().item())
            self.max_sigmoid_error = max(self.max_sigmoid_error, sigmoid_errors(z_t, z)[1].max().item())
            return
        for field_and_key, mean in means_of(z_t, z).items():
            self._add(field_and_key, len(z) * mean)
        self._add(("teacher_top1", ""), 100 * (z.argmax(1) == labels).float().sum().item())
        self._add(("mean_top1_probability", ""), z.softmax(1).amax(1).sum().item())

    def _compare_logits(self, z: Tensor, z_t: Tensor, unpacked: Mapping[str, Tensor]) -> None:
        identity = self.store.identity
        found = identity.codec.compare(z, z_t, unpacked, self.store.codec_tables, identity.teacher.precision)
        beyond = (found.differences - found.allowed).view(len(z), -1)
        if (beyond > 0).any():
            worst = int(beyond.amax(1).argmax())
            difference, allowed = (one.view(len(z), -1)[worst] for one in (found.differences, found.allowed))
            place, (number, key) = int(beyond[worst].argmax()), self.where[worst]
            raise StoreCorrupt(
                f"{self.store.place}: block {number}, sample '{key}': the teacher run again differs from the store by "
                f"up to {difference[place]:.4g}, codec and arithmetic explain {allowed[place]:.4g}. The targets are "
                "not those of this teacher for these images: delete the store, check data and weights, and capture "
                "again."
            )
        self._add(("mean_error", ""), len(z) * found.errors.mean().item())
        self.max_error = max(self.max_error, found.errors.max().item())
        self.max_allowed = max(self.max_allowed, float(found.allowed.max()))

    def _count_decisions(self, name: str, again: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        """Compare the likeliest template, or the sub-class, place by place."""
        if isinstance(self.store.identity.decisions[name].config, SubclassDecisions):
            equal = (stored["subclass"].long() == again["subclass"].cpu()).flatten(1)
        else:
            equal = (stored["id"].long() == again["id"].cpu())[..., 0].flatten(1)
        self._count_same(name, equal)
        if "prob" in stored:
            probs = unpack_probs(stored["prob"])
            dropped = 1 - probs.sum(-1).flatten(1)
            self._add((f"{name} first", ""), probs[..., 0].flatten(1).mean(1).sum().item())
            self._add((f"{name} dropped", ""), dropped.mean(1).sum().item())
            self.max_dropped[name] = max(self.max_dropped.get(name, 0.0), dropped.max().item())

    def _compare_features(self, name: str, live: Tensor, stored: Mapping[str, Tensor]) -> None:
        """Compare decoded features, view by view, with those that are coded now."""
        config, decode = self.store.identity.features[name].config, self.decoders[name]
        decoded, again = decode(stored), decode(pack_features(config, live, self.tables.get(name, {})))
        precision = ARITHMETIC[self.store.identity.teacher.precision]
        self._count_same(name, are_the_teachers(live, decoded, again, precision)[:, None])
        self.errors.setdefault(name, FeatureErrors()).add(live, decoded)

    def _count_same(self, name: str, equal: Tensor) -> None:
        """Where `[n, places]` the store says what the teacher says again."""
        for (number, _), same in zip(self.where, equal.sum(1).tolist(), strict=True):
            counts = self.places.setdefault((name, number), [0, 0, equal.shape[1]])
            counts[0] += same
            counts[1] += equal.shape[1]

    def compare_tapped(self) -> None:
        """Raise StoreCorrupt for decisions or features that are not the teacher's, of all of the store or any block."""
        least = DECISION_AGREEMENT[self.store.identity.teacher.precision]
        # All places of a row may fall the other way together, when they are alike: rows of a block are counted.
        agreement = {name: self._agreement(name) for name in self.store.identity.tapped}
        for (name, number), (same, of, in_row) in self.places.items():
            ties = (1 - least) * of / in_row
            of_block = of - same > (ties + 4 * ties**0.5 + 1) * in_row
            if of_block or agreement[name] < least:
                share = f"{same / of:.2%} in block {number}" if of_block else f"{agreement[name]:.2%}"
                kind, does = ("features", "gives") if name in self.errors else ("decisions", "takes")
                raise StoreCorrupt(
                    f"{self.store.place}: only {share} of the {kind} '{name}' are those that the teacher {does} "
                    "again: delete the store, check data and weights, and capture again."
                )

    def _agreement(self, name: str) -> float:
        """Share of all places that were compared."""
        counts = [counts for (of_name, _), counts in self.places.items() if of_name == name]
        return sum(same for same, _, _ in counts) / sum(of for _, of, _ in counts)

    def _add(self, field_and_key: tuple[str, str], value: float) -> None:
        self.sums[field_and_key] = self.sums.get(field_and_key, 0.0) + value

    def fidelity(self, of_rows: int, of_blocks: int) -> Fidelity:
        means = {name: value / self.rows for name, value in self.sums.items()}
        decisions = {name: {"agreement": self._agreement(name)} for name in self.store.identity.decisions}
        for name, most in self.max_dropped.items():
            first, dropped = means[f"{name} first", ""], means[f"{name} dropped", ""]
            decisions[name] |= {"mean_first_probability": first, "mean_dropped": dropped, "max_dropped": most}
        found = Fidelity(
            rows=self.rows,
            of_rows=of_rows,
            blocks=len(self.blocks),
            of_blocks=of_blocks,
            teacher_top1=None,
            decisions=decisions,
            features={name: errors.figures() for name, errors in self.errors.items()},
        )
        return found.model_copy(update=self._of_logits(means)) if self.store.has_logits else found

    def _of_logits(self, means: Means) -> dict[str, object]:
        """Fields of `Fidelity`, of means over all rows: errors, and what objectives would notice of them."""
        errors = {
            "mean_error": means["mean_error", ""],
            "max_error": self.max_error,
            "max_error_allowed": self.max_allowed,
        }
        if self.store.identity.teacher.kind == "multilabel":
            of_sigmoids = {key: mean for (name, key), mean in means.items() if name == "sigmoid_error"}
            return {**errors, "sigmoid_error": of_sigmoids, "max_sigmoid_error": self.max_sigmoid_error}
        labelled = self.store.created.dataset.labels != "none"
        about = {
            "teacher_top1": means["teacher_top1", ""] if labelled else None,
            "mean_top1_probability": means["mean_top1_probability", ""],
        }
        return {**errors, **about, **distortion_of(means)}
