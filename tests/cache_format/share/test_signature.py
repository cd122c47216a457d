"""Signatures: who signed, what breaks one, keys, and the copies, students and builds that ask."""

from __future__ import annotations

import base64
import json
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from logitcask.cache_format import CacheReader, DamagedCacheError, UserError
from logitcask.cache_format.errors import LogitcaskError
from logitcask.cache_format.layout import SIGNATURE
from logitcask.cache_format.share import copy, signature
from logitcask.cache_format.storage.files import open_filesystem
from logitcask.cache_format.writer import CacheWriter, remove_cache
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import app
from logitcask.pipeline.config import BuildConfig
from logitcask.train.config import TrainConfig
from logitcask.train.identity import open_caches
from tests.cache_format.conftest import make_header, make_sequence


def run(*arguments):
    app([str(each) for each in arguments], standalone_mode=False)


@pytest.fixture
def cache(rng, tmp_path):
    folder = tmp_path / "cache"
    with CacheWriter(folder) as writer:
        header = writer.begin(make_header())
        with writer.shard(0) as shard:
            for n in range(3):
                shard.append(make_sequence(rng, f"s{n}"))
        writer.finish(header, 1)
    return folder


@pytest.fixture
def key(tmp_path):
    return signature.keygen(tmp_path / "me", "Ada")


def checked(folder, *trusted):
    reader = CacheReader(str(folder))
    return signature.check_signed(str(folder), reader.manifest_sha256, trusted)


def test_keys(tmp_path, key):
    private, public = tmp_path / "me", tmp_path / "me.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.read_text() == f"{key} Ada\n"
    assert signature.trusted_key(key) == signature.trusted_key(str(public)) == key
    with pytest.raises(UserError, match="exists; a key is never replaced"):
        signature.keygen(private, "Ada")
    with pytest.raises(UserError, match="the name '' is empty"):
        signature.keygen(tmp_path / "other", "")
    for wrong in ("ed25519:abc", str(private), "nothing.pub"):
        with pytest.raises(UserError, match=r"is no public key|is neither ed25519:"):
            signature.trusted_key(wrong)


