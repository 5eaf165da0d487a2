// wgmma: operands by descriptors or in registers; sums are NaN until the wait that covers them.
#pragma once
#include "bulk.h"

namespace sla2 {

enum Element { BF16, F16, S8, E4M3 };
constexpr const char* kElements[] = {"wgmma bf16", "wgmma f16", "wgmma s8", "wgmma e4m3"};

// The 16-byte chunks of an operand of `lines` rows (A) or columns (B), 32 bytes deep, as its
// descriptor names them (PTX manual, "Matrix descriptor" and "Canonical layouts"). Along the depth:
// two chunks a line. Across: `depth` steps of lines / 8 chunks, 16-bit elements only.
inline std::vector<size_t> chunks_of(const Async& a, uint64_t descriptor, int lines, bool across,
                                     const Operation& operation) {
    const size_t start = size_t(descriptor & 0x3fff) << 4;
    const size_t leading = size_t(descriptor >> 16 & 0x3fff) << 4;
    const size_t stride = size_t(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) misuse("a descriptor with a base offset is not emulated", operation);
    // Chunks of a swizzled row; 1: rows of core matrices lie 16 bytes apart.
    const size_t width = size_t(1) << ((4 - (descriptor >> 62)) & 3);
    std::vector<size_t> found;
    auto add = [&](size_t address) {
        address ^= (address >> 7 & (width - 1)) << 4;
        if (address + 16 > a.size)
            misuse("a descriptor that reaches beyond shared memory", operation);
        found.push_back(address);
    };
    if (!across) {
        for (size_t line = 0; line < size_t(lines); line++)
            for (size_t c = 0; c < 2; c++)
                add(start + line % 8 * (16 * width) + line / 8 * stride +
                    c * (width == 1 ? leading : 16));
    } else {
        for (size_t k = 0; k < 16; k++)
            for (size_t u = 0; u < size_t(lines) / 8; u++)
                add(start + k % 8 * (16 * width) +
                    (width == 1 ? k / 8 * leading + u * stride
                                : k / 8 * stride + u % width * 16 + u / width * leading));
    }
    return found;
}

template <class Sum> Sum element_of(int element, const unsigned char* bytes, int i) {
    unsigned short half;
    std::memcpy(&half, bytes + 2 * i * (element <= F16), 2 - (element > F16));
    if (element == BF16) return Sum(bf16_to_f32(half));
    if (element == F16) return Sum(f16_to_f32(half));
    return element == S8 ? Sum(static_cast<signed char>(bytes[i])) : Sum(e4m3_to_f32(bytes[i]));
}

// D (64 x n) = A (64 x 32 bytes) B + C for all lanes: fragments as in the PTX manual.
template <class Sum> void compute(const Block& block, Product& p) {
    const int per = p.element <= F16 ? 2 : 4, depth = 8 * per, n = p.n;
    std::vector<Sum> A(size_t(64 * depth)), B(size_t(depth * n)), sum(static_cast<size_t>(n));
    size_t chunk = 0;
    auto gather = [&](std::vector<Sum>& to, int lines, bool across, int by_line, int by_k) {
        const int rows = across ? depth : lines, chunks = across ? lines / 8 : 2;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < chunks; c++, chunk++)
                for (int e = 0; e < 4 * per; e++) {
                    const int other = 4 * per * c + e, line = across ? other : r;
                    const int k = across ? r : other;
                    to[size_t(line * by_line + k * by_k)] =
                        element_of<Sum>(p.element, block.shared + p.chunks[chunk], e);
                }
    };
    if (p.a_descriptor) {
        gather(A, 64, p.across & 1, depth, 1);
    } else {
        for (int l = 0; l < 128; l++)
            for (int r = 0; r < 4; r++)
                for (int e = 0; e < per; e++) {
                    const int row = l / 32 * 16 + l % 32 / 4 + 8 * (r & 1);
                    const auto* bytes = reinterpret_cast<const unsigned char*>(p.lanes[l].a);
                    A[size_t(row * depth + (r >> 1) * depth / 2 + l % 4 * per + e)] =
                        element_of<Sum>(p.element, bytes, r * per + e);
                }
    }
    gather(B, n, p.across & 2, 1, n);
    for (int row = 0; row < 64; row++) {
        std::fill(sum.begin(), sum.end(), Sum(0));
        for (int k = 0; k < depth; k++) {
            const Sum a = A[size_t(row * depth + k)], *b = &B[size_t(k * n)];
            for (int j = 0; j < n; j++) sum[size_t(j)] += a * b[j];
        }
        for (int j = 0; j < n; j++) {  // element j % 2 + 2 half of a lane's four of 8 columns
            const int lane = row / 16 * 32 + row % 8 * 4 + j % 8 / 2;
            const int i = j / 8 * 4 + row / 8 % 2 * 2 + j % 2;
            uint32_t& at = p.sums[size_t(lane * n / 2 + i)];
            Sum c;
            std::memcpy(&c, &at, 4);
            c = p.accumulate ? c + sum[size_t(j)] : sum[size_t(j)];
            std::memcpy(&at, &c, 4);
        }
    }
}

