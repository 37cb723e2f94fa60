"""The card of a store, as Markdown and as a page by itself: what a teammate needs to decide whether to use it.

Everything in it comes from the checked parts of a store, and every name in it is escaped: stores are shared. Nobody
copies the page of somebody else: whoever copies a store makes its card anew, with this file.
"""

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from offline_kd.store.answers import BINS, Answers, calibration, read_answers, warnings_of
from offline_kd.store.features import arrays_of
from offline_kd.store.info import measured
from offline_kd.store.layout import RECIPE_FILE
from offline_kd.store.reader import Store
from offline_kd.store.schema import Fidelity, StoreIdentity, StoreManifest
from offline_kd.store.serving import describe, served_terms
from offline_kd.store.starter import COMMAND, starter_recipe
from offline_kd.support.pages import data_url, render_page
from offline_kd.support.strict import in_words

CARD_FILES = ("README.md", "index.html", RECIPE_FILE)
SUM = re.compile(rb"(?:<!-- |# )sha256 of what is above: ([0-9a-f]{64})(?: -->)?\n")
MAX_CLASSES_SHOWN = 200
ASKED = "The teacher was run again on rows read back from this store:"
NOT_ASKED = "The teacher was never run here; another program stored its answers:"
CAPTURED = "Raw teacher logits for stored augmentations of every image, made by `offline-kd cache-teacher`."
EMBEDDED = "A teacher's features of stored augmentations of every image, made by `offline-kd cache-teacher`."
IMPORTED = "Likeliest classes for stored augmentations of every image, brought here by `offline-kd store import`."


@dataclass(frozen=True)
class Section:
    """What the card says of the targets of one teacher."""

    title: str
    warnings: list[str]
    facts: dict[str, str]
    asked_again: str  # what `measured` is of, a sentence
    measured: dict[str, str]
    examples: list[tuple[str, str]]  # caption and address
    plots: list[tuple[str, str]]


def write_card(stores: Mapping[str, Store], manifest: StoreManifest) -> dict[str, bytes]:
    """`README.md`, `index.html` and `recipe.yaml` of a finished store, as seen for the targets of every teacher.

    The same store gives the same bytes on one machine, wherever it lies. A part without logits has no pictures.
    """
    identity = stores[""].identity
    sections = [_section(store, targets, manifest.fidelity.get(targets)) for targets, store in stores.items()]
    common = _common(identity, manifest)
    recipe = starter_recipe(stores[""], manifest)
    page = render_page(
        "card",
        title=identity.name,
        common=common,
        teachers=sections,
        recipe=recipe,
        sizes=[
            (name, f"{size:,}", f"{size / max(manifest.total_bytes, 1):.1%}")
            for name, size in sorted(manifest.bytes_by_array.items(), key=lambda one: -one[1])
        ],
    )
    return {
        "README.md": _with_sum(_markdown(identity, common, sections, recipe)),
        "index.html": _with_sum(page),
        RECIPE_FILE: _with_sum(recipe, "# ", ""),
    }


def _section(store: Store, targets: str, fidelity: Fidelity | None) -> Section:
    # What pictures show is a softmax beside one label: there are none of a multi-label teacher.
    is_shown = store.has_logits and store.identity.teacher.kind == "classifier"
    answers = read_answers(store) if is_shown else None
    return Section(
        _title(store, targets),
        warnings_of(store, answers, fidelity),
        _facts(store, fidelity),
        NOT_ASKED if store.identity.teacher.imported else ASKED,
        measured(store.identity.teacher, fidelity),
        [(caption, _png(pixels)) for pixels, caption in answers.examples] if answers else [],
        _plots(store.identity, answers) if answers else [],
    )


def _markdown(identity: StoreIdentity, common: dict[str, str], sections: Sequence[Section], recipe: str) -> str:
    lines = [
        f"# Teacher store: {_plain(identity.name)}",
        "",
        EMBEDDED if identity.teacher.kind == "embedding" else IMPORTED if identity.teacher.imported else CAPTURED,
        f"Train from it with `{COMMAND}`;",
        'look at it with `zarr.open("targets.zarr")`, whose arrays describe themselves. index.html has pictures.',
        "",
        *_table(common),
        "",
    ]
    for one in sections:
        lines += [f"## {_plain(one.title)}", ""]
        lines += [f"- **Warning:** {_plain(warning)}" for warning in one.warnings] + [""] * bool(one.warnings)
        lines += [*_table(one.facts), "", "### Fidelity", ""]
        lines += [one.asked_again, "", *_table(one.measured), ""]
    # Not between fences, which a name could close.
    lines += ["## A recipe that trains from it", "", "<pre>", *map(_line, recipe.splitlines()), "</pre>"]
    return "\n".join(lines)


def _with_sum(text: str, before: str = "<!-- ", after: str = " -->") -> bytes:
    content = text.rstrip("\n").encode() + b"\n"
    return content + f"{before}sha256 of what is above: {hashlib.sha256(content).hexdigest()}{after}\n".encode()


def is_whole_card(content: bytes) -> bool:
    """Whether no bit of a card was flipped since somebody made it; who that was is another question."""
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    found = SUM.fullmatch(content[start:])
    return found is not None and hashlib.sha256(content[:start]).hexdigest().encode() == found[1]


def _title(store: Store, targets: str) -> str:
    return f"Teacher {store.identity.teacher.name}" + (f" (targets '{targets}')" if targets else "")


