// The router: projected block means, scores in fp32, top-k indices, the mixing ratio, and the block
// map by bits and by columns.
#include "columns.cuh"

constexpr int PROJECT_ROWS = 16;

// x W_q of the pooled Q (B H, T_m, D) and x W_k of the pooled K (B H, T_n, D), fp32, weights (H or
// 1, channels, channels). Grid (ceil(T_m / 16) + ceil(T_n / 16), B H), D threads: a thread makes
// one column of 16 rows.
extern "C" __global__ void __launch_bounds__(HEAD_DIM)
sla2_project(const float* __restrict__ pooled_q, const float* __restrict__ pooled_k,
             const float* __restrict__ weight_q, const float* __restrict__ weight_k,
             float* __restrict__ projected_q, float* __restrict__ projected_k, int num_heads,
             int weight_heads, int t_m, int t_n, int channels) {
    __shared__ float tile[PROJECT_ROWS][HEAD_DIM];
    const int of_q = ceil_div(t_m, PROJECT_ROWS);
    const bool queries = static_cast<int>(blockIdx.x) < of_q;
    const float* x = queries ? pooled_q : pooled_k;
    const float* weight = queries ? weight_q : weight_k;
    float* y = queries ? projected_q : projected_k;
    const int rows = queries ? t_m : t_n, column = threadIdx.x;
    const int first = (queries ? blockIdx.x : blockIdx.x - of_q) * PROJECT_ROWS;
    const long long bh = blockIdx.y;
    const int count = rows - first < PROJECT_ROWS ? rows - first : PROJECT_ROWS;
    for (int r = 0; r < PROJECT_ROWS; ++r)
        tile[r][column] = r < count ? x[(bh * rows + first + r) * HEAD_DIM + column] : 0.0f;
    __syncthreads();
    const int head = weight_heads == 1 ? 0 : static_cast<int>(blockIdx.y) % num_heads;
    const float* w = weight + static_cast<long long>(head) * channels * channels + column;
    float acc[PROJECT_ROWS];
#pragma unroll
    for (int r = 0; r < PROJECT_ROWS; ++r) acc[r] = 0.0f;
    if (column < channels)
        for (int c = 0; c < channels; ++c) {
            const float value = w[c * channels];
#pragma unroll
            for (int r = 0; r < PROJECT_ROWS; ++r) acc[r] += tile[r][c] * value;
        }
#pragma unroll
    for (int r = 0; r < PROJECT_ROWS; ++r)
        if (r < count) y[(bh * rows + first + r) * HEAD_DIM + column] = acc[r];
}

constexpr int SCORE_TILE = 32;