// A product that all lanes have issued ends.
inline void finish(Async& a, Warpgroup& w, Product& p) {
    for (size_t i = 0; i < p.chunks.size(); i++)
        if (std::memcmp(a.block.shared + p.chunks[i], &p.before[16 * i], 16))
            return report(a.block, "shared memory that the %s of %s:%d reads was written before "
                          "the wait, wgmma_wait at %s:%d,", p.operation.name,
                          p.operation.place.name(), p.operation.place.line, p.wait.place.name(),
                          p.wait.place.line);
    if (p.chain >= w.first) p.sums = w.at(p.chain).sums;
    if (p.element == S8)
        compute<int>(a.block, p);
    else
        compute<float>(a.block, p);
    p.computed = true;
    release(w.waiters);
}

inline bool all_ones(const void* d, size_t words) {
    for (size_t i = 0; i < words; i++)
        if (static_cast<const uint32_t*>(d)[i] != ~0u) return false;
    return true;
}

// One lane's part of a wgmma. The bits of `across` say that A (1) and B (2) lie across the depth.
inline void issue(int element, int n, void* d, const unsigned* a_at, uint64_t a, uint64_t b,
                  int across, int accumulate, Place place) {
    Block& block = *self().block;
    Guard guard(block);
    const Operation operation = {kElements[element], place};
    Async& s = async();
    if (block.threads.size() % 128)
        misuse("wgmma needs whole warpgroups of 128 threads,", operation);
    Warpgroup& w = s.warpgroups[size_t(self().linear / 128)];
    const int l = self().linear % 128;
    Warpgroup::Lane& lane = w.lanes[l];
    if (!lane.fenced) misuse("a wgmma without wgmma_fence since the last wait", operation);
    const long index = lane.issued++;
    const size_t words = size_t(n / 2);
    long chain = -1;
    for (long j = lane.retired; j < index; j++) {
        const Product& q = w.at(j);
        const auto *mine = static_cast<char*>(d), *other = static_cast<char*>(q.lanes[l].d);
        if (mine + 4 * words <= other || other + 2 * q.n <= mine) continue;
        if (mine != other || q.n != n || (q.element == S8) != (element == S8))
            clash("accumulators", q.operation, "still adds to in another shape", operation);
        chain = j;
    }
    if (chain >= 0 && !all_ones(d, words))
        clash("accumulators", w.at(chain).operation, "still adds to were written", operation);
    if (index == w.end()) {
        auto made = std::make_unique<Product>();
        Product& p = *made;
        p.operation = operation;
        p.element = element, p.n = n, p.across = across, p.accumulate = accumulate != 0;
        p.chain = chain, p.a_descriptor = a_at ? 0 : a, p.b_descriptor = b;
        if (!a_at) p.chunks = chunks_of(s, a, 64, across & 1, operation);
        for (size_t chunk : chunks_of(s, b, n, across & 2, operation)) p.chunks.push_back(chunk);
        for (size_t chunk : p.chunks) {
            if (const BulkCopy* c = s.copy_into(chunk, 16))
                clash("a wgmma of shared memory", c->operation, "still fills", operation);
            if (!s.visible(chunk, 16))
                misuse("a wgmma of shared memory that was written without fence_proxy_async since,",
                       operation);
            p.before.insert(p.before.end(), block.shared + chunk, block.shared + chunk + 16);
        }
        p.sums.resize(128 * words);
        w.products.push_back(std::move(made));
    }
    Product& p = w.at(index);
    if (!p.operation.same(operation) || p.n != n || p.b_descriptor != b || p.chain != chain ||
        p.accumulate != (accumulate != 0) || p.a_descriptor != (a_at ? 0 : a))
        clash("a divergent wgmma: others of the warpgroup are at another", p.operation, "is",
              operation);
    p.lanes[l] = {d, a_at, {}};
    if (a_at) std::memcpy(p.lanes[l].a, a_at, 16);
    if (chain < 0) std::memcpy(&p.sums[size_t(l) * words], d, 4 * words);
    std::memset(d, 0xff, 4 * words);
    p.issued++;
}

// The lane's results of its oldest product, which has ended.
inline void retire(Warpgroup& w, int l, const Operation& operation) {
    Warpgroup::Lane& lane = w.lanes[l];
    const long index = lane.retired;
    Product& p = w.at(index);
    const size_t words = size_t(p.n / 2);
    if (p.lanes[l].a_at && std::memcmp(p.lanes[l].a, p.lanes[l].a_at, 16))
        clash("the A registers", p.operation, "reads were written before the wait", operation);
    if (!all_ones(p.lanes[l].d, words))
        clash("the accumulators", p.operation, "adds to were written before the wait", operation);
    bool later = false;
    for (long j = index + 1; j < lane.issued; j++) later |= w.at(j).chain == index;
    if (!later) std::memcpy(p.lanes[l].d, &p.sums[size_t(l) * words], 4 * words);
    lane.retired++;
    if (++p.retired < 128) return;
    for (auto& q : w.products)  // what adds to these sums takes them over
        if (q->chain == index && !q->computed) q->sums = p.sums, q->chain = -2;
    w.products.pop_front();
    w.first++;
}

