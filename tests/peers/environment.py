#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a script with the Python that has the peers of requirements.txt, or says in one line why it is skipped.

    environment.py SCRIPT ARGUMENTS...     exit code 77: skipped
    environment.py --python                prints the Python, made if need be and if LOWRANK_INSTALL_PEERS=1 allows it

The packages live in a virtual environment outside the clone, named by a hash of their pins:
${XDG_CACHE_HOME:-~/.cache}/lowrank-peers/HASH, or LOWRANK_PEERS_HOME/HASH. It is made once and used as long as the pins stay.
LOWRANK_PEERS_PYTHON names a Python to use as it is.
"""
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv

HERE = os.path.dirname(os.path.abspath(__file__))
SKIPPED = 77


def skip(why):
    print("skipped, because", why)
    sys.exit(SKIPPED)


def pins(requirements):
    lines = (line.split("#")[0].strip() for line in open(requirements))
    return [line for line in lines if line]


def home(requirements):
    key = "\n".join(pins(requirements) + [f"python {sys.version_info[0]}.{sys.version_info[1]}"])
    cache = os.environ.get("LOWRANK_PEERS_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lowrank-peers")
    return os.path.join(cache, hashlib.sha256(key.encode()).hexdigest()[:16])


def install(directory, requirements):
    """Fills `directory`; on any failure nothing is left of it."""
    python = os.path.join(directory, "bin", "python")
    shutil.rmtree(directory, ignore_errors=True)
    try:
        venv.create(directory, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first: the others take what is there, and nothing bigger is fetched for them.
        for packages in ([p for p in pins(requirements) if p.startswith("torch==")], pins(requirements)):
            if packages:
                subprocess.run(pip + packages, check=True, capture_output=True, text=True, timeout=1500)
    except (OSError, subprocess.SubprocessError) as e:
        shutil.rmtree(directory, ignore_errors=True)
        lines = [x for x in (getattr(e, "stderr", None) or str(e)).splitlines() if x.strip() and "WARNING" not in x]
        skip("the peers could not be installed: " + (lines[-1] if lines else type(e).__name__))
    with open(os.path.join(directory, "complete"), "w") as f:
        f.write("\n".join(pins(requirements)) + "\n")


def python_with_peers(requirements):
    """The Python of the environment; skips where there is none and none may be made."""
    given = os.environ.get("LOWRANK_PEERS_PYTHON")
    if given:
        return given
    directory = home(requirements)
    python = os.path.join(directory, "bin", "python")
    complete = os.path.join(directory, "complete")
    if os.path.exists(complete):
        return python
    if os.environ.get("LOWRANK_INSTALL_PEERS") != "1":
        skip("the Python packages of tests/peers/" + os.path.basename(requirements) +
             " are not installed (LOWRANK_INSTALL_PEERS=1 installs them outside the clone)")
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with open(directory + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run at the same time wait for the one that installs
        if not os.path.exists(complete):
            install(directory, requirements)
    return python


def main():
    arguments = sys.argv[1:]
    requirements = os.path.join(HERE, "requirements.txt")
    if arguments and arguments[0] == "--requirements":
        requirements = os.path.join(HERE, arguments[1])
        arguments = arguments[2:]
    if not arguments:
        print(__doc__)
        return 2
    python = python_with_peers(requirements)
    if arguments[0] == "--python":
        print(python)
        return 0
    return subprocess.run([python, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main())
