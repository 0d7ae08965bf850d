"""scripts/bootstrap.py reads pip's configuration and finds pip's wheel on either kind of index page."""

from __future__ import annotations

import json

import pytest
from repository import load_script

bootstrap = load_script("scripts/bootstrap.py")

DIGEST = "a" * 64
WHEELS = ["pip-9.0.3-py2.py3-none-any.whl", "pip-25.1-py3-none-any.whl", "pip-24.3.1-py3-none-any.whl"]
NEWER = ["pip-26.0rc1-py3-none-any.whl", "pip-25.2.tar.gz"]  # a pre-release and a source archive: not to be taken


@pytest.fixture
def no_pip_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_CONFIG_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_environment_goes_before_files(no_pip_settings, monkeypatch):
    file = no_pip_settings / ".config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text("[global]\ntimeout = 5\nindex-url = https://mirror.example/simple\n")
    assert bootstrap.pip_setting("index-url") == "https://mirror.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert bootstrap.pip_setting("index-url") == "https://other.example/simple"
    assert bootstrap.uv_environment()["UV_DEFAULT_INDEX"] == "https://other.example/simple"


def test_default_without_settings(no_pip_settings):
    assert bootstrap.pip_setting("no-such-setting", "default") == "default"


@pytest.mark.parametrize("kind", ["application/vnd.pypi.simple.v1+json", "text/html"])
def test_newest_stable_wheel_is_taken(monkeypatch, kind):
    names = [*WHEELS, *NEWER]
    if kind.endswith("json"):
        files = [{"url": f"https://files.example/{name}", "hashes": {"sha256": DIGEST}} for name in names]
        files.append({"url": "https://files.example/pip-99-py3-none-any.whl", "hashes": {}, "yanked": True})
        page = json.dumps({"files": files})
        expected = "https://files.example/pip-25.1-py3-none-any.whl"
    else:
        page = "".join(f'<a href="../../files/{name}#sha256={DIGEST}">{name}</a>' for name in names)
        expected = "https://index.example/files/pip-25.1-py3-none-any.whl"
    asked = []
    monkeypatch.setattr(bootstrap, "fetch", lambda url, accept=None: (asked.append(url), (page.encode(), kind))[1])
    assert bootstrap.newest_pip_wheel("https://index.example/simple/") == (expected, DIGEST)
    assert asked == ["https://index.example/simple/pip/"]


def test_wheel_with_another_digest_is_refused(monkeypatch):
    monkeypatch.setattr(bootstrap, "newest_pip_wheel", lambda index_url: ("https://x.example/pip.whl", DIGEST))
    monkeypatch.setattr(bootstrap, "fetch", lambda url, accept=None: (b"not pip", "application/zip"))
    with pytest.raises(SystemExit, match="does not have the digest that the index promises"):
        bootstrap.install_pip("/nonexistent/python")
