"""`offline-kd store sign`, and what `store verify --signed-by` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from offline_kd.cli.options import common_options, known_stores

if TYPE_CHECKING:
    from offline_kd.store.reader import Store


@click.command("sign")
@click.argument("reference", metavar="STORE")
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Elliptic-curve private key, PEM.")
@common_options
def sign_command(reference: str, key: Path, manifest_path: Path, data_root: tuple[str, ...]) -> None:
    """Sign a finished store: its manifest.json, which vouches for everything. Copies carry the signature.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out public.pem
    offline-kd store sign stores/cifar10 --key key.pem
    offline-kd store verify stores/cifar10 --signed-by public.pem
    """
    from offline_kd.store.opening import open_store
    from offline_kd.store.signing import sign
    from offline_kd.support.console import say

    where = known_stores(manifest_path).store(reference)
    store = open_store(where.location, digest=where.digest)  # what the manifest demands is made here
    sign(store, key)
    say(f"{reference}: signed sha256:{store.digest}")


def show_signed(store: Store, reference: str, public_key: Path) -> None:
    """Say which digests of a store a key signed; raises StoreMismatch when it did not sign the one asked for."""
    from offline_kd.store.signing import check_signed, signed_digests
    from offline_kd.support.console import say

    check_signed(store, public_key)
    for one in signed_digests(store, public_key):
        say(f"{reference}: signed by {public_key}: {one}")
