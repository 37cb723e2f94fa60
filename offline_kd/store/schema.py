"""READ FIRST. What a teacher store looks like on disk.

    NAME/
      store.json                    identity, written first, never changed (`StoreIdentity`)
      additions/NAME.json           what was added later: another teacher, or more decisions of one (`Addition`)
      targets.zarr/                 zarr v3 arrays with core codecs only (`array_specs`, `addition_specs`)
      ledger/BLOCK-FROM-TO.json     one per committed block and view group, written last, exclusively (`LedgerEntry`);
                                    BLOCK-FROM-TO.NAME.json of an addition; templates-DECISIONS.json (`TablesEntry`)
      manifest.json                 by `finish`: sha256 of every ledger entry, store digest, measured fidelity
      README.md, index.html         the card people read
      leases/                       who is working on what, while a capture runs

Rows: block b is the b-th image tar of the dataset, sample j of it is row b * rows_per_block + j. A chunk holds one
block and one view group, so every commit writes whole objects and every read takes whole objects.

Proof: manifest.json has the sha256 of every ledger entry, and an entry those of its objects. The store's digest is over
identity and ledger: content, not dates, machines or software versions. It does not say how many views were planned, so
a store that grew has the digest of one captured at once.

zarr reports a missing object as fill values, without an error. Only the ledger says what exists; fill values, which no
legal value equals, are the second line of defence.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import zarr
from pydantic import Field
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from offline_kd.data.manifest import EvaluationCrop, Normalisation, Tar
from offline_kd.store.codecs import CODEC_TABLES, AnyCodec
from offline_kd.store.decisions import NEAREST, DecisionsConfig, SubclassDecisions, TemplateDecisions
from offline_kd.support.errors import RecipeError, StoreCorrupt
from offline_kd.support.strict import Sha256, Strict, fingerprint
from offline_kd.views import Views
from offline_kd.views.epochs import view_groups
from offline_kd.views.kind import ViewSpec

SCHEMA_VERSION = 2  # version 1 is still read: see opening.py
PROBES_PER_GROUP = 4
NO_KEY = 2**64 - 1
MIN_OBJECT_BYTES = 256 * 1024  # below this a request costs more than its bytes
MAX_CHUNK_BYTES = 2**31 - 2**16  # what one object may hold, decoded: the limit of blosc

Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z_\-]+$", max_length=100)]
Side = Annotated[int, Field(gt=0, lt=2**15)]


class DatasetIdentity(Strict):
    name: str
    split: str
    fingerprint: Sha256
    classes: list[str] = Field(min_length=2)
    height: Side | None = Field(description="of every image; None: they differ")
    width: Side | None
    tars: list[Tar] = Field(min_length=1)
    licence: str


class TeacherIdentity(Strict):
    name: str
    model: str
    model_args: dict[str, int | float | str | bool]
    weights_sha256: Sha256
    normalisation: Normalisation
    crop: EvaluationCrop | None = Field(None, description="of images of different sizes; its size is that of views")
    dtype: str
    evaluated_on: str
    measured_top1: float = Field(description="percent, by the gate, before anything was written")
    licence: str


class DecisionsIdentity(Strict):
    """Decisions that a store holds, and the map they were made on."""

    config: DecisionsConfig
    channels: int = Field(gt=0, le=2**20)
    height: Side
    width: Side


class StoreIdentity(Strict):
    """`store.json`: what everything in the store is about. The same command must produce the same identity."""

    schema_version: int
    name: str
    dataset: DatasetIdentity
    teacher: TeacherIdentity
    views: Views
    codec: AnyCodec
    decisions: dict[Name, DecisionsIdentity] = Field(default_factory=dict)
    rows_per_block: int = Field(gt=0, le=2**24)
    views_per_group: int = Field(gt=0, le=2**15)
    versions: dict[str, str] = Field(description="of the software that created the store; not part of its digest")

    @property
    def num_classes(self) -> int:
        return len(self.dataset.classes)

    @property
    def seen_size(self) -> tuple[int, int]:
        """Height and width of what the teacher sees."""
        if self.teacher.crop:
            return self.teacher.crop.size, self.teacher.crop.size
        assert self.dataset.height is not None
        assert self.dataset.width is not None
        return self.dataset.height, self.dataset.width

    @property
    def num_blocks(self) -> int:
        return len(self.dataset.tars)

    @property
    def groups(self) -> list[range]:
        return view_groups(self.views.num_views, self.views_per_group)


class Addition(Strict):
    """`additions/NAME.json`: targets for the rows and views of the store that were added after it was created."""

    name: Name
    extends: Annotated[str, Field(pattern=r"^[0-9A-Za-z_\-]*$")] | None = Field(
        description="None: another teacher. Else more decisions of the targets of that name, '' being the first ones"
    )
    teacher: TeacherIdentity
    codec: AnyCodec
    decisions: dict[Name, DecisionsIdentity] = Field(default_factory=dict)

    @property
    def targets(self) -> str:
        """The targets that this belongs to."""
        return self.name if self.extends is None else self.extends


class StoredObject(Strict):
    """One file: what the ledger vouches for."""

    bytes: int = Field(ge=0)
    sha256: Sha256


class LedgerEntry(Strict):
    """The proof that one block exists for one group of views."""

    addition: str = ""
    block: int
    first_view: int
    end_view: int
    rows: int
    tar: str
    tar_sha256: Sha256
    left_out: dict[str, str] = Field(
        default_factory=dict, description="samples of the tar without a row, by key, and why: bad images"
    )
    objects: dict[str, StoredObject]

    @property
    def file_name(self) -> str:
        return ledger_name(self.block, range(self.first_view, self.end_view), self.addition)


class TablesEntry(Strict):
    """The proof that the templates (or LDA and sub-classes) of one tap exist."""

    addition: str = ""
    decisions: str
    objects: dict[str, StoredObject]
    statistics: dict[str, float]

    @property
    def file_name(self) -> str:
        return tables_ledger_name(self.decisions, self.addition)


class Fidelity(Strict):
    """The teacher, run again on rows read back from disk, against what the store says of them."""

    rows: int = Field(description="sampled rows; all figures are of them")
    teacher_top1: float = Field(description="percent of rows, augmented as stored, whose arg-max is the label")
    mean_top1_probability: float
    top1_agreement: float = Field(description="share of rows whose arg-max survived the codec")
    mean_error: float = Field(description="mean absolute error of a logit")
    max_error: float
    max_error_allowed: float
    kl: dict[str, float] = Field(description="mean KL(teacher || store) in nats, by temperature")
    total_variation: dict[str, float]
    wttm_weight_error: float | None = Field(None, description="mean relative, at the worst of gamma .25, .5, .8")
    dtkd_temperature_error: float | None = Field(None, description="mean relative error of the teacher's temperature")
    decisions: dict[str, dict[str, float]] = Field(default_factory=dict)


class Held(Strict):
    """What a partial copy has of the store whose digest it bears."""

    first_block: int = Field(ge=0)
    end_block: int
    views: int
    arrays: list[str] | None = Field(description="kinds of arrays beside keys and views: logits, decisions; None: all")

    def has(self, array: str) -> bool:
        return self.arrays is None or not array.startswith(("logits/", "decisions/")) or kind_of(array) in self.arrays


class StoreManifest(Strict):
    """`manifest.json`: its existence means that the store is complete and was checked."""

    schema_version: int
    digest: Sha256
    views: dict[str, int] = Field(description="how many views are stored, by addition; '' is what came first")
    earlier: list[dict[str, int]] = Field(default_factory=list, description="`views` before it grew, oldest first")
    entries: dict[str, Sha256] = Field(description="sha256 of every ledger entry, by file name")
    files: dict[str, StoredObject] = Field(description="identity, card and zarr metadata")
    fidelity: dict[str, Fidelity] = Field(description="by targets; '' are the first ones")
    left_out: int = Field(0, description="samples without a row, because their images are bad")
    total_bytes: int
    bytes_by_array: dict[str, int]
    held: Held | None = Field(None, description="of a partial copy")
    checksum: str = Field("", description="sha256 of the manifest with an empty checksum")


@dataclass(frozen=True)
class ArraySpec:
    """One zarr array. `extent` says what one object of it holds: a block, a block's view group, or all of it.

    `name` is what readers ask for; arrays of another teacher have the same names below a `prefix`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dimensions: tuple[str, ...]
    fill: float
    extent: Literal["block", "group", "whole"]
    description: str
    prefix: str = ""

    @property
    def path(self) -> str:
        """Of the array, below `targets.zarr/`."""
        return self.prefix + self.name

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    def _grid(self, block: int, group: int) -> tuple[int, ...]:
        return {"block": (block,), "group": (block, group), "whole": ()}[self.extent]

    def object_key(self, block: int, group: int) -> str:
        """Path below `targets.zarr/` of the object that holds a block (of a view group)."""
        grid = self._grid(block, group)
        return "/".join([self.path, "c", *map(str, grid), *["0"] * (len(self.shape) - len(grid))])

    def region(self, block: int, group: int) -> tuple[slice, ...]:
        """The array's elements that this object holds."""
        grid = self._grid(block, group)
        sizes = self.chunks[: len(grid)]
        return tuple(slice(index * size, (index + 1) * size) for index, size in zip(grid, sizes, strict=True))


