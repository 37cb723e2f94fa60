"""Stores that are made without a teacher: whole ledgers, for what does not depend on what a teacher said."""

import json
from collections.abc import Mapping

from offline_kd.data.manifest import Normalisation, Tar
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.identity import DatasetIdentity, TeacherIdentity
from offline_kd.store.layout import listed_names, num_pages, parts_of, small_files
from offline_kd.store.reader import stored_object
from offline_kd.store.schema import (
    PAGE_BLOCKS,
    SCHEMA_VERSION,
    Fidelity,
    StoreIdentity,
    StoreManifest,
    ledger_name,
    store_digest,
)
from offline_kd.store.writer import write_manifest, write_page, write_zarr_metadata
from offline_kd.support.places import Folder
from offline_kd.views import Views
from offline_kd.views.epochs import view_groups

NOTHING = Fidelity(
    rows=0,
    teacher_top1=0,
    mean_top1_probability=0,
    top1_agreement=0,
    mean_error=0,
    max_error=0,
    max_error_allowed=0,
    kl={},
    total_variation={},
)


def made_up_identity(
    tars: list[Tar], views: Views, codec: AnyCodec, classes: int, side: int, views_per_group: int
) -> StoreIdentity:
    """Of a store of square images of one size, by nobody."""
    return StoreIdentity(
        schema_version=SCHEMA_VERSION,
        name="made-up",
        dataset=DatasetIdentity(
            name="made-up",
            split="train",
            fingerprint="0" * 64,
            classes=[f"class {index}" for index in range(classes)],
            height=side,
            width=side,
            tars=tars,
            licence="",
        ),
        teacher=TeacherIdentity(
            name="made-up",
            model="made-up",
            model_args={},
            weights_sha256="0" * 64,
            normalisation=Normalisation(mean=(0, 0, 0), std=(1, 1, 1)),
            dtype="float32",
            evaluated_on="nothing",
            measured_top1=0,
            licence="",
        ),
        views=views,
        codec=codec,
        rows_per_block=max(tar.count for tar in tars),
        views_per_group=views_per_group,
        versions={},
    )


def declare(place: Folder, identity: StoreIdentity, hashes: Mapping[str, bytes], total_bytes: int = 0) -> None:
    """What `finish` writes, without a teacher to ask.

    Args:
        hashes: sha256 of every ledger entry, by file name.
    """
    raw, parts, views = json.loads(place.read("store.json")), parts_of(identity), {"": identity.views.num_views}
    names = listed_names(identity, parts, views)
    entries = {name: hashes[name].hex() for name in names if name.startswith("templates-")}
    names = [name for name in names if name not in entries]
    assert len(names) == num_pages(identity, views)
    pages, per_group = {}, len(names) // len(identity.groups)
    for index, group in enumerate(view_groups(views[""], identity.views_per_group)):
        of_group = b"".join(hashes[ledger_name(block, group)] for block in range(identity.num_blocks))
        size = 32 * PAGE_BLOCKS
        for number, name in enumerate(names[index * per_group : (index + 1) * per_group]):
            pages[name] = write_page(place, name, of_group[number * size : (number + 1) * size])
    write_zarr_metadata(place, parts)
    for name in ("README.md", "index.html"):
        place.put(name, b"")
    manifest = StoreManifest(
        schema_version=identity.schema_version,
        digest=store_digest(raw, [], pages | entries),
        views=views,
        pages=pages,
        entries=entries,
        files={name: stored_object(place.read(name)) for name in small_files([], parts)},
        fidelity={"": NOTHING},
        total_bytes=total_bytes,
        bytes_by_array={},
    )
    write_manifest(place, manifest)