inline void wait_for_products(int left, const Operation& operation) {
    Block& block = *self().block;
    Async* s;
    {
        Guard guard(block);
        s = &async();
    }
    const int l = self().linear % 128;
    Warpgroup& w = s->warpgroups[size_t(self().linear / 128)];
    Warpgroup::Lane& lane = w.lanes[l];
    if (lane.groups.size() > size_t(left)) {
        Guard guard(block);
        const long end = lane.groups[lane.groups.size() - size_t(left) - 1];
        for (long i = lane.retired; i < end; i++)
            if (!w.at(i).wait.name) w.at(i).wait = operation;
        w.wanted = std::max(w.wanted, end);
    }
    for (; lane.groups.size() > size_t(left); lane.groups.pop_front())
        while (lane.retired < lane.groups.front()) {
            wait_until(w.waiters, operation, [&] { return w.at(lane.retired).computed; });
            Guard guard(block);
            retire(w, l, operation);
        }
    lane.fenced = false;
}

inline Warpgroup::Lane& products_of_lane() {  // guarded
    return async().warpgroups[size_t(self().linear / 128)].lanes[self().linear % 128];
}
}  // namespace sla2

template <class Word, int WORDS> void settle(Word (&)[WORDS]) {}  // about the compiler alone
inline void wgmma_fence() {
    sla2::Guard guard(*sla2::self().block);
    sla2::products_of_lane().fenced = true;
}
inline void wgmma_commit() {
    sla2::Guard guard(*sla2::self().block);
    sla2::Warpgroup::Lane& lane = sla2::products_of_lane();
    lane.groups.push_back(lane.issued);
}
template <int LEFT> void wgmma_wait(sla2::Place p = sla2::Place::here()) {
    sla2::wait_for_products(LEFT, {"wgmma_wait", p});
}

template <int SWIZZLE>
unsigned long long matrix_descriptor(const void* at, int leading, int stride,
                                     sla2::Place p = sla2::Place::here()) {
    static_assert(SWIZZLE == 0 || SWIZZLE == 32 || SWIZZLE == 64 || SWIZZLE == 128, "bytes");
    size_t address = size_t(static_cast<const unsigned char*>(at) - sla2::self().block->shared);
    if ((address | size_t(leading) | size_t(stride)) % 16 || (address | size_t(stride)) >> 18)
        sla2::misuse("a descriptor counts in 16 bytes, below 256 KB,", {"matrix_descriptor", p});
    const unsigned long long mode = SWIZZLE == 0 ? 0 : SWIZZLE == 32 ? 3 : SWIZZLE == 64 ? 2 : 1;
    return address >> 4 | (unsigned long long)leading >> 4 << 16 |
           (unsigned long long)stride >> 4 << 32 | mode << 62;
}

#define SLA2_EMULATED_WGMMA(name, element, Sum)                                                   \
    template <int MAJOR_B, int WORDS>                                                             \
    void wgmma_##name(Sum (&d)[WORDS], const unsigned (&a)[4], unsigned long long b,              \
                      int accumulate, sla2::Place p = sla2::Place::here()) {                      \
        sla2::issue(sla2::element, 2 * WORDS, d, a, 0, b, 2 * MAJOR_B, accumulate, p);            \
    }                                                                                             \
    template <int MAJOR_A, int MAJOR_B, int WORDS>                                                \
    void wgmma_##name##_shared(Sum (&d)[WORDS], unsigned long long a, unsigned long long b,       \
                               int accumulate, sla2::Place p = sla2::Place::here()) {             \
        sla2::issue(sla2::element, 2 * WORDS, d, nullptr, a, b, MAJOR_A + 2 * MAJOR_B,            \
                    accumulate, p);                                                               \
    }
SLA2_EMULATED_WGMMA(bf16, BF16, float)
SLA2_EMULATED_WGMMA(f16, F16, float)
#undef SLA2_EMULATED_WGMMA

#define SLA2_EMULATED_WGMMA(name, element, Sum)                                                   \
    template <int WORDS>                                                                          \
    void wgmma_##name(Sum (&d)[WORDS], const unsigned (&a)[4], unsigned long long b,              \
                      int accumulate, sla2::Place p = sla2::Place::here()) {                      \
        sla2::issue(sla2::element, 2 * WORDS, d, a, 0, b, 0, accumulate, p);                      \
    }                                                                                             \
    template <int WORDS>                                                                          \
    void wgmma_##name##_shared(Sum (&d)[WORDS], unsigned long long a, unsigned long long b,       \
                               int accumulate, sla2::Place p = sla2::Place::here()) {             \
        sla2::issue(sla2::element, 2 * WORDS, d, nullptr, a, b, 0, accumulate, p);                \
    }
SLA2_EMULATED_WGMMA(s8, S8, int)
SLA2_EMULATED_WGMMA(e4m3, E4M3, float)
#undef SLA2_EMULATED_WGMMA
