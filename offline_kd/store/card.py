"""The card of a store, as Markdown and as a page by itself: what a teammate needs to decide whether to use it.

Everything in it comes from the checked parts of a store, and every name in it is escaped: stores are shared. Nobody
copies the page of somebody else: whoever copies a store makes its card anew, with this file.
"""

import hashlib
import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from offline_kd.store.layout import NO_LABEL
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.schema import Fidelity, StoreIdentity, StoreManifest
from offline_kd.store.serving import describe, served_terms
from offline_kd.support.errors import StoreCorrupt
from offline_kd.support.pages import data_url, render_page

CARD_FILES = ("README.md", "index.html")
SUM = re.compile(rb"<!-- sha256 of what is above: ([0-9a-f]{64}) -->\n")
MAX_ROWS, MAX_BLOCKS, MAX_EXAMPLES, MAX_CLASSES_SHOWN = 50_000, 64, 24, 200
MAX_FLOATS = 2**24  # of logits that are decoded at once
BINS = 15


@dataclass(frozen=True)
class Answers:
    """What the teacher said about a sample of the rows."""

    confidence: NDArray[np.float32]  # [n] largest probability
    correct: NDArray[np.bool_]  # [n]
    labels: NDArray[np.int64]  # [n]
    examples: list[tuple[NDArray[np.uint8], str]]  # view `[H, W, 3]` and caption


def write_card(stores: Mapping[str, Store], manifest: StoreManifest) -> dict[str, bytes]:
    """`README.md` and `index.html` of a finished store, from the store as seen for the targets of every teacher.

    The same store gives the same bytes on one machine, wherever it lies. A part without logits has no pictures.
    """
    identity = stores[""].identity
    sections = [
        (
            _title(store, targets),
            _facts(store, manifest.fidelity.get(targets)),
            _measured(manifest.fidelity.get(targets)),
        )
        for targets, store in stores.items()
    ]
    common = _common(identity, manifest)
    markdown = [
        f"# Teacher store: {_plain(identity.name)}",
        "",
        "Raw teacher logits for stored augmentations of every image, made by `offline-kd cache-teacher`.",
        "Train from it with `offline-kd distill RECIPE --store THIS_FOLDER --out RUN`;",
        'look at it with `zarr.open("targets.zarr")`, whose arrays describe themselves. index.html has pictures.',
        "",
        *_table(common),
        "",
    ]
    for title, facts, measured in sections:
        markdown += [f"## {_plain(title)}", "", *_table(facts), "", "### Fidelity", ""]
        markdown += ["The teacher was run again on rows read back from this store:", "", *_table(measured), ""]
    page = render_page(
        "card",
        title=identity.name,
        common=common,
        teachers=[
            {"title": title, "facts": facts, "measured": measured, **_pictures(store)}
            for (title, facts, measured), store in zip(sections, stores.values(), strict=True)
        ],
        sizes=[
            (name, f"{size:,}", f"{size / max(manifest.total_bytes, 1):.1%}")
            for name, size in sorted(manifest.bytes_by_array.items(), key=lambda one: -one[1])
        ],
    )
    return {"README.md": _with_sum("\n".join(markdown)), "index.html": _with_sum(page)}


def _with_sum(text: str) -> bytes:
    content = text.rstrip("\n").encode() + b"\n"
    return content + f"<!-- sha256 of what is above: {hashlib.sha256(content).hexdigest()} -->\n".encode()


def is_whole_card(content: bytes) -> bool:
    """Whether no bit of a card was flipped since somebody made it; who that was is another question."""
    content, last = content[: content.rfind(b"<!--")], content[content.rfind(b"<!--") :]
    found = SUM.fullmatch(last)
    return found is not None and hashlib.sha256(content).hexdigest().encode() == found[1]


def _title(store: Store, targets: str) -> str:
    return f"Teacher {store.identity.teacher.name}" + (f" (targets '{targets}')" if targets else "")