// scores = q k^T scale of `rows` query blocks from first_row on, fp32 (B H, rows, T_n); columns of
// blocks without a valid token get -inf. q (B H, T_m, D), k (B H, T_n, D). Grid (ceil(T_n / 32),
// ceil(rows / 32), B H), 64 threads: a thread makes 4 x 4 scores.
extern "C" __global__ void __launch_bounds__(64)
sla2_scores(const float* __restrict__ q, const float* __restrict__ k,
            const int* __restrict__ kv_lengths, float* __restrict__ scores, int num_heads,
            int t_m, int t_n, int n_k, int first_row, int rows, float scale) {
    // Stored [channel][row]: in the products a warp reads 4 and 8 neighbouring words, each by many
    // lanes. + 1: the stores, which go down a column, fall into different banks.
    __shared__ float left[32][SCORE_TILE + 1];
    __shared__ float right[32][SCORE_TILE + 1];
    const long long bh = blockIdx.z;
    q += (bh * t_m + first_row) * HEAD_DIM, k += bh * t_n * HEAD_DIM;
    const int row0 = blockIdx.y * SCORE_TILE, column0 = blockIdx.x * SCORE_TILE;
    const int tr = threadIdx.x / 8, tc = threadIdx.x % 8;
    float acc[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    for (int depth = 0; depth < HEAD_DIM; depth += 32) {
        __syncthreads();
#pragma unroll 8  // ptxas spills on sm_100a if it unrolls more
        for (int i = threadIdx.x; i < 32 * SCORE_TILE; i += 64) {
            const int r = i / 32, c = i % 32;
            left[c][r] = row0 + r < rows ? q[(row0 + r) * HEAD_DIM + depth + c] : 0.0f;
            right[c][r] = column0 + r < t_n ? k[(column0 + r) * HEAD_DIM + depth + c] : 0.0f;
        }
        __syncthreads();
        for (int c = 0; c < 32; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    acc[i][j] += left[c][tr + 8 * i] * right[c][tc + 8 * j];
    }
    const int blocks = ceil_div(valid_keys(kv_lengths, blockIdx.z / num_heads, n_k), BLOCK_K);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = row0 + tr + 8 * i, column = column0 + tc + 8 * j;
            if (row < rows && column < t_n)
                scores[(bh * rows + row) * t_n + column] =
                    column < blocks ? acc[i][j] * scale : MINUS_INFINITY;
        }
}

// Unsigned integers in the order of the floats; +0 = -0, and NaN, of either sign, comes out on top,
// as in torch.sort.
SLA2_INLINE unsigned order_key(float x) {
    if (x != x) return 0xffffffffu;
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 + 0 = +0
    // Positive floats are ordered as their bits are; negative ones the other way round, and below.
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many lanes under this one have voted: its place in a list that lanes fill in order.
SLA2_INLINE int lanes_below(unsigned votes) {
    return __popc(votes & ((1u << (threadIdx.x & 31)) - 1u));
}

constexpr int WARPS_OF_ROWS = 4;
constexpr int KEPT = 48;  // keys of a row that a lane holds: rows of up to 1,536 blocks

constexpr float MOST_LOG_ODDS = 20.0f;  // of the routed mass: sigmoid(20) is 1 to fp32 rounding

// The mixing ratio alpha of a row of head `head`, in the three ways of sla2_core.mixing:
// offset null: 1; `slope` (alpha_heads,) given: sigmoid(offset + slope log(inside / outside)), from
// the sums of exp(score) over the blocks that the row selects and over the others; else sigmoid of
// offset (alpha_heads, knots) at the row's place among t_m, interpolated between the knots.
SLA2_INLINE float mixing_ratio(const float* offset, const float* slope, int alpha_heads, int knots,
                               int head, int row, int t_m, float inside, float outside) {
    if (offset == nullptr) return 1.0f;
    if (alpha_heads == 1) head = 0;
    float x;
    if (slope != nullptr) {
        const float odds = logf(inside) - logf(outside);  // +inf where every block is selected
        x = odds > MOST_LOG_ODDS ? MOST_LOG_ODDS : (odds < -MOST_LOG_ODDS ? -MOST_LOG_ODDS : odds);
        x = offset[head] + slope[head] * x;  // a NaN goes through all of it
    } else {
        const float* values = offset + head * knots;
        const float place =
            static_cast<float>(row) / static_cast<float>(t_m > 1 ? t_m - 1 : 1) * (knots - 1);
        const int left = clamp_int(static_cast<int>(place), 0, knots > 1 ? knots - 2 : 0);
        const float right = knots > 1 ? values[left + 1] : values[0];
        x = values[left] + (place - left) * (right - values[left]);
    }
    return 1.0f / (1.0f + expf(-x));
}

// The map of the `rows` query blocks from first_row on, whose scores (B H, rows, T_n) these are: of
// the item's valid key blocks among the first `routable` the K = max(1, round(topk * number)) best,
// and every valid block from `routable` on (forced: those that hold text). Ties go to the lower
// index; indices ascend and are followed by -1. The K-th largest key is found bit by bit, so the
// result does not depend on any order of execution. A warp per row: grid (ceil(rows / 4), B H), 128
// threads. indices (B H, T_m, max_selected), where max_selected = K of `routable` blocks +
// T_n - routable; counts (B H, T_m). Null, or the map as sla2_row_bits makes it: bits and
// rest_inverse. Null, or (B H, T_m): alpha, see mixing_ratio.
extern "C" __global__ void __launch_bounds__(32 * WARPS_OF_ROWS)
sla2_topk(const float* __restrict__ scores, const int* __restrict__ kv_lengths,
          const float* __restrict__ offset, const float* __restrict__ slope,
          int* __restrict__ indices, int* __restrict__ counts, unsigned* __restrict__ bits,
          float* __restrict__ rest_inverse, float* __restrict__ alpha, int num_heads, int t_m,
          int t_n, int n_k, int first_row, int rows, int routable, int max_selected,
          int alpha_heads, int knots, double topk) {
    const int line_row = blockIdx.x * WARPS_OF_ROWS + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (line_row >= rows) return;
    const int row = first_row + line_row;
    const long long bh = blockIdx.y, at = bh * t_m + row;
    const float* line = scores + (bh * rows + line_row) * t_n;
    int* list = indices + at * max_selected;
    const int valid = ceil_div(valid_keys(kv_lengths, blockIdx.y / num_heads, n_k), BLOCK_K);
    const int blocks = valid < routable ? valid : routable;
    const int room = max_selected - (t_n - routable);
    // 0 where there is nothing to choose from: then the search below counts nothing and places
    // nothing.
    const int best = clamp_int(static_cast<int>(rint(topk * blocks)), 1, room);
    const int wanted = best < blocks ? best : blocks;

    // The largest threshold that `wanted` keys reach, from the highest bit down: a bit stays if
    // enough keys reach the threshold with it. The last trial that failed was threshold + 1 (its
    // bits below are 0 where all later trials set theirs), so its count is that of the keys above.
    // The first KEPT keys of a lane wait in registers, so that short rows are read twice in all.
    unsigned kept[KEPT];
    float top = MINUS_INFINITY;  // of all valid scores, for the sums of exp(score)
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        const int j = 32 * i + lane;
        const float x = j < valid ? line[j] : MINUS_INFINITY;
        top = fmaxf(top, x);
        kept[i] = j < blocks ? order_key(x) : 0u;  // 0 reaches no threshold
    }
    for (int j = 32 * KEPT + lane; j < valid; j += 32) top = fmaxf(top, line[j]);
    for (int mask = 16; mask > 0; mask >>= 1) top = fmaxf(top, shfl_xor(top, mask));
    unsigned threshold = 0u;
    int above = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const unsigned trial = threshold | (1u << bit);
        int reach = 0;
#pragma unroll
        for (int first = 0; first < KEPT; first += 16)
            if (32 * first < blocks)
#pragma unroll
                for (int i = first; i < first + 16; ++i) reach += kept[i] >= trial;
        for (int j = 32 * KEPT + lane; j < blocks; j += 32) reach += order_key(line[j]) >= trial;
        reach = warp_total(reach);
        if (reach >= wanted) threshold = trial;
        else above = reach;
    }
    // All keys above, and as many equal ones as are missing, from the left. Ballots count them.
    const int ties = wanted - above;
    int placed = 0, tied = 0, word = 0;
    float inside = 0.0f, outside = 0.0f;
    for (int first = 0; first < t_n; first += 32, ++word) {
        const int j = first + lane;
        const float x = j < valid ? line[j] : MINUS_INFINITY;
        const unsigned key = order_key(x);
        const bool equal = j < blocks && key == threshold;
        const unsigned equals = __ballot_sync(0xffffffffu, equal);
        const bool take = j < blocks ? key > threshold ||
                                           (equal && tied + lanes_below(equals) < ties)
                                     : j >= routable && j < valid;
        const unsigned takes = __ballot_sync(0xffffffffu, take);
        if (take) list[placed + lanes_below(takes)] = j;
        if (bits != nullptr && lane == 0) bits[at * ceil_div(t_n, 32) + word] = word_of(takes);
        placed += __popc(takes);
        tied += __popc(equals);
        if (j < valid) (take ? inside : outside) += exp2_approx((x - top) * LOG2_E);
    }
    for (int i = placed + lane; i < max_selected; i += 32) list[i] = -1;
    inside = warp_sum(inside), outside = warp_sum(outside);
    if (lane != 0) return;
    counts[at] = placed;
    if (rest_inverse != nullptr)
        rest_inverse[at] = placed < valid ? 1.0f / static_cast<float>(valid - placed) : 0.0f;
    if (alpha != nullptr)
        alpha[at] = mixing_ratio(offset, slope, alpha_heads, knots, blockIdx.y % num_heads, row,
                                 t_m, inside, outside);
}

