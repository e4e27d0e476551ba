#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/quant/data/bitsandbytes.txt: quantisation as the source of bitsandbytes' "default" backend reads.

A second reading of its source; tests/peers/bitsandbytes_quantises.py runs the package itself. Slow and obvious on purpose, in numpy, sharing
nothing with the library: absmax of a block in float32, x * (1 / absmax) in float32, the level below the first midpoint that is not below that
(of two zeros the first takes zero and less), two codes to a byte with the first in the high nibble, value = table * absmax. The scales of compress_statistics likewise, in blocks of 256 on the dynamic map, after subtracting their mean.
Input is a hash of the index that the test computes too.

    /usr/bin/python3 tests/quant/reference.py
"""
import os
import numpy as np

f32 = np.float32
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [v / 12.0 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 = FP4 + [-v for v in FP4]
DYNAMIC = sorted([s * 10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2 ** i)
                  for i in range(7) for k in range(2 ** i) for s in (1, -1)] + [0.0, 1.0])


def inputs(n):
    i = np.arange(n, dtype=np.uint64)
    h = (i * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(2 ** 32)
    h = (h ^ (h >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2 ** 32)
    unit = ((h >> np.uint64(8)).astype(np.float64) / 2 ** 23 - 1).astype(f32)
    block = i // np.uint64(64)
    x = unit * ((1 + block % np.uint64(7)).astype(f32) * f32(0.125))
    x[block == 3] = 0.0          # a block of zeros
    x[(i % np.uint64(97)) == 0] = f32(-0.0)
    return x


def blocks(x, size):
    return [x[i:i + size] for i in range(0, len(x), size)]


def quantise(x, table, size):
    table = np.array(table, f32)
    absmax, codes, values = [], [], []
    for b in blocks(x, size):
        a = f32(np.max(np.abs(b)))
        absmax.append(a)
        scaled = b * f32(0) if a == 0 else (b * (f32(1) / a)).astype(f32)
        order = np.argsort(table, kind='stable')
        middles = (table[order[:-1]] + table[order[1:]]) / f32(2)
        for s in scaled:
            codes.append(int(order[np.searchsorted(middles, s, side='left')]))
            values.append(f32(table[codes[-1]] * a))
    return np.array(codes), np.array(absmax, f32), np.array(values, f32)


def pack(codes):
    c = list(codes) + [0] * (len(codes) % 2)
    return [c[i] << 4 | c[i + 1] for i in range(0, len(c), 2)]


def write(out, name, values):
    values = np.asarray(values).ravel()
    print(name, 1, len(values), file=out)
    print(' '.join('%.9g' % v for v in values), file=out)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, 'data', 'bitsandbytes.txt'), 'w') as out:
        x = inputs(6 * 64 + 37)
        for name, table in (('nf4', NF4), ('fp4', FP4)):
            codes, absmax, values = quantise(x, table, 64)
            write(out, name + '_codes', pack(codes))
            write(out, name + '_absmax', absmax)
            write(out, name + '_values', values)
        # int8 by rows of 32: round(x * (127 / absmax)), value = (code * absmax) * (1 / 127), all in float32.
        rows = inputs(12 * 32).reshape(12, 32)
        rows = np.where(rows == 0, f32(0.25), rows)
        absmax = np.abs(rows).max(axis=1)
        codes = np.rint(rows * (f32(127) / absmax)[:, None]).astype(np.int32)
        write(out, 'int8_codes', codes)
        write(out, 'int8_values', (codes.astype(f32) * absmax[:, None]) * f32(7.874015718698502e-3))
        # Double quantisation of 300 scales.
        x = inputs(300 * 64)
        _, absmax, _ = quantise(x, [-1.0, 0.0, 1.0], 64)
        offset = f32(np.mean(absmax.astype(np.float64)))
        codes, nested, values = quantise((absmax - offset).astype(f32), DYNAMIC, 256)
        write(out, 'nested_codes', codes)
        write(out, 'nested_absmax', nested)
        write(out, 'nested_offset', [offset])
        write(out, 'nested_scales', (values + offset).astype(f32))
        write(out, 'dynamic_map', np.array(DYNAMIC, f32))


main()
