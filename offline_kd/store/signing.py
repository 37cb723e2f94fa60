"""Who made a store: a signature over its manifest.json, which vouches for everything else.

    signatures/DIGEST/manifest.json   the manifest that was signed, byte for byte
    signatures/DIGEST/manifest.sig    a Sigstore bundle over this one file, as OpenSSF's `model-signing` writes it
    signatures/DIGEST/SHA256SUMS      of both; written last: without it nothing was signed

DIGEST is the store's. A store that grows gets another manifest and another digest, so that what was signed before stays
where it is and can be proven for as long as the store says that it had that digest. All names follow from
manifest.json: web servers, which cannot list, hand out signatures too.
"""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from offline_kd.data.manifest import StoreReference
from offline_kd.store.objects import read_metadata
from offline_kd.store.opening import all_digests, open_store
from offline_kd.store.reader import Store, parse_metadata
from offline_kd.store.schema import StoreManifest
from offline_kd.support.downloads import DEFAULT_BYTES
from offline_kd.support.errors import RecipeError, StoreError, StoreForbidden, StoreMismatch
from offline_kd.support.places import Place, can_list

SIGNED, SIGNATURE, SUMS = "manifest.json", "manifest.sig", "SHA256SUMS"
DAMAGED = f"{SIGNED}, {SIGNATURE} and {SUMS} of the signature do not fit together: one of them was changed"
INSTALL = "needs model-signing. Install it: pip install 'offline-kd[sign]'"
MAKE_A_KEY = "Make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
GET_PUBLIC_KEY = "Get it from the private one: openssl ec -in key.pem -pubout -out public.pem"


def open_as_demanded(where: StoreReference, download_bytes: int = DEFAULT_BYTES) -> Store:
    """Open what a reference means: with its targets, its digest, and the signature that it demands.

    Raises what `open_store` and `check_signed` raise.
    """
    store = open_store(where.location, targets=where.targets, digest=where.digest, download_bytes=download_bytes)
    if where.signed_by is not None:
        check_signed(store, where.signed_by)
    return store


def sign(store: Store, key: Path) -> None:
    """Sign the manifest of a store with an elliptic-curve private key (PEM, without a password).

    Raises StoreMismatch when another key has signed this digest already or when the store has grown since it had the
    digest that it was opened with, RecipeError for a file that is no such key.
    """
    place, manifest = store.place, store.manifest
    assert manifest is not None
    if not can_list(place):
        raise StoreError(f"{place}: web addresses can be read only. Sign the store in its folder or bucket.")
    if manifest.schema_version == 1:
        raise StoreMismatch(f"{place}: stores of schema version 1 cannot be signed. Capture it anew.")
    if store.digest != manifest.digest:
        raise StoreMismatch(
            f"{place}: has grown since it was sha256:{store.digest}. Sign what it is now: sha256:{manifest.digest}."
        )
    signed = read_metadata(place, "manifest.json")
    signature = _sign(signed, manifest.digest, key)
    there = read_signature(place, manifest.digest)
    if there and _signer(there[SIGNATURE]) not in (None, _signer(signature)):
        raise StoreMismatch(
            f"{place}: sha256:{manifest.digest} is signed by another key, sha256 {_signer(there[SIGNATURE])}. "
            f"To replace that signature, delete {place}/{signature_names(manifest.digest)[-1]} first."
        )
    files = {SIGNED: signed, SIGNATURE: signature}
    *names, sums = signature_names(manifest.digest)
    # Without SUMS nothing is signed, until all is written again; what a killed `sign` left lying goes as well.
    for name in [sums, *place.sizes(f"signatures/{manifest.digest}")]:
        place.delete(name)
    for name, content in zip(names, files.values(), strict=True):
        place.put(name, content)
    place.put(sums, _sums(files))


def check_signed(store: Store, public_key: Path) -> None:
    """Raise StoreMismatch unless that key signed the digest that a store was opened with, and its manifest."""
    problem = _why_unsigned(store, store.digest, public_key)
    if problem:
        others = signed_digests(store, public_key)
        known = f" Signed by it: {'; '.join(others)}." if others else ""
        raise StoreMismatch(
            f"{store.place}: sha256:{store.digest} is not signed by {public_key}: {problem}.{known} "
            "Have it signed (`offline-kd store sign`), or get the store from who signs it."
        )


def signed_digests(store: Store, public_key: Path) -> list[str]:
    """The digests of a store that a key signed, the present one first: `sha256:... (earlier, 12 of 25 views)`."""
    digests = all_digests(store)
    signed = {digest: views[""] for digest, views in digests.items() if not _why_unsigned(store, digest, public_key)}
    present, now = next((digest, views[""]) for digest, views in digests.items())
    return [
        f"sha256:{digest} ({now} views)" if digest == present else f"sha256:{digest} (earlier, {count} of {now} views)"
        for digest, count in signed.items()
    ]