def ledger_name(block: int, views: range, addition: str = "") -> str:
    return f"{block:06d}-{views.start:05d}-{views.stop:05d}{addition and '.' + addition}.json"


def tables_ledger_name(decisions: str, addition: str = "") -> str:
    return f"templates-{decisions}{addition and '.' + addition}.json"


def kind_of(array: str) -> str:
    """The first part of an array's name, such as `logits`."""
    return array.split("/", 1)[0]


def table_specs(identity: StoreIdentity, name: str) -> list[ArraySpec]:
    """The arrays, one object each, that decisions of that name (or CODEC_TABLES: the logits) refer to."""
    if name == CODEC_TABLES:
        return [
            ArraySpec(
                f"codec/{part}", dtype, shape, shape, tuple(f"dim_{axis}" for axis in range(len(shape))), 0, "whole", ""
            )
            for part, (dtype, shape) in identity.codec.tables(identity.num_classes).items()
        ]
    about = identity.decisions[name]
    config, channels = about.config, about.channels

    def table(part: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        shape = tuple(size for _, size in inner)
        dimensions = tuple(label for label, _ in inner)
        return ArraySpec(f"templates/{name}/{part}", dtype, shape, shape, dimensions, fill, "whole", description)

    if isinstance(config, TemplateDecisions):
        templates = ("template", config.templates)
        return [
            table("centroids", "<f4", np.nan, "the templates", templates, ("channel", channels)),
            table("count", "<i8", -1, "training vectors nearest to each", templates),
            table("nearest_row", "<i8", -1, "rows with the vectors closest to each", templates, ("rank", NEAREST)),
            table("nearest_place", "<i4", -1, "their places: y * width + x", templates, ("rank", NEAREST)),
        ]
    classes, per_class = identity.num_classes, config.per_class
    component = ("component", config.components)
    subclasses = classes * per_class
    return [
        table("scalings", "<f4", np.nan, "LDA projection; unused columns 0", ("channel", channels), component),
        table("xbar", "<f4", np.nan, "mean that LDA subtracts", ("channel", channels)),
        table("centers", "<f4", np.nan, "sub-classes", ("class", classes), ("subclass", per_class), component),
        table("table", "<f4", np.nan, "row i: as what i is seen", ("subclass", subclasses), ("seen_as", subclasses)),
    ]


def array_specs(identity: StoreIdentity) -> list[ArraySpec]:
    """Every array of a store. The view axis is as long as there are different views, so that none is ever resized."""
    rows, per_group = identity.rows_per_block, identity.views_per_group
    blocks, num_groups = identity.num_blocks, -(-identity.views.num_distinct // per_group)
    num_rows, num_views = blocks * rows, num_groups * per_group
    height, width = identity.seen_size

    def per_row(name: str, dtype: str, fill: float, description: str) -> ArraySpec:
        return ArraySpec(name, dtype, (num_rows,), (rows,), ("row",), fill, "block", description)

    def per_view(name: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        sizes, names = tuple(size for _, size in inner), tuple(label for label, _ in inner)
        shape, chunks = (num_rows, num_views, *sizes), (rows, per_group, *sizes)
        return ArraySpec(name, dtype, shape, chunks, ("row", "view", *names), fill, "group", description)

    def per_probe(name: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        sizes, names = tuple(size for _, size in inner), tuple(label for label, _ in inner)
        shape, chunks = (blocks, num_groups, PROBES_PER_GROUP, *sizes), (1, 1, PROBES_PER_GROUP, *sizes)
        return ArraySpec(name, dtype, shape, chunks, ("block", "group", "probe", *names), fill, "group", description)

    specs = [
        per_row("key_hash", "<u8", NO_KEY, "64-bit blake2b of the sample's key"),
        per_row("image_crc", "<u4", 0, "crc32c of the encoded image (rows without a key_hash hold nothing)"),
        per_row("label", "<i4", -1, "class index"),
        *(
            per_view(f"view/{name}", array.dtype, array.fill, array.description, *([array.axis] if array.axis else []))
            for name, array in identity.views.arrays().items()
        ),
        per_probe("probe/row", "<i4", -1, "row within the block"),
        per_probe("probe/view", "<i4", -1, "view within the group"),
        per_probe(
            "probe/pixels",
            "|u1",
            0,
            "what the teacher saw",
            ("channel", 3),
            ("height", height),
            ("width", width),
        ),
    ]
    for name, array in identity.codec.arrays().items():
        inner = [(array.axis[0], array.axis[1] or identity.num_classes)] if array.axis else []
        specs.append(per_view(f"logits/{name}", array.dtype, array.fill, array.description, *inner))
    for name, about in identity.decisions.items():
        places = [("height", about.height), ("width", about.width)]
        if isinstance(about.config, SubclassDecisions):
            specs.append(
                per_view(f"decisions/{name}/subclass", "|u1", 255, "sub-class within the label's class", *places)
            )
            continue
        top = ("rank", about.config.top)
        specs.append(per_view(f"decisions/{name}/id", "<u2", 65535, "template, likeliest first", *places, top))
        if about.config.top > 1:
            specs.append(per_view(f"decisions/{name}/prob", "<u2", 65535, "probability * 16383", *places, top))
        specs.append(per_view(f"decisions/{name}/dropped", "<f4", np.nan, "largest mass that was not kept"))
    return specs


def _prefix(addition: Addition) -> str:
    return f"teachers/{addition.targets}/" if addition.targets else ""


def addition_specs(identity: StoreIdentity, addition: Addition) -> list[ArraySpec]:
    """The arrays of an addition; rows and views are those that the store was created with."""
    kinds = ("logits/", "decisions/") if addition.extends is None else ("decisions/",)
    of_addition = identity.model_copy(update={"codec": addition.codec, "decisions": addition.decisions})
    specs = [spec for spec in array_specs(of_addition) if spec.name.startswith(kinds)]
    return [replace(spec, prefix=_prefix(addition)) for spec in specs]


def addition_table_specs(identity: StoreIdentity, addition: Addition, name: str) -> list[ArraySpec]:
    of_addition = identity.model_copy(update={"codec": addition.codec, "decisions": addition.decisions})
    return [replace(spec, prefix=_prefix(addition)) for spec in table_specs(of_addition, name)]


@dataclass(frozen=True)
class Part:
    """What is committed together for one block and view group: what the store was created with, or an addition."""

    name: str  # "" for what the store was created with
    targets: str  # that it belongs to; "" are the first ones
    specs: list[ArraySpec]
    tables: dict[str, list[ArraySpec]]  # by name of the decisions
    codec: AnyCodec
    decisions: Mapping[str, DecisionsIdentity]


def parts_of(identity: StoreIdentity, additions: Iterable[Addition] = ()) -> dict[str, Part]:
    """The parts of a store, the first one first."""
    tables = {name: table_specs(identity, name) for name in _tables(identity.codec, identity.decisions)}
    return {"": Part("", "", array_specs(identity), tables, identity.codec, identity.decisions)} | {
        one.name: Part(
            one.name,
            one.targets,
            addition_specs(identity, one),
            {
                name: addition_table_specs(identity, one, name)
                for name in _tables(one.codec if one.extends is None else None, one.decisions)
            },
            one.codec,
            one.decisions,
        )
        for one in additions
    }


def _tables(codec: AnyCodec | None, decisions: Iterable[str]) -> list[str]:
    """Which tables there are: of the codec if it has any, and of all decisions."""
    return [*([CODEC_TABLES] if codec is not None and codec.learns_from else []), *decisions]


def identity_of_targets(
    identity: StoreIdentity, additions: Iterable[Addition], targets: str, num_views: int
) -> StoreIdentity:
    """The store as if it had been created with these targets and so many views."""
    update: dict[str, Any] = {"views": identity.views.with_count(num_views)}
    decisions = dict(identity.decisions) if targets == "" else {}
    for addition in additions:
        if addition.targets == targets:
            decisions |= addition.decisions
            if addition.extends is None:
                update |= {"teacher": addition.teacher, "codec": addition.codec}
    return identity.model_copy(update=update | {"decisions": decisions})


def check_bounds(where: str, parts: Mapping[str, Part]) -> None:
    """Raise StoreCorrupt for objects too large to be read: metadata is not trusted with memory."""
    for part in parts.values():
        for spec in [*part.specs, *(spec for specs in part.tables.values() for spec in specs)]:
            if spec.chunk_bytes > MAX_CHUNK_BYTES:
                raise StoreCorrupt(
                    f"{where}: declares objects of {spec.chunk_bytes:,} bytes for {spec.path} (chunks {spec.chunks}), "
                    f"more than the {MAX_CHUNK_BYTES:,} that one may have. This is no store of ours, or a damaged one."
                )


def create_array(store: ZarrStore, spec: ArraySpec) -> "zarr.Array[Any]":
    """Create one array; the same call serves the store on disk and the coding of chunks in memory."""
    itemsize = np.dtype(spec.dtype).itemsize
    packer: Any = (
        ZstdCodec(level=1)
        if itemsize == 1
        else BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=itemsize)
    )
    return zarr.create_array(
        store,
        name=spec.path,
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=np.dtype(spec.dtype).type(spec.fill),
        compressors=[packer, Crc32cCodec()],
        filters=None,
        dimension_names=spec.dimensions,
        attributes={"description": spec.description},
        config={"write_empty_chunks": True},
        zarr_format=3,
    )


def zarr_metadata(parts: Mapping[str, Part]) -> dict[str, bytes]:
    """The metadata files of `targets.zarr/` by name, with which any zarr implementation can read the store."""
    store = MemoryStore()
    zarr.open_group(store, mode="a", zarr_format=3)
    for part in parts.values():
        for spec in [*part.specs, *(spec for specs in part.tables.values() for spec in specs)]:
            create_array(store, spec)
    return {f"targets.zarr/{name}": buffer.to_bytes() for name, buffer in sorted(store._store_dict.items())}


def plan_views_per_group(views: ViewSpec, *, rows_per_block: int, num_classes: int, requested: int | None) -> int:
    """How many views are stored and read together: as requested, else the fewest that make a worthwhile object.

    Always a divisor of the number of views, so that no group is ever half full and views can be added later without
    touching what is there. The codec has no say, because the grouping decides which view an epoch shows: runs from
    stores of different codecs see the same views in the same order.
    """
    num_views = views.num_views
    if requested is not None:
        if num_views % requested:
            divisors = [size for size in range(1, num_views + 1) if num_views % size == 0]
            raise RecipeError(
                f"capture.views_per_group is {requested}, which does not divide the {num_views} views. "
                f"Use one of {divisors}."
            )
        return requested
    bytes_per_row = 2 * num_classes  # as in f16
    for size in range(1, num_views + 1):
        if num_views % size == 0 and size * rows_per_block * bytes_per_row >= MIN_OBJECT_BYTES:
            return size
    return num_views


def small_files(additions: Iterable[Addition], parts: Mapping[str, Part]) -> list[str]:
    """Everything but manifest.json, ledger and objects: identity, additions, card, zarr's metadata."""
    return [
        "store.json",
        *(f"additions/{one.name}.json" for one in additions),
        "README.md",
        "index.html",
        *zarr_metadata(parts),
    ]


def entry_names(identity: StoreIdentity, parts: Mapping[str, Part], views: Mapping[str, int]) -> list[str]:
    """The file names of all ledger entries of a store with so many views of every part."""
    names = [tables_ledger_name(name, part.name) for part in parts.values() for name in part.tables]
    for part_name, num_views in views.items():
        groups = view_groups(num_views, identity.views_per_group)
        names += [ledger_name(block, group, part_name) for block in range(identity.num_blocks) for group in groups]
    return names


def store_digest(
    identity: Mapping[str, Any], additions: Iterable[Mapping[str, Any]], entries: Mapping[str, str]
) -> str:
    """sha256 over identity and additions, as JSON, and the sha256 of every ledger entry.

    It is over the JSON that was stored, so that fields which later versions add do not change it.
    """
    about = {name: value for name, value in identity.items() if name not in ("versions", "schema_version")}
    views = {name: value for name, value in about["views"].items() if name != "count"}
    added = sorted(additions, key=lambda one: str(one["name"]))
    return fingerprint([about | {"views": views}, added, sorted(entries.items())])
