// What is in flight in a block on Hopper: mbarriers, bulk copies, products of warpgroups, named
// barriers, registers. The functions on it are in mbarrier.h, bulk.h, wgmma.h and roles.h.
#pragma once
#include "cuda_names.h"
#include <deque>
#include <map>

namespace sla2 {

struct Mbarrier {
    unsigned count = 0, pending = 0;  // arrivals of a phase, and those that it still lacks
    long bytes = 0;                   // that the phase still expects of copies
    unsigned phase = 0;
    int owner = 0;           // the thread that initialised it
    bool published = false;  // by that thread's proxy fence: copies may complete on it
    Barrier waiters;
};

struct BulkCopy {
    size_t at;  // of its target in shared memory
    const unsigned char* from;
    size_t bytes;
    size_t barrier;  // offset of the mbarrier that it completes on
    Operation operation;
};

// A wgmma, which its warpgroup's 128 threads issue one by one.
struct Product {
    Operation operation;
    int element = 0, n = 0, across = 0, accumulate = 0;
    uint64_t a_descriptor = 0, b_descriptor = 0;  // A's is 0 where A is in registers
    std::vector<size_t> chunks;         // of 16 bytes in shared memory that it reads, A's first
    std::vector<unsigned char> before;  // what they held when it was issued
    int issued = 0, retired = 0;        // lanes that have issued it, and waited for it
    bool computed = false;
    Operation wait;  // the first that covers it
    long chain = -1;  // the product in flight whose sums it adds to
    struct Lane { void* d; const unsigned* a_at; unsigned a[4]; } lanes[128];
    std::vector<uint32_t> sums;  // a lane's n / 2 behind another: C until it is computed, then D
};

struct Warpgroup {
    std::deque<std::unique_ptr<Product>> products;
    long first = 0;    // number of the oldest of them
    long wanted = 0;   // products before this one are waited for
    Barrier waiters;   // for the next one to end
    Barrier together;  // of setmaxnreg
    int registers = 0;
    struct Lane {
        long issued = 0, retired = 0;
        std::deque<long> groups;  // where each committed group ends
        bool fenced = false;      // wgmma.fence since the last wait
    } lanes[128];
    Product& at(long index) { return *products[size_t(index - first)]; }
    // What may end next: the oldest that has not, if somebody waits for it and all have issued it.
    Product* next() {
        for (long i = first; i < wanted && i < end(); i++)
            if (!at(i).computed) return at(i).issued == 128 ? &at(i) : nullptr;
        return nullptr;
    }
    long end() const { return first + long(products.size()); }
};

struct NamedBarrier {
    int arrived = 0, needed = 0;
    std::vector<bool> who;
    Barrier waiters;
};

struct Async;
void finish(Async& a, Warpgroup& w, Product& p);  // in wgmma.h

struct Async : Engine {
    Block& block;
    const size_t size;                // of shared memory
    std::vector<unsigned char> seen;  // shared memory as the asynchronous units may see it
    std::map<size_t, Mbarrier> mbarriers;
    std::vector<BulkCopy> copies;
    std::vector<Warpgroup> warpgroups;
    NamedBarrier named[16];
    int free_registers = 0;
    Barrier registers_freed;
    uint64_t random;

    explicit Async(Block& b)
        : block(b), size(b.launch->shared_bytes), seen(b.shared, b.shared + size),
          warpgroups((b.threads.size() + 127) / 128),
          random(b.launch->settings.seed + 977u * b.index.x + 31u * b.index.y) {
        // What __launch_bounds__(threads, 1) leaves a thread.
        for (Warpgroup& w : warpgroups) w.registers = 65536 / int(b.threads.size()) / 8 * 8;
    }

    // Where shared memory of so many bytes lies; refuses what is not within the block's.
    size_t offset(const void* p, size_t bytes, size_t alignment, const Operation& operation) const {
        size_t at = size_t(static_cast<const unsigned char*>(p) - block.shared);
        if (at > size || bytes > size - at)
            misuse("an address outside of the block's dynamic shared memory", operation);
        if (at % alignment) misuse("a misaligned shared address", operation);
        return at;
    }

    // Whether all that these bytes hold was written by copies, or before a proxy fence.
    bool visible(size_t at, size_t bytes) const {
        return std::memcmp(block.shared + at, &seen[at], bytes) == 0;
    }