def _common(identity: StoreIdentity, manifest: StoreManifest) -> dict[str, str]:
    dataset = identity.dataset
    rows = sum(tar.count for tar in dataset.tars)
    return {
        "dataset": f"{dataset.name}/{dataset.split}: {rows:,} images of "
        f"{f'{dataset.width}x{dataset.height}' if dataset.width else 'different sizes'} in "
        f"{len(dataset.tars)} tars, {len(dataset.classes)} classes; licence: {dataset.licence or 'not stated'}",
        "views": f"{identity.views.num_views} of {identity.views.num_distinct} per image: "
        f"`{identity.views.model_dump(mode='json')}`",
        "size": f"{manifest.total_bytes:,} bytes, {manifest.total_bytes / (rows * manifest.views['']):.1f} per row",
        "digest": f"`sha256:{manifest.digest}`",
        **({"this copy holds": describe(manifest.held)} if manifest.held else {}),
        "made with": ", ".join(f"{name} {version}" for name, version in identity.versions.items()),
    }


def _facts(store: Store, fidelity: Fidelity | None) -> dict[str, str]:
    identity = store.identity
    teacher = identity.teacher
    facts = {
        "teacher": f"{teacher.name} ({teacher.model}, {teacher.arithmetic}), weights sha256 `{teacher.weights_sha256}`",
        "teacher top-1": f"{teacher.measured_top1:.2f} % on {teacher.evaluated_on}, measured before the capture",
        "codec": f"`{identity.codec.model_dump(mode='json')}`",
        "serves": ", ".join(served_terms(store)),
        "licence": teacher.licence or "not stated",
    }
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
            f"`{about.config.model_dump(mode='json')}` on a map of {about.channels} x {about.height} x {about.width}; "
            + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items())
        )
    return facts


def _measured(fidelity: Fidelity | None) -> dict[str, str]:
    if fidelity is None:
        return {"rows asked again": "0: `offline-kd store verify STORE --teacher 1000` asks this teacher"}
    return {
        "rows asked again": fidelity.looked_at,
        "teacher top-1 on them, augmented": "there are no labels"
        if fidelity.teacher_top1 is None
        else f"{fidelity.teacher_top1:.2f} %",
        "mean top-1 probability": f"{fidelity.mean_top1_probability:.3f}",
        "same top-1 as the teacher": f"{100 * fidelity.top1_agreement:.2f} %",
        "logit error, mean / largest": f"{fidelity.mean_error:.2g} / {fidelity.max_error:.2g} "
        f"(allowed: {fidelity.max_error_allowed:.2g})",
        "KL(teacher, store) in nats at T = 1, 2, 4": ", ".join(f"{value:.2g}" for value in fidelity.kl.values()),
        "total variation at T = 1, 2, 4": ", ".join(f"{value:.2g}" for value in fidelity.total_variation.values()),
        "WTTM weight / DTKD temperature error": f"{_error(fidelity.wttm_weight_error)} / "
        f"{_error(fidelity.dtkd_temperature_error)}",
    }


def _error(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2g}"


# ---- pictures ------------------------------------------------------------------------------------------------------


