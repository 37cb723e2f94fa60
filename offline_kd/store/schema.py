"""READ FIRST. What a teacher store looks like on disk.

    NAME/
      store.json                    identity, written first, never changed (`StoreIdentity`)
      additions/NAME.json           what was added later: another teacher, or more decisions or features (`Addition`)
      targets.zarr/                 zarr v3 arrays with core codecs only (`array_specs`, `addition_specs`)
      ledger/BLOCK-FROM-TO.json     one per committed block and view group, written last, exclusively (`LedgerEntry`);
                                    BLOCK-FROM-TO.NAME.json of an addition; templates-TARGET.json (`TablesEntry`)
      hashes/BLOCK-FROM-TO.bin      by `finish`: sha256 of the ledger entries of PAGE_BLOCKS blocks from BLOCK on
      manifest.json                 by `finish`: sha256 of every page of hashes, store digest, measured fidelity
      README.md, index.html         the card people read; recipe.yaml, which trains from the store as it is
      signatures/DIGEST/            who signed that digest, if anybody did (signing.py)
      leases/                       who is working on what, while a capture runs

Rows: block b is the b-th image tar of the dataset, sample j of it is row b * rows_per_block + j. A chunk holds one
block and one view group, so every commit writes whole objects and every read takes whole objects.

A row has its sample's key, the key's hash, the sha256 of the image's encoded bytes (16 bytes of it) and the label, or
NO_LABEL where the dataset has none.

Proof is a tree: manifest.json has the sha256 of every page, a page those of ledger entries, an entry those of objects.
So what it costs to open a store or to read a block hardly depends on how many there are. The store's digest is over
identity and pages: content, not dates, machines or software versions. It does not say how many views were planned, so
a store that grew has the digest of one captured at once: a page is of one view group of one part.

zarr reports a missing object as fill values, without an error. Only the ledger says what exists; fill values, which no
legal value equals, are the second line of defence.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from offline_kd.store.codecs import AnyCodec
from offline_kd.store.features import FeaturesIdentity, that_fit
from offline_kd.store.identity import DatasetIdentity, DecisionsIdentity, Side, TeacherIdentity
from offline_kd.support.strict import Sha256, Strict, fingerprint
from offline_kd.views import Views
from offline_kd.views.epochs import view_groups

SCHEMA_VERSION = 4  # of new stores; those of 2 and 3 are read and grow as what they are, those of 1 are read
THIN_PROBES_SINCE = 4  # the version from which probes of large views keep some of their pixels
PROBE_SIDE = 64  # so many of them in a row
DIGESTS_SINCE = 3  # the version from which a store keeps a sha256 of every image, and the keys themselves
PAGES_SINCE = 4  # the version from which manifest.json lists pages of hashes; before, it lists every ledger entry
PAGE_BLOCKS = 1024  # whose entries a page vouches for: 32 KiB
KINDS = "logits", "decisions", "features"  # of targets: what their arrays' names begin with

Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z_\-]+$", max_length=100)]


def _is_none(value: object) -> bool:
    """Left out of JSON, so that manifests of earlier versions are written as they were."""
    return value is None


def _is_empty(value: dict[str, object]) -> bool:
    """Left out of JSON, so that stores without are described as before."""
    return not value


Tapped = DecisionsIdentity | FeaturesIdentity
StoredFeatures = Annotated[dict[Name, FeaturesIdentity], AfterValidator(that_fit), Field(validate_default=True)]


class StoreIdentity(Strict):
    """`store.json`: what everything in the store is about. The same command must produce the same identity."""

    schema_version: int = Field(ge=1)
    name: str
    dataset: DatasetIdentity
    teacher: TeacherIdentity
    views: Views
    codec: AnyCodec
    decisions: dict[Name, DecisionsIdentity] = Field(default_factory=dict)
    features: StoredFeatures = Field(default_factory=dict, exclude_if=_is_empty)
    rows_per_block: int = Field(gt=0, le=2**24)
    views_per_group: int = Field(gt=0, le=2**15)
    versions: dict[str, str] = Field(description="of the software that created the store; not part of its digest")

    @property
    def tapped(self) -> dict[str, Tapped]:
        """What was made of maps of the teacher, by name: decisions, then features."""
        return {**self.decisions, **self.features}

    @property
    def num_classes(self) -> int:
        return len(self.dataset.classes)

    @property
    def codec_tables(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of the codec's tables."""
        of = self.codec.of_features
        return self.codec.tables(self.num_classes, self.features[of].channels if of else 0)

    @property
    def keeps_digests(self) -> bool:
        """Whether rows have a sha256 of their image, and their key; else a crc32c of the image only."""
        return self.schema_version >= DIGESTS_SINCE

    @property
    def has_pages(self) -> bool:
        """Whether manifest.json lists pages of hashes; else every ledger entry."""
        return self.schema_version >= PAGES_SINCE

    @property
    def seen_size(self) -> tuple[int, int]:
        """Height and width of what the teacher sees."""
        if self.teacher.crop:
            return self.teacher.crop.size, self.teacher.crop.size
        assert self.dataset.height is not None
        assert self.dataset.width is not None
        return self.dataset.height, self.dataset.width

    @property
    def probe_step(self) -> int:
        """Probes keep one of so many pixels in each direction: all of 224 would outweigh the logits."""
        return 1 if self.schema_version < THIN_PROBES_SINCE else -(-max(self.seen_size) // PROBE_SIDE)

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
        description="None: another teacher. Else more decisions or features of the targets of that name, '' the first"
    )
    teacher: TeacherIdentity
    codec: AnyCodec
    decisions: dict[Name, DecisionsIdentity] = Field(default_factory=dict)
    features: StoredFeatures = Field(default_factory=dict, exclude_if=_is_empty)

    @property
    def tapped(self) -> dict[str, Tapped]:
        """As of the store."""
        return {**self.decisions, **self.features}

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
    objects: dict[str, StoredObject] = Field(description="what the block consists of, by path below `targets.zarr/`")

    @property
    def file_name(self) -> str:
        return ledger_name(self.block, range(self.first_view, self.end_view), self.addition)


