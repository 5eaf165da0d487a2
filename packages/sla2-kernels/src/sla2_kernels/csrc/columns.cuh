// Which query blocks a block of threads adds up for dK and dV: a column of the block map, or a
// slice of one that many rows chose, an attention sink, which would keep one block of threads at
// work long after the others. route.cu cuts the columns.
#pragma once

#include "common.cuh"

// Slices of nearly equal length, at most `longest`, of a column that `count` rows chose; 0: it
// stays whole.
SLA2_INLINE int slices_of(int count, int longest) {
    return count > longest ? ceil_div(count, longest) : 0;
}

// The map by columns. offsets (B H, T_n + 1) and rows (B H, capacity): rows[offsets[j]] is the
// first that chose column j. slice_offsets (B H, T_n + 1): of a column's slices among those of its
// head; slice_columns (B H, slices): the column of each. There is room for `slices` a head, of
// which slice_offsets[T_n] are used; 0: no column is cut, and both are null.
struct ColumnMap {
    const int* offsets;
    const int* rows;
    long long capacity;
    const int* slice_offsets;
    const int* slice_columns;
    int slices, t_n, pairs;
};

// What a block of threads adds up.
struct Part {
    long long bh;
    int column;       // -1: there is nothing to do
    int slice;        // of those of the head; -1: the whole column
    bool first;       // whether it begins its column
    const int* list;  // its rows
    int count;        // -1: the column is cut, its slices are parts of their own
};

// Parts are numbered from 0 to B H (slices + T_n) - 1: slices first, those of all heads in turn, as
// they take longest, then columns, head by head.
SLA2_INLINE Part part_of(const ColumnMap& map, int number) {
    Part part;
    int order = number / map.pairs;
    if (order < map.slices) {
        part.bh = number % map.pairs;
    } else {
        number -= map.pairs * map.slices;
        part.bh = number / map.t_n;
        order = -1;
    }
    const int* cuts = map.slice_offsets + part.bh * (map.t_n + 1);
    part.slice = order, part.first = true, part.column = number % map.t_n;
    if (order >= 0) {
        part.column = -1;
        if (order >= cuts[map.t_n]) return part;
        part.column = map.slice_columns[part.bh * map.slices + order];
    }
    const int* bounds = map.offsets + part.bh * (map.t_n + 1) + part.column;
    int first = bounds[0];
    part.count = bounds[1] - first;
    if (map.slices > 0) {
        const int cut = cuts[part.column], slices = cuts[part.column + 1] - cut;
        if (order >= 0) {
            const int whole = part.count, i = order - cut;
            part.first = i == 0;
            part.count = whole * (i + 1) / slices - whole * i / slices;
            first += whole * i / slices;
        } else if (slices > 0) {
            part.count = -1;
        }
    }
    part.list = map.rows + part.bh * map.capacity + first;
    return part;
}

// Where a slice's sums lie in (B H, slices, 2, BLOCK_K, D): those of dK, behind them those of dV.
SLA2_INLINE float* slice_sums(float* sliced, const ColumnMap& map, const Part& part) {
    return sliced + 2 * (part.bh * map.slices + part.slice) * BLOCK_K * HEAD_DIM;
}

// A part's row of (B H, T_n + slices, D): its column, or behind the columns its slice.
SLA2_INLINE long long sum_row(const ColumnMap& map, const Part& part) {
    return part.bh * (map.t_n + map.slices) +
           (part.slice < 0 ? part.column : map.t_n + part.slice);
}
