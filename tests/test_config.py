"""The configuration file: NATS's words in NATS's spellings, and an error with a place for everything else."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import traceback
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs_js import config
from encfs_js.errors import ConfigError, KeyMissingError
from encfs_js.format import Suite

EXAMPLE = Path(__file__).parent.parent / "examples" / "encfs-js.yaml"
SECRET = "s3cret-4711"
TPM = "keys_file: /k, encryption_password: p"


@pytest.fixture
def load(tmp_path):
    """Load a text as the operator's file, with some environment."""

    def load(text: str | bytes, mode: int = 0o600, **environ: str) -> config.Config:
        path = tmp_path / "encfs-js.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return config.load(str(path), environ=environ)

    return load


def everything_about(error: BaseException) -> str:
    """All that an error handler, a log or a debugger without frames could show of an error."""
    found, here = "", [error]
    while here:
        e = here.pop()
        found += "".join(traceback.format_exception(e)) + repr(e) + repr(e.args) + repr(vars(e))
        here += [c for c in (e.__context__, e.__cause__) if c is not None]
    return found


# --- the example is the reference -----------------------------------------------------------------------------------


def fields(struct: type[msgspec.Struct]) -> dict[str, object]:
    return {field.name: field for field in msgspec.structs.fields(struct)}


def test_the_example_is_a_configuration():
    found = config.load(str(EXAMPLE), environ={"JS_KEY": SECRET})
    assert found.jetstream.key == SECRET
    assert found.jetstream.cipher is Suite.AES
    for name in fields(config.Config):
        assert getattr(found, name) is not None, f"{name} is not set in the example"


def test_the_example_explains_every_name():
    """Every name has its own line, in its block, with a comment right above it."""
    lines = EXAMPLE.read_text().splitlines()
    for struct, indent in ((config.Config, ""), (config.JetStream, "  ")):
        for name in fields(struct):
            places = [n for n, line in enumerate(lines) if re.match(rf"{indent}(# )?{name}:", line)]
            assert len(places) == 1, name
            assert lines[places[0] - 1].strip().startswith("# "), f"{name} has no comment"
    for alias in ("store", "storedir", "ek", "encryption_key", "chacha"):
        assert re.search(rf"\b{alias}\b", EXAMPLE.read_text()), alias


def test_the_tpm_block_of_the_example_is_complete(load):
    text = EXAMPLE.read_text()
    block = re.search(r"^  # tpm:\n(  #   .*\n)+", text, re.MULTILINE)[0]
    live = re.sub(r"^  # ", "  ", block, flags=re.MULTILINE)
    assert set(yaml.safe_load(live)["tpm"]) == set(fields(config.Tpm))
    found = load(text.replace(block, live).replace("  key: $JS_KEY\n", ""), TPM_PASSWORD="a", SRK_PASSWORD="b")
    assert (found.jetstream.tpm.encryption_password, found.jetstream.tpm.srk_password) == ("a", "b")
    assert found.jetstream.tpm.pcr == 22
    for name in fields(config.Tpm):
        assert getattr(found.jetstream.tpm, name) is not None
        assert re.search(rf"\b{name}\b", text.replace(block, "")), f"{name} is not explained"


# --- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "jetstream: {}\n", "---\n"])
def test_a_file_may_say_nothing(load, text):
    found = load(text)
    assert found == config.Config()
    assert found.writeback == "auto"
    assert found.read_only is False
    assert (found.jetstream.store_dir, found.jetstream.key, found.jetstream.cipher) == (None, None, None)


@pytest.mark.parametrize("name", ["store_dir", "store", "storedir", "Store_Dir", "STOREDIR"])
def test_spellings_of_the_store(load, name):
    assert load(f"JetStream: {{{name}: /data}}").jetstream.store_dir == "/data"


@pytest.mark.parametrize("name", ["key", "ek", "encryption_key", "KEY", "Encryption_Key"])
def test_spellings_of_the_key(load, name):
    assert load(f"jetstream: {{{name}: abc}}").jetstream.key == "abc"


