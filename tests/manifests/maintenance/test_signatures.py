"""Signatures of builds and exported folders, and that the standard program accepts them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mmerge.manifests.errors import ManifestError, SignatureError
from mmerge.manifests.format.manifest import manifest_key
from mmerge.manifests.format.references import open_build
from mmerge.manifests.maintenance.copy_build import copy_build
from mmerge.manifests.maintenance.signatures import (
    Identity,
    Signer,
    check_build_signature,
    check_folder_signature,
    list_signatures,
    sign_build,
    sign_folder,
)
from mmerge.pipeline import export, make_plan, read_recipe, run


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the PEM files of a new private key and of its public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(to_pem(key))
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def to_pem(key: ec.EllipticCurvePrivateKey, *, password: bytes | None = None) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def make_certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """Return a certificate; of an authority if it is its own issuer."""
    import datetime

    now = datetime.datetime.now(datetime.timezone.utc)
    is_authority = name == issuer
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    return builder.sign(issuer_key, hashes.SHA256())


def write_certificates(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Return the PEM files of a private key, of its certificate, and of that one's root."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = make_certificate(f"{name}-root", root_key, f"{name}-root", root_key)
    leaf = make_certificate(name, key, f"{name}-root", root_key)
    paths = tuple(folder / f"{name}.{suffix}" for suffix in ("key", "crt", "root"))
    paths[0].write_bytes(to_pem(key))
    paths[1].write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(root.public_bytes(serialization.Encoding.PEM))
    return paths[0], paths[1], paths[2]


@pytest.fixture
def store(lab: Any) -> str:
    run(make_plan(read_recipe(lab.write_recipe(lab.make_all()))))
    return str(lab.folder / "store")


@pytest.fixture
def folder(store: str, tmp_path: Path) -> Path:
    export(store, tmp_path / "exported", expert="image")
    return tmp_path / "exported"


def test_a_build_is_verified_by_the_key_that_signed_it_and_by_no_other(
    store: str, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path, "team")
    _, stranger = write_keys(tmp_path, "stranger")
    with pytest.raises(SignatureError, match="has no signature"):
        check_build_signature(store, Identity(str(public)))
    key = sign_build(store, Signer(private_key=private))
    assert check_build_signature(store, Identity(str(public))) == key
    with pytest.raises(SignatureError, match=r"no signature of build .* is by"):
        check_build_signature(store, Identity(str(stranger)))


def test_a_build_can_have_several_signatures(store: str, tmp_path: Path) -> None:
    keys = [write_keys(tmp_path, name) for name in ("first", "second")]
    for private, _ in keys:
        sign_build(store, Signer(private_key=private))
    assert len({check_build_signature(store, Identity(str(public))) for _, public in keys}) == 2


def test_a_changed_manifest_is_not_what_was_signed(store: str, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "team")
    sign_build(store, Signer(private_key=private))
    _, build = open_build(store)
    path = Path(store) / manifest_key(build)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises((SignatureError, ManifestError), match=r"mismatch|damaged"):
        check_build_signature(store, Identity(str(public)))


def test_signatures_go_with_a_copy(store: str, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "team")
    sign_build(store, Signer(private_key=private))
    target = str(tmp_path / "target")
    report = copy_build(store, target)
    check_build_signature(report.uri, Identity(str(public)))


def test_a_certificate_is_verified_through_its_root_alone(store: str, tmp_path: Path) -> None:
    key, certificate, root = write_certificates(tmp_path, "team")
    _, _, stranger = write_certificates(tmp_path, "stranger")
    sign_build(store, Signer(private_key=key, certificate=certificate, certificate_chain=(root,)))
    check_build_signature(store, Identity(str(root)))
    with pytest.raises(SignatureError, match="certificate"):
        check_build_signature(store, Identity(str(stranger)))


def test_an_encrypted_key_takes_its_password_from_the_environment(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private = tmp_path / "encrypted.key"
    private.write_bytes(to_pem(key, password=b"secret"))
    with pytest.raises(SignatureError, match="cannot sign"):
        sign_build(store, Signer(private_key=private))
    monkeypatch.setenv("MMERGE_KEY_PASSWORD", "secret")
    sign_build(store, Signer(private_key=private))
    assert sum(key.endswith(".sig") for key in list_signatures(*open_build(store))) == 1


@pytest.mark.parametrize("change", ["edit", "add", "remove", "add in .git"])
def test_a_changed_folder_is_not_what_was_signed(folder: Path, tmp_path: Path, change: str) -> None:
    private, public = write_keys(tmp_path, "team")
    sign_folder(folder, Signer(private_key=private))
    check_folder_signature(folder, Identity(str(public)))
    if change == "edit":
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    elif change == "add":
        (folder / "more.py").write_text("")
    elif change == "remove":
        (folder / "config.json").unlink()
    else:
        (folder / ".git").mkdir()
        (folder / ".git" / "hook").write_text("")
    with pytest.raises(SignatureError, match=r"is not as .* signed it"):
        check_folder_signature(folder, Identity(str(public)))


def test_the_standard_program_verifies_an_exported_folder(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "team")
    signature = sign_folder(folder, Signer(private_key=private))
    assert verify_with_program(folder, signature, public).returncode == 0
    (folder / "config.json").write_text("{}")
    assert verify_with_program(folder, signature, public).returncode == 1


def test_standard_programs_verify_a_build(store: str, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "team")
    signature = Path(store) / sign_build(store, Signer(private_key=private))
    folder = Path(store) / "builds" / open_build(store)[1]
    arguments = ["--ignore_unsigned_files", "--signature", signature, "--public_key", public]
    assert run_program("verify", "key", folder, *arguments).returncode == 0
    sums = ["sha256sum", "--check", "--quiet", folder / "signatures" / "SHA256SUMS"]
    assert subprocess.run(sums, cwd=store, check=False).returncode == 0
    stored = next((Path(store) / "objects").glob("*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    assert subprocess.run(sums, cwd=store, check=False).returncode == 1


def test_a_changed_list_of_digests_is_not_what_was_signed(store: str, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "team")
    sign_build(store, Signer(private_key=private))
    sums = Path(store) / "builds" / open_build(store)[1] / "signatures" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("0", "1", 1))
    with pytest.raises(SignatureError, match="no signature of build"):
        check_build_signature(store, Identity(str(public)))
    sums.unlink()
    with pytest.raises(SignatureError, match="SHA256SUMS is missing"):
        check_build_signature(store, Identity(str(public)))


def test_a_signature_of_the_standard_program_is_accepted(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "team")
    arguments = ["sign", "key", folder, "--signature", folder / "model.sig"]
    done = run_program(*arguments, "--no-ignore-git-paths", "--private_key", private)
    assert done.returncode == 0, done.stderr
    check_folder_signature(folder, Identity(str(public)))


def verify_with_program(
    target: Path, signature: Path, public: Path
) -> subprocess.CompletedProcess[str]:
    return run_program("verify", "key", target, "--signature", signature, "--public_key", public)


def run_program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_is_signed_once(folder: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path, "team")
    sign_folder(folder, Signer(private_key=private))
    with pytest.raises(SignatureError, match="Delete it to sign"):
        sign_folder(folder, Signer(private_key=private))


@pytest.mark.parametrize(
    ("signer", "message"),
    [
        (Signer(certificate=Path("c.pem")), "give the private key"),
        (Signer(private_key=Path("k"), certificate=Path("c")), "certificate of its issuer"),
        (Signer(private_key=Path("k.pem"), certificate_chain=(Path("c"),)), "no effect without"),
        (Signer(private_key=Path("missing.pem")), "missing.pem: is no file"),
    ],
)
def test_an_incomplete_signer_is_refused(store: str, signer: Signer, message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        sign_build(store, signer)


def test_identities_that_nothing_can_be_compared_with_are_refused(
    store: str, tmp_path: Path
) -> None:
    private, _ = write_keys(tmp_path, "team")
    sign_build(store, Signer(private_key=private))
    for name, message in (("someone@example.org", "--issuer"), (str(private), "neither a public")):
        with pytest.raises(SignatureError, match=message):
            check_build_signature(store, Identity(name))


def test_the_commands_sign_and_verify(store: str, folder: Path, tmp_path: Path, cli: Any) -> None:
    private, public = write_keys(tmp_path, "team")
    for target in (store, str(folder)):
        code, said = cli("sign", target, "--key", str(private))
        assert (code, "signed" in said) == (0, True)
        code, said = cli("verify", target, "--identity", str(public))
        assert (code, "verified" in said) == (0, True)
    damaged = next((Path(store) / "objects").glob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert cli("verify", store, "--identity", str(public))[0] == 1
    assert cli("sign", store, "--key", str(private))[0] == 1, "a damaged build is not signed"


def test_a_folder_without_a_signature_is_not_called_verified(folder: Path, cli: Any) -> None:
    code, said = cli("verify", str(folder))
    assert code == 1
    assert "--identity" in said
    shutil.rmtree(folder)