def read_answers(store: Store) -> Answers:
    """What the teacher said about the first view group of evenly spaced blocks, up to MAX_ROWS rows."""
    identity, blocks = store.identity, store.blocks
    count = min(MAX_BLOCKS, len(blocks))
    confidences, corrects, labels = [], [], []
    examples: list[tuple[NDArray[np.uint8], str]] = []
    rows = 0
    logit_arrays = [f"logits/{name}" for name in identity.codec.arrays()]
    for index in range(count):
        number = blocks[index * len(blocks) // count]
        arrays = store.read(number, 0, ["label", "probe/row", "probe/view", "probe/pixels", *logit_arrays])
        _refuse_wild(store, number, arrays)
        # Of many classes a few rows are enough, and all that fit into memory.
        some = max(1, MAX_FLOATS // (identity.views_per_group * identity.num_classes))
        encoded = {name.removeprefix("logits/"): arrays[name][:some] for name in logit_arrays}
        logits = identity.codec.decode_stored(encoded, store.codec_tables, identity.num_classes)
        probabilities = logits.softmax(-1)  # [rows, views, C]
        confidence, predicted = (part.numpy() for part in probabilities.max(-1))
        if not np.isfinite(confidence).all():
            raise StoreCorrupt(
                f"{store.place}: block {number} has logits that are no numbers: run `store verify` on it."
            )
        label = np.broadcast_to(arrays["label"].astype(np.int64)[:some, None], predicted.shape)
        confidences.append(confidence.flatten())
        corrects.append((predicted == label).flatten())
        labels.append(label.flatten())
        for pixels, row, view in zip(arrays["probe/pixels"], arrays["probe/row"], arrays["probe/view"], strict=True):
            if len(examples) < MAX_EXAMPLES and row < some:
                said, truth = identity.dataset.classes[int(predicted[row, view])], int(label[row, view])
                caption = f"{said} {confidence[row, view]:.0%}"
                if truth not in (NO_LABEL, predicted[row, view]):
                    caption += f", labelled {identity.dataset.classes[truth]}"
                examples.append((np.asarray(pixels, dtype=np.uint8).transpose(1, 2, 0), caption))
        rows += label.size
        if rows >= MAX_ROWS:
            break
    return Answers(np.concatenate(confidences), np.concatenate(corrects), np.concatenate(labels), examples)


def _refuse_wild(store: Store, number: int, arrays: Arrays) -> None:
    """Raise StoreCorrupt for labels and probes that name no class, row or view: the store may be anybody's."""
    rows, identity = len(arrays["label"]), store.identity
    unlabelled = identity.dataset.labels == "none"
    for name, first, end in (
        ("label", NO_LABEL if unlabelled else 0, NO_LABEL + 1 if unlabelled else identity.num_classes),
        ("probe/row", 0, rows),
        ("probe/view", 0, identity.views_per_group),
    ):
        values = arrays[name]
        if values.min() < first or values.max() >= end:
            raise StoreCorrupt(
                f"{store.place}: block {number} has {name} from {values.min()} to {values.max()}, must be {first} to "
                f"{end - 1}: run `offline-kd store verify` on it."
            )


def _pictures(store: Store) -> dict[str, list[tuple[str, str]]]:
    """Captions and addresses of the example views and of the plots, where there are logits to make them of."""
    held = store.manifest.held if store.manifest else None
    if held and not held.has("logits/"):
        return {"examples": [], "plots": []}
    answers = read_answers(store)
    about = f"{len(answers.labels):,} stored rows (augmented training images)"
    plots = []
    if store.identity.dataset.labels != "none":
        plots = [
            (f"Confidence and calibration of the teacher on {about}", _curves(answers)),
            ("Teacher's top-1 by class on the same rows, worst first", _per_class(answers, store.identity)),
        ]
    return {"examples": [(caption, _png(pixels)) for pixels, caption in answers.examples], "plots": plots}


def _curves(answers: Answers) -> str:
    figure, (left, right) = _figure(3.2, 2)
    left.hist(answers.confidence, bins=BINS, range=(0, 1), color="#4878a8")
    left.set_xlabel("largest probability")
    left.set_ylabel("rows")
    bins = np.minimum((answers.confidence * BINS).astype(int), BINS - 1)
    rows = np.bincount(bins, minlength=BINS)
    used = rows > 0
    accuracy = np.bincount(bins, weights=answers.correct, minlength=BINS)[used] / rows[used]
    confidence = np.bincount(bins, weights=answers.confidence, minlength=BINS)[used] / rows[used]
    ece = float((rows[used] * np.abs(accuracy - confidence)).sum() / rows.sum())
    right.plot([0, 1], [0, 1], ":", color="#999")
    right.plot(confidence, accuracy, "o-", color="#4878a8", label=f"ECE {100 * ece:.1f} %")
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
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").replace("](", "] (").split())


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items())]