    const BulkCopy* copy_into(size_t at, size_t bytes) const {
        for (const BulkCopy& c : copies)
            if (at < c.at + c.bytes && c.at < at + bytes) return &c;
        return nullptr;
    }

    // A copy lands, the oldest, the newest or any, by the order of threads; or a product ends, in
    // random order any time, otherwise when there is no copy left.
    bool advance() override {
        std::vector<Warpgroup*> ready;
        for (Warpgroup& w : warpgroups)
            if (w.next()) ready.push_back(&w);
        if (copies.empty() && ready.empty()) return false;
        const int order = block.launch->settings.order;
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        const size_t any = size_t(random >> 33) % (copies.size() + ready.size());
        const size_t i = order == 2 ? any : order == 1 && !copies.empty() ? copies.size() - 1 : 0;
        if (i >= copies.size()) {
            Warpgroup& w = *ready[i - copies.size()];
            finish(*this, w, *w.next());
            return true;
        }
        const BulkCopy c = copies[i];
        copies.erase(copies.begin() + long(i));
        land(c);
        return true;
    }

    void land(const BulkCopy& c) {
        unsigned char* to = block.shared + c.at;
        for (size_t i = 0; i < c.bytes; i++)
            if (to[i] != 0xff)
                return report(block, "shared memory was written while the bulk copy of %s:%d to it "
                              "was in flight,", c.operation.place.name(), c.operation.place.line);
        {
            Unguarded seen_by_sanitizer;
            memory_acquired(block.shared + c.barrier);
            for (size_t i = 0; i < c.bytes; i += 8) {
                uint64_t value;
                std::memcpy(&value, c.from + i, 8);
                *reinterpret_cast<uint64_t*>(to + i) = value;
            }
            memory_released(block.shared + c.barrier);
        }
        std::memcpy(&seen[c.at], to, c.bytes);
        Mbarrier& m = mbarriers[c.barrier];
        m.bytes -= long(c.bytes);
        settle(m);
    }

    // The phase ends with its last arrival and its last byte.
    void settle(Mbarrier& m) {
        if (m.pending || m.bytes) return;
        m.phase++;
        m.pending = m.count;
        release(m.waiters);
    }

    void explain(const Thread& t, char* text, size_t room) override {
        for (const auto& [at, m] : mbarriers)
            if (t.waits_at == &m.waiters)
                append(text, room, " (the mbarrier at byte %zu lacks %u of %u arrivals and %ld "
                       "bytes in phase %u)", at, m.pending, m.count, m.bytes, m.phase);
        for (int i = 0; i < 16; i++)
            if (t.waits_at == &named[i].waiters)
                append(text, room, " (barrier %d has %d of %d threads)", i, named[i].arrived,
                       named[i].needed);
        for (Warpgroup& w : warpgroups) {
            const long index = w.lanes[t.linear % 128].retired;
            if (t.waits_at == &w.waiters && index < w.end())
                append(text, room, " (%d of 128 threads have issued the wgmma of %s:%d)",
                       w.at(index).issued, w.at(index).operation.place.name(),
                       w.at(index).operation.place.line);
        }
        if (t.waits_at == &registers_freed)
            append(text, room, " (%d registers are free)", free_registers);
    }

    void thread_returns(const Thread& t) override {
        const Warpgroup& w = warpgroups[size_t(t.linear / 128)];
        const Warpgroup::Lane& lane = w.lanes[t.linear % 128];
        if (lane.issued == lane.retired) return;
        const Place& place = w.products[size_t(lane.retired - w.first)]->operation.place;
        report(block, "thread %d returned before the wgmma of %s:%d was waited for", t.linear,
               place.name(), place.line);
    }

    void block_ends() override {
        if (!copies.empty())
            return report(block, "the bulk copy of %s:%d was not waited for",
                          copies[0].operation.place.name(), copies[0].operation.place.line);
        for (const auto& [at, m] : mbarriers)
            if (m.bytes)
                return report(block, "the mbarrier at byte %zu ends with %ld bytes too %s", at,
                              std::labs(m.bytes), m.bytes > 0 ? "few" : "many");
    }
};

inline Async& async() {  // guarded
    Block& block = *self().block;
    if (!block.engine) block.engine = std::make_unique<Async>(block);
    return static_cast<Async&>(*block.engine);
}

}  // namespace sla2
