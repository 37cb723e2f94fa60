"""What the teacher said of every sample, over all its stored views, in a few figures: one pass, block by block.

A view into which another image was mixed counts with the share that the sample itself has in it, the class of the
other image is no wrong answer there, and is left out of what the teacher says of the sample.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline_kd.data.tars import unpack_keys
from offline_kd.store.answers import BINS, refuse_wild
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.layout import NO_LABEL
from offline_kd.store.logit_reading import logit_arrays, stored_decoder
from offline_kd.store.reader import Arrays, Store
from offline_kd.store.serving import describe
from offline_kd.support.errors import StoreCorrupt, StoreMismatch
from offline_kd.views.mixing import WHOLE

MAX_MEANS = 2**25  # rows times classes whose mean probabilities are held
MAX_FLOATS = 2**22  # of logits that are decoded at once
LOGITS = "logits"  # what the codec dropped, beside names of decisions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """What the teacher said of n samples; every mean is over views."""

    row: NDArray[np.int64]  # [n] of the store
    key: NDArray[np.object_]  # [n] of str; of stores that keep none, the hash of it
    label: NDArray[np.int64]  # [n] NO_LABEL where the dataset has none
    top1: NDArray[np.int64]  # [n] class of the largest mean probability
    top1_probability: Floats  # [n] that probability
    label_probability: Floats  # [n] mean probability of the label; nan without labels
    agreement: Floats  # [n] share of views in which the teacher names the label; nan without labels
    consistency: Floats  # [n] share of views in which it names `top1`
    entropy: Floats  # [n] mean, in nats
    margin: Floats  # [n] mean difference of the two largest probabilities
    dropped: dict[str, Floats]  # [n] mean mass that was not kept: of LOGITS, and of decisions by name

    def take(self, index: NDArray[np.int64]) -> "Figures":
        """Some of the samples, in the order of `index`."""
        return _each([self], lambda arrays: arrays[0][index])

    @property
    def gap(self) -> Floats:
        """`[n]` by how much the teacher's class is likelier than the label; nan without labels."""
        return self.top1_probability - self.label_probability

    @property
    def is_suspect(self) -> NDArray[np.bool_]:
        """`[n]` whether the teacher names another class than the label, in most views."""
        return (self.top1 != self.label) & (self.agreement < 0.5)  # nan is less than nothing


def concatenate(parts: list[Figures]) -> Figures:
    """All samples of all parts, one part after the other."""
    return _each(parts, np.concatenate)


def _each(parts: list[Figures], change: Any) -> Figures:
    fields = {name: change([vars(one)[name] for one in parts]) for name in vars(parts[0]) if name != "dropped"}
    dropped = {name: change([one.dropped[name] for one in parts]) for name in parts[0].dropped}
    return Figures(**fields, dropped=dropped)


@dataclass
class Summary:
    """Sums over samples and views, by class where an array has C elements."""

    num_classes: int
    samples: int = 0
    views: int = 0  # rows
    of_class: Floats = field(init=False)  # [C] samples with this label
    right: Floats = field(init=False)  # [C] sum of the agreement of samples with this label
    otherwise: Floats = field(init=False)  # [C] samples with this label and another `top1`
    named: Floats = field(init=False)  # [C] views in which the teacher names this class
    bins: Floats = field(init=False)  # [3, BINS] views by confidence: how many, right ones, sum of the confidence
    suspects: int = 0  # samples whose label the teacher does not name, in most views
    entropy: float = 0.0
    consistency: float = 0.0
    pairs: dict[int, int] = field(default_factory=dict)  # samples by label * C + top1, where they differ

    def __post_init__(self) -> None:
        self.of_class, self.right, self.otherwise, self.named = (np.zeros(self.num_classes) for _ in range(4))
        self.bins = np.zeros((3, BINS))

    def add(self, one: Figures) -> None:
        self.samples += len(one.row)
        self.entropy += float(one.entropy.sum())
        self.consistency += float(one.consistency.sum())
        self.suspects += int(one.is_suspect.sum())
        labelled = one.label != NO_LABEL
        label, top1 = one.label[labelled], one.top1[labelled]
        self.of_class += np.bincount(label, minlength=self.num_classes)
        self.right += np.bincount(label, weights=one.agreement[labelled], minlength=self.num_classes)
        self.otherwise += np.bincount(label[label != top1], minlength=self.num_classes)
        found, counts = np.unique((label * self.num_classes + top1)[label != top1], return_counts=True)
        for pair, count in zip(found.tolist(), counts.tolist(), strict=True):
            self.pairs[pair] = self.pairs.get(pair, 0) + count

    def add_views(self, named: NDArray[np.int64], confidence: Floats, right: NDArray[np.bool_]) -> None:
        """Some views `[m, v]`: the class that the teacher names, with which probability, and whether it is right."""
        self.views += named.size
        self.named += np.bincount(named.ravel(), minlength=self.num_classes)
        at = np.minimum((confidence * BINS).astype(np.int64), BINS - 1).ravel()
        for sums, weights in zip(self.bins, (None, right.ravel(), confidence.ravel()), strict=True):
            sums += np.bincount(at, weights=weights, minlength=BINS)

    @property
    def top1(self) -> float:
        """Percent of views in which the teacher names the label."""
        return float(100 * self.bins[1].sum() / max(self.views, 1))

    @property
    def ece(self) -> float:
        """Expected calibration error over all views, in percent."""
        return float(100 * np.abs(self.bins[1] - self.bins[2]).sum() / max(self.views, 1))

    def confusions(self) -> list[tuple[int, int, int]]:
        """Label, the teacher's class and the number of such samples, most frequent first."""
        order = sorted(self.pairs.items(), key=lambda pair: (-pair[1], pair[0]))
        return [(*divmod(pair, self.num_classes), count) for pair, count in order]


