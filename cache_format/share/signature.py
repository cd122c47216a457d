"""Signatures of caches: who vouches for a manifest, and through its hashes for every shard.

``manifest.json.sig`` lies beside the manifest: a JSON document with one or more Ed25519 signatures,
each over a text that names the sha256 of the manifest's bytes, the signer and the time. The package
cryptography is imported only to sign and to check.

A name in a signature is what its signer says. Trust is in keys: ``ed25519:`` and 32 bytes in
base64, or the file that ``teacher-cache keygen`` wrote beside the private key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcask.cache_format.durable import sync, write_durably, writing_to
from logitcask.cache_format.errors import DamagedCacheError, UserError, first_line
from logitcask.cache_format.export.token_text import printable
from logitcask.cache_format.layout import MANIFEST, SIGNATURE
from logitcask.cache_format.manifest import canonical_json
from logitcask.cache_format.storage.files import (
    local_folder,
    open_filesystem,
    reaching,
    read_manifest,
    read_small,
)

MAX_SIGNATURE_BYTES = 1 << 16
_PREFIX = "ed25519:"
_PURPOSE = "logitcask manifest signature 1"


class Signature(BaseModel):
    """One signature. key: as in a config. signature: base64."""

    model_config = ConfigDict(extra="allow", frozen=True)

    key: str = Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")
    signer: str = Field(max_length=200)
    signed_at: str = Field(max_length=40)
    signature: str = Field(pattern=r"^[A-Za-z0-9+/]{86}==$")

    def text(self, manifest_sha256: str) -> bytes:
        """The signed bytes."""
        return canonical_json(
            {
                "purpose": _PURPOSE,
                "manifest_sha256": manifest_sha256,
                "signer": self.signer,
                "signed_at": self.signed_at,
            }
        ).encode()


class Signatures(BaseModel):
    """The content of ``manifest.json.sig``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    format: Literal["logitcask-signatures"] = "logitcask-signatures"
    signatures: tuple[Signature, ...] = Field(max_length=64)


class Signed(NamedTuple):
    """Who signed: the name that they give, their key, the time."""

    signer: str
    key: str
    at: str

    def __str__(self) -> str:
        # A stranger may have written them.
        return printable(f"{self.signer} ({self.key[:20]}...), {self.at}")


def keygen(file: Path, signer: str) -> str:
    """Makes a private key in ``file``, which only its owner may read, and the public key and the
    name in ``file``.pub. Returns the public key.

    Raises UserError if either file exists.
    """
    crypto = _cryptography()
    public = file.with_name(f"{file.name}.pub")
    for each in (file, public):
        if each.exists():
            raise UserError(f"{each} exists; a key is never replaced: choose another file")
    if not signer.isprintable() or not signer.strip() or len(signer) > 200:
        raise UserError(f"the name {signer!r} is empty, too long or not printable; give another")
    private = crypto.ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        crypto.serialization.Encoding.PEM,
        crypto.serialization.PrivateFormat.PKCS8,
        crypto.serialization.NoEncryption(),
    )
    key = _text_of(private.public_key(), crypto)
    with writing_to(file.parent):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as opened:
            opened.write(pem)
        sync(file)
        write_durably(public, f"{key} {signer}\n")
    return key


def sign(cache: str | Path, key_file: Path) -> Signed:
    """Signs the manifest of the finished cache in the folder ``cache``. Signatures by other keys
    stay; an earlier one by this key is replaced.

    Raises UserError for a file that is no private key of Ed25519, and the errors of opening a
    cache.
    """
    folder = local_folder(cache, "sign the folder, then push it")
    crypto = _cryptography()
    private, signer = _private_key(key_file, crypto)
    filesystem, root = open_filesystem(folder)
    text, _ = read_manifest(filesystem, root, str(folder))
    sha256 = hashlib.sha256(text).hexdigest()
    key = _text_of(private.public_key(), crypto)
    blank = Signature(
        key=key,
        signer=signer,
        signed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        signature=base64.b64encode(bytes(64)).decode(),
    )
    made = blank.model_copy(
        update={"signature": base64.b64encode(private.sign(blank.text(sha256))).decode()}
    )
    others = _parsed(read_signatures(filesystem, root), str(folder))
    kept = [each for each in others if each.key != key and _holds(each, sha256, crypto)]
    written = Signatures(signatures=(*kept, made))
    with writing_to(folder):
        write_durably(folder / SIGNATURE, written.model_dump_json(indent=2) + "\n")
    return Signed(signer, key, made.signed_at)


def read_signatures(filesystem: fsspec.AbstractFileSystem, root: str) -> bytes | None:
    """The bytes of the signatures of the cache in ``root``; None if it has none."""
    with reaching(filesystem.unstrip_protocol(root)):
        try:
            return read_small(filesystem, f"{root}/{SIGNATURE}", MAX_SIGNATURE_BYTES)
        except FileNotFoundError:
            return None


