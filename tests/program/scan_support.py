# SPDX-License-Identifier: Apache-2.0
"""What the tests of the scans share: checkpoints and adapters made here, and a decomposition to compare with. Python and nothing else."""
import json
import math
import os
import random
import resource
import struct
import subprocess
import sys

tool = sys.argv[1]
mpi_tool = sys.argv[2] if len(sys.argv) > 2 else None
failures = 0


def check(condition, what):
    global failures
    if not condition:
        failures += 1
        print("FAILED:", what)


def run(*args, code=0, program=None):
    r = subprocess.run([*(program or [tool]), *args], capture_output=True, text=True, errors="replace")
    check(r.returncode == code, f"{' '.join(args[:3])}: exit code {r.returncode}, expected {code}: {r.stderr.strip()}")
    if code != 0:
        check(len(r.stderr.strip().splitlines()) >= 1, "a failure says why")
    return r


def bf16(x):
    u = struct.unpack("<I", struct.pack("<f", x))[0]
    return (u + 0x7FFF + ((u >> 16) & 1)) >> 16


def save(path, tensors):
    """tensors: name -> (dtype, shape, floats)."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        code = {"F32": lambda v: struct.pack(f"<{len(v)}f", *v), "F64": lambda v: struct.pack(f"<{len(v)}d", *v),
                "BF16": lambda v: struct.pack(f"<{len(v)}H", *map(bf16, v)), "I64": lambda v: struct.pack(f"<{len(v)}q", *v),
                "F16": lambda v: struct.pack(f"<{len(v)}e", *v), "I8": lambda v: struct.pack(f"<{len(v)}b", *v),
                "U8": bytes, "F8_E4M3": bytes, "F8_E5M2": bytes, "F8_E8M0": bytes}
        raw = code[dtype](values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


rng = random.Random(1)


def noise(m, n, std=1.0):
    return [rng.gauss(0, std) for _ in range(m * n)]


def low_rank(m, n, r, size):
    out = [0.0] * (m * n)
    for _ in range(r):
        u, v = noise(m, 1), noise(n, 1)
        for i in range(m):
            for j in range(n):
                out[i * n + j] += size * u[i] * v[j]
    return out


def add(a, b):
    return [x + y for x, y in zip(a, b)]


def transposed(a, m, n):
    return [a[i * n + j] for j in range(n) for i in range(m)]


def times(a, b, m, k, n):
    """The m×n product of a (m×k) and b (k×n)."""
    return [sum(a[i * k + l] * b[l * n + j] for l in range(k)) for i in range(m) for j in range(n)]


def jacobi(a, m, n):
    """Singular values, left and right vectors (lists of vectors), by one-sided Jacobi in Python's doubles, for any shape: an oracle
    nobody here wrote in C++."""
    if m < n:
        s, u, v = jacobi(transposed(a, m, n), n, m)
        return s, v, u
    columns = [[a[i * n + j] for i in range(m)] for j in range(n)]
    right = [[float(i == j) for i in range(n)] for j in range(n)]
    for _ in range(40):
        off = 0.0
        for p in range(n - 1):
            for q in range(p + 1, n):
                x, y = columns[p], columns[q]
                alpha, beta, gamma = sum(t * t for t in x), sum(t * t for t in y), sum(s * t for s, t in zip(x, y))
                if abs(gamma) <= 1e-15 * math.sqrt(alpha * beta):
                    continue
                off = max(off, abs(gamma) / math.sqrt(alpha * beta))
                zeta = (beta - alpha) / (2 * gamma)
                t = math.copysign(1, zeta) / (abs(zeta) + math.sqrt(1 + zeta * zeta))
                c = 1 / math.sqrt(1 + t * t)
                for table in (columns, right):
                    x, y = table[p], table[q]
                    table[p] = [c * (s - t * u) for s, u in zip(x, y)]
                    table[q] = [c * (t * s + u) for s, u in zip(x, y)]
        if off < 1e-14:
            break
    order = sorted(range(n), key=lambda j: -sum(t * t for t in columns[j]))
    s = [math.sqrt(sum(t * t for t in columns[j])) for j in order]
    left = [[t / x for t in columns[j]] if x > 0 else columns[j] for x, j in zip(s, order)]
    return s, left, [right[j] for j in order]


def jacobi_values(a, m, n):
    """Singular values alone."""
    return jacobi(a, m, n)[0]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def metrics_of(s):
    """The rank metrics of formulas anyone can check, from singular values."""
    total, fourth, one = sum(x * x for x in s), sum(x**4 for x in s), sum(s)
    out = {"spectral_norm": s[0], "frobenius_norm": math.sqrt(total), "nuclear_norm": one, "stable_rank": total / s[0] ** 2 if s[0] else 0,
           "participation_ratio": total**2 / fourth if fourth else 0,
           "effective_rank": math.exp(-sum(x / one * math.log(x / one) for x in s if x > 0)) if one else 0}
    for tau in (90, 95, 99):
        energy, rank = 0.0, 0
        while energy < tau / 100 * total * (1 - 1e-15):
            energy += s[rank] ** 2
            rank += 1
        out[f"energy_rank_{tau}"] = rank
    return out


def rounded(values):
    return [struct.unpack("<f", struct.pack("<f", v))[0] for v in values]


NF4 = [-1, -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635, -.18477343022823334,
       -.09105003625154495, 0, .07958029955625534, .16093020141124725, .24611230194568634, .33791524171829224,
       .44070982933044434, .5626170039176941, .7229568362236023, 1]


def pack_nf4(name, m, n, values, nested):
    """The tensors bitsandbytes keeps a weight in, and the values they stand for."""
    blocks = [values[i:i + 64] for i in range(0, len(values), 64)]
    absmax = rounded([max(map(abs, b)) for b in blocks])
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [m, n]}
    tensors = {}
    if nested:  # the scales in 8 bits too, on an even grid here: a reader must take the map from the file
        offset = sum(absmax) / len(absmax)
        grid = rounded([-1 + 2 * i / 255 for i in range(256)])
        top = rounded([max(abs(x - offset) for x in absmax)])
        codes = [min(range(256), key=lambda c: abs(grid[c] * top[0] + offset - x)) for x in absmax]
        state.update(nested_blocksize=256, nested_dtype="float32", nested_offset=offset)
        tensors[name + ".absmax"] = ("U8", [len(codes)], codes)
        tensors[name + ".nested_absmax"] = ("F32", [1], top)
        tensors[name + ".nested_quant_map"] = ("F32", [256], grid)
        scales = [grid[c] * top[0] + offset for c in codes]
    else:
        scales = absmax
        tensors[name + ".absmax"] = ("F32", [len(absmax)], absmax)
    codes = [min(range(16), key=lambda c: abs(NF4[c] - x / s)) for b, s in zip(blocks, scales) for x in b]
    stands_for = [NF4[c] * scales[i // 64] for i, c in enumerate(codes)]
    codes += [0] * (len(codes) % 2)
    packed = [16 * a + b for a, b in zip(codes[::2], codes[1::2])]  # the first of two in the high half
    tensors[name] = ("U8", [len(packed), 1], packed)
    tensors[name + ".quant_map"] = ("F32", [16], NF4)
    text = json.dumps(state).encode()
    tensors[name + ".quant_state.bitsandbytes__nf4"] = ("U8", [len(text)], text)
    return tensors, stands_for


def f8(code, exponent_bits):
    """What a byte stands for in E4M3 (exponent_bits 4) or E5M2 (5), from the definition of the formats."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = code >> mantissa_bits & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
    size = mantissa * 2.0 ** (1 - bias - mantissa_bits) if exponent == 0 else (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    return -size if code & 128 else size


def random_f8(count, exponent_bits):
    """Codes of finite numbers: of E4M3 all but the two with every other bit set, of E5M2 those below the largest exponent."""
    codes = [c for c in range(256) if (c & 127 != 127 if exponent_bits == 4 else c & 127 < 124)]
    return [rng.choice(codes) for _ in range(count)]


def save_adapter(directory, modules, r, alpha, **config):
    """modules: name -> (A r×in, B out×r, in, out, embedding). Returns the updates s·B·A, out×in."""
    os.makedirs(directory, exist_ok=True)
    tensors, updates = {}, {}
    for name, (a, b, n, m, embedding) in modules.items():
        ends = (".lora_embedding_A", ".lora_embedding_B") if embedding else (".lora_A.weight", ".lora_B.weight")
        tensors["base_model.model." + name + ends[0]] = ("F32", [r, n], a)
        tensors["base_model.model." + name + ends[1]] = ("F32", [m, r], b)
        updates[name] = [alpha / r * x for x in times(b, a, m, r, n)]
    save(os.path.join(directory, "adapter_model.safetensors"), tensors)
    with open(os.path.join(directory, "adapter_config.json"), "w") as f:
        json.dump({"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": sorted({k.split(".")[-1] for k in modules}), **config}, f)
    return updates


def disk_of(size):
    """For preexec_fn: the write that takes a file beyond so many bytes ends there, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def finish():
    print("all checks passed" if failures == 0 else f"{failures} checks failed")
    sys.exit(1 if failures else 0)
