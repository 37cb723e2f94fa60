"""Copy a store, or a part of it, from one place to another: `store push` and `store pull`.

Every file is checked before it is sent and read back where it arrived. What is there already and right is not sent
again, so a copy that was interrupted goes on. manifest.json comes last: until then nothing opens.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from offline_kd.store.layout import small_files
from offline_kd.store.opening import all_digests, open_store
from offline_kd.store.places import Place, can_list, place_at
from offline_kd.store.reader import PromisedEntry, Store, parse_metadata, promised_entries, stored_object
from offline_kd.store.schema import Held, StoredObject, StoreManifest
from offline_kd.store.signing import check_signed, damage, read_signature, signature_names
from offline_kd.store.writer import manifest_bytes
from offline_kd.support.console import progress
from offline_kd.support.errors import RecipeError, StoreCorrupt, StoreError, StoreMismatch

KINDS = ("logits", "decisions")


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
        only: kinds of targets to take, of KINDS; keys, labels and views always come along.
        digest: what the source must be.
        signed_by: public key whose signature the source must have. Signatures always come along.

    Raises:
        StoreMismatch: the target holds another store, or more than is asked for now; the source lacks that signature.
        StoreCorrupt: a file of the source is damaged, or did not arrive as it was sent.
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
    small = [(name, manifest.files.get(name)) for name in small_files(store.additions, store.parts)]
    small += _signatures(store)
    counts = {"files": 0, "bytes": 0, "already_there": 0}
    of_block: dict[tuple[str, str, int], list[PromisedEntry]] = {}
    for one in promised_entries(store, held):
        of_block.setdefault((one.part, one.decisions, one.block), []).append(one)
    entries = list(of_block.values())
    there = target.sizes()

    def send(name: str, expected: StoredObject) -> tuple[int, bool]:
        """Bring one file over; returns its size and whether it was there already."""
        if there.get(name) == expected.bytes and _is(target.read(name), expected):
            return expected.bytes, True
        try:
            content = store.place.read(name)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreCorrupt(f"{store.place}/{name}: missing. Run `offline-kd store verify` on it.") from None
        if not _is(content, expected):
            raise StoreCorrupt(
                f"{store.place}/{name}: {len(content):,} bytes with sha256 {hashlib.sha256(content).hexdigest()}, "
                f"committed were {expected.bytes:,} with {expected.sha256}. Nothing that opens was written to "
                f"{target}: repair the source, or copy from another place."
            )
        target.put(name, content)
        if not _is(target.read(name), expected):
            raise StoreCorrupt(f"{target}/{name}: did not arrive as it was sent. Run the same command again.")
        return expected.bytes, False

    def send_entries(some: list[PromisedEntry]) -> list[tuple[int, bool]]:
        """The entries of one block, one after the other: objects first, then the entry that vouches for them."""
        done: dict[str, tuple[int, bool]] = {}
        for one in some:
            entry = store.tables_entry(one.part, one.decisions) if one.decisions else store.ledger_entry(one.name)
            if missing := set(one.keys) - set(entry.objects):
                raise StoreCorrupt(f"{store.place}/ledger/{one.name}: does not vouch for {min(missing)}. Verify it.")
            for key in sorted(set(one.keys) - set(done)):
                done[key] = send(f"targets.zarr/{key}", entry.objects[key])
            content = store.place.read(f"ledger/{one.name}")
            file = f"ledger/{one.name}"
            done[file] = send(file, StoredObject(bytes=len(content), sha256=store.entries[one.name]))
        return list(done.values())

    def count(results: Sequence[tuple[int, bool]]) -> None:
        for size, was_there in results:
            counts["files"] += 1
            counts["bytes"] += size
            counts["already_there"] += was_there

    title = f"{store.place} -> {target}"
    workers = max(store.place.parallel, target.parallel)
    with progress(title, len(entries), "blocks") as meter, ThreadPoolExecutor(workers) as threads:
        for name, expected in small:
            if expected is None:
                raise StoreCorrupt(f"{store.place}/manifest.json: does not list {name}. Run `store verify` on it.")
            count([send(name, expected)])
        waiting: set[Future[list[tuple[int, bool]]]] = set()
        try:
            for task in [*entries, None]:
                while waiting and (task is None or len(waiting) >= 2 * workers):
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        count(future.result())
                        meter.advance()
                if task is not None:
                    waiting.add(threads.submit(send_entries, task))
        finally:
            for future in waiting:
                future.cancel()
    target.put("manifest.json", manifest_bytes(new_manifest))
    return Copied(manifest.digest, counts["files"], counts["bytes"], counts["already_there"], held)


def _signatures(store: Store) -> list[tuple[str, StoredObject | None]]:
    """The files of every signature of a store, of what it is and of what it was before it grew."""
    found: list[tuple[str, StoredObject | None]] = []
    for digest in all_digests(store):
        if problem := damage(store.place, digest):
            raise StoreCorrupt(f"{store.place}/signatures/{digest}: {problem}. Sign again, or delete it.")
        files = read_signature(store.place, digest)
        if files is not None:
            names = signature_names(digest)
            found += [(name, stored_object(content)) for name, content in zip(names, files.values(), strict=True)]
    return found


def _is(content: bytes, expected: StoredObject) -> bool:
    return len(content) == expected.bytes and hashlib.sha256(content).hexdigest() == expected.sha256


def _selection(store: Store, blocks: range | None, views: int | None, only: Sequence[str] | None) -> Held | None:
    """What the copy will hold; None for everything."""
    assert store.manifest is not None
    before, per_group = store.manifest.held, store.created.views_per_group
    all_blocks, all_views = store.blocks, before.views if before else max(store.manifest.views.values())
    if unknown := set(only or ()) - set(KINDS):
        raise RecipeError(f"--only {', '.join(sorted(unknown))}: there are {' and '.join(KINDS)}.")
    if blocks is not None and not (all_blocks.start <= blocks.start < blocks.stop <= all_blocks.stop):
        raise RecipeError(
            f"--blocks {blocks.start}:{blocks.stop}: {store.place} holds {all_blocks.start}:{all_blocks.stop}."
        )
    if views is not None and not (0 < views <= all_views and views % per_group == 0):
        raise RecipeError(
            f"--views 0:{views}: {store.place} holds 0:{all_views} in groups of {per_group}: take whole groups."
        )
    kinds = [kind for kind in KINDS if (only is None or kind in only) and (before is None or before.has(f"{kind}/"))]
    chosen = Held(
        first_block=(blocks or all_blocks).start,
        end_block=(blocks or all_blocks).stop,
        views=views or all_views,
        arrays=None if kinds == list(KINDS) else kinds,
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
        content = target.read("manifest.json")
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
        found, here = target.read("store.json"), store.place.read("store.json")
        if found != here:
            raise StoreMismatch(f"{target}: holds the beginning of another store. Give another place, or delete it.")


def describe(held: Held | None) -> str:
    """What a copy holds, in words."""
    if held is None:
        return "all of it"
    kinds = "" if held.arrays is None else f", {' and '.join(held.arrays) or 'no targets'} only"
    return f"blocks {held.first_block}:{held.end_block}, views 0:{held.views}{kinds}"
