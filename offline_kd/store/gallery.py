"""What a store says of its samples as a folder of pages: the worst ones first, with their pictures, and as CSV.

Nothing serves it: pages, thumbnails and one script that filters and sorts, which its policy names by hash. index.html
is written last. Memory is that of a block and of the samples that are shown, however many the store has.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from offline_kd.data.fetching import Root
from offline_kd.store.figures import Figures, Summary, concatenate, read_figures
from offline_kd.store.layout import NO_LABEL
from offline_kd.store.reader import Store
from offline_kd.store.sample_page import SampleImages, sample_pages
from offline_kd.store.schema import StoreIdentity
from offline_kd.support.console import progress
from offline_kd.support.errors import OfflineKDError, RecipeError
from offline_kd.support.pages import render_page

THUMBNAIL, PIXELATED = 160, 64  # sides in pixels: of a thumbnail; up to here images are shown as they are
MAX_MATRIX, MAX_PAIRS, MAX_CLASSES, MAX_PROBLEMS = 25, 100, 200, 5  # that a page shows


@dataclass(frozen=True)
class Ranking:
    """An order in which samples are worth looking at."""

    title: str
    about: str
    score: Callable[[Figures], NDArray[np.float64]]  # [n], the largest first; nan: not of this list


def _errors(figures: Figures) -> NDArray[np.float64]:
    return np.where(figures.is_suspect, figures.gap, np.nan)


def _inconsistent(figures: Figures) -> NDArray[np.float64]:
    # Of samples with equal shares, the one whose class is less likely comes first.
    score = 1 - figures.consistency + 1e-6 * (1 - figures.top1_probability)
    return np.where(figures.consistency < 1, score, np.nan)


def _by_chance(figures: Figures) -> NDArray[np.float64]:
    # A sample in no order that anything else knows of, the same every time.
    mixed = (figures.row.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


RANKINGS = {
    "errors": Ranking(
        "Likely label errors",
        "In most views the teacher names another class than the label. The surest first: by how much its class is "
        "likelier than the label.",
        _errors,
    ),
    "unsure": Ranking("Least sure", "The highest entropy, the mean over views.", lambda figures: figures.entropy),
    "inconsistent": Ranking(
        "Least consistent", "The fewest views in which the teacher names its own likeliest class.", _inconsistent
    ),
    "chance": Ranking("A random sample", "For comparison: how the teacher usually does.", _by_chance),
}


@dataclass
class Gallery:
    """What was written."""

    samples: int = 0  # in samples.csv
    shown: int = 0
    pictured: int = 0
    problems: list[str] = field(default_factory=list)  # why the samples of a block have no picture

    @property
    def in_words(self) -> list[str]:
        """The first problems, a sentence each."""
        more = len(self.problems) - MAX_PROBLEMS
        said = [f"No pictures of {problem}" for problem in self.problems[:MAX_PROBLEMS]]
        return said + ([f"No pictures of the samples of {more:,} more blocks."] if more > 0 else [])


def write_gallery(store: Store, folders: Sequence[Root], out: Path, most: int) -> Gallery:
    """Write index.html, samples.csv, classes.csv and confusions.csv into a new folder; thumbnails and pages of samples.

    Args:
        folders: where the dataset's tars are looked for; none: there are no pictures.
        most: samples that have a card in the gallery: all, if there are so few, else a quarter of each ranking.

    Raises RecipeError when the folder is not empty, StoreMismatch for a copy without logits.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out}: is there already and not empty. Give another folder, or delete it.")
    out.mkdir(parents=True, exist_ok=True)
    total = sum(store.identity.dataset.tars[block].count for block in store.blocks)
    summary = Summary(store.identity.num_classes)
    kept: dict[str, Figures] = {}
    with ExitStack() as closing:
        meter = closing.enter_context(progress("what the teacher says", total, "samples"))
        file = closing.enter_context((out / "samples.csv").open("w", newline="", encoding="utf-8"))
        writer = None
        for some in read_figures(store, summary):
            columns = _columns(some, store.identity)
            if writer is None:
                writer = csv.writer(file)
                writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
            _keep_best(kept, some, total if total <= most else max(1, most // len(RANKINGS)))
            meter.advance(len(some.row))
    shown = _union(kept)
    gallery = Gallery(summary.samples, len(shown.row))
    thumbnails = _write_pictures(store, folders, shown, out, gallery) if folders else {}
    _write_csv(out / "classes.csv", _class_rows(summary, store.identity))
    _write_csv(out / "confusions.csv", _pair_rows(summary, store.identity))
    page = _page(store, summary, shown, thumbnails, gallery)
    (out / "index.html").write_text(page, encoding="utf-8")
    return gallery


def _keep_best(kept: dict[str, Figures], some: Figures, count: int) -> None:
    """Of each ranking the best so many of those that were kept and these."""
    for name, ranking in RANKINGS.items():
        both = concatenate([kept[name], some]) if name in kept else some
        kept[name] = both.take(_ranked(ranking, both)[:count])


def _ranked(ranking: Ranking, figures: Figures) -> NDArray[np.int64]:
    """Indices of those that are of a ranking, the first one first."""
    score = ranking.score(figures)
    order = np.argsort(-score, kind="stable")  # nan comes last
    return order[: np.count_nonzero(~np.isnan(score))]


def _union(kept: Mapping[str, Figures]) -> Figures:
    """Every kept sample once, in the order of the rows."""
    together = concatenate(list(kept.values()))
    return together.take(np.unique(together.row, return_index=True)[1])


# ---- tables --------------------------------------------------------------------------------------------------------


def _columns(figures: Figures, identity: StoreIdentity) -> dict[str, list[Any]]:
    """Of samples.csv, by name."""
    names = [*identity.dataset.classes, ""]  # the last one: no label
    label = np.where(figures.label == NO_LABEL, len(names) - 1, figures.label).tolist()
    numbers = {
        name: [f"{value:.6g}" if value == value else "" for value in getattr(figures, name).tolist()]
        for name in ("agreement", "consistency", "entropy", "margin", "top1_probability", "label_probability", "gap")
    }
    return {
        "key": figures.key.tolist(),
        "row": figures.row.tolist(),
        "label": ["" if index == NO_LABEL else index for index in figures.label.tolist()],
        "label_name": [names[index] for index in label],
        "top1": figures.top1.tolist(),
        "top1_name": [names[index] for index in figures.top1.tolist()],
        **numbers,
        **{f"dropped_{name}": [f"{value:.6g}" for value in mass.tolist()] for name, mass in figures.dropped.items()},
    }


def _class_rows(summary: Summary, identity: StoreIdentity) -> list[dict[str, object]]:
    """The classes, those that the teacher names least where they are the label first."""
    likeliest: dict[int, tuple[int, int]] = {}
    for label, top1, count in summary.confusions():
        likeliest.setdefault(label, (top1, count))
    share = np.divide(
        summary.right, summary.of_class, out=np.full(summary.num_classes, np.nan), where=summary.of_class > 0
    )
    rows = []
    for index in np.argsort(share, kind="stable").tolist():
        most, count = likeliest.get(index, (None, 0))
        rows.append(
            {
                "class": index,
                "name": identity.dataset.classes[index],
                "samples": int(summary.of_class[index]),
                "agreement": None if np.isnan(share[index]) else round(float(share[index]), 6),
                "otherwise": int(summary.otherwise[index]),
                "most_often": most,
                "most_often_name": None if most is None else identity.dataset.classes[most],
                "most_often_samples": count,
                "views_named": int(summary.named[index]),
            }
        )
    return rows


def _pair_rows(summary: Summary, identity: StoreIdentity) -> list[dict[str, object]]:
    names = identity.dataset.classes
    return [
        {"label": label, "label_name": names[label], "top1": top1, "top1_name": names[top1], "samples": count}
        for label, top1, count in summary.confusions()
    ]


def _write_csv(file: Path, rows: list[dict[str, object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as writing:
        if rows:
            writer = csv.DictWriter(writing, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


# ---- pictures ------------------------------------------------------------------------------------------------------


def _write_pictures(
    store: Store, folders: Sequence[Root], shown: Figures, out: Path, gallery: Gallery
) -> dict[int, str]:
    """Thumbnail and page of every sample, as far as its image is there and is the one that the teacher saw.

    Returns the name of the thumbnail by row; `gallery` hears why there is none.
    """
    (out / "thumbs").mkdir()
    (out / "samples").mkdir()
    names: dict[int, str] = {}
    numbers, offsets = np.divmod(shown.row, store.identity.rows_per_block)
    with progress("pages of samples", len(shown.row), "samples") as meter:
        for number in np.unique(numbers).tolist():
            rows = offsets[numbers == number].tolist()
            images = SampleImages(store, folders)  # for each block anew, so that few are in memory
            try:
                for offset, page in sample_pages(images, number, rows, back="../index.html"):
                    row = number * store.identity.rows_per_block + offset
                    name = _write_thumbnail(images.plain(number, offset), out / "thumbs" / str(row))
                    (out / "samples" / f"{row}.html").write_text(page, encoding="utf-8")
                    names[row] = f"thumbs/{name}"
                    meter.advance()
            except OfflineKDError as error:
                gallery.problems.append(f"block {number}, {len(rows):,} samples: {error}")
    gallery.pictured = len(names)
    return names


def _write_thumbnail(pixels: NDArray[np.uint8], file: Path) -> str:
    """An image `[H, W, 3]`, as it is if it is small; returns the name of the file that was written."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) <= PIXELATED:
        image.save(file.with_suffix(".png"))
        return f"{file.name}.png"
    image.thumbnail((2 * THUMBNAIL, THUMBNAIL))
    image.save(file.with_suffix(".jpg"), quality=85)
    return f"{file.name}.jpg"


# ---- the page ------------------------------------------------------------------------------------------------------


def _page(store: Store, summary: Summary, shown: Figures, thumbnails: Mapping[int, str], gallery: Gallery) -> str:
    identity = store.identity
    dataset = identity.dataset
    classes = _class_rows(summary, identity)
    has_labels = dataset.labels != "none"
    rankings = {name: one for name, one in RANKINGS.items() if has_labels or name != "errors"}
    return render_page(
        "gallery",
        title=f"What the teacher knows: {identity.name}",
        about=f"{identity.teacher.name} on {summary.samples:,} samples of {dataset.name}/{dataset.split}, "
        f"{identity.views.num_views} views of each; sha256:{store.digest[:16]}",
        tiles=_tiles(summary, classes, has_labels),
        notes=_notes(store, summary, gallery),
        has_labels=has_labels,
        rankings=rankings,
        classes=list(enumerate(dataset.classes)),
        cards=_cards(shown, identity, thumbnails, rankings),
        worst=[row for row in classes if row["samples"]][:MAX_CLASSES],
        num_classes=len(classes),
        pairs=_pair_rows(summary, identity)[:MAX_PAIRS],
        num_pairs=len(summary.pairs),
        matrix=_matrix(summary, identity) if has_labels and summary.num_classes <= MAX_MATRIX else [],
    )


def _tiles(summary: Summary, classes: list[dict[str, object]], has_labels: bool) -> list[tuple[str, str]]:
    samples = max(summary.samples, 1)
    tiles = []
    if has_labels:
        never = sum(1 for row in classes if row["samples"] and not row["views_named"])
        tiles += [
            (f"{summary.top1:.1f} %", "of views whose label the teacher names"),
            (f"{summary.suspects:,}", "samples named otherwise in most views"),
            (f"{summary.ece:.1f} %", "calibration error"),
            (f"{never:,}", "classes that it never names"),
        ]
    return [
        *tiles,
        (f"{100 * summary.consistency / samples:.1f} %", "of an image's views name its likeliest class"),
        (f"{summary.entropy / samples:.2f}", "nats of entropy"),
    ]


def _notes(store: Store, summary: Summary, gallery: Gallery) -> list[str]:
    notes = []
    if gallery.shown < gallery.samples:
        notes.append(
            f"{gallery.shown:,} of {gallery.samples:,} samples are shown, those that each list has first; samples.csv "
            "has all of them."
        )
    if "partner" in store.identity.views.arrays():
        notes.append(
            "Images are mixed with others in these views. A view counts with the share that the image itself has in "
            "it; where the teacher names the other image, that is no disagreement."
        )
    if store.identity.codec.name == "topk":
        notes.append("The store has the largest logits alone: entropies take what is left as spread evenly.")
    if not store.created.keeps_digests:
        notes.append("This store has no keys, but hashes of them; pages of samples have the keys.")
    if not gallery.pictured:
        notes.append("There are no pictures: the images were not at hand.")
    return notes + gallery.in_words


def _cards(
    shown: Figures, identity: StoreIdentity, thumbnails: Mapping[int, str], rankings: Mapping[str, Ranking]
) -> list[dict[str, object]]:
    names = identity.dataset.classes
    scores = {name: ranking.score(shown) for name, ranking in rankings.items()}
    cards = []
    for index, row in enumerate(shown.row.tolist()):
        label, top1 = int(shown.label[index]), int(shown.top1[index])
        cards.append(
            {
                "row": row,
                "key": shown.key[index],
                "thumbnail": thumbnails.get(row),
                "label": label,
                "label_name": "" if label == NO_LABEL else names[label],
                "top1": top1,
                "top1_name": names[top1],
                "is_other": label not in (NO_LABEL, top1),
                "probability": f"{100 * shown.top1_probability[index]:.0f} %",
                "agreement": f"{100 * shown.agreement[index]:.0f} %",
                "consistency": f"{100 * shown.consistency[index]:.0f} %",
                "entropy": f"{shown.entropy[index]:.2f}",
                "figures": {
                    name: f"{getattr(shown, name)[index]:.4g}"
                    for name in ("agreement", "consistency", "entropy", "margin", "gap")
                    if label != NO_LABEL or name not in ("agreement", "gap")
                },
                "ranks": {name: f"{score[index]:.6g}" for name, score in scores.items() if not np.isnan(score[index])},
            }
        )
    return cards


def _matrix(summary: Summary, identity: StoreIdentity) -> list[dict[str, object]]:
    """Rows of the matrix of labels and the teacher's classes, in samples; shades from 0 to 9."""
    counts = np.diag(summary.of_class - summary.otherwise).astype(np.int64)
    for label, top1, count in summary.confusions():
        counts[label, top1] = count
    # The diagonal would drown the rest: what is off it has a shade of its own, by the root of its share.
    most = max(1, int((counts - np.diag(np.diag(counts))).max()))
    shades = np.ceil(9 * np.sqrt(counts / most)).clip(max=9).astype(int)
    return [
        {
            "label": label,
            "name": identity.dataset.classes[label],
            "cells": [
                (top1, int(count), "own" if top1 == label else f"heat{shades[label, top1]}")
                for top1, count in enumerate(counts[label].tolist())
            ],
        }
        for label in range(len(counts))
    ]
