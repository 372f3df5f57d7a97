"""Signatures of builds and exported folders, in the OpenSSF Model Signing format.

A signature of a build is over its manifest, which holds the digests of all its objects. It lies in
the store beside the manifest, so that a build can have several. A signature of an exported folder
is over all its files, as `model.sig` in it. Both are Sigstore bundles: the program `model_signing`
verifies them without this package.

Signing needs the package model-signing: `pip install 'mmerge[sign]'`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.errors import NotFound, SignatureError
from mmerge.manifests.format.manifest import manifest_key, read_manifest
from mmerge.manifests.format.references import open_build, split_uri
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import is_local, open_store, to_local_path

FOLDER_SIGNATURE = "model.sig"
"""Name of the signature in an exported folder; the signature leaves out itself."""
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


def sign_build(uri: str, signer: Signer) -> str:
    """Sign the build at `uri`; return the key of the signature in its store.

    The build is not verified here: verify it before it is signed.

    Raises:
        SignatureError: the signature cannot be made.
        ManifestError, StoreError: the build is missing, or its store cannot be written.
    """
    source, build = open_build(uri)
    store = open_store(split_uri(uri)[0])
    with _manifest_file(source, build) as manifest, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FOLDER_SIGNATURE
        _sign(manifest, path, signer)
        signature = path.read_bytes()
    key = f"{_signature_prefix(build)}/{digest_bytes(signature)[:32]}.sig"
    store.put(key, signature)
    return key


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
    """Return the keys of the signatures of a build."""
    return sorted(store.list(_signature_prefix(build)))


def check_build_signature(uri: str, identity: Identity) -> str:
    """Return the key of a signature of the build at `uri` by `identity`.

    Only the manifest is compared with the signature. What the manifest describes is compared by
    `verify`.

    Raises:
        SignatureError: the build has no such signature.
        ManifestError, StoreError: the build is missing, or its store cannot be read.
    """
    store, build = open_build(uri)
    keys = list_signatures(store, build)
    if not keys:
        raise SignatureError(
            f"{uri}: build {build[:12]} has no signature. Sign it with 'mmerge sign', or verify it"
            " without --identity"
        )
    reasons = []
    with _manifest_file(store, build) as manifest, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FOLDER_SIGNATURE
        for key in keys:
            try:
                path.write_bytes(store.read(key, max_bytes=MAX_SIGNATURE_BYTES))
            except NotFound:
                continue
            try:
                _verify(manifest, path, identity)
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
def _manifest_file(store: ReadableStore, build: str) -> Iterator[Path]:
    """Yield a local file with the manifest of a build, as the store has it."""
    read_manifest(store, build)  # says what is wrong with a manifest that is missing or damaged
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        path.write_bytes(store.read(manifest_key(build)))
        yield path


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SignatureError(f"{what}: {reason}") from error