def read_figures(store: Store, summary: Summary) -> Iterator[Figures]:
    """The figures of every block that is here, in parts that fit into memory; what they sum up to goes to `summary`.

    Raises StoreMismatch for a store or a copy without logits or of a multi-label teacher, StoreCorrupt for what no
    capture wrote.
    """
    if store.identity.teacher.kind == "embedding":
        raise StoreMismatch(
            f"{store.place}: holds no logits, because its teacher has no classes, and what a teacher thinks of a "
            "sample is in its logits. `store info` shows what this one holds."
        )
    held = store.manifest.held if store.manifest else None
    if held and not store.has_logits:
        raise StoreMismatch(
            f"{store.place}: this copy holds {describe(held)}, and what the teacher thinks of a sample is in its "
            "logits. Pull those too: `offline-kd store pull` without --only."
        )
    if store.identity.teacher.kind == "multilabel":
        raise StoreMismatch(
            f"{store.place}: is of a multi-label teacher. What is said of samples here, by confidence, margin and "
            "label, is of one softmax and one label: train students from it, or look at its page, index.html."
        )
    for number in store.blocks:
        arrays = store.read(number, 0, ["label", "probe/row", "probe/view"])
        refuse_wild(store, number, arrays)
        rows, step = len(arrays["label"]), max(1, MAX_MEANS // store.identity.num_classes)
        for start in range(0, rows, step):
            yield _of_rows(store, number, range(start, min(start + step, rows)), summary)


def _of_rows(store: Store, number: int, rows: range, summary: Summary) -> Figures:
    """Of some rows of a block."""
    identity, part = store.identity, slice(rows.start, rows.stop)
    # Of the largest logits alone, probabilities at T = 1 are those of the tail at T = 1.
    codec = identity.codec
    codec = codec.model_copy(update={"tail_temperature": 1}) if isinstance(codec, TopK) else codec
    names, decode = logit_arrays(store), stored_decoder(store, codec)
    fixed = store.read(number, 0, ["label", "key" if store.created.keeps_digests else "key_hash"])
    label = fixed["label"].astype(np.int64)[part]
    sums = _Sums(len(rows), identity.num_classes, identity.views.num_views)
    for group, views in enumerate(identity.groups):
        arrays = store.read(number, group, _wanted(store))
        others, share = _mixed_in(store, number, arrays, (len(fixed["label"]), len(views)))
        few = max(1, MAX_FLOATS // (len(views) * identity.num_classes))
        for first in range(rows.start, rows.stop, few):
            some = slice(first, min(first + few, rows.stop))
            encoded = {part: arrays[name][some] for part, name in names.items()}
            logits = decode(encoded)
            if not bool(logits.isfinite().all()):
                raise StoreCorrupt(
                    f"{store.place}: block {number} has logits that are no numbers: run `store verify` on it."
                )
            at = slice(some.start - rows.start, some.stop - rows.start)
            sums.add(at, views, logits.softmax(-1), others[some], share[some], _not_kept(codec, encoded, logits))
            right = (sums.named[at, views.start : views.stop] == label[at, None]) | sums.excused(at, views)
            summary.add_views(
                sums.named[at, views.start : views.stop], sums.confidence[at, views.start : views.stop], right
            )
        for name in (name for name in arrays if name.endswith("/dropped")):
            sums.drop(name.split("/")[1], arrays[name][part].astype(np.float64).sum(1))
    if "key" in fixed:
        keys = unpack_keys(fixed["key"].astype(np.uint8)[part])
    else:
        keys = [f"hash {one:016x}" for one in fixed["key_hash"][part].tolist()]
    found = sums.figures(np.arange(rows.start, rows.stop) + number * identity.rows_per_block, keys, label)
    summary.add(found)
    return found


def _wanted(store: Store) -> list[str]:
    held = store.manifest.held if store.manifest else None
    names = list(logit_arrays(store).values())
    if "partner" in store.identity.views.arrays():
        names += ["label", "view/partner", "view/share"]
    dropped = [f"decisions/{name}/dropped" for name in store.identity.decisions]
    return names + [name for name in dropped if name in store.arrays and (held is None or held.has(name))]


def _mixed_in(
    store: Store, number: int, arrays: Arrays, shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`[rows, v]` the class of the image that is mixed into each view, and the share of the sample itself.

    The class is -1 where nothing is mixed in, or an image of the same class.
    """
    if "view/partner" not in arrays:
        return np.full(shape, -1), np.ones(shape, dtype=np.float32)
    label, partner = arrays["label"].astype(np.int64), arrays["view/partner"].astype(np.int64)
    if partner.max() >= len(label) or (arrays["view/share"].astype(np.int64) > WHOLE).any():
        raise StoreCorrupt(f"{store.place}: block {number} mixes in what is not there: run `store verify` on it.")
    others = label[partner.clip(min=0)]
    mixed = (partner >= 0) & (others != label[:, None]) & (others != NO_LABEL)
    share = arrays["view/share"].astype(np.float32) / WHOLE
    return np.where(mixed, others, -1), share.clip(min=1 / WHOLE)


def _not_kept(
    codec: AnyCodec, encoded: Mapping[str, NDArray[np.generic]], logits: Tensor
) -> NDArray[np.float64] | None:
    """`[m, v]` the probability of all classes whose own logit was not kept; None where all were."""
    if not isinstance(codec, TopK):
        return None
    kept = torch.from_numpy(encoded["top_id"].astype(np.int64))
    return 1 - logits.softmax(-1).gather(-1, kept).sum(-1).double().numpy()


class _Sums:
    """Of n samples of a block, while view groups are read one after the other."""

    def __init__(self, samples: int, num_classes: int, num_views: int) -> None:
        self.probabilities = torch.zeros(samples, num_classes)  # weighted by share, without what is mixed in
        self.named = np.zeros((samples, num_views), dtype=np.int64)
        self.confidence = np.zeros((samples, num_views))
        self.others = np.full((samples, num_views), -1)
        self.share = np.zeros((samples, num_views))
        self.entropy, self.margin = np.zeros(samples), np.zeros(samples)
        self.dropped: dict[str, NDArray[np.float64]] = {}

    def add(
        self,
        at: slice,
        views: range,
        p: Tensor,
        others: NDArray[np.int64],
        share: NDArray[np.float32],
        not_kept: NDArray[np.float64] | None,
    ) -> None:
        """Probabilities `[m, v, C]` of the samples `at` in some views."""
        where = (at, slice(views.start, views.stop))
        top = p.topk(2, dim=-1)
        self.named[where], self.confidence[where] = top.indices[..., 0].numpy(), top.values[..., 0].numpy()
        self.others[where], self.share[where] = others, share
        entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1).numpy()
        self.entropy[at] += (share * entropy).sum(1)
        self.margin[at] += (share * (top.values[..., 0] - top.values[..., 1]).numpy()).sum(1)
        if not_kept is not None:
            self.drop(LOGITS, not_kept.sum(1), at)
        mixed = torch.from_numpy(others >= 0)
        if mixed.any():
            index = torch.from_numpy(others.clip(min=0))[..., None]
            p = p.scatter(-1, index, torch.where(mixed[..., None], 0, p.gather(-1, index)))
        self.probabilities[at] += (p * torch.from_numpy(share)[..., None]).sum(1)

    def drop(self, name: str, mass: NDArray[np.float64], at: slice = slice(None)) -> None:
        self.dropped.setdefault(name, np.zeros(len(self.share)))[at] += mass

    def excused(self, at: slice, views: range) -> NDArray[np.bool_]:
        """`[m, v]` whether the teacher names what is mixed in."""
        where = (at, slice(views.start, views.stop))
        return self.named[where] == self.others[where]

    def figures(self, row: NDArray[np.int64], keys: list[str], label: NDArray[np.int64]) -> Figures:
        total = self.share.sum(1)
        mean = (self.probabilities / torch.from_numpy(total)[:, None]).double()
        most = mean.max(1)
        top1 = most.indices.numpy()
        own = mean.gather(1, torch.from_numpy(label.clip(min=0))[:, None])[:, 0].numpy()

        def share_of(wanted: NDArray[np.int64]) -> Floats:
            says = (self.named == wanted[:, None]) | (self.named == self.others)
            return (self.share * says).sum(1) / total

        labelled = label != NO_LABEL
        num_views = self.share.shape[1]
        return Figures(
            row=row,
            key=np.array([*keys, None], dtype=object)[:-1],
            label=label,
            top1=top1,
            top1_probability=most.values.numpy(),
            label_probability=np.where(labelled, own, np.nan),
            agreement=np.where(labelled, share_of(label), np.nan),
            consistency=share_of(top1),
            entropy=self.entropy / total,
            margin=self.margin / total,
            dropped={name: mass / num_views for name, mass in self.dropped.items()},
        )