class TablesEntry(Strict):
    """The proof that the templates (or LDA and sub-classes) of decisions or features exist."""

    addition: str = ""
    decisions: str  # their name, or that of features
    objects: dict[str, StoredObject]
    statistics: dict[str, float]

    @property
    def file_name(self) -> str:
        return tables_ledger_name(self.decisions, self.addition)


class Fidelity(Strict):
    """The teacher, run again on rows read back from disk, against what the store says of them."""

    rows: int = Field(description="rows that the teacher was asked about; all figures are of them")
    of_rows: int | None = Field(None, exclude_if=_is_none, description="so many there were; None: nobody wrote it down")
    blocks: int | None = Field(None, exclude_if=_is_none, description="in which those rows lie")
    of_blocks: int | None = Field(None, exclude_if=_is_none)
    teacher_top1: float | None = Field(
        description="percent of rows, augmented as stored, whose arg-max is the label; None: there are no labels"
    )
    # Of logits; left out where the teacher gives none.
    mean_top1_probability: float | None = Field(None, exclude_if=_is_none, description="by softmax; None: of sigmoids")
    top1_agreement: float | None = Field(
        None, exclude_if=_is_none, description="share of rows whose arg-max survived the codec; None: of sigmoids"
    )
    mean_error: float | None = Field(None, exclude_if=_is_none, description="mean absolute error of a logit")
    max_error: float | None = Field(None, exclude_if=_is_none)
    max_error_allowed: float | None = Field(None, exclude_if=_is_none)
    kl: dict[str, float] = Field(
        default_factory=dict, exclude_if=_is_empty, description="mean KL(teacher || store) in nats, by temperature"
    )
    total_variation: dict[str, float] = Field(default_factory=dict, exclude_if=_is_empty)
    sigmoid_error: dict[str, float] = Field(
        default_factory=dict,
        exclude_if=_is_empty,
        description="of a multi-label teacher: mean absolute error of a class's probability, by temperature",
    )
    max_sigmoid_error: float | None = Field(None, exclude_if=_is_none, description="the largest, at T = 1")
    wttm_weight_error: float | None = Field(None, description="mean relative, at the worst of gamma .25, .5, .8")
    dtkd_temperature_error: float | None = Field(None, description="mean relative error of the teacher's temperature")
    decisions: dict[str, dict[str, float]] = Field(default_factory=dict)
    features: dict[str, dict[str, float]] = Field(default_factory=dict, exclude_if=_is_empty)

    @property
    def looked_at(self) -> str:
        """How much of the store the figures are of, in words."""
        if self.of_rows is None:
            return f"{self.rows:,} rows"
        share = f"{100 * self.rows / self.of_rows:.3g} %"
        return f"{self.rows:,} of {self.of_rows:,} rows ({share}), in {self.blocks:,} of {self.of_blocks:,} blocks"


