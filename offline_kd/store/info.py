"""What a store holds, from whom, how faithfully, and which objectives it serves: for programs and for people."""

from offline_kd.store.identity import TeacherIdentity
from offline_kd.store.join import proof_of_images
from offline_kd.store.opening import group_digests
from offline_kd.store.reader import Store
from offline_kd.store.schema import Fidelity
from offline_kd.store.serving import describe, served_terms
from offline_kd.support.strict import in_words

MAX_ARRAYS = 8  # that people are shown


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
        "codecs": {"logits": identity.codec.model_dump(mode="json")}
        | {f"features/{name}": about.config.code.model_dump(mode="json") for name, about in identity.features.items()},
        "teacher": identity.teacher.model_dump(mode="json"),
        "other teachers": [one.name for one in store.additions if one.extends is None],
        "dataset": identity.dataset.model_dump(mode="json", exclude={"tars", "classes"})
        | {"samples": sum(tar.count for tar in identity.dataset.tars), "classes": len(identity.dataset.classes)},
        "licences": {"dataset": identity.dataset.licence, "teacher": identity.teacher.licence},
        "left out": manifest.left_out,
        "image sizes": manifest.image_sizes.model_dump(mode="json") if manifest.image_sizes else None,
        "serves": served_terms(store),
        "fidelity": fidelity.model_dump(mode="json") if fidelity else None,
        "schema version": manifest.schema_version,
        "proof of images": proof_of_images(store.created),
        "versions": identity.versions,
    }


def info_groups(store: Store) -> dict[str, dict[str, str]]:
    """The same for people, in groups: values by name, numbers as they are read."""
    identity, manifest = store.identity, store.manifest
    assert manifest is not None
    dataset, teacher = identity.dataset, identity.teacher
    what, figure = teacher.gate
    samples = sum(dataset.tars[block].count for block in store.blocks)
    rows = samples * identity.views.num_views
    fidelity = manifest.fidelity.get(store.targets)
    return {
        "Store": {
            "digest": f"sha256:{store.digest}",
            "holds": describe(manifest.held),
            "rows": f"{rows:,}: {samples:,} samples, {identity.views.num_views:,} views of each",
            "size": f"{_bytes(manifest.total_bytes)}, {manifest.total_bytes / max(rows, 1):.1f} bytes a row",
            "blocks": f"{len(store.blocks):,} of up to {identity.rows_per_block:,} samples, "
            f"{identity.views_per_group} views together",
            "other teachers": ", ".join(one.name for one in store.additions if one.extends is None) or "none",
        },
        "Images": {
            "dataset": f"{dataset.name}/{dataset.split}, {len(dataset.classes):,} classes",
            "sizes": f"{dataset.width} x {dataset.height} pixels"
            if dataset.width
            else str(manifest.image_sizes or "different; nobody wrote down which"),
            "left out": f"{manifest.left_out:,} bad images",
            "views": in_words(identity.views.model_dump(mode="json", exclude={"count"})),
            "proof": proof_of_images(store.created),
            "licence": dataset.licence or "not stated",
        },
        "Teacher": {
            "name": teacher.name,
            "network": " ".join(
                [teacher.model, *([f"({in_words(teacher.model_args)})"] if teacher.model_args else [])]
            ),
            "weights": teacher.weights,
            "arithmetic": teacher.arithmetic,
            what: figure + ", by the imported answers" * bool(teacher.imported),
            "licence": teacher.licence or "not stated",
            **({"imported from": teacher.imported.in_words} if teacher.imported else {}),
        },
        "Targets": {
            "codec": in_words(identity.codec.model_dump(mode="json")),
            **{
                f"decisions '{name}'": in_words(about.config.model_dump(mode="json"))
                for name, about in identity.decisions.items()
            },
            **{
                f"features '{name}'": f"{' x '.join(map(str, about.shape))}: "
                + in_words(about.config.model_dump(mode="json"))
                for name, about in identity.features.items()
            },
            "serves": ", ".join(served_terms(store)) or "nothing",
        },
        "Fidelity": measured(store.identity.teacher, fidelity),
        "Largest arrays": {
            name: f"{_bytes(size)} ({size / max(manifest.total_bytes, 1):.1%})"
            for name, size in sorted(manifest.bytes_by_array.items(), key=lambda one: -one[1])[:MAX_ARRAYS]
        },
        "Made with": {"schema version": str(manifest.schema_version), **identity.versions},
    }


def _bytes(size: int) -> str:
    """In the unit that has 1 to 999 of it."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if unit != "bytes" else f"{size:,} bytes"


def measured(teacher: TeacherIdentity, fidelity: Fidelity | None) -> dict[str, str]:
    """What the teacher, asked again, said about the store."""
    if teacher.imported:
        return {"rows asked again": f"0: imported from {teacher.imported.format}, nobody can ask again"}
    if fidelity is None:
        return {"rows asked again": "0: `offline-kd store verify STORE --teacher 1000` asks this teacher"}
    return {
        "rows asked again": fidelity.looked_at,
        **_of_logits(fidelity),
        **{f"features '{name}'": in_words(figures) for name, figures in fidelity.features.items()},
    }


def _of_logits(fidelity: Fidelity) -> dict[str, str]:
    """Nothing of a teacher that gives none."""
    if fidelity.mean_error is None:
        return {}
    logits = {
        "logit error, mean / largest": f"{_error(fidelity.mean_error)} / {_error(fidelity.max_error)} "
        f"(allowed: {_error(fidelity.max_error_allowed)})"
    }
    if fidelity.mean_top1_probability is None or fidelity.top1_agreement is None:
        return logits | {
            "mean error of a class's probability at T = 1, 2, 4": ", ".join(
                f"{value:.2g}" for value in fidelity.sigmoid_error.values()
            ),
            "largest error of a class's probability": _error(fidelity.max_sigmoid_error),
        }
    return {
        "teacher top-1 on them, augmented": "there are no labels"
        if fidelity.teacher_top1 is None
        else f"{fidelity.teacher_top1:.2f} %",
        "mean top-1 probability": f"{fidelity.mean_top1_probability:.3f}",
        "same top-1 as the teacher": f"{100 * fidelity.top1_agreement:.2f} %",
        **logits,
        "KL(teacher, store) in nats at T = 1, 2, 4": ", ".join(f"{value:.2g}" for value in fidelity.kl.values()),
        "total variation at T = 1, 2, 4": ", ".join(f"{value:.2g}" for value in fidelity.total_variation.values()),
        "WTTM weight / DTKD temperature error": f"{_error(fidelity.wttm_weight_error)} / "
        f"{_error(fidelity.dtkd_temperature_error)}",
    }


def _error(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2g}"
