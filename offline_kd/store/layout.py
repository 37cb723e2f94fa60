"""The zarr arrays of a store: their names, types, shapes and chunks, what is committed together, and zarr's metadata.

`schema.py` says what the JSON files are about; this says which objects lie below `targets.zarr/`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from offline_kd.data.blocks import DIGEST_BYTES
from offline_kd.data.tars import MAX_KEY_BYTES
from offline_kd.store.codecs import CODEC_TABLES, AnyCodec
from offline_kd.store.decisions import NEAREST, SubclassDecisions, TemplateDecisions
from offline_kd.store.features import FeaturesIdentity, ProductCode, arrays_of
from offline_kd.store.schema import (
    KINDS,
    PAGE_BLOCKS,
    PAGES_SINCE,
    Addition,
    StoreIdentity,
    Tapped,
    kind_of,
    ledger_name,
    page_name,
    tables_ledger_name,
)
from offline_kd.support.errors import RecipeError, StoreCorrupt
from offline_kd.views.epochs import view_groups
from offline_kd.views.kind import ViewSpec

RECIPE_FILE = "recipe.yaml"  # of the card; stores of earlier versions have none
PROBES_PER_GROUP = 4
NO_KEY = 2**64 - 1
NO_LABEL = -2  # of a row whose sample has none: -1 marks a label that was never written
MIN_OBJECT_BYTES = 256 * 1024  # below this a request costs more than its bytes
MAX_BLOCK_BYTES = 2**27  # of all arrays of one block and view group, decoded: what one read takes
MAX_TABLE_BYTES = 2**28  # of one table, such as how 8,000 sub-classes are seen as each other


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
    ragged: bool = False  # rows of bytes that know their length: an object has no zeros between them

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


def table_specs(identity: StoreIdentity, name: str) -> list[ArraySpec]:
    """The arrays, one object each, that decisions or features of that name (or CODEC_TABLES: the logits) refer to."""
    if name == CODEC_TABLES:
        return [
            ArraySpec(
                f"codec/{part}", dtype, shape, shape, tuple(f"dim_{axis}" for axis in range(len(shape))), 0, "whole", ""
            )
            for part, (dtype, shape) in identity.codec_tables.items()
        ]
    about = identity.tapped[name]
    config, channels = about.config, about.channels

    def table(part: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        shape = tuple(size for _, size in inner)
        dimensions = tuple(label for label, _ in inner)
        return ArraySpec(f"templates/{name}/{part}", dtype, shape, shape, dimensions, fill, "whole", description)

    if isinstance(about, FeaturesIdentity):
        code = about.config.code
        assert isinstance(code, ProductCode), "no other code has tables"
        parts, length = ("part", code.subspaces), ("channel", channels // code.subspaces)
        inner = ("stage", code.stages), parts, ("template", code.centroids), length
        return [table("centroids", "<f4", np.nan, "templates of every part of a vector", *inner)]
    if isinstance(config, TemplateDecisions):
        templates = ("template", config.templates)
        return [
            table("centroids", "<f4", np.nan, "the templates", templates, ("channel", channels)),
            table("count", "<i8", -1, "training vectors nearest to each", templates),
            table("nearest_row", "<i8", -1, "rows with the vectors closest to each", templates, ("rank", NEAREST)),
            table("nearest_place", "<i4", -1, "their places: y * width + x", templates, ("rank", NEAREST)),
        ]
    assert isinstance(config, SubclassDecisions)
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
    height, width = (len(range(identity.probe_step // 2, side, identity.probe_step)) for side in identity.seen_size)

    def per_row(name: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        sizes, names = tuple(size for _, size in inner), tuple(label for label, _ in inner)
        return ArraySpec(name, dtype, (num_rows, *sizes), (rows, *sizes), ("row", *names), fill, "block", description)

    def per_view(name: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        sizes, names = tuple(size for _, size in inner), tuple(label for label, _ in inner)
        shape, chunks = (num_rows, num_views, *sizes), (rows, per_group, *sizes)
        return ArraySpec(name, dtype, shape, chunks, ("row", "view", *names), fill, "group", description)

    def per_probe(name: str, dtype: str, fill: float, description: str, *inner: tuple[str, int]) -> ArraySpec:
        sizes, names = tuple(size for _, size in inner), tuple(label for label, _ in inner)
        shape, chunks = (blocks, num_groups, PROBES_PER_GROUP, *sizes), (1, 1, PROBES_PER_GROUP, *sizes)
        return ArraySpec(name, dtype, shape, chunks, ("block", "group", "probe", *names), fill, "group", description)

    # Zarr's metadata is vouched for, so that of an older store stays as it was written.
    letters = "UTF-8" if identity.schema_version >= PAGES_SINCE else "ASCII"
    specs = [
        per_row("key_hash", "<u8", NO_KEY, "64-bit blake2b of the sample's key"),
        *(
            [
                per_row("key", "|u1", 0, f"the sample's key, in {letters}, filled up with 0", ("byte", MAX_KEY_BYTES)),
                per_row("image_digest", "|u1", 0, "sha256 of the encoded image, 16 bytes", ("byte", DIGEST_BYTES)),
            ]
            if identity.keeps_digests
            else [per_row("image_crc", "<u4", 0, "crc32c of the encoded image (rows without a key_hash hold nothing)")]
        ),
        per_row("label", *identity.dataset.label_array),
        *(
            per_view(f"view/{name}", array.dtype, array.fill, array.description, *([array.axis] if array.axis else []))
            for name, array in identity.views.arrays().items()
        ),
        per_probe("probe/row", "<i4", -1, "row within the block"),
        per_probe("probe/view", "<i4", -1, "view within the group"),
        per_probe(
            "probe/pixels", "|u1", 0, "what the teacher saw", ("channel", 3), ("height", height), ("width", width)
        ),
    ]
    for name, array in identity.codec.arrays().items():
        inner = [(array.axis[0], array.axis[1] or identity.num_classes)] if array.axis else []
        make = per_row if array.of_image else per_view
        spec = make(f"logits/{name}", array.dtype, array.fill, array.description, *inner)
        specs.append(replace(spec, ragged=array.ragged))
    return [*specs, *_tapped_specs(identity, per_view)]


def _tapped_specs(identity: StoreIdentity, per_view: Callable[..., ArraySpec]) -> Iterator[ArraySpec]:
    """Of decisions and features."""
    for name, about in identity.decisions.items():
        of, places = f"decisions/{name}", [("height", about.height), ("width", about.width)]
        if isinstance(about.config, SubclassDecisions):
            yield per_view(f"{of}/subclass", "|u1", 255, "sub-class within the label's class", *places)
            continue
        top = ("rank", about.config.top)
        yield per_view(f"{of}/id", "<u2", 65535, "template, likeliest first", *places, top)
        if about.config.top > 1:
            yield per_view(f"{of}/prob", "<u2", 65535, "probability * 16383", *places, top)
        yield per_view(f"{of}/dropped", "<f4", np.nan, "largest mass that was not kept")
    for name, held in identity.features.items():
        places = [] if held.config.pool == "avg" else [("height", held.height), ("width", held.width)]
        for part, one in arrays_of(held).items():
            inner = [("code" if part == "codes" else "channel", one.size), *places] if one.size else []
            yield per_view(f"features/{name}/{part}", one.dtype, one.fill, one.description, *inner)


def probe_pixels(identity: StoreIdentity, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[P, 3, h, w]`: of rendered views `[P, 3, H, W]` the pixels that a store keeps, a grid over all of each."""
    step = identity.probe_step
    return pixels[:, :, step // 2 :: step, step // 2 :: step]


def _prefix(addition: Addition) -> str:
    return f"teachers/{addition.targets}/" if addition.targets else ""


def addition_specs(identity: StoreIdentity, addition: Addition) -> list[ArraySpec]:
    """The arrays of an addition; rows and views are those that the store was created with."""
    kinds = KINDS if addition.extends is None else KINDS[1:]
    specs = [spec for spec in array_specs(_as_created(identity, addition)) if kind_of(spec.name) in kinds]
    return [replace(spec, prefix=_prefix(addition)) for spec in specs]


def addition_table_specs(identity: StoreIdentity, addition: Addition, name: str) -> list[ArraySpec]:
    return [replace(spec, prefix=_prefix(addition)) for spec in table_specs(_as_created(identity, addition), name)]


def _as_created(identity: StoreIdentity, addition: Addition) -> StoreIdentity:
    about = {"codec": addition.codec, "decisions": addition.decisions, "features": addition.features}
    return identity.model_copy(update=about)


@dataclass(frozen=True)
class Part:
    """What is committed together for one block and view group: what the store was created with, or an addition."""

    name: str  # "" for what the store was created with
    targets: str  # that it belongs to; "" are the first ones
    specs: list[ArraySpec]
    tables: dict[str, list[ArraySpec]]  # by name of the decisions or features
    codec: AnyCodec
    tapped: Mapping[str, Tapped]  # decisions and features

    @property
    def all_specs(self) -> list[ArraySpec]:
        """Of blocks and of tables."""
        return [*self.specs, *(spec for specs in self.tables.values() for spec in specs)]

    def kind_of_tables(self, name: str) -> str:
        """What cannot be read without the tables of that name: one of KINDS, and a slash."""
        if name == CODEC_TABLES:
            return "logits/"
        return "features/" if isinstance(self.tapped[name], FeaturesIdentity) else "decisions/"


def parts_of(identity: StoreIdentity, additions: Iterable[Addition] = ()) -> dict[str, Part]:
    """The parts of a store, the first one first."""
    tables = {name: table_specs(identity, name) for name in _tables(identity.codec, identity.tapped)}
    return {"": Part("", "", array_specs(identity), tables, identity.codec, identity.tapped)} | {
        one.name: Part(
            one.name,
            one.targets,
            addition_specs(identity, one),
            {
                name: addition_table_specs(identity, one, name)
                for name in _tables(one.codec if one.extends is None else None, one.tapped)
            },
            one.codec,
            one.tapped,
        )
        for one in additions
    }


def _tables(codec: AnyCodec | None, tapped: Mapping[str, Tapped]) -> list[str]:
    """Which tables there are: of the codec if it has any, of all decisions, and of features in templates' numbers."""
    coded = [CODEC_TABLES] if codec is not None and codec.has_tables else []
    without = {name for name, about in tapped.items() if isinstance(about, FeaturesIdentity) and not about.has_tables}
    return [*coded, *(name for name in tapped if name not in without)]


def check_bounds(where: str, parts: Mapping[str, Part]) -> None:
    """Raise StoreCorrupt for objects too large to be read: metadata is not trusted with memory."""
    for part in parts.values():
        size = sum(spec.chunk_bytes for spec in part.specs)
        if size > MAX_BLOCK_BYTES:
            largest = max(part.specs, key=lambda spec: spec.chunk_bytes)
            raise StoreCorrupt(
                f"{where}: declares objects of {size:,} bytes for one block and view group (chunks {largest.chunks} of "
                f"{largest.path}), more than the {MAX_BLOCK_BYTES:,} that they may have. Smaller tars, or a smaller "
                "capture.views_per_group, make smaller ones."
            )
        for spec in (spec for specs in part.tables.values() for spec in specs):
            if spec.chunk_bytes > MAX_TABLE_BYTES:
                raise StoreCorrupt(
                    f"{where}: declares {spec.chunk_bytes:,} bytes for {spec.path}, more than the {MAX_TABLE_BYTES:,} "
                    "that a table may have. Fewer templates or sub-classes make smaller ones."
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
        for spec in part.all_specs:
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
    """Everything but manifest.json, ledger and objects: identity, additions, card, zarr's metadata.

    Not RECIPE_FILE, which a store need not have.
    """
    return [
        "store.json",
        *(f"additions/{one.name}.json" for one in additions),
        "README.md",
        "index.html",
        *zarr_metadata(parts),
    ]


def listed_names(identity: StoreIdentity, parts: Mapping[str, Part], views: Mapping[str, int]) -> list[str]:
    """The file names of all that the manifest of a store with so many views of every part must list."""
    tables = [tables_ledger_name(name, part.name) for part in parts.values() for name in part.tables]
    if not identity.has_pages:
        return tables + list(entry_names(identity, views))
    firsts = range(0, identity.num_blocks, PAGE_BLOCKS)
    return tables + [
        page_name(block, group, part_name)
        for part_name, num_views in views.items()
        for group in view_groups(num_views, identity.views_per_group)
        for block in firsts
    ]


def entry_names(identity: StoreIdentity, views: Mapping[str, int]) -> Iterator[str]:
    """The file names of the ledger entries of all blocks with so many views of every part, one after the other."""
    for part, num_views in views.items():
        for group in view_groups(num_views, identity.views_per_group):
            for block in range(identity.num_blocks):
                yield ledger_name(block, group, part)


def num_entries(identity: StoreIdentity, views: Mapping[str, int]) -> int:
    """How many blocks of view groups a store with so many views of every part has."""
    return sum(identity.num_blocks * -(-count // identity.views_per_group) for count in views.values())


def num_pages(identity: StoreIdentity, views: Mapping[str, int]) -> int:
    """How many pages of hashes vouch for those."""
    per_group = -(-identity.num_blocks // PAGE_BLOCKS)
    return sum(per_group * -(-count // identity.views_per_group) for count in views.values())