def test_a_signature_by_hand(cache, tmp_path, key):
    """The document says what its docstring says; checked with the library alone."""
    signature.sign(cache, tmp_path / "me")
    (found,) = json.loads((cache / SIGNATURE).read_text())["signatures"]
    text = json.dumps(
        {
            "manifest_sha256": CacheReader(str(cache)).manifest_sha256,
            "purpose": "logitcask manifest signature 1",
            "signed_at": found["signed_at"],
            "signer": "Ada",
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    raw = base64.b64decode(key.removeprefix("ed25519:"))
    public = Ed25519PublicKey.from_public_bytes(raw)
    public.verify(base64.b64decode(found["signature"]), text.encode())


def test_who_signed(cache, tmp_path, key):
    with pytest.raises(UserError, match="is not signed"):
        checked(cache)
    signature.sign(cache, tmp_path / "me")
    assert [(each.signer, each.key) for each in checked(cache)] == [("Ada", key)]
    assert checked(cache, key) == checked(cache)
    other = signature.keygen(tmp_path / "other", "Bob")
    with pytest.raises(UserError, match=r"is signed by Ada .*, and by none of the 1 trusted keys"):
        checked(cache, other)
    signature.sign(cache, tmp_path / "other")
    assert [each.signer for each in checked(cache)] == ["Ada", "Bob"]
    assert [each.signer for each in checked(cache, other)] == ["Bob"]
    signature.sign(cache, tmp_path / "me")
    assert [each.signer for each in checked(cache)] == ["Bob", "Ada"]


def test_any_change_breaks_it(cache, tmp_path, key, rng):
    signature.sign(cache, tmp_path / "me")
    manifest, signed = cache / "manifest.json", cache / SIGNATURE
    whole, signatures = manifest.read_bytes(), signed.read_bytes()
    manifest.write_bytes(whole + b" ")
    with pytest.raises(DamagedCacheError, match=r"the signature of 'Ada' .* is not of this"):
        checked(cache)
    manifest.write_bytes(whole)
    document = json.loads(signatures)
    for field, value in (("signer", "Eve"), ("signed_at", "2020-01-01T00:00:00+00:00")):
        changed = {**document["signatures"][0], field: value}
        signed.write_text(json.dumps({**document, "signatures": [changed]}))
        with pytest.raises(DamagedCacheError, match="is not of this"):
            checked(cache)
    wrong = ["", "{}", "[]", "{", signatures.decode().replace("ed25519:", "rsa:"), "x" * 70_000]
    for text in wrong:
        signed.write_text(text)
        with pytest.raises(LogitcaskError) as error:
            checked(cache)
        assert "\n" not in str(error.value)
    data = bytearray(signatures)
    for at in rng.integers(0, len(data), 60):
        broken = data.copy()
        broken[at] ^= 1
        signed.write_bytes(broken)
        try:
            found = checked(cache)
        except LogitcaskError:
            continue
        # Bits of white space and of names that nobody knows change nothing.
        assert [(each.signer, each.key) for each in found] == [("Ada", key)]


def test_the_commands(cache, tmp_path, capsys):
    run("keygen", tmp_path / "k", "--name", "Ada L.")
    key = capsys.readouterr().out.strip()
    with pytest.raises(UserError, match="is not signed"):
        run("verify", cache, "--signed")
    run("sign", cache, "--key", tmp_path / "k")
    assert capsys.readouterr().out.startswith(f"{cache}: signed by Ada L. (ed25519:")
    run("info", cache)
    assert "signed by       Ada L. (ed25519:" in capsys.readouterr().out
    run("verify", cache, "--trusted-key", key)
    assert "all as the manifest says; signed by Ada L." in capsys.readouterr().out
    run("verify", cache, "--signed", "--json")
    assert json.loads(capsys.readouterr().out)["signed_by"][0].startswith("Ada L.")
    for wrong in (tmp_path / "nothing", tmp_path / "k.pub", cache / "manifest.json"):
        with pytest.raises(UserError, match=r"cannot be read|is no private key"):
            run("sign", cache, "--key", wrong)
    with pytest.raises(UserError, match="is a URL, but has to be a local folder"):
        run("sign", "s3://bucket/cache", "--key", tmp_path / "k")


@pytest.mark.parametrize("place", ["folder", "store"])
def test_copies_carry_it(place, cache, tmp_path, key, rng):
    there = str(tmp_path / "copy") if place == "folder" else "memory://signed/cache"
    copy.push(cache, there)
    signature.sign(cache, tmp_path / "me")
    assert not copy.push(cache, there).unchanged
    assert checked(there, key)
    assert copy.push(cache, there).unchanged
    copy.pull(there, tmp_path / "back")
    assert checked(tmp_path / "back", key)
    # A signature at the place outlives a push of the same cache without one.
    (cache / SIGNATURE).unlink()
    assert copy.push(cache, there).unchanged
    assert checked(there, key)
    # Another cache in its place is not signed by it.
    other = tmp_path / "other"
    with CacheWriter(other) as writer:
        header = writer.begin(make_header())
        with writer.shard(0) as shard:
            shard.append(make_sequence(rng, "another"))
        writer.finish(header, 1)
    copy.push(other, there, force=True)
    with pytest.raises(UserError, match="is not signed"):
        checked(there)


def test_a_removed_cache_leaves_no_signature(cache, tmp_path, key):
    signature.sign(cache, tmp_path / "me")
    remove_cache(cache)
    assert not (cache / SIGNATURE).exists()


def test_students_ask(cache, tmp_path, key):
    config = {"cache": str(cache), "student": {"model": "m"}, "training": {"output_dir": "o"}}
    open_caches(TrainConfig(**config))
    with pytest.raises(UserError, match="is not signed"):
        open_caches(TrainConfig(**config, trusted_keys=[key]))
    signature.sign(cache, tmp_path / "me")
    open_caches(TrainConfig(**config, trusted_keys=[str(tmp_path / "me.pub")]))


def test_builds_that_reuse_ask(tmp_path, key):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    config = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": str(tmp_path / "rows.jsonl")},
        audit={"sequences": 0},
        output=tmp_path / "built",
    )
    build(config)
    asking = config.model_copy(update={"trusted_keys": (key,)})
    with pytest.raises(UserError, match="is not signed"):
        build(asking)
    signature.sign(tmp_path / "built", tmp_path / "me")
    before = (tmp_path / "built" / "manifest.json").read_bytes()
    build(asking)
    assert (tmp_path / "built" / "manifest.json").read_bytes() == before


def test_without_the_package(cache, tmp_path, key, monkeypatch):
    signature.sign(cache, tmp_path / "me")
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    with pytest.raises(UserError, match=r"pip install 'logitcask\[trust\]'"):
        checked(cache)
    assert [each.signer for each in signature.claimed(str(cache))] == ["Ada"]


def test_names_of_strangers_are_printable(cache, tmp_path, key, capsys):
    """A file with the signature of anybody, whose name would write over the terminal."""
    signature.sign(cache, tmp_path / "me")
    file = cache / SIGNATURE
    document = json.loads(file.read_text())
    document["signatures"][0]["signer"] = "Ada\x1b[2J\nsigned by: everybody"
    file.write_text(json.dumps(document))
    run("info", cache)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    (line,) = [each for each in shown.splitlines() if each.startswith("signed by")]
    assert r"Ada\x1b[2J\nsigned by: everybody" in line


def test_an_edited_card_stays_when_a_signature_comes(cache, tmp_path, key):
    for url in (f"memory://{tmp_path}/copy", str(tmp_path / "copy")):
        copy.push(cache, url)
        filesystem, root = open_filesystem(url)
        filesystem.pipe_file(f"{root}/README.md", b"my words")
        signature.sign(cache, tmp_path / "me")
        copy.push(cache, url)
        assert filesystem.cat_file(f"{root}/README.md") == b"my words"
        assert checked(url, key)
        copy.push(cache, url, force=True, beside={"README.md": b"new"})
        assert filesystem.cat_file(f"{root}/README.md") == b"new"