@pytest.mark.parametrize("name", ["prev_key", "prev_ek", "prev_encryption_key", "Prev_Key"])
def test_spellings_of_the_key_before(load, name):
    found = load(f"jetstream: {{key: abc, {name}: $OLD}}", OLD="what it was").jetstream
    assert (found.key, found.prev_key) == ("abc", "what it was")
    assert "what it was" not in repr(found)
    with pytest.raises(KeyMissingError, match=r"\$\.jetstream\.prev_key: is empty"):
        load(f"jetstream: {{{name}: ''}}")
    with pytest.raises(ConfigError, match=r"\$\.jetstream\.prev_key: must be text|reads it as something else"):
        load(f"jetstream: {{{name}: 12}}")


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("chacha", Suite.CHACHAPOLY),
        ("chachapoly", Suite.CHACHAPOLY),
        ("ChaChaPoly", Suite.CHACHAPOLY),
        ("aes", Suite.AES),
        ("AES", Suite.AES),
    ],
)
def test_spellings_of_the_cipher(load, name, suite):
    assert load(f"jetstream: {{cipher: {name}}}").jetstream.cipher is suite


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("auto", "auto"), ("on", True)])
def test_writeback(load, text, value):
    found = load(f"writeback: {text}").writeback
    assert (found, type(found)) == (value, type(value))


def test_a_configuration_cannot_be_changed(load):
    found = load("mountpoint: /m")
    with pytest.raises(AttributeError):
        found.mountpoint = "/x"
    with pytest.raises(AttributeError):
        found.jetstream.key = "x"
    assert not dataclasses.is_dataclass(found)


# --- the key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["abc", "1e5", "6dYfz+/=", "a#b", "$2a$11$abc", "$", "$$JS_KEY", "$JS-KEY", "x$JS_KEY", "$1A", "${JS_KEY}"]
)
def test_a_literal_key_stays_as_it_is(load, key):
    assert load(f"jetstream: {{key: '{key}'}}", JS_KEY="no").jetstream.key == key


@pytest.mark.parametrize("text", ["$MY_KEY", '"$MY_KEY"', "'$MY_KEY'"])
def test_a_key_from_a_variable_is_taken_out_of_the_environment(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"jetstream:\n  key: {text}\n")
    environ = {"MY_KEY": "123456", "OTHER": "x"}
    assert config.load(str(path), environ=environ).jetstream.key == "123456"
    assert environ == {"OTHER": "x"}


def test_a_variable_that_is_not_set(load):
    with pytest.raises(ConfigError, match=r"\$\.jetstream\.key: the environment variable MY_KEY is not set") as caught:
        load("jetstream: {key: $MY_KEY}")
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", '""', "''", "~", "null", "$EMPTY"])
def test_a_key_that_is_set_but_empty(load, text):
    with pytest.raises(KeyMissingError, match=r"\$\.jetstream\.key.* is empty") as caught:
        load(f"jetstream:\n  key: {text}\n", EMPTY="")
    assert "nats-server silently turns encryption off" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["12345678", "0x10", "1_000", "12:30:45", "1.5", "true", "no", "on", "2026-01-02", "[a]", "{a: b}", ".inf"]
)
def test_a_key_that_yaml_does_not_read_as_text(load, text):
    with pytest.raises(ConfigError, match=r"\$\.jetstream\.key") as caught:
        load(f"jetstream:\n  key: {text}\n")
    assert "quotes" in caught.value.hint
    assert text not in everything_about(caught.value).replace("encfs-js.yaml", "") or text in ("no", "on", "true")
    if text[0] not in "[{":
        assert load(f"jetstream:\n  key: '{text}'\n").jetstream.key == text


# --- the TPM --------------------------------------------------------------------------------------------------------


def tpm_of(load, text: str, **environ: str) -> config.Tpm:
    return load(f"jetstream: {{tpm: {{keys_file: /k, {text}}}}}", **environ).jetstream.tpm


