"""`mmerge sign`, and the signature that `mmerge verify --identity` requires."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmerge.manifests.errors import SignatureError
from mmerge.pipeline.cli.output import out, show_bytes
from mmerge.pipeline.monitoring.printable import escape

TOKEN_VARIABLE = "MMERGE_IDENTITY_TOKEN"
"""Environment variable with the OpenID Connect token of a keyless signature."""


def sign(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="composite (STORE#NAME), or folder written by 'mmerge export'"
        ),
    ],
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="PEM",
            help="private key (elliptic curve); its password is read from MMERGE_KEY_PASSWORD",
            show_default=False,
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            "--certificate", metavar="PEM", help="certificate of the key", show_default=False
        ),
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(
            "--chain",
            metavar="PEM",
            help="certificate of the issuer of --certificate, up to its root; may be repeated",
            show_default=False,
        ),
    ] = None,
    keyless: Annotated[
        bool,
        typer.Option(
            "--keyless",
            help=(
                "sign with Sigstore: the identity of a CI workload, or the token in"
                " MMERGE_IDENTITY_TOKEN; needs a network"
            ),
        ),
    ] = False,
) -> None:
    """Sign a composite or an exported folder in the OpenSSF Model Signing format.

    A composite is verified before it is signed. 'mmerge verify --identity' checks the signature; so
    does the program 'model_signing'.
    """
    from mmerge.manifests.maintenance.signatures import (
        Signer,
        find_exported_folder,
        sign_build,
        sign_folder,
    )
    from mmerge.manifests.maintenance.verify import verify

    if keyless == (key is not None):
        raise SignatureError("give either --key PEM or --keyless")
    signer = Signer(
        private_key=key,
        certificate=certificate,
        certificate_chain=tuple(chain or ()),
        identity_token=os.environ.get(TOKEN_VARIABLE) if keyless else None,
    )
    folder = find_exported_folder(target)
    if folder is not None:
        out.print(f"signed {escape(target)}: {escape(str(sign_folder(folder, signer)))}")
        return
    with show_bytes("verify") as bar:
        verify(target, on_bytes=bar.advance).check()
    with show_bytes("sign") as bar:
        signature = sign_build(target, signer, on_bytes=bar.advance)
    out.print(f"signed {escape(target)}: {escape(signature)} in the store")


def verify_signature(uri: str, *, identity: str | None, issuer: str | None) -> str:
    """Return the signature by `identity` that a composite or exported folder has; "" if not asked.

    Raises:
        SignatureError: it has none, or an exported folder is given without an identity.
    """
    from mmerge.manifests.maintenance.signatures import (
        Identity,
        check_build_signature,
        check_folder_signature,
        find_exported_folder,
    )

    folder = find_exported_folder(uri)
    if identity is None:
        if issuer is not None:
            raise SignatureError("--issuer: has no effect without --identity. Leave it out")
        if folder is not None:
            raise SignatureError(
                f"{uri}: is an exported folder, which has no digests of its own. Sign it with"
                " 'mmerge sign', and verify it with --identity"
            )
        return ""
    required = Identity(identity, issuer)
    if folder is not None:
        return check_folder_signature(folder, required).name
    return check_build_signature(uri, required)