def _common(identity: StoreIdentity, manifest: StoreManifest) -> dict[str, str]:
    dataset = identity.dataset
    rows = sum(tar.count for tar in dataset.tars)
    return {
        "dataset": f"{dataset.name}/{dataset.split}: {rows:,} images of "
        f"{f'{dataset.width}x{dataset.height}' if dataset.width else manifest.image_sizes or 'different sizes'} in "
        f"{len(dataset.tars):,} tars, {len(dataset.classes):,} classes; licence: {dataset.licence or 'not stated'}",
        "views": f"{identity.views.num_views} of {identity.views.num_distinct} per image: "
        f"{in_words(identity.views.model_dump(mode='json', exclude={'count'}))}",
        "size": f"{manifest.total_bytes:,} bytes, {manifest.total_bytes / (rows * manifest.views['']):.1f} per row",
        "digest": f"`sha256:{manifest.digest}`",
        **({"this copy holds": describe(manifest.held)} if manifest.held else {}),
        "made with": ", ".join(f"{name} {version}" for name, version in identity.versions.items()),
    }


def _facts(store: Store, fidelity: Fidelity | None) -> dict[str, str]:
    identity = store.identity
    teacher = identity.teacher
    what, figure = teacher.gate
    facts = {
        "teacher": f"{teacher.name} ({teacher.model}, {teacher.arithmetic}), weights sha256 `{teacher.weights_sha256}`",
        f"teacher {what}": f"{figure}, "
        + ("by the imported answers" if teacher.imported else "measured before the capture"),
        "codec": in_words(identity.codec.model_dump(mode="json")),
        "serves": ", ".join(served_terms(store)),
        "licence": teacher.licence or "not stated",
    }
    if teacher.imported:
        facts["teacher"] = f"{teacher.name}, {teacher.weights}"
        facts["imported from"] = teacher.imported.in_words
    if teacher.weights_part:
        facts["part of the weights' file"] = f"`{teacher.weights_part}`"
    if teacher.classes is not None:
        facts["classes of the teacher"] = "; ".join(
            f"{name}: {', '.join(map(str, indices))}"
            for name, indices in zip(identity.dataset.classes, teacher.classes, strict=False)
        )
    held = store.manifest.held if store.manifest else None
    for name, about in identity.decisions.items() if held is None or held.has("decisions/") else ():
        figures = store.tables_statistics(name) | (fidelity.decisions.get(name, {}) if fidelity else {})
        facts[f"decisions '{name}'"] = (
            f"{in_words(about.config.model_dump(mode='json'))}, on a map of {about.channels} x {about.height} x "
            f"{about.width}; " + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items())
        )
    for name, kept in identity.features.items() if held is None or held.has("features/") else ():
        size = sum(one.size * np.dtype(one.dtype).itemsize for one in arrays_of(kept).values())
        places = kept.height * kept.width if kept.config.pool == "none" else 1
        learned = store.tables_statistics(name) if kept.has_tables else {}
        facts[f"features '{name}'"] = (
            f"{' x '.join(map(str, kept.shape))} numbers of each view in {size * places:,} bytes: "
            + in_words(kept.config.model_dump(mode="json"))
            + "".join(f", {key.replace('_', ' ')} {value:.4g}" for key, value in learned.items())
        )
    return facts


# ---- pictures ------------------------------------------------------------------------------------------------------


def _plots(identity: StoreIdentity, answers: Answers) -> list[tuple[str, str]]:
    """Captions and addresses, where there are labels."""
    if identity.dataset.labels == "none":
        return []
    about = f"{len(answers.labels):,} stored rows (augmented training images)"
    return [
        (f"Confidence and calibration of the teacher on {about}", _curves(answers)),
        ("Teacher's top-1 by class on the same rows, worst first", _per_class(answers, identity)),
    ]


def _curves(answers: Answers) -> str:
    figure, (left, right) = _figure(3.2, 2)
    left.hist(answers.confidence, bins=BINS, range=(0, 1), color="#4878a8")
    left.set_xlabel("largest probability")
    left.set_ylabel("rows")
    _, confidence, accuracy = calibration(answers)
    right.plot([0, 1], [0, 1], ":", color="#999")
    right.plot(confidence, accuracy, "o-", color="#4878a8", label=f"ECE {answers.ece:.1f} %")
    right.set_xlabel("confidence")
    right.set_ylabel("share that is right")
    right.legend(loc="upper left")
    return _svg(figure)


def _per_class(answers: Answers, identity: StoreIdentity) -> str:
    rows = np.bincount(answers.labels, minlength=identity.num_classes)
    right = np.bincount(answers.labels, weights=answers.correct, minlength=identity.num_classes)
    seen = np.flatnonzero(rows)
    accuracy = right[seen] / rows[seen]
    order = accuracy.argsort(kind="stable")[:MAX_CLASSES_SHOWN]
    figure, axes = _figure(3.0, 1)
    axes.bar(range(len(order)), 100 * accuracy[order], color="#4878a8")
    axes.set_ylabel("top-1 %")
    if len(order) <= 40:
        # Class names are text: a dollar sign must not start a formula.
        names = [identity.dataset.classes[int(index)][:20].replace("$", r"\$") for index in seen[order]]
        axes.set_xticks(range(len(order)), names, rotation=60, ha="right")
    else:
        axes.set_xlabel(f"{len(order)} of {len(seen)} classes")
    return _svg(figure)


def _figure(height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "offline-kd"}):  # else every drawing of the same has other ids
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_url(buffer.getvalue(), "image/svg+xml")


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return data_url(buffer.getvalue(), "image/png")


# ---- tables --------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text that cannot become a tag, a link or another cell."""
    return " ".join(_line(text).replace("|", "\\|").split())


def _line(text: str) -> str:
    """A line of text that cannot become a tag or a link."""
    return html.escape(text, quote=False).replace("](", "] (")


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items())]