class ImageSizes(Strict):
    """The smallest and the largest sides of images that differ in size, in pixels, upright."""

    width: tuple[Side, Side]
    height: tuple[Side, Side]

    def __str__(self) -> str:
        (narrow, wide), (low, high) = self.width, self.height
        return f"{narrow} to {wide} pixels wide and {low} to {high} high"


class Held(Strict):
    """What a partial copy has of the store whose digest it bears."""

    first_block: int = Field(ge=0)
    end_block: int
    views: int
    arrays: list[str] | None = Field(description="kinds of arrays beside keys and views, of KINDS; None: all")

    def has(self, array: str) -> bool:
        return self.arrays is None or kind_of(array) not in KINDS or kind_of(array) in self.arrays


class StoreManifest(Strict):
    """`manifest.json`: its existence means that the store is complete and was checked."""

    schema_version: int
    digest: Sha256
    views: dict[str, int] = Field(description="how many views are stored, by addition; '' is what came first")
    earlier: list[dict[str, int]] = Field(default_factory=list, description="`views` before it grew, oldest first")
    pages: dict[str, Sha256] = Field(
        default_factory=dict, exclude_if=_is_empty, description="sha256 of every page, by file name in `hashes/`"
    )
    entries: dict[str, Sha256] = Field(
        description="sha256 of ledger entries by file name: of tables; before schema 4, of all"
    )
    files: dict[str, StoredObject] = Field(description="identity, card and zarr metadata")
    fidelity: dict[str, Fidelity] = Field(description="by targets; '' are the first ones")
    left_out: int = Field(0, description="samples without a row, because their images are bad")
    image_sizes: ImageSizes | None = Field(
        None, exclude_if=_is_none, description="None: all have one size, or nobody wrote it down"
    )
    total_bytes: int
    bytes_by_array: dict[str, int]
    held: Held | None = Field(None, description="of a partial copy")
    checksum: str = Field("", description="sha256 of the manifest with an empty checksum")

    @property
    def listed(self) -> dict[str, str]:
        """sha256 by file name of what is proven by the manifest alone, and is in the digest."""
        return {**self.pages, **self.entries}


def ledger_name(block: int, views: range, addition: str = "") -> str:
    return f"{block:06d}-{views.start:05d}-{views.stop:05d}{addition and '.' + addition}.json"


def page_name(block: int, views: range, addition: str = "") -> str:
    """Of the page that vouches for the entry of a block."""
    first = block - block % PAGE_BLOCKS
    return f"{first:06d}-{views.start:05d}-{views.stop:05d}{addition and '.' + addition}.bin"


def tables_ledger_name(decisions: str, addition: str = "") -> str:
    return f"templates-{decisions}{addition and '.' + addition}.json"


def kind_of(array: str) -> str:
    """The first part of an array's name, such as `logits`."""
    return array.split("/", 1)[0]


def identity_of_targets(
    identity: StoreIdentity, additions: Iterable[Addition], targets: str, num_views: int
) -> StoreIdentity:
    """The store as if it had been created with these targets and so many views."""
    update: dict[str, object] = {"views": identity.views.with_count(num_views)}
    decisions = dict(identity.decisions) if targets == "" else {}
    features = dict(identity.features) if targets == "" else {}
    for addition in additions:
        if addition.targets == targets:
            decisions |= addition.decisions
            features |= addition.features
            if addition.extends is None:
                update |= {"teacher": addition.teacher, "codec": addition.codec}
    return identity.model_copy(update=update | {"decisions": decisions, "features": features})


def store_digest(
    identity: Mapping[str, object], additions: Iterable[Mapping[str, object]], listed: Mapping[str, str]
) -> str:
    """sha256 over identity and additions, as JSON, and over what the manifest lists: pages of hashes and tables.

    It is over the JSON that was stored, so that fields which later versions add do not change it.
    """
    about = {name: value for name, value in identity.items() if name not in ("versions", "schema_version")}
    views = about["views"]
    assert isinstance(views, Mapping)
    views = {name: value for name, value in views.items() if name != "count"}
    added = sorted(additions, key=lambda one: str(one["name"]))
    return fingerprint([about | {"views": views}, added, sorted(listed.items())])
