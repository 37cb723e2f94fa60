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

from offline_kd.data.labels import LabelRule
from offline_kd.data.manifest import EvaluationCrop, Normalisation, Tar
from offline_kd.store.codecs import AnyCodec
from offline_kd.store.decisions import DecisionsConfig
from offline_kd.store.features import FeaturesIdentity, names_of_their_own
from offline_kd.support.strict import Sha256, Strict, fingerprint
from offline_kd.views import Views
from offline_kd.views.epochs import view_groups

SCHEMA_VERSION = 4  # of new stores; those of 2 and 3 are read and grow as what they are, those of 1 are read
THIN_PROBES_SINCE = 4  # the version from which probes of large views keep some of their pixels
PROBE_SIDE = 64  # so many of them in a row
DIGESTS_SINCE = 3  # the version from which a store keeps a sha256 of every image, and the keys themselves
PAGES_SINCE = 4  # the version from which manifest.json lists pages of hashes; before, it lists every ledger entry
PAGE_BLOCKS = 1024  # whose entries a page vouches for: 32 KiB
MAX_TARS = 2**17  # of one store
KINDS = "logits", "decisions", "features"  # of targets: what their arrays' names begin with

Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z_\-]+$", max_length=100)]
Side = Annotated[int, Field(gt=0, lt=2**15)]


def _is_usual(labels: object) -> bool:
    """Left out of JSON, so that stores of images with `.cls` are described as by earlier versions."""
    return labels == "cls"


def _is_false(value: object) -> bool:
    """Left out of JSON, so that stores of teachers that compute as they always did are described as before."""
    return value is False


def _is_unused(value: object) -> bool:
    """Left out of JSON, so that stores of teachers with classes of their own are described as before."""
    return value in (None, "")


def _is_none(value: object) -> bool:
    """Left out of JSON, so that manifests of earlier versions are written as they were."""
    return value is None


def _is_empty(value: dict[str, object]) -> bool:
    """Left out of JSON, so that stores without are described as before."""
    return not value


class DatasetIdentity(Strict):
    name: str
    split: str
    fingerprint: Sha256
    classes: list[str] = Field(min_length=2)
    height: Side | None = Field(description="of every image; None: they differ")
    width: Side | None
    tars: list[Tar] = Field(min_length=1, max_length=MAX_TARS)
    labels: LabelRule = Field("cls", exclude_if=_is_usual, description="what says the label of a sample")
    licence: str


class Imported(Strict):
    """Of answers that another program stored: the teacher was never asked here."""

    format: str = Field(description="of the files, as the command line has it")
    evaluation: str = Field(description="a split on which students may be evaluated")
    lost: list[str] = Field(description="what the files do not say")

    @property
    def in_words(self) -> str:
        """For people."""
        return f"{self.format}; lost: {'; '.join(self.lost)}"


class TeacherIdentity(Strict):
    name: str
    model: str
    model_args: dict[str, int | float | str | bool]
    weights_sha256: Sha256 = Field(description="where answers were imported: of all that was read of them")
    weights_part: str = Field(
        "", exclude_if=_is_unused, description="entry, prefix of the file, where not the weights themselves were meant"
    )
    normalisation: Normalisation
    crop: EvaluationCrop | None = Field(None, description="of images of different sizes; its size is that of views")
    dtype: str
    compile: bool = Field(False, exclude_if=_is_false, description="whether the network was compiled")
    tf32: bool = Field(False, exclude_if=_is_false, description="whether float32 products may have had 10 bits")
    classes: list[Annotated[list[int], Field(min_length=1)]] | None = Field(
        None,
        exclude_if=_is_unused,
        description="indices of the network's classes that each class of the dataset is; None: they are its own",
    )
    evaluated_on: str
    measured_top1: float = Field(description="percent, by the gate, before anything was written")
    licence: str
    imported: Imported | None = Field(None, exclude_if=_is_unused, description="None: it was asked by offline-kd")

    @property
    def what_is_asked(self) -> tuple[object, ...]:
        """Which weights, and which of their classes: teachers that differ in it say other things."""
        return self.weights_sha256, self.weights_part, self.classes

    @property
    def weights(self) -> str:
        """Which weights, in words."""
        of_what = " of the imported labels; the weights are not known" if self.imported else ""
        return f"sha256 {self.weights_sha256}{of_what}"

    @property
    def arithmetic(self) -> str:
        """How it computed, in words."""
        if self.imported:
            return "arithmetic not known"
        return self.dtype + ", TF32" * self.tf32 + ", compiled" * self.compile

    @property
    def precision(self) -> str:
        """The dtype whose rounding explains how far two runs differ; TF32 has as many bits as float16."""
        return "float16" if self.dtype == "float32" and self.tf32 else self.dtype


class DecisionsIdentity(Strict):
    """Decisions that a store holds, and the map they were made on."""

    config: DecisionsConfig
    channels: int = Field(gt=0, le=2**20)
    height: Side
    width: Side


Tapped = DecisionsIdentity | FeaturesIdentity
StoredFeatures = Annotated[dict[Name, FeaturesIdentity], AfterValidator(names_of_their_own)]


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