// The map as bits (bit_of), (B H, T_m, ceil(T_n / 32)), and 1 / (number of valid blocks left over),
// 0 if none is, per row. A warp per row: grid (ceil(T_m / 4), B H), 128 threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS_OF_ROWS)
sla2_row_bits(const int* __restrict__ indices, const int* __restrict__ counts,
              const int* __restrict__ kv_lengths, unsigned* __restrict__ bits,
              float* __restrict__ rest_inverse, int num_heads, int t_m, int t_n, int n_k,
              int max_selected) {
    const int row = blockIdx.x * WARPS_OF_ROWS + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (row >= t_m) return;
    const long long at = static_cast<long long>(blockIdx.y) * t_m + row;
    const int* list = indices + at * max_selected;
    const int count = counts[at], words = ceil_div(t_n, 32);
    const int blocks = ceil_div(valid_keys(kv_lengths, blockIdx.y / num_heads, n_k), BLOCK_K);
    int selected = 0;
    for (int w = lane; w < words; w += 32) {  // a lane makes whole words; the list is sorted
        int low = 0, high = count;  // the first index that is at least 32 w
        while (low < high) {
            const int middle = (low + high) / 2;
            if (list[middle] < 32 * w) low = middle + 1;
            else high = middle;
        }
        unsigned word = 0u;
        for (; low < count && list[low] < 32 * w + 32; ++low) {
            word |= 1u << bit_of(list[low] - 32 * w);
            selected += list[low] < blocks;
        }
        bits[at * words + w] = word;
    }
    selected = warp_sum(selected);
    if (lane == 0)
        rest_inverse[at] = selected < blocks ? 1.0f / static_cast<float>(blocks - selected) : 0.0f;
}

