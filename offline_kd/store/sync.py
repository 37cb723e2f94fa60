"""Copy a store, or a part of it, from one place to another: `store push` and `store pull`.

Every file is checked before it is sent and read back where it arrived. What is there already and right is not sent
again, so a copy that was interrupted goes on. manifest.json comes last: until then nothing opens.

The card is not copied: it is made here, from what was checked. A page of somebody else opens in no browser of ours.
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from offline_kd.store.card import CARD_FILES, write_card
from offline_kd.store.evaluation_beside import copy_evaluations
from offline_kd.store.inventory import Listing, PromisedEntry, held_blocks, promised_entries, promised_pages
from offline_kd.store.layout import small_files
from offline_kd.store.leftovers import sweep
from offline_kd.store.memory import Memory
from offline_kd.store.objects import ENTRY_BYTES, metadata_limit, read_metadata
from offline_kd.store.opening import all_digests, open_store
from offline_kd.store.reader import Store, parse_metadata, stored_object
from offline_kd.store.schema import KINDS, Held, StoredObject, StoreManifest, kind_of
from offline_kd.store.signing import check_signed, damage, read_signature, signature_names
from offline_kd.store.writer import holds, manifest_bytes
from offline_kd.support.console import progress
from offline_kd.support.errors import RecipeError, StoreCorrupt, StoreError, StoreMismatch, StoreUnreachable
from offline_kd.support.places import Place, can_list, place_at
from offline_kd.support.proven import read_proven

PUTS = 2  # of a file that did not arrive as it was sent


@dataclass(frozen=True)
class Copied:
    """What a copy took."""

    digest: str
    files: int
    bytes: int
    already_there: int
    held: Held | None


def copy_store(
    source: Place | str | Path,
    target: Place | str | Path,
    *,
    blocks: range | None = None,
    views: int | None = None,
    only: Sequence[str] | None = None,
    digest: str | None = None,
    signed_by: Path | None = None,
) -> Copied:
    """Copy a finished store; the copy has the same digest, and if it is a part its manifest says of what.

    Args:
        blocks: numbers of the blocks to take.
        views: how many views to take, a whole number of groups.
        only: kinds of targets to take, of KINDS; keys, labels and views always come along, and with logits the
            features that they are computed from.
        digest: what the source must be.
        signed_by: public key whose signature the source must have. Signatures always come along.

    Raises:
        StoreMismatch: the target holds another store, or more than is asked for now; the source lacks that signature.
        StoreCorrupt: a file of the source is damaged.
        StoreUnreachable: a file did not arrive as it was sent.
    """
    target = target if not isinstance(target, str | Path) else place_at(target)
    if not can_list(target):
        raise StoreError(f"{target}: web addresses can be read only. Push to a folder or a bucket.")
    # What is copied is checked here, once; a local cache of it would be a second copy.
    store = replace(open_store(source, digest=digest), downloads=None)
    manifest = store.manifest
    assert manifest is not None
    if manifest.schema_version == 1:
        raise StoreMismatch(f"{store.place}: stores of schema version 1 have no checksums of their small files: cp -r.")
    if store.digest != manifest.digest:
        raise StoreMismatch(f"{store.place}: has grown since it was sha256:{digest}: give the digest that it has now.")
    if signed_by is not None:
        check_signed(store, signed_by)
    held = _selection(store, blocks, views, only)
    new_manifest = manifest.model_copy(update={"held": held})
    _refuse_other_store(target, new_manifest, store)
    way = Way(store, target, Listing(store, target.files()))
    sent = Sent()
    for name in small_files(store.additions, store.parts):
        if name not in CARD_FILES:
            sent += _send_listed(way, name)
    sent += _send_blocks(way, held)
    for name, size in promised_pages(store, held).items():
        sent += _send(way, f"hashes/{name}", StoredObject(bytes=size, sha256=store.sha256_listed(name)), size)
    for name, content in (_card_of_copy(way, new_manifest) | _signatures(store)).items():
        sent += _put(target, name, content)
    _put(target, "manifest.json", manifest_bytes(new_manifest))
    copy_evaluations(store, target)
    sweep(target)
    return Copied(manifest.digest, *sent, held=held)


@dataclass(frozen=True)
class Way:
    """From where to where, and what was there before."""

    store: Store
    target: Place
    there: Listing


class Sent(NamedTuple):
    """Files that are now at the target."""

    files: int = 0
    bytes: int = 0
    already_there: int = 0

    def __add__(self, other: object) -> "Sent":
        assert isinstance(other, Sent)
        return Sent(*(one + two for one, two in zip(self, other, strict=True)))


def _send_listed(way: Way, name: str) -> Sent:
    """A file that manifest.json vouches for."""
    manifest = way.store.manifest
    if manifest is None or name not in manifest.files:
        raise StoreCorrupt(f"{way.store.place}/manifest.json: does not list {name}. Run `store verify` on it.")
    return _send(way, name, manifest.files[name], metadata_limit(name))


def _send(way: Way, name: str, expected: StoredObject, limit: int) -> Sent:
    """Bring one file over, unless it is there."""
    source, target = way.store.place, way.target
    if way.there.get(name) == expected.bytes and holds(target, name, expected):
        return Sent(1, expected.bytes, 1)
    try:
        content = read_proven(source, name, expected.sha256, size=expected.bytes, limit=limit)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreCorrupt(f"{source}/{name}: missing. Run `offline-kd store verify` on it.") from None
    except StoreCorrupt as error:
        raise StoreCorrupt(f"{error} Nothing that opens was written to {target}.") from error
    return _put(target, name, content)


def _put(target: Place, name: str, content: bytes) -> Sent:
    """Write a file and read it back; raises StoreUnreachable when it does not arrive as it was sent."""
    for _ in range(PUTS if target.is_remote else 1):
        target.put(name, content)
        if holds(target, name, stored_object(content)):
            return Sent(1, len(content))
    raise StoreUnreachable(
        f"{target}/{name}: did not arrive as it was sent. Check disk and network, and run the same command again."
    )


def _send_block(way: Way, some: Sequence[PromisedEntry]) -> Sent:
    """The entries of one block, one after the other: objects first, then the entry that vouches for them."""
    store, done, sent = way.store, set[str](), Sent()
    for one in some:
        entry = (
            store.tables_entry(one.part, one.decisions)
            if one.decisions
            else store.block_entry(one.part, one.block, one.views)
        )
        for spec, key in zip(one.specs, one.keys, strict=True):
            if key not in done:
                done.add(key)
                expected = store.vouched(entry, spec, key)
                sent += _send(way, f"targets.zarr/{key}", expected, expected.bytes)
        file = f"ledger/{one.name}"
        sha256 = store.sha256_listed(one.name) if one.decisions else store.sha256_of(one.part, one.block, one.views)
        content = read_proven(store.place, file, sha256, limit=ENTRY_BYTES)
        sent += _send(way, file, stored_object(content), ENTRY_BYTES)
    return sent


def _send_blocks(way: Way, held: Held | None) -> Sent:
    """All blocks that the copy will hold, side by side."""
    store, sent = way.store, Sent()
    workers = store.at_once(max(store.place.parallel, way.target.parallel))
    total = sum(len(held_blocks(store, held)) + len(part.tables) for part in store.parts.values())
    of_block = groupby(promised_entries(store, held), lambda one: (one.part, one.decisions, one.block))
    with progress(f"{store.place} -> {way.target}", total, "blocks") as meter, ThreadPoolExecutor(workers) as threads:
        waiting: set[Future[Sent]] = set()
        try:
            for entries in chain((list(some) for _, some in of_block), [None]):
                while waiting and (entries is None or len(waiting) >= 2 * workers):
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        sent += future.result()
                        meter.advance()
                if entries is not None:
                    waiting.add(threads.submit(_send_block, way, entries))
        finally:
            for future in waiting:
                future.cancel()
    return sent


def _card_of_copy(way: Way, manifest: StoreManifest) -> dict[str, bytes]:
    """The card, made of what has just been checked, on the side that is nearer."""
    near, stores = way.store.place if way.target.is_remote else way.target, dict[str, Store]()
    for targets in sorted({part.targets for part in way.store.parts.values()}):
        store = way.store if targets == way.store.targets else open_store(way.store.place, targets=targets)
        views = min([store.identity.views.num_views, *([manifest.held.views] if manifest.held else [])])
        identity = store.identity.model_copy(update={"views": store.identity.views.with_count(views)})
        stores[targets] = replace(
            store, place=near, identity=identity, manifest=manifest, downloads=None, memory=Memory()
        )
    return write_card(stores, manifest)


def _signatures(store: Store) -> dict[str, bytes]:
    """The files of every signature of a store, of what it is and of what it was before it grew."""
    found: dict[str, bytes] = {}
    for digest in all_digests(store):
        if problem := damage(store.place, digest):
            raise StoreCorrupt(f"{store.place}/signatures/{digest}: {problem}. Sign again, or delete it.")
        files = read_signature(store.place, digest)
        if files is not None:
            found |= dict(zip(signature_names(digest), files.values(), strict=True))
    return found


def _selection(store: Store, blocks: range | None, views: int | None, only: Sequence[str] | None) -> Held | None:
    """What the copy will hold; None for everything."""
    assert store.manifest is not None
    before, per_group = store.manifest.held, store.created.views_per_group
    all_blocks, all_views = store.blocks, before.views if before else max(store.manifest.views.values())
    if unknown := set(only or ()) - set(KINDS):
        raise RecipeError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}.")
    if blocks is not None and not (all_blocks.start <= blocks.start < blocks.stop <= all_blocks.stop):
        raise RecipeError(
            f"--blocks {blocks.start}:{blocks.stop}: {store.place} holds {all_blocks.start}:{all_blocks.stop}."
        )
    if views is not None and not (0 < views <= all_views and views % per_group == 0):
        raise RecipeError(
            f"--views 0:{views}: {store.place} holds 0:{all_views} in groups of {per_group}: take whole groups."
        )
    kinds = [kind for kind in KINDS if (only is None or kind in only) and (before is None or before.has(f"{kind}/"))]
    if "logits" in kinds and any(part.codec.of_features for part in store.parts.values()):
        kinds = [kind for kind in KINDS if kind in kinds or kind == "features"]  # which logits are computed from
    has_features = any(kind_of(spec.name) == "features" for part in store.parts.values() for spec in part.specs)
    all_kinds = [kind for kind in KINDS if kind != "features" or has_features]
    chosen = Held(
        first_block=(blocks or all_blocks).start,
        end_block=(blocks or all_blocks).stop,
        views=views or all_views,
        arrays=None if set(all_kinds) <= set(kinds) else kinds,
    )
    everything = Held(
        first_block=0,
        end_block=store.created.num_blocks,
        views=max(store.manifest.views.values()),
        arrays=None,
    )
    return None if chosen == everything else chosen


def _refuse_other_store(target: Place, manifest: StoreManifest, store: Store) -> None:
    """A place that holds another store, or another part, is not written over."""
    try:
        content = read_metadata(target, "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        content = b""
    if content:
        try:
            there = parse_metadata(StoreManifest, content, f"{target}/manifest.json")
        except StoreError:
            return  # damaged: this copy repairs it
        grown = there.digest == manifest.digest or there.views in manifest.earlier
        if not grown or there.held not in (manifest.held, None) or (there.held is None and manifest.held is not None):
            raise StoreMismatch(
                f"{target}: holds sha256:{there.digest} (part: {there.held}), not sha256:{manifest.digest} "
                f"(part: {manifest.held}). Give another place, or delete it."
            )
    elif target.size("store.json") is not None:
        if read_metadata(target, "store.json") != read_metadata(store.place, "store.json"):
            raise StoreMismatch(f"{target}: holds the beginning of another store. Give another place, or delete it.")