def test_the_tpm_block_has_natss_defaults(load):
    found = tpm_of(load, "encryption_password: p")
    assert found == config.Tpm(keys_file="/k", encryption_password="p", srk_password="", pcr=22, cipher=None, tcti=None)
    for pcr in range(17, 24):
        assert tpm_of(load, f"encryption_password: p, pcr: {pcr}").pcr == pcr
    assert tpm_of(load, "encryption_password: p, TCTI: 'swtpm:port=5'").tcti == "swtpm:port=5"
    assert tpm_of(load, "encryption_password: ''").encryption_password == "", "it is meant so"


def test_passwords_from_variables_are_taken_out_of_the_environment(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("jetstream: {tpm: {keys_file: /k, encryption_password: $ONE, srk_password: '$TWO'}}\n")
    environ = {"ONE": "1234", "TWO": "two", "OTHER": "x"}
    found = config.load(str(path), environ=environ).jetstream.tpm
    assert (found.encryption_password, found.srk_password) == ("1234", "two")
    assert environ == {"OTHER": "x"}


@pytest.mark.parametrize("name", ["encryption_password", "srk_password"])
def test_a_password_from_a_variable_that_is_missing_or_empty(load, name):
    text = f"{name}: $MINE" + (", encryption_password: p" if name == "srk_password" else "")
    with pytest.raises(ConfigError, match=rf"\.tpm\.{name}: the environment variable MINE is not set"):
        tpm_of(load, text)
    with pytest.raises(KeyMissingError, match=rf"\.tpm\.{name}: the environment variable MINE is empty"):
        tpm_of(load, text, MINE="")


@pytest.mark.parametrize("name", ["encryption_password", "srk_password"])
def test_a_password_without_a_value(load, name):
    with pytest.raises(ConfigError, match=rf"\.tpm\.{name}: has no value"):
        tpm_of(load, f"{name}: ")


@pytest.mark.parametrize(
    ("outer", "inner", "suite"),
    [
        ("", "", None),
        ("aes", "", Suite.AES),
        ("", "aes", Suite.AES),
        ("AES", "aes", Suite.AES),
        ("chacha", "ChaChaPoly", Suite.CHACHAPOLY),
    ],
)
def test_a_cipher_in_either_block(load, outer, inner, suite):
    outer, inner = f"cipher: {outer}, " if outer else "", f", cipher: {inner}" if inner else ""
    found = load(f"jetstream: {{{outer}tpm: {{{TPM}{inner}}}}}").jetstream
    assert found.cipher is suite


def test_who_needs_no_key_gets_no_password(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("jetstream: {tpm: {keys_file: /k, encryption_password: $ONE, srk_password: s3cret, cipher: aes}}\n")
    found = config.load(str(path), environ={}, with_key=False).jetstream
    assert found.tpm == config.Tpm(keys_file="/k", encryption_password="", cipher=Suite.AES)
    assert found.cipher is Suite.AES


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = [
    # (text, the message, a word of the hint)
    ("jetstream: {chiper: aes}", r"$.jetstream.chiper: unknown", "Did you mean cipher?"),
    ("jetstream: {Cypher: aes}", r"$.jetstream.Cypher: unknown", "Did you mean cipher?"),
    ("jetstream: {encryptionkey: x}", r"$.jetstream.encryptionkey: unknown", "Did you mean encryption_key?"),
    ("mount_point: /m", r"$.mount_point: unknown", "Did you mean mountpoint?"),
    ("zzz: 1", r"$.zzz: unknown", "Known here: allow_other, jetstream, log_file"),
    ("store_dir: /s", r"$.store_dir: unknown", "$.jetstream.store_dir"),
    ("jetstream: {mountpoint: /m}", r"$.jetstream.mountpoint: unknown", "$.mountpoint"),
    ("jetstream: {domain: hub}", r"$.jetstream.domain: unknown", "Known here"),
    ("jetstream: {tpm: {key_file: /k}}", r"$.jetstream.tpm.key_file: unknown", "Did you mean keys_file?"),
    ("1: x", r"$: a name that is no text", ""),
    ("yes: x", r"$: a name that is no text", ""),
    ("jetstream: {~: x}", r"$.jetstream: a name that is no text", ""),
    ("[a]", r"$: must be a block", ""),
    ("text", r"$: must be a block", ""),
    ("jetstream: true", r"$.jetstream: must be a block", ""),
    ("jetstream: enabled", r"$.jetstream: must be a block", ""),
    ("jetstream:", r"$.jetstream: has no value", ""),
    ("jetstream: {tpm: true}", r"$.jetstream.tpm: must be a block", ""),
    ("mountpoint:", r"$.mountpoint: has no value", ""),
    ("jetstream: {store_dir: }", r"$.jetstream.store_dir: has no value", ""),
    ("mountpoint: ''", r"$.mountpoint: must be a path", ""),
    ('mountpoint: "a\\0b"', r"$.mountpoint: must be a path", ""),
    ("mountpoint: 5", r"$.mountpoint: must be a path", ""),
    ("mountpoint: [/m]", r"$.mountpoint: must be a path", ""),
    ("log_file: true", r"$.log_file: must be a path", ""),
    ("jetstream: {store_dir: 1}", r"$.jetstream.store_dir: must be a path", ""),
    ("writeback: maybe", r"$.writeback: must be true, false or auto", ""),
    ("writeback: 1", r"$.writeback: must be true, false or auto", ""),
    ("allow_other: 'true'", r"$.allow_other: must be true or false", ""),
    ("read_only: 0", r"$.read_only: must be true or false", ""),
    ("plaintext: allow", r"$.plaintext: must be refuse or read", ""),
    ("plaintext: Read", r"$.plaintext: must be refuse or read", ""),
    ("jetstream: {cipher: aes-gcm}", r"$.jetstream.cipher: must be chacha, chachapoly or aes", ""),
    ("jetstream: {cipher: ''}", r"$.jetstream.cipher: must be chacha, chachapoly or aes", ""),
    ("jetstream: {cipher: 2}", r"$.jetstream.cipher: must be chacha, chachapoly or aes", ""),
    ("jetstream: {cipher: [aes]}", r"$.jetstream.cipher: must be chacha, chachapoly or aes", ""),
    ("jetstream: {store: /a, store_dir: /b}", r"$.jetstream.store_dir: is given already, as store", ""),
    ("jetstream: {key: a, EK: b}", r"$.jetstream.EK: is given already, as key", ""),
    ("jetstream: {}\nJetStream: {}", r"$.JetStream: is given already, as jetstream", ""),
    ("mountpoint: /a\nmountpoint: /b", r"line 2, column 1: not valid YAML: the same name twice", ""),
    ("jetstream:\n  key: a\n  cipher: aes\n  key: b", r"line 4, column 3: not valid YAML: the same name twice", ""),
    (f"jetstream: {{tpm: {{{TPM}}}, key: x}}", r"$.jetstream: key and tpm exclude each other", ""),
    (f"jetstream: {{tpm: {{{TPM}}}, ek: ''}}", r"$.jetstream: key and tpm exclude each other", ""),
    (f"jetstream: {{tpm: {{{TPM}, pcr: '17'}}}}", r"$.jetstream.tpm.pcr: must be a number from 17 to 23", ""),
    (f"jetstream: {{tpm: {{{TPM}, pcr: true}}}}", r"$.jetstream.tpm.pcr: must be a number from 17 to 23", ""),
    (f"jetstream: {{tpm: {{{TPM}, pcr: 0}}}}", r"$.jetstream.tpm.pcr: must be a number from 17 to 23", ""),
    (f"jetstream: {{tpm: {{{TPM}, pcr: 16}}}}", r"$.jetstream.tpm.pcr: must be a number from 17 to 23", ""),
    (f"jetstream: {{tpm: {{{TPM}, pcr: 24}}}}", r"$.jetstream.tpm.pcr: must be a number from 17 to 23", ""),
    (f"jetstream: {{tpm: {{{TPM}, tcti: ''}}}}", r"$.jetstream.tpm.tcti: must be text", ""),
    (f"jetstream: {{tpm: {{{TPM}, tcti: 1}}}}", r"$.jetstream.tpm.tcti: must be text", ""),
    (
        f"jetstream: {{cipher: aes, tpm: {{{TPM}, cipher: chacha}}}}",
        r"$.jetstream.cipher and $.jetstream.tpm.cipher",
        "",
    ),
    (f"jetstream: {{tpm: {{{TPM}, cipher: des}}}}", r"$.jetstream.tpm.cipher: must be chacha", ""),
    (
        f"jetstream: {{tpm: {{{TPM}, srk_password: 1}}}}",
        r"$.jetstream.tpm.srk_password: YAML reads it",
        'srk_password: "..."',
    ),
    ("jetstream: {tpm: {keys_file: /k, encryption_password: 1}}", r"$.jetstream.tpm.encryption_password: YAML", ""),
    ("jetstream: {tpm: {keys_file: /k}}", r"$.jetstream.tpm.encryption_password: is missing", ""),
    ("jetstream: {tpm: {encryption_password: p}}", r"$.jetstream.tpm.keys_file: is missing", ""),
    ("--- {}\n--- {}", "not valid YAML", ""),
    ("mountpoint: *m", "line 1, column 13: not valid YAML", "quotes"),
    ("mountpoint: !!python/object/apply:os.getcwd []", "line 1, column 13: not valid YAML", ""),
    ("a: b: c", "line 1, column 5: not valid YAML: mapping values are not allowed here", ""),
    ("mountpoint: 2026-13-45", "not valid YAML", ""),
    ("? [a]\n: b", "line 1, column 3: not valid YAML", ""),
    ("a: &a {b: *a}", r"$.a: unknown", ""),
    ("mountpoint: &a {b: *a}", r"$.mountpoint: must be a path", ""),
    ("[" * 900, "not valid YAML", ""),
    ("[" * 2000, "more than 1000 brackets", ""),
    ("a: \0", "not valid YAML", ""),
    (b"mountpoint: \xff", "not UTF-8 text", ""),
    (b"#" * ((1 << 20) + 1), "longer than 1048576 bytes", ""),
]


@pytest.mark.parametrize(("text", "message", "hint"), REFUSED, ids=[str(text)[:40] for text, _, _ in REFUSED])
def test_refused(load, tmp_path, text, message, hint):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/encfs-js.yaml: ")
    assert hint in caught.value.hint
    assert caught.value.hint


def test_every_value_has_an_error_of_its_own():
    """A value of a wrong type in any place is refused at that place."""
    for path in config._EXPECTED:
        *blocks, name = path.split(".")[1:]
        value: dict = {name: {"wrong": 1}} if name != "key" else {name: 5}
        for block in reversed(blocks):
            required = {"keys_file": "/k", "encryption_password": "p"} if block == "tpm" else {}
            value = {block: required | value}
        with pytest.raises(ConfigError, match=re.escape(path)):
            config._parse(yaml.safe_dump(value).encode(), {})
    known = {f"$.{n}" for n in fields(config.Config)} - {"$.jetstream"}
    known |= {f"$.jetstream.{n}" for n in fields(config.JetStream)} - {"$.jetstream.tpm", "$.jetstream.cipher"}
    known |= {f"$.jetstream.tpm.{n}" for n in fields(config.Tpm)} - {"$.jetstream.tpm.cipher"}
    assert set(config._EXPECTED) == known


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["jetstream", "store_dir", "cipher", "key", "tpm", "pcr", "mountpoint", "writeback", "read_only", "plaintext"]
)
TREES = st.recursive(VALUES, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)


@settings(max_examples=200, deadline=None, database=None)
@given(TREES.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode()) | st.binary(max_size=60))
def test_any_file_is_a_configuration_or_an_error_for_people(text):
    try:
        found, _ = config._parse(text, {})
    except (ConfigError, KeyMissingError):
        return
    assert isinstance(found, config.Config)