// The transposed bits, (B H, T_n, ceil(T_m / 32)), and how many rows chose each column. A warp per
// column: grid (ceil(T_n / 4), B H), 128 threads.
extern "C" __global__ void __launch_bounds__(32 * WARPS_OF_ROWS)
sla2_column_bits(const unsigned* __restrict__ bits, unsigned* __restrict__ column_bits,
                 int* __restrict__ column_counts, int t_m, int t_n) {
    const int column = blockIdx.x * WARPS_OF_ROWS + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (column >= t_n) return;
    const long long bh = blockIdx.y;
    const int words = ceil_div(t_n, 32), column_words = ceil_div(t_m, 32);
    int count = 0;
    for (int w = 0; w < column_words; ++w) {
        const int row = 32 * w + column_of(lane);  // which becomes bit `lane`
        const bool chosen = row < t_m && (bits[(bh * t_m + row) * words + column / 32] >>
                                              bit_of(column % 32) & 1u);
        const unsigned word = __ballot_sync(0xffffffffu, chosen);
        if (lane == 0) column_bits[(bh * t_n + column) * column_words + w] = word;
        count += __popc(word);
    }
    if (lane == 0) column_counts[bh * t_n + column] = count;
}

// Exclusive sums of the counts, offsets (B H, T_n + 1), and of the slices of columns that more than
// `longest` rows chose, slice_offsets (B H, T_n + 1), with their columns, slice_columns
// (B H, slices): columns.cuh. slices = 0: no column is cut. Grid (B H), 256 threads; a thread adds
// a run of columns.
extern "C" __global__ void __launch_bounds__(256)
sla2_column_offsets(const int* __restrict__ column_counts, int* __restrict__ offsets,
                    int* __restrict__ slice_offsets, int* __restrict__ slice_columns, int t_n,
                    int longest, int slices) {
    __shared__ int2 sums[2][256];  // of the counts, and of the slices
    const long long bh = blockIdx.x;
    const int* counts = column_counts + bh * t_n;
    int* out = offsets + bh * (t_n + 1);
    const int run = ceil_div(t_n, 256), first = threadIdx.x * run;
    auto added = [&](int2 x, int count) {
        x.x += count, x.y += slices_of(count, longest);
        return x;
    };
    int2 own = {0, 0};
    for (int j = first; j < first + run && j < t_n; ++j) own = added(own, counts[j]);
    // Inclusive sums over the threads by doubling distances, between two buffers.
    int side = 0;
    sums[0][threadIdx.x] = own;
    __syncthreads();
    for (int distance = 1; distance < 256; distance <<= 1) {
        int2 x = sums[side][threadIdx.x];
        if (static_cast<int>(threadIdx.x) >= distance) {
            const int2 y = sums[side][threadIdx.x - distance];
            x.x += y.x, x.y += y.y;
        }
        side = 1 - side;
        sums[side][threadIdx.x] = x;
        __syncthreads();
    }
    int2 before = sums[side][threadIdx.x];
    before.x -= own.x, before.y -= own.y;
    for (int j = first; j < first + run && j < t_n; ++j) {
        const int2 after = added(before, counts[j]);
        out[j] = before.x;
        if (slices > 0) slice_offsets[bh * (t_n + 1) + j] = before.y;
#pragma unroll 1  // most columns have none
        for (int i = before.y; i < after.y; ++i) slice_columns[bh * slices + i] = j;
        before = after;
    }
    if (threadIdx.x != 255) return;
    out[t_n] = before.x;
    if (slices > 0) slice_offsets[bh * (t_n + 1) + t_n] = before.y;
}

// The rows that chose each column, ascending, from offsets[column] on: rows (B H, capacity). A warp
// per column.
extern "C" __global__ void __launch_bounds__(32 * WARPS_OF_ROWS)
sla2_column_rows(const unsigned* __restrict__ column_bits, const int* __restrict__ offsets,
                 int* __restrict__ rows, int t_m, int t_n, long long capacity) {
    const int column = blockIdx.x * WARPS_OF_ROWS + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (column >= t_n) return;
    const long long bh = blockIdx.y;
    const int column_words = ceil_div(t_m, 32);
    int* list = rows + bh * capacity + offsets[bh * (t_n + 1) + column];
    for (int w = 0; w < column_words; ++w) {
        const unsigned word = column_bits[(bh * t_n + column) * column_words + w];
        const bool chosen = word >> bit_of(lane) & 1u;
        const unsigned votes = __ballot_sync(0xffffffffu, chosen);
        if (chosen) list[lanes_below(votes)] = 32 * w + lane;
        list += __popc(word);
    }
}
