"""Signatures of builds and exported folders, in the OpenSSF Model Signing format.

A signature of a build is over its manifest, which holds the BLAKE3 digests of all its objects, and
over a list of their SHA-256 digests. It lies in the store beside the manifest, so that a build can
have several. A signature of an exported folder is over all its files, as `model.sig` in it. Both
are Sigstore bundles: the programs `model_signing` and `sha256sum` verify them without this package.

SHA-256 is computed when a build is signed, not when it is made: it takes three times as long as
BLAKE3, and every build would pay for it.

Signing needs the package model-signing: `pip install 'mmerge[sign]'`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.errors import NotFound, SignatureError, first_line
from mmerge.manifests.format.manifest import (
    Manifest,
    manifest_key,
    needed_keys,
    read_manifest,
)
from mmerge.manifests.format.references import open_build, split_uri
from mmerge.manifests.format.stored_objects import read_pieces
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import is_local, open_store, to_local_path

FOLDER_SIGNATURE = "model.sig"
"""Name of the signature in an exported folder; the signature leaves out itself."""
SUMS = "signatures/SHA256SUMS"
"""The SHA-256 digests of all that a build needs, by key, as `sha256sum` writes them."""
MAX_SIGNATURE_BYTES = 64 << 20
"""A bundle lists every file of a folder, a line of some 200 bytes each."""
PASSWORD_VARIABLE = "MMERGE_KEY_PASSWORD"
"""Environment variable with the password of an encrypted private key."""


@dataclass(frozen=True)
class Signer:
    """What a signature is made with: a key, a key and its certificate, or neither (keyless).

    Without a key, Sigstore signs with the identity of this machine's workload (on a CI service) or
    of `identity_token`. That needs a network.
    """

    private_key: Path | None = None
    """PEM file of an elliptic-curve private key."""
    certificate: Path | None = None
    """PEM file of the certificate of that key."""
    certificate_chain: Sequence[Path] = ()
    """PEM files of the certificates from the issuer of that certificate up to its root; at least
    one.
    """
    identity_token: str | None = None
    """OpenID Connect token for Sigstore."""


@dataclass(frozen=True)
class Identity:
    """Whose signature is required: the owner of a key, of a certificate, or of an account."""

    name: str
    """PEM file of a public key or of trusted root certificates, or the account of a keyless
    signature: an e-mail address, or the URI of a workload.
    """
    issuer: str | None = None
    """URL of the OpenID Connect provider that vouches for the account of a keyless signature."""


def find_exported_folder(uri: str) -> Path | None:
    """Return the folder at `uri` if it is an exported checkpoint or adapter, None for a store."""
    if not is_local(uri):
        return None
    folder = to_local_path(uri)
    has_config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return folder if has_config and not (folder / "refs").is_dir() else None


def sign_build(
    uri: str, signer: Signer, *, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> str:
    """Sign the build at `uri`; return the key of the signature in its store.

    Every object is read, for its SHA-256 digest. The build is not verified here: verify it before
    it is signed.

    Args:
        uri: the build.
        signer: whose signature it is.
        on_bytes: receives the size of every piece that is read.

    Raises:
        SignatureError: the signature cannot be made.
        ManifestError, StoreError: the build is missing, or its store cannot be written.
    """
    source, build = open_build(uri)
    store = open_store(split_uri(uri)[0])
    sums = _make_sums(source, read_manifest(source, build), on_bytes)
    with (
        _signed_folder(source, build, sums) as signed_folder,
        tempfile.TemporaryDirectory() as folder,
    ):
        path = Path(folder) / FOLDER_SIGNATURE
        _sign(signed_folder, path, signer)
        signature = path.read_bytes()
    store.put(f"builds/{build}/{SUMS}", sums)
    key = f"{_signature_prefix(build)}/{digest_bytes(signature)[:32]}.sig"
    store.put(key, signature)
    return key


def _make_sums(store: ReadableStore, manifest: Manifest, on_bytes: Callable[[int], None]) -> bytes:
    """Return the SHA-256 digests of all that a build needs, in the form of `sha256sum`."""
    lines = []
    for key in sorted(needed_keys(manifest)):
        digest = hashlib.sha256()
        for _, data in read_pieces(store, key, num_bytes=store.num_bytes(key)):
            digest.update(data)
            on_bytes(len(data))
        lines.append(f"{digest.hexdigest()}  {key}\n")
    return "".join(lines).encode()


def sign_folder(folder: str | Path, signer: Signer) -> Path:
    """Sign all files of an exported folder; return the path of the signature in it.

    Raises:
        SignatureError: the folder has a signature, or the signature cannot be made.
    """
    target = Path(folder)
    if not target.is_dir():
        raise SignatureError(f"{target}: is no folder. Give one that 'mmerge export' wrote")
    path = target / FOLDER_SIGNATURE
    if path.exists():
        raise SignatureError(f"{path}: exists. Delete it to sign the folder again")
    _sign(target, path, signer)
    return path


def list_signatures(store: ReadableStore, build: str) -> list[str]:
    """Return the keys of the signatures of a build, and of the list of SHA-256 digests."""
    return sorted(store.list(_signature_prefix(build)))


def check_build_signature(uri: str, identity: Identity) -> str:
    """Return the key of a signature of the build at `uri` by `identity`.

    The manifest and the list of SHA-256 digests are compared with the signature. What the manifest
    describes is compared by `verify`, with its BLAKE3 digests.

    Raises:
        SignatureError: the build has no such signature.
        ManifestError, StoreError: the build is missing, or its store cannot be read.
    """
    store, build = open_build(uri)
    keys = [key for key in list_signatures(store, build) if key.endswith(".sig")]
    if not keys:
        raise SignatureError(
            f"{uri}: build {build[:12]} has no signature. Sign it with 'mmerge sign', or verify it"
            " without --identity"
        )
    reasons = []
    try:
        sums = store.read(f"builds/{build}/{SUMS}", max_bytes=MAX_SIGNATURE_BYTES)
    except NotFound:
        raise SignatureError(
            f"{uri}: builds/{build}/{SUMS} is missing, which the signatures are over. Copy it from"
            " where the build was signed, or sign the build again"
        ) from None
    with (
        _signed_folder(store, build, sums) as signed_folder,
        tempfile.TemporaryDirectory() as folder,
    ):
        path = Path(folder) / FOLDER_SIGNATURE
        for key in keys:
            try:
                path.write_bytes(store.read(key, max_bytes=MAX_SIGNATURE_BYTES))
            except NotFound:
                continue
            try:
                _verify(signed_folder, path, identity)
            except SignatureError as error:
                reasons.append(f"{key}: {Exception.__str__(error)}")
            else:
                return key
    raise SignatureError(
        f"{uri}: no signature of build {build[:12]} is by {identity.name}:\n  "
        + "\n  ".join(reasons)
        + "\nDo not use the build, unless it was signed by somebody else whom you trust: then give"
        " that --identity"
    )


def check_folder_signature(folder: str | Path, identity: Identity) -> Path:
    """Return the path of the signature of an exported folder, if it is by `identity`.

    Raises:
        SignatureError: the folder has no signature, it is by somebody else, or a file was changed,
            added or removed since.
    """
    target = Path(folder)
    path = target / FOLDER_SIGNATURE
    if not path.is_file():
        raise SignatureError(f"{target}: has no {FOLDER_SIGNATURE}. Sign it with 'mmerge sign'")
    try:
        _verify(target, path, identity)
    except SignatureError as error:
        raise SignatureError(
            f"{target}: is not as {identity.name} signed it: {Exception.__str__(error)}. Do not use"
            " it; export and sign it again"
        ) from error
    return path


def _signature_prefix(build: str) -> str:
    return f"builds/{build}/signatures"


@contextmanager
def _signed_folder(store: ReadableStore, build: str, sums: bytes) -> Iterator[Path]:
    """Yield a local folder with the files of `builds/BUILD` that a signature is over."""
    read_manifest(store, build)  # says what is wrong with a manifest that is missing or damaged
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / build
        (root / SUMS).parent.mkdir(parents=True)
        (root / "manifest.json").write_bytes(store.read(manifest_key(build)))
        (root / SUMS).write_bytes(sums)
        yield root


def _import_module(name: str) -> ModuleType:
    try:
        return __import__(f"model_signing.{name}", fromlist=[name])
    except ImportError as error:
        raise SignatureError(
            f"signatures need the package model-signing ({error}): pip install 'mmerge[sign]'"
        ) from error


def _sign(target: Path, signature: Path, signer: Signer) -> None:
    """Write the signature of a file or folder."""
    _check_signer(signer)
    config = _import_module("signing").Config()
    # Bytes, though the library's annotation says str: it hands the password on as it is.
    password = os.environb.get(PASSWORD_VARIABLE.encode()) or None

    def sign() -> None:
        if signer.private_key is None:
            config.use_sigstore_signer(
                use_ambient_credentials=signer.identity_token is None,
                identity_token=signer.identity_token,
            )
        elif signer.certificate is None:
            config.use_elliptic_key_signer(private_key=signer.private_key, password=password)
        else:
            config.use_certificate_signer(
                private_key=signer.private_key,
                signing_certificate=signer.certificate,
                certificate_chain=signer.certificate_chain,
            )
        config.set_hashing_config(_hashing_config(target, signature))
        config.sign(target, signature)

    _call(sign, what="cannot sign")


def _check_signer(signer: Signer) -> None:
    if signer.private_key is None and signer.certificate is not None:
        raise SignatureError("--certificate: give the private key of the certificate with --key")
    if signer.certificate is None and signer.certificate_chain:
        raise SignatureError("--chain: has no effect without --certificate. Leave it out")
    if signer.certificate is not None and not signer.certificate_chain:
        raise SignatureError("--certificate: give the certificate of its issuer with --chain")
    if signer.certificate is not None and os.environ.get(PASSWORD_VARIABLE):
        raise SignatureError(
            "--certificate: the signing library cannot read the encrypted key of a certificate."
            f" Give the key without a password, and unset {PASSWORD_VARIABLE}"
        )
    for path in (signer.private_key, signer.certificate, *signer.certificate_chain):
        if path is not None and not path.is_file():
            raise SignatureError(f"{path}: is no file. Give a key or certificate in PEM form")


def _verify(target: Path, signature: Path, identity: Identity) -> None:
    """Compare a file or folder with its signature. Raises SignatureError."""
    config = _import_module("verifying").Config()
    pem = Path(identity.name)
    content = pem.read_bytes() if pem.is_file() else b""

    def verify() -> None:
        if b"BEGIN CERTIFICATE" in content:
            config.use_certificate_verifier(certificate_chain=[pem])
        elif b"BEGIN PUBLIC KEY" in content:
            config.use_elliptic_key_verifier(public_key=pem)
        elif content:
            raise SignatureError(f"{pem}: holds neither a public key nor a certificate in PEM form")
        elif identity.issuer is None:
            raise SignatureError(
                f"--identity {identity.name}: is no file; for the account of a keyless signature"
                " give its provider with --issuer"
            )
        else:
            config.use_sigstore_verifier(identity=identity.name, oidc_issuer=identity.issuer)
        # Never the paths that the signature itself would leave out: only its own file is unsigned.
        config.set_hashing_config(_hashing_config(target, signature))
        config.verify(target, signature)

    _call(verify, what="not verified")


def _hashing_config(target: Path, signature: Path) -> object:
    config = _import_module("hashing").Config()
    is_inside = signature.is_relative_to(target)
    ignored = [signature.relative_to(target)] if is_inside else []
    return config.set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _call(function: Callable[[], None], *, what: str) -> None:
    """Call the signing library; its errors are of many types and become SignatureError."""
    try:
        function()
    except SignatureError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise SignatureError(f"{what}: {reason}") from error