@pytest.mark.parametrize(("name", "says"), [("missing", "No such file"), (".", "directory"), ("a\0b", "not a path")])
def test_a_file_that_cannot_be_read(tmp_path, name, says):
    with pytest.raises(ConfigError, match=says) as caught:
        config.load(os.path.join(tmp_path, name), environ={})
    assert name in str(caught.value)
    assert caught.value.hint


# --- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"jetstream: {{key: *{SECRET}}}",
        f"jetstream: {{key: !{SECRET} }}",
        f"jetstream: {{key: '{SECRET}}}",
        f'jetstream: {{key: "{SECRET}\\q"}}',
        f"jetstream:\n  key: {SECRET}: x\n",
        f"jetstream:\n  key: @{SECRET}\n",
        f"jetstream:\n  key: %{SECRET}\n",
        f"jetstream:\n  key:{SECRET}\n",
        f"jetstream:\n  key: a\n  cipher: {SECRET}\n",
        f"plaintext: {SECRET}",
        f"writeback: {SECRET}",
        f"mountpoint: [{SECRET}]",
        f"jetstream: {{tpm: {{keys_file: /k, encryption_password: {SECRET}, pcr: x}}}}",
        f"jetstream: {{tpm: {{keys_file: /k, encryption_password: p, srk_password: {SECRET}, pcr: 1}}}}",
        f"jetstream: {{key: {SECRET}, key: {SECRET}}}",
        f"jetstream: {{key: {SECRET}, nothing: 1}}",
        f"{SECRET}\n- x",
        f"jetstream: {{key: {SECRET}\xff".encode("latin-1"),
        f"jetstream: {{key: {SECRET}\0}}",
    ],
)
def test_no_error_shows_a_value(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert SECRET not in everything_about(caught.value)


def test_a_configuration_shows_no_secret(load):
    found = load(f"jetstream: {{key: {SECRET}, store_dir: /s}}\nmountpoint: /m")
    shown = f"{found} {found!r} {found.jetstream} {[found.jetstream]}"
    assert SECRET not in shown
    assert "/s" in shown
    tpm = config._parse(f"jetstream: {{tpm: {{keys_file: /k, encryption_password: {SECRET}}}}}".encode(), {})[0]
    assert tpm.jetstream.tpm.encryption_password == SECRET
    assert SECRET not in f"{tpm} {tpm!r} {tpm.jetstream.tpm}"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604, 0o644, 0o400])
