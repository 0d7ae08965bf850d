"""Makes a virtual environment with everything that building and testing need, from a bare python3 and a package index.

    python3 scripts/bootstrap.py VENV [--editable EXTRAS] [requirement ...]

--editable also builds and installs this package in place, with the extras named (after the requirements, which its
build needs).

- Works where Debian's python3 has no pip, no venv package and no ensurepip: pip's own wheel is fetched from the index.
- Installs with uv (fast) and, should that fail, with pip. Both take the index that pip is configured for.
- Asks apt for GoogleTest and Python.h if they are missing and it may; without them CMake fetches GoogleTest, and the
  introspection module is left out.

Standard library only, and syntax of old Pythons, so that an old python3 gets a sentence, not a SyntaxError.
"""

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import urllib.parse
import urllib.request

BUILD_REQUIREMENTS = ["setuptools>=77", "wheel", "cmake>=3.24", "ninja", "pybind11>=2.13"]


def say(text):
    print("bootstrap: " + text, flush=True)


def pip_setting(name, default=None):
    """pip's own setting: the environment first, then pip's configuration files."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value:
        return value
    home = os.path.expanduser("~")
    files = [
        os.environ.get("PIP_CONFIG_FILE", ""),
        os.path.join(os.environ.get("XDG_CONFIG_HOME", os.path.join(home, ".config")), "pip", "pip.conf"),
        os.path.join(home, ".pip", "pip.conf"),
        "/etc/pip.conf",
    ]
    for path in files:
        if not path or not os.path.isfile(path):
            continue
        with open(path) as file:
            for line in file:
                match = re.match(r"\s*" + re.escape(name) + r"\s*[=:]\s*(\S+)", line)
                if match:
                    return match.group(1)
    return default


def fetch(url, accept=None):
    headers = {"User-Agent": "marlin-qqq-bootstrap"}
    if accept:
        headers["Accept"] = accept
    context = ssl.create_default_context(cafile=pip_setting("cert"))
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=120, context=context) as response:
        return response.read(), response.headers.get_content_type()


def newest_pip_wheel(index_url):
    """(address, sha256 or None) of pip's newest stable wheel that runs here, by the index's JSON or HTML page."""
    page_url = index_url.rstrip("/") + "/pip/"
    page, kind = fetch(page_url, "application/vnd.pypi.simple.v1+json, text/html;q=0.5")
    links = []
    if kind.endswith("json"):
        for entry in json.loads(page.decode())["files"]:
            if not entry.get("yanked"):
                links.append((entry["url"], entry.get("hashes", {}).get("sha256")))
    else:
        for href in re.findall(r'href="([^"]+)"', page.decode()):
            href = href.replace("&amp;", "&")
            digest = re.search(r"#sha256=([0-9a-f]{64})", href)
            links.append((href.split("#")[0], digest.group(1) if digest else None))
    wheels = []
    for url, digest in links:
        match = re.search(r"/pip-(\d+(?:\.\d+)*)-py3-none-any\.whl$", urllib.parse.urlparse(url).path)
        if match:
            wheels.append((tuple(int(part) for part in match.group(1).split(".")), url, digest))
    if not wheels:
        raise SystemExit("bootstrap: {} lists no wheel of pip".format(page_url))
    _, url, digest = max(wheels)
    return urllib.parse.urljoin(page_url, url), digest


def install_pip(python):
    index_url = pip_setting("index-url", "https://pypi.org/simple")
    say("fetching pip")
    url, digest = newest_pip_wheel(index_url)
    content, _ = fetch(url)
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise SystemExit("bootstrap: {} does not have the digest that the index promises".format(url))
    with tempfile.TemporaryDirectory() as folder:
        wheel = os.path.join(folder, url.split("/")[-1].split("?")[0])
        with open(wheel, "wb") as file:
            file.write(content)
        # A wheel is a zip that Python can run from.
        subprocess.check_call([python, wheel + "/pip", "install", "--quiet", "--no-index", wheel])


def make_environment(venv):
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        say("making {} with Python {}".format(venv, sys.version.split()[0]))
        subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", venv])
    if subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL) != 0:
        install_pip(python)
    return python


def uv_environment():
    """uv's settings in pip's words."""
    environment = dict(os.environ)
    for name, variable in (
        ("index-url", "UV_DEFAULT_INDEX"),
        ("extra-index-url", "UV_INDEX"),
        ("cert", "SSL_CERT_FILE"),
    ):
        value = pip_setting(name)
        if value and variable not in environment:
            environment[variable] = value
    environment.setdefault("UV_HTTP_TIMEOUT", "180")
    return environment


def install(python, arguments):
    folder = os.path.dirname(python)
    # The environment's programs (cmake, ninja) come first for packages that are built.
    path = folder + os.pathsep + os.environ.get("PATH", "")
    if not os.path.exists(os.path.join(folder, "uv")):
        subprocess.call([python, "-m", "pip", "install", "--quiet", "uv"])
    uv = os.path.join(folder, "uv")
    if os.path.exists(uv):
        environment = uv_environment()
        environment["PATH"] = path
        if subprocess.call([uv, "pip", "install", "--python", python] + arguments, env=environment) == 0:
            return
        say("uv did not manage; trying pip")
    subprocess.check_call([python, "-m", "pip", "install"] + arguments, env=dict(os.environ, PATH=path))


def install_system_packages():
    """Best effort: what apt has and PyPI has not."""
    missing = []
    if not any(
        os.path.exists(os.path.join(root, "gtest", "gtest.h")) for root in ("/usr/include", "/usr/local/include")
    ):
        missing.append("libgtest-dev")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        missing.append("python3-dev")
    if not missing or shutil.which("apt-get") is None:
        return
    if os.geteuid() == 0:
        prefix = []
    elif shutil.which("sudo") and subprocess.call(["sudo", "-n", "true"], stderr=subprocess.DEVNULL) == 0:
        prefix = ["sudo", "-n"]
    else:
        say("{} missing and no right to install; going on without".format(" and ".join(missing)))
        return
    say("apt-get install " + " ".join(missing))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = prefix + ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "--no-install-recommends"]
    if subprocess.call(command + missing, **quiet) != 0:
        subprocess.call(prefix + ["apt-get", "update"], **quiet)
        if subprocess.call(command + missing, **quiet) != 0:
            say("apt-get did not manage; going on without")


def main():
    if sys.version_info < (3, 10):
        raise SystemExit(
            "bootstrap: Python 3.10 or newer is needed, this is {}; set PYTHON=".format(sys.version.split()[0])
        )
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    venv, requirements = sys.argv[1], sys.argv[2:]
    extras = None
    if requirements[:1] == ["--editable"]:
        extras, requirements = requirements[1], requirements[2:]
    install_system_packages()
    python = make_environment(venv)
    install(python, BUILD_REQUIREMENTS + requirements)
    if extras is not None:
        install(python, ["--no-build-isolation", "--editable", ".[{}]".format(extras)])


if __name__ == "__main__":
    main()
