"""What `bench` measures of loaders: ours, which joins with the store, and torchvision's on the same images."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_pil_image

from offline_kd.cli.bench_material import Bench
from offline_kd.cli.bench_timing import Timed
from offline_kd.data.decoding import decode_image
from offline_kd.distill.loader import Loader
from offline_kd.distill.training import make_loader, source_of, training_images
from offline_kd.store.opening import open_store
from offline_kd.views.kind import ViewSpec
from offline_kd.views.none import NoAugmentation
from offline_kd.views.pad_crop_flip import PadCropFlip
from offline_kd.views.random_resized_crop import RandomCrop


def loader_parts(this: Bench, from_store: Loader) -> dict[str, Timed]:
    """Seconds per batch; of the first batch, which a new run waits for, seconds."""

    def load_only() -> None:
        for _ in from_store.epoch(0):
            pass

    own = {"loader alone": Timed(load_only, this.batches_of_pass), "first batch": Timed(_first_batch(this), 1)}
    if not this.recipe.data.workers:  # those would be started anew, too
        own["loader, store read anew"] = _read_anew(this)
    return own | torchvision_parts(this)


def _read_anew(this: Bench) -> Timed:
    """The same where nothing of the store is kept: what an epoch costs of a store larger than what a process keeps."""
    loaders: list[Loader] = []

    def open_again() -> None:
        source = source_of(this.recipe, this.images, [open_store(this.store.place)], this.terms)
        loaders[:] = [make_loader(this.recipe, source, 0, this.device)]

    def work() -> None:
        for _ in loaders[0].epoch(0):
            pass

    return Timed(work, this.batches_of_pass, open_again)


def _first_batch(this: Bench) -> Callable[[], object]:
    """From opening the store to the first batch of a run that has read nothing yet."""

    def work() -> object:
        images = training_images(this.recipe, this.manifest, this.roots, prove="once")
        store = open_store(this.store.place)
        loader = make_loader(this.recipe, source_of(this.recipe, images, [store], this.terms), 0, this.device)
        batches = loader.epoch(0)
        return next(batches), batches, loader

    return work


# ---- torchvision's -------------------------------------------------------------------------------------------------


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images in memory, encoded or decoded, that torchvision's transforms make views of."""

    def __init__(
        self, images: Sequence[object], labels: Sequence[int], transform: Callable[[object], Tensor], *, encoded: bool
    ) -> None:
        self.images, self.labels, self.transform, self.encoded = images, labels, transform, encoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = self.images[row]
        if self.encoded:
            assert isinstance(image, bytes)
            image = decode_image(image)
        return self.transform(image), self.labels[row]


def torchvision_parts(this: Bench) -> dict[str, Timed]:
    """An epoch of a DataLoader with as many workers, over `pictures_of`; nothing where there are none."""
    return {name: Timed(_epoch_of(this, pictures), this.batches) for name, pictures in pictures_of(this).items()}


def pictures_of(this: Bench) -> dict[str, Pictures]:
    """The same images with transforms that make the recipe's kind of view; nothing for other kinds.

    What both sides have in common: images in memory, decoded where our loader keeps them so and encoded where it does
    not; Pillow as decoder; the same interpolation with antialiasing; batches of uint8, shuffled. Ours reads the targets
    as well. Twice, with transforms of Pillow's images and of tensors, for either may be faster.
    """
    blocks = list(this.images)
    labels = [int(label) for block in blocks for label in block.labels]
    encoded = [one for block in blocks for one in block.encoded]
    side = (0, 0) if encoded else (blocks[0].images.shape[2], blocks[0].images.shape[3])
    steps, to_tensor = same_views(this.recipe.views, side), v2.PILToTensor()
    if steps is None:
        return {}
    pillow, tensors = v2.Compose([*steps, to_tensor]), v2.Compose([to_tensor, *steps])
    if encoded:
        return {
            "torchvision, Pillow": Pictures(encoded, labels, pillow, encoded=True),
            "torchvision, tensors": Pictures(encoded, labels, tensors, encoded=True),
        }
    decoded = [image for block in blocks for image in block.images]
    return {
        "torchvision, Pillow": Pictures([to_pil_image(one) for one in decoded], labels, pillow, encoded=False),
        "torchvision, tensors": Pictures(decoded, labels, v2.Compose([*steps, v2.Identity()]), encoded=False),
    }


def same_views(views: ViewSpec, side: tuple[int, int]) -> list[v2.Transform] | None:
    """The transforms of torchvision that make views of this kind; None where it has no such loader.

    Args:
        side: height and width of the images, where they all have one size.
    """
    if isinstance(views, NoAugmentation):
        return []
    if isinstance(views, PadCropFlip):
        mode = "reflect" if views.fill == "reflect" else "constant"
        crop = v2.RandomCrop(side, padding=views.padding, padding_mode=mode)
        return [crop, v2.RandomHorizontalFlip(0.5)] if views.flip else [crop]
    if isinstance(views, RandomCrop) and not (views.num_ops or views.erase or views.mixing):
        crop_and_resize = v2.RandomResizedCrop(
            views.size, views.scale, views.ratio, InterpolationMode(views.interpolation), antialias=True
        )
        return [crop_and_resize, v2.RandomHorizontalFlip(views.flip)]
    return None


def _epoch_of(this: Bench, pictures: Pictures) -> Callable[[], None]:
    workers = this.recipe.data.workers
    loader = DataLoader(
        pictures,
        this.recipe.training.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=this.device.type == "cuda",
    )

    def work() -> None:
        for images, labels in loader:
            images.to(this.device, non_blocking=True), labels.to(this.device, non_blocking=True)

    return work
