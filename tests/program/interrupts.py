# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM in the middle of work: the exit code, what is left on disk, and a scan that goes on. Needs nothing beyond Python.

    interrupts.py LOWRANK [LOWRANK_MPI]
"""
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

tool = sys.argv[1]
mpi_tool = sys.argv[2] if len(sys.argv) > 2 else None
failures = 0
rng = random.Random(3)


def check(condition, what):
    global failures
    if not condition:
        failures += 1
        print("FAILED:", what)


def save(path, tensors):
    """tensors: name -> shape; bf16 values between 2^-5 and 2^-3, of either sign."""
    header, pieces, at = {}, [], 0
    for name, (m, n) in tensors.items():
        data = bytearray(2 * m * n)
        data[0::2] = rng.randbytes(m * n)
        data[1::2] = rng.randbytes(m * n).translate(bytes(0x3D if i < 128 else 0xBD for i in range(256)))
        header[name] = {"dtype": "BF16", "shape": [m, n], "data_offsets": [at, at + len(data)]}
        at += len(data)
        pieces.append(bytes(data))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(pieces))


def files(directory):
    """Every file below: path -> content."""
    return {os.path.join(d, name): open(os.path.join(d, name), "rb").read() for d, _, names in os.walk(directory) for name in names}


def partial(directory):
    return [path for path in (os.path.join(d, name) for d, _, names in os.walk(directory) for name in names) if ".partial-" in path]


def start(*args, program=None, ignore=False, env=None):
    def usual():  # whatever the one who runs the tests does with these
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignore else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return subprocess.Popen([*(program or [tool]), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=usual, env=env)


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.001)


def handles(pid, which):
    """Whether the process still has a handler of its own for the signal."""
    with open(f"/proc/{pid}/status") as f:
        for line in f:
            if line.startswith("SigCgt:"):
                return int(line.split()[1], 16) >> (which - 1) & 1 == 1
    return False


work = tempfile.mkdtemp(prefix="lowrank-interrupts-")
at = lambda name: os.path.join(work, name)
try:
    # Three shards of four matrices.
    os.mkdir(at("base"))
    where = {}
    for shard in range(3):
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        tensors = {f"model.layers.{4 * shard + i}.mlp.up_proj.weight": (320, 256) for i in range(4)}
        save(at("base/" + name), tensors)
        where.update({t: name for t in tensors})
    with open(at("base/model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": where}, f)
    init = ["init", "loftq", at("base"), "--rank", "8", "-q"]

    # An older output, written without disturbance, which tells how long that takes.
    out = at("out")
    began = time.monotonic()
    done = start(*init, "--iters", "2", "-o", out)
    error = done.communicate()[1]
    took = time.monotonic() - began
    check(done.returncode == 0, f"init: {done.returncode}, {error}")
    older = files(out)
    check(len(older) == 8, f"adapter and its mark, three shards, index, mark: {sorted(older)}")
    def stopped(process, code, name, command, what):
        """The process said what it should, and left nothing and the older output. It may have been done already: then all is new."""
        _, error = process.communicate()
        check(partial(work) == [], f"{what}: left {partial(work)}")
        if process.returncode == 0:
            now = files(out)
            check(set(now) == set(older) and not any(now[p] == older[p] for p in now if p.endswith("0003.safetensors")), f"{what}: all is new")
            for path, content in older.items():
                open(path, "wb").write(content)
            return False
        check(process.returncode == code, f"{what}: exit code {process.returncode}, expected {code}: {error}")
        line = error.strip().splitlines()
        check(len(line) == 1 and f"interrupted ({name}) in {command}: " in line[0], f"{what}: says {error!r}")
        check(files(out) == older, f"{what}: the older output changed")
        return True

    for which, code, name in ((signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")):
        met = 0
        for share in (0, 0.4, 0.8, 0, 0, 0):  # on a machine that sleeps in between, the work may be done before the signal comes
            if share == 0 and met >= 2:
                continue
            p = start(*init, "--iters", "3", "-o", out)
            wait_for(p, lambda: partial(out) != [])
            time.sleep(share * took)
            p.send_signal(which)
            met += stopped(p, code, name, "init", f"init, {name} after {share} of the time")
        check(met >= 1, f"init, {name}: it was at work when the signal came")

    # Merging the adapter of another run over an older result.
    check(start("init", "pissa", at("base"), "--rank", "16", "-q", "-o", at("pissa")).wait() == 0, "init pissa")
    merge = ["merge", at("pissa/base"), at("pissa"), "-q"]
    shutil.rmtree(out)
    check(start(*merge, "-o", out).wait() == 0, "merge")
    older = files(out)
    p = start(*merge, "-o", out)
    wait_for(p, lambda: partial(out) != [])
    p.send_signal(signal.SIGINT)
    _, error = p.communicate()
    check(p.returncode in (0, 130) and partial(work) == [] and files(out) == older, f"merge: {p.returncode}, {error}")

    # Writing nothing until the end.
    p = start("extract", at("base"), at("pissa/base"), "--rank", "200", "-q", "-o", at("extracted"))
    wait_for(p, lambda: handles(p.pid, signal.SIGTERM))
    p.send_signal(signal.SIGTERM)
    _, error = p.communicate()
    check(p.returncode == 143 and "in extract" in error and not os.path.exists(at("extracted")), f"extract: {p.returncode}, {error}")

    # One decomposition that takes long, and that nothing stops inside.
    save(at("large.safetensors"), {"model.layers.0.mlp.up_proj.weight": (4096, 4096)})
    large = ["init", "milora", at("large.safetensors"), "--rank", "8", "-q"]
    p = start(*large, "-o", at("milora"))
    wait_for(p, lambda: partial(at("milora")) != [])
    p.send_signal(signal.SIGINT)
    _, error = p.communicate()
    check(p.returncode == 130 and error.count("\n") == 1 and "in init" in error, f"a long decomposition: {p.returncode}, {error}")
    check(files(at("milora")) == {}, f"and nothing is left of it: {sorted(files(at('milora')))}")

    # The second signal ends the program as if there were no handler. On a machine that sleeps between the two, the first may have.
    codes = []
    while -signal.SIGINT not in codes and len(codes) < 5:
        p = start(*large, "-o", at("twice"))
        wait_for(p, lambda: partial(at("twice")) != [])
        p.send_signal(signal.SIGINT)
        wait_for(p, lambda: not handles(p.pid, signal.SIGINT))
        p.send_signal(signal.SIGINT)
        p.communicate()
        codes.append(p.returncode)
    check(codes[-1] == -signal.SIGINT, f"twice: {codes}")
    shutil.rmtree(at("twice"))  # what a killed program left

    # Who ignores a signal goes on ignoring it, like all that nohup or a script's & starts.
    p = start("init", "kaiming", at("base"), "--rank", "16", "-q", "-o", at("ignored"), ignore=True)
    wait_for(p, lambda: handles(p.pid, signal.SIGTERM))
    p.send_signal(signal.SIGINT)
    check(p.wait() == 0 and os.path.exists(at("ignored/adapter_config.json")), "an ignored signal changes nothing")

    # A scan keeps what it has, says so, and the same command gives what an undisturbed one gives. The older report stays until then.
    def lines(path):
        try:
            return open(path).read().count("\n")
        except FileNotFoundError:  # not there yet, or gone since the scan is complete
            return 0

    save(at("scan.safetensors"), {f"model.layers.{i}.mlp.up_proj.weight": (640, 512) for i in range(24)})
    for jobs in ("1", "2"):
        scan = ["spectrum", at("scan.safetensors"), "-j", jobs, "-q", "--values", "--json"]
        check(start(*scan, at("whole.json")).wait() == 0, "spectrum")
        whole = json.load(open(at("whole.json")))["matrices"]
        check(len(whole) == 24, "24 matrices")
        report, journal = at(f"scan{jobs}.json"), at(f"scan{jobs}.json.journal")
        open(report, "w").write("older")
        for which, code, name in ((signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")):
            for _ in range(5):
                known = lines(journal)
                p = start(*scan, report)
                wait_for(p, lambda: lines(journal) >= known + 3)
                p.send_signal(which)
                _, error = p.communicate()
                if p.returncode != 0:  # otherwise it was done before the signal came
                    break
                open(report, "w").write("older")
            check(p.returncode == code, f"spectrum -j {jobs}: exit code {p.returncode}, expected {code}: {error}")
            check(f"interrupted ({name}) in spectrum" in error and journal in error, f"spectrum -j {jobs} says what is kept: {error!r}")
            check(open(report).read() == "older" and lines(journal) >= 4, f"spectrum -j {jobs}: the journal is there, the report untouched")
        p = start(*scan, report)
        _, error = p.communicate()
        check(p.returncode == 0, f"resuming: {p.returncode}, {error}")
        result = json.load(open(report))
        check(result["matrices"] == whole, f"spectrum -j {jobs}: interrupted and resumed, the same matrices")
        check(result["resumed"] >= 3, f"spectrum -j {jobs}: without computing again what was there: {result['resumed']}")
        check(not os.path.exists(journal), "the journal is gone in the end")

    # Over MPI: all ranks end, whether the launcher is told or one of them, and the journals serve.
    if mpi_tool and shutil.which("mpirun"):
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMP_NUM_THREADS="1",
                           ASAN_OPTIONS="detect_leaks=0")
        report = at("mpi.json")
        # Four times as long: a launcher takes its time to hand a signal on.
        save(at("mpi.safetensors"), {f"model.layers.{i}.mlp.up_proj.weight": (640, 512) for i in range(96)})
        scan = ["spectrum", at("mpi.safetensors"), "-j", "1", "-q", "--values", "--json"]
        journals = [f"{report}.{rank}of2.journal" for rank in range(2)]
        launch = ["mpirun", "-np", "2", "--oversubscribe", mpi_tool]
        p = start(*scan, at("mpiwhole.json"), program=launch, env=environment)
        check(p.communicate() and p.returncode == 0, "mpirun")
        whole = json.load(open(at("mpiwhole.json")))["matrices"]

        def ranks_of(launcher):
            found = []
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    try:
                        parent = int(open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()[1])
                        if parent == launcher and os.path.realpath(f"/proc/{entry}/exe") == os.path.realpath(mpi_tool):
                            found.append(int(entry))
                    except OSError:
                        pass  # it ended
            return found

        for all_of_them in (True, False):
            for _ in range(10):
                known = [lines(j) for j in journals]
                p = start(*scan, report, program=launch, env=environment)
                wait_for(p, lambda: all(lines(j) > k for j, k in zip(journals, known)))
                ranks = ranks_of(p.pid)
                if all_of_them:
                    p.send_signal(signal.SIGINT)
                elif ranks:
                    os.kill(ranks[0], signal.SIGTERM)
                _, error = p.communicate(timeout=120)
                if p.returncode != 0 and not os.path.exists(report):
                    break
                # The signal came when all was computed: another try.
                if os.path.exists(report):
                    os.remove(report)
            check(p.returncode != 0, f"mpirun was interrupted: {error[-500:]}")
            check("interrupted (SIGTERM) in spectrum" in error, f"a rank says so: {error[-500:]}")
            check(not os.path.exists(report) and all(lines(j) >= 2 for j in journals), "the journals of both ranks are there")
        p = start(*scan, report, program=launch, env=environment)
        _, error = p.communicate(timeout=300)
        check(p.returncode == 0 and json.load(open(report))["matrices"] == whole, f"resumed over MPI, the same matrices: {error[-500:]}")
finally:
    shutil.rmtree(work, ignore_errors=True)
print("all checks passed" if failures == 0 else f"{failures} checks failed")
sys.exit(1 if failures else 0)