def claimed(cache: str) -> list[Signed]:
    """Who says to have signed the cache, unchecked. Raises DamagedCacheError for a file that is no
    list of signatures.
    """
    filesystem, root = open_filesystem(cache)
    found = _parsed(read_signatures(filesystem, root), cache)
    return [Signed(each.signer, each.key, each.signed_at) for each in found]


def check_signed(cache: str, manifest_sha256: str, trusted: Iterable[str] = ()) -> list[Signed]:
    """The valid signatures of the cache's manifest, of which sha256 is given; with ``trusted``
    keys, those by one of them.

    Raises DamagedCacheError for a signature that is not of this manifest, UserError if the cache
    has no signature, or none by a trusted key.
    """
    crypto = _cryptography()
    keys = [trusted_key(each) for each in trusted]
    filesystem, root = open_filesystem(cache)
    found = _parsed(read_signatures(filesystem, root), cache)
    if not found:
        raise UserError(
            f"{cache} is not signed; ask its makers for a signed one, sign it if you vouch for it (`teacher-cache sign`), or ask "
            "for no signature"
        )
    for each in found:
        if not _holds(each, manifest_sha256, crypto):
            raise DamagedCacheError(
                f"{cache}/{SIGNATURE}: the signature of {each.signer!r} ({each.key[:20]}...) is not of this {MANIFEST}, which was "
                "changed since, or never signed; fetch the cache again"
            )
    signed = [Signed(each.signer, each.key, each.signed_at) for each in found]
    if not keys:
        return signed
    by_trusted = [each for each in signed if each.key in keys]
    if not by_trusted:
        raise UserError(
            f"{cache} is signed by {'; '.join(map(str, signed))}, and by none of the {len(keys)} trusted keys; add the key if you "
            "trust its owner"
        )
    return by_trusted


def trusted_key(text: str) -> str:
    """A key as in a signature, from ``ed25519:...`` or a file that ``keygen`` wrote. Raises
    UserError for anything else.
    """
    if not text.startswith(_PREFIX):
        try:
            text = Path(text).expanduser().read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(
                f"the trusted key {text!r} is neither {_PREFIX}... nor a file with one: {first_line(error)}"
            ) from None
    key = text.split(maxsplit=1)[0] if text else ""
    try:
        data = base64.b64decode(key.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not key.startswith(_PREFIX) or len(data) != 32:
        raise UserError(
            f"{key[:60]!r} is no public key; expected {_PREFIX} and 32 bytes in base64, as `teacher-cache keygen` prints"
        )
    return _PREFIX + base64.b64encode(data).decode()


class _Crypto(NamedTuple):
    ed25519: Any
    serialization: Any
    invalid: type[Exception]


def _cryptography() -> _Crypto:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError(
            "signatures need the package cryptography; pip install 'logitcask[trust]'"
        ) from None
    return _Crypto(ed25519, serialization, InvalidSignature)


def _private_key(file: Path, crypto: _Crypto) -> tuple[Any, str]:
    """(private key, name of its owner) from the files of ``keygen``."""
    try:
        pem = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"the key {file} cannot be read: {error.strerror}; make one with `teacher-cache keygen {file}`"
        ) from None
    try:
        private = crypto.serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, crypto.ed25519.Ed25519PrivateKey):
        raise UserError(
            f"{file} is no private key of Ed25519 without a password; make one with `teacher-cache keygen FILE`"
        )
    public = file.with_name(f"{file.name}.pub")
    words = public.read_text("utf-8").split(maxsplit=1) if public.is_file() else []
    return private, words[1].strip() if len(words) == 2 else "unnamed"


def _text_of(public: Any, crypto: _Crypto) -> str:
    raw = public.public_bytes(
        crypto.serialization.Encoding.Raw, crypto.serialization.PublicFormat.Raw
    )
    return _PREFIX + base64.b64encode(raw).decode()


def _holds(each: Signature, manifest_sha256: str, crypto: _Crypto) -> bool:
    raw = base64.b64decode(each.key.removeprefix(_PREFIX))
    try:
        crypto.ed25519.Ed25519PublicKey.from_public_bytes(raw).verify(
            base64.b64decode(each.signature), each.text(manifest_sha256)
        )
    except (crypto.invalid, ValueError):
        return False
    return True


def _parsed(text: bytes | None, where: str) -> tuple[Signature, ...]:
    if text is None:
        return ()
    try:
        return Signatures.model_validate_json(text, strict=True).signatures
    except ValidationError as error:
        raise DamagedCacheError(
            f"{where}/{SIGNATURE} is no list of signatures ({error.errors()[0]['msg']}); fetch the cache again"
        ) from None
