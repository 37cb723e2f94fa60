"""What a store holds, from whom, how faithfully, and which objectives it serves."""

from offline_kd.store.opening import group_digests
from offline_kd.store.reader import Store
from offline_kd.store.serving import describe, served_terms


def store_info(store: Store) -> dict[str, object]:
    """Everything that `offline-kd store info --json` shows, as JSON knows it: text, numbers, lists and mappings."""
    identity, manifest = store.identity, store.manifest
    assert manifest is not None
    fidelity = manifest.fidelity.get(store.targets)
    return {
        "digest": f"sha256:{store.digest}",
        "holds": describe(manifest.held),
        "blocks": len(store.blocks),
        "rows": sum(identity.dataset.tars[block].count for block in store.blocks) * identity.views.num_views,
        "views": identity.views.model_dump(mode="json") | {"stored": identity.views.num_views},
        "group digests": group_digests(store),
        "bytes": manifest.total_bytes,
        "bytes by array": manifest.bytes_by_array,
        "codecs": {"logits": identity.codec.model_dump(mode="json")},
        "teacher": identity.teacher.model_dump(mode="json"),
        "other teachers": [one.name for one in store.additions if one.extends is None],
        "dataset": identity.dataset.model_dump(mode="json", exclude={"tars", "classes"})
        | {"samples": sum(tar.count for tar in identity.dataset.tars), "classes": len(identity.dataset.classes)},
        "licences": {"dataset": identity.dataset.licence, "teacher": identity.teacher.licence},
        "left out": manifest.left_out,
        "serves": served_terms(store),
        "fidelity": fidelity.model_dump(mode="json") if fidelity else None,
        "schema version": manifest.schema_version,
        "versions": identity.versions,
    }