def signature_names(digest: str) -> list[str]:
    """The files of a signature, in the order in which they are written."""
    return [f"signatures/{digest}/{name}" for name in (SIGNED, SIGNATURE, SUMS)]


def read_signature(place: Place, digest: str) -> dict[str, bytes] | None:
    """The files of a signature by their short names; None where that digest was not signed."""
    sums = _read_if_there(place, f"signatures/{digest}/{SUMS}")
    if sums is None:
        return None
    parts = (SIGNED, SIGNATURE)
    found = {name: _read_if_there(place, f"signatures/{digest}/{name}") for name in parts}
    return {name: content or b"" for name, content in found.items()} | {SUMS: sums}


def damage(place: Place, digest: str) -> str:
    """What is wrong with the files of a signature, without any key; empty where nothing is, or nothing was signed."""
    try:
        files = read_signature(place, digest)
    except StoreError as error:
        return str(error)
    return DAMAGED if files and files[SUMS] != _sums(files) else ""


def _why_unsigned(store: Store, digest: str, public_key: Path) -> str:
    """Why a key does not vouch for a digest of a store; empty when it does."""
    place, manifest = store.place, store.manifest
    assert manifest is not None
    files = read_signature(place, digest)
    if files is None:
        return "there is no signature"
    problem = DAMAGED if files[SUMS] != _sums(files) else _refuted(files, digest, public_key)
    if problem:
        return problem
    signed = parse_metadata(StoreManifest, files[SIGNED], f"{place}/signatures/{digest}/{SIGNED}")
    if signed.digest != digest:
        return f"the signature there is one of sha256:{signed.digest}"
    # A part of a store says what it holds, and is otherwise what was signed.
    fields = StoreManifest.model_fields.keys() - {"held", "checksum"}
    changed = sorted(name for name in fields if getattr(signed, name) != getattr(manifest, name))
    if digest == manifest.digest and changed:
        return f"manifest.json was changed after it was signed ({', '.join(changed)})"
    return ""


def _sums(files: dict[str, bytes]) -> bytes:
    """As `sha256sum` writes and checks it."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in (SIGNED, SIGNATURE)).encode()


def _signer(signature: bytes) -> str | None:
    """sha256 of the public key (PEM) that a signature says it is by; None for what says nothing."""
    try:
        hint = json.loads(signature)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return hint if isinstance(hint, str) else None


def _read_if_there(place: Place, name: str) -> bytes | None:
    try:
        return read_metadata(place, name)
    except (FileNotFoundError, NotADirectoryError, StoreForbidden):
        return None  # what may be read but not listed answers "forbidden" when asked for what is not there


# ---- model-signing, which takes a second to import and is installed by those who sign or demand signatures ----------


def _lay_out(folder: str, content: bytes, digest: str) -> Path:
    """The folder that the signature is about: manifest.json and nothing else."""
    signed = Path(folder) / digest
    signed.mkdir()
    (signed / SIGNED).write_bytes(content)
    return signed


def _sign(content: bytes, digest: str, key: Path) -> bytes:
    try:
        from model_signing.signing import Config
    except ImportError as error:
        raise StoreError(f"signing {INSTALL}") from error
    try:
        signer = Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # whatever the library makes of a file that is no key
        raise RecipeError(
            f"--key {key}: no elliptic-curve private key in PEM, without a password, on P-256, P-384 or P-521 "
            f"({_said(error)}). {MAKE_A_KEY}"
        ) from error
    with TemporaryDirectory() as folder:
        file = Path(folder) / SIGNATURE
        signer.sign(_lay_out(folder, content, digest), file)
        return file.read_bytes()


def _refuted(files: dict[str, bytes], digest: str, public_key: Path) -> str:
    """Why a signature is none by that key over that manifest; empty when it is."""
    try:
        from model_signing.verifying import Config
    except ImportError as error:
        raise StoreError(f"checking that a store is signed by {public_key} {INSTALL}") from error
    try:
        verifier = Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise RecipeError(
            f"{public_key}: no elliptic-curve public key in PEM ({_said(error)}). {GET_PUBLIC_KEY}"
        ) from error
    with TemporaryDirectory() as folder:
        file = Path(folder) / SIGNATURE
        file.write_bytes(files[SIGNATURE])
        signed = _lay_out(folder, files[SIGNED], digest)
        try:
            verifier.verify(signed, file)
        except Exception as error:  # a stranger's bytes: no failure of whatever kind is a proof
            return f"the signature there is none of it by this key ({_said(error)})"
    return ""


def _said(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.120}"
