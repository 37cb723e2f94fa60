"""What writers leave in a store when they are ended: harmless, and removed by whoever finishes, copies or repairs."""

from offline_kd.store.leases import sweep_leases
from offline_kd.support.files import is_temporary, remove_abandoned
from offline_kd.support.places import Folder, Place


def is_leftover(name: str) -> bool:
    """Whether a file belongs to a writer that is at work, or was: no reader of the store looks at it."""
    return name.startswith("leases/") or is_temporary(name)


def sweep(place: Place) -> None:
    """Remove what writers that are gone left; what others that may live are using stays. Goes through all files."""
    sweep_few(place)
    if isinstance(place, Folder):
        for name in place.names():
            if is_temporary(name) and not name.startswith("scratch-"):
                remove_abandoned(place.path / name)


def sweep_few(place: Place) -> None:
    """As `sweep`, of leases and of what takes much room: what does not lie among the files of the store."""
    sweep_leases(place)
    if isinstance(place, Folder):
        for scratch in place.path.glob("scratch-*"):
            remove_abandoned(scratch)