@pytest.mark.parametrize(
    "text",
    [
        f"jetstream: {{key: {SECRET}}}",
        "jetstream: {key: $VAR}",
        "mountpoint: /m",
        f"jetstream: {{tpm: {{keys_file: /k, encryption_password: {SECRET}}}}}",
        f"jetstream: {{tpm: {{keys_file: /k, encryption_password: $VAR, srk_password: {SECRET}}}}}",
        "jetstream: {tpm: {keys_file: /k, encryption_password: $VAR}}",
        "jetstream: {tpm: {keys_file: /k, encryption_password: ''}}",
    ],
)
def test_a_file_with_a_key_that_others_can_read_is_warned_of(load, tmp_path, caplog, mode, text):
    load(text, mode, VAR=SECRET)
    if SECRET in text and mode & 0o044:
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert f"chmod 600 {tmp_path}/encfs-js.yaml" in record.getMessage()
    else:
        assert not caplog.records
    assert SECRET not in caplog.text


def test_the_environment_of_the_process_is_the_default(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("jetstream: {key: $ENCFS_JS_TEST_KEY}\n")
    os.environ["ENCFS_JS_TEST_KEY"] = SECRET
    try:
        assert config.load(str(path)).jetstream.key == SECRET
        assert "ENCFS_JS_TEST_KEY" not in os.environ
    finally:
        os.environ.pop("ENCFS_JS_TEST_KEY", None)
