"""The card of a store: what a person needs to know before using it, as Markdown."""

from offline_kd.store.schema import StoreIdentity, StoreManifest


def write_card(identity: StoreIdentity, manifest: StoreManifest) -> str:
    """`README.md` of a finished store."""
    teacher, dataset, fidelity = identity.teacher, identity.dataset, manifest.fidelity
    rows = sum(tar.count for tar in dataset.tars)
    num_views = identity.views.num_views
    facts = {
        "teacher": f"{teacher.name} ({teacher.model}), weights sha256 `{teacher.weights_sha256}`",
        "teacher top-1": f"{teacher.measured_top1:.2f} % on {teacher.evaluated_on}, measured before the capture",
        "dataset": f"{dataset.name}/{dataset.split}: {rows:,} images of {dataset.width}x{dataset.height} in "
        f"{len(dataset.tars)} tars, {len(dataset.classes)} classes",
        "views": f"{num_views} of {identity.views.num_distinct} per image: `{identity.views.model_dump(mode='json')}`",
        "codec": f"`{identity.codec.model_dump(mode='json')}`",
        "size": f"{manifest.total_bytes:,} bytes, {manifest.total_bytes / (rows * num_views):.1f} per row",
        "licence": f"dataset: {dataset.licence or 'not stated'}; teacher: {teacher.licence or 'not stated'}",
        "digest": f"`sha256:{manifest.digest}`",
        "made with": ", ".join(f"{name} {version}" for name, version in identity.versions.items()),
    }
    facts |= {f"decisions '{name}'": _decisions(identity, manifest, name) for name in identity.decisions}
    measured = {
        "rows asked again": f"{fidelity.rows:,}",
        "teacher top-1 on them, augmented": f"{fidelity.teacher_top1:.2f} %",
        "mean top-1 probability": f"{fidelity.mean_top1_probability:.3f}",
        "same top-1 as the teacher": f"{100 * fidelity.top1_agreement:.2f} %",
        "logit error, mean / largest": f"{fidelity.mean_error:.2g} / {fidelity.max_error:.2g} "
        f"(allowed: {fidelity.max_error_allowed:.2g})",
        "KL(teacher, store) in nats at T = 1, 2, 4": ", ".join(f"{value:.2g}" for value in fidelity.kl.values()),
        "total variation at T = 1, 2, 4": ", ".join(f"{value:.2g}" for value in fidelity.total_variation.values()),
    }
    return "\n".join(
        [
            f"# Teacher store: {identity.name}",
            "",
            "Raw teacher logits for stored augmentations of every image, made by `offline-kd cache-teacher`.",
            "Train from it with `offline-kd distill RECIPE --store THIS_FOLDER --out RUN`;",
            'look at it with `zarr.open("targets.zarr")`, whose arrays describe themselves.',
            "",
            *_table(facts),
            "",
            "## Fidelity",
            "",
            "The teacher was run again on rows read back from this store:",
            "",
            *_table(measured),
            "",
        ]
    )


def _decisions(identity: StoreIdentity, manifest: StoreManifest, name: str) -> str:
    about = identity.decisions[name]
    statistics = next(entry.statistics for entry in manifest.tables if entry.decisions == name)
    figures = statistics | manifest.fidelity.decisions.get(name, {})
    return (
        f"`{about.config.model_dump(mode='json')}` on a map of {about.channels} x {about.height} x {about.width}; "
        + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items())
    )


def _table(rows: dict[str, str]) -> list[str]:
    cells = [(name, value.replace("|", "\\|").replace("<", "&lt;")) for name, value in rows.items()]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
